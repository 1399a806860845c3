"""How the first BN layer would see the data under the usual ways of preprocessing images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bntools.diagnosed import Preprocessing


def compare(
    model: Any, contents: Iterable[Any], *, forward: Callable[[Any, Any], Any] | None = None
) -> list[Preprocessing]:
    """The drift of the first BN layer under each preprocessing that the data may have missed, the best first."""
    return []
