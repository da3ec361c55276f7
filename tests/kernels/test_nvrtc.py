"""NVRTC compiles the kernels of planned networks for every architecture, without spills and within shared memory.

A sample by default. ORT_FCM_FULL names architectures, separated by commas (or `all`), for which all kernels of all
networks are compiled, in both types: MobileNetV2 at two batches, and the networks of ORT_FCM_MODELS. Cubins stay in the
library's cache, so that a second run is quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest

import ort_fcm
from benchmarks.case import Case, cases_of, describe
from benchmarks.cubin import resources
from examples import mobilenetv2
from ort_fcm import bench, library

FULL = os.environ.get("ORT_FCM_FULL", "").split(",")
SAMPLE = 3  # kernels of a network, type and architecture


@dataclass(frozen=True)
class Card:
    """The GPU an architecture is planned for, and the bytes of shared memory that a thread block may have there."""

    gpu: str
    shared_bytes: int


CARDS = {
    "sm_75": Card("T4", 64 << 10),
    "sm_80": Card("A100", 163 << 10),
    "sm_86": Card("A10", 99 << 10),
    "sm_87": Card("Jetson AGX Orin", 163 << 10),
    "sm_89": Card("RTX 4090", 99 << 10),
    "sm_90a": Card("H200", 227 << 10),
    "sm_100": Card("B200", 227 << 10),
    "sm_120": Card("RTX 5090", 99 << 10),
}


def _full(architecture: str) -> bool:
    return architecture in FULL or "all" in FULL


def _networks(architecture: str, dtype: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    for batch in (1, 128):
        yield f"mobilenetv2 batch {batch}", mobilenetv2.build(batch, dtype)
    directory = os.environ.get("ORT_FCM_MODELS")
    if directory and _full(architecture):
        for path in sorted(Path(directory).glob("*.onnx")):
            model = onnx.load(path)
            constants = {tensor.name for tensor in model.graph.initializer}
            shapes = {}
            for value in model.graph.input:
                dims = value.type.tensor_type.shape.dim
                if value.name not in constants:
                    shapes[value.name] = [dim.dim_value or (1, 3, 640, 640)[i] for i, dim in enumerate(dims)]
            yield path.stem, bench.fix_shapes(model, shapes=shapes)


def _kernels(architecture: str, dtype: str) -> dict[str, Case]:
    """The distinct kernels of all networks, by their description."""
    found: dict[str, Case] = {}
    computed = "tf32" if dtype == "float32" and architecture != "sm_75" else dtype  # as the library does there
    for name, model in _networks(architecture, dtype):
        half = dtype == "float16" and not name.startswith(("mobilenetv2 batch", "mobilenetv2_qdq"))  # is, cannot be
        done = ort_fcm.rewrite(model, gpu=CARDS[architecture].gpu, check=False, constants=True, float16=half)
        cases = list(cases_of(done.model, computed).values())
        assert cases or "qdq" in name, f"{name}: nothing was fused"
        for case in cases if _full(architecture) else cases[:: len(cases) // SAMPLE]:
            plain = replace(case, batch=1, h=1, w=1)  # no kernel is compiled for these
            found[describe(plain)] = plain
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("architecture", CARDS)
def test_kernels_compile_without_spills(architecture: str, dtype: str) -> None:
    limit = CARDS[architecture].shared_bytes
    kernels = _kernels(architecture, dtype)

    def fault(description: str) -> str | None:
        used = library.kernel_resources(description, limit)
        if used["replaced"]:
            return f"tile replaced: {used['replaced']}"
        if int(used["shared_bytes"]) > limit:
            return f"{used['shared_bytes']} bytes of shared memory"
        compiled = resources(library.compile_kernel(description, architecture).read_bytes())
        if compiled.registers * int(used["threads"]) > 65536:
            return f"{compiled.registers} registers a thread of {used['threads']}"
        return f"{compiled.frame_bytes} bytes of stack: spilled" if compiled.frame_bytes else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = dict(zip(kernels, pool.map(fault, kernels), strict=True))
    wrong = [f"{kernels[d].to_line()}: {why}" for d, why in faults.items() if why]
    assert not wrong, f"{len(wrong)} of {len(kernels)} kernels for {architecture}:\n" + "\n".join(wrong)
