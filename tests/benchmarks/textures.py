"""A folder of generated images of honest variety: textures, brightness, contrast and colour differ between images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("waves", "checks", "blobs", "grain", "slopes")


def write(folder: Path, images: int, size: int, seed: int = 0) -> None:
    """JPEGs in a folder for each class, always the same for a seed; done only once, if the folder is complete."""
    done = folder / ".complete"
    if done.exists():
        return
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(images):
        name = CLASSES[number % len(CLASSES)]
        picture = Image.fromarray(image(name, size, generator))
        picture.save(folder / name / f"{number:06d}.jpg", quality=90)
    done.touch()


def image(name: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """One image (size, size, 3) of a class, uint8: its texture in two random colours, at random brightness."""
    texture = _texture(name, size, generator)
    light = generator.beta(2, 2) + 0.15 * (CLASSES.index(name) - 2) / 2  # some classes are darker than others
    contrast = generator.uniform(0.05, 0.6)
    colours = generator.normal(0, 1, (2, 3)) * generator.uniform(0.05, 1)
    pixels = light + contrast * (texture[..., None] * (1 + colours[0]) + 0.3 * colours[1])
    pixels += generator.normal(0, generator.uniform(0, 0.05), (size, size, 1))
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _texture(name: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """Values of some -1 to 1, of shape (size, size)."""
    y, x = np.mgrid[:size, :size] / size
    angle, scale, phase = generator.uniform(0, np.pi), generator.uniform(1, 12), generator.uniform(0, 2 * np.pi, 2)
    along = np.cos(angle) * x + np.sin(angle) * y
    if name == "waves":
        return np.sin(2 * np.pi * scale * along + phase[0])
    if name == "checks":
        across = np.cos(angle) * y - np.sin(angle) * x
        return np.sign(np.sin(2 * np.pi * scale * along + phase[0]) * np.sin(2 * np.pi * scale * across + phase[1]))
    if name == "blobs":
        places = generator.uniform(0, 1, (6, 2))
        width = generator.uniform(0.02, 0.2)
        return sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / width**2) for a, b in places) - 1
    if name == "grain":
        cells = int(generator.integers(4, size))
        grain = generator.normal(0, 0.6, (cells, cells))
        return grain[(y * cells).astype(int), (x * cells).astype(int)]
    return 2 * along - 1 + 0.2 * np.sin(2 * np.pi * scale * x + phase[0])
