"""GPUs as data. `gpus.toml` beside this file holds the known ones; a user's file has the same form.

A GPU is one table, or an array of tables of which each gives some figures and their `source`; figures of its compute
capability (shared memory, registers, threads) need not be repeated.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from .chain import PlannerError


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU: what its maker states (effective rates are the cost model's business)."""

    name: str
    sm: int  # compute capability times 10: 90 for 9.0
    sms: int  # streaming multiprocessors
    clock_mhz: float  # boost clock
    memory_gbps: float  # device memory, 1e9 bytes/s
    l2_bytes: int
    l2_gbps: float  # L2 to all SMs, 1e9 bytes/s; an estimate, makers do not state it
    shared_per_sm: int  # bytes
    shared_per_block: int  # bytes, with opt-in
    max_threads_per_sm: int
    tensor_fp16_tflops: float  # dense, float32 accumulation; without tensor cores: the plain float16 rate
    tensor_tf32_tflops: float  # dense; 0: no TF32
    fp32_tflops: float
    registers_per_sm: int = 65536
    max_blocks_per_sm: int = 16
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)  # figure -> where it is stated

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("name", "sources"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlannerError(f"GPU '{self.name}': {item.name} must be a number")
            if value < 0 or (value == 0 and item.name != "tensor_tf32_tflops") or value == float("inf"):
                raise PlannerError(f"GPU '{self.name}': {item.name} must be positive and finite")


_FIGURES = {f.name: f for f in fields(Gpu) if f.name not in ("name", "sources")}


def _gpu(name: str, tables: list[dict[str, Any]], capabilities: Mapping[int, dict[str, Any]]) -> Gpu:
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    sm = next((table["sm"] for table in tables if "sm" in table), 0)
    for table in ([capabilities[sm]] if sm in capabilities else []) + tables:
        for key, value in table.items():
            if key == "source":
                continue
            if key not in _FIGURES:
                raise PlannerError(f"GPU '{name}': unknown figure '{key}' (known: {', '.join(_FIGURES)})")
            values[key] = value
            sources[key] = str(table.get("source", ""))
    missing = [key for key, f in _FIGURES.items() if f.default is MISSING and key not in values]
    if missing:
        raise PlannerError(f"GPU '{name}': missing {', '.join(missing)}")
    return Gpu(name=name, sources=sources, **values)


def _load(path: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[int, dict[str, Any]]]:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlannerError(f"GPU file '{path}': {error}") from None
    capabilities = {int(sm): table for sm, table in data.pop("compute_capability", {}).items()}
    gpus: dict[str, list[dict[str, Any]]] = {}
    for name, tables in data.items():
        tables = tables if isinstance(tables, list) else [tables]
        if not tables or not all(isinstance(table, dict) for table in tables):
            raise PlannerError(f"GPU file '{path}': '{name}' is not a table of figures")
        gpus[name] = tables
    return gpus, capabilities


_known, _CAPABILITIES = _load(Path(__file__).with_name("gpus.toml"))
GPUS: Mapping[str, Gpu] = {name: _gpu(name, tables, _CAPABILITIES) for name, tables in _known.items()}

# Words that say who makes or packages a GPU but not which it is: 'NVIDIA A100-SXM4-80GB' is an A100.
_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|jetson|agx|rtx|gtx|sxm\d?|hgx|\d+gb|hbm\w*|nvgpu|")
_PREFIX = re.compile(r"^(nvidia|geforce|tesla|quadro|jetson|agx|rtx|gtx)+")


def _key(name: str) -> str:
    words = [word for word in re.split(r"[\s\-_/()]+", name.lower()) if not _NOISE.fullmatch(word)]
    return _PREFIX.sub("", "".join(words))


def gpu(name: str) -> Gpu:
    """The GPU of that name, in any case and spacing, as makers ('H200') or drivers ('NVIDIA H200') write it; or the
    only GPU of a TOML file, given its path. PlannerError for others, naming the known ones."""
    if name.lower().endswith(".toml"):
        tables, capabilities = _load(Path(name))
        if len(tables) != 1:
            raise PlannerError(f"GPU file '{name}' must hold one GPU, not {len(tables)}")
        ((own, figures),) = tables.items()
        return _gpu(own, figures, {**_CAPABILITIES, **capabilities})
    for known in GPUS:
        if _key(known) == _key(name):
            return GPUS[known]
    raise PlannerError(f"unknown GPU '{name}' (known: {', '.join(GPUS)}; or the path of a .toml file)")
