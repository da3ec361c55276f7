"""Times single modules with many tiles, through the CUDA driver alone, and checks each against float64.

    python -m benchmarks.modules [--network mobilenetv2|model.onnx|timings.jsonl.xz] [--batch 128] [--dtype float16]
        [--tiles plan|auto:N|random:N|FILE.json] [--only TEXT] [--gpu H200] [--cold] [--json FILE] [--jsonl FILE]
        [--prepare]

The modules are those of the rewritten network, or of a file of timings (see benchmarks/timings.py) those of this batch
and type, whose plan is their fastest tile there. `--tiles`: the plan's own; the planner's N best; N of all that the
planner finds legal, drawn at random; or a file with a list of tiles for each module, by a part of its name ("" for
all): {"blocks.2": ["tile_h=8 tile_w=8 ...", ...]}. `--only` keeps modules whose name contains one of the
comma-separated texts. `--prepare` only compiles (no GPU needed), into the library's cubin cache for `--architecture`.
`--jsonl` writes a line for every tile that gave right numbers, which `benchmarks.calibrate` reads.

A time is that of one launch among many in a replayed graph. Tensors that together exceed half of L2 rotate among
several sets, as in a network they would come from memory; `--cold` rotates all. The floor is bytes that must move (X,
R, Y and weights once) at the speed of a copy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ort_fcm.planner import Chain, Gpu, Layer, Module, candidates
from ort_fcm.planner import gpu as gpu_by_name
from rich import print as show
from rich.table import Table

import ort_fcm
from benchmarks import timings
from benchmarks.case import DEVIATIONS, Case, Data, cases_of, data_of, describe, layout, mean_error, reference
from benchmarks.convolution import Array
from benchmarks.cubin import resources
from benchmarks.driver import L2_BYTES, MULTIPROCESSORS, Cuda, CudaError
from benchmarks.timings import places
from ort_fcm import bench, library
from ort_fcm.rewrite.load import load

KERNELS = Path(ort_fcm.__file__).parent / "kernels"
COPY_BYTES_PER_US = 4.3e6  # of an H200, reads and writes counted
DISTINCT = 2  # images of a batch that differ: the reference is computed for these

HOST = """#include "pack.h"
{namespaces}
static const fcm::Spec specs[] = {{ {specs} }};
extern "C" {{
void launch_of(int k, long long batch, long long h, long long w, int sms, int held, long long* out) {{
  const fcm::Launch l = fcm::launch(specs[k], batch, h, w, sms, held);
  const long long values[] = {{l.grid_x, l.grid_y, l.grid_z, l.threads, l.shared_bytes, l.mid_h, l.mid_w, l.out_h,
                               l.out_w, l.tiles_x, l.tiles_y, l.pool_rows, l.tiles,
                               (long long)sizeof(fcm::Params)}};
  for (int i = 0; i < 14; ++i) out[i] = values[i];
}}
long long packed_bytes(int k, int stage) {{
  const fcm::Spec& s = specs[k];
  return stage == 0   ? fcm::packed_first_bytes(s)
         : stage == 1 ? fcm::packed_depthwise_bytes(s)
                      : fcm::packed_project_bytes(s);
}}
void pack(int k, int stage, const float* w, void* out) {{
  const fcm::Spec& s = specs[k];
  stage == 0 ? fcm::pack_first(s, w, out) : stage == 1 ? fcm::pack_depthwise(s, w, out) : fcm::pack_project(s, w, out);
}}
int vector_length(int k, int stage) {{ return fcm::padded_vector(specs[k], stage == 2); }}
}}
"""


# Of fcm::Launch, what fcm::Params takes as it is.
SIZES = ("mid_h", "mid_w", "out_h", "out_w", "tiles_x", "tiles_y", "pool_rows", "tiles")


class Params(ctypes.Structure):
    """fcm::Params of kernels/spec.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "y", "residual", "first_weight", "first_bias", "depthwise_weight", "depthwise_bias", "project_weight",
            "project_bias", "first_slope", "depthwise_slope", "project_slope")),
        *((name, ctypes.c_int) for name in (
            "batch", "in_h", "in_w", "mid_h", "mid_w", "out_h", "out_w", "tiles_x", "tiles_y")),
        ("scale", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("pool_rows", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("backward", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A module with one tile: what it took, or why it did not run."""

    module: str
    tile: str
    estimate_us: float | None = None
    us: float | None = None
    floor_us: float | None = None
    error: float | None = None  # norm of the difference over the norm of the reference
    deviations: float | None = None  # largest error, in standard deviations of what rounding explains
    registers: int | None = None
    frame_bytes: int | None = None
    shared_bytes: int | None = None
    blocks: int | None = None  # thread blocks that an SM holds
    grid: tuple[int, int, int] | None = None
    threads: int | None = None
    fault: str | None = None


class Host:
    """spec.h and pack.h compiled for a list of modules: launches and packed weights, as the library computes them."""

    def __init__(self, sources: Sequence[str]) -> None:
        """`sources`: what the library generates for each module."""
        bodies = [source.split("\n", 1)[1].rsplit("FCM_MODULE", 1)[0] for source in sources]
        namespaces = "\n".join(f"namespace k{i} {{\n{body}\n}}" for i, body in enumerate(bodies))
        text = HOST.format(namespaces=namespaces, specs=", ".join(f"k{i}::make_spec()" for i in range(len(bodies))))
        with tempfile.TemporaryDirectory() as directory:
            source, target = Path(directory) / "host.cpp", Path(directory) / "host.so"
            source.write_text(text)
            command = [
                "g++",
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-shared",
                "-I",
                str(KERNELS),
                str(source),
                "-o",
                str(target),
            ]
            subprocess.run(command, check=True)
            self.library = ctypes.CDLL(str(target))
        self.library.packed_bytes.restype = ctypes.c_longlong

    def launch(self, k: int, case: Case, sms: int, held: int = 0) -> dict[str, int]:
        """The launch of module `k` on a GPU of `sms` multiprocessors that have room for `held` thread blocks each, by
        the names of fcm::Launch."""
        out = (ctypes.c_longlong * 14)()
        sizes = [ctypes.c_longlong(v) for v in (case.batch, case.h, case.w)]
        self.library.launch_of(k, *sizes, ctypes.c_int(sms), ctypes.c_int(held), out)
        names = (
            "grid_x grid_y grid_z threads shared_bytes mid_h mid_w out_h out_w tiles_x tiles_y pool_rows tiles"
            " params_bytes"
        ).split()
        launch = dict(zip(names, map(int, out), strict=True))
        if launch["params_bytes"] != ctypes.sizeof(Params):
            raise RuntimeError("fcm::Params of spec.h has changed: bring Params in benchmarks/modules.py up to date")
        return launch

    def weights(self, k: int, stage: int, weight: Array) -> Array:
        out = np.zeros(self.library.packed_bytes(k, stage), np.uint8)
        wide = np.ascontiguousarray(weight, np.float32)
        self.library.pack(k, stage, ctypes.c_void_p(wide.ctypes.data), ctypes.c_void_p(out.ctypes.data))
        return out

    def vector(self, k: int, stage: int, values: Array | None) -> Array:
        out = np.zeros(self.library.vector_length(k, stage), np.float32)
        if values is not None:
            out[: len(values)] = values
        return out


def launch_on(cuda: Cuda, host: Host, k: int, case: Case, cubin: bytes) -> dict[str, int]:
    """The launch of module `k`, compiled as `cubin`, on this GPU, as the library would have it."""
    launch = host.launch(k, case, cuda.attribute(MULTIPROCESSORS))
    function, module = cuda.function(cubin, "fcm_module", launch["shared_bytes"])
    try:
        held = cuda.occupancy(function, launch["threads"], launch["shared_bytes"])
    finally:
        cuda.unload(module)
    return host.launch(k, case, cuda.attribute(MULTIPROCESSORS), held)


def required_bytes(case: Case, data: Data) -> int:
    """Bytes that must move: X, R, Y and the weights once."""
    h, w = case.out_size
    y = case.batch * case.stages[-1].c_out * h * w * case.storage.itemsize
    x = case.batch * case.stages[0].c_in * case.h * case.w * case.storage.itemsize
    return x + y * (2 if case.residual else 1) + sum(weight.nbytes for weight in data.weights)


def chain_of(case: Case) -> Chain:
    """The module as the planner knows it."""
    last = len(case.stages) - 1
    layers = tuple(
        Layer(
            s.kind,
            s.c_in,
            s.c_out,
            s.kernel,
            s.stride,
            s.dilation,
            s.pads,
            s.activation,
            case.residual and i == last,
            pool=case.pool and i == last,
            mean=case.mean and i == 0,
            scaled=case.scaled and i == 0,
            normed=case.norm_epsilon > 0 and i == 0,
        )
        for i, s in enumerate(case.stages)
    )
    return Chain(layers, case.batch, case.h, case.w, "float16" if case.dtype == "float16" else "float32")


def planned(case: Case, gpu: str | Gpu, limit: int = 0) -> dict[str, Module]:
    """The planner's `limit` best tiles for the whole module (0: all), by tile text, best first. It plans float32 for
    TF32: tiles that need it are left out where the case does not allow it."""
    card = gpu_by_name(gpu) if isinstance(gpu, str) else gpu
    found = candidates(chain_of(case), card, 0, len(case.stages) - 1)
    legal = [module for module in found if case.dtype != "float32" or not module.tile.wgmma]
    return {str(module.tile): module for module in legal[: limit or None]}


def compile_all(texts: Sequence[str], architecture: str) -> list[Path | str]:
    """The cubin of each description, or why there is none."""

    def one(text: str) -> Path | str:
        try:
            return library.compile_kernel(text, architecture)
        except ort_fcm.FcmError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, texts))


class Bench:
    """One module's data on the GPU, timed with one tile after another."""

    def __init__(self, cuda: Cuda, case: Case, host: Host, k: int, cold: bool) -> None:
        self.cuda, self.case = cuda, case
        few = replace(case, batch=min(case.batch, DISTINCT))
        data = data_of(few)
        self.expected, self.deviation = reference(few, data)
        self.bytes = required_bytes(case, data)
        l2 = cuda.attribute(L2_BYTES)
        big = cold or self.bytes > l2 // 2
        self.sets = max(2, -(-2 * l2 // self.bytes)) if big else 1
        repeats = -(-case.batch // few.batch)

        def batch_of(values: Array, nchw: bool) -> Array:
            return layout(np.tile(values, (repeats, 1, 1, 1))[: case.batch], nchw)

        x = batch_of(data.x, case.input_nchw)
        residual = None if data.residual is None else batch_of(data.residual, case.output_nchw)
        factors = None if data.factors is None else batch_of(data.factors, case.input_nchw)
        h, w = case.out_size
        shape = (case.batch, case.stages[-1].c_out, h, w)
        self.y_shape = shape if case.output_nchw else (shape[0], h, w, shape[1])
        self.y_bytes = int(np.prod(shape)) * case.storage.itemsize
        self.addresses: list[int] = []
        self.inputs = [self._upload(x) for _ in range(self.sets)]
        self.residuals = [0 if residual is None else self._upload(residual) for _ in range(self.sets)]
        self.outputs = [self._allocate(self.y_bytes) for _ in range(self.sets)]
        self.factors = 0 if factors is None else self._upload(factors)
        self.data = data
        self.weights: dict[str, int] = {}
        self.pack(host, k)

    def pack(self, host: Host, k: int) -> None:
        """Weights as the tile of `host`'s module `k` wants them."""
        data = self.data
        channels = self.case.stages[-1].c_out
        passing = np.ones((channels, 1, 1, 1)), np.zeros(channels), None  # behind a lone stem
        stages = [*zip(data.weights, data.biases, data.slopes, strict=True), passing]
        for place, (weight, bias, slope) in zip(places(self.case), stages, strict=False):
            name = ("first", "depthwise", "project")[place]
            self.weights[f"{name}_weight"] = self._upload(host.weights(k, place, weight))
            self.weights[f"{name}_bias"] = self._upload(host.vector(k, place, bias))
            if slope is not None:
                self.weights[f"{name}_slope"] = self._upload(host.vector(k, place, slope))

    def _allocate(self, size: int) -> int:
        self.addresses.append(self.cuda.allocate(size))
        return self.addresses[-1]

    def _upload(self, values: Array) -> int:
        address = self._allocate(values.nbytes)
        self.cuda.upload(address, values)
        return address

    def close(self) -> None:
        for address in self.addresses:
            self.cuda.free(address)

    def check(self, y: Array, rows: Array | None) -> tuple[float, float]:
        """Error as norm over norm, and the largest in standard deviations. Repeated images must repeat exactly. rows:
        the second output, whose mean must be Y's."""
        y = y if self.case.output_nchw else y.transpose(0, 3, 1, 2)
        if rows is not None and mean_error(self.case, y, rows.astype(np.float64).mean(1)) > 1:
            return float("inf"), float("inf")
        few = len(self.expected)
        for start in range(few, len(y), few):
            part = y[start : start + few]
            if not np.array_equal(part, y[: len(part)]):
                return float("inf"), float("inf")
        error = np.abs(y[:few].astype(np.float64) - self.expected)
        if not np.isfinite(error).all():
            return float("inf"), float("inf")
        relative = float(np.linalg.norm(error) / np.linalg.norm(self.expected))
        return relative, float((error / self.deviation).max())

    def run(self, cubin: bytes, launch: dict[str, int], launches: int = 20, replays: int = 9) -> dict[str, Any]:
        """us (None without replays), error, deviations, blocks, grid and threads of this module compiled as `cubin`."""
        cuda = self.cuda
        function, module = cuda.function(cubin, "fcm_module", launch["shared_bytes"])
        sizes = {n: launch[n] for n in SIZES}
        rows_shape = (self.case.batch, launch["pool_rows"], 1, self.case.stages[-1].c_out)
        rows_bytes = int(np.prod(rows_shape)) * self.case.storage.itemsize
        pool = self._allocate(rows_bytes) if self.case.pool else 0
        given = [
            Params(x=x, y=y, residual=r, batch=self.case.batch, in_h=self.case.h, in_w=self.case.w, **sizes,
                   scale=self.factors, pool=pool, **self.weights)
            for x, y, r in zip(self.inputs, self.outputs, self.residuals, strict=True)
        ]  # fmt: skip
        grid = (launch["grid_x"], launch["grid_y"], launch["grid_z"])

        def one(i: int) -> None:
            cuda.launch(function, grid, launch["threads"], launch["shared_bytes"], given[i % self.sets])

        def many() -> None:
            for i in range(launches):
                one(i)

        try:
            cuda.fill(self.outputs[0], self.y_bytes, 0xFF)
            one(0)
            cuda.synchronise()
            y = cuda.download(self.outputs[0], self.y_shape, self.case.storage)
            rows = cuda.download(pool, rows_shape, self.case.storage) if self.case.pool else None
            error, deviations = self.check(y, rows)
            times = cuda.time_graph(cuda.graph(many), replays) if replays else []
            blocks = cuda.occupancy(function, launch["threads"], launch["shared_bytes"])
        finally:
            cuda.unload(module)
        us = statistics.median(times) * 1e3 / launches if times else None
        told = {"us": us, "error": error, "deviations": deviations}
        return told | {"blocks": blocks, "grid": grid, "threads": launch["threads"]}


def network(name: str, batch: int, dtype: str) -> onnx.ModelProto:
    """The named network at a batch: mobilenetv2, or an ONNX file whose batch is dynamic or this one."""
    if name == "mobilenetv2":
        from examples import mobilenetv2

        return mobilenetv2.build(batch, "float16" if dtype == "float16" else "float32")
    return bench.fix_shapes(load(Path(name)), batch)


def tiles_for(name: str, case: Case, wanted: str, gpu: str) -> list[str]:
    if wanted == "plan":
        return [case.tile]
    if wanted.startswith("auto:"):
        best = list(planned(case, gpu, int(wanted[5:])))
        return [case.tile, *(tile for tile in best if tile != case.tile)]
    if wanted.startswith("random:"):
        legal = [tile for tile in planned(case, gpu) if tile != case.tile]
        return [case.tile, *random.Random(case.to_line()).sample(legal, min(int(wanted[7:]), len(legal)))]
    given: dict[str, list[str]] = json.loads(Path(wanted).read_text())
    found = [tile for part, tiles in given.items() if part in name for tile in tiles]
    return list(dict.fromkeys([case.tile, *found]))


def timed(path: Path, batch: int, dtype: str) -> dict[str, Case]:
    """The modules of a file of timings, each with its fastest tile."""
    found: dict[Case, tuple[float, str]] = {}
    for row in timings.read(path):
        case = timings.case(row)
        if case.batch == batch and case.dtype == dtype:
            key = replace(case, tile="")
            found[key] = min(found.get(key, (float("inf"), "")), (row["us"], case.tile))

    def name(case: Case) -> str:
        return "-".join(str(c) for c in (case.stages[0].c_in, *(stage.c_out for stage in case.stages)))

    return {
        f"{i} {case.name} {name(case)} at {case.h}x{case.w}": replace(case, tile=tile)
        for i, (case, (_, tile)) in enumerate(found.items())
    }


def modules(args: argparse.Namespace) -> dict[str, Case]:
    """The modules to time, by name."""
    if ".jsonl" in Path(args.network).suffixes:
        return timed(Path(args.network), args.batch, args.dtype)
    model = network(args.network, args.batch, args.dtype)
    done = ort_fcm.rewrite(model, gpu=args.gpu, check=False, float16=False)
    return cases_of(done.model, args.dtype if args.dtype != "float16" else None)


def measure(args: argparse.Namespace) -> tuple[list[Trial], dict[str, Case]]:
    """Every trial, and the modules by name."""
    cases: dict[str, Case] = {}
    seen = set()
    for name, case in modules(args).items():
        if any(part in name for part in args.only.split(",")) and case not in seen:
            seen.add(case)
            cases[name] = case
    trials = [
        (name, replace(case, tile=tile))
        for name, case in cases.items()
        for tile in tiles_for(name, case, args.tiles, args.gpu)
    ]
    limit = gpu_by_name(args.gpu).shared_per_block
    texts = [describe(case) for _, case in trials]
    used = [library.kernel_resources(text, limit) for text in texts]
    started = time.perf_counter()
    cubins = compile_all(texts, args.architecture)
    print(f"{len(texts)} kernels compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if args.prepare:
        return [], cases
    host = Host([library.kernel_source(text) for text in texts])
    cuda = Cuda()
    results: list[Trial] = []
    current: tuple[str, Bench] | None = None
    for k, ((name, case), cubin) in enumerate(zip(trials, cubins, strict=True)):
        estimate = planned(case, args.gpu).get(case.tile)
        trial = Trial(name, case.tile, estimate_us=estimate.time_us if estimate else None)
        if used[k]["replaced"]:
            results.append(replace(trial, fault=f"not used: {used[k]['replaced']}"))
            continue
        if isinstance(cubin, str):
            results.append(replace(trial, fault=cubin.splitlines()[0]))
            continue
        if current is None or current[0] != name:
            if current:
                current[1].close()
            current = (name, Bench(cuda, case, host, k, args.cold))
        else:
            current[1].pack(host, k)
        image = cubin.read_bytes()
        compiled = resources(image)
        trial = replace(
            trial,
            registers=compiled.registers,
            frame_bytes=compiled.frame_bytes,
            shared_bytes=int(used[k]["shared_bytes"]),
            floor_us=current[1].bytes / COPY_BYTES_PER_US,
        )
        try:
            found = current[1].run(image, launch_on(cuda, host, k, case, image))
        except CudaError as error:
            results.append(replace(trial, fault=str(error)))
            if not error.refused:
                break  # the context is lost
            continue
        results.append(replace(trial, **found, fault="WRONG NUMBERS" if found["deviations"] > DEVIATIONS else None))
    return results, cases


def line(case: Case, trial: Trial, revision: str) -> str:
    """A trial as a line of a file of timings."""
    row = {
        "B": case.batch, "H": case.h, "W": case.w, "spec": timings.spec(replace(case, tile=trial.tile)),
        "us": trial.us, "err": trial.error, "grid": trial.grid, "threads": trial.threads, "shared": trial.shared_bytes,
        "regs": trial.registers, "local": trial.frame_bytes, "occ": trial.blocks, "revision": revision,
    }  # fmt: skip
    return json.dumps(row) + "\n"


def short(tile: str) -> str:
    """A tile in few characters: 8x16 patch 2 chunk 32 warps 4x1 n 0 split 1 blocks 3."""
    t = dict(item.split("=") for item in tile.split())
    if not t:
        return "the library's own"
    images = f"{t['images']}x" if t.get("images", "1") != "1" else ""
    return (
        f"{images}{t.get('tile_h')}x{t.get('tile_w')} p{t.get('patch_h')} c{t.get('chunk')} "
        f"w{t.get('warps_m')}x{t.get('warps_n')} n{t.get('block_n')} s{t.get('split')} b{t.get('blocks')}"
        + {"1": " resident", "2": " weights by"}.get(t.get("resident", "0"), "")
    )


def table(results: Sequence[Trial], best: int) -> Table:
    """The plan's tile (marked) and the `best` fastest of each module."""
    out = Table("module", "tile (* the plan's)")
    for column in ("us", "estimate", "floor", "error", "sigma", "regs", "shared"):
        out.add_column(column, justify="right")
    out.add_column("fault")

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for name in dict.fromkeys(trial.module for trial in results):
        mine = [trial for trial in results if trial.module == name]
        ranked = sorted(mine, key=lambda t: t.us or float("inf"))
        head = name
        for trial in ranked:
            if trial is not mine[0] and trial not in ranked[:best] and not trial.fault:
                continue
            regs = cell(trial.registers, "d") + (f"+{trial.frame_bytes}B spilled" if trial.frame_bytes else "")
            out.add_row(
                head,
                short(trial.tile) + (" *" if trial is mine[0] else ""),
                cell(trial.us, ".1f"),
                cell(trial.estimate_us, ".1f"),
                cell(trial.floor_us, ".1f"),
                cell(trial.error, ".1e"),
                cell(trial.deviations, ".1f"),
                regs,
                cell(trial.shared_bytes, "d"),
                trial.fault or "",
            )
            head = ""
        out.add_section()
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", "--chains", default="mobilenetv2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=["float16", "tf32", "float32"], default="float16")
    parser.add_argument("--tiles", default="plan")
    parser.add_argument("--only", default="")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--best", type=int, default=3, help="tiles a module to print")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jsonl", type=Path)
    args = parser.parse_args()
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "180")
    try:
        results, cases = measure(args)
    except (ort_fcm.FcmError, CudaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if results:
        show(table(results, args.best))
        planned_us = {
            t.module: t.us for t in reversed(results) if t.us and not t.fault
        }  # the plan's is each module's first
        best_us = {name: min(t.us for t in results if t.module == name and t.us and not t.fault) for name in planned_us}
        show(f"sum over distinct modules: plan {sum(planned_us.values()):.0f} us, best {sum(best_us.values()):.0f} us")
    if args.json:
        data: dict[str, Any] = {"environment": bench.environment(), "trials": [asdict(trial) for trial in results]}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    if args.jsonl:
        revision = str(bench.environment()["revision"])
        args.jsonl.write_text("".join(line(cases[t.module], t, revision) for t in results if t.us and not t.fault))
    return int(any(trial.fault == "WRONG NUMBERS" for trial in results))


if __name__ == "__main__":
    sys.exit(main())
