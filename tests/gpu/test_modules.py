"""FusedConvModule in ONNX Runtime: every chain x type x activation against float64, on the CPU and the CUDA provider.

Inputs and outputs lie between guards of NaN and the output is poisoned first, so a stray access shows.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.case import Session, complaint, data_of, describe
from benchmarks.convolution import ACTIVATIONS
from benchmarks.modules import planned
from ort_fcm import library
from ort_fcm.device import present_device
from tests.gpu.cases import CHAINS, DEEP, FEATURES, deep_pointwise, random_case


@pytest.mark.parametrize("number", range(12), ids=ACTIVATIONS)
@pytest.mark.parametrize("chain", CHAINS)
def test_every_chain_and_activation(chain: str, number: int, where: tuple[str, str], seed: int) -> None:
    provider, dtype = where
    case = random_case(chain, dtype, number, seed)
    data = data_of(case)
    wrong = complaint(case, data, Session(case, data, provider).run(case, data), provider)
    assert wrong is None, wrong


@pytest.mark.parametrize("chain", CHAINS)
def test_dynamic_shapes(chain: str, where: tuple[str, str], seed: int) -> None:
    """One session, one kernel: any batch, height and width, in any order."""
    provider, dtype = where
    case = random_case(chain, dtype, 105, seed)
    data = data_of(case)
    session = Session(case, data, provider, dynamic=True)
    for batch, taller, wider in ((1, 0, 0), (3, 9, 2), (2, 1, 40), (1, 0, 0), (5, 30, 17)):
        other = replace(case, batch=batch, h=case.h + taller, w=case.w + wider)
        fresh = replace(data_of(other), weights=data.weights, biases=data.biases, slopes=data.slopes)
        wrong = complaint(other, fresh, session.run(other, fresh), provider)
        assert wrong is None, f"batch {batch}, {other.h} x {other.w}: {wrong}"


@pytest.mark.parametrize("chain", CHAINS)
def test_runs_again_with_the_same_bits(chain: str, provider: str, seed: int) -> None:
    """No sum depends on which thread comes first."""
    case = random_case(chain, "float16", 101, seed)
    data = data_of(case)
    session = Session(case, data, provider)
    first = session.run(case, data)
    for _ in range(3):
        np.testing.assert_array_equal(session.run(case, data), first, err_msg=case.to_line())


@pytest.mark.gpu
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", ["float16", "tf32", "float32"])
def test_graph_capture(chain: str, dtype: str, seed: int) -> None:
    """Replays of a captured graph see changed inputs and write all of their output."""
    pytest.importorskip("cupy")
    case = random_case(chain, dtype, 107, seed)
    data = data_of(case)
    session = Session(case, data, "cuda", graph=True)
    for step in range(4):
        fresh = data_of(replace(case, seed=case.seed + step))
        fresh = replace(fresh, weights=data.weights, biases=data.biases, slopes=data.slopes)
        wrong = complaint(case, fresh, session.run(case, fresh), "cuda")
        assert wrong is None, f"run {step}: {wrong}"


@pytest.mark.gpu
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", ["float16", "tf32", "float32"])
def test_tiles(chain: str, dtype: str, seed: int) -> None:
    """The planner's tiles for this GPU, and those whose blocks or warps share work."""
    pytest.importorskip("cupy")
    device = present_device()
    assert device is not None
    case = random_case(chain, dtype, 113, seed)  # with a residual, a PRelu and activations that compile quickly
    data = data_of(case)
    ranked = list(planned(case, device.name))
    assert ranked, f"the planner has no tile: {case.to_line()}"
    tiles = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
    for feature in FEATURES:
        tiles += [tile for tile in ranked if feature in tile][:1]
    for tile in dict.fromkeys(tiles):
        tiled = replace(case, tile=tile)
        used = library.kernel_resources(describe(tiled), device.shared_bytes_per_block)
        assert not used["replaced"], f"{used['replaced']}: {tiled.to_line()}"
        wrong = complaint(tiled, data, Session(tiled, data, "cuda").run(tiled, data), "cuda")
        assert wrong is None, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "tf32"])
@pytest.mark.parametrize("features", DEEP, ids=("twelve-warps", "warpgroups-apart", "going-by", "going-by-two"))
def test_deep_pointwise(features: set[str], dtype: str, pool: bool, seed: int) -> None:
    """A pointwise deep and wide enough for tiles that no other module has."""
    pytest.importorskip("cupy")
    device = present_device()
    assert device is not None
    if device.capability != (9, 0):
        pytest.skip("no warpgroup products on this GPU")
    case = replace(deep_pointwise(dtype, seed, many="resident=2" in features), pool=pool)
    wide = [tile for tile in planned(case, device.name) if features <= set(tile.split())]
    assert wide, case.to_line()
    data = data_of(case)
    least = (32 if dtype == "float16" else 16) * int(re.findall(r"warps_n=(\d+)", wide[0])[0])
    for tile in (wide[0], wide[-1], re.sub(r"chunk=\d+", f"chunk={least}", wide[0])):
        tiled = replace(case, tile=tile)
        assert not library.kernel_resources(describe(tiled), device.shared_bytes_per_block)["replaced"], tile
        wrong = complaint(tiled, data, Session(tiled, data, "cuda").run(tiled, data), "cuda")
        assert wrong is None, wrong
