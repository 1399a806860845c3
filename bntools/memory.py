"""How much memory of the machine is free."""

from __future__ import annotations

from pathlib import Path

import psutil

UNLIMITED = 1 << 62


def available() -> int:
    """Bytes that this process could still allocate in main memory."""
    return min(int(psutil.virtual_memory().available), left_in_container())


def left_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group of a container leaves, which the machine's free memory does not show."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return UNLIMITED
    return UNLIMITED if limit == "max" else max(0, int(limit) - used)
