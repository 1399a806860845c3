"""A block that must not take more memory than a bound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail where this process holds, at any moment of the block, so many bytes more than before it.

    The peak that an earlier test left would hide what this one takes, so the kernel is asked to forget it.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    yield
    taken = _peak() - before
    assert taken < limit, f"{taken >> 20} MiB were taken, at most {limit >> 20} were allowed"


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10
