"""The command line. Exit codes: 0 done, 1 the numbers disagree or a check failed, 2 bad input or usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import print as show
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ort_fcm.errors import FcmError

app = typer.Typer(
    help="Fused convolutional modules for ONNX Runtime.", add_completion=False, pretty_exceptions_enable=False
)

Input = Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model to read.")]
GpuName = Annotated[str | None, typer.Option("--gpu", help="GPU to plan for; by default the one present, or H200.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch to plan a model with a dynamic batch for.")]
Float16 = Annotated[bool, typer.Option("--float16", help="Convert to float16; inputs and outputs keep their type.")]
Constants = Annotated[
    bool, typer.Option("--constants", help="Initializers that are also graph inputs are never overridden.")
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the report here, as JSON.")]


@app.command()
def rewrite(
    model: Input,
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where to write the rewritten model.")],
    gpu: GpuName = None,
    batch: Batch = None,
    float16: Float16 = False,
    constants: Constants = False,
    check: Annotated[bool, typer.Option(help="Compare with the original on the CPU.")] = True,
    tune: Annotated[bool, typer.Option("--tune", help="Choose by times measured on the GPU present.")] = False,
    tune_seconds: Annotated[float, typer.Option(min=1, help="About how long to measure.")] = 60.0,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Use what `plan --json` wrote, perhaps edited.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Replace chains of convolutions by fused modules."""
    from ort_fcm.rewrite.pipeline import rewrite as run

    _check_json(json_file)
    result = run(
        model,
        output,
        gpu=gpu,
        batch=batch,
        float16=float16,
        constants=constants,
        plan=plan or (),
        check=check,
        tune=tune,
        tune_seconds=tune_seconds,
    )
    result.report.print()
    _write_json(json_file, result.report.to_dict())


@app.command()
def plan(
    model: Input,
    gpu: GpuName = None,
    batch: Batch = None,
    float16: Float16 = False,
    constants: Constants = False,
    json_file: Json = None,
) -> None:
    """Say what a rewrite would fuse, and write no model; --json also holds the plans, for rewrite --plan."""
    from ort_fcm.rewrite.pipeline import rewrite as run

    _check_json(json_file)
    result = run(model, gpu=gpu, batch=batch, float16=float16, constants=constants, check=False)
    result.report.print()
    _write_json(json_file, {**result.report.to_dict(), "plans": [item.to_dict() for item in result.plans]})


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.onnx", help="The reference.")],
    b: Annotated[Path, typer.Argument(metavar="B.onnx", help="The model to judge.")],
    atol: Annotated[float | None, typer.Option(min=0, help="Absolute tolerance.")] = None,
    rtol: Annotated[float | None, typer.Option(min=0, help="Tolerance relative to an output's largest value.")] = None,
    json_file: Json = None,
) -> None:
    """Run two models on the same structured inputs on the CPU, and compare their outputs."""
    from ort_fcm.compare import compare as run
    from ort_fcm.rewrite.load import load

    _check_json(json_file)
    for path in (a, b):
        load(path)  # for its messages
    result = run(a, b, atol, rtol)
    table = Table("output", "largest error", "relative", "by norm", "")
    for item in result.outputs:
        word = ("passed" if item.passed else "FAILED") + (", constant" if item.constant else "")
        errors = (f"{error:.3g}" for error in (item.max_abs_error, item.max_rel_error, item.norm_error))
        table.add_row(escape(item.name), *errors, word)
    show(table)
    _write_json(json_file, result.to_dict())
    show("PASSED" if result.passed else "FAILED")
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def bench(
    model: Input,
    batch: Annotated[str | None, typer.Option(metavar="N,N,...", help="Batches to time.")] = None,
    gpu: GpuName = None,
    provider: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    json_file: Json = None,
) -> None:
    """Time the rewritten model against stock ONNX Runtime on the GPU."""
    from ort_fcm import bench as benchmark

    _check_json(json_file)
    try:
        batches = [int(item) for item in batch.split(",")] if batch else None
    except ValueError:
        raise FcmError(f"--batch {batch}: not numbers separated by commas") from None
    results = benchmark.bench(model, batches, gpu=gpu, provider=provider, json=json_file)
    Console().print(benchmark.table(results))
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


@app.command()
def doctor() -> None:
    """Look for everything that a rewritten model needs to run."""
    from ort_fcm.doctor import doctor as examine

    raise typer.Exit(examine())


def _check_json(path: Path | None) -> None:
    from ort_fcm.rewrite.load import check_writable

    if path is not None:
        check_writable(path)


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(data, indent=2) + "\n")
        except OSError as error:
            raise FcmError(f"cannot write {path}: {error.strerror}") from None


def main() -> None:
    """The entry point: one line on standard error for whatever the caller can mend."""
    try:
        code = app(standalone_mode=False)
    except FcmError as error:
        code = _fail(str(error), error.exit_code)
    except typer.Abort:
        code = 130
    except Exception as error:  # usage errors of typer's, of whichever base it has
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"ort-fcm: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
