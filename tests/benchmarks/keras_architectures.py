"""Every architecture of keras.applications that contains BN: recalibrated, folded and exported.

Random kernels, and crops of two photographs, 64 to 96 pixels wide, in the range that each network takes. Scales are
drawn around 1, those that end a branch smaller: of the settings tried the one with least noise, for networks as
initialized multiply rounding with their depth, so that float32 itself is off by 1e-4. How far each network is off from
its own float64 is measured beside. Each runs in a process of its own;
``python keras_architectures.py NAME ...`` measures some, and prints a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

NAMES = (
    *(f"ResNet{depth}{version}" for depth in (50, 101, 152) for version in ("", "V2")),
    *("Xception", "InceptionV3", "InceptionResNetV2", "MobileNet", "MobileNetV2", "MobileNetV3Small"),
    *("MobileNetV3Large", "DenseNet121", "DenseNet169", "DenseNet201", "NASNetMobile", "NASNetLarge"),
    *(f"EfficientNetB{n}" for n in range(8)),
    *(f"EfficientNetV2{n}" for n in ("B0", "B1", "B2", "B3", "S", "M", "L")),
)
WIDER = {"InceptionV3": 96, "Xception": 96, "InceptionResNetV2": 96}  # pixels; 64 for the others
SAMPLES = 16
DRAWN = "scales drawn around 1, the setting with least noise"
FIGURES = {
    "residual": "residual",
    "invariance": "statistics at micro-batch 16 against 4",
    "fold": "scale-relative error of the fold",
    "export": "scale-relative error of the exported file",
}
COLUMNS = (*FIGURES, "own statistics", "own outputs")
OWN = {"invariance": "statistics", "fold": "outputs", "export": "outputs"}


def rows() -> Iterator[Any]:
    """One row for each figure over all networks, and one for each network."""
    with ThreadPoolExecutor(2) as pool:  # nothing is timed
        found = dict(zip(NAMES, pool.map(_in_a_process, NAMES), strict=True))
    yield from table(found)


def table(found: dict[str, dict[str, Any]]) -> Iterator[Any]:
    """The rows of what was measured, by architecture."""
    from measure import Row, at_most

    for figure, what in FIGURES.items():
        worst = max(found, key=lambda name: found[name][figure])
        own = found[worst]["own " + OWN[figure]] if figure in OWN else None
        beside = "" if own is None else f", whose own distance from float64 is {own:.1e}"
        head = f"Keras, {len(found)} architectures, {DRAWN}"
        yield at_most(f"{head}: {what} (worst: {worst}{beside})", found[worst][figure], 1e-5)
    for name, one in found.items():
        figures = {key: f"{one[key]:.1e}" for key in COLUMNS}
        folded = f"{one['folded']} of {one['folded'] + one['kept']}"
        yield Row(f"Keras, {name}", "", "", True, {"folded": folded, **figures, "kept because": one["reasons"]})


def read(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured, by architecture, from the rows that ``table`` gave."""
    found = {}
    for row in rows:
        if cells := row["cells"]:
            name, (folded, total) = row["what"].removeprefix("Keras, "), map(int, cells["folded"].split(" of "))
            counts = {"folded": folded, "kept": total - folded, "reasons": cells["kept because"]}
            found[name] = {key: float(cells[key]) for key in COLUMNS} | counts
    return found


def _in_a_process(name: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _measure(name: str) -> dict[str, Any]:
    import keras

    import bntools
    from bntools.backends.keras import feeding
    from bntools.layer import distance

    feeding.TOGETHER = 1  # so that batches of 4 are not joined to the 16 that they are compared with

    size = WIDER.get(name, 64)
    model = _network(name, size)
    images = _photographs(size, bytes_=any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers))
    residual = bntools.recalibrate(model, [images]).residual
    whole = bntools.inspect(model)
    own = _own_rounding(model, name, size, images)
    again = bntools.recalibrate(model, [images[i : i + 4] for i in range(0, SAMPLES, 4)])
    parts = {layer.name: layer.stats for layer in bntools.inspect(model)}
    folded = bntools.fold(model, images[:2])
    with tempfile.TemporaryDirectory() as folder:
        check = bntools.export(model, Path(folder) / "model.onnx", images[:2])
    return {
        "name": name,
        "residual": max(residual, again.residual),
        "invariance": max(distance(layer.stats, parts[layer.name], layer.eps) for layer in whole),
        "fold": folded.check.error,
        "export": check.error,
        **own,
        "folded": len(folded.folded),
        "kept": len(folded.kept),
        "reasons": "; ".join(sorted({reason.split(" '")[0] for reason in folded.kept.values()})),
        "keras": keras.__version__,
    }


def _network(name: str, size: int) -> Any:
    """Random kernels; scales from 0.5 to 1.5, of the last BN of a residual branch from 0.1 to 0.5; shifts around 1."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), include_top=False, pooling="avg"
    )
    draw, ends = np.random.default_rng(0), _branch_ends(model)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            if layer.scale:
                low, high = (0.1, 0.5) if layer.name in ends else (0.5, 1.5)
                layer.gamma.assign(draw.uniform(low, high, layer.gamma.shape))
            layer.beta.assign(draw.normal(1, 0.1, layer.beta.shape))
        elif layer.name in ends and isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(0.3 * layer.kernel)
    return model


def _branch_ends(model: Any) -> set[str]:
    """The layers with weights that give the longest of the branches of each sum: those that are no shortcuts."""
    import keras

    behind: dict[str, int] = {}  # by layer, how many there are on the longest way to it
    ends: set[str] = set()
    for layer in sorted(model.operations, key=lambda one: -_depth(model, one)):
        before = _before(layer)
        behind[layer.name] = 1 + max((behind[one.name] for one in before), default=0)
        if isinstance(layer, keras.layers.Add):
            last = max(before, key=lambda one: behind[one.name])
            while isinstance(last, keras.layers.Dropout):
                (last,) = _before(last)
            ends.add(last.name)
    return ends


def _depth(model: Any, operation: Any) -> int:
    """How far an operation is from the output: 0 for the one that gives it."""
    nodes = {id(node) for node in operation._inbound_nodes}
    return max(depth for depth, found in model._nodes_by_depth.items() if nodes & {id(node) for node in found})


def _before(operation: Any) -> list[Any]:
    return [tensor._keras_history.operation for node in operation._inbound_nodes[:1] for tensor in node.input_tensors]


def _own_rounding(model: Any, name: str, size: int, images: Any) -> dict[str, float]:
    """How far the network in float32 is from itself in float64: its statistics, and the outputs with the same ones."""
    import keras
    import numpy as np

    import bntools
    from bntools.layer import distance

    keras.config.set_dtype_policy("float64")
    wide = _network(name, size)
    keras.config.set_dtype_policy("float32")
    wide.set_weights(model.get_weights())
    images = images.astype(np.float64)
    found, right = (keras.ops.convert_to_numpy(one(images[:2], training=False)) for one in (model, wide))
    bntools.recalibrate(wide, [images], check=False)
    pairs = zip(bntools.inspect(wide), bntools.inspect(model), strict=True)  # names of the second model count on
    return {
        "own statistics": max(distance(exact.stats, own.stats, own.eps) for exact, own in pairs),
        "own outputs": float(np.abs(found - right).max() / np.abs(right).max()),
    }


def _photographs(size: int, bytes_: bool) -> Any:
    """Crops with values from -1 to 1, or, for a network that rescales them itself, from 0 to 255."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    photographs = [image.astype(np.float32) for image in load_sample_images().images]
    photographs = photographs if bytes_ else [image / 127.5 - 1 for image in photographs]
    draw = np.random.default_rng(0).integers
    corners = [(i % 2, draw(427 - 2 * size), draw(640 - 2 * size)) for i in range(SAMPLES)]
    return np.stack([photographs[i][y : y + 2 * size : 2, x : x + 2 * size : 2] for i, y, x in corners])


if __name__ == "__main__":
    for architecture in sys.argv[1:]:
        print(json.dumps(_measure(architecture)), flush=True)
