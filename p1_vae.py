"""Problem 1: a variational autoencoder that reconstructs and draws 64x64 faces.

Kingma and Welling 2014 (arXiv 1312.6114), with the weight lambda_KL of Higgins et al. 2017 (beta-VAE), as the slides
ask for it.  Differences from the paper: the net is convolutional with residual blocks, lambda_KL is warmed up,
gradients are clipped, faces are mirrored at random, and an average of the weights over the steps (EMA) is kept.

    bash hw3_p1.sh fig1_4.png                          draw 32 faces, as the grader does
    python3 p1_vae.py --out faces --n 1000             draw 1,000 single images, to score them
    python3 p1_vae.py --train --data_dir hw3_data      train; --resume goes on after a stop
    python3 p1_vae.py --plot --data_dir hw3_data       redraw every figure of the report

Rule of choice: of the averages saved during the run, the one with the least loss on 500 held-out
training faces.  The test faces are measured once, from the file that was chosen.
"""
import copy
import glob
import os

import numpy as np
import torch

from datasets import (PICTURE_ENDINGS, FaceImages, UserError, check_images_out, data_checksum, new_parser,
                      number_between, parse_shared, random_flip, run_command, save_picture, save_single_images,
                      split_held_out, to_float, to_uint8, write_table, write_text)
from models import (CHECKPOINTS, VAE, Run, base_of, cosine_rate, decode_noise, default_path, load_net, on_device,
                    pick_device, read_log, run_batches, sha256, take_step, update_average)
from report import figures

PROBLEM = 'p1_vae'
CKPT = os.path.join(CHECKPOINTS, PROBLEM + '.pth')

# nets
NET = dict(latent_dim=128, channels=[32, 64, 128, 256])     # channels at 32, 16, 8 and 4 pixels

# training
DEFAULTS = dict(
    steps=32000,             # of one batch each
    batch_size=32,           # images
    seed=0,
    lambda_kl=7.5e-5,        # weight of the KL in nats against the MSE per pixel in [0, 1]
    init='')                 # checkpoint whose weights the run starts from
LEARNING_RATE = 1e-3         # of Adam, at its peak
LEARNING_RATE_WARM_UP = 200  # steps
KL_WARM_UP = 1000            # steps until lambda_KL has its full value
GRADIENT_NORM = 0.05         # largest norm of all gradients together
AVERAGE_DECAY = 0.999        # of the average of the weights, per step: the most (see update_average)
LOG_EVERY = 200              # steps
SAVE_EVERY = 1000            # steps
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('NET', 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'KL_WARM_UP', 'GRADIENT_NORM', 'AVERAGE_DECAY')

# figures
FACES = 32                   # in the graded picture
COLUMNS = 8
TABLE_SEED = 10              # picks the ten test images of table 1_3
SWEEP = os.path.join(CHECKPOINTS, 'p1_lambda')                     # logs of other lambda_KL
LINEAR_CODE = os.path.join(CHECKPOINTS, 'p1_linear_code.jsonl')    # of tests/benchmark.py
SAMPLES = os.path.join(CHECKPOINTS, 'p1_samples.jsonl')            # scores of the faces that they draw, likewise
# of a public report: KL in nats, read off its training curve, and MSE on ten test faces, decoded from a sample (the
# mean sum of squares, 88.1, over 12,288 values): see report/references.yml
PUBLISHED = (51.8, 0.00717)


# ---------------------------------------------------------------------------- losses and schedules

def reconstruction_loss(output, x):
    """Squared error averaged over pixels, channels and batch; both (N, 3, 64, 64) in [0, 1]."""
    return ((output - x) ** 2).mean()


def kl_divergence(mean, log_variance):
    """KL(N(mean, exp(log_variance)) || N(0, I)) in nats, a sum over the latent dimensions: (N,).  Paper: appendix B."""
    return 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).sum(1)


def lambda_kl_at(step, settings):
    """lambda_KL, reached linearly over KL_WARM_UP steps; at once where the weights are not new."""
    return settings['lambda_kl'] * (1 if settings['init'] else min(1.0, step / KL_WARM_UP))


def measure(vae, images, device):
    """Measure a VAE in eval() on (N, 3, 64, 64) uint8 images: a dict of means over them.

    mse is that of the image decoded from q's mean, reconstruction of one decoded from a sample of q (both per pixel in
    [0, 1]); kl is in nats.
    """
    noise = np.random.RandomState(0).standard_normal((len(images), vae.decoder.project.in_features))

    def errors(batch, noise):
        x = to_float(batch)
        draw, mean, log_variance = vae(x, noise)
        return (((vae.decoder(mean) - x) ** 2).mean((1, 2, 3)), ((draw - x) ** 2).mean((1, 2, 3)),
                kl_divergence(mean, log_variance))

    mse, reconstruction, kl = run_batches(errors, device, images, torch.from_numpy(noise.astype(np.float32)))
    return dict(mse=mse.mean().item(), reconstruction=reconstruction.mean().item(), kl=kl.mean().item())


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train on data_dir/face/train and write --ckpt; beside it its log and the state to resume."""
    # device and seed
    constants = {name: globals()[name] for name in CONSTANTS}
    run = Run(args, PROBLEM, DEFAULTS, constants, default_path(args, DEFAULTS, CKPT))
    settings, device, rng = run.settings, run.device, run.rng
    # data
    faces, test = FaceImages(args.data_dir, 'train'), FaceImages(args.data_dir, 'test')
    training, held_out = [faces.images[rows] for rows in split_held_out(len(faces.names))]
    # nets
    vae = VAE(**NET)
    if settings['init'] and not run.resumed:
        vae, checkpoint = load_net(VAE, settings['init'], PROBLEM, device)
        if checkpoint['config'] != settings['NET']:
            raise UserError(f'{settings["init"]} has a net of other sizes than NET in this script: name another --init')
    vae = run.keep('net', vae).train()
    average = run.keep('average', copy.deepcopy(vae)).eval()
    run.facts(vae, training_images=len(training), held_out=len(held_out), data=data_checksum(faces.images, test.images),
              **{'init_sum': sha256(settings['init'])} if settings['init'] and not run.resumed else {})
    # optimizers
    optimizer = run.keep('optimizer', torch.optim.Adam(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), eps=1e-10))
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch
        rows = torch.randint(len(training), (run.batch_size,), generator=rng)
        x = on_device(random_flip(to_float(training[rows].to(device)), rng), device)
        noise = torch.randn(run.batch_size, NET['latent_dim'], generator=rng).to(device)
        # update: reconstruction + lambda_KL KL
        learning_rate = cosine_rate(step, run.last_step, LEARNING_RATE, LEARNING_RATE_WARM_UP)
        lambda_kl = lambda_kl_at(step, settings)
        with run.autocast():
            output, mean, log_variance = vae(x, noise)
        reconstruction = reconstruction_loss(output.float(), x)
        kl = kl_divergence(mean.float(), log_variance.float()).mean()
        take_step(optimizer, reconstruction + lambda_kl * kl, learning_rate, max_norm=GRADIENT_NORM)
        update_average(average, vae, step, AVERAGE_DECAY)
        # log and save
        run.log(reconstruction=reconstruction.detach(), kl=kl.detach(), learning_rate=learning_rate)
        if run.saves:
            errors = measure(average, held_out, device)
            held_out_loss = errors['reconstruction'] + settings['lambda_kl'] * errors['kl']
            run.measured(**errors, loss=held_out_loss)
            run.choose(held_out_loss, average)
    # final check from file
    vae = run.from_file(VAE(**NET), 'chosen')
    run.finish(vae, NET, dict(lambda_kl=settings['lambda_kl'], images=len(test.names),
                              **measure(vae, test.images, device)))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Draw faces: one picture at --out, or single images in the folder --out."""
    single = check_images_out(args.out)
    # on the CPU unless asked otherwise: the picture is nearly the same on every machine
    device = pick_device(args.device or 'cpu')
    vae = load_net(VAE, args.ckpt or CKPT, PROBLEM, device)[0]
    images = generate_faces(vae, args.n or FACES, args.seed or DEFAULTS['seed'], device)
    if single:
        save_single_images(args.out, images)
    else:
        save_picture(args.out, images, COLUMNS)


def generate_faces(vae, count, seed, device):
    """Generate count faces from N(0, I): (count, 3, 64, 64) uint8."""
    return decode_noise(vae.decoder, count, vae.decoder.project.in_features, seed, device)


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure of the report to --out (figures/) from checkpoint, logs and test faces."""
    device = pick_device(args.device or 'cpu')
    ckpt = args.ckpt or CKPT
    vae = load_net(VAE, ckpt, PROBLEM, device)[0]
    faces, test = FaceImages(args.data_dir, 'train'), FaceImages(args.data_dir, 'test')
    train_means, test_means = [run_batches(lambda batch: vae.encoder(to_float(batch))[0], device, split.images)
                               for split in (faces, test)]
    accuracies = attribute_accuracies(faces, train_means, test, test_means)
    attribute = max(accuracies, key=lambda name: accuracies[name][0])
    log, linear = read_log(base_of(ckpt) + '.jsonl'), read_log(LINEAR_CODE)
    write_text(os.path.join(args.out, 'fig1_1.txt'), f'{vae}\n')
    plot_learning_curves(os.path.join(args.out, 'fig1_2.png'), log)
    plot_reconstructions(os.path.join(args.out, 'table1_3.jpg'), vae, test, test_means, device)
    for ending in PICTURE_ENDINGS[:2]:     # the report shows the smaller file
        save_picture(os.path.join(args.out, 'fig1_4' + ending),
                     generate_faces(vae, FACES, DEFAULTS['seed'], device), COLUMNS)
    write_table(os.path.join(args.out, 'table1_5.csv'), [('attribute', 'held-out', 'test')] + [
        (name, figures.rounded(100 * held_out, 1), figures.rounded(100 * of_test, 1))
        for name, (held_out, of_test) in sorted(accuracies.items(), key=lambda item: item[1][0], reverse=True)])
    plot_latent_space(os.path.join(args.out, 'fig1_5.png'), test_means, test.attribute(attribute), attribute)
    plot_walks(os.path.join(args.out, 'fig1_6.jpg'), vae, test, test_means, attribute, device)
    plot_rate_distortion(os.path.join(args.out, 'fig1_7.png'), ckpt, linear)
    print(f'ten figures and tables are in {args.out}')


def attribute_accuracies(faces, train_means, test, test_means):
    """Return {attribute: (balanced accuracy on held-out training faces, on test faces)} of linear classifiers.

    faces and test are the FaceImages of training and test, train_means and test_means (N, latent_dim) their latent
    means.  Raises UserError where no attribute has faces with and without it in each part.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    train_rows, val_rows = split_held_out(len(faces.names))
    accuracies = {}
    for name in test.attributes.columns:
        has = faces.attribute(name)
        parts = [(train_means[rows].numpy(), has[rows.numpy()]) for rows in (train_rows, val_rows)]
        parts.append((test_means.numpy(), test.attribute(name)))
        if all(0 < has.sum() < len(has) for _, has in parts):
            classifier = LogisticRegression(solver='lbfgs', class_weight='balanced', max_iter=1000).fit(*parts[0])
            accuracies[name] = tuple(balanced_accuracy_score(has, classifier.predict(means))
                                     for means, has in parts[1:])
    if len(test.names) < 10 or not accuracies:
        raise UserError('the figures need ten test faces, and faces with and without some attribute in each part of '
                        'the data: add images')
    return accuracies


def plot_learning_curves(path, log):
    """fig1_2: reconstruction and KL over the images seen, training and held-out."""
    settings = log[0]['settings']
    figure, axes = figures.new_figure(1.9, columns=2)
    for kind, colour, label in (('train', figures.COLOURS[4], 'training batch (net in training)'),
                                ('held_out', figures.COLOURS[5], 'held-out faces (averaged weights)')):
        records = [record for record in log if record['kind'] == kind]
        images_seen = [record['step'] * settings['batch_size'] / 1000 for record in records]
        for panel, scalar in zip(axes, ('reconstruction', 'kl')):
            panel.plot(images_seen, [record[scalar] for record in records], color=colour, label=label,
                       linewidth=1.4 if kind == 'held_out' else 0.7)
    axes[0].set(title='Reconstruction, decoded from a sample of q(z|x)', yscale='log',
                xlabel='training images seen (thousands)', ylabel='MSE per pixel in [0, 1]')
    axes[1].set(title='KL divergence from N(0, I)', yscale='log',
                xlabel='training images seen (thousands)', ylabel='KL (nats per image)')
    for panel in axes:
        figures.log_axis(panel.yaxis)
        panel.grid(True, which='both')
        panel.legend()
    figures.save_figure(path, figure)


def plot_reconstructions(path, vae, test, means, device):
    """table1_3: ten test images by a fixed seed, decoded from their means, and their MSE; a CSV has its mean too."""
    rows = np.sort(np.random.RandomState(TABLE_SEED).choice(len(test.names), 10, replace=False))
    images, decoded = test.images[rows], run_batches(vae.decoder, device, means[rows])
    errors = ((decoded - to_float(images)) ** 2).mean((1, 2, 3))
    figure, axes = figures.new_figure(2.1)
    figures.draw_images(axes, torch.cat([images, to_uint8(decoded)]), 10, left=('testing image', 'reconstruction'),
                        above=[os.path.splitext(test.names[row])[0] for row in rows])
    axes.text(-6, 149, 'MSE', ha='right', va='center')
    for index, error in enumerate(errors.tolist()):
        axes.text(35 + 66 * index, 152, figures.rounded(error, 4), ha='center')
    axes.set_title('Ten test faces, reconstructed from the mean of q(z|x); MSE per pixel in [0, 1]', pad=14)
    figures.save_figure(path, figure)
    write_table(os.path.splitext(path)[0] + '.csv', [('image_name', 'mse')] + [
        (test.names[row], figures.rounded(error, 4)) for row, error in zip(rows, errors.tolist())]
        + [('mean', figures.rounded(float(errors.mean()), 4))])


def plot_latent_space(path, means, has_attribute, attribute):
    """fig1_5: t-SNE of the test images' latent means, coloured by an attribute."""
    figure, axes = figures.new_figure(2.7, width=figures.HALF)
    figures.draw_points(axes, figures.embed(means.numpy()), has_attribute.astype(int), [f'not {attribute}', attribute])
    axes.set_title(f'{len(means):,} test faces, coloured by {attribute}')
    figures.save_figure(path, figure)


def plot_walks(path, vae, test, means, attribute, device):
    """fig1_6: walks between two faces, and along the mean difference of an attribute."""
    rng = np.random.RandomState(TABLE_SEED)
    walks, titles = [], []
    for _ in range(4):
        left, right = rng.choice(len(means), 2, replace=False)
        walks += [means[left] + (means[right] - means[left]) * share for share in np.linspace(0, 1, 9)]
        titles.append(f'{test.names[left][:5]} to {test.names[right][:5]}')
    shown = [attribute] + [name for name in ('Smiling', 'Male', 'Blond_Hair', 'Bangs')
                           if name != attribute and name in test.attributes.columns
                           and 0 < test.attribute(name).sum() < len(means)][:3]
    start = means[rng.randint(len(means))]
    for name in shown:
        has = torch.from_numpy(test.attribute(name))
        direction = means[has].mean(0) - means[~has].mean(0)
        walks += [start + direction * times for times in np.linspace(-2, 2, 9)]
        titles.append(name)
    decoded = to_uint8(run_batches(vae.decoder, device, torch.stack(walks)))
    figure, axes = figures.new_figure(4.2, rows=2)
    for panel, first, ticks, title in (
            (axes[0], 0, ['first'] + [f'{share}/8' for share in range(1, 8)] + ['second'],
             'Straight walks between the latent means of two test faces'),
            (axes[1], 4, [f'{times:+.1f}' for times in np.linspace(-2, 2, 9)],
             'One test face moved along attributes: multiples of the difference between\n'
             'the mean of the faces that have the attribute and of those that do not')):
        figures.draw_images(panel, decoded[9 * first:9 * (first + 4)], 9, left=titles[first:first + 4], above=ticks)
        panel.set_title(title, pad=14)
    figures.save_figure(path, figure)


def sweep_of(ckpt):
    """Return the test records of ckpt and of the runs in checkpoints/p1_lambda/ that started from it, ckpt's first.

    Raises UserError if one of these runs started from another file.
    """
    records = [read_log(base_of(ckpt) + '.jsonl')[-1]]
    for path in sorted(glob.glob(os.path.join(SWEEP, '*.jsonl'))):
        if path.endswith('_last.jsonl'):
            continue
        log = read_log(path)
        if log[0].get('init_sum') != sha256(ckpt):
            raise UserError(f'{path} belongs to a run that started from another file than {ckpt}: train it anew with '
                            f'--init {ckpt}, or delete it')
        records.append(log[-1])
    return records


def plot_rate_distortion(path, ckpt, linear):
    """fig1_7: test MSE against KL for each lambda_KL, beside the linear-Gaussian code's curve."""
    records = sweep_of(ckpt)
    points = sorted((record['kl'], record['mse'], record['lambda_kl']) for record in records)
    figure, axes = figures.new_figure(2.6)
    rates, curve = [[record[name] for record in linear] for name in ('test_kl', 'test_mse')]
    axes.plot(rates, curve, color=figures.COLOURS[6], label='linear code (PCA, water-filling)')
    axes.plot([point[0] for point in points], [point[1] for point in points], 'o-',
              color=figures.COLOURS[0], label='this VAE, decoded from the mean')
    for kl, mse, lambda_kl in points:
        # aslant, so that the names of neighbours do not meet
        axes.annotate(r'$\lambda_{KL}$ = ' + f'{lambda_kl:.1e}', (kl, mse), xytext=(-3, -5),
                      textcoords='offset points', color=figures.COLOURS[0], ha='right', va='top', rotation=35,
                      rotation_mode='anchor')
    axes.plot(records[0]['kl'], records[0]['reconstruction'], 's', color=figures.COLOURS[0], markersize=5,
              label='this VAE (shipped), decoded from a sample')
    axes.plot(*PUBLISHED, '*', color=figures.COLOURS[5], markersize=8,
              label='a public report, from a sample, ten faces')
    axes.set(title='Rate and distortion on the test faces', xlabel='KL (nats per image)',
             ylabel='MSE per pixel in [0, 1]', xscale='log', yscale='log', xlim=(10, 300), ylim=(0.003, 0.02))
    axes.set_xticks([10, 20, 50, 100, 200])
    axes.set_yticks([0.003, 0.005, 0.01, 0.02])
    axes.xaxis.set_major_formatter('{x:.0f}')
    axes.yaxis.set_major_formatter('{x:.3f}')
    axes.yaxis.set_minor_formatter('')
    axes.grid(True, which='both')
    axes.legend()
    figures.save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'draw faces', 'picture to write or, without an ending, folder of '
                        'single images')
    parser.add_argument('--n', type=number_between(1, 2 ** 31 - 1), help=f'faces to draw ({FACES})')
    parser.add_argument('--lambda_kl', type=number_between(0, float('inf'), float),
                        help=f'--train: weight of the KL ({DEFAULTS["lambda_kl"]})')
    parser.add_argument('--init', help='--train: checkpoint whose weights the run starts from')
    return parse_shared(parser, PROBLEM, ['out'], argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
