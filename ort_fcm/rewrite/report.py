"""What a rewrite did, as data and as tables."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


def without_names(reason: str) -> str:
    """The reason without the tensor that it names, to count alike ones."""
    return re.sub(r"'[^']*' is", "it is", reason)


def convolutions_of(stages: str) -> int:
    """How many convolutions a module of these stages has."""
    return len(stages.removeprefix("mean-").split("-"))


@dataclass(frozen=True)
class ModuleReport:
    """One module. nodes: the model's nodes that it replaces; traffic_bytes (between SMs and L2) and dram_bytes (from
    and to device memory) are the planner's estimates, as is time_us unless it was measured."""

    name: str
    variant: str
    stages: str
    nodes: list[str]
    tile: str
    traffic_bytes: int
    dram_bytes: int
    time_us: float
    measured: bool = False


@dataclass(frozen=True)
class Skipped:
    node: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """Largest differences over all outputs; relative ones to the largest magnitude of the output. constant_outputs:
    those that had one value only on the inputs tried, so that the check says little of them. note: why a large error
    passed."""

    max_abs_error: float
    max_rel_error: float
    passed: bool
    constant_outputs: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Report:
    """gpu: planned for; tuned: with times measured on it; convolutions: in the model, with the fully connected layers
    behind a mean over the map; in_modules: of these in any module; fused_convolutions: in modules of two or more; of
    the convolutions' chains, `before` and `after`:
    traffic_bytes, all global memory accesses, which L2 may serve, and dram_bytes, what goes from and to device memory
    when L2 is cold."""

    gpu: str
    gpu_is_default: bool = False
    tuned: bool = False
    convolutions: int = 0
    modules: list[ModuleReport] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    traffic_bytes: dict[str, int] = field(default_factory=lambda: {"before": 0, "after": 0})
    dram_bytes: dict[str, int] = field(default_factory=lambda: {"before": 0, "after": 0})
    check: CheckReport | None = None

    @property
    def in_modules(self) -> int:
        return sum(convolutions_of(module.stages) for module in self.modules)

    @property
    def fused_convolutions(self) -> int:
        counts = [convolutions_of(module.stages) for module in self.modules]
        return sum(count for count in counts if count > 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `check` only when there was one."""
        data = asdict(self)
        data |= {"in_modules": self.in_modules, "fused_convolutions": self.fused_convolutions}
        if self.check is None:
            del data["check"]
        return data

    def print(self) -> None:
        """Tables of the modules and of the convolutions left alone."""
        from rich import print as show
        from rich.markup import escape
        from rich.table import Table

        note = " (the default: no GPU named, and none here that is known)" if self.gpu_is_default else ""
        how = "Tuned on" if self.tuned else "Planned for"
        show(f"{how} {escape(self.gpu)}{note}")
        if self.modules:
            table = Table("module", "variant", "tile", title="Fused modules")
            table.add_column("traffic, MB", justify="right")
            table.add_column("memory, MB", justify="right")
            table.add_column("time, us", justify="right")
            for module in self.modules:
                traffic, memory = (f"{count / 1e6:.2f}" for count in (module.traffic_bytes, module.dram_bytes))
                time = f"{module.time_us:.1f}"
                note = " (estimated)" if self.tuned and not module.measured else ""
                table.add_row(escape(module.name), module.variant, module.tile, traffic, memory, time + note)
            show(table)
        if self.skipped:
            table = Table("convolutions left alone", "reason")
            for reason, count in Counter(without_names(item.reason) for item in self.skipped).most_common():
                table.add_row(str(count), escape(reason))
            show(table)
        show(
            f"{self.convolutions} convolutions: {self.in_modules} in {len(self.modules)} modules, "
            f"{self.fused_convolutions} of them fused with others"
        )
        if not self.modules:
            show("There was nothing to fuse.")
        if self.traffic_bytes["before"]:
            for name, total in (("traffic", self.traffic_bytes), ("memory", self.dram_bytes)):
                before, after = total["before"] / 1e6, total["after"] / 1e6
                show(f"Estimated {name} of these chains: {before:.1f} MB before, {after:.1f} MB after")
            show("Traffic: all global memory accesses. Memory: those that reach it, as L2 serves what is read again.")
        if self.check is not None:
            word = "PASSED" if self.check.passed else "FAILED"
            show(
                f"Check against the original: largest error {self.check.max_abs_error:.3g} absolute, "
                f"{self.check.max_rel_error:.3g} relative: {word}"
                + (f" ({escape(self.check.note)})" if self.check.note else "")
            )
            for name in self.check.constant_outputs:
                show(f"Output '{escape(name)}' was constant on the inputs tried")
