"""The processes that measure one model together, each on its own share of the data.

All of them take the same steps. What one has measured reaches the others through ``gather``, and so does the news
that one has failed: it takes part in the next gather with its error in place of a value, whichever that is.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from bntools.batches import said
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted

PATIENCE = 300.0  # seconds in which all processes have to call


class Peers(Protocol):
    """How this process reaches those that it works with; ranks count from 0."""

    rank: int
    size: int
    device: str  # on which this process computes

    def exchange(self, value: Any) -> list[Any]:
        """What every process has handed in, by rank. Every one has to call it."""

    def absent(self, seconds: float) -> list[int]:
        """The ranks that have not come here, too, within some seconds. Raises BntoolsError if they have given up."""


class PeerError(BntoolsError):
    """Another process has failed; its own message says why."""


class LostError(BntoolsError):
    """Another process has ended without a word, or cannot be reached."""


class Group:
    """The processes that work together; without ``peers`` this one alone, at no cost.

    ``patience`` is how many seconds to wait until all have come together. It is None where they were started together
    and end together: then nobody has to be told of a failure either, which would wait for what the others do.
    """

    def __init__(self, peers: Peers | None = None, patience: float | None = None):
        self._peers = peers if peers is not None and peers.size > 1 else None
        self._patience = patience
        self._over = False  # nobody takes part in another exchange
        self._processes: list[tuple[str, int]] = []  # host and number of each
        self.sharing = 1  # how many of them compute on the device of this one

    @property
    def rank(self) -> int:
        """The place of this process among them, from 0."""
        return 0 if self._peers is None else self._peers.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self._peers is None else self._peers.size

    def gather(self, value: Any) -> list[Any]:
        """What every process has handed in, by rank; it has to be picklable where there are several.

        Raises PeerError where another process has failed meanwhile, LostError where one has died.
        """
        if self._peers is None:
            return [value]
        every = self._exchange((None, value))
        for rank, (failure, _) in enumerate(every):
            if failure is not None:
                self._over = True
                raise PeerError(f"rank {rank} of {self.size} has failed: {failure}")
        return [value for _, value in every]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait until all have come here; if the block fails, let the others know."""
        if self._peers is None:
            yield
            return
        try:
            self._meet(self._peers)
            yield
        except Exception as error:
            if not self._over and self._patience is not None:
                self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        text = str(error) if isinstance(error, BntoolsError) else said(error)
        with suppress(LostError):  # nobody is left to be told
            self._exchange((" ".join(text.split()), None))

    def dead(self) -> str:
        """The processes of this machine that have ended, in words; empty if there is none."""
        dead = [rank for rank, process in enumerate(self._processes) if _is_dead(*process)]
        return f"{_ranks(dead)} of {self.size}" if dead else ""

    def _meet(self, peers: Peers) -> None:
        if self._patience is not None:
            try:
                absent = peers.absent(self._patience)
            except BntoolsError:
                self._over = True
                raise
            if absent:
                self._over = True
                raise BntoolsError(
                    f"{_ranks(absent)} of {self.size} did not call within {self._patience:g} s: every process of the "
                    f"group has to call, also one that has no data"
                )
        host = platform.node()
        devices = self.gather((host, peers.device))
        self.sharing = devices.count((host, peers.device))
        self._processes = self.gather((host, os.getpid()))

    def _exchange(self, value: Any) -> list[Any]:
        assert self._peers is not None
        try:
            with uninterrupted():  # halfway through, this process and the others would wait for different things
                return self._peers.exchange(value)
        except Exception as error:
            self._over = True
            dead = self.dead()
            who = f"{dead} has died" if dead else f"one of {self.size} processes has died, or cannot be reached"
            raise LostError(f"{who} (killed, or out of memory?): nothing was changed") from error


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _is_dead(host: str, pid: int) -> bool:
    """Whether a process of this machine has ended; of another one nobody knows."""
    if host != platform.node():
        return False
    import psutil  # comes with the back ends, of which commands are parsed without one

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
