"""Write everything that says a result, from the logs, the figures and the settings in the scripts.

    pip install typst==0.15.2
    python3 p1_vae.py --plot (likewise the scripts of problems 2 to 6), if a training is newer than figures/
    python3 report/build.py        writes the tables of README.md, report/results.md and hw3_studentID.pdf

No number of a result is typed by hand: values() takes them from the logs in checkpoints/, from the tables
(figures/*.csv) that --plot makes of them or measures, and from the settings in the scripts, and report.typ
names them.
"""
import argparse
import csv
import difflib
import glob
import itertools
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import p1_vae                                                                       # noqa: E402
import p2_gan                                                                       # noqa: E402
import p3_dann                                                                      # noqa: E402
import p4_adda                                                                      # noqa: E402
import p5_diffusion                                                                 # noqa: E402
import p6_acgan                                                                     # noqa: E402
from datasets import DIRECTIONS, HELD_OUT, SOURCE_OF, UserError, run_command, write_text, write_whole        # noqa: E402
from models import CHECKPOINTS, base_of, check_scores, read_log, read_results, sha256                        # noqa: E402
from report.figures import PER_DOMAIN, SEEDS, accuracies, rounded, scenario_name, table_cell                 # noqa: E402

PDF = os.path.join(ROOT, 'hw3_studentID.pdf')
README = os.path.join(ROOT, 'README.md')
RESULTS = os.path.join(ROOT, 'report', 'results.md')
COMMAND = 'python3 report/build.py'
PUBLISHED_ACGAN = 0.892      # accuracy of the best public report, with an ACGAN and another judge
# images of the data kit for training and test, as its README has them
SIZES = dict(usps=(7291, 2007), mnistm=(60000, 10000), svhn=(19253, 5001), face=(40000, 2456))


def training(log):
    """What the first record and the last measured speed of a training's log say, as texts."""
    run = next(record for record in log if record['kind'] == 'run')
    last = [record for record in log if record['kind'] == 'train'][-1]
    images = last['step'] * run['settings']['batch_size']
    return dict(images=rounded(images, 0), minutes=rounded(images / last['images_per_second'] / 60, 0),
                steps=rounded(last['step'], 0),
                epochs=rounded(images / run['training_images'], 0),
                batch=rounded(run['settings']['batch_size'], 0), parameters=rounded(run['parameters'] / 1e6, 2),
                precision={'bf16': 'bfloat16', 'fp32': 'float32'}[run['precision']],
                machine=(f'a GPU ({run["gpu"]})' if 'gpu' in run else
                         {1: 'one core', 2: 'two cores'}.get(run['threads'], f'{run["threads"]} cores')),
                **{name: rounded(run[name], 0) for name in ('training_images', 'held_out')})


def numbers(module, *names):
    """The constants of a script as texts, without trailing zeros."""
    return {name: f'{getattr(module, name):,g}' for name in names}


def power_of_ten(value):
    """A small number as people write it: 7.5 · 10⁻⁵."""
    digits, exponent = f'{value:.1e}'.split('e')
    return f'{digits} · 10' + ''.join(dict(zip('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))[one] for one in str(int(exponent)))


def results_of(problem):
    """The results of problem 3 or 4 by the row of its table."""
    return read_results(problem, dict(p3_dann='dann_entropy', p4_adda='improved')[problem])


def values_of(results, target, source, key='accuracy'):
    """Accuracies in percent of the runs of a scenario, in the order of their seeds."""
    return [value for _, value in sorted(accuracies(results, target, source, key).items())]


def means():
    """Mean accuracies as texts, named like svhn_dann, or in the other directions like usps_from_mnistm_dann."""
    rows = dict(results_of('p4_adda'), **results_of('p3_dann'))
    found = {}
    for directions in DIRECTIONS.values():
        for target, source in directions.items():
            begin = target if directions is SOURCE_OF else f'{target}_from_{source}'
            for (name, records), (key, end) in itertools.product(rows.items(), (
                    ('accuracy', ''), ('adabn_accuracy', '_adabn'), ('unadapted_accuracy', '_before'))):
                values = values_of([record for record in records if key in record], target, source, key)
                if values:
                    found[f'{begin}_{name}{end}'] = rounded(np.mean(values), 1)
    return found


def points_left():
    """Points between the means of DANN + entropy and of the upper bound, as texts."""
    rows, found = results_of('p3_dann'), {}
    for target, source in SOURCE_OF.items():
        upper, ours = [np.mean(values_of(rows[name], target, source)) for name in ('target', 'dann_entropy')]
        found[target] = rounded(upper - ours, 1)
    return found


def told_apart():
    """Percent of the images whose domain the discriminator names, at the end of its training, seed 0."""
    found = {}
    for name, module, flags in (('dann', p3_dann, dict(setting='dann')), ('dann_entropy', p3_dann, {}),
                                ('improved', p4_adda, {}), ('plain', p4_adda, dict(pieces=''))):
        for target in SOURCE_OF:
            log = read_log(base_of(module.shipped(target, **flags)) + '.jsonl')
            shares = [record['domain_accuracy'] for record in log if 'domain_accuracy' in record]
            found[f'{target}_{name}'] = rounded(100 * shares[-1], 0)
    return found


def ablation():
    """Rows of label and accuracies of seed 0, in brackets before adaptation."""
    rows, lines = results_of('p4_adda'), []
    for label, pieces in p4_adda.ABLATION + p4_adda.CONTROLS:
        records = rows[p4_adda.name_of(dict(pieces=pieces))]
        lines.append([label])
        for target, source in sorted(SOURCE_OF.items()):
            after, before = [rounded(values_of(records, target, source, key)[0], 1)
                             for key in ('accuracy', 'unadapted_accuracy')]
            lines[-1].append(f'{after} ({before})')
    return lines


def digit_values():
    constants = p3_dann.constants()
    return dict(
        seeds=str(len(SEEDS)), held_out_images=str(HELD_OUT), per_domain=str(PER_DOMAIN),
        published=[rounded(value, 1) for value in p3_dann.PUBLISHED],
        published_improved=[rounded(value, 1) for value in p4_adda.PUBLISHED],
        means=means(), left=points_left(), told_apart=told_apart(), ablation=ablation(),
        **{key: [scenario_name(*scenario).replace(' to ', ' → ') for scenario in sorted(DIRECTIONS[name].items())]
           for key, name in (('scenarios', 'asked'), ('others', 'others'))},
        dann=dict(
            training(read_log(base_of(p3_dann.shipped('svhn')) + '.jsonl')),
            channels=', '.join(map(str, constants['NET']['channels'])), dropout=f'{constants["NET"]["dropout"]:g}',
            hidden=str(constants['DISCRIMINATOR_HIDDEN']), betas='0.9 and 0.99',
            **numbers(p3_dann, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'REVERSAL', 'ENTROPY', 'AVERAGE_DECAY',
                      'STATISTICS', 'LOG_EVERY')),
        adda=dict(
            training(read_log(base_of(p4_adda.shipped('svhn')) + '.jsonl')),
            changed_lines='\n'.join(changed_lines()),
            **numbers(p4_adda, 'ADVERSARIAL', 'CONFIDENT', 'DIVERSITY', 'SHARES_DECAY', 'AVERAGE_DECAY', 'LOG_EVERY')))


def changed_lines():
    """Of the print(model) of problem 4 the lines that differ from problem 3's, marked + and -."""
    texts = []
    for name in ('fig3_5.txt', 'fig4_3.txt'):
        with open(os.path.join(ROOT, 'figures', name)) as file:
            texts.append(file.read())
    return [line.rstrip() for line in difflib.ndiff(*[text.splitlines() for text in texts]) if line[0] in '+-']


def csv_rows(name):
    """The rows of a table that --plot wrote, as dicts."""
    with open(os.path.join(ROOT, 'figures', name + '.csv'), encoding='utf8') as file:
        return list(csv.DictReader(file))


def vae_values():
    log, linear = read_log(base_of(p1_vae.CKPT) + '.jsonl'), read_log(p1_vae.LINEAR_CODE)
    curve = sorted((record['test_kl'], record['test_mse']) for record in linear)
    test = log[-1]
    rows = sorted(p1_vae.sweep_of(p1_vae.CKPT), key=lambda record: record['lambda_kl'])
    # of 1,000 generated faces; the shipped net's are measured with those of problem 2
    frechet = {record['lambda_kl']: record['frechet'] for record in read_log(p1_vae.SAMPLES)}
    frechet[p1_vae.DEFAULTS['lambda_kl']] = next(
        record['frechet'] for record in read_log(p2_gan.SAMPLES) if record['what'] == 'p1_vae')
    table = []
    for row in rows:
        of_linear = float(np.interp(row['kl'], *zip(*curve)))
        table.append([power_of_ten(row['lambda_kl']), rounded(row['kl'], 1), rounded(row['mse'], 4),
                      rounded(of_linear, 4), rounded(row['mse'] / of_linear, 2), rounded(frechet[row['lambda_kl']], 1)])
    attributes, ten = [csv_rows(name) for name in ('table1_5', 'table1_3')]
    published_kl, published_mse = p1_vae.PUBLISHED
    return dict(training(log), table=table, kl=rounded(test['kl'], 1), mse=rounded(test['mse'], 4),
                chosen=rounded(test['chosen_step'], 0), test=rounded(test['images'], 0),
                kl_most=table[0][1], mse_least=table[0][2], kl_least=table[-1][1], mse_most=table[-1][2],
                short_steps=rounded(rows[0]['step'], 0), frechet_of_most=table[0][-1], frechet_of_least=table[-1][-1],
                published_kl=rounded(published_kl, 1), published_mse=rounded(published_mse, 4),
                lambda_kl=power_of_ten(p1_vae.DEFAULTS['lambda_kl']), mse_of_ten=ten[-1]['mse'],
                latent=str(p1_vae.NET['latent_dim']),
                attribute=attributes[0]['attribute'], attribute_accuracy=attributes[0]['test'],
                attributes=str(len(attributes)),
                **numbers(p1_vae, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'KL_WARM_UP', 'GRADIENT_NORM',
                          'AVERAGE_DECAY'))


def gan_values():
    log = read_log(base_of(p2_gan.CKPT) + '.jsonl')
    counts = {record.get('sha256'): record for record in read_log(p2_gan.COUNTS)}       # real faces have no sum
    rows = {record['what']: record for record in read_log(p2_gan.SAMPLES)}
    for what, path in (('p1_vae', p1_vae.CKPT), ('p2_gan', p2_gan.CKPT)):
        if rows.get(what, {}).get('sha256') != sha256(path):
            raise UserError(f'{p2_gan.SAMPLES} has no scores of {path}: let tests/benchmark.py samples measure them')
    settings = next(record for record in log if record['kind'] == 'run')['settings']
    penalties = dict(wgan_gp='norm 1 between real and generated', wgan_div='small between real and generated',
                     dragan='norm 1 near real images', r1='small at real images')
    proper = dict(dcgan='DCGAN', sngan='SNGAN', wgan_gp='WGAN-GP', wgan_div='WGAN-div', dragan='DRAGAN', r1='R1',
                  wasserstein='Wasserstein')
    methods = [[f'{proper[name]} ({name})', proper.get(method['loss'], method['loss']), method['norm'],
                penalties.get(name, 'none'), '{:g}, {:g}'.format(*method['betas']),
                {1: 'step', 5: 'fifth step'}[method['generator_every']]]
               for name, method in p2_gan.METHODS.items()]
    of_r1 = training(read_log(os.path.join(p2_gan.CHECKPOINTS, 'p2_methods', 'r1.jsonl')))
    compared = {what.split('/')[1]: rounded(row['frechet'], 1) for what, row in rows.items() if '/' in what}
    if rows['p2_gan']['sha256'] not in counts:
        raise UserError(f'{p2_gan.COUNTS} has no count of {p2_gan.CKPT}: let tests/benchmark.py strips and count '
                        'make it')
    shipped = counts[rows['p2_gan']['sha256']]
    counted = (f'A language model that did not know the method called {shipped["broken"]} of the {shipped["faces"]} '
               f'faces broken, by this rule: {shipped["rule"].split(";")[0]}.')
    earlier = [str(record['broken']) for record in counts.values()
               if record['what'] == 'p2_gan' and record is not shipped]
    return dict(training(log), n=rounded(rows['p2_gan']['n'], 0), methods=methods, counted=counted,
                compared=compared, of_r1=of_r1, earlier=earlier[-1],
                **{name: str(shipped[name]) for name in ('broken', 'faces')},
                augment=f'{settings["augment"]:g}',
                chosen=rounded(log[-1]['chosen_step'], 0),
                learning_rate=f'{p2_gan.METHODS[settings["method"]]["learning_rates"][0]:g}',
                r1_weight=f'{p2_gan.PENALTIES["r1"]["weight"]:g}',
                sngan_rate=f'{p2_gan.METHODS["sngan"]["learning_rates"][1]:g}',
                r1_every=str(p2_gan.PENALTIES['r1']['every']),
                latent=str(p2_gan.NET['latent_dim']), SAVE_EVERY=rounded(p2_gan.SAVE_EVERY, 0),
                SCORED=rounded(p2_gan.SCORED, 0), **numbers(p2_gan, 'AVERAGE_DECAY'),
                **{name: {key: rounded(rows[what][key], places) for key, places in (
                    ('frechet', 1), ('copied', 2), ('copied_least', 2))}
                   for name, what in (('of_vae', 'p1_vae'), ('shipped', 'p2_gan'), ('real', 'real'))})


def conditional_values():
    scores, logs = read_log(p5_diffusion.SCORES), {}
    for name, path in (('diffusion', p5_diffusion.CKPT), ('acgan', p6_acgan.shipped('digits', None)),
                       ('faces', p6_acgan.shipped('faces', p6_acgan.DEFAULTS['attribute']))):
        check_scores(p5_diffusion.SCORES, scores, name, path)
        logs[name] = read_log(base_of(path) + '.jsonl')
    texts = dict(accuracy=lambda value: rounded(100 * value, 1), frechet=lambda value: rounded(value, 1),
                 nearest=lambda value: rounded(value, 2), nearest_least=lambda value: rounded(value, 2),
                 images_per_second=lambda value: rounded(value, 1) if value else '',
                 sampling_steps=str, guidance=lambda value: f'{value:g}' if value != '' else '')
    table, by_name = [], {}
    for row in scores:
        if row['kind'] == 'digits':
            shown = {name: form(row[name]) for name, form in texts.items()}
            table.append([row['label']] + [shown[name] for name in (
                'sampling_steps', 'guidance', 'accuracy', 'frechet', 'nearest', 'nearest_least', 'images_per_second')])
            default = (row['sampling_steps'] == p5_diffusion.SAMPLING_STEPS, row['guidance'] == p5_diffusion.GUIDANCE)
            if row['what'] != 'diffusion' or all(default):
                by_name[row['what']] = shown
            if default[0]:                 # over the weights of the guidance, and over the steps of sampling
                by_name[f'guidance_{row["guidance"]:g}'] = shown
            if default[1]:
                by_name[f'steps_{row["sampling_steps"]}'] = shown
    faces = next(record for record in scores if record['kind'] == 'faces')
    return dict(
        table=table, scores=by_name, drawn=rounded(10 * p5_diffusion.SCORED, 0), cores=str(scores[-1]['cores']),
        faces={name: rounded(100 * faces[name], 1) for name in ('accuracy', 'real_accuracy')},
        trained={name: training(log) for name, log in logs.items()}, attribute=faces['attribute'],
        published=rounded(100 * PUBLISHED_ACGAN, 1),
        rates=dict(diffusion=f'{p5_diffusion.LEARNING_RATE:g}',
                   acgan='{:g} and {:g}'.format(*p6_acgan.LEARNING_RATES)),
        channels=', '.join(map(str, p5_diffusion.NET['channels'])),
        **numbers(p5_diffusion, 'NOISE_STEPS', 'SAMPLING_STEPS', 'GUIDANCE', 'AVERAGE_DECAY', 'LABEL_DROPPED'))


def values():
    """All that report.typ prints of results and settings: texts and tables of texts."""
    return dict(digit_values(), vae=vae_values(), gan=gan_values(), conditional=conditional_values(),
                sizes={name: [f'{count:,}' for count in counts] for name, counts in SIZES.items()})


# ------------------------------------------------------------------------- README.md and results.md

def log_of(name):
    """The log of a checkpoint in checkpoints/."""
    return read_log(os.path.join(CHECKPOINTS, name + '.jsonl'))


def one(records, **wanted):
    """The only record that has these values."""
    found = [record for record in records
             if all(record.get(name) == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def cell(values):
    """Mean, standard deviation and number of accuracies."""
    mean, spread = table_cell(values, 1)
    return f'{mean} ± {spread} ({len(values)})' if spread else f'{mean} ({len(values)})'


def results():
    """The tables of README.md: ours beside the best public figures."""
    kl, mse = p1_vae.PUBLISHED
    lines = ['| pictures | measured | here | best public report |', '| --- | --- | --- | --- |']
    test = one(log_of('p1_vae'), kind='test')
    lines += [f'| VAE | mean squared error per pixel (between 0 and 1), test faces | {rounded(test["mse"], 4)} '
              f'| {rounded(mse, 4)}, ten faces |',
              f'| VAE | KL divergence in nats, test faces | {rounded(test["kl"], 1)} | {rounded(kl, 1)} |']
    drawn, real = [one(read_log(p2_gan.SAMPLES), what=what) for what in ('p2_gan', 'real')]
    lines += [f'| GAN | {what} | {rounded(drawn[name], places)} (real faces: {rounded(real[name], places)}) '
              '| none |' for name, places, what in (
                  ('frechet', 1, 'Fréchet distance to test faces in face descriptors of dlib, times 1,000'),
                  ('clear', 3, 'share of the faces that the face detector of dlib sees clearly'))]
    count = one(read_log(p2_gan.COUNTS), sha256=drawn['sha256'])
    lines.append('| GAN | faces that a language model called broken '
                 f'| {count["broken"]} of {count["faces"]} | none |')
    found = rounded(100 * one(log_of('p5_diffusion'), kind='test')['accuracy'], 1)
    lines.append('| diffusion (an extra) | digits that a digit classifier reads as what was asked for, in % '
                 f'| {found} | {rounded(100 * PUBLISHED_ACGAN, 1)}, by an ACGAN and another classifier |')
    rows = [results_of(problem)[row] for problem, row in (
        ('p3_dann', 'source'), ('p3_dann', 'dann_entropy'), ('p4_adda', 'improved'), ('p3_dann', 'target'))]
    lines += ['', '| digits: accuracy in % | lower bound | problem 3 | problem 4 | upper bound '
              '| hw3_p3.sh / hw3_p4.sh (seed 0) | best public report: 3 / 4 |', '| --- ' * 7 + '|']
    for (target, source), *published in zip(sorted(SOURCE_OF.items()), p3_dann.PUBLISHED, p4_adda.PUBLISHED):
        values = [values_of(records, target, source) for records in rows]
        assert all(len(one) == len(SEEDS) for one in values)
        cells = [rounded(np.mean(one), 1) for one in values]
        of_seed_0 = [rounded(one[0], 2) for one in values[1:3]]
        lines.append(f'| {scenario_name(target, source)} | {" | ".join(cells)} | {" / ".join(of_seed_0)} '
                     f'| {" / ".join(rounded(value, 1) for value in published)} |')
    lines += ['', f'The first four columns are means over {len(SEEDS)} seeds. All our accuracies are on the test '
              'images of the second domain.']
    return '\n'.join(lines) + '\n'


# command, logs of its runs below checkpoints/, directions if they are a table's, and what is trained
TRAININGS = (('python3 p1_vae.py --train', ('p1_vae',), None, 'the VAE'),
             ('python3 p2_gan.py --train', ('p2_gan',), None, 'the GAN'),
             ('python3 p3_dann.py --train', ('p3_dann_*',), None, 'the three nets of problem 3'),
             ('python3 p4_adda.py --train', ('p4_adda_*',), None, 'the three nets of problem 4'),
             ('python3 p5_diffusion.py --train', ('p5_diffusion',), None, 'the diffusion model'),
             ('bash report/train_tables.sh', ('p[34]_*_*', 'p[34]_runs/*/*'), 'asked', 'all runs of problems 3 and 4'),
             ('bash report/train_tables.sh', ('p[34]_runs/*/*',), 'others', 'and those of three more pairs of domains'))


def training_time(patterns, directions):
    """How long the runs took whose logs match the patterns, and on which machine: a text."""
    paths = sorted(path for pattern in patterns for path in glob.glob(os.path.join(CHECKPOINTS, pattern + '.jsonl'))
                   if not path.endswith('_last.jsonl'))
    minutes, machines = [], set()
    for log in map(read_log, paths):
        run = one(log, kind='run')
        settings = run['settings']
        if directions and (settings['target'], settings['source']) not in DIRECTIONS[directions].items():
            continue
        last = [record for record in log if record['kind'] == 'train'][-1]
        minutes.append(last['step'] * settings['batch_size'] / last['images_per_second'] / 60)
        machine = f'{run["threads"]} CPU core' + 's' * (run['threads'] > 1)
        machines.add(f'a GPU ({run["gpu"]})' if 'gpu' in run else machine)
    machine = ' or '.join(sorted(machines))
    if directions:
        return f'{len(minutes)} runs, together {rounded(sum(minutes) / 60, 1)} hours on {machine}'
    return f'{rounded(sum(minutes), 0)} minutes on {machine}'


def trainings():
    """The commands of README.md, with the time and the machine of the shipped runs."""
    lines = ['| command | trains | time |', '| --- | --- | --- |']
    lines += [f'| `{command}` | {what} | {training_time(patterns, directions)} |'
              for command, patterns, directions, what in TRAININGS]
    return '\n'.join(lines) + '\n'


ABOUT_DIGITS = ('Accuracy on the test images of the target in percent, mean and standard deviation over the seeds; the '
                'number of seeds is in brackets. "Batch statistics of the target" means that the batch norms of the '
                'trained net were given the statistics of unlabelled target images. The last two rows measure the nets '
                'of "DANN + entropy" and "improved ADDA" on 500 target training images on which no run has trained.')
# rows of tables: label, problem, name of the row in its log, which accuracy
ASKED = (('lower bound: source only', 'p3_dann', 'source', 'accuracy'),
         ('**DANN + entropy**', 'p3_dann', 'dann_entropy', 'accuracy'),
         ('**improved ADDA**', 'p4_adda', 'improved', 'accuracy'),
         ('upper bound: target only', 'p3_dann', 'target', 'accuracy'))
OTHERS = (('lower bound: source only', 'p3_dann', 'source', 'accuracy'),
          ('DANN + entropy', 'p3_dann', 'dann_entropy', 'accuracy'),
          ('improved ADDA', 'p4_adda', 'improved', 'accuracy'))
MORE = (('DANN', 'p3_dann', 'dann', 'accuracy'), ('plain ADDA', 'p4_adda', 'plain', 'accuracy'),
        ('plain ADDA, before adaptation', 'p4_adda', 'plain', 'unadapted_accuracy'),
        ('improved ADDA, before adaptation', 'p4_adda', 'improved', 'unadapted_accuracy'),
        ('improved ADDA, no discriminator', 'p4_adda', 'improved_no_discriminator', 'accuracy'),
        ('lower bound, batch statistics of the target', 'p3_dann', 'source', 'adabn_accuracy'),
        ('lower bound, not augmented', 'p3_dann', 'source_not_augmented', 'accuracy'),
        ('lower bound, not augmented, batch statistics of the target', 'p3_dann', 'source_not_augmented',
         'adabn_accuracy'),
        ('DANN + entropy, not augmented', 'p3_dann', 'dann_entropy_not_augmented', 'accuracy'),
        ('DANN + entropy, on 500 held-out training images', 'p3_dann', 'dann_entropy', 'held_out_accuracy'),
        ('improved ADDA, on 500 held-out training images', 'p4_adda', 'improved', 'held_out_accuracy'))


def digit_table(directions, rows, seeds=SEEDS):
    """A table of problems 3 and 4: rows by method, columns by scenario."""
    scenarios = sorted(DIRECTIONS[directions].items())
    lines = ['', '| | ' + ' | '.join(scenario_name(*one) for one in scenarios) + ' |', '| --- | --- | --- | --- |']
    for label, problem, row, key in rows:
        records = [record for record in results_of(problem)[row] if record['seed'] in seeds]
        values = [values_of(records, *one, key=key) for one in scenarios]
        assert all(len(one) == len(seeds) for one in values), f'{label}: a run is missing'
        lines.append(f'| {label} | ' + ' | '.join(map(cell, values)) + ' |')
    return lines


def all_results():
    """report/results.md, written from the logs alone."""
    ablation = [(label, 'p4_adda', p4_adda.name_of(dict(pieces=pieces)), 'accuracy')
                for label, pieces in p4_adda.ABLATION + p4_adda.CONTROLS]
    parts = ([f'This page is written by `{COMMAND}` from the logs in checkpoints/.', '', '## Problem 1'] + rates(),
             ['## Problem 2'] + samples(),
             ['## Problems 3 and 4', '', ABOUT_DIGITS] + digit_table('asked', ASKED + MORE),
             ['From plain ADDA to improved ADDA (+ self-training), one piece added at a time, and two controls, all of '
              'seed 0 (the beginning of p4_adda.py and section 4-3 of the report explain the pieces):'
              ] + digit_table('asked', ablation, seeds=(0,)),
             ['Three more pairs of domains, which other years of the course ask for (the upper bound of a target is '
              'that of the first table):'] + digit_table('others', OTHERS),
             ['## Problems 5 and 6'] + conditional(),
             ['## Speed of the scripts'] + script_results())
    return '# Results\n\n' + '\n\n'.join('\n'.join(part) for part in parts) + '\n'


def rates():
    """MSE and KL of the VAE for each lambda_KL, and how well a linear classifier reads the attributes."""
    tests = p1_vae.sweep_of(p1_vae.CKPT)
    lines = ['', 'Mean squared error per pixel in [0, 1] and KL divergence on the test faces, decoded from the mean, '
             'and dlib\'s Fréchet distance of 1,000 generated faces as in problem 2. The shipped net comes first; the '
             'others start from its weights.', '', '| lambda_KL | KL (nats) | MSE | Fréchet |',
             '| --- | --- | --- | --- |']
    faces = {record['lambda_kl']: record['frechet'] for record in read_log(p1_vae.SAMPLES)}
    faces[tests[0]['lambda_kl']] = one(read_log(p2_gan.SAMPLES), what='p1_vae')['frechet']
    lines += [f'| {test["lambda_kl"]:.1e} | {rounded(test["kl"], 1)} | {rounded(test["mse"], 4)} '
              f'| {rounded(faces[test["lambda_kl"]], 1)} |'
              for test in tests[:1] + sorted(tests[1:], key=lambda test: test['lambda_kl'])]
    with open(os.path.join(ROOT, 'figures', 'table1_5.csv')) as file:
        rows = list(csv.reader(file))[1:]
    lines += ['', 'Balanced accuracy in % of a linear classifier that reads an attribute from the latent means:', '',
              '| attribute | held-out training faces | test faces |', '| --- | --- | --- |']
    return lines + ['| ' + ' | '.join(row) + ' |' for row in rows]


def samples():
    """Scores of 1,000 generated faces of each run of problem 2."""
    lines = ['', '1,000 faces of each. Own score: Fréchet distance to the held-out training faces, between latent '
             'means of problem 1. The other three scores use dlib and the test faces. Clear: share of the faces that '
             'the detector sees clearly. Fréchet (times 1,000): distance between the descriptors of the faces and of '
             'the test faces. Nearest: mean distance from a face to the nearest test face. Of the own score and of '
             'Fréchet less is better.', '',
             '| faces | images seen | own score | clear | Fréchet | nearest |', '| --- | --- | --- | --- | --- | --- |']
    for record in read_log(p2_gan.SAMPLES):
        scores = [rounded(record[name], places) for name, places in (
            ('own', 2), ('clear', 3), ('frechet', 1), ('nearest', 3))]
        cells = [record['label'], rounded(record['images'], 0) if record['images'] else ''] + scores
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def conditional():
    """Scores of 1,000 drawn digits of each setting of problems 5 and 6."""
    with open(os.path.join(ROOT, 'figures', 'table5.csv'), encoding='utf8') as file:
        rows = list(csv.reader(file))
    return ['', '1,000 generated digits of MNIST-M of each setting, 100 of each class. The judge is the upper bound of '
            'problem 3. Accuracy: the share that it reads as the digit that was asked for. The distances are between '
            'its features: Fréchet to the test digits, the others to the nearest training digit. Real digits: the '
            'accuracy is that of all test digits, the Fréchet distance that of 1,000 training digits, and the others '
            'are those of held-out digits.', ''] + [
                '| ' + ' | '.join(row) + ' |' for row in rows[:1] + [['---'] * len(rows[0])] + rows[1:]]


def script_results():
    """What `python3 tests/benchmark.py scripts` measured."""
    lines = ['', 'The images of problems 3 and 4 are the test images of SVHN in the data kit, repeated to the number '
             'of the official test set. The column "Python program alone" is another measurement: the whole of '
             'p3_dann.py with the import of torch, but without the shell script. So its times need not fit the wall '
             'time.', '',
             '| command | images | torch | wall time | of which importing torch | Python program alone | peak memory |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for record in sorted(log_of('benchmark_scripts'), key=lambda record: (record['script'], record['torch'])):
        single = ''
        if 'cores' in record:
            seconds = record['one_thread_seconds']
            single = (f'{rounded(seconds, 1)} s with one thread, {rounded(seconds / record["threads_ratio"], 1)} s '
                      f'with {record["cores"]}')
        lines.append(f'| `bash {record["script"]}` | {record["images"]:,} | {record["torch"]} '
                     f'| {rounded(record["seconds"], 1)} s | {rounded(record["import_seconds"], 1)} s | {single} '
                     f'| {rounded(record["megabytes"], 0)} MB |')
    return lines


# ------------------------------------------------------------------------------------ what is written

def readme():
    """The text of README.md with its tables made anew."""
    with open(README, encoding='utf8') as file:
        text = file.read()
    for name, table in (('results', results()), ('training', trainings())):
        start = f'<!-- {name}: {COMMAND} -->\n'
        begin, end = text.index(start) + len(start), text.index(f'<!-- end of {name} -->')
        text = text[:begin] + '\n' + table + '\n' + text[end:]
    return text


def build(args):
    try:
        import typst
    except ImportError:
        raise UserError('typst is not installed: pip install typst==0.15.2') from None

    def write(temporary):
        try:
            typst.compile(os.path.join(HERE, 'report.typ'), output=temporary, root=ROOT,
                          ignore_system_fonts=True, sys_inputs=dict(values=json.dumps(values())))
        except typst.TypstError as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'report.typ does not compile ({reason}): if a figure is missing, let the --plot of its '
                            'problem draw it') from error
    write_text(README, readme())
    write_text(RESULTS, all_results())
    write_whole(args.out, write)
    print(f'{README}, {RESULTS} and {args.out} are written')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=PDF, help='PDF to write (hw3_studentID.pdf)')
    run_command(build, parser.parse_args(argv))


if __name__ == '__main__':
    main()
