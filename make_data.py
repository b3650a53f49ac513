"""Make the data folder of the assignment from public downloads.  The same archives always give the same images.

    python3 make_data.py hw3_data --celeba img_align_celeba.zip    digits and faces
    python3 make_data.py hw3_data --only usps mnistm svhn          only the digits
"""
import argparse
import contextlib
import csv
import gzip
import io
import itertools
import os
import re
import shutil
import socket
import tarfile
import zipfile
from http.client import HTTPException
from urllib.error import URLError

import numpy as np
from PIL import Image
from torchvision.datasets import MNIST, SVHN, USPS
from torchvision.datasets.utils import check_integrity, download_url

from datasets import ATTRIBUTES, DIGIT_SIZE, FACE_SIZE, UserError, number_between, run_command

MNIST_MIRROR = 'https://ossci-datasets.s3.amazonaws.com/mnist/'    # old versions of torchvision list a dead address
PHOTOS = 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz'
PHOTO_NAMES = dict(train=r'images/(train|val)/[^./]+\.jpg$', test=r'images/test/[^./]+\.jpg$')
PHOTO_COUNTS = dict(train=300, test=200)
MNISTM_SEEDS = dict(train=2020, test=1201)     # of the random pieces of the photographs
CELEBA_FACES = 202599                          # in the whole CelebA
FACE_COUNTS = dict(train=40000, test=2621)     # of them that are taken
FACE_SEED = 2020                               # fixes which
CROP = (35, 69, 145, 179)                      # the course's square of an aligned face of 178x218 pixels
CELEBA_FIX = ('get img_align_celeba.zip and list_attr_celeba.txt or .csv (mmlab.ie.cuhk.edu.hk/projects/CelebA.html), '
              'put both side by side, name the zip with --celeba; or leave the faces out with --only usps mnistm svhn')


# --------------------------------------------------------------------------------------- archives

def fetch(downloads, name, address, md5=None):
    """Return the path of an archive in downloads, fetched if it is not there.  Raises UserError if it cannot be had."""
    path, part = os.path.join(downloads, name), os.path.join(downloads, name + '.part')
    if not os.path.exists(path):
        if os.path.exists(part):               # of a run that was stopped: torchvision may take it for whole
            os.remove(part)
        try:
            socket.setdefaulttimeout(30)       # seconds; torchvision would wait for a silent server for ever
            download_url(address, downloads, name + '.part', md5)      # RuntimeError: it has another MD5
        except (URLError, HTTPException, ConnectionError, socket.timeout, RuntimeError) as error:
            raise UserError(f'{address} cannot be fetched ({error}): try again later, or put {name} into {downloads} '
                            'by hand') from error
        os.replace(part, path)
    if not check_integrity(path, md5):
        raise UserError(f'{path} is damaged, its MD5 is not {md5}: delete it, so that it is fetched anew')
    return path


@contextlib.contextmanager
def reading(path, fix):
    """Turn whatever a decoder raises for a missing or damaged file at path into a UserError that ends with fix."""
    try:
        yield
    except Exception as error:                 # a damaged file makes decoders raise nearly anything
        raise UserError(f'{path} cannot be read ({type(error).__name__}: {error}): {fix}') from error


def read_attributes(path):
    """Return {face: list of its 13 attributes as 0.0 or 1.0} from CelebA's list, or from a copy of it with commas."""
    values, attributes = {'-1': 0.0, '1': 1.0}, {}
    with reading(path, CELEBA_FIX), open(path, encoding='utf-8-sig') as file:
        header = next(file)
        # the number of faces stands above the list's own header; a copy has a name for the first column too
        columns = header.strip().split(',')[1:] if ',' in header else next(file).split()
        indices = [columns.index(attribute) for attribute in ATTRIBUTES]
        for face, *row in (line.replace(',', ' ').split() for line in file if line.strip()):
            attributes[face] = [values[row[index]] for index in indices]
        if len(attributes) != CELEBA_FACES:
            raise ValueError(f'it has {len(attributes):,} faces, the whole CelebA {CELEBA_FACES:,}')
    return attributes


# ----------------------------------------------------------------------------------------- splits

def scanned_digits(args, part, split):
    """Yield the images of USPS (grey) or SVHN (colour), resized to 28x28, each with its row of the CSV: [label]."""
    address, name, md5 = (USPS if part == 'usps' else SVHN).split_list[split]
    fetch(args.downloads, name, address, md5)
    digits = USPS(args.downloads, split == 'train') if part == 'usps' else SVHN(args.downloads, split)
    for image, label in digits:
        yield image.resize((DIGIT_SIZE, DIGIT_SIZE), Image.BICUBIC), [label]


def blended_digits(args, part, split):
    """Yield the images of MNIST-M, each with [label]: pieces of photographs, inverted where an MNIST digit is not 0."""
    md5s = {address.split('/')[-1]: md5 for address, md5 in MNIST.resources}
    arrays = []
    for kind in ('images-idx3', 'labels-idx1'):
        name = ('train' if split == 'train' else 't10k') + f'-{kind}-ubyte.gz'
        with gzip.open(fetch(args.downloads, name, MNIST_MIRROR + name, md5s[name])) as file:
            arrays.append(np.frombuffer(file.read(), np.uint8))
    digits, labels = arrays[0][16:].reshape(-1, DIGIT_SIZE, DIGIT_SIZE), arrays[1][8:]     # after the headers
    path = fetch(args.downloads, 'BSR_bsds500.tgz', PHOTOS)
    with reading(path, 'delete it, so that it is fetched anew'), tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive
                 if re.search(PHOTO_NAMES[split], member.name)}
        if len(files) != PHOTO_COUNTS[split]:
            raise ValueError(f'it has {len(files)} {split} photographs, the whole BSDS500 {PHOTO_COUNTS[split]}')
        photos = [np.asarray(Image.open(io.BytesIO(files[name])).convert('RGB')) for name in sorted(files)]
    rng = np.random.RandomState(MNISTM_SEEDS[split])
    for digit, label in zip(digits, labels):
        photo = photos[rng.randint(len(photos))]
        top, left = [rng.randint(length - DIGIT_SIZE + 1) for length in photo.shape[:2]]
        piece = photo[top:top + DIGIT_SIZE, left:left + DIGIT_SIZE]
        yield Image.fromarray(np.where(digit[..., None] > 0, 255 - piece, piece)), [label]


def cropped_faces(args, part, split):
    """Yield faces of CelebA in the course's crop, 64x64 colour, in CelebA's order, each with its 13 attributes."""
    with reading(args.celeba, CELEBA_FIX):
        archive = zipfile.ZipFile(args.celeba)
    places = {os.path.basename(place): place for place in archive.namelist()}
    table = os.path.join(os.path.dirname(args.celeba), 'list_attr_celeba')
    attributes = read_attributes(table + ('.csv' if os.path.isfile(table + '.csv') else '.txt'))
    names = sorted(attributes)
    chosen = np.sort(np.random.RandomState(FACE_SEED).permutation(len(names))[:sum(FACE_COUNTS.values())])
    for index in chosen[:FACE_COUNTS['train']] if split == 'train' else chosen[FACE_COUNTS['train']:]:
        with reading(f'{names[index]} of {args.celeba}', CELEBA_FIX):
            image = Image.open(io.BytesIO(archive.read(places[names[index]]))).convert('RGB')
        yield image.crop(CROP).resize((FACE_SIZE, FACE_SIZE), Image.BICUBIC), attributes[names[index]]


PARTS = dict(face=cropped_faces, usps=scanned_digits, mnistm=blended_digits, svhn=scanned_digits)


def write_split(folder, images, columns, first):
    """Write images and their rows as folder/00000.png ..., numbered from first on, and folder.csv."""
    part, rows = folder + '.part', []
    for index, (image, row) in enumerate(images, first):
        if not rows:                           # an archive that cannot be had leaves no folder
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(part)
        rows.append([f'{index:05d}.png'] + row)
        image.save(os.path.join(part, rows[-1][0]))
    with open(part + '.csv', 'w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows([['image_name'] + columns] + rows)
    os.replace(part + '.csv', folder + '.csv')
    os.replace(part, folder)                   # last: a folder that has its name is whole, and so is its CSV


def make_data(args):
    """Write each split of the parts in args.only; leave one that is there alone.  Raises UserError if one cannot be."""
    for part, split in itertools.product(args.only, ('train', 'test')):
        folder = os.path.join(args.out, 'face' if part == 'face' else os.path.join('digits', part), split)
        if os.path.isdir(folder):
            print(f'{folder} is there with {len(os.listdir(folder)):,} images: to make it anew, delete it', flush=True)
            continue
        print(f'{folder} is being made', flush=True)
        images = itertools.islice(PARTS[part](args, part, split), args.limit)
        first = FACE_COUNTS['train'] if part == 'face' and split == 'test' else 0      # numbered on, as the course does
        try:
            write_split(folder, images, list(ATTRIBUTES) if part == 'face' else ['label'], first)
        except OSError as error:
            raise UserError(f'{folder} cannot be written ({error}): free some space, or name another OUT') from error


# ----------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = os.path.expanduser
    parser.add_argument('out', type=path, metavar='OUT', help='folder to write, hw3_data for instance')
    parser.add_argument('--only', nargs='+', choices=list(PARTS), default=list(PARTS), help='make these parts alone')
    parser.add_argument('--celeba', type=path, default='img_align_celeba.zip', help='beside it: list_attr_celeba.txt')
    parser.add_argument('--downloads', type=path, help='folder of the archives (OUT/downloads)')
    parser.add_argument('--limit', type=number_between(1, 10 ** 6), help='so many images of each split')
    args = parser.parse_args(argv)
    args.only = [part for part in PARTS if part in args.only]      # faces first: what CelebA lacks is said at once
    args.downloads = args.downloads or os.path.join(args.out, 'downloads')
    return args


def main(argv=None):
    run_command(make_data, parse_args(argv))


if __name__ == '__main__':
    main()
