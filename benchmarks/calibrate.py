"""Fits the constants of the planner's time model to timed tiles, and says how well its choices do.

    python -m benchmarks.calibrate benchmarks/results/tiles_h200_{6,7,8,9,10,11}.jsonl.xz [--only NAME,...] [--no-fit]

The lines of the files are those of benchmarks/timings.py. The fit takes residency from there, and leaves out timings of
kernels that have changed since (CHANGED); the figures that follow use all, and the planner's own residency. Besides,
each of --folds parts of the modules is judged with constants that were fitted to the others: equal layers are in one
part, whatever the batch.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timings import read
from planner import Chain, Gpu, Layer, Tile, gpu
from planner.cost import FITTED, PRIORS, Priors, Segment, Work, estimate, illegal, joined, segment, times, work
from planner.plan import order

KINDS = ("", "pw", "conv")  # by fcm::Dense
KERNEL_ACTIVATIONS = (
    "none", "relu", "clip", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu",
    "tanh",
)  # fmt: skip


CHANGED = ("d503300", "1228e5e")  # revisions whose lone stages with wgmma asked for copies before they multiplied


@dataclass(frozen=True)
class Timing:
    tile: Tile
    work: Work
    blocks: int  # thread blocks an SM held
    us: float
    changed: bool  # the kernel has, since


@dataclass(frozen=True)
class Problem:
    name: str
    seg: Segment
    timings: dict[Tile, Timing]  # the last of each tile


def best(problem: Problem) -> float:
    """Microseconds of its best tile."""
    return min(t.us for t in problem.timings.values())


def chain(row: dict[str, Any]) -> Chain:
    spec = row["spec"]

    def layer(kind: str, part: str, inputs: int, outputs: int) -> Layer:
        def window(what: str) -> tuple[int, int]:
            a, b = (spec.get(f"{part}_window.{what}_{axis}", 1) for axis in "hw")
            return a, b

        pads = [spec.get(f"{part}_window.pad_{side}", 0) for side in ("top", "left", "bottom", "right")]
        return Layer(
            kind, inputs, outputs, window("kernel"), window("stride"), window("dilation"),
            (pads[0], pads[1], pads[2], pads[3]), KERNEL_ACTIVATIONS[spec.get(f"{part}_act.kind", 0)],
            residual=part == "project" and spec["residual"],
        )  # fmt: skip

    layers = []
    if spec["first"]:
        layers.append(layer(KINDS[spec["first"]], "first", spec["c_in"], spec["c_mid"]))
    if spec["depthwise"]:
        layers.append(layer("dw", "depthwise", spec["c_mid"], spec["c_mid"]))
    if spec["project"]:
        layers.append(layer(KINDS[spec["project"]], "project", spec["c_mid"], spec["c_out"]))
    options = {"mean": spec.get("mean", False), "scaled": spec.get("scaled", False), "whole": row.get("whole", False)}
    layers[0] = replace(layers[0], normed=bool(spec.get("norm_epsilon")), **options)
    layers[-1] = replace(layers[-1], pool=spec.get("pool", False))
    width = row.get("W", row["H"])
    return Chain(tuple(layers), row["B"], row["H"], width, "float16" if spec["type"] == 0 else "float32")


def problems(files: Iterable[Path], card: Gpu) -> list[Problem]:
    """Every distinct module of the files with its timings; the last timing of a tile counts."""
    found: dict[Chain, Problem] = {}
    for row in (row for file in files for row in read(file)):
        spec = row["spec"]
        if not row.get("us"):
            continue
        key = chain(row)
        if key not in found:
            seg = segment(key, 0, len(key.layers) - 1)
            assert seg
            name = "-".join(str(n) for n in [key.layers[0].in_channels] + [part.out_channels for part in key.layers])
            strides = max(part.stride[0] for part in key.layers)
            found[key] = Problem(f"{row['B']}x {seg.stages} {name}@{row['H']} s{strides}", seg, {})
        known = found[key]
        if spec["depthwise"] != (known.seg.depthwise is not None):
            continue  # a lone stem, timed when its input was not staged
        tile = Tile(**{name[5:]: value for name, value in spec.items() if name.startswith("tile.")})
        if known.seg.strip and illegal(known.seg, tile):
            continue  # a lone depthwise, timed when it had no kernel of its own
        changed = known.seg.streams and tile.wgmma > 0 and row.get("revision") in CHANGED
        known.timings[tile] = Timing(tile, work(known.seg, tile, card.sms), row["occ"], row["us"], changed)
    return list(found.values())


Vector = NDArray[np.float64]


LEVEL = 0.25  # weight of a problem's mean error beside those from tile to tile, which decide


def fit(chosen: list[Problem], card: Gpu, priors: Priors, names: list[str], least: int, steps: int = 40) -> Priors:
    """Levenberg-Marquardt on the logarithms of the constants; the residuals are logarithms of time, less their mean of
    the problem, and count by how near a tile is to its problem's best. Of problems with `least` tiles or more."""
    today = [replace(p, timings={tile: t for tile, t in p.timings.items() if not t.changed}) for p in chosen]
    # Gates have a model of their own.
    modelled = [p for p in today if not p.seg.gate and len(p.timings) >= least]
    rows = [(i, p.seg, t, (best(p) / t.us) ** 3) for i, p in enumerate(modelled) for t in p.timings.values()]
    which = np.array([i for i, *_ in rows])
    measured, near = np.log([t.us for _, _, t, _ in rows]), np.array([row[-1] for row in rows])
    of_problem = np.bincount(which, near)
    weight = np.sqrt(near / np.sqrt(of_problem)[which])
    stay = 0.005 * np.sqrt(len(modelled))  # keeps what the data do not tell near where it was

    def priors_of(x: Vector) -> Priors:
        values: dict[str, Any] = {name: float(value) for name, value in zip(names, np.exp(x), strict=True)}
        return replace(priors, **values)

    def residuals(x: Vector) -> Vector:
        now = priors_of(x)
        error = np.log([joined(times(seg, t.work, card, t.blocks, now), now) for _, seg, t, _ in rows]) - measured
        mean = (np.bincount(which, near * error) / of_problem)[which]
        return np.concatenate([weight * (error - mean), LEVEL * weight * mean, stay * (x - start)])

    start = np.log([getattr(priors, name) for name in names])
    x, damping = start, 1e-2
    r = residuals(x)
    for _ in range(steps):
        slope = np.stack([(residuals(x + 1e-4 * unit) - r) / 1e-4 for unit in np.eye(len(x))], axis=1)
        normal, gain = slope.T @ slope, 0.0
        for _ in range(20):
            step = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope.T @ r)
            step /= max(1.0, float(np.max(np.abs(step))))
            new = residuals(x + step)
            gain = float(r @ r - new @ new)
            if gain > 0:
                x, r, damping = x + step, new, damping / 4
                break
            damping *= 4
        if gain <= 1e-5 * float(r @ r):
            break
    return priors_of(x)


def ranks(values: Vector) -> Vector:
    """Ranks from 0; equal values share their mean rank."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[which])


Figures = tuple[int, float, float, float, float]  # batch, rank correlation, the pick's and the best's us, its estimate


def judged(p: Problem, card: Gpu, priors: Priors, least: int) -> Figures | None:
    """What the planner would pick of a problem's tiles; None where fewer than `least` were timed."""
    told = [(t, estimate(p.seg, t.tile, card, priors)) for t in p.timings.values()]
    known = [(order(p.seg, t.tile, e), t.us) for t, e in told if e and not e.spilled]
    if len(known) < least:
        return None
    estimates, measured = np.array([key[0] for key, _ in known]), np.array([us for _, us in known])
    rank = float(np.corrcoef(ranks(estimates), ranks(measured))[0, 1])
    (key, us) = min(known)
    return p.seg.batch, rank, us, float(min(measured)), key[0]


def report(title: str, figures: list[Figures]) -> None:
    """Prints rank correlation, the pick's measured time over the best's, and its estimate over its measurement."""
    for batch in (*sorted({f[0] for f in figures}), 0):
        _, rank, us, least, told = np.array([f for f in figures if batch in (0, f[0])]).T
        pick, level = us / least, told / us
        print(f"{title}, batch {batch or 'all':>3}: {len(rank):3} modules; rank correlation median "
              f"{np.median(rank):.2f}; pick/best median {np.median(pick):.3f}, 90 % {np.quantile(pick, 0.9):.3f}, "
              f"worst {max(pick):.2f}, of all {sum(us) / sum(least):.3f}; estimate/measured "
              f"{np.quantile(level, 0.1):.2f} to {np.quantile(level, 0.9):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--gpu", default="H200", help="name or .toml file of the GPU that was timed")
    parser.add_argument("--only", default=",".join(FITTED), help="constants that are fitted, separated by commas")
    parser.add_argument("--least", type=int, default=9, help="tiles of a module that says which of them comes first")
    parser.add_argument("--folds", type=int, default=8, help="parts of the modules, each left out in turn; 0: none")
    parser.add_argument("--no-fit", action="store_true", help="report the constants as they are")
    options = parser.parse_args()
    card, names = gpu(options.gpu), options.only.split(",")
    known = problems(options.files, card)
    priors = PRIORS if options.no_fit else fit(known, card, PRIORS, names, options.least)
    for name in names:
        print(f"{name} = {asdict(priors)[name]:.4g}")

    def part(p: Problem) -> int:
        return zlib.crc32(f"{p.seg.stages} {p.seg.layers}".encode()) % int(options.folds)

    left_out: list[Figures] = []
    for n in range(0 if options.no_fit else options.folds):
        others = fit([p for p in known if part(p) != n], card, PRIORS, names, options.least)
        left_out += [f for p in known if part(p) == n and (f := judged(p, card, others, options.least))]
    kinds = {"lone depthwises": [p for p in known if p.seg.strip], "all": known}
    for kind, chosen in kinds.items():
        report(kind, [f for p in chosen if (f := judged(p, card, priors, options.least))])
    if left_out:
        report("all, left out", left_out)


if __name__ == "__main__":
    main()
