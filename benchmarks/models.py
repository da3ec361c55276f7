"""The networks that are timed: MobileNetV2 of the examples, or ONNX files of a directory, in any type and batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from examples import mobilenetv2
from ort_fcm.errors import FcmError
from ort_fcm.rewrite.float16 import to_float16
from ort_fcm.rewrite.load import load
from ort_fcm.rewrite.pipeline import drop_overridable_inputs
from ort_fcm.rewrite.shapes import GUESSED_SIZE


def network(name: str, dtype: str, batch: int, directory: Path | None = None) -> onnx.ModelProto:
    """`directory`/`name`*.onnx, or the example's MobileNetV2 for "mobilenetv2", all of `dtype`, at `batch`.

    Initializers that are also graph inputs are taken as constants. FcmError when there is no such file, or when
    float16 is asked of a quantised network.
    """
    if name == "mobilenetv2":
        return mobilenetv2.build(batch, dtype)
    found = sorted(directory.glob(f"{name}*.onnx")) if directory else []
    if not found:
        raise FcmError(f"no {name}*.onnx in {directory or 'any directory: name one with --models'}")
    model = load(found[-1])  # of several exports the last by name
    drop_overridable_inputs(model.graph)
    set_batch(model, batch)
    return float16_throughout(to_float16(model)) if dtype == "float16" else model


def module_texts(model: onnx.ModelProto) -> list[str]:
    """Each module of a rewritten model in the words of `ort_fcm.library.kernel_source`, float32 as TF32."""
    return [
        "\n".join(
            f"{name}={' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in described.items()
            if name != "gpu"
        )
        for described in descriptions(model)
    ]


def module_names(model: onnx.ModelProto) -> list[str]:
    """Each module of a rewritten model of static shape: its stages, windows, channels, the map of its input, its stride
    and whether it has a residual."""
    maps = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:] for value in model.graph.input}
    described, names = iter(descriptions(model)), []
    for node in model.graph.node:
        at = maps.get(node.input[0], []) if node.input else []
        if node.op_type == "FusedConvModule":
            item = next(described)
            windows, channels = zip(*[iter(item["kernel_shape"])] * 2, strict=True), map(str, item["channels"])
            sizes = "".join(f" {h}x{w}" for h, w in dict.fromkeys(windows) if (h, w) != (1, 1))
            names.append(f"{item['stages']}{sizes} {'-'.join(channels)} at {'x'.join(map(str, at))}")
            names[-1] += f" stride {max(item['strides'])}" * (max(item["strides"]) > 1) + " residual" * item["residual"]
            at = _map_after(item, at)
        maps |= dict.fromkeys(node.output, at)
    return names


def _map_after(item: dict[str, Any], size: list[int]) -> list[int]:
    """Height and width of a module's output."""
    for stage in range(len(item["kernel_shape"]) // 2):
        size = [
            (n + item["pads"][4 * stage + axis] + item["pads"][4 * stage + 2 + axis]
             - item["dilations"][2 * stage + axis] * (item["kernel_shape"][2 * stage + axis] - 1) - 1)
            // item["strides"][2 * stage + axis] + 1
            for axis, n in enumerate(size)
        ]  # fmt: skip
    return size


def descriptions(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The attributes of each module of a rewritten model, and what else its kernel is made for."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return [_described(node, weights) for node in model.graph.node if node.op_type == "FusedConvModule"]


def _described(node: onnx.NodeProto, weights: Mapping[str, TensorProto]) -> dict[str, Any]:
    given: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    given = {name: value.decode() if isinstance(value, bytes) else value for name, value in given.items()}
    kinds = [kind for kind in given["stages"].split("-") if kind != "mean"]
    stages = [weights[node.input[1 + 2 * i]] for i in range(len(kinds))]
    inputs = dict(enumerate(node.input))
    return given | {
        "channels": [stages[0].dims[0 if kinds[0] == "dw" else 1], *(weight.dims[0] for weight in stages)],
        "type": "float16" if stages[0].data_type == TensorProto.FLOAT16 else "tf32",
        "residual": int(bool(inputs.get(7))),
        "scaled": int(bool(inputs.get(11))),
        "pool": int(len(node.output) > 1 and bool(node.output[1])),
    }


def set_batch(model: onnx.ModelProto, batch: int) -> None:
    """Make the model's inputs static, with `batch` images, and the batches that its Reshapes were exported with."""
    graph = model.graph
    known = [value.type.tensor_type.shape.dim[0].dim_value for value in graph.input]
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0 or not dim.dim_value:
                dim.dim_value = batch if axis == 0 else GUESSED_SIZE
    for value in graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0 or not dim.dim_value:
                dim.Clear()
    del graph.value_info[:]
    if known and known[0] in (0, batch):
        return
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    for node in graph.node:
        slot = {"Reshape": 1, "ConstantOfShape": 0, "Expand": 1}.get(node.op_type)
        sizes = None if slot is None else constants.get(node.input[slot])
        # a -1 behind other numbers takes the larger batch up
        if slot is None or sizes is None or not len(sizes) or (sizes[0] != known[0] and -1 in sizes):
            continue
        scaled = np.concatenate([sizes[:1] * batch // known[0], sizes[1:]])
        node.input[slot] = f"{node.output[0]}/sizes"
        graph.initializer.append(numpy_helper.from_array(scaled.astype(np.int64), node.input[slot]))


def float16_throughout(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the Casts of graph inputs and outputs that a conversion left: these are float16 then too."""
    graph, renamed, kept = model.graph, {}, []
    inputs, outputs = ({value.name: value for value in values} for values in (graph.input, graph.output))
    for node in graph.node:
        source, made = (node.input[0], node.output[0]) if node.op_type == "Cast" else ("", "")
        if source in inputs and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT16:
            inputs[source].type.tensor_type.elem_type = TensorProto.FLOAT16
            renamed[made] = source
        elif made in outputs and helper.get_node_attr_value(node, "to") == TensorProto.FLOAT:
            outputs[made].type.tensor_type.elem_type = TensorProto.FLOAT16
            renamed[source] = made
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del graph.node[:]
    graph.node.extend(kept)
    return model
