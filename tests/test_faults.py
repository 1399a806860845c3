"""A small version of ``make faults``: kill -9 at every step of a save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parent / "trust" / "faults.py"


def test_a_save_that_is_killed_leaves_the_old_file_or_a_whole_one():
    """Killed before each of its calls that change files, bntools.save leaves one or the other, and may run again."""
    done = subprocess.run(
        [sys.executable, FAULTS, "--tries", "48", ".onnx, external weights"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("save")]
    assert " old" in row
    assert " new" in row
    assert int(row.removeprefix("save         .onnx, external weights").split()[2]) >= 12  # tries that were killed
