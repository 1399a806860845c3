"""``bntools reset``: statistics back to mean 0 and variance 1, for training them anew."""

from __future__ import annotations

from pathlib import Path

import click

from bntools.files import state

from . import arguments, loading, output, paths
from .loading import load


@click.command(short_help="Statistics back to mean 0, variance 1.")
@arguments.model
@arguments.target
@arguments.in_place
@arguments.force
@arguments.layers
@arguments.arch
@arguments.allow
@arguments.to_inference
@arguments.as_json
def command(
    model: Path,
    target: Path | None,
    in_place: bool,
    force: bool,
    layers: tuple[str, ...],
    arch: str | None,
    allow: tuple[str, ...],
    to_inference: bool,
    as_json: bool,
) -> None:
    """Set the BN statistics of MODEL to mean 0 and variance 1, and write MODEL.reset.pt.

    Frozen layers are left as they are unless --layers names them. Eval mode is wrong afterwards until
    the statistics were trained or recalibrated.
    """
    written = paths.destination(model, "reset", target, in_place)
    paths.refuse_existing(written, force=force or in_place)
    before = state(model)
    loaded = load(model, arch, allow)
    loading.to_inference(model, loaded, to_inference, quiet=as_json)
    import bntools

    found = bntools.inspect(loaded)
    names = bntools.reset(loaded, layers=layers or None)
    untouched = {layer.name: layer.obstacle for layer in found if layer.obstacle}
    paths.check_source(model, written, before)
    bntools.save(loaded, written, overwrite=force or in_place)
    if as_json:
        record = {"model": str(model), "output": str(written), "reset": names, "untouched": untouched}
        output.as_json(record)
        return
    for name, reason in untouched.items():
        click.echo(f"untouched: {name}: {reason}")
    click.echo(f"reset {len(names)} of {output.counted(len(found), 'BN layer')}")
    click.echo(f"wrote {written}")
