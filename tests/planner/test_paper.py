"""What the paper's own planner gets wrong, on pairs of layers from its networks: each fault has its test here."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from planner import GPUS, Chain, Gpu, Layer, Module, candidates, gpu, plan_chain
from planner.cost import Segment, block_n, illegal, packed_bytes, resident, segment, work


def dw(channels: int, stride: int = 1, kernel: int = 3) -> Layer:
    pads = (kernel // 2,) * 4
    return Layer("dw", channels, channels, (kernel, kernel), (stride, stride), pads=pads, activation="relu")


def pw(inputs: int, outputs: int) -> Layer:
    return Layer("pw", inputs, outputs, activation="relu")


def pair(side: int, *layers: Layer, dtype: str = "float32", batch: int = 1) -> Chain:
    return Chain(layers, batch, side, side, dtype)


PAIRS = [
    pair(112, dw(32), pw(32, 64)),
    pair(112, pw(32, 64), dw(64, 2)),
    pair(56, pw(128, 128), dw(128)),
    pair(56, dw(128), pw(128, 128)),
    pair(28, pw(256, 256), dw(256, 2)),
    pair(14, pw(512, 512), dw(512)),
    pair(14, pw(512, 512), dw(512), dtype="float16"),
    pair(7, dw(1024), pw(1024, 1024)),
    pair(14, pw(96, 576), dw(576, kernel=5), dtype="float16"),
    pair(56, pw(144, 24), pw(24, 144)),
]
CARDS = [gpu(name) for name in ("GTX 1660", "RTX A4000", "Jetson AGX Orin", "H200")]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("chain", PAIRS, ids=range(len(PAIRS)))
def test_chosen_tiles_keep_every_constraint(chain: Chain, card: Gpu) -> None:
    """It doubles a tile and accepts it unchecked."""
    for objective in ("time", "traffic"):
        for module in plan_chain(chain, card, objective).modules:
            seg = segment(chain, module.first, module.last)
            assert seg and illegal(seg, module.tile) == ""
            held = resident(seg, module.tile, card, module.shared_bytes, module.registers)
            assert module.tile.blocks <= held


@pytest.mark.parametrize("chain", PAIRS, ids=range(len(PAIRS)))
def test_traffic_is_in_bytes(chain: Chain) -> None:
    """It mixes bytes and elements: of twice the element size, the same thread blocks move twice the bytes of maps (of
    whole sectors, as these are: only such channels are compared), and of weights as packed."""
    card = gpu("H200")

    def by_shape(dtype: str) -> dict[tuple[int, ...], int]:
        typed = replace(chain, dtype=dtype)
        seg = segment(typed, 0, 1)
        assert seg
        found = {}
        for m in candidates(typed, card, 0, 1):
            if m.tile.resident:  # what those fetch depends on how many an SM holds
                continue
            done = work(seg, m.tile, card.sms)
            assert m.traffic_bytes == done.moved + done.weights
            assert done.weights == done.pieces // done.split // -(-seg.padded_out // block_n(seg, m.tile)) * fetched(
                m, seg
            )
            key = (m.tile.tile_h, m.tile.tile_w, m.tile.images, m.tile.split, block_n(seg, m.tile), seg.padded_out)
            found[key] = done.moved
        return found

    def fetched(module: Module, seg: Segment) -> int:
        """By a tile's thread blocks."""
        inner, outer = packed_bytes(seg, module.tile)
        return (-(-seg.padded_out // block_n(seg, module.tile)) if seg.project else 1) * inner + outer

    half, full = by_shape("float16"), by_shape("float32")
    shared = set(half) & set(full)
    assert shared
    if all(n % 16 == 0 for n in (chain.layers[0].in_channels, chain.layers[1].out_channels)):
        assert {shape: full[shape] for shape in shared} == {shape: 2 * half[shape] for shape in shared}


def test_stride_and_filter_are_the_depthwises() -> None:
    """It reads them off the wrong layer. Tiles of whole rows: of the middle, each needs k - s rows again."""
    for stride, kernel in ((1, 3), (1, 5), (2, 3), (2, 5)):
        chain = pair(28, pw(64, 64), dw(64, stride, kernel))
        out, height = 28 // stride, 4 if stride == 1 else 7
        found = [m for m in candidates(chain, gpu("H200"), 0, 1) if (m.tile.tile_h, m.tile.tile_w) == (height, out)]
        whole = [m for m in found if m.tile.block_n == 0 and 64 % m.tile.chunk == 0]  # others pad weights
        tiles = out // height
        rows = 28 + (tiles - 1) * (kernel - stride)
        weights = 64 * 64 + 64 * kernel * kernel + 2 * 64  # and biases
        assert whole
        assert {m.traffic_bytes for m in whole} == {4 * (rows * 28 * 64 + tiles * weights + out * out * 64)}


def test_overlap_counts_along_both_axes() -> None:
    """Its code counts rows only, and twice. Here 2 x 2 tiles overlap along both, and corners count again."""
    chain = pair(28, pw(64, 64), dw(64))
    found = [m for m in candidates(chain, gpu("H200"), 0, 1) if (m.tile.tile_h, m.tile.tile_w) == (14, 14)]
    whole = [m for m in found if m.tile.block_n == 0 and 64 % m.tile.chunk == 0]  # others pad weights
    overlap = (3 - 1) * (28 + 28) + (3 - 1) ** 2  # (k - s) for each inner edge, as the paper's formula has it
    assert whole
    for module in whole:
        assert module.traffic_bytes == 4 * ((28 * 28 + overlap) * 64 + 4 * (64 * 64 + 11 * 64) + 28 * 28 * 64)


@pytest.mark.parametrize("chain", PAIRS, ids=range(len(PAIRS)))
def test_all_filters_in_one_thread_block_is_tried(chain: Chain) -> None:
    """It never tries a tile of all filters (where it fits at all)."""
    filters = chain.layers[-1].out_channels
    if filters <= 128:
        assert any(module.tile.block_n == 0 for module in candidates(chain, gpu("H200"), 0, 1))


def test_choices_neither_overlap_nor_cross_an_add() -> None:
    """It takes pairs in list order, across Adds, and overlapping each other."""
    block = (pw(64, 384), dw(384), replace(pw(384, 64), activation="none", residual=True, activation_nodes=1))
    chain = Chain(block * 3, 1, 14, 14)
    for card in GPUS.values():
        modules = plan_chain(chain, card).modules
        assert all(before.last < after.first for before, after in pairwise(modules))
        assert not any(module.first <= add < module.last for module in modules for add in (2, 5, 8))


def test_occupancy_registers_launches_and_l2_count() -> None:
    """None of them appears in its model."""
    chain = PAIRS[0]
    (module,) = plan_chain(chain, gpu("H200")).modules
    assert module.registers > 0 and 0 < module.occupancy <= 1
    whole = plan_chain(chain, gpu("H200"))
    small_cache = replace(gpu("H200"), l2_bytes=1 << 16)
    assert plan_chain(chain, small_cache).time_after_us > whole.time_after_us
    few_registers = replace(gpu("H200"), registers_per_sm=16384)
    assert plan_chain(chain, few_registers).time_after_us >= whole.time_after_us


def test_recomputed_work_of_a_tile_with_halo() -> None:
    """The paper's 1.31: a 16 x 16 region of the first stage gives 14 x 14 outputs of a 3 x 3 filter."""
    side, tiles = 14 * 40, 40
    chain = pair(side, pw(64, 64), dw(64))
    module = next(m for m in candidates(chain, gpu("H200"), 0, 1) if (m.tile.tile_h, m.tile.tile_w) == (14, 14))
    assert module.variant == "PWDW_R" and module.tile.block_n == 0
    pixels, mid = side**2, (side + 2 * (tiles - 1)) ** 2  # no halo outside the map
    assert mid / pixels == pytest.approx(1.31, abs=0.02)
    needed = pixels * (64 * 64 + 9 * 64)
    assert module.recompute == pytest.approx((mid * 64 * 64 + pixels * 9 * 64) / needed)
    whole_map = next(m for m in candidates(pair(7, pw(64, 64), dw(64)), gpu("H200"), 0, 1) if m.tile.tile_h == 7)
    assert (whole_map.variant, whole_map.recompute) == ("PWDW", 1.0) or whole_map.tile.tile_w < 7
