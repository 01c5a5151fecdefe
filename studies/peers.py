"""What a training step, a step of the sampler, an iteration of a DIP and the early stop cost here
and in other people's code, in one process, in turns. Networks are those of each project's own
example for 28x28 grey images, and once more this project's network with their code around it.
Nothing is trained to the end: this compares speed, not quality.

    pip install diffusers==0.42.1 denoising-diffusion-pytorch==2.3.4 smalldiffusion==0.5.0
    git clone https://github.com/bot66/MNISTDiffusion
    git clone https://github.com/DmitryUlyanov/deep-image-prior
    python -m studies.peers MNISTDiffusion deep-image-prior
"""

import contextlib
import io
import statistics
import sys
import time
from unittest.mock import MagicMock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F

import dipddpm
from studies.arms import WindowedVariance

for name in ("", ".transforms", ".utils", ".models"):  # the next two import it, but not for this
    sys.modules.setdefault("torchvision" + name, MagicMock())
sys.path += sys.argv[1:3]

import denoising_diffusion_pytorch as lucidrains  # noqa: E402
import smalldiffusion  # noqa: E402
from model import MNISTDiffusion  # noqa: E402

B, N, NFE = 128, 128, 3  # images in a training step, images sampled, network evaluations of each
ROUNDS = 5
x_0 = torch.rand(B, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


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


def stepper(net, loss):
    """A training step as their examples have it, with AdamW and a clipped gradient."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return step


def dipddpm_pair():
    """-> network, training step, sampler; so for the others. This one averages its weights too."""
    cfg, net = dipddpm.Config(mode="ddpm", epochs=10**6, batch=B), unet()
    pixels = ((x_0 + 1) * 127.5).to(torch.uint8)
    optimizers = dipddpm.optimizers_of(net, torch.tensor(1e-3))
    training = dipddpm.train_steps(cfg, pixels, net, unet().requires_grad_(False), optimizers)
    start = torch.randn(N, 1, 28, 28)
    return net, lambda: next(training), lambda: dipddpm.sample(cfg, net, start, 1000, NFE, 0.0,
                                                               torch.arange(N))


def diffusers_pair(net, call):
    noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    solver = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2")

    def loss():
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (B,))
        return F.mse_loss(call(noising.add_noise(x_0, eps, t), t), eps)

    @torch.no_grad()
    def sample():
        x = torch.randn(N, 1, 28, 28)
        solver.set_timesteps(NFE)
        for t in solver.timesteps:
            x = solver.step(call(x, t), t, x).prev_sample
    return net, stepper(net, loss), sample


def diffusers_unet():
    return diffusers.UNet2DModel(  # of Hugging Face's course on diffusion, unit 1, on MNIST
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))


def lucidrains_pair(net):
    diffusion = lucidrains.GaussianDiffusion(net, image_size=28, sampling_timesteps=NFE)

    def sample():
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            diffusion.sample(N)
    return net, stepper(net, lambda: diffusion((x_0 + 1) / 2)), sample


def smalldiffusion_pair():
    net = smalldiffusion.DiT(in_dim=28, channels=1, patch_size=2, depth=6, head_dim=32, num_heads=6)
    schedule = smalldiffusion.ScheduleDDPM()

    def loss():
        x, sigma, eps, _ = smalldiffusion.generate_train_sample(x_0, schedule)
        return net.get_loss(x, sigma, eps)
    return net, stepper(net, loss), lambda: list(smalldiffusion.samples(
        net, schedule.sample_sigmas(NFE), gam=1.6, batchsize=N))


def mnistdiffusion_pair():
    diffusion = MNISTDiffusion(timesteps=1000, image_size=28, in_channels=1, base_dim=64,
                               dim_mults=[2, 4])

    def loss():
        eps = torch.randn_like(x_0)
        return F.mse_loss(diffusion(x_0, eps), eps)

    def sample():
        x = torch.randn(N, 1, 28, 28)
        for i in range(NFE):
            t = torch.full((N,), 999 - i)
            x = diffusion._reverse_diffusion_with_clip(x, t, torch.randn_like(x))
    return diffusion, stepper(diffusion, loss), sample


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
    sampled = rates({name: sample for name, (_, _, sample) in pairs.items()}, count)
    for name, (net, _, _) in pairs.items():
        size = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"| {name} | {size:,} | {trained[name] * B:.0f} | {sampled[name] * N * NFE:.0f} |",
              flush=True)


def main():
    dipddpm.keep_freed_memory()  # here for all
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    print("| | parameters | images/s in training | evaluations/s in sampling |\n"
          "|---|---:|---:|---:|")
    networks({"dipddpm": dipddpm_pair(),
              "its network in diffusers": (lambda net: diffusers_pair(net, net))(Ours()),
              "its network in lucidrains": lucidrains_pair(Ours())}, 8)
    networks({"diffusers": (lambda net: diffusers_pair(net, lambda x, t: net(x, t).sample))(
                  diffusers_unet()),
              "lucidrains": lucidrains_pair(lucidrains.Unet(dim=64, channels=1,
                                                            dim_mults=(1, 2, 4))),
              "smalldiffusion": smalldiffusion_pair(),
              "MNISTDiffusion": mnistdiffusion_pair()}, 1)
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
