"""The GAN's losses, nets and augmentation against oracles."""
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import p2_gan
from models import VAE, Discriminator, Generator, falling_rate, load_net

SMALL = [4, 6, 8, 10]


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('method', ['dcgan', 'dragan', 'r1'])
def test_logistic_losses_are_cross_entropies(method):
    real, fake = torch.randn(9), torch.randn(9)
    expected = (F.binary_cross_entropy_with_logits(real, torch.ones(9))
                + F.binary_cross_entropy_with_logits(fake, torch.zeros(9)))
    assert torch.allclose(p2_gan.discriminator_loss(method, real, fake), expected)
    # not saturating: -log D(G(z)), not log(1 - D(G(z)))
    assert torch.allclose(p2_gan.generator_loss(method, fake), -torch.sigmoid(fake).log().mean())


def test_other_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    assert p2_gan.discriminator_loss('sngan', real, fake).item() == pytest.approx((0 + 0.5 + 2 + 0 + 0.5 + 2) / 3)
    for method in ('wgan_gp', 'wgan_div'):
        assert p2_gan.discriminator_loss(method, real, fake).item() == pytest.approx((-2.5 - 1.5) / 3)
    for method in ('sngan', 'wgan_gp', 'wgan_div'):
        assert p2_gan.generator_loss(method, fake).item() == pytest.approx(2.5 / 3)


@pytest.mark.parametrize('method,expected', [
    ('wgan_gp', lambda norm: (norm - 1) ** 2), ('dragan', lambda norm: (norm - 1) ** 2),
    ('wgan_div', lambda norm: norm ** 6), ('r1', lambda norm: norm ** 2)])
def test_gradient_penalty_of_a_linear_function(method, expected):
    """Its gradient is w everywhere, so that the penalty is known, and it has a gradient for w."""
    w = (0.1 * torch.randn(3 * 8 * 8)).requires_grad_()
    penalty = p2_gan.gradient_penalty(method, lambda x: x.flatten(1) @ w, torch.rand(5, 3, 8, 8),
                                      torch.rand(5, 3, 8, 8), stream())
    assert penalty.item() == pytest.approx(expected(w.norm()).item(), rel=1e-4)
    penalty.backward()
    wanted, = torch.autograd.grad(expected(w.norm()), w)
    assert torch.allclose(w.grad, wanted, rtol=1e-3, atol=1e-5)


def test_gradient_penalty_is_taken_where_the_method_says():
    """Between real and drawn images, near real ones, or at these."""
    real, fake = torch.zeros(64, 1, 1, 2), torch.full((64, 1, 1, 2), 4.0)
    real[:, :, :, 1] = 1
    for method in p2_gan.PENALTIES:
        points = []

        def score(x, points=points):
            points.append(x.detach())
            return 0.5 * (x.flatten(1) ** 2).sum(1)
        penalty = p2_gan.gradient_penalty(method, score, real, fake, stream())
        x, rng = points[0], stream()
        if method == 'r1':
            assert torch.equal(x, real) and penalty.item() == pytest.approx(1)     # of half a square the gradient is x
        elif method == 'dragan':
            assert torch.allclose(x, real + 0.5 * real.std() * torch.rand(real.shape, generator=rng))
        else:
            assert torch.allclose(x, real + torch.rand(64, 1, 1, 1, generator=rng) * (fake - real))


def test_learning_rates_fall_at_the_end():
    rates = [falling_rate(step, 300, 0.2, p2_gan.FALLING) for step in range(1, 301)]
    assert rates[:200] == [0.2] * 200 and rates[-1] == pytest.approx(0.2 / 100)
    assert all(later < earlier for earlier, later in zip(rates[200:], rates[201:]))
    assert [falling_rate(step, 300, 0.2, 0) for step in (1, 300)] == [0.2, 0.2]


def test_spectral_norm_against_svd():
    discriminator = Discriminator(SMALL, 'spectral').train()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    for _ in range(200):                       # one power iteration each
        discriminator(x)
    layers = [layer for layer in discriminator.layers if isinstance(layer, torch.nn.Conv2d)]
    assert len(layers) == 5
    for layer in layers:
        raw = np.linalg.svd(layer.weight_orig.detach().flatten(1).numpy(), compute_uv=False)[0]
        used = layer.weight.detach().flatten(1)
        assert torch.allclose(used, layer.weight_orig.detach().flatten(1) / float(raw), atol=1e-3)
        assert np.linalg.svd(used.numpy(), compute_uv=False)[0] == pytest.approx(1, abs=1e-3)


def test_augmentation_of_strength_zero_changes_nothing():
    x = torch.rand(5, 3, 64, 64) * 2 - 1
    assert torch.equal(p2_gan.augment(x, 0, stream()), x)
    assert torch.allclose(p2_gan.augment(x, 1e-6, stream()), x, atol=1e-5)


def test_augmentation_is_differentiable():
    x = (torch.rand(2, 3, 8, 8) * 2 - 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: p2_gan.augment(x, 1.0, stream(4)), (x,))


def test_augmentation_of_flat_images():
    """A flat grey image shows brightness, the move and the blank alone."""
    images = p2_gan.augment(torch.full((200, 3, 64, 64), 0.1), 1.0, stream())
    values, kept = [], []
    for image in images:
        inside = image[image != 0]
        assert inside.max() - inside.min() < 1e-5
        values.append(inside[0].item() - 0.1)
        kept.append(len(inside) / image.numel())
    assert -0.5 <= min(values) < -0.4 and 0.4 < max(values) <= 0.5
    # at least the blank's quarter that lies inside is gone, at most all of it and two eighths
    assert 0.75 * (7 / 8) ** 2 - 0.25 * 15 / 64 <= min(kept) < max(kept) <= 1 - 0.25 / 4 + 0.02


def test_augmentation_changes_saturation_and_contrast():
    """Of reddish stripes, of which every move and blank leaves some, both factors fill their ranges."""
    x, saturations, contrasts = torch.zeros(200, 3, 64, 64), [], []
    x[:, 0], x[:, :, :, ::2] = 0.2, x[:, :, :, ::2] + torch.tensor([0.3, 0.1, 0.1]).view(1, 3, 1, 1)
    for image in p2_gan.augment(x, 1.0, stream()):
        seen = image[:, (image != 0).all(0)]
        contrasts.append(((seen[1].max() - seen[1].min()) / 0.1).item())
        saturations.append(((seen[0] - seen[1]).mean() / 0.2).item() / contrasts[-1])
    assert 0.5 <= min(contrasts) + 1e-3 < 0.55 and 1.45 < max(contrasts) <= 1.5 + 1e-3
    assert 0 <= min(saturations) + 1e-3 < 0.1 and 1.9 < max(saturations) <= 2 + 1e-3


def test_augmentation_moves_by_at_most_an_eighth():
    images = torch.full((300, 3, 64, 64), -0.5)
    images[:, :, 32, 32] = 1
    seen = set()
    for image in p2_gan.augment(images, 1.0, stream()):
        bright = (image.sum(0) == image.sum(0).max()).nonzero()
        if len(bright) == 1:                    # else the square has blanked it
            seen.add(tuple((bright[0] - 32).tolist()))
    for axis in (0, 1):
        moves = [move[axis] for move in seen]
        assert min(moves) == -8 and max(moves) == 8


def test_frechet_distance_against_scipy():
    from scipy.linalg import sqrtm
    rng = np.random.RandomState(0)
    a, b = rng.randn(300, 6) @ rng.randn(6, 6), rng.randn(200, 6) + 1
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert p2_gan.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert p2_gan.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert p2_gan.frechet_distance(a, a + 2) == pytest.approx(4 * 6, rel=1e-9)
    few = rng.randn(3, 6)                       # fewer than dimensions
    assert p2_gan.frechet_distance(few, few + 1) == pytest.approx(6, rel=1e-6)


def test_held_out_score_is_worse_for_worse_faces(monkeypatch):
    """Of the shipped generator: its own noise scores better than noise that is too small."""
    cpu = torch.device('cpu')
    generator = load_net(Generator, os.path.join(ROOT, 'checkpoints', 'p2_gan.pth'), 'p2_gan', cpu)[0]
    judge = load_net(VAE, p2_gan.JUDGE, 'p1_vae', cpu)[0]
    monkeypatch.setattr(p2_gan, 'SCORED', 300)
    images = p2_gan.generate_faces(generator, 300, 5, cpu)
    good = p2_gan.measure(generator, judge, images, cpu)['frechet']
    assert good == p2_gan.measure(generator, judge, images, cpu)['frechet']
    generator.project.weight.data *= 0.7
    assert p2_gan.measure(generator, judge, images, cpu)['frechet'] > 1.2 * good
