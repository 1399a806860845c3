"""One measurement on a model: which layers, how replicas run, and what is written and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np

from bntools.batches import Source
from bntools.course import largest, standard_error
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Selection, select
from bntools.measured import Measured
from bntools.moments import Moments
from bntools.processes import Group
from bntools.replicas import virtual_batch
from bntools.resuming import Checkpoint, Standing
from bntools.walkers import Order

PILOT = 64  # samples from which a first standard error is taken
SPARE = 0.6  # of the memory: activations come and go, and an allocator's gaps took up to half as much more (glibc 2.36)

Progress = Callable[[str, int, int | None], None]


@dataclass
class Job:
    """The model, the layers to measure as they were, and how to write and undo.

    ``counters`` puts back, after the statistics, counts of updates that the model itself does not hold. ``group`` are
    the processes that measure together; progress and the number of ``samples`` are those of this one. ``checkpoint``
    holds how far an earlier run came, from where this one goes on, and keeps how far this one comes.
    """

    backend: ModuleType
    model: Any
    forward: Callable[[Any, Any], Any] | None
    before: dict[str, BatchNorm]
    prior: float
    progress: Progress
    memory: float
    samples: int | None
    counters: Callable[[], None] = lambda: None
    group: Group = field(default_factory=Group)
    checkpoint: Checkpoint | None = None

    def report(self, what: str, samples: int) -> None:
        """Tell how far it is."""
        self.progress(what, samples, self.samples)

    def measuring(self, names: Iterable[str], **options: Any) -> Any:
        """The back end's ``measuring`` on this model."""
        return self.backend.measuring(self.model, list(names), forward=self.forward, **options)

    def store(self, measured: Mapping[str, Moments], samples: int, updates: Mapping[str, int] | None = None) -> None:
        """Store what was measured of layers, blended with the prior; ``updates`` to store as well, or None.

        Without updates, on the way from layer to layer, what lies on a device goes into the model as it is, unread.
        """
        new = {}
        for name, moments in measured.items():
            moments = moments if updates is None else moments.numpy()
            blend = moments.blend(self._stored(name, moments.at_hand), samples, self.prior) if self.prior else moments
            if blend.at_hand and not (np.isfinite(blend.mean).all() and np.isfinite(blend.var).all()):
                raise BntoolsError(
                    f"layer {name!r}: weighing {samples} measured samples against prior={self.prior:g} gives numbers "
                    f"that are not finite: choose a smaller prior"
                )
            new[name] = (blend.mean, blend.var, None if updates is None else updates[name])
        self.backend.write(self.model, new)

    def _stored(self, name: str, at_hand: bool) -> Moments:
        return Moments.from_variance(1, *self.before[name].stats) if at_hand else self._on_device[name]

    @cached_property
    def _on_device(self) -> Mapping[str, Moments]:
        """The statistics as they are before the first of them is written."""
        found: Mapping[str, Moments] = self.backend.stored(self.model, self.before)
        return found

    def stds(self, measured: Measured) -> dict[str, np.ndarray]:
        """The standard deviations that were measured of each layer's channels, eps included."""
        found = {name: moments.numpy().var + self.before[name].eps for name, moments in measured.moments.items()}
        return {name: np.sqrt(var) for name, var in found.items()}

    def restore(self) -> None:
        """Write the statistics as they were."""
        self.backend.write(self.model, {name: (*layer.stats, layer.updates) for name, layer in self.before.items()})
        self.counters()

    def put_back(self) -> None:
        """Write the statistics as they were; the counters of updates were left alone."""
        self.backend.write(self.model, {name: (*layer.stats, None) for name, layer in self.before.items()})

    def undo(self) -> None:
        """Give the user's model the statistics that it had."""
        self.restore()
        self.backend.commit(self.model)


def exact(
    job: Job, source: Source, tolerance: float | None = None, *, per_sample: bool = False
) -> tuple[Measured, int, float | None]:
    """Virtual batches until the data, or what the tolerance needs of it, is used up.

    Gives what was measured, in how many virtual batches, and the standard error if there is a tolerance. With one,
    a first virtual batch tells how many samples are needed; while memory allows, they run together with the
    first ones as one larger virtual batch. With ``per_sample`` the courses over the samples are measured anyway.
    """
    kept = job.checkpoint
    at = (kept and kept.standing) or Standing(wanted=math.inf if tolerance is None else PILOT, memory=job.memory)
    order, error = Order(list(job.before), at.order), None
    done = at.measured.samples  # of this process
    if tolerance is not None and at.passes:
        error = _standard_error(at.measured, job.stds(at.measured))

    def report(what: str, samples: int) -> None:
        job.report(what, done + samples)

    def release(name: str, moments: Moments, samples: int) -> None:
        # What earlier virtual batches have measured counts as well: it is nearer to what eval mode will use.
        moments = moments.merge(at.measured.moments[name]) if name in at.measured.moments else moments
        if moments.count > 1:
            job.store({name: moments}, at.measured.samples + samples)

    per_sample = per_sample or tolerance is not None
    with job.measuring(job.before, per_sample=per_sample, memory=job.memory, waiting=True) as start:
        memory = (job.memory - start.held) * SPARE
        while True:
            part = virtual_batch(
                start, source, order, release, job.group, memory=memory, wanted=at.wanted, progress=report
            )
            if part is None:
                return at.measured, at.passes, error
            both = _pooled(at.measured, part)
            if tolerance is not None:
                error = _standard_error(both, job.stds(both))
                if error > tolerance and part.samples >= at.wanted:
                    source.give_back(part.batches)
                    # Whole samples: what is left to share out must not get lost in rounding.
                    at.wanted = float(math.ceil(part.samples * min(16.0, max(2.0, 1.1 * (error / tolerance) ** 2))))
                    continue
            at.measured, at.passes = both, at.passes + 1
            done += sum(batch.samples for batch in part.batches)
            if tolerance is not None and error is not None and error <= tolerance:
                return at.measured, at.passes, error
            if kept is not None and kept.due() and (at.passes > 1 or source.more()):  # not where one batch is all
                kept.save(at, part.batches[-1])


def _pooled(total: Measured, part: Measured) -> Measured:
    pooled = Measured(batches=[*total.batches, *part.batches] if not total.samples else [])
    pooled.include(total)
    pooled.include(part)
    return pooled


def _standard_error(measured: Measured, stds: Mapping[str, np.ndarray]) -> float:
    """The largest standard error of a channel's mean, in the layers' standard deviations."""
    return largest([standard_error(course.total, stds[name]) for name, course in measured.courses.items()])


def targets(
    layers: list[BatchNorm], wanted: Selection, absence: Callable[[], str] | None, *, frozen: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The names to measure, and the reason for each of the others; frozen layers only if asked for, or named."""
    selected = {layer.name for layer in select(layers, wanted, absence)}
    reasons = {layer.name: _reason(layer, layer.name in selected, frozen or wanted is not None) for layer in layers}
    chosen = [name for name, reason in reasons.items() if reason is None]
    untouched = {name: reason for name, reason in reasons.items() if reason is not None}
    if not chosen:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(untouched.items())[:5])
        what = "measured" if frozen else "recalibrated"
        raise BntoolsError(f"none of the {len(layers)} BN layers can be {what} ({listed})")
    return chosen, untouched


def check_positive(numbers: Mapping[str, Any]) -> None:
    """Raise BntoolsError for an argument that is given and is no positive number."""
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, Real) and float(value) > 0):
            raise BntoolsError(f"found {name}={value!r}, expected a positive number")


def _reason(layer: BatchNorm, selected: bool, frozen: bool) -> str | None:
    if not selected:
        return "not selected by layers="
    if layer.obstacle:
        return layer.obstacle
    if not layer.initialized:
        raise BntoolsError(f"layer {layer.name!r} is not initialized yet: run one batch through the model first")
    if not layer.tracked:
        return "keeps no statistics (track_running_stats=False)"
    if not layer.pooled:
        return "instance normalization: its statistics are averages over instances, not moments of the data"
    if layer.stats_frozen and not frozen:
        return "frozen: name it in layers= to recalibrate it"
    return None
