"""Every net; how nets run; what problems 3 to 6 share; and, as the last part, a training run with its files.

A checkpoint holds the keyword arguments that rebuild its net.  All of it runs on torch 1.4 as on today's.
"""
import contextlib
import copy
import glob
import hashlib
import io
import json
import math
import os
import re
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets import (DIGIT_SIZE, SOURCE_OF, UserError, check_output, is_out_of_memory, list_images, read_images,
                      to_float, to_uint8, write_text, write_whole)

# autocast came with torch 1.10, and with it channels_last kernels that are worth having on a CPU
MODERN = hasattr(torch, 'autocast')
CHECKPOINTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'checkpoints')


# ------------------------------------------------------------------------------------------- nets

class ResidualBlock(nn.Module):
    """(N, channels, H, W) -> the same: pre-activation residual block (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels), nn.LeakyReLU(0.2), nn.Conv2d(channels, channels, kernel_size=3, padding=1))

    def forward(self, x):
        return x + self.layers(x)


class VAEEncoder(nn.Module):
    """(N, 3, 64, 64) float in [0, 1] -> mean and log-variance of q(z|x), each (N, latent_dim)."""

    def __init__(self, latent_dim, channels):
        super().__init__()
        layers = [nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1)]       # 32x32
        for before, after in zip(channels, channels[1:]):                              # 16, 8, 4
            layers += [nn.BatchNorm2d(before), nn.LeakyReLU(0.2),
                       nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), ResidualBlock(after)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels[-1]), nn.LeakyReLU(0.2))
        self.mean = nn.Linear(channels[-1] * 4 * 4, latent_dim)
        self.log_variance = nn.Linear(channels[-1] * 4 * 4, latent_dim)

    def forward(self, x):
        features = self.features(2 * x - 1).flatten(1)      # (N, channels[-1] * 16)
        return self.mean(features), self.log_variance(features)


class VAEDecoder(nn.Module):
    """(N, latent_dim) -> (N, 3, 64, 64) float in [0, 1], by pixel shuffle (Shi et al. 2016, arXiv 1609.05158)."""

    def __init__(self, latent_dim, channels):
        super().__init__()
        self.channels = channels[-1]
        self.project = nn.Linear(latent_dim, self.channels * 4 * 4)
        layers = []
        for before, after in zip(channels[:0:-1], channels[-2::-1]):                   # 4, 8, 16
            layers += [ResidualBlock(before), nn.Conv2d(before, 4 * after, kernel_size=1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(
            *layers, ResidualBlock(channels[0]), nn.BatchNorm2d(channels[0]), nn.LeakyReLU(0.2),
            nn.Conv2d(channels[0], 3 * 4, kernel_size=3, padding=1), nn.PixelShuffle(2))   # 64x64

    def forward(self, z):
        features = self.project(z).view(-1, self.channels, 4, 4)
        return torch.sigmoid(self.layers(features))


class VAE(nn.Module):
    """Variational autoencoder for 64x64 images (Kingma and Welling 2014, arXiv 1312.6114)."""

    def __init__(self, latent_dim, channels):
        super().__init__()
        self.encoder = VAEEncoder(latent_dim, tuple(channels))
        self.decoder = VAEDecoder(latent_dim, tuple(channels))

    def forward(self, x, noise):
        """Return reconstruction (N, 3, 64, 64), mean and log-variance (N, latent_dim).

        noise is a sample of N(0, I), (N, latent_dim): z = mean + exp(log_variance / 2) noise.
        """
        mean, log_variance = self.encoder(x)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(z), mean, log_variance


def gan_weights(module):
    """Draw weights from N(0, 0.02), of batch norms from N(1, 0.02) (DCGAN: Radford et al. 2016, arXiv 1511.06434)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)


class Generator(nn.Module):
    """(N, latent_dim) -> (N, 3, 64, 64) float in [-1, 1] (DCGAN, figure 1); channels at 32, 16, 8 and 4 pixels."""

    def __init__(self, latent_dim, channels):
        super().__init__()
        channels = list(channels)[::-1]
        self.channels = channels[0]
        self.project = nn.Linear(latent_dim, self.channels * 4 * 4, bias=False)
        layers = []
        for before, after in zip(channels, channels[1:]):                              # 4, 8, 16
            layers += [nn.BatchNorm2d(before), nn.ReLU(),
                       nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False)]
        self.layers = nn.Sequential(
            *layers, nn.BatchNorm2d(channels[-1]), nn.ReLU(),
            nn.ConvTranspose2d(channels[-1], 3, kernel_size=4, stride=2, padding=1), nn.Tanh())
        self.apply(gan_weights)

    def forward(self, z):
        return self.layers(self.project(z).view(-1, self.channels, 4, 4))


class Discriminator(nn.Module):
    """(N, 3, 64, 64) float in [-1, 1] -> (N,) unbounded scores, high for real images (DCGAN, with other norms).

    channels are those at 32, 16, 8 and 4 pixels.  norm is 'batch', 'layer' (over channels and pixels, of one image
    alone), 'none' or 'spectral' (of the weights: Miyato et al. 2018, arXiv 1802.05957).
    """

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm
        normalise = {'batch': nn.BatchNorm2d, 'layer': lambda count: nn.GroupNorm(1, count)}.get(norm)
        layers = [nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1, bias=normalise is None))
            layers += [normalise(after)] if normalise else []
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(channels[-1], 1, kernel_size=4))
        self.layers = nn.Sequential(*layers)
        self.apply(gan_weights)
        if norm == 'spectral':
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    nn.utils.spectral_norm(layer)

    def forward(self, x):
        return self.layers(x.contiguous() if self.norm == 'layer' else x).flatten()


class GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength (Ganin et al. 2016, section 4.2)."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


class DigitEncoder(nn.Module):
    """(N, 3, 28, 28) float of any range -> features (N, 9 channels[-1]).

    normalise brings each channel of each image to mean 0 and variance 1, so that neither brightness nor contrast
    tells two domains apart (instance normalisation of the input: Shu et al. 2018, arXiv 1802.08735).
    """

    def __init__(self, channels, normalise):
        super().__init__()
        self.normalise = normalise
        layers, before = [], 3
        for index, after in enumerate(channels):                               # 28, 14, 7 pixels
            for last in ([True] if index == 0 else [False, True]):
                layers.append(nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False))
                if last:       # before the norm, which then has a quarter of the work
                    layers.append(nn.MaxPool2d(2))
                layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
                before = after
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(nn.functional.instance_norm(x) if self.normalise else x).flatten(1)


class DigitNet(nn.Module):
    """(N, 3, 28, 28) float of any range -> logits (N, 10); channels are those at 28, 14 and 7 pixels."""

    def __init__(self, channels, dropout, normalise=True):
        super().__init__()
        self.features = 9 * channels[-1]
        self.encoder = DigitEncoder(channels, normalise)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.features, 10))

    def forward(self, x):
        return self.classifier(self.encoder(x))


class DomainDiscriminator(nn.Module):
    """Features (N, features) -> logits (N,), high for the source domain."""

    def __init__(self, features, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(0.2),
                                    nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, features):
        return self.layers(features).flatten()


class Swish(nn.Module):
    """x sigmoid(x) (Ramachandran et al. 2017, arXiv 1710.05941), which torch 1.4 has under no name."""

    def forward(self, x):
        return F.silu(x) if MODERN else x * torch.sigmoid(x)


class ConditionedBlock(nn.Module):
    """Images (N, before, H, W) and conditioning (N, conditioning), which scales and shifts -> (N, after, H, W).

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B; Nichol and Dhariwal 2021 (arXiv 2102.09672).
    """

    def __init__(self, before, after, conditioning):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, before), Swish(), nn.Conv2d(before, after, kernel_size=3, padding=1))
        self.scale_and_shift = nn.Linear(conditioning, 2 * after)
        self.norm = nn.GroupNorm(8, after)
        self.second = nn.Sequential(Swish(), nn.Conv2d(after, after, kernel_size=3, padding=1))
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, kernel_size=1)
        nn.init.zeros_(self.second[1].weight)          # so that a new block is its skip alone
        nn.init.zeros_(self.second[1].bias)

    def forward(self, x, conditioning):
        scale, shift = self.scale_and_shift(conditioning).unsqueeze(2).unsqueeze(3).chunk(2, 1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class UNet(nn.Module):
    """Noisy images (N, 3, H, W), steps of the noise (N,) and labels (N,) -> the noise in them, (N, 3, H, W).

    A label is 0 .. classes - 1, or classes for an image without one.  channels are those at H, H / 2, H / 4, ...
    pixels; conditioning is the width of the vector that the blocks get.  Source: Ho et al. 2020, appendix B, without
    attention.
    """

    def __init__(self, channels, classes, conditioning):
        super().__init__()
        self.classes, self.conditioning, self.swish = classes, conditioning, Swish()
        self.label = nn.Embedding(classes + 1, conditioning)
        self.step = nn.Sequential(nn.Linear(conditioning, conditioning), Swish(), nn.Linear(conditioning, conditioning))
        pairs = list(zip(channels, channels[1:]))
        self.begin = nn.Conv2d(3, channels[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList([ConditionedBlock(before, before, conditioning) for before in channels[:-1]])
        self.shrink = nn.ModuleList([nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
                                     for before, after in pairs])
        self.middle = nn.ModuleList([ConditionedBlock(channels[-1], channels[-1], conditioning) for _ in range(2)])
        self.grow = nn.ModuleList([nn.Conv2d(after, before, kernel_size=3, padding=1) for before, after in pairs])
        self.up = nn.ModuleList([ConditionedBlock(2 * before, before, conditioning) for before in channels[:-1]])
        self.end = nn.Sequential(nn.GroupNorm(8, channels[0]), Swish(),
                                 nn.Conv2d(channels[0], 3, kernel_size=3, padding=1))

    def forward(self, x, steps, labels):
        # waves of the step number, of lengths from 2 pi to almost 20,000 pi (Vaswani et al. 2017)
        count = self.conditioning // 2
        frequencies = torch.exp(torch.arange(count, device=x.device).float() * (-math.log(10000) / count))
        waves = steps.float().unsqueeze(1) * frequencies
        conditioning = self.swish(self.step(torch.cat([waves.sin(), waves.cos()], 1)) + self.label(labels))
        x, skips = self.begin(x.contiguous()), []      # in the layout of its weights: see fastest_layout
        for block, shrink in zip(self.down, self.shrink):
            x = block(x, conditioning)
            skips.append(x)
            x = shrink(x)
        for block in self.middle:
            x = block(x, conditioning)
        for block, grow, skip in list(zip(self.up, self.grow, skips))[::-1]:
            x = grow(F.interpolate(x, size=skip.shape[2:], mode='nearest'))
            x = block(torch.cat([x, skip], 1), conditioning)
        return self.end(x)


class ClassNorm(nn.Module):
    """Batch norm whose scale and shift belong to the class: (N, channels, H, W) and labels (N,) -> the same shape.

    Source: de Vries et al. 2017 (arXiv 1707.00683), with a vector for each class as in Miyato and Koyama 2018
    (arXiv 1802.05637).
    """

    def __init__(self, channels, classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale_and_shift = nn.Embedding(classes, 2 * channels)
        nn.init.zeros_(self.scale_and_shift.weight)

    def forward(self, x, labels):
        x = self.norm(x)
        scale, shift = self.scale_and_shift(labels).to(x.dtype).unsqueeze(2).unsqueeze(3).chunk(2, 1)
        return x * (1 + scale) + shift


class DigitGenerator(nn.Module):
    """Noise (N, latent_dim) and labels (N,) -> (N, 3, size, size) float in [-1, 1].

    The label stands beside the noise and chooses the norms.  channels are those at size, size / 2, ... pixels.
    Upsampling repeats pixels, which leaves no grain as a transposed convolution does (Odena et al. 2016,
    https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, latent_dim, classes, channels, size):
        super().__init__()
        channels = list(channels)[::-1]
        self.latent_dim, self.classes, self.channels = latent_dim, classes, channels[0]
        self.start = size >> (len(channels) - 1)
        self.project = nn.Linear(latent_dim + classes, self.channels * self.start ** 2, bias=False)
        self.norms = nn.ModuleList([ClassNorm(count, classes) for count in channels])
        self.convs = nn.ModuleList([nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
                                    for before, after in zip(channels, channels[1:])])
        self.end = nn.Conv2d(channels[-1], 3, kernel_size=3, padding=1)
        self.apply(gan_weights)

    def forward(self, z, labels):
        x = self.project(beside(z, labels, self.classes)).view(-1, self.channels, self.start, self.start)
        for norm, conv in zip(self.norms, self.convs):
            x = conv(F.interpolate(F.relu(norm(x, labels)), scale_factor=2, mode='nearest'))
        return torch.tanh(self.end(F.relu(self.norms[-1](x, labels))))


class FaceGenerator(Generator):
    """Noise (N, latent_dim) and labels (N,) -> (N, 3, 64, 64) float in [-1, 1]: Generator with the label beside z."""

    def __init__(self, latent_dim, classes, channels):
        super().__init__(latent_dim + classes, channels)
        self.latent_dim, self.classes = latent_dim, classes

    def forward(self, z, labels):
        return super().forward(beside(z, labels, self.classes))


def beside(z, labels, classes):
    """Return noise (N, latent_dim) with the one-hot labels behind it: (N, latent_dim + classes)."""
    return torch.cat([z, F.one_hot(labels, classes).to(z.dtype)], 1)


class ClassDiscriminator(nn.Module):
    """(N, 3, size, size) float in [-1, 1] -> scores (N,), high for real images, and logits (N, classes).

    channels are those at size, size / 2, size / 4, ... pixels, rounded up.
    """

    def __init__(self, classes, channels, size):
        super().__init__()
        layers = [nn.Conv2d(3, channels[0], kernel_size=3, padding=1), nn.LeakyReLU(0.2)]
        for before, after in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, after, kernel_size=4 - size % 2, stride=2, padding=1), nn.LeakyReLU(0.2)]
            size = (size + 1) // 2
        self.layers = nn.Sequential(*layers)
        self.score = nn.Linear(channels[-1] * size ** 2, 1)
        self.classify = nn.Linear(channels[-1] * size ** 2, classes)
        self.apply(gan_weights)

    def forward(self, x):
        features = self.layers(x).flatten(1)
        return self.score(features).flatten(), self.classify(features)


# ---------------------------------------------------------------------------------------- running

def pick_device(name):
    """Return the torch.device for 'auto' or None (a GPU if there is one), 'cpu' or 'cuda'."""
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError('this torch sees no GPU: leave --device out, or say --device cpu')
    return torch.device('cuda' if name != 'cpu' and torch.cuda.is_available() else 'cpu')


def pick_precision(device):
    """Return 'bf16' where bfloat16 autocast trains faster than float32 on device, else 'fp32'; a CPU is measured."""
    if not MODERN:
        return 'fp32'
    if device.type == 'cuda':
        return 'bf16' if torch.cuda.get_device_capability(device)[0] >= 8 else 'fp32'
    conv = nn.Conv2d(64, 64, kernel_size=3, padding=1).to(memory_format=torch.channels_last)
    images = torch.zeros(16, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    seconds = {}
    for precision in ('fp32', 'bf16') * 4:
        start = time.perf_counter()
        with autocast(device, precision):
            output = conv(images)
        output.float().sum().backward()
        seconds[precision] = min(seconds.get(precision, 1e9), time.perf_counter() - start)     # the first is slow
    return min(seconds, key=seconds.get)


def autocast(device, precision):
    """Return the context in which a net runs in precision 'bf16' or 'fp32' on device."""
    if precision == 'bf16' and MODERN:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.ExitStack()      # does nothing


def fastest_layout(net):
    """Return net in the layout that a CPU trains fastest: channels_last, except for group norm (20 times slower)."""
    if not MODERN or any(isinstance(layer, nn.GroupNorm) for layer in net.modules()):
        return net
    return net.to(memory_format=torch.channels_last)


def on_device(images, device):
    """Move a float image batch to device, in channels_last where torch is new: see fastest_layout."""
    images = images.to(device)
    return images.contiguous(memory_format=torch.channels_last) if MODERN else images


def cosine_rate(step, steps, peak, warm_up):
    """Learning rate at a step, counted from 1: linear warm-up, then half a cosine from peak down to 0."""
    return peak * min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def falling_rate(step, steps, peak, falling):
    """Learning rate at a step, counted from 1: peak, and over the last share falling of the steps linearly to 0."""
    return peak * min(1.0, (steps - step + 1) / max(1, steps * falling))


def take_step(optimizer, loss, learning_rate, max_norm=None):
    """Let an optimizer take one step down the gradient of loss, whose norm is limited to max_norm if that is given."""
    for group in optimizer.param_groups:
        group['lr'] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    if max_norm:
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group['params']], max_norm)
    optimizer.step()


def update_average(average, net, updates, max_decay):
    """Move average towards net: average = decay average + (1 - decay) net, buffers too.

    The decay is updates / (updates + 20), at most max_decay, so that early weights fade fast; updates starts at 1.
    """
    decay = min(max_decay, updates / (updates + 20))
    with torch.no_grad():
        new = net.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.add_(new[name] - value, alpha=1 - decay)
            else:
                value.copy_(new[name])


def run_batches(function, device, *inputs, batch_size=50):
    """Call function on one batch of inputs after another, on device; return the results, float32 on the CPU.

    inputs are tensors of N rows; function returns one tensor or a tuple of them, batch first.
    """
    with torch.no_grad():
        outputs = [function(*[rows[start:start + batch_size].to(device) for rows in inputs])
                   for start in range(0, len(inputs[0]), batch_size)]
    if torch.is_tensor(outputs[0]):
        return torch.cat([output.float().cpu() for output in outputs])
    return tuple(torch.cat([part.float().cpu() for part in parts]) for parts in zip(*outputs))


def in_threads(function, parts, device, threads):
    """Yield function(part) for each part, in order, from so many threads (GPU: 1), each using one thread of torch."""
    def compute(part):
        torch.set_num_threads(1)           # for the thread that calls it
        return function(part)
    with ThreadPoolExecutor(1 if device.type == 'cuda' else threads) as pool:
        futures = [pool.submit(compute, part) for part in parts]
        try:
            for future in futures:
                yield future.result()
        finally:                           # an exception, or the keyboard, ends what has not begun
            for future in futures:
                future.cancel()


def with_statistics(net, images, device):
    """Return a copy of net in eval() whose batch norms have the statistics of images (Li et al. 2016, AdaBN)."""
    net = copy.deepcopy(net).to(device).eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None               # a plain mean over the batches
        norm.train()
    run_batches(net, device, images, batch_size=250)
    return net.eval()


def frechet_distance(a, b):
    """Frechet distance of Gaussians fitted to features (N, D) and (M, D): Heusel et al. 2017 (1706.08500), eq. 6."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a_cov, b_cov = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(a_cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b_cov @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(a_cov) + np.trace(b_cov) - 2 * cross)


def decode_noise(decoder, count, dimensions, seed, device):
    """Decode count samples of N(0, I), (count, dimensions), into (count, 3, H, W) uint8 images; decoder gives [0, 1].

    The samples come from NumPy's legacy generator, whose stream is frozen (NEP 19).  Each is decoded alone and on one
    thread, since the last bit of a convolution may change with the batch size and the number of threads.
    """
    noise = np.random.RandomState(seed).standard_normal((count, dimensions)).astype(np.float32)
    with repeatable():
        return to_uint8(run_batches(decoder, device, torch.from_numpy(noise), batch_size=1))


@contextlib.contextmanager
def repeatable():
    """In this context a net gives the same to the last bit on one machine: one thread, and no shortcuts of a GPU."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, getattr(cudnn, 'allow_tf32', False)
    torch.set_num_threads(1)
    cudnn.deterministic, cudnn.allow_tf32 = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.allow_tf32 = before


# -------------------------------------------------------------- digits: shared by problems 3 to 6

DIGIT_NET = dict(channels=[32, 64, 128], dropout=0.5)      # channels at 28, 14 and 7 pixels
DISCRIMINATOR_HIDDEN = 128
FOLDER_PART = 256            # images of a folder that a thread labels at once


def domain_loss(source, target):
    """Mean cross-entropy of logits (N,), 1 the source and 0 the target, a half each: Ganin et al. 2016, 4.2."""
    return 0.5 * (F.softplus(-source).mean() + F.softplus(target).mean())


def domain_accuracy(source, target):
    """Share of the discriminator's logits (N,) that are on their domain's side; each domain counts a half."""
    return 0.5 * ((source > 0).float().mean() + (target < 0).float().mean())


def predict(net, images, device, batch_size=250):
    """Return the classes (N,) that a net in eval() gives to (N, 3, H, W) uint8 images."""
    return run_batches(lambda batch: net(to_float(batch)).argmax(1), device, images, batch_size=batch_size).long()


def predict_probabilities(net, images, device):
    """Return the probabilities (N, 10) that a net in eval() gives to (N, 3, H, W) uint8 images."""
    return run_batches(lambda batch: torch.softmax(net(to_float(batch)), 1), device, images)


def digit_features(net, images, device):
    """Return the features (N, D) that a DigitNet in eval() finds in (N, 3, 28, 28) uint8 images."""
    return run_batches(lambda batch: net.encoder(to_float(batch)), device, images)


def accuracy(net, images, labels, device):
    """Share of (N, 3, H, W) uint8 images to which a net in eval() gives their labels (N,)."""
    return (predict(net, images, device) == labels).float().mean().item()


def nuclear_norm(probabilities):
    """Nuclear norm of probabilities (N, 10), scaled to at most 1, or nan: Cui et al. 2020 (arXiv 2003.12237), eq. 8."""
    if not torch.isfinite(probabilities).all():
        return math.nan
    return float(torch.norm(probabilities, p='nuc')) / math.sqrt(probabilities.numel())


def measure_held_out(net, images, labels, target_images, device):
    """Measure a net in eval() on held-out images (N, 3, 28, 28) uint8 with labels, and on the target's without.

    Returns a dict: the accuracy on the former; for the latter the nuclear norm and the share of each predicted digit,
    by which methods can be compared without target labels.
    """
    probabilities = predict_probabilities(net, target_images, device)
    return dict(accuracy=accuracy(net, images, labels, device), nuclear_norm=nuclear_norm(probabilities),
                predicted_shares=[(probabilities.argmax(1) == digit).float().mean().item() for digit in range(10)])


def measure_target(net, test, target, held_out, device):
    """Measure a net in eval() at the end of its run: number of test images, accuracy on them and on held_out.

    test and target are the DigitImages of the target's test and training images; held_out are rows of the latter.
    """
    return dict(images=len(test.names), accuracy=accuracy(net, test.images, test.labels, device),
                held_out_accuracy=accuracy(net, target.images[held_out], target.labels[held_out], device))


def measure_generated(generated, judge, real, device):
    """Score generated digits (count, 10, 3, 28, 28) uint8, the second index the class, by judge, a DigitNet in eval().

    Returns a dict: accuracy, the share that judge reads as what was asked for; and frechet, the distance to real
    images (N, 3, 28, 28) uint8 in the features of judge.
    """
    asked = torch.arange(generated.shape[1]).repeat(len(generated))
    generated = generated.flatten(0, 1)
    return dict(accuracy=accuracy(judge, generated, asked, device), frechet=frechet_distance(
        digit_features(judge, generated, device), digit_features(judge, real, device)))


def check_scores(scores_path, scores, what, ckpt):
    """Raise UserError if the scores of the net what ('acgan', 'p1_vae', ...) are not those of the file ckpt."""
    if {record['sha256'] for record in scores if record['what'] == what} != {sha256(ckpt)}:
        raise UserError(f'{scores_path} has no scores of {ckpt}: run tests/benchmark.py (samples or conditional)')


def label_folder(problem, ckpt, target, folder, batch_size, device):
    """Return the sorted image names of a folder, and the net's digit for each; no image affects that of another."""
    net, checkpoint = load_net(DigitNet, ckpt, problem, device)
    if checkpoint['settings']['target'] != target:
        raise UserError(f'{ckpt} was trained for {checkpoint["settings"]["target"]}: name that as --target, or '
                        'another --ckpt')
    names = list_images(folder)
    others = len(os.listdir(folder)) - len(names)
    if others:
        print(f'{others} other files or folders beside the {len(names)} images are left out', flush=True)

    def label_part(part):
        return predict(net, read_images(folder, part, DIGIT_SIZE), device, batch_size).tolist()
    parts = [names[start:start + FOLDER_PART] for start in range(0, len(names), FOLDER_PART)]
    return names, sum(in_threads(label_part, parts, device, torch.get_num_threads()), [])


# --------------------------------------------------------------------------------- a training run

STATE = ' (training state)'  # ends the name of the problem in the file of a run that has not ended


class Run:
    """One training run from its start, or from where it stopped, to its end: all but the algorithm.

    At its end run.pth appears, the checkpoint, and run.jsonl, its log.  Until then run_last.pth holds the state of the
    last save: all that was kept, the chosen weights, the random generators, the step, the settings, the log and the
    seconds.  --resume restores it, so that the run goes on as if it had never stopped.  A script says:

        run = Run(args, PROBLEM, DEFAULTS, constants, ckpt)
        net = run.keep('net', Net(**NET))                # is saved with the run, and restored by --resume
        run.facts(net, training_images=len(images))
        for step in run.steps(LOG_EVERY, SAVE_EVERY):
            ...                                          # the algorithm, whose random numbers come from run.rng
            run.log(loss=loss)                           # a record holds the means since the last record
            if run.saves:
                run.measured(error=...)                  # on held-out images
                run.choose(error, net)                   # where the least error chooses the weights
        run.finish(run.from_file(Net(**NET), 'chosen'), NET, metrics)

    args are the flags; defaults the settings that have a flag of the same name; constants those of the method, with
    names in capitals.  Attributes: settings (flags and constants), last_step, batch_size, device, precision, resumed
    (bool), rng (a torch.Generator with the run's seed); in the loop also step, logs and saves (whether it does so).

    Raises UserError if a flag or a constant is not that of the saved run, if a new run would overwrite an unfinished
    one, or if ckpt is a file of another kind or cannot be written.
    """

    def __init__(self, args, problem, defaults, constants, ckpt):
        check_output(ckpt, ('.pth',))
        if os.path.exists(ckpt):
            load_checkpoint(ckpt, problem)             # a file of another kind must not be overwritten
        self.problem, self.ckpt, self.base = problem, ckpt, base_of(ckpt)
        self.device = pick_device(args.device)
        self.state_path = self.base + '_last.pth'
        self.state = self._find_state(args.resume)
        self.resumed = self.state is not None
        if self.resumed:
            self._check_same(self.state['settings'], dict(given_flags(args, defaults), **plain(constants)))
            self.settings, self.precision = self.state['settings'], self.state['precision']
            self.command, self.chosen = self.state['command'], self.state['chosen']
            self.records, self.step = self.state['log'], self.state['step']
        else:
            self.settings = plain(dict(defaults, **given_flags(args, defaults), **constants))
            self.precision, self.command, self.chosen = pick_precision(self.device), args.command, None
            self.records, self.step = [], 0
        self.last_step, self.batch_size = self.settings['steps'], self.settings['batch_size']
        self.kept, self.sums, self.counts = OrderedDict(), {}, {}
        torch.set_flush_denormal(True)     # saturated nets make denormals, 40 times slower on a CPU
        if self.device.type == 'cuda' and MODERN:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(self.settings['seed'])                           # the first weights, dropout
        self.rng = torch.Generator().manual_seed(self.settings['seed'])    # batches, augmentation, noise

    def _find_state(self, resume):
        """Return the state to go on from, or None for a new run."""
        if not os.path.exists(self.state_path):
            if resume:
                print(f'{self.state_path} does not exist yet: starting a new run', flush=True)
            return None
        state = load_checkpoint(self.state_path, self.problem + STATE)
        if not resume and state['step'] < state['settings']['steps']:
            raise UserError(f'{self.state_path} holds a run at step {state["step"]} of {state["settings"]["steps"]}: '
                            'if it was stopped, add --resume to go on with it, or delete it to start anew')
        return state if resume else None

    def _check_same(self, saved, now):
        for name, value in now.items():
            if value != saved.get(name):
                raise UserError(f'{self.state_path} was started with {name} {saved.get(name)}, and now it is {value}: '
                                'take that change back, or delete the file to start anew')

    def keep(self, name, thing):
        """Return thing, which is saved with the run under name, and restored here by --resume.

        It is a net, which moves to the device; an optimizer; or a tensor or a list, which is then changed in place.
        """
        if isinstance(thing, nn.Module):
            thing = fastest_layout(thing.to(self.device))
        elif torch.is_tensor(thing):
            thing = thing.to(self.device)
        self.kept[name] = thing
        if self.resumed:
            saved = self.state[name]
            if torch.is_tensor(thing):
                thing.copy_(saved)
            elif isinstance(thing, list):
                thing[:] = saved
            else:
                thing.load_state_dict(saved)
        return thing

    def facts(self, *nets, **facts):
        """Log the facts of the run and the size of nets; UserError if they were others when a resumed run started."""
        facts['parameters'] = sum(parameter.numel() for net in nets for parameter in net.parameters())
        if self.resumed:
            self._check_same(self.state['facts'], facts)
        else:
            gpu = dict(gpu=torch.cuda.get_device_name(self.device)) if self.device.type == 'cuda' else {}
            self.records.append(dict(
                gpu, kind='run', command=self.command, settings=self.settings, device=self.device.type,
                precision=self.precision, threads=torch.get_num_threads(), torch=str(torch.__version__), **facts))
        self.described = facts

    def steps(self, log_every, save_every):
        """Yield the steps left; logs is True at every log_every-th, saves at every save_every-th, both at the last."""
        self.start = time.time()
        if self.resumed:
            self.rng.set_state(self.state['rng'])
            torch.set_rng_state(self.state['torch_rng'])
            if self.device.type == 'cuda' and 'cuda_rng' in self.state:
                torch.cuda.set_rng_state_all(self.state['cuda_rng'])
            self.start -= self.state['seconds']
            self.state = None              # its memory is needed no more
        elif os.path.exists(self.state_path):
            os.remove(self.state_path)     # of a finished run: --resume must not find it
        for step in range(self.step + 1, self.last_step + 1):
            self.step = step
            self.logs = self.step % log_every == 0 or self.step == self.last_step
            self.saves = self.step % save_every == 0 or self.step == self.last_step
            yield step
            if self.saves:
                self._save()

    def autocast(self):
        """Return the context in which this run's nets are called."""
        return autocast(self.device, self.precision)

    def log(self, **scalars):
        """Take numbers into the means of the next record; at its step log and show it; UserError if not finite."""
        for name, value in scalars.items():
            self.sums[name], self.counts[name] = self.sums.get(name, 0) + value, self.counts.get(name, 0) + 1
        if not self.logs:
            return
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise UserError(f'a loss is not finite near step {self.step}: the last good save, if there is one, stays '
                            f'in {self.state_path}; delete it and start anew with another --seed')
        self.sums, self.counts = {}, {}
        speed = self.step * self.batch_size / (time.time() - self.start)
        self.records.append(dict(kind='train', step=self.step, images_per_second=speed, **means))
        shown = '  '.join(f'{name.replace("_", " ")} {means[name]:.4g}' for name in list(means)[:4])
        left = int((self.last_step - self.step) * self.batch_size / speed)
        print(f'{os.path.basename(self.base)}  step {self.step}/{self.last_step}  {shown}  {speed:.0f} images/s  '
              f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left', flush=True)

    def measured(self, **scalars):
        """Log what was measured on held-out images."""
        self.records.append(dict(kind='held_out', step=self.step, **scalars))

    def choose(self, score, net):
        """Keep the weights of net as the chosen ones if no score before was as low."""
        if self.chosen is None or score < self.chosen['score']:
            self.chosen = dict(step=self.step, score=score, net=plain_state(net))

    def _save(self):
        kept = {name: thing.state_dict() if hasattr(thing, 'state_dict') else thing
                for name, thing in self.kept.items()}
        save_checkpoint(self.state_path, dict(
            kept, problem=self.problem + STATE, step=self.step, seconds=time.time() - self.start,
            settings=self.settings, facts=self.described, precision=self.precision,
            command=self.command, chosen=self.chosen, log=self.records, rng=self.rng.get_state(),
            torch_rng=torch.get_rng_state(),
            **{'cuda_rng': torch.cuda.get_rng_state_all()} if self.device.type == 'cuda' else {}))
        write_log(self.base + '_last.jsonl', self.records)

    def from_file(self, net, name):
        """Return net in eval() with the weights that were kept under name, or chosen, as the file has them."""
        state = load_checkpoint(self.state_path, self.problem + STATE)
        net.load_state_dict(state['chosen']['net'] if name == 'chosen' else state[name])
        return net.to(self.device).eval()

    def finish(self, net, config, metrics, **more):
        """Write the checkpoint of net, which config rebuilds, and its log; metrics are those on the test images."""
        chosen = {} if self.chosen is None else dict(chosen_step=self.chosen['step'])
        self.records.append(dict(kind='test', step=self.step, **chosen, **metrics))
        save_checkpoint(self.ckpt, dict(
            more, problem=self.problem, step=chosen.get('chosen_step', self.step), config=config,
            net=plain_state(net), settings=self.settings, metrics=metrics, command=self.command))
        write_log(self.base + '.jsonl', self.records)
        print(self.ckpt + ': ' + ', '.join(f'{name.replace("_", " ")} {value:.5g}' for name, value in metrics.items()))


def given_flags(args, defaults):
    """Return the settings that were given as flags."""
    return {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}


def plain(values):
    """Return values as JSON gives them back, so that settings can be compared with those of a file."""
    return json.loads(json.dumps(values))


def base_of(ckpt):
    """Return a checkpoint's path without its ending .pth: what the names of its log and state begin with."""
    return ckpt[:-len('.pth')] if ckpt.endswith('.pth') else ckpt


def default_path(args, defaults, shipped):
    """Return the checkpoint of a run: --ckpt or, with default settings, the shipped one; without either UserError."""
    changed = [name for name, value in sorted(given_flags(args, defaults).items()) if value != defaults[name]]
    if changed and not args.ckpt:
        raise UserError(f'only a run with the default settings replaces {shipped}, and --{changed[0]} differs from its '
                        'default: name another file with --ckpt')
    return args.ckpt or shipped


def run_path(problem, defaults, settings, name):
    """Return the checkpoint of a run of problem 3 or 4: the shipped one, or one in a folder, whose name says name."""
    if settings == dict(defaults, target=settings['target'], source=SOURCE_OF[settings['target']]):
        return os.path.join(CHECKPOINTS, f'{problem}_{settings["target"]}.pth')
    changed = ''.join(f'_{other}{settings[other]}' for other in ('steps', 'batch_size')
                      if settings[other] != defaults[other])
    return os.path.join(CHECKPOINTS, f'{problem[:2]}_runs', f'{settings["source"]}_{settings["target"]}',
                        f'{name}{changed}_seed{settings["seed"]}.pth')


def read_results(problem, shipped):
    """Return {row of the table: its results} of problem 3 or 4, from the logs of finished runs; shipped is a row too.

    A result is a dict of source, target, seed, log (the path) and what was measured.  UserError if there is no log.
    """
    rows = {}
    names = [f'{problem}_{target}.jsonl' for target in SOURCE_OF] + [f'{problem[:2]}_runs/*/*_seed*[0-9].jsonl']
    for path in sorted(path for name in names for path in glob.glob(os.path.join(CHECKPOINTS, name))):
        log, name = read_log(path), re.match(r'(.+)_seed\d+\.jsonl', os.path.basename(path))
        result = dict({key: log[0]['settings'][key] for key in ('source', 'target', 'seed')}, log=path, **log[-1])
        rows.setdefault(name.group(1) if name else shipped, []).append(result)
    if not rows:
        raise UserError(f'{CHECKPOINTS} has no log of a run of {problem}: bash report/train_tables.sh makes them')
    return rows


def plain_state(net):
    """Return net's state_dict as contiguous float32 or int64 tensors on the CPU."""
    return OrderedDict((name, (value.detach().float() if value.is_floating_point() else value)
                        .cpu().contiguous().clone()) for name, value in net.state_dict().items())


def save_checkpoint(path, checkpoint):
    """Write a dict of plain values and tensors to path, whole or not at all, in the format that torch 1.4 reads.

    It goes through memory, since torch.save raises a RuntimeError on a full disk, and write_whole explains an OSError.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content, _use_new_zipfile_serialization=False)

    def write(temporary):
        with open(temporary, 'wb') as file:
            file.write(content.getbuffer())
    write_whole(path, write)


def load_checkpoint(path, problem):
    """Return the dict that save_checkpoint wrote for problem ('p1_vae', ...), on the CPU; UserError if it cannot."""
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {path}: train it as README.md says, or restore it with git')
    try:
        with warnings.catch_warnings():    # a newer torch says that this format is old
            warnings.simplefilter('ignore')
            checkpoint = torch.load(path, map_location='cpu')
    except Exception as error:             # a torn file raises nearly anything
        if is_out_of_memory(error):
            raise
        raise UserError(f'{path} is torn, or no checkpoint that torch {torch.__version__} reads '
                        f'({type(error).__name__}: {str(error)[:80]}): name another file, restore it with git or '
                        'train anew') from error
    if not isinstance(checkpoint, dict) or checkpoint.get('problem') != problem:
        other = checkpoint.get('problem') if isinstance(checkpoint, dict) else None
        raise UserError(f'{path} is a checkpoint of {other or "something else"}, not of {problem}: name another file')
    return checkpoint


def load_net(kind, path, problem, device):
    """Return (net of the class kind, in eval() on device, checkpoint) of the file of a finished run, or UserError."""
    checkpoint = load_checkpoint(path, problem)
    try:
        net = kind(**checkpoint['config'])
        net.load_state_dict(checkpoint['net'])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f'{path} does not fit {kind.__name__} ({type(error).__name__}: {str(error)[:80]}): '
                        f'name a file as {problem}.py --train writes it') from error
    return net.to(device).eval(), checkpoint


def sha256(path):
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_log(path, records):
    """Write records (dicts) to path as JSON lines, whole or not at all."""
    write_text(path, ''.join(json.dumps(record) + '\n' for record in records))


def read_log(path):
    """Return the records (dicts) of a JSON-lines log.  Raises UserError if it is missing."""
    if not os.path.isfile(path):
        raise UserError(f'there is no log {path}: --train writes it beside its checkpoint, and '
                        'tests/benchmark.py those of the measurements')
    with open(path) as file:
        return [json.loads(line) for line in file]
