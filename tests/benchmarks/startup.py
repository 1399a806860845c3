"""What a command costs before it does anything."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, at_most, medians


def rows() -> Iterator[Row]:
    """bntools --help against a bare interpreter, bntools inspect against import torch."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt"
        torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)), model)
        times = medians(
            {
                "pass": lambda: _run("-c", "pass"),
                "help": lambda: _run("-m", "bntools.cli", "--help"),
                "torch": lambda: _run("-c", "import torch"),
                "inspect": lambda: _run("-m", "bntools.cli", "inspect", str(model)),
            },
            rounds=9,
        )
    unit = "{:.2f} s"
    yield at_most("bntools --help, beyond python -c pass", times["help"] - times["pass"], 0.15, unit)
    yield at_most("bntools inspect model.pt, beyond import torch", times["inspect"] - times["torch"], 0.5, unit)


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
