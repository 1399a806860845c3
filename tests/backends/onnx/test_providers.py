"""Providers: their names and options, and why one is not there."""

from __future__ import annotations

import pytest

from bntools import BntoolsError
from bntools.backends.onnx import providers
from bntools.backends.onnx.providers import full_names, requested
from bntools.backends.onnx.session import open_session, require

CUDA = "CUDAExecutionProvider"


def test_short_and_full_names():
    """A provider is named in short or in full, alone or in a list."""
    assert full_names("cuda") == full_names(("CUDA",)) == full_names([CUDA]) == [CUDA]
    assert full_names(["tensorrt", "cuda", "cpu"]) == ["TensorrtExecutionProvider", CUDA, "CPUExecutionProvider"]
    known = {full for short in providers.SHORT_NAMES for full in full_names([short])}
    assert known == set(providers.SHORT_NAMES.values())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["cuda"], [(CUDA, {"use_tf32": "0"})]),
        ([("cuda", {"use_tf32": 1})], [(CUDA, {"use_tf32": "1"})]),
        (
            [("cuda", {"use_tf32": True, "device_id": 1}), "cpu"],
            [(CUDA, {"use_tf32": "1", "device_id": "1"}), ("CPUExecutionProvider", {})],
        ),
        (("cuda", {"device_id": 1}), [(CUDA, {"use_tf32": "0", "device_id": "1"})]),
        ("cpu", [("CPUExecutionProvider", {})]),
    ],
)
def test_options(asked, expected):
    """TF32 is off unless a pair of the provider and its options asks for it; other options are passed on."""
    assert requested(asked) == expected


@pytest.mark.parametrize("asked", [[("cuda", "use_tf32")], [7], [None], [(3, {})], [{"cuda": {}}]])
def test_neither_name_nor_pair(asked):
    """What is neither a name nor a pair of a name and options is an error that says what is expected."""
    with pytest.raises(BntoolsError, match="expected a name, or a pair of a name and a dict of its options"):
        requested(asked)


@pytest.mark.parametrize(("asked", "words"), [((), "no provider was asked for"), (["gpu"], "unknown provider 'gpu'")])
def test_unknown_names(asked, words):
    """An empty list and an unknown name are errors that list the known ones."""
    with pytest.raises(BntoolsError, match=words) as caught:
        open_session(b"", "tiny", asked, optimize=True)
    assert "tensorrt" in str(caught.value)


def test_provider_that_this_build_lacks(monkeypatch):
    """A provider that is not in the build is an error that names what the build has and how to get it."""
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "installed_wheels", lambda: ["onnxruntime"])
    with pytest.raises(BntoolsError) as caught:
        require(["cuda"])
    assert "'cuda' (CUDAExecutionProvider) was asked for and is not active" in str(caught.value)
    assert "has only CPUExecutionProvider. It comes with onnxruntime-gpu" in str(caught.value)


def test_both_wheels(monkeypatch):
    """Both runtime wheels installed at once, which breaks either, is named in the error."""
    monkeypatch.setattr(providers, "installed_wheels", lambda: ["onnxruntime", "onnxruntime-gpu"])
    with pytest.raises(BntoolsError, match="onnxruntime and onnxruntime-gpu are installed at once"):
        require(["cuda", "cpu"])


def test_installed_wheels():
    """The wheel that the runtime comes from is found by its distribution name."""
    assert any(name.startswith("onnxruntime") for name in providers.installed_wheels())
