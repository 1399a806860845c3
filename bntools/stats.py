"""Statistics: those of all BN layers of a model, apart from it, and what they fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np

from bntools import backends
from bntools.digests import digest
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm

PACKAGES = {"torch": ("torch",), "keras": ("keras", "tensorflow"), "onnx": ("onnx",)}
MOST = 1 << 62  # of what is counted
UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # what steers a terminal, or is no text


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The statistics of one layer: ``mean`` and ``var``, float64 of shape (features,), the plain second moment.

    ``updates`` counts their updates, None if nobody counted; ``eps`` and ``axis`` are the layer's. ``affine`` is a
    digest of its scale and shift, rounded to float32, and empty where both are those of a layer that never learned.
    """

    name: str
    mean: np.ndarray
    var: np.ndarray
    eps: float
    axis: int
    updates: int | None = None
    affine: str = ""

    @property
    def features(self) -> int:
        """The number of channels."""
        return int(self.mean.size)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of all BN layers of a model, and what they fit: a sequence of its ``layers``, in model order.

    ``framework`` is torch, keras or onnx, ``weights`` a digest of the model's weights outside of BN statistics, behind
    which these were measured. ``samples`` is the number they were measured on, None if nobody said; ``date`` is that
    of taking them, in UTC, ``versions`` those of bntools and the framework.

    Raises BntoolsError, when made, for numbers that are not finite, a negative variance, shapes that disagree, control
    characters in a text, and a number of samples that is none.
    """

    layers: tuple[LayerStatistics, ...]
    framework: str
    weights: str
    samples: int | None = None
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise BntoolsError(
                f"two layers of the same name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
            )
        for layer in self.layers:
            _check(layer)
        _check_description(self)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerStatistics]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistics of the layer of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def fingerprint(self) -> str:
        """A digest of what these statistics fit: layer names, features, eps and axis, and the weights."""
        facts = [[one.name, one.features, float(np.float32(one.eps)), one.axis, one.affine] for one in self.layers]
        return digest(json.dumps([self.framework, self.weights, facts]).encode())

    def __str__(self) -> str:
        measured = "" if self.samples is None else f", measured on {self.samples:,} samples"
        return f"statistics of {len(self)} BN layers of a {self.framework} model{measured}"


def statistics(model: Any, *, samples: int | None = None, note: str = "") -> Statistics:
    """Take the statistics of a model's BN layers, as copies, together with what tells which model they fit.

    ``samples`` is the number they were measured on and ``note`` a sentence, both for people who find the file later.
    Layers that keep no statistics, or whose statistics cannot be stored where they lie, are left out.

    Raises BntoolsError where there are none to take, or a layer's are not finite or negative.

        stats = bntools.statistics(model, samples=result.samples, note="camera of hall 2")
        bntools.save_stats(stats, "hall2.safetensors")
    """
    backend = backends.of(model)
    found = holding(backend, model)
    return Statistics(
        layers=tuple(_taken(layer) for layer in found),
        framework=framework(backend),
        weights=backend.digest(model),
        samples=int(samples) if isinstance(samples, Integral) else samples,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(framework(backend)),
        note=note,
    )


def holding(backend: ModuleType, model: Any) -> list[BatchNorm]:
    """The layers of a model that hold statistics which can be taken and stored. Raises BntoolsError for none."""
    layers = backend.layers(model)
    if lazy := [layer.name for layer in layers if not layer.initialized and not layer.obstacle]:
        raise BntoolsError(f"layer {lazy[0]!r} is not initialized yet: run one batch through the model first")
    found = [layer for layer in layers if layer.tracked and not layer.obstacle]
    if not found:
        absence = backends.absence(model)
        reasons = [f"{layer.name}: {layer.obstacle or 'keeps no statistics'}" for layer in layers[:3]]
        raise BntoolsError(
            f"the model holds no BN statistics: {'; '.join(reasons) or (absence() if absence else 'no BN layers')}"
        )
    return found


def framework(backend: ModuleType) -> str:
    """The name of a back end: torch, keras or onnx."""
    return backend.__name__.rpartition(".")[2]


def affine_digest(layer: BatchNorm) -> str:
    """A digest of scale and shift as float32, which an export keeps; empty where they are 1 and 0, as at the start."""
    scale = np.ones(layer.features) if layer.scale is None else layer.scale
    shift = np.zeros(layer.features) if layer.shift is None else layer.shift
    if (scale == 1).all() and (shift == 0).all():
        return ""
    with np.errstate(over="ignore"):
        return digest(np.concatenate([scale, shift]).astype("<f4").tobytes())


def _taken(layer: BatchNorm) -> LayerStatistics:
    mean, var = layer.stats
    return LayerStatistics(layer.name, mean, var, layer.eps, layer.axis, layer.updates, affine_digest(layer))


def _check(layer: LayerStatistics) -> None:
    if layer.mean.ndim != 1 or layer.mean.shape != layer.var.shape or not layer.mean.size:
        raise BntoolsError(
            f"layer {layer.name!r}: mean of shape {layer.mean.shape} and variance of shape {layer.var.shape}; expected "
            f"one number a channel in each"
        )
    for what, bad in (
        ("a mean that is not finite", ~np.isfinite(layer.mean)),
        ("a variance that is not finite", ~np.isfinite(layer.var)),
        ("a negative variance", layer.var < 0),
    ):
        if bad.any():
            raise BntoolsError(
                f"layer {layer.name!r}: found {what} in {bad.sum()} of {bad.size} channels (first: "
                f"{int(bad.argmax())}); recalibrate the model before its statistics are taken"
            )


def _check_description(stats: Statistics) -> None:
    named = [text for layer in stats.layers for text in (layer.name, layer.affine)]
    versions = [*stats.versions, *stats.versions.values()]
    for text in (stats.framework, stats.weights, stats.date, stats.note, *versions, *named):
        if not isinstance(text, str) or UNPRINTABLE.search(text):
            raise BntoolsError(f"found {text!r} in what describes the statistics, expected text without control codes")
    if stats.samples is not None and not is_count(stats.samples):
        raise BntoolsError(f"found samples={stats.samples!r}, expected a whole number, 0 or more, or None")


def is_count(value: Any) -> bool:
    """Whether a value is a number of things that is written to a file, and read from one."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _versions(framework: str) -> dict[str, str]:
    found = {}
    for package in ("bntools", *PACKAGES[framework]):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
