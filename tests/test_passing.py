"""How a scale and shift gets past an operation: each rule against the operation itself, in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bntools import passing
from bntools.affine import Affine
from bntools.graph import (
    Add,
    Concat,
    Graph,
    Identity,
    Linear,
    Node,
    Other,
    Pad,
    Permute,
    Pool,
    Reduce,
    Reshape,
    Resize,
    Slice,
)
from bntools.passing import Refused

RULES = [
    (Identity(), lambda x: x.clone()),
    (Reshape(), lambda x: x.flatten(1)),
    (Reshape(), lambda x: x.flatten(2)),
    (Reshape(), lambda x: x.reshape(2, 2, 3, 1, 4, 4)),
    (Permute((0, 2, 3, 1)), lambda x: x.permute(0, 2, 3, 1)),
    (Pool("average", (2, 3)), lambda x: F.avg_pool2d(x, 2)),
    (Pool("average", (2, 3)), lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
    (Pool("average", (2, 3)), lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
    (Pool("max", (2, 3)), lambda x: F.max_pool2d(x, 3, 1, 1)),
    (Pool("max", (2, 3)), lambda x: F.adaptive_max_pool2d(x, 3)),
    (Reduce("average", (2, 3), True), lambda x: x.mean((2, 3), keepdim=True)),
    (Reduce("average", (2, 3), False), lambda x: x.mean((2, 3))),
    (Reduce("max", (2,), False), lambda x: x.amax(2)),
    (Resize((2, 3)), lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    (Resize((2, 3)), lambda x: F.interpolate(x, size=(3, 7), mode="bicubic", antialias=True)),
    (Resize((2, 3)), lambda x: F.interpolate(x, size=(7, 3), mode="bilinear", align_corners=True)),
    (Pad((2, 3), None), lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    (Pad((2, 3), None), lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
    (Pad((2, 3), None), lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    (Pad((2, 3), -np.inf), lambda x: F.pad(x, (1, 2, 0, 1), value=-float("inf"))),
]


def node(op, x, y) -> tuple[Graph, Node]:
    """A graph of one operation from x to y."""
    made = Node(op, "op 'it'", (0,), (1,))
    return Graph((made,), {0: tuple(x.shape), 1: tuple(y.shape)}, {}), made


def applied(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    """The affine applied to a value."""
    return x * torch.from_numpy(affine.scale.copy()) + torch.from_numpy(affine.shift.copy())


def per_channel(positive: bool = True, shift: bool = True) -> Affine:
    """A random affine along axis 1, of six channels."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2, (1, 6, 1, 1)) if positive else rng.normal(size=(1, 6, 1, 1))
    return Affine(scale, rng.normal(size=(1, 6, 1, 1)) if shift else np.zeros((1, 6, 1, 1)))


@pytest.mark.parametrize(("op", "function"), RULES)
def test_an_affine_gets_past_forward_and_backward(op, function):
    """``f(affine(x))`` is the affine that forward gives of ``f(x)``, and backward leads back to the same."""
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, affine = function(x), per_channel()
    graph, made = node(op, x, y)
    after = passing.forward(graph, made, {0: affine})
    torch.testing.assert_close(applied(after, y), function(applied(affine, x)))
    ((value, before),) = passing.backward(graph, made, after)
    assert value == 0
    torch.testing.assert_close(applied(before, x), applied(affine, x))


@pytest.mark.parametrize(
    ("op", "affine", "words"),
    [
        (Pool("max", (2, 3)), per_channel(positive=False), "not negative, and channel 4 has -0.536"),
        (Reduce("max", (2, 3), True), per_channel(positive=False), "not negative"),
        (Pool("average", (2, 3), partial=True), per_channel(), "counts the zeros"),
        (Pad((2, 3), 0.0), per_channel(), "pads with 0"),
        (Pad((2, 3), 1.0), per_channel(shift=False), "pads with 1"),
        (Pad((2, 3), -np.inf), per_channel(positive=False), "pads with -inf"),
        (Pad((1,), None), per_channel(), "mixes channels"),
        (Reduce("average", (1,), True), per_channel(), "mixes channels"),
        (Resize((1, 2)), per_channel(), "mixes channels"),
        (Other(), per_channel(), ""),
    ],
)
def test_an_affine_does_not_get_past_what_would_change_it(op, affine, words):
    """Both directions refuse in the same cases, and name the operation and what is wrong."""
    graph, made = node(op, torch.empty(2, 6, 4, 4), torch.empty(2, 6, 4, 4))
    for direction in (lambda: passing.forward(graph, made, {0: affine}), lambda: passing.backward(graph, made, affine)):
        with pytest.raises(Refused, match=f"op 'it'.*{words}"):
            direction()


@pytest.mark.parametrize("op", [Pool("average", (2, 3), partial=True), Pad((2, 3), 0.0)])
def test_zeros_stay_zeros_without_a_shift(op):
    """Padding with zeros stops a shift only: a scale alone passes."""
    graph, made = node(op, torch.empty(2, 6, 4, 4), torch.empty(2, 6, 4, 4))
    affine = per_channel(positive=False, shift=False)
    assert passing.forward(graph, made, {0: affine}).same(affine)


def test_the_indices_of_a_max_pooling_stop_it():
    """Where somebody reads which element was the largest, ties made by a scale of zero would show."""
    x = torch.empty(2, 6, 4, 4)
    made = Node(Pool("max", (2, 3)), "pool", (0,), (1, 2))
    graph = Graph((made,), {0: tuple(x.shape), 1: (2, 6, 2, 2), 2: (2, 6, 2, 2)}, {2: "an output of the model"})
    with pytest.raises(Refused, match="indices of pool are used"):
        passing.forward(graph, made, {0: per_channel()})


def test_a_concatenation_takes_each_branch_for_itself():
    """Backward, each branch is asked for its own channels; forward, the other branches are as they should be."""
    a, b = (torch.randn(2, n, 3, dtype=torch.float64) for n in (2, 4))
    made = Node(Concat(1), "cat", (0, 1), (2,))
    graph = Graph((made,), {0: (2, 2, 3), 1: (2, 4, 3), 2: (2, 6, 3)}, {})
    affine = Affine(*np.random.default_rng(0).normal(size=(2, 1, 6, 1)))
    (_, first), (_, second) = passing.backward(graph, made, affine)
    expected = applied(affine, torch.cat([a, b], 1))
    torch.testing.assert_close(torch.cat([applied(first, a), applied(second, b)], 1), expected)
    after = passing.forward(graph, made, {1: second})
    torch.testing.assert_close(applied(after, torch.cat([a, b], 1)), torch.cat([a, applied(second, b)], 1))


def test_a_part_gets_its_part():
    """Forward through a slice goes the slice of the affine."""
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    graph, made = node(Slice(1, 1, 6, 2), x, x[:, 1:6:2])
    after = passing.forward(graph, made, {0: per_channel()})
    torch.testing.assert_close(applied(after, x[:, 1:6:2]), applied(per_channel(), x)[:, 1:6:2])


def test_a_sum_asks_all_its_terms_for_the_scale_and_one_for_the_shift():
    """``scale * (a + b) + shift`` is the sum of what the terms are asked for."""
    a, b = torch.randn(2, 2, 6, 3, 3, dtype=torch.float64)
    made = Node(Add(), "add", (0, 1), (2,))
    graph = Graph((made,), dict.fromkeys(range(3), (2, 6, 3, 3)), {})
    (_, first), (_, second) = passing.backward(graph, made, per_channel())
    torch.testing.assert_close(applied(first, a) + applied(second, b), applied(per_channel(), a + b))


def test_a_sum_that_broadcasts_is_refused():
    """A term of another shape would take up its part of the shift several times."""
    made = Node(Add(), "add", (0, 1), (2,))
    graph = Graph((made,), {0: (2, 6, 3, 3), 1: (6, 1, 1), 2: (2, 6, 3, 3)}, {})
    with pytest.raises(Refused, match="add broadcasts one of its terms"):
        passing.backward(graph, made, per_channel())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_reshaped_affine_is_the_affine_of_the_reshaped_value(data):
    """For any two shapes of the same elements and any axes along which the affine varies."""
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def grouped(name):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)), max_size=4), label=name) | {0, len(factors)})
        return tuple(int(np.prod(factors[a:b])) for a, b in pairwise(cuts))

    before, after = grouped("before"), grouped("after")
    varies = [n if data.draw(st.booleans()) else 1 for n in before]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    affine = Affine(rng.integers(0, 3, varies).astype(float), rng.normal(size=varies))
    x = rng.normal(size=before)
    expected = (affine.scale * x + affine.shift).reshape(after)
    found = passing.reshaped(affine, before, after)
    np.testing.assert_array_equal(found.scale * x.reshape(after) + found.shift, expected)


def test_the_axis_of_the_channels_has_to_agree():
    """An affine along axis 1 is none for an operation whose channels are on axis 2, though the sizes agree."""
    affine = Affine(np.arange(4.0).reshape(1, 4, 1), np.zeros((1, 1, 1)))
    assert passing.along(affine, (2, 4, 4), 1, "it").scale.tolist() == [0, 1, 2, 3]
    with pytest.raises(Refused, match="it has its channels on axis 2, the layer on axis 1"):
        passing.along(affine, (2, 4, 4), 2, "it")


def test_a_linear_operation_is_not_passed():
    """What takes an affine up is not what lets it pass."""
    linear = Linear("w", "b", 0, 1, 1, 1, 1)
    graph, made = node(linear, torch.empty(2, 6), torch.empty(2, 6))
    with pytest.raises(Refused):
        passing.forward(graph, made, {0: per_channel()})
