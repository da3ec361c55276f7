"""Times a network in stock ONNX Runtime and rewritten, side by side in one process.

Inputs and outputs stay on the device (IOBinding). Sessions take turns in short rounds, so that a drift of clocks or
temperature meets all of them alike. A time is the wall time of one `run_with_iobinding`, which synchronises.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json as jsonlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ort_fcm.errors import FcmError

Array = NDArray[Any]

# The largest norm of the difference over the norm of stock's outputs that rounding explains, by input type.
TOLERANCE = {"float16": 3e-2, "float32": 1e-2}  # float32 includes TF32
MOST_TOLERANCE = 0.3  # of a network so sensitive to rounding that stock's own settings differ by more


@dataclass(frozen=True)
class Setting:
    """One way to run a network: rewritten or stock, and the CUDA provider's options that matter for speed."""

    rewritten: bool
    nhwc: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        parts = ["ort_fcm" if self.rewritten else "stock", "NHWC" if self.nhwc else "NCHW"]
        return " ".join([*parts, "graph"] if self.graph else parts)


CUDA_SETTINGS = (
    Setting(False),
    Setting(False, graph=True),
    Setting(False, nhwc=True),
    Setting(False, nhwc=True, graph=True),
    Setting(True),
    Setting(True, graph=True),
)
CPU_SETTINGS = (Setting(False), Setting(True))


@dataclass(frozen=True)
class Timing:
    """What one setting gave. Times are in milliseconds; `error` says why there are none."""

    setting: Setting
    median_ms: float | None = None
    p99_ms: float | None = None
    start_s: float | None = None  # creating the session and its first run
    difference: float | None = None  # norm of the difference from stock's outputs over the norm of these
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """One network at one batch."""

    network: str
    batch: int
    dtype: str
    timings: tuple[Timing, ...]
    report: Mapping[str, Any] = field(default_factory=dict)  # the rewriter's, cut to its totals

    def best(self, rewritten: bool) -> Timing | None:
        """The fastest setting of the rewritten or of the stock network, if any ran."""
        ran = [t for t in self.timings if t.setting.rewritten == rewritten and t.median_ms is not None]
        return min(ran, key=lambda t: t.median_ms or 0.0, default=None)

    @property
    def ratio(self) -> float | None:
        """The best stock time over the best rewritten time: above 1, the rewritten network is faster."""
        stock, rewritten = self.best(False), self.best(True)
        if stock is None or rewritten is None or not stock.median_ms or not rewritten.median_ms:
            return None
        return stock.median_ms / rewritten.median_ms

    @property
    def passed(self) -> bool:
        """Whether the rewritten network ran and gave stock's numbers, within rounding, in every setting that ran.

        Where stock's own settings differ by more, half as much again as they do is within rounding.
        """
        stock, ran = (
            [t.difference for t in self.timings if t.setting.rewritten == kind and t.difference is not None]
            for kind in (False, True)
        )
        limit = max(TOLERANCE[self.dtype], min(1.5 * max(stock, default=0.0), MOST_TOLERANCE))
        return bool(ran) and max(ran) <= limit and self.best(True) is not None

    def to_dict(self) -> dict[str, Any]:
        best = self.best(False)
        return {
            "network": self.network,
            "batch": self.batch,
            "dtype": self.dtype,
            "best_stock": best and best.setting.name,
            "ratio": self.ratio,
            "passed": self.passed,
            "timings": [{"name": t.setting.name, **asdict(t)} for t in self.timings],
            "rewrite": dict(self.report),
        }


def fix_shapes(
    model: onnx.ModelProto, batch: int | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> onnx.ModelProto:
    """A copy of `model` whose inputs are static: a dynamic first dimension becomes `batch` (default 1).

    `shapes` gives whole shapes by input name, for other dynamic dimensions. A static model whose batch is another,
    or a dimension that stays unknown, is an FcmError.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {tensor.name for tensor in copy.graph.initializer}
    symbols: dict[str, int] = {}
    for value in copy.graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        given = (shapes or {}).get(value.name)
        if given is not None and len(given) != len(dims):
            raise FcmError(f"input {value.name}: a shape of {len(given)} dimensions was given, it has {len(dims)}")
        for i, dim in enumerate(dims):
            wanted = given[i] if given is not None else batch or 1 if i == 0 else None
            if dim.dim_value:
                explicit = given is not None or (i == 0 and batch is not None)
                if explicit and wanted is not None and dim.dim_value != wanted:
                    raise FcmError(f"input {value.name}: dimension {i} is {dim.dim_value} in the model, not {wanted}")
                continue
            if wanted is None:
                raise FcmError(f"input {value.name}: dimension {i} is dynamic; give the input's shape")
            if dim.dim_param:
                symbols[dim.dim_param] = wanted
            dim.dim_value = wanted
    for value in copy.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]
    del copy.graph.value_info[:]
    return copy


def structured_inputs(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Inputs for a model of static shapes: blobs and gratings with a little noise, about zero mean and unit variance.

    Noise alone drives the heads of trained networks to a constant, and then a comparison proves nothing.
    """
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if len(shape) != 4 or dtype.kind != "f":
            x = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
            feeds[value.name] = np.asarray(x).astype(dtype)
            continue
        channels_last = shape[3] <= 4 < shape[1]
        n, c, h, w = (shape[0], shape[3], shape[1], shape[2]) if channels_last else shape
        y, x = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
        image = np.empty((n, c, h, w))
        for i in range(n):
            wave, phase = rng.uniform(-12, 12, (c, 2)), rng.uniform(0, 6.3, c)
            centre, radius = rng.uniform(0, 1, (3, 2)), rng.uniform(0.05, 0.3, 3)
            blobs = sum(
                ((y - cy) ** 2 + (x - cx) ** 2 < r * r) * s
                for (cy, cx), r, s in zip(centre, radius, (1.0, -1.0, 1.5), strict=True)
            )
            for j in range(c):
                image[i, j] = np.sin(wave[j, 0] * y + wave[j, 1] * x + phase[j]) + blobs * rng.uniform(-1, 1)
        image += 0.1 * rng.standard_normal(image.shape)
        image /= image.std()
        feeds[value.name] = (image.transpose(0, 2, 3, 1) if channels_last else image).astype(dtype)
    return feeds


def _provider_options(setting: Setting, tf32: bool, search: str) -> dict[str, str]:
    return {
        "cudnn_conv_algo_search": search,
        "prefer_nhwc": str(int(setting.nhwc)),
        "enable_cuda_graph": str(int(setting.graph)),
        "use_tf32": str(int(tf32)),
    }


class Runner:
    """A session with its inputs and outputs bound on the device."""

    def __init__(
        self,
        model: onnx.ModelProto,
        setting: Setting,
        feeds: Mapping[str, Any],
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]] | None,
        device: str,
        tf32: bool = True,
        search: str = "EXHAUSTIVE",
        memory_pattern: bool = True,
    ) -> None:
        """`feeds` are OrtValues on `device`; `outputs` the shapes to allocate, or None to let the session allocate.
        `memory_pattern`: ONNX Runtime's own, by which a second run at a size allocates one block for all tensors."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = memory_pattern
        if setting.rewritten:
            from ort_fcm import library_path

            options.register_custom_ops_library(str(library_path()))
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", _provider_options(setting, tf32, search)))
        started = time.perf_counter()
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        if device == "cuda" and "CUDAExecutionProvider" not in self.session.get_providers():
            raise FcmError("onnxruntime has a CUDA provider but could not start it; `ort-fcm doctor` may say why")
        self.binding = self.session.io_binding()
        self.outputs: dict[str, Any] = {}
        for name, value in feeds.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            if outputs is None:
                self.binding.bind_output(output.name, device)
                continue
            shape, dtype = outputs[output.name]
            value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
            self.outputs[output.name] = value
            self.binding.bind_ortvalue_output(output.name, value)
        self.run()
        self.start_s = time.perf_counter() - started

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def results(self) -> dict[str, Array]:
        """The outputs of one more run, copied to the host. They are poisoned first: what is not written shows."""
        for value in self.outputs.values():
            if "float" in value.data_type():
                value.update_inplace(np.full_like(value.numpy(), np.nan))
        self.run()
        if self.outputs:
            return {name: value.numpy() for name, value in self.outputs.items()}
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.binding.copy_outputs_to_cpu(), strict=True))

    def time(self, runs: int) -> list[float]:
        """Milliseconds of each of `runs` runs, after one that is not counted."""
        self.run()
        times = []
        for _ in range(runs):
            begin = time.perf_counter_ns()
            self.run()
            times.append((time.perf_counter_ns() - begin) / 1e6)
        return times


def difference(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """The largest ratio of norm(output - reference) to norm(reference) over all float outputs; NaN counts as inf."""
    worst = 0.0
    for name, expected in reference.items():
        if expected.dtype.kind != "f" or not expected.size:
            continue
        wanted, got = expected.astype(np.float64), outputs[name].astype(np.float64)
        if wanted.shape != got.shape or not np.isfinite(got).all():
            return float("inf")
        scale = float(np.linalg.norm(wanted)) or 1.0
        worst = max(worst, float(np.linalg.norm(got - wanted)) / scale)
    return worst


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def measure(
    network: str,
    stock: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    *,
    device: str = "cuda",
    settings: Sequence[Setting] | None = None,
    runs: int = 200,
    warmup: int = 30,
    rounds: int = 10,
    seed: int = 0,
    tf32: bool = True,
    report: Mapping[str, Any] | None = None,
    keep: dict[str, dict[str, Array]] | None = None,
) -> Result:
    """Time two models of the same static shapes. `keep`, when given, receives inputs and each setting's outputs.

    A setting that cannot run (graph capture refused, say) is reported with its error; the others go on.
    """
    import onnxruntime as ort

    settings = settings or (CUDA_SETTINGS if device == "cuda" else CPU_SETTINGS)
    host = structured_inputs(stock, seed)
    feeds = {name: ort.OrtValue.ortvalue_from_numpy(value, device, 0) for name, value in host.items()}
    plain = Runner(stock, Setting(False), feeds, None, device, tf32, search="HEURISTIC")  # not timed
    reference = plain.results()
    shapes = {name: (value.shape, value.dtype) for name, value in reference.items()}
    del plain
    if keep is not None:
        keep["inputs"] = host
    runners: dict[Setting, Runner] = {}
    found: dict[Setting, Timing] = {}
    for setting in settings:
        try:
            runner = Runner(rewritten if setting.rewritten else stock, setting, feeds, shapes, device, tf32)
            for _ in range(warmup):
                runner.run()
        except FcmError:
            raise
        except Exception as error:  # onnxruntime raises its own types, by status code
            found[setting] = Timing(setting, error=_one_line(error))
            continue
        runners[setting] = runner
    times: dict[Setting, list[float]] = {setting: [] for setting in runners}
    for _ in range(rounds):
        for setting, runner in runners.items():
            times[setting] += runner.time(max(1, -(-runs // rounds)))
    for setting, runner in runners.items():
        outputs = runner.results()
        if keep is not None:
            keep[setting.name] = outputs
        found[setting] = Timing(
            setting,
            median_ms=statistics.median(times[setting]),
            p99_ms=float(np.percentile(times[setting], 99)),
            start_s=runner.start_s,
            difference=difference(outputs, reference),
        )
    runners.clear()
    gc.collect()
    floats = [value.dtype.name for value in host.values() if value.dtype.kind == "f"]
    return Result(
        network,
        batch=next(iter(host.values())).shape[0] if host else 1,
        dtype=floats[0] if floats and floats[0] in TOLERANCE else "float32",
        timings=tuple(found[setting] for setting in settings),
        report=report or {},
    )


def _cudnn_version() -> int | None:
    try:
        version = ctypes.CDLL("libcudnn.so.9").cudnnGetVersion
    except OSError:
        return None
    version.restype = ctypes.c_size_t
    return int(version())


def environment() -> dict[str, Any]:
    """Where and when: versions, GPU, date (UTC) and the revision of the source, for a results file."""
    import onnxruntime as ort

    from ort_fcm.device import present_device

    device = present_device()
    revision = None
    try:
        root = Path(__file__).parent
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
        revision = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        pass
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "revision": os.environ.get("ORT_FCM_REVISION") or revision,
        "gpu": device and device.name,
        "cuda_driver": device and device.driver,
        "cudnn": _cudnn_version(),
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def require_provider(provider: str) -> str:
    """The device, `cuda` or `cpu`, of a provider name; an FcmError when this machine cannot run it."""
    import onnxruntime as ort

    from ort_fcm.device import present_device

    if provider == "cpu":
        return "cpu"
    if provider != "cuda":
        raise FcmError(f"unknown provider {provider}: it must be cuda or cpu")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise FcmError("this onnxruntime has no CUDA provider: install onnxruntime-gpu, or pass --provider cpu")
    if present_device() is None:
        raise FcmError("no NVIDIA GPU was found on this machine: pass --provider cpu to time the CPU provider")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return "cuda"


def summary(report: Any) -> dict[str, Any]:
    """The totals of a rewriter's report, as plain data."""
    data = report if isinstance(report, dict) else report.to_dict()
    keys = ("gpu", "convolutions", "in_modules", "fused_convolutions", "traffic_bytes")
    return {key: data[key] for key in keys if key in data} | {"modules": len(data.get("modules", ()))}


def bench(
    model: str | os.PathLike[str] | onnx.ModelProto,
    batches: Sequence[int] | None = None,
    *,
    gpu: str | None = None,
    provider: str = "cuda",
    shapes: Mapping[str, Sequence[int]] | None = None,
    runs: int = 200,
    warmup: int = 30,
    seed: int = 0,
    tf32: bool = True,
    network: str | None = None,
    json: str | os.PathLike[str] | None = None,
) -> list[Result]:
    """Rewrite `model` for each batch and time it against stock ONNX Runtime; a Result a batch.

    `batches` None: the model's own batch, or 1 where it is dynamic. `shapes` are whole input shapes by name, needed
    where more than the batch is dynamic. With `json`, the results and the environment are written there. FcmError:
    no such provider here, a static model with another batch, or whatever `rewrite` refuses.
    """
    from ort_fcm import rewrite
    from ort_fcm.rewrite.load import load

    device = require_provider(provider)
    if batches is not None and (not batches or min(batches) < 1):
        raise FcmError("a batch must be at least 1")
    if isinstance(model, onnx.ModelProto):
        proto, name = model, network or model.graph.name
    else:
        proto, name = load(Path(model)), network or Path(model).stem
    results = []
    wanted: Sequence[int | None] = batches or [None]
    for batch in wanted:
        stock = fix_shapes(proto, batch, shapes)
        done = rewrite(stock, gpu=gpu, check=False)  # checked below, against stock on the device
        results.append(
            measure(
                name,
                stock,
                done.model,
                device=device,
                runs=runs,
                warmup=warmup,
                seed=seed,
                tf32=tf32,
                report=summary(done.report),
            )
        )
    if json is not None:
        write_json(json, results)
    return results


def write_json(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Write `results` with the environment, whole or not at all."""
    data = {"environment": environment(), "results": [result.to_dict() for result in results]}
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_text(jsonlib.dumps(data, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FcmError(f"{path}: cannot write: {error.strerror}") from error


def table(results: Sequence[Result]) -> Any:
    """A rich table of `results`: median, p99 and the ratio of the best stock setting's median to each."""
    from rich.table import Table

    out = Table(title="Milliseconds a batch; ratio: the best stock time over this one")
    for column in ("network", "type", "batch", "setting"):
        out.add_column(column)
    for column in ("median", "p99", "ratio", "difference"):
        out.add_column(column, justify="right", no_wrap=True)
    for result in results:
        stock = result.best(False)
        head = [result.network, result.dtype, str(result.batch)]
        for timing in result.timings:
            numbers = ["did not run", "", "", ""]
            if timing.median_ms and timing.p99_ms and timing.difference is not None:
                ratio = stock.median_ms / timing.median_ms if stock and stock.median_ms else float("nan")
                numbers = [
                    f"{timing.median_ms:.3f}",
                    f"{timing.p99_ms:.3f}",
                    f"{ratio:.2f}",
                    f"{timing.difference:.1e}",
                ]
            out.add_row(*head, timing.setting.name, *numbers)
            head = ["", "", ""]
        out.add_section()
    return out
