"""The kernels' own source on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer, against float64."""

from __future__ import annotations

import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from . import specs

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "ort_fcm" / "kernels"
FLAGS = "-std=c++17 -O1 -g1 -fno-strict-aliasing -fsanitize=address,undefined -fno-sanitize-recover=all".split()
# Norm of the error over the norm of the reference: a few roundings of the type, and of the depthwise's sums in half.
TOLERANCE = {"float16": 2e-3, "tf32": 1e-3, "float32": 2e-6}


def program(cases: list[specs.Case], seed: int) -> str:
    parts = ['#include "emulate.h"\n']
    for i, case in enumerate(cases):
        parts.append(case.function(f"make{i}"))
        parts.append(f"struct Config{i} {{ static constexpr fcm::Spec spec = make{i}(); }};\n")
    runs = "\n".join(
        f'  std::printf("{i} %.9g\\n", emulate::run<Config{i}>({c.batch}, {c.height}, {c.width}, {seed + i}));'
        for i, c in enumerate(cases)
    )
    return "".join(parts) + f"int main() {{\n{runs}\n}}\n"


def tolerance(fields: dict[str, str]) -> float:
    type_ = fields["type"].removeprefix("fcm::Type::")
    dense = "first" in fields or "project" in fields
    if "first" not in fields and fields.get("norm_epsilon", "0") != "0":
        return 4 * TOLERANCE[type_]  # the mean is taken away from the products, most of which it cancels
    return TOLERANCE["float32" if type_ == "tf32" and not dense else type_]  # TF32 is the tensor cores' alone


def build_and_run(folder: Path, name: str, cases: list[specs.Case], seed: int, *flags: str) -> list[float]:
    source, binary = folder / f"{name}.cpp", folder / name
    source.write_text(program(cases, seed))
    built = subprocess.run(
        ["g++", *FLAGS, *flags, f"-I{KERNELS}", f"-I{HERE}", str(source), "-o", str(binary)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(binary)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, f"{source}:\n{ran.stdout[-500:]}{ran.stderr[-3000:]}"
    return [float(line.split()[1]) for line in ran.stdout.splitlines()]


def test_kernels_agree_with_float64(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 20)
    print(f"seed {seed}")
    cases = specs.cases(seed, random_cases=6)
    halves = [cases[::2], cases[1::2]]
    with ThreadPoolExecutor(2) as pool:
        # Weights arrive by bulk copies in one half, and as before sm_90 in the other; which has which is the seed's.
        copies = [(), ("-DFCM_PLAIN_COPIES",)]
        results = list(
            pool.map(lambda i: build_and_run(tmp_path, f"half{i}", halves[i], seed, *copies[(i + seed) % 2]), range(2))
        )
    failed = []
    for half, errors in zip(halves, results, strict=True):
        assert len(errors) == len(half)
        for case, error in zip(half, errors, strict=True):
            if not error < tolerance(dict(case.fields)):
                failed.append(f"error {error:.3g} of {case}")
    assert not failed, f"seed {seed}\n" + "\n".join(failed)


def test_warpgroups_round_to_tf32(tmp_path: Path) -> None:
    """They read floats cut off, not rounded, so that the kernels round what they are given: the error is that of the
    same tile without them. Where X alone is cut off, a pointwise has 1.6 times that."""
    seed = random.SystemRandom().randrange(1 << 20)
    print(f"seed {seed}")
    rng = random.Random(seed)
    cases = [specs.warpgroups(rng, chain, "tf32") for chain in ("pw", "pw", "conv", "dw-pw", "pw-dw", "pw-dw-pw")]
    plain = [replace(c, fields=tuple({**dict(c.fields), "tile.wgmma": "0"}.items())) for c in cases]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: build_and_run(tmp_path, f"half{i}", (cases, plain)[i], seed), range(2)))
    wrong = [f"{with_} of {case}, {without} without" for case, with_, without in zip(cases, *found, strict=True)
             if not with_ < 1.2 * without]  # fmt: skip
    assert not wrong, f"seed {seed}\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("tile.chunk", "24", "chunk must be a multiple of a group of channels"),
        ("tile.patch_h", "9", "patch_h must be from 1 to 8"),
        ("tile.warps_m", "1", "the warps do not cover the tile"),
        ("tile.split", "8", "split must not exceed the chunks"),
        ("c_in", "0", "channel counts must be positive"),
    ],
)
def test_illegal_tiles_say_why(tmp_path: Path, field: str, value: str, reason: str) -> None:
    fields = {
        "first": "fcm::Dense::pointwise", "depthwise": "true", "project": "fcm::Dense::pointwise",
        "c_in": "16", "c_mid": "64", "c_out": "16", "tile.tile_h": "8", "tile.tile_w": "8", field: value,
    }  # fmt: skip
    case = specs.Case(tuple(fields.items()), 1, 8, 8)
    source, binary = tmp_path / "illegal.cpp", tmp_path / "illegal"
    source.write_text(
        f'#include <cstdio>\n#include "spec.h"\n{case.function("make")}'
        'int main() { const char* why = fcm::illegal(make()); std::puts(why ? why : "legal"); }\n'
    )
    subprocess.run(["g++", "-std=c++17", f"-I{KERNELS}", str(source), "-o", str(binary)], check=True)
    assert subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.strip() == reason
