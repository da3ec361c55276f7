"""`ort-fcm doctor`: whether everything is there that a rewritten model needs, and where it was found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ort_fcm import library
from ort_fcm.device import present_device
from ort_fcm.errors import FcmError


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer. `needed`: its absence is a failure, not a remark."""

    what: str
    found: str
    ok: bool
    needed: bool = True


def _find(what: str, look: Callable[[], str], needed: bool = True) -> Finding:
    try:
        return Finding(what, look(), True, needed)
    except (FcmError, ImportError, OSError) as error:
        return Finding(what, str(error), False, needed)


def _runtime() -> str:
    import onnxruntime as ort

    return f"{ort.__version__}: {', '.join(ort.get_available_providers())}"


def _registration() -> str:
    import onnxruntime as ort

    options = ort.SessionOptions()
    try:
        options.register_custom_ops_library(str(library.library_path()))
    except Exception as error:  # ONNX Runtime's own classes, which share no base of theirs
        raise FcmError(str(error)) from error
    return "ONNX Runtime accepts the library"


def _gpu() -> str:
    device = present_device()
    if device is None:
        raise FcmError("no NVIDIA driver or GPU")
    major, minor = device.capability
    return f"{device.name}, sm_{major}{minor}, driver for CUDA {device.driver}"


def _cache() -> str:
    directory = library.cache_directory()
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise FcmError(f"{directory} is not writable; kernels are compiled anew in each process")
    return str(directory)


def examine() -> list[Finding]:
    """Look for all that is needed. Without a GPU, what only a GPU needs is a remark."""
    gpu = _find("GPU", _gpu, needed=False)
    return [
        _find("library", lambda: f"{Path(library.library_path())} {library.version()}"),
        _find("ONNX Runtime", _runtime),
        _find("registration", _registration),
        _find("NVRTC", library.nvrtc_version, needed=gpu.ok),
        gpu,
        _find("cubin cache", _cache, needed=False),
    ]


def doctor() -> int:
    """Print what was found; return the exit code: 1 if something needed is missing."""
    findings = examine()
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.needed else "none"
        print(f"{finding.what:<13} {mark:<8} {finding.found}")
    return int(any(finding.needed and not finding.ok for finding in findings))
