"""What ``bntools inspect MODEL DATA`` prints of a diagnosis, and its figures for programs."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from bntools.words import Severity, counted, mended, number, percent, severity

from . import output

if TYPE_CHECKING:
    from bntools.diagnosis.records import Diagnosis, LayerDrift

STYLES: dict[Severity, str] = {
    "noise": "dim",
    "small": "green",
    "clear": "yellow",
    "large": "red",
    "severe": "bold red",
}
HEADERS = ("layer", "drift", "+-", "ch", "mean", "std", "KL", "fixes")
LEGEND = """\
drift  how far the worst channel is off: its mean, or the relative change of its
       standard deviation (std)
+-     uncertainty of the measured means: their largest standard error
ch     that worst channel: by how much its mean is off, its std as a multiple of
       the stored one, and the divergence of the two Gaussians (KL, nats)
fixes  how much of the outputs' error goes if this layer alone gets its measured
       statistics; worse: that alone makes the outputs worse"""
MOST = 20  # layers in the table of a terminal
SAME = 1e-4  # of the outputs' size: float32 rounds by less
LOOKS = 4  # preprocessings that are shown


def show(found: Diagnosis) -> None:
    """Print a diagnosis: layers, the worst first, then the whole model, and what to do at the end."""
    layers, samples = counted(len(found), "BN layer"), counted(found.samples, "sample")
    click.echo(f"{layers} measured on {samples}; in stored standard deviations, worst first:")
    _print_layers(found.worst())
    click.echo(LEGEND)
    for name, reason in found.untouched.items():
        click.echo(f"not measured: {name}: {reason}")
    _print_outputs(found)
    _print_data(found)
    for note in found.notes:
        _print_wrapped(note)
    _print_advice(found)


def figures(found: Diagnosis) -> dict[str, Any]:
    """All figures of a diagnosis but the records of its layers, which come with them by name."""
    rest = ("samples", "alone", "convergence", "untouched", "notes")
    lists = ("advice", "modes", "preprocessing", "domains", "halves")
    return {
        **{name: getattr(found, name) for name in rest},
        **{name: [asdict(one) for one in getattr(found, name)] for name in lists},
        "layers": [_figures(layer) for layer in found],
    }


def _figures(layer: LayerDrift) -> dict[str, Any]:
    edges, counts = layer.histogram or (None, None)
    return {
        "name": layer.name,
        "drift": layer.drift,
        "standard_error": layer.standard_error,
        "remaining_error": layer.remaining_error,
        "gap": layer.gap,
        "calls": layer.calls,
        "call_gap": layer.call_gap,
        "dead": layer.dead,
        "leading": [asdict(channel) for channel in layer.leading()],
        "stored": {"mean": layer.layer.mean, "var": layer.layer.var},
        "measured": {"mean": layer.mean, "var": layer.var},
        "mean_shift": layer.mean_shift,
        "std_ratio": layer.std_ratio,
        "kl": layer.kl,
        "histogram": None if edges is None else {"edges": edges, "counts": counts},
    }


def _print_layers(layers: list[LayerDrift]) -> None:
    styles = [STYLES[severity(layer.drift, layer.standard_error)] for layer in layers]
    output.table(HEADERS, [_cells(layer) for layer in layers], most=MOST, styles=styles)


def _cells(layer: LayerDrift) -> tuple[str, ...]:
    (lead,) = layer.leading(1)
    return (
        layer.name,
        _brief(layer.drift),
        _brief(layer.standard_error),
        str(lead.channel),
        f"{'-' if lead.mean < 0 else '+'}{_brief(abs(lead.mean))}",
        f"x{_brief(lead.ratio)}",
        _brief(lead.kl),
        mended(layer.gap),
    )


def _brief(value: float) -> str:
    """A figure of the table, as long as its like: three decimals, fewer where they say nothing."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else number(value)


def _print_outputs(found: Diagnosis) -> None:
    if found.modes:
        click.echo("outputs in eval mode against train mode, on the same samples, by batch size:")
        rows = [
            ["all" if one.batch_size is None else str(one.batch_size), percent(one.error), percent(one.agreement)]
            for one in found.modes
        ]
        output.table(["batch size", "largest difference", "same largest output"], rows)
    if found.alone is not None:
        alone = "the same, up to rounding" if found.alone < SAME else f"off by {percent(found.alone)} of their size"
        click.echo(f"outputs of a sample by itself and in a batch: {alone}")


def _print_data(found: Diagnosis) -> None:
    if len(found.preprocessing) > 1:
        click.echo("drift of the first layer under other preprocessings:")
        shown = [look for i, look in enumerate(found.preprocessing) if i < LOOKS or look.given]
        output.table(["preprocessing", "drift"], [[look.name, number(look.drift)] for look in shown])
    if found.domains:
        click.echo("parts of the data against all of it, in standard deviations (by chance):")
        rows = [
            [
                *(one.name, f"{one.samples:,}", f"{number(one.look)} ({number(one.look_noise)})"),
                f"{number(one.drift)} ({number(one.noise)})",
            ]
            for one in found.domains
        ]
        output.table(["part", "samples", "first layer", "worst layer"], rows)


def _print_advice(found: Diagnosis) -> None:
    for place, one in enumerate(found.advice, 1):
        _print_wrapped(f"{place}. {one.action}: {one.reason}", "   ")
        for line in one.how.splitlines():
            click.echo(f"       {line}")


def _print_wrapped(text: str, indent: str = "") -> None:
    """Text for a terminal of this width; in a pipe one line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    click.echo(textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False) if width else text)
