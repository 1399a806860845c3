"""From a folder of JPEGs: does decoding overlap computing?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Row, at_least, medians
from networks import vision
from PIL import Image

import bntools
from bntools import data

IMAGES, PIXELS = 640, 224
MEMORY = 600 << 20


def rows() -> Iterator[Row]:
    """640 JPEGs in five virtual batches; the model computes in one thread, which leaves a core to decoding."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder))
            yield from _rates(folder)
    finally:
        torch.set_num_threads(threads)


def _rates(folder: str) -> Iterator[Row]:
    model = vision.mobilenet_v3_small()
    decoded = list(data.open(folder, batch_size=16))

    def recalibrate(batches) -> bntools.recalibration.Recalibration:
        return bntools.recalibrate(model, batches, check=False, memory=MEMORY)

    passes = recalibrate(decoded).virtual_batches
    times = medians(
        {
            "both": lambda: recalibrate(data.open(folder, batch_size=16)),
            "decoding": lambda: sum(len(batch) for batch in data.open(folder, batch_size=16)),
            "computing": lambda: recalibrate(decoded),
        },
        rounds=3,
    )
    slower = max(times["decoding"], times["computing"])
    figures = ", ".join(f"{name} {IMAGES / seconds:.0f}/s" for name, seconds in times.items())
    what = (
        f"{IMAGES} JPEGs of {PIXELS} px, MobileNetV3-small, {passes} virtual batches ({figures}): rate / slower alone"
    )
    yield at_least(what, slower / times["both"], 0.9, "{:.2f} x")


def _write(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        coarse = generator.integers(0, 256, (PIXELS // 8, PIXELS // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:04}.jpg", quality=90)
