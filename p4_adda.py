"""Problem 4: ADDA, improved piece by piece, that reads digits in a domain without labels.

Tzeng et al. 2017 (arXiv 1702.05464): train an encoder and a classifier on the source, copy the encoder, and train the
copy on target images to fool a discriminator, which tells its features from those of the source encoder; the
classifier does not change.  Differences from the paper, in plain ADDA too: source batches draw the ten classes with
equal probability, and what is kept is an average of the weights over the steps (EMA) with the batch statistics of
unlabelled target training images.  Where the discriminator alone teaches the encoder, the encoder learns at a fiftieth
of the discriminator's rate.  The batch norms of the source encoder have their learned statistics, those of the target
encoder the statistics of each batch, so the discriminator may see this difference too.  --pieces names what is added:

    normalise        the input is normalised image by image (Shu et al. 2018, arXiv 1802.08735)
    augment          random shapes, backgrounds and colours, as in problem 3
    patches          those backgrounds are pieces of unlabelled target images (needs augment)
    anchor           source labels go on training the target encoder, at its full learning rate; every loss trains
                     the classifier too
    conditional      the discriminator sees features times class probabilities (Long et al. 2018, CDAN, arXiv
                     1705.10667), those of source images too by the classifier that is being trained
    teacher          confident pseudo-labels that an average of the weights gives to target images train the net on
                     augmented ones (French et al. 2018; Sohn et al. 2020, FixMatch)
    diversity        the pseudo-labels favour digits that the teacher has named too seldom of late, so that none dies
                     out (after Wang et al. 2022, DebiasPL; needs teacher)
    self_training    the last fifth of the steps has no other loss than teacher's (needs teacher)
    no_discriminator for a control: nothing is adversarial (needs anchor or teacher)

    bash hw3_p4.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p4_adda.py --train --data_dir hw3_data     train the three nets that hw3_p4.sh uses; --resume goes on
    python3 p4_adda.py --train --target usps --pieces none --seed 0        train one run of the table
    python3 p4_adda.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed and its last average is kept; the run of seed 0 with all pieces is shipped.  No
target label is used for training.  The test images are measured as in problem 3.  The net, the augmentation and the
number of steps were set as there; the other constants come from earlier versions of this repository, which trained on
other collections of digits.
"""
import argparse
import copy
import os

import torch
import torch.nn.functional as F

from datasets import (DIRECTIONS, SOURCE_OF, add_domains, augment_digits, balanced_rows, check_output, data_checksum,
                      new_parser, parse_shared, random_patches, read_digits, run_command, split_held_out, to_float,
                      write_table, write_text)
from models import (DIGIT_NET, DISCRIMINATOR_HIDDEN, DigitNet, DomainDiscriminator, Run, accuracy, base_of,
                    cosine_rate, digit_features, domain_accuracy, domain_loss, given_flags, label_folder, load_net,
                    measure_held_out, measure_target, on_device, pick_device, predict_probabilities, read_log,
                    read_results, run_path, take_step, update_average, with_statistics)
from report import figures

PROBLEM = 'p4_adda'

# nets
NET = DIGIT_NET

# training
PIECES = ('normalise', 'augment', 'patches', 'anchor', 'conditional', 'teacher', 'diversity', 'self_training')
CONTROL = 'no_discriminator'
DEFAULTS = dict(
    steps=8000,              # of one batch of each domain; the first tenth trains on the source alone
    batch_size=32,           # images of a domain
    seed=0,
    target='mnistm',
    source='usps',           # of another target: the assignment's partner
    pieces=','.join(PIECES))
LEARNING_RATE = 1e-3         # of Adam, at its peak; see ADVERSARIAL
LEARNING_RATE_WARM_UP = 100  # steps
ADVERSARIAL = 0.02           # weight of the discriminator's verdict beside the encoder's other losses; if there
                             # are none, Adam undoes a weight, so the encoder's learning rate is multiplied by it
CONFIDENT = 0.9              # least probability of a pseudo-label for its target image to be used
DIVERSITY = 0.1              # share of a digit, the even one, below which the pseudo-labels favour it; the
                             # frequent ones are not pushed down, for a domain's digits may be uneven
SHARES_DECAY = 0.98          # of the average of the teacher's mean prediction, per step
AVERAGE_DECAY = 0.995        # of the average of the weights, the teacher, per step: the most (see update_average)
STATISTICS = 5000            # training images, as trained on, that give the batch norms their statistics
LOG_EVERY = 250              # steps
SAVE_EVERY = 1000            # steps
# of the method: a run saves them, and --resume refuses changed ones
CONSTANTS = ('NET', 'DISCRIMINATOR_HIDDEN', 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'ADVERSARIAL', 'CONFIDENT',
             'DIVERSITY', 'SHARES_DECAY', 'AVERAGE_DECAY', 'STATISTICS')

# the ablation: rows of (label, pieces), from plain to improved ADDA, and two controls
ABLATION = tuple(('+ ' + PIECES[count - 1].replace('_', '-') if count else 'plain ADDA', ','.join(PIECES[:count]))
                 for count in range(len(PIECES) + 1))
CONTROLS = (('up to anchor, no discriminator', ','.join(PIECES[:PIECES.index('anchor') + 1] + (CONTROL,))),
            ('improved ADDA, no discriminator', ','.join(PIECES + (CONTROL,))))
# highest accuracy of another method than DANN in a public report: as in p3_dann.py
PUBLISHED = (68.0, 59.2, 85.1)


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_input(features, logits, conditional):
    """Features (N, D), or their flattened outer product with the probabilities, (N, 10 D): Long et al. 2018, eq. 7."""
    if not conditional:
        return features
    return (torch.softmax(logits, 1).unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def adversarial_loss(target):
    """Mean loss of logits (N,) of target images with the label of the source: Tzeng et al. 2017, eq. 9, third line."""
    return F.softplus(-target).mean()


def pseudo_label_loss(logits, probabilities):
    """Cross-entropy of logits (N, 10) with the teacher's pseudo-labels, and the share of images that count.

    An image whose largest probability (N, 10) is less than CONFIDENT adds 0 to the mean over all.
    Source: Sohn et al. 2020 (arXiv 2001.07685), eq. 4.
    """
    confidence, labels = probabilities.max(1)
    mask = (confidence >= CONFIDENT).float()
    return (mask * F.cross_entropy(logits, labels, reduction='none')).mean(), mask.mean()


def debiased(probabilities, shares):
    """Divide probabilities (N, 10) by min(shares (10,), DIVERSITY), and normalise each row to sum 1.

    shares > 0 is what the mean of the probabilities has been of late.  Source: after Wang et al. 2022
    (arXiv 2201.01490), who subtract a part of the logarithm of every share from the logits; here a class
    below DIVERSITY is corrected in full, and the other classes are left alone.
    """
    adjusted = probabilities / shares.clamp(max=DIVERSITY)
    return adjusted / adjusted.sum(1, keepdim=True)


def teacher_probabilities(teacher, images, shares):
    """Return the probabilities (N, 10) that the teacher gives to float images, with the statistics of their batch.

    If shares (10,) are given, they move towards the mean of these, and what is returned is debiased.  The teacher's
    running statistics move too; with_statistics replaces them.
    """
    teacher.encoder.train()
    probabilities = torch.softmax(teacher(images).float(), 1)
    teacher.encoder.eval()
    if shares is None:
        return probabilities
    shares.copy_(SHARES_DECAY * shares + (1 - SHARES_DECAY) * probabilities.mean(0))
    return debiased(probabilities, shares)


def learning_rate_at(step, source_end, steps):
    """Learning rate at a step: one schedule for the source's part, which ends at source_end, and one for the rest."""
    part = (step, source_end) if step <= source_end else (step - source_end, steps - source_end)
    return cosine_rate(*part, peak=LEARNING_RATE, warm_up=LEARNING_RATE_WARM_UP)


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train the run of --target or, without it, the three runs that hw3_p4.sh uses."""
    for target in [args.target] if args.target else sorted(SOURCE_OF):
        defaults = dict(DEFAULTS, target=target, source=SOURCE_OF[target])
        settings = dict(defaults, **given_flags(args, defaults))
        path = args.ckpt or run_path(PROBLEM, DEFAULTS, settings, name_of(settings))
        train_run(Run(args, PROBLEM, defaults, {name: globals()[name] for name in CONSTANTS}, path), args.data_dir)


def name_of(settings):
    """Say what a run trains, as the name of its file: plain, up_to_anchor, improved_no_discriminator, ..."""
    pieces = tuple(piece for piece in settings['pieces'].split(',') if piece)
    control = '_' + CONTROL if CONTROL in pieces else ''
    pieces = tuple(piece for piece in pieces if piece != CONTROL)
    if pieces != PIECES[:len(pieces)]:
        return '+'.join(pieces) + control
    return {0: 'plain', len(PIECES): 'improved'}.get(len(pieces), 'up_to_' + ''.join(pieces[-1:])) + control


def train_run(run, data_dir):
    """Train on data_dir/digits and write the run's checkpoint, log and state."""
    # device and seed
    settings, device, rng = run.settings, run.device, run.rng
    pieces = settings['pieces'].split(',')
    source_end, adversarial_end = run.last_step // 10, run.last_step - run.last_step // 5
    # data
    source, target = [read_digits(data_dir, settings[domain], 'train') for domain in ('source', 'target')]
    test = read_digits(data_dir, settings['target'], 'test')
    (source_train, source_val), (target_train, target_val) = [
        split_held_out(len(domain.names)) for domain in (source, target)]
    unlabelled = target.images             # without its labels
    statistics_images = statistics_of(unlabelled, target_train, unlabelled, target_train, pieces, settings['seed'])
    # nets
    config = dict(NET, normalise='normalise' in pieces)
    net = run.keep('net', DigitNet(**config))
    discriminator = run.keep('discriminator', DomainDiscriminator(
        net.features * (10 if 'conditional' in pieces else 1), DISCRIMINATOR_HIDDEN))
    average = run.keep('average', copy.deepcopy(net)).eval()
    source_net = run.keep('source_net', copy.deepcopy(net)).eval()
    shares = run.keep('shares', torch.full((10,), 0.1))    # of the digits that the teacher has named of late
    run.facts(net, training_images=len(source_train), held_out=len(source_val), unlabelled=len(target_train),
              data=data_checksum(source.images, source.labels, target.images, test.images))
    # optimizers
    source_optimizer, discriminator_optimizer, target_optimizer = [
        run.keep(name, torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99)))
        for name, module in (('source_optimizer', net), ('discriminator_optimizer', discriminator),
                             ('target_optimizer', net if 'anchor' in pieces else net.encoder))]
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch: labelled images with every class equally likely; unlabelled images at random
        rows = source_train[balanced_rows(source.labels[source_train], run.batch_size, rng)]
        labels = source.labels[rows].to(device)
        x = augmented_view(to_float(source.images[rows]), unlabelled, target_train, pieces, rng, device)
        rows = target_train[torch.randint(len(target_train), (run.batch_size,), generator=rng)]
        target_x = on_device(to_float(unlabelled[rows]), device)
        # the first steps train on the source; then the target encoder starts as a copy of the source encoder
        adapts, all_losses = step > source_end, step <= adversarial_end or 'self_training' not in pieces
        if step == source_end + 1:
            source_net.load_state_dict(average.state_dict())
            net.load_state_dict(average.state_dict())
        learning_rate = learning_rate_at(step, source_end, run.last_step)
        loss, scalars = 0, {}
        if adapts:
            with run.autocast():
                features = net.encoder(augmented_view(target_x, unlabelled, target_train, pieces, rng, device))
                logits = net.classifier(features)
        if adapts and all_losses and CONTROL not in pieces:
            # update: discriminator, on features of the source encoder and of the target encoder
            with torch.no_grad(), run.autocast():
                source_features = source_net.encoder(x)
            # without dropout, by which the discriminator could tell the two apart
            source_input, target_input = [
                discriminator_input(part.float(), net.classifier[-1](part.float()), 'conditional' in pieces)
                for part in (source_features, features)]
            with run.autocast():
                source_domain, target_domain = [discriminator(part.detach()) for part in (source_input, target_input)]
            domain = domain_loss(source_domain.float(), target_domain.float())
            take_step(discriminator_optimizer, domain, learning_rate)
            with run.autocast():
                adversarial = adversarial_loss(discriminator(target_input).float())
            loss = loss + ADVERSARIAL * adversarial
            scalars.update(domain_loss=domain.detach(), domain_accuracy=domain_accuracy(source_domain, target_domain),
                           fooling_loss=adversarial.detach())
        if not adapts or all_losses and 'anchor' in pieces:
            with run.autocast():
                label_loss = F.cross_entropy(net(x).float(), labels)
            loss = loss + label_loss
            scalars['label_loss'] = label_loss.detach()
        if adapts and 'teacher' in pieces:
            with torch.no_grad(), run.autocast():
                probabilities = teacher_probabilities(average, target_x, shares if 'diversity' in pieces else None)
            pseudo_label, confident_share = pseudo_label_loss(logits.float(), probabilities)
            loss = loss + pseudo_label
            scalars.update(confident_loss=pseudo_label.detach(), confident_share=confident_share)
        # update: both nets on the source; then the target encoder, with anchor the classifier too
        if adapts and 'anchor' not in pieces and 'teacher' not in pieces:
            learning_rate *= ADVERSARIAL
        take_step(target_optimizer if adapts else source_optimizer, loss, learning_rate)
        update_average(average, net, step, AVERAGE_DECAY)
        # log and save
        run.log(**scalars, learning_rate=learning_rate)
        if run.saves:
            run.measured(**measure_held_out(with_statistics(average, statistics_images, device),
                                            source.images[source_val], source.labels[source_val],
                                            unlabelled[target_val], device))
    # final check from file; source_net is what adaptation began with
    before, net = [with_statistics(run.from_file(DigitNet(**config), name), statistics_images, device)
                   for name in ('source_net', 'average')]
    run.finish(net, config, dict(measure_target(net, test, target, target_val, device),
                                 unadapted_accuracy=accuracy(before, test.images, test.labels, device)))


def augmented_view(images, unlabelled, rows, pieces, rng, device):
    """Return float images as the nets train on them; patches of unlabelled[rows] (uint8) may become backgrounds."""
    if 'augment' in pieces:
        patches = None
        if 'patches' in pieces:
            chosen = rows[torch.randint(len(rows), (len(images),), generator=rng)]
            patches = random_patches(to_float(unlabelled[chosen]), rng)
        images = augment_digits(images.cpu(), 1.0, rng, patches)
    return on_device(images, device)


def statistics_of(images, rows, unlabelled, target_rows, pieces, seed):
    """Return images for the batch norms: the first STATISTICS of images[rows], float (n, 3, 28, 28), as in training."""
    return augmented_view(to_float(images[rows[:STATISTICS]]), unlabelled, target_rows, pieces,
                          torch.Generator().manual_seed(seed), torch.device('cpu'))


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
    for name, directions in (('table4.csv', 'asked'), ('table4_others.csv', 'others')):
        write_table(os.path.join(args.out, name), figures.table_lines(table_rows(directions), DIRECTIONS[directions]))
    logs, predictions, plain_predictions, shares = {}, {}, {}, [('net', 'target', 'same digit (%)')]
    for target, source in sorted(SOURCE_OF.items()):
        title = figures.scenario_name(target)
        test = [read_digits(args.data_dir, domain, 'test') for domain in (source, target)]
        plain, net = [load_net(DigitNet, ckpt, PROBLEM, device)[0]
                      for ckpt in (shipped(target, pieces=''), shipped(target))]
        share = plot_tsne(os.path.join(args.out, f'fig4_2_{target}.png'), f'improved ADDA, {title}', net, args.data_dir,
                          (source, target), test, device)
        shares.append(('improved ADDA', target, figures.rounded(100 * share, 1)))
        logs[title] = read_log(base_of(shipped(target)) + '.jsonl')
        predictions[title] = test[1], predict_probabilities(net, test[1].images, device)
        plain_predictions[title] = test[1], predict_probabilities(plain, test[1].images, device)
    write_table(os.path.join(args.out, 'fig4_2.csv'), shares)
    write_text(os.path.join(args.out, 'fig4_3.txt'),
               f'{net}\n{DomainDiscriminator(10 * net.features, DISCRIMINATOR_HIDDEN)}\n')
    steps = logs[title][-1]['step']        # adaptation and self-training begin after a tenth and four fifths
    figures.plot_digit_curves(
        os.path.join(args.out, 'fig4_4.png'), logs, lines=(steps // 10, steps - steps // 5),
        scalars=dict(label_loss='Label loss, source (nats)', domain_accuracy='Accuracy of discriminator',
                     confident_share=f'Share of labels {CONFIDENT:g} sure'))
    figures.plot_confusion(os.path.join(args.out, 'fig4_6.png'), predictions)
    figures.plot_confusion(os.path.join(args.out, 'fig4_6_plain.png'), plain_predictions)
    figures.plot_mistakes(os.path.join(args.out, 'fig4_7.jpg'), predictions)
    names = ('source only', 'DANN + entropy', 'improved ADDA', 'with labels')
    figures.plot_bars(os.path.join(args.out, 'fig4_8.png'),
                      [(name,) + row[1:] for name, row in zip(names, table_rows('asked'))])
    print(f'twelve figures and tables are in {args.out}')


def plot_tsne(path, title, net, data_dir, scenario, test, device):
    """fig4_2: t-SNE of the features of test images, the DigitImages of source and target in the list test.

    Returns the share of target images' neighbours that show the same digit.
    """
    images, labels, domains = figures.pick_test_images(test)
    # as in training, each domain has batch statistics of its own
    digits, unlabelled = [read_digits(data_dir, domain, 'train') for domain in scenario]
    rows, target_rows = [split_held_out(len(domain.names))[0] for domain in (digits, unlabelled)]
    source_net = with_statistics(net, statistics_of(digits.images, rows, unlabelled.images, target_rows, PIECES, 0),
                                 device)
    source_images, target_images = images.chunk(2)
    features = torch.cat([digit_features(source_net, source_images, device),
                          digit_features(net, target_images, device)])
    figures.plot_features(path, title, features, labels, domains)
    return figures.same_digit_share(features, labels, domains)


def table_rows(directions):
    """table4 ('asked') and table4_others ('others'): rows of (label, results of the runs, key of the accuracy)."""
    results, bounds = read_results(PROBLEM, 'improved'), read_results('p3_dann', 'dann_entropy')
    lower, dann, upper = [bounds.get(row, []) for row in ('source', 'dann_entropy', 'target')]
    plain, improved, control = [results.get(row, []) for row in ('plain', 'improved', 'improved_' + CONTROL)]
    # an upper bound uses no source, so it is that of every direction
    upper = [dict(run, source=DIRECTIONS[directions][run['target']]) for run in upper]
    rows = [('lower bound: source only', lower, 'accuracy'), ('DANN + entropy', dann, 'accuracy'),
            ('improved ADDA', improved, 'accuracy'), ('upper bound: target only', upper, 'accuracy')]
    if directions == 'others':
        return rows
    return rows + [('improved ADDA, shipped: seed 0', [run for run in improved if run['seed'] == 0], 'accuracy'),
                   ('improved ADDA, before adaptation', improved, 'unadapted_accuracy'),
                   ('improved ADDA, no discriminator', control, 'accuracy'), ('plain ADDA', plain, 'accuracy'),
                   ('plain ADDA, before adaptation', plain, 'unadapted_accuracy'),
                   ('improved ADDA, on 500 held-out target images', improved, 'held_out_accuracy')]


# ----------------------------------------------------------------------------------- command line

def read_pieces(text):
    """Return the pieces that text names, with commas between, in the order of PIECES: a type for argparse."""
    pieces = {'all': PIECES, 'none': ()}.get(text, text.split(','))
    if not set(pieces) <= set(PIECES + (CONTROL,)):
        raise argparse.ArgumentTypeError('choose all, none or some of ' + ','.join(PIECES + (CONTROL,)))
    for piece, base in (('patches', 'augment'), ('diversity', 'teacher'), ('self_training', 'teacher')):
        if piece in pieces and base not in pieces:
            raise argparse.ArgumentTypeError(f'{piece} does nothing without {base}: add it')
    if CONTROL in pieces and not {'anchor', 'teacher'} & set(pieces):
        raise argparse.ArgumentTypeError(f'{CONTROL} leaves no loss: add anchor or teacher')
    return ','.join(piece for piece in PIECES + (CONTROL,) if piece in pieces)


def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'label a folder', 'CSV file to write')
    add_domains(parser)
    parser.add_argument('--pieces', type=read_pieces, help='--train: what is added to plain ADDA, with commas between: '
                        'all, none or some of ' + ', '.join(PIECES + (CONTROL,)))
    return parse_shared(parser, PROBLEM, ['images', 'target', 'out'], argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
