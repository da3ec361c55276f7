"""What compute-sanitizer watches: the choice of modules, and what is made of a driver that refuses some. No GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import driver, sanitize
from benchmarks.modules import Bench
from benchmarks.sanitize import FEATURES, TYPES, Trial
from planner import gpu
from tests.gpu.cases import CHAINS

LIMIT = 96 << 10
STRICT = 20_000  # bytes of shared memory that a strict driver allows


@pytest.fixture(scope="module")
def found() -> list[Trial]:
    return sanitize.trials(1, 1, replace(gpu("H200"), shared_per_block=LIMIT))


@pytest.fixture(scope="module")
def few(found: list[Trial]) -> list[Trial]:
    """One of every chain and type, and one with each feature."""
    first = {key: trial for trial in reversed(found) for key in (trial.kind, *trial.features)}
    return list(dict.fromkeys(first.values()))


class Driver:
    """A libcuda of host memory whose kernels do nothing, and which allows so much dynamic shared memory."""

    def __init__(self, shared: int) -> None:
        self.shared, self.held, self.modules = shared, {}, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *_: 0

    def cuDeviceGetAttribute(self, value: Any, *_: Any) -> int:
        value._obj.value = 50 << 20
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.held[address._obj.value] = buffer
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.held[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:
        assert size.value <= len(self.held[to.value])
        return 0

    def cuModuleLoadData(self, *_: Any) -> int:
        self.modules += 1
        return 0

    def cuModuleUnload(self, *_: Any) -> int:
        self.modules -= 1
        return 0

    def cuFuncSetAttribute(self, _: Any, __: Any, value: Any) -> int:
        return int(value.value > self.shared)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few: list[Trial]) -> Any:
    """main() with a driver that allows so much shared memory, and kernels whose numbers are as far off as is told."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(b"\x7fELF")
    monkeypatch.setenv("ORT_FCM_CACHE", str(tmp_path))
    monkeypatch.setattr(sanitize, "trials", lambda *_: few)
    monkeypatch.setattr(sanitize, "compile_all", lambda texts, _: [cubin] * len(texts))

    def main(shared: int, deviations: float, *arguments: str) -> tuple[int, Driver]:
        fake = Driver(shared)
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: fake if "cuda" in name else loaded(name))
        monkeypatch.setattr(Bench, "check", lambda *_: (0.0, deviations))
        monkeypatch.setattr("sys.argv", ["sanitize", *arguments])
        return sanitize.main(), fake

    loaded = ctypes.CDLL
    return main


def test_every_chain_and_type_and_feature_is_among_them(found: list[Trial]) -> None:
    kinds = {f"{chain} {dtype}" for chain in CHAINS for dtype in TYPES}
    assert {trial.kind for trial in found[: len(kinds)]} == kinds, "one of each comes first"
    for chain in CHAINS:
        features = set().union(*(trial.features for trial in found if trial.case.name == chain))
        if chain.startswith("mean"):
            assert features >= {"split=2", "images=2", "resident=1"}
            assert "warps_n=2" in features or chain == "mean-pw-pw"
            continue
        assert "patch_h=2" in features
        assert "resident=1" in features or chain == "conv"
        assert "images=2" in features or "dw" not in chain or chain == "dw"
        assert features >= {"split=2", "warps_n=2"} or chain.endswith("dw")
    assert {feature for trial in found for feature in trial.features} == set(FEATURES)
    assert max(trial.shared_bytes for trial in found) <= LIMIT


def test_all_run(run: Any, few: list[Trial], capsys: pytest.CaptureFixture[str]) -> None:
    code, fake = run(LIMIT, 1.0)
    assert (code, fake.modules, fake.held) == (0, 0, {})
    assert f"{len(few)} modules: {len(few)} ran, 0 wrong, 0 refused" in capsys.readouterr().out


def test_wrong_numbers_fail(run: Any, few: list[Trial], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LIMIT, float("inf"))[0] == 1
    assert f": 0 ran, {len(few)} wrong" in capsys.readouterr().out


def test_what_the_driver_refuses_is_counted(run: Any, few: list[Trial], capsys: pytest.CaptureFixture[str]) -> None:
    code, fake = run(STRICT, 1.0)
    out = capsys.readouterr().out
    allowed = [trial for trial in few if trial.shared_bytes <= STRICT]
    assert 0 < len(allowed) < len(few)
    assert f": {len(allowed)} ran, 0 wrong, {len(few) - len(allowed)} refused" in out
    assert out.count(f"{STRICT // 1024 * 1024} are accepted here") == 1
    without = {trial.kind for trial in few} - {trial.kind for trial in allowed}
    assert without and code == 1
    assert without <= set(out.split("none ran: ")[1].strip().split(", "))
    assert (fake.modules, fake.held) == (0, {})


def test_time_runs_out(run: Any, few: list[Trial], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LIMIT, 1.0, "--seconds", "0")[0] == 1
    assert f": 0 ran, 0 wrong, 0 refused, 0 not compiled, {len(few)} left" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["memcheck", "racecheck", "neither"])
def test_both_tools_run_whatever_the_first_finds(tmp_path: Path, wrong: str) -> None:
    for name, text in (("compute-sanitizer", f'echo "ran $2"; [ "$2" != {wrong} ]'), ("python", 'echo "prepared $3"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    script = Path(sanitize.__file__).with_suffix(".sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == ["ran memcheck", "ran racecheck"]
    assert done.returncode == (0 if wrong == "neither" else 1), done.stderr
