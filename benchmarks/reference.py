"""A network's outputs in float64: onnx's reference evaluator, with convolutions and pools that are quick enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from benchmarks.convolution import Array, conv2d

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


class Conv(OpRun):
    """2-D convolution with explicit pads."""

    op_domain = ""

    def _run(
        self, x: Array, w: Array, b: Array | None = None, auto_pad: str | None = None,
        dilations: list[int] | None = None, group: int | None = None, kernel_shape: list[int] | None = None,
        pads: list[int] | None = None, strides: list[int] | None = None,
    ) -> tuple[Array]:  # fmt: skip
        if x.ndim != 4 or auto_pad not in (None, "", "NOTSET"):
            raise NotImplementedError("the float64 reference has 2-D convolutions with explicit pads only")
        y = conv2d(x, w, strides or [1, 1], dilations or [1, 1], pads or [0] * 4, group or 1)
        return (y if b is None else y + b[:, None, None],)


class GlobalAveragePool(OpRun):
    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (x.mean(axis=(2, 3), keepdims=True),)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def run(model: onnx.ModelProto, feeds: Mapping[str, Array], images: int = 8) -> dict[str, Array]:
    """Outputs for the first `images` of `feeds`, computed in float64 with the model's own (rounded) weights.

    `model` must treat the images of a batch apart, as classifiers do, and must not have its batch in a constant.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        _widen(tensor)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _FLOATS:
                attribute.i = TensorProto.DOUBLE
    for value in [*wide.graph.input, *wide.graph.output]:
        if value.type.tensor_type.elem_type in _FLOATS:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del wide.graph.value_info[:]
    evaluator = ReferenceEvaluator(wide, new_ops=[Conv, GlobalAveragePool])
    few: dict[str, Any] = {name: value[:images].astype(np.float64) for name, value in feeds.items()}
    names = [value.name for value in model.graph.output]
    return dict(zip(names, evaluator.run(None, few), strict=True))
