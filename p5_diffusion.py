"""Problem 5, an extra: a diffusion model that draws the digit that is asked for.

A U-Net learns the noise in images (Ho et al. 2020, arXiv 2006.11239), conditioned on their labels, but for a tenth
of the images (classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598).  The schedule of the noise is a
cosine (Nichol and Dhariwal 2021, arXiv 2102.09672), and sampling is deterministic (DDIM: Song et al. 2021, arXiv
2010.02502).  Differences from the papers: the U-Net has no attention, sampling limits the image that it expects to
[-1, 1] and starts a little before the last step of the noise, and an average of the weights over the training steps
(EMA) is kept.  The digits are those of MNIST-M.

    bash hw3_p5.sh OUT.png                             draw ten digits of each class
    bash hw3_p5.sh FOLDER                              draw 100 single images of each class
    python3 p5_diffusion.py --train --data_dir hw3_data                train; --resume goes on after a stop
    python3 p5_diffusion.py --plot                     redraw every figure and table of the report

Rule of choice: the schedule is fixed, and the last average is kept.  Generated digits are scored at the end of
--train, by the upper bound of problem 3.  `tests/benchmark.py conditional` scores other numbers of sampling steps
and weights of the guidance too; these scores choose nothing, for the defaults were set before.
"""
import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from datasets import (check_images_out, data_checksum, new_parser, number_between, parse_shared, read_digits,
                      run_command, save_classes, split_held_out, to_float, to_uint8, to_unit, write_table, write_text)
from models import (CHECKPOINTS, DigitNet, Run, UNet, check_scores, cosine_rate, default_path, in_threads,
                    load_net, measure_generated, on_device, pick_device, read_log, repeatable, run_batches, sha256,
                    take_step, update_average)
from report import figures

PROBLEM = 'p5_diffusion'
CKPT = os.path.join(CHECKPOINTS, PROBLEM + '.pth')

# nets
CLASSES = 10
NET = dict(channels=[32, 64, 128], conditioning=128, classes=CLASSES)       # channels at 28, 14 and 7 pixels

# training
DEFAULTS = dict(
    steps=10000,             # of one batch each
    batch_size=128,          # images
    seed=0)
LEARNING_RATE = 1e-3         # of Adam, at its peak
LEARNING_RATE_WARM_UP = 200  # steps
NOISE_STEPS = 500            # of the diffusion
LABEL_DROPPED = 0.1          # share of the images whose label the U-Net does not get
AVERAGE_DECAY = 0.999        # of the average of the weights, per step: the most (see update_average)
LOG_EVERY = 200              # steps
SAVE_EVERY = 1000            # steps
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('NET', 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'NOISE_STEPS', 'LABEL_DROPPED', 'AVERAGE_DECAY')
JUDGE = os.path.join(CHECKPOINTS, 'p3_runs', 'usps_mnistm', 'target_seed0.pth')     # upper bound of problem 3
SCORED = 100                 # generated digits of each class in a score

# drawing and figures
SAMPLING_STEPS = 50          # of DDIM
SAMPLING_START = 490         # step of the noise where it starts; later ones leave too little signal to tell an image
GUIDANCE = 2.0               # weight of the guidance
COLUMNS = 10                 # images of each class in the picture
SINGLE = 100                 # images of each class in a folder
SCORES = os.path.join(CHECKPOINTS, 'p5_scores.jsonl')              # of tests/benchmark.py


# ---------------------------------------------------------------------------- losses and schedules

def alpha_bars():
    """alpha_bar after 0, 1, ... steps, the share of an image's variance that is signal: (NOISE_STEPS + 1,) float.

    Source: Nichol and Dhariwal 2021, eq. 17, with each step's noise limited as in their section 3.2.
    """
    wanted = np.cos((np.arange(NOISE_STEPS + 1) / NOISE_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    alphas = (wanted[1:] / wanted[:-1]).clip(0.001, 1)
    return torch.from_numpy(np.concatenate([[1], np.cumprod(alphas)]).astype(np.float32))


def add_noise(x, noise, alpha_bar):
    """Return images x (N, 3, H, W) with noise, for alpha_bar (N,): Ho et al. 2020, eq. 4."""
    alpha_bar = alpha_bar.view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise


def guided_noise(net, x, step, labels, guidance):
    """Noise that a U-Net sees in x (N, 3, H, W) at a step (a number), drawn towards the labels (N,).

    guidance 0 is the conditional net alone.  Source: Ho and Salimans 2022, eq. 6.
    """
    steps = torch.full_like(labels, step)
    if guidance == 0:
        return net(x, steps, labels)
    conditional, unconditional = net(torch.cat([x, x]), torch.cat([steps, steps]),
                                     torch.cat([labels, torch.full_like(labels, net.classes)])).chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


def ddim_sample(noise_in, x, sampling_steps):
    """Turn noise x (N, 3, H, W) into images in [-1, 1] by so many steps; noise_in(x, step) is the noise that is in x.

    Source: Song et al. 2021, eq. 12 with sigma = 0; the image that is expected at a step is limited to [-1, 1].
    """
    schedule = alpha_bars()
    steps = np.round(np.linspace(SAMPLING_START, 0, sampling_steps + 1)).astype(int).tolist()
    for step, next_step in zip(steps, steps[1:]):
        alpha_bar, next_alpha_bar = float(schedule[step]), float(schedule[next_step])
        image = ((x - math.sqrt(1 - alpha_bar) * noise_in(x, step)) / math.sqrt(alpha_bar)).clamp(-1, 1)
        # the noise that is in x if that is the image
        noise = (x - math.sqrt(alpha_bar) * image) / math.sqrt(1 - alpha_bar)
        x = math.sqrt(next_alpha_bar) * image + math.sqrt(1 - next_alpha_bar) * noise
    return x


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir/digits/mnistm and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    constants = {name: globals()[name] for name in CONSTANTS}
    run = Run(args, PROBLEM, DEFAULTS, constants, default_path(args, DEFAULTS, CKPT))
    device, rng = run.device, run.rng
    # data
    judge = load_net(DigitNet, JUDGE, 'p3_dann', device)[0]
    digits, test = [read_digits(args.data_dir, 'mnistm', split) for split in ('train', 'test')]
    train_rows, val_rows = split_held_out(len(digits.names))
    alpha_bar = alpha_bars().to(device)
    # held-out images always have the same noise
    val_rng = torch.Generator().manual_seed(0)
    val_images = 2 * to_float(digits.images[val_rows]) - 1
    val_steps = torch.randint(1, NOISE_STEPS + 1, (len(val_rows),), generator=val_rng)
    val_noise = torch.randn(val_images.shape, generator=val_rng)
    # nets
    net = run.keep('net', UNet(**NET))
    average = run.keep('average', copy.deepcopy(net)).eval()
    run.facts(net, training_images=len(train_rows), held_out=len(val_rows),
              data=data_checksum(digits.images, digits.labels, test.images), judge=sha256(JUDGE))
    # optimizers
    optimizer = run.keep('optimizer', torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99)))
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch: a share of the labels is dropped
        rows = train_rows[torch.randint(len(train_rows), (run.batch_size,), generator=rng)]
        x, labels = on_device(2 * to_float(digits.images[rows].to(device)) - 1, device), digits.labels[rows].to(device)
        dropped = torch.rand(run.batch_size, generator=rng) < LABEL_DROPPED
        labels = torch.where(dropped.to(device), torch.full_like(labels, CLASSES), labels)
        noise_steps = torch.randint(1, NOISE_STEPS + 1, (run.batch_size,), generator=rng).to(device)
        noise = torch.randn(x.shape, generator=rng).to(device)
        # update: the error of the noise
        learning_rate = cosine_rate(step, run.last_step, LEARNING_RATE, LEARNING_RATE_WARM_UP)
        with run.autocast():
            predicted = net(on_device(add_noise(x, noise, alpha_bar[noise_steps]), device), noise_steps, labels)
        loss = F.mse_loss(predicted.float(), noise)
        take_step(optimizer, loss, learning_rate)
        update_average(average, net, step, AVERAGE_DECAY)
        # log and save
        run.log(noise_loss=loss.detach(), learning_rate=learning_rate)
        if run.saves:
            errors = run_batches(lambda x, steps, labels, noise: (
                (average(add_noise(x, noise, alpha_bar[steps]), steps, labels) - noise) ** 2).mean((1, 2, 3)),
                device, val_images, val_steps, digits.labels[val_rows], val_noise)
            run.measured(noise_loss=errors.mean().item())
    # final check from file
    net = run.from_file(UNet(**NET), 'average')
    generated = generate_digits(net, SCORED, DEFAULTS['seed'], device)
    run.finish(net, NET, dict(images=len(test.names), **measure_generated(generated, judge, test.images, device)))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw digits: a row for each class in one picture at --out, or single images in the folder --out."""
    single = check_images_out(args.out)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    net = load_net(UNet, args.ckpt or CKPT, PROBLEM, device)[0]
    count = args.n or (SINGLE if single else COLUMNS)
    images = generate_digits(net, count, args.seed or DEFAULTS['seed'], device, args.sampling_steps, args.guidance)
    save_classes(args.out, single, images)


def generate_digits(net, count, seed, device, sampling_steps=SAMPLING_STEPS, guidance=GUIDANCE):
    """Generate count digits of each class from N(0, I): (count, 10, 3, 28, 28) uint8; each noise serves all classes.

    The noise comes from NumPy's legacy generator, whose stream is frozen (NEP 19).  The digits of one noise are
    generated together, on one thread, so that the result depends neither on the threads nor on count.
    """
    noise = np.random.RandomState(seed).standard_normal((count, 3 * 28 * 28)).astype(np.float32)
    labels = torch.arange(CLASSES, device=device)

    def generate(noise):
        x = torch.from_numpy(noise).to(device).expand(CLASSES, -1).reshape(CLASSES, 3, 28, 28)
        with torch.no_grad():
            images = ddim_sample(lambda x, step: guided_noise(net, x, step, labels, guidance), x, sampling_steps)
        return to_uint8(to_unit(images).cpu())
    threads = torch.get_num_threads()
    with repeatable():
        return torch.stack(list(in_threads(generate, list(noise), device, threads)))


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure and table of the report to --out (figures/) from the checkpoint and logs."""
    device = pick_device(args.device or 'cpu')
    scores = read_log(SCORES)
    check_scores(SCORES, scores, 'diffusion', CKPT)
    net = load_net(UNet, CKPT, PROBLEM, device)[0]
    write_text(os.path.join(args.out, 'fig5_1.txt'), f'{net}\n')
    images = generate_digits(net, COLUMNS, DEFAULTS['seed'], device)
    save_classes(os.path.join(args.out, 'fig5_2.jpg'), False, images)
    write_results(os.path.join(args.out, 'table5.csv'), scores)
    print(f'three figures and tables are in {args.out}')


def write_results(path, scores):
    """table5.csv: every setting that was scored on 1,000 generated digits, and real digits."""
    rows = [record for record in scores if record['kind'] == 'digits']
    titles = ('digits', 'sampling steps', 'guidance', 'accuracy (%)', 'Fréchet distance',
              'distance to the nearest training digit: mean', 'first percentile of these', 'images per second')
    cells = [[record['label'], str(record['sampling_steps']), str(record['guidance']),
              figures.rounded(100 * record['accuracy'], 1), figures.rounded(record['frechet'], 1),
              figures.rounded(record['nearest'], 2), figures.rounded(record['nearest_least'], 2),
              figures.rounded(record['images_per_second'], 1) if record['images_per_second'] else '']
             for record in rows]
    write_table(path, [titles] + cells)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'draw digits', 'picture to write or, without an ending, folder of '
                        'single images')
    parser.add_argument('--n', type=number_between(1, 2 ** 31 - 1),
                        help=f'images of each class ({COLUMNS} in a picture, {SINGLE} in a folder)')
    parser.add_argument('--sampling_steps', type=number_between(1, SAMPLING_START), default=SAMPLING_STEPS,
                        help=f'to draw ({SAMPLING_STEPS})')
    parser.add_argument('--guidance', type=number_between(0, 100, float), default=GUIDANCE,
                        help=f'weight of the guidance, to draw ({GUIDANCE:g})')
    return parse_shared(parser, PROBLEM, ['out'], argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
