"""Progress on stderr: only on a terminal, and only for what takes longer than a second."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

PATIENCE = 1.0  # seconds

Report = Callable[[str, int, int | None], None]


@contextmanager
def samples() -> Iterator[Report]:
    """Give a ``report(what, done, total)`` that draws a bar with samples/s and the time left.

    The bar is that of the phase reported last.
    """
    if not sys.stderr.isatty():
        yield _silent
        return
    bar = _bar()
    tasks: dict[str, Any] = {}
    started = monotonic()

    def report(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what)
        for name, task in tasks.items():
            bar.update(task, visible=name == what)
        bar.update(tasks[what], completed=done, total=total)
        if not bar.live.is_started and monotonic() - started > PATIENCE:
            bar.start()

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show what is going on while the block runs, for work that cannot say how far it is."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.live import Live
    from rich.spinner import Spinner

    with _terminal() as console:
        # Nothing is redirected: the work inside may do that itself, and the two would undo each other's wrongly.
        shown = Live(
            Spinner("dots", f"{what} ..."),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        timer = threading.Timer(PATIENCE, shown.start)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            shown.stop()


@contextmanager
def _terminal() -> Iterator[Any]:
    """A console on stderr as it is now, whatever takes the place of stderr in the meantime."""
    from rich.console import Console

    try:
        descriptor = os.dup(sys.stderr.fileno())
    except OSError:  # a stderr without a descriptor
        yield Console(file=sys.stderr)
        return
    with os.fdopen(descriptor, "w", encoding=sys.stderr.encoding) as file:
        yield Console(file=file)


def _silent(what: str, done: int, total: int | None) -> None:
    """Nobody is looking."""


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Samples a second."""

        def render(self, task: Any) -> Text:
            """The speed over the last seconds, nothing before there is one."""
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
