"""Restoration by diffusion: test images with noise, holes or too few pixels, by a run's network.

    python -m studies.restore RUN --task inpaint,sr --nfe 5,10,50 --out NEW

A task is denoise, inpaint (half of the pixels are missing), inpaint-box (a centre box is), sr (a
half of the size) or sr-4. Each is done by a DIP alone (`dip`), by the DDPM from noise (`ddpm`),
from the DIP's output (`dip-images`) and, as a control, from A+ y, which costs nothing (`pinv`); to
denoise also from y itself (`ddpm-y`). All but `ddpm-y` are kept consistent with y (Wang, Yu & Zhang
2023, DDNM). RUN stays as it is; flags of `dipddpm.py` may follow.
"""

import argparse
import functools
import itertools
import math
import shlex
import sys
from dataclasses import replace

import torch

import dipddpm
import eval as measure
import kernels

HELD_OUT = 0.1  # the share of a measurement that tells its DIP when to stop

# ------------------------------------------------------------------ what is known of an image


def consistent(known, x0_hat, weight=1.0):
    """x0_hat in [-1, 1], its range part replaced: x + weight A+ (y - A x) (Wang, Yu & Zhang 2023,
    DDNM, eq. 13; eq. 17 has the weight). A step takes this x0_hat and the network's own eps_hat:
    the eps that x_t and this x0_hat imply would keep the noise that what is known began with."""
    x = (x0_hat + 1) / 2
    return (x + weight * known.back(known.y - known.A(x))) * 2 - 1


def noisy_step(known, x_t, x0_hat, ab_t, ab_s, sigma, z):
    """A reverse step with a noisy y: x_s gets as much of y as brings no more than x_s's own noise,
    1 - ab_s, and that much less of eps_hat and z (after Wang, Yu & Zhang 2023, DDNM+, eq. 17-19:
    there no more than z's, and less of z). x_t, x0_hat, z [n, C, H, W]; ab_t, ab_s and sigma are
    scalar tensors."""
    y_noise = 2 * known.sigma * ab_s.sqrt()  # of sqrt(ab_s) y, in [-1, 1]
    weight = ((1 - ab_s).sqrt() / y_noise).clamp(max=1)
    there = known.back(known.A(torch.ones_like(x_t)))  # 1 where y says something
    left = (1 - ab_s - there * (weight * y_noise) ** 2).clamp(min=0)
    fresh = torch.minimum(left, sigma**2)
    eps_hat = (x_t - ab_t.sqrt() * x0_hat) / (1 - ab_t).sqrt()
    return (ab_s.sqrt() * consistent(known, x0_hat, weight) + (left - fresh).sqrt() * eps_hat
            + fresh.sqrt() * z)


def start_from_noisy(cfg, known):
    """y with noise, sigma > 0, is x_t up to scale for the t whose noise is y's -> x_t, t_start."""
    ab = dipddpm.schedule_of(cfg).alpha_bar
    noise = (1 / ab - 1).sqrt()  # of x_t / sqrt(ab), which is in [-1, 1]: twice sigma
    t = (noise - 2 * known.sigma).abs().argmin()
    return (known.y * 2 - 1) * ab[t].sqrt().float(), t.item() + 1


# ------------------------------------------------------------------ a DIP, a reverse process


def fit_held_out(cfg, known, numbers, iters, track=dipddpm.untracked):
    """DIPs of K images that a tenth of y is held out of. Each image's result is the one of its
    averaged outputs, every ten iterations, that is nearest to that tenth: a stop that needs no
    truth. -> [K, C, H, W]; RuntimeError where it is not finite."""
    y, (H, W) = known.y, known.mask.shape[2:]
    # the tenth, and the weights of what is left
    given = known.given()
    u = kernels.uniform((len(y), 1, *y.shape[2:]), cfg.seed, numbers, dipddpm.HELD_DRAW,
                        kernels.CORRUPTION, y.device)
    held = given * (u < HELD_OUT)
    share = (given - held) / (given - held).sum(dim=(1, 2, 3), keepdim=True)
    # the fit, and its best look
    group = dipddpm.DIPGroup(cfg, numbers, y.shape[1], H, W, y.dtype)
    best, best_risk = group.average.clone(), torch.full_like(share[:, :1, :1, :1], math.inf)
    for i in track(range(1, iters + 1), "fit DIPs", len(y)):
        group.iterate(y, share, known.A)
        if i % dipddpm.CHECK and i < iters:
            continue
        group.require(group.average.isfinite().all())
        risk = ((known.A(group.average) - y).square() * held).sum(dim=(1, 2, 3), keepdim=True)
        best = torch.where(risk < best_risk, group.average, best)
        best_risk = torch.minimum(risk, best_risk)
    return best


@torch.no_grad()
def restored(cfg, net, x_t, t_start, nfe, eta, numbers, known):
    """`dipddpm.reverse` from x_t [n, C, H, W], after t_start steps of noise, with each x0_hat made
    consistent with y. x_s is linear in x0_hat, so the change is added behind the kernel, times
    sqrt(ab_s); a noisy y has a step of its own. -> [n, C, H, W], about in [-1, 1]."""
    taus, schedule = dipddpm.time_grid(t_start, nfe), dipddpm.schedule_of(cfg)
    table = dipddpm.reverse_table(cfg, taus, eta).to(x_t.device)  # [nfe, 7]
    alpha_bar = torch.tensor([schedule.at(tau) for tau in taus], device=x_t.device)
    x0_prev = torch.zeros_like(x_t) if eta == 0 and cfg.order == 2 else None
    for i, tau in enumerate(taus[:-1]):
        out = net(x_t, torch.full_like(numbers, tau - 1))
        a, b, _, _, sigma, *_ = table[i]
        x0_hat = (a * x_t + b * out.float()).clamp(-1, 1)
        ab_t, ab_s = alpha_bar[i], alpha_bar[i + 1]
        if known.sigma:
            z = kernels.normal(x_t.shape, cfg.seed, numbers, i, kernels.STEP_NOISE, x_t.device)
            x_t = noisy_step(known, x_t, x0_hat, ab_t, ab_s, sigma, z)
        else:
            x_t = kernels.posterior_step(x_t, out, table, i, cfg.seed, numbers, x0_prev=x0_prev)
            x_t += ab_s.sqrt() * (consistent(known, x0_hat) - x0_hat)
    return x_t if known.sigma else consistent(known, x_t)


# ------------------------------------------------------------------ a task, its arms


def starts(cfg, known, priors, numbers):
    """(arm, x_init, t_start, seconds of its start): noise; every prior, {arm: (x in [0, 1],
    seconds)}, at every t_start; and y itself, where its noise is all that is wrong."""
    shape = len(known.y), known.y.shape[1], *known.mask.shape[2:]
    yield "ddpm", dipddpm.noise_start(cfg, shape, numbers), cfg.timesteps, 0.0
    for t_start, (arm, (x, seconds)) in itertools.product(cfg.t_start, priors.items()):
        yield arm, dipddpm.start_from_prior(cfg, x * 2 - 1, t_start, numbers), t_start, seconds
    if known.task == "denoise" and known.sigma:
        yield "ddpm-y", *start_from_noisy(cfg, known), 0.0


def restore(cfg, run, net, known, truth):
    """Every arm restores the images of one task; truth [n, C, H, W] in [0, 1] only measures: rows
    of results.json, an entry of its pictures."""
    numbers, task = torch.arange(len(truth), device=truth.device), known.task
    corrupted = known.back(known.y).clamp(0, 1)
    rows, shown = [], {"truth": truth[:16]}
    shown_nfe = min(cfg.nfe, key=lambda nfe: abs(nfe - 10))

    def add(name, x, **more):
        row = {"name": name, "task": task, "sigma": known.sigma, "seed": cfg.seed} | more
        rows.append(row | measure.measures(x, truth))
        dipddpm.say(dipddpm.describe(rows[-1]))
        if more.get("nfe", shown_nfe) == shown_nfe:
            shown.setdefault(name, x[:16])

    # what needs no network
    add("corrupted", corrupted)
    with run.timed("dip") as took:
        x_dip = torch.cat([fit_held_out(cfg, known.part(part), part, cfg.dip_iters, run.track)
                           for part in numbers.split(cfg.dip_group)]).clamp(0, 1)
        if not known.sigma:  # what is known exactly is kept, as the arms that sample keep it
            x_dip = ((consistent(known, x_dip * 2 - 1) + 1) / 2).clamp(0, 1)
    add("dip", x_dip, seconds=took.seconds)
    # from each start, in ever more evaluations
    priors = {"dip-images": (x_dip, took.seconds), "pinv": (corrupted, 0.0)}
    for arm, x_init, t_start, seconds in starts(cfg, known, priors, numbers):
        for nfe, eta in itertools.product(cfg.nfe, cfg.eta):
            if nfe > t_start:
                continue  # no such short steps
            settings = cfg, net, x_init, t_start, nfe, eta, numbers
            with run.timed("sample") as took:
                x = dipddpm.sample(*settings) if arm == "ddpm-y" else in_parts(*settings, known)
            add(arm, ((x + 1) / 2).clamp(0, 1), nfe=nfe, t_start=t_start, eta=eta,
                seconds=took.seconds + seconds, prior_seconds=seconds)
    return rows, measure.draw(
        run.folder / f"{task}.png",
        f"{task}, sigma = {known.sigma:g}, {shown_nfe} network evaluations", shown)


def in_parts(cfg, net, x_init, t_start, nfe, eta, numbers, known):
    """`restored`, of as many images at a time as are fast."""
    return torch.cat([restored(cfg, net, x_init[part], t_start, nfe, eta, numbers[part],
                               known.part(part))
                      for part in torch.arange(len(x_init)).split(dipddpm.at_once(x_init))])


# ------------------------------------------------------------------ command line


def run_restore(tasks, cfg, run):
    """Restore test images by the network of the run cfg.resume: a results.json of its own."""
    # the network, and the images that it is for
    saved = dipddpm.load_checkpoint(cfg.resume)
    C, H, W = saved["shape"]
    net = dipddpm.make_unet(cfg, C, run.device)
    dipddpm.load_weights(net, saved["ema"], cfg.resume)
    net = run.as_sampled(net)
    test = dipddpm.load_images(cfg, "test", saved["data"]["name"] if cfg.data == "auto" else None)
    if list(test.pixels.shape[1:]) != [C, H, W]:
        raise ValueError(f"{cfg.resume}: its network is for images of {C}x{H}x{W}, not "
                         f"{'x'.join(map(str, test.pixels.shape[1:]))}")
    n = min(cfg.samples, len(test.pixels))
    truth = test.pixels[measure.subset(len(test.pixels), n)].to(run.device).float() / 255
    # what each task leaves of them
    each = []
    for task in tasks:
        sigma = cfg.sigma if cfg.sigma is not None else 0.1 if task == "denoise" else 0.0
        each.append(dipddpm.corrupt(cfg, task, truth, sigma, torch.arange(n, device=run.device)))
    cfg = dipddpm.resolve(replace(cfg, mode="restore", task=",".join(tasks)), test.pixels.shape)
    cfg = run.begin(cfg)
    dipddpm.say(f"data: {test.name}, {n} images of {C}x{H}x{W}; {run.device}, {run.precision}")
    arms, pictures = [], []
    for known in each:
        rows, picture = restore(cfg, run, net, known, truth)
        arms += rows
        pictures.append(picture)
    run.finish({"data": saved["data"], "arms": arms, "curves": {}, "pictures": pictures},
               ("psnr",))


def instead(mode, work, argv, command):
    """The command line of `dipddpm.py --mode MODE`, its errors, signals and exit status, with
    `work` (cfg, run) in the mode's place; `command` is what results.json says of it."""
    def named(cfg, run):
        if dipddpm.processes()[1] > 1:
            raise ValueError("a study runs in one process, without torchrun")
        run.command = command
        work(cfg, run)
    before = dipddpm.MODES[mode]
    dipddpm.MODES[mode] = named
    try:
        dipddpm.main(["--mode", mode, *argv])
    finally:
        dipddpm.MODES[mode] = before


def some_of(known):
    """A reader of lists: "a,b" -> ("a", "b"), each one of `known`; an error tells what is wrong."""
    def read(text):
        for part in text.split(","):
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part} is none of {', '.join(known)}")
        return tuple(text.split(","))
    return read


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = dipddpm.OneLineParser(
        prog="python -m studies.restore", allow_abbrev=False, description=__doc__.split("\n")[0],
        epilog="Other flags are dipddpm.py's; 256 --samples and 300 --dip-iters if not given.")
    p.add_argument("run", help="folder of a run with a network")
    p.add_argument("--task", type=some_of(dipddpm.TASKS), default=("inpaint", "sr"),
                   help=f"a list of {', '.join(dipddpm.TASKS)} (default inpaint,sr)")
    own, rest = p.parse_known_args(argv)
    instead("sample", functools.partial(run_restore, own.task),
            ["--samples", "256", "--dip-iters", "300", "--resume", own.run, *rest],
            f"python -m studies.restore {shlex.join(argv)}")


if __name__ == "__main__":
    main()
