"""Modules as plain fields of `fcm::Spec`, fixed ones that cover each path of the kernels and random ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

ACTIVATIONS = (
    "none relu clip hardswish silu hardsigmoid sigmoid gelu gelu_tanh leakyrelu prelu tanh".split()
)  # in the order of `Activation` in spec.h
PARAMETERS = {"clip": (-0.5, 1.5), "hardsigmoid": (0.2, 0.4), "leakyrelu": (0.1, 0.0)}
TYPES = ("float16", "tf32", "float32")
CHAINS = "dw pw conv dw-pw pw-dw conv-dw pw-pw conv-pw pw-dw-pw conv-dw-pw mean-pw-pw mean-pw".split()
WARPGROUP_CHAINS = "pw conv dw-pw pw-dw pw-pw pw-dw-pw".split()


@dataclass(frozen=True)
class Case:
    """A module and the input it runs on: `fields` are C++ values by their place in `fcm::Spec`."""

    fields: tuple[tuple[str, str], ...]
    batch: int
    height: int
    width: int

    def function(self, name: str) -> str:
        """A constexpr C++ function that returns the Spec."""
        body = "\n".join(f"  s.{key} = {value};" for key, value in self.fields)
        return f"constexpr fcm::Spec {name}() {{\n  fcm::Spec s;\n{body}\n  return s;\n}}\n"


def _act(name: str) -> str:
    alpha, beta = PARAMETERS.get(name, (0.0, 0.0))
    return f"{{fcm::Activation::{name}, {alpha}f, {beta}f}}"


def _window(kernel: int, stride: int, dilation: int, pads: tuple[int, int, int, int]) -> str:
    return f"{{{kernel}, {kernel}, {stride}, {stride}, {dilation}, {dilation}, {', '.join(map(str, pads))}}}"


def draw(rng: random.Random, chain: str, type_: str, activation: str | None = None) -> Case:
    """A random module of `chain` (a value of the attribute `stages`) with a legal random tile, on a small odd map."""
    stages = chain.split("-")
    if stages[0] == "mean":
        return (_gate if len(stages) == 3 else _on_mean)(rng, type_, activation)
    group = 32 if type_ == "float16" else 16
    depthwise, last_dense = "dw" in stages, stages[-1] != "dw"
    fields: dict[str, str] = {"type": f"fcm::Type::{type_}", "depthwise": str(depthwise).lower()}

    def act() -> str:
        return _act(activation or rng.choice(ACTIVATIONS))

    def window(kind: str) -> str:
        if kind == "pw":
            return _window(1, rng.choice((1, 1, 2)) if stages[0] == "pw" and kind == stages[0] else 1, 1, (0, 0, 0, 0))
        kernels = (3, 3, 5, 7, 9) if chain == "dw" else (3, 3, 5, 7)  # alone, one of 9x9 has too many taps for a strip
        kernel, stride = rng.choice(kernels) if kind == "dw" else 3, rng.choice((1, 2))
        dilation = rng.choice((1, 1, 2)) if kind == "dw" and kernel < 9 else 1
        reach = dilation * (kernel - 1)
        pads = tuple(rng.randint(0, reach) for _ in range(4))
        return _window(kernel, stride, dilation, (pads[0], pads[1], pads[2], pads[3]))

    dense = {"pw": "fcm::Dense::pointwise", "conv": "fcm::Dense::convolution"}
    few = (1, 3, 4, 8, *((32,) if chain == "conv" else ()))
    c_in = rng.choice(
        few if stages[0] == "conv" else (8, 13, 16, 24, 40, 48, 64, 70, *((200,) if chain == "pw" else ()))
    )
    first = len(stages) > 1 and stages[0] != "dw"
    c_mid = rng.choice((17, 32, 48, 72, 96, 200)) if first else c_in
    c_out = rng.choice((7, 16, 24, 40, 80)) if last_dense else c_mid
    if first:
        fields |= {"first": dense[stages[0]], "first_window": window(stages[0]), "first_act": act()}
    if depthwise:
        fields |= {"depthwise_window": window("dw"), "depthwise_act": act()}
    if last_dense:
        last = stages[-1]
        fields |= {"project": dense[last], "project_act": act()}
        fields["project_window"] = window(last) if len(stages) == 1 else _window(1, 1, 1, (0, 0, 0, 0))
    fields |= {"c_in": str(c_in), "c_mid": str(c_mid), "c_out": str(c_out)}
    pool = rng.random() < 0.5
    fields["pool"] = str(pool).lower()
    fields["scaled"] = str(stages[0] == "pw" and rng.random() < 0.5).lower()
    scaled = fields["scaled"] == "true"
    fields["norm_epsilon"] = "0.01f" if stages[0] == "pw" and not scaled and rng.random() < 0.5 else "0"
    fields["residual"] = str((last_dense or not pool) and rng.random() < 0.4).lower()
    if chain == "conv-dw" and rng.random() < 0.5:  # a stem alone
        fields |= {"passes": "true", "depthwise_window": _window(1, 1, 1, (0, 0, 0, 0)), "depthwise_act": _act("none")}
        fields |= {"residual": "false", "pool": "false"}
    fields["output_act"] = _act(rng.choice(("none", "relu")))
    fields["input_nchw"] = str(rng.random() < (0.8 if stages[0] == "conv" and c_in < 32 else 0.2)).lower()
    fields["output_nchw"] = str(rng.random() < 0.2).lower()

    patch_h = rng.choice((1, 2, 3, 4, 7))
    warps_n = rng.choice((1, 1, 2, 2, 3)) if last_dense else 1
    groups = -(-(9 * c_in if chain == "conv" else c_mid) // group)
    chunk = group * warps_n * rng.choice((1, 2, 3))
    split = rng.choice([n for n in (1, 1, 2, 4) if n <= -(-groups * group // chunk)]) if last_dense else 1
    tile_h, tile_w, images = patch_h * rng.choice((1, 2, 3)), 2 * rng.choice((2, 3, 4)), rng.choice((1, 1, 2))
    height, width, batch = rng.randint(9, 17), rng.randint(9, 17), rng.choice((1, 2, 3))
    if not depthwise:
        images = 1
        if "conv" not in stages and rng.random() < 0.5:  # several images among 16 pixels
            height, width, batch = rng.randint(1, 6), rng.randint(1, 6), rng.randint(2, 9)
    if stages[0] == "conv" and rng.random() < 0.5:  # rows of whole vectors of 16 bytes
        width = 16
    if images > 1:  # such a tile covers the map
        height, width = rng.randint(5, 8), rng.randint(5, 8)
        tile_h, tile_w = patch_h * -(-9 // patch_h), 16
    warps_m = -(-images * (tile_h // patch_h) * (tile_w // 2) // 8) if depthwise else rng.choice((1, 2))
    block_n = chunk if rng.random() < 0.3 else 0
    warp_groups = -(-(block_n or c_out) // (group * warps_n))
    if warps_m * warps_n > 8 or (last_dense and patch_h * warp_groups * group > 320):  # too many threads or registers
        return draw(rng, chain, type_, activation)
    tile = {"tile_h": tile_h, "tile_w": tile_w, "images": images, "patch_h": patch_h, "chunk": chunk}
    tile |= {"warps_m": warps_m, "warps_n": warps_n, "block_n": block_n, "split": split}
    tile["resident"] = rng.choice((0, 1))
    if chain in WARPGROUP_CHAINS and type_ != "float32" and rng.random() < 0.6:
        tile["wgmma"], tile["warps_m"] = 1, 4 * -(-warps_m // 4) if depthwise else 4 * rng.randint(1, 4 - warps_n)
        if len(stages) > 1:  # a `first` has room for 128 channels
            tile["chunk"] = min(chunk, 128 // (group * warps_n) * group * warps_n)
        streams = chain == "pw" and fields["input_nchw"] == "false" and c_in % (group // 4) == 0
        if chain != "pw-pw" and not streams:
            fields["scaled"] = "false"
        if chain not in ("pw", "pw-pw"):
            fields["norm_epsilon"] = "0"
        if warps_n > 1:  # each has whole groups
            fields["c_out"] = str(warps_n * group - rng.choice((0, 1, 7)))
        if not last_dense:
            fields["c_out"] = fields["c_mid"]
    elif last_dense and rng.random() < 0.3:  # uneven shares
        tile["block_n"] = group * rng.choice((1, 2, 3))
        if patch_h * -(-tile["block_n"] // (group * warps_n)) * group > 320:  # too many registers
            return draw(rng, chain, type_, activation)
    if chain == "dw" and not fields["depthwise_window"].startswith("{9"):
        tile = _strip(rng, c_mid, group)
    fields |= {f"tile.{key}": str(value) for key, value in tile.items()}
    if min(_out(fields, height, side=0), _out(fields, width, side=1)) < 1:  # the windows leave nothing
        return draw(rng, chain, type_, activation)
    return Case(tuple(fields.items()), batch, height, width)


def _strip(rng: random.Random, channels: int, group: int) -> dict[str, int]:
    """A tile of a lone depthwise."""
    height = rng.choice((1, 2, 3, 7))
    warps_n, block_n = rng.choice((1, 2)), group * rng.choice((0, 1, 2, 3))
    if -(-min(block_n or channels, channels) // (group // 16)) > 128 * warps_n:
        block_n = group
    tile = {"tile_h": height, "patch_h": height, "tile_w": rng.choice((1, 2, 3, 4, 7)), "chunk": group}
    return tile | {"warps_m": rng.choice((1, 2, 3)), "warps_n": warps_n, "block_n": block_n,
                   "resident": rng.choice((0, 1))}  # fmt: skip


def _gate(rng: random.Random, type_: str, activation: str | None) -> Case:
    """Two pointwise layers on the mean of X."""
    fields = {"type": f"fcm::Type::{type_}", "mean": "true"}
    for name in ("first", "project"):
        fields |= {name: "fcm::Dense::pointwise", f"{name}_act": _act(activation or rng.choice(ACTIVATIONS))}
    channels = {"c_in": (3, 16, 40, 75, 200), "c_mid": (1, 6, 12, 30, 70), "c_out": (5, 16, 40, 75, 200)}
    fields |= {key: str(rng.choice(values)) for key, values in channels.items()}
    fields["input_nchw"] = str(rng.random() < 0.2).lower()
    tile = {"images": rng.choice((1, 1, 2, 3, 5)), "warps_m": rng.choice((1, 2, 4)), "split": rng.choice((1, 2, 4, 8))}
    fields |= {f"tile.{key}": str(value) for key, value in {**tile, "resident": rng.choice((0, 1))}.items()}
    return Case(tuple(fields.items()), rng.choice((1, 2, 6)), rng.randint(1, 9), rng.randint(1, 9))


def _on_mean(rng: random.Random, type_: str, activation: str | None) -> Case:
    """A pointwise layer on the mean of X."""
    fields = {"type": f"fcm::Type::{type_}", "mean": "true", "project": "fcm::Dense::pointwise"}
    fields["project_act"] = _act(activation or rng.choice(ACTIVATIONS))
    group = 32 if type_ == "float16" else 16
    c_in, c_out = rng.choice((3, 16, 40, 75, 200, 328)), rng.choice((5, 16, 40, 75, 200))
    fields |= {"c_in": str(c_in), "c_mid": str(c_in), "c_out": str(c_out)}
    fields["input_nchw"] = str(rng.random() < 0.2).lower()
    fields["output_nchw"] = str(rng.random() < 0.5).lower()
    patch_h, warps_m, warps_n = rng.choice((1, 1, 2)), rng.choice((1, 2, 4)), rng.choice((1, 2))
    chunk = group * rng.choice((1, 2, 3))
    split = rng.choice([n for n in (1, 2, 4, 8) if n <= -(-c_in // chunk)])
    images = rng.choice([n for n in (1, 2, 5, 8, 16, 24) if n <= 16 * patch_h * warps_m])
    tile = {"patch_h": patch_h, "chunk": chunk, "warps_m": warps_m, "warps_n": warps_n, "images": images}
    tile |= {"block_n": group * rng.choice((0, 1, 2, 3)), "split": split, "resident": rng.choice((0, 1))}
    if patch_h * -(-(tile["block_n"] or c_out) // (group * warps_n)) * group > 320:  # too many registers
        return _on_mean(rng, type_, activation)
    fields |= {f"tile.{key}": str(value) for key, value in tile.items()}
    return Case(tuple(fields.items()), rng.choice((1, 3, 17, 30)), rng.randint(1, 9), rng.randint(1, 9))


def _out(fields: dict[str, str], pixels: int, side: int) -> int:
    """Pixels of the output along one axis (side 0: height)."""
    for name in ("first_window", "depthwise_window", "project_window"):
        if name in fields:
            kernel, _, stride, _, dilation, _, *pads = (int(v) for v in fields[name].strip("{}").split(","))
            reach = pixels + pads[side] + pads[side + 2] - dilation * (kernel - 1) - 1
            pixels = reach // stride + 1 if reach >= 0 else 0
    return pixels


def cases(seed: int, random_cases: int) -> list[Case]:
    """Every chain, every activation, sums of Y, factors of X, a normalised X, TF32 by warpgroups, and more."""
    rng = random.Random(seed)
    drawn = [draw(rng, chain, TYPES[(i + seed) % 3]) for i, chain in enumerate(CHAINS)]
    drawn += [draw(rng, "pw-dw-pw", "float16", activation) for activation in ACTIVATIONS]
    for chain, *options in (
        ("pw-dw", "pool=true"), ("dw", "pool=true"), ("pw", "pool=true"), ("pw-dw-pw", "pool=true"),
        ("conv-dw", "passes=true"), ("conv-dw", "passes=true", "tile.resident=1"),
        ("pw", "scaled=true"), ("pw-pw", "scaled=true"),
        ("pw-pw", "norm_epsilon=0.01f"), ("pw", "norm_epsilon=0.01f"), ("pw", "norm_epsilon=0.01f", "tile.wgmma=1"),
        ("pw-pw", "norm_epsilon=0.01f", "tile.wgmma=1"),
        ("pw", "pool=true", "tile.warps_m=12"), ("conv", "tile.warps_m=12"),
    ):  # fmt: skip
        flagged = (draw(rng, chain, rng.choice(TYPES)) for _ in range(1000))
        wanted = {tuple(option.split("=")) for option in options}
        drawn.append(next(case for case in flagged if wanted <= set(case.fields)))
    drawn += [warpgroups(rng, chain, "tf32") for chain in WARPGROUP_CHAINS]
    drawn += [_apart(rng, type_, resident) for type_ in ("float16", "tf32") for resident in ("1", "2")]
    drawn += [_going_by(rng, chain, type_) for chain in ("pw", "conv") for type_ in ("float16", "tf32")]
    drawn += [_fewer_images(rng, chain) for chain in ("mean-pw", "mean-pw-pw") * 2]
    return drawn + [draw(rng, rng.choice(CHAINS), rng.choice(TYPES)) for _ in range(random_cases)]


def _apart(rng: random.Random, type_: str, resident: str) -> Case:
    """A lone pointwise of several steps, whose warpgroups have nothing to wait for but their own copies."""
    wanted = {"tile.resident": "1", "tile.warps_m": "8", "tile.warps_n": "1", "input_nchw": "false"}
    while wanted.items() - dict((case := warpgroups(rng, "pw", type_)).fields).items():
        pass
    group = 32 if type_ == "float16" else 16
    channels = {"tile.resident": resident, "tile.split": "1" if resident == "2" else dict(case.fields)["tile.split"]}
    channels |= {"c_in": str(5 * group - 8), "c_mid": str(5 * group - 8), "tile.chunk": str(group)}
    fields = tuple((dict(case.fields) | channels).items())
    return replace(case, fields=fields, height=case.height + 12, width=case.width + 12)


def _going_by(rng: random.Random, chain: str, type_: str) -> Case:
    """A lone convolution of many tiles a thread block, in one step or several, whose weights go by for each."""
    group = 32 if type_ == "float16" else 16
    while (fields := dict((case := warpgroups(rng, chain, type_)).fields))["input_nchw"] == "true":
        pass
    c_in = str(rng.choice((group // 4, group, 5 * group - 8) if chain == "pw" else (group, 2 * group)))
    fields |= {"c_in": c_in, "c_mid": c_in, "tile.split": "1", "tile.resident": "2"}
    fields["tile.chunk"] = str(group * int(fields["tile.warps_n"]) * rng.choice((1, 2)))
    return replace(case, fields=tuple(fields.items()), height=case.height + 12, width=case.width + 12)


def _fewer_images(rng: random.Random, chain: str) -> Case:
    """A mean in float32 whose last thread block has fewer images than the others."""
    for case in (draw(rng, chain, "float32") for _ in range(10000)):
        images = int(dict(case.fields)["tile.images"])
        if case.batch > images and case.batch % images and case.height * case.width > 16:
            return case
    raise AssertionError("none drawn")


def warpgroups(rng: random.Random, chain: str, type_: str) -> Case:
    """A random module of one of WARPGROUP_CHAINS, in float16 or tf32, that warpgroups multiply."""
    drawn = (draw(rng, chain, type_) for _ in range(1000))
    return next(case for case in drawn if dict(case.fields).get("tile.wgmma") == "1")
