"""Problem 4: ADDA, improved piece by piece, that reads digits in a domain without labels.

Tzeng et al. 2017 (arXiv 1702.05464): train an encoder and a classifier on the source, copy the encoder,
and train the copy on target images to fool a discriminator, which tells its features from those of
the source encoder; the classifier does not change.  Differences from the paper, in plain ADDA too: source
batches draw the ten classes with equal probability, and what is kept is an average of the weights over the
steps (EMA) with the batch statistics of unlabelled target training images.  Where the discriminator
alone teaches the encoder, it learns at a fiftieth of the discriminator's rate.  The batch norms of the source
encoder have their learned statistics, those of the target encoder the statistics of each batch, so the
discriminator may see this difference too.  --pieces names what is added:

    normalise        the input is normalised image by image (Shu et al. 2018, arXiv 1802.08735)
    augment          random shapes, backgrounds and colours, as in problem 3
    patches          those backgrounds are pieces of unlabelled target images (needs augment)
    anchor           source labels go on training the target encoder, at its full learning rate; every
                     loss trains the classifier too
    conditional      the discriminator sees features times class probabilities (Long et al. 2018, CDAN), those of
                     source images too by the classifier that is being trained
    teacher          confident labels that an average of the weights gives to target images train the
                     net on augmented ones (French et al. 2018; Sohn et al. 2020, FixMatch)
    diversity        those labels favour digits that the teacher has named too seldom of late, so that
                     none dies out (after Wang et al. 2022, DebiasPL; needs teacher)
    self_training    the last fifth of the steps has no other loss than teacher's (needs teacher)
    no_discriminator for a control: nothing is adversarial (needs anchor or teacher)

    bash hw3_p4.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p4_adda.py --train --target usps --pieces all --seed 0         train one cell of the table
    python3 p4_adda.py --train --resume                train the runs of the table that have no log yet
    python3 p4_adda.py --train --resume --directions others                likewise those of the other directions
    python3 p4_adda.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed and its last average is kept; the run of seed 0 with all pieces is shipped.
No target label is used for training.  The test images are measured when those of problem 3 are.  The net, the
augmentation and the number of steps were set as in problem 3; the other constants come from earlier versions of
this repository, which trained on other collections of digits.
"""
import copy
import itertools
import os

import torch
import torch.nn.functional as F

from datasets import (COLOURS, DIRECTIONS, SEEDS, SOURCE_OF, add_domains, augment_digits, balanced_rows, check_out,
                      content_sum, log_axis, new_figure, new_parser, of_seed_0, parse_shared,
                      pick_test_images, plot_confusion, plot_features, plot_mistakes, plot_table, random_patches,
                      read_digits, read_scenario, run_command, save_figure, scenario_name, split_held_out,
                      to_float, with_other_accuracy, write_predictions, write_text)
from models import (DIGIT_NET, DISCRIMINATOR_HIDDEN, DigitNet, DomainDiscriminator, accuracy, base_of, cosine_rate,
                    digit_runs, domain_accuracy, domain_loss, label_folder, load_net, measure_digits, measure_target,
                    on_device, pick_device, probabilities_of, read_log, rows_of, run_batches, run_path, take_step,
                    update_average, with_statistics)

PROBLEM = 'p4_adda'

# nets
NET = DIGIT_NET

# training
PIECES = ('normalise', 'augment', 'patches', 'anchor', 'conditional', 'teacher', 'diversity',
          'self_training')
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
CONFIDENT = 0.9              # least probability of the teacher's label for a target image to be used
DIVERSITY = 0.1              # share of a digit, the even one, below which the teacher's labels favour it; the
                             # frequent ones are not pushed down, for a domain's digits may be uneven
SHARES_DECAY = 0.98          # of the average of the teacher's mean prediction, per step
AVERAGE_DECAY = 0.995        # of the average of the weights, the teacher, per step: the most (see update_average)
STATISTICS = 5000            # training images, as trained on, that give the batch norms their statistics
LOG_EVERY = 250              # steps
SAVE_EVERY = 1000            # steps

# the tables: rows of (label, pieces, seeds), for three scenarios each; three seeds of plain and improved ADDA, one
# of what lies between them; and as controls two of these without the discriminator.  Improved ADDA is trained in
# the other directions too
ROWS = tuple(('+ ' + PIECES[count - 1].replace('_', '-') if count else 'plain ADDA', ','.join(PIECES[:count]),
              SEEDS if count in (0, len(PIECES)) else SEEDS[:1]) for count in range(len(PIECES) + 1))
CONTROLS = (('up to anchor, no discriminator', ','.join(PIECES[:PIECES.index('anchor') + 1] + (CONTROL,)), SEEDS[:1]),
            ('improved ADDA, no discriminator', ','.join(PIECES + (CONTROL,)), SEEDS))

# highest accuracy of another method than DANN in a public report: as in p3_dann.py
PUBLISHED = (68.0, 59.2, 86.1)


def constants():
    """Return the constants of the method.  A run saves them, so that --resume refuses changed ones."""
    return dict(NET=NET, DISCRIMINATOR_HIDDEN=DISCRIMINATOR_HIDDEN, LEARNING_RATE=LEARNING_RATE,
                LEARNING_RATE_WARM_UP=LEARNING_RATE_WARM_UP, ADVERSARIAL=ADVERSARIAL, CONFIDENT=CONFIDENT,
                DIVERSITY=DIVERSITY, SHARES_DECAY=SHARES_DECAY, AVERAGE_DECAY=AVERAGE_DECAY, STATISTICS=STATISTICS)


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_input(features, logits, conditional):
    """Features (N, D), or flattened their products with the ten probabilities: (N, 10 D).

    Source: Long et al. 2018 (arXiv 1705.10667), eq. 7 with the outer product.
    """
    if not conditional:
        return features
    return (torch.softmax(logits, 1).unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def fooling_loss(target):
    """Mean loss of the discriminator's logits (N,) for target images, with the label of the source domain.

    Source: Tzeng et al. 2017, eq. 9, the third line.
    """
    return F.softplus(-target).mean()


def confident_loss(logits, probabilities):
    """Cross-entropy of logits (N, 10) with the teacher's labels, and the share of images that count.

    An image whose largest probability (N, 10) is less than CONFIDENT adds 0 to the mean over all.
    Source: Sohn et al. 2020 (arXiv 2001.07685), eq. 4.
    """
    confidence, labels = probabilities.max(1)
    mask = (confidence >= CONFIDENT).float()
    return (mask * F.cross_entropy(logits, labels, reduction='none')).mean(), mask.mean()


def diversified(probabilities, shares):
    """Divide probabilities (N, 10) by min(shares (10,), DIVERSITY), and normalise each row to sum 1.

    shares > 0 is what the mean of the probabilities has been of late.  Source: after Wang et al. 2022
    (arXiv 2201.01490), who subtract a part of the logarithm of every share from the logits; here a class
    below DIVERSITY is corrected in full, and the other classes are left alone.
    """
    adjusted = probabilities / shares.clamp(max=DIVERSITY)
    return adjusted / adjusted.sum(1, keepdim=True)


def taught(teacher, images, shares):
    """Return the probabilities (N, 10) that the teacher gives to float images, with the statistics of their batch.

    If shares (10,) are given, they move towards the mean of these, and what is returned is diversified.
    """
    teacher.encoder.train()
    probabilities = torch.softmax(teacher(images).float(), 1)
    teacher.encoder.eval()
    if shares is None:
        return probabilities
    shares.copy_(SHARES_DECAY * shares + (1 - SHARES_DECAY) * probabilities.mean(0))
    return diversified(probabilities, shares)


def learning_rate_at(step, first, steps):
    """Learning rate at a step: one schedule for the source's part, which ends at first, and one for the rest."""
    part = (step, first) if step <= first else (step - first, steps - first)
    return cosine_rate(*part, peak=LEARNING_RATE, warm_up=LEARNING_RATE_WARM_UP)


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train one run or, without --target, every run of the table that the other flags leave."""
    cells = [dict(pieces=pieces, target=target, source=source, seed=seed) for _, pieces, seeds in ROWS + CONTROLS
             for table in (DIRECTIONS if pieces == DEFAULTS['pieces'] else ('asked',))
             for (target, source), seed in itertools.product(sorted(DIRECTIONS[table].items()), seeds)]
    for run in digit_runs(args, PROBLEM, DEFAULTS, constants(), cells, name_of):
        train_run(run, args.data_dir)


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
    # ends of the source's part and of the adversarial one
    first, last = run.last_step // 10, run.last_step - run.last_step // 5
    # data
    source, target, test = read_scenario(data_dir, settings)
    (training, held_out), (adapting, watched) = [split_held_out(len(one.names)) for one in (source, target)]
    unlabelled = target.images             # without its labels
    seen = view(to_float(unlabelled[adapting[:STATISTICS]]), unlabelled, adapting, pieces,
                torch.Generator().manual_seed(settings['seed']), torch.device('cpu'))
    # nets
    config = dict(NET, normalise='normalise' in pieces)
    net = run.keep(net=DigitNet(**config))
    discriminator = run.keep(discriminator=DomainDiscriminator(
        net.features * (10 if 'conditional' in pieces else 1), DISCRIMINATOR_HIDDEN))
    average = run.keep(average=copy.deepcopy(net)).eval()
    source_net = run.keep(source_net=copy.deepcopy(net)).eval()
    shares = run.keep(shares=torch.full((10,), 0.1))       # of the digits that the teacher has named of late
    run.facts(net, training_images=len(training), held_out=len(held_out), unlabelled=len(adapting),
              data=content_sum(source.images, source.labels, target.images, test.images))
    # optimizers
    source_optimizer, discriminator_optimizer, target_optimizer = [
        run.keep(**{name: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))})
        for name, module in (('source_optimizer', net), ('discriminator_optimizer', discriminator),
                             ('target_optimizer', net if 'anchor' in pieces else net.encoder))]
    # loop
    for step in run.steps(LOG_EVERY, SAVE_EVERY):
        # batch: labelled images with every class equally likely; unlabelled images at random
        rows = training[balanced_rows(source.labels[training], run.batch_size, rng)]
        labels = source.labels[rows].to(device)
        x = view(to_float(source.images[rows]), unlabelled, adapting, pieces, rng, device)
        rows = adapting[torch.randint(len(adapting), (run.batch_size,), generator=rng)]
        target_x = on_device(to_float(unlabelled[rows]), device)
        # the first steps train on the source; then the target encoder starts as a copy of the source encoder
        adapts, all_losses = step > first, step <= last or 'self_training' not in pieces
        if step == first + 1:
            source_net.load_state_dict(average.state_dict())
            net.load_state_dict(average.state_dict())
        learning_rate = learning_rate_at(step, first, run.last_step)
        loss, scalars = 0, {}
        if adapts:
            with run.autocast():
                features = net.encoder(view(target_x, unlabelled, adapting, pieces, rng, device))
                logits = net.classifier(features)
        if adapts and all_losses and CONTROL not in pieces:
            # update: discriminator, on features of the source encoder and of the target encoder
            with torch.no_grad(), run.autocast():
                source_features = source_net.encoder(x)
            # without dropout, by which the discriminator could tell the two apart
            inputs = [discriminator_input(one.float(), net.classifier[-1](one.float()), 'conditional' in pieces)
                      for one in (source_features, features)]
            with run.autocast():
                of_source, of_target = [discriminator(one.detach()) for one in inputs]
            domain = domain_loss(of_source.float(), of_target.float())
            take_step(discriminator_optimizer, domain, learning_rate)
            with run.autocast():
                fooled = fooling_loss(discriminator(inputs[1]).float())
            loss = loss + ADVERSARIAL * fooled
            scalars.update(domain_loss=domain.detach(), domain_accuracy=domain_accuracy(of_source, of_target),
                           fooling_loss=fooled.detach())
        if not adapts or all_losses and 'anchor' in pieces:
            with run.autocast():
                label_loss = F.cross_entropy(net(x).float(), labels)
            loss = loss + label_loss
            scalars['label_loss'] = label_loss.detach()
        if adapts and 'teacher' in pieces:
            with torch.no_grad(), run.autocast():
                probabilities = taught(average, target_x, shares if 'diversity' in pieces else None)
            confident, share = confident_loss(logits.float(), probabilities)
            loss = loss + confident
            scalars.update(confident_loss=confident.detach(), confident_share=share)
        # update: both nets on the source; then the target encoder, with anchor the classifier too
        if adapts and 'anchor' not in pieces and 'teacher' not in pieces:
            learning_rate *= ADVERSARIAL
        take_step(target_optimizer if adapts else source_optimizer, loss, learning_rate)
        update_average(average, net, step, AVERAGE_DECAY)
        # log and save
        run.log(**scalars, learning_rate=learning_rate)
        if run.saves:
            run.measured(**measure_digits(with_statistics(average, seen, device), source.images[held_out],
                                          source.labels[held_out], unlabelled[watched], device))
    # final check from file; source_net is what adaptation began with
    before, net = [with_statistics(run.from_file(DigitNet(**config), name), seen, device)
                   for name in ('source_net', 'average')]
    run.finish(net, config, dict(measure_target(net, test, target, watched, device),
                                 unadapted_accuracy=accuracy(before, test.images, test.labels, device)))


def view(images, unlabelled, rows, pieces, rng, device):
    """Return float images as the nets train on them: changed at random, if the pieces say so.

    unlabelled[rows] are the uint8 images of the target whose pieces may become backgrounds.
    """
    if 'augment' in pieces:
        patches = None
        if 'patches' in pieces:
            chosen = rows[torch.randint(len(rows), (len(images),), generator=rng)]
            patches = random_patches(to_float(unlabelled[chosen]), rng)
        images = augment_digits(images.cpu(), 1.0, rng, patches)
    return on_device(images, device)


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
    plot_table(os.path.join(args.out, 'table4'), 'Problem 4: improved ADDA', table_rows('asked'), asked=4)
    plot_table(os.path.join(args.out, 'table4_others'), 'The other directions', table_rows('others'),
               directions=DIRECTIONS['others'])
    curves, of_improved, of_plain = {}, {}, {}
    for target, source in sorted(SOURCE_OF.items()):
        title = scenario_name(target)
        digits = [read_digits(args.data_dir, domain, 'test') for domain in (source, target)]
        images, labels, domains = pick_test_images(digits)
        for predicted, ckpt in ((of_plain, shipped(target, pieces='')), (of_improved, shipped(target))):
            net = load_net(DigitNet, ckpt, PROBLEM, device)[0]
            predicted[title] = digits[1], probabilities_of(net, digits[1].images, device)
        # as in training, each domain has batch statistics of its own
        of_source = with_statistics(net, source_seen(args.data_dir, source, target), device)
        features = torch.cat([run_batches(lambda batch, one=one: one.encoder(to_float(batch)), device, part)
                              for one, part in zip((of_source, net), images.chunk(2))])
        plot_features(os.path.join(args.out, f'fig4_2_{target}.png'), f'improved ADDA, {title}', features, labels,
                      domains)
        curves[title] = read_log(base_of(ckpt) + '.jsonl')
    write_text(os.path.join(args.out, 'fig4_3.txt'),
               f'{net}\n{DomainDiscriminator(10 * net.features, DISCRIMINATOR_HIDDEN)}\n')
    plot_learning_curves(os.path.join(args.out, 'fig4_4.png'), curves)
    plot_confusion(os.path.join(args.out, 'fig4_6.png'), of_improved)
    plot_confusion(os.path.join(args.out, 'fig4_6_plain.png'), of_plain)
    plot_mistakes(os.path.join(args.out, 'fig4_7.jpg'), of_improved)
    print(f'twelve figures and tables are in {args.out}')


def table_rows(directions):
    """table4 ('asked') and table4_others ('others'): rows of (label, records of the results logs)."""
    found, bounds = rows_of(PROBLEM), rows_of('p3_dann')
    lower, dann, upper = [bounds.get(name, []) for name in ('source', 'dann_entropy', 'target')]
    plain, improved, control = [found.get(name, []) for name in ('plain', 'improved', 'improved_' + CONTROL)]
    # an upper bound uses no source, so it is that of every direction
    upper = [dict(record, source=DIRECTIONS[directions][record['target']]) for record in upper]
    rows = [('lower bound: source only', lower), ('DANN + entropy', dann), ('improved ADDA', improved),
            ('upper bound: target only', upper)]
    if directions == 'others':
        return rows
    return rows + [
        ('improved ADDA, shipped: seed 0', of_seed_0(improved)),
        ('improved ADDA, before adaptation', with_other_accuracy(improved, 'unadapted_accuracy')),
        ('improved ADDA, no discriminator', control), ('plain ADDA', plain),
        ('plain ADDA, before adaptation', with_other_accuracy(plain, 'unadapted_accuracy')),
        ('improved ADDA, on 500 held-out target images', with_other_accuracy(improved, 'held_out_accuracy'))]


def source_seen(data_dir, source, target):
    """Return source images as a run of seed 0 sees them, which give the batch norms their statistics."""
    digits, unlabelled = [read_digits(data_dir, domain, 'train') for domain in (source, target)]
    rows, adapting = [split_held_out(len(one.names))[0] for one in (digits, unlabelled)]
    return view(to_float(digits.images[rows[:STATISTICS]]), unlabelled.images, adapting, PIECES,
                torch.Generator().manual_seed(0), torch.device('cpu'))


def plot_learning_curves(path, curves):
    """fig4_4: label loss, the discriminator's accuracy and the share of target images whose labels count."""
    figure, axes = new_figure(2.4, columns=3)
    for one, name in zip(axes, ('label_loss', 'domain_accuracy', 'confident_share')):
        for colour, (title, log) in zip(COLOURS, curves.items()):
            points = [(record['step'], record[name]) for record in log if name in record]
            one.plot(*zip(*points), color=colour, label=title)
            steps = log[-1]['step']
        for step in (steps // 10, steps - steps // 5):     # adaptation and self-training begin
            one.axvline(step, color=COLOURS[6], linewidth=0.8, linestyle='--')
        one.grid(True)
        one.set(xlabel='training step', xlim=(0, steps))
    axes[0].set_yscale('log')
    log_axis(axes[0].yaxis)
    axes[0].set_title('Label loss, source (nats)')
    axes[1].set_title('Accuracy of the discriminator')
    axes[1].axhline(0.5, color=COLOURS[6], linewidth=0.8, linestyle=':')       # chance
    axes[2].set_title(f'Labels at least {CONFIDENT:g} sure (share)')
    axes[2].legend(loc='lower right')
    save_figure(path, figure)


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = new_parser(PROBLEM, __doc__, DEFAULTS, 'label a folder', 'CSV file to write')
    add_domains(parser)
    parser.add_argument('--pieces', help='--train: what is added to plain ADDA, with commas between: all, '
                        'none or some of ' + ', '.join(PIECES + (CONTROL,)))
    args = parse_shared(parser, PROBLEM, ['images', 'target', 'out'], argv)
    if args.pieces is not None:
        chosen = {'all': PIECES, 'none': ()}.get(args.pieces, args.pieces.split(','))
        if not set(chosen) <= set(PIECES + (CONTROL,)):
            parser.error('--pieces must be all, none or some of ' + ','.join(PIECES + (CONTROL,)))
        for piece, base in (('patches', 'augment'), ('diversity', 'teacher'), ('self_training', 'teacher')):
            if piece in chosen and base not in chosen:
                parser.error(f'--pieces {piece} does nothing without {base}: add it')
        if CONTROL in chosen and not {'anchor', 'teacher'} & set(chosen):
            parser.error(f'--pieces {CONTROL} leaves no loss: add anchor or teacher')
        args.pieces = ','.join(piece for piece in PIECES + (CONTROL,) if piece in chosen)
    return args


def main(argv=None):
    args = parse_args(argv)
    run_command(train if args.train else plot if args.plot else infer, args)


if __name__ == '__main__':
    main()
