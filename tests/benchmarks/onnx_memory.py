"""Peak memory of the verbs on an ONNX file of more than 2 GB, whose weights are external."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from measure import Row, at_most
from onnx import TensorProto, helper, numpy_helper

WIDTH, LAYERS = 3072, 60  # 60 dense layers of 36 MiB each: 2.1 GiB

# VmHWM is of this process alone; ru_maxrss starts at the peak of the process that started it.
CODE = """
import re, sys
from bntools.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def rows() -> Iterator[Row]:
    """The command line's recalibrate, fold and verify, each in a process of its own."""
    if not Path("/proc/self/status").exists():
        yield Row("ONNX, more than 2 GB: peak memory", "not measured: no /proc here", "", True)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _write(folder / "model.onnx")
        np.save(folder / "data.npy", np.random.default_rng(1).normal(size=(64, WIDTH)).astype(np.float32))
        commands = {
            "recalibrate": ("recalibrate", "model.onnx", "data.npy", "-o", "recalibrated.onnx"),
            "fold": ("fold", "recalibrated.onnx", "-o", "folded.onnx"),
            "verify": ("verify", "recalibrated.onnx", "folded.onnx", "data.npy"),
        }
        for verb, command in commands.items():
            what = f"ONNX, {size / 2**30:.1f} GiB with external data: peak of bntools {verb} / size"
            yield at_most(what, _peak(folder, *command) / size, 1.2, "{:.2f} x")


def _write(path: Path) -> int:
    """Dense layers with BN, written one weight at a time; the bytes of both files."""
    generator = np.random.default_rng(0)
    nodes, initializers, x, offset = [], [], "x", 0
    with path.with_name("weights.bin").open("wb") as data:
        for i in range(LAYERS):
            weight = generator.standard_normal((WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5
            data.write(weight)
            initializers.append(_external(f"weight{i}", weight, offset))
            offset += weight.nbytes
            kinds = [f"bn{i}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
            values = generator.uniform(0.5, 1.5, (4, WIDTH)).astype(np.float32)
            initializers += [numpy_helper.from_array(*pair) for pair in zip(values, kinds, strict=True)]
            nodes.append(helper.make_node("Gemm", [x, f"weight{i}"], [f"dense{i}"]))
            nodes.append(helper.make_node("BatchNormalization", [f"dense{i}", *kinds], [f"norm{i}"], name=f"bn{i}"))
            nodes.append(helper.make_node("Relu", [f"norm{i}"], [f"relu{i}"]))
            x = f"relu{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return offset + path.stat().st_size


def _external(name: str, weight: np.ndarray, offset: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": "weights.bin", "offset": str(offset), "length": str(weight.nbytes)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _peak(folder: Path, *command: str) -> int:
    """Bytes of memory that a command held at most, in a process of its own."""
    arguments = [sys.executable, "-c", CODE, *command]
    done = subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024
