"""Moments of an array in one pass at the speed of memory, accurate whatever the count and the mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np

from bntools.moments import Moments

MOST_THREADS = 4  # they read memory, which few of them saturate
RUN = 4096  # values added up in float32, in 16 lanes or more, before float64 takes over: an error of some 1e-7
PIECE = 1 << 19  # values that stay in the cache between two looks at them
WIDTH = 1024  # numbers in a row of channels that lie last: several pixels side by side where a pixel has fewer
ROWS = 256  # rows added up in float32 before float64 takes over
OFFSET = 32.0  # mean square against variance, beyond which float32 squares lose more than 1e-6 of the variance

Sums = tuple[np.ndarray, np.ndarray]


def moments_of(x: np.ndarray, per_sample: bool = False, axis: int = 1) -> tuple[Moments, np.ndarray | None]:
    """Moments of a layer's input of shape (N, ...) per channel, and the N samples' own means if asked for.

    The channels lie on ``axis``; the means have shape (N, channels).
    Half precision is measured in float32. Short runs of values give their sum and their sum of squares
    in float32, which are merged in float64. Where the mean is large against the spread, which would
    cancel in the squares, the values are measured again about their mean, and where the squares of
    finite values overflow, in float64.
    """
    if x.ndim > 2 and axis % x.ndim == x.ndim - 1:
        return _channels_last(x, per_sample)
    x = x if axis % x.ndim == 1 else np.ascontiguousarray(np.moveaxis(x, axis, 1))
    if x.dtype not in (np.float16, np.float32) or x.ndim < 3 or not x.size:
        return Moments.of(x), _means(x) if per_sample else None
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
    return Moments(count, mean, np.maximum(m2, 0)), sums / length if per_sample else None


def _channels_last(x: np.ndarray, per_sample: bool) -> tuple[Moments, np.ndarray | None]:
    means = x.reshape(len(x), -1, x.shape[-1]).mean(1, np.float64) if per_sample and x.size else None
    if x.dtype not in (np.float16, np.float32) or not x.size:
        return Moments.of(x, axis=-1), means
    rows = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])
    count = len(rows)
    sums, square = _column_sums(rows, None)
    mean = sums / count
    if not np.isfinite(square).all() and np.isfinite(x).all():
        return _channels_last(x.astype(np.float64), per_sample)
    m2 = square - mean * mean * count
    if (square > OFFSET * m2).any() and np.isfinite(square).all():
        about = mean.astype(np.float32)
        offs, square = _column_sums(rows, about)
        mean, m2 = about + offs / count, square - offs * offs / count
    return Moments(count, mean, np.maximum(m2, 0)), means


def _column_sums(rows: np.ndarray, about: np.ndarray | None) -> Sums:
    """Sum and sum of squares of each column in float64, about a number each, of shape (columns,), or about zero.

    The memory of (M, C) is read as (M / K, K * C), which are K sets of rows side by side: long enough to add them up
    fast, and few enough of them one above the other to add them up exactly.
    """
    count, channels = rows.shape
    beside = max(1, min(WIDTH // channels, count))
    head = count // beside * beside
    wide = rows[:head].reshape(-1, beside * channels)
    centre = None if about is None else np.tile(about, beside)

    def measure(share: range) -> np.ndarray:
        totals = np.zeros((2, channels))
        for start in share:
            block = wide[start : start + ROWS]
            values = block if centre is None else block - centre
            sums = np.einsum("ij->j", values), np.einsum("ij,ij->j", values, values)
            totals += np.asarray(sums, np.float64).reshape(2, beside, channels).sum(1)
        return totals

    starts = range(0, len(wide), ROWS)
    shares = _threads() if rows.size > PIECE else 1
    totals = np.sum(_each(measure, [starts[i::shares] for i in range(shares)]), axis=0)
    if head < count:
        totals += _column_sums(rows[head:], about)
    return totals[0], totals[1]


def _means(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.reshape(*x.shape[:2], -1).mean(-1, np.float64)) if x.size else np.zeros((0, x.shape[1]))


def _sums(rows: np.ndarray, about: np.ndarray | None) -> Sums:
    """Sum and sum of squares of each row in float64, about a number each, of shape (rows, 1), or about zero."""
    step = max(1, PIECE // rows.shape[1])

    def measure(share: range) -> list[Sums]:
        pieces = (slice(first, min(first + step, share.stop)) for first in range(share.start, share.stop, step))
        return [_of_rows(rows[piece], None if about is None else about[piece]) for piece in pieces]

    shares = _threads() if rows.size > PIECE else 1
    edges = np.linspace(0, len(rows), shares + 1).astype(int)
    ranges = [range(a, b) for a, b in pairwise(edges.tolist())]
    sums, squares = zip(*chain.from_iterable(_each(measure, ranges)), strict=True)
    return np.concatenate(sums), np.concatenate(squares)


def _of_rows(rows: np.ndarray, about: np.ndarray | None) -> Sums:
    sums, squares = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, rows.shape[1], RUN):
        values = rows[:, start : start + RUN]
        values = values if about is None else values - about
        sums += np.einsum("ij->i", values)
        squares += np.einsum("ij,ij->i", values, values)
    return sums, squares


def _each(measure: Callable[[range], Any], shares: list[range]) -> list[Any]:
    """What each share of the work gives, in threads where there are several."""
    return list(map(measure, shares) if len(shares) == 1 else _pool(os.getpid()).map(measure, shares))


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS and Windows lack
    return min(MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process: those of its parent are not there after a fork."""
    return ThreadPoolExecutor(_threads(), thread_name_prefix="bntools-moments")
