"""``bntools stats``: a model's statistics as a small file, and such a file into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntools.files import state

from . import arguments, loading, output, paths
from .loading import load

statistics_file = click.argument("file", type=click.Path(path_type=Path))


@click.group("stats", short_help="Statistics as small files: save, apply, show.")
def command() -> None:
    """The statistics of a model as a small file that tells what it fits, and such a file into a model."""


@command.command("save")
@arguments.model
@arguments.target
@arguments.force
@click.option(
    "--samples", type=click.IntRange(min=0), metavar="N", help="How many they were measured on, for the file."
)
@click.option("--note", default="", metavar="TEXT", help="A sentence for those who find the file.")
@arguments.arch
@arguments.allow
@arguments.as_json
def save(
    model: Path,
    target: Path | None,
    force: bool,
    samples: int | None,
    note: str,
    arch: str | None,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the statistics of MODEL to a file, by default MODEL.stats.safetensors.

    It holds mean and variance of each layer, and what tells which model they fit; not the model's weights.
    """
    written = target or model.with_name(f"{model.name.removesuffix(model.suffix)}.stats.safetensors")
    paths.refuse_existing(written, force=force)
    loaded = load(model, arch, allow)
    import bntools

    stats = bntools.statistics(loaded, samples=samples, note=note)
    bntools.save_stats(stats, written, overwrite=force)
    if as_json:
        output.as_json({"model": str(model), "output": str(written), **described(stats)})
        return
    click.echo(str(stats))
    click.echo(f"wrote {written}, {written.stat().st_size:,} bytes")


@command.command("apply")
@arguments.model
@statistics_file
@arguments.target
@arguments.in_place
@arguments.force
@click.option("--other-weights", is_flag=True, help="Apply although eps, axis or the weights outside of BN differ.")
@arguments.arch
@arguments.allow
@arguments.to_inference
@arguments.as_json
def apply(
    model: Path,
    file: Path,
    target: Path | None,
    in_place: bool,
    force: bool,
    other_weights: bool,
    arch: str | None,
    allow: tuple[str, ...],
    to_inference: bool,
    as_json: bool,
) -> None:
    """Write MODEL with the statistics of FILE, by default to MODEL.applied with MODEL's suffix.

    Refused where FILE is of another model: of other layers, or of other weights than those it was measured behind.
    """
    written = paths.destination(model, "applied", target, in_place)
    paths.refuse_existing(written, force=force or in_place)
    before = state(model)
    loaded = load(model, arch, allow)
    loading.to_inference(model, loaded, to_inference, quiet=as_json)
    import bntools

    applied = bntools.apply(loaded, file, strict=not other_weights)
    paths.check_source(model, written, before)
    bntools.save(loaded, written, overwrite=force or in_place)
    if as_json:
        record = {"model": str(model), "statistics": str(file), "output": str(written)}
        output.as_json({**record, "layers": applied.layers, "notes": applied.notes})
        return
    for note in applied.notes:
        click.echo(note)
    click.echo(f"applied {file} to {output.counted(len(applied.layers), 'BN layer')}")
    click.echo(f"wrote {written}")


@command.command("show")
@statistics_file
@arguments.as_json
def show(file: Path, as_json: bool) -> None:
    """What FILE holds: of which model, measured on what, and the layers."""
    import bntools

    stats = bntools.load_stats(file)
    if as_json:
        output.as_json({"file": str(file), **described(stats)})
        return
    click.echo(str(stats))
    click.echo(f"fingerprint {stats.fingerprint}, weights {stats.weights}, taken {stats.date}")
    click.echo(", ".join(f"{name} {version}" for name, version in stats.versions.items()))
    if stats.note:
        click.echo(stats.note)
    output.table(
        ["layer", "channels", "eps", "updates", "mean", "variance"],
        [
            [
                layer.name,
                str(layer.features),
                output.number(layer.eps),
                "-" if layer.updates is None else f"{layer.updates:,}",
                f"{layer.mean.min():.3g} .. {layer.mean.max():.3g}",
                f"{layer.var.min():.3g} .. {layer.var.max():.3g}",
            ]
            for layer in stats
        ],
    )


def described(stats: Any) -> dict[str, Any]:
    """What a file says of its statistics, and each layer's number of channels, which there its arrays tell."""
    from bntools import statfiles

    record = statfiles.described(stats)
    layers = [{**layer, "features": one.features} for layer, one in zip(record["layers"], stats, strict=True)]
    return {**record, "layers": layers}
