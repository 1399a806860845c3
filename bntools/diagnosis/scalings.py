"""The usual scalings of image pixels, and which of them an array may have been through, by its range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

FILLED = 0.1  # of its range that data may leave empty at either end and still be taken for having been scaled to it
SLACK = 0.02  # of its range: resizing overshoots, and means are rounded

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))  # of ImageNet's RGB images in 0..1
CAFFE = np.array((103.939, 116.779, 123.68))  # of ImageNet's BGR images in 0..255, as VGG takes them

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scale:
    """A way in which pixels are scaled: its name, and the way from it to RGB in 0..1 and back, (..., C).

    ``undone`` and ``done`` are the same two ways as Python, from ``x`` on; MEAN, STD and CAFFE stand for numbers along
    the channels' axis, and REVERSED for indexing that reverses the channels. ``size`` is the order of magnitude of its
    values; ``colour`` holds where it is for three channels only. ``usual`` ones are what models are trained with, the
    others are mistakes.
    """

    name: str
    to_unit: Change
    of_unit: Change
    undone: str
    done: str
    size: float = 1
    colour: bool = False
    usual: bool = True


SCALES = (
    Scale("0..1", lambda x: x, lambda x: x, "x", "x"),
    Scale("0..255", lambda x: x / 255, lambda x: x * 255, "x / 255", "x * 255", 255),
    Scale("-1..1", lambda x: (x + 1) / 2, lambda x: 2 * x - 1, "(x + 1) / 2", "x * 2 - 1"),
    Scale(
        "ImageNet's mean and std",
        lambda x: x * STD + MEAN,
        lambda x: (x - MEAN) / STD,
        "x * STD + MEAN",
        "(x - MEAN) / STD",
        colour=True,
    ),
    Scale(
        "0..255 less ImageNet's mean, BGR",
        lambda x: ((x + CAFFE) / 255)[..., ::-1],
        lambda x: x[..., ::-1] * 255 - CAFFE,
        "((x + CAFFE) / 255)REVERSED",
        "xREVERSED * 255 - CAFFE",
        255,
        colour=True,
    ),
    Scale(
        "0..1, divided by 255 again", lambda x: x * 255, lambda x: x / 255, "x * 255", "x / 255", 1 / 255, usual=False
    ),
    Scale(
        "ImageNet's mean and std on 0..255",
        lambda x: (x * STD + MEAN) / 255,
        lambda x: (x * 255 - MEAN) / STD,
        "(x * STD + MEAN) / 255",
        "(x * 255 - MEAN) / STD",
        1000,
        colour=True,
        usual=False,
    ),
    Scale(
        "ImageNet's mean and std, twice",
        lambda x: (x * STD + MEAN) * STD + MEAN,
        lambda x: ((x - MEAN) / STD - MEAN) / STD,
        "(x * STD + MEAN) * STD + MEAN",
        "((x - MEAN) / STD - MEAN) / STD",
        10,
        colour=True,
        usual=False,
    ),
    Scale("0..65535", lambda x: x / 65535, lambda x: x * 65535, "x / 65535", "x * 65535", 65535, usual=False),
)
ONES, BYTES, AGAIN, WORDS = SCALES[0], SCALES[1], SCALES[5], SCALES[8]


def possible(pixels: np.ndarray) -> Iterator[Scale]:
    """The scales in which pixels (..., C) may be, by their range."""
    least, most = float(pixels.min()), float(pixels.max())
    if least < 0:
        for scale in SCALES:
            if scale not in (ONES, BYTES, AGAIN, WORDS) and (pixels.shape[-1] == 3 or not scale.colour):
                unit = scale.to_unit(pixels)
                if unit.min() >= -SLACK and unit.max() <= 1 + SLACK and filled(unit):
                    yield scale
    elif most <= (1 + SLACK) / 255:
        yield AGAIN
    elif most <= 1 + SLACK:
        yield ONES
    elif most <= 255 * (1 + SLACK):
        yield BYTES
    elif most <= 65535 * (1 + SLACK) and filled(pixels / 65535):  # a single wild pixel among bytes is no 16-bit image
        yield WORDS


def others(source: Scale, pixels: np.ndarray) -> Iterator[Scale]:
    """The usual scales to which pixels in ``source`` can be brought, without a domain shift being mistaken for one.

    Images of little contrast may be like normalized ones, and the reverse: between scales of one magnitude the data
    has to fill its range. Nothing that a camera does is mistaken for a factor of 255.
    """
    full = filled(source.to_unit(pixels))
    for target in SCALES:
        if target is source or not target.usual or (target.colour and pixels.shape[-1] != 3):
            continue
        if full or target.size != source.size:
            yield target


def filled(unit: np.ndarray) -> bool:
    """Whether pixels that should be in 0..1 use the range, as those of some dozens of images do."""
    return bool(unit.min() < FILLED and unit.max() > 1 - FILLED)


def line(source: Scale | None, target: Scale | None, swap: bool, channels_first: bool) -> str:
    """The change as a line of Python on ``images``, a NumPy array; ``swap`` reverses the channels."""
    text = "x" if source is None else source.undone
    text = f"({text})REVERSED" if swap else text
    if target is not None:
        text = target.done.replace("x", text if text == "x" or target.done == "x" else f"({text})")
    numbers = {"MEAN": MEAN, "STD": STD, "CAFFE": CAFFE}
    for name, values in numbers.items():
        shape = ".reshape(3, 1, 1)" if channels_first else ""
        text = text.replace(name, f"np.array({values.tolist()}){shape}")
    text = text.replace("REVERSED", "[:, ::-1]" if channels_first else "[..., ::-1]")
    return f"images = {text.replace('x', 'images')}".replace("(images)[", "images[")
