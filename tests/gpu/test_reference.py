"""The float64 reference of the module tests, against ONNX Runtime's own operators."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from benchmarks.case import Case, complaint, data_of, reference
from benchmarks.convolution import ACTIVATIONS, activate, conv2d, steepest
from tests.gpu.cases import CHAINS, params_of, random_case

ONNX_NODES = {
    "relu": "Relu", "clip": "Clip", "hardswish": "HardSwish", "hardsigmoid": "HardSigmoid", "sigmoid": "Sigmoid",
    "gelu": "Gelu", "gelu_tanh": "Gelu", "leakyrelu": "LeakyRelu", "prelu": "PRelu", "tanh": "Tanh",
}  # fmt: skip


def _evaluate(nodes: list[onnx.NodeProto], feeds: dict[str, np.ndarray]) -> np.ndarray:
    def value(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = helper.make_graph(nodes, "g", [value(k, v.shape) for k, v in feeds.items()], [value("y", None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], feeds)[0], np.float64)


@pytest.mark.parametrize("kind", ACTIVATIONS[1:])
def test_activation(kind: str, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    x = (4 * rng.standard_normal((2, 3, 20, 20))).astype(np.float32)
    slope = rng.standard_normal(3).astype(np.float32)
    alpha, beta = params_of(kind, rng)
    feeds = {"x": x}
    if kind == "silu":
        nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    else:
        attributes: dict[str, object] = {}
        inputs = ["x"]
        if kind == "clip":
            feeds |= {"low": np.array(alpha, np.float32), "high": np.array(beta, np.float32)}
            inputs += ["low", "high"]
        elif kind == "prelu":
            feeds["slope"] = slope[:, None, None]
            inputs.append("slope")
        elif kind == "hardsigmoid":
            attributes = {"alpha": alpha, "beta": beta}
        elif kind == "leakyrelu":
            attributes = {"alpha": alpha}
        elif kind == "gelu_tanh":
            attributes = {"approximate": "tanh"}
        nodes = [helper.make_node(ONNX_NODES[kind], inputs, ["y"], **attributes)]
    ours = activate(x.astype(np.float64), kind, alpha, beta, slope.astype(np.float64))
    np.testing.assert_allclose(ours, _evaluate(nodes, feeds), rtol=2e-5, atol=2e-6, err_msg=f"seed {seed}")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_steepest_bounds_the_slope(kind: str, seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    alpha, beta = params_of(kind, rng)
    slope = rng.standard_normal(1)
    x = np.sort(rng.uniform(-9, 9, (1, 1, 1, 20000)), axis=-1)
    y = activate(x, kind, alpha, beta, slope)
    assert np.abs(np.diff(y) / np.diff(x)).max() <= steepest(kind, alpha, slope) * 1.0001, f"seed {seed}"


@pytest.mark.parametrize("groups", [1, 6])
def test_convolution(groups: int, seed: int) -> None:
    rng = np.random.default_rng([seed, 3, groups])
    for _ in range(10):
        kernel, stride, dilation = rng.integers(1, 6, 2), rng.integers(1, 4, 2), rng.integers(1, 3, 2)
        pads = [int(p) for p in rng.integers(0, 4, 4)]
        m = groups if groups > 1 else 5
        x = rng.standard_normal((2, 6, *rng.integers(12, 20, 2))).astype(np.float32)
        weight = rng.standard_normal((m, 6 // groups, *kernel)).astype(np.float32)
        node = helper.make_node("Conv", ["x", "w"], ["y"], strides=stride, dilations=dilation, pads=pads, group=groups)
        theirs = _evaluate([node], {"x": x, "w": weight})
        ours = conv2d(x.astype(np.float64), weight.astype(np.float64), stride, dilation, pads, groups)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=f"seed {seed}")


@pytest.mark.parametrize("chain", CHAINS)
def test_a_wrong_result_is_found(chain: str, seed: int) -> None:
    """An output off by a hundredth of its magnitude in one element, NaN, or of another weight does not pass."""
    case = random_case(chain, "float16", 1, seed)
    data = data_of(case)
    y = reference(case, data)[0]
    right = y.astype(np.float16)
    assert complaint(case, data, right) is None, case.to_line()
    where = tuple(np.random.default_rng(seed).integers(0, right.shape))
    for wrong in (np.float16(y[where] + 0.1 + 0.1 * abs(y[where])), np.float16(np.nan)):
        changed = right.copy()
        changed[where] = wrong
        message = complaint(case, data, changed)
        assert message and case.to_line() in message


def test_a_case_survives_its_line(seed: int) -> None:
    for number, chain in enumerate(CHAINS):
        case = random_case(chain, "tf32", number, seed)
        assert Case.from_line(case.to_line()) == case
        assert json.loads(case.to_line())["seed"] == seed
