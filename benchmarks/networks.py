"""Times networks against stock ONNX Runtime at its best, and holds both against float64; results go to a JSON file.

    python -m benchmarks.networks --models DIR [--networks mobilenetv2_100,...] [--dtypes float16,float32]
        [--batches 128,16,1] [--seconds 500] [--out benchmarks/results/networks.json]

Cells that the file already has are left (give another --out, or --again, to measure anew), and no cell is begun after
--seconds, so a run can be cut into pieces. Each cell is one process's measurement of all settings, interleaved; its
date, versions and revision stand beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import print as show

import ort_fcm
from benchmarks import reference
from benchmarks.convolution import Array
from benchmarks.models import network
from ort_fcm import bench

NETWORKS = (
    "mobilenetv2_100", "mobilenetv1_100", "efficientnet_lite0", "mnasnet_100", "mobilenetv4_conv_small", "xception41",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def errors(result: bench.Result, kept: Mapping[str, Mapping[str, Array]], exact: Mapping[str, Array]) -> dict[str, Any]:
    """Norm of the difference from float64 over its norm: of stock's and of the rewritten network's fastest setting."""
    found: dict[str, Any] = {}
    for name, rewritten in (("stock", False), ("rewritten", True)):
        best = result.best(rewritten)
        if best:
            few = {key: value[: len(exact[key])] for key, value in kept[best.setting.name].items()}
            found[name] = bench.difference(few, exact)
    if len(found) == 2 and found["stock"]:
        found["ratio"] = found["rewritten"] / found["stock"]
    return found


def cell(name: str, dtype: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one network in one type at one batch."""
    stock = network(name, dtype, batch, args.models)
    done = ort_fcm.rewrite(stock, gpu=args.gpu, check=False)
    kept: dict[str, dict[str, Array]] = {}
    result = bench.measure(
        name,
        stock,
        done.model,
        device=args.provider,
        runs=args.runs,
        warmup=args.warmup,
        report=bench.summary(done.report),
        keep=kept,
    )
    show(bench.table([result]))
    exact = reference.run(stock, kept["inputs"], args.images)
    return result.to_dict() | {"error": errors(result, kept, exact), "environment": bench.environment()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with NAME*.onnx, static batch or dynamic, float32")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--dtypes", default="float16,float32")
    parser.add_argument("--batches", default="128,16,1")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this many")
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--images", type=int, default=8, help="images of a batch held against float64")
    parser.add_argument("--gpu", help="the GPU to plan for; default: the one present")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--again", action="store_true", help="measure what the file has, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "networks.json")
    args = parser.parse_args()
    started = time.monotonic()
    try:
        bench.require_provider(args.provider)
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return 2
    cells: list[dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    left = failed = 0
    for name in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            for batch in map(int, args.batches.split(",")):
                same = [c for c in cells if (c["network"], c["dtype"], c["batch"]) == (name, dtype, batch)]
                if same and not args.again:
                    continue
                if time.monotonic() - started > args.seconds:
                    left += 1
                    continue
                try:
                    new = cell(name, dtype, batch, args)
                except Exception as error:  # one network that cannot run must not cost the others' results
                    print(f"{name} {dtype} batch {batch}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                cells = [c for c in cells if c not in same] + [new]
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"results": cells}, indent=1) + "\n")
                failed += not new["passed"]
                ratio, error_ratio = new["ratio"], new["error"].get("ratio")
                print(f"{name} {dtype} batch {batch}: ratio {ratio and round(ratio, 2)}, "
                      f"error over stock's {error_ratio and round(error_ratio, 2)}", flush=True)  # fmt: skip
    if left:
        print(f"{left} cells left: out of time; run again")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
