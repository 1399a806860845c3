"""Memory for values that cross a cut, used again and again: fresh pages would cost as much as a convolution."""

from __future__ import annotations

from collections import defaultdict

import numpy as np


class Buffers:
    """Hands out arrays and takes them back. What nobody took since the last ``trim`` is let go."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._used: set[int] = set()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with arbitrary content."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._used.add(size)
        free = self._free[size]
        memory = free.pop() if free else np.empty(size, np.uint8)
        return memory.view(dtype).reshape(shape)

    def give_back(self, array: np.ndarray) -> None:
        """Take an array that was handed out here; others are left alone."""
        memory = array
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        if memory.dtype == np.uint8 and memory.ndim == 1 and memory.nbytes == array.nbytes:
            self._free[memory.nbytes].append(memory)

    def trim(self) -> None:
        """Let go of what was not asked for since the last time."""
        self._free = defaultdict(list, {size: free for size, free in self._free.items() if size in self._used})
        self._used.clear()
