"""Images as batches, wherever they lie: in which order, at which size, and what was skipped.

A stock of images (the files of a folder, the members of tars, the rows of a table) has ``order(generator, most)``, the
numbers of its images in the order of reading, drawn from all, None for a stream; and ``entries(numbers)``, the images.
``heads`` of them are looked at before any is decoded, ``ahead`` are held while they wait for that (None where each is
opened in its turn). ``total`` is how many there are, None for a stream, ``ignored`` how many things of another kind
(``other``) lie between them, ``unlisted`` what is skipped before it is counted, ``origin`` where all lies, in words,
``drawn`` whether the first of the order stand for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bntools import ahead, images
from bntools.errors import BntoolsError
from bntools.reading import Reading
from bntools.sources.names import each
from bntools.sources.suffixes import IMAGES

if TYPE_CHECKING:
    from bntools.sources.folders import Files
    from bntools.sources.tables import ImageRows
    from bntools.sources.tars import Members

    Stock: TypeAlias = "Files | Members | ImageRows"

USUAL_SIZE = 224
AHEAD = 256 << 20  # bytes of pixels that are decoded before they are asked for, while the model computes
NAMED = 3  # images named in an error or description; the record has them all


@dataclass
class Pictures:
    """The images that are read, in the order in which they are read: ``numbers``, None for a stream.

    ``heads`` counts what the heads of the first ``looked`` of them said; reading on adds to both. ``skipped`` grows
    while reading, if an image turns out damaged in the middle.
    """

    source: str
    reading: Reading
    stock: Stock
    numbers: np.ndarray | None
    heads: Counter[images.Header]
    looked: int
    channels: int
    size: tuple[int, int]
    skipped: list[images.Unreadable] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = len(self.skipped)  # those are not among the numbers
        self._bad = {one.number for one in self.skipped}

    @property
    def drawn(self) -> bool:
        """Whether the first images are drawn from all."""
        return self.stock.drawn

    @property
    def samples(self) -> int | None:
        """How many images there are, as far as is known before all are decoded; None for a stream."""
        return None if self.numbers is None else len(self.numbers) - (len(self.skipped) - self._before)

    def batches(self, most: int | None = None, skip: int = 0) -> Iterator[np.ndarray]:
        """Batches of the images to read here but the first ``skip``, or of the first ``most`` of all.

        They are decoded ahead of their use: normalized float32, or uint8.
        """
        fit = AHEAD // (4 * self.channels * self.size[0] * self.size[1])
        left = self.stock.total if self.numbers is None else len(self.numbers)
        depth = min(max(2 * self.reading.batch_size, min(fit, self.stock.ahead or fit)), most or left or fit)
        with closing(self._pixels(max(1, depth), most, skip)) as pixels:
            while group := list(islice(pixels, self.reading.batch_size)):
                batch = self.reading.normalized(np.stack(group))
                if not self.reading.scales():
                    batch = np.rint(batch * np.float32(255)).astype(np.uint8)
                yield np.ascontiguousarray(np.moveaxis(batch, 1, -1)) if self.reading.channels_last else batch

    def details(self) -> dict[str, Any]:
        """What was read and how, for the record."""
        return {
            "container": self.stock.container,
            "channel_axis": 3 if self.reading.channels_last else 1,
            "channel_order": "RGB" if self.channels == 3 else "grey",
            "scaled": self.reading.scaling if self.reading.scales() else None,
            "size": list(self.size),
            "resized": f"to cover {_shape(self.size)}, bilinear, centre-cropped" if self._resized else None,
            "sizes": len(self._sizes),
            "files": self.stock.total,
            "ignored": self.stock.ignored,
            "first_frame_only": self._count("animated"),
            "alpha_dropped": self._count("alpha"),
            "converted": self._converted,
            "skipped": [{"file": bad.place + bad.name, "reason": bad.reason} for bad in self.skipped],
        }

    def description(self) -> str:
        """What was read and how, in a line."""
        found, total = self.samples, self.stock.total
        text = "a stream of images" if found is None else _plural(found, "image")
        if total is not None and found is not None and found + len(self.skipped) < total:
            text += f" drawn from {total:,}"
        text += f"{self.stock.origin} {self.channels}x{_shape(self.size)}"
        if self._resized:
            first, *more = self._sizes
            text += f", resized and centre-cropped from {f'{1 + len(more):,} sizes' if more else _shape(first)}"
        text += f"; {self.reading.scaled}" if self.reading.scales() else "; pixels 0..255 as they are"
        if self._converted:
            text += f"; {self._converted:,} converted to {'RGB' if self.channels == 3 else 'grey'}"
        if self._count("alpha"):
            text += f"; alpha dropped in {self._count('alpha'):,}"
        if self._count("animated"):
            text += f"; first frame of {self._count('animated'):,} animated"
        if self.numbers is not None and self.looked < len(self.numbers):
            text += f" (judged by the first {self.looked:,})"
        if self.skipped:
            text += f"; {len(self.skipped):,} skipped ({_named(self.skipped)})"
        return text + (f"; {_plural(self.stock.ignored, self.stock.other)} ignored" if self.stock.ignored else "")

    def damage(self, since: int) -> str:
        """What was found damaged after ``since`` others had been, in a line; empty if nothing was."""
        late = self.skipped[since:]
        count = "" if self.numbers is None else f"{len(self.numbers) + self._before:,} found, "
        return f"{count}{len(late):,} could not be decoded: {_named(late)}" if late else ""

    def _entries(self, most: int | None, skip: int) -> Iterator[tuple[int, images.Entry]]:
        """The images to read here, but those known to be damaged, each with its place in the order of all."""
        if self.numbers is None:
            stream = self.reading.share(enumerate(self.stock.entries(None)), most)
            return islice(((place, entry) for place, entry in stream if entry.number not in self._bad), skip, None)
        places = np.arange(len(self.numbers))
        places = places if most else self.reading.dealt(places)
        places = places[~np.isin(self.numbers[places], list(self._bad))][skip:]
        return zip(each(places), self.stock.entries(self.numbers[places]), strict=True)

    def _pixels(self, depth: int, most: int | None, skip: int) -> Generator[np.ndarray, None, None]:
        decode = partial(images.decode, channels=self.channels, size=self.size)
        given = 0
        with closing(ahead.in_order(lambda one: (one[0], decode(one[1])), self._entries(most, skip), depth)) as results:
            for place, result in results:
                if isinstance(result, images.Unreadable):
                    self._skip(result)
                    continue
                pixels, header = result
                if place >= self.looked:
                    self.heads[header] += 1
                    self.looked = place + 1
                yield pixels
                given += 1
                if given == most:
                    return
        if not given and self.skipped and not self.samples:
            raise _nothing(self.source, self.skipped)

    def _skip(self, bad: images.Unreadable) -> None:
        if bad.number not in self._bad:  # two readings at a time find it twice
            self._bad.add(bad.number)
            self.skipped.append(bad)

    @property
    def _sizes(self) -> set[tuple[int, int]]:
        return {header.size for header in self.heads}

    @property
    def _resized(self) -> bool:
        return self._sizes != {self.size}

    @property
    def _converted(self) -> int:
        """How many images have other colours than the batches, besides alpha and palettes."""
        return sum(times for header, times in self.heads.items() if header.converted(self.channels))

    def _count(self, what: str) -> int:
        return sum(times for header, times in self.heads.items() if getattr(header, what))


def survey(source: str, stock: Stock, reading: Reading) -> Pictures:
    """Draw and order images at random, and settle channels and size by looking at the heads of ``stock.heads``.

    They are taken from the whole stock in an order that only the seed decides; those whose head
    shows that they cannot be read are skipped, and others are drawn for them.

    Raises BntoolsError for a stock without images, or without any that can be read.
    """
    if reading.channels not in (None, 1, 3):
        raise BntoolsError(
            f"{source}: images have 1 or 3 channels, not the {reading.channels} asked for (or taken by the model's "
            f"first convolution); give arrays of shape (samples, {reading.channels}, height, width) as .npy"
        )
    if stock.total == 0:
        found = f"only {_plural(stock.ignored, stock.other)}" if stock.ignored else "nothing"
        if stock.unlisted:
            raise _nothing(source, stock.unlisted)
        raise BntoolsError(f"{source}: found {found} where images were expected ({', '.join(sorted(IMAGES))})")
    order = stock.order(np.random.default_rng(reading.seed), reading.max_samples)
    skipped = list(stock.unlisted)
    good, heads, looked = _looked_at(stock, order, reading.max_samples, skipped)
    if not good:
        raise _nothing(source, skipped)
    numbers = None
    if order is not None:
        numbers = np.concatenate([np.array(good, order.dtype), order[looked:]])[: reading.max_samples]
    channels = reading.channels or (1 if all(header.grey for header in heads) else 3)
    reading.check_channels(source, channels)
    size = reading.size or _common_size(heads)
    return Pictures(source, reading, stock, numbers, heads, len(good), channels, size, skipped)


def _looked_at(
    stock: Stock, order: np.ndarray | None, most: int | None, skipped: list[images.Unreadable]
) -> tuple[list[int], Counter[images.Header], int]:
    """The numbers of the first images that can be read, what their heads say, and how many were looked at for that."""
    good: list[int] = []
    heads: Counter[images.Header] = Counter()
    looked = 0
    for entry in stock.entries(order):
        header = images.header(entry)
        looked += 1
        if isinstance(header, images.Unreadable):
            skipped.append(header)
        else:
            heads[header] += 1
            good.append(entry.number)
        if len(good) == most or looked >= stock.heads:
            break
    return good, heads, looked


def _common_size(heads: Counter[images.Header]) -> tuple[int, int]:
    """The size that more than half of the images have, else the usual square, smaller if the images are."""
    sizes: Counter[tuple[int, int]] = Counter()
    for header, times in heads.items():
        sizes[header.size] += times
    size, times = sizes.most_common(1)[0]
    if times > sizes.total() / 2:
        return size
    side = min(USUAL_SIZE, int(median(min(size) for size in sizes.elements())))
    return side, side


def _nothing(source: str, skipped: list[images.Unreadable]) -> BntoolsError:
    count = len(skipped)
    none = f"none of the {count:,} images can" if count > 1 else "its only image cannot"
    return BntoolsError(f"{source}: {none} be read: {_named(skipped)}")


def _named(unreadable: list[images.Unreadable]) -> str:
    named = "; ".join(f"{bad.name}: {bad.reason}" for bad in unreadable[:NAMED])
    return named + (f"; and {len(unreadable) - NAMED:,} more" if len(unreadable) > NAMED else "")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
