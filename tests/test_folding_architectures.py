"""Real architectures folded, with random weights, scales of both signs and statistics of their own."""

from __future__ import annotations

import pytest
import shim
import torch
from torch import nn

import bntools
from bntools.backends.torch.layers import modules

torchvision = shim.import_torchvision()
timm = pytest.importorskip("timm")


def vision(name: str, **options) -> nn.Module:
    """A torchvision classifier without pretrained weights."""
    return torchvision.models.get_model(name, weights=None, **options)


def segmentation() -> nn.Module:
    """A segmentation network with a backbone, dilated convolutions and a dict of outputs."""
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


# name -> (how to make it, shape of an input, layers folded, layers kept)
NETWORKS = {
    "resnet18": (lambda: vision("resnet18"), (3, 32, 32), 20, 0),
    "mobilenet_v3_small": (lambda: vision("mobilenet_v3_small"), (3, 32, 32), 34, 0),
    "shufflenet_v2_x0_5": (lambda: vision("shufflenet_v2_x0_5"), (3, 32, 32), 56, 0),
    "densenet121": (lambda: vision("densenet121"), (3, 32, 32), 59, 62),
    "googlenet": (lambda: vision("googlenet", init_weights=False, aux_logits=False), (3, 32, 32), 57, 0),
    "r3d_18": (lambda: torchvision.models.video.r3d_18(weights=None), (3, 4, 16, 16), 20, 0),
    "lraspp": (segmentation, (3, 64, 64), 47, 0),
    "repvgg_a0": (lambda: timm.create_model("repvgg_a0"), (3, 32, 32), 44, 17),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), (3, 32, 32), 49, 0),
    "levit_128s": (lambda: timm.create_model("levit_128s"), (3, 224, 224), 52, 0),
}


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Random scale and shift, and the statistics of this batch, so that values neither grow nor vanish."""
    generator = torch.Generator().manual_seed(0)
    for layer in modules(model).values():
        n = layer.num_features
        layer.momentum, layer.eps = 1.0, 1e-3
        with torch.no_grad():
            sign = torch.where(torch.rand(n, generator=generator) < 0.2, -1.0, 1.0)
            layer.weight.copy_((torch.rand(n, generator=generator) * 0.6 + 0.7) * sign)
            layer.bias.copy_(torch.randn(n, generator=generator) * 0.3)
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_real_network_folds_as_far_as_it_can(name):
    """Counts are the architecture's, kept layers have their reasons, and in float64 the function is the same."""
    make, shape, folded, kept = NETWORKS[name]
    torch.manual_seed(0)
    model = settled(make(), torch.randn(8, *shape)).double()
    result = bntools.fold(model, torch.randn(2, *shape, dtype=torch.float64))
    assert (len(result.folded), len(result.kept)) == (folded, kept), result
    assert result.check.error < 1e-11
    assert all(reason.startswith("cannot go back: ") for reason in result.kept.values())
    assert len(modules(result.model)) == kept


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_a_real_network_folds_in_single_precision(name):
    """In float32 the error is that of rounding."""
    make, shape, folded, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = settled(make(), torch.randn(8, *shape))
    result = bntools.fold(model, torch.randn(2, *shape))
    assert len(result.folded) == folded
    assert result.check.error < 1e-4


def test_a_network_without_bn_has_nothing_to_fold():
    """LayerNorm is not a scale and shift: ConvNeXt is refused, and not silently returned."""
    with pytest.raises(bntools.BntoolsError, match="no BN layers"):
        bntools.fold(vision("convnext_tiny"), torch.randn(1, 3, 32, 32))
