"""The chains of convolutions of known networks as plain data, which the planner can be tried on without a model.

    python -m benchmarks.chains DIR [NAME...]

writes benchmarks/chains.json anew from the networks DIR/NAME*.onnx (by default all of DIR): by network the maps and
layers of each chain that the rewriter finds, and how often. A layer has what is not the default of `planner.Layer`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ort_fcm.planner import Chain, Layer

PATH = Path(__file__).with_name("chains.json")
_PLAIN = asdict(Layer("pw", 1, 1))


def layers(given: list[dict[str, Any]]) -> tuple[Layer, ...]:
    return tuple(Layer(**layer) for layer in given)


def plain(chain: Chain) -> list[dict[str, Any]]:
    """The layers as JSON has them."""
    need = ("kind", "in_channels", "out_channels")
    return [{k: v for k, v in asdict(part).items() if k in need or v != _PLAIN[k]} for part in chain.layers]


def read(batch: int, dtype: str, path: Path = PATH) -> dict[str, Counter[Chain]]:
    """By network, its chains at a batch and type, and how often each is there."""
    return {
        network: Counter(
            {
                Chain(layers(entry["layers"]), batch, entry["height"], entry["width"], dtype): entry["count"]
                for entry in entries
            }
        )
        for network, entries in json.loads(path.read_text()).items()
    }


def of_model(path: Path) -> Counter[Chain]:
    """The chains of a network at batch 1, without names."""
    import ort_fcm

    plans = ort_fcm.rewrite(path, gpu="H200", batch=1, check=False, constants=True).plans
    return Counter(
        replace(plan.chain, name="", layers=tuple(replace(part, name="", nodes=1) for part in plan.chain.layers))
        for plan in plans
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=[""])
    args = parser.parse_args()
    lines = []
    for path in sorted({file for name in args.names for file in args.directory.glob(f"{name}*.onnx")}):
        entries = [
            json.dumps({"count": n, "height": chain.height, "width": chain.width, "layers": plain(chain)})
            for chain, n in of_model(path).items()
        ]
        name = path.stem.removesuffix("_ts")
        lines.append(f"{json.dumps(name)}: [\n" + ",\n".join(f"  {entry}" for entry in entries) + "\n]")
        print(f"{name}: {len(entries)} chains")
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
