"""One reverse step of any diffusion sampler: seven numbers a step, one pass over the pixels."""

from __future__ import annotations

import torch

from .rng import (
    BLOCK,
    STEP_NOISE,
    WARPS,
    at,
    elements,
    fused,
    jit,
    normal_quads,
    normal_ref,
    tl,
    triton,
)


def posterior_step_ref(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False,
                       value=None, x0_prev=None):
    """See `posterior_step`."""
    a, b, c0, ct, sigma, k, w = coef[step]
    x = x_t.float()
    x0_hat = (a * x).addcmul_(out.float(), b).clamp_(-1, 1)
    change = None if value is None else value - x0_hat
    if x0_prev is not None:
        ahead = x0_hat + k * (x0_hat - x0_prev)
        x0_prev.copy_(x0_hat)
        x0_hat = ahead
    x_s = x0_hat.mul_(c0).addcmul_(x, ct)
    if change is not None:
        x_s.addcmul_(change, w)
    if sigma != 0:  # free to read on a CPU, where this function lives
        x_s.addcmul_(normal_ref(x_t.shape, seed, sample, step, stream, x_t.device), sigma)
    return x_t.copy_(x_s) if inplace else x_s.to(x_t.dtype)


@jit
def _x0_hat(x_t, out, a, b):
    return tl.clamp(a * x_t + b * out, -1.0, 1.0)


@jit
def _mean(x0_hat, x_t, c0, ct):
    return c0 * x0_hat + ct * x_t


# Reads 4 + 4 bytes an element, writes 4 (2 + 2 and 2 in half precision); a restoration adds 4 to
# read, the second order 4 to read and 4 to write; 44.9 instructions on sm_90 need 48 % of the time
# that an H200's memory needs. The step number stays on the device, so that one graph can hold a
# whole sampling step and be replayed.
@jit(do_not_specialize=["step", "seed", "sample"])
def posterior_step_kernel(x_s_ptr, x_t_ptr, out_ptr, value_ptr, x0_prev_ptr, coef_ptr, step,
                          seed, sample, stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    step = at(step, 0)
    coef_ptr += step * 7
    a = tl.load(coef_ptr)
    b = tl.load(coef_ptr + 1)
    c0 = tl.load(coef_ptr + 2)
    ct = tl.load(coef_ptr + 3)
    sigma = tl.load(coef_ptr + 4)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = elements(quad)
    there, first = i < numel, n * numel
    x_t = tl.load(x_t_ptr + first + i, mask=there).to(tl.float32)
    out = tl.load(out_ptr + first + i, mask=there).to(tl.float32)

    x0_hat = _x0_hat(x_t, out, a, b)
    if value_ptr is not None:
        value = tl.load(value_ptr + first + i, mask=there)
        restored = tl.load(coef_ptr + 6) * (value - x0_hat)
    if x0_prev_ptr is not None:
        change = x0_hat - tl.load(x0_prev_ptr + first + i, mask=there)
        tl.store(x0_prev_ptr + first + i, x0_hat, mask=there)
        x0_hat += tl.load(coef_ptr + 5) * change
    x_s = _mean(x0_hat, x_t, c0, ct)
    if value_ptr is not None:
        x_s += restored
    if sigma != 0:  # the same for every lane: a deterministic step pays for no random numbers
        x_s += sigma * normal_quads(quad, at(sample, n), step, stream, seed)

    tl.store(x_s_ptr + first + i, x_s, mask=there)


def posterior_step_triton(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False,
                          value=None, x0_prev=None):
    """See `posterior_step`."""
    x_s = x_t if inplace else torch.empty_like(x_t)
    numel = x_t[0].numel()
    with torch.cuda.device_of(x_t):
        posterior_step_kernel[len(x_t), triton.cdiv(numel, 4 * BLOCK)](
            x_s, x_t, out.contiguous(), value, x0_prev, coef, step, seed % 2**64, sample,
            stream, numel, BLOCK, num_warps=WARPS)
    return x_s


def posterior_step(x_t, out, coef, step, seed, sample, stream=STEP_NOISE, inplace=False,
                   value=None, x0_prev=None):
    """x_s ~ N(c0 x0_hat + ct x_t, sigma^2 I), x0_hat = clip(a x_t + b out, -1, 1): [B, C, H, W].

    DDIM's step (Song et al. 2021, eq. 12) with eps_hat eliminated; with eta = 1 and s = t - 1 it is
    the posterior of Ho et al. 2020, eq. 6-7. Row `step` of `coef`, float32 [S, 7] on the device, is
    (a, b, c0, ct, sigma, k, w), and `step`, an integer or an int64 scalar tensor, is also the draw
    number of z = `normal`(x_t.shape, seed, sample, step, stream), which is not drawn where
    sigma = 0. `inplace` writes x_s over x_t.

    Restoration: `value` (float32), which is x0_hat made consistent with what was measured, takes
    x0_hat's place while eps_hat stays the network's (Wang et al. 2023, DDNM): x_s gets
    w (value - x0_hat), w = sqrt(ab_s). Second order: `x0_prev` (float32, finite) holds the x0_hat
    of the step before and is overwritten with this one's, and x0_hat + k (x0_hat - x0_prev) takes
    its place in x_s (Lu et al. 2022, DPM-Solver++(2M)). AssertionError if a shape or a type does
    not fit, or if a tensor other than `out` is not contiguous.
    """
    assert x_t.shape == out.shape, f"x_t {tuple(x_t.shape)}, out {tuple(out.shape)}"
    assert coef.is_contiguous() and coef.shape[1:] == (7,), coef.shape
    assert isinstance(sample, int) or sample.is_contiguous()
    for x, dtype in (x_t, x_t.dtype), (value, torch.float32), (x0_prev, torch.float32):
        assert x is None or x.shape == x_t.shape and x.dtype == dtype and x.is_contiguous()
    return (posterior_step_triton if fused(x_t) else posterior_step_ref)(
        x_t, out, coef, step, seed, sample, stream, inplace, value, x0_prev)
