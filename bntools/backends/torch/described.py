"""The BN layers that a file of PyTorch tells of, also where only the names of its tensors do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bntools.backends.torch import files, pickles, weights
from bntools.backends.torch.layers import layers
from bntools.layer import BatchNorm

MEAN = ".running_mean"
WRAPPED = "module."  # what DataParallel, DistributedDataParallel and AveragedModel put before every name


def described(path: str, allow: Sequence[str] = ()) -> list[BatchNorm]:
    """The records of the BN layers in a file, for comparing them.

    Of a state dict, read without the model it belongs to, a layer is what has a ``running_mean`` and a
    ``running_var`` of one shape. Its eps is not in the file, and NaN; nor is its momentum.

    Raises BntoolsError where the file is none of PyTorch's forms, damaged, or holds what is not admitted.
    """
    form = files.form_of(path)
    if form == "safetensors":
        return of_state(files.read_safetensors(path)[0])
    if form != "pickle":
        return layers(files.load(path, allow=allow)[0])
    holds = pickles.read(path, allow)
    found = weights.at(holds, weights.find(path, holds))
    if isinstance(found, nn.Module):
        return layers(files.load(path, allow=allow)[0])
    pickles.check_tensors(path, found.values())
    return of_state(found)


def of_state(state: Mapping[str, Any]) -> list[BatchNorm]:
    """The records that the names in a state dict tell; names that wrappers add are taken off."""
    names = [key for key in state if key not in weights.BESIDE]
    prefix = WRAPPED if names and all(key.startswith(WRAPPED) for key in names) else ""
    stems = [key.removesuffix(MEAN) for key in names if key.endswith(MEAN) and _is_norm(state, key.removesuffix(MEAN))]
    return [_record(stem.removeprefix(prefix).replace("_orig_mod.", ""), stem, state) for stem in stems]


def _is_norm(state: Mapping[str, Any], stem: str) -> bool:
    mean: Any = state[stem + MEAN]
    var: Any = state.get(f"{stem}.running_var")
    both = pickles.is_plain(mean) and pickles.is_plain(var)
    return both and mean.ndim == 1 and mean.shape == var.shape


def _record(name: str, stem: str, state: Mapping[str, Any]) -> BatchNorm:
    mean, var, scale, shift = (
        _array(state.get(f"{stem}.{key}")) for key in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None
    counter: Any = state.get(f"{stem}.num_batches_tracked")
    return BatchNorm(
        name=name,
        kind="a state dict's",
        features=mean.size,
        axis=1,
        eps=math.nan,
        momentum=None,
        mean=mean,
        var=var,
        scale=scale if scale is not None and scale.shape == mean.shape else None,
        shift=shift if shift is not None and shift.shape == mean.shape else None,
        updates=int(counter) if pickles.is_plain(counter) and counter.numel() == 1 else None,
        stats_frozen=False,
        affine_frozen=False,
        dtype=str(state[stem + MEAN].dtype).removeprefix("torch."),
    )


def _array(value: Any) -> np.ndarray | None:
    return value.detach().to("cpu", torch.float64).numpy() if pickles.is_plain(value) else None
