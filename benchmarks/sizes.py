"""What a new size costs: the first runs at sizes not seen before, against steady runs at each.

    python -m benchmarks.sizes [--models DIR] [--seconds 45] [--out benchmarks/results/sizes_h200.json]

Networks with dynamic batch, height and width, in float16: of DIR, ppocrv3_det, some of whose convolutions are left to
cuDNN, which is searched at each new size, and the example's MobileNetV2, all of which runs in modules. Each rewritten,
rewritten without ONNX Runtime's memory pattern (by which a size's second run allocates one block for all its tensors),
and stock, whose search takes seconds, at a few of the sizes, as long as the seconds last. Inputs lie on the device and
so do outputs, which ONNX Runtime allocates. A run after a pause, at a size that is known by then, tells what of the
second run's time is the processors' waking up. `python -m benchmarks.table` makes the table of docs/performance.md.
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

START = (1, 640, 640)  # a session's start is no new size
SIZES = ((1, 320, 320), (1, 736, 1280), (2, 96, 160), (4, 224, 224), (1, 1280, 1280))
OF_STOCK = 3  # of these
KINDS = {"ort_fcm": (True, True), "ort_fcm, no memory pattern": (True, False), "stock": (False, True)}
FIRST = ("first_ms", "second_ms", "third_ms")
STEADY = 15  # runs
PAUSED = 5  # runs, each after a pause as long as the first run took, but at most
PAUSE_S = 0.25


def networks(directory: Path | None) -> dict[str, onnx.ModelProto]:
    """The networks by name, float16 throughout."""
    dynamic = mobilenetv2.build(dtype="float16")
    for axis, name in ((2, "height"), (3, "width")):
        dynamic.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    if directory is None:
        return {"mobilenetv2": dynamic}
    text_detector = load(directory / "ppocrv3_det.onnx")
    return {"ppocrv3_det": float16_throughout(to_float16(text_detector)), "mobilenetv2": dynamic}


def measure(model: onnx.ModelProto, kind: str, provider: str, until: float) -> list[dict[str, Any]]:
    """A row for each size, until that time; milliseconds."""
    import onnxruntime as ort

    (rewritten, pattern), rows = KINDS[kind], list[dict[str, Any]]()
    runner = None
    for n, h, w in (START, *SIZES[: len(SIZES) if rewritten else OF_STOCK]):
        if time.monotonic() > until:
            break
        value = ort.OrtValue.ortvalue_from_numpy(structured((n, 3, h, w), "tensor(float16)"), provider, 0)
        feeds = {model.graph.input[0].name: value}
        if runner is None:
            runner = bench.Runner(model, bench.Setting(rewritten), feeds, None, provider, memory_pattern=pattern)
            continue
        for name, fed in feeds.items():
            runner.binding.bind_ortvalue_input(name, fed)
        times = list[float]()
        for i in range(len(FIRST) + STEADY + PAUSED):
            for output in runner.session.get_outputs():  # a binding keeps what it allocated
                runner.binding.bind_output(output.name, provider)
            if i >= len(FIRST) + STEADY:
                time.sleep(min(times[0] / 1e3, PAUSE_S))
            begin = time.perf_counter()
            runner.run()
            times.append(1e3 * (time.perf_counter() - begin))
        steady = times[len(FIRST) : -PAUSED]
        rows.append({"size": [n, h, w], **dict(zip(FIRST, times, strict=False)),
                     "steady_ms": statistics.median(steady), "slowest_steady_ms": max(steady),
                     "paused_ms": statistics.median(times[-PAUSED:])})  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with ppocrv3_det.onnx")
    parser.add_argument("--seconds", type=float, default=45, help="begin no size after this many")
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
    for name in found:
        for kind, (ours, _) in KINDS.items():
            rows = measure((rewritten if ours else found)[name], kind, args.provider, until)
            results.append({"network": name, "kind": kind, "rows": rows})
            args.out.write_text(json.dumps({"environment": bench.environment(), "results": results}, indent=1) + "\n")
            for row in rows:
                size = "x".join(map(str, row["size"]))
                print(f"{name:12} {kind:26} {size:12} first {row['first_ms']:8.2f} ms, second {row['second_ms']:7.3f}, "
                      f"third {row['third_ms']:7.3f}, steady {row['steady_ms']:7.3f}, after a pause "
                      f"{row['paused_ms']:7.3f}, second / steady "
                      f"{row['second_ms'] / row['steady_ms']:.2f}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
