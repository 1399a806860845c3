"""How many BN each optimizer of ONNX files takes out of the same networks, and whether what it leaves is right."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from measure import Row
from networks import vision, with_statistics, write_onnx
from onnx_nets import gap, run
from toys import toys

import bntools

PIXELS = 96
NETWORKS = {
    "ResNet-18": vision.resnet18,
    "DenseNet-121": vision.densenet121,
    "MobileNetV3-small": vision.mobilenet_v3_small,
    "EfficientNet-B0": vision.efficientnet_b0,
    "RegNetY-400MF": vision.regnet_y_400mf,
    "GoogLeNet": lambda: vision.googlenet(init_weights=False),
    "ShuffleNetV2 x0.5": vision.shufflenet_v2_x0_5,
}
WRONG = 1e-3  # scale-relative: far beyond rounding


def rows() -> Iterator[Row]:
    """One row a network or toy, with the BN that every optimizer folds."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 3, PIXELS, PIXELS)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in NETWORKS.items():
            path = write_onnx(with_statistics(make()), PIXELS, Path(folder) / "model.onnx")
            yield _row(name, path, x)
        for name, model in toys().items():
            path = Path(folder) / "toy.onnx"
            onnx.save(model, path)
            yield _row(name, path, x)


def _row(name: str, path: Path, x: np.ndarray) -> Row:
    model = onnx.load(path)
    there, truth = _norms(model), run(path, x)
    folded = bntools.fold(path, x)
    ours, error = there - _norms(folded.model), gap(truth, run(folded.model, x))
    best, texts = 0, [f"bntools {ours}"]
    for peer, optimize in PEERS.items():
        count, text = _peer(optimize, path, there, truth, x)
        best = max(best, count)
        texts.append(f"{peer} {text}")
    what = f"ONNX, {name}, {there} BN: folded, and error"
    return Row(what, f"{', '.join(texts)}; {error:.1e}", "most, at most 1e-05", ours >= best and error <= 1e-5)


def _peer(
    optimize: Callable[[Path], onnx.ModelProto] | None, path: Path, there: int, truth: dict, x: np.ndarray
) -> tuple[int, str]:
    """How many BN a peer folds, 0 if what it gives is wrong, and that in words."""
    if optimize is None:
        return 0, "not installed"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = optimize(path)
    except Exception as error:  # a peer may raise anything
        return 0, f"fails ({type(error).__name__})"
    count = there - _norms(model)
    try:
        error = gap(truth, run(model, x))
    except Exception:  # what it gives may be no model
        return 0, f"{count}, does not run"
    return (0, f"{count}, wrong by {error:.1e}") if not error < WRONG else (count, str(count))


def _norms(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def _onnxruntime(path: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    target = path.with_name("optimized.onnx")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(target)


def _onnxscript(path: Path) -> onnx.ModelProto:
    import onnx_ir as ir
    from onnxscript import optimizer, rewriter

    model = ir.load(path)
    optimizer.optimize(model)
    return ir.to_proto(rewriter.rewrite(model))


def _onnxsim(path: Path) -> onnx.ModelProto:
    import onnxsim

    return onnxsim.simplify(onnx.load(path))[0]


def _onnxslim(path: Path) -> onnx.ModelProto:
    import onnxslim

    logging.getLogger("ONNXSLIM").setLevel(logging.CRITICAL)
    return onnxslim.slim(onnx.load(path))


PEERS = {
    "ONNX Runtime": _onnxruntime,
    "onnxscript": _onnxscript,
    "onnxsim": _onnxsim if find_spec("onnxsim") else None,
    "OnnxSlim": _onnxslim if find_spec("onnxslim") else None,
}
