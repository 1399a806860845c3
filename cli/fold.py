"""``bntools fold``: BN absorbed into the weights beside it, as a model file or as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntools.errors import BntoolsError
from bntools.files import state

from . import arguments, loading, output, paths, progress, reporting, shipping
from .loading import example, load
from .reading import Reading, reading_options


@click.command(short_help="Absorb BN into the weights beside it.")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@arguments.optional_data
@arguments.target
@click.option("--export", "exported", type=click.Path(path_type=Path), metavar="OUT.onnx", help="Write an ONNX file.")
@arguments.force
@arguments.shape
@reading_options
@arguments.layers
@arguments.arch
@arguments.allow
@arguments.to_inference
@arguments.html
@arguments.as_json
def command(
    model: Path | None,
    data: str | None,
    target: Path | None,
    exported: Path | None,
    force: bool,
    shape: tuple[int, ...] | None,
    reading: Reading,
    layers: tuple[str, ...],
    arch: str | None,
    allow: tuple[str, ...],
    to_inference: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Fold the BN layers of MODEL into the weights beside them, and check that nothing changed.

    With --export model.onnx the result is a verified ONNX file, and MODEL may be left out: it is then
    the newest of model.recalibrated.*, model.applied.* and model.* there. With -o the result stays in the
    format of MODEL. DATA or --shape say what the model takes; after bntools recalibrate the
    record knows, and an ONNX file knows itself. More options for ONNX: bntools export.
    """
    written = _written(target, exported, layers)
    paths.refuse_existing(written, force=force)
    reporting.refuse(html, force)
    if model is None:
        model = _choose(written, as_json)
    if target is not None and paths.is_onnx(target) != paths.is_onnx(model):
        other = f"for ONNX use --export {target}" if paths.is_onnx(target) else "an ONNX file stays one: -o OUT.onnx"
        raise click.UsageError(f"-o writes a model in the format it came in: {other}")
    before = state(model)
    loaded = load(model, arch, allow)
    loading.to_inference(model, loaded, to_inference, quiet=as_json)
    batch, described = example(model, loaded, data, shape, reading)
    output.say(f"trying it on {described}", quiet=as_json)
    if exported is not None:
        shipping.export(model, loaded, exported, batch, force=force, html=html, tried=described, as_json=as_json)
        return
    import bntools

    result = _folded(model, loaded, batch, layers)
    with reporting.beside(html, result, {"model": str(model), "output": str(written), "tried on": described}):
        paths.check_source(model, written, before)
        bntools.save(result.model, written, overwrite=force)
    _say(model, written, result, html, as_json)


def _written(target: Path | None, exported: Path | None, layers: tuple[str, ...]) -> Path:
    """The one file to write; raises click.UsageError where the options do not go together."""
    written = target or exported
    if written is None or (target and exported):
        raise click.UsageError("say where to write: either --export OUT.onnx or -o OUT.pt")
    if exported is not None and not paths.is_onnx(exported):
        raise click.UsageError(f"--export writes an .onnx file; for another format use -o {exported}")
    if exported is not None and layers:
        raise click.UsageError("--layers goes with -o: an ONNX file has all of its BN folded")
    if paths.is_folder_form(written):
        raise BntoolsError(
            f"{written}: a folded model has other weights than its SavedModel, which cannot take them: write a .keras, "
            f"or --export ONNX"
        )
    if written.suffix == ".safetensors":
        raise BntoolsError(
            f"{written}: a folded model does not fit its --arch any more (BN is gone, biases have come), so its "
            f"tensors alone could not be loaded again: write a .pt, which holds the whole model, or --export ONNX"
        )
    return written


def _choose(written: Path, as_json: bool) -> Path:
    model, candidates = paths.newest_model(written)
    others = f", the newest of {', '.join(path.name for path in candidates)}" if len(candidates) > 1 else ""
    output.say(f"folding {model}{others}", quiet=as_json)
    return model


def _folded(model: Path, loaded: Any, batch: Any, layers: tuple[str, ...]) -> Any:
    import bntools

    with progress.step(f"folding {model}"):
        return bntools.fold(loaded, batch, layers=layers or None)


def _say(model: Path, written: Path, result: Any, html: Path | None, as_json: bool) -> None:
    if as_json:
        output.as_json(shipping.record(model, written, result.folded, result.kept, result.check))
    else:
        shipping.show(result.folded, result.kept, result.check, written)
        reporting.said(html, quiet=False)
