"""Small pieces of the data, each measured for itself in eval mode: how the data differs from part to part.

A piece is a few samples. What pieces of one part differ by among themselves is the noise against which parts are
compared, whatever the data is like: no distribution is assumed, and values within a sample need not be independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bntools import backends
from bntools.batches import Batch, count
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.moments import Moments, merged
from bntools.resizing import mapped
from bntools.walkers import Walker

SIZE = 8  # samples in a piece: enough of them for a noise, and large enough to be quick

Forward = Callable[[Any, Any], Any]
Calls = list[Moments]


@dataclass(frozen=True)
class Piece:
    """What one piece showed: its number of samples, and per layer, in the order reached, the moments of each call."""

    samples: int
    layers: dict[str, Calls]


@dataclass(frozen=True)
class Deviation:
    """How far a part is from all data at one layer, and what a random part of its size would show.

    Both are root mean squares over the channels, of the shift of the mean and of the standard deviation's relative
    change together, in standard deviations of all data.
    """

    drift: float
    noise: float


def cut(contents: Iterable[Any], most: int) -> list[Any]:
    """Pieces of at most SIZE samples of the batches, spread evenly over them, with ``most`` samples at the most."""
    batches = list(contents)
    total = sum(map(count, batches))
    size = max(1, min(SIZE, total // SIZE))
    pieces = [(batch, start) for batch in batches for start in range(0, count(batch), size)]
    if len(pieces) * size > most:
        chosen = np.linspace(0, len(pieces) - 1, max(2, most // size)).round().astype(int)
        pieces = [pieces[i] for i in np.unique(chosen)]
    return [sliced(batch, start, start + size) for batch, start in pieces]


def sliced(content: Any, start: int, stop: int) -> Any:
    """The samples from ``start`` to ``stop`` of a batch, in whatever structure it comes."""
    samples = count(content)

    def one(value: Any) -> Any:
        return value[start:stop] if getattr(value, "shape", ()) and value.shape[0] == samples else value

    return mapped(one, content)


def measured(model: Any, parts: Mapping[str, Sequence[Any]], forward: Forward | None) -> dict[str, list[Piece]]:
    """Run the pieces of each part through the model in eval mode, with the statistics that it has.

    ``model`` is what the back end's ``edit`` gives. Layers without finite statistics are not measured.
    Raises BntoolsError where the model does not take pieces of that size, or gives NaN or Inf.
    """
    backend = backends.of(model)
    names = [
        layer.name
        for layer in backend.layers(model)
        if layer.initialized and layer.tracked and not layer.obstacle and all(np.isfinite(s).all() for s in layer.stats)
    ]
    if not names:
        return {}
    with backend.measuring(model, names, forward=forward) as start:
        return {name: [_run(start(piece), piece) for piece in pieces] for name, pieces in parts.items()}


def deviations(parts: Mapping[str, Sequence[Piece]], eps: Mapping[str, float]) -> dict[str, dict[str, Deviation]]:
    """For each part, and each layer that every piece reached, how far the part is from all parts together."""
    pieces = [piece for part in parts.values() for piece in part]
    layers = [name for name in pieces[0].layers if all(name in piece.layers for piece in pieces)]
    found: dict[str, dict[str, Deviation]] = {name: {} for name in parts}
    for layer in layers:
        pooled = {name: [merged(piece.layers[layer]) for piece in part] for name, part in parts.items()}
        for name, deviation in _of_layer(pooled, eps[layer]).items():
            found[name][layer] = deviation
    return found


def between_calls(pieces: Sequence[Piece], eps: Mapping[str, float]) -> dict[str, tuple[int, float]]:
    """Per layer how often a pass calls it, and how far the call that is farthest is from all calls together."""
    found = {}
    for layer in dict.fromkeys(name for piece in pieces for name in piece.layers):
        calls = [piece.layers.get(layer, []) for piece in pieces]
        most = max(map(len, calls))
        each = [merged(some[i] for some in calls if len(some) > i) for i in range(most)]
        whole = merged(each)
        found[layer] = most, max(_rms(*_shift_and_change(one, whole, eps[layer])) for one in each)
    return found


def _run(replica: Any, content: Any) -> Piece:
    samples = count(content)
    walker = Walker(replica, Batch(0, content, samples))
    layers: dict[str, Calls] = {}
    try:
        walker.advance()
        while walker.arrival is not None:
            moments = walker.met.moments.numpy()
            if not (np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all()):
                raise BntoolsError(f"NaN or Inf at the input of layer {walker.met.layer!r}")
            layers.setdefault(walker.met.layer, []).append(moments)
            walker.advance()
    finally:
        with uninterrupted():
            replica.close()
    return Piece(samples, layers)


def _of_layer(parts: Mapping[str, Sequence[Moments]], eps: float) -> dict[str, Deviation]:
    whole = merged(moments for part in parts.values() for moments in part)
    std = _divisor(whole, eps)
    total = sum(map(len, parts.values()))
    # Of each piece the mean and the second moment about the mean of all, both linear in the samples, so that those
    # of a part are averages of its pieces' and their noise is that of an average.
    rows = {
        name: np.array(
            [[(m.mean - whole.mean) / std, (m.var + (m.mean - whole.mean) ** 2) / (2 * std**2)] for m in part]
        )
        for name, part in parts.items()
    }
    spread = sum(((values - values.mean(axis=0)) ** 2).sum(axis=0) for values in rows.values())
    free = total - len(parts)
    found = {}
    for name, part in parts.items():
        size = len(part)
        variance = spread / free * (1 / size - 1 / total) if free else np.full_like(std, np.inf)
        noise = float(np.sqrt(np.sum(variance) / len(std)))
        found[name] = Deviation(_rms(*_shift_and_change(merged(part), whole, eps)), noise)
    return found


def _shift_and_change(part: Moments, whole: Moments, eps: float) -> tuple[np.ndarray, np.ndarray]:
    std = _divisor(whole, eps)
    return (part.mean - whole.mean) / std, (np.sqrt(part.var + eps) - np.sqrt(whole.var + eps)) / std


def _divisor(whole: Moments, eps: float) -> np.ndarray:
    """The standard deviations of all data; 1 in a dead channel with eps=0, where no part differs."""
    std = np.sqrt(whole.var + eps)
    return np.where(std == 0, 1.0, std)


def _rms(shift: np.ndarray, change: np.ndarray) -> float:
    return float(np.sqrt(np.mean(shift**2 + change**2)))
