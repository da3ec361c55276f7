"""Runs a rewritten network once between the profiler's start and stop, for ncu to time each of its kernels.

    ncu --profile-from-start off --clock-control none --csv \\
        --metrics gpu__time_duration.sum,dram__bytes.sum,lts__t_bytes.sum \\
        python -m benchmarks.profile --models DIR --network mobilenetv2_100 --dtype float16 --batch 128

ncu flushes caches before each kernel, so the times add up to more than a run takes; shares are what counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort

import ort_fcm
from benchmarks.models import network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a directory with NAME*.onnx")
    parser.add_argument("--network", default="mobilenetv2")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    import cupy

    model = ort_fcm.rewrite(network(args.network, args.dtype, args.batch, args.models), check=False).model
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(ort_fcm.library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
    (entry,) = session.get_inputs()
    x = cupy.random.standard_normal(entry.shape, cupy.float32).astype(args.dtype)
    binding = session.io_binding()
    binding.bind_input(entry.name, "cuda", 0, np.dtype(args.dtype), entry.shape, x.data.ptr)
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda")
    for _ in range(3):
        session.run_with_iobinding(binding)
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.start()
    session.run_with_iobinding(binding)
    cupy.cuda.Device().synchronize()
    cupy.cuda.profiler.stop()


if __name__ == "__main__":
    main()
