"""ONNX graphs and batches that are legal and rare: statistics that other nodes read, constants, numbers in a dict."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import constants, images, norm, small

import bntools
from bntools import BntoolsError


def test_undo_where_constants_have_several_uses():
    """Two layers and a convolution that read one another's constants part, and undo gives the same bytes."""
    model = small()
    first, second = (node for node in model.graph.node if node.op_type == "BatchNormalization")
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.full((5, 3, 3, 3), 0.1, np.float32), "w1"),
            numpy_helper.from_array(np.full((5, 5, 1, 1), 0.1, np.float32), "w2"),
            *constants("bn", 5),
        ]
    )
    orders = "weight bias running_mean running_var", "weight running_mean bias running_var"
    for node, kinds in zip((first, second), orders, strict=True):
        node.input[1:] = [f"bn.{kind}" for kind in kinds.split()]
        node.name = "bn"
    second.name = "other"
    model.graph.node[0].input.append("bn.running_mean")  # the bias of a convolution
    before = model.SerializeToString(deterministic=True)
    result = bntools.recalibrate(model, [images()])
    assert result.residual < 1e-6
    result.undo()
    assert model.SerializeToString(deterministic=True) == before


def test_a_layer_on_a_constant_is_left():
    """What a layer makes of a constant says nothing about the data: it is left, and named with the reason."""
    model = small()
    model.graph.node.append(norm("bn3", "table", "looked_up"))
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.ones((2, 4, 3), np.float32), "table"), *constants("bn3", 4)]
    )
    model.graph.output.append(helper.make_tensor_value_info("looked_up", TensorProto.FLOAT, [2, 4, 3]))
    result = bntools.recalibrate(model, [images()])
    assert [change.name for change in result.layers] == ["bn1", "bn2"]
    assert result.untouched == {"bn3": "what it normalizes is a constant"}
    assert bntools.fold(model, images()).kept == {"bn3": "what it normalizes is a constant"}


def test_a_number_before_the_samples():
    """In a dict batch the first array that has axes tells how many samples there are, wherever it stands."""
    model = small()
    model.graph.node.insert(0, helper.make_node("Mul", ["raw", "gain"], ["image"]))
    model.graph.input[0].name = "raw"
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
    batch = {"gain": np.array(2, np.float32), "raw": images(6)}
    results = []
    for one in (batch, dict(reversed(batch.items()))):
        copy = small()
        copy.CopyFrom(model)
        assert bntools.recalibrate(copy, [one], prior=6).samples == 6
        results.append(bntools.inspect(copy))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a.mean, b.mean)
        assert np.array_equal(a.var, b.var)


@pytest.mark.parametrize("verb", ["fold", "export"])
def test_an_example_without_samples(verb, tmp_path):
    """On no samples nothing can be compared: refused, and nothing written."""
    path = tmp_path / "out.onnx"
    with pytest.raises(BntoolsError, match="the example holds no samples"):
        bntools.fold(small(), images(0)) if verb == "fold" else bntools.export(small(), path, images(0))
    assert not path.exists()


@pytest.mark.parametrize("method", ["precise", "ema"])
def test_one_value_per_channel_in_a_batch(method):
    """A batch in which a layer sees one value is refused by methods that normalize with it; exact takes it."""
    node = norm("bn", "x", "y")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([node], "rows", [x], [y], constants("bn", 4))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    before = model.SerializeToString(deterministic=True)
    rows = images(1).reshape(-1, 4)
    singles = [row[None] for row in rows]
    with pytest.raises(BntoolsError, match="'bn' saw a single value per channel in a batch"):
        bntools.recalibrate(model, singles, method=method)
    assert model.SerializeToString(deterministic=True) == before
    bntools.recalibrate(model, singles)
    assert np.allclose(bntools.inspect(model)[0].var, rows.var(axis=0), rtol=1e-6)
