"""Find stages, and chains of them.

A stage is a convolution that a kernel can compute, with everything that folds into it: a Pad in front, then
BatchNormalization and constant per-channel factors and terms, its activation, and the Add of a residual. A convolution
that is no stage has a reason instead.

A mean over the map folds into the pointwise layer behind it. So the tail of a classification network is a chain, whose
fully connected layers are pointwise ones on a map of one pixel; and a gate, the two layers of a squeeze-and-excite,
where the product with what they give folds into the pointwise that reads it. A LayerNormalization over
the channels folds into a pointwise too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from ort_fcm.planner.chain import STEM_CHANNELS
from ort_fcm.rewrite.activation import Activation, activation_after
from ort_fcm.rewrite.graph import Array, View, attributes, operator
from ort_fcm.rewrite.norm import Norm, norm_before

CONVOLUTIONS = ("Conv", "FusedConv", "ConvInteger", "QLinearConv")
FULLY_CONNECTED = ("Gemm", "MatMul")  # behind a mean over the map
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
DENSE_CHANNELS = 64  # a dense convolution over more input channels is better left to cuDNN
OLDEST_OPSET = 7  # before it, elementwise operators broadcast by an attribute
NO_ACTIVATION = Activation()
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
_FUSED_CONV = {  # com.microsoft FusedConv's attribute -> (kind, default parameters)
    "": ("none", ()), "Relu": ("relu", ()), "Sigmoid": ("sigmoid", ()), "Tanh": ("tanh", ()),
    "LeakyRelu": ("leakyrelu", (0.01,)), "Clip": ("clip", ()), "HardSigmoid": ("hardsigmoid", (0.2, 0.5)),
    "HardSwish": ("hardswish", ()),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A convolution and what goes with it. Windows as in ONNX; scale and shift, [M], apply to the convolution's output
    and fold into weight and bias. nodes: positions of all nodes it stands for, the convolution's first. A fully
    connected layer is a pw, whose weight is a matrix and whose source and output may have shape [N, C]."""

    kind: str  # dw, pw, conv
    source: str  # the tensor it reads
    output: str
    weight: str
    bias: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    nodes: tuple[int, ...]
    scale: Array | None = None
    shift: Array | None = None
    activation: Activation = NO_ACTIVATION
    residual: str = ""
    output_activation: Activation = NO_ACTIVATION
    repeats: int = (
        1  # of each channel of `source`: a depthwise with a channel multiplier, on channels repeated so often
    )
    transposed: bool = False  # the weight is a matrix [C, M], not [M, C]
    mean: bool = False  # it reads the mean of its source over the map
    unfolded: Stage | None = None  # then the stage that reads that mean itself
    factors: str = ""  # what its source is multiplied by, [N, C, 1, 1] or [N, C]
    norm: Norm | None = None  # of its source over the channels

    @property
    def conv(self) -> int:
        return self.nodes[0]

    @property
    def poolable(self) -> bool:
        """Whether a module that ends here can give the mean of its output over the map besides."""
        return not (self.mean or (self.kind == "dw" and self.residual))


def chains(view: View) -> tuple[list[list[Stage]], dict[int, str]]:
    """Maximal chains of stages of which each one's output feeds the next only, and the reasons of all other
    convolutions, and fully connected layers behind a mean over the map. A chain ends behind a residual Add, as a module
    does."""
    stages: dict[int, Stage] = {}
    reasons: dict[int, str] = {}
    tails: set[str] = set()  # means over a map, and what layers make of them
    for index, node in enumerate(view.nodes):
        found: Stage | str
        if node.op_type in CONVOLUTIONS:
            found = stage(view, index)
        elif operator(node) in FULLY_CONNECTED and view.name(node.input[0]) in tails:
            found = fully_connected(view, index)
        else:
            if view.is_global_mean(node) or (same_values(view, node) and view.name(node.input[0]) in tails):
                tails.add(node.output[0])
            continue
        if isinstance(found, str):
            reasons[index] = found
            continue
        stages[index] = found
        if found.kind == "pw" and found.source in tails:
            tails.add(view.name(found.output))
    taken: set[int] = set()
    for index in sorted(stages, reverse=True):  # where two branches meet in an Add, it belongs to the later
        extended = with_residual(view, stages[index], taken)
        taken.update(extended.nodes)
        stages[index] = extended
    for index, item in stages.items():
        stages[index] = with_norm(view, with_factors(view, item, taken))
    by_source: dict[str, list[Stage]] = {}
    for item in stages.values():
        by_source.setdefault(item.source, []).append(item)
    follower = {index: _follower(view, item, by_source) for index, item in stages.items()}
    stages = {index: with_mean(view, item) for index, item in stages.items()}
    heads = set(stages) - {item.conv for item in follower.values() if item}
    result = []
    for index in sorted(heads):
        chain = [stages[index]]
        while (after := follower[chain[-1].conv]) is not None:
            chain.append(after)
        result.append(chain)
    return result, reasons


def stage(view: View, index: int) -> Stage | str:
    """The stage of the convolution at `index` without a residual, or why it is none."""
    node = view.nodes[index]
    if operator(node) != node.op_type:
        return f"an operator of domain {node.domain}"
    if node.op_type in ("ConvInteger", "QLinearConv"):
        return "integer convolutions are not fused"
    if view.opset < OLDEST_OPSET:
        return f"opset {view.opset} is older than {OLDEST_OPSET}"
    source, weight = view.name(node.input[0]), view.name(node.input[1])
    bias = view.name(node.input[2]) if len(node.input) > 2 else ""
    for name in [weight, bias] if bias else [weight]:
        if view.tensor(name) is None:
            return f"the {'bias' if name == bias else 'weight'} is not constant: {view.why_not_constant(name)}"
    tensor = view.tensor(weight)
    assert tensor is not None
    if tensor.data_type not in TYPES:
        return f"type {TensorProto.DataType.Name(tensor.data_type).lower()} is neither float nor float16"
    if len(tensor.dims) != 4:
        return f"a {len(tensor.dims) - 2}-D convolution; only 2-D ones are fused"
    values = attributes(node)
    group = values.get("group", 1)
    out_channels, in_channels = tensor.dims[0], tensor.dims[1] * group
    kernel = (tensor.dims[2], tensor.dims[3])
    if list(values.get("kernel_shape", kernel)) != list(kernel) or 0 in tensor.dims or out_channels % group:
        return "kernel_shape, group and the weight's shape disagree"
    if bias and list(view.tensor(bias).dims) != [out_channels]:  # type: ignore[union-attr]
        return "the bias does not have one value for each output channel"
    strides = tuple(values.get("strides", (1, 1)))
    dilations = tuple(values.get("dilations", (1, 1)))
    pads = _pads(view, node, kernel, strides, dilations)
    if isinstance(pads, str):
        return pads
    source, padded, pad_nodes = pad_before(view, source, pads)
    patches = kernel == strides and dilations == (1, 1)
    kind = _kind(in_channels, out_channels, group, kernel, padded, patches)
    if kind not in ("dw", "pw", "conv"):
        return kind
    repeats = out_channels // in_channels if kind == "dw" else 1
    found = Stage(
        kind, source, node.output[0], weight, bias, in_channels * repeats, out_channels, kernel, strides, dilations,
        padded, (index, *pad_nodes), repeats=repeats,
    )  # fmt: skip
    if node.op_type == "FusedConv":
        return fused_conv(view, node, found)
    return with_activation(view, affine_after(view, found))


def with_activation(view: View, found: Stage) -> Stage:
    act = activation_after(view, found.output, found.out_channels)
    return replace(found, activation=act, nodes=found.nodes + act.nodes, output=act.output)


def fully_connected(view: View, index: int) -> Stage | str:
    """The stage of the Gemm or MatMul at `index`, or why it is none."""
    node = view.nodes[index]
    values, names = attributes(node), [view.name(name) for name in node.input if name]
    for name in names[1:]:
        if view.tensor(name) is None:
            return f"the {'weight' if name == names[1] else 'bias'} is not constant: {view.why_not_constant(name)}"
    weight, *biases = (view.tensor(name) for name in names[1:])
    assert weight is not None
    if weight.data_type not in TYPES:
        return f"type {TensorProto.DataType.Name(weight.data_type).lower()} is neither float nor float16"
    if values.get("alpha", 1.0) != 1 or values.get("beta", 1.0) != 1 or values.get("transA", 0):
        return "a Gemm with alpha, beta or transA"
    transposed = not values.get("transB", 0)
    size = view.size(node.input[0])
    if len(weight.dims) != 2 or size is None or len(size) != 2 or size[1] != weight.dims[0 if transposed else 1]:
        return "its input and weight are not [N, C] and a matrix"
    in_channels, out_channels = weight.dims if transposed else weight.dims[::-1]
    if any(bias is None or list(bias.dims) != [out_channels] for bias in biases):
        return "the bias does not have one value for each output channel"
    source, between = squeezed(view, node.input[0])
    found = Stage(
        "pw", source, node.output[0], names[1], names[2] if biases else "", in_channels, out_channels, (1, 1), (1, 1),
        (1, 1), (0, 0, 0, 0), (index, *between), transposed=transposed,
    )  # fmt: skip
    return with_activation(view, affine_after(view, found, rank=2))


def squeezed(view: View, name: str) -> tuple[str, tuple[int, ...]]:
    """The tensor that `name` is another shape of, where both are [N, C] or [N, C, 1, 1], and the nodes between."""
    name, nodes = view.name(name), tuple[int, ...]()
    while (index := view.producer.get(name)) is not None and view.only_use(name) is not None:
        if not same_values(view, view.nodes[index]):
            break
        nodes, name = (*nodes, index), view.name(view.nodes[index].input[0])
    return name, nodes


def same_values(view: View, node: NodeProto) -> bool:
    """Whether the node's output is another shape of its input, where both are [N, C] or [N, C, 1, 1]."""
    if operator(node) not in RESHAPES:
        return False
    before, after = view.size(node.input[0]) or (), view.size(node.output[0]) or ()
    return len(before) > 1 and before[:2] == after[:2] and {before[2:], after[2:]} <= {(), (1, 1)}


def _kind(
    in_channels: int, out_channels: int, group: int, kernel: tuple[int, int], pads: Sequence[int], patches: bool
) -> str:
    """The kind of stage, or why it is none. Over few channels, groups are cheap as a dense convolution with zeros.
    patches: windows lie side by side, so that each pixel is read once, as a pointwise reads it."""
    if group == 1 and kernel == (1, 1) and not any(pads):
        return "pw"
    if group > 1 and group == in_channels and (in_channels > STEM_CHANNELS or out_channels == in_channels):
        return "dw"
    if in_channels <= STEM_CHANNELS:
        return "conv"
    if group == 1 and (in_channels <= DENSE_CHANNELS or patches) and in_channels % 32 == 0:  # whole groups of channels
        return "conv"
    if group > 1:
        return f"grouped convolution ({group} groups of {in_channels // group} channels)"
    size = f"{kernel[0]}x{kernel[1]}"
    return f"dense {size} convolution over {in_channels} channels, left to ONNX Runtime's own kernel"


def _pads(
    view: View, node: NodeProto, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[int, int, int, int] | str:
    """Explicit pads (top, left, bottom, right), or why there are none."""
    values = attributes(node)
    auto = values.get("auto_pad", "NOTSET") or "NOTSET"
    if auto == "NOTSET":
        pads = tuple(values.get("pads", (0, 0, 0, 0)))
        return pads if min(pads) >= 0 else "negative pads"
    if auto == "VALID":
        return (0, 0, 0, 0)
    sizes = view.shapes.symbolic.get(view.name(node.input[0]), (None,) * 4)
    before, after = [], []
    for axis in (0, 1):
        reach, size = dilations[axis] * (kernel[axis] - 1) + 1, sizes[axis + 2]
        if strides[axis] == 1:
            total = reach - 1
        elif isinstance(size, int):
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
        else:
            return f"auto_pad {auto} with stride {strides[axis]} on a size known at run time only"
        small = total // 2
        before.append(small if auto == "SAME_UPPER" else total - small)
        after.append(total - before[-1])
    return (before[0], before[1], after[0], after[1])


def pad_before(
    view: View, source: str, pads: tuple[int, int, int, int]
) -> tuple[str, tuple[int, int, int, int], tuple[int, ...]]:
    """Fold a Pad of zeros around the map into the convolution: (its input, pads, (its position,) or ())."""
    unchanged = source, pads, ()
    index = view.producer.get(source)
    if index is None or operator(view.nodes[index]) != "Pad":
        return unchanged
    node = view.nodes[index]
    values = attributes(node)
    amounts = values.get("pads") if view.opset < 11 else view.constant(node.input[1])
    value: float | None = values.get("value", 0.0)
    if view.opset >= 11 and len(node.input) > 2 and node.input[2]:
        value = view.scalar(node.input[2])
    if amounts is None or len(amounts) != 8 or values.get("mode", "constant") != "constant" or value != 0.0:
        return unchanged
    extra = [int(amount) for amount in amounts]
    if (len(node.input) > 3 and node.input[3]) or any(extra[i] for i in (0, 1, 4, 5)) or min(extra) < 0:
        return unchanged
    together = (pads[0] + extra[2], pads[1] + extra[3], pads[2] + extra[6], pads[3] + extra[7])
    return view.name(node.input[0]), together, (index,)


def affine_after(view: View, found: Stage, rank: int = 4) -> Stage:
    """Fold BatchNormalization and constant per-channel Mul, Div, Add and Sub behind the convolution, whose output has
    this rank."""
    scale, shift = np.ones(found.out_channels), np.zeros(found.out_channels)
    nodes, output = found.nodes, found.output
    while (use := view.only_use(output)) is not None:
        factor = channel_affine(view, use, (1, found.out_channels, 1, 1)[:rank])
        if factor is None:
            break
        scale, shift = scale * factor[0], shift * factor[0] + factor[1]
        nodes, output = (*nodes, use[0]), view.nodes[use[0]].output[0]
    if output == found.output:
        return found
    return replace(found, scale=scale, shift=shift, nodes=nodes, output=output)


def channel_affine(
    view: View, use: tuple[int, int], shape: tuple[int, ...]
) -> tuple[Array | float, Array | float] | None:
    """(a, b) where the node computes a * x + b for each channel; shape: that of a value for each."""
    node, slot = view.nodes[use[0]], use[1]
    if operator(node) == "BatchNormalization" and slot == 0:
        values = attributes(node)
        stats = [view.constant(name) for name in node.input[1:5]]
        if any(s is None for s in stats) or values.get("training_mode", 0) or len([o for o in node.output if o]) > 1:
            return None
        gamma, beta, mean, variance = (s.astype(np.float64) for s in stats)  # type: ignore[union-attr]
        factor = gamma / np.sqrt(variance + values.get("epsilon", 1e-5))
        return factor, beta - mean * factor
    if operator(node) not in ("Mul", "Div", "Add", "Sub") or slot < 0 or node.input[0] == node.input[1]:
        return None
    constant = view.constant(node.input[1 - slot])
    if constant is None or (node.op_type == "Div" and slot == 1):
        return None
    own = (1,) * (len(shape) - constant.ndim) + constant.shape
    if own not in ((1,) * len(shape), shape):
        return None
    term = constant.astype(np.float64).reshape(-1)
    if node.op_type == "Mul":
        return term, 0.0
    if node.op_type == "Div":
        return 1 / term, 0.0
    if node.op_type == "Add":
        return 1.0, term
    return (1.0, -term) if slot == 0 else (-1.0, term)


def fused_conv(view: View, node: NodeProto, found: Stage) -> Stage | str:
    """com.microsoft FusedConv: activation(convolution + fourth input)."""
    values = attributes(node)
    name = values.get("activation", "")
    if node.domain != "com.microsoft" or name not in _FUSED_CONV:
        return f"FusedConv with activation '{name}'"
    kind, defaults = _FUSED_CONV[name]
    parameters = [*values.get("activation_params", defaults), 0.0, 0.0]
    act = Activation(kind, parameters[0], parameters[1], output=found.output)
    if len(node.input) > 3 and node.input[3]:
        return replace(found, residual=view.name(node.input[3]), output_activation=act)
    return replace(found, activation=act)


def with_residual(view: View, found: Stage, taken: set[int]) -> Stage:
    """The stage with the Add that follows, and the activation behind that, if the Add is of two equal shapes."""
    use = view.only_use(found.output)
    if found.residual or use is None or use[0] in taken or operator(view.nodes[use[0]]) not in ("Add", "Sum"):
        return found
    node = view.nodes[use[0]]
    if len(node.input) != 2:
        return found
    other = view.name(node.input[1 - use[1]])
    size = view.size(found.output)
    if other == found.output or view.tensor(other) is not None or size != view.size(other) or len(size or ()) != 4:
        return found
    output = node.output[0]
    act = activation_after(view, output, found.out_channels)
    if act.kind == "prelu":
        act = Activation(output=output)
    return replace(
        found, residual=other, output_activation=act, nodes=(*found.nodes, use[0], *act.nodes), output=act.output
    )


def with_factors(view: View, found: Stage, taken: set[int]) -> Stage:
    """The pointwise stage with the product that it alone reads, of a map and a factor for each image and channel."""
    index = view.producer.get(found.source)
    if found.kind != "pw" or index is None or index in taken or operator(view.nodes[index]) != "Mul":
        return found
    size = view.size(found.source)
    if size is None or len(size) != 4 or view.only_use(found.source) is None:
        return found
    names = [view.name(name) for name in view.nodes[index].input]
    for source, factors in (names, names[::-1]):
        same_type = view.type(source) == view.type(factors) != 0
        constant = view.tensor(source) is not None or view.tensor(factors) is not None
        if same_type and not constant and view.size(source) == size and view.size(factors) == (*size[:2], 1, 1):
            factors, between = squeezed(view, factors)
            return replace(found, source=source, factors=factors, nodes=(*found.nodes, index, *between))
    return found


def with_norm(view: View, found: Stage) -> Stage:
    """The pointwise stage with the LayerNormalization over channels that it alone reads."""
    norm = norm_before(view, found.source, found.in_channels) if found.kind == "pw" and not found.factors else None
    return replace(found, source=norm.source, norm=norm, nodes=(*found.nodes, *norm.nodes)) if norm else found


def with_mean(view: View, found: Stage) -> Stage:
    """The pointwise stage with the mean that it alone reads, over a map of more than one pixel."""
    name, between = squeezed(view, found.source)
    index = view.producer.get(name)
    if found.kind != "pw" or found.strides != (1, 1) or found.residual or found.factors or found.norm or index is None:
        return found
    if not view.is_global_mean(view.nodes[index]) or view.only_use(name) is None:
        return found
    if (view.size(view.nodes[index].input[0]) or ())[2:] == (1, 1):
        return found
    source, nodes = view.name(view.nodes[index].input[0]), (*found.nodes, *between, index)
    return replace(found, source=source, mean=True, unfolded=found, nodes=nodes)


def _follower(view: View, item: Stage, by_source: dict[str, list[Stage]]) -> Stage | None:
    """The stage that alone uses the output of `item`."""
    output, after = view.name(item.output), by_source.get(view.name(item.output), [])
    stop = item.residual or len(after) != 1 or view.is_output(output)
    if stop or after[0].factors or after[0].norm or after[0].repeats > 1:
        return None
    readers = {index for index, _ in view.uses(output)}
    pad = set(after[0].nodes) if len(readers) == 1 else set()
    pad_only = all(view.only_use(view.nodes[i].output[0]) for i in readers if view.nodes[i].op_type == "Pad")
    same_type = view.type(view.nodes[item.conv].output[0]) == view.type(view.nodes[after[0].conv].output[0])
    return after[0] if readers <= pad and pad_only and same_type and len(view.uses(output)) == 1 else None
