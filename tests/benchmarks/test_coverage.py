"""The page of real networks says what its results hold; networks at another batch are the same networks."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import coverage
from benchmarks.models import network
from ort_fcm import FcmError, bench
from tests.rewrite.networks import Net, run


def test_page_is_up_to_date() -> None:
    done = json.loads(coverage.RESULTS.read_text())
    cells = json.loads(coverage.COVERAGE.read_text())["results"] if coverage.COVERAGE.exists() else []
    assert coverage.PAGE.read_text() == coverage.page(done["results"], done["gpu"], cells)


def test_a_failure_stands_in_the_page() -> None:
    done = json.loads(coverage.RESULTS.read_text())
    name = done["results"][0]["network"]
    cells: list[dict[str, Any]] = [
        {"network": name, "dtype": "float16", "batch": 1, "ratio": 1.234, "passed": True},
        {"network": name, "dtype": "float16", "batch": 16, "passed": False, "failed": "no memory"},
    ]
    text = coverage.page(done["results"], done["gpu"], cells)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} ") and "failed" in line)
    assert row.endswith("| 1.23 | failed |")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_batch_than_the_exported(dtype: str, tmp_path: Path) -> None:
    """With the batch in Reshapes: as itself, times channels, and beside a -1 that takes it up."""
    seed = secrets.randbelow(2**31)
    net = Net(seed=seed)
    x = net.op("Relu", net.conv(net.input(1, 3, 8, 8), 12, 3))
    x = net.op("Resize", x, net.const([]), net.const([1, 1, 2, 2]))
    x = net.op("Reshape", x, net.const([6, 2, 256], np.int64))
    x = net.op("Reshape", net.op("Transpose", x, perm=[1, 0, 2]), net.const([2, -1, 6, 16, 16], np.int64))
    x = net.op("Gather", x, net.const(1, np.int64), axis=0)
    net.output(net.op("Reshape", x, net.const([1, 6, -1], np.int64)), rank=3)
    onnx.save(net.model(), tmp_path / "net.onnx")
    one, three = (network("net", dtype, batch, tmp_path) for batch in (1, 3))
    images = bench.structured_inputs(three, seed)["x"]
    assert images.shape == (3, 3, 8, 8) and images.dtype == dtype
    (together,) = run(three, {"x": images})
    apart = np.concatenate([run(one, {"x": image[None]})[0] for image in images])
    assert together.dtype == dtype and together.shape == (3, 6, 256)
    np.testing.assert_allclose(together, apart, atol=1e-5 if dtype == "float32" else 5e-3, err_msg=f"seed {seed}")


def test_a_network_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FcmError, match="no other"):
        network("other", "float32", 1, tmp_path)
