"""The float64 reference of whole networks, against ONNX Runtime in float32."""

from __future__ import annotations

import random

import onnx
import onnxruntime as ort
import pytest

from benchmarks.reference import run
from examples import mobilenetv2
from ort_fcm import bench


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_agrees_with_onnxruntime(dtype: str) -> None:
    seed = random.SystemRandom().randrange(2**31)
    model = bench.fix_shapes(mobilenetv2.build(dtype=dtype, size=64), 3)
    feeds = bench.structured_inputs(model, seed)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, feeds)
    ours = run(model, feeds, images=2)
    error = bench.difference({"scores": theirs[:2]}, ours)
    # ONNX Runtime rounds to the type; the reference must be far closer to it than its rounding, but not equal
    assert 0 < error < (1e-5 if dtype == "float32" else 1e-2), f"seed {seed}: {error}"


def test_is_in_float64() -> None:
    """Weights that differ only beyond float32 rounding of the sums give outputs that differ."""
    model = mobilenetv2.build(batch=1, size=32)
    feeds = bench.structured_inputs(model, 1)
    y = run(model, feeds)["scores"]
    (bias,) = (t for t in model.graph.initializer if t.name == "classifier.bias")
    shifted = onnx.numpy_helper.to_array(bias).copy()
    shifted[0] += 1e-6
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    z = run(model, feeds)["scores"]
    assert z.dtype == "float64"
    assert 1e-7 < abs(z - y).max() < 1e-5
