"""Runtimes before 1.27 do not know which overload a node calls: they must refuse a rewritten model.

ORT_FCM_OLD_PYTHON names an interpreter that has onnxruntime 1.24; without it, one is installed into pytest's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.rewrite.networks import Net

PROGRAM = """
import sys, onnxruntime
print(onnxruntime.__version__)
try:
    onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    print("loaded")
except Exception as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def old_runtime(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    python, environment = os.environ.get("ORT_FCM_OLD_PYTHON"), dict(os.environ)
    if python is None:
        cache = request.config.cache
        assert cache is not None
        python, folder = sys.executable, cache.mkdir("onnxruntime-1.24.4")
        if not (folder / "onnxruntime").is_dir():
            command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, "onnxruntime==1.24.4"]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("no onnxruntime 1.24.4: offline, or none for this Python; set ORT_FCM_OLD_PYTHON")
        environment["PYTHONPATH"] = str(folder)

    def load(model: Path) -> str:
        command = [python, "-c", PROGRAM, str(model)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=model.parent)
        assert result.stdout.startswith("1.24"), result.stderr
        return result.stdout

    return load


@pytest.mark.parametrize("bodies", [1, 2])
def test_an_old_runtime_refuses(
    bodies: int, tmp_path: Path, old_runtime: Callable[[Path], str], fuse: Callable[..., Any], seed: int
) -> None:
    net = Net(seed=seed)
    x = net.depthwise(net.input(1, 8, 9, 9))
    if bodies == 2:
        x = net.depthwise(net.op("MaxPool", x, kernel_shape=[2, 2]), 5)
    net.output(x)
    model = fuse(net.model()).model
    assert len(model.functions) == bodies + 1
    onnx.save(model, tmp_path / "guarded.onnx")
    assert "refused" in (answer := old_runtime(tmp_path / "guarded.onnx")) and "1_27" in answer
    del model.functions[-1]
    onnx.save(model, tmp_path / "unguarded.onnx")
    assert "loaded" in old_runtime(tmp_path / "unguarded.onnx")  # which is why the guard is there
