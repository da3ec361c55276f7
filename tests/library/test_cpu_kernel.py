"""The library in a CPU session against ONNX Runtime's own run of the plain graph."""

from __future__ import annotations

import secrets

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.library.modules import (
    ACTIVATIONS,
    CHAINS,
    Module,
    Stage,
    fused_model,
    inputs,
    plain_model,
    random_module,
    relative_error,
    run,
    session,
    with_weights,
)

# Sums in another order; float16 rounds each intermediate result, ONNX Runtime where its own conversions fall.
TOLERANCE = {np.float32: 2e-6, np.float16: 4e-3}


def _agrees(module: Module, rng: np.random.Generator, dynamic: bool = False) -> None:
    feeds = inputs(module, rng)
    expected = session(plain_model(module), library=False).run(None, feeds)
    actual = session(fused_model(module, dynamic), library=True).run(None, feeds)
    assert actual[0].shape == module.y_shape and len(actual) == 1 + module.pool
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype == module.dtype
        error = relative_error(ours, plain)
        assert error <= TOLERANCE[module.dtype], f"{error:.2e} for {module.attributes()}"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("chain", CHAINS)
def test_random_modules(chain: str, dtype: type[np.floating]) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for i in range(6):
        _agrees(random_module(rng, chain, dtype), rng, dynamic=i % 2 == 1)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_after_a_stage_and_after_the_sum(name: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    params = {"clip": (-0.5, 0.7), "hardsigmoid": (0.25, 0.4), "leakyrelu": (0.2, 0.0)}.get(name, (0.0, 0.0))
    stages = [Stage("pw", (9, 20), activation=name, params=params), Stage("dw", (20, 20), (3, 3), pads=(1, 1, 1, 1))]
    module = Module(stages, (6, 7), residual=name != "prelu")
    if module.residual:
        module.output_activation, module.output_params = name, params
    _agrees(with_weights(module, rng), rng)


def test_empty_batch_and_changing_shapes() -> None:
    rng = np.random.default_rng(secrets.randbits(32))
    module = with_weights(Module([Stage("dw", (8, 8), (3, 3), (2, 2), pads=(1, 1, 1, 1))], (9, 9)), rng)
    fused, plain = session(fused_model(module, dynamic=True), True), session(plain_model(module, dynamic=True), False)
    for shape in [(2, 9, 9, 8), (0, 9, 9, 8), (1, 4, 17, 8), (3, 1, 1, 8)]:
        x = rng.standard_normal(shape).astype(np.float32)
        actual, expected = (s.run(None, {"X": x})[0] for s in (fused, plain))
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_output_shape_is_inferred_with_its_names() -> None:
    rng = np.random.default_rng(secrets.randbits(32))
    stages = [Stage("pw", (8, 24)), Stage("dw", (24, 24), (5, 3), (2, 1), pads=(2, 1, 2, 1))]
    for dtype, name in ((np.float32, "tensor(float)"), (np.float16, "tensor(float16)")):
        module = with_weights(Module(stages, (10, 12), batch=3, dtype=dtype), rng)
        output = session(fused_model(module), True).get_outputs()[0]
        assert (output.shape, output.type) == ([3, 5, 12, 24], name)
        module.nchw = (False, True)
        output = session(fused_model(module, dynamic=True), True).get_outputs()[0]
        assert output.shape == ["N", 24, "((H-1)/2+1)", "W"]


def test_unnamed_sizes_stay_unknown() -> None:
    rng = np.random.default_rng(secrets.randbits(32))
    module = with_weights(Module([Stage("pw", (8, 24)), Stage("dw", (24, 24), (3, 3))], (10, 12)), rng)
    model = fused_model(module, dynamic=True)
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dimension.Clear()
    x = rng.standard_normal((2, 9, 6, 8)).astype(np.float32)
    made = session(model, True)
    assert -1 not in (made.get_outputs()[0].shape or [])
    assert made.run(None, {"X": x})[0].shape == (2, 7, 4, 24)


def _weights_as_inputs(model: onnx.ModelProto) -> None:
    """As ONNX Runtime's CPU provider sees the constants of a float16 node behind the Casts that it inserts."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_no_constants(dtype: type[np.floating]) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for chain in ("dw", "pw-dw-pw", "conv-dw-pw"):
        module = random_module(rng, chain, dtype)
        model = fused_model(module)
        _weights_as_inputs(model)
        fused = session(model, True)
        for _ in range(2):  # other weights the second time
            feeds = inputs(module, rng)
            actual = fused.run(None, {**feeds, **module.weights})[0]
            expected = run(plain_model(module), feeds, library=False)
            assert relative_error(actual, expected) <= TOLERANCE[dtype], module.attributes()
            with_weights(module, rng)


def test_weights_that_are_no_constants_are_checked() -> None:
    rng = np.random.default_rng(0)
    module = with_weights(Module([Stage("pw", (8, 24)), Stage("dw", (24, 24), (3, 3))], (6, 6)), rng)
    model = fused_model(module)
    _weights_as_inputs(model)
    for value in model.graph.input[1:]:
        value.type.tensor_type.ClearField("shape")
    fused, feeds = session(model, True), {**inputs(module, rng), **module.weights}
    assert fused.run(None, feeds)[0].shape == (1, 4, 4, 24)
    for name, shape, cause in [
        ("w1", (24, 7, 1, 1), "input X has shape"),
        ("w2", (24, 1, 3, 2), "the weight of stage 2 has shape [24, 1, 3, 2] instead of [M, 1, 3, 3]"),
        ("w2", (25, 1, 3, 3), "the weight of stage 2 takes 25 channels, but the stage before makes 24"),
        ("b1", (23,), "the bias of stage 1 has shape [23] instead of [24]"),
        ("b2", (), "the bias of stage 2 has shape [] instead of [24]"),
    ]:
        with pytest.raises(Exception, match="FusedConvModule 'module0'") as caught:
            fused.run(None, {**feeds, name: np.ones(shape, np.float32)})
        assert cause in str(caught.value)


def test_float16_between_nodes_that_the_cpu_computes_in_float() -> None:
    """The Adds share the bias: for these, ONNX Runtime casts it."""
    rng = np.random.default_rng(0)
    module = with_weights(Module([Stage("pw", (8, 24))], (6, 6), dtype=np.float16), rng)
    model = fused_model(module)
    model.graph.node.insert(0, helper.make_node("Mul", ["X", "scale"], ["x"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float16), "scale"))
    model.graph.node[1].input[0], model.graph.node[1].output[0] = "x", "y"
    model.graph.node.append(helper.make_node("Add", ["y", "b1"], ["Y"]))
    feeds = inputs(module, rng)
    actual = run(model, feeds, library=True)
    plain = run(plain_model(module), {"X": feeds["X"] * np.float16(2)}, library=False)
    assert relative_error(actual, plain + module.weights["b1"]) <= TOLERANCE[np.float16]
