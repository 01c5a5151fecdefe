"""Properties of the studies: networks, restoration, arms, reports."""

import json
import math
import os
import signal
import struct
import sys
from pathlib import Path

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
from studies import arms, bridges, networks, photos, recipe, reports, restore


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def small_things(tmp_path_factory):
    """Few digits, which take long to draw, and a LeNet that has learned little, in a cache of this
    module's own: how well things are judged matters to none of its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DIGITS", {"train": 200, "test": 200})
        patch.setattr(measures, "LENET_STEPS", 20)
        patch.setattr(dipddpm, "keep_freed_memory", lambda: None)  # for the whole process
        for name in "XDG_CACHE_HOME", "DIPDDPM_DATA":
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


def config(shape=(1, 8, 8), **changes):
    """A Config for images of a shape [C, H, W], with nothing left open."""
    cfg = dipddpm.Config(**{"mode": "prior", "data": "digits"} | changes)
    return dipddpm.resolve(cfg, (1000, *shape))


def bare_run(folder="."):
    """What the methods need of a Run, without a command line."""
    run = object.__new__(dipddpm.Run)
    run.folder, run.device, run.precision = Path(folder), torch.device("cpu"), "fp32"
    run.stop, run.saved, run.about, run.foretold, run.cfg = 0, {}, {}, False, config()
    run.seconds = dict.fromkeys(("dip", "train", "sample", "eval", "total"), 0.0)
    return run


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
    prior = networks.dip_network(config(batch=1), x, x, arch="copies", iters=1)
    torch.testing.assert_close(prior.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert len(seen) == 2 and all(torch.equal(s, x / 255) for s in seen)


@pytest.mark.parametrize("arch", [*ARCHS, "skip"])
def test_a_network_dip_learns_its_data_set_and_is_a_function_of_the_seed(arch):
    cfg, x, size = config(batch=16), tiny_images(64), dict(arch=arch, width=8)
    prior = networks.dip_network(cfg, x, x, iters=100, **size)
    assert torch.equal(prior, networks.dip_network(cfg, x, x, iters=100, **size))
    start = networks.dip_network(cfg, x, x, iters=1, **size)
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

    def watched(group, *args):
        iterate(group, *args)
        looks[group.steps.item()] = group.average.clone()

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


FAST = ("--data digits --limit 128 --epochs 2 --width 8 --batch 32 --timesteps 40 --samples 8 "
        "--nfe 2,4 --dip-width 4").split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of the method, on few and small things."""
    folder = tmp_path_factory.mktemp("method") / "run"
    dipddpm.main(["--mode", "ddpm", *FAST, "--out", str(folder)])
    return folder


def test_a_restoration_has_a_folder_of_its_own_and_every_arm(trained, tmp_path, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    status, _, err = run_main(restore.main, [
        trained, "--out", tmp_path / "r", "--task", ",".join(dipddpm.TASKS), "--dip-iters", 3,
        "--samples", 5], capsys)
    assert status == 0, err
    assert before == {file: file.read_bytes() for file in trained.iterdir()}
    result = json.loads((tmp_path / "r" / "results.json").read_text())
    assert result["command"].startswith(f"python -m studies.restore {trained} --out")
    for task in dipddpm.TASKS:
        rows = {(r["name"], r.get("nfe")): r for r in result["arms"] if r["task"] == task}
        starts = ["ddpm", "dip-images", "pinv"] + ["ddpm-y"] * (task == "denoise")
        assert rows.keys() == {("corrupted", None), ("dip", None)} | {
            (name, nfe) for name in starts for nfe in (2, 4)}
        fit = rows["dip", None]["seconds"]
        for (name, nfe), row in rows.items():
            if nfe:
                assert row["prior_seconds"] == (fit if name == "dip-images" else 0)
                assert row["seconds"] > row["prior_seconds"]
        [picture] = [p for p in result["pictures"] if p["file"] == f"{task}.png"]
        assert picture["rows"] == ["truth", "corrupted", "dip", *starts]
        assert (tmp_path / "r" / f"{task}.png").exists()
    assert all(f"{task}, sigma" in (tmp_path / "r" / "report.html").read_text()
               for task in dipddpm.TASKS)


@pytest.mark.parametrize("main, flags, said", [
    (restore.main, "RUN --task box", "box is none of denoise, inpaint"),
    (restore.main, "RUN --task sr --size 27", "its network is for images of 1x28x28"),
    (restore.main, "RUN --width 16", "cannot become 16"),
    (restore.main, "RUN --sigma -1", "--sigma must be at least 0"),
    (restore.main, "nowhere", "no run there"),
    (restore.main, "", "the following arguments are required: run"),
    (arms.main, "dip", "invalid choice: 'dip'"),
    (arms.main, "guide --arms best", "best is none of plain, mean"),
    (arms.main, "guide --set windows=2", "--set windows=2: want NAME=VALUE, NAME one of order"),
    (arms.main, "guide --set alpha=two", "--set alpha=two: want NAME=VALUE"),
    (arms.main, "guide --rungs 1", "must be at least 2"),
    (arms.main, "guide --set arch=unet", "--set arch=unet: none of skip, conv2"),
    (arms.main, "prior --data digits --dip-source codes", "smoothed needs --dip-source"),
    (arms.main, "prior --network-width 0", "must be at least 1"),
    (bridges.main, "--out r --arms dip-bridge", "dip-bridge: want ARM:EPOCHS"),
    (bridges.main, "--out r --arms ddpm:1 --nfe 0", "--nfe must be at least 1"),
    (bridges.main, "--out r --arms ddpm:1 --t-start 1001", "is beyond T"),
    (bridges.main, "--arms ddpm:1", "the following arguments are required: --out"),
    (reports.main, "F", "invalid choice: 'F'"),
    (reports.main, "A --seeds 0,x", "--seeds"),
    (reports.main, "A --seed 1", "unrecognized arguments: --seed 1"),
    (reports.main, "--full", "the following arguments are required: studies")])
def test_misuse_is_one_line_and_leaves_nothing(main, flags, said, trained, tmp_path, monkeypatch,
                                               capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run_main(main, flags.replace("RUN", str(trained)).split(), capsys)
    assert status == 2 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ================================================================== arms: method 2


def test_windowed_variance_is_that_of_the_last_outputs():
    outputs = [random_images(3, 1, 4, 4, seed=i) * (1 if i < 12 else 3) for i in range(40)]
    stop, brute = arms.WindowedVariance(5, 10), []
    for i, x in enumerate(outputs, 1):
        stop(i, x.clone(), x)
        if i >= 5:
            brute.append(torch.stack(outputs[i - 5:i]).var(0, correction=0).sum((1, 2, 3)))
    least = torch.stack(brute)[:12 - 4].min(0)  # before the outputs become restless
    torch.testing.assert_close(stop.least.float(), least.values)
    best = least.indices + 5
    assert torch.equal(stop.best.long(), best)
    assert torch.equal(stop.stopped.long(), best + 10)
    assert all(torch.equal(stop.x[k], outputs[best[k] - 1][k]) for k in range(3))


def observed(truth, sigma):
    return dipddpm.Observed(truth, corrupted(truth, sigma=sigma), torch.arange(len(truth)), {}, {})


def test_one_target_is_the_methods_own_fit():
    cfg, known = config(dip_width=4), corrupted(random_images(3, 1, 8, 8), "inpaint", 0.1)
    settings = torch.arange(3), 12
    assert torch.equal(arms.fit_targets(cfg, known, [known.y], *settings),
                       dipddpm.fit_dips(cfg, known, *settings))


def test_a_plain_fits_looks_are_its_end_its_best_and_a_stop_that_sees_no_truth():
    cfg, run = config(mode="guide", dip_width=4, dip_iters=35), bare_run()
    seen = observed(random_images(2, 1, 8, 8), 0.1)
    looks, follow = arms.fit_plain(cfg, seen, run, 2, [seen.known.y])
    x, when = looks["oracle"]
    torch.testing.assert_close(measures.psnr(x.clamp(0, 1), seen.truth), follow.psnr)
    assert [i for i, _ in follow.curve()] == [10, 20, 30, 35]
    assert set(when.tolist()) <= {10, 20, 30, 35}
    end = measures.psnr(looks["plain"][0].clamp(0, 1), seen.truth)
    assert follow.curve()[-1][1] == pytest.approx(end.mean().item())
    assert (follow.psnr >= end).all() and looks["plain"][1].tolist() == [35, 35]
    other, _ = arms.fit_plain(cfg, seen._replace(truth=1 - seen.truth), run, 2, [seen.known.y])
    assert {arm for arm in looks if torch.equal(looks[arm][0], other[arm][0])} == {
        "plain", "es-wmv"}


def test_plain_fits_do_not_depend_on_their_group():
    seen = observed(random_images(3, 1, 8, 8).double(), 0.1)
    fits = [arms.fit_plain(config(mode="guide", dip_width=4, dip_iters=20, dip_group=group), seen,
                           bare_run(), 2, [seen.known.y])[0] for group in (2, 64)]
    for arm in fits[0]:
        torch.testing.assert_close(fits[0][arm][0], fits[1][arm][0], rtol=1e-5, atol=1e-7)


def test_what_leaks_has_the_precision_of_all_its_rungs():
    truth = random_images(200, 1, 8, 8)
    known = corrupted(truth, "inpaint", 0.2)
    leaking, mean = arms.leaking_rungs(config(), known, truth, torch.arange(200), 3)
    seen, best = known.mask.bool(), sum(level**-2 for level in (0.8, 0.4, 0.2)) ** -0.5
    levels = [(y - truth)[seen].std().item() for y in (*leaking, mean)]
    assert levels == pytest.approx([0.8, 0.4, 0.2, best], rel=0.04)
    assert all((y[~seen] == 0).all() for y in leaking)


GUIDE = ("--data digits --samples 2 --dip-iters 40 --dip-width 4 --replicas 2 --set patience=20 "
         "--rungs 2").split()
THREE = ["plain", "oracle", "es-wmv"]
MEANS = [f"{name}-mean" for name in THREE]


@pytest.mark.parametrize("flags, names", [
    ("--sigma 0.3", [*THREE, *MEANS, "split", "literal", "literal-mean"]),
    ("--sigma 0.3 --arms split,mean", [*MEANS, "split"]),
    ("--sigma 0.3 --replicas 1 --arms plain,mean", THREE),
    ("--task inpaint", [*THREE, *MEANS, "split"])])  # without noise nothing leaks
def test_guide_compares_its_arms_and_marks_what_leaks(flags, names, tmp_path, capsys):
    status, _, err = run_main(arms.main, ["guide", *GUIDE, *flags.split(), "--out", tmp_path / "g"],
                              capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "g" / "results.json").read_text())
    rows = {row["name"]: row for row in result["arms"]}
    assert list(rows) == names
    assert {name for name, row in rows.items() if row.get("leaks")} == {
        name for name in names if "literal" in name}
    assert ("they leak it" in (tmp_path / "g" / "report.html").read_text()) == ("literal" in names)
    for name, row in rows.items():
        assert row["networks"] == (2 if name in (*MEANS, "split") else 1)
        assert row["network_steps"] == pytest.approx(row["networks"] * row["iterations"])
        assert ("seconds" in row) == ("oracle" not in name)
        assert ("gap" in row) == ("plain" in names)  # to the oracle of one network
        assert math.isfinite(row["psnr"]) and row.get("seconds", 0) < result["seconds"]["total"]
    if "plain" in rows:
        assert rows["oracle"]["gap"] == pytest.approx(0, abs=1e-5)
        assert rows["es-wmv"]["seconds"] == pytest.approx(
            rows["plain"]["seconds"] * rows["es-wmv"]["iterations"] / 40, rel=1e-3)


# ================================================================== arms: method 1


def test_smoothed_images_are_a_dips_outputs_in_256_steps(monkeypatch):
    x = torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 7)
    monkeypatch.setitem(arms.COPIES, "dip-images", lambda *_: x)
    images = arms.smoothed(config((1, 1, 7), dip_source=("codes", "images")), None, bare_run())
    assert images.dtype == torch.uint8
    assert images.flatten().tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_blur_is_the_mean_of_five_by_five_pixels():
    x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    blurred = arms.blur(None, x, x[:2])
    assert blurred.shape == (2, 1, 8, 8)
    assert blurred[1, 0, 4, 3] == pytest.approx((x[1, 0, 2:7, 1:6] / 127.5 - 1).mean().item())


def test_a_dip_of_an_image_is_nearest_to_its_own_source_whatever_its_group():
    sources = (random_images(5, 1, 8, 8) * 256).byte()
    x = arms.dip_images(config((1, 8, 8), dip_iters=60, dip_width=16, dip_group=2), None, sources)
    real = sources / 127.5 - 1
    distance = (x[:, None] - real).square().mean((2, 3, 4))
    assert x.abs().max() <= 1 and distance.argmin(1).tolist() == [0, 1, 2, 3, 4]
    assert (distance.diagonal() < real.var()).all()
    short = [arms.dip_images(config((1, 8, 8), dip_iters=1, dip_group=K), None, sources)
             for K in (1, 2, 64)]
    assert all(torch.allclose(short[0], other, atol=1e-5) for other in short)


def test_snapshots_are_the_averages_of_their_moments(tmp_path):
    cfg = config(width=8, batch=16, epochs=3, timesteps=50)
    net, rows = arms.train(cfg, tiny_images(), bare_run(tmp_path), "full", 4)
    files = sorted((tmp_path / "snapshots").glob("*.pt"))
    assert [f.name for f in files] == [f"full-{n:06d}.pt" for n in (3, 6, 9, 12)]
    last = torch.load(files[-1])
    assert last["step"] == 12 and {row[0] for row in rows} == {"full"}
    assert all(torch.equal(v, last["ema"][k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("T", [3, 10, 1000])
def test_losses_on_held_out_images_are_at_times_that_exist(T):
    asked, images = [], torch.zeros(1002, 1, 4, 4, dtype=torch.uint8)
    losses = arms.held_out_losses(
        config((1, 4, 4), timesteps=T, predict="x0"),
        lambda x_t, t: (asked.extend(t.tolist()), 0 * x_t)[1], images, bare_run())
    assert len(asked) == 5 * 1000  # images at five t
    assert sorted(set(asked)) == sorted({max(1, round(s * T)) - 1 for s in (.1, .3, .5, .7, .9)})
    assert losses == pytest.approx(dict.fromkeys(losses, 1.0)) and len(losses) == 5  # (0 - -1)^2


def test_seconds_of_a_step_are_not_bent_by_a_pause():
    rows = [["full", 50 * n, 0, 10.0 * n + (1000 if n > 3 else 0), 0, 0] for n in range(1, 9)]
    assert arms.median_step(rows) == pytest.approx(0.2)


PRIOR = ["prior", *FAST, "--dip-source", "images,network,codes", "--dip-iters", "3", "--snapshots",
         "2", "--network-arch", "conv2", "--network-width", "4", "--network-iters", "3"]


@pytest.fixture(scope="module")
def two_networks(tmp_path_factory):
    """A run of a network on images and one on DIP outputs."""
    folder = tmp_path_factory.mktemp("arms") / "run"
    arms.main([*PRIOR, "--out", str(folder)])
    return folder


def test_every_prior_arm_samples_with_each_network(two_networks):
    result = json.loads((two_networks / "results.json").read_text())
    rows = {(r["name"], r["train"], r["nfe"]): r for r in result["arms"]}
    assert rows.keys() == {("ddpm", "full", nfe) for nfe in (2, 4)} | {
        (arm, name, nfe) for arm in dipddpm.CODINGS | arms.COPIES for name in ("full", "smoothed")
        for nfe in (2, 4)}
    assert {r["name"] for r in rows.values() if "own_source" in r} == {
        "dip-images", "dip-network", "blur"}
    pixels = data.load("digits", split="train", limit=128).pixels[measures.subset(128, 8)]
    square = (arms.blur(None, None, pixels) - pixels.float() / 127.5 + 1).square().sum()
    assert rows["blur", "smoothed", 2]["prior_square_error"] == pytest.approx(
        square.item() / 8, rel=1e-4)
    smooth, full = (dipddpm.load_checkpoint(folder)["ema"]
                    for folder in (two_networks / "smoothed", two_networks))
    assert not torch.equal(smooth["enter.weight"], full["enter.weight"])


def test_curves_of_a_training_follow_its_snapshots(two_networks):
    result = json.loads((two_networks / "results.json").read_text())
    curves, train = result["curves"], result["seconds"]["train"]
    rows = {(r["name"], r["train"], r["nfe"]): r for r in result["arms"]}
    assert [step for step, _ in curves["held-out/smoothed t = 0.5 T"]] == [4, 8]
    for arm, name in ("ddpm", "full"), ("dip-codes", "smoothed"), ("dip-images", "full"):
        of = arm if arm == "ddpm" else f"{arm} {name}"
        (early, _), (late, quality) = curves[f"training/{of}, 4 evaluations"]
        row = rows[arm, name, 4]
        assert late - early == pytest.approx(early - row["prior_seconds"], abs=1e-3)
        assert 0 < late - row["prior_seconds"] <= 3 * train
        assert quality == pytest.approx(row["fid_lenet"], rel=1e-4)  # the last weights'
    log = (two_networks / "log.csv").read_text()
    assert "\nfull,8," in log and "\nsmoothed,8," in log


def test_a_run_with_two_networks_goes_on_where_it_was_stopped(two_networks, tmp_path, monkeypatch,
                                                              capsys):
    real, steps = dipddpm.denoising_loss, []

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 12:  # in the second training
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(dipddpm, "denoising_loss", interrupted)
    assert run_main(arms.main, [*PRIOR, "--out", tmp_path / "r"], capsys)[0] == 130
    status, _, err = run_main(arms.main, [*PRIOR, "--resume", tmp_path / "r"], capsys)
    assert status == 0 and len(steps) == 2 * 8, err
    whole, again = (json.loads((folder / "results.json").read_text())["arms"]
                    for folder in (two_networks, tmp_path / "r"))
    assert [row["fid_lenet"] for row in whole] == [row["fid_lenet"] for row in again]


# ================================================================== reports


def idx_bytes(array):
    """A uint8 array as an IDX file."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + (
        array.tobytes())


@pytest.fixture
def small_studies(tmp_path, monkeypatch):
    """Every data set of the studies with a few pictures, and sizes that take seconds."""
    rng = np.random.default_rng(0)
    monkeypatch.setenv("DIPDDPM_DATA", str(tmp_path / "data"))
    for name in ("mnist", "fashion-sample", "cifar-10-batches-bin", "photos"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ("mnist", "fashion-sample"):
        for split, n in ("train", 40), ("t10k", 20):
            images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
            for kind, array in ("images-idx3", images), ("labels-idx1", np.arange(n) % 10):
                path = tmp_path / "data" / name / f"{split}-{kind}-ubyte"
                path.write_bytes(idx_bytes(array.astype(np.uint8)))
    for name, n in ("data_batch_1", 40), ("test_batch", 20):
        records = rng.integers(0, 256, (n, 3073)).astype(np.uint8)
        records[:, 0] = np.arange(n) % 10
        (tmp_path / "data/cifar-10-batches-bin" / f"{name}.bin").write_bytes(records.tobytes())
    photo = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "data/photos/F16_GT.png")
    few, size = dict(width=8, n=12), reports.SMALL
    monkeypatch.setattr(reports, "SMALL", {
        "A": size["A"] | few | dict(dip_width=2, dip_iters=2),
        "B": size["B"] | few | dict(epochs=1, dip_iters=(1, 2), dip_width=2, nfe=(2, 3),
                                    skip_width=2, steps=8, fits=2),
        "C": size["C"] | few | dict(epochs=1, dip_widths=(2, 3), dip_iters=2),
        "D": size["D"] | dict(pixels=16, rates=(0.01,), rungs=2, steps=10, guide_iters=10),
        "E": size["E"] | few | dict(epochs=2, archs=("conv2",), dip_width=2, n=35, dip_iters=2,
                                    snapshots=2)})
    return tmp_path / "out"


def test_every_study_ends_in_its_table_and_what_is_finished_is_not_done_again(small_studies,
                                                                               capsys):
    assert reports.main([*"ABCDE", "--seeds", "3", "--out", str(small_studies)]) == 0
    said, tables = capsys.readouterr().out, {}
    for name in "ABCDE":
        tables[name] = (small_studies / name / "table.md").read_text()
        about, _, head, _, *rows = tables[name].splitlines()
        assert about.startswith(f"{name}: pictures ") and "seeds 3" in about
        assert [cell.strip() for cell in head.split("|")] == ["", "", "reported", "here", ""]
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
        assert all(len(row) == 3 and row[2] not in ("", "–") for row in cells)
        assert tables[name] in said

    # cells against what they are made of
    def results(study, name):
        return json.loads((small_studies / study / name / "seed=3/results.json").read_text())

    losses = [results("A", "base")["curves"][f"held-out/{name} t = 0.3 T"][-1][1]
              for name in ("full", "smoothed")]
    assert f" {reports.each([losses])} |" in tables["A"]
    [split] = [row for row in results("D", "guide")["arms"] if row["name"] == "split"]
    assert f" {reports.each([(split['psnr'], split['ssim'])])} |" in tables["D"]
    # given again, with the same flags and with others
    weights = {path: path.stat().st_mtime for path in small_studies.rglob("checkpoint.pt")}
    assert len(weights) == (4 + 2 + 1 + 1) + (1 + 2 + 1)  # and those of the second networks
    assert reports.main(["C", "D", "--seeds", "3", "--out", str(small_studies)]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert weights == {path: path.stat().st_mtime for path in small_studies.rglob("checkpoint.pt")}
    reports.SMALL["D"] |= dict(sigma=0.2)
    assert reports.main(["D", "--seeds", "3", "--out", str(small_studies)]) == 2
    assert "seed=3 is a run with other flags" in capsys.readouterr().err


def test_a_study_that_fails_says_why_and_the_next_is_done(small_studies, capsys):
    (small_studies.parent / "data/photos/F16_GT.png").unlink()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert reports.main(["D", "C", "--seeds", "0", "--out", str(small_studies)]) == 2
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert capsys.readouterr().err.count("\n") == 1
    assert not (small_studies / "D/table.md").exists() and (small_studies / "C/table.md").exists()


def test_what_the_studies_measure_is_what_they_say():
    truth = torch.rand(4, 3, 40, 40)
    ab, numbers = dipddpm.linear_schedule(1000).at(300), torch.arange(4)
    eps = (2 * reports.after_steps(truth, 300, numbers, 2) - 1 - ab**0.5 * (2 * truth - 1)) / (
        1 - ab)**0.5
    assert abs(eps.mean()) < 0.03 and eps.std() == pytest.approx(1, abs=0.03)
    x = reports.stretched(0.2 + 0.5 * truth)
    assert (x.amin((1, 2, 3)) == 0).all() and (x.amax((1, 2, 3)) == 1).all()
    torch.testing.assert_close(x, reports.stretched(truth))
    # a DIP that is off by 0.1 in [0, 1], that is by 0.2 in [-1, 1], everywhere
    results = {"seconds": {"dip": 5.0}, "arms": [
        {"name": "dip", "prior_seconds": 2.0, "prior_square_error": 0.2**2 * truth[0].numel()}]}
    assert reports.dip_cost(results, "dip", truth[0].numel()) == pytest.approx((3.0, 0.01))


def test_one_evaluation_denoises_and_a_numbers_digits_follow_its_size():
    cfg, truth = config(timesteps=100, predict="x0"), random_images(3, 1, 8, 8)
    known = reports.noised(cfg, truth, 0.2)
    x = reports.denoised(cfg, lambda x_t, t: 2 * truth - 1, known)
    torch.testing.assert_close(x, truth)  # a perfect network gives the truth, whatever y
    assert 0.15 < (known.y - truth).std() < 0.25
    assert reports.spread([21.0, 21.03, 21.1]) == "21.04 ± 0.05"
    assert reports.spread([0.0079]) == "0.00790" and reports.spread([0.0]) == "0.00"
    assert reports.spread([132.0, 133.0]) == "132.5 ± 0.7"
    assert reports.each([(1, 2), (3, 4)], " s") == "2.00 ± 1.41 / 3.00 ± 1.41 s"


# ================================================================== bridges


def test_bridges_are_trained_once_and_measured_beside_the_noise_start(tmp_path, monkeypatch,
                                                                       capsys):
    words = ["--out", str(tmp_path), "--data", "digits", "--limit", "128", "--samples", "16",
             "--nfe", "1,12", "--arms", "ddpm:1,dip-bridge:1,pca-bridge:2,distilled:4",
             "--t-start", "600"]
    bridges.main(words)
    found = [json.loads((tmp_path / f"{arm}-0.json").read_text())
             for arm in ("ddpm-1", "dip-bridge-1", "pca-bridge-2", "distilled-4")]
    rows = [[(row["name"], row["nfe"], row["t_start"]) for row in each["arms"]] for each in found]
    starts = [(name, 1, 600) for name in dipddpm.CODINGS]  # up to 10 evaluations
    starts += [("noised", 1, 100), ("dip-noised", 1, 100)]
    near = [row["nearest"] for row in found[0]["arms"]]
    assert near[-2] < 0.5 * min(near[:-2])  # a copy
    assert rows == [[("ddpm", 1, 1000), ("ddpm", 12, 1000), *starts],
                    *([(arm, 1, 600), (arm, 12, 600)] for arm in bridges.BRIDGES),
                    [("distilled", nfe, 1000) for nfe in (8, 4, 2, 1)]]
    assert all(each["seconds"] > each["codes"] >= 0 for each in found) and found[1]["codes"] > 0
    assert len(list(tmp_path.glob("*-nfe12.png"))) == 3
    # a file that is missing is made again without another training
    monkeypatch.setattr(bridges, "trained", None)
    (tmp_path / "pca-bridge-2-0.json").unlink()
    bridges.main(words)
    again = json.loads((tmp_path / "pca-bridge-2-0.json").read_text())
    assert [row["fid_lenet"] for row in again["arms"]] == [
        row["fid_lenet"] for row in found[2]["arms"]]
    # what is there is not taken for something else
    for change, said in (("--limit 64 --arms ddpm:1,distilled:5", "128 images of digits"),
                         ("--seeds 1 --arms distilled:4", "no ddpm of seed 1")):
        status, _, err = run_main(bridges.main, [*words, *change.split()], capsys)
        assert status == 2 and said in err and err.count("\n") == 1


def test_a_network_that_needs_no_distilling_learns_nothing_from_itself(monkeypatch):
    monkeypatch.setattr(dipddpm, "optimizers_of",
                        lambda net, lr: [torch.optim.SGD(net.parameters(), 0.1)])
    cfg = config(batch=16)
    ab = dipddpm.schedule_of(cfg).alpha_bar.float()

    class Sure(torch.nn.Module):  # of x_0 = 0.3, plus what is learned
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x_t, t):
            ab_t = ab[t].view(-1, 1, 1, 1)
            return (ab_t.sqrt() * x_t - 0.3) / (1 - ab_t).sqrt() + self.more

    for N in 8, 1:
        assert bridges.distil(cfg, Sure(), tiny_images(), N, 5).more.abs() < 1e-4
        off = Sure()
        off.more.data.fill_(0.5)
        assert (bridges.distil(cfg, off, tiny_images(), N, 5).more - 0.5).abs() > 1e-4


def test_the_nearest_training_image_is_found():
    pixels = (random_images(30, 1, 4, 4) * 255).byte()
    x = pixels[[4, 17]] / 127.5 - 1 + 0.01
    assert torch.equal(bridges.nearest(x, pixels), pixels[[4, 17]].float() / 127.5 - 1)


# ================================================================== recipe


def test_a_recipes_arms_differ_and_leave_the_method_as_it_was(tmp_path, capsys):
    before = dict(vars(dipddpm))
    words = ["--data", "digits", "--limit", "200", "--epochs", "4", "--out", str(tmp_path)]
    recipe.main(words)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [row["arm"] for row in rows] == list(recipe.ARMS) and vars(dipddpm) == before
    losses = {row["arm"]: row["losses"] for row in rows}
    assert all(len(loss) == 4 for loss in losses.values())
    found = {str((row["losses"], row["fid_lenet at 10"])) for row in rows}
    assert len(found) == len(rows)
    assert all(0 <= row["recall at 20"] <= 1 and row["seconds"] > 0 for row in rows)
    # what is there is not done again
    path = tmp_path / "now-0.json"
    path.write_text(path.read_text().replace('"now"', '"kept"'))
    recipe.main([*words, "--arms", "now"])
    assert json.loads(capsys.readouterr().out)["arm"] == "kept"


def test_candidates_draw_what_they_say():
    cfg, numbers = config(), torch.arange(4096)
    t = recipe.logit_normal(cfg, 1000, numbers, 4096, torch.tensor(3)) / 1000
    logit = torch.logit(t.clamp(5e-4, 1 - 5e-4))
    assert abs(logit.mean()) < 0.02 and logit.std().item() == pytest.approx(1, abs=0.02)
    asked, pixels, index = [], random_images(8, 1, 8, 8).mul(255).byte(), torch.arange(8)

    def net(x_t, t):
        asked.append((x_t, t))
        return torch.zeros_like(x_t)

    table = dipddpm.forward_table(cfg)
    for k in 1, 64:
        recipe.nearest_noise(cfg, net, pixels, index, index, 8, table, torch.tensor(0), None, k=k)
    (x_t, t), (nearer, _) = asked
    signal, noise = table[t][:, :2, None, None, None].unbind(1)
    x_0 = pixels / 127.5 - 1
    far, near = (((x - signal * x_0) / noise - x_0).square().mean() for x in (x_t, nearer))
    assert near < far - 0.2
    torch.testing.assert_close(x_t, kernels.q_sample(pixels, index, t, table, 0, index, 0))


# ------------------------------------------------------------------ photos


def test_photos_are_denoised_by_each_arm_and_misuse_is_one_line(tmp_path, monkeypatch, capsys):
    x = (torch.linspace(0, 255, 41)[:, None] * torch.ones(3, 41, 40)).to(torch.uint8)
    measures.save_png(measures.grid(x[None].float() / 255, pad=0), tmp_path / "photo.png")
    flags = [tmp_path / "photo.png", "--iters", 20, "--dip-width", 4, "--sigma", 0.1,
             "--arms", "nlm,zs-n2n,denoiser,split,plain"]
    status, _, err = run_main(photos.main, [*flags, "--out", tmp_path / "o" / "rows.json"], capsys)
    assert status == 0, err
    rows = json.loads((tmp_path / "o" / "rows.json").read_text())
    assert [row["arm"] for row in rows] == ["nlm", "zs-n2n", "denoiser", "split", "plain"]
    assert all(row["seconds"] > 0 and row["psnr"] > 5 and row["ssim"] <= 1 for row in rows)
    noisy, better = 20.5, [row["psnr"] for row in rows[:3]]
    assert better[0] > 25 and min(better) > noisy
    assert rows[2]["iterations"] == 20
    assert (tmp_path / "o" / "rows-photo-0.1-0-denoiser.png").exists()
    assert all("psnr_oracle" in row for row in rows[2:]) and "psnr_oracle" not in rows[0]

    file, more = tmp_path / "o" / "holes.json", ("--crop", 40, "--arms", "nlm,split,adam,plain")
    for task, without in (("inpaint", 9), ("sr", 21)):  # what is given, as it is, has about this
        status, _, err = run_main(photos.main, [*flags, "--task", task, *more, "--out", file],
                                  capsys)
        assert status == 0, err
        rows = json.loads(file.read_text())
        assert all(row["task"] == task for row in rows) and rows[0]["psnr"] > without
        assert rows[2]["psnr"] == rows[3]["psnr"]  # Adam fits so few pixels anyway
        assert rows[1]["psnr_end"] <= rows[1]["psnr_oracle"] and "psnr_end" not in rows[0]
    mask = torch.zeros(1, 1, 41, 40)
    mask[..., :20] = 1
    measures.save_png(measures.grid(mask, pad=0), tmp_path / "mask.png")
    inpaint, rows = ["--task", "inpaint", "--crop", 40, "--arms", "nlm", "--out", file], {}
    for holes in (), ("--holes", 0.5), ("--holes", 0.9), ("--holes", tmp_path / "mask.png"):
        status, _, err = run_main(photos.main, [*flags, *inpaint, *holes], capsys)
        assert status == 0, err
        rows[holes[1:]] = json.loads(file.read_text())[0]
    whole, half, most, masked = rows.values()
    assert whole["psnr"] == half["psnr"] > most["psnr"] and masked["holes"].endswith("mask.png")
    monkeypatch.setitem(sys.modules, "bm3d", None)  # as if it were not installed
    for more, message in ((["--arms", "best"], "best: want some of nlm"), ([], "none.png"),
                          (["--arms", "cbm3d"], "cbm3d needs the package bm3d"),
                          (["--sigma", 0], "--sigma must be more than 0"),
                          (["--task", "sr"], "denoiser and zs-n2n only denoise"),
                          (["--holes", 0.5], "--holes needs --task inpaint"),
                          ([*inpaint, "--holes", 1], "want a share between 0 and 1, or a mask"),
                          ([*inpaint, "--holes", "0,5"], "0,5"),
                          (["--replicas", 0], "--replicas must be at least 1")):
        file = [tmp_path / "none.png", *flags[1:]] if not more else flags
        status, out, err = run_main(photos.main, [*file, *more, "--out", tmp_path / "p"], capsys)
        assert status == 2 and message in err and err.count("\n") == 1


def test_a_photo_at_its_least_variance_and_from_its_own_last_output():
    x = torch.linspace(0, 1, 16)[:, None].expand(1, 3, 16, 16).contiguous()
    cfg = dipddpm.Config(mode="dip", dip_iters=120, dip_width=8, dip_lr=0.01, muon=True)
    known, numbers = dipddpm.corrupt(cfg, "denoise", x, 0.2, torch.arange(1)), torch.arange(1)
    arms, looks = (photos.es_wmv, photos.aseq_dip), {}
    made = {arm: arm(cfg, known, numbers, lambda i, x, arm=arm: looks.setdefault((arm, i), x))
            for arm in arms}
    assert {i for _, i in looks} == {*range(10, 121, 10)}
    for (x_hat, took), least in zip(made.values(), (100, 120)):
        assert least <= took <= 120 and (x_hat - x).square().mean() < 0.04 / 4
    assert torch.equal(made[photos.aseq_dip][0], looks[photos.aseq_dip, 120])
    # in holes it is held to what it sees, which is nothing at first and then what it made
    holes = dipddpm.corrupt(cfg, "inpaint", x, 0.0, numbers)
    filled = [photos.aseq_dip(cfg, holes, numbers, lambda *_: None, *how)[0][
        (1 - holes.mask).bool().expand_as(x)].mean() for how in ((999, 100), (2, 1), (999, 0))]
    assert filled[0] < 0.1 and 0.4 < filled[1] and 0.35 < filled[2]
