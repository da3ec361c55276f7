"""The networks that are timed: MobileNetV2 of the examples, or ONNX files of a directory, in any type and batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from examples import mobilenetv2
from ort_fcm.errors import FcmError
from ort_fcm.rewrite.load import load


def network(name: str, dtype: str, batch: int, directory: Path | None = None) -> onnx.ModelProto:
    """`directory`/`name`*.onnx, or the example's MobileNetV2 for "mobilenetv2", all of `dtype`, at `batch`.

    FcmError when there is no such file.
    """
    if name == "mobilenetv2":
        return mobilenetv2.build(batch, dtype)
    found = sorted(directory.glob(f"{name}*.onnx")) if directory else []
    if not found:
        raise FcmError(f"no {name}*.onnx in {directory or 'any directory: name one with --models'}")
    model = load(found[-1])  # of several exports the last by name
    if dtype == "float16":
        _to_float16(model)
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    return model


def _to_float16(model: onnx.ModelProto) -> None:
    """Everything, graph inputs and outputs too, so that stock's convolutions run in float16."""

    def convert(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            values = np.clip(numpy_helper.to_array(tensor), -65504, 65504).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in model.graph.initializer:
        convert(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                convert(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
