"""Each pattern on its own: what is recognised, and that the result computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ort_fcm import library_path
from tests.rewrite.networks import Net, assert_same

Fuse = Callable[..., Any]


def modules(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The attributes of every module, with its node under `node`."""
    result = []
    for node in model.graph.node:
        if node.op_type == "FusedConvModule":
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            values = {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
            result.append(values | {"node": node})
    return result


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def mul(net: Net, x: str, value: float) -> str:
    return str(net.op("Mul", x, net.const(value)))


def add(net: Net, x: str, value: float) -> str:
    return str(net.op("Add", x, net.const(value)))


def clip06(net: Net, x: str) -> str:
    return str(net.op("Clip", x, net.const(0), net.const(6)))


SPELLINGS: dict[str, tuple[str, Callable[[Net, str], str]]] = {
    "relu": ("relu", lambda n, x: n.op("Relu", x)),
    "max 0": ("relu", lambda n, x: n.op("Max", x, n.const(0))),
    "clip": ("clip", lambda n, x: n.op("Clip", x, n.const(-1), n.const(1.5))),
    "clip without maximum": ("clip", lambda n, x: n.op("Clip", x, n.const(-1))),
    "clip without minimum": ("clip", lambda n, x: n.op("Clip", x, "", n.const(0.5))),
    "min max": ("clip", lambda n, x: n.op("Min", n.op("Max", x, n.const(0)), n.const(6))),
    "relu then min": ("clip", lambda n, x: n.op("Min", n.op("Relu", x), n.const(6))),
    "hardswish": ("hardswish", lambda n, x: n.op("HardSwish", x)),
    "add clip div mul": ("hardswish", lambda n, x: n.op("Mul", x, n.op("Div", clip06(n, add(n, x, 3)), n.const(6)))),
    "add clip mul mul": ("hardswish", lambda n, x: n.op("Mul", mul(n, clip06(n, add(n, x, 3)), 1 / 6), x)),
    "add clip mul div": ("hardswish", lambda n, x: n.op("Div", n.op("Mul", x, clip06(n, add(n, x, 3))), n.const(6))),
    "hardsigmoid mul": ("hardswish", lambda n, x: n.op("Mul", n.op("HardSigmoid", x, alpha=1 / 6), x)),
    "silu": ("silu", lambda n, x: n.op("Mul", x, n.op("Sigmoid", x))),
    "silu by exp": ("silu", lambda n, x: n.op("Div", x, add(n, n.op("Exp", n.op("Neg", x)), 1))),
    "sigmoid": ("sigmoid", lambda n, x: n.op("Sigmoid", x)),
    "hardsigmoid": ("hardsigmoid", lambda n, x: n.op("HardSigmoid", x, alpha=0.3, beta=0.4)),
    "add clip div": ("hardsigmoid", lambda n, x: n.op("Div", clip06(n, add(n, x, 3)), n.const(6))),
    "tanh": ("tanh", lambda n, x: n.op("Tanh", x)),
    "leakyrelu": ("leakyrelu", lambda n, x: n.op("LeakyRelu", x, alpha=0.2)),
    "max of x and a part": ("leakyrelu", lambda n, x: n.op("Max", x, mul(n, x, 0.1))),
    "prelu": ("prelu", lambda n, x: n.op("PRelu", x, n.const(n.rng.uniform(0, 1, (n.channels[x], 1, 1))))),
    "prelu, one slope": ("prelu", lambda n, x: n.op("PRelu", x, n.const([0.3]))),
    "gelu by erf": (
        "gelu",
        lambda n, x: mul(n, n.op("Mul", x, add(n, n.op("Erf", n.op("Div", x, n.const(2**0.5))), 1)), 0.5),
    ),
    "gelu, half first": (
        "gelu",
        lambda n, x: n.op("Mul", mul(n, x, 0.5), add(n, n.op("Erf", mul(n, x, 0.5**0.5)), 1)),
    ),
    "gelu by tanh": (
        "gelu_tanh",
        lambda n, x: n.op(
            "Mul",
            mul(n, x, 0.5),
            add(
                n,
                n.op(
                    "Tanh",
                    mul(n, n.op("Add", x, mul(n, n.op("Pow", x, n.const(3)), 0.044715)), (2 / np.pi) ** 0.5),
                ),
                1,
            ),
        ),
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", SPELLINGS)
def test_activation_is_recognised(name: str, dtype: Any, fuse: Fuse, seed: int) -> None:
    kind, spell = SPELLINGS[name]
    net = Net(dtype=dtype, seed=seed)
    x = net.conv(net.input(1, 8, 9, 11), 12)
    net.output(net.depthwise(spell(net, x)))
    model = net.model()
    result = fuse(model)
    (module,) = modules(result.model)
    assert module["stages"] == "pw-dw" and module["activations"] == f"{kind},none"
    assert ops(result.model) == {"FusedConvModule": 1}
    assert_same(model, result.model, seed, 2e-5 if dtype == np.float32 else 1e-2)


@pytest.mark.parametrize(
    "spell",
    [
        lambda n, x: n.op("Mul", x, n.op("Sigmoid", mul(n, x, 1.702))),
        lambda n, x: n.op("Elu", x),
        lambda n, x: n.op("Mul", n.op("Relu", x), n.op("Relu", x)),
        lambda n, x: n.op("Mul", x, n.op("HardSigmoid", x, alpha=0.2)),
    ],
    ids=["quick gelu", "elu", "squared relu", "nearly hardswish"],
)
def test_what_is_no_activation_stays(spell: Callable[[Net, str], str], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input(1, 8, 9, 11), 12)
    net.output(net.depthwise(spell(net, x)))
    model = net.model()
    result = fuse(model)
    assert [module["activations"] for module in modules(result.model)] == ["none", "none"]
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 14, 18, 20, 22])
def test_every_opset(opset: int, fuse: Fuse, seed: int) -> None:
    """Clip by attributes or inputs, axes by attribute or input, activations that the opset has no operator for."""
    net = Net(opset=opset, seed=seed)
    x = net.conv(net.input("batch", 8, 9, 11), 12, bias=False)
    x = net.batch_norm(x)
    x = net.op("Clip", x, min=-0.5, max=6.0) if opset < 11 else net.op("Clip", x, net.const(-0.5), net.const(6))
    x = net.depthwise(x, strides=[2, 2])
    x = net.op("Mul", x, net.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    x = net.conv(x, 16)
    net.output(net.op("Flatten", net.op("GlobalAveragePool", x)), rank=2)
    model = net.model()
    result = fuse(model)
    (module,) = modules(result.model)
    assert module["stages"] == "pw-dw-pw" and module["activations"] == "clip,hardswish,none"
    assert module["activation_params"][:2] == [-0.5, 6.0] and module["output_layout"] == "NCHW"
    assert set(ops(result.model)) == {"FusedConvModule", "GlobalAveragePool", "Flatten"}
    assert_same(model, result.model, seed)


def test_batch_normalization_and_factors_fold(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.batch_norm(net.conv(net.input(1, 3, 15, 15), 8, 3, strides=[2, 2]))
    x = net.op("Relu", x)
    x = net.depthwise(x, bias=False)
    x = net.op("Mul", x, net.const(net.rng.uniform(0.5, 2, (1, 8, 1, 1))))
    x = net.op("Sub", net.const(net.rng.standard_normal((8, 1, 1))), x)
    x = net.op("Relu", x)
    x = net.op("Div", net.conv(x, 6), net.const(1.7))
    net.output(x)
    model = net.model()
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 1}
    assert modules(result.model)[0]["stages"] == "conv-dw-pw"
    assert_same(model, result.model, seed)


def test_a_shared_weight_is_not_changed_for_its_other_user(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.input(1, 8, 7, 7)
    a = net.conv(x, 8)
    shared = net.nodes[-1].input[1]
    b = net.op("Conv", x, shared)
    net.output(net.batch_norm(a), b, net.op("Relu", shared))
    model = net.model()
    assert_same(model, fuse(model).model, seed)


@pytest.mark.parametrize("shared", [False, True])
def test_pad_folds(shared: bool, fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 8, 9, 9), 8))
    padded = net.op("Pad", x, net.const([0, 0, 0, 1, 0, 0, 2, 3], np.int64))
    net.channels[padded] = 8
    net.output(net.depthwise(padded, strides=[2, 2], pads=[0, 0, 0, 0]), *([padded] if shared else []))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == (["pw", "dw"] if shared else ["pw-dw"])
    assert modules(result.model)[-1]["pads"][-4:] == [0, 1, 2, 3]
    assert ops(result.model)["Pad"] == int(shared)
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("amounts, mode, value", [
    ([0, 0, 1, 1, 0, 0, 1, 1], "reflect", 0), ([0, 0, 1, 1, 0, 0, 1, 1], "constant", 1),
    ([0, 0, 1, 1, 0, 0, -1, 1], "constant", 0), ([0, 1, 1, 1, 0, 1, 1, 1], "constant", 0),
])  # fmt: skip
def test_other_pads_stay(amounts: list[int], mode: str, value: float, fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input(1, 6, 9, 9), 6)
    x = net.op("Pad", x, net.const(amounts, np.int64), *([net.const(value)] if mode == "constant" else []), mode=mode)
    net.channels[x] = 6 + 2 * amounts[1]
    net.output(net.depthwise(x))
    model = net.model()
    result = fuse(model)
    assert ops(result.model)["Pad"] == 1
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
def test_auto_pad(auto_pad: str, stride: int, size: tuple[int, int], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input(1, 8, *size), 8)
    net.output(net.depthwise(x, (5, 4), auto_pad=auto_pad, strides=[stride, stride]))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == ["pw-dw"]
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("window", [
    {"kernel": 5}, {"kernel": 7, "strides": [2, 2]}, {"kernel": (3, 5), "pads": [0, 2, 1, 0]},
    {"kernel": 3, "dilations": [2, 3]}, {"kernel": (1, 3)}, {"kernel": 3, "bias": False}, {"kernel": 1},
])  # fmt: skip
def test_windows(window: dict[str, Any], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.conv(net.op("Relu", net.depthwise(net.input(2, 10, 14, 13), **window)), 7))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == ["dw-pw"]
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("behind", ["module", "input"])
@pytest.mark.parametrize("norm", [False, True])
def test_depthwise_with_a_channel_multiplier(behind: str, norm: bool, fuse: Fuse, seed: int) -> None:
    """It reads each channel several times: a Gather repeats them, in whatever layout its neighbours have."""
    net = Net(seed=seed)
    x = net.input("n", 8, "h", "w")
    if behind == "module":
        x = net.op("Relu", net.conv(x, 6))
    y = net.conv(x, 3 * net.channels[x], 3, group=net.channels[x], strides=[2, 2])
    y = net.op("HardSwish", net.batch_norm(y) if norm else y)
    net.output(net.conv(y, 10), net.conv(x, 2 * net.channels[x], 5, group=net.channels[x]))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == ["pw", "dw-pw", "dw"][behind == "input" :]
    assert ops(result.model)["Gather"] == 2
    if behind == "module":
        assert "Transpose" not in ops(result.model)
    assert_same(model, result.model, seed)
    assert_same(model, result.model, seed, library=str(library_path()))


@pytest.mark.parametrize("channels, group, out", [(3, 3, 12), (4, 2, 8), (2, 2, 6), (4, 4, 8)])
@pytest.mark.parametrize("norm", [False, True])
def test_groups_of_few_channels_are_a_stem(
    channels: int, group: int, out: int, norm: bool, fuse: Fuse, seed: int
) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input(1, channels, 16, 15), out, 3, group=group, strides=[2, 2], bias=norm)
    net.output(net.depthwise(net.op("Relu", net.batch_norm(x) if norm else x)))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == ["conv-dw"]
    assert_same(model, result.model, seed)
    assert_same(model, result.model, seed, library=str(library_path()))


def residual_net(order: str, swap: bool, seed: int, after: bool) -> onnx.ModelProto:
    net = Net(seed=seed)
    x = net.input("n", 8, "h", "w")
    y = net.op("Relu", net.conv(x, 24))
    y = net.op("Relu", net.depthwise(y))
    y = net.conv(y, 8)
    if order == "activation first":
        y = net.op("HardSwish", y)
    y = net.op("Add", *((x, y) if swap else (y, x)))
    if after:
        y = net.op("Relu", y)
    net.output(net.op("Softmax", y, axis=1))
    return net.model()


@pytest.mark.parametrize("order", ["activation first", "add first"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_residual(order: str, swap: bool, after: bool, fuse: Fuse, seed: int) -> None:
    """Sizes are dynamic: that both operands have one shape is proved, not read."""
    model = residual_net(order, swap, seed, after)
    result = fuse(model)
    (module,) = modules(result.model)
    assert module["node"].input[7] and module["stages"] == "pw-dw-pw"
    assert module["activations"] == ("relu,relu,hardswish" if order == "activation first" else "relu,relu,none")
    assert module.get("output_activation", "none") == ("relu" if after else "none")
    assert_same(model, result.model, seed)


def test_an_add_that_broadcasts_is_no_residual(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.input("n", 8, "h", "w")
    net.output(net.op("Add", net.conv(x, 8), net.op("GlobalAveragePool", x)))
    model = net.model()
    result = fuse(model)
    assert all(len(m["node"].input) <= 7 for m in modules(result.model)) and ops(result.model)["Add"] == 1
    assert_same(model, result.model, seed)


def test_an_add_of_sizes_that_only_may_be_equal_is_no_residual(fuse: Fuse, seed: int) -> None:
    """They are where the tests run it: the pool leaves one pixel, which broadcasts."""
    net = Net(seed=seed)
    x = net.input("n", 8, "h", "w")
    net.output(net.op("Add", net.conv(x, 8), net.op("MaxPool", x, kernel_shape=[13, 17], strides=[2, 2])))
    model = net.model()
    result = fuse(model, check=False)  # no size of the check's suits
    assert all(len(m["node"].input) <= 7 for m in modules(result.model)) and ops(result.model)["Add"] == 1
    assert_same(model, result.model, seed)


def test_two_branches_meet_in_one_add(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 3, 21, 21), 8, 3))
    main = net.conv(net.op("Relu", net.depthwise(x, strides=[2, 2])), 12)
    net.output(net.op("Add", net.conv(x, 12, strides=[2, 2]), main))
    model = net.model()
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 3}
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("activation, params, extra", [
    ("Relu", None, False), ("LeakyRelu", [0.2], False), ("Clip", [-1.0, 2.0], False), ("HardSigmoid", [0.3, 0.4], True),
    ("", None, True), ("Sigmoid", None, True), ("Tanh", None, False),
])  # fmt: skip
def test_fused_conv(activation: str, params: list[float] | None, extra: bool, fuse: Fuse, seed: int) -> None:
    """com.microsoft FusedConv: the fourth input is added before the activation."""
    net = Net(seed=seed)
    x = net.input(1, 8, 9, 9)
    y = net.conv(x, 8)
    node = net.nodes[-1]
    node.op_type, node.domain = "FusedConv", "com.microsoft"
    if activation:
        node.attribute.append(helper.make_attribute("activation", activation))
    if params:
        node.attribute.append(helper.make_attribute("activation_params", params))
    if extra:
        node.input.append(x)
    net.output(net.depthwise(y))
    model = net.model()
    result = fuse(model)
    assert sum(len(m["stages"].split("-")) for m in modules(result.model)) == 2
    assert "FusedConv" not in ops(result.model)
    assert_same(model, result.model, seed)


def test_identity_dropout_and_constant_nodes(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    zero, six = net.op("Constant", value_float=0.0), net.op("Identity", net.op("Constant", value_float=6.0))
    weight = net.op("Identity", net.const(net.rng.standard_normal((12, 8, 1, 1))))
    x = net.op("Identity", net.op("Conv", net.input(1, 8, 9, 9), weight))
    net.channels[x] = 12
    x = net.op("Dropout", net.op("Clip", x, zero, six))
    net.output(net.op("Identity", net.depthwise(x)))
    model = net.model()
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 1, "Identity": 1}  # the latter names the graph output
    assert modules(result.model)[0]["activations"] == "clip,none"
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("reason, build", [
    ("grouped convolution (2 groups of 4", lambda n, x: n.conv(x, 16, 3, group=2)),
    ("dense 3x3 convolution over 8 channels", lambda n, x: n.conv(x, 16, 3)),
    ("is computed by Mul", lambda n, x: n.op("Conv", x, n.op("Mul", x, n.const(2)), group=1)),
])  # fmt: skip
def test_reasons(reason: str, build: Callable[[Net, str], str], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(build(net, net.input(1, 8, 9, 9)))
    model = net.model()
    result = fuse(model)
    (skipped,) = result.report.skipped
    assert reason in skipped.reason and skipped.node.startswith("Conv_")
    assert result.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_patches_of_many_channels(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input("batch", 96, "height", "width"), 20, 2, pads=(0,) * 4, strides=[2, 2])
    net.output(x)
    model = net.model()
    result = fuse(model)
    assert [module["stages"] for module in modules(result.model)] == ["conv"]
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("shape, kernel", [((1, 8, 30), (3,)), ((1, 8, 5, 6, 7), (3, 3, 3))])
def test_one_and_three_dimensions_stay(shape: tuple[int, ...], kernel: tuple[int, ...], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.conv(net.input(*shape), 8, kernel, group=8), rank=len(shape))
    result = fuse(net.model())
    assert f"a {len(kernel)}-D convolution" in result.report.skipped[0].reason


def test_weights_that_constants_make(fuse: Fuse, seed: int) -> None:
    """Weights kept in float16, filters transposed and reshaped, a normalisation spelled out."""
    net = Net(seed=seed)
    x = net.input(1, 8, 9, 9)
    stored = net.const(net.rng.standard_normal((12, 8)), np.float16)
    weight = net.op("Reshape", net.op("Cast", stored, to=TensorProto.FLOAT), net.const([12, 8, 1, 1], np.int64))
    x = net.op("Relu", net.op("Conv", x, weight))
    scale = net.op("Div", net.const(net.rng.standard_normal((12, 1))), net.op("Sqrt", net.const(np.full((1, 1), 2.0))))
    last = net.op("Transpose", net.const(net.rng.standard_normal((3, 3, 12, 1))), perm=[2, 3, 0, 1])
    scaled = net.op("Mul", last, net.op("Unsqueeze", scale, net.const([2, 3], np.int64)))
    net.output(net.op("Conv", x, scaled, net.op("Neg", net.const(net.rng.standard_normal(12))), group=12))
    model = net.model()
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 1} and modules(result.model)[0]["stages"] == "pw-dw"
    assert_same(model, result.model, seed)


def test_names_of_other_domains_mean_nothing(fuse: Fuse, seed: int) -> None:
    """A local function that is called Relu, and is none."""
    net = Net(seed=seed)
    x = net.conv(net.input(1, 8, 9, 9), 8)
    x = net.op("Relu", x, domain="mine")
    net.channels[x] = 8
    net.output(net.op("Add", net.depthwise(x), x, domain="mine"))
    bodies = {
        "Relu": helper.make_function("mine", "Relu", ["x"], ["y"], [helper.make_node("Abs", ["x"], ["y"])],
                                     [helper.make_opsetid("", 17)]),
        "Add": helper.make_function("mine", "Add", ["a", "b"], ["y"], [helper.make_node("Sub", ["a", "b"], ["y"])],
                                    [helper.make_opsetid("", 17)]),
    }  # fmt: skip
    graph = helper.make_graph(net.nodes, "net", net.inputs, net.outputs, net.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(bodies.values()))
    result = fuse(model)
    assert ops(result.model) | {"Transpose": 1} == {"FusedConvModule": 2, "Abs": 1, "Sub": 1, "Transpose": 1}
    assert_same(model, result.model, seed)


LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_that_was_optimised_already(level: str, tmp_path: Path, fuse: Fuse, seed: int) -> None:
    """As ONNX Runtime writes it: with FusedConv, or in a layout of its own for the CPU, which is left alone."""
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input("n", 3, 33, 33), 16, 3, strides=[2, 2]))
    for activation in ("LeakyRelu", "HardSigmoid", "Tanh"):
        y = net.op("Relu", net.batch_norm(net.depthwise(net.op(activation, net.conv(x, 32)), bias=False)))
        x = net.op("Relu", net.op("Add", net.conv(y, 16), x))
    net.output(x)
    model = net.model()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    result = fuse(optimised)
    nchwc = sum(node.domain == "com.microsoft.nchwc" and node.op_type == "Conv" for node in optimised.graph.node)
    assert result.report.convolutions == result.report.in_modules + nchwc == 10
    assert all("an operator of domain com.microsoft.nchwc" in item.reason for item in result.report.skipped)
    if level != "ORT_ENABLE_ALL":
        assert nchwc == 0 and ops(result.model)["FusedConvModule"] == 4
    assert_same(model, result.model, seed)


def test_double_stays(fuse: Fuse, seed: int) -> None:
    net = Net(dtype=np.float64, seed=seed)
    net.output(net.depthwise(net.input(1, 8, 9, 9)))
    assert "double" in fuse(net.model(), check=False).report.skipped[0].reason


def test_overridable_weights(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.conv(net.depthwise(net.input(1, 8, 9, 9)), 6))
    for tensor in net.initializers:
        net.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = net.model()
    left = fuse(model)
    assert left.model.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    assert all("also a graph input" in skipped.reason for skipped in left.report.skipped)
    result = fuse(model, constants=True)
    assert [m["stages"] for m in modules(result.model)] == ["dw-pw"]
    assert [value.name for value in result.model.graph.input] == ["x"]
    assert_same(model, result.model, seed)


def test_a_tensor_with_another_user_ends_a_chain(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    a = net.op("Relu", net.conv(net.input(1, 8, 9, 9), 32))
    b = net.op("Relu", net.depthwise(a))
    c = net.conv(b, 8)
    net.output(c, b, net.op("ReduceMean", a, axes=[2, 3]))
    model = net.model()
    result = fuse(model)
    assert [m["stages"] for m in modules(result.model)] == ["pw", "dw", "pw"]
    assert_same(model, result.model, seed)


def test_everything_kept_that_is_not_the_graphs(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.depthwise(net.input("batch", 8, 9, 9)))
    model = net.model(doc_string="about", producer_name="someone", producer_version="1.2", model_version=7, domain="d")
    model.metadata_props.add(key="license", value="MIT")
    result = fuse(model).model
    for field in ("doc_string", "producer_name", "producer_version", "model_version", "domain", "metadata_props"):
        assert getattr(result, field) == getattr(model, field)
    assert result.graph.input == model.graph.input and result.graph.output == model.graph.output
    assert result.graph.name == model.graph.name and result.ir_version == 10
    assert {(o.domain, o.version) for o in result.opset_import} == {("", 17), ("com.microsoft", 1), ("ort_fcm", 1)}


def test_a_rewritten_model_is_refused(fuse: Fuse, seed: int) -> None:
    from ort_fcm import FcmError

    net = Net(seed=seed)
    net.output(net.depthwise(net.input(1, 8, 9, 9)))
    with pytest.raises(FcmError, match="rewritten already"):
        fuse(fuse(net.model()).model)


def test_mixed_precision(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 8, 12, 12), 16))
    x, net.dtype = net.op("Cast", x, to=TensorProto.FLOAT16), np.dtype(np.float16)
    x = net.conv(net.op("Relu", net.depthwise(x)), 24)
    x, net.dtype = net.op("Cast", net.op("Tanh", x), to=TensorProto.FLOAT), np.dtype(np.float32)
    net.output(net.conv(net.depthwise(x), 8))
    model = net.model()
    result = fuse(model)
    assert [module.stages for module in result.report.modules] == ["pw", "dw-pw", "dw-pw"]
    assert_same(model, result.model, seed)
    assert_same(model, result.model, seed, tolerance=4e-3, library=library_path())
