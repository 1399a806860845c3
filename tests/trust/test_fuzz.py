"""A short run of the fuzzer, and whether it can see what it is there to find."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import mutators
import wire

FAST = ["pt", "safetensors", "stats", "onnx", "images", "arrays", "tar", "parquet"]


def test_damaged_files_are_read_or_refused(tmp_path):
    """Some inputs for each reader: each is read, or refused by an error of bntools, and does nothing else."""
    outcomes, _, death = fuzz.worker(FAST, 0, 30, tmp_path)
    assert not death
    kinds = [kind for _, kind in outcomes]
    assert set(kinds) == {"read", "refused"}
    assert len(kinds) == 30 * len(FAST)
    assert not list(tmp_path.iterdir())


def test_mutations_are_the_same_each_time():
    """An input is known by its number."""
    for mutate in (mutators.blind, mutators.pickled, mutators.safetensors, mutators.png, wire.protobuf):
        content = bytes(range(256))
        first, second = (mutate(content, random.Random(f"{n}")) for n in (7, 7))
        assert first == second


def test_a_message_is_packed_as_it_was():
    """Fields that are not changed come back byte by byte."""
    content = b"\x08\x96\x01\x12\x07testing\x1a\x04\x08\x01\x10\x02"
    fields = wire._parsed(content)
    assert wire._packed(fields) == content


WATCHED = """
import os, subprocess, sys
from guard import Guard
guard = Guard(sys.argv[1])
guard.armed = True
for step in (
    lambda: os.system("true"),
    lambda: open(sys.argv[2], "w").close(),
    lambda: subprocess.run(["true"]),
    lambda: eval("1 + 1"),
    lambda: os.mkdir(sys.argv[2] + ".d"),
    lambda: open(os.path.join(sys.argv[1], "inside"), "w").close(),
    lambda: open(__file__).close(),
):
    guard.seen.clear()
    step()
    print(len(guard.seen) > 0)
"""


def test_the_guard_sees(tmp_path):
    """What is run or written outside is noted; what is read, and what is written inside, is not."""
    (tmp_path / "inside").mkdir()
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    line = [sys.executable, str(script), str(tmp_path / "inside"), str(tmp_path / "outside")]
    done = subprocess.run(
        line, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    )
    assert done.stdout.split() == ["True"] * 5 + ["False"] * 2
