"""Arrays in a file, with facts about them: safetensors, read and written with NumPy alone.

The format (github.com/huggingface/safetensors): eight bytes with the length of a header, the header in JSON, which
tells dtype, shape and place of every tensor, then their bytes. Here every tensor has one axis, and the facts are JSON
in the metadata, under a key that tells what kind of file it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bntools import sniff
from bntools.errors import BntoolsError
from bntools.files import atomic_write
from bntools.stats import is_count

LONGEST = 16 << 20  # bytes of a header; one tensor takes some 200
LARGEST = 1 << 30  # bytes of a file; the largest networks have some megabytes of statistics
DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


@dataclass(frozen=True)
class Kind:
    """A kind of file: the key of its facts, the newest format that is read, what it is of, and what writes it."""

    key: str
    format: int
    of: str
    writer: str

    def write(
        self, path: Path, facts: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, overwrite: bool = True
    ) -> None:
        """Write a file, all or not at all; the facts get the format."""
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # so that float64 lies aligned
        text = json.dumps({"format": self.format, **facts}, allow_nan=False)
        header: dict[str, Any] = {"__metadata__": {self.key: text}}
        place = 0
        for name, values in tensors.items():
            kind = next(kind for kind, dtype in DTYPES.items() if dtype == values.dtype)
            header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
            place += values.nbytes
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with atomic_write(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.writelines(values.tobytes() for values in tensors.values())

    @contextmanager
    def reading(self, path: Path) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """The facts in a file and its tensors, as float64 of shape (values,); nothing in it is executed.

        Whatever a crafted file makes Python raise in the block means the same as where the file is missing, damaged or
        of another kind: BntoolsError.
        """
        data = self._bytes(path)
        with self._damage(path):
            header, start = self._header(path, data)
            facts = self._facts(header)
            yield facts, _tensors(header, memoryview(data)[start:])

    def is_kind(self, path: Path) -> bool:
        """Whether a file is of this kind, told by its header alone."""
        if not path.is_file():
            return False
        with _readable(path), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST:
                return False
            try:
                metadata = json.loads(file.read(length)).get("__metadata__", {})
            except (ValueError, RecursionError, AttributeError):
                return False
        return isinstance(metadata, dict) and self.key in metadata

    def _bytes(self, path: Path) -> bytes:
        if path.is_dir():
            raise BntoolsError(f"{path}: is a folder; expected a file of {self.of}")
        with _readable(path):
            size = path.stat().st_size
            if not path.is_file():
                raise BntoolsError(f"{path}: is a device or a pipe; expected a file of {self.of}")
            if size > LARGEST:
                raise BntoolsError(f"{path}: {size:,} bytes, where {self.of} takes megabytes at the most")
            return path.read_bytes()

    def _header(self, path: Path, data: bytes) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or not data[8:9] == b"{":
            raise BntoolsError(f"found {sniff.describe(path)} where a file of {self.of} was expected")
        if length > min(LONGEST, len(data) - 8):
            raise BntoolsError(f"truncated or damaged: a header of {length:,} bytes in a file of {len(data):,}")
        return json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique), 8 + length

    def _facts(self, header: dict[str, Any]) -> dict[str, Any]:
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or self.key not in metadata:
            raise BntoolsError(f"a safetensors file of {len(header)} tensors, not of {self.of}: {self.writer}")
        facts = json.loads(metadata[self.key], object_pairs_hook=_unique)
        if facts["format"] > self.format:
            raise BntoolsError(
                f"{self.of} in format {facts['format']}, and this bntools reads {self.format}: update it"
            )
        return facts

    @contextmanager
    def _damage(self, path: Path) -> Iterator[None]:
        try:
            yield
        except BntoolsError as error:
            raise error if str(error).startswith(str(path)) else BntoolsError(f"{path}: {error}") from error
        except KeyError as error:
            raise BntoolsError(f"{path}: a damaged file of {self.of}: it lacks {error}") from error
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise BntoolsError(f"{path}: a damaged file of {self.of}: {error}") from error


def _tensors(header: dict[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """The arrays by name; every byte of the file belongs to exactly one of them."""
    found, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} is of dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}")
        (features,), (start, end), dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
        if not is_count(features) or start != place or end - start != features * dtype.itemsize or end > len(data):
            raise ValueError(f"{name!r} of shape {entry['shape']} does not lie where bytes {start} to {end} are")
        found[name] = np.frombuffer(data[start:end], dtype).astype(np.float64)
        place = end
    if place != len(data):
        raise ValueError(f"{len(data) - place:,} bytes belong to no tensor")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BntoolsError(f"{path}: no such file") from error
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read: {error.strerror or error}") from error
