"""Channel shuffles and splits that exporters spell as Reshape, Transpose, Reshape, and perhaps Gather.

Such a row of nodes only moves whole channels: one Gather along the channel axis computes the same, and, unlike its
pieces, in either layout. Instead of patterns, the nodes are run on the positions of a tensor's elements, in several
sizes where a size is known at run time only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from ort_fcm.rewrite.graph import Array, View, attributes, operator

MOST_NODES = 4
MOST_ELEMENTS = 1 << 22  # of a tensor whose positions are followed
TRIED = ((1, 5, 3), (2, 4, 7), (3, 6, 5))  # batch, height, width, where these are known at run time only
Known = dict[str, tuple[int, ...]]  # shapes of tensors in a trial
Step = Callable[[Array, Known], Array]


def channel_gather(view: View, index: int) -> tuple[str, Array] | None:
    """(x, channels) where the output of the node, [N, K, H, W], is x[:, channels] and made by moving elements only."""
    steps: list[tuple[str, Step]] = []
    moved = False
    while len(steps) < MOST_NODES:
        node = view.nodes[index]
        step = _step(view, node)
        if step is None:
            return None
        source = view.name(node.input[0])
        steps.insert(0, (source, step))
        moved = moved or operator(node) == "Transpose"
        size = view.shapes.symbolic.get(source, ())
        if moved and len(size) == 4 and (channels := _channels(size, steps)) is not None:
            return source, channels
        if source not in view.producer:
            return None
        index = view.producer[source]
    return None


def _step(view: View, node: NodeProto) -> Step | None:
    """What the node does to an array; None unless it moves elements in a way that shapes alone decide."""
    values, op = attributes(node), operator(node)
    if op == "Transpose" and "perm" in values:
        return lambda x, known: x.transpose(values["perm"])
    if op == "Reshape" and not values.get("allowzero", 0):
        return lambda x, known: x.reshape(
            [x.shape[i] if d == 0 else int(d) for i, d in enumerate(_integers(view, node.input[1], known))]
        )
    constant = view.constant(node.input[1]) if len(node.input) == 2 else None
    if op == "Gather" and constant is not None and constant.ndim == 0:
        return lambda x, known: np.take(x, int(constant), values.get("axis", 0))
    return None


def _integers(view: View, name: str, known: Known) -> Array:
    """A tensor that constants and known shapes make. ValueError if others do, or in a way that is not known here."""
    constant = view.constant(name)
    if constant is not None:
        return constant
    node = view.nodes[view.producer[view.name(name)]] if view.name(name) in view.producer else NodeProto()
    values, op = attributes(node), operator(node)
    if op == "Shape":
        size = view.size(node.input[0])
        shape = next((dims for other, dims in known.items() if size is not None and view.size(other) == size), None)
        if shape is None:
            raise ValueError
        return np.array(shape[slice(values.get("start", 0), values.get("end", len(shape)))], np.int64)
    if op not in _ARITHMETIC:
        raise ValueError
    return _ARITHMETIC[op]([_integers(view, other, known) for other in node.input], values)


def _axes(args: list[Array], values: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(axis) for axis in (args[1] if len(args) > 1 else values["axes"]))


def _divided(a: Array, b: Array) -> Array:
    return a // b if a.dtype.kind == "i" else np.asarray(a / b)


_ARITHMETIC: dict[str, Callable[[list[Array], Mapping[str, Any]], Array]] = {  # of scalars and of lists
    "Concat": lambda args, values: np.concatenate(args),
    "Gather": lambda args, values: np.take(args[0], args[1]),
    "Slice": lambda args, values: args[0][int(args[1][0]) : int(args[2][0]) : int(args[4][0]) if args[4:] else 1],
    "Squeeze": lambda args, values: args[0].squeeze(_axes(args, values)),
    "Unsqueeze": lambda args, values: np.expand_dims(args[0], _axes(args, values)),
    "Cast": lambda args, values: args[0].astype(helper.tensor_dtype_to_np_dtype(values["to"])),
    "Floor": lambda args, values: np.floor(args[0]),
    "Add": lambda args, values: args[0] + args[1],
    "Mul": lambda args, values: args[0] * args[1],
    "Div": lambda args, values: _divided(args[0], args[1]),
}


def _channels(size: tuple[int | str, ...], steps: list[tuple[str, Step]]) -> Array | None:
    """The channels of [N, C, H, W] that the steps make the result of, if they do nothing else."""
    if not isinstance(size[1], int):
        return None
    found = None
    for batch, height, width in TRIED if any(isinstance(dim, str) for dim in size) else TRIED[:1]:
        n, c, h, w = (
            dim if isinstance(dim, int) else tried for dim, tried in zip(size, (batch, 0, height, width), strict=True)
        )
        if not 0 < math.prod((n, c, h, w)) <= MOST_ELEMENTS:
            return None
        positions = result = np.arange(n * c * h * w).reshape(n, c, h, w)
        known: Known = {}
        try:
            for source, step in steps:
                known[source] = result.shape
                result = step(result, known)
        except (ValueError, IndexError, KeyError, ZeroDivisionError):  # does not fit this size
            return None
        if result.ndim != 4 or result.shape[::2] != (n, h) or result.shape[3] != w:
            return None
        channels = result[0, :, 0, 0] // (h * w)
        if not (result == positions[:, channels]).all() or (found is not None and not np.array_equal(channels, found)):
            return None
        found = channels
    return found
