"""FusePlanner: which layers of a chain of convolutions to fuse, into which variant, with which tile, for a GPU.

    from planner import Chain, Layer, gpu, plan_chain
    chain = Chain((Layer("pw", 32, 192, activation="clip"), Layer("dw", 192, 192, (3, 3), pads=(1, 1, 1, 1)),
                   Layer("pw", 192, 32, residual=True)), batch=1, height=28, width=28, dtype="float16")
    plan = plan_chain(chain, gpu("H200"))

Plain data in, plain data out, the standard library only. docs/planner.md derives the cost model.
"""

from __future__ import annotations

from .chain import Chain, Layer, PlannerError, Tile
from .cost import PRIORS, Priors
from .gpus import GPUS, Gpu, gpu
from .plan import Module, Plan, Skip, candidates, folds_mean, module_of, plan_chain

__all__ = [
    "GPUS", "PRIORS", "Chain", "Gpu", "Layer", "Module", "Plan", "PlannerError", "Priors", "Skip", "Tile",
    "candidates", "folds_mean", "gpu", "module_of", "plan_chain",
]  # fmt: skip
