"""Parts of the data against all of it: domains, the halves of its course, the calls of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bntools.diagnosed import Domain


def compare(model: Any, parts: Mapping[str, Any], *, forward: Callable[[Any, Any], Any] | None = None) -> list[Domain]:
    """How far each part of the data, a mapping of names to batches, is from all of them together."""
    return []


def course(
    model: Any, contents: Iterable[Any], *, forward: Callable[[Any, Any], Any] | None = None
) -> tuple[list[Domain], dict[str, tuple[int, float]]]:
    """The halves of the data in its order (``Diagnosis.course``), and per layer ``calls`` and ``call_gap``."""
    return [], {}
