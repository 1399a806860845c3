"""The samples run and end well."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SAMPLES = sorted((Path(__file__).parent.parent / "samples").glob("*.py"))


@pytest.mark.parametrize("path", [p for p in SAMPLES if p.stem != "recalibrate_digits"], ids=lambda path: path.stem)
def test_sample_runs(path, capsys):
    """Each sample runs to its end, its own assertions included, and prints something."""
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_samples():
    """The samples are found where they are looked for."""
    assert {path.stem for path in SAMPLES} >= {"recalibrate_digits", "fine_tune_frozen", "single_sample"}


def test_recalibration_restores_what_another_camera_took(capsys):
    """Recalibrated on unlabelled images, most digits lost to another contrast are read again, also from ONNX."""
    (path,) = (path for path in SAMPLES if path.stem == "recalibrate_digits")
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before, after, runtime = (float(line.split("%")[0].split()[-1]) for line in lines[:3])
    assert before < 60
    assert after > 95
    assert runtime == after
