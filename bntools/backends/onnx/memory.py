"""How much memory is free where an ONNX model runs."""

from __future__ import annotations

from typing import Any

from bntools.memory import available


def free_memory(model: Any) -> int:
    """Bytes that could still be allocated in main memory: ONNX models are measured on the CPU."""
    return available()
