"""BatchNorm: one layer's record, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from bntools.errors import BntoolsError

SMALL_SHARE = 0.01  # below one percent, what is left of the initial value no longer shows
HUGE_VARIANCE = 1e8
TINY_SCALE = 1e-3
HALF = ("float16", "bfloat16")

Stats = tuple[np.ndarray, np.ndarray]
Selection = str | Iterable[str] | Callable[["BatchNorm"], bool] | None


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """One BN layer of a model, as a plain record.

    ``mean``, ``var``, ``scale`` and ``shift`` are float64 numpy arrays of shape (features,), copied
    out of the model; None where the layer has no such thing (``affine=False``, statistics that are
    not tracked). ``var`` is the plain second moment, divided by the count. ``momentum`` is the
    framework's own number. ``updates`` counts the updates of the statistics, None if nobody counted.
    ``initial`` is what mean and variance start with in training, ``initial_share`` the share of it that is still
    inside, as far as momentum and updates tell (``doubt`` says what else could be so), and ``forgets_after``
    the number of updates that leave less than a hundredth. ``dtype`` is how the model stores the statistics.
    ``stats_frozen`` holds where training cannot move the statistics, also after ``model.train()``;
    ``in_training`` says in words what the layer does while the model trains, where that is out of the ordinary.
    ``pooled`` is False for
    instance normalization, whose statistics are averages over instances. ``remarks`` are problems
    that only the back end can see; ``obstacle`` says why the statistics can be neither measured nor stored nor
    folded where they lie, and is empty where they can.
    """

    name: str
    kind: str
    features: int
    axis: int
    eps: float
    momentum: float | None
    mean: np.ndarray | None
    var: np.ndarray | None
    scale: np.ndarray | None
    shift: np.ndarray | None
    updates: int | None
    stats_frozen: bool
    affine_frozen: bool
    initial: tuple[float, float] = (0.0, 1.0)
    initial_share: float | None = None
    doubt: str = ""
    forgets_after: int = 0
    in_training: str = ""
    dtype: str = "float32"
    pooled: bool = True
    remarks: tuple[str, ...] = ()
    obstacle: str = ""

    @property
    def problems(self) -> list[str]:
        """What is wrong with the layer, one sentence each; empty if nothing is."""
        return [*self.remarks, *_momentum_problems(self), *_stats_problems(self), *_affine_problems(self)]

    @property
    def training(self) -> str:
        """What the layer does while the model trains, in words; in inference it uses its stored statistics."""
        if self.in_training or not self.tracked:
            return self.in_training or "normalizes with each batch's own statistics"
        stored = "normalizes with its stored statistics, which stay"
        return stored if self.stats_frozen else "normalizes with each batch's statistics and moves the stored ones"

    @property
    def initialized(self) -> bool:
        """Whether the layer knows its number of features: a lazy one does after its first batch."""
        return self.features > 0

    @property
    def tracked(self) -> bool:
        """Whether the layer keeps statistics at all."""
        return self.mean is not None and self.var is not None

    @property
    def remainder(self) -> float:
        """The share of the initial values still inside the statistics: 1 before any update, 0 if nothing tells."""
        if not self.tracked or not self.initialized:
            return 0.0
        if _still_initial(*self.stats, self):
            return 1.0
        return (self.initial_share or 0.0) if _can_be_inside(self) else 0.0

    @property
    def stats(self) -> Stats:
        """Mean and variance together. Raises BntoolsError where the layer keeps none."""
        if self.mean is None or self.var is None:
            raise BntoolsError(f"layer {self.name!r} keeps no statistics")
        return self.mean, self.var

    @property
    def std(self) -> np.ndarray:
        """What the layer divides by, ``sqrt(var + eps)``, shape (features,)."""
        return _std(self.stats[1], self.eps)


def distance(stored: Stats, seen: Stats, eps: float) -> float:
    """How far one set of statistics is from the stored ones, in the layer's own standard deviations.

    The largest over the channels of ``abs(seen_mean - mean) / std`` and ``abs(seen_std / std - 1)``
    with ``std = sqrt(var + eps)``. Between what eval mode sees and the stored statistics it is the
    residual, between two sets of statistics the drift. All arrays have shape (features,).
    """
    (mean, var), (seen_mean, seen_var) = stored, seen
    std, seen_std = _std(var, eps), _std(seen_var, eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.maximum(np.abs(seen_mean - mean) / std, np.abs(seen_std / std - 1))
    same = (seen_mean == mean) & (seen_std == std)  # also where both are 0, in a dead channel with eps=0
    return float(np.max(np.where(same, 0.0, gap), initial=0.0))


def _std(var: np.ndarray, eps: float) -> np.ndarray:
    return np.sqrt(np.maximum(var, 0) + eps)


def select(layers: list[BatchNorm], wanted: Selection, absence: Callable[[], str] | None = None) -> list[BatchNorm]:
    """The layers that ``layers=`` means: None for all, names, globs or a predicate on BatchNorm.

    ``absence`` says in words what a model without BN has instead.
    Raises BntoolsError where that is none: for a model without BN, a predicate that holds nowhere,
    or a name or glob that fits no layer (the closest ones are named).
    """
    if not layers:
        raise BntoolsError(f"the model has no BN layers: {absence() if absence else 'were they folded already?'}")
    if wanted is None:
        return list(layers)
    if callable(wanted):
        if chosen := [layer for layer in layers if wanted(layer)]:
            return chosen
        raise BntoolsError(f"the predicate given as layers= holds for none of the model's {len(layers)} BN layers")
    patterns = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise BntoolsError(f"found layers={wanted!r}, expected names, globs or a predicate on BatchNorm")
    for pattern in patterns:
        if not any(_fits(layer.name, pattern) for layer in layers):
            raise BntoolsError(_no_such_layer(pattern, layers))
    return [layer for layer in layers if any(_fits(layer.name, pattern) for pattern in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _no_such_layer(pattern: str, layers: list[BatchNorm]) -> str:
    names = [layer.name for layer in layers]
    close = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"layers={pattern!r} fits none of the model's {len(names)} BN layers: did you mean {', '.join(close)}?"


def _momentum_problems(layer: BatchNorm) -> Iterator[str]:
    if not layer.tracked or not layer.initialized:
        return
    mean, var = layer.stats
    if _still_initial(mean, var, layer):
        yield f"never updated: the statistics still have their initial values {mean[0]:g} and {var[0]:g}"
    elif layer.initial_share is not None and layer.initial_share > SMALL_SHARE and _can_be_inside(layer):
        values = "" if layer.initial == (0.0, 1.0) else "s {:g} and {:g}".format(*layer.initial)
        yield (
            f"{layer.initial_share:.0%} of the initial value{values} {'are' if values else 'is'} still inside after "
            f"{layer.updates} updates at momentum {layer.momentum:g}{layer.doubt and f', {layer.doubt}'}"
        )


def _can_be_inside(layer: BatchNorm) -> bool:
    """A share s of an initial variance v cannot be inside a variance below s * v: something else has written it."""
    return (layer.initial_share or 0.0) <= layer.stats[1].min() / (layer.initial[1] or 1)


def _still_initial(mean: np.ndarray, var: np.ndarray, layer: BatchNorm) -> bool:
    """A counter of 0 is not enough: old checkpoints lack it, and their statistics are trained."""
    if layer.updates is None:
        initial = [np.float32(value) for value in layer.initial]
        return bool(np.all(np.float32(mean) == initial[0]) and np.all(np.float32(var) == initial[1]))
    return layer.updates == 0 and bool(np.ptp(mean) == 0 and np.ptp(var) == 0)


def _stats_problems(layer: BatchNorm) -> Iterator[str]:
    if not layer.initialized or layer.obstacle:
        return
    if not layer.tracked:
        yield "statistics are not tracked: eval mode normalizes with each batch's own"
        return
    mean, var = layer.stats
    tests: list[tuple[str, np.ndarray]] = [
        ("NaN or Inf in the statistics", ~np.isfinite(mean) | ~np.isfinite(var)),
        ("negative variance", var < 0),
        ("zero variance (a dead channel?)", var == 0),
        (f"variance below eps={layer.eps:g}", (var > 0) & (var < layer.eps)),
        (f"huge variance, above {HUGE_VARIANCE:g}", np.isfinite(var) & (var > HUGE_VARIANCE)),
    ]
    yield from _counted(tests)
    if layer.dtype in HALF:
        yield f"half-precision statistics ({layer.dtype}): keep them in float32"


def _affine_problems(layer: BatchNorm) -> Iterator[str]:
    tests: list[tuple[str, np.ndarray]] = []
    if layer.scale is not None:
        tests.append(("NaN or Inf in the scale", ~np.isfinite(layer.scale)))
        tests.append((f"scale near zero, below {TINY_SCALE:g}", np.abs(layer.scale) < TINY_SCALE))
    if layer.shift is not None:
        tests.append(("NaN or Inf in the shift", ~np.isfinite(layer.shift)))
    yield from _counted(tests)


def _counted(tests: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    for what, where in tests:
        if where.any():
            yield f"{what} in {where.sum()} of {where.size} channels (first: {int(where.argmax())})"
