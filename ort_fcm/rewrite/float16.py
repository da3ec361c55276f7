"""Convert a model to float16: weights and what lies inside; graph inputs and outputs keep their types.

A node computes in float16 where its operator allows it. Inputs that must be float (such as the scales of Resize) and
nodes that must compute in float (with subgraphs, of unknown domains, that count) get Casts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs, helper, numpy_helper

from ort_fcm.errors import FcmError
from ort_fcm.rewrite.graph import View, captured
from ort_fcm.rewrite.load import inline
from ort_fcm.rewrite.match import channel_affine
from ort_fcm.rewrite.shapes import infer

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# Range and CumSum count: float16 has no odd integers above 2048. The quantisers' scales set the type of what follows. A
# variance can lie outside float16's range; most BatchNormalizations are folded into convolutions.
IN_FLOAT = {"Range", "CumSum", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "BatchNormalization"}
MICROSOFT = {"FusedConv", "Gelu", "FastGelu", "QuickGelu"}
SUFFIX: dict[int, str] = {HALF: "/float16", FLOAT: "/float32"}


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The converted model; `model` is changed too."""
    if model.functions:
        inline(model)
    graph = model.graph
    if any(node.op_type in ("DequantizeLinear", "QLinearConv") for node in graph.node):
        raise FcmError("a quantised network cannot be converted to float16: its convolutions are int8")
    _constants_to_initializers(graph)
    _fold_batch_normalization(model)
    types = infer(model, None).types
    opsets = {entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import}
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
    now = {name: FLOAT for name, kind in types.items() if kind == FLOAT}  # every float tensor's type in the result
    made: dict[tuple[str, int], str] = {}
    nodes: list[NodeProto] = []
    extra: list[TensorProto] = []

    def as_type(name: str, kind: int) -> str:
        """The name under which `name` is had in the type."""
        if name not in now or now[name] == kind:
            return name
        if (name, kind) not in made:
            made[name, kind] = name + SUFFIX[kind]
            if name in constants:
                extra.append(_half(constants[name], name + SUFFIX[kind]))
            else:
                nodes.append(helper.make_node("Cast", [name], [made[name, kind]], f"{name}/cast_{kind}", to=kind))
        return made[name, kind]

    for node in graph.node:
        wanted = _types(node, opsets)
        for index, name in enumerate(node.input):
            node.input[index] = as_type(name, FLOAT if wanted is None else wanted[index])
        for name in dict.fromkeys(captured(node)):
            if name in now and now[name] != FLOAT:
                _rename_captured(node, name, as_type(name, FLOAT))
        back = []
        if wanted is not None:
            _convert_attributes(node)
            for index, name in enumerate(node.output):
                if types.get(name) == FLOAT:
                    now[name] = HALF
                    if name in outputs:
                        node.output[index] = made[name, HALF] = name + SUFFIX[HALF]
                        back.append(name)
        nodes.append(node)
        for name in back:
            now[name] = FLOAT
            nodes.append(helper.make_node("Cast", [made[name, HALF]], [name], f"{name}/cast_{FLOAT}", to=FLOAT))
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:], result.graph.initializer[:]
    result.graph.node.extend(nodes)
    used = {name for node in nodes for name in [*node.input, *captured(node)]} | inputs | outputs
    result.graph.initializer.extend(tensor for tensor in [*graph.initializer, *extra] if tensor.name in used)
    return result


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """So that each use of a constant can have its own type."""
    outputs = {value.name for value in graph.output}
    kept = []
    for node in graph.node:
        plain = node.op_type == "Constant" and node.attribute[0].name == "value" and node.output[0] not in outputs
        if plain:
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _fold_batch_normalization(model: onnx.ModelProto) -> None:
    """Into the convolution before it, in float32: a variance can lie outside float16's range."""
    graph = model.graph
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    overridable = {tensor.name for tensor in graph.initializer} & {value.name for value in graph.input}
    view = View(graph, infer(model, None), opset, overridable)
    gone: set[int] = set()
    for index, node in enumerate(view.nodes):
        if node.op_type != "BatchNormalization" or view.rank(node.output[0]) != 4:
            continue
        stats = view.tensor(node.input[1])
        affine = None if stats is None else channel_affine(view, (index, 0), (1, stats.dims[0], 1, 1))
        if affine is None:
            continue
        name, source = node.output[0], view.name(node.input[0])
        scale, shift = (np.broadcast_to(np.asarray(term), (stats.dims[0],)) for term in affine)  # type: ignore[union-attr]
        conv = view.nodes[view.producer[source]] if source in view.producer else node
        weight = view.constant(conv.input[1]) if conv.op_type == "Conv" else None
        bias = view.constant(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else np.zeros(1)
        if weight is None or bias is None or not view.only_use(source):
            continue
        scaled = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        conv.input[:] = [conv.input[0], f"{name}/weight", f"{name}/bias"]
        conv.output[:] = [name]
        gone.add(index)
        new = {f"{name}/weight": scaled, f"{name}/bias": bias * scale + shift}
        graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in new.items())
    kept = [node for index, node in enumerate(view.nodes) if index not in gone]
    del graph.node[:]
    graph.node.extend(kept)


def _types(node: NodeProto, opsets: dict[str, int]) -> list[int] | None:
    """Of a node that can compute in float16: the type of each of its inputs, should that be a float type."""
    if node.domain == "com.microsoft" and node.op_type in MICROSOFT:
        return [HALF] * len(node.input)
    if node.domain not in ("", "ai.onnx") or node.op_type in IN_FLOAT:
        return None
    if node.op_type in ("Resize", "Upsample"):  # ONNX Runtime moves Transposes across it only if the rest is constant
        return [HALF, FLOAT, FLOAT, FLOAT]
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return None
    try:
        schema = defs.get_schema(node.op_type, opsets.get("", 1), "")
    except defs.SchemaError:
        return None
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}

    def allows(parameter: defs.OpSchema.FormalParameter) -> bool:
        return "tensor(float16)" in allowed.get(parameter.type_str, [parameter.type_str])

    made = [schema.outputs[min(i, len(schema.outputs) - 1)] for i, name in enumerate(node.output) if name]
    if any("tensor(float)" in allowed.get(o.type_str, [o.type_str]) and not allows(o) for o in made):
        return None
    formal = [schema.inputs[min(i, len(schema.inputs) - 1)] for i in range(len(node.input))]
    return [HALF if allows(parameter) else FLOAT for parameter in formal]


def _convert_attributes(node: NodeProto) -> None:
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float32))))
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            value = np.array(helper.get_attribute_value(attribute), np.float32)
            attribute.CopyFrom(helper.make_attribute("value", _half(numpy_helper.from_array(value), "")))
        if attribute.name in ("to", "dtype") and attribute.i == FLOAT:
            attribute.i = HALF


def _half(tensor: TensorProto, name: str) -> TensorProto:
    limit = np.finfo(np.float16).max
    return numpy_helper.from_array(np.clip(numpy_helper.to_array(tensor), -limit, limit).astype(np.float16), name)


def _rename_captured(node: NodeProto, old: str, new: str) -> None:
    for graph in _subgraphs(node):
        for inner in graph.node:
            inner.input[:] = [new if name == old else name for name in inner.input]
            _rename_captured(inner, old, new)
        for value in graph.output:
            if value.name == old:
                value.name = new


def _subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
