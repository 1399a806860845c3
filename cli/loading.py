"""Loading MODEL, and finding an input to try it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bntools.errors import BntoolsError

from . import paths, progress, records
from .reading import Reading


def load(model: Path, arch: str | None, allow: tuple[str, ...]) -> Any:
    """The model in this file; the framework is imported now."""
    import bntools

    with progress.step(f"loading {model}"):
        return bntools.load(model, arch=arch, allow=allow)


def inputs(path: Path, model: Any, data: str | None, shape: tuple[int, ...] | None, reading: Reading) -> Any:
    """Batches to try a model on, and words for what they are.

    They come from DATA, or are random of the shape given by ``--shape``, or random like the data that
    the record beside the model describes. Raises BntoolsError where there is none of these.
    """
    from bntools import data as sources

    if data is not None:
        batches = reading.open(data, model)
        return batches, f"{data}: {batches.description}"
    if shape is not None:
        return [_random(shape, reading.seed)], f"random input of shape {_times(shape)}"
    record_path, record = _record(path)
    if record is None:
        raise BntoolsError(
            f"nothing says what {path} takes as input: there is no record {record_path} that bntools recalibrate "
            "would have left. Give DATA, a folder or file of inputs, or the shape of one sample, such as "
            "--shape 3,224,224"
        )
    example = sources.example(record["input"], n=_samples(path, record["input"]), seed=reading.seed)
    return [example], f"random input like the data that {record_path} describes"


def example(path: Path, model: Any, data: str | None, shape: tuple[int, ...] | None, reading: Reading) -> Any:
    """The first of those batches, and the words."""
    batches, described = inputs(path, model, data, shape, reading)
    return next(iter(batches)), described


def _record(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The record of this model or of its recalibration: both take the same input."""
    places = [paths.record_of(path), paths.record_of(paths.beside(path, "recalibrated"))]
    for place in places:
        if (record := records.read(place)) is not None and "input" in record:
            return place, record
    return places[0], None


def _samples(path: Path, recorded: dict[str, Any]) -> int:
    """How many samples to try it on: an exported program may be bound to the batch size it was made with."""
    if path.suffix.lower() != ".pt2":
        return 2
    if recorded["kind"] == "factory":
        return int(recorded["measured"].get("samples", 2))
    return int(min(recorded["options"]["batch_size"], recorded["samples"]))


def _random(shape: tuple[int, ...], seed: int) -> Any:
    import numpy as np

    try:
        return np.random.default_rng(seed).standard_normal((2, *shape), dtype=np.float32)
    except ValueError as error:
        raise BntoolsError(f"--shape {_times(shape)}: more numbers than fit into any memory") from error


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)
