"""``bntools demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bntools.cli import demo, digits
from bntools.errors import BntoolsError


def test_the_demo_of_one_camera(run, tmp_path, monkeypatch):
    """The demo runs the real commands, keeps their files, and recalibration brings the accuracy back."""
    monkeypatch.chdir(tmp_path)
    outcome = run("demo --camera contrast kept")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    for command in ("inspect model.pt", "recalibrate model.pt data/", "fold --export model.onnx"):
        assert f"$ bntools {command}" in lines
    row = next(line for line in lines if line.startswith("contrast 0.3  "))
    before, after, runtime = (float(cell.rstrip("%")) for cell in row.split()[2:])
    assert before < 60
    assert after > 95
    assert runtime == after
    names = {path.name for path in Path("kept/contrast").iterdir()}
    assert names == {"data", "model.pt", "model.recalibrated.pt", "model.recalibrated.json", "model.onnx"}


def test_the_demo_overwrites_nothing(refused, desk):
    """A folder that is not empty is refused."""
    assert "data is not empty" in refused("demo data")


def test_cameras_are_not_clipped():
    """Every camera but the noisy one fits into eight bits without clipping anything."""
    ink = digits.load().ink
    for name, camera in digits.CAMERAS.items():
        grey = digits.DARK + digits.RANGE * camera(ink)
        clipped = np.mean((grey < 0) | (grey > 1))
        assert clipped < 0.06 if name == "noise" else clipped == 0, name


def test_the_folder_holds_what_the_camera_saw(tmp_path):
    """The PNGs hold the images, without labels in their names, exactly."""
    from PIL import Image

    images = digits.seen(digits.load().ink[:5], "blur")
    digits.write_folder(images, tmp_path, a_roll=2)
    paths = sorted(tmp_path.rglob("*.png"))
    assert [str(path.relative_to(tmp_path)) for path in paths][:3] == [
        "roll-1/0001.png",
        "roll-1/0002.png",
        "roll-2/0003.png",
    ]
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in paths], images)


def test_without_its_packages(refused, desk, monkeypatch):
    """Without what the demo needs it says what to install, before any work."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else name)
    assert refused("demo") == "the demo needs sklearn: pip install 'bntools[demo]'"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BntoolsError, match=r"pip install 'bntools\[demo\]'"):
        digits.load()
