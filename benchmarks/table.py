"""Renders tables of benchmarks/results between markers in README.md and pages of docs.

    python -m benchmarks.table [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a file of benchmarks/results without
`.json`, with `/float16` or such to keep one type, `torch`, `costs`, `sizes_h200` and `start_h200` (of
benchmarks/torch_compile.py, costs.py, sizes.py and start.py), `ratios` (a short form of networks.json), `steps` (see
benchmarks/steps.py), `paper` (see benchmarks/paper.py), `counters` (see benchmarks/profile.py), or one of the tables of
benchmarks/confirm.py.
`--check` changes nothing and fails where a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks import confirm, paper, profile, steps
from benchmarks.networks import key_of

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/planner.md", "docs/paper.md")
MARKED = re.compile(r"(<!-- table: (\S+?)(?:/(\S+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def number(value: float | None, form: str = ".3g") -> str:
    """The number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def render(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of networks' cells: times in milliseconds a batch, errors against float64; a row says so where
    the plan was tuned."""
    if not cells:
        return "Not measured yet.\n"
    lines = [
        "| network | type | batch | stock at its best, ms | ort_fcm, ms | ratio | error, stock | error, ort_fcm |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in sorted((c for c in cells if "failed" not in c), key=key_of):
        error = c.get("error", {})
        name = c["network"] + ", tuned" * key_of(c)[3]
        lines.append(
            f"| {name} | {_type(c)} | {c['batch']} | {number(_best(c, False))} ({(c['best_stock'] or '-')[6:]}) "
            f"| {number(_best(c, True))} | {number(c['ratio'], '.2f')} | {number(error.get('stock'), '.1e')} "
            f"| {number(error.get('rewritten'), '.1e')} |"
        )
    return "\n".join([*lines, "", measured_on(cells), ""])


def render_ratios(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of networks planned by estimate, a row for each type: by batch, milliseconds of stock and of
    ours, and their ratio."""
    found = {key_of(c): c for c in cells if "failed" not in c and not key_of(c)[3]}
    if not found:
        return "Not measured yet.\n"
    batches = sorted({batch for _, _, batch, _ in found})

    def shown(cell: dict[str, Any] | None) -> str:
        if not cell:
            return "-"
        return f"{number(_best(cell, False))} / {number(_best(cell, True))} = **{number(cell['ratio'], '.1f')}**"

    lines = ["| network | type | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
             "|---|---|" + "---:|" * len(batches)]  # fmt: skip
    for name, dtype in sorted({key[:2] for key in found}):
        row = [found.get((name, dtype, batch, False)) for batch in batches]
        lines.append(f"| {name} | {_type({'dtype': dtype})} | {' | '.join(map(shown, row))} |")
    errors = [c["error"]["ratio"] for c in found.values() if "ratio" in c.get("error", {})]
    close = f" Errors against float64 are {min(errors):.2f} to {max(errors):.2f} of stock's own." if errors else ""
    return "\n".join([*lines, "", measured_on(list(found.values())) + close, ""])


def _type(cell: dict[str, Any]) -> str:
    return "float32 (TF32)" if cell["dtype"] == "float32" else str(cell["dtype"])


def _best(cell: dict[str, Any], rewritten: bool) -> float | None:
    """Milliseconds of the fastest setting."""
    ran = (t["median_ms"] for t in cell["timings"] if t["setting"]["rewritten"] == rewritten)
    return min((ms for ms in ran if ms is not None), default=None)


def render_torch(cells: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """A Markdown table of torch.compile's times beside ours of the same networks, types and batches, planned by
    estimate."""
    if not cells:
        return "Not measured yet.\n"
    known = {key_of(c): _best(c, True) for c in ours if "failed" not in c}
    lines = ["| network | type | batch | torch.compile, ms | ort_fcm, ms | ratio |", "|---|---|---:|---:|---:|---:|"]
    for c in sorted(cells, key=key_of):
        ms = known.get(key_of(c))
        ratio = c["median_ms"] / ms if ms else None
        lines.append(
            f"| {c['network']} | {_type(c)} | {c['batch']} | {number(c['median_ms'])} | {number(ms)} "
            f"| {number(ratio, '.2f')} |"
        )
    versions = sorted({f"PyTorch {c['torch']}, timm {c['timm']}" for c in cells})
    where = sorted({f"{c['environment']['gpu']}, {c['environment']['date'][:10]}" for c in cells})
    return "\n".join([*lines, "", f"torch.compile: {'; '.join(versions)}, on {'; '.join(where)}.", ""])


COSTS = {  # what is shown of a cell of benchmarks.costs: its title, and the unit's size
    "joules_a_run": ("energy a run, J", 1),
    "dram_bytes": ("device memory, read and written a run, MB", 1e6),
    "l2_bytes": ("L2, bytes handled a run, MB", 1e6),
    "memory_bytes": ("peak GPU memory, MB", 1e6),
    "kernels": ("kernels a run", 1),
}


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def render_costs(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of what runs cost besides time, stock in NHWC against rewritten."""
    found = {(c["network"], c["dtype"], c["batch"], c["setting"]): c for c in cells}
    lines = ["| network | type | batch | what | stock, NHWC | ort_fcm | saved |", "|---|---|---:|---|---:|---:|---:|"]
    for (network, dtype, batch, setting), stock in sorted(found.items()):
        ours = found.get((network, dtype, batch, "rewritten"))
        if setting != "NHWC" or not ours:
            continue
        for key, (title, unit) in COSTS.items():
            if key in stock and key in ours:
                before, after = stock[key] / unit, ours[key] / unit
                lines.append(
                    f"| {network} | {_type(stock)} | {batch} | {title} | {_amount(before)} | {_amount(after)} "
                    f"| {1 - after / before:.0%} |"
                )
    if len(lines) == 2:
        return "Not measured yet.\n"
    return "\n".join([*lines, "", measured_on(cells), ""])


def render_sizes(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of runs at sizes not seen before, medians over these."""
    lines = [
        "| network | what | sizes | first run, ms | second | third | steady | after a pause | second over steady |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in (c for c in cells if c["rows"]):
        values = (
            statistics.median(row[name] for row in cell["rows"])
            for name in ("first_ms", "second_ms", "third_ms", "steady_ms", "paused_ms")
        )
        over = statistics.median(row["second_ms"] / row["steady_ms"] for row in cell["rows"])
        times = " | ".join(map(number, values))
        lines.append(f"| {cell['network']} | {cell['kind']} | {len(cell['rows'])} | {times} | {over:.2f} |")
    return "\n".join([*lines, "", measured_on(cells), ""]) if cells else "Not measured yet.\n"


def render_start(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of sessions' starts, medians of the runs."""
    lines = [
        "| network | type | batch | kernels | stock, s | no kernel in the cache | all in the cache | cores |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in cells:
        times = " | ".join(number(statistics.median(c["seconds"][kind])) for kind in ("stock", "cold", "warm"))
        cores = c["environment"]["cpus"]
        lines.append(f"| {c['network']} | {_type(c)} | {c['batch']} | {c['kernels']} | {times} | {cores} |")
    return "\n".join([*lines, "", measured_on(cells), ""]) if cells else "Not measured yet.\n"


def measured_on(cells: list[dict[str, Any]]) -> str:
    """Where and when the cells were measured, as a sentence."""
    where = {
        (e["gpu"], e["onnxruntime"], e["cudnn"], e["cuda_driver"], e["date"][:10], e["revision"])
        for e in (c["environment"] for c in cells if "environment" in c)
    }
    if not where:
        return "Not measured yet."
    days: dict[tuple[Any, ...], dict[str, list[str]]] = {}  # by what was there, the revisions of each day
    for *there, date, revision in sorted(where, key=str):
        days.setdefault(tuple(there), {}).setdefault(date, []).append(str(revision))
    notes = [
        f"{gpu}, ONNX Runtime {ort}, cuDNN {cudnn}, CUDA driver {driver}, day (revision): "
        + ", ".join(f"{date} ({', '.join(revisions)})" for date, revisions in found.items())
        for (gpu, ort, cudnn, driver), found in days.items()
    ]
    return "Measured on " + "; ".join(notes) + "."


def _table(name: str, dtype: str | None) -> str:
    if name in confirm.TABLES:
        return confirm.render(name)
    if name == "paper":
        return paper.render()
    if name == "steps":
        return steps.render()
    if name == "counters":
        return profile.render()
    if name == "ratios":
        return render_ratios(_results("networks", dtype))
    cells = _results(name, dtype)
    if name == "sizes_h200":
        return render_sizes(cells)
    if name == "start_h200":
        return render_start(cells)
    if name == "torch":
        return render_torch(cells, _results("networks", dtype))
    return render_costs(cells) if name == "costs" else render(cells)


def _results(name: str, dtype: str | None) -> list[dict[str, Any]]:
    """The cells of a file, each with its environment."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": []}
    common = {"environment": data["environment"]} if "environment" in data else {}
    return [common | cell for cell in data["results"] if dtype is None or cell["dtype"] == dtype]


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
