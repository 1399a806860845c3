"""Writing a verified ONNX file, and saying what was folded and how well it agrees."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bntools.errors import VerificationError

from . import output, progress, reporting


def export(
    model: Path,
    loaded: Any,
    path: Path,
    batch: Any,
    *,
    force: bool,
    providers: tuple[Any, ...] = (),
    tolerance: float | None = None,
    opset: int | None = None,
    html: Path | None = None,
    tried: str = "",
    as_json: bool,
) -> None:
    """Export a loaded model to this path and print what came of it; a report also says why there is no file."""
    import bntools

    about = {"model": str(model), "output": str(path), "tried on": tried}
    providers = providers or ("cpu",)
    options: dict[str, Any] = {"providers": providers, "tolerance": tolerance, "opset": opset}
    try:
        with progress.step(f"exporting {path}"):
            check = bntools.export(loaded, path, batch, overwrite=force, **options)
    except VerificationError as error:
        if error.check is not None:
            reporting.write(html, error.check, {**about, "output": f"{path}, which was not written"})
            reporting.said(html, quiet=as_json)
        raise
    reporting.write(html, check, about, written=path)
    if as_json:
        output.as_json(record(model, path, check.folded, check.kept, check))
    else:
        show(check.folded, check.kept, check, path)
        reporting.said(html, quiet=False)


def record(model: Path, written: Path, folded: list[str], kept: dict[str, str], check: Any) -> dict[str, Any]:
    """The outcome in terms of JSON."""
    return {
        "model": str(model),
        "output": str(written),
        "folded": list(folded),
        "kept": dict(kept),
        "check": verification(check),
    }


def show(folded: list[str], kept: dict[str, str], check: Any, written: Path) -> None:
    """Print the count of folded layers, the reason for each other, and how well the result agrees."""
    total = len(folded) + len(kept)
    click.echo(f"folded {len(folded)} of {output.counted(total, 'BN layer')}{f', kept {len(kept)}:' if kept else ''}")
    for name, reason in kept.items():
        click.echo(f"  {name}: {reason}")
    click.echo(str(check))
    for note in check.notes:
        click.echo(note)
    click.echo(f"wrote {written}")


def verification(check: Any) -> dict[str, Any]:
    """A verification in terms of JSON."""
    return {
        "passed": check.passed,
        "error": check.error,
        "tolerance": check.tolerance,
        "agreement": check.agreement,
        "samples": check.samples,
        "provider": check.provider,
        "optimization": check.optimization,
        "first_divergence": check.first_divergence,
        "divergence": check.divergence and asdict(check.divergence),
        "placement": dict(check.placement),
        "reason": check.reason,
        "outputs": [asdict(output) for output in check.outputs],
        "notes": list(check.notes),
    }
