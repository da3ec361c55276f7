"""The planner's geometry against the kernels' own, spec.h: what a tile takes, and which tiles are legal."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner import GPUS, Chain, Gpu, Layer, Tile, candidates
from planner.chain import STEM_CHANNELS
from planner.cost import Segment, _apart, estimate, illegal, packed_bytes, segment, shared_bytes, work

KERNELS = Path(__file__).parents[2] / "ort_fcm" / "kernels"
ACTIVATIONS = {"none": 0, "clip": 2, "prelu": 10}

# Reads specs as integers, writes shared memory, thread blocks, bytes of packed weights and biases, whether warpgroups
# are apart, and why a spec is illegal.
PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "pack.h"
static int next() { int v; if (std::scanf("%d", &v) != 1) v = 0; return v; }
static fcm::Window window() {
  fcm::Window w;
  for (int* p : {&w.kernel_h, &w.kernel_w, &w.stride_h, &w.stride_w, &w.dilation_h, &w.dilation_w, &w.pad_top,
                 &w.pad_left, &w.pad_bottom, &w.pad_right}) *p = next();
  return w;
}
int main() {
  for (int n; std::scanf("%d", &n) == 1;) {
    fcm::Spec s;
    s.type = (fcm::Type)n;
    s.first = (fcm::Dense)next(), s.depthwise = next(), s.project = (fcm::Dense)next();
    s.c_in = next(), s.c_mid = next(), s.c_out = next(), s.residual = next();
    s.first_window = window(), s.depthwise_window = window(), s.project_window = window();
    s.first_act.kind = (fcm::Activation)next(), s.depthwise_act.kind = (fcm::Activation)next();
    s.project_act.kind = (fcm::Activation)next();
    fcm::Tile& t = s.tile;
    t.tile_h = next(), t.tile_w = next(), t.images = next(), t.patch_h = next(), t.chunk = next();
    t.warps_m = next(), t.warps_n = next(), t.block_n = next(), t.split = next(), t.blocks = next();
    t.resident = next(), t.wgmma = next();
    s.mean = next(), s.pool = next(), s.scaled = next(), s.norm_epsilon = next(), s.passes = next();
    const int batch = next(), height = next(), width = next(), sms = next(), held = next();
    const char* why = fcm::illegal(s);
    const fcm::Launch l = why ? fcm::Launch{} : fcm::launch(s, batch, height, width, sms, held);
    const auto vector = [&](bool there, bool project, const fcm::Act& act) {
      return there ? fcm::padded_vector(s, project) * (act.kind == fcm::Activation::prelu ? 8 : 4) : 0;
    };
    const long long packed = why ? 0 : fcm::packed_first_bytes(s) + fcm::packed_depthwise_bytes(s) +
        fcm::packed_project_bytes(s) + vector(s.first != fcm::Dense::none, false, s.first_act) +
        vector(s.depthwise, false, s.depthwise_act) + vector(fcm::has_project(s), true, s.project_act);
    std::printf("%d %lld %lld %d %s\\n", l.shared_bytes, l.grid_x * l.grid_y * l.grid_z, packed,
                fcm::warpgroups_apart(s), why ? why : "");
    std::fflush(stdout);
  }
}
"""


class Answer(NamedTuple):
    shared: int
    grid: int
    packed: int
    apart: bool
    why: str


Ask = Callable[[Segment, Tile, int, int], Answer]


def test_stems_are_the_same(tmp_path: Path) -> None:
    """Input channels up to which a dense convolution is one: matcher and planner in Python, library in C++."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if not compiler:
        pytest.skip("no C++ compiler")
    source = tmp_path / "stem.cc"
    source.write_text(f'#include "spec.h"\nstatic_assert(fcm::kStemChannels == {STEM_CHANNELS}, "stems");\n')
    done = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", f"-I{KERNELS}", source], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if not compiler:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("spec")
    (folder / "ask.cc").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++17", f"-I{KERNELS}", "ask.cc", "-o", "ask"], cwd=folder, check=True)

    def run(seg: Segment, tile: Tile, sms: int, held: int) -> Answer:
        text = " ".join(str(int(value)) for value in [*numbers(seg, tile), sms, held])
        done = subprocess.run([folder / "ask"], input=text, capture_output=True, text=True, check=True)
        *counts, why = done.stdout.rstrip("\n").split(" ", 4)
        shared, grid, packed, apart = map(int, counts)
        return Answer(shared, grid, packed, bool(apart), why)

    return run


def numbers(seg: Segment, tile: Tile) -> list[int]:
    dense = {None: 0, "pw": 1, "conv": 2}
    kinds = [dense[layer.kind if layer else None] for layer in (seg.first, seg.project)]
    windows: list[int] = []
    for layer in (seg.first, seg.depthwise, seg.project):
        known = layer or Layer("pw", 1, 1)
        windows += [*known.kernel, *known.stride, *known.dilation, *known.pads]
    acts = [ACTIVATIONS[layer.activation] if layer else 0 for layer in (seg.first, seg.depthwise, seg.project)]
    c_mid = (seg.first or seg.depthwise or seg.project or Layer("pw", 1, 1)).out_channels
    if seg.project and not seg.first and not seg.depthwise:
        c_mid = seg.c_in
    head = [seg.dtype != "float16", kinds[0], seg.depthwise is not None, kinds[1], seg.c_in, c_mid, seg.c_out]
    flags = [seg.mean, seg.pool, seg.scaled, seg.normed, seg.passes]
    return [*head, seg.residual, *windows, *acts, *astuple(tile), *flags, seg.batch, seg.height, seg.width]


ALL = ("dw", "pw", "conv", "dw-pw", "pw-dw", "conv-dw", "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw", "mean-pw-pw",
       "mean-pw")  # fmt: skip


@st.composite
def segments(draw: st.DrawFn, kinds: Sequence[str] = ALL) -> Segment:
    stages = draw(st.sampled_from(kinds))
    mean, option, normed = stages.startswith("mean-"), draw(st.booleans()), draw(st.booleans())
    stages = stages.removeprefix("mean-")
    few = st.integers(1, 4)  # a dense convolution in front of others
    many = st.sampled_from([32, 64]) | st.integers(1, 300)
    stem = stages.startswith("conv-") or (stages == "conv" and draw(st.booleans()))
    channels, layers = draw(few if stem else many), []
    for kind in stages.split("-"):
        kernel = 1 if kind == "pw" else draw(st.sampled_from([3, 5]))
        step = draw(st.sampled_from([1, 2])) if kind != "pw" else 1
        outputs = channels if kind == "dw" else draw(st.integers(1, 300))
        layers.append(
            Layer(kind, channels, outputs, (kernel, kernel), (step, step), pads=(kernel // 2,) * 4,
                  activation=draw(st.sampled_from(list(ACTIVATIONS))),
                  pool=option and not mean and len(layers) == stages.count("-"), mean=mean and not layers,
                  whole=option and mean and not layers,
                  scaled=option and not normed and stages.startswith("pw") and not mean and not layers,
                  normed=normed and stages.startswith("pw") and not mean and not layers)
        )  # fmt: skip
        channels = outputs
    chain = Chain(tuple(layers), draw(st.sampled_from([1, 16])), draw(st.integers(7, 60)), draw(st.integers(7, 60)),
                  draw(st.sampled_from(["float16", "float32"])))  # fmt: skip
    found = segment(chain, 0, len(layers) - 1)
    assert found
    return found


@st.composite
def random_tiles(draw: st.DrawFn) -> Tile:
    few = st.integers(1, 4)
    return Tile(
        draw(st.integers(1, 16)), draw(st.integers(1, 16)), draw(few), draw(few), 16 * draw(few), draw(few), draw(few),
        16 * draw(st.integers(0, 8)), draw(few), draw(few), draw(st.integers(0, 2)), draw(st.integers(0, 1)),
    )  # fmt: skip


SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@SETTINGS
@given(segments(), st.data())
def test_random_tiles_are_judged_alike(ask: Ask, seg: Segment, data: st.DataObject) -> None:
    tile = data.draw(random_tiles())
    if tile.images > 1 and not seg.mean:  # several images need the whole map: the planner's own rule
        tile = replace(tile, images=1)
    answer = ask(seg, tile, 0, 0)
    assert bool(illegal(seg, tile)) == bool(answer.why), (illegal(seg, tile), answer.why)
    if not answer.why:
        assert shared_bytes(seg, tile) == answer.shared
        assert seg.gate or sum(packed_bytes(seg, tile)) == answer.packed  # a gate's weights lie otherwise


@SETTINGS
@given(segments(("pw", "conv")), random_tiles(), st.sampled_from([4, 8, 12]), st.integers(1, 2))
def test_lone_stages_with_warpgroups_are_the_same(
    ask: Ask, seg: Segment, tile: Tile, warps_m: int, warps_n: int
) -> None:
    """Whose weights stay, go by for many tiles, or for one."""
    tile = replace(tile, images=1, warps_m=warps_m, warps_n=warps_n, split=1, wgmma=1)
    tile = replace(tile, chunk=2 * warps_n * tile.chunk, block_n=2 * tile.block_n)
    answer = ask(seg, tile, 132, 0)
    assert bool(illegal(seg, tile)) == bool(answer.why), (illegal(seg, tile), answer.why)
    assert _apart(seg, tile) == (warps_m // 4 if answer.apart else 1)
    if not answer.why:
        assert (shared_bytes(seg, tile), work(seg, tile, 132).grid) == (answer.shared, answer.grid)


@SETTINGS
@given(segments(), st.sampled_from(list(GPUS.values())), st.data())
def test_planned_tiles_are_true_to_the_kernels(ask: Ask, seg: Segment, card: Gpu, data: st.DataObject) -> None:
    layers = (replace(seg.layers[0], pool=seg.pool),) if seg.alone else seg.layers
    chain = Chain(layers, seg.batch, seg.height, seg.width, seg.dtype)
    found = candidates(chain, card, 0, len(layers) - 1)
    if not found:
        return
    module = data.draw(st.sampled_from(found))
    cost = estimate(seg, module.tile, card)
    assert cost
    answer = ask(seg, module.tile, card.sms, cost.resident)
    assert (answer.shared, answer.grid, answer.why) == (module.shared_bytes, cost.grid, "")
