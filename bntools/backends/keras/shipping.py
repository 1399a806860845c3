"""Keras's own ONNX exporter, and PyTorch's where Keras runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import keras

from bntools.backends.keras.feeding import canonical
from bntools.backends.keras.flat import Flat, Spec, specs
from bntools.backends.keras.naming import named
from bntools.backends.keras.running import to_numpy
from bntools.backends.keras.state import attributes_set
from bntools.backends.keras.visible import visible
from bntools.errors import BntoolsError
from bntools.noise import brief, caught

# In the order in which they are tried: BN as one operator, or as Keras computes it.
EXPORTERS = ("keras", "keras-plain")


def require_exporter() -> None:
    """Raise BntoolsError where Keras runs on what none of EXPORTERS exports from."""
    if keras.backend.backend() not in ("tensorflow", "torch"):
        raise BntoolsError(
            f"Keras runs on {keras.backend.backend()}, from where BN cannot be exported as it is: save the model, "
            f"and export it with KERAS_BACKEND=tensorflow or torch (nothing was written)"
        )


def export(
    model: keras.Model, example: Any, path: Path, *, exporter: str, other: Any = None, opset: int | None = None
) -> dict[str, dict[int, str]]:
    """Write the model as an ONNX file with one of EXPORTERS, with ``training=False``.

    Returns the dynamic axes by input: the file itself may not name them. ``other`` is the example with another number
    of samples: axes of inputs whose size differs between the two become dynamic; None makes every axis static. Inputs
    keep their names, ``input`` if they have none; outputs
    have the names of a functional model's, else their places in what the model returns. ``opset=None`` is the
    exporter's own. The exporter prints nothing; what it said is a note of the error's cause.

    Raises BntoolsError where the exporter fails, OSError where the file cannot be written.
    """
    _check_dtypes(model)
    inputs, keys = specs(model, example, other)
    plain = exporter == "keras-plain"
    with caught(native=True) as said:
        try:
            flat = Flat(model, keys)
            if keras.backend.backend() == "torch":
                _trace(flat, model, example, inputs, path, opset, plain)
            else:
                with _constants(model), nullcontext() if plain else visible(model):
                    _write(flat, inputs, path, opset)
        except (OSError, BntoolsError):
            raise
        except Exception as error:  # an exporter may raise anything, from many libraries
            if noise := said():
                error.add_note(f"the exporter said: {noise}")
            raise BntoolsError(f"the {exporter} exporter fails: {type(error).__name__}: {brief(error)}") from error
        if not path.exists():
            raise BntoolsError(f"the {exporter} exporter wrote no file: {brief(said()) or 'it does not say why'}")
    names = {one.name: {axis: "batch" for axis, size in enumerate(one.shape) if size is None} for one in inputs}
    return {name: axes for name, axes in names.items() if axes}


def _write(flat: Flat, inputs: list[Spec], path: Path, opset: int | None) -> None:
    flat.export(
        str(path),
        format="onnx",
        verbose=False,
        input_signature=[_signature(one) for one in inputs],
        opset_version=opset,
    )


def _constants(model: Any) -> AbstractContextManager[None]:
    """While it lasts, tensors that layers hold beside their variables, as Normalization its mean, are numpy arrays.

    TensorFlow's exporter would make inputs of the file of them.
    """
    held = [(layer, name, value) for layer in named(model).values() for name, value in vars(layer).items()]
    return attributes_set([(layer, name, to_numpy(v)) for layer, name, v in held if isinstance(v, _tensor_class())])


def _tensor_class() -> Any:
    return type(keras.ops.convert_to_tensor(0.0))


def _trace(
    flat: Flat, model: Any, example: Any, inputs: list[Spec], path: Path, opset: int | None, plain: bool
) -> None:
    from bntools.backends.keras import scripted  # here: it imports PyTorch

    given = canonical(model, example)
    arrays = given.values() if isinstance(given, Mapping) else [given]
    tensors = scripted.tensors(inputs, arrays)
    scripted.check_decisions(flat, model, tensors)
    if plain:
        _write(flat, inputs, path, opset)
    else:
        scripted.write(flat, model, inputs, tensors, path, opset)


def _signature(one: Spec) -> Any:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.TensorSpec(one.shape, one.dtype, name=one.name)
    return keras.InputSpec(shape=one.shape, dtype=one.dtype, name=one.name)


def _check_dtypes(model: Any) -> None:
    """Raise BntoolsError for a precision that no ONNX runtime here can compute in."""
    for name, layer in named(model).items():
        if "bfloat16" in (layer.compute_dtype, layer.variable_dtype) and layer.variables:
            raise BntoolsError(
                f"layer {name!r} computes in bfloat16, which ONNX Runtime does not on a CPU: build the model with "
                f"the policy 'float32', give it these weights (new.set_weights(model.get_weights())), and export that"
            )
