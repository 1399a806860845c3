"""Enough is enough: of 50,000 images, a tolerance of 0.01 takes a small share, and keeps its promise."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import textures
import torch
from measure import Row, at_most
from networks import vision

import bntools
from bntools import data, recalibration
from bntools.course import Course

IMAGES, SIZE = 50_000, 48
TOLERANCE = 0.01
SEEDS = range(1, 6)
MEMORY = 1 << 30
KEPT = Path(tempfile.gettempdir()) / f"bntools-textures-{IMAGES}-{SIZE}"  # written once: it takes a minute


def rows(images: int = IMAGES, size: int = SIZE, folder: Path = KEPT) -> Iterator[Row]:
    """ResNet-18 on a folder of textures: all images once, then what the tolerance takes of them, drawn five times."""
    textures.write(folder, images, size)
    torch.manual_seed(0)
    model = vision.resnet18()
    everything, time_of_all, _ = _measured(model, folder, seed=0, tolerance=None)
    draws = [_measured(model, folder, seed, TOLERANCE) for seed in SEEDS]
    errors = [_errors(result, courses, everything) for result, _, courses in draws]
    z = np.stack([one[0] for one in errors])
    share = max(result.samples / images for result, _, _ in draws)
    what = f"ResNet-18, {images:,} JPEGs of {size} px, tolerance {TOLERANCE:g}, {len(z)} draws"
    yield at_most(f"{what}: largest share of the images used", share, 0.25, "{:.3f}")
    ratio = np.median([took for _, took, _ in draws]) / time_of_all
    yield Row(f"{what}: time / that of all images (median)", f"{ratio:.2f} x", "", True)
    yield at_most(f"{what}: promised standard error, largest", max(r.standard_error for r, _, _ in draws), TOLERANCE)
    worst = max(float(one[1].max()) for one in errors)
    yield at_most(f"{what}: worst channel's mean, off in std", worst, _bound(z.size) * TOLERANCE, "{:.3g}")
    yield Row(f"{what}: worst channel's std, relative error", f"{max(one[2] for one in errors):.3g}", "", True)
    what += ", distance of each channel's mean in its own standard errors"
    yield at_most(f"{what}: worst of {z.size:,}", float(np.abs(z).max()), _bound(z.size), "{:.2f}")
    yield at_most(f"{what}: root mean square", float(np.sqrt((z**2).mean())), 1.2)
    beyond = float((np.abs(z) > 1.96).mean())
    yield at_most(f"{what}: share beyond 1.96", beyond, 0.1)
    # The channels move together: what the stopping does to all draws alike shows in the mean over draws.
    bias = float(np.abs(z.mean(axis=0)).mean() * np.sqrt(len(z)))
    yield at_most(f"{what}: mean over draws, x sqrt(draws), averaged over channels (0.80 if unbiased)", bias, 1.2)


def _measured(
    model: torch.nn.Module, folder: Path, seed: int, tolerance: float | None
) -> tuple[bntools.recalibration.Recalibration, float, dict[str, Course]]:
    """The result, the seconds it took, and the courses of the samples' means behind its standard error."""
    kept: dict[str, Course] = {}
    original = recalibration.convergence

    def keeping(courses, stds, samples):
        kept.update(courses)
        return original(courses, stds, samples)

    images = data.open(folder, seed=seed, batch_size=50)
    start = time.perf_counter()
    with mock.patch.object(recalibration, "convergence", keeping):
        result = bntools.recalibrate(model, images, tolerance=tolerance, memory=MEMORY, check=False)
    took = time.perf_counter() - start
    result.undo()
    return result, took, kept


def _errors(result, courses: dict[str, Course], everything) -> tuple[np.ndarray, np.ndarray, float]:
    """Of every channel: how far its mean is from that of all images in standard errors, and in stds; and the worst std.

    The error that the rest of the images leaves is less by the share that was used (sampling without replacement).
    """
    expected = {layer.name: layer.after for layer in everything.layers}
    z, off, std = [], [], 0.0
    left = 1 - result.samples / everything.samples
    for layer in result.layers:
        other = expected[layer.name]
        gap = layer.after.mean - other.mean
        z.append(gap / (courses[layer.name].total.standard_error() * np.sqrt(left)))
        off.append(np.abs(gap) / other.std)
        std = max(std, float(np.abs(layer.after.std / other.std - 1).max()))
    return np.concatenate(z), np.concatenate(off), std


def _bound(count: int) -> float:
    """What the largest of so many independent normal numbers stays below, 99 times of 100."""
    low, high = 0.0, 20.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        beyond = count * torch.special.erfc(torch.tensor(middle / 2**0.5, dtype=torch.float64)).item()
        low, high = (middle, high) if beyond > 0.01 else (low, middle)
    return high
