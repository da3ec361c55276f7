"""Rewrites a network, prints what was fused, checks the numbers, and times it against stock ONNX Runtime.

    python examples/compare_with_stock.py [model.onnx] [--gpu H200] [--batch 1,16,128] [--dtype float16]

Without a model, builds MobileNetV2: with an NVIDIA GPU in float16 at batch 1, 16 and 128, compared on the CUDA
provider; else in float32 at batch 1, compared on the CPU provider.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mobilenetv2
import onnx
from rich.console import Console
from rich.table import Table

import ort_fcm
from ort_fcm import bench
from ort_fcm.rewrite.load import load


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.2f}"


def plan_table(report: Mapping[str, Any]) -> Table:
    """A row a module: its variant, tile, traffic and estimated time."""
    table = Table(title=f"plan for {report['gpu']}")
    for column in ("module", "variant", "layers", "tile"):
        table.add_column(column, overflow="fold")
    for column in ("MiB", "us"):
        table.add_column(column, justify="right")
    for module in report["modules"]:
        table.add_row(
            module["name"],
            module["variant"],
            str(len(module["nodes"])),
            module["tile"] or "the library's choice",
            mebibytes(module["traffic_bytes"]),
            f"{module['time_us']:.1f}",
        )
    return table


def print_plan(console: Console, report: Mapping[str, Any]) -> None:
    console.print(plan_table(report))
    reasons: dict[str, int] = {}
    for skipped in report["skipped"]:
        reasons[skipped["reason"]] = reasons.get(skipped["reason"], 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.print(f"  left alone: {count} x {reason}")
    traffic = report["traffic_bytes"]
    console.print(
        f"{report['in_modules']} of {report['convolutions']} convolutions in {len(report['modules'])} modules; "
        f"estimated traffic {mebibytes(traffic['before'])} -> {mebibytes(traffic['after'])} MiB a run"
    )


def compare(console: Console, model: onnx.ModelProto, name: str, batch: int | None, device: str, args: Any) -> bool:
    """One batch: rewrite, print, check and time. Whether the numbers agree."""
    stock = bench.fix_shapes(model, batch)
    done = ort_fcm.rewrite(stock, gpu=args.gpu)  # checks the numbers on the CPU provider as well
    report = done.report.to_dict()
    print_plan(console, report)
    result = bench.measure(
        name,
        stock,
        done.model,
        device=device,
        runs=200 if device == "cuda" else 20,
        warmup=30 if device == "cuda" else 2,
        report=bench.summary(report),
    )
    console.print(bench.table([result]))
    if device == "cpu":
        console.print(
            "[bold]No NVIDIA GPU: timed on the CPU provider.[/bold] The CPU kernel exists for right answers, not for "
            "speed: these times say nothing about a GPU."
        )
    console.print("numbers: PASSED" if result.passed else "[bold red]numbers: FAILED[/bold red]")
    return result.passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="an ONNX file; default: MobileNetV2, built here")
    parser.add_argument("--gpu", default="H200", help="the GPU to plan for (default: %(default)s)")
    parser.add_argument("--batch", default="", help="comma separated; default: the model's own, or 1")
    parser.add_argument("--dtype", choices=["float32", "float16"], help="of the MobileNetV2 built here")
    args = parser.parse_args()
    console = Console()
    try:
        try:
            device = bench.require_provider("cuda")
        except ort_fcm.FcmError as error:
            console.print(f"{error}")
            device = "cpu"
        batches: list[int | None]
        if args.model:
            model, name, batches = load(args.model), args.model.stem, [None]
        elif device == "cuda":
            model, name, batches = mobilenetv2.build(dtype=args.dtype or "float16"), "mobilenetv2", [1, 16, 128]
        else:
            model, name, batches = mobilenetv2.build(dtype=args.dtype or "float32"), "mobilenetv2", [1]
        if args.batch:
            batches = [int(batch) for batch in args.batch.split(",")]
        passed = [compare(console, model, name, batch, device, args) for batch in batches]
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
