"""Random numbers that depend on where they are used and on nothing else.

Philox4x32-10 (Salmon et al. 2011) enciphers the counter (quad, sample, draw, stream) with a 64-bit
seed as its key: four 32-bit words for the four neighbouring elements 4 quad ... 4 quad + 3 of one
sample's flattened tensor. `draw` is the training or the sampling step, `stream` the purpose. There
is no state, so batch size, device, number of processes and resuming cannot change a result.
"""

from __future__ import annotations

import math

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS and Windows: the references serve everything, the kernels lie unused
    triton = tl = None

    def jit(function=None, **_):
        return function or jit


# Streams: what a number is for. A new purpose takes the next number here and its name in
# __init__.py. A number is never changed nor given away: all results that it made would change.
TRAIN_NOISE = 0  # eps of a training step
TRAIN_TIME = 1  # t of a training step
INIT_NOISE = 2  # x_T, or what noises a prior up to its t
STEP_NOISE = 3  # z of a reverse step
DIP_CODE = 4  # input of a DIP; a prior's draws of codes and coefficients; how kernels are turned
DIP_JITTER = 5  # noise on what a fitted network sees, anew in each iteration
DATA_ORDER = 6  # order of the images in an epoch
CORRUPTION = 7  # noise and masks of measurements, and their splits
WEIGHTS = 8  # first weights of a network
HELD_OUT = 9  # eps of a loss on held-out images (studies)
CODE_NOISE = 10  # what is added to a training image's code (11 was its level)

WORD = 0xFFFFFFFF
BLOCK, WARPS = 256, 2  # quads and warps to a program: a lane's four quads share its work on the key


def fused(device) -> bool:
    """Whether the Triton kernels serve this device."""
    return triton is not None and torch.device(device).type == "cuda"


# ------------------------------------------------------------------------------------- torch


def philox_ref(quad, sample, draw, stream, seed):
    """Philox4x32-10: four int64 tensors of exact 32-bit words, of the counters' broadcast shape.

    A product of two words wraps in int64 but keeps its 64 bits, so the high word is a shift. It is
    masked after the exclusive or, which lets the low word stay unmasked until the end. The first
    rounds see [1, Q], [N, 1] and scalars, and only from the third on is there work per counter.
    """
    c0, c1, c2, c3 = quad, sample, draw & WORD, stream
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def _counters(shape, sample, draw, device):
    """(quad [1, Q], sample [N, 1], draw) of a float tensor of `shape`, int64 on `device`."""
    N, Q = shape[0], -(-math.prod(shape[1:]) // 4)
    if not isinstance(sample, torch.Tensor):
        sample = torch.arange(sample, sample + N, device=device)
    assert sample.shape == (N,), f"sample numbers {tuple(sample.shape)} for a batch of {N}"
    quad, draw = torch.arange(Q, device=device), torch.as_tensor(draw, device=device)
    return quad[None], sample[:, None], draw


def _circle(u):
    """(cos 2 pi u, sin 2 pi u) to 4e-7 for u in [0, 1] turns: with x = u - 1/2, (x^2 - 1/16) and
    x (x^2 - 1/4), which hold the zeros, times minimax polynomials in x^2. A GPU fuses products and
    sums, so that beside a zero torch and Triton agree to 1e-6, not to an ulp."""
    x = u - 0.5
    y = x * x
    cos = y * -6.54001 + 25.567091
    cos = cos * y - 58.571854
    cos = cos * y + 81.78964
    cos = cos * y - 59.827274
    cos = cos * y + 16.0
    sin = y * 12.233301 - 38.123196
    sin = sin * y + 67.0439
    sin = sin * y - 64.83468
    sin = sin * y + 25.13273
    return cos * (y - 0.0625), sin * (x * (y - 0.25))


def uniform_ref(shape, seed, sample, draw, stream, device="cpu"):
    """See `uniform`."""
    w = torch.stack(philox_ref(*_counters(shape, sample, draw, device), stream, seed), -1)
    u = (w >> 8).float().mul_(2**-24).flatten(1)  # [N, 4 Q]
    return u[:, : math.prod(shape[1:])].reshape(shape).contiguous()


def normal_ref(shape, seed, sample, draw, stream, device="cpu"):
    """See `normal`."""
    quad, sample, draw = _counters(shape, sample, draw, device)
    N, Q = len(sample), quad.numel()
    z = torch.empty((N, Q, 2, 2), device=device)  # [sample, quad, pair, cos or sin]
    # Blocks stay in the cache, and below the size at which torch wakes a second thread.
    rows = max(1, 2**14 // (Q + 1)) if z.device.type == "cpu" else max(1, N)
    for block, numbers in zip(z.split(rows), sample.split(rows)):
        w0, w1, w2, w3 = philox_ref(quad, numbers, draw, stream, seed)
        u = torch.empty((4, *w0.shape), device=device)  # planar, so that every pass is dense
        for plane, word in zip(u, (w0, w2, w1, w3)):
            plane.copy_(word)
        radius = u[:2].mul_(2**-32).add_(2**-33).log_().mul_(-2).sqrt_()  # [pair, sample, quad]
        cos, sin = _circle(u[2:].mul_(2**-32))
        block[..., 0] = cos.mul_(radius).movedim(0, -1)
        block[..., 1] = sin.mul_(radius).movedim(0, -1)
    return z.flatten(1)[:, : math.prod(shape[1:])].reshape(shape).contiguous()


# ------------------------------------------------------------------------------------ Triton


@jit
def at(x, n):
    """x[n] of a vector on the device, or x + n of a plain integer: a scalar is at(x, 0)."""
    return tl.load(x + n) if x.dtype.is_ptr() else x + n


@jit
def philox(quad, sample, draw, stream, seed):
    """Philox4x32-10: the four uint32 words of each quad. Both halves of a product come from one
    multiplication to 64 bits, half the instructions of `tl.philox`, which multiplies twice."""
    c0, c1 = quad.to(tl.uint32), sample.to(tl.uint32)
    c2, c3 = draw.to(tl.uint32), stream
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


_circle_jit = jit(_circle)


@jit
def _minus_2_log(u):
    """-2 ln u to 2e-7 of its size, for u in (0, 1]: u = 2^e (1 + x) with 1 + x in [0.707, 1.414)
    and e, scaled by 2^23, read off the bits; a minimax polynomial for -2 ln(1 + x) / x. It is a
    third shorter than `tl.log`, which also serves numbers that cannot occur here."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) & -0x800000
    x = (bits - e).to(tl.float32, bitcast=True) - 1.0
    y = x * -0.174447194 + 0.287336946
    y = y * x - 0.299045324
    y = y * x + 0.331247866
    y = y * x - 0.399136662
    y = y * x + 0.500041485
    y = y * x - 0.666683733
    y = y * x + 0.999999762
    return e.to(tl.float32) * (-1.3862943611 * 2.0**-23) - 2.0 * x + x * x * y


@jit
def _box_muller(w0, w1):
    radius = tl.sqrt(_minus_2_log(w0.to(tl.float32) * 2.0**-32 + 2.0**-33))
    cos, sin = _circle_jit(w1.to(tl.float32) * 2.0**-32)
    return radius * cos, radius * sin


@jit
def interleave(a, b, c, d):
    """Four blocks of n numbers, one of each to a quad, as one of [n, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@jit
def normal_quads(quad, sample, draw, stream, seed):
    """The normals of a block of quads of one sample, in registers: float32 [BLOCK, 4]."""
    w0, w1, w2, w3 = philox(quad, sample, draw, stream, seed)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return interleave(z0, z1, z2, z3)


@jit
def place(BLOCK: tl.constexpr):
    """A program's sample number n, its quads [BLOCK] and their elements' positions [BLOCK, 4]."""
    n = tl.program_id(0).to(tl.int64)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return n, quad, quad[:, None] * 4 + tl.arange(0, 4)[None, :]


# This kernel and the next write 4 bytes an element and read nothing.
@jit(do_not_specialize=["seed", "sample", "draw"])
def normal_kernel(z_ptr, seed, sample, draw, stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n, quad, i = place(BLOCK)

    z = normal_quads(quad, at(sample, n), at(draw, 0), stream, seed)

    tl.store(z_ptr + n * numel + i, z, mask=i < numel)


@jit(do_not_specialize=["seed", "sample", "draw"])
def uniform_kernel(u_ptr, seed, sample, draw, stream: tl.constexpr, numel, BLOCK: tl.constexpr):
    n, quad, i = place(BLOCK)

    w0, w1, w2, w3 = philox(quad, at(sample, n), at(draw, 0), stream, seed)
    u = (interleave(w0, w1, w2, w3) >> 8).to(tl.float32) * 2.0**-24

    tl.store(u_ptr + n * numel + i, u, mask=i < numel)


def blocks(numel):
    """How many programs serve a sample of `numel` elements."""
    return triton.cdiv(numel, 4 * BLOCK)


def launch(kernel, tensors, seed, sample, draw, stream):
    """Run a kernel on each sample of tensors[0], [N, ...], and return that tensor. The kernel takes
    the tensors, what names its random numbers (see `normal`), a sample's elements and BLOCK."""
    x = tensors[0]
    numel = math.prod(x.shape[1:])
    with torch.cuda.device_of(x):
        kernel[len(x), blocks(numel)](
            *tensors, seed % 2**64, sample, draw, stream, numel, BLOCK, num_warps=WARPS)
    return x


def normal_triton(shape, seed, sample, draw, stream, device="cuda"):
    """See `normal`."""
    return launch(normal_kernel, [torch.empty(shape, device=device)], seed, sample, draw, stream)


def uniform_triton(shape, seed, sample, draw, stream, device="cuda"):
    """See `uniform`."""
    return launch(uniform_kernel, [torch.empty(shape, device=device)], seed, sample, draw, stream)


# ------------------------------------------------------------------------------------ public


def normal(shape, seed, sample, draw, stream, device="cpu"):
    """z ~ N(0, 1): float32 of `shape`, by Box & Muller (1958) from words 0, 1 and 2, 3 of a quad.

    z = sqrt(-2 ln u) (cos, sin)(2 pi v), u = word 2^-32 + 2^-33 > 0, so that the tail reaches 6.7.
    `sample` holds the N = shape[0] global sample numbers (int64 [N]) or is the first of them;
    `draw` is an integer or an int64 scalar tensor; both count modulo 2^32, `seed` modulo 2^64. A
    pure function of (seed, sample, draw, stream, position), equal on CPU and GPU to 1.3e-6;
    AssertionError if `sample` does not fit.
    """
    return (normal_triton if fused(device) else normal_ref)(
        shape, seed, sample, draw, stream, device)


def uniform(shape, seed, sample, draw, stream, device="cpu"):
    """U[0, 1) as multiples of 2^-24: float32 of `shape`, one word for an element.

    The arguments are those of `normal`, and so are the errors; shape (N,) takes element 0 of each
    sample. A pure function of (seed, sample, draw, stream, position), the same bits on CPU and GPU.
    """
    return (uniform_triton if fused(device) else uniform_ref)(
        shape, seed, sample, draw, stream, device)
