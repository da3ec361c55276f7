"""The same networks under torch.compile (reduce-overhead, channels_last), to set beside benchmarks.networks.

    python -m benchmarks.torch_compile [--networks mobilenetv2_100,...] [--dtypes float16] [--batches 128,16,1]
        [--seconds 400] [--out benchmarks/results/torch.json]

Needs PyTorch with CUDA and timm. Weights are random: times do not depend on them. Wall times of one call with the input
on the GPU, synchronised, after warm-up. float32 runs with TF32 allowed, as ONNX Runtime does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.networks import NETWORKS, RESULTS
from ort_fcm import bench

SIZES = {"xception41": 299}


def measure(name: str, dtype: str, batch: int, runs: int) -> dict[str, Any]:
    import timm
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.compiler.reset()  # else a second batch would be compiled for any
    kind = getattr(torch, dtype)
    size = SIZES.get(name, 224)
    model = timm.create_model(name).eval().cuda().to(kind).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device="cuda", dtype=kind).to(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
        for i in range(20 + runs):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            compiled(x)
            torch.cuda.synchronize()
            if i >= 20:
                times.append((time.perf_counter() - begin) * 1e3)
    return {
        "network": name,
        "dtype": dtype,
        "batch": batch,
        "median_ms": statistics.median(times),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "environment": bench.environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--dtypes", default="float16")
    parser.add_argument("--batches", default="128,16,1")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this many")
    parser.add_argument("--out", type=Path, default=RESULTS / "torch.json")
    args = parser.parse_args()
    started = time.monotonic()
    cells: list[dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    for name in args.networks.split(","):
        for dtype in args.dtypes.split(","):
            for batch in map(int, args.batches.split(",")):
                if any((c["network"], c["dtype"], c["batch"]) == (name, dtype, batch) for c in cells):
                    continue
                if time.monotonic() - started > args.seconds:
                    print("out of time; run again for the rest")
                    return 0
                cells.append(measure(name, dtype, batch, args.runs))
                print(f"{name} {dtype} batch {batch}: {cells[-1]['median_ms']:.3f} ms", flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"results": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
