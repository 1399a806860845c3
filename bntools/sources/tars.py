"""Images in tar shards as WebDataset writes them, read where they lie: nothing is ever unpacked.

The headers of an uncompressed archive say where its members are, so that members can be read in any order.
Consecutive members whose names agree up to the first dot of their last part are one sample (WebDataset's rule).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bntools import ahead, images, sniff
from bntools.errors import BntoolsError
from bntools.sources import tarheaders
from bntools.sources.names import Names, each
from bntools.sources.parts import Part, Stamp, stamp
from bntools.sources.suffixes import IMAGES
from bntools.sources.tarheaders import Member

HEADS = 20_000  # images whose heads are all looked at before reading
SHARDS = 8  # whose headers are read at a time: on a disk far away, each takes its time to come


@dataclass
class Shard:
    """Where the images of one archive are. ``ignored`` counts the other members, ``refused`` names bad ones."""

    path: Path
    stamp: Stamp
    names: Names = field(default_factory=Names)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    ignored: int = 0
    refused: list[images.Unreadable] = field(default_factory=list)


class Members:
    """The images in tar files, in the order of the files and within them."""

    container = "tar"
    other = "other member"
    heads = HEADS
    ahead = None
    drawn = True

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._ends = np.cumsum([len(shard.names) for shard in shards])
        self.total = int(self._ends[-1])
        self.ignored = sum(shard.ignored for shard in shards)
        self.unlisted = [bad for shard in shards for bad in shard.refused]

    @property
    def origin(self) -> str:
        """Where the images lie, in words."""
        return " in a tar file" if len(self._shards) == 1 else f" in {len(self._shards):,} tar files"

    def order(self, generator: np.random.Generator, most: int | None) -> np.ndarray:
        """Their numbers in a random order; so many as there are, in case some cannot be read."""
        return generator.permutation(self.total)

    def entries(self, numbers: Any) -> Iterator[images.Entry]:
        """The images of these numbers."""
        which = np.searchsorted(self._ends, numbers, side="right")
        for number, index in zip(each(numbers), each(which), strict=True):
            shard = self._shards[index]
            within = number - (int(self._ends[index - 1]) if index else 0)
            part = Part(shard.path, shard.offsets[within], shard.sizes[within], shard.stamp)
            yield _entry(shard.path, shard.names[within], number, part)


def index(paths: Sequence[Path]) -> Members:
    """Look through the headers of tar files for images.

    Members that are links, devices or sparse, that have absolute paths or go beyond the end of the file are skipped by
    name where they would be images. Raises BntoolsError for what is no uncompressed tar file.
    """
    with closing(ahead.in_order(_indexed, paths, SHARDS)) as found:
        return Members(list(found))


def _indexed(path: Path) -> Shard:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        start = os.pread(descriptor, sniff.LOOKED_AT, 0)
        if start.startswith(tarheaders.COMPRESSED):
            raise BntoolsError(
                f"{path}: is compressed, so that nothing can be drawn from it at random: unpack it to a plain .tar "
                f"first (gunzip, xz -d, zstd -d); images hardly get smaller by it"
            )
        shard = Shard(path, stamp(descriptor))
        members = tarheaders.members(path, descriptor, shard.stamp[0])
        for _, group in groupby(filter(_is_visible, members), _key):
            _add(shard, list(group))
        if not shard.refused and not tarheaders.has_end(descriptor, shard.stamp[0]):
            bad = images.Unreadable(-1, os.path.join(path.parent, ""), path.name, "it has no end: more may be missing")
            shard.refused.append(bad)
        return shard
    finally:
        os.close(descriptor)


def _add(shard: Shard, sample: list[Member]) -> None:
    """Take in one sample: its image that is called just key and suffix, or all its images if none is."""
    candidates = [one for one in sample if os.path.splitext(one.name)[1].lower() in IMAGES]
    plain = [one for one in candidates if os.path.basename(one.name).count(".") == 1]
    chosen = plain[:1] or candidates
    shard.ignored += len(sample) - len(chosen)
    for one in chosen:
        if one.problem:
            bad = _entry(shard.path, one.name, -1)
            shard.refused.append(images.Unreadable(-1, bad.place, bad.name, one.problem))
        else:
            shard.names.append(one.name)
            shard.offsets.append(one.offset)
            shard.sizes.append(one.size)


def _entry(path: Path, name: str, number: int, part: Part | None = None) -> images.Entry:
    return images.Entry(number, os.path.join(path.parent, ""), f"{path.name}: {name}", part)


def _is_visible(member: Member) -> bool:
    """Neither a folder nor hidden, nor what macOS keeps beside a file."""
    name = member.name
    return not (member.is_folder or os.path.basename(name).startswith(".") or name.startswith("__MACOSX"))


def _key(member: Member) -> tuple[str, str]:
    folder, base = os.path.split(member.name)
    return folder, base.partition(".")[0]
