"""Processes that work together, as threads of one: what they hand in meets at a barrier."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

from bntools.processes import Group


class Thread:
    """One of several; it exchanges copies, as a process would. ``lost`` ranks break the connection."""

    def __init__(self, rank, places, barrier):
        self.rank, self.size, self._places, self._barrier = rank, len(places), places, barrier
        self.device = f"device of {rank}"
        self.exchanges = 0

    def exchange(self, value):
        self.exchanges += 1
        self._places[self.rank] = pickle.dumps(value)
        self._barrier.wait(60)
        every = [pickle.loads(place) for place in self._places]
        self._barrier.wait(60)
        return every

    def absent(self, seconds):
        return []


def together(size, work):
    """What ``work(group)`` returns or raises on each of ``size`` ranks."""
    places, barrier = [b""] * size, threading.Barrier(size)

    def run(rank):
        try:
            return work(Group(Thread(rank, places, barrier), patience=60))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
