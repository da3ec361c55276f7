"""Fused Convolutional Modules for ONNX Runtime.

Everything is imported on first use, so that `ort_fcm.planner` loads without onnx.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ort_fcm.errors import FcmError

if TYPE_CHECKING:
    import onnx

    from ort_fcm.rewrite.pipeline import RewriteResult

__all__ = ["FcmError", "library_path", "rewrite"]

# In a source checkout the planner lies beside this package; a wheel installs it inside.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "planner").is_dir() and (_HERE.parent / "planner" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))


def rewrite(model: str | Path | onnx.ModelProto, output: str | Path | None = None, **options: Any) -> RewriteResult:
    """Replace chains of convolutions in `model` by fused modules; see `ort_fcm.rewrite.pipeline.rewrite`."""
    from ort_fcm.rewrite.pipeline import rewrite as run

    return run(model, output, **options)


def library_path() -> str:
    """Return the path of the custom-op library, for `SessionOptions.register_custom_ops_library`."""
    from ort_fcm.library import library_path as path

    return str(path())


class _Package(ModuleType):
    """Keeps `ort_fcm.rewrite` the function when the subpackage of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "rewrite" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
