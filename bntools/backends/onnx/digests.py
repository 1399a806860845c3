"""A digest of the weights of an ONNX graph that lie outside of BN statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bntools.backends.onnx.document import CONSTANTS, Document, all_nodes, opened
from bntools.backends.onnx.layers import MEAN, VAR, found
from bntools.digests import combined


def digest(model: Any) -> str:
    """A digest of every initializer and Constant that a node reads, but for BN layers' mean and variance."""
    return combined(_weights(opened(model)))


def _weights(document: Document) -> Iterator[tuple[str, tuple[int, ...], bytes]]:
    norms = {id(one.node) for one in found(document)}
    read: set[str] = set()
    for node in all_nodes(document.proto.graph):
        skipped = (MEAN, VAR) if id(node) in norms else ()
        read.update(name for place, name in enumerate(node.input) if place not in skipped)
    for name in sorted(read):
        array = _array(document, name)
        if array is not None and array.dtype != object:
            yield str(array.dtype), array.shape, array.tobytes()


def _array(document: Document, name: str) -> np.ndarray | None:
    """A weight as the file holds it; what is computed of weights adds nothing."""
    if name in document.initializers:
        return document.array(document.initializers[name])
    node = document.producers.get(name)
    if node is None or node.op_type != "Constant" or not any(one.name in CONSTANTS for one in node.attribute):
        return None
    return document.constant(name)
