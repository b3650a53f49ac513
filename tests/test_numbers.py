"""Every number in README.md and report/results.md comes from a committed log, or from a table that --plot measured.

    python3 tests/test_numbers.py --write      renew the results in both from the logs

With HW3_DATA set to a data folder, the shipped weights are measured again on its test images.
"""
import csv
import glob
import json
import os
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import p1_vae                                                                       # noqa: E402
import p2_gan                                                                       # noqa: E402
import p3_dann                                                                      # noqa: E402
import p4_adda                                                                      # noqa: E402
import p5_conditional                                                               # noqa: E402
from datasets import (DIRECTIONS, SEEDS, SOURCE_OF, FaceImages, read_digits, rounded, scenario_name,         # noqa: E402
                      table_lines)
from models import (VAE, DigitNet, Generator, accuracy, file_sum, load_checkpoint,  # noqa: E402
                    load_net, read_log, rows_of)

CHECKPOINTS = os.path.join(ROOT, 'checkpoints')
README = os.path.join(ROOT, 'README.md')
RESULTS = os.path.join(ROOT, 'report', 'results.md')
COMMAND = 'python3 tests/test_numbers.py --write'
CPU = torch.device('cpu')
TARGETS = sorted(SOURCE_OF)


def log_of(name):
    """The log of a checkpoint in checkpoints/."""
    return read_log(os.path.join(CHECKPOINTS, name + '.jsonl'))


def one(records, **wanted):
    """The only record that has these values."""
    found = [record for record in records
             if all(record.get(name) == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def accuracies(records, target, source, key='accuracy'):
    """Accuracies in percent of a scenario, in the order of their seeds."""
    return [100 * record[key] for record in sorted(records, key=lambda record: record['seed'])
            if (record['target'], record['source']) == (target, source)]


def cell(values):
    """Mean, standard deviation and number of accuracies."""
    spread = ' ± ' + rounded(np.std(values, ddof=1), 1) if len(values) > 1 else ''
    return f'{rounded(np.mean(values), 1)}{spread} ({len(values)})'


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
    found = rounded(100 * one(log_of('p5_conditional'), kind='test')['accuracy'], 1)
    lines.append('| diffusion (an extra) | digits that a digit classifier reads as what was asked for, in % '
                 f'| {found} | {rounded(100 * p5_conditional.PUBLISHED, 1)}, by an ACGAN and another classifier |')
    rows = [rows_of(problem)[row] for problem, row in (
        ('p3_dann', 'source'), ('p3_dann', 'dann_entropy'), ('p4_adda', 'improved'), ('p3_dann', 'target'))]
    lines += ['', '| digits: accuracy in % | lower bound | problem 3 | problem 4 | upper bound '
              '| hw3_p3.sh / hw3_p4.sh (seed 0) | best public report: 3 / 4 |', '| --- ' * 7 + '|']
    for (target, source), *published in zip(sorted(SOURCE_OF.items()), p3_dann.PUBLISHED, p4_adda.PUBLISHED):
        values = [accuracies(records, target, source) for records in rows]
        assert all(len(one) == len(SEEDS) for one in values)
        cells = [rounded(np.mean(one), 1) for one in values]
        of_seed_0 = [rounded(one[0], 2) for one in values[1:3]]
        lines.append(f'| {scenario_name(target, source)} | {" | ".join(cells)} | {" / ".join(of_seed_0)} '
                     f'| {" / ".join(rounded(value, 1) for value in published)} |')
    lines += ['', f'The first four columns are means over {len(SEEDS)} seeds. All our accuracies are on the test '
              'images of the second domain.']
    return '\n'.join(lines) + '\n'


# command, logs of its runs below checkpoints/, directions if they are a table's, and what is trained
TRAININGS = (('p1_vae.py --train', ('p1_vae',), None, 'the VAE'), ('p2_gan.py --train', ('p2_gan',), None, 'the GAN'),
             ('p3_dann.py --train --target svhn', ('p3_dann_svhn',), None, 'one run of DANN + entropy'),
             ('p4_adda.py --train --target svhn', ('p4_adda_svhn',), None, 'one run of improved ADDA'),
             ('p3_dann.py --train', ('p3_dann_*', 'p3_runs/*/*'), 'asked', 'the table of problem 3'),
             ('p4_adda.py --train', ('p4_adda_*', 'p4_runs/*/*'), 'asked', 'the table of problem 4'),
             ('p3_dann.py --train --directions others', ('p3_runs/*/*',), 'others',
              'three more pairs of domains'),
             ('p4_adda.py --train --directions others', ('p4_runs/*/*',), 'others',
              'the same by improved ADDA'),
             ('p5_conditional.py --train', ('p5_conditional',), None, 'the diffusion model'))


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
    return f'{rounded(minutes[0], 0)} minutes on {machine}'


def trainings():
    """The commands of README.md, with the time and the machine of the shipped runs."""
    lines = ['| command | trains | time |', '| --- | --- | --- |']
    lines += [f'| `python3 {command}` | {what} | {training_time(patterns, directions)} |'
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
        records = [record for record in rows_of(problem)[row] if record['seed'] in seeds]
        values = [accuracies(records, *one, key=key) for one in scenarios]
        assert all(len(one) == len(seeds) for one in values), f'{label}: a run is missing'
        lines.append(f'| {label} | ' + ' | '.join(map(cell, values)) + ' |')
    return lines


def all_results():
    """report/results.md, written from the logs alone."""
    ablation = [(label, 'p4_adda', p4_adda.name_of(dict(pieces=pieces)), 'accuracy')
                for label, pieces, _ in p4_adda.ROWS + p4_adda.CONTROLS]
    parts = ([f'This page is written by `{COMMAND}` from the logs in checkpoints/.', '', '## Problem 1'] + rates(),
             ['## Problem 2'] + samples(),
             ['## Problems 3 and 4', '', ABOUT_DIGITS] + digit_table('asked', ASKED + MORE),
             ['From plain ADDA to improved ADDA (+ self-training), one piece added at a time, and two controls, all of '
              'seed 0 (the beginning of p4_adda.py and section 4-3 of the report explain the pieces):'
              ] + digit_table('asked', ablation, seeds=(0,)),
             ['Three more pairs of domains, which other years of the course ask for (the upper bound of a target is '
              'that of the first table):'] + digit_table('others', OTHERS),
             ['## Problem 5'] + conditional(),
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
    """Scores of 1,000 drawn digits of each setting of problem 5."""
    with open(os.path.join(ROOT, 'figures', 'table5.csv'), encoding='utf8') as file:
        rows = list(csv.reader(file))
    return ['', '1,000 drawn digits of MNIST-M of each setting, 100 of each class. The judge is the upper bound of '
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
            seconds = record['one_process_seconds']
            single = (f'{rounded(seconds, 1)} s with one process, {rounded(seconds / record["processes_ratio"], 1)} s '
                      f'with {record["cores"]}')
        lines.append(f'| `bash {record["script"]}` | {record["images"]:,} | {record["torch"]} '
                     f'| {rounded(record["seconds"], 1)} s | {rounded(record["import_seconds"], 1)} s | {single} '
                     f'| {rounded(record["megabytes"], 0)} MB |')
    return lines


PARTS = dict(results=results, training=trainings)       # of README.md, between markers


def bounds_of(text, name):
    """Where the part of a text between its two markers begins and ends."""
    start = f'<!-- {name}: {COMMAND} -->\n'
    return text.index(start) + len(start), text.index(f'<!-- end of {name} -->')


@pytest.mark.parametrize('name', sorted(PARTS))
def test_readme_says_what_the_logs_say(name):
    with open(README, encoding='utf8') as file:
        text = file.read()
    start, end = bounds_of(text, name)
    assert text[start:end] == '\n' + PARTS[name]() + '\n'


def test_results_say_what_the_logs_say():
    with open(RESULTS, encoding='utf8') as file:
        assert file.read() == all_results()


# problem and name of every shipped net
SHIPPED = [(module.PROBLEM, module.PROBLEM) for module in (p1_vae, p2_gan, p5_conditional)] + [
    (module.PROBLEM, f'{module.PROBLEM}_{target}') for module in (p3_dann, p4_adda) for target in TARGETS]


@pytest.mark.parametrize('problem,name', SHIPPED)
def test_shipped_checkpoints_and_logs_agree(problem, name):
    checkpoint, log = load_checkpoint(os.path.join(CHECKPOINTS, name + '.pth'), problem), log_of(name)
    test = one(log, kind='test')
    assert checkpoint['metrics'] == {key: test[key] for key in checkpoint['metrics']}
    assert checkpoint['settings'] == one(log, kind='run')['settings']
    assert checkpoint['step'] == test.get('chosen_step', test['step'])


def test_shipped_checkpoints_have_their_sums():
    with open(os.path.join(CHECKPOINTS, 'SHA256SUMS')) as file:
        sums = dict(reversed(line.split()) for line in file)
    assert len(sums) >= 9
    for name, value in sums.items():
        assert file_sum(os.path.join(CHECKPOINTS, name)) == value, name


def test_results_of_the_digits_are_those_of_their_logs():
    """Every run of the two tables, each with its log, made by one method; shipped is seed 0."""
    for module in (p3_dann, p4_adda):
        records = [record for row in rows_of(module.PROBLEM).values() for record in row]
        assert len({record['log'] for record in records}) == len(records)
        for record in records:
            log = read_log(os.path.join(ROOT, record['log']))
            test, settings = one(log, kind='test'), one(log, kind='run')['settings']
            assert all(test[name] == record[name] for name in test if name.endswith('accuracy'))
            assert module.name_of(settings) == record['row'] and settings['seed'] == record['seed'] in SEEDS
            assert {name: settings[name] for name in settings if name.isupper()} == json.loads(
                json.dumps(module.constants()))
            assert all(settings[name] == module.DEFAULTS[name] for name in ('steps', 'batch_size'))


@pytest.mark.parametrize('name,rows,directions', [
    ('table3', p3_dann.table_rows, 'asked'), ('table4', lambda: p4_adda.table_rows('asked'), 'asked'),
    ('table4_others', lambda: p4_adda.table_rows('others'), 'others')])
def test_tables_of_the_report_are_those_of_the_logs(name, rows, directions):
    """The report reads figures/*.csv, which --plot has written."""
    with open(os.path.join(ROOT, 'figures', name + '.csv'), newline='', encoding='utf8') as file:
        assert list(csv.reader(file)) == table_lines(rows(), DIRECTIONS[directions])[0]


def test_improved_adda_is_above_dann_for_every_seed():
    """So says the report, in 4-1."""
    dann, adda = rows_of('p3_dann')['dann_entropy'], rows_of('p4_adda')['improved']
    for scenario in SOURCE_OF.items():
        pairs = list(zip(accuracies(dann, *scenario), accuracies(adda, *scenario)))
        assert len(pairs) == len(SEEDS) and all(ours < improved for ours, improved in pairs)


def test_logs_hold_no_more_than_figures_need():
    for problem in ('p3_dann', 'p4_adda'):
        for record in [record for row in rows_of(problem).values() for record in row]:
            assert len(read_log(os.path.join(ROOT, record['log']))) <= 70, record['log']


needs_data = pytest.mark.skipif('HW3_DATA' not in os.environ, reason='HW3_DATA names no data folder')


@needs_data
@pytest.mark.parametrize('problem,name', [row for row in SHIPPED if row[0] != 'p5_conditional'])   # it takes minutes
def test_shipped_weights_measure_what_the_logs_say(problem, name):
    data_dir, path = os.environ['HW3_DATA'], os.path.join(CHECKPOINTS, name + '.pth')
    test = one(log_of(name), kind='test')
    if problem == 'p1_vae':
        net = load_net(VAE, path, problem, CPU)[0]
        found = p1_vae.measure(net, FaceImages(data_dir, 'test').images, CPU)['mse'], test['mse']
    elif problem == 'p2_gan':
        net, judge = load_net(Generator, path, problem, CPU)[0], load_net(VAE, p2_gan.JUDGE, 'p1_vae', CPU)[0]
        found = (p2_gan.measure(net, judge, FaceImages(data_dir, 'test').images, CPU)['frechet'], test['frechet'])
    else:
        digits = read_digits(data_dir, name.split('_')[-1], 'test')
        net = load_net(DigitNet, path, problem, CPU)[0]
        found = accuracy(net, digits.images, digits.labels, CPU), test['accuracy']
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_grader_versions_are_the_courses():
    course = os.path.join(ROOT, '..', 'shared', 'assignment', 'requirements_course.txt')
    if not os.path.exists(course):
        pytest.skip('the course\'s list is not beside the repository')
    with open(course) as file:
        wanted = sorted(line.strip() for line in file if line.strip())
    with open(os.path.join(ROOT, 'requirements.txt')) as file:
        found = sorted(line.split(';')[0] for line in file if '== "3.6"' in line)
    assert found == wanted


def write():
    with open(README, encoding='utf8') as file:
        text = file.read()
    for name, part in PARTS.items():
        start, end = bounds_of(text, name)
        text = text[:start] + '\n' + part() + '\n' + text[end:]
    with open(README, 'w', encoding='utf8') as file:
        file.write(text)
    with open(RESULTS, 'w', encoding='utf8') as file:
        file.write(all_results())


if __name__ == '__main__':
    if sys.argv[1:] != ['--write']:
        sys.exit('usage: python3 tests/test_numbers.py --write')
    write()
