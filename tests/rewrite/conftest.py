"""A planner that fuses whatever it may, so that these tests are of the rewriter, whatever the cost model says."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from onnx import ModelProto

from ort_fcm.rewrite import pipeline
from ort_fcm.rewrite.match import Stage
from ort_fcm.rewrite.plan import Planned, Segment

LEGAL = {
    "dw", "pw", "conv", "dw-pw", "pw-dw", "conv-dw", "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw",
}  # fmt: skip


def legal(stages: list[Stage]) -> bool:
    behind = [stage for stage in stages[1:] if stage.kind == "pw"]
    return "-".join(stage.kind for stage in stages) in LEGAL and all(stage.strides == (1, 1) for stage in behind)


def greedy(view: Any, chains: list[list[Stage]], *_: Any) -> Planned:
    segments = []
    for chain in chains:
        start = 0
        while start < len(chain):
            count = max(n for n in (1, 2, 3) if legal(chain[start : start + n]))
            segment = Segment(tuple(chain[start : start + count]), "ANY", "", 0, 0, 0.0)
            segments.append(segment)
            start += len(segment.stages)
    return Planned(segments, {}, (0, 0), (0, 0), [])


@pytest.fixture
def seed() -> int:
    value = secrets.randbelow(2**31)
    print(f"seed {value}")
    return value


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., pipeline.RewriteResult]:
    """`rewrite` with the greedy planner."""
    monkeypatch.setattr(pipeline, "make_plan", greedy)

    def call(model: ModelProto, *args: Any, **options: Any) -> pipeline.RewriteResult:
        return pipeline.rewrite(model, *args, gpu="H200", **options)

    return call
