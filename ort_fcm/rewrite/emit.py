"""Write the result: FusedConvModule nodes, the functions they call, and the nodes between them.

Every node calls a model-local function, one overload for each distinct body, that computes the same with plain ONNX
operators. Where the custom-op library is registered, its kernel runs instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from ort_fcm.rewrite.activation import HUGE, Activation
from ort_fcm.rewrite.graph import Array, View, captured, label
from ort_fcm.rewrite.layout import TO_NCHW, TO_NHWC, Step, choose, nhwc, one_pixel, to_first, to_last
from ort_fcm.rewrite.match import Stage
from ort_fcm.rewrite.plan import Segment
from ort_fcm.rewrite.shuffle import channel_gather

DOMAIN, OP, VERSION = "ort_fcm", "FusedConvModule", 1
IR_VERSION = 10  # the first with function overloads
PARAMETERS = ("X", "W1", "B1", "W2", "B2", "W3", "B3", "R", "S1", "S2", "S3", "G")
# ONNX Runtime 1.18 to 1.26 calls the last overload whatever the node says: let that one fail, by its name.
GUARD = "Requires_ONNX_Runtime_1_27_or_newer"


@dataclass
class Functions:
    """The overloads written so far, by body."""

    opset: int
    by_body: dict[bytes, FunctionProto] = field(default_factory=dict)

    def overload(self, nodes: list[NodeProto], inputs: list[str], outputs: list[str], attributes: Iterable[str]) -> str:
        function = helper.make_function(
            DOMAIN, OP, inputs, outputs, nodes, [helper.make_opsetid("", self.opset)], sorted(attributes)
        )
        key = function.SerializeToString(deterministic=True)
        if key not in self.by_body:
            function.overload = f"body{len(self.by_body) + 1}"
            self.by_body[key] = function
        return self.by_body[key].overload

    def protos(self) -> list[FunctionProto]:
        if not self.by_body:
            return []
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, VERSION)]
        nodes = [helper.make_node(GUARD, ["X"], ["t"], domain=DOMAIN), helper.make_node("Add", ["X", "t"], ["Y"])]
        guard = helper.make_function(DOMAIN, OP, list(PARAMETERS), ["Y"], nodes, imports, overload="guard")
        return [*self.by_body.values(), guard]


@dataclass
class _Store:
    """New initializers, one for each value."""

    prefix: str
    added: dict[bytes, TensorProto] = field(default_factory=dict)

    def constant(self, value: Array, hint: str = "constant") -> str:
        value = np.ascontiguousarray(value)
        key = hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).digest()
        if key not in self.added:
            self.added[key] = numpy_helper.from_array(value, f"{self.prefix}{hint}_{len(self.added)}")
        return self.added[key].name

    def named(self, name: str) -> TensorProto:
        return next(tensor for tensor in self.added.values() if tensor.name == name)


def emit(view: View, segments: list[Segment], functions: Functions, gpu: str) -> list[str]:
    """Put the segments' modules into `view.graph`; returns the names of their nodes."""
    at = {view.producer[segment.stages[-1].output]: number for number, segment in enumerate(segments)}
    store = _Store(f"ort_fcm/{view.graph.name}/")
    steps = _steps(view, segments, at, store)
    # Maps that one module pools for another.
    ends = {view.name(last.output) for segment in segments if (last := segment.stages[-1]).poolable}
    pooled = ends & {segment.stages[0].source for segment in segments if segment.stages[0].mean}
    ways = choose(view, steps, pooled)
    nodes: list[NodeProto] = []
    names = [""] * len(segments)
    for i, step in enumerate(steps):
        if step.segment is not None:
            nodes.append(_module(view, step, functions, store, gpu, pooled))
            names[segments.index(step.segment)] = nodes[-1].name
        elif i in ways:
            nodes += ways[i].build(store.constant)
        else:
            assert step.node is not None
            nodes.append(step.node)
    outputs = {value.name for value in view.graph.output}
    nodes = _without_identities(_join_layouts(view, nodes, outputs, store), outputs)
    del view.graph.node[:]
    view.graph.node.extend(nodes)
    view.graph.initializer.extend(store.added.values())
    _tidy(view.graph)
    return names


def _steps(view: View, segments: list[Segment], at: dict[int, int], store: _Store) -> list[Step]:
    """What is left of the graph, in order: modules, and the nodes that something still needs."""
    needed = {value.name for value in view.graph.output}
    steps: list[Step] = []
    for index in reversed(range(len(view.nodes))):
        for name in view.nodes[index].output:  # of shape [N, C], that a module has as a map or others as such
            if index not in at and _map_of(name) in needed:
                steps.append(Step(node=_reshape(view, name, _map_of(name), store)))
                needed.add(name)
        if index in at:
            segment = segments[at[index]]
            first, last = segment.stages[0], segment.stages[-1]
            if last.output in needed and view.rank(last.output) == 2:
                steps.append(Step(node=_reshape(view, _map_of(last.output), last.output, store)))
            segments[at[index]] = segment = replace(segment, stages=_on_maps(view, segment.stages))
            first = segment.stages[0]
            needed |= {first.source, first.factors, segment.stages[-1].residual}
            if first.repeats > 1:
                node = _repeat(view, first, store)
                stages = (replace(first, source=node.output[0]), *segment.stages[1:])
                segments[at[index]] = segment = replace(segment, stages=stages)
                steps += [Step(segment=segment), Step(node=node)]
            else:
                steps.append(Step(segment=segment))
        elif not needed.isdisjoint(view.nodes[index].output):
            node = NodeProto()
            if (moved := channel_gather(view, index)) is not None:
                name = store.constant(moved[1].astype(np.int64), "channels")
                view.initializers[name] = store.named(name)
                output = view.nodes[index].output
                node = helper.make_node("Gather", [moved[0], name], output, name=view.nodes[index].name, axis=1)
            else:
                node.CopyFrom(view.nodes[index])
                node.input[:] = [view.name(name) for name in node.input]
            needed.update([*node.input, *captured(node)])
            steps.append(Step(node=node))
    return steps[::-1]


def _map_of(name: str) -> str:
    return f"{name}/map"


def _on_maps(view: View, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A module's stages, with names of their own for tensors of shape [N, C] as maps, which the view then knows."""

    def known(name: str) -> str:
        if not name or view.rank(name) != 2:
            return name
        shapes, of = view.shapes, _map_of(name)
        shapes.types[of] = view.type(name)
        if (size := shapes.symbolic.get(name)) is not None:
            shapes.symbolic[of] = (*size, 1, 1)
        if (planned := shapes.planned.get(name)) is not None:
            shapes.planned[of] = (*planned, 1, 1)
        return of

    first = replace(stages[0], source=known(stages[0].source), factors=known(stages[0].factors))
    stages = (first, *stages[1:])
    return (*stages[:-1], replace(stages[-1], output=known(stages[-1].output)))


def _reshape(view: View, source: str, name: str, store: _Store) -> NodeProto:
    """The node that makes a map of one pixel of [N, C], or the other way round."""
    shape = store.constant(np.array([0, -1] if view.rank(name) == 2 else [0, -1, 1, 1], np.int64), "shape")
    view.initializers[shape] = store.named(shape)
    return helper.make_node("Reshape", [source, shape], [name], name=f"{name}/reshape")


def _repeat(view: View, stage: Stage, store: _Store) -> NodeProto:
    """The node that repeats each channel of the stage's source, whose output the view then knows."""
    channels = np.arange(stage.in_channels, dtype=np.int64) // stage.repeats
    name, output = store.constant(channels, "channels"), f"{stage.output}/repeated"
    view.initializers[name] = store.named(name)
    node = helper.make_node("Gather", [stage.source, name], [output], name=output, axis=1)
    shapes = view.shapes
    shapes.types[output] = view.type(stage.source)
    shapes.symbolic[output] = (*range(4),)
    if (size := view.planned(stage.source)) is not None:
        shapes.planned[output] = (size[0], stage.in_channels, *size[2:])
    return node


def _module(view: View, step: Step, functions: Functions, store: _Store, gpu: str, pooled: set[str]) -> NodeProto:
    segment = step.segment
    assert segment is not None
    stages, last = segment.stages, segment.stages[-1]
    half = view.type(stages[0].source) == TensorProto.FLOAT16
    dtype = np.dtype(np.float16 if half else np.float32)
    arguments = dict.fromkeys(PARAMETERS, "")
    source, factors, last_in = stages[0].source, stages[0].factors, step.last_in
    if stages[0].mean and source in pooled:
        arguments["X"], last_in = _pool(source), True
    else:
        arguments["X"] = nhwc(source) if last_in else source
    if factors:
        arguments["G"] = nhwc(factors) if last_in else factors
    if last.residual:
        arguments["R"] = nhwc(last.residual) if step.last_out else last.residual
    for number, stage in enumerate(stages, 1):
        arguments[f"W{number}"], arguments[f"B{number}"] = _weights(view, stage, store, dtype)
        if stage.activation.kind == "prelu":
            slope = view.constant(stage.activation.slope)
            assert slope is not None
            slope = np.broadcast_to(slope.reshape(-1), (stage.out_channels,)).astype(dtype)
            arguments[f"S{number}"] = store.constant(slope, "slope")
    inputs = list(arguments.values())
    while not inputs[-1]:
        inputs.pop()
    values = _attributes(segment, last_in, step.last_out, gpu)
    used = {name for name, argument in arguments.items() if argument}
    pools = last.poolable and view.name(last.output) in pooled
    body = _body(stages, used, last_in, step.last_out, pools, functions.opset, dtype)
    overload = functions.overload(body, list(PARAMETERS[: len(inputs)]), ["Y", "P"] if pools else ["Y"], values)
    name = f"{label(view.nodes[last.conv])}/{segment.kinds}"
    outputs = [nhwc(last.output) if step.last_out else last.output] + [_pool(view.name(last.output))] * pools
    return helper.make_node(OP, inputs, outputs, name=name, domain=DOMAIN, overload=overload, **values)


def _pool(tensor: str) -> str:
    """Sums over the map of a tensor, [N, rows, 1, C], as one module gives them to another."""
    return f"{tensor}/pool"


def _weights(view: View, stage: Stage, store: _Store, dtype: np.dtype[Any]) -> tuple[str, str]:
    """Names of weight and bias, with what folds into them."""
    weight = view.constant(stage.weight)
    assert weight is not None
    matrix = weight.ndim == 2
    if matrix:
        weight = (weight.T if stage.transposed else weight)[:, :, None, None]
    grouped = stage.kind == "conv" and weight.shape[1] < stage.in_channels
    if grouped:
        weight = _dense(weight, stage.in_channels)
    if stage.scale is None and stage.norm is None:
        changed = grouped or matrix
        names = [store.constant(weight, "weight") if changed else stage.weight, stage.bias]
        for i, name in enumerate(names):
            # of one shared with other nodes, a copy: where ONNX Runtime casts it for these, it is constant no more
            own = i == 0 and changed
            if name and not own and (name not in view.initializers or len(view.uses(name)) > 1):
                value = view.constant(name)
                assert value is not None
                names[i] = store.constant(value, "weight")
        return names[0], names[1]
    given = view.constant(stage.bias) if stage.bias else None
    bias = np.zeros(stage.out_channels) if given is None else given.astype(np.float64)
    weight = weight.astype(np.float64)
    if stage.norm:  # of a pointwise's input
        bias = bias + weight[:, :, 0, 0] @ stage.norm.shift
        weight = weight * stage.norm.scale[:, None, None]
    if stage.scale is not None and stage.shift is not None:
        weight, bias = weight * stage.scale.reshape(-1, 1, 1, 1), bias * stage.scale + stage.shift
    return store.constant(weight.astype(dtype), "weight"), store.constant(bias.astype(dtype), "bias")


def _dense(weight: Array, channels: int) -> Array:
    """The weight of a grouped convolution, [M, channels / groups, kH, kW], as that of one group: zeros elsewhere."""
    outputs, each = weight.shape[:2]
    groups = channels // each
    result = np.zeros((outputs, channels, *weight.shape[2:]), weight.dtype)
    for m in range(outputs):
        first = m * groups // outputs * each
        result[m, first : first + each] = weight[m]
    return result


def _attributes(segment: Segment, last_in: bool, last_out: bool, gpu: str) -> dict[str, Any]:
    stages, after = segment.stages, segment.stages[-1].output_activation
    values: dict[str, Any] = {
        "stages": segment.kinds,
        "kernel_shape": [n for stage in stages for n in stage.kernel],
        "strides": [n for stage in stages for n in stage.strides],
        "dilations": [n for stage in stages for n in stage.dilations],
        "pads": [n for stage in stages for n in stage.pads],
        "activations": ",".join(stage.activation.kind for stage in stages),
        "activation_params": [float(n) for stage in stages for n in (stage.activation.alpha, stage.activation.beta)],
        "input_layout": "NHWC" if last_in else "NCHW",
        "output_layout": "NHWC" if last_out else "NCHW",
        "tile": segment.tile,
        "gpu": gpu,
    }
    if stages[0].norm:
        values["norm_epsilon"] = stages[0].norm.epsilon
    if after.kind != "none":
        values["output_activation"] = after.kind
        values["output_activation_params"] = [float(after.alpha), float(after.beta)]
    return values


# ---- Function bodies -------------------------------------------------------------------------------------------------


@dataclass
class _Body:
    opset: int
    dtype: np.dtype[Any]
    nodes: list[NodeProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any, dtype: Any = None) -> str:
        array = np.array(value, dtype or self.dtype)
        return self.add("Constant", value=numpy_helper.from_array(array))


def _body(
    stages: tuple[Stage, ...],
    used: set[str],
    last_in: bool,
    last_out: bool,
    pools: bool,
    opset: int,
    dtype: np.dtype[Any],
) -> list[NodeProto]:
    """The module in plain ONNX, from PARAMETERS (those in `used`) to Y, and if it `pools` to P, of one row."""
    body = _Body(opset, dtype)
    tensor = body.add("Mul", "X", "G") if "G" in used else "X"
    if stages[0].norm:
        tensor = _normalise(body, tensor, stages[0].norm.epsilon, stages[0].in_channels, last_in)
    elif last_in:
        tensor = body.add("Transpose", tensor, perm=TO_NCHW)
    if stages[0].mean:
        tensor = body.add("GlobalAveragePool", tensor)
    for number, stage in enumerate(stages, 1):
        bias = [f"B{number}"] if f"B{number}" in used else []
        tensor = body.add(
            "Conv", tensor, f"W{number}", *bias, kernel_shape=stage.kernel, strides=stage.strides,
            dilations=stage.dilations, pads=stage.pads, group=stage.in_channels if stage.kind == "dw" else 1,
        )  # fmt: skip
        tensor = _activate(body, tensor, stage.activation, f"S{number}")
    if "R" in used:
        residual = body.add("Transpose", "R", perm=TO_NCHW) if last_out else "R"
        tensor = body.add("Add", tensor, residual)
        tensor = _activate(body, tensor, stages[-1].output_activation, "")
    plain = tensor
    if last_out:
        tensor = body.add("Transpose", tensor, perm=TO_NHWC)
    body.nodes[-1].output[:] = ["Y"]
    if pools:
        mean = body.add("GlobalAveragePool", plain if last_out else "Y")
        body.add("Transpose", mean, perm=TO_NHWC)
        body.nodes[-1].output[:] = ["P"]
    return body.nodes


def _normalise(body: _Body, x: str, epsilon: float, channels: int, last: bool) -> str:
    """The map normalised over its channels; the result is [N, C, H, W]."""
    if body.opset >= 17:
        x = x if last else body.add("Transpose", x, perm=TO_NHWC)
        x = body.add("LayerNormalization", x, body.constant([1.0] * channels), axis=-1, epsilon=epsilon)
        return body.add("Transpose", x, perm=TO_NCHW)
    x = body.add("Transpose", x, perm=TO_NCHW) if last else x
    centred = body.add("Sub", x, body.add("ReduceMean", x, axes=[1]))
    variance = body.add("ReduceMean", body.add("Mul", centred, centred), axes=[1])
    return body.add("Div", centred, body.add("Sqrt", body.add("Add", variance, body.constant(epsilon))))


def _activate(body: _Body, x: str, act: Activation, slope: str) -> str:
    """An activation in the operators that the opset has."""
    kind = act.kind
    if kind == "none":
        return x
    if kind == "clip":
        return _clip(body, x, act.alpha, act.beta)
    if kind == "hardswish":
        if body.opset >= 14:
            return body.add("HardSwish", x)
        return body.add("Mul", x, body.add("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    if kind == "silu":
        return body.add("Mul", x, body.add("Sigmoid", x))
    if kind == "hardsigmoid":
        return body.add("HardSigmoid", x, alpha=float(act.alpha), beta=float(act.beta))
    if kind == "leakyrelu":
        return body.add("LeakyRelu", x, alpha=float(act.alpha))
    if kind == "prelu":
        return body.add("PRelu", x, body.add("Reshape", slope, body.constant([-1, 1, 1], np.int64)))
    if kind == "gelu":
        inner = body.add("Erf", body.add("Mul", x, body.constant(math.sqrt(0.5))))
    elif kind == "gelu_tanh":
        cube = body.add("Mul", x, body.add("Mul", x, x))
        inner = body.add("Add", x, body.add("Mul", cube, body.constant(0.044715)))
        inner = body.add("Tanh", body.add("Mul", inner, body.constant(math.sqrt(2 / math.pi))))
    else:
        return body.add({"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}[kind], x)
    half = body.add("Mul", x, body.constant(0.5))
    return body.add("Mul", half, body.add("Add", inner, body.constant(1)))


def _clip(body: _Body, x: str, low: float, high: float) -> str:
    bounds = {"min": None if low <= -HUGE else float(low), "max": None if high >= HUGE else float(high)}
    if body.opset < 11:
        return body.add("Clip", x, **{name: bound for name, bound in bounds.items() if bound is not None})
    inputs = [x, *("" if bound is None else body.constant(bound) for bound in bounds.values())]
    while not inputs[-1]:
        inputs.pop()
    return body.add("Clip", *inputs)


# ---- The graph around the modules ------------------------------------------------------------------------------------


def _without_identities(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Drop the Identities that stand for the model's Transposes: they have no name."""
    made = {name for node in nodes for name in node.output}
    alias: dict[str, str] = {}
    kept = []
    for node in nodes:
        source, name = (node.input[0], node.output[0]) if node.op_type == "Identity" and not node.name else ("", "")
        if name and name not in outputs:
            alias[name] = source
        elif name and source in made and source not in outputs | set(alias):
            alias[source] = name
        else:
            kept.append(node)
    for node in kept:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                while name in alias:
                    name = alias[name]
                names[index] = name
    return kept


def _join_layouts(view: View, nodes: list[NodeProto], outputs: set[str], store: _Store) -> list[NodeProto]:
    """Put a Transpose where a tensor is made in one layout and used in the other; of one pixel, a Reshape."""

    def transpose(plain: str, last: bool) -> NodeProto:
        source, name = (plain, nhwc(plain)) if last else (nhwc(plain), plain)
        if one_pixel(view, plain):
            shape = store.constant(np.array([0, 1, 1, -1] if last else [0, -1, 1, 1], np.int64), "shape")
            return helper.make_node("Reshape", [source, shape], [name], name=f"{name}/reshape")
        perm = (to_last if last else to_first)(view.rank(plain) or 4)
        return helper.make_node("Transpose", [source], [name], name=f"{name}/transpose", perm=perm)

    made = {name for node in nodes for name in node.output}
    wanted = {name for node in nodes for name in [*node.input, *captured(node)]} | outputs
    first_input = {name for name in wanted if name.endswith(nhwc("")) and name not in made}
    result = []
    for name in sorted(first_input):
        plain = name.removesuffix(nhwc(""))
        if plain not in made:  # a graph input
            result.append(transpose(plain, True))
    for node in nodes:
        result.append(node)
        for name in node.output:
            plain = name.removesuffix(nhwc(""))
            if plain != name and plain in wanted and plain not in made:
                result.append(transpose(plain, False))
            elif plain == name and nhwc(name) in first_input:
                result.append(transpose(name, True))
    return result


def _tidy(graph: onnx.GraphProto) -> None:
    """Remove initializers and stated shapes that nothing refers to any more."""
    inputs = {value.name for value in graph.input}
    used = {name for node in graph.node for name in [*node.input, *captured(node)]} | inputs
    used |= {value.name for value in graph.output}
    made = {name for node in graph.node for name in node.output}
    _keep(graph.initializer, lambda tensor: tensor.name in used)
    _keep(graph.sparse_initializer, lambda tensor: tensor.values.name in used)
    _keep(graph.value_info, lambda value: value.name in made)
    _keep(graph.quantization_annotation, lambda item: item.tensor_name in made | used)


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    for index in reversed(range(len(items))):
        if not wanted(items[index]):
            del items[index]
