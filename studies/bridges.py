"""Bridges at equal minutes: arms that are given so many epochs each, so that what they take in all,
the fit of their codes included, can be made the same.

    python -m studies.bridges --out FOLDER --seeds 0,1,2 --arms ddpm:6,dip-bridge:4,pca-bridge:5

`ddpm` is the noise start, and, of the same network, every coding's new images noised to each
--t-start; `pca-bridge` is `dip-bridge` with principal components, decoded linearly, in the codes'
place: what a DIP's decoder must beat. One process and one thread; FOLDER/ARM-SEED.json as each
ends, with the core's seconds, and its network: those that are there are not made again.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

import data
import dipddpm
import eval as measure
from studies.recipe import trained

CODINGS = {"dip-bridge": "dip-codes", "pca-bridge": "pca"}


def kept(file, cfg, pixels, priors=None):
    """A network and its seconds of training, from a file if it is there."""
    if not file.exists():
        net, _, seconds = trained(cfg, pixels, priors)
        dipddpm.save({"net": net.state_dict(), "seconds": seconds}, file)
    saved = torch.load(file, weights_only=True)
    net = dipddpm.make_unet(cfg, pixels.shape[1], "cpu", priors is not None).eval()
    dipddpm.load_weights(net, saved["net"], file)
    return net, saved["seconds"]


def arms(cfg, arm, pixels, t_starts, n, file):
    """-> the arm's seconds of training and of codes, and its `dipddpm.Start`s."""
    numbers, shape = torch.arange(n), (n, *pixels.shape[1:])

    def coded(name):
        began = time.process_time()
        coding = dipddpm.CODINGS[name](cfg, pixels)
        return coding, time.process_time() - began

    def start(name, net, coding, t_start, seconds):
        p = coding.new(cfg.seed, n)
        return dipddpm.Start(name, net, dipddpm.start_from_prior(cfg, p, t_start, numbers), t_start,
                             p, seconds)

    if arm in CODINGS:
        coding, seconds = coded(CODINGS[arm])
        net, trains = kept(file, cfg, pixels, coding.priors)
        return trains, seconds, [start(arm, net, coding, cfg.bridge_start, seconds)]
    net, trains = kept(file, cfg, pixels)
    begun = [dipddpm.Start(arm, net, dipddpm.noise_start(cfg, shape, numbers), cfg.timesteps)]
    for name in dipddpm.CODINGS if t_starts else ():
        coding, seconds = coded(name)
        begun += [start(name, net, coding, t, seconds) for t in t_starts]
    return trains, 0.0, begun


def nearest(x, pixels):
    """The nearest training image of each x [n, C, H, W], pixels uint8: the same shape."""
    real = pixels.float() / 127.5 - 1
    return real[torch.cdist(x.flatten(1), real.flatten(1)).argmin(1)]


def measured(cfg, arm, train, test, judge, args):
    """One arm's file: its seconds and a row for each start and number of evaluations."""
    trains, codes, begun = arms(cfg, arm, train.pixels, args.t_start, args.samples,
                                args.out / f"{arm}-{cfg.epochs}-{cfg.seed}.pt")
    rows, numbers = [], torch.arange(args.samples)
    for start, nfe in itertools.product(begun, args.nfe):
        if start.arm in dipddpm.CODINGS and nfe > 10:
            continue  # they gain nothing more
        bridge = start.prior if start.arm in CODINGS else None
        began = time.process_time()
        x = dipddpm.sample(cfg, start.net, start.x_init, start.t_start, nfe, args.eta, numbers,
                           bridge)
        rows.append({"name": start.arm, "seed": cfg.seed, "t_start": start.t_start, "nfe": nfe,
                     "eta": args.eta, "seconds": time.process_time() - began} | judge(x))
        print(dipddpm.describe(rows[-1]), flush=True)
        if start.arm == arm:  # new images, what they began with, and how new they are
            shown = {} if start.prior is None else {"prior": start.prior[:20]}
            shown |= {arm: x[:20], "nearest training image": nearest(x[:20], train.pixels)}
            measure.draw(args.out / f"{arm}-{cfg.epochs}-{cfg.seed}-nfe{nfe}.png",
                         f"{arm}, {nfe} evaluations",
                         {name: (images + 1) / 2 for name, images in shown.items()})
    return {"arm": arm, "data": train.name, "seed": cfg.seed, "epochs": cfg.epochs,
            "images": len(train.pixels), "seconds": trains + codes, "codes": codes,
            "arms": rows} | judge.summary()


def arm_and_epochs(text):
    arm, _, epochs = text.partition(":")
    if arm not in ("ddpm", *CODINGS) or not epochs.isdigit() or int(epochs) < 1:
        raise argparse.ArgumentTypeError(f"{text}: want ARM:EPOCHS, ARM one of ddpm, "
                                         f"{', '.join(CODINGS)}")
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
        train, test = (data.load(args.data, split=split, limit=args.limit)
                       for split in ("train", "test"))
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    judge = measure.Judge(train, train.pixels, test, args.samples, [args.out, data.cache_root()])
    for seed, (arm, epochs) in itertools.product(args.seeds, args.arms):
        path = args.out / f"{arm}-{epochs}-{seed}.json"
        if not path.exists():
            cfg = dipddpm.resolve(dipddpm.Config(mode="prior", data=args.data, epochs=epochs,
                                                 seed=seed), train.pixels.shape)
            measure.write_json(measured(cfg, arm, train, test, judge, args), path)
        print(path, flush=True)


if __name__ == "__main__":
    sys.exit(main())
