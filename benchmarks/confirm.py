"""Holds the planner's estimates and choices against measurement, on the networks of benchmarks/chains.json.

    python -m benchmarks.confirm prepare [--jobs FILE] [--gpu H200] [--models DIR]   (no GPU needed)
    python -m benchmarks.confirm run [--jobs FILE] [--seconds 240] [--out FILE]
    python -m benchmarks.confirm again [--jobs FILE] [--out FILE]   (no GPU needed)

`prepare` plans every chain in float16 at batch 1, 16 and 128, and writes what is to be measured; `run` (which prepares
where there is no such file) measures, in this order, as far as `--seconds` go:

1. traffic: `--profiled` planned modules a batch, spread over the networks, each launched once under ncu with cold
   caches;
2. time: the planned tile of every module, and of every other segment of the chains at batch 16: what else could have
   been fused;
3. time: of `--timed` planned modules, spread over networks and batches, the planner's next best tiles and `--tiles` of
   all legal ones, drawn at random; module by module in turns, so that an early end leaves fewer tiles of each;
4. time: the other segments at the other batches.

A time is what `rewrite(..., tune=True)` measures: a launch of many in a replayed graph, always on the same tensors.
`again` writes what is left to measure after a change of the planner, of the modules with many tiles in the results
`--out`: its choices and next best ones of today; what has been timed stays, with estimates of today.

The results hold the estimates of the day, but traffic is estimated anew wherever it is shown. `python -m
benchmarks.table` makes the tables of docs/planner.md, and `--export FILE` of `run` lines for `benchmarks.calibrate`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from ort_fcm.planner import Chain, Gpu, Module, Plan, Tile, candidates, module_of, plan_chain
from ort_fcm.planner import gpu as gpu_by_name
from ort_fcm.planner.cost import PRIORS, Segment, layout_change, segment, served_bytes, shared_bytes, stock
from ort_fcm.planner.cost import resident as resident_blocks

from benchmarks import chains, ncu, timings
from benchmarks.calibrate import ranks
from benchmarks.case import Case, Stage
from benchmarks.cubin import resources
from ort_fcm import bench, library
from ort_fcm.device import present_device
from ort_fcm.errors import FcmError
from ort_fcm.rewrite.plan import CAUTIOUS
from ort_fcm.tune import PARAMETERS, describe, diverse, flipped, reads_nchw, x_shape

NETWORKS = (
    "convnext_nano", "efficientnet_b0", "efficientnet_lite0", "fastestdet", "mnasnet_100", "mobilenetv1_100",
    "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "xception41",
)  # fmt: skip
BATCHES = (16, 1, 128)  # of the first, all segments come before anything else
NEAR = 6  # of the planner's next best tiles, to be a match for its choice
RESULTS = Path(__file__).parent / "results" / "confirm_h200.json.xz"
JOBS = Path("build") / "confirm_jobs.json.xz"
Entry = dict[str, Any]

# ---- What is to be measured ------------------------------------------------------------------------------------------


def lone(chain: Chain, first: int, last: int) -> Chain:
    """Layers first..last as a chain of their own, as segments see it."""
    height, width = chain.maps()[first]
    layers = tuple(replace(layer, activation_nodes=0) for layer in chain.layers[first : last + 1])
    return Chain(layers, chain.batch, height, width, chain.dtype)


def name_of(chain: Chain) -> str:
    seg = whole(chain)
    channels = "-".join(str(n) for n in (seg.c_in, *(layer.out_channels for layer in seg.layers)))
    kernels = {layer.kernel for layer in chain.layers if layer.kernel != (1, 1)}
    sizes = "".join(f" {h}x{w}" for h, w in sorted(kernels))
    strides = max(max(layer.stride) for layer in chain.layers)
    tail = f" stride {strides}" if strides > 1 else ""
    return f"{chain.batch}x {seg.stages}{sizes} {channels} at {chain.height}x{chain.width}{tail}"


def whole(chain: Chain) -> Segment:
    found = segment(chain, 0, len(chain.layers) - 1)
    assert found
    return found


def chain_of(entry: Entry) -> Chain:
    return Chain(chains.layers(entry["layers"]), entry["batch"], entry["height"], entry["width"], entry["dtype"])


def plain(chain: Chain) -> Entry:
    return {"batch": chain.batch, "height": chain.height, "width": chain.width, "dtype": chain.dtype,
            "layers": chains.plain(chain)}  # fmt: skip


def entry_of(chain: Chain, module: Module, gpu: Gpu) -> Entry:
    """What is to be measured of the module that is all of a chain."""
    tiles = [[str(module.tile), module.time_us]]
    return {"name": name_of(chain), **plain(chain), "estimate": estimates(chain, module, gpu), "tiles": tiles,
            "near": 0, "all": False}  # fmt: skip


CODE_BYTES = 40e3  # of a kernel and its parameters, from device memory


def estimates(chain: Chain, module: Module, gpu: Gpu) -> dict[str, float]:
    """Bytes that counters should tell: between the SMs and L2 (`l2`), all that L2 handles (`l2_all`), reads of device
    memory with a cold L2 (`dram_read`)."""
    seg = whole(chain)
    served = served_bytes(seg, module.tile, gpu)
    return {"l2": served.sms, "l2_all": served.all, "dram_read": module.dram_bytes - written(seg) + CODE_BYTES}


def segments_of(chain: Chain) -> Iterator[tuple[int, int]]:
    count = len(chain.layers)
    for first in range(count):
        for last in range(first, count):
            if segment(chain, first, last):
                yield first, last


def planned(given: tuple[str, int, Chain, int, Gpu]) -> tuple[Entry, dict[tuple[int, int], Module]]:
    """A chain with its plan, and the planner's best tile of each of its segments."""
    network, count, chain, batch, gpu = given
    chain = replace(chain, batch=batch)
    plan = plan_chain(chain, gpu, priors=CAUTIOUS)
    best = {
        place: found[0]
        for place in segments_of(chain)
        if (found := candidates(chain, gpu, *place, "time", 1, CAUTIOUS))
    }
    entry = {"network": network, "count": count, **plain(chain)}
    return entry | {"plan": [[module.first, module.last] for module in plan.modules]}, best


def tiles_of(chain: Chain, gpu: Gpu, number: int, seed: int) -> tuple[list[Module], list[Module]]:
    """The planner's next best tiles, diverse ones and those with weights held the other way, and a random sample of
    all that it found legal."""
    last = len(chain.layers) - 1
    ranked = candidates(chain, gpu, 0, last)
    chosen, rest = ranked[0], {module.tile: module for module in ranked[1:]}
    near = [module.tile for module in diverse(ranked[:400], NEAR + 1)]
    other = flipped(whole(chain), chosen.tile, gpu)
    near = [tile for tile in dict.fromkeys([*([other] if other else []), *near]) if tile in rest][:NEAR]
    text = json.dumps([seed, plain(chain)])
    drawn = random.Random(text).sample(list(rest), min(number, len(rest)))
    return [rest[tile] for tile in near], [rest[tile] for tile in drawn if tile not in near]


def spread(by_network: dict[str, list[int]], number: int, seed: int) -> list[int]:
    """`number` of them, one of each network in turn, each once, drawn at random."""
    rng = random.Random(seed)
    turns = zip_longest(*(rng.sample(found, len(found)) for found in by_network.values()))
    found = dict.fromkeys(i for turn in turns for i in turn if i is not None)
    return list(found)[:number]


def prepare(args: argparse.Namespace) -> Entry:
    """What is to be measured: `modules`, each with its tiles (the chosen one first, then `near` next best ones, then
    the random ones) and their estimates, and `chains` with the modules of their segments by place."""
    gpu = gpu_by_name(args.gpu)
    if args.models:
        models = {path.stem: chains.of_model(path) for path in sorted(args.models.glob("*.onnx"))}
        known = {name: {replace(c, dtype="float16"): n for c, n in found.items()} for name, found in models.items()}
    else:
        known = {name: dict(found) for name, found in chains.read(1, "float16").items() if name in NETWORKS}
    work = [
        (network, count, chain, batch, gpu)
        for batch in BATCHES
        for network, found in known.items()
        for chain, count in found.items()
    ]
    modules: list[Entry] = []
    places: dict[Segment, int] = {}
    used: dict[int, dict[str, list[int]]] = {batch: {network: [] for network in known} for batch in BATCHES}
    entries = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for entry, best in pool.map(planned, work, chunksize=4):
            chain = chain_of(entry)
            entry["modules"] = {}
            for (first, last), module in best.items():
                part = lone(chain, first, last)
                seg = whole(part)
                if seg not in places:
                    places[seg] = len(modules)
                    modules.append({"network": entry["network"], **entry_of(part, module, gpu)})
                entry["modules"][f"{first}-{last}"] = places[seg]
            for first, last in entry["plan"]:
                used[chain.batch][entry["network"]].append(entry["modules"][f"{first}-{last}"])
            entries.append(entry)
        profiled = [i for batch in BATCHES for i in spread(used[batch], args.profiled, args.seed)]
        timed = [i for batch in BATCHES for i in spread(used[batch], args.timed // len(BATCHES), args.seed)]
        jobs = [(chain_of(modules[i]), gpu, args.tiles, args.seed) for i in timed]
        for i, (near, drawn) in zip(timed, pool.map(tiles_of, *zip(*jobs, strict=True)), strict=True):
            modules[i] |= {"near": len(near), "all": len(drawn) < args.tiles - len(near)}
            modules[i]["tiles"] += [[str(module.tile), module.time_us] for module in (*near, *drawn)]
    head = {"gpu": gpu.name, "seed": args.seed, "profiled": profiled, "timed": timed}
    return head | {"modules": modules, "chains": entries}


def again(args: argparse.Namespace) -> Entry:
    """The modules of which many tiles were timed, chosen anew; tiles that are not legal any more are left out."""
    data = read(args.out)
    gpu, modules = gpu_by_name(data["gpu"]), []
    for entry in (data["modules"][i] for i in data["timed"]):
        chain, known = chain_of(entry), {row[0]: row[2:] for row in entry["tiles"] if len(row) > 2}
        last = len(chain.layers) - 1
        chosen = candidates(chain, gpu, 0, last, "time", 1, CAUTIOUS)[0]
        near = [module for module in tiles_of(chain, gpu, 0, 0)[0] if module.tile != chosen.tile]
        ranked = {str(module.tile): module for module in candidates(chain, gpu, 0, last)}
        first = [chosen, *near]
        drawn = [row[0] for row in entry["tiles"][1 + entry["near"] :]]
        rest = [text for text in drawn if text in ranked and text not in {str(part.tile) for part in first}]
        tiles = [*first, *(ranked[text] for text in rest)]
        modules.append(
            {"network": entry["network"], **entry_of(chain, chosen, gpu), "near": len(near), "all": entry["all"],
             "tiles": [[str(part.tile), part.time_us, *known.get(str(part.tile), [])] for part in tiles]}
        )  # fmt: skip
    every = list(range(len(modules)))
    return {"gpu": gpu.name, "seed": data["seed"], "profiled": [], "timed": every, "modules": modules, "chains": []}


def written(seg: Segment) -> int:
    """Bytes of Y."""
    return int(seg.element * seg.output_elements)


def write(path: Path, data: Entry) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt") as file:
        json.dump(data, file)


def read(path: Path) -> Entry:
    with lzma.open(path, "rt") as file:
        return dict(json.load(file))


# ---- Traffic ---------------------------------------------------------------------------------------------------------


def case_of(chain: Chain) -> Case:
    """The module for `benchmarks.modules.Host`."""
    stages = tuple(
        Stage(s.kind, s.in_channels, s.out_channels, s.kernel, s.stride, s.dilation, s.pads, s.activation,
              PARAMETERS.get(s.activation, (0.0, 0.0)))
        for s in chain.layers
    )  # fmt: skip
    seg = whole(chain)
    height, width = map_of(seg)
    return Case(
        stages, chain.dtype if chain.dtype == "float16" else "tf32", chain.batch, height, width, seg.residual,
        input_nchw=reads_nchw(seg), mean=seg.mean, scaled=seg.scaled, pool=seg.pool,
        norm_epsilon=1e-6 if seg.normed else 0.0,
    )  # fmt: skip


def map_of(seg: Segment) -> tuple[int, int]:
    """Height and width of X as the module is measured."""
    shape = x_shape(seg)
    return shape[2:] if reads_nchw(seg) else shape[1:3]


def text_of(entry: Entry, gpu: Gpu) -> str:
    return describe(whole(chain_of(entry)), Tile.parse(entry["tiles"][0][0]), gpu)


def architecture() -> str:
    device = present_device()
    if device is None:
        raise FcmError("there is no GPU here to measure on")
    return device.architecture


def launch(args: argparse.Namespace) -> None:
    """Every profiled module once, each after it a mark, in this process under ncu."""
    from benchmarks.driver import Cuda, CudaError
    from benchmarks.modules import SIZES, Host, Params, launch_on
    from benchmarks.timings import places

    jobs = read(args.jobs)
    gpu = gpu_by_name(jobs["gpu"])
    entries = [jobs["modules"][i] for i in jobs["profiled"]]
    texts = [text_of(entry, gpu) for entry in entries]
    host, cuda, target = Host([library.kernel_source(text) for text in texts]), Cuda(), architecture()
    mark = ncu.Mark(cuda)
    for k, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        chain = chain_of(entry)
        seg, case = whole(chain), case_of(chain)
        addresses: list[int] = []

        def allocate(size: int, addresses: list[int] = addresses) -> int:
            addresses.append(cuda.allocate(size))
            return addresses[-1]

        try:
            image = library.compile_kernel(text, target).read_bytes()
            shape = launch_on(cuda, host, k, case, image)
            function, module = cuda.function(image, "fcm_module", shape["shared_bytes"])
            given: dict[str, int] = {}
            for place in places(case):
                part = ("first", "depthwise", "project")[place]
                given[f"{part}_weight"] = allocate(host.library.packed_bytes(k, place))
                for vector in ("bias", "slope"):
                    given[f"{part}_{vector}"] = allocate(4 * host.library.vector_length(k, place))
            y = written(seg)
            height, width = map_of(seg)
            sums = seg.element * seg.batch * shape["pool_rows"] * seg.c_out
            sizes = {n: shape[n] for n in SIZES}
            params = Params(
                x=allocate(seg.element * math.prod(x_shape(seg))), y=allocate(y),
                residual=allocate(y) if seg.residual else None,
                scale=allocate(seg.element * seg.batch * seg.c_in) if seg.scaled else None,
                pool=allocate(sums) if seg.pool else None, batch=seg.batch, in_h=height, in_w=width, **sizes, **given,
            )  # fmt: skip
            grid = (shape["grid_x"], shape["grid_y"], shape["grid_z"])
            cuda.launch(function, grid, shape["threads"], shape["shared_bytes"], params)
            cuda.synchronise()
            cuda.unload(module)
        except (FcmError, CudaError) as error:
            print(f"{entry['name']}: {error}", file=sys.stderr)
        for address in addresses:
            cuda.free(address)
        mark()


def traffic(jobs: Entry, path: Path) -> None:
    """Adds the counters of its one launch to each profiled module."""
    gpu, target = gpu_by_name(jobs["gpu"]), architecture()
    entries = [jobs["modules"][i] for i in jobs["profiled"]]
    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for failure in pool.map(lambda entry: _compiled(text_of(entry, gpu), target), entries):
            if failure:
                print(failure, file=sys.stderr)
    print(f"{len(entries)} kernels compiled: {time.monotonic() - started:.0f} s", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.confirm", "launch", "--jobs", str(path)]
    found = ncu.groups(ncu.profile(command, ["--kernel-name", "regex:fcm_"]))
    print(f"{len(found)} modules profiled: {time.monotonic() - started:.0f} s", flush=True)
    for entry, kernels in zip(entries, found, strict=False):
        if kernels:
            entry["counted"] = {name: value for name, value in kernels[0].items() if name != "kernel"}


def _compiled(text: str, target: str) -> str:
    try:
        library.compile_kernel(text, target)
        return ""
    except FcmError as error:
        return str(error)


# ---- Time ------------------------------------------------------------------------------------------------------------

Job = tuple[int, int]  # a module, and one of its tiles


def order(jobs: Entry) -> Iterator[Job]:
    """What is timed, the most needed first; not what has been."""
    modules = jobs["modules"]
    first = [i for i, entry in enumerate(modules) if entry["batch"] == BATCHES[0]]
    chosen = list(dict.fromkeys([*jobs["timed"], *first]))
    most = max((len(modules[i]["tiles"]) for i in jobs["timed"]), default=0)
    every = [(i, 0) for i in chosen]
    every += [(i, k) for k in range(1, most) for i in jobs["timed"] if k < len(modules[i]["tiles"])]
    every += [(i, 0) for i in set(range(len(modules))) - set(chosen)]
    yield from ((i, k) for i, k in every if len(modules[i]["tiles"][k]) == 2)


def measured(entry: Entry, k: int, gpu: Gpu, target: str) -> tuple[float, int]:
    """Microseconds, and registers a thread. FcmError where it does not run."""
    seg, tile = whole(chain_of(entry)), Tile.parse(entry["tiles"][k][0])
    text = describe(seg, tile, gpu)
    us = library.measure_module(text, x_shape(seg))
    return us, resources(library.compile_kernel(text, target).read_bytes()).registers


def timing(jobs: Entry, deadline: float, clock: Callable[[], float] = time.monotonic) -> Counter[str]:
    """Adds microseconds and registers to the tiles, compiling in threads while one is timed, until the deadline."""
    gpu, target, waiting = gpu_by_name(jobs["gpu"]), architecture(), order(jobs)
    workers, counted = os.cpu_count() or 1, Counter[str]()
    running: dict[Future[tuple[float, int]], Job] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(running) < 2 * workers and clock() < deadline and (job := next(waiting, None)):
                running[pool.submit(measured, jobs["modules"][job[0]], job[1], gpu, target)] = job
            if not running:
                return counted
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                i, k = running.pop(future)
                row = jobs["modules"][i]["tiles"][k]
                try:
                    row += future.result()
                    counted["timed"] += 1
                except FcmError as error:
                    counted[" ".join(str(error).split())[:160]] += 1


def export(data: Entry, path: Path) -> None:
    """The timed tiles as lines of benchmarks/timings.py."""
    gpu = gpu_by_name(data["gpu"])
    lines = []
    for entry in data["modules"]:
        chain = chain_of(entry)
        for text, _, *rest in entry["tiles"]:
            if rest:
                tile, (us, regs) = Tile.parse(text), rest
                shared = shared_bytes(whole(chain), tile)
                lines.append(
                    {"B": chain.batch, "H": chain.height, "W": chain.width, "us": us, "regs": regs, "shared": shared,
                     "spec": timings.spec(replace(case_of(chain), tile=text)), "threads": tile.threads,
                     "occ": resident_blocks(whole(chain), tile, gpu, shared, regs),
                     "revision": data["environment"]["revision"],
                     **({"whole": True} if chain.layers[0].whole else {})}
                )  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- What it says ----------------------------------------------------------------------------------------------------

QUANTITIES = {
    "SMs and L2, lts__t_sectors_srcunit_tex": ("l2", "lts__t_sectors_srcunit_tex.sum", ncu.SECTOR),
    "all of L2, lts__t_bytes": ("l2_all", "lts__t_bytes.sum", 1),
    "device memory read, dram__bytes_read": ("dram_read", "dram__bytes_read.sum", 1),
}


def _quantiles(values: list[float], form: str = ".1%") -> str:
    return f"{np.median(values):{form}} | {np.quantile(values, 0.9):{form}}"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _first_tile(chain: Chain, entry: Entry, gpu: Gpu) -> Module | None:
    """The module with the tile that was chosen for it; None where the planner of today would not have it."""
    return module_of(chain, gpu, 0, len(chain.layers) - 1, Tile.parse(entry["tiles"][0][0]))


def traffic_table(data: Entry) -> list[str]:
    lines = [
        _row("bytes", "batch", "modules", "networks", "estimate over counted, median", "error, median", "error, 90 %"),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    gpu = gpu_by_name(data["gpu"])
    counted = [
        {**entry, "estimate": estimates(chain, module, gpu)}
        for entry in data["modules"]
        if "counted" in entry and (module := _first_tile(chain := chain_of(entry), entry, gpu))
    ]
    worst: list[tuple[float, str]] = []
    for title, (key, metric, scale) in QUANTITIES.items():
        for batch in (*sorted(BATCHES), 0):
            rows = [e for e in counted if batch in (0, e["batch"]) and metric in e["counted"]]
            if not rows:
                continue
            ratios = [e["estimate"][key] / max(1.0, e["counted"][metric] * scale) for e in rows]
            networks = len({e["network"] for e in rows})
            errors = [abs(ratio - 1) for ratio in ratios]
            lines.append(_row(title, batch or "all", len(rows), networks, f"{np.median(ratios):.3f}",
                              *_quantiles(errors).split(" | ")))  # fmt: skip
            if not batch and key != "l2_all":
                worst += [(ratio, f"{e['name']}, {title.split(',')[0]}") for ratio, e in zip(ratios, rows, strict=True)]
    far = sorted(worst, key=lambda item: -abs(np.log(item[0])))[:10]
    return [*lines, "", "The ten farthest off, estimate over counted: "
            + "; ".join(f"{name} {ratio:.2f}" for ratio, name in far) + "."]  # fmt: skip


def judged(entry: Entry) -> tuple[float, float, float, float] | None:
    """Rank correlation over the chosen and the random tiles (over all where these are few), the chosen tile's time over
    the best of these and over the best of all, and its estimate over its time; None where too few were timed."""
    rows = [(row[1], row[2], 1 <= k <= entry["near"]) for k, row in enumerate(entry["tiles"]) if len(row) > 2]
    drawn = np.array([row[:2] for row in rows if entry["all"] or not row[2]])
    if len(entry["tiles"][0]) < 3 or len(drawn) < (5 if entry["all"] else 10):
        return None
    us = entry["tiles"][0][2]
    rank = float(np.corrcoef(ranks(drawn[:, 0]), ranks(drawn[:, 1]))[0, 1])
    return rank, us / min(drawn[:, 1]), us / min(row[1] for row in rows), entry["tiles"][0][1] / us


def time_table(data: Entry) -> list[str]:
    lines = [
        _row("batch", "modules", "networks", "tiles", "rank correlation, median", "least",
             "chosen over best drawn, median", "90 %", "over best of all timed, median", "90 %",
             "estimate over time, 10 % to 90 %"),
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    found = [(data["modules"][i], told) for i in data["timed"] if (told := judged(data["modules"][i]))]
    for batch in (*sorted(BATCHES), 0):
        rows = [(entry, told) for entry, told in found if batch in (0, entry["batch"])]
        if not rows:
            continue
        rank, drawn, all_timed, level = (list(values) for values in zip(*(told for _, told in rows), strict=True))
        tiles = sum(len(row) > 2 for entry, _ in rows for row in entry["tiles"])
        levels = f"{np.quantile(level, 0.1):.2f} to {np.quantile(level, 0.9):.2f}"
        lines.append(
            _row(batch or "all", len(rows), len({e["network"] for e, _ in rows}), tiles, f"{np.median(rank):.2f}",
                 f"{min(rank):.2f}", *_quantiles(drawn, ".3f").split(" | "), *_quantiles(all_timed, ".3f").split(" | "),
                 levels)
        )  # fmt: skip
    far = sorted(found, key=lambda item: -item[1][2])[:10]
    return [*lines, "", "The ten slowest against the best of all timed: "
            + "; ".join(f"{entry['name']} {told[2]:.2f} (estimate over time {told[3]:.2f})" for entry, told in far)
            + "."]  # fmt: skip


def lost(entry: Entry, modules: list[Entry], gpu: Gpu) -> tuple[float, float] | None:
    """Microseconds of a chain as planned, and of its best segmentation, both with measured times; layers left to stock
    and layout changes count as estimated. None where a segment has not been timed, or where the planner of today would
    not have its tile."""
    chain = chain_of(entry)
    us = {
        (int(a), int(b)): modules[i]["tiles"][0][2]
        for (a, b), i in ((key.split("-"), i) for key, i in entry["modules"].items())
        if len(modules[i]["tiles"][0]) > 2
    }
    if len(us) < len(entry["modules"]):
        return None

    timed = {}
    for (first, last), time_us in us.items():
        tile = Tile.parse(modules[entry["modules"][f"{first}-{last}"]]["tiles"][0][0])
        module = module_of(chain, gpu, first, last, tile)
        if module is None:
            return None
        timed[first, last] = [replace(module, time_us=time_us)]

    alone = replace(PRIORS, module_us=0.0)  # measured times, and no more
    best: Plan = plan_chain(chain, gpu, priors=alone, modules_of=lambda first, last: timed.get((first, last), []))
    inside = {i for first, last in entry["plan"] for i in range(first, last + 1)}
    left = [i for i in range(len(chain.layers)) if i not in inside]
    edges = [i for i in range(1, len(chain.layers)) if (i in inside) != (i - 1 in inside)]
    chosen = sum(us[first, last] for first, last in entry["plan"])
    chosen += sum(stock(chain, i, gpu).time_us for i in left) + sum(layout_change(chain, i, gpu).time_us for i in edges)
    return chosen, best.time_after_us


def fusion_table(data: Entry) -> list[str]:
    gpu = gpu_by_name(data["gpu"])
    lines = [_row("batch", "network", "chains", "as planned, us", "best, us", "lost"), "|---:|---|---:|---:|---:|---:|"]
    worst = []
    for batch in sorted(BATCHES):
        total: dict[str, tuple[float, float, int]] = {}
        for entry in data["chains"]:
            found = lost(entry, data["modules"], gpu) if entry["batch"] == batch else None
            if found:
                count, name = entry["count"], entry["network"]
                for key in (name, "all"):
                    a, b, n = total.get(key, (0.0, 0.0, 0))
                    total[key] = a + count * found[0], b + count * found[1], n + count
                worst.append((count * (found[0] - found[1]), batch, name, entry))
        for name, (chosen, best, count) in total.items():
            if name != "all":
                lines.append(_row(batch, name, count, f"{chosen:.1f}", f"{best:.1f}", f"{1 - best / chosen:.1%}"))
        if "all" in total:
            chosen, best, count = total["all"]
            lines.append(_row(batch, "all", count, f"{chosen:.1f}", f"{best:.1f}", f"{1 - best / chosen:.1%}"))
    told = [
        f"{batch}x {name} {'-'.join(part['kind'] for part in entry['layers'])} "
        f"of {entry['layers'][0]['in_channels']} channels at {entry['height']}x{entry['width']}: {us:.1f} us"
        for us, batch, name, entry in sorted(worst, key=lambda item: -item[0])[:10]
        if us > 0
    ]
    return [*lines, "", f"Most is lost in: {'; '.join(told)}."] if told else lines


TABLES = {"confirm_traffic": traffic_table, "confirm_time": time_table, "confirm_fusion": fusion_table}


def render(name: str, path: Path = RESULTS) -> str:
    """A table of docs/planner.md as Markdown."""
    if not path.exists():
        return "Not measured yet.\n"
    data = read(path)
    where = data["environment"]
    note = f"Measured on {where['gpu']}, CUDA driver {where['cuda_driver']}, {where['date'][:10]}, "
    return "\n".join([*TABLES[name](data), "", note + f"revision {where['revision']}.", ""])


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    if not args.jobs.exists():
        write(args.jobs, prepare(args))
    jobs = read(args.jobs)
    architecture()  # without a GPU, say so at once
    jobs["environment"] = bench.environment()
    if "traffic" in args.parts:
        try:
            traffic(jobs, args.jobs)
        except (FcmError, subprocess.SubprocessError) as error:
            print(f"traffic: {error}", file=sys.stderr)
        write(args.out, jobs)
    if "time" in args.parts:
        counted = timing(jobs, started + args.seconds)
        print(f"{dict(counted)} in {time.monotonic() - started:.0f} s", flush=True)
        write(args.out, jobs)
    if args.export:
        export(jobs, args.export)
    for table in (traffic_table, time_table, fusion_table):
        print("\n".join(table(jobs)))


def perform(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], Entry],
    launch: Callable[[argparse.Namespace], None],
    run: Callable[[argparse.Namespace], None],
    tables: Iterable[Callable[[Path], str]],
) -> int:
    """Does what `args.command` says; the exit status, 2 with one line where that is not possible."""
    try:
        if args.command in ("prepare", "again"):
            write(args.jobs, (prepare if args.command == "prepare" else again)(args))
        elif args.command == "show":
            print("\n".join(table(args.out) for table in tables))
        else:
            (launch if args.command == "launch" else run)(args)
    except (FcmError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "again", "run", "launch", "show"])
    parser.add_argument("--jobs", type=Path, default=JOBS)
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--models", type=Path, help="networks (*.onnx) in place of those of benchmarks/chains.json")
    parser.add_argument("--profiled", type=int, default=60, help="modules a batch whose traffic is counted")
    parser.add_argument("--timed", type=int, default=60, help="modules of which many tiles are timed")
    parser.add_argument("--tiles", type=int, default=40, help="tiles of each, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--parts", default="traffic,time", help="of traffic and time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    tables = (partial(render, name) for name in TABLES)
    return perform(args, prepare, launch, run, tables)


if __name__ == "__main__":
    sys.exit(main())
