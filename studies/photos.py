"""Noisy photos: what --mode dip makes of them, beside DIPs and what people use.

    python -m studies.photos PHOTO... --crop 256 --sigma 0.098 --seeds 0,1,2 --out FILE.json

`split` is a DIP that is stopped by its risk, `plain` a DIP at its best moment, which only the truth
can tell. CBM3D needs the package bm3d, which is free for research only.
"""

import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.restoration import denoise_nl_means  # of the tests' packages

import data
import dipddpm
import eval as measure


def nlm(cfg, known, numbers):
    """Non-local means of scikit-image (Buades et al. 2005). Of h = 0.5 to 0.9 sigma 0.6 is the best
    at 25/255, and nearly so at 15 and 50."""
    made = [denoise_nl_means(y.permute(1, 2, 0).numpy(), h=0.6 * known.sigma, sigma=known.sigma,
                             patch_size=5, patch_distance=6, channel_axis=-1) for y in known.y]
    return torch.stack([torch.tensor(x).permute(2, 0, 1) for x in made]), torch.zeros(len(made))


def cbm3d(cfg, known, numbers):
    """Block matching and 3D filtering of colour pictures (Dabov et al. 2007), its authors'
    package."""
    try:
        from bm3d import bm3d_rgb
    except ImportError as error:
        raise ValueError("cbm3d needs the package bm3d: pip install bm3d") from error
    made = [torch.tensor(bm3d_rgb(y.permute(1, 2, 0).double().numpy(), known.sigma))
            for y in known.y]
    return torch.stack(made).permute(0, 3, 1, 2).float(), torch.zeros(len(made))


def zs_n2n(cfg, known, numbers):
    """Zero-shot Noise2Noise (Mansour & Heckel 2023): a small network learns one half-sized picture
    from another, of the other diagonals' means, and to do the same before as after halving."""
    torch.manual_seed(cfg.seed)
    C, made = known.y.shape[1], []
    for y in known.y.contiguous(memory_format=torch.channels_last).split(1):
        layers = (nn.Conv2d(C, 48, 3, padding=1), nn.LeakyReLU(0.2),
                  nn.Conv2d(48, 48, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(48, C, 1))
        net = nn.Sequential(*layers)
        adam = torch.optim.Adam(net.parameters(), 1e-3)
        slower = torch.optim.lr_scheduler.StepLR(adam, -(-cfg.dip_iters // 2), 0.5)
        for _ in range(cfg.dip_iters):
            halves, ends = diagonals(y), diagonals(y - net(y))
            guesses = [half - net(half) for half in halves]
            adam.zero_grad()
            sum(F.mse_loss(guess, other) + F.mse_loss(guess, end)
                for guess, other, end in zip(guesses, halves[::-1], ends)).backward()
            adam.step()
            slower.step()
        with torch.no_grad():
            made.append((y - net(y)).contiguous())
    return torch.cat(made), torch.full((len(made),), cfg.dip_iters)


def diagonals(x):
    """The means of either diagonal of x's blocks of 2x2 [n, C, H, W]: two of [n, C, H/2, W/2]. An
    odd last row or column is left out."""
    x = x[..., :x.shape[-2] // 2 * 2, :x.shape[-1] // 2 * 2]
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return (b + c) / 2, (a + d) / 2


def plain(cfg, known, numbers, truth):
    """Each picture's best look at a DIP that nothing stops."""
    follow = dipddpm.Follow(truth)
    dipddpm.fit_plain(cfg, known, numbers, look=lambda i, x: follow(i, numbers, x))
    return follow.best, follow.when


ARMS = {"nlm": (nlm, 1), "cbm3d": (cbm3d, 1), "zs-n2n": (zs_n2n, 2000),  # and iterations, at most
        "denoiser": (dipddpm.fit_denoisers, dipddpm.DENOISER_ITERS),
        "split": (dipddpm.fit_guided, 1000), "plain": (plain, 1000)}


def rows_of(args):
    """A row for each noise, seed, photo and arm: dB, SSIM, iterations, seconds of all cores."""
    for sigma, seed, path in itertools.product(args.sigma, args.seeds, args.photos):
        x = data.load(str(path), split="all", limit=1, crop=args.crop).pixels.float() / 255
        numbers = torch.arange(1)
        cfg = dipddpm.check(dipddpm.resolve(dipddpm.Config(
            mode="dip", data=str(path), seed=seed, sigma=sigma, pictures="test",
            precision=dipddpm.pick_precision(args.precision, numbers.device), dip_iters=args.iters,
            replicas=args.replicas, dip_width=args.dip_width), x.shape))
        known = dipddpm.corrupt(cfg, "denoise", x, sigma, numbers)
        for arm in args.arms:
            fit, iters = ARMS[arm]
            truth = (x,) * (fit is plain)
            began = time.process_time()
            made, took = fit(replace(cfg, dip_iters=args.iters or iters), known, numbers, *truth)
            row = {"photo": path.stem, "crop": args.crop, "sigma": sigma, "seed": seed, "arm": arm,
                   "replicas": args.replicas, "dip_width": args.dip_width,
                   "precision": cfg.precision,
                   "seconds": time.process_time() - began, "iterations": int(took[0])}
            made = made.clamp(0, 1)
            name = f"{args.out.stem}-{path.stem}-{sigma:g}-{seed}-{arm}.png"
            shown = {"noisy": known.y.clamp(0, 1), arm: made, "what is gone": known.y - made + 0.5}
            measure.draw(args.out.with_name(name), arm, {"truth": x} | {
                caption: picture.clamp(0, 1) for caption, picture in shown.items()})
            yield row | measure.measures(made, x)


def main(argv=None):
    p = dipddpm.OneLineParser(prog="studies.photos", description=__doc__.splitlines()[0])
    p.add_argument("photos", nargs="+", type=Path)
    p.add_argument("--out", type=Path, required=True, help="a JSON file; pictures beside it")
    p.add_argument("--arms", type=dipddpm.listed(str), default=("nlm", "denoiser"))
    p.add_argument("--crop", type=int)
    p.add_argument("--sigma", type=dipddpm.listed(float), default=(25 / 255,))
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0,))
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--iters", type=int, help="of each fit, at most (zs-n2n 2000, denoiser 500, "
                   "DIPs 1000)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    p.add_argument("--dip-width", type=int, default=32)
    args = p.parse_args(argv)
    if min(args.sigma) <= 0:
        p.error(f"--sigma must be more than 0, not {min(args.sigma):g}")
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
