"""Histograms of what eval mode brings to chosen layers, normalized by their stored statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from bntools.batches import Batch, count
from bntools.diagnosis.sampling import Sample
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import BatchNorm, Selection, select
from bntools.measurement import Job
from bntools.walkers import Walker

BINS = 64
NARROW = 4.0  # standard deviations to either side that are always shown
TAIL = 0.001  # share of the values at either end that may lie beyond the edges, in the outermost bins
MOST = 1 << 20  # values of a layer, taken evenly from all
RUN = 32  # samples at a time

Histogram = tuple[np.ndarray, np.ndarray]


def wanted(layers: list[BatchNorm], names: Selection, untouched: Mapping[str, str]) -> list[str]:
    """The layers that ``histograms=`` means. Raises BntoolsError for one that is not measured."""
    chosen = [] if not names and not callable(names) else [layer.name for layer in select(layers, names)]
    for name in chosen:
        if name in untouched:
            raise BntoolsError(f"histograms= asks for layer {name!r}, which is not measured: {untouched[name]}")
    return chosen


def measured(job: Job, sample: Sample, names: Iterable[str]) -> dict[str, Histogram]:
    """Edges (BINS + 1,) and counts (BINS,) for each of the layers, over all channels together.

    The edges are at least NARROW standard deviations to either side. A layer without finite statistics is left out.
    """
    names = list(names)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with job.measuring(names, values=names) as start:
        for part in sample.all_of_it(sample.bound or RUN):
            walker = Walker(start(part), Batch(0, part, count(part)))
            try:
                walker.advance()
                while walker.arrival is not None:
                    if walker.met.values is not None:
                        seen[walker.met.layer].append(_thinned(walker.met.values, sample.samples))
                    walker.advance()
            finally:
                with uninterrupted():
                    walker.replica.close()
    found = {name: _normalized(job.before[name], rows) for name, rows in seen.items() if rows}
    return {name: _histogram(values) for name, values in found.items() if values.size}


def _thinned(rows: np.ndarray, samples: int) -> np.ndarray:
    most = max(1, MOST * RUN // (max(samples, RUN) * rows.shape[1]))
    return rows[:: -(-len(rows) // most)]


def _normalized(layer: BatchNorm, rows: list[np.ndarray]) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (np.concatenate(rows).astype(np.float64) - layer.stats[0]) / layer.std
    return values[np.isfinite(values)]


def _histogram(values: np.ndarray) -> Histogram:
    least, most = np.quantile(values, [TAIL, 1 - TAIL])
    edges = np.linspace(min(-NARROW, float(least)), max(NARROW, float(most)), BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return edges, counts
