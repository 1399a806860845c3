"""Moments of a tensor: one pass over it, accurate whatever the layout, the count and the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bntools.moments import Moments, Unread

ROWS = 256
HALF = (torch.float16, torch.bfloat16)

# Kinds of device on which what is measured stays until somebody reads it. CUDA computes on while Python queues more
# work, and to read a number is to wait until the queue is empty. Others need not know float64 (MPS does not): what they
# measure comes to the host at once.
QUEUED = ("cuda",)


def stays(device: torch.device) -> bool:
    """Whether what is measured on a device stays there until somebody reads it."""
    return device.type in QUEUED


def moments_of(x: torch.Tensor) -> Moments | Unread:
    """Moments of a layer's input of shape (N, C, ...), per channel C.

    Numpy arrays in float64, or tensors on a device where they stay. Half-precision inputs are measured in float32.
    """
    x = x.detach()
    if x.numel() and stays(x.device):
        return _unread(x.as_subclass(torch.Tensor))
    x = x.float() if x.dtype in HALF else x
    if not x.numel():
        return _moments(0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1]))
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, _others(x), correction=0)
        return _moments(x.numel() // x.shape[1], mean, var)
    if x.ndim > 2 and x.is_contiguous():
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return _moments(x.numel() // x.shape[1], mean, var)
    return _of_rows(x.movedim(1, -1).reshape(-1, x.shape[1]))


def sample_means_of(x: torch.Tensor) -> Any:
    """Each sample's own mean per channel, of shape (N, C): the unit for standard errors.

    A numpy array in float64; in float32 on a device where what is measured stays, as there is one for each sample.
    """
    x = x.detach()
    if stays(x.device):
        dtype = torch.float32 if x.dtype in HALF else x.dtype
        return x.mean(list(range(2, x.ndim)), dtype=dtype) if x.ndim > 2 else x.to(dtype, copy=True)
    return np.asarray(x.cpu().double().flatten(2).mean(-1) if x.ndim > 2 else x.cpu().double())


def values_of(x: torch.Tensor) -> np.ndarray:
    """A layer's input of shape (N, C, ...) as rows of channels, float32 or float64."""
    x = x.detach()
    x = x.float() if x.dtype in HALF else x
    return np.array(x.movedim(1, -1).reshape(-1, x.shape[1]).cpu())


def _of_rows(rows: torch.Tensor) -> Moments:
    """Moments of a (M, C) matrix whose channels lie last.

    PyTorch's kernel for this layout adds up in float32, row after row: over 800,000 rows the variance
    was off by 1e-4 (PyTorch 2.13). Read as (ROWS, K * C), the same memory is K independent sets of
    ROWS rows, each short enough to be summed exactly; they are merged in float64, and vectorize better.
    """
    count, channels = rows.shape
    sets = max(1, count // ROWS)
    head = count // sets * sets
    mean, var = torch.batch_norm_update_stats(rows[:head].reshape(-1, sets * channels), None, None, 0.0)
    means, variances = mean.double().view(sets, channels), var.double().view(sets, channels)
    overall = means.mean(0)
    result = _moments(head, overall, (variances + (means - overall) ** 2).mean(0))
    return result.merge(_of_rows(rows[head:])) if head < count else result


def _unread(x: torch.Tensor) -> Unread:
    """Welford's method in one pass on the device: CUDA's kernels read every value once, and add up in float32.

    ``batch_norm_update_stats`` takes half precision as it is, and channels-last memory with many blocks a channel. With
    plain contiguous memory it has one block a channel (PyTorch 2.13), which leaves most of a GPU idle behind a first
    convolution of 64 channels; ``var_mean`` shares the work out better, but gives halves for halves.
    """
    count = x.numel() // x.shape[1]
    if x.dtype not in HALF and x.ndim > 2 and x.is_contiguous():
        var, mean = torch.var_mean(x, _others(x), correction=0)
    else:
        x = x.float() if x.dtype in HALF and not x.is_cuda else x
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return Unread(count, mean, var)


def _others(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _moments(count: int, mean: torch.Tensor, var: torch.Tensor) -> Moments:
    return Moments.from_variance(count, *(values.cpu().double().numpy() for values in (mean, var)))
