"""GPUs as data: names, sources, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner import GPUS, Gpu, PlannerError, gpu

OWN = """
["Our board"]
source = "measured"
sm = 87
sms = 8
clock_mhz = 918
memory_gbps = 102.4
l2_bytes = 2097152
l2_gbps = 170
tensor_fp16_tflops = 15
tensor_tf32_tflops = 7.5
fp32_tflops = 1.88
"""


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H200", "H200"), ("NVIDIA H200", "H200"), ("h 200", "H200"), ("rtxa4000", "RTX A4000"),
        ("RTX A4000", "RTX A4000"), ("NVIDIA GeForce GTX 1660", "GTX 1660"), ("Tesla T4", "T4"),
        ("Orin", "Jetson AGX Orin"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("nvidia geforce rtx 5090", "RTX 5090"),
    ],
)  # fmt: skip
def test_names_as_people_and_drivers_write_them(written: str, name: str) -> None:
    assert gpu(written).name == name


@pytest.mark.parametrize("written", ["", "H20", "L40", "A1000", "RTX 4090 Laptop GPU", "H100 PCIe", "GTX 1660 Ti"])
def test_other_gpus_are_errors_that_name_the_known_ones(written: str) -> None:
    with pytest.raises(PlannerError, match=r"GTX 1660.*B200"):
        gpu(written)


@pytest.mark.parametrize("card", GPUS.values(), ids=str)
def test_every_figure_has_its_source_and_agrees_with_the_others(card: Gpu) -> None:
    figures = set(card.__dataclass_fields__) - {"name", "sources"}
    assert {figure for figure in figures if card.sources.get(figure)} == figures
    # float32: 64 or 128 multiply-adds a clock and SM; the stated tensor clock may differ from the stated boost clock
    lanes = card.fp32_tflops * 1e6 / (2 * card.sms * card.clock_mhz)
    assert min(abs(lanes / 64 - 1), abs(lanes / 128 - 1)) < 0.1
    assert card.tensor_tf32_tflops == 0 or card.tensor_fp16_tflops == pytest.approx(
        2 * card.tensor_tf32_tflops, rel=0.02
    )
    assert card.shared_per_block <= card.shared_per_sm


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(OWN)
    board = gpu(str(path))
    assert (board.name, board.sms, board.shared_per_sm) == ("Our board", 8, gpu("Orin").shared_per_sm)
    assert board.sources["sms"] == "measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN.replace("sms = 8", ""), "missing sms"),
        (OWN.replace("sms", "smz"), "unknown figure 'smz'"),
        (OWN.replace("sms = 8", "sms = 0"), "sms must be positive"),
        (OWN.replace("sms = 8", "sms = 'x'"), "sms must be a number"),
        (OWN.replace("sm = 87\n", "sm = 12\n"), "missing shared_per_sm"),
        (OWN + OWN.replace("Our", "Your"), "must hold one GPU"),
        ("x = 1", "not a table"),
        ("[", "GPU file"),
        ("", "must hold one GPU"),
    ],
)
def test_faults_of_a_users_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(PlannerError, match=message):
        gpu(str(path))


def test_a_missing_file() -> None:
    with pytest.raises(PlannerError, match=r"nowhere\.toml"):
        gpu("nowhere.toml")
