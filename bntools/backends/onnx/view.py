"""What folding needs to know about the values of a graph, in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.layers import called
from bntools.backends.onnx.valuetypes import FLOATS

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View:
    """A document with the shapes of its values in one run.

    ``types`` are element types by name, as value_types gives them; ``parameters`` the values of computed
    parameters; ``uses`` how often each value is read, subgraphs and the graph's outputs included.
    """

    document: Document
    shapes: Mapping[str, Shape]
    types: Mapping[str, int | None]
    parameters: Mapping[str, np.ndarray]
    uses: Counter[str]

    def shape(self, name: str) -> Shape:
        """The shape of a value. Raises KeyError where it has none."""
        if name in self.shapes:
            return self.shapes[name]
        tensor = self.document.initializers.get(name)
        if tensor is not None:
            return tuple(tensor.dims)
        maker = self.document.producers[name]
        if maker.op_type != "Constant":
            raise KeyError(name)
        for one in maker.attribute:
            if one.name == "value":
                return tuple(one.t.dims)
        value = self.document.constant(name)
        if value is None:
            raise KeyError(name)
        return value.shape

    def is_constant(self, name: str) -> bool:
        """Whether a value is the same in every run."""
        return name in self.document.constants

    def is_float(self, name: str) -> bool:
        """Whether a value is known to hold floating-point numbers."""
        return self.types.get(name) in FLOATS

    def parameter(self, node: onnx.NodeProto, place: int) -> np.ndarray | None:
        """What a node reads at one place besides its data, None where it reads nothing. Raises KeyError if unknown."""
        name = node.input[place] if len(node.input) > place else ""
        if not name:
            return None
        value = self.document.constant(name)
        return self.parameters[name] if value is None else value


def label(node: onnx.NodeProto) -> str:
    """How messages call a node: ``Conv 'conv1'``."""
    return f"{node.op_type} {called(node)!r}"


def slot(node: onnx.NodeProto, place: int) -> str:
    """The slot of what a node reads at one place.

    Every use of a stored array has a slot of its own: an initializer that nodes share is parted where they need it.
    """
    return f"{node.output[0]}[{place}]"


def placed(name: str) -> tuple[str, int]:
    """The node's first output and the place that a slot stands for."""
    output, _, place = name[:-1].rpartition("[")
    return output, int(place)
