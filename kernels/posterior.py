"""One reverse step of any diffusion sampler: seven numbers a step, one pass over the pixels."""

from __future__ import annotations

import torch

from .rng import STEP_NOISE, at, fused, jit, launch, normal_quads, normal_ref, place, tl


def posterior_step_ref(x_t, out, table, step, seed, sample, stream=STEP_NOISE, inplace=False,
                       x0_prev=None, prior=None):
    """See `posterior_step`."""
    a, b, c0, ct, sigma, k, cp = table[step]
    x = x_t.float()
    x0_hat = (a * x).addcmul_(out.float(), b)
    x0_hat = (x0_hat if prior is None else x0_hat.add_(prior)).clamp_(-1, 1)
    if x0_prev is not None:
        ahead = x0_hat + k * (x0_hat - x0_prev)
        x0_prev.copy_(x0_hat)
        x0_hat = ahead
    x_s = x0_hat.mul_(c0).addcmul_(x, ct)
    x_s = x_s if prior is None else x_s.addcmul_(prior, cp)
    if sigma != 0:  # free to read on a CPU, where this function lives
        x_s.addcmul_(normal_ref(x_t.shape, seed, sample, step, stream, x_t.device), sigma)
    return x_t.copy_(x_s) if inplace else x_s.to(x_t.dtype)


# Reads 4 + 4 bytes an element, writes 4 (2 + 2 and 2 in half precision); the second order adds 4 to
# read and 4 to write, a prior 4 to read. The step number stays on the device, so that one graph can
# hold a whole sampling step and be replayed.
@jit(do_not_specialize=["seed", "sample", "step"])
def posterior_step_kernel(x_s_ptr, x_t_ptr, out_ptr, x0_prev_ptr, prior_ptr, table_ptr, seed,
                          sample, step, stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n, quad, i = place(BLOCK)
    step = at(step, 0)
    table_ptr += step * 7
    a = tl.load(table_ptr)
    b = tl.load(table_ptr + 1)
    c0 = tl.load(table_ptr + 2)
    ct = tl.load(table_ptr + 3)
    sigma = tl.load(table_ptr + 4)
    there, first = i < numel, n * numel
    x_t = tl.load(x_t_ptr + first + i, mask=there).to(tl.float32)
    out = tl.load(out_ptr + first + i, mask=there).to(tl.float32)

    x0_hat = a * x_t + b * out
    if prior_ptr is not None:
        prior = tl.load(prior_ptr + first + i, mask=there)
        x0_hat += prior
    x0_hat = tl.clamp(x0_hat, -1.0, 1.0, tl.PropagateNan.ALL)  # as torch does
    if x0_prev_ptr is not None:
        change = x0_hat - tl.load(x0_prev_ptr + first + i, mask=there)
        tl.store(x0_prev_ptr + first + i, x0_hat, mask=there)
        x0_hat += tl.load(table_ptr + 5) * change
    x_s = c0 * x0_hat + ct * x_t
    if prior_ptr is not None:
        x_s += tl.load(table_ptr + 6) * prior
    if sigma != 0:  # the same for every lane: a deterministic step pays for no random numbers
        x_s += sigma * normal_quads(quad, at(sample, n), step, stream, seed)

    tl.store(x_s_ptr + first + i, x_s, mask=there)


def posterior_step_triton(x_t, out, table, step, seed, sample, stream=STEP_NOISE, inplace=False,
                          x0_prev=None, prior=None):
    """See `posterior_step`."""
    x_s = x_t if inplace else torch.empty_like(x_t)
    tensors = x_s, x_t, out.contiguous(), x0_prev, prior, table
    return launch(posterior_step_kernel, tensors, seed, sample, step, stream)


def posterior_step(x_t, out, table, step, seed, sample, stream=STEP_NOISE, inplace=False,
                   x0_prev=None, prior=None):
    """x_s ~ N(c0 x0_hat + ct x_t, sigma^2 I), x0_hat = clip(a x_t + b out, -1, 1): [B, C, H, W].

    DDIM's step (Song et al. 2021, eq. 12) with eps_hat eliminated; with eta = 1 and s = t - 1 it is
    the posterior of Ho et al. 2020, eq. 6-7. `table` is float32 [S, 7] on the device; its row
    `step`, an integer or an int64 scalar tensor, is (a, b, c0, ct, sigma, k, cp). `step` is also
    the draw number of z = `normal`(x_t.shape, seed, sample, step, stream), which is not drawn where
    sigma = 0. `inplace` writes x_s over x_t.

    Bridge: with a `prior` (float32 [B, C, H, W]), x0_hat = clip(prior + a x_t + b out, -1, 1), and
    cp prior is added to x_s.

    Second order: `x0_prev` (float32, finite) holds the x0_hat of the step before and is overwritten
    with this one's, and x0_hat + k (x0_hat - x0_prev) takes its place in x_s (Lu et al. 2022,
    DPM-Solver++(2M)). x_s is linear in x0_hat, so what corrects x0_hat can be added to x_s later.
    AssertionError if a shape or type does not fit or a tensor other than `out` is not contiguous.
    """
    assert x_t.shape == out.shape, f"x_t {tuple(x_t.shape)}, out {tuple(out.shape)}"
    assert table.dim() == 2 and table.shape[1] == 7 and table.dtype == torch.float32, table.shape
    for tensor in (x0_prev, prior):
        assert tensor is None or tensor.shape == x_t.shape and tensor.dtype == torch.float32
    for tensor in (x_t, x0_prev, prior, table, sample, step):  # the kernel steps by one
        assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()
    return (posterior_step_triton if fused(x_t.device) else posterior_step_ref)(
        x_t, out, table, step, seed, sample, stream, inplace, x0_prev, prior)
