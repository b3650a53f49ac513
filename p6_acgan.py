"""Problem 6, an extra: an ACGAN that draws the digit, or the face, that is asked for.

A generator and a discriminator that also says the class (Odena et al. 2017, arXiv 1610.09585), with spectral norm
(Miyato et al. 2018, arXiv 1802.05957).  It draws MNIST-M's digits (--data digits), or faces without and with an
attribute (--data faces), and then trains on smaller batches.  Differences from the paper: the generator multiplies
the noise by the label's embedding and has the non-saturating loss, and an average of its weights over the training
steps (EMA) is kept.

    python3 p6_acgan.py --out digits.png               draw ten digits of each class
    python3 p6_acgan.py --data faces --out faces.png   draw ten pairs of faces of the same noise
    python3 p6_acgan.py --train --data faces --attribute Smiling       train; --resume goes on after a stop
    python3 p6_acgan.py --plot                         redraw every figure of the report

Rule of choice: the schedule is fixed, and the last average is kept.  Generated digits are scored at the end of
--train, by the upper bound of problem 3; `tests/benchmark.py conditional` scores the faces.
"""
import copy
import os

import numpy as np
import torch
import torch.nn.functional as F

from datasets import (ATTRIBUTES, PICTURE_ENDINGS, FaceImages, UserError, check_new_folder, check_output,
                      data_checksum, make_grid, new_parser, number_between, parse_shared, random_flip, read_digits,
                      run_command, save_picture, save_single_images, split_held_out, to_float, to_uint8, to_unit,
                      write_text)
from models import (CHECKPOINTS, ClassDiscriminator, ClassGenerator, DigitNet, Run, base_of, check_scores, cosine_rate,
                    default_path, load_net, measure_generated, on_device, pick_device, read_log, repeatable,
                    run_batches, sha256, take_step, update_average)
from report import figures

PROBLEM = 'p6_acgan'

# nets: channels at a half, a quarter, ... of the pixels
GENERATOR = dict(
    digits=dict(latent_dim=64, channels=[64, 128], size=28, classes=10),
    faces=dict(latent_dim=128, channels=[48, 96, 192, 384], size=64, classes=2))
DISCRIMINATOR_CHANNELS = dict(digits=[64, 128], faces=[64, 128, 256, 512])

# training
DEFAULTS = dict(
    steps=10000,             # of one batch each
    batch_size=128,          # images; of faces FACES_IN_BATCH
    seed=0,
    data='digits',           # or faces
    attribute='Smiling')     # of faces: the second of the two classes has it
FACES_IN_BATCH = 32
LEARNING_RATES = (2e-4, 4e-4)    # of Adam, at the peak, of G and of D
BETAS = (0.5, 0.999)
LEARNING_RATE_WARM_UP = 200  # steps
AVERAGE_DECAY = 0.999        # of the average of the weights, per step: the most (see update_average)
LOG_EVERY = 200              # steps
SAVE_EVERY = 1000            # steps
JUDGE = os.path.join(CHECKPOINTS, 'p3_runs', 'usps_mnistm', 'target_seed0.pth')     # upper bound of problem 3
SCORED = 100                 # generated digits of each class in a score

# drawing and figures
COLUMNS = 10                 # images of each class in the picture
SINGLE = 100                 # images of each class in a folder
SCORES = os.path.join(CHECKPOINTS, 'p5_scores.jsonl')              # of tests/benchmark.py
CURVES = (('discriminator_loss', 'discriminator'), ('generator_loss', 'generator'),
          ('naming_loss', 'class, discriminator'), ('named_loss', 'class, generator'))


def constants():
    """Return the constants of the method.  A run saves them, so that --resume refuses changed ones."""
    return dict(GENERATOR=GENERATOR, DISCRIMINATOR_CHANNELS=DISCRIMINATOR_CHANNELS, LEARNING_RATES=LEARNING_RATES,
                BETAS=BETAS, LEARNING_RATE_WARM_UP=LEARNING_RATE_WARM_UP, AVERAGE_DECAY=AVERAGE_DECAY)


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_losses(real_scores, fake_scores, real_logits, fake_logits, labels):
    """Two losses of the discriminator, from its scores (N,) and logits (N, classes): adversarial loss and class loss.

    Each is the mean over the real images plus that over the generated ones.  Source: Odena et al. 2017, eq. 2 and 3.
    """
    return (F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean(),
            F.cross_entropy(real_logits, labels) + F.cross_entropy(fake_logits, labels))


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    data, attribute = args.data or DEFAULTS['data'], args.attribute or DEFAULTS['attribute']
    defaults = dict(DEFAULTS, data=data, attribute=attribute if data == 'faces' else '',
                    batch_size=FACES_IN_BATCH if data == 'faces' else DEFAULTS['batch_size'])
    run = Run(args, PROBLEM, defaults, constants(), default_path(args, defaults, shipped(data, attribute)))
    device, rng = run.device, run.rng
    data, attribute = run.settings['data'], run.settings['attribute']      # of a resumed run: those of its start
    # data
    if data == 'digits':
        judge, judge_sha256 = load_net(DigitNet, JUDGE, 'p3_dann', device)[0], dict(judge=sha256(JUDGE))
        digits, test = [read_digits(args.data_dir, 'mnistm', split) for split in ('train', 'test')]
        if len(test.names) < 2:
            raise UserError('the score needs two test digits or more: add images')
        images, labels = digits.images, digits.labels
    else:
        faces, test, judge_sha256 = FaceImages(args.data_dir, 'train'), FaceImages(args.data_dir, 'test'), {}
        images, labels = faces.images, torch.from_numpy(faces.attribute(attribute).astype(np.int64))
        if labels.min() == labels.max():
            raise UserError(f'all training faces are alike in {attribute}: choose another --attribute')
    train_rows, val_rows = split_held_out(len(images))
    # nets
    config = GENERATOR[data]
    discriminator_config = dict(classes=config['classes'], channels=DISCRIMINATOR_CHANNELS[data], size=config['size'])
    generator = run.keep('net', ClassGenerator(**config))
    discriminator = run.keep('discriminator', ClassDiscriminator(**discriminator_config))
    average = run.keep('average', copy.deepcopy(generator)).eval()
    run.facts(generator, discriminator, training_images=len(train_rows), held_out=len(val_rows),
              data=data_checksum(images, labels, test.images), **judge_sha256)
    # optimizers
    generator_optimizer, discriminator_optimizer = [
        run.keep(name, torch.optim.Adam(net.parameters(), lr=peak, betas=BETAS))
        for name, net, peak in (('generator_optimizer', generator, LEARNING_RATES[0]),
                                ('discriminator_optimizer', discriminator, LEARNING_RATES[1]))]
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        generator_rate, discriminator_rate = [cosine_rate(step, run.last_step, peak, LEARNING_RATE_WARM_UP)
                                              for peak in LEARNING_RATES]
        # batch: the generated images have the labels of the real ones; half of the faces are mirrored
        rows = train_rows[torch.randint(len(train_rows), (run.batch_size,), generator=rng)]
        x, asked = 2 * to_float(images[rows].to(device)) - 1, labels[rows].to(device)
        x = on_device(random_flip(x, rng) if data == 'faces' else x, device)
        z = torch.randn(run.batch_size, config['latent_dim'], generator=rng).to(device)
        # update: discriminator, whether an image is real and of which class it is
        with run.autocast():
            generated = generator(z, asked)
            scores, logits = discriminator(torch.cat([x, generated.detach().float()]))
        (real_scores, fake_scores), (real_logits, fake_logits) = scores.float().chunk(2), logits.float().chunk(2)
        adversarial_loss, class_loss = discriminator_losses(real_scores, fake_scores, real_logits, fake_logits, asked)
        take_step(discriminator_optimizer, adversarial_loss + class_loss, discriminator_rate)
        # update: generator, so that the generated images are called real and of their class
        discriminator.requires_grad_(False)
        with run.autocast():
            scores, logits = discriminator(generated)
        generator_loss = F.softplus(-scores.float()).mean()
        generator_class_loss = F.cross_entropy(logits.float(), asked)
        take_step(generator_optimizer, generator_loss + generator_class_loss, generator_rate)
        discriminator.requires_grad_(True)
        update_average(average, generator, step, AVERAGE_DECAY)
        # log and save
        run.log(discriminator_loss=adversarial_loss.detach(), generator_loss=generator_loss.detach(),
                naming_loss=class_loss.detach(), named_loss=generator_class_loss.detach(),
                learning_rate=generator_rate)
        if run.saves:
            discriminator.eval()
            classes = run_batches(lambda batch: discriminator(2 * to_float(batch) - 1)[1].argmax(1), device,
                                  images[val_rows])
            discriminator.train()
            run.measured(accuracy=(classes.long() == labels[val_rows]).float().mean().item())
    # final check from file
    generator, metrics = run.from_file(ClassGenerator(**config), 'average'), {}
    if data == 'digits':
        generated = generate_images(generator, SCORED, DEFAULTS['seed'], device)
        metrics = dict(images=len(test.names), **measure_generated(generated, judge, test.images, device))
    run.finish(generator, config, metrics, discriminator_config=discriminator_config)


def shipped(data, attribute):
    """Return the checkpoint of a run with these settings: p6_acgan.pth, p6_acgan_smiling.pth, ..."""
    return os.path.join(CHECKPOINTS, PROBLEM + ('.pth' if data == 'digits' else f'_{attribute.lower()}.pth'))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw images: a row for each class in one picture at --out, or single images in the folder --out."""
    # a new name that ends in letters, as .png or .gif, is to be a file
    single = (os.path.isdir(args.out) and not args.out.lower().endswith(PICTURE_ENDINGS)
              or not os.path.splitext(args.out.rstrip(os.sep))[1][1:].isalpha())
    if single:
        check_new_folder(args.out)
    else:
        check_output(args.out, PICTURE_ENDINGS)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    ckpt = args.ckpt or shipped(args.data or DEFAULTS['data'], args.attribute or DEFAULTS['attribute'])
    generator = load_net(ClassGenerator, ckpt, PROBLEM, device)[0]
    count = args.n or (SINGLE if single else COLUMNS)
    images = generate_images(generator, count, args.seed or DEFAULTS['seed'], device)
    images = images.transpose(0, 1).flatten(0, 1)      # class after class
    if single:
        digits = max(3, len(str(count)))
        save_single_images(args.out, images, [f'{index // count}_{index % count + 1:0{digits}d}'
                                              for index in range(len(images))])
    else:
        save_picture(args.out, make_grid(images, count))


def generate_images(generator, count, seed, device):
    """Generate count images of each class from N(0, I): (count, classes, 3, H, W) uint8; a noise serves all classes.

    The noise comes from NumPy's legacy generator, whose stream is frozen (NEP 19).  The images of one noise are
    generated together, so that the result does not depend on count.
    """
    noise = np.random.RandomState(seed).standard_normal((count, generator.project.in_features)).astype(np.float32)
    labels = torch.arange(generator.label.num_embeddings, device=device)
    with torch.no_grad(), repeatable():
        images = [generator(z.to(device).expand(len(labels), -1), labels).cpu() for z in torch.from_numpy(noise)]
    return to_uint8(to_unit(torch.stack(images)))


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure of the report to --out (figures/) from checkpoints and logs."""
    device = pick_device(args.device or 'cpu')
    scores, generators, logs = read_log(SCORES), {}, {}
    for data, name in (('digits', 'acgan'), ('faces', 'faces')):
        path = shipped(data, DEFAULTS['attribute'])
        check_scores(SCORES, scores, name, path)
        generators[data], checkpoint = load_net(ClassGenerator, path, PROBLEM, device)
        logs[data] = read_log(base_of(path) + '.jsonl')
        if data == 'digits':
            discriminator = ClassDiscriminator(**checkpoint['discriminator_config'])
    write_text(os.path.join(args.out, 'fig6_1.txt'), f'{generators["digits"]}\n{discriminator}\n')
    images = generate_images(generators['digits'], COLUMNS, DEFAULTS['seed'], device)
    save_picture(os.path.join(args.out, 'fig6_2.jpg'), make_grid(images.transpose(0, 1).flatten(0, 1), COLUMNS))
    plot_learning_curves(os.path.join(args.out, 'fig6_3.png'), logs)
    plot_pairs(os.path.join(args.out, 'fig6_4.jpg'), generators['faces'], scores, device)
    print(f'four figures are in {args.out}')


def plot_learning_curves(path, logs):
    """fig6_3: the losses over the images seen."""
    figure, all_axes = figures.new_figure(2.6, columns=2)
    for axes, (data, log) in zip(all_axes, logs.items()):
        records = [record for record in log if record['kind'] == 'train']
        images_seen = [record['step'] * log[0]['settings']['batch_size'] / 1000 for record in records]
        for colour, (scalar, label) in zip(figures.COLOURS, CURVES):
            axes.plot(images_seen, [record[scalar] for record in records], color=colour, label=label)
        axes.set(title=f'ACGAN, {data}', xlabel='images seen (thousands)', ylabel='loss (nats)', yscale='log')
        low, high = axes.get_ylim()
        axes.set_ylim(low * (low / high) ** 0.6, high)         # room for the legend below the curves
        figures.log_axis(axes.yaxis)
        axes.grid(True)
        axes.legend(loc='lower left')
    figures.save_figure(path, figure)


def plot_pairs(path, generator, scores, device):
    """fig6_4: ten pairs of faces of the same noise, without the attribute and with it."""
    attribute = DEFAULTS['attribute']
    images = generate_images(generator, COLUMNS, DEFAULTS['seed'], device).transpose(0, 1).flatten(0, 1)
    record = next(record for record in scores if record['kind'] == 'faces')
    figure, axes = figures.new_figure(1.8)
    figures.draw_images(axes, images, COLUMNS, left=(f'not {attribute}', attribute))
    generated, real = [figures.rounded(100 * record[name], 1) for name in ('accuracy', 'real_accuracy')]
    axes.set_title('Pairs of the same noise\na linear classifier agrees with what was asked for on '
                   f'{generated} % of 1,000 generated faces,\nand with the label on {real} % of the test faces')
    figures.save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'draw images', 'picture to write or, without an ending, folder of '
                        'single images')
    parser.add_argument('--n', type=number_between(1, 2 ** 31 - 1),
                        help=f'images of each class ({COLUMNS} in a picture, {SINGLE} in a folder)')
    parser.add_argument('--data', choices=sorted(GENERATOR), help=f'what is drawn ({DEFAULTS["data"]})')
    parser.add_argument('--attribute', choices=ATTRIBUTES,
                        help=f'of faces: the second of the two classes has it ({DEFAULTS["attribute"]})')
    args = parse_shared(parser, PROBLEM, ['out'], argv)
    if args.attribute and args.data != 'faces':
        parser.error('--attribute is for faces: add --data faces')
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
