"""Fine-tuning on another domain: inspect says which road the statistics should take, and why; each road is one line.

The model reads digits. Three domains ask for three roads: a handful of images of the same camera, a dozen of one
with less contrast, and hundreds of those, of which 96 have labels. Every road is taken in every domain, so that the
advice can be judged.
"""

import textwrap
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import nn

import bntools
from bntools.backends.torch.digits import trained
from bntools.cli import digits

BATCH, LABELLED = 16, 96
Batches = list[np.ndarray]


def keep(model: nn.Module, batches: Batches) -> None:
    """Road 1: the statistics stay, whatever ``model.train()`` says."""
    bntools.freeze(model, affine=False)


def adapt(model: nn.Module, batches: Batches) -> None:
    """Road 2: what is stored counts as much as some samples do."""
    bntools.recalibrate(model, batches, prior=4)


def renew(model: nn.Module, batches: Batches) -> None:
    """Road 3: only the new data counts."""
    bntools.recalibrate(model, batches)


ROADS: dict[str, Callable[[nn.Module, Batches], None]] = {"freeze": keep, "adapt": adapt, "recalibrate": renew}


def fine_tune(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int = 2) -> None:
    """A usual training loop of the other weights; statistics that moved meanwhile are what the road makes of them."""
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for chosen in torch.arange(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that eval mode reads right."""
    with torch.no_grad():
        scores = model.eval()(torch.from_numpy(images))
    return float((scores.argmax(1).numpy() == labels).mean())


def main() -> None:
    """Print the advice for each domain, and the accuracy on its held-out digits at the end of every road."""
    torch.manual_seed(0)
    found = digits.load()
    source = trained(digits.inputs(digits.seen(found.ink)), found.labels)
    for camera, samples in ((None, 6), ("contrast", 12), ("contrast", 300)):
        images = digits.inputs(digits.seen(found.ink[:samples], camera))
        test = digits.inputs(digits.seen(found.held_out_ink, camera))
        batches = np.array_split(images, max(1, samples // 64))
        first = bntools.inspect(source, batches).advice[0]
        print(f"\n{samples} images, {'another contrast' if camera else 'the same camera'}: {first.action}")
        print(textwrap.fill(first.reason, 88, initial_indent="  ", subsequent_indent="  "))
        print(f"  as it is{accuracy(source, test, found.held_out_labels):16.1%}")
        for name, take in ROADS.items():
            model = deepcopy(source)
            with bntools.freeze(model, affine=False):
                fine_tune(model, images[:LABELLED], found.labels[: min(samples, LABELLED)])
            take(model, batches)
            print(f"  {name:14s}{accuracy(model, test, found.held_out_labels):10.1%}{'  <-' * (name == first.action)}")


if __name__ == "__main__":
    main()
