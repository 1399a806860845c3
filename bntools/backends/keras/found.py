"""BN layers of a Keras model: their records, and writing statistics back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from keras import ops

from bntools.backends.keras.calls import called_for_inference
from bntools.backends.keras.facts import Facts, Written, initial, record, updates_of
from bntools.backends.keras.naming import norms
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


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
    return [_record(name, layer, steps, id(layer) in told, model.trainable) for name, layer in norms(model).items()]


def write(model: Any, statistics: Mapping[str, tuple[Any, Any, int | None]]) -> None:
    """Store (mean, var, updates) per layer name, in place; ``updates=None`` leaves the counter.

    The further variables of a layer with ``renorm=True`` follow, and get back their own values with the statistics
    that they had. Raises BntoolsError, before anything is written, where a value does not fit the layer's dtype.
    """
    found, steps = norms(model), training_steps(model)
    new = [(name, found[name], *values) for name, values in statistics.items()]
    for name, layer, mean, var, _ in new:
        check_fits(name, layer.moving_mean, mean, "mean")
        check_fits(name, layer.moving_variance, var, "variance")
    for _, layer, mean, var, updates in new:
        _store(layer, np.asarray(mean), np.asarray(var))
        if updates is not None:
            _written[layer] = Written(updates, steps or 0)


def remembered(model: Any) -> dict[str, int]:
    """The updates of the layers in which bntools stored statistics, by layer name, for the model's file."""
    kept = {name for name, layer in norms(model).items() if layer in _written}
    return {layer.name: layer.updates or 0 for layer in layers(model) if layer.name in kept} if kept else {}


def remember(model: Any, updates: Mapping[str, int]) -> None:
    """Take over the updates that a model's file tells of, as of now."""
    found, steps = norms(model), training_steps(model) or 0
    for name in updates.keys() & found.keys():
        _written[found[name]] = Written(updates[name], steps)


def counters(model: Any) -> Callable[[], None]:
    """What puts back the counts of updates as they are now: ``write`` cannot say that nobody counted."""
    before = [(layer, _written.get(layer)) for layer in norms(model).values()]

    def put_back() -> None:
        for layer, known in before:
            if known is None:
                _written.pop(layer, None)
            else:
                _written[layer] = known

    return put_back


def training_steps(model: Any) -> int | None:
    """How many steps the model's optimizer has made; None without one that counts."""
    iterations = getattr(getattr(model, "optimizer", None), "iterations", None)
    return None if iterations is None else int(ops.convert_to_numpy(iterations))


def array(variable: Any) -> np.ndarray | None:
    """A copy of a variable in float64; None where there is none."""
    return None if variable is None else _values(variable)


def _values(variable: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(variable), dtype=np.float64)


def _record(name: str, layer: Any, steps: int | None, told: bool, trains: bool) -> BatchNorm:
    mean = array(layer.moving_mean)
    affine = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    return record(
        Facts(
            name=name,
            kind=type(layer).__name__,
            axis=layer.axis,
            epsilon=layer.epsilon,
            momentum=layer.momentum,
            mean=mean,
            var=array(layer.moving_variance),
            scale=array(layer.gamma),
            shift=array(layer.beta),
            trainable=layer.trainable,
            trains=trains and any(variable.trainable for variable in affine),  # whatever layer.trainable says
            keeps_stats=_keeps(layer, "stats"),
            renorm=layer.renorm,
            synchronized=layer.synchronized,
            built=layer.built,
            steps=updates_of(_written.get(layer), steps),
            frozen_steps=updates_of(_written.get(layer), None),
            counted=layer in _written,
            told=told,
            initial=(_initial(layer.moving_mean_initializer, 0.0), _initial(layer.moving_variance_initializer, 1.0)),
            dtype="none" if mean is None else keras.backend.standardize_dtype(layer.moving_mean.dtype),
        )
    )


def _keeps(layer: Any, what: str) -> bool:
    """Whether a layer is one of bntools's own that keeps its ``stats`` or ``affine`` in training."""
    return getattr(layer, "frozen", None) == what


def _initial(initializer: Any, usual: float) -> float:
    # None and functions of the user's own say nothing.
    told: dict[str, Any] = getattr(initializer, "get_config", dict)()
    return initial(type(initializer).__name__, told, usual)


def check_fits(name: str, stored: Any, values: Any, what: str) -> None:
    """Raise BntoolsError where values are too large for the dtype in which a layer stores them."""
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
    now = Renorm(_values(layer.moving_mean), _values(layer.moving_variance), _others(layer))
    if any(not np.allclose(now.others[name], values) for name, values in derived(layer, now.mean, now.var).items()):
        _renorm[layer] = now  # as training left them, which nothing else can tell
    known = _renorm.get(layer)
    if known is not None and np.array_equal(known.mean, mean) and np.array_equal(known.var, var):
        others = known.others
    else:
        others = derived(layer, mean, var)
    for name, values in others.items():
        getattr(layer, name).assign(values)


def _others(layer: Any) -> dict[str, np.ndarray]:
    return {name: _values(getattr(layer, name)) for name in RENORM}


def derived(layer: Any, mean: np.ndarray, var: np.ndarray) -> dict[str, np.ndarray]:
    """The further variables of batch renormalization that agree with a mean and variance."""
    std = np.sqrt(np.maximum(var, 0) + layer.epsilon)
    return {"moving_stddev": std, "renorm_mean": mean, "renorm_stddev": std}
