"""Where a command computes: its options ``--device`` and ``--autocast``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntools.errors import BntoolsError

from . import paths

if TYPE_CHECKING:
    from bntools.placing import Placed


class Device(click.ParamType):
    """A device of PyTorch such as ``cpu``, ``cuda`` or ``cuda:1``."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Read a kind of device and a number; whether it is there is seen when PyTorch is."""
        if not re.fullmatch(r"[a-z]+(:\d+)?", value):
            self.fail(f"{value!r}: expected a device such as cpu, cuda, cuda:1 or mps", param, ctx)
        return str(value)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--device`` and ``--autocast`` to a command, which receives ``device`` and ``autocast``."""
    device = click.option(
        "--device",
        type=Device(),
        metavar="NAME",
        help="Compute on cpu, cuda:0, ...: by default on a GPU if there is one.",
    )
    autocast = click.option(
        "--autocast",
        type=click.Choice(["float16", "bfloat16"]),
        help="Compute under torch.autocast, as the deployment does.",
    )
    return device(autocast(command))


def refuse(model: Path, device: str | None, autocast: str | None) -> None:
    """Raise click.UsageError where MODEL, by its name, is none of PyTorch's and an option was given."""
    if (device or autocast) and (paths.is_onnx(model) or paths.is_keras(model)):
        given = "--device" if device else "--autocast"
        runs = "ONNX Runtime" if paths.is_onnx(model) else "Keras, which takes the devices that its backend sees"
        raise click.UsageError(f"{given} is for models of PyTorch: {model} runs in {runs}")


@contextmanager
def placed(model: Any, device: str | None, autocast: str | None) -> Iterator[Placed]:
    """The model where it is to be measured; a GPU that nobody asked for is named on stderr."""
    from bntools import placing

    with placing.placed(model, device, autocast) as there:
        chosen = device is None and there.device not in (None, "cpu")
        if chosen:
            click.echo(f"computing on {there.device} (--device cpu for the CPU)", err=True)
        try:
            yield there
        except BntoolsError as error:
            if chosen:
                raise BntoolsError(f"{error} (on {there.device}; --device cpu computes on the CPU)") from error
            raise
