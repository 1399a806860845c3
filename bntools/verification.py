"""The verb verify: do two models give the same outputs?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bntools import backends, feeding
from bntools.batches import Source
from bntools.comparison import error
from bntools.divergence import first_divergence
from bntools.errors import BntoolsError
from bntools.resizing import resized
from bntools.runner import Runner
from bntools.sensitivity import rounding_noise
from bntools.trial import MOST_PARDON, PER_NOISE, Trial, Verification, default_tolerance

__all__ = ["Verification", "default_tolerance", "verify"]


def verify(
    reference: Any,
    candidate: Any,
    batches: Any,
    *,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] = ("cpu",),
    tolerance: float | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Verification:
    """Compare all outputs of two models in eval mode, by name, or in order where the names differ.

    Args:
        reference: what is right: an nn.Module, an onnx.ModelProto, an onnx_ir.Model or the path of an
            ``.onnx`` file.
        candidate: what is checked. An ONNX model is run twice, with graph optimizations off (is the
            file right?) and at the default level (is the runtime right?); the worse counts.
        batches: an iterable of batches, as in ``recalibrate``; or one batch, as an array or a dict.
        providers: ONNX Runtime's, for the candidate: cpu, cuda, tensorrt, openvino, coreml, dml, or in full; each
            alone or with its options, as in ONNX Runtime: ``("cuda", {"use_tf32": 1})``, for TF32 is off unless
            asked for.
        tolerance: the largest scale-relative error that passes; None takes it from ``trial.TOLERANCE``, and
            raises it where the reference itself is measured to round more coarsely, which a note says.
        forward: ``forward(model, batch)`` runs an nn.Module or a Keras model that has its own calling convention. Of a
            module beside a Keras model it runs the module alone, from the batch as the Keras model takes it: that is
            where channels-last images are permuted.

    Integer and boolean outputs must be equal. Outputs that are missing, of another shape, NaN, or
    infinite in one model only, do not pass. Of models with more than 512 MB of weights one at a time is in
    memory. Raises BntoolsError for what is no model, a batch that does not fit, no batches, a model that fails,
    and a provider that is not active or runs no node: there is no fallback.

        check = bntools.verify(model, "model.onnx", images)
        print(check)                    # verified on 8 samples: error 4.1e-07 (tolerance 1e-04), ...
    """
    check, truth, trial = _checked(reference, candidate, batches, providers, tolerance, forward)
    return check if check.passed else _located(check, truth, trial)


def held(reference: Any, candidate: Any, example: Any, tolerance: float | None) -> Verification:
    """As ``verify`` on one batch, but without looking for where a difference begins, which takes many runs."""
    return _checked(reference, candidate, [example], ("cpu",), tolerance, None)[0]


def _checked(
    reference: Any, candidate: Any, batches: Any, providers: Sequence[Any], tolerance: float | None, forward: Any
) -> tuple[Verification, Runner, Trial]:
    """The worst check of the ways to run the candidate; the reference and the candidate to look into if it failed."""
    truth, *ways = _runners(reference, ("cpu",), _forward(reference, candidate, forward))
    trials = [Trial(runner) for runner in _runners(candidate, providers, _forward(candidate, reference, forward))]
    batches = backends.fed(candidate, backends.fed(reference, feeding.given(reference, batches)))
    samples = _compare(truth, trials, batches)
    trials, own = _without_own_faults(trials, truth, ways, samples, tolerance)
    checks = [trial.result(truth, samples, tolerance) for trial in trials]
    worst = max(range(len(checks)), key=lambda i: (not checks[i].passed, checks[i].error))
    check, trial = checks[worst], trials[worst]
    remarks = dict.fromkeys((*check.notes, *own, *(note for trial in trials for note in trial.runner.notes)))
    check = replace(check, notes=tuple(remarks))
    if not check.passed and tolerance is None:
        check = _pardoned(check, truth, trial.worst_batch)
    # Where the file is right and the runtime's optimizer is not, the file is the better reference. Where the file
    # is as wrong as the worst, it is looked into without optimizations, which hide values.
    if checks[0].passed and not check.passed:
        truth = trials[0].runner
    elif checks[0].error >= check.error / 2:
        trial = trials[0]
    return check, truth, trial


def _without_own_faults(
    trials: list[Trial], truth: Runner, ways: list[Runner], samples: int, tolerance: float | None
) -> tuple[list[Trial], list[str]]:
    """Leave out a way to run the candidate in which the reference itself gives something else; a note says so."""
    kept, notes = [], []
    for trial in trials:
        same = next((way for way in ways if way.where and way.where == trial.runner.where), None)
        if same is not None and not trial.result(truth, samples, tolerance).passed:
            own = Trial(same)
            own.add(trial.worst_batch, truth.run(trial.worst_batch))
            if not own.result(truth, samples, tolerance).passed:
                notes.append(f"the reference itself gives something else {same.where}: not compared there")
                continue
        kept.append(trial)
    return kept, notes


def _located(check: Verification, truth: Runner, trial: Trial) -> Verification:
    """The failed check with the first divergence, or a note on why none was found: the figures stay."""
    batch = _smallest(truth, trial.runner, trial.worst_batch, check.tolerance)
    try:
        return replace(check, divergence=first_divergence(truth, trial.runner, batch, check.tolerance))
    except BntoolsError as error:
        return replace(check, notes=(*check.notes, f"where the difference begins was not found: {error}"))


def _smallest(truth: Runner, candidate: Runner, batch: Any, tolerance: float) -> Any:
    """The first sample of a batch if the models differ on it too, as every value inside is to be held; else all."""
    try:
        sample = resized(batch, 1)
        expected, found = truth.run(sample), candidate.run(sample)
    except BntoolsError:  # the batch size is fixed
        return batch
    pairs = zip(expected.values(), found.values(), strict=False)
    return sample if any(error(a, b) > tolerance for a, b in pairs) else batch


def _compare(truth: Runner, trials: list[Trial], batches: Any) -> int:
    """Run every batch through the reference and the trials; returns the number of samples."""
    samples = 0
    for batch in Source(batches):
        expected = truth.run(batch.content)
        if not expected:
            raise BntoolsError(f"{truth.name} gives no arrays: there is nothing to compare")
        samples += batch.samples
        for trial in trials:
            trial.add(batch.content, expected, truth.class_axis)
    if not samples:
        raise BntoolsError("no batches to compare the models on: the iterable was empty (used up before?)")
    return samples


def _pardoned(check: Verification, truth: Runner, batch: Any) -> Verification:
    """The check, passed after all where the reference's own rounding explains the error, which a note says.

    Some networks turn the last bit of their input into the fourth digit of their output. What they give
    cannot be compared more finely than that. Where it is the second digit, no comparison says anything.
    """
    ceiling = check.tolerance * MOST_PARDON
    if any(output.problem for output in check.outputs) or not math.isfinite(check.error):
        return check
    noise = rounding_noise(truth, batch)
    if not math.isfinite(noise):
        return check
    check = replace(check, noise=noise)
    if not check.blurred:
        return check
    said = f"the reference itself turns a rounding of its input into {noise:.1e} of its output's scale"
    if check.error > ceiling:
        said += ": on these data no comparison tells whether a model is right"
        return replace(check, notes=(*check.notes, said))
    tolerance = min(noise * PER_NOISE, ceiling)
    said += f": the tolerance was raised from {check.tolerance:.0e} to {tolerance:.1e}"
    return replace(check, passed=True, reason=None, tolerance=tolerance, notes=(*check.notes, said))


def _forward(model: Any, other: Any, forward: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any] | None:
    """How a model is called: a Keras model beside a module by its own convention, any other as the caller says."""
    if forward is None:
        return None
    pair = [backends.of(one).__name__.rpartition(".")[2] for one in (model, other)]
    return None if pair == ["keras", "torch"] else forward


def _runners(model: Any, providers: Sequence[Any], forward: Callable[[Any, Any], Any] | None) -> list[Runner]:
    if not isinstance(model, (str, Path)):
        return backends.of(model).runners(model, providers, forward)
    if Path(model).suffix.lower() != ".onnx":
        raise BntoolsError(
            f"{model}: only an .onnx file is verified by its path: load it first, bntools.load({str(model)!r})"
        )
    return backends.of_path(model).runners(model, providers, forward)
