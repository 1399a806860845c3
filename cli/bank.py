"""``bntools recalibrate --per-domain``: a file of statistics for each subfolder of DATA."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntools.backends import is_saved_model
from bntools.errors import BntoolsError

from . import output, progress, records
from .reading import Reading, said_when_skipped

if TYPE_CHECKING:
    from bntools.placing import Placed

WORD = "sites"
RECORD = "record.json"
SUFFIX = ".safetensors"


def destination(model: Path, target: Path | None, in_place: bool, force: bool) -> Path:
    """The folder of statistics: ``-o``, or ``model.sites`` beside ``model.pt``.

    Raises click.UsageError for ``--in-place``, BntoolsError where something is there that is not to be replaced:
    ``--force`` replaces such a folder of an earlier time, and no other.
    """
    if in_place:
        raise click.UsageError("--per-domain leaves MODEL as it is: --in-place has no meaning there")
    stem = model.name if is_saved_model(model) else model.name.removesuffix(model.suffix)
    folder = target or model.with_name(f"{stem}.{WORD}")
    if not folder.parent.is_dir():
        raise BntoolsError(f"{folder}: there is no folder {folder.parent}")
    if folder.exists() and not force:
        raise BntoolsError(f"{folder} exists: choose another name with -o, or overwrite it with --force")
    if folder.exists():
        _check_own(folder)
    return folder


def _check_own(folder: Path) -> None:
    """Raise BntoolsError for a folder that holds anything but what --per-domain wrote: it would be lost."""
    record = records.read(folder / RECORD)
    if record is None:
        raise BntoolsError(f"{folder} is no folder that --per-domain wrote, so it is not replaced: choose another name")
    own = {RECORD, *(f"{name}{SUFFIX}" for name in record.get("domains", {}))}
    if others := sorted(one.name for one in folder.iterdir() if one.name not in own):
        raise BntoolsError(
            f"{folder} holds {others[0]!r}, which --per-domain did not write, so it is not replaced: move that "
            f"elsewhere, or choose another name with -o"
        )


def write(
    model: Path,
    placed: Placed,
    data: str,
    folder: Path,
    force: bool,
    reading: Reading,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Measure each domain, ``options`` being arguments of ``bntools.bank``, and write all files or none."""
    import bntools

    batches = {name: reading.open(str(source), placed.model) for name, source in domains(data).items()}
    for name, one in batches.items():
        output.say(f"{name}: {one.description}", quiet=as_json)
    with ExitStack() as stack:
        for name, one in batches.items():
            stack.enter_context(said_when_skipped(name, one, quiet=as_json))
        bank = bntools.bank(placed.model, batches, progress=stack.enter_context(progress.samples()), **options)
    record = {**_record(model, folder, batches, bank), **placed.record}
    _save(bank, folder, record, force)
    if as_json:
        output.as_json(record)
    else:
        _print(bank, folder)


def domains(data: str) -> dict[str, Path]:
    """The domains in a folder by name: its subfolders, and files of arrays. Raises BntoolsError for fewer than one."""
    from bntools.arrays import SUFFIXES

    path = Path(data)
    if not path.is_dir():
        raise BntoolsError(f"{data}: is no folder; --per-domain expects one with a subfolder for each domain")
    each = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    found = [one for one in each if one.is_dir() or one.suffix.lower() in SUFFIXES]
    if not found:
        raise BntoolsError(
            f"{data}: no subfolders; --per-domain expects one for each domain; without it, all is measured together"
        )
    if left := [one.name for one in each if one not in found]:
        raise BntoolsError(
            f"{data}: {output.counted(len(left), 'file')} beside the subfolders belong to no domain ({left[0]}, ...): "
            f"move them into one"
        )
    named = {one.name if one.is_dir() else one.stem: one for one in found}
    if len(named) < len(found):
        raise BntoolsError(f"{data}: two domains of the same name: {', '.join(one.name for one in found)}")
    return named


def _save(bank: Any, folder: Path, record: dict[str, Any], force: bool) -> None:
    from bntools.statfiles import save_stats
    from bntools.swapping import atomic_folder

    with atomic_folder(folder, overwrite=force) as temporary:
        for name in bank:
            save_stats(bank[name], temporary / f"{name}{SUFFIX}")
        (temporary / RECORD).write_text(records.text(record), encoding="utf-8")


def _record(model: Path, folder: Path, batches: dict[str, Any], bank: Any) -> dict[str, Any]:
    each = {
        name: {
            "file": f"{name}{SUFFIX}",
            "input": batches[name].spec,
            "fingerprint": bank[name].fingerprint,
            "drift": {layer.name: layer.drift for layer in result.layers},
            **{key: value for key, value in records.recalibration(result).items() if key != "layers"},
        }
        for name, result in bank.results.items()
    }
    return {**records.provenance("recalibrate --per-domain", model, folder), "domains": each}


def _print(bank: Any, folder: Path) -> None:
    rows = []
    for name, result in bank.results.items():
        worst = max(result.layers, key=lambda layer: layer.drift)
        rows.append(
            [name, f"{result.samples:,}", output.number(worst.drift), worst.name, output.number(result.residual)]
        )
    output.table(["domain", "samples", "drift", "in layer", "residual"], rows)
    notes = {note: name for name, result in bank.results.items() for note in result.notes}
    for note, name in notes.items():
        click.echo(f"{name}: {note}")
    untouched = next(iter(bank.results.values())).untouched
    for name, reason in untouched.items():
        click.echo(f"untouched: {name}: {reason}")
    click.echo(f"wrote {output.counted(len(bank), 'file')} of statistics and {RECORD} to {folder}")
