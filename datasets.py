"""Every file that is not weights: the assignment's images and labels in, pictures out.

Images are kept as uint8 in memory and become floats batch by batch; whatever can be wrong with a
user's file or path ends in one UserError that names the cause and the fix.
"""
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FACE_SIZE = 64             # pixels, height and width of a face
DIGIT_SIZE = 28            # pixels, height and width of a digit
SOURCE_OF = {'mnistm': 'usps', 'svhn': 'mnistm', 'usps': 'svhn'}     # the assignment's scenarios
# as figures and tables print them: the svhn folder of the kit is a drawn stand-in for that data set
DOMAIN_NAMES = {'mnistm': 'MNIST-M', 'svhn': 'SVHN stand-in', 'usps': 'USPS'}
HELD_OUT = 500             # training images of a set that are kept apart, never trained on
HELD_OUT_SEED = 2020       # fixes which ones, whatever --seed is
IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.bmp')
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg')


class UserError(Exception):
    """A mistake of the user's, or of the machine's: one line that names the cause and the fix."""


def run_command(function, args):
    """Call function(args); say a UserError or an OSError in one line on stderr and exit 1."""
    try:
        function(args)
    except (UserError, OSError) as error:
        message = ' '.join(str(error).split())
        sys.exit(f'{os.path.basename(sys.argv[0])}: {message}')
    except KeyboardInterrupt:
        sys.exit(f'{os.path.basename(sys.argv[0])}: stopped by the keyboard')


# ---------------------------------------------------------------------------------------- reading

def list_images(folder):
    """Return the sorted names of the image files in folder (.png, .jpg, .jpeg, .bmp, any case).

    Raises UserError if the folder does not exist, is no folder or holds no image.
    """
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}: name the right place, for training data with '
                        '--data_dir and laid out as README.md shows')
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)
                   and not name.startswith('.') and not os.path.isdir(os.path.join(folder, name)))
    if not names:
        raise UserError(f'{folder} holds no image ({", ".join(IMAGE_ENDINGS)})')
    return names


def read_image(path, size):
    """Read one image of any mode as (size, size, 3) uint8; another size is resized bicubically.

    size None keeps the image's own.  Transparent pixels are laid over black.  Raises UserError with the
    name if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith('I'):                     # 16-bit grey: keep the upper 8 bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
                image = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', image.size, (0, 0, 0, 255)), image)
            image = image.convert('RGB')
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.BICUBIC)
            return np.asarray(image)
    except Exception as error:             # a damaged file makes Pillow's decoders raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f'{path} cannot be read as an image ({reason}): replace the file')


def read_images(folder, names, size):
    """Read the named images of a folder, two at a time, as one (N, 3, size, size) uint8 tensor."""
    images = np.empty((len(names), size, size, 3), np.uint8)

    def read_into(index):
        images[index] = read_image(os.path.join(folder, names[index]), size)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(read_into, range(len(names))):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_csv(path, names):
    """Read a label file (header image_name,...) as a DataFrame with one row per name, in their order.

    Raises UserError if the file is missing, empty or malformed, if a row has no image in names, or
    an image has no row or two.
    """
    import pandas as pd
    if not os.path.isfile(path):
        raise UserError(f'there is no {path}: it comes with the data, beside the folder of images')
    try:
        table = pd.read_csv(path, dtype={'image_name': str})
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f'{path} is no label file ({error}): replace it')
    if 'image_name' not in table.columns or len(table) == 0:
        raise UserError(f'{path} has no rows under a header image_name,...: replace it')
    if table['image_name'].isnull().any():
        raise UserError(f'{path} has a row without an image_name: delete or complete it')
    rows, images = set(table['image_name']), set(names)
    if len(rows) != len(table):
        twice = table['image_name'][table['image_name'].duplicated()].iloc[0]
        raise UserError(f'{path} names {twice} twice: delete one of the rows')
    for missing, fix in ((rows - images, 'names {} but its folder does not hold it: add the image'),
                         (images - rows, 'has no row for {}: add the row')):
        if missing:
            raise UserError(f'{path} {fix.format(min(missing))} ({len(missing)} such)')
    return table.set_index('image_name').loc[names]


class FaceImages(object):
    """The faces of one split, read once into memory.

    Attributes:
        names       list of N file names, sorted
        images      (N, 3, 64, 64) uint8 tensor
        attributes  DataFrame (N, 13) of 0.0 and 1.0, one named column for each attribute

    Raises UserError for whatever is wrong with the folder, its CSV or one of its images.
    """

    def __init__(self, data_dir, split):
        folder = os.path.join(data_dir, 'face', split)
        self.csv = folder + '.csv'
        self.names = list_images(folder)
        self.attributes = read_csv(self.csv, self.names)
        self.images = read_images(folder, self.names, FACE_SIZE)

    def attribute(self, name):
        """Return (N,) bool: which faces have the attribute.  Raises UserError if it is unknown."""
        if name not in self.attributes.columns:
            raise UserError(f'{self.csv} has no attribute {name}: choose one of '
                            + ', '.join(self.attributes.columns))
        import pandas as pd
        values = pd.to_numeric(self.attributes[name], errors='coerce')
        if values.isnull().any():
            raise UserError(f'{self.csv} has no number for {name} of {values.index[values.isnull()][0]}: '
                            'write 0.0 or 1.0')
        return values.values > 0.5


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
            raise UserError(f'{folder}.csv has no column label: replace it')
        import pandas as pd
        labels = pd.to_numeric(table['label'], errors='coerce')
        wrong = ~labels.isin(range(10))
        if wrong.any():
            raise UserError(f'{folder}.csv has no digit 0 .. 9 for {labels.index[wrong][0]}: mend the row')
        self.labels = torch.from_numpy(labels.values.astype(np.int64))
        self.images = read_images(folder, self.names, DIGIT_SIZE)


def read_ahead(folder, names, size, chunk=1024):
    """Yield the named images of a folder in order, as (n, 3, size, size) uint8 tensors, n <= chunk.

    While the caller works on one chunk the next is being read.
    """
    parts = [names[start:start + chunk] for start in range(0, len(names), chunk)]
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read_images, folder, parts[0], size)
        for part in parts[1:] + [None]:
            images = coming.result()
            if part is not None:
                coming = pool.submit(read_images, folder, part, size)
            yield images


def split_held_out(count):
    """Split range(count) into (training, held-out) index arrays, the same ones at every call.

    500 images are held out, or a tenth of a set of fewer than 5,000.  Raises UserError if nothing
    would be left to train on.
    """
    if count < 2:
        raise UserError(f'training needs two images or more, and there is {count}: add some')
    order = np.random.RandomState(HELD_OUT_SEED).permutation(count)
    held_out = min(HELD_OUT, max(1, count // 10))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def to_float(images):
    """Turn uint8 images into float32 in [0, 1]; the shape stays."""
    return images.float().div_(255)


def random_flip(images, rng):
    """Mirror each of (N, 3, H, W) images left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(flip, images.flip(3), images)


def augment_digits(images, strength, rng, backgrounds=None):
    """Change the shape, background and colours of (N, 3, 28, 28) digits in [0, 1], each in its own way.

    An image is stretched to the whole of [0, 1]; then, at strength 1, it is turned by up to 15 degrees,
    sheared by up to 0.2, scaled per axis by up to exp(0.2) and moved by up to 2 pixels; a smooth random
    background, or that of backgrounds (N, 3, 28, 28), is blended in as MNIST-M was made (Ganin et al.
    2016: the absolute difference); it is blurred; colours are inverted in every second image and mixed
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
    """Draw count row numbers, with replacement, such that every class of labels (N,) is as likely."""
    weights = 1 / torch.bincount(labels).float()[labels]
    return torch.multinomial(weights, count, replacement=True, generator=rng)


# ---------------------------------------------------------------------------------------- writing

def check_picture_path(path):
    """Raise UserError unless path can name a picture: its ending is known and it is no folder."""
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder: name the picture to write, for instance '
                        + os.path.join(path, 'faces.png'))
    if not path.lower().endswith(PICTURE_ENDINGS):
        raise UserError(f'{path} does not end in .png, .jpg or .jpeg: name such a picture')


def write_whole(path, write):
    """Let write(temporary path) make a file or a folder, then rename it: path is whole or untouched.

    The parent folder is made if need be; the temporary name lies in it and has path's ending.  Of a link
    the file behind it is written.  Raises UserError with path and the reason.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f'{path} is a device or a pipe: name a file to write')
    parent, name = os.path.split(os.path.abspath(path))
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
                        'choose a place that can be written and has room')


def make_grid(images, columns, gap=2):
    """Lay (N, 3, H, W) uint8 images out in rows on white: a (height, width, 3) uint8 array."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        y = gap + index // columns * (height + gap)
        x = gap + index % columns * (width + gap)
        grid[y:y + height, x:x + width] = np.asarray(image).transpose(1, 2, 0)
    return grid


def save_picture(path, pixels):
    """Write (height, width, 3) uint8 pixels to path; JPEG without chroma loss at quality 95."""
    options = {} if path.lower().endswith('.png') else {'quality': 95, 'subsampling': 0}
    write_whole(path, lambda temporary: Image.fromarray(pixels).save(temporary, **options))


def save_single(folder, images):
    """Write (N, 3, H, W) uint8 images to folder as 00000.png, 00001.png, ...; whole or not at all.

    Raises UserError if the folder exists and is not empty.
    """
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f'{folder} exists and is no empty folder: name a new one for the images')

    def write(temporary):
        os.mkdir(temporary)
        for index, image in enumerate(images):
            pixels = np.asarray(image).transpose(1, 2, 0)
            Image.fromarray(pixels).save(os.path.join(temporary, f'{index:05d}.png'))
    write_whole(folder, write)


def write_predictions(path, names, labels):
    """Write the assignment's CSV, image_name,label and a row for each name; whole or not at all."""
    import csv

    def write(temporary):
        # surrogateescape: a file name whose bytes are no UTF-8 is written as it stands
        with open(temporary, 'w', newline='', encoding='utf8', errors='surrogateescape') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(['image_name', 'label'])
            writer.writerows((name, int(label)) for name, label in zip(names, labels))
    write_whole(path, write)


# ---------------------------------------------------------------------------------------- figures

# Okabe and Ito's palette, which colour-blind readers can tell apart, and three more, with a shape for
# each of the first seven
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#000000',
           '#882255', '#999999', '#666600')
MARKERS = 'o^sDvP*'


def new_figure(width, height, rows=1, columns=1):
    """Return a matplotlib figure of width x height inches and its axes, rows x columns of them.

    Made without pyplot, which would look for a screen.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save_figure(path, figure):
    """Write a figure to path at 150 dots per inch, without a date or version in it."""
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150,
                                                       metadata={'Software': None}))


def draw_pixels(axes, pixels):
    """Fill axes with a (height, width, 3) uint8 picture; data coordinates are its pixels."""
    from matplotlib.image import AxesImage
    height, width = pixels.shape[:2]
    image = AxesImage(axes, extent=(0, width, height, 0), origin='upper', interpolation='nearest')
    image.set_data(pixels)
    axes.add_image(image)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect='equal')
    axes.axis('off')


def draw_text(path, title, parts):
    """Write texts, a print(model) each, side by side in one picture."""
    lines = max(part.count('\n') + 1 for part in parts)
    letters = max(len(line) for part in parts for line in part.split('\n'))
    figure, all_axes = new_figure((0.056 * letters + 0.2) * len(parts), 0.11 * lines + 0.7,
                                  columns=len(parts))
    for axes, part in zip(np.atleast_1d(all_axes), parts):
        axes.axis('off')
        axes.text(0, 1, part, family='monospace', fontsize=6.5, va='top', transform=axes.transAxes)
    figure.suptitle(title)
    save_figure(path, figure)


def embed(features):
    """Map (N, dimensions) features to (N, 2) by t-SNE (van der Maaten and Hinton 2008), seed 0."""
    from sklearn.manifold import TSNE
    # the names that sklearn 0.21 and today's share; its own default of 30 needs 90 points or more
    return TSNE(init='pca', learning_rate=200.0, random_state=0,
                perplexity=min(30.0, (len(features) - 1) / 3)).fit_transform(features)


def draw_points(axes, points, labels, names, markers=None):
    """Scatter (N, 2) points, one colour and shape for each label 0 .. len(names) - 1."""
    size, alpha = (14, 0.75) if markers is None else (32, 1)      # a written marker has thin strokes
    markers = markers or MARKERS
    for label, name in enumerate(names):
        chosen = points[np.asarray(labels) == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, c=COLOURS[label], marker=markers[label],
                     alpha=alpha, linewidths=0, label=f'{name} ({len(chosen)})')
    axes.set(xlabel='t-SNE dimension 1 (no unit)', ylabel='t-SNE dimension 2 (no unit)')
    axes.legend(markerscale=1.8, loc='upper left', bbox_to_anchor=(1, 1))      # beside the points
