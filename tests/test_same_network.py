"""The same network in PyTorch, Keras and ONNX, on the same data, gives the same statistics and outputs."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import same_network

import bntools
from bntools.layer import distance

DATA = (np.random.default_rng(0).standard_normal((48, 3, 10, 10)) * 2 + 1).astype(np.float32)
LAST = np.ascontiguousarray(DATA.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The three, recalibrated in micro-batches of different sizes."""
    module = same_network.in_torch()
    found = {
        "torch": (module, DATA, 7),
        "keras": (same_network.in_keras(module), LAST, 16),
        "onnx": (same_network.in_onnx(module, tmp_path_factory.mktemp("onnx")), DATA, 48),
    }
    for model, data, size in found.values():
        bntools.recalibrate(model, [data[i : i + size] for i in range(0, len(data), size)])
    return {name: (model, data) for name, (model, data, _) in found.items()}


def test_statistics(models):
    """Mean and variance of every layer agree to 1e-5 of a standard deviation."""
    reference, *others = (bntools.inspect(model) for model, _ in models.values())
    for layers in others:
        assert len(layers) == 3
        for a, b in zip(reference, layers, strict=True):
            assert distance(a.stats, b.stats, a.eps) < 1e-5


def test_folded_outputs(models):
    """All three fold completely, and what they then give agrees to 1e-5 of its scale, within and across frameworks."""
    folded = {name: bntools.fold(model, data[:4]) for name, (model, data) in models.items()}
    assert [len(result.folded) for result in folded.values()] == [3, 3, 3]
    assert not any(result.kept for result in folded.values())
    assert max(result.check.error for result in folded.values()) < 1e-5
    outputs = [_output(folded[name].model, data) for name, (_, data) in models.items()]
    for other in outputs[1:]:
        assert np.abs(other - outputs[0]).max() < 1e-5 * np.abs(outputs[0]).max()


@pytest.fixture(scope="module")
def diagnoses(models):
    """What data that is brighter and of less contrast shows of the three, in batches of different sizes."""
    found = {}
    for name, size in {"torch": 7, "keras": 16, "onnx": 48}.items():
        model, data = models[name]
        shifted = data * np.float32(0.7) + np.float32(0.5)
        batches = [shifted[i : i + size] for i in range(0, len(data), size)]
        before = everything(model)
        first = bntools.inspect(model)[0].name
        found[name] = bntools.inspect(model, batches, histograms=first, alternatives=False, domains={"a": batches})
        assert everything(model) == before, name
    return found


def test_diagnoses(diagnoses):
    """Drift, divergence, standard error, share and histogram of each layer agree, and so do the modes and the curve."""
    reference = diagnoses["torch"]
    assert reference[0].drift > 0.2
    for other in (diagnoses["keras"], diagnoses["onnx"]):
        for a, b in zip(reference, other, strict=True):
            np.testing.assert_allclose(b.mean_shift, a.mean_shift, atol=1e-4)
            np.testing.assert_allclose(b.kl, a.kl, rtol=1e-3, atol=1e-5)
            assert (b.drift, b.gap) == (pytest.approx(a.drift, abs=1e-4), pytest.approx(a.gap, abs=1e-3))
            assert b.standard_error == pytest.approx(a.standard_error, rel=1e-4)
            assert (b.calls, b.dead) == (a.calls, a.dead)
        assert np.abs(other[0].histogram[1] - reference[0].histogram[1]).max() < 5
        assert other[0].histogram[1].sum() == reference[0].histogram[1].sum() == 48 * 8 * 8 * 6
        assert (
            [one.batch_size for one in other.modes] == [one.batch_size for one in reference.modes] == [2, 8, 32, None]
        )
        assert [one.error for one in other.modes] == pytest.approx([one.error for one in reference.modes], rel=1e-3)
        assert [one.agreement for one in other.modes] == [one.agreement for one in reference.modes]
        np.testing.assert_allclose(other.convergence, reference.convergence, rtol=1e-4)
        assert other.alone < 1e-5


@pytest.mark.parametrize("name", ["keras", "onnx"])
def test_an_interrupted_diagnosis(models, name):
    """Ctrl-C in the middle of it leaves a Keras model and an ONNX one as they were; so does data that turns bad."""
    model, data = models[name]
    before = everything(model)

    def press(what, samples, total):
        if what == "recalibrating" and samples:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bntools.inspect(model, [data * 2], progress=press)
    assert everything(model) == before
    with pytest.raises(bntools.BntoolsError, match="batch 1 brings NaN"):
        bntools.inspect(model, [data, data * np.nan])
    assert everything(model) == before


def everything(model):
    """All that a model holds, bit by bit, and what Keras's layers remember beside it."""
    if hasattr(model, "SerializeToString"):
        return model.SerializeToString()
    if hasattr(model, "state_dict"):
        return [value.numpy().tobytes() for value in model.state_dict().values()], [m.training for m in model.modules()]
    records = [(layer.updates, layer.stats_frozen, layer.training, layer.problems) for layer in bntools.inspect(model)]
    return [value.numpy().tobytes() for value in model.variables], records, [one.trainable for one in model.layers]


def _output(model, data):
    (output,) = bntools.backends.of(model).predict(model, data).values()
    return output
