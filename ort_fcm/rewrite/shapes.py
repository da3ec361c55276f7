"""Shapes and types of a model's tensors.

Two inferences: one with the symbols the model has, whose equal symbols prove equal sizes, and one with numbers for
every size of a graph input that is unknown, for planning. Weights play no part, so a model of any size is inferred.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ort_fcm.errors import FcmError

GUESSED_SIZE = 640  # pixels, where height or width is unknown: what detectors and text finders are fed
Size = int | str


@dataclass(frozen=True)
class Shapes:
    """Of each tensor: its element type, its dimensions (number or symbol), and those it is planned for (numbers)."""

    types: dict[str, int]
    symbolic: dict[str, tuple[Size, ...]]
    planned: dict[str, tuple[int, ...]]


def infer(model: onnx.ModelProto, batch: int | None) -> Shapes:
    """Infer, with `batch` (default 1) for an unknown first dimension. FcmError when a known batch differs from it."""
    skeleton = _skeleton(model)
    types, symbolic = _inferred(skeleton)
    for value in network_inputs(model):
        dims = value.type.tensor_type.shape.dim
        if batch is not None and len(dims) == 4 and dims[0].HasField("dim_value") and dims[0].dim_value != batch:
            raise FcmError(f"input '{value.name}' has a fixed batch of {dims[0].dim_value}, not {batch}")
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in skeleton.graph.input:
        if value.name not in constants:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if not dim.HasField("dim_value") or dim.dim_value <= 0:
                    dim.dim_value = (batch or 1) if axis == 0 else GUESSED_SIZE
    for value in skeleton.graph.output:
        value.type.tensor_type.ClearField("shape")
    planned = {
        name: tuple(int(dim) for dim in shape)
        for name, shape in _inferred(skeleton)[1].items()
        if all(isinstance(dim, int) for dim in shape)
    }
    return Shapes(types, symbolic, planned)


def network_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs that have no initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the weights, stated shapes of inner tensors, and operators that ONNX has no inference for."""
    result = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = result.graph
    graph.name = model.graph.name
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        small = tensor.data_type in (TensorProto.INT64, TensorProto.INT32) or len(tensor.dims) < 2
        graph.initializer.append(
            tensor if small else TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        )
    for node in model.graph.node:
        graph.node.append(_known_to_onnx(node))
    return result


def _known_to_onnx(node: onnx.NodeProto) -> onnx.NodeProto:
    if node.domain == "com.microsoft" and node.op_type == "FusedConv":
        plain = onnx.NodeProto(op_type="Conv", name=node.name, input=node.input[:3], output=node.output)
        plain.attribute.extend(a for a in node.attribute if not a.name.startswith("activation"))
        return plain
    if node.domain == "com.microsoft" and node.op_type in ("Gelu", "FastGelu", "QuickGelu"):
        return onnx.NodeProto(op_type="Identity", name=node.name, input=node.input[:1], output=node.output)
    return node


def _inferred(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[Size, ...]]]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # onnx raises several types for an inconsistent graph
        raise FcmError(f"not a valid ONNX model: {str(error).strip().splitlines()[0]}") from None
    types: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
    shapes: dict[str, tuple[Size, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    pending = [graph]
    while pending:
        graph = pending.pop()
        for value in [*graph.input, *graph.value_info, *graph.output]:
            if value.type.HasField("tensor_type"):
                types[value.name] = value.type.tensor_type.elem_type
                if value.type.tensor_type.HasField("shape"):
                    shapes[value.name] = tuple(
                        d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}[{axis}]"
                        for axis, d in enumerate(value.type.tensor_type.shape.dim)
                    )
        pending += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return types, shapes
