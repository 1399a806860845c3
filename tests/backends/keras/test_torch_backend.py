"""The same tests on Keras's torch back end, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PORTABLE = ("test_recalibration.py", "test_inspecting.py", "test_freezing.py")


def test_portable_tests_pass():
    """Recalibration, inspect and freeze hold there as they do on TensorFlow."""
    if os.environ.get("KERAS_BACKEND") == "torch":
        return  # that is where we are
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in PORTABLE)]
    ran = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "torch"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert " passed" in ran.stdout
