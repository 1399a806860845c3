"""The ONNX file of a model on Keras's torch back end, by PyTorch's tracer.

Keras's own exporter calls the same tracer, but lets it number the outputs, fuse BN into convolutions on its own account
(pytorch#166797) and write the rest of BN as products and sums.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import torch
from keras import ops
from onnx import numpy_helper
from torch.utils._python_dispatch import TorchDispatchMode

from bntools.backends.keras.flat import Flat, Spec
from bntools.backends.keras.naming import norms
from bntools.backends.keras.state import attributes_set
from bntools.backends.keras.visible import constants, labels, operable
from bntools.errors import BntoolsError

Called = list[tuple[str, np.ndarray]]  # the calls of BN layers, in order: what the file calls the layer, and its mean
READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


def tensors(inputs: list[Spec], arrays: Iterable[Any]) -> tuple[Any, ...]:
    """The inputs to trace, from arrays in the order of ``inputs``."""
    return tuple(ops.convert_to_tensor(array, dtype=one.dtype) for one, array in zip(inputs, arrays, strict=True))


def check_decisions(flat: Flat, model: Any, traced: tuple[Any, ...]) -> None:
    """Raise BntoolsError for a model that reads a computed value into Python: a trace would freeze what it decides."""
    with torch.no_grad(), _Reads() as reads:
        flat.call(*traced)
    if reads.place:
        raise BntoolsError(
            f"the model {model.name!r} reads a computed value into Python at {reads.place}: a trace would freeze "
            f"what the example decides. Write it with keras.ops.where"
        )


def write(flat: Flat, model: Any, inputs: list[Spec], traced: tuple[Any, ...], path: Path, opset: int | None) -> None:
    """Write the file: inputs and outputs have the names of the model, and BN is one operator, named after its layer."""
    outer = _Plain(flat)
    outer.training = False  # of this module alone: eval() would set the flags of all layers
    with torch.no_grad(), _shown(model) as called:
        names = list(flat.call(*traced))
        called.clear()
        torch.onnx.export(
            outer,
            traced,
            str(path),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would also fuse BN into convolutions
            input_names=[one.name for one in inputs],
            output_names=names,
            dynamic_axes=_axes(inputs),
            opset_version=opset,
        )
    _name(path, called)


class _Plain(torch.nn.Module):
    """The outputs as a list: of a dict, the tracer would take the order of the names."""

    def __init__(self, flat: Flat):
        super().__init__()
        self.flat = flat

    def forward(self, *tensors: Any) -> list[Any]:
        return list(self.flat.call(*tensors).values())


class _Reads(TorchDispatchMode):
    """Notes where a tensor's value is first read into Python, file and line; "" if nowhere."""

    place = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS and not self.place:
            inner = ("torch/", "backends/keras/scripted.py")
            frames = [one for one in traceback.extract_stack() if not any(part in one.filename for part in inner)]
            self.place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return func(*args, **(kwargs or {}))


def _axes(inputs: list[Spec]) -> dict[str, dict[int, str]]:
    names = {one.name: {axis: "batch" for axis, size in enumerate(one.shape) if size is None} for one in inputs}
    return {name: axes for name, axes in names.items() if axes}


@contextmanager
def _shown(model: Any) -> Iterator[Called]:
    """While it lasts, every BN layer of the model is one operator in what is traced; the calls are noted."""
    found, called = norms(model), Called()
    stops = [
        (found[name], "call", partial(_fused, found[name], label, constants(found[name]), found[name].call, called))
        for label, name in labels(model).items()
        if operable(found[name])
    ]
    with attributes_set(stops):
        yield called


def _fused(
    layer: Any,
    label: str,
    values: dict[str, np.ndarray],
    usual: Callable[..., Any],
    called: Called,
    inputs: Any,
    training: Any = None,
    mask: Any = None,
) -> Any:
    """The layer in inference, as one operator over channels that come second, where it computes in float32."""
    if keras.backend.result_type(inputs.dtype, "float32") != "float32":
        return usual(inputs, training=False)
    mean, var, scale, shift = (ops.convert_to_tensor(values[name]) for name in ("mean", "variance", "scale", "offset"))
    axis = layer.axis % inputs.ndim
    x = torch.movedim(ops.cast(inputs, "float32"), axis, 1)
    y = torch.nn.functional.batch_norm(x, mean, var, scale, shift, training=False, eps=layer.epsilon)
    called.append((label, values["mean"]))
    return ops.cast(torch.movedim(y, 1, axis), layer.compute_dtype)


def _name(path: Path, called: Called) -> None:
    """Call the BN operators of a file after their layers: they stand in the order in which the layers were called.

    A call whose output nobody uses has no operator; the means tell.
    """
    model = onnx.load(path, load_external_data=False)  # constants of the trace are never outside
    stored = {one.name: one for one in model.graph.initializer}
    stored |= {one.output[0]: one.attribute[0].t for one in model.graph.node if one.op_type == "Constant"}
    calls = iter(called)
    for number, node in enumerate(one for one in model.graph.node if one.op_type == "BatchNormalization"):
        mean = stored.get(node.input[3])
        if mean is None or mean.data_location == onnx.TensorProto.EXTERNAL:
            continue
        wanted = numpy_helper.to_array(mean)
        label = next((label for label, value in calls if np.array_equal(value, wanted)), None)
        if label is not None:
            node.name = f"{label}/BatchNormalization_{number}"
    onnx.save(model, path)
