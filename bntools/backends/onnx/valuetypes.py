"""The element type of every value of the main graph, as far as the operators' definitions tell."""

from __future__ import annotations

import onnx

from bntools.backends.onnx.document import STANDARD, Document

FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def value_types(document: Document) -> dict[str, int | None]:
    """The TensorProto.DataType of each value by name; None for what is no tensor, no entry where unknown."""
    graph = document.proto.graph
    types: dict[str, int | None] = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {node.output[0]: kind for node in graph.node if (kind := _of_constant(node)) is not None}
    outline = _outline(document, {name: kind for name, kind in types.items() if kind})
    try:
        inferred = onnx.shape_inference.infer_shapes(outline).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, onnx.checker.ValidationError):
        inferred = outline.graph  # what the model itself declares
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.WhichOneof("value")
        if kind == "tensor_type" and value.type.tensor_type.elem_type:
            types[value.name] = value.type.tensor_type.elem_type
        elif kind is not None and kind != "tensor_type":
            types[value.name] = None
    return types


def _outline(document: Document, constants: dict[str, int]) -> onnx.ModelProto:
    """The model without its weights, which become inputs of a known type: small whatever the model's size."""
    proto, outline = document.proto, onnx.ModelProto(ir_version=document.proto.ir_version)
    outline.opset_import.extend(proto.opset_import)
    outline.functions.extend(proto.functions)
    outline.graph.name = proto.graph.name or "graph"
    outline.graph.node.extend(node for node in proto.graph.node if node.output[:1] != [] and not _is_known(node))
    outline.graph.input.extend(proto.graph.input)
    outline.graph.output.extend(proto.graph.output)
    outline.graph.value_info.extend(proto.graph.value_info)
    given = {value.name for value in proto.graph.input}
    for name, kind in constants.items():
        if name not in given:
            outline.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return outline


def _is_known(node: onnx.NodeProto) -> bool:
    return _of_constant(node) is not None


def _of_constant(node: onnx.NodeProto) -> int | None:
    if node.op_type != "Constant" or node.domain not in STANDARD:
        return None
    for one in node.attribute:
        if one.name == "value":
            return one.t.data_type
        if one.name in ("value_float", "value_floats"):
            return onnx.TensorProto.FLOAT
        if one.name in ("value_int", "value_ints"):
            return onnx.TensorProto.INT64
    return None
