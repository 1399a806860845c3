"""Moments of an array in one pass at the speed of memory, accurate whatever the count and the mean."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from os import cpu_count

import numpy as np

from bntools.moments import Moments

RUN = 4096  # values added up in float32, in 16 lanes or more, before float64 takes over: an error of some 1e-7
LARGE = 1 << 18  # values from which a second thread pays
OFFSET = 32.0  # mean square against variance, beyond which float32 squares lose more than 1e-6 of the variance

_threads = ThreadPoolExecutor(min(4, cpu_count() or 1), thread_name_prefix="bntools-moments")


def moments_of(x: np.ndarray, per_sample: bool = False) -> tuple[Moments, Moments | None]:
    """Moments of a layer's input of shape (N, C, ...) per channel C, and over the N samples' own means if asked for.

    Half precision is measured in float32. Every run of at most RUN values gives its sum and its sum of
    squares in float32; they are merged in float64. Where the mean is large against the spread, which
    would cancel in the squares, the values are measured again about their mean.
    """
    if x.dtype not in (np.float16, np.float32) or x.ndim < 3 or not x.size:
        return Moments.of(x), _over_samples(x.reshape(*x.shape[:2], -1).mean(-1, np.float64)) if per_sample else None
    samples, channels = x.shape[:2]
    rows = x.astype(np.float32, copy=False).reshape(samples * channels, -1)
    length = rows.shape[1]
    sums, squares = (total.reshape(samples, channels) for total in _sums(rows, None))
    mean = sums.sum(0) / (samples * length)
    m2 = squares.sum(0) - mean * mean * (samples * length)
    if (squares.sum(0) > OFFSET * m2).any() and np.isfinite(mean).all():
        about = np.tile(mean.astype(np.float32), samples)
        off, squares = (total.reshape(samples, channels).sum(0) for total in _sums(rows, about))
        m2 = squares - off * off / (samples * length)
        mean = mean.astype(np.float32) + off / (samples * length)
    moments = Moments(samples * length, mean, np.maximum(m2, 0))
    return moments, _over_samples(sums / length) if per_sample else None


def _over_samples(means: np.ndarray) -> Moments:
    return Moments.of(means)


def _sums(rows: np.ndarray, about: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares of each row in float64, about one value per row or about zero."""
    if rows.size < LARGE:
        return _sums_of_part(rows, about)
    parts = min(len(rows), _threads._max_workers)
    edges = np.linspace(0, len(rows), parts + 1).astype(int)
    pieces = [slice(a, b) for a, b in pairwise(edges)]
    done = _threads.map(lambda piece: _sums_of_part(rows[piece], None if about is None else about[piece]), pieces)
    sums, squares = zip(*done, strict=True)
    return np.concatenate(sums), np.concatenate(squares)


def _sums_of_part(rows: np.ndarray, about: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    sums, squares = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, rows.shape[1], RUN):
        run = rows[:, start : start + RUN]
        step = len(run) if about is None else max(1, RUN * 16 // run.shape[1])  # what is copied stays in the cache
        for first in range(0, len(run), step):
            part = slice(first, first + step)
            values = run[part] if about is None else run[part] - about[part, None]
            sums[part] += np.einsum("ij->i", values)
            squares[part] += np.einsum("ij,ij->i", values, values)
    return sums, squares
