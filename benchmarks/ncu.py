"""Nsight Compute's counters of every kernel of a command, in groups that the command marks."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.driver import Cuda
from ort_fcm.errors import FcmError

MARK = "fcm_mark"
_PTX = f".version 7.0\n.target sm_75\n.address_size 64\n.visible .entry {MARK}() {{ ret; }}\n"
SECTOR = 32  # bytes

# Between the SMs and L2: lts__t_bytes counts every sector that a slice of L2 looks up, so also what one half of L2 asks
# of the other (ltcfabric) and what is not the SMs'; srcunit_tex is what the SMs' L1 asked for, in sectors of 32 bytes.
LEAST = ("lts__t_bytes.sum", "dram__bytes_read.sum")
METRICS = (*LEAST, "lts__t_sectors_srcunit_tex.sum", "lts__t_sectors_srcunit_ltcfabric.sum", "dram__bytes_write.sum")

Kernel = dict[str, float | str]  # "kernel": its name, and each counter by name


class Mark:
    """Launches an empty kernel, so that groups of kernels can be told apart."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.function, _ = cuda.function(_PTX.encode(), MARK, 0)

    def __call__(self) -> None:
        self.cuda.launch_empty(self.function)
        self.cuda.synchronise()


def parse(text: str) -> list[Kernel]:
    """The kernels of ncu's CSV output, in the order of their launches. FcmError where there is no table."""
    lines = text.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise FcmError(f"ncu gave no table: {text[-500:]}")
    found: dict[int, Kernel] = {}
    for row in csv.DictReader(lines[header:]):
        if row["ID"].isdecimal() and row["Metric Name"]:
            kernel = found.setdefault(int(row["ID"]), {"kernel": row["Kernel Name"]})
            kernel[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [found[i] for i in sorted(found)]


def groups(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels before each mark."""
    found: list[list[Kernel]] = [[]]
    for kernel in kernels:
        if MARK in str(kernel["kernel"]):
            found.append([])
        else:
            found[-1].append(kernel)
    return found[:-1]


def profile(command: Sequence[str], options: Sequence[str] = (), metrics: Sequence[str] = METRICS) -> list[Kernel]:
    """The counters of every kernel that the command launches, L2 cold before each. Counters that this GPU does not
    have are left out. FcmError with ncu's words where it fails."""
    if not shutil.which("ncu"):
        raise FcmError("ncu (Nsight Compute) is not on the path")
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "ncu.csv"
        for wanted in (metrics, [name for name in metrics if name in LEAST]):
            ncu: list[Any] = ["ncu", "--csv", "--log-file", log, "--print-units", "base", "--clock-control", "none",
                              "--cache-control", "all", *options, "--metrics", ",".join(wanted)]  # fmt: skip
            done = subprocess.run([*ncu, *command], capture_output=True, text=True)
            text = log.read_text() if log.exists() else ""
            if '"ID"' in text:
                return parse(text)
    raise FcmError(f"ncu failed: {(text or done.stderr or done.stdout)[-500:]}")
