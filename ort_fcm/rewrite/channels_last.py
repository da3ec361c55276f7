"""Networks whose every convolution stands between Transposes, as channels-last frameworks export it unless optimised.

What lies between two convolutions, such as bias, activation, pad and residual Add, is then [N, H, W, C], and no stage
recognises it. Here it is moved to the other side of the Transposes, which then meet and vanish. A product with a matrix
is a pointwise convolution there; a LayerNormalization stays, between Transposes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from ort_fcm.rewrite.graph import BINARY, UNARY, Array, View, attributes, captured, operator
from ort_fcm.rewrite.layout import TO_NCHW, TO_NHWC

REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin")


def move_transposes(view: View) -> bool:
    """Let nodes run [N, C, H, W] that run [N, H, W, C] behind a Transpose. Returns whether there were any."""
    graph = view.graph
    twins: dict[str, str] = {}  # of a channels-last tensor: the name of the same, [N, C, H, W]
    nodes: list[NodeProto] = []
    moved = False

    def store(value: Array) -> str:
        name = f"ort_fcm/channels_last_{len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    for node in view.nodes:
        perm = attributes(node).get("perm") if operator(node) == "Transpose" else None
        source = view.name(node.input[0]) if node.input else ""
        if perm == TO_NHWC:
            twins[node.output[0]] = source
        elif perm == TO_NCHW and source in twins:
            nodes.append(helper.make_node("Identity", [twins[source]], node.output, name=node.name))
            continue
        elif (other := _moved(view, node, twins, store)) is not None:
            moved = True
            nodes.append(other)
            if other.output[0] != node.output[0]:
                twins[node.output[0]] = other.output[0]
                back = [other.output[0]], [node.output[0]]
                nodes.append(helper.make_node("Transpose", *back, name=f"{node.name}/transpose", perm=TO_NHWC))
            continue
        nodes.append(node)
        if operator(node) == "LayerNormalization" and source in twins:
            twins[node.output[0]] = f"{node.output[0]}/nchw"
            there = [node.output[0]], [twins[node.output[0]]]
            nodes.append(helper.make_node("Transpose", *there, name=f"{node.name}/transpose", perm=TO_NCHW))
    if not moved:
        return False
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update([*node.input, *captured(node)])
            kept.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(copies)
    return True


def _moved(view: View, node: NodeProto, twins: dict[str, str], store: Callable[[Array], str]) -> NodeProto | None:
    """The node that computes the same in the other layout; None if it cannot, or if an input is not had in it."""
    op, values = operator(node), attributes(node)
    names = [view.name(name) if name else "" for name in node.input]
    if not names or len(node.output) != 1:
        return None
    result = NodeProto()
    result.CopyFrom(node)
    result.output[0] = f"{node.output[0]}/nchw"
    if op in UNARY | BINARY and op not in ("BatchNormalization", "Dropout"):
        if not any(name in twins for name in names) or view.rank(node.output[0]) != 4:
            return None
        for slot, name in enumerate(names):
            value = view.constant(name)
            if name in twins:
                result.input[slot] = twins[name]
            elif value is not None and value.ndim <= 4 and value.size > 1:
                result.input[slot] = store(value.reshape((1,) * (4 - value.ndim) + value.shape).transpose(TO_NCHW))
            elif name and value is None:
                return None
        return result
    if op == "Concat" and all(name in twins for name in names):
        result.input[:] = [twins[name] for name in names]
        return _with(result, axis=TO_NHWC[values["axis"] % 4])
    if names[0] not in twins:
        return None
    result.input[0] = twins[names[0]]
    if op == "MatMul":
        weight = view.constant(names[1])
        if weight is None or weight.ndim != 2:
            return None
        inputs = [result.input[0], store(weight.T[:, :, None, None])]
        return helper.make_node("Conv", inputs, result.output, name=node.name, kernel_shape=[1, 1])
    if op == "Pad":
        amounts = np.array(values["pads"]) if "pads" in values else view.constant(names[1])
        if amounts is None or len(amounts) != 8 or any(names[3:]):
            return None
        amounts = amounts.reshape(2, 4)[:, TO_NCHW].reshape(-1)
        if "pads" in values:
            return _with(result, pads=amounts.tolist())
        result.input[1] = store(amounts)
        return result
    if op in REDUCTIONS:
        axes = values.get("axes") if len(names) < 2 else view.constant(names[1])
        if axes is None or not len(axes):
            return None
        across = sorted(TO_NHWC[int(axis) % 4] for axis in axes)
        if not values.get("keepdims", 1):
            if across != [2, 3]:
                return None
            result.output[0] = node.output[0]
        if "axes" in values:
            return _with(result, axes=across)
        result.input[1] = store(np.array(across, np.int64))
        return result
    return None


def _with(node: NodeProto, **replaced: object) -> NodeProto:
    kept = [attribute for attribute in node.attribute if attribute.name not in replaced]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in replaced.items())])
    return node
