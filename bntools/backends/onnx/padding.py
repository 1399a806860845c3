"""Padding with zeros before max-pooling, kept from ONNX Runtime's optimizer.

Since onnxruntime#18136 its default level makes Pad and MaxPool one MaxPool, whose own padding is minus infinity: where
all of a window is negative, the result is wrong (seen in 1.31). Keras's ResNetV2 has such a place. A maximum of one
value between the two changes nothing, and keeps them apart.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

PASSING = ("Cast", "Identity", "Transpose")


def guard_padding(model: ir.Model) -> None:
    """Put a maximum between each Pad with anything but minus infinity and the max-pooling that reads it."""
    for node in [node for node in model.graph if node.op_type == "Pad"]:
        readers = [(reader, place) for reader, place in node.outputs[0].uses() if _pools(reader)]
        if readers and not _harmless(node):
            guarded = _guard(model.graph, node)
            for reader, place in readers:
                reader.replace_input_with(place, guarded)


def _pools(node: ir.Node) -> bool:
    """Whether a node is max-pooling, or hands on to one what the optimizer drops or moves out of the way."""
    passing = node.op_type in PASSING and any(_pools(reader) for reader, _ in node.outputs[0].uses())
    return node.op_type == "MaxPool" or passing


def _guard(graph: ir.Graph, pad: ir.Node) -> ir.Value:
    padded = pad.outputs[0]
    guard = ir.node("Max", [padded], name=f"{pad.name or padded.name}.guard")
    guarded = guard.outputs[0]
    guarded.name, guarded.type, guarded.shape = f"{padded.name}.guard", padded.type, padded.shape
    graph.insert_after(pad, guard)
    return guarded


def _harmless(pad: ir.Node) -> bool:
    """Whether fusing would change nothing, or is not done: other modes than constant padding."""
    mode = pad.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return True
    given = pad.inputs[2] if len(pad.inputs) > 2 else None
    value = given.const_value if given is not None else None
    return value is not None and bool(np.all(value.numpy() == -np.inf))
