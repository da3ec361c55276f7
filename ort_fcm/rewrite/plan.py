"""Ask the planner what to fuse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import TensorProto

from ort_fcm.errors import FcmError
from ort_fcm.planner import PRIORS, Chain, Gpu, Layer, Plan, PlannerError, folds_mean, plan_chain
from ort_fcm.rewrite.graph import View, label
from ort_fcm.rewrite.match import Stage
from ort_fcm.tune import Tuner

DTYPES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}

# Stock's estimate leaves out layout changes and a bias kernel that a profile showed (docs/performance.md, h).
CAUTIOUS = replace(PRIORS, stock_doubt=1.5)


@dataclass(frozen=True)
class Segment:
    """Stages that run as one module. traffic_bytes: between SMs and L2; dram_bytes: from and to device memory;
    time_us: microseconds, estimated unless measured."""

    stages: tuple[Stage, ...]
    variant: str
    tile: str
    traffic_bytes: int
    dram_bytes: int
    time_us: float
    measured: bool = False

    @property
    def kinds(self) -> str:
        return "-".join(["mean"] * self.stages[0].mean + [stage.kind for stage in self.stages])


@dataclass(frozen=True)
class Planned:
    """Of one graph: its modules, the reason of each convolution in none (by position), and bytes between SMs and L2,
    and from and to device memory, each without and with the modules."""

    segments: list[Segment]
    reasons: dict[int, str]
    traffic: tuple[int, int]
    dram: tuple[int, int]
    plans: list[Plan]


def read_plans(path: Path) -> tuple[Plan, ...]:
    """The plans of a file that `ort-fcm plan --json` wrote, perhaps edited. FcmError names the file and its fault."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FcmError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise FcmError(f"{path} is not JSON: {error}") from None
    plans = data.get("plans") if isinstance(data, dict) else None
    if not isinstance(plans, list):
        raise FcmError(f"{path} has no list 'plans': `ort-fcm plan --json` writes one")
    try:
        return tuple(Plan.from_dict(item) for item in plans)
    except PlannerError as error:
        raise FcmError(f"{path}: {error}") from None


def plan(
    view: View,
    chains: Sequence[Sequence[Stage]],
    gpu: Gpu,
    objective: str,
    given: Mapping[str, Plan],
    tuner: Tuner | None = None,
) -> Planned:
    """Plan every chain, with times measured by `tuner` if there is one, or take the plan in `given` of the chain's
    name."""
    segments: list[Segment] = []
    plans: list[Plan] = []
    reasons: dict[int, str] = {}
    traffic_before = traffic_after = saved_by_l2 = 0
    pools = {view.name(stage.output): stage.kind for stages in chains for stage in stages if stage.poolable}
    chains = [_settled(view, stages, pools, gpu, objective) for stages in chains]
    pooled = {stages[0].source for stages in chains if stages[0].mean}
    known = [_chain(view, stages, pooled, pools) for stages in chains]
    if tuner:
        tuner.tune([chain for chain in known if isinstance(chain, Chain) and chain.name not in given])
    for stages, chain in zip(chains, known, strict=True):
        if isinstance(chain, str):
            reasons.update({stage.conv: chain for stage in stages})
            continue
        try:
            if chain.name in given:
                result = given[chain.name]
            else:
                result = tuner.plan(chain) if tuner else plan_chain(chain, gpu, objective, CAUTIOUS)
            result.check()
            if result.chain != chain:
                other = result.chain.batch if replace(result.chain, batch=chain.batch) == chain else None
                what = f"batch {other}, not {chain.batch}" if other else "another chain of that name"
                raise FcmError(f"the plan of chain '{chain.name}' is for {what}")
        except PlannerError as error:
            raise FcmError(str(error)) from None
        plans.append(result)
        traffic_before += result.traffic_before
        traffic_after += result.traffic_after
        saved_by_l2 += sum(module.traffic_bytes - module.dram_bytes for module in result.modules)
        reasons.update({stages[skip.layer].conv: skip.reason for skip in result.skips})
        for module in result.modules:
            segments.append(
                Segment(
                    tuple(stages[module.first : module.last + 1]),
                    module.variant,
                    str(module.tile),
                    int(module.traffic_bytes),
                    int(module.dram_bytes),
                    float(module.time_us),
                    tuner is not None and chain.name not in given and tuner.is_measured(chain, module),
                )
            )
    # stock's kernels are counted as touching every tensor once: their traffic all reaches device memory
    dram = (traffic_before, traffic_after - saved_by_l2)
    return Planned(segments, reasons, (traffic_before, traffic_after), dram, plans)


def _settled(
    view: View, stages: Sequence[Stage], pools: Mapping[str, str], gpu: Gpu, objective: str
) -> Sequence[Stage]:
    """The chain, whose first stage takes a mean itself only where that pays."""
    plain = stages[0].unfolded
    chain = _chain(view, stages, set(), pools)
    if plain is None or isinstance(chain, str) or pools.get(stages[0].source) == "dw":
        return stages
    return stages if folds_mean(chain, gpu, objective, CAUTIOUS) else [plain, *stages[1:]]


def _chain(view: View, stages: Sequence[Stage], pooled: set[str], pools: Mapping[str, str]) -> Chain | str:
    """pooled: the maps of which a module takes the mean; pools: those that a module in front can give the mean of, with
    the kind of stage that makes them."""
    shape = view.planned(stages[0].source)
    dtype = DTYPES.get(view.type(stages[0].source))
    shape = (*shape, 1, 1) if shape and len(shape) == 2 else shape
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
            stage.poolable and view.name(stage.output) in pooled,
            stage.mean,
            bool(stage.factors),
            stage.norm is not None,
            stage.mean and stage.source not in pools,
        )
        for stage in stages
    )
    try:
        return Chain(layers, shape[0], shape[2], shape[3], dtype, label(view.nodes[stages[0].conv]))
    except PlannerError as error:
        return str(error)
