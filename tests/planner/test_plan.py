"""Properties of every plan, over random chains and GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner import GPUS, Chain, Gpu, Layer, Plan, PlannerError, Tile, candidates, gpu, module_of, plan_chain, strip
from planner.chain import ACTIVATIONS, STAGES
from planner.cost import (
    PRIORS,
    Segment,
    block_n,
    cluster_sms,
    estimate,
    illegal,
    packed_bytes,
    segment,
    touched_bytes,
    touched_pixels,
    work,
)

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
OBJECTIVES = st.sampled_from(["time", "traffic"])


@st.composite
def layers(draw: st.DrawFn, kind: str, channels: int) -> Layer:
    activation = draw(st.sampled_from(ACTIVATIONS))
    extra: dict[str, Any] = {"activation": activation, "activation_nodes": draw(st.integers(0, 2))}
    outputs = channels if kind == "dw" else draw(st.integers(1, 200))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    if kind == "pw":
        extra["normed"] = draw(st.integers(0, 3)) == 0
        return Layer(kind, channels, outputs, stride=stride if draw(st.booleans()) else (1, 1), **extra)
    kernel = (draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 3, 5])))
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    return Layer(kind, channels, outputs, kernel, stride, (draw(st.integers(1, 2)), 1), pads, **extra)


@st.composite
def chains(draw: st.DrawFn, longest: int = 4, stages: tuple[str, ...] = ()) -> Chain:
    kinds = draw(st.lists(st.sampled_from(["dw", "pw", "pw", "conv"]), min_size=1, max_size=longest))
    family: tuple[str, ...] = stages or draw(st.sampled_from([(), STAGES]))
    if family:
        kinds = draw(st.sampled_from(family)).split("-")
    found: list[Layer] = []
    channels = draw(st.integers(1, 200))
    for number, kind in enumerate(kinds):
        layer = draw(layers(kind, channels))
        found.append(replace(layer, name=f"layer{number}", residual=draw(st.integers(0, 3)) == 0))
        channels = layer.out_channels
    sides = st.integers(24 if len(kinds) > 2 else 9, 70)
    height, width = draw(sides), draw(sides)
    while True:  # a map that every filter fits
        try:
            return Chain(tuple(found), draw(st.sampled_from([1, 2, 16])), height, width,
                         draw(st.sampled_from(["float16", "float32"])), "random")  # fmt: skip
        except PlannerError:
            height, width = 2 * height, 2 * width


@st.composite
def unknown_gpus(draw: st.DrawFn) -> Gpu:
    """Of a known compute capability, with figures that no maker has put together."""
    known, factor = draw(st.sampled_from(list(GPUS.values()))), st.sampled_from([0.25, 0.5, 1, 3])
    scaled = ("clock_mhz", "memory_gbps", "l2_gbps", "tensor_fp16_tflops", "tensor_tf32_tflops", "fp32_tflops")
    return replace(
        known, name="unknown", sms=draw(st.integers(1, 200)), l2_bytes=2 ** draw(st.integers(18, 27)),
        **{figure: getattr(known, figure) * draw(factor) for figure in scaled},
    )  # fmt: skip


gpus = st.one_of(st.sampled_from(list(GPUS.values())), unknown_gpus())


def compulsory_bytes(chain: Chain) -> int:
    """The touched part of the first input and all weights read once, the last output written once."""
    element = 2 if chain.dtype == "float16" else 4
    (out_h, out_w), last = chain.maps()[-1], chain.layers[-1]
    rows = touched_pixels(chain.layers, 0, chain.height)
    columns = touched_pixels(chain.layers, 1, chain.width)
    elements = chain.batch * (rows * columns * chain.layers[0].in_channels + out_h * out_w * last.out_channels)
    return element * (elements + sum(layer.weights for layer in chain.layers))


@SETTINGS
@given(chains(), gpus, OBJECTIVES)
def test_plan_is_whole_and_keeps_its_claims(chain: Chain, card: Gpu, objective: str) -> None:
    plan = plan_chain(chain, card, objective)
    covered = [i for module in plan.modules for i in range(module.first, module.last + 1)]
    assert sorted(covered + [skip.layer for skip in plan.skips]) == list(range(len(chain.layers)))
    assert all(skip.reason for skip in plan.skips)
    for module in plan.modules:
        parts, tile = chain.layers[module.first : module.last + 1], module.tile
        stages = "-".join(layer.kind for layer in parts)
        assert stages in STAGES
        name = "NORM+" * parts[0].normed + stages.replace("-", "").upper()
        assert module.variant.removesuffix("_R") == name
        assert not any(layer.residual for layer in parts[:-1])
        seg = segment(chain, module.first, module.last)
        assert seg and not illegal(seg, tile)
        if "dw" in stages:
            assert 8 * tile.warps_m >= tile.images * (tile.tile_h // tile.patch_h) * (tile.tile_w // 2)
        assert tile.split == 1 or card.sm >= 90
        assert module.shared_bytes <= card.shared_per_block
        assert tile.blocks * (module.shared_bytes + 1024) <= card.shared_per_sm
        assert module.registers <= 255
        assert tile.blocks * tile.threads * module.registers <= card.registers_per_sm
        assert 0 < tile.blocks * tile.threads / card.max_threads_per_sm <= module.occupancy <= 1
        assert module.recompute >= 1
        padding = sum(packed_bytes(seg, tile)) - seg.element * seg.weight_elements
        least, done = seg.compulsory_bytes + padding, work(seg, tile, card.sms)
        assert padding >= 0 and least <= module.dram_bytes <= least + done.again
        if seg.element * (seg.input_elements + seg.output_elements) < card.l2_bytes / 2:
            assert module.dram_bytes == least
        assert module.traffic_bytes >= seg.compulsory_bytes
    assert plan.traffic_after >= compulsory_bytes(chain)
    assert plan.traffic_before >= compulsory_bytes(chain)
    assert plan.time_after_us > 0
    if objective == "time":
        assert plan.time_after_us <= plan.time_before_us * (1 + 1e-9)
    else:
        assert plan.traffic_after <= plan.traffic_before


@SETTINGS
@given(chains(3), gpus, st.sampled_from(["memory_gbps", "l2_gbps", "sms"]), st.integers(2, 5))
def test_a_better_gpu_is_not_slower(chain: Chain, card: Gpu, figure: str, factor: int) -> None:
    better = replace(card, **{figure: getattr(card, figure) * factor // 2 + 1})
    before, after = plan_chain(chain, card), plan_chain(chain, better)
    # Of thread blocks that shared an SM, each may have one to itself, where no other fills its waits.
    slower = 0.02 if figure == "sms" else 1e-9
    assert after.time_after_us <= before.time_after_us * (1 + slower)
    assert after.time_before_us <= before.time_before_us * (1 + 1e-9)


@SETTINGS
@given(chains(), gpus, OBJECTIVES)
def test_json_round_trip(chain: Chain, card: Gpu, objective: str) -> None:
    plan = plan_chain(chain, card, objective)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@SETTINGS
@given(chains(3), gpus)
def test_the_choice_is_the_best_of_all_segmentations(chain: Chain, card: Gpu) -> None:
    """Against every segmentation written out, in chains where a layout change cannot occur (no stock layer)."""
    count = len(chain.layers)

    def best(start: int) -> float:
        if start == count:
            return 0.0
        costs = [float("inf")]
        for last in range(start, count):
            found = candidates(chain, card, start, last)
            if found:
                costs.append(min(module.time_us for module in found) + PRIORS.module_us + best(last + 1))
        return min(costs)

    plan = plan_chain(chain, card)
    assert plan.time_after_us <= best(0) * (1 + 1e-9)
    if not plan.skips:
        assert plan.time_after_us == pytest.approx(best(0))
        assert plan.time_after_us == pytest.approx(sum(m.time_us + PRIORS.module_us for m in plan.modules))


@SETTINGS
@given(chains(stages=("dw", "dw-pw", "pw-dw", "pw-dw-pw")), gpus, st.data())
def test_traffic_is_what_thread_blocks_read_and_write(chain: Chain, card: Gpu, data: st.DataObject) -> None:
    """Against the pixels of every thread block, written out, for chains around a depthwise."""
    parts = [replace(part, residual=False) for part in chain.layers]
    if parts[-1].kind == "pw":
        parts[-1] = replace(parts[-1], stride=(1, 1))
    parts[-1] = replace(parts[-1], residual=data.draw(st.booleans()))
    chain = replace(chain, layers=tuple(parts))
    found = candidates(chain, card, 0, len(chain.layers) - 1)
    assume(found)  # a wide input under a long filter may fit no small GPU
    tile = data.draw(st.sampled_from(found)).tile
    module = next(module for module in found if module.tile == tile)
    seg = segment(chain, 0, len(chain.layers) - 1)
    assert seg and seg.depthwise
    layer, (out_h, out_w) = seg.depthwise, seg.maps[-1]
    project = seg.project is not None

    def pixels(axis: int, start: int, length: int, out: int) -> int:
        low = start * layer.stride[axis] - layer.pads[axis]
        high = (min(start + length, out) - 1) * layer.stride[axis] - layer.pads[axis] + layer.reach[axis]
        return sum(1 for pixel in range(low, high) if 0 <= pixel < seg.mid[axis])

    tiles = -(-chain.batch // tile.images) * -(-out_h // tile.tile_h) * -(-out_w // tile.tile_w)
    height, width, access = tile.tile_h, tile.tile_w, (32, 64)
    if seg.strip:  # a tile is a thread's, and those of a thread block share what they read
        tiles = -(-tiles // strip.patches(seg, tile))
        height, width = strip.area(seg, tile)
        access = (min(block_n(seg, tile), seg.c_in) * seg.element,) * 2
    cuts = -(-seg.padded_out // block_n(seg, tile))
    inner, outer = packed_bytes(seg, tile)
    if tile.resident:  # thread blocks fetch their weights once, and as many as an SM has room for do
        cost = estimate(seg, tile, card)
        assert cost
        held = max(tile.blocks, cost.resident) if tile.split == 1 else tile.blocks
        sms = max(tile.split, cluster_sms(card.sms, tile.split))
        tiles = min(tiles, max(1, sms * held // (cuts * tile.split)))
    total = float(tiles * ((cuts if project else 1) * inner + outer))
    vector = 16 // seg.element
    x_bytes, y_bytes = seg.c_in * seg.element, seg.c_out * seg.element
    for image in range(0, chain.batch, tile.images):
        images = min(tile.images, chain.batch - image)
        for top in range(0, out_h, height):
            for left in range(0, out_w, width):
                read = images * pixels(0, top, height, out_h) * pixels(1, left, width, out_w)
                written = images * min(height, out_h - top) * min(width, out_w - left)
                copied = seg.strip or (seg.c_in % vector == 0 and (not seg.first or tile.wgmma))
                read *= touched_bytes(seg.c_in, seg.element, access[0]) if copied else x_bytes
                if seg.first:  # every channel block, and every thread block of a cluster, needs all of X
                    total += read * cuts * tile.split
                else:
                    total += read * (cuts if project else 1)
                whole = seg.strip or seg.c_out % vector == 0
                total += written * (touched_bytes(seg.c_out, seg.element, access[1]) if whole else y_bytes)
                total += written * y_bytes * seg.residual
    assert module.traffic_bytes == pytest.approx(total, rel=1e-9, abs=1)


@given(st.integers(1, 300), st.sampled_from([2, 4]), st.sampled_from([32, 64]))
def test_sectors_that_accesses_touch(channels: int, element: int, access: int) -> None:
    """Against every byte of 32 pixels written out."""
    pixel, accesses = channels * element, []
    for start in range(0, 32 * pixel, pixel):
        for at in range(start, start + pixel, access):
            accesses.append({byte // 32 for byte in range(at, min(at + access, start + pixel))})
    assert touched_bytes(channels, element, access) == pytest.approx(
        sum(map(len, accesses))
    )  # 32 bytes each, of 32 pixels


def block(batch: int = 1, dtype: str = "float16") -> Chain:
    return Chain(
        (
            Layer("pw", 32, 192, activation="clip", activation_nodes=1, name="expand"),
            Layer("dw", 192, 192, (3, 3), pads=(1, 1, 1, 1), activation="clip", activation_nodes=1, name="depthwise"),
            Layer("pw", 192, 32, residual=True, activation_nodes=1, name="project"),
        ),
        batch, 28, 28, dtype, "block",
    )  # fmt: skip


def test_what_l2_does_not_hold_is_read_again() -> None:
    """X of a pointwise whose thread blocks have half of the output channels each, the first half before the second."""
    card, width = gpu("H200"), 512
    tile = Tile(tile_h=1, tile_w=64, chunk=64, warps_m=4, warps_n=2, block_n=width // 2, wgmma=1)
    for batch, times in ((1, 1), (1024, 2)):  # 0.8 MB, 822 MB
        chain = Chain((Layer("pw", width, width),), batch, 28, 28)
        seg = segment(chain, 0, 0)
        assert seg
        for resident, reads in ((0, times), (1, 1)):
            module = module_of(chain, card, 0, 0, replace(tile, resident=resident, chunk=32 if resident else 64))
            assert module is None or module.dram_bytes == (
                seg.compulsory_bytes + (reads - 1) * 2 * seg.input_elements + padding(seg, module.tile)
            )
            assert module or resident


def test_weights_go_by_for_many_tiles_where_an_sm_has_one_thread_block_of_a_large_pointwise() -> None:
    for batch, dtype, layer, goes_by in (
        (128, "float32", Layer("pw", 512, 512), True),
        (128, "float16", Layer("pw", 728, 728), True),
        (128, "float32", Layer("pw", 728, 728, residual=True), False),  # its end would spill
        (1, "float32", Layer("pw", 512, 512), False),  # a tile each
    ):
        (module,) = plan_chain(Chain((layer,), batch, 14, 14, dtype), gpu("H200")).modules
        assert (module.tile.resident == 2) == goes_by, (batch, dtype, layer)


def padding(seg: Segment, tile: Tile) -> int:
    return sum(packed_bytes(seg, tile)) - seg.element * seg.weight_elements


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_an_inverted_residual_block_is_one_module_on_an_h200(batch: int) -> None:
    plan = plan_chain(block(batch), gpu("H200"))
    assert [module.variant for module in plan.modules] == ["PWDWPW"]
    assert plan.time_after_us < plan.time_before_us / 3


def test_a_stem_stages_rows_that_are_not_whole_vectors_element_by_element() -> None:
    stem = Layer("conv", 3, 32, (3, 3), (2, 2), pads=(1, 1, 1, 1))

    def time_us(width: int, dtype: str) -> float:
        found = segment(Chain((stem,), 16, 300, width, dtype), 0, 0)
        cost = found and estimate(found, Tile(patch_h=2, warps_m=2), gpu("H200"))
        assert cost
        return cost.time_us

    assert time_us(300, "float16") > 1.2 * time_us(304, "float16")  # 600 bytes
    assert time_us(300, "float32") <= time_us(304, "float32")  # 1200


def test_batch_one_splits_where_a_batch_does_not() -> None:
    parts = (
        Layer("pw", 64, 384, activation="clip", activation_nodes=1),
        Layer("dw", 384, 384, (3, 3), pads=(1, 1, 1, 1), activation="clip", activation_nodes=1),
        Layer("pw", 384, 64, residual=True, activation_nodes=1),
    )
    small, large = (plan_chain(Chain(parts, batch, 14, 14), gpu("H200")).modules[0].tile for batch in (1, 128))
    assert small.split > large.split == 1


def test_a_residual_ends_a_module() -> None:
    chain = block()
    middle = Chain((*chain.layers, *block().layers), 1, 28, 28)
    plan = plan_chain(middle, gpu("H200"))
    assert not any(module.first <= 2 < module.last for module in plan.modules)


def test_equal_shapes_get_equal_tiles_whatever_their_names() -> None:
    chain = block()
    other = replace(chain, layers=tuple(replace(layer, name="x" + layer.name, nodes=3) for layer in chain.layers))
    assert plan_chain(chain, gpu("T4")).modules == plan_chain(other, gpu("T4")).modules


def test_a_layer_that_fits_nowhere_is_skipped_with_its_reason() -> None:
    tiny = replace(gpu("T4"), max_threads_per_sm=16)
    plan = plan_chain(block(), tiny)
    assert not plan.modules and [skip.layer for skip in plan.skips] == [0, 1, 2]
    assert all(skip.reason == "no tile of this layer fits T4" for skip in plan.skips)
    assert plan.time_after_us == plan.time_before_us and plan.traffic_after == plan.traffic_before


def test_a_large_convolution_is_left_to_stock_when_fusion_does_not_pay() -> None:
    chain = Chain((Layer("conv", 512, 512, (3, 3), pads=(1, 1, 1, 1), name="dense"),), 128, 56, 56)
    plan = plan_chain(chain, gpu("B200"))  # on an H200 both take as long
    assert not plan.modules
    assert "fusion does not pay here" in plan.skips[0].reason


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_an_edited_plan_is_checked() -> None:
    data = plan_chain(block(), gpu("H200")).to_dict()
    module = data["modules"][0]
    good = Plan.from_dict({**data, "gpu": "h200", "modules": [{**module, "tile": "tile_h=4 tile_w=4 warps_m=1"}]})
    assert good.modules[0].tile == Tile(tile_h=4, tile_w=4, warps_m=1)
    for change, message in (
        ({"tile": "tile_h=3 patch_h=2"}, "whole patches"),
        ({"tile": "tile_h=28 tile_w=28"}, "do not cover"),
        ({"tile": "tiles=4"}, "tiles=4"),
        ({"last": 1, "tile": ""}, "one module or skip"),
        ({"last": 7}, "no such layers"),
        ({"tile": "tile_h=8 tile_w=16 warps_m=8 chunk=1024"}, "does not fit"),
    ):
        with pytest.raises(PlannerError, match=message):
            Plan.from_dict({**data, "modules": [{**module, **change}]})
    for wrong in ({}, {**data, "modules": [{}]}, {**data, "chain": {}}, {**data, "extra": 1}, {**data, "gpu": "X9"}):
        with pytest.raises(PlannerError):
            Plan.from_dict(wrong)


def test_bad_chains_name_their_fault() -> None:
    bad: dict[str, Any] = {"in_channels": 8, "out_channels": 8, "name": "bad"}
    faults: list[tuple[str, dict[str, Any], str]] = [
        ("xx", {}, "none of dw, pw, conv"),
        ("dw", {"out_channels": 9}, "as many output channels"),
        ("pw", {"kernel": (3, 3)}, "1x1"),
        ("dw", {"stride": (0, 1)}, "at least 1"),
        ("dw", {"pads": (0, -1, 0, 0)}, "negative"),
        ("dw", {"activation": "mish"}, "mish"),
    ]
    for kind, extra, message in faults:
        with pytest.raises(PlannerError, match=message):
            Layer(kind, **bad | extra)
    wide = Layer("dw", 8, 8, (5, 5), name="wide")
    with pytest.raises(PlannerError, match=r"'wide'.*does not fit"):
        Chain((wide,), 1, 4, 9)
    with pytest.raises(PlannerError, match="8 output channels"):
        Chain((wide, Layer("pw", 16, 8)), 1, 9, 9)
    with pytest.raises(PlannerError, match="no layers"):
        Chain((), 1, 9, 9)
    with pytest.raises(PlannerError, match="int8"):
        Chain((wide,), 1, 9, 9, "int8")
    with pytest.raises(PlannerError, match="objective"):
        plan_chain(Chain((wide,), 1, 9, 9), gpu("T4"), "energy")


def test_tile_text() -> None:
    tile = Tile(tile_h=7, tile_w=14, chunk=64, split=2)
    assert str(tile).startswith("tile_h=7 tile_w=14 images=1 ")
    assert Tile.parse(str(tile)) == tile
    assert Tile.parse("") == Tile()
    for text in ("tile_h", "tile_h=", "tile_h=-1", "tile_h=1 tile_h=2", "width=3"):
        with pytest.raises(PlannerError):
            Tile.parse(text)
