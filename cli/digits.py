"""scikit-learn's digits, and how other cameras see them.

A digit's ink, 0..1, takes the middle half of the grey scale, 0.25..0.75: so a camera that adds 0.5 to
the ink still fits into the eight bits of a PNG, and nothing is clipped that a real image would keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bntools.errors import BntoolsError

TRAINING = 1200  # of 1,797 digits; the others are held out
DARK, RANGE = 0.25, 0.5


@dataclass(frozen=True)
class Digits:
    """Ink (n, 8, 8) float64 in 0..1 and labels (n,) int64, apart for training and held out."""

    ink: np.ndarray
    labels: np.ndarray
    held_out_ink: np.ndarray
    held_out_labels: np.ndarray


def load(seed: int = 0) -> Digits:
    """The digits in random order. Raises BntoolsError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise BntoolsError(f"the digits need the package {error.name!r}: pip install 'bntools[demo]'") from error
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    ink, labels = digits.images[order] / 16, digits.target[order].astype(np.int64)
    return Digits(ink[:TRAINING], labels[:TRAINING], ink[TRAINING:], labels[TRAINING:])


def seen(ink: np.ndarray, camera: str | None = None) -> np.ndarray:
    """Images as a camera takes them, uint8 (n, 8, 8); without one as the training camera does."""
    changed = ink if camera is None else CAMERAS[camera](ink)
    return np.round(255 * np.clip(DARK + RANGE * changed, 0, 1)).astype(np.uint8)


def inputs(images: np.ndarray) -> np.ndarray:
    """What the network gets, (n, 1, 8, 8) float32 in 0..1, as it is read from PNGs."""
    return images[:, None].astype(np.float32) / 255


def write_folder(images: np.ndarray, folder: Path, a_roll: int = 400) -> None:
    """Write images as PNGs, without labels: ``folder/roll-1/0001.png`` and so on."""
    from PIL import Image

    for index, image in enumerate(images):
        place = folder / f"roll-{1 + index // a_roll}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{1 + index:04d}.png")


def _blurred(ink: np.ndarray) -> np.ndarray:
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).mean(axis=(-2, -1))


def _noisy(ink: np.ndarray) -> np.ndarray:
    return ink + np.random.default_rng(1).normal(scale=0.3, size=ink.shape)


CAMERAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contrast": lambda ink: 0.3 * ink,
    "brightness": lambda ink: ink + 0.5,
    "blur": _blurred,
    "noise": _noisy,
}
