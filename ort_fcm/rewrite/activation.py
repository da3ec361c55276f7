"""Find the activation that follows a tensor, however it is spelled.

Exporters write HardSwish, SiLU or GELU in dozens of ways: Add-Clip-Div-Mul, HardSigmoid-Mul, x * Clip(x + 3) / 6 and so
on. Instead of a pattern for each, the elementwise nodes behind a tensor, as far as they depend on it and on scalars
only, are evaluated as a function of one number on a grid, and compared with the activations that kernels know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from ort_fcm.rewrite.graph import Array, View, attributes, operator

MOST_NODES = 12  # of an activation: the tanh form of GELU has 8
HUGE = float(np.finfo(np.float32).max)  # stands for "no bound" in a clip
_PROBES = (-1.0, 0.0, 0.0625)  # where parameters are read off
_GRID = np.concatenate([_PROBES, np.linspace(-12, 12, 2401), [-3e38, -1e5, -1e3, -100, -20, 20, 100, 1e3, 1e5, 3e38]])


@dataclass(frozen=True)
class Activation:
    """An activation, the nodes it is made of, and its output. slope: PRelu's, [channels] or one for all."""

    kind: str = "none"
    alpha: float = 0.0
    beta: float = 0.0
    slope: str = ""
    nodes: tuple[int, ...] = ()
    output: str = ""


_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _clip(x: Array, low: float, high: float) -> Array:
    return np.minimum(np.maximum(x, low), high)


def _gelu(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + _erf(x / math.sqrt(2))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _leaky(x: Array, alpha: float) -> Array:
    return np.where(x < 0, alpha * x, x)


def _candidates(f: Array) -> dict[tuple[str, float, float], Array]:
    """What a function of these values on the grid could be. Parameters are read off the values."""
    x = _GRID
    low, high = float(f.min()), float(f.max())
    low, high = (-HUGE if low == x.min() else low), (HUGE if high == x.max() else high)
    leak, middle = -float(f[0]), float(f[1])
    slope = (float(f[2]) - middle) / _PROBES[2]
    return {
        ("none", 0, 0): x,
        ("relu", 0, 0): np.maximum(x, 0),
        ("hardswish", 0, 0): x * _clip(x / 6 + 0.5, 0, 1),
        ("silu", 0, 0): x * _sigmoid(x),
        ("sigmoid", 0, 0): _sigmoid(x),
        ("tanh", 0, 0): np.tanh(x),
        ("gelu", 0, 0): _gelu(x),
        ("gelu_tanh", 0, 0): _gelu_tanh(x),
        ("clip", low, high): _clip(x, low, high),
        ("leakyrelu", leak, 0): _leaky(x, leak),
        ("hardsigmoid", slope, middle): _clip(slope * x + middle, 0, 1),
    }


def _evaluate(node: NodeProto, args: list[Array]) -> Array | None:
    """The node's value for inputs of one element each (None: not elementwise, or not known here)."""
    a = attributes(node)
    x = args[0]
    clip = [*args, -np.inf, np.inf] if len(args) == 1 else [*args, np.inf]
    table: dict[str, Callable[[], Array]] = {
        "Relu": lambda: np.maximum(x, 0),
        "Clip": lambda: _clip(x, a.get("min", clip[1]), a.get("max", clip[2])),
        "HardSigmoid": lambda: _clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
        "HardSwish": lambda: x * _clip(x / 6 + 0.5, 0, 1),
        "Sigmoid": lambda: _sigmoid(x),
        "Tanh": lambda: np.tanh(x),
        "Erf": lambda: _erf(x),
        "LeakyRelu": lambda: _leaky(x, a.get("alpha", 0.01)),
        "Gelu": lambda: _gelu_tanh(x) if a.get("approximate") == "tanh" else _gelu(x),
        "FastGelu": lambda: _gelu_tanh(x),
        "QuickGelu": lambda: x * _sigmoid(a.get("alpha", 1.702) * x),
        "Swish": lambda: x * _sigmoid(a.get("alpha", 1.0) * x),
        "Exp": lambda: np.exp(x),
        "Neg": lambda: -x,
        "Reciprocal": lambda: 1 / x,
        "Add": lambda: x + args[1],
        "Sub": lambda: x - args[1],
        "Mul": lambda: x * args[1],
        "Div": lambda: x / args[1],
        "Pow": lambda: x ** args[1],
        "Min": lambda: np.minimum(x, args[1]),
        "Max": lambda: np.maximum(x, args[1]),
    }
    return table[operator(node)]() if operator(node) in table else None


def activation_after(view: View, tensor: str, channels: int) -> Activation:
    """The longest activation that follows `tensor` ([N, channels, H, W]); kind "none" without nodes if there is none.

    Nothing but the activation's own nodes may use `tensor` and what lies between, and neither may be a graph output.
    """
    tensor = view.name(tensor)
    if slope := _prelu(view, tensor, channels):
        return slope
    half = view.type(tensor) == TensorProto.FLOAT16
    tolerance = 1e-3 if half else 2e-6  # constants such as 1/6 are rounded to the type
    values: dict[str, Array] = {tensor: _GRID}
    nodes: list[int] = []
    best = Activation(output=tensor)
    with np.errstate(all="ignore"):
        for _ in range(MOST_NODES):
            found = min(
                (index for name in values for index, slot in view.uses(name) if index not in nodes and slot >= 0),
                default=None,
            )
            if found is None or (value := _value(view, found, values)) is None:
                break
            nodes.append(found)
            values[view.nodes[found].output[0]] = value
            exits = [name for name in values if view.is_output(name) or any(i not in nodes for i, _ in view.uses(name))]
            match = _recognise(values[exits[0]], tolerance) if len(exits) == 1 and exits[0] != tensor else None
            if match:
                best = Activation(*match, nodes=tuple(nodes), output=exits[0])
    return best


def _value(view: View, index: int, values: dict[str, Array]) -> Array | None:
    node = view.nodes[index]
    args: list[Array] = []
    for slot, name in enumerate(node.input):
        name = view.name(name)
        if name in values:
            args.append(values[name])
            continue
        scalar = view.scalar(name) if name else None
        if not name and node.op_type == "Clip":
            scalar = (0.0, -np.inf, np.inf)[slot]
        if scalar is None:
            return None
        args.append(np.float64(scalar))  # type: ignore[arg-type]
    return _evaluate(node, args)


def _recognise(f: Array, tolerance: float) -> tuple[str, float, float] | None:
    """Name and parameters of the nearest activation, if it is near enough."""
    if not np.isfinite(f).all():
        return None
    best, least = None, tolerance
    for key, g in _candidates(f).items():
        error = float(np.max(np.abs(f - g) / (1 + np.abs(g))))
        if error < least:
            best, least = key, error
    return best


def _prelu(view: View, tensor: str, channels: int) -> Activation | None:
    """PRelu with a constant slope, one for all channels or one each."""
    use = view.only_use(tensor)
    if use is None or use[1] != 0 or operator(view.nodes[use[0]]) != "PRelu":
        return None
    node = view.nodes[use[0]]
    slope = view.tensor(node.input[1])
    if slope is None or [d for d in slope.dims if d != 1] not in ([], [channels]):
        return None
    if len(slope.dims) not in (0, 1, 3, 4) or (len(slope.dims) == 1 and slope.dims[0] not in (0, 1)):
        return None
    if len(slope.dims) > 1 and slope.dims[-1] * slope.dims[-2] != 1:
        return None  # a slope along rows or columns
    return Activation("prelu", slope=view.name(node.input[1]), nodes=(use[0],), output=node.output[0])
