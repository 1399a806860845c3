"""Arguments and options that several commands share, and how their values are read.

Values are checked while the command line is parsed, so that a typing error costs no start of a
framework.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LONGEST = 2**31 - 1  # of one axis


class Finite(click.FloatRange):
    """A number in a range, but neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r}: expected a finite number", param, ctx)
        return number


class Sizes(click.ParamType):
    """Positive whole numbers such as ``224``, ``224,192`` or ``3x224x224``, as a tuple."""

    name = "sizes"

    def __init__(self, fewest: int, most: int):
        self.fewest, self.most = fewest, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the numbers between commas or x."""
        if isinstance(value, tuple):
            return value
        parts = re.split("[,x]", value)
        if not self.fewest <= len(parts) <= self.most:
            self.fail(f"{value!r}: expected {self.fewest} to {self.most} numbers", param, ctx)
        if not all(part.isdecimal() and 0 < int(part) <= LONGEST for part in parts):
            self.fail(f"{value!r}: expected whole numbers from 1 to {LONGEST:,}, such as 3,224,224", param, ctx)
        return tuple(int(part) for part in parts)


class Bytes(click.ParamType):
    """An amount of memory such as ``4GiB`` or ``500MB``, in bytes."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a number and its unit."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value)
        if match is None or match[2].upper() not in UNITS:
            self.fail(f"{value!r}: expected an amount of memory such as 4GiB or 500MB", param, ctx)
        return int(float(match[1]) * UNITS[match[2].upper()])


class Provider(click.ParamType):
    """A provider such as ``cuda``, or with options of its own, ``cuda:use_tf32=1,device_id=1``."""

    name = "provider"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the name and the options behind the colon."""
        if not isinstance(value, str) or ":" not in value:
            return value
        name, _, rest = value.partition(":")
        pairs = [part.partition("=") for part in rest.split(",")]
        if not name or not all(key and sign for key, sign, _ in pairs):
            self.fail(f"{value!r}: expected a provider and its options, such as cuda:use_tf32=1", param, ctx)
        return name, {key: text for key, _, text in pairs}


class HtmlFile(click.ParamType):
    """The name of an HTML file to write."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Refuse other suffixes: the report is meant for browsers, and must not land on a model."""
        path = Path(value)
        if path.suffix.lower() not in (".html", ".htm"):
            self.fail(f"{str(value)!r}: expected a name that ends in .html", param, ctx)
        return path


model = click.argument("model", type=click.Path(path_type=Path))
data = click.argument("data")
optional_data = click.argument("data", required=False)

arch = click.option(
    "--arch",
    metavar="MODULE:FACTORY",
    help="What builds the model that a state dict, a checkpoint or Keras weights belong to.",
)
allow = click.option(
    "--allow",
    multiple=True,
    metavar="PACKAGE",
    help="Admit this package's classes: nn.Modules in a pickled model, layers and functions in one of Keras.",
)
layers = click.option(
    "--layers", multiple=True, metavar="GLOB", help="Only these layers: a name or a glob, several times if need be."
)
target = click.option(
    "-o", "--output", "target", type=click.Path(path_type=Path), help="Where to write; by default beside MODEL."
)
in_place = click.option("--in-place", is_flag=True, help="Replace MODEL itself.")
force = click.option("--force", is_flag=True, help="Overwrite what exists.")
html = click.option("--html", type=HtmlFile(), metavar="FILE", help="Also write a report that a browser shows.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else.")

to_inference = click.option(
    "--to-inference",
    is_flag=True,
    help="First convert an ONNX file that was exported in training mode.",
)

shape = click.option(
    "--shape", type=Sizes(1, 8), metavar="C,H,W", help="Shape of one sample, to try the model on random input."
)
tolerance = click.option("--tolerance", type=Finite(min=0, min_open=True), help="Scale-relative error to accept.")
providers = click.option(
    "--provider",
    "providers",
    type=Provider(),
    multiple=True,
    metavar="NAME[:KEY=VALUE]",
    help="ONNX Runtime provider that must run: cpu, cuda, tensorrt, ... Options after a colon: cuda:use_tf32=1.",
)
opset = click.option("--opset", type=click.IntRange(min=7), help="ONNX opset version; by default the exporter's own.")
