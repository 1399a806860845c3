"""recalibrate on ONNX graphs: what one batch of all data would give, stage by stage, and nothing lost."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import constants, keep, norm, small
from onnx_nets import Builder, newest
from peers import together

import bntools
from bntools import BntoolsError
from bntools.layer import distance
from bntools.moments import Moments
from bntools.noise import caught


def images(n=24, channels=3, height=8, width=8, seed=0, dtype=np.float32):
    """Images (n, channels, height, width), mean 1 and standard deviation 2."""
    return (np.random.default_rng(seed).standard_normal((n, channels, height, width)) * 2 + 1).astype(dtype)


def run(model, feeds, outputs):
    """Values of a graph, computed without graph optimizations."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(copy.SerializeToString(), options).run(list(outputs), feeds)


def by_hand(model, feeds):
    """What one batch of the whole data gives: layer by layer, each behind layers that have their new statistics."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    statistics = []
    for i, node in enumerate([node for node in copy.graph.node if node.op_type == "BatchNormalization"]):
        source = node.input[0]
        seen = feeds[source] if source in feeds else run(copy, feeds, [source])[0]
        moments = Moments.of(seen)
        statistics.append((moments.mean, moments.var))
        for place, value in ((3, moments.mean), (4, moments.var)):
            copy.graph.initializer.append(numpy_helper.from_array(value.astype(seen.dtype), f"measured {i} {place}"))
            node.input[place] = f"measured {i} {place}"
    return statistics


def gap(model, reference):
    """The largest distance of a model's statistics from reference statistics, in standard deviations."""
    layers = bntools.inspect(model)
    assert len(layers) == len(reference)
    return max(distance(stats, layer.stats, layer.eps) for layer, stats in zip(layers, reference, strict=True))


def residual_net(opset=17, dtype=np.float32):
    """Conv, BN, two branches that are added, Concat, two BNs that read one value, pooling and Gemm with a BN."""
    net = Builder(opset, dtype=dtype)
    x = net.bn("x", 3, "first")
    trunk = net.op("Relu", net.bn(net.op("Conv", x, net.const(net.draw(6, 3, 3, 3) * 0.3), pads=[1] * 4), 6, "stem"))
    left = net.bn(net.op("Conv", trunk, net.const(net.draw(6, 6, 1, 1))), 6, "left", positive=False)
    joined = net.op("Relu", net.op("Add", left, trunk))
    both = net.op("Concat", net.bn(joined, 6, "one"), net.op("Relu", net.bn(joined, 6, "other")), axis=1)
    flat = net.op("Flatten", net.op("GlobalAveragePool", both))
    y = net.bn(net.op("MatMul", flat, net.const(net.draw(12, 4))), 4, "last")
    return net.model([net.op("Sigmoid", y)], ("N", 3, "H", "W"))


def as_bytes(model):
    """A message in one fixed encoding."""
    return model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("opset", [9, 13, 17, newest()])
@pytest.mark.parametrize("size", [1, 5, 24])
def test_exact_whatever_the_batch_size(opset, size):
    """Micro-batches of any size give what one batch of all data gives, through branches and shared inputs."""
    model, x = residual_net(opset), images()
    expected = by_hand(model, {"x": x})
    result = bntools.recalibrate(model, [x[i : i + size] for i in range(0, 24, size)])
    assert gap(model, expected) < 2e-6
    assert result.residual < 1e-6
    assert (result.samples, result.virtual_batches, result.untouched) == (24, 1, {})


def test_processes_measure_a_graph_together():
    """Each with its share of the data, however uneven: all come to the statistics of the whole."""
    x = images()
    expected = by_hand(residual_net(), {"x": x})
    graphs, shares = [residual_net() for _ in range(3)], ([x[:17], x[17:20]], [], [x[20:]])
    results = together(3, lambda group: bntools.recalibrate(graphs[group.rank], shares[group.rank], group=group))
    for graph, result in zip(graphs, results, strict=True):
        assert gap(graph, expected) < 2e-6
        assert (result.samples, result.residual) == (24, results[0].residual)
    assert graphs[1].SerializeToString() == graphs[0].SerializeToString()


def test_the_reference_can_fail():
    """Mini-batch statistics, pooled, are not those of the whole: the comparison above tells them apart."""
    model, x = residual_net(), images()
    expected = by_hand(model, {"x": x})
    result = bntools.recalibrate(model, np.split(x, 12), method="precise")
    assert gap(model, expected) > 1e-2
    assert result.residual > 1e-2


def test_equal_to_the_module_it_was_exported_from():
    """The same weights as nn.Module and as file, on the same data, have the same statistics to 1e-5."""
    import models
    import torch

    torch.manual_seed(0)
    module = models.cnn().eval()
    x, file = torch.from_numpy(images(20, height=9, width=9)), io.BytesIO()
    with caught():
        training = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            module,
            (x[:2],),
            file,
            dynamo=False,
            training=training,
            dynamic_axes={"input": {0: "n"}},
            input_names=["input"],
        )
    model = onnx.load_from_string(file.getvalue())
    bntools.recalibrate(model, np.split(x.numpy(), 5))
    bntools.recalibrate(module, x.split(7))
    assert [layer.name for layer in bntools.inspect(model)] == [layer.name for layer in bntools.inspect(module)]
    assert gap(model, [layer.stats for layer in bntools.inspect(module)]) < 1e-5


def test_sizes_may_differ_between_batches():
    """Each batch of images may have its own height and width where the file leaves them free."""
    model = residual_net()
    batches = [
        images(4, height=8),
        images(3, height=11, seed=1),
        images(5, width=6, seed=2),
        images(4, height=8, seed=3),
    ]
    assert bntools.recalibrate(model, batches).residual < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 5e-3), (np.float64, 1e-12)])
def test_other_precisions(dtype, tolerance):
    """Models in half and in double precision, of operators that the runtime has in both."""
    net = Builder(dtype=dtype)
    hidden = net.op("Relu", net.bn(net.op("MatMul", "x", net.const(net.draw(3, 6))), 6, "first"))
    model = net.model([net.op("Relu", net.bn(net.op("MatMul", hidden, net.const(net.draw(6, 4))), 4))], ("N", 3))
    x = images(height=1, width=1, dtype=dtype).reshape(-1, 3)
    bntools.recalibrate(model, np.split(x, 4))
    assert gap(model, by_hand(model, {"x": x})) < tolerance
    assert bntools.inspect(model)[0].dtype == np.dtype(dtype).name


def test_a_statistic_too_large_for_half_precision_changes_nothing():
    """A variance above 65504 does not fit a float16 file: one error that names the layer."""
    net = Builder(dtype=np.float16)
    model = net.model([net.op("Relu", net.bn("x", 3, "bn"))], ("N", 3, 4, 4))
    before = as_bytes(model)
    with pytest.raises(BntoolsError, match=r"'bn': a variance of .* does not fit float16"):
        bntools.recalibrate(model, [images(height=4, width=4, dtype=np.float16) * np.float16(400)])
    assert as_bytes(model) == before


@pytest.mark.parametrize("form", ["proto", "ir", "path", "external"])
def test_every_form_in_place_and_back(form, tmp_path):
    """A message, an onnx_ir.Model and a file are changed themselves; undo gives back what was there."""
    proto, x = small(), images()
    expected = by_hand(proto, {"image": x})
    path = keep(proto, tmp_path / "model.onnx", external=form == "external")
    model = {"proto": proto, "ir": ir.from_proto(proto), "path": path, "external": path}[form]
    before, old = as_bytes(proto), [layer.stats for layer in bntools.inspect(model)]
    result = bntools.recalibrate(model, np.split(x, 3))
    assert gap(model, expected) < 2e-6
    result.undo()
    assert gap(model, old) == 0
    if form == "proto":
        assert as_bytes(proto) == before


def failing():
    """Batches that raise after the first."""
    yield images(4)
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (failing(), "the disk is gone"),
        ([images(4), images(4) * np.nan], "batch 1 brings NaN or Inf to the input of layer 'bn1'"),
        ([], "no samples"),
        ([images(4, channels=4)], r"takes the shape \(N, 3, 8, 8\)"),
        ([images(4).astype(np.complex64)], "input 'image' is float32, but the batch holds complex64"),
        ([{"picture": images(4), "label": np.zeros(4)}], "'image'"),
    ],
    ids=["raises", "NaN", "empty", "shape", "dtype", "name"],
)
def test_failures_change_nothing(batches, said):
    """Whatever is wrong with the data, one error says it and the message keeps every byte."""
    model = small()
    before = as_bytes(model)
    with pytest.raises(BntoolsError, match=said):
        bntools.recalibrate(model, batches)
    assert as_bytes(model) == before


def test_an_operator_that_nobody_knows():
    """A custom operator before a BN: the error names it and its domain, as everywhere."""
    model = small()
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node[2].domain, model.graph.node[2].op_type = "com.example", "Mystery"
    before = as_bytes(model)
    with pytest.raises(BntoolsError, match=r"'Mystery'.*'com.example'|com.example.*Mystery"):
        bntools.recalibrate(model, [images()])
    assert as_bytes(model) == before


def test_forward_is_for_modules():
    """A graph has no calling convention to be replaced."""
    with pytest.raises(BntoolsError, match="forward="):
        bntools.recalibrate(small(), [images()], forward=lambda model, batch: model)


def test_shared_statistics_are_parted():
    """Two layers that read one mean and one variance get their own; a third reader keeps the old values."""
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"], name="conv"),
        norm("bn", "c", "b1"),
        helper.make_node("Relu", ["b1"], ["r"]),
        helper.make_node("BatchNormalization", ["r", *norm("bn", "", "").input[1:]], ["b2"]),
        helper.make_node("Add", ["b2", "bias"], ["y0"]),
        helper.make_node("Unsqueeze", ["bn.running_mean", "axes"], ["u"]),
        helper.make_node("Unsqueeze", ["u", "axes2"], ["bias"]),
        helper.make_node("Identity", ["y0"], ["y"]),
    ]
    nodes = [*nodes[5:7], *nodes[:5], nodes[7]]
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    integers = [numpy_helper.from_array(np.array([axis]), name) for axis, name in ((1, "axes"), (2, "axes2"))]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [numpy_helper.from_array(weight, "w"), *constants("bn", 4), *integers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before, x = as_bytes(model), images()
    expected, bias = by_hand(model, {"image": x}), run(model, {"image": x[:1]}, ["bias"])[0]
    result = bntools.recalibrate(model, np.split(x, 2))
    assert gap(model, expected) < 2e-6
    np.testing.assert_array_equal(run(model, {"image": x[:1]}, ["bias"])[0], bias)
    onnx.checker.check_model(model, full_check=True)
    result.undo()
    assert as_bytes(model) == before


def test_prior_layers_and_samples():
    """prior=N weighs the old statistics as N samples; only named layers change; max_samples cuts the data."""
    model, x = small(), images()
    old = bntools.inspect(model)[0]
    result = bntools.recalibrate(model, np.split(x, 4), prior=8, layers="bn1", max_samples=16)
    assert (result.samples, result.untouched) == (16, {"bn2": "not selected by layers="})
    [measured, _] = by_hand(small(), {"image": x[:16]})
    blended = Moments.from_variance(16, *measured).merge(Moments.from_variance(8, *old.stats))
    assert distance((blended.mean, blended.var), bntools.inspect(model)[0].stats, old.eps) < 1e-6
    assert distance(bntools.inspect(small())[1].stats, bntools.inspect(model)[1].stats, 1e-5) == 0


def test_memory_bounds_virtual_batches():
    """Past the memory given, the data runs as several virtual batches, which the result says."""
    model, x = small(), images(40)
    one = 40 * 8 * 8 * 4  # bytes of a sample at the widest place
    result = bntools.recalibrate(model, np.split(x, 20), memory=one * 12)
    assert result.virtual_batches > 1
    assert result.samples == 40
    assert gap(model, by_hand(small(), {"image": x})) < 0.2


def test_tolerance_stops_early():
    """Enough is enough: a coarse tolerance needs a part of the data, and the standard error is in the result."""
    model = small()
    result = bntools.recalibrate(model, [images(16, seed=i) for i in range(64)], tolerance=0.05)
    assert result.samples < 1024
    assert result.standard_error <= 0.05


def test_ema_is_the_operators_own_update():
    """The moving average weighs the old statistics with the node's momentum, batch after batch."""
    model, x = small(), images()
    node = next(node for node in model.graph.node if node.name == "bn1")
    node.attribute.append(helper.make_attribute("momentum", 0.8))
    mean, var = bntools.inspect(model)[0].stats
    for part in np.split(x, 3):
        seen = Moments.of(run(model, {"image": part}, ["c1"])[0])
        mean, var = 0.8 * mean + 0.2 * seen.mean, 0.8 * var + 0.2 * seen.var
    bntools.recalibrate(model, np.split(x, 3), method="ema")
    assert distance((mean, var), bntools.inspect(model)[0].stats, 1e-5) < 1e-5


def branch(name, mean_of):
    """A branch of an If with a BN inside, which reads the outer value c2."""
    out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
    return helper.make_graph([norm(mean_of, "c2", f"{name}_out")], name, [], [out])


def test_layers_out_of_reach_are_reported():
    """BN inside an If, and one whose statistics are computed, keep what they have, with the reason."""
    model = small()
    computed = numpy_helper.from_array(np.ones(40, np.float32), "ones")
    reduce = helper.make_node("ReduceMean", ["image"], ["level"], axes=[0, 1, 2, 3], keepdims=0)
    var = helper.make_node("Mul", ["ones", "level"], ["bn1.computed"])
    condition = helper.make_node("Greater", ["level", "zero"], ["condition"])
    branches = {f"{name}_branch": branch(name, "bn2") for name in ("then", "else")}
    choose = helper.make_node("If", ["condition"], ["chosen"], name="choose", **branches)
    model.graph.initializer.extend([computed, numpy_helper.from_array(np.zeros((), np.float32), "zero")])
    nodes = [reduce, var, condition, *model.graph.node, choose]
    nodes[4].input[4] = "bn1.computed"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
    x = np.abs(images())
    result = bntools.recalibrate(model, np.split(x, 2))
    assert [layer.name for layer in result.layers] == ["scores"]
    assert sum("in a subgraph of If 'choose'" in reason for reason in result.untouched.values()) == 2
    assert sum("variance is no constant but computed" in reason for reason in result.untouched.values()) == 1
    assert result.residual < 1e-6


def test_shapes_that_depend_on_values():
    """Where a value's size depends on the data, stages still run, batch after batch."""
    net = Builder()
    picked = net.op(
        "Compress", "x", net.op("Greater", net.op("Reshape", "x", net.const(np.array([-1]))), net.const(np.float32(0)))
    )
    column = net.op("Unsqueeze", picked, net.const(np.array([1])))
    y = net.bn(net.op("Relu", net.bn(column, 1, "first")), 1, "second")
    model = net.model([net.op("Relu", y)], ("N", 2))
    x = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)
    expected = by_hand(model, {"x": x})
    assert bntools.recalibrate(model, np.split(x, 8)).residual < 1e-6
    assert gap(model, expected) < 2e-6


def test_a_sequence_across_a_layer_is_refused():
    """A sequence made before a BN and read behind it crosses the cut, which only tensors can: one error names it."""
    net = Builder()
    parts = net.op("SplitToSequence", "x", axis=1, keepdims=1, name="parts")
    first = net.bn(net.op("ConcatFromSequence", parts, axis=1), 3, "first")
    again = net.op("Add", first, net.op("SequenceAt", parts, net.const(np.array(0))))
    model = net.model([net.op("Relu", net.bn(again, 3, "second"))], ("N", 3), strict=False)
    before = as_bytes(model)
    with pytest.raises(BntoolsError, match=r"'parts'.* is a list and no tensor.*layers="):
        bntools.recalibrate(model, np.split(images(height=1, width=1).reshape(-1, 3), 4))
    assert as_bytes(model) == before
    assert bntools.recalibrate(model, images(height=1, width=1).reshape(-1, 3), layers="first").residual < 1e-6


def test_several_inputs_by_name():
    """A dict goes in by the names of the file's inputs; what the file has no input for is left out."""
    net = Builder()
    y = net.bn(net.op("Add", net.bn("x", 3, "first"), "more"), 3, "second")
    model = net.model([net.op("Relu", y)], ("N", 3), more=("N", 3))
    random = np.random.default_rng(0)
    batches = [
        {name: random.standard_normal((5, 3)).astype(np.float32) for name in ("x", "more", "label")} for _ in range(4)
    ]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in ("x", "more")}
    expected = by_hand(model, whole)
    bntools.recalibrate(model, batches)
    assert gap(model, expected) < 2e-6


def test_what_follows_the_last_layer_does_not_run():
    """An operator that the runtime lacks does no harm behind the last BN."""
    model = small()
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.append(helper.make_node("Unknown", ["scores"], ["end"], domain="com.example"))
    model.graph.output[0].name = "end"
    assert bntools.recalibrate(model, [images()]).residual < 1e-6


def test_nodes_in_any_order():
    """A file whose nodes are not in topological order is measured in the order in which they can run."""
    model, x = small(), images()
    expected = by_hand(model, {"image": x})
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    bntools.recalibrate(model, np.split(x, 2))
    assert gap(model, expected[::-1]) < 2e-6


def test_one_stage_at_a_time_is_in_memory(monkeypatch):
    """While replicas wait for each other, the session of a stage is gone when the next one's is made."""
    from bntools.backends.onnx import staging

    alive = []
    opened = staging.Runs._opened

    def counted(self, model):
        alive.append(len(self._sessions))
        return opened(self, model)

    monkeypatch.setattr(staging.Runs, "_opened", counted)
    bntools.recalibrate(residual_net(), np.split(images(), 4), check=False)
    assert len(alive) > 3
    assert set(alive) == {0}
