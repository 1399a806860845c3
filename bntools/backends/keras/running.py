"""Running a Keras model on a batch, in inference mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from bntools.backends.keras.calls import symbolic_inputs
from bntools.backends.keras.feeding import canonical, input_names

Forward = Callable[[Any, Any], Any]


def call(model: Any, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on a batch with ``training=False``: an array, a tuple or list (its first element), or a dict.

    The arrays of a dict go to the inputs of these names, of a model written in Python to the parameters of its
    ``call``. ``forward(model, batch)`` overrides.
    """
    with plain_errors():
        return _called(model, batch, forward)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What goes wrong inside a layer is raised as it is: Keras would wrap it into a list of the layer's arguments."""
    before = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if before:
            keras.config.enable_traceback_filtering()


def _called(model: Any, batch: Any, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    inputs = canonical(model, batch)
    _check_shapes(model, inputs)
    return invoke(model, inputs)


def _check_shapes(model: Any, inputs: Any) -> None:
    """Raise ValueError for sizes other than a graph declares: layer by layer, Keras lets many of them pass."""
    names = input_names(model)
    given = inputs if isinstance(inputs, Mapping) else dict.fromkeys(names[:1], inputs)
    for name, symbol in zip(names, symbolic_inputs(model), strict=True):
        declared, shape = tuple(symbol.shape), tuple(getattr(given.get(name), "shape", ()))
        if not shape or _squeezed(shape, declared):
            continue
        if len(shape) != len(declared) or not _fits(shape[1:], declared[1:]):
            unbatched = len(shape) == len(declared) - 1 and _fits(shape, declared[1:])
            hint = ": one sample without a batch axis? (a tf.data.Dataset: dataset.batch(32))" if unbatched else ""
            wanted = ", ".join("?" if size is None else str(size) for size in declared)
            found = f"and the batch has shape {shape}{hint}"
            raise ValueError(f"the model {model.name!r} takes ({wanted}) at its input {name!r}, {found}")


def _fits(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    return all(size in (None, there) for size, there in zip(declared, shape, strict=True))


def _squeezed(shape: tuple[int, ...], declared: tuple[int | None, ...]) -> bool:
    """Whether Keras adds, or takes away, a last axis of length 1."""
    if len(shape) == len(declared) - 1:
        return declared[-1] == 1 and _fits(shape[1:], declared[1:-1])
    return len(shape) == len(declared) + 1 and shape[-1] == 1 and _fits(shape[1:-1], declared[1:])


def invoke(model: Any, inputs: Any) -> Any:
    """Run the model with ``training=False`` on inputs as ``canonical`` gives them, also on symbolic tensors."""
    if not isinstance(inputs, Mapping):
        alone = isinstance(getattr(model, "_inputs_struct", None), (list, tuple))  # Model([x], y)
        return model([inputs] if alone else inputs, training=False)
    if all(isinstance(name, int) for name in inputs):
        return model(list(inputs.values()), training=False)
    names = input_names(model)
    if names and not isinstance(model.input, Mapping) and set(names) <= inputs.keys():
        # Keras asks for the tensors' own names as well, which differ for inputs that nobody named.
        values = [inputs[name] for name in names]
        return model(values[0] if len(values) == 1 else values, training=False)
    if not names and inputs.keys() <= inspect.signature(model.call).parameters.keys():
        return model(**inputs, training=False)
    return model(dict(inputs), training=False)


def predict(model: Any, batch: Any, forward: Forward | None = None) -> dict[str, np.ndarray]:
    """The model's outputs in inference mode by name, as numpy arrays (bfloat16 as float32).

    Outputs of a functional model have the names of the layers that give them; those of any other their
    places in what it returns, ``output`` alone if that is one tensor.
    """
    return named_outputs(model, call(model, batch, forward), forward)


def named_outputs(model: Any, result: Any, forward: Forward | None = None) -> dict[str, np.ndarray]:
    """What a model gave, nested as it may be, as numpy arrays by name."""
    flat = [(path, value) for path, value in tree.flatten_with_path(result) if value is not None]
    names = output_names(model, len(flat)) if forward is None else None
    if names is None:
        names = ["output" + "".join(f"[{part!r}]" for part in path) for path, _ in flat]
    return {name: to_numpy(value) for name, (_, value) in zip(names, flat, strict=True)}


def output_names(model: Any, number: int) -> list[str] | None:
    """The names of a functional model's outputs, if they are as many and differ from one another."""
    names = list(getattr(model, "output_names", None) or [])
    return names if len(names) == number and len(set(names)) == number else None


def to_numpy(value: Any) -> np.ndarray:
    """A copy of a tensor as numpy; bfloat16, which numpy lacks, as float32."""
    array = np.array(ops.convert_to_numpy(value))
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
