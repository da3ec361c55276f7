"""What registering the library changes, and which runtimes it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from ort_fcm import library
from ort_fcm.errors import FcmError
from tests.library.modules import Module, Stage, fused_model, run, with_weights


def test_kernel_goes_before_function() -> None:
    """A function of the op's name runs without the library, and only then: its body here is another computation."""
    module = with_weights(Module([Stage("pw", (8, 8), bias=False)], (3, 4)), np.random.default_rng(0))
    model = fused_model(module)
    body = [helper.make_node("Neg", ["X"], ["Y"])]
    opset = [helper.make_opsetid("", 20)]
    attributes = [a.name for a in model.graph.node[0].attribute]
    model.functions.append(
        helper.make_function("ort_fcm", "FusedConvModule", ["X", "W"], ["Y"], body, opset, attributes)
    )
    x = np.random.default_rng(1).standard_normal(module.x_shape).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"X": x}, library=False), -x)
    expected = x @ module.weights["w1"][:, :, 0, 0].T
    np.testing.assert_allclose(run(model, {"X": x}, library=True), expected, rtol=1e-5, atol=1e-5)


_FAKE_RUNTIME = """
import ctypes, sys
STATUS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
messages = []
create_status = STATUS(lambda code, message: messages.append(message.decode()) or 1)
table = (ctypes.c_void_p * 400)()
table[0] = ctypes.cast(create_status, ctypes.c_void_p)
GET = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)
text = ctypes.create_string_buffer(sys.argv[2].encode())
get, version = GET(lambda number: ctypes.addressof(table)), VERSION(lambda: ctypes.addressof(text))
base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p))
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
register.argtypes, register.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
assert register(None, ctypes.addressof(base)), "a status was expected"
print(messages[0])
"""


@pytest.mark.parametrize("version", ["1.17.3", "1.26.9", "0.9"])
def test_older_runtimes_are_refused(version: str) -> None:
    """In a process of its own, as a runtime made of the few functions that a refusal needs."""
    command = [sys.executable, "-c", _FAKE_RUNTIME, str(library.library_path()), version]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ort_fcm needs ONNX Runtime 1.27 or later; this is {version}"


def test_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "libort_fcm.so")
    with pytest.raises(FcmError, match=r"libort_fcm\.so: not found; build it with `make`"):
        library.library_path()


def test_exports_nothing_but_its_own_names() -> None:
    """So that the C++ runtime inside cannot stand in for that of another library."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.library_path())], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert "RegisterCustomOps" in names
    assert all(name == "RegisterCustomOps" or name.startswith("ort_fcm_") for name in names)
