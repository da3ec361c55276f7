"""Runs small modules of every chain and type through the CUDA driver, for compute-sanitizer to watch.

    benchmarks/sanitize.sh            memcheck and racecheck
    python -m benchmarks.sanitize     without the tool

No ONNX Runtime: its own kernels would be watched too. Of every chain and type, `--numbers` random modules run with the
planner's best tile and the library's own, and some module with each feature by which threads or thread blocks share
work. Each runs once, and its numbers are checked. Kernels come from the library's cache, where `--prepare` puts them.

Exit code 1 if a module is wrong, or if none ran of some chain and type, or with some feature. Modules that the driver
refuses (a tool may take shared memory of its own) and those left when `--seconds` have passed are counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ort_fcm.planner import Gpu
from ort_fcm.planner import gpu as gpu_by_name

from benchmarks.case import DEVIATIONS, Case, describe
from benchmarks.driver import Cuda, CudaError
from benchmarks.modules import Bench, Host, compile_all, planned
from ort_fcm import library
from tests.gpu.cases import CHAINS, DEEP, FEATURES, deep_pointwise, random_case

TYPES = ("float16", "tf32", "float32")
DRAWS = 12  # modules of a chain and type among which one with a feature is sought
SMS = 2  # launched as if the GPU had so few multiprocessors: resident thread blocks then have several tiles each
OUTCOMES = ("ran", "wrong", "refused", "not compiled", "left")


@dataclass(frozen=True)
class Trial:
    """A module with a tile, and the bytes of shared memory of a thread block of it."""

    case: Case
    shared_bytes: int

    @property
    def kind(self) -> str:
        return f"{self.case.name} {self.case.dtype}"

    @property
    def features(self) -> set[str]:
        return set(self.case.tile.split()) & set(FEATURES)


def _of_kind(chain: str, dtype: str, seed: int, numbers: int, gpu: Gpu) -> Iterator[Case]:
    wanted, drawn = list(FEATURES), 0
    for number in range(numbers + DRAWS):
        case = random_case(chain, dtype, number, seed)
        ranked = list(planned(case, gpu))
        if not ranked:  # it is too large
            continue
        tiles = [ranked[0], ""] if drawn < numbers else []
        drawn += 1
        for feature in tuple(wanted):
            if found := [tile for tile in ranked if feature in tile.split()][:1]:
                tiles += found
                wanted.remove(feature)
        yield from (replace(case, tile=tile) for tile in dict.fromkeys(tiles))
    if chain == "pw" and dtype != "float32":
        case = deep_pointwise(dtype, seed)
        ranked = [*planned(case, gpu), *planned(case, replace(gpu, sms=SMS))]
        for features in DEEP:
            found = [tile for tile in ranked if features <= set(tile.split())]
            yield from (replace(case, tile=tile) for tile in found[:1])


def trials(seed: int, numbers: int, gpu: Gpu) -> list[Trial]:
    """What runs, within `gpu.shared_per_block`: first one of each chain and type, then the second of each, ..."""
    found: list[tuple[int, Trial]] = []
    for chain in CHAINS:
        for dtype in TYPES:
            for place, case in enumerate(_of_kind(chain, dtype, seed, numbers, gpu)):
                used = library.kernel_resources(describe(case), gpu.shared_per_block)
                if case.tile and used["replaced"]:
                    raise RuntimeError(f"the planner's tile is none: {used['replaced']}: {case.to_line()}")
                # The library's own tile by name: compiling knows no limit to shared memory.
                found.append((place, Trial(replace(case, tile=used["tile"]), int(used["shared_bytes"]))))
    return [trial for _, trial in sorted(found, key=lambda item: item[0])]


class Runner:
    """Runs trials on GPU 0, each once, and tells what came of it."""

    def __init__(self, found: list[Trial], architecture: str) -> None:
        texts = [describe(trial.case) for trial in found]
        cached = set(library.cache_directory().glob("*.cubin"))
        self.cubins = compile_all(texts, architecture)
        if fresh := sum(not isinstance(cubin, str) and cubin not in cached for cubin in self.cubins):
            print(f"{fresh} kernels were not in the cache: --prepare compiles them faster")
        self.host, self.cuda = Host([library.kernel_source(text) for text in texts]), Cuda()
        self.told = False

    def __call__(self, k: int, trial: Trial) -> str:
        """One of OUTCOMES, but for the last."""
        cubin = self.cubins[k]
        if isinstance(cubin, str):
            print(f"does not compile: {trial.case.to_line()}\n{cubin}")
            return "not compiled"
        image, bench = cubin.read_bytes(), Bench(self.cuda, trial.case, self.host, k, cold=False)
        try:
            found = bench.run(image, self.host.launch(k, trial.case, SMS), replays=0)
        except CudaError as error:
            if not error.refused:
                raise
            if not self.told:
                most = self.cuda.most_shared(image, "fcm_module", trial.shared_bytes + 1024)
                print(f"refused ({error}): {trial.shared_bytes} bytes of shared memory, {most} are accepted here")
                self.told = True
            return "refused"
        finally:
            bench.close()
        if found["deviations"] <= DEVIATIONS:
            return "ran"
        print(f"wrong numbers ({found['deviations']:.1f} deviations): {trial.case.to_line()}")
        return "wrong"


def verdict(outcomes: list[tuple[Trial, str]]) -> int:
    """Prints what ran, by chain and type and by feature; the exit code."""
    kinds: dict[str, Counter[str]] = {trial.kind: Counter() for trial, _ in outcomes}
    features: dict[str, Counter[str]] = {feature: Counter() for feature in FEATURES}
    for trial, outcome in outcomes:
        kinds[trial.kind][outcome] += 1
        for feature in trial.features:
            features[feature][outcome] += 1
    for name, counts in (kinds | features).items():
        told = [f"{counts['ran']} ran", *(f"{counts[o]} {o}" for o in OUTCOMES[1:] if counts[o])]
        print(f"{name:20} {', '.join(told)}")
    none = [name for name, counts in (kinds | features).items() if not counts["ran"]]
    total = Counter(outcome for _, outcome in outcomes)
    print(f"{len(outcomes)} modules: " + ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES))
    if none:
        print(f"none ran: {', '.join(none)}")
    return int(bool(none or total["wrong"] or total["not compiled"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--numbers", type=int, default=1, help="random modules of each chain and type")
    parser.add_argument("--shared", type=int, default=96, help="KiB of shared memory that a thread block may have")
    parser.add_argument("--seconds", type=float, default=50, help="no module starts after these")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--verbose", action="store_true", help="name each module before it runs")
    parser.add_argument("--prepare", action="store_true", help="only compile, into the library's cache")
    args = parser.parse_args()
    gpu = gpu_by_name(args.gpu)
    found = trials(args.seed, args.numbers, replace(gpu, shared_per_block=min(args.shared << 10, gpu.shared_per_block)))
    if args.prepare:
        compile_all([describe(trial.case) for trial in found], args.architecture)
        return 0
    run, until = Runner(found, args.architecture), time.monotonic() + args.seconds
    outcomes = []
    for k, trial in enumerate(found):
        if args.verbose:
            print(trial.case.to_line(), flush=True)
        outcomes.append((trial, run(k, trial) if time.monotonic() < until else "left"))
    return verdict(outcomes)


if __name__ == "__main__":
    sys.exit(main())
