"""Run every benchmark side by side and write the table: make bench, or ``python tests/benchmarks [name ...]``."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import record  # noqa: E402  (it lies here)

BENCHMARKS = (
    "exactness",
    "speed",
    "peer_accuracy",
    "memory",
    "stream",
    "enough",
    "pipeline",
    "input",
    "folding",
    "fold_peers",
    "startup",
    "monitoring",
    "onnx",
    "keras",
)
# No file here is called onnx.py or keras.py: it would be imported in place of the package.
PARTS = {
    "onnx": ("onnx_statistics", "onnx_speed", "onnx_memory"),
    "keras": ("keras_speed", "keras_architectures"),
}


def main(names: list[str]) -> int:
    """Measure the parts named, or all, and write what each gave into the tables. Exit status 1 if a goal was missed."""
    parts = [part for name in names or BENCHMARKS for part in PARTS.get(name, (name,))]
    if len(parts) == 1:
        return _measure(parts[0])
    # A process each: none finds what another has allocated or imported, and one that fails leaves the others.
    return max(subprocess.run([sys.executable, str(HERE), part]).returncode for part in parts)


def _measure(part: str) -> int:
    """Print each row of one part as it is measured, and put them in place of its rows in the tables."""
    module, rows = importlib.import_module(part), []
    for row in module.rows():
        rows.append(row)
        figure = row.figure or ", ".join(f"{name} {cell}" for name, cell in row.cells.items())
        print(f"{'ok  ' if row.reached else 'MISS'} {row.what}: {figure} {f'({row.goal})' if row.goal else ''}")
    record.keep(part, rows, record.paragraphs(module.__doc__))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
