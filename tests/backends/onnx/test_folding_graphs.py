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
    "times a row": lambda b, x: b.op("Mul", b.const(b.draw(b.channels, 1, 1)), x),
    "by a number": lambda b, x: b.op("Div", x, b.const(np.full(1, -1.5, np.float32))),
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
    """BN behind a linear operation folds through whatever passes, also where weights are shared; else it is kept."""
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


@SEARCH
@given(
    st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 0.5, -2.0]), st.sampled_from([1.0, 0.25, 0.0])),
    st.sampled_from([None, (), (1,), (5,), (1, 5), (2, 1), (2, 5), (1, 1)]),
    st.sampled_from(["before", "behind", "both"]),
    st.booleans(),
    OPSETS,
    st.integers(0, 99),
)
def test_gemm(form, bias, where, shared, opset, seed):
    """Gemm takes BN up on either side, whatever alpha, beta, transA and transB are and whatever shape C has."""
    trans_a, trans_b, alpha, beta = form
    b = Builder(opset, seed)
    x = b.bn("x", 4) if where != "behind" and not trans_a else b.op("Identity", "x")
    x = b.op("Transpose", x) if trans_a else x
    weight, c = b.const(b.draw(*((5, 4) if trans_b else (4, 5)))), None if bias is None else b.const(b.draw(*bias))
    if c is None and opset < 11:
        c = b.const(b.draw(5))
    inputs = [x, weight] + ([c] if c is not None else [])
    options = {"alpha": alpha, "beta": beta, "transA": int(trans_a), "transB": int(trans_b)}
    y = b.op("Gemm", *inputs, **options)
    y = b.bn(y, 5) if where != "before" else y
    outputs = [y, b.op("Gemm", b.op("Relu", x), *inputs[1:], **options)] if shared else [y]
    model, batch = b.model(outputs, (2, 4)), example(2, 4)
    if where == "before" and trans_a:
        return
    folded = bntools.fold(model, batch)
    assert not [name for name in folded.kept if not shared or where == "behind"], folded.kept
    assert gap(run(model, batch), run(folded.model, batch)) < 1e-5
    check(folded.model)


@SEARCH
@given(
    st.sampled_from(["right", "left", "gemm left"]),
    st.sampled_from([None, (), (5,), (1, 5), (6, 5), (1, 1), (6, 1)]),
    st.integers(2, 4),
    st.sampled_from(["before", "behind", "both"]),
    OPSETS,
    st.integers(0, 99),
)
def test_matmul(side, bias, rank, where, opset, seed):
    """MatMul takes BN up with a weight on either side, with and without a following Add of any shape."""
    b = Builder(opset, seed)
    rank = 2 if side == "gemm left" else rank
    into, out, axis = 4, 5 if side == "right" else 6, rank - 1 if side == "right" else rank - 2
    shape = [3, 2, 6, 5][4 - rank :]
    shape[axis] = into
    x = around(b, "x", axis, rank, into) if where != "behind" else "x"
    if side == "right":
        y = b.op("MatMul", x, b.const(b.draw(into, out)))
    elif side == "left":
        y = b.op("MatMul", b.const(b.draw(out, into)), x)
    else:
        y = b.op("Gemm", b.const(b.draw(out, into)), x, b.const(b.draw(out, 1)), alpha=0.5, beta=2.0)
    width = shape[:-2] + ([shape[-2], out] if side == "right" else [out, shape[-1]])
    fits = bias is not None and np.broadcast_shapes(bias, tuple(width)) == tuple(width)
    if fits and (side != "gemm left" or bias[:1] == (6,)):
        y = b.op("Add", y, b.const(b.draw(*bias)))
    y = around(b, y, axis, rank, out) if where != "before" else y
    model, batch = b.model([y], tuple(shape)), example(*shape)
    folded = bntools.fold(model, batch)
    assert not folded.kept
    assert gap(run(model, batch), run(folded.model, batch)) < 1e-5
    check(folded.model)


def around(b: Builder, x: str, axis: int, rank: int, channels: int) -> str:
    """BN along an axis that need not be axis 1."""
    order = [i for i in range(rank) if i != axis]
    order.insert(1, axis)
    y = b.bn(b.op("Transpose", x, perm=order), channels)
    return b.op("Transpose", y, perm=[order.index(i) for i in range(rank)])


@SEARCH
@given(
    st.sampled_from(["conv 1", "conv 2", "dense", "transposed 1", "transposed 2"]),
    st.booleans(),
    st.lists(
        st.sampled_from(["identity", "max", "average", "flat", "reflect", "cut", "times"]), max_size=2, unique=True
    ),
    st.integers(1, 3),
    OPSETS,
    st.integers(0, 99),
)
def test_forward(kind, biased, between, readers, opset, seed):
    """BN behind a ReLU goes into whatever linear operations read it, if none of them pads with zeros."""
    b = Builder(opset, seed)
    x = b.bn(b.op("Relu", "x"), 4, positive="max" in between)
    steps = {
        "identity": lambda x: b.op("Identity", x),
        "max": lambda x: b.op("MaxPool", x, kernel_shape=[2, 2]),
        "average": lambda x: b.op("AveragePool", x, kernel_shape=[2, 2]),
        "flat": lambda x: b.op("Transpose", b.op("Transpose", x, perm=[1, 0, 3, 2]), perm=[1, 0, 3, 2]),
        "reflect": lambda x: b.pad(x, [0, 0, 1, 0, 0, 0, 1, 1], "reflect"),
        "times": lambda x: b.op("Mul", x, b.const(b.draw(1, 4, 1, 1))),
        "cut": lambda x: b.op("Concat", *b.op("Split", x, outputs=2, axis=1, **split(opset)), axis=1),
    }
    for name in between:
        x = steps[name](x)
    outputs = []
    for _ in range(readers):
        bias = [b.const(b.draw(4))] if biased else []
        groups = int(kind[-1]) if kind[-1].isdigit() else 1
        if kind == "dense":
            y = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.const(b.draw(4, 5)))
        elif kind.startswith("conv"):
            y = b.op("Conv", x, b.const(b.draw(4, 4 // groups, 3, 2)), *bias, group=groups, strides=[2, 1])
        else:
            y = b.op("ConvTranspose", x, b.const(b.draw(4, 4 // groups, 1, 1)), *bias, group=groups)
        outputs.append(y)
    model, batch = b.model(outputs, ("n", 4, "h", "w")), example(2, 4, 8, 9)
    folded = bntools.fold(model, batch)
    assert not folded.kept
    assert gap(run(model, batch), run(folded.model, batch)) < 1e-5
    check(folded.model)


def split(opset: int) -> dict[str, object]:
    """What a Split into halves needs in this opset."""
    return {"num_outputs": 2} if opset >= 18 else {}


def check(model: onnx.ModelProto) -> None:
    """The checker and shape inference take the model, and it holds nothing that nobody reads."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    read = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert all(read.intersection(node.output) for node in model.graph.node)


def test_equal_nodes_on_one_value():
    """Two BN of equal constants on one Conv, which exporters leave where a module is called twice, fold together."""
    b = Builder()
    y = b.op("Conv", "x", b.const(b.draw(4, 3, 3, 3)))
    values = [b.random.uniform(0.5, 2, 4).astype(np.float32) for _ in range(4)]
    one, other = (b.op("BatchNormalization", y, *map(b.const, values)) for _ in range(2))
    model = b.model([b.op("Add", one, b.op("Relu", other))])
    folded = bntools.fold(model, b.draw(2, 3, 7, 7))
    assert len(folded.folded) == 2
    assert not any(node.op_type == "BatchNormalization" for node in folded.model.graph.node)
    assert folded.check.passed
