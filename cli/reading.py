"""How DATA is read: the options of every command that takes data, and opening it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from . import output, stderr
from .arguments import Sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """What the options say about DATA; None where the data or the model decide.

    ``size`` is (height, width) in pixels; ``mean`` and ``std`` have one number a channel and refer to
    images scaled to 0..1. ``preprocess`` is the name of a module of keras.applications, ``column`` that of a column of
    a table.
    """

    batch_size: int
    size: tuple[int, int] | None
    channels: int | None
    mean: Numbers | None
    std: Numbers | None
    max_samples: int | None
    seed: int
    preprocess: str | None = None
    column: str | None = None

    def open(self, source: str, model: Any = None, shard: tuple[int, int] | None = None) -> Any:
        """The data behind a folder, a file or a factory, as the model takes it.

        With ``shard``, a rank and a number of processes, the batches are the share of one of them.
        """
        from bntools import feeding

        with stderr.without_logs() if self.preprocess else nullcontext():
            return feeding.opened(
                model,
                source,
                batch_size=self.batch_size,
                size=self.size,
                channels=self.channels,
                mean=self.mean,
                std=self.std,
                max_samples=self.max_samples,
                seed=self.seed,
                preprocess=self.preprocess,
                column=self.column,
                processes=shard,
            )


class PerChannel(click.ParamType):
    """Numbers such as ``0.5,0.5,0.5``, one a channel, or the word ``imagenet``."""

    name = "numbers"

    def __init__(self, imagenet: Numbers):
        self.imagenet = imagenet

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Numbers:
        """Read the numbers between commas."""
        if isinstance(value, tuple):
            return value
        if value == "imagenet":
            return self.imagenet
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers such as 0.5,0.5,0.5, or imagenet", param, ctx)
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r}: expected finite numbers", param, ctx)
        return numbers


OPTIONS = (
    click.option("--size", type=Sizes(1, 2), metavar="H[,W]", help="Resize and crop images to this many pixels."),
    click.option("--channels", type=click.IntRange(min=1), help="1: grey, 3: RGB; by default what the model takes."),
    click.option(
        "--mean",
        type=PerChannel(IMAGENET_MEAN),
        metavar="A,B,C",
        help="Subtract this from images scaled to 0..1; 'imagenet' stands for its mean and std.",
    ),
    click.option("--std", type=PerChannel(IMAGENET_STD), metavar="A,B,C", help="Then divide by this."),
    click.option(
        "--preprocess",
        metavar="NAME",
        help="Or do to images what keras.applications.NAME does: mobilenet_v2, resnet50, efficientnet, ...",
    ),
    click.option("--column", metavar="NAME", help="Of Parquet files and datasets; by default that of images."),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--max-samples", type=click.IntRange(min=1), metavar="N", help="N samples, drawn from all of DATA."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of that draw."),
)


@contextmanager
def said_when_skipped(source: str, batches: Any, quiet: bool) -> Iterator[None]:
    """Print which files turned out damaged while the block read them, after they had been described."""
    before = getattr(batches, "skipped", 0)
    yield
    if getattr(batches, "skipped", 0) > before:
        output.say(f"{source}: {batches.damage(before)}", quiet=quiet)


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which receives them as one argument ``reading``."""

    @wraps(command)
    def with_reading(
        batch_size: int,
        size: tuple[int, ...] | None,
        channels: int | None,
        mean: Numbers | None,
        std: Numbers | None,
        max_samples: int | None,
        seed: int,
        preprocess: str | None,
        column: str | None,
        **arguments: Any,
    ) -> None:
        square = None if size is None else (size[0], size[-1])
        mean, std = _both(mean, std)
        if preprocess is not None and mean is not None:
            raise click.UsageError("--preprocess does its own scaling: leave --mean and --std out")
        reading = Reading(batch_size, square, channels, mean, std, max_samples, seed, preprocess, column)
        command(reading=reading, **arguments)

    for option in reversed(OPTIONS):
        with_reading = option(with_reading)
    return with_reading


def _both(mean: Numbers | None, std: Numbers | None) -> tuple[Numbers | None, Numbers | None]:
    if mean == IMAGENET_MEAN and std is None:
        return IMAGENET_MEAN, IMAGENET_STD
    if (mean is None) != (std is None):
        raise click.UsageError("--mean and --std belong together: give both, or --mean imagenet")
    if std is not None and min(std) <= 0:
        raise click.UsageError("--std divides: its numbers must be positive")
    return mean, std
