"""Every architecture of keras.applications that contains BN: recalibrated, folded and exported.

Random weights, whose activations multiply rounding as trained ones do not, and crops of two photographs, 64 to 96
pixels wide. Each network runs in a process of its own; ``python keras_architectures.py NAME`` measures one.
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


def rows() -> Iterator[Any]:
    """One row for each figure over all networks, and one for each network."""
    from measure import Row, at_most

    with ThreadPoolExecutor(2) as pool:  # nothing is timed
        found = dict(zip(NAMES, pool.map(_in_a_process, NAMES), strict=True))
    for figure, what in (("residual", "residual"), ("invariance", "statistics at micro-batch 16 against 4")):
        worst = max(found, key=lambda name: found[name][figure])
        yield at_most(f"Keras, {len(NAMES)} architectures, {what} (worst: {worst})", found[worst][figure], 1e-5)
    for figure, what in (("fold", "scale-relative error of the fold"), ("export", "of the exported file")):
        worst = max(found, key=lambda name: found[name][figure])
        yield at_most(f"Keras, {len(NAMES)} architectures, {what} (worst: {worst})", found[worst][figure], 1e-5)
    for name, one in found.items():
        kept = f"; kept {one['kept']}: {one['reasons']}" if one["kept"] else ""
        figures = ", ".join(f"{key} {one[key]:.1e}" for key in ("residual", "invariance", "fold", "export"))
        yield Row(f"Keras, {name}: folded {one['folded']} of {one['folded'] + one['kept']}{kept}", figures, "", True)


def _in_a_process(name: str) -> dict[str, Any]:
    ran = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _measure(name: str) -> dict[str, Any]:
    import keras

    import bntools
    from bntools.backends.keras import feeding
    from bntools.layer import distance

    feeding.TOGETHER = 1  # so that batches of 4 are not joined to the 16 that they are compared with

    keras.utils.set_random_seed(0)
    size = WIDER.get(name, 64)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), include_top=False, pooling="avg"
    )
    images = _photographs(size)
    residual = bntools.recalibrate(model, [images]).residual
    whole = {layer.name: layer for layer in bntools.inspect(model)}
    again = bntools.recalibrate(model, [images[i : i + 4] for i in range(0, SAMPLES, 4)])
    folded = bntools.fold(model, images[:2])
    with tempfile.TemporaryDirectory() as folder:
        check = bntools.export(model, Path(folder) / "model.onnx", images[:2])
    return {
        "residual": max(residual, again.residual),
        "invariance": max(distance(whole[n.name].stats, n.stats, n.eps) for n in bntools.inspect(model)),
        "folded": len(folded.folded),
        "kept": len(folded.kept),
        "reasons": "; ".join(sorted({reason.split(" '")[0] for reason in folded.kept.values()})),
        "fold": folded.check.error,
        "export": check.error,
    }


def _photographs(size: int) -> Any:
    import numpy as np
    from sklearn.datasets import load_sample_images

    photographs = [image.astype(np.float32) / 127.5 - 1 for image in load_sample_images().images]
    draw = np.random.default_rng(0).integers
    corners = [(i % 2, draw(427 - 2 * size), draw(640 - 2 * size)) for i in range(SAMPLES)]
    return np.stack([photographs[i][y : y + 2 * size : 2, x : x + 2 * size : 2] for i, y, x in corners])


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
