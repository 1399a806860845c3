"""One thread at a time on a model: a second one is refused before it begins, instead of both measuring nonsense."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from bntools.errors import BntoolsError


class _Claim:
    """That a thread has some parts of models; None once it has let go of them."""

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()


_lock = threading.RLock()
# Part of a model -> who has it. A claim goes with the block that made it, also where Ctrl-C kept that from letting go.
_claims: WeakValueDictionary[Hashable, _Claim] = WeakValueDictionary()


@contextmanager
def alone(parts: set[Hashable]) -> Iterator[None]:
    """Have these parts of a model for this thread alone; blocks inside of the block may ask for them again.

    Raises BntoolsError at once where another thread has one of them.
    """
    with _lock:
        check(parts)
        claim = _Claim()
        _claims.update({part: claim for part in parts if _holder(part) is None})
    try:
        yield
    finally:
        claim.thread = None


def check(parts: set[Hashable]) -> None:
    """Raise BntoolsError where another thread has one of these parts."""
    with _lock:
        taken = any(_holder(part) not in (None, threading.get_ident()) for part in parts)
    if taken:
        raise BntoolsError(
            "bntools is at work on this model, or on a part of it, in another thread: wait for that, or give each "
            "thread a copy of its own (copy.deepcopy)"
        )


def _holder(part: Hashable) -> int | None:
    claim = _claims.get(part)
    return None if claim is None else claim.thread
