"""Problem 3: domain-adversarial training (DANN) that reads digits in a domain without labels.

Ganin et al. 2016 (JMLR 17, arXiv 1505.07818).  Differences from the paper: the input is normalised image by image, the
two domains pass through the nets in batches of their own, source batches draw the ten classes with equal probability,
images are augmented, and what is kept is an average of the weights over the steps (EMA) with the batch statistics of
unlabelled target training images, augmented as in training.  That is --setting dann; dann_entropy, which is shipped,
also lowers the entropy of the predictions for target images (Grandvalet and Bengio 2005; beside DANN: Shu et al. 2018,
arXiv 1802.08735).  The lower bound (--setting source) and the upper bound (--setting target) have the same net,
batches, augmentation and schedule, but no domain discriminator; the lower bound has the batch statistics of source
images.  The table also shows it with those of target images (AdaBN, Li et al. 2016, arXiv 1603.04779), so that what
they give is not credited to DANN.

    bash hw3_p3.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p3_dann.py --train --data_dir hw3_data     train the three nets that hw3_p3.sh uses; --resume goes on
    python3 p3_dann.py --train --target usps --setting dann --seed 0       train one run of the table
    python3 p3_dann.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed, the last average is kept, and the run of seed 0 is shipped.  Only the upper bound
trains on target labels.  The test images are measured once, at the end of --train, and so are the labels of 500 target
training images on which no run trains.  The constants were set before, without a label of the target, by what is
measured on unlabelled target images: the nuclear norm of the predictions (Cui et al. 2020, arXiv 2003.12237), the
shares of the ten digits, the agreement of two nets; and by the accuracy on held-out source images.
"""
import copy
import math
import os

import torch
import torch.nn.functional as F

from datasets import (SOURCE_OF, add_domains, augment_digits, balanced_rows, check_output, data_checksum, new_parser,
                      number_between, parse_shared, read_digits, run_command, split_held_out, to_float,
                      write_table, write_text)
from models import (DIGIT_NET, DISCRIMINATOR_HIDDEN, DigitNet, DomainDiscriminator, GradientReversal, Run, accuracy,
                    base_of, cosine_rate, digit_features, domain_accuracy, domain_loss, given_flags, label_folder,
                    load_net, measure_held_out, measure_target, on_device, pick_device, predict_probabilities,
                    read_log, read_results, run_path, take_step, update_average, with_statistics)
from report import figures

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
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('NET', 'DISCRIMINATOR_HIDDEN', 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'REVERSAL', 'ENTROPY',
             'AVERAGE_DECAY', 'STATISTICS')

# of public reports (see report/references.yml), mostly chosen on test labels: the highest test accuracy of a DANN, in
# percent, for mnistm, svhn and usps as target; and, on svhn, of two nets that have labels of mnistm alone
PUBLISHED = (61.0, 55.9, 73.5, 45.4, 41.2)


# ---------------------------------------------------------------------------- losses and schedules

def conditional_entropy(logits):
    """Mean entropy, in nats, of the predictions that logits (N, 10) are: Shu et al. 2018, eq. 6."""
    return -(torch.softmax(logits, 1) * torch.log_softmax(logits, 1)).sum(1).mean()


def ramp_at(step, steps):
    """Factor of REVERSAL and ENTROPY, from 0 to 1, most of it early: Ganin and Lempitsky 2015 (1409.7495), eq. 14."""
    return 2 / (1 + math.exp(-10 * step / steps)) - 1


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train the run of --target or, without it, the three runs that hw3_p3.sh uses."""
    for target in [args.target] if args.target else sorted(SOURCE_OF):
        defaults = dict(DEFAULTS, target=target, source=SOURCE_OF[target])
        settings = dict(defaults, **given_flags(args, defaults))
        path = args.ckpt or run_path(PROBLEM, DEFAULTS, settings, name_of(settings))
        train_run(Run(args, PROBLEM, defaults, {name: globals()[name] for name in CONSTANTS}, path), args.data_dir)


def name_of(settings):
    """Say what a run trains, as the name of its file: source, dann_entropy_not_augmented, ..."""
    augment = settings['augment']
    return settings['setting'] + {0: '_not_augmented', 1: ''}.get(augment, f'_augment{augment:g}')


def train_run(run, data_dir):
    """Train on data_dir/digits and write the run's checkpoint, log and state."""
    # device and seed
    settings, device, rng = run.settings, run.device, run.rng
    setting, augment = settings['setting'], settings['augment']
    # data
    source, target = [read_digits(data_dir, settings[domain], 'train') for domain in ('source', 'target')]
    test = read_digits(data_dir, settings['target'], 'test')
    (source_train, source_val), (target_train, target_val) = [
        split_held_out(len(domain.names)) for domain in (source, target)]
    unlabelled = target.images             # without its labels
    statistics_images = statistics_of(source.images, source_train, augment, settings['seed'])
    target_statistics_images = statistics_of(unlabelled, target_train, augment, settings['seed'])
    if setting != 'source':
        statistics_images = target_statistics_images
    labelled, train_rows, val_rows = source, source_train, source_val
    if setting == 'target':
        labelled, train_rows, val_rows = target, target_train, target_val
    # nets
    net = run.keep('net', DigitNet(**NET))
    discriminator = run.keep('discriminator', DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN))
    average = run.keep('average', copy.deepcopy(net)).eval()
    run.facts(net, training_images=len(train_rows), held_out=len(val_rows),
              unlabelled=len(target_train) if setting.startswith('dann') else 0,
              data=data_checksum(labelled.images, labelled.labels, target.images, test.images))
    # optimizers
    optimizer = run.keep('optimizer', torch.optim.Adam(
        list(net.parameters()) + list(discriminator.parameters()), lr=LEARNING_RATE, betas=(0.9, 0.99)))
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch: labelled images with every class equally likely; unlabelled images at random
        rows = train_rows[balanced_rows(labelled.labels[train_rows], run.batch_size, rng)]
        labels = labelled.labels[rows].to(device)
        x = on_device(augment_digits(to_float(labelled.images[rows]), augment, rng), device)
        # update: label loss + domain loss, whose gradient is reversed for the encoder
        learning_rate = cosine_rate(step, run.last_step, LEARNING_RATE, LEARNING_RATE_WARM_UP)
        with run.autocast():
            features = net.encoder(x)
            logits = net.classifier(features)
        loss = F.cross_entropy(logits.float(), labels)
        scalars = dict(label_loss=loss.detach())
        if setting.startswith('dann'):
            rows = target_train[torch.randint(len(target_train), (run.batch_size,), generator=rng)]
            target_x = on_device(augment_digits(to_float(unlabelled[rows]), augment, rng), device)
            ramp = ramp_at(step, run.last_step)
            with run.autocast():
                target_features = net.encoder(target_x)
                source_domain, target_domain = [discriminator(GradientReversal.apply(part, REVERSAL * ramp))
                                                for part in (features, target_features)]
            domain = domain_loss(source_domain.float(), target_domain.float())
            loss = loss + domain
            scalars.update(domain_loss=domain.detach(), domain_accuracy=domain_accuracy(source_domain, target_domain),
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
            run.measured(**measure_held_out(with_statistics(average, statistics_images, device),
                                            labelled.images[val_rows], labelled.labels[val_rows],
                                            unlabelled[target_val], device))
    # final check from file
    net = with_statistics(run.from_file(DigitNet(**NET), 'average'), statistics_images, device)
    metrics = measure_target(net, test, target, target_val, device)
    if setting == 'source':                # what target statistics give without any other adaptation
        metrics['adabn_accuracy'] = accuracy(with_statistics(net, target_statistics_images, device), test.images,
                                             test.labels, device)
    run.finish(net, NET, metrics)


def statistics_of(images, rows, augment, seed):
    """Return images for the batch norms: the first STATISTICS of images[rows], float (n, 3, 28, 28), as in training."""
    return augment_digits(to_float(images[rows[:STATISTICS]]), augment, torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- infer

def infer(args):
    """Label the images in the folder --images and write the assignment's CSV to --out."""
    check_output(args.out)
    device = pick_device(args.device or 'cpu')
    names, labels = label_folder(PROBLEM, args.ckpt or shipped(args.target), args.target, args.images,
                                 args.batch_size or DEFAULTS['batch_size'], device)
    write_table(args.out, [('image_name', 'label')] + list(zip(names, labels)))


def shipped(target, **changed):
    """Return the checkpoint of the run that is shipped for a target, or of one with changed settings."""
    settings = dict(DEFAULTS, target=target, source=SOURCE_OF[target], **changed)
    return run_path(PROBLEM, DEFAULTS, settings, name_of(settings))


# -------------------------------------------------------------------------------------------- plot

def plot(args):
    """Write every figure and table of the report to --out (figures/) from weights, logs and images."""
    device = pick_device(args.device or 'cpu')
    write_table(os.path.join(args.out, 'table3.csv'), figures.table_lines(table_rows(), SOURCE_OF))
    figures.plot_domains(os.path.join(args.out, 'fig3_1.jpg'), {
        figures.DOMAIN_NAMES[domain]: read_digits(args.data_dir, domain, 'train')
        for domain in ('usps', 'mnistm', 'svhn')})
    logs, predictions, shares = {}, {}, [('net', 'target', 'same digit (%)')]
    for target, source in sorted(SOURCE_OF.items()):
        title = figures.scenario_name(target)
        test = [read_digits(args.data_dir, domain, 'test') for domain in (source, target)]
        lower, net = [load_net(DigitNet, ckpt, PROBLEM, device)[0]
                      for ckpt in (shipped(target, setting='source'), shipped(target))]
        for name, of_name, ending in (('source only', lower, '_lower'), ('DANN + entropy', net, '')):
            share = plot_tsne(os.path.join(args.out, f'fig3_4_{target}{ending}.png'), f'{name}, {title}', of_name,
                              args.data_dir, source, test, device)
            shares.append((name, target, figures.rounded(100 * share, 1)))
        logs[title] = read_log(base_of(shipped(target)) + '.jsonl')
        predictions[title] = test[1], predict_probabilities(net, test[1].images, device)
    write_table(os.path.join(args.out, 'fig3_4.csv'), shares)
    write_text(os.path.join(args.out, 'fig3_5.txt'),
               f'{net}\n{DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN)}\n')
    figures.plot_digit_curves(
        os.path.join(args.out, 'fig3_6.png'), logs, scalars=dict(
            label_loss='Label loss, source (nats)', domain_accuracy='Accuracy of discriminator',
            entropy='Entropy, target (nats)'))
    figures.plot_confusion(os.path.join(args.out, 'fig3_7.png'), predictions)
    figures.plot_mistakes(os.path.join(args.out, 'fig3_8.jpg'), predictions)
    print(f'thirteen figures and tables are in {args.out}')


def plot_tsne(path, title, net, data_dir, source, test, device):
    """fig3_4: t-SNE of the features of test images, the DigitImages of source and target in the list test.

    Returns the share of target images' neighbours that show the same digit.
    """
    images, labels, domains = figures.pick_test_images(test)
    # as in training, each domain has batch statistics of its own; the lower bound knows those of the source
    digits = read_digits(data_dir, source, 'train')
    source_net = with_statistics(net, statistics_of(digits.images, split_held_out(len(digits.names))[0],
                                                    DEFAULTS['augment'], 0), device)
    source_images, target_images = images.chunk(2)
    features = torch.cat([digit_features(source_net, source_images, device),
                          digit_features(net, target_images, device)])
    figures.plot_features(path, title, features, labels, domains)
    return figures.same_digit_share(features, labels, domains)


def table_rows():
    """table3: rows of (label, results of the runs, key of the accuracy)."""
    results = read_results(PROBLEM, 'dann_entropy')
    lower, dann, upper = [results.get(row, []) for row in ('source', 'dann_entropy', 'target')]
    lower_not_augmented = results.get('source_not_augmented', [])
    return [('lower bound: source only', lower, 'accuracy'), ('DANN + entropy', dann, 'accuracy'),
            ('upper bound: target only', upper, 'accuracy'),
            ('DANN + entropy, shipped: seed 0', [run for run in dann if run['seed'] == 0], 'accuracy'),
            ('DANN', results.get('dann', []), 'accuracy'),
            ('lower bound, statistics of the target', lower, 'adabn_accuracy'),
            ('lower bound, not augmented', lower_not_augmented, 'accuracy'),
            ('DANN + entropy, not augmented', results.get('dann_entropy_not_augmented', []), 'accuracy'),
            ('lower bound, not augmented, statistics of the target', lower_not_augmented, 'adabn_accuracy'),
            ('DANN + entropy, on 500 held-out target images', dann, 'held_out_accuracy')]


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'label a folder', 'CSV file to write')
    add_domains(parser)
    parser.add_argument('--setting', choices=SETTINGS,
                        help='--train: lower bound, DANN, DANN with an entropy loss or upper bound '
                        f'({DEFAULTS["setting"]})')
    parser.add_argument('--augment', type=number_between(0, 1, float),
                        help=f'--train: strength of the augmentation, 0 to 1 ({DEFAULTS["augment"]:g})')
    return parse_shared(parser, PROBLEM, ['images', 'target', 'out'], argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
