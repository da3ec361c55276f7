"""What a new size costs: the first and the second run at sizes not seen before, against steady runs at each.

    python -m benchmarks.sizes [--models DIR] [--seconds 40] [--out benchmarks/results/sizes_h200.json]

Networks with dynamic batch, height and width, in float16: the example's MobileNetV2, all of which runs in modules, and,
of DIR, ppocrv3_det, some of whose convolutions are left to cuDNN. Rewritten first, then stock, as long as the seconds
last. Inputs lie on the device and so do outputs, which ONNX Runtime allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import onnx

import ort_fcm
from benchmarks.models import float16_throughout
from benchmarks.networks import RESULTS
from examples import mobilenetv2
from ort_fcm import bench
from ort_fcm.compare import structured
from ort_fcm.rewrite.float16 import to_float16
from ort_fcm.rewrite.load import load

SIZES = ((1, 640, 640), (1, 320, 320), (1, 736, 1280), (2, 96, 160), (1, 32, 32), (1, 448, 608), (4, 224, 224),
         (1, 992, 416), (3, 640, 384), (1, 1280, 1280))  # fmt: skip
STEADY = 15  # runs


def networks(directory: Path | None) -> dict[str, onnx.ModelProto]:
    """The networks by name, float16 throughout."""
    dynamic = mobilenetv2.build("batch", "float16")
    for axis, name in ((2, "height"), (3, "width")):
        dynamic.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    found = {"mobilenetv2": dynamic}
    if directory is not None:
        text_detector = load(directory / "ppocrv3_det.onnx")
        found["ppocrv3_det"] = float16_throughout(to_float16(text_detector))
    return found


def measure(model: onnx.ModelProto, rewritten: bool, provider: str, until: float) -> list[dict[str, Any]]:
    """A row for each size, until that time; milliseconds."""
    import onnxruntime as ort

    rows: list[dict[str, Any]] = []
    runner = None
    for n, h, w in SIZES:
        if time.monotonic() > until:
            break
        value = ort.OrtValue.ortvalue_from_numpy(structured((n, 3, h, w), "tensor(float16)"), provider, 0)
        feeds = {model.graph.input[0].name: value}
        if runner is None:
            runner = bench.Runner(model, bench.Setting(rewritten), feeds, None, provider)
            continue  # a session's start is no new size
        for name, fed in feeds.items():
            runner.binding.bind_ortvalue_input(name, fed)
        times = []
        for _ in range(2 + STEADY):
            for output in runner.session.get_outputs():  # a binding keeps what it allocated
                runner.binding.bind_output(output.name, provider)
            begin = time.perf_counter()
            runner.run()
            times.append(1e3 * (time.perf_counter() - begin))
        steady = statistics.median(times[2:])
        rows.append({"size": [n, h, w], "first_ms": times[0], "second_ms": times[1], "steady_ms": steady,
                     "slowest_steady_ms": max(times[2:])})  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with ppocrv3_det.onnx")
    parser.add_argument("--seconds", type=float, default=40, help="begin no size after this many")
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "sizes_h200.json")
    args = parser.parse_args()
    try:
        bench.require_provider(args.provider)
        found = networks(args.models)
    except ort_fcm.FcmError as error:
        print(error, file=sys.stderr)
        return 2
    results: list[dict[str, Any]] = []
    rewritten = {name: ort_fcm.rewrite(model, check=False).model for name, model in found.items()}
    until = time.monotonic() + args.seconds
    for models, ours in ((rewritten, True), (found, False)):
        for name, model in models.items():
            rows = measure(model, ours, args.provider, until)
            results.append({"network": name, "rewritten": ours, "rows": rows})
            args.out.write_text(json.dumps({"environment": bench.environment(), "results": results}, indent=1) + "\n")
            for row in rows:
                size = "x".join(map(str, row["size"]))
                print(f"{name:12} {'ort_fcm' if ours else 'stock':8} {size:12} first {row['first_ms']:8.2f} ms, "
                      f"second {row['second_ms']:7.3f}, steady {row['steady_ms']:7.3f}, second / steady "
                      f"{row['second_ms'] / row['steady_ms']:.2f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
