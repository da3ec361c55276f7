"""Ask the planner what to fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import TensorProto

from ort_fcm.errors import FcmError
from ort_fcm.planner import Chain, Gpu, Layer, Plan, PlannerError, plan_chain
from ort_fcm.rewrite.graph import View, label
from ort_fcm.rewrite.match import Stage

DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class Segment:
    """Stages that run as one module. traffic_bytes: to and from global memory; time_us: microseconds, estimated."""

    stages: tuple[Stage, ...]
    variant: str
    tile: str
    traffic_bytes: int
    time_us: float

    @property
    def kinds(self) -> str:
        return "-".join(stage.kind for stage in self.stages)


@dataclass(frozen=True)
class Planned:
    """Of one graph: its modules, the reason of each convolution in none (by position), and bytes of global memory
    traffic without and with the modules."""

    segments: list[Segment]
    reasons: dict[int, str]
    before: int
    after: int
    plans: list[Plan]


def plan(view: View, chains: Sequence[Sequence[Stage]], gpu: Gpu, objective: str, given: Mapping[str, Plan]) -> Planned:
    """Plan every chain, or take the plan in `given` of the chain's name."""
    segments: list[Segment] = []
    plans: list[Plan] = []
    reasons: dict[int, str] = {}
    before = after = 0
    for stages in chains:
        chain = _chain(view, stages)
        if isinstance(chain, str):
            reasons.update({stage.conv: chain for stage in stages})
            continue
        try:
            result = given[chain.name] if chain.name in given else plan_chain(chain, gpu, objective)
            result.check()
            if result.chain != chain:
                raise FcmError(f"the plan of chain '{chain.name}' is for another chain of that name")
        except PlannerError as error:
            raise FcmError(str(error)) from None
        plans.append(result)
        before, after = before + result.traffic_before, after + result.traffic_after
        reasons.update({stages[skip.layer].conv: skip.reason for skip in result.skips})
        for module in result.modules:
            segments.append(
                Segment(
                    tuple(stages[module.first : module.last + 1]),
                    module.variant,
                    str(module.tile),
                    int(module.traffic_bytes),
                    float(module.time_us),
                )
            )
    return Planned(segments, reasons, before, after, plans)


def _chain(view: View, stages: Sequence[Stage]) -> Chain | str:
    shape = view.planned(stages[0].source)
    dtype = DTYPES.get(view.type(stages[0].source))
    if shape is None or len(shape) != 4:
        return "the shape of its input is not known"
    if dtype is None:
        return "the type of its input is not known"
    layers = tuple(
        Layer(
            stage.kind,
            stage.in_channels,
            stage.out_channels,
            stage.kernel,
            stage.strides,
            stage.dilations,
            stage.pads,
            stage.activation.kind,
            bool(stage.residual),
            label(view.nodes[stage.conv]),
            len(stage.nodes),
            len(stage.activation.nodes) + len(stage.output_activation.nodes) + bool(stage.residual),
        )
        for stage in stages
    )
    try:
        return Chain(layers, shape[0], shape[2], shape[3], dtype, label(view.nodes[stages[0].conv]))
    except PlannerError as error:
        return str(error)
