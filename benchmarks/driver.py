"""The slice of the CUDA driver that single-module measurements need: memory, launches, graphs and events, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
MULTIPROCESSORS, L2_BYTES = 16, 38  # CUdevice_attribute


class CudaError(RuntimeError):
    """A driver call failed; the message names the call and the driver's error."""

    def __init__(self, call: str, text: str) -> None:
        super().__init__(f"{call}: {text}")
        self.refused = call in ("cuFuncSetAttribute", "cuLaunchKernel")  # this kernel; the context is still good


class Cuda:
    """GPU 0 with its primary context current on this thread, and one stream."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", c_uint(0))
        self.device, self.context, self.stream = c_int(), c_void_p(), c_void_p()
        self.call("cuDeviceGet", byref(self.device), c_int(0))
        self.call("cuDevicePrimaryCtxRetain", byref(self.context), self.device)
        self.call("cuCtxSetCurrent", self.context)
        self.call("cuStreamCreate", byref(self.stream), c_uint(1))

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, name)(*arguments)
        if error:
            text = c_char_p()
            self.library.cuGetErrorString(c_int(error), byref(text))
            raise CudaError(name, f"{(text.value or b'unknown error').decode()} ({error})")

    def attribute(self, which: int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), c_int(which), self.device)
        return value.value

    def allocate(self, size: int) -> int:
        """Address of `size` bytes; freed with `free`."""
        address = c_void_p()
        self.call("cuMemAlloc_v2", byref(address), c_size_t(max(size, 16)))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", c_void_p(address))

    def upload(self, address: int, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values)
        self.call("cuMemcpyHtoD_v2", c_void_p(address), c_void_p(values.ctypes.data), c_size_t(values.nbytes))

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        values = np.empty(shape, dtype)
        self.call("cuMemcpyDtoH_v2", c_void_p(values.ctypes.data), c_void_p(address), c_size_t(values.nbytes))
        return values

    def fill(self, address: int, size: int, byte: int) -> None:
        self.call("cuMemsetD8_v2", c_void_p(address), ctypes.c_ubyte(byte), c_size_t(size))

    def function(self, cubin: bytes, name: str, shared_bytes: int) -> tuple[c_void_p, c_void_p]:
        """The kernel `name` of a cubin, allowed `shared_bytes` of shared memory, and its module for `unload`."""
        module, function = c_void_p(), c_void_p()
        self.call("cuModuleLoadData", byref(module), c_char_p(cubin))
        self.call("cuModuleGetFunction", byref(function), module, c_char_p(name.encode()))
        try:
            self.call("cuFuncSetAttribute", function, c_int(MAX_DYNAMIC_SHARED), c_int(shared_bytes))
        except CudaError:
            self.unload(module)
            raise
        return function, module

    def most_shared(self, cubin: bytes, name: str, refused: int) -> int:
        """The most shared memory, to the KiB, that the kernel `name` is allowed, below `refused` bytes."""
        low, high = 0, -(-refused // 1024)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                _, module = self.function(cubin, name, middle * 1024)
            except CudaError as error:
                if not error.refused:
                    raise
                high = middle
            else:
                self.unload(module)
                low = middle
        return low * 1024

    def occupancy(self, function: c_void_p, threads: int, shared: int) -> int:
        """Thread blocks of `function` that a multiprocessor holds."""
        blocks = c_int()
        name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        self.call(name, byref(blocks), function, c_int(threads), c_size_t(shared))
        return blocks.value

    def unload(self, module: c_void_p) -> None:
        self.call("cuModuleUnload", module)

    def launch(self, function: c_void_p, grid: tuple[int, int, int], threads: int, shared: int, argument: Any) -> None:
        """Launch on the stream; `argument` is the kernel's one parameter, a ctypes structure."""
        pointers = (c_void_p * 1)(ctypes.addressof(argument))
        sizes = [c_uint(v) for v in (*grid, threads, 1, 1, shared)]
        self.call("cuLaunchKernel", function, *sizes, self.stream, pointers, c_void_p())

    def launch_empty(self, function: c_void_p) -> None:
        """Launch one thread of a kernel without parameters on the stream."""
        self.call("cuLaunchKernel", function, *[c_uint(v) for v in (1, 1, 1, 1, 1, 1, 0)], self.stream, None, None)

    def synchronise(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def graph(self, record: Callable[[], None]) -> c_void_p:
        """What `record` launches, as an executable graph."""
        captured, executable = c_void_p(), c_void_p()
        self.call("cuStreamBeginCapture_v2", self.stream, c_int(1))
        record()
        self.call("cuStreamEndCapture", self.stream, byref(captured))
        self.call("cuGraphInstantiateWithFlags", byref(executable), captured, ctypes.c_ulonglong(0))
        self.call("cuGraphDestroy", captured)
        return executable

    def time_graph(self, executable: c_void_p, replays: int, warmup: int = 3) -> list[float]:
        """Milliseconds of each replay, between events."""
        start, stop = c_void_p(), c_void_p()
        self.call("cuEventCreate", byref(start), c_uint(0))
        self.call("cuEventCreate", byref(stop), c_uint(0))
        times = []
        for i in range(warmup + replays):
            self.call("cuEventRecord", start, self.stream)
            self.call("cuGraphLaunch", executable, self.stream)
            self.call("cuEventRecord", stop, self.stream)
            self.synchronise()
            elapsed = c_float()
            self.call("cuEventElapsedTime_v2" if hasattr(self.library, "cuEventElapsedTime_v2")
                      else "cuEventElapsedTime", byref(elapsed), start, stop)  # fmt: skip
            if i >= warmup:
                times.append(elapsed.value)
        self.call("cuEventDestroy_v2", start)
        self.call("cuEventDestroy_v2", stop)
        self.call("cuGraphExecDestroy", executable)
        return times
