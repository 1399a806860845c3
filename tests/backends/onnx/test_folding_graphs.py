"""Random ONNX graphs folded: their function stays, and no BN layer is left that was built to be foldable."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_nets import Builder, example, gap, newest, run

import bntools

OPSETS = st.integers(9, newest())
SEARCH = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

# What lets a scale and shift pass on its way back, on (N, C, H, W); a max needs scales that are not negative.
PASSING = {
    "identity": lambda b, x: b.op("Identity", x),
    "dropout": lambda b, x: b.op("Dropout", x),
    "cast": lambda b, x: b.op("Cast", b.op("Cast", x, to=onnx.TensorProto.DOUBLE), to=onnx.TensorProto.FLOAT),
    "max pool": lambda b, x: b.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "average pool": lambda b, x: b.op("AveragePool", x, kernel_shape=[2, 2], pads=[0, 0, 1, 1]),
    "unpadded average": lambda b, x: b.op("AveragePool", x, kernel_shape=[2, 2], count_include_pad=1),
    "reflected": lambda b, x: b.pad(x, [0, 0, 1, 1, 0, 0, 0, 1], "reflect"),
    "edge": lambda b, x: b.pad(x, [0, 0, 0, 1, 0, 0, 0, 0], "edge"),
    "transposed": lambda b, x: b.op("Transpose", b.op("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]),
    "squeezed": lambda b, x: b.axes("Squeeze", b.axes("Unsqueeze", x, [1]), [1]),
    "halves": lambda b, x: b.op("Concat", *[b.op("Identity", x)], axis=1),
    "a term": lambda b, x: b.op("Add", b.const(b.draw(1)), x),
    "less a row": lambda b, x: b.op("Sub", x, b.const(b.draw(b.channels, 1, 1))),
    "a row less": lambda b, x: b.op("Sub", b.const(b.draw(1, b.channels, 1, 1)), x),
}


def linear(b: Builder, x: str, kind: str, biased: bool, shared: str = "") -> str:
    """One linear operation on (N, C, H, W) that keeps the number of channels."""
    c = b.channels
    bias = [b.const(b.draw(c))] if biased else []
    if kind == "matmul":
        y = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 3, 1]), shared or b.const(b.draw(c, c)))
        y = b.op("Add", *([y, *bias] if b.count % 2 else [*bias, y])) if biased else y
        return b.op("Transpose", y, perm=[0, 3, 1, 2])
    if kind.startswith("transposed"):
        groups = int(kind[-1])
        weight = shared or b.const(b.draw(c, c // groups, 2, 3))
        return b.op("ConvTranspose", x, weight, *bias, group=groups, pads=[0, 1, 1, 1])
    groups = int(kind[-1])
    weight = shared or b.const(b.draw(c, c // groups, 3, 1))
    return b.op("Conv", x, weight, *bias, group=groups, pads=[1, 0, 1, 0])


KINDS = ["conv 1", "conv 2", "conv 4", "transposed 1", "transposed 2", "matmul"]
BLOCK = st.tuples(
    st.sampled_from(KINDS),
    st.booleans(),
    st.lists(st.sampled_from(sorted(PASSING)), max_size=2),
    st.integers(1, 2),
    st.sampled_from(["relu", "relu", "fan-out", "residual", "bare"]),
    st.booleans(),
)


@SEARCH
@given(st.lists(BLOCK, min_size=1, max_size=4), OPSETS, st.booleans(), st.sampled_from([3, 8]), st.integers(0, 99))
def test_backward(blocks, opset, constants, ir, seed):
    """BN behind a linear operation is folded through whatever passes, also where weights are shared; else it is kept."""
    b = Builder(opset, seed, constants=constants, ir=ir)
    b.channels, weights, kept, outputs, x = 4, {}, Counter(), [], "x"
    for kind, biased, between, chain, ending, shares in blocks:
        y = linear(b, x, kind, biased, weights.get(kind, "") if shares else "")
        weight = next(node for node in reversed(b.nodes) if node.op_type in ("Conv", "ConvTranspose", "MatMul"))
        weights.setdefault(kind, weight.input[1])
        if ending == "fan-out":
            outputs.append(b.op("Identity", y))
            kept["fan-out"] += chain
        for name in between:
            y = PASSING[name](b, y)
        for _ in range(chain):
            y = b.bn(y, 4, positive="max pool" in between)
        if ending == "residual":
            y = b.op("Add", y, b.op("Relu", y))
        x = y if ending == "bare" else b.op("Relu", y)
    model, batch = b.model([x, *outputs], ("n", 4, "h", "w")), example(2, 4, 12, 11)
    before = model.SerializeToString()
    folded = bntools.fold(model, batch)
    assert len(folded.kept) <= kept["fan-out"], folded.kept
    assert all("is read by" in reason for reason in folded.kept.values())
    assert model.SerializeToString() == before
    other = example(3, 4, 13, 12, seed=2)
    assert gap(run(model, other), run(folded.model, other)) < 1e-4
    check(folded.model)


def check(model: onnx.ModelProto) -> None:
    """The checker and shape inference take the model, and it holds nothing that nobody reads."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    read = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert all(read.intersection(node.output) for node in model.graph.node)
