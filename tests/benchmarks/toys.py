"""ONNX graphs of few nodes, each with one thing that may keep an optimizer from folding its BN."""

from __future__ import annotations

import numpy as np
import onnx
from onnx_nets import Builder, conv

SHAPE = ("n", 3, 96, 96)


def toys() -> dict[str, onnx.ModelProto]:
    """Every graph by what it is."""
    return {
        "BN after ConvTranspose": _transposed(),
        "BN after Gemm": _dense("Gemm"),
        "BN after MatMul": _dense("MatMul"),
        "BN after Conv, Mul": _between("Mul"),
        "BN after Conv, Add": _between("Add"),
        "BN after Conv, Sub, Mul, Add": _between("Sub", "Mul", "Add"),
        "BN before Conv": _before(),
        "BN before Add, Conv": _before("Add"),
        "BN before Mul, Conv": _before("Mul"),
        "one weight in two Conv, each with its BN": _shared(),
        "one Conv with two equal BN": _twins(),
        "BN after Conv of a computed weight": _computed_weight(),
    }


def _transposed() -> onnx.ModelProto:
    b = Builder()
    return b.model([b.bn(b.op("ConvTranspose", "x", b.const(b.draw(3, 4, 3, 3))), 4)], SHAPE)


def _dense(kind: str) -> onnx.ModelProto:
    b = Builder()
    y = b.op("Flatten", b.op("GlobalAveragePool", "x"))
    return b.model([b.bn(b.op(kind, y, b.const(b.draw(3, 4))), 4)], SHAPE)


def _between(*kinds: str) -> onnx.ModelProto:
    b = Builder()
    y = conv(b)
    for kind in kinds:
        y = b.op(kind, y, b.const(b.draw(4, 1, 1)))
    return b.model([b.bn(y, 4)], SHAPE)


def _before(*kinds: str) -> onnx.ModelProto:
    b = Builder()
    y = b.bn("x", 3)
    for kind in kinds:
        y = b.op(kind, y, b.const(b.draw(3, 1, 1)))
    return b.model([conv(b, y)], SHAPE)


def _shared() -> onnx.ModelProto:
    b = Builder()
    weight = b.const(b.draw(4, 3, 3, 3))
    y = b.bn(b.op("Conv", "x", weight), 4)
    z = b.bn(b.op("Conv", b.op("Relu", "x"), weight), 4)
    return b.model([b.op("Add", b.op("Relu", y), z)], SHAPE)


def _twins() -> onnx.ModelProto:
    b = Builder()
    y = conv(b)
    constants = [b.const(values.astype(np.float32)) for values in np.random.default_rng(1).uniform(0.5, 2, (4, 4))]
    one, other = (b.op("BatchNormalization", y, *constants) for _ in range(2))
    return b.model([b.op("Add", one, b.op("Relu", other))], SHAPE)


def _computed_weight() -> onnx.ModelProto:
    b = Builder()
    weight = b.op("Mul", b.const(b.draw(4, 3, 3, 3)), b.const(b.draw(4, 1, 1, 1)))
    return b.model([b.bn(b.op("Conv", "x", weight), 4)], SHAPE)
