"""Images whose values are of another magnitude than those of the others.

One image in 0..255 among thousands in 0..1, or one hot pixel, decides a mean and a variance alone. No preprocessing of
all images mends that, nor do other statistics: such images are left out, or read as the others are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bntools.words import number

TIMES = 50  # the largest value of a usual image: no camera and no light gives more where that fits its range
USUAL = 0.25  # of the images, by their largest value, are below the usual one: half of them may be in another range
ENOUGH = 8  # images, from which on there is a usual one


def limit(batches: Sequence[np.ndarray]) -> float | None:
    """The magnitude above which images, (N, ...) each, are wild; None where none are."""
    peaks = np.concatenate([peak(images) for images in batches])
    bound = float(f"{TIMES * np.quantile(peaks, USUAL):.3g}")
    return bound if bound > 0 and len(peaks) >= ENOUGH and (peaks > bound).any() else None


def peak(images: np.ndarray) -> np.ndarray:
    """The largest magnitude in each image, float64 of shape (N,)."""
    flat = images.reshape(len(images), -1)
    return np.maximum(flat.max(1).astype(np.float64), -flat.min(1).astype(np.float64))


def told(batches: Sequence[np.ndarray], bound: float) -> str:
    """How many images are above the bound, and by how much."""
    peaks = np.concatenate([peak(images) for images in batches])
    few, rest = peaks[peaks > bound], peaks[peaks <= bound]
    return f"without {len(few):,} of {len(peaks):,} images (up to {number(few.max())}, others {number(rest.max())})"
