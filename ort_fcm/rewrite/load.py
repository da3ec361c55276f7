"""Read and validate a model, and write one: external data stays in the model's directory, writes are atomic."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, external_data_helper, inliner

from ort_fcm.errors import FcmError

PROTO_LIMIT = 2**31 - 2**20  # bytes; protobuf files end at 2 GiB


def load(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model at `source`, external data in memory. FcmError names the file and what is wrong with it."""
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        for tensor in tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                raise FcmError(
                    f"tensor '{tensor.name}' keeps its data in a file; pass the model's path, or load the data first"
                )
        _validate(model, "the model")
        return model
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FcmError(f"cannot read {path}: {error.strerror}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise FcmError(f"{path} is not an ONNX file, or is truncated") from None
    del data
    _validate(model, str(path))
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(tensor, path)
    return model


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: object) -> Iterator[TensorProto]:
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graph_tensors(graph)


def _validate(model: onnx.ModelProto, where: str) -> None:
    """Random bytes can parse as a message, so look for what every model has."""
    if not model.ir_version or not model.graph.output or not (model.opset_import or model.ir_version < 3):
        raise FcmError(f"{where} is not an ONNX model: it has no IR version, opset or graph output")
    known = {value.name for value in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    known |= {tensor.values.name for tensor in model.graph.sparse_initializer} | {""}
    for node in model.graph.node:
        if missing := next((name for name in node.input if name not in known), None):
            label = node.name or node.op_type
            raise FcmError(f"{where} is not a valid ONNX model: input '{missing}' of node '{label}' has no producer")
        known.update(node.output)
    if missing := next((value.name for value in model.graph.output if value.name not in known), None):
        raise FcmError(f"{where} is not a valid ONNX model: graph output '{missing}' has no producer")


def _load_external(tensor: TensorProto, model_path: Path) -> None:
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    directory = model_path.parent.resolve()
    target = (directory / location).resolve()  # follows symbolic links, so that none leads out
    if not location or Path(location).is_absolute() or not target.is_relative_to(directory):
        raise FcmError(
            f"{model_path}: external data '{location}' of tensor '{tensor.name}' lies outside the model's directory"
        )
    if not target.is_file():
        raise FcmError(f"{model_path}: external data file '{location}' of tensor '{tensor.name}' is missing")
    try:
        size, itemsize = 1, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for dim in tensor.dims:
            size *= dim
        bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 8 * itemsize
        needed = (size * bits + 7) // 8
        offset, length = int(info.get("offset", 0)), int(info.get("length", needed))
        if min(offset, size, length) < 0 or length != needed or offset + length > target.stat().st_size:
            raise ValueError
        with target.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
    except (ValueError, KeyError, TypeError, OSError):
        raise FcmError(
            f"{model_path}: external data file '{location}' does not hold the data of tensor '{tensor.name}'"
        ) from None
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def inline(model: onnx.ModelProto) -> None:
    """Put the bodies of local functions where these are called. The weights, which may exceed a message, stay."""
    weights = [tensor.raw_data for tensor in model.graph.initializer]
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    model.CopyFrom(inliner.inline_local_functions(model))
    for tensor, data in zip(model.graph.initializer, weights, strict=True):
        if data:
            tensor.raw_data = data


def check_writable(output: Path) -> None:
    """FcmError unless a file can be made in the output's directory."""
    if output.is_dir():
        raise FcmError(f"cannot write {output}: it is a directory")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise FcmError(f"cannot write {output}: {error.strerror}") from None


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the model does not fit one protobuf message. (Its own ByteSize() fails when it does not.)"""
    return sum(len(tensor.raw_data) for tensor in tensors(model)) > PROTO_LIMIT


def save(model: onnx.ModelProto, output: Path) -> None:
    """Write `model` to `output`; weights go to `output`.data when they do not fit one file. All or nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            temporary = Path(folder) / output.name
            if is_large(model):
                copy = onnx.ModelProto()
                copy.CopyFrom(model)
                external_data_helper.convert_model_to_external_data(copy, location=f"{output.name}.data")
                onnx.save(copy, temporary)
            else:
                temporary.write_bytes(model.SerializeToString())
            mode = temporary.stat().st_mode
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the data before the model that names it
                file.chmod(mode)  # onnx makes data files for their owner only
                os.replace(file, output.parent / file.name)
    except OSError as error:
        raise FcmError(f"cannot write {output}: {error.strerror}") from None
