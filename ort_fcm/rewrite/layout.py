"""Choose which tensors are channels-last, and rewrite the nodes between modules to match.

A module runs channels-last, and can read or write [N, C, H, W] itself at some cost; elementwise nodes, Concat,
reductions and some others run in either layout; every other node needs [N, C, H, W], pools and most Resizes among them:
ONNX Runtime's CUDA kernels for these are not channels-last, and a ReduceMean for a global pool would be several slow
ones.
A tensor whose producer and users disagree costs a Transpose. The cheapest choice for the whole graph is a minimum cut
between the two layouts.

In `Step`s and here, a tensor's plain name is its [N, C, H, W] form (or whatever the model had), `nhwc(name)` the other.
Maps whose pixels stand in a row, [N, C, L], as the heads of detectors have them, have two layouts as well.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ort_fcm.planner.chain import STEM_CHANNELS
from ort_fcm.rewrite.graph import BINARY, UNARY, Array, View, attributes, captured
from ort_fcm.rewrite.plan import Segment


def to_last(rank: int) -> list[int]:
    """The permutation that moves channels from axis 1 to the end."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


TO_NHWC, TO_NCHW = to_last(4), to_first(4)
RANKS = (3, 4)  # of tensors that have two layouts: maps, and maps in a row, [N, C, L]
NCHW_MODULE = 0.5  # of a Transpose: what a module pays for reading or writing [N, C, H, W] itself
LAUNCH_BYTES = 4_000_000  # bytes that could be moved in the time of one launch
FOREVER = 1 << 60


def nhwc(tensor: str) -> str:
    return f"{tensor}/nhwc"


@dataclass
class Step:
    """A node of the result: a module, or a node of the model, in the order of the graph."""

    segment: Segment | None = None
    node: NodeProto | None = None
    last_in: bool = False  # channels-last: the input (or the whole node)
    last_out: bool = False  # the module's output and residual


@dataclass(frozen=True)
class Flexible:
    """How a node runs channels-last. tensors: those whose layout changes with it; build: the nodes, given a function
    that stores a constant and returns its name; saves: it becomes nothing then."""

    tensors: tuple[str, ...]
    build: Callable[[Callable[[Array], str]], list[NodeProto]]
    saves: bool = False


@dataclass
class _Cut:
    """A network of capacities between variables; the minimum cut by augmenting paths."""

    capacity: dict[object, dict[object, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    def edge(self, a: object, b: object, amount: int) -> None:
        self.capacity[a][b] += amount
        self.capacity[b][a] += 0

    def tie(self, members: Iterable[object], key: object, amount: int) -> None:
        """`amount` is paid once if the members are not all on one side."""
        self.edge((key, 0), (key, 1), amount)
        for member in members:
            self.edge(member, (key, 0), FOREVER)
            self.edge((key, 1), member, FOREVER)

    def source_side(self, source: object, sink: object) -> set[object]:
        while True:
            parent: dict[object, object] = {source: source}
            queue = deque([source])
            while queue and sink not in parent:
                a = queue.popleft()
                for b, left in self.capacity[a].items():
                    if left > 0 and b not in parent:
                        parent[b] = a
                        queue.append(b)
            if sink not in parent:
                return set(parent)
            path, b = [], sink
            while b != source:
                path.append((parent[b], b))
                b = parent[b]
            flow = min(self.capacity[a][b] for a, b in path)
            for a, b in path:
                self.capacity[a][b] -= flow
                self.capacity[b][a] += flow


def choose(view: View, steps: list[Step], pooled: set[str]) -> dict[int, Flexible]:
    """Set `last_in` and `last_out` of every step. Returns how those nodes run that do so channels-last. pooled: maps
    that a module on their mean does not read itself."""
    cut = _Cut()
    flexible: dict[int, Flexible] = {}
    ends: dict[str, list[object]] = defaultdict(list)  # variables (step number, end) and "NCHW", by tensor
    for i, step in enumerate(steps):
        if step.segment is not None:
            first, last = step.segment.stages[0], step.segment.stages[-1]
            reads = not (first.mean and first.source in pooled)
            if reads:
                ends[first.source].append((i, "in"))
            if first.factors:
                ends[first.factors].append((i, "in"))
            ends[last.output].append((i, "out"))
            if last.residual:
                ends[last.residual].append((i, "out"))
            free = (first.kind == "conv" and first.in_channels <= STEM_CHANNELS) or not reads
            cut.edge("NHWC", (i, "in"), 0 if free else int(NCHW_MODULE * _cost(view, first.source)))
            cut.edge("NHWC", (i, "out"), int(NCHW_MODULE * _cost(view, last.output)))
            continue
        assert step.node is not None
        way = channels_last(view, step.node)
        if way is not None:
            flexible[i] = way
            for name in way.tensors:
                ends[name].append((i, "in"))
            if way.saves:
                cut.edge("NHWC", (i, "in"), _cost(view, way.tensors[0]))
        for name in [*step.node.input, *step.node.output, *captured(step.node)]:
            if name and (way is None or view.name(name) not in way.tensors):
                ends[view.name(name)].append("NCHW")
    for name in set(ends) - set(view.producer) | view.outputs:  # from outside this graph, or for it
        ends[name].append("NCHW")
    for name, members in ends.items():
        if any(member != "NCHW" for member in members):
            cut.tie(dict.fromkeys(members), name, _cost(view, name))
    chosen = cut.source_side("NHWC", "NCHW")
    for i, step in enumerate(steps):
        step.last_in, step.last_out = (i, "in") in chosen, (i, "out") in chosen
    return {i: way for i, way in flexible.items() if steps[i].last_in}


def _cost(view: View, tensor: str) -> int:
    """Of transposing a tensor, in bytes moved."""
    if one_pixel(view, tensor):
        return 2  # nothing moves; the half of it still says that modules would rather have it channels-last
    shape = view.planned(tensor) or (1, 32, 56, 56)
    size = 2 if view.type(tensor) == TensorProto.FLOAT16 else 4
    return 2 * size * int(np.prod(shape, dtype=np.int64)) + LAUNCH_BYTES


def one_pixel(view: View, tensor: str) -> bool:
    """Whether the tensor is a map of one pixel, which is the same in both layouts."""
    return view.shapes.symbolic.get(tensor, ())[2:] == (1, 1)


# How each kind of node runs channels-last. A rule returns None for a node that it does not know.


def channels_last(view: View, node: NodeProto) -> Flexible | None:
    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    for rule in (elementwise, concat, channel_axis, cut_out, resize, reduction, in_a_row, flatten, transpose, shape_of):
        if (way := rule(view, node)) is not None:
            return way
    return None


def _changed(node: NodeProto, inputs: list[str], tensors: Iterable[str], **replaced: object) -> NodeProto:
    """A copy with these inputs, the outputs renamed as the tensors are, and some attributes replaced."""
    result = NodeProto()
    result.CopyFrom(node)
    tensors = set(tensors)
    result.input[:] = inputs
    result.output[:] = [nhwc(name) if name in tensors else name for name in node.output]
    kept = [attribute for attribute in result.attribute if attribute.name not in replaced]
    del result.attribute[:]
    result.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in replaced.items() if v is not None)])
    return result


def _common_rank(view: View, names: Iterable[str]) -> int | None:
    """The rank of all of these, if tensors of such a rank have two layouts."""
    ranks = {view.rank(name) for name in names}
    return next(iter(ranks)) if len(ranks) == 1 and ranks <= set(RANKS) else None


def elementwise(view: View, node: NodeProto) -> Flexible | None:
    if node.op_type not in UNARY | BINARY or node.op_type in ("BatchNormalization", "Identity", "Dropout"):
        return None
    names = [view.name(name) if name else "" for name in node.input]
    tensors = [name for name in names if name and view.tensor(name) is None]
    outputs = [name for name in node.output if name]
    rank = _common_rank(view, [*tensors, *outputs])
    if not tensors or rank is None:
        return None
    if any(name and view.tensor(name) is not None and len(view.tensor(name).dims) > rank for name in names):  # type: ignore[union-attr]
        return None

    def build(store: Callable[[Array], str]) -> list[NodeProto]:
        inputs = []
        for name in names:
            value = view.constant(name) if name and name not in tensors else None
            if value is not None and value.size > 1:
                name = store(value.reshape((1,) * (rank - value.ndim) + value.shape).transpose(to_last(rank)))
            inputs.append(nhwc(name) if name in tensors else name)
        return [_changed(node, inputs, outputs)]

    return Flexible((*dict.fromkeys(tensors), *outputs), build)


def concat(view: View, node: NodeProto) -> Flexible | None:
    if node.op_type != "Concat":
        return None
    names = [view.name(name) for name in node.input]
    rank = _common_rank(view, [*names, node.output[0]])
    if rank is None or any(view.tensor(name) is not None for name in names):
        return None
    axis = to_last(rank).index(attributes(node)["axis"] % rank)
    return Flexible(
        (*dict.fromkeys(names), node.output[0]),
        lambda store: [_changed(node, [nhwc(n) for n in names], node.output, axis=axis)],
    )


def in_a_row(view: View, node: NodeProto) -> Flexible | None:
    """Reshape of [N, C, H, W] to [N, C, H * W]."""
    if node.op_type != "Reshape" or attributes(node).get("allowzero", 0):
        return None
    name, output = view.name(node.input[0]), node.output[0]
    size, target = view.shapes.symbolic.get(name, ()), view.constant(node.input[1])
    if target is None or len(target) != 3 or len(size) != 4 or view.tensor(name) is not None:
        return None
    batch, channels, pixels = (int(n) for n in target)
    area = size[2] * size[3] if isinstance(size[2], int) and isinstance(size[3], int) else None
    known = batch in (0, size[0]) or (batch == -1 and pixels == area)
    if not known or channels not in (0, size[1]) or pixels not in (-1, area) or not isinstance(size[1], int):
        return None
    moved = np.array([batch, pixels, size[1]], np.int64)
    return Flexible((name, output), lambda store: [_changed(node, [nhwc(name), store(moved)], [output])])


def channel_axis(view: View, node: NodeProto) -> Flexible | None:
    """Split along an axis, and Gather of several channels."""
    if node.op_type not in ("Split", "Gather"):
        return None
    name = view.name(node.input[0])
    outputs = [output for output in node.output if output]
    if view.tensor(name) is not None or any(view.rank(n) != 4 for n in [name, *outputs]):
        return None
    if any(view.tensor(other) is None for other in node.input[1:]):
        return None
    axis = TO_NHWC.index(attributes(node).get("axis", 0) % 4)
    return Flexible((name, *outputs), lambda store: [_changed(node, [nhwc(name), *node.input[1:]], outputs, axis=axis)])


def cut_out(view: View, node: NodeProto) -> Flexible | None:
    """Slice, with what it needs given as constants."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return None
    name, output, axes = view.name(node.input[0]), node.output[0], view.constant(node.input[3])
    if view.tensor(name) is not None or axes is None or any(view.rank(n) != 4 for n in (name, output)):
        return None
    moved = np.array([TO_NHWC.index(int(axis) % 4) for axis in axes], axes.dtype)

    def build(store: Callable[[Array], str]) -> list[NodeProto]:
        return [_changed(node, [nhwc(name), *node.input[1:3], store(moved), *node.input[4:]], [output])]

    return Flexible((name, output), build)


def resize(view: View, node: NodeProto) -> Flexible | None:
    """Resize to the nearest: ONNX Runtime's kernels of the other modes know rows and columns by their position."""
    values = attributes(node)
    if node.op_type not in ("Resize", "Upsample") or values.get("mode", "nearest") != "nearest":
        return None
    if values.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    name, output = view.name(node.input[0]), node.output[0]
    if view.tensor(name) is not None or any(view.rank(n) != 4 for n in (name, output)):
        return None
    axes = values.get("axes", range(4))  # those that scales and sizes are of
    if "axes" in values and (any(node.input[3:]) or view.tensor(node.input[2]) is None):
        return None
    if values.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None

    def build(store: Callable[[Array], str]) -> list[NodeProto]:
        nodes, inputs = [], [nhwc(name), *node.input[1:]]
        for slot, other in enumerate(node.input[1:], 1):
            value = view.constant(other)
            if value is not None and value.size == len(axes):  # others are empty, or a region of no meaning
                whole = np.ones(4, value.dtype)
                whole[[axis % 4 for axis in axes]] = value
                inputs[slot] = store(whole[TO_NHWC])
            elif value is None and other:
                inputs[slot] = f"{output}/nhwc_{slot}"
                order = store(np.array(TO_NHWC, np.int64))
                nodes.append(helper.make_node("Gather", [other, order], [inputs[slot]], name=inputs[slot]))
        return [*nodes, _changed(node, inputs, [output], axes=None)]

    return Flexible((name, output), build)


def reduction(view: View, node: NodeProto) -> Flexible | None:
    """ReduceMean and the like over constant axes; without keepdims only over the whole map."""
    if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceSum", "ReduceMin", "ReduceL2"):
        return None
    name, values = view.name(node.input[0]), attributes(node)
    axes: list[int] | Array | None = values.get("axes")
    if axes is None and len(node.input) > 1:
        axes = view.constant(node.input[1])
    if axes is None or not len(axes) or view.rank(name) != 4 or view.tensor(name) is not None:
        return None
    moved = sorted(TO_NHWC.index(int(axis) % 4) for axis in axes)
    keep = bool(values.get("keepdims", 1))
    if not keep and moved != [1, 2]:
        return None

    def build(store: Callable[[Array], str]) -> list[NodeProto]:
        renamed = node.output if keep else []
        if "axes" in values:
            return [_changed(node, [nhwc(name)], renamed, axes=moved)]
        return [_changed(node, [nhwc(name), store(np.array(moved, np.int64))], renamed)]

    return Flexible((name, node.output[0]) if keep else (name,), build)


def flatten(view: View, node: NodeProto) -> Flexible | None:
    """Flatten, Reshape to two dimensions, and Squeeze of [N, C, 1, 1]: in either layout the same values in a row."""
    name = view.name(node.input[0]) if node.input else ""
    size = view.shapes.symbolic.get(name, ())
    if len(size) != 4 or size[2:] != (1, 1):
        return None
    values = attributes(node)
    if node.op_type == "Squeeze":
        axes = values.get("axes") if view.opset < 13 else view.constant(node.input[1]) if len(node.input) > 1 else None
        if axes is None or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            return None

        def squeeze(store: Callable[[Array], str]) -> list[NodeProto]:
            if view.opset < 13:
                return [_changed(node, [nhwc(name)], [], axes=[1, 2])]
            return [_changed(node, [nhwc(name), store(np.array([1, 2], np.int64))], [])]

        return Flexible((name,), squeeze)
    if node.op_type == "Flatten" and values.get("axis", 1) == 1:
        return Flexible((name,), lambda store: [_changed(node, [nhwc(name)], [])])
    if node.op_type == "Reshape":
        target = view.constant(node.input[1])
        channels = size[1]
        if target is not None and len(target) == 2 and not (target[1] == 0 and channels != target[1]):
            return Flexible((name,), lambda store: [_changed(node, [nhwc(name), node.input[1]], [])])
    return None


def transpose(view: View, node: NodeProto) -> Flexible | None:
    """A Transpose of the model to or from channels-last is nothing where the other side is channels-last."""
    if node.op_type != "Transpose":
        return None
    perm, name, output = attributes(node).get("perm"), view.name(node.input[0]), node.output[0]
    if perm in (TO_NHWC, to_last(3)):
        return Flexible((name,), lambda store: [helper.make_node("Identity", [nhwc(name)], [output])], saves=True)
    if perm == TO_NCHW:
        return Flexible((output,), lambda store: [helper.make_node("Identity", [name], [nhwc(output)])], saves=True)
    return None


def shape_of(view: View, node: NodeProto) -> Flexible | None:
    if node.op_type != "Shape" or node.attribute or view.rank(node.input[0]) != 4:
        return None
    name, inner = view.name(node.input[0]), f"{node.output[0]}/nhwc_shape"
    return Flexible(
        (name,),
        lambda store: [
            helper.make_node("Shape", [nhwc(name)], [inner], name=node.name),
            helper.make_node("Gather", [inner, store(np.array(TO_NCHW, np.int64))], [node.output[0]]),
        ],
    )
