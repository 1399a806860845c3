"""What the commands say where bntools was installed without extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runner

from bntools.cli import COMMANDS

# All that a bare installation has; every other package that is installed here is hidden.
BARE = {"bntools", "numpy", "click", "rich", "markdown_it", "mdurl", "pygments"}
# Runs each command line of stdin and prints how it ended, as JSON.
HIDDEN = f"""
import json, sys
from importlib.metadata import packages_distributions
for name in set(packages_distributions()) - {BARE!r}:
    sys.modules[name] = None  # importing it is a ModuleNotFoundError
from runner import invoked
for line in sys.stdin.read().splitlines():
    ended = invoked(line, catch_exceptions=True)
    bug = None if ended.exception is None or isinstance(ended.exception, SystemExit) else repr(ended.exception)
    print(json.dumps([ended.exit_code, ended.stderr, bug]))
"""
TYPED = (
    "inspect {0}",
    "inspect {0} data",
    "recalibrate {0} data",
    "recalibrate {0} data --in-place",
    "reset {0} --in-place",
    "stats save {0} -o new.safetensors",
    "stats apply {0} now.safetensors",
    "diff {0} {0}",
    "fold {0} --export out.onnx",
    "export {0} out.onnx --shape 3,8,8",
    "verify {0} {0} data",
)
KINDS = {"model.pt": "torch", "model.safetensors": "torch", "model.keras": "keras", "model.h5": "keras"}
KINDS |= {"model.onnx": "onnx"}
LINES = [(line.format(name), extra) for name, extra in KINDS.items() for line in TYPED]


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[int, str, str | None]]:
    """How each command line ended in a bare installation: its status, its stderr, an exception that escaped."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "data").mkdir()
    for name in (*KINDS, "now.safetensors"):
        (folder / name).write_bytes(b"something")
    lines = [*(line for line, _ in LINES), "demo", "--help", *(f"{command} --help" for command in COMMANDS)]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN],
        input="\n".join(lines),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(runner.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("line", "extra"), LINES)
def test_a_command_says_which_extra_to_install(ended, line, extra):
    """Without the framework of its model, each command ends with one line that names the extra."""
    status, err, bug = ended[line]
    assert (status, bug) == (1, None)
    assert err.startswith(f"bntools: {extra} models need the package ")
    assert err.endswith(f"pip install 'bntools[{extra}]'\n")
    assert err.count("\n") == 1


def test_the_demo_says_what_to_install(ended):
    """The demo names its own extra."""
    status, err, bug = ended["demo"]
    assert (status, bug) == (1, None)
    assert err.endswith("pip install 'bntools[demo]'\n")


@pytest.mark.parametrize("line", ["--help", *(f"{command} --help" for command in COMMANDS)])
def test_help_works_without_extras(ended, line):
    """Help needs nothing but click."""
    assert ended[line] == [0, "", None]
