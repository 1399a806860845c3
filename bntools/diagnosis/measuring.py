"""Measuring what ``inspect(model, batches)`` tells: the story, and the model as it was at the end of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bntools import backends, feeding
from bntools.batches import Source
from bntools.course import convergence, standard_error
from bntools.diagnosis import advice, domains, drift, histograms, looks, outputs
from bntools.diagnosis.records import Diagnosis, LayerDrift, ModeGap
from bntools.diagnosis.sampling import Sample, sampled
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import BatchNorm, Selection
from bntools.measured import Measured
from bntools.measurement import Job, Progress, check_positive, exact, targets
from bntools.words import counted

SAMPLES = 256  # on which outputs are compared
AT_ONCE = 8  # times the largest layer's input is about what one forward pass holds

Forward = Callable[[Any, Any], Any]


@dataclass
class Findings:
    """What is found beside the statistics."""

    shares: dict[str, float] = field(default_factory=dict)
    modes: list[ModeGap] = field(default_factory=list)
    alone: float | None = None
    histograms: dict[str, histograms.Histogram] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def diagnose(
    model: Any,
    batches: Iterable[Any],
    *,
    layers: Selection,
    forward: Forward | None,
    memory: int | None,
    max_samples: int | None,
    batch_size: int | None,
    wanted: Selection,
    alternatives: bool,
    parts: Mapping[str, Any] | None,
    progress: Progress | None,
) -> Diagnosis:
    """What ``inspect`` does where it has data; ``wanted`` are its ``histograms``, ``parts`` its ``domains``.

    Recalibrates exactly, compares, and puts everything back.
    """
    check_positive({"memory": memory, "max_samples": max_samples, "batch_size": batch_size})
    backend = backends.of(model)
    model = backend.edit(model)
    own = forward is not None
    batches = feeding.given(model, batches, max_samples)
    batches = backends.fed(model, batches, max_samples, whole=own, joined=not own)
    before = {layer.name: layer for layer in backend.layers(model)}
    chosen, untouched = targets(list(before.values()), layers, backends.absence(model), frozen=True)
    shown = histograms.wanted(list(before.values()), wanted, untouched)
    job = Job(
        backend=backend,
        model=model,
        forward=forward,
        before={name: before[name] for name in chosen},
        prior=0,
        progress=progress or (lambda *_: None),
        memory=backend.free_memory(model) / 2 if memory is None else memory,
        samples=getattr(batches, "samples", None),
    )
    try:
        measured, passes, _ = exact(job, Source(batches, max_samples), per_sample=True)
        job.put_back()
        found, missed = _drifts(job, measured)
        findings = _compared(job, measured, found, shown, batch_size)
        result = Diagnosis(
            samples=measured.samples,
            layers=[_complete(layer, findings) for layer in found],
            advice=[],
            modes=findings.modes,
            alone=findings.alone,
            convergence=convergence(measured.courses, job.stds(measured), measured.samples),
            untouched=untouched | missed,
            notes=[*_remarks(job, measured, passes), *findings.notes],
            framework=backend.__name__.rpartition(".")[2],
        )
        result = _put_in_context(job, measured, result, alternatives, parts)
    finally:
        with uninterrupted():
            job.put_back()
    notes = [*result.notes, *advice.notes(result)]
    return replace(result, advice=advice.of(result, batch_size=batch_size), notes=notes)


def _drifts(job: Job, measured: Measured) -> tuple[list[LayerDrift], dict[str, str]]:
    """How far each layer's statistics are from what was measured, and the reason for those that were not."""
    if not measured.samples:
        raise BntoolsError("the data holds no samples: nothing was measured")
    missed = {name: "never reached in a forward pass" for name in job.before if name not in measured.moments}
    single = [name for name, moments in measured.moments.items() if moments.count < 2]
    missed |= dict.fromkeys(single, "saw a single value per channel in all of the data: give at least two samples")
    found = [_drift(layer, measured) for layer in job.before.values() if layer.name not in missed]
    if not found:
        name, reason = next(iter(missed.items()))
        raise BntoolsError(f"none of the {len(job.before)} BN layers could be measured ({name}: {reason})")
    return found, missed


def _drift(layer: BatchNorm, measured: Measured) -> LayerDrift:
    moments = measured.moments[layer.name].numpy()
    mean, var = np.asarray(moments.mean), np.asarray(moments.var)
    apart = drift.between(layer, mean, var)
    seen = np.sqrt(var + layer.eps)
    course = measured.courses[layer.name].total
    # Several calls of one sample are no more independent of each other than its pixels are.
    calls = max(1.0, course.count / measured.samples) ** 0.5
    return LayerDrift(
        layer=layer,
        mean=mean,
        var=var,
        drift=apart.drift,
        mean_shift=apart.mean_shift,
        std_ratio=apart.std_ratio,
        kl=apart.kl,
        standard_error=standard_error(course, np.where(np.isfinite(layer.std), layer.std, seen)) * calls,
        dead=drift.still(mean, var, layer.eps),
        calls=measured.calls.get(layer.name, 1),
        remaining_error=standard_error(course, seen) * calls,
    )


def _compared(
    job: Job, measured: Measured, found: list[LayerDrift], shown: list[str], batch_size: int | None
) -> Findings:
    """What the model gives, on a sample of the data, with one set of statistics and with another."""
    findings = Findings()
    with _noted(findings.notes, "eval and train mode were not compared"):
        sample = sampled(measured.batches, _affordable(job, measured))
        _compare_outputs(job, measured, found, sample, findings, batch_size)
    if shown:
        with _noted(findings.notes, "no histogram was taken"):
            sample = replace(sampled(measured.batches, SAMPLES), bound=measured.batches[0].samples)
            findings.histograms = histograms.measured(job, sample, shown)
    return findings


def _compare_outputs(
    job: Job,
    measured: Measured,
    found: list[LayerDrift],
    sample: Sample,
    findings: Findings,
    batch_size: int | None,
) -> None:
    ranked = [layer.name for layer in sorted(found, key=lambda one: -one.drift)]
    stats = {layer.name: (layer.mean, layer.var) for layer in found}
    job.progress("comparing", 0, sample.samples)
    try:
        given = outputs.in_eval_mode(job, sample)
    except BntoolsError:  # a graph may be bound to the size of the batches in which its data comes
        sample = replace(sample, bound=measured.batches[0].samples)
        given = outputs.in_eval_mode(job, sample)
    findings.shares = outputs.shares(job, sample, stats, ranked)
    if sample.bound is None:
        findings.alone = outputs.alone(job, sample)
    else:
        findings.notes.append(f"outputs were compared in batches of {sample.bound} only: the model takes no others")
    trained = {name: _values(measured, name) for name in ranked if not job.before[name].stats_frozen}
    if not trained:
        findings.notes.append("eval and train mode were not compared: all measured layers are frozen")
        return
    if len(trained) < len(ranked):
        frozen = counted(len(ranked) - len(trained), "frozen layer")
        findings.notes.append(f"train mode keeps the stored statistics of {frozen}, as training would")
    class_axis = job.backend.runners(job.model, ("cpu",), job.forward)[0].class_axis
    findings.modes, left_out = outputs.modes(job, sample, given, trained, class_axis, batch_size)
    findings.notes += left_out
    job.progress("comparing", sample.samples, sample.samples)


def _values(measured: Measured, name: str) -> float:
    """How many values a channel a layer gets from one sample, in one call."""
    return measured.moments[name].count / measured.samples / max(1, measured.calls.get(name, 1))


def _affordable(job: Job, measured: Measured) -> int:
    """As many samples as one forward pass can take at once."""
    largest = max(moments.count * len(moments.numpy().mean) for moments in measured.moments.values()) * 4
    return int(max(1, min(SAMPLES, job.memory * measured.samples / (AT_ONCE * largest))))


def _put_in_context(
    job: Job, measured: Measured, result: Diagnosis, alternatives: bool, parts: Mapping[str, Any] | None
) -> Diagnosis:
    """The diagnosis with other preprocessings, the halves of the data, and its parts, all under stored statistics."""
    contents = [batch.content for batch in measured.batches]
    notes = list(result.notes)
    if alternatives:
        with _noted(notes, "other preprocessings were not tried"):
            result = replace(result, preprocessing=looks.compare(job.model, contents, forward=job.forward))
    with _noted(notes, "the halves of the data were not compared"):
        halves, calls = domains.halves(job.model, contents, forward=job.forward)
        result = replace(result, halves=halves, layers=[_called(layer, calls) for layer in result.layers])
    if parts is not None:
        with _noted(notes, "the parts of the data were not compared"):
            result = replace(result, domains=domains.compare(job.model, parts, forward=job.forward))
    return replace(result, notes=notes)


def _called(layer: LayerDrift, calls: Mapping[str, tuple[int, float]]) -> LayerDrift:
    if layer.name not in calls:
        return layer
    times, gap = calls[layer.name]
    return replace(layer, calls=times, call_gap=gap)


def _complete(layer: LayerDrift, findings: Findings) -> LayerDrift:
    return replace(layer, gap=findings.shares.get(layer.name), histogram=findings.histograms.get(layer.name))


@contextmanager
def _noted(notes: list[str], what: str) -> Iterator[None]:
    """A part of the diagnosis that the model or the data may not allow: why is said, and the rest goes on."""
    try:
        yield
    except BntoolsError as error:
        notes.append(f"{what}: {error}")


def _remarks(job: Job, measured: Measured, passes: int) -> Iterator[str]:
    """Sentences that the reader of the figures should not miss."""
    broken = [name for name, layer in job.before.items() if not all(np.isfinite(part).all() for part in layer.stats)]
    if broken:
        yield f"NaN or Inf in the stored statistics of {', '.join(broken)}: the drift from them is infinite"
    several = [name for name, calls in measured.calls.items() if calls > 1]
    if several:
        yield f"called more than once in a forward pass, their calls pooled: {', '.join(several)}"
    if passes > 1:
        yield (
            f"memory holds part of the data at a time: {passes} virtual batches were pooled; outputs, preprocessing "
            f"and halves are of the first one. A larger memory= takes more at once"
        )
    if measured.late:
        yield f"reached in different orders by different batches: {', '.join(sorted(measured.late))}"
