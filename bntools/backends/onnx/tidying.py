"""An exporter's file, tidied: what is constant computed, what is unused and what is private removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from onnxscript import optimizer

from bntools.backends.onnx.padding import guard_padding
from bntools.errors import BntoolsError

EXTERNAL_ABOVE = 1_800_000_000  # bytes of weights; a protobuf message holds at most 2 GiB in all
STACK_TRACE = "pkg.torch.onnx.stack_trace"  # paths of the machine that exported


Axes = Mapping[str, Mapping[int, str]]


def tidy(source: Path, target: Path, data_name: str, opset: int | None = None, axes: Axes | None = None) -> None:
    """Write the model in ``source``, tidied, to ``target``.

    ``axes`` names the dynamic axes of inputs, by input and axis, where the exporter does not; where all of them are
    one and the same, the first axes of outputs that it left nameless are that one too. Weights beyond what a protobuf
    message holds go to one file ``data_name`` beside ``target``. No operator
    is fused or replaced: that is where exporters went wrong (pytorch#166797). One is added where ONNX Runtime's
    optimizer does (``padding``).

    Raises BntoolsError where the model is not in the opset asked for: an exporter that cannot convert
    keeps its own and only warns.
    """
    model = ir.load(source)
    found = model.opset_imports.get("")
    if opset is not None and found != opset:
        raise BntoolsError(f"the file is in opset {found} where opset {opset} was asked for")
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    for node in _nodes(model):
        node.metadata_props.pop(STACK_TRACE, None)
        node.doc_string = None
    if axes:
        _name_axes(model, axes)
    guard_padding(model)
    weights = (value.const_value for value in model.graph.initializers.values())
    size = sum(weight.nbytes for weight in weights if weight is not None)
    ir.save(model, target, external_data=data_name if size > EXTERNAL_ABOVE else None)


def _name_axes(model: ir.Model, axes: Axes) -> None:
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name or "", {}).items():
            if value.shape is not None:
                value.shape = ir.Shape([name if i == axis else dim for i, dim in enumerate(value.shape)])
    names = {name for one in axes.values() for axis, name in one.items() if axis == 0}
    for value in model.graph.outputs:
        if len(names) == 1 and value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([*names, *value.shape[1:]])


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    graphs: Iterable[ir.Graph | ir.Function] = (model.graph, *model.functions.values())
    for graph in graphs:
        yield from graph.all_nodes()
