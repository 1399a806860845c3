"""How much memory is free where a model computes."""

from __future__ import annotations

from typing import Any

from bntools.memory import available


def free_memory(model: Any) -> int:
    """Bytes of main memory that could still be allocated: replicas of a Keras model wait there."""
    return available()
