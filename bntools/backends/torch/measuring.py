"""Moments of a tensor: one pass on the CPU, accurate whatever the layout, the count and the mean."""

from __future__ import annotations

import numpy as np
import torch

from bntools.moments import Moments

ROWS = 256


def moments_of(x: torch.Tensor) -> Moments:
    """Moments of a layer's input of shape (N, C, ...), per channel C, in float64.

    On the CPU they are numpy arrays; elsewhere they stay tensors on the device, so that nothing waits.
    Half-precision inputs are measured in float32.
    """
    x = x.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if not x.numel():
        return _moments(0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1]))
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        return _moments(x.numel() // x.shape[1], mean, var)
    if x.ndim > 2 and x.is_contiguous():
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return _moments(x.numel() // x.shape[1], mean, var)
    return _of_rows(x.movedim(1, -1).reshape(-1, x.shape[1]))


def sample_means_of(x: torch.Tensor) -> np.ndarray:
    """Each sample's own mean per channel, of shape (N, C), in float64: the unit for standard errors."""
    return np.asarray(x.detach().double().flatten(2).mean(-1).cpu() if x.ndim > 2 else x.detach().double().cpu())


def values_of(x: torch.Tensor) -> np.ndarray:
    """A layer's input of shape (N, C, ...) as rows of channels, float32 or float64."""
    x = x.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
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


def _moments(count: int, mean: torch.Tensor, var: torch.Tensor) -> Moments:
    mean, var = mean.double(), var.double()
    if mean.device.type == "cpu":
        return Moments.from_variance(count, mean.numpy(), var.numpy())
    return Moments.from_variance(count, mean, var)
