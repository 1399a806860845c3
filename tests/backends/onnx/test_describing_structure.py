"""Folding where a graph holds more than a chain of operators: graphs inside, functions, sequences, any order."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper
from onnx_nets import IMAGE, Builder, conv, folds, gap, run

import bntools


def test_graphs_inside_read_too():
    """A value that a branch of an If reads has a reader; a BN inside the branch is kept, with where it lies."""
    b = Builder()
    y = conv(b, name="conv1")
    value = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    inner = Builder()
    inner.op("Identity", inner.bn(y, 4, "inside"), name="out")
    then = helper.make_graph([helper.make_node("Relu", [y], ["out"])], "then", [], value)
    other = helper.make_graph(inner.nodes, "else", [], value, inner.initializers)
    b.op("If", b.const(np.array(True)), name="if1", then_branch=then, else_branch=other)
    folded = folds(b.model([b.bn(y, 4, "bn"), "if1"]))
    assert "the output of Conv 'conv1' is read by" in folded.kept["bn"]
    assert "If 'if1'" in folded.kept["bn"]
    assert folded.kept["inside"].startswith("it lies in a subgraph of If")


def test_a_branch_reads_what_a_layer_gave():
    """Where a branch of an If reads the output of a folded BN, it reads the convolution's afterwards."""
    b = Builder()
    y = b.bn(conv(b), 4, "bn")
    value = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    branches = [helper.make_graph([helper.make_node(kind, [y], ["out"])], kind, [], value) for kind in ("Relu", "Abs")]
    b.op("If", b.const(np.array(True)), name="if1", then_branch=branches[0], else_branch=branches[1])
    assert not folds(b.model(["if1"])).kept


def test_functions_survive():
    """A function of the model's own is called as before; it stands in the way, and is there afterwards."""
    b = Builder()
    y = conv(b, name="conv1")
    y = b.bn(b.op("Twice", y, name="twice1", domain="own"), 4, "bn")
    y = b.bn(conv(b, b.op("Relu", y), 4), 4, "other")
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Twice", ["a"], ["c"], [helper.make_node("Add", ["a", "a"], ["c"])], opsets)
    model = b.model(["x"], strict=False)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ["n", 4, 3, 3]))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    folded = folds(model)
    assert folded.folded == ["other"]
    assert "Twice 'twice1' stands between it and Conv 'conv1'" in folded.kept["bn"]
    assert folded.model.functions[0] == function


def test_values_that_are_no_tensors():
    """A sequence has no shape; what makes and reads it stands in the way, and the rest is folded."""
    b = Builder()
    y = conv(b, name="conv1")
    sequence = b.op("SequenceConstruct", y, y, name="sequence1")
    z = b.bn(b.op("SequenceAt", sequence, b.const(np.array(0)), name="at1"), 4, "behind")
    folded = folds(b.model([b.bn(conv(b, b.op("Relu", z), 4), 4, "bn")]))
    assert folded.folded == ["bn"]
    assert "SequenceAt 'at1' stands between it and" in folded.kept["behind"]


def test_an_order_that_is_not_the_order_of_execution():
    """A file whose nodes are not listed in the order in which they run is folded as it runs."""
    b = Builder()
    y = b.op("Relu", b.bn(conv(b), 4, "one"))
    y = b.bn(b.op("MaxPool", y, kernel_shape=[2, 2]), 4, "two")
    model = b.model([y])
    del model.graph.node[:]
    model.graph.node.extend(reversed(b.nodes))
    folded = bntools.fold(model, IMAGE)
    assert folded.folded == ["one"]
    assert "stands between it and Conv" in folded.kept["two"]
    assert gap(run(model, IMAGE), run(folded.model, IMAGE)) < 1e-5
