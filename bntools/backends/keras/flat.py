"""A Keras model as a function from named tensors to named tensors, which is what exporters take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from bntools.backends.keras.calls import symbolic_inputs
from bntools.backends.keras.feeding import canonical
from bntools.backends.keras.running import invoke, output_names
from bntools.errors import BntoolsError


@dataclass(frozen=True)
class Spec:
    """One input: its name in the file, its shape with None for what is dynamic, and its dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class Flat(keras.Model):
    """A model whose inputs come one by one, in the order of ``specs``, and whose outputs are a dict by name.

    The model itself is not changed, and always runs with ``training=False``.
    """

    def __init__(self, model: Any, keys: list[Any] | None):
        super().__init__(name="flat", autocast=False)
        # TensorFlow would trace what it finds here on its own account, as each model's default signature, and fails
        # on one that takes several arguments.
        self.inner = (lambda: model) if keras.backend.backend() == "tensorflow" else model
        self.keys = keys
        self.built = True

    def call(self, *tensors: Any) -> dict[str, Any]:
        """The outputs of the model by their names in the file."""
        model = self.inner() if keras.backend.backend() == "tensorflow" else self.inner
        given = tensors[0] if self.keys is None else dict(zip(self.keys, tensors, strict=True))
        return named_outputs(model, invoke(model, given), self.keys)


def specs(model: Any, example: Any, other: Any | None) -> tuple[list[Spec], list[Any] | None]:
    """The inputs of the file for an example, and the keys under which the model takes them, None for a single array.

    Axes whose size differs between the two examples are dynamic; None makes all of them static.
    Raises BntoolsError for an input that a file cannot hold: strings, sparse and ragged tensors.
    """
    here = canonical(model, example)
    there = here if other is None else canonical(model, other)
    if not isinstance(here, Mapping):
        return [_spec(_only_input(model), here, there)], None
    if not all(hasattr(value, "shape") for value in here.values()):
        wrong = next(key for key, value in here.items() if not hasattr(value, "shape"))
        raise BntoolsError(f"input {wrong!r} of the example is no array, but a {type(here[wrong]).__name__}")
    names = {key: key if isinstance(key, str) else f"input_{key}" for key in here}
    return [_spec(names[key], here[key], there[key]) for key in here], list(here)


def named_outputs(model: Any, result: Any, taken: list[Any] | None) -> dict[str, Any]:
    """What a model returned, flat: by the names of a functional model's outputs, or by their places.

    Names sort in the order of the outputs where they are not a functional model's own, for that is the order
    in which an exporter writes them.
    """
    flat = [(path, value) for path, value in tree.flatten_with_path(result) if value is not None]
    if not flat:
        raise BntoolsError(f"the model {model.name!r} returns no tensors: there is nothing to export")
    names = output_names(model, len(flat)) or _places([path for path, _ in flat])
    used = {str(key) for key in taken or []} | {_only_input(model)}
    return {f"output_{name}" if name in used else name: value for name, (_, value) in zip(names, flat, strict=True)}


def _places(paths: list[tuple[Any, ...]]) -> list[str]:
    width = len(str(len(paths) - 1))
    parts = [[f"{part:0{width}d}" if isinstance(part, int) else str(part) for part in path] for path in paths]
    names = ["_".join(["output", *part] if not part or part[0].isdigit() else part) for part in parts]
    return names if len(set(names)) == len(names) else [f"output_{i:0{width}d}" for i in range(len(names))]


def _only_input(model: Any) -> str:
    inputs = symbolic_inputs(model)
    return inputs[0].name if len(inputs) == 1 else "input"


def _spec(name: str, here: Any, there: Any) -> Spec:
    if not isinstance(here, np.ndarray):
        raise BntoolsError(
            f"input {name!r} of the example is a {type(here).__name__}: only dense arrays can be exported"
        )
    if here.dtype.kind in "OUS":
        raise BntoolsError(
            f"input {name!r} of the example holds strings, which the exporter cannot take: export the model behind "
            f"its text layers, and give numbers"
        )
    shape = tuple(size if size == new else None for size, new in zip(here.shape, there.shape, strict=True))
    return Spec(re.sub(r"[^A-Za-z0-9_.\-/]", "_", name), shape, str(here.dtype))
