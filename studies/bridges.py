"""Bridges at equal minutes: arms that are given so many epochs each, so that what they take in all,
the fit of their codes included, can be made the same.

    python -m studies.bridges --out FOLDER --seeds 0,1,2 --arms ddpm:6,dip-bridge:4,pca-bridge:5

`ddpm` is the noise start, and, of the same network, every coding's new images noised to each
--t-start, and copies (`handed_over`); `pca-bridge` is `dip-bridge` with principal components,
decoded linearly, in the codes' place: what a DIP's decoder must beat. `distilled:3` teaches
FOLDER's `ddpm`, in 3 more epochs, to do with 8, 4, 2 and 1 evaluations. One process and one thread;
FOLDER/ARM-EPOCHS-SEED.json as each ends, with the core's seconds, and its network: those that are
there are not made again.
"""

import argparse
import copy
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
import dipddpm
import eval as measure
import kernels
from studies.recipe import trained

BRIDGES = dipddpm.BRIDGES | {"pca-bridge": "pca"}
HALVINGS = 8, 4, 2, 1  # evaluations of a distilled network, one after the other


def distil(cfg, net, pixels, N, steps):
    """Progressive distillation (Salimans & Ho 2022, algorithm 2): net learns to make in one step of
    DDIM, of N to the image, what it made in two, of 2 N. pixels uint8; -> the averaged network."""
    teacher, ema = net, copy.deepcopy(net).requires_grad_(False)
    net = copy.deepcopy(net).requires_grad_(True)
    taus = dipddpm.time_grid(cfg.timesteps, 2 * N)
    half = dipddpm.reverse_table(cfg, taus, 0.0)  # rows (a, b, c0, ct, ...)
    whole = dipddpm.reverse_table(cfg, taus[::2], 0.0)
    times, table = torch.tensor(taus[:-1]) - 1, dipddpm.forward_table(cfg)
    lr, numbers = torch.tensor(cfg.lr), torch.arange(cfg.batch)
    optimizers = dipddpm.optimizers_of(net, lr)
    order = torch.cat([dipddpm.epoch_order(cfg, len(pixels), epoch, "cpu")
                       for epoch in range(-(-steps * cfg.batch // len(pixels)))])
    for step in map(torch.tensor, range(steps)):
        index = order[step * cfg.batch + numbers]
        i = dipddpm.draw_t(cfg, N, numbers, cfg.batch, step)  # which of the N steps
        x = x_t = kernels.q_sample(pixels, index, times[2 * i], table, cfg.seed, numbers, step)
        with torch.no_grad():
            for j in 2 * i, 2 * i + 1:
                a, b, c0, ct, *_ = half[j][:, :, None, None, None].unbind(1)
                x = c0 * (a * x + b * teacher(x, times[j])).clamp(-1, 1) + ct * x
        a, b, c0, ct, *_ = whole[i][:, :, None, None, None].unbind(1)
        target = ((x - ct * x_t) / c0 - a * x_t) / b
        net.zero_grad()
        (net(x_t, times[2 * i]) - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        lr.fill_(cfg.lr * dipddpm.half_cosine(step.item(), steps))
        for optimizer in optimizers:
            optimizer.step()
        dipddpm.update_average(ema, net, step)
    return ema


def kept(file, cfg, pixels, priors=None):
    """A network and its seconds of training, from a file if it is there; ValueError where that is
    of other images."""
    about = {"data": cfg.data, "images": len(pixels)}
    if not file.exists():
        net, _, seconds = trained(cfg, pixels, priors)
        dipddpm.save({"net": net.state_dict(), "seconds": seconds} | about, file)
    saved = torch.load(file, weights_only=True)
    if any(saved[key] != value for key, value in about.items()):
        raise ValueError(f"{file} is of {saved['images']} images of {saved['data']}: name another "
                         "--out")
    net = dipddpm.make_unet(cfg, pixels.shape[1], "cpu", priors is not None).eval()
    dipddpm.load_weights(net, saved["net"], file)
    return net, saved["seconds"]


def timed(work, *args):
    """What work returns, and seconds of the core."""
    began = time.process_time()
    return work(*args), time.process_time() - began


def arms(cfg, arm, pixels, args):
    """-> the arm's seconds of training and of codes, and pairs of a `dipddpm.Start` and the numbers
    of evaluations to sample with."""
    n, file = args.samples, args.out / f"{arm}-{cfg.epochs}-{cfg.seed}.pt"
    numbers, shape = torch.arange(n), (n, *pixels.shape[1:])

    def start(name, net, coding, t_start):
        p = coding.new(cfg.seed, n)
        return dipddpm.Start(name, net, dipddpm.start_from_prior(cfg, p, t_start, numbers), t_start,
                             p)

    def from_noise(net):
        return dipddpm.Start(arm, net, dipddpm.noise_start(cfg, shape, numbers), cfg.timesteps)

    if arm in BRIDGES:
        coding, seconds = timed(dipddpm.CODINGS[BRIDGES[arm]], cfg, pixels)
        net, trains = kept(file, cfg, pixels, coding.priors)
        return trains, seconds, [(start(arm, net, coding, cfg.bridge_start), args.nfe)]
    if arm == "distilled":
        teachers = args.out.glob(f"ddpm-*-{cfg.seed}.pt")
        longest = max(teachers, key=lambda file: int(file.stem.split("-")[1]), default=None)
        if longest is None:
            raise ValueError(f"{args.out} has no ddpm of seed {cfg.seed} to distil")
        net, first = kept(longest, cfg, pixels)
        steps, found, began = cfg.epochs * dipddpm.steps_of(cfg, len(pixels))[1], [], 0.0
        for N in HALVINGS:
            net, seconds = timed(distil, cfg, net, pixels, N, steps // len(HALVINGS))
            began += seconds
            found.append((from_noise(net), (N,)))
        return first + began, 0.0, found
    net, trains = kept(file, cfg, pixels)
    found = [(from_noise(net), args.nfe)]
    for name in dipddpm.CODINGS if args.t_start else ():
        coding = dipddpm.CODINGS[name](cfg, pixels)
        found += [(start(name, net, coding, t), [nfe for nfe in args.nfe if nfe <= 10])
                  for t in args.t_start]  # more gain nothing
    if args.t_start:
        copies, t = handed_over(cfg, pixels, n)
        found += [(dipddpm.Start(name, net, x_t, t), [nfe for nfe in args.nfe if nfe <= min(10, t)])
                  for name, x_t in copies.items()]
    return trains, 0.0, found


def handed_over(cfg, pixels, n):
    """n training images noised to step T / 10 as they are, and by the DIPs that were fitted to
    these, as in a public report: a truncated diffusion, whose samples are copies. -> {name: x_t},
    t."""
    t, numbers = max(1, cfg.timesteps // 10), torch.arange(n)
    index = dipddpm.epoch_order(cfg, len(pixels), 0, "cpu")[numbers % len(pixels)]
    x_t = kernels.q_sample(pixels, index, torch.full((n,), t - 1), dipddpm.forward_table(cfg),
                           cfg.seed, numbers, 0)
    dips = [dipddpm.fit_dips(cfg, dipddpm.exact((x_t[rows] + 1) / 2), rows, cfg.dip_iters)
            for rows in numbers.split(cfg.dip_group)]
    return {"noised": x_t, "dip-noised": 2 * torch.cat(dips) - 1}, t


def nearest(x, pixels):
    """The nearest training image of each x [n, C, H, W], pixels uint8: the same shape."""
    real = pixels.float() / 127.5 - 1
    return real[torch.cdist(x.flatten(1), real.flatten(1)).argmin(1)]


def measured(cfg, arm, train, judge, args):
    """One arm's file: its seconds and a row for each start and number of evaluations."""
    trains, codes, begun = arms(cfg, arm, train.pixels, args)
    rows, numbers = [], torch.arange(args.samples)
    as_taught = replace(cfg, order=1) if arm == "distilled" else cfg  # DDIM's steps
    for start, nfe in ((start, nfe) for start, many in begun for nfe in many):
        x, seconds = timed(dipddpm.sample, as_taught, start.net, start.x_init, start.t_start, nfe,
                           args.eta, numbers, start.prior if start.arm in BRIDGES else None)
        rows.append({"name": start.arm, "seed": cfg.seed, "t_start": start.t_start, "nfe": nfe,
                     "eta": args.eta, "seconds": seconds} | judge(x))
        print(dipddpm.describe(rows[-1]), flush=True)
        if start.arm == arm:  # new images, what they began with, and how new they are
            shown = {} if start.prior is None else {"prior": start.prior[:20]}
            shown |= {arm: x[:20], "nearest training image": nearest(x[:20], train.pixels)}
            measure.draw(args.out / f"{arm}-{cfg.epochs}-{cfg.seed}-nfe{nfe}.png",
                         f"{arm}, {nfe} evaluations",
                         {name: (images + 1) / 2 for name, images in shown.items()})
    return {"arm": arm, "data": cfg.data, "seed": cfg.seed, "epochs": cfg.epochs,
            "images": len(train.pixels), "seconds": trains + codes, "codes": codes,
            "arms": rows} | judge.summary()


def run(args):
    """Every arm and seed whose file is not there."""
    todo = [(arm, dipddpm.check(dipddpm.resolve(dipddpm.Config(
        mode="prior", data=args.data, limit=args.limit, epochs=epochs, seed=seed, nfe=args.nfe,
        eta=(args.eta,), samples=args.samples, t_start=args.t_start or None))))
        for seed, (arm, epochs) in itertools.product(args.seeds, args.arms)]
    train, test = (data.load(args.data, split=split, limit=args.limit)
                   for split in ("train", "test"))
    args.out.mkdir(parents=True, exist_ok=True)
    judge = measure.Judge(train, train.pixels, test, args.samples, [args.out, data.cache_root()])
    for arm, cfg in todo:
        path = args.out / f"{arm}-{cfg.epochs}-{cfg.seed}.json"
        if not path.exists():
            cfg = dipddpm.resolve(cfg, train.pixels.shape)
            measure.write_json(measured(cfg, arm, train, judge, args), path)
        print(path, flush=True)


def arm_and_epochs(text):
    arm, _, epochs = text.partition(":")
    if arm not in ("ddpm", "distilled", *BRIDGES) or not epochs.isdigit() or int(epochs) < 1:
        raise argparse.ArgumentTypeError(f"{text}: want ARM:EPOCHS, ARM one of ddpm, "
                                         f"distilled, {', '.join(BRIDGES)}")
    return arm, int(epochs)


def main(argv=None):
    p = dipddpm.OneLineParser(prog="studies.bridges", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--data", default="mnist")
    p.add_argument("--limit", type=int)
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0,))
    p.add_argument("--arms", type=lambda text: [*map(arm_and_epochs, text.split(","))],
                   required=True)
    p.add_argument("--nfe", type=dipddpm.listed(int), default=(1, 2, 3, 5, 10, 20, 50))
    p.add_argument("--t-start", type=dipddpm.listed(int), default=(),
                   help="starts of the ddpm arm from every coding, a list")
    p.add_argument("--eta", type=float, default=0.0)
    p.add_argument("--samples", type=int, default=1000)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    dipddpm.keep_freed_memory()
    try:
        run(args)
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
