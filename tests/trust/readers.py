"""What the fuzzer feeds: for each reader how a seed is mutated, and what is done with the file that results."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutators
import seeds
import wire

import bntools
from bntools import data, files
from bntools.backends import backend

FULL = 60  # one of so many inputs goes through all of a framework, where that is slow


def mutated(reader: str, suffix: str, content: bytes, others: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """An input made from a seed."""
    if rng.random() < 0.04:  # the beginning of one file and the end of another
        other = rng.choice(others)[1]
        return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]
    for _ in range(rng.choice((1, 1, 1, 2))):
        content = _mutator(reader, suffix, content)(content, rng)
    return content


def _mutator(reader: str, suffix: str, content: bytes) -> mutators.Mutator:
    if reader == "tar":
        return mutators.tar
    if reader in ("safetensors", "stats"):
        return mutators.safetensors
    if reader == "onnx":
        return wire.protobuf
    if content[:2] == b"PK":
        return mutators.archive(_member)
    kinds = {".png": mutators.png, ".jpg": mutators.jpeg, ".npy": mutators.numpy_file}
    if reader == "pt":
        return mutators.pickled  # the old format: one pickle after the other
    return kinds.get(suffix, mutators.blind)


def _member(name: str) -> mutators.Mutator:
    if name.endswith(".pkl"):
        return mutators.pickled
    if name.endswith((".npy",)):
        return mutators.numpy_file
    return mutators.jsoned if "json" in name or name.startswith("archive/models/") else mutators.blind


def read(reader: str, path: Path, number: int) -> None:
    """Read a file as bntools does on behalf of its commands."""
    READ[reader](path, number)


def _pt(path: Path, number: int) -> None:
    if number % 4 == 0:
        _consumed(data.open(path))
    elif number % 4 == 1:
        backend("torch").described(str(path))
    else:
        _model(bntools.load(path, arch=seeds.net))


def _pt2(path: Path, number: int) -> None:
    _model(bntools.load(path))


def _safetensors(path: Path, number: int) -> None:
    _pt(path, number)


def _model(model: Any) -> None:
    bntools.inspect(model)


def _stats(path: Path, number: int) -> None:
    bntools.statfiles.holds_stats(path)
    bntools.load_stats(path)


def _keras(path: Path, number: int) -> None:
    _look_by_copies()
    if number % FULL == 0:
        bntools.inspect(bntools.load(path))
        return
    from bntools.backends.keras import archive

    archive.peek(str(path))


def _look_by_copies() -> None:
    from bntools.backends.keras import looking

    if inspect.isfunction(looking.child):
        from looker import Looker

        looking.child = Looker()


def _onnx(path: Path, number: int) -> None:
    if number % 8 == 0:
        bntools.inspect(bntools.load(path))
    else:
        bntools.inspect(files.working(path))


def _images(path: Path, number: int) -> None:
    _consumed(data.open(path.parent, size=(8, 8) if number % 2 else None))


def _arrays(path: Path, number: int) -> None:
    _consumed(data.open(path))


def _tars(path: Path, number: int) -> None:
    _consumed(data.open(path, size=(8, 8) if number % 2 else None))


def _consumed(batches: Any) -> None:
    for number, _ in enumerate(batches):
        if number == 2:
            break
    _ = batches.description, batches.spec


READ: dict[str, Callable[[Path, int], None]] = {
    "pt": _pt,
    "pt2": _pt2,
    "safetensors": _safetensors,
    "stats": _stats,
    "keras": _keras,
    "onnx": _onnx,
    "images": _images,
    "arrays": _arrays,
    "tar": _tars,
    "parquet": _tars,
}
