"""From what the user gave to a Document, and back."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bntools.backends.onnx.document import Document, opened, uses
from bntools.backends.onnx.inference import check_inference
from bntools.backends.onnx.layers import MEAN, VAR, Found, found, stats_of
from bntools.errors import BntoolsError

SUFFIXES = {MEAN: "running_mean", VAR: "running_var"}


def edit(model: Any) -> Document:
    """The document on which a verb works that will change the model; ``commit`` carries the changes back.

    Raises BntoolsError for a model in training mode.
    """
    document = opened(model)
    check_inference(document)
    return document


def parts(model: Any) -> set[Hashable]:
    """What only one thread may work on at a time: what the user gave, or the file at that path."""
    source = model.source if isinstance(model, Document) else model
    return {os.path.realpath(source) if isinstance(source, (str, Path)) else id(model if source is None else source)}


def write(model: Document, stats: Mapping[str, tuple[np.ndarray, np.ndarray, int | None]]) -> None:
    """Remember new statistics of layers, to be stored by ``commit``. A file has no counter of updates.

    Raises BntoolsError where a value does not fit the dtype in which the model stores it.
    """
    dtypes = {one.name: _dtypes(model, one) for one in found(model) if one.name in stats}
    kept = {}
    for name, (mean, var, _) in stats.items():
        of_mean, of_var = dtypes[name]
        kept[name] = _as_stored(name, "mean", mean, of_mean), _as_stored(name, "variance", var, of_var)
    model.stats.update(kept)


def reset(model: Document, names: Iterable[str]) -> None:
    """Mean 0 and variance 1 for these layers, to be stored by ``commit``."""
    wanted = set(names)
    for one in found(model):
        if one.name in wanted:
            mean, var = stats_of(model, one)
            model.stats[one.name] = np.zeros_like(mean), np.ones_like(var)


def commit(model: Document) -> None:
    """Store the remembered statistics in the message and in what the user gave.

    Statistics that are as they were put everything back, bit by bit.
    """
    readers = uses(model.proto.graph)
    known = found(model)
    stored = [one for one in known if one.name in model.stats]
    for one in stored:
        _store(model, one, dict(zip((MEAN, VAR), model.stats[one.name], strict=True)), readers)
    model.stats.clear()
    model.refresh()
    model.layers = known  # a tensor of its own could give a layer another name than undo asks for
    if isinstance(model.source, Path):
        from bntools.backends.onnx.files import replace  # here: files.py imports what reads and writes everything

        replace(model)
    elif model.source is not None and model.source is not model.proto:
        _carry_to_ir(model, stored)


def handed(document: Document, like: Any) -> Any:
    """A new model in the form in which the old one was given: ModelProto, onnx_ir.Model, or as a file is loaded."""
    if isinstance(like, Document):
        return document
    if isinstance(like, onnx.ModelProto) or (isinstance(like, (str, Path)) and not document.external):
        return document.proto
    from bntools.backends.onnx.files import as_ir

    return as_ir(document)


def _store(document: Document, one: Found, values: dict[int, np.ndarray], readers: Counter[str]) -> None:
    originals = document.originals.setdefault(one.name, {place: _original(document, one, place) for place in values})
    before = {place: original.value.astype(np.float64) for place, original in originals.items()}
    same = all(np.array_equal(value, before[place], equal_nan=True) for place, value in values.items())
    for place, value in values.items():
        original = originals[place]
        if same:
            _put_back(document, one, place, original)
        else:
            _place(document, one, place, value.astype(original.value.dtype).reshape(original.value.shape), readers)


class _Original:
    """What a node read at one place before it was changed."""

    def __init__(self, name: str, tensor: onnx.TensorProto | None, value: np.ndarray):
        self.name = name
        self.value = value
        self.tensor = onnx.TensorProto()
        if tensor is not None:
            self.tensor.CopyFrom(tensor)


def _original(document: Document, one: Found, place: int) -> _Original:
    name = one.node.input[place]
    value = document.constant(name)
    assert value is not None
    return _Original(name, document.initializers.get(name), value)


def _place(document: Document, one: Found, place: int, value: np.ndarray, readers: Counter[str]) -> None:
    """Let a node read this value: in the tensor that it alone reads, else in one of its own."""
    name = one.node.input[place]
    tensor = document.initializers.get(name)
    if tensor is not None and readers[name] == 1:
        tensor.CopyFrom(numpy_helper.from_array(value, name))
        return
    own = document.unused_name(f"{one.name}.{SUFFIXES[place]}")
    document.proto.graph.initializer.append(numpy_helper.from_array(value, own))
    one.node.input[place] = own
    readers[name] -= 1
    readers[own] += 1
    document.refresh()


def _put_back(document: Document, one: Found, place: int, original: _Original) -> None:
    now = one.node.input[place]
    if now != original.name:
        document.proto.graph.initializer.remove(document.initializers[now])
        one.node.input[place] = original.name
        document.refresh()
    elif original.name in document.initializers:
        document.initializers[now].CopyFrom(original.tensor)


def _as_stored(name: str, what: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = value.astype(dtype).astype(np.float64)
    if (np.isfinite(value) & ~np.isfinite(rounded)).any():
        raise BntoolsError(f"layer {name!r}: a {what} of {np.abs(value).max():.3g} does not fit {dtype}")
    return rounded


def _dtypes(document: Document, one: Found) -> list[np.dtype]:
    values = [document.constant(one.node.input[place]) for place in (MEAN, VAR)]
    return [value.dtype for value in values if value is not None]


def _carry_to_ir(document: Document, stored: list[Found]) -> None:
    """Give the onnx_ir.Model what the message made of it holds now; its nodes are in the same order."""
    import onnx_ir as ir

    graph = document.source.graph
    nodes = {node.outputs[0].name: node for node in graph}
    for one in stored:
        for place in (MEAN, VAR):
            name = one.node.input[place]
            if name not in document.initializers:  # a Constant node again, after undo
                nodes[one.node.output[0]].replace_input_with(place, _value_of(graph, name))
                continue
            tensor = ir.tensor(document.array(document.initializers[name]), name=name)
            if name not in graph.initializers:
                graph.register_initializer(ir.val(name, const_value=tensor))
            graph.initializers[name].const_value = tensor
            nodes[one.node.output[0]].replace_input_with(place, graph.initializers[name])
    for name in [name for name in graph.initializers if name not in document.initializers]:
        if not graph.initializers[name].uses():
            del graph.initializers[name]


def _value_of(graph: Any, name: str) -> Any:
    return next(output for node in graph for output in node.outputs if output.name == name)
