"""Reading and writing: bad files, external data, nothing half-written; and the command line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from ort_fcm.planner import Tile

from ort_fcm import FcmError, cli, rewrite
from ort_fcm.library import library_path
from ort_fcm.rewrite import emit, load
from tests.rewrite.networks import Net, assert_same

Fuse = Callable[..., Any]


def small(seed: int, **options: Any) -> onnx.ModelProto:
    net = Net(seed=seed, **options)
    x = net.op("Relu", net.conv(net.input("n", 8, 12, 12), 32))
    net.output(net.conv(net.op("Relu", net.depthwise(x)), 8))
    return net.model()


def with_external_data(model: onnx.ModelProto, folder: Path, location: str = "weights.bin") -> Path:
    path = folder / "model.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def relocate(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())


def test_external_data_is_read(tmp_path: Path, seed: int) -> None:
    model = small(seed)
    assert_same(model, rewrite(with_external_data(model, tmp_path)).model, seed)


def test_large_models_are_written_with_external_data(
    tmp_path: Path, fuse: Fuse, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "PROTO_LIMIT", 100)
    model = small(seed)
    fuse(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    assert_same(model, onnx.load(tmp_path / "out.onnx"), seed)


@pytest.mark.parametrize("how", ["parent", "absolute", "symbolic link", "linked folder"])
def test_external_data_outside_is_refused(how: str, tmp_path: Path, seed: int) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    path = with_external_data(small(seed), inside)
    os.replace(inside / "weights.bin", outside / "weights.bin")
    location = {"parent": "../outside/weights.bin", "absolute": str(outside / "weights.bin")}.get(how, "weights.bin")
    if how == "symbolic link":
        (inside / "weights.bin").symlink_to(outside / "weights.bin")
    if how == "linked folder":
        (inside / "folder").symlink_to(outside)
        location = "folder/weights.bin"
    relocate(path, location)
    with pytest.raises(FcmError, match="outside the model's directory"):
        rewrite(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_missing_and_short_external_data(tmp_path: Path, seed: int) -> None:
    path = with_external_data(small(seed), tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(FcmError, match="does not hold the data of tensor"):
        rewrite(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FcmError, match=r"'weights.bin' of tensor 'c\d' is missing"):
        rewrite(path)
    with pytest.raises(FcmError, match="pass the model's path"):
        rewrite(onnx.load(path, load_external_data=False))


def test_damaged_files_never_raise_anything_else(tmp_path: Path, seed: int) -> None:
    """Bytes changed, cut and repeated: either the model still works, or one sentence says why not."""
    rng = random.Random(seed)
    data = small(seed).SerializeToString()
    path = tmp_path / "damaged.onnx"
    refused = 0
    for _ in range(200):
        copy = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.choice([rng.randrange(len(copy)), rng.randrange(400), len(copy) - 1 - rng.randrange(400)])
            copy[at : at + rng.choice([1, 1, 4])] = rng.choice([b"", bytes([rng.randrange(256)]), copy[at : at + 9]])
        path.write_bytes(copy[: rng.choice([len(copy), len(copy), rng.randrange(len(copy))])])
        try:
            rewrite(path, check=False)
        except FcmError as error:
            refused += 1
            assert error.exit_code == 2 and len(str(error)) > 20
    assert refused > 20


def test_the_model_given_is_not_changed(fuse: Fuse, seed: int) -> None:
    model = small(seed)
    before = model.SerializeToString(deterministic=True)
    fuse(model)
    fuse(model, float16=True)
    assert model.SerializeToString(deterministic=True) == before


def test_a_failing_check_writes_nothing(tmp_path: Path, fuse: Fuse, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = emit._body

    def wrong(*args: Any) -> Any:
        nodes = body(*args)
        for node in nodes:
            if node.op_type == "Relu":
                node.op_type = "Abs"
        return nodes

    monkeypatch.setattr(emit, "_body", wrong)
    with pytest.raises(FcmError, match="the check failed: output 't4' differs") as caught:
        fuse(small(seed), tmp_path / "out.onnx")
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


def test_plans_can_be_given_back(seed: int) -> None:
    from ort_fcm.planner import Plan

    model = small(seed)
    first = rewrite(model, gpu="H200")
    plans = [Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) for plan in first.plans]
    again = rewrite(model, gpu="H200", plan=plans)
    assert again.report.to_dict() == first.report.to_dict()
    with pytest.raises(FcmError, match="is for batch 1, not 4"):
        rewrite(model, gpu="H200", batch=4, plan=plans)
    with pytest.raises(FcmError, match="is for H200, not T4"):
        rewrite(model, gpu="T4", plan=plans)
    with pytest.raises(FcmError, match="'elsewhere', which the model does not have"):
        rewrite(model, plan=[replace(plan, chain=replace(plan.chain, name="elsewhere")) for plan in plans])


@pytest.mark.parametrize("batch", ["n", 1])
def test_float16(batch: int | str, fuse: Fuse, seed: int) -> None:
    net = Net(seed=seed)
    x = net.batch_norm(net.conv(net.input(batch, 3, 20, 20), 40, 3, strides=[2, 2]))  # ReLU leaves enough of them
    tensor = net.initializers[-1]  # a variance that float16 does not hold
    tensor.CopyFrom(numpy_helper.from_array(np.full(40, 1e6, np.float32), tensor.name))
    x = net.depthwise(net.op("Relu", x))
    x = net.op("Resize", x, net.const([]), net.const([1, 1, 2, 2]))
    bounds = [net.op("Constant", value_float=v) for v in (-3.0e38, 3.0e38)]
    x = net.op("Clip", x, *bounds)
    net.output(net.op("Reshape", x, net.const([0, -1], np.int64)), rank=2)
    model = net.model()
    result = fuse(model, float16=True)
    kinds = {t.data_type for t in result.model.graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert result.model.graph.input == model.graph.input and result.report.in_modules == 2
    for library in (None, str(library_path())):
        assert_same(model, result.model, seed, 1e-2, library)


def test_float16_with_a_subgraph(fuse: Fuse, seed: int) -> None:
    from tests.rewrite.test_graphs import body

    net = Net(seed=seed)
    x = net.op("Relu", net.depthwise(net.conv(net.input(1, 8, 9, 9), 8)))
    condition = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0))
    net.output(net.op("If", condition, then_branch=body(seed, "a/", x), else_branch=body(seed + 1, "b/", x)))
    model = net.model()
    assert_same(model, fuse(model, float16=True).model, seed, 1e-2)


# ---- The command line ------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["ort-fcm", *map(str, arguments)]), pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_rewrite_and_compare_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    source, out, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "report.json"
    model = small(seed)
    onnx.save(model, source)
    code, text, _ = command(capsys, "rewrite", source, out, "--gpu", "H200", "--batch", 2, "--json", report)
    assert code == 0 and "PASSED" in text
    data = json.loads(report.read_text())
    assert data["gpu"] == "H200" and data["convolutions"] == 3 == data["in_modules"] + len(data["skipped"])
    assert data["check"]["passed"] and set(data["check"]) >= {"max_abs_error", "max_rel_error"}
    keys = {"name", "variant", "stages", "nodes", "tile", "traffic_bytes", "dram_bytes", "time_us"}
    assert all(set(m) >= keys for m in data["modules"])
    traffic, memory = data["traffic_bytes"], data["dram_bytes"]
    assert set(traffic) == set(memory) == {"before", "after"}
    assert memory["before"] == traffic["before"]  # stock touches every tensor once
    assert memory["after"] == traffic["after"] - sum(m["traffic_bytes"] - m["dram_bytes"] for m in data["modules"])
    assert_same(model, onnx.load(out), seed)
    assert command(capsys, "compare", source, out)[0] == 0
    onnx.save(small(seed + 1), out)
    code, text, _ = command(capsys, "compare", source, out, "--json", report)
    assert code == 1 and "FAILED" in text and not json.loads(report.read_text())["passed"]
    assert command(capsys, "compare", source, out, "--atol", 1e9)[0] == 0


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    onnx.save(small(seed), tmp_path / "in.onnx")
    code, text, _ = command(capsys, "plan", tmp_path / "in.onnx", "--json", tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and "convolutions" in text and "check" not in data and data["convolutions"] == 3


def test_a_plan_is_saved_edited_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """Edited: another tile for one module, and a module of several stages cut into single layers."""
    source, out, file = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "plan.json"
    model = small(seed)
    onnx.save(model, source)
    assert command(capsys, "plan", source, "--gpu", "L4", "--batch", 2, "--json", file)[0] == 0
    data = json.loads(file.read_text())
    assert [m["tile"] for m in data["modules"]] == [m["tile"] for plan in data["plans"] for m in plan["modules"]]
    code, text, _ = command(capsys, "rewrite", source, out, "--batch", 2, "--plan", file)
    assert code == 0 and "Planned for L4" in text and "PASSED" in text
    tile = "tile_h=1 tile_w=2 images=1 patch_h=1 chunk=16 warps_m=1 warps_n=1 block_n=0 split=1 blocks=1 resident=0"
    before = 0
    for plan in data["plans"]:
        before += len(plan["modules"])
        plan["gpu"] = "L4"
        plan["modules"] = [
            {**module, "first": i, "last": i, "tile": tile}
            for module in plan["modules"]
            for i in range(module["first"], module["last"] + 1)
        ]
    file.write_text(json.dumps(data))
    code, text, _ = command(capsys, "rewrite", source, out, "--batch", 2, "--plan", file)
    assert code == 0 and "PASSED" in text
    nodes = [node for node in onnx.load(out).graph.node if node.domain == "ort_fcm"]
    assert len(nodes) == sum(len(plan["modules"]) for plan in data["plans"]) > before
    tiles = {a.s.decode() for node in nodes for a in node.attribute if a.name == "tile"}
    assert tiles == {str(Tile.parse(tile))}
    assert_same(model, onnx.load(out), seed)
    out.unlink()
    whole = data["plans"][0]["modules"]
    for edit, words in (
        ({"modules": whole[1:]}, "every layer must be in one module or skip"),
        ({"modules": [{**whole[0], "tile": "chunk=17"}, *whole[1:]]}, "multiples of a group"),
        ({"modules": [{**whole[0], "first": "x"}, *whole[1:]]}, "not a plan"),
        ({"gpu": "Abacus"}, "unknown GPU"),
    ):
        file.write_text(json.dumps({"plans": [{**data["plans"][0], **edit}, *data["plans"][1:]]}))
        code, _, err = command(capsys, "rewrite", source, out, "--batch", 2, "--plan", file)
        assert code == 2 and words in err and str(file) in err and err.count("\n") == 1 and not out.exists()
    for content, words in (("{", "is not JSON"), ("[]", "no list 'plans'"), ('{"plans": [1]}', "not a plan")):
        file.write_text(content)
        code, _, err = command(capsys, "rewrite", source, out, "--plan", file)
        assert code == 2 and words in err and str(file) in err and err.count("\n") == 1 and not out.exists()
    code, _, err = command(capsys, "rewrite", source, out, "--plan", tmp_path / "none.json")
    assert code == 2 and "cannot read" in err


def test_nothing_to_fuse_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    net = Net(seed=seed)
    net.output(net.op("Relu", net.input(1, 3, 4, 4)))
    onnx.save(net.model(), tmp_path / "in.onnx")
    code, text, _ = command(capsys, "rewrite", tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert code == 0 and "nothing to fuse" in text
    assert onnx.load(tmp_path / "out.onnx") == net.model()


@pytest.mark.parametrize("name, arguments, words", [
    ("good", ["rewrite"], "Missing argument"),
    ("good", ["rewrite", "{in}", "{out}", "--gpu", "Abacus"], "unknown GPU 'Abacus'"),
    ("good", ["rewrite", "{in}", "{out}", "--batch", "many"], "--batch"),
    ("good", ["rewrite", "{in}", "{folder}/no/out.onnx"], "cannot write"),
    ("good", ["rewrite", "{in}", "{folder}"], "is a directory"),
    ("good", ["rewrite", "{in}", "{out}", "--json", "{folder}/no/report.json"], "cannot write"),
    ("static", ["rewrite", "{in}", "{out}", "--batch", "3"], "fixed batch of 1"),
    ("absent", ["rewrite", "{in}", "{out}"], "cannot read"),
    ("text", ["plan", "{in}"], "not an ONNX"),
    ("cut", ["compare", "{in}", "{in}"], "truncated"),
    ("empty", ["rewrite", "{in}", "{out}"], "not an ONNX"),
])  # fmt: skip
def test_bad_input_is_one_line(
    name: str, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    data = small(seed).SerializeToString()
    static = onnx.load_from_string(data)
    static.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    files = {"good": data, "static": static.SerializeToString(), "text": b"hello", "cut": data[:3000], "empty": b""}
    if name in files:
        (tmp_path / f"{name}.onnx").write_bytes(files[name])
    before = sorted(tmp_path.iterdir())
    fields = {"in": tmp_path / f"{name}.onnx", "out": tmp_path / "out.onnx", "folder": tmp_path}
    code, _, err = command(capsys, *(a.format(**fields) for a in arguments))
    assert code == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
