"""The BN layers of an ONNX graph as records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from bntools.backends.onnx.document import STANDARD, Document, opened, subgraphs
from bntools.backends.onnx.tracing import scopes
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Stats

OP = "BatchNormalization"
EPS, MOMENTUM = 1e-5, 0.9  # the operator's defaults in every opset
MOST = 1 << 22  # channels of all layers together; nodes may share a constant, and a few bytes make one of millions
SCALE, SHIFT, MEAN, VAR = 1, 2, 3, 4  # places among its inputs


@dataclass(frozen=True)
class Found:
    """A BatchNormalization node: its layer's name, and where it lies if not in the main graph."""

    name: str
    node: onnx.NodeProto
    inside: str = ""


def layers(model: Any) -> list[BatchNorm]:
    """The record of every BatchNormalization, in the order of the file.

    A layer is called by the prefix that the names of its scale and shift share (``layer1.0.bn1`` for
    ``layer1.0.bn1.weight``), else by the source module that the exporter left in the file, by its
    node or by its output: the first of these that only this layer has.
    """
    document = opened(model)
    records = []
    total = 0
    for one in found(document):
        records.append(_record(document, one))
        total += records[-1].features
        if total > MOST:
            raise BntoolsError(f"{document.name}: its layers have more than {MOST:,} channels in all: not read")
    return records


def found(document: Document) -> list[Found]:
    """Every BatchNormalization node with its layer's name, also in subgraphs and functions."""
    if document.layers is None:
        document.layers = _found(document)
    return document.layers


def _found(document: Document) -> list[Found]:
    nodes = list(_nodes(document.proto))
    candidates = [_candidates(node) for node, _ in nodes]
    counts = Counter(name for names in candidates for name in dict.fromkeys(names))
    taken: set[str] = set()
    result = []
    for (node, inside), names in zip(nodes, candidates, strict=True):
        name = next((one for one in names if counts[one] == 1), names[-1])
        while name in taken:  # two branches of an If may use the same names inside
            name += "'"
        taken.add(name)
        result.append(Found(name, node, inside))
    return result


def trains(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a BatchNormalization normalizes with each batch's own statistics and updates the stored ones."""
    if opset >= 14:
        return bool(attribute(node, "training_mode", 0))
    if opset >= 7:
        return sum(map(bool, node.output)) > 1
    return not attribute(node, "is_test", 0)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    try:
        return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)
    except ValueError as error:
        raise BntoolsError(
            f"node {node.name!r} ({node.op_type}): its attribute {name!r} is damaged: {error}"
        ) from error


def drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    """Remove these attributes from a node, as far as it has them."""
    for one in [one for one in node.attribute if one.name in names]:
        node.attribute.remove(one)


def obstacle(document: Document, one: Found) -> str:
    """Why the statistics of a layer can be neither measured nor folded; empty where they can."""
    if one.inside:
        return f"it lies {one.inside}"
    if not attribute(one.node, "spatial", 1):
        return "it keeps statistics per element (spatial=0), not per channel"
    if len(one.node.input) <= VAR or not one.node.output:
        return f"it is damaged: it has {len(one.node.input)} inputs of 5, and {len(one.node.output)} outputs"
    shapes = {}
    for place, what in ((MEAN, "mean"), (VAR, "variance"), (SCALE, "scale"), (SHIFT, "shift")):
        name = one.node.input[place]
        value = document.constant(name)
        if value is None:
            how = "an input of the graph" if name in document.inputs else "computed in the graph"
            return f"its {what} is no constant but {how}"
        shapes[what] = value.shape
    if len(set(shapes.values())) > 1 or len(shapes["mean"]) != 1:
        return f"its constants have other shapes than one number a channel: {shapes}"
    if one.node.input[0] in document.constants:
        return "what it normalizes is a constant"
    return ""


def _record(document: Document, one: Found) -> BatchNorm:
    node = one.node
    # In a subgraph or function only what is a constant of the main graph is known.
    arrays = [_array(document, one, place) for place in (MEAN, VAR, SCALE, SHIFT)]
    mean, var, scale, shift = (None if array is None else array.astype(np.float64).reshape(-1) for array in arrays)
    if one.name in document.stats:
        mean, var = document.stats[one.name]
    known = next((array for array in arrays if array is not None), np.zeros(0, np.float32))
    training = trains(node, document.opset)
    remarks = ["training mode: normalizes with each batch's own statistics"] * training
    reason = obstacle(document, one)
    return BatchNorm(
        name=one.name,
        kind=OP,
        features=known.size,
        axis=1,
        eps=_number(document, one, "epsilon", EPS),
        momentum=_number(document, one, "momentum", MOMENTUM),
        mean=mean,
        var=var,
        scale=scale,
        shift=shift,
        updates=None,
        stats_frozen=False,
        affine_frozen=False,
        dtype=str(arrays[0].dtype) if arrays[0] is not None else str(known.dtype),
        remarks=(*remarks, *([reason] if reason else [])),
        obstacle=reason,
    )


def _number(document: Document, one: Found, name: str, default: float) -> float:
    value = attribute(one.node, name, default)
    if not isinstance(value, (int, float)):
        raise BntoolsError(f"{document.name}: layer {one.name!r} has the {name} {value!r} where a number was expected")
    return float(value)


def stats_of(document: Document, one: Found) -> Stats:
    """The stored statistics of a layer without an obstacle, float64."""
    mean, var = (_array(document, one, place) for place in (MEAN, VAR))
    assert mean is not None
    assert var is not None
    return mean.astype(np.float64), var.astype(np.float64)


def _array(document: Document, one: Found, place: int) -> np.ndarray | None:
    return document.constant(one.node.input[place]) if len(one.node.input) > place else None


def _nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    yield from _in_graph(model.graph.node, "")
    for function in model.functions:
        yield from _in_graph(function.node, f"in the function {function.name!r}")


def _in_graph(nodes: Any, inside: str) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in nodes:
        if node.op_type == OP and node.domain in STANDARD:
            yield node, inside
        for graph in subgraphs(node):
            yield from _in_graph(graph.node, inside or f"in a subgraph of {node.op_type} {called(node)!r}")


def called(node: onnx.NodeProto) -> str:
    """The name of a node, its output where it has none, or at least its operator."""
    return next((name for name in (node.name, *node.output) if name), str(node.op_type))


def _candidates(node: onnx.NodeProto) -> list[str]:
    prefixes = {name[: max(name.rfind("."), name.rfind("/"), 0)] for name in node.input[SCALE:MEAN]}
    shared = prefixes.pop() if len(prefixes) == 1 else ""
    module = next(iter(scopes(node)[-1:]), "")
    return [name for name in (shared, module, node.name, *node.output[:1]) if name] or [OP]
