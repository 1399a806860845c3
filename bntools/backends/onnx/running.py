"""Running an ONNX model: what of a batch goes into which input, and its outputs by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from bntools.backends.onnx.providers import Provider, available, requested
from bntools.backends.onnx.session import computed, open_session, placement, require_placed
from bntools.backends.onnx.subject import Subject, subject
from bntools.backends.onnx.tracing import trace
from bntools.errors import BntoolsError
from bntools.resizing import to_numpy
from bntools.runner import Outputs, Runner, Trace

DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(string)": "object",
    "tensor(bfloat16)": None,  # numpy has no such dtype
}
# What has no numpy dtype cannot be read; nor can sequences and optionals.
UNREADABLE = re.compile(r"tensor\((bfloat16|u?int[24]|float[48]\w*)\)|seq\(.*|optional\(.*|sparse_tensor\(.*|map\(.*")
TF32 = ("CUDAExecutionProvider", "1")


def predict(model: Any, batch: Any, providers: Sequence[Provider] = ("cpu",), optimize: bool = True) -> Outputs:
    """The outputs of a model for one batch by name, computed by ONNX Runtime.

    ``model`` is a path, an onnx.ModelProto, an onnx_ir.Model or a Document; the batch is an array, a tuple or
    list (its first element), or a dict by input name. ``optimize`` is the runtime's default level of graph
    optimizations, or none. Raises BntoolsError for a batch that does not fit the model's inputs.
    """
    return _Kept(subject(model), providers, optimize).run(batch)


def runners(
    model: Any, providers: Sequence[Provider] = ("cpu",), forward: Callable[..., Any] | None = None
) -> list[Runner]:
    """The two ways to run a model: graph optimizations off and at the default level.

    Nothing is loaded before the first run. ``forward`` is a module's own calling convention and does not
    concern a graph. Raises BntoolsError for a provider that is unknown or not in this build of ONNX Runtime.
    """
    one = subject(model)
    provider = available(providers)[0]
    return [_runner(one, providers, provider, optimize) for optimize in (False, True)]


def _runner(one: Subject, providers: Sequence[Provider], provider: str, optimize: bool) -> Runner:
    kept = _Kept(one, providers, optimize)
    notes = []
    if one.large and optimize:
        notes.append(
            f"{one.name} is large: at the default level ONNX Runtime left out the optimizations that copy weights"
        )
    if any((name, options.get("use_tf32")) == TF32 for name, options in requested(providers)):
        notes.append("TF32 is on, as asked for: products are rounded to 10 bits before they are compared")
    return Runner(
        name=one.name,
        framework="onnx",
        provider=provider,
        optimization="default" if optimize else "off",
        dtype=one.dtype,
        run=kept.run,
        trace=partial(_trace, one, providers, optimize),
        placed=lambda: kept.placed,
        notes=tuple(notes),
    )


class _Kept:
    """A session, opened at the first run and kept for the next; that of a large model is dropped after each.

    So at most one large model is in memory at a time, and its file is only mapped: opening it again is cheap.
    """

    def __init__(self, one: Subject, providers: Sequence[Provider], optimize: bool):
        self._subject, self._providers, self._optimize = one, providers, optimize
        self._session: ort.InferenceSession | None = None
        self.placed: dict[str, int] = {}

    def run(self, batch: Any) -> Outputs:
        one = self._subject
        session = self._session or self._opened()
        self._session = None if one.large else session
        return run(session, batch, one.name)

    def _opened(self) -> ort.InferenceSession:
        one = self._subject
        session = open_session(
            one.source(), one.name, self._providers, optimize=self._optimize, folder=one.folder, lean=one.large
        )
        self.placed = placement(session)
        require_placed(self.placed, self._providers, one.name)
        return session


def _trace(one: Subject, providers: Sequence[Provider], optimize: bool, batch: Any) -> Trace:
    def read(extra: bytes, points: Sequence[str]) -> Outputs:
        # The encoding of a message followed by that of another is the encoding of both merged: more outputs.
        source = one.content() + extra
        session = open_session(
            source, one.name, providers, optimize=optimize, folder=one.content_folder, lean=one.large
        )
        strange = {output.name for output in session.get_outputs() if UNREADABLE.fullmatch(output.type)}
        return run(session, batch, one.name, [point for point in points if point not in strange])

    return trace(one.proto(), read)


def run(session: ort.InferenceSession, batch: Any, name: str, points: Sequence[str] | None = None) -> Outputs:
    """The outputs of a session for one batch by name: all of them, or only those called for.

    Raises BntoolsError for a batch that does not fit, a model that fails, and an output that is no tensor or has
    a dtype that numpy has not.
    """
    names = [output.name for output in session.get_outputs()] if points is None else list(points)
    fed = feed(session.get_inputs(), batch, name)
    for output in session.get_outputs() if points is None else ():
        if UNREADABLE.fullmatch(output.type):
            raise BntoolsError(
                f"{name}: output {output.name!r} is {output.type}, which ONNX Runtime does not give to numpy: it "
                f"cannot be compared; end the model with a Cast to float32, or with the tensors inside"
            )
    return computed(session, names, fed, name)


def feed(inputs: Sequence[Any], batch: Any, name: str) -> Outputs:
    """What of a batch goes into each input, in the dtype that the input has.

    A dict goes in by name (what the model has no input for is left out, as exporters drop inputs that
    nothing reads), one by number in order; anything else into the only input, nested values in order.
    """
    if isinstance(batch, Mapping) and all(one.name in batch for one in inputs):
        return {one.name: fit(one, batch[one.name], name) for one in inputs}
    arrays = list(leaves(batch if isinstance(batch, Mapping) else first(batch)))
    unnamed = not isinstance(batch, Mapping) or all(isinstance(key, int) for key in batch)
    nested = unnamed or any(isinstance(v, (Mapping, tuple, list)) for v in batch.values())
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
