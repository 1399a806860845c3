"""What the verbs cost on the ONNX file of a ResNet-50, beside plain ONNX Runtime and a bare import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from measure import Row, at_most, medians, seconds
from networks import as_trained, vision, write_onnx

import bntools

SAMPLES = 128
RATIO, UNIT = "{:.2f} x", "{:.2f} s"


def rows() -> Iterator[Row]:
    """Recalibration, then inspect, fold and verify of the recalibrated network."""
    torch.manual_seed(0)
    model = as_trained(vision.resnet50())
    with tempfile.TemporaryDirectory() as folder:
        path = write_onnx(model, 128, Path(folder) / "model.onnx")
        images = np.random.default_rng(0).normal(size=(SAMPLES, 3, 128, 128)).astype(np.float32)
        for size in (16, 32):
            yield from _recalibration(path, np.split(images, SAMPLES // size), size)
        bntools.recalibrate(model, torch.from_numpy(images[:64]).split(16), check=False)
        path = write_onnx(model, 224, Path(folder) / "recalibrated.onnx")
        yield from _inspection(path)
        yield from _folding(path)


def _recalibration(path: Path, batches: list[np.ndarray], size: int) -> Iterator[Row]:
    proto = bntools.load(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    times = medians(
        {
            "plain": lambda: [session.run(None, {"x": batch}) for batch in batches],
            "exact": lambda: bntools.recalibrate(proto, batches, check=False),
        },
        rounds=3,
    )
    what = f"ONNX, ResNet-50, {SAMPLES} images of 128 px, micro-batch {size}: recalibration"
    rate = f"{SAMPLES / times['plain']:.0f}/s"
    yield at_most(f"{what} / plain ONNX Runtime ({rate})", times["exact"] / times["plain"], 1.3, RATIO)
    with_check = RATIO.format(seconds(lambda: bntools.recalibrate(proto, batches)) / times["plain"])
    yield Row(f"{what} and check of the residual / plain ONNX Runtime", with_check, "", True)


def _inspection(path: Path) -> Iterator[Row]:
    calls = {
        "inspect": _process("-m", "bntools.cli", "inspect", str(path)),
        "onnx": _process("-c", "import onnx"),
    }
    times = medians(calls, rounds=7)
    what = f"ONNX, ResNet-50: bntools inspect, a fresh process (python -c 'import onnx': {times['onnx']:.2f} s)"
    yield at_most(what, times["inspect"], 0.6, UNIT)


def _process(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def _folding(path: Path) -> Iterator[Row]:
    x = np.random.default_rng(1).normal(size=(2, 3, 224, 224)).astype(np.float32)
    kept, times = {}, {"fold": [], "verify": []}
    for _ in range(4):
        times["fold"].append(seconds(lambda: kept.update(fold=bntools.fold(path, x))))
        times["verify"].append(seconds(lambda: kept.update(check=bntools.verify(path, kept["fold"].model, [x]))))
    folded, check = kept["fold"], kept["check"]
    medians_of = {name: statistics.median(values[1:]) for name, values in times.items()}
    parts = ", ".join(f"{name} {UNIT.format(value)}" for name, value in medians_of.items())
    what = f"ONNX, ResNet-50, 2 images of 224 px: fold with its comparison, and verify once more ({parts})"
    yield at_most(what, sum(medians_of.values()), 5.0, UNIT)
    count = f"{len(folded.folded)} of {len(folded.folded) + len(folded.kept)} BN folded"
    yield at_most(f"ONNX, ResNet-50, {count}: scale-relative error, float32", check.error, 1e-5)
