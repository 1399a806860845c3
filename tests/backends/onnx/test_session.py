"""Sessions: the provider that was asked for, or an error with the runtime's reason."""

from __future__ import annotations

import os

import onnx
import pytest
from onnx import TensorProto, helper

from bntools import BntoolsError
from bntools.backends.onnx import session
from bntools.backends.onnx.session import full_names, open_session, require

CUDA = "CUDAExecutionProvider"


def model(op="Identity", dtype=TensorProto.FLOAT):
    """A serialized model of one node."""
    values = [helper.make_tensor_value_info(name, dtype, [1, 2, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "tiny", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return made.SerializeToString()


def test_short_and_full_names():
    """A provider is named in short or in full, alone or in a list."""
    assert full_names("cuda") == full_names(("CUDA",)) == full_names([CUDA]) == [CUDA]
    assert full_names(["tensorrt", "cuda", "cpu"]) == ["TensorrtExecutionProvider", CUDA, "CPUExecutionProvider"]
    known = {full for short in session.SHORT_NAMES for full in full_names([short])}
    assert known == set(session.SHORT_NAMES.values())


@pytest.mark.parametrize(
    ("providers", "words"), [((), "no provider was asked for"), (["gpu"], "unknown provider 'gpu'")]
)
def test_unknown_names(providers, words):
    """An empty list and an unknown name are errors that list the known ones."""
    with pytest.raises(BntoolsError, match=words) as caught:
        open_session(model(), "tiny", providers, optimize=True)
    assert "tensorrt" in str(caught.value)


def test_provider_that_this_build_lacks(monkeypatch):
    """A provider that is not in the build is an error that names what the build has and how to get it."""
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(session, "installed_wheels", lambda: ["onnxruntime"])
    with pytest.raises(BntoolsError) as caught:
        require(["cuda"])
    assert "'cuda' (CUDAExecutionProvider) was asked for and is not active" in str(caught.value)
    assert "has only CPUExecutionProvider. It comes with onnxruntime-gpu" in str(caught.value)


def test_both_wheels(monkeypatch):
    """Both runtime wheels installed at once, which breaks either, is named in the error."""
    monkeypatch.setattr(session, "installed_wheels", lambda: ["onnxruntime", "onnxruntime-gpu"])
    with pytest.raises(BntoolsError, match="onnxruntime and onnxruntime-gpu are installed at once"):
        require(["cuda", "cpu"])


def test_installed_wheels():
    """The wheel that the runtime comes from is found by its distribution name."""
    assert any(name.startswith("onnxruntime") for name in session.installed_wheels())


def test_provider_that_fails_to_load(monkeypatch):
    """A runtime that only complains on stderr and goes on without the provider is an error with that reason."""
    create = session._create

    def without_cuda(source, name, options, wanted):
        os.write(2, b"Failed to load library libonnxruntime_providers_cuda.so: libcublas.so.12: cannot open")
        return create(source, name, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(session, "_create", without_cuda)
    with pytest.raises(BntoolsError) as caught:
        require(["cuda"])
    assert "libcublas.so.12: cannot open" in str(caught.value)


def test_cpu_is_there():
    """The CPU needs nothing, and its sessions fall back to nothing."""
    require(["cpu"])
    opened = open_session(model(), "tiny", ["cpu"], optimize=False)
    assert opened.get_providers() == ["CPUExecutionProvider"]
    assert not opened._enable_fallback


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"not a model", "cannot load tiny"),
        (model("NoSuchOperator"), "cannot load tiny.*NoSuchOperator"),
        (model("Relu", TensorProto.BFLOAT16), "cannot load tiny.*try float32, or another provider"),
    ],
    ids=["no model", "unknown operator", "dtype the provider lacks"],
)
def test_models_that_the_runtime_refuses(source, words, capfd):
    """What the runtime refuses is one error in one line, and nothing on stderr."""
    with pytest.raises(BntoolsError, match=words) as caught:
        open_session(source, "tiny", ["cpu"], optimize=True)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""


def test_smallest_model():
    """The model that tries a provider out is one that the checker accepts."""
    onnx.checker.check_model(onnx.load_from_string(session._smallest_model()), full_check=True)
