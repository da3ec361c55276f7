"""Generated source, tiles, NVRTC and the cubin cache, through the library's C functions. Needs no GPU."""

from __future__ import annotations

import hashlib
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ort_fcm import library
from ort_fcm.errors import FcmError
from tests.library.modules import CHAINS, Module, Stage, random_module

_BLOCK = Module(
    [
        Stage("pw", (16, 96), activation="clip", params=(0.0, 6.0)),
        Stage("dw", (96, 96), (3, 3), (2, 2), pads=(0, 0, 1, 1), activation="hardswish"),
        Stage("pw", (96, 24)),
    ],
    (16, 16),
)
KIB = 1024
# The most a thread block may ask for: sm_75 and sm_90.
SHARED = {"sm_75": 64 * KIB, "sm_90a": 227 * KIB}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cubins"
    monkeypatch.setenv("ORT_FCM_CACHE", str(directory))
    return directory


def test_source_holds_every_constant() -> None:
    source = library.kernel_source(_BLOCK.description("float16", "tile_h=4 tile_w=4 warps_m=1 chunk=32 block_n=32"))
    for line in (
        "s.type = fcm::Type::float16;",
        "s.first = fcm::Dense::pointwise;",
        "s.c_mid = 96;",
        "s.depthwise_window = {3, 3, 2, 2, 1, 1, 0, 0, 1, 1};",
        "s.first_act = {fcm::Activation::clip, 0.0f, 6.0f};",
        "s.depthwise_act = {fcm::Activation::hardswish, 0.0f, 0.0f};",
        "s.tile.tile_h = 4;",
        "s.tile.block_n = 32;",
    ):
        assert line in source


@pytest.mark.parametrize(
    ("tile", "cause"),
    [
        ("tile_q=4", "attribute tile has no key 'tile_q'"),
        ("tile_h", "attribute tile needs tile_h to be an integer from 1 to 1024, not ''"),
        ("tile_h=0", "not '0'"),
        ("chunk=99999999999999999999", "not '99999999999999999999'"),
        ("split=2x", "not '2x'"),
    ],
)
def test_malformed_tiles(tile: str, cause: str) -> None:
    with pytest.raises(FcmError) as caught:
        library.kernel_source(_BLOCK.description("float16", tile))
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        ("chunk=40", "chunk must be a multiple of a group of channels"),
        ("tile_h=32 tile_w=32 warps_m=16", "the warps do not cover the tile"),
        ("tile_h=1024 tile_w=65536 images=64", "it is far too large for shared memory"),
        ("tile_h=16 tile_w=16 warps_m=16", "bytes of shared memory of 65536"),
    ],
)
def test_a_tile_that_does_not_fit_is_replaced(tile: str, reason: str) -> None:
    found = library.kernel_resources(_BLOCK.description("float16", tile), SHARED["sm_75"])
    assert reason in found["replaced"]
    assert int(found["shared_bytes"]) <= SHARED["sm_75"]
    again = library.kernel_resources(_BLOCK.description("float16", found["tile"]), SHARED["sm_75"])
    assert (again["tile"], again["replaced"]) == (found["tile"], "")


def test_float32_runs_a_tile_for_tf32_without_warpgroups() -> None:
    tile = "tile_h=4 tile_w=8 chunk=32 warps_m=4 wgmma=1"
    planned = library.kernel_resources(_BLOCK.description("tf32", tile), SHARED["sm_90a"])
    assert planned["replaced"] == ""
    found = library.kernel_resources(_BLOCK.description("float32", tile), SHARED["sm_90a"])
    assert found["replaced"] == "wgmma needs float16 or TF32"
    assert found["tile"] == planned["tile"].replace("wgmma=1", "wgmma=0")


@pytest.mark.parametrize("type_name", ["float16", "tf32", "float32"])
def test_every_module_has_a_tile_on_the_smallest_gpu(type_name: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for chain in CHAINS * 5:
        module = random_module(rng, chain, np.float32)
        if chain.startswith("conv-"):  # meant for stems: few input channels, and what follows has a small window
            module.stages[0].channels = (3, module.stages[0].channels[1])
            module.stages[1].kernel = module.stages[1].dilations = (1, 1)
        found = library.kernel_resources(module.description(type_name), SHARED["sm_75"])
        assert int(found["shared_bytes"]) <= SHARED["sm_75"]
        assert found["replaced"] == ""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("type_name", ["float16", "tf32", "float32"])
def test_kernels_compile(type_name: str, architecture: str, cache: Path) -> None:
    cubin = library.compile_kernel(_BLOCK.description(type_name), architecture)
    assert cubin.parent == cache
    content = cubin.read_bytes()
    assert content.startswith(b"\x7fELF")
    assert b"fcm_module" in content


def test_a_kernel_that_does_not_compile_comes_with_the_log(cache: Path) -> None:
    with pytest.raises(FcmError, match=r"(?s)NVRTC 1[23].* cannot compile the kernel for sm_1: .*invalid value"):
        library.compile_kernel(_BLOCK.description("float16"), "sm_1")
    assert not cache.exists()


def test_cache_is_used_and_survives_damage(cache: Path) -> None:
    description = _BLOCK.description("float16")
    path = library.compile_kernel(description, "sm_90a")
    whole = path.read_bytes()
    assert hashlib.sha256(whole[:-64]).hexdigest().encode() == whole[-64:]
    made = path.stat().st_ino
    assert library.compile_kernel(description, "sm_90a").stat().st_ino == made
    for damaged in (b"", whole[: len(whole) // 2], whole[:100] + b"?" + whole[101:], b"x" * 70):
        path.write_bytes(damaged)
        assert library.compile_kernel(description, "sm_90a").read_bytes() == whole
    assert library.compile_kernel(description, "sm_80") != path
    assert library.compile_kernel(_BLOCK.description("tf32"), "sm_90a") != path
    assert len(list(cache.iterdir())) == 3


def test_processes_may_race(cache: Path) -> None:
    code = "import sys; from ort_fcm import library; print(library.compile_kernel(sys.argv[1], 'sm_80'))"
    command = [sys.executable, "-c", code, _BLOCK.description("float16")]
    root = Path(__file__).resolve().parents[2]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in racing}
    assert all(process.returncode == 0 for process in racing)
    assert [str(path) for path in cache.iterdir()] == list(paths)


def test_an_unwritable_cache_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ORT_FCM_CACHE", str(blocked / "cubins"))
    path = library.compile_kernel(_BLOCK.description("float16"), "sm_80")
    assert not path.exists()
