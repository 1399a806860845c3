"""The processes of a distributed training."""

from __future__ import annotations

from typing import Any

from torch import distributed


def on_all_ranks(value: Any) -> list[Any]:
    """The value that each process has handed in, by rank; its own alone where there is one process.

    Every process has to call it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, value)
    return every
