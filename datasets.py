"""Read the assignment's images and labels, augment images, and write pictures, tables and figures.

Images are kept as uint8 in memory and become floats batch by batch; whatever can be wrong with a
user's file or path ends in one UserError that names the cause and the fix.  The last sections hold what
the command lines of all scripts share, and the command that makes the data folder:

    python3 datasets.py hw3_data --celeba img_align_celeba.zip
"""
import argparse
import contextlib
import csv
import decimal
import errno
import functools
import gzip
import http.client
import io
import os
import re
import shlex
import shutil
import signal
import stat
import sys
import tarfile
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

FACE_SIZE = 64             # pixels, height and width of a face
DIGIT_SIZE = 28            # pixels, height and width of a digit
# source of each target: in the assignment's scenarios, and in those of sister assignments
SOURCE_OF = {'mnistm': 'usps', 'svhn': 'mnistm', 'usps': 'svhn'}
DIRECTIONS = dict(asked=SOURCE_OF, others={'mnistm': 'svhn', 'svhn': 'usps', 'usps': 'mnistm'})
DOMAIN_NAMES = {'mnistm': 'MNIST-M', 'svhn': 'SVHN', 'usps': 'USPS'}     # as figures and tables print them
HELD_OUT = 500             # training images of a set that are held out
HELD_OUT_SEED = 2020       # fixes which ones, whatever --seed is
IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.bmp')
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg')


class UserError(Exception):
    """A mistake of the user's, or of the machine's: one line that names the cause and the fix."""


def warn(message):
    """Say in one line on stderr what may be wrong and does not stop the program."""
    print(f'{os.path.basename(sys.argv[0])}: warning: {message}', file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- reading

def list_images(folder):
    """Return the sorted names of the image files in folder (.png, .jpg, .jpeg, .bmp, any case).

    Raises UserError if the folder does not exist, is no folder or holds no image, and for a pipe or a
    device with an image's name.  A broken link is listed, so that reading it fails.
    """
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}: correct the path; for training, --data_dir must name a '
                        'folder that is laid out as README.md shows')
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)
                   and not name.startswith('.') and not os.path.isdir(os.path.join(folder, name)))
    for name in names:
        if is_pipe_or_device(os.path.join(folder, name)):
            raise UserError(f'{os.path.join(folder, name)} is a pipe or a device, no image file: remove it')
    if not names:
        raise UserError(f'{folder} holds no image ({", ".join(IMAGE_ENDINGS)})')
    return names


def is_pipe_or_device(path):
    """Return whether something is at path that is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def read_image(path, size):
    """Read one image of any mode as (size, size, 3) uint8, as a viewer shows it.

    It is turned as its EXIF data says.  Transparent parts are laid over black, or over white where the ink is
    dark.  Grey images of 16 bits or floats are scaled by the range that their values use.  An image of another
    size is resized bicubically; size None keeps its own.  Raises UserError with the name if it cannot be
    decoded.
    """
    try:
        # what Pillow warns of, a large image or odd EXIF data, does no harm here
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter('ignore')
            image.load()
            image = turned(image)
            if image.mode.startswith(('I', 'F')):
                image = Image.fromarray(to_8_bit(np.asarray(image)))
            if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
                image = image.convert('RGBA')
                grey, opaque = np.asarray(image.convert('L'), float), np.asarray(image.split()[-1], float)
                # white is for an ink whose mean is nearer to black
                paper = 255 if opaque.any() and np.average(grey, weights=opaque) < 128 else 0
                image = Image.alpha_composite(Image.new('RGBA', image.size, (paper, paper, paper, 255)), image)
            image = image.convert('RGB')
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.BICUBIC)
            return np.asarray(image)
    except Exception as error:             # a damaged file makes Pillow's decoders raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        raise UserError(f'{path} cannot be read as an image ({reason}): replace the file') from error


def turned(image):
    """Turn a Pillow image as its EXIF data says; one whose EXIF data is damaged stays as it is."""
    try:
        return image if image.getexif().get(274, 1) == 1 else ImageOps.exif_transpose(image)
    except Exception:                      # as for a damaged image: nearly anything
        return image


def to_8_bit(values):
    """Scale the values of a grey 16-bit, 32-bit or float image to (H, W) uint8.

    Black is 0, or -1 where there are negative values.  White is the largest value of the smallest usual range
    (1, 8, 10, 12 or 16 bits) that holds them all; floats may pass its ends by a twentieth, as resizing leaves
    them.  What fits none of these is stretched from its lowest to its highest value.  Raises ValueError if a
    value is not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError('it has values that are not finite')
    beyond = 0.05 if values.dtype.kind == 'f' else 0
    ranges = [(0, 2 ** bits - 1) for bits in (1, 8, 10, 12, 16)] if low >= -beyond else [(-1, 1)]
    black, white = next((one for one in ranges if low >= one[0] - beyond and high <= one[1] * (1 + beyond)),
                        (low, max(high, low + 1)))
    return np.round(255 * ((values.astype(np.float64) - black) / (white - black)).clip(0, 1)).astype(np.uint8)


def read_images(folder, names, size):
    """Read the named images of a folder as one (N, 3, size, size) uint8 tensor."""
    images = np.empty((len(names), size, size, 3), np.uint8)
    for index, name in enumerate(names):
        images[index] = read_image(os.path.join(folder, name), size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_csv(path, names):
    """Read a label file (header image_name,...) as a DataFrame of texts, a row for each name, in their order.

    The values may be separated by commas, semicolons or tabs.  The following is ignored: spaces around values,
    the case of image_name and label, empty values at the ends of rows, a byte order mark, empty lines, lines
    before the header that begin with # or sep=, a repeated header, and a folder before a name.  A name may lack
    its ending.  Raises UserError if the file is missing, empty or malformed, if a row has no image in names,
    or an image has no row or two.
    """
    import pandas as pd
    rows = read_rows(path)
    header = [cell.lower() if cell.lower() in ('image_name', 'label') else cell for cell in rows[0][1]]
    if 'image_name' not in header:
        raise UserError(f'{path} begins with {",".join(rows[0][1])[:60]!r}: a header image_name,... is expected '
                        'as its first row')
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f'{path} has two columns {name}: delete one')
    rows[1:] = [row for row in rows[1:] if row[1] != rows[0][1]]
    if len(rows) == 1:
        raise UserError(f'{path} has no rows under its header: replace it')
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise UserError(f'{path} has {len(cells)} values in line {line} and {len(header)} columns in its header: '
                            'correct that line')
    table = pd.DataFrame([cells for _, cells in rows[1:]], columns=header, dtype=str)
    if (table['image_name'] == '').any():
        raise UserError(f'{path} has a row without an image_name: delete or complete it')
    table['image_name'] = match_names(table['image_name'], names)
    found, images = set(table['image_name']), set(names)
    if len(found) != len(table):
        twice = table['image_name'][table['image_name'].duplicated()].iloc[0]
        raise UserError(f'{path} names {twice} twice: delete one of the rows')
    for missing, fix in ((found - images, 'names {} but its folder does not hold it: add the image'),
                         (images - found, 'has no row for {}: add the row')):
        if missing:
            raise UserError(f'{path} {fix.format(min(missing))} ({len(missing)} such)')
    return table.set_index('image_name').loc[names]


def read_rows(path):
    """Return (line number, stripped cells) of every row of a label file, its header first."""
    if not os.path.isfile(path):
        raise UserError(f'there is no {path}: it comes with the data, beside the folder of images')
    with open(path, 'rb') as file:
        content = file.read()
    code = 'utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    try:
        # surrogateescape: names whose bytes are no UTF-8 are compared as they stand
        text = content.decode(code, 'surrogateescape')
    except UnicodeDecodeError:
        text = '\0'
    if '\0' in text:
        raise UserError(f'{path} is no text file (a spreadsheet?): save it as CSV')
    lines = [(number, line) for number, line in enumerate(re.split('\r\n|\r|\n', text), 1) if line.strip(' \t,;"')]
    while lines and lines[0][1].lower().strip(' "').startswith(('#', 'sep=')):
        lines.pop(0)
    if not lines:
        raise UserError(f'{path} is empty: replace it')
    # that of the header: a name may hold the others
    separator = max(',;\t', key=lines[0][1].count)
    rows = []
    for number, line in lines:
        try:
            cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        except csv.Error as error:
            raise UserError(f'{path} cannot be read in line {number} ({error}): correct that line') from error
        cells = [cell.strip() for cell in cells]
        while len(cells) > len(rows[0][1] if rows else ()) and cells[-1] == '':
            cells.pop()                    # a separator at the end of the row
        rows.append((number, cells))
    return rows


def match_names(written, names):
    """Return each written name as the file in names that it means, or else without its folder."""
    # a Python 3.6 without a locale lists other letters than ASCII as surrogates
    written = [os.fsdecode(name.encode('utf8', 'surrogateescape')) for name in written]
    images, others = set(names), {}
    for name in names:                     # without its ending; with its accents composed, as macOS does not store them
        for other in {os.path.splitext(name)[0], unicodedata.normalize('NFC', name)}:
            others.setdefault(other, []).append(name)
    matched = []
    for name in written:
        if name not in images:
            name = name.replace('\\', '/').split('/')[-1].strip()
        if name not in images:
            meant = others.get(name) or others.get(unicodedata.normalize('NFC', name)) or ()
            name = meant[0] if len(meant) == 1 else name
        matched.append(name)
    return matched


class FaceImages(object):
    """The faces of one split, read once into memory.

    Attributes:
        names       list of N file names, sorted
        images      (N, 3, 64, 64) uint8 tensor
        attributes  DataFrame (N, 13) of texts, 0.0 and 1.0, one named column for each attribute

    Raises UserError for whatever is wrong with the folder, its CSV or one of its images.
    """

    def __init__(self, data_dir, split):
        folder = os.path.join(data_dir, 'face', split)
        self.csv = folder + '.csv'
        self.names = list_images(folder)
        self.attributes = read_csv(self.csv, self.names)
        self.images = read_images(folder, self.names, FACE_SIZE)

    def column(self, name):
        """Return the attribute of this name, in whatever case it is written.  Raises UserError if it is unknown."""
        columns = {column.lower(): column for column in self.attributes.columns}
        if name.lower() not in columns:
            raise UserError(f'{self.csv} has no attribute {name}: choose one of '
                            + ', '.join(self.attributes.columns))
        return columns[name.lower()]

    def attribute(self, name):
        """Return (N,) bool: which faces have the attribute.  Raises UserError if it is unknown."""
        return read_numbers(self.attributes[self.column(name)], self.csv, 'write 0.0 or 1.0') > 0.5


class DigitImages(object):
    """The digits of one domain's split, read once into memory.

    Attributes:
        names   list of N file names, sorted
        images  (N, 3, 28, 28) uint8 tensor; the three channels of a grey image are equal
        labels  (N,) int64 tensor of 0 .. 9

    Raises UserError for whatever is wrong with the folder, its CSV or one of its images.
    """

    def __init__(self, data_dir, domain, split):
        folder = os.path.join(data_dir, 'digits', domain, split)
        self.names = list_images(folder)
        table = read_csv(folder + '.csv', self.names)
        if 'label' not in table.columns:
            raise UserError(f'{folder}.csv has no column label, only image_name and '
                            f'{", ".join(table.columns) or "nothing else"}: replace it')
        labels = read_numbers(table['label'], folder + '.csv', 'write a digit 0 .. 9')
        wrong = ~np.isin(labels, range(10))
        if wrong.any():
            row = wrong.argmax()
            raise UserError(f'{folder}.csv says {table["label"].iloc[row]!r} of {self.names[row]}: '
                            'write a digit 0 .. 9')
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.images = read_images(folder, self.names, DIGIT_SIZE)


def read_numbers(column, path, fix):
    """Return a column of texts as (N,) float64; raises UserError with the row of the first that is no number."""
    import pandas as pd
    values = pd.to_numeric(column, errors='coerce')
    if values.isnull().any():
        name = values.index[values.isnull()][0]
        raise UserError(f'{path} says {column[name]!r} of {name} in column {column.name}, which is no number: {fix}')
    return values.values.astype(float)


def split_held_out(count):
    """Split range(count) into (training, held-out) index tensors, the same ones at every call.

    500 images are held out, or a tenth of a set of fewer than 5,000.  Raises UserError if nothing
    would be left to train on.
    """
    if count < 2:
        raise UserError(f'training needs two images or more, and there is {count}: add some')
    order = np.random.RandomState(HELD_OUT_SEED).permutation(count)
    held_out = min(HELD_OUT, max(1, count // 10))
    return torch.from_numpy(np.sort(order[held_out:])), torch.from_numpy(np.sort(order[:held_out]))


def content_sum(*tensors):
    """Return a checksum of tensors, by which a resumed run recognises its data."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.numpy(), total)
    return f'{total:08x}'


def to_float(images):
    """Turn uint8 images into float32 in [0, 1]; the shape stays."""
    return images.float().div_(255)


# ----------------------------------------------------------------------------------- augmentation

def random_flip(images, rng):
    """Mirror each of (N, 3, H, W) images left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(flip.to(images.device), images.flip(3), images)


def augment_digits(images, strength, rng, backgrounds=None):
    """Change the shape, background and colours of (N, 3, 28, 28) digits in [0, 1], each in its own way.

    An image is stretched to the whole of [0, 1]; then, at strength 1, it is turned by up to 15 degrees,
    sheared by up to 0.2, scaled per axis by up to exp(0.2) and moved by up to 2 pixels; for half of the images the
    contrast around a random grey is raised by up to exp(2), so that strokes become sharp, thick or thin; a smooth
    random background, or that of backgrounds (N, 3, 28, 28), is blended in as MNIST-M was made (Ganin et al.
    2016: the absolute difference); half of the images are blurred; colours are inverted with probability 1/2 and mixed
    by a random matrix; Gaussian noise is added.  0 changes nothing; the result of another strength may
    leave [0, 1].
    """
    if strength == 0:
        return images
    count = len(images)
    # what is added would drown a digit of low contrast
    flat = images.flatten(1)
    low, high = flat.min(1)[0].view(-1, 1, 1, 1), flat.max(1)[0].view(-1, 1, 1, 1)
    images = (images - low) / (high - low).clamp(min=1 / 255)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    angle, shear = strength * uniform(-15, 15) * np.pi / 180, strength * uniform(-0.2, 0.2)
    width, height = [(strength * uniform(-0.2, 0.2)).exp() for _ in range(2)]
    right, down = [strength * uniform(-0.15, 0.15) for _ in range(2)]      # 1: half an image
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack([
        torch.stack([width * cos, width * (shear * cos - sin), right], 1),
        torch.stack([height * sin, height * (shear * sin + cos), down], 1)], 1)
    x = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False),
                      padding_mode='border', align_corners=False)
    # strokes of some sources are blurred, while those of a target may be sharp
    contrast, grey = (strength * uniform(-2, 2, 1, 1, 1).clamp(min=0)).exp(), uniform(0.15, 0.5, 1, 1, 1)
    x = (grey + contrast * (x - grey)).clamp(0, 1)
    if backgrounds is None:
        backgrounds = F.interpolate(torch.rand(count, 3, 6, 6, generator=rng), size=images.shape[2:],
                                    mode='bicubic', align_corners=False)
    x = (strength * uniform(-0.5, 1, 1, 1, 1).clamp(min=0) * backgrounds - x).abs()
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode='replicate'), kernel_size=5, stride=1)
    x = x + strength * uniform(-1, 1, 1, 1, 1).clamp(min=0) * (blurred - x)
    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.5 * strength, 1 - x, x)
    mix = torch.eye(3) + strength * uniform(-0.2, 0.2, 3, 3)
    x = torch.einsum('nij,njhw->nihw', mix, x)
    return x + strength * uniform(0, 0.05, 1, 1, 1) * torch.randn(x.shape, generator=rng)


def random_patches(images, rng):
    """Enlarge a square of a quarter to a half of the side of each of (N, 3, H, W) images to all of it."""
    count = len(images)
    scale = 0.25 + 0.25 * torch.rand(count, 1, 1, generator=rng)
    centre = (1 - scale) * (2 * torch.rand(count, 2, 1, generator=rng) - 1)
    theta = torch.cat([scale * torch.eye(2), centre], 2)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False),
                         padding_mode='border', align_corners=False)


def balanced_rows(labels, count, rng):
    """Draw count row numbers, with replacement, such that every class in labels (N,) is equally likely."""
    weights = 1 / torch.bincount(labels).float()[labels]
    return torch.multinomial(weights, count, replacement=True, generator=rng)


# ---------------------------------------------------------------------------------------- writing

def check_out(path, endings=None):
    """Raise UserError unless path can name a file to write, where endings are given with one of these."""
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder: name the file to write, for instance '
                        + os.path.join(path, 'faces.png' if endings else 'pred.csv'))
    check_no_device(path)
    if endings and not path.lower().endswith(endings):
        raise UserError(f'{path} does not end in {", ".join(endings[:-1])} or {endings[-1]}: name such a picture')
    if not endings and path.lower().endswith(IMAGE_ENDINGS + ('.pth',)):
        raise UserError(f'{path} has the name of an image or a checkpoint: name a CSV file')


def check_no_device(path):
    """Raise UserError if path is a pipe or a device, because os.replace would replace it by a file."""
    if is_pipe_or_device(path):
        raise UserError(f'{path} is a device or a pipe: name a file to write')


def write_whole(path, write):
    """Let write(temporary path) make a file or a folder, then rename it: path is whole or untouched.

    The parent folder is made if need be; the temporary name lies in it and has path's ending.  If path is a
    link, the file that it points to is written.  Raises UserError with path and the reason.
    """
    check_no_device(path)
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f'.{os.getpid()}.{name}')
    try:
        try:
            os.makedirs(parent, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        finally:
            if os.path.isdir(temporary):
                shutil.rmtree(temporary)
            elif os.path.exists(temporary):
                os.remove(temporary)
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror or error}): '
                        'choose a place that can be written and has room') from error


def write_text(path, text):
    """Write a text to path, in UTF-8."""
    def write(temporary):
        with open(temporary, 'w', encoding='utf8', newline='') as file:
            file.write(text)
    write_whole(path, write)


def make_grid(images, columns, gap=2):
    """Lay (N, 3, H, W) uint8 images out in rows on white: a (height, width, 3) uint8 array."""
    try:
        from torchvision.utils import make_grid as lay_out
        grid = lay_out(images, nrow=columns, padding=gap, pad_value=255)
    except (ImportError, RuntimeError):    # it is missing, or was built for another torch
        columns = min(columns, len(images))
        missing = -len(images) % columns
        tiles = F.pad(images, (gap, 0, gap, 0, 0, 0, 0, missing), value=255)
        _, _, height, width = tiles.shape
        rows = tiles.view(-1, columns, 3, height, width).permute(2, 0, 3, 1, 4)
        grid = F.pad(rows.reshape(3, -1, columns * width), (0, gap, 0, gap), value=255)
    return grid.permute(1, 2, 0).numpy()


def save_picture(path, pixels):
    """Write (height, width, 3) uint8 pixels to path; JPEG without chroma loss at quality 95."""
    options = {} if path.lower().endswith('.png') else {'quality': 95, 'subsampling': 0}
    write_whole(path, lambda temporary: Image.fromarray(pixels).save(temporary, **options))


def save_single(folder, images, names=None):
    """Write (N, 3, H, W) uint8 images to folder as 00000.png, 00001.png, ..., or under names; whole or not at all.

    Raises UserError if the folder exists and is not empty.
    """
    check_new_folder(folder)

    def write(temporary):
        os.mkdir(temporary)
        for index, image in enumerate(images):
            pixels = np.asarray(image).transpose(1, 2, 0)
            name = names[index] if names else f'{index:05d}'
            Image.fromarray(pixels).save(os.path.join(temporary, name + '.png'))
    write_whole(folder, write)


def check_new_folder(folder):
    """Raise UserError if something but an empty folder is there."""
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f'{folder} exists and is no empty folder: name a new one for the images')


def write_predictions(path, names, labels):
    """Write the assignment's CSV, image_name,label and a row for each name; whole or not at all."""
    def write(temporary):
        # surrogateescape: a file name whose bytes are no UTF-8 is written as it stands
        with open(temporary, 'w', newline='', encoding='utf8', errors='surrogateescape') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['image_name', 'label'])
            writer.writerows((name, int(label)) for name, label in zip(names, labels))
    write_whole(path, write)


# ---------------------------------------------------------------------------------------- figures

# Okabe and Ito's palette, which colour-blind readers can tell apart, and three more
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#000000',
           '#882255', '#999999', '#666600')
MARKERS = 'o^'               # of the first two


FIGURE_WIDTH = 6.5           # inches, at which the report prints figures; their letters have 7 to 9 points
MARGIN = 8                   # white rows of pixels above and below a figure


def new_figure(height, rows=1, columns=1):
    """Return a matplotlib figure of FIGURE_WIDTH x height inches and its axes, rows x columns of them.

    Made without pyplot, which would look for a screen.
    """
    # matplotlib refuses to be imported under the name of a backend that it does not know, a notebook's say
    os.environ['MPLBACKEND'] = 'agg'
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        'font.size': 7, 'axes.titlesize': 8, 'figure.titlesize': 9, 'axes.linewidth': 0.6, 'lines.linewidth': 0.9,
        'lines.markersize': 3, 'grid.alpha': 0.25})
    figure = Figure(figsize=(FIGURE_WIDTH, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save_figure(path, figure):
    """Write a figure to path at 150 dots per inch: with photographs as .jpg; else as .png, where 64 colours do.

    It keeps its width, but white rows above and below it are cut off.
    """
    def write(temporary):
        figure.savefig(temporary, format='png', dpi=150)
        with Image.open(temporary) as picture:
            picture = picture.convert('RGB')
        _, top, _, bottom = ImageOps.invert(picture).getbbox()
        picture = picture.crop((0, max(top - MARGIN, 0), picture.width, min(bottom + MARGIN, picture.height)))
        if path.endswith('.jpg'):
            picture.save(temporary, 'JPEG', quality=75, optimize=True)
        else:
            picture.quantize(64).save(temporary, 'PNG', optimize=True)
    figure.tight_layout()
    write_whole(path, write)


def log_axis(axis):
    """Put plain numbers at 1, 2, 5, 10, ... on an axis whose scale is logarithmic."""
    from matplotlib.ticker import LogLocator
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('')


def draw_pixels(axes, pixels):
    """Fill axes with a (height, width, 3) uint8 picture; data coordinates are its pixels."""
    from matplotlib.image import AxesImage
    height, width = pixels.shape[:2]
    image = AxesImage(axes, extent=(0, width, height, 0), origin='upper', interpolation='nearest')
    image.set_data(pixels)
    axes.add_image(image)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect='equal')
    axes.axis('off')


def embed(features):
    """Map (N, dimensions) features to (N, 2) by t-SNE (van der Maaten and Hinton 2008), seed 0."""
    from sklearn.manifold import TSNE
    # the names that sklearn 0.21 and today's share; its own default of 30 needs 90 points or more
    return TSNE(init='pca', learning_rate=200.0, random_state=0,
                perplexity=min(30.0, (len(features) - 1) / 3)).fit_transform(features)


def draw_points(axes, points, labels, names, markers=None):
    """Scatter (N, 2) points, one colour and shape for each label 0 .. len(names) - 1.

    The axes have no scale, since distances that t-SNE draws between groups mean nothing.
    """
    size, alpha = (9, 0.75) if markers is None else (22, 1)      # a written marker has thin strokes
    markers = markers or MARKERS
    for label, name in enumerate(names):
        chosen = points[np.asarray(labels) == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, c=COLOURS[label], marker=markers[label], alpha=alpha,
                     linewidths=0, label=name)
    axes.set(xlabel='t-SNE dimension 1', ylabel='t-SNE dimension 2', xticks=[], yticks=[])
    if markers is MARKERS:                 # below the points; written digits need no legend
        axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.06), ncol=len(names), handletextpad=0.1, frameon=False)


# ------------------------------------------------------------- data and figures of problems 3 and 4

SEEDS = (0, 1, 2)            # of the tables
PER_DOMAIN = 500             # test images of each domain in a t-SNE figure
MISTAKES = 20                # wrong predictions of a scenario in a figure


@functools.lru_cache(maxsize=None)
def read_digits(data_dir, domain, split):
    """Return the DigitImages; the runs of a table read each of them once."""
    return DigitImages(data_dir, domain, split)


def read_scenario(data_dir, settings):
    """Return the DigitImages of a run: the source's and the target's for training, the target's for the test."""
    return [read_digits(data_dir, settings[domain], split) for domain, split in (
        ('source', 'train'), ('target', 'train'), ('target', 'test'))]


def scenario_name(target, source=None):
    """Name a scenario as figures do: USPS to MNIST-M; the source is the assignment's unless it is given."""
    return f'{DOMAIN_NAMES[source or SOURCE_OF[target]]} to {DOMAIN_NAMES[target]}'


def of_seed_0(records):
    """Return the records of the runs whose nets are shipped, which the grader's script gives again."""
    return [record for record in records if record['seed'] == 0]


def with_other_accuracy(records, name):
    """Return the records of runs with another of their measured accuracies in place of the last one."""
    return [dict(record, accuracy=record[name]) for record in records]


def rounded(value, places):
    """Return a number as text with so many decimals.  Halves go away from 0, as a reader expects, not to even."""
    step = decimal.Decimal(1).scaleb(-places)
    return f'{decimal.Decimal(f"{value:.12g}").quantize(step, decimal.ROUND_HALF_UP):,}'     # not 0.1 + 0.2


def table_lines(rows, directions):
    """Return the lines of a table's CSV, in percent, and of each row the text for each scenario.

    rows is a list of (label, records of the results log), which may be empty.  directions maps targets to sources.
    """
    lines, cells = [['row', 'source', 'target', 'runs', 'mean', 'spread'] + [f'seed {seed}' for seed in SEEDS]], []
    for label, records in rows:
        cells.append([])
        for target, source in sorted(directions.items()):
            by_seed = {record['seed']: 100 * record['accuracy'] for record in records
                       if (record['source'], record['target']) == (source, target)}
            values = list(by_seed.values())
            mean = rounded(np.mean(values), 2) if values else ''
            spread = rounded(np.std(values, ddof=1), 2) if len(values) > 1 else ''
            lines.append([label, DOMAIN_NAMES[source], DOMAIN_NAMES[target], str(len(values)), mean, spread]
                         + [rounded(by_seed[seed], 2) if seed in by_seed else '' for seed in SEEDS])
            cells[-1].append(mean + f' \u00b1 {spread}' * bool(spread) + f' ({len(values)})' if values else '\u2013')
    return lines, cells


def plot_table(base, title, rows, asked=0, directions=None):
    """base.png and base.csv: mean and standard deviation over the seeds; the CSV has each seed too.

    rows and directions are as in table_lines; directions left out are the assignment's.  The first rows, asked of them,
    are what the assignment asks for, and bold.
    """
    directions = directions or SOURCE_OF
    if not any(directions.get(record['target']) == record['source'] for _, records in rows for record in records):
        raise UserError('no finished run has the settings of the table: --train --resume makes them')
    lines, cells = table_lines(rows, directions)

    def write(temporary):
        with open(temporary, 'w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(lines)
    write_whole(base + '.csv', write)
    figure, axes = new_figure(0.22 * len(rows) + 0.6)
    axes.axis('off')
    table = axes.table(cellText=cells, rowLabels=[label for label, _ in rows], loc='center',
                       cellLoc='center', bbox=[0.42, 0, 0.58, 1],
                       colLabels=[scenario_name(*one).replace(' to ', ' \u2192 ')
                                  for one in sorted(directions.items())])
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for (row, _), cell in table.get_celld().items():
        cell.set_linewidth(0.5)
        if row <= asked:
            cell.set_text_props(weight='bold')
    axes.set_title(f'{title}: test accuracy in %, mean \u00b1 standard deviation (number of seeds)')
    save_figure(base + '.png', figure)


def pick_test_images(digits):
    """Return equal numbers of test images of the DigitImages of source and target, the same ones at every call.

    Returns images (N, 3, 28, 28) uint8, labels (N,) and domains (N,), 0 for the source and 1 for the target.
    """
    count = min([PER_DOMAIN] + [len(one.names) for one in digits])
    rows = [np.sort(np.random.RandomState(0).permutation(len(one.names))[:PER_DOMAIN])[:count] for one in digits]
    images, labels = [torch.cat([getattr(one, name)[chosen] for one, chosen in zip(digits, rows)])
                      for name in ('images', 'labels')]
    return images, labels.numpy(), np.repeat([0, 1], count)


def plot_domains(path, domains):
    """A row of eight images of each of domains (a dict from titles to DigitImages), the same at every call."""
    figure, all_axes = new_figure(1.15 * len(domains), rows=len(domains))
    for axes, (title, digits) in zip(all_axes, domains.items()):
        chosen = np.random.RandomState(0).permutation(len(digits.names))[:8]
        draw_pixels(axes, make_grid(digits.images[torch.from_numpy(chosen)], columns=8))
        axes.set_title(title + ': ' + ', '.join(str(label) for label in digits.labels[chosen].tolist()))
    save_figure(path, figure)


def plot_features(path, title, features, labels, domains):
    """t-SNE of the features (N, D) of pick_test_images's images, by digit and by domain, in the same axes."""
    points = embed(features.numpy())
    figure, axes = new_figure(2.5, columns=2)
    draw_points(axes[0], points, labels, [str(digit) for digit in range(10)],
                [f'${digit}$' for digit in range(10)])
    draw_points(axes[1], points, domains, ['source', 'target'])
    for one, name in zip(axes, ('digit', 'domain')):
        one.set_title(f'by {name}')
    figure.suptitle(f'{title}: {len(points) // 2} test images of each domain')
    save_figure(path, figure)


def plot_confusion(path, found):
    """How often each digit of the target's test images is labelled as each other, in %.

    found maps the title of a scenario to (DigitImages, probabilities (N, 10)); so it does below.
    """
    figure, all_axes = new_figure(2.7, columns=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, found.items()):
        counts = np.zeros((10, 10))
        np.add.at(counts, (digits.labels.numpy(), probabilities.argmax(1).numpy()), 1)
        shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        axes.pcolormesh(np.arange(11) - 0.5, np.arange(11) - 0.5, shares, cmap='Blues', vmin=0,
                        vmax=100)
        axes.invert_yaxis()
        axes.set_aspect('equal')
        for row in range(10):
            for column in range(10):
                if shares[row, column] > 0.5:
                    axes.text(column, row, f'{shares[row, column]:.0f}', ha='center', va='center',
                              color='white' if shares[row, column] > 50 else 'black')
        axes.set_title(f'{title}: {rounded(100 * np.trace(counts) / counts.sum(), 2)} %')
        axes.set(xlabel='predicted', ylabel='digit (% of its test images)' if axes is all_axes[0] else '',
                 xticks=range(10), yticks=range(10))
    save_figure(path, figure)


def plot_mistakes(path, found):
    """The wrong predictions with the highest probability of each scenario, most confident first."""
    figure, all_axes = new_figure(4.3, rows=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, found.items()):
        confidence, classes = probabilities.max(1)
        wrong = torch.nonzero(classes != digits.labels).flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
        if len(wrong):
            draw_pixels(axes, make_grid(digits.images[wrong], columns=10, gap=10))
        for index, row in enumerate(wrong.tolist()):
            axes.text(24 + 38 * (index % 10), 8 + 38 * (index // 10), ha='center',
                      s=f'{digits.labels[row]} as {classes[row]}')
        axes.set_title(f'{title}: {len(wrong)} most confident mistakes (true digit as predicted digit)')
    save_figure(path, figure)


# ------------------------------------------------------------------------------- the command line

def new_parser(problem, about, defaults, does, writes):
    """Return an ArgumentParser with the flags that all scripts share.

    does says what a script does without a mode, writes what --out names then; defaults are the settings.
    """
    parser = argparse.ArgumentParser(description=about, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--train', action='store_true', help=f'train; without a mode: {does}')
    mode.add_argument('--plot', action='store_true', help='write the figures and tables')
    parser.add_argument('--data_dir', default='hw3_data', help='folder that holds face/ and digits/ (hw3_data)')
    parser.add_argument('--out', help=f'{writes}; --plot: folder of the figures (figures)')
    parser.add_argument('--ckpt', help='checkpoint to read, or to write with --train '
                        f'(checkpoints/{problem}....pth)')
    parser.add_argument('--resume', action='store_true', help='--train: go on with what was stopped')
    parser.add_argument('--steps', type=int, help=f'training steps ({defaults["steps"]})')
    parser.add_argument('--batch_size', type=int, help=f'images in a batch ({defaults["batch_size"]})')
    parser.add_argument('--seed', type=int, help=f'of the noise or the run ({defaults["seed"]})')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'],
                        help='auto takes a GPU if there is one (auto for --train, else cpu)')
    return parser


def add_domains(parser):
    """Add the flags of problems 3 and 4: a folder to label, the target and the source, and which table."""
    parser.add_argument('--images', help='folder of the images to label')
    parser.add_argument('--target', choices=sorted(SOURCE_OF),
                        help='domain without labels; --train without it: the whole table')
    parser.add_argument('--source', choices=sorted(SOURCE_OF),
                        help='--train: domain with labels (the assignment\'s partner of the target)')
    parser.add_argument('--directions', choices=sorted(DIRECTIONS),
                        help='--train without --target: the table of the scenarios that this assignment asked for, or '
                        'of the others (asked)')


def parse_shared(parser, problem, needs, argv):
    """Parse argv, or else the command's own words, and check the flags that all scripts share.

    needs names the flags without which a script can do nothing but --train and --plot.  The result has
    the command too, as logs and checkpoints keep it.
    """
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    for name in ('steps', 'batch_size', 'n'):
        if getattr(args, name, None) is not None and not 1 <= getattr(args, name) < 2 ** 31:
            parser.error(f'--{name} must lie in 1 .. {2 ** 31 - 1}')
    if args.seed is not None and not 0 <= args.seed < 2 ** 32:
        parser.error('--seed must lie in 0 .. 4294967295')
    for name in ('ckpt', 'out', 'init', 'images'):
        if getattr(args, name, None) == '':
            parser.error(f'--{name} is empty: name a ' + ('folder' if name == 'images' else 'file'))
    if args.train and args.ckpt is not None and args.ckpt.endswith(('_last.pth', '_last', '.jsonl', '/')):
        parser.error('--ckpt must not end in _last.pth, _last, .jsonl or /: a run needs such names for its own files')
    _check_used(parser, args)
    if 'target' in args:
        if args.target and args.source == args.target:
            parser.error(f'--source {args.source} is the target: name another domain')
        if args.train and not args.target and (args.ckpt or args.source):
            parser.error('--ckpt and --source are for one run: give its --target too')
        if args.directions and (args.target or not args.train):
            parser.error('--directions names a table: say --train, and no --target')
    if args.plot:
        args.out = args.out or 'figures'
    elif not args.train and not all(getattr(args, name) for name in needs):
        parser.error('say ' + ' '.join(f'--{name} {name.upper()}' for name in needs) + ', or --train, or --plot')
    args.command = ' '.join(['python3', problem + '.py'] + [shlex.quote(word) for word in words])
    return args


def _check_used(parser, args):
    """Refuse flags that the mode does not use, so that nobody takes a result for what it is not."""
    labels = 'target' in args and not args.train
    refused = [] if args.train else [(name, '--train') for name in (
        'steps', 'resume', 'init', 'lambda_kl', 'augment', 'setting', 'pieces', 'source')]
    if labels and not args.plot:
        refused.append(('seed', '--train'))
    if args.plot:
        refused += [(name, 'another mode') for name in ('seed', 'n', 'images', 'target', 'batch_size')]
        if labels:
            refused.append(('ckpt', 'another mode'))
    if args.train:
        refused += [(name, 'another mode') for name in ('n', 'images', 'out')]
    for name, mode in refused:
        if getattr(args, name, None) not in (None, False):
            trains = mode == '--train' and not args.plot
            parser.error(f'--{name} is for {mode}: leave it out' + ', or add --train' * trains)


def run_command(function, args):
    """Call function(args); say what a user can mend in one line on stderr and exit 1."""
    program = os.path.basename(sys.argv[0])
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='surrogateescape')       # for a file name whose bytes are no text

    def stop(number, frame):
        sys.exit(f'{program}: stopped by a signal')
    signal.signal(signal.SIGTERM, stop)    # in order: what is half-written goes, and so do other processes
    try:
        function(args)
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped by the keyboard')
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = ' '.join(str(error).split())
        if is_out_of_memory(error):
            in_batches = getattr(args, 'train', False) or getattr(args, 'images', None)
            message = (f'there is not enough memory ({message[:160] or "MemoryError"}): free some'
                       + ', or give a smaller --batch_size' * bool(in_batches))
        elif isinstance(error, RuntimeError):
            raise                          # a mistake of this program's
        sys.exit(f'{program}: {message}')


def is_out_of_memory(error):
    """Return whether this is what Python, or torch on a CPU or a GPU, raises where memory cannot be had."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(words in text for words in (
        'out of memory', "can't allocate memory", 'not enough memory', 'could not create a memory', 'bad_alloc',
        'alloc_failed'))


# ------------------------------------------------------- the data folder, made from public downloads

COUNTS = dict(usps=dict(train=7291, test=2007), mnistm=dict(train=60000, test=10000),
              svhn=dict(train=73257, test=26032), face=dict(train=40000, test=2621))
KILOBYTES = dict(usps=4, mnistm=4, svhn=4, face=12)              # that an image takes on a disk
ARCHIVES = dict(usps=9, mnistm=85, svhn=250, face=0)             # megabytes to fetch for a part
MNIST_MIRROR = 'https://ossci-datasets.s3.amazonaws.com/mnist/'
PHOTOS = ('https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/BSR/BSR_bsds500.tgz',
          'https://github.com/BIDS/BSDS500/archive/refs/heads/master.zip')
PHOTO = re.compile(r'(?:^|/)images/(train|val|test)/[^./][^/]*[.]jpg$', re.IGNORECASE)
MNISTM_SEEDS = dict(train=2020, test=1201)     # of the photographs' pieces; the data kit has the same
ATTRIBUTES = ('Bangs', 'Big_Lips', 'Black_Hair', 'Blond_Hair', 'Brown_Hair', 'Heavy_Makeup', 'High_Cheekbones', 'Male',
              'Mouth_Slightly_Open', 'Smiling', 'Straight_Hair', 'Wavy_Hair', 'Wearing_Lipstick')
FACE_SEED = 2020                               # fixes which of CelebA's faces are taken
CROP = (35, 69, 145, 179)                      # the course's square of an aligned face of 178x218 pixels
TIMEOUT = 30                                   # seconds without an answer after which the next address is tried


def make_data(args):
    """Write the assignment's data folder to args.out: each split of each part is whole or not there.

    A split that is there stays as it is; a stopped one goes on where it stopped.  Archives are kept in
    args.downloads; what is there is used, not fetched.  Raises UserError if an archive cannot be had or is damaged,
    if only a half of a split is there, or if a file cannot be written; warns where the disk may be too small.
    """
    missing = [(name, split) for name in COUNTS if name in args.only for split in ('train', 'test')
               if not is_made(part_path(args.out, name, split))]
    parts = sorted({name for name, _ in missing})
    if parts and parts != ['face']:
        torchvision_datasets()             # what is missing is said before anything is made
    if 'face' in parts:
        open_celeba(args.celeba)
    if 'mnistm' in parts and args.photos and not os.path.exists(args.photos):
        raise UserError(f'there is no {args.photos}: correct --photos')
    for folder in (args.out, args.downloads):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f'{folder} cannot be made ({error.strerror}): name another folder') from error
    images = [min(COUNTS[name][split], args.limit or COUNTS[name][split]) * KILOBYTES[name] for name, split in missing]
    places = [(args.out, sum(images) // 1000), (args.downloads, sum(ARCHIVES[name] for name in parts))]
    if os.stat(args.out).st_dev == os.stat(args.downloads).st_dev:     # one disk takes both
        places = [(args.out, places[0][1] + places[1][1])]
    for folder, wanted in places:
        free = shutil.disk_usage(folder).free // 10 ** 6
        print(f'{", ".join(parts) or "nothing"} to make, which takes up to {wanted:,} MB in {folder}; {free:,} MB are '
              'free', flush=True)
        if free < wanted:
            warn(f'there may be too little space in {folder}: {wanted:,} MB may be needed, and {free:,} MB are free')
    for name, split in missing:
        header, rows, pictures, source = MAKERS[name](args, split)
        write_split(part_path(args.out, name, split), header, rows[:args.limit], pictures, source,
                    COUNTS['face']['train'] if (name, split) == ('face', 'test') else 0)


def part_path(out, name, split):
    """Return the folder of a split of a part; its CSV has the same name and the ending .csv."""
    return os.path.join(out, *(['face'] if name == 'face' else ['digits', name]), split)


def is_made(folder):
    """Return whether a split is there, and say so.  Raises UserError if only its folder or only its CSV is."""
    table = folder + '.csv'
    if os.path.isdir(folder) and not os.path.exists(table) and os.path.exists(table + '.part'):
        finish_split(folder)               # a run was stopped just before
    if os.path.isdir(folder) != os.path.exists(table):
        there, lacking = (folder, table) if os.path.isdir(folder) else (table, folder)
        raise UserError(f'there is {there}, but no {lacking}: add what is missing, or delete {there} to make both anew')
    if os.path.isdir(folder):
        print(f'{folder} is there already, with {len(os.listdir(folder)):,} images: to make it anew, delete it and '
              'its CSV', flush=True)
    return os.path.isdir(folder)


OPERATORS = []             # torch forgets a declared operator when its Library is not kept


def torchvision_datasets():
    """Return the module torchvision.datasets.  Raises UserError if it cannot be imported."""
    try:
        import scipy.io                    # for SVHN; it comes with scikit-learn
        import torchvision.datasets
        return scipy.io and torchvision.datasets
    except Exception as error:             # by version of nearly any kind
        # A torchvision that was built for another torch lacks its operators, two of which its import looks up.  They
        # are declared here for a second try: only data sets are read, and no operator is ever run.
        with contextlib.suppress(Exception):           # an old torch has no torch.library
            if not OPERATORS:
                OPERATORS.append(torch.library.Library('torchvision', 'DEF'))
                for name in ('nms', 'qnms'):
                    OPERATORS[0].define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
                for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
                    del sys.modules[name]              # half-imported
                return torchvision_datasets()
        raise UserError(f'torchvision or scipy cannot be imported ({brief(error)}): install what requirements.txt '
                        'names for this Python, with torch and torchvision from the same index') from error


def write_split(folder, header, rows, pictures, source, first):
    """Write a split: folder/00000.png ... from first on, and folder.csv with a row for each.

    rows are the lists of an image's values, and pictures yields, for each, a function that makes its Pillow image.
    source tells by which archives; images that a stopped run made of the same are kept.
    """
    part, table, mark = folder + '.part', folder + '.csv', os.path.join(folder + '.part', 'source')
    names = [f'{first + index:05d}.png' for index in range(len(rows))]
    if os.path.isdir(part) and read_text(mark) != source:
        shutil.rmtree(part)
    os.makedirs(part, exist_ok=True)
    write_text(mark, source)
    start, shown, made = time.time(), time.time(), 0
    for index, (name, picture) in enumerate(zip(names, pictures)):
        path = os.path.join(part, name)
        if os.path.exists(path):
            continue
        write_whole(path, lambda temporary, picture=picture: picture().save(temporary))
        made += 1
        if time.time() - shown > 2:
            shown = time.time()
            print(f'{folder}: {index + 1:,} of {len(rows):,} images, '
                  + time_left((shown - start) / made * (len(rows) - index - 1)), flush=True)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator='\n')
    writer.writerow(['image_name'] + header)
    writer.writerows([name] + row for name, row in zip(names, rows))
    write_text(table + '.part', lines.getvalue())
    for name in set(os.listdir(part)) - set(names) - {'source'}:
        os.remove(os.path.join(part, name))            # images of a run with a larger --limit
    os.replace(part, folder)
    finish_split(folder)
    print(f'{folder}: {len(rows):,} images', flush=True)


def finish_split(folder):
    """Do the last steps of a split whose folder has its name already; its CSV gets its own when all else is done."""
    mark = os.path.join(folder, 'source')
    if os.path.exists(mark):
        os.remove(mark)
    os.replace(folder + '.csv.part', folder + '.csv')


def read_text(path):
    """Return the text of a file, or None if there is none."""
    if not os.path.isfile(path):
        return None
    with open(path, encoding='utf8', newline='') as file:
        return file.read()


def time_left(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} left'


def archive(args, name, addresses, md5=None, check=None, fix=''):
    """Return the path of an archive in args.downloads, fetched from the first of addresses that has it.

    check(path), where it is given in place of an MD5, raises an exception if the file is not what it should be.
    Raises UserError if no address has it, whose text fix ends, or if its MD5 is another.
    """
    from torchvision.datasets.utils import check_integrity
    path, reasons = os.path.join(args.downloads, name), []
    for address in [] if os.path.exists(path) else addresses:
        # half a file of one address is none of another's
        part, fetched = f'{path}.{zlib.crc32(address.encode()):08x}.part', False
        try:
            download(address, part)
            fetched = True
            if not check_integrity(part, md5):
                raise ValueError('it has a wrong MD5')
            if check:
                check(part)
            os.replace(part, path)
            break
        except Exception as error:         # of urllib, http, ssl, a decoder, and by version another
            if is_out_of_memory(error):
                raise
            if errno.errorcode.get(getattr(error, 'errno', None)) in (
                    'ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EACCES', 'EPERM'):
                raise UserError(f'cannot write {part} ({error.strerror}): free some space, or name another '
                                '--downloads') from error
            reasons.append(f'{address}: {brief(error)}')
            if fetched:                    # it is whole and no good; of another the rest is asked for next time
                os.remove(part)
    if not os.path.exists(path):
        raise UserError(f'{name} could not be fetched ({"; ".join(reasons)}): try again, or put the file into '
                        f'{args.downloads} yourself{fix}')
    if not check_integrity(path, md5):
        raise UserError(f'{path} has a wrong MD5: delete it, so that it is fetched anew')
    return path


def download(address, part):
    """Fetch what is at an address into the file part, or the rest of it if a beginning is there."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(address, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:     # nothing is left to send
            return
        raise
    with answer:
        have = have if answer.getcode() == 206 else 0
        length = answer.headers.get('Content-Length')
        total = have + int(length) if length else None
        start, shown, begun = time.time(), 0, have
        with open(part, 'ab' if have else 'wb') as file:
            while True:
                block = answer.read(1 << 18)
                if not block:
                    break
                file.write(block)
                have += len(block)
                if time.time() - shown > 2:
                    shown = time.time()
                    of_all = f' of {total / 1e6:.1f}' if total else ''
                    left = ', ' + time_left((shown - start) / (have - begun) * (total - have)) if total else ''
                    print(f'{address}: {have / 1e6:.1f}{of_all} MB{left}', flush=True)
    if total is not None and have != total:
        raise http.client.IncompleteRead(b'', total - have)


def brief(error):
    """Return the beginning of an error's text in one line, or else its kind."""
    return ' '.join(str(error).split())[:80] or type(error).__name__


@contextlib.contextmanager
def reading(path, fix='delete it, so that it is fetched anew, or replace it'):
    """Turn whatever a decoder raises for the file at path into a UserError."""
    try:
        yield
    except Exception as error:             # a damaged file makes decoders raise nearly anything
        if is_out_of_memory(error) or isinstance(error, UserError):
            raise
        raise UserError(f'{path} cannot be read ({brief(error)}): {fix}') from error


def make_usps(args, split):
    """USPS: 16x16 grey, enlarged to 28x28 grey.

    Returns, as all four do: the columns and the rows of the CSV, functions that make the images, and the source.
    """
    kind = torchvision_datasets().USPS
    address, name, md5 = kind.split_list[split]
    path = archive(args, name, [address], md5)
    with reading(path):
        digits = kind(args.downloads, train=split == 'train')
    return ['label'], [[label] for label in digits.targets], (
        lambda image=image: Image.fromarray(image).resize((DIGIT_SIZE, DIGIT_SIZE), Image.BICUBIC)
        for image in digits.data), md5


def make_svhn(args, split):
    """SVHN: 32x32 colour, reduced to 28x28."""
    kind = torchvision_datasets().SVHN
    address, name, md5 = kind.split_list[split]
    path = archive(args, name, [address], md5)
    with reading(path):
        digits = kind(args.downloads, split=split)
    return ['label'], [[label] for label in digits.labels.tolist()], (
        lambda image=image: Image.fromarray(image.transpose(1, 2, 0)).resize((DIGIT_SIZE, DIGIT_SIZE), Image.BICUBIC)
        for image in digits.data), md5


def make_mnistm(args, split):
    """MNIST-M as the course made it: where a digit of MNIST is not 0, a random piece of a photograph is inverted.

    The photographs are those of BSDS500; test digits lie over its test photographs.
    """
    kind, prefix = torchvision_datasets().MNIST, dict(train='train', test='t10k')[split]
    arrays, sums = [], []
    for name, header, shape in ((prefix + '-images-idx3-ubyte.gz', 16, (-1, DIGIT_SIZE, DIGIT_SIZE)),
                                (prefix + '-labels-idx1-ubyte.gz', 8, (-1,))):
        # older versions list whole addresses, which are dead, newer ones names and mirrors
        (known, md5), = [resource for resource in kind.resources if resource[0].endswith(name)]
        mirrors = [mirror + name for mirror in getattr(kind, 'mirrors', [MNIST_MIRROR])]
        path = archive(args, name, mirrors + [known] * ('/' in known), md5)
        with reading(path), gzip.open(path) as packed:
            arrays.append(np.frombuffer(packed.read(), np.uint8, offset=header).reshape(shape))
        sums.append(md5)
    digits, labels = arrays
    photos = read_photos(args, split)
    rng, places = np.random.RandomState(MNISTM_SEEDS[split]), []
    for _ in digits:
        photo = photos[rng.randint(len(photos))]
        places.append((photo, *[rng.randint(length - DIGIT_SIZE + 1) for length in photo.shape[:2]]))

    def blended(digit, photo, top, left):
        piece = photo[top:top + DIGIT_SIZE, left:left + DIGIT_SIZE].astype(np.int16)
        return Image.fromarray(np.abs(piece - 255 * (digit[..., None] > 0)).astype(np.uint8))
    return ['label'], [[label] for label in labels.tolist()], (
        functools.partial(blended, digit, *place) for digit, place in zip(digits, places)
    ), ' '.join(sums + [f'{zlib.crc32(photo.tobytes()):08x}' for photo in photos])


PHOTO_COUNTS = dict(train=200, val=100, test=200)      # of BSDS500


def read_photos(args, split):
    """Return the photographs of BSDS500 for a split as (H, W, 3) uint8 arrays, sorted by name."""
    path = args.photos or os.path.join(args.downloads, 'BSDS500-master.zip')       # as a browser saves the mirror's
    if not args.photos and not os.path.exists(path):
        path = archive(args, 'BSR_bsds500.tgz', PHOTOS, check=photos_of,
                       fix=', or name an archive or a folder of the photographs with --photos')
    with reading(path, *['correct --photos'] * bool(args.photos)):
        found = {name: content for name, content in photos_of(path).items()
                 if (PHOTO.search(name).group(1).lower() == 'test') == (split == 'test')}
        photos = [np.asarray(Image.open(io.BytesIO(found[name])).convert('RGB')) for name in sorted(found)]
    wanted = sum(count for group, count in PHOTO_COUNTS.items() if (group == 'test') == (split == 'test'))
    if len(photos) != wanted:
        warn(f'{path} has {len(photos)} photographs for the {split} images of MNIST-M, and the whole BSDS500 has '
             f'{wanted}: other images will be made than from the whole')
    return photos


def photos_of(path):
    """Return {name: content} of the photographs in a folder, a zip or a tar archive; ValueError if it lacks some."""
    found = {}
    if os.path.isdir(path):
        for folder, _, names in os.walk(path):
            for name in names:
                inside = os.path.relpath(os.path.join(folder, name), path).replace(os.sep, '/')
                # the folder that is named may be the one of the photographs
                inside = inside if PHOTO.search(inside) else 'images/' + inside
                if PHOTO.search(inside):
                    with open(os.path.join(folder, name), 'rb') as file:
                        found[inside] = file.read()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            found = {name: packed.read(name) for name in packed.namelist() if PHOTO.search(name)}
    else:
        with tarfile.open(path) as packed:
            found = {member.name: packed.extractfile(member).read() for member in packed
                     if member.isfile() and PHOTO.search(member.name)}
    if {PHOTO.search(name).group(1).lower() for name in found} != {'train', 'val', 'test'}:
        raise ValueError('it lacks photographs in images/train, images/val or images/test')
    return found


CELEBA_FIX = ('CelebA cannot be fetched by a program any more: get img_align_celeba.zip and list_attr_celeba.txt (or '
              '.csv) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html or a copy of it, put them side by side, '
              'and say --celeba img_align_celeba.zip')


CELEBA_FACES = 202599


@functools.lru_cache(maxsize=None)         # read once, so that a warning is said once
def open_celeba(path):
    """Return the zip file with CelebA's aligned faces, {name of a face: its name there}, and their attributes."""
    if path is None:
        raise UserError(f'--celeba is missing: {CELEBA_FIX}; or leave faces out with --only usps mnistm svhn')
    if not os.path.isfile(path):
        raise UserError(f'there is no file {path}: {CELEBA_FIX}')
    with reading(path, CELEBA_FIX):
        packed = zipfile.ZipFile(path)
        inside = {os.path.basename(name): name for name in packed.namelist() if name.lower().endswith('.jpg')}
    for name in ('list_attr_celeba.txt', 'list_attr_celeba.csv'):
        table = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(table):
            with reading(table, CELEBA_FIX):
                attributes = read_attributes(read_text(table))
            lacking = [face for face in attributes.index if face not in inside]
            count = len(attributes) - len(lacking)
            if count < 2:
                raise UserError(f'{path} holds none of the images that {name} names: {CELEBA_FIX}')
            if lacking or count != CELEBA_FACES:
                first = f' ({lacking[0]} is the first that it lacks)' if lacking else ''
                warn(f'{path} holds {count:,} images that {name} names{first}, and the whole CelebA has '
                     f'{CELEBA_FACES:,}: other faces will be taken than from the whole')
            return packed, inside, attributes
    raise UserError(f'there is no list_attr_celeba.txt beside {path}: {CELEBA_FIX}')


def read_attributes(text):
    """Return the assignment's 13 attributes of CelebA's images as a DataFrame of 0.0 and 1.0, from its table."""
    import pandas as pd
    lines = text.splitlines()
    if ',' in lines[0]:                    # a copy has commas, and no number of images before its header
        table, count = pd.read_csv(io.StringIO(text), index_col=0), len(lines) - 1
    else:
        table, count = pd.read_csv(io.StringIO(text), sep=r'\s+', skiprows=1, index_col=0), int(lines[0])
    table = table[list(ATTRIBUTES)]
    if len(table) != count or table.index.duplicated().any() or not table.isin([-1, 1]).all().all():
        raise ValueError('it is cut off, or has other values than -1 and 1')
    return (table.astype(float) + 1) / 2


def make_face(args, split):
    """CelebA, aligned, in the course's crop, reduced to 64x64: a part of it, by a fixed seed, in CelebA's order."""
    packed, inside, attributes = open_celeba(args.celeba)
    names = sorted(set(inside) & set(attributes.index))
    # of a part of CelebA the same share is for training
    total = min(len(names), sum(COUNTS['face'].values()))
    training = total * COUNTS['face']['train'] // sum(COUNTS['face'].values())
    chosen = np.sort(np.random.RandomState(FACE_SEED).permutation(len(names))[:total])
    chosen = [names[index] for index in (chosen[:training] if split == 'train' else chosen[training:])]

    def cropped(name):
        with reading(args.celeba, CELEBA_FIX), Image.open(io.BytesIO(packed.read(inside[name]))) as image:
            if image.size != (178, 218):
                raise ValueError(f'{name} has {image.size[0]}x{image.size[1]} pixels, an aligned face 178x218')
            return image.convert('RGB').crop(CROP).resize((FACE_SIZE, FACE_SIZE), Image.BICUBIC)
    return list(ATTRIBUTES), attributes.loc[chosen].values.tolist(), (
        functools.partial(cropped, name) for name in chosen), f'{os.path.getsize(args.celeba)} {len(names)}'


MAKERS = dict(usps=make_usps, mnistm=make_mnistm, svhn=make_svhn, face=make_face)


def main(argv=None):
    parser = argparse.ArgumentParser(description='Make the data folder of the assignment from public downloads.')
    parser.add_argument('out', metavar='OUT', help='folder to write, hw3_data for instance')
    parser.add_argument('--only', nargs='+', choices=list(COUNTS), default=list(COUNTS), help='these parts alone')
    parser.add_argument('--celeba', help='img_align_celeba.zip; list_attr_celeba.txt must lie beside it')
    parser.add_argument('--photos', help='archive or folder of BSDS500, if its servers are away')
    parser.add_argument('--downloads', help='folder of the archives (OUT/downloads)')
    parser.add_argument('--limit', type=int, help='so many images of each split')
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error('--limit must be at least 1')
    for name in ('out', 'celeba', 'photos', 'downloads'):
        if getattr(args, name) is not None:
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    args.downloads = args.downloads or os.path.join(args.out, 'downloads')
    run_command(make_data, args)


if __name__ == '__main__':
    main()
