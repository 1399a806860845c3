"""How much memory is free where a model lives."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn


def free_memory(model: nn.Module) -> int:
    """Bytes that could still be allocated on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """What the control group of a container leaves, which the machine's free memory does not show."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except OSError:
        return 1 << 62
    return (1 << 62) if limit == "max" else max(0, int(limit) - used)
