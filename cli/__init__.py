"""The command line: one file a command, each thin: parse, call, print.

Commands are imported when they are asked for, and what computes is imported inside them, so that
help and usage errors load neither a framework nor NumPy.
"""

from __future__ import annotations

import shlex
import sys
from importlib import import_module
from typing import Any

import click

from bntools import BntoolsError, VerificationError, __version__

from . import processes, stdout

COMMANDS = ("inspect", "recalibrate", "reset", "stats", "diff", "fold", "export", "verify", "demo")

FAILED = 1
NOT_VERIFIED = 3
INTERRUPTED = 130


class Commands(click.Group):
    """The commands, and how their errors end: one line on stderr and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a model meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of this name."""
        if cmd_name not in COMMANDS:
            return None
        return import_module(f".{cmd_name}", __package__).command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command; only one of them is for the several processes of torchrun."""
        found = super().resolve_command(ctx, args)
        if found[0] != "recalibrate":
            processes.refuse_together(str(found[0]))
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run; a stdout that cannot be written to, a full disk, is no bug either."""
        with stdout.patient(), processes.one_voice():
            try:
                return super().main(*args, **kwargs)
            except OSError as error:
                click.echo(f"bntools: stdout: {error.strerror or error}", err=True)
                sys.exit(FAILED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and remember what was typed: records say which command wrote them."""
        ctx.obj = shlex.join(["bntools", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what it refuses becomes one line and a status, bugs keep their traceback."""
        try:
            return super().invoke(ctx)
        except VerificationError as error:
            _end(ctx, str(error), NOT_VERIFIED)
        except BntoolsError as error:
            _end(ctx, str(error), FAILED)
        except MemoryError:
            _end(ctx, "out of memory: try a smaller --batch-size, or a limit by --memory where there is one", FAILED)
        except KeyboardInterrupt as error:
            _end(ctx, str(error) or "interrupted", INTERRUPTED)
        except OSError as error:
            _end(ctx, str(error), FAILED)


def _end(ctx: click.Context, message: str, status: int) -> None:
    click.echo(f"bntools: {' '.join(message.splitlines())}", err=True)
    ctx.exit(status)


@click.command(
    cls=Commands, name="bntools", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "-V", "--version", message="bntools %(version)s")
def main() -> None:
    """The toolkit for batch-normalization statistics, from fine-tuning to deployment.

    Exit status: 0 done; 1 refused or failed, nothing written; 2 wrong usage; 3 verification failed,
    nothing written but the report that --html asks for.
    """
