"""Noisy photos, and photos with holes or of half the size: what --mode dip makes of them, beside
DIPs and what people use.

    python -m studies.photos PHOTO... --crop 256 --sigma 0.098 --seeds 0,1,2 --out FILE.json
    python -m studies.photos PHOTO... --crop 128 --task sr --arms split,plain --out FILE.json
    python -m studies.photos PHOTO... --crop 128 --task inpaint --holes 0.9 --out FILE.json

`split` is a DIP that is stopped by its risk, `plain` a DIP that nothing stops; Adam alone fits, as
in a DIP's paper, those of `split-adam`, `adam`, `es-wmv` and `aseq-dip`. psnr_oracle is of an arm's
best moment, which only the truth can tell, psnr_end of its last. CBM3D needs the package bm3d,
which is free for research only. It and non-local means see holes filled (biharmonic) and are
enlarged (bicubic); without noise they are only that.
"""

import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.restoration import denoise_nl_means, inpaint_biharmonic  # of the tests' packages

import data
import dipddpm
import eval as measure
import kernels
from studies.arms import WindowedVariance


def nlm(y, sigma):
    """Non-local means of scikit-image (Buades et al. 2005). Of h = 0.5 to 0.9 sigma 0.6 is the best
    at 25/255, and nearly so at 15 and 50."""
    return denoise_nl_means(y, h=0.6 * sigma, sigma=sigma, patch_size=5, patch_distance=6,
                            channel_axis=-1)


def cbm3d(y, sigma):
    """Block matching and 3D filtering of colour pictures (Dabov et al. 2007), its authors'
    package."""
    try:
        from bm3d import bm3d_rgb
    except ImportError as error:
        raise ValueError("cbm3d needs the package bm3d: pip install bm3d") from error
    return bm3d_rgb(y, sigma)


def as_people_do(denoise):
    """An arm: holes filled, noise taken off by `denoise`(y [H, W, C], sigma), enlarged."""
    def arm(cfg, known, numbers, look):
        made = []
        for y, mask in zip(known.y.double(), known.mask[:, 0]):
            x = y.permute(1, 2, 0).numpy()
            if not mask.all():
                x = inpaint_biharmonic(x, (mask == 0).numpy(), channel_axis=-1)
            x = torch.as_tensor(denoise(x, known.sigma) if known.sigma else x)
            x = x.permute(2, 0, 1)[None].float()
            made.append(F.interpolate(x, size=mask.shape, mode="bicubic"))
        return torch.cat(made), torch.zeros(len(made))
    return arm


def zs_n2n(cfg, known, numbers, look):
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


def es_wmv(cfg, known, numbers, look):
    """A DIP by Adam of which the moment is taken when its outputs vary least (Wang, Li et al. 2023,
    window of 100); the whole of cfg.dip_iters is waited for a lesser one."""
    cfg = replace(cfg, muon=False)
    stop = WindowedVariance(min(100, cfg.dip_iters), math.inf)

    def each(i, x, average):
        stop(i, x, average)
        if i % dipddpm.CHECK == 0 or i == cfg.dip_iters:
            look(i, average)
    dipddpm.fit_dips(cfg, known, numbers, cfg.dip_iters, look=each)
    return stop.x, stop.best


def aseq_dip(cfg, known, numbers, look, every=2, weight=1):
    """aSeqDIP (Alkhouri et al. 2024, algorithm 1): a network sees its own last output, first the
    measurement, is fitted to the measurement and to what it sees, and sees anew every so often.
    The network, Adam and its rate are those of the other DIPs."""
    C, (H, W), z = known.y.shape[1], known.mask.shape[2:], known.back(known.y)
    net = dipddpm.Skip(dipddpm.Grouped(numbers, cfg.seed), C, C, H, W, cfg.dip_width)
    adam = torch.optim.Adam(net.parameters(), cfg.dip_lr)

    def output():
        with torch.autocast("cpu", torch.bfloat16, cfg.precision == "bf16"):
            return net(z).float()

    for i in range(1, cfg.dip_iters + 1):
        x = output()
        adam.zero_grad()
        ((known.A(x) - known.y).square().sum() + weight * (x - z).square().sum()).backward()
        adam.step()
        if i % every == 0 or i == cfg.dip_iters:
            z = output().detach()
        if i % dipddpm.CHECK == 0 or i == cfg.dip_iters:
            look(i, z)
    return z, torch.full((1,), cfg.dip_iters)


def fitted(fit, **settings):
    """An arm: one of dipddpm's ways to fit, under other settings."""
    def arm(cfg, known, numbers, look):
        return fit(replace(cfg, **settings), known, numbers, look=look)
    return arm


ARMS = {"nlm": (as_people_do(nlm), 1), "cbm3d": (as_people_do(cbm3d), 1),  # and most iterations
        "zs-n2n": (zs_n2n, 2000),
        "denoiser": (fitted(dipddpm.fit_denoisers), None),  # as many as by default
        "split": (fitted(dipddpm.fit_guided), 1000), "plain": (fitted(dipddpm.fit_plain), 1000),
        "adam": (fitted(dipddpm.fit_plain, muon=False), 1000),
        "es-wmv": (es_wmv, 1000), "aseq-dip": (aseq_dip, 1000),
        "split-adam": (fitted(dipddpm.fit_guided, muon=False, patience=200), 1000)}


def with_holes(holes, cfg, x, sigma, numbers, crop):
    """`dipddpm.corrupt` to inpaint, where `holes` is the share of the pixels that is gone, or the
    file of a mask, dark where they are."""
    known = dipddpm.corrupt(cfg, "denoise", x, sigma, numbers)
    try:
        share = float(holes)
    except ValueError:
        white = data.load(holes, split="all", limit=1, crop=crop).pixels.float()
        mask = (white.mean(1, keepdim=True) > 0.95 * 255).float()
    else:
        u = kernels.uniform(known.mask.shape, cfg.seed, numbers, dipddpm.MASK_DRAW,
                            kernels.CORRUPTION, x.device)
        mask = (u < 1 - share).float()
    if mask.shape != known.mask.shape or mask.mean() in (0, 1):
        raise ValueError(f"--holes {holes}: want a share between 0 and 1, or a mask of the photo's "
                         "size with white and dark")
    return known._replace(task="inpaint", mask=mask, y=known.y * mask)


def rows_of(args):
    """A row for each noise, seed, photo and arm: dB, SSIM, iterations, seconds of all cores."""
    numbers = torch.arange(1)
    for sigma, seed, path in itertools.product(args.sigma, args.seeds, args.photos):
        x = data.load(str(path), split="all", limit=1, crop=args.crop).pixels.float() / 255
        cfg = dipddpm.check(dipddpm.resolve(dipddpm.Config(
            mode="dip", data=str(path), seed=seed, sigma=sigma, task=args.task, pictures="test",
            precision=dipddpm.pick_precision(args.precision, numbers.device, photos=True),
            dip_iters=args.iters, replicas=args.replicas, dip_width=args.dip_width), x.shape))
        known = (with_holes(args.holes, cfg, x, sigma, numbers, args.crop) if args.holes is not None
                 else dipddpm.corrupt(cfg, args.task, x, sigma, numbers))
        for arm in args.arms:
            fit, iters = ARMS[arm]
            iters = args.iters or iters or cfg.dip_iters
            began, follow = time.process_time(), dipddpm.Follow(x)
            made, took = fit(replace(cfg, dip_iters=iters), known, numbers,
                             lambda i, x, follow=follow: follow(i, numbers, x))
            row = {"photo": path.stem, "crop": args.crop, "task": args.task, "holes": args.holes,
                   "sigma": sigma, "seed": seed, "arm": arm, "replicas": args.replicas,
                   "precision": cfg.precision, "dip_width": args.dip_width,
                   "seconds": time.process_time() - began, "iterations": int(took[0])}
            if follow.looks:
                row |= {"psnr_oracle": follow.psnr.item(), "best_at": int(follow.when[0]),
                        "psnr_end": follow.curve()[-1][1]}
            made = made.clamp(0, 1)
            name = f"{args.out.stem}-{path.stem}-{sigma:g}-{seed}-{arm}.png"
            given = known.back(known.y)
            shown = {"given": given, arm: made, "what is gone": given - made + 0.5}
            measure.draw(args.out.with_name(name), arm, {"truth": x} | {
                caption: picture.clamp(0, 1) for caption, picture in shown.items()})
            yield row | measure.measures(made, x)


def main(argv=None):
    p = dipddpm.OneLineParser(prog="studies.photos", description=__doc__.splitlines()[0])
    p.add_argument("photos", nargs="+", type=Path)
    p.add_argument("--out", type=Path, required=True, help="a JSON file; pictures beside it")
    p.add_argument("--arms", type=dipddpm.listed(str), default=("nlm", "denoiser"))
    p.add_argument("--crop", type=int)
    p.add_argument("--task", choices=dipddpm.TASKS, default="denoise")
    p.add_argument("--holes", help="inpaint: the share of the pixels that is gone (one half), or "
                   "a mask")
    p.add_argument("--sigma", type=dipddpm.listed(float), default=(25 / 255,))
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0,))
    p.add_argument("--replicas", type=int, default=2)
    p.add_argument("--iters", type=int, help="of each fit, at most (zs-n2n 2000, denoiser 500, "
                   "DIPs 1000)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    p.add_argument("--dip-width", type=int, default=32)
    args = p.parse_args(argv)
    if min(args.sigma) < 0 or args.task == "denoise" and not min(args.sigma):
        p.error(f"--sigma must be more than 0, not {min(args.sigma):g}")
    if args.task != "denoise" and {"denoiser", "zs-n2n"} & set(args.arms):
        p.error(f"--task {args.task}: denoiser and zs-n2n only denoise")
    if args.holes is not None and args.task != "inpaint":
        p.error("--holes needs --task inpaint")
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
