"""Timed tiles as lines of JSON: what `benchmarks.modules --jsonl` writes and `benchmarks.calibrate` fits.

A line is one tile of one module: B images of X, H rows and W columns (absent: H), `spec` (the fields of fcm::Spec by
name), `us` microseconds a launch, `err` the norm of the error over the norm of the result, `regs` registers and `local`
bytes of local memory a thread, `occ` thread blocks that an SM held, `shared` bytes, `grid`, `threads`, `revision`
of the kernels (with a + or -dirty where they had changes on top), and, true, `whole` where a mean is that of the map
itself. Biases are always there.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

from ort_fcm.planner.chain import STEM_CHANNELS

from benchmarks.case import Case, Stage

TYPES = ("float16", "tf32", "float32")  # in the order of fcm::Type, as the kinds are of fcm::Dense and fcm::Activation
KINDS = ("", "pw", "conv")
ACTIVATIONS = (
    "none", "relu", "clip", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu",
    "tanh",
)  # fmt: skip
PARTS = ("first", "depthwise", "project")
OPTIONS = ("mean", "scaled", "norm_epsilon", "pool")  # of Case and fcm::Spec; absent where they are not there
SIDES = ("top", "left", "bottom", "right")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of lines, which may be compressed (.xz)."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def tile(row: dict[str, Any]) -> str:
    """A row's tile as the node's attribute has it."""
    return " ".join(f"{k[5:]}={v}" for k, v in row["spec"].items() if k.startswith("tile."))


def as_run(case: Case) -> Case:
    """The case as its kernel runs it: a lone stem in front of a depthwise that passes its result on."""
    stem = case.stages[0]
    if len(case.stages) > 1 or stem.kind != "conv" or stem.c_in > STEM_CHANNELS or (case.pool and case.residual):
        return case
    return replace(case, stages=(stem, Stage("dw", stem.c_out, stem.c_out, bias=False)))


def places(case: Case) -> list[int]:
    """Which part of the kernel each stage is, of the case as it is run: 0 first, 1 depthwise, 2 project."""
    stages = as_run(case).stages
    return [1 if s.kind == "dw" else 2 if i + 1 == len(stages) else 0 for i, s in enumerate(stages)]


def spec(case: Case) -> dict[str, Any]:
    """The fields of fcm::Spec by name, those of stages that are not there left out."""
    stages = as_run(case).stages
    middle = stages[0].c_out if len(stages) > 1 else stages[0].c_in
    fields: dict[str, Any] = {"type": TYPES.index(case.dtype), "first": 0, "depthwise": False, "project": 0}
    fields |= {"c_in": stages[0].c_in, "c_mid": middle, "c_out": stages[-1].c_out, "residual": case.residual}
    fields |= {"input_nchw": case.input_nchw, "output_nchw": case.output_nchw}
    for stage, place in zip(stages, places(case), strict=True):
        part = PARTS[place]
        fields[part] = True if stage.kind == "dw" else KINDS.index(stage.kind)
        for what in ("kernel", "stride", "dilation"):
            fields |= {f"{part}_window.{what}_{axis}": v for axis, v in zip("hw", getattr(stage, what), strict=True)}
        fields |= {f"{part}_window.pad_{side}": v for side, v in zip(SIDES, stage.pads, strict=True)}
        fields |= _activation(part, stage.activation, stage.params)
    fields |= {name: getattr(case, name) for name in OPTIONS if getattr(case, name)}
    if case.output_activation != "none":
        fields |= _activation("output", case.output_activation, case.output_params)
    return fields | {f"tile.{k}": int(v) for k, v in (item.split("=") for item in case.tile.split())}


def _activation(part: str, kind: str, params: tuple[float, float]) -> dict[str, Any]:
    return {f"{part}_act.kind": ACTIVATIONS.index(kind), f"{part}_act.alpha": params[0], f"{part}_act.beta": params[1]}


def case(row: dict[str, Any]) -> Case:
    """The module of a row, with its tile."""
    fields = row["spec"]

    def activation(part: str) -> tuple[str, tuple[float, float]]:
        alpha, beta = (fields.get(f"{part}_act.{name}", 0.0) for name in ("alpha", "beta"))
        return ACTIVATIONS[fields.get(f"{part}_act.kind", 0)], (alpha, beta)

    def stage(part: str) -> Stage:
        def pair(what: str) -> tuple[int, int]:
            h, w = (fields.get(f"{part}_window.{what}_{axis}", 1) for axis in "hw")
            return h, w

        top, left, bottom, right = (fields.get(f"{part}_window.pad_{side}", 0) for side in SIDES)
        return Stage(
            "dw" if part == "depthwise" else KINDS[fields[part]],
            fields["c_in" if part == "first" or used == ["project"] else "c_mid"],
            fields["c_out" if part == "project" else "c_mid"],
            pair("kernel"), pair("stride"), pair("dilation"), (top, left, bottom, right), *activation(part),
        )  # fmt: skip

    used = [part for part in PARTS if fields[part]]
    output, params = activation("output")
    return Case(
        tuple(stage(part) for part in used), TYPES[fields["type"]], row["B"], row["H"], row.get("W", row["H"]),
        fields["residual"], output, params, fields["input_nchw"], fields["output_nchw"], tile(row),
        **{name: fields[name] for name in OPTIONS if name in fields},
    )  # fmt: skip
