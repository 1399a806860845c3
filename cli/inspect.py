"""``bntools inspect``: what a model's BN layers hold, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import advised, arguments, diagnosis, loading, output, placing, progress, reporting
from .loading import load
from .reading import Reading, reading_options, said_when_skipped

if TYPE_CHECKING:
    import numpy as np

    from bntools.diagnosis.records import Diagnosis
    from bntools.layer import BatchNorm

# What most models have in common in all layers is said once, above the table.
COMMON = ("kind", "eps", "momentum", "updates", "frozen")


@click.command(short_help="What BN layers hold, what is wrong, and how they fit DATA.")
@arguments.model
@arguments.optional_data
@click.option(
    "--histogram", "histograms", multiple=True, metavar="LAYER", help="With DATA: a histogram of this layer's input."
)
@click.option(
    "--training-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="With DATA: the batch size of the training to come, for the advice.",
)
@reading_options
@placing.options
@arguments.arch
@arguments.allow
@arguments.layers
@arguments.to_inference
@arguments.html
@arguments.force
@arguments.as_json
def command(
    model: Path,
    data: str | None,
    histograms: tuple[str, ...],
    training_batch: int | None,
    reading: Reading,
    device: str | None,
    autocast: str | None,
    arch: str | None,
    allow: tuple[str, ...],
    layers: tuple[str, ...],
    to_inference: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """What the BN layers of MODEL hold, and what is wrong with them.

    With DATA, as in bntools recalibrate, also how well they fit it, and what to do. MODEL stays as it is.
    The report of --html shows what arrives at the first and the last layer, or at those named by --histogram.
    """
    if data is None:
        _refuse_without_data(histograms, training_batch, device, autocast, to_inference, html)
        _look(model, arch, allow, layers, as_json)
        return
    reporting.refuse(html, force)
    placing.refuse(model, device, autocast)
    loaded = load(model, arch, allow)
    loading.to_inference(model, loaded, to_inference, quiet=as_json)
    batches = reading.open(data, loaded)
    histograms = histograms or (_ends(loaded, layers) if html else ())
    output.say(f"{data}: {batches.description}", quiet=as_json)
    with placing.placed(loaded, device, autocast) as there:
        found = _diagnose(there.model, data, batches, reading, layers, histograms, training_batch, as_json)
    found = advised.typed(found, model, data)
    reporting.write(html, found, {"model": str(model), "data": f"{data}: {batches.description}"})
    if as_json:
        figures = diagnosis.figures(found)
        records = [{**_record(each.layer), **of} for each, of in zip(found, figures["layers"], strict=True)]
        about = {"model": str(model), **there.record, "input": batches.spec}
        output.as_json({**about, **figures, "layers": records})
        return
    diagnosis.show(found)
    if any(layer.layer.problems for layer in found):  # "no problems" below an advice would contradict it
        _print_problems([layer.layer for layer in found])
    reporting.said(html, quiet=False)


def _ends(model: Any, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The first and the last of the layers that can be measured, by name."""
    import bntools
    from bntools import backends
    from bntools.measurement import targets

    measured, _ = targets(bntools.inspect(model), layers or None, backends.absence(model), frozen=True)
    return tuple(dict.fromkeys((measured[0], measured[-1])))


def _refuse_without_data(
    histograms: tuple[str, ...],
    training_batch: int | None,
    device: str | None,
    autocast: str | None,
    to_inference: bool,
    html: Path | None,
) -> None:
    options = ("--histogram", "--training-batch", "--device", "--autocast", "--to-inference", "--html")
    values = (histograms, training_batch, device, autocast, to_inference, html)
    for name, value in zip(options, values, strict=True):
        if value:
            raise click.UsageError(f"{name} is for a diagnosis: give DATA")


def _diagnose(
    model: Any,
    data: str,
    batches: Any,
    reading: Reading,
    layers: tuple[str, ...],
    histograms: tuple[str, ...],
    training_batch: int | None,
    quiet: bool,
) -> Diagnosis:
    import bntools
    from bntools.diagnosis import domains

    parts = domains.of_folder(data, partial(_part, model, reading, batches.spec))
    with said_when_skipped(data, batches, quiet), progress.samples() as report:
        return bntools.inspect(
            model,
            batches,
            layers=layers or None,
            batch_size=training_batch,
            histograms=histograms,
            domains=parts,
            progress=report,
        )


def _part(model: Any, reading: Reading, spec: dict[str, Any], folder: str, most: int) -> Any:
    """A subfolder of images, opened as the whole folder was."""
    channels = 3 if spec["channel_order"] == "RGB" else 1
    height, width = spec["size"]
    return replace(reading, size=(height, width), channels=channels, max_samples=most).open(folder, model)


def _look(model: Path, arch: str | None, allow: tuple[str, ...], layers: tuple[str, ...], as_json: bool) -> None:
    """Without data: the file is only looked into."""
    loaded = load(model, arch, allow, peek=True)
    import bntools
    from bntools import backends
    from bntools.layer import select

    found = bntools.inspect(loaded)
    if layers or not found:
        found = select(found, layers or None, backends.absence(loaded))
    if as_json:
        output.as_json({"model": str(model), "layers": [_record(layer) for layer in found]})
        return
    _print_table(found)
    _print_training(found)
    _print_problems(found)


def _print_table(layers: list[BatchNorm]) -> None:
    cells = [_cells(layer) for layer in layers]
    common = [key for key in COMMON if len({row[key] for row in cells}) == 1]
    columns = [key for key in cells[0] if key not in common]
    features = sum(layer.features for layer in layers)
    said = [cells[0][key] if key == "kind" else f"{key} {cells[0][key]}" for key in common]
    click.echo(f"{output.counted(len(layers), 'BN layer')}, {features:,} channels")
    if said:
        click.echo(f"all: {', '.join(said)}")
    output.table(columns, [[row[key] for key in columns] for row in cells])


def _print_training(layers: list[BatchNorm]) -> None:
    """What the layers do while the model trains: in inference all use their stored statistics."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        names.setdefault(layer.training, []).append(layer.name)
    for what, having in names.items():
        click.echo(f"in training, {'every layer' if len(names) == 1 else _some(having)}: {what}")


def _print_problems(layers: list[BatchNorm]) -> None:
    ill = [layer for layer in layers if layer.problems]
    if not ill:
        click.echo("no problems found")
        return
    click.echo(f"problems in {len(ill)} of {output.counted(len(layers), 'layer')}:")
    names: dict[str, list[str]] = {}
    for layer in ill:
        for problem in layer.problems:
            names.setdefault(problem, []).append(layer.name)
    for problem, having in names.items():
        click.echo(f"  {_some(having)}: {problem}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _cells(layer: BatchNorm) -> dict[str, str]:
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "channels": str(layer.features),
        "eps": output.number(layer.eps),
        "momentum": output.number(layer.momentum),
        "updates": "-" if layer.updates is None else f"{layer.updates:,}",
        "mean": _span(layer.mean),
        "variance": _span(layer.var),
        "frozen": _frozen(layer),
        "problems": str(len(layer.problems)) if layer.problems else "",
    }


def _span(values: np.ndarray | None) -> str:
    return "-" if values is None or not values.size else f"{values.min():.3g} .. {values.max():.3g}"


def _frozen(layer: BatchNorm) -> str:
    if layer.stats_frozen and layer.affine_frozen:
        return "yes"
    return "statistics" if layer.stats_frozen else "affine" if layer.affine_frozen else "no"


def _record(layer: BatchNorm) -> dict[str, Any]:
    arrays = {"mean": layer.mean, "var": layer.var, "scale": layer.scale, "shift": layer.shift}
    return {
        "name": layer.name,
        "kind": layer.kind,
        "features": layer.features,
        "axis": layer.axis,
        "eps": layer.eps,
        "momentum": layer.momentum,
        "updates": layer.updates,
        "initial_share": layer.initial_share,
        "dtype": layer.dtype,
        "stats_frozen": layer.stats_frozen,
        "affine_frozen": layer.affine_frozen,
        "training": layer.training,
        "ranges": {
            key: None if a is None or not a.size else {"min": a.min(), "max": a.max()} for key, a in arrays.items()
        },
        "problems": layer.problems,
    }
