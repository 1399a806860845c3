"""Running ONNX models: what of a batch goes into which input."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from bntools import BntoolsError
from bntools.backends import onnx as backend


def summing(*inputs, op="Add", shape=("batch", 2)):
    """A model that adds its inputs, each given as (name, dtype)."""
    made = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype in inputs]
    output = helper.make_tensor_value_info("total", inputs[0][1], None)
    nodes = [helper.make_node("Sum" if len(made) > 1 else "Identity", [name for name, _ in inputs], ["total"])]
    graph = helper.make_graph(nodes, "summing", made, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


ONE = summing(("x", TensorProto.FLOAT))
TWO = summing(("left", TensorProto.FLOAT), ("right", TensorProto.FLOAT))
X = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.mark.parametrize(
    "batch",
    [X, X.astype(np.float64), torch.from_numpy(X), (X, "label"), [X], {"x": X}, {"x": X, "unused": None}, {"other": X}],
)
@pytest.mark.parametrize("optimize", [True, False])
def test_one_input(batch, optimize):
    """The only input takes an array, the first of a tuple or list, or the only array of a dict."""
    outputs = backend.predict(ONE, batch, optimize=optimize)
    assert list(outputs) == ["total"]
    assert outputs["total"].dtype == np.float32
    assert np.array_equal(outputs["total"], X)


def test_inputs_by_name():
    """A dict goes in by name, whatever its order; a nested input goes in by its order."""
    assert np.array_equal(backend.predict(TWO, {"right": X, "left": -X, "flag": True})["total"], X * 0)
    assert np.array_equal(backend.predict(TWO, ([X, X], "label"))["total"], X * 2)


def test_path(tmp_path):
    """A model is run from its file, given as a path or its name."""
    onnx.save(ONE, tmp_path / "model.onnx")
    assert np.array_equal(backend.predict(tmp_path / "model.onnx", X)["total"], X)
    assert np.array_equal(backend.predict(str(tmp_path / "model.onnx"), X)["total"], X)


def test_bfloat16_batch():
    """A bfloat16 tensor, which numpy has no dtype for, goes into a float32 input."""
    assert np.array_equal(backend.predict(ONE, torch.from_numpy(X).bfloat16())["total"], X)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [(TensorProto.FLOAT16, np.float64), (TensorProto.DOUBLE, np.float32), (TensorProto.INT64, np.int32)],
)
def test_dtypes(dtype, given):
    """A batch takes the dtype of the input, among floats and among integers."""
    wanted = helper.tensor_dtype_to_np_dtype(dtype)
    assert backend.predict(summing(("x", dtype)), X.astype(given))["total"].dtype == wanted


def test_scalar_input():
    """An input without axes takes a scalar array."""
    assert backend.predict(summing(("x", TensorProto.FLOAT), shape=()), np.float64(3))["total"] == 3


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (TWO, X, "has the inputs 'left', 'right', but the batch holds 1 arrays"),
        (TWO, {"left": X, "rihgt": X}, "has the inputs 'left', 'right', but the batch names left, rihgt"),
        (ONE, X[0], "takes the shape (batch, 2), but the batch has (2,)"),
        (ONE, X[:, :1], "takes the shape (batch, 2), but the batch has (3, 1)"),
        (summing(("x", TensorProto.FLOAT), shape=(1, 2)), X, "but the batch has (3, 2): its batch size is fixed at 1"),
        (summing(("x", TensorProto.INT64)), X, "input 'x' is int64, but the batch holds float32"),
        (summing(("x", TensorProto.BFLOAT16)), X, "input 'x' is tensor(bfloat16), which ONNX Runtime does not take"),
    ],
)
def test_batches_that_do_not_fit(model, batch, words):
    """A batch that does not fit is an error with what the model takes and what the batch has."""
    with pytest.raises(BntoolsError) as caught:
        backend.predict(model, batch)
    assert words in str(caught.value)


def test_failure_inside(capfd):
    """A model that fails as it runs is one error, and nothing on stderr."""
    model = summing(("x", TensorProto.FLOAT))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([5]), "five"))
    model.graph.node[0].CopyFrom(helper.make_node("Reshape", ["x", "five"], ["total"]))
    with pytest.raises(BntoolsError, match="fails in the ONNX model 'summing'"):
        backend.predict(model, X)
    assert capfd.readouterr().err == ""


def test_outputs_that_are_no_arrays():
    """A model that gives a sequence is refused by the name of the output."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("SplitToSequence", ["x"], ["parts"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(BntoolsError, match=r"output 'parts' is seq\(tensor\(float\)\), which ONNX Runtime"):
        backend.predict(model, X)


def test_runners():
    """There are two ways to run a model, and its least precise floating dtype is known."""
    off, default = backend.runners(summing(("a", TensorProto.FLOAT), ("b", TensorProto.FLOAT)))
    assert [off.optimization, default.optimization] == ["off", "default"]
    assert {off.provider, off.framework, off.dtype} == {"CPUExecutionProvider", "onnx", "float32"}
    assert backend.runners(summing(("x", TensorProto.FLOAT16)))[0].dtype == "float16"
