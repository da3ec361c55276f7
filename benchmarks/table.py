"""Renders tables of benchmarks/results between markers in README.md and pages of docs.

    python -m benchmarks.table [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a file of benchmarks/results without
`.json`, with `/float16` or such to keep one type, `steps` (see benchmarks/steps.py), `paper` (see
benchmarks/paper.py), or one of the tables of benchmarks/confirm.py. `--check` changes nothing and
fails where a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import confirm, paper, steps

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/planner.md", "docs/paper.md")
MARKED = re.compile(r"(<!-- table: (\S+?)(?:/(\S+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def number(value: float | None, form: str = ".3g") -> str:
    """The number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def render(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of networks' cells: times in milliseconds a batch, errors against float64."""
    if not cells:
        return "Not measured yet.\n"
    lines = [
        "| network | type | batch | stock at its best, ms | ort_fcm, ms | ratio | error, stock | error, ort_fcm |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in sorted(cells, key=lambda c: (c["network"], c["dtype"], c["batch"])):
        ran = [t for t in c["timings"] if t["median_ms"] is not None]
        best = {
            kind: min((t["median_ms"] for t in ran if t["setting"]["rewritten"] == kind), default=None)
            for kind in (False, True)
        }
        dtype = "float32 (TF32)" if c["dtype"] == "float32" else c["dtype"]
        error = c.get("error", {})
        lines.append(
            f"| {c['network']} | {dtype} | {c['batch']} | {number(best[False])} ({(c['best_stock'] or '-')[6:]}) "
            f"| {number(best[True])} | {number(c['ratio'], '.2f')} | {number(error.get('stock'), '.1e')} "
            f"| {number(error.get('rewritten'), '.1e')} |"
        )
    return "\n".join([*lines, "", measured_on(cells), ""])


def measured_on(cells: list[dict[str, Any]]) -> str:
    """Where and when the cells were measured, as a sentence."""
    where = {
        (e["gpu"], e["onnxruntime"], e["cudnn"], e["cuda_driver"], e["date"][:10], e["revision"])
        for e in (c["environment"] for c in cells if "environment" in c)
    }
    if not where:
        return "Not measured yet."
    notes = [
        f"{gpu}, ONNX Runtime {ort}, cuDNN {cudnn}, CUDA driver {driver}, {date}, revision {revision}"
        for gpu, ort, cudnn, driver, date, revision in sorted(where, key=str)
    ]
    return "Measured on " + "; ".join(notes) + "."


def _table(name: str, dtype: str | None) -> str:
    if name in confirm.TABLES:
        return confirm.render(name)
    if name == "paper":
        return paper.render()
    return steps.render() if name == "steps" else render(_results(name, dtype))


def _results(name: str, dtype: str | None) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    cells: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
    return [cell for cell in cells if dtype in (None, cell["dtype"])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = False
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = MARKED.sub(lambda m: m[1] + _table(m[2], m[3]) + m[4], text)
        if new != text:
            stale = True
            print(f"{page}: {'out of date' if args.check else 'updated'}")
            if not args.check:
                (ROOT / page).write_text(new)
    return int(stale and args.check)


if __name__ == "__main__":
    sys.exit(main())
