"""Batch, height and width known at run time only: right at every size, and one kernel for all of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ort_fcm import bench, library_path
from ort_fcm.compare import structured
from ort_fcm.library import kernel_source
from ort_fcm.rewrite import pipeline
from tests.rewrite.networks import Array, Net
from tests.rewrite.test_patterns import modules

Fuse = Callable[..., Any]
MODELS = Path(os.environ.get("ORT_FCM_MODELS", "/nonexistent"))
PRIMES = (61, 67, 71, 73, 79, 83, 89, 97)
LARGEST = 1280
KERNEL = ("stages", "kernel_shape", "strides", "dilations", "pads", "activations", "activation_params",
          "output_activation", "output_activation_params", "input_layout", "output_layout", "tile")  # fmt: skip


def pyramid(seed: int, shape: tuple[int | str, ...] = ("n", 3, "h", "w"), dtype: Any = np.float32) -> onnx.ModelProto:
    """Strides, a residual, squeeze-and-excite, and a map enlarged to the size of another, which any size has."""
    net = Net(seed=seed, dtype=dtype)
    fine = net.op("HardSwish", net.conv(net.input(*shape), 8, 3, strides=[2, 2]))
    inner = net.depthwise(net.op("Relu", net.conv(fine, 12)))
    fine = net.op("Add", fine, net.conv(net.op("Relu", inner), 8))
    coarse = net.op("Relu", net.conv(net.depthwise(fine, 5, strides=[2, 2]), 12))
    scale = net.conv(net.op("Relu", net.conv(net.op("GlobalAveragePool", coarse), 4)), 12)
    coarse = net.conv(net.op("Mul", coarse, net.op("HardSigmoid", scale)), 8)
    both = (net.op("Shape", coarse, start=0, end=2), net.op("Shape", fine, start=2, end=4))
    sizes = net.op("Concat", *both, axis=0)
    large = net.op("Resize", coarse, "", "", sizes, mode="nearest")
    joined = net.op("Concat", fine, large, axis=1)
    net.channels[joined] = 16
    net.output(net.conv(net.depthwise(joined, dilations=[2, 2], pads=[2, 2, 2, 2]), 4))
    pooled = net.op("GlobalAveragePool", net.op("Tanh", net.depthwise(coarse)))
    net.output(net.op("Flatten", pooled), rank=2)
    return net.model()


def shapes(seed: int) -> Iterator[tuple[int, int, int, int]]:
    """Every size from 1 to LARGEST that a prime step reaches, as height and as width, in an order of chance."""
    rng = random.Random(seed)
    heights = list(range(1, LARGEST + 1, rng.choice(PRIMES)))
    widths = rng.sample(heights, len(heights))
    for h, w in zip(rng.sample(heights, len(heights)), widths, strict=True):
        yield rng.choice((1, 1, 2, 3)) if h * w < 200_000 else 1, 3, h, w


def session(model: onnx.ModelProto, provider: str, rewritten: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # sizes that a model refuses are logged, too
    if rewritten:
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, [provider])


def assert_right(run: Any, reference: Any, x: Array, tolerance: float, note: str) -> None:
    """Within the tolerance, of an output's largest element; a mean (of rank 2) also within a float sum's own error."""
    of_sums = 2.0**-24 * (x.shape[2] // 4 + 1) * (x.shape[3] // 4 + 1)  # a rounding for each pixel of the coarse map
    name = reference.get_inputs()[0].name
    expected = reference.run(None, {name: x.astype(np.float32)})
    for y, z in zip(expected, run.run(None, {name: x}), strict=True):
        assert z.shape == y.shape, note
        allowed = tolerance + of_sums * (y.ndim == 2)
        np.testing.assert_allclose(z, y, rtol=0, atol=allowed * np.abs(y).max(), err_msg=note)


def test_every_size(fuse: Fuse, seed: int) -> None:
    model = pyramid(seed)
    result = fuse(model)
    assert result.report.in_modules == result.report.convolutions == 12
    ours = session(result.model, "CPUExecutionProvider", True)
    stock = session(model, "CPUExecutionProvider", False)
    for shape in shapes(seed):
        x = structured(shape, seed=seed)
        assert_right(ours, stock, x, 2e-5, f"seed {seed}, {shape}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 5e-3), (np.float16, 2e-2)])
def test_every_size_on_the_gpu(
    dtype: Any, tolerance: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the planner has it, and with nothing compiled after the first size."""
    bench.require_provider("cuda")
    monkeypatch.setenv("ORT_FCM_CACHE", str(tmp_path))
    result = pipeline.rewrite(pyramid(seed, dtype=dtype), check=False)
    ours = session(result.model, "CUDAExecutionProvider", True)
    stock = session(pyramid(seed), "CPUExecutionProvider", False)
    compiled: list[str] = []
    for shape in shapes(seed):
        x = structured(shape, seed=seed).astype(dtype)
        assert_right(ours, stock, x, tolerance, f"seed {seed}, {shape}")
        files = sorted(str(path) for path in tmp_path.rglob("*") if path.is_file())
        compiled = compiled or files
        assert compiled and files == compiled, f"compiled for {shape}"


def test_no_size_enters_a_kernel(fuse: Fuse, seed: int) -> None:
    """The same network at two sizes has the same kernels, to the letter."""
    found = []
    for shape in ((1, 3, 64, 96), (2, 3, 33, 171), ("n", 3, "h", "w")):
        model = fuse(pyramid(seed, shape)).model
        weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        sources = []
        for module in modules(model):
            # the layout of an edge is chosen by what a Transpose costs there, and so may depend on the size
            values = {k: module[k] for k in KERNEL if k in module} | {"input_layout": "NHWC", "output_layout": "NHWC"}
            dims = [weights[name] for name in module["node"].input[1:7:2] if name]
            first = dims[0][0] if module["stages"].startswith("dw") else dims[0][1]
            values |= {"channels": [first, *(d[0] for d in dims)], "type": "float16"}
            values["residual"] = int(len(module["node"].input) > 7 and bool(module["node"].input[7]))
            lines = (f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in values.items())
            sources.append(kernel_source("\n".join(lines)))
        found.append(sources)
    assert len(found[0]) > 5 and found[0] == found[1] == found[2]


@pytest.mark.skipif(not MODELS.is_dir(), reason="ORT_FCM_MODELS names no directory of real networks")
def test_a_text_detector_at_the_sizes_it_accepts(seed: int) -> None:
    """Only some sizes survive its five halvings and doublings: those are asked of the original.

    Compared is what its last Sigmoid reads: where no text is seen, all that this gives is near 0, and says nothing.
    """
    model = onnx.load(MODELS / "ppocrv3_det.onnx")
    last = next(node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
    assert last.op_type == "Sigmoid"
    model.graph.output[0].name = last.input[0]
    ours = session(pipeline.rewrite(model, gpu="H200", check=False).model, "CPUExecutionProvider", True)
    stock = session(model, "CPUExecutionProvider", False)
    rng = random.Random(seed)
    accepted = refused = 0
    while accepted < 12:
        n, h, w = rng.choice((1, 1, 2)), *(rng.choice((32 * rng.randint(1, 6), rng.randint(1, 100))) for _ in "hw")
        x = structured((n, 3, h, w), seed=seed)
        try:
            stock.run(None, {"x": x})
        except Exception:  # ONNX Runtime's own
            refused += 1
            with pytest.raises(Exception, match="Non-zero status code"):
                ours.run(None, {"x": x})
            continue
        assert_right(ours, stock, x, 1e-4, f"seed {seed}, {(n, h, w)}")
        accepted += 1
    assert refused
