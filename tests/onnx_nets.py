"""Small ONNX graphs built node by node, in any opset, and run by ONNX Runtime with its optimizations off."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import bntools
from bntools.folding import Folded


def newest() -> int:
    """The newest opset of the installed onnx that the installed ONNX Runtime takes."""
    for opset in range(onnx.defs.onnx_opset_version(), 8, -1):
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", values[:1], values[1:])
        opsets = [helper.make_opsetid("", opset)]
        with contextlib.suppress(Exception):
            run(helper.make_model(graph, opset_imports=opsets, ir_version=8), np.ones(1, np.float32))
            return opset
    raise AssertionError("ONNX Runtime takes no opset")


class Builder:
    """A graph in the making: every method adds nodes and gives the name of the value that they make."""

    def __init__(self, opset: int = 17, seed: int = 0, dtype: Any = np.float32, constants: bool = False, ir: int = 8):
        self.opset, self.dtype, self.constants, self.ir = opset, np.dtype(dtype), constants, ir
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def draw(self, *shape: int) -> np.ndarray:
        """Random numbers of this shape."""
        return self.random.normal(size=shape).astype(self.dtype)

    def const(self, values: Any, name: str = "") -> str:
        """An initializer, or a Constant node."""
        array = np.asarray(values)
        name = name or self._name("const")
        tensor = numpy_helper.from_array(array, name)
        if self.constants:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def op(self, kind: str, *inputs: str, outputs: Any = 1, name: str = "", **attributes: Any) -> Any:
        """A node; its output, or a list of them where there are several."""
        name = name or self._name(kind.lower())
        made = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, **attributes))
        return made[0] if outputs == 1 else made

    def bn(self, x: str, channels: int, name: str = "", positive: bool = True, epsilon: float = 1e-3) -> str:
        """A BatchNormalization with telling numbers; some of its scales are negative if ``positive`` is not."""
        name = name or self._name("bn")
        scale = self.random.uniform(0.6, 1.6, channels) * (1 if positive else (-1) ** np.arange(channels))
        parts = {"weight": scale, "bias": self.random.normal(size=channels)}
        parts |= {"running_mean": self.random.normal(size=channels) * 0.5}
        parts |= {"running_var": self.random.uniform(0.5, 2, channels)}
        names = [self.const(values.astype(self.dtype), f"{name}.{part}") for part, values in parts.items()]
        return self.op("BatchNormalization", x, *names, name=f"{name}_out", epsilon=epsilon)

    def axes(self, kind: str, x: str, axes: list[int], **attributes: Any) -> str:
        """A node whose axes were an attribute once: Squeeze, Unsqueeze and ReduceMean in the opset's own form."""
        since = 13 if kind in ("Squeeze", "Unsqueeze") else 18
        if self.opset < since:
            return self.op(kind, x, axes=axes, **attributes)
        return self.op(kind, x, self.const(np.asarray(axes, np.int64)), **attributes)

    def pad(self, x: str, pads: list[int], mode: str = "constant", value: float = 0.0) -> str:
        """A Pad in the opset's own form."""
        if self.opset < 11:
            return self.op("Pad", x, pads=pads, mode=mode, value=value)
        extra = [self.const(np.asarray(value, self.dtype))] if mode == "constant" else []
        return self.op("Pad", x, self.const(np.asarray(pads, np.int64)), *extra, mode=mode)

    def model(
        self, outputs: list[str], shape: tuple[Any, ...] = ("n", 3, 7, 7), strict: bool = True, **inputs: Any
    ) -> onnx.ModelProto:
        """The model, checked if ``strict``; its input is ``x``, and whatever else is given."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        given = [helper.make_tensor_value_info(name, kind, size) for name, size in ({"x": shape} | inputs).items()]
        if self.ir < 4:
            given += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.initializers]
        results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", given, results, self.initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir)
        if not strict:
            return model
        shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output
        del model.graph.output[:]
        model.graph.output.extend(shapes)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"


def run(model: Any, *arrays: np.ndarray) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes with its optimizations off; ``model`` is a message or a path."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    feeds = dict(zip([one.name for one in session.get_inputs()], arrays, strict=True))
    return dict(zip(names, session.run(names, feeds), strict=True))


def example(*shape: int, dtype: Any = np.float32, seed: int = 1) -> np.ndarray:
    """A random batch."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def ops(model: onnx.ModelProto) -> list[str]:
    """The operators of a graph in order, constants left out."""
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


def gap(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """The largest difference of two results in terms of their scale; their names and shapes have to be the same."""
    assert list(before) == list(after)
    assert [a.shape for a in before.values()] == [b.shape for b in after.values()]
    pairs = [(a.astype(np.float64), after[name].astype(np.float64)) for name, a in before.items()]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)


def conv(b: Builder, x: str = "x", into: int = 3, out: int = 4, **options: Any) -> str:
    """A convolution of size 3 without bias."""
    return b.op("Conv", x, b.const(b.draw(out, into, 3, 3)), **options)


IMAGE = example(2, 3, 7, 7)


def folds(model: onnx.ModelProto, batch: Any = IMAGE) -> Folded:
    """The model folded, after checking that its function is the same and that the checker takes it."""
    folded = bntools.fold(model, batch)
    assert gap(run(model, batch), run(folded.model, batch)) < 1e-5
    onnx.checker.check_model(folded.model, full_check=True)
    return folded
