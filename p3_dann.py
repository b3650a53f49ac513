"""Problem 3: domain-adversarial training (DANN) that reads digits in a domain without labels.

Ganin et al. 2016 (JMLR 17, arXiv 1505.07818).  Differences from the paper: the input is normalised image
by image, the two domains pass through the nets in batches of their own, source batches hold the ten
classes in equal numbers, images are augmented, and what is kept is an average of the weights over the
training steps (EMA) with the batch statistics of unlabelled target training images, augmented as they
are in training.  That is --setting dann; dann_entropy, which is shipped, also lowers the entropy of the
predictions for target images (Grandvalet and Bengio 2005; beside DANN: Shu et al. 2018, arXiv
1802.08735).  The lower bound (--setting source) and the upper bound (--setting target) have the same
net, batches, augmentation and schedule, but no domain discriminator; the lower bound has the batch
statistics of source images, all others those of target images.  The table shows the lower bound with the
latter too (AdaBN, Li et al. 2016, arXiv 1603.04779), so that what they give is not credited to DANN.

    bash hw3_p3.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p3_dann.py --train --target usps --setting dann --seed 0       train one cell of the table
    python3 p3_dann.py --train --resume                train the whole table; goes on after a stop
    python3 p3_dann.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed and its last average is kept; shipped is seed 0.  No target label
is read but by the upper bound; the test images are measured once, at the end of --train.  REVERSAL,
ENTROPY, the augmentation and the steps were set by runs without a test.  What was compared: the spread
and confidence of the predictions on 500 unlabelled target training images (the nuclear norm of their
probabilities, Cui et al. 2020, arXiv 2003.12237), their agreement with the predictions of problem 4's
method on 3,000, and the accuracy on held-out source images.  Limits in README.md says what was known of
the test then.
"""
import argparse
import copy
import csv
import functools
import glob
import itertools
import math
import os
import shlex
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from datasets import (COLOURS, DIGIT_SIZE, DOMAIN_NAMES, SOURCE_OF, DigitImages, UserError,
                      augment_digits, balanced_rows, draw_pixels, draw_points, draw_text, embed,
                      list_images, make_grid, new_figure, read_ahead, run_command, save_figure,
                      split_held_out, to_float, write_predictions, write_whole)
from models import (DigitNet, DomainDiscriminator, GradientReversal, RunLog, autocast,
                    collect_results, for_training, is_complete, load_checkpoint, on_device,
                    pick_device, pick_precision, plain_state, predict, read_log, resume_run,
                    run_batches, save_checkpoint, set_learning_rate, update_average,
                    with_statistics, write_log, write_sum)

HERE = os.path.dirname(os.path.abspath(__file__))
PROBLEM = 'p3_dann'
STATE = 'p3_dann (training state)'

# nets
NET = dict(channels=[24, 48, 96], dropout=0.5)             # channels at 28, 14 and 7 pixels
DISCRIMINATOR_HIDDEN = 128

# training
DEFAULTS = dict(
    steps=6000,              # of one batch of each domain
    batch_size=32,           # images of a domain
    seed=0,
    target='mnistm',
    source='usps',           # of another target: the assignment's partner
    setting='dann_entropy',
    augment=1.0)             # strength of the augmentation; 0: none
SETTINGS = ('source', 'dann', 'dann_entropy', 'target')      # lower bound, adaptation, upper bound
LEARNING_RATE = 1e-3         # of Adam, at its peak
LEARNING_RATE_WARM_UP = 100  # steps
REVERSAL = 0.3               # lambda, the strength of the gradient reversal, at its end
ENTROPY = 0.3                # weight of the entropy of target predictions, in nats, at its end
AVERAGE_DECAY = 0.999        # of the average of the weights, per step
STATISTICS = 5000            # training images, augmented, that give the batch norms their statistics
LOG_EVERY = 50               # steps
SAVE_EVERY = 1000            # steps

# the table: three scenarios, rows of (label, setting, augment), three seeds
ROWS = (('lower bound, not augmented', 'source', 0.0), ('lower bound: source only', 'source', 1.0),
        ('DANN', 'dann', 1.0), ('DANN + entropy, not augmented', 'dann_entropy', 0.0),
        ('DANN + entropy', 'dann_entropy', 1.0), ('upper bound: target only', 'target', 1.0))
SEEDS = (0, 1, 2)
RUNS = os.path.join(HERE, 'checkpoints', 'p3_runs')
RESULTS = os.path.join(HERE, 'checkpoints', 'p3_results.jsonl')

# figures
PER_DOMAIN = 500             # test images of each domain in a t-SNE figure
MISTAKES = 32

# highest accuracy of a DANN in a public report, in percent, for mnistm, svhn (the real one) and usps as
# target, mostly chosen on test labels: see Sources in README.md
PUBLISHED = (61.0, 55.9, 75.8)


# ---------------------------------------------------------------------------- losses and schedules

def domain_loss(source, target):
    """Mean cross-entropy of the discriminator's logits (N,) for source images and for target ones.

    Source: Ganin et al. 2016, section 4.2; 1 stands for the source domain, each domain counts a half.
    """
    return 0.5 * (F.softplus(-source).mean() + F.softplus(target).mean())


def conditional_entropy(logits):
    """Mean entropy, in nats, of the predictions that logits (N, 10) are.

    Source: Shu et al. 2018, eq. 6.
    """
    return -(torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum(1).mean()


def ramp_at(step, steps):
    """Factor of REVERSAL and ENTROPY: from 0 at the start to 1 at the end, most of it early on.

    Source: Ganin and Lempitsky 2015 (arXiv 1409.7495), eq. 14.
    """
    return 2 / (1 + math.exp(-10 * step / steps)) - 1


def learning_rate_at(step, steps):
    """Linear warm-up, then half a cosine down to 0 at the last step (steps count from 1)."""
    warm_up = min(1.0, step / LEARNING_RATE_WARM_UP)
    return LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def accuracy(net, digits, device):
    """Share of a DigitImages that a net in eval() labels right."""
    return (predict(net, digits.images, device) == digits.labels).float().mean().item()


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train one run or, without --target, every run of the table that the other flags leave."""
    cells = [{}] if args.target else [
        cell for (_, setting, augment), target, seed in itertools.product(ROWS, sorted(SOURCE_OF), SEEDS)
        for cell in [dict(setting=setting, augment=augment, target=target, seed=seed)]
        if all(getattr(args, name) in (None, value) for name, value in cell.items())]
    if not cells:
        raise UserError('no run of the table has these flags: add --target to train a run of its own')
    for cell in cells:
        given = dict({name: getattr(args, name) for name in DEFAULTS}, **cell)
        defaults = dict(DEFAULTS, source=SOURCE_OF[given['target']])
        settings = dict(defaults, **{name: value for name, value in given.items() if value is not None})
        ckpt = args.ckpt or run_path(settings)
        if cell and args.resume and is_complete(os.path.splitext(ckpt)[0] + '.jsonl', settings):
            print(f'{ckpt} is complete', flush=True)
        else:
            train_run(args, ckpt, settings if cell else given, defaults)
        if not args.ckpt:
            collect_results(RESULTS, glob.glob(os.path.join(glob.escape(RUNS), '*.jsonl')) + glob.glob(
                os.path.join(glob.escape(HERE), 'checkpoints', PROBLEM + '_*.jsonl')))


def run_path(settings):
    """Return the checkpoint of the run with these settings; one run for each target is shipped."""
    if settings == dict(DEFAULTS, target=settings['target'], source=SOURCE_OF[settings['target']]):
        return os.path.join(HERE, 'checkpoints', f'{PROBLEM}_{settings["target"]}.pth')
    name = '{source}_{target}_{setting}_augment{augment:g}_seed{seed}'.format(**settings)
    for other in ('steps', 'batch_size'):
        if settings[other] != DEFAULTS[other]:
            name += f'_{other}{settings[other]}'
    return os.path.join(RUNS, name + '.pth')


@functools.lru_cache(maxsize=None)
def read_digits(data_dir, domain, split):
    """Return the DigitImages; the runs of a table read each of them once."""
    return DigitImages(data_dir, domain, split)


def train_run(args, ckpt, given, defaults):
    """Train on data_dir/digits and write ckpt; beside it its log and the state to resume."""
    # device and seed
    if os.path.isdir(ckpt):
        raise UserError(f'{ckpt} is a folder: name a file for --ckpt')
    base = os.path.splitext(ckpt)[0]
    device = pick_device(args.device)
    settings, state = resume_run(base + '_last.pth', STATE, args.resume, given=given, defaults=defaults)
    steps, batch_size, setting = settings['steps'], settings['batch_size'], settings['setting']
    torch.manual_seed(settings['seed'])                                    # the first weights, dropout
    rng = torch.Generator().manual_seed(settings['seed'])                  # batches, augmentation
    # data
    source, target, test = [read_digits(args.data_dir, settings[domain], split) for domain, split in (
        ('source', 'train'), ('target', 'train'), ('target', 'test'))]
    labelled = target if setting == 'target' else source
    training, held_out = map(torch.from_numpy, split_held_out(len(labelled.names)))
    unlabelled = target.images             # without its labels
    source_seen, target_seen = [
        augment_digits(to_float(images), settings['augment'], torch.Generator().manual_seed(settings['seed']))
        for images in (source.images[training[:STATISTICS]], unlabelled[:STATISTICS])]
    seen = source_seen if setting == 'source' else target_seen
    # nets
    config = NET if state is None else state['config']
    net = for_training(DigitNet(**config), device)
    discriminator = for_training(DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN), device)
    average = copy.deepcopy(net).eval()
    # optimizers
    optimizer = torch.optim.Adam(list(net.parameters()) + list(discriminator.parameters()),
                                 lr=LEARNING_RATE, betas=(0.9, 0.99))
    # resume
    step, seconds = 0, 0.0
    if state is not None:
        step, seconds = state['step'], state['seconds']
        net.load_state_dict(state['net'])
        discriminator.load_state_dict(state['discriminator'])
        average.load_state_dict(state['average'])
        optimizer.load_state_dict(state['optimizer'])
        rng.set_state(state['rng'])
        torch.set_rng_state(state['dropout_rng'])
    precision = pick_precision(device) if state is None else state['precision']
    command = args.command if state is None else state['command']
    if state is None and os.path.exists(base + '_last.pth'):
        os.remove(base + '_last.pth')      # of a finished run: it must not be resumed on a new log
    log = RunLog(base + '_last.jsonl', step)
    if state is None:
        log.add('run', command=command, settings=settings, training_images=len(training),
                held_out=len(held_out), unlabelled=len(unlabelled) if setting.startswith('dann') else 0,
                device=device.type, precision=precision, threads=torch.get_num_threads(),
                torch=torch.__version__,
                parameters=sum(parameter.numel() for parameter in net.parameters()))
    sums, counts = {}, {}                  # of the scalars since the last record
    start = time.time() - seconds
    # loop
    for step in range(step + 1, steps + 1):
        # batch: the ten classes in equal numbers; any unlabelled images
        rows = training[balanced_rows(labelled.labels[training], batch_size, rng)]
        labels = labelled.labels[rows].to(device)
        x = on_device(augment_digits(to_float(labelled.images[rows]), settings['augment'], rng), device)
        # update: label loss + domain loss, whose gradient is reversed for the encoder
        learning_rate, scalars = learning_rate_at(step, steps), {}
        set_learning_rate(optimizer, learning_rate)
        with autocast(device, precision):
            features = net.encoder(x)
            logits = net.classifier(features)
        loss = F.cross_entropy(logits.float(), labels)
        scalars.update(label_loss=loss.detach(), learning_rate=learning_rate)
        if setting.startswith('dann'):
            rows = torch.randint(len(unlabelled), (batch_size,), generator=rng)
            target_x = on_device(augment_digits(to_float(unlabelled[rows]), settings['augment'], rng), device)
            ramp = ramp_at(step, steps)
            with autocast(device, precision):
                target_features = net.encoder(target_x)
                of_source, of_target = [discriminator(GradientReversal.apply(one, REVERSAL * ramp))
                                        for one in (features, target_features)]
            domain = domain_loss(of_source.float(), of_target.float())
            loss = loss + domain
            scalars.update(domain_loss=domain.detach(), reversal=REVERSAL * ramp, domain_accuracy=0.5 * (
                (of_source > 0).float().mean() + (of_target < 0).float().mean()))
        if setting == 'dann_entropy':
            with autocast(device, precision):
                logits = net.classifier(target_features)
            entropy = conditional_entropy(logits.float())
            loss = loss + ENTROPY * ramp * entropy
            scalars['entropy'] = entropy.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_average(average, net, min(AVERAGE_DECAY, step / (step + 20)))
        # log: means since the last record
        for name, value in scalars.items():
            sums[name], counts[name] = sums.get(name, 0) + value, counts.get(name, 0) + 1
        if step % LOG_EVERY == 0 or step == steps:
            means = {name: float(total) / counts[name] for name, total in sums.items()}
            if not all(math.isfinite(value) for value in means.values()):
                raise UserError(f'a loss is not finite near step {step}: the last good save, if there '
                                f'is one, stays in {base}_last.pth; start anew with another --seed')
            sums, counts = {}, {}
            seconds = time.time() - start
            speed = step * batch_size / seconds
            log.add('train', step=step, images_per_second=speed, **means)
            left = int((steps - step) * batch_size / speed)
            print(f'{os.path.basename(base)}  step {step}/{steps}  label loss '
                  f'{means["label_loss"]:.3f}  {speed:.0f} images/s  '
                  f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left', flush=True)
        # save
        if step % SAVE_EVERY == 0 or step == steps:
            measured = with_statistics(average, seen, device)
            found = predict(measured, labelled.images[held_out], device) == labelled.labels[held_out]
            log.add('held_out', step=step, accuracy=found.float().mean().item())
            save_checkpoint(base + '_last.pth', dict(
                problem=STATE, step=step, seconds=time.time() - start, config=config,
                settings=settings, precision=precision, command=command, net=net.state_dict(),
                average=average.state_dict(), discriminator=discriminator.state_dict(),
                optimizer=optimizer.state_dict(), rng=rng.get_state(),
                dropout_rng=torch.get_rng_state()))
    # final check from file
    state = load_checkpoint(base + '_last.pth', STATE)
    net = DigitNet(**config)
    net.load_state_dict(state['average'])
    net = with_statistics(net, seen, device)
    metrics = dict(images=len(test.names), accuracy=accuracy(net, test, device))
    if setting == 'source':                # what target statistics give without any other adaptation
        metrics['adabn_accuracy'] = accuracy(with_statistics(net, target_seen, device), test, device)
    log.add('test', step=steps, **metrics)
    save_checkpoint(ckpt, dict(problem=PROBLEM, step=steps, config=config, net=plain_state(net),
                               settings=settings, metrics=metrics, command=command))
    write_sum(ckpt)
    write_log(base + '.jsonl', read_log(log.path))     # the last: it says that the run is complete
    print('{}: {:.2f} % of the test images of {}'.format(
        ckpt, 100 * metrics['accuracy'], DOMAIN_NAMES[settings['target']]))


# ------------------------------------------------------------------------------------------- infer

def load_net(path, device):
    """Return (net in eval() on device, checkpoint) of a checkpoint that train() wrote."""
    checkpoint = load_checkpoint(path, PROBLEM)
    net = DigitNet(**checkpoint['config'])
    net.load_state_dict(checkpoint['net'])
    return net.to(device).eval(), checkpoint


def infer(args):
    """Label the images in the folder --images and write the assignment's CSV to --out."""
    if os.path.isdir(args.out):
        raise UserError(f'{args.out} is a folder: name the CSV file to write, for instance '
                        + os.path.join(args.out, 'pred.csv'))
    names = list_images(args.images)
    others = len(os.listdir(args.images)) - len(names)
    if others:
        print(f'{others} other files or folders beside the {len(names)} images are left out', flush=True)
    device = pick_device(args.device or 'cpu')
    ckpt = args.ckpt or run_path(dict(DEFAULTS, target=args.target, source=SOURCE_OF[args.target]))
    net, checkpoint = load_net(ckpt, device)
    if checkpoint['settings']['target'] != args.target:
        raise UserError(f'{ckpt} was trained for {checkpoint["settings"]["target"]}: name that as '
                        '--target, or another --ckpt')
    labels, shown = [], time.time()
    for images in read_ahead(args.images, names, DIGIT_SIZE):
        labels += predict(net, images, device, args.batch_size or DEFAULTS['batch_size']).tolist()
        if time.time() - shown > 2:
            print(f'{len(labels):,} of {len(names):,} images', flush=True)
            shown = time.time()
    write_predictions(args.out, names, labels)


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure and table of the report to --out (figures/) from weights, logs and images."""
    device = pick_device(args.device or 'cpu')
    results = read_table()
    rows = []
    for label, setting, augment in ROWS:
        records = [record for record in results
                   if (record['setting'], record['augment']) == (setting, augment)]
        rows.append((label, records))
        if setting == 'source':
            rows.append((label + ', target statistics', with_target_statistics(records)))
        if (setting, augment) == (DEFAULTS['setting'], DEFAULTS['augment']):
            rows.append((label + ', shipped: seed 0', of_seed_0(records)))
    plot_table(os.path.join(args.out, 'table3'), 'Problem 3: DANN', rows)
    curves, found = {}, {}
    for target, source in sorted(SOURCE_OF.items()):
        settings = dict(DEFAULTS, target=target, source=source)
        path = run_path(settings)
        net = load_net(path, device)[0]
        lower = load_net(run_path(dict(settings, setting='source')), device)[0]
        digits = [DigitImages(args.data_dir, domain, 'test') for domain in (source, target)]
        title = f'{DOMAIN_NAMES[source]} to {DOMAIN_NAMES[target]}'
        plot_features(os.path.join(args.out, f'fig3_4_{target}'), f'DANN + entropy, {title}', net, digits,
                      device)
        plot_features(os.path.join(args.out, f'fig3_4_{target}_lower'), f'source only, {title}', lower,
                      digits, device)
        curves[title] = read_log(os.path.splitext(path)[0] + '.jsonl')
        found[title] = digits[1], run_batches(lambda batch: torch.softmax(net(to_float(batch)), 1),
                                              device, digits[1].images)
    draw_text(os.path.join(args.out, 'fig3_5.png'), 'Problem 3: print(model)', [
        f'(net): {net}', f'(discriminator): {DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN)}'])
    plot_learning_curves(os.path.join(args.out, 'fig3_6.png'), curves)
    plot_confusion(os.path.join(args.out, 'fig3_7.png'), found)
    plot_mistakes(os.path.join(args.out, 'fig3_8.png'), found)
    print(f'eighteen figures and tables are in {args.out}')


def read_table():
    """Return the records of the results log that belong to the table: its steps, batches and seeds."""
    return [record for record in read_log(RESULTS) if record['seed'] in SEEDS
            and all(record[name] == DEFAULTS[name] for name in ('steps', 'batch_size'))]


def with_target_statistics(records):
    """Return lower bounds as the target's batch statistics, without any other adaptation, make them."""
    return [dict(record, accuracy=record['adabn_accuracy']) for record in records]


def of_seed_0(records):
    """Return the records of the runs whose nets are shipped, which the grader's script gives again."""
    return [record for record in records if record['seed'] == DEFAULTS['seed']]


def plot_table(base, title, rows):
    """base.png and base.csv: mean and standard deviation over the seeds; the CSV has each seed too.

    rows is a list of (label, records of the results log), of which those without a run are left out;
    all values are in percent.
    """
    scenarios = [(source, target) for target, source in sorted(SOURCE_OF.items())]
    lines, cells, rows = [], [], [row for row in rows if row[1]]
    if not rows:
        raise UserError('no finished run has the settings of the table: --train --resume makes them')
    for label, records in rows:
        cells.append([])
        for source, target in scenarios:
            by_seed = {record['seed']: 100 * record['accuracy'] for record in records
                       if (record['source'], record['target']) == (source, target)}
            values = list(by_seed.values())
            mean = f'{np.mean(values):.2f}' if values else ''
            spread = f'{np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
            lines.append([label, DOMAIN_NAMES[source], DOMAIN_NAMES[target], len(values), mean, spread]
                         + [f'{by_seed[seed]:.2f}' if seed in by_seed else '' for seed in SEEDS])
            cells[-1].append(mean + f' \u00b1 {spread}' * bool(spread) + f' ({len(values)})')

    def write(temporary):
        with open(temporary, 'w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['row', 'source', 'target', 'runs', 'mean', 'spread']
                            + [f'seed {seed}' for seed in SEEDS])
            writer.writerows(lines)
    write_whole(base + '.csv', write)
    figure, axes = new_figure(11, 0.36 * len(rows) + 1.0)
    axes.axis('off')
    table = axes.table(cellText=cells, rowLabels=[label for label, _ in rows], loc='center',
                       cellLoc='center', bbox=[0.12, 0, 0.88, 1],
                       colLabels=[f'{DOMAIN_NAMES[source]} \u2192 {DOMAIN_NAMES[target]}'
                                  for source, target in scenarios])
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    axes.set_title(f'{title}: test accuracy in %, mean \u00b1 standard deviation (number of seeds)',
                   fontsize=11)
    save_figure(base + '.png', figure)


def plot_features(base, title, net, digits, device):
    """base_digits.png and base_domains.png: t-SNE of the encoder's features of test images.

    digits are the DigitImages of source and target, of which equal numbers are drawn.
    """
    rows = [np.sort(np.random.RandomState(0).permutation(len(one.names))[:PER_DOMAIN])
            for one in digits]
    count = min(len(one) for one in rows)
    images = torch.cat([one.images[chosen[:count]] for one, chosen in zip(digits, rows)])
    points = embed(run_batches(lambda batch: net.encoder(to_float(batch)), device, images).numpy())
    labels = torch.cat([one.labels[chosen[:count]] for one, chosen in zip(digits, rows)]).numpy()
    domains = np.repeat([0, 1], count)
    for name, values, names in (('digits', labels, [str(digit) for digit in range(10)]),
                                ('domains', domains, ['source', 'target'])):
        figure, axes = new_figure(6.4, 5.8)
        draw_points(axes, points, values, names,
                    [f'${digit}$' for digit in range(10)] if name == 'digits' else None)
        axes.set_title(f'{title}: {count} test images each, by {name[:-1]}', fontsize=9)
        save_figure(f'{base}_{name}.png', figure)


def plot_learning_curves(path, curves):
    """fig3_6: the losses, the discriminator's accuracy and source accuracy of the shipped runs."""
    figure, axes = new_figure(10, 7, rows=2, columns=2)
    axes = axes.flatten()
    for colour, (title, log) in zip(COLOURS, curves.items()):
        for one, name in zip(axes, ('label_loss', 'entropy', 'domain_accuracy')):
            points = [(record['step'], record[name]) for record in log if name in record]
            one.plot(*zip(*points), color=colour, linewidth=0.9, label=title)
        records = [record for record in log if record['kind'] == 'held_out']
        axes[3].plot([record['step'] for record in records],
                     [100 * record['accuracy'] for record in records], 'o-', color=colour, label=title,
                     markersize=3)
    axes[0].set(title='Label loss of augmented source images', ylabel='cross-entropy (nats)',
                yscale='log')
    axes[1].set(title='Entropy of predictions for augmented target images', ylabel='entropy (nats)')
    axes[2].set(title='Accuracy of the domain discriminator', ylabel='share of images told apart')
    axes[2].axhline(0.5, color=COLOURS[6], linewidth=0.8)
    axes[3].set(title='Held-out source images, target statistics', ylabel='accuracy (%)')
    for one in axes:
        one.set_xlabel('training step')
        one.grid(True, alpha=0.25)
        one.legend(fontsize=8)
    save_figure(path, figure)


def plot_confusion(path, found):
    """fig3_7: how often each digit of the target's test images is labelled as each other, in %."""
    figure, all_axes = new_figure(13, 4.6, columns=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, found.items()):
        counts = np.zeros((10, 10))
        np.add.at(counts, (digits.labels.numpy(), probabilities.argmax(1).numpy()), 1)
        shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        axes.pcolormesh(np.arange(11) - 0.5, np.arange(11) - 0.5, shares, cmap='Blues', vmin=0,
                        vmax=100)
        axes.invert_yaxis()
        axes.set_aspect('equal')
        for row, column in itertools.product(range(10), range(10)):
            if shares[row, column] > 0.5:
                axes.text(column, row, f'{shares[row, column]:.0f}', ha='center', va='center',
                          fontsize=7, color='white' if shares[row, column] > 50 else 'black')
        axes.set(title=f'{title}: {100 * np.trace(counts) / counts.sum():.2f} %',
                 xlabel='predicted', ylabel='digit (% of its test images)', xticks=range(10),
                 yticks=range(10))
    save_figure(path, figure)


def plot_mistakes(path, found):
    """fig3_8: the 32 wrong predictions with the highest probability, most confident first."""
    figure, all_axes = new_figure(10, 4.8, rows=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, found.items()):
        confidence, classes = probabilities.max(1)
        wrong = torch.nonzero(classes != digits.labels).flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
        draw_pixels(axes, make_grid(digits.images[wrong], columns=16, gap=14))
        for index, row in enumerate(wrong.tolist()):
            axes.text(28 + 42 * (index % 16), 12 + 42 * (index // 16), ha='center', fontsize=7,
                      s=f'{digits.labels[row]} as {classes[row]}')
        axes.set_title(f'{title}: {len(wrong)} most confident mistakes (digit as prediction)',
                       fontsize=10)
    save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--train', action='store_true', help='train; without a mode: label a folder')
    mode.add_argument('--plot', action='store_true', help='write the figures and tables')
    parser.add_argument('--data_dir', default='hw3_data', help='folder that holds digits/ (hw3_data)')
    parser.add_argument('--images', help='folder of the images to label')
    parser.add_argument('--out', help='CSV file to write; --plot: figures')
    parser.add_argument('--ckpt', help='checkpoint to read, or to write with --train --target '
                        f'(checkpoints/{PROBLEM}_TARGET.pth, of another run than the shipped '
                        f'checkpoints/{os.path.basename(RUNS)}/...)')
    parser.add_argument('--resume', action='store_true',
                        help='--train: go on with a stopped run; of the table leave out what is finished')
    parser.add_argument('--steps', type=int, help=f'training steps ({DEFAULTS["steps"]})')
    parser.add_argument('--batch_size', type=int,
                        help=f'images of a domain in a step, or at once ({DEFAULTS["batch_size"]})')
    parser.add_argument('--seed', type=int, help=f'of the run ({DEFAULTS["seed"]})')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'],
                        help='auto takes a GPU if there is one (auto for --train, else cpu)')
    parser.add_argument('--target', choices=sorted(SOURCE_OF),
                        help='domain without labels; --train without it: the whole table')
    parser.add_argument('--source', choices=sorted(SOURCE_OF),
                        help='--train: domain with labels (the assignment\'s partner of the target)')
    parser.add_argument('--setting', choices=SETTINGS,
                        help='--train: lower bound, DANN, DANN with an entropy loss or upper bound '
                        f'({DEFAULTS["setting"]})')
    parser.add_argument('--augment', type=float, help='--train: strength of the augmentation, 0 to 1 '
                        f'({DEFAULTS["augment"]:g})')
    args = parser.parse_args(argv)
    for name in ('steps', 'batch_size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1')
    if args.augment is not None and not 0 <= args.augment <= 1:
        parser.error('--augment must lie in 0 .. 1')
    if args.seed is not None and not 0 <= args.seed < 2 ** 32:
        parser.error('--seed must lie in 0 .. 4294967295')
    if args.target and args.source == args.target:
        parser.error(f'--source {args.source} is the target: name another domain')
    if args.train and not args.target and (args.ckpt or args.source):
        parser.error('--ckpt and --source are for one run: say its --target too')
    if args.plot:
        args.out = args.out or 'figures'
    elif not args.train and not (args.images and args.target and args.out):
        parser.error('say --images FOLDER --target TARGET --out FILE.csv, --train or --plot')
    words = sys.argv[1:] if argv is None else argv
    args.command = f'python3 {PROBLEM}.py ' + ' '.join(shlex.quote(word) for word in words)
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
