"""Reading .onnx files: what can be wrong with one, and where its weights may lie."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message

from bntools.errors import BntoolsError
from bntools.noise import brief

# The fields of a tensor in which its values lie.
DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
NOT_LOADED = (
    "the weights of this onnx.ModelProto lie in external files and are not loaded: "
    "pass the path of the .onnx file, or load it with onnx.load(path)"
)


def read(path: str | Path) -> onnx.ModelProto:
    """The model in a file, without its external weights, whose places are checked.

    Raises BntoolsError for a file that is missing, unreadable, no ONNX model, or whose external
    weights are missing or lie outside the file's folder.
    """
    path = Path(path)
    try:
        model = _parsed(path)
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DecodeError as error:
        raise BntoolsError(f"{path}: not an ONNX model, or a truncated one: {error}") from error
    if not model.HasField("graph") or not model.ir_version:
        raise BntoolsError(f"{path}: not an ONNX model: it holds no graph. Was the file written to its end?")
    if not all(isinstance(text, str) for text in _texts(model)):
        raise BntoolsError(f"{path}: a damaged ONNX model: a name in its graph is no text")
    check_external(model, path)
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    """The message in a file, parsed where the system maps it: reading it first would take its size once more."""
    model = onnx.ModelProto()
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                model.ParseFromString(view)
    return model


def serialized(model: onnx.ModelProto) -> bytes:
    """The model as bytes that can run without its file."""
    if any(True for _ in external_locations(model)):
        raise BntoolsError(NOT_LOADED)
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
    """Refuse external weights that are missing, lie outside the folder of the model, or do not fit their file."""
    folder = path.resolve().parent
    known: set[str] = set()
    for tensor in tensors(model):
        if is_external(tensor) and (name := location_of(tensor)) not in known:
            _within(folder, name, tensor.name, str(path))
            known.add(name)


@dataclass(frozen=True)
class Place:
    """Where the values of an external tensor lie: ``length`` bytes of a file from ``offset`` on."""

    path: Path
    offset: int
    length: int


def place_of(tensor: onnx.TensorProto, folder: Path | None, name: str) -> Place:
    """Where the values of an external tensor lie.

    ``folder`` is that of the model, ``name`` what messages call it. Raises BntoolsError where the file is missing or
    lies outside the folder, ValueError where the values do not fit into it or their number contradicts the shape.
    """
    if folder is None:
        raise BntoolsError(NOT_LOADED)
    path = _within(folder, location_of(tensor), tensor.name, name)
    entries: dict[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    offset, size = int(entries.get("offset") or 0), path.stat().st_size
    wanted = byte_count(tensor)
    length = int(entries.get("length") or (size - offset if wanted is None else wanted))
    if wanted is not None and length != wanted:
        raise ValueError(f"its shape {tuple(tensor.dims)} takes {wanted:,} bytes, and {length:,} are said to be there")
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"{path.name} holds {size:,} bytes, and the {length:,} from {offset:,} on are asked for")
    return Place(path, offset, length)


def byte_count(tensor: onnx.TensorProto) -> int | None:
    """How many bytes the values of a tensor of this shape take; None for types that share bytes or have no size.

    Raises ValueError for a shape that no array has.
    """
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"its shape {tuple(tensor.dims)} has a negative size")
    kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    if kind == "string" or kind.endswith(("int4", "int2")) or kind.startswith(("float4", "float6")):
        return None
    return math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _within(folder: Path, location: str, tensor: str, name: str) -> Path:
    try:
        path = (folder / location).resolve()
        inside, there = bool(location) and path.is_relative_to(folder), path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        inside, there = True, False
    if not inside:
        raise BntoolsError(
            f"{name}: the weights of {tensor!r} are said to lie in {location!r}, outside its folder: refused"
        )
    if not there:
        raise BntoolsError(f"{name}: the weights of {tensor!r} lie in {location!r}, which is not there")
    return path


def about_bytes(tensor: onnx.TensorProto) -> int:
    """How many bytes the values of a tensor take, wherever they lie, about: types that share bytes count whole ones."""
    try:
        return math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:  # a type that this version of onnx does not know
        return math.prod(tensor.dims) * 8


def copy_fields(source: Message, target: Message, without: Collection[str]) -> None:
    """Copy a message but for some of its fields: what is large, and is not to be held twice."""
    for field, value in source.ListFields():
        if field.name in without:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def copied_without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all that is in a model but the weights of its main graph."""
    new = onnx.ModelProto()
    copy_fields(model, new, ("graph",))
    copy_fields(model.graph, new.graph, ("initializer",))
    return new


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values of a tensor lie in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def location_of(tensor: onnx.TensorProto) -> str:
    """The file that a tensor names for its values, as the model writes it."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def external_locations(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Every tensor whose values lie in another file, with the place that the model names for it."""
    return ((one.name, location_of(one)) for one in tensors(model) if is_external(one))


def external_files(path: Path) -> set[str]:
    """The files, by their place beside it, in which the weights of a model file lie; none if it cannot be read."""
    try:
        return {location for _, location in external_locations(read(path))}
    except BntoolsError:
        return set()


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: initializers, also sparse ones and those of subgraphs, and attributes."""
    yield from model.graph.initializer
    yield from _sparse(model.graph)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _node_tensors(nodes)


def _texts(model: onnx.ModelProto) -> Iterator[str]:
    """Names in a model. Those that are no UTF-8 come as bytes, which protobuf does not mind."""
    for entry in model.opset_import:
        yield entry.domain
    for props in model.metadata_props:
        yield from (props.key, props.value)
    for tensor in tensors(model):
        yield tensor.name
        for pair in tensor.external_data:
            yield from (pair.key, pair.value)
    yield from _texts_of(model.graph)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        yield from (text for node in function.node for text in _texts_of_node(node))


def _texts_of(graph: onnx.GraphProto) -> Iterator[str]:
    yield graph.name
    yield from (value.name for values in (graph.input, graph.output, graph.value_info) for value in values)
    yield from (dim.dim_param for value in (*graph.input, *graph.output) for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from _texts_of_node(node)


def _texts_of_node(node: onnx.NodeProto) -> Iterator[str]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (text for entry in node.metadata_props for text in (entry.key, entry.value))
    for attribute in node.attribute:
        yield attribute.name
        for graph in _graphs(attribute):
            yield from _texts_of(graph)


def _node_tensors(nodes: list[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in _graphs(attribute):
                yield from graph.initializer
                yield from _sparse(graph)
                yield from _node_tensors(graph.node)


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """The graphs that an attribute holds, whatever type it claims to have: nothing in a file is to be overlooked."""
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _sparse(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
