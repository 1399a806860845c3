"""The verb diff: the BN state of two models, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bntools import backends, files
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, distance
from bntools.matching import match
from bntools.statfiles import holds_stats, load_stats
from bntools.stats import Statistics

EPS = 1e-5  # where neither side knows it
FROM_STATISTICS = "statistics"  # the kind of a record of which nothing but statistics is known


@dataclass(frozen=True, eq=False)
class LayerDiff:
    """One layer in both models: ``a`` and ``b`` are its records.

    ``mean_shift`` is b's mean minus a's in standard deviations of a, ``std_ratio`` b's standard deviation over a's,
    both of shape (features,); ``drift`` is the largest over the channels of ``abs(mean_shift)`` and
    ``abs(std_ratio - 1)``, infinite where statistics differ that are not all finite. These are None, None and NaN
    where one side keeps no statistics or features differ.
    ``scale`` and ``shift`` are the largest absolute differences of the affine parameters, None where one side does not
    tell. ``changes`` says in words what differs, and is empty for a layer that is the same.
    """

    a: BatchNorm
    b: BatchNorm
    drift: float
    mean_shift: np.ndarray | None
    std_ratio: np.ndarray | None
    scale: float | None
    shift: float | None
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The layer's name in the first model, and in the second where that differs."""
        return self.a.name if self.a.name == self.b.name else f"{self.a.name} = {self.b.name}"

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.changes


@dataclass(frozen=True, eq=False)
class Diff:
    """What ``diff`` returns: a sequence of the ``layers`` that both models have, in the order of the first.

    ``only_in_a`` and ``only_in_b`` name the others. ``matched`` says how layers were paired, ``notes`` are sentences
    worth reading.
    """

    layers: list[LayerDiff]
    only_in_a: list[str]
    only_in_b: list[str]
    matched: str
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both have the same layers, and nothing in them differs."""
        return not self.only_in_a and not self.only_in_b and all(layer.same for layer in self.layers)

    @property
    def drift(self) -> float:
        """The largest drift of a layer; 0 where there is none to compare."""
        return max((layer.drift for layer in self.layers if not math.isnan(layer.drift)), default=0.0)

    def worst(self) -> list[LayerDiff]:
        """The layers that differ, those that cannot be compared and then the largest drift first."""
        return sorted(
            (layer for layer in self.layers if not layer.same),
            key=lambda one: (not math.isnan(one.drift), -one.drift if one.drift == one.drift else 0.0),
        )

    def __iter__(self) -> Iterator[LayerDiff]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def diff(
    a: Any, b: Any, *, mapping: Mapping[str, str] | None = None, arch: Any = None, allow: Sequence[str] | str = ()
) -> Diff:
    """Compare the BN state of two models: statistics, scale and shift, eps and momentum, layer by layer.

    Each is a model, ``Statistics``, or a file of any form that ``load`` and ``load_stats`` take; a state dict is read
    by the names in it, without ``arch``. ``mapping`` gives layer names of ``b`` by those of ``a``, with globs
    (``{"backbone.*": "net.*"}``); without it, names that have nothing in common are paired by what else tells them,
    which ``matched`` says. What one side does not tell (a state dict no eps) is not compared. Momentum is compared
    between models of one framework: Keras's and ONNX's weighs the old value, PyTorch's the new one.

    Raises BntoolsError where a file cannot be read, or nothing tells which layer is which.

        for layer in bntools.diff("trained.pt", "averaged.pt").worst():
            print(layer.name, layer.drift, layer.changes)
    """
    mine, theirs = (_layers(side, arch, allow) for side in (a, b))
    found = match(mine, theirs, mapping)
    others = {layer.name: layer for layer in theirs}
    layers = [_compared(layer, others[found.pairs[layer.name]]) for layer in mine if layer.name in found.pairs]
    taken = set(found.pairs.values())
    return Diff(
        layers=layers,
        only_in_a=[layer.name for layer in mine if layer.name not in found.pairs],
        only_in_b=[layer.name for layer in theirs if layer.name not in taken],
        matched=found.how,
        notes=list(_notes(layers)),
    )


def _layers(side: Any, arch: Any, allow: Sequence[str] | str) -> list[BatchNorm]:
    if isinstance(side, Statistics):
        return _of_statistics(side)
    if not isinstance(side, (str, os.PathLike)):
        return list(backends.of(side).layers(side))
    path = Path(side)
    if holds_stats(path):
        return _of_statistics(load_stats(path))
    described = getattr(files.reader(path), "described", None)
    if described is not None and path.stat().st_size:
        layers = described(str(path), (allow,) if isinstance(allow, str) else tuple(allow))
        if arch is None or not any(math.isnan(layer.eps) for layer in layers):
            return list(layers)
    model = _loaded(path, arch, allow)
    return list(backends.of(model).layers(model))


def _loaded(path: Path, arch: Any, allow: Sequence[str] | str) -> Any:
    """``arch`` is for the side that holds weights alone; the other has no use for it."""
    try:
        return files.peek(path, allow=allow)
    except BntoolsError:
        if arch is None:
            raise
    return files.peek(path, arch=arch, allow=allow)


def _of_statistics(stats: Statistics) -> list[BatchNorm]:
    return [
        BatchNorm(
            name=layer.name,
            kind=FROM_STATISTICS,
            features=layer.features,
            axis=layer.axis,
            eps=layer.eps,
            momentum=None,
            mean=layer.mean,
            var=layer.var,
            scale=None,
            shift=None,
            updates=layer.updates,
            stats_frozen=False,
            affine_frozen=False,
        )
        for layer in stats
    ]


def _compared(a: BatchNorm, b: BatchNorm) -> LayerDiff:
    comparable = a.features == b.features and a.tracked and b.tracked
    eps = next((one.eps for one in (a, b) if not math.isnan(one.eps)), EPS)
    drift, mean_shift, std_ratio = math.nan, None, None
    if comparable:
        (mean, var), (other_mean, other_var) = a.stats, b.stats
        drift = distance(a.stats, b.stats, eps)
        if math.isnan(drift):  # which would not count in a largest one
            pairs = zip(a.stats, b.stats, strict=True)
            drift = 0.0 if all(np.array_equal(*pair, equal_nan=True) for pair in pairs) else math.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            std, other_std = (np.sqrt(np.maximum(values, 0) + eps) for values in (var, other_var))
            mean_shift, std_ratio = (other_mean - mean) / std, other_std / std
    told = a.features == b.features and FROM_STATISTICS not in (a.kind, b.kind)
    scale = _largest(a.scale, b.scale, 1.0, a.features) if told else None
    shift = _largest(a.shift, b.shift, 0.0, a.features) if told else None
    changes = tuple(_changes(a, b, scale, shift))
    return LayerDiff(a, b, drift, mean_shift, std_ratio, scale, shift, changes)


def _largest(one: np.ndarray | None, other: np.ndarray | None, usual: float, features: int) -> float:
    """The largest difference; a layer without the parameter computes with 1 or 0."""
    left, right = (np.full(features, usual) if values is None else values for values in (one, other))
    return float(np.max(np.where(_equal(left, right), 0.0, np.abs(left - right)), initial=0.0))


def _changes(a: BatchNorm, b: BatchNorm, scale: float | None, shift: float | None) -> Iterator[str]:
    if a.features != b.features:
        yield f"{a.features} channels against {b.features}"
        return
    if a.tracked != b.tracked:
        yield f"keeps statistics only in the {'first' if a.tracked else 'second'}"
    elif a.tracked:
        for what, one, other in zip(("mean", "variance"), a.stats, b.stats, strict=True):
            if (count := int((~_equal(one, other)).sum())) > 0:
                yield f"{what} in {count} of {a.features} channels"
    for what, gap in (("scale", scale), ("shift", shift)):
        if gap is not None and gap != 0:
            yield f"{what} by up to {gap:.3g}"
    if not math.isnan(a.eps) and not math.isnan(b.eps) and np.float32(a.eps) != np.float32(b.eps):
        yield f"eps {a.eps:g} against {b.eps:g}"
    if None not in (a.momentum, b.momentum) and _alike(a, b) and np.float32(a.momentum) != np.float32(b.momentum):
        yield f"momentum {a.momentum:g} against {b.momentum:g}"


def _equal(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Channel by channel: equal as float32, the precision of nearly every file; NaN equals itself."""
    with np.errstate(over="ignore"):
        left, right = np.float32(one), np.float32(other)
    return np.asarray((left == right) | (np.isnan(left) & np.isnan(right)))


def _alike(a: BatchNorm, b: BatchNorm) -> bool:
    """Whether two records come from one framework, as far as their kinds tell: each has its own names for BN."""
    families = ["BatchNormalization" in layer.kind for layer in (a, b)]
    return families[0] == families[1]


def _notes(layers: list[LayerDiff]) -> Iterator[str]:
    if any(math.isnan(one.eps) for layer in layers for one in (layer.a, layer.b)):
        yield "a state dict holds neither eps nor momentum: they are not compared"
    for which, initial, other in (
        ("first", [one for one in layers if _initial(one.a) and not _initial(one.b)], "second"),
        ("second", [one for one in layers if _initial(one.b) and not _initial(one.a)], "first"),
    ):
        if initial:
            names = ", ".join(one.name for one in initial[:3]) + (", ..." if len(initial) > 3 else "")
            yield (
                f"in {len(initial)} of {len(layers)} layers the {which} has mean 0 and variance 1, as if never "
                f"trained, and the {other} has not ({names}): were its statistics lost? Recalibrate it, or apply those "
                f"of the {other}"
            )


def _initial(layer: BatchNorm) -> bool:
    return layer.tracked and bool((layer.stats[0] == 0).all() and (layer.stats[1] == 1).all())
