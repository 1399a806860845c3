"""Random ONNX programs folded: whatever the graph allows must be right by itself, before any comparison."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_nets import Builder, example, gap, run

from bntools.backends import backend
from bntools.folding import _affines
from bntools.legality import plan

C, SIZE = 4, 6
EDGE = [0, 0, 0, 1, 0, 0, 0, 0]

# Each takes the builder and two values of shape (N, C, SIZE, SIZE), and gives another one.
STEPS = {
    "bn": lambda b, x, y: b.bn(x, C, positive=b.count % 3 > 0),
    "bn again": lambda b, x, y: b.bn(x, C, positive=b.count % 2 > 0),
    "conv": lambda b, x, y: b.op("Conv", x, "w1"),
    "padded": lambda b, x, y: b.op("Conv", x, "w3", "b", pads=[1, 1, 1, 1]),
    "grouped": lambda b, x, y: b.op("Conv", x, "wg", group=2),
    "transposed": lambda b, x, y: b.op("ConvTranspose", x, "wt", "b", group=2),
    "wide": lambda b, x, y: b.op("Conv", b.op("Concat", x, y, axis=1), "ww"),
    "dense": lambda b, x, y: b.op(
        "Transpose", b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 3, 1]), "wd"), perm=[0, 3, 1, 2]
    ),
    "dense on pixels": lambda b, x, y: b.op("Add", b.op("MatMul", x, "wp"), "bp"),
    "relu": lambda b, x, y: b.op("Relu", x),
    "max pool": lambda b, x, y: b.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "average": lambda b, x, y: b.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    "average inside": lambda b, x, y: b.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "resized": lambda b, x, y: b.op("Resize", b.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), "", "twice"),
    "add": lambda b, x, y: b.op("Add", x, y),
    "sum": lambda b, x, y: b.op("Sum", x, y, x),
    "mul": lambda b, x, y: b.op("Mul", x, b.op("Sigmoid", y)),
    "array": lambda b, x, y: b.op("Add", x, "array"),
    "less": lambda b, x, y: b.op("Sub", "array", x),
    "times": lambda b, x, y: b.op("Mul", x, "array"),
    "shuffled": lambda b, x, y: b.op(
        "Reshape", b.op("Transpose", b.op("Reshape", x, "split"), perm=[0, 2, 1, 3, 4]), "joined"
    ),
    "swapped": lambda b, x, y: b.op("Concat", *b.op("Split", x, "halves", outputs=2, axis=1)[::-1], axis=1),
    "cut": lambda b, x, y: b.op(
        "Concat", b.op("Slice", x, "zero", "two", "one"), b.op("Slice", y, "two", "end", "one"), axis=1
    ),
    "edge": lambda b, x, y: b.op("Slice", b.pad(x, EDGE, "edge"), "one", "end", "three"),
    "shifted": lambda b, x, y: b.op("Slice", b.pad(x, EDGE), "zero", "size", "three"),
}
ARRAYS = {
    "w1": (C, C, 1, 1), "w3": (C, C, 3, 3), "wg": (C, C // 2, 1, 1), "wt": (C, C // 2, 1, 1), "ww": (C, 2 * C, 1, 1),
    "wd": (C, C), "wp": (SIZE, SIZE), "bp": (SIZE,), "b": (C,), "array": (C, 1, 1),
}  # fmt: skip
LISTS = {"split": [-1, 2, 2, SIZE, SIZE], "joined": [-1, C, SIZE, SIZE], "halves": [2, 2]}
LISTS |= {"zero": [0], "one": [1], "two": [2], "three": [3], "end": [99], "size": [SIZE]}
STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from([0, 0, 0, 0, 1, 2]), st.integers(0, 3))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(STEP, min_size=2, max_size=9), st.integers(0, 9))
def test_random_programs_keep_their_function(steps, seed):
    """A random program with BN in it computes the same after all its folds, at another size of batch too."""
    model = program(steps, seed)
    batch, onnx_backend = example(2, C, SIZE, SIZE), backend("onnx")
    found = onnx_backend.layers(model)
    affines, fixed = _affines(found, {layer.name for layer in found})
    graph = onnx_backend.graph(model, batch)
    made, kept = plan(graph, affines, fixed)
    new = onnx_backend.absorb(model, graph, made).proto
    onnx.checker.check_model(new, full_check=True)
    assert len(onnx_backend.layers(new)) == len(kept)
    for samples in (2, 3):
        x = example(samples, C, SIZE, SIZE, seed=samples)
        assert gap(run(model, x), run(new, x)) < 1e-4


def program(steps: list[tuple[str, int, int]], seed: int) -> onnx.ModelProto:
    """Steps one after the other; each names the values it reads by how far back they were made."""
    b = Builder(17, seed)
    for name, shape in ARRAYS.items():
        b.const(b.draw(*shape) * 0.7, name)
    for name, values in LISTS.items():
        b.const(np.asarray(values, np.int64), name)
    b.const(np.array([1, 1, 2, 2], np.float32), "twice")
    values = [b.op("Identity", "x")]
    for name, first, second in steps:
        values.append(STEPS[name](b, values[-1 - first % len(values)], values[-1 - second % len(values)]))
    outputs = [b.op("Identity", values[-1]), b.axes("ReduceMean", values[len(values) // 2], [1])]
    return b.model(outputs, ("n", C, SIZE, SIZE))
