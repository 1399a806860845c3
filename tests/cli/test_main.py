"""How every command starts and ends."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest
from runner import invoked

import bntools
from bntools.cli import COMMANDS, Commands

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "rich", "PIL", "greenlet", "keras", "tensorflow")


# Each line of stdin is a command line, in a process of its own that starts as this one is after the import.
FORKED = f"""
import os, shlex, sys
from bntools.cli import main
for line in sys.stdin.read().splitlines():
    if child := os.fork():
        print("ended:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    sys.argv = ["bntools", *shlex.split(line)]
    try: main(prog_name="bntools")
    finally: print("imported:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
HELP = ("--help", *(f"{command} --help" for command in COMMANDS))
USAGE_ERRORS = [
    "nonsense",
    "inspect",
    "inspect model.pt --nonsense",
    "recalibrate model.pt data --memory lots",
    "recalibrate model.pt data --mean 0.5",
    "recalibrate model.pt data -o out.pt --in-place",
    "recalibrate model.pt data --size 1,2,3",
    "recalibrate model.pt data --size 9999999999",
    "recalibrate model.pt data --seed -1",
    "recalibrate model.pt data --prior nan",
    "recalibrate model.pt data --prior inf",
    "recalibrate model.pt data --tolerance nan",
    "recalibrate model.pt data --mean nan --std 1",
    "recalibrate model.pt data --mean 0 --std inf",
    "reset model.pt -o out.pt --in-place",
    "fold model.pt",
    "fold model.pt -o out.pt --export out.onnx",
    "fold model.pt -o out.onnx",
    "fold model.pt --export out.pt",
    "verify a.onnx b.onnx --provider cuda:use_tf32",
    "verify a.onnx b.onnx --provider :use_tf32=1",
    "export model.pt out.onnx --shape 1,a",
    "verify model.pt",
    "demo --camera nonsense",
]


def imported_by(*lines: str) -> list[tuple[int, set[str]]]:
    """Exit status of each command line in a fresh process, and which of the heavy modules it imported."""
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    said = [line.split() for line in done.stdout.splitlines() if line.startswith(("imported:", "ended:"))]
    imported, ended = said[::2], said[1::2]
    assert [words[0] for words in said] == ["imported:", "ended:"] * len(lines), done.stdout + done.stderr
    return [(int(status), set(names)) for (_, *names), (_, status) in zip(imported, ended, strict=True)]


@pytest.fixture(scope="module")
def light() -> dict[str, tuple[int, set[str]]]:
    """What became of every command line that has to load nothing."""
    lines = (*HELP, *USAGE_ERRORS)
    return dict(zip(lines, imported_by(*lines), strict=True))


@pytest.mark.parametrize("line", HELP)
def test_help_imports_nothing_heavy(light, line):
    """Help of bntools and of each command loads neither a framework nor NumPy nor rich."""
    assert light[line] == (0, set())


@pytest.mark.parametrize("line", USAGE_ERRORS)
def test_usage_errors_import_nothing_heavy(light, line):
    """A usage error exits with 2 before a framework, NumPy or rich is loaded."""
    assert light[line] == (2, set())


def test_refused_output_imports_no_framework(tmp_path):
    """An output that exists is refused before any framework is loaded."""
    (tmp_path / "model.pt").write_bytes(b"model")
    (tmp_path / "model.reset.pt").write_bytes(b"earlier")
    assert imported_by(shlex.join(["reset", str(tmp_path / "model.pt")])) == [(1, set())]


def test_the_check_for_heavy_imports_can_fail(tmp_path):
    """A command that reads a file is seen to load a framework."""
    (tmp_path / "model.pt").write_bytes(b"no model")
    ((_, names),) = imported_by(shlex.join(["inspect", str(tmp_path / "model.pt")]))
    assert {"torch", "numpy"} <= names


def test_module_runs_like_the_script():
    """``python -m bntools.cli`` is bntools."""
    done = subprocess.run([sys.executable, "-m", "bntools.cli", "-V"], capture_output=True, text=True, check=True)
    assert done.stdout == f"bntools {bntools.__version__}\n"


def test_every_command_is_listed(run):
    """The help names every command with a short description that is not cut off."""
    lines = {line.split()[0]: line for line in run("--help").out.splitlines() if line.startswith("  ") and line.split()}
    for command in COMMANDS:
        assert lines[command].rstrip().endswith(".")
        assert not lines[command].endswith("...")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (bntools.BntoolsError("layer 'bn': no"), 1, "layer 'bn': no"),
        (bntools.BntoolsError("first\nsecond"), 1, "first second"),
        (bntools.VerificationError("they differ"), 3, "they differ"),
        (OSError(28, "No space left on device", "x.pt"), 1, "[Errno 28] No space left on device: 'x.pt'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_end_in_one_line(monkeypatch, error, status, line):
    """Whatever a command refuses, or an interrupt, becomes one line on stderr and its exit status."""

    def get_command(self, ctx, name):
        def fail():
            raise error

        return click.Command(name, callback=fail)

    monkeypatch.setattr(Commands, "get_command", get_command)
    result = invoked("inspect", catch_exceptions=True)
    assert (result.exit_code, result.stderr, result.stdout) == (status, f"bntools: {line}\n", "")


def test_bugs_keep_their_traceback(monkeypatch):
    """An exception that nobody foresaw is not dressed up as a refusal."""
    monkeypatch.setattr(Commands, "get_command", lambda *_: click.Command("inspect", callback=lambda: 1 / 0))
    assert isinstance(invoked("inspect", catch_exceptions=True).exception, ZeroDivisionError)


def test_out_of_memory_says_what_helps(monkeypatch):
    """Running out of memory is a refusal that names the options which need less."""

    def fail():
        raise MemoryError

    monkeypatch.setattr(Commands, "get_command", lambda *_: click.Command("inspect", callback=fail))
    result = invoked("inspect", catch_exceptions=True)
    assert result.exit_code == 1
    assert "--batch-size" in result.stderr
