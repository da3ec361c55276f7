"""Choose tiles, and what to fuse, by measuring on the GPU present.

The planner's best tiles of every segment of every chain are compiled in parallel and measured one at a time, then
variations of the best measured. The most promising come first: those of the estimated plan, then by how much slower
the plan would be with them. The planner's dynamic programme then chooses with measured times.
"""

from __future__ import annotations

import heapq
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

from ort_fcm.device import present_gpu
from ort_fcm.errors import FcmError
from ort_fcm.library import measure_module
from ort_fcm.planner import Chain, Gpu, Layer, Module, Plan, PlannerError, Tile, candidates, module_of, plan_chain
from ort_fcm.planner import gpu as gpu_by_name
from ort_fcm.planner.chain import STEM_CHANNELS
from ort_fcm.planner.cost import Segment, estimate, illegal, segment
from ort_fcm.planner.gate import rows

LIMIT = 12  # tiles of a segment that are measured first
RANKED = 400  # of the planner's ranking, that these are chosen from
FLIPPED = 3  # of them, that are also tried with weights held the other way
BRIBE = 1e6  # microseconds that no plan can resist
AFTER_CHOSEN = 0.01  # of any other tile: the planner's choices come first
REFINED = 2  # the best measured, of which variations are tried
REFINED_PRIORITY = 0.25  # these come as if they made their module so much slower than estimated
PARAMETERS = {"clip": (0.0, 6.0), "hardsigmoid": (1 / 6, 0.5), "leakyrelu": (0.1, 0.0)}

# Microseconds of a module, given its description for the library and the shape of X; FcmError where it cannot run.
Measure = Callable[[str, tuple[int, int, int, int]], float]
# A module's place: layers first..last of a chain.
Place = tuple[Chain, int, int]


def describe(seg: Segment, tile: Tile, gpu: Gpu) -> str:
    """The segment with a tile in the words of `ort_fcm.library.kernel_source`, as it runs on the GPU."""

    def words(values: Iterable[object]) -> str:
        return " ".join(map(str, values))

    layers: tuple[Layer, ...] = seg.layers[:1] if seg.alone else seg.layers
    single = "tf32" if gpu.tensor_tf32_tflops else "float32"
    lines = {
        "stages": "conv" if seg.alone else seg.stages,
        "kernel_shape": words(n for layer in layers for n in layer.kernel),
        "strides": words(n for layer in layers for n in layer.stride),
        "dilations": words(n for layer in layers for n in layer.dilation),
        "pads": words(n for layer in layers for n in layer.pads),
        "activations": ",".join(layer.activation for layer in layers),
        "activation_params": words(n for layer in layers for n in PARAMETERS.get(layer.activation, (0.0, 0.0))),
        "input_layout": "NCHW" if reads_nchw(seg) else "NHWC",
        "tile": str(tile),
        "channels": words([seg.c_in, *(layer.out_channels for layer in layers)]),
        "residual": int(seg.residual),
        "pool": int(seg.pool),
        "scaled": int(seg.scaled),
        "norm_epsilon": 1e-6 if seg.normed else 0,
        "type": "float16" if seg.dtype == "float16" else single,
    }
    return "\n".join(f"{name}={value}" for name, value in lines.items())


def reads_nchw(seg: Segment) -> bool:
    return bool(seg.layers[0].kind == "conv" and seg.c_in <= STEM_CHANNELS)


def x_shape(seg: Segment) -> tuple[int, int, int, int]:
    if reads_nchw(seg):
        return seg.batch, seg.c_in, seg.height, seg.width
    if seg.mean:
        return seg.batch, rows(seg), 1, seg.c_in
    return seg.batch, seg.height, seg.width, seg.c_in


def gpu_to_tune_for(name: str | None) -> Gpu:
    """The GPU present, whose figures may come from a TOML file. FcmError if there is none, if the planner does not know
    it, or if `name` is another."""
    present = present_gpu()
    if present is None:
        raise FcmError("tuning measures on a GPU, and there is none here: rewrite without it, or where there is one")
    try:
        gpu = gpu_by_name(name or present)
        if name is None or name.lower().endswith(".toml") or gpu_by_name(present) == gpu:
            return gpu
    except PlannerError as error:
        raise FcmError(str(error)) from None
    raise FcmError(f"tuning measures on the GPU present, {present}, not on {gpu.name}")


@dataclass
class Tuner:
    """Measured times, of every chain that `tune` was given. seconds: from its creation until nothing more is begun;
    measure, workers, clock: how a module is measured, by how many threads, and what tells seconds."""

    gpu: Gpu
    seconds: float = 60.0
    measure: Measure = measure_module
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    clock: Callable[[], float] = time.monotonic
    times: dict[Segment, dict[Tile, float]] = field(default_factory=dict)  # microseconds
    _started: float = field(init=False)
    _slowest: float = field(init=False, default=0.0)
    _failure: FcmError | None = field(init=False, default=None)
    _ratios: list[float] = field(init=False, default_factory=list)  # measured over estimated

    def __post_init__(self) -> None:
        self._started = self.clock()

    def tune(self, chains: Sequence[Chain]) -> None:
        """Measure what the chains may become, as far as time allows. FcmError if no module at all could run."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        queue = _Queue(self)
        for chain in chains:
            queue.add_chain(chain)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"Measuring tiles, {self.seconds:.0f} s at most", total=len(queue))
            for done, total in self._run(queue):
                progress.update(task, completed=done, total=total)
        if self._failure and not any(self.times.values()):
            raise FcmError(f"no module could be measured: {self._failure}")

    def _run(self, queue: _Queue) -> Iterator[tuple[int, int]]:
        """Work off the queue; yields how many jobs are done, of how many."""
        running: dict[Future[tuple[float | FcmError, float]], _Job] = {}
        done = 0
        with ThreadPoolExecutor(self.workers) as pool:
            while True:
                late = self.clock() - self._started + self._slowest > self.seconds
                while not late and len(queue) and len(running) < self.workers:
                    job = queue.take()
                    running[pool.submit(self._timed, describe(job.seg, job.tile, self.gpu), x_shape(job.seg))] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, (result, took) = running.pop(future), future.result()
                    self._slowest = max(self._slowest, took)
                    if isinstance(result, FcmError):
                        self._failure = self._failure or result
                    else:
                        self.times.setdefault(job.seg, {})[job.tile] = result
                        self._ratios.append(result / job.estimate_us)
                    queue.finished(job)
                    done += 1
                yield done, done + len(running) + len(queue)

    def _timed(self, description: str, shape: tuple[int, int, int, int]) -> tuple[float | FcmError, float]:
        started = self.clock()
        result: float | FcmError
        try:
            result = self.measure(description, shape)
        except FcmError as error:
            result = error
        return result, self.clock() - started

    def is_measured(self, chain: Chain, module: Module) -> bool:
        """Whether the time of the plan's module is measured rather than estimated."""
        return segment(chain, module.first, module.last) in self.times

    def plan(self, chain: Chain) -> Plan:
        """The chain's fastest segmentation. Segments that time did not allow to measure have the planner's estimate,
        times what measured ones take over theirs."""
        scale = statistics.median(self._ratios) if self._ratios else 1.0

        def modules_of(first: int, last: int) -> list[Module]:
            measured = self.times.get(segment(chain, first, last))
            if measured:
                tile = min(measured, key=measured.__getitem__)
                module = module_of(chain, self.gpu, first, last, tile)
                return [replace(module, time_us=measured[tile])] if module else []
            best = candidates(chain, self.gpu, first, last, limit=RANKED)
            return [replace(module, time_us=module.time_us * scale) for module in best[:1]]

        return plan_chain(chain, self.gpu, modules_of=modules_of)


@dataclass(frozen=True)
class _Job:
    seg: Segment
    tile: Tile
    estimate_us: float
    place: Place
    priority: float  # of the segment


class _Queue:
    """Tiles to measure, most promising first. Equal segments are taken once."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner
        self.heap: list[tuple[float, int, _Job]] = []
        self.order = itertools.count()
        self.seen: set[tuple[Segment, Tile]] = {(seg, tile) for seg, tiles in tuner.times.items() for tile in tiles}
        self.waiting: Counter[Segment] = Counter()  # tiles of the first round
        self.refined: set[Segment] = set(tuner.times)

    def __len__(self) -> int:
        return len(self.heap)

    def take(self) -> _Job:
        return heapq.heappop(self.heap)[2]

    def _add(self, place: Place, seg: Segment, module: Module, priority: float, penalty: float) -> None:
        if (seg, module.tile) not in self.seen:
            self.seen.add((seg, module.tile))
            self.waiting[seg] += 1
            job = _Job(seg, module.tile, module.time_us, place, priority)
            heapq.heappush(self.heap, (priority + penalty, next(self.order), job))

    def add_chain(self, chain: Chain) -> None:
        gpu, count = self.tuner.gpu, len(chain.layers)
        places = {
            (first, last): ranked
            for first in range(count)
            for last in range(first, count)
            if segment(chain, first, last) and (ranked := candidates(chain, gpu, first, last, limit=RANKED))
        }

        def time_of_plan(bribed: tuple[int, int] | None = None) -> float:
            """Microseconds of the best plan; of those that have one module, if it is offered for next to nothing."""

            def modules_of(first: int, last: int) -> list[Module]:
                best = places.get((first, last), [])[:1]
                return [replace(best[0], time_us=best[0].time_us - BRIBE)] if (first, last) == bribed else best

            return float(plan_chain(chain, gpu, modules_of=modules_of).time_after_us) + (BRIBE if bribed else 0.0)

        least = time_of_plan()
        for (first, last), ranked in places.items():
            seg = segment(chain, first, last)
            if seg in self.waiting or seg in self.refined:
                continue
            best = ranked[0].time_us
            # Slower by this much, relative to the module itself, would be the best plan that has it.
            priority = (time_of_plan((first, last)) - least) / best
            for i, module in enumerate(diverse(ranked, LIMIT)):
                later = AFTER_CHOSEN if i else 0.0
                self._add((chain, first, last), seg, module, priority, module.time_us / best - 1 + later)
                tile = flipped(seg, module.tile, gpu) if i < FLIPPED else None
                if tile and (other := module_of(chain, gpu, first, last, tile)):
                    self._add((chain, first, last), seg, other, priority, module.time_us / best - 1 + AFTER_CHOSEN)

    def finished(self, job: _Job) -> None:
        """After the last of a segment's first round, variations of its best follow."""
        self.waiting[job.seg] -= 1
        if self.waiting[job.seg] or job.seg in self.refined:
            return
        self.refined.add(job.seg)
        measured = self.tuner.times.get(job.seg, {})
        for tile in sorted(measured, key=measured.__getitem__)[:REFINED]:
            for other in variations(job.seg, tile, self.tuner.gpu):
                if module := module_of(job.place[0], self.tuner.gpu, *job.place[1:], other):
                    self._add(job.place, job.seg, module, job.priority, REFINED_PRIORITY)


def diverse(ranked: Sequence[Module], limit: int) -> list[Module]:
    """The best of the ranking, but of those of one shape only two, and of those that cut channels alike a third."""
    shapes: Counter[object] = Counter()
    cuts: Counter[object] = Counter()
    chosen: list[int] = []
    for i, module in enumerate(ranked):
        t = module.tile
        shape = (*sorted((t.tile_h, t.tile_w)), t.images, t.patch_h)
        cut = (t.chunk, t.warps_n, t.block_n, t.split, t.resident)
        if shapes[shape] < 2 and cuts[cut] < max(1, limit // 3) and len(chosen) < limit:
            shapes[shape] += 1
            cuts[cut] += 1
            chosen.append(i)
    rest = sorted(set(range(len(ranked))) - set(chosen))
    return [ranked[i] for i in sorted(chosen + rest[: limit - len(chosen)])]


def resident(seg: Segment, tile: Tile, gpu: Gpu) -> Tile | None:
    """The tile with all weights in shared memory and as many thread blocks as an SM really holds; None where they do
    not fit."""
    for blocks in range(2048 // tile.threads, 0, -1):
        other = replace(tile, resident=1, blocks=blocks)
        cost = None if illegal(seg, other) else estimate(seg, other, gpu)
        if cost is None or cost.resident < blocks:
            continue
        if blocks == 1 or cost.registers * other.threads * blocks <= gpu.registers_per_sm:
            return other
    return None


def flipped(seg: Segment, tile: Tile, gpu: Gpu) -> Tile | None:
    """The tile with weights held the other way, if it can be."""
    return replace(tile, resident=0) if tile.resident else resident(seg, tile, gpu)


def variations(seg: Segment, tile: Tile, gpu: Gpu) -> list[Tile]:
    """Tiles of the same cut that hold weights or registers differently."""
    found = [replace(tile, blocks=blocks) for blocks in (tile.blocks - 1, tile.blocks + 1) if blocks]
    found += [replace(tile, resident=2)] if tile.resident < 2 else []
    return [item for item in [flipped(seg, tile, gpu), *found] if item and not illegal(seg, item)]
