"""Run two models on the same inputs on the CPU, and compare their outputs.

Inputs are structured (gradients, edges, blobs, marks like text), not noise: on noise, several real networks answer with
a constant, and a comparison of constants proves nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ort_fcm.errors import FcmError

Array = NDArray[Any]
# Pixels of an unknown height or width: small, and a multiple of 32 as most networks need; others if it does not run.
CHECK_SIZES = (160, 224, 256, 299, 512)
FLOAT16_NORM_ERROR = 3e-2


@dataclass(frozen=True)
class OutputComparison:
    """Errors of one output; the relative one to the largest magnitude of the reference. norm_error: norm of the
    difference over norm of the reference. constant: the reference has one value only, so that an error says little."""

    name: str
    max_abs_error: float
    max_rel_error: float
    norm_error: float
    passed: bool
    constant: bool


@dataclass(frozen=True)
class Comparison:
    outputs: tuple[OutputComparison, ...]

    @property
    def max_abs_error(self) -> float:
        return max((output.max_abs_error for output in self.outputs), default=0.0)

    @property
    def max_rel_error(self) -> float:
        return max((output.max_rel_error for output in self.outputs), default=0.0)

    @property
    def passed(self) -> bool:
        return all(output.passed for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "max_abs_error": self.max_abs_error,
            "max_rel_error": self.max_rel_error,
            "passed": self.passed,
            "outputs": [asdict(output) for output in self.outputs],
        }


def compare(
    a: Path | onnx.ModelProto,
    b: Path | onnx.ModelProto,
    atol: float | None = None,
    rtol: float | None = None,
    batch: int | None = None,
    library: str | None = None,
) -> Comparison:
    """Compare `b` with `a`, the reference, which must have the same inputs and outputs.

    An output passes when every element satisfies |b - a| <= atol + rtol * max|a|, by default with 1e-5 and 1e-3. Where
    either model computes in float16, and neither is given, its norm_error must be at most 3e-2 instead: single elements
    near an edge can turn. Integer outputs may differ in 1 % of their elements. library: custom-op library for `b`.
    FcmError when a model cannot run or the signatures differ.
    """
    first, second = session(a), session(b, library)
    signature = [[(v.name, v.type) for v in s.get_inputs()] for s in (first, second)]
    if signature[0] != signature[1]:
        raise FcmError(f"the models have different inputs: {_names(signature[0])} and {_names(signature[1])}")
    names = [[v.name for v in s.get_outputs()] for s in (first, second)]
    if names[0] != names[1]:
        raise FcmError(f"the models have different outputs: {', '.join(names[0])} and {', '.join(names[1])}")
    feeds, reference = _first_that_runs(first, batch)
    result = run(second, feeds)
    norm = None
    if atol is None and rtol is None and (_has_float16(a) or _has_float16(b)):
        norm = FLOAT16_NORM_ERROR
    atol, rtol = 1e-5 if atol is None else atol, 1e-3 if rtol is None else rtol
    return Comparison(
        tuple(_difference(name, x, y, atol, rtol, norm) for name, x, y in zip(names[0], reference, result, strict=True))
    )


def session(model: Path | onnx.ModelProto, library: str | None = None) -> Any:
    """An inference session on the CPU provider. FcmError when ONNX Runtime does not take the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    try:
        if isinstance(model, onnx.ModelProto):
            from ort_fcm.rewrite.load import is_large, save

            if not is_large(model):
                return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            with tempfile.TemporaryDirectory() as folder:
                save(model, Path(folder) / "model.onnx")
                return onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options, ["CPUExecutionProvider"])
        return onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception types share no base but Exception
        where = "the model" if isinstance(model, onnx.ModelProto) else str(model)
        raise FcmError(f"ONNX Runtime does not load {where}: {_first_line(error)}") from None


def run(session: Any, feeds: Mapping[str, Array]) -> list[Any]:
    try:
        return list(session.run(None, dict(feeds)))
    except Exception as error:
        raise FcmError(f"ONNX Runtime does not run the model: {_first_line(error)}") from None


def _first_that_runs(session: Any, batch: int | None) -> tuple[dict[str, Array], list[Any]]:
    """Inputs of a size that the model accepts, and its outputs."""
    for size in CHECK_SIZES:
        for images in (2, 1) if batch is None else (batch,):
            feeds = inputs_for(session, images, size)
            try:
                return feeds, run(session, feeds)
            except FcmError as error:
                message = str(error)
    raise FcmError(message)


def inputs_for(session: Any, batch: int | None = None, size: int = CHECK_SIZES[0]) -> dict[str, Array]:
    """Structured values for every input; unknown batches are `batch` (2 by default), other unknown sizes `size`."""
    feeds = {}
    for seed, value in enumerate(session.get_inputs()):
        shape = [
            dim if isinstance(dim, int) and dim > 0 else (batch or 2) if axis == 0 else size
            for axis, dim in enumerate(value.shape)
        ]
        feeds[value.name] = structured(shape, value.type, seed)
    return feeds


def structured(shape: Sequence[int], type_name: str = "tensor(float)", seed: int = 0) -> Array:
    """Images, [N, C, H, W] or [N, H, W, C], of gradients, edges, blobs and marks like text, with values
    from -2 to 2 (0 to 252 for integers); for other ranks smooth waves."""
    rng = np.random.default_rng(seed)
    kind = type_name.removeprefix("tensor(").removesuffix(")")
    last = len(shape) == 4 and shape[3] <= 4 < min(shape[1:3])
    n, c, h, w = (shape[0], shape[3], shape[1], shape[2]) if last else (1, 1, 1, 1)
    if len(shape) == 4 and not last:
        n, c, h, w = shape
    if len(shape) == 4:
        y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
        result = np.empty((n, c, h, w))
        for i in range(n):
            cx, cy, angle = rng.uniform(-0.5, 0.5, 3)
            disc = (x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(0.1, 0.8)
            bars = np.sign(np.sin(9 * (x * np.cos(angle) + y * np.sin(angle))))
            for j in range(c):
                a, b, d = rng.uniform(-1, 1, 3)
                result[i, j] = a * x + b * y + d * bars * disc + 0.5 * np.exp(-4 * ((x + cx) ** 2 + (y - cy) ** 2))
            result[i] = np.where(_glyphs(h, w, rng), -1.5, result[i])
        result += 0.02 * rng.standard_normal(result.shape)
        result = result.transpose(0, 2, 3, 1) if last else result
    else:
        count = int(np.prod(shape, dtype=np.int64))
        result = np.sin(np.arange(count) * 0.37 + rng.uniform(0, 6)).reshape(shape)
    result = np.clip(result, -2, 2)
    numpy_kind = {"float": "float32", "double": "float64"}.get(kind, kind)
    if numpy_kind == "bool":
        return result > 0
    if numpy_kind.startswith(("int", "uint")):
        return ((result + 2) * 63).astype(numpy_kind)
    if numpy_kind not in ("float16", "float32", "float64"):
        raise FcmError(f"no structured values for an input of type {type_name}")
    return result.astype(numpy_kind)


def _glyphs(h: int, w: int, rng: np.random.Generator) -> Array:
    """Rows of marks such as text has, in part of the image: text detectors see nothing in smooth shapes."""
    cells = np.zeros((h, w), bool)
    for top in range(h // 8, h - 16, 36):
        for left in range(w // 8, w * 3 // 4, 12):
            mark = rng.integers(0, 2, (6, 4)).repeat(2, 0).repeat(2, 1).astype(bool)
            window = cells[top : top + 12, left : left + 8]
            window[:] = mark[: window.shape[0], : window.shape[1]]
    return cells


def _difference(
    name: str, reference: Any, result: Any, atol: float, rtol: float, norm: float | None
) -> OutputComparison:
    if isinstance(reference, (list, dict)):  # sequences and maps
        same = repr(reference) == repr(result)
        error = 0.0 if same else float("inf")
        return OutputComparison(name, error, error, error, same, False)
    if reference.shape != result.shape:
        return OutputComparison(name, float("inf"), float("inf"), float("inf"), False, False)
    if reference.size == 0:
        return OutputComparison(name, 0.0, 0.0, 0.0, True, True)
    constant = bool((reference == reference.reshape(-1)[0]).all())
    if reference.dtype.kind not in "fiu":
        wrong = float((reference != result).mean())
        return OutputComparison(name, float(wrong > 0), wrong, wrong, wrong <= 0.01, constant)
    x, y = reference.astype(np.float64), result.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(y - x)
    difference[(x == y) | (np.isnan(x) & np.isnan(y))] = 0  # infinities of one sign too
    difference[np.isnan(difference)] = np.inf
    finite = x[np.isfinite(x)]
    largest, whole = float(np.abs(finite).max(initial=0)), float(np.linalg.norm(finite))
    error, length = float(difference.max()), float(np.linalg.norm(difference))
    relative = error / largest if largest else (0.0 if error == 0 else float("inf"))
    norm_error = length / whole if whole else (0.0 if length == 0 else float("inf"))
    if reference.dtype.kind != "f":
        passed = bool((x != y).mean() <= 0.01)
    else:
        passed = error <= atol + rtol * largest if norm is None else norm_error <= norm or error <= atol
    return OutputComparison(name, error, relative, norm_error, passed, constant)


def _has_float16(model: Path | onnx.ModelProto) -> bool:
    if not isinstance(model, onnx.ModelProto):
        try:
            model = onnx.load(model, load_external_data=False)
        except Exception:
            return False
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def _names(signature: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in signature)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
