"""Small networks, built node by node, and the means to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


def onnx_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


class Net:
    """A graph in the making. Methods add nodes and return the names of their outputs."""

    def __init__(self, opset: int = 17, dtype: Any = np.float32, seed: int = 0) -> None:
        self.opset, self.dtype = opset, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.channels: dict[str, int] = {}

    def input(self, *shape: int | str | None, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type(self.dtype), shape))
        if isinstance(shape[1], int):
            self.channels[name] = shape[1]
        return name

    def const(self, value: Any, dtype: Any = None, name: str = "") -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype or self.dtype), name))
        return name

    def op(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        number = len(self.nodes)
        names = [f"t{number}" if i == 0 else f"t{number}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{op}_{number}", **attributes))
        self.channels.update(dict.fromkeys(names, next((self.channels[n] for n in inputs if n in self.channels), 0)))
        return names[0] if outputs == 1 else names

    def conv(
        self,
        x: str,
        out: int,
        kernel: int | tuple[int, ...] = 1,
        group: int = 1,
        bias: bool = True,
        pads: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        channels = self.channels[x]
        fan_in = channels // group * int(np.prod(kernel))
        weight = self.rng.standard_normal((out, channels // group, *kernel)) / np.sqrt(fan_in)
        inputs = [x, self.const(weight), *([self.const(self.rng.standard_normal(out))] if bias else [])]
        if pads is None and "auto_pad" not in attributes:
            dilations = attributes.get("dilations", (1,) * len(kernel))
            pads = [d * (k - 1) // 2 for k, d in zip(kernel, dilations, strict=True)] * 2
        if pads is not None:
            attributes["pads"] = list(pads)
        y = str(self.op("Conv", *inputs, group=group, **attributes))
        self.channels[y] = out
        return y

    def depthwise(self, x: str, kernel: int | tuple[int, int] = 3, **attributes: Any) -> str:
        return self.conv(x, self.channels[x], kernel, group=self.channels[x], **attributes)

    def batch_norm(self, x: str) -> str:
        n, rng = self.channels[x], self.rng
        values = (rng.uniform(0.5, 2, n), rng.standard_normal(n), rng.standard_normal(n), rng.uniform(0.5, 2, n))
        return str(self.op("BatchNormalization", x, *(self.const(value) for value in values)))

    def output(self, *names: str, dtype: Any = None, rank: int = 4) -> None:
        for name in names:
            self.outputs.append(helper.make_tensor_value_info(name, onnx_type(dtype or self.dtype), [None] * rank))

    def model(self, **more: Any) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        result = helper.make_model(graph, opset_imports=opsets, ir_version=8, **more)
        onnx.checker.check_model(result)
        return result


def run(model: onnx.ModelProto, feeds: dict[str, Array], library: str | None = None) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def feeds(model: onnx.ModelProto, seed: int, sizes: Sequence[int] = (2, 3, 13, 17)) -> dict[str, Array]:
    """Normal values for each input; `sizes` for unknown dimensions."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    result = {}
    for value in model.graph.input:
        if value.name not in constants:
            dims = value.type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else sizes[i] for i, d in enumerate(dims)]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            array = rng.standard_normal(shape)
            result[value.name] = array > 0 if dtype == np.bool_ else array.astype(dtype)
    return result


def informative(output: Array) -> bool:
    """Whether an output has enough different values for a comparison to say something."""
    return output.dtype.kind != "f" or np.unique(output).size > min(8, output.size - 1)


def assert_same(
    a: onnx.ModelProto, b: onnx.ModelProto, seed: int, tolerance: float = 2e-5, library: str | None = None
) -> None:
    """Both models give the same outputs, and not trivial ones. Relative to each output's largest value."""
    onnx.checker.check_model(b)
    values = feeds(a, seed)
    for x, y in zip(run(a, values), run(b, values, library), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if x.dtype.kind != "f":
            np.testing.assert_array_equal(x, y)
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        assert informative(x), "an output of few values proves little"
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=f"seed {seed}")
