"""The table of ncu's counters of a rewritten network's kernels."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest
from ort_fcm.planner import Tile

from benchmarks import profile
from benchmarks.models import descriptions, module_names
from ort_fcm import FcmError, rewrite
from tests.rewrite.networks import Net


def page(kernels: list[dict[str, str]], units: dict[str, str]) -> str:
    """ncu's raw page: a warning, names, units, and a line a kernel."""
    file = io.StringIO("==WARNING== clocks are not locked\n")
    file.seek(0, io.SEEK_END)
    writer = csv.DictWriter(file, ["ID", *kernels[0]], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerow({"ID": ""} | {name: units.get(name, "") for name in kernels[0]})
    writer.writerows({"ID": str(i)} | kernel for i, kernel in enumerate(kernels))
    return file.getvalue()


def test_a_row_for_each_module(tmp_path: Path) -> None:
    """Of a made-up page, with a kernel that is not ours; figures are what was put in, in the table's units."""
    net = Net(seed=random.randrange(1 << 30))
    x = net.op("Relu", net.conv(net.input(1, 24, 31, 20), 48, 1))
    x = net.op("Relu", net.conv(x, 48, 5, group=48, strides=[2, 2], pads=[2, 2, 2, 2]))
    x = net.conv(x, 32, 1)
    net.output(net.op("Add", net.conv(net.op("Relu", net.conv(x, 64, 1)), 32, 1), x))
    model = rewrite(net.model(), gpu="H200", check=False).model
    names, tiles = module_names(model), [str(item["tile"]) for item in descriptions(model)]
    assert names[0].endswith("at 31x20" + " stride 2" * ("dw" in names[0])) and "24-48" in names[0]
    assert names[-1].endswith("-32 at 16x10 residual") and len(names) >= 2

    def kernel(name: str, threads: int, us: float) -> dict[str, str]:
        shares = {name: 1 + i for i, name in enumerate(profile.WAITS)}
        found = {"Kernel Name": name, "Grid Size": "(3, 4, 1)"}
        found |= {counter: "1,000" for counter, _ in profile.COUNTERS.values()}
        found |= {profile.STALLED.format(name): str(share) for name, share in shares.items()}
        found["smsp__average_warp_latency_per_inst_issued.ratio"] = "200"
        return found | {
            "launch__block_size": str(threads),
            "gpu__time_duration.sum": str(us),
            "lts__t_bytes.sum": "2.5",
        }

    units = {"gpu__time_duration.sum": "us", "lts__t_bytes.sum": "Mbyte", "dram__bytes.sum": "byte"}
    kernels = [kernel("fcm_module", Tile.parse(tile).threads, 10.5 + i) for i, tile in enumerate(tiles)]
    rows = profile.counters(page([*kernels, kernel("cast", 7, 1.0)], units), model)
    assert [row["module"] for row in rows] == names and [row["tile"] for row in rows] == tiles
    for i, row in enumerate(rows):
        assert row["grid"] == "3x4x1" and float(row["us_by_ncu"]) == 10.5 + i and float(row["issued_per_clock"]) == 4000
        assert float(row["l2_mb"]) == 2.5 and float(row["dram_mb"]) == 0.001
        assert [float(row[f"{name}_pct"]) for name in profile.WAITS] == [k / 2 for k in range(1, 14)]
    for some in (rows[:1], rows[1:]):
        profile.add(tmp_path / "all.csv", some)
    assert list(csv.DictReader((tmp_path / "all.csv").open())) == rows

    head = {"network": "net", "dtype": "float32", "batch": "1"}
    first = {"tile": "wgmma=1", "module": "pw 8-8 at 7x7", "us_by_ncu": "3", "barrier_pct": "10", "gmma_pct": "30"}
    again = first | {"us_by_ncu": "1", "barrier_pct": "20"}
    small = first | {"us_by_ncu": "0.01", "module": "dw 3x3 8-8 at 7x7"}
    lines = profile.table([head | rows[0] | changed for changed in (first, again, small)])
    assert lines[2].startswith("| TF32, 1 | pw, wgmma | 2 | 100% |") and lines[2].endswith("| 42% |")
    assert lines[3].startswith("| TF32, 1 | others | 1 | 0% |") and len(lines) == 4

    with pytest.raises(FcmError, match=f"saw 1 modules, and the network has {len(names)}"):
        profile.counters(page(kernels[:1], units), model)
    with pytest.raises(FcmError, match="another plan's kernel"):
        profile.counters(page([*kernels[:-1], kernel("fcm_module", 7, 1.0)], units), model)
    with pytest.raises(FcmError, match="no raw page"):
        profile.counters("==ERROR== nothing", model)
