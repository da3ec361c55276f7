"""Convolution and activations in float64, on NumPy alone: what everything else is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ACTIVATIONS = (
    "none", "relu", "clip", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu",
    "tanh",
)  # fmt: skip


def conv2d(
    x: Array, weight: Array, stride: Sequence[int], dilation: Sequence[int], pads: Sequence[int], groups: int = 1
) -> Array:
    """x [N,C,H,W] by weight [M,C/groups,kH,kW]; pads are top, left, bottom, right. Returns [N,M,OH,OW]."""
    n, c = x.shape[:2]
    m, _, kernel_h, kernel_w = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    out_h = (padded.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (padded.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    y = np.zeros((n, m, out_h, out_w), x.dtype)
    for i in range(kernel_h):
        for j in range(kernel_w):
            top, left = i * dilation[0], j * dilation[1]
            tap = padded[:, :, top : top + (out_h - 1) * stride[0] + 1 : stride[0],
                         left : left + (out_w - 1) * stride[1] + 1 : stride[1]]  # fmt: skip
            if groups == c == m:
                y += tap * weight[:, 0, i, j, None, None]
                continue
            grouped = tap.reshape(n, groups, c // groups, out_h * out_w)
            filters = weight[:, :, i, j].reshape(groups, m // groups, c // groups)
            y += np.matmul(filters, grouped).reshape(y.shape)
    return y


def erf(x: Array) -> Array:
    """The error function: its Taylor series near zero, a continued fraction beyond. Absolute error below 1e-12."""
    a = np.minimum(np.abs(np.asarray(x, np.float64)), 6.0)
    term = series = np.minimum(a, 2.5)
    square = series * series
    for k in range(1, 60):
        term = -term * square / k
        series = series + term / (2 * k + 1)
    fraction = np.zeros_like(a)
    far = np.maximum(a, 2.5)
    for k in range(80, 0, -1):
        fraction = k / 2 / (far + fraction)
    tail = 1 - np.exp(-far * far) / (np.sqrt(np.pi) * (far + fraction))
    return np.asarray(np.sign(x) * np.where(a < 2.5, 2 / np.sqrt(np.pi) * series, tail))


def activate(x: Array, kind: str, alpha: float = 0.0, beta: float = 0.0, slope: Array | None = None) -> Array:
    """The activation `kind` of x [N,C,H,W]; `slope` [C] is PRelu's."""
    if kind == "none":
        return x
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "clip":
        return np.minimum(np.maximum(x, alpha), beta)
    if kind == "hardswish":
        return np.asarray(x * np.clip(x / 6 + 0.5, 0, 1))
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    if kind == "hardsigmoid":
        return np.asarray(np.clip(alpha * x + beta, 0, 1))
    if kind == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-x)))
    if kind == "gelu":
        return np.asarray(x / 2 * (1 + erf(x / np.sqrt(2))))
    if kind == "gelu_tanh":
        return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    if kind == "leakyrelu":
        return np.where(x < 0, alpha * x, x)
    if kind == "prelu":
        assert slope is not None
        return np.where(x < 0, slope[:, None, None] * x, x)
    if kind == "tanh":
        return np.tanh(x)
    raise ValueError(f"unknown activation {kind}")


def steepest(kind: str, alpha: float = 0.0, slope: Array | None = None) -> float:
    """An upper bound of the activation's slope: how much it can enlarge an error."""
    if kind == "prelu":
        assert slope is not None
        return max(1.0, float(np.abs(slope).max()))
    return {"leakyrelu": max(1.0, abs(alpha)), "hardsigmoid": abs(alpha), "sigmoid": 0.25}.get(
        kind, 1.5 if kind in ("hardswish", "silu", "gelu", "gelu_tanh") else 1.0
    )
