"""Deep Image Prior, DDPM and both ways of combining them, to be read from top to bottom.

    python dipddpm.py --mode prior --epochs 30    train a DDPM, start it from noise and from DIPs
    python dipddpm.py --mode ddpm                 the DDPM alone
    python dipddpm.py --mode dip --sigma 0.2      denoise images by DIPs that know when to stop
    python dipddpm.py --mode guide --sigma 0.2    that stop beside others and beside the best moment
    python dipddpm.py --mode sample               new images from the newest trained network

Papers      Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol & Dhariwal 2021 (cosine),
            Salimans & Ho 2022 (v), Hang et al. 2023 (min-SNR), Lu et al. 2022 (DPM-Solver++),
            Wang, Yu & Zhang 2023 (DDNM), Ulyanov et al. 2018 (DIP), Bojanowski et al. 2018 (codes),
            Wang, Li et al. 2023 (ES-WMV).
Notation    x_0 image, x_t noised image, eps noise, alpha_bar_t (ab) = prod (1 - beta), T steps,
            z and theta a DIP's input and weights; *_hat is predicted.
Index       code index t = 0 ... T-1 is the papers' t + 1: alpha_bar[t] belongs to x after t + 1
            noise steps. Whatever counts steps (t_start, a grid's tau) runs from T to 0 and asks the
            network at t = tau - 1; tau = 0 is the clean image, where alpha_bar is 1.
Ranges      images are in [-1, 1] inside the diffusion, in [0, 1] inside DIP and every metric.
Contents    Config and command line - schedule and tables - U-Net - DIP networks - DDPM training -
            sampling - DIP fitting - network, codes - method 1: priors, restoration, curves -
            method 2: guide - other runs - results and pictures - main. Processes, folders,
            checkpoints and devices are in edge.py
"""

import argparse
import copy
import csv
import errno
import io
import itertools
import math
import signal
import statistics
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import edge
import eval as measure
import kernels

CHECKPOINT_SECONDS = 60.0
SAMPLE_BATCH = 250  # images that go through the sampler together: larger leaves the CPU's cache
SAMPLE_BATCH_CUDA = 2000

# ------------------------------------------------------------------ Config and command line


def flag(default, help, group, choices=None, low=None, high=None, type=None, action=None):
    """One line of Config is one flag: its default, help, group, choices, limits and, where it is
    not one value, the type that reads it or argparse's action."""
    return field(default=default, metadata=dict(help=help, group=group, choices=choices, low=low,
                                                high=high, type=type, action=action))


def listed(kind, *known):
    """A reader of lists: listed(int)("3,5") -> (3, 5); an error tells what is wrong."""
    def read(text):
        try:
            found = tuple(kind(part) for part in str(text).split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of {kind.__name__}") from None
        for name in found:
            if known and name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return found
    return read


@dataclass(frozen=True)
class Config:
    """Every tunable of a run. None means: chosen from the data and the mode where it is used."""

    mode: str = flag(MISSING, "what to do", "run", ("dip", "ddpm", "prior", "guide", "sample"))
    data: str = flag("auto", "auto, mnist, fashion, cifar10, stl10, digits, or a path: one image, "
                     "a folder of images, or a folder of four IDX files", "run")
    data_dir: str = flag(None, "where data sets live (or DIPDDPM_DATA)", "run")
    size: int = flag(None, "resize each image: its shorter side to N pixels", "run", low=7)
    crop: int = flag(None, "then take its middle N x N pixels", "run", low=7)
    seed: int = flag(0, "seed of every random number of the run", "run", low=0)
    device: str = flag(None, "cpu, cuda, cuda:1, ...; automatic when absent", "run")
    precision: str = flag("auto", "networks' arithmetic; auto is bf16 where the hardware has "
                          "matrix units for it", "run", ("auto", "fp32", "bf16"))
    out: str = flag(None, "folder for results (default: a new one in runs/, or --resume's)", "run")
    resume: str = flag(None, "folder of a run to continue; with --out, its networks are taken and "
                       "it stays as it is", "run")
    overwrite: bool = flag(False, "first remove the run that --out holds", "run",
                           action="store_true")
    sweep: tuple = flag((), "NAME=V1,V2,...: one run for each value of a flag; repeated, for each "
                        "combination; given again with the same --out, only what is missing", "run",
                        action="append")

    epochs: int = flag(30, "passes over the training data", "training", low=1)
    limit: int = flag(None, "use only the first N training images", "training", low=1)
    batch: int = flag(128, "images in a training step", "training", low=1)
    lr: float = flag(2e-3, "AdamW's peak learning rate", "training", low=0)
    timesteps: int = flag(1000, "T, the number of noise steps", "training", low=2,
                          high=100_000)
    schedule: str = flag("cosine", "noise schedule", "training", ("linear", "cosine"))
    predict: str = flag("v", "what the network predicts", "training", ("eps", "v", "x0"))
    width: int = flag(32, "channels of the U-Net's upper level", "training", low=8)
    train: tuple = flag(("full",), "networks of the arms with a prior, a list. full: that of the "
                        "noise start; truncated: one that learns t < t_start only; smoothed: one "
                        "that learns DIP outputs instead of images", "training",
                        type=listed(str, "full", "truncated", "smoothed"))
    snapshots: int = flag(0, "averaged weights kept so many times during training, for curves of "
                          "convergence", "training", low=0)

    dip_source: tuple = flag(("images", "codes"), "images: one DIP for each image; network: one, "
                             "from image to image, for all; codes: one decoder for all, new images "
                             "from new codes; a list", "prior",
                             type=listed(str, "images", "network", "codes"))
    dip_arch: str = flag(None, "a DIP's network (skip; --dip-source network: autoencoder)", "prior",
                         ("skip", "conv2", "autoencoder", "resnet18"))
    dip_width: int = flag(None, "DIP's channels (images: 16 up to 64 pixels, else 128; network: 64;"
                          " codes: 32)", "prior", low=1)
    dip_iters: int = flag(None, "iterations of each DIP fit (images: 60; network: 300; codes: 3 "
                          "passes; a restoration: 300; dip and guide: at most 1000, or 3000 above "
                          "64 pixels)", "prior", low=1)
    dip_lr: float = flag(None, "Adam's learning rate in a DIP fit to one image (0.01; dip and "
                         "guide: 0.05 up to 64 pixels)", "prior", low=0)
    window: float = flag(0.95, "decay of the average of a DIP's outputs", "prior", low=0)
    rungs: int = flag(5, "rungs of the ladder", "guide", low=1, high=1000)
    replicas: int = flag(4, "networks for each image", "guide", low=1)
    alpha: float = flag(0.35, "noise that is added to the half that is fitted, in sigma", "guide",
                        low=0.01, high=100)
    patience: int = flag(None, "iterations without a lower risk that end a rung (50 up to 64 "
                         "pixels, else 200)", "guide", low=1)
    dip_group: int = flag(64, "DIPs that are fitted together", "prior", low=1)

    task: tuple = flag(("generate",), "generate new images, or restore test images, a list: "
                       "denoise, inpaint (half of the pixels), inpaint-box (a centre box), sr (two "
                       "times), sr-4", "sampling",
                       type=listed(str, "generate", "denoise", "inpaint", "inpaint-box", "sr",
                                   "sr-4"))
    t_start: tuple = flag(None, "steps of noise on a prior (default 0.6 T); a list", "sampling",
                          low=1, type=listed(int))
    nfe: tuple = flag((3, 5, 10, 20, 50), "network evaluations, a list", "sampling", low=1,
                      type=listed(int))
    eta: tuple = flag((0.0,), "0 is DDIM, 1 is DDPM's ancestral sampler; a list", "sampling", low=0,
                      high=1, type=listed(float))
    order: tuple = flag((2,), "order of the sampler: 2 is DPM-Solver++(2M), where eta is 0; "
                        "elsewhere it is 1; a list", "sampling", low=1, high=2, type=listed(int))
    grid: tuple = flag(("uniform",), "spacing of the sampler's times: uniform, quadratic, logsnr; "
                       "a list", "sampling", type=listed(str, "uniform", "quadratic", "logsnr"))
    samples: int = flag(None, "images made or fitted (1000; sample: 64; dip, guide: 16; a "
                        "restoration: 256)", "sampling", low=1)
    sigma: float = flag(None, "noise that is added to images in [0, 1], by --mode dip and guide "
                        "and by tasks (0.1; inpaint and sr: 0)", "sampling", low=0, high=100)
    noise: str = flag("given", "dip, guide: given: --sigma is added, and known to the fit; "
                      "estimated: added, but the fit must find out; own: nothing is added, the "
                      "images are noisy already (dip only)", "guide",
                      ("given", "estimated", "own"))
    arms: tuple = flag(("plain", "mean", "split", "ladder", "literal"), "arms of --mode guide, a "
                       "list; the gap to the oracle needs plain", "guide",
                       type=listed(str, "plain", "mean", "split", "ladder", "literal"))


SMOOTHERS = {"images", "network"}  # DIP sources that turn a training image into a DIP's output
# What a network's meaning, and what its training depends on: resuming may not change these.
NETWORK_FIELDS = ("timesteps", "schedule", "predict", "width")
TRAINING_FIELDS = NETWORK_FIELDS + ("data", "size", "crop", "seed", "epochs", "limit", "batch",
                                    "lr")


class OneLineParser(argparse.ArgumentParser):
    """argparse without the page of usage before an error: one line, exit status 2."""

    def error(self, message):
        self.exit(2, f"dipddpm: {message}\n")


def parser():
    """The command line, generated from Config. argument_default=SUPPRESS leaves out absent flags,
    so that the caller can tell a flag that was given from one that was not."""
    p = OneLineParser(prog="dipddpm.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                      description=__doc__.split("\n")[0])
    names = dict.fromkeys(f.metadata["group"] for f in fields(Config))
    groups = {name: p.add_argument_group(name) for name in names}
    for f in fields(Config):
        m = f.metadata
        group, name = groups[m["group"]], "--" + f.name.replace("_", "-")
        if m["action"]:
            group.add_argument(name, action=m["action"], help=m["help"])
            continue
        shown = "" if f.default in (None, MISSING) else f" (default {show(f.default)})"
        group.add_argument(name, type=m["type"] or f.type, choices=m["choices"],
                           help=m["help"] + shown,
                           metavar=None if m["choices"] else f.name.upper())
    return p


def show(value):
    """(3, 5) -> '3,5': a list as it is written on the command line."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_config(argv):
    """Command line -> Config. With --resume the saved run's flags are the defaults, and those that
    its networks depend on may not differ; --mode sample resumes the newest run unless another is
    named. ValueError says what is wrong."""
    given = vars(parser().parse_args(argv))
    if "resume" in given or given.get("mode") == "sample":
        folder = edge.run_folder(given["resume"]) if "resume" in given else edge.newest_run()
        saved = read_saved_flags(folder)
        sampling = given.get("mode", saved["mode"]) == "sample"
        for name in NETWORK_FIELDS if sampling else TRAINING_FIELDS:
            if name in given and given[name] != saved[name]:
                raise ValueError(f"--resume {folder}: --{name.replace('_', '-')} was {saved[name]} "
                                 f"and cannot become {given[name]}")
        saved |= {"out": None, "overwrite": False}
        if sampling:
            saved["samples"] = None
        given = saved | given | {"resume": str(folder)}
    if "mode" not in given:
        raise ValueError("--mode is required: dip, ddpm, prior, guide or sample")
    return check(Config(**given))


def read_saved_flags(folder):
    """config.json -> the flags of the run that wrote it; ValueError if it is damaged."""
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in edge.saved_flags(folder).items()}
    try:
        for f in fields(Config):  # what is a list now was one value in earlier versions
            if f.metadata["type"] and isinstance(saved.get(f.name), (str, int, float)):
                saved[f.name] = f.metadata["type"](saved[f.name])
        return asdict(check(Config(**saved)))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged or of another version: "
                         f"{error}") from error


def check(cfg):
    """Config -> the same Config if every number makes sense; ValueError names the flag if not."""
    for f in fields(cfg):
        name, m, values = "--" + f.name.replace("_", "-"), f.metadata, getattr(cfg, f.name)
        for value in values if isinstance(values, tuple) else () if values is None else (values,):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, not {value}")
            if m["low"] is not None and value < m["low"]:
                raise ValueError(f"{name} must be at least {m['low']}, not {value}")
            if isinstance(value, int) and value >= 2**63:
                raise ValueError(f"{name} must be below 2^63, not {value}")
            if m["high"] is not None and value > m["high"]:
                raise ValueError(f"{name} must be at most {m['high']}, not {value}")
            if m["choices"] and value not in m["choices"]:  # a saved run's: of another version
                raise ValueError(f"{name} {value} is none of {', '.join(m['choices'])}")
    for name in ("lr", "dip_lr"):
        if getattr(cfg, name) == 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    if cfg.width % 8:
        raise ValueError(f"--width must be a multiple of 8, not {cfg.width}")
    if cfg.window >= 1:
        raise ValueError(f"--window must be below 1, not {cfg.window:g}")
    if "smoothed" in cfg.train and not SMOOTHERS & set(cfg.dip_source):
        raise ValueError("--train smoothed needs --dip-source network or images: it learns what a "
                         "DIP makes of the training images")
    if cfg.mode == "guide" and cfg.replicas == 1 and cfg.arms == ("mean",):
        raise ValueError("--arms mean needs --replicas of at least 2: of one it is plain")
    if cfg.noise != "given" and {*cfg.task} - {"generate", "denoise"}:
        raise ValueError(f"--noise {cfg.noise} needs --task denoise: no noise level can be told "
                         f"from {show(cfg.task)}")
    if cfg.noise == "own" and (cfg.mode != "dip" or cfg.sigma is not None):
        raise ValueError("--noise own is for --mode dip without --sigma: there is no truth to "
                         "compare with, and no noise to add")
    if cfg.overwrite and not cfg.out:
        raise ValueError("--overwrite needs --out: the folder to empty")
    starts = steps_of_prior(cfg)
    if max(starts) > cfg.timesteps:
        raise ValueError(f"--t-start {max(starts)} is beyond T = --timesteps {cfg.timesteps}")
    start = min(starts) if cfg.mode == "prior" else cfg.timesteps
    if cfg.mode != "dip" and max(cfg.nfe) > start:
        raise ValueError(f"--nfe {max(cfg.nfe)} is above --t-start {start}: "
                         "a step cannot be shorter than one")
    return cfg


def steps_of_prior(cfg):
    """Each t_start, the steps of noise that are put on a prior; 0.6 T unless they are given."""
    return cfg.t_start if cfg.t_start is not None else (max(1, round(0.6 * cfg.timesteps)),)


def samplers(cfg, noisy=False):
    """Every (eta, order, grid) that was asked for; the second order is for steps without noise."""
    return list(dict.fromkeys((eta, 1 if eta or noisy else order, grid) for eta in cfg.eta
                              for order in cfg.order for grid in cfg.grid))


# ------------------------------------------------------------------ schedule and tables


class Schedule(NamedTuple):
    """alpha_bar: float64 [T], the share of the image's variance that is left after t + 1 steps."""

    alpha_bar: torch.Tensor

    @property
    def T(self):
        return len(self.alpha_bar)

    def at(self, tau):
        """alpha_bar after tau steps, float64; tau = 0 is the clean image."""
        return 1.0 if tau == 0 else self.alpha_bar[tau - 1].item()


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


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}

# The three things that a network can be asked for, as (target, its inverse, min-SNR weight), each
# of alpha_bar `ab`. target = p x_0 + q eps; x_0 = a x_t + b target; Hang et al. 2023, gamma = 5,
# with S = ab / (1 - ab) the signal-to-noise ratio.
GAMMA = 5.0


def predict_eps(ab):
    """eps itself (Ho et al. 2020, eq. 12); x_0 = (x_t - sqrt(1-ab) eps) / sqrt(ab) (eq. 15)."""
    S = ab / (1 - ab)
    return (0 * ab, 0 * ab + 1), (ab**-0.5, -((1 / ab - 1) ** 0.5)), S.clamp(max=GAMMA) / S


def predict_v(ab):
    """v = sqrt(ab) eps - sqrt(1-ab) x_0; x_0 = sqrt(ab) x_t - sqrt(1-ab) v (Salimans & Ho 2022)."""
    S = ab / (1 - ab)
    signal, noise = ab**0.5, (1 - ab) ** 0.5
    return (-noise, signal), (signal, -noise), S.clamp(max=GAMMA) / (S + 1)


def predict_x0(ab):
    """x_0 itself."""
    return (0 * ab + 1, 0 * ab), (0 * ab, 0 * ab + 1), (ab / (1 - ab)).clamp(max=GAMMA)


PREDICTIONS = {"eps": predict_eps, "v": predict_v, "x0": predict_x0}


def forward_table(schedule, predict):
    """What training needs at each t: float32 [T, 5] with columns (signal, noise, p, q, weight), in
    x_t = signal x_0 + noise eps (Ho et al. 2020, eq. 4) and
    loss = weight (out - (p x_0 + q eps))^2. Combined in float64, cast last."""
    ab = schedule.alpha_bar
    (p, q), _, weight = PREDICTIONS[predict](ab)
    return torch.stack([ab.sqrt(), (1 - ab).sqrt(), p, q, weight], dim=1).float()  # [T, 5]


def uniform_times(schedule, t_start, nfe):
    """Uniform in t: nfe step counts, not rounded, from t_start down."""
    return [t_start * (nfe - i) / nfe for i in range(nfe)]


def quadratic_times(schedule, t_start, nfe):
    """Uniform in sqrt(t) (Song et al. 2021, D.2)."""
    return [t_start * ((nfe - i) / nfe) ** 2 for i in range(nfe)]


def logsnr_times(schedule, t_start, nfe):
    """Uniform in the log signal-to-noise ratio, down to one step (Lu et al. 2022, DPM-Solver)."""
    snr = schedule.alpha_bar[:t_start].logit()
    even = torch.linspace(snr[-1], snr[0], nfe, dtype=snr.dtype) if nfe > 1 else snr[-1:]
    return [1 + (snr - v).abs().argmin().item() for v in even]


GRIDS = {"uniform": uniform_times, "quadratic": quadratic_times, "logsnr": logsnr_times}


def time_grid(schedule, t_start, nfe, grid="uniform"):
    """nfe + 1 step counts from t_start to 0, both ends exact and none repeated, as near to what the
    grid asks for as that allows. 1 <= nfe <= t_start."""
    assert nfe <= t_start, f"{nfe} evaluations in {t_start} steps"
    taus = [t_start]
    for i, tau in enumerate(GRIDS[grid](schedule, t_start, nfe)[1:], 1):
        taus.append(max(nfe - i, min(taus[-1] - 1, round(tau))))  # nfe - i steps are left below
    return [*taus, 0]


def reverse_table(schedule, predict, taus, eta):
    """The numbers of each reverse step from taus[i] to taus[i + 1]: float32 [S, 7] with columns
    (a, b, c0, ct, sigma, k, w) in

        x0_hat = clip(a x_t + b out, -1, 1),    x_s = c0 x0_hat + ct x_t + sigma z.

    This is Song et al. 2021 (DDIM), eq. 12, with sigma from eq. 16 and eps_hat eliminated. With
    eta = 1 and s = t - 1 it is DDPM's posterior (Ho et al. 2020, eq. 6-7); with eta = 0, DDIM. In
    float32 the difference 1 - ab would lose four digits at small t: hence float64, cast last.

    k = h / (2 h_previous), h the step in half the log signal-to-noise ratio, is for the second
    order, where x0_hat + k (x0_hat - x0_hat_previous) takes x0_hat's place (Lu et al. 2022,
    DPM-Solver++(2M)); it is 0 at the first step and, where h is infinite, at the last. w =
    sqrt(ab_s) is x0_hat's share in x_s where eps_hat stays: what a restoration changes x0_hat by
    arrives in x_s times w."""
    rows, h_previous = [], math.inf
    for tau, next_tau in zip(taus, taus[1:]):
        ab_t, ab_s = schedule.at(tau), schedule.at(next_tau)
        sigma = eta * math.sqrt((1 - ab_s) / (1 - ab_t)) * math.sqrt(1 - ab_t / ab_s)
        ct = math.sqrt(max(0.0, 1 - ab_s - sigma**2) / (1 - ab_t))
        c0 = math.sqrt(ab_s) - math.sqrt(ab_t) * ct
        _, (a, b), _ = PREDICTIONS[predict](torch.tensor(ab_t, dtype=torch.float64))
        h = 0.5 * math.log(ab_s / (1 - ab_s) * (1 - ab_t) / ab_t) if next_tau else 0.0
        rows.append([float(a), float(b), c0, ct, sigma, h / (2 * h_previous), math.sqrt(ab_s)])
        h_previous = h
    return torch.tensor(rows, dtype=torch.float64).float()  # [S, 7]


# ------------------------------------------------------------------ U-Net


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
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # [B, heads, HW, C / heads] each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(B, C, H, W))


class UNet(nn.Module):
    """The denoiser: x_t [B, C, H, W] and t int64 [B] -> out [B, C, H, W]; inside, the last row and
    column are repeated up to multiples of 4. Space-to-depth by 2 comes first: on small images most
    of a U-Net's time is spent at full resolution, where there is least to decide. Skip connections
    are added, not concatenated, which keeps every block at one width. Two levels of widths w and
    2 w, attention on the lower one."""

    def __init__(self, channels, width=32, blocks=(1, 2)):
        super().__init__()
        self.width = width
        emb = 4 * width
        self.embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels, width, 3, padding=1)
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

    def forward(self, x_t, t):
        H, W = x_t.shape[2:]
        if H % 4 or W % 4:
            x_t = F.pad(x_t, (0, -W % 4, 0, -H % 4), mode="replicate")
        emb = self.embed(self.time_embedding(t))  # [B, 4w]
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


def draw_weights(net, seed, network):
    """Fill a module with initial weights that are a function of seed and `network`, a number of its
    own, alone: PyTorch's default, U(-r, r) with r = 1 / sqrt(fan_in), layer by layer, but zero
    where a layer starts at zero. Returns the module."""
    for number, layer in enumerate(net.modules()):
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


def make_unet(cfg, channels, device):
    """A U-Net whose initial weights depend on the seed alone."""
    with torch.device("meta"):  # no values yet, so no use of a global random state
        net = UNet(channels, cfg.width)
    return draw_weights(net.to_empty(device=device), cfg.seed, 0)


# ------------------------------------------------------------------ DIP networks


class GroupedConv(nn.Module):
    """K independent convolutions as one with groups = K: [1, K Ci, H, W] -> [1, K Co, H', W'].
    Reflection padding keeps the size at stride 1. PyTorch's default initial distribution,
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), drawn for each of `members` from its own number, with the
    draw number `layer`, so that a network does not depend on which others share its group."""

    def __init__(self, members, layer, c_in, c_out, size, seed, stride=1, transposed=False):
        super().__init__()
        K, area = len(members), size * size
        first, second = (c_in, c_out) if transposed else (c_out, c_in)
        u = kernels.uniform((K, c_out * (c_in * area + 1)), seed, members, layer, kernels.WEIGHTS,
                            members.device)
        weight, bias = (u * 2 - 1).mul((second * area) ** -0.5).split(
            [c_out * c_in * area, c_out], dim=1)
        self.weight = nn.Parameter(weight.reshape(K * first, second, size, size))
        self.bias = nn.Parameter(bias.reshape(K * c_out))
        self.K, self.stride, self.pad = K, stride, (size - 1) // 2
        self.transposed = transposed

    def forward(self, x):
        if self.transposed:
            return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.pad,
                                      groups=self.K)
        if self.pad:  # a map that is no larger than the padding has nothing to reflect
            mode = "reflect" if min(x.shape[2:]) > self.pad else "replicate"
            x = F.pad(x, (self.pad,) * 4, mode=mode)
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.K)


class GroupedNorm(nn.Module):
    """BatchNorm by the batch's own statistics over [1, K C, H, W]: with a batch of one, K C
    channels are K separate BatchNorms."""

    def __init__(self, channels, device):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device))
        self.bias = nn.Parameter(torch.zeros(channels, device=device))

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Grouped:
    """What the DIPs below are made of, for K members that are fitted together, each to its image:
    every layer K times as wide, in K groups. Each layer draws its weights under a number of its
    own."""

    def __init__(self, members, seed):
        self.members, self.seed, self.K = members, seed, len(members)
        self.numbers = itertools.count()

    def conv(self, c_in, c_out, size, stride=1):
        return GroupedConv(self.members, next(self.numbers), c_in, c_out, size, self.seed, stride)

    def up(self, c_in, c_out, size, stride=1):
        return GroupedConv(self.members, next(self.numbers), c_in, c_out, size, self.seed, stride,
                           transposed=True)

    def norm(self, channels):
        return GroupedNorm(self.K * channels, self.members.device)


class Single:
    """What the DIPs below are made of as one network for a whole data set, trained in batches: as
    above, but padded with zeros, and with running statistics to be evaluated by."""

    K = 1

    def conv(self, c_in, c_out, size, stride=1):
        return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)

    def up(self, c_in, c_out, size, stride=1):
        return nn.ConvTranspose2d(c_in, c_out, size, stride, padding=(size - 1) // 2)

    def norm(self, channels):
        return nn.BatchNorm2d(channels)


class Skip(nn.Module):
    """The hourglass of Ulyanov et al. (2018, supplementary). Each scale has a 4-channel 1x1 skip, a
    stride-2 and a plain 3x3 convolution on the way down, bilinear upsampling, a 3x3 and a 1x1
    convolution on the way up. [B, K Ci, H, W] -> [B, K Co, H, W] in [0, 1]."""

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


def conv2(make, c_in, c_out, H, W, width):
    """Two 3x3 convolutions and a sigmoid."""
    return nn.Sequential(make.conv(c_in, width, 3), nn.ReLU(), make.conv(width, c_out, 3),
                         nn.Sigmoid())


def autoencoder(make, c_in, c_out, H, W, width):
    """Four 3x3 convolutions and a tanh, at full resolution: it narrows nothing.
    [B, K Ci, H, W] -> [B, K Co, H, W] in [-1, 1]."""
    widths = [c_in, width, width, width, c_out]
    layers = [layer for a, b in zip(widths, widths[1:])
              for layer in (make.conv(a, b, 3), nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Tanh())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5, left).
    [B, K Ci, H, W] -> [B, K Co, H / stride, W / stride]."""

    def __init__(self, make, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.norm1 = make.conv(c_in, c_out, 3, stride), make.norm(c_out)
        self.conv2, self.norm2 = make.conv(c_out, c_out, 3), make.norm(c_out)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            make.conv(c_in, c_out, 1, stride), make.norm(c_out))

    def forward(self, x):
        h = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.norm2(h))


class ResNet18(nn.Module):
    """A ResNet-18 encoder (He et al. 2016, table 1; random weights, widths w ... 8 w) and six
    transposed convolutions: an image becomes 8 w numbers at 1/32 of its size.
    [B, K Ci, H, W] -> [B, K Co, H, W] in [0, 1]."""

    def __init__(self, make, c_in, c_out, H, W, width):
        super().__init__()
        if isinstance(make, Grouped) and max(H, W) <= 32:
            raise ValueError(f"--dip-arch resnet18 makes one pixel of {W}x{H}: fitted "
                             "to one image its norms have nothing to take a mean over")
        widths = [width * k for k in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.enter = nn.Sequential(make.conv(c_in, width, 7, 2), make.norm(width), nn.ReLU(),
                                   nn.MaxPool2d(3, 2, padding=1))
        self.blocks = nn.Sequential(*(BasicBlock(make, a, b, 2 if b > a else 1)
                                      for a, b in zip(widths, widths[1:])))
        ups = [width * k for k in (8, 4, 2, 1, 1, 1)]
        self.ups = nn.ModuleList(nn.Sequential(make.up(a, b, 4, 2), make.norm(b), nn.ReLU())
                                 for a, b in zip(ups, ups[1:]))
        self.last = make.up(width, c_out, 3)

    def forward(self, x):
        h = self.blocks(self.enter(x))  # [B, K 8w, ceil(H / 32), ceil(W / 32)]
        for up in self.ups:
            h = up(h)
        return torch.sigmoid(self.last(h)[..., :x.shape[2], :x.shape[3]])  # 32 ceil(H / 32) is more


ARCHS = {"skip": Skip, "conv2": conv2, "autoencoder": autoencoder, "resnet18": ResNet18}


# ------------------------------------------------------------------ DDPM training


def epoch_order(cfg, N, epoch, device):
    """A permutation of 0 ... N-1 for this epoch, int64 [N]: a function of seed and epoch alone."""
    numbers = torch.arange(N, device=device)
    keys = kernels.uniform((N,), cfg.seed, numbers, epoch, kernels.DATA_ORDER, device)
    return keys.argsort(stable=True)


def draw_t(cfg, position, B, t_max, step):
    """t uniform in 0 ... t_max-1, one draw in each of B equal strata: int64 [B]. The loss varies
    much with t, and strata take that out of the gradient's variance (after the low-discrepancy
    sampler of Kingma et al. 2021, VDM, which shares one draw among the strata)."""
    u = kernels.uniform((len(position),), cfg.seed, position, step, kernels.TRAIN_TIME,
                        position.device)
    return ((position + u) / B * t_max).long().clamp(max=t_max - 1)


def denoising_loss(cfg, net, x_0, index, position, B, t_max, coef, step, autocast):
    """w_t times the mean of (out(x_t, t) - target)^2 over pixels, at one t for each image (Ho et
    al. 2020, eq. 14, with the targets and weights of `forward_table`), of the images `index` of
    x_0, which stand at `position` (int64) in a batch of B: float32 [len(position)]. t and eps
    depend on seed, position and step alone, so a batch may be split at will."""
    t = draw_t(cfg, position, B, t_max, step)
    x_t = kernels.q_sample(x_0, index, t, coef, cfg.seed, position, step)
    with autocast():
        out = net(x_t, t)
    return kernels.noise_loss(out, x_0, index, t, coef, cfg.seed, position, step)


def batches(cfg, N, device):
    """Indices int64 [B] of the images of one training step after the other, for ever."""
    B = min(cfg.batch, N)
    for epoch in itertools.count():
        order = epoch_order(cfg, N, epoch, device)
        yield from order[:N // B * B].split(B)


def half_cosine(step, steps):
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate(cfg, step, steps):
    """Linear warm-up over the first 3 % of the steps, then half a cosine down to zero."""
    warmup = max(1, round(0.03 * steps))
    return cfg.lr * min(1.0, (step + 1) / warmup) * half_cosine(step, steps)


def train_ddpm(cfg, x_0, t_max, run, name):
    """Minimise `denoising_loss` over t < t_max (Ho et al. 2020, algorithm 1). x_0: uint8 [N, C, H,
    W]. Returns the network with exponentially averaged weights, log rows [network, step, epoch,
    seconds, loss, lr] and the seconds. Continues from run.state where that has a beginning; leaves
    checkpoints in run.folder. A step whose gradient is not finite moves no weight; RuntimeError
    where no step since the last row was finite."""
    N, C = x_0.shape[:2]
    B = min(cfg.batch, N)
    per_epoch = N // B
    steps = cfg.epochs * per_epoch
    coef = forward_table(SCHEDULES[cfg.schedule](cfg.timesteps), cfg.predict).to(run.device)
    rates = torch.tensor([learning_rate(cfg, n, steps) for n in range(steps)], device=run.device)
    net = make_unet(cfg, C, run.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    saved = run.state.get(name)
    done, seconds, rows, tally = edge.continue_from(saved, net, ema, optimizer)
    t_max = saved.get("t_max", t_max) if saved else t_max
    lr = rates[0].clone()  # a tensor, so that a graph can set it
    optimizer.param_groups[0].update(lr=lr, capturable=x_0.is_cuda)
    rank, size = edge.processes()
    position = torch.arange(rank, B, size, device=run.device)  # of this process's in the batch
    model = nn.parallel.DistributedDataParallel(net) if size > 1 else net  # averages gradients
    order = torch.empty(N, dtype=torch.int64, device=run.device)
    step = torch.tensor([done], device=run.device)
    # since the last row: this process's part of the sum of losses and of the number of finite steps
    tally = tally.to(run.device) * (rank == 0)

    def train_step():
        index = order.index_select(0, step % per_epoch * B + position)
        loss = denoising_loss(cfg, model, x_0, index, position, B, t_max, coef, step[0],
                              run.autocast).sum() / B
        optimizer.zero_grad()
        (loss * size).backward()
        finite = nn.utils.clip_grad_norm_(net.parameters(), 1.0).isfinite()
        lr.copy_(rates.index_select(0, step)[0])
        optimizer.found_inf = (~finite).float()  # where it is 1 the fused step changes nothing
        optimizer.step()
        update_average(ema, net, step[0])
        tally.add_(torch.stack([loss.detach(), torch.full_like(loss, 1 / size)]).where(finite, 0))
        step.add_(1)

    advance = edge.Graphed(train_step, run.device)
    progress, clock = edge.Progress(f"train {name}", steps, B, done), edge.Clock(seconds)
    saved_at, epoch = time.time(), None
    while done < steps:
        if epoch != done // per_epoch:
            epoch = done // per_epoch
            order.copy_(epoch_order(cfg, N, epoch, run.device))
        advance()
        done += 1
        if cfg.snapshots and done * cfg.snapshots // steps > (done - 1) * cfg.snapshots // steps:
            edge.save({"step": done, "seconds": clock(), "ema": ema.state_dict()},
                      run.folder / "snapshots" / f"{name}-{done:06d}.pt")
        row_due = done % 50 == 0 or done == steps
        if row_due:  # the only place where the host waits for the device
            loss, good = edge.total(tally).tolist()
            skipped = done - (rows[-1][1] if rows else 0) - round(good)
            if not good and (done % 50 == 0 or not rows):
                raise RuntimeError(f"no finite gradient in {skipped} steps up to {done} with --lr "
                                   f"{cfg.lr:g}; the last good checkpoint is kept")
            if skipped:
                edge.say(f"train {name}: {skipped} steps before {done} skipped: no finite gradient")
            if good:
                rows.append([name, done, round(done / per_epoch, 4), round(clock(), 2),
                             loss / good, learning_rate(cfg, done - 1, steps)])
            tally.zero_()
            progress(done, f"loss {rows[-1][4]:.4f}")
        # the processes ask each other rarely
        stop = edge.agreed(run.stop) if size == 1 or row_due else 0
        if stop or done == steps or row_due and time.time() - saved_at > CHECKPOINT_SECONDS:
            run.state[name] = {"step": done, "t_max": t_max, "seconds": clock(), "rows": rows,
                               "tally": tally, "net": net.state_dict(), "ema": ema.state_dict(),
                               "optimizer": optimizer.state_dict()}
            edge.save_checkpoint(run)
            saved_at = time.time()
            if stop:
                raise KeyboardInterrupt
    return ema.eval(), rows, clock()


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


# ------------------------------------------------------------------ sampling


class Measurement(NamedTuple):
    """What a restoration knows: y = A x + sigma eps of images x [n, C, H, W] in [0, 1], with
    `mask` [n, 1, H, W] (ones where A has none) and A's task; y [n, C, h, w] is of A x's size, sigma
    in units of [0, 1]."""

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

    def consistent(self, x0_hat, weight=1.0):
        """x0_hat in [-1, 1], its range part replaced: x + weight A+ (y - A x) (Wang, Yu & Zhang
        2023, DDNM, eq. 13; eq. 17 has the weight). A step takes this x0_hat and the network's own
        eps_hat. With the eps that x_t and this x0_hat imply, what is known would keep the noise
        that it began with: from 50 evaluations 17.2 instead of 23.8 dB for half of the pixels, 23.2
        instead of 26.1 dB for twice the size (64 test digits, one seed)."""
        x = (x0_hat + 1) / 2
        return (x + weight * self.back(self.y - self.A(x))) * 2 - 1

    def noisy_step(self, x_t, x0_hat, ab_t, ab_s, sigma, z):
        """A reverse step with a noisy y: x_s gets as much of y as brings no more than x_s's own
        noise, 1 - ab_s, and that much less of eps_hat and z (after Wang, Yu & Zhang 2023, DDNM+,
        eq. 17-19: there no more than z's, and less of z). x_t, x0_hat, z [n, C, H, W]; ab_t, ab_s
        and sigma are scalars."""
        y_noise = 2 * self.sigma * ab_s.sqrt()  # of sqrt(ab_s) y, in [-1, 1]
        weight = ((1 - ab_s).sqrt() / y_noise).clamp(max=1)
        there = self.back(self.A(torch.ones_like(x_t)))  # 1 where y says something
        left = (1 - ab_s - there * (weight * y_noise) ** 2).clamp(min=0)
        fresh = torch.minimum(left, sigma**2)
        eps_hat = (x_t - ab_t.sqrt() * x0_hat) / (1 - ab_t).sqrt()
        return (ab_s.sqrt() * self.consistent(x0_hat, weight) + (left - fresh).sqrt() * eps_hat
                + fresh.sqrt() * z)


def pooling(k):
    """Super-resolution's A and pseudo-inverse: means of k x k blocks, and each mean k x k times."""
    return (lambda x, mask: F.avg_pool2d(x, k),
            lambda y, mask: y.repeat_interleave(k, -1).repeat_interleave(k, -2))


MASKING = (lambda x, mask: x * mask,) * 2
TASKS = {"denoise": (lambda x, mask: x,) * 2, "inpaint": MASKING, "inpaint-box": MASKING,
         "sr": pooling(2), "sr-4": pooling(4)}


@torch.no_grad()
def sample(cfg, net, x_init, t_start, nfe, eta, sample_numbers, autocast, order=1, grid="uniform",
           film=None, measured=None):
    """The reverse process from x_init (after t_start steps of noise) to x_0 in nfe network
    evaluations (Song et al. 2021, eq. 12; Ho et al. 2020, algorithm 2 if eta = 1, nfe = t_start;
    Lu et al. 2022, DPM-Solver++(2M), if eta = 0 and order = 2).
    x_init [n, C, H, W] in the network's scale; sample_numbers int64 [n] name the noise that each
    image gets, whatever shares its batch. Returns [n, C, H, W] in [-1, 1] (from a super-resolution
    without noise a little beyond); a list `film` receives every x_t [1, C, H, W] of the first
    image. With a Measurement every x0_hat is made consistent with it, which restores instead of
    generating."""
    schedule = SCHEDULES[cfg.schedule](cfg.timesteps)
    taus = time_grid(schedule, t_start, nfe, grid)
    coef = reverse_table(schedule, cfg.predict, taus, eta)
    device = x_init.device
    size = SAMPLE_BATCH_CUDA if device.type == "cuda" else SAMPLE_BATCH
    coef, times = coef.to(device), torch.tensor(taus[:-1], device=device) - 1
    alpha_bar = torch.tensor([schedule.at(tau) for tau in taus], device=device)  # [nfe + 1]
    done = []
    for rows in torch.arange(len(x_init)).split(size):
        x_t, numbers = x_init[rows].clone(), sample_numbers[rows]
        known = measured and measured.part(rows)
        x0_prev = torch.zeros_like(x_t) if order == 2 else None
        step = torch.zeros(1, dtype=torch.int64, device=device)

        def reverse_step():
            t = times.index_select(0, step).expand(len(x_t))
            with autocast():
                out = net(x_t, t)
            if known:
                a, b, _, _, sigma, *_ = coef.index_select(0, step)[0]
                x0_hat = (a * x_t + b * out.float()).clamp(-1, 1)
            if known and known.sigma:
                z = kernels.normal(x_t.shape, cfg.seed, numbers, step[0], kernels.STEP_NOISE,
                                   device)
                ab_t, ab_s = (alpha_bar.index_select(0, step + k)[0] for k in (0, 1))
                x_t.copy_(known.noisy_step(x_t, x0_hat, ab_t, ab_s, sigma, z))
            else:
                kernels.posterior_step(
                    x_t, out, coef, step[0], cfg.seed, numbers, inplace=True, x0_prev=x0_prev,
                    value=known.consistent(x0_hat) if known else None)
            step.add_(1)

        advance = edge.Graphed(reverse_step, device)
        for _ in range(nfe):
            if film is not None and not done:
                film.append(x_t[:1].clone())
            advance()
        done.append(known.consistent(x_t) if known and not known.sigma else x_t)
    if film is not None:
        film.append(done[0][:1])
    return torch.cat(done)


# ------------------------------------------------------------------ DIP fitting

CHECK = 10  # iterations between two looks at a risk
# draw numbers in the stream CORRUPTION: 0 is a measurement's noise; rung k draws RUNG_DRAW + k
MASK_DRAW, HELD_DRAW, SPLIT_DRAW, RUNG_DRAW = 1, 2, 3, 4


class DIPGroup:
    """K DIPs as one grouped network, with Adam and each one's averaged output; members can go back
    to where they were saved, and leave. z ~ U(0, 0.1) is fixed; jitter N(0, (1/30)^2) is fresh at
    every iteration and shared. members int64 [K] number the fits, and with the seed decide theta
    and z."""

    def __init__(self, cfg, members, C, H, W, dtype=torch.float32):
        small, device = max(H, W) <= 64, members.device
        width = cfg.dip_width or (16 if small else 128)
        # A larger rate has the better best moment, but as a prior leaves less smooth errors.
        self.lr = cfg.dip_lr or (0.05 if small and cfg.mode in ("dip", "guide") else 0.01)
        self.cfg, self.K, self.Cz = cfg, len(members), min(width, 32)
        make = ARCHS[cfg.dip_arch or "skip"]
        self.net = make(Grouped(members, cfg.seed), self.Cz, C, H, W, width).to(dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, fused=True)
        self.z = 0.1 * kernels.uniform((self.K, self.Cz, H, W), cfg.seed, members, 0,
                                       kernels.DIP_CODE, device)
        self.average = torch.zeros(self.K, C, H, W, dtype=dtype, device=device)
        self.age = torch.zeros(self.K, dtype=dtype, device=device)  # of each average, in iterations
        self.steps, self.saved = 0, None

    def iterate(self, i, y, share, A):
        """Iteration i: one Adam step on sum_k sum share_k (A f_k(z + jitter) - y_k)^2, so that each
        member gets the gradient that it would get alone. y and share are of A's size, share sums to
        1 over each. -> outputs [K, C, H, W], losses [K]."""
        jitter = kernels.normal((1, *self.z.shape[1:]), self.cfg.seed, 0, i, kernels.DIP_JITTER,
                                self.z.device)
        z = (self.z + jitter / 30).to(self.average.dtype).view(1, -1, *jitter.shape[2:])
        x = self.net(z).view_as(self.average)  # [K, C, H, W]
        losses = ((A(x) - y).square() * share).sum(dim=(1, 2, 3))
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        self.steps += 1
        decay = ((1 + self.age) / (10 + self.age)).clamp(max=self.cfg.window)
        self.age += 1
        self.average += (1 - decay).view(-1, 1, 1, 1) * (x.detach() - self.average)
        return x.detach(), losses.detach()

    def not_finite(self, i):
        """The error to raise where iteration i left the finite numbers."""
        return RuntimeError(f"a DIP fit is not finite after {i + 1} iterations with --dip-lr "
                            f"{self.lr:g}")

    def state(self):
        """Weights, Adam's memory of them and averages as views [K, ...], a row a member."""
        memory = self.optimizer.state
        return [x.view(self.K, -1) for p in self.net.parameters()
                for x in (p.data, memory[p]["exp_avg"], memory[p]["exp_avg_sq"])] + [
                    self.average.view(self.K, -1), self.age.view(self.K, -1)]

    def save(self, which):
        """Remember the members `which` (bool [K]) as they are now; at the first call, all."""
        if self.saved is None:
            self.saved = [x.clone() for x in self.state()]
            self.saved_at = torch.zeros_like(self.age)
        for kept, now in zip(self.saved, self.state()):
            kept[which] = now[which]
        self.saved_at[which] = self.steps

    def rewind(self, which):
        """Go back to what was saved. Adam divides its memory by 1 - beta^steps and counts steps for
        all members together, so the memory is scaled to what it then was after that division."""
        if not which.any():
            return
        for kept, now in zip(self.saved, self.state()):
            now[which] = kept[which]
        at = self.saved_at[which][:, None]
        for memory in self.optimizer.state.values():
            for key, beta in zip(("exp_avg", "exp_avg_sq"), self.optimizer.defaults["betas"]):
                memory[key].view(self.K, -1)[which] *= (1 - beta**self.steps) / (1 - beta**at)

    def keep(self, which):
        """Let all members but `which` leave, as if they had never been here: they cost nothing any
        more, and the others do not notice. Only after a first `save`."""
        def part(x):
            return x.view(self.K, -1, *x.shape[1:])[which].flatten(0, 1)
        stay, memory = int(which.sum()), {}
        for module in self.net.modules():
            if hasattr(module, "K"):
                module.K = stay
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(part(p.data)))
                memory[getattr(module, name)] = {
                    key: part(value) if value.dim() else value
                    for key, value in self.optimizer.state[p].items()}
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.lr, fused=True)
        self.optimizer.state.update(memory)
        self.z, self.average, self.age = (v[which] for v in (self.z, self.average, self.age))
        self.saved, self.saved_at = [x[which] for x in self.saved], self.saved_at[which]
        self.K = stay


def fit_dips(cfg, y, members, iters, progress, measured=None, hold_out=0.1, watch=None):
    """Fit one DIP to each image: minimise |A f_theta(z + jitter) - y|^2 over theta from random
    theta, Adam, with the exponential average of the outputs (Ulyanov et al. 2018, eq. 2 and 4-6,
    section 3; the jitter: supplementary). y [K, C, H, W] in [0, 1], not clipped, with A = 1, or
    that of a Measurement of K images; or a list of targets, fitted one after the other for equally
    many iterations. Returns the averages [K, C, H, W]. `watch` is called with each iteration, the
    outputs and the averages.

    From a Measurement a share of `hold_out` of its values is held out of the fit, and each image's
    result is the one of its averages, every 10 iterations, that is nearest to those: a stop that
    needs no truth. Where the share is 0, it is the last. RuntimeError where it is not finite."""
    targets = y if isinstance(y, list) else [y]
    y, A, (H, W) = targets[0], (lambda x: x), targets[0].shape[2:]
    if measured is not None:
        A, (H, W) = measured.A, measured.mask.shape[2:]
    K, C = y.shape[:2]
    given = A(torch.ones(K, C, H, W, dtype=y.dtype, device=y.device))
    u = kernels.uniform((K, 1, *y.shape[2:]), cfg.seed, members, HELD_DRAW, kernels.CORRUPTION,
                        y.device)
    held = given * (u < (hold_out if measured is not None else 0))
    share = (given - held) / (given - held).sum(dim=(1, 2, 3), keepdim=True)
    group = DIPGroup(cfg, members, C, H, W, y.dtype)
    best, best_risk = group.average.clone(), torch.full_like(share[:, :1, :1, :1], math.inf)
    for i in range(iters):
        y = targets[i * len(targets) // iters]
        x, _ = group.iterate(i, y, share, A)
        if (i + 1) % CHECK == 0 or i + 1 == iters:
            risk = ((A(group.average) - y).square() * held).sum(dim=(1, 2, 3), keepdim=True)
            best = torch.where(risk < best_risk, group.average, best)
            best_risk = torch.minimum(risk, best_risk)
            if not group.average.isfinite().all():
                raise group.not_finite(i)
        if watch is not None:
            watch(i, x, group.average)
        progress(i + 1)
    return best if held.any() else group.average


def fit_in_groups(cfg, y, members, iters, run, measured=None):
    """`fit_dips` for any number of images, --dip-group at a time, the groups dealt out to the
    processes."""
    K, (rank, size) = cfg.dip_group, edge.processes()
    groups = torch.arange(len(y)).split(K)[rank::size]
    progress = edge.Progress("fit DIPs", len(groups) * iters, min(len(y), K))
    outputs = y.new_zeros(*y.shape[:2], *(measured.mask if measured else y).shape[2:])
    for g, rows in enumerate(groups):
        outputs[rows] = fit_dips(cfg, y[rows], members[rows], iters,
                                 lambda i, g=g: progress(g * iters + i),
                                 measured and measured.part(rows)).clamp(0, 1)
        if run.stop:
            raise KeyboardInterrupt
    return edge.total(outputs)


# ------------------------------------------------------------------ network: one DIP for a data set

NETWORK_ITERS, NETWORK_RATE = 300, 1e-3


def fit_network(cfg, x_0, run):
    """Minimise E_i |f_theta(x_i) - x_i|^2 over the images of x_0 uint8 [N, C, H, W], from random
    theta, Adam, half a cosine: the DIP of a whole data set, f: [B, C, H, W] -> the same, in [0, 1]
    (`autoencoder` ends in a tanh: in [-1, 1], to be clipped).
    What nothing narrows (`conv2`, `autoencoder`) becomes the identity, given time."""
    N, C = x_0.shape[:2]
    with torch.device("meta"):
        f = ARCHS[cfg.dip_arch or "autoencoder"](Single(), C, C, *x_0.shape[2:],
                                                 cfg.dip_width or 64)
    f = draw_weights(f.to_empty(device=run.device), cfg.seed, 2)
    optimizer = torch.optim.Adam(f.parameters(), fused=True)
    steps = cfg.dip_iters or NETWORK_ITERS
    progress = edge.Progress("fit network", steps, min(cfg.batch, N))
    for step, index in zip(range(steps), batches(cfg, N, run.device)):
        x = x_0[index].float() / 255
        loss = (f(x) - x).square().mean()
        optimizer.param_groups[0]["lr"] = NETWORK_RATE * half_cosine(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.stop:
            raise KeyboardInterrupt
        progress(step + 1)
    return f.eval().requires_grad_(False)


# ------------------------------------------------------------------ codes: a decoder for a data set

CODE = 32  # numbers in a code
CODE_EPOCHS, CODE_RATES = 3, (2e-3, 1e-2)  # passes; peak learning rates of decoder and codes
CELL_DRAW, CODE_DRAW, CENTRE_DRAW, GAUSS_DRAW = 1, 2, 3, 4  # in the stream DIP_CODE; 0 is z's


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


def principal_components(x_0, D):
    """The first D principal components of x_0 uint8 [N, C, H, W] scaled to [0, 1], P = C H W:
    whitened scores [N, D], mean [P] and axes [D, P], so that mean + scores @ axes is the best
    linear reconstruction; fewer than D where min(N, P) is less."""
    X = x_0.flatten(1).float() / 255  # [N, P]
    N, P = X.shape
    mean = X.mean(0)
    X = X - mean
    value, vector = torch.linalg.eigh((X.T @ X if P <= N else X @ X.T).double() / N)  # ascending
    scale = value[-D:].flip(0).clamp(min=1e-12).sqrt().float()
    vector = vector[:, -D:].flip(1).float()
    if P > N:  # from the scores to the axes
        vector = X.T @ vector / (scale * math.sqrt(N))
    return X @ (vector / scale), mean, vector.T * scale[:, None]


def fit_codes(cfg, x_0, run):
    """Minimise sum_i |g_theta(c_i) - x_i|^2 over theta and a code c_i for each image, together
    (Bojanowski et al. 2018), from whitened principal components; Adam, half a cosine.
    Returns the decoder, to be evaluated with its running statistics, and codes [N, CODE]."""
    N, C, H, W = x_0.shape
    B = min(cfg.batch, N)
    steps = cfg.dip_iters or CODE_EPOCHS * (N // B)
    with torch.device("meta"):
        decoder = CodeDecoder(C, H, W, cfg.dip_width or 32)
    decoder = draw_weights(decoder.to_empty(device=run.device), cfg.seed, 1)
    scores = principal_components(x_0, CODE)[0]
    scores = F.pad(scores, (0, CODE - scores.shape[1]))  # of fewer images than that
    codes = nn.Embedding.from_pretrained(scores, freeze=False, sparse=True)
    optimizers = [torch.optim.Adam(decoder.parameters(), fused=True),
                  torch.optim.SparseAdam(codes.parameters())]  # moves the batch's codes only
    progress = edge.Progress("fit codes", steps, B)
    for step, index in zip(range(steps), batches(cfg, N, run.device)):
        x = decoder(codes(index))
        loss = (x - x_0[index].float() / 255).square().mean(dim=(1, 2, 3)).sum()
        for optimizer, lr in zip(optimizers, CODE_RATES):
            optimizer.param_groups[0]["lr"] = lr * half_cosine(step, steps)
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if run.stop:
            raise KeyboardInterrupt
        progress(step + 1)
    return decoder.eval().requires_grad_(False), codes.weight.detach()


def fit_mixture(codes, seed):
    """A mixture of Gaussians for codes [N, D]: cells of k-means, each with its share, mean and
    covariance -> (shares [K], means [K, D], Cholesky factors [K, D, D]). There are as many as leave
    D members to a cell. On MNIST, 10,000 images decoded from 200, 468, 937, 1875 and 3000 cells
    had fid_lenet 52.6, 48.9, 44.8, 40.7 and 38.9 (from the codes themselves 30.3), all as far from
    the training images."""
    N, D = codes.shape
    K = max(1, N // D)
    numbers = torch.arange(N, device=codes.device)
    keys = kernels.uniform((N,), seed, numbers, CENTRE_DRAW, kernels.DIP_CODE, codes.device)
    means = codes[keys.argsort(stable=True)[:K]]
    for _ in range(30):
        cell = torch.cat([torch.cdist(part, means).argmin(1) for part in codes.split(8192)])
        count = torch.bincount(cell, minlength=K)
        sums = torch.zeros_like(means).index_add_(0, cell, codes)
        means = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], means)
    factors = []
    for k in range(K):
        around = codes[cell == k] - means[k]
        covariance = around.T @ around / max(1, len(around))
        ridge = 1e-3 * covariance.diagonal().mean() + 1e-6
        factors.append(torch.linalg.cholesky(covariance + ridge * torch.eye(D).to(codes)))
    return count / N, means, torch.stack(factors)


def draw_codes(mixture, n, seed):
    """Codes [n, D] of new images from the mixture: number i is the same whatever n is."""
    shares, means, factors = mixture
    device = means.device
    u = kernels.uniform((n,), seed, 0, CELL_DRAW, kernels.DIP_CODE, device)
    cell = torch.searchsorted(shares.cumsum(0), u).clamp(max=len(shares) - 1)
    z = kernels.normal((n, means.shape[1]), seed, 0, CODE_DRAW, kernels.DIP_CODE, device)
    return means[cell] + (factors[cell] @ z[:, :, None])[:, :, 0]


# ------------------------------------------------------------------ method 1: priors
#
# x_{t_start} = sqrt(ab) x_prior + sqrt(1 - ab) eps, then the reverse process from t_start. Each
# prior is a function (cfg, x_0, sources, run) -> x_prior [n, C, H, W] in [-1, 1], of the training
# data x_0 uint8 [N, C, H, W] and n of its images, sources [n, C, H, W].


def prior_dip_images(cfg, x_0, sources, run):
    """One DIP for each source image, fitted shortly."""
    y = sources.float() / 255
    members = torch.arange(len(y), device=run.device)
    return fit_in_groups(cfg, y, members, cfg.dip_iters or 60, run) * 2 - 1


@torch.no_grad()
def prior_dip_network(cfg, x_0, sources, run):
    """The source images through one DIP that was fitted to the whole data set."""
    with torch.enable_grad():
        f = fit_network(cfg, x_0, run)
    x = torch.cat([f(part.float() / 255) for part in sources.split(SAMPLE_BATCH)])
    return x.clamp(0, 1) * 2 - 1


@torch.no_grad()
def prior_dip_codes(cfg, x_0, sources, run):
    """New images from new codes: one decoder for the whole data set, a mixture fitted to the codes
    of its images. No training image is handed over."""
    with torch.enable_grad():
        decoder, codes = fit_codes(cfg, x_0, run)
    new = draw_codes(fit_mixture(codes, cfg.seed), len(sources), cfg.seed)
    return torch.cat([decoder(part) for part in new.split(SAMPLE_BATCH)]) * 2 - 1


def prior_pca(cfg, x_0, sources, run):
    """The same mixture fitted to as many principal components and decoded linearly: what a DIP
    decoder must beat."""
    scores, mean, axes = principal_components(x_0, min(CODE, x_0[0].numel(), len(x_0)))
    new = draw_codes(fit_mixture(scores, cfg.seed), len(sources), cfg.seed)
    return ((mean + new @ axes).clamp(0, 1) * 2 - 1).view(-1, *x_0.shape[1:])


def prior_gauss(cfg, x_0, sources, run):
    """Draws from one Gaussian with the training data's mean and full covariance: what can be had
    with no DIP at all."""
    scores, mean, axes = principal_components(x_0, min(len(x_0), x_0[0].numel()))
    z = kernels.normal((len(sources), len(axes)), cfg.seed, 0, GAUSS_DRAW, kernels.DIP_CODE,
                       x_0.device)
    return ((mean + z @ axes) * 2 - 1).view(-1, *x_0.shape[1:])


def prior_blur(cfg, x_0, sources, run):
    """The source images through a 5x5 box: all the structure and more of a leak than a DIP; if this
    does as well, the DIP adds nothing."""
    x = sources.float() / 127.5 - 1
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


PRIORS = {"dip-images": prior_dip_images, "dip-network": prior_dip_network,
          "dip-codes": prior_dip_codes, "gauss": prior_gauss, "pca": prior_pca, "blur": prior_blur}
HAS_SOURCE = ("dip-images", "dip-network", "blur")  # number i starts from source image i


def start_from_prior(cfg, prior, t_start, numbers):
    """x_{t_start} = sqrt(ab) x_prior + sqrt(1 - ab) eps (Ho et al. 2020, eq. 4). prior [n, C, H, W]
    in [-1, 1], numbers int64 [n] -> x_init [n, C, H, W]."""
    table = forward_table(SCHEDULES[cfg.schedule](cfg.timesteps), cfg.predict).to(prior.device)
    t = torch.full((len(prior),), t_start - 1, device=prior.device)
    return kernels.q_sample(prior, None, t, table, cfg.seed, numbers, 0, kernels.INIT_NOISE)


def load_images(cfg, split, name=None, limit=None):
    """The images of a split that --data, --size and --crop ask for."""
    return data.load(name or cfg.data, cfg.data_dir, split, limit, cfg.size, cfg.crop)


def run_prior(cfg, run):
    """--mode prior and --mode ddpm: train, then generate or restore."""
    with edge.first_alone():  # where data are downloaded, one process does it
        train = load_images(cfg, "train")
        test = load_images(cfg, "test", train.name if cfg.data == "auto" else cfg.data)
    x_0 = train.pixels[:cfg.limit].to(run.device)
    N, C, H, W = x_0.shape
    for task in cfg.task:
        check_size(task, H, W)
    if {*cfg.task} - {"generate"} or cfg.mode == "prior" and "images" in cfg.dip_source:
        DIPGroup(cfg, torch.zeros(1, dtype=torch.int64), C, H, W)  # who cannot take it, says so
    if min(cfg.batch, N) < edge.processes()[1]:
        raise ValueError(f"--batch {cfg.batch}, of {N} images, is too small for as many processes")
    about = {"name": train.name, "train": N, "test": len(test.pixels), "sha256": train.sha256}
    if run.about and run.about["data"] != about:
        raise ValueError(f"--resume {cfg.resume}: the data was {run.about['data']}, now {about}")
    learned = run.state.get("truncated", {}).get("t_max", cfg.timesteps)
    if "truncated" in cfg.train and learned < max(steps_of_prior(cfg)):
        raise ValueError(f"--resume {cfg.resume}: its truncated network was trained for t < "
                         f"{learned}: it cannot serve --t-start {max(steps_of_prior(cfg))}")
    run.about = {"data": about, "shape": [C, H, W]}
    run.begin()
    edge.say(f"data: {train.name}, {N} training and {len(test.pixels)} test images of {C}x{H}x{W}; "
             f"{run.device}, {run.precision}")
    nets, rows = train_networks(cfg, x_0, run)
    write_log(run, rows)
    result = {"data": about, "parameters": sum(p.numel() for p in nets["full"].parameters()),
              "arms": [], "curves": loss_curves(rows), "pictures": []}
    if "generate" in cfg.task:
        generate(cfg, run, nets, train, x_0, test, result)
    for task in cfg.task:
        if task != "generate":
            restore(cfg, run, nets, task, test, result)
    if edge.processes()[0] == 0:
        finish(run, result)
        edge.say(measure.text_tables([run.folder]))


def train_networks(cfg, x_0, run):
    """{"full": the network of the noise start, and what else --train lists}, and log rows."""
    nets, rows = {}, []
    for name in dict.fromkeys(("full", *(cfg.train if cfg.mode == "prior" else ()))):
        images, t_max = x_0, cfg.timesteps
        if name == "truncated":
            t_max = max(steps_of_prior(cfg))
        if name == "smoothed":
            began = time.time()
            source = next(source for source in cfg.dip_source if source in SMOOTHERS)
            x = edge.of_the_first(PRIORS[f"dip-{source}"](cfg, x_0, x_0, run))
            images = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            edge.synchronize(run.device)
            run.seconds["dip"] += time.time() - began
        nets[name], more, seconds = train_ddpm(cfg, images, t_max, run, name)
        rows += more
        run.seconds["train"] += seconds
    return nets, rows


def generate(cfg, run, nets, train, x_0, test, result):
    """Every arm samples with the same seeds and count and is measured against the test split. Rows,
    curves and pictures go to `result`."""
    N, C, H, W = x_0.shape
    n = min(cfg.samples or 1000, N)
    root = Path(cfg.data_dir) if cfg.data_dir else data.default_root()
    with edge.first_alone():  # where the LeNet is not there yet, one process trains it
        judge = measure.Judge(train, x_0, test, n, [root, data.cache_root(), run.folder])
    result |= judge.summary()
    numbers = torch.arange(n, device=run.device)
    # at random: MNIST's first 1,000 training images are further from its test split than most
    sources = x_0[measure.subset(N, n).to(run.device)]
    arms, pictures, priors, films, first_start = result["arms"], {}, {}, {}, {}
    for network in nets.values():  # the first call of all would pay for what is set up once
        x_init = torch.zeros(min(n, SAMPLE_BATCH), C, H, W, device=run.device)
        sample(cfg, network, x_init, 2, 2, 0.0, numbers[:len(x_init)], run.autocast)

    def starts():
        """(arm, x_init, t_start, seconds that its prior took)"""
        eps = kernels.normal((n, C, H, W), cfg.seed, numbers, 0, kernels.INIT_NOISE, run.device)
        yield "ddpm", eps, cfg.timesteps, 0.0
        for arm, prior in PRIORS.items() if cfg.mode == "prior" else ():
            if arm.startswith("dip-") and arm.removeprefix("dip-") not in cfg.dip_source:
                continue
            began = time.time()
            priors[arm] = edge.of_the_first(prior(cfg, x_0, sources, run))
            edge.synchronize(run.device)
            seconds = time.time() - began
            run.seconds["dip"] += seconds if arm.startswith("dip") else 0.0
            for t_start in steps_of_prior(cfg):
                yield arm, start_from_prior(cfg, priors[arm], t_start, numbers), t_start, seconds

    for arm, x_init, t_start, prior_seconds in starts():
        first_start.setdefault(arm, (x_init, t_start, prior_seconds))
        for trained, nfe, setting in itertools.product(
                ("full",) if arm == "ddpm" else cfg.train, cfg.nfe, samplers(cfg)):
            shown = (arm, nfe) not in pictures  # only the first sampler's are
            film = [] if shown and nfe == film_nfe(cfg) else None
            x, row = timed_sample(cfg, run, arm, nets[trained], x_init, t_start, nfe, setting,
                                  numbers, film=film)
            row |= {"train": trained, "seconds": round(row["seconds"] + prior_seconds, 3),
                    "prior_seconds": round(prior_seconds, 3)}
            row |= judge(x, sources if arm in HAS_SOURCE else None)
            if arm in HAS_SOURCE:  # the KL of x_init to its source's is SNR(t_start) / 2 times this
                square = (priors[arm] - sources.float() / 127.5 + 1).square()
                row["prior_square_error"] = round(square.sum().item() / n, 4)
            arms.append(row)
            if shown:
                pictures[arm, nfe] = x[:16].cpu()
            if film:
                films[arm] = film
            edge.say(describe(row))
    curves = result["curves"]
    for row in arms:
        if "fid_lenet" in row:
            series = setting_of(row, cfg)
            curves.setdefault(f"quality/{series}", []).append([row["nfe"], row["fid_lenet"]])
            curves.setdefault(f"seconds/{series}", []).append(
                [row["seconds"] * 1000 / n, row["fid_lenet"]])
    result["notes"] += headlines(cfg, arms, n)
    for name, network in nets.items():
        curves |= convergence(cfg, run, name, network, first_start, numbers, judge, test)
    result["pictures"] += draw_arms(cfg, run, pictures, priors, sources)
    if films:  # which a process without images has none of
        result["pictures"].append(draw_film(run, films))
    run.seconds["eval"] = judge.seconds


def headlines(cfg, arms, n):
    """For each arm with a prior: with how few evaluations it is as good as the noise start at its
    most, plus 5 %, and from how many images on the seconds of its prior are paid back. A list of
    sentences; of a single run, so no more than a hint."""
    notes, most = [], max(cfg.nfe)
    if not all("fid_lenet" in row for row in arms):
        return notes
    noise = min((row for row in arms if row["name"] == "ddpm" and row["nfe"] == most),
                key=lambda row: row["fid_lenet"])
    series = {}
    for row in arms:
        if row["name"] != "ddpm":
            series.setdefault(setting_of(row, cfg), []).append(row)
    for name, rows in series.items():
        there = [row for row in rows if row["fid_lenet"] <= 1.05 * noise["fid_lenet"]]
        if not there:
            notes.append(f"{name} does not reach the noise start's quality at {most} evaluations "
                         f"({noise['fid_lenet']:.2f}, plus 5 %): at best "
                         f"{min(row['fid_lenet'] for row in rows):.2f}")
            continue
        row = min(there, key=lambda row: row["nfe"])
        once = row["prior_seconds"] if row["name"] != "dip-images" else 0.0
        saved = (noise["seconds"] - row["seconds"] + once) / n  # an image
        notes.append(
            f"{name} reaches the noise start's quality at {most} evaluations "
            f"({noise['fid_lenet']:.2f}, plus 5 %) with {row['nfe']}; recall {row['recall']:.3f} "
            f"against {noise['recall']:.3f}; " + (
                f"{once:.1f} s for its prior are paid back from {math.ceil(once / saved)} images on"
                if saved > 0 else "its prior is never paid back"))
    return notes


def timed_sample(cfg, run, arm, net, x_init, t_start, nfe, setting, numbers, film=None,
                 measured=None):
    """`sample`, a part of the images in each process, and a row of results.json that says how it
    was done and how long it took."""
    eta, order, grid = setting
    began = time.time()
    rank, size = edge.processes()
    x, mine = torch.zeros_like(x_init), torch.arange(len(x_init)).tensor_split(size)[rank]
    if len(mine):
        x[mine] = sample(cfg, net, x_init[mine], t_start, nfe, eta, numbers[mine], run.autocast,
                         order, grid, film, measured and measured.part(mine))
    x = edge.total(x)
    edge.synchronize(run.device)
    took = time.time() - began
    run.seconds["sample"] += took
    if run.stop:
        raise KeyboardInterrupt
    return x, {"name": arm, "seed": cfg.seed, "nfe": nfe, "t_start": t_start, "eta": eta,
               "order": order, "grid": grid, "seconds": round(took, 3)}


# ------------------------------------------------------------------ method 1: restoration

def check_size(task, H, W):
    """ValueError if images of this size cannot be halved, or quartered, as the task does."""
    factor = {"sr": 2, "sr-4": 4}.get(task, 1)
    if H % factor or W % factor:
        raise ValueError(f"--task {task}: images of {W}x{H} pixels; sizes must be multiples of "
                         f"{factor}")


def corrupt(cfg, task, truth, numbers):
    """truth [n, C, H, W] in [0, 1] -> the Measurement y = A truth + sigma eps, not clipped."""
    n, _, H, W = truth.shape
    mask = torch.ones(n, 1, H, W, device=truth.device)
    if task == "inpaint":
        u = kernels.uniform(mask.shape, cfg.seed, numbers, MASK_DRAW, kernels.CORRUPTION,
                            truth.device)
        mask = (u < 0.5).float()
    if task == "inpaint-box":
        mask[:, :, H // 4:H - H // 4, W // 4:W - W // 4] = 0
    sigma = cfg.sigma if cfg.sigma is not None else 0.1 if task == "denoise" else 0.0
    exact = Measurement(task, truth, mask, sigma)
    y = exact.A(truth)
    eps = kernels.normal(y.shape, cfg.seed, numbers, 0, kernels.CORRUPTION, truth.device)
    return exact._replace(y=y + sigma * exact.A(torch.ones_like(truth)) * eps)


def start_from_noisy(cfg, measured):
    """y with noise, sigma > 0, is x_t up to scale for the t whose noise is y's -> x_t, t_start."""
    ab = SCHEDULES[cfg.schedule](cfg.timesteps).alpha_bar
    noise = (1 / ab - 1).sqrt()  # of x_t / sqrt(ab), which is in [-1, 1]: twice sigma
    t = (noise - 2 * measured.sigma).abs().argmin()
    return (measured.y * 2 - 1) * ab[t].sqrt().float(), t.item() + 1


def restore(cfg, run, nets, task, test, result):
    """Restore n test images: a DIP alone; the DDPM from noise; the DDPM from the DIP's output and,
    as a control, from A+ y, which costs nothing; to denoise also from y itself, which is x_t (up to
    scale) for the t whose noise is y's. The DDPM's steps are kept consistent with y. Rows and
    pictures go to `result`."""
    n = min(cfg.samples or 256, len(test.pixels))
    chosen = measure.subset(len(test.pixels), n)
    truth = test.pixels[chosen].to(run.device).float() / 255
    numbers = torch.arange(n, device=run.device)
    measured = corrupt(cfg, task, truth, numbers)
    corrupted = measured.back(measured.y).clamp(0, 1)
    rows, shown = [], {"truth": truth[:16], "corrupted": corrupted[:16]}

    def add(row, x):
        rows.append({"task": task, "sigma": measured.sigma} | row | measure.measures(x, truth))
        edge.say(describe(rows[-1]))

    add({"name": "corrupted", "seed": cfg.seed}, corrupted)
    began = time.time()
    x_dip = fit_in_groups(cfg, measured.y, numbers, cfg.dip_iters or 300, run, measured)
    if not measured.sigma:  # what is known exactly is kept, as the arms that sample keep it
        x_dip = ((measured.consistent(x_dip * 2 - 1) + 1) / 2).clamp(0, 1)
    edge.synchronize(run.device)
    dip_seconds = round(time.time() - began, 3)
    run.seconds["dip"] += dip_seconds
    shown["dip"] = x_dip[:16]
    add({"name": "dip", "seed": cfg.seed, "seconds": dip_seconds}, x_dip)

    def starts():
        """(arm, x_init, t_start, seconds that the start took)"""
        eps = kernels.normal(truth.shape, cfg.seed, numbers, 0, kernels.INIT_NOISE, truth.device)
        yield "ddpm", eps, cfg.timesteps, 0.0
        for t_start in steps_of_prior(cfg):
            for arm, x, seconds in ("dip-images", x_dip, dip_seconds), ("pinv", corrupted, 0.0):
                yield arm, start_from_prior(cfg, x * 2 - 1, t_start, numbers), t_start, seconds
        if task == "denoise" and measured.sigma:
            yield "ddpm-y", *start_from_noisy(cfg, measured), 0.0

    for arm, x_init, t_start, seconds in starts():
        trained = "full" if arm in ("ddpm", "ddpm-y") else list(nets)[-1]  # --train's last
        noisy = measured.sigma > 0 and arm != "ddpm-y"  # the steps then have noise of their own
        for nfe, setting in itertools.product(cfg.nfe, samplers(cfg, noisy)):
            if nfe > t_start:
                continue  # no such short steps
            x, row = timed_sample(cfg, run, arm, nets[trained], x_init, t_start, nfe, setting,
                                  numbers, measured=None if arm == "ddpm-y" else measured)
            x = ((x + 1) / 2).clamp(0, 1)
            add(row | {"train": trained, "seconds": round(row["seconds"] + seconds, 3),
                       "prior_seconds": seconds}, x)
            if nfe == film_nfe(cfg):
                shown.setdefault(arm, x[:16])
    for row in rows[1:]:
        result["curves"].setdefault(f"restored {task}/{setting_of(row, cfg)}", []).append(
            [row.get("nfe", 0), row["psnr"]])
    result["arms"] += rows
    result["pictures"].append(measure.draw(
        run.folder / f"{task}.png", f"{task}, sigma = {measured.sigma:g}, {film_nfe(cfg)} network "
        "evaluations", shown))


# ------------------------------------------------------------------ method 1: curves


def convergence(cfg, run, name, net, first_start, numbers, judge, test):
    """Curves over a training's snapshots: fid_lenet of the noise start and of each DIP arm that
    sample with this network, against training seconds plus the DIP's; and the loss on held-out
    images against steps, each at a fixed t. The arms begin where they began, {arm: (x_init,
    t_start, seconds)}. Seconds of training are steps times the median step's, so that neither a
    pause nor a busy minute bends the curve. The noise start is also shown at the most evaluations
    of the run: its best, where the DIPs' is early."""
    curves, net = {}, copy.deepcopy(net)
    files = sorted((run.folder / "snapshots").glob(f"{name}-*.pt"))
    pace, t_max = median_step(run.state[name]["rows"]), run.state[name].get("t_max", cfg.timesteps)
    mine = [arm for arm in first_start if (name == "full" if arm == "ddpm" else
                                         arm.startswith("dip") and name in cfg.train)]
    for file in files:
        saved = torch.load(file, map_location=run.device, weights_only=True)
        edge.load_weights(net, saved["ema"], file)
        for label, loss in held_out_losses(cfg, net, test.pixels, t_max, run).items():
            curves.setdefault(f"held-out/{name} {label}", []).append([saved["step"], loss])
        for arm in mine:
            x_init, t_start, prior_seconds = first_start[arm]
            network = f" {name}" if arm != "ddpm" and len(cfg.train) > 1 else ""
            for nfe in sorted({film_nfe(cfg), max(cfg.nfe)} if arm == "ddpm" else {film_nfe(cfg)}):
                x, _ = timed_sample(cfg, run, arm, net, x_init, t_start, nfe, samplers(cfg)[0],
                                    numbers)
                quality = judge(x).get("fid_lenet")
                curves.setdefault(f"training/{arm}{network}, {nfe} evaluations", []).append(
                    [saved["step"] * pace + prior_seconds, quality])
                edge.say(f"{arm:<12}{name} step {saved['step']}  nfe {nfe}  fid_lenet {quality}")
    return curves


def median_step(rows):
    """Seconds of a training step: the median over the log's rows."""
    steps, seconds = [[0, *(row[i] for row in rows)] for i in (1, 3)]
    return statistics.median((s - r) / (n - m) for m, n, r, s in
                             zip(steps, steps[1:], seconds, seconds[1:]))


@torch.no_grad()
def held_out_losses(cfg, net, pixels, t_max, run, n=1000):
    """Mean of (out - target)^2, not weighted, on n test images at five t, as far as they are below
    t_max: {"t = 0.1 T": loss}."""
    coef = forward_table(SCHEDULES[cfg.schedule](cfg.timesteps), cfg.predict)
    coef[:, 4] = 1
    coef, x_0 = coef.to(run.device), pixels[:n].to(run.device)
    numbers, losses = torch.arange(len(x_0), device=run.device), {}
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        tau = max(1, round(share * cfg.timesteps))
        if tau > t_max:
            break
        loss = 0.0
        for index in numbers.split(SAMPLE_BATCH):
            t = torch.full_like(index, tau - 1)
            x_t = kernels.q_sample(x_0, index, t, coef, cfg.seed, index, 0, kernels.HELD_OUT)
            with run.autocast():
                out = net(x_t, t)
            loss += kernels.noise_loss(out, x_0, index, t, coef, cfg.seed, index, 0,
                                       kernels.HELD_OUT).sum().item()
        losses[f"t = {share:g} T"] = loss / len(x_0)
    return losses


def setting_of(row, cfg):
    """'gauss t_start 600 eta 0': the arm, and what else tells its rows apart in this run."""
    prior = row["name"] != "ddpm"
    several = {"train": cfg.train if prior else (), "t_start": steps_of_prior(cfg) if prior else (),
               "eta": cfg.eta, "order": cfg.order, "grid": cfg.grid}
    return " ".join([row["name"]] + [f"{key} {show(row[key])}" for key, values in several.items()
                                     if len(values) > 1 and key in row])


# ------------------------------------------------------------------ method 2: guide
#
# A DIP rises to a best output and then learns the noise. What stops it must not see the truth, and
# what it is fitted to must not be the judge: y = A x + sigma n is split once (see `split`); the
# rungs of a ladder add more noise to the half that is fitted; the other half judges each output.
# Nothing below is given the truth but `run_guide` and `run_dip`, which measure with it.

def split(y, given, sigma, alpha, numbers, replicas, seed):
    """y [n, ...] with noise sigma -> (y_plus, y_minus), [n M, ...]: for each image M replicas
    y + alpha sigma e and y - sigma e / alpha, e ~ N(0, 1). The noises of y, sigma n, and of the
    replica add up to parts that are independent of each other: E[(n + alpha e)(n - e / alpha)] =
    1 - 1. That holds within a replica: all of them together would give y away. The e of an image's
    replicas sum to zero (centred, times sqrt(M / (M - 1)) to stay N(0, 1)), so that the y_plus
    average to y. `given` is 0 where y says nothing."""
    M = replicas
    e = kernels.normal((len(y) * M, *y.shape[1:]), seed, numbers, SPLIT_DRAW, kernels.CORRUPTION,
                       y.device).view(len(y), M, *y.shape[1:])
    if M > 1:
        e = (e - e.mean(1, keepdim=True)) * math.sqrt(M / (M - 1))
    e, y = (e * given[:, None]).flatten(0, 1), y.repeat_interleave(M, 0)
    return y + alpha * sigma * e, y - sigma / alpha * e


def noise_level(y):
    """sigma of y [n, C, H, W], robustly: the median of |diagonal Haar coefficients| / 0.6745
    (Donoho & Johnstone 1994): float32 [n]. Flat images have no other diagonal detail. Clipped
    pixels, as in a black background, make it too low."""
    y = y[..., :y.shape[-2] // 2 * 2, :y.shape[-1] // 2 * 2]
    d = (y[..., ::2, ::2] - y[..., 1::2, ::2] - y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 2
    return d.flatten(1).abs().median(1).values / 0.6745


class Halves(NamedTuple):
    """What n images' replicas are fitted to, the targets of each rung, and judged by, each
    [n M, ...]; weights of the values, that sum to 1 over each; and the part of a risk that is the
    judge's own noise."""

    targets: list
    fitted: torch.Tensor
    judge: torch.Tensor
    judged: torch.Tensor
    noise: float

    def part(self, which):
        return self._replace(fitted=self.fitted[which], judge=self.judge[which],
                             judged=self.judged[which])

    def risk(self, A_x, M):
        """Estimates without bias the mean error of an image's M replicas A x_m, `A_x`
        [n M, ...], from what these were not fitted to: [n],

            R = mean_m |A x_m - judge_m|^2 / values - noise.

        The error of their average, which is what is wanted, is less by mean_m |A x_m - A x|^2. An
        estimate that subtracts that has no bias either, and is no better to stop by: the replicas'
        spread grows as they learn their noises, and without that slope chance finds its minimum
        later (on 48, 32 and 48 training digits, one seed, at sigma = 0.1, 0.2, 0.4 it lost 0.15,
        0.21 and 0.47 dB of what could be had, this one 0.11, 0.23 and 0.31)."""
        error = (A_x - self.judge).square() * self.judged
        return error.sum(dim=(1, 2, 3)).view(-1, M).mean(1) - self.noise

    def weights(self, risk, least, M):
        """How likely the judges make an output of this risk, in units of one of the least, [n]:
        their noise is normal, so each says log p(judge | x) = - values R / (2 noise) + ... They
        share y's noise: more than one, less than M that are independent, and so, as a rule of
        thumb, sqrt(M). Where there is no noise to go by only the least counts."""
        values = (self.judged > 0).sum(dim=(1, 2, 3)).view(-1, M)[:, 0]
        scale = 2 * max(self.noise, 1e-30) / (values * math.sqrt(M))
        return torch.where(risk <= least, 1, torch.exp((least - risk) / scale))


def rung_levels(rungs):
    """The rungs' noise in units of the last one's: from 4 down to 1, geometrically."""
    return [4.0 ** (1 - k / (rungs - 1)) for k in range(rungs)] if rungs > 1 else [1.0]


def halves(cfg, measured, numbers, rungs):
    """y with noise, `split`: rung k's target is y_plus + sqrt(s_k^2 - s^2) eps_k, s^2 = sigma^2
    (1 + alpha^2) the variance of y_plus's noise and s_k = s times `rung_levels`. y_minus judges,
    whose noise has the variance sigma^2 (1 + 1/alpha^2). numbers int64 [n M]: `replicas_of`."""
    y, sigma, M, alpha = measured.y, measured.sigma, cfg.replicas, cfg.alpha
    given = measured.given()
    y_plus, y_minus = split(y, given, sigma, alpha, numbers, M, cfg.seed)
    given = given.repeat_interleave(M, 0)
    targets = [y_plus + given * sigma * math.sqrt((1 + alpha**2) * (level**2 - 1)) * kernels.normal(
        given.shape, cfg.seed, numbers, RUNG_DRAW + k, kernels.CORRUPTION, y.device)
        for k, level in enumerate(rung_levels(rungs))]
    share = given / given.sum(dim=(1, 2, 3), keepdim=True)
    return Halves(targets, share, y_minus, share, sigma**2 * (1 + 1 / alpha**2))


def held_out(cfg, measured, numbers, rungs):
    """y without noise cannot be split, and has no rungs: each replica judges by a tenth of the
    pixels (of M > 10 replicas, one in M) that it alone is not fitted to."""
    y, M = measured.y, cfg.replicas
    given = measured.given()
    u = kernels.uniform((len(y), 1, *y.shape[2:]), cfg.seed, numbers[::M] // M, HELD_DRAW,
                        kernels.CORRUPTION, y.device)
    whose = (u.repeat_interleave(M, 0) * max(10, M)).long()
    held = whose == torch.arange(M, device=y.device).repeat(len(y)).view(-1, 1, 1, 1)
    y, given = y.repeat_interleave(M, 0), given.repeat_interleave(M, 0)
    fitted, judged = (v / v.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
                      for v in (given * ~held, given * held))
    return Halves([y], fitted, y, judged, 0.0)


def replicas_of(members, M):
    """The numbers of n images' M replicas each: [n M]."""
    return (members[:, None] * M + torch.arange(M, device=members.device)).flatten()


class LikelyMean:
    """The mean of each image's outputs at all looks so far, x [n, C, H, W], by `Halves.weights`.
    Chance in one risk then matters less than where the least is all that counts: on 48 training
    digits, one seed, at sigma = 0.1, 0.2, 0.4 the mean gap to the best look fell from 0.22, 0.22,
    0.36 dB to 0.22, 0.17, 0.29, the worst from 1.4, 1.6, 1.6 to 0.8, 0.8, 1.4."""

    def __init__(self, x):
        self.x, self.weight = x, torch.zeros_like(x[:, 0, 0, 0])
        self.least = torch.full_like(self.weight, math.inf)

    def add(self, image, x, risk, half, M):
        """The outputs x of the images whose numbers are `image`, and their risks. Weights are in
        units of that of the least risk: a new least makes all before it weigh less."""
        least = torch.minimum(self.least[image], risk)
        before = self.weight[image] * half.weights(self.least[image], least, M)
        now = half.weights(risk, least, M)
        share = (now / (before + now)).view(-1, 1, 1, 1)
        self.x[image] += share * (x - self.x[image])
        self.weight[image], self.least[image] = before + now, least


def fit_guided(cfg, measured, members, rungs, budget, run, watch=None):
    """The nested split ladder: n images x M replicas as one grouped network. Each rung is fitted
    until the risk of the replicas' outputs, averaged over iterations, has not fallen for
    --patience iterations; then weights, Adam's memory and output go back to the rung's best. The
    ladder ends where a rung is no better than the one before: the image leaves the group. One rung
    is an early stop alone. A replica whose loss jumps back half of the way to that of a flat output
    has collapsed, and goes back to the best as well.

    Returns the `LikelyMean` of the outputs at every look [n, C, H, W] and the iterations that each
    image took [n]. `watch` is called at each look with the iteration and the outputs; of images
    that have left, with their results. RuntimeError where a fit leaves the finite numbers."""
    n, C, (H, W), M = len(measured.y), measured.y.shape[1], measured.mask.shape[2:], cfg.replicas
    device, dtype = measured.y.device, measured.y.dtype
    patience = cfg.patience or (50 if max(H, W) <= 64 else 200)
    numbers = replicas_of(members, M)
    half = (halves if measured.sigma else held_out)(cfg, measured, numbers, rungs)
    group = DIPGroup(cfg, numbers, C, H, W, dtype)
    result = LikelyMean(torch.zeros(n, C, H, W, dtype=dtype, device=device))
    iterations = torch.full((n,), budget, device=device)
    # of each image that is still in the group: its number, its rung, iterations without a lower
    # risk, and the least risk on this rung and on the last; of each replica its least loss
    image, rung, since = torch.arange(n, device=device), *torch.zeros(
        2, n, dtype=torch.int64, device=device)
    best, last = torch.full((2, n), math.inf, dtype=dtype, device=device)
    low = torch.full((n * M,), math.inf, dtype=dtype, device=device)
    replica = torch.arange(n * M, device=device)  # those that are still in the group
    target, A = half.targets[0], measured.part(replica // M).A
    progress = edge.Progress(f"guide, {rungs} rung{'s' * (rungs > 1)}", budget, n * M)
    for i in range(budget):
        _, losses = group.iterate(i, target, half.fitted, A)
        progress(i + 1)
        if (i + 1) % CHECK and i + 1 < budget:
            continue
        if run.stop:
            raise KeyboardInterrupt
        flat = (target * half.fitted).sum(dim=(1, 2, 3), keepdim=True)
        flat = ((target - flat).square() * half.fitted).sum(dim=(1, 2, 3))  # a flat output's loss
        collapsed = (low < flat) & (losses > (low + flat) / 2)
        group.rewind(collapsed)
        low = torch.where(collapsed, low, torch.minimum(low, losses))
        risk = half.risk(A(group.average), M).nan_to_num(math.inf, math.inf)
        if torch.minimum(torch.minimum(best, last), risk).isinf().any():
            raise group.not_finite(i)
        x = group.average.view(-1, M, C, H, W).mean(1).nan_to_num()
        result.add(image, x, risk, half, M)
        since = torch.where(risk < best, 0, since + CHECK)
        group.save((risk < best).repeat_interleave(M))
        best = torch.minimum(best, risk)
        ended = since >= patience
        leaves = ended & ((rung == len(half.targets) - 1) | (best >= last))
        climbs = ended & ~leaves
        if climbs.any():  # to the next rung, from this one's best
            rung = rung + climbs
            last, best = torch.where(climbs, best, last), best.masked_fill(climbs, math.inf)
            up, since = climbs.repeat_interleave(M), since * ~climbs
            group.rewind(up)
            group.age[up], low[up] = 0, math.inf
            target = target.clone()
            for k in rung[climbs].unique():
                there = (climbs & (rung == k)).repeat_interleave(M)
                target[there] = half.targets[k][replica[there]]
        iterations[image[leaves]] = i + 1
        image, x = image[~leaves], x[~leaves]
        if watch is not None:
            watch(i + 1, result.x.index_copy(0, image, x))
        if leaves.all():
            progress(budget)
            break
        if leaves.any():
            stay = ~leaves
            rung, since, best, last = (v[stay] for v in (rung, since, best, last))
            stay = stay.repeat_interleave(M)
            group.keep(stay)
            replica, low, target, half = (replica[stay], low[stay], target[stay],
                                          half.part(stay))
            A = measured.part(replica // M).A
    return result.x, iterations


class WindowedVariance:
    """ES-WMV (Wang, Li et al. 2023, algorithm 1): stop where the variance of the last W outputs,
    summed over pixels, has had its minimum and not fallen below it for `patience` iterations. The
    window's sums are kept, so an iteration costs a few passes over the pixels whatever W is. Call
    it with each iteration's outputs and what would be returned [K, C, H, W]; then `x` holds what it
    would have returned, `stopped` after how many iterations [K], inf where it has not."""

    def __init__(self, window, patience):
        self.W, self.patience, self.outputs = window, patience, []

    def __call__(self, i, output, x):
        if not self.outputs:
            self.sum, self.squares = torch.zeros(2, *x.shape, dtype=torch.float64, device=x.device)
            self.x, self.least = x.clone(), torch.full_like(self.sum[:, 0, 0, 0], math.inf)
            self.best = torch.zeros_like(self.least)
            self.stopped = torch.full_like(self.least, math.inf)
        self.outputs.append(output)
        self.sum += output
        self.squares += output.square()
        if len(self.outputs) > self.W:
            old = self.outputs.pop(0)
            self.sum -= old
            self.squares -= old.square()
        if len(self.outputs) == self.W:
            variance = (self.squares / self.W - (self.sum / self.W) ** 2).sum(dim=(1, 2, 3))
            better = (variance < self.least) & self.stopped.isinf()
            self.x[better], self.least[better], self.best[better] = x[better], variance[better], i
            done = self.stopped.isinf() & (i - self.best >= self.patience)
            self.stopped[done] = i + 1


class Observed(NamedTuple):
    """What --mode dip and guide start from: the test split, the truth [n, C, H, W] in [0, 1] if
    there is one, the images' Measurement, whose sigma is what the fit believes; what a row says of
    it; the images' numbers; and how many iterations a fit may take."""

    images: data.Images
    truth: torch.Tensor | None
    measured: Measurement
    about: dict
    members: torch.Tensor
    budget: int


def observe(cfg, run):
    """Load the test images and add what --sigma, --noise and --task say. A noise level that is not
    given is the median over the images, which are taken to come from one source."""
    test = load_images(cfg, "test", limit=cfg.samples or 16)
    if len(cfg.task) > 1:
        raise ValueError(f"--task {show(cfg.task)}: --mode {cfg.mode} takes one task")
    task = "denoise" if cfg.task[0] == "generate" else cfg.task[0]
    N, C, H, W = test.pixels.shape
    check_size(task, H, W)
    truth = test.pixels.to(run.device).float() / 255
    members = torch.arange(N, device=run.device)
    if cfg.noise == "own":
        measured, truth = Measurement(task, truth, torch.ones_like(truth[:, :1]), 0.0), None
    else:
        measured = corrupt(cfg, task, truth, members)
    if cfg.mode == "guide" and not measured.sigma and not {"plain", "mean", "split"} & {*cfg.arms}:
        raise ValueError(f"--arms {show(cfg.arms)}: there is no noise to make rungs of")
    about = {"seed": cfg.seed, "task": task}
    if truth is not None:
        about["sigma"] = measured.sigma
    if cfg.noise != "given":
        measured = measured._replace(sigma=noise_level(measured.y).median().item())
        about["sigma_estimate"] = round(measured.sigma, 5)
    budget = cfg.dip_iters or (1000 if max(H, W) <= 64 else 3000)
    DIPGroup(cfg, members[:1], C, H, W)  # who cannot take this size says so before run.begin
    run.begin()
    edge.say(f"data: {test.name}, {N} image{'s' * (N > 1)} of {C}x{H}x{W}; {task}, sigma "
             f"{measured.sigma:.3g}{'' if cfg.noise == 'given' else ' (estimated)'}; at most "
             f"{budget} iterations; {run.device}")
    return Observed(test, truth, measured, about, members, budget)


def in_groups(cfg, members, replicas):
    """The images' numbers, as many together as --dip-group has networks for."""
    return members.split(max(1, cfg.dip_group // replicas))


def fit_guided_in_groups(cfg, seen, rungs, run, tell=False):
    """`fit_guided` for any number of images: outputs, iterations and, where there is a truth, the
    best PSNR of each image, of every look and the result, and the mean over the images by
    iteration, [[i, PSNR]]; a group that has ended stays where it was. With `tell` PSNR and SSIM are
    printed now and then."""
    fits, lines, psnr = [], [], measure.psnr
    for rows in in_groups(cfg, seen.members, cfg.replicas):
        line = []

        def look(i, x, truth=None if seen.truth is None else seen.truth[rows]):
            line.append((i, psnr(x.clamp(0, 1), truth)))
            if tell and i % 50 == 0:
                ssim = measure.ssim(x.clamp(0, 1), truth).mean()
                edge.say(f"iteration {i}: psnr {line[-1][1].mean():.2f}, ssim {ssim:.4f}")

        fits.append(fit_guided(cfg, seen.measured.part(rows), rows, rungs, seen.budget, run,
                               look if seen.truth is not None else None))
        lines.append(line)
    x, iterations = map(torch.cat, zip(*fits))
    if seen.truth is None:
        return x, iterations, None, []
    best = torch.cat([torch.stack([p for _, p in line]).max(0).values for line in lines])
    best = torch.maximum(best, psnr(x.clamp(0, 1), seen.truth))  # of those that end with the budget
    curve = [[i, round(torch.cat([line[min(k, len(line) - 1)][1] for line in lines]).mean().item(),
                       3)] for k, (i, _) in enumerate(max(lines, key=len))]
    return x, iterations, best, curve


def fit_plain(cfg, measured, members, replicas, targets, truth, budget, run):
    """DIPs that nothing stops, of M replicas each, averaged; fitted to `targets` (see `fit_dips`).
    Returns {arm: (outputs, iterations [n])}: their end, `plain`; their best moment, which only the
    truth can tell, `oracle`; and where the variance of their outputs stops, `es-wmv`; and the curve
    of their PSNR [(iteration, [n])]."""
    M, shape = replicas, truth.shape
    stop = WindowedVariance(*((30, 300) if max(shape[2:]) <= 32 else (100, 1000)))
    best, curve = torch.zeros_like(truth), []
    oracle = torch.full((len(truth),), -math.inf, dtype=torch.float64, device=truth.device)
    when = torch.zeros_like(oracle)

    def mean(x):
        return x.view(-1, M, *shape[1:]).mean(1)

    def watch(i, x, average):
        if run.stop:
            raise KeyboardInterrupt
        stop(i, mean(x), mean(average))
        if (i + 1) % CHECK == 0 or i + 1 == budget:
            psnr = measure.psnr(mean(average).clamp(0, 1), truth)
            up = psnr > oracle
            best[up], oracle[up], when[up] = mean(average)[up], psnr[up], i + 1
            curve.append((i + 1, psnr))

    y = [y.repeat_interleave(M, 0) for y in targets]
    part = measured.part(torch.arange(len(truth), device=truth.device).repeat_interleave(M))
    progress = edge.Progress("plain", budget, len(y[0]))
    x = mean(fit_dips(cfg, y, replicas_of(members, M), budget, progress, part, 0.0, watch))
    return {"plain": (x, torch.full_like(when, budget)), "oracle": (best, when),
            "es-wmv": (stop.x, stop.stopped.clamp(max=budget))}, curve


def leaking_rungs(cfg, measured, truth, sigma, members):
    """What `literal` is fitted to: the clean image under the noise of each rung, drawn afresh; and
    the mean of these by their precisions, which is all that they tell of it. -> a list of y's shape
    for each rung, and y's shape."""
    clean, given, levels = measured.A(truth), measured.given(), rung_levels(cfg.rungs)
    rungs = [clean + given * (sigma * level) * kernels.normal(
        clean.shape, cfg.seed, members, RUNG_DRAW + cfg.rungs + k, kernels.CORRUPTION,
        clean.device) for k, level in enumerate(levels)]
    weights = [level**-2 for level in levels]
    return rungs, sum(w * y for w, y in zip(weights, rungs)) / sum(weights)


def run_guide(cfg, run):
    """--mode guide: test images with noise, fitted by every arm for equally many iterations at
    most. `plain`, `oracle` and `es-wmv` are one fit, looked at in three ways, of one network an
    image; `-mean` is the same of as many networks, averaged, as `split` and `ladder` have. `split`
    is `ladder` with one rung: all that is left of it where there is no noise. `literal` fits noised
    copies of the *clean* image and `literal-mean` one DIP to their precision-weighted mean: both
    are handed the truth, and say so."""
    seen = test, truth, measured, about, members, budget = observe(cfg, run)
    n, sigma, M = len(truth), about["sigma"], cfg.replicas
    rows, curves = [], {}
    shown = {"truth": truth[:16], "corrupted": measured.back(measured.y)[:16]}
    bound = None  # the oracle of one network: PSNR of each image

    def add(name, x, iterations, networks, seconds=None, **more):
        x = x.clamp(0, 1)
        mean = iterations.double().mean().item()
        row = {"name": name} | about | measure.measures(x, truth) | {
            "iterations": round(mean, 1), "networks": networks,
            "network_steps": round(networks * mean)} | more
        if bound is not None:
            gap = bound - measure.psnr(x, truth)
            row |= {"gap": round(gap.mean().item(), 3), "gap_worst": round(gap.max().item(), 3)}
        rows.append(row | ({} if seconds is None else {"seconds": round(seconds, 2)}))
        shown[name] = x[:16]
        edge.say(describe(rows[-1]))

    def plain(replicas, targets):
        """`fit_plain` in groups: {arm: (outputs, iterations)}, PSNR's curve, seconds."""
        began = time.time()
        fits, looks = zip(*(fit_plain(cfg, measured.part(g), g, replicas, [y[g] for y in targets],
                                      truth[g], budget, run)
                            for g in in_groups(cfg, members, replicas)))
        arms = {arm: tuple(map(torch.cat, zip(*(fit[arm] for fit in fits)))) for arm in fits[0]}
        curve = [[look[0][0], round(torch.cat([psnr for _, psnr in look]).mean().item(), 3)]
                 for look in zip(*looks)]
        return arms, curve, time.time() - began

    first = time.time()
    for wanted, replicas, suffix in ("plain", 1, ""), ("mean", M, "-mean"):
        if wanted not in cfg.arms or suffix and M == 1:
            continue
        arms, curves[f"psnr/plain{suffix}"], took = plain(replicas, [measured.y])
        if not suffix:
            bound = measure.psnr(arms["oracle"][0].clamp(0, 1), truth)
        for arm, (x, iterations) in arms.items():
            share = {"plain": 1.0, "es-wmv": iterations.mean().item() / budget}.get(arm)
            add(arm + suffix, x, iterations, replicas, share and share * took)
    for name, rungs in (("split", 1), ("ladder", cfg.rungs))[:2 if sigma else 1]:
        if name not in cfg.arms:
            continue
        began = time.time()
        x, iterations, best, curves[f"psnr/{name}"] = fit_guided_in_groups(cfg, seen, rungs, run)
        took = time.time() - began
        gap = best - measure.psnr(x.clamp(0, 1), truth)
        add(name, x, iterations, M, took, own_gap=round(gap.mean().item(), 3),
            own_gap_worst=round(gap.max().item(), 3))
    notes = []
    if sigma and "literal" in cfg.arms:
        leaking, mean = leaking_rungs(cfg, measured, truth, sigma, members)
        for name, targets in ("literal", leaking), ("literal-mean", [mean]):
            arms, curves[f"psnr/{name}"], took = plain(1, targets)
            best = measure.psnr(arms["oracle"][0].clamp(0, 1), truth).mean().item()
            add(name, *arms["plain"], 1, took, leaks=True, psnr_oracle=round(best, 3))
        notes = ["literal and literal-mean were fitted to noised copies of the clean image: they "
                 "leak it"]
    run.seconds["dip"] = time.time() - first
    finish(run, {"notes": notes,
                 "data": {"name": test.name, "train": 0, "test": n, "sha256": test.sha256},
                 "arms": rows, "curves": curves, "pictures": [measure.draw(
                     run.folder / "guide.png", f"{measured.task}, sigma = {sigma:g}", shown)]})
    edge.say(measure.text_tables([run.folder], ("psnr", "ssim")))


# ------------------------------------------------------------------ other runs


def run_dip(cfg, run):
    """--mode dip: fit DIPs to test images with noise and stop each where the risk says so, as the
    guide's `split`. Where the truth is known PSNR and SSIM are followed: they rise, peak, and would
    fall back as the network learns the noise (Ulyanov et al. 2018, section 3)."""
    seen = test, truth, measured, about, *_ = observe(cfg, run)
    began = time.time()
    x, iterations, best, curve = fit_guided_in_groups(cfg, seen, 1, run, tell=True)
    x = x.clamp(0, 1)
    run.seconds["dip"] = took = time.time() - began
    corrupted = measured.back(measured.y).clamp(0, 1)
    arms = [{"name": name} | about for name in ("corrupted", "dip")]
    arms[1] |= {"seconds": round(took, 3), "networks": cfg.replicas,
                "iterations": round(iterations.float().mean().item(), 1)}
    curves, marks = {}, {}
    if truth is not None:
        arms[0] |= measure.measures(corrupted, truth)
        arms[1] |= measure.measures(x, truth) | {"psnr_oracle": round(best.mean().item(), 3)}
        curves["psnr/mean over images"] = curve
        marks["psnr"] = {"best": max(curve, key=lambda point: point[1])[0], "end": curve[-1][0]}
    for row in arms:
        edge.say(describe(row))
    for k, image in enumerate(x[:16]):
        measure.save_png(measure.grid(image[None]), run.folder / f"restored-{k:02}.png")
    shown = {} if truth is None else {"truth": truth[:16]}
    picture = measure.draw(run.folder / "dip.png", f"{measured.task}, sigma = {measured.sigma:.3g}",
                           shown | {"corrupted": corrupted[:16], "dip": x[:16]})
    finish(run, {
        "data": {"name": test.name, "train": 0, "test": len(x), "sha256": test.sha256},
        "arms": arms, "curves": curves, "pictures": [picture], "marks": marks})


def run_sample(cfg, run):
    """--mode sample: pictures from a finished run's network, from noise; needs no data."""
    saved = edge.load_checkpoint(cfg.resume)
    if "full" not in saved["networks"]:
        raise ValueError(f"{cfg.resume} holds no network for all t")
    C, H, W = saved["shape"]
    net = make_unet(cfg, C, run.device)
    edge.load_weights(net, saved["networks"]["full"]["ema"], cfg.resume)
    run.begin()
    n = cfg.samples or 64
    numbers = torch.arange(n, device=run.device)
    x_init = kernels.normal((n, C, H, W), cfg.seed, numbers, 0, kernels.INIT_NOISE, run.device)
    arms, pictures, films = [], [], {}
    for nfe, setting in itertools.product(cfg.nfe, samplers(cfg)):
        film = [] if (nfe, setting) == (film_nfe(cfg), samplers(cfg)[0]) else None
        x, row = timed_sample(cfg, run, "ddpm", net, x_init, cfg.timesteps, nfe, setting, numbers,
                              film=film)
        films |= {"ddpm": film} if film else {}
        arms.append(row)
        file = "-".join(["samples", f"nfe{nfe}", *setting_of(row, cfg).split()[1:]]) + ".png"
        picture = measure.grid(((x + 1) / 2).clamp(0, 1).cpu(), scale=measure.zoom(x))
        measure.save_png(picture, run.folder / file)
        pictures.append({"file": file, "caption": f"{n} samples, {nfe} network evaluations, "
                         f"eta = {setting[0]:g}, order {setting[1]}, {setting[2]} grid"})
        edge.say(describe(row) + f"   {run.folder / file}")
    pictures.append(draw_film(run, films))
    finish(run, {"data": saved["data"], "arms": arms, "curves": {}, "pictures": pictures,
                 "parameters": sum(p.numel() for p in net.parameters())})


MODES = {"dip": run_dip, "ddpm": run_prior, "prior": run_prior, "guide": run_guide,
         "sample": run_sample}


# ------------------------------------------------------------------ results and pictures


def describe(row):
    """One row of results as one line of text."""
    keys = ("task", "train", "nfe", "t_start", "eta", "order", "grid", "fid_lenet", "precision",
            "recall", "nearest", "psnr", "ssim", "psnr_oracle", "seconds")
    return f"{row['name']:<13}" + "  ".join(f"{k} {show(row[k])}" for k in keys if k in row)


def loss_curves(rows):
    """log.csv's rows -> {"loss/network": [[step, loss], ...]}, thinned to about 200 points."""
    curves = {}
    for name, step, _, _, loss, _ in rows:
        curves.setdefault(f"loss/{name}", []).append([step, round(loss, 5)])
    return {k: v[::max(1, len(v) // 200)] for k, v in curves.items()}


def draw_arms(cfg, run, pictures, priors, sources):
    """A picture for each number of evaluations, a row for each arm, by the first sampler and from
    the first t_start; and one of the priors."""
    eta, order, grid = samplers(cfg)[0]
    drawn = []
    for nfe in cfg.nfe:
        rows = {arm: (x + 1) / 2 for (arm, n), x in pictures.items() if n == nfe}
        drawn.append(measure.draw(
            run.folder / f"samples-nfe{nfe}.png", f"{nfe} network evaluations, eta = {eta:g}, "
            f"order {order}, {grid} grid", rows))
    if priors:
        n = min(16, *map(len, priors.values()))
        rows = {"source": sources[:n].float() / 255}
        rows |= {arm: (x[:n] + 1) / 2 for arm, x in priors.items()}
        drawn.append(measure.draw(
            run.folder / "priors.png", "what the arms start from, before noise; source: the "
            f"training images that {' and '.join(HAS_SOURCE)} are made of", rows))
    return drawn


def film_nfe(cfg):
    """The number of evaluations that is filmed: the nearest to ten."""
    return min(cfg.nfe, key=lambda nfe: abs(nfe - 10))


def draw_film(run, films):
    """The reverse process of the first image as a strip, {arm: [x_t, ...]}."""
    steps = len(next(iter(films.values()))) - 1
    return measure.draw(run.folder / "film.png", "the reverse process of one image, from left to "
                        f"right, in {steps} network evaluations",
                        {arm: (torch.cat(film) + 1) / 2 for arm, film in films.items()})


def finish(run, result):
    """Write results.json and report.html; say where they are."""
    run.seconds["total"] = run.clock()
    result = {"mode": run.config["mode"], "config": run.config, "command": run.command,
              "device": run.device_name, "precision": run.precision, "torch": torch.__version__,
              "commit": run.commit, "seconds": {k: round(v, 2) for k, v in run.seconds.items()},
              } | result
    measure.write_json(result, run.folder / "results.json")
    measure.report(run.folder)
    edge.say(f"report: {run.folder / 'report.html'}")


def write_log(run, rows):
    """log.csv, written whole: rows are few, and a half-written line is impossible."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "step", "epoch", "seconds", "loss", "lr"])
    writer.writerows(rows)
    measure.write_text(text.getvalue(), run.folder / "log.csv")


# ------------------------------------------------------------------ main


def configs(argv):
    """Command line -> one Config, or with --sweep NAME=V1,V2,... one for each value, as if --NAME
    had been given it, each with a folder of its own; of several sweeps, for each combination."""
    cfg = read_config(argv)
    if not cfg.sweep:
        return [cfg]
    each, names = [[]], set()
    for sweep in cfg.sweep:
        name, _, values = sweep.partition("=")
        known = asdict(cfg).keys() - {"sweep", "out", "resume", "overwrite"} - names
        if name.replace("-", "_") not in known or not values:
            raise ValueError(f"--sweep {sweep}: want NAME=V1,V2,... with NAME a flag's name, once")
        names.add(name.replace("-", "_"))
        each = [[*flags, f"{name}={v}"] for flags in each for v in dict.fromkeys(values.split(","))]
    parent = Path(cfg.out or f"runs/sweep-{time.strftime('%Y%m%d-%H%M%S')}")
    return [replace(read_config([*argv, *(f"--{f}" for f in flags),
                                 f"--out={parent / '-'.join(flags)}"]), sweep=())
            for flags in each]


def left_of_a_sweep(cfg):
    """One run of a sweep that may have been given before -> None if it is finished, the Config that
    continues it, or starts it again where there is nothing to continue."""
    folder = Path(cfg.out)
    if cfg.overwrite or not (folder / "config.json").exists():
        return cfg
    saved = read_saved_flags(folder)
    if Path(saved["resume"] or "").resolve() == folder.resolve():  # it was continued before
        saved["resume"] = cfg.resume
    free = {"out": None, "overwrite": False, "sweep": (), "data_dir": None}  # may differ
    differs = sorted(k for k, v in (asdict(cfg) | free).items() if v != (saved | free)[k])
    if differs:
        raise ValueError(f"{folder} is a run with another --{differs[0].replace('_', '-')}: "
                         "--overwrite it, or name another --out")
    if (folder / "results.json").exists():
        edge.say(f"{folder}: finished before")
        return None
    if cfg.mode in ("ddpm", "prior") and (not cfg.resume or (folder / edge.CHECKPOINT).exists()):
        return replace(cfg, out=None, resume=str(folder))
    return replace(cfg, overwrite=True)


def main(argv=None):
    """The command line. Exit status: 0 done, 1 the run failed, 2 misuse or bad input, 130 or 143
    interrupted by SIGINT or SIGTERM (after a checkpoint)."""
    argv = sys.argv[1:] if argv is None else argv
    edge.keep_freed_memory()
    run = None
    try:
        each = configs(argv)
        folders = [cfg.out for cfg in each]
        if read_config(argv).sweep:
            edge.join_processes(each[0])
            each = edge.the_first_ones([left_of_a_sweep(cfg) for cfg in each])
        for cfg in each:
            if run and run.stop:
                raise KeyboardInterrupt
            if cfg is None:
                continue
            run = edge.Run(cfg, argv)

            def stop_soon(number, _, run=run):
                """First signal: at the next safe place. Second: at once."""
                stopped, run.stop = run.stop, number
                if stopped:
                    raise KeyboardInterrupt

            before = {number: signal.signal(number, stop_soon)
                      for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                MODES[cfg.mode](cfg, run)
            finally:
                run.close()
                for number, handler in before.items():
                    signal.signal(number, handler)
            run.begun = False  # it has ended well
        if len(folders) > 1 and edge.processes()[0] == 0:
            page = Path(folders[0]).parent / "comparison.html"
            measure.compare(folders, page)
            edge.say(measure.text_tables(folders))
            edge.say(f"comparison: {page}")
        if dist.is_initialized():
            dist.destroy_process_group()
    except (MemoryError, RuntimeError) as error:
        said = "out of memory", "allocate memory", "enough memory"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
                words in str(error) for words in said):
            error = "out of memory: lower --batch in training, --samples or --dip-group after it"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            error = f"another process ended{how_to_go_on(run)}"
        sys.exit(fail(error, 1))
    except (ValueError, OSError) as error:
        sys.exit(fail(error, 1 if error_of_disk(error) or run and run.begun else 2))
    except KeyboardInterrupt:
        print(f"dipddpm: interrupted{how_to_go_on(run)}", file=sys.stderr)
        sys.exit(128 + (run.stop if run and run.stop else signal.SIGINT))


def how_to_go_on(run):
    """What to say of a run that did not end: a training goes on, from its checkpoint or anew."""
    resumes = run and run.begun and run.config["mode"] in ("ddpm", "prior")
    return f"; continue with --resume {run.folder}" if resumes else ""


def error_of_disk(error):
    """Whether a file could not be written for lack of room: a failed run, no misuse."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fail(error, status):
    first = (str(error).splitlines() or [type(error).__name__])[0]
    print(f"dipddpm: {first}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
