"""python3 datasets.py OUT: small archives in the real formats, from a server of this test, become the data folder."""
import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, run
from PIL import Image

import datasets

try:
    import torchvision.datasets as _                                                # noqa: F401
except (ImportError, RuntimeError):        # it was built for another torch
    pytest.skip('this torchvision cannot be imported', allow_module_level=True)

COUNTS = dict(train=30, test=12)


def jpeg(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, 'JPEG', quality=95)
    return content.getvalue()


def make_archives(folder):
    """Write the archives into a folder; return what is in them."""
    rng, truth = np.random.RandomState(0), {}
    for split, count in COUNTS.items():
        # LIBSVM: label 1 .. 10, and 256 values in [-1, 1]
        labels, images = rng.randint(0, 10, count), rng.randint(0, 256, (count, 16, 16))
        lines = [f'{label + 1} ' + ' '.join(f'{place}:{value / 127.5 - 1:.6f}' for place, value in
                                            enumerate(image.ravel(), 1)) for label, image in zip(labels, images)]
        name = dict(train='usps.bz2', test='usps.t.bz2')[split]
        (folder / name).write_bytes(bz2.compress('\n'.join(lines + ['']).encode()))
        truth['usps', split] = labels, images
        # .mat: (32, 32, 3, N), and 10 for the digit 0
        from scipy.io import savemat
        labels, images = rng.randint(0, 10, count), rng.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        savemat(str(folder / f'{split}_32x32.mat'), dict(X=images, y=np.where(labels == 0, 10, labels)[:, None]))
        truth['svhn', split] = labels, images.transpose(3, 0, 1, 2)
        # idx
        labels, images = rng.randint(0, 10, count).astype(np.uint8), rng.randint(0, 3, (count, 28, 28)).astype(np.uint8)
        prefix = dict(train='train', test='t10k')[split]
        (folder / f'{prefix}-images-idx3-ubyte.gz').write_bytes(gzip.compress(
            struct.pack('>IIII', 2051, count, 28, 28) + images.tobytes()))
        (folder / f'{prefix}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(
            struct.pack('>II', 2049, count) + labels.tobytes()))
        truth['mnist', split] = labels, images
    with tarfile.open(str(folder / 'BSR_bsds500.tgz'), 'w:gz') as packed:
        for split in ('train', 'val', 'test'):
            for index in range(3):
                content = jpeg(rng.randint(0, 256, (40, 50, 3)).astype(np.uint8))
                info = tarfile.TarInfo(f'BSR/BSDS500/data/images/{split}/{index}.jpg')
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
                truth.setdefault(('photos', 'test' if split == 'test' else 'train'), []).append(
                    np.asarray(Image.open(io.BytesIO(content))))
    names = [f'{index:06d}.jpg' for index in range(1, 44)]
    columns = ['5_o_Clock_Shadow'] + list(datasets.ATTRIBUTES) + ['Young']
    values = rng.choice([-1, 1], (len(names), len(columns)))
    (folder / 'list_attr_celeba.txt').write_text('\n'.join(
        [str(len(names)), ' '.join(columns)] + [f'{name} ' + '  '.join(map(str, row))
                                                for name, row in zip(names, values)]) + '\n')
    with zipfile.ZipFile(str(folder / 'img_align_celeba.zip'), 'w') as packed:
        for name in names:
            faces = rng.randint(0, 256, (218, 178, 3)).astype(np.uint8)
            packed.writestr('img_align_celeba/' + name, jpeg(faces))
            truth[name] = np.asarray(Image.open(io.BytesIO(jpeg(faces))))
    truth['attributes'] = {name: dict(zip(columns, row)) for name, row in zip(names, values)}
    return truth


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp('archives')
    return folder, make_archives(folder)


@contextlib.contextmanager
def serving(folder):
    """Serve a folder on this machine; yield its address and the list of what was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path[1:])
            path = os.path.join(str(folder), self.path[1:])
            if not os.path.isfile(path):
                return self.send_error(404)
            with open(path, 'rb') as file:
                content = file.read()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/', asked
    finally:
        server.shutdown()
        server.server_close()


def sum_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def make(archives, address, out, *words, **options):
    """Run datasets.py with the addresses and checksums of the small archives in place of the real ones."""
    folder = archives[0]
    splits = {kind: {split: [address + name, name, sum_of(folder / name)] for split, name in names.items()}
              for kind, names in (('USPS', dict(train='usps.bz2', test='usps.t.bz2')),
                                  ('SVHN', dict(train='train_32x32.mat', test='test_32x32.mat')))}
    digits = [name for name in sorted(os.listdir(str(folder))) if name.endswith('ubyte.gz')]
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import datasets as program; import torchvision.datasets as t; '
            f'splits = {splits!r}; t.USPS.split_list, t.SVHN.split_list = splits["USPS"], splits["SVHN"]; '
            f't.MNIST.resources = {[(name, sum_of(folder / name)) for name in digits]!r}; '
            f't.MNIST.mirrors = [{address!r}]; '
            f'program.PHOTOS = ({address + "missing.tgz"!r}, {address + "BSR_bsds500.tgz"!r}); '
            f'{options.get("before", "pass")}; sys.argv[0] = "datasets.py"; program.main()')
    return run(['python3', '-c', code, out] + list(words))


def pixels(path):
    with Image.open(str(path)) as image:
        return np.asarray(image)


def resized(image, size):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC))


def test_every_part_is_as_the_assignment_has_it(archives, tmp_path):
    folder, truth = archives
    out = tmp_path / 'data'
    with serving(folder) as (address, asked):
        result = make(archives, address, out, '--celeba', folder / 'img_align_celeba.zip')
    assert result.returncode == 0, result.stderr
    assert asked[-1] != asked[-2] and 'missing.tgz' in asked and 'BSR_bsds500.tgz' in asked
    assert sorted(os.listdir(str(out))) == ['digits', 'downloads', 'face']
    for split, count in COUNTS.items():
        for domain in ('usps', 'mnistm', 'svhn'):
            digits = datasets.DigitImages(str(out), domain, split)
            assert digits.names == [f'{index:05d}.png' for index in range(count)]
            assert digits.labels.tolist() == truth[dict(mnistm='mnist').get(domain, domain), split][0].tolist()
        base = out / 'digits'
        assert np.abs(pixels(base / 'usps' / split / '00003.png').astype(int)
                      - resized(truth['usps', split][1][3].astype(np.uint8), 28)).max() <= 3
        assert np.array_equal(pixels(base / 'svhn' / split / '00004.png'), resized(truth['svhn', split][1][4], 28))
        # where the digit is not 0, the inverse of a piece of a photograph
        found, ink = pixels(base / 'mnistm' / split / '00005.png'), truth['mnist', split][1][5] > 0
        piece = np.where(ink[..., None], 255 - found, found)
        assert any(np.array_equal(piece, photo[top:top + 28, left:left + 28]) for photo in truth['photos', split]
                   for top in range(13) for left in range(23))
    faces = [datasets.FaceImages(str(out), split) for split in ('train', 'test')]
    assert [len(one.names) for one in faces] == [43 * 40000 // 42621, 43 - 43 * 40000 // 42621]
    assert faces[0].names[0] == '00000.png' and faces[1].names[0] == '40000.png'
    # all 43 images of this CelebA, in its order
    for name, row in (('000001.jpg', (0, 0)), ('000002.jpg', (0, 1)), ('000043.jpg', (1, -1))):
        wanted = resized(truth[name][69:179, 35:145], 64)
        assert np.array_equal(faces[row[0]].images[row[1]].permute(1, 2, 0).numpy(), wanted)
        assert faces[row[0]].attributes.iloc[row[1]].astype(float).to_dict() == {
            attribute: (truth['attributes'][name][attribute] + 1) / 2 for attribute in datasets.ATTRIBUTES}


def test_what_is_there_is_neither_fetched_nor_made_again(archives, tmp_path):
    out = tmp_path / 'data'
    with serving(archives[0]) as (address, asked):
        assert make(archives, address, out, '--only', 'usps').returncode == 0
        assert asked == ['usps.bz2', 'usps.t.bz2']
        before = (out / 'digits' / 'usps' / 'train' / '00000.png').stat().st_mtime_ns
        (out / 'digits' / 'usps' / 'test.csv').unlink()
        again = make(archives, address, out, '--only', 'usps')
    assert again.returncode == 0 and asked == ['usps.bz2', 'usps.t.bz2']
    assert (out / 'digits' / 'usps' / 'train' / '00000.png').stat().st_mtime_ns == before
    assert len((out / 'digits' / 'usps' / 'test.csv').read_text().split()) == 13


def test_stopped_split_goes_on_where_it_stopped(archives, tmp_path):
    """The tenth image cannot be written: nothing looks whole, and the nine are used by the next run."""
    out = tmp_path / 'data'
    stop = ('old = program.write_whole\ndef stopped(path, write):\n    if path.endswith("00009.png"): '
            'raise program.UserError("stopped here")\n    old(path, write)\nprogram.write_whole = stopped')
    with serving(archives[0]) as (address, _):
        stopped = make(archives, address, out, '--only', 'usps', before=f'exec({stop!r})')
        assert stopped.returncode == 1 and 'stopped here' in stopped.stderr
        folder = out / 'digits' / 'usps'
        assert os.listdir(str(folder)) == ['train.part'] and len(os.listdir(str(folder / 'train.part'))) == 9
        before = (folder / 'train.part' / '00008.png').stat().st_mtime_ns
        assert make(archives, address, out, '--only', 'usps').returncode == 0
    assert sorted(os.listdir(str(folder))) == ['test', 'test.csv', 'train', 'train.csv']
    assert (folder / 'train' / '00008.png').stat().st_mtime_ns == before
    assert len(os.listdir(str(folder / 'train'))) == 30


def test_limit(archives, tmp_path):
    with serving(archives[0]) as (address, _):
        result = make(archives, address, tmp_path / 'data', '--only', 'usps', 'svhn', '--limit', '7')
    assert result.returncode == 0, result.stderr
    for domain in ('usps', 'svhn'):
        for split in ('train', 'test'):
            assert len(datasets.DigitImages(str(tmp_path / 'data'), domain, split).names) == 7


def last_line(result):
    """Before the last line, torchvision's own bar may have drawn on stderr."""
    assert result.returncode == 1 and 'Traceback' not in result.stderr, result.stderr
    return result.stderr.strip().replace('\r', '\n').split('\n')[-1]


def test_server_that_is_away(archives, tmp_path):
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'svhn')
    assert 'train_32x32.mat could not be fetched' in last_line(result) and 'yourself' in last_line(result)
    assert not (tmp_path / 'data' / 'digits').exists()


@pytest.mark.parametrize('name,part', [('usps.bz2', 'usps'), ('train_32x32.mat', 'svhn'),
                                       ('train-images-idx3-ubyte.gz', 'mnistm'), ('BSR_bsds500.tgz', 'mnistm')])
def test_archive_that_is_damaged(archives, tmp_path, name, part):
    """One in the download folder is checked; a photograph archive, which has no checksum, cannot be read."""
    downloads = tmp_path / 'downloads'
    downloads.mkdir()
    (downloads / name).write_bytes((archives[0] / name).read_bytes()[:900])
    with serving(archives[0]) as (address, _):
        result = make(archives, address, tmp_path / 'data', '--only', part, '--downloads', downloads)
    words = 'cannot be read' if name.endswith('.tgz') else 'wrong MD5'
    assert f'{downloads / name} ' in last_line(result) and words in last_line(result) and 'delete' in last_line(result)


@pytest.mark.parametrize('flags,words', [
    ([], '--celeba is missing'), (['--celeba', 'none.zip'], 'none.zip is no zip file')])
def test_celeba_must_be_given(archives, tmp_path, flags, words):
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', *flags)
    assert_one_line(result, words, 'list_attr_celeba.txt')


def test_celeba_without_its_attributes(archives, tmp_path):
    (tmp_path / 'c.zip').write_bytes((archives[0] / 'img_align_celeba.zip').read_bytes())
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', '--celeba', tmp_path / 'c.zip')
    assert_one_line(result, 'there is no', 'list_attr_celeba.txt')


def test_photographs_from_a_folder(archives, tmp_path):
    with tarfile.open(str(archives[0] / 'BSR_bsds500.tgz')) as packed:
        packed.extractall(str(tmp_path / 'photos'))
    results = []
    for out, flags in (('one', []), ('two', ['--photos', tmp_path / 'photos'])):
        with serving(archives[0]) as (address, _):
            result = make(archives, address, tmp_path / out, '--only', 'mnistm', *flags)
        assert result.returncode == 0, result.stderr
        results.append((tmp_path / out / 'digits' / 'mnistm' / 'train' / '00000.png').read_bytes())
    assert results[0] == results[1]


def test_full_disk(archives, tmp_path):
    words = 'program.shutil.disk_usage = lambda path: type("Usage", (), dict(free=10 ** 6))'
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'usps', before=words)
    assert_one_line(result, 'MB of disk space and has 1 MB', 'free some')


@pytest.mark.parametrize('problem', ['p1_vae', 'p2_gan', 'p3_dann', 'p4_adda'])
def test_trains_on_what_was_made(archives, tmp_path, problem):
    with serving(archives[0]) as (address, _):
        result = make(archives, address, tmp_path / 'data', '--celeba', archives[0] / 'img_align_celeba.zip')
    assert result.returncode == 0, result.stderr
    flags = ['--target', 'usps'] if problem[1] in '34' else []
    code = f'import sys; sys.path.insert(0, {ROOT!r}); import {problem} as program; program.SCORED = 50; program.main()'
    result = run(['python3', '-c', code, '--train', '--data_dir', tmp_path / 'data', '--steps', '20', '--batch_size',
                  '4', '--ckpt', tmp_path / 'run.pth'] + flags)
    assert result.returncode == 0, result.stderr
    with open(str(tmp_path / 'run.jsonl')) as file:
        assert json.loads(file.readlines()[-1])['kind'] == 'test'
