"""The back end's functions, which are imported from their homes when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from onnx_files import keep, small

from bntools import backends

HEAVY = ("torch", "tensorflow", "onnxruntime", "onnx_ir", "onnxscript", "onnx.reference")


def test_every_function_has_a_home():
    """What the back end offers can be had from it, under its own name."""
    onnx = backends.backend("onnx")
    assert [name for name in (*onnx.__all__, *onnx._HOME) if getattr(onnx, name, None) is None] == []


def test_other_names():
    """What no back end has is an ordinary missing attribute."""
    assert not hasattr(backends.backend("onnx"), "nonsense")


@pytest.mark.parametrize("external", [False, True])
def test_inspecting_imports_little(tmp_path, external):
    """bntools inspect model.onnx imports no framework, no runtime, and nothing that takes its time."""
    path = keep(small(), tmp_path / "model.onnx", external)
    code = (
        f"import sys; from bntools.cli import main; main(['inspect', {str(path)!r}], standalone_mode=False);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "2 BN layers, 45 channels"
    assert done.stdout.splitlines()[-1] == "[]"
