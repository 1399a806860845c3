"""``bntools recalibrate --resume``: the file beside the target that keeps how far a run came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from bntools.errors import BntoolsError
from bntools.files import state

from . import output

SUFFIX = ".resume"


def refuse(resume: bool, per_domain: bool, method: str, processes: int) -> None:
    """Raise click.UsageError where ``--resume`` was asked for and nothing is kept."""
    reasons = {"--per-domain": per_domain, "--method ema": method == "ema", "torchrun": processes > 1}
    for reason, holds in reasons.items():
        if resume and holds:
            raise click.UsageError(f"--resume: nothing is kept with {reason}, from which a run could go on")


@contextmanager
def checkpoint(target: Path, method: str, processes: int, resume: bool, quiet: bool) -> Iterator[Path | None]:
    """Where a run that will write ``target`` keeps how far it came; None for runs that keep nothing.

    What an earlier run left there is removed, unless this one is to go on from it. If the block fails and has left
    something, stderr says how to go on.
    """
    if method == "ema" or processes > 1:
        yield None
        return
    path = target.with_name(f"{target.name}{SUFFIX}")
    _prepare(path, resume, quiet)
    before = state(path)
    try:
        yield path
    except BaseException:
        if path.exists() and state(path) != before:
            click.echo(f"{path} keeps how far it came: the same command with --resume goes on from there", err=True)
        raise


def _prepare(path: Path, resume: bool, quiet: bool) -> None:
    if resume:
        found = f"going on from {path}" if path.exists() else f"there is no {path} to go on from: starting anew"
        output.say(found, quiet=quiet)
    elif path.exists():
        from bntools.resuming import KIND

        if not KIND.is_kind(path):
            raise BntoolsError(f"{path} exists, and is no checkpoint of bntools: move it away, this run would write it")
        path.unlink()
        output.say(f"{path}, which a run left that was stopped, is removed; --resume goes on from such", quiet=quiet)
