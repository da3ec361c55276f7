"""The whole rewrite of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from ort_fcm.compare import compare, session
from ort_fcm.device import present_gpu
from ort_fcm.errors import FcmError
from ort_fcm.planner import Gpu, Plan, PlannerError
from ort_fcm.planner import gpu as gpu_by_name
from ort_fcm.rewrite.channels_last import move_transposes
from ort_fcm.rewrite.emit import DOMAIN, IR_VERSION, OP, VERSION, Functions, emit
from ort_fcm.rewrite.float16 import to_float16
from ort_fcm.rewrite.graph import View, label
from ort_fcm.rewrite.load import check_writable, inline, load, save
from ort_fcm.rewrite.match import CONVOLUTIONS, chains
from ort_fcm.rewrite.plan import Planned, read_plans
from ort_fcm.rewrite.plan import plan as make_plan
from ort_fcm.rewrite.report import CheckReport, ModuleReport, Report, Skipped
from ort_fcm.rewrite.shapes import infer
from ort_fcm.tune import Tuner, gpu_to_tune_for

DEFAULT_GPU = "H200"
MOST_NORM_ERROR = 0.3  # beyond it, a conversion to float16 is wrong, not imprecise
UNCHANGED = CheckReport(0.0, 0.0, True, [])


@dataclass(frozen=True)
class RewriteResult:
    """The rewritten model, what was done, and the planner's plan of every chain."""

    model: onnx.ModelProto
    report: Report
    plans: tuple[Plan, ...]


def rewrite(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None = None,
    *,
    gpu: str | None = None,
    batch: int | None = None,
    float16: bool = False,
    constants: bool = False,
    plan: Sequence[Plan] | str | Path = (),
    check: bool = True,
    objective: str = "time",
    tune: bool = False,
    tune_seconds: float = 60.0,
) -> RewriteResult:
    """Replace chains of depthwise, pointwise and stem convolutions by fused modules.

    model: a path, or a model, which is left as it is. output: where to write the result, if anywhere.
    gpu: the name of the GPU to plan for; by default the one present, or without one H200.
    batch: what a dynamic batch is planned for, 1 by default. float16: convert weights and what lies inside; graph
    inputs and outputs keep their type. constants: the caller's word that initializers which are also graph inputs are
    never overridden; these inputs go. plan: plans to use for the chains of the same name, or the file of
    `ort-fcm plan --json`, perhaps edited; it says the GPU too. check: compare with the original on the CPU. objective:
    "time" or "traffic", what the planner minimises. tune: choose by times measured on the GPU present, in about
    `tune_seconds`; the result runs on other machines with such a GPU.

    FcmError, and nothing written, when the input is bad or the check fails.
    """
    path = Path(output) if output is not None else None
    if path is not None:
        check_writable(path)
    given = read_plans(Path(plan)) if isinstance(plan, str | Path) else tuple(plan)
    target, is_default = (gpu_to_tune_for(gpu), False) if tune else choose_gpu(gpu)
    for item in given:
        if gpu is None and not tune:
            target, is_default, gpu = item.gpu, False, item.gpu.name
        if item.gpu != target:
            raise FcmError(f"the plan of chain '{item.chain.name}' is for {item.gpu.name}, not {target.name}")
    if tune and objective != "time":
        raise FcmError(f"tuning measures time; it cannot minimise {objective}")
    original = load(model)
    result = onnx.ModelProto()
    result.CopyFrom(original)
    if constants:
        drop_overridable_inputs(result.graph)
    report = Report(target.name, is_default, tune)
    try:
        if float16:
            result = to_float16(result)
        tuner = Tuner(target, tune_seconds) if tune else None
        plans = _rewrite(result, report, target, batch, given, objective, tuner)
    except FcmError:
        raise
    except Exception:
        session(original)  # when the model is at fault, this says how
        raise
    if check:
        report.check = _check(original, result, float16) if report.modules or float16 else UNCHANGED
    if path is not None:
        save(result, path)
    return RewriteResult(result, report, plans)


def _check(original: onnx.ModelProto, result: onnx.ModelProto, converted: bool) -> CheckReport:
    """Compare on the CPU; FcmError if an output differs by more than its type explains.

    A network may be so sensitive that float16 alone costs more than the tolerance: then a converted one may err as much
    as a plain conversion does, and half as much again.
    """
    found = compare(original, result)
    failed, note = [item for item in found.outputs if not item.passed], ""
    if failed and converted:
        plain = onnx.ModelProto()
        plain.CopyFrom(original)
        allowed = {item.name: item.norm_error for item in compare(original, to_float16(plain)).outputs}
        names = ", ".join(f"'{item.name}'" for item in failed)
        note = f"on these inputs, float16 alone costs output {names} as much: the network is sensitive to it"
        failed = [item for item in failed if item.norm_error > min(1.5 * allowed[item.name], MOST_NORM_ERROR)]
    if failed:
        worst = max(failed, key=lambda item: item.max_rel_error)
        raise FcmError(
            f"the check failed: output '{worst.name}' differs from the original's by {worst.max_abs_error:.3g} "
            f"({worst.max_rel_error:.2g} of its largest value)",
            exit_code=1,
        )
    constant = [item.name for item in found.outputs if item.constant]
    return CheckReport(found.max_abs_error, found.max_rel_error, True, constant, note)


def choose_gpu(name: str | None) -> tuple[Gpu, bool]:
    """The GPU of that name, or the one present, or the default (True). FcmError for an unknown name."""
    present = present_gpu() if name is None else None
    try:
        return gpu_by_name(name or present or DEFAULT_GPU), name is None and present is None
    except PlannerError as error:
        if name is None:  # a GPU that the table does not have
            return gpu_by_name(DEFAULT_GPU), True
        raise FcmError(str(error)) from None


def _rewrite(
    model: onnx.ModelProto,
    report: Report,
    gpu: Gpu,
    batch: int | None,
    given: Sequence[Plan],
    objective: str,
    tuner: Tuner | None = None,
) -> tuple[Plan, ...]:
    """Rewrite in place."""
    if any(node.domain == DOMAIN and node.op_type == OP for node in model.graph.node):
        raise FcmError("the model has been rewritten already: it contains FusedConvModule nodes")
    unchanged = onnx.ModelProto()
    if model.functions or any(node.op_type == "Transpose" for node in model.graph.node):
        unchanged.CopyFrom(model)
    if model.functions:
        inline(model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    overridable = {tensor.name for tensor in model.graph.initializer} & {value.name for value in model.graph.input}
    shapes = infer(model, batch)
    if move_transposes(View(model.graph, shapes, opset, overridable)):
        shapes = infer(model, batch)
    functions = Functions(opset)
    plans: list[Plan] = []
    for view in _views(model.graph, View(model.graph, shapes, opset, overridable)):
        found, reasons = chains(view)
        planned = make_plan(view, found, gpu, objective, {item.chain.name: item for item in given}, tuner)
        plans += planned.plans
        reasons |= planned.reasons
        names = emit(view, planned.segments, functions, gpu.name) if planned.segments else []
        _add(report, view, planned, names, reasons)
    if unknown := {item.chain.name for item in given} - {item.chain.name for item in plans}:
        raise FcmError(f"there is a plan of chain '{min(unknown)}', which the model does not have")
    if report.modules:
        model.ir_version = max(model.ir_version, IR_VERSION)
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
        model.functions.extend(functions.protos())
    elif unchanged.ir_version:
        model.CopyFrom(unchanged)
    return tuple(plans)


def drop_overridable_inputs(graph: onnx.GraphProto) -> None:
    """Make plain constants of the initializers that are graph inputs too."""
    initializers = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in initializers]
    del graph.input[:]
    graph.input.extend(kept)


def _views(graph: onnx.GraphProto, view: View) -> Iterator[View]:
    """The views of a graph and of those inside it, inner ones first: a node is copied when its graph is written."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _views(inner, View(inner, view.shapes, view.opset, view.overridable, view))
    yield view


def _add(report: Report, view: View, planned: Planned, names: list[str], reasons: dict[int, str]) -> None:
    layers = {stage.conv for segment in planned.segments for stage in segment.stages} | set(reasons)
    report.convolutions += len(layers | {i for i, node in enumerate(view.nodes) if node.op_type in CONVOLUTIONS})
    for segment, name in zip(planned.segments, names, strict=True):
        nodes = [label(view.nodes[i]) for i in sorted(i for stage in segment.stages for i in stage.nodes)]
        report.modules.append(
            ModuleReport(
                name,
                segment.variant,
                segment.kinds,
                nodes,
                segment.tile,
                segment.traffic_bytes,
                segment.dram_bytes,
                segment.time_us,
                segment.measured,
            )
        )
    report.skipped += [Skipped(label(view.nodes[i]), reason) for i, reason in sorted(reasons.items())]
    for total, bytes_ in ((report.traffic_bytes, planned.traffic), (report.dram_bytes, planned.dram)):
        total["before"] += bytes_[0]
        total["after"] += bytes_[1]
