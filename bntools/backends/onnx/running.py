"""Running an ONNX model: what of a batch goes into which input, and its outputs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from bntools.backends.onnx.protobuf import Source, read, serialized
from bntools.backends.onnx.session import full_names, open_session, quiet
from bntools.backends.onnx.tracing import trace
from bntools.errors import BntoolsError
from bntools.noise import brief
from bntools.resizing import to_numpy
from bntools.runner import Outputs, Runner, least_precise

DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "object",
    "tensor(bfloat16)": None,  # numpy has no such dtype
}


def predict(model: Source, batch: Any, providers: Sequence[str] = ("cpu",), optimize: bool = True) -> Outputs:
    """The outputs of a model for one batch by name, computed by ONNX Runtime.

    ``model`` is a path or an onnx.ModelProto; the batch is an array, a tuple or list (its first
    element), or a dict by input name. ``optimize`` is the runtime's default level of graph
    optimizations, or none. Raises BntoolsError for a batch that does not fit the model's inputs.
    """
    return run(_session(model, providers, optimize), batch, name_of(model))


def runners(
    model: Source, providers: Sequence[str] = ("cpu",), forward: Callable[..., Any] | None = None
) -> list[Runner]:
    """The two ways to run a model: graph optimizations off and at the default level.

    ``forward`` is a module's own calling convention and does not concern a graph.
    """
    name, proto = name_of(model), model if isinstance(model, onnx.ModelProto) else read(model)
    return [
        Runner(
            name=name,
            framework="onnx",
            provider=full_names(providers)[0],
            optimization="default" if optimize else "off",
            dtype=_least_precise(proto),
            run=partial(run, _session(model, providers, optimize), name=name),
            trace=partial(_trace, model, providers, optimize),
        )
        for optimize in (False, True)
    ]


def run(session: ort.InferenceSession, batch: Any, name: str) -> Outputs:
    """The outputs of a session for one batch by name."""
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, feed(session.get_inputs(), batch, name), quiet())
    except BntoolsError:
        raise
    except Exception as error:  # the runtime's own errors share no base class but this one
        raise BntoolsError(f"ONNX Runtime {ort.__version__} fails in {name}: {brief(error)}") from error
    for output, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray):
            raise BntoolsError(
                f"{name}: output {output!r} is no tensor but a {type(value).__name__}: cannot be compared"
            )
    return dict(zip(names, values, strict=True))


def feed(inputs: Sequence[Any], batch: Any, name: str) -> Outputs:
    """What of a batch goes into each input, in the dtype that the input has.

    A dict goes in by name (what the model has no input for is left out, as exporters drop inputs that
    nothing reads); anything else into the only input, nested values in order.
    """
    if isinstance(batch, Mapping) and all(one.name in batch for one in inputs):
        return {one.name: fit(one, batch[one.name], name) for one in inputs}
    arrays = list(leaves(batch if isinstance(batch, Mapping) else first(batch)))
    nested = not isinstance(batch, Mapping) or any(isinstance(v, (Mapping, tuple, list)) for v in batch.values())
    if len(arrays) != len(inputs) or not (nested or len(inputs) == 1):
        given = f"names {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"holds {len(arrays)} arrays"
        raise BntoolsError(
            f"{name} has the inputs {', '.join(repr(one.name) for one in inputs)}, but the batch {given}: "
            f"pass a dict with one array for each input"
        )
    return {one.name: fit(one, array, name) for one, array in zip(inputs, arrays, strict=True)}


def fit(wanted: Any, value: Any, name: str) -> np.ndarray:
    """A value as the array that an input takes; raises BntoolsError where its shape or dtype does not fit."""
    array = to_numpy(value)
    dtype = DTYPES.get(wanted.type, wanted.type.removeprefix("tensor(").removesuffix(")"))
    if dtype is None:
        raise BntoolsError(
            f"{name}: input {wanted.name!r} is {wanted.type}, which ONNX Runtime does not take from numpy"
        )
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise BntoolsError(f"{name}: input {wanted.name!r} is {dtype}, but the batch holds {array.dtype}")
    shape = wanted.shape or []
    fixed = [(i, size) for i, size in enumerate(shape) if isinstance(size, int)]
    if len(shape) != array.ndim or any(array.shape[i] != size for i, size in fixed):
        hint = ""
        if fixed and fixed[0][0] == 0 and len(shape) == array.ndim and array.shape[1:] == tuple(shape[1:]):
            hint = f": its batch size is fixed at {shape[0]}"
        raise BntoolsError(
            f"{name}: input {wanted.name!r} takes the shape ({', '.join(map(str, shape))}), "
            f"but the batch has {tuple(array.shape)}{hint}"
        )
    return np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)


def first(batch: Any) -> Any:
    """What of a batch is the input: the first element of a tuple or list, else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def leaves(value: Any) -> list[Any]:
    """The arrays of a nested value in order; what is no array (None, flags) is left out."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value] if hasattr(value, "dtype") else []


def name_of(model: Source) -> str:
    """How messages call a model: its path, or the name of its graph."""
    if isinstance(model, onnx.ModelProto):
        return f"the ONNX model {model.graph.name!r}" if model.graph.name else "the ONNX model"
    return str(model)


def _session(model: Source, providers: Sequence[str], optimize: bool) -> ort.InferenceSession:
    if isinstance(model, onnx.ModelProto):
        return open_session(serialized(model), name_of(model), providers, optimize=optimize)
    read(model)
    return open_session(str(model), name_of(model), providers, optimize=optimize)


def _trace(model: Source, providers: Sequence[str], optimize: bool, batch: Any) -> Any:
    proto = model if isinstance(model, onnx.ModelProto) else read(model)
    folder = None if isinstance(model, onnx.ModelProto) else Path(model).resolve().parent

    def read_points(source: bytes) -> Outputs:
        session = open_session(source, name_of(model), providers, optimize=optimize, folder=folder)
        return run(session, batch, name_of(model))

    return trace(proto, read_points)


def _least_precise(proto: onnx.ModelProto) -> str:
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    names = {onnx.TensorProto.DataType.Name(number).lower() for number in types}
    renamed = {"float": "float32", "double": "float64"}
    return least_precise({renamed.get(name, name) for name in names})
