"""Models without BatchNormalization: what is said of them, and what is not taken for one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import images, small

import bntools
from bntools import BntoolsError

VALUE = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4, 8, 8]) for name in "xy"]


def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A model of these nodes from x to y, with a constant of four numbers and one weight."""
    four = numpy_helper.from_array(np.ones(4, np.float32), "four")
    weight = numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "weight")
    made = helper.make_graph(list(nodes), "graph", VALUE[:1], VALUE[1:], [four, weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


OTHERS = {
    "InstanceNormalization": {},
    "GroupNormalization": {"num_groups": 2},
    "LayerNormalization": {"axis": 1},
}


@pytest.mark.parametrize("op", OTHERS)
def test_other_normalizations_are_no_bn(op):
    """Normalizations whose scale and shift are constants are not taken for BN, and are named where BN is wanted."""
    model = graph(helper.make_node(op, ["x", "four", "four"], ["y"], **OTHERS[op]))
    assert bntools.inspect(model) == []
    with pytest.raises(BntoolsError, match=f"no BN layers: .*it normalizes by {op}"):
        bntools.reset(model)


def test_a_folded_model_is_told():
    """A model whose convolutions carry biases is said to be folded already, with the counts."""
    folded = bntools.fold(small(), images()).model
    for verb in (bntools.reset, lambda model: bntools.recalibrate(model, [images()])):
        with pytest.raises(BntoolsError, match=r"2 of 2 convolutions carry a bias, so they were folded already"):
            verb(folded)


def test_a_model_without_biases_was_not_folded():
    """Convolutions without a bias have taken up no BN."""
    with pytest.raises(BntoolsError, match="none of its 1 convolutions carries a bias, so they were not folded"):
        bntools.reset(graph(helper.make_node("Conv", ["x", "weight"], ["y"])))


def test_a_model_without_convolutions():
    """A model that has neither is told so."""
    with pytest.raises(BntoolsError, match="no BN layers: it has no convolutions either"):
        bntools.reset(graph(helper.make_node("Relu", ["x"], ["y"])))


@pytest.mark.parametrize("verb", [bntools.freeze, bntools.unfreeze, bntools.assert_frozen])
def test_nothing_to_freeze(verb):
    """freeze, unfreeze and assert_frozen say that an ONNX model does not train."""
    with pytest.raises(BntoolsError, match=r"an ONNX model does not train: .* There is nothing to freeze"):
        verb(small())
