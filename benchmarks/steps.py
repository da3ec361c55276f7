"""The table of what each step of the kernels gave, from timed tiles of several revisions (see `benchmarks.table`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import timings

RESULTS = Path(__file__).parent / "results" / "tiles_h200.jsonl.xz"
BEFORE, WALKING, UNBRANCHED = ("c9e9219+",), ("6652726", "56e1d1e"), ("56e1d1e+",)
Row = dict[str, Any]


def _name(row: Row) -> str:
    case = timings.case(row)
    channels = "-".join(str(c) for c in (case.stages[0].c_in, *(stage.c_out for stage in case.stages)))
    stride = f", stride {stride}" if (stride := max(s.stride[0] for s in case.stages)) > 1 else ""
    return f"{case.name} {channels}, {case.h}x{case.w}{stride}{', residual' if case.residual else ''} | {case.batch}"


def _fastest(rows: list[Row], revisions: tuple[str, ...], resident: int | None = None) -> str:
    us = [
        row["us"]
        for row in rows
        if row["revision"] in revisions and resident in (None, row["spec"].get("tile.resident", 0))
    ]
    if resident is not None and _fastest(rows, BEFORE) == "-":
        return "-"  # tiles were drawn at random, not the same for both
    return f"{min(us):.1f}" if us else "-"


def same_tiles(rows: list[Row], old: str, new: str) -> list[float]:
    """Time at revision `new` over time at `old` of every tile that both ran, the last time of each."""
    last: dict[str, dict[str, float]] = {old: {}, new: {}}
    for row in rows:
        if row["revision"] in last:
            last[row["revision"]][timings.tile(row)] = row["us"]
    return [us / last[old][tile] for tile, us in last[new].items() if tile in last[old]]


def _mean(ratios: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} ({len(ratios)})" if ratios else "-"


def render() -> str:
    """A Markdown table of modules timed at more than one revision, in microseconds."""
    modules: dict[str, list[Row]] = {}
    for row in timings.read(RESULTS):
        modules.setdefault(_name(row), []).append(row)
    columns: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("before (c9e9219+)", lambda rows: _fastest(rows, BEFORE)),
        ("weights copied (6652726, 56e1d1e)", lambda rows: _fastest(rows, WALKING, 0)),
        ("weights resident", lambda rows: _fastest(rows, WALKING, 1)),
        ("no branches (56e1d1e+)", lambda rows: _fastest(rows, UNBRANCHED)),
        ("same tiles, no branches / with (tiles)", lambda rows: _mean(same_tiles(rows, "56e1d1e", "56e1d1e+"))),
        ("same tiles, 56e1d1e / 6652726 (tiles)", lambda rows: _mean(same_tiles(rows, "6652726", "56e1d1e"))),
    ]
    lines = [
        "| module | batch | " + " | ".join(title for title, _ in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name, rows in modules.items():
        if len({row["revision"] for row in rows}) > 1:
            lines.append(f"| {name} | " + " | ".join(cell(rows) for _, cell in columns) + " |")
    return "\n".join(lines) + "\n"
