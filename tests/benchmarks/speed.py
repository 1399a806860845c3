"""Time of exact recalibration against plain eval forwards and what others use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from measure import Row, at_most, medians
from networks import vision
from peers import PEERS

import bntools

RATIO = "{:.2f} x"


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
                "exact": partial(bntools.recalibrate, model, batches, check=False),
                "checked": partial(bntools.recalibrate, model, batches),
                "plain": plain,
                **{name: partial(peer, model, batches) for name, peer in PEERS.items()},
            }
        )
        what = f"ResNet-50, 128 images of 128 px, micro-batch {size}: exact recalibration"
        yield at_most(f"{what} / update_bn", times["exact"] / times["update_bn"], 1.0, RATIO)
        for name in list(PEERS)[1:]:
            yield Row(f"{what} / {name}", RATIO.format(times["exact"] / times[name]), "", True)
        yield at_most(f"{what} / eval forward", times["exact"] / times["plain"], 1.25, RATIO)
        with_check = times["checked"] / times["plain"]
        yield Row(f"{what} and check of the residual / eval forward", RATIO.format(with_check), "", True)
