"""python3 pN_*.py --train: two steps, a stop at any moment, and the run that goes on."""
import glob
import itertools
import json
import os
import shlex

import pytest
import torch
from conftest import ROOT, assert_one_line, kill_code, run, run_code, write_rows
from PIL import Image

import p1_vae
import p2_gan
import p3_dann
import p4_adda
import models
from datasets import read_digits, split_held_out, to_float
from models import load_checkpoint, save_checkpoint, with_statistics

# the real programs with small nets that log and save often
QUICK = ('import sys; sys.path.insert(0, {root!r}); import {name} as program; program.LOG_EVERY = 1; '
         'program.SAVE_EVERY = {every}; '
         'import models; models.pick_precision = lambda device: "fp32"; '    # else the clock may choose anew
         '{small}; program.main()')
SMALL = dict(
    p1_vae='program.NET = dict(latent_dim=6, channels=[4, 6, 8, 10]); program.LEARNING_RATE_WARM_UP = 5',
    p2_gan='program.NET = dict(latent_dim=6, channels=[4, 6, 8, 10]); '
           'program.DISCRIMINATOR_CHANNELS = [4, 6, 8, 10]; program.SCORED = 16; '
           'program.METHODS["r1"]["learning_rates"] = (1e-2, 1e-2)',          # else its faces stay flat
    p3_dann='program.NET = dict(channels=[4, 6, 8], dropout=0.5); program.LEARNING_RATE_WARM_UP = 5',
    p4_adda='program.NET = dict(channels=[4, 6, 8], dropout=0.5); program.LEARNING_RATE_WARM_UP = 2')
PROGRAMS = dict(p1_vae=p1_vae, p2_gan=p2_gan, p3_dann=p3_dann, p4_adda=p4_adda)
DIGITS = ('p3_dann', 'p4_adda')
FLAGS = {name: ['--target', 'mnistm'] for name in DIGITS}
SCORES = dict(p1_vae='loss', p2_gan='frechet')     # by which a checkpoint is chosen; else the last one
DIVERGE = dict(p2_gan='program.METHODS["r1"]["learning_rates"] = (1e30, 2e-4)')
USE = {name: ['--out', 'pred.csv', '--images', os.path.join(ROOT, 'tests', 'digits'), '--target', 'mnistm']
       for name in DIGITS}


class Trainer(object):
    """One program's --train and what it leaves behind."""

    def __init__(self, name):
        self.name = name
        self.flags, self.score = FLAGS.get(name, []), SCORES.get(name)
        self.diverge = DIVERGE.get(name, 'program.LEARNING_RATE = 1e30')

    def command(self, data_dir, ckpt, *flags, **options):
        code = QUICK.format(root=ROOT, name=self.name, every=options.get('every', 5),
                            small=SMALL[self.name])
        return ['python3', '-c', code, '--train', '--data_dir', data_dir, '--ckpt', ckpt,
                '--batch_size', '4', '--device', 'cpu'] + self.flags + list(flags)

    def train(self, *arguments, **options):
        return run_code(self.command(*arguments, **options))

    def train_pieces(self, data_dir, folder, rows, steps, before='pass'):
        """Train a run of problem 4 for each of rows, pieces.pth in folder, in one process, which is quicker."""
        command = self.command(data_dir, 'x.pth', '--steps', steps)
        command[2] = command[2].replace('program.main()', (
            f'{before}; words = sys.argv[1:]; words[words.index("x.pth")] = "{folder}/" + "{{}}.pth"; '
            '[program.main([word.format(pieces) for word in words] + ["--pieces", pieces]) '
            f'for pieces in {rows!r}]').replace('{{}}', '{}'))
        result = run_code(command)
        assert result.returncode == 0, result.stderr

    def kill_when(self, condition, arguments, **options):
        kill_code(self.command(*arguments, **options), condition)

    def weights(self, ckpt):
        return load_checkpoint(str(ckpt), self.name)['net']

    def state(self, ckpt):
        return load_checkpoint(str(ckpt).replace('.pth', '_last.pth'), models.state_of(self.name))


def records(ckpt, kind, ending='.jsonl'):
    """What the log says of a kind of record, without what the clock decides."""
    with open(str(ckpt).replace('.pth', ending)) as file:
        lines = [json.loads(line) for line in file.read().split('\n')[:-1]]
    return [{name: value for name, value in line.items() if name != 'images_per_second'}
            for line in lines if line['kind'] == kind]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope='module', params=sorted(PROGRAMS))
def trainer(request):
    return Trainer(request.param)


@pytest.fixture
def framed():
    """A program with which what models.Run does for all programs alike is tried."""
    return Trainer('p1_vae')


@pytest.fixture(scope='module')
def unbroken(trainer, data_dir, tmp_path_factory):
    """A run of thirty steps that nobody stopped."""
    ckpt = tmp_path_factory.mktemp('unbroken') / 'run.pth'
    result = trainer.train(data_dir, ckpt, '--steps', '30')
    assert result.returncode == 0, result.stderr
    return ckpt


def test_two_steps_of_the_real_net(trainer, data_dir, tmp_path):
    """Train, then draw from the new weights, or label with them."""
    ckpt = tmp_path / 'run.pth'
    (tmp_path / 'SHA256SUMS').write_text('')
    program = os.path.join(ROOT, trainer.name + '.py')
    # but for the faces of the GAN's score, of which fewer are drawn
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import {trainer.name} as program; program.SCORED = 100; '
            'program.main()')
    result = run(['python3', '-c', code, '--train', '--steps', '2', '--batch_size', '4', '--data_dir',
                  data_dir, '--ckpt', ckpt] + trainer.flags)
    assert result.returncode == 0, result.stderr
    assert 'step 2/2' in result.stdout and 'images/s' in result.stdout and 'left' in result.stdout
    assert sorted(os.listdir(str(tmp_path))) == ['SHA256SUMS', 'run.jsonl', 'run.pth',
                                                 'run_last.jsonl', 'run_last.pth']
    checkpoint = load_checkpoint(str(ckpt), trainer.name)
    assert checkpoint['settings']['steps'] == 2 and checkpoint['metrics']['images'] == 12
    assert checkpoint['command'].startswith(f'python3 {trainer.name}.py --train --steps 2')
    for name, value in checkpoint['metrics'].items():
        assert records(ckpt, 'test')[0][name] == value
    sums = run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path)
    assert sums.returncode == 0 and 'run.pth: OK' in sums.stdout
    used = run(['python3', program, '--ckpt', ckpt] + USE.get(trainer.name, ['--out', 'faces.png']), cwd=tmp_path)
    assert used.returncode == 0, used.stderr


def test_log(trainer, unbroken):
    assert [record['step'] for record in records(unbroken, 'train')] == list(range(1, 31))
    assert [record['step'] for record in records(unbroken, 'held_out')] == [5, 10, 15, 20, 25, 30]
    for record in records(unbroken, 'held_out'):
        if trainer.name == 'p1_vae':
            assert record['loss'] == pytest.approx(
                record['reconstruction'] + p1_vae.DEFAULTS['lambda_kl'] * record['kl'])
    start = records(unbroken, 'run')[0]
    assert start['training_images'] == 36 and start['held_out'] == 4
    assert start['settings']['seed'] == 0


def test_rule_of_choice(trainer, unbroken):
    """Of faces the least held-out score; of digits the last average, whatever it scores."""
    if trainer.score is None:
        average, net = trainer.state(unbroken)['average'], trainer.weights(unbroken)
        assert all(torch.equal(net[name], value) for name, value in average.items()
                   if name.endswith(('weight', 'bias')))
        return
    held_out = records(unbroken, 'held_out')
    least = min(held_out, key=lambda record: record[trainer.score])
    assert load_checkpoint(str(unbroken), trainer.name)['step'] == least['step']
    assert records(unbroken, 'test')[0]['chosen_step'] == least['step']


def test_kl_of_the_vae_counts_in_its_training(data_dir, tmp_path):
    """With a large weight the latent code says hardly anything; without one it says much."""
    found = []
    for weight in ('0', '1'):
        ckpt = tmp_path / (weight + '.pth')
        command = Trainer('p1_vae').command(data_dir, ckpt, '--steps', '60', '--lambda_kl', weight, every=60)
        command[2] = command[2].replace('program.main()', 'program.KL_WARM_UP = 1; program.main()')
        assert run_code(command).returncode == 0
        found.append(records(ckpt, 'train')[-1]['kl'])
    assert found[1] < 0.3 * found[0]


def test_training_of_the_vae_lowers_its_loss(data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    assert Trainer('p1_vae').train(data_dir, ckpt, '--steps', '200', every=100).returncode == 0
    losses = [record['reconstruction'] for record in records(ckpt, 'train')]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize('learner', ['generator', 'discriminator'])
@pytest.mark.parametrize('method', ['dcgan', 'sngan', 'wgan_gp', 'r1'])            # every loss and norm
def test_each_net_of_the_gan_learns_against_one_that_stays(data_dir, tmp_path, method, learner):
    """Against one that learns too, who leads at the end is left to the rounding of the processor."""
    trainer, ckpt = Trainer('p2_gan'), tmp_path / 'run.pth'
    rates = dict(generator=(5e-3, 0.0), discriminator=(0.0, p2_gan.METHODS[method]['learning_rates'][1]))
    # without a norm the scores of a narrow discriminator with its first weights hardly differ
    wide = method == 'r1' and learner == 'generator'
    steps, channels = ('40', [64, 128, 256, 512]) if wide else ('200', [4, 6, 8, 10])
    command = trainer.command(data_dir, ckpt, '--steps', steps, '--method', method, every=200)
    command[2] = command[2].replace('program.main()', f'program.METHODS["{method}"]["learning_rates"] = '
                                    f'{rates[learner]}; program.DISCRIMINATOR_CHANNELS = {channels}; program.main()')
    result = run_code(command)
    assert result.returncode == 0, result.stderr
    logged = records(ckpt, 'train')
    first, last = [{name: sum(record[name] for record in part) / 20 for name in ('real', 'fake')}
                   for part in (logged[:20], logged[-20:])]
    if learner == 'discriminator':
        assert last['real'] - last['fake'] > 2 * abs(first['real'] - first['fake'])
    else:                                  # with rates of 0 it moves by a hundredth
        assert last['fake'] > first['fake'] + 0.1


# the weight of what the encoder does against the discriminator, and what shows that it does
ADVERSARIES = dict(p3_dann=('REVERSAL', 'domain_accuracy', []),
                   p4_adda=('ADVERSARIAL', 'fooling_loss', ['--pieces', 'anchor']))


@pytest.mark.parametrize('name', DIGITS)
def test_encoder_works_against_the_discriminator(data_dir, tmp_path, name):
    """An encoder that works with it, by a weight of the other sign, lets it tell the domains apart better."""
    constant, scalar, flags = ADVERSARIES[name]
    found, weights = [], []
    for weight in (5.0, -5.0):
        ckpt = tmp_path / f'{weight}.pth'
        command = Trainer(name).command(data_dir, ckpt, '--steps', '120', *flags, every=120)
        command[2] = command[2].replace('program.main()', f'program.{constant} = {weight}; program.main()')
        result = run_code(command)
        assert result.returncode == 0, result.stderr
        found.append(sum(record[scalar] for record in records(ckpt, 'train')[-40:]) / 40)
        weights.append(Trainer(name).state(ckpt)['discriminator'])
    assert found[0] < 0.95 * found[1]
    assert not same(*weights)


@pytest.mark.parametrize('name,flags,seen', [
    ('p3_dann', ['--setting', 'dann'], 'mnistm'), ('p3_dann', ['--setting', 'source'], 'usps'),
    ('p4_adda', ['--pieces', 'normalise'], 'mnistm')])
def test_statistics_are_those_of_the_domain(data_dir, tmp_path, name, flags, seen):
    """Of the target for adapted nets, of the source for the lower bound."""
    trainer, ckpt = Trainer(name), tmp_path / 'run.pth'
    augment = ['--augment', '0'] if name == 'p3_dann' else []
    result = trainer.train(data_dir, ckpt, '--steps', '12', *(flags + augment))
    assert result.returncode == 0, result.stderr
    net, _ = models.load_net(models.DigitNet, str(ckpt), name, torch.device('cpu'))
    before = {key: value.clone() for key, value in net.state_dict().items() if 'running' in key}
    for domain in ('mnistm', 'usps'):
        images = read_digits(data_dir, domain, 'train').images
        rows = split_held_out(len(images))[0]
        renewed = with_statistics(net, to_float(images[rows]), torch.device('cpu')).state_dict()
        close = all(torch.allclose(value, renewed[key], rtol=1e-3, atol=1e-5) for key, value in before.items())
        assert close == (domain == seen), domain


def test_same_seed_same_weights_another_seed_others(trainer, data_dir, tmp_path, unbroken):
    again, other = tmp_path / 'again' / 'run.pth', tmp_path / 'other' / 'run.pth'
    assert trainer.train(data_dir, again, '--steps', '30').returncode == 0
    assert trainer.train(data_dir, other, '--steps', '30', '--seed', '1').returncode == 0
    assert same(trainer.weights(unbroken), trainer.weights(again))
    assert not same(trainer.weights(unbroken), trainer.weights(other))


def test_killed_run_goes_on_as_if_nothing_had_happened(trainer, data_dir, tmp_path, unbroken):
    """Killed twice, in step 7 or later and in step 17 or later: same curve, same weights."""
    ckpt = tmp_path / 'run.pth'

    def reached(step):
        return lambda: ((tmp_path / 'run_last.jsonl').exists() and any(
            record['step'] >= step for record in records(ckpt, 'train', '_last.jsonl')))
    trainer.kill_when(reached(7), (data_dir, ckpt, '--steps', '30'))
    trainer.kill_when(reached(17), (data_dir, ckpt, '--resume'))
    assert not ckpt.exists() and not (tmp_path / 'run.jsonl').exists()
    result = trainer.train(data_dir, ckpt, '--resume')
    assert result.returncode == 0, result.stderr
    for kind in ('train', 'held_out', 'test'):
        assert records(ckpt, kind) == records(unbroken, kind)
    assert same(trainer.weights(unbroken), trainer.weights(ckpt))
    assert load_checkpoint(str(ckpt), trainer.name)['command'].endswith('--steps 30')


def test_stopped_run_leaves_the_old_checkpoint_and_its_log_alone(framed, data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    save_checkpoint(str(ckpt), dict(problem=framed.name))
    for name in ('run.jsonl', 'SHA256SUMS'):
        (tmp_path / name).write_text('old')
    before = ckpt.read_bytes()
    framed.kill_when((tmp_path / 'run_last.pth').exists, (data_dir, ckpt, '--steps', '2000'))
    assert ckpt.read_bytes() == before
    for name in ('run.jsonl', 'SHA256SUMS'):
        assert (tmp_path / name).read_text() == 'old'


def test_file_of_another_kind_is_not_overwritten(framed, data_dir, tmp_path):
    (tmp_path / 'labels.csv').write_text('image_name,label')
    save_checkpoint(str(tmp_path / 'other.pth'), dict(problem='p9_other'))
    for name, words in (('labels.csv', 'is torn, or no checkpoint'), ('other.pth', 'is a checkpoint of p9_other')):
        before = (tmp_path / name).read_bytes()
        assert_one_line(framed.train(data_dir, tmp_path / name, '--steps', '1'), name, words, 'name another file')
        assert (tmp_path / name).read_bytes() == before
    assert len(os.listdir(str(tmp_path))) == 2


def test_killed_while_saving(framed, data_dir, tmp_path):
    """The temporary file is there, so the kill falls into a save: the save before it still loads."""
    ckpt = tmp_path / 'run.pth'
    state = tmp_path / 'run_last.pth'
    for _ in range(3):
        framed.kill_when(lambda: state.exists() and glob.glob(str(tmp_path / '.*run_last.pth')),
                  (data_dir, ckpt, '--steps', '5000', '--resume'), every=1)
        assert framed.state(ckpt)['step'] >= 1
    assert not ckpt.exists()
    before = framed.state(ckpt)['step']
    framed.kill_when(lambda: framed.state(ckpt)['step'] > before,
              (data_dir, ckpt, '--resume'), every=1)
    assert len(glob.glob(str(tmp_path / '.*'))) <= 1             # leftovers of kills do not pile up


def test_resume_needs_no_run_and_finishes_a_finished_one(framed, data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    result = framed.train(data_dir, ckpt, '--steps', '2', '--resume')
    assert result.returncode == 0 and 'starting a new run' in result.stdout
    first = framed.weights(ckpt)
    ckpt.unlink()
    assert framed.train(data_dir, ckpt, '--resume').returncode == 0
    assert same(first, framed.weights(ckpt))
    assert len(records(ckpt, 'test')) == 1


def test_new_run_over_a_finished_one_is_never_taken_for_it(data_dir, tmp_path):
    """Killed before its first save, it has nothing to resume: not the finished run's state either."""
    trainer, ckpt = Trainer('p1_vae'), tmp_path / 'run.pth'
    assert trainer.train(data_dir, ckpt, '--steps', '2').returncode == 0
    trainer.kill_when(lambda: not (tmp_path / 'run_last.pth').exists(),
                      (data_dir, ckpt, '--steps', '2000'), every=2000)
    assert len(records(ckpt, 'train')) == 2                      # the finished run's log, untouched
    result = trainer.train(data_dir, ckpt, '--resume', '--steps', '3')
    assert 'starting a new run' in result.stdout
    assert len(records(ckpt, 'train')) == 3


def test_unfinished_run_is_not_overwritten(framed, data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    framed.kill_when((tmp_path / 'run_last.pth').exists, (data_dir, ckpt, '--steps', '2000'), every=1)
    assert_one_line(framed.train(data_dir, ckpt, '--steps', '2000'), 'add --resume')
    assert_one_line(framed.train(data_dir, ckpt, '--resume', '--seed', '5'), 'started with seed 0, and now it is 5')


def test_resume_with_other_data(framed, own_data_dir, tmp_path):
    """Another number of images is another data folder."""
    ckpt = tmp_path / 'run.pth'
    framed.kill_when((tmp_path / 'run_last.pth').exists, (own_data_dir, ckpt, '--steps', '2000'), every=1)
    folder = os.path.join(own_data_dir, 'face', 'train')
    with open(folder + '.csv') as file:
        lines = file.readlines()
    os.remove(os.path.join(folder, lines[-1].split(',')[0]))
    with open(folder + '.csv', 'w') as file:
        file.writelines(lines[:-1])
    assert_one_line(framed.train(own_data_dir, ckpt, '--resume'), 'was started with held_out 4, and now it is 3',
                    'delete the file to start anew')


def test_resume_with_other_images_of_the_same_number(framed, own_data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    framed.kill_when((tmp_path / 'run_last.pth').exists, (own_data_dir, ckpt, '--steps', '2000'), every=1)
    Image.new('RGB', (64, 64), (1, 2, 3)).save(os.path.join(own_data_dir, 'face', 'train', '00003.png'))
    assert_one_line(framed.train(own_data_dir, ckpt, '--resume'), 'was started with data',
                    'delete the file to start anew')


def test_resume_with_another_method(framed, data_dir, tmp_path):
    """A constant of the method that was changed in the script since."""
    ckpt = tmp_path / 'run.pth'
    framed.kill_when((tmp_path / 'run_last.pth').exists, (data_dir, ckpt, '--steps', '2000'), every=1)
    command = framed.command(data_dir, ckpt, '--resume')
    command[2] = command[2].replace('program.main()', 'program.AVERAGE_DECAY = 0.5; program.main()')
    assert_one_line(run_code(command), 'AVERAGE_DECAY 0.99', 'and now it is 0.5')


def test_names_that_differ_behind_a_dot_are_different_runs(framed, data_dir, tmp_path):
    for name in ('kl0.01', 'kl0.001'):
        assert framed.train(data_dir, tmp_path / name, '--steps', '2').returncode == 0
    assert sorted(os.listdir(str(tmp_path))) == sorted(
        name + ending for name in ('kl0.01', 'kl0.001') for ending in ('', '.jsonl', '_last.jsonl', '_last.pth'))


def test_out_of_memory(framed, data_dir, tmp_path):
    """A batch that is larger than the memory a process may have: one line that names the flag, and no file."""
    command = framed.command(data_dir, tmp_path / 'run.pth')
    command[command.index('--batch_size') + 1] = str(10 ** 7)
    words = ' '.join(shlex.quote(str(word)) for word in command)
    assert_one_line(run(['bash', '-c', 'ulimit -v 12000000; ' + words]), 'not enough memory', '--batch_size')
    assert os.listdir(str(tmp_path)) == []


def test_init_takes_weights_but_not_the_run(data_dir, tmp_path):
    trainer = Trainer('p1_vae')
    first, ckpt = tmp_path / 'first.pth', tmp_path / 'run.pth'
    assert trainer.train(data_dir, first, '--steps', '30').returncode == 0
    result = trainer.train(data_dir, ckpt, '--steps', '1', '--init', first, '--lambda_kl', '3e-4')
    assert_one_line(trainer.train(data_dir, tmp_path / 'x.pth', '--init', tmp_path / 'run_last.pth'),
                    'p1_vae (training state)')
    assert result.returncode == 0, result.stderr
    assert records(ckpt, 'train')[0]['reconstruction'] < records(first, 'train')[0]['reconstruction']


@pytest.mark.parametrize('method', sorted(p2_gan.METHODS))
def test_methods_of_the_gan(data_dir, tmp_path, method):
    """Seventeen steps of each, some of them stopped and resumed, with all that the learning curves need."""
    trainer, one, two = Trainer('p2_gan'), tmp_path / 'one.pth', tmp_path / 'two.pth'
    assert trainer.train(data_dir, one, '--steps', '17', '--method', method).returncode == 0
    if method in ('dcgan', 'wgan_gp', 'r1'):
        trainer.kill_when((tmp_path / 'two_last.pth').exists, (data_dir, two, '--steps', '17', '--method', method))
        result = trainer.train(data_dir, two, '--resume')
        assert result.returncode == 0, result.stderr
        assert same(trainer.weights(one), trainer.weights(two))
        for kind in ('train', 'held_out', 'test'):
            assert records(one, kind) == records(two, kind)
    every = {'real', 'fake', 'held_out', 'discriminator_loss', 'discriminator_gradient', 'learning_rate'}
    learns, penalty_every = {'generator_loss', 'generator_gradient'}, p2_gan.PENALTIES.get(method, {}).get('every')
    for record in records(one, 'train'):
        wanted = every | ({'penalty'} if penalty_every and record['step'] % penalty_every == 0 else set())
        if record['step'] % p2_gan.METHODS[method]['generator_every'] == 0:
            wanted = wanted | learns
        assert set(record) == wanted | {'kind', 'step'}
    assert [step for step, _ in load_checkpoint(str(one), 'p2_gan')['progress']] == [0, 5, 10]
    assert all(images.shape == (8, 3, 64, 64)
               for _, images in load_checkpoint(str(one), 'p2_gan')['progress'])


def test_penalty_counts_with_its_weight(data_dir, tmp_path):
    """Of sixteen steps the last has R1's penalty, sixteen times; without it the discriminator becomes another."""
    found, rows = [], ((0.05, 16), (0.8, 16), (0.05, 17))
    command = Trainer('p2_gan').command(data_dir, 'x.pth', '--steps', '16', every=16)
    command[2] = command[2].replace('program.main()', (
        f'words = sys.argv[1:]; place = words.index("x.pth"); '
        '[(program.PENALTIES["r1"].update(weight=weight, every=every), '
        f'program.main(words[:place] + ["{tmp_path}/%g_%d.pth" % (weight, every)] + words[place + 1:])) '
        f'for weight, every in {rows!r}]'))
    result = run_code(command)
    assert result.returncode == 0, result.stderr
    for weight, every in rows:
        state = load_checkpoint(str(tmp_path / f'{weight:g}_{every}_last.pth'), models.state_of('p2_gan'))
        optimizer = state['discriminator_optimizer']
        found.append(optimizer['state'][optimizer['param_groups'][0]['params'][0]]['exp_avg'])
    small, large, none = found
    # the step's first moment is linear in the gradient, and beta 1 is 0
    assert torch.allclose(large - none, 16 * (small - none), rtol=1e-2, atol=1e-6 * float(large.abs().max()))
    assert (large - none).abs().max() > 0


def test_gan_keeps_its_judge(own_data_dir, copy_of_project, tmp_path):
    """A held-out score of another VAE cannot be compared with the scores before."""
    trainer, ckpt = Trainer('p2_gan'), tmp_path / 'run.pth'
    command = trainer.command(own_data_dir, ckpt, '--steps', '5000')
    command[2] = command[2].replace(ROOT, str(copy_of_project))
    kill_code(command, (tmp_path / 'run_last.pth').exists)
    judge = copy_of_project / 'checkpoints' / 'p1_vae.pth'
    checkpoint = load_checkpoint(str(judge), 'p1_vae')
    save_checkpoint(str(judge), dict(checkpoint, step=1))
    command.append('--resume')
    assert_one_line(run_code(command), 'was started with judge', 'delete the file to start anew')
    judge.unlink()
    assert_one_line(run_code(command), 'p1_vae.pth', 'p1_vae.py --train')


def test_log_of_the_gan_has_means_over_its_steps(own_data_dir, tmp_path):
    """Of one flat image, whose score does not change while the nets do not learn."""
    folder = os.path.join(own_data_dir, 'face', 'train')
    for name in os.listdir(folder):
        Image.new('RGB', (64, 64), (90, 120, 200)).save(os.path.join(folder, name))
    scores = []
    for log_every in (1, 5):
        trainer, ckpt = Trainer('p2_gan'), tmp_path / f'{log_every}.pth'
        command = trainer.command(own_data_dir, ckpt, '--steps', '5', '--method', 'wgan_gp',
                                  '--augment', '0')
        command[2] = command[2].replace(
            'program.main()', f'program.LOG_EVERY = {log_every}; '
            'program.METHODS["wgan_gp"]["learning_rates"] = (0.0, 0.0); program.main()')
        result = run_code(command)
        assert result.returncode == 0, result.stderr
        scores.append([record['real'] for record in records(ckpt, 'train')])
    assert len(scores[0]) == 5 and len(scores[1]) == 1 and abs(scores[0][0]) > 1e-5
    assert scores[1][0] == pytest.approx(sum(scores[0]) / 5, rel=1e-4)


@pytest.mark.parametrize('name', DIGITS)
def test_log_of_the_digits_has_means_over_its_steps(data_dir, tmp_path, name):
    """Over those that have the loss: ADDA's last two steps of ten have no label loss."""
    losses = []
    for log_every in (1, 5):
        trainer, ckpt = Trainer(name), tmp_path / f'{log_every}.pth'
        command = trainer.command(data_dir, ckpt, '--steps', '10')
        command[2] = command[2].replace('program.main()', f'program.LOG_EVERY = {log_every}; program.main()')
        result = run_code(command)
        assert result.returncode == 0, result.stderr
        losses.append([record.get('label_loss') for record in records(ckpt, 'train')])
    single, means = losses
    assert len(single) == 10 and len(means) == 2
    for mean, window in zip(means, (single[:5], single[5:])):
        there = [loss for loss in window if loss is not None]
        assert mean == pytest.approx(sum(there) / len(there), rel=1e-4)
    assert (None in single) == (name == 'p4_adda')


def test_augmentation_of_the_gan_can_be_turned_off(data_dir, tmp_path):
    trainer, one, two = Trainer('p2_gan'), tmp_path / 'one.pth', tmp_path / 'two.pth'
    assert trainer.train(data_dir, one, '--steps', '2').returncode == 0
    assert trainer.train(data_dir, two, '--steps', '2', '--augment', '0').returncode == 0
    assert records(two, 'run')[0]['settings']['augment'] == 0
    assert records(one, 'train') != records(two, 'train')


def test_gan_needs_enough_faces_for_a_score(tmp_path):
    from conftest import write_faces
    few = write_faces(tmp_path / 'few', (12, 12))
    assert_one_line(Trainer('p2_gan').train(few, tmp_path / 'run.pth'), '20 training faces')


@pytest.mark.parametrize('setting,augment', [('source', '0'), ('target', '1')])
def test_settings_of_the_digits(data_dir, tmp_path, setting, augment):
    """The bounds are trained, stopped and resumed as DANN is, without a domain discriminator."""
    trainer, one, two = Trainer('p3_dann'), tmp_path / 'one.pth', tmp_path / 'two.pth'
    flags = ['--setting', setting, '--augment', augment]
    assert trainer.train(data_dir, one, '--steps', '150', *flags).returncode == 0
    trainer.kill_when((tmp_path / 'two_last.pth').exists, (data_dir, two, '--steps', '150', *flags))
    result = trainer.train(data_dir, two, '--resume')
    assert result.returncode == 0, result.stderr
    assert same(trainer.weights(one), trainer.weights(two))
    for kind in ('train', 'held_out', 'test'):
        assert records(one, kind) == records(two, kind)
    assert all(set(record) == {'kind', 'step', 'label_loss', 'learning_rate'}
               for record in records(one, 'train'))
    losses = [record['label_loss'] for record in records(one, 'train')]
    if augment == '0':
        assert sum(losses[-25:]) < 0.8 * sum(losses[:25])
    test, cpu = records(one, 'test')[0], torch.device('cpu')
    assert ('adabn_accuracy' in test) == (setting == 'source')
    if (setting, augment) == ('source', '0'):
        net, checkpoint = models.load_net(models.DigitNet, str(one), 'p3_dann', cpu)
        seen, unseen = [read_digits(str(data_dir), checkpoint['settings']['target'], split)
                        for split in ('train', 'test')]
        net = with_statistics(net, to_float(seen.images), cpu)
        assert models.accuracy(net, unseen.images, unseen.labels, cpu) == pytest.approx(test['adabn_accuracy'])


@pytest.mark.parametrize('setting', ['dann', 'dann_entropy'])
def test_log_of_dann(data_dir, tmp_path, setting):
    trainer, ckpt = Trainer('p3_dann'), tmp_path / 'run.pth'
    assert trainer.train(data_dir, ckpt, '--steps', '10', '--setting', setting).returncode == 0
    logged = records(ckpt, 'train')
    assert all(set(record) == {'kind', 'step', 'label_loss', 'domain_loss', 'domain_accuracy', 'reversal',
                               'learning_rate'} | ({'entropy'} if setting == 'dann_entropy' else set())
               for record in logged)
    assert [record['reversal'] for record in logged] == [
        pytest.approx(p3_dann.REVERSAL * p3_dann.ramp_at(step, 10)) for step in range(1, 11)]


def test_entropy_loss_makes_target_predictions_surer(data_dir, tmp_path):
    trainer, last = Trainer('p3_dann'), {}
    for weight in (3.0, 0.0):
        ckpt = tmp_path / f'{weight}.pth'
        command = trainer.command(data_dir, ckpt, '--steps', '60')
        command[2] = command[2].replace('program.main()', f'program.ENTROPY = {weight}; program.main()')
        assert run_code(command).returncode == 0
        last[weight] = sum(record['entropy'] for record in records(ckpt, 'train')[-10:])
    assert last[3.0] < last[0.0]


@pytest.mark.parametrize('name', DIGITS)
def test_target_labels_do_not_reach_adaptation(own_data_dir, data_dir, tmp_path, name):
    """Other labels of the target's training images, and other test images: the same weights."""
    trainer = Trainer(name)
    assert trainer.train(data_dir, tmp_path / 'one.pth', '--steps', '12').returncode == 0
    folder = os.path.join(own_data_dir, 'digits', 'mnistm')
    write_rows(os.path.join(folder, 'train.csv'), ['image_name', 'label'],
               [[f'{index:05d}.png', 3] for index in range(40)])
    os.remove(os.path.join(folder, 'test', '00011.png'))
    write_rows(os.path.join(folder, 'test.csv'), ['image_name', 'label'],
               [[f'{index:05d}.png', 5] for index in range(11)])
    assert trainer.train(own_data_dir, tmp_path / 'two.pth', '--steps', '12').returncode == 0
    assert same(trainer.weights(tmp_path / 'one.pth'), trainer.weights(tmp_path / 'two.pth'))
    trainer, upper = Trainer('p3_dann'), ['--steps', '12', '--setting', 'target']
    assert trainer.train(data_dir, tmp_path / 'a.pth', *upper).returncode == 0
    assert trainer.train(own_data_dir, tmp_path / 'b.pth', *upper).returncode == 0
    assert not same(trainer.weights(tmp_path / 'a.pth'), trainer.weights(tmp_path / 'b.pth'))


@pytest.mark.parametrize('name', DIGITS)
def test_any_pair_of_domains(data_dir, tmp_path, name):
    trainer = Trainer(name)
    for target, source in (('usps', 'mnistm'), ('svhn', 'usps'), ('mnistm', 'svhn')):
        ckpt = tmp_path / f'{target}.pth'
        command = trainer.command(data_dir, ckpt, '--target', target, '--source', source, '--steps', '1')
        assert run_code(command).returncode == 0
        settings = load_checkpoint(str(ckpt), name)['settings']
        assert (settings['source'], settings['target']) == (source, target)


@pytest.mark.parametrize('pieces', ['none', 'all'])
def test_adaptation_leaves_classifier_and_source_net_alone(data_dir, tmp_path, pieces):
    """Of 60 steps the first six train them, the others the target encoder alone; the teacher follows it.

    With anchor the others train the classifier too.
    """
    trainer, ckpt = Trainer('p4_adda'), tmp_path / 'run.pth'
    states = []
    for step in (6, 59, 60):
        command = trainer.command(data_dir, ckpt, '--steps', '60', '--pieces', pieces, '--resume', every=1)
        command[2] = command[2].replace(
            'program.main()', 'save = models.save_checkpoint; models.save_checkpoint = lambda path, '
            f'state: (save(path, state), state["step"] == {step} and sys.exit(9)); program.main()')
        assert run_code(command).returncode == 9
        states.append(trainer.state(ckpt))
    source, before, after = states
    assert [state['step'] for state in states] == [6, 59, 60]
    for name, value in after['net'].items():
        if name.startswith('classifier'):
            assert torch.equal(value, source['average'][name]) == (pieces == 'none')
        elif name.endswith('weight'):
            assert not torch.equal(value, source['average'][name]), name
    assert same(before['source_net'], source['average']) and same(after['source_net'], source['average'])
    decay = min(p4_adda.AVERAGE_DECAY, 60 / 80)
    for name, value in after['average'].items():
        if name.endswith(('weight', 'bias')):
            assert torch.allclose(value, decay * before['average'][name] + (1 - decay) * after['net'][name],
                                  atol=1e-6), name


def test_every_piece_changes_the_net(data_dir, tmp_path):
    """The rows of the ablation and the controls, ten steps each: no two end with the same weights.

    In ten steps the teacher would be sure of no image, so here every image is enough for it; and no digit
    would become rare, so here the last batch alone counts.
    """
    trainer, rows = Trainer('p4_adda'), [pieces or 'none' for _, pieces in p4_adda.ABLATION + p4_adda.CONTROLS]
    trainer.train_pieces(data_dir, tmp_path, rows, 10, 'program.CONFIDENT = program.SHARES_DECAY = 0.0')
    found = [trainer.weights(tmp_path / f'{pieces}.pth') for pieces in rows]
    assert not any(same(one, other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize('name', DIGITS)
def test_batches_of_one(data_dir, tmp_path, name):
    trainer, ckpt = Trainer(name), tmp_path / 'run.pth'
    command = trainer.command(data_dir, ckpt, '--steps', '8', '--batch_size', '1')
    result = run_code(command)
    assert result.returncode == 0, result.stderr


SWITCHES = ('none', 'all', 'normalise', 'augment', 'augment,patches', 'anchor', 'conditional', 'teacher',
            'teacher,diversity', 'teacher,self_training', 'anchor,no_discriminator',
            'teacher,self_training,no_discriminator')


@pytest.fixture(scope='module')
def pieces_trained(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp('pieces')
    Trainer('p4_adda').train_pieces(data_dir, folder, SWITCHES, 20)
    return folder


@pytest.mark.parametrize('pieces', SWITCHES)
def test_pieces_of_adda(pieces_trained, monkeypatch, pieces):
    """Every switch trains source and target; the log has what it brings and nothing else."""
    ckpt = pieces_trained / f'{pieces}.pth'
    chosen = {'none': [], 'all': p4_adda.PIECES}.get(pieces, pieces.split(','))
    assert load_checkpoint(str(ckpt), 'p4_adda')['settings']['pieces'] == ','.join(chosen)
    adversarial = set() if 'no_discriminator' in chosen else {'domain_loss', 'domain_accuracy', 'fooling_loss'}
    adversarial |= {'label_loss'} if 'anchor' in chosen else set()
    monkeypatch.setattr(p4_adda, 'LEARNING_RATE_WARM_UP', 2)          # as in SMALL
    for record in records(ckpt, 'train'):
        rate = p4_adda.learning_rate_at(record['step'], 2, 20)
        if record['step'] > 2 and not {'anchor', 'teacher'} & set(chosen):
            rate *= p4_adda.ADVERSARIAL          # of an encoder that the discriminator alone teaches
        assert record['learning_rate'] == pytest.approx(rate)
        wanted = {'kind', 'step', 'learning_rate'}
        if record['step'] <= 2:
            wanted |= {'label_loss'}
        else:
            if record['step'] <= 16 or 'self_training' not in chosen:
                wanted |= adversarial
            wanted |= {'confident_loss', 'confident_share'} if 'teacher' in chosen else set()
        assert set(record) == wanted, record['step']
    for record in records(ckpt, 'held_out'):
        assert 0 < record['nuclear_norm'] <= 1
        assert len(record['predicted_shares']) == 10 and sum(record['predicted_shares']) == pytest.approx(1)


def test_loss_that_is_not_finite_stops_the_run(trainer, data_dir, tmp_path):
    diverging = trainer.command(data_dir, tmp_path / 'run.pth', '--steps', '300', every=1)
    diverging[2] = diverging[2].replace('program.main()', trainer.diverge + '; program.main()')
    assert_one_line(run_code(diverging), 'step', 'the last good save')
    assert not (tmp_path / 'run.pth').exists()
    state = trainer.state(tmp_path / 'run.pth')
    assert state['step'] == records(tmp_path / 'run.pth', 'train', '_last.jsonl')[-1]['step']


def test_full_disk(framed, data_dir, tmp_path):
    """A limit on the size of a file fails the first save: one line, and nothing half-written."""
    words = ' '.join(shlex.quote(str(word)) for word in
                     framed.command(data_dir, tmp_path / 'run.pth', '--steps', '9'))
    result = run(['bash', '-c', 'ulimit -f 20; ' + words])
    assert_one_line(result, 'cannot write', 'run_last.pth')
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('name', ['p1_vae', 'p2_gan', 'p5_diffusion', 'p6_acgan'])
def test_only_a_default_run_replaces_the_shipped_weights(data_dir, name):
    result = run(['python3', os.path.join(ROOT, name + '.py'), '--train', '--data_dir', data_dir, '--steps', '1'])
    assert_one_line(result, '--steps', '--ckpt')


def test_checkpoint_is_a_folder(framed, data_dir, tmp_path):
    assert_one_line(framed.train(data_dir, tmp_path), 'is a folder')


FIGURES = dict(
    p1_vae=['fig1_1.txt', 'fig1_2.png', 'fig1_4.jpg', 'fig1_4.png', 'fig1_5.png', 'fig1_6.jpg', 'fig1_7.png',
            'table1_3.csv', 'table1_3.jpg', 'table1_5.csv'],
    p2_gan=['fig2_1.txt', 'fig2_2.jpg', 'fig2_2.png', 'fig2_3.png', 'fig2_4.jpg', 'fig2_5.jpg', 'fig2_6.jpg',
            'table2.jpg'],
    p3_dann=['fig3_1.jpg', 'fig3_4_mnistm.png', 'fig3_4_mnistm_lower.png', 'fig3_4_svhn.png', 'fig3_4_svhn_lower.png',
             'fig3_4_usps.png', 'fig3_4_usps_lower.png', 'fig3_5.txt', 'fig3_6.png', 'fig3_7.png', 'fig3_8.jpg',
             'table3.csv', 'table3.png'],
    p4_adda=['fig4_2_mnistm.png', 'fig4_2_svhn.png', 'fig4_2_usps.png', 'fig4_3.txt', 'fig4_4.png',
             'fig4_6.png', 'fig4_6_plain.png', 'fig4_7.jpg', 'table4.csv', 'table4.png', 'table4_others.csv',
             'table4_others.png'])


def assert_drawn(out, names):
    """Every file is there, every picture has more than a few colours, and every text prints a model."""
    assert sorted(os.listdir(str(out))) == names
    for name in names:
        if name.endswith('.txt'):
            assert (out / name).read_text().count('): ') > 5, name
        if name.endswith(('.png', '.jpg')):    # a few bytes may do: after so few steps faces are nearly flat
            with Image.open(str(out / name)) as picture:
                assert len(picture.convert('RGB').getcolors(2 ** 24)) > 20, name


@pytest.mark.parametrize('trainer', ['p1_vae', 'p2_gan'], indirect=True)
def test_figures_of_the_faces(trainer, data_dir, tmp_path, unbroken, copy_of_project):
    """--plot writes every figure of the report, without training, and leaves the logs alone."""
    out, checkpoints = tmp_path / 'figures', copy_of_project / 'checkpoints'
    models.write_log(str(checkpoints / 'p1_linear_code.jsonl'), [
        dict(kind='linear_code', rate=rate, distortion=0.1 / rate, test_kl=rate, test_mse=0.08 / rate)
        for rate in (10, 40, 90)])
    models.write_log(str(checkpoints / 'samples.jsonl'), [
        dict(what='p2_gan', label='r1', sha256=models.sha256(str(unbroken)), images=960, own=3.0, clear=0.8,
             frechet=9.0, nearest=0.49, copied_least=5.0),
        dict(what='real', label='training faces', images=0, own=2.0, clear=0.9, frechet=7.0, nearest=0.48,
             copied_least=4.0)])
    models.write_log(str(checkpoints / 'p2_counts.jsonl'), [
        dict(what='p2_gan', sha256=models.sha256(str(unbroken)), faces=32, broken=5)])
    log = unbroken.with_suffix('.jsonl')
    before = log.read_text()
    result = run(['python3', copy_of_project / (trainer.name + '.py'), '--plot', '--data_dir', data_dir,
                  '--ckpt', unbroken, '--out', out], MPLBACKEND='module://matplotlib_inline.backend_inline')
    assert result.returncode == 0, result.stderr
    assert_drawn(out, FIGURES[trainer.name])
    assert log.read_text() == before


def in_the_copy(name, copy_of_project, data_dir, *flags):
    """The command of a table's run, in a copy of the project and with ten steps as the default."""
    command = Trainer(name).command(data_dir, 'x.pth', *flags)
    command[2] = command[2].replace(ROOT, str(copy_of_project)).replace(
        'program.main()', 'program.DEFAULTS.update(steps=10, batch_size=4); program.main()')
    for word in ('--ckpt', 'x.pth', '--target', 'mnistm'):
        command.remove(word)
    return command


@pytest.mark.parametrize('name', DIGITS)
def test_train_alone_trains_the_nets_of_the_script(data_dir, copy_of_project, name):
    """Without --target: one for each target, where the grader's script looks for them; --resume finishes them."""
    paths = [copy_of_project / 'checkpoints' / f'{name}_{target}.pth' for target in ('mnistm', 'svhn', 'usps')]
    old = [path.read_bytes() for path in paths]
    assert run_code(in_the_copy(name, copy_of_project, data_dir)).returncode == 0
    new = [path.read_bytes() for path in paths]
    assert all(before != after for before, after in zip(old, new))
    assert [load_checkpoint(str(path), name)['settings']['target'] for path in paths] == ['mnistm', 'svhn', 'usps']
    paths[1].unlink()
    assert run_code(in_the_copy(name, copy_of_project, data_dir, '--resume')).returncode == 0
    assert same(load_checkpoint(str(paths[1]), name)['net'], load_checkpoint(str(paths[1]), name)['net'])
    assert not (copy_of_project / 'checkpoints' / f'{name[:2]}_runs').exists()
    assert_one_line(run_code(in_the_copy(name, copy_of_project, data_dir, '--source', 'usps')), '--target', code=2)


@pytest.mark.parametrize('name,flags', [('p3_dann', ['--setting', 'source']), ('p4_adda', ['--pieces', 'none'])])
def test_figures_of_the_digits(data_dir, copy_of_project, tmp_path, name, flags):
    """--plot draws from the runs of a table, here of ten steps each, of one seed, on a dozen test images."""
    plot = ['python3', copy_of_project / (name + '.py'), '--plot', '--data_dir', data_dir,
            '--out', tmp_path / 'figures']
    assert_one_line(run(plot), 'no log of a run of', 'train_tables.sh')
    for words in ([], flags):
        result = run_code(in_the_copy(name, copy_of_project, data_dir, *words))
        assert result.returncode == 0, result.stderr
    for row in ('source', 'dann_entropy', 'target'):
        for seed in (0, 1):
            for source, target in (('usps', 'mnistm'), ('mnistm', 'svhn'), ('svhn', 'usps'), ('mnistm', 'usps')):
                if name == 'p4_adda':
                    models.write_log(str(copy_of_project / 'checkpoints' / 'p3_runs' / f'{source}_{target}' / (
                        f'{row}_seed{seed}.jsonl')), [
                        dict(kind='run', settings=dict(source=source, target=target, seed=seed)),
                        dict(kind='test', accuracy=0.5 + 0.1 * seed, adabn_accuracy=0.4, held_out_accuracy=0.3)])
    result = run(plot)
    assert result.returncode == 0, result.stderr
    assert_drawn(tmp_path / 'figures', FIGURES[name])
    with open(str(tmp_path / 'figures' / f'table{name[1]}.csv')) as file:
        lines = file.read()
    if name == 'p3_dann':
        accuracy = json.loads((copy_of_project / 'checkpoints' / 'p3_runs' / 'usps_mnistm' / 'source_seed0.jsonl')
                              .read_text().splitlines()[-1])['accuracy']
        assert f'lower bound: source only,USPS,MNIST-M,1,{100 * accuracy:.2f},,{100 * accuracy:.2f},,' in lines
    else:
        assert 'DANN + entropy,USPS,MNIST-M,2,55.00,7.07,50.00,60.00,' in lines
        with open(str(tmp_path / 'figures' / 'table4_others.csv')) as file:
            others = file.read()           # where the upper bound is that of the same target
        assert 'upper bound: target only,MNIST-M,USPS,2,55.00' in others
