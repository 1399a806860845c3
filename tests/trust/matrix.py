"""The suite on the oldest and the newest versions that bntools promises: ``make matrix`` (ROW=newest-3.13).

Each row is an environment made from nothing in a temporary folder, with a copy of the sources. From PyPI, PyTorch comes
with CUDA: 6 GB a row, of which one is kept at a time. The Pythons are found on the path, or fetched.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

import environments
from environments import ROOT
from results import keep

HERE = Path(__file__).parent
ROWS = {"oldest-3.11": "3.11", "pinned-3.11": "3.11", "newest-3.12": "3.12", "newest-3.13": "3.13"}
SHOWN = ("torch", "keras", "tensorflow", "onnx", "onnxruntime", "onnxscript", "numpy", "lightning", "transformers")
ENDED = re.compile(r"^.*\b\d+ (?:passed|failed|error).* in .*$", re.MULTILINE)


def main() -> int:
    """Run the rows asked for, one after another; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--logs", type=Path, default=Path("matrix-logs"), help="folder of what pytest prints")
    parser.add_argument("--pytest", default="-n 2", help="arguments of pytest (default: %(default)s)")
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(unknown)}: choose of {', '.join(ROWS)}")
    asked.logs.mkdir(parents=True, exist_ok=True)
    lines = ["| row | versions | result |", "|---|---|---|"]
    failed = False
    for row in asked.rows or ROWS:
        status, versions, result = _run(row, asked.pytest.split(), (asked.logs / f"{row}.txt").resolve())
        failed |= status != 0
        lines.append(f"| {row} | {versions} | {result} |")
        print(lines[-1], flush=True)
        keep("matrix", row, versions, result)
    print("\n".join(["", *lines]))
    return int(failed)


def _run(row: str, arguments: list[str], log: Path) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory(prefix="bntools-matrix-") as name:
        folder = Path(name)
        source, scratch = folder / "source", folder / "tmp"
        scratch.mkdir()
        environments.copy(source)
        wanted = ["-e", f"{source}[test]"]
        if held := constraints(row):
            (folder / "constraints.txt").write_text("\n".join(held))
            wanted += ["-c", str(folder / "constraints.txt")]
        python = environments.make(folder / "environment", ROWS[row], *wanted)
        command = [str(python), "-m", "pytest", "-q", "--dist", "loadfile", "--no-loadscope-reorder", *arguments]
        with log.open("w") as file:
            environment = {**os.environ, "TMPDIR": str(scratch)}
            done = subprocess.run(command, cwd=source, env=environment, stdout=file, stderr=file, check=False)
        ends = ENDED.findall(log.read_text())
        result = ends[-1].strip(" =") if ends else f"exit status {done.returncode}, see {log}"
        return done.returncode, _versions(python), result


def constraints(row: str) -> list[str]:
    """What holds the versions of a row: nothing, the pins, or the pins with the oldest in their places."""
    if row.startswith("newest"):
        return []
    held = environments.pins(ROOT / "constraints.txt")
    if row.startswith("oldest"):
        held |= environments.pins(HERE / "oldest.txt")
    return list(held.values())


def _versions(python: Path) -> str:
    code = f"""import platform
from importlib.metadata import version
print("Python", platform.python_version() + ",", ", ".join(f"{{name}} {{version(name)}}" for name in {SHOWN}))"""
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
