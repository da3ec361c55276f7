"""A lone depthwise, which has a kernel of its own (ort_fcm/kernels/strip.cuh): what a tile takes, and which are tried.

A thread computes a patch of tile_h x tile_w pixels for a few words (4 bytes) of channels, whose taps it holds in
registers, from global memory. Lanes along the channels of `block_n` come first in a thread block, then patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .chain import Tile, ceil_div, round_up
from .gate import ROW_PIXELS

if TYPE_CHECKING:
    from .cost import Segment

MAX_TAPS = 49  # more than registers hold
MAX_WARPS = 8  # of a thread block
BASE_REGISTERS = 36  # addresses, the map's border
RESIDENT_REGISTERS = 13, 8  # more in float32 with resident: once, and for each word of channels
# By bytes of an element, registers that the compiler takes: as a base, for each that `_held` counts, with resident, and
# for each column of X (of 1346 and 94 kernels, all but a tenth within a fifth, and a tenth).
TAKEN = {2: (12, 1.2, 13, 0), 4: (8, 1.09, 15, 1.45)}


def words(seg: Segment, tile: Tile) -> int:
    """Words of channels of a thread: 1, 2 or 4; more are illegal."""
    needed = ceil_div(_block_words(seg, tile), 32 * tile.warps_n)
    return 4 if needed == 3 else needed


def _block_words(seg: Segment, tile: Tile) -> int:
    return ceil_div(min(tile.block_n or seg.c_in, seg.c_in) * seg.element, 4)


def patches(seg: Segment, tile: Tile) -> int:
    """Patches that a thread block has threads for."""
    return tile.threads // ceil_div(_block_words(seg, tile), words(seg, tile))


def area(seg: Segment, tile: Tile) -> tuple[int, int]:
    """Rows and columns of output of a thread block whose patches begin a row of the map. X under it is read once: what
    patches share waits in L1."""
    out_h, out_w = seg.maps[-1]
    across, together = ceil_div(out_w, tile.tile_w), patches(seg, tile)
    rows = max(1, together // across) * tile.tile_h
    return min(rows, round_up(out_h, tile.tile_h)), min(across, together) * tile.tile_w


def illegal(seg: Segment, tile: Tile) -> str:
    """Why the kernel cannot run with this tile, on any GPU, where its numbers are those of any tile."""
    t = tile
    if t.tile_h != t.patch_h or t.tile_w > 32 or t.images != 1 or t.split != 1 or t.wgmma:
        return "a thread of a lone depthwise has patch_h = tile_h by at most 32 pixels of one image"
    if t.chunk != seg.group:
        return "the chunk of a lone depthwise is a group of channels"
    return "a thread of a lone depthwise has at most 16 bytes of channels" if words(seg, t) > 4 else ""


def _columns(seg: Segment, tile: Tile) -> int:
    assert seg.depthwise
    return (tile.tile_w - 1) * seg.depthwise.stride[1] + seg.depthwise.reach[1]


def rows(seg: Segment, tile: Tile) -> int:
    """Rows of X under a patch."""
    assert seg.depthwise
    return (tile.tile_h - 1) * seg.depthwise.stride[0] + seg.depthwise.reach[0]


def ahead(seg: Segment, tile: Tile) -> int:
    """Rows of X that are on their way while one is multiplied."""
    return max(1, min(rows(seg, tile) - 1, 24 // (_columns(seg, tile) * words(seg, tile))))


def vectors(seg: Segment, tile: Tile) -> int:
    """Pixels of X that a thread loads for a patch."""
    assert seg.depthwise
    kh, kw = seg.depthwise.kernel
    return min(rows(seg, tile), tile.tile_h * kh) * min(_columns(seg, tile), tile.tile_w * kw)


def waits(seg: Segment, tile: Tile) -> float:
    """Times that a thread waits for global memory, for a patch."""
    return 1 + (rows(seg, tile) - 1) / ahead(seg, tile)


def _held(seg: Segment, tile: Tile) -> int:
    """Registers of a thread for each of its words: taps, the rows of X on their way, and the sums that have begun."""
    layer = seg.depthwise
    assert layer
    columns = min(_columns(seg, tile), tile.tile_w * layer.kernel[1])
    sums = min(tile.tile_h, ceil_div(layer.kernel[0], layer.stride[0])) * tile.tile_w
    return layer.taps + columns * (ahead(seg, tile) + 1) + sums


def registers(seg: Segment, tile: Tile) -> int:
    """Registers of a thread that it should have."""
    base, each = RESIDENT_REGISTERS if tile.resident and seg.element == 4 else (0, 0)
    return BASE_REGISTERS + base + words(seg, tile) * (_held(seg, tile) + 1 + each)


def taken(seg: Segment, tile: Tile) -> int:
    """Registers of a thread that the compiler takes if it can, in the mean."""
    base, share, resident, column = TAKEN[seg.element]
    return (
        int(base + share * words(seg, tile) * _held(seg, tile) + column * _columns(seg, tile))
        + resident * tile.resident
    )


def tiles(seg: Segment) -> Iterator[Tile]:
    """The tiles worth estimating, legal but for what the GPU holds."""
    out_h, out_w = seg.maps[-1]
    all_words = ceil_div(seg.c_in * seg.element, 4)
    lanes: dict[tuple[int, int], None] = {}  # block_n and warps_n
    for own in (1, 2, 4):
        for groups in (1, 2, 4, 8):
            if groups * 16 < all_words and groups * 16 <= 32 * own and groups * 16 > 16 * (own - 1):
                lanes[groups * seg.group, 1] = None
        if ceil_div(all_words, 32 * own) <= MAX_WARPS:
            lanes[0, ceil_div(all_words, 32 * own)] = None
    for height in _lengths(out_h):
        for width in _lengths(out_w):
            for (channels, warps_n), warps in ((lane, n) for lane in lanes for n in (1, 2, 4, 8)):
                if warps % warps_n and warps_n % warps:
                    continue
                tile = Tile(
                    height, width, 1, height, seg.group, max(1, warps // warps_n), warps_n, channels,
                )  # fmt: skip
                if tile.threads > 32 * MAX_WARPS or illegal(seg, tile):
                    continue
                rows = ceil_div(out_h, height) * ceil_div(out_w, width)
                if seg.pool and rows > 2 * ceil_div(out_h * out_w, ROW_PIXELS):
                    continue  # the mean of so many takes longer than they save
                used = patches(seg, tile) * ceil_div(_block_words(seg, tile), words(seg, tile))
                if used >= 0.75 * tile.threads or (channels == 0 and warps == warps_n):
                    yield tile


def _lengths(out: int) -> list[int]:
    """Sides of a patch: those that waste at most a quarter of the last one."""
    lengths = {min(length, out) for length in (1, 2, 4, 5, 7, 8)}
    return sorted(n for n in lengths if n == 1 or round_up(out, n) <= 1.25 * out)
