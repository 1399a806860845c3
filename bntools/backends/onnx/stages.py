"""The graph cut at the inputs of BN layers: what runs between one and the next, and what crosses the cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.layers import MEAN, VAR, Found
from bntools.backends.onnx.order import in_order, reads
from bntools.errors import BntoolsError

STATS = {MEAN: "running mean", VAR: "running variance"}


@dataclass(frozen=True)
class Stage:
    """The nodes that lead to the input of a layer and have not run for an earlier one.

    ``targets`` are the inputs of layers that can be measured when it has run, as pairs of layer and value.
    ``reads`` are the values that it takes from earlier stages or from the model's inputs, ``writes`` those
    that it hands on: targets and what later stages read. ``drops`` are the values that nothing reads
    once the targets were measured. ``applied`` are the layers among the nodes whose statistics are
    fed, each as two inputs of the stage.
    """

    targets: tuple[tuple[Found, str], ...]
    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    drops: frozenset[str]
    applied: tuple[Found, ...]


def cut(document: Document, layers: Sequence[Found], together: bool = False, outputs: bool = False) -> list[Stage]:
    """The stages that lead from layer to layer.

    With ``together`` all of them are one stage. What only nodes behind the last layer need is in none, unless
    ``outputs`` asks for what the graph gives, which nothing drops.
    """
    nodes = in_order(document.proto.graph)
    taken_by = [reads(node) for node in nodes]
    constants = document.initializers.keys() | {one.values.name for one in document.proto.graph.sparse_initializer}
    producers = {output: i for i, node in enumerate(nodes) for output in node.output if output}
    layers = sorted(layers, key=lambda one: producers[one.node.output[0]])
    done: set[int] = set()
    groups: list[tuple[list[Found], list[int]]] = []
    for one in layers:
        group = _ancestors(one.node.input[0], producers, taken_by, done)
        done |= set(group)
        if together and groups:
            groups[0][0].append(one)
            groups[0][1].extend(group)
        else:
            groups.append(([one], group))
    last = set(outputs_of(document)) if outputs else set()
    rest = sorted({i for value in last for i in _ancestors(value, producers, taken_by, done)})
    if together and groups:
        groups[0][1].extend(rest)
    elif rest:
        groups.append(([], rest))
    stages: list[Stage] = []
    later = set(last)
    for targets, group in reversed(groups):
        inside = dict.fromkeys(output for i in sorted(group) for output in nodes[i].output if output)
        taken = dict.fromkeys(name for i in sorted(group) for name in taken_by[i])
        outside = tuple(name for name in taken if name not in inside and name not in constants)
        wanted = {one.node.input[0] for one in targets}
        stages.append(
            Stage(
                targets=tuple((one, one.node.input[0]) for one in targets),
                nodes=tuple(nodes[i] for i in sorted(group)),
                reads=outside,
                writes=tuple(name for name in inside if name in later or name in wanted),
                drops=frozenset({*inside, *outside, *wanted} - later),
                applied=tuple(one for one in layers if producers[one.node.output[0]] in group),
            )
        )
        later |= {*outside, *wanted}
    return stages[::-1]


def outputs_of(document: Document) -> list[str]:
    """The outputs of a graph that its nodes compute."""
    made = {output for node in document.proto.graph.node for output in node.output}
    return [value.name for value in document.proto.graph.output if value.name in made]


@dataclass(frozen=True)
class Input:
    """An input of a graph as ONNX Runtime describes one: a size that is not fixed is None or has a name."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


def graph_inputs(document: Document) -> list[Input]:
    """The inputs that a batch has to bring: those without a default."""
    inputs = []
    for value in document.proto.graph.input:
        if value.name in document.initializers:
            continue
        tensor = value.type.tensor_type
        if not tensor.elem_type or tensor.elem_type not in onnx.TensorProto.DataType.values():
            raise BntoolsError(f"{document.name}: input {value.name!r} is no tensor of a known type: it cannot be fed")
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        sizes = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
        inputs.append(Input(value.name, f"tensor({dtype})", tuple(sizes)))
    return inputs


def model_of(document: Document, stage: Stage, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A stage as a model of its own; ``values`` are some of what it reads, which tell its inputs' types."""
    for name in stage.reads:
        if not isinstance(values[name], np.ndarray):
            raise BntoolsError(
                f"{document.name}: {name!r}, which is needed before and behind a BN layer, is a "
                f"{type(values[name]).__name__} and no tensor: the graph cannot be cut at that layer. Name the others "
                f"in layers="
            )
    nodes = [_fed(node, stage.applied) for node in stage.nodes]
    used = {name for node in nodes for name in reads(node)}
    inputs = [_value(name, values[name].dtype, values[name].ndim) for name in stage.reads]
    for one in stage.applied:
        for place in STATS:
            stat = document.constant(one.node.input[place])
            assert stat is not None
            inputs.append(_value(stat_name(one, place), stat.dtype, 1))
    graph = helper.make_graph(
        nodes,
        "stage",
        inputs,
        [onnx.ValueInfoProto(name=name) for name in stage.writes],
        [tensor for name, tensor in document.initializers.items() if name in used],
        sparse_initializer=[one for one in document.proto.graph.sparse_initializer if one.values.name in used],
    )
    return as_model(document, graph)


def as_model(document: Document, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A part of a model's graph as a model with the same operators and functions."""
    model = helper.make_model(graph, opset_imports=list(document.proto.opset_import))
    model.functions.extend(document.proto.functions)
    model.ir_version = document.proto.ir_version
    return model


def stat_name(one: Found, place: int) -> str:
    """The name under which a layer's mean or variance is fed to a stage."""
    return f"{STATS[place]} of {one.name}"


def _ancestors(value: str, producers: Mapping[str, int], taken_by: list[list[str]], done: set[int]) -> list[int]:
    """The nodes that have to run for a value, without those that have run, in the order of the file."""
    found: set[int] = set()
    waiting = [value]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node not in done and node not in found:
            found.add(node)
            waiting.extend(taken_by[node])
    return sorted(found)


def _fed(node: onnx.NodeProto, applied: Sequence[Found]) -> onnx.NodeProto:
    """The node itself, or for a layer a copy that reads its statistics from inputs of the stage."""
    one = next((one for one in applied if one.node.output[0] == node.output[0]), None)
    if one is None:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for place in STATS:
        copy.input[place] = stat_name(one, place)
    return copy


def _value(name: str, dtype: np.dtype, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [None] * rank)
