"""Files of timed tiles: modules survive them, and what the committed one holds is what spec.h computes."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import calibrate, steps, timings
from benchmarks.case import Case, Stage
from benchmarks.modules import Trial, line, timed
from planner import gpu

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "tiles_h200.jsonl.xz"


def _row(case: Case) -> dict[str, object]:
    return {"B": case.batch, "H": case.h, "W": case.w, "spec": timings.spec(case)}


@pytest.mark.parametrize("kinds", ["pw-dw-pw", "dw-pw", "pw-dw", "conv-dw-pw", "conv-dw", "pw-pw", "dw", "pw", "conv"])
def test_a_case_survives(kinds: str) -> None:
    seed = random.SystemRandom().randrange(2**31)
    rng = random.Random(seed)
    channels, stages = rng.choice([3, 24, 40]), []
    for kind in kinds.split("-"):
        out = channels if kind == "dw" else rng.choice([16, 48, 72])
        window = [(1, 1)] * 3 if kind == "pw" else [(rng.randint(2, 5), rng.randint(2, 5)) for _ in range(3)]
        pads = (0, 0, 0, 0) if kind == "pw" else (rng.randint(0, 2), 1, rng.randint(0, 2), 3)
        act = rng.choice(
            [("none", (0.0, 0.0)), ("clip", (-0.5, 6.0)), ("silu", (0.0, 0.0)), ("leakyrelu", (0.25, 0.0))]
        )
        stages.append(Stage(kind, channels, out, *window, pads, *act))
        channels = out
    given = Case(
        tuple(stages), rng.choice(timings.TYPES), 3, 29, 31, residual=True, output_activation="clip",
        output_params=(0.0, 6.0), input_nchw=kinds.startswith("conv"), tile="tile_h=8 tile_w=4 blocks=2",
        norm_epsilon=1e-5 * kinds.startswith("pw"),
    )  # fmt: skip
    as_run = timings.as_run(given)
    assert timings.case(_row(given)) == replace(as_run, stages=tuple(replace(s, bias=True) for s in as_run.stages)), (
        f"seed {seed}"
    )


def test_the_planner_and_the_measurement_mean_the_same_module() -> None:
    rows = timings.read(RESULTS)
    for row in rows[:: len(rows) // 40]:
        chain, case = calibrate.chain(row), timings.case(row)
        assert calibrate.chain(_row(case)) == chain  # type: ignore[arg-type]
        h, w = case.out_size
        if case.stages[-1].kind != "dw" and len(case.stages) == 1:
            continue  # pixels are flattened
        t = dict(item.split("=") for item in case.tile.split())
        blocks = -(-h // int(t["tile_h"])) * -(-w // int(t["tile_w"])) * -(-case.batch // int(t["images"]))
        assert row["grid"][0] == blocks or (t.get("resident") == "1" and row["grid"][0] < blocks)


def test_modules_of_a_file_come_with_their_fastest_tile() -> None:
    rows = [row for row in timings.read(RESULTS) if row["B"] == 128]
    found = timed(RESULTS, 128, "float16")
    assert {replace(timings.case(row), tile="") for row in rows} == {replace(c, tile="") for c in found.values()}
    fastest = min(rows, key=lambda row: float(row["us"]))
    assert timings.case(fastest) in found.values()


def test_ratios_are_of_the_same_tiles() -> None:
    rows = [
        {"revision": revision, "us": us, "spec": {"tile.blocks": blocks}}
        for revision, blocks, us in (("a", 1, 9.0), ("a", 1, 4.0), ("a", 2, 5.0), ("b", 1, 6.0), ("b", 3, 1.0))
    ]
    assert steps.same_tiles(rows, "a", "b") == [1.5]


def test_calibration_reads_what_is_written(tmp_path: Path) -> None:
    case = timings.case(timings.read(RESULTS)[0])
    other = case.tile.replace("blocks=1", "blocks=2")
    path = tmp_path / "timings.jsonl"
    path.write_text(
        "".join(line(case, Trial("a", t, us=us, blocks=2), "r") for t, us in ((case.tile, 3.0), (other, 2.0)))
    )
    (problem,) = calibrate.problems([path], gpu("H200"))
    assert sorted((t.us, t.tile.blocks) for t in problem.timings.values()) == [(2.0, 2), (3.0, 1)]
    (module,) = timed(path, case.batch, case.dtype).values()
    assert module == replace(case, tile=other)
