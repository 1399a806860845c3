"""Time of exact recalibration against torch.optim.swa_utils.update_bn and plain eval forwards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Row, at_most, medians
from networks import vision

import bntools


def rows() -> Iterator[Row]:
    """ResNet-50, 128 images of 128 pixels, micro-batches of 16 and 64."""
    torch.manual_seed(0)
    model = vision.resnet50().eval()
    images = torch.randn(128, 3, 128, 128)
    for size in (16, 64):
        batches = images.split(size)

        def plain(batches=batches):
            with torch.no_grad():
                for batch in batches:
                    model(batch)

        times = medians(
            {
                "exact": lambda batches=batches: bntools.recalibrate(model, batches, check=False),
                "checked": lambda batches=batches: bntools.recalibrate(model, batches),
                "update_bn": lambda batches=batches: torch.optim.swa_utils.update_bn(batches, model),
                "plain": plain,
            }
        )
        what = f"ResNet-50, 128 images of 128 px, micro-batch {size}: exact recalibration"
        ratio = "{:.2f} x"
        yield at_most(f"{what} / update_bn", times["exact"] / times["update_bn"], 1.0, ratio)
        yield at_most(f"{what} / eval forward", times["exact"] / times["plain"], 1.25, ratio)
        with_check = times["checked"] / times["plain"]
        yield Row(f"{what} and check of the residual / eval forward", ratio.format(with_check), "", True)
