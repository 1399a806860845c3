"""A folder of images as batches: which files, in which order, at which size, and what was skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bntools import ahead, images
from bntools.errors import BntoolsError
from bntools.reading import Reading

USUAL_SIZE = 224
AHEAD = 256 << 20  # bytes of pixels that are decoded before they are asked for, while the model computes
NAMED = 3  # files named in an error or description; the record has them all


@dataclass
class Folder:
    """The images of a folder that are read, in the order in which they are read.

    ``skipped`` grows while reading, if a file turns out damaged in the middle.
    """

    source: str
    reading: Reading
    files: list[Path]
    headers: list[images.Header]
    channels: int
    size: tuple[int, int]
    total: int
    ignored: int
    skipped: list[images.Unreadable] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many images there are, as far as is known before all are decoded."""
        return len(self.files) - len({bad.path for bad in self.skipped} & set(self.files))

    def batches(self, most: int | None = None) -> Iterator[np.ndarray]:
        """Batches of all images, or of the first ``most``, decoded ahead of their use: normalized float32, or uint8."""
        fit = AHEAD // (4 * self.channels * self.size[0] * self.size[1])
        depth = min(max(2 * self.reading.batch_size, fit), most or len(self.files))
        with closing(self._pixels(depth, most)) as pixels:
            while group := list(islice(pixels, self.reading.batch_size)):
                batch = self.reading.normalized(np.stack(group))
                if not self.reading.scales():
                    batch = np.rint(batch * np.float32(255)).astype(np.uint8)
                yield np.ascontiguousarray(np.moveaxis(batch, 1, -1)) if self.reading.channels_last else batch

    def details(self) -> dict[str, Any]:
        """What was read and how, for the record."""
        return {
            "channel_axis": 3 if self.reading.channels_last else 1,
            "channel_order": "RGB" if self.channels == 3 else "grey",
            "scaled": self.reading.scaling if self.reading.scales() else None,
            "size": list(self.size),
            "resized": f"to cover {_shape(self.size)}, bilinear, centre-cropped" if self._resized else None,
            "sizes": len(self._sizes),
            "files": self.total,
            "ignored": self.ignored,
            "first_frame_only": self._count("animated"),
            "alpha_dropped": self._count("alpha"),
            "converted": self._converted,
            "skipped": [{"file": str(bad.path), "reason": bad.reason} for bad in self.skipped],
        }

    def description(self) -> str:
        """What was read and how, in a line."""
        drawn = f" drawn from {self.total:,}" if self.samples + len(self.skipped) < self.total else ""
        text = f"{_plural(self.samples, 'image')}{drawn} {self.channels}x{_shape(self.size)}"
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
        if self.skipped:
            text += f"; {len(self.skipped):,} skipped ({_named(self.skipped)})"
        return text + (f"; {_plural(self.ignored, 'other file')} ignored" if self.ignored else "")

    def damage(self, since: int) -> str:
        """What was found damaged after ``since`` others had been, in a line; empty if nothing was."""
        late = self.skipped[since:]
        found = len({*self.files, *(bad.path for bad in self.skipped)})
        return f"{found:,} found, {len(late):,} could not be decoded: {_named(late)}" if late else ""

    def _pixels(self, depth: int, most: int | None) -> Generator[np.ndarray, None, None]:
        known = {bad.path for bad in self.skipped}
        numbers = np.arange(len(self.files))
        dealt = (self.files[number] for number in (numbers if most else self.reading.dealt(numbers)))
        files = [path for path in dealt if path not in known]
        decode = partial(images.decode, channels=self.channels, size=self.size)
        given = 0
        with closing(ahead.in_order(decode, files, depth)) as results:
            for result in results:
                if isinstance(result, images.Unreadable):
                    self.skipped.append(result)
                    continue
                yield result
                given += 1
                if given == most:
                    return
        if not self.samples:
            raise _nothing(self.source, self.skipped)

    @property
    def _sizes(self) -> set[tuple[int, int]]:
        return {header.size for header in self.headers}

    @property
    def _resized(self) -> bool:
        return self._sizes != {self.size}

    @property
    def _converted(self) -> int:
        """How many images have other colours than the batches, besides alpha and palettes."""
        return sum(header.converted(self.channels) for header in self.headers)

    def _count(self, what: str) -> int:
        return sum(getattr(header, what) for header in self.headers)


def survey(source: Path, reading: Reading) -> Folder:
    """Find the images under a folder, draw and order them at random, and settle channels and size.

    Files are taken from the whole folder in an order that only the seed decides; those whose head
    shows that they cannot be read are skipped, and others are drawn for them.

    Raises BntoolsError for a folder without images, or without any that can be read.
    """
    if reading.channels not in (None, 1, 3):
        raise BntoolsError(
            f"{source}: images have 1 or 3 channels, not the {reading.channels} asked for (or taken by the model's "
            f"first convolution); give arrays of shape (samples, {reading.channels}, height, width) as .npy"
        )
    files, ignored = ([source], 0) if source.is_file() else find(source)
    if not files:
        found = f"only {_plural(ignored, 'other file')}" if ignored else "nothing"
        raise BntoolsError(f"{source}: found {found} where images were expected ({', '.join(sorted(images.SUFFIXES))})")
    order = np.random.default_rng(reading.seed).permutation(len(files))
    skipped: list[images.Unreadable] = []
    drawn = list(islice(_readable((files[i] for i in order), skipped), reading.max_samples))
    if not drawn:
        raise _nothing(str(source), skipped)
    headers = [header for _, header in drawn]
    channels = reading.channels or (1 if all(header.grey for header in headers) else 3)
    reading.check_channels(str(source), channels)
    size = reading.size or _common_size(headers)
    return Folder(
        str(source), reading, [path for path, _ in drawn], headers, channels, size, len(files), ignored, skipped
    )


def find(folder: Path) -> tuple[list[Path], int]:
    """The image files at any depth, sorted, and how many other files there are. Hidden ones count for neither.

    Links are followed, each folder once, so that a loop of links ends.
    """
    found: list[Path] = []
    others = 0
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        visible = [name for name in names if not name.startswith(".")]
        chosen = [name for name in visible if os.path.splitext(name)[1].lower() in images.SUFFIXES]
        found += [Path(place, name) for name in chosen]
        others += len(visible) - len(chosen)
    return sorted(found), others


def _readable(files: Iterator[Path], skipped: list[images.Unreadable]) -> Iterator[tuple[Path, images.Header]]:
    for path in files:
        header = images.header(path)
        if isinstance(header, images.Unreadable):
            skipped.append(header)
        else:
            yield path, header


def _common_size(headers: list[images.Header]) -> tuple[int, int]:
    """The size that more than half of the images have, else the usual square, smaller if the images are."""
    size, times = Counter(header.size for header in headers).most_common(1)[0]
    if times > len(headers) / 2:
        return size
    side = min(USUAL_SIZE, int(median(min(header.size) for header in headers)))
    return side, side


def _nothing(source: str, skipped: list[images.Unreadable]) -> BntoolsError:
    count = len(skipped)
    none = f"none of the {count:,} images can" if count > 1 else "its only image cannot"
    return BntoolsError(f"{source}: {none} be read: {_named(skipped)}")


def _named(unreadable: list[images.Unreadable]) -> str:
    named = "; ".join(f"{bad.path.name}: {bad.reason}" for bad in unreadable[:NAMED])
    return named + (f"; and {len(unreadable) - NAMED:,} more" if len(unreadable) > NAMED else "")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _shape(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
