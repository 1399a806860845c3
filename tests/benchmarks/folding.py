"""Folded networks against the same networks built without any BN, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from measure import Row, at_most, medians
from networks import as_trained, vision
from torch import nn

import bntools


def rows() -> Iterator[Row]:
    """Error of folding and of the exported file, and times, for two networks."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 128, 128)
    for name, make in {"ResNet-50": vision.resnet50, "MobileNetV3-large": vision.mobilenet_v3_large}.items():
        model = make()
        bntools.recalibrate(model, images.split(16), check=False)
        noise, error = _rounding(model, images[:8]), bntools.fold(model, images[:8]).check.error
        what = f"{name} as initialized: error of folding / the unfolded network's own distance from float64"
        yield Row(what, f"{error:.1e} / {noise:.1e}", "", True)
        as_trained(model)
        bntools.recalibrate(model, images.split(16), check=False)
        folded = bntools.fold(model, images[:8])
        count = f"{len(folded.folded)} of {len(folded.folded) + len(folded.kept)} BN folded"
        yield at_most(f"{name}, {count}: scale-relative error, float32", folded.check.error, 1e-5)
        yield from _times(name, folded.model, _without_norms(make), images[:8])


def _times(name: str, folded: nn.Module, bare: nn.Module, x: torch.Tensor) -> Iterator[Row]:
    eager = medians({"folded": _eager(folded, x), "bare": _eager(bare, x)}, rounds=25)
    yield at_most(f"{name}, eager: folded / without any BN", eager["folded"] / eager["bare"], 1.03, "{:.2f} x")
    with tempfile.TemporaryDirectory() as folder:
        runtime = medians(
            {
                "folded": _session(folded, x, Path(folder) / "folded.onnx"),
                "bare": _session(bare, x, Path(folder) / "bare.onnx"),
            },
            rounds=60,
        )
    ratio = runtime["folded"] / runtime["bare"]
    yield at_most(f"{name}, ONNX Runtime: folded / without any BN", ratio, 1.03, "{:.2f} x")


def _rounding(model: nn.Module, x: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        return float((model(x) - exact).abs().max() / exact.abs().max())


def _without_norms(make: Callable[..., nn.Module]) -> nn.Module:
    """The network as it is built without BN: its convolutions then have biases."""
    model = make(norm_layer=_no_norm)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    return model


def _no_norm(features: int, **_: object) -> nn.Module:
    return nn.Identity()


def _eager(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def _session(model: nn.Module, x: torch.Tensor, path: Path) -> Callable[[], object]:
    torch.onnx.export(model, (x,), str(path), input_names=["x"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = {"x": np.asarray(x)}
    return lambda: session.run(None, values)
