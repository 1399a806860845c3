"""``bntools recalibrate --resume``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bntools import resuming
from bntools.measurement import Job

KEPT = Path("model.recalibrated.pt.resume")
LINE = "recalibrate model.pt data/ --memory 1B --batch-size 8"  # one batch at a time

# The command in a process of its own that is killed, as the kernel does it, when it reports for the n-th time.
KILLED = """
import os, signal, sys
from contextlib import contextmanager
from itertools import count
from bntools import resuming
from bntools.cli import main, progress
resuming.EVERY, calls = 0, count()
@contextmanager
def samples():
    yield lambda *_: next(calls) == int(sys.argv[1]) and os.kill(os.getpid(), signal.SIGKILL)
progress.samples = samples
main(sys.argv[2:])
"""


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after each batch."""
    monkeypatch.setattr(resuming, "EVERY", 0)


@pytest.fixture
def interrupted(monkeypatch, often):
    """A function that runs a command and has it interrupted when it reports for the n-th time."""

    def begin(run, line, at=9):
        calls = iter(range(at))

        def source(self, *arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(self, *arguments)

        with monkeypatch.context() as patched:
            original = Job.report
            patched.setattr(Job, "report", source)
            return run(line)

    return begin


def written() -> tuple[dict, dict]:
    """The statistics that were written, and what the record says besides when and how it came about."""
    record = json.loads(Path("model.recalibrated.json").read_text())
    state = torch.load("model.recalibrated.pt", weights_only=False).state_dict()
    changing = ("command", "date")
    return (
        {key: value.numpy().tobytes() for key, value in state.items()},
        {key: value for key, value in record.items() if key not in changing},
    )


def test_kill_9_and_resume_give_what_an_undisturbed_run_gives(run, desk, often):
    """A process that was killed leaves nothing but its checkpoint; going on from it gives the same two files."""
    assert run(LINE).status == 0
    expected = written()
    for path in ("model.recalibrated.pt", "model.recalibrated.json"):
        os.unlink(path)
    killed = subprocess.run([sys.executable, "-c", KILLED, "9", *LINE.split()], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir()) == ["data", "model.pt", KEPT.name]
    outcome = run(f"{LINE} --resume")
    assert (outcome.status, outcome.err) == (0, "")
    assert f"going on from {KEPT}" in outcome.out
    assert written() == expected
    assert not KEPT.exists()


def test_ctrl_c_says_how_to_go_on(run, desk, interrupted):
    """An interrupted run keeps its checkpoint and says so; one without --resume begins anew, and says that too."""
    outcome = interrupted(run, LINE)
    assert outcome.status == 130
    kept, ended = outcome.err.splitlines()
    assert kept == f"{KEPT} keeps how far it came: the same command with --resume goes on from there"
    assert ended == "bntools: interrupted"
    outcome = run(LINE)
    assert f"{KEPT}, which a run left that was stopped, is removed" in outcome.out
    assert not KEPT.exists()


def test_what_does_not_fit_is_refused(run, refused, desk, interrupted):
    """Another option, precision, seed or model is no way to go on: one line says what differs; nothing is changed."""
    interrupted(run, LINE)
    assert "prior 0.0 and not 5.0" in refused(f"{LINE} --resume --prior 5")
    assert "autocast None and not 'bfloat16'" in refused(f"{LINE} --resume --autocast bfloat16")
    assert "seed of the data 0 and not 3" in refused(f"{LINE} --resume --seed 3")
    model = torch.load("model.pt", weights_only=False)
    next(model.parameters()).data += 1
    torch.save(model, "model.pt")
    assert "other weights" in refused(f"{LINE} --resume")


def test_resume_without_a_checkpoint_begins_anew(run, desk):
    """A job that is started again by a scheduler may always say --resume."""
    outcome = run(f"{LINE} --resume")
    assert outcome.status == 0
    assert f"there is no {KEPT} to go on from: starting anew" in outcome.out


@pytest.mark.parametrize("option", ["--method ema", "--per-domain"])
def test_resume_is_refused_where_nothing_is_kept(run, desk, option):
    """A usage error, before anything is loaded."""
    outcome = run(f"recalibrate model.pt data/ --resume {option}")
    assert outcome.status == 2
    assert f"nothing is kept with {option}" in outcome.err


def test_another_file_of_that_name_is_left_alone(refused, desk):
    """What is no checkpoint is not replaced by one."""
    KEPT.write_text("mine")
    assert "is no checkpoint of bntools" in refused(LINE)
