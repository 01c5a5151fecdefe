"""Noisy photos: DIPs that are stopped by their risk beside networks that learn from the picture
itself, as a DDPM learns, and non-local means.

    python -m studies.photos PHOTO... --crop 128 --sigma 0.098 --seeds 0,1,2 --out FILE.json

y_plus = x + s e, the half that is fitted, is noised as y was split, afresh in every iteration: the
network sees u = y_plus + a s e' and is to say v = y_plus - s e' / a, whose noises are independent
(Pang et al. 2021, Recorrupted-to-Recorrupted). The other half, y_minus, judges, as in the method.
"""

import functools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.restoration import denoise_nl_means  # of the tests' packages

import data
import dipddpm
import eval as measure
import kernels

ITERS, RATE, INNER = 300, 1e-2, 0.5  # iterations; Muon's peak rate and Adam's; a


class Denoiser(nn.Module):
    """What K networks take for the noise of K pictures: six 3x3 convolutions, 32 channels wide.
    [K, C, H, W] -> [K, C, H, W]."""

    def __init__(self, make, channels, width=32):
        super().__init__()
        sizes = [channels, *[width] * 5, channels]
        self.layers = nn.ModuleList(make.conv(a, b, 3) for a, b in zip(sizes, sizes[1:]))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, u):
        h = u.flatten(0, 1)[None]  # [1, K C, H, W]
        for layer in self.layers[:-1]:
            h = F.leaky_relu(layer(h), 0.1)
        return self.layers[-1](h).view_as(u)


class Denoisers(dipddpm.DIPGroup):
    """K networks, each of which learns from its one picture: to denoise alone, and on a CPU. The
    pictures are mirrored half of the time in each direction, all K alike. `level` is s; Muon and
    Adam, half a cosine over cfg.dip_iters."""

    def __init__(self, cfg, numbers, C, H, W, dtype=torch.float32, *, level):
        super().__init__(replace(cfg, dip_width=1), numbers, C, H, W, dtype)  # its DIPs are unused
        self.level, self.rate = level, torch.zeros((), device=numbers.device)
        self.net = Denoiser(dipddpm.Grouped(numbers, cfg.seed), C).to(dtype)
        inner = [layer.weight for layer in self.net.layers[1:-1]]
        rest = [p for p in self.net.parameters() if all(p is not weight for weight in inner)]
        both = (dipddpm.Muon(inner, self.rate, self.K), torch.optim.Adam(rest, self.rate))
        self.optimizer = SimpleNamespace(zero_grad=self.net.zero_grad,
                                         step=lambda: [each.step() for each in both])

    def iterate(self, y, share, A):
        """One step from u to v, see `dipddpm.DIPGroup.learn`."""
        eps = self.level * kernels.normal(y.shape, self.cfg.seed, self.numbers, self.steps,
                                          kernels.DIP_JITTER, y.device).to(y.dtype)
        flips = kernels.uniform((1, 2), self.cfg.seed, 0, self.steps, kernels.DIP_CODE,
                                y.device)[0] < 0.5

        def mirrored(x):
            return x.flip([axis for flip, axis in zip(flips, (2, 3)) if flip])

        self.rate.fill_(RATE * dipddpm.half_cosine(self.steps.item(), self.cfg.dip_iters))
        u = y + INNER * eps
        self.learn(u - mirrored(self.net(mirrored(u))), y - eps / INNER, share, A)

    def save(self, which):
        """No network here has forgotten all that it had learned: none goes back."""

    def collapsed(self, losses, y, share):
        return torch.zeros_like(self.age, dtype=torch.bool)


def fit_denoisers(cfg, known, numbers):
    """`dipddpm.fit_guided` of `Denoisers`: outputs [n, C, H, W] and iterations [n]."""
    make = functools.partial(Denoisers, level=known.sigma * math.sqrt(1 + cfg.alpha**2))
    return dipddpm.fit_guided(replace(cfg, window=0.97), known, numbers, make=make)


def nlm(cfg, known, numbers):
    """Non-local means of scikit-image. Of 0.6 and 0.8 sigma, which its examples have for h, 0.6 is
    the better one at 25/255."""
    made = [denoise_nl_means(y.permute(1, 2, 0).numpy(), h=0.6 * known.sigma, sigma=known.sigma,
                             patch_size=5, patch_distance=6, channel_axis=-1) for y in known.y]
    return torch.stack([torch.tensor(x).permute(2, 0, 1) for x in made]), torch.zeros(len(made))


ARMS = {"nlm": (nlm, 1), "denoiser": (fit_denoisers, ITERS),
        "split": (dipddpm.fit_guided, 1000)}  # and iterations, at most


def rows_of(args):
    """A row for each photo, seed and arm: dB, SSIM, iterations, seconds of all cores."""
    for path in args.photos:
        x = data.load(str(path), split="all", limit=1, crop=args.crop).pixels.float() / 255
        for seed in args.seeds:
            cfg = dipddpm.check(dipddpm.resolve(dipddpm.Config(
                mode="dip", data=str(path), seed=seed, sigma=args.sigma, pictures="test",
                dip_iters=args.iters, replicas=args.replicas, dip_width=args.dip_width), x.shape))
            numbers = torch.arange(1)
            known = dipddpm.corrupt(cfg, "denoise", x, args.sigma, numbers)
            for arm in args.arms:
                fit, iters = ARMS[arm]
                began = time.process_time()
                made, took = fit(replace(cfg, dip_iters=args.iters or iters), known, numbers)
                row = {"photo": path.stem, "crop": args.crop, "sigma": args.sigma, "seed": seed,
                       "arm": arm, "replicas": args.replicas, "dip_width": args.dip_width,
                       "seconds": time.process_time() - began, "iterations": int(took[0])}
                shown = {"truth": x, "noisy": known.y.clamp(0, 1), arm: made.clamp(0, 1)}
                measure.draw(args.out.with_name(f"{args.out.stem}-{path.stem}-{seed}-{arm}.png"),
                             arm, shown)
                yield row | measure.measures(made.clamp(0, 1), x)


def main(argv=None):
    p = dipddpm.OneLineParser(prog="studies.photos", description=__doc__.splitlines()[0])
    p.add_argument("photos", nargs="+", type=Path)
    p.add_argument("--out", type=Path, required=True, help="a JSON file; pictures beside it")
    p.add_argument("--arms", type=dipddpm.listed(str), default=tuple(ARMS))
    p.add_argument("--crop", type=int)
    p.add_argument("--sigma", type=float, default=25 / 255)
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0,))
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--iters", type=int, help="of each fit (denoiser 300, split 1000)")
    p.add_argument("--dip-width", type=int, default=32)
    args = p.parse_args(argv)
    if args.sigma <= 0:
        p.error(f"--sigma must be more than 0, not {args.sigma:g}")
    if unknown := set(args.arms) - set(ARMS):
        p.error(f"--arms: {', '.join(sorted(unknown))}: want some of {', '.join(ARMS)}")
    dipddpm.keep_freed_memory()
    rows = []
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for row in rows_of(args):
            rows.append(row)
            measure.write_json(rows, args.out)
            print(json.dumps(row), flush=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    except RuntimeError as error:
        p.exit(1, f"dipddpm: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
