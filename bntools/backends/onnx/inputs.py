"""What an ONNX file says about its inputs: names, dtypes, sizes, and which axis holds the channels of images."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import onnx

from bntools.backends.onnx.document import Document, opened
from bntools.backends.onnx.layers import attribute
from bntools.inputs import Input

IMAGE = 4  # the rank of a batch of images
ELEMENTWISE = ("Identity", "Cast", "Add", "Sub", "Mul", "Div", "Clip", "Pad", "QuantizeLinear", "DequantizeLinear")
CHANNELS_FIRST = ("BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool", "InstanceNormalization")
USUAL = (1, 3, 4)  # numbers of channels that an image has


def takes(model: Any) -> list[Input]:
    """The inputs that a caller has to give, in the order of the file."""
    document = opened(model)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in document.proto.graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    given = [value for value in document.proto.graph.input if value.name not in document.initializers]
    return [_described(document, value, readers) for value in given]


def input_channels(model: Any) -> int | None:
    """How many channels the images have that the model takes; None where it takes none, or any number."""
    images = [one for one in takes(model) if one.channel_axis is not None]
    return images[0].channels if images else None


def _described(document: Document, value: onnx.ValueInfoProto, readers: dict[str, list[onnx.NodeProto]]) -> Input:
    kind = value.type.tensor_type
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError:  # a sequence, or a type that NumPy does not have
        dtype = "object"
    if not kind.HasField("shape"):
        return Input(value.name, dtype, None)
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    if len(shape) != IMAGE:
        return Input(value.name, dtype, shape)
    axis, channels = _channels(document, value.name, readers)
    if axis is None:
        axis = 3 if shape[3] in USUAL and shape[1] not in USUAL else 1
    return Input(value.name, dtype, shape, axis, shape[axis] or channels)


def _channels(document: Document, name: str, readers: dict[str, list[onnx.NodeProto]]) -> tuple[int | None, int | None]:
    """The axis of an input along which what reads it has its channels, and how many a convolution there takes."""
    waiting: deque[tuple[str, tuple[int, ...]]] = deque([(name, (0, 1, 2, 3))])
    seen = {name}
    while waiting:
        value, axes = waiting.popleft()
        for node in readers[value]:
            if node.op_type in ("Conv", "ConvTranspose") and node.input[0] == value:
                return _image_axis(axes[1]), _taken_by(document, node)
            if node.op_type in CHANNELS_FIRST and node.input[0] == value:
                return _image_axis(axes[1]), None
            there = axes
            if node.op_type == "Transpose":
                order = attribute(node, "perm", [3, 2, 1, 0])
                if sorted(order) != [0, 1, 2, 3]:
                    continue
                there = tuple(axes[i] for i in order)
            elif node.op_type not in ELEMENTWISE:
                continue
            for output in node.output[:1]:
                if output not in seen:
                    seen.add(output)
                    waiting.append((output, there))
    return None, None


def _image_axis(axis: int) -> int | None:
    return axis if axis in (1, 3) else None


def _taken_by(document: Document, node: onnx.NodeProto) -> int | None:
    """The channels that a convolution takes, by the shape of its weight."""
    weight = document.initializers.get(node.input[1]) if len(node.input) > 1 else None
    if weight is None or len(weight.dims) < 2:
        return None
    return int(weight.dims[0] if node.op_type == "ConvTranspose" else weight.dims[1] * attribute(node, "group", 1))
