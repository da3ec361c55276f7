"""Random FusedConvModule nodes, and the plain ONNX graphs that compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ort_fcm.library import library_path

Array = NDArray[Any]
CHAINS = (
    "dw", "pw", "conv", "dw-pw", "pw-dw", "conv-dw", "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw", "mean-pw-pw",
    "mean-pw",
)  # fmt: skip
ACTIVATIONS = "none relu clip hardswish silu hardsigmoid sigmoid gelu gelu_tanh leakyrelu prelu tanh".split()


@dataclass
class Stage:
    kind: str
    channels: tuple[int, int]  # in, out
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    activation: str = "none"
    params: tuple[float, float] = (0.0, 0.0)
    bias: bool = True

    def out(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after this stage; not positive if the input is too small."""
        height, width = (
            (n + self.pads[axis] + self.pads[axis + 2] - self.dilations[axis] * (self.kernel[axis] - 1) - 1)
            // self.strides[axis]
            + 1
            for axis, n in enumerate(size)
        )
        return height, width


@dataclass
class Module:
    stages: list[Stage]
    size: tuple[int, int]
    batch: int = 1
    dtype: type[np.floating] = np.float32
    residual: bool = False
    output_activation: str = "none"
    output_params: tuple[float, float] = (0.0, 0.0)
    nchw: tuple[bool, bool] = (False, False)  # input, output
    weights: dict[str, Array] = field(default_factory=dict)
    mean: bool = False  # the stages run on the mean of X over its map
    scaled: bool = False  # X is multiplied by factors G
    pool: bool = False  # the second output as well
    norm_epsilon: float = 0.0  # above 0: X is normalised over its channels

    @property
    def chain(self) -> str:
        return "-".join(["mean"] * self.mean + [stage.kind for stage in self.stages])

    @property
    def out_size(self) -> tuple[int, int]:
        size = (1, 1) if self.mean else self.size
        for stage in self.stages:
            size = stage.out(size)
        return size

    def shape(self, size: tuple[int, int], channels: int, nchw: bool) -> tuple[int, ...]:
        return (self.batch, channels, *size) if nchw else (self.batch, *size, channels)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.shape(self.size, self.stages[0].channels[0], self.nchw[0])

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.shape(self.out_size, self.stages[-1].channels[1], self.nchw[1])

    @property
    def g_shape(self) -> tuple[int, ...]:
        return self.shape((1, 1), self.stages[0].channels[0], self.nchw[0])

    def attributes(self) -> dict[str, object]:
        """The attributes of the node, as the design gives them."""
        return {
            "stages": self.chain,
            "kernel_shape": [n for s in self.stages for n in s.kernel],
            "strides": [n for s in self.stages for n in s.strides],
            "dilations": [n for s in self.stages for n in s.dilations],
            "pads": [n for s in self.stages for n in s.pads],
            "activations": ",".join(s.activation for s in self.stages),
            "activation_params": [float(n) for s in self.stages for n in s.params],
            "output_activation": self.output_activation,
            "output_activation_params": [float(n) for n in self.output_params],
            "input_layout": "NCHW" if self.nchw[0] else "NHWC",
            "output_layout": "NCHW" if self.nchw[1] else "NHWC",
            "norm_epsilon": float(self.norm_epsilon),
        }

    def description(self, type_name: str, tile: str = "") -> str:
        """The module in the words of `ort_fcm.library.kernel_source`."""
        lines = {**self.attributes(), "type": type_name, "tile": tile, "residual": int(self.residual)}
        lines |= {"pool": int(self.pool), "scaled": int(self.scaled)}
        lines["channels"] = [self.stages[0].channels[0], *(s.channels[1] for s in self.stages)]
        return "\n".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in lines.items())


def with_weights(module: Module, rng: np.random.Generator) -> Module:
    """Fill in weights for which outputs are of the order of 1."""
    for i, stage in enumerate(module.stages, 1):
        c_in, c_out = stage.channels
        per_group = 1 if stage.kind == "dw" else c_in
        shape = (c_out, per_group, *stage.kernel)
        module.weights[f"w{i}"] = (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(module.dtype)
        if stage.bias:
            module.weights[f"b{i}"] = (rng.standard_normal(c_out) * 0.5).astype(module.dtype)
        if stage.activation == "prelu":
            module.weights[f"s{i}"] = rng.uniform(-0.5, 0.9, c_out).astype(module.dtype)
    return module


def random_module(rng: np.random.Generator, chain: str, dtype: type[np.floating]) -> Module:
    """A legal module of the given chain: odd channel counts, windows, pads, strides and layouts."""

    def pair(*choices: int) -> tuple[int, int]:
        return int(rng.choice(choices)), int(rng.choice(choices))

    def params(activation: str) -> tuple[float, float]:
        if activation == "clip":
            return float(rng.choice([0.0, -0.7, -np.inf])), float(rng.choice([6.0, 0.9]))
        if activation == "hardsigmoid":
            return 0.3, 0.4
        return (0.15, 0.0) if activation == "leakyrelu" else (0.0, 0.0)

    size = int(rng.integers(5, 20)), int(rng.integers(5, 20))
    mean = chain.startswith("mean-")
    stages, now, channels = [], (1, 1) if mean else size, int(rng.choice([1, 3, 5, 8, 16, 19]))
    for kind in chain.removeprefix("mean-").split("-"):
        c_out = channels if kind == "dw" else int(rng.choice([1, 3, 7, 8, 16, 24, 33, 40, 65]))
        stage = Stage(kind, (channels, c_out), activation=str(rng.choice(ACTIVATIONS)), bias=bool(rng.random() < 0.8))
        stage.params = params(stage.activation)
        stage.strides = (1, 1) if kind == "pw" and (stages or mean) else pair(1, 1, 2)
        if kind != "pw":
            stage.kernel = pair(1, 2, 3, 5, 7)
            stage.dilations = pair(1, 1, 2)
            stage.pads = (*pair(0, 1, 2, 3), *pair(0, 1, 2, 3))
            if min(stage.out(now)) < 1:
                stage.kernel, stage.dilations = (1, 1), (1, 1)
        stages.append(stage)
        now, channels = stage.out(now), c_out
    module = Module(stages, size, int(rng.integers(1, 4)), dtype)
    module.nchw = bool(rng.random() < 0.3), bool(rng.random() < 0.3)
    module.mean, kinds = mean, [stage.kind for stage in stages]
    module.scaled = bool(kinds[0] == "pw" and not mean and rng.random() < 0.5)
    if kinds[0] == "pw" and not (mean or module.scaled) and rng.random() < 0.5:
        module.norm_epsilon = 1e-3
    module.pool = bool(not mean and rng.random() < 0.5)
    module.residual = bool(rng.random() < 0.4) and not (mean or (module.pool and kinds[-1] == "dw"))
    if module.residual:
        module.output_activation = str(rng.choice([a for a in ACTIVATIONS if a != "prelu"]))
        module.output_params = params(module.output_activation)
    return with_weights(module, rng)


def inputs(module: Module, rng: np.random.Generator) -> dict[str, Array]:
    feeds = {"X": rng.standard_normal(module.x_shape).astype(module.dtype)}
    if module.residual:
        feeds["R"] = rng.standard_normal(module.y_shape).astype(module.dtype)
    if module.scaled:
        feeds["G"] = rng.standard_normal(module.g_shape).astype(module.dtype)
    return feeds


def _model(module: Module, nodes: list[onnx.NodeProto], constants: dict[str, Array], dynamic: bool) -> onnx.ModelProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(module.dtype))

    def dims(shape: tuple[int, ...], nchw: bool) -> list[int | str]:
        names = ["N", "C", "H", "W"] if nchw else ["N", "H", "W", "C"]
        return [n if name == "C" else name for n, name in zip(shape, names, strict=True)] if dynamic else list(shape)

    values = [helper.make_tensor_value_info("X", element, dims(module.x_shape, module.nchw[0]))]
    if module.residual:
        values.append(helper.make_tensor_value_info("R", element, list(module.y_shape) if not dynamic else [None] * 4))
    if module.scaled:
        values.append(helper.make_tensor_value_info("G", element, [None] * 4 if dynamic else list(module.g_shape)))
    outputs = [helper.make_tensor_value_info(name, element, None) for name in (["Y", "P"] if module.pool else ["Y"])]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "module", values, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ort_fcm", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def node_inputs(module: Module) -> list[str]:
    """Names of the node's inputs, an empty one where it has none."""
    names = ["X"]
    for i in range(1, 4):
        names += [name if name in module.weights else "" for name in (f"w{i}", f"b{i}")]
    names.append("R" if module.residual else "")
    names += [f"s{i}" if f"s{i}" in module.weights else "" for i in range(1, 4)]
    names.append("G" if module.scaled else "")
    while not names[-1]:
        names.pop()
    return names


def fused_model(module: Module, dynamic: bool = False, **changes: Any) -> onnx.ModelProto:
    """A model of one FusedConvModule node named "module0"; `changes` replace attributes, None removes one."""
    attributes = {k: v for k, v in {**module.attributes(), **changes}.items() if v is not None}
    node = helper.make_node(
        "FusedConvModule", node_inputs(module), ["Y", "P"] if module.pool else ["Y"], name="module0", domain="ort_fcm",
        **attributes,
    )  # fmt: skip
    return _model(module, [node], module.weights, dynamic)


def _activation(
    name: str, params: tuple[float, float], x: str, to: str, slope: str, dtype: type[np.floating]
) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    make = helper.make_node
    simple = {"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh", "none": "Identity"}
    if name in simple:
        return [make(simple[name], [x], [to])], {}
    if name == "clip":
        limits = {f"{to}_min": np.array(params[0], dtype), f"{to}_max": np.array(params[1], dtype)}
        return [make("Clip", [x, *limits], [to])], limits
    if name == "silu":
        return [make("Sigmoid", [x], [f"{to}_s"]), make("Mul", [x, f"{to}_s"], [to])], {}
    if name == "hardsigmoid":
        return [make("HardSigmoid", [x], [to], alpha=params[0], beta=params[1])], {}
    if name == "leakyrelu":
        return [make("LeakyRelu", [x], [to], alpha=params[0])], {}
    if name == "prelu":
        return [make("PRelu", [x, slope], [to])], {}
    return [make("Gelu", [x], [to], approximate="tanh" if name == "gelu_tanh" else "none")], {}


def plain_model(module: Module, dynamic: bool = False) -> onnx.ModelProto:
    """The same computation in ONNX's own operators."""
    make = helper.make_node
    nodes, constants, now = [], dict(module.weights), "X"
    if module.scaled:
        nodes.append(make("Mul", ["X", "G"], ["scaled"]))
        now = "scaled"
    if module.norm_epsilon:
        perm = [0, 2, 3, 1] if module.nchw[0] else [0, 1, 2, 3]
        constants["ones"] = np.ones(module.stages[0].channels[0], module.dtype)
        nodes += [
            make("Transpose", [now], ["last"], perm=perm),
            make("LayerNormalization", ["last", "ones"], ["normed"], axis=-1, epsilon=module.norm_epsilon),
            make("Transpose", ["normed"], ["x"], perm=[0, 3, 1, 2]),
        ]
        now = "x"
    elif not module.nchw[0]:
        nodes.append(make("Transpose", [now], ["x"], perm=[0, 3, 1, 2]))
        now = "x"
    if module.mean:
        nodes.append(make("GlobalAveragePool", [now], ["mean"]))
        now = "mean"
    for i, stage in enumerate(module.stages, 1):
        names = [now, f"w{i}"] + ([f"b{i}"] if stage.bias else [])
        nodes.append(
            make(
                "Conv",
                names,
                [f"conv{i}"],
                kernel_shape=stage.kernel,
                strides=stage.strides,
                dilations=stage.dilations,
                pads=stage.pads,
                group=stage.channels[0] if stage.kind == "dw" else 1,
            )
        )
        if stage.activation == "prelu":
            constants[f"s{i}"] = constants[f"s{i}"].reshape(-1, 1, 1)
        now = f"act{i}"
        added, more = _activation(stage.activation, stage.params, f"conv{i}", now, f"s{i}", module.dtype)
        nodes += added
        constants |= more
    if module.residual:
        other = "R"
        if not module.nchw[1]:
            nodes.append(make("Transpose", ["R"], ["r"], perm=[0, 3, 1, 2]))
            other = "r"
        nodes.append(make("Add", [now, other], ["sum"]))
        now = "out"
        added, more = _activation(module.output_activation, module.output_params, "sum", now, "", module.dtype)
        nodes += added
        constants |= more
    perm = [0, 1, 2, 3] if module.nchw[1] else [0, 2, 3, 1]
    nodes.append(make("Transpose", [now], ["Y"], perm=perm))
    if module.pool:
        nodes += [
            make("GlobalAveragePool", [now], ["pool"]),
            make("Transpose", ["pool"], ["P"], perm=[0, 2, 3, 1]),
        ]
    return _model(module, nodes, constants, dynamic)


def run(model: onnx.ModelProto, feeds: dict[str, Array], library: bool) -> Array:
    """Run `model` on the CPU provider, with the custom-op library or without."""
    return session(model, library).run(None, feeds)[0]  # type: ignore[no-any-return]


def session(model: onnx.ModelProto, library: bool):  # type: ignore[no-untyped-def]  # onnxruntime has no types
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def relative_error(actual: Array, expected: Array) -> float:
    """Norm of the difference over norm of the reference; but of no less than 0.3 an element, as weights are scaled for
    outputs of the order of 1: what cancels to almost nothing has the error of what it was the sum of."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(difference)) / max(norm, 0.3 * float(expected.size) ** 0.5)


__all__ = [
    "ACTIVATIONS",
    "CHAINS",
    "Module",
    "Stage",
    "fused_model",
    "inputs",
    "node_inputs",
    "plain_model",
    "random_module",
    "relative_error",
    "run",
    "session",
    "with_weights",
]
