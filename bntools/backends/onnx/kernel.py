"""Moments of an array in one pass at the speed of memory, accurate whatever the count and the mean."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise

import numpy as np

from bntools.moments import Moments

MOST_THREADS = 4  # they read memory, which few of them saturate
RUN = 4096  # values added up in float32, in 16 lanes or more, before float64 takes over: an error of some 1e-7
PIECE = 1 << 19  # values that stay in the cache between two looks at them
OFFSET = 32.0  # mean square against variance, beyond which float32 squares lose more than 1e-6 of the variance

Sums = tuple[np.ndarray, np.ndarray]


def moments_of(x: np.ndarray, per_sample: bool = False) -> tuple[Moments, Moments | None]:
    """Moments of a layer's input of shape (N, C, ...) per channel C, and over the N samples' own means if asked for.

    Half precision is measured in float32. Short runs of values give their sum and their sum of squares
    in float32, which are merged in float64. Where the mean is large against the spread, which would
    cancel in the squares, the values are measured again about their mean, and where the squares of
    finite values overflow, in float64.
    """
    if x.dtype not in (np.float16, np.float32) or x.ndim < 3 or not x.size:
        return Moments.of(x), _of_means(x.reshape(*x.shape[:2], -1).mean(-1, np.float64), per_sample)
    samples, channels = x.shape[:2]
    rows = x.astype(np.float32, copy=False).reshape(samples * channels, -1)
    length = rows.shape[1]
    count = samples * length
    sums, squares = (total.reshape(samples, channels) for total in _sums(rows, None))
    mean, square = sums.sum(0) / count, squares.sum(0)
    if not np.isfinite(square).all() and np.isfinite(x).all():
        return moments_of(x.astype(np.float64), per_sample)
    m2 = square - mean * mean * count
    if (square > OFFSET * m2).any() and np.isfinite(square).all():
        about = mean.astype(np.float32)
        offs, squares = (total.reshape(samples, channels) for total in _sums(rows, np.tile(about, samples)[:, None]))
        off, sums = offs.sum(0), offs + about.astype(np.float64) * length
        mean, m2 = about + off / count, squares.sum(0) - off * off / count
    return Moments(count, mean, np.maximum(m2, 0)), _of_means(sums / length, per_sample)


def _of_means(means: np.ndarray, wanted: bool) -> Moments | None:
    return Moments.of(means) if wanted else None


def _sums(rows: np.ndarray, about: np.ndarray | None) -> Sums:
    """Sum and sum of squares of each row in float64, about a number each, of shape (rows, 1), or about zero."""
    step = max(1, PIECE // rows.shape[1])

    def measure(share: range) -> list[Sums]:
        pieces = (slice(first, min(first + step, share.stop)) for first in range(share.start, share.stop, step))
        return [_of_rows(rows[piece], None if about is None else about[piece]) for piece in pieces]

    shares = _threads() if rows.size > PIECE else 1
    edges = np.linspace(0, len(rows), shares + 1).astype(int)
    ranges = [range(a, b) for a, b in pairwise(edges.tolist())]
    measured: Iterable[list[Sums]] = map(measure, ranges) if shares == 1 else _pool(os.getpid()).map(measure, ranges)
    sums, squares = zip(*chain.from_iterable(measured), strict=True)
    return np.concatenate(sums), np.concatenate(squares)


def _of_rows(rows: np.ndarray, about: np.ndarray | None) -> Sums:
    sums, squares = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, rows.shape[1], RUN):
        values = rows[:, start : start + RUN]
        values = values if about is None else values - about
        sums += np.einsum("ij->i", values)
        squares += np.einsum("ij,ij->i", values, values)
    return sums, squares


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS and Windows lack
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: those of its parent are not there after a fork."""
    return ThreadPoolExecutor(_threads(), thread_name_prefix="bntools-moments")
