"""The tail of a classification network: a mean over the map and the layers behind it, however they are spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import ort_fcm
from tests.rewrite.networks import Net
from tests.rewrite.test_patterns import Fuse, modules, ops
from tests.rewrite.test_squeeze import check, stages

Make = Callable[[Net, str], str]
OUT = 11


def gemm(net: Net, x: str, out: int = OUT, bias: bool = True, flat_bias: bool = True, **attributes: Any) -> str:
    channels = net.channels[x]
    shape = (out, channels) if attributes.get("transB") else (channels, out)
    inputs = [x, net.const(net.rng.standard_normal(shape) / channels**0.5)]
    if bias:
        inputs.append(net.const(net.rng.standard_normal(out if flat_bias else (1, out))))
    y = str(net.op("Gemm", *inputs, **attributes))
    net.channels[y] = out
    return y


def matmul(net: Net, x: str, out: int = OUT) -> str:
    y = str(net.op("MatMul", x, net.const(net.rng.standard_normal((net.channels[x], out)) / net.channels[x] ** 0.5)))
    net.channels[y] = out
    return y


def pooled(net: Net, x: str) -> str:
    return str(net.op("GlobalAveragePool", x))


def mean(net: Net, x: str, keep: int) -> str:
    if net.opset >= 18:
        return str(net.op("ReduceMean", x, net.const([-1, -2], np.int64), keepdims=keep))
    return str(net.op("ReduceMean", x, axes=[2, 3], keepdims=keep))


def flat(net: Net, x: str) -> str:
    return str(net.op("Flatten", x))


def reshaped(net: Net, x: str, *shape: int) -> str:
    y = str(net.op("Reshape", x, net.const(shape, np.int64)))
    net.channels[y] = shape[1] if shape[1] > 0 else net.channels[x]
    return y


def squeezed(net: Net, x: str) -> str:
    if net.opset >= 13:
        return str(net.op("Squeeze", x, net.const([2, 3], np.int64)))
    return str(net.op("Squeeze", x, axes=[2, 3]))


TAILS: dict[str, tuple[int, Make]] = {
    "GlobalAveragePool, Flatten, Gemm": (17, lambda n, x: gemm(n, flat(n, pooled(n, x)), transB=1)),
    "Gemm of the other weight": (17, lambda n, x: gemm(n, flat(n, pooled(n, x)))),
    "Gemm without a bias": (17, lambda n, x: gemm(n, flat(n, pooled(n, x)), bias=False, transB=1)),
    "Reshape to any batch": (11, lambda n, x: gemm(n, reshaped(n, pooled(n, x), -1, n.channels[x]), transB=1)),
    "Reshape to any channels": (17, lambda n, x: gemm(n, reshaped(n, pooled(n, x), 0, -1), transB=1)),
    "Squeeze with an attribute": (11, lambda n, x: gemm(n, squeezed(n, pooled(n, x)), transB=1)),
    "Squeeze with an input": (17, lambda n, x: gemm(n, squeezed(n, pooled(n, x)), transB=1)),
    "ReduceMean, Flatten": (17, lambda n, x: gemm(n, flat(n, mean(n, x, 1)), transB=1)),
    "ReduceMean, axes dropped": (17, lambda n, x: gemm(n, mean(n, x, 0), transB=1)),
    "ReduceMean with axes as an input": (18, lambda n, x: gemm(n, mean(n, x, 0), transB=1)),
    "MatMul": (17, lambda n, x: matmul(n, mean(n, x, 0))),
    "MatMul, Add": (
        17,
        lambda n, x: n.op("Add", matmul(n, flat(n, pooled(n, x))), n.const(n.rng.standard_normal(OUT))),
    ),
    "Add, MatMul the other way round": (
        17,
        lambda n, x: n.op("Add", n.const(n.rng.standard_normal((1, OUT))), matmul(n, flat(n, pooled(n, x)))),
    ),
    "Identity and Dropout between": (
        17,
        lambda n, x: gemm(n, n.op("Dropout", flat(n, n.op("Identity", pooled(n, x)))), transB=1),
    ),
    "an activation": (17, lambda n, x: n.op("Sigmoid", gemm(n, flat(n, pooled(n, x)), transB=1))),
    "BatchNormalization of [N, C]": (17, lambda n, x: n.batch_norm(gemm(n, flat(n, pooled(n, x)), transB=1))),
    "a 1x1 convolution": (17, lambda n, x: flat(n, n.conv(pooled(n, x), OUT))),
}


@pytest.mark.parametrize("added_up", [False, True])
@pytest.mark.parametrize("tail", TAILS)
def test_a_tail_is_one_module(fuse: Fuse, seed: int, tail: str, added_up: bool) -> None:
    """It reads sums over the map from the module in front, or the map itself where another node makes it."""
    opset, make = TAILS[tail]
    net = Net(opset, seed=seed)
    x = net.conv(net.input("batch", 8, "height", "width"), 24)
    net.output(make(net, net.op("Relu" if added_up else "Softsign", x)), rank=2)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == ["pw", "mean-pw"]
    assert set(ops(result)) <= {"FusedConvModule", "Transpose", "Reshape", "Flatten", "Softsign"}
    front, behind = (module["node"] for module in modules(result))
    if added_up:
        assert behind.input[0] == front.output[1]
    else:
        assert len(front.output) == 1 and behind.input[0].endswith("/nhwc"), "the map itself, channels-last"
    check(model, result, seed)


TWO: dict[str, Make] = {
    "convolution and Gemm": lambda n, x: gemm(n, flat(n, n.op("HardSwish", n.conv(pooled(n, x), 13))), transB=1),
    "two Gemm": lambda n, x: gemm(n, n.op("Dropout", n.op("HardSwish", gemm(n, flat(n, pooled(n, x)), 13))), transB=1),
    "Gemm and MatMul": lambda n, x: matmul(n, n.op("Relu", gemm(n, mean(n, x, 0), 13))),
}


def cut_apart(monkeypatch: pytest.MonkeyPatch, keep: tuple[int, ...] = (0, 1, 2)) -> None:
    """Every layer a module of its own, of the tail those that are in `keep`."""
    from ort_fcm.rewrite import pipeline
    from ort_fcm.rewrite.plan import Planned, Segment

    def plan(view: Any, chains: Any, *_: Any) -> Planned:
        alone = [
            Segment((stage,), "ANY", "", 0, 0, 0.0)
            for chain in chains
            for place, stage in enumerate(chain)
            if not chain[0].mean or place in keep
        ]
        return Planned(alone, {}, (0, 0), (0, 0), [])

    monkeypatch.setattr(pipeline, "make_plan", plan)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tail", TWO)
def test_two_layers_are_one_module(fuse: Fuse, seed: int, tail: str, dtype: Any) -> None:
    net = Net(17, dtype, seed)
    net.output(TWO[tail](net, net.conv(net.input(3, 8, 5, 7), 24)), rank=2)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == ["pw", "mean-pw-pw"]
    check(model, result, seed, 4e-3 if dtype == np.float16 else 2e-5)


@pytest.mark.parametrize(
    ("keep", "expected"), [((0, 1), ["pw", "mean-pw", "pw"]), ((0,), ["pw", "mean-pw"]), ((1,), ["pw", "pw"])]
)
@pytest.mark.parametrize("tail", TWO)
def test_two_layers_may_be_planned_apart(
    monkeypatch: pytest.MonkeyPatch, seed: int, tail: str, keep: tuple[int, ...], expected: list[str]
) -> None:
    """Between two modules there is a map of one pixel, [N, 1, 1, C]; ONNX Runtime's own Gemm has [N, C]."""
    cut_apart(monkeypatch, keep)
    net = Net(17, seed=seed)
    net.output(TWO[tail](net, net.conv(net.input("batch", 8, "height", "width"), 24)), rank=2)
    model = net.model()
    result = ort_fcm.rewrite(model, gpu="H200", check=False).model
    assert stages(result) == expected
    if keep == (0, 1):
        first, second = (module["node"] for module in modules(result)[1:])
        assert second.input[0] == first.output[0] and ops(result).get("Reshape", 0) <= 1
    check(model, result, seed)


def test_the_output_of_a_layer_may_be_needed_besides(fuse: Fuse, seed: int) -> None:
    net = Net(17, seed=seed)
    mean = flat(net, pooled(net, net.conv(net.input("batch", 8, "h", "w"), 24)))
    hidden = net.op("Relu", gemm(net, mean, 40))  # of which ReLU leaves enough values
    net.output(hidden, gemm(net, hidden, transB=1), net.op("Softmax", hidden), rank=2)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == ["pw", "mean-pw", "pw"]
    check(model, result, seed)


def test_several_heads_on_one_mean(fuse: Fuse, seed: int) -> None:
    net = Net(17, seed=seed)
    shared = flat(net, pooled(net, net.conv(net.input("batch", 8, "height", "width"), 24)))
    net.output(gemm(net, shared, 5), gemm(net, shared, 7, transB=1), rank=2)
    model = net.model()
    result = fuse(model).model
    assert stages(result) == ["pw", "pw", "pw"] and ops(result)["GlobalAveragePool"] == 1
    check(model, result, seed)


def test_a_gate_of_fully_connected_layers(fuse: Fuse, seed: int) -> None:
    net = Net(17, seed=seed)
    x = net.input("batch", 8, "height", "width")
    y = net.depthwise(net.op("Relu", net.conv(x, 24)))
    factors = net.op("Sigmoid", gemm(net, net.op("Relu", gemm(net, flat(net, pooled(net, y)), 5)), 24, transB=1))
    product = net.op("Mul", y, net.op("Unsqueeze", factors, net.const([2, 3], np.int64)))
    net.channels[product] = 24
    net.output(net.op("Add", net.conv(product, 8), x))
    model = net.model()
    result = fuse(model).model
    assert stages(result) == ["pw-dw", "mean-pw-pw", "pw"]
    expand, squeeze, project = (module["node"] for module in modules(result))
    assert expand.output[1] == squeeze.input[0] and squeeze.output[0] == project.input[11]
    check(model, result, seed)


def of_the_caller(net: Net, x: str) -> str:
    return str(net.op("Gemm", flat(net, pooled(net, x)), net.input(24, OUT, name="weight")))


def bias_for_each_image(net: Net, x: str) -> str:
    weight = net.const(net.rng.standard_normal((24, OUT)))
    return str(net.op("Gemm", flat(net, pooled(net, x)), weight, net.input("batch", OUT, name="bias")))


def sum_of_halves(net: Net, x: str) -> str:
    y = str(net.op("Concat", flat(net, pooled(net, x)), flat(net, pooled(net, x)), axis=1))
    net.channels[y] = 2 * net.channels[x]
    return y


LEFT: dict[str, tuple[Make, str]] = {
    "alpha": (lambda n, x: gemm(n, flat(n, pooled(n, x)), alpha=0.5), "a Gemm with alpha, beta or transA"),
    "beta": (lambda n, x: gemm(n, flat(n, pooled(n, x)), beta=2.0), "a Gemm with alpha, beta or transA"),
    "weight of the caller": (of_the_caller, "the weight is not constant: 'weight' is an input"),
    "bias for each image": (bias_for_each_image, "the bias is not constant: 'bias' is an input"),
    "bias of two axes": (
        lambda n, x: gemm(n, flat(n, pooled(n, x)), flat_bias=False),
        "the bias does not have one value for each output channel",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_has_a_reason(fuse: Fuse, seed: int, name: str) -> None:
    make, reason = LEFT[name]
    net = Net(17, seed=seed)
    net.output(make(net, net.conv(net.input("batch", 8, "height", "width"), 24)), rank=2)
    model = net.model()
    done = fuse(model)
    assert stages(done.model) == ["pw"] and ops(done.model)["Gemm"] == 1
    assert [item.reason for item in done.report.skipped] == [reason]
    assert done.report.convolutions == 2 and done.report.in_modules == 1
    check(model, done.model, seed)


OTHERS: dict[str, Make] = {
    "Gemm of a whole map": lambda n, x: gemm(n, reshaped(n, x, 0, 24 * 35), transB=1),
    "maximum": lambda n, x: gemm(n, flat(n, n.op("GlobalMaxPool", x)), transB=1),
    "mean of rows": lambda n, x: gemm(n, reshaped(n, n.op("ReduceMean", x, axes=[2]), 0, 24 * 7), transB=1),
    "mean of two": lambda n, x: gemm(n, sum_of_halves(n, x), transB=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_gemms_are_none_of_ours(fuse: Fuse, seed: int, name: str) -> None:
    net = Net(17, seed=seed)
    x = net.conv(net.input("batch", 8, 5, 7), 24)
    net.output(OTHERS[name](net, x), rank=2)
    model = net.model()
    done = fuse(model)
    assert stages(done.model) == ["pw"] and ops(done.model)["Gemm"] == 1
    assert not done.report.skipped and done.report.convolutions == 1


def test_the_planner_takes_the_tail_of_a_network(seed: int) -> None:
    net = Net(17, seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 320, 7, 7), 1280))
    net.output(gemm(net, flat(net, pooled(net, x)), 1000, transB=1), rank=2)
    model = net.model()
    done = ort_fcm.rewrite(model, gpu="H200")
    assert [module.variant for module in done.report.modules] == ["PW+POOL", "MEAN+PW"]
    assert done.report.convolutions == done.report.in_modules == 2
    check(model, done.model, seed)


def test_a_mean_over_a_large_map_is_left_to_a_kernel_of_its_own(seed: int) -> None:
    """Few channels and many pixels: a thread block or two would read them all."""
    net = Net(17, seed=seed)
    x = net.op("Softsign", net.conv(net.input(1, 8, 160, 160), 24))
    net.output(gemm(net, net.op("Relu", gemm(net, flat(net, pooled(net, x)), 6)), 24), rank=2)
    model = net.model()
    done = ort_fcm.rewrite(model, gpu="H200")
    assert ops(done.model)["GlobalAveragePool"] == 1
    assert not any(module.stages.startswith("mean") for module in done.report.modules)
    check(model, done.model, seed)


def test_weights_shared_with_other_nodes(fuse: Fuse, seed: int) -> None:
    net = Net(17, seed=seed)
    x = flat(net, pooled(net, net.conv(net.input("batch", 8, "height", "width"), 24)))
    weight = net.const(net.rng.standard_normal((24, OUT)))
    y = net.op("Gemm", x, weight)
    net.output(y, net.op("MatMul", y, net.op("Transpose", weight, perm=[1, 0])), rank=2)
    model: onnx.ModelProto = net.model()
    result = fuse(model).model
    assert "mean-pw" in "".join(stages(result))
    check(model, result, seed)
