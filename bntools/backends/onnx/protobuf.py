"""Reading .onnx files: what can be wrong with one, and where its weights may lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError

from bntools.errors import BntoolsError
from bntools.noise import brief

Source = str | Path | onnx.ModelProto


def read(path: str | Path) -> onnx.ModelProto:
    """The model in a file, without its external weights, whose places are checked.

    Raises BntoolsError for a file that is missing, unreadable, no ONNX model, or whose external
    weights are missing or lie outside the file's folder.
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise BntoolsError(f"{path}: not an ONNX model, or a truncated one: {error}") from error
    if not model.HasField("graph") or not model.ir_version:
        raise BntoolsError(f"{path}: not an ONNX model: it holds no graph. Was the file written to its end?")
    check_external(model, path)
    return model


def serialized(model: onnx.ModelProto) -> bytes:
    """The model as bytes that can run without its file."""
    if any(True for _ in external_locations(model)):
        raise BntoolsError(
            "the weights of this onnx.ModelProto lie in external files and are not loaded: "
            "pass the path of the .onnx file, or load it with onnx.load(path)"
        )
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise BntoolsError(
            "this onnx.ModelProto is larger than the 2 GB that protobuf can hold: save it with external data "
            "(onnx.save(model, path, save_as_external_data=True)) and pass the path"
        ) from error


def check(path: Path) -> None:
    """Raise BntoolsError where the checker of ONNX finds fault with a file."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise BntoolsError(f"the ONNX checker refuses {path.name}: {brief(error)}") from error


def check_external(model: onnx.ModelProto, path: Path) -> None:
    """Refuse external weights that are missing or lie outside the folder of the model."""
    folder = path.resolve().parent
    for tensor, location in external_locations(model):
        target = (folder / location).resolve()
        if not location or not target.is_relative_to(folder):
            raise BntoolsError(
                f"{path}: the weights of {tensor!r} are said to lie in {location!r}, outside its folder: refused"
            )
        if not target.is_file():
            raise BntoolsError(f"{path}: the weights of {tensor!r} lie in {location!r}, which is not there")


def external_locations(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Every tensor whose values lie in another file, with the place that the model names for it."""
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor.name, next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def external_files(path: Path) -> set[str]:
    """The files, by their place beside it, in which the weights of a model file lie; none if it cannot be read."""
    try:
        return {location for _, location in external_locations(read(path))}
    except BntoolsError:
        return set()


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    yield from _sparse(model.graph)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _node_tensors(nodes)


def _node_tensors(nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graph.initializer
                yield from _sparse(graph)
                yield from _node_tensors(graph.node)


def _sparse(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
