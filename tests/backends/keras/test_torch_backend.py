"""The same tests on Keras's torch back end, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PORTABLE = (
    "test_recalibration.py",
    "test_inspecting.py",
    "test_freezing.py",
    "test_folding.py",
    "test_tracing.py",
    "test_files.py::test_round_trip",
    "test_shipping.py::test_a_functional_model",
    "test_shipping.py::test_a_model_in_python_is_folded_on_the_graph",
    "test_shipping.py::test_a_trace_that_would_freeze_a_decision_is_refused",
)
APART = "test_folding.py::test_saves_and_loads_without_bntools"  # starts a process of its own, on TensorFlow


def test_portable_tests_pass():
    """Every verb, and files, hold there as they do on TensorFlow."""
    if os.environ.get("KERAS_BACKEND") == "torch":
        return  # that is where we are
    # Without its own plugin: that would import Hypothesis after the tests, where its warnings are errors.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", f"--deselect={HERE / APART}"]
    command = [sys.executable, "-m", "pytest", *options, *(str(HERE / name) for name in PORTABLE)]
    ran = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout
