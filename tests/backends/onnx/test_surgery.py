"""What folding leaves of an ONNX model besides its function: names, metadata, files, and the model that was given."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from listing import contents
from onnx import TensorProto, helper
from onnx_nets import Builder, example, gap, ops, run

import bntools
from bntools import BntoolsError
from bntools.affine import Affine
from bntools.backends import backend
from bntools.backends.onnx import surgery
from bntools.backends.onnx.rewiring import take_out
from bntools.graph import Linear
from bntools.legality import Step, Target

IMAGE = example(2, 3, 7, 7)


def net(b: Builder, channels: int = 4) -> onnx.ModelProto:
    """Conv -> BN -> ReLU -> grouped Conv -> BN -> pool -> Flatten -> Gemm -> BN."""
    y = b.op("Conv", "x", b.const(b.draw(channels, 3, 3, 3), "conv1.weight"), name="conv1")
    y = b.op("Relu", b.bn(y, channels, "bn1"))
    weight, bias = b.draw(channels, channels // 2, 1, 1), b.draw(channels)
    y = b.bn(b.op("Conv", y, b.const(weight, "conv2.weight"), b.const(bias, "conv2.bias"), group=2), channels, "bn2")
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    y = b.op("Gemm", y, b.const(b.draw(channels, 5), "fc.weight"), b.const(b.draw(5), "fc.bias"), alpha=0.5, beta=2.0)
    return b.model([b.bn(y, 5, "bn3")])


def test_what_a_model_says_about_itself_survives():
    """Opset, IR version, names of inputs, outputs, weights and nodes, metadata and doc strings are as they were."""
    model = net(Builder(13))
    model.producer_name, model.doc_string, model.model_version = "someone", "a net", 7
    model.graph.doc_string = "its graph"
    model.metadata_props.add(key="author", value="someone")
    model.graph.node[0].metadata_props.add(key="scope", value="stem")
    model.graph.initializer[0].doc_string = "the stem's weight"
    model.graph.value_info.append(helper.make_tensor_value_info("bn1_out", TensorProto.FLOAT, None))
    model.graph.value_info.append(helper.make_tensor_value_info("conv1", TensorProto.FLOAT, None))
    new = bntools.fold(model, IMAGE).model
    for field in ("producer_name", "doc_string", "model_version", "metadata_props", "opset_import", "ir_version"):
        assert getattr(new, field) == getattr(model, field)
    assert new.graph.input == model.graph.input
    assert new.graph.output == model.graph.output
    assert new.graph.doc_string == "its graph"
    assert new.graph.node[0].metadata_props == model.graph.node[0].metadata_props
    assert new.graph.initializer[0].doc_string == "the stem's weight"
    assert [one.name for one in new.graph.value_info] == ["conv1"]
    assert [node.op_type for node in new.graph.node] == ["Conv", "Relu", "Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    names = ["conv1.weight", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias", "conv1.bias"]
    assert [one.name for one in new.graph.initializer] == names


@pytest.mark.parametrize("form", ["proto", "ir", "path", "external path"])
def test_the_model_that_was_given_stays(form, tmp_path):
    """A message, an onnx_ir.Model and a file are as they were after a fold, and the new model is of the same form."""
    model = net(Builder(), 16)
    path = tmp_path / "model.onnx"
    onnx.save(
        copy.deepcopy(model), path, save_as_external_data="external" in form, location="model.data", size_threshold=0
    )
    given = {"proto": model, "ir": ir.from_proto(model)}.get(form, path)
    before, files = model.SerializeToString(), contents(tmp_path)
    folded = bntools.fold(given, IMAGE)
    assert len(folded.folded) == 3
    assert contents(tmp_path) == files
    assert model.SerializeToString() == before
    if form == "ir":
        assert ir.to_proto(given).SerializeToString(deterministic=True)
        assert len(bntools.inspect(given)) == 3
    assert isinstance(folded.model, ir.Model if form in ("ir", "external path") else onnx.ModelProto)
    bntools.save(folded.model, tmp_path / "folded.onnx")
    assert gap(run(model, IMAGE), run(tmp_path / "folded.onnx", IMAGE)) < 1e-5


def test_external_weights_stay_external(tmp_path):
    """The folded document of a file with external weights holds only what is small, the rest lies in a file."""
    path = tmp_path / "model.onnx"
    model = net(Builder(), 32)
    onnx.save(copy.deepcopy(model), path, save_as_external_data=True, location="model.data", size_threshold=1024)
    document = backend("onnx").opened(path)
    folded = bntools.fold(document, IMAGE).model
    for tensor in folded.proto.graph.initializer:
        values = folded.constant(tensor.name)
        assert (tensor.data_location == TensorProto.EXTERNAL) == (values.nbytes >= 1024)
    data = folded.folder
    assert [one.name for one in data.iterdir()] == ["weights.data"]
    onnx.save(folded.proto, data / "folded.onnx")
    onnx.checker.check_model(str(data / "folded.onnx"), full_check=True)
    assert gap(run(model, IMAGE), run(data / "folded.onnx", IMAGE)) < 1e-5
    del folded, document
    assert not data.exists()


def test_half_precision_is_computed_in_double_and_cast_once():
    """The weights of a float16 model are what float64 arithmetic on them gives, rounded once."""
    b = Builder(dtype=np.float16)
    weight = b.draw(4, 3, 3, 3)
    model = b.model([b.bn(b.op("Conv", "x", b.const(weight, "w")), 4, "bn")])
    (layer,) = bntools.inspect(model)
    scale = layer.scale / np.sqrt(layer.var + layer.eps)
    folded = bntools.fold(model, IMAGE.astype(np.float16))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in folded.model.graph.initializer}
    assert np.array_equal(stored["w"], (weight.astype(np.float64) * scale[:, None, None, None]).astype(np.float16))
    shift = layer.shift - layer.mean * scale
    assert np.array_equal(stored["w.bias"], shift.astype(np.float16))


def test_a_weight_beyond_the_dtype_is_not_stored():
    """A fold that would make a weight infinite in float16 is refused, with the number and the dtype."""
    b = Builder(dtype=np.float16)
    y = b.bn(b.op("Conv", "x", b.const((b.draw(4, 3, 3, 3) * 3000).astype(np.float16)), name="conv1"), 4, "bn")
    document = backend("onnx").opened(b.model([y]))
    graph = backend("onnx").graph(document, IMAGE.astype(np.float16))
    affine = Affine(np.full(4, 1e3), np.zeros(4))
    step = Step("bn", (Target(graph.nodes[0].op, "output", affine),))
    with pytest.raises(BntoolsError, match=r"Conv 'conv1': a weight of \d.*e\+06 does not fit float16"):
        backend("onnx").absorb(document, graph, [step])


def test_layers_that_stay_take_up_others():
    """Of two BNs behind a ReLU the first takes up the second; its statistics stay, scale and shift change."""
    b = Builder()
    y = b.bn(b.bn(b.op("Relu", "x"), 3, "first"), 3, "second")
    model = b.model([y])
    folded = bntools.fold(model, IMAGE)
    assert folded.folded == ["second"]
    assert gap(run(model, IMAGE), run(folded.model, IMAGE)) < 1e-6
    before, after = bntools.inspect(model)[0], bntools.inspect(folded.model)[0]
    assert np.array_equal(before.mean, after.mean)
    assert not np.array_equal(before.scale, after.scale)


def test_statistics_that_are_not_yet_stored_come_along():
    """The document that absorb makes holds the statistics that the given one was only to store."""
    onnx_backend = backend("onnx")
    document = onnx_backend.opened(net(Builder()))
    graph = onnx_backend.graph(document, IMAGE)
    onnx_backend.reset(document, ["bn2"])
    new = onnx_backend.absorb(document, graph, [])
    (layer,) = [layer for layer in bntools.inspect(new) if layer.name == "bn2"]
    assert np.array_equal(layer.var, np.ones(4))
    assert np.array_equal(new.constant("bn2.running_var"), np.ones(4))
    assert not np.array_equal(document.constant("bn2.running_var"), np.ones(4))


def test_nothing_else_is_lost_where_nothing_is_folded():
    """Without a fold the new model is the old one, but for weights that nothing reads."""
    b = Builder()
    b.const(b.draw(3), "unread")
    model = b.model([b.bn(b.op("Relu", "x"), 3, "bn")])
    new = bntools.fold(model, IMAGE).model
    assert ops(new) == ["Relu", "BatchNormalization"]
    assert "unread" not in [one.name for one in new.graph.initializer]


@pytest.mark.parametrize(("source", "left"), [("x", "Identity"), ("made", "Relu")])
def test_a_name_that_cannot_be_given_up(source, left):
    """A node whose input is an input of the graph and whose output is an output gives way to an Identity."""
    nodes = [helper.make_node("Relu", ["x"], ["made"]), helper.make_node("Clip", [source], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    take_out(graph, {"y"})
    assert [node.op_type for node in graph.node][-1] == left
    assert graph.node[-1].output[0] == "y"


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Linear("w[1]", "w[2]", 0, 1, 1, 1, 1), (6, 4, 3)),
        (Linear("w[1]", "w[2]", 0, 1, 2, 1, 1), (6, 2, 3)),
        (Linear("w[1]", "w[2]", 1, 0, 1, 1, 1), (4, 6, 3)),
        (Linear("w[1]", "w[2]", 1, 0, 2, 1, 1), (4, 3, 3)),
        (Linear("w[1]", "w[2]", 1, 0, 1, 1, 1), (4, 6)),
    ],
)
def test_a_large_weight_is_computed_in_slabs(op, shape, monkeypatch):
    """A weight computed part by part is what it is when computed at once."""
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=shape).astype(np.float32), random.normal(size=6)
    targets = [
        Target(op, side, Affine(random.normal(size=n), random.normal(size=n)))
        for side, n in (("output", 6), ("input", 4), ("output", 6))
    ]
    whole = surgery._absorbed(weight.copy(), 0.5, bias, op, targets, "")
    monkeypatch.setattr(surgery, "SLAB", 5)
    assert len(list(surgery._slabs(op, shape))) > 1
    parts = surgery._absorbed(weight.copy(), 0.5, bias, op, targets, "")
    assert np.array_equal(whole[0], parts[0])
    assert np.allclose(whole[1], parts[1], rtol=1e-12)


def test_missing_external_weights_are_an_error(tmp_path):
    """A file whose external weights are cut off is refused with the tensor's name, and nothing is written."""
    path = tmp_path / "model.onnx"
    onnx.save(net(Builder(), 32), path, save_as_external_data=True, location="model.data", size_threshold=0)
    (tmp_path / "model.data").write_bytes((tmp_path / "model.data").read_bytes()[:500])
    files = contents(tmp_path)
    with pytest.raises(BntoolsError, match="model"):
        bntools.fold(path, IMAGE)
    assert contents(tmp_path) == files
