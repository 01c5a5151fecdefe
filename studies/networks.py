"""Further networks for DIPs, and one DIP for a whole data set.

Importing this extends the method from outside: `dipddpm.ARCHS` by `conv2`, `autoencoder` and
`resnet18`, which the student reports used; and `dip-network`, one DIP for a data set.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import dipddpm
import kernels

RATE = 1e-3  # peak learning rate of a network for a whole data set


class Single:
    """What a DIP is made of as one network for a whole data set, trained in batches: as
    `dipddpm.Grouped`, but padded with zeros, and with running statistics to be evaluated by."""

    K = 1

    def conv(self, c_in, c_out, size, stride=1):
        return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)

    def up(self, c_in, c_out, size, stride=1):
        return nn.ConvTranspose2d(c_in, c_out, size, stride, padding=(size - 1) // 2)

    def norm(self, channels):
        return nn.BatchNorm2d(channels)


class GroupedUp(dipddpm.GroupedConv):
    """K independent transposed convolutions as one: [1, K Ci, H, W] -> [1, K Co, H', W']. Its
    weight has the shape of a convolution the other way, and so the fan-in c_out size^2."""

    def __init__(self, numbers, layer, c_in, c_out, size, seed, stride=1):
        super().__init__(numbers, layer, c_out, c_in, size, seed, stride)
        area = size * size
        u = kernels.uniform((len(numbers), c_out * (c_in * area + 1)), seed, numbers, layer,
                            kernels.WEIGHTS, numbers.device)
        bias = (u[:, c_out * c_in * area:] * 2 - 1) * (c_out * area) ** -0.5
        self.bias = nn.Parameter(bias.reshape(-1))  # [K Co]

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.pad, groups=self.K)


def up(make, c_in, c_out, size, stride=1):
    """A transposed convolution of either kind of network."""
    if isinstance(make, Single):
        return make.up(c_in, c_out, size, stride)
    return GroupedUp(make.numbers, next(make.layers), c_in, c_out, size, make.seed, stride)


# ------------------------------------------------------------------ architectures


def conv2(make, c_in, c_out, H, W, width):
    """Two 3x3 convolutions and a sigmoid."""
    return nn.Sequential(make.conv(c_in, width, 3), nn.ReLU(), make.conv(width, c_out, 3),
                         nn.Sigmoid())


def autoencoder(make, c_in, c_out, H, W, width):
    """Four 3x3 convolutions and a tanh, at full resolution: it narrows nothing.
    [B, K Ci, H, W] -> [B, K Co, H, W] in [-1, 1]."""
    widths = [c_in, width, width, width, c_out]
    layers = [layer for a, b in zip(widths, widths[1:])
              for layer in (make.conv(a, b, 3), nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Tanh())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5, left).
    [B, K Ci, H, W] -> [B, K Co, H / stride, W / stride]."""

    def __init__(self, make, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.norm1 = make.conv(c_in, c_out, 3, stride), make.norm(c_out)
        self.conv2, self.norm2 = make.conv(c_out, c_out, 3), make.norm(c_out)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            make.conv(c_in, c_out, 1, stride), make.norm(c_out))

    def forward(self, x):
        h = self.conv2(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.norm2(h))


class ResNet18(nn.Module):
    """A ResNet-18 encoder (He et al. 2016, table 1; random weights, widths w ... 8 w) and six
    transposed convolutions: an image becomes 8 w numbers at 1/32 of its size.
    [B, K Ci, H, W] -> [B, K Co, H, W] in [0, 1]."""

    def __init__(self, make, c_in, c_out, H, W, width):
        super().__init__()
        if not isinstance(make, Single) and max(H, W) <= 32:
            raise ValueError(f"resnet18 makes one pixel of {W}x{H}: fitted to one image its norms "
                             "have nothing to take a mean over")
        widths = [width * k for k in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
        self.enter = nn.Sequential(make.conv(c_in, width, 7, 2), make.norm(width), nn.ReLU(),
                                   nn.MaxPool2d(3, 2, padding=1))
        self.blocks = nn.Sequential(*(BasicBlock(make, a, b, 2 if b > a else 1)
                                      for a, b in zip(widths, widths[1:])))
        ups = [width * k for k in (8, 4, 2, 1, 1, 1)]
        self.ups = nn.ModuleList(nn.Sequential(up(make, a, b, 4, 2), make.norm(b), nn.ReLU())
                                 for a, b in zip(ups, ups[1:]))
        self.last = up(make, width, c_out, 3)

    def forward(self, x):
        h = self.blocks(self.enter(x))  # [B, K 8w, ceil(H / 32), ceil(W / 32)]
        for layer in self.ups:
            h = layer(h)
        return torch.sigmoid(self.last(h)[..., :x.shape[2], :x.shape[3]])  # 32 ceil(H / 32) is more


# ------------------------------------------------------------------ one DIP for a data set


def fit_network(cfg, pixels, track=dipddpm.untracked, arch="autoencoder", width=64, iters=300):
    """Minimise E_i |f_theta(x_i) - x_i|^2 over the images of pixels uint8 [N, C, H, W], from random
    theta, Adam, half a cosine: the DIP of a whole data set, f: [B, C, H, W] -> the same, in [0, 1]
    (`autoencoder` ends in a tanh: in [-1, 1], to be clipped).
    What nothing narrows (`conv2`, `autoencoder`) becomes the identity, given time."""
    N, C, H, W = pixels.shape
    B, per_epoch = dipddpm.steps_of(cfg, N)
    f = dipddpm.fresh(lambda: dipddpm.ARCHS[arch](Single(), C, C, H, W, width), cfg.seed, 2,
                      pixels.device)
    optimizer = torch.optim.Adam(f.parameters(), fused=True)
    for step in track(range(iters), "fit network", B):
        if step % per_epoch == 0:
            order = dipddpm.epoch_order(cfg, N, step // per_epoch, pixels.device)
        x = pixels[order[step % per_epoch * B:][:B]].float() / 255
        loss = (f(x) - x).square().mean()
        optimizer.param_groups[0]["lr"] = RATE * dipddpm.half_cosine(step, iters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f.eval().requires_grad_(False)


def dip_network(cfg, pixels, sources, track=dipddpm.untracked, **settings):
    """The source images through one DIP that was fitted to the whole data set, by the `settings` of
    `fit_network`."""
    f = fit_network(cfg, pixels, track, **settings)
    x = torch.cat([f(part.float() / 255) for part in sources.split(dipddpm.at_once(sources))])
    return x.clamp(0, 1) * 2 - 1


dipddpm.ARCHS.update(conv2=conv2, autoencoder=autoencoder, resnet18=ResNet18)
