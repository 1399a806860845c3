"""ONNX models that do not run, or give no numbers: one clear message."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from two_branches import X, network

import bntools
from bntools import BntoolsError

NAMES_TENSORS = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 26)


def test_nan_in_a_weight():
    """NaN in a weight is named by the output that it spoils and by the node where it comes in."""
    for pair in ((network(), network(left=np.nan)), (network(left=np.nan), network(left=np.nan))):
        check = bntools.verify(*pair, X)
        assert "itself gives NaN" in check.reason
        assert check.first_divergence == "left_out"
        assert check.divergence.error == np.inf


def broken(change):
    """The network with something done to it."""
    model = network()
    change(model)
    return model


def custom(model):
    """An operator that nobody knows."""
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    model.graph.node[3].CopyFrom(helper.make_node("Magic", ["left_out"], ["left_relu"], domain="com.acme"))


def cyclic(model):
    """A value that is computed from itself."""
    model.graph.node[0].input[0] = "y"


def unproduced(model):
    """A value that nothing computes."""
    model.graph.node[3].input[0] = "nowhere"


def half(model):
    """An operator in a dtype that the CPU has no kernel for."""
    model.graph.node.insert(4, helper.make_node("Cast", ["left_relu"], ["half"], to=TensorProto.BFLOAT16))
    model.graph.node.insert(5, helper.make_node("Softplus", ["half"], ["more"]))


def newer(model):
    """A format that is not there yet."""
    model.ir_version = 99


def spoiled(model):
    """A weight with too few bytes."""
    model.graph.initializer[0].raw_data = b"123"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (custom, "uses the operator 'Magic' of the domain 'com.acme', which ONNX Runtime"),
        (cyclic, "cannot load .*not acyclic"),
        (unproduced, "cannot load .*'nowhere' is not a graph input"),
        (half, "lacks this operator in this dtype: try float32"),
        (newer, "cannot load .*Unsupported model IR version: 99"),
        (spoiled, "cannot load .*'fc'" if NAMES_TENSORS else "cannot load .*buffer size mismatch"),
    ],
)
def test_models_that_do_not_run(change, words, tmp_path, capfd):
    """A model that cannot run is one error in one line that says what is wrong, in memory and as a file."""
    onnx.save(broken(change), tmp_path / "bad.onnx")
    for model in (broken(change), tmp_path / "bad.onnx"):
        with pytest.raises(BntoolsError, match=words) as caught:
            bntools.verify(network(), model, X)
        assert "\n" not in str(caught.value)
        assert "/onnxruntime_src/" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_batch_that_does_not_fit():
    """A batch of another shape is an error that says what the input takes."""
    with pytest.raises(BntoolsError, match=r"input 'x' takes the shape \(n, 6\), but the batch has \(4, 5\)"):
        bntools.verify(network(), network(), X[:, :5])
