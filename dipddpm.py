"""Deep Image Prior, DDPM and two ways of combining them. Its contents, from top to bottom:

 1 forward    x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps                   Ho et al. 2020, eq. 4
 2 reverse    x_s = c0 x0_hat + ct x_t + sigma z                          Song et al. 2021, eq. 12
 3 U-Net      out = net(x_t, t)
 4 training   min E w_t |net(x_t, t) - target|^2, target = v (eps, x_0)   Ho et al. 2020, eq. 14
 5 sampling   steps of section 2, nfe of them, from x_T ~ N(0, 1)         Lu et al. 2022, 2M
 6 DIP        min_theta |A f_theta(z) - y|^2, stopped early               Ulyanov et al. 2018
 7 codes      min_theta,c sum_i |g_theta(c_i) - x_i|^2                    Bojanowski et al. 2018
 8 method 1   a DIP's output p, noised as in section 1 to t_start, is where section 5 begins; the
              bridge: x_t = sqrt(ab_t) (x_0 + kappa_t (p - x_0)) + sqrt(1 - ab_t) eps ends there
 9 method 2   y+ = y + alpha sigma e is fitted, y- = y - sigma e / alpha tells when to stop;
              of a photo a network learns from y+ under fresh noise      Pang et al. 2021
10 the edge   command line, folders, checkpoints, processes, devices: to be skipped at first

    python dipddpm.py --mode prior --epochs 30    train a DDPM, start it from noise and from DIPs
    python dipddpm.py --mode guide --sigma 0.2    DIPs that know when to stop, and DIPs that do not

Notation    x_0 image, x_t noised image, eps noise, alpha_bar_t (ab) = prod (1 - beta), T steps,
            z and theta a DIP's input and weights; *_hat is predicted.
Noise       is a function of (seed, the image's number, draw, stream), whatever shares its batch:
            `numbers` int64 [n] are the images', draw is a step, a stream is one use.
Index       code index t = 0 ... T-1 is the papers' t + 1. What counts steps of noise is a tau: from
            T (or t_start) to 0, the clean image; the network is asked at t = tau - 1.
Ranges      x_0 is in [-1, 1] inside the diffusion, images are in [0, 1] inside DIP and every
            measure; uint8 images are `pixels`.
"""
import argparse
import contextlib
import copy
import ctypes
import errno
import functools
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before a user's own data.py or eval.py
import data
import eval as measure
import kernels


def flag(default, group, help, **limits):
    """A setting that is a flag, too. Limits: choices, low, high, of (what a list holds)."""
    return field(default=default, metadata=dict(group=group, help=help, **limits))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. None: `resolve` fills it in, from the mode and the images' size."""

    mode: str = flag(MISSING, "run", "what to do",
                     choices=("dip", "ddpm", "prior", "guide", "sample"))
    data: str = flag("auto", "run", "auto, mnist, fashion, cifar10, stl10, digits, or a path: an "
                     "image, or a folder of images or of IDX files")
    data_dir: str = flag(None, "run", "where data sets live (or DIPDDPM_DATA)")
    size: int = flag(None, "run", "resize each image: its shorter side to N pixels", low=7)
    crop: int = flag(None, "run", "then take its middle N x N pixels", low=7)
    seed: int = flag(0, "run", "seed of every random number", low=0)
    device: str = flag("auto", "run", "cpu, cuda, cuda:1, ...")
    precision: str = flag("auto", "run", "networks' arithmetic; auto: bf16 where the hardware has "
                          "matrix units (photos: any) for it", choices=("auto", "fp32", "bf16"))
    out: str = flag(None, "run", "folder for results (a new one in runs/, or --resume's)")
    resume: str = flag(None, "run", "run to continue; with --out, its network is used and it stays")
    epochs: int = flag(30, "training", "passes over the training images", low=1)
    limit: int = flag(None, "training", "use only the first N training images", low=1)
    batch: int = flag(64, "training", "images in a training step", low=1)
    lr: float = flag(2e-3, "training", "peak learning rate (of Muon 2.5 times as much)", low=1e-9)
    timesteps: int = flag(1000, "training", "T, the steps of noise", low=2, high=100_000)
    schedule: str = flag("cosine", "training", "noise schedule", choices=("linear", "cosine"))
    predict: str = flag("v", "training", "what the network predicts", choices=("eps", "v", "x0"))
    width: int = flag(32, "training", "channels of the U-Net's upper level", low=8)
    t_start: tuple = flag(None, "sampling", "steps of noise on a prior (0.6 T), a list", of=int,
                         low=1)
    nfe: tuple = flag((3, 5, 10, 20, 50), "sampling", "network evaluations, a list", of=int, low=1)
    eta: tuple = flag((0.0,), "sampling", "0: DPM-Solver++(2M), 1: DDPM's own sampler, a list",
                      of=float, low=0, high=1)
    samples: int = flag(None, "sampling", "images made (1000; sample: 64) or fitted (16)", low=1)
    dip_source: tuple = flag(("codes", "bridge"), "DIP", "priors of --mode prior: codes, one "
                             "decoder for all images, new ones from new codes; bridge, a network "
                             "that is trained to go on from these. A list",
                             of=str, choices=("codes", "bridge"))
    dip_width: int = flag(None, "DIP", "channels of an image's DIP (16; above 64 pixels on a GPU: "
                          "128)", low=1)
    dip_iters: int = flag(None, "DIP", "most iterations of an image's DIP (studies: 60; dip, "
                          "guide: 1000, above 64 pixels 3000) or denoiser (500; large ones 1000)",
                          low=1)
    pictures: str = flag(None, "dip, guide", "test: clean ones; --task and --sigma are done to "
                         "them, and results compared with them. own: yours, nothing is added or "
                         "compared (default for one image in --mode dip)", choices=("test", "own"))
    task: str = flag("denoise", "dip, guide", "what to undo: noise alone; missing pixels (half of "
                     "a test picture's, or a centre box); a half or a quarter of the size",
                     choices=("denoise", "inpaint", "inpaint-box", "sr", "sr-4"))
    mask: str = flag(None, "dip, guide", "of an own picture to inpaint: white is given, else gone")
    sigma: float = flag(None, "dip, guide", "noise, where white is 1: added to test pictures (0.1 "
                        "to denoise, else 0), or the level in own ones (estimated, else 0)", low=0)
    minutes: float = flag(None, "dip, guide", "end each fit after so long (10 above 64 pixels on a "
                          "CPU, unless --dip-iters is given or a photo denoised)", low=0.01)
    replicas: int = flag(None, "dip, guide", "networks for each image (4; dip of a noisy photo: 2)",
                         low=1)
    # settings without a flag
    order: int = 2  # of the sampler where eta is 0
    arch: str = "skip"  # a DIP's network
    decoder_width: int = 32  # channels of the codes' decoder
    bridge_start: int = None  # steps of noise at a bridge's end (0.6 T)
    dip_lr: float = None  # rate of an image's DIP: 0.01; dip, guide up to 64 pixels: 0.05
    muon: bool = None  # Muon fits an image's DIP: dip, guide above 64 pixels. Digits want Adam
    dip_group: int = None  # DIPs that are fitted together: 64; dip, guide above 64 pixels: 1
    window: float = 0.95  # decay of the average of a DIP's outputs
    alpha: float = 0.35  # noise that is added to the half that is fitted, in sigma
    patience: int = None  # iterations without a lower risk that end a fit: 50, above 64 pixels 100
    code_epochs: int = 3  # the decoder's passes over the training images


# ================================================================== 1 forward


def linear_schedule(T):
    """beta from 1e-4 to 0.02 over T = 1000 (Ho et al. 2020, section 4). Other T keep the same total
    noise by scaling beta with 1000 / T."""
    scale = 1000 / T
    beta = torch.linspace(1e-4 * scale, 0.02 * scale, T, dtype=torch.float64).clamp(max=0.999)
    return Schedule(torch.cumprod(1 - beta, 0))


def cosine_schedule(T):
    """ab_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + 0.008) / 1.008), beta clipped at 0.999 (Nichol &
    Dhariwal 2021, eq. 17)."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos(math.pi / 2 * (t / T + 0.008) / 1.008) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return Schedule(torch.cumprod(1 - beta, 0))


class Schedule(NamedTuple):
    """alpha_bar: float64 [T], the share of the image's variance that is left after t + 1 steps."""

    alpha_bar: torch.Tensor

    def at(self, tau):
        """alpha_bar after tau steps, float64; tau = 0 is the clean image."""
        return 1.0 if tau == 0 else self.alpha_bar[tau - 1].item()


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}


def schedule_of(cfg):
    return SCHEDULES[cfg.schedule](cfg.timesteps)


# What a network can be asked for: target = p x_0 + q eps. (p, q) from signal = sqrt(ab) and noise =
# sqrt(1 - ab): eps (Ho et al. 2020, eq. 12), v (Salimans & Ho 2022) or x_0 itself.
PREDICTIONS = {"eps": lambda signal, noise: (0 * signal, 1 + 0 * noise),
               "v": lambda signal, noise: (-noise, signal),
               "x0": lambda signal, noise: (1 + 0 * signal, 0 * noise)}
GAMMA = 5.0


def prediction(predict, ab):
    """The target's (p, q), its inverse (a, b) in x_0 = a x_t + b target, and the min-SNR weight of
    its squared error (Hang et al. 2023), each of alpha_bar `ab`. An error of the target is b times
    as large in x_0, where the weight is the signal-to-noise ratio, up to gamma = 5: else what is
    almost clean, and has little left to decide, would outvote the rest."""
    signal, noise = ab**0.5, (1 - ab) ** 0.5
    p, q = PREDICTIONS[predict](signal, noise)
    D = q * signal - p * noise  # x_t = signal x_0 + noise eps and the target, solved for x_0
    a, b = q / D, -noise / D
    return (p, q), (a, b), (ab / (1 - ab)).clamp(max=GAMMA) * b**2


RESIDUAL = 1 / 4  # about the size of x_0 - prior, in which a bridge's network gives it


def kappa_of(ab, ab_end):
    """The prior's share in the mean of a bridge, of alpha_bar where it is and where it ends: the
    ratio of the signal-to-noise ratios, from 0 at the clean image to 1."""
    return ab_end / (1 - ab_end) * (1 - ab) / ab


def reached(ab, ab_end):
    """How much of x_0 - prior a bridge's x0_hat shows, of alpha_bar where it is and where it ends,
    from 0 there to 1 at the clean image, where x_0 - prior ~ N(0, RESIDUAL^2): the square root of
    the signal's share in the variance of x_t."""
    signal = math.sqrt(ab) * (1 - kappa_of(ab, ab_end)) * RESIDUAL
    return signal / math.hypot(signal, math.sqrt(1 - ab))


def forward_table(cfg, t_start=None):
    """What training needs at each t: float32 [T, 6] with columns (signal, noise, p, q, weight,
    kappa), in x_t = signal x_0 + noise eps (Ho et al. 2020, eq. 4) and
    loss = weight (out - (p x_0 + q eps))^2. Combined in float64, cast last.

    With t_start, of a bridge, float32 [t_start, 6]: x_0 + kappa (prior - x_0) takes x_0's place in
    x_t, and the target is (x_0 - prior) / RESIDUAL. This is the same process, given that it ends at
    signal prior + noise eps' (Zhou et al. 2024, DDBM), with eps' ~ N(0, 1) drawn as well."""
    ab = schedule_of(cfg).alpha_bar
    (p, q), _, weight = prediction(cfg.predict, ab)
    kappa = torch.zeros_like(ab)
    if t_start:
        ab = ab[:t_start]
        kappa = kappa_of(ab, ab[-1])
        p, q, weight = (torch.full_like(ab, v) for v in (1 / RESIDUAL, 0, RESIDUAL**2))
    return torch.stack([ab.sqrt(), (1 - ab).sqrt(), p, q, weight, kappa], dim=1).float()  # [T, 6]


# ================================================================== 2 reverse


def time_grid(t_start, nfe):
    """nfe + 1 step counts tau from t_start to 0, uniform and rounded: both ends are exact and, as
    1 <= nfe <= t_start, none is repeated."""
    assert nfe <= t_start, f"{nfe} evaluations in {t_start} steps"
    return [round(t_start * (nfe - i) / nfe) for i in range(nfe + 1)]


def reverse_table(cfg, taus, eta, bridge=False):
    """The numbers of each reverse step from taus[i] to taus[i + 1]: float32 [S, 7] with columns
    (a, b, c0, ct, sigma, k, cp) in

        x0_hat = clip(a x_t + b out, -1, 1),    x_s = c0 x0_hat + ct x_t + sigma z.

    This is Song et al. 2021 (DDIM), eq. 12, with sigma from eq. 16 and eps_hat eliminated. With
    eta = 1 and s = t - 1 it is DDPM's posterior (Ho et al. 2020, eq. 6-7); with eta = 0, DDIM or,
    with k, DPM-Solver++(2M). In float32 the difference 1 - ab would lose four digits at small t:
    hence float64, cast last.

    k = h / (2 h_previous), h the step in half the log signal-to-noise ratio, is for the second
    order, where x0_hat + k (x0_hat - x0_hat_previous) takes x0_hat's place (Lu et al. 2022,
    DPM-Solver++(2M)); it is 0 at the first step and, where h is infinite, at the last.

    On a bridge, which ends at taus[0], x_s = c0 x0_hat + ct x_t + cp prior + sigma z, where x0_hat
    = clip(prior + RESIDUAL out, -1, 1): cp is the prior's share in x_s without what ct x_t brings
    along, and c0 is as much less. On the way x0_hat - prior grows to what it ends at, as
    w = `reached` does where x_0 - prior is Gaussian. The last step follows that to 1:
    k = (1 - w) / (w - w_previous), 0 if it is the only one."""
    schedule, rows, h_previous, w_previous = schedule_of(cfg), [], math.inf, -math.inf
    ab_end = schedule.at(taus[0])
    for tau, next_tau in zip(taus, taus[1:]):
        ab_t, ab_s = schedule.at(tau), schedule.at(next_tau)
        sigma = eta * math.sqrt((1 - ab_s) / (1 - ab_t)) * math.sqrt(1 - ab_t / ab_s)
        ct = math.sqrt(max(0.0, 1 - ab_s - sigma**2) / (1 - ab_t))
        c0 = math.sqrt(ab_s) - math.sqrt(ab_t) * ct
        _, (a, b), _ = prediction(cfg.predict, torch.tensor(ab_t, dtype=torch.float64))
        h = 0.5 * math.log(ab_s / (1 - ab_s) * (1 - ab_t) / ab_t) if next_tau else 0.0
        k, cp = h / (2 * h_previous), 0.0
        if bridge:
            cp = (math.sqrt(ab_s) * kappa_of(ab_s, ab_end)
                  - math.sqrt(ab_t) * kappa_of(ab_t, ab_end) * ct)
            a, b, c0 = 0.0, RESIDUAL, c0 - cp
            w = reached(ab_t, ab_end)
            k, w_previous = k if next_tau else (1 - w) / (w - w_previous), w
        rows.append([float(a), float(b), c0, ct, sigma, k, cp])
        h_previous = h
    return torch.tensor(rows, dtype=torch.float64).float()  # [S, 7]


# ================================================================== 3 U-Net

class ResidualBlock(nn.Module):
    """x + f(x, t): two 3x3 convolutions, each after GroupNorm and SiLU; the time embedding scales
    and shifts the second norm (Dhariwal & Nichol 2021). The last convolution starts at zero, so
    that a new block is the identity. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels, embedding):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2.starts_at_zero = True

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1] each
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return x + self.conv2(F.silu(h))


class Attention(nn.Module):
    """x + self-attention over pixels, four heads. [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.out.starts_at_zero = True

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        qkv = qkv.transpose(-1, -2).contiguous()  # as CUDA's fused attention asks for
        q, k, v = qkv.unbind(1)  # [B, heads, HW, C / heads] each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """The denoiser: x_t [B, C, H, W] and t int64 [B] -> out [B, C, H, W]; with a bridge's prior
    [B, C, H, W] as well, out is what x_0 has that the prior lacks, in units of RESIDUAL. Inside,
    the last row and column are repeated up to multiples of 4. Space-to-depth by 2 comes first: on
    small images most of a U-Net's time is spent at full resolution, where there is least to decide.
    Skip connections are added, not concatenated, which keeps every block at one width. Two levels
    of widths w and 2 w, attention on the lower one. It calculates in the type of its weights."""

    def __init__(self, channels, width=32, blocks=(1, 2), bridge=False):
        super().__init__()
        self.width = width
        emb = 4 * width
        self.embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels * (1 + bridge), width, 3, padding=1)
        self.down1 = nn.ModuleList(ResidualBlock(width, emb) for _ in range(blocks[0]))
        self.shrink = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.ModuleList(ResidualBlock(2 * width, emb) for _ in range(blocks[1]))
        self.attention = Attention(2 * width)
        self.middle = ResidualBlock(2 * width, emb)
        self.up2 = nn.ModuleList(ResidualBlock(2 * width, emb) for _ in range(blocks[1]))
        self.grow = nn.Conv2d(2 * width, 4 * width, 1)
        self.up1 = nn.ModuleList(ResidualBlock(width, emb) for _ in range(blocks[0]))
        self.norm = nn.GroupNorm(8, width)
        self.leave = nn.Conv2d(width, 4 * channels, 3, padding=1)
        self.leave.starts_at_zero = True

    def time_embedding(self, t):
        """Sines and cosines of t at geometric frequencies (Vaswani et al. 2017). -> [B, width]."""
        exponent = torch.arange(self.width // 2, device=t.device) / (self.width // 2)
        angle = t[:, None] * torch.exp(-math.log(1e4) * exponent)  # [B, width / 2]
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, x_t, t, prior=None):
        H, W = x_t.shape[2:]
        x_t = x_t if prior is None else torch.cat([x_t, prior], dim=1)
        if H % 4 or W % 4:
            x_t = F.pad(x_t, (0, -W % 4, 0, -H % 4), mode="replicate")
        x_t = x_t.to(self.enter.weight.dtype)
        emb = self.embed(self.time_embedding(t).to(x_t.dtype))  # [B, 4w]
        h = self.enter(F.pixel_unshuffle(x_t, 2))  # [B, w, H/2, W/2]
        skips = []
        for block in self.down1:
            h = block(h, emb)
            skips.append(h)
        h = self.shrink(h)  # [B, 2w, H/4, W/4]
        for block in self.down2:
            h = block(h, emb)
            skips.append(h)
        h = self.middle(self.attention(h), emb)
        for block in self.up2:
            h = block(h + skips.pop(), emb)
        h = F.pixel_shuffle(self.grow(h), 2)  # [B, w, H/2, W/2]
        for block in self.up1:
            h = block(h + skips.pop(), emb)
        out = F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)
        return out[..., :H, :W]  # [B, C, H, W]


def fresh(make, seed, network, device):
    """The module that `make` makes, with weights that are a function of seed and `network`, a
    number of its own, alone: PyTorch's default, U(-r, r) with r = 1 / sqrt(fan_in), layer by layer,
    but zero where a layer starts at zero."""
    with torch.device("meta"):  # no values yet, so no use of a global random state
        net = make()
    for number, layer in enumerate(net.to_empty(device=device).modules()):
        if isinstance(layer, (nn.GroupNorm, nn.BatchNorm2d)):
            layer.reset_parameters()
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            r = 0.0 if hasattr(layer, "starts_at_zero") else layer.weight[0].numel() ** -0.5
            n = layer.weight.numel()
            u = kernels.uniform((1, n + len(layer.bias)), seed, network, number, kernels.WEIGHTS,
                                layer.weight.device)[0]
            with torch.no_grad():
                layer.weight.copy_((u[:n] * 2 - 1).mul(r).view_as(layer.weight))
                layer.bias.copy_((u[n:] * 2 - 1).mul(r))
    return net


def make_unet(cfg, channels, device, bridge=False):
    """The U-Net of a run, as it begins."""
    return fresh(lambda: UNet(channels, cfg.width, bridge=bridge), cfg.seed, 2 * bridge, device)


# ================================================================== 4 training


def epoch_order(cfg, N, epoch, device):
    """A permutation of 0 ... N-1 for this epoch, int64 [N]: a function of seed and epoch alone."""
    numbers = torch.arange(N, device=device)
    keys = kernels.uniform((N,), cfg.seed, numbers, epoch, kernels.DATA_ORDER, device)
    return keys.argsort(stable=True)


def draw_t(cfg, T, numbers, B, step):
    """t uniform in 0 ... T-1, one draw in each of B equal strata: int64 [n]. The loss varies much
    with t, and strata take that out of the gradient's variance (after the low-discrepancy sampler
    of Kingma et al. 2021, VDM, which shares one draw among the strata)."""
    u = kernels.uniform((len(numbers),), cfg.seed, numbers, step, kernels.TRAIN_TIME,
                        numbers.device)
    return ((numbers + u) * (T / B)).long().clamp(max=T - 1)


def denoising_loss(cfg, net, pixels, index, numbers, B, table, step, autocast, priors=None):
    """w_t times the mean of (out(x_t, t) - target)^2 over pixels, at one t for each image (Ho et
    al. 2020, eq. 14, with the targets and weights of `forward_table`): float32 [n]. The images are
    pixels[index], int64 [n], and `numbers` their places in a batch of B. t and eps depend on seed,
    place and step alone, so a batch may be split at will. On a bridge `priors`(seed, index,
    numbers, step) -> [n, C, H, W] in [-1, 1] are the images'."""
    t = draw_t(cfg, len(table), numbers, B, step)
    prior = None if priors is None else priors(cfg.seed, index, numbers, step)
    # x_t = signal x_0 + noise eps, eps drawn from (seed, number, step)
    x_t = kernels.q_sample(pixels, index, t, table, cfg.seed, numbers, step, prior=prior)
    with autocast():
        out = net(x_t, t) if prior is None else net(x_t, t, prior)  # [n, C, H, W]
    # weight mean (out - (p x_0 + q eps))^2: the same eps, drawn again
    return kernels.noise_loss(out, pixels, index, t, table, cfg.seed, numbers, step, prior=prior)


def half_cosine(step, steps):
    """From 1 down to 0; step is a number or a tensor."""
    cos = torch.cos if isinstance(step, torch.Tensor) else math.cos
    return 0.5 * (1 + cos(math.pi * step / steps))


def learning_rate(cfg, step, steps):
    """Linear warm-up over the first 3 % of the steps, then half a cosine down to zero."""
    warmup = max(1, round(0.03 * steps))
    return cfg.lr * min(1.0, (step + 1) / warmup) * half_cosine(step, steps)


def update_average(ema, net, n, decay=0.999):
    """ema <- d ema + (1 - d) net, d = min(decay, (1 + n) / (10 + n)), n the steps before this one
    (an int64 scalar tensor): without the warm-up an early average would be mostly initial
    weights."""
    d = ((1 + n) / (10 + n)).clamp(max=decay)
    average = list(ema.parameters())
    with torch.no_grad():
        change = torch._foreach_sub(list(net.parameters()), average)
        torch._foreach_mul_(change, 1 - d)
        torch._foreach_add_(average, change)


class Muon(torch.optim.Optimizer):
    """Momentum for convolutions, every step of which is made (about) orthogonal: a weight
    [out, in, k, k], read as a matrix, moves by 2.5 lr sqrt(max(1, rows / columns)) times the
    nearest matrix whose singular values are all 1, so that what rarely has a large gradient is
    learned as fast as the rest (Jordan et al. 2024). Weights of one shape are one batch, and those
    of a grouped convolution as many matrices as there are `groups`."""

    def __init__(self, weights, lr, groups=1):
        shapes, self.groups = {}, groups
        for p in weights:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": alike} for alike in shapes.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            grad = torch.cat([p.grad.unflatten(0, (self.groups, -1)) for p in weights])
            grad = grad.flatten(2)  # [n, out, in k k]
            mean = self.state[weights[0]].setdefault("mean", torch.zeros_like(grad))
            x = grad.lerp(mean.lerp_(grad, 0.05), 0.95)  # Nesterov's momentum
            x /= x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            tall = max(1, x.shape[1] / x.shape[2])
            x = x.mT if tall > 1 else x
            # Newton and Schulz's x <- P x, P = 3.4445 - 4.775 A + 2.0315 A^2, A = x x', five times:
            # singular values to 1 +- 0.3. A product of the P, which commute, is smaller than an x
            A, one = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            product = one
            for _ in range(5):
                P = 3.4445 * one - 4.775 * A + 2.0315 * A @ A
                A, product = P @ A @ P, P @ product
            x = -2.5 * group["lr"] * tall**0.5 * (product @ x)
            x = x.mT if tall > 1 else x
            torch._foreach_add_(weights, list(x.reshape(len(weights), *weights[0].shape)))


def optimizers_of(net, lr):
    """What trains a U-Net: Muon its convolutions, but for the first and the last, AdamW the rest.
    lr is a tensor that both read."""
    inner, rest = [], []
    for name, p in net.named_parameters():
        (inner if p.dim() == 4 and not name.startswith(("enter", "leave")) else rest).append(p)
    return [Muon(inner, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.01,
                                               fused=True, capturable=lr.is_cuda)]


def steps_of(cfg, N):
    """(images in a batch, steps in an epoch) of a training on N images."""
    B = min(cfg.batch, N)
    return B, N // B


def train_steps(cfg, pixels, net, ema, optimizers, done=0, autocast=contextlib.nullcontext,
                priors=None):
    """Minimise `denoising_loss` (Ho et al. 2020, algorithm 1) over pixels uint8 [N, C, H, W] from
    step `done` on: yields (steps done, loss), the loss a scalar tensor that the next step
    overwrites. net, ema, its running average, optimizers, which read one tensor as their rate, and
    `done` are all that a resume needs."""
    B, per_epoch = steps_of(cfg, len(pixels))
    steps = cfg.epochs * per_epoch
    table = forward_table(cfg, priors and cfg.bridge_start).to(pixels.device)
    rank, size = processes()
    numbers = torch.arange(rank, B, size, device=pixels.device)  # this process's part of a batch
    model = nn.parallel.DistributedDataParallel(net) if size > 1 else net  # averages gradients
    index, loss = torch.zeros_like(numbers), torch.zeros((), device=pixels.device)
    step, lr = torch.zeros_like(numbers[0]), optimizers[0].param_groups[0]["lr"]

    def one_step():  # what changes between steps lies in tensors: CUDA records this once
        losses = denoising_loss(cfg, model, pixels, index, numbers, B, table, step, autocast,
                                priors)
        now = losses.sum() / B
        net.zero_grad()
        (now * size).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(ema, net, step)
        loss.copy_(now.detach())

    advance, order = Graphed(one_step, pixels.device, steps - done), None
    for n in range(done, steps):
        if n % per_epoch == 0 or order is None:
            order = epoch_order(cfg, len(pixels), n // per_epoch, pixels.device)
        index.copy_(order[n % per_epoch * B + numbers])
        step.fill_(n)
        lr.fill_(learning_rate(cfg, n, steps))
        advance()
        yield n + 1, loss


def train_network(cfg, pixels, run, name="ddpm", priors=None, each=None):
    """`train_steps` to their end, a row of the log every 50, a checkpoint a minute. Returns the
    averaged network, rows [name, step, epoch, seconds, loss, lr] and seconds. `each` is called
    after every step with (steps done, averaged network, seconds). RuntimeError where the weights
    are not finite any more."""
    net = make_unet(cfg, pixels.shape[1], run.device, priors is not None)
    ema = copy.deepcopy(net).requires_grad_(False)
    lr = torch.tensor(cfg.lr, device=run.device)
    muon, adamw = optimizers_of(net, lr)
    parts = {"net": net, "ema": ema, "muon": muon, "adamw": adamw}
    first, rows, losses, clock = run.continue_training(name, parts)
    for group in muon.param_groups + adamw.param_groups:
        group.update(lr=lr, capturable=lr.is_cuda)  # a resume's may be another device's
    (B, per_epoch), saved_at = steps_of(cfg, len(pixels)), time.time()
    steps = cfg.epochs * per_epoch
    training = train_steps(cfg, pixels, net, ema, (muon, adamw), first, run.autocast,
                           priors)
    for done, loss in progress(training, f"train {name}", steps, B, first,
                               lambda: f"loss {rows[-1][4]:.4f}" if rows else ""):
        losses.append(loss.clone())
        if each is not None:
            each(done, ema, clock())
        row_due = done % 50 == 0 or done == steps
        stop = total(run.stop, run.device) if row_due or processes()[1] == 1 else 0
        if row_due or stop:  # the only place where the host waits for the device
            if not torch.stack(torch._foreach_norm(list(net.parameters()))).isfinite().all():
                raise RuntimeError(f"the training is not finite after {done} steps with --lr "
                                   f"{cfg.lr:g}; the last good checkpoint is kept")
        if row_due:
            mean = total(torch.stack(losses).sum().item(), run.device) / len(losses)
            rows.append([name, done, done / per_epoch, clock(), mean,
                         learning_rate(cfg, done - 1, steps)])
            losses = []
        if stop or done == steps or row_due and time.time() - saved_at > CHECKPOINT_SECONDS:
            run.save_training(name, parts, done, rows, losses, clock())
            saved_at = time.time()
        if stop:
            raise KeyboardInterrupt
    return run.as_sampled(ema), rows, clock()


# ================================================================== 5 sampling


@torch.no_grad()
def reverse(cfg, net, x_t, t_start, nfe, eta, numbers, prior=None):
    """The reverse process from x_t [n, C, H, W], an image after t_start steps of noise, in nfe
    network evaluations (Song et al. 2021, eq. 12; Ho et al. 2020, algorithm 2, where eta = 1 and
    nfe = t_start; Lu et al. 2022, DPM-Solver++(2M), where eta = 0): yields x_t and, after each
    step, x_t again, overwritten; the last is x_0. With a prior [n, C, H, W] it goes over
    the bridge to which net was trained."""
    taus = time_grid(t_start, nfe)
    table = reverse_table(cfg, taus, eta, prior is not None).to(x_t.device)  # [nfe, 7]
    times = torch.tensor(taus[:-1], device=x_t.device) - 1
    x0_prev = torch.zeros_like(x_t) if eta == 0 and cfg.order == 2 else None
    step = torch.zeros(1, dtype=torch.int64, device=x_t.device)

    def one_step():
        t = times.index_select(0, step).expand(len(x_t))
        out = net(x_t, t) if prior is None else net(x_t, t, prior)
        # x0_hat = clip(a x_t + b out, -1, 1); x_t <- c0 x0_hat + ct x_t + sigma z
        kernels.posterior_step(x_t, out, table, step[0], cfg.seed, numbers, inplace=True,
                               x0_prev=x0_prev, prior=prior)
        step.add_(1)

    advance = Graphed(one_step, x_t.device, nfe)
    yield x_t
    for _ in range(nfe):
        advance()
        yield x_t


def sample(cfg, net, x_init, t_start, nfe, eta, numbers, prior=None):
    """The end of `reverse`, [n, C, H, W] in [-1, 1], `at_once` images at a time."""
    ends = []
    for rows in torch.arange(len(x_init), device=x_init.device).split(at_once(x_init)):
        *_, x_0 = reverse(cfg, net, x_init[rows], t_start, nfe, eta, numbers[rows],
                          None if prior is None else prior[rows])
        ends.append(x_0.clamp_(-1, 1))  # the second order can end outside
    return torch.cat(ends)


# ================================================================== 6 DIP

CHECK = 10  # iterations between two looks at a fit
MASK_DRAW, HELD_DRAW, SPLIT_DRAW = 1, 2, 3  # in the stream CORRUPTION; 0 is a measurement's noise


class Measurement(NamedTuple):
    """What a fit is given: y = A x + sigma eps of images x [n, C, H, W] in [0, 1], not clipped,
    with `mask` [n, 1, H, W] (ones where A has none) and A's task; y is [n, C, h, w]."""

    task: str
    y: torch.Tensor
    mask: torch.Tensor
    sigma: float

    def part(self, rows):
        return self._replace(y=self.y[rows], mask=self.mask[rows])

    def A(self, x):
        return TASKS[self.task][0](x, self.mask)

    def given(self):
        """1 where y says something, else 0; of y's shape."""
        return self.A(torch.ones_like(self.mask).expand(-1, self.y.shape[1], -1, -1))

    def back(self, y):
        """A's pseudo-inverse: A(back(y)) = y for every y that A can give."""
        return TASKS[self.task][1](y, self.mask)


def exact(x):
    """Images x [n, C, H, W] in [0, 1], themselves: A = 1 without noise."""
    return Measurement("denoise", x, torch.ones_like(x[:, :1]), 0.0)


def pooling(k):
    """Super-resolution's A and pseudo-inverse: means of k x k blocks, and each mean k x k times."""
    return (lambda x, mask: F.avg_pool2d(x, k),
            lambda y, mask: y.repeat_interleave(k, -1).repeat_interleave(k, -2))


MASKING = (lambda x, mask: x * mask,) * 2
TASKS = {"denoise": (lambda x, mask: x,) * 2, "inpaint": MASKING, "inpaint-box": MASKING,
         "sr": pooling(2), "sr-4": pooling(4)}
FACTORS = {"sr": 2, "sr-4": 4}  # by how much y is smaller than x


def corrupt(cfg, task, truth, sigma, numbers):
    """truth [n, C, H, W] in [0, 1] -> the Measurement y = A truth + sigma eps, not clipped.
    ValueError if images of this size cannot be halved, or quartered, as the task does."""
    n, _, H, W = truth.shape
    factor = FACTORS.get(task, 1)
    if H % factor or W % factor:
        raise ValueError(f"--task {task}: images of {W}x{H} pixels; sizes must be multiples of "
                         f"{factor}")
    mask = torch.ones(n, 1, H, W, device=truth.device)
    if task == "inpaint":
        u = kernels.uniform(mask.shape, cfg.seed, numbers, MASK_DRAW, kernels.CORRUPTION,
                            truth.device)
        mask = (u < 0.5).float()
    if task == "inpaint-box":
        mask[:, :, H // 4:H - H // 4, W // 4:W - W // 4] = 0
    known = Measurement(task, truth, mask, sigma)
    y = known.A(truth)
    eps = kernels.normal(y.shape, cfg.seed, numbers, 0, kernels.CORRUPTION, truth.device)
    return known._replace(y=y + sigma * known.given() * eps)


class GroupedConv(nn.Module):
    """K independent convolutions as one with groups = K: [1, K Ci, H, W] -> [1, K Co, H', W'].
    Reflection padding keeps the size at stride 1. PyTorch's default initial distribution,
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), drawn for each fit from its own number, with the draw number
    `layer`, so that a network does not depend on which others share its group."""

    def __init__(self, numbers, layer, c_in, c_out, size, seed, stride=1):
        super().__init__()
        K, fan_in = len(numbers), c_in * size * size
        u = kernels.uniform((K, c_out * (fan_in + 1)), seed, numbers, layer, kernels.WEIGHTS,
                            numbers.device)
        weight, bias = (u * 2 - 1).mul(fan_in**-0.5).split([c_out * fan_in, c_out], dim=1)
        self.weight = nn.Parameter(weight.reshape(K * c_out, c_in, size, size))
        self.bias = nn.Parameter(bias.reshape(K * c_out))
        self.K, self.stride, self.pad = K, stride, (size - 1) // 2

    def forward(self, x, turned=lambda weight: weight):
        if self.pad:  # a map that is no larger than the padding has nothing to reflect
            mode = "reflect" if min(x.shape[2:]) > self.pad else "replicate"
            x = F.pad(x, (self.pad,) * 4, mode=mode)
        return F.conv2d(x, turned(self.weight), self.bias, self.stride, groups=self.K)


class Grouped:
    """What a network is made of, for K fits together, each to its image: every layer K times
    as wide, in K groups. Each layer draws its weights under a number of its own."""

    def __init__(self, numbers, seed):
        self.numbers, self.seed, self.K = numbers, seed, len(numbers)
        self.layers = itertools.count()

    def conv(self, c_in, c_out, size, stride=1):
        return GroupedConv(self.numbers, next(self.layers), c_in, c_out, size, self.seed, stride)

    def norm(self, channels):
        """By the batch's own statistics: of a batch of one, K C channels are K BatchNorms."""
        return nn.BatchNorm2d(self.K * channels, track_running_stats=False,
                              device=self.numbers.device)


class Skip(nn.Module):
    """The hourglass of Ulyanov et al. (2018, supplementary). Each scale has a 4-channel 1x1 skip, a
    stride-2 and a plain 3x3 convolution on the way down, bilinear upsampling, a 3x3 and a 1x1
    convolution on the way up. [1, K Ci, H, W] -> [1, K Co, H, W] in [0, 1]."""

    def __init__(self, make, c_in, c_out, H, W, width):
        super().__init__()
        self.K, skip = make.K, 4
        self.scales = min(5, max(1, int(math.log2(min(H, W))) - 2))

        def conv_norm(c_in, c_out, size, stride=1):
            return nn.Sequential(make.conv(c_in, c_out, size, stride), make.norm(c_out),
                                 nn.LeakyReLU(0.2))

        def each_scale(layer):
            return nn.ModuleList(layer(c_in if s == 0 else width) for s in range(self.scales))

        self.skips = each_scale(lambda c: conv_norm(c, skip, 1))
        self.downs = each_scale(lambda c: nn.Sequential(conv_norm(c, width, 3, stride=2),
                                                        conv_norm(width, width, 3)))
        self.norms = each_scale(lambda c: make.norm(skip + width))
        self.ups = each_scale(lambda c: nn.Sequential(conv_norm(skip + width, width, 3),
                                                      conv_norm(width, width, 1)))
        self.last = make.conv(width, c_out, 1)

    def forward(self, x):
        h, skips = x, []
        for skip, down in zip(self.skips, self.downs):
            skips.append(skip(h))
            h = down(h)
        for norm, up in zip(reversed(self.norms), reversed(self.ups)):
            skip = skips.pop()
            h = F.interpolate(h, size=skip.shape[2:], mode="bilinear", align_corners=False)
            h = [part.unflatten(1, (self.K, -1)) for part in (skip, h)]  # [B, K, c, H, W] each
            h = up(norm(torch.cat(h, dim=2).flatten(1, 2)))
        return torch.sigmoid(self.last(h))


ARCHS = {"skip": Skip}


class Fits:
    """K networks as one, each fitted to its image, and the average of each one's outputs over
    iterations. Muon fits the weights `inner`, Adam the rest; rate is a number, or a tensor that
    both read. With the seed, numbers int64 [K] decide all that is random."""

    def __init__(self, cfg, numbers, net, inner, rate, C, H, W, dtype):
        self.cfg, self.numbers, self.K, self.net = cfg, numbers, len(numbers), net
        rest = [p for p in net.parameters() if all(p is not weight for weight in inner)]
        self.optimizers = [torch.optim.Adam(rest, rate, fused=True, capturable=rest[0].is_cuda)]
        self.optimizers += [Muon(inner, rate, self.K)] if inner else []
        self.average = torch.zeros(self.K, C, H, W, dtype=dtype, device=numbers.device)
        self.age = torch.zeros_like(self.average[:, 0, 0, 0])  # of each average, in iterations
        self.steps = torch.zeros_like(numbers[0])

    def outputs(self, *inputs):
        """What the networks make [K, C, H, W], in bf16 inside if the precision says so."""
        bf16 = self.cfg.precision == "bf16"
        with torch.autocast(self.average.device.type, torch.bfloat16, bf16):
            x = self.net(*inputs).to(self.average.dtype)
        return x.view(self.K, -1, *x.shape[2:])

    def learn(self, x, y, share, A):
        """One step on sum_k sum share_k (A x_k - y_k)^2, so that each member gets the gradient that
        it would get alone. y and share are of A's size, share sums to 1 over each. Leaves the
        outputs x [K, C, H, W] and losses [K] of before the step."""
        losses = ((A(x) - y).square() * share).sum(dim=(1, 2, 3))
        self.net.zero_grad()
        losses.sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps.add_(1)
        decay = ((1 + self.age) / (10 + self.age)).clamp(max=self.cfg.window)
        self.age += 1
        self.x, self.losses = x.detach(), losses.detach()
        self.average += (1 - decay).view(-1, 1, 1, 1) * (self.x - self.average)

    def require(self, finite):
        """RuntimeError if a fit has left the finite numbers."""
        if not finite:
            raise RuntimeError(f"a fit is not finite after {self.steps} iterations")


class DIPGroup(Fits):
    """K DIPs: z ~ U(0, 0.1) is fixed; jitter N(0, (1/30)^2) is fresh at every iteration and shared.
    With Adam or, where cfg.muon says so, Muon for the convolutions of more than one pixel."""

    def __init__(self, cfg, numbers, C, H, W, dtype=torch.float32):
        self.Cz = min(cfg.dip_width, 32)
        make = Grouped(numbers, cfg.seed)
        net = ARCHS[cfg.arch](make, self.Cz, C, H, W, cfg.dip_width).to(dtype)
        inner = [layer.weight for layer in net.modules()
                 if cfg.muon and isinstance(layer, GroupedConv) and layer.pad]
        self.z = 0.1 * kernels.uniform((len(numbers), self.Cz, H, W), cfg.seed, numbers, 0,
                                       kernels.DIP_CODE, numbers.device)
        super().__init__(cfg, numbers, net, inner, cfg.dip_lr, C, H, W, dtype)

    def iterate(self, y, share, A):
        """One step to y from z under fresh jitter, see `learn`."""
        jitter = kernels.normal((1, *self.z.shape[1:]), self.cfg.seed, 0, self.steps,
                                kernels.DIP_JITTER, self.z.device)
        z = (self.z + jitter / 30).to(self.average.dtype).view(1, -1, *jitter.shape[2:])
        self.learn(self.outputs(z), y, share, A)


def untracked(steps, *_):
    """What a fit's loop runs through where nobody follows it; see `Run.track`."""
    return steps


def unseen(*_):
    """A look at a fit where nobody looks."""


def fit_dips(cfg, known, numbers, iters, track=untracked, look=unseen):
    """Fit one DIP to each image: minimise |A f_theta(z + jitter) - y|^2 over theta from random
    theta, Adam, with the exponential average of the outputs (Ulyanov et al. 2018, eq. 2 and 4-6,
    section 3; the jitter: supplementary). `known` is the Measurement of K images; returns the
    averages [K, C, H, W]. `look` is called with each iteration (from 1 on), the outputs and the
    averages. RuntimeError where a fit is not finite."""
    y, A, given = known.y, known.A, known.given()
    share = given / given.sum(dim=(1, 2, 3), keepdim=True)
    group = DIPGroup(cfg, numbers, y.shape[1], *known.mask.shape[2:], y.dtype)
    advance = Graphed(lambda: group.iterate(y, share, A), y.device, iters)
    for i in track(range(1, iters + 1), "fit DIPs", len(y)):
        advance()
        if i % CHECK == 0 or i == iters:
            group.require(group.average.isfinite().all())
        look(i, group.x, group.average)
    return group.average


# ================================================================== 7 codes

CODE = 32  # numbers in a code
CODE_RATES = 2e-3, 1e-2  # peak learning rates of decoder and codes
CODE_SPREAD = 0.5  # noise on a code, in standard deviations of all
CENTRE_DRAW, CODE_DRAW = 1, 2  # in the stream DIP_CODE; 0 is z's


class Coding(NamedTuple):
    """Images as codes: `decode` makes images [n, C, H, W] in [0, 1] of codes [n, D]; `codes` [N, D]
    are those of the training images. A new code is one of these under Gaussian noise of standard
    deviations `noise` [D], a kernel density (Parzen 1962), in training and in sampling."""

    decode: object
    codes: torch.Tensor
    noise: torch.Tensor

    @torch.no_grad()
    def priors(self, seed, index, numbers, draw, stream=kernels.CODE_NOISE):
        """Of the codes `index` [n] with fresh noise: images [n, C, H, W] in [-1, 1]."""
        code = self.codes[index]
        z = kernels.normal(code.shape, seed, numbers, draw, stream, code.device)
        return self.decode(code + self.noise * z) * 2 - 1

    def new(self, seed, n):
        """n new images in [-1, 1]; number i is the same whatever n is."""
        numbers = torch.arange(n, device=self.codes.device)
        u = kernels.uniform((n,), seed, numbers, CENTRE_DRAW, kernels.DIP_CODE, numbers.device)
        index = (u * len(self.codes)).long().clamp(max=len(self.codes) - 1)
        return torch.cat([self.priors(seed, index[part], part, CODE_DRAW, kernels.DIP_CODE)
                          for part in numbers.split(1000)])


class CodeDecoder(nn.Module):
    """One DIP for all images: code [B, CODE] -> x [B, C, H, W] in [0, 1]. A linear map to a quarter
    of the size, then twice upsampling and a 3x3 convolution."""

    def __init__(self, channels, H, W, width):
        super().__init__()
        self.size = H, W
        self.shape = (2 * width, -(-H // 4), -(-W // 4))
        half = max(1, width // 2)
        self.enter = nn.Linear(CODE, math.prod(self.shape))
        self.norm0 = nn.BatchNorm2d(2 * width)
        self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, half, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(half)
        self.last = nn.Conv2d(half, channels, 3, padding=1)

    def forward(self, code):
        h = self.norm0(self.enter(code).view(-1, *self.shape))  # [B, 2w, H/4, W/4]
        h = F.leaky_relu(h, 0.2)
        for conv, norm in (self.conv1, self.norm1), (self.conv2, self.norm2):
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = F.leaky_relu(norm(conv(h)), 0.2)
        return torch.sigmoid(self.last(h)[..., :self.size[0], :self.size[1]])


def principal_components(pixels, D):
    """The first D principal components of pixels uint8 [N, C, H, W] scaled to [0, 1], P = C H W:
    whitened scores [N, D], mean [P] and axes [D, P], so that mean + scores @ axes is the best
    linear reconstruction; fewer than D where the images do not vary in as many directions."""
    X = pixels.flatten(1).float() / 255  # [N, P]
    N, P = X.shape
    mean = X.mean(0)
    X = X - mean
    value, vector = torch.linalg.eigh((X.T @ X if P <= N else X @ X.T).double() / N)  # ascending
    D = min(D, max(1, int((value > 1e-6 * value[-1]).sum())))  # whitened, rounding would be large
    scale = value[-D:].flip(0).clamp(min=1e-12).sqrt().float()
    vector = vector[:, -D:].flip(1).float()
    if P > N:  # from the scores to the axes
        vector = X.T @ vector / (scale * math.sqrt(N))
    return X @ (vector / scale), mean, vector.T * scale[:, None]


def fit_codes(cfg, pixels, track=untracked):
    """Minimise sum_i |g_theta(c_i) - x_i|^2 over theta and a code c_i for each image, together
    (Bojanowski et al. 2018), from whitened principal components; Adam, half a cosine. pixels uint8
    [N, C, H, W]. The decoder is to be evaluated with its running statistics, and codes are
    [N, CODE]."""
    N, C, H, W = pixels.shape
    B, per_epoch = steps_of(cfg, N)
    decoder = fresh(lambda: CodeDecoder(C, H, W, cfg.decoder_width), cfg.seed, 1, pixels.device)
    scores = principal_components(pixels, CODE)[0]
    scores = F.pad(scores, (0, CODE - scores.shape[1]))  # of fewer images than that
    codes = nn.Embedding.from_pretrained(scores, freeze=False, sparse=True)
    optimizers = [torch.optim.Adam(decoder.parameters(), fused=True),
                  torch.optim.SparseAdam(codes.parameters())]  # moves the batch's codes only
    steps = cfg.code_epochs * per_epoch
    for step in track(range(steps), "fit codes", B):
        if step % per_epoch == 0:
            order = epoch_order(cfg, N, step // per_epoch, pixels.device)
        index = order[step % per_epoch * B:][:B]
        x = decoder(codes(index))
        loss = (x - pixels[index].float() / 255).square().mean(dim=(1, 2, 3)).sum()
        for optimizer, rate in zip(optimizers, CODE_RATES):
            optimizer.param_groups[0]["lr"] = rate * half_cosine(step, steps)
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    codes = codes.weight.detach()
    return Coding(decoder.eval().requires_grad_(False), codes, CODE_SPREAD * codes.std(0))


def principal_codes(cfg, pixels, track=untracked):
    """Whitened principal components, decoded linearly: what a DIP's decoder must beat."""
    scores, mean, axes = principal_components(pixels, min(CODE, pixels[0].numel(), len(pixels)))
    return Coding(lambda code: (mean + code @ axes).clamp(0, 1).view(-1, *pixels.shape[1:]), scores,
                  CODE_SPREAD * scores.std(0))


def gaussian_codes(cfg, pixels, track=untracked):
    """One Gaussian with the training data's mean and full covariance: what can be had with no DIP
    at all. Not clipped: it would not be that Gaussian."""
    _, mean, axes = principal_components(pixels, min(len(pixels), pixels[0].numel()))
    return Coding(lambda code: (mean + code @ axes).view(-1, *pixels.shape[1:]),
                  axes.new_zeros(1, len(axes)), axes.new_ones(len(axes)))  # all noise on one code


# ================================================================== 8 method 1: priors
#
# x_{t_start} = sqrt(ab) p + sqrt(1 - ab) eps, then the reverse process from t_start. The prior p is
# a new image of a coding (`Coding.new`), a variation of one training image: its code, under noise.
# The network of `ddpm` never saw a prior. A bridge's did: x_t goes from each training image to
# priors of its code (`forward_table`), and the network sees x_t and p.

CODINGS = {"dip-codes": fit_codes, "gauss": gaussian_codes, "pca": principal_codes}
BRIDGES = {"dip-bridge": "dip-codes"}  # a bridge's arm and where its priors come from


def start_from_prior(cfg, prior, t_start, numbers):
    """x_{t_start} = sqrt(ab) x_prior + sqrt(1 - ab) eps (Ho et al. 2020, eq. 4). prior [n, C, H, W]
    in [-1, 1], numbers int64 [n] -> x_init [n, C, H, W]."""
    t = torch.full((len(prior),), t_start - 1, device=prior.device)
    return kernels.q_sample(prior, None, t, forward_table(cfg).to(prior.device), cfg.seed, numbers,
                            0, kernels.INIT_NOISE)


def noise_start(cfg, shape, numbers):
    """x_T ~ N(0, 1) [n, C, H, W]."""
    return kernels.normal(shape, cfg.seed, numbers, 0, kernels.INIT_NOISE, numbers.device)


def run_prior(cfg, run):
    """--mode ddpm: train, sample from noise, measure. --mode prior: from priors, too."""
    train = load_images(cfg, "train")
    test = load_images(cfg, "test", train.name if cfg.data == "auto" else None)
    pixels = train.pixels[:cfg.limit].to(run.device)
    N, C, H, W = pixels.shape
    about = {"name": train.name, "train": N, "test": len(test.pixels), "sha256": train.sha256}
    cfg = run.begin(resolve(cfg, pixels.shape), about, [C, H, W])
    say(f"data: {train.name}, {N} training and {len(test.pixels)} test images of {C}x{H}x{W}; "
        f"{run.device}, {run.precision}")
    net, rows, run.seconds["train"] = train_network(cfg, pixels, run)
    nets, fitted = {"ddpm": net}, {}
    bridging = cfg.mode == "prior" and "bridge" in cfg.dip_source
    for arm, source in BRIDGES.items() if bridging else ():
        with run.timed("dip") as took:
            coding = CODINGS[source](cfg, pixels, run.track)
        nets[arm], more, seconds = train_network(cfg, pixels, run, arm, coding.priors)
        rows, fitted[source] = rows + more, (coding, took.seconds)
        run.seconds["train"] += seconds
    if processes()[0]:
        return  # the first process alone samples, measures and writes
    write_log(run, rows)
    judge = measure.Judge(train, pixels, test, cfg.samples, [data.cache_root(), run.folder])
    arms, pictures = generate(cfg, run, nets, fitted, pixels, judge)
    run.seconds["eval"] = judge.seconds
    run.finish({"data": about, "parameters": sum(p.numel() for p in net.parameters()),
                "arms": arms, "curves": loss_curves(rows), "pictures": pictures} | judge.summary())


class Start(NamedTuple):
    """Where an arm begins: its network, x_init [n, C, H, W] after t_start steps of noise, the prior
    in it, if any, and seconds that this took."""

    arm: str
    net: nn.Module
    x_init: torch.Tensor
    t_start: int
    prior: torch.Tensor | None = None
    seconds: float = 0.0


def starts(cfg, run, nets, fitted, pixels, numbers, codings=CODINGS):
    """The `Start` of each arm: noise; each coding's new images, noised to each t_start, and to
    where the bridges from it end. fitted {arm: (coding, seconds)}: those that are, already."""
    shape = len(numbers), *pixels.shape[1:]
    yield Start("ddpm", nets["ddpm"], noise_start(cfg, shape, numbers), cfg.timesteps)
    for arm, fit in codings.items() if cfg.mode == "prior" else ():
        chosen = not arm.startswith("dip-") or arm.removeprefix("dip-") in cfg.dip_source
        if not chosen and arm not in fitted:
            continue
        coding, seconds = fitted.get(arm, (None, 0.0))
        with run.timed("dip" if arm.startswith("dip-") else None) as took:
            p = (coding or fit(cfg, pixels, run.track)).new(cfg.seed, len(numbers))
        bridges = [(name, cfg.bridge_start) for name in nets if BRIDGES.get(name) == arm]
        for name, t_start in [(arm, t) for t in cfg.t_start if chosen] + bridges:
            x_init = start_from_prior(cfg, p, t_start, numbers)
            yield Start(name, nets.get(name, nets["ddpm"]), x_init, t_start, p,
                        took.seconds + seconds)


def generate(cfg, run, nets, fitted, pixels, judge):
    """Every arm samples with the same seed and count and is measured against the test split: rows
    of results.json, pictures."""
    numbers = torch.arange(cfg.samples, device=run.device)
    rows, priors, grids = [], {}, {}
    x = pixels[:min(cfg.samples, at_once(pixels))] / 127.5 - 1
    for eta in cfg.eta:  # first calls, else the first arm pays for setting up
        sample(cfg, nets["ddpm"], x, 2, 2, eta, numbers[:len(x)])
    for start in starts(cfg, run, nets, fitted, pixels, numbers):
        arm, bridged = start.arm, start.prior if start.arm in nets else None
        for nfe, eta in itertools.product(cfg.nfe, cfg.eta):
            with run.timed("sample") as took:
                x = sample(cfg, start.net, start.x_init, start.t_start, nfe, eta, numbers, bridged)
            row = {"name": arm, "seed": cfg.seed, "nfe": nfe, "t_start": start.t_start, "eta": eta,
                   "seconds": took.seconds + start.seconds, "prior_seconds": start.seconds}
            rows.append(row | judge(x))
            grids.setdefault(nfe, {}).setdefault(arm, (x[:16] + 1) / 2)
            say(describe(rows[-1]))
        if start.prior is not None and bridged is None:
            priors[arm] = (start.prior[:16] + 1) / 2
    eta = f"eta = {cfg.eta[0]:g}"
    pictures = [measure.draw(run.folder / f"samples-nfe{nfe}.png",
                             f"{nfe} network evaluations, {eta}", arms)
                for nfe, arms in grids.items()]
    if priors:
        pictures.append(measure.draw(run.folder / "priors.png",
                                     "what the arms start from, before noise", priors))
    return rows, pictures


# ================================================================== 9 method 2: guide
#
# A DIP rises to a best output and then learns the noise. What stops it must not see the truth, and
# what it is fitted to must not be the judge: y = A x + sigma n is split once; one half is fitted,
# the other half judges. Only `Follow` is given the truth. What is fitted is a DIP or, to denoise
# what has pixels enough to learn from, a `Denoiser`.

def split(y, given, sigma, alpha, numbers, replicas, seed):
    """y [n, ...] with noise sigma -> (y_plus, y_minus), [n M, ...]: for each image M replicas
    y + alpha sigma e and y - sigma e / alpha, e ~ N(0, 1). Their noises are independent, since
    E[(n + alpha e)(n - e / alpha)] = 1 - 1. That holds within a replica: all of them together
    would give y away. The e of an image's replicas sum to zero (centred, times sqrt(M / (M - 1))
    to stay N(0, 1)), so that the y_plus average to y. `given` is 0 where y says nothing."""
    M = replicas
    e = kernels.normal((len(y) * M, *y.shape[1:]), seed, numbers, SPLIT_DRAW, kernels.CORRUPTION,
                       y.device).view(len(y), M, *y.shape[1:])
    if M > 1:
        e = (e - e.mean(1, keepdim=True)) * math.sqrt(M / (M - 1))
    e, y = (e * given[:, None]).flatten(0, 1), y.repeat_interleave(M, 0)
    return y + alpha * sigma * e, y - sigma / alpha * e


def noise_level(y):
    """sigma of each channel of y [n, C, H, W], robustly: the median of |diagonal Haar coefficients|
    / 0.6745 (Donoho & Johnstone 1994): [n, C]. Flat images have no other diagonal detail. Clipped
    pixels, as in a black background, make it too low."""
    if min(y.shape[2:]) < 2:
        raise ValueError(f"noise cannot be estimated in {y.shape[3]}x{y.shape[2]} pixels: say "
                         "--sigma")
    y = y[..., :y.shape[-2] // 2 * 2, :y.shape[-1] // 2 * 2]
    d = (y[..., ::2, ::2] - y[..., 1::2, ::2] - y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 2
    return d.flatten(2).abs().median(2).values / 0.6745


def cut_off(y):
    """The share of each channel's values in y [n, C, H, W] that are black or white: [n, C]."""
    return ((y == 0) | (y == 1)).to(y.dtype).mean((2, 3))


def noise_correlation(y):
    """How alike the noise of neighbouring pixels is in y [n, C, H, W]: their covariance over their
    variance in the tenth of all blocks of 8 x 8 without black and white that vary least, [n]. 0
    where noise is independent; 0.2 and more after a camera's or JPEG's filters."""
    blocks = y.unfold(2, 8, 8).unfold(3, 8, 8).flatten(1, 3)  # [n, blocks, 8, 8]
    whole = ((blocks != 0) & (blocks != 1)).flatten(2).all(2)
    blocks = blocks - blocks.mean((2, 3), keepdim=True)
    variance = blocks.square().mean((2, 3))
    flat = variance <= variance.where(whole, math.nan).nanquantile(0.1, 1, keepdim=True)
    flat &= whole
    alike = [(blocks.roll(1, axis) * blocks).narrow(axis, 1, 7).mean((2, 3)) for axis in (2, 3)]
    return (sum(alike) / 2 * flat).sum(1) / (variance * flat).sum(1).clamp(min=1e-12)


class Halves(NamedTuple):
    """What n images' replicas are fitted to and judged by, y_plus and y_minus [n M, ...]; the
    weights of either's values, which sum to 1 over each; and the variance of y_minus's noise."""

    y_plus: torch.Tensor
    fitted: torch.Tensor
    y_minus: torch.Tensor
    judged: torch.Tensor
    variance: float

    def risk(self, A_x, M):
        """Estimates without bias the mean error of an image's M replicas A x_m, `A_x`
        [n M, ...], from what these were not fitted to: [n],

            R = mean_m |A x_m - y_minus_m|^2 / values - variance.

        The error of their average, which is what is wanted, is lower by their spread. That grows
        as they learn their noises: to subtract it would make a minimum flat, and found late."""
        error = (A_x - self.y_minus).square() * self.judged
        return error.sum(dim=(1, 2, 3)).view(-1, M).mean(1) - self.variance

    def weights(self, risk, least, M):
        """How likely the judges make an output of this risk, in units of one of the least, [n]:
        each says log p(y_minus | x) = - values R / (2 variance) + ... They share y's noise and
        count, as a rule of thumb, as sqrt(M). Without noise only the least counts."""
        values = (self.judged > 0).sum(dim=(1, 2, 3)).view(-1, M)[:, 0].clamp(min=1)
        scale = 2 * max(self.variance, 1e-30) / (values * math.sqrt(M))
        return torch.where(risk <= least, 1, torch.exp((least - risk) / scale))


def replicas_of(numbers, M):
    """The numbers of n images' M replicas each: [n M]."""
    return (numbers[:, None] * M + torch.arange(M, device=numbers.device)).flatten()


def halves(cfg, known, numbers):
    """y with noise, `split`: the noises' variances are sigma^2 (1 + alpha^2) in y_plus and sigma^2
    (1 + 1/alpha^2) in y_minus, which judges. numbers int64 [n M]: `replicas_of`."""
    sigma, M, given = known.sigma, cfg.replicas, known.given()
    y_plus, y_minus = split(known.y, given, sigma, cfg.alpha, numbers, M, cfg.seed)
    weights = (given / given.sum(dim=(1, 2, 3), keepdim=True)).repeat_interleave(M, 0)
    return Halves(y_plus, weights, y_minus, weights, sigma**2 * (1 + 1 / cfg.alpha**2))


def held_out(cfg, known, numbers):
    """y without noise cannot be split: each replica judges by a tenth of the pixels (of M > 10
    replicas, one in M) that it alone is not fitted to."""
    y, M, given = known.y, cfg.replicas, known.given()
    u = kernels.uniform((len(y), 1, *y.shape[2:]), cfg.seed, numbers[::M] // M, HELD_DRAW,
                        kernels.CORRUPTION, y.device)
    whose = (u.repeat_interleave(M, 0) * max(10, M)).long()
    held = whose == torch.arange(M, device=y.device).repeat(len(y)).view(-1, 1, 1, 1)
    y, given = y.repeat_interleave(M, 0), given.repeat_interleave(M, 0)
    fitted, judged = (v / v.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
                      for v in (given * ~held, given * held))
    return Halves(y, fitted, y, judged, 0.0)


class LikelyMean:
    """The mean of each image's outputs at all looks so far, x [n, C, H, W], by `Halves.weights`:
    chance in one risk then matters less than where the least is all that counts."""

    def __init__(self, x):
        self.x, self.weight = x, torch.zeros_like(x[:, 0, 0, 0])
        self.least = torch.full_like(self.weight, math.inf)

    def add(self, fitting, x, risk, half, M):
        """The outputs x and risks [n] of a look, which count for the images that are `fitting`
        (bool [n]). Weights are in units of that of the least risk: a new least makes all before it
        weigh less."""
        least = torch.where(fitting, torch.minimum(self.least, risk), self.least)
        before = self.weight * half.weights(self.least, least, M)
        now = half.weights(risk, least, M) * fitting
        self.x += (now / (before + now)).view(-1, 1, 1, 1) * (x - self.x)
        self.weight, self.least = before + now, least


def fit_guided(cfg, known, numbers, track=untracked, look=unseen, make=DIPGroup):
    """The stop by the other half: n images x M replicas as one grouped network, which `make` makes,
    fitted until the risk of the replicas' outputs, averaged over iterations, has not fallen for
    `patience` iterations.

    Returns the `LikelyMean` of the outputs at every look [n, C, H, W] and the iterations that each
    image took [n]. `look` is called at each look with the iteration and the outputs; of images
    that have ended, with their results. RuntimeError where a fit leaves the finite numbers."""
    n, C, (H, W), M = len(known.y), known.y.shape[1], known.mask.shape[2:], cfg.replicas
    numbers = replicas_of(numbers, M)
    half = (halves if known.sigma else held_out)(cfg, known, numbers)
    group = make(cfg, numbers, C, H, W, known.y.dtype)
    result = LikelyMean(torch.zeros_like(group.average[::M]))
    A = known.part(torch.arange(n, device=numbers.device).repeat_interleave(M)).A
    best, since = torch.full_like(result.weight, math.inf), torch.zeros_like(numbers[::M])
    took, fitting = torch.zeros_like(since), torch.ones_like(since, dtype=torch.bool)
    advance = Graphed(lambda: group.iterate(half.y_plus, half.fitted, A), numbers.device,
                      cfg.dip_iters)
    for i in track(range(1, cfg.dip_iters + 1), "fit", n * M):
        advance()
        if i % CHECK and i < cfg.dip_iters:
            continue
        # a look at what the replicas' mean is worth
        x = group.average.view(n, M, C, H, W).mean(1).nan_to_num()
        risk = half.risk(A(group.average), M).nan_to_num(math.inf, math.inf)
        result.add(fitting, x, risk, half, M)
        since, best = torch.where(risk < best, 0, since + CHECK), torch.minimum(best, risk)
        ends = fitting & (since >= cfg.patience)  # without a lower risk
        fitting, took = fitting & ~ends, torch.where(ends, i, took)
        finite = (~(fitting | ends) | risk.isfinite()).all()
        finite, goes_on = torch.stack([finite, fitting.any()]).tolist()  # the host waits
        group.require(finite)
        look(i, torch.where(fitting.view(n, 1, 1, 1), x, result.x))
        if not goes_on:
            break
    # `track` may end before all have ended, and even before the first look
    early = (result.weight == 0).view(n, 1, 1, 1)
    x = torch.where(early, group.average.view(n, M, C, H, W).mean(1), result.x)
    return x, torch.where(fitting, i, took)


class Denoiser(nn.Module):
    """What K networks take for the noise of K pictures, [K, C, H, W] -> the same: five 3x3
    convolutions, 32 channels wide. A wider view knows each place again by what surrounds it, and
    learns its noise the sooner. `turned` is done to every kernel."""

    def __init__(self, make, channels, width=32):
        super().__init__()
        sizes = [channels, *[width] * 4, channels]
        self.layers = nn.ModuleList(make.conv(a, b, 3) for a, b in zip(sizes, sizes[1:]))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, u, *turned):
        h = u.flatten(0, 1)[None].contiguous(memory_format=torch.channels_last)  # [1, K C, H, W]
        for layer in self.layers[:-1]:
            h = F.leaky_relu(layer(h, *turned), 0.1)
        return self.layers[-1](h, *turned).contiguous().view_as(u)


DENOISER_ITERS, DENOISER_RATE, DENOISER_WINDOW = 500, 1e-2, 0.97
INNER = 0.8  # a, below
PATCH, DRAWS = 256, 16  # side of the patches by which larger pictures are learned; passes then


def by_patches(H, W):
    """Whether a picture is larger than what `Denoisers` see as a whole."""
    return H * W > 2 * PATCH**2


def denoiser_iters(H, W):
    """By patches twice as many: so a photo of four patches had what it has when seen whole."""
    return DENOISER_ITERS * (1 + by_patches(H, W))


def learns_from_picture(cfg, sigma, H, W):
    """Whether `Denoisers` are fitted: they cannot fill nor enlarge, and need many pixels."""
    return bool(cfg.task == "denoise" and sigma and H * W > 64**2 and min(H, W) >= 8)


class Denoisers(Fits):
    """K networks, each of which learns from its one picture as a DDPM does, by noise that is drawn
    for it, afresh in every iteration. y_plus, whose noise has the level s, is split again: u =
    y_plus + a s e' is what the network sees and v = y_plus - s e' / a what it should say. Their
    noises are independent, as those of `split` (Pang et al. 2021, Recorrupted-to-Recorrupted).
    The least squares to v are then, but for a constant, those to x. Kernels are mirrored and
    transposed at random, all alike, which is as good as to do that to the pictures. With Muon and
    Adam, half a cosine over cfg.dip_iters."""

    def __init__(self, cfg, numbers, C, H, W, dtype, level):
        self.level = level  # s, the noise of y_plus
        net = Denoiser(Grouped(numbers, cfg.seed), C).to(dtype)
        self.rate = torch.zeros((), device=numbers.device)
        inner = [layer.weight for layer in net.layers[1:-1]]
        super().__init__(cfg, numbers, net, inner, self.rate, C, H, W, dtype)

    def noise(self, y, draw):
        """s e' of y's shape."""
        return self.level * kernels.normal(y.shape, self.cfg.seed, self.numbers, draw,
                                           kernels.DIP_JITTER, y.device).to(y.dtype)

    def iterate(self, y, share, A):
        """One step from u to v, see `learn`."""
        eps = self.noise(y, self.steps)
        coins = kernels.uniform((1, 3), self.cfg.seed, 0, self.steps, kernels.DIP_CODE,
                                y.device)[0] < 0.5

        def turned(weight):  # [K Co, Ci, 3, 3]
            weight = torch.where(coins[0], weight.flip(2), weight)
            weight = torch.where(coins[1], weight.flip(3), weight)
            return torch.where(coins[2], weight.mT, weight)

        self.rate.copy_(DENOISER_RATE * half_cosine(self.steps, self.cfg.dip_iters))
        u = y + INNER * eps
        self.learn(u - self.outputs(u, turned), y - eps / INNER, share, A)

    @torch.no_grad()
    def whole(self, y, draw):
        """What an image's networks make, on average, of y [n, C, H, W] of any size under further
        noise, patch by patch. A pixel depends on none that are further away than there are 3x3
        convolutions."""
        n, _, H, W = y.shape
        x, margin = torch.empty_like(y), len(self.net.layers)
        corners = list(itertools.product(range(0, H, PATCH), range(0, W, PATCH)))
        for k, (top, left) in enumerate(corners, self.cfg.dip_iters + draw * len(corners)):
            above, before = min(top, margin), min(left, margin)
            seen = y[..., top - above:top + PATCH + margin, left - before:left + PATCH + margin]
            seen = seen.repeat_interleave(self.K // n, 0)
            u = seen + INNER * self.noise(seen, k)
            made = (u - self.outputs(u)).unflatten(0, (n, -1)).mean(1)[..., above:, before:]
            x[..., top:top + PATCH, left:left + PATCH] = made[..., :PATCH, :PATCH]
        return x


def fit_denoisers(cfg, known, numbers, track=untracked, look=unseen):
    """`fit_guided` of `Denoisers`, or `fit_by_patches`; in --mode guide of no more iterations than
    by default. Channels of one's own pictures whose noises differ plainly, and are not cut off, are
    brought to one level first."""
    size = known.y.shape[2:]
    iters = cfg.dip_iters if cfg.mode == "dip" else min(cfg.dip_iters, denoiser_iters(*size))
    cfg = replace(cfg, dip_iters=iters, window=DENOISER_WINDOW)
    scale = known.y.new_ones(known.y.shape[:2])
    if cfg.pictures == "own":
        levels = noise_level(known.y)
        uneven = levels.amax(1) > 1.3 * levels.amin(1)
        uneven &= (cut_off(known.y).amax(1) < 0.1) & (levels.amin(1) > 0)
        whole = levels.square().mean(1, keepdim=True).sqrt()
        scale = torch.where(uneven[:, None], whole / levels, scale)
    scale = scale[..., None, None]
    make = functools.partial(Denoisers, level=known.sigma * math.sqrt(1 + cfg.alpha**2))
    fit = fit_by_patches if by_patches(*size) else functools.partial(fit_guided, make=make)
    x, took = fit(cfg, known._replace(y=known.y * scale), numbers, track,
                  lambda i, x: look(i, x / scale))
    return x / scale, took


def fit_by_patches(cfg, known, numbers, track=untracked, look=unseen):
    """Large pictures: each iteration of `Denoisers` is about one patch, at a place that is drawn
    for it. Nothing judges, as no judge has ended such a fit early, and so y itself is y_plus.
    Called as `fit_guided`, but there is one look, at the result: the mean of what the networks make
    of the whole under noise of DRAWS draws."""
    n, M, (H, W) = len(known.y), cfg.replicas, known.y.shape[2:]
    w = min(W, max(PATCH, PATCH**2 // H))
    h = min(H, PATCH**2 // w)
    group = Denoisers(cfg, replicas_of(numbers, M), known.y.shape[1], h, w, known.y.dtype,
                      known.sigma)
    patch = torch.zeros_like(group.average)
    share = torch.full_like(patch, 1 / patch[0].numel())
    advance = Graphed(lambda: group.iterate(patch, share, known.A), patch.device, cfg.dip_iters)
    for i in track(range(1, cfg.dip_iters + 1), "fit", n * M):
        place = kernels.uniform((1, 2), cfg.seed, 1, i, kernels.DIP_CODE, "cpu")  # 0 has the coins
        down, right = place[0].tolist()
        top, left = int(down * (H - h + 1)), int(right * (W - w + 1))
        patch.copy_(known.y[..., top:top + h, left:left + w].repeat_interleave(M, 0))
        advance()
        if i % CHECK == 0:
            group.require(group.losses.isfinite().all())
    x = torch.zeros_like(known.y)
    for draw in track(range(1, DRAWS + 1), "denoise", n):
        x.lerp_(group.whole(known.y, draw), 1 / draw)
    group.require(x.isfinite().all())
    look(i, x)
    return x, torch.full_like(numbers, i)


def fit_plain(cfg, known, numbers, track=untracked, look=unseen):
    """A DIP for each image that nothing stops, called as `fit_guided`."""
    took = torch.zeros_like(numbers)

    def seldom(i, _, average):
        took.fill_(i)
        if i % CHECK == 0 or i == cfg.dip_iters:
            look(i, average)
    return fit_dips(cfg, known, numbers, cfg.dip_iters, track, seldom), took


class Follow:
    """PSNR of each image at each look (eval's would wait, to check x): its mean's curve, and each
    image's best look, which only the truth [n, C, H, W] can tell."""

    def __init__(self, truth):
        self.truth, self.looks, self.best = truth, {}, torch.zeros_like(truth)
        self.when = torch.zeros(len(truth), dtype=torch.float64, device=truth.device)
        self.psnr = torch.full_like(self.when, -math.inf)

    def __call__(self, i, rows, x):
        error = x.clamp(0, 1).double() - self.truth[rows]
        psnr = 10 * error.square().mean((1, 2, 3)).reciprocal().log10()
        self.looks.setdefault(i, torch.full_like(self.psnr, math.nan))[rows] = psnr
        up = psnr > self.psnr[rows]
        self.best[rows] = torch.where(up.view(-1, 1, 1, 1), x, self.best[rows])
        self.psnr[rows] = torch.where(up, psnr, self.psnr[rows])
        self.when[rows] = torch.where(up, i, self.when[rows])

    def curve(self):
        """[[iteration, mean PSNR]]; an image that has ended stays where it was."""
        points, last = [], None
        for i, psnr in sorted(self.looks.items()):
            last = psnr if last is None else torch.where(psnr.isnan(), last, psnr)
            points.append([i, last.nanmean().item()])
        return points


class Observed(NamedTuple):
    """What --mode dip and guide start from: the truth [n, C, H, W] in [0, 1], if there is one; the
    images' Measurement, with the sigma that the fit believes; their numbers int64 [n]; what a row
    says of this, and results.json of the data."""

    truth: torch.Tensor | None
    known: Measurement
    numbers: torch.Tensor
    about: dict
    data: dict


def as_they_came(cfg, y):
    """One's own pictures y [n, C, h, w] in [0, 1] -> their Measurement: nothing is added. A noise
    level that is not given is estimated to denoise, for pictures of one source, and else 0.
    ValueError for a mask of another size, or that leaves nothing to do or to go by."""
    factor, sigma = FACTORS.get(cfg.task, 1), cfg.sigma
    mask = torch.ones(len(y), 1, *(factor * side for side in y.shape[2:]), device=y.device)
    if cfg.mask:
        ours, whole = ("x".join(map(str, data.load(path, split="all", limit=1).pixels.shape[:1:-1]))
                       for path in (cfg.mask, cfg.data))
        if ours != whole:
            raise ValueError(f"--mask {cfg.mask}: {ours} pixels, but the picture has {whole}")
        white = load_images(cfg, "all", cfg.mask, 1).pixels.float().mean(1, keepdim=True) / 255
        mask *= (white > 0.95).to(y.device)  # what is grey is in part what is to go
        if mask.mean() in (0, 1):
            raise ValueError(f"--mask {cfg.mask} is all {'white' if mask.any() else 'dark'}: "
                             "white is given, what is darker is filled")
    if sigma is None:
        levels = noise_level(y).square().mean(1).sqrt() if cfg.task == "denoise" else y.new_zeros(1)
        sigma = round(levels.median().item(), 6)
    return Measurement(cfg.task, y * mask if cfg.mask else y, mask, sigma)


def warn_of_noise(y, estimated):
    """A line for what sets the noise of one's own pictures y [n, C, H, W] in [0, 1] apart from that
    which the fit expects, before time is spent."""
    alike, cut = noise_correlation(y).max(), cut_off(y).mean()
    if alike > 0.1:
        say(f"neighbouring pixels have similar noise (correlation {alike:.2f}), as a camera's and "
            "JPEG's filters leave it: it will be taken for the picture. To a smaller --size it is "
            "averaged, and more nearly independent")
    if cut > 0.1 and estimated:
        say(f"{cut:.0%} of the values are black or white, where noise is cut off: it is "
            "underestimated; say --sigma")


def observe(cfg, run):
    """Load one's own pictures, or test images and do to them what --task and --sigma say ->
    Config, Observed."""
    own = cfg.pictures == "own"
    images = load_images(cfg, "all" if own else "test", limit=cfg.samples)
    x = images.pixels.to(run.device).float() / 255
    if own and (x == x[:, :1]).all():  # grey, kept as colour: its noise would be there three times
        x = x[:, :1]
    numbers = torch.arange(len(x), device=run.device)
    known = as_they_came(cfg, x) if own else corrupt(cfg, cfg.task, x, cfg.sigma, numbers)
    estimated = cfg.sigma is None and cfg.task == "denoise"
    about = {"seed": cfg.seed, "task": cfg.task, "sigma" + "_estimate" * estimated: known.sigma}
    n, C, (H, W) = len(x), x.shape[1], known.mask.shape[2:]
    run.precision = pick_precision(cfg.precision, run.device, photos=max(H, W) > 64)
    cfg = resolve(replace(cfg, sigma=known.sigma, precision=run.precision), (n, C, H, W))
    networks = cfg.replicas * min(n, max(1, cfg.dip_group // cfg.replicas))  # fitted together
    learns = learns_from_picture(cfg, known.sigma, H, W)
    fitted = 110 * cfg.dip_width * H * W * (cfg.mode == "guide" or not learns)
    need = networks * max(3100 * learns * min(H * W, 2 * PATCH**2), fitted)  # bytes, as measured
    if run.device.type == "cpu" and need > memory():  # where no error would tell
        raise ValueError(f"a fit of {W}x{H} pixels needs about {need / 2**30:.0f} GiB, more than "
                         f"there are here: {LOWER}")
    cfg = run.begin(cfg)
    if own and learns:
        warn_of_noise(x, estimated)
    given = f", {known.mask.mean():.0%} given" if cfg.mask else ""
    ends = f" or {cfg.minutes:g} minutes" if cfg.minutes else ""
    say(f"data: {images.name}, {n} {cfg.pictures} image{'s' * (n > 1)} of {C}x{H}x{W}; {cfg.task}"
        f"{given}, sigma {known.sigma:.3g}{' (estimated)' * estimated}; at most {cfg.dip_iters} "
        f"iterations{ends}; {run.device}")
    return cfg, Observed(None if own else x, known, numbers, about,
                         {"name": images.name, "train": 0, "test": n, "sha256": images.sha256})


def fit_in_groups(cfg, seen, run, fit, replicas, follow=None):
    """`fit` of any number of images, as many together as dip_group has networks for: outputs
    [n, C, H, W] in [0, 1] and iterations [n]. `follow` is called with the iteration, the rows that
    are fitted and the outputs. After a wish to stop what is not yet fitted stays as it was."""
    x, took = seen.known.back(seen.known.y).clone(), torch.zeros_like(seen.numbers)
    for rows in seen.numbers.split(max(1, cfg.dip_group // replicas)):
        look = (lambda i, x, rows=rows: follow(i, rows, x)) if follow else unseen
        if not run.stop:
            track = functools.partial(run.track, keeps=True)
            x[rows], took[rows] = fit(cfg, seen.known.part(rows), rows, track, look)
    return x.clamp(0, 1), took


def fits_of(cfg, known):
    """{arm: how it is fitted} of --mode guide, or the one of --mode dip."""
    learns = learns_from_picture(cfg, known.sigma, *known.mask.shape[2:])
    if cfg.mode == "dip":
        return {"dip": fit_denoisers if learns else fit_guided}
    fits = {"plain": fit_plain, "split": fit_guided}
    return fits | {"denoiser": fit_denoisers} if learns else fits


def run_fits(cfg, run):
    """--mode guide: `split`, DIPs that are stopped by their risk, and `denoiser`, of noise in
    photos, beside a DIP that nothing stops, `plain`, and its best moment, `oracle`. --mode dip:
    `denoiser` where it applies, else `split`. Where the truth is known PSNR is followed: it rises,
    peaks, and falls back as a network learns the noise (Ulyanov et al. 2018, section 3)."""
    cfg, seen = observe(cfg, run)
    truth, corrupted = seen.truth, seen.known.back(seen.known.y).clamp(0, 1)
    rows, curves, shown = [], {}, {} if truth is None else {"truth": truth[:16]}

    def add(name, x, **more):
        compared = {} if truth is None else measure.measures(x, truth)
        rows.append({"name": name} | seen.about | compared | more)
        shown[name] = x[:16]
        say(describe(rows[-1]))

    add("corrupted", corrupted)
    bound = None  # PSNR of each image at the best moment of a plain DIP
    for name, fit in fits_of(cfg, seen.known).items():
        if run.stop:
            continue
        follow = None if truth is None else Follow(truth)
        networks = 1 if fit is fit_plain else cfg.replicas
        with run.timed("dip", keeps=True) as took:
            x, iterations = fit_in_groups(cfg, seen, run, fit, networks, follow)
        if cfg.mask and not seen.known.sigma:  # what is given exactly is kept
            x = torch.where(seen.known.mask > 0, seen.known.y, x)
        cost = steps_taken(iterations, networks) | {"seconds": took.seconds}
        if follow:  # what stopping elsewhere would have gained
            psnr = measure.psnr(x, truth)
            best = torch.maximum(follow.psnr, psnr)
            bound = best if fit is fit_plain else bound
            cost |= {"psnr_oracle": best.mean().item()} | lack("own_gap", best - psnr)
            cost |= {} if bound is None else lack("gap", bound - psnr)
            curves[f"psnr/{name}"] = follow.curve()
        add(name, x, **cost)
        if name == "plain":
            add("oracle", follow.best.clamp(0, 1), **steps_taken(follow.when, 1))
    for k, image in enumerate(x[:len(x) if truth is None else 16]) if cfg.mode == "dip" else ():
        file = run.folder / f"restored-{k:02}.png"
        measure.save_png(measure.grid(image[None]), file)
        say(f"restored: {file}")
    picture = measure.draw(run.folder / f"{cfg.mode}.png",
                           f"{cfg.task}, sigma = {seen.known.sigma:.3g}", shown)
    note = (f"{run.early} after {iterations.max()} of at most {cfg.dip_iters} iterations; this is "
            "what the fit had by then")
    run.finish({"data": seen.data, "arms": rows, "curves": curves, "pictures": [picture],
                "notes": [note] if run.early else []},
               ("psnr", "ssim") if follow else ("iterations", "seconds"))
    if run.stop:
        raise KeyboardInterrupt(f"{note}; it cannot be continued")
    if run.early:
        say(note)


def steps_taken(iterations, networks):
    """What a fit of [n] iterations took, of so many networks an image."""
    mean = iterations.double().mean().item()
    return {"iterations": mean, "networks": networks, "network_steps": networks * mean}


def lack(name, gap):
    """A gap in dB [n], in the mean and at worst."""
    return {name: gap.mean().item(), f"{name}_worst": gap.max().item()}


# ================================================================== 10 the edge

CHECKPOINT, CHECKPOINT_FORMAT, CHECKPOINT_SECONDS = "checkpoint.pt", 3, 60.0
CHECKPOINT_KEYS = {"data", "shape", "step", "seconds", "rows", "losses", "net", "ema", "muon",
                   "adamw"}

# ------------------------------------------------------------------ pictures and rows


def run_sample(cfg, run):
    """--mode sample: pictures from a finished run's network, from noise; needs no data."""
    saved = load_checkpoint(cfg.resume)
    C, H, W = saved["shape"]
    net = make_unet(cfg, C, run.device)
    load_weights(net, saved["ema"], cfg.resume)
    cfg = run.begin(resolve(cfg, (cfg.samples, C, H, W)))
    net, numbers = run.as_sampled(net), torch.arange(cfg.samples, device=run.device)
    x_init, arms, pictures = noise_start(cfg, (cfg.samples, C, H, W), numbers), [], []
    for nfe, eta in itertools.product(cfg.nfe, cfg.eta):
        with run.timed("sample") as took:
            x = sample(cfg, net, x_init, cfg.timesteps, nfe, eta, numbers)
        arms.append({"name": "ddpm", "seed": cfg.seed, "nfe": nfe, "t_start": cfg.timesteps,
                     "eta": eta, "seconds": took.seconds})
        file = f"samples-nfe{nfe}{f'-eta{eta:g}' * (len(cfg.eta) > 1)}.png"
        picture = measure.grid(((x + 1) / 2).clamp(0, 1).cpu(), scale=measure.zoom(x))
        measure.save_png(picture, run.folder / file)
        pictures.append({"file": file, "caption": f"{len(x)} samples, {nfe} network evaluations, "
                         f"eta = {eta:g}"})
        say(describe(arms[-1]) + f"   {run.folder / file}")
    run.finish({"data": saved["data"], "arms": arms, "curves": {}, "pictures": pictures,
                "parameters": sum(p.numel() for p in net.parameters())})


MODES = {"dip": run_fits, "ddpm": run_prior, "prior": run_prior, "guide": run_fits,
         "sample": run_sample}


def describe(row):
    """One row of results as one line of text."""
    keys = "nfe", "t_start", "eta", "fid_lenet", "recall", "psnr", "ssim", "psnr_oracle", "seconds"
    return f"{row['name']:<12}" + "  ".join(f"{k} {row[k]:.4g}" for k in keys if k in row)


def loss_curves(rows):
    """log.csv's rows -> {"loss/ddpm": [[step, loss], ...]}, each thinned to about 200 points."""
    curves = {}
    for name, step, _, _, loss, _ in rows:
        curves.setdefault(f"loss/{name}", []).append([step, loss])
    return {name: curve[::max(1, len(curve) // 200)] for name, curve in curves.items()}


def write_log(run, rows):
    """log.csv, written whole: rows are few, and a half-written line is impossible."""
    lines = [f"{name},{step},{epoch:.4f},{seconds:.2f},{loss},{lr}\n"
             for name, step, epoch, seconds, loss, lr in rows]
    measure.write_text("network,step,epoch,seconds,loss,lr\n" + "".join(lines),
                       run.folder / "log.csv")


# ------------------------------------------------------------------ command line


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before an error: one line, exit status 2."""

    def __init__(self, **settings):
        super().__init__(**settings)
        measure.print_anything()  # and so may whoever has a command line

    def error(self, message):
        self.exit(2, f"dipddpm: {message}\n")


def flag_name(name):
    return "--" + name.replace("_", "-")


def listed(kind):
    """A reader of lists: listed(int)("3,5") -> (3, 5)."""
    def read(text):
        return tuple(kind(part) for part in text.split(","))
    read.__name__ = f"list of {kind.__name__}"  # which an error says
    return read


def parser():
    """The command line, generated from Config. argument_default=SUPPRESS leaves out absent flags,
    so that the caller can tell a flag that was given from one that was not."""
    p = OneLineParser(prog="dipddpm.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                      description="Deep Image Prior, DDPM and two ways of combining them.")
    groups = {}
    for f in filter(lambda f: f.metadata, fields(Config)):
        m, title = f.metadata, f.metadata["group"]
        groups[title] = groups.get(title) or p.add_argument_group(title)
        choices = None if "of" in m else m.get("choices")  # of a list `check` knows them
        shown = "" if f.default in (None, MISSING) else f" (default {show(f.default)})"
        groups[title].add_argument(
            flag_name(f.name), type=listed(m["of"]) if "of" in m else f.type, choices=choices,
            help=m["help"] + shown, metavar=None if choices else f.name.upper())
    return p


def show(value):
    """(3, 5) -> '3,5': a list as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What a network's meaning, and what its training depends on: resuming may not change these.
NETWORK_FIELDS = ("timesteps", "schedule", "predict", "width")
TRAINING_FIELDS = NETWORK_FIELDS + ("data", "size", "crop", "seed", "epochs", "limit", "batch",
                                    "lr")


def read_config(argv):
    """Command line -> Config. With --resume the saved run's flags are the defaults, and those that
    its network depends on may not differ; --mode sample resumes the newest run unless another is
    named. ValueError says what is wrong."""
    given = vars(parser().parse_args(argv))
    said = set(given)
    if "resume" in given or given.get("mode") == "sample":
        folder = run_folder(given["resume"]) if "resume" in given else newest_run()
        saved = asdict(saved_config(folder))
        mode = given.get("mode", saved["mode"])
        if mode in ("dip", "guide"):
            raise ValueError(f"--resume {folder}: --mode {mode} cannot be continued, only ddpm and "
                             "prior; give its command again, with another --out")
        longer = ", but with --out NEW its weights begin such a run" * (mode != "sample")
        for name in NETWORK_FIELDS if mode == "sample" else TRAINING_FIELDS:
            anew = longer and name == "epochs"
            if given.get(name, saved[name]) != saved[name] and not (anew and "out" in given):
                raise ValueError(f"--resume {folder}: {flag_name(name)} was {saved[name]} and "
                                 f"cannot become {given[name]}{longer if anew else ''}")
        saved |= {"out": None, "samples": None if mode == "sample" else saved["samples"]}
        given = saved | given | {"resume": str(folder)}
    if "mode" not in given:
        raise ValueError("--mode is required: dip, ddpm, prior, guide or sample")
    cfg = resolve(Config(**given))
    longest = steps_at_most(cfg)
    if "nfe" not in said and cfg.mode in ("ddpm", "prior", "sample") and max(cfg.nfe) > longest:
        cfg = replace(cfg, nfe=tuple(n for n in cfg.nfe if n <= longest) or (longest,))
        print(f"dipddpm: --nfe {show(cfg.nfe)}: there are only {longest} steps", file=sys.stderr)
    return check(cfg)


def saved_config(folder):
    """config.json of a run's folder -> its Config; ValueError if it is damaged."""
    path = folder / "config.json"
    try:
        saved = {k: tuple(v) if isinstance(v, list) else v
                 for k, v in json.loads(path.read_text()).items()}
        cfg = Config(**saved)
        for f in fields(cfg):
            value, kinds = getattr(cfg, f.name), {float: (float, int)}.get(f.type, f.type)
            if value != f.default and not isinstance(value, kinds):
                raise ValueError(f"{f.name} cannot be {value!r}")
        return check(resolve(cfg))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error


def resolve(cfg, shape=None):
    """Config -> one without None for what is used: first what the mode decides, then, given the
    shape (N, C, H, W) of the images, what they do."""
    def given(cfg, **defaults):
        return replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})

    fitting = cfg.mode in ("dip", "guide")
    moderate = max(1, round(0.6 * cfg.timesteps))
    own = cfg.mode == "dip" and (cfg.mask or Path(cfg.data).expanduser().is_file())
    cfg = given(cfg, pictures=("own" if own else "test") if fitting else None)
    added = 0.1 if cfg.task == "denoise" else 0.0
    some = {"sample": 64, "dip": 16, "guide": 16}.get(cfg.mode, 1000)
    cfg = given(cfg, sigma=added if cfg.pictures == "test" else None,
                samples=sys.maxsize if cfg.pictures == "own" else some,
                t_start=(moderate,), bridge_start=moderate)
    if shape is None:
        return cfg
    N, _, H, W = shape
    if max(H, W) < 3 and cfg.mode != "ddpm":
        raise ValueError(f"images of {W}x{H} pixels: a DIP, which halves them, needs 3 in one "
                         "direction")
    small, on_cpu = max(H, W) <= 64, pick_device(cfg.device).type == "cpu"
    # a photo's fit ends in minutes on a CPU, where nobody has said how long it is to be
    learns = cfg.mode == "dip" and learns_from_picture(cfg, cfg.sigma, H, W)
    short = fitting and on_cpu and not small and not learns and cfg.dip_iters is None
    iters = 60 if not fitting else denoiser_iters(H, W) if learns else 1000 if small else 3000
    # a larger rate has the better best moment, but as a prior leaves less smooth errors
    rate = 0.05 if small and fitting else 0.01
    return given(replace(cfg, samples=min(cfg.samples, N)), minutes=10.0 if short else None,
                 dip_iters=iters, dip_lr=rate, replicas=2 if learns else 4,
                 dip_width=16 if small or on_cpu else 128, patience=50 if small else 100,
                 muon=fitting and not small,
                 dip_group=64 if small or not fitting else 1)


def check(cfg):
    """Config -> the same Config if every number makes sense; ValueError names the flag if not."""
    for f in fields(cfg):
        name, m, value = flag_name(f.name), f.metadata, getattr(cfg, f.name)
        low, high = m.get("low", -math.inf), min(m.get("high", math.inf), 2**63 - 1)
        for v in value if isinstance(value, tuple) else () if value is None else (value,):
            if isinstance(v, (int, float)) and not low <= v <= high:
                bound = f"at least {low}" if v < low else f"at most {high:g}"
                raise ValueError(f"{name} must be {bound}, not {v}")
            if v not in m.get("choices", (v,)):
                raise ValueError(f"{name} {v} is none of {', '.join(m['choices'])}")
    if cfg.width % 8:
        raise ValueError(f"--width must be a multiple of 8, not {cfg.width}")
    if (cfg.sigma or 0) > 1:
        raise ValueError(f"--sigma {cfg.sigma:g} is more than white, which is 1: of 255 grey values"
                         f" it would be --sigma {cfg.sigma / 255:.3f}; is that meant?")
    if cfg.mode == "guide" and cfg.pictures == "own":
        raise ValueError("--pictures own is for --mode dip: guide compares with the truth")
    filled = cfg.pictures == "own" and cfg.task.startswith("inpaint")
    if bool(cfg.mask) != filled:
        raise ValueError("--mask and --task inpaint belong together for one's own pictures; "
                         "--pictures test makes holes, and compares")
    if max(cfg.t_start) > cfg.timesteps:
        raise ValueError(f"--t-start {max(cfg.t_start)} is beyond T = --timesteps {cfg.timesteps}")
    steps = steps_at_most(cfg)
    if cfg.mode in ("ddpm", "prior", "sample") and max(cfg.nfe) > steps:
        raise ValueError(f"--nfe {max(cfg.nfe)} is more than the {steps} steps from where an arm "
                         "starts (--t-start, --timesteps; the bridge: 0.6 T)")
    return cfg


def steps_at_most(cfg):
    """The most evaluations that every arm can have: a step cannot be shorter than one."""
    if cfg.mode != "prior":
        return cfg.timesteps
    return min(*cfg.t_start, cfg.bridge_start if "bridge" in cfg.dip_source else cfg.timesteps)


def load_images(cfg, split, name=None, limit=None):
    """The images of a split that --data, --size and --crop ask for."""
    return data.load(name or cfg.data, cfg.data_dir, split, limit, cfg.size, cfg.crop)


# ------------------------------------------------------------------ a run, its folder, checkpoints


class Run:
    """What surrounds the mathematics: a folder, a device, a precision, clocks, a wish to stop."""

    def __init__(self, cfg, argv):
        join_processes(cfg)
        self.cfg, self.command = cfg, "python dipddpm.py " + shlex.join(argv)
        self.device = pick_device(cfg.device)
        self.precision = pick_precision(cfg.precision, self.device)
        torch.backends.cudnn.allow_tf32 = False  # else float32's convolutions keep 10 bits
        self.seconds = dict.fromkeys(("dip", "train", "sample", "eval", "total"), 0.0)
        self.stop = 0  # the number of the signal that asked for it
        self.foretold, self.early = False, None  # what has been said, and why a fit ended early
        self.begun, self.about = False, {}
        continues = cfg.resume and cfg.mode in ("ddpm", "prior")
        self.folder = of_the_first(Path(cfg.resume) if continues and not cfg.out
                                   else new_folder(cfg))
        self.fresh = not continues or bool(cfg.out)
        self.saved = {name: load_checkpoint(cfg.resume, name) for name in ("ddpm", *BRIDGES)
                      if continues and (Path(cfg.resume) / checkpoint_name(name)).exists()}
        self.began = time.time() - sum(saved["seconds"] for saved in self.saved.values())

    def begin(self, cfg, about=None, shape=None):
        """Make the folder: not before the input is known to be good, so that misuse leaves none.
        Returns the Config, which config.json then holds."""
        for saved in self.saved.values():
            if saved["data"] != about:
                raise ValueError(f"--resume {cfg.resume}: the data was {saved['data']}, now "
                                 f"{about}")
        if about and processes()[1] > min(cfg.batch, about["train"]):
            raise ValueError(f"--batch {cfg.batch} is too small for as many processes")
        self.cfg, self.about = replace(cfg, out=str(self.folder)), {"data": about, "shape": shape}
        if processes()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            measure.write_json(asdict(self.cfg), self.folder / "config.json", digits=17)
            for name, saved in self.saved.items() if self.fresh else ():
                save(saved, self.folder / checkpoint_name(name))
        self.begun = True
        return self.cfg

    def begin_anew(self):
        """The saved run's weights begin a training of other --epochs, in a folder of its own."""
        for saved in self.saved.values():
            saved.update(step=0, rows=[], losses=[], seconds=0.0)
        self.began = time.time()

    def autocast(self):
        """bf16 inside the U-Net where asked for; the mathematics around it stays float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16")

    def as_sampled(self, net):
        """The trained U-Net, itself, with weights in what it calculates in: nothing is cast anew in
        each evaluation."""
        return net.eval().to(torch.bfloat16 if self.precision == "bf16" else torch.float32)

    @contextlib.contextmanager
    def timed(self, part=None, keeps=False):
        """`with run.timed("dip") as took: ...`: then took.seconds, which the run's are added to.
        KeyboardInterrupt if somebody asked to stop, unless what was done is kept."""
        took, began = SimpleNamespace(), time.time()
        yield took
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took.seconds = time.time() - began
        if part:
            self.seconds[part] += took.seconds
        if self.stop and not keeps:
            raise KeyboardInterrupt

    def track(self, steps, label, per_step, keeps=False):
        """`steps`, a range, one after the other, with a line of progress. If somebody asked to stop
        KeyboardInterrupt; or, where what is done so far is kept, their end, as also when --minutes
        are spent. Of the first long fit it says how long that takes."""
        began, limit = time.time(), keeps and self.cfg.minutes or math.inf
        ends = f"or after {limit:g} minutes" * (limit < math.inf)
        for step in progress(steps, label, len(steps), per_step, note=lambda: ends):
            yield step
            if not keeps:
                if self.stop:
                    raise KeyboardInterrupt
                continue
            minutes = (time.time() - began) / 60
            whole = min(minutes / step * len(steps), limit)
            if not self.foretold and whole > 1 and (step == CHECK or minutes > 1 / 6):
                self.foretold = True
                say(f"a fit takes at most {whole:.0f} minutes, {60 * minutes / step:.2g} s an "
                    "iteration; --minutes, --dip-iters, --replicas, --dip-width, --size and --crop "
                    "change that")
            if self.stop or minutes >= limit and step < len(steps):
                self.early = "interrupted" if self.stop else f"{limit:g} minutes are spent"
                return

    def continue_training(self, name, parts):
        """Give networks and optimisers what a checkpoint holds of them, or leave them at their
        beginning: -> steps done, rows, losses since the last row, clock."""
        saved = self.saved.get(name, {"step": 0, "rows": [], "losses": [], "seconds": 0.0})
        began = time.time() - saved["seconds"]
        for part in parts if name in self.saved else ():
            load_weights(parts[part], saved[part], "checkpoint")
        # they are the first process's: several would add them up
        losses = [loss.to(self.device) for loss in saved["losses"] if processes()[0] == 0]
        return saved["step"], list(saved["rows"]), losses, lambda: time.time() - began

    def save_training(self, name, parts, step, rows, losses, seconds):
        if processes()[0] == 0:
            save({"format": CHECKPOINT_FORMAT, "step": step, "rows": rows, "losses": losses,
                  "seconds": seconds, **self.about}
                 | {key: part.state_dict() for key, part in parts.items()},
                 self.folder / checkpoint_name(name))

    def finish(self, result, keys=("fid_lenet", "psnr")):
        """Write results.json and report.html, print the table, say where they are."""
        self.seconds["total"] = time.time() - self.began
        measure.write_json({
            "mode": self.cfg.mode, "config": asdict(self.cfg), "command": self.command,
            "device": device_name(self.device), "precision": self.precision,
            "torch": torch.__version__, "commit": commit(), "seconds": self.seconds} | result,
            self.folder / "results.json")
        measure.report(self.folder)
        say(f"report: {self.folder / 'report.html'}")
        say(measure.text_tables([self.folder], keys))


def new_folder(cfg):
    """--out, or a new name in runs/. A folder that holds something is never written to."""
    stem = Path(cfg.data).stem or "data"
    folder = Path(cfg.out) if cfg.out else Path("runs") / (
        f"{cfg.mode}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}-seed{cfg.seed}")
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():  # a file, or a link to nothing
            raise ValueError(f"--out {folder}: {path} is no folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} exists and is not empty; name another, or --resume it")
    return folder


def run_folder(path):
    """--resume's folder, given as itself or as its checkpoint.pt; ValueError if it is no run."""
    folder = Path(path).parent if Path(path).name == CHECKPOINT else Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--resume {path}: no run there (no {folder / 'config.json'})")
    return folder


def newest_run():
    """The run in runs/ with the newest checkpoint."""
    found = sorted(Path("runs").glob(f"**/{CHECKPOINT}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("--mode sample needs a trained network: none in runs/; train one with "
                         "--mode ddpm or name a run with --resume")
    return found[-1].parent


def save(content, path):
    """torch.save to a file that is there as a whole or as it was."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    measure.write_bytes(path, buffer.getbuffer())


def checkpoint_name(network):
    return CHECKPOINT if network == "ddpm" else f"{network}.pt"


def load_checkpoint(folder, network="ddpm"):
    """A checkpoint's content, tensors and plain values only: "format" and CHECKPOINT_KEYS.
    FileNotFoundError, or ValueError in one line if it is not one of ours."""
    path = Path(folder) / checkpoint_name(network)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint there")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads it into
        raise ValueError(f"{path}: not a readable checkpoint "
                         f"({type(error).__name__})") from error
    if (not isinstance(saved, dict) or saved.get("format") != CHECKPOINT_FORMAT
            or not saved.keys() >= CHECKPOINT_KEYS):
        raise ValueError(f"{path}: not a checkpoint of format {CHECKPOINT_FORMAT}")
    return saved


def load_weights(module, state, where):
    """load_state_dict; ValueError, naming `where` they are from, for another architecture."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: its network has another architecture: "
                         f"{str(error).splitlines()[-1].strip()}") from error


# ------------------------------------------------------------------ processes and progress


def processes():
    """(this process's number, how many train together): torchrun starts many. Each trains on its
    part of a batch; the first alone samples, measures, writes and speaks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(cfg):
    """Meet the other processes if torchrun started this one: by NCCL on CUDA, by gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if cfg.mode not in ("ddpm", "prior"):
        raise ValueError(f"--mode {cfg.mode} runs in one process, without torchrun")
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {cfg.device}: torchrun gives each process a device of its own")
    local, device = int(os.environ.get("LOCAL_RANK", 0)), None
    if cfg.device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than the {torch.cuda.device_count()}"
                             " GPUs here; lower --nproc-per-node or say --device cpu")
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    dist.init_process_group("nccl" if device else "gloo", device_id=device)


def of_the_first(value):
    """The first process's value, in each: two may read different clocks."""
    box = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(box)
    return box[0]


def total(number, device):
    """The sum of the processes' numbers, in each."""
    if processes()[1] > 1:
        number = torch.tensor(number, device=device)
        dist.all_reduce(number)
    return float(number)


def say(line):
    if processes()[0] == 0:
        print(line, flush=True)


def progress(items, label, steps, per_step, done=0, note=str):
    """The items, one for each step from `done` on; meanwhile a line that rewrites itself on a
    terminal, a new one each half minute elsewhere: done of all steps, rate in images (or fits x
    iterations) a second, time left, and what `note` says."""
    start, live = time.time(), sys.stdout.isatty()
    shown = 0.0 if live else start
    try:
        for at, item in enumerate(items, done + 1):
            yield item
            now = time.time()
            if processes()[0] or at < steps and now - shown < (0.2 if live else 30):
                continue
            shown, rate = now, (at - done) / max(now - start, 1e-9)
            left = round((steps - at) / rate)
            line = (f"{label}: {at}/{steps}  {rate * per_step:.0f}/s  "
                    f"{left // 60}:{left % 60:02d} left  {note()}")
            print(f"\r{line:<78}" if live else line, end="" if live else "\n", flush=True)
    finally:  # done, stopped or interrupted: the terminal's line is over
        if live and shown:
            print()


# ------------------------------------------------------------------ devices


def pick_device(name):
    """--device, or CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: cpu, cuda, or cuda:1 and so on; no others have float64 "
                         "and all that is needed here")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def about_cpu(key):
    """A line of /proc/cpuinfo, where there is one: its first value of `key`, or ''."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(key):
                return line.split(":")[1].strip()
    return ""


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = about_cpu("model name") or f"{platform.machine()} CPU"
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def pick_precision(name, device, photos=False):
    """--precision, or bf16 where there are matrix units for it, for photos' fits any units:
    elsewhere it is slowly emulated."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    units = ("amx_bf16", "avx512_bf16")[:1 + photos]
    return "bf16" if any(unit in about_cpu("flags") for unit in units) else "fp32"


class Graphed:
    """`work`, a function of nothing that returns nothing, to be called `calls` times. On CUDA the
    first three calls run as they are and allocate what lasts; the fourth is recorded as one CUDA
    graph, which is replayed from then on: one launch for hundreds of kernels, and nothing that the
    host waits for. What changes between calls must lie in tensors that `work` reads and writes in
    place. A call is a call elsewhere, where there are too few to repay the recording, where the
    references, which may wait, stand in for the kernels, and among several processes."""

    def __init__(self, work, device, calls):
        self.work, self.calls, self.graph = work, 0, None
        records = calls >= 20 and kernels.rng.fused(device) and processes()[1] == 1
        self.stream = torch.cuda.Stream(device) if records else None
        # Adam's word about the calls before the recording
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")

    def __call__(self):
        if self.stream is None:
            return self.work()
        self.calls += 1
        if self.calls <= 3:
            current = torch.cuda.current_stream(self.stream.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self.work()
            return current.wait_stream(self.stream)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.work()
        self.graph.replay()


def at_once(x):
    """How many images of x's size [n, C, H, W] are sampled together: as many as a CPU's cache or,
    eight times as many, a GPU's smaller memories hold."""
    return max(1, (2000 if x.is_cuda else 250) * 28 * 28 // x[0, 0].numel())


LOWER = "lower --size, --crop, --dip-width or --replicas"


def memory():
    """Bytes of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def keep_freed_memory():
    """Ask glibc to keep freed blocks for the next step instead of returning them to the kernel,
    which would zero each page again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def commit():
    """The commit that the code was at, with a + if changed since; None outside a checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------ main


def main(argv=None):
    """The command line. Exit status: 0 done, 1 the run failed, 2 misuse or bad input, 130 or 143
    interrupted by SIGINT or SIGTERM (after a checkpoint)."""
    argv, run = sys.argv[1:] if argv is None else argv, None
    keep_freed_memory()

    def stop_soon(number, _):
        """First signal: at the next safe place. Second: at once."""
        stopped, run.stop = run.stop, number
        if stopped:
            raise KeyboardInterrupt

    status = 0
    try:
        cfg = read_config(argv)
        run = Run(cfg, argv)
        if run.saved and saved_config(run_folder(cfg.resume)).epochs != cfg.epochs:
            run.begin_anew()
        main_thread = threading.current_thread() is threading.main_thread()  # signals are its own
        before = {number: signal.signal(number, stop_soon)
                  for number in (signal.SIGINT, signal.SIGTERM) if main_thread}
        try:
            MODES[cfg.mode](cfg, run)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (MemoryError, RuntimeError) as error:
        status, said = 1, str(error)
        full = "out of memory", "allocate memory", "enough memory"
        if isinstance(error, MemoryError) or any(words in said for words in full):
            fits = run and run.cfg.mode in ("dip", "guide")
            said = "out of memory: " + (LOWER if fits else "lower --batch in training, --samples "
                                        "after it")
        elif isinstance(error, dist.DistError) or "gloo" in said:
            said = "another process ended"
    except (ValueError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        status, said = 1 if full or run and run.begun else 2, str(error)
    except KeyboardInterrupt as stopped:
        status = 128 + (run.stop if run and run.stop else signal.SIGINT)
        said = str(stopped) or "interrupted"
    if status:
        goes_on = run and run.begun and run.cfg.mode in ("ddpm", "prior")
        if goes_on and said in ("interrupted", "another process ended"):
            said += f"; continue with --resume {run.folder}"
        print("dipddpm:", (said.splitlines() or ["failed"])[0], file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
