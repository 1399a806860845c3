"""Architectures with BN, of torchvision and timm: small members of their families, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import shim
import timm
from torch import nn

vision = shim.import_torchvision().models
segmentation = vision.segmentation
PIXELS = {"Inception v3": 96, "LeViT-128S": 224, "EfficientFormer-L1": 224}  # 64 for the others


def _timm(name: str) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, pretrained=False)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": vision.resnet18,
    "ResNet-50": vision.resnet50,
    "ResNeXt-50": vision.resnext50_32x4d,
    "DenseNet-121": vision.densenet121,
    "GoogLeNet": partial(vision.googlenet, init_weights=False),
    "Inception v3": partial(vision.inception_v3, init_weights=False),
    "MNASNet 0.5": vision.mnasnet0_5,
    "MobileNetV2": vision.mobilenet_v2,
    "MobileNetV3-small": vision.mobilenet_v3_small,
    "MobileNetV3-large": vision.mobilenet_v3_large,
    "EfficientNet-B0": vision.efficientnet_b0,
    "EfficientNetV2-S": vision.efficientnet_v2_s,
    "RegNetX-400MF": vision.regnet_x_400mf,
    "RegNetY-400MF": vision.regnet_y_400mf,
    "ShuffleNetV2 x0.5": vision.shufflenet_v2_x0_5,
    "LR-ASPP": partial(segmentation.lraspp_mobilenet_v3_large, weights_backbone=None),
    "DeepLabV3": partial(segmentation.deeplabv3_mobilenet_v3_large, weights_backbone=None),
    "CSPDarknet-53": _timm("cspdarknet53"),
    "DLA-34": _timm("dla34"),
    "DPN-48b": _timm("dpn48b"),
    "EfficientFormer-L1": _timm("efficientformer_l1"),
    "ESE-VoVNet-19b": _timm("ese_vovnet19b_dw"),
    "FBNet-C": _timm("fbnetc_100"),
    "GENet-S": _timm("gernet_s"),
    "GhostNet 0.5": _timm("ghostnet_050"),
    "HardCoRe-NAS-A": _timm("hardcorenas_a"),
    "HRNet-W18-small": _timm("hrnet_w18_small"),
    "LCNet 0.5": _timm("lcnet_050"),
    "LeViT-128S": _timm("levit_128s"),
    "MixNet-S": _timm("mixnet_s"),
    "MobileNetV4-small": _timm("mobilenetv4_conv_small"),
    "MobileOne-S0": _timm("mobileone_s0"),
    "MobileViT-XXS": _timm("mobilevit_xxs"),
    "RepVGG-A0": _timm("repvgg_a0"),
    "Res2Net-50": _timm("res2net50_14w_8s"),
    "ResNeSt-14d": _timm("resnest14d"),
    "ReXNet 1.0": _timm("rexnet_100"),
    "SelecSLS-42b": _timm("selecsls42b"),
    "SKResNet-18": _timm("skresnet18"),
    "TinyNet-E": _timm("tinynet_e"),
    "Xception-41": _timm("xception41"),
}
