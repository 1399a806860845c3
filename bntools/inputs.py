"""Input: what a model file says about one of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bntools.errors import BntoolsError

SAMPLES = 2  # of random input, where the model takes any number


@dataclass(frozen=True)
class Input:
    """One input of a model: its name, NumPy's name of its dtype, and its shape, None for an axis of any size.

    ``shape`` is None where not even the rank is known. ``channel_axis`` is that of images, 1 or 3, and None for
    anything else; ``channels`` is how many of them there are, None where nothing says so. ``pixels`` holds for floats
    that the model itself scales from 0..255.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    channel_axis: int | None = None
    channels: int | None = None
    pixels: bool = False

    @property
    def batch(self) -> int | None:
        """The batch size that the model is bound to; None where it takes any."""
        return self.shape[0] if self.shape else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images; None where they are free, or it takes no images."""
        if self.shape is None or self.channel_axis is None:
            return None
        height, width = self.shape[2:] if self.channel_axis == 1 else self.shape[1:3]
        return None if height is None or width is None else (height, width)

    @property
    def integer(self) -> bool:
        """Whether it takes whole numbers: images of 8 bits are then given as they are."""
        return np.dtype(self.dtype).kind in "iu"

    def __str__(self) -> str:
        shape = "?" if self.shape is None else ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name!r} ({shape})"


def random(inputs: list[Input], seed: int, shape: tuple[int, ...] | None = None) -> Any:
    """Random input, a dict by name or, for a single input, an array. ``shape`` is that of a sample of the only one.

    Floats are normal, whole numbers 0 or 1, those of images 0 to 255. Raises BntoolsError where an axis is free.
    """
    generator = np.random.default_rng(seed)
    if shape is not None and len(inputs) == 1:
        return _drawn(inputs[0], (inputs[0].batch or SAMPLES, *shape), generator)
    values = {}
    for one in inputs:
        if one.shape is None or None in one.shape[1:]:
            raise BntoolsError(f"the model takes any size at its input {one}: give DATA, or --shape of one sample")
        fixed = [size or SAMPLES for size in one.shape]
        values[one.name] = _drawn(one, tuple(fixed), generator)
    return next(iter(values.values())) if len(values) == 1 else values


def _drawn(one: Input, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(one.dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    return generator.integers(0, 256 if one.channel_axis and dtype.itemsize == 1 else 2, shape).astype(dtype)
