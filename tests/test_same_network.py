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


def _output(model, data):
    (output,) = bntools.backends.of(model).predict(model, data).values()
    return output
