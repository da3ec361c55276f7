"""Find a LayerNormalization over the channels in front of a pointwise convolution.

It is one node over the last axis, between Transposes to channels-last and back, or the nodes that exporters of older
opsets write, which normalise the channels where they are: ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, Mul, Add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ort_fcm.rewrite.graph import Array, View, attributes, operator

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class Norm:
    """(source - mean) / sqrt(variance + epsilon) * scale + shift, over the channels of `source`, [N, C, H, W].

    scale, shift: [C]. nodes: positions of the nodes it stands for."""

    source: str
    epsilon: float
    scale: Array
    shift: Array
    nodes: tuple[int, ...]


def norm_before(view: View, tensor: str, channels: int) -> Norm | None:
    """The normalisation whose result `tensor` is, if nothing but one node uses that or what lies between."""
    if view.rank(tensor) != 4 or view.only_use(tensor) is None:
        return None
    found = _one_node(view, tensor, channels) or _in_pieces(view, tensor, channels)
    return found if found and found.epsilon > 0 else None


def _node(view: View, tensor: str, *ops: str) -> tuple[int, NodeProto] | None:
    """The node that makes the tensor, if it is one of these operators."""
    index = view.producer.get(view.name(tensor))
    return (index, view.nodes[index]) if index is not None and operator(view.nodes[index]) in ops else None


def _transposed(view: View, tensor: str, perm: list[int]) -> tuple[int, str] | None:
    """Position and input of the Transpose that makes the tensor."""
    found = _node(view, tensor, "Transpose")
    if found is None or attributes(found[1]).get("perm") != perm:
        return None
    return found[0], view.name(found[1].input[0])


def _one_node(view: View, tensor: str, channels: int) -> Norm | None:
    back = _transposed(view, tensor, TO_FIRST)
    found = _node(view, back[1], "LayerNormalization") if back else None
    if back is None or found is None or view.only_use(back[1]) is None:
        return None
    index, node = found
    there, values = _transposed(view, node.input[0], TO_LAST), attributes(node)
    terms = [view.constant(name) for name in node.input[1:]]
    if there is None or values.get("axis", -1) not in (-1, 3) or any(node.output[1:]) or not terms:
        return None
    if any(term is None or term.shape != (channels,) for term in terms):
        return None
    scale, shift = [*(term.astype(np.float64) for term in terms if term is not None), np.zeros(channels)][:2]
    first = (there[0],) if view.only_use(node.input[0]) else ()
    return Norm(there[1], float(values.get("epsilon", 1e-5)), scale, shift, (*first, index, back[0]))


def _in_pieces(view: View, tensor: str, channels: int) -> Norm | None:
    """Of the form X - mean(X) over sqrt(mean((X - mean(X))^2) + epsilon), and perhaps times a scale, plus a shift."""
    nodes: set[int] = set()
    scale, shift = np.ones(channels), np.zeros(channels)

    def constant(found: tuple[int, NodeProto] | None) -> tuple[str, Array] | None:
        """The other input, and the constant of one value a channel."""
        for slot in (0, 1) if found else ():
            assert found
            value = view.constant(found[1].input[1 - slot])
            if value is not None and (1,) * (4 - value.ndim) + value.shape in ((1, channels, 1, 1), (1, 1, 1, 1)):
                nodes.add(found[0])
                return found[1].input[slot], np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,))
        return None

    def mean(name: str) -> str:
        """What the tensor is the mean of, over channels."""
        found = _node(view, name, "ReduceMean")
        if found is None or not attributes(found[1]).get("keepdims", 1) or view.axes(found[1]) != [1]:
            return ""
        nodes.add(found[0])
        return view.name(found[1].input[0])

    def centred(name: str) -> str:
        """What the tensor is the difference of from its mean."""
        found = _node(view, name, "Sub")
        if found is None or mean(found[1].input[1]) != view.name(found[1].input[0]):
            return ""
        nodes.add(found[0])
        return view.name(found[1].input[0])

    now = tensor
    if found := constant(_node(view, now, "Add")):
        now, shift = found
    if found := constant(_node(view, now, "Mul")):
        now, scale = found
    divide = _node(view, now, "Div")
    root = _node(view, divide[1].input[1], "Sqrt") if divide else None
    if divide is None or root is None:
        return None
    source = centred(divide[1].input[0])
    inner = _node(view, root[1].input[0], "Add")
    epsilon = constant(inner)
    square = _node(view, mean(epsilon[0]), "Pow", "Mul") if epsilon else None
    if inner is None or epsilon is None or square is None or not source:
        return None
    a, b = square[1].input[:2]
    twice = view.scalar(b) == 2 if square[1].op_type == "Pow" else view.name(a) == view.name(b)
    if not twice or centred(a) != source or np.ptp(epsilon[1]):
        return None
    nodes |= {divide[0], root[0], inner[0], square[0]}
    for index in nodes:
        for name in view.nodes[index].output:
            inside = all(user in nodes for user, _ in view.uses(name)) and not view.is_output(name)
            if view.name(name) != view.name(tensor) and not inside:
                return None
    return Norm(source, float(epsilon[1][0]), scale, shift, tuple(sorted(nodes)))
