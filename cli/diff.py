"""``bntools diff``: the BN state of two models, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from bntools.errors import BntoolsError

from . import arguments, output, paths, progress, stderr

Pairs = tuple[tuple[str, str], ...]


class Mapping(click.ParamType):
    """``OLD=NEW``, or a file of such lines or of a JSON object, as pairs."""

    name = "mapping"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Pairs:
        """Read one pair, or all pairs of a file."""
        if isinstance(value, tuple):
            return value
        if Path(value).is_file():
            return _of_file(Path(value))
        old, sign, new = value.partition("=")
        if not (old and sign and new):
            self.fail(f"{value!r}: expected OLD=NEW, or a file of such lines", param, ctx)
        return ((old, new),)


@click.command(short_help="Compare the BN state of two models.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--map",
    "mappings",
    type=Mapping(),
    multiple=True,
    metavar="OLD=NEW",
    help="Layer OLD of A is NEW in B; globs allowed ('net.*=*'), several times if need be, or a file of such lines.",
)
@arguments.arch
@arguments.allow
@arguments.as_json
def command(
    a: Path, b: Path, mappings: tuple[Pairs, ...], arch: str | None, allow: tuple[str, ...], as_json: bool
) -> None:
    """Compare the BN layers of A and B: statistics, scale and shift, eps and momentum.

    A and B are model files of any form, or files of statistics; a state dict is read by its names, without --arch.
    Drifts are in standard deviations of A. Exit status 0, whether they differ or not.
    """
    import bntools

    logs = stderr.without_logs() if paths.is_keras(a) or paths.is_keras(b) else progress.step(f"reading {a} and {b}")
    pairs = dict(pair for group in mappings for pair in group)
    with logs:
        found = bntools.diff(a, b, mapping=pairs or None, arch=arch, allow=allow)
    if as_json:
        output.as_json(_record(a, b, found))
        return
    _print(found, a, b)


def _print(found: Any, a: Path, b: Path) -> None:
    differ = found.worst()
    output.table(
        ["layer", "drift", "mean", "std", "scale", "shift"],
        [
            [
                layer.name,
                output.number(None if math.isnan(layer.drift) else layer.drift),
                _signed(layer.mean_shift, 0.0),
                _signed(layer.std_ratio, 1.0),
                output.number(layer.scale),
                output.number(layer.shift),
            ]
            for layer in differ
        ],
        most=20,
    )
    for layer in differ:
        settings = [
            one for one in layer.changes if one.startswith(("eps", "momentum", "keeps")) or "channels against" in one
        ]
        if settings:
            click.echo(f"{layer.name}: {', '.join(settings)}")
    for names, where in ((found.only_in_a, a), (found.only_in_b, b)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            click.echo(f"only in {where}: {', '.join(names[:5])}{more}")
    if found.matched != "by name":
        click.echo(f"layers were matched {found.matched}")
    for note in found.notes:
        click.echo(note)
    if not found.layers:
        click.echo("no BN layer in common: nothing was compared")
        return
    total = output.counted(len(found.layers), "BN layer")
    click.echo(
        f"{len(differ)} of {total} differ, drift up to {found.drift:.3g}" if differ else f"{total}: no difference"
    )


def _signed(values: Any, usual: float) -> str:
    """The value of the channel that is the furthest from the usual one."""
    return "-" if values is None else output.number(float(values[abs(values - usual).argmax()]))


def _record(a: Path, b: Path, found: Any) -> dict[str, Any]:
    return {
        "a": str(a),
        "b": str(b),
        "same": found.same,
        "matched": found.matched,
        "drift": found.drift,
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "notes": found.notes,
        "layers": [
            {
                "a": layer.a.name,
                "b": layer.b.name,
                "drift": layer.drift,
                "mean_shift": layer.mean_shift,
                "std_ratio": layer.std_ratio,
                "scale": layer.scale,
                "shift": layer.shift,
                "eps": [layer.a.eps, layer.b.eps],
                "momentum": [layer.a.momentum, layer.b.momentum],
                "changes": list(layer.changes),
            }
            for layer in found.layers
        ],
    }


def _of_file(path: Path) -> Pairs:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            pairs = tuple(json.loads(text).items())
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            pairs = tuple((old.strip(), new.strip()) for old, _, new in (line.partition("=") for line in lines))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BntoolsError(f"{path}: no readable mapping: {error}") from error
    if not pairs or not all(isinstance(new, str) and old and new for old, new in pairs):
        raise BntoolsError(f"{path}: expected lines OLD=NEW, or a JSON object of layer names by layer names")
    return pairs
