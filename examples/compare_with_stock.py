"""Rewrites a network, prints what was fused, checks the numbers, and times it against stock ONNX Runtime.

    python examples/compare_with_stock.py [model.onnx] [--gpu H200] [--batch 1,16,128] [--dtype float16]

Without a model, builds MobileNetV2: with an NVIDIA GPU in float16 at batch 1, 16 and 128, compared on the CUDA
provider; else in float32 at batch 1, compared on the CPU provider.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import mobilenetv2
import onnx
from rich import print as show

import ort_fcm
from ort_fcm import bench
from ort_fcm.rewrite.load import load


def compare(model: onnx.ModelProto, name: str, batch: int | None, device: str, gpu: str) -> bool:
    """One batch: rewrite, print, check and time. Whether the numbers agree."""
    stock = bench.fix_shapes(model, batch)
    done = ort_fcm.rewrite(stock, gpu=gpu)  # which checks the numbers on the CPU provider first
    done.report.print()
    runs, warmup = (200, 30) if device == "cuda" else (20, 2)
    result = bench.measure(name, stock, done.model, device=device, runs=runs, warmup=warmup)
    show(bench.table([result]))
    if device == "cpu":
        show(
            "[bold]No NVIDIA GPU here, so this was the CPU provider.[/bold] The library's CPU kernel is there for right"
            " answers, not for speed: these times say nothing about a GPU."
        )
    show("Numbers against stock: PASSED" if result.passed else "[bold red]Numbers against stock: FAILED")
    return result.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="an ONNX file; default: MobileNetV2, built here")
    parser.add_argument("--gpu", default="H200", help="the GPU to plan for (default: %(default)s)")
    parser.add_argument("--batch", default="", help="comma separated; default: the model's own, or 1")
    parser.add_argument("--dtype", choices=["float32", "float16"], help="of the MobileNetV2 built here")
    args = parser.parse_args()
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "150")
    try:
        device = bench.require_provider("cuda")
    except ort_fcm.FcmError:
        device = "cpu"
    batches: list[int | None]
    try:
        if args.model:
            model, name, batches = load(args.model), args.model.stem, [None]
        elif device == "cuda":
            model, name, batches = mobilenetv2.build(dtype=args.dtype or "float16"), "mobilenetv2", [1, 16, 128]
        else:
            model, name, batches = mobilenetv2.build(dtype=args.dtype or "float32"), "mobilenetv2", [1]
        if args.batch:
            batches = [int(batch) for batch in args.batch.split(",")]
        passed = [compare(model, name, batch, device, args.gpu) for batch in batches]
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
