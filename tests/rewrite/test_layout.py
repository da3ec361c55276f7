"""Where channels-last islands end, and that the choice is the cheapest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from ort_fcm.rewrite.layout import TO_NCHW, TO_NHWC, _Cut
from tests.rewrite.networks import Net, assert_same
from tests.rewrite.test_patterns import modules, ops

Fuse = Callable[..., Any]


def layouts(model: Any) -> list[str]:
    return [f"{m['input_layout']} {m['output_layout']}" for m in modules(model)]


def test_edges_are_read_and_written_by_modules(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.conv(net.input(1, 3, 20, 20), 8, 3, strides=[2, 2])
    for _ in range(3):
        x = net.conv(net.op("Relu", net.depthwise(x)), 8)
    net.output(x)
    model = net.model()
    result = fuse(model)
    assert layouts(result.model) == ["NCHW NHWC", "NHWC NHWC", "NHWC NCHW"]
    assert ops(result.model) == {"FusedConvModule": 3}
    assert_same(model, result.model, seed)


def test_transposes_of_a_channels_last_network_cancel(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    image = net.input(1, 20, 20, 6)
    x = net.op("Transpose", image, perm=TO_NCHW)
    net.channels[x] = 6
    x = net.depthwise(net.op("Relu", net.conv(x, 12)))
    x = net.op("Transpose", x, perm=TO_NHWC)
    x = net.op("LayerNormalization", x, net.const(net.rng.standard_normal((20, 12))), axis=-2)
    x = net.op("Transpose", x, perm=TO_NCHW)
    x = net.conv(x, 10)
    net.output(net.op("Transpose", x, perm=TO_NHWC))
    model = net.model()
    result = fuse(model)
    assert layouts(result.model) == ["NHWC NHWC", "NHWC NHWC"]
    assert ops(result.model) == {"FusedConvModule": 2, "LayerNormalization": 1}
    assert_same(model, result.model, seed)


def wrapped(net: Net, x: str, out: int, kernel: int = 1, depthwise: bool = False, **options: Any) -> str:
    """A convolution of a channels-last tensor between Transposes, and its bias behind these."""
    inside = net.op("Transpose", x, perm=TO_NCHW)
    group = net.channels[x] if depthwise else 1
    y = net.op("Transpose", net.conv(inside, out, kernel, group=group, bias=False, **options), perm=TO_NHWC)
    y = net.op("Add", y, net.const(net.rng.standard_normal(out)))
    net.channels[y] = out
    return str(y)


@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("opset", [10, 17, 18])
def test_convolutions_each_between_transposes(opset: int, batch: int | str, fuse: Fuse, seed: int) -> None:
    """As a channels-last framework's export has them before any optimisation: bias, activation, pad, Add outside."""
    net = Net(seed=seed, opset=opset)

    def six(y: str) -> str:
        if opset < 11:
            return str(net.op("Clip", y, min=0.0, max=6.0))
        return str(net.op("Clip", y, net.const(0), net.const(6)))

    def padded(y: str) -> str:
        amounts = [0, 1, 0, 0, 0, 1, 2, 0]
        return str(net.op("Pad", y, pads=amounts) if opset < 11 else net.op("Pad", y, net.const(amounts, np.int64)))

    image = net.input(batch, 20, 20, 3)
    net.channels[image] = 3
    x = six(wrapped(net, image, 8, 3, pads=[0, 0, 0, 0], strides=[2, 2]))
    net.channels[x] = 8
    y = six(wrapped(net, x, 24))
    y = net.op("PRelu", wrapped(net, y, 24, 3, True), net.const(net.rng.uniform(0, 1, (1, 1, 24))))
    x = net.op("Add", wrapped(net, y, 8), x)
    y = six(wrapped(net, padded(x), 8, 3, True, pads=[0, 0, 0, 0], strides=[2, 2]))
    y = net.op("Concat", y, wrapped(net, x, 8, strides=[2, 2]), axis=3)
    net.channels[y] = 16
    y = net.op("Mul", y, net.op("Sigmoid", y))
    y = wrapped(net, y, 8)
    net.output(y)
    mean = {"axes": [1, 2]} if opset < 18 else {}
    means = [
        net.op("ReduceMean", y, *([] if mean else [net.const([1, 2], np.int64)]), keepdims=k, **mean) for k in (0, 1)
    ]
    net.output(means[0], rank=2)
    net.output(net.op("Softmax", means[1], axis=3))
    model = net.model()
    result = fuse(model)
    found = [m["stages"] for m in modules(result.model)]
    assert found == ["conv-pw", "dw-pw", "dw", "pw", "pw"] or found == ["conv", "pw-dw-pw", "dw", "pw", "pw"], found
    assert modules(result.model)[1]["activations"].startswith(("prelu", "clip,prelu"))
    assert {"Transpose", "Clip", "PRelu", "Pad", "Add"}.isdisjoint(ops(result.model)), ops(result.model)
    assert_same(model, result.model, seed)


def test_channels_last_nodes_without_a_module_stay(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed, dtype=np.float64)
    image = net.input(1, 9, 9, 4)
    net.channels[image] = 4
    net.output(net.op("Relu", wrapped(net, net.op("Relu", wrapped(net, image, 8)), 8)))
    model = net.model()
    assert fuse(model, check=False).model == model


def between(net: Net, x: str, y: str) -> dict[str, Callable[[], list[str]]]:
    """Nodes between modules that run in either layout, on x and y of [1, 8, 10, 10]."""
    per_channel, plane = net.rng.standard_normal((8, 1, 1)), net.rng.standard_normal((1, 8, 10, 10))
    return {
        "add": lambda: [net.op("Add", x, y)],
        "mul, constants": lambda: [net.op("Mul", net.op("Add", net.op("Softsign", x), net.const(per_channel)), y)],
        "constant map": lambda: [net.op("Add", net.op("Mul", net.const(plane), x), y)],
        "row": lambda: [net.op("Add", net.op("Mul", net.const(net.rng.standard_normal(10)), x), y)],
        "prelu": lambda: [net.op("PRelu", net.op("Max", x, y), net.const(per_channel))],
        "channel concat": lambda: [net.op("Concat", x, y, axis=1)],
        "row concat": lambda: [net.op("Concat", x, y, axis=-2)],
        "split": lambda: net.op("Split", net.op("Concat", x, y, axis=1), axis=1, outputs=2),
        "gather": lambda: [net.op("Gather", net.op("Add", x, y), net.const([5, 0, 3], np.int64), axis=1)],
        "slice": lambda: [
            net.op("Slice", net.op("Add", x, y), *(net.const(v, np.int64) for v in ([1, 0], [7, 9], [1, -2], [2, 1])))
        ],
        "pool and scale": lambda: [net.op("Mul", x, net.op("Sigmoid", net.op("GlobalAveragePool", y)))],
        "resize": lambda: [net.op("Resize", net.op("Add", x, y), "", net.const([1, 1, 2, 0.5], np.float32))],
        "resize to a size": lambda: [
            net.op("Resize", net.op("Add", x, y), "", "", net.const([1, 8, 5, 23], np.int64), nearest_mode="ceil")
        ],
        "resize to a size found": lambda: [
            net.op("Resize", x, "", "", net.op("Shape", net.op("Concat", y, y, axis=2)), mode="nearest")
        ],
        "reduce": lambda: [net.op("Mul", x, net.op("ReduceMax", y, axes=[3]))],
    }


@pytest.mark.parametrize("name", between(Net(), "", ""))
def test_nodes_between_modules(name: str, fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    image = net.input(1, 8, 10, 10)
    x, y = (net.op("Tanh", net.depthwise(net.conv(image, 8))) for _ in range(2))
    for z in between(net, x, y)[name]():
        net.channels[z] = {"channel concat": 16, "gather": 3, "slice": 3}.get(name, 8)
        net.output(net.conv(net.depthwise(z), 8))
    model = net.model()
    result = fuse(model)
    assert "Transpose" not in ops(result.model)
    if name != "pool and scale":
        assert all(item.split()[1] == "NHWC" for item in layouts(result.model)[:2])
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("opset, build", [
    (9, lambda n, x: n.op("Upsample", x, n.const([1, 1, 2, 3]))),
    (10, lambda n, x: n.op("Resize", x, n.const([1, 1, 0.5, 3]))),
    (18, lambda n, x: n.op("Resize", x, "", n.const([3, 2]), axes=[-1, 2], nearest_mode="floor")),
])  # fmt: skip
def test_every_form_of_resize(opset: int, build: Callable[[Net, str], str], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed, opset=opset)
    x = build(net, net.depthwise(net.conv(net.input("n", 8, "h", "w"), 8)))
    net.channels[x] = 8
    net.output(net.conv(net.depthwise(x), 8))
    model = net.model()
    result = fuse(model)
    assert "Transpose" not in ops(result.model)
    assert [item.split()[1] for item in layouts(result.model)] == ["NHWC", "NCHW"]
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("options", [
    {"mode": "linear"}, {"mode": "cubic"}, {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    {"coordinate_transformation_mode": "tf_crop_and_resize"},
])  # fmt: skip
def test_other_resizes_stay(options: dict[str, str], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    region = net.const([0, 0, 0, 0, 1, 1, 0.6, 0.7])
    x = net.op("Resize", net.conv(net.input(1, 8, 9, 9), 8), region, net.const([1, 1, 2, 2]), **options)
    net.output(net.depthwise(x))
    model = net.model()
    result = fuse(model)
    assert layouts(result.model) == ["NCHW NCHW", "NCHW NCHW"]
    assert_same(model, result.model, seed)


ENDS: dict[str, tuple[int, Callable[[Net, str], str]]] = {
    "flatten": (2, lambda n, x: n.op("Flatten", n.op("GlobalAveragePool", x))),
    "reshape": (2, lambda n, x: n.op("Reshape", n.op("GlobalMaxPool", x), n.const([0, -1], np.int64))),
    "squeeze": (2, lambda n, x: n.op("Squeeze", n.op("GlobalAveragePool", x), n.const([3, -2], np.int64))),
    "reduce": (2, lambda n, x: n.op("ReduceMean", x, axes=[-1, -2], keepdims=0)),
}


@pytest.mark.parametrize("name", ENDS)
def test_heads(name: str, fuse: Fuse, seed: int) -> None:
    rank, build = ENDS[name]
    net = Net(seed=seed)
    x = net.depthwise(net.conv(net.input("n", 8, 10, 10), 16))
    net.output(build(net, x), rank=rank)
    model = net.model()
    result = fuse(model)
    ends = "NHWC" if name == "reduce" else "NCHW"  # a pool reads [N, C, H, W], which the module writes itself
    assert layouts(result.model) == [f"NCHW {ends}"] and "Transpose" not in ops(result.model)
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("size, target", [
    ((1, 8, 10, 12), [1, 9, -1]), ((2, 8, 10, 12), [-1, 9, 120]), (("n", 8, "h", "w"), [0, 9, -1]),
    (("n", 8, "h", "w"), [0, 0, -1]),
])  # fmt: skip
@pytest.mark.parametrize("turned", [True, False])
def test_heads_of_detectors(size: tuple[Any, ...], target: list[int], turned: bool, fuse: Fuse, seed: int) -> None:
    """Maps of two sizes in one row of pixels, and that [N, L, C] or [N, C, L]."""
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(*size), 8))
    rows = []
    for stride in (1, 2) if -1 in target[2:] else (1, 1):
        y = net.conv(net.depthwise(x, strides=[stride] * 2), 9)
        rows.append(net.op("Reshape", y, net.const(target, np.int64)))
    row = net.op("Concat", *rows, axis=2)
    row = net.op("Sigmoid", net.op("Mul", row, net.const(net.rng.standard_normal((9, 1)))))
    net.output(net.op("Transpose", row, perm=[0, 2, 1]) if turned else row, rank=3)
    model = net.model()
    result = fuse(model)
    assert all(item.endswith("NHWC") == turned for item in layouts(result.model)[1:])
    assert "Transpose" not in ops(result.model)
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("target", [[1, 18, -1], [1, -1, 9], [2, 9, -1]])
def test_other_reshapes_of_maps_stay(target: list[int], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    y = net.op("Reshape", net.conv(net.depthwise(net.input(1, 8, 6, 12)), 9), net.const(target, np.int64))
    net.output(net.op("Transpose", y, perm=[0, 2, 1]), rank=3)
    model = net.model()
    result = fuse(model)
    assert layouts(result.model) == ["NCHW NCHW"]
    assert_same(model, result.model, seed)


def test_flatten_of_a_map_stays(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.op("Flatten", net.depthwise(net.conv(net.input("n", 8, 5, 5), 16))), rank=2)
    model = net.model()
    result = fuse(model)
    assert layouts(result.model) == ["NCHW NCHW"]
    assert_same(model, result.model, seed)


def test_shape_of_an_island(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Add", net.depthwise(net.input("n", 8, "h", "w")), net.const(1))
    y = net.op("Relu", net.depthwise(x))
    flat = net.op("Reshape", net.op("GlobalAveragePool", y), net.const([-1, 1], np.int64))
    count = net.op("Cast", net.op("Shape", x), to=1)
    net.output(net.op("Add", flat, count), rank=2)
    model = net.model()
    result = fuse(model)
    assert_same(model, result.model, seed)


def test_a_tensor_for_both_layouts_is_transposed_once(fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.depthwise(net.op("Relu", net.depthwise(net.input(1, 8, 40, 40)))))
    ends = [net.conv(net.depthwise(x), 8), net.depthwise(x)]
    pools = [net.op("MaxPool", x, kernel_shape=[k, k]) for k in (2, 3)]
    net.output(*pools, x, *(net.op("ReduceMean", end, axes=[2, 3]) for end in ends))
    model = net.model()
    result = fuse(model)
    assert ops(result.model)["Transpose"] <= 1
    assert_same(model, result.model, seed)


def test_the_cut_is_minimal(seed: int) -> None:
    """Against all assignments of small random problems."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        count = int(rng.integers(2, 7))
        single = [
            (("NHWC", "NCHW")[rng.integers(2)], int(v), int(rng.integers(0, 9))) for v in rng.integers(0, count, 5)
        ]
        ties = [(sorted(set(rng.integers(0, count, 3).tolist())), int(rng.integers(0, 9))) for _ in range(5)]

        def cost(side: tuple[int, ...], single: Any = single, ties: Any = ties) -> int:
            paid = sum(c for end, v, c in single if side[v] != (end == "NHWC"))
            return paid + sum(c for members, c in ties if len({side[m] for m in members}) > 1)

        cut = _Cut()
        for end, v, c in single:
            cut.edge(*(("NHWC", v) if end == "NHWC" else (v, "NCHW")), c)
        for key, (members, c) in enumerate(ties):
            cut.tie(members, ("tie", key), c)
        found = cut.source_side("NHWC", "NCHW")
        best = min(cost(side) for side in itertools.product((0, 1), repeat=count))
        assert cost(tuple(int(v in found) for v in range(count))) == best


# Spellings of channel shuffles and splits by parity of x, [n, 12, 6, 6], in `groups` groups.
def _reshapes(net: Net, x: str, batch: int, *shapes: list[int], perm: list[int]) -> str:
    first = net.op("Reshape", x, net.const(shapes[0], np.int64))
    return str(net.op("Reshape", net.op("Transpose", first, perm=perm), net.const(shapes[1], np.int64)))


def _by_parity(net: Net, x: str, batch: int) -> list[str]:
    halves = _reshapes(net, x, batch, [batch * 6, 2, 36], [2, -1, 6, 6, 6], perm=[1, 0, 2])
    return [net.op("Gather", halves, net.const(i, np.int64), axis=0) for i in (0, 1)]


def _measured(net: Net, x: str, batch: int) -> list[str]:
    """Every size taken from the tensor, as a trace with dynamic axes has it."""
    shape = net.op("Shape", net.op("Softsign", x))
    n, c, h, w = (net.op("Gather", shape, net.const(i, np.int64), axis=0) for i in range(4))
    half = net.op("Div", net.op("Cast", c, to=TensorProto.FLOAT), net.const(2, np.float32))
    half = net.op("Cast", net.op("Floor", half), to=TensorProto.INT64)

    def together(*sizes: str) -> str:
        return str(net.op("Concat", *(net.op("Unsqueeze", s, net.const([0], np.int64)) for s in sizes), axis=0))

    first = net.op("Reshape", x, together(n, net.const(2, np.int64), half, h, w))
    moved = net.op("Transpose", first, perm=[0, 2, 1, 3, 4])
    return [net.op("Reshape", moved, together(n, net.const(-1, np.int64), h, w))]


SHUFFLES: dict[str, Callable[[Net, str, int], list[str]]] = {
    "5-D": lambda net, x, n: [_reshapes(net, x, n, [n, 3, 4, 6, 6], [n, 12, 6, 6], perm=[0, 2, 1, 3, 4])],
    "any batch": lambda net, x, n: [_reshapes(net, x, n, [-1, 2, 6, 6, 6], [0, -1, 6, 6], perm=[0, 2, 1, 3, 4])],
    "flat map": lambda net, x, n: [_reshapes(net, x, n, [0, 2, 6, -1], [0, 12, 6, 6], perm=[0, 2, 1, 3])],
    "by parity": _by_parity,
    "sizes taken": _measured,
}


@pytest.mark.parametrize("batch", [1, 2, None])
@pytest.mark.parametrize("name", SHUFFLES)
def test_channel_shuffles_stay_channels_last(name: str, batch: int | None, fuse: Fuse, seed: int) -> None:
    if batch is None and name in ("5-D", "by parity"):
        pytest.skip("this spelling fixes the batch")
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(batch, 8, 6, 6), 12))
    for y in SHUFFLES[name](net, x, batch or 1):
        net.channels[y] = 6 if name == "by parity" else 12
        net.output(net.depthwise(net.op("Softsign", y)))
    model = net.model()
    result = fuse(model)
    done = ops(result.model)
    assert done["Gather"] == len(net.outputs) and not {"Reshape", "Transpose"} & set(done), done
    assert all(m["input_layout"] == "NHWC" for m in modules(result.model)[1:])
    assert_same(model, result.model, seed)


@pytest.mark.parametrize("size", [("n", 8, "h", "w"), (2, 8, "h", 6), (None, 8, None, None)])
def test_a_channel_shuffle_at_any_size(size: tuple[Any, ...], fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.op("Relu", net.depthwise(net.op("Relu", net.conv(net.input(*size), 12)), strides=[2, 2]))
    (y,) = _measured(net, x, 0)
    net.channels[y] = 12
    net.output(net.depthwise(y))
    model = net.model()
    result = fuse(model)
    assert ops(result.model) == {"FusedConvModule": 2, "Gather": 1}
    assert layouts(result.model) == ["NCHW NHWC", "NHWC NCHW"]
    assert_same(model, result.model, seed)


def test_a_shuffle_by_another_tensors_sizes_stays(fuse: Fuse, seed: int) -> None:
    """Which only may be those of the tensor that it moves."""
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 12, "h", "w"), 12))
    other = net.op("Shape", net.input("a", "b", "c", "d", name="other"))
    n, c, h, w = (net.op("Slice", other, net.const([i], np.int64), net.const([i + 1], np.int64)) for i in range(4))
    sizes = net.op("Concat", n, net.const([2, -1], np.int64), h, w, axis=0)
    moved = net.op("Transpose", net.op("Reshape", x, sizes), perm=[0, 2, 1, 3, 4])
    y = net.op("Reshape", moved, net.op("Concat", n, c, h, w, axis=0))
    net.channels[y] = 12
    net.output(net.depthwise(y))
    model = net.model()
    result = fuse(model, check=False)
    assert {"Reshape", "Transpose"} <= set(ops(result.model)) and ops(result.model)["Gather"] == 0
    onnx.checker.check_model(result.model)


def test_what_moves_more_than_channels_is_no_shuffle(fuse: Fuse, seed: int) -> None:
    for shapes, perm in [
        (([1, 3, 2, 2, 6, 6], [1, 3, 12, 12]), [0, 1, 4, 2, 5, 3]),  # depth to space
        (([1, 12, 6, 6], [1, 12, 6, 6]), [0, 1, 3, 2]),  # rows to columns
        (([1, 12, 6, 6], [1, 12, 6, 6]), [0, 2, 3, 1]),  # [N, H, W, C] taken for [N, C, H, W]
        (([1, 3, 4, 36], [1, 12, 6, 6]), [0, 1, 3, 2]),
    ]:
        net = Net(seed=seed)
        x = net.op("Relu", net.conv(net.input(1, 8, 6, 6), 12))
        y = _reshapes(net, x, 1, *shapes, perm=perm)
        net.channels[y] = shapes[1][1]
        net.output(net.depthwise(y))
        model = net.model()
        result = fuse(model)
        assert "Gather" not in ops(result.model)
        assert_same(model, result.model, seed)
