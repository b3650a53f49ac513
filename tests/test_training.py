"""python3 pN_*.py --train: two steps, a stop at any moment, the run that goes on, and the figures of --plot."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import models
import p1_vae
import p2_gan
import p3_dann
import p4_adda
import p5_diffusion
import p6_acgan
import pytest
import torch
from conftest import (ROOT, SMALL, TINY, assert_drawn, assert_one_line, assert_same_run, call, each, file_limit,
                      records, refusal, run, same, state, stop, train, weights, write_rows)
from datasets import FaceImages, read_digits, split_held_out, to_float, to_uint8
from models import load_checkpoint, load_net, save_checkpoint, with_statistics
from PIL import Image

CPU = torch.device('cpu')
PROGRAMS, DIGITS = [p1_vae, p2_gan, p3_dann, p4_adda], [p3_dann, p4_adda]
SCORES = {p1_vae: 'loss', p2_gan: 'frechet'}       # by which a checkpoint is chosen; else it is the last one


def mean_of(log, name):
    """Mean of a scalar over the records that have it."""
    values = [record[name] for record in log if name in record]
    return sum(values) / len(values)


@pytest.fixture(scope='module')
def unbroken(data_dir, tmp_path_factory):
    """Runs of thirty steps that nobody stopped, made when they are asked for."""
    made = {}

    def make(program):
        if program not in made:
            made[program] = tmp_path_factory.mktemp('unbroken') / 'run.pth'
            train(program, data_dir, made[program], '--steps', 30)
        return made[program]
    return make


@each(PROGRAMS)
def test_two_steps_of_the_real_net(program, data_dir, tmp_path):
    """The real commands: train, then draw from the new weights, or label with them."""
    script, ckpt = os.path.join(ROOT, program.PROBLEM + '.py'), tmp_path / 'run.pth'
    flags = ['--target', 'mnistm'] if program in DIGITS else []
    result = run(['python3', script, '--train', '--steps', 2, '--batch_size', 4, '--data_dir', data_dir, '--ckpt', ckpt]
                 + flags)
    assert result.returncode == 0, result.stderr
    assert 'step 2/2' in result.stdout and 'images/s' in result.stdout and 'left' in result.stdout
    assert sorted(os.listdir(str(tmp_path))) == ['run.jsonl', 'run.pth', 'run_last.jsonl', 'run_last.pth']
    checkpoint = load_checkpoint(str(ckpt), program.PROBLEM)
    assert checkpoint['settings']['steps'] == 2 and checkpoint['metrics']['images'] == 12
    assert checkpoint['command'].startswith(f'python3 {program.PROBLEM}.py --train --steps 2')
    assert all(records(ckpt, 'test')[0][name] == value for name, value in checkpoint['metrics'].items())
    use = ['--out', 'pred.csv', '--images', os.path.join(ROOT, 'tests', 'digits')] if program in DIGITS else [
        '--out', 'faces.png']
    result = run(['python3', script, '--ckpt', ckpt] + use + flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@each(PROGRAMS)
def test_log(program, unbroken):
    ckpt = unbroken(program)
    assert [record['step'] for record in records(ckpt, 'train')] == list(range(1, 31))
    assert [record['step'] for record in records(ckpt, 'held_out')] == [5, 10, 15, 20, 25, 30]
    if program is p1_vae:
        for record in records(ckpt, 'held_out'):
            assert record['loss'] == pytest.approx(
                record['reconstruction'] + p1_vae.DEFAULTS['lambda_kl'] * record['kl'])
    start = records(ckpt, 'run')[0]
    assert start['training_images'] == 36 and start['held_out'] == 4 and start['settings']['seed'] == 0


@each(PROGRAMS + [p5_diffusion, p6_acgan])
def test_rule_of_choice(program, unbroken):
    """Of faces the average with the least held-out score; of digits the last average, whatever it scores."""
    ckpt = unbroken(program)
    if program not in SCORES:
        average, net = state(program, ckpt)['average'], weights(program, ckpt)
        assert same({name: value for name, value in average.items() if name.endswith(('weight', 'bias'))}, net)
        return
    least = min(records(ckpt, 'held_out'), key=lambda record: record[SCORES[program]])
    chosen, step = state(program, ckpt)['chosen'], load_checkpoint(str(ckpt), program.PROBLEM)['step']
    assert least['step'] == step == chosen['step'] == records(ckpt, 'test')[0]['chosen_step']
    assert same(weights(program, ckpt), chosen['net'])


@each([p1_vae, p2_gan])
def test_test_faces_choose_nothing(program, own_data_dir, data_dir, tmp_path):
    """Other test faces: the same held-out scores, the same choice and the same weights."""
    for name in os.listdir(os.path.join(own_data_dir, 'face', 'test')):
        Image.new('RGB', (64, 64), (len(name), 2, 3)).save(os.path.join(own_data_dir, 'face', 'test', name))
    for folder, name in ((data_dir, 'one.pth'), (own_data_dir, 'two.pth')):
        train(program, folder, tmp_path / name, '--steps', 12, every=2)
    one, two = tmp_path / 'one.pth', tmp_path / 'two.pth'
    assert records(one, 'held_out') == records(two, 'held_out') and records(one, 'test') != records(two, 'test')
    assert same(weights(program, one), weights(program, two))


@each([p1_vae, p3_dann])
def test_what_is_logged_is_measured_with_the_net_of_the_file(program, data_dir, tmp_path):
    """In eval(), with the statistics that the file has; after four steps those of a batch are still others."""
    ckpt = tmp_path / 'run.pth'
    train(program, data_dir, ckpt, '--steps', 4)
    logged = records(ckpt, 'test')[0]
    if program is p1_vae:
        net, images = load_net(models.VAE, str(ckpt), 'p1_vae', CPU)[0], FaceImages(data_dir, 'test').images
        found, faces = p1_vae.measure(net, images, CPU), FaceImages(data_dir, 'train').images
        held_out = p1_vae.measure(net, faces[split_held_out(len(faces))[1]], CPU)     # of the only average
        assert records(ckpt, 'held_out')[0]['mse'] == pytest.approx(held_out['mse'], rel=1e-6)
    else:
        net, test = load_net(models.DigitNet, str(ckpt), 'p3_dann', CPU)[0], read_digits(data_dir, 'mnistm', 'test')
        found = dict(accuracy=models.accuracy(net, test.images, test.labels, CPU))
    assert all(logged[name] == pytest.approx(value, rel=1e-6) for name, value in found.items())


@each(PROGRAMS + [p5_diffusion, p6_acgan])
def test_held_out_images_are_not_trained_on(program, data_dir, tmp_path, monkeypatch):
    """What the loop changes at random are training images; unlabelled ones of the target are too.

    Problems 5 and 6 change no digit, not even by a mirror; what they move to the device are training images.
    """
    name, domains = {p1_vae: ('random_flip', []), p2_gan: ('random_flip', []), p5_diffusion: ('on_device', ['mnistm']),
                     p6_acgan: ('on_device', ['mnistm'])}.get(program, ('augment_digits', ['usps', 'mnistm']))
    seen, function = set(), getattr(program, name)

    def watched(images, *arguments):
        unit = images if images.min() >= 0 else (images + 1) / 2
        seen.update(image.numpy().tobytes() for image in to_uint8(unit))
        return function(images, *arguments)
    monkeypatch.setattr(program, name, watched)
    train(program, data_dir, tmp_path / 'run.pth', '--steps', 30)
    sets = [read_digits(data_dir, domain, 'train') for domain in domains] or [FaceImages(data_dir, 'train')]
    for images in (images.images for images in sets):
        training, held_out = [{image.numpy().tobytes() for image in images[rows]}
                              for rows in split_held_out(len(images))]
        assert len(seen & training) > 20 and not seen & held_out and (program is not p6_acgan or seen <= training)
    if program in DIGITS:
        drawn = []
        monkeypatch.setattr(program, 'balanced_rows', lambda labels, count, rng: (
            drawn.append(labels.tolist()), torch.zeros(count, dtype=torch.long))[1])
        train(program, data_dir, tmp_path / 'rows.pth', '--steps', 3)
        assert drawn == 3 * [sets[0].labels[split_held_out(40)[0]].tolist()]


def test_kl_of_the_vae_counts_in_its_training(data_dir, tmp_path, monkeypatch):
    """With a large weight the latent code says hardly anything; in the first steps of the warm-up it hardly counts.

    The gradients are never larger than they may be.
    """
    norms = []
    monkeypatch.setattr(p1_vae, 'take_step', lambda optimizer, *words, **more: (
        models.take_step(optimizer, *words, **more), norms.append(torch.cat([
            weight.grad.flatten() for weight in optimizer.param_groups[0]['params']]).norm().item())))
    for name, weight, warm_up in (('none', 0, 1), ('all', 1, 1), ('warm-up', 1, 10 ** 9)):
        train(p1_vae, data_dir, tmp_path / (name + '.pth'), '--steps', 60, '--lambda_kl', weight, every=60,
              KL_WARM_UP=warm_up)
    none, full, warm = [records(tmp_path / (name + '.pth'), 'train')[-1]['kl'] for name in ('none', 'all', 'warm-up')]
    assert full < 0.3 * none and full < 0.3 * warm and max(norms) == pytest.approx(p1_vae.GRADIENT_NORM, rel=1e-3)


@pytest.mark.parametrize('learner', ['generator', 'discriminator'])
@pytest.mark.parametrize('method', ['dcgan', 'sngan', 'wgan_gp', 'r1'])            # every loss and norm
def test_each_net_of_the_gan_learns_against_one_that_stays(data_dir, tmp_path, method, learner):
    """Against one that learns too, who leads at the end is left to the rounding of the processor."""
    ckpt, rate = tmp_path / 'run.pth', p2_gan.METHODS[method]['learning_rates'][1]
    # without a norm the scores of a narrow discriminator with its first weights hardly differ
    wide = method == 'r1' and learner == 'generator'
    rates = (5e-3, 0.0) if learner == 'generator' else (0.0, rate)
    train(p2_gan, data_dir, ckpt, '--steps', 40 if wide else 200, '--method', method, every=200,
          METHODS=dict(p2_gan.METHODS, **{method: dict(p2_gan.METHODS[method], learning_rates=rates)}),
          DISCRIMINATOR_CHANNELS=[64, 128, 256, 512] if wide else TINY)
    log = records(ckpt, 'train')
    first, last = [{name: mean_of(part, name) for name in ('real', 'fake')} for part in (log[:20], log[-20:])]
    if learner == 'discriminator':
        assert last['real'] - last['fake'] > 2 * abs(first['real'] - first['fake'])
    else:                                  # with rates of 0 it moves by a hundredth
        assert last['fake'] > first['fake'] + 0.1


@pytest.mark.parametrize('program,constant,scalar,flags', [
    (p3_dann, 'REVERSAL', 'domain_accuracy', []), (p4_adda, 'ADVERSARIAL', 'fooling_loss', ['--pieces', 'anchor'])])
def test_encoder_works_against_the_discriminator(data_dir, tmp_path, program, constant, scalar, flags):
    """An encoder that works with it, by a weight of the other sign, lets it tell the domains apart better."""
    against, along = tmp_path / 'against.pth', tmp_path / 'along.pth'
    for ckpt, weight in ((against, 5.0), (along, -5.0)):
        train(program, data_dir, ckpt, '--steps', 120, *flags, every=120, **{constant: weight})
    assert mean_of(records(against, 'train')[-40:], scalar) < 0.95 * mean_of(records(along, 'train')[-40:], scalar)
    assert not same(*[state(program, ckpt)['discriminator'] for ckpt in (against, along)])


@pytest.mark.parametrize('program,flags,expected', [
    (p3_dann, ['--setting', 'dann', '--augment', 0], 'mnistm'),
    (p3_dann, ['--setting', 'source', '--augment', 0], 'usps'),
    (p4_adda, ['--pieces', 'normalise'], 'mnistm')])
def test_statistics_are_those_of_the_domain(data_dir, tmp_path, program, flags, expected):
    """Of the target for adapted nets, of the source for the lower bound."""
    ckpt = tmp_path / 'run.pth'
    train(program, data_dir, ckpt, '--steps', 12, *flags)
    net = load_net(models.DigitNet, str(ckpt), program.PROBLEM, CPU)[0]
    before = {key: value.clone() for key, value in net.state_dict().items() if 'running' in key}
    for domain in ('mnistm', 'usps'):
        images = read_digits(data_dir, domain, 'train').images
        renewed = with_statistics(net, to_float(images[split_held_out(len(images))[0]]), CPU).state_dict()
        close = all(torch.allclose(value, renewed[key], rtol=1e-3, atol=1e-5) for key, value in before.items())
        assert close == (domain == expected), domain


@each(PROGRAMS)
def test_same_seed_same_weights_another_seed_others(program, data_dir, tmp_path, unbroken):
    train(program, data_dir, tmp_path / 'again.pth', '--steps', 30)
    train(program, data_dir, tmp_path / 'other.pth', '--steps', 30, '--seed', 1)
    assert_same_run(program, unbroken(program), tmp_path / 'again.pth')
    assert not same(weights(program, unbroken(program)), weights(program, tmp_path / 'other.pth'))


@each(PROGRAMS + [p5_diffusion, p6_acgan])
def test_stopped_run_goes_on_as_if_nothing_had_happened(program, data_dir, tmp_path, unbroken):
    """Stopped twice, in step 7 and in step 18, after saves at 5 and 15: the same curve, the same weights."""
    ckpt = tmp_path / 'run.pth'
    stop(program, data_dir, ckpt, '--steps', 30, at=7)
    torch.manual_seed(99)                  # of the process that went away
    stop(program, data_dir, ckpt, '--resume', at=18)
    torch.manual_seed(99)
    assert sorted(os.listdir(str(tmp_path))) == ['run_last.jsonl', 'run_last.pth']
    assert state(program, ckpt)['step'] == 15
    train(program, data_dir, ckpt, '--resume')
    assert_same_run(program, unbroken(program), ckpt)
    assert '--steps 30' in load_checkpoint(str(ckpt), program.PROBLEM)['command']


def test_stopped_run_leaves_the_old_checkpoint_and_its_log_alone(data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    save_checkpoint(str(ckpt), dict(problem='p1_vae'))
    (tmp_path / 'run.jsonl').write_text('old')
    before = ckpt.read_bytes()
    stop(p1_vae, data_dir, ckpt, '--steps', 12, at=6)
    assert ckpt.read_bytes() == before and (tmp_path / 'run.jsonl').read_text() == 'old'


def test_file_of_another_kind_is_not_overwritten(data_dir, tmp_path):
    for name in ('labels.csv', 'torn.pth'):
        (tmp_path / name).write_text('image_name,label')
    save_checkpoint(str(tmp_path / 'other.pth'), dict(problem='p9_other'))
    for name, words in (('labels.csv', 'does not end in .pth: name such a file'),
                        ('torn.pth', 'is torn, or no checkpoint.*name another file'),
                        ('other.pth', 'is a checkpoint of p9_other.*name another file')):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(SystemExit, match=f'{name}.*{words}'):
            train(p1_vae, data_dir, tmp_path / name, '--steps', 1)
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(SystemExit, match='is a folder'):
        train(p1_vae, data_dir, tmp_path)
    assert len(os.listdir(str(tmp_path))) == 3


def test_killed_while_saving(data_dir, tmp_path):
    """A real kill -9 while the temporary file is there: the save before it loads, and leftovers do not pile up."""
    ckpt, last = tmp_path / 'run.pth', tmp_path / 'run_last.pth'
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import p1_vae; p1_vae.SAVE_EVERY = 1; '
            f'p1_vae.NET = {SMALL[p1_vae]["NET"]!r}; p1_vae.main()')
    for _ in range(2):
        process = subprocess.Popen([sys.executable, '-c', code, '--train', '--data_dir', data_dir, '--ckpt', str(ckpt),
                                    '--batch_size', '4', '--steps', '5000', '--resume'], stdout=subprocess.DEVNULL)
        while not (last.exists() and any(name.startswith('.') for name in os.listdir(str(tmp_path)))):
            assert process.poll() is None
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert state(p1_vae, ckpt)['step'] >= 1
    assert not ckpt.exists() and len([name for name in os.listdir(str(tmp_path)) if name.startswith('.')]) <= 1


def test_resume_needs_no_run_and_finishes_a_finished_one(data_dir, tmp_path, capsys):
    ckpt = tmp_path / 'run.pth'
    train(p1_vae, data_dir, ckpt, '--steps', 2, '--resume')
    assert 'starting a new run' in capsys.readouterr().out
    first = weights(p1_vae, ckpt)
    ckpt.unlink()
    train(p1_vae, data_dir, ckpt, '--resume')
    assert same(first, weights(p1_vae, ckpt)) and len(records(ckpt, 'test')) == 1


def test_new_run_over_a_finished_one_is_never_taken_for_it(data_dir, tmp_path, capsys):
    """Stopped before its first save, it has nothing to resume: not the finished run's state either."""
    ckpt = tmp_path / 'run.pth'
    train(p1_vae, data_dir, ckpt, '--steps', 2)
    stop(p1_vae, data_dir, ckpt, '--steps', 12, at=3)
    assert len(records(ckpt, 'train')) == 2                      # the finished run's log, untouched
    train(p1_vae, data_dir, ckpt, '--resume', '--steps', 3)
    assert 'starting a new run' in capsys.readouterr().out and len(records(ckpt, 'train')) == 3


def test_resume_refuses_another_run(own_data_dir, tmp_path):
    """A new run, another flag, another constant of the method, other images, fewer images."""
    ckpt, folder = tmp_path / 'run.pth', os.path.join(own_data_dir, 'face', 'train')
    stop(p1_vae, own_data_dir, ckpt, '--steps', 12, at=6)

    def refused(*words, match, **constants):
        before = (tmp_path / 'run_last.pth').read_bytes()
        with pytest.raises(SystemExit, match=match):
            train(p1_vae, own_data_dir, ckpt, *words, **constants)
        assert (tmp_path / 'run_last.pth').read_bytes() == before
    refused('--steps', 12, match='add --resume')
    refused('--resume', '--seed', 5, match='started with seed 0, and now it is 5')
    refused('--resume', match='AVERAGE_DECAY 0.999, and now it is 0.5', AVERAGE_DECAY=0.5)
    Image.new('RGB', (64, 64), (1, 2, 3)).save(os.path.join(folder, '00003.png'))
    refused('--resume', match='was started with data .*delete the file to start anew')
    with open(folder + '.csv') as file:
        lines = file.readlines()
    os.remove(os.path.join(folder, lines[-1].split(',')[0]))
    with open(folder + '.csv', 'w') as file:
        file.writelines(lines[:-1])
    refused('--resume', match='was started with held_out 4, and now it is 3')


def test_out_of_memory(data_dir, tmp_path):
    """A batch that is larger than the memory a process may have: one line that names the flag, and no file."""
    words = (f'ulimit -v 12000000; python3 "{ROOT}/p1_vae.py" --train --batch_size 10000000 --data_dir "{data_dir}" '
             f'--ckpt "{tmp_path}/run.pth"')
    assert_one_line(run(['bash', '-c', words]), 'not enough memory', '--batch_size')
    assert os.listdir(str(tmp_path)) == []


def test_full_disk(data_dir, tmp_path):
    """A limit on the size of a file fails the first save: one line, and nothing half-written."""
    with file_limit(20000), pytest.raises(SystemExit, match='cannot write .*run_last.pth'):
        train(p1_vae, data_dir, tmp_path / 'run.pth', '--steps', 9)
    assert os.listdir(str(tmp_path)) == []


def test_init_takes_weights_but_not_the_run(data_dir, tmp_path):
    first, ckpt = tmp_path / 'first.pth', tmp_path / 'run.pth'
    train(p1_vae, data_dir, first, '--steps', 30)
    train(p1_vae, data_dir, ckpt, '--steps', 1, '--init', first, '--lambda_kl', '3e-4')
    assert records(ckpt, 'train')[0]['reconstruction'] < records(first, 'train')[0]['reconstruction']
    with pytest.raises(SystemExit, match='training state'):
        train(p1_vae, data_dir, tmp_path / 'x.pth', '--init', tmp_path / 'run_last.pth')


@pytest.mark.parametrize('method', sorted(p2_gan.METHODS))
def test_methods_of_the_gan(data_dir, tmp_path, monkeypatch, method):
    """Seventeen steps of each, some of them stopped and resumed, with all that the learning curves need.

    Where the statistics of a batch count, real and generated images do not share one.  All faces are augmented.
    """
    sizes, seen, updates, forward = set(), set(), [], models.Discriminator.forward
    monkeypatch.setattr(p2_gan, 'update_average', lambda *words: (
        updates.append(words[2]), models.update_average(*words)))
    monkeypatch.setattr(models.Discriminator, 'forward', lambda net, x: (sizes.add(len(x)), seen.update(
        image.numpy().tobytes() for image in to_uint8((x.detach() + 1) / 2)), forward(net, x))[-1])
    one, two = tmp_path / 'one.pth', tmp_path / 'two.pth'
    train(p2_gan, data_dir, one, '--steps', 17, '--method', method)
    if method in ('dcgan', 'wgan_gp'):
        stop(p2_gan, data_dir, two, '--steps', 17, '--method', method, at=8)
        train(p2_gan, data_dir, two, '--resume')
        assert_same_run(p2_gan, one, two)
    always = {'real', 'fake', 'held_out', 'discriminator_loss', 'learning_rate', 'kind', 'step'}
    penalty_every = p2_gan.PENALTIES.get(method, {}).get('every')
    for record in records(one, 'train'):
        wanted = always | ({'penalty'} if penalty_every and record['step'] % penalty_every == 0 else set())
        if record['step'] % p2_gan.METHODS[method]['generator_every'] == 0:
            wanted = wanted | {'generator_loss'}
        assert set(record) == wanted
    faces = FaceImages(data_dir, 'train').images
    assert sizes == ({4} if method == 'dcgan' else {4, 8}) and updates[:3] == [1, 2, 3]
    assert not seen & {image.numpy().tobytes() for image in torch.cat([faces, faces.flip(3)])}
    progress = load_checkpoint(str(one), 'p2_gan')['progress']
    assert [step for step, _ in progress] == [0, 5, 10]
    assert all(images.shape == (8, 3, 64, 64) for _, images in progress)


def test_penalty_counts_with_its_weight(data_dir, tmp_path):
    """R1's penalty at every 16th step counts 16 times: it gives the gradient of 16 times its weight at every step.

    The nets do not move, beta 1 is 0, and so Adam's first moment is the gradient of the last step.
    """
    moments = []
    r1 = dict(p2_gan.METHODS['r1'], learning_rates=(0.0, 0.0))
    for weight, every in ((50.0, 16), (800.0, 1), (50.0, 17)):
        ckpt = tmp_path / f'{weight}_{every}.pth'
        train(p2_gan, data_dir, ckpt, '--steps', 16, every=16, METHODS=dict(r1=r1),
              PENALTIES=dict(r1=dict(weight=weight, every=every)))
        optimizer = state(p2_gan, ckpt)['discriminator_optimizer']
        moments.append(optimizer['state'][optimizer['param_groups'][0]['params'][0]]['exp_avg'])
    sixteenth, always, never = moments
    assert torch.allclose(sixteenth, always, rtol=1e-3, atol=1e-7) and not torch.allclose(sixteenth, never, rtol=0.1)


@each(DIGITS)
def test_log_of_the_digits_has_means_over_its_steps(program, data_dir, tmp_path):
    """Over those that have the loss: ADDA's last two steps of ten have no label loss."""
    logs = []
    for log_every in (1, 5):
        ckpt = tmp_path / f'{log_every}.pth'
        train(program, data_dir, ckpt, '--steps', 10, LOG_EVERY=log_every)
        logs.append(records(ckpt, 'train'))
    single, means = logs
    assert len(single) == 10 and [record['label_loss'] for record in means] == [
        pytest.approx(mean_of(part, 'label_loss'), rel=1e-4) for part in (single[:5], single[5:])]
    assert ('label_loss' in single[-1]) == (program is p3_dann)


@pytest.mark.parametrize('setting,augment', [('source', 0), ('target', 1)])
def test_settings_of_the_digits(data_dir, tmp_path, setting, augment):
    """The bounds are trained, stopped and resumed as DANN is, without a domain discriminator."""
    one, two, flags = tmp_path / 'one.pth', tmp_path / 'two.pth', ['--setting', setting, '--augment', augment]
    train(p3_dann, data_dir, one, '--steps', 150, *flags)
    stop(p3_dann, data_dir, two, '--steps', 150, *flags, at=28)
    train(p3_dann, data_dir, two, '--resume')
    assert_same_run(p3_dann, one, two)
    log, test = records(one, 'train'), records(one, 'test')[0]
    assert all(set(record) == {'kind', 'step', 'label_loss', 'learning_rate'} for record in log)
    assert ('adabn_accuracy' in test) == (setting == 'source')
    if setting == 'source':
        assert mean_of(log[-25:], 'label_loss') < 0.8 * mean_of(log[:25], 'label_loss')
        net, digits = load_net(models.DigitNet, str(one), 'p3_dann', CPU)[0], read_digits(data_dir, 'mnistm', 'test')
        images = read_digits(data_dir, 'mnistm', 'train').images
        net = with_statistics(net, to_float(images[split_held_out(len(images))[0]]), CPU)
        assert models.accuracy(net, digits.images, digits.labels, CPU) == pytest.approx(test['adabn_accuracy'])


@pytest.mark.parametrize('setting', ['dann', 'dann_entropy'])
def test_log_of_dann_and_what_its_losses_see(data_dir, tmp_path, monkeypatch, setting):
    """The reversal is as strong as the log says; the entropy is that of target predictions, and has the ramp too."""
    strengths, entropies, images, losses = [], [], [], []
    reversal, entropy, augment = models.GradientReversal, p3_dann.conditional_entropy, p3_dann.augment_digits

    class Watched:
        @staticmethod
        def apply(x, strength):
            strengths.append(strength)
            return reversal.apply(x, strength)
    monkeypatch.setattr(p3_dann, 'GradientReversal', Watched)
    monkeypatch.setattr(p3_dann, 'conditional_entropy', lambda logits: (
        logits.retain_grad(), entropies.append(logits), entropy(logits))[-1])
    monkeypatch.setattr(p3_dann, 'augment_digits', lambda x, *more: (images.append(x), augment(x, *more))[1])
    monkeypatch.setattr(p3_dann, 'take_step', lambda optimizer, loss, rate: (
        loss.backward(), losses.append(loss.item())))
    ckpt = tmp_path / 'run.pth'
    train(p3_dann, data_dir, ckpt, '--steps', 10, '--setting', setting, '--augment', 0,
          NET=dict(SMALL[p3_dann]['NET'], dropout=0.0))
    log = records(ckpt, 'train')
    assert losses == [pytest.approx(record['label_loss'] + record['domain_loss'] + p3_dann.ramp_at(
        record['step'], 10) * p3_dann.ENTROPY * record.get('entropy', 0), rel=1e-4) for record in log]
    wanted = {'kind', 'step', 'label_loss', 'domain_loss', 'domain_accuracy', 'reversal', 'learning_rate'}
    assert all(set(record) == wanted | ({'entropy'} if setting == 'dann_entropy' else set()) for record in log)
    assert [record['reversal'] for record in log] == [
        pytest.approx(p3_dann.REVERSAL * p3_dann.ramp_at(step, 10)) for step in range(1, 11)] == strengths[::2]
    assert strengths[1::2] == strengths[::2]
    if setting == 'dann_entropy':          # the nets do not learn, so the last net is that of every step
        net = models.DigitNet(**dict(SMALL[p3_dann]['NET'], dropout=0.0)).train()
        net.load_state_dict(state(p3_dann, ckpt)['net'])
        source, target = images[-2:]
        assert torch.allclose(net(target), entropies[-1], atol=1e-4) and entropies[-1].grad.abs().max() > 0
        assert not torch.allclose(net(source), entropies[-1], atol=1e-2)


@each(DIGITS)
def test_target_labels_do_not_reach_adaptation(program, own_data_dir, data_dir, tmp_path):
    """Other labels of the target's training images, and other test images: the same weights."""
    train(program, data_dir, tmp_path / 'one.pth', '--steps', 12)
    folder = os.path.join(own_data_dir, 'digits', 'mnistm')
    write_rows(os.path.join(folder, 'train.csv'), ['image_name', 'label'],
               [[f'{index:05d}.png', 3] for index in range(40)])
    os.remove(os.path.join(folder, 'test', '00011.png'))
    write_rows(os.path.join(folder, 'test.csv'), ['image_name', 'label'],
               [[f'{index:05d}.png', 5] for index in range(11)])
    train(program, own_data_dir, tmp_path / 'two.pth', '--steps', 12)
    assert same(weights(program, tmp_path / 'one.pth'), weights(program, tmp_path / 'two.pth'))
    if program is p3_dann:                 # the upper bound learns from them
        for folder, name in ((data_dir, 'a.pth'), (own_data_dir, 'b.pth')):
            train(p3_dann, folder, tmp_path / name, '--steps', 12, '--setting', 'target')
        assert not same(weights(p3_dann, tmp_path / 'a.pth'), weights(p3_dann, tmp_path / 'b.pth'))


@each(DIGITS)
def test_any_pair_of_domains_and_batches_of_one(program, data_dir, tmp_path):
    for target, source in (('usps', 'mnistm'), ('svhn', 'usps'), ('mnistm', 'svhn')):
        ckpt = tmp_path / f'{target}.pth'
        train(program, data_dir, ckpt, '--target', target, '--source', source, '--steps', 1)
        settings = load_checkpoint(str(ckpt), program.PROBLEM)['settings']
        assert (settings['source'], settings['target']) == (source, target)
    train(program, data_dir, tmp_path / 'run.pth', '--steps', 8, '--batch_size', 1)


@pytest.mark.parametrize('pieces', ['none', 'all'])
def test_adaptation_leaves_classifier_and_source_net_alone(data_dir, tmp_path, monkeypatch, pieces):
    """Of 60 steps the first six train them, the others the target encoder alone; the teacher follows it.

    With anchor the others train the classifier too.  The discriminator's source features are those of the source net,
    and the teacher sees images as they are.
    """
    ckpt, states, views, features, taught = tmp_path / 'run.pth', {}, [], [], []
    save, view, discriminator_input = models.Run._save, p4_adda.augmented_view, p4_adda.discriminator_input
    teacher = p4_adda.teacher_probabilities
    monkeypatch.setattr(p4_adda, 'teacher_probabilities', lambda net, x, shares: (
        taught.extend(to_uint8(x)), teacher(net, x, shares))[1])
    monkeypatch.setattr(models.Run, '_save', lambda run: (save(run), states.update(
        {run.step: state(p4_adda, ckpt)}) if run.step in (6, 59, 60) else None))
    monkeypatch.setattr(p4_adda, 'augmented_view', lambda *words: (views.append(view(*words)), views[-1])[1])
    monkeypatch.setattr(p4_adda, 'discriminator_input', lambda *words: (
        features.append(words[0].detach()), discriminator_input(*words))[1])
    train(p4_adda, data_dir, ckpt, '--steps', 60, '--pieces', pieces, every=1)
    source, before, after = [states[step] for step in (6, 59, 60)]
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
    images = read_digits(data_dir, 'mnistm', 'train').images
    assert all((image == images).flatten(1).all(1).any() for image in taught) and len(taught) == 216 * (pieces == 'all')
    if pieces == 'none':                   # the last two views of a step: source images, target images
        net = models.DigitNet(**dict(SMALL[p4_adda]['NET'], normalise=False)).eval()
        net.load_state_dict(after['source_net'])
        assert torch.allclose(net.encoder(views[-2]), features[-2], atol=1e-5)


def test_every_piece_changes_the_net(data_dir, tmp_path):
    """The rows of the ablation and the controls, ten steps each: no two end with the same weights.

    In ten steps the teacher would be sure of no image, so here every image is enough for it; and no digit
    would become rare, so here the last batch alone counts.
    """
    found = []
    for _, pieces in p4_adda.ABLATION + p4_adda.CONTROLS:
        ckpt = tmp_path / f'{pieces}.pth'
        train(p4_adda, data_dir, ckpt, '--steps', 10, '--pieces', pieces or 'none', CONFIDENT=0.0, SHARES_DECAY=0.0)
        found.append(weights(p4_adda, ckpt))
    assert not any(same(one, other) for one, other in itertools.combinations(found, 2))


@pytest.mark.parametrize('pieces', [
    'none', 'all', 'normalise', 'augment', 'augment,patches', 'anchor', 'conditional', 'teacher', 'teacher,diversity',
    'teacher,self_training', 'anchor,no_discriminator', 'teacher,self_training,no_discriminator'])
def test_pieces_of_adda(data_dir, tmp_path, pieces):
    """Every switch trains source and target; the log has what it brings and nothing else."""
    ckpt = tmp_path / 'run.pth'
    train(p4_adda, data_dir, ckpt, '--steps', 20, '--pieces', pieces)
    chosen = {'none': [], 'all': p4_adda.PIECES}.get(pieces, pieces.split(','))
    assert load_checkpoint(str(ckpt), 'p4_adda')['settings']['pieces'] == ','.join(chosen)
    adversarial = set() if 'no_discriminator' in chosen else {'domain_loss', 'domain_accuracy', 'fooling_loss'}
    adversarial |= {'label_loss'} if 'anchor' in chosen else set()
    for record in records(ckpt, 'train'):
        start = 0 if record['step'] <= 2 else 2
        rate = models.cosine_rate(record['step'] - start, 2 if start == 0 else 18, p4_adda.LEARNING_RATE, 2)
        if record['step'] > 2 and not {'anchor', 'teacher'} & set(chosen):
            rate *= p4_adda.ADVERSARIAL          # of an encoder that the discriminator alone teaches
        assert record['learning_rate'] == pytest.approx(rate)
        wanted = {'kind', 'step', 'learning_rate'} | ({'label_loss'} if record['step'] <= 2 else set())
        if record['step'] > 2:
            wanted |= adversarial if record['step'] <= 16 or 'self_training' not in chosen else set()
            wanted |= {'confident_loss', 'confident_share'} if 'teacher' in chosen else set()
        assert set(record) == wanted, record['step']
    for record in records(ckpt, 'held_out'):
        assert 0 < record['nuclear_norm'] <= 1
        assert len(record['predicted_shares']) == 10 and sum(record['predicted_shares']) == pytest.approx(1)


@each(PROGRAMS)
def test_loss_that_is_not_finite_stops_the_run(program, data_dir, tmp_path):
    ckpt, diverge = tmp_path / 'run.pth', dict(LEARNING_RATE=1e30)
    if program is p2_gan:
        diverge = dict(METHODS=dict(r1=dict(p2_gan.METHODS['r1'], learning_rates=(1e30, 2e-4))))
    with pytest.raises(SystemExit, match='step.*the last good save'):
        train(program, data_dir, ckpt, '--steps', 300, every=1, **diverge)
    assert not ckpt.exists()
    assert state(program, ckpt)['step'] == records(ckpt, 'train', '_last.jsonl')[-1]['step']


@each([p1_vae, p2_gan, p5_diffusion, p6_acgan])
def test_only_a_default_run_replaces_the_shipped_weights(program, data_dir, capsys):
    code, line = refusal(capsys, program, '--train', '--data_dir', data_dir, '--steps', 1)
    assert code == 1 and '--steps' in line and '--ckpt' in line


FIGURES = {
    p1_vae: ['fig1_1.txt', 'fig1_2.png', 'fig1_4.jpg', 'fig1_4.png', 'fig1_5.png', 'fig1_6.jpg', 'fig1_7.png',
             'table1_3.csv', 'table1_3.jpg', 'table1_5.csv'],
    p2_gan: ['fig2_1.txt', 'fig2_2.jpg', 'fig2_2.png', 'fig2_3.png', 'fig2_4.jpg', 'fig2_5.jpg', 'table2.jpg'],
    p3_dann: ['fig3_1.jpg', 'fig3_4.csv', 'fig3_4_mnistm.png', 'fig3_4_mnistm_lower.png', 'fig3_4_svhn.png',
              'fig3_4_svhn_lower.png', 'fig3_4_usps.png', 'fig3_4_usps_lower.png', 'fig3_5.txt', 'fig3_6.png',
              'fig3_7.png', 'fig3_8.jpg', 'table3.csv'],
    p4_adda: ['fig4_2.csv', 'fig4_2_mnistm.png', 'fig4_2_svhn.png', 'fig4_2_usps.png', 'fig4_3.txt', 'fig4_4.png',
              'fig4_6.png', 'fig4_6_plain.png', 'fig4_7.jpg', 'fig4_8.png', 'table4.csv', 'table4_others.csv']}


@each([p1_vae, p2_gan])
def test_figures_of_the_faces(program, data_dir, tmp_path, unbroken, copy_of_project):
    """The real --plot writes every figure of the report, without training, and leaves the logs alone."""
    ckpt, out, checkpoints = unbroken(program), tmp_path / 'figures', copy_of_project / 'checkpoints'
    models.write_log(str(checkpoints / 'p1_linear_code.jsonl'), [
        dict(kind='linear_code', rate=rate, distortion=0.1 / rate, test_kl=rate, test_mse=0.08 / rate)
        for rate in (10, 40, 90)])
    models.write_log(str(checkpoints / 'samples.jsonl'), [
        dict(what='p2_gan', label='r1', sha256=models.sha256(str(ckpt)), images=960, own=3.0, clear=0.8, frechet=9.0,
             nearest=0.49, copied_least=5.0),
        dict(what='real', label='training faces', images=0, own=2.0, clear=0.9, frechet=7.0, nearest=0.48,
             copied_least=4.0)])
    models.write_log(str(checkpoints / 'p2_counts.jsonl'), [
        dict(what='p2_gan', sha256=models.sha256(str(ckpt)), faces=32, broken=5)])
    log = ckpt.with_suffix('.jsonl').read_text()
    words = ['python3', copy_of_project / (program.PROBLEM + '.py'), '--plot', '--data_dir', data_dir, '--ckpt', ckpt,
             '--out', out]
    result = run(words, MPLBACKEND='module://matplotlib_inline.backend_inline')
    assert result.returncode == 0, result.stderr
    assert_drawn(out, FIGURES[program])
    assert ckpt.with_suffix('.jsonl').read_text() == log


def train_table(program, data_dir, folder, *words):
    """Train runs of a table into a folder in place of checkpoints/, with ten steps as the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, 'CHECKPOINTS', str(folder))
        patch.setattr(models, 'pick_precision', lambda device: 'fp32')
        for name, value in dict(SMALL[program], DEFAULTS=dict(program.DEFAULTS, steps=10, batch_size=4)).items():
            patch.setattr(program, name, value)
        call(program, '--train', '--data_dir', data_dir, '--device', 'cpu', *words)


@each(DIGITS)
def test_train_alone_trains_the_nets_of_the_script(program, data_dir, tmp_path, capsys):
    """Without --target: one for each target, where the grader's script looks for them; --resume finishes them."""
    train_table(program, data_dir, tmp_path)
    paths = [tmp_path / f'{program.PROBLEM}_{target}.pth' for target in ('mnistm', 'svhn', 'usps')]
    checkpoints = [load_checkpoint(str(path), program.PROBLEM) for path in paths]
    assert [checkpoint['settings']['target'] for checkpoint in checkpoints] == ['mnistm', 'svhn', 'usps']
    paths[1].unlink()
    train_table(program, data_dir, tmp_path, '--resume')
    assert same(checkpoints[1]['net'], load_checkpoint(str(paths[1]), program.PROBLEM)['net'])
    assert not (tmp_path / f'{program.PROBLEM[:2]}_runs').exists()
    code, line = refusal(capsys, program, '--train', '--source', 'usps')
    assert code == 2 and '--target' in line


@pytest.mark.parametrize('program,flags', [(p3_dann, ['--setting', 'source']), (p4_adda, ['--pieces', 'none'])])
def test_figures_of_the_digits(data_dir, copy_of_project, tmp_path, program, flags):
    """The real --plot draws from the runs of a table, here of ten steps each, of one seed, on a dozen test images."""
    checkpoints = copy_of_project / 'checkpoints'
    plot = ['python3', copy_of_project / (program.PROBLEM + '.py'), '--plot', '--data_dir', data_dir, '--out',
            tmp_path / 'figures']
    assert_one_line(run(plot), 'no log of a run of', 'train_tables.sh')
    for words in ([], flags):
        for target in ('mnistm', 'svhn', 'usps'):
            train_table(program, data_dir, checkpoints, '--target', target, *words)
    if program is p4_adda:
        for row, seed, (source, target) in itertools.product(('source', 'dann_entropy', 'target'), (0, 1), (
                ('usps', 'mnistm'), ('mnistm', 'svhn'), ('svhn', 'usps'), ('mnistm', 'usps'))):
            models.write_log(str(checkpoints / 'p3_runs' / f'{source}_{target}' / f'{row}_seed{seed}.jsonl'), [
                dict(kind='run', settings=dict(source=source, target=target, seed=seed)),
                dict(kind='test', accuracy=0.5 + 0.1 * seed, adabn_accuracy=0.4, held_out_accuracy=0.3)])
    result = run(plot)
    assert result.returncode == 0, result.stderr
    assert_drawn(tmp_path / 'figures', FIGURES[program])
    lines = (tmp_path / 'figures' / f'table{program.PROBLEM[1]}.csv').read_text()
    if program is p3_dann:
        log = (checkpoints / 'p3_runs' / 'usps_mnistm' / 'source_seed0.jsonl').read_text().splitlines()
        accuracy = 100 * json.loads(log[-1])['accuracy']
        assert f'lower bound: source only,USPS,MNIST-M,1,{accuracy:.2f},,{accuracy:.2f},,' in lines
    else:
        assert 'DANN + entropy,USPS,MNIST-M,2,55.00,7.07,50.00,60.00,' in lines
        others = (tmp_path / 'figures' / 'table4_others.csv').read_text()
        assert 'upper bound: target only,MNIST-M,USPS,2,55.00' in others       # it is that of the same target
