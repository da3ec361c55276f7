"""LayerNormalization over channels: what of it folds into modules, however it is spelled, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import ort_fcm
from ort_fcm import library_path
from tests.rewrite.networks import Net, assert_same
from tests.rewrite.test_patterns import Fuse, modules, ops

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def vector(net: Net, channels: int, shape: tuple[int, ...] = (-1,)) -> str:
    return net.const(net.rng.standard_normal(channels).reshape(shape))


def one_node(net: Net, x: str, **attributes: Any) -> str:
    """LayerNormalization between Transposes."""
    channels = net.channels[x]
    terms = [vector(net, channels), vector(net, channels)]
    y = net.op("LayerNormalization", net.op("Transpose", x, perm=TO_LAST), *terms, **attributes)
    return str(net.op("Transpose", y, perm=TO_FIRST))


def without_shift(net: Net, x: str) -> str:
    last = net.op("Transpose", x, perm=TO_LAST)
    y = net.op("LayerNormalization", last, vector(net, net.channels[x]), axis=3, epsilon=1e-6)
    return str(net.op("Transpose", y, perm=TO_FIRST))


def mean(net: Net, x: str, axis: int) -> str:
    if net.opset >= 18:
        return str(net.op("ReduceMean", x, net.const([axis], np.int64)))
    return str(net.op("ReduceMean", x, axes=[axis]))


def in_pieces(net: Net, x: str, axis: int = 1, twice: bool = False, affine: bool = True) -> str:
    """The nodes that exporters write for opsets without the operator; twice: the difference is computed twice."""
    centre = mean(net, x, axis)
    difference = net.op("Sub", x, centre)
    squared = net.op("Pow", net.op("Sub", x, centre) if twice else difference, net.const(2))
    deviation = net.op("Sqrt", net.op("Add", mean(net, squared, axis), net.const(1e-6)))
    y = net.op("Div", difference, deviation)
    shape = (1, -1, 1, 1) if axis == 1 else (-1,)
    if affine:
        y = net.op("Mul", y, vector(net, net.channels[x], shape))
        y = net.op("Add", vector(net, net.channels[x], shape), y)
    return str(y)


def in_pieces_last(net: Net, x: str) -> str:
    """The same between Transposes."""
    return str(net.op("Transpose", in_pieces(net, net.op("Transpose", x, perm=TO_LAST), -1), perm=TO_FIRST))


NORMS: dict[str, tuple[int, Callable[[Net, str], str]]] = {
    "LayerNormalization": (17, one_node),
    "without a shift": (17, without_shift),
    "in pieces": (13, in_pieces),
    "in pieces, axes an input": (18, in_pieces),
    "in pieces, one difference for each use": (13, lambda n, x: in_pieces(n, x, twice=True)),
    "in pieces, without scale and shift": (13, lambda n, x: in_pieces(n, x, affine=False)),
    "in pieces, channels-last": (13, in_pieces_last),
}


def gelu(net: Net, x: str) -> str:
    half = net.op("Mul", x, net.op("Add", net.op("Erf", net.op("Div", x, net.const(2**0.5))), net.const(1)))
    return str(net.op("Mul", half, net.const(0.5)))


def block(net: Net, x: str, norm: Callable[[Net, str], str] = one_node) -> str:
    """A ConvNeXt block, of convolutions."""
    channels = net.channels[x]
    y = net.conv(gelu(net, net.conv(norm(net, net.depthwise(x, 7)), 3 * channels)), channels)
    return str(net.op("Add", net.op("Mul", y, vector(net, channels, (1, -1, 1, 1))), x))


def linear(net: Net, x: str, out: int) -> str:
    weight = net.const(net.rng.standard_normal((net.channels[x], out)) / net.channels[x] ** 0.5)
    y = net.op("Add", vector(net, out), net.op("MatMul", x, weight))
    net.channels[y] = out
    return str(y)


def linear_block(net: Net, x: str) -> str:
    """A ConvNeXt block whose pointwise layers are products of matrices, channels-last."""
    channels = net.channels[x]
    y = net.op("Transpose", net.depthwise(x, 7), perm=TO_LAST)
    y = net.op("LayerNormalization", y, vector(net, channels), vector(net, channels), epsilon=1e-6)
    y = linear(net, gelu(net, linear(net, y, 3 * channels)), channels)
    y = net.op("Transpose", y, perm=TO_FIRST)
    return str(net.op("Add", x, net.op("Mul", vector(net, channels, (-1, 1, 1)), y)))


def check(model: onnx.ModelProto, result: onnx.ModelProto, seed: int, tolerance: float = 2e-5) -> None:
    assert_same(model, result, seed, tolerance)
    assert_same(model, result, seed, tolerance, str(library_path()))


def stages(model: onnx.ModelProto) -> list[tuple[str, bool]]:
    return [(module["stages"], module.get("norm_epsilon", 0) > 0) for module in modules(model)]


@pytest.mark.parametrize("spelling", NORMS)
def test_a_block_is_two_modules(fuse: Fuse, seed: int, spelling: str) -> None:
    opset, norm = NORMS[spelling]
    net = Net(opset, seed=seed)
    net.output(block(net, block(net, net.input("batch", 10, "height", "width"), norm), norm))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == [("dw", False), ("pw-pw", True)] * 2
    assert set(ops(result)) <= {"FusedConvModule", "Transpose"}
    assert all(module["node"].input[7] for module in modules(result)[1::2])  # the block's input
    check(model, result, seed)


@pytest.mark.parametrize("opset", [17, 20])
def test_products_of_matrices_are_pointwise_layers(fuse: Fuse, seed: int, opset: int) -> None:
    net = Net(opset, seed=seed)
    net.output(linear_block(net, linear_block(net, net.input("batch", 6, "height", "width"))))
    model = net.model()
    result = fuse(model)
    assert stages(result.model) == [("dw", False), ("pw-pw", True)] * 2
    assert set(ops(result.model)) <= {"FusedConvModule", "Transpose"}
    check(model, result.model, seed)


def test_in_half_precision(fuse: Fuse, seed: int) -> None:
    net = Net(17, np.float16, seed)
    net.output(linear_block(net, block(net, net.input(2, 16, 9, 7))))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == [("dw", False), ("pw-pw", True)] * 2
    check(model, result, seed, 6e-3)


def test_the_planner_names_it(seed: int) -> None:
    net = Net(17, seed=seed)
    net.output(block(net, net.input(1, 64, 28, 28)))
    model = net.model()
    done = ort_fcm.rewrite(model, gpu="H200")
    assert "NORM+" in "".join(module.variant for module in done.report.modules)
    assert done.report.convolutions == done.report.in_modules == 3
    check(model, done.model, seed)


def over_rows(net: Net, x: str) -> str:
    return str(net.op("LayerNormalization", x, net.const(np.ones(9)), axis=-1))


def over_rows_and_columns(net: Net, x: str) -> str:
    return in_pieces(net, x, 2, affine=False)


def over_several_axes(net: Net, x: str) -> str:
    last = net.op("Transpose", x, perm=TO_LAST)
    scale = net.const(np.ones((9, net.channels[x])))
    return str(net.op("Transpose", net.op("LayerNormalization", last, scale, axis=2), perm=TO_FIRST))


def of_a_computed_scale(net: Net, x: str) -> str:
    last = net.op("Transpose", x, perm=TO_LAST)
    y = net.op("LayerNormalization", last, net.op("Abs", vector(net, net.channels[x])))
    return str(net.op("Transpose", y, perm=TO_FIRST))


def read_twice(net: Net, x: str) -> str:
    y = one_node(net, x)
    net.output(str(net.op("Relu", y)))
    return y


def an_output(net: Net, x: str) -> str:
    y = one_node(net, x)
    net.output(y)
    return y


def deviation_is_an_output(net: Net, x: str) -> str:
    y = in_pieces(net, x)
    net.output(next(node.output[0] for node in net.nodes if node.op_type == "Sqrt"))
    return y


def of_another_mean(net: Net, x: str) -> str:
    """The variance is about the mean of other numbers."""
    other = net.op("Sub", x, mean(net, net.op("Relu", x), 1))
    deviation = net.op("Sqrt", net.op("Add", mean(net, net.op("Mul", other, other), 1), net.const(1e-6)))
    return str(net.op("Div", net.op("Sub", x, mean(net, x, 1)), deviation))


@pytest.mark.parametrize(
    "norm",
    [over_rows, over_rows_and_columns, over_several_axes, of_a_computed_scale, read_twice, an_output,
     deviation_is_an_output, of_another_mean],
)  # fmt: skip
def test_what_is_left_alone(fuse: Fuse, seed: int, norm: Callable[[Net, str], str]) -> None:
    net = Net(17, seed=seed)
    x = net.conv(norm(net, net.depthwise(net.input(2, 8, 9, 9), 3)), 12)
    net.output(x)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == [("dw", False), ("pw", False)]
    check(model, result, seed)
