"""``--html FILE``: what a command found, as a report for the browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bntools.errors import BntoolsError

from . import paths


def refuse(html: Path | None, force: bool) -> None:
    """Raise BntoolsError if the report would overwrite something without ``--force``, or cannot be created."""
    if html is not None:
        paths.refuse_existing(html, force=force, option="--html")


@contextmanager
def beside(html: Path | None, result: Any, about: dict[str, str]) -> Iterator[None]:
    """Write the report together with what the block writes: a failure of either leaves neither."""
    if html is None:
        yield
        return
    from bntools.files import atomic_write
    from bntools.reports import rendered

    with atomic_write(html) as temporary:
        temporary.write_text(rendered(result, about=_complete(about)), encoding="utf-8")
        yield


def write(html: Path | None, result: Any, about: dict[str, str], written: Path | None = None) -> None:
    """Write the report on what is done already; ``written`` is what stays if that fails."""
    try:
        with beside(html, result, about):
            pass
    except BntoolsError as error:
        raise BntoolsError(f"{error}; {written} was written" if written else str(error)) from error


def said(html: Path | None, quiet: bool) -> None:
    """Print where the report is."""
    if html is not None and not quiet:
        click.echo(f"wrote {html}")


def _complete(about: dict[str, str]) -> dict[str, str]:
    return {**about, "command": click.get_current_context().obj or ""}
