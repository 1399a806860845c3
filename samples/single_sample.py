"""Why a prediction for a single image changes with its batch in train mode, and not in eval mode."""

import torch
from torch import nn


def output_of_first(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The model's output for the first image when ``batch_size`` images run together."""
    with torch.no_grad():
        return model(images[:batch_size])[0]


def moved(model: nn.Module, images: torch.Tensor, batch_size: int) -> float:
    """How far that output is from the one in a batch of all images, relative to its largest value."""
    whole = output_of_first(model, images, len(images))
    return float((output_of_first(model, images, batch_size) - whole).abs().max() / whole.abs().max())


def main() -> None:
    """Print the change of one image's output with the size of its batch, in both modes."""
    torch.manual_seed(0)
    # momentum=0: train mode here shows what it computes and leaves the statistics alone
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, momentum=0.0),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    images = torch.randn(128, 3, 16, 16) * torch.linspace(0.2, 3, 128)[:, None, None, None]

    print("batch   train mode   eval mode")
    for batch_size in (1, 2, 10, 32, 100):
        train = moved(model.train(), images, batch_size)
        evaluation = moved(model.eval(), images, batch_size)
        print(f"{batch_size:5d}   {train:10.1e}   {evaluation:9.1e}")
        assert evaluation < 1e-5, "eval mode must not look at the rest of the batch"
    assert moved(model.train(), images, 1) > 0.1, "in train mode a single image normalizes by itself"


if __name__ == "__main__":
    main()
