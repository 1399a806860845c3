"""Files that were exported in training mode."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from listing import contents
from onnx import TensorProto, helper, numpy_helper
from onnx_files import constants, images, norm

import bntools
from bntools import BntoolsError
from bntools.backends.onnx import predict


def training(opset: int = 17, outputs: int | None = None) -> onnx.ModelProto:
    """image -> bn1 -> Dropout, both in training mode."""
    extra = {14: 2}.get(min(opset, 14), 4) if outputs is None else outputs
    bn = norm("bn1", "image", "b1", **({"training_mode": 1} if opset >= 14 else {}))
    bn.output.extend([f"extra{i}" for i in range(extra)])
    flag = numpy_helper.from_array(np.array(True), "flag")
    ratio = numpy_helper.from_array(np.array(0.5, np.float32), "ratio")
    modern = opset >= 12
    inputs = ["b1", "ratio", "flag"] if modern else ["b1"]
    drop = helper.make_node("Dropout", inputs, ["scores", "mask"], name="drop", **({} if modern else {"ratio": 0.5}))
    if opset < 7:
        for node in (bn, drop):
            node.attribute.append(helper.make_attribute("is_test", 0))
    graph = helper.make_graph(
        [bn, drop],
        "training",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [*constants("bn1", 3), *([flag, ratio] if modern else [])],
        value_info=[
            helper.make_tensor_value_info(
                "mask", TensorProto.BOOL if opset >= 10 else TensorProto.FLOAT, ["N", 3, 8, 8]
            )
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def eval_mode(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    """What the layer computes in eval mode, by its formula in float64."""
    held = {one.name: numpy_helper.to_array(one).astype(float)[:, None, None] for one in model.graph.initializer[:4]}
    normal = (image - held["bn1.running_mean"]) / np.sqrt(held["bn1.running_var"] + 1e-5)
    return normal * held["bn1.weight"] + held["bn1.bias"]


NAMES = {6: ["bn1", "drop"], 7: ["bn1"], 9: ["bn1"], 12: ["bn1", "drop"], 13: ["bn1", "drop"], 17: ["bn1", "drop"]}


@pytest.mark.parametrize("opset", NAMES)
@pytest.mark.parametrize("form", ["message", "ir", "path"])
def test_converted_in_place(tmp_path, opset, form):
    """In every opset and form the model then passes the checker, with one output a node, and is found converted."""
    path = tmp_path / "model.onnx"
    onnx.save(training(opset), path)
    model = {"message": training(opset), "ir": onnx_ir.from_proto(training(opset)), "path": path}[form]
    assert bntools.to_inference(model) == NAMES[opset]
    changed = {"message": lambda: model, "ir": lambda: onnx_ir.to_proto(model), "path": lambda: onnx.load(path)}[form]()
    onnx.checker.check_model(changed)
    assert all(len(node.output) == 1 for node in changed.graph.node if node.name in NAMES[opset])
    assert bntools.to_inference(model) == []
    assert [layer.problems for layer in bntools.inspect(model)] == [[]]


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_the_result_is_eval_mode(opset):
    """The converted model computes what the stored statistics say, with nothing dropped."""
    model = training(opset)
    bntools.to_inference(model)
    np.testing.assert_allclose(predict(model, images())["scores"], eval_mode(model, images()), rtol=1e-4, atol=1e-5)


VERBS = {
    "reset": bntools.reset,
    "recalibrate": lambda model: bntools.recalibrate(model, [images()]),
    "fold": lambda model: bntools.fold(model, images()),
    "export": lambda model: bntools.export(model, "never.onnx", images()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_training_mode(tmp_path, monkeypatch, verb):
    """A verb that changes or ships a model names the nodes in training mode and the conversion, and changes nothing."""
    monkeypatch.chdir(tmp_path)
    onnx.save(training(), "model.onnx")
    before = contents(tmp_path)
    for model in (training(), "model.onnx"):
        with pytest.raises(BntoolsError, match=r"in training mode: bn1, drop .*bntools\.to_inference\(model\)"):
            VERBS[verb](model)
    assert contents(tmp_path) == before


def test_dropout_alone_is_training_mode():
    """A model whose Dropout alone drops values is refused as well: no two runs of it agree."""
    model = training()
    del model.graph.node[0].attribute[:], model.graph.node[0].output[1:]
    with pytest.raises(BntoolsError, match="training mode: drop would"):
        bntools.reset(model)


def test_inspect_says_so():
    """inspect works on a file in training mode, and remarks it."""
    (layer,) = bntools.inspect(training())
    assert "training mode: normalizes with each batch's own statistics" in layer.problems


@pytest.mark.parametrize("use", ["output", "node"])
def test_outputs_in_use_are_named(use):
    """An output of training that is read, or is an output of the model, is named and the model stays as it was."""
    model = training()
    if use == "output":
        model.graph.output.append(helper.make_tensor_value_info("extra0", TensorProto.FLOAT, [3]))
    else:
        model.graph.node.append(helper.make_node("Identity", ["extra0"], ["again"]))
    before = model.SerializeToString(deterministic=True)
    user = "an output of the model" if use == "output" else "read by another node"
    with pytest.raises(BntoolsError, match=f"bn1 cannot be brought into inference form: its output 'extra0'.*{user}"):
        bntools.to_inference(model)
    assert model.SerializeToString(deterministic=True) == before


def test_layers_in_subgraphs_and_functions():
    """Nodes in the branch of an If and in a function are converted where they lie."""
    outer = training()
    flag = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    function = helper.make_function(
        "local",
        "Drops",
        ["x"],
        ["y"],
        [flag, helper.make_node("Dropout", ["x", "", "yes"], ["y"], name="inner drop")],
        [helper.make_opsetid("", 17)],
    )
    inside = norm("bn1", "image", "inside", training_mode=1)
    inside.output.append("mean of it")
    inside.output.append("var of it")
    branch = helper.make_graph(
        [inside], "branch", [], [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)]
    )
    condition = helper.make_node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=branch, name="choice")
    outer.graph.node.extend([condition, helper.make_node("Drops", ["chosen"], ["last"], domain="local")])
    outer.functions.append(function)
    outer.opset_import.append(helper.make_opsetid("local", 1))
    model = onnx_ir.from_proto(outer)
    assert len(bntools.to_inference(outer)) == 5
    assert len(bntools.to_inference(model)) == 5
    for one in (outer, onnx_ir.to_proto(model)):
        assert "training_mode" not in str(one)
        assert len(one.functions[0].node[1].input) == 2


def test_other_frameworks():
    """A PyTorch module has a mode of its own: nothing to convert."""
    from torch import nn

    with pytest.raises(BntoolsError, match="has a mode of its own"):
        bntools.to_inference(nn.BatchNorm1d(2))
