"""The GPU present, asked of the CUDA driver alone: no toolkit, no CUDA package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_MULTIPROCESSORS = 16
_CLOCK_KHZ = 13
_L2_BYTES = 38
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_SHARED_BYTES_PER_SM = 81
_SHARED_BYTES_PER_BLOCK = 97


@dataclass(frozen=True)
class Device:
    """A GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_mhz: float
    memory_bytes: int
    l2_bytes: int
    shared_bytes_per_sm: int
    shared_bytes_per_block: int  # the most a thread block may ask for
    driver: str  # the CUDA version the driver supports

    @property
    def architecture(self) -> str:
        """What kernels are compiled for, as NVRTC names it: "sm_90a", with what no other GPU has, from 9.0 on."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def present_device(index: int = 0) -> Device | None:
    """Return GPU number `index`, or None if there is no driver or no such GPU."""
    driver = _driver()
    handle = ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(handle), index) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    version = ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    driver.cuDriverGetVersion(ctypes.byref(version))

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return Device(
        name=name.value.decode(),
        capability=(attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)),
        multiprocessors=attribute(_MULTIPROCESSORS),
        clock_mhz=attribute(_CLOCK_KHZ) / 1000,
        memory_bytes=memory.value,
        l2_bytes=attribute(_L2_BYTES),
        shared_bytes_per_sm=attribute(_SHARED_BYTES_PER_SM),
        shared_bytes_per_block=attribute(_SHARED_BYTES_PER_BLOCK),
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def present_gpu() -> str | None:
    """Return the name of GPU 0 as its driver gives it ("NVIDIA H200"), or None if there is none."""
    device = present_device()
    return device.name if device else None
