"""The report, README.md and results.md say what the logs say, and the logs are those of the shipped weights."""
import os
import re
import shutil
import subprocess

import p1_vae
import p2_gan
import p3_dann
import p4_adda
import p5_diffusion
import pytest
import torch
from conftest import ROOT

from datasets import DIRECTIONS, SOURCE_OF, FaceImages, read_digits
from models import (CHECKPOINTS, VAE, DigitNet, Generator, accuracy, base_of, given_flags, load_checkpoint, load_net,
                    plain, read_log, read_results, run_path, sha256)
from report import build, figures

COURSE = os.path.join(ROOT, '..', 'shared', 'assignment', 'requirements_course.txt')
CPU = torch.device('cpu')
SHIPPED = dict(                            # name of every shipped net, and its problem
    p1_vae='p1_vae', p2_gan='p2_gan', p5_diffusion='p5_diffusion', p6_acgan='p6_acgan', p6_acgan_paper='p6_acgan',
    p6_acgan_smiling='p6_acgan',
    **{f'{problem}_{target}': problem for problem in ('p3_dann', 'p4_adda') for target in SOURCE_OF})
DIGIT_RUNS = [(script, row, runs) for script, shipped_row in ((p3_dann, 'dann_entropy'), (p4_adda, 'improved'))
              for row, runs in read_results(script.PROBLEM, shipped_row).items()]


def test_report_shows_figures_that_are_there_and_types_no_measured_number():
    """Results are decimals, percentages or at least three digits long; the prose has none."""
    for name in [name for name in os.listdir(os.path.join(ROOT, 'report')) if re.match(r'(p\d|report)\.typ', name)]:
        text = build.read('report', name)
        for figure in re.findall(r'(?:#picture|#printed|image)\("(?:\.\./figures/)?([\w.]+)"', text):
            assert os.path.exists(os.path.join(ROOT, 'figures', figure)), figure
        prose = text[text.index('#align(center)'):] if name == 'report.typ' else text
        # 0.8920 is what a student's report prints
        prose = re.sub(r'Fall 202[01]|NTU-DLCV-2020|0\.8920|(?:width|narrow): \d+%|size: [\d.]+pt|v\([\d.]+em\)', '',
                       prose)
        assert not re.findall(r'(?<![\w.])\d+\.\d+(?![\w.])|\d+ ?%|\b\d{3,}\b', prose), name


def test_tables_of_the_report_are_those_of_the_logs(tmp_path):
    for name, rows, directions in (('table3', p3_dann.table_rows(), 'asked'),
                                   ('table4', p4_adda.table_rows('asked'), 'asked'),
                                   ('table4_others', p4_adda.table_rows('others'), 'others')):
        assert build.csv_rows(name) == figures.table_lines(rows, DIRECTIONS[directions])[1:]
    p5_diffusion.write_results(str(tmp_path / 'table5.csv'), read_log(p5_diffusion.SCORES))
    assert (tmp_path / 'table5.csv').read_text(encoding='utf8') == build.read('figures', 'table5.csv')


def test_readme_and_results_say_what_the_logs_say():
    for path, text in build.pages(build.values()).items():
        assert build.read(path) == text, f'{path}: run {build.COMMAND}'


def test_committed_report_is_what_the_logs_and_figures_give(tmp_path):
    pytest.importorskip('typst')
    for name in ('first.pdf', 'second.pdf'):
        build.write_pdf(str(tmp_path / name), build.values())
        assert sha256(str(tmp_path / name)) == sha256(build.PDF), f'run {build.COMMAND}'


@pytest.mark.parametrize('name', sorted(SHIPPED))
def test_shipped_checkpoints_and_logs_and_sums_agree(name):
    path = os.path.join(CHECKPOINTS, name)
    checkpoint, log = load_checkpoint(path + '.pth', SHIPPED[name]), read_log(path + '.jsonl')
    assert (log[0]['kind'], log[-1]['kind']) == ('run', 'test') and checkpoint['settings'] == log[0]['settings']
    assert checkpoint['metrics'] == {key: log[-1][key] for key in checkpoint['metrics']}
    assert checkpoint['step'] == log[-1].get('chosen_step', log[-1]['step'])
    if name < 'p6':                        # no script fetches the others
        assert f'{sha256(path + ".pth")}  {name}.pth\n' in build.read('checkpoints', 'SHA256SUMS')


@pytest.mark.parametrize('script,row,runs', DIGIT_RUNS, ids=[row for _, row, _ in DIGIT_RUNS])
def test_runs_of_the_tables_are_of_one_method_and_complete(script, row, runs):
    seeds = {scenario: [] for scenario in SOURCE_OF.items()}
    for run in runs:
        log = read_log(run['log'])
        flags, constants = [{name: value for name, value in log[0]['settings'].items() if name.isupper() == upper}
                            for upper in (False, True)]
        assert run_path(script.PROBLEM, script.DEFAULTS, flags, row) == run['log'][:-len('.jsonl')] + '.pth'
        assert script.name_of(flags) == row and constants == plain(
            {name: getattr(script, name) for name in script.CONSTANTS}) and len(log) <= 70
        seeds.setdefault((run['target'], run['source']), []).append(run['seed'])
    wanted = [0] if row.startswith('up_to_') else list(figures.SEEDS)
    assert all(sorted(of_scenario) == wanted for of_scenario in seeds.values())


def test_train_tables_trains_every_run_that_has_no_log(tmp_path):
    shutil.copytree(os.path.join(ROOT, 'report'), str(tmp_path / 'report'))
    os.symlink(shutil.which('echo'), str(tmp_path / 'python3'))

    def logs_of_runs(root):
        commands = subprocess.check_output(
            ['bash', os.path.join(root, 'report', 'train_tables.sh')], universal_newlines=True,
            env=dict(os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')).splitlines()
        for program, *words in map(str.split, commands):
            script = p3_dann if program.endswith('p3_dann.py') else p4_adda
            settings = dict(script.DEFAULTS, **given_flags(script.parse_args(words), script.DEFAULTS))
            yield base_of(run_path(script.PROBLEM, script.DEFAULTS, settings, script.name_of(settings))) + '.jsonl'
    assert sorted(logs_of_runs(str(tmp_path))) == sorted(run['log'] for _, _, runs in DIGIT_RUNS for run in runs)
    assert not list(logs_of_runs(ROOT))


def test_improved_adda_is_above_dann_for_every_seed():
    runs = build.digit_results()
    for scenario in SOURCE_OF.items():
        dann, adda = [figures.accuracies(runs[row], *scenario) for row in ('dann_entropy', 'improved')]
        assert all(dann[seed] < adda[seed] for seed in figures.SEEDS)


@pytest.mark.skipif('HW3_DATA' not in os.environ, reason='HW3_DATA names no data folder to measure on')
@pytest.mark.parametrize('name', [name for name in sorted(SHIPPED) if name < 'p5'])        # diffusion takes minutes
def test_shipped_weights_measure_what_the_logs_say(name):
    data_dir, path, problem = os.environ['HW3_DATA'], os.path.join(CHECKPOINTS, name), SHIPPED[name]
    net = load_net(dict(p1_vae=VAE, p2_gan=Generator).get(problem, DigitNet), path + '.pth', problem, CPU)[0]
    if problem in ('p3_dann', 'p4_adda'):
        digits = read_digits(data_dir, name.split('_')[-1], 'test')
        measured = dict(accuracy=accuracy(net, digits.images, digits.labels, CPU))
    elif problem == 'p1_vae':
        measured = p1_vae.measure(net, FaceImages(data_dir, 'test').images, CPU)
    else:
        judge = load_net(VAE, p2_gan.JUDGE, 'p1_vae', CPU)[0]
        measured = p2_gan.measure(net, judge, FaceImages(data_dir, 'test').images, CPU)
    test = read_log(path + '.jsonl')[-1]
    assert measured == pytest.approx({key: test[key] for key in measured}, rel=2e-3)


@pytest.mark.skipif(not os.path.exists(COURSE), reason='the course\'s list is not beside the repository')
def test_grader_versions_are_the_courses():
    ours = [line.split(';')[0] for line in build.read('requirements.txt').splitlines() if '== "3.6"' in line]
    assert sorted(ours) == sorted(build.read(COURSE).split())
