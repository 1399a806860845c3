"""A digest of the weights of an nn.Module that lie outside of BN statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bntools.backends.torch.layers import modules, unwrap
from bntools.digests import combined


def digest(model: nn.Module) -> str:
    """A digest of all parameters and of the floating-point buffers that a state dict holds, statistics left out.

    Whole numbers are counters, which differ between runs of one model.
    """
    own = {
        id(module._buffers.get(key)) for module in modules(model).values() for key in ("running_mean", "running_var")
    }
    state = unwrap(model).state_dict(keep_vars=True)
    found = [value for value in state.values() if isinstance(value, torch.Tensor) and id(value) not in own]
    return combined(_weights(found))


def _weights(found: list[torch.Tensor]) -> Iterator[tuple[str, tuple[int, ...], memoryview]]:
    for tensor in found:
        if tensor.is_quantized:
            tensor = tensor.int_repr()
        elif not tensor.is_floating_point() and not tensor.is_complex():
            continue
        plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        data = plain.cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        yield str(tensor.dtype), tuple(tensor.shape), data.numpy().data
