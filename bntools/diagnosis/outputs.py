"""What a model gives on a sample of the data: in eval and in train mode, alone and in batches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bntools.batches import Batch, count
from bntools.comparison import Comparison, error
from bntools.diagnosis.records import ModeGap
from bntools.diagnosis.sampling import Sample
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import Stats
from bntools.measurement import Job
from bntools.runner import Outputs
from bntools.walkers import Walker

SIZES = (1, 2, 8, 32)
RUNS = 16  # batches of one size at the most: a run costs as much for one sample as for a few
ALONE = 10  # samples that are run by themselves
BESIDE = (10, 100)  # and in batches of these sizes
RANKED = 8  # layers whose share in the difference is measured: a run each
SHOWN = 32  # samples on which it is measured
SAME = 1e-5  # of the outputs' scale: a difference below is rounding, which no layer has a share in

Start = Callable[[Any], Any]


def run(start: Start, content: Any) -> Outputs:
    """What the model gives for one batch: its outputs with one entry for each sample, by name."""
    samples = count(content)
    walker = Walker(start(content), Batch(0, content, samples))
    try:
        walker.advance()
        while walker.arrival is not None:
            walker.advance()
        given = walker.replica.outputs()
    finally:
        with uninterrupted():
            walker.replica.close()
    return {name: value for name, value in given.items() if value.shape[:1] == (samples,)}


def in_eval_mode(job: Job, sample: Sample) -> Outputs:
    """The outputs of the whole sample, as one batch where the model takes that.

    Raises BntoolsError where they are not finite, or the model gives nothing for each sample.
    """
    with job.measuring(job.before, outputs=True) as start:
        given = _stacked([run(start, part) for part in sample.taken(sample.samples)])
    numbers = {name: value for name, value in given.items() if value.dtype.kind in "fc"}
    if not numbers:
        raise BntoolsError("the model has no floating-point output with an entry for each sample")
    if not all(np.isfinite(value).all() for value in numbers.values()):
        raise BntoolsError("the model gives NaN or Inf in eval mode")
    return numbers


def alone(job: Job, sample: Sample) -> float:
    """The largest scale-relative difference of a sample's output by itself from that in a batch, in eval mode."""
    sizes = [min(size, sample.samples) for size in BESIDE]
    with job.measuring(job.before, outputs=True) as start:
        singles = _stacked([run(start, part) for part in sample.parts(1, ALONE)])
        batches = [run(start, sample.head(size)) for size in dict.fromkeys(sizes)]
    found = [
        error(value[: len(singles[name])], singles[name][: len(value)])
        for given in batches
        for name, value in given.items()
        if name in singles and value.dtype.kind in "fc"
    ]
    return max(found, default=0.0)


def modes(
    job: Job,
    sample: Sample,
    given: Outputs,
    trained: Mapping[str, float],
    class_axis: int,
    batch_size: int | None = None,
) -> tuple[list[ModeGap], list[str]]:
    """Train mode's outputs against those of eval mode at several batch sizes, and the sizes that were left out.

    ``batch_size`` is one more of them. ``given`` is what eval mode gives for the sample. ``trained`` are the layers
    that normalize with their batch's statistics, and how many values a channel each of them gets from one sample.
    Dropout and the like stay off.
    """
    found: list[ModeGap] = []
    notes = []
    sizes = sorted({*SIZES, batch_size} if batch_size else SIZES)
    with job.measuring(trained, normalize="batch", outputs=True) as start:
        for size in [sample.bound] if sample.bound else [*(size for size in sizes if size < sample.samples), None]:
            short = [name for name, values in trained.items() if (size or sample.samples) * values < 2]
            if short:
                notes.append(
                    f"train mode at batch size {size or sample.samples} was left out: layer {short[0]!r} then gets a "
                    f"single value per channel, from which it has no variance"
                )
                continue
            parts = [sample.content] if size is None else sample.parts(size, RUNS)
            found.append(_gap(size, [run(start, part) for part in parts], given, class_axis))
    return found, notes


def _gap(size: int | None, parts: Sequence[Outputs], given: Outputs, class_axis: int) -> ModeGap:
    results = []
    trained = _stacked(parts)
    for name, value in given.items():
        comparison = Comparison(name, class_axis)
        comparison.add(value[: len(trained[name])], trained[name])
        results.append(comparison.result())
    agreements = [one.agreement for one in results if one.agreement is not None]
    return ModeGap(size, max(one.error for one in results), min(agreements, default=None))


def shares(job: Job, sample: Sample, measured: Mapping[str, Stats], ranked: Sequence[str]) -> dict[str, float]:
    """The share of each of the first ``ranked`` layers in what measured statistics change in the outputs.

    Each is given its measured statistics alone; the share is by how much the root mean square distance to the
    outputs with all measured statistics falls. It is negative for a layer that makes matters worse by itself. The
    model has its stored statistics before and after, also where it raises. Empty where nothing changes, or it is not
    finite.
    """
    batches = sample.taken(SHOWN)
    stored = {name: job.before[name].stats for name in measured}
    with job.measuring(job.before, outputs=True) as start:

        def given(stats: Mapping[str, Stats]) -> Outputs:
            _write(job, stats)
            return _stacked([run(start, batch) for batch in batches])

        try:
            whole = given(measured)
            total, scale = _apart(given(stored), whole), _apart({}, whole)
            if not np.isfinite(total) or total <= SAME * scale:
                return {}
            found = {}
            for name in ranked[:RANKED]:
                found[name] = 1 - _apart(given({name: measured[name]}), whole) / total
                _write(job, {name: stored[name]})
            return found
        finally:  # also where the model raises: what is measured next is measured with the stored statistics
            with uninterrupted():
                _write(job, stored)


def _write(job: Job, stats: Mapping[str, Stats]) -> None:
    job.backend.write(job.model, {name: (mean, var, None) for name, (mean, var) in stats.items()})


def _apart(outputs: Outputs, others: Outputs) -> float:
    """The root mean square distance of outputs, each relative to its scale; that of no outputs is their size."""
    numbers = {name: value for name, value in others.items() if value.dtype.kind == "f" and value.size}
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for name, value in numbers.items():
            scale = float(np.abs(value).max()) or 1.0
            total += float(np.mean(np.square((value.astype(np.float64) - outputs.get(name, 0.0)) / scale)))
    return float(np.sqrt(total))


def _stacked(parts: Iterable[Outputs]) -> Outputs:
    every = list(parts)
    return {name: np.concatenate([part[name] for part in every]) for name in every[0]} if every else {}
