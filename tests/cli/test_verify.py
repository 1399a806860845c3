"""``bntools verify`` of ONNX files."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, with ``a.onnx``, ``same.onnx`` and ``wrong.onnx``, whose second node is wrong, and data."""
    monkeypatch.chdir(tmp_path)
    for name, slope in (("a", 1.0), ("same", 1.0), ("wrong", 1.5)):
        nodes = [
            helper.make_node("Relu", ["x"], ["h"], name="first"),
            helper.make_node("Mul", ["h", "slope"], ["y"], name="second"),
        ]
        values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["n", 3]) for one in "xy"]
        slopes = numpy_helper.from_array(np.array([1, 1, slope], np.float32), "slope")
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], [slopes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, f"{name}.onnx")
    np.save("x.npy", np.random.default_rng(0).uniform(0.1, 1, size=(8, 3)).astype(np.float32))
    return tmp_path


def test_figures_of_each_output(files, run):
    """What agrees is printed with one line an output: its errors and how the differences are spread."""
    outcome = run("verify a.onnx same.onnx x.npy")
    assert (outcome.status, outcome.err) == (0, "")
    assert "output 'y': error 0.0e+00, max 0.0e+00, mean 0.0e+00; of its scale: equal 100.0%" in outcome.out
    assert "verified on 8 samples" in outcome.out


def test_where_files_part(files, run):
    """What does not agree exits with 3 and names the node at which the files part."""
    outcome = run("verify a.onnx wrong.onnx x.npy")
    assert outcome.status == 3
    assert outcome.err.count("\n") == 1
    assert "first difference at 'y' (Mul 'second', error " in outcome.err
    assert "of its scale: equal 66.7%, " in outcome.out


def test_json(files, run):
    """Programs get the divergence with operator, node and error, the placement and the histogram."""
    outcome = run("verify a.onnx wrong.onnx x.npy --json")
    assert outcome.status == 3
    record = json.loads(outcome.out)
    divergence = record["divergence"]
    assert (divergence["name"], divergence["op"], divergence["node"]) == ("y", "Mul", "second")
    assert 0.01 < divergence["error"] < 1
    assert record["first_divergence"] == "y"
    assert sum(record["placement"].values()) == 2
    [output] = record["outputs"]
    assert (output["histogram"][0], sum(output["histogram"])) == (16, 24)
    agreeing = json.loads(run("verify a.onnx same.onnx x.npy --json").out)
    assert (agreeing["divergence"], agreeing["first_divergence"]) == (None, None)


@pytest.mark.parametrize("provider", ["cuda", "CUDAExecutionProvider", "cuda:use_tf32=1,device_id=0"])
def test_provider_that_is_not_there(files, refused, provider):
    """A provider that is not there is refused with ONNX Runtime's own list of what it has."""
    said = refused(f"verify a.onnx same.onnx x.npy --provider {provider}")
    assert "provider 'cuda' (CUDAExecutionProvider) was asked for and is not active" in said
    assert "this build of ONNX Runtime has only" in said


def test_input_that_does_not_fit(files, refused):
    """Data of another shape than the file's input is refused with both."""
    np.save("wide.npy", np.zeros((8, 4), np.float32))
    said = refused("verify a.onnx same.onnx wide.npy")
    assert "input 'x' takes the shape (n, 3), but the batch has (8, 4)" in said
