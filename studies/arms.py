"""Further arms of both methods, and curves of their training.

    python -m studies.arms guide --sigma 0.2                      plain DIPs' other ends; what leaks
    python -m studies.arms prior --train full,smoothed --snapshots 6     a second network, curves

Flags are those of `dipddpm.py --mode guide` and `--mode prior`, and the few of `parser` below;
`--set alpha=0.5` changes a setting of Config that has no flag.
"""

import argparse
import copy
import functools
import itertools
import math
import shlex
import statistics
import sys
from dataclasses import fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import dipddpm
import eval as measure
import kernels
from studies import networks
from studies.restore import instead, some_of

# ------------------------------------------------------------------ method 2: more arms


class WindowedVariance:
    """ES-WMV (Wang, Li et al. 2023, algorithm 1): stop where the variance of the last W outputs,
    summed over pixels, has had its minimum and not fallen below it for `patience` iterations. The
    window's sums are kept, so an iteration costs a few passes over the pixels whatever W is. Call
    it with each iteration, from 1 on, its outputs and what would be returned [K, C, H, W]; then `x`
    holds what it would have returned, `stopped` after how many iterations [K], inf where it has
    not."""

    def __init__(self, window, patience):
        self.W, self.patience, self.outputs = window, patience, []

    def __call__(self, i, output, x):
        if not self.outputs:
            self.sum, self.squares = torch.zeros(2, *x.shape, dtype=torch.float64, device=x.device)
            self.x, self.least = x.clone(), torch.full_like(self.sum[:, 0, 0, 0], math.inf)
            self.best = torch.zeros_like(self.least)
            self.stopped = torch.full_like(self.least, math.inf)
        # the window moves on
        self.outputs.append(output)
        self.sum += output
        self.squares += output.square()
        if len(self.outputs) > self.W:
            old = self.outputs.pop(0)
            self.sum -= old
            self.squares -= old.square()
        # its variance, once it is whole
        if len(self.outputs) == self.W:
            variance = (self.squares / self.W - (self.sum / self.W) ** 2).sum(dim=(1, 2, 3))
            better = (variance < self.least) & self.stopped.isinf()
            self.x[better], self.least[better], self.best[better] = x[better], variance[better], i
            done = self.stopped.isinf() & (i - self.best >= self.patience)
            self.stopped[done] = i


def fit_targets(cfg, known, targets, numbers, iters, track=dipddpm.untracked,
                look=dipddpm.unseen):
    """`dipddpm.fit_dips` to a list of targets of y's shape, one after the other, for equally many
    iterations each."""
    given = known.given()
    share = given / given.sum(dim=(1, 2, 3), keepdim=True)
    shape = targets[0].shape[1], *known.mask.shape[2:]
    group = dipddpm.DIPGroup(cfg, numbers, *shape, targets[0].dtype)
    for i in track(range(1, iters + 1), "fit DIPs", len(numbers)):
        group.iterate(targets[(i - 1) * len(targets) // iters], share, known.A)
        look(i, group.x, group.average)
    group.require(group.average.isfinite().all())
    return group.average


def fit_plain(cfg, seen, run, M, targets):
    """DIPs that nothing stops, of M networks an image, averaged, fitted to `targets` in turn. ->
    {arm: (outputs [n, C, H, W], iterations [n])}: their end, `plain`; their best moment, which only
    the truth can tell, `oracle`; and where the variance of their outputs stops, `es-wmv`; and the
    `dipddpm.Follow` of their PSNR."""
    follow, stops = dipddpm.Follow(seen.truth), []

    def fit(cfg, known, rows, track, look):
        stops.append(WindowedVariance(*((30, 300) if max(known.mask.shape[2:]) <= 32
                                        else (100, 1000))))

        def mean(x):
            return x.view(-1, M, *x.shape[1:]).mean(1)

        def watch(i, x, average):
            stops[-1](i, mean(x), mean(average))
            if i % dipddpm.CHECK == 0 or i == cfg.dip_iters:
                look(i, mean(average))

        each = [y[rows].repeat_interleave(M, 0) for y in targets]
        known = known.part(torch.arange(len(rows), device=rows.device).repeat_interleave(M))
        x = fit_targets(cfg, known, each, dipddpm.replicas_of(rows, M), cfg.dip_iters, track, watch)
        return mean(x), torch.full((len(rows),), cfg.dip_iters, device=rows.device)

    x, took = dipddpm.fit_in_groups(cfg, seen, run, fit, M, follow)
    early = torch.cat([stop.x for stop in stops])
    stopped = torch.cat([stop.stopped for stop in stops]).clamp(max=cfg.dip_iters)
    return {"plain": (x, took), "oracle": (follow.best, follow.when),
            "es-wmv": (early, stopped)}, follow


def leaking_rungs(cfg, known, truth, numbers, rungs):
    """What `literal` is fitted to: the clean image under noise of 4 sigma down to sigma, drawn
    afresh for each rung; and the mean of these by their precisions, which is all that they tell of
    it. -> a list of y's shape for each rung, and y's shape."""
    clean, given = known.A(truth), known.given()
    levels = [4.0 ** (1 - k / (rungs - 1)) for k in range(rungs)]
    noised = [clean + given * (known.sigma * level) * kernels.normal(
        clean.shape, cfg.seed, numbers, dipddpm.SPLIT_DRAW + 1 + rungs + k, kernels.CORRUPTION,
        clean.device)  # a draw that nothing else in this stream has
        for k, level in enumerate(levels)]
    weights = [level**-2 for level in levels]
    return noised, sum(w * y for w, y in zip(weights, noised)) / sum(weights)


GUIDE_ARMS = ("plain", "mean", "split", "literal")


def run_guide(own, cfg, run):
    """As `dipddpm.run_fits`, with more arms. `es-wmv` is a third look at the fit of `plain` and
    `oracle`; `-mean` is the same of as many networks, averaged, as `split` has.
    `literal` fits noised copies of the *clean* image and `literal-mean` one DIP to their
    precision-weighted mean: both are handed the truth, and say so."""
    cfg, seen = dipddpm.observe(with_settings(cfg, own.set), run)
    known, truth, M = seen.known, seen.truth, cfg.replicas
    rows, curves, bound = [], {}, None  # bound: PSNR of each image at the oracle of one network
    shown = {"truth": truth[:16], "corrupted": known.back(known.y)[:16]}

    def add(name, x, iterations, networks, **more):
        x = x.clamp(0, 1)
        gap = {} if bound is None else dipddpm.lack("gap", bound - measure.psnr(x, truth))
        rows.append({"name": name} | seen.about | measure.measures(x, truth)
                    | dipddpm.steps_taken(iterations, networks) | gap | more)
        shown[name] = x[:16]
        dipddpm.say(dipddpm.describe(rows[-1]))

    # nothing stops them: three looks at each fit
    for arm, suffix, each in ("plain", "", 1), ("mean", "-mean", M):
        if arm not in own.arms or suffix and M == 1:
            continue
        with run.timed("dip") as took:
            looks, follow = fit_plain(cfg, seen, run, each, [known.y])
        curves[f"psnr/plain{suffix}"] = follow.curve()
        bound = bound if suffix else follow.psnr
        for look, (x, iterations) in looks.items():
            share = iterations.double().mean().item() / cfg.dip_iters  # of the fit's seconds
            add(look + suffix, x, iterations, each,
                **({} if look == "oracle" else {"seconds": share * took.seconds}))
    if "split" in own.arms:  # the method's own
        follow = dipddpm.Follow(truth)
        with run.timed("dip") as took:
            x, iterations = dipddpm.fit_in_groups(cfg, seen, run, dipddpm.fit_guided, M, follow)
        gap = (follow.psnr - measure.psnr(x, truth)).clamp(min=0)
        curves["psnr/split"] = follow.curve()
        add("split", x, iterations, M, seconds=took.seconds, **dipddpm.lack("own_gap", gap))
    # what leaks
    leaks = known.sigma > 0 and "literal" in own.arms
    leaking, mean = (leaking_rungs(cfg, known, truth, seen.numbers, own.rungs) if leaks
                     else (None, None))
    for arm, targets in (("literal", leaking), ("literal-mean", [mean])) if leaks else ():
        with run.timed("dip") as took:
            looks, follow = fit_plain(cfg, seen, run, 1, targets)
        curves[f"psnr/{arm}"] = follow.curve()
        add(arm, *looks["plain"], 1, seconds=took.seconds, leaks=True,
            psnr_oracle=follow.psnr.mean().item())
    note = "literal and literal-mean were fitted to noised copies of the clean image: they leak it"
    picture = measure.draw(run.folder / "guide.png", f"{cfg.task}, sigma = {cfg.sigma:g}", shown)
    run.finish({"notes": [note] * leaks, "data": seen.data, "arms": rows, "curves": curves,
                "pictures": [picture]}, ("psnr", "ssim"))


# ------------------------------------------------------------------ method 1: two networks, curves

SMOOTHERS = ("images", "network")  # sources of priors that make of an image a DIP's output


def dip_images(cfg, pixels, sources, track=dipddpm.untracked):
    """One DIP for each source image, fitted shortly."""
    known = dipddpm.exact(sources.float() / 255)
    groups = torch.arange(len(sources), device=sources.device).split(cfg.dip_group)
    return torch.cat([dipddpm.fit_dips(cfg, known.part(numbers), numbers, cfg.dip_iters, track)
                      for numbers in groups]).clamp(0, 1) * 2 - 1


def blur(cfg, pixels, sources, track=dipddpm.untracked):
    """The source images through a 5x5 box: all the structure and more of a leak than a DIP; if this
    does as well, the DIP adds nothing."""
    x = sources.float() / 127.5 - 1
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


# Priors [n, C, H, W] in [-1, 1] that are made of n training images, uint8 sources, one of each.
COPIES = {"dip-images": dip_images, "dip-network": networks.dip_network, "blur": blur}


def sources_of(pixels, n):
    """At random: MNIST's first 1,000 training images are further from its test split than most."""
    return pixels[measure.subset(len(pixels), n).to(pixels.device)]


class Copies(NamedTuple):
    """What `dipddpm.Coding` is to `dipddpm.starts`, of copies."""

    make: object
    cfg: dipddpm.Config
    pixels: torch.Tensor
    track: object

    def new(self, seed, n):
        return self.make(self.cfg, self.pixels, sources_of(self.pixels, n), self.track)


def smoothed(cfg, pixels, run):
    """The training images, each replaced by a DIP's output: uint8 [N, C, H, W]."""
    source = next(source for source in SMOOTHERS if source in cfg.dip_source)
    with run.timed("dip"):
        x = COPIES[f"dip-{source}"](cfg, pixels, pixels, run.track)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def train(cfg, pixels, run, name, snapshots):
    """`dipddpm.train_network`, with the averaged weights kept `snapshots` times, in
    snapshots/NAME-STEP.pt. Networks but `full` have a folder of their own, for their checkpoint."""
    steps = cfg.epochs * dipddpm.steps_of(cfg, len(pixels))[1]
    home, kept = run.folder, run.folder / "snapshots"

    def each(done, ema, seconds):
        if done * snapshots // steps > (done - 1) * snapshots // steps:
            kept.mkdir(exist_ok=True)
            dipddpm.save({"step": done, "ema": ema.state_dict()}, kept / f"{name}-{done:06d}.pt")

    if name != "full":
        run.folder = home / name
        run.folder.mkdir(exist_ok=True)
        there = (run.folder / dipddpm.CHECKPOINT).exists()
        run.saved = {"ddpm": dipddpm.load_checkpoint(run.folder)} if there else {}
    try:
        net, rows, seconds = dipddpm.train_network(cfg, pixels, run, each=each)
    finally:
        run.folder = home
    run.seconds["train"] += seconds
    return net, [[name, *row[1:]] for row in rows]


@torch.no_grad()
def held_out_losses(cfg, net, pixels, run, n=1000):
    """Mean of (out - target)^2, not weighted, on n test images at five t: {"t = 0.1 T": loss}."""
    table = dipddpm.forward_table(cfg)
    table[:, 4] = 1
    table, pixels = table.to(run.device), pixels[:n].to(run.device)
    numbers, losses = torch.arange(len(pixels), device=run.device), {}
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        tau, loss = max(1, round(share * cfg.timesteps)), 0.0
        for index in numbers.split(dipddpm.at_once(pixels)):
            t = torch.full_like(index, tau - 1)
            x_t = kernels.q_sample(pixels, index, t, table, cfg.seed, index, 0, kernels.HELD_OUT)
            out = net(x_t, t)
            loss += kernels.noise_loss(out, pixels, index, t, table, cfg.seed, index, 0,
                                       kernels.HELD_OUT).sum().item()
        losses[f"t = {share:g} T"] = loss / len(pixels)
    return losses


def median_step(rows):
    """Seconds of a training step: the median over the log's rows."""
    steps, seconds = [[0, *(row[i] for row in rows)] for i in (1, 3)]
    return statistics.median((s - r) / (n - m) for m, n, r, s in
                             zip(steps, steps[1:], seconds, seconds[1:]))


def convergence(cfg, run, name, net, rows, begun, judge, test):
    """Curves over a training's snapshots: fid_lenet of the noise start and of each DIP arm that
    sample with this network, against training seconds plus the DIP's; and the loss on held-out
    images against steps, each at a fixed t. The arms begin where they began, `begun` {arm: (x_init,
    t_start, seconds)}. Seconds of training are steps times the median step's, so that neither a
    pause nor a busy minute bends the curve. The noise start is also shown at the most evaluations
    of the run: its best, where the DIPs' is early."""
    curves, net, pace = {}, copy.deepcopy(net), median_step(rows)
    few, most = min(cfg.nfe, key=lambda nfe: abs(nfe - 10)), max(cfg.nfe)
    arms = [arm for arm in begun if arm.startswith("dip-") or (arm, name) == ("ddpm", "full")]
    for file in sorted((run.folder / "snapshots").glob(f"{name}-*.pt")):
        saved = torch.load(file, map_location=run.device, weights_only=True)
        dipddpm.load_weights(net, saved["ema"], file)
        for label, loss in held_out_losses(cfg, net, test.pixels, run).items():
            curves.setdefault(f"held-out/{name} {label}", []).append([saved["step"], loss])
        for arm in arms:
            x_init, t_start, seconds = begun[arm]
            numbers = torch.arange(len(x_init), device=x_init.device)
            for nfe in sorted({few, most} if arm == "ddpm" else {few}):
                with run.timed("sample"):
                    x = dipddpm.sample(cfg, net, x_init, t_start, nfe, cfg.eta[0], numbers)
                of = arm if arm == "ddpm" else f"{arm} {name}"
                curves.setdefault(f"training/{of}, {nfe} evaluations", []).append(
                    [saved["step"] * pace + seconds, judge(x).get("fid_lenet")])
    return curves


def sampled(own, cfg, run, nets, pixels, judge):
    """As `dipddpm.generate`, but every prior arm samples with each network that --train lists: rows
    of results.json, and where each arm began, {arm: (x_init, t_start, seconds)}."""
    numbers = torch.arange(cfg.samples, device=run.device)
    sources, (rows, begun) = sources_of(pixels, cfg.samples), ([], {})
    copies = {arm: functools.partial(Copies, make) for arm, make in COPIES.items()}
    for start in dipddpm.starts(cfg, run, {"ddpm": nets["full"]}, {}, pixels, numbers,
                                dipddpm.CODINGS | copies):
        arm, _, x_init, t_start, prior, seconds = start
        begun.setdefault(arm, (x_init, t_start, seconds))
        used, has_source = ("full",) if arm == "ddpm" else own.train, arm in COPIES
        for name, nfe, eta in itertools.product(used, cfg.nfe, cfg.eta):
            with run.timed("sample") as took:
                x = dipddpm.sample(cfg, nets[name], x_init, t_start, nfe, eta, numbers)
            row = {"name": arm, "seed": cfg.seed, "train": name, "nfe": nfe, "t_start": t_start,
                   "eta": eta, "seconds": took.seconds + seconds, "prior_seconds": seconds}
            rows.append(row | judge(x, sources if has_source else None))
            if has_source:
                square = (prior - sources.float() / 127.5 + 1).square()
                rows[-1]["prior_square_error"] = square.sum().item() / len(x)
            dipddpm.say(dipddpm.describe(rows[-1]))
    return rows, begun


def run_prior(own, cfg, run):
    """As `dipddpm.run_prior`, with two networks: `full`, on images, from which the noise start
    samples; `smoothed`, on DIP outputs; and curves of their training."""
    # what is asked for, and the data
    if "smoothed" in own.train and not {*SMOOTHERS} & {*own.dip_source}:
        raise ValueError("--train smoothed needs --dip-source network or images: it learns what a "
                         "DIP makes of the training images")
    settings = {"arch": own.network_arch, "width": own.network_width, "iters": own.network_iters}
    COPIES["dip-network"] = functools.partial(networks.dip_network, **settings)
    cfg = with_settings(cfg, own.set)
    images = dipddpm.load_images(cfg, "train")
    test = dipddpm.load_images(cfg, "test", images.name if cfg.data == "auto" else None)
    pixels = images.pixels[:cfg.limit].to(run.device)
    about = {"name": images.name, "train": len(pixels), "test": len(test.pixels),
             "sha256": images.sha256}
    cfg = run.begin(dipddpm.resolve(cfg, pixels.shape), about, list(pixels.shape[1:]))
    cfg = replace(cfg, dip_source=own.dip_source)  # config.json knows no `network`
    # training: the noise start's network first
    nets, logs = {}, {}
    for name in dict.fromkeys(("full", *own.train)):
        seen = pixels if name == "full" else smoothed(cfg, pixels, run)
        nets[name], logs[name] = train(cfg, seen, run, name, own.snapshots)
    dipddpm.write_log(run, [row for rows in logs.values() for row in rows])
    # sampling, and curves
    judge = measure.Judge(images, pixels, test, cfg.samples, [data.cache_root(), run.folder])
    rows, begun = sampled(own, cfg, run, nets, pixels, judge)
    curves = {f"loss/{name}": next(iter(dipddpm.loss_curves(log).values()))
              for name, log in logs.items()}
    for name, net in nets.items():
        curves |= convergence(cfg, run, name, net, logs[name], begun, judge, test)
    run.seconds["eval"] = judge.seconds
    run.finish({"data": about, "parameters": sum(p.numel() for p in nets["full"].parameters()),
                "arms": rows, "curves": curves, "pictures": []} | judge.summary())


# ------------------------------------------------------------------ command line


def with_settings(cfg, pairs):
    """Config with settings that have no flag, from NAME=VALUE; ValueError if there is no such."""
    known = {f.name: f.type for f in fields(cfg) if not f.metadata}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            cfg = replace(cfg, **{name: known[name](value)})
        except (KeyError, ValueError):
            raise ValueError(f"--set {pair}: want NAME=VALUE, NAME one of "
                             f"{', '.join(known)}") from None
    if cfg.arch not in dipddpm.ARCHS:
        raise ValueError(f"--set arch={cfg.arch}: none of {', '.join(dipddpm.ARCHS)}")
    return cfg


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def several(text):
    if int(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2")
    return int(text)


def parser():
    p = dipddpm.OneLineParser(
        prog="python -m studies.arms", allow_abbrev=False, description=__doc__.split("\n")[0],
        epilog="Other flags are those of dipddpm.py.")
    p.add_argument("mode", choices=("guide", "prior"))
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                   help="a setting of Config without a flag: alpha, dip_lr, arch, ...")
    p.add_argument("--rungs", type=several, default=5, help="guide: levels of noise of literal")
    p.add_argument("--arms", type=some_of(GUIDE_ARMS), default=GUIDE_ARMS,
                   help=f"guide: a list of {', '.join(GUIDE_ARMS)}")
    p.add_argument("--train", type=some_of(("full", "smoothed")), default=("full", "smoothed"),
                   help="prior: networks of the arms with a prior, a list. full: on images; "
                   "smoothed: on DIP outputs")
    p.add_argument("--snapshots", type=int, default=0,
                   help="prior: averaged weights kept so many times, for curves")
    p.add_argument("--dip-source", type=some_of(("images", "network", "codes")),
                   default=("network",), help="prior: a list of images, network, codes")
    p.add_argument("--network-arch", choices=dipddpm.ARCHS, default="autoencoder")
    p.add_argument("--network-width", type=positive, default=64)
    p.add_argument("--network-iters", type=positive, default=300)
    return p


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    own, rest = parser().parse_known_args(argv)
    work = functools.partial(run_guide if own.mode == "guide" else run_prior, own)
    instead(own.mode, work, rest, f"python -m studies.arms {shlex.join(argv)}")


if __name__ == "__main__":
    main()
