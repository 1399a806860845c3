"""Short digests that tell one model's numbers from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bntools.resizing import to_numpy

HEX = 16  # digits: 64 bits tell models apart, and nobody is kept from forging one


def digest(*data: Any) -> str:
    """The digest of bytes, or of several one after the other."""
    result = hashlib.blake2b(digest_size=HEX // 2)
    for one in data:
        result.update(one)
    return result.hexdigest()


def combined(weights: Iterable[tuple[str, tuple[int, ...], Any]]) -> str:
    """A digest of weights, each as dtype, shape and bytes; neither their names nor their order matter."""
    parts = sorted(digest(f"{dtype} {tuple(shape)} ".encode(), data) for dtype, shape, data in weights)
    return digest("".join(parts).encode())


def of_batch(content: Any) -> str | None:
    """A digest of the first array of a batch; None where it has none."""
    values = list(content.values()) if isinstance(content, Mapping) else content
    first = (
        next((one for one in values if hasattr(one, "shape")), None) if isinstance(values, (tuple, list)) else values
    )
    return digest(np.ascontiguousarray(to_numpy(first)).tobytes()) if hasattr(first, "shape") else None
