"""Command lines run in this process."""

from __future__ import annotations

import inspect
import shlex
from typing import Any

from click.testing import CliRunner, Result

from bntools.cli import main

# Before click 8.2 what goes to stderr stood in between what goes to stdout, unless asked for.
APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def invoked(line: str, **options: Any) -> Result:
    """How ``bntools LINE`` ended; an exception that is no exit is raised, unless ``catch_exceptions`` is given."""
    return CliRunner(**APART).invoke(
        main, shlex.split(line), prog_name="bntools", **{"catch_exceptions": False, **options}
    )
