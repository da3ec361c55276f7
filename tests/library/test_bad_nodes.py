"""Every wrong node is refused when the session is made, in a sentence that names it and the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ort_fcm.library import library_path
from tests.library.modules import Array, Module, Stage, fused_model, inputs, session, with_weights


def _module() -> Module:
    stages = [Stage("pw", (8, 24), activation="relu"), Stage("dw", (24, 24), (3, 3), pads=(1, 1, 1, 1))]
    return with_weights(Module([*stages, Stage("pw", (24, 16))], (6, 6)), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"stages": None}, "attribute stages is missing"),
        ({"stages": "dw-dw"}, "attribute stages is 'dw-dw', which is no legal chain"),
        ({"stages": 3}, "attribute stages is not a string"),
        ({"kernel_shape": None}, "attribute kernel_shape is missing"),
        ({"kernel_shape": [1, 1, 3, 3]}, "attribute kernel_shape has 4 values; 3 stages need 6"),
        ({"kernel_shape": [3, 3, 3, 3, 1, 1]}, "stage 1 is pw but has a kernel of 3x3 or pads"),
        ({"kernel_shape": [1.0] * 6}, "attribute kernel_shape is not a list of integers"),
        ({"kernel_shape": [1, 1, 5, 3, 1, 1]}, "the weight of stage 2 has shape [24, 1, 3, 3] instead of [M, 1, 5, 3]"),
        ({"strides": [1, 1, 0, 1, 1, 1]}, "attribute strides holds 0, which is not within 1 and 4096"),
        ({"strides": [1, 1, 2**40, 1, 1, 1]}, "attribute strides holds 1099511627776"),
        ({"pads": [0] * 4 + [-1] + [0] * 7}, "attribute pads holds -1"),
        ({"dilations": [1, 1, 1]}, "attribute dilations has 3 values"),
        ({"activations": "relu,relu"}, "attribute activations has 2 names for 3 stages"),
        ({"activations": "relu,mish,none"}, "activation 'mish' is unknown"),
        ({"activations": "prelu,none,none"}, "the slope of stage 1 is missing"),
        ({"activation_params": [0.0]}, "attribute activation_params has 1 values instead of 6"),
        ({"activation_params": [float("nan")] * 6}, "attribute activation_params holds a NaN"),
        ({"strides": [1, 1, 1, 1, 2, 2]}, "stage 3 is a pw behind another stage and has a stride"),
        ({"output_activation": "relu"}, "output_activation is given without the residual input R"),
        ({"output_activation": "prelu"}, "output_activation cannot be prelu"),
        ({"norm_epsilon": -1.0}, "attribute norm_epsilon is -1 instead of a positive number, or 0 for none"),
        ({"norm_epsilon": [1e-6]}, "attribute norm_epsilon is not a float"),
        ({"norm_epsilon": 1}, "attribute norm_epsilon is not a float"),
        ({"input_layout": "CHWN"}, "attribute input_layout is 'CHWN' instead of NHWC or NCHW"),
        ({"stages": "pw-dw", "kernel_shape": [1, 1, 3, 3], "strides": [1] * 4, "dilations": [1] * 4, "pads": [0] * 8,
          "activations": "none,none", "activation_params": [0.0] * 4},
         "inputs are given for stage 3, but there are only 2 stages"),
    ],
)  # fmt: skip
def test_attributes(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(Exception, match="FusedConvModule 'module0': ") as caught:
        session(fused_model(_module(), **changes), True)
    assert cause in str(caught.value)


def _replace(name: str, value: Array) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return change


def _rename_input(index: int, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        node.input.extend([""] * (index + 1 - len(node.input)))
        node.input[index] = name

    return change


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (_replace("w1", np.zeros((24, 8, 1), np.float32)), "the weight of stage 1 has shape [24, 8, 1] instead of"),
        (_replace("w2", np.zeros((20, 1, 3, 3), np.float32)),
         "the weight of stage 2 takes 20 channels, but the stage before makes 24"),
        (_replace("w3", np.zeros((16, 23, 1, 1), np.float32)),
         "the weight of stage 3 takes 23 channels, but the stage before makes 24"),
        (_replace("w3", np.zeros((0, 24, 1, 1), np.float32)), "the weight of stage 3 has shape [0, 24, 1, 1]"),
        (_replace("w2", np.zeros((24, 2, 3, 3), np.float32)), "the weight of stage 2 has shape [24, 2, 3, 3]"),
        (_replace("b1", np.zeros(23, np.float32)), "the bias of stage 1 has shape [23] instead of [24]"),
        (_replace("b3", np.zeros((1, 16), np.float32)), "the bias of stage 3 has shape [1, 16] instead of [16]"),
        (_rename_input(3, ""), "the weight of stage 2 is missing"),
        (_rename_input(8, "b1"), "the slope of stage 1 is given, but its activation is not prelu"),
    ],
)  # fmt: skip
def test_weights(change: Callable[[onnx.ModelProto], None], cause: str) -> None:
    model = fused_model(_module())
    change(model)
    with pytest.raises(Exception, match="FusedConvModule 'module0': ") as caught:
        session(model, True)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "cause"),
    [
        ((1, 6, 6, 7), "input X has shape [1, 6, 6, 7], but 8 channels are needed on axis 3 of 4"),
        ((6, 6, 8), "input X has shape [6, 6, 8], but 8 channels are needed on axis 3 of 4"),
        ((1, 1, 6, 8), "input X has shape [1, 1, 6, 8], which is smaller than the windows of the module"),
    ],
)
def test_inputs_of_a_call(shape: tuple[int, ...], cause: str) -> None:
    module = _module()
    module.stages[1].pads = (0, 0, 0, 0)
    model = fused_model(module)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    made = session(model, True)
    with pytest.raises(Exception, match="FusedConvModule 'module0': ") as caught:
        made.run(None, {"X": np.zeros(shape, np.float32)})
    assert cause in str(caught.value)


def test_residual_of_another_shape() -> None:
    module = _module()
    module.residual = True
    feeds = inputs(module, np.random.default_rng(0))
    feeds["R"] = feeds["R"][:, :5]
    model = fused_model(module, dynamic=True)
    with pytest.raises(Exception, match=r"the residual R has shape \[1, 5, 6, 16\], but Y has \[1, 6, 6, 16\]"):
        session(model, True).run(None, feeds)


def _of(kinds: str, **options: Any) -> Module:
    stages = [
        Stage("pw", (8, 8)) if kind == "pw" else Stage("dw", (8, 8), (3, 3), pads=(1, 1, 1, 1))
        for kind in kinds.split("-")
    ]
    return with_weights(Module(stages, (6, 6), **options), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (_of("dw-pw", scaled=True), "factors G are given, which only a module takes that starts with a pointwise"),
        (_of("pw-pw", mean=True, scaled=True), "factors G are given, which only a module takes"),
        (_of("pw", mean=True, pool=True), "there is a second output, which no module has on a mean"),
        (_of("pw-dw", pool=True, residual=True), "there is a second output, which no module has on a mean, or on a"),
        (_of("pw-pw", mean=True, residual=True), "a residual is given to a module on a mean"),
        (_of("dw-pw", norm_epsilon=1e-6), "norm_epsilon is given, which only a module takes that starts with a"),
        (_of("pw", norm_epsilon=1e-6, scaled=True), "norm_epsilon is given, which only a module takes that starts"),
        (_of("pw-pw", norm_epsilon=1e-6, mean=True), "norm_epsilon is given, which only a module takes that starts"),
        (_of("pw-dw", mean=True), "attribute stages is 'mean-pw-dw', which is no legal chain"),
    ],
)
def test_parts_that_do_not_go_together(module: Module, cause: str) -> None:
    with pytest.raises(Exception, match="FusedConvModule 'module0': ") as caught:
        session(fused_model(module), True)
    assert cause in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 1, 8), (1, 6, 1, 8), (1, 8, 1, 1), (1, 8)])
def test_factors_of_another_shape(shape: tuple[int, ...]) -> None:
    module = _of("pw", scaled=True)
    model = fused_model(module)
    model.graph.input[1].type.tensor_type.ClearField("shape")
    feeds = inputs(module, np.random.default_rng(0)) | {"G": np.ones(shape, np.float32)}
    with pytest.raises(Exception, match="the factors G have shape ") as caught:
        session(model, True).run(None, feeds)
    assert f"{list(shape)} instead of [1, 1, 1, 8]" in str(caught.value)


def test_a_mean_of_nothing() -> None:
    module = _of("pw-pw", mean=True)
    made = session(fused_model(module, dynamic=True), True)
    with pytest.raises(Exception, match=r"input X has shape \[1, 0, 6, 8\], of which there is no mean"):
        made.run(None, {"X": np.zeros((1, 0, 6, 8), np.float32)})


@pytest.mark.gpu
def test_cuda_needs_constant_weights() -> None:
    import onnxruntime as ort

    model = fused_model(_module())
    weight = next(t for t in model.graph.initializer if t.name == "w2")
    model.graph.initializer.remove(weight)
    model.graph.input.append(helper.make_tensor_value_info("w2", weight.data_type, weight.dims))
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    with pytest.raises(Exception, match="FusedConvModule 'module0': the weight of stage 2 is not a constant"):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
