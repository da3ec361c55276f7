"""Runs small modules of every chain and type through the CUDA driver, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck  --error-exitcode 9 python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.sanitize

or `benchmarks/sanitize.sh` for both. No ONNX Runtime: its own kernels would be watched too. Each module runs with the
library's own tile, the planner's best three, and the best with each of the features that share memory; its numbers are
checked.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from ort_fcm.planner import gpu as gpu_by_name

from benchmarks.case import DEVIATIONS, Case, describe
from benchmarks.driver import MULTIPROCESSORS, Cuda
from benchmarks.modules import Bench, Host, compile_all, planned
from ort_fcm import library
from tests.gpu.cases import CHAINS, random_case


def trials(seed: int, gpu: str, numbers: int) -> list[Case]:
    """Of every chain and type, `numbers` random modules, each with several tiles."""
    found = []
    for chain in CHAINS:
        for dtype in ("float16", "tf32", "float32"):
            for number in range(numbers):
                case = random_case(chain, dtype, number, seed)
                ranked = list(planned(case, gpu))
                tiles = ["", *ranked[:3]]
                for feature in ("split=2", "split=8", "warps_n=2", "images=2", "resident=1"):
                    tiles += [tile for tile in ranked if feature in tile][:1]
                found += [replace(case, tile=tile) for tile in dict.fromkeys(tiles)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--numbers", type=int, default=2, help="random modules of each chain and type")
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--prepare", action="store_true", help="only compile, into the library's cache")
    args = parser.parse_args()
    limit = gpu_by_name(args.gpu).shared_per_block - (32 << 10)  # the sanitizer leaves less to a thread block
    cases = [
        case
        for case in trials(args.seed, args.gpu, args.numbers)
        if not library.kernel_resources(describe(case), limit)["replaced"]
    ]
    texts = [describe(case) for case in cases]
    cubins = compile_all(texts, args.architecture)
    if args.prepare:
        return 0
    host, cuda, wrong = Host([library.kernel_source(text) for text in texts]), Cuda(), 0
    for k, (case, cubin) in enumerate(zip(cases, cubins, strict=True)):
        if isinstance(cubin, str):
            print(f"does not compile: {case.to_line()}\n{cubin}")
            wrong += 1
            continue
        module = Bench(cuda, case, host, k, cold=False)
        found = module.run(
            cubin.read_bytes(), host.launch(k, case, cuda.attribute(MULTIPROCESSORS)), launches=1, replays=1
        )
        module.close()
        if found["deviations"] > DEVIATIONS:
            print(f"wrong numbers ({found['deviations']:.1f} deviations): {case.to_line()}")
            wrong += 1
    print(f"{len(cases)} modules ran, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
