"""Problem 2: a generative adversarial network that draws 64x64 faces.

Six methods with one generator and one width of the discriminator:

    dcgan      non-saturating loss, batch norm (Radford et al. 2016, arXiv 1511.06434)
    sngan      hinge loss, spectral norm (Miyato et al. 2018, arXiv 1802.05957)
    wgan_gp    Wasserstein loss, gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028)
    wgan_div   Wasserstein divergence (Wu et al. 2018, arXiv 1712.01026)
    dragan     non-saturating loss, gradient penalty near real images (Kodali et al. 2017, arXiv 1705.07215)
    r1         non-saturating loss, R1 penalty (Mescheder et al. 2018, arXiv 1801.04406) at every 16th step
               (Karras et al. 2020, arXiv 1912.04958)

Differences from the papers: all have DCGAN's nets, show the discriminator augmented images (Zhao et al. 2020, arXiv
2006.10738, at a fraction of its strength), let the learning rates, as in METHODS, fall to 0 over the last third of the
steps, and keep an average of the generator over its updates (EMA); one batch of generated faces serves both updates of
a step; Adam's settings are not corrected for the steps at which r1 has no penalty.

    bash hw3_p2.sh fig2_2.png                          draw 32 faces, as the grader does
    python3 p2_gan.py --out faces --n 1000             draw 1,000 single images, to score them
    python3 p2_gan.py --train --data_dir hw3_data      train; --resume goes on after a stop
    python3 p2_gan.py --plot --data_dir hw3_data       redraw every figure of the report

Rule of choice: the saved average with the least Frechet distance to 500 held-out training faces, measured on the
latent means of problem 1's encoder.  The test faces are measured once, from that file.  The
default method, r1, was set after a trial outside this repository; it also has the least distance of the six.
"""
import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from datasets import (PICTURE_ENDINGS, FaceImages, check_images_out, data_checksum, make_grid, new_parser,
                      number_between, parse_shared, random_flip, read_image, run_command, save_picture,
                      save_single_images, split_held_out, to_float, to_uint8, to_unit, write_text)
from models import (CHECKPOINTS, VAE, Discriminator, Generator, Run, base_of, decode_noise, default_path,
                    falling_rate, frechet_distance, load_net, on_device, pick_device, read_log, run_batches, sha256,
                    take_step, update_average)
from report import figures

PROBLEM = 'p2_gan'
CKPT = os.path.join(CHECKPOINTS, PROBLEM + '.pth')

# nets
NET = dict(latent_dim=128, channels=[64, 128, 256, 512])    # channels at 32, 16, 8 and 4 pixels
DISCRIMINATOR_CHANNELS = [96, 192, 384, 768]

# training
DEFAULTS = dict(
    steps=28000,             # of one batch each
    batch_size=160,          # images; a GPU takes hardly more time for a step of 160 than for one of 32
    seed=0,
    method='r1',
    augment=0.2)             # strength of what the discriminator's images go through; 0: nothing
METHODS = dict(              # learning rates of G and of D; G learns at every generator_every-th step
    dcgan=dict(loss='logistic', norm='batch', learning_rates=(2e-4, 2e-4), betas=(0.5, 0.999), generator_every=1),
    sngan=dict(loss='hinge', norm='spectral', learning_rates=(2e-4, 4e-4), betas=(0.5, 0.999), generator_every=1),
    wgan_gp=dict(loss='wasserstein', norm='layer', learning_rates=(2e-4, 2e-4), betas=(0.0, 0.9), generator_every=5),
    wgan_div=dict(loss='wasserstein', norm='layer', learning_rates=(2e-4, 2e-4), betas=(0.0, 0.9), generator_every=5),
    dragan=dict(loss='logistic', norm='layer', learning_rates=(2e-4, 2e-4), betas=(0.5, 0.999), generator_every=1),
    r1=dict(loss='logistic', norm='none', learning_rates=(2e-4, 2e-4), betas=(0.0, 0.99), generator_every=1))
# at each every-th step a penalty is added with weight * every, so that its mean weight is weight
PENALTIES = dict(
    wgan_gp=dict(weight=10, every=1), wgan_div=dict(weight=2, every=1), dragan=dict(weight=10, every=1),
    r1=dict(weight=0.05, every=16))
FALLING = 1 / 3              # share of the steps over which the learning rates fall to 0, at the end
AVERAGE_DECAY = 0.999        # of the average of the generator, per update: the most (see update_average)
LOG_EVERY = 500              # steps
SAVE_EVERY = 1000            # steps
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('NET', 'DISCRIMINATOR_CHANNELS', 'METHODS', 'PENALTIES', 'FALLING', 'AVERAGE_DECAY', 'SCORED')
SCORED = 1000                # generated faces in a held-out score
JUDGE = os.path.join(CHECKPOINTS, 'p1_vae.pth')      # problem 1's VAE: its encoder gives the features

# figures
FACES = 32                   # in the graded picture
COLUMNS = 8
SAMPLES = os.path.join(CHECKPOINTS, 'samples.jsonl')       # scores, of tests/benchmark.py
COUNTS = os.path.join(CHECKPOINTS, 'p2_counts.jsonl')      # of faces that a reader called broken, likewise


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_loss(method, real, fake):
    """Mean loss of the scores (N,) that the discriminator gives to real and generated images, without a penalty.

    logistic: Goodfellow et al. 2014, eq. 1; hinge: Miyato et al. 2018, eq. 16; wasserstein: Gulrajani et al., eq. 3.
    """
    loss = METHODS[method]['loss']
    if loss == 'logistic':
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if loss == 'hinge':
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def generator_loss(method, fake):
    """Mean loss of the generated images' scores (N,); it is non-saturating if the loss is logistic."""
    return F.softplus(-fake).mean() if METHODS[method]['loss'] == 'logistic' else -fake.mean()


def gradient_penalty(method, score, real, fake, rng):
    """Penalty of a method on the gradient g of the score at images, a mean over the batch.

    score maps images (N, 3, H, W) to scores (N,); |g| is the norm over all of an image.

    wgan_gp    (|g| - 1)^2 at random points between real and generated images: Gulrajani et al. 2017, eq. 3
    wgan_div   |g|^6 at such points: Wu et al. 2018, with their p = 6; k = 2 is the weight
    dragan     (|g| - 1)^2 at real images to which noise is added, uniform between 0 and half of their standard
               deviation: Kodali et al. 2017, with the noise of public implementations
    r1         |g|^2 at real images: Mescheder et al. 2018, eq. 9, where gamma / 2 is the weight
    """
    if method == 'r1':
        points = real
    elif method == 'dragan':
        points = real + 0.5 * real.std() * torch.rand(real.shape, generator=rng).to(real.device)
    else:
        epsilon = torch.rand(len(real), 1, 1, 1, generator=rng).to(real.device)
        points = real + epsilon * (fake - real)
    points = points.detach().requires_grad_()
    gradient, = torch.autograd.grad(score(points).sum(), points, create_graph=True)
    squares = (gradient ** 2).flatten(1).sum(1)
    if method == 'r1':
        return squares.mean()
    # a little more than 0, where the square root has no gradient
    return (squares ** 3 if method == 'wgan_div' else ((squares + 1e-12).sqrt() - 1) ** 2).mean()


def augment(images, strength, rng):
    """Recolour, shift and blank a square of (N, 3, H, W) images in [-1, 1]; differentiable; strength 0: no change.

    At strength 1 brightness moves by up to 0.5, saturation is multiplied by 0 to 2 and contrast by 0.5 to 1.5, the
    image moves by up to an eighth, with grey beside it, and a square of half its side is blanked.  Source: Zhao et al.
    2020 (DiffAugment), 'color, translation, cutout'.
    """
    if strength == 0:
        return images
    count, channels, height, width = images.shape

    def uniform():
        return torch.rand(count, 1, 1, 1, generator=rng).to(images.device)

    x = images + strength * (uniform() - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + strength * (2 * uniform() - 1))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + strength * (uniform() - 0.5))
    rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    down = (strength * height / 8 * (2 * uniform() - 1)).round().long()
    right = (strength * width / 8 * (2 * uniform() - 1)).round().long()
    x = F.pad(x, (1, 1, 1, 1))
    x = x.gather(2, (rows + 1 - down).clamp(0, height + 1).expand(-1, channels, -1, width + 2))
    x = x.gather(3, (columns + 1 - right).clamp(0, width + 1).expand(-1, channels, height, -1))
    blank = (((rows + 0.5 - uniform() * height).abs() < strength * height / 4)
             & ((columns + 0.5 - uniform() * width).abs() < strength * width / 4))
    return x * (~blank).float()


def latent_means(judge, images, device):
    """Return the means (N, latent_dim) that a VAE gives to (N, 3, 64, 64) uint8 images."""
    return run_batches(lambda batch: judge.encoder(to_float(batch))[0], device, images)


def measure(generator, judge, images, device):
    """Score a generator in eval() against (N, 3, 64, 64) uint8 images by judge, a VAE in eval().

    frechet is the distance of 1,000 generated faces, always of the same noise, in the VAE's latent means; it falls as
    N grows, so keep N.
    """
    noise = np.random.RandomState(0).standard_normal((SCORED, generator.project.in_features))
    generated = run_batches(lambda z: to_unit(generator(z)), device, torch.from_numpy(noise.astype(np.float32)))
    return dict(frechet=frechet_distance(latent_means(judge, to_uint8(generated), device),
                                         latent_means(judge, images, device)))


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir/face/train and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    constants = {name: globals()[name] for name in CONSTANTS}
    run = Run(args, PROBLEM, DEFAULTS, constants, default_path(args, DEFAULTS, CKPT))
    settings, device, rng = run.settings, run.device, run.rng
    method, strength = settings['method'], settings['augment']
    norm, rates, betas, generator_every = [
        METHODS[method][name] for name in ('norm', 'learning_rates', 'betas', 'generator_every')]
    penalty_weight, penalty_every = [PENALTIES.get(method, {}).get(name, 0) for name in ('weight', 'every')]
    # data
    judge = load_net(VAE, JUDGE, 'p1_vae', device)[0]
    faces, test = FaceImages(args.data_dir, 'train'), FaceImages(args.data_dir, 'test')
    training, held_out = [faces.images[rows] for rows in split_held_out(len(faces.names))]
    # nets
    generator = run.keep('generator', Generator(**NET))
    discriminator = run.keep('discriminator', Discriminator(DISCRIMINATOR_CHANNELS, norm))
    average = run.keep('average', copy.deepcopy(generator)).eval()
    run.facts(generator, discriminator, training_images=len(training), held_out=len(held_out), judge=sha256(JUDGE),
              data=data_checksum(faces.images, test.images))
    progress = run.keep('progress', [(0, generate_faces(average, COLUMNS, 0, device))])
    # optimizers
    generator_optimizer, discriminator_optimizer = [
        run.keep(name, torch.optim.Adam(net.parameters(), lr=rate, betas=betas))
        for name, net, rate in (('generator_optimizer', generator, rates[0]),
                                ('discriminator_optimizer', discriminator, rates[1]))]

    def score(images):
        with run.autocast():
            return discriminator(images).float()

    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        trains_generator, scalars = step % generator_every == 0, {}
        # batch
        rows = torch.randint(len(training), (run.batch_size,), generator=rng)
        x = on_device(random_flip(2 * to_float(training[rows].to(device)) - 1, rng), device)
        noise = torch.randn(run.batch_size, NET['latent_dim'], generator=rng).to(device)
        # update: discriminator, on augmented real and generated images
        generator_rate, discriminator_rate = [falling_rate(step, run.last_step, peak, FALLING) for peak in rates]
        with torch.set_grad_enabled(trains_generator), run.autocast():
            generated = generator(noise)
        real, fake = [augment(images, strength, rng) for images in (x, generated.detach().float())]
        if norm == 'batch':                # the statistics of generated images would tell of real ones
            real_score, fake_score = score(real), score(fake)
        else:                              # one pass takes less time than two
            real_score, fake_score = score(torch.cat([real, fake])).chunk(2)
        loss = discriminator_loss(method, real_score, fake_score)
        scalars.update(discriminator_loss=loss.detach(), real=real_score.detach().mean(),
                       fake=fake_score.detach().mean())
        if penalty_weight and step % penalty_every == 0:
            penalty = gradient_penalty(method, score, real, fake, rng)
            scalars['penalty'], loss = penalty.detach(), loss + penalty_weight * penalty_every * penalty
        take_step(discriminator_optimizer, loss, discriminator_rate)
        # update: generator, through the discriminator as it has become
        if trains_generator:
            discriminator.requires_grad_(False)
            loss = generator_loss(method, score(augment(generated.float(), strength, rng)))
            take_step(generator_optimizer, loss, generator_rate)
            discriminator.requires_grad_(True)
            scalars['generator_loss'] = loss.detach()
            update_average(average, generator, step // generator_every, AVERAGE_DECAY)
        # log and save
        if run.logs:
            # a large gap between D(held_out) and D(real) means that D overfits the training images
            rows = torch.randint(len(held_out), (run.batch_size,), generator=rng)
            with torch.no_grad():
                scalars['held_out'] = score(augment(on_device(2 * to_float(held_out[rows]) - 1, device),
                                                    strength, rng)).mean()
        run.log(**scalars, learning_rate=discriminator_rate)
        if run.saves:
            frechet = measure(average, judge, held_out, device)['frechet']
            run.measured(frechet=frechet)
            run.choose(frechet, average)
            if step % SAVE_EVERY == 0 and math.log2(step // SAVE_EVERY) % 1 == 0:
                progress.append((step, generate_faces(average, COLUMNS, 0, device)))
    # final check from file
    generator = run.from_file(Generator(**NET), 'chosen')
    run.finish(generator, NET, dict(images=len(test.names), **measure(generator, judge, test.images, device)),
               progress=progress, discriminator_config=dict(channels=DISCRIMINATOR_CHANNELS, norm=norm))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw faces: one picture at --out, or single images in the folder --out."""
    single = check_images_out(args.out)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    generator = load_net(Generator, args.ckpt or CKPT, PROBLEM, device)[0]
    images = generate_faces(generator, args.n or FACES, args.seed or DEFAULTS['seed'], device)
    if single:
        save_single_images(args.out, images)
    else:
        save_picture(args.out, images, COLUMNS)


def generate_faces(generator, count, seed, device):
    """Generate count faces from N(0, I): (count, 3, 64, 64) uint8."""
    return decode_noise(lambda z: to_unit(generator(z)), count, generator.project.in_features, seed, device)


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure of the report to --out (figures/) from checkpoints, logs and faces."""
    device = pick_device(args.device or 'cpu')
    ckpt = args.ckpt or CKPT
    generator, checkpoint = load_net(Generator, ckpt, PROBLEM, device)
    judge = load_net(VAE, JUDGE, 'p1_vae', device)[0]
    log, scores = read_log(base_of(ckpt) + '.jsonl'), read_log(SAMPLES)
    training = FaceImages(args.data_dir, 'train').images
    training = training[split_held_out(len(training))[0]]      # as in the training
    images = generate_faces(generator, FACES, DEFAULTS['seed'], device)
    discriminator = Discriminator(**checkpoint['discriminator_config'])
    write_text(os.path.join(args.out, 'fig2_1.txt'), f'{generator}\n{discriminator}\n')
    for ending in PICTURE_ENDINGS[:2]:     # the report shows the smaller file
        save_picture(os.path.join(args.out, 'fig2_2' + ending), images, COLUMNS)
    plot_learning_curves(os.path.join(args.out, 'fig2_3.png'), log)
    plot_comparison(os.path.join(args.out, 'fig2_4.jpg'), ckpt, images, judge, training, scores, device)
    plot_progress(os.path.join(args.out, 'fig2_5.jpg'), checkpoint,
                  generate_faces(generator, COLUMNS, DEFAULTS['seed'], device))
    plot_methods(os.path.join(args.out, 'table2.jpg'), scores, read_log(COUNTS), training[:COLUMNS])
    print(f'seven figures and tables are in {args.out}')


def plot_learning_curves(path, log):
    """fig2_3: losses without the penalty, outputs of the discriminator and held-out score over the images seen."""
    settings = log[0]['settings']
    figure, axes = figures.new_figure(2.1, columns=3)
    curves = ((0, 'train', (('discriminator_loss', 'discriminator'), ('generator_loss', 'generator'))),
              (1, 'train', (('real', 'training faces'), ('held_out', 'held-out faces'), ('fake', 'generated faces'))),
              (2, 'held_out', (('frechet', 'averaged weights'),)))
    for index, kind, lines in curves:
        records = [record for record in log if record['kind'] == kind]
        for colour, (name, label) in zip(figures.COLOURS[4:] if index else figures.COLOURS, lines):
            points = np.array([(record['step'] * settings['batch_size'] / 1000, record[name])
                               for record in records if name in record])
            if name == 'held_out':         # one batch each: a mean over ten takes out the noise
                points[:, 1] = [points[max(0, end - 10):end, 1].mean() for end in range(1, len(points) + 1)]
            axes[index].plot(*points.T, color=colour, label=label, linewidth=0.7)
        axes[index].set_xlabel('images seen (thousands)')
        axes[index].grid(True)
        axes[index].legend()
    axes[0].set(title=f'Losses of {settings["method"]}', ylabel=f'mean over {LOG_EVERY} steps')
    axes[1].set(title='Output of the discriminator', ylabel='mean output')
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low, high + 0.45 * (high - low))      # room for the legend
    axes[1].legend(loc='upper left')
    axes[2].set(title='Held-out score', ylabel='Fréchet distance')
    figures.save_figure(path, figure)


def score_of(path, scores):
    """Return the Fréchet distance of the checkpoint file at path as text; it belongs to these very bytes."""
    of_file = [record for record in scores if record.get('sha256') == sha256(path)]
    if not of_file:
        return 'not scored'
    return f'Fréchet {figures.rounded(of_file[0]["frechet"], 1)}'


def plot_comparison(path, ckpt, images, judge, training, scores, device):
    """fig2_4: VAE against GAN, and the training faces or mirror images whose latent means are nearest to the GAN's."""
    figure, axes = figures.new_figure(5.0, rows=2)
    vae_faces = decode_noise(judge.decoder, FACES, judge.decoder.project.in_features, DEFAULTS['seed'], device)
    both = torch.cat([faces[4 * row:4 * row + 4] for row in range(4) for faces in (vae_faces, images)])
    figures.draw_pixels(axes[0], make_grid(both, 8))
    for x, name, file in ((133, 'VAE', JUDGE), (397, 'GAN', ckpt)):
        axes[0].text(x, -5, f'{name}: {score_of(file, scores)}', ha='center')
    axes[0].plot([265, 265], [0, 266], color=figures.COLOURS[6], linewidth=1)
    axes[0].set_title('Sixteen faces of each, from N(0, I), not chosen;\nFréchet distance of 1,000 of each to the test '
                      'faces', pad=14)
    candidates = torch.cat([training, training.flip(3)])
    distances = torch.cdist(latent_means(judge, images[:8], device), latent_means(judge, candidates, device))
    # a face and its mirror image count once
    nearest = torch.min(distances[:, :len(training)], distances[:, len(training):]).argsort(1)[:, :3]
    rows = [images[:8]]
    for rank in range(3):
        chosen = nearest[:, rank]
        mirrored = (distances[range(8), chosen + len(training)] < distances[range(8), chosen]).long()
        rows.append(candidates[chosen + mirrored * len(training)])
    figures.draw_images(axes[1], torch.cat(rows), 8, left=('GAN', 'nearest', 'second', 'third'))
    lines = [f'The nearest of {len(training):,} training faces, by the latent means of the VAE']
    generated, held_out = [[record['copied_least'] for record in scores if record.get('sha256') == wanted]
                             for wanted in (sha256(ckpt), None)]     # real faces have no sum
    if generated and held_out:
        lines.append('First percentile of the distance to the nearest one: 1,000 generated faces {}, '
                     'held-out faces {}'.format(figures.rounded(generated[0], 2), figures.rounded(held_out[0], 2)))
    axes[1].set_title('\n'.join(lines))
    figures.save_figure(path, figure)


def plot_progress(path, checkpoint, last):
    """fig2_5: the same eight noise vectors as training goes on; last are the faces of the chosen weights."""
    progress = [row for row in checkpoint['progress'] if row[0] < checkpoint['step']] + [(checkpoint['step'], last)]
    figure, axes = figures.new_figure(0.33 * len(progress) + 0.5, width=figures.HALF)
    batch_size = checkpoint['settings']['batch_size']
    figures.draw_images(axes, torch.cat([images for _, images in progress]), COLUMNS,
                        left=[f'{step * batch_size / 1000:,.0f}' for step, _ in progress])
    axes.set_title('The same eight noise vectors after so many\nthousand training images (averaged weights)')
    figures.save_figure(path, figure)


def plot_methods(path, scores, counts, real):
    """table2: every run that was scored, with eight faces that it draws, or eight real ones (8, 3, 64, 64)."""
    strips = np.concatenate([
        (read_image(os.path.join(os.path.dirname(SAMPLES), record['picture']), None) if 'picture' in record
         else make_grid(real, COLUMNS))[:-2] for record in scores])
    broken = {record.get('sha256'): record['broken'] for record in counts if record.get('kind', 'count') == 'count'}
    # to the left of the faces white for the columns
    columns = ((0, 'left', 'faces', '{label}'), (302, 'right', 'images seen', '{images:,}'),
               (356, 'right', 'own', '{own}'), (424, 'right', 'clear', '{clear}'),
               (522, 'right', 'Fréchet', '{frechet}'), (619, 'right', 'nearest', '{nearest}'),
               (704, 'right', 'broken', '{broken}'))
    scores = [dict(record, broken=broken.get(record.get('sha256'), ''),
                   **{name: figures.rounded(record[name], places) for name, places in (
                       ('own', 2), ('clear', 3), ('frechet', 1), ('nearest', 3))}) for record in scores]
    figure, axes = figures.new_figure(0.36 * len(scores) + 0.5)
    figures.draw_pixels(axes, np.concatenate([np.full((len(strips), 720, 3), 255, np.uint8), strips], 1))
    for x, side, title, form in columns:
        axes.text(x, -10, title, ha=side, weight='bold')
        for index, record in enumerate(scores):
            text = form.format(**record) if record['images'] or title != 'images seen' else ''
            axes.text(x, 35 + 66 * index, text, ha=side, va='center')
    axes.set_title('1,000 generated faces of each against test faces', pad=14)
    figures.save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'draw faces', 'picture to write or, without an ending, folder of '
                        'single images')
    parser.add_argument('--n', type=number_between(1, 2 ** 31 - 1), help=f'faces to draw ({FACES})')
    parser.add_argument('--method', choices=sorted(METHODS),
                        help=f'--train: losses and discriminator ({DEFAULTS["method"]})')
    parser.add_argument('--augment', type=number_between(0, 1, float),
                        help=f'--train: strength of the augmentation, 0 to 1 ({DEFAULTS["augment"]:g})')
    return parse_shared(parser, PROBLEM, ['out'], argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
