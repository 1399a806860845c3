"""What an nn.Module takes as input, as far as its layers tell."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from bntools.backends.torch.layers import unwrap


def input_channels(model: nn.Module) -> int | None:
    """Channels that the first convolution reads, in definition order; None without a convolution."""
    convolutions = (module for module in unwrap(model).modules() if isinstance(module, _ConvNd))
    first = next(convolutions, None)
    return None if first is None else first.in_channels
