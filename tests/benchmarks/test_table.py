"""The tables in README.md and docs/ say what benchmarks/results holds."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks import sizes, table
from ort_fcm import bench

ENVIRONMENT = {
    "gpu": "H200",
    "onnxruntime": "1",
    "cudnn": 2,
    "cuda_driver": "3",
    "date": "2026-01-02 03:04",
    "revision": "r",
}


def test_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["table", "--check"])
    assert table.main() == 0, "run python -m benchmarks.table"


def test_a_row_has_the_best_of_each() -> None:
    timings = [
        bench.Timing(setting, median_ms=float(10 - i), p99_ms=11.0) for i, setting in enumerate(bench.CUDA_SETTINGS)
    ]
    timings[3] = replace(timings[3], median_ms=None, error="refused")
    result = bench.Result("net", 16, "float16", tuple(timings))
    planned = result.to_dict() | {"environment": ENVIRONMENT, "error": {"stock": 1e-3, "rewritten": 1.2e-3}}
    tuned = planned | {"tuned": True, "timings": planned["timings"][:-1]}
    failed = {"network": "net", "dtype": "float16", "batch": 1, "tuned": True, "passed": False, "failed": "no memory"}
    text = table.render([tuned, failed, planned])
    rows = [line for line in text.splitlines() if line.startswith(("| net |", "| net,"))]
    assert rows[0] == "| net | float16 | 16 | 8 (NHWC) | 5 | 1.60 | 1.0e-03 | 1.2e-03 |"
    assert rows[1].startswith("| net, tuned | float16 | 16 | 8 (NHWC) | 6 ") and len(rows) == 2
    assert "2026-01-02" in text
    text = table.render_ratios([tuned, failed, planned])
    assert "| network | type | batch 16 |" in text and "| net | float16 | 8 / 5 = **1.6** |" in text
    torch = {"network": "net", "dtype": "float16", "median_ms": 11.0, "torch": "2", "timm": "1"}
    text = table.render_torch(
        [torch | {"batch": batch, "environment": ENVIRONMENT} for batch in (16, 1)], [tuned, failed, planned]
    )
    assert "| net | float16 | 16 | 11 | 5 | 2.20 |" in text, "beside the plan by estimate"
    assert "| net | float16 | 1 | 11 | - | - |" in text and "PyTorch 2, timm 1" in text


def test_new_sizes_in_the_median() -> None:
    rows = [
        {
            "first_ms": 100.0 * k,
            "second_ms": 3.0 * k,
            "third_ms": 2.0,
            "steady_ms": 1.0 * k,
            "slowest_steady_ms": 9.0,
            "paused_ms": 4.0,
        }
        for k in (1, 2, 3)
    ]
    cells = [{"network": "net", "kind": kind, "rows": rows} for kind in sizes.KINDS]
    text = table.render_sizes([c | {"environment": ENVIRONMENT} for c in cells])
    assert "| net | stock | 3 | 200 | 6 | 2 | 2 | 4 | 3.00 |" in text and "Measured on H200" in text
    assert "| net |" not in table.render_sizes([cells[0] | {"rows": []}])


def test_costs_stand_beside_stocks() -> None:
    where = {"network": "net", "dtype": "float16", "batch": 128, "environment": ENVIRONMENT}
    stock = {"setting": "NHWC", "joules_a_run": 4.0, "dram_bytes": 2e9, "l2_bytes": 8e9, "memory_bytes": 3e9}
    ours = {"setting": "rewritten", "joules_a_run": 0.5, "dram_bytes": 5e8, "l2_bytes": 2e9, "fault": "and no memory"}
    lines = table.render_costs([where | ours, where | stock]).splitlines()
    assert lines[2:5] == [
        "| net | float16 | 128 | energy a run, J | 4 | 0.5 | 88% |",
        "| net | float16 | 128 | device memory, read and written a run, MB | 2,000 | 500 | 75% |",
        "| net | float16 | 128 | L2, bytes handled a run, MB | 8,000 | 2,000 | 75% |",
    ]
    assert "Measured on H200" in lines[-1] and "peak" not in "".join(lines)
    assert table.render_costs([where | stock]) == "Not measured yet.\n"


def test_starts_in_the_median() -> None:
    seconds = {"stock": [1.0, 5.0, 3.0], "cold": [2.0, 2.5, 9.0], "warm": [0.5, 0.25, 0.75]}
    cell = {"network": "net", "dtype": "float32", "batch": 1, "kernels": 20, "seconds": seconds}
    text = table.render_start([cell | {"environment": ENVIRONMENT | {"cpus": 16}}])
    assert "| net | float32 (TF32) | 1 | 20 | 3 | 2.5 | 0.5 | 16 |" in text


def test_a_day_has_its_revisions() -> None:
    cells = [{"environment": ENVIRONMENT | {"date": f"2026-01-0{day} 09:00", "revision": r}} for day, r in
             ((3, "b"), (2, "r"), (3, "a"), (3, "a"))]  # fmt: skip
    assert table.measured_on(cells) == (
        "Measured on H200, ONNX Runtime 1, cuDNN 2, CUDA driver 3, day (revision): 2026-01-02 (r), 2026-01-03 (a, b)."
    )
