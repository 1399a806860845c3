"""Where two models part."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bntools import divergence
from bntools.divergence import Divergence, first_differing, first_divergence, nearest, windows
from bntools.runner import Runner, Trace


def search(names, differing, width, before=None, gauge=None):
    """The first that differs, how many values each look took, and which were read."""
    looks = []

    def differ(chosen):
        looks.append(list(chosen))
        return [name in differing for name in chosen]

    found = first_differing(names, before, differ, lambda: gauge if gauge and not looks else width)
    return found, looks


@given(st.data(), st.integers(1, 500), st.sampled_from([1, 3, 16]))
def test_bisection(data, size, width):
    """The first of a run of differences is found in a logarithmic number of looks, none wider than allowed."""
    first = data.draw(st.integers(0, size))
    names = [f"v{i}" for i in range(size)]
    found, looks = search(names, set(names[first:]), width)
    assert found == (names[first] if first < size else None)
    assert max(map(len, looks)) <= width
    assert len(looks) <= math.log(size + 1, width + 1) + 2
    assert len({name for look in looks for name in look}) == sum(map(len, looks))


@settings(max_examples=60)
@given(st.data(), st.integers(2, 50), st.sampled_from([1, 2, 7]))
def test_graphs(data, size, width):
    """In a graph with branches, a planted difference that spreads is found at exactly its node, wherever it is."""
    names = [f"v{i}" for i in range(size)]
    inputs = {
        name: data.draw(st.lists(st.sampled_from(names[:i]), max_size=3, unique=True)) if i else []
        for i, name in enumerate(names)
    }
    planted = data.draw(st.sampled_from(names))
    differing = {planted}
    for name in names:
        if differing & set(inputs[name]):
            differing.add(name)
    found, looks = search(names, differing, width, inputs.__getitem__)
    assert found == planted
    assert max(map(len, looks)) <= width


@pytest.mark.parametrize("width", [1, 2])
def test_masked_difference(width):
    """A difference hidden in one branch that shows in another: a value is named only if what it comes from agrees."""
    inputs = {"a": [], "b": ["a"], "c": ["b"], "d": ["c", "b"], "e": ["d"]}
    found, _ = search(list(inputs), {"b", "d", "e"}, width, inputs.__getitem__)
    assert found == "b"


@pytest.mark.parametrize("width", [1, 2, 9])
def test_difference_without_consequence(width):
    """A value that differs while all that is computed from it agrees is passed over for one whose difference lasts."""
    inputs = {"a": [], "b": ["a"], "c": ["b"], "d": ["c"], "e": ["d"], "f": ["e"]}
    assert search(list(inputs), {"b", "d", "e", "f"}, width, inputs.__getitem__)[0] == "d"
    assert search(list(inputs), {"b"}, 9, inputs.__getitem__)[0] == "b"


@pytest.mark.parametrize("flags", [(0, 1, 0, 0, 1), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1)])
def test_all_at_once(flags):
    """Values that fit in one look are all read: the first difference is found though others agree behind it."""
    found, looks = search(range(5), {i for i, flag in enumerate(flags) if flag}, 5)
    assert found == flags.index(1)
    assert len(looks) == 1


def test_all_in_a_second_look():
    """Where the first look tells that all the others fit, they are read in one more, each value once."""
    found, looks = search(range(100), {13, 70}, 256, gauge=16)
    assert found == 13
    assert [len(look) for look in looks] == [16, 84]


def test_nothing_to_search():
    """No names, no difference, and no run."""
    assert search([], set(), 4) == (None, [])


def diamond(size=4, **changes):
    """A trace of a graph: x -> a -> (b, c) -> d, with an inner value of each that no other model has."""
    values = {name: np.full(size, float(i + 1)) for i, name in enumerate(("a", "b", "c", "d"))}
    values.update({name: np.asarray(value) for name, value in changes.items()})
    reads = []

    def read(points):
        reads.append(list(points))
        return {point: values[point] for point in points}

    inputs = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    ops = {name: ("Relu", f"node_{name}") for name in values}
    return Trace(tuple(values), {}, read, inputs, ops), reads


def runner(trace, optimization="off"):
    """A runner of which only the trace matters."""
    return Runner("model", "onnx", "cpu", optimization, "float32", dict, lambda batch: trace)


@pytest.mark.parametrize("optimization", ["off", "default"])
def test_name_op_and_error(optimization):
    """The value that differs is named with its operator, its node and its error."""
    left, _ = diamond()
    right, reads = diamond(c=np.full(4, 3.3), d=np.full(4, 5.0))
    found = first_divergence(runner(left), runner(right, optimization), None, 1e-4)
    assert found == Divergence("c", "Relu", "node_c", pytest.approx(0.1))
    assert str(found) == "'c' (Relu 'node_c', error 1.0e-01)"
    assert max(map(len, reads)) == (4 if optimization == "off" else 1)


def test_memory_is_bounded(monkeypatch):
    """However many values there are, no more are held at once than the budget says, once their size is known."""
    monkeypatch.setattr(divergence, "BUDGET", 40 * 1000 * 8)
    names = [f"v{i}" for i in range(900)]
    widest = []

    def trace(bad):
        def read(points):
            widest.append(len(points))
            return {point: np.full(1000, 2.0 if int(point[1:]) >= bad else 1.0) for point in points}

        inputs = {name: tuple(names[max(i - 1, 0) : i]) for i, name in enumerate(names)}
        return Trace(tuple(names), {}, read, inputs)

    found = first_divergence(runner(trace(900)), runner(trace(613)), None, 1e-4)
    assert found is not None
    assert found.name == "v613"
    assert widest[0] == divergence.FIRST
    assert max(widest) <= 40
    assert len(widest) <= 2 * 4


def test_windows_follow_the_graph():
    """What may stand for a value follows from it; what only happens to run next in another branch does not."""
    values = ("a", "a1", "b", "c", "b1", "c1", "d")
    inputs = {"a1": ("a",), "b": ("a1",), "c": ("a1",), "b1": ("b",), "c1": ("c",), "d": ("b1", "c1")}
    trace = Trace(values, {}, dict, inputs)
    assert windows(trace, ["a", "b", "c"]) == {"a": ["a", "a1"], "b": ["b", "b1", "d"], "c": ["c", "c1", "d"]}
    assert nearest(inputs, "d", dict.fromkeys("abc", "")) in (["b", "c"], ["c", "b"])
    plain = Trace(values, {}, dict)
    assert windows(plain, ["a", "b", "c"]) == {"a": ["a", "a1"], "b": ["b"], "c": ["c", "b1", "c1", "d"]}


def test_a_fold_in_either_model_is_no_divergence():
    """A model in which one value has absorbed the next agrees with the one that has both, in either order."""
    inputs = {"conv": (), "bn": ("conv",), "out": ("bn",)}
    values = {"conv": np.ones(3), "bn": np.full(3, 5.0), "out": np.full(3, 7.0)}
    unfolded = Trace(tuple(values), {}, lambda points: {p: values[p] for p in points}, inputs)

    def folded(out):
        merged = {"conv": np.full(3, 5.0), "out": np.full(3, out)}
        return Trace(tuple(merged), {}, lambda points: {p: merged[p] for p in points}, {"conv": (), "out": ("conv",)})

    for pair in ((unfolded, folded(7.0)), (folded(7.0), unfolded)):
        assert first_divergence(*map(runner, pair), None, 1e-4) is None
    for pair in ((unfolded, folded(8.0)), (folded(8.0), unfolded)):
        found = first_divergence(*map(runner, pair), None, 1e-4)
        assert found is not None
        assert found.name == "out"
