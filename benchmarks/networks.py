"""Times networks against stock ONNX Runtime at its best, and holds both against float64; results go to a JSON file.

    python -m benchmarks.networks --models DIR [--networks mobilenetv2_100,...] [--dtypes float16,float32]
        [--batches 128,16,1] [--captured] [--tune] [--seconds 500] [--out benchmarks/results/networks.json]
    python -m benchmarks.networks --models DIR --coverage [--seconds 240]

Cells that the file already has are left (give another --out, or --again, to measure anew), and no cell is begun after
--seconds, so a run can be cut into pieces. Each cell is one process's measurement of all settings, interleaved; its
date, versions and revision stand beside it.

--tune: plans are chosen by times measured on the GPU (`rewrite(..., tune=True)`), in about a minute a cell; such cells
stand beside those planned by estimate, with `tuned` true.

--coverage: every network of DIR in float16 (a quantised one as it is) at batches 1 and 16, in few runs and with graph
capture, as that is every network's fastest setting, unless it cannot be captured. Only where outputs differ from
stock's by more than rounding explains are both held against float64: right is what is at most twice as far from it as
stock. A network in which nothing is fused is stock's own, and not timed. The results go to coverage_h200.json, from
which `python -m benchmarks.coverage --page` makes its table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
from rich import print as show

import ort_fcm
from benchmarks import reference
from benchmarks.convolution import Array
from benchmarks.models import module_texts, network
from ort_fcm import bench, library
from ort_fcm.device import present_device
from ort_fcm.rewrite.pipeline import choose_gpu

NETWORKS = (
    "mobilenetv2_100", "mobilenetv1_100", "efficientnet_lite0", "mnasnet_100", "mobilenetv4_conv_small", "xception41",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
COVERAGE = RESULTS / "coverage_h200.json"
# Rewritten in NHWC too: ONNX Runtime then joins its own changes of layout, around pools, with the rewriter's.
CAPTURED = (*(setting for setting in bench.CUDA_SETTINGS if setting.graph), bench.Setting(True, nhwc=True, graph=True))
Key = tuple[str, str, int, bool]  # network, type, batch, tuned
Prepared = tuple[bytes, bytes, dict[str, Any]]  # the stock model, the rewritten one, a summary of what was done
Outputs = Mapping[str, Mapping[str, Array]]  # by setting, then by name


def error(setting: bench.Setting, kept: Outputs, exact: Mapping[str, Array]) -> float:
    """Norm of the difference from float64 over its norm."""
    return bench.difference({key: value[: len(exact[key])] for key, value in kept[setting.name].items()}, exact)


def errors(result: bench.Result, kept: Outputs, exact: Mapping[str, Array]) -> dict[str, Any]:
    """The error of stock's and of the rewritten network's fastest setting."""
    found: dict[str, Any] = {}
    for name, rewritten in (("stock", False), ("rewritten", True)):
        best = result.best(rewritten)
        if best:
            found[name] = error(best.setting, kept, exact)
    if len(found) == 2 and found["stock"]:
        found["ratio"] = found["rewritten"] / found["stock"]
    return found


def right(result: bench.Result, kept: Outputs, exact: Mapping[str, Array]) -> bool:
    """Whether the rewritten network is at most twice as far from float64, in any setting, as stock in some setting, or
    as rounding explains; at most so far as means anything."""
    stock, rewritten = (
        [error(t.setting, kept, exact) for t in result.timings if t.setting.rewritten == kind and t.error is None]
        for kind in (False, True)
    )
    limit = max(bench.TOLERANCE[result.dtype], min(2 * max(stock, default=0.0), bench.MOST_TOLERANCE))
    return bool(rewritten) and max(rewritten) <= limit


def prepare(name: str, dtype: str, batch: int, tuned: bool, models: Path, gpu: str) -> Prepared:
    """The network in the type, a quantised one as it is, and rewritten for the GPU; tuned: on it."""
    try:
        stock = network(name, dtype, batch, models)
    except ort_fcm.FcmError as error:
        if "quantised" not in str(error):
            raise
        stock = network(name, "float32", batch, models)
    done = ort_fcm.rewrite(stock, gpu=gpu, check=False, tune=tuned)
    if device := present_device():  # compiled here, many networks at a time, kernels are there when the session is made
        for text in module_texts(done.model):
            library.compile_kernel(text, device.architecture)
    return stock.SerializeToString(), done.model.SerializeToString(), bench.summary(done.report)


def cell(key: Key, prepared: Prepared, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network in one type at one batch."""
    data, rewritten, report = prepared
    if args.coverage and not report["in_modules"]:
        where = dict(zip(("network", "dtype", "batch", "tuned"), key, strict=True))
        return where | {"ratio": None, "passed": True, "unchanged": True}
    stock = onnx.load_from_string(data)
    kept: dict[str, dict[str, Array]] = {}
    bench.require_provider(args.provider)  # which opens libraries, in this process too

    def measure(settings: tuple[bench.Setting, ...] | None) -> bench.Result:
        return bench.measure(
            key[0],
            stock,
            onnx.load_from_string(rewritten),
            device=args.provider,
            settings=settings,
            runs=args.runs,
            warmup=args.warmup,
            report=report,
            keep=kept,
        )

    result = measure(CAPTURED if args.captured and args.provider == "cuda" else None)
    if not (result.best(False) and result.best(True)):  # it cannot be captured
        result = measure(None)
    if not args.coverage:
        show(bench.table([result]))
    values = result.to_dict() | {"dtype": key[1], "tuned": key[3], "environment": bench.environment()}
    if args.coverage and (result.passed or not (result.best(False) and result.best(True))):
        return values
    images = key[2] if args.coverage else args.images  # some of them have the batch in a constant
    exact = reference.run(stock, kept["inputs"], images)
    values["error"] = errors(result, kept, exact)
    if args.coverage:
        values["passed"] = right(result, kept, exact)
    return values


def key_of(cell: Mapping[str, Any]) -> Key:
    return cell["network"], cell["dtype"], cell["batch"], cell.get("tuned", False)


def line(cell: Mapping[str, Any]) -> str:
    """A cell in one line."""
    where = f"{cell['network']} {cell['dtype']} batch {cell['batch']}{', tuned' * key_of(cell)[3]}"
    if "failed" in cell:
        return f"{where}: failed: {cell['failed']}"
    if "unchanged" in cell:
        return f"{where}: nothing is fused"
    ran = {t["name"]: t for t in cell["timings"] if t["median_ms"] is not None}
    times = ", ".join(f"{name} {t['median_ms']:.3g} ms" for name, t in ran.items())
    worst = max((t["difference"] for t in ran.values() if t["setting"]["rewritten"]), default=float("nan"))
    error = cell.get("error", {}).get("ratio")
    return (
        f"{where}: ratio {cell['ratio'] or float('nan'):.2f} ({times}), difference {worst:.1e}"
        + (f", error over stock's {error:.2f}" if error else "")
        + ("" if cell["passed"] else ", NOT RIGHT")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with NAME*.onnx, static batch or dynamic, float32")
    parser.add_argument("--coverage", action="store_true", help="every network of the directory, in few runs")
    parser.add_argument("--captured", action="store_true", help="only settings with graph capture, the fastest so far")
    parser.add_argument("--tune", action="store_true", help="choose by times measured on the GPU present")
    parser.add_argument("--networks")
    parser.add_argument("--dtypes")
    parser.add_argument("--batches")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this many")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--images", type=int, default=8, help="images of a batch held against float64")
    parser.add_argument("--gpu", help="the GPU to plan for; default: the one present")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.captured |= args.coverage
    every = ",".join(sorted(path.stem for path in args.models.glob("*.onnx"))) if args.models else ""
    if args.coverage:
        defaults: dict[str, Any] = {"networks": every, "dtypes": "float16", "batches": "1,16", "runs": 40, "warmup": 5}
    else:
        defaults = {"networks": ",".join(NETWORKS), "dtypes": "float16,float32", "batches": "128,16,1", "runs": 150,
                    "warmup": 30}  # fmt: skip
    defaults["out"] = COVERAGE if args.coverage else RESULTS / "networks.json"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    started = time.monotonic()
    try:
        bench.require_provider(args.provider)
        gpu = choose_gpu(args.gpu)[0].name
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return 2
    cells: dict[Key, dict[str, Any]] = {}
    if args.out.exists():
        cells = {key_of(c): c for c in json.loads(args.out.read_text())["results"]}
    wanted: list[Key] = [
        (name, dtype, int(batch), args.tune)
        for name in args.networks.split(",")
        for dtype in args.dtypes.split(",")
        for batch in args.batches.split(",")
    ]
    wanted = [key for key in wanted if args.again or key not in cells or "ratio" not in cells[key]]
    left = failed = 0
    processes = get_context("spawn")
    with ProcessPoolExecutor(mp_context=processes) as pool:
        futures = {key: pool.submit(prepare, *key, args.models, gpu) for key in wanted if not args.tune}
        wait(futures.values())  # planning beside a measurement would disturb it
    worker = ProcessPoolExecutor(1, processes)
    for key in wanted:
        if time.monotonic() - started > args.seconds:
            left += 1
            continue
        try:
            prepared = futures.get(key) or worker.submit(prepare, *key, args.models, gpu)
            cells[key] = worker.submit(cell, key, prepared.result(), args).result()
        except Exception as error:  # one network that cannot run must not cost the others' results
            worker.shutdown(wait=False)  # a CUDA error can outlast the session
            worker = ProcessPoolExecutor(1, processes)
            reason = " ".join(str(error).split())[:300]
            where = dict(zip(("network", "dtype", "batch", "tuned"), key, strict=True))
            cells[key] = {**where, "passed": False, "failed": reason}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"results": list(cells.values())}, indent=1) + "\n")
        failed += not cells[key]["passed"]
        print(f"{time.monotonic() - started:4.0f} s: {line(cells[key])}", flush=True)
    worker.shutdown()
    if left:
        print(f"{left} cells left: out of time; run again")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
