"""Fine-tuning on another domain: three roads for the statistics, each one line of a training script.

The model was trained on digits; the other domain is the same digits at a third of the contrast, of
which only 96 have labels.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from torch import nn

import bntools
from bntools.backends.torch.digits import trained
from bntools.cli import digits

LABELLED = 96


def fine_tune(model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int = 4) -> None:
    """A usual training loop: it knows nothing of bntools, and calls ``model.train()``."""
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for chosen in torch.arange(len(inputs)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that eval mode reads right."""
    with torch.no_grad():
        scores = model.eval()(torch.from_numpy(images))
    return float((scores.argmax(1).numpy() == labels).mean())


def main() -> None:
    """Take the three roads and print the accuracy on held-out digits at the end of each."""
    torch.manual_seed(0)
    found = digits.load()
    source = trained(digits.inputs(digits.seen(found.ink)), found.labels)
    images = digits.inputs(digits.seen(found.ink, "contrast"))
    test = digits.inputs(digits.seen(found.held_out_ink, "contrast"))
    few, labels = images[:LABELLED], found.labels[:LABELLED]

    def report(road: str, prepare: Callable[[nn.Module], object], finish: Callable[[nn.Module], object]) -> None:
        model = deepcopy(source)
        prepare(model)
        fine_tune(model, few, labels)
        finish(model)
        print(f"{road:55s} {accuracy(model, test, found.held_out_labels):6.1%}")

    nothing: Callable[[nn.Module], object] = lambda model: None  # noqa: E731
    print(f"{'no fine-tuning':55s} {accuracy(source, test, found.held_out_labels):6.1%}")
    report("1. statistics frozen, the other weights adapt", bntools.freeze, nothing)
    report("2. statistics adapt by momentum", nothing, nothing)
    report("3. reset, train, recalibrate", bntools.reset, lambda model: bntools.recalibrate(model, [images]))

    frozen = deepcopy(source)
    with bntools.freeze(frozen):
        fine_tune(frozen, few, labels)
        bntools.assert_frozen(frozen)  # also after model.train()
    for before, after in zip(bntools.inspect(source), bntools.inspect(frozen), strict=True):
        assert np.array_equal(before.mean, after.mean)
        assert np.array_equal(before.scale, after.scale)


if __name__ == "__main__":
    main()
