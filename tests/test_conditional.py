"""Problems 5 and 6: the diffusion and the ACGAN against oracles, their trainings and their figures."""
import numpy as np
import p5_diffusion
import p6_acgan
import pytest
import torch
from conftest import assert_drawn, assert_one_line, records, refusal, run, same, state, stop, train, weights
from datasets import FaceImages, read_digits, to_uint8
from models import (ClassDiscriminator, ClassNorm, FaceGenerator, Generator, UNet, load_checkpoint, load_net,
                    measure_generated, sha256, write_log)

CPU = torch.device('cpu')
FACES = ['--data', 'faces', '--attribute', 'Smiling']


def small_unet():
    """A U-Net whose layers all have weights: new ones leave out what they are told."""
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
    found = p5_diffusion.ddim_sample(noise_in, start, steps)
    assert torch.allclose(found, image, atol=1e-3)
    assert len(seen) == steps and seen[0] == 490 and seen == sorted(set(seen), reverse=True)


def test_sampling_limits_the_expected_image_and_finds_its_noise_anew():
    """If the net expects a brightness of 3, x goes on as white with the noise that is then in it."""
    shares, x, seen = p5_diffusion.alpha_bars(), torch.randn(1, 3, 4, 4), []

    def noise_in(x, step):
        seen.append((x, shares[step]))
        return (x - shares[step].sqrt() * 3) / (1 - shares[step]).sqrt()
    found = p5_diffusion.ddim_sample(noise_in, x, 2)
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


@pytest.mark.parametrize('data', ['digits', 'faces'])
def test_nets_of_acgan(data):
    """Two images of one noise differ by their label, and the discriminator sees images of this size."""
    config, discriminator = p6_acgan.GENERATOR[data], ClassDiscriminator(**p6_acgan.DISCRIMINATOR[data])
    generator, size = p6_acgan.GENERATORS[data](**config).eval(), p6_acgan.DISCRIMINATOR[data]['size']
    images = generator(torch.randn(1, config['latent_dim']).expand(2, -1), torch.tensor([0, 1]))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1 and not torch.equal(images[0], images[1])
    scores, logits = discriminator(images)
    assert scores.shape == (2,) and logits.shape == (2, config['classes'])


def test_norm_of_a_class_is_a_batch_norm_with_its_scale_and_shift():
    norm, x, labels = ClassNorm(4, 3), torch.randn(6, 4, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    plain = torch.nn.BatchNorm2d(4)(x)
    assert torch.allclose(norm(x, labels), plain, atol=1e-5)     # at the start it is the same for every class
    table = torch.nn.init.normal_(norm.scale_and_shift.weight)
    expected = torch.stack([image * (1 + table[label, :4].view(4, 1, 1)) + table[label, 4:].view(4, 1, 1)
                            for image, label in zip(plain, labels)])
    assert torch.allclose(norm(x, labels), expected, atol=1e-5)


@pytest.mark.parametrize('weight', [0, 1, 0.5])
def test_losses_of_acgan_are_cross_entropies(weight):
    real, fake, labels = torch.randn(4), torch.randn(4), torch.tensor([0, 2, 1, 2])
    real_logits, fake_logits = torch.randn(4, 3), torch.randn(4, 3)
    adversarial = p6_acgan.discriminator_loss(real, fake)
    assert torch.allclose(adversarial, -torch.sigmoid(real).log().mean() - torch.sigmoid(-fake).log().mean())
    of_real, of_fake = [-torch.log_softmax(logits, 1)[range(4), labels].mean() for logits in (real_logits, fake_logits)]
    assert torch.allclose(p6_acgan.class_loss(real_logits, fake_logits, labels, weight), of_real + weight * of_fake)


def test_penalty_of_acgan_is_the_square_of_the_gradient():
    """Of a linear score the gradient is w at every image."""
    w = torch.randn(3 * 8 * 8, requires_grad=True)
    penalty = p6_acgan.r1_penalty(lambda x: x.flatten(1) @ w, torch.rand(5, 3, 8, 8))
    assert penalty.item() == pytest.approx((w ** 2).sum().item(), rel=1e-5)
    penalty.backward()
    assert torch.allclose(w.grad, 2 * w, rtol=1e-4)


def test_score_of_digits_knows_which_digit_was_asked_for():
    """A judge that reads the digit off the brightness is right about images whose class is their brightness."""
    class Judge(torch.nn.Module):
        def encoder(self, x):
            return x.mean((2, 3)) + torch.arange(3.0)

        def forward(self, x):
            return -(x.mean((1, 2, 3)).unsqueeze(1) - torch.arange(10) / 10.0) ** 2
    generated = (torch.arange(10) * 25.5).to(torch.uint8).view(1, 10, 1, 1, 1).expand(4, 10, 3, 28, 28)
    scores = measure_generated(generated, Judge(), generated.flatten(0, 1), CPU)
    assert scores['accuracy'] == 1 and scores['frechet'] == pytest.approx(0, abs=1e-6)


def test_noise_of_the_training_is_that_of_the_step_that_the_net_is_told(data_dir, tmp_path, monkeypatch):
    """The share alpha_bar that the images get belongs to the step; held-out images are for the average, in eval()."""
    shares, told, modes, add_noise, forward = [], [], [], p5_diffusion.add_noise, UNet.forward
    monkeypatch.setattr(p5_diffusion, 'add_noise', lambda x, noise, alpha_bar: (
        shares.append(alpha_bar), add_noise(x, noise, alpha_bar))[1])
    monkeypatch.setattr(UNet, 'forward', lambda net, x, steps, labels: (
        told.append(steps), modes.append(net.training), forward(net, x, steps, labels))[-1])
    train(p5_diffusion, data_dir, tmp_path / 'run.pth', '--steps', 3)
    told = told[:len(shares)]              # the others are of the score at the end
    assert len(shares) == 4 and modes[:4] == [True, True, True, False]
    assert torch.equal(torch.cat(shares), p5_diffusion.alpha_bars()[torch.cat(told)])


def test_label_that_is_dropped_is_not_learned(data_dir, tmp_path):
    """If all are dropped, what stands for the classes stays as it was, and what stands for none moves."""
    tables = []
    for steps in (1, 6):
        train(p5_diffusion, data_dir, tmp_path / f'{steps}.pth', '--steps', steps, LABEL_DROPPED=1.0)
        tables.append(weights(p5_diffusion, tmp_path / f'{steps}.pth')['label.weight'])
    assert torch.equal(tables[0][:10], tables[1][:10]) and not torch.equal(tables[0][10], tables[1][10])


def test_training_lowers_the_error_of_the_noise(data_dir, tmp_path):
    train(p5_diffusion, data_dir, tmp_path / 'run.pth', '--steps', 150, every=150)
    losses = [record['noise_loss'] for record in records(tmp_path / 'run.pth', 'train')]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_faces_start_from_problem_2_and_the_discriminator_learns_alone(data_dir, tmp_path):
    """At the start every label gives the face of problem 2; the generator moves after the first ALONE steps.

    Its average counts the steps from there on.
    """
    ckpt, first = tmp_path / 'run.pth', load_net(Generator, p6_acgan.FACES_START, 'p2_gan', CPU)[0]
    stop(p6_acgan, data_dir, ckpt, '--steps', 9, *FACES, at=4, every=1)
    net, average = state(p6_acgan, ckpt)['net'], FaceGenerator(**p6_acgan.GENERATOR['faces']).eval()
    average.load_state_dict(state(p6_acgan, ckpt)['average'])
    z = torch.randn(2, 128)
    assert all(torch.allclose(average(z, torch.tensor([label, label])), first(z), atol=1e-6) for label in (0, 1))
    assert same({name: value for name, value in net.items() if name.endswith(('weight', 'bias'))}, average.state_dict())
    assert all(set(record) == {'kind', 'step', 'discriminator_loss', 'class_loss', 'learning_rate'}
               for record in records(ckpt, 'train', '_last.jsonl'))
    stop(p6_acgan, data_dir, ckpt, '--resume', at=5, every=1)
    after, start = state(p6_acgan, ckpt), average.state_dict()['project.weight']
    assert after['net']['project.weight'][:, 128:].abs().max() > 0
    assert torch.allclose(after['average']['project.weight'], start / 21 + 20 / 21 * after['net']['project.weight'])


def test_penalty_of_acgan_counts_with_its_weight(data_dir, tmp_path, monkeypatch):
    """At every 16th step it counts 16 times: as 16 times the weight at every step.  It is taken at real images."""
    moments, points, r1_penalty = [], [], p6_acgan.r1_penalty
    monkeypatch.setattr(p6_acgan, 'r1_penalty', lambda score, x: (points.extend(to_uint8((x + 1) / 2)), r1_penalty(
        score, x))[1])
    for weight, every in ((50.0, 16), (800.0, 1), (50.0, 17)):
        ckpt = tmp_path / f'{weight}_{every}.pth'
        train(p6_acgan, data_dir, ckpt, '--steps', 16, every=16, R1_EVERY=every, R1_WEIGHT=dict(digits=weight),
              LEARNING_RATES=dict(digits=(0.0, 0.0)))
        optimizer = state(p6_acgan, ckpt)['discriminator_optimizer']
        moments.append(optimizer['state'][optimizer['param_groups'][0]['params'][0]]['exp_avg'])
    images, (sixteenth, always, never) = read_digits(data_dir, 'mnistm', 'train').images, moments
    assert len(points) == 4 * 17 and all((image == images).flatten(1).all(1).any() for image in points)
    assert torch.allclose(sixteenth, always, rtol=1e-3, atol=1e-7) and not torch.allclose(sixteenth, never, rtol=0.1)


def test_class_loss_of_generated_images_is_a_flag(data_dir, tmp_path):
    """Other weights come of it, and its value is logged within the class loss."""
    for name, words in (('real', []), ('both', ['--generated_class_weight', 1])):
        train(p6_acgan, data_dir, tmp_path / f'{name}.pth', '--steps', 2, *words)
    real, both = [records(tmp_path / f'{name}.pth', 'train')[0] for name in ('real', 'both')]
    assert both['class_loss'] > 1.5 * real['class_loss'] and both['discriminator_loss'] == real['discriminator_loss']
    assert load_checkpoint(str(tmp_path / 'both.pth'), 'p6_acgan')['settings']['generated_class_weight'] == 1


def test_figures(copy_of_project, data_dir, tmp_path, capsys):
    """The real --plot from small nets and made-up scores; another net in the place of a scored one is refused."""
    folder, scores, sums = copy_of_project / 'checkpoints', [], {}
    drawn = {'p5_diffusion': ['fig5_1.txt', 'fig5_2.jpg', 'table5.csv'],
             'p6_acgan': ['fig6_1.txt', 'fig6_2.jpg', 'fig6_4.jpg', 'fig6_5.jpg']}
    for program, what, name, flags in (
            (p5_diffusion, 'diffusion', 'p5_diffusion', []), (p6_acgan, 'acgan', 'p6_acgan', []),
            (p6_acgan, 'acgan_paper', 'p6_acgan_paper', ['--generated_class_weight', 1]),
            (p6_acgan, 'faces', 'p6_acgan_smiling', FACES)):
        train(program, data_dir, folder / (name + '.pth'), '--steps', 12, *flags)
        sums[what] = sha256(str(folder / (name + '.pth')))
    for index, (what, steps, guidance) in enumerate((('real', '', ''), ('acgan', '', ''), ('acgan_paper', '', ''),
                                                     ('diffusion', 50, 0.0), ('diffusion', 50, 2.0))):
        scores.append(dict(
            kind='digits', what=what, label=what, sampling_steps=steps, guidance=guidance, accuracy=0.91 + index / 100,
            frechet=30.0 + index, nearest=8.0 + index / 10, nearest_least=4.0 + index / 5,
            images_per_second=5.0 + index if steps else '', **{'sha256': sums[what]} if what in sums else {}))
    scores.append(dict(kind='faces', what='faces', attribute='Smiling', accuracy=0.7, real_accuracy=0.8,
                       sha256=sums['faces']))
    write_log(str(folder / 'p5_scores.jsonl'), scores)
    for program, names in drawn.items():
        result = run(['python3', copy_of_project / (program + '.py'), '--plot', '--out', tmp_path / program])
        assert result.returncode == 0, result.stderr
        assert_drawn(tmp_path / program, names)
    table = (tmp_path / 'p5_diffusion' / 'table5.csv').read_text(encoding='utf8').splitlines()
    assert table[1:] == ['real,,,91.0,30.0,8.00,4.00,', 'acgan,,,92.0,31.0,8.10,4.20,',
                         'acgan_paper,,,93.0,32.0,8.20,4.40,', 'diffusion,50,0.0,94.0,33.0,8.30,4.60,8.0',
                         'diffusion,50,2.0,95.0,34.0,8.40,4.80,9.0']
    scores[-1]['sha256'] = 'of another net'
    write_log(str(folder / 'p5_scores.jsonl'), scores)
    result = run(['python3', copy_of_project / 'p6_acgan.py', '--plot', '--out', tmp_path / 'other'])
    assert_one_line(result, 'has no scores of', 'p6_acgan_smiling.pth', 'benchmark.py (samples or conditional)')


def test_judge_is_asked_for(data_dir, tmp_path):
    for program in (p5_diffusion, p6_acgan):
        with pytest.raises(SystemExit, match=r'none.pth.*README.md'):
            train(program, data_dir, tmp_path / 'run.pth', JUDGE='none.pth')


@pytest.mark.parametrize('words', [['--data', 'faces', '--attribute', 'Male'], []])
def test_net_of_another_attribute_is_refused(words, tmp_path, capsys):
    ckpt, out = p6_acgan.shipped('faces', 'Smiling'), tmp_path / 'out.png'
    code, line = refusal(capsys, p6_acgan, '--ckpt', ckpt, '--out', out, *words)
    assert code == 1 and 'draws Smiling' in line and not out.exists()


def test_attribute_of_a_resumed_run(data_dir, tmp_path, monkeypatch):
    """The second class has it; another one than that of its start is refused."""
    seen = []
    monkeypatch.setattr(p6_acgan, 'data_checksum', lambda images, labels, test: seen.append(labels.tolist()) or 'sum')
    flags = ['--steps', 3, '--data', 'faces', '--attribute']
    for words in (['Male'], ['Male', '--resume']):
        train(p6_acgan, data_dir, tmp_path / 'm.pth', *flags + words)
    assert seen == 2 * [FaceImages(data_dir, 'train').attribute('Male').astype(int).tolist()]
    with pytest.raises(SystemExit, match='attribute Male'):
        train(p6_acgan, data_dir, tmp_path / 'm.pth', *flags + ['Smiling', '--resume'])


@pytest.mark.parametrize('learner', ['generator', 'discriminator'])
def test_each_net_of_acgan_learns_against_one_that_stays(data_dir, tmp_path, learner):
    """A generator alone comes to be called real and of its class; a discriminator alone tells both."""
    ckpt = tmp_path / 'run.pth'
    rates, steps = dict(generator=((5e-3, 0.0), 60), discriminator=((0.0, 5e-4), 120))[learner]
    # the first scores of a narrow discriminator hardly differ
    train(p6_acgan, data_dir, ckpt, '--steps', steps, every=steps, LEARNING_RATES=dict(digits=rates),
          DISCRIMINATOR=p6_acgan.DISCRIMINATOR)
    log = records(ckpt, 'train')
    for name in [learner + '_loss', dict(generator='generator_class_loss', discriminator='class_loss')[learner]]:
        first, last = [np.mean([record[name] for record in part]) for part in (log[:20], log[-20:])]
        assert last < (first - 0.005 if learner == 'generator' else 0.9 * first), name
