"""MobileNetV2 (Sandler et al., 2018) as an ONNX model, with seeded random weights.

    python examples/mobilenetv2.py mobilenetv2.onnx [--dtype float16] [--batch N|dynamic]

The weights are scaled so that activations keep about unit variance: a layer computed wrongly shows in the output.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Expansion factor, output channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


@dataclass
class _Graph:
    dtype: np.dtype[Any]
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, values: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values).astype(self.dtype), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_output"], name=name, **attributes))
        return f"{name}_output"

    def conv(
        self,
        x: str,
        name: str,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        clip: bool = True,
        power: float = 1.0,
    ) -> str:
        """Convolution and bias, then Clip(0, 6). `power` is the mean square of `x`."""
        shape = (c_out, 1 if depthwise else c_in, kernel, kernel)
        weight = self.rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]) * power)
        y = self.node(
            "Conv",
            [
                x,
                self.constant(f"{name}.weight", weight),
                self.constant(f"{name}.bias", 0.1 * self.rng.standard_normal(c_out)),
            ],
            f"{name}/Conv",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=c_in if depthwise else 1,
        )
        return self.node("Clip", [y, "zero", "six"], f"{name}/Clip") if clip else y


def build(
    batch: int | None = None, dtype: str = "float32", classes: int = 1000, size: int = 224, seed: int = 0
) -> onnx.ModelProto:
    """The network: input `x` [batch, 3, size, size], output `scores` [batch, classes], both of `dtype`.

    `batch` None leaves the batch dynamic. `dtype` is float32 or float16. The same seed gives the same weights.
    """
    graph = _Graph(np.dtype(dtype), np.random.default_rng(seed))
    graph.constant("zero", np.array(0.0))
    graph.constant("six", np.array(6.0))
    rectified = 0.5  # mean square of a unit normal after Clip(0, 6)
    x = graph.conv("x", "stem", 3, 32, 3, 2)
    c_in, power = 32, rectified
    index = 0
    for expansion, c_out, blocks, first_stride in STAGES:
        for block in range(blocks):
            name, stride, c_mid = f"blocks.{index}", first_stride if block == 0 else 1, expansion * c_in
            y = x
            if expansion > 1:
                y = graph.conv(y, f"{name}.expand", c_in, c_mid, 1, power=power)
            y = graph.conv(y, f"{name}.depthwise", c_mid, c_mid, 3, stride, depthwise=True, power=rectified)
            y = graph.conv(y, f"{name}.project", c_mid, c_out, 1, clip=False, power=rectified)
            if stride == 1 and c_in == c_out:
                y, power = graph.node("Add", [y, x], f"{name}/Add"), power + 1
            else:
                power = 1.0
            x, c_in, index = y, c_out, index + 1
    x = graph.conv(x, "head", c_in, 1280, 1, power=power)
    x = graph.node("GlobalAveragePool", [x], "pool")
    x = graph.node("Flatten", [x], "flatten", axis=1)
    scores = graph.rng.standard_normal((classes, 1280)) / math.sqrt(1280 * rectified)
    weight = graph.constant("classifier.weight", scores)
    bias = graph.constant("classifier.bias", 0.1 * graph.rng.standard_normal(classes))
    graph.nodes.append(helper.make_node("Gemm", [x, weight, bias], ["scores"], name="classifier", transB=1))
    element = TensorProto.FLOAT16 if graph.dtype == np.float16 else TensorProto.FLOAT
    n = "batch" if batch is None else batch
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "mobilenetv2",
            [helper.make_tensor_value_info("x", element, [n, 3, size, size])],
            [helper.make_tensor_value_info("scores", element, [n, classes])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="ort_fcm examples",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--batch", default="dynamic", help="a number, or dynamic")
    args = parser.parse_args()
    model = build(None if args.batch == "dynamic" else int(args.batch), args.dtype)
    onnx.checker.check_model(model)
    onnx.save(model, args.out)


if __name__ == "__main__":
    main()
