"""One candidate, run in one way and held against the reference: what is measured, and what passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bntools.comparison import Comparison, OutputError
from bntools.divergence import Divergence
from bntools.runner import Outputs, Runner, least_precise

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
    compared at both, and this is the worse. ``placement`` counts the candidate's nodes by the provider that ran
    them, empty where that is not known. ``divergence`` is the first module or graph value that differs, with its
    operator and error, and ``first_divergence`` its name; None if the models agree or no value inside them
    can be told apart. ``noise`` is how far a rounding of its input moves the reference's own outputs, on their scale;
    None where the error gave no cause to measure it. ``reason`` says in words why the comparison failed, None if it
    passed. ``notes`` are sentences worth saying all the same.
    """

    passed: bool
    error: float
    outputs: tuple[OutputError, ...]
    provider: str
    tolerance: float
    samples: int
    agreement: float | None = None
    optimization: str | None = None
    placement: Mapping[str, int] = field(default_factory=dict)
    divergence: Divergence | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    noise: float | None = None

    @property
    def blurred(self) -> bool:
        """Whether the reference's own rounding alone gives errors such as this one, so that it tells nothing."""
        return self.noise is not None and self.error <= PER_NOISE * self.noise

    @property
    def first_divergence(self) -> str | None:
        """The name of the first module or graph value that differs."""
        return None if self.divergence is None else self.divergence.name

    def __str__(self) -> str:
        level = f", graph optimizations {self.optimization}" if self.optimization else ""
        agreement = "" if self.agreement is None else f", argmax equal in {self.agreement:.2%}"
        figures = f"error {self.error:.1e} (tolerance {self.tolerance:.0e}){agreement}"
        text = f"{'verified' if self.passed else 'NOT verified'} on {self.samples:,} samples: {figures}"
        text += f" ({self.provider}{level})"
        where = f"; first difference at {self.divergence}" if self.divergence else ""
        return text if self.passed else f"{text}: {self.reason}{where}"


@dataclass
class Trial:
    """The candidate in one of the ways to run it, and how far it is off so far."""

    runner: Runner
    comparisons: list[Comparison] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    reason: str | None = None
    worst_batch: Any = None
    _worst: float = -1.0

    def add(self, batch: Any, expected: Outputs, class_axis: int = 1) -> None:
        """Run the candidate on a batch and compare what it gives with what is expected."""
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
            self.comparisons = [Comparison(name, class_axis) for name in expected]
        for comparison in self.comparisons:
            if comparison.name in names and comparison.name in expected:
                errors.append(comparison.add(expected[comparison.name], names[comparison.name]))
        if max(errors) > self._worst:
            self._worst, self.worst_batch = max(errors), batch

    def result(self, truth: Runner, samples: int, tolerance: float | None) -> Verification:
        """The figures of all batches so far, held against the tolerance; None takes it from the dtypes."""
        outputs = tuple(comparison.result() for comparison in self.comparisons)
        if tolerance is None:
            tolerance = default_tolerance(
                {truth.dtype, self.runner.dtype, *self.dtypes}, truth.provider, self.runner.provider
            )
        worst = float("inf") if self.reason else max((output.error for output in outputs), default=0.0)
        agreements = [output.agreement for output in outputs if output.agreement is not None]
        reason = self.reason or _reason(outputs, tolerance)
        reason = f"{reason} {self.runner.where}" if reason and self.runner.where else reason
        remarks = [comparison.note for comparison in self.comparisons if comparison.note]
        placed = dict(self.runner.placed())
        return Verification(
            passed=reason is None,
            error=worst,
            outputs=outputs,
            provider=self.runner.provider,
            tolerance=tolerance,
            samples=samples,
            agreement=min(agreements, default=None),
            optimization=self.runner.optimization,
            placement=placed,
            reason=reason,
            notes=(*self.runner.notes, *remarks, *strayed(placed, self.runner.provider)),
        )


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


def strayed(placed: Mapping[str, int], provider: str) -> list[str]:
    """A sentence on the nodes that ran on another provider than the one asked for, if there are any."""
    others = [f"{count:,} on {name}" for name, count in placed.items() if name != provider]
    if not others:
        return []
    on_it, total = placed.get(provider, 0), sum(placed.values())
    return [f"of {total:,} nodes only {on_it:,} ran on {provider}, as asked for, and {' and '.join(others)}"]
