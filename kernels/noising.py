"""Forward noising and its regression loss: the two ends of a training step around the network.

Both draw the same eps from the same counters, so eps is never stored between them.
"""

from __future__ import annotations

import torch

from .rng import TRAIN_NOISE, at, blocks, fused, jit, launch, normal_quads, normal_ref, place, tl


def _pixels_ref(x_0, index):
    """The batch [B, C, H, W] in [-1, 1] as float32, possibly x_0 itself: not to be written to."""
    x = x_0 if index is None else x_0[index]
    return (x * (1 / 127.5)).sub_(1) if x.dtype == torch.uint8 else x.float()


def _columns(table, t):
    """The six coefficients of each sample, [B, 1, 1, 1] each."""
    return table[t][:, :, None, None, None].unbind(1)


def q_sample_ref(x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE, dtype=torch.float32,
                 prior=None):
    """See `q_sample`."""
    signal, noise, *_, kappa = _columns(table, t)
    x = _pixels_ref(x_0, index)
    x = x if prior is None else x + kappa * (prior - x)
    eps = normal_ref(x.shape, seed, sample, draw, stream, x.device)
    return eps.mul_(noise).addcmul_(x, signal).to(dtype)


def noise_loss_ref(out, x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE, prior=None):
    """(loss [B], its gradient by `out`); see `noise_loss`."""
    _, _, target_x0, target_eps, weight, _ = _columns(table, t)
    x = _pixels_ref(x_0, index)
    x = x if prior is None else x - prior
    eps = normal_ref(out.shape, seed, sample, draw, stream, out.device)
    error = eps.mul_(-target_eps).addcmul_(x, target_x0, value=-1).add_(out)
    loss = weight.flatten() * error.square().mean((1, 2, 3))
    return loss, error.mul_(weight * (2 / out[0].numel())).to(out.dtype)


@jit
def _pixels(x_0_ptr, index, n, i, numel):
    """Elements i of image n of the batch, in [-1, 1]."""
    row = n if index is None else tl.load(index + n)
    x = tl.load(x_0_ptr + row * numel + i, mask=i < numel)
    return x.to(tl.float32) * (1 / 127.5) - 1.0 if x.dtype == tl.uint8 else x.to(tl.float32)


# Reads 1 byte an element (4 if x_0 is float32; 4 more of a prior), writes 4 (2 in half precision).
@jit(do_not_specialize=["seed", "sample", "draw"])
def q_sample_kernel(x_t_ptr, x_0_ptr, prior_ptr, index, t_ptr, table_ptr, seed, sample, draw,
                    stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n, quad, i = place(BLOCK)
    table_ptr += tl.load(t_ptr + n) * 6
    signal = tl.load(table_ptr)
    noise = tl.load(table_ptr + 1)
    x = _pixels(x_0_ptr, index, n, i, numel)
    if prior_ptr is not None:
        kappa = tl.load(table_ptr + 5)
        x += kappa * (tl.load(prior_ptr + n * numel + i, mask=i < numel) - x)

    eps = normal_quads(quad, at(sample, n), at(draw, 0), stream, seed)
    x_t = signal * x + noise * eps

    tl.store(x_t_ptr + n * numel + i, x_t, mask=i < numel)


# Reads 4 + 1 bytes an element (2 + 1 in half precision; 4 more of a prior), writes 4 (2). Each
# program leaves the sum of its own errors, to be added in one order and without atomics.
@jit(do_not_specialize=["seed", "sample", "draw"])
def noise_loss_kernel(grad_ptr, loss_ptr, out_ptr, x_0_ptr, prior_ptr, index, t_ptr, table_ptr,
                      seed, sample, draw, stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n, quad, i = place(BLOCK)
    table_ptr += tl.load(t_ptr + n) * 6
    target_x0 = tl.load(table_ptr + 2)
    target_eps = tl.load(table_ptr + 3)
    weight = tl.load(table_ptr + 4) / numel
    x = _pixels(x_0_ptr, index, n, i, numel)
    if prior_ptr is not None:
        x -= tl.load(prior_ptr + n * numel + i, mask=i < numel)
    out = tl.load(out_ptr + n * numel + i, mask=i < numel).to(tl.float32)

    eps = normal_quads(quad, at(sample, n), at(draw, 0), stream, seed)
    error = out - target_x0 * x - target_eps * eps
    loss = weight * tl.sum(tl.where(i < numel, error * error, 0.0))

    tl.store(grad_ptr + n * numel + i, 2 * weight * error, mask=i < numel)
    tl.store(loss_ptr + n * tl.num_programs(1) + tl.program_id(1), loss)


def q_sample_triton(x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE,
                    dtype=torch.float32, prior=None):
    """See `q_sample`."""
    x_t = torch.empty((len(t), *x_0.shape[1:]), dtype=dtype, device=x_0.device)
    tensors = x_t, x_0.contiguous(), prior, index, t, table
    return launch(q_sample_kernel, tensors, seed, sample, draw, stream)


def noise_loss_triton(out, x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE,
                      prior=None):
    """(loss [B], its gradient by `out`); see `noise_loss`."""
    out = out.contiguous()
    gradient = torch.empty_like(out)
    loss = torch.empty(len(out), blocks(out[0].numel()), device=out.device)
    tensors = gradient, loss, out, x_0.contiguous(), prior, index, t, table
    launch(noise_loss_kernel, tensors, seed, sample, draw, stream)
    return loss.sum(1) if loss.shape[1] > 1 else loss[:, 0], gradient


def q_sample(x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE, dtype=torch.float32,
             prior=None):
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (Ho et al. 2020, eq. 4).

    x_t is [B, C, H, W] of `dtype`. x_0 [N, C, H, W] is uint8, scaled to [-1, 1] here, or float in
    [-1, 1]; the batch is its rows `index` (int64 [B]; None for all in order) at the times t (int64
    [B]). `table` is float32 [T, 6]: sqrt(alpha_bar), sqrt(1 - alpha_bar), what `noise_loss` needs,
    and kappa. With a `prior` (float32 [B, C, H, W] in [-1, 1]), x_0 + kappa_t (prior - x_0) takes
    x_0's place: a bridge, which ends at the noised prior where kappa is 1. `seed`, `sample`, `draw`
    and `stream` name eps as in `normal`. AssertionError if shapes or types do not fit.
    """
    _check(x_0, index, t, table, sample, prior)
    return (q_sample_triton if fused(x_0.device) else q_sample_ref)(
        x_0, index, t, table, seed, sample, draw, stream, dtype, prior)


def noise_loss(out, x_0, index, t, table, seed, sample, draw, stream=TRAIN_NOISE, prior=None):
    """L_b = weight_t mean (out - target_x0_t x_0 - target_eps_t eps)^2 over pixels: float32 [B].

    The eps of `q_sample` with the same arguments, drawn again. Columns 2 to 4 of `table` hold
    (target_x0, target_eps, weight): (0, 1, 1) is L_simple (Ho et al. 2020, eq. 14), (1, 0, .)
    predicts x_0, (-sqrt(1 - alpha_bar), sqrt(alpha_bar), .) predicts v. With a `prior`, x_0 - prior
    takes x_0's place. `out` [B, C, H, W] may be half precision; the arithmetic is float32 and the
    gradient, found in the same pass, has out's type. AssertionError if shapes or types do not fit.
    """
    _check(x_0, index, t, table, sample, prior)
    assert out.shape == (len(t), *x_0.shape[1:]), f"out {tuple(out.shape)}, x_0 {tuple(x_0.shape)}"
    return _NoiseLoss.apply(out, x_0, index, t, table, seed, sample, draw, stream, prior)


class _NoiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, *arguments):
        loss_and_gradient = noise_loss_triton if fused(out.device) else noise_loss_ref
        loss, gradient = loss_and_gradient(out, *arguments)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (gradient,) = ctx.saved_tensors
        product = torch.empty_like(gradient)  # keeps the type of `out`, in one pass
        return torch.mul(gradient, g[:, None, None, None], out=product), *[None] * 9


def _check(x_0, index, t, table, sample, prior):
    assert x_0.dim() == 4 and (x_0.dtype == torch.uint8 or x_0.is_floating_point()), x_0.dtype
    assert t.shape == ((len(x_0),) if index is None else index.shape), f"t {tuple(t.shape)}"
    assert table.dim() == 2 and table.shape[1] == 6 and table.dtype == torch.float32, table.shape
    assert prior is None or prior.shape == (len(t), *x_0.shape[1:]), tuple(prior.shape)
    assert prior is None or prior.dtype == torch.float32, prior.dtype
    for tensor in (index, t, table, sample, prior):  # the kernels step through these by one
        assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()
