"""How much memory is free where a model lives."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from bntools.memory import available


def free_memory(model: nn.Module) -> int:
    """Bytes that could still be allocated on the model's device.

    On CUDA that is what the driver has left, and what PyTorch's allocator has of it and does not use.
    """
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available()
