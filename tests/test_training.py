"""python3 p1_vae.py --train: two steps, a stop at any moment, and the run that goes on."""
import glob
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_one_line, run

import p1_vae
from models import load_checkpoint

# the real program with a small net that logs and saves often
QUICK = ('import sys; sys.path.insert(0, {root!r}); import p1_vae; p1_vae.LOG_EVERY = 1; '
         'p1_vae.SAVE_EVERY = {every}; p1_vae.LEARNING_RATE_WARM_UP = 5; '
         'p1_vae.pick_precision = lambda device: "fp32"; '     # else the clock may choose anew
         'p1_vae.NET = dict(latent_dim=6, channels=[4, 6, 8, 10]); p1_vae.main()')


def command(data_dir, ckpt, *flags, every=5):
    return ['python3', '-c', QUICK.format(root=ROOT, every=every), '--train', '--data_dir', data_dir,
            '--ckpt', ckpt, '--batch_size', '4', '--device', 'cpu'] + list(flags)


def train(*arguments, **options):
    return run(command(*arguments, **options), OMP_NUM_THREADS='1')


def records(ckpt, kind, ending='.jsonl'):
    """What the log says of a kind of record, without what the clock decides."""
    with open(str(ckpt).replace('.pth', ending)) as file:
        lines = [json.loads(line) for line in file.read().split('\n')[:-1]]
    return [{name: value for name, value in line.items() if name != 'images_per_second'}
            for line in lines if line['kind'] == kind]


def weights(ckpt):
    return load_checkpoint(str(ckpt), 'p1_vae')['net']


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope='module')
def unbroken(data_dir, tmp_path_factory):
    """A run of thirty steps that nobody stopped."""
    ckpt = tmp_path_factory.mktemp('unbroken') / 'p1_vae.pth'
    result = train(data_dir, ckpt, '--steps', '30')
    assert result.returncode == 0, result.stderr
    return ckpt


def test_two_steps_of_the_real_net(data_dir, tmp_path):
    """Train, then draw from the new weights."""
    ckpt = tmp_path / 'p1_vae.pth'
    (tmp_path / 'SHA256SUMS').write_text('')
    program = os.path.join(ROOT, 'p1_vae.py')
    result = run(['python3', program, '--train', '--steps', '2', '--batch_size', '4', '--data_dir',
                  data_dir, '--ckpt', ckpt])
    assert result.returncode == 0, result.stderr
    assert 'step 2/2' in result.stdout and 'images/s' in result.stdout and 'left' in result.stdout
    assert sorted(os.listdir(str(tmp_path))) == ['SHA256SUMS', 'p1_vae.jsonl', 'p1_vae.pth',
                                                 'p1_vae_last.jsonl', 'p1_vae_last.pth']
    checkpoint = load_checkpoint(str(ckpt), 'p1_vae')
    assert checkpoint['settings']['steps'] == 2 and checkpoint['metrics']['images'] == 12
    assert records(ckpt, 'test')[0]['mse'] == checkpoint['metrics']['mse']
    sums = run(['sha256sum', '-c', 'SHA256SUMS'], cwd=tmp_path)
    assert sums.returncode == 0 and 'p1_vae.pth: OK' in sums.stdout
    drawn = run(['python3', program, '--ckpt', ckpt, '--out', tmp_path / 'faces.png'])
    assert drawn.returncode == 0, drawn.stderr


def test_log(unbroken):
    assert [record['step'] for record in records(unbroken, 'train')] == list(range(1, 31))
    assert [record['step'] for record in records(unbroken, 'held_out')] == [5, 10, 15, 20, 25, 30]
    for record in records(unbroken, 'held_out'):
        assert record['loss'] == pytest.approx(record['reconstruction'] + 1e-4 * record['kl'])
    start = records(unbroken, 'run')[0]
    assert start['training_images'] == 36 and start['held_out'] == 4
    assert start['settings']['seed'] == 0


def test_the_least_held_out_loss_chooses(unbroken):
    held_out = records(unbroken, 'held_out')
    least = min(held_out, key=lambda record: record['loss'])
    assert load_checkpoint(str(unbroken), 'p1_vae')['step'] == least['step']
    assert records(unbroken, 'test')[0]['chosen_step'] == least['step']


def test_training_lowers_the_loss(data_dir, tmp_path):
    ckpt = tmp_path / 'p1_vae.pth'
    assert train(data_dir, ckpt, '--steps', '120', every=60).returncode == 0
    train_records = records(ckpt, 'train')
    first, last = [sum(record['reconstruction'] for record in part) / 10
                   for part in (train_records[:10], train_records[-10:])]
    assert last < 0.8 * first


def test_same_seed_same_weights_another_seed_others(data_dir, tmp_path, unbroken):
    again, other = tmp_path / 'again' / 'p1_vae.pth', tmp_path / 'other' / 'p1_vae.pth'
    assert train(data_dir, again, '--steps', '30').returncode == 0
    assert train(data_dir, other, '--steps', '30', '--seed', '1').returncode == 0
    assert same(weights(unbroken), weights(again))
    assert not same(weights(unbroken), weights(other))


def kill_when(condition, arguments, **options):
    """Start a training and kill it (kill -9) as soon as condition() holds."""
    environment = dict(os.environ, OMP_NUM_THREADS='1')
    environment['PATH'] = os.path.dirname(sys.executable) + os.pathsep + environment['PATH']
    process = subprocess.Popen([str(word) for word in command(*arguments, **options)],
                               env=environment, stdout=subprocess.DEVNULL)
    while not condition():
        assert process.poll() is None, 'the run ended before it could be killed'
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_run_goes_on_as_if_nothing_had_happened(data_dir, tmp_path, unbroken):
    """Killed twice, in step 7 or later and in step 17 or later: same curve, same weights."""
    ckpt = tmp_path / 'p1_vae.pth'

    def reached(step):
        return lambda: ((tmp_path / 'p1_vae_last.jsonl').exists() and any(
            record['step'] >= step for record in records(ckpt, 'train', '_last.jsonl')))
    kill_when(reached(7), (data_dir, ckpt, '--steps', '30'))
    kill_when(reached(17), (data_dir, ckpt, '--resume'))
    assert not ckpt.exists() and not (tmp_path / 'p1_vae.jsonl').exists()
    result = train(data_dir, ckpt, '--resume')
    assert result.returncode == 0, result.stderr
    for kind in ('train', 'held_out', 'test'):
        assert records(ckpt, kind) == records(unbroken, kind)
    assert same(weights(unbroken), weights(ckpt))
    assert load_checkpoint(str(ckpt), 'p1_vae')['command'].endswith('--steps 30')


def test_stopped_run_leaves_the_old_checkpoint_and_its_log_alone(data_dir, tmp_path):
    ckpt = tmp_path / 'p1_vae.pth'
    for name in ('p1_vae.pth', 'p1_vae.jsonl', 'SHA256SUMS'):
        (tmp_path / name).write_text('old')
    kill_when((tmp_path / 'p1_vae_last.pth').exists, (data_dir, ckpt, '--steps', '2000'))
    for name in ('p1_vae.pth', 'p1_vae.jsonl', 'SHA256SUMS'):
        assert (tmp_path / name).read_text() == 'old'


def test_killed_while_saving(data_dir, tmp_path):
    """The temporary file is there, so the kill falls into a save: the save before it still loads."""
    ckpt = tmp_path / 'p1_vae.pth'
    state = tmp_path / 'p1_vae_last.pth'
    for _ in range(3):
        kill_when(lambda: state.exists() and glob.glob(str(tmp_path / '.*p1_vae_last.pth')),
                  (data_dir, ckpt, '--steps', '5000', '--resume'), every=1)
        assert load_checkpoint(str(state), p1_vae.STATE)['step'] >= 1
    assert not ckpt.exists()
    before = load_checkpoint(str(state), p1_vae.STATE)['step']
    kill_when(lambda: load_checkpoint(str(state), p1_vae.STATE)['step'] > before,
              (data_dir, ckpt, '--resume'), every=1)
    assert len(glob.glob(str(tmp_path / '.*'))) <= 1             # leftovers of kills do not pile up


def test_resume_needs_no_run_and_finishes_a_finished_one(data_dir, tmp_path):
    ckpt = tmp_path / 'p1_vae.pth'
    result = train(data_dir, ckpt, '--steps', '2', '--resume')
    assert result.returncode == 0 and 'starting a new run' in result.stdout
    first = weights(ckpt)
    ckpt.unlink()
    assert train(data_dir, ckpt, '--resume').returncode == 0
    assert same(first, weights(ckpt))
    assert len(records(ckpt, 'test')) == 1


def test_new_run_over_a_finished_one_is_never_taken_for_it(data_dir, tmp_path):
    """Killed before its first save, it has nothing to resume: not the finished run's state either."""
    ckpt = tmp_path / 'p1_vae.pth'
    assert train(data_dir, ckpt, '--steps', '2').returncode == 0
    kill_when(lambda: len(records(ckpt, 'train', '_last.jsonl')) >= 4,
              (data_dir, ckpt, '--steps', '2000'), every=2000)
    assert len(records(ckpt, 'train')) == 2                      # the finished run's log, untouched
    result = train(data_dir, ckpt, '--resume', '--steps', '3')
    assert 'starting a new run' in result.stdout
    assert len(records(ckpt, 'train')) == 3


def test_run_leaves_the_saves_of_a_run_beside_it_alone(data_dir, tmp_path):
    (tmp_path / '.123.p1_vae_b_last.pth').write_text('another run is writing this')
    (tmp_path / '.123.p1_vae_last.pth').write_text('a leftover')
    assert train(data_dir, tmp_path / 'p1_vae.pth', '--steps', '1').returncode == 0
    assert glob.glob(str(tmp_path / '.*')) == [str(tmp_path / '.123.p1_vae_b_last.pth')]


def test_unfinished_run_is_not_overwritten(data_dir, tmp_path):
    ckpt = tmp_path / 'p1_vae.pth'
    kill_when((tmp_path / 'p1_vae_last.pth').exists, (data_dir, ckpt, '--steps', '2000'), every=1)
    assert_one_line(train(data_dir, ckpt, '--steps', '2000'), 'add --resume')
    assert_one_line(train(data_dir, ckpt, '--resume', '--seed', '5'), '--seed 0')


def test_init_takes_weights_but_not_the_run(data_dir, tmp_path, unbroken):
    ckpt = tmp_path / 'p1_vae.pth'
    result = train(data_dir, ckpt, '--steps', '1', '--init', unbroken, '--lambda_kl', '3e-4')
    assert_one_line(train(data_dir, tmp_path / 'x.pth', '--init', tmp_path / 'p1_vae_last.pth'),
                    'p1_vae (training state)')
    assert result.returncode == 0, result.stderr
    assert records(ckpt, 'train')[0]['lambda_kl'] == 3e-4         # at once, without a warm-up
    assert records(ckpt, 'train')[0]['reconstruction'] < records(unbroken, 'train')[0]['reconstruction']


def test_loss_that_is_not_finite_stops_the_run(data_dir, tmp_path):
    diverging = command(data_dir, tmp_path / 'p1_vae.pth', '--steps', '300', every=1)
    diverging[2] = diverging[2].replace('p1_vae.main()', 'p1_vae.LEARNING_RATE = 1e30; p1_vae.main()')
    assert_one_line(run(diverging), 'the loss is', 'the last good save')
    assert not (tmp_path / 'p1_vae.pth').exists()
    state = load_checkpoint(str(tmp_path / 'p1_vae_last.pth'), p1_vae.STATE)
    assert state['step'] == records(tmp_path / 'p1_vae.pth', 'train', '_last.jsonl')[-1]['step']


def test_full_disk(data_dir, tmp_path):
    """A limit on the size of a file fails the first save: one line, and nothing half-written."""
    words = ' '.join(shlex.quote(str(word)) for word in
                     command(data_dir, tmp_path / 'p1_vae.pth', '--steps', '9'))
    result = run(['bash', '-c', 'ulimit -f 20; ' + words])
    assert_one_line(result, 'cannot write', 'p1_vae_last.pth')
    assert os.listdir(str(tmp_path)) == ['p1_vae_last.jsonl']


def test_checkpoint_is_a_folder(data_dir, tmp_path):
    assert_one_line(train(data_dir, tmp_path), 'is a folder')


def test_figures(data_dir, tmp_path, unbroken):
    """--plot writes every figure of the report, without training, and leaves the logs alone."""
    out = tmp_path / 'figures'
    before = open(str(unbroken).replace('.pth', '.jsonl')).read()
    result = run(['python3', os.path.join(ROOT, 'p1_vae.py'), '--plot', '--data_dir', data_dir,
                  '--ckpt', unbroken, '--out', out, '--attribute', 'Smiling'])
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(str(out))) == ['fig1_1.png', 'fig1_2.png', 'fig1_4.png', 'fig1_5.png',
                                            'fig1_6.png', 'fig1_7.png', 'table1_3.png']
    assert min(os.path.getsize(str(out / name)) for name in os.listdir(str(out))) > 5000
    assert open(str(unbroken).replace('.pth', '.jsonl')).read() == before
