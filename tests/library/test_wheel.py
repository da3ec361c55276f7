"""A wheel built from the source works where the source is not."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np

from tests.library.modules import Module, Stage, fused_model, inputs, plain_model, run, with_weights

_USE = """
import sys, numpy as np, onnxruntime as ort
import ort_fcm, ort_fcm.planner
assert ort_fcm.__file__.startswith(sys.argv[1]), ort_fcm.__file__
assert ort_fcm.planner.__file__.startswith(sys.argv[1]), ort_fcm.planner.__file__
options = ort.SessionOptions()
options.register_custom_ops_library(ort_fcm.library_path())
session = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
np.save("y.npy", session.run(None, {"X": np.load("x.npy")})[0])
"""


def test_wheel(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([*build, str(root)], check=True, env=environment)
    (wheel,) = tmp_path.glob("ort_fcm-*.whl")
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = {str(path.relative_to(site)) for path in site.rglob("*")}
    assert {"ort_fcm/libort_fcm.so", "ort_fcm/kernels/module.cuh", "ort_fcm/planner/gpus.toml"} <= names
    assert not any(name.endswith((".cpp", ".pyc")) or name.startswith("planner") for name in names)

    rng = np.random.default_rng(0)
    stages = [Stage("dw", (8, 8), (3, 3), pads=(1, 1, 1, 1), activation="relu"), Stage("pw", (8, 5))]
    module = with_weights(Module(stages, (6, 7)), rng)
    feeds = inputs(module, rng)
    (tmp_path / "model.onnx").write_bytes(fused_model(module).SerializeToString())
    np.save(tmp_path / "x.npy", feeds["X"])
    # Without `site`, an editable install in this environment cannot answer in the wheel's place.
    environment["PYTHONPATH"] = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    subprocess.run([sys.executable, "-S", "-c", _USE, str(site)], check=True, cwd=tmp_path, env=environment)
    expected = run(plain_model(module), feeds, library=False)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5, atol=1e-5)
