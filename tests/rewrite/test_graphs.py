"""Graphs inside graphs, functions, and random networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ort_fcm.library import library_path
from ort_fcm.rewrite import pipeline
from ort_fcm.rewrite.layout import TO_NCHW, TO_NHWC
from tests.rewrite.conftest import greedy
from tests.rewrite.networks import Net, assert_same, feeds, informative, run
from tests.rewrite.test_patterns import ops

Fuse = Callable[..., Any]


def body(seed: int, prefix: str, x: str) -> onnx.GraphProto:
    """A graph of two convolutions that takes `x` from outside."""
    net = Net(seed=seed)
    net.channels["outside"] = 8
    y = net.depthwise(net.op("Relu", net.conv("outside", 8)))
    names = {name: f"{prefix}{name}" for node in net.nodes for name in [*node.input, *node.output]} | {"outside": x}
    for node in net.nodes:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for tensor in net.initializers:
        tensor.name = names[tensor.name]
    value = helper.make_tensor_value_info(names[y], TensorProto.FLOAT, [None] * 4)
    return helper.make_graph(net.nodes, f"{prefix}graph", [], [value], net.initializers)


def nested(model: onnx.ModelProto, attribute: str) -> onnx.GraphProto:
    return next(a.g for node in model.graph.node for a in node.attribute if a.name == attribute)


def test_if(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.depthwise(net.conv(net.input(1, 8, 9, 9), 8)))
    condition = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0))
    branches = {"then_branch": body(seed, "a/", x), "else_branch": body(seed + 1, "b/", x)}
    net.output(net.op("If", condition, **branches))
    model = net.model()
    result = fuse(model)
    assert result.report.in_modules == 6 and result.report.convolutions == 6
    assert ops(onnx.ModelProto(graph=nested(result.model, "else_branch"))) == {"FusedConvModule": 1}
    assert_same(model, result.model, seed)


def test_loop_with_weights_from_outside(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    start = net.input(1, 8, 9, 9)
    weight = net.const(net.rng.standard_normal((8, 1, 3, 3)), name="outer_weight")
    inner = Net(seed=seed)
    inner.nodes.append(helper.make_node("Conv", ["carried", weight], ["y"], name="inside", group=8, pads=[1, 1, 1, 1]))
    inner.nodes.append(helper.make_node("Tanh", ["y"], ["next"]))
    inner.nodes.append(helper.make_node("Identity", ["go"], ["go_on"]))
    values = {
        "i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, []), "carried": (TensorProto.FLOAT, [1, 8, 9, 9]),
        "go_on": (TensorProto.BOOL, []), "next": (TensorProto.FLOAT, [1, 8, 9, 9]),
    }  # fmt: skip
    infos = [helper.make_tensor_value_info(name, *value) for name, value in values.items()]
    graph = helper.make_graph(inner.nodes, "loop", infos[:3], infos[3:])
    net.output(net.op("Loop", net.const(3, np.int64), net.const(True, np.bool_), start, body=graph))
    model = net.model()
    result = fuse(model)
    assert [node.op_type for node in nested(result.model, "body").node] == ["FusedConvModule", "Identity"]
    assert_same(model, result.model, seed)


def test_a_tensor_that_a_subgraph_uses_is_not_fused_away(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 8, 9, 9), 8))
    y = net.depthwise(x)
    condition = net.op("Greater", net.op("ReduceSum", y, keepdims=0), net.const(0))
    net.output(net.op("If", condition, then_branch=body(seed, "a/", x), else_branch=body(seed + 1, "b/", y)))
    model = net.model()
    result = fuse(model)
    assert result.report.in_modules == 6 and len(result.report.modules) == 4
    assert_same(model, result.model, seed)


def test_local_function(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.input(1, 8, 9, 9)
    weights = [net.const(net.rng.standard_normal(shape)) for shape in ((8, 8, 1, 1), (8, 1, 3, 3))]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["z"], group=8, pads=[1, 1, 1, 1]),
    ]
    function = helper.make_function("mine", "Pair", ["x", "a", "b"], ["z"], nodes, [helper.make_opsetid("", 17)])
    net.output(net.op("Pair", x, *weights, domain="mine"))
    graph = helper.make_graph(net.nodes, "net", net.inputs, net.outputs, net.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function])
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 1}
    assert_same(model, result.model, seed)


def test_local_functions_in_float16(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.input(1, 8, 9, 9)
    weights = [net.const(net.rng.standard_normal(shape) / 3) for shape in ((8, 8, 1, 1), (8, 1, 3, 3))]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["z"], group=8, pads=[1, 1, 1, 1]),
    ]
    function = helper.make_function("mine", "Pair", ["x", "a", "b"], ["z"], nodes, [helper.make_opsetid("", 17)])
    net.output(net.op("Pair", x, *weights, domain="mine"))
    graph = helper.make_graph(net.nodes, "net", net.inputs, net.outputs, net.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[function])
    result = fuse(model, float16=True)
    assert ops(result.model) == {"FusedConvModule": 1, "Cast": 2}
    assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.FLOAT16}
    assert_same(model, result.model, seed, 1e-2)


def test_functions_in_functions_and_in_branches(fuse: Fuse, seed: int) -> None:
    """Every operator in a function of its own, a branch within a function, and a call within the branch."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]

    def function(name: str, inputs: list[str], nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
        return helper.make_function("mine", name, inputs, ["z"], nodes, opsets)

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(f"{name}_y")])

    pointwise = helper.make_node("Pointwise", ["x", "a"], ["then_y"], domain="mine")
    plain = [helper.make_node("Conv", ["x", "a"], ["p"]), helper.make_node("Tanh", ["p"], ["else_y"])]
    branches = {"then_branch": branch("then", pointwise), "else_branch": branch("else", *plain)}
    choice = helper.make_node("If", ["c"], ["y"], **branches)
    functions = [
        function("Pointwise", ["x", "a"], [helper.make_node("Conv", ["x", "a"], ["y"]),
                                           helper.make_node("Act", ["y"], ["z"], domain="mine")]),
        function("Act", ["x"], [helper.make_node("Relu", ["x"], ["z"])]),
        function("Either", ["x", "c", "a"], [choice, helper.make_node("Act", ["y"], ["z"], domain="mine")]),
    ]  # fmt: skip
    net = Net(seed=seed)
    x = net.input(1, 8, 9, 9)
    weight = net.const(net.rng.standard_normal((8, 8, 1, 1)))
    condition = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0))
    y = net.op("Pointwise", x, weight, domain="mine")
    y = net.op("Act", net.depthwise(y), domain="mine")
    net.output(net.op("Either", y, condition, weight, domain="mine"))
    graph = helper.make_graph(net.nodes, "net", net.inputs, net.outputs, net.initializers)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
    result = fuse(model)
    assert result.report.in_modules == result.report.convolutions == 4
    assert ops(result.model)["FusedConvModule"] == 1  # the other two are in the branches
    assert_same(model, result.model, seed)


def test_a_model_of_functions_without_convolutions_is_left_as_it_is(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.op("Act", net.input(1, 8, 9, 9), domain="mine"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    body = helper.make_function("mine", "Act", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets[:1])
    graph = helper.make_graph(net.nodes, "net", net.inputs, net.outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[body])
    assert fuse(model).model == model


ACTIVATIONS = ("none", "Relu", "HardSwish", "Sigmoid", "Tanh", "LeakyRelu", "Softsign")


KINDS = ("dw", "pw", "dw", "pw", "stem", "bn", "add", "concat", "pool", "scale", "multiplier", "resize", "turned")


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Random graphs of convolutions, activations and what stands between them, with branches and several outputs."""
    net = Net(dtype=np.float32, seed=draw(st.integers(0, 2**31)))
    batch = draw(st.sampled_from([1, 2, "n"]))
    tensors = [(net.input(batch, draw(st.integers(1, 9)), 9, 12), 1)]  # name, stride so far
    for _ in range(draw(st.integers(2, 10))):
        x, scale = draw(st.sampled_from(tensors[-3:]))
        channels = net.channels[x]
        kind = draw(st.sampled_from(KINDS))
        stride = draw(st.sampled_from([1, 1, 2])) if scale == 1 else 1
        if kind == "dw":
            y = net.depthwise(x, draw(st.sampled_from([3, 5, (1, 3)])), strides=[stride] * 2, bias=draw(st.booleans()))
        elif kind == "pw":
            y = net.conv(x, draw(st.sampled_from([channels, 5, 16])), strides=[stride] * 2, bias=draw(st.booleans()))
        elif kind == "stem":
            y = net.conv(x, 6, 3, strides=[stride] * 2)
        elif kind == "bn":
            y, stride = net.batch_norm(x), 1
        elif kind in ("add", "concat"):
            others = [t for t, s in tensors if s == scale and (kind == "concat" or net.channels[t] == channels)]
            other = draw(st.sampled_from(others))
            y, stride = net.op("Add", x, other) if kind == "add" else net.op("Concat", x, other, axis=1), 1
            net.channels[y] = channels + (net.channels[other] if kind == "concat" else 0)
        elif kind == "multiplier":
            y = net.conv(x, 2 * channels, 3, group=channels, strides=[stride] * 2)
        elif kind == "resize":  # and back, so that it meets others
            y, stride = net.op("Resize", x, "", net.const([1, 1, 2, 3], np.float32)), 1
            y = net.depthwise(y, strides=[2, 3])
        elif kind == "turned":
            y = net.op("Add", net.op("Transpose", x, perm=TO_NHWC), net.const(net.rng.standard_normal(channels)))
            y, stride = net.op("Transpose", y, perm=TO_NCHW), 1
            net.channels[y] = channels
        elif kind == "scale":
            y, stride = net.op("Mul", x, net.op("Sigmoid", net.op("GlobalAveragePool", x))), 1
        else:
            y = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[stride] * 2)
        activation = draw(st.sampled_from(ACTIVATIONS))
        if activation != "none":
            y = net.op(activation, y)
        tensors.append((y, scale * stride))
    extra = draw(st.lists(st.sampled_from([name for name, _ in tensors[1:]]), max_size=2, unique=True))
    net.output(*dict.fromkeys([tensors[-1][0], *extra]))
    return net.model()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=networks(), seed=st.integers(0, 2**31), with_library=st.booleans())
def test_random_networks(model: onnx.ModelProto, seed: int, with_library: bool) -> None:
    """Function bodies, or the library's CPU kernel, against the original."""
    assume(all(informative(output) for output in run(model, feeds(model, seed))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_plan", greedy)
        result = pipeline.rewrite(model, gpu="H200", check=False)
    assert result.report.convolutions == result.report.in_modules + len(result.report.skipped)
    assert_same(model, result.model, seed, 1e-4, str(library_path()) if with_library else None)
