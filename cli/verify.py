"""``bntools verify``: whether two models compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntools.errors import BntoolsError, VerificationError

from . import arguments, output, progress, reporting, shipping
from .loading import inputs, load
from .reading import Reading, reading_options, said_when_skipped


@click.command(short_help="Whether two models compute the same.")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@arguments.optional_data
@arguments.shape
@arguments.providers
@arguments.tolerance
@reading_options
@arguments.arch
@arguments.allow
@arguments.html
@arguments.force
@arguments.as_json
def command(
    reference: Path,
    candidate: Path,
    data: str | None,
    shape: tuple[int, ...] | None,
    providers: tuple[Any, ...],
    tolerance: float | None,
    reading: Reading,
    arch: str | None,
    allow: tuple[str, ...],
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare the outputs of REFERENCE and CANDIDATE on DATA; exit status 3 if they differ.

    Each is a model file or an ONNX file; DATA, --shape or the record of REFERENCE say what they take.
    The report that --html asks for is written whether they agree or not.
    """
    reporting.refuse(html, force)
    first, second = (_model(path, arch, allow) for path in (reference, candidate))
    batches, described = inputs(reference, _described(first, second), data, shape, reading)
    output.say(f"comparing on {described}", quiet=as_json)
    import bntools

    skips = said_when_skipped(str(data), batches, quiet=as_json)
    with skips, progress.step(f"running {reference} and {candidate}"):
        check = bntools.verify(first, second, batches, providers=providers or ("cpu",), tolerance=tolerance)
    if as_json:
        output.as_json({"reference": str(reference), "candidate": str(candidate), **shipping.verification(check)})
    else:
        for one in check.outputs:
            click.echo(str(one))
    reporting.write(html, check, {"reference": str(reference), "candidate": str(candidate), "compared on": described})
    reporting.said(html, quiet=as_json)
    if not check.passed:
        raise VerificationError(f"{candidate} does not agree with {reference}: {check}", check)
    if not as_json:
        click.echo(str(check))
        for note in check.notes:
            click.echo(note)


def _described(first: Any, second: Any) -> Any:
    """The model that says what both take: an ONNX file, which knows most, or else the one in memory."""
    path = next((each for each in (first, second) if isinstance(each, Path)), None)
    return first if path is None else load(path, None, ())


def _model(path: Path, arch: str | None, allow: tuple[str, ...]) -> Any:
    """What verify compares: ONNX files by their path, other models loaded."""
    if path.suffix.lower() == ".onnx":
        return path
    if arch is None:
        return load(path, None, allow)
    try:  # --arch may be meant for the other file alone, and a whole model refuses it
        return load(path, None, allow)
    except BntoolsError:
        return load(path, arch, allow)
