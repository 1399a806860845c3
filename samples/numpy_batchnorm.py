"""Batch normalization written out in NumPy, beside what bntools measures and PyTorch computes."""

import numpy as np
import torch
from torch import nn

import bntools


def batch_norm(x: np.ndarray, mean: np.ndarray, var: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: float):
    """Normalize (n, channels, height, width) with one mean, variance, scale and shift a channel."""
    mean, var, scale, shift = (values[:, None, None] for values in (mean, var, scale, shift))
    return scale * (x - mean) / np.sqrt(var + eps) + shift


def main() -> None:
    """Print how far the three are apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(loc=3.0, scale=[[[[2.0]], [[0.5]], [[10.0]]]], size=(16, 3, 8, 8))

    moments = bntools.Moments.of(x)
    mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))  # the divisor is the count
    difference = max(np.abs(moments.mean - mean).max(), np.abs(moments.var / var - 1).max())
    print(f"moments of {moments.count:,} values a channel, bntools against NumPy: {difference:.1e}")
    assert difference < 1e-12

    layer = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, -0.5]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    bntools.recalibrate(layer, [torch.from_numpy(x)])
    (record,) = bntools.inspect(layer)
    ours = batch_norm(x, record.mean, record.var, record.scale, record.shift, record.eps)
    theirs = layer(torch.from_numpy(x)).detach().numpy()
    difference = np.abs(ours - theirs).max()
    print(f"eval mode after recalibration, NumPy against PyTorch: {difference:.1e}")
    assert difference < 1e-12

    a, b = bntools.Moments.of(x[:3]), bntools.Moments.of(x[3:])
    difference = np.abs(a.merge(b).var / moments.var - 1).max()
    print(f"variance from two unequal parts merged, against the whole: {difference:.1e}")
    assert difference < 1e-12


if __name__ == "__main__":
    main()
