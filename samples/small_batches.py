"""Training at batch size 4: BN as it is, with exact recalibration afterwards, and GroupNorm instead.

Each step normalizes with the statistics of four digits, and the running averages remember some ten such batches. The
weights learned what they could; the statistics can still be measured. GroupNorm has none, and is trained the same way.
"""

import numpy as np
import torch
from torch import nn

import bntools
from bntools.backends.torch.digits import network
from bntools.cli import digits

BATCH = 4
STEPS = 300


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> nn.Module:
    """A usual training loop, at a small batch size."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    for chosen in order.split(BATCH)[:STEPS]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that eval mode reads right."""
    with torch.no_grad():
        return float((model(torch.from_numpy(images)).argmax(1).numpy() == labels).mean())


def main() -> None:
    """Train both kinds from the same weights, and print what held-out digits say."""
    found = digits.load()
    images, held_out = (digits.inputs(digits.seen(ink)) for ink in (found.ink, found.held_out_ink))
    mean, std = images.mean(), images.std()
    # BN forgives inputs far from 0; GroupNorm learns next to nothing from these in so few steps without this.
    images, held_out = (images - mean) / std, (held_out - mean) / std
    test = held_out, found.held_out_labels
    torch.manual_seed(0)
    start = network()

    converted = bntools.convert(start, "groupnorm")
    print(f"{converted}: {converted.groups}")
    print(f"  {converted.notes[0]}.")

    with_bn = train(start, images, found.labels)
    with_groups = train(converted.model, images, found.labels)
    as_trained = accuracy(with_bn, *test)
    result = bntools.recalibrate(with_bn, [images])
    recalibrated, grouped = accuracy(with_bn, *test), accuracy(with_groups, *test)

    print(f"held-out digits read right after {STEPS} steps at batch size {BATCH}:")
    print(f"  BN, running averages of small batches   {as_trained:6.1%}")
    print(f"  BN, recalibrated exactly afterwards     {recalibrated:6.1%}   (one pass, no labels)")
    print(f"  GroupNorm                               {grouped:6.1%}")
    worst = max(result.layers, key=lambda layer: layer.drift)
    print(f"The running averages were off by up to {worst.drift:.2f} standard deviations (layer {worst.name}).")
    better = "GroupNorm" if grouped > recalibrated else "exact recalibration"
    print(f"For this network and data, at batch size {BATCH}: {better}.")


if __name__ == "__main__":
    main()
