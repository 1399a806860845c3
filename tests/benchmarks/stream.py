"""A million images stream through at constant memory: peak of 1,000,000 beside that of 100,000."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure import Row, at_most

BATCH, SIZE = 256, 16
FEW, MANY = 100_000, 1_000_000
MEMORY = 64 << 20  # bytes for replicas

CODE = """
import re, sys, time
sys.path[:0] = {paths!r}
import torch
from networks import small
from stream import images
import bntools
torch.manual_seed(0)
model = small().eval()
start = time.perf_counter()
result = bntools.recalibrate(model, images({samples}), method={method!r}, memory={memory}, check=False, **{more!r})
took = time.perf_counter() - start
assert result.samples == {samples}, result
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(peak, took, result.virtual_batches)
"""


def images(samples: int) -> Iterator[np.ndarray]:
    """Batches of small images, generated as they are asked for; no two alike."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2 * BATCH, 3, SIZE, SIZE)).astype(np.float32)
    for start in range(0, samples, BATCH):
        place = generator.integers(BATCH)
        light = generator.uniform(0.5, 1.5, (BATCH, 3, 1, 1)).astype(np.float32)
        yield (noise[place : place + BATCH] * light + light)[: samples - start]


def rows() -> Iterator[Row]:
    """Exact in virtual batches, the same with a tolerance out of reach, and precise; each in a process of its own."""
    if not Path("/proc/self/status").exists():
        yield Row("1,000,000 images: peak memory", "not measured: no /proc here", "", True)
        return
    for method, more in (("exact", {}), ("exact", {"tolerance": 1e-9}), ("precise", {})):
        few, many = (_run(samples, method, more) for samples in (FEW, MANY))
        words = f"{method}, a tolerance out of reach" if more else method
        passes = f", {many[2]:,.0f} virtual batches" if method == "exact" else ""
        what = f"{MANY:,} generated images of {SIZE} px, {words}: peak / that of {FEW:,} ({few[0] / 2**20:.0f} MiB)"
        what += f" ({MANY / many[1]:,.0f}/s{passes})"
        yield at_most(what, many[0] / few[0], 1.05, "{:.3f} x")  # the same run twice differs by some percent


def _run(samples: int, method: str, more: dict[str, float]) -> tuple[float, ...]:
    """Peak in bytes, seconds, and virtual batches."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    code = CODE.format(paths=paths, samples=samples, method=method, memory=MEMORY, more=more)
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # the layers are too small to be shared out
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=alone)
    return tuple(map(float, done.stdout.split()))
