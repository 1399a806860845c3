"""How much memory is free where a model lives."""

from __future__ import annotations

import torch
from torch import nn

from bntools.memory import available


def free_memory(model: nn.Module) -> int:
    """Bytes that could still be allocated on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available()
