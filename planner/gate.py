"""What a mean over the map costs, and the gate of a squeeze-and-excite: two pointwise layers on such a mean.

Geometry follows ort_fcm/kernels/spec.h: a thread block has `images` images, the `split` blocks of a cluster share the
channels of both layers, `warps_m` warps share the rows of weights. Constants are estimates; none was fitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .chain import Tile, ceil_div, round_up

if TYPE_CHECKING:
    from .cost import Segment
    from .gpus import Gpu

REGISTERS = 112  # of a thread
ROW_PIXELS = 16  # of the input's map, that the module in front adds up to one row
ROWS = 4  # of weights, that a lane multiplies with at once
BLOCK_CLOCKS = 2500.0  # of a thread block: its start, the first row of the input, the last stores
AT_ONCE = 8  # rows of the input that a thread waits for together
ROW_CLOCKS = 500.0  # of these
SLOT_CLOCKS = 200.0  # of threads that give one another parts of a sum
SWAP_CLOCKS = 1500.0  # of a cluster that meets and swaps the middle channels
ROUND_CLOCKS = 120.0  # of the sums over the lanes of a warp
BYTES_PER_CLOCK = 32.0  # of weights from L2 that an SM takes
LATE = 0.5  # share of resident weights that come after the kernel in front has ended


class Cost(NamedTuple):
    grid: int  # thread blocks
    moved: int  # bytes between the SMs and L2, weights apart
    weights: int  # the same, of weights
    instructions: float  # clocks in which an SM issues them
    latency: float  # clocks of a thread block alone


def rows(seg: Segment) -> int:
    """Rows of an image that are added up: pixels, or what the module in front leaves of them."""
    return ceil_div(seg.height * seg.width, 1 if seg.layers[0].whole else ROW_PIXELS)


def parts_bytes(seg: Segment, tile: Tile) -> int:
    """Shared memory in which threads that share a sum give it to one another."""
    return tile.threads * (16 // seg.element) * 4


def adding(seg: Segment, tile: Tile, channels: int) -> tuple[float, float]:
    """Instructions of a warp that adds up its share of so many channels of a thread block's images, and clocks in which
    it waits for them."""
    lane = 16 // seg.element
    items = tile.images * ceil_div(channels, lane)
    slots = max(1, min(tile.threads // items, rows(seg)))
    turns = ceil_div(items * slots, tile.threads) * ceil_div(rows(seg), slots)
    return turns * (2.0 * lane + 4), ceil_div(turns, AT_ONCE) * ROW_CLOCKS + (SLOT_CLOCKS if slots > 1 else 0)


def illegal(tile: Tile, group: int) -> str:
    """Why the kernel cannot run with this tile, on any GPU; empty if it can."""
    t = tile
    if t.chunk < 1 or t.chunk % group:
        return f"chunk must be a multiple of a group of {group} channels"
    if t.warps_n != 1 or not 1 <= t.warps_m <= 16 or not 1 <= t.images <= 64:
        return "a gate has 1 to 16 warps and 1 to 64 images"
    if t.split not in (1, 2, 4, 8) or t.resident not in (0, 1):
        return "split must be 1, 2, 4 or 8 and resident 0 or 1"
    if t.blocks < 1 or t.blocks * t.threads > 2048:
        return "blocks times threads must fit an SM"
    return ""


def _channels(seg: Segment) -> tuple[int, int, int]:
    first, second = seg.layers
    return first.in_channels, first.out_channels, second.out_channels


def _padded(seg: Segment, channels: int) -> int:
    return round_up(channels, 16 // seg.element)


def weights_bytes(seg: Segment, tile: Tile) -> int:
    """Bytes of a thread block's share of both layers."""
    c_in, middle, c_out = _channels(seg)
    mid, out = (round_up(ceil_div(channels, tile.split), 4) for channels in (middle, c_out))
    return seg.element * (mid * _padded(seg, c_in) + out * _padded(seg, middle))


def shared_bytes(seg: Segment, tile: Tile) -> int:
    """Shared memory of a thread block."""
    means = tile.images * _padded(seg, seg.c_in) * 4
    hidden = tile.images * _padded(seg, _channels(seg)[1]) * 4
    return means + parts_bytes(seg, tile) + hidden + (weights_bytes(seg, tile) if tile.resident else 0)


def tiles(seg: Segment, gpu: Gpu) -> Iterator[Tile]:
    """The tiles worth estimating."""
    for images in (1, 2, 4, 8, 16):
        if images >= 2 * seg.batch:
            break
        for warps in (4, 8, 16) if gpu.sm < 100 else (4, 8):  # whose assembler gathers more loads
            for split in (1, 2, 4, 8) if gpu.sm >= 90 else (1,):
                for resident in (0, 1):
                    yield Tile(tile_h=1, tile_w=1, images=images, warps_m=warps, split=split, resident=resident)


def cost(seg: Segment, tile: Tile) -> Cost:
    """Clocks and bytes of the segment with a tile."""
    c_in, middle, c_out = _channels(seg)
    grid = ceil_div(seg.batch, tile.images) * tile.split
    lane = 16 // seg.element
    weights, read = weights_bytes(seg, tile), tile.images * rows(seg) * c_in * seg.element
    warp, row_clocks = adding(seg, tile, c_in)
    # Multiplying: a warp's rounds of both layers, of whole lanes and rows.
    together = min(tile.images, 4)
    multiplying = waiting = 0.0
    for depth, outputs in ((c_in, middle), (middle, c_out)):
        deep = _padded(seg, depth) // lane
        lanes = min(32, 1 << (deep - 1).bit_length())
        of_warp = ceil_div(ceil_div(ceil_div(outputs, tile.split), 32 // lanes * ROWS), tile.warps_m)
        groups = of_warp * ceil_div(tile.images, together)
        steps = groups * ceil_div(deep, lanes)
        multiplying += steps * lane * ROWS * (1 + 1.3 * together)
        multiplying += groups * ROWS * together * lanes.bit_length()
        waiting += groups * ROUND_CLOCKS
    warp += multiplying
    loading = weights / BYTES_PER_CLOCK * (LATE if tile.resident else 1) + read / BYTES_PER_CLOCK
    latency = BLOCK_CLOCKS + loading + row_clocks + waiting + 1.3 * warp
    return Cost(
        grid,
        grid * read + seg.element * seg.batch * c_out,
        grid * weights,
        warp * max(1.0, tile.warps_m / 4),
        latency + (SWAP_CLOCKS if tile.split > 1 else 0),
    )
