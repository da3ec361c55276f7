"""What becomes of the convolutions of real networks: benchmarks/results/coverage.json and docs/coverage.md.

    python -m benchmarks.coverage DIRECTORY [--gpu H200] [--only NAME ...]
    python -m benchmarks.coverage --page

DIRECTORY holds networks (*.onnx) and architectures.py, which unpacks more. Each is rewritten as it is, planned for
batch 1, and compared with the original on the CPU provider on structured inputs, with the library and without it.
--page writes docs/coverage.md anew from the results, and from those of `python -m benchmarks.networks --coverage`: the
times on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

import ort_fcm
from benchmarks import table
from benchmarks.networks import COVERAGE
from ort_fcm.compare import compare
from ort_fcm.rewrite.graph import attributes, label
from ort_fcm.rewrite.load import load
from ort_fcm.rewrite.match import CONVOLUTIONS
from ort_fcm.rewrite.report import without_names
from ort_fcm.rewrite.shapes import infer

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
OVERRIDABLE = "also a graph input"  # of such a network, the caller's word is taken
INTRODUCTION = """# Coverage

Made by `python -m benchmarks.coverage`: {networks} real networks as float32 files, planned for one {gpu} and batch 1.
Depthwise convolutions in modules: {inside} of {depthwise} ({share:.1%}), less those of {excluded}.
"""


def depthwise(model: onnx.ModelProto) -> set[str]:
    """The names of the depthwise convolutions (one input channel a group), channel multipliers included."""
    shapes = infer(model, None).symbolic
    return {
        label(node)
        for node in model.graph.node
        if node.op_type in CONVOLUTIONS
        and attributes(node).get("group", 1) > 1
        and shapes.get(node.input[1], (0, 0))[1] == 1
    }


def kind(reason: str) -> str:
    """A reason without what is of one convolution only: names and times."""
    return re.sub(r"(: [\d.]+ us .*)|( over \d+ channels)", "", without_names(reason))


def measure(path: Path, gpu: str) -> dict[str, Any]:
    """One network's entry."""
    model = load(path)
    found = depthwise(model)
    result = ort_fcm.rewrite(path, gpu=gpu, check=False)
    constants = any(OVERRIDABLE in item.reason for item in result.report.skipped)
    entry: dict[str, Any] = {"network": path.stem, "opset": max(item.version for item in model.opset_import)}
    if constants:
        entry["in_modules_without_constants"] = result.report.in_modules
        result = ort_fcm.rewrite(path, gpu=gpu, check=False, constants=True)
        original = onnx.ModelProto()
        original.CopyFrom(model)
        del original.graph.input[:]
        names = {tensor.name for tensor in model.graph.initializer}
        original.graph.input.extend(value for value in model.graph.input if value.name not in names)
    report = result.report
    skipped = {item.node for item in report.skipped}
    reference = original if constants else path
    errors = {}
    for key, library in (("with_library", ort_fcm.library_path()), ("without_library", None)):
        compared = compare(reference, result.model, library=library)
        assert compared.passed, f"{path.name}: {compared}"
        errors[key] = {"max_abs_error": compared.max_abs_error, "max_rel_error": compared.max_rel_error}
    return entry | {
        "constants": constants,
        "convolutions": report.convolutions,
        "in_modules": report.in_modules,
        "fused_convolutions": report.fused_convolutions,
        "depthwise": len(found),
        "depthwise_in_modules": len(found - skipped),
        "variants": dict(Counter(module.variant for module in report.modules).most_common()),
        "reasons": dict(Counter(kind(item.reason) for item in report.skipped).most_common()),
        "depthwise_reasons": dict(Counter(kind(i.reason) for i in report.skipped if i.node in found).most_common()),
        "traffic_bytes": report.traffic_bytes,
        "dram_bytes": report.dram_bytes,
        "errors": errors,
    }


def ratio(cells: list[dict[str, Any]], network: str, batch: int) -> str:
    """Stock's time over the rewritten network's, and whether its outputs are right where they are not stock's."""
    found = next((c for c in cells if (c["network"], c["batch"]) == (network, batch)), {"passed": True})
    if "unchanged" in found:
        return "unchanged"
    mark = " (2)" if "error" in found else ""
    return (
        "failed"
        if "failed" in found
        else (table.number(found.get("ratio"), ".2f") + mark + ("" if found["passed"] else ", not right"))
    )


def beyond_rounding(cells: list[dict[str, Any]]) -> list[str]:
    """The note (2): cells whose outputs differ from stock's by more than rounding explains."""
    told = [
        f"{c['network']} at batch {c['batch']}, {c['error']['rewritten']:.1e}, stock {c['error']['stock']:.1e}"
        for c in cells if "error" in c
    ]  # fmt: skip
    return ["", f"(2) Against float64, as it differs from stock: {'; '.join(told)}."] if told else []


def page(entries: list[dict[str, Any]], gpu: str, cells: list[dict[str, Any]]) -> str:
    """docs/coverage.md; cells: the times of networks on a GPU."""
    excluded = [e["network"] for e in entries if not e["in_modules"]]
    counted = [e for e in entries if e["network"] not in excluded]
    inside, total = (sum(e[key] for e in counted) for key in ("depthwise_in_modules", "depthwise"))
    lines = [
        INTRODUCTION.format(
            networks=len(entries), gpu=gpu, inside=inside, depthwise=total, share=inside / total,
            excluded=" and ".join(f"`{name}` (int8)" for name in excluded) or "none",
        ),
        "| network | convolutions | in modules | depthwise | in modules | modules by variant | memory, MB: before, "
        "after | largest difference | stock's time over ours, batch 1 | batch 16 |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for e in entries:
        variants = ", ".join(f"{count} {name}" for name, count in e["variants"].items())
        memory = ", ".join(f"{e['dram_bytes'][key] / 1e6:.1f}" for key in ("before", "after"))
        worst = max(item["max_rel_error"] for item in e["errors"].values())
        mark = " (1)" if e["constants"] else ""
        lines.append(
            f"| {e['network']}{mark} | {e['convolutions']} | {e['in_modules']} | {e['depthwise']} "
            f"| {e['depthwise_in_modules']} | {variants or '-'} | {memory} | {worst:.1e} "
            f"| {ratio(cells, e['network'], 1)} | {ratio(cells, e['network'], 16)} |"
        )
    lines += [
        "",
        "(1) With `constants=True`: its weights are graph inputs too, and by default nothing is fused.",
        *beyond_rounding(cells),
        "",
        "The largest difference is over all outputs, relative to the output's largest magnitude, on structured inputs "
        "on the CPU provider, with the library or without.",
        "",
        "Times: the network in float16 (`mobilenetv2_qdq` as it is), input and output on the GPU; stock at the best of "
        "NCHW and NHWC, captured as a graph where that is possible. " + table.measured_on(cells),
        "",
        "Convolutions in no module, by reason:",
        "",
        "| network | convolutions | of them depthwise | reason |",
        "|---|---:|---:|---|",
    ]
    for e in entries:
        for reason, count in e["reasons"].items():
            lines.append(f"| {e['network']} | {count} | {e['depthwise_reasons'].get(reason, 0)} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--page", action="store_true", help="only write the page, from the results")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--only", nargs="*", help="networks to print; nothing is written then")
    args = parser.parse_args()
    cells = json.loads(COVERAGE.read_text())["results"] if COVERAGE.exists() else []
    if args.page:
        done = json.loads(RESULTS.read_text())
        PAGE.write_text(page(done["results"], done["gpu"], cells))
        return
    if args.directory is None:
        parser.error("name a directory of networks")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, args.directory / "architectures.py", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        paths = sorted([*args.directory.glob("*.onnx"), *Path(folder).glob("*.onnx")], key=lambda path: path.name)
        wanted = [path for path in paths if not args.only or path.stem in args.only]
        entries = [measure(path, args.gpu) for path in wanted]
    if args.only:
        print(page(entries, args.gpu, cells))
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"gpu": args.gpu, "batch": 1, "results": entries}, indent=2) + "\n")
    PAGE.write_text(page(entries, args.gpu, cells))


if __name__ == "__main__":
    main()
