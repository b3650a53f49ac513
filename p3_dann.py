"""Problem 3: domain-adversarial training (DANN) that reads digits in a domain without labels.

Ganin et al. 2016 (JMLR 17, arXiv 1505.07818).  Differences from the paper: the input is normalised image
by image, the two domains pass through the nets in batches of their own, source batches draw the ten
classes with equal probability, images are augmented, and what is kept is an average of the weights over the
training steps (EMA) with the batch statistics of unlabelled target training images, augmented as they
are in training.  That is --setting dann; dann_entropy, which is shipped, also lowers the entropy of the
predictions for target images (Grandvalet and Bengio 2005; beside DANN: Shu et al. 2018, arXiv
1802.08735).  The lower bound (--setting source) and the upper bound (--setting target) have the same
net, batches, augmentation and schedule, but no domain discriminator; the lower bound has the batch
statistics of source images, all others those of target images.  The table shows the lower bound with the
latter too (AdaBN, Li et al. 2016, arXiv 1603.04779), so that what they give is not credited to DANN.

    bash hw3_p3.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p3_dann.py --train --target usps --setting dann --seed 0       train one cell of the table
    python3 p3_dann.py --train --resume                train the runs of the table that have no log yet
    python3 p3_dann.py --train --resume --directions others                likewise those of the other directions
    python3 p3_dann.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed, the last average is kept, and the run of seed 0 is shipped.  Only
the upper bound trains on target labels.  The test images are measured once, at the end of --train, and so are
the labels of 500 target training images on which no run trains.  The constants were set before that, without
a label of the target.  These were compared on unlabelled target training images: the spread and confidence of
the predictions (the nuclear norm of their probabilities, Cui et al. 2020, arXiv 2003.12237), the shares of
the ten digits, and the agreement of two nets; and the accuracy on held-out source images.
"""
import copy
import itertools
import math
import os

import torch
import torch.nn.functional as F

from datasets import (COLOURS, DIRECTIONS, DOMAIN_NAMES, SEEDS, SOURCE_OF, add_domains, augment_digits, balanced_rows,
                      check_out, content_sum, log_axis, new_figure, new_parser, of_seed_0, parse_shared,
                      pick_test_images, plot_confusion, plot_domains, plot_features, plot_mistakes, plot_table,
                      read_digits, read_scenario, run_command, save_figure, scenario_name, split_held_out, to_float,
                      with_other_accuracy, write_predictions, write_text)
from models import (DIGIT_NET, DISCRIMINATOR_HIDDEN, DigitNet, DomainDiscriminator, GradientReversal, accuracy,
                    base_of, cosine_rate, digit_runs, domain_accuracy, domain_loss, label_folder, load_net,
                    measure_digits, measure_target, on_device, pick_device, probabilities_of, read_log, rows_of,
                    run_batches, run_path, take_step, update_average, with_statistics)

PROBLEM = 'p3_dann'

# nets
NET = DIGIT_NET

# training
DEFAULTS = dict(
    steps=8000,              # of one batch of each domain
    batch_size=32,           # images of a domain
    seed=0,
    target='mnistm',
    source='usps',           # of another target: the assignment's partner
    setting='dann_entropy',
    augment=1.0)             # strength of the augmentation; 0: none
SETTINGS = ('source', 'dann', 'dann_entropy', 'target')      # lower bound, adaptation, upper bound
LEARNING_RATE = 1e-3         # of Adam, at its peak
LEARNING_RATE_WARM_UP = 100  # steps
REVERSAL = 1.0               # lambda, the strength of the gradient reversal, at its end
ENTROPY = 0.3                # weight of the entropy of target predictions, in nats, at its end
AVERAGE_DECAY = 0.999        # of the average of the weights, per step: the most (see update_average)
STATISTICS = 5000            # training images, augmented, that give the batch norms their statistics
LOG_EVERY = 250              # steps
SAVE_EVERY = 1000            # steps

# the tables: rows of (setting, augment, tables), with three targets and three seeds each; the upper bound has no
# other source, so that of the scenarios asked for serves the other directions too
ROWS = (('source', 1.0, ('asked', 'others')), ('dann_entropy', 1.0, ('asked', 'others')), ('target', 1.0, ('asked',)),
        ('dann', 1.0, ('asked',)), ('source', 0.0, ('asked',)), ('dann_entropy', 0.0, ('asked',)))
# highest accuracy of a DANN in a public report, in percent, for mnistm, svhn and usps as target, mostly
# chosen on test labels: see report/references.yml
PUBLISHED = (61.0, 55.9, 75.8)


def constants():
    """Return the constants of the method.  A run saves them, so that --resume refuses changed ones."""
    return dict(NET=NET, DISCRIMINATOR_HIDDEN=DISCRIMINATOR_HIDDEN, LEARNING_RATE=LEARNING_RATE,
                LEARNING_RATE_WARM_UP=LEARNING_RATE_WARM_UP, REVERSAL=REVERSAL, ENTROPY=ENTROPY,
                AVERAGE_DECAY=AVERAGE_DECAY, STATISTICS=STATISTICS)


# ---------------------------------------------------------------------------- losses and schedules

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


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train one run or, without --target, every run of the table that the other flags leave."""
    cells = [dict(setting=setting, augment=augment, target=target, source=source, seed=seed)
             for setting, augment, tables in ROWS for table in tables
             for (target, source), seed in itertools.product(sorted(DIRECTIONS[table].items()), SEEDS)]
    for run in digit_runs(args, PROBLEM, DEFAULTS, constants(), cells, name_of):
        train_run(run, args.data_dir)


def name_of(settings):
    """Say what a run trains, as the name of its file: source, dann_entropy_not_augmented, ..."""
    augment = settings['augment']
    return settings['setting'] + {0: '_not_augmented', 1: ''}.get(augment, f'_augment{augment:g}')


def train_run(run, data_dir):
    """Train on data_dir/digits and write the run's checkpoint, log and state."""
    # device and seed
    settings, device, rng = run.settings, run.device, run.rng
    setting, augmented = settings['setting'], settings['augment']
    # data
    source, target, test = read_scenario(data_dir, settings)
    (training, held_out), (adapting, watched) = [split_held_out(len(one.names)) for one in (source, target)]
    unlabelled = target.images             # without its labels
    source_seen, target_seen = [
        augment_digits(to_float(images[rows[:STATISTICS]]), augmented, torch.Generator().manual_seed(settings['seed']))
        for images, rows in ((source.images, training), (unlabelled, adapting))]
    seen = source_seen if setting == 'source' else target_seen
    labelled = source
    if setting == 'target':
        labelled, training, held_out = target, adapting, watched
    # nets
    net = run.keep(net=DigitNet(**NET))
    discriminator = run.keep(discriminator=DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN))
    average = run.keep(average=copy.deepcopy(net)).eval()
    run.facts(net, training_images=len(training), held_out=len(held_out),
              unlabelled=len(adapting) if setting.startswith('dann') else 0,
              data=content_sum(labelled.images, labelled.labels, target.images, test.images))
    # optimizers
    optimizer = run.keep(optimizer=torch.optim.Adam(
        list(net.parameters()) + list(discriminator.parameters()), lr=LEARNING_RATE, betas=(0.9, 0.99)))
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch: labelled images with every class equally likely; unlabelled images at random
        rows = training[balanced_rows(labelled.labels[training], run.batch_size, rng)]
        labels = labelled.labels[rows].to(device)
        x = on_device(augment_digits(to_float(labelled.images[rows]), augmented, rng), device)
        # update: label loss + domain loss, whose gradient is reversed for the encoder
        learning_rate = cosine_rate(step, run.last_step, LEARNING_RATE, LEARNING_RATE_WARM_UP)
        with run.autocast():
            features = net.encoder(x)
            logits = net.classifier(features)
        loss = F.cross_entropy(logits.float(), labels)
        scalars = dict(label_loss=loss.detach())
        if setting.startswith('dann'):
            rows = adapting[torch.randint(len(adapting), (run.batch_size,), generator=rng)]
            target_x = on_device(augment_digits(to_float(unlabelled[rows]), augmented, rng), device)
            ramp = ramp_at(step, run.last_step)
            with run.autocast():
                target_features = net.encoder(target_x)
                of_source, of_target = [discriminator(GradientReversal.apply(one, REVERSAL * ramp))
                                        for one in (features, target_features)]
            domain = domain_loss(of_source.float(), of_target.float())
            loss = loss + domain
            scalars.update(domain_loss=domain.detach(), domain_accuracy=domain_accuracy(of_source, of_target),
                           reversal=REVERSAL * ramp)
        if setting == 'dann_entropy':
            with run.autocast():
                logits = net.classifier(target_features)
            entropy = conditional_entropy(logits.float())
            loss = loss + ENTROPY * ramp * entropy
            scalars['entropy'] = entropy.detach()
        take_step(optimizer, loss, learning_rate)
        update_average(average, net, step, AVERAGE_DECAY)
        # log and save
        run.log(**scalars, learning_rate=learning_rate)
        if run.saves:
            run.measured(**measure_digits(with_statistics(average, seen, device), labelled.images[held_out],
                                          labelled.labels[held_out], unlabelled[watched], device))
    # final check from file
    net = with_statistics(run.from_file(DigitNet(**NET), 'average'), seen, device)
    metrics = measure_target(net, test, target, watched, device)
    if setting == 'source':                # what target statistics give without any other adaptation
        metrics['adabn_accuracy'] = accuracy(with_statistics(net, target_seen, device), test.images, test.labels,
                                             device)
    run.finish(net, NET, metrics)


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Label the images in the folder --images and write the assignment's CSV to --out."""
    check_out(args.out)
    device = pick_device(args.device or 'cpu')
    write_predictions(args.out, *label_folder(PROBLEM, args.ckpt or shipped(args.target), args.target, args.images,
                                              args.batch_size or DEFAULTS['batch_size'], device))


def shipped(target, **changed):
    """Return the checkpoint of the run that is shipped for a target, or of one with changed settings."""
    settings = dict(DEFAULTS, target=target, source=SOURCE_OF[target], **changed)
    return run_path(PROBLEM, DEFAULTS, settings, name_of(settings))


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure and table of the report to --out (figures/) from weights, logs and images."""
    device = pick_device(args.device or 'cpu')
    plot_table(os.path.join(args.out, 'table3'), 'Problem 3: DANN', table_rows(), asked=3)
    plot_domains(os.path.join(args.out, 'fig3_1.jpg'), {
        DOMAIN_NAMES[domain]: read_digits(args.data_dir, domain, 'train') for domain in ('usps', 'mnistm', 'svhn')})
    curves, predicted = {}, {}
    for target, source in sorted(SOURCE_OF.items()):
        title = scenario_name(target)
        digits = [read_digits(args.data_dir, domain, 'test') for domain in (source, target)]
        images, labels, domains = pick_test_images(digits)
        for path, name, ckpt in (('fig3_4_{}_lower', 'source only', shipped(target, setting='source')),
                                 ('fig3_4_{}', 'DANN + entropy', shipped(target))):
            net = load_net(DigitNet, ckpt, PROBLEM, device)[0]
            # as in training, each domain has batch statistics of its own; the lower bound knows those of the source
            of_source = with_statistics(net, source_seen(args.data_dir, source), device)
            features = torch.cat([run_batches(lambda batch, one=one: one.encoder(to_float(batch)), device, part)
                                  for one, part in zip((of_source, net), images.chunk(2))])
            plot_features(os.path.join(args.out, path.format(target) + '.png'), f'{name}, {title}', features, labels,
                          domains)
        curves[title] = read_log(base_of(ckpt) + '.jsonl')
        predicted[title] = digits[1], probabilities_of(net, digits[1].images, device)
    write_text(os.path.join(args.out, 'fig3_5.txt'),
               f'{net}\n{DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN)}\n')
    plot_learning_curves(os.path.join(args.out, 'fig3_6.png'), curves)
    plot_confusion(os.path.join(args.out, 'fig3_7.png'), predicted)
    plot_mistakes(os.path.join(args.out, 'fig3_8.jpg'), predicted)
    print(f'thirteen figures and tables are in {args.out}')


def table_rows():
    """table3: rows of (label, records of the results log)."""
    found = rows_of(PROBLEM)
    lower, dann, upper = [found.get(name, []) for name in ('source', DEFAULTS['setting'], 'target')]
    rows = [('lower bound: source only', lower), ('DANN + entropy', dann), ('upper bound: target only', upper),
            ('DANN + entropy, shipped: seed 0', of_seed_0(dann)), ('DANN', found.get('dann', [])),
            ('lower bound, statistics of the target', with_other_accuracy(lower, 'adabn_accuracy'))]
    for label, name in (('lower bound', 'source'), ('DANN + entropy', 'dann_entropy')):
        rows.append((f'{label}, not augmented', found.get(f'{name}_not_augmented', [])))
    rows.append(('lower bound, not augmented, statistics of the target',
                 with_other_accuracy(found.get('source_not_augmented', []), 'adabn_accuracy')))
    rows.append(('DANN + entropy, on 500 held-out target images', with_other_accuracy(dann, 'held_out_accuracy')))
    return rows


def source_seen(data_dir, source):
    """Return source images as a run of seed 0 sees them, which give the batch norms their statistics."""
    digits = read_digits(data_dir, source, 'train')
    rows = split_held_out(len(digits.names))[0][:STATISTICS]
    return augment_digits(to_float(digits.images[rows]), DEFAULTS['augment'], torch.Generator().manual_seed(0))


def plot_learning_curves(path, curves):
    """fig3_6: label loss, the discriminator's accuracy and the entropy of target predictions."""
    figure, axes = new_figure(2.4, columns=3)
    for one, name in zip(axes, ('label_loss', 'domain_accuracy', 'entropy')):
        for colour, (title, log) in zip(COLOURS, curves.items()):
            points = [(record['step'], record[name]) for record in log if name in record]
            one.plot(*zip(*points), color=colour, label=title)
        one.set_xlabel('training step')
        one.grid(True)
    axes[0].set_yscale('log')
    log_axis(axes[0].yaxis)
    axes[0].set_title('Label loss, source (nats)')
    axes[1].set_title('Accuracy of the discriminator')
    axes[1].axhline(0.5, color=COLOURS[6], linewidth=0.8, linestyle=':')       # chance
    axes[2].set_title('Entropy, target (nats)')
    axes[2].legend()
    save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'label a folder', 'CSV file to write')
    add_domains(parser)
    parser.add_argument('--setting', choices=SETTINGS,
                        help='--train: lower bound, DANN, DANN with an entropy loss or upper bound '
                        f'({DEFAULTS["setting"]})')
    parser.add_argument('--augment', type=float, help='--train: strength of the augmentation, 0 to 1 '
                        f'({DEFAULTS["augment"]:g})')
    args = parse_shared(parser, PROBLEM, ['images', 'target', 'out'], argv)
    if args.augment is not None and not 0 <= args.augment <= 1:
        parser.error('--augment must lie in 0 .. 1')
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
