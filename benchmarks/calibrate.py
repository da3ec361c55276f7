"""Fits the constants of the planner's time model to timed tiles, and says how well its choices do.

    python -m benchmarks.calibrate benchmarks/results/tiles_h200_6.jsonl.xz... [--gpu H200] [--fit-batch 128]

The lines of the files are those of benchmarks/timings.py. The fit takes residency from there; the figures that follow
use the planner's own.
With --fit-batch, only problems of that batch are fitted, and the others are reported apart: does it generalise?
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timings import read
from planner import Chain, Gpu, Layer, Tile, gpu
from planner.cost import (
    FITTED,
    PRIORS,
    Priors,
    Segment,
    Work,
    estimate,
    illegal,
    joined,
    segment,
    times,
    work,
)

KINDS = ("", "pw", "conv")  # by fcm::Dense
KERNEL_ACTIVATIONS = (
    "none", "relu", "clip", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu",
    "tanh",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    tile: Tile
    work: Work
    blocks: int  # thread blocks an SM held
    us: float


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
    options = {"mean": spec.get("mean", False), "scaled": spec.get("scaled", False)}
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
        known.timings[tile] = Timing(tile, work(known.seg, tile, card.sms), row["occ"], row["us"])
    return list(found.values())


Vector = NDArray[np.float64]


def fit(chosen: list[Problem], card: Gpu, priors: Priors, steps: int = 40) -> Priors:
    """Levenberg-Marquardt on the logarithms of the constants; the residuals are logarithms of time, and count by how
    near a tile is to its problem's best."""
    modelled = [p for p in chosen if not p.seg.gate]  # gates have a model of their own
    rows = [(p.seg, t, best(p) / t.us) for p in modelled for t in p.timings.values()]
    measured = np.log([t.us for _, t, _ in rows])
    weight = np.array([w for _, _, w in rows])
    stay = 1e-3 * np.sqrt(float(np.sum(weight**2)))  # keeps what the data do not tell near where it was

    def priors_of(x: Vector) -> Priors:
        values: dict[str, Any] = {name: float(value) for name, value in zip(FITTED, np.exp(x), strict=True)}
        return replace(priors, **values)

    def residuals(x: Vector) -> Vector:
        now = priors_of(x)
        told = [joined(times(seg, t.work, card, t.blocks, now), now) for seg, t, _ in rows]
        return np.concatenate([weight * (np.log(told) - measured), stay * (x - start)])

    start = np.log([getattr(priors, name) for name in FITTED])
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


def report(title: str, chosen: list[Problem], card: Gpu, priors: Priors, each: bool) -> None:
    """Prints rank correlation, the pick's measured time over the best's, and its estimate over its measurement."""
    figures = []
    for p in chosen:
        told = [(estimate(p.seg, t.tile, card, priors), t.us) for t in p.timings.values()]
        known = np.array([(e.time_us, us) for e, us in told if e and not e.spilled])
        if len(known) < 10:
            continue
        rank = float(np.corrcoef(ranks(known[:, 0]), ranks(known[:, 1]))[0, 1])
        pick = known[np.argmin(known[:, 0])]
        figures.append((rank, pick[1] / best(p), pick[0] / pick[1]))
        if each:
            print(f"{p.name:36} tiles {len(known):3} rank correlation {rank:.2f} pick/best {figures[-1][1]:.2f} "
                  f"estimate/measured {figures[-1][2]:.2f}")  # fmt: skip
    rank, pick, level = np.array(figures).T
    print(f"{title}: {len(figures)} problems; rank correlation median {np.median(rank):.3f}, least {min(rank):.2f}; "
          f"pick/best median {np.median(pick):.3f}, 90 % {np.quantile(pick, 0.9):.3f}, worst {max(pick):.2f}; "
          f"its estimate/measured {min(level):.2f} to {max(level):.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--gpu", default="H200", help="name or .toml file of the GPU that was timed")
    parser.add_argument("--fit-batch", type=int, help="fit problems of this batch only")
    parser.add_argument("--no-fit", action="store_true", help="report the constants as they are")
    options = parser.parse_args()
    card = gpu(options.gpu)
    known = problems(options.files, card)
    fitted = [p for p in known if options.fit_batch in (None, p.seg.batch)]
    rest = [p for p in known if p not in fitted]
    priors = PRIORS if options.no_fit else fit(fitted, card, PRIORS)
    for name in FITTED:
        print(f"{name} = {asdict(priors)[name]:.4g}")
    report("fitted", fitted, card, priors, True)
    if rest:
        report("held out", rest, card, priors, True)


if __name__ == "__main__":
    main()
