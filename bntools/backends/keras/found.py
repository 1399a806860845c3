"""BN layers of a Keras model: their records, and writing statistics back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.calls import called_for_inference
from bntools.backends.keras.naming import norms
from bntools.errors import BntoolsError
from bntools.layer import SMALL_SHARE, BatchNorm

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


@dataclass(frozen=True)
class Written:
    """What bntools stored in a layer: the number of updates, and the model's step counter at that time."""

    updates: int
    steps: int


@dataclass(frozen=True)
class Renorm:
    """The variables of batch renormalization that went with some mean and variance."""

    mean: np.ndarray
    var: np.ndarray
    others: dict[str, np.ndarray]


_written: WeakKeyDictionary[Any, Written] = WeakKeyDictionary()
_renorm: WeakKeyDictionary[Any, Renorm] = WeakKeyDictionary()


def layers(model: Any) -> list[BatchNorm]:
    """The records of all BN layers, in definition order."""
    told = called_for_inference(model)
    steps = training_steps(model)
    return [_record(name, layer, steps, id(layer) in told) for name, layer in norms(model).items()]


def write(model: Any, statistics: Mapping[str, tuple[Any, Any, int | None]]) -> None:
    """Store (mean, var, updates) per layer name, in place; ``updates=None`` leaves the counter.

    The further variables of a layer with ``renorm=True`` follow, and get back their own values with the statistics
    that they had. Raises BntoolsError, before anything is written, where a value does not fit the layer's dtype.
    """
    found, steps = norms(model), training_steps(model)
    new = [(name, found[name], *values) for name, values in statistics.items()]
    for name, layer, mean, var, _ in new:
        _check_fits(name, layer.moving_mean, mean, "mean")
        _check_fits(name, layer.moving_variance, var, "variance")
    for _, layer, mean, var, updates in new:
        _store(layer, np.asarray(mean), np.asarray(var))
        if updates is not None:
            _written[layer] = Written(updates, steps or 0)


def training_steps(model: Any) -> int | None:
    """How many steps the model's optimizer has made; None without one that counts."""
    iterations = getattr(getattr(model, "optimizer", None), "iterations", None)
    return None if iterations is None else int(ops.convert_to_numpy(iterations))


def updates_of(layer: Any, steps: int | None) -> int | None:
    """How many updates the statistics of a layer have had, as far as anything counts them."""
    written = _written.get(layer)
    return steps if written is None else written.updates + max(0, (steps or 0) - written.steps)


def array(variable: Any) -> np.ndarray | None:
    """A copy of a variable in float64; None where there is none."""
    return None if variable is None else np.array(ops.convert_to_numpy(variable), dtype=np.float64)


def _record(name: str, layer: Any, steps: int | None, told: bool) -> BatchNorm:
    mean, var = array(layer.moving_mean), array(layer.moving_variance)
    frozen_stats = not layer.trainable or _keeps(layer, "stats")
    updates = updates_of(layer, None if frozen_stats else steps)
    momentum = layer.momentum
    return BatchNorm(
        name=name,
        kind=type(layer).__name__,
        features=0 if mean is None else len(mean),
        axis=layer.axis,
        eps=float(layer.epsilon),
        momentum=momentum,
        mean=mean,
        var=var,
        scale=array(layer.gamma),
        shift=array(layer.beta),
        updates=updates,
        stats_frozen=frozen_stats,
        affine_frozen=not any(v is not None and layer.trainable and v.trainable for v in (layer.gamma, layer.beta)),
        initial_share=momentum**updates if updates is not None and (updates or momentum < 1) else None,
        initial=(_initial(layer.moving_mean_initializer, 0.0), _initial(layer.moving_variance_initializer, 1.0)),
        forgets_after=math.ceil(math.log(SMALL_SHARE) / math.log(momentum)) if 0 < momentum < 1 else 0,
        dtype="none" if mean is None else keras.backend.standardize_dtype(layer.moving_mean.dtype),
        in_training=_in_training(layer, frozen_stats),
        remarks=tuple(_remarks(layer, told and not frozen_stats)),
    )


def _in_training(layer: Any, frozen: bool) -> str:
    if layer.renorm and not frozen:
        return "normalizes with corrected batch statistics (renorm) and moves the stored ones"
    return ""


def _remarks(layer: Any, told: bool) -> Iterator[str]:
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


def _keeps(layer: Any, what: str) -> bool:
    """Whether a layer is one of bntools's own that keeps its ``stats`` or ``affine`` in training."""
    return getattr(layer, "frozen", None) == what


def _initial(initializer: Any, usual: float) -> float:
    """The value that an initializer fills a variable with; the usual one where it is no constant."""
    value = initializer.get_config().get("value", usual)
    kind = type(initializer).__name__
    if kind in ("Zeros", "Ones"):
        return 0.0 if kind == "Zeros" else 1.0
    return float(value) if isinstance(value, (int, float)) else usual


def _check_fits(name: str, stored: Any, values: Any, what: str) -> None:
    new = np.asarray(values)
    with np.errstate(over="ignore"):
        kept = ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(new), stored.dtype)).astype(np.float64)
    if (lost := np.isfinite(new) & ~np.isfinite(kept)).any():
        dtype = keras.backend.standardize_dtype(stored.dtype)
        raise BntoolsError(
            f"layer {name!r}: a {what} of {float(new[lost][0]):g} does not fit the {dtype} in which the layer stores "
            f"its statistics; keep them in float32 (a layer dtype of mixed_float16 does) and try again"
        )


def _store(layer: Any, mean: np.ndarray, var: np.ndarray) -> None:
    if layer.renorm:
        _store_renorm(layer, mean, var)
    layer.moving_mean.assign(mean.astype(np.float64))
    layer.moving_variance.assign(var.astype(np.float64))


def _store_renorm(layer: Any, mean: np.ndarray, var: np.ndarray) -> None:
    """Bring the further variables of batch renormalization in line (Ioffe 2017, algorithm 1).

    Keras takes its standard deviations with epsilon in them.
    """
    now = Renorm(*(array(getattr(layer, name)) for name in ("moving_mean", "moving_variance")), _others(layer))
    if any(not np.allclose(now.others[name], values) for name, values in _derived(layer, now.mean, now.var).items()):
        _renorm[layer] = now  # as training left them, which nothing else can tell
    known = _renorm.get(layer)
    if known is not None and np.array_equal(known.mean, mean) and np.array_equal(known.var, var):
        others = known.others
    else:
        others = _derived(layer, mean, var)
    for name, values in others.items():
        getattr(layer, name).assign(values)


def _others(layer: Any) -> dict[str, np.ndarray]:
    return {name: np.array(ops.convert_to_numpy(getattr(layer, name)), dtype=np.float64) for name in RENORM}


def _derived(layer: Any, mean: np.ndarray, var: np.ndarray) -> dict[str, np.ndarray]:
    std = np.sqrt(np.maximum(var, 0) + layer.epsilon)
    return {"moving_stddev": std, "renorm_mean": mean, "renorm_stddev": std}
