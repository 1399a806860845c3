"""Document: an ONNX model in hand, and the constants in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bntools.backends.onnx.protobuf import byte_count, is_external, place_of, read
from bntools.errors import BntoolsError
from bntools.layer import Stats

STANDARD = ("", "ai.onnx")
# What makes constants of constants, and is computed where its value is asked for.
_PURE = """Abs Add Cast CastLike Ceil Concat ConstantOfShape Div Exp Expand Flatten Floor Gather Identity Max Min Mul
    Neg Pow Range Reciprocal ReduceProd Reshape Shape Size Slice Sqrt Squeeze Sub Tile Transpose Unsqueeze"""
PURE = frozenset(_PURE.split())
CONSTANTS = ("value", "value_float", "value_int", "value_floats", "value_ints")  # attributes of Constant, tensors
MOST = 1 << 22  # values; no exporter leaves a larger constant to be made from smaller ones
FIRST_IR_WITH_CONSTANT_INITIALIZERS = 4  # before, every initializer had to be listed as an input of the graph as well


class Document:
    """A protobuf message, the folder in which its external weights lie, and statistics not yet written into it.

    Verbs work on a Document. ``stats`` holds what they want to store, by layer; ``editing.commit`` carries
    it into the message and from there into ``source``, which is what the user gave: a ModelProto (then
    ``proto`` is that very message), an onnx_ir.Model or a path. Until then nothing of the user's has changed.
    """

    def __init__(self, proto: onnx.ModelProto, folder: Path | None = None, source: Any = None, name: str = ""):
        self.proto = proto
        self.folder = folder
        self.source = source
        self.name = name or (f"the ONNX model {proto.graph.name!r}" if proto.graph.name else "the ONNX model")
        self.stats: dict[str, Stats] = {}
        self.originals: dict[str, Any] = {}  # what layers read before, for putting it back
        self.keep: Any = None  # what has to live as long as the document: a temporary folder of its weights
        self.refresh()

    def refresh(self) -> None:
        """Index the message anew, after it was changed."""
        graph = self.proto.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output if output}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self._constants: set[str] | None = None
        self.layers: list[Any] | None = None  # what layers.found has found

    @property
    def external(self) -> bool:
        """Whether weights of the model lie in other files."""
        return any(map(is_external, self.proto.graph.initializer))

    @property
    def opset(self) -> int:
        """The version of the standard operators that the model uses."""
        return max((one.version for one in self.proto.opset_import if one.domain in STANDARD), default=1)

    def overridable(self, name: str) -> bool:
        """Whether an initializer is only the default of an input, which callers may replace."""
        return name in self.inputs and self.proto.ir_version >= FIRST_IR_WITH_CONSTANT_INITIALIZERS

    @property
    def constants(self) -> set[str]:
        """The values of the main graph that are the same in every run, told without reading any weight."""
        if self._constants is None:
            known = {name for name in self.initializers if not self.overridable(name)}
            for node in self.proto.graph.node:
                if _makes_constants(node, known):
                    known.update(node.output)
            self._constants = known
        return self._constants

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant of the main graph; None for what is an input or computed from one."""
        try:
            return self._constant(name, {}) if name in self.constants else None
        except BntoolsError:
            raise
        except Exception as error:  # the reference implementation runs what a file says, and may raise anything
            raise BntoolsError(
                f"{self.name}: the constant {name!r} cannot be computed: {type(error).__name__}: {error}"
            ) from error

    def _constant(self, name: str, known: dict[str, np.ndarray]) -> np.ndarray:
        if name not in known:
            tensor = self.initializers.get(name)
            known[name] = self._computed(self.producers[name], known) if tensor is None else self.array(tensor)
        return known[name]

    def _computed(self, node: onnx.NodeProto, known: dict[str, np.ndarray]) -> np.ndarray:
        if node.op_type == "Constant":
            return self._of_constant(node)
        if node.op_type == "CastLike":
            return self._cast_like(node, known)
        if node.op_type in ("Shape", "Size") and node.input[0] in self.initializers:
            # As large as the weight, of which nothing is read.
            dims = tuple(self.initializers[node.input[0]].dims)
            return self._evaluated(node, {node.input[0]: np.broadcast_to(np.float32(0), dims)})
        return self._evaluated(node, {one: self._constant(one, known) for one in node.input if one})

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """The values of a tensor, wherever they lie. Raises BntoolsError where they cannot be read."""
        try:
            if not is_external(tensor):
                byte_count(tensor)  # refuses shapes that numpy would interpret
                return numpy_helper.to_array(tensor)
            return self._external(tensor)
        except (ValueError, TypeError, OSError, KeyError) as error:
            raise BntoolsError(f"{self.name}: the values of {tensor.name!r} cannot be read: {error}") from error

    def _external(self, tensor: onnx.TensorProto) -> np.ndarray:
        place = place_of(tensor, self.folder, self.name)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        values = np.fromfile(place.path, dtype, place.length // dtype.itemsize, offset=place.offset)
        return values.reshape(tuple(tensor.dims))

    def _of_constant(self, node: onnx.NodeProto) -> np.ndarray:
        attribute = next(one for one in node.attribute if one.name in CONSTANTS)
        if attribute.name == "value":
            return self.array(attribute.t)
        value = onnx.helper.get_attribute_value(attribute)
        return np.asarray(value, np.float32 if "float" in attribute.name else np.int64)

    def _cast_like(self, node: onnx.NodeProto, known: dict[str, np.ndarray]) -> np.ndarray:
        from bntools.backends.onnx.valuetypes import value_types  # here: it describes documents

        value, kind = self._constant(node.input[0], known), value_types(self).get(node.input[1])
        if kind is None:
            raise BntoolsError(f"{self.name}: the type of {node.input[1]!r} is unknown, and {node.output[0]!r} has it")
        return value.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def _evaluated(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
        from onnx.reference import ReferenceEvaluator  # here: slow to import, rarely needed

        size = _size(node, values)
        if size > max(MOST, *(array.size for array in values.values())):
            raise ValueError(f"{node.op_type} would make {size:,} values of it, and {MOST:,} are the most")
        inputs = [onnx.helper.make_empty_tensor_value_info(one) for one in values]
        outputs = [onnx.helper.make_empty_tensor_value_info(node.output[0])]
        graph = onnx.helper.make_graph([node], "constant", inputs, outputs)
        model = onnx.helper.make_model(graph, opset_imports=list(self.proto.opset_import))
        results: Any = ReferenceEvaluator(model).run(None, values)
        return np.asarray(results[0])

    def unused_name(self, wanted: str) -> str:
        """A name for a new value that nothing in the main graph has yet."""
        taken = {one for node in all_nodes(self.proto.graph) for one in (*node.input, *node.output)}
        taken |= self.initializers.keys() | self.inputs
        return unused(wanted, taken)


def unused(wanted: str, taken: Collection[str]) -> str:
    """The wanted name, with a number behind it where it is taken."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    return name


def opened(model: Any) -> Document:
    """The document of a model in any of its forms, for reading.

    A ModelProto is used as it is, an onnx_ir.Model is converted, a path is read without its external weights.
    """
    if isinstance(model, Document):
        return model
    if isinstance(model, onnx.ModelProto):
        return Document(model, source=model)
    if isinstance(model, (str, Path)):
        path = Path(model)
        return Document(read(path), path.resolve().parent, source=path, name=str(path))
    return _of_ir(model)


def _size(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> int:
    """How many values one of PURE would give at the most: a few bytes of a hostile file can ask for all of memory."""
    arrays = [values[name] for name in node.input if name]
    first = arrays[0]
    match node.op_type:
        case "ConstantOfShape":
            return math.prod(first.tolist())
        case "Expand":
            return math.prod(np.broadcast_shapes(first.shape, tuple(arrays[1].tolist())))
        case "Tile":
            return int(first.size * math.prod(arrays[1].tolist()))
        case "Range":
            start, stop, step = (array.item() for array in arrays)
            return max(0, math.ceil((stop - start) / step))
        case "Concat":
            return sum(array.size for array in arrays)
        case "Gather":
            axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
            return arrays[1].size * first.size // max(1, first.shape[axis])
        case "Add" | "Div" | "Max" | "Min" | "Mul" | "Pow" | "Sub":
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
    return first.size


def _makes_constants(node: onnx.NodeProto, known: set[str]) -> bool:
    """Whether what a node computes is constant where the values in ``known`` are."""
    if node.domain not in STANDARD:
        return False
    if node.op_type == "Constant":
        return any(one.name in CONSTANTS for one in node.attribute)
    read = [name for name in node.input if name]
    # Of its second input CastLike takes only the type.
    return node.op_type in PURE and bool(read) and known.issuperset(read[:1] if node.op_type == "CastLike" else read)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, or function, and of all graphs inside it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def uses(graph: onnx.GraphProto) -> Counter[str]:
    """How often each value is read, in the graphs inside it too; an output of the graph counts as read."""
    found = Counter(name for node in all_nodes(graph) for name in node.input if name)
    found.update(value.name for value in graph.output)
    for node in all_nodes(graph):
        for inner in subgraphs(node):
            found.update(value.name for value in inner.output)
    return found


def _of_ir(model: Any) -> Document:
    import onnx_ir as ir

    try:
        proto = ir.to_proto(model)
    except Exception as error:  # an ir.Model may hold anything; whatever cannot be written is the caller's to see
        raise BntoolsError(f"this onnx_ir.Model cannot be serialized: {error}") from error
    folders = {
        Path(value.const_value.base_dir).resolve()
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if len(folders) > 1:
        raise BntoolsError(
            f"the external weights of this onnx_ir.Model lie in {len(folders)} folders: save it first "
            f"(onnx_ir.save(model, path, external_data=...)) and load it again"
        )
    return Document(proto, next(iter(folders), None), source=model)
