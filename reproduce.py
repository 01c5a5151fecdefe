"""The five student reports, done again: their numbers beside ours, and experiments that show why
they differ.

    python reproduce.py A          MNIST: an image-to-image DIP, and denoising
    python reproduce.py B          Fashion-MNIST: a DIP's iterations, its cost and its loss
    python reproduce.py C          small colour pictures: five measures, and what they are taken of
    python reproduce.py D          one photo: a ladder of noised clean images against plain DIP
    python reproduce.py E          CIFAR-10: FID during training on a DIP's outputs
    python reproduce.py A B C D E  all, under 90 minutes on two cores; --full: as in the reports

Every study trains and fits by the command line of dipddpm.py, in runs/reproduce/STUDY (given again,
only what is missing is done), measures what that does not, and writes its table, `table.md`: what
was measured, what the report says, what is found here (mean ± standard deviation over seeds).
"""

import argparse
import contextlib
import json
import math
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dipddpm
import eval as measure
import kernels

# Sizes: what the commands and experiments of a study take. Small is for two cores.
SMALL = {
    "A": dict(pictures="mnist", epochs=(1, 2), width=8, dip_width=16, dip_iters=100, n=256),
    "B": dict(pictures="fashion-sample", epochs=40, width=16, dip_iters=(3, 10, 50, 100),
              dip_width=16, skip_width=128, steps=400, nfe=(10, 50, 200), n=100, fits=4),
    "C": dict(pictures="cifar10", epochs=8, width=16, dip_widths=(16, 64), dip_iters=200, n=32),
    "D": dict(pictures="photos/F16_GT.png", pixels=64, rates=(0.008, 0.01, 0.1), rungs=6, steps=400,
              guide_steps=600, sigma=0.1),
    "E": dict(pictures="cifar10", epochs=6, width=16, archs=("conv2", "resnet18"), dip_width=16,
              dip_iters=100, snapshots=6, n=500),
}
FULL = {
    "A": SMALL["A"] | dict(epochs=(30, 50), width=64, dip_width=64, dip_iters=300, n=1000),
    "B": SMALL["B"] | dict(pictures="fashion", epochs=20, width=64, dip_width=128, n=1000, fits=64),
    "C": SMALL["C"] | dict(pictures="stl10", epochs=200, width=64, dip_iters=1000, n=1000),
    "D": SMALL["D"] | dict(pixels=512, guide_steps=2400),
    "E": SMALL["E"] | dict(epochs=77, width=64, dip_width=64, dip_iters=300, snapshots=10, n=1000),
}


# ------------------------------------------------------------------ commands, numbers, networks


def run(out, seeds, *flags):
    """`python dipddpm.py FLAGS --out OUT --sweep seed=...` -> [(folder, results.json)], a seed
    each; flags are written as on the command line, None is left out."""
    pairs = [pair for pair in zip(flags[::2], flags[1::2]) if pair[1] is not None]
    flags = [str(v) for pair in (*pairs, ("--out", out), ("--sweep", f"seed={csv(seeds)}"))
             for v in pair]
    print(f"\npython dipddpm.py {shlex.join(flags)}", flush=True)
    dipddpm.main(flags)
    folders = [out / f"seed={seed}" for seed in seeds]
    return [(folder, json.loads((folder / "results.json").read_text())) for folder in folders]


def csv(values):
    return ",".join(map(str, values))


def spread(values):
    """A number of each seed -> 'mean ± standard deviation', to three or four digits of the mean."""
    mean = statistics.fmean(values)
    exponent = math.floor(math.log10(abs(mean) or 1))
    digits = max(0, min(2, 3 - exponent)) if exponent >= 0 else 2 - exponent
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{deviation}"


def both(values, unit=""):
    """Two numbers, or more, of each seed -> 'a ± s / b ± s'."""
    return " / ".join(map(spread, zip(*values))) + unit


def row_of(results, name, **keys):
    """The one row of results.json's arms with this name, and these values of its keys."""
    rows = [row for row in results["arms"] if row["name"] == name
            and all(row.get(key) == value for key, value in keys.items())]
    assert len(rows) == 1, (name, keys, len(rows))
    return rows[0]


def log_of(folder, network):
    """A network's rows of log.csv -> loss of the first and the last 50 steps, seconds."""
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    mine = [(float(seconds), float(loss)) for name, _, _, seconds, loss, _ in lines
            if name == network]
    return mine[0][1], mine[-1][1], mine[-1][0]


def networks(folder, weights="ema"):
    """A finished run -> its Config, and its networks by name: their averaged weights, "ema", or
    those of the last step, "net"."""
    cfg = dipddpm.Config(**dipddpm.read_saved_flags(folder / "config.json"))
    saved, nets = dipddpm.load_checkpoint(folder), {}
    for name, state in saved["networks"].items():
        nets[name] = dipddpm.make_unet(cfg, saved["shape"][0], DEVICE).eval()
        dipddpm.load_weights(nets[name], state[weights], folder)
    return cfg, nets


def found(pictures):
    """--data: a set's name, or a path below the folder of data."""
    below = data.default_root() / pictures
    return str(below) if below.exists() and pictures not in data.SETS else pictures


def some(pictures, split, n, size=None):
    """n images of a data set's split, float32 [n, C, H, W] in [0, 1]: the same for each seed."""
    pixels = data.load(found(pictures), None, split, size=size).pixels
    return pixels[measure.subset(len(pixels), min(n, len(pixels)))].to(DEVICE).float() / 255


def denoised(cfg, net, truth, sigma, nfe):
    """truth [n, C, H, W] in [0, 1] -> y with noise sigma, clipped, and what nfe evaluations from y
    make of it (DDIM, Song et al. 2021, eq. 12): with nfe = 1 the one forward pass that some reports
    took for the reverse process."""
    numbers = torch.arange(len(truth), device=DEVICE)
    measured = dipddpm.corrupt(replace(cfg, sigma=sigma), "denoise", truth, numbers)
    x_t, t_start = dipddpm.start_from_noisy(cfg, measured)
    x = dipddpm.sample(cfg, net, x_t, t_start, nfe, 0.0, numbers, contextlib.nullcontext)
    return measured.y.clamp(0, 1), ((x + 1) / 2).clamp(0, 1)


def quality(x, truth):
    """-> mean PSNR in dB, mean SSIM."""
    return measure.psnr(x, truth).mean().item(), measure.ssim(x, truth).mean().item()


def looks(cfg, targets, members, iters, every, look):
    """Fit plain DIPs to targets (see `fit_dips`) -> [look(outputs, averages)] every so many
    iterations."""
    seen = []

    def watch(i, x, average):
        if (i + 1) % every == 0:
            seen.append(look(x.clamp(0, 1), average.clamp(0, 1)))

    dipddpm.fit_dips(cfg, targets, members, iters, lambda done: None, watch=watch)
    return seen


# ------------------------------------------------------------------ A: MNIST


def study_a(home, seeds, pictures, epochs, width, dip_width, dip_iters, n, sigma=0.5):
    """An image-to-image DIP (four convolutions) over the data set; a DDPM trained on the images
    and one on the DIP's outputs, which the report computed and never used."""
    few, many = epochs
    flags = ["--mode", "prior", "--data", found(pictures), "--width", width, "--train",
             "full,smoothed", "--dip-source", "network", "--dip-arch", "autoencoder", "--dip-width",
             dip_width, "--dip-iters", dip_iters, "--samples", n, "--nfe", 10, "--snapshots", 1]
    variants = {"base": ("--epochs", few, "--lr", 1e-3, "--timesteps", 1000),
                "long": ("--epochs", many, "--lr", 1e-3, "--timesteps", 1000),
                "T": ("--epochs", few, "--lr", 1e-3, "--timesteps", 500),
                "lr": ("--epochs", few, "--lr", 1e-4, "--timesteps", 1000)}
    runs = {name: run(home / name, seeds, *flags, *more) for name, more in variants.items()}
    truth = some(pictures, "test", n)

    def sheet(x):
        """All pictures on one sheet, shrunk to 28 x 28: what the report measured."""
        small = measure.grid(x).resize((28, 28), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small))[None, None].float() / 255

    made = {}  # (variant, network, nfe) -> (PSNR, SSIM) of each seed
    noisy, sheets = [], {"noisy": [], "one": []}
    for name, folders in runs.items():
        for folder, _ in folders:
            cfg, nets = networks(folder)
            for network, nfe in ("full", 1), ("smoothed", 1), ("full", 10):
                y, x = denoised(cfg, nets[network], truth, sigma, nfe)
                made.setdefault((name, network, nfe), []).append(quality(x, truth))
                if name == "base" and (network, nfe) == ("smoothed", 1):
                    noisy.append(quality(y, truth))
                    sheets["noisy"].append(quality(sheet(y), sheet(truth)))
                    sheets["one"].append(quality(sheet(x), sheet(truth)))
    logs = {name: [log_of(folder, name) for folder, _ in runs["base"]]
            for name in ("full", "smoothed")}
    held_out = [[results["curves"][f"held-out/{name} t = 0.3 T"][-1][1]
                 for name in ("full", "smoothed")] for _, results in runs["base"]]
    copied = [row_of(r, "dip-network", train="full")["prior_square_error"] / truth[0].numel() / 4
              for _, r in runs["base"]]
    fit = [results["seconds"]["dip"] for _, results in runs["base"]]
    return [
        ("training, without the DIP / with it", "20:52 / 11:20 min",
         both([(a[2], b[2]) for a, b in zip(*logs.values())], " s")),
        ("the DIP itself: fits, and all pictures through it, twice", "–", spread(fit) + " s"),
        ("loss on its own targets, first → last 50 steps, without", "0.35 → 0.07",
         " → ".join(spread(v) for v in list(zip(*logs["full"]))[:2])),
        ("— with the DIP's outputs as targets", "0.1 → 0.05",
         " → ".join(spread(v) for v in list(zip(*logs["smoothed"]))[:2])),
        ("loss on test images, t = 0.3 T, without / with", "–", both(held_out)),
        ("mean square of DIP's output minus its input", "–", spread(copied)),
        (f"noisy picture, sigma = {sigma:g}: PSNR, SSIM", "–", both(noisy)),
        (f"one pass, without, {few} epochs", "14.82, 0.360", both(made["base", "full", 1])),
        (f"— with, {few} epochs", "18.06, 0.416 (30)", both(made["base", "smoothed", 1])),
        (f"— without, {many} epochs", "–", both(made["long", "full", 1])),
        (f"— with, {many} epochs", "18.40, 0.417 (50)", both(made["long", "smoothed", 1])),
        ("— with, T = 500", "16.68, 0.358", both(made["T", "smoothed", 1])),
        ("— with, learning rate 1e-4", "–", both(made["lr", "smoothed", 1])),
        ("— with, learning rate 1e-3", "18.59, 0.435", both(made["base", "smoothed", 1])),
        ("ten evaluations, without", "–", both(made["base", "full", 10])),
        ("the same one pass, with, on one sheet shrunk to 28×28", "its measure",
         both(sheets["one"])),
        ("the noisy pictures on such a sheet", "–", both(sheets["noisy"])),
    ]


# ------------------------------------------------------------------ B: Fashion-MNIST


def study_b(home, seeds, pictures, epochs, width, dip_iters, dip_width, skip_width, steps, nfe, n,
            fits):
    """A wide `skip` DIP looked at every 50 iterations, and the report's use of it: one fit for all
    pictures. DDPMs on outputs of DIPs of ever fewer iterations, each picture with its own."""
    truth = some(pictures, "test", n)
    curves = []  # of each seed: [(PSNR of each picture's own fit, of the first's fit for the rest)]
    for k, seed in enumerate(seeds):
        members = torch.arange(fits, device=DEVICE)
        cfg = dipddpm.Config(mode="prior", seed=seed, dip_width=skip_width)
        mine = truth.roll(-k * fits, 0)
        curves.append(looks(cfg, mine[:fits], members, steps, steps // 8, lambda _, average: (
            measure.psnr(average, mine[:fits]).mean().item(),
            measure.psnr(average[:1].expand_as(mine[1:]), mine[1:]).mean().item())))
    own, others = (zip(*([look[i] for look in curve] for curve in curves)) for i in (0, 1))
    flags = ["--mode", "prior", "--data", found(pictures), "--epochs", epochs, "--width", width,
             "--train", "full,smoothed", "--dip-source", "images", "--dip-width", dip_width,
             "--samples", n, "--nfe", csv(nfe), "--t-start", 600, "--snapshots", 1]
    runs = {i: run(home / f"iterations={i}", seeds, *flags, "--dip-iters", i) for i in dip_iters}
    rows = [(f"DIP of each picture after {steps // 8} … {steps} iterations: PSNR", "–",
             " / ".join(map(spread, own))),
            ("— the first picture's fit, taken for every other picture",
             "6.71 / 8.33 / 8.79 / 8.64 / 8.25 / 8.24 / 8.32 / 8.43",
             " / ".join(map(spread, others)))]
    for i, folders in runs.items():
        logs = [[log_of(folder, name) for name in ("full", "smoothed")] for folder, _ in folders]
        test = [[r["curves"][f"held-out/{name} t = 0.3 T"][-1][1] for name in ("full", "smoothed")]
                for _, r in folders]
        error = [row_of(r, "dip-images", train="full", nfe=nfe[0])["prior_square_error"]
                 for _, r in folders]
        rows += [
            (f"DIP of {i} iterations: squared error of its outputs", "–", spread(error)),
            ("— training without / with, seconds of the DIPs", "34:19 / 36:08 min",
             both([(a[2], b[2], r["seconds"]["dip"])
                   for (a, b), (_, r) in zip(logs, folders)], " s")),
            ("— loss on its own targets, without / with", "0.45…0.58 / 0.065…0.032",
             both([(a[1], b[1]) for a, b in logs])),
            ("— loss on test images, t = 0.3 T, without / with", "–", both(test))]
    for k in nfe:
        times = []
        for _, r in runs[dip_iters[-1]]:
            dip = row_of(r, "dip-images", train="full", nfe=k)
            times.append([1000 * s / n for s in (row_of(r, "ddpm", nfe=k)["seconds"],
                                                 dip["seconds"] - dip["prior_seconds"],
                                                 dip["prior_seconds"])])
        rows.append((f"ms a picture, {k} evaluations: from noise / from a DIP / its fit",
                     "1.25…6.26 s / 1.38…6.35 s (200…1000)", both(times, " ms")))
    return rows


# ------------------------------------------------------------------ C: small colour pictures


def study_c(home, seeds, pictures, epochs, width, dip_widths, dip_iters, n, sigma=0.1):
    """One forward pass on noised pictures by the five measures: on training and on test pictures,
    as they are and each rescaled to its own minimum and maximum; DIPs of two widths."""
    runs = run(home / "ddpm", seeds, "--mode", "ddpm", "--data", found(pictures), "--size",
               32, "--epochs", epochs, "--width", width, "--samples", n, "--nfe", 10)
    names = ("psnr", "ssim", "mse", "mae", "delta_e")

    def five(x, truth):
        return [measure.measures(x, truth)[name] for name in names]

    def stretched(x):
        """Each picture to its own minimum and maximum."""
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-6)

    test, train = (some(pictures, split, n, 32) for split in ("test", "train"))
    made = {}
    for folder, _ in runs:
        cfg, nets = networks(folder)
        y, x = denoised(cfg, nets["full"], test, sigma, 1)
        table = {"noisy": (y, test), "one": (x, test), "one stretched": (stretched(x),
                                                                         stretched(test)),
                 "train": (denoised(cfg, nets["full"], train, sigma, 1)[1], train),
                 "ten": (denoised(cfg, nets["full"], test, sigma, 10)[1], test),
                 "hardly": (denoised(cfg, nets["full"], test, 0.034, 1)[0], test)}
        for name, pair in table.items():
            made.setdefault(name, []).append(five(*pair))
    for dip in dip_widths:
        for seed, (folder, _) in zip(seeds, runs):
            [(_, results)] = run(
                home / f"dip-width={dip}", [seed], "--mode", "prior", "--resume", folder,
                "--train", "full", "--dip-source", "images", "--task", "denoise", "--sigma", sigma,
                "--dip-width", dip, "--dip-iters", dip_iters, "--samples", n, "--nfe", 10)
            for name in "dip", "dip-images":
                row = row_of(results, name)
                made.setdefault((name, dip), []).append([row[key] for key in names])
    narrow, wide = dip_widths
    return [
        ("PSNR / SSIM / MSE / MAE / ΔE of one pass, test pictures",
         "29.34 / 0.958 / 0.0014 / 0.0304 / 5.12", both(made["one"])),
        ("— training pictures", "the same: it had no test set", both(made["train"])),
        ("— test pictures, each stretched to its own range", "its measure",
         both(made["one stretched"])),
        (f"the noisy test pictures, sigma = {sigma:g}", "–", both(made["noisy"])),
        ("— with sigma = 0.034", "–", both(made["hardly"])),
        ("ten evaluations, test pictures", "–", both(made["ten"])),
        (f"ten from a DIP of width {wide}", "29.36 / 0.968 / 0.0013 / 0.0290 / 3.83",
         both(made["dip-images", wide])),
        (f"— of width {narrow}", "20.91 / 0.763 / 0.0117 / 0.0819 / 13.65",
         both(made["dip-images", narrow])),
        (f"the DIP alone, width {wide}", "–", both(made["dip", wide])),
        (f"— width {narrow}", "–", both(made["dip", narrow])),
    ]


# ------------------------------------------------------------------ D: one photo


def study_d(home, seeds, pictures, pixels, rates, rungs, steps, guide_steps, sigma):
    """Six noise levels of the forward process, noisiest first, the clean photo noised afresh at
    each, against plain DIP on the clean photo, as the report had it; and the guide's arms, where
    plain DIP has noise to fight with as well."""
    photo = data.load(found(pictures), size=pixels, crop=pixels).pixels.to(DEVICE).float() / 255
    fits = photo.expand(len(seeds), -1, -1, -1).contiguous()
    members, targets = torch.tensor(seeds, device=DEVICE), []
    for k in range(rungs, 0, -1):  # t = 600 ... 100 of 1,000
        ab = dipddpm.linear_schedule(1000).at(k * 600 // rungs)
        eps = kernels.normal(fits.shape, 0, members, k, kernels.CORRUPTION, DEVICE)
        targets.append((ab**0.5 * (2 * fits - 1) + (1 - ab)**0.5 * eps + 1) / 2)
    rows = []
    for rate in rates:
        cfg = dipddpm.Config(mode="guide", dip_lr=rate)
        plain, ladder = (looks(cfg, y, members, rungs * steps, 10, lambda x, _: torch.stack(
            [measure.psnr(x, fits), measure.ssim(x, fits)])) for y in ([fits], targets))
        plain, ladder = (torch.stack(curve).permute(2, 0, 1) for curve in (plain, ladder))
        best = ladder[:, :, 0].max(1)  # of each fit over its looks
        guide = [results for _, results in run(
            home / f"lr={rate}", seeds, "--mode", "guide", "--data", found(pictures), "--size",
            pixels, "--crop", pixels, "--sigma", sigma, "--rungs", rungs, "--dip-lr", rate,
            "--dip-iters", guide_steps, "--arms", "plain,split,ladder,literal")]
        psnr = {name: [row_of(r, name)["psnr"] for r in guide]
                for name in ("plain", "oracle", "split", "ladder", "literal")}
        rows += [
            (f"learning rate {rate:g}: plain DIP on the clean photo, end: PSNR / SSIM",
             "above the ladder", both(plain[:, -1].tolist())),
            ("— the report's ladder, end", "below", both(ladder[:, -1].tolist())),
            ("— its best moment, and when (iteration)", "an early peak",
             both(list(zip(best.values.tolist(), (10 * best.indices + 10).tolist())))),
            (f"— noise {sigma:g} on the photo: plain DIP, end / best moment", "–",
             both(list(zip(psnr["plain"], psnr["oracle"])))),
            ("— the leaking ladder, `literal`, down to that noise", "–", spread(psnr["literal"])),
            ("— `split` / `ladder`, which see no clean photo", "–",
             both(list(zip(psnr["split"], psnr["ladder"]))))]
    return rows


# ------------------------------------------------------------------ E: CIFAR-10


def study_e(home, seeds, pictures, epochs, width, archs, dip_width, dip_iters, snapshots, n):
    """fid_lenet during training on images and on the outputs of two image-to-image DIPs; of the
    last weights and of their average; of 30 samples and of many; and of what is left of pictures in
    [-1, 1] by the best DIP that answers in [0, 1]."""
    rows = []
    for arch in archs:
        runs = run(home / arch, seeds, "--mode", "prior", "--data", found(pictures), "--epochs",
                   epochs, "--width", width, "--train", "full,smoothed", "--dip-source", "network",
                   "--dip-arch", arch, "--dip-width", dip_width, "--dip-iters", dip_iters,
                   "--snapshots", snapshots, "--samples", n, "--nfe", 10)
        curves = {}
        for _, r in runs:
            for key in ("ddpm, 10", "dip-network full, 10", "dip-network smoothed, 10"):
                curves.setdefault(key, []).append(
                    [y for _, y in r["curves"][f"training/{key} evaluations"]])
        error = [row_of(r, "dip-network", train="full")["prior_square_error"] for _, r in runs]
        if arch == archs[0]:
            rows.append((f"fid_lenet of the noise start at {snapshots} moments of training", "–",
                         both(curves["ddpm, 10"])))
        rows += [
            (f"`{arch}`: squared error of the DIP's outputs", "–", spread(error)),
            ("— DDPM on its outputs, from them", "< 140 (resnet18), lowest first, then rising",
             both(curves["dip-network smoothed, 10"])),
            ("— DDPM on images, from them", "–", both(curves["dip-network full, 10"]))]
    train, test = (data.load(found(pictures), split=split) for split in ("train", "test"))
    lenet = measure.feature_network(train.pixels, train.labels, train.name, [
        data.default_root(), data.cache_root(), home], device=DEVICE,
        test=(test.pixels, test.labels))
    real = measure.features(lenet, test.pixels)

    def distance(x):
        return measure.frechet_distance(measure.features(lenet, x), real)

    few, many, dark, weights = [], [], [], []
    for seed, (folder, _) in zip(seeds, runs):
        weights.append([])
        for kind in "net", "ema":
            cfg, nets = networks(folder, kind)
            numbers = torch.arange(n, device=DEVICE)
            eps = kernels.normal((n, *train.pixels.shape[1:]), seed, numbers, 0,
                                 kernels.INIT_NOISE, DEVICE)
            x = dipddpm.sample(cfg, nets["full"], eps, cfg.timesteps, 10, 0.0, numbers,
                               contextlib.nullcontext, 2)
            weights[-1].append(distance((x + 1) / 2))
        x = train.pixels[measure.subset(len(train.pixels), n, seed)].to(DEVICE)
        few.append(distance(x[:30]))
        many.append(distance(x))
        dark.append(distance((x / 127.5 - 1).clamp(0, 1)))
    return rows + [
        ("noise start, the last weights / their average", "the last", both(weights)),
        ("30 real training pictures instead of samples", "its count", spread(few)),
        (f"{n} real ones", "–", spread(many)),
        ("the same, fed in [-1, 1] to a perfect DIP that answers in [0, 1]", "its ranges",
         spread(dark))]


STUDIES = {"A": study_a, "B": study_b, "C": study_c, "D": study_d, "E": study_e}
DEVICE = None  # of all studies, chosen by main


def study(name, home, seeds, size):
    """Run one study; print its table and write it to home/table.md."""
    rows = STUDIES[name](home, seeds, **size)
    text = measure.markdown([("", "reported", "here"), *rows])
    measure.write_text(text + "\n", home / "table.md")
    print(f"\n{name}: {STUDIES[name].__doc__}\n\n{text}\n", flush=True)


def main(argv=None):
    global DEVICE
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("studies", nargs="+", choices=STUDIES)
    p.add_argument("--full", action="store_true", help="the reports' sizes, for a GPU")
    p.add_argument("--data", help="other pictures than a study's own: as dipddpm.py's --data")
    p.add_argument("--seeds", default="0,1,2", help="of which mean and deviation are told")
    p.add_argument("--out", default="runs/reproduce", help="folder of all runs")
    args = p.parse_args(argv)
    DEVICE = dipddpm.pick_device(None)
    other = {"pictures": args.data} if args.data else {}
    try:
        for name in args.studies:
            study(name, Path(args.out) / (name + "-full" * args.full),
                  [int(seed) for seed in args.seeds.split(",")],
                  (FULL if args.full else SMALL)[name] | other)
    except (ValueError, OSError) as error:
        sys.exit(dipddpm.fail(error, 2))


if __name__ == "__main__":
    main()
