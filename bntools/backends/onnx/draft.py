"""A model in the making: a document's graph, of whose weights only those are copied that stay."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx

from bntools.backends.onnx.document import (
    FIRST_IR_WITH_CONSTANT_INITIALIZERS,
    Document,
    all_nodes,
    unused,
    uses,
)
from bntools.backends.onnx.editing import commit
from bntools.backends.onnx.protobuf import (
    DATA,
    copied_without_initializers,
    copy_fields,
    is_external,
    tensors,
)
from bntools.backends.onnx.weightfile import WeightFile, raw

PLACE = ("external_data", "data_location")


class Draft:
    """A copy of a document without its weights, which takes new ones; the document itself stays as it is.

    ``finish`` makes it a document again. External weights get a file of their own in a temporary folder, tensor by
    tensor, so that a model beyond what memory holds twice can be rewritten.
    """

    def __init__(self, document: Document):
        self.source = document = _settled(document)
        self.proto = copied_without_initializers(document.proto)
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.reindex()
        self.uses = uses(self.proto.graph)
        self._taken = {one for node in all_nodes(self.proto.graph) for one in (*node.input, *node.output)}
        self._taken |= document.initializers.keys() | document.inputs | document.outputs
        self._new: dict[str, onnx.TensorProto] = {}
        self._parted: dict[str, dict[str, str]] = {}  # by name, the new tensors by what they hold
        self._file = WeightFile(document) if any(map(is_external, tensors(document.proto))) else None

    def reindex(self) -> None:
        """Know the nodes by their first outputs, as these are now."""
        self.nodes = {node.output[0]: node for node in self.proto.graph.node if node.output}

    def read(self, node: onnx.NodeProto, place: int) -> np.ndarray | None:
        """The constant that a node reads at one place, None where it reads nothing."""
        name = node.input[place] if len(node.input) > place else ""
        return self.source.constant(name) if name else None

    def put(self, node: onnx.NodeProto, place: int, values: np.ndarray, wanted: str = "") -> None:
        """Let a node read these values at one place: in the tensor that it alone reads, else in one of its own.

        ``wanted`` is what a tensor is called that is not there yet.
        """
        old = node.input[place] if len(node.input) > place else ""
        parted = self._parted.setdefault(old, {})
        shared = bool(old) and (bool(parted) or self.uses[old] > 1)
        digest = hashlib.blake2b(raw(values)).hexdigest() if shared else ""
        name = parted.get(digest) if shared else None
        if name is None and old in self.source.initializers and self.uses[old] == 1:
            self._fill(old, values, self.source.initializers[old])
            return
        if name is None:
            name = self.unused_name(f"{old}_folded" if old else wanted)
            self._fill(name, values, self.source.initializers.get(old))
            if shared:
                parted[digest] = name
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = name
        self.uses[old] -= 1
        self.uses[name] += 1

    def unused_name(self, wanted: str) -> str:
        """A name that nothing in the model has, taken from now on."""
        name = unused(wanted, self._taken)
        self._taken.add(name)
        return name

    def finish(self) -> Document:
        """The document: weights that nothing reads any more, and what made them, are gone."""
        graph = self.proto.graph
        _drop_dead_nodes(graph, self.source.constants)
        used = uses(graph)
        old = self.source.initializers
        stay = {name for name in old if used[name] or self.source.overridable(name)}
        for name, tensor in old.items():
            if name in stay:
                graph.initializer.add().CopyFrom(self._new.pop(name, tensor))
        added = list(self._new)
        for name in added:
            graph.initializer.add().CopyFrom(self._new.pop(name))
        self._declare(added, old.keys() - stay)
        if self._file is not None:
            self._file.take_over(self.proto)
        result = Document(self.proto, name=self.source.name)
        if self._file is not None:
            result.folder, result.keep = self._file.close()
        return result

    def _fill(self, name: str, values: np.ndarray, like: onnx.TensorProto | None) -> None:
        tensor = onnx.TensorProto()
        if like is not None:
            copy_fields(like, tensor, (*DATA, *PLACE))
        tensor.name = name
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor.dims[:] = values.shape
        if self._file is None or not self._file.write(tensor, values):
            tensor.raw_data = values.tobytes()
        self._new[name] = tensor

    def _declare(self, added: Collection[str], gone: Collection[str]) -> None:
        """Types stated of values that are gone or have another shape go; old files list weights as inputs."""
        graph = self.proto.graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        other = {n for n, old in self.source.initializers.items() if shapes.get(n, ()) != tuple(old.dims)} | {*gone}
        defined = {output for node in graph.node for output in node.output} | shapes.keys() | self.source.inputs
        _filter(graph.value_info, lambda one: one.name in defined and one.name not in other)
        _filter(graph.quantization_annotation, lambda one: one.tensor_name in defined | self.source.outputs)
        if self.proto.ir_version < FIRST_IR_WITH_CONSTANT_INITIALIZERS:
            _filter(graph.input, lambda one: one.name not in other)
            for tensor in graph.initializer:
                if tensor.name in other or tensor.name in added:
                    value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                    graph.input.append(value)


def _settled(document: Document) -> Document:
    """The document itself, or a copy in which statistics that were not yet stored are."""
    if not document.stats:
        return document
    copy = onnx.ModelProto()
    copy.CopyFrom(document.proto)
    settled = Document(copy, document.folder, name=document.name)
    settled.stats = dict(document.stats)
    commit(settled)
    return settled


def _drop_dead_nodes(graph: onnx.GraphProto, constants: Collection[str]) -> None:
    """Remove the nodes that only made constants which nothing reads any more."""
    counts = uses(graph)
    dead: set[int] = set()
    while True:
        found = [
            i
            for i, node in enumerate(graph.node)
            if i not in dead and node.output and all(one in constants and not counts[one] for one in node.output)
        ]
        if not found:
            break
        dead.update(found)
        counts.subtract(name for i in found for name in graph.node[i].input if name)
    for i in sorted(dead, reverse=True):
        del graph.node[i]


def _filter(field: Any, keep: Any) -> None:
    for i in reversed(range(len(field))):
        if not keep(field[i]):
            del field[i]
