"""What a module costs with a tile on a GPU. docs/planner.md derives every formula; the symbols here are its.

Geometry follows ort_fcm/kernels/spec.h (tests compare the two): a thread block (TB) computes I x Th x Tw output pixels
for Nb output channels, walking over the middle channels in steps of a chunk. Pixels, channels and taps are counts,
sizes are bytes, times microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import NamedTuple

from . import gate, strip
from .chain import STAGES, STEM_CHANNELS, Chain, Layer, Tile, ceil_div, round_up
from .gpus import Gpu


@dataclass(frozen=True)
class Priors:
    """Constants of the time model that no data sheet states. Those of `FITTED` were fitted to kernels timed on an H200
    (benchmarks/calibrate.py)."""

    dram_share: float = 0.90  # of memory_gbps that a copy reaches: 4.3 of 4.8 TB/s
    l2_share: float = 1.054  # of l2_gbps, itself an estimate of what is reached
    tensor_share: float = 1.0  # of the rate of mma.sync
    plain_share: float = 0.65  # of an SM's multiply-adds that products reach where there are no tensor cores
    overlap: float = 1.657  # norm that joins the resources' times: infinity would be perfect overlap, 1 none
    copy_instructions: float = 27.05  # a warp's 512 bytes of asynchronous copies under a depthwise: addresses
    place_instructions: float = 30.73  # a 16-pixel tile of `first`: its pixels' places, on the map and in shared memory
    gather_instructions: float = 18.52  # the same: loading its input
    staged_instructions: float = 93.89  # the same, from a stem's input in shared memory, and copying that there
    element_instructions: float = 35.0  # of staging an element of a stem's input by itself, as counted in the SASS
    store_instructions: float = 5.588  # a register of the output: bias, residual, address, store
    pool_instructions: float = 110  # of adding up a group of 16 pixels of the output behind a project
    sum_instructions: float = 24.76  # a register of partial sums that goes to another thread block of a cluster
    factor_instructions: float = 80.92  # a warp's 512 bytes of X times their factors
    clocks_per_instruction: float = 2.027  # of one warp alone
    product_clocks: float = 7.162  # the same, of a tensor-core product
    wgmma_clocks: float = 1.362  # the same, of 8 channels of a product of 64 pixels
    fragment_clocks: float = 13.12  # the same, of loading a fragment of `first` that goes to shared memory
    step_clocks: float = 164.9  # of a chunk step: its barrier, and the copies' latency that is not hidden
    warp_clocks: float = 138.0  # the same, for each warp of the thread block: the slowest keeps all waiting
    stream_warp_clocks: float = 43.79  # of a step of a lone dense stage, for each warp
    wait_clocks: float = 402.2  # of waiting for memory, with nothing of this thread block on its way
    wgmma_block_clocks: float = 280.6  # of a thread block with wgmma, once
    fill_bytes: float = 165.8  # a clock, of the copies of a thread block's first step, which nothing hides
    first_block_clocks: float = 1044.0  # of one whose depthwise waits for `first`, once
    split_clocks: float = 1923  # of a cluster: its barriers
    turn_share: float = 0.8638  # of a tile's latency that one after it takes, whose input was fetched ahead
    dispatch_clocks: float = 398.2  # in which an SM starts a thread block
    wgmma_wait_clocks: float = 162.7  # of a product of 64 pixels beside a depthwise, which nothing hides
    uneven_blocks: float = 0.55  # thread blocks that the busiest SM has more, for each of two it has room for
    uneven_most: int = 2  # thread blocks that it has more, at most, before that share is taken
    strip_load_instructions: float = 1.229  # a lone depthwise's, of a pixel of X or Y: address, border, load or store
    strip_row_instructions: float = 14.03  # the same, of a row of X
    strip_wait_clocks: float = 65.78  # of waiting for rows of X in a lone depthwise
    strip_dispatch_clocks: float = 357.7  # dispatch_clocks of a lone depthwise
    strip_narrow_share: float = 0.2051  # of device memory's time for each 128 bytes that are asked for in parts
    strip_served_share: float = 0.5  # of what strips ask L2 for that it sends: SMs of a group ask for pixels together
    short_row_columns: float = 9.0  # of a tile whose rows of Y, to many images at once, take memory twice as long
    launch_us: float = 1.2  # of a kernel in a captured graph
    module_us: float = 0.4  # more in a network: of a kernel that follows another one, not itself
    base_registers: int = 53  # addresses, counters, pipeline state
    gathered_registers: int = 60  # from sm_100 on, the assembler gathers more loads
    resident_registers: int = 24  # of a thread with resident weights: the next tile's places
    spare_registers: int = 16  # kept free below every bound, so that none spill
    untimed_registers: int = 12  # the same, on GPUs whose kernels were not looked at one by one
    # stock: separate NCHW kernels
    stock_conv_us: float = 5.0  # of a convolution kernel, however small
    stock_elementwise_us: float = 2.5  # of an activation, Add or layout change kernel
    stock_depthwise_rate: float = 3.0  # multiply-adds an SM does in a clock in stock's depthwise, of either type
    stock_dense_share: float = 0.55  # of the memory rates that stock's other convolutions reach
    stock_elementwise_share: float = 0.85  # the same, elementwise kernels
    stock_layout_share: float = 0.4  # the same, layout changes
    stock_tensor_share: float = 0.6  # of the tensor cores' peak that stock's convolutions reach
    stock_doubt: float = 1.0  # stock must be faster than a module by this factor for a layer to be left to it


PRIORS = Priors()
FITTED = (
    "overlap", "l2_share", "copy_instructions", "place_instructions", "gather_instructions", "staged_instructions",
    "store_instructions", "sum_instructions", "factor_instructions", "clocks_per_instruction", "product_clocks",
    "wgmma_clocks", "fragment_clocks", "step_clocks", "fill_bytes", "warp_clocks", "stream_warp_clocks", "wait_clocks",
    "wgmma_block_clocks", "first_block_clocks", "split_clocks", "turn_share", "dispatch_clocks", "wgmma_wait_clocks",
    "uneven_blocks", "strip_load_instructions", "strip_row_instructions", "strip_wait_clocks",
    "strip_dispatch_clocks", "strip_narrow_share",
)  # fmt: skip

# By compute capability, the largest not above the GPU's: m16n8k16 products (float16; m16n8k8 in TF32) that an SM starts
# in a clock, and the share of that which mma.sync reaches where all of it takes wgmma or tcgen05.
_TENSOR = {75: (0.25, 1.0), 80: (0.5, 1.0), 86: (0.25, 1.0), 87: (0.5, 1.0), 89: (0.25, 1.0), 90: (1.0, 0.65),
           100: (1.0, 0.3), 120: (0.25, 1.0)}  # fmt: skip

# Instructions an activation takes for a value, in float: an exponential or a reciprocal counts as four. The cheapest
# ones take two halves at once.
_ACTIVATION = {"none": 0, "relu": 0.5, "clip": 1, "hardswish": 3, "hardsigmoid": 3, "leakyrelu": 2, "prelu": 2,
               "silu": 11, "sigmoid": 10, "tanh": 12, "gelu": 16, "gelu_tanh": 15}  # fmt: skip

MAX_ACCUMULATORS = 168  # registers of a thread for its output, as the kernels allow
MAX_REGISTERS = 255
FRAGMENT = 512  # bytes of an operand of a warp: 32 lanes x 16
SECTOR = 32  # bytes that L2 hands out at least
LINE = 128  # bytes that it fetches together


@dataclass(frozen=True)
class Segment:
    """A module without a tile: up to three stages and the input they meet. Names and node counts are left out, so that
    equal shapes are equal segments."""

    dtype: str
    batch: int
    height: int
    width: int
    first: Layer | None
    depthwise: Layer | None
    project: Layer | None
    residual: bool = False
    alone: bool = False  # a stem without other layers: the depthwise is the kernel's, and hands its input on

    @property
    def stages(self) -> str:
        return "-".join(["mean"] * self.mean + [layer.kind for layer in self.layers])

    @property
    def passes(self) -> bool:
        """Whether `first` of a stem alone writes Y itself: else the depthwise adds a residual, or writes sums."""
        return self.alone and not self.residual and not self.pool

    @property
    def mean(self) -> bool:
        """Pointwise layers on the mean of the input over its map."""
        return self.layers[0].mean

    @property
    def gate(self) -> bool:
        """Two of these, which have a kernel of their own."""
        return self.mean and len(self.layers) == 2

    @cached_property
    def strip(self) -> bool:
        """A lone depthwise, which has a kernel of its own."""
        return self.stages == "dw" and self.layers[0].taps <= strip.MAX_TAPS

    @property
    def pool(self) -> bool:
        return self.layers[-1].pool

    @property
    def scaled(self) -> bool:
        return self.layers[0].scaled

    @property
    def normed(self) -> bool:
        return self.layers[0].normed

    @property
    def takes_moments(self) -> bool:
        """Sums of x and x^2 are taken while X passes by; else `first` normalises X itself."""
        return self.normed and self.first is None

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in (self.first, self.depthwise, self.project) if layer)

    @cached_property
    def element(self) -> int:
        """Bytes of an element."""
        return 2 if self.dtype == "float16" else 4

    @cached_property
    def group(self) -> int:
        """Channels of a group: 64 bytes."""
        return 64 // self.element

    @cached_property
    def c_in(self) -> int:
        return self.layers[0].in_channels

    @cached_property
    def c_out(self) -> int:
        return self.layers[-1].out_channels

    @cached_property
    def middle_channels(self) -> int:
        """Depth of `project` (its reduction); without one, the output channels."""
        if self.project and self.project.kind == "conv":
            return self.project.taps * self.c_in
        return self.project.in_channels if self.project else self.c_out

    @cached_property
    def middle_groups(self) -> int:
        return ceil_div(self.middle_channels, self.group)

    @cached_property
    def padded_out(self) -> int:
        return round_up(self.c_out, self.group // 2) if self.project else self.middle_groups * self.group

    @cached_property
    def first_columns(self) -> int:
        """Columns of the filter of `first`, padded where a staged input is read in pairs of columns."""
        assert self.first
        if self.depthwise and self.element == 2 and self.first.stride[1] % 2 == 0 and self.first.dilation[1] == 1:
            return round_up(self.first.kernel[1] + self.first.pads[1] % 2, 2) if self.first.kind == "conv" else 1
        return self.first.kernel[1]

    @cached_property
    def first_depth(self) -> int:
        return self.first.kernel[0] * self.first_columns * self.c_in if self.first else 0

    @cached_property
    def first_steps(self) -> int:
        return ceil_div(self.first_depth, self.group // 2)

    @cached_property
    def maps(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of X and of every stage's output."""
        sizes = [(self.height, self.width)]
        for layer in self.layers:
            sizes.append(layer.out_size(*sizes[-1]))
        return tuple(sizes)

    @cached_property
    def mid(self) -> tuple[int, int]:
        """The map that the depthwise reads."""
        return self.maps[1 if self.first else 0]

    @cached_property
    def streams(self) -> bool:
        """A lone pointwise or dense convolution whose input is copied asynchronously."""
        if self.stages == "conv":
            return self.c_in % self.group == 0
        return self.stages == "pw" and self.c_in % (16 // self.element) == 0

    @property
    def stem(self) -> bool:
        """A dense convolution of few channels in front of a depthwise: its input is staged in shared memory."""
        return self.first is not None and self.first.kind == "conv"

    @cached_property
    def input_elements(self) -> int:
        """Elements of X that any window touches."""
        if self.mean:
            return self.batch * gate.rows(self) * self.c_in
        touched = [touched_pixels(self.layers, axis, size) for axis, size in enumerate(self.maps[0])]
        return self.batch * touched[0] * touched[1] * self.c_in

    @cached_property
    def tilings(self) -> dict[tuple[int, int], Tiling]:
        return {}

    @cached_property
    def output_elements(self) -> int:
        return self.batch * self.maps[-1][0] * self.maps[-1][1] * self.c_out

    @cached_property
    def weight_elements(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def group_bytes(self) -> int:
        """Weights of first and depthwise as packed for a group of middle channels, with their biases."""
        total = 0
        if self.first:
            total += self.group // 8 * self.first_steps * 256 + self.vector_bytes(self.first)
        if self.depthwise:
            total += self.depthwise.taps * 64 + self.vector_bytes(self.depthwise)
        return total

    def vector_bytes(self, layer: Layer) -> int:
        """Bias, and slope of a PRelu, of a group."""
        return self.group * 4 * (2 if layer.activation == "prelu" else 1)

    @cached_property
    def compulsory_bytes(self) -> int:
        """X, the weights and the residual read once, Y written once."""
        outputs = self.output_elements * (2 if self.residual else 1)
        return self.element * (self.input_elements + self.weight_elements + outputs)

    @cached_property
    def multiply_adds(self) -> int:
        """What the convolutions need, nothing recomputed or padded."""
        return self.batch * sum(h * w * layer.weights for layer, (h, w) in zip(self.layers, self.maps[1:], strict=True))


def segment(chain: Chain, first: int, last: int) -> Segment | None:
    """The segment of the chain's layers first..last, or None where no kernel computes these stages in one."""
    layers = chain.layers[first : last + 1]
    kinds = [layer.kind for layer in layers]
    if kinds[0] == "conv" and len(kinds) > 1 and layers[0].in_channels > STEM_CHANNELS:
        return None  # its input would not fit
    if "-".join(kinds) not in STAGES or any(layer.residual or layer.pool for layer in layers[:-1]):
        return None
    if any(layer.mean or layer.scaled or layer.normed for layer in layers[1:]):
        return None
    if layers[0].mean and (kinds not in (["pw"], ["pw", "pw"]) or layers[0].scaled or layers[-1].residual):
        return None
    bare = [replace(layer, name="", nodes=1, activation_nodes=0, residual=False) for layer in layers]
    if kinds == ["conv"] and layers[0].in_channels <= STEM_CHANNELS and not (layers[0].pool and layers[0].residual):
        # A lone stem runs in front of a depthwise that hands its result on: so its input is staged.
        bare.append(Layer("dw", layers[0].out_channels, layers[0].out_channels, pool=layers[0].pool))
        bare[0] = replace(bare[0], pool=False)
        kinds.append("dw")
    depthwise = kinds.index("dw") if "dw" in kinds else None
    lone = len(bare) == 1
    project = bare[-1] if kinds[-1] != "dw" else None
    if project and not lone and project.stride != (1, 1):
        return None  # a project behind another stage takes each pixel
    return Segment(
        dtype=chain.dtype,
        batch=chain.batch,
        height=chain.maps()[first][0],
        width=chain.maps()[first][1],
        first=bare[0] if not lone and kinds[0] != "dw" else None,
        depthwise=bare[depthwise] if depthwise is not None else None,
        project=project,
        residual=layers[-1].residual,
        alone=len(bare) > len(layers),
    )


def touched_pixels(layers: tuple[Layer, ...], axis: int, size: int) -> int:
    """Pixels of an input axis (0 rows, 1 columns) of `size` that the last layer's output depends on."""
    sizes = [size]
    for layer in layers:
        sizes.append(layer.out_length(axis, sizes[-1]))
    touched: set[int] = set(range(sizes.pop()))
    for layer, limit in zip(reversed(layers), reversed(sizes), strict=True):
        step, dilation, pad = layer.stride[axis], layer.dilation[axis], layer.pads[axis]
        touched = {o * step + t * dilation - pad for o in touched for t in range(layer.kernel[axis])}
        touched = {pixel for pixel in touched if 0 <= pixel < limit}
    return len(touched)


class Tiling(NamedTuple):
    """What tiles of tile_h x tile_w output pixels read, of one image."""

    tiles: int
    halo_rows: int  # of the middle map, a full tile, pixels outside the map included
    halo_columns: int
    mid_pixels: int  # over all tiles, overlaps counted again, what is outside the map left out
    x_pixels: int  # the same of X
    x_runs: int  # rows of X that tiles read, each time


def _tiled(seg: Segment, axis: int, tile: int) -> tuple[int, int, int]:
    """Along an axis: halo, and pixels of the middle map and of X that all tiles read."""
    assert seg.depthwise
    dense = seg.first if seg.first and seg.first.kind == "conv" else None
    step, reach, pad = seg.depthwise.stride[axis], seg.depthwise.reach[axis], seg.depthwise.pads[axis]
    out, mid, size = seg.maps[-1][axis], seg.mid[axis], seg.maps[0][axis]
    mid_pixels = x_pixels = 0
    for start in range(0, out, tile):
        low = min(max(0, start * step - pad), mid)
        high = max(low, min(mid, (min(start + tile, out) - 1) * step - pad + reach))
        mid_pixels += high - low
        if dense and high > low:
            low, high = low * dense.stride[axis] - dense.pads[axis], (high - 1) * dense.stride[axis] - dense.pads[axis]
            low, high = min(max(0, low), size), min(size, high + dense.reach[axis])
        x_pixels += max(0, high - low)
    return (tile - 1) * step + reach, mid_pixels, x_pixels


def tiling(seg: Segment, tile: Tile) -> Tiling:
    """Of a segment with a depthwise. Remembered, since tiles that differ in channels only share it."""
    found = seg.tilings.get((tile.tile_h, tile.tile_w))
    if not found:
        (halo_rows, mid_rows, x_rows), (halo_columns, mid_columns, x_columns) = (
            _tiled(seg, 0, tile.tile_h), _tiled(seg, 1, tile.tile_w)
        )  # fmt: skip
        tiles = ceil_div(seg.maps[-1][0], tile.tile_h) * ceil_div(seg.maps[-1][1], tile.tile_w)
        found = Tiling(
            tiles, halo_rows, halo_columns, mid_rows * mid_columns, x_rows * x_columns,
            x_rows * ceil_div(seg.maps[-1][1], tile.tile_w),
        )  # fmt: skip
        seg.tilings[tile.tile_h, tile.tile_w] = found
    return found


# ---- What a thread block holds (as spec.h has it) --------------------------------------------------------------------


def illegal(seg: Segment, tile: Tile) -> str:
    """Why the kernels cannot run the segment with this tile, on any GPU; empty if they can."""
    t, group = tile, seg.group
    if seg.gate:
        return gate.illegal(t, group)
    channels = block_n(seg, t)
    if min(t.tile_h, t.tile_w, t.images, t.chunk, t.warps_m, t.warps_n, t.split, t.blocks) < 1 or t.block_n < 0:
        return "every field of a tile is positive (block_n may be 0)"
    if t.chunk % group or t.block_n % group:
        return f"chunk and block_n must be multiples of a group of {group} channels"
    if not 1 <= t.patch_h <= 8 or t.split not in (1, 2, 4, 8):
        return "patch_h must be from 1 to 8 and split 1, 2, 4 or 8"
    if t.resident not in (0, 1, 2) or t.wgmma not in (0, 1):
        return "resident must be 0, 1 or 2, and wgmma 0 or 1"
    if t.resident == 2 and not (t.wgmma and seg.streams and t.split == 1):
        return "resident = 2 needs wgmma, a lone convolution of vectors of channels, and no split"
    if t.wgmma and (why := _no_wgmma(seg, t)):
        return f"wgmma needs {why}"
    if t.warps_m * t.warps_n > 16 or t.blocks * t.threads > 2048:
        return "a thread block has at most 16 warps, and blocks times threads at most 2048"
    if seg.strip:
        return strip.illegal(seg, t)
    if seg.depthwise:
        if t.tile_h % t.patch_h or t.tile_w % 2:
            return "a tile must be made of whole patches"
        if 8 * t.warps_m < t.images * (t.tile_h // t.patch_h) * (t.tile_w // 2):
            return "the warps do not cover the tile"
        if t.images > 1 and (t.tile_h < seg.maps[-1][0] or t.tile_w < seg.maps[-1][1]):
            return "a tile of several images must cover the output map"
        if seg.pool and t.images > 1 and t.tile_h // t.patch_h * t.tile_w // 2 % 8:
            return "sums of several images need warps of one image each"
    elif seg.mean and t.images > min(64, 16 * t.patch_h * t.warps_m):
        return "the warps do not cover the images, or there are more than 64"
    elif t.images != 1 and not seg.mean:
        return "images needs a depthwise or a mean"
    if seg.project:
        if not seg.mean and (t.chunk // group) % t.warps_n:
            return "chunk must have a group for each of warps_n"
        if t.split > ceil_div(seg.middle_groups, t.chunk // group):
            return "split must not exceed the chunks"
        if accumulators(seg, t) > MAX_ACCUMULATORS:
            return "accumulators do not fit the registers"
    else:
        if t.warps_n != 1 or t.split != 1:
            return "warps_n and split need a project"
        if channels < seg.padded_out and channels % t.chunk:
            return "block_n must be a multiple of chunk"
    return ""


def _no_wgmma(seg: Segment, tile: Tile) -> str:
    """What wgmma needs and does not find; empty if it finds all."""
    loads = seg.first is not None and not seg.depthwise
    if not loads and (seg.mean or (seg.scaled and not seg.streams) or (seg.normed and seg.first)):
        return "X as it is"
    stem = seg.first is not None and seg.first.kind == "conv"
    if stem or not (seg.project or seg.first):
        return "pointwise stages, or a lone dense one"
    if tile.warps_m % 4 or (seg.first and tile.chunk > 128):
        return "warps_m to be a multiple of 4, and of a chunk at most 128 channels"
    if seg.project and tile.warps_n > 1 and block_n(seg, tile) % (tile.warps_n * seg.group):
        return "whole groups of output channels for each of warps_n"
    return ""


def block_n(seg: Segment, tile: Tile) -> int:
    """Nb: output channels of a thread block, padded."""
    return min(tile.block_n, seg.padded_out) if tile.block_n else seg.padded_out


def _warp_groups_n(seg: Segment, tile: Tile) -> int:
    return ceil_div(ceil_div(block_n(seg, tile), seg.group), tile.warps_n)


def accumulators(seg: Segment, tile: Tile) -> int:
    """Registers of a thread for its share of the output."""
    return tile.patch_h * _warp_groups_n(seg, tile) * seg.group // 2 if seg.project else 0


def pool_rows(seg: Segment, tile: Tile) -> int:
    """Rows of the sums over an image's map."""
    if not seg.depthwise:
        return ceil_div(seg.maps[-1][0] * seg.maps[-1][1] - 1, 16) + 1
    if seg.strip:
        return tiling(seg, tile).tiles
    warps = ceil_div(tile.tile_h // tile.patch_h * (tile.tile_w // 2), 8)
    return tiling(seg, tile).tiles * warps * (tile.patch_h if seg.project else 1)


def _first_rows(seg: Segment, tile: Tile) -> int:
    """Pixels of the halo region (or the flat ones), in the rows of a product."""
    if not seg.depthwise:
        return 16 * tile.patch_h * tile.warps_m
    spatial = tiling(seg, tile)
    return round_up(tile.images * spatial.halo_rows * spatial.halo_columns, 64 if tile.wgmma else 16)


def _first_tiles(seg: Segment, tile: Tile) -> int:
    """Tiles of `first`, 16 pixels (64), that a warp (four) computes."""
    return ceil_div(_first_rows(seg, tile) // 16, tile.warps_m * tile.warps_n) if seg.depthwise else tile.patch_h


def _first_in_registers(seg: Segment, tile: Tile) -> bool:
    return not tile.wgmma and _first_tiles(seg, tile) * seg.first_steps * 4 <= 48


def _remembers_places(seg: Segment, tile: Tile) -> bool:
    """Whether resident thread blocks remember where pixels of the halo region come from."""
    if not (tile.resident and seg.first and seg.depthwise) or tile.wgmma:
        return False
    return seg.first.kind == "conv" or (seg.c_in % (16 // seg.element) == 0 and not seg.scaled)


def _exchanges(seg: Segment, tile: Tile) -> bool:
    """Whether what feeds `project` passes through shared memory."""
    return seg.project is not None and not seg.mean and (seg.streams or tile.warps_n > 1 or tile.wgmma == 1)


def _from_registers(seg: Segment, tile: Tile) -> bool:
    """Whether warpgroups multiply pixels from registers."""
    return tile.wgmma == 1 and seg.streams and (seg.element == 4 or seg.scaled)


def _apart(seg: Segment, tile: Tile) -> int:
    """Warpgroups of a thread block that wait for their own copies alone; 1 where all of it waits."""
    apart = tile.wgmma and seg.streams and tile.resident and tile.warps_n == 1
    return tile.warps_m // 4 if apart and (_from_registers(seg, tile) or tile.warps_m > 4) else 1


def _stages(seg: Segment, tile: Tile) -> int:
    """Buffers of what a chunk step replaces."""
    return 3 if seg.streams and tile.wgmma and not tile.weights_stay else 2


def shared_bytes(seg: Segment, tile: Tile) -> int:
    """Shared memory of a thread block."""
    if seg.gate:
        return gate.shared_bytes(seg, tile)
    if seg.strip:
        return 0
    t, groups, warps = tile, tile.chunk // seg.group, tile.warps_m * tile.warps_n
    fragment = FRAGMENT
    once = halo = exchange = 0
    weights = groups * seg.group_bytes
    if seg.depthwise and seg.passes:
        weights -= groups * (seg.depthwise.taps * 64 + seg.vector_bytes(seg.depthwise))
    if seg.first and t.wgmma:  # whole groups of X's channels, and a chunk's weights in whole row blocks
        rows, vectors = seg.group // 8 * 256, seg.vector_bytes(seg.first)
        padded = groups * (rows * round_up(seg.first_steps, 2) + vectors)
        weights += round_up(padded, fragment) - groups * (rows * seg.first_steps + vectors)
        once = ceil_div(seg.first_steps, 2) * _first_rows(seg, t) * 64
    elif seg.first and not _first_in_registers(seg, t):
        once = warps * _first_tiles(seg, t) * ceil_div(seg.first_steps, 2) * 2 * fragment
    if seg.depthwise:
        spatial = tiling(seg, t)
        if seg.first and seg.first.kind == "conv":
            once += staged_bytes(seg, t)
        if _remembers_places(seg, t):
            once += warps * _first_tiles(seg, t) * 64
        if not seg.passes:
            halo = groups * (t.images * spatial.halo_rows * round_up(spatial.halo_columns, 2) * 64 + 128)
    if seg.mean:
        once = _steps(seg, t) * groups * round_up(t.images, 8) * 64 + gate.parts_bytes(seg, t)
    if seg.project:
        weights += groups * (block_n(seg, t) // 8) * fragment
        if _exchanges(seg, t):
            exchange = t.warps_m * groups * t.patch_h * 2 * fragment
    units = round_up(warps * t.patch_h * _warp_groups_n(seg, t), t.split)
    reduction = units * (seg.group // 8) * fragment if t.split > 1 else 0
    if seg.takes_moments and t.split > 1:
        reduction += t.split * t.warps_m * t.patch_h * 128
    steps, chain = _steps(seg, t), seg.first and seg.depthwise and (seg.project or seg.stem)
    one = chain and steps == 1 and (seg.stem or not t.resident)
    buffers = 1 if one and not t.resident else _stages(seg, t)
    working = once + (1 if one else 2) * halo + buffers * exchange + (steps if t.weights_stay else buffers) * weights
    arrivals = 48 if t.resident == 2 else 32
    # Tiles that follow need the working buffers.
    return arrivals + (working + reduction if t.resident else max(working, reduction))


def staged_bytes(seg: Segment, tile: Tile) -> int:
    """The patch of X under the halo region of a tile, where a dense convolution comes before a depthwise."""
    lines, columns = _staged_patch(seg, tile)
    return lines * (ceil_div(columns, 16 // seg.element) | 1) * 16


def _staged_patch(seg: Segment, tile: Tile) -> tuple[int, int]:
    """Its lines, of all channels and images, and their elements."""
    assert seg.first
    spatial = tiling(seg, tile)
    rows = (spatial.halo_rows - 1) * seg.first.stride[0] + seg.first.reach[0]
    columns = (spatial.halo_columns - 1) * seg.first.stride[1] + seg.first.reach[1]
    columns += seg.first_columns - seg.first.kernel[1] + 16 // seg.element - 1
    return tile.images * seg.c_in * rows, columns


def packed_bytes(seg: Segment, tile: Tile) -> tuple[int, int]:
    """Weights as they lie in memory, padded to whole chunks, with biases: of first and depthwise, and of project."""
    groups = round_up(seg.middle_groups, tile.chunk // seg.group)
    if not seg.project:
        return groups * seg.group_bytes, 0
    biases = round_up(seg.c_out, seg.group) // seg.group * seg.vector_bytes(seg.project)
    return groups * seg.group_bytes, groups * (seg.padded_out // 8) * FRAGMENT + biases


@lru_cache(maxsize=4096)
def touched_bytes(channels: int, element: int, access: int, unit: int = SECTOR) -> float:
    """Bytes of the sectors, or other units, that accesses of `access` bytes to a pixel touch, each apart: the mean over
    pixels that follow one another in memory."""
    pixel = channels * element
    period = unit // gcd(pixel, unit)
    starts = [(i * pixel, at) for i in range(period) for at in range(0, pixel, access)]
    ends = [(start + at, start + min(at + access, pixel)) for start, at in starts]
    return unit * sum(ceil_div(end, unit) - begin // unit for begin, end in ends) / period


def _steps(seg: Segment, tile: Tile) -> int:
    """Chunks that a thread block walks over."""
    groups = tile.chunk // seg.group
    if seg.project:
        return ceil_div(ceil_div(seg.middle_groups, groups), tile.split)
    return ceil_div(block_n(seg, tile) // seg.group, groups)


def registers(seg: Segment, tile: Tile, gpu: Gpu, priors: Priors = PRIORS) -> int:
    """Registers of a thread, estimated: accumulators, `first`'s fragments, and the hungrier of the phases."""
    if seg.gate:
        return gate.REGISTERS
    if seg.strip:
        return strip.registers(seg, tile)
    if seg.streams and tile.wgmma:
        return _stream_registers(seg, tile)
    phase = 16 + 8 * tile.patch_h  # fragments of a tensor-core product
    sums = accumulators(seg, tile)
    if seg.depthwise:
        pixels = 6 * max(seg.depthwise.stride)
        if not seg.project:  # stores follow at once, and the next pixels' loads before them
            large = seg.depthwise.taps > 9
            pixels = max(pixels, 12 if tile.patch_h <= 4 else 18) + (12 * max(seg.depthwise.stride) if large else 0)
            if large and seg.element == 4:
                pixels += 32 if tile.resident else 52 if gpu.sm < 80 else 0
            if _ACTIVATION[seg.depthwise.activation] > 8:  # all pixels' exponentials at once
                pixels += 8
        depthwise = 4 * min(seg.depthwise.taps, 9) + pixels * tile.patch_h + 4
        if not seg.first and not tile.resident and seg.middle_groups == 1:
            # One group: sums begin when it has ended.
            sums = max(0, sums - depthwise)
        phase = max(phase, depthwise)
        several = tile.chunk // seg.group > tile.warps_n and tile.patch_h == 1 and not tile.wgmma
        if several and seg.stages == "pw-dw-pw" and max(seg.depthwise.stride) > 1 and seg.depthwise.taps <= 9:
            phase += 2 * sums  # groups side by side
    if tile.wgmma and seg.first:  # the results of products of the first stage
        own = tile.chunk // 2
        tiles = max(1, 64 // own) if seg.depthwise else 1
        phase = max(
            phase, own * min(_first_tiles(seg, tile), tiles) if seg.depthwise else own * tile.patch_h // tile.warps_n
        )
    if seg.pool and seg.depthwise and not seg.project:  # sums, and where they go; a large filter loads more ahead
        phase += 16 * max(seg.depthwise.stride) if seg.depthwise.taps <= 9 else 8 + 8 * tile.patch_h
    if seg.scaled:
        phase += 16 + 8 * tile.patch_h
    if seg.takes_moments:
        phase += 4 + 18 * tile.patch_h
    if seg.first and not seg.depthwise and not tile.wgmma:  # the results of `first` and its bias, beside the sums
        phase += 16
    if seg.project and seg.element == 4 and tile.wgmma:
        phase += 8
    elif seg.project and seg.element == 4:
        phase += 16 + (8 if min(tile.images, tile.patch_h) > 1 else 0)  # operands rounded to TF32
        if seg.stages == "dw-pw" and gpu.sm < 90:  # and the places of asynchronous copies
            phase += 16
    fragments = _first_tiles(seg, tile) * seg.first_steps if seg.first and _first_in_registers(seg, tile) else 0
    held = fragments * 3 + (16 if fragments == 12 and not seg.project else 0)
    kept = 0  # what a resident block remembers between tiles, and what of the next tile's input is on its way
    if gpu.sm < 90 and not tile.resident:
        if seg.depthwise and seg.project and _ACTIVATION[seg.depthwise.activation] > 8:
            kept += 24
        if seg.first and not held and seg.element == 4:  # many loads of the input are gathered
            kept += 4 * max(0, _first_tiles(seg, tile) * seg.first_steps - 28)
    if tile.resident:
        stem = seg.stages.startswith("conv")
        several = _steps(seg, tile) > 1  # else what is known of a tile's input is not needed beside the depthwise
        own = (24 if several else 8) if stem and seg.depthwise else 8 if seg.project and not stem else 32
        kept = priors.resident_registers + own
        if seg.element == 4 and seg.first and not held and not stem:
            kept += 96
        if seg.stages == "dw-pw":
            kept += 8 * tile.patch_h if seg.element == 4 else 8 if tile.wgmma else 0
        if seg.first and not held:  # many loads of the next tile's input are gathered
            kept += 8 * max(0, _first_tiles(seg, tile) * seg.first_steps - 32)
        if seg.stages == "conv-dw" and several:
            kept += 14 * tile.patch_h
        if gpu.sm >= 100 and seg.depthwise and not seg.first:  # places of copies
            kept += 32
        if gpu.sm < 90 and seg.stages == "pw-dw" and seg.depthwise and seg.depthwise.taps > 9 and tile.patch_h > 1:
            kept += 80  # of weights
        if gpu.sm < 90 and seg.depthwise and seg.project:  # of weights, too
            if seg.first and seg.element == 4 and seg.depthwise.taps > 9:
                kept += 44
            if _ACTIVATION[seg.depthwise.activation] > 8:
                kept += 24
        if seg.first and seg.depthwise and seg.project and tile.chunk > seg.group and _steps(seg, tile) == 1:
            kept += 12  # taps of several groups are the same for every tile
        if seg.pool:  # weights are the same for every tile, and held if they can be
            kept += 96 if stem else 16
    if seg.stem and not seg.passes and held and _steps(seg, tile) == 1 and gpu.sm == 90:
        kept -= 36  # the input is not needed beside the depthwise; other architectures were not looked at
    base = priors.base_registers + (priors.gathered_registers if gpu.sm >= 100 else 0)
    return base + sums + held + phase + kept


def _stores_singly(seg: Segment, tile: Tile) -> bool:
    """Whether a lone dense stage stores one group of channels after another, each with its biases."""
    many = tile.wgmma == 1 and tile.warps_m > 8 and not seg.residual and block_n(seg, tile) < seg.padded_out
    return seg.pool or tile.resident == 2 or many


def _stream_registers(seg: Segment, tile: Tile) -> int:
    """The same of a lone stage with `wgmma`: a loop of little but products, or the end, whichever is hungrier."""
    rows, groups, channels = tile.patch_h, _warp_groups_n(seg, tile), block_n(seg, tile)
    loop = 32 + 8 * rows
    if _from_registers(seg, tile):  # those of one group multiply while the next are loaded
        wide = channels // tile.warps_n > 256  # products of two instructions
        loop = 24 + 16 * rows + (40 if wide else 0)
    if seg.layers[0].kind == "conv":
        loop += 4 * rows
    if seg.scaled:
        loop += 8 + 16 * rows
    if seg.takes_moments:
        loop += 4 + 18 * rows
    if tile.resident == 2:
        return max(64, accumulators(seg, tile) + _going_by_registers(seg, tile, loop))
    bias, residual = seg.group // 4, 8 if seg.residual else 0  # of a group of channels and two pixels
    if tile.split > 1:  # for all groups that a warp stores, before it has them
        end = ceil_div(rows * groups, tile.split) * (bias + residual * 3 // 2)
    elif _stores_singly(seg, tile):
        end = bias + residual
    elif not seg.residual and (channels == seg.padded_out or seg.padded_out % channels):
        # Addresses that are constants, or a last block with fewer, hoist all biases.
        end = min(80, groups * (4 + bias // 2))
    else:
        end = min(groups, 4) * (bias + residual) - (8 if groups > 4 and seg.element == 2 else 0)
        if seg.padded_out % seg.group and channels < seg.padded_out:  # some blocks end in half a group
            end += 136 if tile.resident and seg.residual and seg.element == 4 else 24
    end += 16
    if tile.split > 1:
        loop, end = loop + 8, end + 8
    if tile.resident:  # the next tile's input, and weights, which are the same for every tile
        loop, end = (loop + 32, end + 24) if seg.element == 2 else (loop + 48, end + 32)
        loop += 16 if seg.pool else 0
    return max(64, accumulators(seg, tile) + max(loop, end))


def _going_by_registers(seg: Segment, tile: Tile, loop: int) -> int:
    """Beside the accumulators, where weights go by for one tile after another: what the loop has, and what the compiler
    hoists of the end."""
    rows, wide, whole = tile.patch_h, seg.element == 4, block_n(seg, tile) == seg.padded_out
    exponentials = _ACTIVATION[seg.layers[0].activation] > 8
    loop += 16 if seg.scaled or seg.takes_moments else 8
    if seg.layers[0].kind == "conv":
        loop += 8 * rows
    if seg.pool or seg.residual:
        loop += 8 + 16 * rows if wide else 24
    if wide and seg.padded_out % seg.group and not whole:  # some thread blocks end in half a group
        loop += 120 if seg.residual else 56
    if seg.residual or tile.warps_n > 1 or not whole:
        return loop + (16 * (rows - 1) if exponentials and not wide else 8 if whole else 0)
    # Where channels lie are constants: all biases.
    return max(loop + 16, (0 if wide else 16 + 8 * rows * _warp_groups_n(seg, tile)) + (32 if exponentials else 0))


def resident(seg: Segment, tile: Tile, gpu: Gpu, shared: int, regs: int) -> int:
    """Thread blocks that an SM holds at once; 0: it cannot hold one."""
    if shared > gpu.shared_per_block or regs > MAX_REGISTERS:
        return 0
    return min(
        gpu.shared_per_sm // (shared + 1024),  # the system takes 1024 bytes a block
        4 * (gpu.registers_per_sm // (4 * 32 * round_up(regs, 8))) // (tile.threads // 32),  # each quarter has its own
        gpu.max_threads_per_sm // tile.threads,
        gpu.max_blocks_per_sm,
    )


# ---- What it costs ---------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    time_us: float
    traffic_bytes: int  # between the SMs and L2: the paper's global memory accesses
    dram_bytes: int  # from and to device memory, L2 cold at the start
    shared_bytes: int
    registers: int  # of a thread
    spilled: int  # registers that `blocks` takes from it
    resident: int  # thread blocks an SM holds at once
    grid: int  # thread blocks
    recompute: float  # multiply-adds done over multiply-adds needed; 1: nothing is computed twice
    bound: str  # the resource that takes longest


def _capability(table: dict[int, tuple[float, float]], sm: int) -> tuple[float, float]:
    return table[max((known for known in table if known <= sm), default=min(table))]


def _tensor_rates(seg: Segment, gpu: Gpu, priors: Priors, wgmma: bool) -> tuple[float, float, bool]:
    """Products an SM starts in a clock, multiply-adds the chip does in a microsecond, and whether on tensor cores."""
    per_clock, share = _capability(_TENSOR, gpu.sm)
    share = 1.0 if wgmma else share
    tflops = gpu.tensor_fp16_tflops if seg.dtype == "float16" else gpu.tensor_tf32_tflops
    if tflops <= 0:
        return 64 / 1024 * priors.plain_share, gpu.fp32_tflops * 5e5 * priors.plain_share, False
    return per_clock * share * priors.tensor_share, tflops * 5e5 * share * priors.tensor_share, True


def memory_us(gpu: Gpu, dram: float, traffic: float, priors: Priors) -> tuple[float, float]:
    """Times of device memory and of L2. What is far below the size of L2 is taken to lie there already."""
    missing = min(1.0, dram / gpu.l2_bytes)
    return dram * missing / (gpu.memory_gbps * 1e3 * priors.dram_share), traffic / (gpu.l2_gbps * 1e3 * priors.l2_share)


L2_SHARE = 0.65  # of l2_bytes that hold what both halves have asked for


def dram_bytes(seg: Segment, w: Work, gpu: Gpu) -> int:
    """Bytes from and to device memory, L2 cold at the start: each once, and what thread blocks of other output channels
    read again after L2 has taken more than it holds."""
    passes = 1 + w.again // max(1, seg.element * seg.input_elements)  # windows may touch pads alone
    between = seg.element * (seg.input_elements + seg.output_elements // passes)
    return w.dram + int(w.again * min(1.0, max(0.0, between / (L2_SHARE * gpu.l2_bytes) - 1)))


def cluster_sms(sms: int, split: int) -> int:
    """SMs that clusters of `split` thread blocks reach at once (spec.h says why not all)."""
    if split < 4:
        return sms // split * split
    return sms * 10 // 11 // 4 * 4 if split == 4 else sms * 6 // 7 // 8 * 8


class Work(NamedTuple):
    """What a segment with a tile does, on any GPU. Counts of a step are one warp's, warp-wide operations."""

    pieces: int  # tiles, for each channel block and split
    grid: int  # thread blocks
    turns: int  # tiles that a thread block works through, at most
    busy: int  # thread blocks of the busiest SM
    warps: int  # of a thread block
    steps: int  # chunks of a tile that a thread block walks over
    split: int
    moved: int  # bytes between the SMs and L2, weights apart
    weights: int  # the same, of weights
    dram: int  # bytes
    again: int  # bytes of X that are read again once thread blocks of other output channels have read all of it
    products: float  # a step's tensor-core products, of 16 pixels, 8 channels and half a group
    operands: float  # a step's vectors that wgmma reads, 512 bytes; 0: products are of single warps
    values: float  # a step's plain instructions on values: the depthwise, activations
    loads: float  # a step's vectors from shared memory, 512 bytes
    stores: float  # a step's vectors to shared memory
    factors: float  # a step's vectors of X that are multiplied by factors
    copies: float  # a step's asynchronous copies of X, 512 bytes
    weight_copies: float  # the same, of weights
    tiles: float  # 16-pixel tiles of `first` that a warp prepares, once a tile; a mean
    places: float  # turns in which their places are found anew
    fragments: float  # half groups of these that go to shared memory as they are loaded
    adding: float  # instructions of a warp that takes the mean of the input, once a tile
    waiting: float  # clocks in which it waits for that input
    ends: float  # registers of output, and of a residual, that a warp stores or loads, once a tile
    end_values: float  # its plain instructions on them, pooling apart
    sums: float  # registers of partial sums that it sends, once a tile
    recompute: float
    waits: float  # of lone stages: times that a thread block (a warp of a strip) waits for memory, once a tile
    late: int = 0  # times that it waits for biases or a residual before it stores, once a tile
    waited: float = 0.0  # a step's products of 64 pixels that a warp waits for: beside a depthwise, or of 12 warps
    rows: int = 0  # of a strip: rows of X of a patch
    words: int = 1  # of a strip: words of channels of a thread
    narrow: float = 0.0  # of a strip: bytes of lines that accesses touch over those that they want, less 1
    short: float = 0.0  # of a stem that writes Y itself to many images at once: rows of it, for each column of Y
    singles: int = 0  # of a stem whose rows of X are not whole vectors: elements that a thread stages, once a tile
    ahead: int = 0  # tiles whose first steps are copied while the one before is stored
    pooled: float = 0.0  # groups of 16 pixels of the output that a warp adds up behind a project, once a tile


def _late(seg: Segment, tile: Tile) -> int:
    """Times that a warp of a lone dense stage waits before it stores: for the first biases where groups of channels are
    stored one by one (else all are there), or for residuals of four."""
    if not seg.streams or tile.split > 1:
        return 0
    groups = _warp_groups_n(seg, tile)
    if seg.residual and tile.resident == 2:
        return tile.patch_h * groups
    return tile.patch_h * (1 if _stores_singly(seg, tile) else ceil_div(groups, 4) if seg.residual else 0)


def work(seg: Segment, tile: Tile, sms: int) -> Work:
    """The symbols are those of docs/planner.md."""
    if seg.strip:
        return _strip_work(seg, tile, sms)
    t, layer = tile, seg.depthwise
    # Geometry: S spatial tiles, B channel blocks, pixels read.
    e, group, groups, warps = seg.element, seg.group, t.chunk // seg.group, t.warps_m * t.warps_n
    out_h, out_w = seg.maps[-1]
    out_pixels = seg.batch * out_h * out_w
    channels = block_n(seg, t)
    blocks_n = ceil_div(seg.padded_out, channels)
    if layer:
        cut = tiling(seg, t)
        spatial = cut.tiles * ceil_div(seg.batch, t.images)
        mid_pixels, x_pixels = seg.batch * cut.mid_pixels, seg.batch * cut.x_pixels
        halo_pixels = t.images * cut.halo_rows * cut.halo_columns
    else:
        pixels = t.images if seg.mean else 16 * t.patch_h * t.warps_m
        spatial = ceil_div(out_pixels, pixels)
        mid_pixels = x_pixels = out_pixels
        halo_pixels = pixels
        dense = seg.layers[0]
        if seg.mean:
            x_pixels = seg.batch * gate.rows(seg)
        elif seg.streams:  # each tap reads its pixels
            x_pixels = out_pixels * dense.taps
        elif dense.kind == "conv":  # runs of pixels: rows of the map, or a part of one
            r, c = ceil_div(pixels, out_w), min(pixels, out_w)
            r = min(seg.height, (r - 1) * dense.stride[0] + dense.reach[0])
            c = min(seg.width, (c - 1) * dense.stride[1] + dense.reach[1])
            x_pixels = max(spatial * r * c, seg.input_elements // seg.c_in)
    steps = _steps(seg, t)
    apart = blocks_n * t.split  # thread blocks of a spatial tile
    sms = max(t.split, cluster_sms(sms, t.split))
    spatial_blocks, busy = spatial, ceil_div(spatial * apart, sms)
    if t.resident:
        spatial_blocks = min(spatial, max(1, sms * t.blocks // apart))
        busy = min(busy, max(t.blocks, ceil_div(apart, sms)))

    # Traffic between the SMs and L2. Without a `first`, split thread blocks and the channel blocks of a lone depthwise
    # read different channels of X.
    x_reads = (t.split if seg.first else 1) * (blocks_n if seg.project or seg.first else 1)
    recomputed = blocks_n if seg.project else 1
    x_bytes, y_bytes = float(e * seg.c_in), float(e * seg.c_out)  # of a pixel
    vector = 16 // e  # channels
    if seg.c_in % vector == 0 and (seg.streams or (layer and not seg.first) or (seg.first and t.wgmma)):
        x_bytes = touched_bytes(seg.c_in, e, 32)  # copied past L1, by two lanes at a time
    written = touched_bytes(seg.c_out, e, 64) if seg.c_out % vector == 0 else y_bytes
    moved = x_reads * x_pixels * x_bytes + out_pixels * (written + (y_bytes if seg.residual else 0))
    if layer and seg.first and seg.first.kind == "conv":  # runs of words, broken where a row ends and a warp does
        moved += x_reads * (SECTOR - 4) * (seg.batch * cut.x_runs * seg.c_in + spatial * staged_bytes(seg, t) / 128)
    inner, outer = packed_bytes(seg, t)
    fetched = spatial if t.resident == 2 else spatial_blocks  # times that weights are
    padding = inner + outer - e * seg.weight_elements
    passes = blocks_n if (seg.project or seg.first) and not t.resident else 1
    again = (passes - 1) * e * seg.input_elements
    if seg.pool:  # a row for every warp with pixels, or for every 16 pixels
        moved += seg.batch * pool_rows(seg, t) * y_bytes

    # Work of a warp in a chunk step.
    pack = 2 if e == 2 else 1
    products = operands = values = loads = stores = pooled = 0.0
    row = 32 / 512 / 4  # vectors of a warp that one of four reads: half a group of a pixel or channel
    copied = copied_weights = 0  # bytes that cp.async brings in a step, whole thread block
    # The kernels clip the halo region to the map, and warps without a tile of it skip `first`: the mean of a warp.
    tiles = fragments = factors = 0.0
    if seg.first:
        rows = round_up(ceil_div(mid_pixels, spatial), 64 if t.wgmma else 16) // 16
        tiles = min(_first_tiles(seg, t), rows / warps) if layer else t.patch_h
    waited = tiles + (t.patch_h if seg.project else 0) if t.wgmma and layer else 0.0
    one_set = t.warps_m > 8 or (groups == 1 and t.resident > 0 and t.warps_n == 1)
    if _from_registers(seg, t) and one_set:  # of operands' registers: a product ends before the next begins
        waited += groups
    if seg.first:
        weights = groups * group // 8 * seg.first_steps * 256
        own = groups if layer else groups / t.warps_n  # without a depthwise, warps_n share the groups
        products += tiles * own * (group // 8) * seg.first_steps
        if t.wgmma:
            operands += tiles * seg.first_steps * (64 + own * group) * row
            loads += tiles * own
        else:
            loads += weights / 512 * (max(tiles / 2, min(tiles, 1)) if layer else tiles * own / groups)
            if not _first_in_registers(seg, t):
                loads += tiles * seg.first_steps * own
                fragments = 0.0 if seg.stem else tiles * seg.first_steps
        values += tiles * 16 * own * group / pack / 32 * (2 + pack * _ACTIVATION[seg.first.activation])
        if layer and not seg.passes:
            stores += tiles * 2 * groups
        copied_weights += weights
        if seg.normed:  # three passes over the input of a tile: as much for each group of channels as to load it
            tiles *= 1 + seg.first_steps / 2
    if layer and not seg.passes:
        vectors = min((t.patch_h - 1) * layer.stride[0] + layer.reach[0], t.patch_h * layer.kernel[0])
        vectors *= min(layer.stride[1] + layer.reach[1], 2 * layer.kernel[1])
        own = groups / t.warps_n  # warps_n share the groups
        values += own * t.patch_h * 8 * (layer.taps + 1 + pack * _ACTIVATION[layer.activation])
        loads += own * (vectors + layer.taps)
        copied_weights += groups * layer.taps * 64
        if not seg.first:
            copied += groups * halo_pixels * 64
        if seg.pool:  # a conversion and an addition for each value, then the exchange between lanes
            values += own * (t.patch_h * 32 + 30)
    if seg.project:
        weights = groups * (channels // 8) * 512
        products += groups * 2 * t.patch_h * _warp_groups_n(seg, t) * (group // 8)
        copied_weights += weights
        if t.wgmma:
            pixels = 0 if _from_registers(seg, t) else 64
            operands += groups * 2 * t.patch_h * (pixels + channels // t.warps_n) * row
        else:
            loads += weights / t.warps_n / 512
        if _exchanges(seg, t):
            passed = groups * t.patch_h * 2
            loads += passed if not t.wgmma or _from_registers(seg, t) else 0
            if t.wgmma and e == 4:  # rounded to TF32
                values += passed * 4 / (1 if seg.streams else t.warps_n)
            if seg.streams:
                copied += passed * 512 * t.warps_m
            else:
                stores += passed / t.warps_n
        if seg.scaled:
            factors = groups * t.patch_h * 2.0
        if seg.takes_moments:  # three products, beside those of warpgroups too
            moments = groups * 2 * t.patch_h * 3
            if t.wgmma:
                values += 4 * moments
                loads += 0 if _from_registers(seg, t) else groups * 2 * t.patch_h
            else:
                products += moments
        if seg.mean:
            loads += groups * t.patch_h * 2
        elif not seg.first and not layer and not seg.streams:  # gathered from global memory
            width = 16 // e if seg.c_in % (16 // e) == 0 else 1
            values += 6 * t.patch_h * 16 * t.chunk / width / 32
        own = accumulators(seg, t) / t.split
        ends, end_values = own * (2.0 if seg.residual else 1.0), own * _ACTIVATION[seg.project.activation]
        if seg.pool:
            pooled = own / (group // 2)
    else:
        ends, end_values = steps * groups * t.patch_h * 8.0, 0.0

    adding, waiting = gate.adding(seg, t, ceil_div(seg.c_in, t.split)) if seg.mean else (0.0, 0.0)
    turns = ceil_div(spatial, spatial_blocks)
    # A resident thread block takes the same place of one image after another.
    places = min(turns, 1 + turns * t.images / seg.batch) if layer and t.resident else turns
    singles = 0
    if layer and seg.stem and seg.width * e % 16:
        lines, columns = _staged_patch(seg, t)
        singles = ceil_div(lines * columns, t.threads)
    late, waits = _late(seg, t), steps / (_stages(seg, t) - 1) / _apart(seg, t) if seg.streams else 0.0
    ahead = turns - 1 if t.resident == 2 else 0
    waits -= min(1.0, waits) * ahead / turns  # what the first step of a tile needs is there
    if seg.residual and t.resident == 2:  # memory has little else to do meanwhile
        waits += late
    # Recomputed work, tensor padding apart.
    done = 0
    if seg.first:
        done += mid_pixels * seg.first.weights * recomputed
    if layer:
        done += out_pixels * layer.weights * recomputed
    if seg.project:
        done += out_pixels * seg.project.weights
    return Work(
        spatial * apart, spatial_blocks * apart, turns, busy, warps, steps, t.split,
        int(moved), fetched * (recomputed * inner + outer), seg.compulsory_bytes + padding, again, products,
        operands, values, loads, stores, factors, copied / 512 / warps, copied_weights / 512 / warps, tiles, places,
        fragments, adding, waiting, ends, end_values, accumulators(seg, t) * (1 - 1 / t.split),
        max(1.0, done / seg.multiply_adds), waits, late, waited,
        short=1 / t.tile_w if seg.passes and t.resident else 0.0, singles=singles, ahead=ahead, pooled=pooled,
    )  # fmt: skip


def _strip_work(seg: Segment, tile: Tile, sms: int) -> Work:
    """Its step is a patch; products and copies are none, loads are pixels of X."""
    t, layer, e, cut = tile, seg.depthwise, seg.element, tiling(seg, tile)
    assert layer
    blocks_n, together, own = ceil_div(seg.padded_out, block_n(seg, t)), strip.patches(seg, t), strip.words(seg, t)
    spatial = spatial_blocks = ceil_div(cut.tiles * seg.batch, together)
    busy = ceil_div(spatial * blocks_n, sms)
    if t.resident:
        spatial_blocks = min(spatial, max(1, sms * t.blocks // blocks_n))
        busy = min(busy, max(t.blocks, ceil_div(blocks_n, sms)))
    rows, columns = strip.area(seg, t)
    read = seg.batch * tiling(seg, replace(t, tile_h=rows, tile_w=columns)).x_pixels
    written, width = seg.output_elements // seg.c_out, min(block_n(seg, t), seg.c_in) * e
    moved = read * touched_bytes(seg.c_in, e, width) + written * touched_bytes(seg.c_out, e, width)
    inner, _ = packed_bytes(seg, t)
    if seg.residual:
        moved += e * seg.output_elements
    if seg.pool:
        moved += seg.batch * pool_rows(seg, t) * e * seg.c_out
    pixels = t.tile_h * t.tile_w
    pack = 2 if e == 2 else 1
    values = pixels * own * (layer.taps + pack * _ACTIVATION[layer.activation])
    if seg.pool:
        values += pixels * own * 2 * pack
    turns, dram = ceil_div(spatial, spatial_blocks), seg.compulsory_bytes + inner - e * seg.weight_elements
    return Work(
        pieces=spatial * blocks_n, grid=spatial_blocks * blocks_n, turns=turns, busy=busy, warps=t.threads // 32,
        steps=1, split=1, moved=int(moved), weights=spatial_blocks * inner, dram=dram, again=0, products=0.0,
        operands=0.0, values=values, loads=strip.vectors(seg, t), stores=pixels, factors=0.0, copies=0.0,
        weight_copies=layer.taps, tiles=0.0, places=0.0, fragments=0.0, adding=0.0, waiting=0.0,
        ends=pixels * own * (2.0 if seg.residual else 1.0), end_values=0.0, sums=0.0, recompute=1.0,
        waits=strip.waits(seg, t), rows=strip.rows(seg, t), words=own,
        narrow=touched_bytes(seg.c_in, e, width, LINE) / (seg.c_in * e) - 1,
    )  # fmt: skip


def _idle_us(w: Work, gpu: Gpu, blocks: int, others: int, priors: Priors) -> float:
    """Microseconds in which an SM asks memory for nothing, since all who do wait: `others` (with it) fill the gaps."""
    return ceil_div(w.busy, blocks) * w.turns * w.waits * priors.wait_clocks / others / gpu.clock_mhz


def _strip_times(
    seg: Segment, w: Work, gpu: Gpu, blocks: int, busiest: float, priors: Priors
) -> dict[str, float]:  # fmt: skip
    """Microseconds of each resource; the L1 cache takes 128 bytes a clock."""
    rounds = ceil_div(w.busy, blocks)  # all thread blocks take the same time
    patch = priors.strip_load_instructions * (w.loads + w.stores) + priors.strip_row_instructions * w.rows + w.values
    clocks = priors.strip_wait_clocks * w.waits + priors.clocks_per_instruction * patch
    issuing = w.warps if w.warps < 4 else round_up(w.warps, 4)
    wavefronts = w.turns * (w.loads + w.stores) * w.words + w.weight_copies * w.words
    dram_us, l2_us = memory_us(gpu, w.dram, priors.strip_served_share * w.moved, priors)
    idle = _idle_us(w, gpu, blocks, min(blocks, w.busy) * w.warps, priors)
    return {
        "memory": max(dram_us * (1 + priors.strip_narrow_share * w.narrow), l2_us) + idle,
        "instructions": busiest * issuing * (w.turns * patch + 2 * w.weight_copies) / 4 / gpu.clock_mhz,
        "l1": busiest * w.warps * wavefronts / gpu.clock_mhz,
        "latency": rounds * w.turns * clocks / gpu.clock_mhz,
        "dispatch": (w.busy - 1) * priors.strip_dispatch_clocks / gpu.clock_mhz,
    }


def times(
    seg: Segment, w: Work, gpu: Gpu, blocks: int, priors: Priors = PRIORS, *, room: int | None = None
) -> dict[str, float]:
    """Microseconds of each resource, where an SM holds `blocks` thread blocks for sure and has room for `room` (by
    default as many). Where that is more than its share, thread blocks are not shared out evenly: they start while those
    of the kernel in front end."""
    more = max(0, (blocks if room is None else room) - w.busy)
    busiest = w.busy + priors.uneven_blocks * min(priors.uneven_most, more)
    if seg.strip:
        return _strip_times(seg, w, gpu, blocks, busiest, priors)
    per_clock, per_us, on_tensor = _tensor_rates(seg, gpu, priors, w.operands > 0)
    rounds = ceil_div(w.busy, blocks)  # all thread blocks take the same time
    mhz = gpu.clock_mhz
    copies = 0 if seg.streams and seg.layers[0].kind == "pw" else w.copies  # of taps, each has an address of its own
    if gpu.sm < 90:  # from there on, one thread asks for a chunk's
        copies += w.weight_copies
    loading = priors.staged_instructions if seg.stem else priors.gather_instructions
    plain = w.values + w.loads + w.stores
    plain += priors.copy_instructions * copies + priors.factor_instructions * w.factors
    stored = priors.store_instructions * w.ends + w.end_values
    tile = w.steps * plain + (loading + priors.place_instructions * w.places / w.turns) * w.tiles + w.adding
    tile += stored + priors.pool_instructions * w.pooled + priors.sum_instructions * w.sums
    multiplying = 0.1 if w.operands else 1 if on_tensor else 33
    single = priors.element_instructions * w.singles
    issued = w.turns * (tile + single + w.steps * w.products * multiplying)
    step = priors.stream_warp_clocks * w.warps if seg.streams else priors.step_clocks + priors.warp_clocks * w.warps
    step += w.products * (priors.wgmma_clocks if w.operands else priors.product_clocks)
    step += priors.wgmma_wait_clocks * w.waited
    turn = w.waiting + w.steps * step + priors.clocks_per_instruction * tile + priors.fragment_clocks * w.fragments
    turn += w.late * priors.wait_clocks
    if w.split > 1:
        turn += priors.split_clocks
    following = (w.turns - 1) * (1 if seg.streams else priors.turn_share)
    latency = (priors.wgmma_block_clocks if w.operands else 0) + (1 + following) * turn
    if blocks == 1:  # with several, others go on while one is stored in any case
        latency -= w.ahead * priors.clocks_per_instruction * stored
    latency += 512 * w.warps * (w.copies + w.weight_copies) / priors.fill_bytes
    # Nothing fetches these ahead, and a thread waits for two at once.
    latency += w.turns * (priors.clocks_per_instruction * single + priors.wait_clocks * w.singles / 2)
    if seg.first and seg.depthwise:
        latency += priors.first_block_clocks
    issuing = w.warps if w.warps < 4 else round_up(w.warps, 4)  # an SM's 4 schedulers share a thread block's warps
    macs = 2048 if seg.element == 2 else 1024
    vectors = w.turns * (w.loads + w.stores + w.copies + w.operands) + (1 + w.ahead) * w.weight_copies
    memory = max(memory_us(gpu, dram_bytes(seg, w, gpu), w.moved, priors)) * (1 + priors.short_row_columns * w.short)
    tensor = w.warps * w.steps * w.products * max(busiest * w.turns / per_clock / mhz, w.pieces * macs / per_us)
    shared = busiest * w.warps * w.steps * 4 * vectors / mhz  # 4 wavefronts a vector
    if seg.streams and w.operands:  # tensor cores read while they multiply
        tensor, shared = max(tensor, shared), 0.0
    return {
        "memory": memory + _idle_us(w, gpu, blocks, min(blocks, w.busy), priors),
        "tensor": tensor,
        "instructions": busiest * issuing * issued / 4 / mhz,  # an SM issues 4 a clock
        "shared": shared,
        "latency": rounds * latency / mhz,
        "dispatch": w.busy * priors.dispatch_clocks / mhz,
    }


def joined(parts: dict[str, float], priors: Priors = PRIORS) -> float:
    """Microseconds of a module whose resources take `parts`."""
    total: float = sum(value**priors.overlap for value in parts.values()) ** (1 / priors.overlap)
    return priors.launch_us + total


def spare_registers(gpu: Gpu, priors: Priors = PRIORS) -> int:
    """Registers of a thread that are kept free below a bound."""
    return priors.spare_registers + (0 if gpu.sm == 90 else priors.untimed_registers)


def estimate(seg: Segment, tile: Tile, gpu: Gpu, priors: Priors = PRIORS, *, held: bool = True) -> Estimate | None:
    """What the segment costs with a tile; None where the tile does not fit the GPU. The compiler takes what registers
    the tile's `blocks` leave it; where it is not `held` to these, those that are estimated."""
    if (tile.split > 1 and gpu.sm < 90) or (tile.wgmma and gpu.sm != 90):
        return None
    shared, regs = shared_bytes(seg, tile), registers(seg, tile, gpu, priors)
    if regs + spare_registers(gpu, priors) > MAX_REGISTERS:
        return None
    warps = ceil_div(tile.blocks * tile.threads // 32, 4)  # of one of the SM's quarters
    bound = min(MAX_REGISTERS, gpu.registers_per_sm // (4 * 32 * warps) // 8 * 8)
    blocks = resident(seg, tile, gpu, shared, bound if held and not seg.gate else min(regs, bound))
    if not blocks:
        return None
    if seg.gate:
        return _estimate_gate(seg, tile, gpu, blocks, shared, priors)
    if seg.strip:
        taken = min(bound, strip.taken(seg, tile))
    else:  # a loop of products takes more than it needs, where it may
        taken = min(bound, regs + (priors.spare_registers if seg.streams and tile.wgmma else 0))
    room = resident(seg, tile, gpu, shared, taken)
    if tile.resident and tile.split == 1 and room > tile.blocks:  # they fill the GPU
        tile, blocks = replace(tile, blocks=room), max(blocks, room)
    done = work(seg, tile, gpu.sms)
    parts = times(seg, done, gpu, blocks, priors, room=room)
    return Estimate(
        time_us=joined(parts, priors),
        traffic_bytes=done.moved + done.weights,
        dram_bytes=dram_bytes(seg, done, gpu),
        shared_bytes=shared,
        registers=min(regs, bound),
        spilled=max(0, regs + spare_registers(gpu, priors) - priors.spare_registers - bound),
        resident=blocks,
        grid=done.grid,
        recompute=done.recompute,
        bound=max(parts, key=parts.__getitem__),
    )


def _estimate_gate(seg: Segment, tile: Tile, gpu: Gpu, blocks: int, shared: int, priors: Priors) -> Estimate:
    cost = gate.cost(seg, tile)
    busy = ceil_div(cost.grid, max(tile.split, cluster_sms(gpu.sms, tile.split)))
    dram_us, l2_us = memory_us(gpu, seg.compulsory_bytes, cost.moved + cost.weights, priors)
    parts = {
        "dram": dram_us,
        "l2": l2_us,
        "instructions": busy * cost.instructions / gpu.clock_mhz,
        "latency": ceil_div(busy, blocks) * cost.latency / gpu.clock_mhz,
    }
    return Estimate(
        joined(parts, priors), cost.moved + cost.weights, seg.compulsory_bytes, shared, gate.REGISTERS, 0, blocks,
        cost.grid, 1.0, max(parts, key=parts.__getitem__),
    )  # fmt: skip


SMS_OF_A_GROUP = 18  # at most: a GPC, in front of which requests for the same bytes meet
MERGED = 0.27, 0.45  # share of them that L2 still sends, at least: of resident weights, of what is streamed
HOME = 0.5  # chance that a byte's home is the half of L2 that does not belong to the SM that asks
ACROSS = 1.5  # times that a byte crosses between the halves, at most: more ask for it before it has come
LAUNCH_BYTES = 260e3  # of a launch, whatever it does
CODE_BYTES = 4e3  # of code, that an SM asks L2 for


class Served(NamedTuple):
    sms: int  # bytes that L2 sends to the SMs and takes from them
    all: int  # these, what one half of L2 asks of the other, and what a launch itself takes


def served_bytes(seg: Segment, tile: Tile, gpu: Gpu) -> Served:
    """What passes L2, which from compute capability 9.0 on is less than thread blocks ask for: requests of several SMs
    of a group for the same bytes at the same time are one to L2."""
    if seg.gate:
        own = gate.weights_bytes(seg, tile)  # of a thread block; those of a cluster read different ones
        of_gate = gate.cost(seg, tile)
        grid, moved, asked = of_gate.grid, of_gate.moved, [(own * tile.split, of_gate.grid // tile.split)]
    else:
        done, (inner, outer) = work(seg, tile, gpu.sms), packed_bytes(seg, tile)
        recomputed = ceil_div(seg.padded_out, block_n(seg, tile)) if seg.project else 1
        blocks = done.weights // (recomputed * inner + outer)
        grid, moved, asked = done.grid, done.moved, [(inner, blocks * recomputed), (outer, blocks)]
    written = seg.element * seg.output_elements * (2 if seg.residual else 1)
    x, touched = max(0, moved - written), seg.element * seg.input_elements
    groups = gpu.sms / SMS_OF_A_GROUP if gpu.sm >= 90 else float("inf")

    def sent(copies: int, least: float) -> float:
        # Thread blocks that follow one another start in different groups of SMs.
        return max(min(1.0, groups / copies), least if gpu.sm >= 90 else 1.0)

    def across(copies: float) -> float:
        return ACROSS - (ACROSS - HOME) / max(1.0, copies)

    same_x = tile.split if seg.gate else 1  # thread blocks that take the mean together: of a cluster, so of a group
    sms = min(moved, written) + x * (max(1 / same_x, MERGED[1]) if gpu.sm >= 90 else 1)
    sms += sum(bytes_ * copies * sent(copies, MERGED[0 if tile.weights_stay else 1]) for bytes_, copies in asked)
    crossing = HOME * written + touched * across(x / max(1, touched)) + sum(b * across(copies) for b, copies in asked)
    return Served(int(sms), int(sms + crossing + LAUNCH_BYTES + CODE_BYTES * min(grid, gpu.sms)))


class Stock(NamedTuple):
    """What stock does: time in microseconds, traffic in bytes."""

    time_us: float
    traffic_bytes: int


def stock(chain: Chain, index: int, gpu: Gpu, priors: Priors = PRIORS) -> Stock:
    """A layer as separate kernels: the convolution, then each activation and Add on its own."""
    layer = chain.layers[index]
    (out_h, out_w), element = chain.maps()[index + 1], 2 if chain.dtype == "float16" else 4
    plain = replace(layer, pool=False, mean=False, scaled=False, normed=False, whole=False)
    size = (1, 1) if layer.mean else chain.maps()[index]
    lone = segment(Chain((plain,), chain.batch, *size, chain.dtype), 0, 0)
    assert lone
    outputs = chain.batch * out_h * out_w * layer.out_channels
    traffic = element * (lone.input_elements + lone.weight_elements + outputs)
    tflops = gpu.tensor_fp16_tflops if chain.dtype == "float16" else gpu.tensor_tf32_tflops or gpu.fp32_tflops
    rate = tflops * 5e5 * priors.stock_tensor_share
    if layer.kind == "dw":
        rate = priors.stock_depthwise_rate * gpu.sms * gpu.clock_mhz
    memory = max(memory_us(gpu, traffic, traffic, priors)) / priors.stock_dense_share
    compute = lone.multiply_adds / rate
    # Dense ones change the layout before and after what tensor cores do, in kernels of their own.
    time = priors.stock_conv_us + (max(memory, compute) if layer.kind == "dw" else memory + compute)
    for number in range(layer.activation_nodes):
        reads = 2 if layer.residual and number == layer.activation_nodes - 1 else 1
        moved = element * outputs * (reads + 1)
        traffic += moved
        time += _elementwise_us(moved, gpu, priors, priors.stock_elementwise_share)
    height, width = chain.maps()[index]
    inputs = chain.batch * height * width * layer.in_channels
    if layer.scaled or layer.normed:
        moved = 2 * element * inputs
        traffic += moved
        time += _elementwise_us(moved, gpu, priors, priors.stock_elementwise_share)
    if layer.mean:
        pool = stock_mean(chain, index, gpu, priors)
        traffic += pool.traffic_bytes
        time += pool.time_us
    return Stock(time, traffic)


def stock_mean(chain: Chain, index: int, gpu: Gpu, priors: Priors = PRIORS) -> Stock:
    """The mean of the input of layer `index` over its map, as a kernel of its own."""
    height, width = chain.maps()[index]
    moved = chain.batch * height * width * chain.layers[index].in_channels * (2 if chain.dtype == "float16" else 4)
    return Stock(_elementwise_us(moved, gpu, priors, priors.stock_elementwise_share), moved)


def layout_change(chain: Chain, index: int, gpu: Gpu, priors: Priors = PRIORS) -> Stock:
    """A layout change of the input of layer `index`, between stock (NCHW) and a module (NHWC)."""
    height, width = chain.maps()[index]
    elements = chain.batch * height * width * chain.layers[index].in_channels
    moved = 2 * elements * (2 if chain.dtype == "float16" else 4)
    return Stock(_elementwise_us(moved, gpu, priors, priors.stock_layout_share), moved)


def _elementwise_us(moved: int, gpu: Gpu, priors: Priors, share: float) -> float:
    return priors.stock_elementwise_us + max(memory_us(gpu, moved, moved, priors)) / share
