"""The image files of a folder, at any depth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bntools import images
from bntools.sources.names import Names, each
from bntools.sources.suffixes import IMAGES

HEADS = 20_000  # images whose heads are all looked at before reading: some seconds' worth


@dataclass(frozen=True)
class Files:
    """Image files under a folder, in the order of their names."""

    folder: str
    names: Names
    ignored: int = 0
    unlisted: list[images.Unreadable] = field(default_factory=list)

    container = "folder"
    origin = ""
    other = "other file"
    heads = HEADS
    ahead = None
    drawn = True

    @property
    def total(self) -> int:
        """How many files there are."""
        return len(self.names)

    def order(self, generator: np.random.Generator, most: int | None) -> np.ndarray:
        """Their numbers in a random order; so many as there are, in case some cannot be read."""
        return generator.permutation(self.total)

    def entries(self, numbers: Any) -> Iterator[images.Entry]:
        """The images of these numbers."""
        for number in each(numbers):
            place, name = os.path.split(os.path.join(self.folder, self.names[number]))
            yield images.Entry(number, os.path.join(place, ""), name)


def one(path: Path) -> Files:
    """A single image file."""
    return Files(str(path.parent), Names([path.name]))


def find(folder: Path) -> Files:
    """The image files at any depth, sorted, and how many other files there are. Hidden ones count for neither.

    Links are followed, each folder once, so that a loop of links ends. A folder that cannot be listed is skipped by
    name, except the uppermost, for which OSError is raised.
    """
    names = Names()
    others = 0
    seen: set[tuple[int, int]] = set()
    unlisted: list[images.Unreadable] = []
    waiting = [iter([("", True)])]
    while waiting:
        name, is_folder = next(waiting[-1], (None, False))
        if name is None:
            waiting.pop()
        elif is_folder:
            try:
                waiting.append(_listed(folder, name, seen))
            except OSError as error:
                if not name:
                    raise
                reason = f"this folder cannot be listed: {error.strerror or error}"
                unlisted.append(images.Unreadable(-1, os.path.join(folder, ""), name, reason))
        elif os.path.splitext(name)[1].lower() in IMAGES:
            names.append(name)
        else:
            others += 1
    return Files(str(folder), names, others, unlisted)


def _listed(folder: Path, inside: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """What a folder holds, sorted by name: (name within ``folder``, whether it is a folder)."""
    place = os.path.join(folder, inside)
    status = os.stat(place)
    if (status.st_dev, status.st_ino) in seen:
        return iter(())
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(place) as found:
        visible = [(one.name, _is_folder(one)) for one in found if not one.name.startswith(".")]
    visible.sort()
    kept = ((name, is_folder) for name, is_folder in visible if not (is_folder and name.startswith("__MACOSX")))
    return ((os.path.join(inside, name), is_folder) for name, is_folder in kept)


def _is_folder(one: os.DirEntry[str]) -> bool:
    try:
        return one.is_dir()
    except OSError:  # a link to itself
        return False
