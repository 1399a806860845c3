"""A small ONNX network with two branches and two outputs, to be compared with others like it."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

N = 6
X = np.random.default_rng(0).normal(size=(4, N)).astype(np.float32)


def network(**changes):
    """x -> fc -> bn -> (left, right) -> sum -> y, and the largest of y as a second output.

    ``changes`` maps initializers to what is added to their first value.
    """
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=(N, N)) for name in ("fc", "left", "right")}
    weights |= {name: rng.uniform(0.5, 1.5, size=N) for name in ("scale", "shift", "mean", "var")}
    for name, change in changes.items():
        weights[name].flat[0] += change
    nodes = [
        helper.make_node("MatMul", ["x", "fc"], ["fc_out"], name="fc_node"),
        helper.make_node("BatchNormalization", ["fc_out", "scale", "shift", "mean", "var"], ["bn_out"], name="bn_node"),
        helper.make_node("MatMul", ["bn_out", "left"], ["left_out"], name="left_node"),
        helper.make_node("Relu", ["left_out"], ["left_relu"]),
        helper.make_node("MatMul", ["bn_out", "right"], ["right_out"], name="right_node"),
        helper.make_node("Relu", ["right_out"], ["right_relu"]),
        helper.make_node("Add", ["left_relu", "right_relu"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", N])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", N])
    best = helper.make_tensor_value_info("best", TensorProto.INT64, ["n", 1])
    arrays = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", [x], [y, best], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
