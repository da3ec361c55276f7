"""Squeeze-and-excite: what of it folds into modules, however it is spelled, and that the result computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import ort_fcm
from ort_fcm import library_path
from tests.rewrite.networks import Net, assert_same
from tests.rewrite.test_patterns import Fuse, clip06, modules, ops

Make = Callable[[Net, str], str]
PARTS = ["pw-dw", "mean-pw-pw", "pw"]


def axes_kept(net: Net, x: str) -> str:
    if net.opset >= 18:
        return str(net.op("ReduceMean", x, net.const([2, 3], np.int64), keepdims=1))
    return str(net.op("ReduceMean", x, axes=[-2, -1], keepdims=1))


def axes_dropped(net: Net, x: str) -> str:
    mean = str(net.op("ReduceMean", x, axes=[2, 3], keepdims=0))
    return str(net.op("Unsqueeze", mean, net.const([2, 3], np.int64)))


def reshaped(net: Net, x: str) -> str:
    mean = str(net.op("ReduceMean", x, axes=[2, 3], keepdims=0))
    return str(net.op("Reshape", mean, net.const([-1, net.channels[x], 1, 1], np.int64)))


POOLS: dict[str, tuple[int, Make]] = {
    "GlobalAveragePool": (13, lambda n, x: str(n.op("GlobalAveragePool", x))),
    "ReduceMean with an attribute": (13, axes_kept),
    "ReduceMean with an input": (18, axes_kept),
    "axes dropped and put back": (17, axes_dropped),
    "axes dropped, then Reshape": (17, reshaped),
}
ACTIVATIONS: dict[str, Make] = {
    "relu": lambda n, x: str(n.op("Relu", x)),
    "silu": lambda n, x: str(n.op("Mul", x, n.op("Sigmoid", x))),
    "hardswish": lambda n, x: str(n.op("HardSwish", x)),
}
GATES: dict[str, Make] = {
    "sigmoid": lambda n, x: str(n.op("Sigmoid", x)),
    "hardsigmoid": lambda n, x: str(n.op("HardSigmoid", x, alpha=1 / 6)),
    "add clip div": lambda n, x: str(n.op("Div", clip06(n, n.op("Add", x, n.const(3))), n.const(6))),
}


def gate(net: Net, x: str, pool: str, activation: str, last: str) -> str:
    squeezed = ACTIVATIONS[activation](net, net.conv(POOLS[pool][1](net, x), 5))
    return GATES[last](net, net.conv(squeezed, net.channels[x]))


def block(
    net: Net,
    x: str,
    pool: str = "GlobalAveragePool",
    activation: str = "relu",
    last: str = "sigmoid",
    swap: bool = False,
) -> str:
    """An inverted residual block with squeeze-and-excite and its Add."""
    y = ACTIVATIONS[activation](net, net.conv(x, 24))
    y = ACTIVATIONS[activation](net, net.depthwise(y, 5))
    factors = gate(net, y, pool, activation, last)
    product = str(net.op("Mul", *((factors, y) if swap else (y, factors))))
    return str(net.op("Add", net.conv(product, net.channels[x]), x))


def stages(model: onnx.ModelProto) -> list[str]:
    return [str(module["stages"]) for module in modules(model)]


def check(model: onnx.ModelProto, result: onnx.ModelProto, seed: int, tolerance: float = 2e-5) -> None:
    assert_same(model, result, seed, tolerance)
    assert_same(model, result, seed, tolerance, str(library_path()))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("last", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_block_is_three_modules(fuse: Fuse, seed: int, pool: str, activation: str, last: str, swap: bool) -> None:
    net = Net(max(POOLS[pool][0], 14 if activation == "hardswish" else 0), seed=seed)
    net.output(block(net, net.input("batch", 8, "height", "width"), pool, activation, last, swap))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == PARTS
    assert set(ops(result)) <= {"FusedConvModule", "Transpose"}
    expand, squeeze, project = (module["node"] for module in modules(result))
    assert expand.output[1] == squeeze.input[0] and squeeze.output[0] == project.input[11]
    check(model, result, seed)


def test_blocks_follow_one_another_in_half_precision(fuse: Fuse, seed: int) -> None:
    net = Net(17, np.float16, seed)
    x = net.input(2, 16, 9, 7)
    for activation, last in (("silu", "sigmoid"), ("hardswish", "hardsigmoid")):
        x = block(net, x, activation=activation, last=last)
    net.output(x)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == PARTS * 2
    check(model, result, seed, 4e-3)


def test_the_planner_names_the_parts(seed: int) -> None:
    net = Net(17, seed=seed)
    net.output(block(net, net.input(1, 64, 28, 28)))
    model = net.model()
    done = ort_fcm.rewrite(model, gpu="H200")
    variants = [module.variant for module in done.report.modules]
    *front, pooled, gate, scaled = (name.replace("_R", "") for name in variants)
    assert (gate, scaled) == ("MEAN+PWPW", "SCALE+PW")
    assert (front, pooled) in (([], "PWDW+POOL"), (["PW"], "DW+POOL"))  # whichever is estimated to be faster
    assert done.report.convolutions == done.report.in_modules == 5
    assert done.report.fused_convolutions == 4 - 2 * len(front)
    check(model, done.model, seed)


def squeeze_is_an_output(net: Net, x: str) -> list[str]:
    y = net.depthwise(x)
    pooled = str(net.op("GlobalAveragePool", y))
    factors = str(net.op("Sigmoid", net.conv(net.op("Relu", net.conv(pooled, 5)), net.channels[x])))
    return [pooled, net.conv(net.op("Mul", y, factors), 6)]


def no_second_layer(net: Net, x: str) -> list[str]:
    y = net.depthwise(x)
    factors = str(net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", y), net.channels[x])))
    return [net.conv(net.op("Mul", y, factors), 6)]


def no_depthwise(net: Net, x: str) -> list[str]:
    y = net.conv(x, 24)
    return [net.conv(net.op("Mul", y, gate(net, y, "GlobalAveragePool", "relu", "sigmoid")), 6)]


def mean_of_rows(net: Net, x: str) -> list[str]:
    y = net.depthwise(x)
    mean = str(net.op("ReduceMean", y, axes=[2], keepdims=1))
    factors = str(net.op("Sigmoid", net.conv(net.op("Relu", net.conv(mean, 5)), net.channels[x])))
    return [net.conv(net.op("Mul", y, factors), 6)]


@pytest.mark.parametrize(
    ("build", "expected", "left"),
    [
        (squeeze_is_an_output, ["dw", "pw-pw", "pw"], {"GlobalAveragePool": 1}),
        (no_second_layer, ["dw", "mean-pw", "pw"], {}),
        (no_depthwise, ["pw", "mean-pw-pw", "pw"], {}),
        (mean_of_rows, ["dw", "pw-pw", "pw"], {"ReduceMean": 1, "Mul": 1}),
    ],
)
def test_what_is_no_gate(fuse: Fuse, seed: int, build: Any, expected: list[str], left: dict[str, int]) -> None:
    net = Net(seed=seed)
    net.output(*build(net, net.input("batch", 8, "height", "width")))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == expected
    assert {op: count for op, count in ops(result).items() if op not in ("FusedConvModule", "Transpose")} == left
    check(model, result, seed)


def factors_of_the_caller(net: Net, x: str) -> list[str]:
    return [net.conv(net.op("Mul", net.input("batch", 8, 1, 1, name="factors"), x), 6)]


def factors_for_all_images(net: Net, x: str) -> list[str]:
    return [net.conv(net.op("Mul", net.input(1, 8, 1, 1, name="factors"), x), 6)]


def factors_for_each_pixel(net: Net, x: str) -> list[str]:
    return [net.conv(net.op("Mul", net.input("batch", 8, "height", "width", name="factors"), x), 6)]


def product_used_twice(net: Net, x: str) -> list[str]:
    product = str(net.op("Mul", net.input("batch", 8, 1, 1, name="factors"), x))
    return [net.conv(product, 6), product]


def product_for_a_depthwise(net: Net, x: str) -> list[str]:
    return [net.depthwise(net.op("Mul", net.input("batch", 8, 1, 1, name="factors"), x))]


@pytest.mark.parametrize(
    ("build", "folds"),
    [
        (factors_of_the_caller, True),
        (factors_for_all_images, False),
        (factors_for_each_pixel, False),
        (product_used_twice, False),
        (product_for_a_depthwise, False),
    ],
)
def test_which_factors_a_pointwise_takes(fuse: Fuse, seed: int, build: Any, folds: bool) -> None:
    net = Net(seed=seed)
    net.output(*build(net, net.input("batch", 8, "height", "width")))
    model = net.model()
    result = fuse(model).model
    assert len(modules(result)) == 1 and ("Mul" in ops(result)) != folds
    check(model, result, seed)


def test_a_gate_whose_depthwise_is_left_alone_reads_the_map(
    monkeypatch: pytest.MonkeyPatch, fuse: Fuse, seed: int
) -> None:
    """The planner may leave the depthwise to ONNX Runtime: then the gate takes the mean itself."""
    from ort_fcm.rewrite import pipeline

    planned = pipeline.make_plan

    def without_depthwise(*args: Any) -> Any:
        plan = planned(*args)
        plan.segments[:] = [segment for segment in plan.segments if not segment.kinds.endswith("dw")]
        return plan

    monkeypatch.setattr(pipeline, "make_plan", without_depthwise)
    net = Net(seed=seed)
    net.output(block(net, net.input("batch", 8, "height", "width")))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == PARTS[1:]
    check(model, result, seed)
