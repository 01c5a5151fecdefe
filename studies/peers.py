"""This project beside other people's code. What a training step, a step of the sampler, an
iteration of a DIP and the early stop cost, in one process, in turns; and what a training of so many
minutes is worth. Networks are those of each project's own example for 28x28 grey images, and for
speed once more this project's network with their code around it.

    pip install diffusers==0.42.1 denoising-diffusion-pytorch==2.3.4 smalldiffusion==0.5.0
    git clone https://github.com/bot66/MNISTDiffusion
    git clone https://github.com/DmitryUlyanov/deep-image-prior
    python -m studies.peers MNISTDiffusion deep-image-prior
    python -m studies.peers MNISTDiffusion - --train diffusers --minutes 10,30 --seed 0 --out FOLDER
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import data
import dipddpm
import eval as measure
from studies.arms import WindowedVariance
from studies.recipe import trained

for name in ("", ".transforms", ".utils", ".models"):  # the next two import it, but not for this
    sys.modules.setdefault("torchvision" + name, MagicMock())
sys.path += sys.argv[1:3]

import denoising_diffusion_pytorch as lucidrains  # noqa: E402
import smalldiffusion  # noqa: E402
from model import MNISTDiffusion  # noqa: E402

B, N, NFE = 128, 128, 3  # images in a training step, images sampled, network evaluations of each
ROUNDS = 5
x_0 = torch.rand(B, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Peer(NamedTuple):
    """A network, its loss of images in [-1, 1], its sampler (n images, nfe evaluations -> images in
    [-1, 1]), and how its example trains it: images in a step, Adam's rate, the decay of an average
    of the weights in the n-th of its updates, how many steps lie between these, whether the rate
    goes up and down once (OneCycleLR)."""

    net: torch.nn.Module
    loss: object
    sample: object
    batch: int = 128
    lr: float = 1e-3
    decay: object = lambda n: 0.0
    every: int = 1
    cycle: bool = False


class Ours(torch.nn.Module):
    """This project's U-Net with what diffusers and lucidrains ask of a network."""

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self):
        super().__init__()
        self.unet = unet()

    def forward(self, x, t, *_):
        return self.unet(x, t.expand(len(x)))


def unet():
    return dipddpm.make_unet(dipddpm.Config(mode="ddpm"), 1, "cpu")


def stepper(peer):
    """A training step as their examples have it, with AdamW and a clipped gradient."""
    optimizer = torch.optim.AdamW(peer.net.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        peer.loss(x_0).backward()
        torch.nn.utils.clip_grad_norm_(peer.net.parameters(), 1.0)
        optimizer.step()
    return step


def dipddpm_pair():
    """-> network, training step, sampler. This one averages its weights too."""
    cfg, net = dipddpm.Config(mode="ddpm", epochs=10**6, batch=B), unet()
    pixels = ((x_0 + 1) * 127.5).to(torch.uint8)
    optimizers = dipddpm.optimizers_of(net, torch.tensor(1e-3))
    training = dipddpm.train_steps(cfg, pixels, net, unet().requires_grad_(False), optimizers)
    start = torch.randn(N, 1, 28, 28)
    return net, lambda: next(training), lambda: dipddpm.sample(cfg, net, start, 1000, NFE, 0.0,
                                                               torch.arange(N))


def solved(call, n, nfe):
    """n images by diffusers' DPM-Solver++."""
    solver = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2")
    solver.set_timesteps(nfe)
    x = torch.randn(n, 1, 28, 28)
    for t in solver.timesteps:
        x = solver.step(call(x, t), t, x).prev_sample
    return x


def diffusers_peer(net=None):
    """Of Hugging Face's course on diffusion, unit 1, on MNIST."""
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    if net is None:
        net = diffusers.UNet2DModel(
            sample_size=28, in_channels=1, out_channels=1, layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

    def call(x, t):
        out = net(x, t)
        return out if isinstance(out, torch.Tensor) else out.sample

    def loss(x_0):
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
        return F.mse_loss(call(noising.add_noise(x_0, eps, t), t), eps)
    return Peer(net, loss, lambda n, nfe: solved(call, n, nfe))


def lucidrains_peer(net=None):
    """Its Trainer's settings, but for a batch of 32 without accumulation."""
    net = net or lucidrains.Unet(dim=64, channels=1, dim_mults=(1, 2, 4))
    diffusion = lucidrains.GaussianDiffusion(net, image_size=28)

    def sample(n, nfe):
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = nfe, True
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            return diffusion.sample(n) * 2 - 1
    return Peer(net, lambda x_0: diffusion((x_0 + 1) / 2), sample, batch=32, lr=1e-4,
                decay=lambda n: 0.995 if n > 10 else 0.0, every=10)


def smalldiffusion_peer():
    """Its examples/fashion_mnist_dit.py, but for the flips and for 128 images in a step instead of
    1,024, which would be ten steps here and need 14 GB."""
    net = smalldiffusion.DiT(in_dim=28, channels=1, patch_size=2, depth=6, head_dim=32, num_heads=6)
    schedule = smalldiffusion.ScheduleDDPM()

    def loss(x_0):
        x, sigma, eps, _ = smalldiffusion.generate_train_sample(x_0, schedule)
        return net.get_loss(x, sigma, eps)
    return Peer(net, loss, lambda n, nfe: list(smalldiffusion.samples(
        net, schedule.sample_sigmas(nfe), gam=1.6, batchsize=n))[-1],
        decay=lambda n: min(0.99, (1 + n) / (10 + n)))


def mnistdiffusion_peer():
    """Its own sampler has 1,000 steps: pictures are made by diffusers' solver."""
    diffusion = MNISTDiffusion(timesteps=1000, image_size=28, in_channels=1, base_dim=64,
                               dim_mults=[2, 4])

    def loss(x_0):
        eps = torch.randn_like(x_0)
        return F.mse_loss(diffusion(x_0, eps), eps)
    return Peer(diffusion, loss, lambda n, nfe: solved(
        lambda x, t: diffusion.model(x, t.expand(len(x))), n, nfe),
        decay=lambda n: 1 - 0.005 * 128 * 10 / 100, every=10, cycle=True)


PEERS = {"diffusers": diffusers_peer, "lucidrains": lucidrains_peer,
         "smalldiffusion": smalldiffusion_peer, "MNISTDiffusion": mnistdiffusion_peer}


def train_peer(peer, pixels, minutes):
    """Train for minutes[-1] of this core; whenever so many have passed, yield the network with its
    averaged weights, steps, seconds. What happens to it between two of these is not counted, but
    draws from the same stream of random numbers."""
    optimizer = torch.optim.AdamW(peer.net.parameters(), peer.lr)
    average = AveragedModel(peer.net, use_buffers=True, avg_fn=lambda kept, now, n: (
        kept.lerp(now, 1 - peer.decay(int(n))) if now.is_floating_point() else now))
    rate, steps, used, points = None, 0, 0.0, list(minutes)
    while points:
        began = time.process_time()
        if peer.cycle and steps >= 5:
            rate = rate or torch.optim.lr_scheduler.OneCycleLR(
                optimizer, peer.lr, total_steps=10**6, pct_start=0.25)
            rate.step(min(1.0, used / 60 / minutes[-1]) * (10**6 - 2))
        x_0 = pixels[torch.randint(len(pixels), (peer.batch,))].float() / 127.5 - 1
        optimizer.zero_grad()
        peer.loss(x_0).backward()
        optimizer.step()
        if steps % peer.every == 0:
            average.update_parameters(peer.net)
        steps, used = steps + 1, used + time.process_time() - began
        if used >= 60 * points[0]:
            kept = {name: value.clone() for name, value in peer.net.state_dict().items()}
            peer.net.load_state_dict(average.module.state_dict())
            yield points.pop(0), steps, used
            peer.net.train().load_state_dict(kept)


def quality(args):
    """Write what a training is worth: fid_lenet and others of 1,000 images against the test split,
    at each number of evaluations."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, test = (data.load(args.data, split=split) for split in ("train", "test"))
    judge = measure.Judge(train, train.pixels, test, 1000, [args.out, data.cache_root()])
    args.out.mkdir(parents=True, exist_ok=True)
    if args.train == "dipddpm":
        cfg, numbers = dipddpm.Config(mode="ddpm", seed=args.seed), torch.arange(1000)
        start = dipddpm.noise_start(cfg, (1000, 1, 28, 28), numbers)

        def points():
            nonlocal net, cfg
            for epochs in args.epochs:
                cfg = dataclasses.replace(cfg, epochs=epochs)
                net, _, seconds = trained(cfg, train.pixels)
                yield epochs, epochs * (len(train.pixels) // cfg.batch), seconds
        net, sample = None, lambda nfe: dipddpm.sample(cfg, net, start, 1000, nfe, 0.0, numbers)
    else:
        peer = PEERS[args.train]()
        net, sample = peer.net, lambda nfe: torch.cat([peer.sample(100, nfe) for _ in range(10)])
        points = lambda: train_peer(peer, train.pixels, args.minutes)  # noqa: E731
    for point, steps, seconds in points():
        row = {"peer": args.train, "seed": args.seed, "steps": steps, "seconds": seconds}
        row |= ({"epochs": point} if args.train == "dipddpm"
                else {"minutes": point, "of": args.minutes[-1]})
        net.eval()
        for nfe in args.nfe:
            began = time.process_time()
            with torch.no_grad():
                x = sample(nfe).clamp(-1, 1)
            row[f"sampling seconds at {nfe}"] = time.process_time() - began
            row |= {f"{key} at {nfe}": value for key, value in judge(x).items()}
            name = f"{args.train}-{point:g}of{row.get('of', point):g}-{args.seed}"
            measure.write_json(row, args.out / f"{name}.json")
            measure.draw(args.out / f"{name}-nfe{nfe}.png", name, {name: (x[:16] + 1) / 2})
        print(row, flush=True)


def dip_pair(K, C, size, width):
    """An iteration of K DIPs here, as one group, and of their `skip`, one image at a time."""
    from models.skip import skip

    scales = min(5, max(1, size.bit_length() - 3))
    cfg = dipddpm.Config(mode="dip", dip_width=width, window=0.99, dip_lr=0.01)
    y = torch.rand(K, C, size, size)
    group = dipddpm.DIPGroup(cfg, torch.arange(K), C, size, size)
    Cz = min(width, 32)
    z, jitter = 0.1 * torch.rand(1, Cz, size, size), torch.zeros(1, Cz, size, size)
    net = skip(Cz, C, [width] * scales, [width] * scales, [4] * scales, pad="reflection",
               upsample_mode="bilinear", need_sigmoid=True)
    optimizer, average = torch.optim.Adam(net.parameters(), 0.01), torch.zeros(())

    def ours():
        group.iterate(y, torch.ones(()) / y[0].numel(), lambda x: x)

    def theirs():
        nonlocal average
        optimizer.zero_grad()
        out = net(z + jitter.normal_() / 30)
        average = average * 0.99 + out.detach() * 0.01
        F.mse_loss(out, y[:1]).backward()
        optimizer.step()
    return ours, theirs


def stop_pair(C, size, W):
    """What ES-WMV adds to an iteration: sums that are kept, and as sun-umn/Early_Stopping_for_DIP
    has it, the mean of the window and each output's distance from it, afresh each time."""
    stop, kept, x = WindowedVariance(W, 10**6), [], torch.rand(1, C, size, size)
    count = [0]

    def ours():
        stop(count[0], x, x)
        count[0] += 1

    def theirs():
        kept.append(x.numpy().reshape(-1))
        if len(kept) > W:
            kept.pop(0)
        mean = np.mean(kept, axis=0)
        np.mean([((mean - image) ** 2).sum() / image.size for image in kept])
    for _ in range(W):
        ours(), theirs()
    return ours, theirs


def rates(sides, count):
    """{name: calls a second}, the median of as many rounds, the sides in turns."""
    seconds = {name: [] for name in sides}
    for work in sides.values():
        work()
    for _ in range(ROUNDS):
        for name, work in sides.items():
            began = time.perf_counter()
            for _ in range(count):
                work()
            seconds[name].append((time.perf_counter() - began) / count)
    return {name: 1 / statistics.median(s) for name, s in seconds.items()}


def networks(pairs, count):
    """Rows of a table: name, parameters, images a second in training, evaluations in sampling."""
    trained = rates({name: step for name, (_, step, _) in pairs.items()}, count)
    for net, _, _ in pairs.values():
        net.eval()
    with torch.no_grad():
        sampled = rates({name: sample for name, (_, _, sample) in pairs.items()}, count)
    for name, (net, _, _) in pairs.items():
        size = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"| {name} | {size:,} | {trained[name] * B:.0f} | {sampled[name] * N * NFE:.0f} |",
              flush=True)


def main():
    dipddpm.keep_freed_memory()  # here for all
    p = argparse.ArgumentParser(prog="studies.peers", description=__doc__.splitlines()[0])
    p.add_argument("clones", nargs=2, help="MNISTDiffusion and deep-image-prior, or - for one")
    p.add_argument("--train", choices=("dipddpm", *PEERS), help="train this one for quality")
    p.add_argument("--minutes", type=dipddpm.listed(float), default=(10.0,),
                   help="of one core after which to measure, but for dipddpm; rising")
    p.add_argument("--epochs", type=dipddpm.listed(int), default=(1,),
                   help="of dipddpm, a training each")
    p.add_argument("--nfe", type=dipddpm.listed(int), default=(20,))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data", default="mnist")
    p.add_argument("--out", type=Path, default=Path("runs/peers"))
    args = p.parse_args()
    if list(args.minutes) != sorted(set(args.minutes)):
        p.error("--minutes must rise")
    if args.train:
        return quality(args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    print("| | parameters | images/s in training | evaluations/s in sampling |\n"
          "|---|---:|---:|---:|")
    def pair(peer):
        return peer.net, stepper(peer), lambda: peer.sample(N, NFE)
    networks({"dipddpm": dipddpm_pair(),
              "its network in diffusers": pair(diffusers_peer(Ours())),
              "its network in lucidrains": pair(lucidrains_peer(Ours()))}, 8)
    networks({name: pair(peer()) for name, peer in PEERS.items()}, 1)
    print("\n| | dipddpm | theirs | ratio |\n|---|---:|---:|---:|")
    for label, (ours, theirs), count, K in (
            ("DIP iterations x images/s, 28x28 grey, width 16", dip_pair(64, 1, 28, 16), 5, 64),
            ("the same, 128x128 colour, width 32", dip_pair(1, 3, 128, 32), 5, 1),
            ("ES-WMV/s, 3x256x256, window 100", stop_pair(3, 256, 100), 3, 1)):
        rate = rates({"ours": ours, "theirs": theirs}, count)
        print(f"| {label} | {rate['ours'] * K:.1f} | {rate['theirs']:.1f} | "
              f"{rate['ours'] * K / rate['theirs']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
