"""Under torchrun: several processes run one command together, and speak with one voice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from bntools.errors import BntoolsError

from . import paths

if TYPE_CHECKING:
    from bntools.processes import Group

    from .progress import Report

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it tells the processes that it starts
USAGE, FAILED, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Joined:
    """The processes that run this command, and the device on which this one computes, if that is decided."""

    group: Group
    device: str | None

    @property
    def shard(self) -> tuple[int, int] | None:
        """The share of the data that this one reads."""
        return (self.group.rank, self.group.size) if self.group.size > 1 else None

    @property
    def record(self) -> dict[str, int]:
        """What a record says about it."""
        return {"processes": self.group.size} if self.group.size > 1 else {}

    def paced(self, report: Report) -> Report:
        """A report of this one's share, where the total is that of the whole data."""
        size = self.group.size
        return lambda what, done, total: report(what, done, total if total is None else -(-total // size))

    def agreed(self, batches: Any) -> dict[str, Any]:
        """The spec of the data that all have read; they wait for one another here the last time."""
        spec: dict[str, Any] = batches.spec
        own = spec.get("skipped", [])
        skipped = [file for files in self.group.gather(own) for file in files]
        if self.group.size == 1 or not skipped:
            return spec
        unique = {str(file): file for file in skipped}
        return {**spec, "skipped": list(unique.values()), "samples": spec["samples"] + len(own) - len(unique)}


class Terminated(KeyboardInterrupt):
    """Somebody ended this process: torchrun does once another one has died."""


def place() -> tuple[int, int]:
    """The rank of this process among those that run the command, and how many they are."""
    try:
        rank, count, *_ = (int(os.environ[name]) for name in TORCHRUN[:2])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, count) if 0 <= rank < count and all(name in os.environ for name in TORCHRUN) else (0, 1)


@contextmanager
def one_voice() -> Iterator[None]:
    """Rank 0 prints for all; the others print nothing, unless they are the first to have an error."""
    rank, count = place()
    if count > 1:
        signal.signal(signal.SIGTERM, _terminated)
    if not rank:
        yield
        return
    mute: Any = _Mute(sys.stderr)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(mute):
        yield


def refuse_together(command: str) -> None:
    """Raise click.UsageError where several processes would run a command that is for one."""
    _, count = place()
    if count > 1:
        raise click.UsageError(
            f"bntools {command} runs in one process, and torchrun started {count}: run it without torchrun"
        )


@contextmanager
def joined(model: Path, device: str | None) -> Iterator[Joined]:
    """All processes of torchrun's, each on a device of its own; the one alone where there is no torchrun.

    ``device`` is what the user named, if anything; only models of PyTorch, by the name of the file, are placed. Where
    the block fails on one of them, all end: one with the message, the others with its status alone.
    """
    from bntools import backends
    from bntools.processes import Group

    _, count = place()
    if count == 1:
        yield Joined(Group(), device)
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of broken connections, from every process
    placeable = not (paths.is_onnx(model) or paths.is_keras(model))
    local = int(os.environ.get("LOCAL_RANK", 0))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing else would end a wait for processes that never join
    with _heard():
        ranks = backends.backend("torch").join(device if placeable else "cpu", local)
    group = Group(ranks)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with group.together():
            yield Joined(group, ranks.device if placeable else device)
    except (click.exceptions.Exit, SystemExit):
        raise
    except BaseException as error:
        if not ranks.is_first("voice"):
            raise click.exceptions.Exit(_status(error)) from error
        with _heard():
            if isinstance(error, Terminated) and (dead := group.dead()):
                raise BntoolsError(f"{dead} has died (killed, or out of memory?): nothing was written") from error
            raise
    finally:
        ranks.leave()


@contextmanager
def _heard() -> Iterator[None]:
    """What the block raises is printed, also on a process that is muted."""
    try:
        yield
    except BaseException:
        if isinstance(sys.stderr, _Mute):
            sys.stderr.muted = False
        raise


def _terminated(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated("ended from outside: nothing was written")


def _status(error: BaseException) -> int:
    if isinstance(error, click.UsageError):
        return USAGE
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated) else FAILED


class _Mute:
    """A stream that prints nothing as long as it is muted."""

    def __init__(self, stream: TextIO):
        self._stream, self.muted = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        return False

    def write(self, text: str) -> int:
        """Print the text, or do not."""
        return len(text) if self.muted else self._stream.write(text)
