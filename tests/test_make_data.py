"""make_data.py: small archives in the real formats, from a server of this test, become the data folder."""
import bz2
import functools
import gzip
import hashlib
import http.server
import io
import os
import shutil
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import call, refusal
from PIL import Image

import datasets
import make_data

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


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        """Send the file whose name ends the address."""
        self.server.asked.append(self.path)
        with open(os.path.join(self.server.folder, os.path.basename(self.path)), 'rb') as file:
            content = file.read()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(archives, monkeypatch):
    """A server of the archives on this machine, whose addresses and MD5s stand in the place of the real ones."""
    folder = archives[0]
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    server.folder, server.asked = str(folder), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/'
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    def md5(name):
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    for kind, names in ((make_data.USPS, dict(train='usps.bz2', test='usps.t.bz2')),
                        (make_data.SVHN, dict(train='train_32x32.mat', test='test_32x32.mat'))):
        monkeypatch.setattr(kind, 'split_list', {split: [address + name, name, md5(name)]
                                                 for split, name in names.items()})
    monkeypatch.setattr(make_data.MNIST, 'resources', [(name, md5(name)) for name in sorted(os.listdir(str(folder)))
                                                       if name.endswith('ubyte.gz')])
    monkeypatch.setattr(make_data, 'MNIST_MIRROR', address)
    monkeypatch.setattr(make_data, 'PHOTOS', address + 'BSR_bsds500.tgz')
    monkeypatch.setattr(make_data, 'PHOTO_COUNTS', dict(train=6, test=3))
    monkeypatch.setattr(make_data, 'CELEBA_FACES', 43)
    monkeypatch.setattr(make_data, 'FACE_COUNTS', dict(train=20, test=10))
    yield server
    server.shutdown()
    server.server_close()


def test_every_part_is_as_the_assignment_has_it(archives, server, tmp_path):
    folder, truth = archives
    out = tmp_path / 'data'
    call(make_data, out, '--celeba', folder / 'img_align_celeba.zip')
    for split, count in COUNTS.items():
        for domain, mode in (('usps', 'L'), ('svhn', 'RGB'), ('mnistm', 'RGB')):
            digits = datasets.DigitImages(str(out), domain, split)
            labels, images = truth['mnist' if domain == 'mnistm' else domain, split]
            assert digits.names == [f'{index:05d}.png' for index in range(count)]
            assert digits.labels.tolist() == labels.tolist()
            with Image.open(str(out / 'digits' / domain / split / '00003.png')) as image:
                assert image.mode == mode and image.size == (28, 28)
                if domain != 'mnistm':
                    expected = Image.fromarray(images[3].astype(np.uint8)).resize((28, 28), Image.BICUBIC)
                    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 3
        # the recipe of the course: a random piece of a photograph, inverted where the digit is
        photos, rng = truth['photos', split], np.random.RandomState(make_data.MNISTM_SEEDS[split])
        for index, digit in enumerate(truth['mnist', split][1]):
            photo = photos[rng.randint(len(photos))]
            top, left = [rng.randint(length - 27) for length in photo.shape[:2]]
            piece = photo[top:top + 28, left:left + 28]
            image = np.asarray(Image.open(str(out / 'digits' / 'mnistm' / split / f'{index:05d}.png')))
            assert (image == np.where(digit[..., None] > 0, 255 - piece, piece)).all()
    train, test = [datasets.FaceImages(str(out), split) for split in ('train', 'test')]
    assert train.names[0] == '00000.png' and test.names == [f'{index:05d}.png' for index in range(20, 30)]
    order = np.random.RandomState(make_data.FACE_SEED).permutation(43)
    for faces, rows in ((train, np.sort(order[:30])[:20]), (test, np.sort(order[:30])[20:])):
        for index, row in enumerate(rows):
            name = f'{row + 1:06d}.jpg'
            expected = Image.fromarray(truth[name]).crop((35, 69, 145, 179)).resize((64, 64), Image.BICUBIC)
            assert (faces.images[index].permute(1, 2, 0).numpy() == np.asarray(expected)).all()
            for attribute in datasets.ATTRIBUTES:
                assert faces.attribute(attribute)[index] == (truth['attributes'][name][attribute] == 1)


def test_what_is_there_is_neither_fetched_nor_made_again(server, tmp_path, capsys):
    call(make_data, tmp_path / 'data', '--only', 'usps')
    assert set(server.asked) == {'/usps.bz2', '/usps.t.bz2'}
    server.asked.clear()
    shutil.rmtree(str(tmp_path / 'data' / 'digits' / 'usps' / 'test'))
    (tmp_path / 'data' / 'digits' / 'usps' / 'test.part').mkdir()   # what a killed run leaves
    (tmp_path / 'data' / 'digits' / 'usps' / 'test.part' / '99999.png').write_text('')
    call(make_data, tmp_path / 'data', '--only', 'usps', '--limit', '5')
    assert not server.asked and 'train is there with 30 images' in capsys.readouterr().out
    assert len(os.listdir(str(tmp_path / 'data' / 'digits' / 'usps' / 'test'))) == 5


def test_mistakes_end_in_one_line(archives, server, tmp_path, capsys, monkeypatch):
    out, downloads = tmp_path / 'data', tmp_path / 'data' / 'downloads'
    refused = functools.partial(refusal, capsys, make_data, out)
    assert 'img_align_celeba.zip and list_attr_celeba.txt' in refused()[1]
    downloads.mkdir(parents=True)
    (downloads / 'usps.bz2').write_bytes(b'damaged')
    code, line = refused('--only', 'usps')
    assert code == 1 and 'usps.bz2 is damaged' in line and 'delete it' in line
    monkeypatch.setattr(make_data, 'MNIST_MIRROR', 'http://127.0.0.1:9/')
    code, line = refused('--only', 'mnistm')
    assert code == 1 and 'http://127.0.0.1:9/train-images-idx3-ubyte.gz cannot be fetched' in line
    assert f'into {downloads} by hand' in line
    for name in ('img_align_celeba.zip', 'list_attr_celeba.txt'):
        shutil.copy(str(archives[0] / name), str(tmp_path))
    attributes = tmp_path / 'list_attr_celeba.txt'
    attributes.write_text('\ufeff' + attributes.read_text(), encoding='utf8')     # a byte order mark is read over
    call(make_data, out, '--only', 'face', '--celeba', tmp_path / 'img_align_celeba.zip')
    shutil.rmtree(str(out / 'face'))
    attributes.write_text(attributes.read_text()[:600])
    code, line = refused('--only', 'face', '--celeba', tmp_path / 'img_align_celeba.zip')
    assert code == 1 and 'list_attr_celeba.txt cannot be read' in line
    assert not (out / 'face' / 'train').exists()
    assert refused('--only', 'usps', 'cifar')[0] == 2
