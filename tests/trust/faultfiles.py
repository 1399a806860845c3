"""The files that the cases of faults.py begin with: ``python tests/trust/faultfiles.py torch|onnx|keras FOLDER``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

import bntools

sys.path[:0] = [str(Path(__file__).parent.parent)]
NETS = """
from torch import nn

def net():
    head = nn.Linear(8, 100_000)  # so that writing takes its time
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
"""


def of_torch(folder: Path) -> None:
    """Templates pt, safetensors, plain and domains."""
    import safetensors.torch
    import torch

    (folder / "nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    import nets

    for name in ("pt", "safetensors", "plain", "domains"):
        place, model = folder / name, nets.net()
        place.mkdir()
        data(place / "data.npy", 3)
        if name == "safetensors":
            shutil.copy(folder / "nets.py", place)
            safetensors.torch.save_file(model.state_dict(), place / "model.safetensors")
            safetensors.torch.save_file(nets.net().state_dict(), place / "out.safetensors")
            (place / "out.json").write_text('{"bntools": "0", "verb": "of the old one"}')
            continue
        torch.save(model, place / "model.pt")
        if name == "pt":
            torch.save(nets.net(), place / "out.pt")
            (place / "model.json").write_text('{"bntools": "0", "verb": "of the old one"}')
            bntools.recalibrate(model, [np.load(place / "data.npy")])
            bntools.save_stats(model, place / "some.safetensors")
        if name == "domains":
            (place / "domains").mkdir()
            (place / "out").mkdir()
            data(place / "domains" / "a.npy", 3)
            data(place / "domains" / "b.npy", 3, seed=1)
            (place / "out" / "a.safetensors").write_bytes(b"of an earlier time")
            (place / "out" / "record.json").write_text('{"bntools": "0", "domains": {"a": {}}}')


def of_onnx(folder: Path) -> None:
    """The template onnx: a model with external weights, and an older export with its own."""
    import onnx
    from onnx_files import small

    place = folder / "onnx"
    place.mkdir()
    data(place / "data.npy", 3, size=8)
    onnx.save(small(), place / "first.onnx", save_as_external_data=True, location="first.data", size_threshold=100)
    bntools.save(bntools.load(place / "first.onnx"), place / "model.onnx")
    older = bntools.load(place / "first.onnx")
    bntools.reset(older)
    bntools.save(older, place / "out.onnx")
    (place / "model.json").write_text('{"bntools": "0", "verb": "of the old one"}')


def of_keras(folder: Path) -> None:
    """The template keras."""
    from keras_nets import images, residual_net

    place = folder / "keras"
    place.mkdir()
    np.save(place / "data.npy", images(16))
    residual_net().save(place / "model.keras")
    residual_net().save(place / "out.keras")
    (place / "model.json").write_text('{"bntools": "0", "verb": "of the old one"}')


def data(path: Path, channels: int, seed: int = 0, size: int = 12) -> None:
    """Random images, channels first."""
    np.save(path, np.random.default_rng(seed).normal(1, 2, (16, channels, size, size)).astype(np.float32))


if __name__ == "__main__":
    {"torch": of_torch, "onnx": of_onnx, "keras": of_keras}[sys.argv[1]](Path(sys.argv[2]))
