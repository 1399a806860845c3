"""What a BN layer becomes when it is frozen for good: a scale and shift per channel."""

from __future__ import annotations

import torch
from torch import nn


class FrozenAffine(nn.Module):
    """``scale * x + shift`` on an input of shape (N, C, ...), both buffers of shape (C,), in training as in eval mode.

    Computed in the wider of the two dtypes and returned in that of the input, as BN does.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale and shift each channel."""
        shape = [1, -1] + [1] * (x.dim() - 2)
        return (x * self.scale.view(shape) + self.shift.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.scale.numel())
