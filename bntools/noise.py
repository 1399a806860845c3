"""What libraries print while they work, caught: it belongs into an error's cause, not on the user's screen."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

LIBRARIES = ("torch", "onnx", "onnx_ir", "onnxscript")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def caught(*, native: bool = False) -> Iterator[Callable[[], str]]:
    """Catch what Python code prints, warns or logs; yields how to read it, also afterwards.

    Whatever other threads print to sys.stdout and sys.stderr in the meantime is caught as well. With ``native``
    so is what C++ code writes, and with it everything that goes to the process's stdout and stderr.
    """
    text = io.StringIO()
    parts: list[str] = []
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        for descriptor in (1, 2) if native else ():
            stack.enter_context(_descriptor(descriptor, parts))
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(_logged(text))
        stack.enter_context(redirect_stdout(text))
        stack.enter_context(redirect_stderr(text))

        def said() -> str:
            lines = [text.getvalue().strip(), *(str(one.message) for one in warned), *parts]
            return "\n".join(line for line in lines if line)

        yield said


@contextmanager
def _logged(text: io.StringIO) -> Iterator[None]:
    """Let the libraries' own log handlers write to ``text``: they hold the stderr of the time of their import."""
    before = {handler: handler.setStream(text) for handler in _handlers()}
    try:
        yield
    finally:
        for handler in _handlers():  # a library that was imported inside holds what took the place of stderr
            if handler.stream is text:
                handler.setStream(before.get(handler) or sys.__stderr__)


def _handlers() -> list[Any]:
    known = logging.root.manager.loggerDict.copy()
    loggers = [one for name, one in known.items() if name.partition(".")[0] in LIBRARIES]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]


@contextmanager
def _descriptor(descriptor: int, parts: list[str]) -> Iterator[None]:
    try:
        before = os.dup(descriptor)
    except OSError:  # a process without a terminal may have none: then nothing can be printed there
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield
        finally:
            os.dup2(before, descriptor)
            os.close(before)
            file.seek(0)
            parts.append(COLOUR.sub("", file.read().decode(errors="replace")).strip())


def brief(text: object, length: int = 300) -> str:
    """A message in one line, cut to a length: those of exporters and runtimes may be hundreds of lines."""
    line = " ".join(COLOUR.sub("", str(text)).split())
    return line if len(line) <= length else f"{line[:length].rstrip()}..."
