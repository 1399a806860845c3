"""One model, several cameras: statistics for each in a small file, switched for every image.

Nothing is trained, and no labels are used: 200 images of each camera give the statistics.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bntools
from bntools.backends.torch.digits import trained
from bntools.cli import digits

IMAGES = 200
CAMERAS = ("contrast", "brightness", "noise")


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that eval mode reads right."""
    with torch.no_grad():
        return float((model(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


def main() -> None:
    """Print each camera's accuracy with the statistics of the training camera, of all cameras, and with its own."""
    found = digits.load()
    model = trained(digits.inputs(digits.seen(found.ink[:500])), found.labels[:500])
    batches = {name: [digits.inputs(digits.seen(found.ink[:IMAGES], name))] for name in CAMERAS}
    test = {name: digits.inputs(digits.seen(found.held_out_ink, name)) for name in CAMERAS}
    before = {name: accuracy(model, test[name], found.held_out_labels) for name in CAMERAS}

    mixed = bntools.recalibrate(model, [batch for each in batches.values() for batch in each])
    together = {name: accuracy(model, test[name], found.held_out_labels) for name in CAMERAS}
    mixed.undo()

    with tempfile.TemporaryDirectory() as folder:
        bank = bntools.bank(model, batches)
        for name in bank:
            bntools.save_stats(bank[name], Path(folder, f"{name}.safetensors"))
        cameras = {name: bntools.use(model, Path(folder, f"{name}.safetensors")) for name in CAMERAS}
        size = Path(folder, "noise.safetensors").stat().st_size

    print("camera      as trained  all cameras  its own")
    for name, camera in cameras.items():
        with camera:
            own = accuracy(model, test[name], found.held_out_labels)
        print(f"{name:10s} {before[name]:11.1%} {together[name]:12.1%} {own:8.1%}")
        assert own > before[name]
        assert accuracy(model, test[name], found.held_out_labels) == before[name]  # as it was, behind the block

    start = time.perf_counter()
    for _ in range(100):
        with cameras["noise"]:
            pass
    switched = (time.perf_counter() - start) / 100
    print(f"a file of {size / 1000:.1f} kB a camera; to another one and back in {switched * 1e6:.0f} us")
    worst = bntools.diff(bank["contrast"], bank["brightness"]).worst()[0]
    print(f"layer {worst.name} differs the most between contrast and brightness: {worst.drift:.1f} standard deviations")


if __name__ == "__main__":
    main()
