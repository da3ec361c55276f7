"""Where the custom-op library lies, and its C functions for tools and tests."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

from ort_fcm.errors import FcmError

_LIBRARY = Path(__file__).resolve().parent / "libort_fcm.so"


def library_path() -> Path:
    """Return the path of the custom-op library; raise `FcmError` if it is not built.

    Also tells the library, through the environment variable ORT_FCM_NVRTC, where this Python environment has NVRTC,
    unless the variable is set already or there is none.
    """
    if not _LIBRARY.is_file():
        raise FcmError(f"{_LIBRARY}: not found; build it with `make`, or install the ort-fcm wheel")
    nvrtc = find_nvrtc()
    if nvrtc:
        os.environ.setdefault("ORT_FCM_NVRTC", str(nvrtc))
    return _LIBRARY


def find_nvrtc() -> Path | None:
    """Return NVRTC as the nvidia-cuda-nvrtc package of this Python environment installs it, or None."""
    spec = importlib.util.find_spec("nvidia")
    for directory in (spec and spec.submodule_search_locations) or ():
        found = sorted(Path(directory).glob("*/lib/libnvrtc.so.1[23]"))
        if found:
            return found[-1]
    return None


@functools.cache
def _load() -> ctypes.CDLL:
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise FcmError(f"{path}: cannot be loaded: {error}") from error


def version() -> str:
    """Return the library's own version."""
    function = _load().ort_fcm_version
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _call(name: str, *arguments: str) -> str:
    result = ctypes.c_char_p()
    failed = getattr(_load(), name)(*(argument.encode() for argument in arguments), ctypes.byref(result))
    text = (result.value or b"").decode()
    if failed:
        raise FcmError(text)
    return text


def kernel_source(module: str) -> str:
    """Return the CUDA source that the library generates for `module`.

    `module` has a line `name=value` for each attribute of a FusedConvModule node (lists separated by spaces), and
    `channels` (of X, then after each stage), `type` (float16, tf32 or float32) and, if need be, `residual=1`. Raises
    `FcmError` with what is wrong with it.
    """
    return _call("ort_fcm_source", module)


def kernel_resources(module: str, shared_limit: int) -> dict[str, str]:
    """Return the tile that the library uses for `module` where a thread block may have `shared_limit` bytes of shared
    memory, with `threads`, `shared_bytes` and, as `replaced`, why that is not the node's own tile (empty if it is)."""
    lines = _call("ort_fcm_resources", module, str(shared_limit)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def compile_kernel(module: str, architecture: str) -> Path:
    """Compile `module` for `architecture` (as "sm_90a") into the cubin cache; return the cubin's path."""
    return Path(_call("ort_fcm_compile", module, architecture))


def measure_module(module: str, x_shape: tuple[int, int, int, int]) -> float:
    """Return the microseconds that `module` takes on the GPU present, launched many times back to back, for X of a
    shape. Threads may call at once: they compile in parallel, and measure one at a time. Raises `FcmError` where it
    cannot run, also where its tile is not one for this GPU."""
    return float(_call("ort_fcm_measure", module, " ".join(map(str, x_shape))))


def nvrtc_version() -> str:
    """Return where the library finds NVRTC and its version; raise `FcmError` if it finds none."""
    return _call("ort_fcm_nvrtc")


def cache_directory() -> Path:
    """Return the directory of the cubin cache: ORT_FCM_CACHE, or a default under the user's cache directory."""
    return Path(_call("ort_fcm_cache_directory"))
