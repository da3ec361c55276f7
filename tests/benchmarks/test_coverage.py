"""The page of real networks says what its results hold; networks at another batch are the same networks."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import coverage, networks
from benchmarks.models import module_texts, network
from ort_fcm import FcmError, bench, library, rewrite
from ort_fcm.rewrite.float16 import to_float16
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
    unchanged = {"network": name, "dtype": "float16", "batch": 1, "ratio": None, "passed": True, "unchanged": True}
    assert "| unchanged | failed |" in coverage.page(done["results"], done["gpu"], [unchanged, cells[1]])
    assert networks.line(unchanged).endswith("nothing is fused")
    cells[0]["error"] = {"stock": 0.02, "rewritten": 0.03, "ratio": 1.5}
    cells[1] = {**cells[0], "batch": 16, "passed": False}
    text = coverage.page(done["results"], done["gpu"], cells)
    assert "| 1.23 (2) | 1.23 (2), not right |" in text
    assert f"(2) Against float64, as it differs from stock: {name} at batch 1, 3.0e-02, stock 2.0e-02;" in text


@pytest.mark.parametrize(
    ("ours", "stocks", "right"),
    [(0.05, (0.02, 0.03), True), (0.07, (0.02, 0.03), False), (0.029, (0.0, 0.0), True), (0.05, (0.0, 0.0), False),
     (0.4, (0.3, 0.3), False), (float("nan"), (0.3, 0.3), False)],
)  # fmt: skip
def test_what_differs_from_stock_is_held_against_float64(ours: float, stocks: tuple[float, float], right: bool) -> None:
    """Errors of 1: of the rewritten network in its worst setting, and of stock in two."""
    settings = (bench.Setting(False), bench.Setting(False, nhwc=True), bench.Setting(True), bench.Setting(True, True))
    times = zip(settings, (2.0, 3.0, 1.0, 1.5), strict=True)
    result = bench.Result("net", 2, "float16", tuple(bench.Timing(s, ms, ms, 1.0, difference=1.0) for s, ms in times))
    outputs = zip(settings, (*stocks, 0.001, ours), strict=True)
    kept = {s.name: {"y": np.array([[1 + error], [0.0]])} for s, error in outputs}  # a second image, not looked at
    exact = {"y": np.array([[1.0]])}
    assert networks.right(result, kept, exact) == right
    told = networks.errors(result, kept, exact)
    assert told["stock"] == pytest.approx(stocks[0]) and told["rewritten"] == pytest.approx(0.001)


def test_modules_are_told_as_they_run(tmp_path: Path) -> None:
    """Every module of a network with squeeze-and-excite, in words that the library takes, as often as it has nodes."""
    net = Net(seed=secrets.randbelow(2**31))
    x = net.op("Relu", net.conv(net.input(2, 16, 14, 14), 32, 1))
    x = net.op("Relu", net.conv(x, 32, 3, group=32))
    gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), 16, 1))
    x = net.op("Mul", x, net.op("Sigmoid", net.conv(gate, 32, 1)))
    net.output(net.op("Add", net.conv(x, 16, 1), "x"))
    model = rewrite(to_float16(net.model()), gpu="H200", check=False).model
    texts = module_texts(model)
    assert len(texts) == sum(node.op_type == "FusedConvModule" for node in model.graph.node) >= 3
    for text in texts:
        assert library.kernel_source(text)
    for word in ("pool=1", "scaled=1", "residual=1", "stages=mean-pw-pw", "channels=32 16 32", "type=float16"):
        assert sum(word in text.split("\n") for text in texts) == (len(texts) if "type" in word else 1), word


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
