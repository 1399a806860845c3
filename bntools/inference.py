"""The verb to_inference: a model file that was exported in training mode, brought into inference form."""

from __future__ import annotations

from typing import Any

from bntools import backends
from bntools.errors import BntoolsError


def to_inference(model: Any) -> list[str]:
    """Bring an ONNX model that was exported in training mode into inference form, in place.

    BatchNormalization then normalizes with its stored statistics and Dropout passes everything on;
    outputs that only training has go. A path is rewritten in one step. The other verbs refuse such a model.

    Returns the names of the nodes that were changed; an empty list for a model in inference form. Raises
    BntoolsError, changing nothing, where another node or an output of the model reads what only training
    computes, and for a model that has a mode of its own: ``model.eval()`` is PyTorch's way.

        bntools.to_inference("model.onnx")
    """
    backend = backends.of(model)
    if not hasattr(backend, "to_inference"):
        raise BntoolsError(
            f"a {type(model).__name__} has a mode of its own, which bntools sets and puts back itself: there is "
            f"nothing to convert. to_inference is for ONNX files that were exported in training mode"
        )
    names: list[str] = backend.to_inference(model)
    return names
