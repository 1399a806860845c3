"""``bntools export``: a model as a verified ONNX file, its BN folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import arguments, loading, output, paths, reporting, shipping
from .loading import example, load
from .reading import Reading, reading_options


@click.command(short_help="Write a verified ONNX file.")
@arguments.model
@click.argument("exported", type=click.Path(path_type=Path), metavar="OUT.onnx")
@arguments.optional_data
@arguments.force
@arguments.shape
@arguments.providers
@arguments.tolerance
@arguments.opset
@reading_options
@arguments.arch
@arguments.allow
@arguments.to_inference
@arguments.html
@arguments.as_json
def command(
    model: Path,
    exported: Path,
    data: str | None,
    force: bool,
    shape: tuple[int, ...] | None,
    providers: tuple[Any, ...],
    tolerance: float | None,
    opset: int | None,
    reading: Reading,
    arch: str | None,
    allow: tuple[str, ...],
    to_inference: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Export MODEL to OUT.onnx, BN folded, and verify the file in ONNX Runtime.

    The file appears only if its outputs agree with the model's in eval mode. DATA or --shape say what
    the model takes; after bntools recalibrate the record knows.
    """
    paths.refuse_existing(exported, force=force)
    reporting.refuse(html, force)
    loaded = load(model, arch, allow)
    loading.to_inference(model, loaded, to_inference, quiet=as_json)
    batch, described = example(model, loaded, data, shape, reading)
    output.say(f"trying it on {described}", quiet=as_json)
    shipping.export(
        model,
        loaded,
        exported,
        batch,
        force=force,
        providers=providers,
        tolerance=tolerance,
        opset=opset,
        html=html,
        tried=described,
        as_json=as_json,
    )
