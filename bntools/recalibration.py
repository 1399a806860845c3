"""The verb recalibrate: measure the statistics of BN layers anew, on other data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from numbers import Real
from typing import Any

import numpy as np

from bntools import agreement, backends, feeding, resuming
from bntools.batches import Batch, Source, is_repeatable
from bntools.course import convergence
from bntools.data import Data
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import BatchNorm, Selection, distance
from bntools.measured import Measured
from bntools.measurement import Job, Progress, check_positive, exact, targets
from bntools.moments import Moments
from bntools.processes import Group
from bntools.recalibrated import SUSPECT, LayerChange, Recalibration, remarks
from bntools.replicas import one_by_one
from bntools.resuming import Standing

METHODS = ("exact", "precise", "ema")
FEW = 4  # samples on which two memory layouts are compared


@backends.one_at_a_time
def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    method: str = "exact",
    prior: float = 0,
    layers: Selection = None,
    forward: Callable[[Any, Any], Any] | None = None,
    memory: int | None = None,
    tolerance: float | None = None,
    max_samples: int | None = None,
    check: bool = True,
    progress: Progress | None = None,
    group: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Recalibration:
    """Measure the statistics of a model's BN layers on ``batches`` and store them, in place.

    A batch is an array of shape (samples, ...), a tuple or list whose first element is one, or a
    dict of keyword inputs; ``forward(model, batch)`` overrides how it goes into the model. Micro-batches may
    be of any size: the exact result does not depend on it, nor on their order. A path, or a dataset of Hugging Face,
    is read as ``bntools.data.open`` does, with which ``mean`` and ``std`` may be given as well.

    ``method="exact"`` gives what one batch of the whole data would give: every layer is measured behind
    layers that already have their new statistics. ``"precise"`` pools mini-batch moments (Wu and
    Johnson 2021, PreciseBN); ``"ema"`` is the framework's own moving average. ``prior=N`` weighs the
    stored statistics as N samples against the measured ones. ``memory`` bounds what the waiting
    micro-batches hold, in bytes (default: half of what is free); past it the data runs as several
    virtual batches, which are pooled. ``tolerance`` stops as soon as the standard error of every channel's mean
    is below it, in standard deviations; ``max_samples`` stops at that many. ``check`` measures the
    residual by one more pass in eval mode. ``progress(what, samples, total)`` is called as it goes;
    the total is None unless ``batches.samples`` tells it.

    Several processes measure together, each on ``batches`` of its own, where the model is in a
    DistributedDataParallel or ``group`` is a torch.distributed.ProcessGroup: every process of it has to call this, one
    without data too, with the same weights and arguments, and all come to the same statistics and the same result.
    How the data is shared out makes no difference, and a share may be as small as it likes; a DistributedSampler
    repeats some samples where the number is uneven, which a note says. ``memory``, by default a part of what is free,
    is that of each process, and ``progress`` tells of its own data; ``max_samples`` is for all together. Where
    the statistics differed before, as they do in training, those of rank 0 count.

    ``checkpoint`` names a file that is written as it goes, every few seconds, between virtual batches or batches of
    ``"precise"``. If it is there, left by a run that was stopped, this one goes on from it, with its ``memory`` if none
    is given, to the same result; the data is read forward to that place. It is removed when all is done.

    Layers that are frozen are left alone unless ``layers`` names them. Variances are divided by the count.
    Raises BntoolsError, leaving the model as it was, for data that is empty, raises or is not finite, a
    model that raises, a layer that saw a single value per channel, and a checkpoint of another run: of other weights,
    statistics, data or arguments.

        result = bntools.recalibrate(model, loader)
        print(result.samples, result.residual)
    """
    processes = backends.group(model, group)
    with processes.together():
        _check_arguments(method, prior, memory, tolerance, max_samples)
        backend = backends.of(model)
        model = backend.edit(model)
        counted = {"prior": prior, "tolerance": tolerance, "max_samples": max_samples}
        run = {"method": method, "forward": forward is not None, "autocast": backends.precision(model), **counted}
        notes = agreement.padded(processes, batches)
        most = agreement.own_share(processes, max_samples)
        given = feeding.given(model, batches, most)
        joined = method == "exact" and forward is None
        batches = backends.fed(model, given, most, whole=forward is not None, joined=joined)
        chosen, untouched = targets(backend.layers(model), layers, backends.absence(model))
        with agreement.one_model(processes, backend, model, {**run, "layers": chosen, "check": check}):
            before = {layer.name: layer for layer in backend.layers(model) if layer.name in chosen}
            if prior:
                _check_prior(before.values())
            kept = resuming.opened(checkpoint, processes, backend, model, list(before.values()), given, run)
            job = Job(
                backend=backend,
                model=model,
                forward=forward,
                before=before,
                prior=prior,
                progress=progress or (lambda *_: None),
                memory=_allowed(memory, kept, backend.free_memory(model) / processes.sharing),
                samples=getattr(batches, "samples", None),
                counters=backends.counters(model),
                group=processes,
                checkpoint=kept,
            )
            agreement.check_possible(job, method)
            source = Source(batches, most)
            if getattr(given, "dealt", False):
                agreement.one_order(processes, given)
            else:
                notes += agreement.same_data(processes, source, counted)
            if kept is not None:
                kept.skip(source)
            result = _recalibrated(job, method, source, batches, tolerance, check)
        result.untouched.update(untouched)
        result.notes.extend([*notes, *_read_again(given, result), *_first_ones(given, result, tolerance)])
        result.notes.extend(kept.finish() if kept is not None else ())
        return result


def _allowed(memory: int | None, kept: resuming.Checkpoint | None, free: float) -> float:
    """Bytes for the replicas: what was asked for, what a run that goes on had, or half of what is free."""
    if memory is not None:
        return memory
    return free / 2 if kept is None or kept.memory is None else kept.memory


def _read_again(given: Any, result: Recalibration) -> Iterator[str]:
    """What to say where the residual was measured on data that may have come otherwise the second time."""
    same = isinstance(given, Data) and given.samples is not None
    if result.residual is not None and result.virtual_batches != 1 and not same:
        yield "the residual was measured on a second reading of the data; a shuffled loader may differ"


def _first_ones(given: Any, result: Recalibration, tolerance: float | None) -> Iterator[str]:
    """What to say where a tolerance was reached on samples that nobody has drawn from all."""
    sampler = getattr(given, "sampler", None)  # of a DataLoader of PyTorch
    in_order = type(sampler).__name__ == "SequentialSampler" or not getattr(given, "drawn", True)
    there = len(sampler) if in_order and sampler is not None else getattr(given, "samples", None)
    if tolerance is None or not in_order or there == result.samples:
        return
    yield (
        f"the tolerance was judged by the first {result.samples:,} samples as they come, which were not drawn from "
        f"all: where the data is sorted they do not stand for it. max_samples= draws from Parquet; shuffle loaders, "
        f"streams and factories"
    )


def _recalibrated(
    job: Job, method: str, source: Source, batches: Any, tolerance: float | None, check: bool
) -> Recalibration:
    """Measure and store; what fails leaves the model as it was."""
    try:
        measured, passes, error = _measured(job, method, source, tolerance)
        missed = _finish(job, measured, write=method != "ema")
        again = _again(job, measured, passes, batches, source.handed) if check else None
        residuals = _residuals(job, measured, again) if again is not None else {}
        with uninterrupted():
            job.backend.commit(job.model)
        agreement.check_one_result(job.group, job.backend, job.model)
    except BaseException:
        with uninterrupted():
            job.restore()
        raise
    result = Recalibration(
        samples=measured.samples,
        method=method,
        residual=float(np.max(list(residuals.values()))) if residuals else None,
        layers=list(_changes(job, measured, residuals)),
        untouched=missed,
        virtual_batches=passes,
        standard_error=error,
        convergence=convergence(measured.courses, job.stds(measured), measured.samples),
        _restore=job.undo,
    )
    if check and again is None:
        result.notes.append("the residual was not measured: the data can be read only once, and not all of it was kept")
    result.notes.extend(remarks(result, measured, tolerance, job.prior))
    return result


def _measured(job: Job, method: str, source: Source, tolerance: float | None) -> tuple[Measured, int, float | None]:
    """What the method measures, in how many virtual batches, and the standard error if it was asked for."""
    if method == "exact":
        return exact(job, source, tolerance)
    kept = job.checkpoint
    begun = kept.standing.measured if kept and kept.standing else None

    def after(measured: Measured, batch: Batch) -> None:
        if kept is not None and kept.due():
            kept.save(Standing(measured, memory=job.memory), batch)

    with job.measuring(job.before, normalize="batch" if method == "precise" else "update") as start:
        return one_by_one(start, source, job.group, "recalibrating", job.report, begun, after), 0, None


def _finish(job: Job, measured: Measured, write: bool) -> dict[str, str]:
    """Write the pooled statistics; returns the layers that were never reached."""
    if not measured.samples:
        raise BntoolsError("the data holds no samples: nothing was measured")
    if not measured.moments:
        raise BntoolsError(f"none of the {len(job.before)} BN layers was reached in a forward pass")
    for name, moments in measured.moments.items():
        if moments.count < 2:
            raise BntoolsError(
                f"layer {name!r} saw a single value per channel in all of the data, from which no variance can be "
                f"taken: give at least two samples"
            )
    if write:
        # One update a sample, at least so many that inspect does not take the initial value to be inside:
        # a counter that does not depend on the size of the batches.
        updates = {name: max(measured.samples, job.before[name].forgets_after) for name in measured.moments}
        job.store(measured.moments, measured.samples, updates)
    return {name: "never reached in a forward pass" for name in job.before if name not in measured.moments}


def _again(job: Job, measured: Measured, passes: int, batches: Any, samples: int) -> Iterator[Batch] | None:
    """The batches of this process once more; None where not all were kept and the data can be read only once."""
    if passes == 1:
        return iter(measured.batches)
    return iter(Source(batches, samples)) if all(job.group.gather(is_repeatable(batches))) else None


def _residuals(job: Job, measured: Measured, again: Iterator[Batch]) -> dict[str, float]:
    """What eval mode now sees at each layer, against what is stored."""
    stored = {layer.name: layer for layer in job.backend.layers(job.model)}
    sample = list(islice(again, 1))
    # One batch at a time, unlike the exact method, and in the model's own memory layout where that tells.
    alike = sample and _same_in_any_layout(job, stored, measured.moments, sample[0].head(FEW))
    with job.measuring(measured.moments, memory=job.memory if alike else 0) as start:
        seen = one_by_one(start, chain(sample, again), job.group, "checking", job.report).moments
    return {name: _gap(stored[name], moments.numpy()) for name, moments in seen.items()}


def _same_in_any_layout(job: Job, stored: dict[str, BatchNorm], names: Iterable[str], batch: Batch) -> bool:
    """Whether the model computes the same, to rounding, in the layout in which it was measured and in its own."""
    means = []
    for memory in (0, job.memory):
        try:
            with job.measuring(names, memory=memory) as start:
                means.append(one_by_one(start, [batch], Group(), "checking", lambda *_: None).moments)
        except BntoolsError:  # so few samples at once are more than some models take
            return False
    return all(
        distance((own.numpy().mean, stored[name].stats[1]), (means[1][name].numpy().mean, stored[name].stats[1]), 1e-5)
        < SUSPECT
        for name, own in means[0].items()
    )


def _gap(layer: BatchNorm, seen: Moments) -> float:
    return distance(layer.stats, (seen.mean, seen.var), layer.eps)


def _changes(job: Job, measured: Measured, residuals: dict[str, float]) -> Iterator[LayerChange]:
    for after in job.backend.layers(job.model):
        if after.name in measured.moments:
            before = job.before[after.name]
            drift = distance(before.stats, after.stats, before.eps)
            yield LayerChange(after.name, before, after, drift, residuals.get(after.name))


def _check_prior(layers: Iterable[BatchNorm]) -> None:
    for layer in layers:
        mean, var = layer.stats
        if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
            raise BntoolsError(
                f"found prior= although the stored statistics of layer {layer.name!r} are not finite or negative: "
                f"leave prior= out, or reset the layer first"
            )


def _check_arguments(
    method: str, prior: float, memory: int | None, tolerance: float | None, max_samples: int | None
) -> None:
    if method not in METHODS:
        raise BntoolsError(f"found method={method!r}, expected one of {', '.join(METHODS)}")
    if not isinstance(prior, Real) or not 0 <= prior < math.inf:
        raise BntoolsError(f"found prior={prior!r}, expected a number of samples, 0 or more")
    check_positive({"memory": memory, "tolerance": tolerance, "max_samples": max_samples})
    if method == "ema" and prior:
        raise BntoolsError("found prior= with method='ema': the moving average weighs the stored statistics itself")
    if method != "exact" and tolerance is not None:
        raise BntoolsError(f"found tolerance= with method={method!r}: only the exact method measures standard errors")
