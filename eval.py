"""Measures, pictures and the report: everything that looks at a result and nothing that makes one.

    image against image    mse, mae, psnr, ssim, delta_e           [N, C, H, W] in [0, 1] -> [N]
    set against set        frechet_distance, kid, precision_recall, nearest, total_variation
    LeNet features         feature_network, features, floor
    all of a set           Judge
    files                  grid, save_png, draw, write_text, write_json, report, compare

`python eval.py A.png B.png` prints the image measures of two pictures;
`python eval.py RUN...` rebuilds RUN/report.html from RUN/results.json, and for several runs also
makes one page of them all, comparison.html beside them;
`python eval.py FIGURE.json...` draws FIGURE.svg from the curves in each (see `figure`).

Every measure raises ValueError, which names the shape, the range or the NaN that it cannot take.

`fid_lenet` is the Fréchet distance in the features of a LeNet trained here on the data set's own
training split. It is comparable between results that carry the same network checksum and sample
count, is read beside its floor (real against real), and is not the Inception FID of the papers.
"""
import base64
import copy
import hashlib
import html
import io
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

# ---------------------------------------------------------------- image against image


def _pair(a, b, data_range):
    """Both batches in float64, scaled to [0, 1]; ValueError unless they are finite floats of one
    shape [N, C, H, W] in [0, data_range]."""
    if a.shape != b.shape or a.dim() != 4 or a.numel() == 0:
        raise ValueError("two image batches of one shape [N, C, H, W] expected, "
                         f"not {list(a.shape)} and {list(b.shape)}")
    if not 0 < data_range < math.inf:
        raise ValueError(f"a data_range above 0 expected, not {data_range}")
    for which, x in (("first", a), ("second", b)):
        if not x.is_floating_point():
            raise ValueError(f"the {which} images are {x.dtype}: scale them to floats in [0, 1]")
        if not x.isfinite().all():
            raise ValueError(f"the {which} images hold NaN or infinite values")
        low, high = x.min().item(), x.max().item()
        if low < -1e-3 * data_range or high > 1.001 * data_range:
            raise ValueError(f"the {which} images lie in [{low:.4g}, {high:.4g}], not in "
                             f"[0, {data_range:g}]: scale them or give data_range")
    return a.double() / data_range, b.double() / data_range


def _blocks(f, a, b):
    """f(a, b) [N] in blocks of images that stay in the cache: ten times as fast for many."""
    size = max(1, 200_000 // a[0].numel())
    return torch.cat([f(x, y) for x, y in zip(a.split(size), b.split(size))])


def mse(a, b, data_range=1.0):
    """Mean of ((a - b) / data_range)² over C, H, W: [N, C, H, W] twice -> float64 [N], no unit."""
    a, b = _pair(a, b, data_range)
    return (a - b).square().mean((1, 2, 3))


def mae(a, b, data_range=1.0):
    """Mean of |a - b| / data_range over C, H, W: [N, C, H, W] twice -> float64 [N], no unit."""
    a, b = _pair(a, b, data_range)
    return (a - b).abs().mean((1, 2, 3))


def psnr(a, b, data_range=1.0):
    """-10 log10 mean ((a - b) / data_range)²: [N, C, H, W] twice -> float64 [N] in dB, inf where
    equal."""
    return -10 * mse(a, b, data_range).log10()


def ssim(a, b, data_range=1.0):
    """Structural similarity (Wang et al. 2004, eq. 13): [N, C, H, W] twice -> float64 [N] in
    [-1, 1].

    (2 μa μb + c1)(2 σab + c2) / ((μa² + μb² + c1)(σa² + σb² + c2)), c = (K data_range)², K1 = 0.01,
    K2 = 0.03; moments under a Gaussian of σ = 1.5 in an 11×11 window, population covariance,
    averaged over the pixels whose window lies inside the image, then over channels. The window
    shrinks to the largest odd size that fits smaller images.
    """
    a, b = _pair(a, b, data_range)
    H, W = a.shape[2:]
    size = min(11, H, W)
    size -= 1 - size % 2
    w = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    w = torch.exp(-w.square() / (2 * 1.5**2))
    w = w / w.sum()

    def mean(x):  # under the window, one axis after the other, as sums of shifted images
        x = sum(w[i] * x[:, :, i:H - size + 1 + i] for i in range(size))
        return sum(w[i] * x[..., i:W - size + 1 + i] for i in range(size))

    def similarity(a, b):
        mu_a, mu_b = mean(a), mean(b)
        var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
        value = ((2 * mu_a * mu_b + 0.01**2) * (2 * cov + 0.03**2)
                 / ((mu_a**2 + mu_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
        return value.mean((1, 2, 3))

    return _blocks(similarity, a, b)


def delta_e(a, b, data_range=1.0):
    """Mean CIEDE2000 over pixels: sRGB [N, 3, H, W] (or grey [N, 1, H, W]) twice -> float64 [N], in
    units of a just noticeable difference, roughly."""
    a, b = _pair(a, b, data_range)
    if a.shape[1] not in (1, 3):
        raise ValueError(f"colour differences are of 1 or 3 channels, not {a.shape[1]}")
    a, b = (x.expand(-1, 3, -1, -1).flatten(2) for x in (a, b))  # [N, 3, H W]

    def mean(a, b):  # in parts of an image, since thirty planes of a photo are much memory
        parts = zip(a.split(500_000, 2), b.split(500_000, 2))
        return sum(ciede2000(lab(x), lab(y)).sum(1) for x, y in parts) / a.shape[2]

    return _blocks(mean, a, b)


def lab(rgb):
    """sRGB in [0, 1] -> CIE L*a*b* under D65, of the same shape [N, 3, ...]: IEC 61966-2-1 with
    BT.709 primaries, then CIE 15 with its rounded constants 0.008856 and 7.787."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055)**2.4, rgb / 12.92)
    to_xyz = rgb.new_tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                             [0.019334, 0.119193, 0.950227]])
    white = rgb.new_tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("ij,nj...->ni...", to_xyz / white[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9)**(1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def ciede2000(p, q):
    """Colour difference ΔE00 of L*a*b* colours: [N, 3, ...] twice -> [N, ...]. Sharma et al. 2005,
    eq. 2-22, with kL = kC = kH = 1 and angles in radians."""
    (L1, a1, b1), (L2, a2, b2) = p.unbind(1), q.unbind(1)
    turn = 2 * math.pi

    def flatness(c):  # of chroma c: 0 at grey, 1 far from it
        return (c**7 / (c**7 + 25**7)).sqrt()

    stretch = 1.5 - 0.5 * flatness((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2)  # 1 + G
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1) % turn, torch.atan2(b2, a2) % turn
    grey = c1 * c2 == 0
    apart = h2 - h1
    far = apart.abs() > math.pi
    dh = torch.where(grey, 0, apart - turn * far * apart.sign())
    mean_h = (h1 + h2) / 2 + math.pi * far * torch.where(h1 + h2 < turn, 1, -1)
    mean_h = torch.where(grey, h1 + h2, mean_h)
    mean_L, mean_c = (L1 + L2) / 2, (c1 + c2) / 2
    dL, dC, dH = L2 - L1, c2 - c1, 2 * (c1 * c2).sqrt() * (dh / 2).sin()
    degree = math.pi / 180
    T = (1 - 0.17 * (mean_h - 30 * degree).cos() + 0.24 * (2 * mean_h).cos()
         + 0.32 * (3 * mean_h + 6 * degree).cos() - 0.20 * (4 * mean_h - 63 * degree).cos())
    S_L = 1 + 0.015 * (mean_L - 50)**2 / (20 + (mean_L - 50)**2).sqrt()
    dL, dC, dH = dL / S_L, dC / (1 + 0.045 * mean_c), dH / (1 + 0.015 * mean_c * T)
    theta = 30 * degree * (-((mean_h / degree - 275) / 25)**2).exp()
    R_T = -(2 * theta).sin() * 2 * flatness(mean_c)
    return (dL**2 + dC**2 + dH**2 + R_T * dC * dH).clamp(min=0).sqrt()


def measures(image, truth):
    """Mean and standard deviation over images of each image measure, as a flat dictionary."""
    row = {}
    for f in psnr, ssim, mse, mae, delta_e:
        v = f(image, truth)
        row[f.__name__] = round(v.mean().item(), 5)
        row[f"{f.__name__}_std"] = round(v.std(correction=0).item(), 5)
    return row


# ---------------------------------------------------------------- set against set


def _two_sets(f, g, least):
    """Both feature sets in float64; ValueError unless finite [N, D] of one D, N >= `least`."""
    if f.dim() != 2 or g.dim() != 2 or f.shape[1] != g.shape[1] or min(len(f), len(g)) < least:
        raise ValueError(f"two feature sets [N, D] of one D and N >= {least} expected, "
                         f"not {list(f.shape)} and {list(g.shape)}")
    for which, x in (("first", f), ("second", g)):
        if not x.isfinite().all():
            raise ValueError(f"the {which} features hold NaN or infinite values")
    return f.double(), g.double()


def frechet_distance(f, g):
    """|μf - μg|² + tr(Σf + Σg - 2 (Σf Σg)^½), Heusel et al. 2017, eq. 6; [N, D], [M, D] -> float.

    The square root has the trace of (Σf^½ Σg Σf^½)^½, which is symmetric, so nothing turns complex.
    It is biased upwards for few samples: compare equal counts.
    """
    f, g = _two_sets(f, g, 2)
    D = f.shape[1]
    S_f, S_g = torch.cov(f.T).view(D, D), torch.cov(g.T).view(D, D)  # a scalar where D = 1
    value, vector = torch.linalg.eigh(S_f)
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    cross = torch.linalg.eigvalsh(root @ S_g @ root).clamp(min=0).sqrt().sum()
    distance = (f.mean(0) - g.mean(0)).square().sum() + S_f.trace() + S_g.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding can leave -1e-12 for equal sets


def kid(f, g, subsets=100, size=1000):
    """Kernel distance (Bińkowski et al. 2018, §4): [N, D], [M, D] -> (mean, standard deviation).

    The unbiased MMD² under k(x, y) = (x·y / D + 1)³: mean and deviation over fixed random subsets
    of at most `size` rows and half a set, so that small sets show a spread too. The mean is near 0,
    and may be negative, for equal laws.
    """
    f, g = _two_sets(f, g, 4)
    m = min(size, len(f) // 2, len(g) // 2)
    generator = torch.Generator().manual_seed(0)

    def draw(x):
        return x[torch.randperm(len(x), generator=generator)[:m].to(x.device)]

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1)**3

    estimates = []
    for _ in range(subsets):
        x, y = draw(f), draw(g)
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
        estimates.append((within - 2 * xy.mean()).item())
    return statistics.mean(estimates), statistics.pstdev(estimates)


def precision_recall(f, g, k=3):
    """Share of generated `f` inside the manifold of real `g`, and of `g` inside that of `f`.

    [N, D], [M, D] -> (precision, recall). A manifold is the union of balls around its points, each
    reaching to the point's k-th neighbour in its own set (Kynkäänniemi et al. 2019, eq. 1–2).
    """
    f, g = _two_sets(f, g, k + 1)
    rounding = 1e-12 * max(f.square().sum(1).max(), g.square().sum(1).max())

    def distances(x, y):  # squared
        return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1)[:, None])

    def radii(x):  # the nearest of all is the point itself, hence k + 1
        return rounding + torch.cat([distances(rows, x).topk(k + 1, largest=False).values[:, -1]
                                     for rows in x.split(1000)])

    radius_f, radius_g = radii(f), radii(g)
    inside_f, inside_g = [], torch.zeros(len(g), dtype=torch.bool, device=g.device)
    for rows, radius in zip(f.split(1000), radius_f.split(1000)):
        distance = distances(rows, g)  # [rows, M]
        inside_f.append((distance <= radius_g).any(1))
        inside_g |= (distance <= radius[:, None]).any(0)
    return torch.cat(inside_f).double().mean().item(), inside_g.double().mean().item()


def nearest(images, others):
    """Distance from each image to its nearest one in `others`, which shows copying.

    L2 over pixels in [0, 1]: [N, C, H, W], [M, C, H, W], uint8 or float -> float32 [N].
    """
    if images.shape[1:] != others.shape[1:] or not len(others):
        raise ValueError(f"images of one shape expected, not {list(images.shape)} and "
                         f"{list(others.shape)}")
    x = _unit(images).flatten(1)
    best = torch.full((len(x),), math.inf, device=x.device)
    for part in others.split(max(1, 2**23 // others[0].numel())):
        y = _unit(part.to(x.device)).flatten(1)
        for rows in torch.arange(len(x), device=x.device).split(1000):
            index = torch.cdist(x[rows], y).argmin(1)
            # once more for the winner: cdist's matrix product loses digits of small distances
            best[rows] = best[rows].minimum((x[rows] - y[index]).norm(dim=1))
    return best


def _unit(images):
    """uint8 [N, C, H, W] scaled to float32 in [0, 1]; floats pass if they lie there already."""
    if images.dim() != 4:
        raise ValueError(f"images [N, C, H, W] expected, not {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not ((images >= -1e-3) & (images <= 1 + 1e-3)).all():  # false for NaN as well
        raise ValueError("images must be uint8, or floats in [0, 1] without NaN")
    return images.float()


# ---------------------------------------------------------------- LeNet features

LENET_VERSION = 1  # part of a cache's name: raise it when the network or its training changes
LENET_STEPS = 500  # at least, since small sets need more than `epochs` passes


class LeNet(nn.Module):
    """After LeCun et al. 1998: pixels [N, C, H, W] in [0, 1] -> (features [N, 84], logits).

    The features are the penultimate layer before its ReLU: nearer to a Gaussian, which is all that
    a Fréchet distance sees, and no unit is constant.
    """

    def __init__(self, channels, classes, dimension=84):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 24, 3, padding=1)
        self.fc1 = nn.Linear(24 * 7 * 7, dimension)
        self.fc2 = nn.Linear(dimension, classes)

    def forward(self, x):
        h = F.relu(F.max_pool2d(self.conv1(2 * x - 1), 2))     # [N, 8, H/2, W/2]
        h = F.relu(F.adaptive_max_pool2d(self.conv2(h), 7))    # [N, 24, 7, 7]
        feature = self.fc1(h.flatten(1))                       # [N, 84]
        return feature, self.fc2(F.relu(feature))


class FeatureNet(NamedTuple):
    """A trained LeNet with what a result has to say about it."""
    net: LeNet
    name: str
    accuracy: float | None  # on the test split, in [0, 1]; None if it was never given
    checksum: str           # sha256 of the weights
    dimension: int


def feature_network(pixels, labels, name, cache_dirs, seed=0, device="cpu", test=None, epochs=3):
    """The LeNet of a data set, from the first cache that holds it, else trained on the whole split.

    `pixels` uint8 [N, C, H, W], `labels` int64 [N], `test` an optional (pixels, labels) for the
    accuracy. `seed` fixes initialisation, order and shifts; no global random state changes. The
    file is features-NAME-HASH.pt in the first writable folder of `cache_dirs`. A part of a data set
    gives another network than the whole, hence distances that do not compare.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or labels is None or (
            labels.shape != pixels.shape[:1]):
        raise ValueError("features need uint8 pixels [N, C, H, W] and a label for each, not "
                         f"{pixels.dtype} {list(pixels.shape)} and "
                         f"{None if labels is None else list(labels.shape)}")
    if not len(pixels) or labels.is_floating_point() or labels.min() < 0:
        raise ValueError("features need at least one image, and labels that are numbers from 0 on")
    digest = hashlib.sha256(f"{LENET_VERSION} {seed} {epochs} {list(pixels.shape)}".encode())
    for x in (pixels, labels.long()):
        digest.update(x.cpu().contiguous().numpy())
    file = f"features-{Path(name).name}-{digest.hexdigest()[:16]}.pt"

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = LeNet(pixels.shape[1], int(labels.max()) + 1)
    cached = next((c for d in cache_dirs if (c := _load_cache(Path(d) / file, net))), None)
    if cached:
        net.to(device).eval()
    else:
        _fit(net.to(device), pixels.to(device), labels.to(device), seed, epochs)
    accuracy = cached["accuracy"] if cached else None
    if test is not None:
        accuracy = _accuracy(net, *test)
    if not cached:
        state = {key: value.cpu() for key, value in net.state_dict().items()}
        content = io.BytesIO()
        torch.save({"state": state, "accuracy": accuracy, "checksum": _checksum(net)}, content)
        for folder in map(Path, cache_dirs):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _replace(folder / file, content.getvalue())
                break
            except OSError:
                continue  # read-only: try the next one; a missing cache only costs time
    return FeatureNet(net, name, accuracy, _checksum(net), net.fc1.out_features)


def _fit(net, pixels, labels, seed, epochs, batch=128):
    """Cross-entropy, Adam, one-cycle rate, in place; ends in evaluation mode.

    Smoothed labels and shifts by up to 2 pixels keep the network from knowing its training images:
    without them the floor on MNIST is four times as high and degraded images stand out less. On a
    CPU one thread, so that the weights do not depend on the number of cores.
    """
    n, threads = len(pixels), torch.get_num_threads()
    epochs = max(epochs, math.ceil(LENET_STEPS / math.ceil(n / batch)))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * math.ceil(n / batch))
    torch.set_num_threads(1)
    try:
        for _ in range(epochs):
            for index in torch.randperm(n, generator=generator).to(pixels.device).split(batch):
                shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
                x = _unit(pixels[index]).roll(shift, (2, 3))
                loss = F.cross_entropy(net(x)[1], labels[index], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
    finally:
        torch.set_num_threads(threads)
    net.eval().requires_grad_(False)


def _load_cache(path, net):
    """Weights of a cache file into `net`; its content, or None for a missing or a damaged file."""
    if not path.is_file():
        return None
    try:
        cached = torch.load(path, map_location="cpu", weights_only=True)
        whole = copy.deepcopy(net)  # so that nothing damaged reaches `net`
        whole.load_state_dict(cached["state"])
        if cached["checksum"] != _checksum(whole):
            raise ValueError("checksum")
        net.load_state_dict(cached["state"])
    except Exception as error:  # a damaged file can raise nearly anything
        warnings.warn(f"{path} is damaged ({type(error).__name__}) and is made again",
                      stacklevel=3)
        return None
    net.requires_grad_(False)
    return cached


def _checksum(net):
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


@torch.no_grad()
def _accuracy(net, pixels, labels):
    device = net.fc1.weight.device
    hits = [(net(_unit(x.to(device)))[1].argmax(1) == y.to(device)).sum().item()
            for x, y in zip(pixels.split(1000), labels.split(1000))]
    return sum(hits) / len(pixels)


@torch.no_grad()
def features(net, images, batch=1000):
    """FeatureNet, images [N, C, H, W] (uint8, or floats in [0, 1]) -> float32 [N, D]."""
    device = net.net.fc1.weight.device
    return torch.cat([net.net(_unit(part.to(device)))[0] for part in images.split(batch)])


@torch.no_grad()
def classes(net, images, batch=1000):
    """FeatureNet, images [N, C, H, W] (uint8, or floats in [0, 1]) -> its classes, int64 [N]."""
    device = net.net.fc1.weight.device
    return torch.cat([net.net(_unit(part.to(device)))[1].argmax(1) for part in images.split(batch)])


def subset(N, n, number=0):
    """Fixed numbers of n of N images, int64 [n]. At random: a stride meets the period of data sets
    that store their classes in turn, and even in MNIST neither a stride nor the first n are typical
    (1,000 training images score 7.9 and 10.0 against the test split, at random 2.3, sd 0.6)."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(number))[:n]


def floor(net, train_pixels, test_pixels, samples, subsets=5):
    """fid_lenet of `samples` training images against the test split -> (mean, standard deviation)
    over fixed random subsets.

    The same count as the generated ones, since the distance falls with the count: what a perfect
    generator would score. ValueError if the training split is smaller than that.
    """
    if not 2 <= samples <= len(train_pixels):
        raise ValueError(f"a floor of {samples} images from a split of {len(train_pixels)}")
    test, values = features(net, test_pixels), []
    for number in range(subsets):
        rows = subset(len(train_pixels), samples, number).to(train_pixels.device)
        values.append(frechet_distance(features(net, train_pixels[rows]), test))
    return statistics.fmean(values), statistics.stdev(values)


# ---------------------------------------------------------------- a set's judge


def total_variation(counts, others):
    """Half the sum of |p - q| between the shares of two histograms: 0 where they agree, at most 1;
    the share of samples that would have to change class."""
    size = max(len(counts), len(others))
    p, q = (F.pad(c, (0, size - len(c))).double() / c.sum() for c in (counts, others))
    return 0.5 * (p - q).abs().sum().item()


class Judge:
    """Measures sets of n samples: against the test split in the features of a LeNet that is trained
    on the whole training split, where there are labels for it, and in the shares of the classes
    that it sees; and for copying, by the distance of each sample to the nearest training image (L2
    over pixels in [0, 1]: mean and 5th percentile) and to its own source image. `train` and `test`
    are data.Images, x_0 the training images that were used, on the device to measure on; the LeNet
    is cached in the first of `cache_dirs` that has it or takes it. `seconds` is what all took."""

    def __init__(self, train, x_0, test, n, cache_dirs):
        began = time.time()
        self.lenet, self.n, self.x_0 = None, n, x_0
        held_out = subset(len(test.pixels), n)
        self.real = self.copying(test.pixels[held_out].to(x_0.device))
        if train.labels is not None and min(n, len(test.pixels)) > 3:  # three neighbours and itself
            self.lenet = feature_network(
                train.pixels, train.labels, train.name, cache_dirs, device=x_0.device,
                test=(test.pixels, test.labels))
            self.features = features(self.lenet, test.pixels)
            self.shares = torch.bincount(classes(self.lenet, test.pixels))
            # as many real images as generated ones, as recall asks for
            self.manifold = self.features[held_out.to(x_0.device)]
            self.floor, self.floor_std = floor(self.lenet, train.pixels, test.pixels, n)
        self.seconds = time.time() - began

    def copying(self, x):
        """Distances to the nearest training image, as a flat dictionary."""
        d = nearest(x, self.x_0)
        return {"nearest": round(d.mean().item(), 3),
                "nearest_5": round(d.quantile(0.05).item(), 3)}

    def __call__(self, x, sources=None):
        """x [n, C, H, W] in [-1, 1] -> the set's measures, a flat dictionary."""
        began = time.time()
        x = (x + 1) / 2
        row = {}
        if self.lenet is not None:
            f, g = features(self.lenet, x), self.features
            distance, deviation = kid(f, g)
            precision, recall = precision_recall(f, self.manifold)
            shares = torch.bincount(classes(self.lenet, x), minlength=len(self.shares))
            row = {"fid_lenet": round(frechet_distance(f, g), 3), "kid": round(distance, 5),
                   "kid_std": round(deviation, 5), "precision": round(precision, 4),
                   "recall": round(recall, 4),
                   "class_gap": round(total_variation(shares, self.shares), 4)}
        row |= self.copying(x)
        if sources is not None:
            own = (x - sources.float() / 255).flatten(1).norm(dim=1)
            row["own_source"] = round(own.mean().item(), 3)
        self.seconds += time.time() - began
        return row

    def summary(self):
        notes = [f"{self.n} real test images lie {self.real['nearest']:g} from their nearest "
                 f"training image (mean; 5th percentile {self.real['nearest_5']:g})"]
        if self.lenet is None:
            notes.append("no labels, or too few images: no LeNet features, no fid_lenet")
            return {"notes": notes, "real": self.real}
        return {"floor": {"fid_lenet": round(self.floor, 3), "std": round(self.floor_std, 3),
                          "samples": self.n},
                "notes": notes, "real": self.real,
                "features": {"name": self.lenet.name, "accuracy": self.lenet.accuracy,
                             "checksum": self.lenet.checksum, "dimension": self.lenet.dimension}}


# ---------------------------------------------------------------- files


WRITES = True  # False in a process that only helps another one


def _replace(path, content):
    """Write bytes under a temporary name and move them: a reader never sees half a file."""
    if not WRITES:
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text, path):
    _replace(path, text.encode(errors="replace"))


def write_json(value, path):
    """Strict JSON: NaN and infinities, which it cannot hold, become null."""
    def plain(x):
        if isinstance(x, dict):
            return {str(key): plain(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", path)


def grid(images, columns=None, pad=2, scale=1):
    """A contact sheet: [N, C, H, W] in [0, 1] (clipped) or uint8, C = 1 or 3 -> PIL.Image.

    Row by row, `columns` wide (default: nearly square; the number of steps makes each row a film
    strip), grey lines of `pad` pixels between, each pixel drawn `scale` times.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images [N, 1 or 3, H, W], not {list(images.shape)}")
    if images.dtype != torch.uint8:
        images = images.float().nan_to_num(0).clamp(0, 1).mul(255).round().byte()
    N, C, H, W = images.shape
    columns = min(columns or math.ceil(math.sqrt(N)), N)
    rows = math.ceil(N / columns)
    sheet = np.full((rows * (H + pad) - pad, columns * (W + pad) - pad, C), 127, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):  # [H, W, C]
        y, x = i // columns * (H + pad), i % columns * (W + pad)
        sheet[y:y + H, x:x + W] = image
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet[..., 0] if C == 1 else sheet)


def save_png(image, path):
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    _replace(path, content.getvalue())


def zoom(images):
    """Enlargement that makes a small image visible in a grid."""
    return max(1, 64 // max(images.shape[-2:]))


def draw(path, caption, rows):
    """Save {name: images [n, C, H, W] in [0, 1]} as a picture with a row for each; returns its
    entry in results.json."""
    x = torch.cat([x.clamp(0, 1).cpu() for x in rows.values()])
    columns = len(next(iter(rows.values())))
    save_png(grid(x, columns=columns, scale=zoom(x)), path)
    return {"file": path.name, "caption": caption, "rows": list(rows)}


# ---------------------------------------------------------------- report


class Axes(NamedTuple):
    title: str
    x: str = ""
    y: str = ""
    log_x: bool = False
    log_y: bool = False
    floor: bool = False  # draw the floor of fid_lenet


QUALITY = "fid_lenet, lower is better"
CHARTS = {  # the part of a curve's name before "/" -> how it is drawn; others are linear
    "quality": Axes("Quality against evaluations", "network evaluations",
                    QUALITY, True, True, True),
    "seconds": Axes("Quality against time", "sampling seconds per 1,000 images, prior included",
                    QUALITY, True, True, True),
    "training": Axes("Quality against training time", "training seconds, the prior's included",
                     QUALITY, True, True, True),
    "held-out": Axes("Loss on held-out images", "training step", "squared error", False, True),
    "loss": Axes("Training loss", "training step", "weighted loss", False, True),
    "restored": Axes("Restoration", "network evaluations (0: the DIP alone)", "PSNR in dB"),
    "psnr": Axes("Deep image prior", "iteration", "PSNR in dB"),
}
NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "mse": "MSE", "mae": "MAE", "delta_e": "ΔE00",
         "kid": "KID", "psnr_oracle": "best PSNR, dB"}
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2")  # colours: --s0 … --s6 below
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-5l4.8 8.4h-9.6z",
         "M0-5.2l5.2 5.2-5.2 5.2-5.2-5.2z", "M0 5l4.8-8.4h-9.6z", "M-1.5-4.5h3v9h-3z",
         "M-4.5-1.5h9v3h-9z")
CSS = """
:root{--bg:#fdfdfb;--ink:#1c1c1a;--soft:#63635e;--line:#dcdbd5;--card:#f4f3ee;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b8578f;--s4:#c98500;--s5:#3a93c9;--s6:#1c1c1a}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e9e7e1;--soft:#a3a19a;
--line:#35383d;--card:#1e2125;
--s0:#56b4e9;--s1:#f07f2e;--s2:#1fbf91;--s3:#cc79a7;--s4:#e69f00;--s5:#3d8fd1;--s6:#e9e7e1}}
*{box-sizing:border-box}
body{max-width:66rem;margin:0 auto;padding:2rem 1.25rem 4rem;background:var(--bg);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.75rem 0 .9rem;padding-top:.7rem;border-top:1px solid var(--line)}
p,figcaption{max-width:44rem;margin:.4rem 0}.soft,small,figcaption{color:var(--soft)}
small,figcaption{font-size:.85rem}figure{margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.75rem;
margin:.75rem 0 1.5rem}
.cards div{background:var(--card);border-radius:.5rem;padding:.65rem .8rem}
.cards b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.cards b small{font-weight:400}.cards b,.cards span{white-space:nowrap}.cards span{font-size:.9rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:2rem}
.charts svg{display:block;width:100%;max-width:38rem;height:auto;margin-top:.5rem;overflow:visible}
.charts text{fill:var(--soft);font-size:13px;font-variant-numeric:tabular-nums}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.3rem 0 0;padding:0;
font-size:.9rem}
svg.key{display:inline-block;width:34px;height:12px;margin:0 .4rem 0 0;vertical-align:-1px}
.pictures{display:flex;flex-wrap:wrap;gap:1.75rem}.pictures figure{max-width:100%}
.rows{display:flex;gap:.6rem}.rows img{display:block;min-width:0;width:100%;height:auto}
.rows ol{list-style:none;display:flex;flex-direction:column;justify-content:space-around;
margin:0;padding:0;flex:none;font-size:.85rem;color:var(--soft)}
.crisp{image-rendering:pixelated}
.scroll{overflow-x:auto;margin:0 -1.25rem;padding:0 1.25rem}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .9rem .35rem 0;text-align:right;vertical-align:top;white-space:nowrap;
border-bottom:1px solid var(--line)}th{font-weight:600}td small{display:block;font-size:.88em}
th:first-child,td:first-child,.pairs td{text-align:left}
.pairs td{white-space:normal;overflow-wrap:anywhere}.pairs td:first-child{color:var(--soft)}
pre{background:var(--card);border-radius:.5rem;padding:.8rem 1rem;overflow-x:auto;font-size:.88rem}
@media(max-width:34rem){body{padding-top:1.25rem}h1{font-size:1.45rem}
.cards{gap:.5rem;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr))}
.cards b{font-size:1.3rem}.charts text{font-size:14.5px}
.rows{gap:.3rem}.rows ol{font-size:.65rem}}
@media print{@page{margin:1.4cm}:root{--bg:#fff}body{max-width:none;padding:0;font-size:10pt}
h2{break-after:avoid;margin-top:1.5rem}.charts{grid-template-columns:1fr 1fr;gap:1rem}
figure,.cards div,tr{break-inside:avoid}.scroll{overflow:visible}.cards div{border:1px solid #ccc}
pre{white-space:pre-wrap}table{font-size:8pt}th,td{padding-right:.6rem}}
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';img-src data:;style-src 'unsafe-inline'">
<style>{css}</style>
<body>{body}</body></html>
"""


def esc(value):
    return html.escape(str(value))


def _number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300


def _values(rows, key):
    return [row[key] for row in rows if _number(row.get(key))]


def show(x):
    """A value as a reader wants it, escaped: three or four digits, a dash for nothing."""
    if x is None:
        return "–"
    if not _number(x):
        return esc(json.dumps(x) if isinstance(x, (list, dict, bool)) else x)
    if isinstance(x, int) or abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.4g}" if abs(x) >= 10 else f"{x:.3g}"


def spread(values, of=0):
    """What the seeds gave: mean ± standard deviation, to two digits of that; or the one value. Of
    more seeds than there are values, their number too."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    text = show(mean)
    if deviation > 1e-9 * abs(mean):
        digits = max(0, 1 - math.floor(math.log10(deviation)))
        text = f"{mean:,.{digits}f} <small>± {deviation:,.{digits}f}</small>"
    return text + (f" <small>({len(values)} of {of} seeds)</small>" if len(values) < of else "")


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.3g}\u00a0s"  # a number and its unit stay on one line
    if seconds < 7200:
        return f"{seconds / 60:.0f}\u00a0min"
    return f"{seconds / 3600:.1f}\u00a0h"


def table(head, rows, kind=""):
    """Rows of cells that are HTML already, in a box that scrolls where the page is narrow."""
    head = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}{rows}</table></div>'


def styles(names):
    """{name: (number of its colour and marker, number of its dash)}: an arm, the first word of a
    name, keeps its colour and marker in all its settings, which differ by their dashes."""
    arms, style = {}, {}
    for name in names:
        settings = arms.setdefault(name.split(" ")[0].strip(",()"), [])
        settings.append(name)
        i = list(arms.values()).index(settings)
        style[name] = (i % len(MARKS), (i + len(settings) - 1) % len(DASHES))
    return style


def swatch(style):
    """Line, dash and marker of a series, 34 x 12: colour alone never tells."""
    i, dash = style
    return (f'<g style="color:var(--s{i})"><path d="M1 6h32" stroke="currentColor" '
            f'stroke-width="2" stroke-dasharray="{DASHES[dash]}"/><path d="{MARKS[i]}" '
            'transform="translate(17 6)" fill="currentColor"/></g>')


def inline_swatch(style):
    """A `swatch` in a line of text, for keys and tables."""
    return f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true">{swatch(style)}</svg>'


def place(values, log, a, b):
    """An axis drawn from pixel a to b: (function from a value to its pixel, ticks)."""
    f = math.log10 if log else float
    lo, hi = f(min(values)), f(max(values))
    margin = .05 * (hi - lo) or .5 * (1 if log else abs(lo) or 1)
    lo, hi = lo - margin, hi + margin
    if log:
        ticks = [m * 10.0**e for e in range(math.floor(lo), math.ceil(hi)) for m in (1, 2, 5)]
        if hi - lo > 3:
            ticks = ticks[::3]  # whole decades
        ticks = [v for v in ticks if lo <= f(v) <= hi]
    if not log or len(ticks) < 2:
        low, high = (10**lo, 10**hi) if log else (lo, hi)
        step = 10**math.floor(math.log10((high - low) / 4))
        step *= next((m for m in (1, 2, 5) if high - low <= 6 * m * step), 10)
        ticks = [float(f"{i * step:.12g}")
                 for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    few = sorted(set(values))  # evaluations are labelled one by one: 3, 5, 10, 20, 50
    few = few if len(few) <= 6 and all(v == round(v) for v in few) else []
    return lambda v: a + (f(v) - lo) / (hi - lo) * (b - a), few or ticks


def visible(point, axes):
    x, y = point
    return _number(x) and _number(y) and (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)


def thin(points):
    """At most 400 points: more become means of runs of equal length."""
    run = math.ceil(len(points) / 400) or 1
    return [tuple(map(statistics.fmean, zip(*points[i:i + run])))
            for i in range(0, len(points), run)]


def over_seeds(lines, axes):
    """Lines that stand at the same x, or whose x is a measured time -> one of (mean x, mean y,
    standard deviation of y), of the points that every seed has; else None."""
    if len({len(line) for line in lines}) != 1:
        return None
    points = [p for p in zip(*lines) if all(visible(point, axes) for point in p)]
    if "seconds" not in axes.x and any(len({x for x, _ in p}) > 1 for p in points):
        return None
    return thin([(statistics.fmean(x for x, _ in p), statistics.fmean(y for _, y in p),
                  statistics.stdev(y for _, y in p) if len(p) > 1 else 0.0) for p in points])


def plot(axes, series, style, bound=None, marks=None):
    """The inside of an SVG of 480 x 312 that shows {label: [line, ...]}, a line [[x, y], ...] for
    each seed: the mean over seeds in a band of a standard deviation, or every line where they do
    not match. `bound` is a dashed line; `marks` {text: x} are points in time. -> (text, the labels
    that are drawn, whether there are bands); the text is "" where nothing can be drawn."""
    bound = bound if axes.floor and _number(bound) and bound > 0 else None
    lines, bands = {}, {}
    for label, each in series.items():
        if mean := over_seeds(each, axes):
            lines[label] = [[(x, y) for x, y, _ in mean]]
            if len(each) > 1:
                bands[label] = mean
        elif each := [thin(seen) for line in each
                      if (seen := [point for point in line if visible(point, axes)])]:
            lines[label] = each
    if not lines:
        return "", [], False
    left, right, top, bottom = 62, 466, 12, 262
    points = [point for each in lines.values() for line in each for point in line]
    marks = {text: x for text, x in (marks or {}).items() if x > 0 or not axes.log_x}
    edges = [y + d for band in bands.values() for _, y, s in band for d in (-s, s)
             if not axes.log_y or y + d > 0]
    at_x, x_ticks = place([x for x, _ in points] + list(marks.values()), axes.log_x, left, right)
    at_y, y_ticks = place([y for _, y in points] + edges + [bound] * (bound is not None),
                          axes.log_y, bottom, top)
    svg, free = [], 0
    for v in y_ticks:
        svg.append(f'<path d="M{left} {at_y(v):.1f}H{right}" stroke="var(--line)"/>'
                   f'<text x="{left - 7}" y="{at_y(v) + 4.5:.1f}" text-anchor="end">{v:,g}'
                   "</text>")
    for v in x_ticks:
        half = 4 * len(f"{v:,g}") + 4
        if at_x(v) - half > free:
            svg.append(f'<path d="M{at_x(v):.1f} {bottom}v5" stroke="var(--soft)"/><text '
                       f'x="{at_x(v):.1f}" y="{bottom + 20}" text-anchor="middle">{v:,g}</text>')
            free = at_x(v) + half
    svg.append(f'<path d="M{left} {bottom}H{right}" stroke="var(--soft)"/>'
               f'<text x="264" y="{bottom + 42}" text-anchor="middle">{esc(axes.x)}</text>'
               f'<text transform="translate(14 137) rotate(-90)" text-anchor="middle">{axes.y}'
               "</text>")
    if bound is not None:
        svg.append(f'<path d="M{left} {at_y(bound):.1f}H{right}" stroke="var(--ink)" '
                   f'stroke-dasharray="3 4"/><text x="{left + 4}" y="{at_y(bound) - 5:.1f}">'
                   f'floor {show(bound)}</text>')
    for n, (text, x) in enumerate(marks.items()):
        side = ("end", -5) if at_x(x) > 0.8 * right else ("start", 5)
        svg.append(f'<path d="M{at_x(x):.1f} {top}V{bottom}" stroke="var(--ink)" stroke-dasharray='
                   f'"1 3"/><text x="{at_x(x) + side[1]:.1f}" y="{bottom - 8 - 16 * n}" '
                   f'text-anchor="{side[0]}">{esc(text)}</text>')
    for label, band in bands.items():
        over = [f"{at_x(x):.1f} {at_y(y + s):.1f}" for x, y, s in band]
        under = [f"{at_x(x):.1f} {at_y(y - s) if y > s or not axes.log_y else bottom:.1f}"
                 for x, y, s in reversed(band)]
        svg.append(f'<path d="M{"L".join(over + under)}z" fill="var(--s{style[label][0]})" '
                   'opacity=".18"/>')
    for label, each in lines.items():
        i, dash = style[label]
        drawn = [f'<path d="{MARKS[i]}" transform="translate({at_x(x):.1f} {at_y(y):.1f})" '
                 f'fill="currentColor"><title>{esc(label)}: {show(x)}, {show(y)}</title></path>'
                 for line in each for x, y in line if len(line) <= 30]
        path = "".join("M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in line)
                       for line in each)
        svg.append(f'<g style="color:var(--s{i})"><path d="{path}" fill="none" stroke-width="2" '
                   'stroke="currentColor" stroke-linejoin="round" stroke-dasharray='
                   f'"{DASHES[dash]}"/>{"".join(drawn)}</g>')
    return "".join(svg), list(lines), bool(bands)


BANDS = " Bands: a standard deviation over seeds."


def chart(name, series, style, bound=None, marks=None):
    """`plot` as a part of the report, with title and key; "" where nothing can be drawn. Curves
    named KIND or KIND REST are drawn as CHARTS says."""
    kind, _, rest = name.partition(" ")
    axes = CHARTS.get(kind, Axes(name))
    axes = axes._replace(title=f"{axes.title}: {rest}" if rest and kind in CHARTS else axes.title)
    svg, labels, banded = plot(axes, series, style, bound, marks)
    if not svg:
        return ""
    listed = "".join(f"<li>{inline_swatch(style[label])}{esc(label)}</li>" for label in labels
                     if label != name)
    band = BANDS * banded
    about = (f"{axes.title}: {axes.y or 'value'} by {axes.x or 'position'}; "
             f"{', '.join(labels)}.{band}")
    return (f'<figure><b>{esc(axes.title)}</b><svg viewBox="0 0 480 312" role="img" aria-label='
            f'"{esc(about)}">{svg}</svg><ul>{listed}</ul>'
            f'{f"<small>{band}</small>" if band else ""}</figure>')


def figure(path):
    """PATH.json -> PATH.svg, a picture for a README: panels from left to right, each of {"axes":
    fields of Axes, "series": as in `plot`, "floor"}. ValueError where the file is no such thing."""
    try:
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        drawn, below = [], 0
        style = styles(dict.fromkeys(label for panel in panels for label in panel["series"]))
        for i, panel in enumerate(panels):
            axes = Axes(**panel["axes"])
            svg, labels, banded = plot(axes, panel["series"], style, panel.get("floor"))
            x, y, below_it = 0, 358, []
            for label in labels:
                wide = 58 + 7.4 * len(label)  # of 13-pixel letters
                if x + wide > 480:
                    x, y = 0, y + 22
                below_it.append(f'<g transform="translate({x} {y - 11})">{swatch(style[label])}'
                                f'<text class="ink" x="40" y="11">{esc(label)}</text></g>')
                x += wide
            if banded:
                y += 22
                below_it.append(f'<text y="{y}">{BANDS.strip()}</text>')
            drawn.append(f'<g transform="translate({12 + 510 * i} 0)"><text class="ink" y="22" '
                         f'font-weight="600">{esc(axes.title)}</text>'
                         f'<g transform="translate(0 30)">{svg}</g>{"".join(below_it)}</g>')
            below = max(below, y)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no figure: {error!r}") from error
    colours = CSS[CSS.index(":root"):CSS.index("*{box-sizing")].replace("screen and ", "")
    write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {510 * len(panels)} '
               f'{below + 14}" font-family="system-ui,sans-serif" font-size="13"><style>{colours}'
               "text{fill:var(--soft)}.ink{fill:var(--ink)}</style>"
               f'<rect width="100%" height="100%" fill="var(--bg)"/>{"".join(drawn)}</svg>\n',
               path.with_suffix(".svg"))


# With its name and evaluations these make an arm's row.
SETTING = ("task", "sigma", "train", "t_start", "eta", "order", "grid")


def _groups(arms):
    """Rows that differ only in their seed, together: {(name, nfe, *SETTING): [row, ...]}. Of a
    seed that comes twice the last row counts."""
    groups = {}
    for arm in arms:
        key = (str(arm.get("name", "–")), *map(arm.get, ("nfe", *SETTING)))
        groups.setdefault(key, {})[str(arm.get("seed"))] = arm
    return {key: list(rows.values()) for key, rows in groups.items()}


def _cards(results, arms, style):
    """Headlines: each arm's best setting, by fid_lenet if there is one, else PSNR; the cost."""
    key, sign = ("fid_lenet", 1) if _values(arms, "fid_lenet") else ("psnr", -1)
    tasks = {arm.get("task") for arm in arms}
    best, cards = {}, []  # (small title, number, small print)
    for (name, nfe, task, sigma, *_), rows in _groups(arms).items():
        if values := _values(rows, key):  # a card for each arm; of several tasks, for each of these
            title = (f"{task}, sigma {show(sigma)}", None) if len(tasks) > 1 else (name, name)
            best.setdefault(title, []).append((sign * statistics.fmean(values), name, nfe, rows))
    for (title, arm), settings in best.items():
        _, name, nfe, rows = min(settings, key=lambda setting: setting[0])
        seconds = _values(rows, "seconds")
        detail = ["" if arm else name, f"{show(nfe)} evaluations" if nfe else "",
                  duration(statistics.fmean(seconds)) if seconds else ""]
        unit = " <small>dB</small>" if key == "psnr" else ""
        cards.append(((inline_swatch(style[arm]) if arm else "") + esc(title),
                      spread(_values(rows, key)) + unit, esc(" · ".join(filter(None, detail)))))
    bound, seconds = results.get("floor") or {}, results.get("seconds") or {}
    if _number(bound.get("fid_lenet")):
        cards.append(("floor", show(bound["fid_lenet"]) + over_images(bound.get("std")),
                      f"fid_lenet of {show(bound.get('samples'))} training images"))
    if _number(results.get("parameters")):
        cards.append(("parameters", show(results["parameters"]), "in the diffusion network"))
    if _number(seconds.get("total")):
        parts = [f"{esc(k)} {duration(v)}" for k, v in seconds.items()
                 if k != "total" and _number(v) and v > 0]
        runs = len(results["runs"])
        cards.append(("time in all" if runs == 1 else f"time of {runs} runs",
                      duration(seconds["total"]), " · ".join(parts)))
    cards = [f"<div><span>{a}</span><b>{b}</b><small>{c}</small></div>" for a, b, c in cards]
    seeds = len({str(arm.get("seed")) for arm in arms})
    of_each = "arm" if len(tasks) == 1 else "task"
    note = f"Best setting of each {of_each} by {NAMES.get(key, key)}" + (
        f", mean ± standard deviation over {seeds} seeds." if seeds > 1 else "; one seed.")
    return ((f'<p class="soft">{note}</p>' if best else "")
            + (f'<div class="cards">{"".join(cards)}</div>' if cards else ""))


def _picture(picture, folder):
    """A PNG of the run's folder, with the names of its rows where the entry has them."""
    path, caption = folder / Path(str(picture.get("file"))).name, esc(picture.get("caption") or "")
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return f"<figure><figcaption>{esc(path.name)} {why}. {caption}</figcaption></figure>"
    # small pictures are enlarged by whole factors, so that every pixel is drawn alike
    scale = max(1, min(3, 960 // width, 480 // height))
    names = [esc(name) for name in picture.get("rows") or []]
    rows = f"<ol aria-hidden=\"true\"><li>{'<li>'.join(names)}</ol>" if names else ""
    alt = f"{caption} Rows: {', '.join(names)}." if names else caption
    wide = f"calc({width * scale}px + 5rem)" if names else f"{width * scale}px"
    return (f'<figure style="width:{wide}"><div class="rows">{rows}<img alt="{alt}" '
            f'class="{"crisp" if width <= 700 else ""}" src="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}"></div><figcaption>{caption}</figcaption>'
            "</figure>")


def over_images(deviation):
    return f" <small>± {show(deviation)}</small>" if _number(deviation) else ""


def by_task(arms):
    """{(task, sigma): its rows}."""
    tasks = {}
    for arm in arms:
        tasks.setdefault((arm.get("task"), arm.get("sigma")), []).append(arm)
    return tasks


def told(arms, name, setting):
    """Of a row's setting, "t_start 300, order 2": what differs between the rows of its arm."""
    mine = [arm for arm in arms if str(arm.get("name", "–")) == name]
    return ", ".join(f"{k} {show(v)}" for k, v in zip(SETTING[2:], setting[2:])
                     if v is not None and len({str(arm.get(k)) for arm in mine}) > 1)


def markdown(cells):
    """Rows of texts, the head first, as a Markdown table: the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    drawn = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                               enumerate(zip(row, widths))) + " |" for row in cells]
    ruler = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":")
                           for i, w in enumerate(widths)) + "|"
    return "\n".join([drawn[0], ruler, *drawn[1:]])


def text_tables(folders, keys=("fid_lenet", "psnr")):
    """Arms × evaluations of finished runs as Markdown, a table for each task and each of `keys`
    that it has: mean ± standard deviation over seeds, and seconds."""
    results, lines = merge([read_results(folder) for folder in folders]), []
    for (task, sigma), arms in by_task(results["arms"]).items():
        for key in keys:
            rows, heads = {}, set()
            for (name, nfe, *setting), group in _groups(arms).items():
                if values := _values(group, key):
                    took = _values(group, "seconds") if key in ("fid_lenet", "psnr") else []
                    label = f"{name} {told(arms, name, setting)}".strip()
                    rows.setdefault(label, {})[nfe] = re.sub("<.*?>", "", spread(values)) + (
                        f" ({duration(statistics.fmean(took))})" if took else "")
                    heads.add(nfe)
            if not rows:
                continue
            heads = sorted(heads, key=lambda nfe: (nfe is not None, nfe))
            floor = (results.get("floor") or {}).get("fid_lenet")
            title = " ".join([f"{task}, sigma {show(sigma)}:" if task else "", NAMES.get(key, key),
                              f"(floor {show(floor)})" if key == "fid_lenet" and floor else ""])
            cells = [["evaluations", *("none" if nfe is None else show(nfe) for nfe in heads)]]
            cells += [[label, *(row.get(nfe, "") for nfe in heads)] for label, row in rows.items()]
            lines += ["", title.strip(), "", markdown(cells)]
    return "\n".join(lines)


def _pivot(arms, style):
    """The tables of arms, one for each task: arms × evaluations with fid_lenet (or PSNR) and
    seconds in a cell; without evaluations arms × measures."""
    return "".join(_table_of_arms(rows, style, *which) for which, rows in by_task(arms).items())


def _table_of_arms(arms, style, task, sigma):
    key = next((key for key in ("fid_lenet", "psnr")
                if _values(arms, "nfe") and _values(arms, key)), None)
    rows, heads, seeds = {}, {}, len({str(arm.get("seed")) for arm in arms})
    for (name, nfe, *setting), group in _groups(arms).items():
        if key:
            seconds = _values(group, "seconds")
            below = f"<small>{duration(statistics.fmean(seconds))}</small>" if seconds else ""
            cells = {nfe: spread(_values(group, key), seeds) + below}
        else:
            cells = {NAMES.get(k, k): spread(_values(group, k), seeds) if seeds > 1
                     else show(group[0][k]) + over_images(group[0].get(f"{k}_std"))
                     for k in group[0] if k not in ("seed", *SETTING)
                     and not k.endswith("_std") and _values(group, k)}
        rows.setdefault((name, *setting), {}).update(cells)
        heads.update(dict.fromkeys(cells))
    if not heads:
        return ""
    heads = sorted(heads, key=lambda k: (k is not None, k)) if key else list(heads)
    body = []
    for (name, *setting), cells in rows.items():
        body.append([f"{inline_swatch(style[name])}{esc(name)} "
                     f"<small>{told(arms, name, setting)}</small>",
                     *(cells.get(k, "–") for k in heads)])
    caption = f"{NAMES.get(key, key)} by network evaluations, with the time. " if key else ""
    caption += (f"Mean ± standard deviation over {seeds} seeds." if seeds > 1
                else "One seed." if key else "One seed; mean ± standard deviation over images.")
    title = "Arms" if task is None else f"{task}, sigma {show(sigma)}"
    return f'<h2>{esc(title)}</h2><p class="soft">{caption}</p>' + table(
        ["arm", *("none" if head is None else show(head) for head in heads)], body)


SHAPES = {"config": dict, "data": dict, "features": dict, "seconds": dict, "curves": dict,
          "marks": dict, "arms": list, "pictures": list, "notes": list}


def read_results(folder):
    """FOLDER/results.json, with its folder; ValueError, which names the file, if it is not one."""
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no run there (no results.json)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(results, dict):
        raise ValueError(f"{path} holds no JSON object")
    results = {key: value for key, value in results.items() if value is not None}
    floor = results.get("floor", {})
    if isinstance(floor, (int, float)):
        results["floor"] = {"fid_lenet": floor}
    for key, kind in (SHAPES | {"floor": dict}).items():
        if not isinstance(results.get(key, kind()), kind):
            raise ValueError(f"{path}: {key} is {type(results[key]).__name__}, no {kind.__name__}")
    for key, kind in ("arms", dict), ("pictures", dict), ("notes", str):
        if not all(isinstance(item, kind) for item in results.get(key, [])):
            raise ValueError(f"{path}: {key} holds what is no {kind.__name__}")
    for name, points in results.get("curves", {}).items():
        if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2
                                                   for p in points):
            raise ValueError(f"{path}: curve {name} is no list of [x, y]")
    if not all(isinstance(texts, dict) for texts in results.get("marks", {}).values()):
        raise ValueError(f"{path}: marks are no {{curve: {{text: x}}}}")
    for arm in results.get("arms", []):
        if not (arm.get("nfe") is None or _number(arm["nfe"])):
            raise ValueError(f"{path}: nfe {arm['nfe']!r} is no number")
    return results | {"folder": Path(folder)}


RUNS_OWN = ("seed", "out", "resume", "overwrite", "sweep", "data_dir")  # no setting of the method


def identity(run):
    """What must agree before numbers of two runs may be averaged: flags, data, features, device.
    Threads need not: they change seconds only, which `merge` then leaves out."""
    def part(key):
        return run.get(key, {})
    return part("config") | {
        "data": part("data").get("name"), "data sha256": (part("data").get("sha256") or "")[:12],
        "features": (part("features").get("checksum") or "")[:12],
        "device": (run.get("device") or "").partition(",")[0],
        "floor samples": part("floor").get("samples")}


def merge(runs):
    """Results of one or more runs as one. Runs of one `identity` but for their seed stand together;
    else every name says what differs. A flag that an older run did not know is no difference. A
    curve becomes a list with a line for each seed."""
    configs = [identity(run) for run in runs]
    known = {k: v for config in configs for k, v in config.items()}
    same = {k: v for k, v in known.items()
            if len({json.dumps(config[k]) for config in configs if k in config}) == 1}
    differ = [k for k in known if k not in same and k not in RUNS_OWN]
    whole = {"arms": [], "curves": {}, "marks": {}, "pictures": [], "notes": [], "runs": []}
    labels = [", ".join(f"{k} {show(config[k])}" for k in differ if config.get(k) is not None)
              for config in configs]
    clocks, shown = {}, set()
    for run, label in zip(runs, labels):
        clocks.setdefault(label, set()).add(str(run.get("device")))
    for run, config, label in zip(runs, configs, labels):
        unlike = ("seconds", "prior_seconds") if len(clocks[label]) > 1 else ()
        if unlike:
            whole["notes"].append(f"no seconds: runs on {' and '.join(sorted(clocks[label]))} are "
                                  "averaged")
        label = f" ({label})" if label else ""
        whole["arms"] += [{k: v for k, v in row.items() if k not in unlike}
                          | {"name": f"{row.get('name', '–')}{label}"}
                          for row in run.get("arms") or []]
        for name, points in (run.get("curves") or {}).items():
            whole["curves"].setdefault(f"{name}{label}", []).append(points or [])
        for name, marks in (run.get("marks") or {}).items():
            for text, x in marks.items():
                whole["marks"].setdefault(name.partition("/")[0], {}).setdefault(
                    text + label, []).append(x)
        if label not in shown:
            whole["pictures"] += [(picture | {"caption": f"{picture.get('caption') or ''}{label}"},
                                   run["folder"]) for picture in run.get("pictures") or []]
        shown.add(label)
        whole["notes"] += run.get("notes") or []
        whole["runs"].append([run["folder"].resolve().name, config.get("seed"), label.strip(" ()"),
                              (run.get("seconds") or {}).get("total"), run.get("commit")])
    whole["notes"] = list(dict.fromkeys(whole["notes"]))
    seconds = [run.get("seconds") or {} for run in runs]
    whole["seconds"] = {k: sum(s[k] for s in seconds if _number(s.get(k)))
                        for k in dict.fromkeys(k for s in seconds for k in s)}
    return runs[0] | whole | {"config": {k: v for k, v in same.items() if v != ""}}


def report(folder):
    """FOLDER/results.json -> FOLDER/report.html: one file, no script, nothing fetched.

    Any key may be missing; its part of the page is then left out. Headline numbers are means over
    the seeds of one setting, never the best seed. ValueError if results.json is no JSON object.
    """
    results = merge([read_results(folder)])
    title = f"{results.get('mode', 'results')} · {_data_name(results)}"
    write_text(_page(title, results), Path(folder) / "report.html")


def compare(folders, path):
    """One page of several runs: what differs only in its seed becomes mean ± standard deviation,
    and bands in the curves. ValueError if a results.json is no JSON object."""
    results = merge([read_results(folder) for folder in folders])
    write_text(_page(f"{len(folders)} runs · {_data_name(results)}", results), Path(path))


def _data_name(results):
    return (results.get("data") or {}).get("name") or results["folder"].resolve().name


def _page(title, results):
    """The whole page of merged results, as text."""
    arms, charts = results["arms"], {}
    for name, lines in results["curves"].items():
        kind, _, label = name.partition("/")
        charts.setdefault(kind, {})[label or kind] = lines
    names = [name for name, *_ in _groups(arms)]
    known = {name.split(" ")[0] for name in names}  # charts of other things count from one again
    names += [label for c in charts.values() for label in c if label.split(" ")[0] in known]
    style = styles(dict.fromkeys(names))
    bound = (results.get("floor") or {}).get("fid_lenet")
    marks = {kind: {text: statistics.fmean(filter(_number, x)) for text, x in texts.items()
                    if any(map(_number, x))} for kind, texts in results["marks"].items()}
    first = [kind for known in CHARTS for kind in charts if kind.split(" ")[0] == known]
    figures = "".join(chart(kind, charts[kind], styles(charts[kind]) | style, bound,
                            marks.get(kind))
                      for kind in dict.fromkeys([*first, *charts]))
    pictures = "".join(_picture(picture, folder) for picture, folder in results["pictures"])
    columns = list(dict.fromkeys(key for arm in arms for key in arm))
    several = len(results["runs"]) > 1
    setting = {k: results.get(k) for k in ("device", "precision", "torch", "commit")
               if not several or k != "commit"}
    for part in ("data", "features"):
        setting |= {f"{part} {k}": v for k, v in (results.get(part) or {}).items()}
    setting |= results["config"]
    setting = [(esc(k), esc(v)) for k, v in setting.items() if v is not None]
    where = " · ".join(str(results[k]) for k in ("device", "precision") if results.get(k))
    runs = [[esc(name), show(seed), esc(flags or "–"),
             duration(seconds) if _number(seconds) else "–", esc((commit or "–")[:9])]
            for name, seed, flags, seconds, commit in results["runs"]]
    command = results.get("command")
    body = "".join((
        f'<h1>{esc(title)}</h1><p class="soft">{esc(where)}</p>{_cards(results, arms, style)}',
        *(f"<p>{esc(note)}</p>" for note in results["notes"]),
        _pivot(arms, style),
        f'<h2>Curves</h2><div class="charts">{figures}</div>' if figures else "",
        f'<h2>Pictures</h2><div class="pictures">{pictures}</div>' if pictures else "",
        "<h2>Every row</h2>" + table(map(esc, columns), [[show(arm.get(k)) for k in columns]
                                                         for arm in arms]) if columns else "",
        "<h2>Runs</h2>" + table(("run", "seed", "flags", "time", "commit"), runs)
        if several else "",
        f"<h2>Command</h2><pre>{esc(command)}</pre>" if command and not several else "",
        "<h2>Configuration</h2>" + table((), setting, "pairs") if setting else ""))
    return PAGE.format(title=esc(title), css=CSS, body=body)


# ---------------------------------------------------------------- command line


def _open(path):
    """A picture file, upright, 8 or 16 bits -> [1, 1 or 3, H, W] in [0, 1]; opacity is left out.
    ValueError, which names the file, if it cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError(f"samples of mode {image.mode} have no known range")
            if image.mode.startswith("I;16"):  # which convert() would clip
                pixels, scale = np.asarray(image).astype(np.float64), 65535
            else:
                pixels, scale = np.array(image.convert("L" if image.mode in ("1", "L", "LA")
                                                       else "RGB")), 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)[None].double() / scale


def main(arguments=None):
    """Exit status 0, or 2 and one line on stderr."""
    paths = [Path(p) for p in (sys.argv[1:] if arguments is None else arguments)]
    try:
        if paths and str(paths[0]) in ("-h", "--help"):
            print(__doc__)
        elif missing := [p for p in paths if not p.exists()]:
            raise ValueError(f"{missing[0]} does not exist")
        elif paths and all(path.suffix == ".json" for path in paths):
            for path in paths:
                figure(path)
                print(path.with_suffix(".svg"))
        elif len(paths) == 2 and all(path.is_file() for path in paths):
            a, b = map(_open, paths)
            if a.shape[2:] != b.shape[2:]:
                sizes = [f"{path} is {x.shape[3]}×{x.shape[2]}" for path, x in zip(paths, (a, b))]
                raise ValueError(", ".join(sizes))
            if a.shape != b.shape:  # one of them is grey
                a, b = (x.expand(-1, 3, -1, -1) for x in (a, b))
            for measure in (mse, mae, psnr, ssim, delta_e):
                print(f"{measure.__name__:8}{measure(a, b).item():.6g}")
        elif paths and all(path.is_dir() for path in paths):
            for path in paths:
                report(path)
                print(path / "report.html")
            print(text_tables(paths, ("fid_lenet", "recall", "nearest", "psnr", "ssim")))
            if len(paths) > 1:
                together = Path(os.path.commonpath([p.resolve() for p in paths]))
                compare(paths, together / "comparison.html")
                print(together / "comparison.html")
        else:
            raise ValueError("two pictures, some run folders or some figures' data expected")
    except (OSError, ValueError) as error:
        print("eval:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
