"""A fresh seed each session, printed; ORT_FCM_SEED repeats one. The provider cuda is for -m gpu."""

from __future__ import annotations

import os
import random

import pytest

SEED = int(os.environ.setdefault("ORT_FCM_SEED", str(random.SystemRandom().randrange(2**31))))


def pytest_report_header() -> str:
    return f"module cases: ORT_FCM_SEED={SEED}"


@pytest.fixture
def seed() -> int:
    return SEED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def provider(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "cuda":
        pytest.importorskip("cupy")
    return name
