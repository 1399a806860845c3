"""The vocabulary in which a call of a Keras layer is described for folding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bntools.graph import Op

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Called:
    """One call of a layer or operation.

    ``layer`` is what was called, ``kind`` the class of keras.layers, or the operation of keras.ops, that it is
    (empty for one with code of its own), ``path`` its name. ``source`` and ``result`` are the shapes of the first
    tensor that it reads and of the first that it gives; ``symbolic`` is what the graph knows of ``source``, None
    for sizes that vary. ``arguments`` are the other arguments by name; ``locked`` says why its weights cannot be
    rewritten.
    """

    layer: Any
    kind: str
    path: str
    label: str
    source: Shape
    result: Shape
    symbolic: tuple[int | None, ...]
    locked: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def slot(self, weight: str) -> str:
        """The slot of a weight, also of a bias that is not there yet."""
        return f"{self.path}.{weight}"


@dataclass(frozen=True, eq=False)
class Part:
    """One neutral operation of those, one after the other, that a call is: what it gives has this ``shape``.

    ``label`` is how messages call it, the call's own label where it is empty.
    """

    op: Op
    shape: Shape
    label: str = ""
