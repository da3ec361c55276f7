"""The example network: its shape is MobileNetV2's, and every layer matters to its output."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper


def _example(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


mobilenetv2 = _example("mobilenetv2")


def _run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y, np.float64)


def test_has_the_layers_of_the_paper() -> None:
    model = mobilenetv2.build()
    onnx.checker.check_model(model, full_check=True)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    depthwise = [n for n in convolutions if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    assert (len(convolutions), len(depthwise)) == (52, 17)
    assert sum(node.op_type == "Add" for node in model.graph.node) == 10
    parameters = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.name.endswith("weight"))
    assert 3.4e6 < parameters < 3.5e6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_batch_runs(dtype: str) -> None:
    model = mobilenetv2.build(dtype=dtype, size=64)
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 64, 64)).astype(dtype)
        y = _run(model, x)
        assert y.shape == (batch, 1000)
        assert np.isfinite(y).all()


def test_every_layer_matters() -> None:
    """Dropping one filter tap or one input channel in twenty of any convolution changes the output by over 1 %."""
    model = mobilenetv2.build(batch=1, size=64)
    x = np.random.default_rng(5).standard_normal((1, 3, 64, 64)).astype(np.float32)
    y = _run(model, x)
    for tensor in model.graph.initializer:
        if not tensor.name.endswith(".weight"):
            continue
        weight = numpy_helper.to_array(tensor)
        changed = weight.copy()
        changed.reshape(len(weight), -1)[:, ::20] = 0
        kept = onnx.TensorProto()
        kept.CopyFrom(tensor)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        change = np.linalg.norm(_run(model, x) - y) / np.linalg.norm(y)
        tensor.CopyFrom(kept)
        assert change > 0.01, f"{tensor.name}: {change:.2g}"
