"""Measures, pictures and the report: everything that looks at a result and nothing that makes one.

`python eval.py A.png B.png` prints the image measures of two pictures. `python eval.py RUN...`
prints tables of finished runs and writes RUN/report.html or, of several, comparison.html.

Every measure raises ValueError, which names the shape, the range or the NaN that it cannot take.

`fid_lenet` is the Fréchet distance in the features of a LeNet trained here on the data set's own
training split. It is comparable between results that carry the same network checksum and sample
count, is read beside its floor (real against real), and is not the Inception FID of the papers.
"""
import base64
import hashlib
import io
import json
import math
import os
import statistics
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # before a user's own data.py
import data

# ---------------------------------------------------------------- image against image


BLOCK = 200_000  # values that stay in a CPU's cache: ten times as fast, and little memory


def _mean(f, a, b, data_range, lost=0):
    """Means over an image's pixels of f(a, b), which has a value for each of them but `lost` rows:
    [N, C, H, W] twice -> float64 [N]. f is called in float64, scaled to [0, 1], with blocks of
    images or of rows. ValueError unless both are finite floats of one shape in [0, data_range]."""
    if a.shape != b.shape or a.dim() != 4 or a.numel() == 0:
        raise ValueError("two image batches of one shape [N, C, H, W] expected, "
                         f"not {list(a.shape)} and {list(b.shape)}")
    if not 0 < data_range < math.inf:
        raise ValueError(f"a data_range above 0 expected, not {data_range}")
    for which, x in (("first", a), ("second", b)):
        if not x.is_floating_point():
            raise ValueError(f"the {which} images are {x.dtype}: scale them to floats in [0, 1]")
        low, high = (v.item() for v in x.aminmax())
        if not (low >= -1e-3 * data_range and high <= 1.001 * data_range):  # false for NaN, too
            raise ValueError(f"the {which} images lie in [{low:.4g}, {high:.4g}], not in "
                             f"[0, {data_range:g}]: scale them or give data_range")
    (_, C, H, W), means = a.shape, []
    images, rows = (max(1, BLOCK // size) for size in (C * H * W, C * W))
    for x, y in zip(a.split(images), b.split(images)):
        total, count = 0, 0
        for top in range(0, H - lost, rows):
            part = (v[:, :, top:top + rows + lost].double() / data_range for v in (x, y))
            values = f(*part).flatten(1)
            total, count = total + values.sum(1), count + values.shape[1]
        means.append(total / count)
    return torch.cat(means)


def mse(a, b, data_range=1.0):
    """Mean of ((a - b) / data_range)² over C, H, W: [N, C, H, W] twice -> float64 [N], no unit."""
    return _mean(lambda a, b: (a - b).square(), a, b, data_range)


def mae(a, b, data_range=1.0):
    """Mean of |a - b| / data_range over C, H, W: [N, C, H, W] twice -> float64 [N], no unit."""
    return _mean(lambda a, b: (a - b).abs(), a, b, data_range)


def psnr(a, b, data_range=1.0):
    """-10 log10 of `mse`: [N, C, H, W] twice -> float64 [N] in dB, inf where equal."""
    return 10 * mse(a, b, data_range).reciprocal().log10()


def ssim(a, b, data_range=1.0):
    """Structural similarity (Wang et al. 2004, eq. 13): [N, C, H, W] twice -> float64 [N] in
    [-1, 1].

    (2 μa μb + c1)(2 σab + c2) / ((μa² + μb² + c1)(σa² + σb² + c2)), c = (K data_range)², K1 = 0.01,
    K2 = 0.03; moments under a Gaussian of σ = 1.5 in an 11×11 window, population covariance,
    averaged over the pixels whose window lies inside the image, then over channels. The window
    shrinks to the largest odd size that fits smaller images.
    """
    size = min(11, *a.shape[2:])
    size -= 1 - size % 2
    w = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    w = torch.exp(-w.square() / (2 * 1.5**2))
    w = (w / w.sum()).tolist()

    def mean(x):  # under the window, one axis after the other, as sums of shifted images
        x = sum(w[i] * x[:, :, i:x.shape[2] - size + 1 + i] for i in range(size))
        return sum(w[i] * x[..., i:x.shape[3] - size + 1 + i] for i in range(size))

    def similarity(a, b):
        mu_a, mu_b = mean(a), mean(b)
        var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
        return ((2 * mu_a * mu_b + 0.01**2) * (2 * cov + 0.03**2)
                / ((mu_a**2 + mu_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)))

    return _mean(similarity, a, b, data_range, lost=size - 1)


def delta_e(a, b, data_range=1.0):
    """Mean CIEDE2000 over pixels: sRGB [N, 3, H, W] (or grey [N, 1, H, W]) twice -> float64 [N], in
    units of a just noticeable difference, roughly."""
    if a.dim() == 4 and a.shape[1] not in (1, 3):
        raise ValueError(f"colour differences are of 1 or 3 channels, not {a.shape[1]}")
    return _mean(lambda a, b: ciede2000(*(lab(x.expand(-1, 3, -1, -1)) for x in (a, b))), a, b,
                 data_range)


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
        c = c.square().square() * c.square() * c
        return (c / (c + 25**7)).sqrt()

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
        row |= {f.__name__: v.mean().item(), f"{f.__name__}_std": v.std(correction=0).item()}
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
    rows = torch.stack([torch.randperm(len(x), generator=generator)[:m]
                        for _ in range(subsets) for x in (f, g)]).to(f.device)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1)**3

    estimates = torch.empty(subsets, dtype=f.dtype, device=f.device)
    for i in range(subsets):
        x, y = f[rows[2 * i]], g[rows[2 * i + 1]]
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
        estimates[i] = within - 2 * xy.mean()
    return estimates.mean().item(), estimates.std(correction=0).item()


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


def feature_network(pixels, labels, name, cache_dirs, seed=0, device="cpu", epochs=3):
    """The LeNet of a data set, from the first cache that holds it, else trained on the whole split.

    `pixels` uint8 [N, C, H, W], `labels` int64 [N]. `seed` fixes initialisation, order and shifts;
    no global random state changes. The first folder of `cache_dirs` that can be written gets it. A
    part of a data set gives another network than the whole, hence distances that do not compare.
    """
    if labels is None or labels.shape != pixels.shape[:1] or labels.min() < 0:
        raise ValueError("features need for each image a label from 0 on, not "
                         f"{None if labels is None else list(labels.shape)}")
    digest = hashlib.sha256(f"{LENET_VERSION} {seed} {epochs} {list(pixels.shape)}".encode())
    for x in (pixels, labels.long()):
        digest.update(x.cpu().contiguous().numpy())
    file = f"features-{Path(name).name}-{digest.hexdigest()[:16]}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = LeNet(pixels.shape[1], int(labels.max()) + 1)

    # the weights: from a file that is whole, else by training
    paths = [Path(folder) / file for folder in cache_dirs]
    if not any(_load(net, path) for path in paths):
        _fit(net.to(device), pixels.to(device), labels.to(device), seed, epochs)
        state = {key: value.cpu() for key, value in net.state_dict().items()}
        torch.save({"state": state}, content := io.BytesIO())
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content.getbuffer())
                break
            except OSError:
                continue  # read-only: try the next one; a missing cache only costs time
    return net.to(device).eval().requires_grad_(False)


def _load(net, path):
    """Whether a file holds weights of `net`, which it then has."""
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state"])
    except Exception:  # none is there, or a damaged one, which can raise nearly anything
        return False
    return True


def checksum(state):
    """sha256 of a network's weights, a state_dict(), which names the features of a result."""
    content = b"".join(value.cpu().numpy().tobytes() for value in state.values())
    return hashlib.sha256(content).hexdigest()


def _fit(net, pixels, labels, seed, epochs, batch=128):
    """Cross-entropy, Adam, one-cycle rate, in place.

    Smoothed labels and shifts by up to 2 pixels keep the network from knowing its training images,
    which would raise the floor. On a CPU one thread, so that the weights do not depend on the
    number of cores.
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


@torch.no_grad()
def features(net, images, batch=1000):
    """Of images [N, C, H, W] (uint8, or floats in [0, 1]), in a LeNet: float32 [N, 84]."""
    device = net.fc1.weight.device
    return torch.cat([net(_unit(part.to(device)))[0] for part in images.split(batch)])


def subset(N, n, number=0):
    """Fixed numbers of n of N images, int64 [n]. At random: a stride meets the period of data sets
    that store their classes in turn, and the first n are no more typical."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(number))[:n]


def floor(net, pixels, real, manifold, samples, subsets=5):
    """What a perfect generator would score: means over random subsets of `samples` training images,
    and fid_lenet's deviation, `std`. It falls with the count, so that is the generated ones'.
    `real` [M, 84] are the test split's features, `manifold` those for recall. ValueError if there
    are fewer training images."""
    if not 4 <= samples <= len(pixels):  # recall needs three neighbours
        raise ValueError(f"a floor of {samples} images from a split of {len(pixels)}")
    sets = [features(net, pixels[subset(len(pixels), samples, number).to(pixels.device)])
            for number in range(subsets)]
    distances = [frechet_distance(f, real) for f in sets]
    precision, recall = map(statistics.fmean, zip(*(precision_recall(f, manifold) for f in sets)))
    return {"fid_lenet": statistics.fmean(distances), "std": statistics.stdev(distances),
            "samples": samples, "precision": precision, "recall": recall}


# ---------------------------------------------------------------- a set's judge


class Judge:
    """Measures sets of n samples. Where there are labels: against the test split, in the features
    of a LeNet trained on the whole training split. For copying: the L2 distance over pixels in
    [0, 1] of each sample to the nearest training image and to its own source. `train` and `test`
    are data.Images, `pixels` the training images that were used, on the device to measure on.
    `seconds` is what all took."""

    def __init__(self, train, pixels, test, n, cache_dirs):
        began, device = time.time(), pixels.device
        self.lenet, self.n, self.pixels = None, n, pixels
        held_out = subset(len(test.pixels), n)
        self.real = self.copying(test.pixels[held_out].to(device))
        if train.labels is not None and min(n, len(test.pixels)) > 3:  # three neighbours and itself
            self.lenet = feature_network(train.pixels, train.labels, train.name, cache_dirs,
                                         device=device)
            self.features = features(self.lenet, test.pixels)
            self.about = {"name": train.name, "checksum": checksum(self.lenet.state_dict())}
            # as many real images as generated ones, as recall asks for
            self.manifold = self.features[held_out.to(device)]
            self.floor = floor(self.lenet, train.pixels, self.features, self.manifold, n)
        self.seconds = time.time() - began

    def copying(self, x):
        """Distances to the nearest training image, as a flat dictionary."""
        d = nearest(x, self.pixels)
        return {"nearest": d.mean().item(), "nearest_5": d.quantile(0.05).item()}

    def __call__(self, x, sources=None):
        """x [n, C, H, W] in [-1, 1], its uint8 sources -> the set's measures, a flat dictionary."""
        began, x, row = time.time(), (x + 1) / 2, {}
        if self.lenet is not None:
            f = features(self.lenet, x)
            row["fid_lenet"] = frechet_distance(f, self.features)
            row["kid"], row["kid_std"] = kid(f, self.features)
            row["precision"], row["recall"] = precision_recall(f, self.manifold)
        row |= self.copying(x)
        if sources is not None:
            own = (x - sources.float() / 255).flatten(1).norm(dim=1)
            row["own_source"] = own.mean().item()
        self.seconds += time.time() - began
        return row

    def summary(self):
        """The parts of results.json that are about the measuring."""
        notes = [f"{self.n} real test images lie {self.real['nearest']:.3f} from their nearest "
                 f"training image (mean; 5th percentile {self.real['nearest_5']:.3f})"]
        if self.lenet is None:
            notes.append("no labels, or too few images: no LeNet features, no fid_lenet")
            return {"notes": notes, "real": self.real}
        return {"floor": self.floor, "notes": notes, "real": self.real, "features": self.about}


# ---------------------------------------------------------------- files


def print_anything():
    """Escape what a terminal cannot encode: no output may end a run."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def write_bytes(path, content):
    """Write under a temporary name and rename when the disk has it all: whoever reads, be it after
    a crash, finds the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(text, path):
    write_bytes(path, text.encode(errors="replace"))


def write_json(value, path, digits=6):
    """Strict JSON, floats to so many significant digits (17 keep every bit). NaN and infinities,
    which it cannot hold, become null."""
    def plain(x):
        if isinstance(x, dict):
            return {str(key): plain(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(item) for item in x]
        if isinstance(x, float):
            return float(f"{x:.{digits}g}") if math.isfinite(x) else None
        return x

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
    write_bytes(path, content.getbuffer())


def zoom(images):
    """Enlargement that makes a small image visible in a grid."""
    return max(1, 64 // max(images.shape[-2:]))


def draw(path, caption, rows):
    """Save {name: images [n, C, H, W] in [0, 1]} as a picture with a row for each; returns its
    entry in results.json."""
    x = torch.cat([x.clamp(0, 1).cpu() for x in rows.values()])
    save_png(grid(x, columns=len(x) // len(rows), scale=zoom(x)), path)
    return {"file": path.name, "caption": caption, "rows": list(rows)}


# ---------------------------------------------------------------- runs and their tables

RUNS_OWN = ("seed", "out", "resume", "data_dir")  # flags that are no setting of the method
SETTING = ("t_start", "eta", "train")  # what tells the rows of an arm apart, beside evaluations
KEYS = ("fid_lenet", "precision", "recall", "nearest", "psnr", "ssim")


def alike(folders):
    """Finished runs [[(folder, its results), ...], ...]: those that differ only in their seed stand
    together. Flags, data, features and device must agree before numbers may be averaged; of a seed
    that comes twice the last counts."""
    groups = {}
    for folder in map(Path, folders):
        run = json.loads((folder / "results.json").read_text())
        flags = run.get("config", {})
        same = [(key, flags[key]) for key in sorted(flags) if key not in RUNS_OWN]
        same = json.dumps([same, *map(run.get, ("mode", "data", "features", "device"))])
        groups.setdefault(same, {})[flags.get("seed")] = folder, run
    return [list(runs.values()) for runs in groups.values()]


def rows_of(runs):
    """{task: {setting: rows of all seeds}}. A setting is the arm and what tells a row apart from
    the arm's other rows of that task: "gauss t_start 600"."""
    rows, found = [row for _, run in runs for row in run.get("arms", [])], {}
    for row in rows:
        task, name = row.get("task", ""), row["name"]
        mine = [other for other in rows if (other.get("task", ""), other["name"]) == (task, name)]
        apart = [f"{key} {row[key]}" for key in SETTING if key in row
                 and len({other.get(key) for other in mine}) > 1]
        setting = " ".join([name, ", ".join(apart)]).strip()
        found.setdefault(task, {}).setdefault(setting, []).append(row)
    return found


def values(rows, key):
    return [row[key] for row in rows if isinstance(row.get(key), (int, float))]


def show(x):
    """A number as a reader wants it: three or four digits."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}" if abs(x) >= 10 else f"{x:.3g}"


def cell(rows, key):
    """The text of a measure: mean ± standard deviation over the rows' seeds; a dash where one of
    these is missing; beside what ranks the arms, their seconds."""
    seen, seconds = values(rows, key), values(rows, "seconds")
    if not seen or len(seen) < len(rows):
        return "–"
    text = show(statistics.fmean(seen))
    if len(seen) > 1:
        text += f" ± {show(statistics.stdev(seen))}"
    if key in ("fid_lenet", "psnr") and seconds:
        text += f" ({show(statistics.fmean(seconds))} s)"
    return text


def tables(runs, keys=()):
    """Runs that are alike -> (title, [head, row, ...]) for each task: settings × evaluations for
    each of `keys` (or KEYS); where nothing was evaluated settings × `keys` (or all)."""
    over = f"mean ± standard deviation over {len(runs)} seeds" if len(runs) > 1 else "one seed"
    for task, settings in rows_of(runs).items():
        rows = [row for mine in settings.values() for row in mine]
        nfes = sorted({row.get("nfe", 0) for row in rows})
        found = [key for key in dict.fromkeys(key for row in rows for key in row)
                 if values(rows, key) and key[-4:] != "_std"]

        def table(title, corner, columns):  # {head: (evaluations, measure)}
            return ", ".join(filter(None, (task, *title, over))), [[corner, *columns]] + [
                [setting, *(cell([row for row in mine if row.get("nfe", 0) == nfe], key)
                            for nfe, key in columns.values())]
                for setting, mine in settings.items()]

        if nfes == [0]:
            measured = [key for key in found if key not in ("seed", "sigma", *SETTING)]
            yield table([], "arm", {key: (0, key) for key in keys or measured if key in found})
            continue
        for key in [key for key in keys or KEYS if key in found]:
            floor = runs[0][1].get("floor", {}).get(key)
            word = "floor" if key == "fid_lenet" else "real images"
            yield table([key, f"{word} {show(floor)}" if floor else ""], "evaluations",
                        {str(nfe): (nfe, key) for nfe in nfes})


def markdown(cells):
    """Rows of texts, the head first, as a Markdown table: the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    drawn = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
             + " |" for row in cells]
    ruler = "|-" + "|".join(["-" * widths[0] + "-", *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([drawn[0], ruler + "|", *drawn[1:]])


def text_tables(folders, keys=("fid_lenet", "psnr")):
    """`tables` of finished runs as Markdown; which runs, where these are not alike."""
    groups = alike(folders)
    return "\n".join(f"\n{f'{runs[0][0]}: ' if len(groups) > 1 else ''}{title}\n\n{markdown(cells)}"
                     for runs in groups for title, cells in tables(runs, keys))


# ---------------------------------------------------------------- charts


FID = "fid_lenet, lower is better"  # charts of it show its floor
CHARTS = {  # the first word of a curve's name -> axes, and which are logarithmic; else linear
    "quality": {"x": "network evaluations", "y": FID, "log": "xy"},
    "training": {"x": "training seconds, prior included", "y": FID, "log": "xy"},
    "held-out": {"x": "training step", "y": "squared error on held-out images", "log": "y"},
    "loss": {"x": "training step", "y": "weighted loss", "log": "y"},
    "restored": {"x": "network evaluations", "y": "PSNR in dB"},
    "psnr": {"x": "iteration", "y": "PSNR in dB"},
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#c98500", "#3a93c9", "#1c1c1a")
MARKS = "●■▲◆▼★✚"


def curves_of(runs):
    """{chart: {label: [line of each seed, ...]}}, a line [[x, y], ...]: of the runs' own curves,
    and of their rows fid_lenet or PSNR against evaluations."""
    charts = {}

    def add(chart, label, line):
        if line:
            charts.setdefault(chart, {}).setdefault(label, []).append(line)

    for run in runs:
        for task, settings in rows_of([run]).items():
            for label, rows in settings.items():
                for chart, key in (("quality", "fid_lenet"), (f"restored {task}", "psnr")):
                    add(chart, label, sorted([row["nfe"], row[key]] for row in rows
                                             if "nfe" in row and values([row], key)))
        for name, line in run[1].get("curves", {}).items():
            chart, _, label = name.partition("/")
            add(chart, label or chart, line)
    return charts


def place(values, log, a, b):
    """An axis drawn from pixel a to b: (function from a value to its pixel, ticks)."""
    f = math.log10 if log else float
    lo, hi = f(min(values)), f(max(values))
    margin = 0.05 * (hi - lo) or 0.5 * max(abs(lo), 1)
    lo, hi = lo - margin, hi + margin
    decades = range(math.floor(lo), math.ceil(hi)) if log else ()
    ticks = [m * 10.0**e for e in decades for m in ((1, 2, 5) if hi - lo <= 3 else (1,))]
    ticks = [v for v in ticks if lo <= f(v) <= hi]
    if len(ticks) < 2:
        low, high = (10**lo, 10**hi) if log else (lo, hi)
        step = 10**math.floor(math.log10((high - low) / 4))
        step *= next((m for m in (1, 2, 5) if high - low <= 6 * m * step), 10)
        ticks = [float(f"{i * step:.12g}")
                 for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda v: a + (f(v) - lo) / (hi - lo) * (b - a), ticks


def plot(series, title, x="", y="", log="", floor=None, labels=()):
    """{label: [line, ...]}, a line [[x, y], ...] for each seed, as the inside of an SVG 480 wide,
    with title and key: (text, height); ("", 0) where nothing can be drawn. `floor` is that of
    fid_lenet; `labels`, if given, number the colours."""
    def visible(x, y):
        return None not in (x, y) and (x > 0 or "x" not in log) and (y > 0 or "y" not in log)

    lines = {label: seen for label, each in series.items() if (seen := [
        shown for line in each if (shown := [point for point in line if visible(*point)])])}
    points = [point for each in lines.values() for line in each for point in line]
    if not points:
        return "", 0
    floors = [floor] if y == FID and floor else []
    at_x, x_ticks = place([x for x, _ in points], "x" in log, 62, 466)
    at_y, y_ticks = place([y for _, y in points] + floors, "y" in log, 292, 42)

    def text(x, y, words, more=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'

    def path(points, more):
        drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        return f'<path d="M{drawn}" fill="none" {more}/>'

    # title, axes and floor
    svg = [text(0, 22, title, 'font-weight="600"'),
           text(264, 334, x, 'text-anchor="middle"'),
           text(-167, 14, y, 'text-anchor="middle" transform="rotate(-90)"')]
    for v in y_ticks:
        svg += [path([(62, at_y(v)), (466, at_y(v))], 'stroke="#dcdbd5"'),
                text(55, at_y(v) + 4.5, f"{v:,g}", 'text-anchor="end"')]
    svg += [text(at_x(v), 312, f"{v:,g}", 'text-anchor="middle"') for v in x_ticks]
    for v in floors:
        svg += [path([(62, at_y(v)), (466, at_y(v))], 'stroke="#1c1c1a" stroke-dasharray="3 4"'),
                text(66, at_y(v) - 5, f"floor {show(v)}")]

    # lines, with markers where points are few; below, a key for each
    for n, (label, each) in enumerate(lines.items()):
        i, height = list(labels or lines).index(label), 358 + 22 * n
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
        svg.append(text(0, height, f"{mark} {label}", f'fill="{colour}"'))
        for points in each:
            pixels = [(at_x(x), at_y(y)) for x, y in points]
            svg.append(path(pixels, f'stroke="{colour}"'))
            svg += [text(x, y + 4.5, mark, f'text-anchor="middle" fill="{colour}"')
                    for x, y in pixels if len(pixels) < 31]
    return f'<g fill="#4a4a46">{"".join(svg)}</g>', height + 14


# ---------------------------------------------------------------- the page

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>
body{{max-width:66rem;margin:2rem auto;padding:0 1.25rem;font:1rem/1.5 system-ui,sans-serif}}
.parts{{display:flex;flex-wrap:wrap;gap:1.5rem 2rem;overflow-x:auto}}figure{{margin:0}}
svg{{font-size:13px;width:30rem}}svg,img{{max-width:100%}}pre{{white-space:pre-wrap}}
table{{border-collapse:collapse}}tr:first-child{{font-weight:600}}td:first-child{{text-align:left}}
td{{padding:.3rem .9rem .3rem 0;text-align:right;border-bottom:1px solid #dcdbd5}}
</style><body>{body}</body></html>
"""


def report(folder):
    """FOLDER/results.json -> FOLDER/report.html: one file, no script, nothing fetched. Any key may
    be missing; its part of the page is then left out."""
    compare([folder], Path(folder) / "report.html")


def compare(folders, path):
    """One page of several runs: of those that are alike mean ± standard deviation and a curve for
    each seed, then the next ones. ValueError if a results.json is no run's."""
    try:
        body = "".join(map(_part, alike(folders)))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        files = ", ".join(f"{folder}/results.json" for folder in folders)
        raise ValueError(f"{files}: not what a run writes ({error!r})") from error
    write_text(PAGE.format(title=escape(Path(path).resolve().parent.name), body=body), path)


def _part(runs):
    """Runs that are alike, as a part of the page. Pictures and settings are the first one's."""
    folder, run = runs[0]
    floor = run.get("floor", {}).get("fid_lenet")
    charts = [plot(series, kind, **CHARTS.get(kind.partition(" ")[0], {}), floor=floor)
              for kind, series in curves_of(runs).items()]
    about = {key: run[key] for key in run if key not in ("arms", "curves", "pictures", "notes")}
    sections = {
        "Rows": [f"<figure>{escape(title)}{_table(cells)}</figure>"
                 for title, cells in tables(runs)],
        "Curves": [f'<svg viewBox="0 0 480 {height}">{svg}</svg>' for svg, height in charts if svg],
        "Notes": [f"<p>{escape(note)}</p>" for note in run.get("notes", [])],
        "Pictures": [_picture(folder, **picture) for picture in run.get("pictures", [])],
        "Configuration": [f"<pre>{escape(json.dumps(about, indent=1))}</pre>"]}
    name = ", ".join(folder.resolve().name for folder, _ in runs)
    return f"<h1>{escape(name)}</h1>" + "".join(
        f'<h2>{heading}</h2><div class="parts">{"".join(parts)}</div>'
        for heading, parts in sections.items() if any(parts))


def _table(rows):
    rows = ["".join(f"<td>{escape(text)}</td>" for text in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _picture(folder, file, caption, rows=()):
    """A PNG of a run's folder, and what its rows are."""
    caption = escape(caption + (f"; rows: {', '.join(rows)}" if rows else ""))
    content = base64.b64encode((folder / Path(file).name).read_bytes()).decode()
    return (f'<figure><img alt="{caption}" src="data:image/png;base64,{content}">'
            f"<figcaption>{caption}</figcaption></figure>")


# ---------------------------------------------------------------- command line


def main(arguments=None):
    """Exit status 0, or 2 and one line on stderr."""
    paths = [Path(path) for path in (sys.argv[1:] if arguments is None else arguments)]
    print_anything()
    try:
        if not paths or str(paths[0]) in ("-h", "--help"):
            print(__doc__)
        elif len(paths) == 2 and all(path.is_file() for path in paths):
            a, b = map(data.read_picture, paths)
            channels = max(a.shape[1], b.shape[1])  # 1 where both are grey
            a, b = (x.expand(-1, channels, -1, -1) for x in (a, b))
            for measure in (mse, mae, psnr, ssim, delta_e):
                print(f"{measure.__name__:8}{measure(a, b).item():.6g}")
        else:
            above = Path(os.path.commonpath([path.resolve() for path in paths]))
            page = above / ("comparison.html" if len(paths) > 1 else "report.html")
            compare(paths, page)
            print(text_tables(paths, KEYS), page, sep="\n\n")
    except (OSError, ValueError) as error:
        print("eval:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
