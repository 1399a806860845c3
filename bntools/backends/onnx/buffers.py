"""Memory for values that cross a cut, used again and again: fresh pages can cost more than a convolution."""

from __future__ import annotations

import numpy as np

ALIGN = 64  # bytes of a cache line and of the widest vectors
AGE = 6  # stages: what a residual network holds comes and goes within its blocks


class Buffers:
    """Hands out arrays from slabs of memory and takes them back; slabs that have gone out of use are let go.

    A value takes the smallest gap that holds it, so that what was one large value serves for several small ones.
    """

    def __init__(self) -> None:
        self._gaps: dict[int, dict[int, int]] = {}  # slab -> start -> stop of what is free in it
        self._slabs: dict[int, np.ndarray] = {}
        self._given: dict[int, tuple[int, int, int]] = {}  # address -> slab, start, stop
        self._used: dict[int, int] = {}  # slab -> the last stage in which something was taken from it
        self._stage = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with arbitrary content."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        room = max(ALIGN, -(-size // ALIGN) * ALIGN)
        fits = [
            (stop - start, slab, start)
            for slab, gaps in self._gaps.items()
            for start, stop in gaps.items()
            if stop - start >= room
        ]
        slab, start = min(fits)[1:] if fits else (self._new_slab(room), 0)
        stop = self._gaps[slab].pop(start)
        if stop > start + room:
            self._gaps[slab][start + room] = stop
        self._used[slab] = self._stage
        memory = self._slabs[slab][start : start + size]
        self._given[memory.ctypes.data] = slab, start, start + room
        return memory.view(dtype).reshape(shape)

    def give_back(self, array: np.ndarray) -> None:
        """Take an array that was handed out here; others are left alone."""
        slab, start, stop = self._given.pop(array.ctypes.data, (-1, 0, 0))
        if slab < 0:
            return
        gaps = self._gaps[slab]
        before = next((first for first, last in gaps.items() if last == start), None)
        if before is not None:
            del gaps[before]
            start = before
        gaps[start] = gaps.pop(stop, stop)

    def next_stage(self) -> None:
        """Let go of slabs that are free and have been for a while."""
        self._stage += 1
        for slab in list(self._slabs):
            free = self._gaps[slab].get(0) == len(self._slabs[slab])
            if free and self._used[slab] < self._stage - AGE:
                del self._slabs[slab], self._gaps[slab], self._used[slab]

    def _new_slab(self, size: int) -> int:
        memory = np.empty(size + ALIGN, np.uint8)
        shift = -memory.ctypes.data % ALIGN
        name = max(self._slabs, default=0) + 1
        self._slabs[name] = memory[shift : shift + size]
        self._gaps[name] = {0: size}
        return name
