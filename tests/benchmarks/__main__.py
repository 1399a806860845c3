"""Run every benchmark side by side and write the table: make bench, or ``python tests/benchmarks [name ...]``."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

BENCHMARKS = (
    "exactness",
    "speed",
    "memory",
    "stream",
    "enough",
    "pipeline",
    "folding",
    "startup",
    "monitoring",
    "onnx",
    "keras",
)
# No file here is called onnx.py or keras.py: it would be imported in place of the package.
PARTS = {
    "onnx": ("onnx_statistics", "onnx_speed", "onnx_counts", "onnx_memory"),
    "keras": ("keras_speed", "keras_architectures"),
}


def main(names: list[str]) -> int:
    """Print each row as it is measured; a whole run writes RESULTS.md. Exit status 1 if a goal was missed."""
    rows, missed = [], 0
    for module in (part for name in names or BENCHMARKS for part in PARTS.get(name, (name,))):
        for row in importlib.import_module(module).rows():
            rows.append(row)
            missed += not row.reached
            print(f"{'ok  ' if row.reached else 'MISS'} {row.what}: {row.figure} {f'({row.goal})' if row.goal else ''}")
    if not names:
        (HERE / "RESULTS.md").write_text(_table(rows))
    return 1 if missed else 0


def _table(rows) -> str:
    import onnxruntime
    import torch

    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench`: {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}. "
        "Ratios are of medians taken in turns in one run.",
        "",
        "| what | measured | goal |  |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.figure} | {row.goal} | {'' if row.reached else 'missed'} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
