"""A model meets a camera it was not trained for: recalibrate it on unlabelled images and ship it.

What ``bntools demo`` does with commands, as a script.
"""

import tempfile
from pathlib import Path

import numpy as np

import bntools
from bntools import backends
from bntools.backends.torch.digits import trained
from bntools.cli import digits


def accuracy(model: object, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (n, 1, 8, 8) that a model, or an ONNX file, reads right."""
    backend = backends.of_path(model) if isinstance(model, Path) else backends.of(model)
    (scores,) = backend.predict(model, images).values()
    return float((scores.argmax(axis=1) == labels).mean())


def main() -> None:
    """Print the accuracy on the other camera's held-out digits before, after, and in ONNX Runtime."""
    found = digits.load()
    model = trained(digits.inputs(digits.seen(found.ink)), found.labels)
    images = digits.inputs(digits.seen(found.ink, "contrast"))
    test = digits.inputs(digits.seen(found.held_out_ink, "contrast"))
    print(f"before          {accuracy(model, test, found.held_out_labels):6.1%}")

    result = bntools.recalibrate(model, np.array_split(images, 40))
    print(f"recalibrated    {accuracy(model, test, found.held_out_labels):6.1%}   residual {result.residual:.1e}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        check = bntools.export(model, path, images[:8])
        print(f"ONNX Runtime    {accuracy(path, test, found.held_out_labels):6.1%}   error {check.error:.1e}")


if __name__ == "__main__":
    main()
