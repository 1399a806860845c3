"""A small ONNX model and the files it is kept in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS = ("weight", "bias", "running_mean", "running_var")


def norm(name: str, source: str, target: str, **attributes) -> onnx.NodeProto:
    """A BatchNormalization whose constants are called ``name.weight`` and so on."""
    return helper.make_node(
        "BatchNormalization", [source, *(f"{name}.{kind}" for kind in KINDS)], [target], name=name, **attributes
    )


def constants(name: str, channels: int, seed: int = 0) -> list[onnx.TensorProto]:
    """Positive random constants of a BatchNormalization, float32."""
    generator = np.random.default_rng(seed)
    return [
        numpy_helper.from_array(generator.uniform(0.5, 1.5, channels).astype(np.float32), f"{name}.{kind}")
        for kind in KINDS
    ]


def small(batch: int | str = "N", opset: int = 17, height: int | str = 8) -> onnx.ModelProto:
    """Input (batch, 3, height, 8) -> Conv -> bn1 -> Relu -> Conv -> bn2, with metadata."""
    generator = np.random.default_rng(0)
    weights = {"w1": (40, 3, 3, 3), "w2": (5, 40, 1, 1)}
    initializers = [
        numpy_helper.from_array(generator.normal(0, 0.3, shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="conv1", pads=[1] * 4),
        norm("bn1", "c1", "b1"),
        helper.make_node("Relu", ["b1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2"),
        norm("bn2", "c2", "scores"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, height, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 5, height, 8])],
        [*initializers, *constants("bn1", 40), *constants("bn2", 5, seed=1)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, {"team": "vision"})
    return model


def keep(model: onnx.ModelProto, path: Path, external: bool = False) -> Path:
    """Write a model to ``path``, external weights (of 100 bytes and more) to ``weights.bin`` beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if external:
        onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    else:
        onnx.save(copy, path)
    return path


def images(samples: int = 6, seed: int = 0) -> np.ndarray:
    """Input for ``small``."""
    return np.random.default_rng(seed).normal(size=(samples, 3, 8, 8)).astype(np.float32)
