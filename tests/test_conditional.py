"""Problem 5: the diffusion and ACGAN against oracles, and --train and drawing through the command line."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line, kill_code, run, run_code
from PIL import Image

import p5_diffusion
import p6_acgan
import report.figures
from models import ClassDiscriminator, ClassGenerator, UNet, sha256, load_checkpoint, write_log

# the real programs with small nets that log and save often; their judge is another net, which is always there
QUICK = ('import sys; sys.path.insert(0, {root!r}); import {name} as program; program.LOG_EVERY = 1; '
         'program.SAVE_EVERY = 3; program.SCORED = 2; program.LEARNING_RATE_WARM_UP = 2; {small}; '
         'program.JUDGE = {judge!r}; '
         'import models; models.pick_precision = lambda device: "fp32"; ')
JUDGE = os.path.join(ROOT, 'checkpoints', 'p3_dann_mnistm.pth')
SMALL = dict(
    p5_diffusion='program.NET = dict(channels=[8, 16], conditioning=8, classes=10)',
    p6_acgan='program.LEARNING_RATES = (5e-3, 5e-3); '
             'program.GENERATOR = dict(digits=dict(latent_dim=4, channels=[4, 6], size=28, classes=10), '
             'faces=dict(latent_dim=4, channels=[4, 6, 8], size=64, classes=2)); '
             'program.DISCRIMINATOR_CHANNELS = dict(digits=[4, 6], faces=[4, 6, 8])')
FIGURES = dict(p5_diffusion=['fig5_1.txt', 'fig5_2.jpg', 'fig5_3.jpg', 'fig5_4.png', 'fig5_5.png', 'table5.csv',
                             'table5.png'],
               p6_acgan=['fig6_1.txt', 'fig6_2.jpg', 'fig6_3.png', 'fig6_4.jpg'])
FACES = ['--data', 'faces', '--attribute', 'Smiling']


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
    """A folder with a small net of each kind and their logs, under the names of the shipped ones."""
    folder = tmp_path_factory.mktemp('trained')
    for program, name, flags in (('p5_diffusion', 'p5_diffusion', []), ('p6_acgan', 'p6_acgan', []),
                                 ('p6_acgan', 'p6_acgan_smiling', FACES)):
        result = train(program, data_dir, folder / (name + '.pth'), '--steps', '40', *flags)
        assert result.returncode == 0, result.stderr
    return folder


def command(name, data_dir, ckpt, *words, **options):
    code = QUICK.format(root=ROOT, name=name, small=SMALL[name], judge=JUDGE)
    code += options.get('before', '') + 'program.main()'
    return ['python3', '-c', code, '--train', '--data_dir', str(data_dir), '--ckpt', str(ckpt), '--batch_size', '4',
            '--device', 'cpu'] + [str(word) for word in words]


def train(*arguments, **options):
    return run_code(command(*arguments, **options))


def records(ckpt, kind):
    with open(str(ckpt).replace('.pth', '.jsonl')) as file:
        lines = [json.loads(line) for line in file]
    return [{name: value for name, value in line.items() if name != 'images_per_second'}
            for line in lines if line['kind'] == kind]


def small_unet():
    """A U-Net whose layers all have weights: new ones leave out what they are told."""
    torch.manual_seed(0)
    net = UNet([8, 16], 3, 8).eval()
    for parameter in net.parameters():
        if (parameter == 0).all():
            torch.nn.init.normal_(parameter, 0, 0.1)
    return net


def test_noise_schedule_is_its_closed_form():
    shares = p5_diffusion.alpha_bars().double().numpy()
    wave = np.cos((np.arange(501) / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert shares.shape == (501,) and shares[0] == 1 and (np.diff(shares) < 0).all() and shares[-1] > 0
    assert np.allclose(shares[:-1], wave[:-1] / wave[0], rtol=1e-4)


def test_noised_images_have_the_shares_of_signal_and_noise():
    x, noise = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 2.0)
    found = p5_diffusion.add_noise(x, noise, torch.tensor([1.0, 0.36]))
    assert torch.allclose(found[0], x[0]) and torch.allclose(found[1], torch.tensor(0.6 * 0.5 + 0.8 * 2.0))


@pytest.mark.parametrize('steps', [1, 7, 50, 490])
def test_sampling_with_the_true_noise_returns_the_image(steps):
    """On the way x is always the image with this very noise (DDIM adds no new one)."""
    image, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    shares, seen = p5_diffusion.alpha_bars(), []

    def noise_in(x, step):
        assert torch.allclose(x, p5_diffusion.add_noise(image, noise, shares[step]), atol=1e-3)
        seen.append(step)
        return (x - shares[step].sqrt() * image) / (1 - shares[step]).sqrt()
    start = p5_diffusion.add_noise(image, noise, shares[p5_diffusion.SAMPLING_START])
    found, expected = p5_diffusion.ddim_sample(noise_in, start, steps, shown=(1, steps))
    assert torch.allclose(found, image, atol=1e-3)
    assert all(torch.allclose(one, image, atol=1e-3) for one in expected)
    assert len(seen) == steps and seen[0] == 490 and seen == sorted(set(seen), reverse=True)


def test_sampling_limits_the_expected_image_and_finds_its_noise_anew():
    """If the net expects a brightness of 3, x goes on as white with the noise that is then in it."""
    shares, x, seen = p5_diffusion.alpha_bars(), torch.randn(1, 3, 4, 4), []

    def noise_in(x, step):
        seen.append((x, shares[step]))
        return (x - shares[step].sqrt() * 3) / (1 - shares[step]).sqrt()
    found, _ = p5_diffusion.ddim_sample(noise_in, x, 2)
    (_, first), (second, share) = seen
    noise = (x - first.sqrt()) / (1 - first).sqrt()
    assert torch.allclose(second, share.sqrt() + (1 - share).sqrt() * noise, atol=1e-4)
    assert torch.allclose(found, torch.ones(1, 3, 4, 4))


def test_guidance_goes_on_from_the_untold_noise_through_the_told_one():
    net, x, labels = small_unet(), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        told = net(x, torch.tensor([70, 70, 70]), labels)
        untold = net(x, torch.tensor([70, 70, 70]), torch.tensor([3, 3, 3]))
        assert not torch.allclose(told, untold, atol=1e-4)
        assert torch.equal(p5_diffusion.guided_noise(net, x, 70, labels, 0), told)
        guided = p5_diffusion.guided_noise(net, x, 70, labels, 1.5)
        assert torch.allclose(guided, 2.5 * told - 1.5 * untold, atol=1e-5)


def test_what_the_unet_is_told_moves_its_output():
    net, x = small_unet(), torch.randn(1, 3, 28, 28).expand(2, -1, -1, -1)
    with torch.no_grad():
        for steps, labels in (((5, 5), (0, 2)), ((5, 6), (0, 0))):
            first, second = net(x, torch.tensor(steps), torch.tensor(labels))
            assert first.shape == (3, 28, 28) and not torch.allclose(first, second, atol=1e-4)


def test_new_unet_is_told_nothing_yet():
    """What its blocks add to their skips begins as 0."""
    net, x = UNet([8, 16], 3, 8), torch.randn(2, 3, 28, 28)
    assert torch.equal(*[net(x, torch.tensor([3, 4]), torch.tensor(labels)) for labels in ([0, 1], [2, 3])])


@pytest.mark.parametrize('size,channels,classes', [(28, [4, 6], 10), (64, [4, 6, 8, 10], 2)])
def test_nets_of_acgan(size, channels, classes):
    generator, discriminator = ClassGenerator(5, classes, channels, size), ClassDiscriminator(classes, channels, size)
    z = torch.randn(1, 5).expand(2, -1)
    images = generator.eval()(z, torch.tensor([0, 1]))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    assert not torch.equal(images[0], images[1])
    scores, logits = discriminator(images)
    assert scores.shape == (2,) and logits.shape == (2, classes)


def test_losses_of_acgan_are_cross_entropies():
    real, fake, labels = torch.randn(4), torch.randn(4), torch.tensor([0, 2, 1, 2])
    real_logits, fake_logits = torch.randn(4, 3), torch.randn(4, 3)
    adversarial, naming = p6_acgan.discriminator_losses(real, fake, real_logits, fake_logits, labels)
    assert torch.allclose(adversarial, -torch.sigmoid(real).log().mean() - torch.sigmoid(-fake).log().mean())
    assert torch.allclose(naming, -sum(torch.log_softmax(logits, 1)[range(4), labels].mean()
                                       for logits in (real_logits, fake_logits)))


@pytest.mark.parametrize('name', sorted(SMALL))
def test_killed_run_goes_on_as_if_nothing_had_happened(data_dir, tmp_path, name):
    one, two = tmp_path / 'one.pth', tmp_path / 'two.pth'
    result = train(name, data_dir, one, '--steps', '20')
    assert result.returncode == 0, result.stderr
    kill_code(command(name, data_dir, two, '--steps', '20'), (tmp_path / 'two_last.pth').exists)
    result = train(name, data_dir, two, '--resume')
    assert result.returncode == 0, result.stderr
    first, second = [load_checkpoint(str(path), name)['net'] for path in (one, two)]
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for kind in ('train', 'held_out', 'test'):
        assert records(one, kind) == records(two, kind)


def test_label_that_is_dropped_is_not_learned(data_dir, tmp_path):
    """If all are dropped, what stands for the classes stays as it was, and what stands for none moves."""
    tables = []
    for steps in (1, 6):
        ckpt = tmp_path / f'{steps}.pth'
        result = train('p5_diffusion', data_dir, ckpt, '--steps', steps, before='program.LABEL_DROPPED = 1.0; ')
        assert result.returncode == 0, result.stderr
        tables.append(load_checkpoint(str(ckpt), 'p5_diffusion')['net']['label.weight'])
    assert torch.equal(tables[0][:10], tables[1][:10]) and not torch.equal(tables[0][10], tables[1][10])


def test_training_lowers_the_error_of_the_noise(data_dir, tmp_path):
    ckpt = tmp_path / 'run.pth'
    result = train('p5_diffusion', data_dir, ckpt, '--steps', '150', before='program.SAVE_EVERY = 150; ')
    assert result.returncode == 0, result.stderr
    losses = [record['noise_loss'] for record in records(ckpt, 'train')]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_figures(copy_of_project, trained, tmp_path):
    """--plot from three small nets and made-up scores; another net in the place of a scored one is refused."""
    folder, scores = copy_of_project / 'checkpoints', []
    for name in os.listdir(str(trained)):
        shutil.copy(str(trained / name), str(folder))
    sums = {what: sha256(str(folder / (name + '.pth'))) for what, name in (
        ('diffusion', 'p5_diffusion'), ('acgan', 'p6_acgan'), ('faces', 'p6_acgan_smiling'))}
    rows = [('real', '', ''), ('acgan', '', ''), ('diffusion', 50, 0.0), ('diffusion', 50, 2.0), ('diffusion', 10, 2.0)]
    for index, (what, steps, guidance) in enumerate(rows):
        scores.append(dict(
            kind='digits', what=what, label=what, sampling_steps=steps, guidance=guidance, accuracy=0.91 + index / 100,
            frechet=30.0 + index, nearest=8.0 + index / 10, nearest_least=4.0 + index / 5,
            images_per_second=5.0 + index if steps else '', **{'sha256': sums[what]} if what in sums else {}))
    scores.append(dict(kind='faces', what='faces', attribute='Smiling', accuracy=0.7, real_accuracy=0.8,
                       sha256=sums['faces']))
    write_log(str(folder / 'p5_scores.jsonl'), scores)
    plots = {name: ['python3', copy_of_project / (name + '.py'), '--plot', '--out', tmp_path / name]
             for name in FIGURES}
    for program, names in FIGURES.items():
        result = run(plots[program])
        assert result.returncode == 0, result.stderr
        assert sorted(os.listdir(str(tmp_path / program))) == names
        for name in names:
            if name.endswith(('.png', '.jpg')):
                with Image.open(str(tmp_path / program / name)) as picture:
                    assert len(picture.convert('RGB').getcolors(2 ** 24)) > 20, name
    table = (tmp_path / 'p5_diffusion' / 'table5.csv').read_text(encoding='utf8').splitlines()
    assert table[1:] == ['real,,,91.0,30.0,8.00,4.00,', 'acgan,,,92.0,31.0,8.10,4.20,',
                         'diffusion,50,0.0,93.0,32.0,8.20,4.40,7.0', 'diffusion,50,2.0,94.0,33.0,8.30,4.60,8.0',
                         'diffusion,10,2.0,95.0,34.0,8.40,4.80,9.0']
    scores[-1]['sha256'] = 'of another net'
    write_log(str(folder / 'p5_scores.jsonl'), scores)
    assert_one_line(run(plots['p6_acgan']), 'has no scores of', 'p6_acgan_smiling.pth', 'benchmark.py conditional')


def test_curves_of_the_scores_show_their_records(tmp_path, monkeypatch):
    """fig5_4: accuracy above and distance below, over the guidance to the left and over the steps to the right."""
    drawn, scores = [], [dict(kind='digits', what=what, accuracy=0.5, frechet=9.0) for what in ('real', 'acgan')]
    for index, (steps, guidance) in enumerate(((50, 0.0), (50, 2.0), (10, 2.0))):
        scores.append(dict(kind='digits', what='diffusion', sampling_steps=steps, guidance=guidance,
                           accuracy=0.91 + index / 100, frechet=30.0 + index))
    monkeypatch.setattr(report.figures, 'save_figure', lambda path, figure: drawn.append(figure))
    p5_diffusion.plot_scores('fig5_4.png', scores)
    lines = [axes.get_lines()[0].get_xydata().tolist() for axes in drawn[0].axes]
    assert np.allclose(lines[0], [[0, 91], [2, 92]]) and np.allclose(lines[1], [[10, 93], [50, 92]])
    assert np.allclose(lines[2], [[0, 30], [2, 31]]) and np.allclose(lines[3], [[10, 32], [50, 31]])


def test_judge_is_asked_for(copy_of_project, data_dir):
    words = ['python3', copy_of_project / 'p5_diffusion.py', '--train', '--data_dir', data_dir]
    assert_one_line(run(words), 'target_seed0.pth', 'p3_dann.py --train')


def test_attribute_of_a_resumed_run(data_dir, tmp_path):
    """Another one than that of its start is refused."""
    flags = ['--steps', '3', '--data', 'faces', '--attribute']
    assert train('p6_acgan', data_dir, tmp_path / 'm.pth', *flags, 'Male').returncode == 0
    assert train('p6_acgan', data_dir, tmp_path / 'm.pth', '--resume', *flags, 'Male').returncode == 0
    result = train('p6_acgan', data_dir, tmp_path / 'm.pth', '--resume', *flags, 'Smiling')
    assert_one_line(result, 'attribute Male')


@pytest.mark.parametrize('learner', ['generator', 'discriminator'])
def test_each_net_of_acgan_learns_against_one_that_stays(data_dir, tmp_path, learner):
    """A generator alone comes to be called real and of its class; a discriminator alone tells both."""
    rates = dict(generator=(5e-3, 0.0), discriminator=(0.0, 5e-3))[learner]
    ckpt = tmp_path / 'run.pth'
    result = train('p6_acgan', data_dir, ckpt, '--steps', '200',
                   before=f'program.SAVE_EVERY = 200; program.LEARNING_RATES = {rates}; ')
    assert result.returncode == 0, result.stderr
    first, last = [{name: np.mean([record[name] for record in part]) for name in part[0] if name.endswith('loss')}
                   for logged in [records(ckpt, 'train')] for part in (logged[:20], logged[-20:])]
    for name in dict(generator=('generator_loss', 'named_loss'), discriminator=('discriminator_loss', 'naming_loss')
                     )[learner]:
        assert last[name] < 0.9 * first[name], name
