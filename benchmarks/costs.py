"""What a network costs besides time, stock and rewritten: device-memory traffic, energy, peak GPU memory.

    python -m benchmarks.costs --models DIR [--networks mobilenetv2_100] [--dtype float16] [--batch 128]
        [--seconds 4] [--out benchmarks/results/costs.json]

Each setting runs in a process of its own. Energy: NVML's total energy over at least `--seconds` of steady running with
graph capture; idle power is part of it. Memory: the most that this process's start and runs added on the GPU. Traffic:
ncu's dram__bytes and lts__t_bytes over all kernels of one run, without graph capture, caches as the run before left
them. Needs nvidia-ml-py, and ncu on the path for the traffic.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ort_fcm
from benchmarks.models import network
from ort_fcm import bench

METRICS = {"dram__bytes.sum": "dram_bytes", "lts__t_bytes.sum": "l2_bytes"}
RESULTS = Path(__file__).parent / "results"


def _runner(args: argparse.Namespace, graph: bool) -> bench.Runner:
    import onnxruntime as ort

    bench.require_provider("cuda")
    model = network(args.networks, args.dtype, args.batch, args.models)
    rewritten = args.setting == "rewritten"
    if rewritten:
        model = ort_fcm.rewrite(model, gpu=args.gpu, check=False).model
    setting = bench.Setting(rewritten, nhwc=args.setting == "NHWC", graph=graph)
    host = bench.structured_inputs(model)
    feeds = {name: ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in host.items()}
    outputs = bench.Runner(model, bench.Setting(rewritten, setting.nhwc), feeds, None, "cuda").results()
    shapes = {name: (value.shape, value.dtype) for name, value in outputs.items()}
    return bench.Runner(model, setting, feeds, shapes, "cuda")


def steady(args: argparse.Namespace) -> dict[str, Any]:
    """Energy and time a run, and peak memory, of one setting in this process."""
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetMemoryInfo(gpu).used
    runner = _runner(args, graph=True)
    peak = 0
    for _ in range(30):
        runner.run()
        peak = max(peak, pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
    joules, started, runs = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3, time.perf_counter(), 0
    while time.perf_counter() - started < args.seconds:
        for _ in range(20):
            runner.run()
        runs += 20
    elapsed = time.perf_counter() - started
    joules = pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3 - joules
    return {
        "joules_a_run": joules / runs,
        "watts": joules / elapsed,
        "ms_a_run": elapsed / runs * 1e3,
        "runs": runs,
        "memory_bytes": peak - before,
    }


def profiled(args: argparse.Namespace) -> dict[str, Any]:
    """One run between the profiler's start and stop, for ncu to look at."""
    runner = _runner(args, graph=False)
    for _ in range(3):
        runner.run()
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    runner.run()
    driver.cuProfilerStop()
    return {}


def traffic(log: str) -> dict[str, Any]:
    """Sums over kernels of ncu's CSV output in base units."""
    lines = log.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise RuntimeError(f"ncu gave no table: {log[-500:]}")
    found = dict.fromkeys(METRICS.values(), 0.0)
    kernels = set()
    for row in csv.DictReader(lines[header:]):
        if row["Metric Name"] in METRICS:
            if row["Metric Unit"] != "byte":
                raise RuntimeError(f"ncu gave {row['Metric Name']} in {row['Metric Unit']}, not bytes")
            found[METRICS[row["Metric Name"]]] += float(row["Metric Value"].replace(",", ""))
            kernels.add(row["ID"])
    return {**found, "kernels": len(kernels)}


def measure(args: argparse.Namespace, name: str, setting: str) -> dict[str, Any]:
    """Both processes of one setting; what failed is told in `fault`."""
    command = [sys.executable, "-m", "benchmarks.costs", "--networks", name, "--dtype", args.dtype, "--batch",
               str(args.batch), "--seconds", str(args.seconds), "--gpu", args.gpu, "--setting", setting]  # fmt: skip
    if args.models:
        command += ["--models", str(args.models)]
    cell: dict[str, Any] = {"network": name, "dtype": args.dtype, "batch": args.batch, "setting": setting}
    done = subprocess.run([*command, "--stage", "steady"], capture_output=True, text=True)
    if done.returncode:
        return cell | {"fault": done.stderr[-500:]}
    cell |= json.loads(done.stdout.splitlines()[-1])
    if shutil.which("ncu"):
        ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv",
               "--print-units", "base", "--metrics", ",".join(METRICS)]  # fmt: skip
        done = subprocess.run([*ncu, *command, "--stage", "profiled"], capture_output=True, text=True)
        cell |= traffic(done.stdout) if not done.returncode else {"fault": (done.stderr or done.stdout)[-500:]}
    return cell


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--networks", default="mobilenetv2_100")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--settings", default="NHWC,rewritten", help="of NCHW, NHWC and rewritten")
    parser.add_argument("--out", type=Path, default=RESULTS / "costs.json")
    parser.add_argument("--setting", help=argparse.SUPPRESS)  # this and the next: one process's share
    parser.add_argument("--stage", choices=["steady", "profiled"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.stage:
            print(json.dumps(steady(args) if args.stage == "steady" else profiled(args)))
            return 0
        bench.require_provider("cuda")
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return 2
    cells = []
    for name in args.networks.split(","):
        for setting in args.settings.split(","):
            cells.append(measure(args, name, setting))
            print(json.dumps(cells[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": bench.environment(), "results": cells}, indent=1) + "\n")
    return int(any("fault" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
