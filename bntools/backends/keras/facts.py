"""What is known of one BN layer of Keras, from a model or from its file, as a record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bntools.layer import SMALL_SHARE, BatchNorm

# The optimizer counts the steps of the model; what it did not see, another program may have done to one layer.
DOUBT = "unless it was frozen for some of them or recalibrated since"


@dataclass(frozen=True)
class Facts:
    """A BN layer in Keras's terms.

    The arrays are float64 of shape (channels,), None where the layer has no such variable. ``trains`` says of scale
    and shift whether an optimizer gets to see them. ``keeps_stats`` holds for a layer of bntools's own that keeps its
    statistics. ``steps`` is the number of updates that a trainable layer has had, ``frozen_steps`` one that is not;
    None where nothing counts them. ``counted`` holds where that was noted for the layer itself, and does not come from
    the optimizer, ``told`` where the model calls the layer with ``training=False``.
    """

    name: str
    kind: str
    axis: int
    epsilon: float
    momentum: float
    mean: np.ndarray | None
    var: np.ndarray | None
    scale: np.ndarray | None
    shift: np.ndarray | None
    trainable: bool
    trains: bool
    keeps_stats: bool
    renorm: bool
    synchronized: bool
    built: bool
    steps: int | None
    frozen_steps: int | None
    counted: bool
    told: bool
    initial: tuple[float, float]
    dtype: str


@dataclass(frozen=True)
class Written:
    """What bntools stored in a layer: the number of updates, and the model's step counter at that time."""

    updates: int
    steps: int


def updates_of(written: Written | None, steps: int | None) -> int | None:
    """How many updates the statistics of a layer have had, as far as anything counts them."""
    return steps if written is None else written.updates + max(0, (steps or 0) - written.steps)


def record(layer: Facts) -> BatchNorm:
    """The layer as every back end tells of its own."""
    frozen = not layer.trainable or layer.keeps_stats
    updates = layer.frozen_steps if frozen else layer.steps
    momentum = layer.momentum
    sound = 0 <= momentum <= 1 and (updates or 0) >= 0  # a file may hold any numbers
    return BatchNorm(
        name=layer.name,
        kind=layer.kind,
        features=0 if layer.mean is None else len(layer.mean),
        axis=layer.axis,
        eps=float(layer.epsilon),
        momentum=momentum,
        mean=layer.mean,
        var=layer.var,
        scale=layer.scale,
        shift=layer.shift,
        updates=updates,
        stats_frozen=frozen,
        affine_frozen=not layer.trains,
        initial_share=momentum**updates if updates is not None and sound and (updates or momentum < 1) else None,
        initial=layer.initial,
        doubt="" if layer.counted else DOUBT,
        forgets_after=math.ceil(math.log(SMALL_SHARE) / math.log(momentum)) if 0 < momentum < 1 else 0,
        dtype=layer.dtype,
        in_training=_in_training(layer, frozen),
        remarks=tuple(_remarks(layer, layer.told and not frozen)),
    )


def initial(kind: str, config: Mapping[str, Any], usual: float) -> float:
    """The value that an initializer of this class fills a variable with; the usual one where it is no constant."""
    if kind in ("Zeros", "Ones"):
        return 0.0 if kind == "Zeros" else 1.0
    value = config.get("value", usual)
    return float(value) if isinstance(value, (int, float)) else usual


def _in_training(layer: Facts, frozen: bool) -> str:
    if frozen or not (layer.renorm or layer.synchronized):
        return ""
    what = "corrected batch statistics (renorm)" if layer.renorm else "each batch's statistics"
    over = " over all devices of a strategy (synchronized)" if layer.synchronized else ""
    return f"normalizes with {what}{over} and moves the stored ones"


def _remarks(layer: Facts, told: bool) -> Iterator[str]:
    if not layer.built:
        yield "not built yet: call the model on a batch first"
        return
    if told:
        yield (
            "the model calls it with training=False, which fit overrides in Keras 3: its statistics move all the same "
            "(bntools.freeze keeps them)"
        )
    if layer.trainable and layer.momentum == 1:
        yield "momentum 1: training never moves the statistics (Keras's momentum is the weight of the old value)"
    elif layer.trainable and layer.momentum == 0:
        yield "momentum 0: the statistics are those of the last batch alone"
