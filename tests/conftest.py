"""What the tests share: a small data folder drawn here, and the project's commands as users call them."""
import contextlib
import csv
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# two tests run side by side on two cores: more threads would wait for each other
os.environ['OMP_NUM_THREADS'] = '1'

import torch                                                                        # noqa: E402

import datasets                                                                     # noqa: E402
import models                                                                       # noqa: E402
import p1_vae, p2_gan, p3_dann, p4_adda, p5_diffusion, p6_acgan        # noqa: E401, E402

ATTRIBUTES = ['Bangs', 'Blond_Hair', 'Male', 'Smiling']


def run(command, cwd=ROOT, timeout=300, **environment):
    """Run a command with this Python as python3; return it with returncode, stdout and stderr."""
    variables = dict(os.environ, no_proxy='127.0.0.1', **environment)
    variables['PATH'] = os.path.dirname(sys.executable) + os.pathsep + variables['PATH']
    return subprocess.run([str(word) for word in command], cwd=str(cwd), env=variables,
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, universal_newlines=True)


# nets of a few channels that learn and log at every step and save often, in float32, which the clock does not choose
TINY = [4, 6, 8, 10]
SMALL = {
    p1_vae: dict(NET=dict(latent_dim=6, channels=TINY), LEARNING_RATE_WARM_UP=5),
    p2_gan: dict(NET=dict(latent_dim=6, channels=TINY), DISCRIMINATOR_CHANNELS=TINY, SCORED=16, METHODS=dict(
        p2_gan.METHODS, r1=dict(p2_gan.METHODS['r1'], learning_rates=(1e-2, 1e-2)))),    # else its faces stay flat
    p3_dann: dict(NET=dict(channels=[4, 6, 8], dropout=0.5), LEARNING_RATE_WARM_UP=5),
    p4_adda: dict(NET=dict(channels=[4, 6, 8], dropout=0.5), LEARNING_RATE_WARM_UP=2),
    p5_diffusion: dict(NET=dict(channels=[8, 16], conditioning=8, classes=10), SCORED=2, LEARNING_RATE_WARM_UP=2,
                       JUDGE=os.path.join(ROOT, 'checkpoints', 'p3_dann_mnistm.pth')),
    p6_acgan: dict(LEARNING_RATES=dict(digits=(5e-3, 5e-3), faces=(5e-3, 5e-3)), ALONE=dict(digits=0, faces=3),
                   GENERATOR=dict(digits=dict(latent_dim=4, classes=10, channels=[4, 6], size=28),
                                  faces=dict(latent_dim=128, classes=2, channels=[64, 128, 256, 512])),
                   DISCRIMINATOR=dict(digits=dict(classes=10, channels=[4, 6, 8], size=28),
                                      faces=dict(classes=2, channels=TINY, size=64)), SCORED=2, R1_EVERY=4,
                   JUDGE=os.path.join(ROOT, 'checkpoints', 'p3_dann_mnistm.pth'))}


def train(program, data_dir, ckpt, *words, every=5, **constants):
    """Train small nets of a program to ckpt in this process, saving at each every-th step; constants are its own."""
    flags = ['--target', 'mnistm'] if program in (p3_dann, p4_adda) else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, 'pick_precision', lambda device: 'fp32')
        for name, value in dict(dict(SMALL[program], LOG_EVERY=1, SAVE_EVERY=every), **constants).items():
            patch.setattr(program, name, value)
        call(program, '--train', '--data_dir', data_dir, '--ckpt', ckpt, '--batch_size', 4, '--device', 'cpu',
             *flags + list(words))


def stop(program, data_dir, ckpt, *words, at, **constants):
    """Train as train does, and stop after step at: what came after the last save is lost, as if it was killed."""
    log = models.Run.log

    def log_and_stop(run, **scalars):
        log(run, **scalars)
        if run.step == at:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match='stopped by the keyboard'):
        patch.setattr(models.Run, 'log', log_and_stop)
        train(program, data_dir, ckpt, *words, **constants)


def weights(program, ckpt):
    return models.load_checkpoint(str(ckpt), program.PROBLEM)['net']


def state(program, ckpt):
    """What a run has saved to go on from."""
    return models.load_checkpoint(str(ckpt).replace('.pth', '_last.pth'), program.PROBLEM + models.STATE)


def records(ckpt, kind, ending='.jsonl'):
    """What the log says of a kind of record, without what the clock decides."""
    return [{name: value for name, value in record.items() if name != 'images_per_second'}
            for record in models.read_log(str(ckpt).replace('.pth', ending)) if record['kind'] == kind]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def assert_same_run(program, one, two):
    """Two runs have the same weights and the same log."""
    assert same(weights(program, one), weights(program, two))
    for kind in ('train', 'held_out', 'test'):
        assert records(one, kind) == records(two, kind)


def each(programs):
    """Run a test once with each of these programs."""
    return pytest.mark.parametrize('program', programs, ids=[program.PROBLEM[:2] for program in programs])


def call(program, *words):
    """Call program.main(words) in this process, as its command line would; an exit is an error."""
    program.main([str(word) for word in words])


def refusal(capsys, program, *words):
    """Call program.main(words), which must end in one line for its user; return (exit status, the line)."""
    with pytest.raises(SystemExit) as stop:
        program.main([str(word) for word in words])
    message = stop.value.code
    if isinstance(message, str):           # Python prints it on stderr and exits with 1
        assert '\n' not in message
        return 1, message
    return message, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def start_anew():
    """Digits are read again, for an earlier test may have changed them; a Run's settings of torch are taken back."""
    datasets.read_digits.cache_clear()
    torch.manual_seed(0)
    yield
    torch.set_flush_denormal(False)


@contextlib.contextmanager
def file_limit(size):
    """In this context no file may have more bytes, as on a full disk: what ulimit -f sets."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_one_line(result, *words, code=1):
    """Assert that a command failed with one line on stderr that holds each of words."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().split('\n')
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0]


def assert_drawn(out, names):
    """Every file is there, every picture has more than a few colours, and every text prints a model."""
    assert sorted(os.listdir(str(out))) == names
    for name in names:
        if name.endswith('.txt'):
            assert (out / name).read_text().count('): ') > 5, name
        if name.endswith(('.png', '.jpg')):    # a few bytes may do: after so few steps faces are nearly flat
            with Image.open(str(out / name)) as picture:
                assert len(picture.convert('RGB').getcolors(2 ** 24)) > 20, name


def draw_face(rng):
    """A cartoon face, 64x64: enough for a net to have something to learn."""
    colour = lambda: tuple(int(value) for value in rng.randint(40, 216, 3))     # noqa: E731
    image = Image.new('RGB', (64, 64), colour())
    draw = ImageDraw.Draw(image)
    x, y = rng.randint(26, 39), rng.randint(28, 37)
    draw.ellipse([x - 18, y - 22, x + 18, y + 22], fill=colour())
    for side in (-8, 8):
        draw.ellipse([x + side - 3, y - 8, x + side + 3, y - 4], fill=colour())
    draw.line([x - 8, y + 10, x + 8, y + 10], fill=colour(), width=2)
    return image


def write_rows(path, header, rows):
    with open(str(path), 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def write_faces(root, counts=(40, 12)):
    """Write root/face/{train,test} and their CSV files, named on from 00000.png as the course does."""
    rng = np.random.RandomState(1)
    first = 0
    for split, count in zip(('train', 'test'), counts):
        folder = os.path.join(str(root), 'face', split)
        os.makedirs(folder)
        names = [f'{index:05d}.png' for index in range(first, first + count)]
        for name in names:
            draw_face(rng).save(os.path.join(folder, name))
        write_rows(folder + '.csv', ['image_name'] + ATTRIBUTES,
                   [[name] + [float(value) for value in rng.randint(0, 2, 4)] for name in names])
        first += count
    return str(root)


def draw_digit(digit, domain, rng):
    """A digit of PIL's own letters, 28x28: white on black and grey for usps, else in two colours."""
    letter = Image.new('L', (6, 11))
    ImageDraw.Draw(letter).text((0, 0), str(digit), fill=255)
    letter = letter.resize((rng.randint(12, 16), rng.randint(20, 26)), Image.BICUBIC)
    mask = Image.new('L', (28, 28))
    mask.paste(letter, (rng.randint(5, 10), rng.randint(1, 3)))
    if domain == 'usps':
        return mask
    colours = [tuple(int(value) for value in rng.randint(0, 256, 3)) for _ in range(2)]
    return Image.composite(*[Image.new('RGB', (28, 28), colour) for colour in colours], mask=mask)


def write_digits(root):
    """Write root/digits/{mnistm,svhn,usps}/{train,test} and their CSV files, every digit in turn."""
    rng = np.random.RandomState(2)
    for domain in ('mnistm', 'svhn', 'usps'):
        for split, count in (('train', 40), ('test', 12)):
            folder = os.path.join(str(root), 'digits', domain, split)
            os.makedirs(folder)
            names = [f'{index:05d}.png' for index in range(count)]
            for index, name in enumerate(names):
                draw_digit(index % 10, domain, rng).save(os.path.join(folder, name))
            write_rows(folder + '.csv', ['image_name', 'label'],
                       [[name, index % 10] for index, name in enumerate(names)])
    return str(root)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A data folder that tests only read."""
    return write_digits(write_faces(tmp_path_factory.mktemp('shared data')))


@pytest.fixture
def own_data_dir(tmp_path):
    """A data folder that a test may spoil."""
    return write_digits(write_faces(tmp_path / 'data'))


@pytest.fixture
def copy_of_project(tmp_path):
    """The project's own files in a folder of their own, with a space in its name."""
    folder = tmp_path / 'a copy'
    for part in ('', 'checkpoints', 'report'):
        (folder / part).mkdir()
    shutil.copy(os.path.join(ROOT, 'report', 'figures.py'), str(folder / 'report'))
    for name in os.listdir(ROOT):
        if name.endswith(('.sh', '.py')):
            shutil.copy(os.path.join(ROOT, name), str(folder))
    for name in os.listdir(os.path.join(ROOT, 'checkpoints')):
        if name in ('SHA256SUMS', 'URL') or name.endswith('.pth') and not name.endswith('_last.pth'):
            shutil.copy(os.path.join(ROOT, 'checkpoints', name), str(folder / 'checkpoints'))
    return folder
