"""Channel shuffles and splits that exporters spell as Reshape, Transpose, Reshape, and perhaps Gather.

Such a row of nodes only moves whole channels: one Gather along the channel axis computes the same, and, unlike its
pieces, in either layout. Instead of patterns, the nodes are run on the positions of a tensor's elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from ort_fcm.rewrite.graph import Array, View, attributes, operator

MOST_NODES = 4
MOST_ELEMENTS = 1 << 22  # of a tensor whose positions are followed
BATCHES = (1, 2, 3)  # tried where the batch is known at run time only


def channel_gather(view: View, index: int) -> tuple[str, Array] | None:
    """(x, channels) where the output of the node, [N, K, H, W], is x[:, channels] and made by moving elements only."""
    steps: list[Callable[[Array], Array]] = []
    moved = False
    while len(steps) < MOST_NODES:
        node = view.nodes[index]
        step = _step(view, node)
        if step is None:
            return None
        steps.insert(0, step)
        moved = moved or node.op_type == "Transpose"
        source = view.name(node.input[0])
        size = view.shapes.symbolic.get(source, ())
        if moved and len(size) == 4 and (channels := _channels(size, steps)) is not None:
            return source, channels
        if source not in view.producer:
            return None
        index = view.producer[source]
    return None


def _step(view: View, node: NodeProto) -> Callable[[Array], Array] | None:
    """What the node does to an array; None unless it moves elements in a way known now."""
    values, op = attributes(node), operator(node)
    if op == "Transpose" and "perm" in values:
        return lambda x: x.transpose(values["perm"])
    constant = view.constant(node.input[1]) if len(node.input) == 2 else None
    if constant is None:
        return None
    if op == "Reshape" and not values.get("allowzero", 0):
        return lambda x: x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(constant.tolist())])
    if op == "Gather" and constant.ndim == 0:
        return lambda x: np.take(x, int(constant), values.get("axis", 0))
    return None


def _channels(size: tuple[int | str, ...], steps: list[Callable[[Array], Array]]) -> Array | None:
    """The channels of [N, C, H, W] that the steps make the result of, if they do nothing else."""
    batch, *rest = size
    if not all(isinstance(dim, int) for dim in rest):
        return None
    c, h, w = (int(dim) for dim in rest)
    found = None
    for n in (batch,) if isinstance(batch, int) else BATCHES:
        if not 0 < math.prod((n, c, h, w)) <= MOST_ELEMENTS:
            return None
        positions = result = np.arange(n * c * h * w).reshape(n, c, h, w)
        try:
            for step in steps:
                result = step(result)
        except (ValueError, IndexError):  # does not fit this batch
            return None
        if result.ndim != 4 or result.shape[::2] != (n, h) or result.shape[3] != w:
            return None
        channels = result[0, :, 0, 0] // (h * w)
        if not (result == positions[:, channels]).all() or (found is not None and not (channels == found).all()):
            return None
        found = channels
    return found
