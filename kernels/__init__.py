"""The per-pixel operations of diffusion, each a Triton kernel on CUDA and plain torch elsewhere.

A new one has three names: NAME_ref in torch, NAME_triton, and NAME, which chooses and is imported
below. A comment above its kernel counts the bytes. It goes into `bench.CASES`, whose machine code
the tests inspect, and into the tests' CASES. Random numbers for a new purpose: see `rng`.
"""

from .noising import noise_loss, q_sample
from .posterior import posterior_step
from .rng import (
    CODE_NOISE,
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
    "CODE_NOISE", "CORRUPTION", "DATA_ORDER", "DIP_CODE", "DIP_JITTER", "HELD_OUT",
    "INIT_NOISE", "STEP_NOISE", "TRAIN_NOISE", "TRAIN_TIME", "WEIGHTS", "noise_loss", "normal",
    "posterior_step", "q_sample", "uniform",
]
