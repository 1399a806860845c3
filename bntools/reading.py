"""How data is to be read: the options of ``data.open``, checked, and what they do to a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from math import isfinite, prod
from typing import Any

import numpy as np

from bntools.errors import BntoolsError
from bntools.preprocessing import preprocessed

MOST_PIXELS = 89_478_485  # what Pillow, too, takes for the most of an honest image
LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True)
class Reading:
    """The options of :func:`bntools.data.open`, which describes them.

    Raises BntoolsError, when made, for values that contradict each other or make no sense.
    """

    channels: int | None
    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    batch_size: int
    max_samples: int | None
    seed: int
    layout: str
    raw: tuple[str, ...] = ()
    preprocess: str | None = None
    shard: tuple[int, int, int] | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        problems = {
            f"batch_size={self.batch_size}: expected at least 1": self.batch_size < 1,
            f"max_samples={self.max_samples}: expected at least 1": self.max_samples is not None
            and self.max_samples < 1,
            f"layout={self.layout!r}: expected {' or '.join(LAYOUTS)}": self.layout not in LAYOUTS,
            f"size={self.size}: expected (height, width) in pixels": self.size is not None
            and (len(self.size) != 2 or min(self.size) < 1),
            f"size={self.size}: more than {MOST_PIXELS:,} pixels an image": self.size is not None
            and prod(self.size) > MOST_PIXELS,
            f"mean={self.mean} and std={self.std}: expected finite numbers": not all(
                map(isfinite, (*(self.mean or ()), *(self.std or ())))
            ),
            f"shard={self.shard}: expected (rank, count, together) with 0 <= rank < count": self.shard is not None
            and not (len(self.shard) == 3 and 0 <= self.shard[0] < self.shard[1] and self.shard[2] > 0),
            "mean= and std= are for floating-point inputs, and this one takes whole numbers": "" in self.raw
            and self.mean is not None,
            "preprocess= does its own scaling: leave mean= and std= out": self.preprocess is not None
            and (self.mean is not None or self.std is not None),
            "preprocess= gives floating-point numbers, and this input takes whole ones": "" in self.raw
            and self.preprocess is not None,
            "mean= and std= belong together: give both": (self.mean is None) != (self.std is None),
            f"std={self.std}: it divides, so its numbers must be positive": self.std is not None and min(self.std) <= 0,
            f"mean= has {len(self.mean or ())} numbers and std= {len(self.std or ())}": len(self.mean or ())
            != len(self.std or ()),
        }
        for message, holds in problems.items():
            if holds:
                raise BntoolsError(message)

    @property
    def channels_last(self) -> bool:
        """Whether image batches have their channels on the last axis."""
        return self.layout == "NHWC"

    def scales(self, name: str = "") -> bool:
        """Whether the 8-bit images of this name, or of a folder, are scaled to 0..1."""
        return name not in self.raw

    @property
    def scaling(self) -> str:
        """What becomes of the values of images that are scaled, for a record."""
        return "0..1" if self.preprocess is None else f"keras.applications.{self.preprocess}.preprocess_input"

    @property
    def scaled(self) -> str:
        """The same for people."""
        return "scaled to 0..1" if self.preprocess is None else f"preprocessed for {self.preprocess}"

    def record(self) -> dict[str, Any]:
        """The options as they go into a record, and back into ``data.open``: those of the whole data."""
        return {name: value for name, value in asdict(self).items() if name != "shard"}

    def dealt(self, order: np.ndarray) -> np.ndarray:
        """What of an order of samples this process is to read."""
        if self.shard is None:
            return order
        rank, count, together = self.shard
        return order[np.arange(len(order)) // together % count == rank]

    def share(self, stream: Iterable[Any], most: int | None = None) -> Iterator[Any]:
        """The same of samples that come as they come: of the first ``max_samples``; with ``most`` so many of all."""
        limits = [limit for limit in (self.max_samples, most) if limit is not None]
        limited = islice(stream, min(limits, default=None))
        if self.shard is None or most is not None:
            return limited
        rank, count, together = self.shard
        return (sample for place, sample in enumerate(limited) if place // together % count == rank)

    def check_channels(self, source: str, channels: int) -> None:
        """Refuse a mean that does not have one number (or one for all) for each channel of the data, or grey images
        for a preprocessing of colours.
        """
        if self.preprocess is not None and channels != 3:
            raise BntoolsError(f"{source}: preprocess={self.preprocess!r} is for 3 channels (RGB), not {channels}")
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise BntoolsError(f"{source}: mean= has {len(self.mean)} numbers, but the data has {channels} channels")

    def normalized(self, batch: np.ndarray) -> np.ndarray:
        """A float batch of shape (samples, channels, ...) with the mean subtracted and divided by std.

        Or, of images in 0..1, as ``preprocess`` makes them.
        """
        if self.preprocess is not None:
            return preprocessed(self.preprocess, batch)
        if self.mean is None or self.std is None:
            return batch
        mean, std = (np.reshape(v, (1, -1, *[1] * (batch.ndim - 2))).astype(batch.dtype) for v in (self.mean, self.std))
        return (batch - mean) / std
