"""An exporter's file, tidied, and what is added to it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bntools import BntoolsError
from bntools.backends.onnx import add_metadata, check, external_files, predict, tidying
from bntools.backends.onnx.tidying import tidy


@pytest.fixture
def raw(tmp_path):
    """A file as an exporter may leave it: a computed bias, an unused node, a path of the machine."""
    weight = onnx.numpy_helper.from_array(np.arange(200, dtype=np.float32).reshape(2, 100), "weight")
    nodes = [
        helper.make_node("Shape", ["weight"], ["shape"], end=1),
        helper.make_node("Expand", ["nothing", "shape"], ["zeros"]),
        helper.make_node("Gemm", ["x", "weight", "zeros"], ["g"], transB=1, name="gemm"),
        helper.make_node("Relu", ["x"], ["unused"]),
        helper.make_node("BatchNormalization", ["g", "one", "zero", "zero", "one"], ["y"], name="bn"),
    ]
    for node in nodes:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/me/secret/model.py", line 7')
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'fc', 'linear']")
        node.doc_string = "/home/me/secret/model.py(7)"
    constants = {"one": np.ones(2), "zero": np.zeros(2), "nothing": np.zeros(())}
    stats = [onnx.numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 100])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight, *stats]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
        producer_name="pytorch",
    )
    onnx.save(model, tmp_path / "raw.onnx")
    return tmp_path / "raw.onnx"


def test_tidy(raw, tmp_path):
    """What is constant is computed, what is unused goes, nothing is fused, and the results are the same."""
    target = tmp_path / "tidy.onnx"
    tidy(raw, target, "tidy.data", opset=18)
    check(target)
    model = onnx.load(target)
    computing = [node.op_type for node in model.graph.node if node.op_type != "Constant"]
    assert computing == ["Gemm", "BatchNormalization"]
    assert b"secret" not in target.read_bytes()
    assert b"name_scopes" in target.read_bytes()
    assert (model.opset_import[0].version, model.ir_version, model.producer_name) == (18, 10, "pytorch")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    x = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    assert np.array_equal(predict(raw, x)["y"], predict(target, x)["y"])
    assert not (tmp_path / "tidy.data").exists()


def test_large_weights_go_beside_the_file(raw, tmp_path, monkeypatch):
    """Weights beyond what protobuf holds go to one file beside the model, which runs with it."""
    monkeypatch.setattr(tidying, "EXTERNAL_ABOVE", 500)
    target = tmp_path / "tidy.onnx"
    tidy(raw, target, "tidy.data")
    assert external_files(target) == {"tidy.data"}
    assert (tmp_path / "tidy.data").stat().st_size >= 800
    check(target)
    x = np.ones((1, 100), np.float32)
    assert np.array_equal(predict(raw, x)["y"], predict(target, x)["y"])


def test_opset(raw, tmp_path):
    """A file in another opset than the one asked for is refused."""
    with pytest.raises(BntoolsError, match="in opset 18 where opset 13 was asked for"):
        tidy(raw, tmp_path / "tidy.onnx", "tidy.data", opset=13)


def test_metadata(raw):
    """Metadata is added behind what the file holds, which stays byte for byte, and can be added twice."""
    before = raw.read_bytes()
    add_metadata(raw, {"a": "1", "b": "zwölf"})
    add_metadata(raw, {"c": "3"})
    assert raw.read_bytes().startswith(before)
    model = onnx.load(raw)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"a": "1", "b": "zwölf", "c": "3"}
    assert len(model.graph.node) == 5
    check(raw)
