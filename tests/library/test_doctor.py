"""The doctor's exit code and words, with and without what it looks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ort_fcm import device, doctor, library


def test_healthy(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_FCM_CACHE", str(tmp_path))
    assert doctor.doctor() == 0
    printed = capsys.readouterr().out
    for expected in ("libort_fcm.so", library.version(), "CPUExecutionProvider", "libnvrtc", str(tmp_path)):
        assert expected in printed
    present = device.present_device()
    assert (present.name if present else "no NVIDIA driver or GPU") in printed


def test_missing_library_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "libort_fcm.so")
    assert doctor.doctor() == 1
    assert "not found; build it with `make`" in capsys.readouterr().out


def test_present_gpu_agrees_with_its_figures() -> None:
    present = device.present_device()
    assert device.present_gpu() == (present.name if present else None)
    if present:
        assert present.capability >= (5, 0)
        assert present.shared_bytes_per_sm >= present.shared_bytes_per_block > 0
