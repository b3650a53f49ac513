"""Problem 6, an extra: an ACGAN that draws the digit, or the face, that is asked for.

A generator and a discriminator that also says the class (Odena et al. 2017, arXiv 1610.09585).  It draws MNIST-M's
digits (--data digits), or faces without and with an attribute (--data faces).  Differences from the paper: the
discriminator learns the class from real images alone (--generated_class_weight 1 brings the paper's loss back); R1
penalty (Mescheder et al. 2018, arXiv 1801.04406) at every 16th step; the generator has the non-saturating loss, and
the label beside the noise; an average of its weights over the updates (EMA) is kept; and the generator of faces
starts from that of problem 2.

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

from datasets import (ATTRIBUTES, FaceImages, UserError, check_images_out, data_checksum, new_parser, number_between,
                      parse_shared, random_flip, read_digits, run_command, save_classes, split_held_out, to_float,
                      to_uint8, to_unit, write_text)
from models import (CHECKPOINTS, ClassDiscriminator, DigitGenerator, DigitNet, FaceGenerator, Generator, Run,
                    check_scores, default_path, falling_rate, load_checkpoint, load_net, measure_generated, on_device,
                    pick_device, read_log, repeatable, run_batches, sha256, take_step, update_average)
from report import figures

PROBLEM = 'p6_acgan'

# nets: channels at size, size / 2, size / 4, ... pixels; the generator of faces begins at size / 2
GENERATORS = dict(digits=DigitGenerator, faces=FaceGenerator)
GENERATOR = dict(
    digits=dict(latent_dim=64, classes=10, channels=[32, 64, 128], size=28),
    faces=dict(latent_dim=128, classes=2, channels=[64, 128, 256, 512]))           # as problem 2
DISCRIMINATOR = dict(
    digits=dict(classes=10, channels=[32, 64, 128, 256], size=28),
    faces=dict(classes=2, channels=[32, 64, 128, 256, 512], size=64))

# training
DEFAULTS = dict(
    steps=24000,             # of one batch each; of faces FACES['steps']
    batch_size=64,           # images; of faces FACES['batch_size']
    seed=0,
    data='digits',           # or faces
    attribute='Smiling',     # of faces: the second of the two classes has it
    generated_class_weight=0.0)      # of the discriminator's class loss of generated images; 1: the paper's
FACES = dict(steps=8000, batch_size=32)
LEARNING_RATES = dict(digits=(1e-3, 1e-3), faces=(1e-4, 2e-4))     # of Adam, at the peak, of G and of D
BETAS = (0.0, 0.99)
FALLING = dict(digits=1 / 3, faces=0)     # share of the steps over which the learning rates fall to 0, at the end
R1_WEIGHT = dict(digits=0.2, faces=0.05)     # the mean weight of the penalty
R1_EVERY = 16                # steps from one penalty to the next
CLASS_WEIGHT = dict(digits=1.0, faces=30.0)   # of the generator's class loss
ALONE = dict(digits=0, faces=1000)   # steps at the start in which the discriminator learns alone
AVERAGE_DECAY = 0.999        # of the average of the weights, per update: the most (see update_average)
LOG_EVERY = 200              # steps
SAVE_EVERY = 1000            # steps
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('GENERATOR', 'DISCRIMINATOR', 'LEARNING_RATES', 'BETAS', 'FALLING', 'R1_WEIGHT', 'R1_EVERY',
             'CLASS_WEIGHT', 'ALONE', 'AVERAGE_DECAY')
JUDGE = os.path.join(CHECKPOINTS, 'p3_runs', 'usps_mnistm', 'target_seed0.pth')     # upper bound of problem 3
FACES_START = os.path.join(CHECKPOINTS, 'p2_gan.pth')      # first weights of the generator of faces
SCORED = 100                 # generated digits of each class in a score

# drawing and figures
COLUMNS = 10                 # images of each class in the picture
SINGLE = 100                 # images of each class in a folder
PAPER = os.path.join(CHECKPOINTS, 'p6_acgan_paper.pth')    # a run with the class loss of the paper
SCORES = os.path.join(CHECKPOINTS, 'p5_scores.jsonl')      # of tests/benchmark.py


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_loss(real_scores, fake_scores):
    """Mean logistic loss of scores (N,) of real images plus that of generated ones: Goodfellow et al. 2014, eq. 1."""
    return F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()


def class_loss(real_logits, fake_logits, labels, generated_class_weight):
    """Mean cross-entropy of the logits (N, classes) of real images, plus the weight times that of generated ones.

    With weight 1 (Odena et al. 2017, eq. 3) the discriminator learns to accept a bad digit's label.
    """
    loss = F.cross_entropy(real_logits, labels)
    if generated_class_weight:
        loss = loss + generated_class_weight * F.cross_entropy(fake_logits, labels)
    return loss


def r1_penalty(score, images):
    """Mean of |gradient of the score at an image|^2 over images (N, 3, H, W): Mescheder et al. 2018, eq. 9.

    score maps them to scores (N,); gamma / 2 is the weight.
    """
    points = images.detach().requires_grad_()
    gradient, = torch.autograd.grad(score(points).sum(), points, create_graph=True)
    return (gradient ** 2).flatten(1).sum(1).mean()


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    data, attribute = args.data or DEFAULTS['data'], args.attribute or DEFAULTS['attribute']
    defaults = dict(DEFAULTS, data=data, attribute=attribute if data == 'faces' else '',
                    **FACES if data == 'faces' else {})
    constants = {name: globals()[name] for name in CONSTANTS}
    run = Run(args, PROBLEM, defaults, constants, default_path(args, defaults, shipped(data, attribute)))
    settings, device, rng = run.settings, run.device, run.rng
    data, attribute = settings['data'], settings['attribute']      # of a resumed run: those of its start
    # data
    if data == 'digits':
        judge, used = load_net(DigitNet, JUDGE, 'p3_dann', device)[0], dict(judge=sha256(JUDGE))
        digits, test = [read_digits(args.data_dir, 'mnistm', split) for split in ('train', 'test')]
        images, labels = digits.images, digits.labels
    else:
        start = load_net(Generator, FACES_START, 'p2_gan', device)[0].state_dict()
        used = dict(start=sha256(FACES_START))
        faces, test = FaceImages(args.data_dir, 'train'), FaceImages(args.data_dir, 'test')
        images, labels = faces.images, torch.from_numpy(faces.attribute(attribute).astype(np.int64))
    train_rows, val_rows = split_held_out(len(images))
    # nets
    config = GENERATOR[data]
    generator = GENERATORS[data](**config)
    if data == 'faces':                    # what stands for the labels begins at 0: all faces are those of problem 2
        new_columns = torch.zeros(len(start['project.weight']), config['classes'], device=device)
        start['project.weight'] = torch.cat([start['project.weight'], new_columns], 1)
        generator.load_state_dict(start)
    generator = run.keep('net', generator)
    discriminator = run.keep('discriminator', ClassDiscriminator(**DISCRIMINATOR[data]))
    average = run.keep('average', copy.deepcopy(generator)).eval()
    run.facts(generator, discriminator, training_images=len(train_rows), held_out=len(val_rows),
              data=data_checksum(images, labels, test.images), **used)
    # optimizers
    generator_optimizer, discriminator_optimizer = [
        run.keep(name, torch.optim.Adam(net.parameters(), lr=peak, betas=BETAS))
        for name, net, peak in (('generator_optimizer', generator, LEARNING_RATES[data][0]),
                                ('discriminator_optimizer', discriminator, LEARNING_RATES[data][1]))]

    def discriminate(images):
        with run.autocast():
            scores, logits = discriminator(images)
        return scores.float(), logits.float()

    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        trains_generator, scalars = step > ALONE[data], {}
        # batch: the generated images have the labels of the real ones; half of the faces are mirrored
        rows = train_rows[torch.randint(len(train_rows), (run.batch_size,), generator=rng)]
        x, asked = 2 * to_float(images[rows].to(device)) - 1, labels[rows].to(device)
        x = on_device(random_flip(x, rng) if data == 'faces' else x, device)
        noise = torch.randn(run.batch_size, config['latent_dim'], generator=rng).to(device)
        # update: discriminator, whether an image is real, and of which class it is
        generator_rate, discriminator_rate = [falling_rate(step, run.last_step, peak, FALLING[data])
                                              for peak in LEARNING_RATES[data]]
        with torch.set_grad_enabled(trains_generator), run.autocast():
            generated = generator(noise, asked)
        scores, logits = discriminate(torch.cat([x, generated.detach().float()]))
        (real_scores, fake_scores), (real_logits, fake_logits) = scores.chunk(2), logits.chunk(2)
        loss = discriminator_loss(real_scores, fake_scores)
        discriminator_class_loss = class_loss(real_logits, fake_logits, asked, settings['generated_class_weight'])
        scalars.update(discriminator_loss=loss.detach(), class_loss=discriminator_class_loss.detach())
        loss = loss + discriminator_class_loss
        if step % R1_EVERY == 0:
            penalty = r1_penalty(lambda points: discriminate(points)[0], x)
            scalars['penalty'], loss = penalty.detach(), loss + R1_WEIGHT[data] * R1_EVERY * penalty
        take_step(discriminator_optimizer, loss, discriminator_rate)
        # update: generator, so that the generated images are called real and of their class
        if trains_generator:
            discriminator.requires_grad_(False)
            scores, logits = discriminate(generated)
            generator_loss, generator_class_loss = F.softplus(-scores).mean(), F.cross_entropy(logits, asked)
            take_step(generator_optimizer, generator_loss + CLASS_WEIGHT[data] * generator_class_loss, generator_rate)
            discriminator.requires_grad_(True)
            update_average(average, generator, step - ALONE[data], AVERAGE_DECAY)
            scalars.update(generator_loss=generator_loss.detach(), generator_class_loss=generator_class_loss.detach())
        # log and save
        run.log(**scalars, learning_rate=generator_rate)
        if run.saves:
            classes = run_batches(lambda batch: discriminator(2 * to_float(batch) - 1)[1].argmax(1), device,
                                  images[val_rows])
            run.measured(accuracy=(classes.long() == labels[val_rows]).float().mean().item())
    # final check from file
    generator, metrics = run.from_file(GENERATORS[data](**config), 'average'), {}
    if data == 'digits':
        generated = generate_images(generator, SCORED, DEFAULTS['seed'], device)
        metrics = dict(images=len(test.names), **measure_generated(generated, judge, test.images, device))
    run.finish(generator, config, metrics, discriminator_config=DISCRIMINATOR[data])


def shipped(data, attribute):
    """Return the checkpoint of a run with these settings: p6_acgan.pth, p6_acgan_smiling.pth, ..."""
    return os.path.join(CHECKPOINTS, PROBLEM + ('.pth' if data == 'digits' else f'_{attribute.lower()}.pth'))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw images: a row for each class in one picture at --out, or single images in the folder --out."""
    single = check_images_out(args.out)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    data = args.data or DEFAULTS['data']
    attribute = (args.attribute or DEFAULTS['attribute']) if data == 'faces' else ''
    ckpt = args.ckpt or shipped(data, attribute)
    settings = load_checkpoint(ckpt, PROBLEM)['settings']
    if (settings['data'], settings['attribute']) != (data, attribute):
        raise UserError(f'{ckpt} draws {settings["attribute"] or "digits"}: give its --data and --attribute')
    generator = load_net(GENERATORS[data], ckpt, PROBLEM, device)[0]
    count = args.n or (SINGLE if single else COLUMNS)
    images = generate_images(generator, count, args.seed or DEFAULTS['seed'], device)
    save_classes(args.out, single, images)


def generate_images(generator, count, seed, device):
    """Generate count images per class from N(0, I): (count, classes, 3, H, W) uint8; the classes share each noise.

    The noise comes from NumPy's legacy generator, whose stream is frozen (NEP 19).  The images of one noise are
    generated together, so that the result does not depend on count.
    """
    noise = np.random.RandomState(seed).standard_normal((count, generator.latent_dim)).astype(np.float32)
    labels = torch.arange(generator.classes, device=device)
    with torch.no_grad(), repeatable():
        images = [generator(z.to(device).expand(len(labels), -1), labels).cpu() for z in torch.from_numpy(noise)]
    return to_uint8(to_unit(torch.stack(images)))


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure of the report to --out (figures/) from checkpoints and logs."""
    device = pick_device(args.device or 'cpu')
    scores, generators = read_log(SCORES), {}
    for what, data, ckpt in (('acgan', 'digits', shipped('digits', '')), ('acgan_paper', 'digits', PAPER),
                             ('faces', 'faces', shipped('faces', DEFAULTS['attribute']))):
        check_scores(SCORES, scores, what, ckpt)
        generators[what] = load_net(GENERATORS[data], ckpt, PROBLEM, device)[0]
    write_text(os.path.join(args.out, 'fig6_1.txt'),
               f'{generators["acgan"]}\n{ClassDiscriminator(**DISCRIMINATOR["digits"])}\n')
    for name, what in (('fig6_2', 'acgan'), ('fig6_5', 'acgan_paper')):
        images = generate_images(generators[what], COLUMNS, DEFAULTS['seed'], device)
        save_classes(os.path.join(args.out, name + '.jpg'), False, images)
    plot_pairs(os.path.join(args.out, 'fig6_4.jpg'), generators['faces'], device)
    print(f'four figures are in {args.out}')


def plot_pairs(path, generator, device):
    """fig6_4: ten pairs of faces of the same noise, without the attribute and with it."""
    attribute = DEFAULTS['attribute']
    images = generate_images(generator, COLUMNS, DEFAULTS['seed'], device).transpose(0, 1).flatten(0, 1)
    figure, axes = figures.new_figure(1.5)
    figures.draw_images(axes, images, COLUMNS, left=(f'not {attribute}', attribute))
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
    parser.add_argument('--generated_class_weight', type=number_between(0, 10, float),
                        help="--train: weight of the discriminator's class loss of generated images "
                             f'({DEFAULTS["generated_class_weight"]:g}; in the paper 1)')
    args = parse_shared(parser, PROBLEM, ['out'], argv)
    if args.attribute and args.data != 'faces':
        parser.error('--attribute is for faces: add --data faces')
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
