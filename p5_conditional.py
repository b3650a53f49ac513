"""Problem 5: conditional generators that draw the digit, or the face, that is asked for.

Two methods, from the later years of the course:

    diffusion  a U-Net learns the noise in images (Ho et al. 2020, arXiv 2006.11239).  It is told their labels,
               but for a tenth of the images (classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598).
               The schedule of the noise is a cosine (Nichol and Dhariwal 2021, arXiv 2102.09672), and sampling
               is deterministic (DDIM: Song et al. 2021, arXiv 2010.02502).
    acgan      a generator and a discriminator that also names the label (Odena et al. 2017, arXiv 1610.09585),
               with spectral norm (Miyato et al. 2018, arXiv 1802.05957)

Both draw MNIST-M's digits (--data digits); acgan also draws faces with and without an attribute (--data faces), and
then trains on smaller batches.
Differences from the papers: the U-Net has no attention, and sampling limits the image that it expects to [-1, 1]
and starts a little before the last step of the noise; ACGAN's generator multiplies the noise by the label's
embedding and has the non-saturating loss; an average of the weights over the training steps (EMA) is kept.

    bash hw3_p5.sh OUT.png                             draw ten digits of each class
    bash hw3_p5.sh FOLDER                              draw 100 single images of each class
    python3 p5_conditional.py --train --method acgan --data faces --attribute Smiling
    python3 p5_conditional.py --plot                          redraw every figure and table of the report

Rule of choice: the schedule is fixed, and the last average is kept.  Drawn digits are scored at the end of
--train, by the upper bound of problem 3.  `tests/benchmark.py conditional` scores other numbers of sampling steps
and weights of the guidance too; these scores choose nothing, for the defaults were set before.
"""
import copy
import csv
import math
import os
import textwrap
import time

import numpy as np
import torch
import torch.nn.functional as F

from datasets import (ATTRIBUTES, COLOURS, PICTURE_ENDINGS, FaceImages, UserError, check_new_folder, check_out,
                      content_sum, draw_pixels, log_axis, make_grid, new_figure, new_parser, parse_shared, random_flip,
                      read_digits, rounded, run_command, save_figure, save_picture, save_single, split_held_out,
                      to_float, write_text, write_whole)
from models import (CHECKPOINTS, ClassDiscriminator, ClassGenerator, DigitNet, Run, UNet, accuracy, base_of,
                    cosine_rate, file_sum, frechet_distance, in_processes, load_net, on_device, own_path, pick_device,
                    process_count, read_log, repeatable, run_batches, take_step, to_uint8, update_average)

PROBLEM = 'p5_conditional'

# nets
UNET = dict(channels=[32, 64, 128], told=128)               # channels at 28, 14 and 7 pixels
GENERATOR = dict(                                           # channels at a half, a quarter, ... of the pixels
    digits=dict(latent_dim=64, channels=[64, 128], size=28),
    faces=dict(latent_dim=128, channels=[48, 96, 192, 384], size=64))
DISCRIMINATOR_CHANNELS = dict(digits=[64, 128], faces=[64, 128, 256, 512])

# training
DEFAULTS = dict(
    steps=10000,             # of one batch each
    batch_size=128,          # images; of faces FACES_IN_BATCH
    seed=0,
    method='diffusion',
    data='digits',           # or faces
    attribute='')            # of faces: the second of the two classes has it
FACES_IN_BATCH = 32
METHODS = ('diffusion', 'acgan')
KINDS = dict(diffusion=('diffusion', 'digits'), acgan=('acgan', 'digits'), faces=('acgan', 'faces'))      # of nets
ATTRIBUTE = 'Smiling'        # of faces, unless another is asked for
CLASSES = dict(digits=10, faces=2)
LEARNING_RATES = dict(diffusion=(1e-3,), acgan=(2e-4, 4e-4))     # of Adam, at the peak; of acgan: of G and of D
BETAS = dict(diffusion=(0.9, 0.99), acgan=(0.5, 0.999))
LEARNING_RATE_WARM_UP = 200  # steps
NOISE_STEPS = 500            # of the diffusion
LABEL_DROPPED = 0.1          # share of the images whose label the U-Net is not told
AVERAGE_DECAY = 0.999        # of the average of the weights, per step: the most (see update_average)
LOG_EVERY = 200              # steps
SAVE_EVERY = 1000            # steps
JUDGE = os.path.join(CHECKPOINTS, 'p3_runs', 'usps_mnistm', 'target_seed0.pth')     # upper bound of problem 3
SCORED = 100                 # drawn digits of each class in a score

# drawing and figures
SAMPLING_STEPS = 50          # of DDIM
SAMPLING_START = 490         # step of the noise where it starts; later ones leave too little signal to tell an image
GUIDANCE = 2.0               # weight of the guidance
COLUMNS = 10                 # images of each class in the picture
SINGLE = 100                 # images of each class in a folder
MOMENTS = (1, 10, 20, 30, 40, 50)                                  # steps of sampling that fig5_3 shows
SCORES = os.path.join(CHECKPOINTS, 'p5_scores.jsonl')              # of tests/benchmark.py
PUBLISHED = 0.892            # accuracy of the best public report, with an ACGAN and another judge
ACGAN_LINES = (('discriminator_loss', 'discriminator'), ('generator_loss', 'generator'),
               ('naming_loss', 'class, discriminator'), ('named_loss', 'class, generator'))


def constants():
    """Return the constants of the method.  A run saves them, so that --resume refuses changed ones."""
    return dict(UNET=UNET, GENERATOR=GENERATOR, DISCRIMINATOR_CHANNELS=DISCRIMINATOR_CHANNELS,
                LEARNING_RATES=LEARNING_RATES, BETAS=BETAS, LEARNING_RATE_WARM_UP=LEARNING_RATE_WARM_UP,
                NOISE_STEPS=NOISE_STEPS, LABEL_DROPPED=LABEL_DROPPED, AVERAGE_DECAY=AVERAGE_DECAY)


# ---------------------------------------------------------------------------- losses and schedules

def signal_shares():
    """Share of an image's variance that is signal, after 0, 1, ... steps of noise: (NOISE_STEPS + 1,) float.

    Source: Nichol and Dhariwal 2021, eq. 17, with each step's noise limited as in their section 3.2.
    """
    wanted = np.cos((np.arange(NOISE_STEPS + 1) / NOISE_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
    kept = (wanted[1:] / wanted[:-1]).clip(0.001, 1)
    return torch.from_numpy(np.concatenate([[1], np.cumprod(kept)]).astype(np.float32))


def noised(x, noise, share):
    """Return images x (N, 3, H, W) with noise, of which share (N,) or a number is signal: Ho et al. 2020, eq. 4."""
    share = torch.as_tensor(share).view(-1, 1, 1, 1)
    return share.sqrt() * x + (1 - share).sqrt() * noise


def guided_noise(net, x, step, labels, guidance):
    """Noise that a U-Net sees in x (N, 3, H, W) at a step (a number), drawn towards the labels (N,).

    guidance 0 is the conditional net alone.  Source: Ho and Salimans 2022, eq. 6.
    """
    steps = torch.full_like(labels, step)
    if guidance == 0:
        return net(x, steps, labels)
    told, untold = net(torch.cat([x, x]), torch.cat([steps, steps]),
                       torch.cat([labels, torch.full_like(labels, net.classes)])).chunk(2)
    return (1 + guidance) * told - guidance * untold


def denoise(noise_in, x, sampling_steps, shown=()):
    """Turn noise x (N, 3, H, W) into images in [-1, 1] by so many steps.

    noise_in(x, step) returns the noise that is in x.  Returns the images, and for each number in shown the image as
    it was expected after so many steps.  Source: Song et al. 2021, eq. 12 with sigma = 0; the expected image is
    limited to [-1, 1].
    """
    shares, expected = signal_shares(), []
    steps = np.round(np.linspace(SAMPLING_START, 0, sampling_steps + 1)).astype(int).tolist()
    for count, (step, after) in enumerate(zip(steps, steps[1:]), 1):
        share, next_share = float(shares[step]), float(shares[after])
        noise = noise_in(x, step)
        image = ((x - math.sqrt(1 - share) * noise) / math.sqrt(share)).clamp(-1, 1)
        # the noise that is in x if that is the image
        noise = (x - math.sqrt(share) * image) / math.sqrt(1 - share)
        x = math.sqrt(next_share) * image + math.sqrt(1 - next_share) * noise
        if count in shown:
            expected.append(image)
    return x, expected


def adversarial_losses(real, fake, real_logits, fake_logits, labels):
    """Two losses of the discriminator of ACGAN, from its scores (N,) and logits (N, classes): source and class.

    Each is the mean over the real images plus that over the drawn ones.  Source: Odena et al. 2017, eq. 2 and 3.
    """
    return (F.softplus(-real).mean() + F.softplus(fake).mean(),
            F.cross_entropy(real_logits, labels) + F.cross_entropy(fake_logits, labels))


def to_unit(images):
    """Turn images in [-1, 1] into [0, 1]."""
    return (images + 1) / 2


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    defaults = DEFAULTS
    if args.data == 'faces':
        defaults = dict(DEFAULTS, batch_size=FACES_IN_BATCH, attribute=ATTRIBUTE)
    # other methods, data and attributes have their own paths
    path = own_path(args, {name: defaults[name] for name in ('steps', 'batch_size', 'seed')},
                    path_of(args.method, args.data, args.attribute))
    run = Run(args, PROBLEM, defaults, constants(), path)
    data = run.settings['data']
    # data
    images, labels, test = read_data(args.data_dir, data, run.settings['attribute'])
    training, held_out = split_held_out(len(images))
    facts = dict(training_images=len(training), held_out=len(held_out), data=content_sum(images, labels, test.images))
    if data == 'digits':
        if not os.path.exists(JUDGE):
            raise UserError(f'there is no {JUDGE}: p3_dann.py --train --target mnistm --setting target makes it')
        judge, facts['judge'] = load_net(DigitNet, JUDGE, 'p3_dann', run.device)[0], file_sum(JUDGE)
    # nets, optimizers and loop
    learn = learn_diffusion if run.settings['method'] == 'diffusion' else learn_acgan
    config, more = learn(run, images, labels, training, held_out, facts)
    # final check from file
    net = run.from_file(build(**config), 'average')
    metrics = dict(images=len(test.names), **measure(net, judge, test.images, run.device)) if data == 'digits' else {}
    run.finish(net, config, metrics, **more)


def path_of(method, data, attribute):
    """Return the checkpoint of these settings or, where they are None, the default ones.

    It is the shipped one, or p5_methods/acgan.pth, p5_methods/acgan_smiling.pth, ...
    """
    method, data = method or DEFAULTS['method'], data or DEFAULTS['data']
    if (method, data) == (DEFAULTS['method'], DEFAULTS['data']):
        return os.path.join(CHECKPOINTS, PROBLEM + '.pth')
    name = method if data == 'digits' else f'{method}_{(attribute or ATTRIBUTE).lower()}'
    return os.path.join(CHECKPOINTS, 'p5_methods', name + '.pth')


def read_data(data_dir, data, attribute):
    """Return the training images (N, 3, H, W) uint8, their labels (N,), and the DigitImages or FaceImages of test."""
    if data == 'digits':
        digits, test = [read_digits(data_dir, 'mnistm', split) for split in ('train', 'test')]
        if len(test.names) < 2:
            raise UserError('the score needs two test digits or more: add images')
        return digits.images, digits.labels, test
    faces = FaceImages(data_dir, 'train')
    has = faces.attribute(attribute)
    if has.all() or not has.any():
        raise UserError(f'all training faces are alike in {attribute}: choose another --attribute')
    return faces.images, torch.from_numpy(has.astype(np.int64)), FaceImages(data_dir, 'test')


def build(**config):
    """Return the net that a checkpoint's config describes."""
    return (UNet if 'told' in config else ClassGenerator)(**config)


def next_batch(run, images, labels, training):
    """Return random images, in [-1, 1] and on the run's device, and their labels; half of the faces are mirrored."""
    rows = training[torch.randint(len(training), (run.batch_size,), generator=run.rng)]
    x = 2 * to_float(images[rows].to(run.device)) - 1
    if run.settings['data'] == 'faces':
        x = random_flip(x, run.rng)
    return on_device(x, run.device), labels[rows].to(run.device)


def learn_diffusion(run, images, labels, training, held_out, facts):
    """Let a U-Net learn the noise; return its config and what else the checkpoint holds."""
    # nets
    device, shares = run.device, signal_shares().to(run.device)
    classes = CLASSES[run.settings['data']]
    config = dict(UNET, classes=classes)
    net = run.keep(net=UNet(**config))
    average = run.keep(average=copy.deepcopy(net)).eval()
    run.facts(net, **facts)
    # optimizers
    peak, = LEARNING_RATES['diffusion']
    optimizer = run.keep(optimizer=torch.optim.Adam(net.parameters(), lr=peak, betas=BETAS['diffusion']))
    # held-out images always have the same noise
    rng = torch.Generator().manual_seed(0)
    watched = (2 * to_float(images[held_out]) - 1, torch.randint(1, NOISE_STEPS + 1, (len(held_out),), generator=rng),
               labels[held_out], torch.randn(images[held_out].shape, generator=rng))
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch
        x, told = next_batch(run, images, labels, training)
        dropped = torch.rand(run.batch_size, generator=run.rng) < LABEL_DROPPED
        told = torch.where(dropped.to(device), torch.full_like(told, classes), told)
        times = torch.randint(1, NOISE_STEPS + 1, (run.batch_size,), generator=run.rng).to(device)
        noise = torch.randn(x.shape, generator=run.rng).to(device)
        # update: the error of the noise
        learning_rate = cosine_rate(step, run.last_step, peak, LEARNING_RATE_WARM_UP)
        with run.autocast():
            found = net(on_device(noised(x, noise, shares[times]), device), times, told)
        loss = F.mse_loss(found.float(), noise)
        take_step(optimizer, loss, learning_rate)
        update_average(average, net, step, AVERAGE_DECAY)
        # log and save
        run.log(noise_loss=loss.detach(), learning_rate=learning_rate)
        if run.saves:
            errors = run_batches(lambda x, times, told, noise: (
                (average(noised(x, noise, shares[times]), times, told) - noise) ** 2).mean((1, 2, 3)), device, *watched)
            run.measured(noise_loss=errors.mean().item())
    return config, {}


def learn_acgan(run, images, labels, training, held_out, facts):
    """Let a generator and a discriminator learn; return the generator's config and what else is to be saved."""
    # nets
    device, name = run.device, run.settings['data']
    classes = CLASSES[name]
    config = dict(GENERATOR[name], classes=classes)
    of_discriminator = dict(classes=classes, channels=DISCRIMINATOR_CHANNELS[name], size=config['size'])
    generator = run.keep(net=ClassGenerator(**config))
    discriminator = run.keep(discriminator=ClassDiscriminator(**of_discriminator))
    average = run.keep(average=copy.deepcopy(generator)).eval()
    run.facts(generator, discriminator, **facts)
    # optimizers
    optimizers = [run.keep(**{key: torch.optim.Adam(net.parameters(), lr=peak, betas=BETAS['acgan'])})
                  for key, net, peak in zip(('generator_optimizer', 'discriminator_optimizer'),
                                            (generator, discriminator), LEARNING_RATES['acgan'])]
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        rates = [cosine_rate(step, run.last_step, peak, LEARNING_RATE_WARM_UP) for peak in LEARNING_RATES['acgan']]
        # batch: the drawn images have the labels of the real ones
        x, wanted = next_batch(run, images, labels, training)
        z = torch.randn(run.batch_size, config['latent_dim'], generator=run.rng).to(device)
        # update: discriminator, whether an image is real and of which class it is
        with run.autocast():
            drawn = generator(z, wanted)
            scores, logits = discriminator(torch.cat([x, drawn.detach().float()]))
        (real, fake), (real_logits, fake_logits) = scores.float().chunk(2), logits.float().chunk(2)
        adversarial, naming = adversarial_losses(real, fake, real_logits, fake_logits, wanted)
        take_step(optimizers[1], adversarial + naming, rates[1])
        # update: generator, so that the drawn images are called real and of their class
        discriminator.requires_grad_(False)
        with run.autocast():
            score, logits = discriminator(drawn)
        fooling, named = F.softplus(-score.float()).mean(), F.cross_entropy(logits.float(), wanted)
        take_step(optimizers[0], fooling + named, rates[0])
        discriminator.requires_grad_(True)
        update_average(average, generator, step, AVERAGE_DECAY)
        # log and save
        run.log(discriminator_loss=adversarial.detach(), generator_loss=fooling.detach(), naming_loss=naming.detach(),
                named_loss=named.detach(), learning_rate=rates[0])
        if run.saves:
            discriminator.eval()
            found = run_batches(lambda batch: discriminator(2 * to_float(batch) - 1)[1].argmax(1), device,
                                images[held_out])
            discriminator.train()
            run.measured(accuracy=(found.long() == labels[held_out]).float().mean().item())
    return config, dict(discriminator_config=of_discriminator)


def measure(net, judge, images, device):
    """Score 100 drawn digits of each class by judge, a DigitNet in eval(), against images (N, 3, 28, 28) uint8.

    Returns a dict: accuracy, the share of the drawn digits that judge reads as what was asked for; and frechet,
    the distance between the drawn digits and images, in the features of judge.
    """
    drawn = draw_images(net, SCORED, DEFAULTS['seed'], device)
    asked = torch.arange(drawn.shape[1]).repeat(len(drawn))
    drawn = drawn.flatten(0, 1)
    return dict(accuracy=accuracy(judge, drawn, asked, device),
                frechet=frechet_distance(features_of(judge, drawn, device), features_of(judge, images, device)))


def features_of(judge, images, device):
    """Return the features (N, D) that a DigitNet finds in (N, 3, 28, 28) uint8 images."""
    return run_batches(lambda batch: judge.encoder(to_float(batch)), device, images)


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw images: a row for each class in one picture at --out, or single images in the folder --out."""
    # whatever ends in letters, as .png or .gif, is to be a file
    single = os.path.isdir(args.out) or not os.path.splitext(args.out)[1][1:].isalpha()
    if single:
        check_new_folder(args.out)
    else:
        check_out(args.out, PICTURE_ENDINGS)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    net = read_net(args.ckpt, args.method, args.data, args.attribute, device)[0]
    sampling_steps = SAMPLING_STEPS if args.sampling_steps is None else args.sampling_steps
    guidance = GUIDANCE if args.guidance is None else args.guidance
    images = draw_images(net, args.n or (SINGLE if single else COLUMNS), args.seed or DEFAULTS['seed'], device,
                         sampling_steps, guidance)
    count = len(images)
    images = images.transpose(0, 1).flatten(0, 1)      # class after class
    if single:
        digits = max(3, len(str(count)))
        save_single(args.out, images, [f'{index // count}_{index % count + 1:0{digits}d}'
                                       for index in range(len(images))])
    else:
        save_picture(args.out, make_grid(images, count))


def read_net(ckpt, method, data, attribute, device):
    """Return (net, checkpoint) of ckpt or, without one, of these settings."""
    path = ckpt or path_of(method, data, attribute)
    if not ckpt and path != path_of(None, None, None) and not os.path.exists(path):
        of_faces = f' --data faces --attribute {attribute or ATTRIBUTE}' if data == 'faces' else ''
        raise UserError(f'there is no checkpoint {path}: train one with {PROBLEM}.py --train --method '
                        + method + of_faces)
    return load_net(build, path, PROBLEM, device)


def draw_images(net, count, seed, device, sampling_steps=SAMPLING_STEPS, guidance=GUIDANCE):
    """Draw count images of each class from N(0, I): (count, classes, 3, H, W) uint8; each noise serves all classes.

    The noise comes from NumPy's legacy generator, whose stream is frozen (NEP 19).  The images of one noise are
    drawn together, on one thread, so that the result depends neither on the threads nor on count.
    """
    classes = net.classes if isinstance(net, UNet) else net.label.num_embeddings
    dimensions = 3 * 28 * 28 if isinstance(net, UNet) else net.project.in_features
    noise = np.random.RandomState(seed).standard_normal((count, dimensions)).astype(np.float32)
    drawn, shown = [], time.time()
    with repeatable():
        for images in in_processes(process_count(device, count), draw_classes, list(noise), net, classes, device,
                                   sampling_steps, guidance):
            drawn.append(images)
            if time.time() - shown > 2:
                print(f'{len(drawn) * classes:,} of {count * classes:,} images', flush=True)
                shown = time.time()
    return torch.from_numpy(np.stack(drawn))


def draw_classes(noise, net, classes, device, sampling_steps, guidance):
    """Draw an image of each class from one noise (dimensions,): a (classes, 3, H, W) uint8 array."""
    labels = torch.arange(classes, device=device)
    noise = torch.from_numpy(noise).to(device).expand(classes, -1)
    with torch.no_grad():
        if isinstance(net, UNet):
            images, _ = denoise(lambda x, step: guided_noise(net, x, step, labels, guidance),
                                noise.reshape(classes, 3, 28, 28), sampling_steps)
        else:
            images = net(noise, labels)
    return to_uint8(to_unit(images).cpu()).numpy()


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure and table of the report to --out (figures/) from checkpoints and logs."""
    device = pick_device(args.device or 'cpu')
    nets, logs, scores = {}, {}, read_log(SCORES)
    for name, kind in KINDS.items():
        path = path_of(*kind, attribute=ATTRIBUTE)
        nets[name], checkpoint = read_net(None, *kind, attribute=ATTRIBUTE, device=device)
        check_scores(scores, name, path)
        logs[name] = read_log(base_of(path) + '.jsonl')
        if name == 'acgan':
            discriminator = ClassDiscriminator(**checkpoint['discriminator_config'])
    write_text(os.path.join(args.out, 'fig5_1.txt'), f'{nets["diffusion"]}\n{nets["acgan"]}\n{discriminator}\n')
    plot_digits(os.path.join(args.out, 'fig5_2.jpg'), nets, device)
    plot_sampling(os.path.join(args.out, 'fig5_3.jpg'), nets['diffusion'], device)
    plot_scores(os.path.join(args.out, 'fig5_4.png'), scores)
    plot_learning_curves(os.path.join(args.out, 'fig5_5.png'), logs)
    plot_pairs(os.path.join(args.out, 'fig5_6.jpg'), nets['faces'], scores, device)
    plot_results(os.path.join(args.out, 'table5'), scores)
    print(f'eight figures and tables are in {args.out}')


def check_scores(scores, what, path):
    """Raise UserError if what scores say of a net, 'diffusion', 'acgan' or 'faces', is not of the file at path."""
    if {record['sha256'] for record in scores if record['what'] == what} != {file_sum(path)}:
        raise UserError(f'{SCORES} has no scores of {path}: let tests/benchmark.py conditional measure them')


def plot_digits(path, nets, device):
    """fig5_2: a row for each digit, a column for each noise, by either method."""
    figure, all_axes = new_figure(3.6, columns=2)
    for axes, (name, title) in zip(all_axes, (('diffusion', 'Diffusion'), ('acgan', 'ACGAN'))):
        images = draw_images(nets[name], COLUMNS, DEFAULTS['seed'], device)
        draw_pixels(axes, make_grid(images.transpose(0, 1).flatten(0, 1), COLUMNS))
        axes.set_title(title + ': a row for each digit, a column for each noise')
    save_figure(path, figure)


def plot_sampling(path, net, device):
    """fig5_3: the first 0 of fig5_2, as it is expected after some of the steps of sampling."""
    noise = np.random.RandomState(DEFAULTS['seed']).standard_normal((1, 3, 28, 28)).astype(np.float32)
    label = torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad(), repeatable():
        _, expected = denoise(lambda x, step: guided_noise(net, x, step, label, GUIDANCE),
                              torch.from_numpy(noise).to(device), SAMPLING_STEPS, MOMENTS)
    figure, axes = new_figure(1.8)
    draw_pixels(axes, make_grid(to_uint8(to_unit(torch.cat(expected)).cpu()), len(MOMENTS)))
    for index, moment in enumerate(MOMENTS):
        axes.text(16 + 30 * index, -3, f'step {moment}', ha='center')
    axes.set_title(f'The first 0 as it is expected after some of {SAMPLING_STEPS} steps', pad=18)
    save_figure(path, figure)


def plot_scores(path, scores):
    """fig5_4: accuracy and distance over the weight of the guidance and over the number of sampling steps."""
    figure, all_axes = new_figure(4.4, rows=2, columns=2)
    drawn = [record for record in scores if record['kind'] == 'digits' and record['what'] == 'diffusion']
    others = {record['what']: record for record in scores if record['kind'] == 'digits'}
    for column, (flag, fixed, value, title) in enumerate((
            ('guidance', 'sampling_steps', SAMPLING_STEPS, f'weight of the guidance ({SAMPLING_STEPS} steps)'),
            ('sampling_steps', 'guidance', GUIDANCE, f'steps of sampling (guidance {GUIDANCE:g})'))):
        records = sorted((record for record in drawn if record[fixed] == value), key=lambda record: record[flag])
        for row, (name, label, scale) in enumerate((('accuracy', 'accuracy (%)', 100),
                                                    ('frechet', 'Fréchet distance', 1))):
            axes = all_axes[row][column]
            axes.plot([record[flag] for record in records], [scale * record[name] for record in records], 'o-',
                      color=COLOURS[0], label='diffusion')
            for what, colour in (('acgan', COLOURS[1]), ('real', COLOURS[6])):
                axes.axhline(scale * others[what][name], color=colour, linewidth=1, linestyle='--',
                             label=dict(acgan='ACGAN', real='real digits')[what])
            axes.set(xlabel=title, ylabel=label)
            axes.grid(True)
            if column == 1:
                axes.set_xscale('log')
                log_axis(axes.xaxis)
    all_axes[0][0].legend()
    save_figure(path, figure)


def plot_learning_curves(path, logs):
    """fig5_5: the losses over the images seen; on held-out images that of the averaged weights, all labels told."""
    figure, all_axes = new_figure(2.6, columns=3)
    for axes, name, title, lines in (
            (all_axes[0], 'diffusion', 'Diffusion: error of the noise', (('noise_loss', 'training'),)),
            (all_axes[1], 'acgan', 'ACGAN, digits', ACGAN_LINES), (all_axes[2], 'faces', 'ACGAN, faces', ACGAN_LINES)):
        size = logs[name][0]['settings']['batch_size']
        for kind, style in (('train', '-'), ('held_out', '--')):
            records = [record for record in logs[name] if record['kind'] == kind]
            for colour, (scalar, label) in zip(COLOURS, lines):
                points = [(record['step'] * size / 1000, record[scalar]) for record in records if scalar in record]
                if points:
                    axes.plot(*zip(*points), style, color=colour,
                              label=label if kind == 'train' else 'held-out')
        axes.set_title(title)
        axes.set(xlabel='images seen (thousands)', yscale='log',
                 ylabel='mean squared error' if name == 'diffusion' else 'loss (nats)')
        if name != 'diffusion':            # room for the legend below the curves
            low, high = axes.get_ylim()
            axes.set_ylim(low * (low / high) ** 0.6, high)
        log_axis(axes.yaxis)
        axes.grid(True)
        axes.legend(loc='upper right' if name == 'diffusion' else 'lower left')
    save_figure(path, figure)


def plot_pairs(path, net, scores, device):
    """fig5_6: ten pairs of faces of the same noise, without the attribute and with it."""
    images = draw_images(net, 10, DEFAULTS['seed'], device).transpose(0, 1).flatten(0, 1)
    record = next(record for record in scores if record['kind'] == 'faces')
    figure, axes = new_figure(1.8)
    draw_pixels(axes, make_grid(images, 10))
    for row, text in enumerate((f'not {ATTRIBUTE}', ATTRIBUTE)):
        axes.text(-6, 35 + 66 * row, text, ha='right', va='center')
    axes.set_title('Pairs of the same noise\na linear classifier agrees with what was asked for on '
                   f'{rounded(100 * record["accuracy"], 1)} % of 1,000 generated faces,\nand with the label on '
                   f'{rounded(100 * record["real_accuracy"], 1)} % of the test faces')
    save_figure(path, figure)


def plot_results(base, scores):
    """table5.png and .csv: every setting that was scored on 1,000 drawn digits, and real digits."""
    rows = [record for record in scores if record['kind'] == 'digits']
    columns = (('digits', '{label}'), ('sampling steps', '{sampling_steps}'), ('guidance', '{guidance}'),
               ('accuracy (%)', '{accuracy}'), ('Fréchet distance', '{frechet}'),
               ('distance to the nearest training digit: mean', '{nearest}'),
               ('first percentile of these', '{nearest_least}'), ('images per second', '{speed}'))
    cells = [[form.format(**dict(
        record, accuracy=rounded(100 * record['accuracy'], 1), frechet=rounded(record['frechet'], 1),
        nearest=rounded(record['nearest'], 2), nearest_least=rounded(record['nearest_least'], 2),
        speed=rounded(record['images_per_second'], 1) if record['images_per_second'] else '')) for _, form in columns]
        for record in rows]

    def write(temporary):
        with open(temporary, 'w', newline='', encoding='utf8') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow([title for title, _ in columns])
            writer.writerows(cells)
    write_whole(base + '.csv', write)
    figure, axes = new_figure(0.2 * (len(rows) + 4) + 0.3)
    axes.axis('off')
    table = axes.table(cellText=cells, colLabels=[textwrap.fill(title, 13) for title, _ in columns], loc='center',
                       cellLoc='center', bbox=[0, 0, 1, 1])
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, _), cell in table.get_celld().items():
        cell.set_linewidth(0.5)
        cell.set_height((4 if row == 0 else 1) / (len(rows) + 4))      # the titles have four lines
        if row == 0:
            cell.set_text_props(weight='bold')
    axes.set_title('1,000 drawn digits of MNIST-M, 100 of each class, against the test digits')
    save_figure(base + '.png', figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'draw images', 'picture to write or, without an ending, folder of '
                        'single images')
    parser.add_argument('--n', type=int, help=f'images of each class ({COLUMNS} in a picture, {SINGLE} in a folder)')
    parser.add_argument('--method', choices=METHODS, help=f'what is trained, or draws ({DEFAULTS["method"]})')
    parser.add_argument('--data', choices=sorted(CLASSES), help=f'what is drawn ({DEFAULTS["data"]})')
    parser.add_argument('--attribute', help=f'of faces: the second of the two classes has it ({ATTRIBUTE})')
    parser.add_argument('--sampling_steps', type=int, help=f'to draw by diffusion ({SAMPLING_STEPS})')
    parser.add_argument('--guidance', type=float, help=f'weight of the guidance, to draw by diffusion ({GUIDANCE:g})')
    args = parse_shared(parser, PROBLEM, ['out'], argv)
    for name in ('ckpt', 'method', 'data', 'attribute'):
        if args.plot and getattr(args, name):        # it shows the nets that were scored
            parser.error(f'--{name} is for another mode: leave it out')
    if args.data == 'faces' and (args.method or DEFAULTS['method']) == 'diffusion':
        parser.error('--data faces is for acgan alone: add --method acgan')
    if args.attribute and args.data != 'faces':
        parser.error('--attribute is for faces: add --data faces')
    if args.attribute:                     # as the columns spell it
        args.attribute = {name.lower(): name for name in ATTRIBUTES}.get(args.attribute.lower(), args.attribute)
    for name in ('sampling_steps', 'guidance'):
        if getattr(args, name) is not None and (args.train or args.plot or args.method == 'acgan'):
            parser.error(f'--{name} is for drawing by diffusion: leave it out')
    if args.sampling_steps is not None and not 1 <= args.sampling_steps <= SAMPLING_START:
        parser.error(f'--sampling_steps must lie in 1 .. {SAMPLING_START}')
    if args.guidance is not None and not 0 <= args.guidance <= 100:
        parser.error('--guidance must lie in 0 .. 100')
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
