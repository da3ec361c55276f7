"""A whole network on the CUDA provider: every setting runs, and is as near to float64 as stock is."""

from __future__ import annotations

import pytest

import ort_fcm
from benchmarks import reference
from benchmarks.convolution import Array
from examples import mobilenetv2
from ort_fcm import bench


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_mobilenetv2(dtype: str, batch: int, seed: int) -> None:
    bench.require_provider("cuda")
    stock = mobilenetv2.build(batch, dtype, seed=seed)
    rewritten = ort_fcm.rewrite(stock, check=False).model  # checked below, and on the GPU
    kept: dict[str, dict[str, Array]] = {}
    result = bench.measure("mobilenetv2", stock, rewritten, runs=1, warmup=2, rounds=1, seed=seed, keep=kept)
    assert result.passed, f"seed {seed}: {result}"
    exact = reference.run(stock, kept["inputs"], batch)
    errors = {timing.setting.name: bench.difference(kept[timing.setting.name], exact) for timing in result.timings}
    limit = 1.5 * max(error for name, error in errors.items() if name.startswith("stock"))
    assert all(error <= limit for name, error in errors.items() if name.startswith("ort_fcm")), f"seed {seed}: {errors}"
