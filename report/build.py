"""Write everything that says a result: the tables of README.md and report/results.md, and hw3_studentID.pdf.

    python3 p1_vae.py --plot (likewise the scripts of problems 2 to 6), if a training is newer than figures/
    python3 report/build.py

All numbers come from the logs in checkpoints/, the tables of --plot (figures/*.csv) and the settings in the scripts.
"""
import argparse
import csv
import difflib
import itertools
import json
import os
import re
import sys
import textwrap

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import p1_vae, p2_gan, p3_dann, p4_adda, p5_diffusion, p6_acgan        # noqa: E401, E402
from datasets import DIRECTIONS, HELD_OUT, SOURCE_OF, UserError, run_command, write_text, write_whole        # noqa: E402
from models import CHECKPOINTS, base_of, check_scores, read_log, read_results, sha256                        # noqa: E402
from report.figures import (DOMAIN_NAMES, PER_DOMAIN, SEEDS, accuracies, rounded, scenario_name,            # noqa: E402
                            table_cell)

PDF = os.path.join(ROOT, 'hw3_studentID.pdf')
README = os.path.join(ROOT, 'README.md')
RESULTS = os.path.join(ROOT, 'report', 'results.md')
COMMAND = 'python3 report/build.py'
CPU = 'AMD EPYC (Zen 4)'     # of the trainings on a CPU; the logs have its threads, but not its name
SIZES = dict(usps=('7,291', '2,007'), mnistm=('60,000', '10,000'), svhn=('19,253', '5,001'), face=('40,000', '2,456'))

# rows of the tables on digits: label, row as the files of its runs name it, which accuracy
ASKED = (('lower bound: source only', 'source', 'accuracy'), ('**DANN + entropy**', 'dann_entropy', 'accuracy'),
         ('**improved ADDA**', 'improved', 'accuracy'), ('upper bound: with labels', 'target', 'accuracy'))
MORE = (('DANN', 'dann', 'accuracy'), ('plain ADDA', 'plain', 'accuracy'),
        ('plain ADDA, before adaptation', 'plain', 'unadapted_accuracy'),
        ('improved ADDA, before adaptation', 'improved', 'unadapted_accuracy'),
        ('improved ADDA, no discriminator', 'improved_no_discriminator', 'accuracy'),
        ('lower bound, batch statistics of the target', 'source', 'adabn_accuracy'),
        ('lower bound, not augmented', 'source_not_augmented', 'accuracy'),
        ('lower bound, not augmented, batch statistics of the target', 'source_not_augmented', 'adabn_accuracy'),
        ('DANN + entropy, not augmented', 'dann_entropy_not_augmented', 'accuracy'),
        ('DANN + entropy, on 500 held-out training images', 'dann_entropy', 'held_out_accuracy'),
        ('improved ADDA, on 500 held-out training images', 'improved', 'held_out_accuracy'))
ABLATION = [(label, p4_adda.name_of(dict(pieces=pieces)), 'accuracy')
          for label, pieces in p4_adda.ABLATION + p4_adda.CONTROLS]
OTHERS = [(label.strip('*'), row, key) for label, row, key in ASKED[:3]]


# ------------------------------------------------------------------------------- what is read where

def log_of(ckpt):
    """Return the log beside a checkpoint."""
    return read_log(base_of(ckpt) + '.jsonl')


def read(*names):
    """Return the text of a file of this repository."""
    with open(os.path.join(ROOT, *names), encoding='utf8') as file:
        return file.read()


def csv_rows(name):
    """Return the rows of a table in figures/ below its head."""
    return list(csv.reader(read('figures', name + '.csv').splitlines()))[1:]


def digit_results():
    """Return {row: its results} of the tables of problems 3 and 4."""
    return dict(read_results('p3_dann', 'dann_entropy'), **read_results('p4_adda', 'improved'))


def face_scores():
    """Return {what was scored: record of its generated faces}."""
    records = read_log(p2_gan.SAMPLES)
    for what, ckpt in (('p1_vae', p1_vae.CKPT), ('p2_gan', p2_gan.CKPT)):
        check_scores(p2_gan.SAMPLES, records, what, ckpt)
    return {record['what']: record for record in records}


def minutes_of(log):
    """Return how many minutes a training took."""
    last = [record for record in log if record['kind'] == 'train'][-1]
    return last['step'] * log[0]['settings']['batch_size'] / last['images_per_second'] / 60


# -------------------------------------------------------------------------- values: texts of the PDF

def values():
    """Return all that report.typ prints of results and settings: texts and tables of texts."""
    return dict(digit_values(digit_results()), vae=vae_values(), gan=gan_values(), conditional=conditional_values(),
                sizes=SIZES)


def training(log):
    """Return what a training's log says of its data, length, speed and machine."""
    run, steps = log[0], log[-1]['step']
    images = steps * run['settings']['batch_size']
    return dict(images=rounded(images, 0), minutes=rounded(minutes_of(log), 0), steps=rounded(steps, 0),
                epochs=rounded(images / run['training_images'], 0), batch=rounded(run['settings']['batch_size'], 0),
                training_images=rounded(run['training_images'], 0), held_out=rounded(run['held_out'], 0),
                parameters=rounded(run['parameters'] / 1e6, 2),
                precision={'bf16': 'bfloat16', 'fp32': 'float32'}[run['precision']],
                machine=(f'a GPU ({run["gpu"]})' if 'gpu' in run else
                         {1: 'one core', 2: 'two cores'}.get(run['threads'], f'{run["threads"]} cores')))


def constants_of(script, *names):
    """Return constants of a script, without trailing zeros."""
    return {name: f'{getattr(script, name):,g}' for name in names}


def power_of_ten(value):
    """Return a small number as people write it, like 7.5 · 10^−5."""
    digits, exponent = f'{value:.1e}'.split('e-')
    return f'{digits} · 10^−{int(exponent)}'


def vae_table():
    """Return rows of lambda_KL (a number), KL, MSE, MSE of the linear code, ratio of the two and Frechet distance."""
    linear_curve = sorted((record['test_kl'], record['test_mse']) for record in read_log(p1_vae.LINEAR_CODE))
    # the shipped net's faces are scored with those of problem 2
    distances = {record['lambda_kl']: record['frechet'] for record in read_log(p1_vae.SAMPLES)}
    distances[p1_vae.DEFAULTS['lambda_kl']] = face_scores()['p1_vae']['frechet']
    table = []
    for record in sorted(p1_vae.sweep_of(p1_vae.CKPT), key=lambda record: record['lambda_kl']):
        linear_mse = float(np.interp(record['kl'], *zip(*linear_curve)))
        table.append([record['lambda_kl'], rounded(record['kl'], 1), rounded(record['mse'], 4), rounded(linear_mse, 4),
                      rounded(record['mse'] / linear_mse, 2), rounded(distances[record['lambda_kl']], 1)])
    return table


def vae_values():
    log, table, attributes = log_of(p1_vae.CKPT), vae_table(), csv_rows('table1_5')
    test, (published_kl, published_mse) = log[-1], p1_vae.PUBLISHED
    draws = sorted((record['rate'], record['distortion']) for record in read_log(p1_vae.LINEAR_CODE))
    return dict(training(log), table=[[power_of_ten(row[0])] + row[1:] for row in table],
                kl=rounded(test['kl'], 1), mse=rounded(test['mse'], 4), draw=rounded(test['reconstruction'], 4),
                linear_draw=rounded(float(np.interp(test['kl'], *zip(*draws))), 4), betas='0.9 and 0.99',
                chosen=rounded(test['chosen_step'], 0), test=rounded(test['images'], 0), kl_most=table[0][1],
                mse_least=table[0][2], kl_least=table[-1][1],
                mse_most=table[-1][2], frechet_of_most=table[0][-1], frechet_of_least=table[-1][-1],
                short_steps=rounded(p1_vae.sweep_of(p1_vae.CKPT)[1]['step'], 0),
                published_kl=rounded(published_kl, 1), published_mse=rounded(published_mse, 4),
                lambda_kl=power_of_ten(p1_vae.DEFAULTS['lambda_kl']), mse_of_ten=csv_rows('table1_3')[-1][-1],
                latent=str(p1_vae.NET['latent_dim']), attribute=attributes[0][0],
                attribute_accuracy=attributes[0][-1], attributes=str(len(attributes)),
                **constants_of(p1_vae, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'KL_WARM_UP', 'GRADIENT_NORM',
                               'AVERAGE_DECAY'))


def gan_values():
    log, scores = log_of(p2_gan.CKPT), face_scores()
    settings = log[0]['settings']
    counts = {record['sha256']: record for record in read_log(p2_gan.COUNTS)
              if (record['kind'], record['what']) == ('count', 'p2_gan')}
    count = counts.pop(sha256(p2_gan.CKPT))            # what is left are counts of earlier nets
    terms = dict(wgan_gp='(|∇D| − 1)^2, between real and generated', wgan_div='|∇D|^6, between real and generated',
                 dragan='(|∇D| − 1)^2, near real images', r1='|∇D|^2, at real images')
    penalties = {name: f'{penalty["weight"]:g} ' + terms[name] for name, penalty in p2_gan.PENALTIES.items()}
    names = dict(dcgan='DCGAN', sngan='SNGAN', wgan_gp='WGAN-GP', wgan_div='WGAN-div', dragan='DRAGAN', r1='R1',
                 wasserstein='Wasserstein')
    methods = [[f'{names[name]} ({name})', names.get(method['loss'], method['loss']), method['norm'],
                penalties.get(name, 'none'), '{:g}, {:g}'.format(*method['betas']),
                {1: 'step', 5: 'fifth step'}[method['generator_every']]] for name, method in p2_gan.METHODS.items()]
    shown = {what: {key: rounded(record[key], places) for key, places in (
        ('frechet', 1), ('clear', 3), ('copied', 2), ('copied_least', 2))} for what, record in scores.items()}
    return dict(training(log), methods=methods, n=rounded(scores['p2_gan']['n'], 0), of_vae=shown['p1_vae'],
                shipped=shown['p2_gan'], real=shown['real'],
                compared={what.split('/')[1]: texts['frechet'] for what, texts in shown.items() if '/' in what},
                broken=str(count['broken']), faces=str(count['faces']), rule=count['rule'].split(';')[0],
                earlier=str(list(counts.values())[-1]['broken']), blind=blind_values(),
                augment=f'{settings["augment"]:g}',
                of_r1=training(log_of(os.path.join(CHECKPOINTS, 'p2_methods', 'r1.pth'))),
                chosen=rounded(log[-1]['chosen_step'], 0), latent=str(p2_gan.NET['latent_dim']),
                learning_rate=f'{p2_gan.METHODS[settings["method"]]["learning_rates"][0]:g}',
                sngan_rate=f'{p2_gan.METHODS["sngan"]["learning_rates"][1]:g}',
                r1_weight=f'{p2_gan.PENALTIES["r1"]["weight"]:g}', r1_every=str(p2_gan.PENALTIES['r1']['every']),
                **constants_of(p2_gan, 'AVERAGE_DECAY', 'SAVE_EVERY', 'SCORED'))


def blind_values():
    """Return what the report says of the blind count: the counts of our picture, of the others and of real faces."""
    pictures = {picture['name']: picture for picture in blind_counts()['pictures']}
    ours, real = pictures.pop('our GAN, shipped'), pictures.pop('real faces')
    pictures.pop('our GAN, --seed 1')
    others = [count for picture in pictures.values() for count in picture['broken']]
    return dict(ours=' and '.join(map(str, ours['broken'])), real=' and '.join(map(str, real['broken'])),
                least=str(min(others)), most=str(max(others)), margin=str(blind_counts()['margin']))


def digit_values(results):
    scenarios, others = [[scenario_name(*scenario).replace(' to ', ' → ') for scenario in sorted(directions.items())]
                         for directions in (DIRECTIONS['asked'], DIRECTIONS['others'])]
    means, results_of_seed_0 = mean_accuracies(results), log_of(p4_adda.shipped('svhn'))[-1]
    return dict(
        seeds=str(len(SEEDS)), held_out_images=str(HELD_OUT), per_domain=str(PER_DOMAIN), scenarios=scenarios,
        others=others, published=[rounded(value, 1) for value in p3_dann.PUBLISHED],
        published_improved=[rounded(value, 1) for value in p4_adda.PUBLISHED], told_apart=told_apart(),
        means={name: rounded(mean, 1) for name, mean in means.items()}, ablation=ablation(results),
        summary=summary(results), same_digit=same_digit(),
        svhn_mistakes=rounded((1 - results_of_seed_0['accuracy']) * results_of_seed_0['images'], 0),
        left={target: rounded(means[target + '_target'] - means[target + '_dann_entropy'], 1) for target in SOURCE_OF},
        dann=dict(training(log_of(p3_dann.shipped('svhn'))), channels=', '.join(map(str, p3_dann.NET['channels'])),
                  dropout=f'{p3_dann.NET["dropout"]:g}', hidden=str(p3_dann.DISCRIMINATOR_HIDDEN), betas='0.9 and 0.99',
                  **constants_of(p3_dann, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'REVERSAL', 'ENTROPY',
                                 'AVERAGE_DECAY', 'STATISTICS', 'LOG_EVERY')),
        adda=dict(training(log_of(p4_adda.shipped('svhn'))), changed_lines='\n'.join(changed_lines()),
                  **constants_of(p4_adda, 'ADVERSARIAL', 'CONFIDENT', 'DIVERSITY', 'SHARES_DECAY', 'AVERAGE_DECAY',
                                 'LOG_EVERY')))


def summary(results):
    """Return rows of a scenario and mean and spread of source only, DANN + entropy, improved ADDA and with labels."""
    return [[scenario_name(*scenario).replace(' to ', ' → ')] + [
        ' ± '.join(table_cell(list(accuracies(results[row], *scenario, key=key).values()), 1)) for _, row, key in ASKED]
        for scenario in sorted(SOURCE_OF.items())]


def same_digit():
    """Return of how many of a hundred neighbours the digit is that of the target image, by net and target."""
    return {f'{target}_{net}': rounded(float(share), 0)
            for name in ('fig3_4', 'fig4_2') for net, target, share in csv_rows(name)}


def mean_accuracies(results):
    """Return the mean accuracies in percent, named like svhn_dann, svhn_source_adabn and svhn_plain_before."""
    means = {}
    for scenario, (row, runs), (key, end) in itertools.product(SOURCE_OF.items(), results.items(), (
            ('accuracy', ''), ('adabn_accuracy', '_adabn'), ('unadapted_accuracy', '_before'))):
        by_seed = accuracies([run for run in runs if key in run], *scenario, key=key)
        if by_seed:
            means[f'{scenario[0]}_{row}{end}'] = np.mean(list(by_seed.values()))
    return means


def told_apart():
    """Return of how many of a hundred images the discriminator names the domain at its end, by seed 0."""
    shares = {}
    for target in SOURCE_OF:
        for row, ckpt in (('dann_entropy', p3_dann.shipped(target)), ('improved', p4_adda.shipped(target)),
                          ('plain', p4_adda.shipped(target, pieces=''))):
            shares[f'{target}_{row}'] = rounded(100 * [record['domain_accuracy'] for record in log_of(ckpt)
                                                       if 'domain_accuracy' in record][-1], 0)
    return shares


def ablation(results):
    """Return rows of a label and of accuracies of seed 0, in brackets before adaptation."""
    table = []
    for label, row, _ in ABLATION:
        table.append([label])
        for scenario in sorted(SOURCE_OF.items()):
            after, before = [rounded(accuracies(results[row], *scenario, key=key)[0], 1)
                             for key in ('accuracy', 'unadapted_accuracy')]
            table[-1].append(f'{after} ({before})')
    return table


def changed_lines():
    """Return the lines in which print(model) of problem 4 differs from problem 3's, marked + and -."""
    texts = [read('figures', name).splitlines() for name in ('fig3_5.txt', 'fig4_3.txt')]
    return [line.rstrip() for line in difflib.ndiff(*texts) if line[0] in '+-']


def last_class_losses(logs):
    """Return the class loss of the generators of ACGAN at their end."""
    return {name: rounded([record['generator_class_loss'] for record in log if 'generator_class_loss' in record][-1], 3)
            for name, log in logs.items() if name != 'diffusion'}


def conditional_values():
    records, logs = read_log(p5_diffusion.SCORES), {}
    for name, ckpt in (('diffusion', p5_diffusion.CKPT), ('acgan', p6_acgan.shipped('digits', '')),
                       ('acgan_paper', p6_acgan.PAPER),
                       ('faces', p6_acgan.shipped('faces', p6_acgan.DEFAULTS['attribute']))):
        check_scores(p5_diffusion.SCORES, records, name, ckpt)
        logs[name] = log_of(ckpt)
    table, scores = [], {}
    for label, steps, guidance, *cells in csv_rows('table5'):
        row = [label, steps, f'{float(guidance):g}' if guidance else '']
        table.append(row + cells)
        scores[' '.join(row).strip()] = dict(accuracy=cells[0], frechet=cells[1])
    faces, = [record for record in records if record['kind'] == 'faces']
    return dict(table=table, scores=scores, drawn=rounded(10 * p5_diffusion.SCORED, 0), cores=str(records[-1]['cores']),
                faces={name: rounded(100 * faces[name], 1) for name in ('accuracy', 'real_accuracy')},
                attribute=faces['attribute'], trained={name: training(log) for name, log in logs.items()},
                channels=', '.join(map(str, p5_diffusion.NET['channels'])),
                rates={data: '{:g} and {:g}'.format(*rates) for data, rates in p6_acgan.LEARNING_RATES.items()},
                read={key: str(value) for record in log_of(os.path.join(CHECKPOINTS, 'p6_readings'))
                      for key, value in record.items()},
                of_data={name: {data: f'{value:,g}' for data, value in getattr(p6_acgan, name).items()}
                         for name in ('R1_WEIGHT', 'CLASS_WEIGHT', 'ALONE')},
                betas='{:g} and {:g}'.format(*p6_acgan.BETAS),
                r1_every=str(p6_acgan.R1_EVERY), class_loss=last_class_losses(logs), **constants_of(
                    p5_diffusion, 'LEARNING_RATE', 'NOISE_STEPS', 'SAMPLING_STEPS', 'GUIDANCE', 'AVERAGE_DECAY',
                    'LABEL_DROPPED'))


# ------------------------------------------------- tables of README.md and report/results.md

def readme_parts(texts):
    """Return {name of a pair of markers in README.md: what stands between them}; texts are the values of the PDF."""
    results, means, vae = digit_results(), texts['means'], texts['vae']
    improved = ', '.join(rounded(float(means[target + '_improved']), 0) for target in sorted(SOURCE_OF))
    minutes = rounded(max(minutes_of(log_of(p4_adda.shipped(target))) for target in SOURCE_OF), 0)
    headline = ('An unofficial solution of homework 3 of "Deep Learning for Computer Vision" (NTU, Fall 2020). **It '
                f'recognises {improved} % of the digits of MNIST-M, SVHN and USPS without a label of that domain, '
                f'after at most {minutes} minutes of training for each on one core** of an {CPU}.')
    digits, seed_0 = [], {script: [] for script in ('hw3_p3.sh', 'hw3_p4.sh')}
    for target, source in sorted(SOURCE_OF.items()):
        name = scenario_name(target, source) + (' †' if target == 'svhn' else '')
        digits.append([name] + [means[f'{target}_{row}'] for _, row, _ in ASKED])
        for accuracies_of_script, row in zip(seed_0.values(), ('dann_entropy', 'improved')):
            accuracies_of_script.append(f'{target} {rounded(accuracies(results[row], target, source)[0], 2)} %')
    names = f'diffusion {p5_diffusion.SAMPLING_STEPS} {p5_diffusion.GUIDANCE:g}', 'ACGAN', 'real digits'
    read_as_asked = [texts['conditional']['scores'][name]['accuracy'] for name in names]
    augmented = [[rounded(float(means[f'{target}_source{end}']), 0) for end in ('_not_augmented', '')]
                 for target in ('mnistm', 'svhn')]
    table = markdown(['digits: accuracy in %', 'source only', 'DANN + entropy', 'improved ADDA', 'with labels'], digits)
    below = (f'Means over {len(SEEDS)} seeds, on test images of the target. † Our SVHN is probably easier than the '
             'official one: do not compare this row with papers. Entropy: a loss that makes predictions for '
             f'target images confident. Improved: with the pieces below. The VAE has a mean squared error of '
             f'{vae["mse"]} per pixel on test faces. Two extras draw the digit asked for: a classifier agrees in '
             '{} % (diffusion) and {} % (ACGAN), and in {} % of real digits.'.format(*read_as_asked))
    small, speed = face_scores()['p2_methods/r1'], log_of(os.path.join(CHECKPOINTS, 'p2_cpu'))[1]['images_per_second']
    hours, distance = rounded(small['images'] / speed / 3600, 0), rounded(small['frechet'], 1)
    machines = (f'Core: {CPU}; ACGAN had a newer CPU, busy with other work. GPU: NVIDIA H100, which also trained other '
                'nets. For a CPU: `python3 p2_gan.py --train --steps 10000 --batch_size 64 --ckpt small.pth`, '
                f'about {hours} hours on one core; on a GPU its Fréchet distance was {distance} (shipped: '
                f'{texts["gan"]["shipped"]["frechet"]}).')
    taught = [[rounded(float(cell.split()[0]), 0) for cell in row[1:]] for row in texts['ablation']
              if row[0] in ('+ conditional', '+ diversity')]
    helped = ('- **Augmentation** lifts the net that has only source labels from {0[0]} to {0[1]} % (MNIST-M) and from '
              '{1[0]} to {1[1]} % (SVHN), but not on USPS.\n'
              "- **A teacher**, the average of the net's weights, labels target images, and the net learns these "
              'labels on changed copies of the images.\n'
              '- **A correction** favours digits that the teacher names too rarely; it helps SVHN and USPS. Added to '
              'the pieces before them (seed 0), the two lift\n  {2}.\n').format(*augmented, ', '.join(map(
                  '{} from {} to {} %'.format, (DOMAIN_NAMES[target] for target in sorted(SOURCE_OF)), *taught)))
    grading = [f'`{script}`: {", ".join(texts)}' for script, texts in seed_0.items()]
    headline, below, machines = [textwrap.fill(text, 150) + '\n' for text in (headline, below, machines)]
    return dict(headline=headline, results=f'{table}\n{below}\n{helped}',
                training=f'{markdown(["command", "trains", "time"], trainings(results))}\n{machines}',
                grading=f'On the test images of our data the shipped nets (seed 0) give\n{"; ".join(grading)}.\n')


def markdown(head, rows):
    """Return a table of Markdown."""
    return ''.join(f'| {" | ".join(row)} |\n' for row in [head, ['---'] * len(head)] + rows)


def trainings(results):
    """Return rows of a command, what it trains, and the time of its runs in checkpoints/ with their machine."""
    of_tables = [read_log(run['log']) for runs in results.values() for run in runs]
    shipped_dann, shipped_adda = [[log_of(script.shipped(target)) for target in SOURCE_OF]
                                  for script in (p3_dann, p4_adda)]
    acgan, acgan_faces = [[log_of(p6_acgan.shipped(data, p6_acgan.DEFAULTS['attribute']))]
                          for data in ('digits', 'faces')]
    table = []
    for command, what, logs in (
            ('python3 p1_vae.py --train', 'the VAE', [log_of(p1_vae.CKPT)]),
            ('python3 p2_gan.py --train', 'the GAN', [log_of(p2_gan.CKPT)]),
            ('python3 p3_dann.py --train', 'the three nets of problem 3', shipped_dann),
            ('python3 p4_adda.py --train', 'the three nets of problem 4', shipped_adda),
            ('python3 p5_diffusion.py --train', 'the diffusion model', [log_of(p5_diffusion.CKPT)]),
            ('python3 p6_acgan.py --train', 'ACGAN of digits', acgan),
            ('python3 p6_acgan.py --train --data faces', 'ACGAN of faces', acgan_faces),
            ('bash report/train_tables.sh', 'runs of the tables whose log was deleted (a clone has all)', of_tables)):
        minutes = sum(map(minutes_of, logs))
        took = f'{rounded(minutes, 0)} minutes'
        if len(logs) > len(SOURCE_OF):
            took = f'{len(logs)} runs, together {rounded(minutes / 60, 1)} hours'
        machines = sorted({'a GPU' if 'gpu' in log[0] else {1: 'one core'}.get(
            log[0]['threads'], f'{log[0]["threads"]} cores') for log in logs})
        table.append([f'`{command}`', what, f'{took} on {" or ".join(machines)}'])
    return table


def broken_counts():
    """Return rows of a picture of 32 faces and how many of them a language model called broken, at each count."""
    counts, names = read_log(p2_gan.COUNTS), {record['what']: record['label'] for record in read_log(p2_gan.SAMPLES)}
    shipped = {'p1_vae': sha256(p1_vae.CKPT), 'p2_gan': sha256(p2_gan.CKPT)}
    table = []
    for what in ['p1_vae', 'p2_gan'] + sorted(name for name in names if '/' in name) + ['real']:
        found = [str(record['broken']) for kind in ('first_count', 'count') for record in counts
                 if (record['kind'], record['what']) == (kind, what)
                 and shipped.get(what, record.get('sha256')) == record.get('sha256')]
        table.append([names[what] if what != 'real' else 'real faces', ', then '.join(found)])
    for picture in blind_counts()['pictures']:
        table.append([picture['name'], ' and '.join(map(str, picture['broken']))])
    return table


def blind_counts():
    """Return the record of the count of pictures of ours and of public reports by one reader, in two rounds."""
    record, = [record for record in read_log(p2_gan.COUNTS) if record['kind'] == 'blind_count']
    return record


def results_tables():
    """Return the tables of report/results.md, as rows of texts."""
    results, shipped = digit_results(), p1_vae.DEFAULTS['lambda_kl']
    vae = [[f'{row[0]:.1e}', row[1], row[2], row[-1]]
           for row in sorted(vae_table(), key=lambda row: (row[0] != shipped, row[0]))]
    gan = [[record['label'], rounded(record['images'], 0) if record['images'] else '', rounded(record['own'], 2),
            rounded(record['clear'], 3), rounded(record['frechet'], 1), rounded(record['nearest'], 3)]
           for record in read_log(p2_gan.SAMPLES)]
    return [vae, csv_rows('table1_5'), gan, broken_counts(), digit_table(results, ASKED + MORE, 'asked', SEEDS),
            digit_table(results, ABLATION, 'asked', [0]), digit_table(results, OTHERS, 'others', SEEDS),
            csv_rows('table5'), script_speeds()]


def digit_table(results, rows, directions, seeds):
    """Return a label and the cell of each scenario for each of rows, which are like those of ASKED."""
    table = []
    for label, row, key in rows:
        table.append([label])
        for scenario in sorted(DIRECTIONS[directions].items()):
            by_seed = accuracies(results[row], *scenario, key=key)
            mean, spread = table_cell([by_seed[seed] for seed in seeds], 1)
            table[-1].append(f'{mean} ± {spread} ({len(seeds)})' if spread else f'{mean} ({len(seeds)})')
    return table


def script_speeds():
    records = read_log(os.path.join(CHECKPOINTS, 'benchmark_scripts.jsonl'))
    return [[f'`bash {record["script"]}`', rounded(record['images'], 0), record['torch'],
             f'{rounded(record["seconds"], 1)} s', f'{rounded(record["import_seconds"], 1)} s',
             f'{rounded(record["megabytes"], 0)} MB']
            for record in sorted(records, key=lambda record: (record['script'], record['torch']))]


# ------------------------------------------------------------------------------- what is written

def with_tables(text, tables):
    """Return a Markdown text in which the rows of its tables, one after another, are these rows of texts."""
    parts = re.split(r'(?<= --- \|\n)(?:\|.*\n)+', text)
    if len(parts) != len(tables) + 1:
        raise UserError(f'a page has {len(parts) - 1} tables, and build.py makes {len(tables)}: mend the page')
    rows = [''.join(f'| {" | ".join(row)} |\n' for row in table) for table in tables]
    return ''.join(part + row for part, row in zip(parts, rows + ['']))


def pages(texts):
    """Return {path: text} of README.md, between its markers, and report/results.md, with their tables made anew."""
    readme = read(README)
    for name, part in readme_parts(texts).items():
        begin, end = f'<!-- {name}: {COMMAND} -->', f'<!-- end of {name} -->'
        if begin in readme:                # a part without markers is left out
            before, rest = readme.split(begin)
            readme = f'{before}{begin}\n{part}{end}{rest.split(end)[1]}'
    return {README: readme, RESULTS: with_tables(read(RESULTS), results_tables())}


def write_pdf(path, texts):
    try:
        import typst
    except ImportError:
        raise UserError('typst is not installed: pip install typst==0.15.2') from None

    try:
        write_whole(path, lambda temporary: typst.compile(
            os.path.join(ROOT, 'report', 'report.typ'), output=temporary, root=ROOT, ignore_system_fonts=True,
            sys_inputs=dict(values=json.dumps(texts))))
    except typst.TypstError as error:
        raise UserError(f'report.typ does not compile ({error}): if a figure is missing, let the --plot of its problem '
                        'draw it') from error


def build(args):
    texts = values()
    for path, text in pages(texts).items():
        write_text(path, text)
    write_pdf(args.out, texts)
    print(f'{README}, {RESULTS} and {args.out} are written')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=os.path.expanduser, default=PDF, help='PDF to write (hw3_studentID.pdf)')
    run_command(build, parser.parse_args(argv))


if __name__ == '__main__':
    main()
