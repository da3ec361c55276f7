"""benchmarks.paper on a machine without a GPU: its pairs, stock's models, and what it makes of measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ort_fcm.planner import gpu

from benchmarks import confirm, paper
from benchmarks.convolution import activate, conv2d
from ort_fcm.errors import FcmError

H200 = gpu("H200")


def test_pairs_are_those_of_the_file() -> None:
    rows = paper.rows()
    assert len(rows) == 145 and {row["model"] for row in rows} == {
        "MobileNetV1", "MobileNetV2", "Xception", "ProxylessNAS-GPU",
    }  # fmt: skip
    for row in rows:
        chain = paper.pair(row, "float16")
        confirm.whole(chain)  # a kernel computes it in one
        side = int(row["H"])
        assert chain.maps()[0] == (side, side) and chain.maps()[-1] == (side // int(row["stride"]),) * 2
        assert [part.out_channels for part in chain.layers] == [int(row["C_mid"]), int(row["C_out"])]


@pytest.mark.parametrize("number", [0, 1, 19, 24, 90])
def test_stocks_models_compute_the_pair_in_either_layout(number: int) -> None:
    chain = paper.pair(paper.rows()[number], "float32")
    rng = np.random.default_rng(number)
    x = rng.standard_normal((1, chain.layers[0].in_channels, chain.height, chain.width)).astype(np.float32)
    results = []
    for nhwc in (False, True):
        model = paper.model_of(chain, nhwc)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"X": x.transpose(0, 2, 3, 1) if nhwc else x})
        results.append(y.transpose(0, 3, 1, 2) if nhwc else y)
    from onnx import numpy_helper

    values = {
        t.name: numpy_helper.to_array(t).astype(np.float64) for t in paper.model_of(chain, False).graph.initializer
    }
    expected = x.astype(np.float64)
    for i, part in enumerate(chain.layers):
        groups = part.in_channels if part.kind == "dw" else 1
        expected = conv2d(expected, values[f"W{i}"], part.stride, part.dilation, part.pads, groups)
        expected = activate(expected + values[f"B{i}"][:, None, None], part.activation, 0.0, 6.0)
    for y in results:
        assert y.shape == expected.shape
        assert np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_table_of_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock takes 6 us in NHWC, ours 2 us a module, 12 where it is planned for traffic; stock moves 10 times what must
    move, ours 4 times, and twice where it is planned for traffic."""
    chosen = paper.rows()[:4]
    monkeypatch.setattr(paper, "rows", lambda: chosen)
    data: dict[str, Any] = paper.prepare(argparse.Namespace(gpu="H200"))
    assert len(data["chains"]) == 8
    for entry in data["chains"]:
        for plan in entry["plan"].values():
            inside = [layer for i in plan for layer in data["modules"][i]["layers"]]
            assert [part["kind"] for part in inside] == [part["kind"] for part in entry["layers"]]
        least = confirm.whole(confirm.chain_of(entry)).compulsory_bytes
        entry["stock"] = {"NCHW": 9.0, "NHWC": 6.0}
        sectors, sector = "lts__t_sectors_srcunit_tex.sum", 32
        entry["counted"] = {"lts__t_bytes.sum": 10.0 * least, sectors: 5.0 * least / sector}
        assert not set(entry["plan"]["time"]) & set(entry["plan"]["traffic"]), "choose pairs with other tiles for both"
        for objective, us, times in (("time", 2.0, 4.0), ("traffic", 12.0, 2.0)):
            plan = entry["plan"][objective]
            for module in (data["modules"][i] for i in plan):
                module["tiles"][0] += [us, 64]
                asked = (times - 1) * least / len(plan)
                module["counted"] = {"lts__t_bytes.sum": asked + least / len(plan), sectors: asked / sector}
            found = paper.result(entry, data["modules"], objective)
            assert found and found["layout"] == "NHWC" and found["fused"] == (len(plan) == 1)
            values = [found["ratio"], found["saved"], found["possible"]]
            assert values == pytest.approx([6 / us / len(plan), 1 - times / 10, 0.9])
            values = [found["saved_by_sms"], found["possible_by_sms"]]
            assert values == pytest.approx([1 - (times - 1) / 5, 0.8])
    text = "\n".join(paper.table(data))
    assert (
        text.count("| MobileNetV1") == 4
        and "67% of what is possible, in the median (50%" in text
        and "89% of what is possible" in text
    )
    del data["chains"][0]["stock"]
    assert paper.result(data["chains"][0], data["modules"]) is None
    data["environment"] = dict.fromkeys(("gpu", "onnxruntime", "cudnn", "cuda_driver", "date", "revision"), "x")
    confirm.write(tmp_path / "paper.json.xz", data)
    assert "| -" in paper.render(tmp_path / "paper.json.xz")
    assert paper.render(tmp_path / "none") == "Not measured yet.\n"


def test_what_is_known_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another run of two of three pairs: their figures in stock, and those of modules whose tiles are the same."""
    chosen = paper.rows()[:3]
    monkeypatch.setattr(paper, "rows", lambda: chosen)
    jobs: dict[str, Any] = paper.prepare(argparse.Namespace(gpu="H200"))
    monkeypatch.setattr(paper, "rows", lambda: chosen[:2])
    known: dict[str, Any] = paper.prepare(argparse.Namespace(gpu="H200")) | {"environment": {"revision": "r"}}
    for k, entry in enumerate(known["chains"]):
        entry |= {"stock": {"NCHW": float(k)}, "counted": {"lts__t_bytes.sum": k}, "kernels": ["a"]}
    changed = known["modules"][0]["tiles"][0]
    for k, module in enumerate(known["modules"]):
        module["counted"] = {"lts__t_bytes.sum": k}
        module["tiles"][0] += [k + 0.5, 64]
    changed[0] = changed[0].replace("blocks=", "blocks=1")
    paper.keep(jobs, known)
    assert [entry.get("stock") for entry in jobs["chains"]] == [*({"NCHW": float(k)} for k in range(4)), None, None]
    for i, module in enumerate(jobs["modules"]):
        same = 0 < i < len(known["modules"])
        assert (module.get("counted") == {"lts__t_bytes.sum": i}) == same == (len(module["tiles"][0]) == 4)
    assert jobs["known"] == {"revision": "r"}


def test_stocks_accesses_are_of_the_pairs_that_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none was, ncu has nothing to look at; else the groups are in the order in which `launch` runs them."""
    chosen = paper.rows()[:6]
    monkeypatch.setattr(paper, "rows", lambda: chosen)
    jobs: dict[str, Any] = paper.prepare(argparse.Namespace(gpu="H200"))
    launched: list[str] = []

    class Kernels:
        """A session that says which pair it is of, and a mark after each run."""

        def __init__(self, _: Any, chain: Any, nhwc: bool) -> None:
            self.name = f"{confirm.name_of(chain)} {chain.dtype} {nhwc}"

        def run(self) -> None:
            launched.append(self.name)

    class Driver:
        def call(self, *_: Any) -> None: ...
        def synchronise(self) -> None: ...

    def profile(command: list[str], _: Any) -> list[dict[str, Any]]:
        jobs_file = Path(command[command.index("--jobs") + 1])
        paper.launch(argparse.Namespace(jobs=jobs_file, seconds=60.0))
        return [{"kernel": name, "lts__t_bytes.sum": 1.0} for name in launched]

    monkeypatch.setattr(paper, "Stock", Kernels)
    monkeypatch.setattr("benchmarks.driver.Cuda", Driver)
    monkeypatch.setattr(paper.ncu, "Mark", lambda _: lambda: launched.append(paper.ncu.MARK))
    monkeypatch.setattr(paper.ncu, "profile", profile)
    with pytest.raises(FcmError, match="none was"):
        paper.stock_traffic(jobs, tmp_path / "jobs.json.xz", 60.0)
    assert not launched
    for entry in jobs["chains"][::2]:
        entry["stock"] = {"NCHW": 2.0, "NHWC": 1.0}
    paper.stock_traffic(jobs, tmp_path / "jobs.json.xz", 60.0)
    assert launched
    launched.clear()
    paper.stock_traffic(jobs, tmp_path / "jobs.json.xz", 60.0)  # nothing is left to count
    assert not launched
    for i, entry in enumerate(jobs["chains"]):
        chain = confirm.chain_of(entry)
        expected = [f"{confirm.name_of(chain)} {chain.dtype} True"[:60]]
        assert entry.get("kernels", []) == ([] if i % 2 else expected)
