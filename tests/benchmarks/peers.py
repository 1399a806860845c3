"""What others use to measure the statistics of BN layers anew, each as it is documented."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Batches = Sequence[torch.Tensor]


def update_bn(model: nn.Module, batches: Batches) -> None:
    """torch.optim.swa_utils.update_bn: the mean of the batches' statistics, each batch normalized by its own."""
    torch.optim.swa_utils.update_bn(batches, model)


def fvcore(model: nn.Module, batches: Batches) -> None:
    """fvcore.nn.precise_bn.update_bn_stats (Wu and Johnson 2021)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fvcore compiles losses when it is imported
        from fvcore.nn.precise_bn import update_bn_stats
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    model.train()
    with contextlib.redirect_stderr(io.StringIO()):
        update_bn_stats(model, batches, len(batches), progress=None)
    model.eval()


@torch.no_grad()
def mean_of_batches(model: nn.Module, batches: Batches) -> None:
    """What mmpretrain's PreciseBNHook does, written here after its description: means over batches, all alike.

    Momentum 1, so that every batch leaves its own mean and variance behind; these are averaged. The hook itself needs
    mmengine and mmpretrain, whose data pipeline it reads from.
    """
    model.train()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    sums = [(torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var)) for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    for batch in batches:
        model(batch)
        for layer, (mean, var) in zip(layers, sums, strict=True):
            mean += layer.running_mean / len(batches)
            var += layer.running_var / len(batches)
    for layer, momentum, (mean, var) in zip(layers, momenta, sums, strict=True):
        layer.momentum = momentum
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    model.eval()


PEERS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "update_bn": update_bn,
    "fvcore's PreciseBN": fvcore,
    "PreciseBNHook's algorithm": mean_of_batches,
}
