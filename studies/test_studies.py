"""Properties of the studies: networks, restoration, arms, reports."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels imports Triton

import data
import dipddpm
import eval as measures
import kernels
from studies import arms, networks, reports, restore


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Drawing 12,000 takes half a minute; of fewer each is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DIGITS", {"train": 1000, "test": 1000})
        yield


def config(shape=(1, 8, 8), **changes):
    """A Config for images of a shape [C, H, W], with nothing left open."""
    cfg = dipddpm.Config(**{"mode": "prior", "data": "digits"} | changes)
    return dipddpm.resolve(cfg, (1000, *shape))


def tiny_images(n=64):
    """Uint8 [n, 1, 8, 8]: dark with one bright quarter."""
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i in range(n):
        x[i, 0, 4 * (i % 2):4 * (i % 2) + 4, 4 * (i // 2 % 2):4 * (i // 2 % 2) + 4] = 255
    return x


def random_images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def run_main(main, argv, capsys):
    """main(argv) -> (exit status, standard output, standard error)."""
    try:
        status = main([str(a) for a in argv]) or 0
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


# ================================================================== networks

ARCHS = ("conv2", "autoencoder", "resnet18")


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 96)])
@pytest.mark.parametrize("arch", [*ARCHS, "skip"])
def test_network_dips_keep_the_size_of_an_image(arch, size):
    f = dipddpm.ARCHS[arch](networks.Single(), 3, 3, *size, 8).eval()
    assert f(torch.rand(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("arch", ARCHS)
def test_batched_dips_of_every_network_equal_separate_fits(arch):
    # In float64: Adam divides by the gradient's size, so rounding grows by itself in float32.
    y = tiny_images(4).double() / 255
    if arch == "resnet18":  # which narrows what is smaller to one pixel
        y = y.repeat(1, 1, 5, 5)[..., :36, :33]
    cfg, numbers = config(y.shape[1:], dip_width=4, arch=arch), torch.tensor([0, 1, 2, 17])
    known = dipddpm.exact(y)
    together = dipddpm.fit_dips(cfg, known, numbers, 5)
    for k in range(4):
        alone = dipddpm.fit_dips(cfg, known.part(slice(k, k + 1)), numbers[k:k + 1], 5)
        torch.testing.assert_close(together[k:k + 1], alone, rtol=1e-6, atol=1e-8)


def test_resnet18_has_the_papers_parameters_and_needs_more_than_one_pixel():
    encoder = networks.ResNet18(networks.Single(), 3, 3, 32, 32, 64)
    count = sum(p.numel() for part in (encoder.enter, encoder.blocks) for p in part.parameters())
    # 11,689,512 of the published one, without its classifier; its convolutions have no biases
    biases = sum(m.bias.numel() for part in (encoder.enter, encoder.blocks) for m in part.modules()
                 if isinstance(m, torch.nn.Conv2d))
    assert count - biases == 11_689_512 - 513_000
    with pytest.raises(ValueError, match="resnet18 makes one pixel of 28x32"):
        networks.ResNet18(dipddpm.Grouped(torch.arange(2), 0), 3, 3, 32, 28, 4)


def test_transposed_layers_start_as_pytorchs_do():
    numbers = torch.arange(200)
    grouped = networks.up(dipddpm.Grouped(numbers, 0), 3, 5, 4, 2)
    torch.manual_seed(0)
    single = [networks.up(networks.Single(), 3, 5, 4, 2) for _ in numbers]
    for name in "weight", "bias":
        ours = getattr(grouped, name)
        theirs = torch.cat([getattr(one, name) for one in single])
        assert ours.shape == theirs.shape
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def same(x, layer):
    """A 3x3 convolution with a border of zeros."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias)


def test_the_small_networks_are_their_layers():
    x = torch.randn(2, 3, 32, 40)
    two = networks.conv2(networks.Single(), 3, 3, 32, 40, 5)
    torch.testing.assert_close(two(x), same(F.relu(same(x, two[0])), two[2]).sigmoid())
    four = networks.autoencoder(networks.Single(), 3, 3, 32, 40, 5)
    h = x
    for k in (0, 2, 4, 6):
        h = same(h, four[k])
        h = h.relu() if k < 6 else h.tanh()
    torch.testing.assert_close(four(x), h)


def test_resnet18_is_its_layers():
    x = torch.randn(2, 3, 32, 40)
    alone = networks.ResNet18(dipddpm.Grouped(torch.arange(1), 0), 3, 3, 33, 33, 1)
    assert alone.last(torch.zeros(1, 1, 64, 64)).shape == (1, 3, 64, 64)
    net = networks.ResNet18(networks.Single(), 3, 3, 32, 40, 4)
    h = net.enter(x)
    shapes = [net.enter[0](x).shape[1:], h.shape[1:], net.blocks(h).shape[1:]]
    assert shapes == [(4, 16, 20), (4, 8, 10), (32, 1, 2)]

    def unit(x, conv, size):  # training's: by the mean and deviation of the batch
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding=size // 2)
        return F.batch_norm(x, None, None, training=True)

    for block, enters in zip(net.blocks[:3], (h, net.blocks[0](h), net.blocks[:2](h))):
        inner = unit(unit(enters, block.conv1, 3).relu(), block.conv2, 3)
        beside = enters if block is not net.blocks[2] else unit(enters, block.shortcut[0], 1)
        torch.testing.assert_close(block(enters), (beside + inner).relu(), rtol=1e-4, atol=1e-5)
    h = net.blocks(h)
    for layer, width in zip(net.ups, (16, 8, 4, 4, 4)):
        h = layer(h)
        assert h.shape[1] == width
    assert h.shape[2:] == (32, 64) and net.last(h).shape == (2, 3, 32, 64)
    torch.testing.assert_close(net(x), net.last(h).sigmoid()[..., :32, :40])


def test_a_network_dip_sees_pixels_in_0_to_1_and_answers_in_minus_1_to_1(monkeypatch):
    x, seen = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), []

    class Copies(torch.nn.Conv2d):
        def forward(self, x):
            seen.append(x)
            return x + 0 * self.weight.sum()

    monkeypatch.setitem(dipddpm.ARCHS, "copies", lambda make, *_: Copies(1, 1, 1))
    prior = networks.prior_dip_network(config(batch=1), x, x, arch="copies", iters=1)
    torch.testing.assert_close(prior.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert len(seen) == 2 and all(torch.equal(s, x / 255) for s in seen)


@pytest.mark.parametrize("arch", [*ARCHS, "skip"])
def test_a_network_dip_learns_its_data_set_and_is_a_function_of_the_seed(arch):
    cfg, x, size = config(batch=16), tiny_images(64), dict(arch=arch, width=8)
    prior = networks.prior_dip_network(cfg, x, x, iters=200, **size)
    assert torch.equal(prior, networks.prior_dip_network(cfg, x, x, iters=200, **size))
    start = networks.prior_dip_network(cfg, x, x, iters=1, **size)
    real = x / 127.5 - 1
    assert prior.abs().max() <= 1
    assert (prior - real).square().mean() < 0.8 * (start - real).square().mean()


# ================================================================== restoration


def measured(task, n=3, sigma=0.0, size=8):
    """Drawn images and what a restoration of them knows."""
    images = data.load("digits", limit=n).pixels if size == 28 else tiny_images(n)
    truth = images.float() / 255
    return truth, corrupted(truth, task, sigma)


def corrupted(truth, task="denoise", sigma=0.0, cfg=None):
    return dipddpm.corrupt(cfg or config(), task, truth, sigma, torch.arange(len(truth)))


@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_what_is_known_exactly_is_kept_and_what_is_not_is_left(task):
    x, known = measured(task)
    x0_hat = random_images(3, 1, 8, 8) * 2 - 1
    corrected = restore.consistent(known, x0_hat)
    torch.testing.assert_close(known.A((corrected + 1) / 2), known.y)
    change = corrected - x0_hat  # lies in A's range: nothing else moves
    torch.testing.assert_close(known.back(known.A(change)), change)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("taus", [(700, 500), (300, 100), (60, 0)])
@pytest.mark.parametrize("task", ["denoise", "inpaint"])
def test_a_step_from_a_noisy_y_leaves_no_more_noise_than_its_level(task, taus, eta):
    truth, cfg = torch.full((400, 1, 8, 8), 0.7), config()
    known = corrupted(truth, task, 0.25)
    ab_t, ab_s = (torch.tensor(dipddpm.schedule_of(cfg).at(tau)) for tau in taus)
    sigma = dipddpm.reverse_table(cfg, taus, eta)[0, 4]
    eps, z = (kernels.normal(truth.shape, 5, torch.arange(400), draw, 0) for draw in (0, 1))
    x_0 = truth * 2 - 1
    x_t = ab_t.sqrt() * x_0 + (1 - ab_t).sqrt() * eps
    x_s = restore.noisy_step(known, x_t, x_0, ab_t, ab_s, sigma, z)  # with a perfect x0_hat
    assert (x_s - ab_s.sqrt() * x_0).mean().abs() < 0.02
    noise = (x_s - ab_s.sqrt() * x_0).square().mean()
    assert noise.item() == pytest.approx(1 - ab_s.item(), rel=0.03, abs=1e-6)


def test_a_step_takes_all_of_a_y_whose_noise_is_less_than_its_own():
    x_0, y, z = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.9), torch.ones(1, 1, 2, 2)
    known = dipddpm.Measurement("denoise", y, torch.ones_like(y), 0.1)
    ab_t, ab_s, sigma = torch.tensor([0.3, 0.5, 0.2])
    x_t = ab_t.sqrt() * x_0 + (1 - ab_t).sqrt() * 2
    x_s = restore.noisy_step(known, x_t, x_0, ab_t, ab_s, sigma, z)
    left = 1 - 0.5 - 0.5 * 0.2**2  # of x_s's noise, when y has brought its own: twice 0.1, scaled
    torch.testing.assert_close(x_s, torch.full_like(
        x_s, 0.5**0.5 * 0.8 + (left - 0.2**2) ** 0.5 * 2 + 0.2))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("task", dipddpm.TASKS)
def test_a_restored_image_agrees_with_what_was_measured(task, eta):
    truth, known = measured(task)
    cfg, numbers = config(timesteps=40, width=8), torch.arange(3)
    net = dipddpm.make_unet(cfg, 1, "cpu").eval()
    x_init = kernels.normal((3, 1, 8, 8), 0, numbers, 0, kernels.INIT_NOISE)
    x = restore.restored(cfg, net, x_init, 40, 5, eta, numbers, known)
    torch.testing.assert_close(known.A((x + 1) / 2), known.y)


def test_a_restoring_step_takes_the_known_image_and_the_networks_noise():
    truth, known = measured("inpaint")
    cfg, numbers, asked = config(timesteps=40, predict="x0"), torch.arange(3), []
    x_t = kernels.normal((3, 1, 8, 8), 0, numbers, 0, kernels.INIT_NOISE)

    def net(x, t):
        asked.append(x.clone())
        return 0.3 * x

    restore.restored(cfg, net, x_t, 40, 2, 0.0, numbers, known)
    x0_hat = (0.3 * x_t).clamp(-1, 1)
    ab_t, ab_s = (dipddpm.schedule_of(cfg).at(tau) for tau in (40, 20))
    eps_hat = (x_t - ab_t**0.5 * x0_hat) / (1 - ab_t) ** 0.5
    x_s = ab_s**0.5 * restore.consistent(known, x0_hat) + (1 - ab_s) ** 0.5 * eps_hat
    assert torch.equal(asked[0], x_t)
    torch.testing.assert_close(asked[1], x_s.float(), rtol=1e-4, atol=1e-4)


def test_with_nothing_known_a_restoration_is_a_sample():
    cfg, numbers = config(timesteps=40, width=8), torch.arange(3)
    net = dipddpm.make_unet(cfg, 1, "cpu").eval()
    torch.nn.init.normal_(net.leave.weight, std=0.1)
    x_init = kernels.normal((3, 1, 8, 8), 0, numbers, 0, kernels.INIT_NOISE)
    nothing = torch.zeros(3, 1, 8, 8)
    known = dipddpm.Measurement("inpaint", nothing, nothing, 0.0)
    for eta in (0.0, 1.0):
        settings = cfg, net, x_init, 40, 6, eta, numbers
        torch.testing.assert_close(restore.restored(*settings, known), dipddpm.sample(*settings),
                                   rtol=1e-4, atol=1e-5)


def test_a_restoring_step_clips_as_others_do():
    cfg, numbers = config((1, 6, 6), timesteps=20, predict="x0"), torch.arange(2)
    known = corrupted(torch.full((2, 1, 6, 6), 0.5), "inpaint")
    for level, expected in (5.0, 1.0), (-5.0, -1.0):
        x = restore.restored(cfg, lambda x_t, t, level=level: torch.full_like(x_t, level),
                             torch.zeros(2, 1, 6, 6), 20, 4, 0.0, numbers, known)
        torch.testing.assert_close(x, torch.where(known.mask == 1, 0.0, expected))


def test_a_noisy_image_starts_at_the_step_whose_noise_it_has():
    truth, cfg = torch.full((2, 1, 40, 40), 0.75), config()
    for sigma in (0.05, 0.2, 1.0):
        x_t, t_start = restore.start_from_noisy(cfg, corrupted(truth, sigma=sigma))
        ab = dipddpm.schedule_of(cfg).at(t_start)  # x_t = sqrt(ab) 0.5 + ...
        assert x_t.mean() == pytest.approx(0.5 * ab**0.5, abs=0.05)
        assert x_t.std() == pytest.approx((1 - ab)**0.5, rel=0.06)
    cfg = config(timesteps=10)
    for t in range(1, 10):  # y's noise is sigma, that of 2 y - 1 twice it
        ab = dipddpm.schedule_of(cfg).at(t)
        known = corrupted(truth, sigma=(1 / ab - 1) ** 0.5 / 2)
        assert restore.start_from_noisy(cfg, known)[1] == t


# ---- a stop by a held-out tenth


def held_out(known, n):
    """Where u < 0.1, which the fit must not see: bool, of y's size."""
    u = kernels.uniform((n, 1, *known.y.shape[2:]), 0, torch.arange(n), dipddpm.HELD_DRAW,
                        kernels.CORRUPTION)
    return u < 0.1


def test_what_a_fit_is_not_shown_does_not_move_it():
    cfg, numbers = config(dip_width=4), torch.arange(3)
    truth, known = measured("inpaint", sigma=0.2)
    held = held_out(known, 3)
    for iters in (2, 10):  # one look: there is nothing to choose
        fits = [restore.fit_held_out(cfg, known._replace(y=y), numbers, iters)
                for y in (known.y, torch.where(held, 9.0, known.y), known.y + 0.1)]
        assert torch.equal(fits[0], fits[1]) and not torch.equal(fits[0], fits[2])


def test_a_held_out_stop_takes_the_look_that_is_nearest_to_what_it_was_not_shown(monkeypatch):
    truth, numbers, looks = random_images(4, 3, 8, 8), torch.arange(4), {}
    cfg, known = config((3, 8, 8), mode="dip", dip_width=8), corrupted(truth, sigma=0.5)
    iterate = dipddpm.DIPGroup.iterate

    def watched(group, i, *args):
        seen = iterate(group, i, *args)
        looks[i + 1] = group.average.clone()
        return seen

    monkeypatch.setattr(dipddpm.DIPGroup, "iterate", watched)
    x = restore.fit_held_out(cfg, known, numbers, 95)
    times = [*range(10, 100, 10), 95]
    risks = torch.stack([((looks[i] - known.y).square() * held_out(known, 4)).sum((1, 2, 3))
                         for i in times])
    chosen = [times[k] for k in risks.argmin(0)]
    assert min(chosen) < 95  # at this noise some are best before the end
    assert all(torch.equal(x[k], looks[i][k]) for k, i in enumerate(chosen))


def test_a_held_out_stop_is_nearer_to_the_truth_than_the_end():
    truth, known = measured("denoise", n=4, sigma=0.3, size=28)
    cfg, numbers, curve = config((1, 28, 28), dip_width=8), torch.arange(4), []
    stopped = restore.fit_held_out(cfg, known, numbers, 400)
    ended = dipddpm.fit_dips(cfg, known, numbers, 400,
                             look=lambda i, _, now: curve.append(measures.psnr(now, truth)))
    oracle = torch.stack(curve).max(0).values.mean()
    assert measures.psnr(stopped, truth).mean() > measures.psnr(ended, truth).mean() + 0.5
    # over seeds it ends 1.7 +- 0.3 dB above the end and 1.5 +- 0.3 dB below the best moment: it
    # sees a tenth less
    assert measures.psnr(stopped, truth).mean() > oracle - 2.5


# ---- the arms


@pytest.mark.parametrize("task, sigma", [("denoise", 0.2), ("inpaint", 0.0), ("sr", 0.1)])
def test_a_restorations_arms_start_where_they_say(task, sigma):
    truth, numbers = random_images(5, 1, 8, 8), torch.arange(5)
    cfg, known = config(timesteps=100, t_start=(30, 60)), corrupted(truth, task, sigma)
    prior = random_images(5, 1, 8, 8, seed=1)
    found = {(arm, t): (x, seconds) for arm, x, t, seconds in
             restore.starts(cfg, known, {"dip-images": (prior, 2.0)}, numbers)}
    expected = {("ddpm", 100): kernels.normal(truth.shape, 0, numbers, 0, kernels.INIT_NOISE),
                ("dip-images", 30): dipddpm.start_from_prior(cfg, prior * 2 - 1, 30, numbers),
                ("dip-images", 60): dipddpm.start_from_prior(cfg, prior * 2 - 1, 60, numbers)}
    if task == "denoise":
        x, t = restore.start_from_noisy(cfg, known)
        expected["ddpm-y", t] = x
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key][0], x) for key, x in expected.items())
    assert all(s == (2.0 if arm == "dip-images" else 0) for (arm, _), (_, s) in found.items())
