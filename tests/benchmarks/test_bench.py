"""`ort_fcm.bench` on the CPU provider: what it accepts, what it finds, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from examples import mobilenetv2
from ort_fcm import FcmError, bench


def _model(batch: int | None = None) -> onnx.ModelProto:
    return mobilenetv2.build(batch, size=32)


def test_times_each_batch_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    results = bench.bench(_model(), [1, 3], gpu="H200", provider="cpu", runs=3, warmup=1, json=path)
    assert [(r.batch, r.passed) for r in results] == [(1, True), (3, True)]
    data = json.loads(path.read_text())
    assert data["environment"]["onnxruntime"] == ort.__version__
    for cell in data["results"]:
        stock, ours = cell["timings"]
        assert cell["ratio"] == pytest.approx(stock["median_ms"] / ours["median_ms"])
        assert 0 < stock["median_ms"] <= stock["p99_ms"]
        assert cell["rewrite"]["in_modules"] == 53
    assert list(tmp_path.iterdir()) == [path]


def test_finds_wrong_numbers() -> None:
    stock = bench.fix_shapes(_model(), 2)
    wrong = bench.fix_shapes(_model(), 2)
    (weight,) = (t for t in wrong.graph.initializer if t.name == "blocks.7.depthwise.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :, ::-1].copy(), weight.name))
    assert bench.measure("same", stock, stock, device="cpu", runs=1, warmup=0, rounds=1).passed
    result = bench.measure("wrong", stock, wrong, device="cpu", runs=1, warmup=0, rounds=1)
    assert not result.passed
    assert result.timings[1].difference is not None and result.timings[1].difference > 0.02


def test_a_setting_that_fails_leaves_the_others() -> None:
    stock = bench.fix_shapes(_model(), 1)
    broken = onnx.ModelProto()
    broken.CopyFrom(stock)
    broken.graph.node[3].op_type = "NoSuchOperator"
    result = bench.measure("broken", stock, broken, device="cpu", runs=1, warmup=0, rounds=1)
    assert result.timings[0].median_ms is not None
    assert result.timings[1].error and "NoSuchOperator" in result.timings[1].error
    assert result.ratio is None and not result.passed


def test_a_difference_is_over_the_norm_and_nan_is_infinite() -> None:
    reference = {"y": np.array([3.0, 4.0])}
    assert bench.difference({"y": np.array([3.0, 4.5])}, reference) == pytest.approx(0.1)
    assert bench.difference({"y": np.array([3.0, np.nan])}, reference) == float("inf")


def test_batches_and_shapes() -> None:
    fixed = bench.fix_shapes(_model(), 5)
    assert [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim] == [5, 3, 32, 32]
    assert fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 5
    with pytest.raises(FcmError, match="dimension 0 is 2 in the model, not 4"):
        bench.fix_shapes(_model(2), 4)
    free = _model()
    free.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    with pytest.raises(FcmError, match="input x: dimension 2 is dynamic"):
        bench.fix_shapes(free, 1)
    assert (
        bench.fix_shapes(free, shapes={"x": (1, 3, 48, 32)}).graph.input[0].type.tensor_type.shape.dim[2].dim_value
        == 48
    )
    with pytest.raises(FcmError, match="at least 1"):
        bench.bench(_model(), [0], provider="cpu")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(FcmError, match=r"no CUDA provider.*--provider cpu"):
        bench.bench(_model(), [1])


def test_structured_inputs_are_images() -> None:
    """Neighbouring pixels go together, unlike noise; images of a batch differ."""
    (x,) = bench.structured_inputs(bench.fix_shapes(mobilenetv2.build(size=96), 2), 3).values()
    step = np.abs(np.diff(x, axis=3)).mean() / x.std()
    assert step < 0.4 < np.abs(x[0] - x[1]).mean()


def test_a_network_that_stock_itself_does_not_repeat_has_its_tolerance() -> None:
    def passed(stock: float, rewritten: float) -> bool:
        settings = (bench.Setting(False), bench.Setting(False, nhwc=True), bench.Setting(True))
        timings = zip(settings, (0.0, stock, rewritten), strict=True)
        return bench.Result(
            "net", 1, "float16", tuple(bench.Timing(s, 1.0, 1.0, 1.0, difference=d) for s, d in timings)
        ).passed

    assert passed(0.0, 0.029) and not passed(0.0, 0.031)
    assert passed(0.1, 0.149) and not passed(0.1, 0.151)
    assert not passed(float("inf"), 0.31) and not passed(0.1, float("inf"))
