"""torch.compile switched off while replicas run: for all threads that want it, until the last has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Compiled models run as eager code: a compiled graph cannot be stopped at its layers.

    PyTorch's stance is one for the whole process; set by each thread for itself, the last one to leave
    would put back what another had set.
    """
    global _users, _stance
    with _lock:
        _users += 1
        if _users == 1:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _stance.__exit__(None, None, None)
