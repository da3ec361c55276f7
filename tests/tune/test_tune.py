"""Tuning with made-up times: what is measured, in which order, and what is chosen."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path
from threading import Lock
from zlib import crc32

import onnx
import pytest
from ort_fcm.planner import Chain, Layer, Plan, Tile, candidates, gpu, plan_chain
from ort_fcm.planner.cost import PRIORS, estimate, segment, stock

from examples import mobilenetv2
from ort_fcm import library
from ort_fcm.cli import main
from ort_fcm.errors import FcmError
from ort_fcm.rewrite import pipeline
from ort_fcm.tune import Tuner, describe, diverse, gpu_to_tune_for, resident, variations

H200 = gpu("H200")
PAD = (1, 1, 1, 1)


def block(channels: int = 32, size: int = 28, batch: int = 1, dtype: str = "float16", name: str = "") -> Chain:
    inner = 6 * channels
    layers = (
        Layer("pw", channels, inner, activation="clip"),
        Layer("dw", inner, inner, (3, 3), pads=PAD, activation="clip"),
        Layer("pw", inner, channels, residual=True),
    )
    return Chain(layers, batch, size, size, dtype, name)


def value(description: str, key: str) -> str:
    return dict(line.split("=", 1) for line in description.splitlines())[key]


class Fake:
    """Times that `time` makes up from stages and tile; a clock that they advance, as if run one at a time."""

    def __init__(self, time, seconds_each: float = 0.0) -> None:  # type: ignore[no-untyped-def]
        self.time, self.seconds_each = time, seconds_each
        self.now = 0.0
        self.asked: list[tuple[str, str, tuple[int, int, int, int]]] = []
        self.lock = Lock()

    def __call__(self, description: str, shape: tuple[int, int, int, int]) -> float:
        with self.lock:
            self.now += self.seconds_each
            self.asked.append((value(description, "stages"), value(description, "tile"), shape))
        return float(self.time(value(description, "stages"), Tile.parse(value(description, "tile"))))

    def tuner(self, seconds: float = 60.0, workers: int = 2) -> Tuner:
        return Tuner(H200, seconds, self, workers, lambda: self.now)


def made_up(seed: int):  # type: ignore[no-untyped-def]
    """A time below one microsecond for each module and tile, in no relation to the estimates."""
    return lambda stages, tile: 0.1 + 0.9 * (crc32(f"{seed} {stages} {tile}".encode()) / 2**32)


def test_the_plan_has_the_least_measured_time() -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    fake, chain = Fake(made_up(seed)), block()
    tuner = fake.tuner()
    tuner.tune([chain])
    plan = tuner.plan(chain)
    plan.check()
    best = {
        (first, last): min(made_up(seed)(stages, Tile.parse(tile)) for s, tile, _ in fake.asked if s == stages)
        for first, last, stages in ((0, 1, "pw-dw"), (1, 2, "dw-pw"), (0, 2, "pw-dw-pw"), (1, 1, "dw"))
    }
    for place in ((0, 0), (2, 2)):  # both are "pw", told apart by the channels of X
        seg = segment(chain, *place)
        best[place] = min(tuner.times[seg].values())
    assert min(stock(chain, i, H200).time_us for i in range(3)) > 1  # so it is all modules
    whole = [[(0, 2)], [(0, 1), (2, 2)], [(0, 0), (1, 2)], [(0, 0), (1, 1), (2, 2)]]
    least = min(sum(best[place] + PRIORS.module_us for place in places) for places in whole)
    assert plan.time_after_us == pytest.approx(least)
    for module in plan.modules:
        assert module.time_us == pytest.approx(best[module.first, module.last])
        assert made_up(seed)("-".join(layer.kind for layer in chain.layers[module.first : module.last + 1]),
                             module.tile) == pytest.approx(module.time_us)  # fmt: skip
        assert tuner.is_measured(chain, module)


@pytest.mark.parametrize(("fast", "count"), [("pw-dw-pw", 1), ("pw-dw", 2), ("dw-pw", 2)])
def test_what_measures_fast_is_chosen(fast: str, count: int) -> None:
    fake, chain = Fake(lambda stages, tile: 0.1 if stages in (fast, "pw") else 50.0), block()
    if count == 1:
        fake = Fake(lambda stages, tile: 0.1 if stages == fast else 50.0)
    tuner = fake.tuner()
    tuner.tune([chain])
    modules = tuner.plan(chain).modules
    assert len(modules) == count
    assert fast in ["-".join(layer.kind for layer in chain.layers[m.first : m.last + 1]) for m in modules]


def test_stock_is_kept_where_modules_measure_slow() -> None:
    fake, chain = Fake(lambda stages, tile: 1000.0), block()
    tuner = fake.tuner()
    tuner.tune([chain])
    plan = tuner.plan(chain)
    assert not plan.modules
    assert all("1000.0 us fused" in skip.reason for skip in plan.skips)


def test_equal_layers_are_measured_once() -> None:
    fake = Fake(made_up(1))
    tuner = fake.tuner()
    tuner.tune([block(name="a"), block(name="b")])
    once = len(fake.asked)
    assert len(set(fake.asked)) == once
    tuner.tune([block(name="c")])
    assert len(fake.asked) == once
    tuner.tune([block(size=14)])
    assert len(fake.asked) > once


def test_time_goes_to_the_estimated_plan_first_and_ends() -> None:
    chains = [block(name="a"), block(64, 14, name="b"), block(24, 56, name="c")]
    fake = Fake(made_up(2), seconds_each=1.0)
    tuner = fake.tuner(seconds=9.0, workers=1)
    tuner.tune(chains)
    assert len(fake.asked) == 9
    planned = {(str(module.tile)) for chain in chains for module in plan_chain(chain, H200).modules}
    assert planned <= {tile for _, tile, _ in fake.asked}
    for chain in chains:
        tuner.plan(chain).check()


def test_without_time_the_plan_is_the_estimated_one() -> None:
    chain, tuner = block(), Fake(made_up(3)).tuner(seconds=-1.0)
    tuner.tune([chain])
    assert not tuner.times
    assert tuner.plan(chain) == plan_chain(chain, H200)
    assert not any(tuner.is_measured(chain, module) for module in tuner.plan(chain).modules)


def test_what_was_not_measured_is_scaled_like_the_rest() -> None:
    chain, other = block(), block(64, 14)
    estimated = {}
    for place in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)):
        for module in candidates(chain, H200, *place):
            estimated[segment(chain, *place).stages, segment(chain, *place).c_in, str(module.tile)] = module.time_us

    def halved(description: str, shape: tuple[int, int, int, int]) -> float:
        key = value(description, "stages"), int(value(description, "channels").split()[0]), value(description, "tile")
        if key not in estimated:
            raise FcmError("a variation")
        return estimated[key] / 2

    tuner = Tuner(H200, 60.0, halved, 2)
    tuner.tune([chain])
    for module, plain in zip(tuner.plan(other).modules, plan_chain(other, H200).modules, strict=True):
        assert (module.first, module.last, module.tile) == (plain.first, plain.last, plain.tile)
        assert module.time_us == pytest.approx(plain.time_us / 2)


def test_modules_that_cannot_run_are_passed_over() -> None:
    chain = block()
    favourite = next(m for m in plan_chain(chain, H200).modules)

    def measure(description: str, shape: tuple[int, int, int, int]) -> float:
        if value(description, "tile") == str(favourite.tile):
            raise FcmError("no")
        return 1.0 + int(value(description, "stages") != "pw-dw-pw")

    tuner = Tuner(H200, 60.0, measure, 2)
    tuner.tune([chain])
    assert favourite.tile not in [module.tile for module in tuner.plan(chain).modules]


def test_when_nothing_can_run_the_cause_is_told() -> None:
    def measure(description: str, shape: tuple[int, int, int, int]) -> float:
        raise FcmError("NVRTC is not found")

    with pytest.raises(FcmError, match="no module could be measured: NVRTC is not found"):
        Tuner(H200, 60.0, measure, 2).tune([block()])


@pytest.mark.parametrize("batch", [1, 128])
def test_candidates_differ_and_are_legal(batch: int) -> None:
    chain = block(64, 14, batch)
    ranked = candidates(chain, H200, 0, 2)
    chosen = diverse(ranked, 12)
    assert len(chosen) == 12 == len({module.tile for module in chosen})
    assert chosen[0] == ranked[0]
    assert [module.time_us for module in chosen] == sorted(module.time_us for module in chosen)
    assert len({(m.tile.chunk, m.tile.warps_n, m.tile.block_n, m.tile.split) for m in chosen}) >= 3
    assert len(diverse(ranked[:5], 12)) == 5
    fake = Fake(made_up(4))
    fake.tuner().tune([chain])
    seen = set()
    for stages, tile, shape in fake.asked:
        assert shape in ((batch, 14, 14, 64), (batch, 14, 14, 384))
        if stages == "pw-dw-pw":
            seen.add(Tile.parse(tile))
    assert len({tile.blocks for tile in seen}) > 1
    for tile in seen:
        assert estimate(segment(chain, 0, 2), tile, H200) is not None


def test_resident_weights_where_they_fit_and_are_used_again() -> None:
    seg = segment(block(24, 56, 128), 0, 2)
    tile = Tile(tile_h=8, tile_w=8, warps_m=4)
    found = resident(seg, tile, H200)
    assert found is not None
    assert replace(found, resident=0, blocks=1) == replace(tile, blocks=1)
    one = library.kernel_resources(describe(seg, found, H200), H200.shared_per_block)
    assert one["replaced"] == ""
    assert found.blocks * (int(one["shared_bytes"]) + 1024) <= H200.shared_per_sm
    assert resident(segment(block(160, 7, 128), 0, 2), tile, H200) is None  # 600 KiB of weights
    assert found in variations(seg, replace(tile, blocks=found.blocks), H200)


@pytest.mark.parametrize(("dtype", "name", "kind"), [
    ("float16", "H200", "float16"), ("float32", "H200", "tf32"), ("float32", "T4", "float32"),
])  # fmt: skip
def test_descriptions_are_what_the_library_reads(dtype: str, name: str, kind: str) -> None:
    stem = Layer("conv", 3, 32, (3, 3), (2, 2), pads=PAD, activation="hardsigmoid")
    chain = Chain((stem, Layer("dw", 32, 32, (3, 3), pads=PAD, activation="prelu"), Layer("pw", 32, 16)), 2, 30, 32,
                  dtype)  # fmt: skip
    module = candidates(chain, gpu(name), 0, 2)[0]
    text = describe(segment(chain, 0, 2), module.tile, gpu(name))
    source = library.kernel_source(text)
    for line in (
        f"s.type = fcm::Type::{kind};",
        "s.first_window = {3, 3, 2, 2, 1, 1, 1, 1, 1, 1};",
        "s.first_act = {fcm::Activation::hardsigmoid, 0.166666672f, 0.5f};",
        "s.depthwise_act = {fcm::Activation::prelu, 0.0f, 0.0f};",
        "s.input_nchw = true;",
        f"s.tile.tile_h = {module.tile.tile_h};",
    ):
        assert line in source
    assert library.kernel_resources(text, gpu(name).shared_per_block)["replaced"] == ""


def test_what_else_a_module_does_is_described() -> None:
    dw = Layer("dw", 48, 48, (5, 5), pads=(2, 2, 2, 2), pool=True)
    parts = {
        "pool": (Layer("pw", 16, 48), dw),
        "mean": (Layer("pw", 48, 12, mean=True), Layer("pw", 12, 48, activation="sigmoid")),
        "scaled": (Layer("pw", 48, 24, scaled=True),),
        "norm_epsilon": (Layer("pw", 48, 24, normed=True), Layer("pw", 24, 48)),
    }
    for flag, layers in parts.items():
        chain, last = Chain(layers, 16, 28, 28), len(layers) - 1
        for module in candidates(chain, H200, 0, last, limit=5):
            text = describe(segment(chain, 0, last), module.tile, H200)
            used = library.kernel_resources(text, H200.shared_per_block)
            assert used["replaced"] == "" and int(used["shared_bytes"]) == module.shared_bytes
            source = library.kernel_source(text)
            absent = [name for name in parts for none in ("false", "0.0f") if f"s.{name} = {none};" in source]
            assert set(parts) - set(absent) == {flag}


def test_the_library_says_what_is_wrong_before_it_measures() -> None:
    description = describe(segment(block(), 0, 2), Tile(), H200)
    if pipeline.present_gpu() is None:
        with pytest.raises(FcmError, match="CUDA driver"):
            library.measure_module(description, (1, 28, 28, 32))
    with pytest.raises(FcmError, match="a module has no 'stagse'"):
        library.measure_module(description.replace("stages", "stagse"), (1, 28, 28, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_library_measures(dtype: str) -> None:
    target = gpu_to_tune_for(None)

    def measured(batch: int) -> float:
        chain = block(24, 56, batch, dtype)
        tile = candidates(chain, target, 0, 2, limit=1)[0].tile
        return library.measure_module(describe(segment(chain, 0, 2), tile, target), (batch, 56, 56, 24))

    one, many = measured(1), measured(128)
    assert 0.5 < one < many
    # no less than reading X and R and writing Y takes at four times the speed of memory
    moved = 3 * 128 * 56 * 56 * 24 * (2 if dtype == "float16" else 4)
    assert many > moved / (4 * target.memory_gbps * 1e3)


@pytest.mark.gpu
def test_a_tile_too_large_is_refused() -> None:
    target = gpu_to_tune_for(None)
    tile = Tile(tile_h=32, tile_w=32, patch_h=4, warps_m=16, chunk=128)
    with pytest.raises(FcmError, match="is not for this GPU"):
        library.measure_module(describe(segment(block(), 0, 2), tile, target), (1, 28, 28, 32))


# ---- The rewrite -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_h200(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(made_up(5))
    monkeypatch.setattr("ort_fcm.tune.present_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(Tuner, "__init__", _init_with(fake))
    return fake


def _init_with(fake: Fake):  # type: ignore[no-untyped-def]
    original = Tuner.__init__

    def init(self: Tuner, target: object, seconds: float) -> None:
        original(self, target, seconds, fake, 2)

    return init


def test_the_model_carries_the_tiles(fake_h200: Fake, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = pipeline.rewrite(mobilenetv2.build(1, "float16"), out, tune=True, check=False)
    report = result.report.to_dict()
    assert report["tuned"] is True
    assert report["gpu"] == "H200"
    assert report["modules"] and all(module["measured"] for module in report["modules"])
    nodes = {node.name: node for node in onnx.load(out).graph.node if node.op_type == "FusedConvModule"}
    times = {}
    for stages, tile, _ in fake_h200.asked:
        times[stages, tile] = made_up(5)(stages, Tile.parse(tile))
    for module in report["modules"]:
        attributes = {a.name: a.s.decode() for a in nodes[module["name"]].attribute if a.name in ("tile", "gpu")}
        assert attributes == {"tile": module["tile"], "gpu": "H200"}
        assert module["time_us"] == pytest.approx(times[module["stages"], module["tile"]])
    again = tuple(Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) for plan in result.plans)
    carried = pipeline.rewrite(mobilenetv2.build(1, "float16"), plan=again, gpu="H200", check=False)
    assert [m.tile for m in carried.report.modules] == [m["tile"] for m in report["modules"]]


def test_plans_that_are_given_are_not_measured(fake_h200: Fake) -> None:
    plans = pipeline.rewrite(mobilenetv2.build(1, "float16"), gpu="H200", check=False).plans
    report = pipeline.rewrite(mobilenetv2.build(1, "float16"), plan=plans, tune=True, check=False).report
    assert not fake_h200.asked
    assert not any(module.measured for module in report.modules)


def test_tuning_is_for_the_gpu_present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ort_fcm.tune.present_gpu", lambda: "NVIDIA H200")
    assert gpu_to_tune_for(None) == gpu_to_tune_for("h200") == H200
    with pytest.raises(FcmError, match="the GPU present, NVIDIA H200, not on T4"):
        gpu_to_tune_for("T4")
    monkeypatch.setattr("ort_fcm.tune.present_gpu", lambda: "NVIDIA Other 9")
    with pytest.raises(FcmError, match="unknown GPU 'NVIDIA Other 9'"):
        gpu_to_tune_for(None)
    with pytest.raises(FcmError, match="cannot minimise traffic"):
        monkeypatch.setattr("ort_fcm.tune.present_gpu", lambda: "NVIDIA H200")
        pipeline.rewrite(mobilenetv2.build(1, "float16"), tune=True, objective="traffic")


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ort_fcm.tune.present_gpu", lambda: None)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(mobilenetv2.build(1, "float16"), source)
    monkeypatch.setattr("sys.argv", ["ort-fcm", "rewrite", str(source), str(out), "--tune"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "tuning measures on a GPU, and there is none here" in capsys.readouterr().err
    assert not out.exists()
