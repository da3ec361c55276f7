"""The paper's table again: its layer pairs, as the planner has them run against stock ONNX Runtime, at batch 1.

    python -m benchmarks.paper prepare [--jobs FILE] [--gpu H200]   (no GPU needed)
    python -m benchmarks.paper run [--jobs FILE] [--known FILE] [--seconds 240] [--out FILE]

The pairs are those of benchmarks/paper_pairs.csv that can be fused, equal ones once, in float16 and float32 (TF32).
Stock: the CUDA provider, cuDNN's algorithms searched exhaustively, at the faster of NCHW and NHWC (whose input and
output are NHWC then, as inside a network), its runs captured in a CUDA graph; activations are nodes of their own. Ours:
the planned module, or modules where the planner does not fuse, planned for time and planned for traffic. Times are
those of one run of many in a replayed graph; accesses are ncu's `lts__t_bytes` with cold caches, summed over a run's
kernels. `run` measures our times and our accesses (a minute on an H200), and, as far as `--seconds` go, stock's times
and then its accesses, pair by pair in an order drawn at random (two minutes and a half). With `--known`, what that file
has of the same pairs in stock, and of the same modules with the same tiles, is taken from it. `python -m
benchmarks.table` makes docs/paper.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from ort_fcm.planner import Chain, Gpu, Layer, Module, candidates, plan_chain
from ort_fcm.planner import gpu as gpu_by_name

from benchmarks import confirm, ncu
from benchmarks.confirm import Entry, chain_of
from ort_fcm import bench
from ort_fcm.errors import FcmError
from ort_fcm.rewrite.plan import CAUTIOUS

PAIRS = Path(__file__).with_name("paper_pairs.csv")
RESULTS = Path(__file__).parent / "results" / "paper_h200.json.xz"
JOBS = Path("build") / "paper_jobs.json.xz"
DTYPES = ("float16", "float32")
OBJECTIVES = ("time", "traffic")
LINEAR = ("MobileNetV2", "ProxylessNAS-GPU")  # whose projections to fewer channels have no activation
RUNS = 20  # in a graph
TIMED = 0.6  # share of what is left of `--seconds` for stock, in which its times are taken
TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def pair(row: dict[str, str], dtype: str) -> Chain:
    """A row of the file as a chain at batch 1, with the activations of its network."""
    model, first = row["model"], row["first_type"]
    c_in, c_mid, c_out = int(row["C_in"]), int(row["C_mid"]), int(row["C_out"])
    top, bottom, left, right = map(int, row["padding"].split("/"))
    kernel, stride = int(row["kernel"]), int(row["stride"])

    def layer(kind: str, inputs: int, outputs: int) -> Layer:
        bare = (model == "Xception" and kind == "dw") or (model in LINEAR and kind == "pw" and outputs < inputs)
        activation = "none" if bare else "relu" if model == "Xception" else "clip"
        window: dict[str, Any] = {}
        if kind == "dw":
            window = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "pads": (top, left, bottom, right)}
        return Layer(kind, inputs, outputs, activation=activation, activation_nodes=int(not bare), **window)

    second = "pw" if first == "dw" or kernel == 1 else "dw"
    layers = (layer(first, c_in, c_mid), layer(second, c_mid, c_out))
    return Chain(layers, 1, int(row["H"]), int(row["W"]), dtype)


def rows() -> list[dict[str, str]]:
    """The legal pairs of the file."""
    lines = (line for line in PAIRS.read_text().splitlines() if not line.startswith("#"))
    return [row for row in csv.DictReader(lines) if not row["note"]]


def planned(chain: Chain, gpu: Gpu, objective: str) -> list[Module]:
    """The plan's modules; what it would leave to stock, as modules of single layers."""
    plan = plan_chain(chain, gpu, objective, CAUTIOUS)
    lone = [candidates(chain, gpu, skip.layer, skip.layer, objective, 1, CAUTIOUS)[0] for skip in plan.skips]
    return sorted([*plan.modules, *lone], key=lambda module: module.first)


def plans(chain: Chain, gpu: Gpu) -> dict[str, list[Module]]:
    return {objective: planned(chain, gpu, objective) for objective in OBJECTIVES}


def prepare(args: argparse.Namespace) -> Entry:
    """Distinct pairs with their plans by objective (`chains`), and the modules of these, in the form of
    benchmarks.confirm."""
    gpu = gpu_by_name(args.gpu)
    found: dict[Chain, list[str]] = {}
    for row in rows():
        for dtype in DTYPES:
            found.setdefault(pair(row, dtype), []).append(f"{row['model']} {row['layer_ids']}")
    modules: dict[str, Entry] = {}
    entries = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (chain, names), plan in zip(found.items(), pool.map(plans, found, repeat(gpu), chunksize=4), strict=True):
            entry: Entry = {**confirm.plain(chain), "names": names, "plan": {}}
            for objective, parts in plan.items():
                for module in parts:
                    made = confirm.entry_of(confirm.lone(chain, module.first, module.last), module, gpu)
                    modules.setdefault(name := key(made), made)
                    entry["plan"].setdefault(objective, []).append(list(modules).index(name))
            entries.append(entry)
    return whole({"gpu": gpu.name, "chains": entries}, list(modules.values()))


def whole(jobs: Entry, modules: list[Entry]) -> Entry:
    """The jobs with these modules, all of which benchmarks.confirm times and profiles."""
    every = list(range(len(modules)))
    return {**jobs, "profiled": every, "timed": every, "modules": modules}


def key(entry: Entry) -> str:
    """What tells a pair from others, and a module with its tile."""
    tile = [row[0] for row in entry.get("tiles", [])]
    return json.dumps([confirm.plain(chain_of(entry)), tile], sort_keys=True)


def keep(jobs: Entry, known: Entry) -> None:
    """Takes stock's figures of the same pairs, and ours of the same modules, from another run's."""
    before = {key(entry): entry for entry in (*known["chains"], *known["modules"])}
    for entry in jobs["chains"]:
        same = before.get(key(entry), {})
        entry |= {name: same[name] for name in ("stock", "counted", "kernels") if name in same}
    for i, entry in enumerate(jobs["modules"]):
        jobs["modules"][i] = before.get(key(entry), entry)
    jobs["known"] = known["environment"]


# ---- Stock -----------------------------------------------------------------------------------------------------------


def model_of(chain: Chain, nhwc: bool) -> onnx.ModelProto:
    """The chain as a model with random weights; `nhwc`: with Transposes around it, which cancel stock's own."""
    rng, element = np.random.default_rng(0), TYPES[chain.dtype]
    storage = np.dtype(chain.dtype)
    nodes, initializers = [], []

    def constant(name: str, values: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(values, storage), name))
        return name

    def shape(height: int, width: int, channels: int) -> list[int]:
        return [chain.batch, height, width, channels] if nhwc else [chain.batch, channels, height, width]

    now = "X"
    if nhwc:
        nodes.append(helper.make_node("Transpose", [now], [now := "X_nchw"], perm=[0, 3, 1, 2]))
    for i, layer in enumerate(chain.layers):
        fan_in = layer.weights // layer.out_channels
        dims = (layer.out_channels, 1 if layer.kind == "dw" else layer.in_channels, *layer.kernel)
        weight = constant(f"W{i}", rng.standard_normal(dims) * fan_in**-0.5)
        bias = constant(f"B{i}", rng.standard_normal(layer.out_channels))
        nodes.append(
            helper.make_node(
                "Conv", [now, weight, bias], [now := f"C{i}"], kernel_shape=layer.kernel, strides=layer.stride,
                pads=layer.pads, group=layer.in_channels if layer.kind == "dw" else 1,
            )
        )  # fmt: skip
        if layer.activation == "relu":
            nodes.append(helper.make_node("Relu", [now], [now := f"A{i}"]))
        elif layer.activation == "clip":
            bounds = [constant(f"low{i}", 0), constant(f"high{i}", 6)]
            nodes.append(helper.make_node("Clip", [now, *bounds], [now := f"A{i}"]))
    if nhwc:
        nodes.append(helper.make_node("Transpose", [now], [now := "Y"], perm=[0, 2, 3, 1]))
    else:
        nodes[-1].output[0] = now = "Y"
    first = shape(chain.height, chain.width, chain.layers[0].in_channels)
    out_h, out_w = chain.maps()[-1]
    last = shape(out_h, out_w, chain.layers[-1].out_channels)
    inputs = [helper.make_tensor_value_info("X", element, first)]
    outputs = [helper.make_tensor_value_info(now, element, last)]
    graph = helper.make_graph(nodes, "pair", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Stock:
    """A pair in stock ONNX Runtime on a stream of ours, with its input and output on the GPU."""

    def __init__(self, cuda: Any, chain: Chain, nhwc: bool) -> None:
        import onnxruntime as ort

        model = model_of(chain, nhwc)
        flags = {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": str(int(nhwc)), "use_tf32": "1",
                 "user_compute_stream": str(cuda.stream.value)}  # fmt: skip
        options = ort.SessionOptions()
        options.log_severity_level = 3
        providers: list[Any] = [("CUDAExecutionProvider", flags), "CPUExecutionProvider"]
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.binding = self.session.io_binding()
        for value in (*model.graph.input, *model.graph.output):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            data = np.random.default_rng(1).standard_normal(dims).astype(chain.dtype)
            tensor = ort.OrtValue.ortvalue_from_numpy(data, "cuda", 0)
            bind = self.binding.bind_ortvalue_input if value.name == "X" else self.binding.bind_ortvalue_output
            bind(value.name, tensor)
        for _ in range(3):
            self.run()
        cuda.synchronise()

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding, self.options)


def drawn(jobs: Entry) -> list[Entry]:
    """The pairs in the order in which stock is measured, so that an early end leaves some of every network."""
    return random.Random(0).sample(jobs["chains"], len(jobs["chains"]))


def stock_times(jobs: Entry, deadline: float) -> None:
    """Adds the microseconds of either layout to each pair. FcmError where none of the first few can be timed, or where
    there is no time for any."""
    from benchmarks.driver import Cuda

    bench.require_provider("cuda")
    cuda = Cuda()
    faults: list[str] = []
    for entry in drawn(jobs):
        if entry.get("stock"):
            continue
        if time.monotonic() > deadline:
            break
        entry["stock"] = {}
        for layout in ("NCHW", "NHWC"):
            try:
                stock = Stock(cuda, chain_of(entry), layout == "NHWC")

                def many(stock: Stock = stock) -> None:
                    for _ in range(RUNS):
                        stock.run()

                times = cuda.time_graph(cuda.graph(many), replays=7)
                entry["stock"][layout] = statistics.median(times) * 1e3 / RUNS
            except Exception as error:  # onnxruntime raises its own types, by status code
                faults.append(f"{layout}: {' '.join(str(error).split())[:300]}")
        if len(faults) >= 6 and not any(other.get("stock") for other in jobs["chains"]):
            raise FcmError(f"stock could not be timed: {faults[0]}; {faults[1]}")
    timed = sum(bool(entry.get("stock")) for entry in jobs["chains"])
    print(f"{timed} of {len(jobs['chains'])} pairs timed in stock", flush=True)
    if not timed:
        raise FcmError("no time was left for stock: --seconds must be more")
    if faults:
        print(f"{len(faults)} sessions of stock failed, the first with {faults[0]}", file=sys.stderr)


def launch(args: argparse.Namespace) -> None:
    """Every pair once in stock's better layout, each after it a mark, in this process under ncu."""
    from benchmarks.driver import Cuda

    cuda, deadline = Cuda(), time.monotonic() + args.seconds
    mark = ncu.Mark(cuda)
    for entry in drawn(confirm.read(args.jobs)):
        times = entry.get("stock") or {}
        if not times or "counted" in entry:
            continue
        if time.monotonic() > deadline:
            break
        stock = Stock(cuda, chain_of(entry), min(times, key=times.__getitem__) == "NHWC")
        cuda.call("cuProfilerStart")
        stock.run()
        cuda.synchronise()
        mark()
        cuda.call("cuProfilerStop")


def stock_traffic(jobs: Entry, path: Path, seconds: float) -> None:
    """Adds the sums of the counters over a run's kernels to each pair that was timed. FcmError where none was, and what
    benchmarks.ncu raises."""
    timed = [entry for entry in drawn(jobs) if entry.get("stock") and "counted" not in entry]
    if not timed:
        if any(entry.get("stock") for entry in jobs["chains"]):
            return  # all known
        raise FcmError("stock's accesses are counted of pairs that were timed, and none was")
    confirm.write(path, jobs)
    command = [sys.executable, "-m", "benchmarks.paper", "launch", "--jobs", str(path), "--seconds", str(seconds)]
    found = ncu.groups(ncu.profile(command, ["--profile-from-start", "off"]))
    for entry, kernels in zip(timed, found, strict=False):
        entry["counted"] = total(kernels)
        entry["kernels"] = [str(kernel["kernel"])[:60] for kernel in kernels]
    print(f"accesses of {min(len(found), len(timed))} of {len(timed)} pairs counted in stock", flush=True)


def total(kernels: list[ncu.Kernel]) -> dict[str, float]:
    names = [name for name in (kernels[0] if kernels else {}) if name != "kernel"]
    return {name: sum(float(kernel[name]) for kernel in kernels) for name in names}


# ---- What it says ----------------------------------------------------------------------------------------------------


# Shares of stock's accesses, the counter they are of, its unit in bytes: all that passes L2, and what SMs ask for.
COUNTED = (
    ("saved", "possible", "lts__t_bytes.sum", 1),
    ("saved_by_sms", "possible_by_sms", "lts__t_sectors_srcunit_tex.sum", ncu.SECTOR),
)


def result(entry: Entry, modules: list[Entry], objective: str = "time") -> dict[str, Any] | None:
    """Of the pair as planned for time or for traffic: stock's time over ours (`ratio`), accesses `saved` and `possible`
    as shares of stock's, by either counter, and whether it is fused; None where a part was not measured."""
    mine = [modules[i] for i in entry["plan"].get(objective, [])]
    if not mine or not entry.get("stock") or any(len(module["tiles"][0]) < 3 for module in mine):
        return None
    us = sum(module["tiles"][0][2] for module in mine)
    layout = min(entry["stock"], key=entry["stock"].__getitem__)
    found: dict[str, Any] = {"ratio": entry["stock"][layout] / us, "stock": entry["stock"][layout], "us": us}
    found |= {"fused": len(mine) == 1, "layout": layout, "saved": None, "possible": None}
    if entry.get("counted") and all("counted" in module for module in mine):
        least = confirm.whole(chain_of(entry)).compulsory_bytes
        for saved, possible, counter, unit in COUNTED:
            before = entry["counted"][counter] * unit
            after = sum(module["counted"][counter] for module in mine) * unit
            found |= {saved: 1 - after / before, possible: 1 - least / before}
    return found


def table(data: Entry) -> list[str]:
    """Rows of pairs, both types side by side, and what they say together."""
    by_pair: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    shape: dict[str, str] = {}
    for entry in data["chains"]:
        chain = chain_of(entry)
        name = ", ".join(entry["names"][:2]) + (f" and {len(entry['names']) - 2} more" if entry["names"][2:] else "")
        shape[name] = confirm.name_of(chain).removeprefix("1x ")
        for objective in OBJECTIVES:
            if found := result(entry, data["modules"], objective):
                by_pair.setdefault(name, {})[chain.dtype, objective] = found
    head = [
        f"{dtype}: {title}" for dtype in DTYPES
        for title in ("stock / ours, us", "saved", "for traffic: stock / ours", "saved", "possible")
    ]  # fmt: skip

    def share(found: dict[str, Any], name: str) -> str:
        return "-" if found.get(name) is None else f"{found[name]:.0%}"

    def cells(found: dict[tuple[str, str], dict[str, Any]], dtype: str) -> list[str]:
        fast, lean = (found.get((dtype, objective), {}) for objective in OBJECTIVES)
        ratios = [f"{part['ratio']:.2f}" + " (two)" * (not part["fused"]) if part else "-" for part in (fast, lean)]
        times = f"{fast['stock']:.1f} / {fast['us']:.1f} = " if fast else ""
        return [times + ratios[0], share(fast, "saved"), ratios[1], share(lean, "saved"),
                share(fast or lean, "possible")]  # fmt: skip

    lines = ["| pair | layers | " + " | ".join(head) + " |", "|---|---|" + "---:|" * len(head)]
    lines += [
        "| " + " | ".join([name, shape[name], *(cell for dtype in DTYPES for cell in cells(found, dtype))]) + " |"
        for name, found in by_pair.items()
    ]
    for dtype in DTYPES:
        for objective in OBJECTIVES:
            known = [found[dtype, objective] for found in by_pair.values() if (dtype, objective) in found]
            if known:
                lines += ["", f"**{dtype}, planned for {objective}**: {together(known)}"]
    return lines


def together(found: list[dict[str, Any]]) -> str:
    """What the pairs say in a few sentences."""
    ratios = [item["ratio"] for item in found]
    fused = [item for item in found if item["fused"]]
    mean = statistics.geometric_mean(ratios)
    text = (
        f"{len(found)} pairs: stock's time over ours {max(ratios):.2f} at best, {mean:.2f} in the geometric mean, "
        f"{min(ratios):.2f} at worst; {len(fused)} fused, "
        f"{sum(item['ratio'] < 1 for item in fused)} of them slower than stock."
    )
    counted = [item for item in found if item["saved"] is not None]
    if counted:
        saved = [item["saved"] for item in counted]
        share, by_sms = (
            statistics.median(item[saved] / item[possible] for item in counted) for saved, possible, *_ in COUNTED
        )
        text += (
            f" Accesses saved: {max(saved):.0%} at best, {statistics.median(saved):.0%} in the median, "
            f"{min(saved):.0%} at worst; {share:.0%} of what is possible, in the median "
            f"({by_sms:.0%} of what SMs ask for)."
        )
    return text


def render(path: Path = RESULTS) -> str:
    """The table of docs/paper.md as Markdown."""
    if not path.exists():
        return "Not measured yet.\n"
    data = confirm.read(path)
    where = data["environment"]
    note = f"Measured on {where['gpu']}, ONNX Runtime {where['onnxruntime']}, cuDNN {where['cudnn']}, CUDA driver "
    note += f"{where['cuda_driver']}, {where['date'][:10]}, revision {where['revision']}"
    if "known" in data:
        note += f"; stock, and tiles that were planned before, at revision {data['known']['revision']}"
    note += "."
    return "\n".join([*table(data), "", note, ""])


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    if not args.jobs.exists():
        confirm.write(args.jobs, prepare(args))
    jobs = confirm.read(args.jobs)
    jobs["environment"] = bench.environment()
    if args.known:
        keep(jobs, confirm.read(args.known))
    new = whole(jobs, [module for module in jobs["modules"] if "counted" not in module])
    print(f"{dict(confirm.timing(new, started + args.seconds))} in {time.monotonic() - started:.0f} s", flush=True)
    part_jobs = args.jobs.with_name(f"part_{args.jobs.name}")
    confirm.write(part_jobs, new)

    def left() -> float:
        return float(started + args.seconds - time.monotonic())

    parts: list[Callable[[], None]] = [
        lambda: confirm.traffic(new, part_jobs),
        lambda: stock_times(jobs, time.monotonic() + TIMED * left()),
        lambda: stock_traffic(jobs, part_jobs, left()),
    ]
    for part in parts:
        try:
            part()
        except FcmError as error:
            print(error, file=sys.stderr)
        print(f"{time.monotonic() - started:.0f} s", flush=True)
        confirm.write(args.out, jobs)
    print("\n".join(line for line in table(jobs) if line.startswith("**")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "run", "launch", "show"])
    parser.add_argument("--jobs", type=Path, default=JOBS)
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--known", type=Path, help="results to take what is the same from")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return confirm.perform(parser.parse_args(), prepare, launch, run, [render])


if __name__ == "__main__":
    sys.exit(main())
