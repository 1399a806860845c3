"""Planted situations, each with the one right advice."""

from __future__ import annotations

import re
import warnings
from copy import deepcopy

import coloured_digits as cd
import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools.diagnosis import advice, scalings
from bntools.diagnosis.records import Diagnosis, Domain, LayerDrift, ModeGap
from bntools.layer import BatchNorm
from bntools.reports import rendered


def diagnosed(images, model=None, **options):
    """The diagnosis of images, drawn for the network that reads digits."""
    return bntools.inspect(model or cd.trained(), cd.batches(images), **options)


def first(found):
    """The first advice, whose reason has figures."""
    assert any(character.isdigit() for character in found.advice[0].reason)
    return found.advice[0]


@pytest.fixture(scope="module")
def images():
    """Digits as in training, unseen."""
    return cd.held_out()[0][:200]


def dim(images, by=0.3):
    """Less contrast: another camera."""
    return images * np.float32(by)


def accuracy(model, images, labels):
    """The share of images that eval mode reads right."""
    with torch.no_grad():
        return float((model.eval()(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize("samples", [200, 64, 32])
def test_same_domain(images, samples):
    """Data as in training, much or little of it: leave the statistics, and no other preprocessing is suspected."""
    assert [one.action for one in diagnosed(images[:samples]).advice] == ["leave"]


@pytest.mark.parametrize("samples", [3, 6])
def test_too_few_samples(images, samples):
    """A handful of samples tells nothing: keep the statistics, and get as many samples as it says."""
    for seen in (images, dim(images)):
        found = first(diagnosed(seen[:samples]))
        assert found.action == "freeze"
        assert 8 <= found.figures["samples_needed"] <= 200


def test_single_sample(images):
    """One sample has no standard error."""
    found = diagnosed(images[:1])
    assert found.advice[0].action == "freeze"
    assert "1 sample" in found.advice[0].reason


CAMERAS = {
    "contrast": dim,
    "brightness": lambda images: np.clip(images + np.float32(0.3), 0, 1),
    "negative": lambda images: 1 - images,
    "noise": lambda images: np.clip(images + np.random.default_rng(0).normal(0, 0.3, images.shape), 0, 1),
}


@pytest.mark.parametrize("camera", CAMERAS)
def test_other_camera(images, camera):
    """Another camera and enough images: recalibrate, which the line given does, and which helps."""
    seen = CAMERAS[camera](images).astype(np.float32)
    found = first(diagnosed(seen))
    assert found.action == "recalibrate"
    assert found.figures["samples_5_percent"] < found.figures["samples_1_percent"]
    model, labels = deepcopy(cd.trained()), cd.held_out()[1][:200]
    before = accuracy(model, seen, labels)
    exec(found.how, {"bntools": bntools, "model": model, "batches": cd.batches(seen)})
    assert accuracy(model, seen, labels) > before


def test_samples_that_are_enough():
    """As many samples as are said to give 5 % of a standard deviation leave that much in the worst channel."""
    seen = dim(cd.held_out()[0])
    needed = int(first(diagnosed(seen)).figures["samples_5_percent"])
    assert needed < len(seen)
    layers = diagnosed(seen[:needed]).layers
    left = max(one.remaining_error for one in layers)
    assert left == pytest.approx(0.05, rel=0.3)


def test_the_page_needs_as_many_samples(images):
    """The report's curve and the advice tell the same number of samples, those of exact recalibration's tolerance."""
    found = diagnosed(dim(images))
    enough = int(first(found).figures["samples_1_percent"])
    assert f"0.01 std would take about {enough:,}" in rendered(found)
    result = bntools.recalibrate(deepcopy(cd.trained()), cd.batches(dim(images)), tolerance=1e-9, check=False)
    assert found.convergence == pytest.approx(np.array(result.convergence))


def test_few_samples_of_another_camera(images):
    """More than a handful but not enough: adapt, with a prior of some samples, and it says both conventions."""
    found = first(diagnosed(dim(images)[:12]))
    assert found.action == "adapt"
    assert re.search(r"prior=[1-9]\d*\)", found.how)
    momentum = found.figures["momentum"]
    assert f"momentum={momentum:g} in PyTorch" in found.reason
    assert f"{1 - momentum:g} in Keras" in found.reason


def test_gradual_drift():
    """Contrast that fades as the data goes: adapt, with a memory; the same images in random order do not ask for it."""
    images = cd.held_out()[0]
    fading = images * np.linspace(1, 0.2, len(images), dtype=np.float32)[:, None, None, None]
    found = first(diagnosed(fading))
    assert found.action == "adapt"
    model = deepcopy(cd.trained())
    exec(found.how, {"bntools": bntools, "model": model})
    shuffled = fading[np.random.default_rng(0).permutation(len(fading))]
    assert first(diagnosed(shuffled)).action == "recalibrate"


def test_sorted_by_class():
    """Digits in the order of their classes do not move as a domain does."""
    images, labels = cd.held_out()
    assert first(diagnosed(images[np.argsort(labels, kind="stable")])).action == "leave"


def test_domains_that_differ(images):
    """Two cameras in one folder: separate them, before anything is said about the mixture."""
    sites = {"site_a": cd.batches(images[:100]), "site_b": cd.batches(dim(images[100:]))}
    mixture = np.concatenate([images[:100], dim(images[100:])])
    found = diagnosed(mixture, domains=sites)
    assert [one.action for one in found.advice] == ["separate"]
    assert "'site_" in found.advice[0].reason
    scope = {"bntools": bntools, "model": cd.trained(), "domains": sites}
    exec(found.advice[0].how, scope)
    assert set(scope["sites"]) == set(sites)


def test_domains_that_are_alike(images):
    """Random parts of one domain are no domains."""
    parts = {str(i): cd.batches(images[i::4]) for i in range(4)}
    found = diagnosed(images, domains=parts)
    assert len(found.domains) == 4
    assert first(found).action == "leave"


def test_domains_that_are_classes():
    """Digits sorted by class differ in deep layers, which is said, but they are not domains."""
    images, labels = cd.held_out()
    found = diagnosed(images, domains={str(digit): cd.batches(images[labels == digit]) for digit in range(10)})
    assert first(found).action == "leave"
    assert any("classes rather than sites" in note for note in found.notes)


def test_some_classes_only():
    """Data that looks as in training but holds three classes of ten: keep the statistics of all of them."""
    images, labels = cd.held_out()
    assert first(diagnosed(images[labels < 3])).action == "freeze"


def test_wrong_range(images):
    """Pixels in 0..255 for a network that takes 0..1: mend that, and the line given does."""
    found = first(diagnosed(images * 255))
    assert found.action == "preprocess"
    mended = {"np": np, "images": images * 255}
    exec(found.how, mended)
    np.testing.assert_allclose(mended["images"], images, atol=1e-6)


def test_wrong_channel_order(images):
    """BGR for RGB, or normalized for ImageNet as well: mended by the line given."""
    swapped = np.ascontiguousarray(images[:, ::-1])
    normalized = (swapped - scalings.MEAN.reshape(3, 1, 1)) / scalings.STD.reshape(3, 1, 1)
    for wrong in (swapped, normalized.astype(np.float32)):
        found = first(diagnosed(wrong))
        assert found.action == "preprocess"
        mended = {"np": np, "images": wrong}
        exec(found.how, mended)
        np.testing.assert_allclose(mended["images"], images, atol=1e-5)


def test_preprocessing_comes_before_drift(images):
    """A wrong range of another camera's images is mended first, and nothing else is said of the data."""
    assert [one.action for one in diagnosed(dim(images) * 255, batch_size=4).advice] == ["preprocess"]


def test_statistics_not_finite(images):
    """NaN in one channel of one layer: reset that layer and recalibrate, and the model works again."""
    model = deepcopy(cd.trained())
    model[4].running_mean[3] = float("nan")
    found = first(diagnosed(images, model))
    assert found.action == "reset"
    assert "['4']" in found.how
    exec(found.how, {"bntools": bntools, "model": model, "batches": cd.batches(images)})
    assert accuracy(model, images, cd.held_out()[1][:200]) > 0.9


def test_never_updated(images):
    """Statistics as they were made: reset and recalibrate."""
    model = deepcopy(cd.trained())
    bntools.reset(model)
    found = first(diagnosed(images, model))
    assert found.action == "reset"
    assert "never updated" in found.reason


def test_data_from_elsewhere(images):
    """Data that most channels never saw the like of: reset."""
    found = diagnosed(images * 30 + 50, alternatives=False)
    assert first(found).action == "reset"


def test_weights_that_fit_old_statistics():
    """Fine-tuned with frozen statistics: these are far from the data's, but the output does not need others: leave."""
    model, (images, labels) = deepcopy(cd.trained()), cd.known()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with bntools.freeze(model, affine=False):
        model.train()
        for _ in range(2):
            for x, y in zip(torch.from_numpy(images).split(64), torch.from_numpy(labels).split(64), strict=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    found = diagnosed(images, model.eval())
    assert max(one.drift for one in found) > 0.5
    assert first(found).action == "leave"


@pytest.mark.parametrize(
    ("batch_size", "actions"), [(4, ["replace", "leave"]), (12, ["leave", "recalibrate"]), (32, ["leave"])]
)
def test_small_batches(images, batch_size, actions):
    """Training on batches of 4 calls for another normalization, below 16 for recalibration when it is over."""
    found = diagnosed(images, batch_size=batch_size)
    assert [one.action for one in found.advice] == actions
    if batch_size == 4:
        (at_4,) = (one.agreement for one in found.modes if one.batch_size == 4)
        assert f"in such batches agree on {at_4:.1%}" in found.advice[0].reason
        assert "recalibrate exactly when training is over" in found.advice[0].reason
        scope = {"bntools": bntools, "model": cd.trained()}
        exec(found.advice[0].how, scope)
        assert bntools.inspect(scope["model"]) == []


def test_small_batches_with_frozen_statistics(images):
    """Frozen layers do not care for the batch size; what recalibrates them names them."""
    model = deepcopy(cd.trained())
    bntools.freeze(model)
    found = diagnosed(dim(images), model, batch_size=4)
    assert [one.action for one in found.advice] == ["recalibrate"]
    exec(found.advice[0].how, {"bntools": bntools, "model": model, "batches": cd.batches(dim(images))})


class Recurrent(nn.Module):
    """One BN for every step; ``grows`` is by how much a step differs from the one before."""

    def __init__(self, grows):
        super().__init__()
        self.inside, self.bn, self.grows = nn.Linear(192, 16), nn.BatchNorm1d(16), grows

    def forward(self, x):
        x = self.inside(x.flatten(1))
        return sum(self.bn(x * self.grows**step + step * (self.grows - 1)) for step in range(3))


@pytest.mark.parametrize(("grows", "action"), [(4.0, "replace"), (1.0, "leave")])
def test_recurrent_use(images, grows, action):
    """A layer that is called on different things in one pass is replaced; one that is called on the same is not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent(grows).eval()
    bntools.recalibrate(model, cd.batches(images), check=False)
    assert first(diagnosed(images, model)).action == action


def test_notes(images):
    """Dead channels, a rest of the initial value and layers without statistics are said."""
    model = deepcopy(cd.trained())
    with torch.no_grad():
        model[0].weight[2] = 0
    model[4].num_batches_tracked.fill_(20)
    model.insert(0, nn.BatchNorm2d(3, track_running_stats=False))
    notes = "\n".join(diagnosed(images, model).notes)
    assert "1 channel of 1" in notes or "1 channel of 2" in notes
    assert "12.2% of the initial value is still inside the statistics of 5" in notes
    assert "each batch's own statistics, so that an output depends on the batch: 0" in notes


def layer(shift=0.0, ratio=1.0, error=0.01, channels=8, **options):
    """The drift of a layer that is off by as much in every channel."""
    zero, one = np.zeros(channels), np.ones(channels)
    record = BatchNorm("bn", "BatchNorm2d", channels, 1, 0.0, 0.1, zero, one, one, zero, 100, False, False)
    shift, ratio = zero + shift, zero + ratio
    return LayerDrift(record, shift, ratio**2, 0.0, shift, ratio, zero, error, remaining_error=error, **options)


@pytest.mark.parametrize(
    ("drift", "error", "samples", "action"),
    [
        (0.1, 0.01, 1000, "leave"),
        (0.2, 0.11, 1000, "leave"),
        (0.2, 0.01, 1000, "recalibrate"),
        (0.2, 0.01, 7, "freeze"),
        (0.4, 0.35, 100, "freeze"),
        (1.0, 0.35, 100, "adapt"),
        (2.0, 0.6, 100, "freeze"),
        (4.0, 0.01, 100, "reset"),
    ],
)
def test_table(drift, error, samples, action):
    """The decisions by drift, standard error and samples, one layer off by as much in every channel."""
    assert advice.of(Diagnosis(samples, [layer(drift, error=error)], []))[0].action == action


def test_ratio_alone():
    """A standard deviation six times the stored one in most channels is nowhere near it, one channel alone is."""
    assert advice.of(Diagnosis(1000, [layer(ratio=6.0)], []))[0].action == "reset"
    one = np.ones(8)
    one[0] = 6
    assert advice.of(Diagnosis(1000, [layer(ratio=one)], []))[0].action == "recalibrate"


def test_outputs_that_are_no_scores():
    """Where there is no class to agree on, outputs that hardly change let a drift be."""
    for error, action in ((0.01, "leave"), (0.1, "recalibrate")):
        found = Diagnosis(1000, [layer(0.5)], [], modes=[ModeGap(None, error, None)])
        assert advice.of(found)[0].action == action


def test_domain_within_its_noise():
    """A part that looks different only as much as random parts of its size may is no domain."""
    for noise, actions in ((0.2, ["leave"]), (0.02, ["separate"])):
        parts = [Domain("a", 9, 0.4, 0.2, 0.4, noise), Domain("b", 900, 0.01, 0.01, 0.01, 0.01)]
        assert [one.action for one in advice.of(Diagnosis(909, [layer()], [], domains=parts))] == actions


def in_keras(epochs):
    """A dense network on digits in Keras, its momentum 0.99 as by default, trained that many epochs of 10 batches."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            *(layers.Input((8, 8, 3)), layers.Flatten(), layers.Dense(24, "relu")),
            *(layers.BatchNormalization(), layers.Dense(10, "softmax")),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    images, labels = cd.known()
    model.fit(np.moveaxis(images[:640], 1, -1), labels[:640], batch_size=64, epochs=epochs, verbose=0)
    return model


def test_keras_after_few_updates(images):
    """Keras's momentum 0.99: after 5 epochs most of the initial value is inside; the line given closes the gap."""
    model, seen = in_keras(5), np.moveaxis(images, 1, -1)
    found = first(bntools.inspect(model, cd.batches(seen)))
    assert found.action == "reset"
    assert found.figures["initial_share"] == pytest.approx(0.99**50)
    exec(found.how, {"bntools": bntools, "model": model, "batches": cd.batches(seen)})
    again = bntools.inspect(model, cd.batches(seen), batch_size=4)
    assert [one.action for one in again.advice] == ["replace", "leave"]
    assert "keras.layers.GroupNormalization" in again.advice[0].how


def test_onnx(images, tmp_path):
    """An ONNX file gets the same advice; what a file cannot do is not proposed."""
    path = tmp_path / "digits.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that leaves BN alone is the older one
        options = {"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(cd.trained(), (torch.zeros(2, 3, 8, 8),), str(path), **options, **names)
    for seen, action in ((images, "leave"), (images * 255, "preprocess"), (dim(images), "recalibrate")):
        assert first(bntools.inspect(path, cd.batches(seen))).action == action
    few = first(bntools.inspect(path, cd.batches(images[:4])))
    assert (few.action, few.how) == ("freeze", "")
