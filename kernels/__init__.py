"""The per-pixel operations of diffusion, each a Triton kernel on CUDA and plain torch elsewhere.

A new one has three names in a file here: NAME_ref in torch, NAME_triton, and NAME, which chooses
and is imported below. Its kernel reads, computes and writes, in this order; a comment above counts
the bytes. It goes into `bench.CASES`, whose machine code the tests inspect, and into the tests'
CASES, which hold NAME_triton against NAME_ref. Random numbers for a new purpose: see `rng`.
"""

from .noising import noise_loss, q_sample
from .posterior import posterior_step
from .rng import (
    CORRUPTION,
    DATA_ORDER,
    DIP_CODE,
    DIP_JITTER,
    HELD_OUT,
    INIT_NOISE,
    STEP_NOISE,
    TRAIN_NOISE,
    TRAIN_TIME,
    WEIGHTS,
    normal,
    uniform,
)

__all__ = [
    "CORRUPTION", "DATA_ORDER", "DIP_CODE", "DIP_JITTER", "HELD_OUT", "INIT_NOISE", "STEP_NOISE",
    "TRAIN_NOISE", "TRAIN_TIME", "WEIGHTS",
    "noise_loss", "normal", "posterior_step", "q_sample", "uniform",
]
