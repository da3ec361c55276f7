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


TYPES = {"cpu": ("float16", "float32"), "cuda": ("float16", "tf32", "float32")}


def _need(provider: str) -> None:
    if provider == "cuda":
        pytest.importorskip("cupy")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def provider(request: pytest.FixtureRequest) -> str:
    _need(request.param)
    return str(request.param)


@pytest.fixture(
    params=[
        pytest.param((provider, dtype), id=f"{provider}-{dtype}", marks=[pytest.mark.gpu] if provider == "cuda" else [])
        for provider, dtypes in TYPES.items()
        for dtype in dtypes
    ]
)
def where(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A provider, and a type that it computes in."""
    _need(request.param[0])
    return request.param  # type: ignore[no-any-return]
