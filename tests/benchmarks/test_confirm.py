"""What benchmarks.confirm makes of counters and times, on a machine without a GPU."""

from __future__ import annotations

import argparse
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from ort_fcm.planner import Chain, Layer, candidates, gpu, plan_chain
from ort_fcm.planner.cost import PRIORS, served_bytes

from benchmarks import chains, confirm, ncu
from benchmarks.calibrate import problems
from ort_fcm.errors import FcmError

H200 = gpu("H200")
Jobs = dict[str, Any]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Of the two smallest networks, one tile that is known to be measured as it was estimated."""
    known = {name: confirm.NETWORKS.index(name) for name in ("mobilenetv4_conv_small", "fastestdet")}
    before, confirm.NETWORKS = confirm.NETWORKS, tuple(known)
    try:
        arguments = argparse.Namespace(models=None, gpu="H200", profiled=4, timed=6, tiles=8, seed=0)
        path = tmp_path_factory.mktemp("confirm") / "jobs.json.xz"
        confirm.write(path, confirm.prepare(arguments))
        return confirm.read(path)
    finally:
        confirm.NETWORKS = before


def fresh(jobs: Jobs) -> Jobs:
    modules = [{**entry, "tiles": [row[:2] for row in entry["tiles"]]} for entry in jobs["modules"]]
    return {**jobs, "modules": modules}


def test_what_is_to_be_measured(jobs: Jobs) -> None:
    assert len(jobs["profiled"]) == 12 and len(jobs["timed"]) == 6
    for i in jobs["timed"]:
        entry = jobs["modules"][i]
        chain = confirm.chain_of(entry)
        best = candidates(chain, H200, 0, len(chain.layers) - 1, limit=1)[0]
        tiles = [tile for tile, _ in entry["tiles"]]
        assert [tiles[0], len(set(tiles))] == [str(best.tile), len(tiles)]
        served = served_bytes(confirm.whole(chain), best.tile, H200)
        assert entry["estimate"]["l2"] == served.sms <= best.traffic_bytes
        assert entry["all"] or len(tiles) > 8
    for entry in jobs["chains"]:
        chain, planned = confirm.chain_of(entry), entry["plan"]
        places = {tuple(map(int, place.split("-"))) for place in entry["modules"]}
        assert places == set(confirm.segments_of(chain)) and {tuple(place) for place in planned} <= places
    every = list(confirm.order(jobs))
    assert len(set(every)) == len(every) == sum(len(entry["tiles"]) for entry in jobs["modules"])


def test_true_estimates_are_told_so_and_the_best_plan_loses_nothing(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = fresh(jobs)
    monkeypatch.setattr(confirm, "architecture", lambda: "sm_90a")
    monkeypatch.setattr(confirm, "measured", lambda entry, k, *_: (entry["tiles"][k][1], 64))
    counted = confirm.timing(data, deadline=float("inf"))
    assert counted == {"timed": sum(len(entry["tiles"]) for entry in data["modules"])}
    for i in data["timed"]:
        told = confirm.judged(data["modules"][i])
        assert told is None or told == pytest.approx((1, 1, 1, 1))
    losses = [found for entry in data["chains"] if (found := confirm.lost(entry, data["modules"], H200))]
    assert len(losses) == len(data["chains"])
    for chosen, best in losses:
        # Plans of `rewrite` distrust stock; the best does not.
        assert best <= chosen * (1 + 1e-9)
    fused = [
        (entry, found)
        for entry, found in zip(data["chains"], losses, strict=True)
        if not plan_chain(confirm.chain_of(entry), H200).skips
    ]
    assert fused
    for entry, (chosen, best) in fused:  # plans count a little for each module, the best does not
        fewer = len(entry["layers"]) - len(entry["plan"])  # modules, at most, than the best has
        assert chosen <= best + PRIORS.module_us * fewer + 1e-9


def test_wrong_choices_are_counted(jobs: Jobs) -> None:
    """Against all segmentations written out, with random times."""
    data = fresh(jobs)
    rng = random.Random(seed := random.randrange(1 << 30))
    print("seed", seed)
    for entry in data["modules"]:
        entry["tiles"][0] += [0.01 * rng.random(), 64]  # so short that stock is never better
    for entry in data["chains"]:
        count = len(entry["layers"])
        us = {
            tuple(map(int, place.split("-"))): data["modules"][i]["tiles"][0][2]
            for place, i in entry["modules"].items()
        }

        def best(start: int, count: int = count, us: dict[Any, float] = us) -> float:
            if start == count:
                return 0.0
            return min(us[start, last] + best(last + 1) for last in range(start, count) if (start, last) in us)

        chosen, least = confirm.lost(entry, data["modules"], H200) or (0.0, 0.0)
        assert least == pytest.approx(best(0))
        if {i for first, last in entry["plan"] for i in range(first, last + 1)} == set(range(count)):
            assert chosen == pytest.approx(sum(us[tuple(place)] for place in entry["plan"]))


def test_the_limit_stops_with_what_is_there(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, lock, done = fresh(jobs), threading.Lock(), []
    monkeypatch.setattr(confirm, "architecture", lambda: "sm_90a")

    def measured(entry: Jobs, k: int, *_: Any) -> tuple[float, int]:
        with lock:
            done.append(k)
        if len(done) % 7 == 0:
            raise FcmError("it does not fit")
        return 2 * entry["tiles"][k][1], 96

    monkeypatch.setattr(confirm, "measured", measured)
    counted = confirm.timing(data, deadline=90, clock=lambda: len(done))
    assert 90 <= counted.total() < 200 and counted["it does not fit"] >= 12
    timed = [row for entry in data["modules"] for row in entry["tiles"] if len(row) > 2]
    assert len(timed) == counted["timed"] and all(us == 2 * told for _, told, us, _ in timed)
    data["environment"] = {"revision": "abc"}
    confirm.export(data, tmp_path / "tiles.jsonl")
    known = problems([tmp_path / "tiles.jsonl"], H200)
    assert sum(len(problem.timings) for problem in known) == counted["timed"]


def test_after_a_change_new_choices_are_measured_alone(jobs: Jobs, tmp_path: Path) -> None:
    data = fresh(jobs)
    for i in data["timed"]:  # all but the choice of today, and one of the others
        tiles = data["modules"][i]["tiles"]
        for row in tiles[2:]:
            row += [1.0, 96]
        data["modules"][i] |= {"tiles": tiles[1:], "near": max(0, data["modules"][i]["near"] - 1)}
    confirm.write(tmp_path / "results", data)
    found = confirm.again(argparse.Namespace(out=tmp_path / "results"))
    left = {(i, found["modules"][i]["tiles"][k][0]) for i, k in confirm.order(found)}
    wanted = {(n, jobs["modules"][i]["tiles"][k][0]) for n, i in enumerate(jobs["timed"]) for k in (0, 1)}
    assert left == wanted
    for n, i in enumerate(jobs["timed"]):
        same = ("near", "all", "name")
        assert [found["modules"][n][key] for key in same] == [jobs["modules"][i][key] for key in same]
        assert [row[:2] for row in found["modules"][n]["tiles"]] == [row[:2] for row in jobs["modules"][i]["tiles"]]


def test_counters_are_read_and_grouped() -> None:
    text = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","fcm_module(Params)","lts__t_bytes.sum","byte","1,024"
"0","7","fcm_module(Params)","dram__bytes_read.sum","byte","96"
"1","7","fcm_mark()","lts__t_bytes.sum","byte","32"
"2","7","fcm_mark()","lts__t_bytes.sum","byte","32"
"3","7","other","lts__t_bytes.sum","byte","64"
"""
    kernels = ncu.parse(text)
    assert kernels[0] == {"kernel": "fcm_module(Params)", "lts__t_bytes.sum": 1024, "dram__bytes_read.sum": 96}
    assert ncu.groups(kernels) == [kernels[:1], []]
    with pytest.raises(FcmError, match="no table"):
        ncu.parse("==ERROR== nothing")


def test_chains_are_whole() -> None:
    """Every network of the file is there with as many layers as it has; a known block of one is among its chains."""
    known = chains.read(16, "float16")
    assert set(confirm.NETWORKS) <= set(known)
    mobilenet = known["mobilenetv2_100"]
    assert sum(len(chain.layers) * count for chain, count in mobilenet.items()) == 53
    pads = (1, 1, 1, 1)
    block = (
        Layer("pw", 64, 384, activation="clip", activation_nodes=1),
        Layer("dw", 384, 384, (3, 3), pads=pads, activation="clip", activation_nodes=1),
        Layer("pw", 384, 64, residual=True, activation_nodes=1),
    )
    assert mobilenet[Chain(block, 16, 14, 14)] == 3
