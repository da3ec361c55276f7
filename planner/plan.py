"""The choice: legal tiles of each segment of a chain, and the segmentation with the least time or traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from . import gate, strip
from .chain import Chain, Layer, PlannerError, Tile, ceil_div, round_up
from .cost import (
    MAX_REGISTERS,
    PRIORS,
    Estimate,
    Priors,
    Segment,
    Stock,
    block_n,
    estimate,
    illegal,
    layout_change,
    registers,
    resident,
    segment,
    shared_bytes,
    spare_registers,
    stock,
    stock_mean,
    tiling,
)
from .gpus import Gpu
from .gpus import gpu as gpu_by_name

OBJECTIVES = ("time", "traffic")


@dataclass(frozen=True)
class Module:
    """Layers first..last (indices into the chain, inclusive) as one kernel."""

    first: int
    last: int
    # The stages in capitals; PWDW_R: PWDW on tiles with halo, not on whole maps. MEAN+ or SCALE+ in front and +POOL
    # behind: the parts of a squeeze-and-excite. NORM+: with a LayerNormalization in front.
    variant: str
    tile: Tile
    traffic_bytes: int  # between the SMs and L2
    dram_bytes: int  # from and to device memory, L2 cold at the start
    time_us: float
    shared_bytes: int  # of a thread block
    registers: int  # of a thread
    occupancy: float  # resident threads over the threads an SM can hold
    recompute: float  # multiply-adds done over multiply-adds needed
    bound: str  # the resource that takes longest


@dataclass(frozen=True)
class Skip:
    """A layer (index into the chain) left to stock, and why."""

    layer: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of every layer of a chain: in one of `modules`, or in `skips`. Before: all layers as stock runs
    them; after: the modules, stock for the rest, and layout changes between the two."""

    chain: Chain
    gpu: Gpu
    modules: tuple[Module, ...]
    skips: tuple[Skip, ...]
    traffic_before: int
    traffic_after: int
    time_before_us: float
    time_after_us: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; tiles as `key=value` text."""
        data = asdict(replace(self, gpu=replace(self.gpu, sources={})))
        del data["gpu"]["sources"]
        for module, entry in zip(self.modules, data["modules"], strict=True):
            entry["tile"] = str(module.tile)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan of to_dict(), perhaps edited by hand (a GPU may be just a name); PlannerError if it is not one, or
        if its modules overlap or are none that the kernels can run."""
        try:
            chain = Chain(**{**data["chain"], "layers": tuple(Layer(**layer) for layer in data["chain"]["layers"])})
            gpu = gpu_by_name(data["gpu"]) if isinstance(data["gpu"], str) else Gpu(**data["gpu"])
            modules = tuple(Module(**{**entry, "tile": Tile.parse(entry["tile"])}) for entry in data["modules"])
            skips = tuple(Skip(**entry) for entry in data["skips"])
            plan = cls(**{**data, "chain": chain, "gpu": gpu, "modules": modules, "skips": skips})
            plan.check()
        except (TypeError, KeyError, AttributeError) as error:
            raise PlannerError(f"not a plan: {error}") from None
        return plan

    def check(self) -> None:
        """PlannerError unless every layer is in one module or skip, and every module is one the kernels can run."""
        covered = [skip.layer for skip in self.skips]
        for module in self.modules:
            covered += range(module.first, module.last + 1)
            name = f"plan of chain '{self.chain.name}': module of layers {module.first} to {module.last}"
            if not 0 <= module.first <= module.last < len(self.chain.layers):
                raise PlannerError(f"{name}: no such layers")
            seg = segment(self.chain, module.first, module.last)
            if seg is None:
                raise PlannerError(f"{name}: no kernel computes these layers in one")
            if why := illegal(seg, module.tile):
                raise PlannerError(f"{name}: tile '{module.tile}': {why}")
            if estimate(seg, module.tile, self.gpu) is None:
                raise PlannerError(f"{name}: tile '{module.tile}' does not fit {self.gpu.name}")
        if sorted(covered) != list(range(len(self.chain.layers))):
            raise PlannerError(f"plan of chain '{self.chain.name}': every layer must be in one module or skip")


# ---- Tiles -----------------------------------------------------------------------------------------------------------


def _lengths(out: int, even: bool) -> list[int]:
    """Tile lengths for an axis of `out` pixels: those that waste at most a fifth of the last tile, and the whole
    axis."""
    lengths = set()
    for length in (1, 2, 4, 7, 8, 10, 12, 14, 16, 20, 28, 32, out):
        length = round_up(min(length, out), 2 if even else 1)
        if length >= out or (ceil_div(out, length) * length <= 1.2 * out and length > 1):
            lengths.add(length)
    return sorted(lengths)


def _spatial(seg: Segment, least_filled: float, wgmma: int = 0) -> Iterator[Tile]:
    """Tiles without their channel fields, of which at least a share of the lanes has a pixel. Warps along pixels: as
    few as cover the tile."""
    out_h, out_w = seg.maps[-1]
    if not seg.depthwise:
        for patch_h in (1, 2, 4):
            warpgroups = (4, 8, 12) if seg.streams and patch_h == 1 and seg.middle_channels >= DEEP else (4, 8)
            for warps_m in warpgroups if wgmma else (1, 2, 4, 8):
                pixels = 16 * patch_h * warps_m
                if pixels <= 16 or pixels < 2 * seg.batch * out_h * out_w:
                    yield Tile(tile_h=1, tile_w=pixels, patch_h=patch_h, warps_m=warps_m, wgmma=wgmma)
        return
    widths = _lengths(out_w, True)
    for patch_h in (1, 2, 4, *((7,) if out_h % 7 == 0 else ())):
        for tile_h in sorted({round_up(height, patch_h) for height in _lengths(out_h, False)}):
            for tile_w in widths:
                whole = tile_h >= out_h and tile_w >= out_w
                if tile_w < widths[-1] and not tile_h <= 4 * tile_w <= 16 * tile_h:
                    continue  # long tiles have more halo, but for bands of whole rows
                patches = tile_h // patch_h * tile_w // 2
                for images in (1, 2, 4, 8) if whole and not (seg.pool and patches % 8) else (1,):
                    warps_m = round_up(ceil_div(images * patches, 8), 4 if wgmma else 1)
                    if warps_m > MAX_WARPS or images >= 2 * seg.batch:
                        break
                    filled = images * min(out_h, tile_h) * min(out_w, tile_w) / (16 * patch_h * warps_m)
                    if filled >= least_filled or (whole and images == 1 and patch_h == 1):
                        yield Tile(tile_h, tile_w, images, patch_h, warps_m=warps_m, wgmma=wgmma)


MAX_WARPS = 8  # of a thread block: beyond, barriers cost more than weights read once less
MAX_WGMMA_WARPS = 12  # where four multiply at once
MAX_GROUPS = 12  # of a chunk
DEEP = 256  # channels in from which on 12 warps along pixels are tried: a shorter loop hides less
WIDE = 192  # channels from which on 12 are tried: an SM holds no second thread block of so many


def _groups_of_a_chunk(seg: Segment) -> list[int]:
    """Groups of channels that a step may have: few, which leave room, and where nothing is computed in between, those
    of a few equal steps, whose waits are as many."""
    groups = seg.middle_groups
    if seg.first or seg.depthwise:  # three take longer than estimated in float32
        return [n for n in ((1, 2, 3, 4) if seg.element == 2 else (1, 2, 4)) if n == 1 or n <= groups]
    equal = {ceil_div(groups, steps) for steps in range(1, 9)}
    return sorted({1} | {n for n in (2, 3, 4) if n <= groups} | {n for n in equal if n <= MAX_GROUPS})


def _tiles(seg: Segment, gpu: Gpu, least_filled: float) -> Iterator[Tile]:
    """The tiles worth estimating, legal but for what the GPU holds. More SMs only ever add tiles."""
    if seg.gate:
        yield from gate.tiles(seg, gpu)
        return
    if seg.mean:
        yield from _mean_tiles(seg, gpu)
        return
    if seg.strip:
        yield from strip.tiles(seg)
        return
    group, padded = seg.group, seg.padded_out
    chunks = [n * group for n in _groups_of_a_chunk(seg)]
    cuts = sorted({round_up(ceil_div(padded, n), group) for n in (1, 2, 3, 4, 6, 8)}, reverse=True)
    products = (0, 1) if gpu.sm == 90 else (0,)  # of a warp, or of four
    for base in (base for wgmma in products for base in _spatial(seg, least_filled, wgmma)):
        if seg.depthwise:
            grid = tiling(seg, base).tiles * ceil_div(seg.batch, base.images)
        else:
            grid = ceil_div(seg.batch * seg.maps[-1][0] * seg.maps[-1][1], base.tile_w)
        few = grid < 2 * gpu.sms  # thread blocks, unless channels are shared out as well
        most = MAX_WGMMA_WARPS if base.wgmma else MAX_WARPS
        for chunk in chunks:
            if not seg.project:
                steps = ceil_div(seg.middle_groups * group, chunk)
                for cut in sorted({chunk * ceil_div(steps, n) for n in (1, 2, 4, 8, 16, 32)}, reverse=True):
                    tile = replace(base, chunk=chunk, block_n=0 if cut >= padded else cut)
                    if not illegal(seg, tile):
                        yield tile
                continue
            for warps_n in (1, 2, 3, 4):
                if chunk // group % warps_n or base.warps_m * warps_n > most:
                    continue
                legal = 0
                for cut in cuts:
                    if legal == 2 and not few:
                        break
                    for split in (1, 2, 4, 8) if few and gpu.sm >= 90 else (1,):
                        tile = Tile(
                            base.tile_h, base.tile_w, base.images, base.patch_h, chunk, base.warps_m, warps_n,
                            0 if cut >= padded else cut, split, wgmma=base.wgmma,
                        )  # fmt: skip
                        if illegal(seg, tile) or (base.warps_m > MAX_WARPS and block_n(seg, tile) < WIDE):
                            break
                        legal += split == 1
                        yield tile


def _mean_tiles(seg: Segment, gpu: Gpu) -> Iterator[Tile]:
    """Of a lone pointwise on a mean: many warps, since they share its sums; each of warps_n has a group of channels."""
    for images, warps_n in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        if images >= 2 * seg.batch:
            break
        warps_m = max(MAX_WARPS // warps_n, ceil_div(images, 16))
        for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            cut = round_up(ceil_div(seg.padded_out, n), seg.group)
            if cut < warps_n * seg.group and warps_n > 1:
                break
            for split in (1, 2, 4, 8) if gpu.sm >= 90 else (1,):
                for groups in sorted({1, 2, ceil_div(seg.middle_groups, split)}):
                    chunk, channels = groups * seg.group, 0 if cut >= seg.padded_out else cut
                    tile = Tile(1, 1, images, 1, chunk, warps_m, warps_n, channels, split)
                    if not illegal(seg, tile):
                        yield tile


def order(seg: Segment, tile: Tile, cost: Estimate, objective: str = "time") -> tuple[float, float, bool]:
    """By which tiles of a segment are ranked, the least first."""
    # Of equal tiles, that whose weights, if they are many, have all been asked for when the kernel in front ends.
    late = not seg.gate and (seg.project is None) == tile.weights_stay
    if objective == "traffic":
        return cost.traffic_bytes, cost.time_us, late
    return cost.time_us, cost.traffic_bytes, late


@lru_cache(maxsize=4096)
def _ranked(seg: Segment, gpu: Gpu, objective: str, priors: Priors, limit: int) -> tuple[tuple[Tile, Estimate], ...]:
    """The best tiles of a segment with their estimates, best first."""
    found: list[tuple[Tile, Estimate]] = []
    for least_filled in (0.55, 0.0):  # tiles that leave most lanes idle only where nothing else fits
        if not found:
            for tile in _tiles(seg, gpu, least_filled):
                cost = estimate(seg, tile, gpu, priors, held=False)
                if not cost and not (tile.resident or seg.gate or seg.strip):
                    tile = replace(tile, resident=1)  # weights that lie there once may leave the room
                    cost = estimate(seg, tile, gpu, priors, held=False)
                if cost:
                    found.append((tile, cost))

    def key(item: tuple[Tile, Estimate]) -> tuple[float, float, bool]:
        return order(seg, *item, objective)

    if seg.gate:
        return tuple(sorted(found, key=key)[: limit or None])
    enough = NEAR * min((cost.time_us for _, cost in found), default=0.0)
    held: list[tuple[Tile, Estimate]] = []
    far: list[tuple[Tile, Estimate]] = []
    for tile, cost in found:
        if cost.time_us < enough or objective == "traffic":
            held += _variants(seg, tile, gpu, cost.grid, priors)
        else:
            far.append((tile, cost))
    if not limit or len(held) < limit:
        held += ((_held(seg, tile, gpu, cost.grid, 0, priors), cost) for tile, cost in far)
    return tuple(sorted(held, key=key)[: limit or None])


NEAR = 1.5  # times the best's time: tiles that near are tried in variants too, of which none saves a third


def _held(seg: Segment, tile: Tile, gpu: Gpu, grid: int, more: int, priors: Priors) -> Tile:
    """The tile with the thread blocks an SM should hold: as many as registers surely allow, and `more`, but no more
    than there are in a grid that is not resident."""
    needed = min(MAX_REGISTERS, registers(seg, tile, gpu, priors) + spare_registers(gpu, priors))
    roomy = resident(seg, tile, gpu, shared_bytes(seg, tile), needed) + more
    return replace(tile, blocks=max(1, min(roomy, ceil_div(grid, gpu.sms), 2048 // tile.threads)))


def _variants(seg: Segment, tile: Tile, gpu: Gpu, grid: int, priors: Priors) -> Iterator[tuple[Tile, Estimate]]:
    """The tile with and without resident weights, and either with one more thread block an SM, where nothing spills for
    it; and with weights that go by, which pays for several tiles of a thread block that is alone on its SM."""
    tried = set()
    for keeps, more in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
        variant = replace(tile, resident=keeps, blocks=1)
        if keeps == 2 and (illegal(seg, variant) or tile.chunk >= seg.middle_channels):  # one step: none was timed
            continue
        variant = _held(seg, variant, gpu, grid, more, priors)
        cost = None if variant in tried else estimate(seg, variant, gpu, priors)
        tried.add(variant)
        pays = keeps < 2 or (cost and cost.resident == 1 and cost.grid < grid)
        if cost and cost.resident >= variant.blocks and not cost.spilled and pays:
            yield variant, cost


def _module(seg: Segment, first: int, last: int, gpu: Gpu, tile: Tile, cost: Estimate) -> Module:
    variant = "".join(layer.kind for layer in seg.layers[: last - first + 1]).upper()
    out_h, out_w = seg.maps[-1]
    if variant == "PWDW" and (tile.tile_h < out_h or tile.tile_w < out_w):
        variant = "PWDW_R"
    variant = "MEAN+" * seg.mean + "SCALE+" * seg.scaled + "NORM+" * seg.normed + variant + "+POOL" * seg.pool
    return Module(
        first=first,
        last=last,
        variant=variant,
        tile=tile,
        traffic_bytes=cost.traffic_bytes,
        dram_bytes=cost.dram_bytes,
        time_us=cost.time_us,
        shared_bytes=cost.shared_bytes,
        registers=cost.registers,
        occupancy=cost.resident * tile.threads / gpu.max_threads_per_sm,
        recompute=cost.recompute,
        bound=cost.bound,
    )


def candidates(
    chain: Chain, gpu: Gpu, first: int, last: int, objective: str = "time", limit: int = 0, priors: Priors = PRIORS
) -> list[Module]:
    """The modules of layers first..last, one a tile, best first; at most `limit` (0: all that were estimated). Empty
    where no kernel computes these layers in one, or no tile fits the GPU."""
    seg = segment(chain, first, last)
    if seg is None:
        return []
    return [_module(seg, first, last, gpu, *item) for item in _ranked(seg, gpu, objective, priors, limit)]


def module_of(chain: Chain, gpu: Gpu, first: int, last: int, tile: Tile, priors: Priors = PRIORS) -> Module | None:
    """The module of layers first..last with a given tile, as estimated; None where that is none or does not fit."""
    seg = segment(chain, first, last)
    cost = None if seg is None or illegal(seg, tile) else estimate(seg, tile, gpu, priors)
    return _module(seg, first, last, gpu, tile, cost) if seg and cost else None


# ---- The choice ------------------------------------------------------------------------------------------------------

MAX_STAGES = 3
NCHW_MODULE = 0.5  # of a layout change: what a module pays for writing [N, C, H, W] itself


def plan_chain(
    chain: Chain,
    gpu: Gpu,
    objective: str = "time",
    priors: Priors = PRIORS,
    modules_of: Callable[[int, int], Sequence[Module]] | None = None,
) -> Plan:
    """The segmentation of the chain into modules and layers left to stock, of least estimated time (or traffic).

    modules_of(first, last): the modules to choose from for these layers, of which the first is taken, with measured
    times perhaps; by default the best candidate.

    A dynamic programme over the layers: best[i][k] is the least cost of layers 0..i-1 when the last of them is stock's
    (k = 0) or a module's (k = 1); going from one to the other changes the layout.
    """
    if objective not in OBJECTIVES:
        raise PlannerError(f"objective '{objective}' is none of {', '.join(OBJECTIVES)}")

    def key(time_us: float, traffic: float) -> tuple[float, float]:
        return (time_us, traffic) if objective == "time" else (traffic, time_us)

    def add(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        return a[0] + b[0], a[1] + b[1]

    def best_candidate(first: int, last: int) -> Sequence[Module]:
        return candidates(chain, gpu, first, last, objective, 1, priors)

    modules_of = modules_of or best_candidate
    count = len(chain.layers)
    alone = [stock(chain, i, gpu, priors) for i in range(count)]
    doubted = [Stock(cost.time_us * priors.stock_doubt, cost.traffic_bytes) for cost in alone]
    changes = [layout_change(chain, i, gpu, priors) for i in range(count)]
    if chain.layers[0].whole:  # a pool of stock's makes the module in front write [N, C, H, W]
        doubted[0] = doubted[0]._replace(time_us=doubted[0].time_us + NCHW_MODULE * changes[0].time_us)
    infinite = (float("inf"), float("inf"))
    best = [[infinite, infinite] for _ in range(count + 1)]
    best[0] = [(0.0, 0.0), (0.0, 0.0)]
    came: dict[tuple[int, int], tuple[int, int, Module | None]] = {}

    def offer(start: int, end: int, kind: int, cost: tuple[float, float], module: Module | None) -> None:
        for before in (kind, 1 - kind):  # ties go to no layout change
            total = add(best[start][before], cost)
            if before != kind and start:
                total = add(total, key(*changes[start]))
            if total < best[end][kind]:
                best[end][kind] = total
                came[end, kind] = start, before, module

    for start in range(count):
        offer(start, start + 1, 0, key(*doubted[start]), None)
        for last in range(start, min(start + MAX_STAGES, count)):
            for module in modules_of(start, last)[:1]:
                offer(start, last + 1, 1, key(module.time_us + priors.module_us, module.traffic_bytes), module)

    modules: list[Module] = []
    skips: list[Skip] = []
    end, kind = count, min((0, 1), key=lambda k: best[count][k])
    time, traffic = best[count][kind] if objective == "time" else best[count][kind][::-1]
    while end:
        start, before, chosen = came[end, kind]
        if chosen:
            modules.append(chosen)
        else:
            around = changes[start : start + 2]
            skips.append(Skip(start, _reason(modules_of(start, start), gpu, objective, alone[start], around)))
            time -= doubted[start].time_us - alone[start].time_us
        end, kind = start, before
    return Plan(
        chain=chain,
        gpu=gpu,
        modules=tuple(reversed(modules)),
        skips=tuple(reversed(skips)),
        traffic_before=sum(cost.traffic_bytes for cost in alone),
        traffic_after=int(traffic),
        time_before_us=sum(cost.time_us for cost in alone),
        time_after_us=time,
    )


def folds_mean(chain: Chain, gpu: Gpu, objective: str = "time", priors: Priors = PRIORS) -> bool:
    """Whether the first layer should take the mean of its input itself, rather than read what a kernel of stock's
    makes."""
    plain = replace(chain.layers[0], mean=False, whole=False)
    apart = plan_chain(replace(chain, layers=(plain, *chain.layers[1:]), height=1, width=1), gpu, objective, priors)
    pool, plan = stock_mean(chain, 0, gpu, priors), plan_chain(chain, gpu, objective, priors)
    if objective == "traffic":
        return plan.traffic_after <= apart.traffic_after + pool.traffic_bytes
    layout = NCHW_MODULE * layout_change(chain, 0, gpu, priors).time_us
    return plan.time_after_us <= apart.time_after_us + pool.time_us + layout


def _reason(fused: Sequence[Module], gpu: Gpu, objective: str, alone: Stock, changes: Sequence[Stock]) -> str:
    if not fused:
        return f"no tile of this layer fits {gpu.name}"
    layout = Stock(sum(change.time_us for change in changes), sum(change.traffic_bytes for change in changes))

    def cost(item: Module | Stock) -> str:
        return f"{item.time_us:.1f} us" if objective == "time" else f"{item.traffic_bytes} bytes"

    module = fused[0]
    pays = module.time_us <= alone.time_us if objective == "time" else module.traffic_bytes <= alone.traffic_bytes
    more = f" and up to {cost(layout)} to change the layout around it" if pays else ""
    return f"fusion does not pay here: {cost(module)} fused{more}, {cost(alone)} stock"
