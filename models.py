"""Every net, and everything about weights: building, running, training, saving and loading them.

Constructors take plain keyword arguments, read no globals and print nothing, so that a checkpoint
can hold the arguments that rebuild its net.  All of it runs on torch 1.4 as on today's.
"""
import contextlib
import copy
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from inspect import signature

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets import (DIGIT_SIZE, DIRECTIONS, SOURCE_OF, UserError, check_no_device, is_out_of_memory, list_images,
                      read_images, to_float, warn, write_whole)

try:
    import fcntl
except ImportError:            # on Windows
    fcntl = None

# autocast came with torch 1.10, and with it channels_last kernels that are worth having on a CPU
MODERN = hasattr(torch, 'autocast')
CHECKPOINTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'checkpoints')


# ------------------------------------------------------------------------------------------- nets

class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions (He et al. 2016, arXiv 1603.05027).

    (N, channels, H, W) -> the same shape.
    """

    def __init__(self, channels):
        super(ResidualBlock, self).__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1))

    def forward(self, x):
        return x + self.layers(x)


class VAEEncoder(nn.Module):
    """(N, 3, 64, 64) float in [0, 1] -> mean and log-variance of q(z|x), each (N, latent_dim)."""

    def __init__(self, latent_dim, channels):
        super(VAEEncoder, self).__init__()
        layers = [nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1)]       # 32x32
        for before, after in zip(channels, channels[1:]):                              # 16, 8, 4
            layers += [nn.BatchNorm2d(before), nn.LeakyReLU(0.2),
                       nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1),
                       ResidualBlock(after)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels[-1]), nn.LeakyReLU(0.2))
        self.mean = nn.Linear(channels[-1] * 4 * 4, latent_dim)
        self.log_variance = nn.Linear(channels[-1] * 4 * 4, latent_dim)

    def forward(self, x):
        features = self.features(2 * x - 1).flatten(1)      # (N, channels[-1] * 16)
        return self.mean(features), self.log_variance(features)


class VAEDecoder(nn.Module):
    """(N, latent_dim) -> (N, 3, 64, 64) float in [0, 1].

    Upsampling is a 1x1 convolution to four times the channels and a pixel shuffle (Shi et al. 2016,
    arXiv 1609.05158), which costs a CPU less than a transposed convolution.
    """

    def __init__(self, latent_dim, channels):
        super(VAEDecoder, self).__init__()
        self.channels = channels[-1]
        self.project = nn.Linear(latent_dim, self.channels * 4 * 4)
        layers = []
        for before, after in zip(channels[:0:-1], channels[-2::-1]):                   # 4, 8, 16
            layers += [ResidualBlock(before), nn.Conv2d(before, 4 * after, kernel_size=1),
                       nn.PixelShuffle(2)]
        self.layers = nn.Sequential(
            *layers, ResidualBlock(channels[0]), nn.BatchNorm2d(channels[0]), nn.LeakyReLU(0.2),
            nn.Conv2d(channels[0], 3 * 4, kernel_size=3, padding=1), nn.PixelShuffle(2))   # 64x64

    def forward(self, z):
        features = self.project(z).view(-1, self.channels, 4, 4)
        return torch.sigmoid(self.layers(features))


class VAE(nn.Module):
    """Variational autoencoder for 64x64 images (Kingma and Welling 2014, arXiv 1312.6114)."""

    def __init__(self, latent_dim, channels):
        super(VAE, self).__init__()
        self.encoder = VAEEncoder(latent_dim, tuple(channels))
        self.decoder = VAEDecoder(latent_dim, tuple(channels))

    def forward(self, x, noise):
        """Return reconstruction (N, 3, 64, 64), mean and log-variance (N, latent_dim).

        noise is a draw of N(0, I), (N, latent_dim): z = mean + exp(log_variance / 2) noise.
        """
        mean, log_variance = self.encoder(x)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(z), mean, log_variance


def gan_weights(module):
    """Draw the first weights from N(0, 0.02), those of a batch norm from N(1, 0.02).

    Source: Radford et al. 2016 (DCGAN, arXiv 1511.06434), section 4; for the batch norm PyTorch's DCGAN
    example.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class Generator(nn.Module):
    """(N, latent_dim) -> (N, 3, 64, 64) float in [-1, 1] (Radford et al. 2016, figure 1).

    channels are those at 32, 16, 8 and 4 pixels.
    """

    def __init__(self, latent_dim, channels):
        super(Generator, self).__init__()
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
    """(N, 3, 64, 64) float in [-1, 1] -> (N,) unbounded scores, high for real images (same source).

    channels are those at 32, 16, 8 and 4 pixels.  norm is what follows the inner convolutions:
    'batch' norm; 'layer' norm over channels and pixels, which looks at one image alone; 'none'; or
    'spectral', which normalises the weights of every convolution instead (Miyato et al. 2018,
    arXiv 1802.05957).
    """

    def __init__(self, channels, norm):
        super(Discriminator, self).__init__()
        self.norm = norm
        normalise = {'batch': nn.BatchNorm2d, 'layer': lambda count: nn.GroupNorm(1, count)}.get(norm)
        layers = [nn.Conv2d(3, channels[0], kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in zip(channels, channels[1:]):
            layers.append(nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1,
                                    bias=normalise is None))
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

    With normalise each channel of each image is brought to mean 0 and variance 1 first, so that
    neither brightness nor contrast can tell two domains apart (instance normalisation of the input:
    Shu et al. 2018, arXiv 1802.08735).
    """

    def __init__(self, channels, normalise):
        super(DigitEncoder, self).__init__()
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
    """(N, 3, 28, 28) float of any range -> logits (N, 10); encoder and classifier of problems 3 and 4.

    channels are those at 28, 14 and 7 pixels; features is the width of what the encoder gives.
    """

    def __init__(self, channels, dropout, normalise=True):
        super(DigitNet, self).__init__()
        self.features = 9 * channels[-1]
        self.encoder = DigitEncoder(channels, normalise)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.features, 10))

    def forward(self, x):
        return self.classifier(self.encoder(x))


class DomainDiscriminator(nn.Module):
    """Features (N, features) -> logits (N,), high for the source domain."""

    def __init__(self, features, hidden):
        super(DomainDiscriminator, self).__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.LeakyReLU(0.2),
                                    nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))

    def forward(self, features):
        return self.layers(features).flatten()


class Swish(nn.Module):
    """x sigmoid(x) (Ramachandran et al. 2017, arXiv 1710.05941), which torch 1.4 has under no name."""

    def forward(self, x):
        return F.silu(x) if MODERN else x * torch.sigmoid(x)


class ToldBlock(nn.Module):
    """Residual block that is told something about all of an image, by a scale and a shift after its second norm.

    (N, before, H, W) and what it is told, (N, told) -> (N, after, H, W).  Source: Ho et al. 2020 (arXiv 2006.11239),
    appendix B, with the scale of Nichol and Dhariwal 2021 (arXiv 2102.09672).
    """

    def __init__(self, before, after, told):
        super(ToldBlock, self).__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, before), Swish(), nn.Conv2d(before, after, kernel_size=3, padding=1))
        self.scale_and_shift = nn.Linear(told, 2 * after)
        self.norm = nn.GroupNorm(8, after)
        self.second = nn.Sequential(Swish(), nn.Conv2d(after, after, kernel_size=3, padding=1))
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, kernel_size=1)
        nn.init.zeros_(self.second[1].weight)          # so that a new block is its skip alone
        nn.init.zeros_(self.second[1].bias)

    def forward(self, x, told):
        scale, shift = self.scale_and_shift(told).unsqueeze(2).unsqueeze(3).chunk(2, 1)
        return self.skip(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class UNet(nn.Module):
    """Noisy images (N, 3, H, W), steps of the noise (N,) and labels (N,) -> the noise in them, (N, 3, H, W).

    A label is 0 .. classes - 1, or classes where it is not told.  channels are those at H, H / 2, H / 4, ...
    pixels; told is the width of what the blocks are told.  Source: Ho et al. 2020, appendix B, without attention.
    """

    def __init__(self, channels, classes, told):
        super(UNet, self).__init__()
        self.classes, self.told, self.swish = classes, told, Swish()
        self.label = nn.Embedding(classes + 1, told)
        self.step = nn.Sequential(nn.Linear(told, told), Swish(), nn.Linear(told, told))
        pairs = list(zip(channels, channels[1:]))
        self.begin = nn.Conv2d(3, channels[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList([ToldBlock(before, before, told) for before in channels[:-1]])
        self.shrink = nn.ModuleList([nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
                                     for before, after in pairs])
        self.middle = nn.ModuleList([ToldBlock(channels[-1], channels[-1], told) for _ in range(2)])
        self.grow = nn.ModuleList([nn.Conv2d(after, before, kernel_size=3, padding=1) for before, after in pairs])
        self.up = nn.ModuleList([ToldBlock(2 * before, before, told) for before in channels[:-1]])
        self.end = nn.Sequential(nn.GroupNorm(8, channels[0]), Swish(),
                                 nn.Conv2d(channels[0], 3, kernel_size=3, padding=1))

    def forward(self, x, steps, labels):
        # waves of the step number, of lengths from 2 pi to almost 20,000 pi (Vaswani et al. 2017)
        count = self.told // 2
        frequencies = torch.exp(torch.arange(count, device=x.device).float() * (-math.log(10000) / count))
        waves = steps.float().unsqueeze(1) * frequencies
        told = self.swish(self.step(torch.cat([waves.sin(), waves.cos()], 1)) + self.label(labels))
        x, skips = self.begin(x.contiguous()), []      # in the layout of its weights: see fastest_layout
        for block, shrink in zip(self.down, self.shrink):
            x = block(x, told)
            skips.append(x)
            x = shrink(x)
        for block in self.middle:
            x = block(x, told)
        for block, grow, skip in list(zip(self.up, self.grow, skips))[::-1]:
            x = grow(F.interpolate(x, size=skip.shape[2:], mode='nearest'))
            x = block(torch.cat([x, skip], 1), told)
        return self.end(x)


class ClassGenerator(nn.Module):
    """Noise (N, latent_dim) and labels (N,) -> (N, 3, size, size) float in [-1, 1].

    The label's embedding multiplies the noise.  channels are those at size / 2, size / 4, ... pixels.
    """

    def __init__(self, latent_dim, classes, channels, size):
        super(ClassGenerator, self).__init__()
        channels = list(channels)[::-1]
        self.start, self.channels = size >> len(channels), channels[0]
        self.label = nn.Embedding(classes, latent_dim)
        self.project = nn.Linear(latent_dim, self.channels * self.start ** 2, bias=False)
        layers = []
        for before, after in zip(channels, channels[1:]):
            layers += [nn.BatchNorm2d(before), nn.ReLU(),
                       nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1, bias=False)]
        self.layers = nn.Sequential(
            *layers, nn.BatchNorm2d(channels[-1]), nn.ReLU(),
            nn.ConvTranspose2d(channels[-1], 3, kernel_size=4, stride=2, padding=1), nn.Tanh())
        self.apply(gan_weights)

    def forward(self, z, labels):
        x = self.project(z * self.label(labels))
        return self.layers(x.view(-1, self.channels, self.start, self.start))


class ClassDiscriminator(nn.Module):
    """(N, 3, size, size) float in [-1, 1] -> scores (N,), high for real images, and logits (N, classes).

    Spectral norm in every layer (Miyato et al. 2018).  channels are those at size / 2, size / 4, ... pixels.
    """

    def __init__(self, classes, channels, size):
        super(ClassDiscriminator, self).__init__()
        spectral_norm = nn.utils.spectral_norm
        layers, before = [], 3
        for after in channels:
            layers += [spectral_norm(nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            before = after
        self.layers = nn.Sequential(*layers)
        features = channels[-1] * (size >> len(channels)) ** 2
        self.score = spectral_norm(nn.Linear(features, 1))
        self.classify = spectral_norm(nn.Linear(features, classes))

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
    """Return 'bf16' where bfloat16 autocast trains faster than float32 on this device, else 'fp32'.

    On a CPU it is measured, not read off the feature flags: there are CPUs with AVX512-BF16 that
    convolve faster in float32.
    """
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
        # the first round also builds the kernels; the least of the rounds leaves that out
        seconds[precision] = min(seconds.get(precision, 1e9), time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def autocast(device, precision):
    """Return the context in which a net runs in precision 'bf16' or 'fp32' on device."""
    if precision == 'bf16' and MODERN:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.ExitStack()      # does nothing


def fastest_layout(net):
    """Return net in the memory layout in which it trains fastest on a CPU.

    That is channels_last, but not for group norm, whose kernel then takes up to 20 times as long.
    """
    if not MODERN or any(isinstance(layer, nn.GroupNorm) for layer in net.modules()):
        return net
    return net.to(memory_format=torch.channels_last)


def on_device(images, device):
    """Move a float image batch to device, in the memory layout of most nets that a Run keeps."""
    images = images.to(device)
    return images.contiguous(memory_format=torch.channels_last) if MODERN else images


def cosine_rate(step, steps, peak, warm_up):
    """Learning rate at a step, counted from 1: linear warm-up, then half a cosine from peak down to 0."""
    return peak * min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group['lr'] = learning_rate


def take_step(optimizer, loss, learning_rate):
    """Let an optimizer take one step down the gradient of loss."""
    set_learning_rate(optimizer, learning_rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update_average(average, net, updates, most):
    """Move average towards net: average = decay average + (1 - decay) net, buffers too.

    The decay is updates / (updates + 20), where updates counts from 1, but at most most, so that the first weights
    are soon forgotten.
    """
    decay = min(most, updates / (updates + 20))
    with torch.no_grad():
        new = net.state_dict()
        for name, value in average.state_dict().items():
            if value.is_floating_point():
                value.add_(new[name] - value, alpha=1 - decay)
            else:
                value.copy_(new[name])


def run_batches(function, device, *inputs, batch_size=50):
    """Call function on one batch of inputs after another and join the results on the CPU.

    inputs are tensors of N rows; function takes the same rows of each, on device, and returns one
    tensor or a tuple of them, batch first.  The results are float32.
    """
    with torch.no_grad():
        outputs = [function(*[rows[start:start + batch_size].to(device) for rows in inputs])
                   for start in range(0, len(inputs[0]), batch_size)]
    if torch.is_tensor(outputs[0]):
        return torch.cat([output.float().cpu() for output in outputs])
    return tuple(torch.cat([part.float().cpu() for part in parts]) for parts in zip(*outputs))


def with_statistics(net, images, device):
    """Return a copy of net in eval() whose batch norms have the statistics of float (N, 3, H, W) images.

    Source: Li et al. 2016 (AdaBN, arXiv 1603.04779).
    """
    net = copy.deepcopy(net).to(device).eval()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None               # a plain mean over the batches
        norm.train()
    run_batches(net, device, images, batch_size=250)
    return net.eval()


def frechet_distance(a, b):
    """Frechet distance between Gaussians fitted to features (N, D) and (M, D): a float.

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    a_cov, b_cov = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(a_cov)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b_cov @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(a_cov) + np.trace(b_cov) - 2 * cross)


def decode_noise(decoder, count, dimensions, seed, device):
    """Decode count draws of N(0, I), (count, dimensions), into (count, 3, H, W) uint8 images.

    decoder maps them to [0, 1].  The draws come from NumPy's legacy generator, whose stream is
    frozen (NEP 19); each is decoded alone and on one thread, since the order in which a convolution
    adds up, and with it the last bit, may change with the batch size and the number of threads.
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


def to_uint8(images):
    """Round float images in [0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------- a training run

# what the state of a run holds besides what a script keeps
STATE = ('ckpt', 'step', 'seconds', 'settings', 'facts', 'precision', 'command', 'chosen', 'log', 'rng', 'torch_rng')


class Run(object):
    """One training run from its start, or from where it stopped, to its end: all but the algorithm.

    The checkpoint of a run appears at its end, and beside it its log: run.pth and run.jsonl.  Until then
    run_last.pth holds the state from which --resume goes on as if the run had never stopped, and
    run_last.jsonl the log up to that state.  A script uses a Run like this:

        run = Run(args, PROBLEM, DEFAULTS, constants(), args.ckpt)
        net = run.keep(net=Net(**NET))                   # is saved with the run, and restored by --resume
        run.facts(net, training_images=len(images))
        for step in run.steps(LOG_EVERY, SAVE_EVERY):
            rows = torch.randint(..., generator=run.rng)
            ...                                          # the algorithm
            run.log(loss=loss)                           # a record holds the means since the last record
            if run.saves:
                run.measured(error=...)                  # on held-out images
                run.choose(error, net)                   # where the least error chooses the weights
        net = run.from_file(Net(**NET), 'chosen')
        run.finish(net, NET, metrics)

    args are the flags of the command line.  defaults are the settings that have a flag of the same name.
    constants are the constants of the method, with names in capitals.  given takes precedence over args.

    Attributes: settings (flags and constants), last_step, batch_size, device, precision, resumed (bool), rng (a
    torch.Generator with the seed of the run); in the loop also step, logs and saves (whether this step does).

    Raises UserError if a flag contradicts the saved run, if the method has changed since, if a new run would
    overwrite an unfinished one, or if ckpt is a file of another kind.
    """

    def __init__(self, args, problem, defaults, constants, ckpt, given=None):
        if os.path.isdir(ckpt):
            raise UserError(f'{ckpt} is a folder: name a file for --ckpt')
        check_no_device(ckpt)
        if os.path.exists(ckpt):
            load_checkpoint(ckpt, problem)             # a file of another kind must not be overwritten
        self.problem, self.ckpt, self.base = problem, ckpt, base_of(ckpt)
        self.device = pick_device(args.device)
        self.state_path = self.base + '_last.pth'
        remove_leftovers(self.base)
        given = dict({name: getattr(args, name) for name in defaults}, **given or {})
        given = {name: value for name, value in given.items() if value is not None}
        self.state = self._find_state(args.resume)
        self.resumed = self.state is not None
        if self.resumed:
            self._check_resumed(given, plain(constants))
            self.settings, self.precision = self.state['settings'], self.state['precision']
            self.command, self.chosen = self.state['command'], self.state['chosen']
            self.records, self.step = self.state['log'], self.state['step']
        else:
            self.settings = plain(dict(defaults, **given, **constants))
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
        state = load_checkpoint(self.state_path, state_of(self.problem))
        self._check_has(state, *STATE)
        if state['ckpt'] != os.path.basename(self.ckpt):
            raise UserError(f'{self.state_path} belongs to --ckpt {state["ckpt"]}: name that, or a --ckpt that differs '
                            'in more than .pth')
        if resume:
            return state
        step, steps = state['step'], state['settings']['steps']
        if step < steps:
            raise UserError(f'{self.state_path} holds a run at step {step} of {steps}: if it was stopped, add --resume '
                            'to go on with it, or delete it to start anew')
        return None

    def _check_has(self, state, *names):
        for name in names:
            if name not in state:
                raise UserError(f'{self.state_path} was saved by another version of this program and lacks {name}: '
                                'delete it and train anew')

    def _check_resumed(self, given, constants):
        settings = self.state['settings']
        for name, value in given.items():
            if value != settings.get(name):
                raise UserError(f'{self.state_path} was started with --{name} {settings.get(name)}: resume without '
                                f'--{name}, or delete it to start anew')
        check_constants(self.state_path, settings, constants)

    def keep(self, **named):
        """Return the one named thing; it is saved with the run, and restored here by --resume.

        It is a net, which moves to the device, in the memory layout in which it trains fastest; an
        optimizer; or a tensor or a list, which must then be changed in place.  Call it before steps().
        """
        (name, thing), = named.items()
        if isinstance(thing, nn.Module):
            thing = fastest_layout(thing.to(self.device))
        elif torch.is_tensor(thing):
            thing = thing.to(self.device)
        self.kept[name] = thing
        if self.resumed:
            self._check_has(self.state, name)
            saved = self.state[name]
            if torch.is_tensor(thing):
                thing.copy_(saved)
            elif isinstance(thing, list):
                thing[:] = saved
            else:
                thing.load_state_dict(saved)
        return thing

    def facts(self, *nets, **facts):
        """Log what else describes the run: numbers and a checksum of its data; parameters are those of nets.

        A resumed run keeps the record of its start.  Raises UserError if a fact is not what it was then.
        """
        facts['parameters'] = sum(parameter.numel() for net in nets for parameter in net.parameters())
        if self.resumed:
            for name, value in facts.items():
                if self.state['facts'].get(name) != value:
                    raise UserError(f'{self.state_path} was started with {name.replace("_", " ")} '
                                    f'{self.state["facts"].get(name)}, and now it is {value}: resume with the data and '
                                    'the files of that start, or delete it to start anew')
        else:
            gpu = dict(gpu=torch.cuda.get_device_name(self.device)) if self.device.type == 'cuda' else {}
            self.records.append(dict(
                gpu, kind='run', command=self.command, settings=self.settings, device=self.device.type,
                precision=self.precision, threads=torch.get_num_threads(), torch=str(torch.__version__), **facts))
        self.described = facts

    def steps(self, log_every, save_every):
        """Yield the steps that are left; every log_every-th and save_every-th and the last log and save.

        A new run first removes the state of a finished run, so that nothing takes it for its own.
        """
        self.start = time.time()
        if self.resumed:
            self.rng.set_state(self.state['rng'])
            torch.set_rng_state(self.state['torch_rng'])
            if self.device.type == 'cuda' and 'cuda_rng' in self.state:
                torch.cuda.set_rng_state_all(self.state['cuda_rng'])
            self.start -= self.state['seconds']
            self.state = None              # its memory is needed no more
        elif os.path.exists(self.state_path):
            os.remove(self.state_path)
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
        """Take numbers or one-element tensors into the means of the next record; at its step, log and show it.

        The first four are shown.  Raises UserError if a mean is not finite.
        """
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
            kept, problem=state_of(self.problem), ckpt=os.path.basename(self.ckpt), step=self.step,
            seconds=time.time() - self.start,
            settings=self.settings, facts=self.described, precision=self.precision,
            command=self.command, chosen=self.chosen, log=self.records, rng=self.rng.get_state(),
            torch_rng=torch.get_rng_state(),
            **{'cuda_rng': torch.cuda.get_rng_state_all()} if self.device.type == 'cuda' else {}))
        write_log(self.base + '_last.jsonl', self.records)

    def from_file(self, net, name):
        """Return net in eval() with the weights that were kept under name, or chosen, as the file has them."""
        state = load_checkpoint(self.state_path, state_of(self.problem))
        net.load_state_dict(state['chosen']['net'] if name == 'chosen' else state[name])
        return net.to(self.device).eval()

    def finish(self, net, config, metrics, **more):
        """Write the checkpoint of net, which config rebuilds, its sum, and at last the log.

        metrics are what was measured on the test images; more goes into the checkpoint too.
        """
        chosen = {} if self.chosen is None else dict(chosen_step=self.chosen['step'])
        self.records.append(dict(kind='test', step=self.step, **chosen, **metrics))
        save_checkpoint(self.ckpt, dict(
            more, problem=self.problem, step=chosen.get('chosen_step', self.step), config=config,
            net=plain_state(net), settings=self.settings, metrics=metrics, command=self.command))
        write_sum(self.ckpt)
        write_log(self.base + '.jsonl', self.records)
        print(self.ckpt + ': ' + ', '.join(f'{name.replace("_", " ")} {value:.5g}' for name, value in metrics.items()))


def base_of(ckpt):
    """Return a checkpoint's path without its ending .pth: what the names of its log and state begin with."""
    return ckpt[:-len('.pth')] if ckpt.endswith('.pth') else ckpt


def state_of(problem):
    """Return the name under which the training states of a problem are saved."""
    return f'{problem} (training state)'


def remove_leftovers(base):
    """Remove the temporary files of a run that was killed while saving, but not those of a live run."""
    folder, stem = os.path.split(os.path.abspath(base))
    name = re.compile(r'\.(\d+)\.' + re.escape(stem) + r'(\.pth|\.jsonl|_last\.pth|_last\.jsonl)?')
    for leftover in os.listdir(folder) if os.path.isdir(folder) else ():
        found = name.fullmatch(leftover)
        if found and not is_running(int(found.group(1))):
            os.remove(os.path.join(folder, leftover))


def is_running(process):
    """Return whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass                               # it is another user's
    return True


def plain(values):
    """Return values as JSON gives them back, so that settings can be compared with those of a file."""
    return json.loads(json.dumps(values))


def check_constants(path, settings, constants):
    """Raise UserError if the settings of the run at path have other constants of the method than these."""
    for name, value in constants.items():
        if settings.get(name) != value:
            raise UserError(f'{path} was made with {name} = {settings.get(name)}, and the script now has {value}: '
                            'undo that change, or delete the run to make it anew')


# -------------------------------------------------------------------------------------- on the disk

def plain_state(net):
    """Return net's state_dict as contiguous float32 or int64 tensors on the CPU."""
    return OrderedDict((name, (value.detach().float() if value.is_floating_point() else value)
                        .cpu().contiguous().clone()) for name, value in net.state_dict().items())


def save_checkpoint(path, checkpoint):
    """Write a dict of plain values and tensors to path, whole or not at all, as torch 1.4 reads it.

    torch 1.6 and newer write a zip file by default, which torch 1.4 refuses.  On a full disk
    torch.save raises a RuntimeError; through memory it is the OSError that write_whole explains.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content, _use_new_zipfile_serialization=False)

    def write(temporary):
        with open(temporary, 'wb') as file:
            file.write(content.getbuffer())
    write_whole(path, write)


class PlainUnpickler(pickle.Unpickler):
    """Reads tensors and plain containers alone: a checkpoint from elsewhere runs no code of its own.

    For a torch without weights_only.
    """

    def find_class(self, module, name):
        known = (module, name) in (('collections', 'OrderedDict'), ('torch', 'Size'),
                                   ('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_parameter'))
        if not known and not (module == 'torch' and name.endswith('Storage') and name.isalpha()):
            raise pickle.UnpicklingError(f'it wants to run {module}.{name}')
        return super(PlainUnpickler, self).find_class(module, name)


class PlainPickle(object):
    """What torch.load needs of the module pickle, with PlainUnpickler in place of its Unpickler."""

    Unpickler = PlainUnpickler
    load = staticmethod(lambda file, **options: PlainUnpickler(file, **options).load())


def load_checkpoint(path, problem):
    """Return the dict that save_checkpoint wrote for problem ('p1_vae', ...), on the CPU.

    Raises UserError if path is missing, torn, of a newer torch, no checkpoint or one of another problem.
    """
    script, fix = problem.split()[0], 'name another file'
    folder, name = os.path.split(os.path.abspath(path))
    shipped = folder == CHECKPOINTS and name in [script + '.pth'] + [f'{script}_{target}.pth' for target in SOURCE_OF]
    if problem == state_of(script):
        fix = 'delete it and train anew'
    elif shipped:
        fix = f'restore it with git, or let hw3_{problem[:2]}.sh fetch it again'
    if not os.path.exists(path):
        raise UserError(f'there is no checkpoint {path}: train one with {script}.py --train'
                        + (f', restore it with git, or let hw3_{problem[:2]}.sh fetch it' if shipped else ''))
    if not os.path.isfile(path):
        raise UserError(f'{path} is a folder or a device, no checkpoint: name another file')
    if zipfile.is_zipfile(path) and tuple(map(int, torch.__version__.split('.')[:2])) < (1, 6):
        with zipfile.ZipFile(path) as file:
            if any(name.endswith('data.pkl') for name in file.namelist()):
                raise UserError(f'{path} was saved by a newer torch than this {torch.__version__}: save it again there '
                                'with torch.save(..., _use_new_zipfile_serialization=False)')
    # torch 1.4 would hand weights_only on to pickle
    safe = dict(weights_only=True) if 'weights_only' in signature(torch.load).parameters else dict(
        pickle_module=PlainPickle)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            checkpoint = torch.load(path, map_location='cpu', **safe)
    except Exception as error:     # a torn pickle can raise nearly anything
        if is_out_of_memory(error):
            raise
        # today's torch then goes on about its weights_only, by many lines
        reason = 'it is no plain torch file' if isinstance(error, pickle.UnpicklingError) else str(error)[:80]
        raise UserError(f'{path} is no checkpoint or a torn one ({type(error).__name__}: {reason}): {fix}') from error
    if not isinstance(checkpoint, dict) or 'problem' not in checkpoint:
        raise UserError(f'{path} is no checkpoint of this project, which says what problem it is of: {fix}')
    if checkpoint['problem'] != problem:
        raise UserError(f'{path} is a checkpoint of {checkpoint["problem"]}, not of {problem}: name another file')
    return checkpoint


def load_net(kind, path, problem, device):
    """Return (net in eval() on device, checkpoint) of a checkpoint that a Run finished.

    kind is the class of the net.  What nn.DataParallel (module.) or torch.compile (_orig_mod.) puts before the
    names of weights is dropped.  Raises UserError if they do not fit the net, or are not finite.
    """
    checkpoint = load_checkpoint(path, problem)
    fix = f'it is not as {problem}.py --train writes it: name another file'
    try:
        net = kind(**checkpoint['config'])
        weights = OrderedDict()
        for name, value in checkpoint['net'].items():
            while name.startswith(('module.', '_orig_mod.')):
                name = name.split('.', 1)[1]
            weights[name] = value
        sizes, found = [{name: tuple(value.shape) for name, value in state.items()}
                        for state in (net.state_dict(), weights)]
    except Exception as error:     # the file's config and net may hold anything
        if is_out_of_memory(error):
            raise
        reason = f'{type(error).__name__}: {str(error)[:80]}'
        raise UserError(f'{path} does not say what net it is of ({reason}): {fix}') from error
    for wrong, says in ((sizes.keys() - found.keys(), 'lacks {}'), (found.keys() - sizes.keys(), 'has {} too many'),
                        ({name for name in sizes if sizes[name] != found.get(name)}, 'has another size of {}'),
                        ({name for name in sizes if not torch.isfinite(weights[name].float()).all()}
                         if sizes == found else (), 'has values that are not finite in {}')):
        if wrong:
            raise UserError(f'{path} {says.format(min(wrong))} ({len(wrong)} such weights): {fix}')
    net.load_state_dict(weights)
    return net.to(device).eval(), checkpoint


def file_sum(path):
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


@contextlib.contextmanager
def alone_in(folder):
    """No other process is in this context of the same folder; others wait.  On Windows they do not."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_sum(path):
    """Put path's SHA-256 into the SHA256SUMS beside it, if there is one, as sha256sum prints it."""
    folder, name = os.path.split(os.path.abspath(path))
    sums = os.path.join(folder, 'SHA256SUMS')
    if not os.path.exists(sums):
        return

    def write(temporary):
        with open(temporary, 'w') as file:
            file.writelines(line + '\n' for line in sorted(lines, key=lambda line: line.split(None, 1)[-1]))
    with alone_in(folder):
        with open(sums) as file:
            lines = [line for line in file.read().splitlines() if line.strip() and line.split(None, 1)[-1] != name]
        lines.append(f'{file_sum(path)}  {name}')
        write_whole(sums, write)


def write_log(path, records):
    """Write records (dicts) to path as JSON lines, whole or not at all."""
    def write(temporary):
        with open(temporary, 'w') as file:
            file.writelines(json.dumps(record) + '\n' for record in records)
    write_whole(path, write)


def read_log(path):
    """Return the records (dicts) of a JSON-lines log.  Raises UserError if it is missing or no log."""
    if not os.path.isfile(path):
        raise UserError(f'there is no log {path}: --train writes it beside its checkpoint, and '
                        'tests/benchmark.py those of the measurements')
    try:
        with open(path) as file:
            records = [json.loads(line) for line in file]
    except ValueError as error:
        raise UserError(f'{path} is no log ({error}): restore it with git, or train anew') from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f'{path} is empty or no log: restore it with git, or train anew')
    return records


# -------------------------------------------------------------------- shared by problems 3 and 4

DIGIT_NET = dict(channels=[32, 64, 128], dropout=0.5)      # channels at 28, 14 and 7 pixels
DISCRIMINATOR_HIDDEN = 128
PROCESSES = 8                # at most, in labelling a folder
SHARE = 256                  # images that a process reads at once


def domain_loss(source, target):
    """Mean cross-entropy of the discriminator's logits (N,) for source images and for target ones.

    Source: Ganin et al. 2016, section 4.2; 1 stands for the source domain, each domain counts a half.
    """
    return 0.5 * (F.softplus(-source).mean() + F.softplus(target).mean())


def domain_accuracy(source, target):
    """Share of the discriminator's logits (N,) that are on their domain's side; each domain counts a half."""
    return 0.5 * ((source > 0).float().mean() + (target < 0).float().mean())


def predict(net, images, device, batch_size=250):
    """Return the classes (N,) that a net in eval() gives to (N, 3, H, W) uint8 images."""
    return run_batches(lambda batch: net(to_float(batch)).argmax(1), device, images,
                       batch_size=batch_size).long()


def probabilities_of(net, images, device):
    """Return the probabilities (N, 10) that a net in eval() gives to (N, 3, H, W) uint8 images."""
    return run_batches(lambda batch: torch.softmax(net(to_float(batch)), 1), device, images)


def accuracy(net, images, labels, device):
    """Share of (N, 3, H, W) uint8 images to which a net in eval() gives their labels (N,)."""
    return (predict(net, images, device) == labels).float().mean().item()


def nuclear_norm(probabilities):
    """Nuclear norm of probabilities (N, 10), scaled so that it is at most 1: high if sure and diverse.

    It judges predictions without labels, and likes even shares best; it is nan for a net that diverged.
    Source: Cui et al. 2020 (arXiv 2003.12237), eq. 8.
    """
    if not torch.isfinite(probabilities).all():
        return math.nan
    return float(torch.norm(probabilities, p='nuc')) / math.sqrt(probabilities.numel())


def measure_digits(net, images, labels, watched, device):
    """Measure a net in eval() on held-out images (N, 3, 28, 28) uint8 with labels, and on watched ones without.

    Returns a dict: accuracy on the former; of the predictions for the latter, which are the target's, the nuclear
    norm and the shares of the ten digits.  By these methods are compared without a label of the target.
    """
    probabilities = probabilities_of(net, watched, device)
    return dict(accuracy=accuracy(net, images, labels, device), nuclear_norm=nuclear_norm(probabilities),
                predicted_shares=[(probabilities.argmax(1) == digit).float().mean().item() for digit in range(10)])


def measure_target(net, test, target, watched, device):
    """Measure a net in eval() at the end of its run, for which no label that is read here has chosen anything.

    test and target are the DigitImages of the target's test and training images; watched are the rows of the
    latter that were held out.  Returns a dict: the number of test images, the accuracy on them and on watched.
    """
    return dict(images=len(test.names), accuracy=accuracy(net, test.images, test.labels, device),
                held_out_accuracy=accuracy(net, target.images[watched], target.labels[watched], device))


def label_folder(problem, ckpt, target, folder, batch_size, device):
    """Return the sorted names of the images in a folder, and the digits that a checkpoint's net gives them.

    On Linux, a CPU divides the images among one process for each core, at most PROCESSES.  An image's label
    depends on that image alone.
    """
    torch.set_num_threads(1)               # in each process; two threads would wait for a busy core
    net, checkpoint = load_net(DigitNet, ckpt, problem, device)
    settings = checkpoint.get('settings')
    trained_for = settings.get('target') if isinstance(settings, dict) else None
    if trained_for != target:
        raise UserError(f'{ckpt} was trained for {trained_for}: name that as --target, or another --ckpt'
                        if trained_for in SOURCE_OF else
                        f'{ckpt} does not say for which target it was trained: name another --ckpt')
    names = list_images(folder)
    others = len(os.listdir(folder)) - len(names)
    if others:
        print(f'{others} other files or folders beside the {len(names)} images are left out', flush=True)
    shares = [names[start:start + SHARE] for start in range(0, len(names), SHARE)]
    found = in_processes(process_count(device, len(shares)), label_share, shares, net, folder, batch_size, device)
    labels, flat, shown = [], [], time.time()
    for (digits, of_one_colour), share in zip(found, shares):      # found first: it ends its processes at its end
        labels += digits
        flat += [name for name, one in zip(share, of_one_colour) if one]
        if time.time() - shown > 2:
            print(f'{len(labels):,} of {len(names):,} images', flush=True)
            shown = time.time()
    if flat:
        warn(f'{flat[0]} has a single colour ({len(flat)} such of {len(names)} images): its label means nothing')
    return names, labels


def label_share(names, net, folder, batch_size, device):
    """Return the digits of some of a folder's images, and which of these images have a single colour."""
    images = read_images(folder, names, DIGIT_SIZE)
    flat = (images == images[:, :, :1, :1]).flatten(1).all(1)
    return predict(net, images, device, batch_size).tolist(), flat.tolist()


def process_count(device, parts):
    """Return in how many processes so many parts of a task are to be computed on device.

    Forked processes have the net without loading it; elsewhere than on Linux forking is not safe.
    """
    if device.type == 'cuda' or sys.platform != 'linux':
        return 1
    return min(PROCESSES, len(os.sched_getaffinity(0)), parts)


def in_processes(count, function, parts, *inputs):
    """Yield function(part, *inputs) for each of parts in turn, computed in count processes (1: in this one).

    An exception in one of them is raised here; all of them end with this function.
    """
    if count == 1:
        for part in parts:
            yield function(part, *inputs)
        return
    forked = multiprocessing.get_context('fork')
    pipes = [forked.Pipe(duplex=False) for _ in range(count)]
    workers = [forked.Process(target=work, args=(index, pipes, function, parts[index::count], inputs), daemon=True)
               for index in range(count)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)         # the keyboard stops this process, and it them
    try:
        for worker in workers:
            worker.start()
        for _, sender in pipes:
            sender.close()
        signal.signal(signal.SIGINT, handler)
        for index in range(len(parts)):
            try:
                result = pipes[index % count][0].recv()
            except EOFError:
                raise UserError('a process was ended from outside, probably for want of memory: free some') from None
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        signal.signal(signal.SIGINT, handler)
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def work(index, pipes, function, parts, inputs):
    """Send function(part, *inputs) for each of parts through the pipe of this process, or an exception."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other, (receiver, sender) in enumerate(pipes):
        receiver.close()                   # so that sending fails once the first process is gone
        if other != index:
            sender.close()
    try:
        for part in parts:
            pipes[index][1].send(function(part, *inputs))
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipes[index][1].send(error)


def own_path(args, defaults, shipped):
    """Return the checkpoint of a run: --ckpt or, for a run with the default settings, the shipped one.

    Raises UserError if a flag differs from defaults and no --ckpt is given, since the shipped one would be lost.
    """
    changed = [name for name, value in sorted(defaults.items()) if getattr(args, name) not in (None, value)]
    if changed and not args.ckpt:
        raise UserError(f'only a run with the default settings replaces {shipped}, and --{changed[0]} differs from its '
                        'default: name another file with --ckpt')
    return args.ckpt or shipped


def run_path(problem, defaults, settings, name):
    """Return the checkpoint of a run: runs of a scenario share a folder, one for each target is shipped.

    name says what the run trains; what differs from defaults beside the seed is in the path too.
    """
    if settings == dict(defaults, target=settings['target'], source=SOURCE_OF[settings['target']]):
        return os.path.join(CHECKPOINTS, f'{problem}_{settings["target"]}.pth')
    changed = ''.join(f'_{other}{settings[other]}' for other in ('steps', 'batch_size')
                      if settings[other] != defaults[other])
    return os.path.join(CHECKPOINTS, f'{problem[:2]}_runs', f'{settings["source"]}_{settings["target"]}',
                        f'{name}{changed}_seed{settings["seed"]}.pth')


def results_path(problem):
    """Return the log that gathers the results of a problem's table."""
    return os.path.join(CHECKPOINTS, f'{problem[:2]}_results.jsonl')


def digit_runs(args, problem, defaults, constants, cells, name_of):
    """Yield the Run of --target, or every Run of the table that the other flags leave and that is to be trained.

    cells are the settings of the runs of both tables (--directions), name_of(settings) names one.  With --resume
    finished runs are left out; between runs the results of all that are finished are gathered.
    """
    table = []
    for cell in cells:
        settings = dict(defaults, **cell)
        table.append((settings, run_path(problem, defaults, settings, name_of(settings))))
    flags = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    if args.target:
        settings = dict(defaults, source=SOURCE_OF[args.target])
        path = run_path(problem, defaults, dict(settings, **flags), name_of(dict(settings, **flags)))
        yield Run(args, problem, settings, constants, args.ckpt or path)
        if not args.ckpt:
            gather_results(problem, table, constants, name_of)
        return
    names, sources = set(cells[0]), DIRECTIONS[args.directions or 'asked']
    chosen = [(dict(settings, **flags), path) for settings, path in table
              if settings['source'] == sources[settings['target']]
              and all(settings[name] == value for name, value in flags.items() if name in names)]
    if not chosen:
        raise UserError('no run of the table has these flags: say --target, not --directions, to train one of its own')
    for settings, _ in chosen:
        path = run_path(problem, defaults, settings, name_of(settings))
        if args.resume and is_finished(path, dict(settings, **constants)):
            print(f'{path} is finished', flush=True)
        else:
            yield Run(args, problem, defaults, constants, path, given=settings)
        gather_results(problem, table, constants, name_of)


def is_finished(path, settings):
    """Return whether the run of the checkpoint at path is finished, and was not started again since.

    Raises UserError if that run has other constants of the method than settings.
    """
    log, state = base_of(path) + '.jsonl', base_of(path) + '_last.pth'
    if not os.path.exists(log):
        return False
    records = read_log(log)
    check_constants(log, records[0].get('settings', {}),
                    plain({name: value for name, value in settings.items() if name.isupper()}))
    return records[-1].get('kind') == 'test' and not (
        os.path.exists(state) and os.path.getmtime(state) > os.path.getmtime(log))


def gather_results(problem, table, constants, name_of):
    """Write into one log what the finished runs of a table, [(settings, path)], measured on test images."""
    os.makedirs(CHECKPOINTS, exist_ok=True)
    with alone_in(CHECKPOINTS):
        records = []
        for settings, path in table:
            log = base_of(path) + '.jsonl'
            try:
                lines = read_log(log) if os.path.exists(log) else []
            except UserError as error:
                warn(f'the table leaves out a run: {error}')
                continue
            if lines and lines[-1]['kind'] == 'test' and lines[0].get('settings') == plain(
                    dict(settings, **constants)):
                metrics = {name: value for name, value in lines[-1].items() if name not in ('kind', 'step')}
                records.append(dict(kind='result', row=name_of(settings), source=settings['source'],
                                    target=settings['target'], seed=settings['seed'],
                                    log=os.path.relpath(log, os.path.dirname(CHECKPOINTS)), **metrics))
        write_log(results_path(problem), records)


def rows_of(problem):
    """Return {name of a row: its records} of a problem's table."""
    rows = {}
    for record in read_log(results_path(problem)):
        rows.setdefault(record['row'], []).append(record)
    return rows
