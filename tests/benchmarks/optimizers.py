"""What else folds BN: torch.fx on modules, and four optimizers of ONNX files."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.modules.batchnorm import _BatchNorm


def torch_fx(model: nn.Module) -> nn.Module:
    """torch.fx.experimental.optimization.fuse, on a copy."""
    return fuse(copy.deepcopy(model))


def norms(model: nn.Module | onnx.ModelProto) -> int:
    """How many BN a model still computes: modules, nodes, and calls of the function in a traced module."""
    if isinstance(model, onnx.ModelProto):
        return sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    if not isinstance(model, fx.GraphModule):
        return sum(isinstance(module, _BatchNorm) for module in model.modules())
    modules = dict(model.named_modules())
    called = [modules[node.target] for node in model.graph.nodes if node.op == "call_module"]
    functions = [node for node in model.graph.nodes if node.target in (nn.functional.batch_norm, torch.batch_norm)]
    return len(functions) + sum(isinstance(one, _BatchNorm) for module in called for one in module.modules())


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

    with contextlib.redirect_stdout(io.StringIO()):
        return onnxsim.simplify(onnx.load(path))[0]


def _onnxslim(path: Path) -> onnx.ModelProto:
    import onnxslim

    logging.getLogger("ONNXSLIM").setLevel(logging.CRITICAL)
    return onnxslim.slim(onnx.load(path))


ON_FILES: dict[str, Callable[[Path], onnx.ModelProto] | None] = {
    "ONNX Runtime": _onnxruntime,
    "onnxscript": _onnxscript,
    "onnxsim": _onnxsim if find_spec("onnxsim") else None,
    "OnnxSlim": _onnxslim if find_spec("onnxslim") else None,
}
