"""The verb verify: do two models give the same outputs?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bntools import backends
from bntools.batches import Source
from bntools.comparison import Comparison, OutputError, error
from bntools.divergence import first_divergence
from bntools.errors import BntoolsError
from bntools.resizing import resized
from bntools.runner import Outputs, Runner, least_precise
from bntools.sensitivity import rounding_noise

# What rounding may do to the outputs of a deep network, as scale-relative error, by the least precise
# floating dtype in either model. Accelerators sum in other orders and with other algorithms: ten
# times that in float32 and float64. TF32, which would need a hundred times more, is off in a comparison.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
ACCELERATOR = {"float64": 10.0, "float32": 10.0, "float16": 1.0, "bfloat16": 1.0}
# Where the reference's own rounding noise is larger than the table says, ten times that noise passes, up to
# a hundred times the table.
PER_NOISE, MOST_PARDON = 10.0, 100.0
ON_CPU = ("cpu", "CPUExecutionProvider")


@dataclass(frozen=True)
class Verification:
    """What a comparison of two models measured.

    ``error`` is the scale-relative error ``max|a - b| / max|a|`` of the worst output, ``outputs`` holds
    the figures of each. ``agreement`` is the share of equal argmax, of the output where it is lowest,
    None where no output has classes. ``provider`` computed the candidate, at the graph optimization
    level ``optimization`` ("off" or "default"; None where there is no such thing): an ONNX candidate is
    compared at both, and this is the worse. ``first_divergence`` names the first module or graph value
    that differs, None if the models agree or no value inside them can be told apart. ``reason`` says in
    words why the comparison failed, None if it passed. ``notes`` are sentences worth saying all the same.
    """

    passed: bool
    error: float
    outputs: tuple[OutputError, ...]
    provider: str
    tolerance: float
    samples: int
    agreement: float | None = None
    optimization: str | None = None
    first_divergence: str | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        level = f", graph optimizations {self.optimization}" if self.optimization else ""
        agreement = "" if self.agreement is None else f", argmax equal in {self.agreement:.2%}"
        figures = f"error {self.error:.1e} (tolerance {self.tolerance:.0e}){agreement}"
        text = f"{'verified' if self.passed else 'NOT verified'} on {self.samples:,} samples: {figures}"
        text += f" ({self.provider}{level})"
        where = f"; first difference at {self.first_divergence!r}" if self.first_divergence else ""
        return text if self.passed else f"{text}: {self.reason}{where}"


def verify(
    reference: Any,
    candidate: Any,
    batches: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    tolerance: float | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Verification:
    """Compare all outputs of two models in eval mode, by name, or in order where the names differ.

    Args:
        reference: what is right: an nn.Module, an onnx.ModelProto or the path of an ``.onnx`` file.
        candidate: what is checked. An ONNX model is run twice, with graph optimizations off (is the
            file right?) and at the default level (is the runtime right?); the worse counts.
        batches: an iterable of batches, as in ``recalibrate``; or one batch, as an array or a dict.
        providers: ONNX Runtime's, for the candidate: cpu, cuda, tensorrt, openvino, coreml, dml, or in full.
        tolerance: the largest scale-relative error that passes; None takes it from the table TOLERANCE, and
            raises it where the reference itself is measured to round more coarsely, which a note says.
        forward: ``forward(model, batch)`` runs an nn.Module that has its own calling convention.

    Integer and boolean outputs must be equal. Outputs that are missing, of another shape, NaN, or
    infinite in one model only, do not pass. Raises BntoolsError for what is no model, a batch that does
    not fit, no batches, a model that fails, and a provider that is not active: there is no fallback.

        check = bntools.verify(model, "model.onnx", images)
        print(check)                    # verified on 8 samples: error 4.1e-07 (tolerance 1e-04), ...
    """
    truth = _runners(reference, ("cpu",), forward)[0]
    trials = [_Trial(runner) for runner in _runners(candidate, providers, forward)]
    samples = _compare(truth, trials, batches)
    checks = [trial.result(truth, samples, tolerance) for trial in trials]
    worst = max(range(len(checks)), key=lambda i: (not checks[i].passed, checks[i].error))
    check, trial = checks[worst], trials[worst]
    if not check.passed and tolerance is None:
        check = _pardoned(check, truth, trial.worst_batch)
    if check.passed:
        return check
    # Where the file is right and the runtime's optimizer is not, the file is the better reference.
    nearest = trials[0].runner if checks[0].passed else truth
    return _located(check, nearest, trial)


def _located(check: Verification, truth: Runner, trial: _Trial) -> Verification:
    """The failed check with the first divergence, or a note on why none was found: the figures stay."""
    batch = _smallest(truth, trial.runner, trial.worst_batch, check.tolerance)
    try:
        return replace(check, first_divergence=first_divergence(truth, trial.runner, batch, check.tolerance))
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


def _compare(truth: Runner, trials: list[_Trial], batches: Any) -> int:
    """Run every batch through the reference and the trials; returns the number of samples."""
    samples = 0
    for batch in Source(batches):
        expected = truth.run(batch.content)
        if not expected:
            raise BntoolsError(f"{truth.name} gives no arrays: there is nothing to compare")
        samples += batch.samples
        for trial in trials:
            trial.add(batch.content, expected)
    if not samples:
        raise BntoolsError("no batches to compare the models on: the iterable was empty (used up before?)")
    return samples


@dataclass
class _Trial:
    """The candidate in one of the ways to run it, and how far it is off so far."""

    runner: Runner
    comparisons: list[Comparison] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    reason: str | None = None
    worst_batch: Any = None
    _worst: float = -1.0

    def add(self, batch: Any, expected: Outputs) -> None:
        found = self.runner.run(batch)
        self.dtypes |= {str(array.dtype) for array in (*expected.values(), *found.values())}
        errors = [0.0]
        if len(found) != len(expected):
            self.reason = (
                f"{self.runner.name} has {len(found)} outputs ({', '.join(found)}) "
                f"where the reference has {len(expected)} ({', '.join(expected)})"
            )
            errors = [float("inf")]
        names = found if set(found) == set(expected) else dict(zip(expected, found.values(), strict=False))
        if not self.comparisons:
            self.comparisons = [Comparison(name) for name in expected]
        for comparison in self.comparisons:
            if comparison.name in names and comparison.name in expected:
                errors.append(comparison.add(expected[comparison.name], names[comparison.name]))
        if max(errors) > self._worst:
            self._worst, self.worst_batch = max(errors), batch

    def result(self, truth: Runner, samples: int, tolerance: float | None) -> Verification:
        outputs = tuple(comparison.result() for comparison in self.comparisons)
        if tolerance is None:
            tolerance = default_tolerance(
                {truth.dtype, self.runner.dtype, *self.dtypes}, truth.provider, self.runner.provider
            )
        worst = float("inf") if self.reason else max((output.error for output in outputs), default=0.0)
        agreements = [output.agreement for output in outputs if output.agreement is not None]
        reason = self.reason or _reason(outputs, tolerance)
        return Verification(
            passed=reason is None,
            error=worst,
            outputs=outputs,
            provider=self.runner.provider,
            tolerance=tolerance,
            samples=samples,
            agreement=min(agreements, default=None),
            optimization=self.runner.optimization,
            reason=reason,
            notes=tuple(comparison.note for comparison in self.comparisons if comparison.note),
        )


def _pardoned(check: Verification, truth: Runner, batch: Any) -> Verification:
    """The check, passed after all where the reference's own rounding explains the error, which a note says.

    Some networks turn the last bit of their input into the fourth digit of their output. What they give
    cannot be compared more finely than that.
    """
    ceiling = check.tolerance * MOST_PARDON
    if any(output.problem for output in check.outputs) or not check.error <= ceiling:
        return check
    noise = rounding_noise(truth, batch)
    tolerance = min(noise * PER_NOISE, ceiling)
    if not math.isfinite(noise) or check.error > tolerance:
        return check
    note = (
        f"the reference itself turns a rounding of its input into {noise:.1e} of its output's scale: "
        f"the tolerance was raised from {check.tolerance:.0e} to {tolerance:.1e}"
    )
    return replace(check, passed=True, reason=None, tolerance=tolerance, notes=(*check.notes, note))


def default_tolerance(dtypes: set[str], *providers: str) -> float:
    """The largest error that rounding explains, by the least precise of the dtypes and of both models' providers."""
    dtype = least_precise(dtypes)
    return TOLERANCE[dtype] * (1.0 if all(provider in ON_CPU for provider in providers) else ACCELERATOR[dtype])


def _reason(outputs: Sequence[OutputError], tolerance: float) -> str | None:
    for output in outputs:
        if output.problem:
            return f"output {output.name!r}: {output.problem}"
    worst = max(outputs, key=lambda output: output.error)
    if worst.error <= tolerance:
        return None
    return f"output {worst.name!r} is off by {worst.error:.1e} of its scale, more than the tolerance of {tolerance:.0e}"


def _runners(model: Any, providers: Sequence[str], forward: Callable[[Any, Any], Any] | None) -> list[Runner]:
    if not isinstance(model, (str, Path)):
        return backends.of(model).runners(model, providers, forward)
    if Path(model).suffix.lower() != ".onnx":
        raise BntoolsError(
            f"{model}: only an .onnx file is verified by its path: load it first, bntools.load({str(model)!r})"
        )
    return backends.of_path(model).runners(model, providers, forward)
