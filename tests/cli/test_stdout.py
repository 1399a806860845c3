"""A stdout that is closed, full, or left by its reader."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from onnx_files import keep, small


@pytest.fixture(autouse=True)
def _onnx(desk):
    """A model beside the other whose inspection waits for no framework to start."""
    keep(small(), desk / "model.onnx")


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which ``bntools`` is this one; a pipe has the status of its first command."""
    program = f"{shlex.quote(sys.executable)} -m bntools.cli"
    script = f'bntools() {{ {program} "$@"; }}\n{line}\nexit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_a_reader_that_leaves(desk):
    """A reader of stdout that leaves early ends neither the work nor its exit status of success."""
    done = shell("bntools recalibrate model.pt data/ -o out.pt | true")
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out.pt").exists()
    assert json.loads(Path("out.json").read_text())["samples"] == 40


@pytest.mark.parametrize("line", ["bntools --help", "bntools inspect model.onnx"])
def test_closed_stdout(desk, line):
    """A closed stdout is no failure: what is printed goes nowhere."""
    done = shell(f"{line} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device is Linux's")
@pytest.mark.parametrize("line", ["bntools --help", "bntools inspect model.onnx"])
def test_full_disk_behind_stdout(desk, line):
    """A stdout that cannot be written to is one line and a failure."""
    done = shell(f"{line} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("bntools: ")
    assert done.stderr.count("\n") == 1
