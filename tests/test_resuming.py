"""A run that was stopped goes on from its checkpoint, to the same result."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import same_network
import torch

import bntools
from bntools import resuming

DATA = (np.random.default_rng(0).standard_normal((48, 3, 10, 10)) * 2 + 1).astype(np.float32)
BATCHES = [DATA[i : i + 7] for i in range(0, len(DATA), 7)]
CASES = {
    "virtual batches": {"memory": 40_000},
    "tolerance": {"memory": 40_000, "tolerance": 0.02},
    "one batch at a time": {"memory": 1, "prior": 10, "max_samples": 45},
    "precise": {"method": "precise"},
}


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    """A checkpoint after each batch, where otherwise some seconds lie between them."""
    monkeypatch.setattr(resuming, "EVERY", 0)
    monkeypatch.setattr("bntools.backends.keras.feeding.TOGETHER", 14)  # samples: two batches together, not all
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["torch", "keras", "onnx"])
def case(request, tmp_path_factory):
    """A function that makes the model of a framework anew, and data for it."""
    module = same_network.in_torch()
    if request.param == "torch":
        return lambda: copy.deepcopy(module), BATCHES
    if request.param == "onnx":
        model = same_network.in_onnx(module, tmp_path_factory.mktemp("onnx"))
        return lambda: copy.deepcopy(model), BATCHES
    model = same_network.in_keras(module)

    def copied():
        twin = keras.models.clone_model(model)  # with the same names
        twin.set_weights(model.get_weights())
        return twin

    return copied, [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in BATCHES]


class Killed(BaseException):
    """What ends a run from outside."""


def killed(at: int):
    """Progress that ends the run at the call of this number."""
    calls = iter(range(at))

    def progress(*_):
        if next(calls, None) is None:
            raise Killed

    return progress


def stats(model):
    """Mean, variance and counter of every layer, to be compared bit for bit."""
    return {layer.name: (layer.mean.tobytes(), layer.var.tobytes(), layer.updates) for layer in bntools.inspect(model)}


def outcome(result):
    """What a result says."""
    return (
        result.samples,
        result.virtual_batches,
        result.standard_error,
        result.convergence,
        result.residual,
        result.notes,
    )


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_wherever_it_was_stopped_the_result_is_the_same(case, options, tmp_path):
    """Statistics, counters and all that the result says are those of a run that nobody stopped, bit for bit."""
    made, batches = case
    whole, calls = made(), []
    expected = bntools.recalibrate(whole, batches, progress=lambda *call: calls.append(call), **options)
    path = tmp_path / "state"
    resumed = set()
    for at in {1, len(calls) // 3, len(calls) // 2, len(calls) - 1}:
        model = made()
        before = stats(model)
        with pytest.raises(Killed):
            bntools.recalibrate(model, batches, progress=killed(at), checkpoint=path, **options)
        assert stats(model) == before
        seen = []
        result = bntools.recalibrate(
            model, batches, checkpoint=path, progress=lambda *call, seen=seen: seen.append(call), **options
        )
        assert stats(model) == stats(whole)
        assert outcome(result) == outcome(expected)
        assert os.listdir(tmp_path) == []
        resumed.add(len(calls) - len(seen))
    assert max(resumed) > len(calls) // 4  # of the work was not done again
