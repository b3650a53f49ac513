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
from PIL import Image

FACE_SIZE = 64             # pixels, height and width of a face
HELD_OUT = 500             # training faces kept apart to choose a checkpoint, never trained on
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
        raise UserError(f'there is no folder {folder}: lay the data out as README.md shows, '
                        'or name its place with --data_dir')
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)
                   and not name.startswith('.') and os.path.isfile(os.path.join(folder, name)))
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'{path} cannot be read as an image ({error}): replace the file')


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

    The parent folder is made if need be; the temporary name lies in it and has path's ending.
    Raises UserError with path and the reason.
    """
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


# ---------------------------------------------------------------------------------------- figures

# Okabe and Ito's palette, which colour-blind readers can tell apart, with a shape for each
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#000000')
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


def draw_points(axes, points, labels, names):
    """Scatter (N, 2) points, one colour and shape for each label 0 .. len(names) - 1."""
    for label, name in enumerate(names):
        chosen = points[np.asarray(labels) == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=14, c=COLOURS[label], marker=MARKERS[label],
                     alpha=0.75, linewidths=0, label=f'{name} ({len(chosen)})')
    axes.set(xlabel='t-SNE dimension 1 (no unit)', ylabel='t-SNE dimension 2 (no unit)')
    axes.legend(markerscale=1.8)
