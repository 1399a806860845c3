"""Loading MODEL, and finding an input to try it on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bntools.errors import BntoolsError

from . import output, paths, progress, records, stderr
from .reading import Reading


def load(model: Path, arch: str | None, allow: tuple[str, ...], peek: bool = False) -> Any:
    """The model in this file; the framework is imported now. ``peek`` takes what suffices for looking at it."""
    from bntools import files

    read = files.peek if peek else files.working
    logs = stderr.without_logs() if paths.is_keras(model) else nullcontext()
    with logs, progress.step(f"loading {model}"):
        return read(model, arch=arch, allow=allow)


def to_inference(model: Path, loaded: Any, asked: bool, quiet: bool) -> None:
    """If it was asked for, bring a loaded model that was exported in training mode into inference form."""
    if not asked:
        return
    import bntools

    names = bntools.to_inference(loaded)
    said = f"{output.counted(len(names), 'node')} brought into inference form" if names else "in inference form already"
    output.say(f"{model}: {said}", quiet=quiet)


def inputs(path: Path, model: Any, data: str | None, shape: tuple[int, ...] | None, reading: Reading) -> Any:
    """Batches to try a model on, and words for what they are.

    They come from DATA, or are random of the shape given by ``--shape``, or random like the data that
    the record beside the model describes, or as an ONNX file says. Raises BntoolsError where there is none of these.
    """
    from bntools import data as sources
    from bntools.feeding import inputs_of

    if data is not None:
        batches = reading.open(data, model)
        return batches, f"{data}: {batches.description}"
    takes = inputs_of(model)
    if shape is not None:
        return [_random(shape, reading.seed, takes)], f"random input of shape {_times(shape)}"
    record_path, record = _record(path)
    if record is not None:
        samples = _samples(path, record["input"], takes)
        example = sources.example(record["input"], n=samples, seed=reading.seed)
        return [example], f"random input like the data that {record_path} describes"
    if takes:
        from bntools.inputs import random

        return [random(takes, reading.seed)], f"random input of the shape that {path} takes"
    raise BntoolsError(
        f"nothing says what {path} takes as input: there is no record {record_path} that bntools recalibrate "
        "would have left. Give DATA, a folder or file of inputs, or the shape of one sample, such as "
        "--shape 3,224,224"
    )


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


def _samples(path: Path, recorded: dict[str, Any], takes: list[Any]) -> int:
    """How many samples to try it on: a model may be bound to the batch size it was exported with."""
    if bound := [one.batch for one in takes if one.batch]:
        return int(bound[0])
    if path.suffix.lower() != ".pt2":
        return 2
    if recorded["kind"] == "factory":
        return int(recorded["measured"].get("samples", 2))
    return int(min(recorded["options"]["batch_size"], recorded["samples"]))


def _random(shape: tuple[int, ...], seed: int, takes: list[Any]) -> Any:
    from bntools.inputs import Input, random

    if len(takes) > 1:
        raise BntoolsError(f"--shape is for a model of one input; this one has {', '.join(map(str, takes))}: give DATA")
    try:
        return random(takes or [Input("input", "float32", None)], seed, shape)
    except (ValueError, MemoryError) as error:
        raise BntoolsError(f"--shape {_times(shape)}: more numbers than fit into any memory") from error


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in shape)
