"""The digits' data and DANN's maths: oracles by hand, wrong data through the real command line."""
import math
import os
import threading

import pytest
import torch

import p3_dann
import p4_adda
from datasets import augment_digits, balanced_rows
from models import (DigitEncoder, DigitNet, GradientReversal, domain_accuracy, domain_loss, in_threads, predict,
                    with_statistics)

CPU = torch.device('cpu')
SMALL = dict(channels=[4, 6, 8], dropout=0.5)


def test_gradient_reversal_against_autograd_by_hand():
    x, weights = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    y = GradientReversal.apply(x, 0.3)
    assert torch.equal(y, x)
    (weights * y ** 2).sum().backward()
    assert torch.allclose(x.grad, -0.3 * 2 * weights * x.detach(), atol=1e-6)


def test_domain_loss_is_a_cross_entropy():
    source, target = torch.randn(7), torch.randn(7)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat([source, target]), torch.cat([torch.ones(7), torch.zeros(7)]))
    assert domain_loss(source, target).item() == pytest.approx(expected.item(), abs=1e-6)


def test_domain_accuracy_counts_either_domain_a_half():
    source, target = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, 1.0])
    assert domain_accuracy(source, target).item() == pytest.approx(0.5 * (0.75 + 0.5))


def test_schedules():
    strengths = [p3_dann.ramp_at(step, 1000) for step in range(1001)]
    assert strengths[0] == 0 and strengths[-1] == pytest.approx(1, rel=1e-3)
    assert strengths[100] == pytest.approx(math.tanh(0.5))      # p = 0.1
    assert all(later > earlier for earlier, later in zip(strengths, strengths[1:]))


def test_encoder_does_not_see_brightness_and_contrast():
    encoder, x = DigitEncoder([4, 6, 8], True).eval(), torch.rand(2, 3, 28, 28)
    scale = torch.tensor([0.5, 2.0, 0.8]).view(1, 3, 1, 1)
    assert torch.allclose(encoder(x), encoder(scale * x + 0.3), atol=1e-3)
    assert not torch.allclose(encoder(x), encoder(1 - x), atol=1e-3)               # but polarity it does


def test_renewed_statistics_are_those_of_the_images():
    """Of one batch, the first batch norm's statistics are the mean and variance that reach it."""
    old, images = DigitNet(**SMALL).train(), torch.rand(40, 3, 28, 28)
    net = with_statistics(old, images, CPU)
    convolution, pool, norm = net.encoder.layers[:3]
    x = pool(convolution(torch.nn.functional.instance_norm(images)))
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-4)
    assert not net.training and old.training and old.encoder.layers[2].running_mean.abs().max() == 0


def test_prediction_depends_on_no_other_image():
    net = DigitNet(**SMALL).eval()
    images = torch.randint(0, 256, (33, 3, 28, 28), dtype=torch.uint8)
    together = predict(net, images, CPU)
    assert together.dtype == torch.int64
    for batch_size in (1, 7, 32):
        assert torch.equal(predict(net, images, CPU, batch_size), together)
    order = torch.randperm(33)
    assert torch.equal(predict(net, images[order], CPU), together[order])


def test_augmentation_keeps_shapes_and_repeats_under_a_seed():
    images = torch.rand(16, 3, 28, 28)
    before = images.clone()
    first, second = [augment_digits(images, 1.0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert first.shape == images.shape and torch.equal(first, second) and torch.equal(images, before)
    assert torch.isfinite(first).all() and first.min() > -1.5 and first.max() < 2.5
    assert torch.equal(augment_digits(images, 0, torch.Generator().manual_seed(3)), images)
    assert not torch.equal(first, augment_digits(images, 1.0, torch.Generator().manual_seed(4)))
    # a black image has no contrast to stretch
    assert torch.isfinite(augment_digits(torch.zeros(4, 3, 28, 28), 1.0, torch.Generator())).all()


def test_augmentation_sharpens_half_of_the_images():
    """On a slope from black to white half of the images keep its greys, and the others lose up to six in seven."""
    slope = torch.linspace(0, 1, 28).expand(400, 3, 28, 28)
    changed = augment_digits(slope, 1.0, torch.Generator().manual_seed(0), torch.zeros(400, 3, 28, 28)).mean(1)
    low, high = [changed.flatten(1).kthvalue(rank, 1)[0].view(-1, 1, 1) for rank in (40, 28 * 28 - 40)]
    greys = ((changed - low) / (high - low) - 0.5).abs().lt(0.3).flatten(1).float().mean(1)
    assert (greys > 0.5).float().mean() == pytest.approx(0.6, abs=0.15)
    assert (greys < 0.25).float().mean() == pytest.approx(0.2, abs=0.1)


def test_augmentation_moves_a_dot_no_further_than_it_says():
    """Two pixels, 15 degrees, shear and scale at 6 pixels from the centre: no more than 5 pixels."""
    images = torch.zeros(200, 3, 28, 28)
    images[:, :, 13:15, 19:21] = 1
    changed = augment_digits(images, 1.0, torch.Generator().manual_seed(0))
    grey = (changed - changed.flatten(2).median(2)[0].view(-1, 3, 1, 1)).abs().mean(1)
    near = grey[:, 8:20, 14:26].flatten(1).max(1)[0]
    assert (near >= grey.flatten(1).max(1)[0] - 0.35).float().mean() > 0.9


def test_source_batches_hold_the_classes_in_equal_numbers():
    """Of 1,000, 100 and 10 images each class is drawn a third of the times, every image in the end."""
    labels = torch.tensor([0] * 1000 + [1] * 100 + [2] * 10)
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat([balanced_rows(labels, 64, rng) for _ in range(300)])
    shares = torch.bincount(labels[rows]).float() / len(rows)
    assert (shares - 1 / 3).abs().max() < 0.015
    assert len(set(rows.tolist())) > 1100 and rows.max() == 1109
    # a class that is missing is no error
    assert set(balanced_rows(torch.tensor([0, 2]), 50, rng).tolist()) == {0, 1}


def test_conditional_entropy_of_known_predictions():
    """log 10 for no idea, log 2 for one of two, 0 for a certainty; the mean over the images."""
    unsure, sure, half = torch.zeros(10), torch.zeros(10), torch.full((10,), -1e4)
    sure[3], half[:2] = 1e4, 0
    for logits, entropy in (([unsure], math.log(10)), ([sure], 0), ([half, half], math.log(2)),
                            ([unsure, sure], math.log(10) / 2)):
        assert p3_dann.conditional_entropy(torch.stack(logits)).item() == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize('module', [p3_dann, p4_adda])
def test_a_short_run_does_not_replace_the_shipped_one(module):
    for name, value in (('steps', 20), ('batch_size', 8), ('seed', 1)):
        path = module.shipped('mnistm', **{name: value})
        assert os.path.dirname(path).endswith(f'checkpoints/{module.PROBLEM[:2]}_runs/usps_mnistm')


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_threads_keep_the_order_and_raise(threads):
    names = set()

    def square(number):
        if number == 7:
            raise ValueError('seven')
        names.add(threading.current_thread().name)
        return number ** 2, torch.get_num_threads()
    results = list(in_threads(square, [3, 1, 2, 9, 4], CPU, threads))
    assert results == [(9, 1), (1, 1), (4, 1), (81, 1), (16, 1)] and 1 <= len(names) <= threads
    with pytest.raises(ValueError, match='seven'):
        list(in_threads(square, [3, 1, 7, 2], CPU, threads))
