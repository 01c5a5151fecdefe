"""The five student reports, done again: their numbers beside ours, and the experiments that show
why they differ.

    python -m studies.reports A          MNIST: an image-to-image DIP, and denoising
    python -m studies.reports B          Fashion-MNIST: a DIP's iterations, its cost and its loss
    python -m studies.reports C          small colour pictures: five measures, and what they are of
    python -m studies.reports D          one photo: a ladder of noised clean images against a DIP
    python -m studies.reports E          CIFAR-10: FID during training on a DIP's outputs
    python -m studies.reports A B C D E  all; --full: the reports' sizes, for a GPU

A study trains by the command lines of dipddpm.py and studies.arms, in runs/reports/STUDY (given
again, only the runs that are missing are done), measures what these do not, and writes table.md
there: what was measured, what the report says, what is found here (mean ± standard deviation over
seeds).
"""

import json
import math
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dipddpm
import eval as measure
import kernels
from studies import arms
from studies.restore import start_from_noisy

# What each study takes. Small is for two cores; noise levels are ours, no report tells its own.
SMALL = {
    "A": dict(pictures="mnist", epochs=(1, 2), width=8, dip_width=16, dip_iters=100, sigma=0.5,
              n=256),
    "B": dict(pictures="fashion-sample", epochs=20, width=16, dip_iters=(3, 10, 50, 100),
              dip_width=16, skip_width=128, steps=400, nfe=(10, 50), n=100, fits=4),
    "C": dict(pictures="cifar10", epochs=8, width=16, dip_widths=(16, 64), dip_iters=200, sigma=0.1,
              n=32),
    "D": dict(pictures="photos/F16_GT.png", pixels=64, rates=(0.008, 0.01, 0.1), rungs=6, steps=200,
              guide_iters=600, sigma=0.1),
    "E": dict(pictures="cifar10", epochs=6, width=16, archs=("conv2", "resnet18"), dip_width=16,
              dip_iters=100, snapshots=6, n=500),
}
FULL = {
    "A": SMALL["A"] | dict(epochs=(30, 50), width=64, dip_width=64, dip_iters=300, n=1000),
    "B": SMALL["B"] | dict(pictures="fashion", width=64, dip_width=128, nfe=(200, 600), n=1000,
                           fits=64),
    "C": SMALL["C"] | dict(pictures="stl10", epochs=200, width=64, dip_iters=1000, n=1000),
    "D": SMALL["D"] | dict(pixels=512, steps=400, guide_iters=2400),
    "E": SMALL["E"] | dict(epochs=77, width=64, dip_width=64, dip_iters=300, snapshots=10, n=1000),
}
SHARE = "t = 0.3 T"  # where losses on test images are compared


# ------------------------------------------------------------------ commands, numbers, networks


ALONE, BOTH = ("dipddpm.py", "--mode", "ddpm"), ("-m", "studies.arms", "prior")
GUIDE = "-m", "studies.arms", "guide"


def run(out, seeds, command, *flags):
    """`python COMMAND FLAGS --seed SEED --out OUT/seed=SEED`: [(folder, results.json)], one a seed;
    flags are a name and a value in turn, as on the command line. What is finished is not done
    again; a training that was interrupted goes on."""
    found = []
    for seed in seeds:
        folder = out / f"seed={seed}"
        words = ["python", *command, *map(str, flags), "--seed", str(seed)]
        if not (folder / "results.json").exists():
            begun = (folder / dipddpm.CHECKPOINT).exists()
            if (folder / "config.json").exists() and not begun:
                shutil.rmtree(folder)  # it had hardly begun
            words += ["--resume" if begun else "--out", str(folder)]
            print("\n" + shlex.join(words), flush=True)
            dipddpm.main(words[2:]) if command == ALONE else arms.main(words[3:])
        else:
            print(f"{folder}: finished before", flush=True)
        results = json.loads((folder / "results.json").read_text())
        if shlex.split(results["command"])[:-2] != words[:len(command) + len(flags) + 3]:
            raise ValueError(f"{folder} is a run with other flags: remove it, or name another "
                             f"--out ({results['command']})")
        found.append((folder, results))
    return found


def spread(values):
    """A number of each seed -> 'mean ± standard deviation', the mean to three digits or four."""
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return "–"
    exponent = math.floor(math.log10(abs(mean) or 1))
    digits = max(0, min(2, 3 - exponent)) if exponent >= 0 else 2 - exponent
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{deviation}"


def each(values, unit=""):
    """Several numbers of each seed -> 'a ± s / b ± s'."""
    return " / ".join(map(spread, zip(*values))) + unit


def row_of(results, name, **keys):
    """The one row of results.json's arms with this name, and these values of its keys."""
    rows = [row for row in results["arms"] if row["name"] == name
            and all(row.get(key) == value for key, value in keys.items())]
    assert len(rows) == 1, (name, keys, len(rows))
    return rows[0]


def log_of(folder, network):
    """A network's log.csv -> losses of its first 50 steps and of its last whole 50, seconds."""
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    rows = [(int(step), float(seconds), float(loss)) for name, step, _, seconds, loss, _ in lines
            if name == network]
    whole = [row for row in rows if row[0] % 50 == 0] or rows
    return whole[0][2], whole[-1][2], rows[-1][1]


def held_out(results):
    """Loss on test images, not weighted, of the networks trained on images and on DIP outputs."""
    return [results["curves"][f"held-out/{name} {SHARE}"][-1][1] for name in ("full", "smoothed")]


def dip_cost(results, arm, pixels):
    """Seconds of the DIPs whose outputs a network was trained on, and their mean squared error in
    [0, 1], from its sum over an image's pixels in [-1, 1]."""
    row = next(row for row in results["arms"] if row["name"] == arm)
    return (results["seconds"]["dip"] - row["prior_seconds"],
            row["prior_square_error"] / pixels / 4)


def networks(folder, weights="ema"):
    """A finished run -> its Config, and its networks by name: their averaged weights, "ema", or
    those of the last step, "net"."""
    cfg, nets = dipddpm.saved_config(folder), {}
    for name, home in ("full", folder), ("smoothed", folder / "smoothed"):
        if (home / dipddpm.CHECKPOINT).exists():
            saved = dipddpm.load_checkpoint(home)
            nets[name] = dipddpm.make_unet(cfg, saved["shape"][0], device()).eval()
            dipddpm.load_weights(nets[name], saved[weights], home)
    return cfg, nets


def device():
    return dipddpm.pick_device("auto")


def where(pictures):
    """--data: a set's name, or a path, also below the folder of data."""
    below = data.default_root() / pictures
    return str(below) if below.exists() and pictures not in data.SETS else pictures


def some(pictures, split, n, size=None):
    """n images of a data set's split, float32 [n, C, H, W] in [0, 1]: the same for each seed."""
    pixels = data.load(where(pictures), None, split, size=size).pixels
    chosen = pixels[measure.subset(len(pixels), min(n, len(pixels)))]
    return chosen.to(device()).float() / 255


def noised(cfg, truth, sigma):
    """The Measurement y = truth + sigma eps, of images [n, C, H, W] in [0, 1]."""
    return dipddpm.corrupt(cfg, "denoise", truth, sigma, torch.arange(len(truth)).to(truth.device))


@torch.no_grad()
def denoised(cfg, net, known, nfe=1):
    """What nfe evaluations make of y (DDIM, Song et al. 2021, eq. 12), [n, C, H, W] in [0, 1]: with
    one, the single forward pass that some reports took for the reverse process."""
    x_t, t_start = start_from_noisy(cfg, known)
    numbers = torch.arange(len(x_t), device=x_t.device)
    x = dipddpm.sample(replace(cfg, order=1), net, x_t, t_start, nfe, 0.0, numbers)
    return ((x + 1) / 2).clamp(0, 1)


def quality(x, truth):
    """-> mean PSNR in dB, mean SSIM."""
    return measure.psnr(x, truth).mean().item(), measure.ssim(x, truth).mean().item()


def dip_settings(truth, mode="prior", **settings):
    """A Config for DIPs of images [n, C, H, W]."""
    return dipddpm.resolve(dipddpm.Config(mode=mode, **settings), truth.shape)


def looks(cfg, targets, numbers, iters, every, look):
    """Fit plain DIPs to targets [n, C, H, W] in turn: [look(averaged outputs)] every so many
    iterations."""
    seen = []

    def watch(i, _, average):
        if i % every == 0:
            seen.append(look(average.clamp(0, 1)))

    arms.fit_targets(cfg, dipddpm.exact(targets[0]), targets, numbers, iters, look=watch)
    return seen


# ------------------------------------------------------------------ A: MNIST


def study_a(home, seeds, pictures, epochs, width, dip_width, dip_iters, sigma, n):
    """An image-to-image DIP (four convolutions) over the data set; a DDPM on the images, which is
    what the report trained with and without its DIP, and one on the DIP's outputs, which it meant
    to. The report measured all pictures on one sheet, shrunk to the size of one."""
    few, many = epochs
    dip = ["--network-arch", "autoencoder", "--network-width", dip_width, "--network-iters",
           dip_iters, "--snapshots", 1]
    runs = {name: run(home / name, seeds, how, *more, "--data", where(pictures), "--width", width,
                      "--samples", n, "--nfe", 10, "--epochs", e, "--lr", lr, "--timesteps", T)
            for name, how, more, e, lr, T in (
                ("base", BOTH, dip, few, 1e-3, 1000), ("long", ALONE, (), many, 1e-3, 1000),
                ("T", ALONE, (), few, 1e-3, 500), ("lr", ALONE, (), few, 1e-4, 1000))}
    truth = some(pictures, "test", n)

    def sheet(x):
        """The first 64 pictures on one sheet, shrunk to 28 x 28."""
        small = measure.grid(x[:64]).convert("L").resize((28, 28), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small))[None, None].float() / 255

    def all_four(x):
        return *quality(x, truth), *quality(sheet(x), sheet(truth))

    found = {}
    for name, folders in runs.items():
        for folder, _ in folders:
            cfg, nets = networks(folder)
            y = noised(cfg, truth, sigma)
            made = {key: denoised(cfg, net, y) for key, net in nets.items()} | {
                "noisy": y.y.clamp(0, 1), "ten": denoised(cfg, nets["full"], y, 10)}
            for key, x in made.items():
                found.setdefault((name, key), []).append(all_four(x))
    logs = [[log_of(folder, name) for name in ("full", "smoothed")] for folder, _ in runs["base"]]
    results = [results for _, results in runs["base"]]
    costs = [dip_cost(r, "dip-network", truth[0].numel()) for r in results]
    first, last, seconds = ([[log[i] for log in pair] for pair in logs] for i in range(3))
    return [
        ("seconds of training: on images / on DIP outputs / their DIP", "20:52 → 11:20 min",
         each([(*s, cost) for s, (cost, _) in zip(seconds, costs)])),
        ("training loss, first 50 steps: on images / on DIP outputs", "0.35 / 0.1", each(first)),
        ("— last 50 steps", "0.07 / 0.05", each(last)),
        (f"loss on test images, {SHARE}", "–", each(map(held_out, results))),
        ("squared error of the DIP's outputs", "–",
         spread([error for _, error in costs])),
        (f"noisy, sigma {sigma:g}: PSNR / SSIM / on the sheet, both", "–",
         each(found["base", "noisy"])),
        (f"one pass, epochs: {few}, T = 1000, learning rate 1e-3",
         "14.82 / 0.360; with its DIP 18.06 / 0.416 (30 epochs), 18.59 / 0.435 (1e-3)",
         each(found["base", "full"])),
        (f"— epochs: {many}", "with its DIP 18.40 / 0.417 (50 epochs)",
         each(found["long", "full"])),
        ("— T = 500", "with its DIP 16.68 / 0.358", each(found["T", "full"])),
        ("— learning rate 1e-4", "–", each(found["lr", "full"])),
        ("— trained on DIP outputs", "–", each(found["base", "smoothed"])),
        ("ten evaluations", "–", each(found["base", "ten"])),
    ]


# ------------------------------------------------------------------ B: Fashion-MNIST


def study_b(home, seeds, pictures, epochs, width, dip_iters, dip_width, skip_width, steps, nfe, n,
            fits):
    """A wide `skip` DIP of clean pictures looked at every 50 iterations, and the report's use of
    it: one fit for all pictures. DDPMs on the outputs of DIPs of ever more iterations."""
    if pictures == "fashion-sample" and not Path(where(pictures)).exists():
        pictures = "fashion"
    truth = some(pictures, "test", n)
    fits = min(fits, len(truth))
    others = ~torch.eye(len(truth), dtype=torch.bool, device=truth.device)[:fits]

    def own_and_others(x):
        return (measure.psnr(x, truth[:fits]).mean().item(), statistics.fmean(
            measure.psnr(fit.expand_as(truth), truth)[other].mean().item()
            for fit, other in zip(x, others)))

    curves = [looks(dip_settings(truth, seed=seed, dip_width=skip_width), [truth[:fits]],
                    torch.arange(fits, device=truth.device), steps, steps // 8, own_and_others)
              for seed in seeds]
    own, strange = ([[look[i] for look in curve] for curve in curves] for i in (0, 1))
    flags = ["--data", where(pictures), "--epochs", epochs, "--width", width, "--dip-source",
             "images", "--dip-width", dip_width, "--samples", n, "--nfe",
             ",".join(map(str, nfe)), "--t-start", 600, "--snapshots", 1]
    runs = [[results | {"folder": folder} for folder, results in run(
        home / f"iterations={i}", seeds, BOTH, *flags, "--dip-iters", i)] for i in dip_iters]

    def by_iterations(number):
        """number(results) for each number of iterations, of each seed."""
        return [[number(results) for results in same_seed] for same_seed in zip(*runs)]

    images = [log_of(results["folder"], "full") for results in runs[0]]
    iterations = " / ".join(map(str, dip_iters))
    rows = [
        (f"PSNR of DIPs after {steps // 8}, {steps // 4} … {steps} iterations", "–", each(own)),
        ("— each taken for every other picture",
         "6.71 / 8.33 / 8.79 / 8.64 / 8.25 / 8.24 / 8.32 / 8.43", each(strange)),
        (f"squared error of DIPs after {iterations} iterations", "–",
         each(by_iterations(lambda r: dip_cost(r, "dip-images", truth[0].numel())[1]))),
        ("— seconds of those DIPs", "–",
         each(by_iterations(lambda r: dip_cost(r, "dip-images", truth[0].numel())[0]))),
        ("— seconds of training on their outputs", "36:08 min",
         each(by_iterations(lambda r: log_of(r["folder"], "smoothed")[2]))),
        ("on images", "34:19 min", spread([log[2] for log in images])),
        ("training loss at the end, on DIP outputs", "0.065 … 0.032",
         each(by_iterations(lambda r: log_of(r["folder"], "smoothed")[1]))),
        ("on images", "0.45 … 0.58", spread([log[1] for log in images])),
        (f"loss on test images, {SHARE}, trained on DIP outputs", "–",
         each(by_iterations(lambda r: held_out(r)[1]))),
        ("on images", "–", spread([held_out(r)[0] for r in runs[0]]))]
    for k in nfe:
        times = []
        for results in runs[-1]:
            dip = row_of(results, "dip-images", train="full", nfe=k)
            seconds = (row_of(results, "ddpm", nfe=k)["seconds"],
                       dip["seconds"] - dip["prior_seconds"], dip["prior_seconds"])
            times.append([1000 * s / min(n, results["data"]["train"]) for s in seconds])
        rows.append((f"ms a picture, {k} evaluations: from noise / from a DIP / its fit",
                     "1.25 … 6.26 s / 1.38 … 6.35 s (200 … 1000)", each(times)))
    return rows


# ------------------------------------------------------------------ C: small colour pictures


def stretched(x):
    """Images [n, C, H, W], each to its own minimum and maximum."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-6)


def study_c(home, seeds, pictures, epochs, width, dip_widths, dip_iters, sigma, n):
    """One forward pass on noised pictures by the five measures: of training pictures, each first
    stretched to its own range, as the report did it; as they are; of test pictures; and from DIP
    outputs instead of pictures, for two widths of the DIP."""
    runs = run(home / "ddpm", seeds, ALONE, "--data", where(pictures), "--size", 32, "--epochs",
               epochs, "--width", width, "--samples", n, "--nfe", 10)
    test, train = (some(pictures, split, n, 32) for split in ("test", "train"))

    def five(x, truth):
        row = measure.measures(x, truth)
        return [row[name] for name in ("psnr", "ssim", "mse", "mae", "delta_e")]

    found = {}
    for seed, (folder, _) in zip(seeds, runs):
        cfg, nets = networks(folder)
        y, seen = noised(cfg, test, sigma), noised(cfg, train, sigma)
        x = denoised(cfg, nets["full"], seen)
        made = {"train stretched": (stretched(x), stretched(train)), "train": (x, train),
                "test": (denoised(cfg, nets["full"], y), test),
                "ten": (denoised(cfg, nets["full"], y, 10), test), "noisy": (y.y, test),
                "little": (noised(cfg, test, 0.034).y, test)}
        for wide in dip_widths:
            x_dip = dipddpm.fit_dips(
                dip_settings(train, seed=seed, dip_width=wide), dipddpm.exact(train),
                torch.arange(n, device=train.device), dip_iters).clamp(0, 1)
            made["dip", wide] = x_dip, train
            x = denoised(cfg, nets["full"], noised(cfg, x_dip, sigma))
            made["from dip", wide] = stretched(x), stretched(train)
        for key, (x, truth) in made.items():
            found.setdefault(key, []).append(five(x.clamp(0, 1), truth))
    narrow, wide = dip_widths
    return [
        ("PSNR / SSIM / MSE / MAE / ΔE of one pass: training pictures, stretched",
         "29.34 / 0.958 / 0.0014 / 0.0304 / 5.12", each(found["train stretched"])),
        ("— training pictures", "–", each(found["train"])),
        ("— test pictures", "–", each(found["test"])),
        ("ten evaluations, test pictures", "–", each(found["ten"])),
        (f"the noisy test pictures, sigma = {sigma:g}", "–", each(found["noisy"])),
        ("— with sigma = 0.034, chosen for its PSNR", "–", each(found["little"])),
        (f"one pass from a noised DIP of width {wide}, training pictures, stretched",
         "29.36 / 0.968 / 0.0013 / 0.0290 / 3.83", each(found["from dip", wide])),
        (f"— of width {narrow}", "20.91 / 0.763 / 0.0117 / 0.0819 / 13.65",
         each(found["from dip", narrow])),
        (f"that DIP alone, width {wide}, {dip_iters} iterations, clean pictures", "–",
         each(found["dip", wide])),
        (f"— width {narrow}", "–", each(found["dip", narrow])),
    ]


# ------------------------------------------------------------------ D: one photo

TOP = 600  # steps of noise on the first rung, of the linear schedule's 1,000


def after_steps(truth, steps, members, draw):
    """x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps after so many of the linear schedule's 1,000 steps (Ho
    et al. 2020, eq. 4), of images [n, C, H, W] in [0, 1], as pictures, not clipped."""
    ab = dipddpm.linear_schedule(1000).at(steps)
    eps = kernels.normal(truth.shape, 0, members, draw, kernels.CORRUPTION, truth.device)
    return (ab**0.5 * (2 * truth - 1) + (1 - ab)**0.5 * eps + 1) / 2


def study_d(home, seeds, pictures, pixels, rates, rungs, steps, guide_iters, sigma):
    """Noise levels of the forward process, noisiest first, the clean photo noised afresh at each,
    against plain DIP on the clean photo, as the report had it; the same ladder with one noise for
    all rungs, and plain DIP on its last rung alone. Then the guide, on a photo that has noise."""
    photo = data.load(where(pictures), split="test", limit=1, size=pixels, crop=pixels).pixels
    photo = photo.to(device()).float() / 255
    truth = photo.expand(len(seeds), -1, -1, -1).contiguous()  # a seed is a member of one group
    members = torch.tensor(seeds, device=truth.device)

    fresh, same = ([after_steps(truth, k * TOP // rungs, members, draw(k))
                    for k in range(rungs, 0, -1)] for draw in (lambda k: k, lambda k: 1))
    fits = (("plain DIP on the clean photo", "ends above the ladder", [truth]),
            ("the report's ladder", "an early peak; ends below", fresh),
            ("with one noise for all rungs", "–", same),
            ("plain DIP on the last rung", "–", fresh[-1:]))
    rows = []
    for rate in rates:
        cfg = dip_settings(truth, "guide", dip_lr=rate, muon=False)  # as the report had it
        for name, reported, y in fits:
            curve = looks(cfg, y, members, rungs * steps, 10, lambda x: torch.stack(
                [measure.psnr(x, truth), measure.ssim(x, truth)], 1))
            curve = torch.stack(curve, 1)  # [seed, look, PSNR and SSIM]
            best = curve[:, :, 0].max(1)
            rows.append((f"learning rate {rate:g}: {name}", reported, each(zip(
                *curve[:, -1].T.tolist(), best.values.tolist(),
                (10 * best.indices + 10).tolist()))))
    guide = [results for _, results in run(
        home / "guide", seeds, GUIDE, "--data", where(pictures), "--size", pixels, "--crop", pixels,
        "--samples", 1, "--sigma", sigma, "--rungs", rungs, "--dip-iters", guide_iters)]
    for name in ("plain", "oracle", "es-wmv", "plain-mean", "oracle-mean", "split", "literal",
                 "literal-mean"):
        found = [row_of(results, name) for results in guide]
        rows.append((f"noise {sigma:g}, `{name}`: PSNR, SSIM", "–",
                     each([(row["psnr"], row["ssim"]) for row in found])))
    return [("", "", "PSNR / SSIM at the end / best PSNR / its iteration"), *rows]


# ------------------------------------------------------------------ E: CIFAR-10


def study_e(home, seeds, pictures, epochs, width, archs, dip_width, dip_iters, snapshots, n):
    """fid_lenet (no Inception FID: only shapes compare) during training on images and on the
    outputs of two image-to-image DIPs; of 30 samples and of many; of the last weights and of their
    average; and of what the best DIP that answers in [0, 1] leaves of pictures in [-1, 1]."""
    train, test = (data.load(where(pictures), split=split) for split in ("train", "test"))
    if train.labels is None:
        raise ValueError(f"study E needs labels for its LeNet: {pictures} has none")
    rows = []
    for arch in archs:
        runs = run(home / arch, seeds, BOTH, "--data", where(pictures), "--epochs", epochs,
                   "--width", width, "--network-arch", arch, "--network-width", dip_width,
                   "--network-iters", dip_iters, "--snapshots", snapshots, "--samples", n, "--nfe",
                   10)
        noise, full, smoothed = ([[y for _, y in r["curves"][f"training/{key}, 10 evaluations"]]
                                  for _, r in runs]
                                 for key in ("ddpm", "dip-network full", "dip-network smoothed"))
        if arch == archs[0]:
            rows.append((f"fid_lenet at {snapshots} moments of training, from noise", "–",
                         each(noise)))
        rows += [
            (f"`{arch}`: squared error of the DIP's outputs", "–",
             spread([dip_cost(r, "dip-network", train.pixels[0].numel())[1] for _, r in runs])),
            ("— fid_lenet, trained on DIP outputs, from DIP outputs at 0.6 T",
             "lowest first, then rising; ResNet-18 below 140, the two within 5", each(smoothed)),
            ("— trained on images, from DIP outputs at 0.6 T", "–", each(full))]
    lenet = measure.feature_network(train.pixels, train.labels, train.name,
                                    [data.cache_root(), home], device=device())
    real = measure.features(lenet, test.pixels)

    def distance(x):
        return measure.frechet_distance(measure.features(lenet, x), real)

    samples, images = [], []
    for seed, (folder, _) in zip(seeds, runs):
        x = train.pixels[measure.subset(len(train.pixels), n, seed)]
        images.append((distance(x[:30]), distance(x), distance((x / 127.5 - 1).clamp(0, 1))))
        found = []
        for weights in "net", "ema":
            cfg, nets = networks(folder, weights)
            numbers = torch.arange(n, device=device())
            eps = dipddpm.noise_start(cfg, (n, *x.shape[1:]), numbers)
            x_0 = dipddpm.sample(cfg, nets["full"], eps, cfg.timesteps, 10, 0.0, numbers)
            found.append(distance((x_0 + 1) / 2))
        samples.append((*found, distance((x_0[:30] + 1) / 2)))
    return [*rows,
            (f"at the end, from noise: last weights / their average / 30 of these {n} samples", "–",
             each(samples)),
            (f"training images: 30 / {n} / what a sigmoid can answer to these in [-1, 1]", "–",
             each(images))]


STUDIES = {"A": study_a, "B": study_b, "C": study_c, "D": study_d, "E": study_e}


def study(name, home, seeds, size):
    """Run one study; print its table, under what it was made of, and write both to table.md."""
    began = time.time()
    rows = STUDIES[name](home, seeds, **size)
    told = ", ".join(f"{key} {dipddpm.show(value)}" for key, value in size.items())
    text = (f"{name}: {told}; seeds {dipddpm.show(seeds)}; {dipddpm.device_name(device())}, torch "
            f"{torch.__version__}, commit {dipddpm.commit()}; {(time.time() - began) / 60:.1f} "
            "minutes, without runs that were there\n\n"
            f"{measure.markdown([('', 'reported', 'here'), *rows])}\n")
    measure.write_text(text, home / "table.md")
    print(f"\n{text}", flush=True)


def main(argv=None):
    """The command line -> exit status: 0 done, else dipddpm.py's of the last study that failed."""
    p = dipddpm.OneLineParser(prog="python -m studies.reports", allow_abbrev=False,
                              description=__doc__.split("\n\n")[0])
    p.add_argument("studies", nargs="+", choices=STUDIES)
    p.add_argument("--full", action="store_true", help="the reports' sizes, for a GPU")
    p.add_argument("--data", help="other pictures than a study's own, as dipddpm.py's --data")
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0, 1, 2),
                   help="mean and deviation are over these")
    p.add_argument("--out", default="runs/reports", help="folder of all runs")
    args = p.parse_args(argv)
    status = 0
    for name in args.studies:
        size = (FULL if args.full else SMALL)[name]
        home = name + "-full" * args.full
        if args.data:
            size, home = size | {"pictures": args.data}, f"{home}-{Path(args.data).stem}"
        try:
            study(name, Path(args.out) / home, args.seeds, size)
        except (ValueError, OSError, RuntimeError) as error:
            print("reports:", (str(error).splitlines() or ["failed"])[0], file=sys.stderr)
            status = 1 if isinstance(error, RuntimeError) else 2
        except SystemExit as failed:  # of dipddpm.py, which has said why
            if failed.code not in (1, 2):
                raise
            status = failed.code
        except KeyboardInterrupt:
            print("reports: interrupted; the same command goes on", file=sys.stderr)
            return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
