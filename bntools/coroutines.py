"""Eager code that waits in the middle: what the replicas of every eager framework share.

A replica's forward pass is a greenlet, which waits at a BN layer with all of its frames as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from bntools.errors import BntoolsError

DEPTH = 4  # of containers in containers that are looked into


def made(run: Callable[[], None]) -> greenlet:
    """A coroutine that is to run this, with its own copy of the context variables."""
    coroutine = greenlet(run)
    coroutine.gr_context = copy_context()
    return coroutine


def end(coroutine: greenlet, resuming: Callable[[], None]) -> None:
    """End a coroutine where it waits, context managers and finally blocks included; ``resuming()`` comes before."""
    for _ in range(3):  # a bare except in the model may swallow the first
        if coroutine.dead:
            return
        resuming()
        coroutine.throw(GreenletExit)


def is_current(coroutine: greenlet) -> bool:
    """Whether the calling code is this coroutine's."""
    return getcurrent() is coroutine


def check_current(coroutine: greenlet) -> None:
    """Raise BntoolsError where the calling code is not this coroutine's."""
    if not is_current(coroutine):
        raise BntoolsError(
            "a BN layer ran in another thread than the forward pass that bntools measures: run the model itself "
            "elsewhere (copy.deepcopy) while it is recalibrated, and its layers in one thread"
        )


def held(coroutine: greenlet) -> Iterator[Any]:
    """What the local variables of a waiting coroutine hold, also in lists, tuples and dicts."""
    frame = coroutine.gr_frame
    while frame is not None:
        yield from leaves(frame.f_locals.values())
        frame = frame.f_back


def leaves(values: Iterable[Any], depth: int = DEPTH) -> Iterator[Any]:
    """The values, and those inside of lists, tuples and dicts instead of these."""
    for value in values:
        if type(value) not in (list, tuple, dict):
            yield value
        elif depth:
            yield from leaves(value.values() if type(value) is dict else value, depth - 1)
