"""Runs a rewritten network once between the profiler's start and stop, for ncu to look at each of its kernels, and
makes a table of what ncu found.

    ncu -o NAME --set full --profile-from-start off --cache-control none --clock-control none \\
        python -m benchmarks.profile --models DIR --network mobilenetv2_100 --dtype float16 --batch 128
    ncu --import NAME.ncu-rep --page raw --csv > NAME.csv
    python -m benchmarks.profile --models DIR --network mobilenetv2_100 --dtype float16 --batch 128 \\
        --gpu H200 --counters NAME.csv --out benchmarks/results/counters_h200_3.csv

--counters (no GPU needed; the planner must be the one that ran) adds a row for each kernel to the file, with its
module and tile. Of the columns: `us_by_ncu` is longer than without ncu; `issued_per_clock` is instructions an SM; a per
cent of `tensor` is of cycles in which an SM is active, of `alu` and `fma` (the pipes of integers and of packed halves),
shared wavefronts, L1 (all loads and stores), L2 and device memory of what the whole time allows; those behind are of
the time of warps: what they wait for (`gmma`: wgmma's products, `selected`: they issue), the rest left out.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from ort_fcm.planner import Tile

import ort_fcm
from benchmarks.models import descriptions, module_names, network
from ort_fcm.errors import FcmError

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
WAITS = ("long_scoreboard", "short_scoreboard", "wait", "barrier", "gmma", "math_pipe_throttle", "mio_throttle",
         "lg_throttle", "no_instruction", "branch_resolving", "dispatch_stall", "selected", "not_selected")  # fmt: skip
COUNTERS = {  # by column: ncu's name, and by what it is multiplied, in ncu's base units
    "us_by_ncu": ("gpu__time_duration.sum", 1e-3),
    "threads": ("launch__block_size", 1),
    "registers": ("launch__registers_per_thread", 1),
    "warps_per_sm": ("sm__warps_active.avg.per_cycle_active", 1),
    "issued_per_clock": ("smsp__issue_active.avg.per_cycle_active", 4),
    "tensor_pct": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1),
    "alu_pct": ("sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "fma_pct": ("sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "shared_wavefronts_pct": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed", 1),
    "l1_wavefronts_pct": ("l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_pct": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_pct": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_mb": ("lts__t_bytes.sum", 1e-6),
    "dram_mb": ("dram__bytes.sum", 1e-6),
}
UNITS = {"us": 1e3, "ms": 1e6, "s": 1e9, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # in base units, ns and byte


def counters(raw: str, model: onnx.ModelProto) -> list[dict[str, str]]:
    """Rows of the modules' kernels of ncu's raw page, in the order in which the rewritten model launches them. FcmError
    where they are not the model's."""
    lines = list(csv.reader(raw.splitlines()))
    start = next((i for i, line in enumerate(lines) if line[:1] == ["ID"]), None)
    if start is None:
        raise FcmError("this is no raw page of ncu as CSV: no line begins with ID")
    head, units = lines[start : start + 2]
    places = {name: i for i, name in enumerate(head)}
    kernels = [line for line in lines[start + 2 :] if line and "fcm_module" in line[places["Kernel Name"]]]
    tiles = [str(item["tile"]) for item in descriptions(model)]
    if len(kernels) != len(tiles):
        raise FcmError(f"ncu saw {len(kernels)} modules, and the network has {len(tiles)} as it is planned here")

    def value(line: list[str], name: str) -> float:
        i = places[name]
        return float(line[i].replace(",", "")) * UNITS.get(units[i], 1)

    rows = []
    for line, module, tile in zip(kernels, module_names(model), tiles, strict=True):
        threads = Tile.parse(tile).threads
        if value(line, "launch__block_size") != threads:
            raise FcmError(f"{module}: ncu saw another plan's kernel, as its tile here has {threads} threads")
        row = {"module": module, "tile": tile, "grid": line[places["Grid Size"]].strip("()").replace(", ", "x")}
        row |= {column: f"{value(line, name) * scale:.4g}" for column, (name, scale) in COUNTERS.items()}
        waits = {name: value(line, STALLED.format(name)) for name in WAITS}
        every = value(line, "smsp__average_warp_latency_per_inst_issued.ratio")
        rows.append(row | {f"{name}_pct": f"{100 * waits[name] / every:.1f}" for name in WAITS})
    return rows


def add(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows behind those of the file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


RESULTS = Path(__file__).parent / "results" / "counters_h200_3.csv"
LEAST_SHARE = 0.02  # of the time: kinds of modules that take less are shown together
SHOWN = {  # columns of the table: what is added up of a row of the file
    "warps an SM": ("warps_per_sm",),
    "issued a clock": ("issued_per_clock",),
    "tensor": ("tensor_pct",),
    "L1": ("l1_wavefronts_pct",),
    "shared memory in it": ("shared_wavefronts_pct",),
    "L2": ("l2_pct",),
    "device memory": ("dram_pct",),
    "waits: for results": ("wait_pct",),
    "for shared memory": ("short_scoreboard_pct", "mio_throttle_pct"),
    "for global memory": ("long_scoreboard_pct", "lg_throttle_pct"),
    "at barriers, for wgmma": ("barrier_pct", "gmma_pct"),
}


def kind(row: dict[str, str]) -> str:
    """The stages of a module, and whether it multiplies with wgmma."""
    return row["module"].split()[0] + ", wgmma" * ("wgmma=1" in row["tile"])


def table(rows: list[dict[str, str]]) -> list[str]:
    """A Markdown table: for each type and batch, by kind of module, its share of the time, and the counters in the mean
    over its time."""
    lines = [
        f"| type, batch | modules | kernels | time | {' | '.join(SHOWN)} |",
        "|---|---|" + "---:|" * (2 + len(SHOWN)),
    ]
    cells: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["dtype"], row["batch"]), []).append(row)
    for (dtype, batch), all_of_it in cells.items():
        every, kinds = _us(all_of_it), dict[str, list[dict[str, str]]]()
        for row in all_of_it:
            kinds.setdefault(kind(row), []).append(row)
        large = {name: found for name, found in kinds.items() if _us(found) >= LEAST_SHARE * every}
        rest = [row for name, found in kinds.items() if name not in large for row in found]
        order = sorted(large.items(), key=lambda item: -_us(item[1])) + ([("others", rest)] if rest else [])
        for name, found in order:
            means = [
                sum(float(row["us_by_ncu"]) * float(row[column]) for row in found for column in columns) / _us(found)
                for columns in SHOWN.values()
            ]
            values = [f"{mean:.1f}" if i < 2 else f"{mean:.0f}%" for i, mean in enumerate(means)]
            lines.append(
                f"| {'TF32' if dtype == 'float32' else dtype}, {batch} | {name} | {len(found)} "
                f"| {_us(found) / every:.0%} | {' | '.join(values)} |"
            )
    return lines


def _us(rows: list[dict[str, str]]) -> float:
    return sum(float(row["us_by_ncu"]) for row in rows)


def render(path: Path = RESULTS) -> str:
    """The table of docs/performance.md."""
    with path.open() as file:
        return "\n".join([*table(list(csv.DictReader(file))), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with NAME*.onnx")
    parser.add_argument("--network", default="mobilenetv2")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--gpu", help="the GPU to plan for; default: the one present")
    parser.add_argument("--counters", type=Path, help="ncu's raw page of this network as CSV, to add to --out")
    parser.add_argument("--out", type=Path, default=Path("counters.csv"))
    args = parser.parse_args()
    stock = network(args.network, args.dtype, args.batch, args.models)
    model = ort_fcm.rewrite(stock, gpu=args.gpu, check=False).model
    if args.counters:
        head = {"network": args.network, "dtype": args.dtype, "batch": str(args.batch)}
        add(args.out, [head | row for row in counters(args.counters.read_text(), model)])
        return
    import cupy

    options = ort.SessionOptions()
    options.register_custom_ops_library(str(ort_fcm.library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
    (entry,) = session.get_inputs()
    x = cupy.random.standard_normal(entry.shape, cupy.float32).astype(args.dtype)
    binding = session.io_binding()
    binding.bind_input(entry.name, "cuda", 0, np.dtype(args.dtype), entry.shape, x.data.ptr)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda")
    for _ in range(3):
        session.run_with_iobinding(binding)
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.start()
    session.run_with_iobinding(binding)
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.stop()


if __name__ == "__main__":
    main()
