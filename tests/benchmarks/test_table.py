"""The tables in README.md and docs/ say what benchmarks/results holds."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from benchmarks import table
from ort_fcm import bench


def test_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["table", "--check"])
    assert table.main() == 0, "run python -m benchmarks.table"


def test_a_row_has_the_best_of_each() -> None:
    timings = [
        bench.Timing(setting, median_ms=float(10 - i), p99_ms=11.0) for i, setting in enumerate(bench.CUDA_SETTINGS)
    ]
    timings[3] = replace(timings[3], median_ms=None, error="refused")
    result = bench.Result("net", 16, "float16", tuple(timings))
    environment = {
        "gpu": "H200",
        "onnxruntime": "1",
        "cudnn": 2,
        "cuda_driver": "3",
        "date": "2026-01-02 03:04",
        "revision": "r",
    }
    text = table.render(
        [result.to_dict() | {"environment": environment, "error": {"stock": 1e-3, "rewritten": 1.2e-3}}]
    )
    assert "| net | float16 | 16 | 8 (NHWC) | 5 | 1.60 | 1.0e-03 | 1.2e-03 |" in text
    assert "2026-01-02" in text
