"""The VAE's maths against oracles, and checkpoints on the disk."""
import copy
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal

import models
import p1_vae
from datasets import UserError
from models import (VAE, Generator, autocast, base_of, cosine_rate, decode_noise, load_checkpoint, pick_device,
                    pick_precision, plain_state, save_checkpoint, update_average)

SMALL = dict(latent_dim=6, channels=[4, 6, 8, 10])
CPU = torch.device('cpu')


def test_kl_against_torch_distributions():
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    q = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(p1_vae.kl_divergence(mean, log_variance), expected, atol=1e-5)
    assert p1_vae.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_reconstruction_loss_is_a_mean_over_everything():
    x = torch.rand(2, 3, 64, 64)
    assert abs(p1_vae.reconstruction_loss(x + 0.1, x).item() - 0.01) < 1e-6


def test_schedules():
    steps = 10000
    rates = [cosine_rate(step, steps, peak=1e-3, warm_up=200) for step in range(1, steps + 1)]
    assert rates[0] == pytest.approx(1e-3 / 200)
    peak = rates.index(max(rates)) + 1
    assert peak == 200 and max(rates) == pytest.approx(1e-3, rel=1e-2)
    assert 0 < rates[-1] < 1e-6 * max(rates) * 100
    assert all(later <= earlier for earlier, later in zip(rates[peak:], rates[peak + 1:]))
    new, warm = dict(lambda_kl=0.5, init=''), dict(lambda_kl=0.5, init='x.pth')
    assert p1_vae.lambda_kl_at(p1_vae.KL_WARM_UP // 2, new) == pytest.approx(0.25)
    assert p1_vae.lambda_kl_at(p1_vae.KL_WARM_UP * 3, new) == 0.5
    assert p1_vae.lambda_kl_at(1, warm) == 0.5


def test_noise_enters_as_the_reparametrisation_says():
    vae = VAE(**SMALL).eval()
    x, noise = torch.rand(3, 3, 64, 64), torch.randn(3, 6)
    with torch.no_grad():
        output, mean, log_variance = vae(x, noise)
        std = log_variance.exp().sqrt()
        assert torch.allclose(output, vae.decoder(mean + std * noise), atol=1e-6)
        assert torch.allclose(vae(x, torch.zeros(3, 6))[0], vae.decoder(mean), atol=1e-6)


def test_measure_against_a_plain_sum():
    vae = VAE(**SMALL).eval()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    found = p1_vae.measure(vae, images, CPU)
    with torch.no_grad():
        x = images.float() / 255
        mean, log_variance = vae.encoder(x)
        assert found['mse'] == pytest.approx(((vae.decoder(mean) - x) ** 2).mean().item(), rel=1e-5)
        assert found['kl'] == pytest.approx(p1_vae.kl_divergence(mean, log_variance).mean().item(), rel=1e-5)
        noise = torch.from_numpy(np.random.RandomState(0).standard_normal((5, 6)).astype(np.float32))
        draw = vae.decoder(mean + (log_variance / 2).exp() * noise)
        assert found['reconstruction'] == pytest.approx(((draw - x) ** 2).mean().item(), rel=1e-5)
    assert found == p1_vae.measure(vae, images, CPU)


def test_draws_depend_on_the_seed_alone():
    vae = VAE(**SMALL).eval()
    threads = torch.get_num_threads()
    four = decode_noise(vae.decoder, 4, 6, seed=3, device=CPU)
    assert four.dtype == torch.uint8 and four.shape == (4, 3, 64, 64)
    torch.manual_seed(99)
    assert torch.equal(four[:2], decode_noise(vae.decoder, 2, 6, seed=3, device=CPU))
    assert not torch.equal(four, decode_noise(vae.decoder, 4, 6, seed=4, device=CPU))
    assert torch.get_num_threads() == threads
    assert not torch.backends.cudnn.deterministic                  # left as it was for a training


def test_noise_is_standard_normal_and_frozen():
    """The first numbers of the legacy stream, as NEP 19 freezes them."""
    class Recorder(torch.nn.Module):
        def forward(self, z):
            seen.append(z)
            return z.view(-1, 1, 1, 1)
    seen = []
    decode_noise(Recorder(), 1000, 6, seed=0, device=CPU)
    z = torch.cat(seen)
    assert {len(part) for part in seen} == {1}                   # each is decoded alone
    assert z.shape == (1000, 6) and abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    assert np.allclose(z[0, :3], [1.7640524, 0.4001572, 0.978738], atol=1e-6)


@pytest.mark.parametrize('make,inputs', [
    (lambda: VAE(**SMALL), (torch.rand(4, 3, 64, 64), torch.randn(4, 6))),
    (lambda: Generator(**SMALL), (torch.randn(4, 6),))], ids=['vae', 'generator'])
@pytest.mark.parametrize('updates,decay', [(1, 1 / 21), (30, 0.6), (1000, 0.9)])
def test_average_follows_its_formula(make, inputs, updates, decay):
    net, average = make(), make()
    before = copy.deepcopy(average.state_dict())
    net(*inputs)                                          # changes the batch statistics' buffers
    update_average(average, net, updates, 0.9)
    assert any('running_mean' in name for name in before)
    for name, value in average.state_dict().items():
        new = net.state_dict()[name]
        expected = decay * before[name] + (1 - decay) * new if value.is_floating_point() else new
        assert torch.allclose(value.float(), expected.float(), atol=1e-6), name


def test_least_score_is_chosen_and_the_first_of_equal_ones():
    run, net = models.Run.__new__(models.Run), torch.nn.Linear(1, 1)
    run.chosen = None
    for run.step, score in enumerate((3.0, 1.0, 2.0, 1.0), 1):
        with torch.no_grad():
            net.weight.fill_(run.step)
        run.choose(score, net)
    assert run.chosen['step'] == 2 and run.chosen['score'] == 1 and run.chosen['net']['weight'].item() == 2


def test_precision_and_autocast():
    precision, net = pick_precision(CPU), torch.nn.Conv2d(3, 4, 3)
    assert precision in ('fp32', 'bf16')
    with autocast(CPU, precision):
        output = net(torch.rand(1, 3, 8, 8))
    assert output.dtype == (torch.bfloat16 if precision == 'bf16' else torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_no_gpu():
    assert pick_device('auto') == pick_device(None) == CPU
    with pytest.raises(UserError, match='--device'):
        pick_device('cuda')


def test_checkpoint_round_trip_in_the_old_format(tmp_path):
    path, vae = str(tmp_path / 'new folder' / 'x.pth'), VAE(**SMALL)
    save_checkpoint(path, dict(problem='p1_vae', config=SMALL, net=plain_state(vae), step=7))
    with open(path, 'rb') as file:
        start = file.read(2)
    assert start != b'PK' and start == b'\x80\x02'              # pickle protocol 2, no zip file
    loaded = load_checkpoint(path, 'p1_vae')
    assert loaded['step'] == 7 and loaded['config'] == SMALL
    again = VAE(**loaded['config'])
    again.load_state_dict(loaded['net'])
    for name, value in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_only_a_final_pth_is_an_ending():
    for path, base in (('runs/kl0.01', 'runs/kl0.01'), ('runs/kl0.001', 'runs/kl0.001'), ('a.b/run', 'a.b/run'),
                       ('x.pth', 'x'), ('x.pth.pth', 'x.pth'), ('run.1.pth', 'run.1')):
        assert base_of(path) == base


def small_checkpoint(**changed):
    return dict(dict(problem='p1_vae', config=SMALL, net=plain_state(VAE(**SMALL)), settings={}), **changed)


@pytest.mark.parametrize('spoil,cause', [
    (lambda checkpoint: checkpoint.pop('config'), "KeyError: 'config'"),
    (lambda checkpoint: checkpoint.update(config=dict(sizes=3)), 'TypeError'),
    (lambda checkpoint: checkpoint['net'].pop('encoder.mean.weight'), 'RuntimeError'),
    (lambda checkpoint: checkpoint['net'].update(more=torch.zeros(1)), 'RuntimeError'),
    (lambda checkpoint: checkpoint['net'].update({'encoder.mean.weight': torch.zeros(2, 2)}), 'RuntimeError')])
def test_checkpoint_that_does_not_fit(tmp_path, capsys, spoil, cause):
    checkpoint = small_checkpoint()
    spoil(checkpoint)
    save_checkpoint(str(tmp_path / 'x.pth'), checkpoint)
    code, line = refusal(capsys, p1_vae, '--ckpt', tmp_path / 'x.pth', '--out', tmp_path / 'x.png')
    assert code == 1 and all(word in line for word in ['x.pth does not fit VAE', 'name a file', cause]), line


def test_want_of_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    save_checkpoint(str(tmp_path / 'x.pth'), small_checkpoint())

    def load(path, map_location, weights_only=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_checkpoint(str(tmp_path / 'x.pth'), 'p1_vae')


@pytest.mark.parametrize('problem', ['p1_vae', 'p2_gan'])
def test_shipped_checkpoint_is_plain_and_small(problem):
    """fp32 and int64 tensors, numbers and strings only; no discriminator, no optimizer; under 40 MB."""
    path = os.path.join(ROOT, 'checkpoints', problem + '.pth')
    assert os.path.getsize(path) < 40e6
    checkpoint = load_checkpoint(path, problem)
    more = {'progress', 'discriminator_config'} if problem == 'p2_gan' else set()
    assert set(checkpoint) == {'problem', 'step', 'config', 'net', 'settings', 'metrics', 'command'} | more
    assert {str(value.dtype) for value in checkpoint['net'].values()} == {'torch.float32', 'torch.int64'}
    assert all(value.is_contiguous() for value in checkpoint['net'].values())
    assert checkpoint['command'].startswith(f'python3 {problem}.py --train')
    assert checkpoint['metrics']['images'] >= 1000
    assert set(checkpoint['net']) == set(
        dict(p1_vae=VAE, p2_gan=Generator)[problem](**checkpoint['config']).state_dict())
