"""The first BN layer under the usual preprocessings: mistakes are found, cameras are not taken for them."""

from __future__ import annotations

from itertools import product

import coloured_digits as cd
import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools.diagnosis import looks, scalings

SCALES = {scale.name: scale for scale in scalings.SCALES}
USUAL = [name for name, scale in SCALES.items() if scale.usual]


def scaled(images, name):
    """Images (N, 3, H, W) in 0..1 as this scale has them."""
    return np.moveaxis(SCALES[name].of_unit(np.moveaxis(images, 1, -1).astype(float)), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def stems():
    """First layers by the scale on which they were measured, with filters of their own for each colour."""
    found = {}
    for name in USUAL:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
        bntools.recalibrate(model, [scaled(cd.known()[0][:400], name)], check=False)
        found[name] = model
    return found


def better(model, images):
    """The name of what fits far better, "" for nothing."""
    found = looks.better(looks.compare(model, [images]))
    return found[1].name if found else ""


@pytest.mark.parametrize(("trained", "given"), list(product(USUAL, SCALES)))
def test_mistakes_are_found(stems, trained, given):
    """Whatever the model was trained on and the data went through, with or without its colours reversed."""
    images = cd.held_out()[0][:64]
    right = "" if trained == given else trained
    assert better(stems[trained], scaled(images, given)) == right
    swapped = f"{trained}, {looks.SWAPPED}" if right else looks.SWAPPED
    assert better(stems[trained], scaled(images[:, ::-1], given)) == swapped


def tinted(red, green, blue):
    """Another light."""
    return lambda images: images * np.reshape((red, green, blue), (3, 1, 1))


CAMERAS = {
    "dim": lambda images: 0.3 * images,
    "flat": lambda images: 0.25 + 0.5 * images,
    "fog": lambda images: 0.45 + 0.22 * images,
    "bright": lambda images: np.clip(images + 0.3, 0, 1),
    "dark": lambda images: np.clip(images - 0.3, 0, 1),
    "hard": lambda images: np.clip(2 * images - 0.5, 0, 1),
    "gamma": lambda images: images**2.2,
    "noise": lambda images: np.clip(images + np.random.default_rng(0).normal(0, 0.2, images.shape), 0, 1),
    "blur": lambda images: sum(np.roll(images, step, axis) for step, axis in product((-1, 0, 1), (2, 3))) / 6,
    "warm": tinted(1.0, 0.8, 0.6),
    "cold": tinted(0.6, 0.8, 1.0),
    "grey": lambda images: np.repeat(images.mean(axis=1, keepdims=True), 3, axis=1),
}


@pytest.mark.parametrize(("trained", "camera"), list(product(USUAL, CAMERAS)))
def test_cameras_are_no_mistakes(stems, trained, camera):
    """A true domain shift, preprocessed as in training, is not taken for a wrong preprocessing."""
    images = scaled(CAMERAS[camera](cd.held_out()[0][:64]), trained)
    assert better(stems[trained], images) == ""


@pytest.mark.parametrize(("source", "target", "swap"), list(product(SCALES, USUAL, (False, True))))
def test_lines(source, target, swap):
    """The line of Python does what was measured, for both layouts."""
    images = np.moveaxis(scaled(cd.held_out()[0][:4], source), 1, -1).astype(float)
    unit = SCALES[source].to_unit(images)
    wanted = SCALES[target].of_unit(unit[..., ::-1] if swap else unit)
    for first, given in ((True, np.moveaxis(images, -1, 1)), (False, images)):
        names = {"np": np, "images": given}
        exec(scalings.line(SCALES[source], SCALES[target], swap, first), names)
        np.testing.assert_allclose(np.moveaxis(names["images"], 1, -1) if first else names["images"], wanted, atol=1e-9)


def test_what_is_no_image(stems):
    """Other shapes, several inputs, text and NaN are left alone."""
    images = cd.held_out()[0][:4]
    for batch in (images[0, 0], images[:, :2], {"a": images, "b": images}, images * np.nan, images[:0]):
        assert looks.compare(stems["0..1"], [batch]) == []


def test_batches_of_every_kind(stems):
    """Tuples with labels, dicts of one array, tensors and a forward of one's own are compared alike."""
    images, model = cd.held_out()[0][:64] * 255, stems["0..1"]
    wanted = looks.compare(model, [images])
    for batch in ((images, np.zeros(64)), {"input": images}, torch.from_numpy(images)):
        found = looks.compare(model, [batch])
        assert [one.name for one in found] == [one.name for one in wanted]
        assert found[0].drift == pytest.approx(wanted[0].drift)
    doubled = looks.compare(model, [images / 2], forward=lambda net, batch: net(torch.as_tensor(batch) * 2))
    assert doubled[0].drift == pytest.approx(wanted[0].drift)


def test_other_layout():
    """A model that flattens its input takes images in either layout, and only one is what it was trained on."""
    images = cd.held_out()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16)).eval()
    bntools.recalibrate(model, [images], check=False)
    found = looks.better(looks.compare(model, [np.ascontiguousarray(np.moveaxis(images, 1, -1))]))
    assert found is not None
    assert found[1].name == "channels first"
    names = {"np": np, "images": np.moveaxis(images, 1, -1)}
    exec(found[1].how, names)
    np.testing.assert_array_equal(names["images"], images)
    assert looks.better(looks.compare(model, [images])) is None


def test_nothing_is_changed(stems):
    """Neither the images nor the model are."""
    images, model = cd.held_out()[0][:64].copy(), stems["0..1"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    looks.compare(model.train(), [images])
    assert model.training
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(images, cd.held_out()[0][:64])
