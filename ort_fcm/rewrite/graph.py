"""A read-only view of one graph: who makes and who uses each tensor, what is constant, what has which size.

An Identity (or a Dropout, which does nothing in inference) is looked through: its output is another name of its input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ort_fcm.rewrite.shapes import Shapes

Array = NDArray[Any]

# Of one tensor with constants, and of tensors of one shape: element by element.
UNARY = {
    "Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "LeakyRelu", "PRelu", "Gelu", "Swish", "Mish", "Elu",
    "Selu", "Softplus", "Softsign", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Floor", "Ceil", "Round",
    "Sign", "ThresholdedRelu", "Celu", "Cast", "FastGelu", "QuickGelu", "Identity", "Dropout", "BatchNormalization",
}  # fmt: skip
BINARY = {"Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Sum", "Mean"}
# What exporters and converters leave between a weight and its convolution.
FOLDED = {"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Expand"}
POOLS = {"MaxPool", "AveragePool", "LpPool"}


def attributes(node: NodeProto) -> dict[str, Any]:
    """The node's attributes as Python values, strings decoded."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def operator(node: NodeProto) -> str:
    """The node's operator. One of a domain that is not known here is like none that is, whatever its name."""
    return node.op_type if node.domain in ("", "ai.onnx", "com.microsoft") else f"{node.domain}::{node.op_type}"


def label(node: NodeProto) -> str:
    """What to call the node in a message."""
    return node.name or f"{node.op_type}:{next(iter(node.output), '')}"


def captured(node: NodeProto) -> Iterator[str]:
    """Names that the node's subgraphs use from outside them."""
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            inside = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            for inner in graph.node:
                yield from (name for name in [*inner.input, *captured(inner)] if name and name not in inside)
                inside.update(inner.output)
            yield from (value.name for value in graph.output if value.name not in inside)


class View:
    """One graph. Node numbers are positions in `graph.node`.

    overridable: names of initializers that a caller may replace, so that they are no constants.
    outer: the view of the graph around this one, whose constants are seen here.
    """

    def __init__(
        self, graph: onnx.GraphProto, shapes: Shapes, opset: int, overridable: set[str], outer: View | None = None
    ) -> None:
        self.graph, self.shapes, self.opset, self.overridable, self.outer = graph, shapes, opset, overridable, outer
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.alias: dict[str, str] = {}
        self._constants: dict[str, onnx.TensorProto | None] = {}
        self.producer: dict[str, int] = {}
        self._uses: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            self.producer.update(dict.fromkeys(node.output, index))
            if _does_nothing(node):
                self.alias[node.output[0]] = self.name(node.input[0])
                continue
            for slot, name in enumerate(node.input):
                self._uses[self.name(name)].append((index, slot))
            for name in captured(node):
                self._uses[self.name(name)].append((index, -1))
        self.outputs = {self.name(value.name) for value in graph.output}
        self._sizes: dict[str, tuple[Hashable, ...]] = {}
        for node in self.nodes:
            self._size_of_outputs(node)

    def name(self, tensor: str) -> str:
        """The first of a tensor's names."""
        return self.alias.get(tensor, tensor)

    def uses(self, tensor: str) -> list[tuple[int, int]]:
        """(node, input) of every use, the input -1 when it is inside a subgraph."""
        return self._uses.get(self.name(tensor), [])

    def is_output(self, tensor: str) -> bool:
        return self.name(tensor) in self.outputs

    def only_use(self, tensor: str) -> tuple[int, int] | None:
        """The one use of a tensor that nothing else needs."""
        uses = self.uses(tensor)
        return uses[0] if len(uses) == 1 and not self.is_output(tensor) else None

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The constant tensor of this name, an initializer or a Constant node's, here or in a graph around."""
        name = self.name(name)
        if name in self.initializers:
            return None if name in self.overridable else self.initializers[name]
        if name in self.producer:
            node = self.nodes[self.producer[name]]
            if operator(node) in FOLDED:
                return self._folded(node)
            if operator(node) != "Constant" or not node.attribute[0].name.startswith("value"):
                return None
            value = helper.get_attribute_value(node.attribute[0])
            if isinstance(value, onnx.TensorProto):
                return value
            return numpy_helper.from_array(np.array(value, np.float32 if "float" in node.attribute[0].name else None))
        if self.outer is not None and name not in {value.name for value in self.graph.input}:
            return self.outer.tensor(name)
        return None

    def _folded(self, node: NodeProto) -> onnx.TensorProto | None:
        """The output of a node whose inputs are all constant."""
        output = node.output[0]
        if output not in self._constants:
            feeds = {name: self.constant(name) for name in node.input if name}
            self._constants[output] = None
            if all(value is not None for value in feeds.values()):
                opsets = [helper.make_opsetid("", self.opset)]
                function = helper.make_function("folded", "f", list(feeds), [output], [node], opsets)
                with suppress(Exception):  # its own, of many types: then it is a node like any other
                    (value,) = ReferenceEvaluator(function).run(None, feeds, attributes={})
                    self._constants[output] = numpy_helper.from_array(np.asarray(value), output)
        return self._constants[output]

    def constant(self, name: str) -> Array | None:
        """The value of a constant tensor."""
        tensor = self.tensor(name) if name else None
        return None if tensor is None else numpy_helper.to_array(tensor)

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one element."""
        tensor = self.tensor(name) if name else None
        if tensor is None or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).reshape(()))

    def why_not_constant(self, name: str) -> str:
        name = self.name(name)
        if name in self.overridable:
            return (
                f"'{name}' is also a graph input, which a caller may override "
                "(with constants=True, or --constants, it is taken as constant)"
            )
        if name in self.producer:
            return f"'{name}' is computed by {self.nodes[self.producer[name]].op_type}"
        return f"'{name}' is an input"

    def type(self, tensor: str) -> int:
        return self.shapes.types.get(tensor, 0) or self.shapes.types.get(self.name(tensor), 0)

    def rank(self, tensor: str) -> int | None:
        shape = self.shapes.symbolic.get(tensor) or self.shapes.symbolic.get(self.name(tensor))
        return None if shape is None else len(shape)

    def planned(self, tensor: str) -> tuple[int, ...] | None:
        """The shape a tensor is planned for."""
        return self.shapes.planned.get(tensor) or self.shapes.planned.get(self.name(tensor))

    def size(self, tensor: str) -> tuple[Hashable, ...] | None:
        """Equal sizes of two tensors prove that they have the same shape, whatever the inputs' are."""
        tensor = self.name(tensor)
        return self._sizes.get(tensor, self.shapes.symbolic.get(tensor))

    def _size_of_outputs(self, node: NodeProto) -> None:
        """Inference gives up the symbol of a size after each convolution; here it survives."""
        for name in node.output[:1]:
            known = self.shapes.symbolic.get(name)
            if known is None or all(isinstance(dim, int) for dim in known):
                continue
            size = self.size(node.input[0]) if node.input else None
            if size is None:
                continue
            op = operator(node)
            derived: tuple[Hashable, ...] | None
            if self.is_global_mean(node):
                derived = (*size[:2], 1, 1)[: len(known)]
            elif op in ("Reshape", "Unsqueeze") and len(size) == 2 and known[1:] == (size[1], 1, 1):
                derived = (*size, 1, 1)
            elif op in ("Reshape", "Flatten", "Squeeze") and size[2:] == (1, 1) and known[1:] == size[1:2]:
                derived = size[:2]
            elif op in BINARY:
                derived = self._broadcast(node)
            elif len(size) != len(known):
                continue
            elif op == "ReduceMean" and (axes := self.axes(node)) is not None:
                derived = tuple(1 if axis in axes else dim for axis, dim in enumerate(size))
            elif op == "Transpose":
                derived = tuple(size[axis] for axis in attributes(node).get("perm", range(len(size))[::-1]))
            elif op in UNARY or op == "LayerNormalization":
                derived = size
            elif op in {"Conv", "FusedConv"} | POOLS and len(size) == 4:
                channels = known[1] if op in ("Conv", "FusedConv") else size[1]
                weight = self.size(node.input[1]) if len(node.input) > 1 else None
                if "kernel_shape" not in attributes(node) and (weight is None or len(weight) != 4):
                    continue
                derived = (size[0], channels, *(_window(node, size[a], weight or (), a - 2) for a in (2, 3)))
            else:
                continue
            if derived is None:
                continue
            self._sizes[name] = tuple(dim if isinstance(dim, int) else d for dim, d in zip(known, derived, strict=True))

    def is_global_mean(self, node: NodeProto) -> bool:
        """Whether the node is the mean over height and width of [N, C, H, W], with these axes kept or not."""
        if operator(node) not in ("ReduceMean", "GlobalAveragePool") or self.rank(node.input[0]) != 4:
            return False
        return operator(node) == "GlobalAveragePool" or self.axes(node) == [2, 3]

    def axes(self, node: NodeProto) -> list[int] | None:
        """The axes that a reduction is over, in order, if they are known."""
        axes, rank = attributes(node).get("axes"), self.rank(node.input[0])
        if axes is None and len(node.input) > 1:
            axes = self.constant(node.input[1])
        return None if axes is None or rank is None else sorted(int(axis) % rank for axis in axes)

    def _broadcast(self, node: NodeProto) -> tuple[Hashable, ...] | None:
        """The size of an input that the others are broadcast to, if it is known that they are."""
        sizes = [self.size(name) for name in node.input if self.scalar(name) is None]
        for size in sizes:
            if size and all(
                other is not None
                and len(other) <= len(size)
                and all(a in (b, 1) for a, b in zip(other[::-1], size[::-1], strict=False))
                for other in sizes
            ):
                return size
        return None


def _does_nothing(node: NodeProto) -> bool:
    return operator(node) == "Identity" or (
        operator(node) == "Dropout" and len(node.input) < 3 and not any(node.output[1:])
    )


def _window(node: NodeProto, size: Hashable, weight: tuple[Any, ...], axis: int) -> Hashable:
    """The size of a sliding window's output: the input's own when the window keeps it, else named after both."""
    values = attributes(node)
    kernel = values["kernel_shape"][axis] if "kernel_shape" in values else weight[axis + 2]
    stride = values.get("strides", (1, 1))[axis]
    dilation = values.get("dilations", (1, 1))[axis]
    pads = values.get("pads", (0, 0, 0, 0))
    auto_pad = values.get("auto_pad", "NOTSET") or "NOTSET"
    before, after = pads[axis], pads[axis + 2]
    same = before + after == dilation * (kernel - 1) if auto_pad == "NOTSET" else auto_pad.startswith("SAME")
    if stride == 1 and same:
        return size
    return ("window", size, kernel, stride, dilation, before, after, values.get("ceil_mode", 0), auto_pad)
