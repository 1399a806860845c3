"""Virtual environments that are made for one look and thrown away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).parents[2]


def make(place: Path, python: str, *wanted: str) -> Path:
    """Make an environment with a Python (``3.12``, or a path) and what pip would take as ``wanted``; its python.

    Packages come from where pip would get them, and are linked from uv's cache where the file system can.
    """
    interpreter = place / "bin" / "python"
    _uv("venv", "--python", python, str(place))
    _uv("pip", "install", "--python", str(interpreter), "--index-strategy", "unsafe-best-match", *wanted)
    return interpreter


def copy(target: Path) -> None:
    """The sources as they are now, so that edits meanwhile are no part of it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def pins(path: Path) -> dict[str, str]:
    """The lines of a file of constraints, by package."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.split("==")[0].lower().replace("-", "_"): line for line in lines if line and not line.startswith("#")}


def _uv(*arguments: str) -> None:
    environment = dict(os.environ)
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"):
        if f"PIP_{name}" in os.environ:
            environment.setdefault(f"UV_{name}", os.environ[f"PIP_{name}"])
    done = subprocess.run([find_uv_bin(), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv {' '.join(arguments)}\n{done.stderr}")
