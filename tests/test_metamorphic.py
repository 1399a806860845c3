"""Statistics change as algebra says when data, weights or verbs do, on random networks in all three frameworks.

A few cases each; ``HYPOTHESIS_PROFILE=long python -m pytest tests/test_metamorphic.py`` tries many.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import relations
import verb_relations
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_nets import Block, Design, designs
from relations import Case

from bntools.backends.keras import feeding
from bntools.backends.keras import normalizing as in_keras
from bntools.backends.onnx import replica as in_onnx
from bntools.backends.torch import replica as in_torch
from bntools.measurement import Job
from bntools.moments import Moments

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EXAMPLES = {"torch": 150, "onnx": 150, "keras": 25} if LONG else {"torch": 2, "onnx": 2, "keras": 1}
RELATIONS = [*relations.ALL, *verb_relations.ALL]

# Where building costs more than everything else: Keras compiles, and exporting traces.
IMAGES = Design(4, 6, (Block(4, padding=1, norm="both"), Block(4, groups=2, padding=1, act="leaky", residual=True)))
ROWS = Design(3, 0, (Block(5, kernel=0), Block(5, kernel=0, norm="before", act="", residual=True)))
FEW = st.sampled_from([IMAGES, ROWS])


@pytest.fixture(autouse=True, scope="module")
def _no_batches_together():
    """Keras's small batches stay as they were cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "TOGETHER", 1)
        yield


@pytest.fixture(scope="module", params=["torch", "keras", "onnx"])
def backend(request):
    """Each framework in turn."""
    return request.param


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
def test_relation(backend, relation):
    """It holds of any network and any data; what it says stands above the relation."""
    few = not LONG and backend == "keras"
    exporting = relation is verb_relations.exported
    examples = max(1, EXAMPLES[backend] // (10 if exporting and LONG else 3 if exporting else 1))
    cases = st.builds(Case, st.just(backend), FEW if few else designs(), st.integers(5, 11), st.integers(0, 2**16))

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=not LONG,
        database=None,
        phases=[Phase.generate, *[Phase.shrink] * LONG],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def holds(case):
        relation(case)

    holds()


def mean_of_variances(self, other):
    """A merge that leaves out what lies between the batches."""
    count = self.count + other.count
    return Moments(count, (self.count * self.mean + other.count * other.mean) / count, self.m2 + other.m2)


def batches_alike(self, other):
    """A merge in which a ragged batch weighs as much as a full one."""
    one, two = Moments(1, self.mean, self.var), Moments(1, other.mean, other.var)
    both = MERGE(one, two)
    return Moments.from_variance(self.count + other.count, both.mean, both.var)


def sample_variance(self):
    """The divisor of an estimate, count - 1."""
    return self.m2 / (self.count - 1)


def momentum_left_in(self, measured, samples, updates=None):
    """New statistics that are only a tenth of what is stored."""
    self.prior = 9 * samples
    STORE(self, measured, samples, updates)


def difference_of_squares(x, *options, axis=1):
    """E[x^2] - E[x]^2 in float32."""
    x = np.moveaxis(np.asarray(x, np.float32), options[1] if len(options) > 1 else axis, -1)
    x = x.reshape(-1, x.shape[-1])
    mean = x.mean(0, dtype=np.float32)
    var = np.square(x).mean(0, dtype=np.float32) - mean * mean
    return Moments.from_variance(len(x), mean.astype(np.float64), np.maximum(var, 0).astype(np.float64))


MERGE, STORE = Moments.merge, Job.store
MUTANTS = {
    "mean of variances": (Moments, "merge", mean_of_variances, relations.definition),
    "batches alike": (Moments, "merge", batches_alike, relations.definition),
    "sample variance": (Moments, "var", property(sample_variance), relations.definition),
    "momentum left in": (Job, "store", momentum_left_in, verb_relations.twice),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_algorithm_is_caught(backend, mutant, monkeypatch):
    """What holds of bntools does not hold of what other helpers do."""
    owner, name, wrong, relation = MUTANTS[mutant]
    case = Case(backend, ROWS, 7, 0)
    relation(case)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="off by"):
        relation(case)


def test_squares_that_cancel_are_caught(backend, monkeypatch):
    """A variance from squares in float32 is right near zero, and wrong where the mean is large."""

    def plain(x, *options, axis=1):
        return difference_of_squares(x, *options, axis=axis)

    def with_samples(x, *options, axis=1):
        return difference_of_squares(x, *options, axis=axis), None

    case = Case(backend, IMAGES, 7, 0)
    for module, wrong in ((in_torch, plain), (in_keras, with_samples), (in_onnx, with_samples)):
        monkeypatch.setattr(module, "moments_of", wrong)
    relations.definition(case)
    with pytest.raises(AssertionError, match="pre0 is off by"):
        relations.large_offset(case)
