"""Arrays in files as batches: ``.npy``, ``.npz``, and ``.pt`` and ``.safetensors`` through the PyTorch back end."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bntools import backends, sniff
from bntools.errors import BntoolsError
from bntools.files import State, state
from bntools.reading import Reading
from bntools.rows import Rows, changed

SLACK, RATIO = 64 << 20, 200  # bytes, and how far arrays may be compressed beyond them
SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Arrays:
    """One array, or several by name, whose first axis counts the samples; ``order`` is that of the samples.

    ``file`` is that from which rows are read one batch at a time, and its state when it was opened.
    uint8 arrays of rank 4 hold images, and are scaled to 0..1 as a folder of images is; all others are taken as they
    are.
    """

    content: np.ndarray | Rows | dict[str, np.ndarray]
    reading: Reading
    order: np.ndarray
    total: int
    file: tuple[Path, State] | None = None

    drawn = True

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.order)

    def batches(self, most: int | None = None, skip: int = 0) -> Iterator[Any]:
        """Batches of the samples to read here but the first ``skip``, or of the first ``most`` of all.

        They are arrays, or dicts of arrays.
        """
        order = (self.order[:most] if most else self.reading.dealt(self.order))[skip:]
        for start in range(0, len(order), self.reading.batch_size):
            chosen = np.sort(order[start : start + self.reading.batch_size])  # in file order: it may be on a disk
            if isinstance(self.content, dict):
                yield {name: self._taken(name, chosen) for name in self.content}
            else:
                yield self._normalized(self._taken("", chosen))

    def details(self) -> dict[str, Any]:
        """What was read and how, for the record."""
        last = {"channel_axis": 3} if self._channels_last else {}
        return {**last, "scaled": self.reading.scaling if any(map(self._scaled, self._named)) else None, "files": 1}

    def description(self) -> str:
        """What was read and how, in a line."""
        drawn = f" drawn from {self.total:,}" if self.samples < self.total else ""
        return f"{self.samples:,} sample{'s' * (self.samples != 1)}{drawn}: {self.words()}"

    def words(self) -> str:
        """What a sample is, in words."""
        return ", ".join(
            f"{name} {array.dtype} {'x'.join(map(str, array.shape[1:])) or 'numbers'}".strip()
            + (f" {self.reading.scaled}" if self._scaled(name) else "")
            for name, array in self._named.items()
        )

    def _scaled(self, name: str) -> bool:
        return holds_images(self._named[name]) and self.reading.scales(name)

    def _taken(self, name: str, chosen: np.ndarray) -> np.ndarray:
        rows = self._named[name][chosen]
        self._check_unchanged()
        return np.divide(rows, np.float32(255), dtype=np.float32) if self._scaled(name) else np.asarray(rows)

    def _check_unchanged(self) -> None:
        """Raise BntoolsError where the file that is read was written to; one that was replaced is still there to us."""
        if self.file is None:
            return
        path, before = self.file
        now = state(path)
        if now is not None and before is not None and now[0] == before[0] and now != before:
            raise changed(path)

    def _normalized(self, batch: np.ndarray) -> np.ndarray:
        if not self._channels_last:
            return self.reading.normalized(batch)
        return np.moveaxis(self.reading.normalized(np.moveaxis(batch, -1, 1)), 1, -1)

    @property
    def _channels_last(self) -> bool:
        return self.reading.channels_last and not isinstance(self.content, dict) and self.content.ndim == 4

    @property
    def _named(self) -> Mapping[str, np.ndarray | Rows]:
        return self.content if isinstance(self.content, dict) else {"": self.content}


def read(path: Path, reading: Reading) -> Arrays:
    """The arrays in a file, samples in an order that only the seed decides. ``.npy`` stays on the disk.

    Raises BntoolsError where the file is damaged, holds anything but arrays of numbers of one length,
    or options do not fit them.
    """
    before = state(path)
    content = _loaded(path)
    named = content if isinstance(content, dict) else {"the array": content}
    for name, array in named.items():
        _check(path, name, array)
    lengths = {name: len(array) for name, array in named.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise BntoolsError(f"{path}: arrays of unequal length ({listed}); expected one row a sample in each")
    check_options(path, content, reading)
    total = next(iter(lengths.values()))
    order = np.random.default_rng(reading.seed).permutation(total)
    if state(path) != before:
        raise changed(path)
    file = (path, before) if isinstance(content, Rows | np.memmap) else None
    return Arrays(content, reading, order[: reading.max_samples], total, file)


def check_options(path: Path | str, content: Any, reading: Reading) -> None:
    """Refuse options that do not fit arrays, ``path`` being where those come from."""
    if isinstance(content, dict):
        if reading.mean or reading.size or reading.preprocess:
            raise BntoolsError(
                f"{path}: holds several arrays, to which mean=, std=, size= and preprocess= do not apply"
            )
        return
    shape = content.shape
    if reading.preprocess is not None and not holds_images(content):
        raise BntoolsError(
            f"{path}: preprocess= is for images of 8 bits, of shape (samples, height, width, 3); found {content.dtype} "
            f"{shape}"
        )
    pixels = shape[1:3] if reading.channels_last else shape[2:]
    if reading.size is not None and (content.ndim != 4 or pixels != tuple(reading.size)):
        raise BntoolsError(f"{path}: size= resizes images, not arrays; the samples have shape {shape[1:]}")
    axis = 3 if reading.channels_last and content.ndim == 4 else 1
    misplaced = axis == 1 and content.ndim == 4 and shape[1] != reading.channels == shape[3]
    if reading.channels is not None and misplaced:
        raise BntoolsError(
            f"{path}: an array of shape {shape} has its channels last; expected (samples, {reading.channels}, height, "
            f"width): save array.transpose(0, 3, 1, 2)"
        )
    if reading.preprocess is not None:
        reading.check_channels(str(path), shape[axis])
    if reading.mean is not None:
        if content.ndim < 2 or not (content.dtype.kind == "f" or holds_images(content)):
            raise BntoolsError(f"{path}: mean= and std= are for images and float arrays; found {content.dtype} {shape}")
        reading.check_channels(str(path), shape[axis])


def holds_images(array: np.ndarray | Rows) -> bool:
    """Whether an array is taken as 8-bit images."""
    return array.dtype == np.uint8 and array.ndim == 4


def _loaded(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz"):
        return backends.of_path(path).arrays(str(path))
    try:
        if suffix == ".npy":
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            # In Fortran's order a row lies in pieces, one a number: these stay mapped.
            return Rows(path, mapped) if mapped.size and mapped.ndim and mapped.flags.c_contiguous else mapped
        _check_claims(path)
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except BntoolsError:
        raise
    except Exception as error:
        # NumPy parses the header with ast and zipfile, whose errors all mean the same here.
        said = "it ends before its last number: copy it again" if "mmap length" in str(error) else str(error)
        raise BntoolsError(f"{path}: no readable NumPy file ({sniff.describe(path)}): {said}") from error
    if not found:
        raise BntoolsError(f"{path}: an archive without arrays")
    return next(iter(found.values())) if len(found) == 1 else found


def _check_claims(path: Path) -> None:
    """Refuse an archive whose arrays are said to be larger than what is there, or than its bytes can honestly hold."""
    actual = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries)
        if claimed > RATIO * actual + SLACK:
            raise BntoolsError(f"{path}: claims to unpack from {actual:,} to {claimed:,} bytes: not read")
        for entry in entries:
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if math.prod(shape) * dtype.itemsize > entry.file_size or min(shape, default=0) < 0:
                raise BntoolsError(
                    f"{path}: {entry.filename} has {entry.file_size:,} bytes, too few for {dtype} {shape}"
                )


def _check(path: Path, name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray | Rows) or array.dtype.kind not in "fiub":
        kind = array.dtype if isinstance(array, np.ndarray | Rows) else type(array).__name__
        raise BntoolsError(f"{path}: {name} holds {kind}; expected an array of numbers")
    if not array.ndim:
        raise BntoolsError(f"{path}: {name} is a single number; expected an array whose first axis counts samples")
    if not array.size:
        raise BntoolsError(f"{path}: {name} is empty (shape {array.shape})")
