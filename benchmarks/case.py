"""One FusedConvModule on its own: its model, its data, and its float64 reference with the error that rounding explains.

    python -m benchmarks.case '{"stages": ...}' [--provider cuda]

runs the case of a failed test again, from the line that the test printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.convolution import Array, activate, conv2d, steepest
from ort_fcm import library_path

DOMAIN = "ort_fcm"
GUARD = 4096  # bytes of NaN before and after every tensor
DEVIATIONS = 8.0  # standard deviations of the modelled rounding error that an element may be off
# Unit roundoff of stored tensors, and of tensor-core operands.
ROUNDOFF = {"float16": 2.0**-11, "tf32": 2.0**-24, "float32": 2.0**-24}
OPERAND = {"float16": 0.0, "tf32": 2.0**-10.5, "float32": 2.0**-23}  # float32: products of TF32 parts


@dataclass(frozen=True)
class Stage:
    """A convolution: `kind` is dw, pw or conv; sizes in pixels and channels, pads top, left, bottom, right."""

    kind: str
    c_in: int
    c_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str = "none"
    params: tuple[float, float] = (0.0, 0.0)
    bias: bool = True

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.c_out, 1 if self.kind == "dw" else self.c_in, *self.kernel)

    def out_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of `size`."""
        h, w = (
            (size[i] + self.pads[i] + self.pads[i + 2] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return h, w


@dataclass(frozen=True)
class Case:
    """A module and its data. `dtype` is float16, tf32 (float32 that may use TF32) or float32; h and w are X's."""

    stages: tuple[Stage, ...]
    dtype: str
    batch: int
    h: int
    w: int
    residual: bool = False
    output_activation: str = "none"
    output_params: tuple[float, float] = (0.0, 0.0)
    input_nchw: bool = False
    output_nchw: bool = False
    tile: str = ""
    seed: int = 0
    mean: bool = False  # the stages run on the mean of X over its map
    scaled: bool = False  # X is multiplied by factors [N, C, 1, 1]
    norm_epsilon: float = 0.0  # above 0: X is normalised over its channels
    pool: bool = False  # the second output as well: rows whose mean is that of Y over its map

    @property
    def name(self) -> str:
        return "-".join(["mean"] * self.mean + [stage.kind for stage in self.stages])

    @property
    def storage(self) -> np.dtype[Any]:
        return np.dtype(np.float16 if self.dtype == "float16" else np.float32)

    @property
    def out_size(self) -> tuple[int, int]:
        size = (1, 1) if self.mean else (self.h, self.w)
        for stage in self.stages:
            size = stage.out_size(size)
        return size

    def to_line(self) -> str:
        """The case as one line of JSON, without defaults."""
        default = asdict(Case((), "", 0, 0, 0))
        plain = asdict(Stage("", 0, 0))
        data = {k: v for k, v in asdict(self).items() if v != default[k]}
        data["stages"] = [
            {k: v for k, v in asdict(stage).items() if k not in plain or v != plain[k]} for stage in self.stages
        ]
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Case:
        data = json.loads(line)

        def tuples(values: dict[str, Any]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        stages = tuple(Stage(**tuples(stage)) for stage in data.pop("stages"))
        return cls(stages=stages, **tuples(data))


@dataclass(frozen=True)
class Data:
    """What a case computes with, in its storage type. Maps are NCHW; a stage's weight is [M, C/group, kH, kW]."""

    x: Array
    residual: Array | None
    weights: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    slopes: tuple[Array | None, ...]
    factors: Array | None = None


def data_of(case: Case) -> Data:
    """Seeded normal data, weights scaled by 1 / sqrt(fan in)."""
    rng = np.random.default_rng(case.seed)

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Array:
        return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(case.storage)

    x = normal((case.batch, case.stages[0].c_in, case.h, case.w))
    if case.norm_epsilon:  # that has something to take away
        x = (x + 1).astype(case.storage)
    weights = tuple(normal(s.weight_shape, float(np.prod(s.weight_shape[1:])) ** -0.5) for s in case.stages)
    biases = tuple(normal((s.c_out,), 0.5) if s.bias else None for s in case.stages)
    slopes = tuple(normal((s.c_out,), 0.5) if s.activation == "prelu" else None for s in case.stages)
    residual = normal((case.batch, case.stages[-1].c_out, *case.out_size)) if case.residual else None
    factors = normal((case.batch, case.stages[0].c_in, 1, 1)) if case.scaled else None
    return Data(x, residual, weights, biases, slopes, factors)


def reference(case: Case, data: Data) -> tuple[Array, Array]:
    """Y [N,M,OH,OW] in float64, and the standard deviation that rounding may give each of its elements.

    Errors of independent roundings add in squares: through a convolution with the squares of its weights, through
    an activation at most by its steepest slope.
    """
    unit, operand = ROUNDOFF[case.dtype], OPERAND[case.dtype]

    def approximation(activation: str) -> float:
        """Of an activation, in float32; GELU has a rougher formula in float16."""
        return 2.0**-19 if activation == "gelu" and case.dtype == "float16" else 2.0**-21

    y = data.x.astype(np.float64)
    variance = np.zeros_like(y)
    if data.factors is not None:
        y = y * data.factors.astype(np.float64)
        variance = (unit * y) ** 2
    if case.mean:
        terms = y.shape[2] * y.shape[3]  # of a sum in float32
        variance = ((np.abs(y).mean((2, 3), keepdims=True)) * 2.0**-24 * terms**0.5) ** 2
        y = y.mean((2, 3), keepdims=True)
        variance = variance + (unit * y) ** 2
    seen = None  # by the products of a lone pointwise, whose result is scaled: X without its mean taken away
    if case.norm_epsilon:
        square, y = (y * y).mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        scale = 1 / np.sqrt((y * y).mean(1, keepdims=True) + case.norm_epsilon)
        y, terms = y * scale, y.shape[1]
        sums = scale**2 * square * terms * 2.0**-23  # relative errors of a difference of two sums in float32
        variance = (unit * y) ** 2 + (2.0**-22 + sums * (len(case.stages) == 1)) ** 2 * y**2
        seen = data.x.astype(np.float64) * scale if len(case.stages) == 1 else None
    for i, stage in enumerate(case.stages):
        weight = data.weights[i].astype(np.float64)
        groups = stage.c_in if stage.kind == "dw" else 1
        window = (stage.stride, stage.dilation, stage.pads, groups)
        terms = weight[0].size  # of a sum in float32
        # the terms' own magnitudes, rounded by the accumulation and, on tensor cores, as operands
        squares = conv2d(y * y if seen is None else seen * seen, weight * weight, *window)
        tensor_cores = 0.0 if stage.kind == "dw" else operand
        # tensor cores truncate their sums, always towards zero; a float16 depthwise rounds each partial sum to half
        sums = terms * 2.0**-46 + (terms * 2.0**-26) ** 2
        if seen is not None:  # weights are rounded again, without their mean
            sums += unit**2
        if stage.kind == "dw" and case.dtype == "float16":
            sums += (terms + 1) / 2 * unit**2
        variance = conv2d(variance, weight * weight, *window) + squares * (2 * tensor_cores**2 + sums)
        y = conv2d(y, weight, *window)
        bias, slope = data.biases[i], data.slopes[i]
        if bias is not None and stage.kind == "dw" and case.dtype == "float16":
            variance = variance + terms * (unit * bias.astype(np.float64)[:, None, None]) ** 2
        wide_slope = None if slope is None else slope.astype(np.float64)
        if bias is not None:
            y = y + bias.astype(np.float64)[:, None, None]
        variance = variance * steepest(stage.activation, stage.params[0], wide_slope) ** 2
        y = activate(y, stage.activation, *stage.params, wide_slope)
        # stored, and the activation itself approximated
        variance = variance + (unit * y) ** 2 + (approximation(stage.activation) * np.maximum(np.abs(y), 1)) ** 2
    if data.residual is not None:
        y = y + data.residual.astype(np.float64)
        variance = variance * steepest(case.output_activation, case.output_params[0]) ** 2
        y = activate(y, case.output_activation, *case.output_params)
        variance = variance + (unit * y) ** 2 + (approximation(case.output_activation) * np.maximum(np.abs(y), 1)) ** 2
    return y, np.sqrt(variance)


def model_of(case: Case, data: Data, dynamic: bool = False) -> onnx.ModelProto:
    """A model of the one node. `dynamic` leaves batch, height and width symbolic."""
    element = helper.np_dtype_to_tensor_dtype(case.storage)
    initializers = []

    def constant(name: str, values: Array | None) -> str:
        if values is None:
            return ""
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    inputs = ["X"] + [""] * 11
    for i in range(len(case.stages)):
        inputs[1 + 2 * i] = constant(f"W{i}", data.weights[i])
        inputs[2 + 2 * i] = constant(f"B{i}", data.biases[i])
        inputs[8 + i] = constant(f"S{i}", data.slopes[i])
    inputs[7] = "R" if case.residual else ""
    inputs[11] = "G" if case.scaled else ""
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "FusedConvModule",
        inputs,
        ["Y", "P"] if case.pool else ["Y"],
        name="module",
        domain=DOMAIN,
        stages=case.name,
        kernel_shape=[v for s in case.stages for v in s.kernel],
        strides=[v for s in case.stages for v in s.stride],
        dilations=[v for s in case.stages for v in s.dilation],
        pads=[v for s in case.stages for v in s.pads],
        activations=",".join(s.activation for s in case.stages),
        activation_params=[float(v) for s in case.stages for v in s.params],
        output_activation=case.output_activation,
        output_activation_params=list(case.output_params),
        input_layout="NCHW" if case.input_nchw else "NHWC",
        output_layout="NCHW" if case.output_nchw else "NHWC",
        tile=case.tile,
        norm_epsilon=float(case.norm_epsilon),
    )

    def value(name: str, map_shape: tuple[int, ...], nchw: bool) -> onnx.ValueInfoProto:
        n, c, h, w = (f"{name}_n", map_shape[1], f"{name}_h", f"{name}_w") if dynamic else map_shape
        return helper.make_tensor_value_info(name, element, [n, c, h, w] if nchw else [n, h, w, c])

    out_shape = (case.batch, case.stages[-1].c_out, *case.out_size)
    graph_inputs = [value("X", data.x.shape, case.input_nchw)]
    if case.residual:
        graph_inputs.append(value("R", out_shape, case.output_nchw))
    if case.scaled:
        graph_inputs.append(value("G", (case.batch, data.x.shape[1], 1, 1), case.input_nchw))
    outputs, nodes = [value("Y", out_shape, case.output_nchw)], [node]
    if case.pool:  # however many rows there are, this is of one
        nodes.append(helper.make_node("ReduceMean", ["P"], ["M"], axes=[1]))
        outputs.append(
            helper.make_tensor_value_info("M", element, ["m" if dynamic else case.batch, 1, 1, out_shape[1]])
        )
    graph = helper.make_graph(nodes, case.name, graph_inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def cases_of(model: onnx.ModelProto, dtype: str | None = None) -> dict[str, Case]:
    """The modules of a rewritten model of static shapes, by node name, with data of their own.

    `dtype` says how float32 modules compute (tf32 by default, or float32).
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value.type.tensor_type for value in [*graph.input, *graph.value_info, *graph.output]}
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    cases = {}
    for node in graph.node:
        if node.domain != DOMAIN:
            continue
        a = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        a = {name: value.decode() if isinstance(value, bytes) else value for name, value in a.items()}
        kinds = a["stages"].removeprefix("mean-").split("-")
        count = len(kinds)
        activations = a.get("activations", ",".join(["none"] * count)).split(",")

        def part(name: str, i: int, default: tuple[Any, ...], a: dict[str, Any] = a) -> tuple[Any, ...]:
            width = len(default)
            return tuple(a[name][i * width : (i + 1) * width]) if name in a else default

        stages = []
        for i, kind in enumerate(kinds):
            m, per_group = weights[node.input[1 + 2 * i]][:2]
            stages.append(
                Stage(
                    kind,
                    m if kind == "dw" else per_group,
                    m,
                    part("kernel_shape", i, (1, 1)),
                    part("strides", i, (1, 1)),
                    part("dilations", i, (1, 1)),
                    part("pads", i, (0, 0, 0, 0)),
                    activations[i],
                    part("activation_params", i, (0.0, 0.0)),
                    len(node.input) > 2 + 2 * i and bool(node.input[2 + 2 * i]),
                )
            )
        x = values[node.input[0]]
        input_nchw = a.get("input_layout") == "NCHW"
        shape = [dim.dim_value for dim in x.shape.dim]
        half = x.elem_type == TensorProto.FLOAT16
        cases[node.name] = Case(
            tuple(stages),
            "float16" if half else dtype or "tf32",
            batch=shape[0],
            h=shape[2 if input_nchw else 1],
            w=shape[3 if input_nchw else 2],
            residual=len(node.input) > 7 and bool(node.input[7]),
            output_activation=a.get("output_activation", "none"),
            output_params=tuple(a.get("output_activation_params", (0.0, 0.0))),
            input_nchw=input_nchw,
            output_nchw=a.get("output_layout") == "NCHW",
            tile=a.get("tile", ""),
            mean=a["stages"].startswith("mean-"),
            scaled=len(node.input) > 11 and bool(node.input[11]),
            norm_epsilon=a.get("norm_epsilon", 0.0),
            pool=len(node.output) > 1 and bool(node.output[1]),
        )
    return cases


def describe(case: Case) -> str:
    """The module as the library's C functions for tools read it (see `ort_fcm.library.kernel_source`)."""

    def flat(name: str) -> str:
        return " ".join(str(v) for stage in case.stages for v in getattr(stage, name))

    lines = {
        "stages": case.name,
        "kernel_shape": flat("kernel"),
        "strides": flat("stride"),
        "dilations": flat("dilation"),
        "pads": flat("pads"),
        "activations": ",".join(stage.activation for stage in case.stages),
        "activation_params": flat("params"),
        "output_activation": case.output_activation,
        "output_activation_params": " ".join(map(str, case.output_params)),
        "input_layout": "NCHW" if case.input_nchw else "NHWC",
        "output_layout": "NCHW" if case.output_nchw else "NHWC",
        "tile": case.tile,
        "channels": " ".join(map(str, [case.stages[0].c_in, *(stage.c_out for stage in case.stages)])),
        "type": case.dtype,
        "residual": str(int(case.residual)),
        "pool": str(int(case.pool)),
        "scaled": str(int(case.scaled)),
        "norm_epsilon": str(case.norm_epsilon),
    }
    return "".join(f"{name}={value}\n" for name, value in lines.items())


def layout(values: Array, nchw: bool) -> Array:
    """NCHW values in the layout that a graph input or output has."""
    return np.ascontiguousarray(values if nchw else values.transpose(0, 2, 3, 1))


class Buffer:
    """A tensor in `xp`'s memory (numpy or cupy) between guards of NaN: a stray read shows, a stray write is found."""

    def __init__(self, xp: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.xp, self.shape, self.dtype = xp, shape, dtype
        self.bytes = int(np.prod(shape)) * dtype.itemsize
        self.raw = xp.full(self.bytes + 2 * GUARD, 0xFF, np.uint8)

    @property
    def pointer(self) -> int:
        base = self.raw.ctypes.data if self.xp is np else self.raw.data.ptr
        return int(base) + GUARD

    def set(self, values: Array | None) -> None:
        """Copy `values` in, or poison with NaN."""
        self.raw[:] = 0xFF
        if values is not None:
            flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self.raw[GUARD : GUARD + self.bytes] = self.xp.asarray(flat)

    def get(self) -> Array:
        inside = self.raw[GUARD : GUARD + self.bytes]
        host = inside if self.xp is np else inside.get()
        return np.asarray(host).view(self.dtype).reshape(self.shape).copy()

    def guards_intact(self) -> bool:
        return bool((self.raw[:GUARD] == 0xFF).all() and (self.raw[GUARD + self.bytes :] == 0xFF).all())


class Session:
    """A case's model in ONNX Runtime, on `provider` cpu or cuda, with guarded buffers bound."""

    def __init__(self, case: Case, data: Data, provider: str, graph: bool = False, dynamic: bool = False) -> None:
        import onnxruntime as ort

        self.provider = provider
        self.xp: Any = np
        providers: list[Any] = ["CPUExecutionProvider"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if provider == "cuda":
            import cupy

            self.xp = cupy
            options.intra_op_num_threads = 1  # for one node; tests have many sessions at once, whose idle threads spin
            flags = {"enable_cuda_graph": str(int(graph)), "use_tf32": str(int(case.dtype == "tf32"))}
            providers.insert(0, ("CUDAExecutionProvider", flags))
        options.register_custom_ops_library(str(library_path()))
        model = model_of(case, data, dynamic)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        assert provider != "cuda" or "CUDAExecutionProvider" in self.session.get_providers()
        self.binding = self.session.io_binding()
        self.buffers: dict[str, Buffer] = {}

    def _bind(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.buffers[name] = Buffer(self.xp, shape, dtype)
            element = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
            bind = self.binding.bind_output if name in ("Y", "M") else self.binding.bind_input
            bind(name, self.provider, 0, element, list(shape), buffer.pointer)
        return buffer

    def run(self, case: Case, data: Data) -> Array:
        """Y as [N,M,OH,OW]. AssertionError where something was written outside it, or the mean of the second output is
        not Y's."""
        x = layout(data.x, case.input_nchw)
        self._bind("X", x.shape, case.storage).set(x)
        if data.residual is not None:
            r = layout(data.residual, case.output_nchw)
            self._bind("R", r.shape, case.storage).set(r)
        if data.factors is not None:
            factors = layout(data.factors, case.input_nchw)
            self._bind("G", factors.shape, case.storage).set(factors)
        n, c, (h, w) = case.batch, case.stages[-1].c_out, case.out_size
        y = self._bind("Y", (n, c, h, w) if case.output_nchw else (n, h, w, c), case.storage)
        y.set(None)
        if case.pool:
            self._bind("M", (n, 1, 1, c), case.storage).set(None)
        if self.provider == "cuda":
            self.xp.cuda.Device().synchronize()
        self.session.run_with_iobinding(self.binding)
        assert all(buffer.guards_intact() for buffer in self.buffers.values()), "something outside Y was written"
        result = y.get() if case.output_nchw else y.get().transpose(0, 3, 1, 2)
        if case.pool:
            off = mean_error(case, result, self.buffers["M"].get())
            assert off <= 1, f"the sums are off by {off:.3g} of what rounding explains: {case.to_line()}"
        return result


def mean_error(case: Case, y: Array, mean: Array) -> float:
    """How far the mean of a second output, [N,1,1,M], is from that of Y, as a share of what rounding explains. A row's
    mean may be larger than the map's: the largest that there can be is that of magnitudes."""
    wide = y.astype(np.float64)
    allowed = 3 * ROUNDOFF[case.dtype] * np.abs(wide).mean((2, 3)) * (4 if case.dtype != "float16" else 1) + 2.0**-24
    error = np.abs(mean.reshape(mean.shape[0], -1).astype(np.float64) - wide.mean((2, 3)))
    return float(np.max(np.where(np.isnan(error), np.inf, error / allowed)))


def complaint(case: Case, data: Data, y: Array, provider: str = "cpu") -> str | None:
    """Why `y` is wrong, with the line that runs the case again; None when rounding explains the difference."""
    expected, deviation = reference(case, data)
    error = np.abs(y.astype(np.float64) - expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error) / deviation), error.shape)
    if y.shape == expected.shape and error[worst] <= DEVIATIONS * deviation[worst]:
        return None
    return (
        f"at {tuple(int(i) for i in worst)} of {y.shape}: {y[worst]} instead of {expected[worst]:.6g} "
        f"(rounding explains {DEVIATIONS * deviation[worst]:.2g}; {int(np.isnan(y).sum())} NaN)\n"
        f"again: python -m benchmarks.case --provider {provider} '{case.to_line()}'"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    case = Case.from_line(args.case)
    data = data_of(case)
    wrong = complaint(case, data, Session(case, data, args.provider).run(case, data), args.provider)
    print(wrong or "PASSED")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
