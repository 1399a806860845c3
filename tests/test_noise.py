"""What libraries print is caught."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

import pytest

from bntools.noise import brief, caught


def test_everything_is_caught(capfd, recwarn):
    """Prints, warnings and log lines are caught and can be read; what others write to the terminal goes there."""
    print("before")
    with caught() as said:
        print("printed")
        print("complained", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("torch.something").error("logged")
        os.write(2, b"a spinner")
    print("after")
    assert {"printed", "complained", "warned"} <= set(said().splitlines())
    assert "] logged" in said()
    assert "a spinner" not in said()
    assert capfd.readouterr() == ("before\nafter\n", "a spinner")
    assert not recwarn


def test_what_is_native_is_caught(capfd):
    """On request so is what C++ code writes."""
    with caught(native=True) as said:
        print("printed")
        os.write(1, b"\x1b[31mwritten\x1b[0m\n")
        os.write(2, b"from C++\n")
    assert set(said().splitlines()) == {"printed", "written", "from C++"}
    assert capfd.readouterr() == ("", "")


def test_log_handlers_are_put_back():
    """The libraries' handlers write where they wrote before, also one that is made inside."""
    logger, stream = logging.getLogger("onnxscript.tested"), io.StringIO()
    outer = logging.StreamHandler(stream)
    logger.addHandler(outer)
    try:
        with caught() as said:
            inner = logging.StreamHandler()
            logger.addHandler(inner)
            logger.error("inside")
        assert stream.getvalue() == ""
        assert said().splitlines() == ["inside", "inside"]
        assert outer.stream is stream
        assert inner.stream is sys.__stderr__
    finally:
        logger.handlers.clear()


def test_put_back_after_an_error(capfd):
    """Streams are back in place when the block raises."""

    def interrupted():
        with caught():
            print("lost")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    os.write(1, b"here")
    assert capfd.readouterr().out == "here"


def test_brief():
    """A long message of many coloured lines becomes one short line."""
    assert brief("\x1b[96mone\x1b[0m\n\n  two") == "one two"
    assert brief("x " * 500, 20) == "x x x x x x x x x x..."
