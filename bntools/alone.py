"""One thread at a time on a model: a second one is refused before it begins, instead of both measuring nonsense."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from bntools.errors import BntoolsError

_lock = threading.RLock()
_users: dict[Hashable, int] = {}  # part of a model -> the thread that has it, as many times as is counted here
_times: Counter[Hashable] = Counter()


@contextmanager
def alone(parts: set[Hashable]) -> Iterator[None]:
    """Have these parts of a model for this thread alone, as often as it likes.

    Raises BntoolsError at once where another thread has one of them.
    """
    with _lock:
        check(parts)
        _times.update(parts)
        _users.update(dict.fromkeys(parts, threading.get_ident()))
    try:
        yield
    finally:
        with _lock:
            _times.subtract(parts)
            for part in parts:
                if not _times[part]:
                    del _times[part], _users[part]


def check(parts: set[Hashable]) -> None:
    """Raise BntoolsError where another thread has one of these parts."""
    with _lock:
        taken = [part for part in parts & _users.keys() if _users[part] != threading.get_ident()]
    if taken:
        raise BntoolsError(
            "bntools is at work on this model, or on a part of it, in another thread: wait for that, or give each "
            "thread a copy of its own (copy.deepcopy)"
        )
