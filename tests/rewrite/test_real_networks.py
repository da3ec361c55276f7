"""Real networks, from the directory that ORT_FCM_MODELS names, against themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from benchmarks.coverage import depthwise
from ort_fcm import rewrite
from ort_fcm.compare import compare

MODELS = Path(os.environ.get("ORT_FCM_MODELS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="ORT_FCM_MODELS names no directory of real networks")
FILES = sorted(path.name for path in MODELS.glob("*.onnx"))
ARCHITECTURES = (
    "convnext_nano_ts", "efficientnet_b0_ts", "efficientnet_lite0_ts", "mnasnet_100_ts", "mobilenetv1_100_ts",
    "mobilenetv2_100_dynamo", "mobilenetv2_100_ts", "mobilenetv3_large_100_ts", "mobilenetv4_conv_small_ts",
    "xception41_ts",
)  # fmt: skip
# Convolutions outside modules: why there may be any.
KNOWN_REASONS = ("dense ", "also a graph input", "is computed by DequantizeLinear", "fusion does not pay")


def right(path: Path, float16: bool = False) -> None:
    constants = path.name.startswith("ultraface")
    result = rewrite(path, gpu="H200", check=False, float16=float16, constants=constants)
    report = result.report
    onnx.checker.check_model(result.model)
    assert report.convolutions == report.in_modules + len(report.skipped)
    assert all(any(known in item.reason for known in KNOWN_REASONS) for item in report.skipped), report.skipped
    channelwise, skipped = depthwise(onnx.load(path)), {item.node for item in report.skipped}
    assert "qdq" in path.name or len(channelwise - skipped) >= 0.9 * len(channelwise) > 0
    found = compare(path, result.model)
    for item in found.outputs:
        assert item.passed and not item.constant, item


@pytest.mark.parametrize("name", FILES)
def test_trained(name: str) -> None:
    right(MODELS / name)


@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported(name: str, dtype: str, batch: str, tmp_path: Path) -> None:
    command = [sys.executable, MODELS / "architectures.py", tmp_path, name, "--dtype", dtype, "--batch", batch]
    subprocess.run(command, check=True, capture_output=True)
    path = tmp_path / f"{name}.onnx"
    right(path)
    path.unlink()


def test_overridable_constants_are_left_alone() -> None:
    path = MODELS / "ultraface_rfb320.onnx"
    result = rewrite(path, gpu="H200")
    assert result.model == onnx.load(path) and len(result.report.skipped) == result.report.convolutions


def test_float16_of_a_sensitive_network_says_so() -> None:
    check = rewrite(MODELS / "yolox_nano.onnx", gpu="H200", float16=True).report.check
    assert check is not None and check.passed and check.max_rel_error > 0.1
    assert "float16 alone costs output 'output' as much" in check.note
