"""One reverse step of any diffusion sampler: five numbers a step, one pass over the pixels."""

from __future__ import annotations

import torch

from .rng import (
    BLOCK,
    STEP_NOISE,
    at,
    elements,
    fused,
    jit,
    normal_quads,
    normal_ref,
    tl,
    triton,
)


def posterior_step_ref(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False):
    """See `posterior_step`."""
    a, b, c0, ct, sigma = coef[step]
    x = x_t.float()
    x_s = (a * x).addcmul_(out.float(), b).clamp_(-1, 1).mul_(c0).addcmul_(x, ct)
    if sigma != 0:  # free to read on a CPU, where this function lives
        x_s.addcmul_(normal_ref(x_t.shape, seed, sample, step, stream, x_t.device), sigma)
    return x_t.copy_(x_s) if inplace else x_s.to(x_t.dtype)


@jit
def _x0_hat(x_t, out, a, b):
    return tl.clamp(a * x_t + b * out, -1.0, 1.0)


@jit
def _mean(x0_hat, x_t, c0, ct):
    return c0 * x0_hat + ct * x_t


# Reads 4 + 4 bytes an element, writes 4 (2 + 2 and 2 in half precision). The step number stays on
# the device, so that a whole sampling loop can be captured in one graph.
@jit(do_not_specialize=["step", "seed", "sample"])
def posterior_step_kernel(x_s_ptr, x_t_ptr, out_ptr, coef_ptr, step, seed, sample,
                          stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    step = at(step, 0)
    coef_ptr += step * 5
    a = tl.load(coef_ptr)
    b = tl.load(coef_ptr + 1)
    c0 = tl.load(coef_ptr + 2)
    ct = tl.load(coef_ptr + 3)
    sigma = tl.load(coef_ptr + 4)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = elements(quad)
    x_t = tl.load(x_t_ptr + n * numel + i, mask=i < numel).to(tl.float32)
    out = tl.load(out_ptr + n * numel + i, mask=i < numel).to(tl.float32)

    x_s = _mean(_x0_hat(x_t, out, a, b), x_t, c0, ct)
    if sigma != 0:  # the same for every lane: a deterministic step pays for no random numbers
        x_s += sigma * normal_quads(quad, at(sample, n), step, stream, seed)

    tl.store(x_s_ptr + n * numel + i, x_s, mask=i < numel)


def posterior_step_triton(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False):
    """See `posterior_step`."""
    x_s = x_t if inplace else torch.empty_like(x_t)
    numel = x_t[0].numel()
    with torch.cuda.device_of(x_t):
        posterior_step_kernel[len(x_t), triton.cdiv(numel, 4 * BLOCK)](
            x_s, x_t, out.contiguous(), coef, step, seed % 2**64, sample, stream, numel, BLOCK)
    return x_s


def posterior_step(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False):
    """x_s ~ N(c0 x0_hat + ct x_t, sigma^2 I), x0_hat = clip(a x_t + b out, -1, 1): [B, C, H, W].

    DDIM's step (Song et al. 2021, eq. 12) with eps_hat eliminated; with eta = 1 and s = t - 1 it is
    the posterior of Ho et al. 2020, eq. 6-7. Row `step` of `coef`, float32 [S, 5] on the device, is
    (a, b, c0, ct, sigma), and `step`, an integer or an int64 scalar tensor, is also the draw number
    of z = `normal`(x_t.shape, seed, sample, step, stream), which is not drawn where sigma = 0.
    `inplace` writes x_s over x_t. AssertionError if shapes do not fit or x_t is not contiguous.
    """
    assert x_t.shape == out.shape, f"x_t {tuple(x_t.shape)}, out {tuple(out.shape)}"
    assert x_t.is_contiguous() and coef.is_contiguous() and coef.shape[1:] == (5,), coef.shape
    assert isinstance(sample, int) or sample.is_contiguous()
    return (posterior_step_triton if fused(x_t) else posterior_step_ref)(
        x_t, out, coef, step, seed, sample, stream, inplace)
