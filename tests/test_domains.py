"""Parts of the data against all of it."""

from __future__ import annotations

import coloured_digits as cd
import models
import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools.diagnosis import domains, pieces


def compared(parts, model=None, **options):
    """The parts, arrays by name, compared as batches of 32."""
    return domains.compare(
        model or cd.trained(), {name: cd.batches(part, 32) for name, part in parts.items()}, **options
    )


def test_noise_is_that_of_random_parts():
    """Parts drawn at random differ from all by their noise: on average its square, at the first layer and the worst."""
    images = cd.held_out()[0]
    found = []
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(images))
        found += compared({str(i): images[order[i * 40 : i * 40 + 40]] for i in range(6)})
    look = np.mean([one.look**2 for one in found]) / np.mean([one.look_noise**2 for one in found])
    assert 0.7 < look < 1.4
    drift = np.mean([one.drift**2 for one in found]) / np.mean([one.noise**2 for one in found])
    assert 0.7 < drift < 1.6
    assert domains.differing(found) == []


def test_drift_of_known_size():
    """Behind no other layer, two halves that are one deviation apart are each half of it from all, and it says so."""
    values = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    values[200:] += 1
    (first, second) = compared({"a": values[:200], "b": values[200:]}, nn.Sequential(nn.BatchNorm1d(3)).eval())
    spread = np.sqrt(1 + 0.25)
    wanted = np.hypot(0.5 / spread, 1 - 1 / spread)
    for one in (first, second):
        assert one.look == one.drift == pytest.approx(wanted, rel=0.1)
        assert one.samples == 200
        assert one.noise == pytest.approx(np.sqrt(1 + 0.5) * np.sqrt(1 / 200 - 1 / 400) * np.sqrt(0.85), rel=0.3)


def test_sizes_that_differ():
    """Parts of one sample and of hundreds, in batches of any size, and no more than MOST of each."""
    images = cd.held_out()[0]
    parts = {"one": [images[:1]], "many": [images[1:300], images[300:305], images[305:]], "none": []}
    found = domains.compare(cd.trained(), parts)
    assert {one.name: one.samples for one in found} == {"one": 1, "many": domains.MOST}
    assert found[0].look_noise > 5 * found[1].look_noise
    assert domains.compare(cd.trained(), {"alone": parts["many"], "none": []}) == []


def test_halves_and_calls():
    """Halves are in the order of the data; a layer that is called on different things has a gap between its calls."""
    values = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    values[32:] *= 4
    found, calls = domains.halves(models.Shared().eval(), cd.batches(values, 10))
    assert [one.name for one in found] == ["first half", "second half"]
    assert found[1].look > 0.2
    assert set(calls) == {"bn"}
    times, gap = calls["bn"]
    assert times == 2
    assert gap == pytest.approx(0.9, abs=0.3)  # means 0 and 5, of deviations near 3 and 6
    assert domains.halves(cd.trained(), [cd.held_out()[0][:1]]) == ([], {})


def test_data_that_is_read_once():
    """Generators, dicts and a forward of one's own serve as parts."""
    model = models.TwoInputs().eval()
    draw = np.random.default_rng(0).normal

    def batches(by):
        for _ in range(3):
            yield {"left": draw(size=(8, 3)).astype(np.float32) + by, "right": draw(size=(8, 2)).astype(np.float32)}

    found = domains.compare(model, {"a": batches(0), "b": batches(5)})
    assert [one.samples for one in found] == [24, 24]
    assert len(domains.differing(found)) == 2
    same = domains.compare(
        model,
        {"a": batches(0), "b": batches(5)},
        forward=lambda net, batch: net(*map(torch.from_numpy, (batch["left"] * 0, batch["right"]))),
    )
    assert domains.differing(same) == []


def test_nan_in_a_part():
    """NaN is an error that names the layer; the model stays as it was."""
    images = cd.held_out()[0][:32].copy()
    images[3] = np.nan
    with pytest.raises(bntools.BntoolsError, match="NaN or Inf at the input of layer '1'"):
        compared({"a": images, "b": cd.held_out()[0][:32]})


def test_pieces():
    """Pieces are of equal size, spread over the data, in its order, labels with them."""
    content = (np.arange(100), np.arange(100), "name")
    cut = pieces.cut([content], 40)
    assert [piece[0][0] for piece in cut] == [0, 24, 48, 72, 96]
    assert [len(piece[0]) for piece in cut] == [8, 8, 8, 8, 4]
    assert all((piece[0] == piece[1]).all() and piece[2] == "name" for piece in cut)
    assert [len(piece) for piece in pieces.cut([np.arange(5)], 40)] == [1] * 5


def test_subfolders(tmp_path):
    """Subfolders with images are parts; one alone, hidden ones, too many and files are none."""
    opened = []

    def note(path, most):
        opened.append((path, most))
        return path

    for name in ("b", "a", ".hidden", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "1.png").touch()
    assert domains.of_folder(tmp_path, note) is None
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "b" / "deep" / "2.jpg").touch()
    assert list(domains.of_folder(tmp_path, note)) == ["a", "b"]
    assert opened == [(str(tmp_path / "a"), domains.MOST), (str(tmp_path / "b"), domains.MOST)]
    assert domains.of_folder(tmp_path / "a" / "1.png", note) is None
    assert domains.of_folder("package.module:function", note) is None
    for i in range(domains.MANY):
        (tmp_path / f"class{i}").mkdir()
        (tmp_path / f"class{i}" / "1.png").touch()
    assert domains.of_folder(tmp_path, note) is None


def test_nothing_is_changed():
    """A comparison leaves modes and statistics as they were."""
    model = cd.trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compared({"a": cd.held_out()[0][:32], "b": cd.held_out()[0][32:64] * 5})
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
