"""ADDA's losses against oracles on hand-made numbers."""
import numpy as np
import pytest
import torch

import p4_adda
from datasets import random_patches
from models import DigitNet, nuclear_norm


def test_discriminator_sees_products_of_features_and_probabilities():
    features, logits = torch.randn(4, 5), torch.randn(4, 10)
    assert p4_adda.discriminator_input(features, logits, False) is features
    found = p4_adda.discriminator_input(features, logits, True)
    probabilities = torch.softmax(logits, 1)
    expected = torch.stack([torch.ger(*row).flatten() for row in zip(probabilities, features)])
    assert found.shape == (4, 50) and torch.allclose(found, expected, atol=1e-6)


def test_fooling_loss_is_the_discriminators_with_the_labels_changed():
    verdicts = torch.randn(9)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(verdicts, torch.ones(9))
    assert p4_adda.adversarial_loss(verdicts).item() == pytest.approx(expected.item(), abs=1e-6)


def test_only_confident_images_count():
    """Three images: sure of 2, exactly at the bar for 7, and unsure, which adds 0 to the mean over all."""
    probabilities = torch.full((3, 10), 0.001)
    probabilities[0, 2], probabilities[1, 7], probabilities[2, 4] = 0.99, p4_adda.CONFIDENT, 0.5
    logits = torch.randn(3, 10, requires_grad=True)
    loss, share = p4_adda.pseudo_label_loss(logits, probabilities)
    log_probabilities = torch.log_softmax(logits, 1)
    expected = -(log_probabilities[0, 2] + log_probabilities[1, 7]) / 3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert share.item() == pytest.approx(2 / 3)
    loss.backward()
    assert logits.grad[2].abs().max() == 0 < logits.grad[:2].abs().max()
    nobody, share = p4_adda.pseudo_label_loss(logits, torch.full((3, 10), 0.1))
    assert nobody.item() == 0 and share.item() == 0


def test_diversity_gives_to_rare_classes_alone():
    """Among frequent classes nothing changes; a rare one gains by as much as it is short of."""
    logits, shares = torch.randn(7, 10), torch.softmax(2 * torch.randn(10), 0)
    probabilities = torch.softmax(logits, 1)
    found = p4_adda.debiased(probabilities, shares)
    short = (p4_adda.DIVERSITY / shares).clamp(min=1)
    assert torch.allclose(found, torch.softmax(logits + short.log(), 1), atol=1e-6)
    assert torch.allclose(p4_adda.debiased(probabilities, torch.full((10,), 0.1)), probabilities, atol=1e-6)
    between = torch.tensor([[0, 0.6, 0, 0, 0, 0, 0, 0.4, 0, 0]])       # more of a one, of which there have been enough
    uneven = torch.tensor([0.1, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.1, 0.1])
    assert p4_adda.debiased(between, uneven)[0].tolist()[1:8:6] == pytest.approx([3 / 7, 4 / 7])


def test_teacher_has_the_statistics_of_the_batch_and_no_dropout():
    teacher, images = DigitNet(channels=[4, 6, 8], dropout=0.5).eval(), torch.rand(12, 3, 28, 28)
    shares = torch.full((10,), 0.1)
    with torch.no_grad():
        found = p4_adda.teacher_probabilities(teacher, images, None)
        diverse = p4_adda.teacher_probabilities(teacher, images, shares)
        assert not any(part.training for part in teacher.modules())
        teacher.encoder.train()
        expected = torch.softmax(teacher(images), 1)
        teacher.eval()
        assert torch.allclose(found, expected, atol=1e-6)
        assert not torch.allclose(found, torch.softmax(teacher(images), 1), atol=1e-3)
    decay = p4_adda.SHARES_DECAY
    assert torch.allclose(shares, decay * 0.1 + (1 - decay) * expected.mean(0), atol=1e-6)
    assert torch.allclose(diverse, p4_adda.debiased(expected, shares), atol=1e-6)


def test_nuclear_norm_is_highest_for_sure_and_even_predictions():
    assert nuclear_norm(torch.eye(10).repeat(5, 1)) == pytest.approx(1)
    assert nuclear_norm(torch.full((50, 10), 0.1)) == pytest.approx(0.1)
    assert nuclear_norm(torch.eye(10)[[3] * 50]) == pytest.approx(0.1 ** 0.5)
    assert np.isnan(nuclear_norm(torch.full((50, 10), float('nan'))))
    halves = torch.softmax(torch.randn(50, 10), 1)
    values = np.linalg.svd(halves.numpy(), compute_uv=False)
    assert nuclear_norm(halves) == pytest.approx(values.sum() / 500 ** 0.5, rel=1e-5)


def test_ablation_goes_from_plain_to_improved():
    assert [pieces for _, pieces in p4_adda.ABLATION][:2] == ['', 'normalise']
    assert p4_adda.ABLATION[-1][1] == p4_adda.DEFAULTS['pieces']
    paths = {p4_adda.shipped('mnistm', pieces=pieces) for _, pieces in p4_adda.ABLATION + p4_adda.CONTROLS}
    assert len(paths) == len(p4_adda.PIECES) + 3
    assert sum(path.endswith('checkpoints/p4_adda_mnistm.pth') for path in paths) == 1


def test_patches_are_enlarged_pieces_of_the_images():
    """Of a slope from 0 to 1 a patch covers a quarter to a half, and only values that are there."""
    slope = torch.linspace(0, 1, 28).view(1, 1, 1, 28).expand(50, 3, 28, 28)
    patches = random_patches(slope, torch.Generator().manual_seed(0))
    assert patches.shape == slope.shape and patches.min() >= 0 and patches.max() <= 1
    span = (patches[:, 0, 14].max(1)[0] - patches[:, 0, 14].min(1)[0])
    assert span.min() > 0.2 and span.max() < 0.52 and span.max() - span.min() > 0.15
    assert patches[:, 0, 14, 0].std() > 0.1          # from different places
    assert torch.equal(patches, random_patches(slope, torch.Generator().manual_seed(0)))
