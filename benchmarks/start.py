"""What a session's start costs: made and run once, with a cold and with a warm cache of kernels, and by stock.

    python -m benchmarks.start [--dtypes float16,float32] [--batches 1,128] [--runs 3]
        [--out benchmarks/results/start_h200.json]

MobileNetV2 of the example, planned for the GPU present. Each start is one process's, which has CUDA up already, as it
has run a network of one node; input and output lie on the GPU. Cold: with an empty cache, so that every kernel is
compiled. Loading cuDNN, and its search for convolutions as by default, are part of stock's start. The table of
docs/performance.md shows medians of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import ort_fcm
from benchmarks.models import descriptions
from benchmarks.networks import RESULTS
from examples import mobilenetv2
from ort_fcm import bench
from ort_fcm.rewrite.pipeline import choose_gpu

KINDS = ("stock", "cold", "warm")


def nothing() -> onnx.ModelProto:
    """A network of one node, which brings CUDA up."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "nothing", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def start(path: Path, provider: str) -> float:
    """Seconds to make a session of the model and run it once, in this process."""
    import onnxruntime as ort

    bench.require_provider(provider)
    x = ort.OrtValue.ortvalue_from_numpy(np.zeros(8, np.float32), provider, 0)
    bench.Runner(nothing(), bench.Setting(False), {"x": x}, None, provider)
    model = onnx.load(path)
    feeds = {
        name: ort.OrtValue.ortvalue_from_numpy(value, provider, 0)
        for name, value in bench.structured_inputs(model).items()
    }
    rewritten = any(node.op_type == "FusedConvModule" for node in model.graph.node)
    return bench.Runner(model, bench.Setting(rewritten), feeds, None, provider).start_s


def measure(dtype: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every start of one network, by kind."""
    stock = mobilenetv2.build(batch, dtype)
    rewritten = ort_fcm.rewrite(stock, gpu=args.gpu, check=False).model
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"{kind}.onnx" for kind in KINDS}
        for kind, file in files.items():
            onnx.save(stock if kind == "stock" else rewritten, file)
        for run in range(args.runs):
            environment = os.environ | {"ORT_FCM_CACHE": f"{folder}/cache{run}"}  # warm comes after cold
            for kind, file in files.items():
                command = [sys.executable, "-m", "benchmarks.start", "--provider", args.provider, "--model", str(file)]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                seconds[kind].append(float(done.stdout.split()[-1]))
    return {"network": "mobilenetv2", "dtype": dtype, "batch": batch, "kernels": len(descriptions(rewritten)),
            "seconds": seconds}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float16,float32")
    parser.add_argument("--batches", default="1,128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--gpu", help="the GPU to plan for; default: the one present")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "start_h200.json")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # time one start in this process
    args = parser.parse_args()
    if args.model:
        print(start(args.model, args.provider))
        return 0
    try:
        bench.require_provider(args.provider)
        args.gpu = choose_gpu(args.gpu)[0].name
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    for dtype in args.dtypes.split(","):
        for batch in map(int, args.batches.split(",")):
            results.append(measure(dtype, batch, args))
            args.out.write_text(json.dumps({"environment": bench.environment(), "results": results}, indent=1) + "\n")
            times = ", ".join(f"{k} {statistics.median(s):.2f} s" for k, s in results[-1]["seconds"].items())
            print(f"mobilenetv2 {dtype} batch {batch}, {results[-1]['kernels']} kernels: {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
