"""python3 datasets.py OUT: small archives in the real formats, from a server of this test, become the data folder."""
import bz2
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, run
from PIL import Image

import datasets

try:
    datasets.torchvision_datasets()
except datasets.UserError as error:
    pytest.skip(str(error), allow_module_level=True)

# the slowest checks run with the course's versions alone, which import faster
long_check = pytest.mark.skipif(sys.version_info >= (3, 7), reason='runs with the course\'s Python 3.6')

COUNTS = dict(train=30, test=12)
FACES = dict(train=20, test=10)           # of 43


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
    mirror = zipfile.ZipFile(str(folder / 'mirror.zip'), 'w')
    with mirror, tarfile.open(str(folder / 'BSR_bsds500.tgz'), 'w:gz') as packed:
        for split in ('train', 'val', 'test'):
            for index in range(3):
                content = jpeg(rng.randint(0, 256, (40, 50, 3)).astype(np.uint8))
                info = tarfile.TarInfo(f'BSR/BSDS500/data/images/{split}/{index}.jpg')
                info.size = len(content)
                packed.addfile(info, io.BytesIO(content))
                mirror.writestr(f'BSDS500-master/BSDS500/data/images/{split}/{index}.jpg', content)
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
    """Serve a folder on this machine; yield its address and the list of what was asked for.

    Addresses under breaks/ send half of a file and close; ranges are understood.
    """
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            name, begin = self.path[1:], self.headers.get('Range')
            asked.append(name + (' ' + begin if begin else ''))
            path = os.path.join(str(folder), name.replace('breaks/', ''))
            if not os.path.isfile(path):
                return self.send_error(404)
            with open(path, 'rb') as file:
                content = file.read()
            self.send_response(206 if begin else 200)
            content = content[int(begin[6:-1]):] if begin else content
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2] if name.startswith('breaks/') else content)

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
    splits = {kind: {split: [address + options.get('manner', '') + name, name, sum_of(folder / name)]
                     for split, name in names.items()}
              for kind, names in (('USPS', dict(train='usps.bz2', test='usps.t.bz2')),
                                  ('SVHN', dict(train='train_32x32.mat', test='test_32x32.mat')))}
    digits = [name for name in sorted(os.listdir(str(folder))) if name.endswith('ubyte.gz')]
    resources = [(address + 'gone/' + name if options.get('old') else name, sum_of(folder / name)) for name in digits]
    if options.get('old'):
        mirrors = f'vars(t.MNIST).get("mirrors") and delattr(t.MNIST, "mirrors"); program.MNIST_MIRROR = {address!r}'
    else:
        mirrors = f't.MNIST.mirrors = ["http://127.0.0.1:9/", {address!r}]'
    photos = options.get('photos', ('missing.tgz', 'mirror.zip'))
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import datasets as program; '
            f't = program.torchvision_datasets(); splits = {splits!r}; '
            f't.USPS.split_list, t.SVHN.split_list = splits["USPS"], splits["SVHN"]; '
            f't.MNIST.resources = {resources!r}; {mirrors}; '
            f'program.PHOTOS = {tuple(address + name for name in photos)!r}; '
            f'program.COUNTS["face"], program.CELEBA_FACES = {FACES!r}, 43; '
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
    warnings = result.stderr.strip().split('\n')
    assert len(warnings) == 2 and 'BSR_bsds500.tgz has 6 photographs for the train images' in warnings[0]
    assert 'has 3 photographs for the test images' in warnings[1] and 'whole BSDS500 has 200' in warnings[1]
    assert sorted(os.listdir(str(out))) == ['digits', 'downloads', 'face']
    assert asked.count('mirror.zip') == 1 and 'missing.tgz' in asked      # as the second of two addresses
    for split, count in COUNTS.items():
        for domain in ('usps', 'mnistm', 'svhn'):
            digits = datasets.DigitImages(str(out), domain, split)
            assert digits.names == [f'{index:05d}.png' for index in range(count)]
            assert digits.labels.tolist() == truth[dict(mnistm='mnist').get(domain, domain), split][0].tolist()
        base = out / 'digits'
        assert np.abs(pixels(base / 'usps' / split / '00003.png').astype(int)
                      - resized(truth['usps', split][1][3].astype(np.uint8), 28)).max() <= 3
        assert np.array_equal(pixels(base / 'svhn' / split / '00004.png'), resized(truth['svhn', split][1][4], 28))
        # where the digit is not 0, the inverse of the piece of a photograph that the data kit draws too
        rng, photos = np.random.RandomState(dict(train=2020, test=1201)[split]), truth['photos', split]
        for index in range(6):
            photo, top, left = photos[rng.randint(len(photos))], rng.randint(13), rng.randint(23)
            ink = truth['mnist', split][1][index] > 0
            found = pixels(base / 'mnistm' / split / f'{index:05d}.png')
            assert np.array_equal(np.where(ink[..., None], 255 - found, found), photo[top:top + 28, left:left + 28])


def test_faces_are_a_part_of_celeba(archives, tmp_path):
    """By a fixed seed, in CelebA's order, cropped as the course's, with their own 13 attributes."""
    folder, truth = archives
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', '--celeba',
                  folder / 'img_align_celeba.zip')
    assert result.returncode == 0, result.stderr
    faces = [datasets.FaceImages(str(tmp_path / 'data'), split) for split in ('train', 'test')]
    assert [len(one.names) for one in faces] == [20, 10]
    assert faces[0].names[0] == '00000.png' and faces[1].names[0] == '00020.png'
    chosen = [f'{index + 1:06d}.jpg' for index in np.sort(np.random.RandomState(2020).permutation(43)[:30])]
    for split, row, name in ((0, 0, chosen[0]), (0, 19, chosen[19]), (1, 0, chosen[20]), (1, 9, chosen[29])):
        wanted = resized(truth[name][69:179, 35:145], 64)
        assert np.array_equal(faces[split].images[row].permute(1, 2, 0).numpy(), wanted)
        assert faces[split].attributes.iloc[row].astype(float).to_dict() == {
            attribute: (truth['attributes'][name][attribute] + 1) / 2 for attribute in datasets.ATTRIBUTES}


def test_old_versions_of_torchvision_list_dead_addresses(archives, tmp_path):
    with serving(archives[0]) as (address, asked):
        result = make(archives, address, tmp_path / 'data', '--only', 'mnistm', old=True)
    assert result.returncode == 0, result.stderr
    assert not any('gone' in name for name in asked)


@long_check
def test_what_is_there_is_neither_fetched_nor_made_again(archives, tmp_path):
    out = tmp_path / 'data'
    with serving(archives[0]) as (address, asked):
        assert make(archives, address, out, '--only', 'usps', '--limit', '7').returncode == 0
        assert asked == ['usps.bz2', 'usps.t.bz2']
        (out / 'downloads' / 'usps.bz2').unlink()
        again = make(archives, address, out, '--only', 'usps')
        assert again.returncode == 0 and 'is there already, with 7 images' in again.stdout
        assert asked == ['usps.bz2', 'usps.t.bz2']
        # the user's own labels are never overwritten, nor a half of a split completed with others
        (out / 'digits' / 'usps' / 'test.csv').unlink()
        assert_one_line(make(archives, address, out, '--only', 'usps'), 'but no', 'test.csv', 'delete')
        (out / 'digits' / 'usps' / 'test').rename(out / 'elsewhere')
        assert make(archives, address, out, '--only', 'usps').returncode == 0
    assert len(os.listdir(str(out / 'digits' / 'usps' / 'test'))) == 12


STOP = ('old = program.write_whole\ndef stopped(path, write):\n    if path.endswith("00009.png"): '
        'os._exit(9)\n    old(path, write)\nimport os\nprogram.write_whole = stopped')


def test_killed_split_goes_on_where_it_stopped(archives, tmp_path):
    """At the tenth image: nothing looks whole, and the nine are used by the next run, also with a --limit."""
    out = tmp_path / 'data'
    with serving(archives[0]) as (address, _):
        assert make(archives, address, out, '--only', 'usps', before=f'exec({STOP!r})').returncode == 9
        folder = out / 'digits' / 'usps'
        assert os.listdir(str(folder)) == ['train.part']
        before = (folder / 'train.part' / '00004.png').stat().st_mtime_ns
        assert make(archives, address, out, '--only', 'usps', '--limit', '6').returncode == 0
    assert sorted(os.listdir(str(folder))) == ['test', 'test.csv', 'train', 'train.csv']
    assert (folder / 'train' / '00004.png').stat().st_mtime_ns == before
    for split in ('train', 'test'):
        assert len(datasets.DigitImages(str(out), 'usps', split).names) == 6


STOP_AT = '''
import os
def stopping(step):
    return lambda path, *rest: os._exit(9) if os.path.basename(path) == {!r} else step(path, *rest)
os.remove, os.replace = stopping(os.remove), stopping(os.replace)
'''


@long_check
def test_kill_before_each_step_of_the_end(archives, tmp_path):
    """Nothing is drawn or fetched again by the next run, the steps of which take away the images above --limit too."""
    out, times = tmp_path / 'data', set()
    folder = out / 'digits' / 'usps'
    with serving(archives[0]) as (address, asked):
        for step, limit in (('train.part', 99), ('00006.png', 6), ('train.part', 6), ('source', 6),
                            ('train.csv.part', 6)):
            result = make(archives, address, out, '--only', 'usps', '--limit', limit,
                          before=f'exec({STOP_AT.format(step)!r})')
            assert result.returncode == 9, result.stderr
            image, = folder.glob('train*/00003.png')
            times.add(image.stat().st_mtime_ns)
        assert make(archives, address, out, '--only', 'usps', '--limit', '6').returncode == 0
        times.add((folder / 'train' / '00003.png').stat().st_mtime_ns)
    assert len(times) == 1 and asked == ['usps.bz2', 'usps.t.bz2']
    assert sorted(os.listdir(str(folder))) == ['test', 'test.csv', 'train', 'train.csv']
    assert sorted(os.listdir(str(folder / 'train'))) == datasets.DigitImages(str(out), 'usps', 'train').names
    assert len(os.listdir(str(folder / 'train'))) == 6


def test_stopped_split_of_other_archives_begins_anew(archives, tmp_path):
    """Photographs of another archive must not stand beside the first nine images."""
    out, stopped = tmp_path / 'data', f'exec({STOP!r})'
    with zipfile.ZipFile(str(tmp_path / 'other.zip'), 'w') as packed:
        for split in ('train', 'val', 'test'):
            packed.writestr(f'images/{split}/1.jpg', jpeg(np.full((40, 50, 3), 90, np.uint8)))
    with serving(archives[0]) as (address, _):
        assert make(archives, address, out, '--only', 'mnistm', before=stopped).returncode == 9
        assert make(archives, address, out, '--only', 'mnistm', '--photos', tmp_path / 'other.zip').returncode == 0
        assert len(np.unique(pixels(out / 'digits' / 'mnistm' / 'train' / '00002.png'))) <= 2


@long_check
def test_broken_download_goes_on(archives, tmp_path):
    """The rest is asked for, of the same address; a half file is never taken for a whole one."""
    out = tmp_path / 'data'
    size = len((archives[0] / 'usps.bz2').read_bytes())
    with serving(archives[0]) as (address, asked):
        result = make(archives, address, out, '--only', 'usps', manner='breaks/')
        assert_one_line(result, 'usps.bz2 could not be fetched', 'yourself')
        assert make(archives, address, out, '--only', 'usps', manner='breaks/').returncode == 1
        assert asked == ['breaks/usps.bz2', f'breaks/usps.bz2 bytes={size // 2}-']
        assert make(archives, address, out, '--only', 'usps').returncode == 0


def test_first_address_that_breaks_off_or_has_another_file(archives, tmp_path):
    """Of photographs there is no checksum: half an archive and a page of text are known by what they lack."""
    (archives[0] / 'page.tgz').write_text('<html>moved</html>')
    for name in ('breaks/BSR_bsds500.tgz', 'page.tgz'):
        out = tmp_path / name.split('/')[-1]
        with serving(archives[0]) as (address, asked):
            result = make(archives, address, out, '--only', 'mnistm', photos=(name, 'mirror.zip'))
        assert result.returncode == 0, result.stderr
        assert name in asked and 'mirror.zip' in asked


def test_page_in_place_of_photographs_is_not_kept(archives, tmp_path):
    """It is no half of an archive: once the servers are back, the next run succeeds."""
    names = ('BSR_bsds500.tgz', 'mirror.zip')
    shutil.copytree(str(archives[0]), str(tmp_path / 'server'))
    with serving(tmp_path / 'server') as (address, _):
        for name in names:
            (tmp_path / 'server' / name).write_text('<html>away</html>')
        result = make(archives, address, tmp_path / 'data', '--only', 'mnistm', photos=names)
        assert_one_line(result, 'BSR_bsds500.tgz could not be fetched', 'yourself, or', '--photos')
        for name in names:
            shutil.copy(str(archives[0] / name), str(tmp_path / 'server'))
        result = make(archives, address, tmp_path / 'data', '--only', 'mnistm', photos=names)
    assert result.returncode == 0, result.stderr


def test_server_that_is_away(archives, tmp_path):
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'svhn')
    assert_one_line(result, 'train_32x32.mat could not be fetched', 'yourself')
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
    assert_one_line(result, f'{downloads / name} ', words, 'delete')


@pytest.mark.parametrize('flags,words', [
    ([], '--celeba is missing'), (['--celeba', 'none.zip'], 'there is no file none.zip'),
    (['--celeba', __file__], 'cannot be read')])
def test_celeba_must_be_given(archives, tmp_path, flags, words):
    """It is said before anything else is made."""
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', *flags)
    assert_one_line(result, words, 'list_attr_celeba.txt')
    assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize('change,words', [
    (None, 'there is no list_attr_celeba.txt'), (lambda text: text[:len(text) // 2], 'cut off'),
    (lambda text: text.replace('Male', 'Female'), 'cannot be read')])
def test_attributes_that_are_missing_or_damaged(archives, tmp_path, change, words):
    (tmp_path / 'c.zip').write_bytes((archives[0] / 'img_align_celeba.zip').read_bytes())
    if change:
        (tmp_path / 'list_attr_celeba.txt').write_text(change((archives[0] / 'list_attr_celeba.txt').read_text()))
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', '--celeba', tmp_path / 'c.zip')
    assert_one_line(result, words, 'list_attr_celeba.txt')


@long_check
def test_copy_of_celeba_with_commas(archives, tmp_path):
    lines = (archives[0] / 'list_attr_celeba.txt').read_text().splitlines()[1:]
    rows = ['image_id,' + ','.join(lines[0].split())] + [','.join(line.split()) for line in lines[1:]]
    (tmp_path / 'list_attr_celeba.csv').write_text('\n'.join(rows) + '\n')
    (tmp_path / 'c.zip').write_bytes((archives[0] / 'img_align_celeba.zip').read_bytes())
    for celeba, out in ((archives[0] / 'img_align_celeba.zip', 'one'), (tmp_path / 'c.zip', 'two')):
        result = make(archives, 'http://127.0.0.1:9/', tmp_path / out, '--only', 'face', '--celeba', celeba)
        assert result.returncode == 0, result.stderr
    tables = [(tmp_path / out / 'face' / 'train.csv').read_bytes() for out in ('one', 'two')]
    assert tables[0] == tables[1]


@pytest.mark.parametrize('names,words', [(44, 'whole CelebA has 44'), (43, '000007.jpg is the first that it lacks')])
def test_part_of_celeba(archives, tmp_path, names, words):
    """The fixed seed takes other faces of it than of the whole: this is said once, and they are made."""
    with zipfile.ZipFile(str(archives[0] / 'img_align_celeba.zip')) as whole, \
            zipfile.ZipFile(str(tmp_path / 'c.zip'), 'w') as packed:
        for name in whole.namelist():
            if names == 44 or name[-10:] not in ('000007.jpg', '000009.jpg'):
                packed.writestr(name, whole.read(name))
    shutil.copy(str(archives[0] / 'list_attr_celeba.txt'), str(tmp_path))
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', '--celeba', tmp_path / 'c.zip',
                  before=f'program.CELEBA_FACES = {names}')
    assert_one_line(result, 'warning: ', f'c.zip holds {43 if names == 44 else 41} images', words, code=0)
    assert len(datasets.FaceImages(str(tmp_path / 'data'), 'test').names) == 10


def test_face_of_another_size(archives, tmp_path):
    with zipfile.ZipFile(str(tmp_path / 'c.zip'), 'w') as packed:
        for index in range(1, 44):
            packed.writestr(f'{index:06d}.jpg', jpeg(np.zeros((64, 64, 3), np.uint8)))
    (tmp_path / 'list_attr_celeba.txt').write_bytes((archives[0] / 'list_attr_celeba.txt').read_bytes())
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'face', '--celeba', tmp_path / 'c.zip')
    assert_one_line(result, '64x64 pixels, an aligned face 178x218')


@long_check
def test_photographs_at_hand(archives, tmp_path):
    """A folder below one that is called test, the folder of the photographs itself, and the tar archive."""
    with tarfile.open(str(archives[0] / 'BSR_bsds500.tgz')) as packed:
        packed.extractall(str(tmp_path / 'test'))
    results = []
    for out, photos in (('one', tmp_path / 'test'), ('two', tmp_path / 'test' / 'BSR' / 'BSDS500' / 'data' / 'images'),
                        ('three', archives[0] / 'BSR_bsds500.tgz')):
        with serving(archives[0]) as (address, _):
            result = make(archives, address, tmp_path / out, '--only', 'mnistm', '--photos', photos)
        assert result.returncode == 0, result.stderr
        results.append((tmp_path / out / 'digits' / 'mnistm' / 'train' / '00000.png').read_bytes())
    assert results[0] == results[1] == results[2]
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'four', '--only', 'mnistm', '--photos', 'none')
    assert_one_line(result, 'there is no none')
    # what a browser saved in the download folder; what is the user's own is not to be deleted
    with serving(archives[0]) as (address, asked):
        shutil.copy(str(archives[0] / 'mirror.zip'), str(tmp_path / 'one' / 'downloads' / 'BSDS500-master.zip'))
        shutil.rmtree(str(tmp_path / 'one' / 'digits'))
        assert make(archives, address, tmp_path / 'one', '--only', 'mnistm').returncode == 0
        result = make(archives, address, tmp_path / 'five', '--only', 'mnistm', '--photos', tmp_path / 'one' / 'digits')
    assert 'mirror.zip' not in asked
    assert_one_line(result, 'digits cannot be read', ': correct --photos')


def test_full_disk(archives, tmp_path):
    """A limit on the size of a file fails the download: one line, and the cause is not the net."""
    with serving(archives[0]) as (address, _):
        code = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))'
        result = make(archives, address, tmp_path / 'data', '--only', 'usps', before=code)
    assert_one_line(result, 'cannot write', 'usps.bz2', 'free some space')


OTHER_DISK = '''
import collections, os, shutil
stat = os.stat
def other(path, *words, **options):
    found = list(stat(path, *words, **options))
    return os.stat_result(found[:2] + [-1] + found[3:] if str(path).endswith('downloads') else found)
os.stat = other
shutil.disk_usage = lambda path: collections.namedtuple('Usage', 'free')(0 if path.endswith('downloads') else 10 ** 11)
'''


def test_disk_of_downloads_is_full(archives, tmp_path):
    result = make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'usps', before=f'exec({OTHER_DISK!r})')
    assert result.returncode == 1
    assert f'too little space in {tmp_path / "data" / "downloads"}: 9 MB' in result.stderr.split('\n')[0]
    assert 'usps.bz2 could not be fetched' in result.stderr.split('\n')[1]


def test_torchvision_that_cannot_be_imported(archives, tmp_path):
    """Whatever it raises: one line."""
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision' / '__init__.py').write_text('raise AttributeError("partially initialized module")')
    result = run(['python3', os.path.join(ROOT, 'datasets.py'), tmp_path / 'data', '--only', 'usps'],
                 PYTHONPATH=str(tmp_path))
    assert_one_line(result, 'cannot be imported (partially initialized module)', 'from the same index')


def test_output_that_is_a_file(archives, tmp_path):
    (tmp_path / 'data').write_text('')
    assert_one_line(make(archives, 'http://127.0.0.1:9/', tmp_path / 'data', '--only', 'usps'), 'data cannot be made')


def test_real_addresses_are_those_of_torchvision():
    """Names and checksums of the installed version, not those that the other tests put in their place."""
    known = datasets.torchvision_datasets()
    for kind in (known.USPS, known.SVHN):
        for split in ('train', 'test'):
            address, name, md5 = kind.split_list[split]
            assert address.startswith('http') and address.endswith(name) and len(md5) == 32
    for prefix in ('train', 't10k'):
        for name in ('-images-idx3-ubyte.gz', '-labels-idx1-ubyte.gz'):
            assert sum(resource[0].endswith(prefix + name) for resource in known.MNIST.resources) == 1


@long_check
@pytest.mark.parametrize('problem', ['p1_vae', 'p2_gan', 'p3_dann', 'p4_adda', 'p5_conditional'])
def test_trains_on_what_was_made(archives, tmp_path, problem):
    with serving(archives[0]) as (address, _):
        result = make(archives, address, tmp_path / 'data', '--celeba', archives[0] / 'img_align_celeba.zip')
    assert result.returncode == 0, result.stderr
    flags = ['--target', 'usps'] if problem[1] in '34' else ['--method', 'acgan'] if problem[1] == '5' else []
    judge = os.path.join(ROOT, 'checkpoints', 'p3_dann_mnistm.pth')
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import {problem} as program; program.SCORED = 50; '
            + (f'program.JUDGE = {judge!r}; ' if problem[1] == '5' else '') + 'program.main()')
    result = run(['python3', '-c', code, '--train', '--data_dir', tmp_path / 'data', '--steps', '20', '--batch_size',
                  '4', '--ckpt', tmp_path / 'run.pth'] + flags)
    assert result.returncode == 0, result.stderr
    with open(str(tmp_path / 'run.jsonl')) as file:
        assert json.loads(file.readlines()[-1])['kind'] == 'test'
