"""Every net, and everything about weights: building, running, saving and loading them.

Constructors take plain keyword arguments, read no globals and print nothing, so that a checkpoint
can hold the arguments that rebuild its net.  All of it runs on torch 1.4 as on today's.
"""
import contextlib
import copy
import glob
import hashlib
import io
import json
import os
import time
from collections import OrderedDict
from inspect import signature

import numpy as np
import torch
import torch.nn as nn

from datasets import UserError, to_float, write_whole

# autocast came with torch 1.10, and with it channels_last kernels that are worth having on a CPU
MODERN = hasattr(torch, 'autocast')


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

    def __init__(self, latent_dim=128, channels=(32, 64, 128, 256)):
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
    """(N, 3, 64, 64) float in [-1, 1] -> (N,) scores without bound, high for real (ibid.).

    channels are those at 32, 16, 8 and 4 pixels.  norm is what follows the inner convolutions:
    'batch' norm; 'layer' norm over channels and pixels, which looks at one image alone; or
    'spectral', which normalises the weights of every convolution instead (Miyato et al. 2018,
    arXiv 1802.05957).
    """

    def __init__(self, channels, norm):
        super(Discriminator, self).__init__()
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
        return self.layers(x).flatten()


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

    def __init__(self, channels, normalise=True):
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


def for_training(net, device):
    """Move a net to device, with channels_last weights where this torch gains from them."""
    torch.set_flush_denormal(True)     # saturated nets make denormals, 40 times slower on a CPU
    if device.type == 'cuda' and MODERN:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    net = net.to(device).train()
    return net.to(memory_format=torch.channels_last) if MODERN else net


def on_device(images, device):
    """Move a float image batch to device, in the memory layout of for_training's nets."""
    images = images.to(device)
    return images.contiguous(memory_format=torch.channels_last) if MODERN else images


def set_learning_rate(optimizer, learning_rate):
    for group in optimizer.param_groups:
        group['lr'] = learning_rate


def update_average(average, net, decay):
    """Move average towards net: average = decay average + (1 - decay) net, buffers too."""
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


def predict(net, images, device, batch_size=250):
    """Return the classes (N,) that a net in eval() gives to (N, 3, H, W) uint8 images."""
    return run_batches(lambda batch: net(to_float(batch)).argmax(1), device, images,
                       batch_size=batch_size).long()


def decode_noise(decoder, count, dimensions, seed, device):
    """Decode count draws of N(0, I), (count, dimensions), into (count, 3, H, W) uint8 images.

    decoder maps them to [0, 1].  The draws come from NumPy's legacy generator, whose stream is
    frozen (NEP 19); each is decoded alone and on one thread, since the order in which a convolution
    adds up, and with it the last bit, may change with the batch size and the number of threads.
    """
    noise = np.random.RandomState(seed).standard_normal((count, dimensions)).astype(np.float32)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, getattr(cudnn, 'allow_tf32', False)
    torch.set_num_threads(1)
    cudnn.deterministic, cudnn.allow_tf32 = True, False
    try:
        images = run_batches(decoder, device, torch.from_numpy(noise), batch_size=1)
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.allow_tf32 = before
    return to_uint8(images)


def to_uint8(images):
    """Round float images in [0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


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


def load_checkpoint(path, problem):
    """Return the dict that save_checkpoint wrote for problem ('p1_vae', ...), on the CPU.

    Raises UserError if path is missing, torn, no checkpoint or one of another problem.
    """
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {path}: train one with {problem.split()[0]}.py --train, '
                        f'or let hw3_{problem[:2]}.sh fetch it')
    # torch 1.4 would hand weights_only on to pickle
    safe = {'weights_only': True} if 'weights_only' in signature(torch.load).parameters else {}
    try:
        checkpoint = torch.load(path, map_location='cpu', **safe)
        found = checkpoint['problem']
    except Exception as error:     # a torn pickle can raise nearly anything
        reason = ' '.join(str(error).split())[:80]
        raise UserError(f'{path} is no checkpoint or a torn one ({type(error).__name__}: {reason}): '
                        f'delete it and let hw3_{problem[:2]}.sh fetch it again, or train anew')
    if found != problem:
        raise UserError(f'{path} is a checkpoint of {found}, not of {problem}: name another --ckpt')
    return checkpoint


def resume_run(path, problem, resume, given, defaults, open_end=None):
    """Return (settings, state) of a run whose training state is, or will be, saved at path.

    given holds the settings of the command line, None where the user left one out; a saved run
    supplies these, or defaults does.  state is None for a new run.  Raises UserError where a flag
    contradicts the saved run, or a new run would overwrite an unfinished one.  open_end names the setting
    that says when a run ends, if a resumed run may have another one, not before its saved step.
    """
    folder, name = os.path.split(os.path.abspath(path))
    stem = name[:-len('_last.pth')]
    for ending in ('.pth', '.jsonl', '_last.pth', '_last.jsonl'):
        # what a run left that was killed in a save; not the saves of a run beside it
        for leftover in glob.glob(os.path.join(glob.escape(folder),
                                               f'.[0-9]*.{glob.escape(stem)}{ending}')):
            os.remove(leftover)
    state = load_checkpoint(path, problem) if os.path.exists(path) else None
    if resume and state is None:
        print(f'{path} does not exist yet: starting a new run', flush=True)
    if state is not None and not resume:
        ended = state['step'] >= state['settings']['steps']
        if not ended or (given.get(open_end) or 0) > state['settings']['steps']:
            raise UserError(f'{path} holds a run {"that ended" if ended else "stopped"} at step '
                            f'{state["step"]} of {state["settings"]["steps"]}: add --resume to go on with '
                            'it, or delete it to start anew')
        state = None
    settings = dict(defaults if state is None else state['settings'])
    for name, value in given.items():
        if (value is not None and state is not None and value != settings[name]
                and not (name == open_end and value >= state['step'])):
            raise UserError(f'{path} was started with --{name} {settings[name]}: resume without '
                            f'--{name}, or delete it to start anew')
        if value is not None:
            settings[name] = value
    return settings, state


def file_sum(path):
    """Return the SHA-256 of a file's content in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_sum(path):
    """Put path's SHA-256 into the SHA256SUMS beside it, if there is one, as sha256sum prints it."""
    folder, name = os.path.split(os.path.abspath(path))
    sums = os.path.join(folder, 'SHA256SUMS')
    if not os.path.exists(sums):
        return
    with open(sums) as file:
        lines = [line for line in file if line.split()[1:] != [name]]
    lines.append(f'{file_sum(path)}  {name}\n')

    def write(temporary):
        with open(temporary, 'w') as file:
            file.writelines(sorted(lines, key=lambda line: line.split()[-1]))
    write_whole(sums, write)


def write_log(path, records):
    """Write records (dicts) to path as JSON lines, whole or not at all."""
    def write(temporary):
        with open(temporary, 'w') as file:
            file.writelines(json.dumps(record) + '\n' for record in records)
    write_whole(path, write)


class RunLog(object):
    """The scalars of a training run as JSON lines, for --plot and README.

    Opened again at step, it forgets what was logged after that step, and the measurement at a run's
    end, so that a resumed run's log reads as if the run had never stopped.
    """

    def __init__(self, path, step):
        write_log(path, [record for record in (read_log(path, step) if step else [])
                         if record['kind'] != 'test'])
        self.path = path

    def add(self, kind, **scalars):
        try:
            with open(self.path, 'a') as file:
                file.write(json.dumps(dict(kind=kind, **scalars)) + '\n')
        except OSError as error:
            raise UserError(f'cannot write {self.path} ({error.strerror}): make room, then --resume')


def read_log(path, last_step=float('inf')):
    """Return the records (dicts) of a JSON-lines log up to last_step; a torn line ends it."""
    if not os.path.isfile(path):
        raise UserError(f'there is no log {path}: --train writes it beside its checkpoint, and '
                        'tests/benchmark.py those of the measurements')
    records = []
    with open(path) as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record.get('step', 0) <= last_step:
                records.append(record)
    return records


def is_complete(path, settings):
    """Return whether the log at path is that of a finished run with these settings."""
    records = read_log(path) if os.path.exists(path) else []
    return bool(records) and records[-1]['kind'] == 'test' and records[0].get('settings') == settings


def collect_results(path, logs):
    """Write into one results log the settings and the test's metrics of every finished run of these logs."""
    folder, records = os.path.dirname(os.path.dirname(path)), []
    for log in sorted(logs):
        lines = read_log(log)
        if lines and lines[-1]['kind'] == 'test' and not log.endswith('_last.jsonl'):
            metrics = {name: value for name, value in lines[-1].items() if name not in ('kind', 'step')}
            records.append(dict(lines[0]['settings'], kind='result', log=os.path.relpath(log, folder),
                                **metrics))
    write_log(path, records)
