"""Random modules: every kind of chain, odd sizes, whatever the op allows."""

from __future__ import annotations

import numpy as np

from benchmarks.case import Case, Stage
from benchmarks.convolution import ACTIVATIONS

CHAINS = (
    "dw", "pw", "conv", "dw-pw", "pw-dw", "conv-dw", "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw", "mean-pw-pw",
    "mean-pw",
)  # fmt: skip
# Those of a deep pointwise: more warps along pixels, warpgroups that do not wait for one another, weights that go by
# once a tile.
DEEP = (
    {"warps_m=12"},
    {"warps_m=8", "warps_n=1", "resident=1", "wgmma=1"},
    {"warps_m=8", "warps_n=1", "resident=2"},
    {"warps_n=2", "resident=2"},
)
FEATURES = ("split=2", "split=8", "warps_n=2", "warps_n=3", "images=2", "patch_h=2", "resident=1", "wgmma=1")


def params_of(activation: str, rng: np.random.Generator) -> tuple[float, float]:
    """Parameters that mean something to `activation`, drawn anew."""
    if activation == "clip":
        low = float(np.round(rng.uniform(-1.5, 0.2), 2))
        return low, float(np.round(low + rng.uniform(0.3, 6), 2))
    if activation == "hardsigmoid":
        return float(np.round(rng.uniform(0.1, 0.4), 3)), 0.5
    if activation == "leakyrelu":
        return float(np.round(rng.uniform(0.01, 0.3), 3)), 0.0
    return 0.0, 0.0


def _pick(rng: np.random.Generator, *values: int) -> int:
    return int(rng.choice(values))


def _bounded(kernel: int, stride: int, dilation: int) -> int:
    """The dilation, or the largest with which 8 pixels of a depthwise reach over 24: a stage before it is unrolled over
    that halo region, and larger ones take minutes to compile."""
    return max(d for d in (1, 2, 3) if d == 1 or (d <= dilation and 7 * stride + d * (kernel - 1) < 24))


def _stage(kind: str, c_in: int, activation: str, rng: np.random.Generator, first: bool) -> Stage:
    c_out = c_in if kind == "dw" else int(rng.integers(1, 80))
    params, bias = params_of(activation, rng), bool(rng.random() < 0.8)
    if kind == "pw":
        stride = (_pick(rng, 1, 1, 1, 2), _pick(rng, 1, 1, 1, 2)) if first else (1, 1)
        return Stage(kind, c_in, c_out, stride=stride, activation=activation, params=params, bias=bias)
    kernel = (_pick(rng, 3, 3, 5, 7), _pick(rng, 3, 3, 5, 7)) if rng.random() < 0.4 else (_pick(rng, 3, 3, 5, 7),) * 2
    stride = (_pick(rng, 1, 1, 2), _pick(rng, 1, 1, 2))
    dilation = (_pick(rng, 1, 1, 1, 2, 3), _pick(rng, 1, 1, 1, 2, 3))
    if kind == "dw" and not first:
        dilation = _bounded(kernel[0], stride[0], dilation[0]), _bounded(kernel[1], stride[1], dilation[1])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if rng.random() < 0.6:  # as exporters pad
        pads = (reach[0] // 2, reach[1] // 2, reach[0] - reach[0] // 2, reach[1] - reach[1] // 2)
    else:
        pads = tuple(int(rng.integers(0, reach[i % 2] + 1)) for i in range(4))  # type: ignore[assignment]
    return Stage(kind, c_in, c_out, (kernel[0], kernel[1]), stride, dilation, pads, activation, params, bias)


def random_case(chain: str, dtype: str, number: int, seed: int, tile: str = "") -> Case:
    """The `number`-th case of a chain: numbers 0 to 11 put each activation behind each stage, and behind an Add. Odd
    ones have factors of X, or a normalised X, and sums of Y, where they can."""
    mean = chain.startswith("mean-")
    kinds = chain.removeprefix("mean-").split("-")
    rng = np.random.default_rng([seed, number, CHAINS.index(chain), ("float16", "tf32", "float32").index(dtype)])
    while True:
        c_in = int(rng.integers(1, 5) if kinds[0] == "conv" and len(kinds) > 1 else rng.integers(1, 80))
        h, w = (int(v) for v in rng.integers(1, 24, 2))
        stages: list[Stage] = []
        size, channels = ((1, 1) if mean else (h, w)), c_in
        for i, kind in enumerate(kinds):
            stages.append(_stage(kind, channels, ACTIVATIONS[(number + 5 * i) % 12], rng, i == 0 and not mean))
            size, channels = stages[-1].out_size(size), stages[-1].c_out
            if min(size) < 1:
                break
        if min(size) >= 1:
            break
    option = bool(kinds[0] == "pw" and not mean and number % 2)
    normed = option and bool(rng.random() < 0.5)
    pool = bool(not mean and number % 2)
    residual = bool(number % 3 == 2 or rng.random() < 0.2) and not (mean or (pool and kinds[-1] == "dw"))
    after = ACTIVATIONS[number % 12]
    after = "none" if after == "prelu" or not residual else after  # a slope belongs to a stage
    return Case(
        tuple(stages),
        dtype,
        batch=int(rng.integers(1, 4)),
        h=h,
        w=w,
        residual=residual,
        output_activation=after,
        output_params=params_of(after, rng),
        input_nchw=bool(rng.random() < 0.3),
        output_nchw=bool(rng.random() < 0.3),
        tile=tile,
        seed=seed,
        mean=mean,
        scaled=option and not normed,
        pool=pool,
        norm_epsilon=float(rng.choice([1e-6, 1e-2])) if normed else 0.0,
    )


def deep_pointwise(dtype: str, seed: int, many: bool = False) -> Case:
    """A lone pointwise of many channels; `many`: of many pixels besides, for several tiles a thread block."""
    rng = np.random.default_rng(seed)
    c_in, c_out = 8 * int(rng.integers(32, 60)), int(rng.choice((256, 384, 512, 576)))
    h, w, batch = int(rng.integers(9, 16)), int(rng.integers(9, 16)), int(rng.integers(3, 7))
    if many:
        h, w, batch, c_out = 4 * h, 4 * w, 3 * batch, max(512, c_out)
    stage = Stage("pw", c_in, c_out, activation="relu")
    return Case((stage,), dtype=dtype, batch=batch, h=h, w=w, seed=seed)
