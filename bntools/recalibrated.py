"""What a recalibration did: the result, and what is worth saying about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bntools.layer import BatchNorm
from bntools.measured import Measured

SUSPECT = 0.01  # a residual that rounding does not explain; half precision stays below


@dataclass(frozen=True)
class LayerChange:
    """What recalibration did to one layer.

    ``drift`` is the distance between the two sets of statistics, ``residual`` that between the new ones
    and what eval mode then saw; both in standard deviations of the layer.
    """

    name: str
    before: BatchNorm
    after: BatchNorm
    drift: float
    residual: float | None = None


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate`` returns.

    ``residual`` is the worst over the layers, None where it was not measured. ``untouched`` gives the
    reason for each layer that kept its statistics. ``virtual_batches`` is 1 where all data went through
    together. ``standard_error`` is that of the worst channel's mean, in standard deviations, with samples as
    units; measured where a tolerance was asked for, as is ``convergence``: how it fell with the number of samples, as
    pairs of the two. ``notes`` are sentences worth reading.
    """

    samples: int
    method: str
    residual: float | None
    layers: list[LayerChange]
    untouched: dict[str, str]
    virtual_batches: int = 1
    standard_error: float | None = None
    notes: list[str] = field(default_factory=list)
    convergence: list[tuple[int, float]] = field(default_factory=list)
    _restore: Callable[[], None] = field(default=lambda: None, repr=False)

    def __str__(self) -> str:
        residual = "" if self.residual is None else f", residual {self.residual:.1e}"
        untouched = f"; {len(self.untouched)} untouched" if self.untouched else ""
        layers = f"{len(self.layers)} BN layer{'s' * (len(self.layers) != 1)}"
        return f"recalibrated {layers} on {self.samples:,} samples{residual}{untouched}"

    def undo(self) -> None:
        """Give the model back the statistics that it had before."""
        self._restore()


def remarks(result: Recalibration, measured: Measured, tolerance: float | None, prior: float) -> Iterator[str]:
    """Sentences about a result that its reader should not miss."""
    several = [name for name, calls in measured.calls.items() if calls > 1]
    if several:
        yield (
            f"called more than once in a forward pass, their calls pooled: {', '.join(several)}. Earlier calls were "
            f"normalized before later ones were measured, so the residual is not zero"
        )
    if result.virtual_batches > 1:
        yield (
            f"memory holds part of the data at a time: {result.virtual_batches} virtual batches were pooled. "
            f"A larger memory= brings the residual down"
        )
    if measured.late:
        yield f"reached in different orders by different batches: {', '.join(sorted(measured.late))}"
    if tolerance is not None and result.standard_error is not None and result.standard_error > tolerance:
        yield (
            f"the tolerance of {tolerance:g} was not reached: the standard error is {result.standard_error:.3g} after "
            f"all {result.samples} samples"
        )
    explained = several or measured.late or result.virtual_batches != 1 or prior
    if not explained and result.residual is not None and result.residual > SUSPECT:
        yield (
            f"the residual of {result.residual:.2g} is more than rounding: does the model draw random numbers "
            f"in eval mode, depend on memory layout (as_strided), or keep values outside its modules?"
        )
