"""How DATA is read: the options of every command that takes data, and opening it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from bntools.errors import BntoolsError

from . import output, stderr
from .arguments import Sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """What the options say about DATA; None where the data or the model decide.

    ``size`` is (height, width) in pixels; ``mean`` and ``std`` have one number a channel and refer to
    images scaled to 0..1. ``preprocess`` is the name of a module of keras.applications.
    """

    batch_size: int
    size: tuple[int, int] | None
    channels: int | None
    mean: Numbers | None
    std: Numbers | None
    max_samples: int | None
    seed: int
    preprocess: str | None = None

    def open(self, source: str, model: Any = None, shard: tuple[int, int] | None = None) -> Any:
        """The data behind a folder, a file or a factory, as the model takes it.

        That is with as many channels, and for a model file that says more (ONNX) in its layout, size, dtype and
        batch size. Samples that fill no batch of a fixed size are left out, which the data's description says. With
        ``shard``, a rank and a number of processes, the batches are the share of one of them.
        """
        from bntools import data

        takes = inputs_of(model)
        bound = next((one for one in takes if one.batch), None)
        options = {**self._options(source, model, takes), "batch_size": bound.batch if bound else self.batch_size}
        options["shard"] = shard and (*shard, bound.batch if bound else 1)
        with stderr.without_logs() if self.preprocess else nullcontext():
            opened = data.open(source, **options, max_samples=self.max_samples)
        if bound is None or opened.samples is None:
            return opened
        if opened.samples < bound.batch:
            raise BntoolsError(
                f"{source}: {output.counted(opened.samples, 'sample')}, and the model takes batches of {bound.batch} "
                f"only, at its input {bound}: give more"
            )
        left = opened.samples % bound.batch
        if left:
            opened = data.open(source, **options, max_samples=opened.samples - left)
        opened.note = f"in batches of {bound.batch}, the size that the model's input is bound to"
        opened.note += f"; {left} left out" if left else ""
        return opened

    def _options(self, source: str, model: Any, takes: list[Any]) -> dict[str, Any]:
        """What ``data.open`` is asked for besides the batches."""
        from bntools import backends, data

        alone = takes[0] if len(takes) == 1 else None
        wanted = None if model is None else backends.of(model).input_channels(model)
        size = self.size or (alone.size if alone and data.holds_images(source) else None)
        scaled = self.mean is not None or self.preprocess is not None
        whole = [one for one in takes if one.integer or (one.pixels and not scaled)]
        raw = tuple(one.name for one in whole) + (("",) if alone in whole else ())
        return {
            "channels": self.channels or wanted,
            "size": size,
            "mean": self.mean,
            "std": self.std,
            "seed": self.seed,
            "layout": "NHWC" if alone and alone.channel_axis == 3 else "NCHW",
            "raw": raw,
            "preprocess": self.preprocess,
        }


def inputs_of(model: Any) -> list[Any]:
    """What the model says about its inputs; an empty list for models that say nothing."""
    from bntools import backends

    if model is None or not hasattr(backend := backends.of(model), "takes"):
        return []
    return list(backend.takes(model))


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
        **arguments: Any,
    ) -> None:
        square = None if size is None else (size[0], size[-1])
        mean, std = _both(mean, std)
        if preprocess is not None and mean is not None:
            raise click.UsageError("--preprocess does its own scaling: leave --mean and --std out")
        reading = Reading(batch_size, square, channels, mean, std, max_samples, seed, preprocess)
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
