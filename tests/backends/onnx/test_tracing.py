"""The values inside a graph, and the modules that they belong to."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bntools.backends.onnx import runners
from bntools.backends.onnx.tracing import SCOPES, dependencies, modules, points, scopes


def node(name="", *, metadata=None, op="Relu", inputs=("x",), outputs=("y",)):
    """One node, as an exporter writes it."""
    made = helper.make_node(op, inputs, outputs, name=name)
    if metadata is not None:
        made.metadata_props.add(key=SCOPES, value=metadata)
    return made


def chain():
    """x -> relu -> neg -> abs, named by the TorchScript exporter, with a constant in between."""
    nodes = [
        node("/body/body.0/Relu", outputs=["a"]),
        helper.make_node("Constant", [], ["k"], value_float=1.0),
        node("/body/body.1/Neg", op="Neg", inputs=["a"], outputs=["b"]),
        node("/head/Abs", op="Abs", inputs=["b"], outputs=["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(
    ("made", "paths"),
    [
        (node("/conv1/Conv"), ["conv1"]),
        (node("/layer1/layer1.0/conv1/Conv"), ["layer1", "layer1.0", "layer1.0.conv1"]),
        (node("/features/features.3/conv/conv.0/conv.0.1/Conv"), None),
        (node("/Add"), []),
        (node("Conv_17"), []),
        (
            node(metadata="['', 'layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']"),
            ["layer1", "layer1.0", "layer1.0.conv1"],
        ),
        (node("/conv1/Conv", metadata="['', 'add']"), []),
        (node(metadata="__import__('os').abort()"), []),
        (node(metadata="17"), []),
    ],
)
def test_scopes(made, paths):
    """A node's modules are read from what either exporter writes; what is written otherwise says nothing."""
    if paths is None:
        paths = ["features", "features.3", "features.3.conv", "features.3.conv.0", "features.3.conv.0.1"]
    assert scopes(made) == paths


def test_points_and_modules():
    """Points are the computed values in order; a module's output is what its last node computes."""
    assert list(points(chain())) == ["a", "b", "y"]
    assert modules(chain()) == {"body.0": "a", "body": "b", "body.1": "b", "head": "y"}
    assert list(modules(chain())) == ["body.0", "body", "body.1", "head"]


@pytest.mark.parametrize("number", [0, 1])
def test_values_inside(number):
    """Values inside are read in one run, with and without graph optimizations, and the model stays as it is."""
    model = chain()
    before = model.SerializeToString()
    trace = runners(model)[number].trace(np.array([-1.0, 2.0]))
    values = trace.read(["b", "a", "y"])
    assert {name: array.tolist() for name, array in values.items()} == {"a": [0, 2], "b": [0, -2], "y": [0, 2]}
    assert list(trace.read(["b"])) == ["b"]
    assert model.SerializeToString() == before


def test_values_of_a_file_with_external_weights(tmp_path):
    """Values inside a file are read with the weights that lie beside it."""
    model = chain()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(2, 3, np.float32), "w"))
    model.graph.node.append(helper.make_node("Mul", ["y", "w"], ["z"]))
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    trace = runners(tmp_path / "m.onnx")[0].trace(np.array([-1.0, 2.0]))
    assert trace.read(["z"])["z"].tolist() == [0, 6]


def test_operators_and_dependencies():
    """A value is known with its operator and node, and with the values it is computed from, constants left out."""
    trace = runners(chain())[0].trace(np.array([1.0]))
    assert trace.ops["b"] == ("Neg", "/body/body.1/Neg")
    assert dict(trace.inputs) == {"a": (), "b": ("a",), "y": ("b",)}


def test_dependencies_through_what_is_no_value():
    """What a subgraph reads counts for its node; a sequence stands for what it is made of."""
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["n"])],
    )
    model = chain()
    model.graph.node.extend(
        [
            helper.make_node("If", ["flag"], ["chosen"], then_branch=body, else_branch=body),
            helper.make_node("SequenceConstruct", ["chosen", "y"], ["both"]),
            helper.make_node("ConcatFromSequence", ["both"], ["z"], axis=0),
        ]
    )
    assert set(points(model)) == {"a", "b", "y", "chosen", "z"}
    found = dependencies(model, set(points(model)))
    assert set(found["chosen"]) == {"a", "b"}
    assert set(found["z"]) == {"chosen", "y"}


def test_every_output_of_a_node():
    """All outputs of a node are values, the second of a Split as well."""
    split = helper.make_node("Split", ["x"], ["p", "", "q"])
    graph = helper.make_graph([split], "g", [], [])
    assert list(points(helper.make_model(graph))) == ["p", "q"]


def test_values_without_a_numpy_dtype():
    """Values that numpy has no dtype for are left out, and the others are read all the same."""
    model = chain()
    model.graph.node.append(helper.make_node("Cast", ["y"], ["half"], to=TensorProto.BFLOAT16))
    values = runners(model)[0].trace(np.array([-1.0, 2.0])).read(["a", "half"])
    assert {name: array.tolist() for name, array in values.items()} == {"a": [0, 2]}
