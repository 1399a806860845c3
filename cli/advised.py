"""The lines of an advice as they are typed: with the model, the data and the options of this command."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from bntools.diagnosis.records import Advice, Diagnosis

# What says how model and data are read. All of the data is recalibrated on, not a draw; layers are in the line itself.
CARRIED = ("arch", "allow", "to_inference", "size", "channels", "mean", "std", "preprocess", "batch_size")


def typed(found: Diagnosis, model: Path, data: str) -> Diagnosis:
    """The diagnosis with lines of the command line where there is one for an advice, of Python elsewhere."""
    return replace(found, advice=[_typed(one, str(model), data) for one in found.advice])


def _typed(one: Advice, model: str, data: str) -> Advice:
    if not one.command:
        return one
    command, comment, when = one.command.partition("  #")
    words = [{"MODEL": model, "DATA": data}.get(word, word) for word in shlex.split(command)]
    line = shlex.join([*words, *_carried()]) + comment + when
    return replace(one, how=line, command=line)


def _carried() -> list[str]:
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    given = [one for one in context.command.params if one.name in CARRIED and _is_given(context, one)]
    return [word for one in given for word in _words(one, context.params[one.name or ""])]


def _is_given(context: click.Context, option: click.Parameter) -> bool:
    return context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE


def _words(option: click.Parameter, value: Any) -> list[str]:
    """An option as it is typed: a flag, one word for each time it is given, or numbers between commas."""
    name = option.opts[0]
    if value is True:
        return [name]
    each = value if option.multiple else [",".join(map(str, value)) if isinstance(value, tuple) else value]
    return [word for one in each for word in (name, str(one))]
