"""A stderr without the log of TensorFlow's C++ side, which no setting of its own keeps quiet."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# glog's lines, "I0000 00:00:1763.5 42 port.cc:153] ...", and its warning that it logs before it was told where to
LOGGED = re.compile(rb"[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before absl::InitializeLog")


@contextmanager
def without_logs() -> Iterator[None]:
    """Keep what compiled code writes to stderr in the block, and print what of it is no log line when the block ends.

    Python's own stderr goes where it went.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    ours = sys.stderr
    with tempfile.TemporaryFile() as held, os.fdopen(kept, "w", buffering=1) as direct:
        if _leads_to_2(ours):
            ours.flush()
            sys.stderr = direct
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            sys.stderr = ours
            held.seek(0)
            for line in held:
                if not LOGGED.match(line):
                    os.write(2, line)


def _leads_to_2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
