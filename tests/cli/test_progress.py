"""Progress: for those who watch, and for what takes time."""

from __future__ import annotations

import os
import subprocess
import sys
from time import sleep

import pytest

from bntools.cli import progress


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stderr a terminal; called in the test itself, as pytest puts another stderr there for fixtures."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


def count_to_ten(pause: float) -> None:
    """Report ten samples with pauses between them."""
    with progress.samples() as report:
        for done in range(11):
            report("measuring", done, 10)
            sleep(pause)


def test_silent_without_a_terminal(capsys, monkeypatch):
    """In a pipe nothing is printed, however long it takes."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    count_to_ten(0.01)
    with progress.step("loading"):
        sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_silent_when_it_is_quick(capsys, monkeypatch):
    """On a terminal nothing is printed for what ends within a second."""
    watch(monkeypatch)
    count_to_ten(0.0)
    with progress.step("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_bar_with_rate_and_time_left(capsys, monkeypatch):
    """What takes longer gets a bar on stderr with samples/s, and nothing on stdout."""
    watch(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    count_to_ten(0.05)
    out, err = capsys.readouterr()
    assert out == ""
    assert "measuring" in err
    assert "/s" in err
    assert "0:00:0" in err


def test_one_bar_at_a_time(capsys, monkeypatch):
    """When a new phase is reported, its bar takes the place of the one before."""
    watch(monkeypatch)
    bar = progress._bar()
    monkeypatch.setattr(progress, "_bar", lambda: bar)
    with progress.samples() as report:
        report("reading", 10, 10)
        report("checking", 0, 10)
        assert [task.description for task in bar.tasks if task.visible] == ["checking"]
        report("reading", 20, 30)
    assert [task.description for task in bar.tasks if task.visible] == ["reading"]
    assert capsys.readouterr() == ("", "")


def test_a_step_names_what_goes_on(capsys, monkeypatch):
    """A step that cannot say how far it is says at least what it is."""
    watch(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.step("exporting model.onnx"):
        sleep(0.2)
    assert "exporting model.onnx" in capsys.readouterr().err


def test_errors_pass_through(monkeypatch):
    """An error inside ends the bar and stays the error it is."""
    watch(monkeypatch)

    def interrupted():
        with progress.samples() as report:
            report("measuring", 0, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize("native", [False, True])
def test_a_step_shows_while_output_is_caught(native):
    """The spinner is on the terminal though a verb catches what is printed, of which it is no part."""
    pty = pytest.importorskip("pty")
    program = f"""
import sys, time
from bntools.cli import progress
from bntools.noise import caught
progress.PATIENCE = 0.0
before = sys.stderr
with progress.step("exporting m.onnx"):
    with caught(native={native}) as said:
        time.sleep(0.3)
        print("the exporter", file=sys.stderr)
        time.sleep(0.3)
assert sys.stderr is before
print(repr(said()))
"""
    master, slave = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=slave, env=environment, check=True
        )
        shown = os.read(master, 100_000).decode()
    finally:
        os.close(master)
        os.close(slave)
    assert done.stdout.decode().strip() == "'the exporter'"
    assert "exporting m.onnx ..." in shown
    assert "the exporter" not in shown
