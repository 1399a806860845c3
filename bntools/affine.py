"""Eval-mode BN as scale and shift, and how a weight takes them up. Plain float64 numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bntools.errors import BntoolsError
from bntools.layer import BatchNorm


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> scale * x + shift`` on a value, both float64 and broadcastable against its shape.

    An axis along which they are constant has length 1.
    """

    scale: np.ndarray
    shift: np.ndarray

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Affine:
        """The same change made to scale and shift."""
        return Affine(change(self.scale), change(self.shift))

    def after(self, first: Affine) -> Affine:
        """This one applied to the result of ``first``."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def same(self, other: Affine) -> bool:
        """Whether both are the same, bit by bit."""
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.shift, other.shift)


def scale_shift(layer: BatchNorm) -> Affine:
    """What the layer does in eval mode: ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``.

    Both have shape (features,). Raises BntoolsError where the statistics allow no such thing.
    """
    if layer.obstacle:
        raise BntoolsError(layer.obstacle)
    if layer.mean is None or layer.var is None:
        raise BntoolsError("it keeps no statistics and normalizes with each batch's own")
    gamma = np.ones_like(layer.mean) if layer.scale is None else layer.scale
    beta = np.zeros_like(layer.mean) if layer.shift is None else layer.shift
    for what, values in (("mean", layer.mean), ("variance", layer.var), ("scale", gamma), ("shift", beta)):
        if not np.isfinite(values).all():
            raise BntoolsError(f"its {what} is NaN or Inf in channel {int(np.argmin(np.isfinite(values)))}")
    if (layer.var < 0).any():
        worst = int(np.argmin(layer.var))
        raise BntoolsError(f"its variance is negative in channel {worst} ({layer.var[worst]:.3g})")
    if (layer.var + layer.eps <= 0).any():
        raise BntoolsError(f"its variance is zero in channel {int(np.argmin(layer.var))}, and eps is 0")
    scale = gamma / np.sqrt(layer.var + layer.eps)
    return Affine(scale, beta - layer.mean * scale)


def absorb_output(
    weight: np.ndarray, bias: np.ndarray | None, affine: Affine, out_axis: int, in_axis: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the linear operation whose output is ``affine`` of this one's.

    ``weight`` has the output channels on ``out_axis`` and the input channels on ``in_axis``; with
    groups one of the two is split (the output of a transposed convolution, the input of others).
    ``affine`` has shape (output channels,). ``bias`` may be None; the result never is.
    """
    old = 0.0 if bias is None else bias
    return weight * _along(affine.scale, weight.shape, out_axis, in_axis, groups), affine.scale * old + affine.shift


def absorb_input(
    weight: np.ndarray, bias: np.ndarray | None, affine: Affine, out_axis: int, in_axis: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of the linear operation that does to ``x`` what this one does to ``affine(x)``.

    As ``absorb_output``, with ``affine`` of shape (input channels,). The shift is added up over all
    taps of the weight, as it is where every output sees all of them.
    """
    moved = weight * _along(affine.shift, weight.shape, in_axis, out_axis, groups)
    added = _per_output(moved, out_axis, in_axis, groups, split=weight.shape[in_axis] == len(affine.shift))
    scaled = weight * _along(affine.scale, weight.shape, in_axis, out_axis, groups)
    return scaled, added if bias is None else bias + added


def _along(vector: np.ndarray, shape: tuple[int, ...], axis: int, other: int, groups: int) -> np.ndarray:
    """One value per channel of ``axis``, laid out so that it multiplies a weight of this shape."""
    layout = [1] * len(shape)
    layout[axis] = shape[axis]
    if shape[axis] == len(vector):
        return vector.reshape(layout)
    # The axis counts channels within a group; which group it is, the other axis says.
    rows = np.repeat(vector.reshape(groups, shape[axis]), shape[other] // groups, axis=0)
    layout[other] = shape[other]
    return (rows if other < axis else rows.T).reshape(layout)


def _per_output(terms: np.ndarray, out_axis: int, in_axis: int, groups: int, split: bool) -> np.ndarray:
    """The sum of all terms that reach each output channel; ``split`` if groups split the output axis."""
    taps = tuple(axis for axis in range(terms.ndim) if axis not in (out_axis, in_axis))
    table = terms.sum(axis=taps)
    table = table if in_axis < out_axis else table.T
    if not split:
        return table.sum(axis=0)
    return table.reshape(groups, -1, table.shape[1]).sum(axis=1).reshape(-1)
