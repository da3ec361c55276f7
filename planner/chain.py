"""What is planned, as plain data: layers in a chain, and how a module's kernel is cut (its tile)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

KINDS = ("dw", "pw", "conv")
STEM_CHANNELS = 4  # a dense convolution over so few is a stem: it reads [N, C, H, W], and has other stages behind it
ACTIVATIONS = (
    "none", "relu", "clip", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh", "leakyrelu", "prelu",
    "tanh",
)  # fmt: skip
DTYPES = ("float16", "float32")
# The chains of stages that one kernel computes.
STAGES = ("dw", "pw", "conv", "dw-pw", "pw-dw", "conv-dw", "pw-pw", "conv-pw", "pw-dw-pw", "conv-dw-pw")


class PlannerError(ValueError):
    """Bad input to the planner, in one sentence that names the layer, GPU, tile or file, and the cause."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b


@dataclass(frozen=True)
class Layer:
    """A convolution with its bias, activation and residual Add.

    kind: "dw" depthwise (group = channels, as many outputs as inputs), "pw" 1x1 without pads, group 1, any stride,
    "conv" any other dense 2-D convolution of group 1. kernel, stride, dilation: (height, width); pads: (top, left,
    bottom, right), in pixels. residual: an Add with a residual follows, so a module can only end here. nodes: how many
    nodes of the model the layer stands for. activation_nodes: how many elementwise kernels stock runs after the
    convolution (the pieces of the activation, and the residual Add). Of a squeeze-and-excite, or a network's tail: pool
    says that the mean of the output over its map is needed besides, so that a module can only end here; mean, that the
    input is such a mean, so that a module can only start here, and is this pointwise, perhaps with the next (whole: of
    the map itself, not of rows that a module in front has added up); scaled, that the input is multiplied by a factor
    for each image and channel, so that a module can only start here. So does normed: the input is normalised over its
    channels.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    activation: str = "none"
    residual: bool = False
    name: str = ""
    nodes: int = 1
    activation_nodes: int = 0
    pool: bool = False
    mean: bool = False
    scaled: bool = False
    normed: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        for key in ("kernel", "stride", "dilation", "pads"):  # lists, as JSON gives them, become hashable
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.kind not in KINDS:
            raise PlannerError(f"layer '{self.name}': kind '{self.kind}' is none of {', '.join(KINDS)}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise PlannerError(f"layer '{self.name}': activation '{self.activation}' is none of {known}")
        if min(self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.dilation) < 1:
            raise PlannerError(f"layer '{self.name}': channels, kernel, stride and dilation must be at least 1")
        if min(*self.pads, self.nodes, self.activation_nodes) < 0:
            raise PlannerError(f"layer '{self.name}': pads and node counts must not be negative")
        if self.kind == "dw" and self.in_channels != self.out_channels:
            raise PlannerError(f"layer '{self.name}': a depthwise has as many output channels as input channels")
        if self.kind == "pw" and (self.kernel != (1, 1) or any(self.pads)):
            raise PlannerError(f"layer '{self.name}': a pw layer has a 1x1 kernel and no pads")
        if (self.mean or self.scaled or self.normed) and self.kind != "pw":
            raise PlannerError(f"layer '{self.name}': only a pw layer takes a mean, factors or a normalised input")
        if self.mean + self.scaled + self.normed > 1:
            raise PlannerError(f"layer '{self.name}': of a mean, factors and a normalised input there is one at most")
        if self.pool and self.kind == "dw" and self.residual:
            raise PlannerError(f"layer '{self.name}': a depthwise with a residual is not pooled")

    @cached_property
    def taps(self) -> int:
        """Weights of one filter in one channel."""
        return self.kernel[0] * self.kernel[1]

    @cached_property
    def weights(self) -> int:
        """Elements of the weight tensor (the bias apart)."""
        return self.out_channels * self.taps * (1 if self.kind == "dw" else self.in_channels)

    @cached_property
    def reach(self) -> tuple[int, int]:
        """Input pixels that one output pixel spans: (kernel - 1) * dilation + 1."""
        return (self.kernel[0] - 1) * self.dilation[0] + 1, (self.kernel[1] - 1) * self.dilation[1] + 1

    def out_length(self, axis: int, length: int) -> int:
        """Output pixels along an axis (0 rows, 1 columns) of `length` input pixels; below 1 where the filter does not
        fit."""
        if self.mean:
            return 1
        return (length + self.pads[axis] + self.pads[axis + 2] - self.reach[axis]) // self.stride[axis] + 1

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Output map of an input map, in pixels."""
        return self.out_length(0, height), self.out_length(1, width)


@dataclass(frozen=True)
class Chain:
    """Layers of which each one's output feeds the next one only. batch in images, height and width of the first input
    in pixels; dtype "float16" or "float32" (float32 is planned for TF32 tensor cores where the GPU has them)."""

    layers: tuple[Layer, ...]
    batch: int
    height: int
    width: int
    dtype: str = "float16"
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise PlannerError(f"chain '{self.name}' has no layers")
        if self.dtype not in DTYPES:
            raise PlannerError(f"chain '{self.name}': dtype '{self.dtype}' is none of {', '.join(DTYPES)}")
        if min(self.batch, self.height, self.width) < 1:
            raise PlannerError(f"chain '{self.name}': batch, height and width must be at least 1")
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            if before.out_channels != after.in_channels:
                raise PlannerError(
                    f"chain '{self.name}': layer '{before.name}' has {before.out_channels} output channels, "
                    f"its successor '{after.name}' {after.in_channels} input channels"
                )
        for layer, (height, width) in zip(self.layers, self.maps()[1:], strict=True):
            if min(height, width) < 1:
                raise PlannerError(f"chain '{self.name}': the filter of layer '{layer.name}' does not fit its input")

    def maps(self) -> list[tuple[int, int]]:
        """(height, width) of the first input and of every layer's output, in pixels."""
        sizes = [(self.height, self.width)]
        for layer in self.layers:
            sizes.append(layer.out_size(*sizes[-1]))
        return sizes


@dataclass(frozen=True)
class Tile:
    """How a module's work is cut: the keys of the node's attribute `tile`, with their defaults."""

    tile_h: int = 8  # output pixels of a thread block; in a lone depthwise, of a thread (then patch_h is tile_h)
    tile_w: int = 8
    images: int = 1  # images of a thread block (more than 1 only when a tile covers the whole output map, or on a mean)
    patch_h: int = 1  # a thread computes patches of patch_h x 2 output pixels
    chunk: int = 32  # middle channels a step
    warps_m: int = 4  # warps along pixels: each has 8 patches
    warps_n: int = 1  # warps along output channels
    block_n: int = 0  # output channels a thread block computes; 0: all
    split: int = 1  # thread blocks of a cluster that share the middle channels
    blocks: int = 1  # thread blocks an SM should hold: bounds the registers of a thread
    resident: int = 0  # 1, 2: a thread block works through many tiles; all weights stay in shared memory, or (2, of a
    # lone convolution with wgmma) go by once for each tile
    wgmma: int = 0  # 1: four warps multiply 64 pixels at once, from shared memory (compute capability 9.0)

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Tile:
        """The tile of `key=value` pairs separated by spaces; missing keys keep their defaults."""
        known = {field.name for field in fields(cls)}
        values: dict[str, int] = {}
        for item in text.split():
            key, _, value = item.partition("=")
            if key not in known or key in values or not value.isdecimal():
                raise PlannerError(f"tile '{text}': '{item}' is not one of {', '.join(sorted(known))} with a number")
            values[key] = int(value)
        return cls(**values)

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def weights_stay(self) -> bool:
        return self.resident == 1
