"""Candidates for the recipe of training, one at a time, judged without the test split.

    python -m studies.recipe --out FOLDER --epochs 4 --seeds 0,1,2 --arms now,adamw,batch128
    python -m studies.recipe            where the time of a training step goes

Each arm trains on all training images but the last tenth, which its samples are then compared
with: fid_lenet and recall of 2,000 digits at 10 and 20 evaluations. One process and one thread;
FOLDER/ARM-SEED.json as each ends, and those that are there are not done again.
"""

import copy
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import dipddpm
import eval as measure
import kernels
from dipddpm import (  # the method's, whatever takes their place
    forward_table,
    make_unet,
    optimizers_of,
    update_average,
)
from studies.restore import some_of


def adamw(net, lr):
    """AdamW alone, as it was until Muon took the convolutions."""
    return [torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01,
                              fused=True)]


def logit_normal(cfg, T, numbers, B, step):
    """`dipddpm.draw_t`, but t / T = sigmoid(N(0, 1)) (Esser et al. 2024), in the same strata."""
    u = kernels.uniform((len(numbers),), cfg.seed, numbers, step, kernels.TRAIN_TIME,
                        numbers.device)
    t = torch.sigmoid(torch.special.ndtri(((numbers + u) / B).clamp(1e-6, 1 - 1e-6)))
    return (t * T).long().clamp(max=T - 1)


def nearest_noise(cfg, net, pixels, index, numbers, B, table, step, autocast,
                  priors=None, k=4):
    """`dipddpm.denoising_loss` with the nearest to x_0 of k draws of eps (Immiscible Diffusion,
    arXiv 2505.18521)."""
    t, x_0 = dipddpm.draw_t(cfg, len(table), numbers, B, step), pixels[index].float() / 127.5 - 1
    draws = torch.stack([kernels.normal(x_0.shape, cfg.seed, numbers, step + j * 2**24,
                                        kernels.TRAIN_NOISE, x_0.device) for j in range(k)])
    best = (draws * x_0).sum((2, 3, 4)).argmax(0)
    eps = draws[best, torch.arange(len(x_0), device=x_0.device)]
    signal, noise, p, q, weight, _ = table[t][:, :, None, None, None].unbind(1)
    out = net(signal * x_0 + noise * eps, t)
    return (weight * (out - p * x_0 - q * eps).square()).mean((1, 2, 3))


def muon_by(factor):
    """Muon's rate, times a factor."""
    def optimizers(net, lr):
        muon, rest = optimizers_of(net, lr)
        step = muon.step

        def scaled():
            lr.mul_(factor)
            step()
            lr.div_(factor)
        muon.step = scaled
        return [muon, rest]
    return optimizers


def without_attention(cfg, channels, device, bridge=False):
    net = make_unet(cfg, channels, device, bridge)
    net.attention = torch.nn.Identity()
    return net


def even_weights(cfg, t_start=None):
    """Each t's squared error of v counts alike."""
    table = forward_table(cfg, t_start)
    table[:, 4] = 1
    return table


def no_average(average, net, step):
    """The weights as they are."""
    update_average(average, net, torch.zeros_like(step))


# {arm: (changes of Config, functions of dipddpm that others take the place of)}
ARMS = {"now": ({}, {}),
        "before": ({"batch": 128}, {"optimizers_of": adamw}),
        "adamw": ({}, {"optimizers_of": adamw}),
        "batch128": ({"batch": 128}, {}),
        "batch32": ({"batch": 32}, {}),
        "logit-normal": ({}, {"draw_t": logit_normal}),
        "nearest-noise": ({}, {"denoising_loss": nearest_noise}),
        "muon-twice": ({}, {"optimizers_of": muon_by(2)}),
        "muon-half": ({}, {"optimizers_of": muon_by(0.5)}),
        "no-attention": ({}, {"make_unet": without_attention}),
        "even-weights": ({}, {"forward_table": even_weights}),
        "no-average": ({}, {"update_average": no_average}),
        "adamw-twice": ({"lr": 4e-3}, {"optimizers_of": muon_by(0.5)})}


def trained(cfg, pixels, priors=None):
    """The averaged network after `dipddpm.train_steps`, mean losses of the epochs, seconds of
    the core."""
    net = dipddpm.make_unet(cfg, pixels.shape[1], "cpu", priors is not None)
    ema, lr = copy.deepcopy(net).requires_grad_(False), torch.tensor(cfg.lr)
    (B, per_epoch), losses, began = dipddpm.steps_of(cfg, len(pixels)), [], time.process_time()
    steps = dipddpm.train_steps(cfg, pixels, net, ema, dipddpm.optimizers_of(net, lr),
                                priors=priors)
    for _, loss in dipddpm.progress(steps, "train", cfg.epochs * per_epoch, B):
        losses.append(loss.item())
    return ema.eval(), [statistics.fmean(losses[i * per_epoch:][:per_epoch])
                        for i in range(cfg.epochs)], time.process_time() - began


def measured(cfg, arm, train, folder, n=2000):
    """One arm's row: losses, seconds, fid_lenet and recall at 10 and 20 evaluations."""
    changes, functions = ARMS[arm]
    cfg, kept = replace(cfg, **changes), {name: getattr(dipddpm, name) for name in functions}
    held = len(train.pixels) // 10
    pixels, n = train.pixels[:-held], min(n, held)
    try:
        vars(dipddpm).update(functions)
        net, losses, seconds = trained(cfg, pixels)
    finally:
        vars(dipddpm).update(kept)
    judge = measure.Judge(train, pixels, train._replace(
        pixels=train.pixels[-held:], labels=train.labels[-held:]), n, [folder])
    row = {"arm": arm, "seed": cfg.seed, "data": train.name, "images": len(pixels),
           "epochs": cfg.epochs, "losses": losses, "seconds": seconds}
    numbers = torch.arange(n)
    x = dipddpm.noise_start(cfg, (n, *pixels.shape[1:]), numbers)
    for nfe in 10, 20:
        found = judge(dipddpm.sample(cfg, net, x, cfg.timesteps, nfe, 0.0, numbers))
        row |= {f"{key} at {nfe}": found[key] for key in ("fid_lenet", "recall")}
    return row


def step_times(rounds=15):
    """Median milliseconds of the parts of a training step of 64 digits, in turns, and of a matrix
    product of as many operations as its convolutions have."""
    cfg = dipddpm.Config(mode="ddpm")
    net, lr = dipddpm.make_unet(cfg, 1, "cpu"), torch.tensor(1e-6)
    ema, optimizers = copy.deepcopy(net).requires_grad_(False), dipddpm.optimizers_of(net, lr)
    pixels, numbers = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64)
    x_t, t, table = torch.randn(64, 1, 28, 28), torch.arange(64) * 15, dipddpm.forward_table(cfg)
    shapes, step = [], torch.tensor(0)

    def watch(layer, args, out):
        shapes.append((layer, args[0].detach(), torch.randn_like(out)))
    hooks = [layer.register_forward_hook(watch) for layer in net.modules()
             if isinstance(layer, torch.nn.Conv2d)]
    net(x_t, t)
    for hook in hooks:
        hook.remove()
    macs = sum(out.numel() * layer.weight[0].numel() for layer, _, out in shapes)

    def network():
        net.zero_grad()
        net(x_t, t).sum().backward()

    def convolutions():
        for i, (layer, x, slope) in enumerate(shapes):
            out = F.conv2d(x.requires_grad_(i > 0), layer.weight, layer.bias, layer.stride,
                           layer.padding)
            torch.autograd.grad(out, [layer.weight, layer.bias] + [x] * (i > 0), slope)

    a, b = torch.randn(2, 512, 512)
    parts = {"network, forward and backward": network, "its convolutions alone": convolutions,
             "matrix products of as many operations": lambda: [
                 a @ b for _ in range(round(3 * macs / 512**3))],
             "noise, drawn twice, and loss": lambda: [
                 f(*where, pixels, None, t, table, 0, numbers, step) for f, where in
                 ((kernels.q_sample, ()), (kernels.noise_loss, (x_t,)))],
             "Muon": optimizers[0].step, "AdamW": optimizers[1].step,
             "average": lambda: dipddpm.update_average(ema, net, step)}
    seconds = {name: [] for name in parts}
    for name, part in [*parts.items()] * (rounds + 2):
        began = time.perf_counter()
        part()
        seconds[name].append(time.perf_counter() - began)
    print(f"{6 * macs / 1e9:.1f} GFLOP in the convolutions of a step")
    for name, taken in seconds.items():
        print(f"{name:<40}{statistics.median(taken[2:]) * 1e3:8.2f} ms")


def main(argv=None):
    p = dipddpm.OneLineParser(prog="studies.recipe", description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path)
    p.add_argument("--data", default="mnist")
    p.add_argument("--limit", type=int)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--seeds", type=dipddpm.listed(int), default=(0,))
    p.add_argument("--arms", type=some_of(ARMS), default=tuple(ARMS))
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    dipddpm.keep_freed_memory()
    if args.out is None:
        return step_times()
    try:
        train = data.load(args.data, split="train", limit=args.limit)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    for seed, arm in itertools.product(args.seeds, args.arms):
        path = args.out / f"{arm}-{seed}.json"
        if not path.exists():
            cfg = dipddpm.Config(mode="ddpm", data=args.data, epochs=args.epochs, seed=seed)
            measure.write_json(measured(cfg, arm, train, args.out), path)
        row = json.loads(path.read_text())
        images = len(train.pixels) - len(train.pixels) // 10
        if (row["data"], row["images"], row["epochs"]) != (train.name, images, args.epochs):
            p.error(f"{path} is of {row['epochs']} epochs of {row['images']} images of "
                     f"{row['data']}: name another --out")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
