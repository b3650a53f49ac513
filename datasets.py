"""Read images and labels, augment images, write pictures and label files; and the frame of all scripts, their flags.

Images are uint8 in memory and become floats batch by batch.  A mistake in a user's file or path is a UserError.
"""
import argparse
import csv
import functools
import io
import os
import shlex
import shutil
import sys
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
ATTRIBUTES = ('Bangs', 'Big_Lips', 'Black_Hair', 'Blond_Hair', 'Brown_Hair', 'Heavy_Makeup', 'High_Cheekbones', 'Male',
              'Mouth_Slightly_Open', 'Smiling', 'Straight_Hair', 'Wavy_Hair', 'Wearing_Lipstick')
HELD_OUT = 500             # training images of a set that are held out
HELD_OUT_SEED = 2020       # fixes which ones, whatever --seed is
IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.bmp')
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg')


class UserError(Exception):
    """A mistake of the user's, or of the machine's: one line that names the cause and the fix."""


# ------------------------------------------------------------------------------ images and labels

def list_images(folder):
    """Return the sorted names of the image files in folder (.png, .jpg, .jpeg, .bmp, any case); UserError if none.

    A broken link is listed, so that reading it fails.
    """
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}: correct the path; for training, --data_dir must name a '
                        'folder that is laid out as README.md shows')
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS)
                   and not name.startswith('.') and not os.path.isdir(os.path.join(folder, name)))
    if not names:
        raise UserError(f'{folder} holds no image ({", ".join(IMAGE_ENDINGS)})')
    return names


def read_image(path, size):
    """Read one image of any mode as (size, size, 3) uint8, turned as its EXIF data says; UserError if it is damaged.

    Transparent parts are laid over black, or over white where the ink is dark.  An image of another size is resized
    bicubically; size None keeps its own.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(('I', 'F')):
                image = Image.fromarray(to_8_bit(np.asarray(image)))
            if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
                image = image.convert('RGBA')
                grey, opacity = np.asarray(image.convert('L'), float), np.asarray(image.split()[-1], float)
                # white is for an ink whose mean is nearer to black
                paper = 255 if opacity.any() and np.average(grey, weights=opacity) < 128 else 0
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


def to_8_bit(values):
    """Turn the values of a grey image of more than 8 bits, or of floats, into (H, W) uint8.

    Whole numbers are divided by 257 if one is above 255.  Floats lie in [0, 1] or [-1, 1], or ValueError is raised.
    """
    if values.dtype.kind != 'f':
        return np.round(values / 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8)
    if not (values.min() >= -1 and values.max() <= 1):
        raise ValueError(f'its values reach from {values.min():g} to {values.max():g}, and not from 0 to 1')
    return np.round(255 * ((values + 1) / 2 if values.min() < 0 else values)).astype(np.uint8)


def read_images(folder, names, size):
    """Read the named images of a folder as one (N, 3, size, size) uint8 tensor."""
    images = np.empty((len(names), size, size, 3), np.uint8)
    for index, name in enumerate(names):
        images[index] = read_image(os.path.join(folder, name), size)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def read_label_file(path, names):
    """Read a label file (header image_name,...) as a DataFrame of texts, a row for each name, in their order.

    The values may be separated by commas, semicolons or tabs, with spaces around them and one separator more at the
    end of a row.  Raises UserError unless each image in names has one row, and each row an image.
    """
    import pandas as pd
    if not os.path.isfile(path):
        raise UserError(f'there is no {path}: it comes with the data, beside the folder of images')
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:     # -sig: without a byte order mark
            lines = file.read().splitlines()
        separator = max(',;\t', key=lines[0].count) if lines else ','
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is no CSV file in UTF-8 ({error}): save it as one') from error
    header = [cell.lower() if cell.lower() in ('image_name', 'label') else cell for cell in rows[0]] if rows else []
    if 'image_name' not in header:
        raise UserError(f'{path} begins with {",".join(header)[:60]!r}: its first row must be a header image_name,...')
    width = max(index for index, cell in enumerate(header) if cell) + 1        # without an empty last column
    if len(set(header[:width])) < width:
        raise UserError(f'{path} has two columns of one name in its header: rename or delete one')
    for number, row in enumerate(rows, 1):
        if any(row) and (len(row) < width or any(row[width:])):
            raise UserError(f'{path} has {len(row)} values in line {number} and {width} columns in its header: '
                            'correct that line')
    table = pd.DataFrame([row[:width] for row in rows[1:] if any(row)], columns=header[:width], dtype=str)
    listed, images = set(table['image_name']), set(names)
    if len(listed) != len(table):
        twice = table['image_name'][table['image_name'].duplicated()].iloc[0]
        raise UserError(f'{path} names {twice!r} twice: delete one of the rows')
    for missing, message in ((listed - images, 'names {!r} but its folder does not hold it: add the image'),
                             (images - listed, 'has no row for {!r}: add the row')):
        if missing:
            raise UserError(f'{path} {message.format(min(missing))} ({len(missing)} such)')
    return table.set_index('image_name').loc[names]


def read_numbers(column, path, allowed):
    """Return a column of texts as (N,) float64.  Raises UserError with the row of the first that is not allowed."""
    import pandas as pd
    values = pd.to_numeric(column, errors='coerce')
    wrong = values.index[~values.isin(allowed)]
    if len(wrong):
        raise UserError(f'{path} says {column[wrong[0]]!r} of {wrong[0]} in column {column.name}: write one of '
                        + ', '.join(map(str, allowed)))
    return values.values.astype(float)


class FaceImages:
    """The faces of one split: names (N, sorted), images (N, 3, 64, 64) uint8, attributes (a DataFrame of N rows)."""

    def __init__(self, data_dir, split):
        folder = os.path.join(data_dir, 'face', split)
        self.csv = folder + '.csv'
        self.names = list_images(folder)
        self.attributes = read_label_file(self.csv, self.names)
        self.images = read_images(folder, self.names, FACE_SIZE)

    def attribute(self, name):
        """Return (N,) bool: which faces have the attribute.  Raises UserError if it is unknown."""
        if name not in self.attributes.columns:
            raise UserError(f'{self.csv} has no attribute {name}: choose one of ' + ', '.join(self.attributes.columns))
        return read_numbers(self.attributes[name], self.csv, (0, 1, -1)) > 0.5


class DigitImages:
    """The digits of a domain's split: names (N, sorted), images (N, 3, 28, 28) uint8, labels (N,) int64 of 0 .. 9."""

    def __init__(self, data_dir, domain, split):
        folder = os.path.join(data_dir, 'digits', domain, split)
        self.names = list_images(folder)
        table = read_label_file(folder + '.csv', self.names)
        if 'label' not in table.columns:
            raise UserError(f'{folder}.csv has no column label, only image_name and '
                            f'{", ".join(table.columns) or "nothing else"}: replace it')
        labels = read_numbers(table['label'], folder + '.csv', range(10))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.images = read_images(folder, self.names, DIGIT_SIZE)


@functools.lru_cache(maxsize=None)
def read_digits(data_dir, domain, split):
    """Return the DigitImages; the runs of one command read each of them once."""
    return DigitImages(data_dir, domain, split)


def split_held_out(count):
    """Split range(count) into (training, held-out) index tensors, the same ones at every call.

    500 images are held out, or a tenth of a set of fewer than 5,000.
    """
    order = np.random.RandomState(HELD_OUT_SEED).permutation(count)
    held_out = min(HELD_OUT, max(1, count // 10))
    return torch.from_numpy(np.sort(order[held_out:])), torch.from_numpy(np.sort(order[:held_out]))


def data_checksum(*tensors):
    """Return a checksum of tensors, by which a resumed run recognises its data."""
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.numpy(), checksum)
    return f'{checksum:08x}'


def to_float(images):
    """Turn uint8 images into float32 in [0, 1]; the shape stays."""
    return images.float().div_(255)


def to_uint8(images):
    """Round float images in [0, 1] to uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def to_unit(images):
    """Turn images in [-1, 1] into [0, 1]."""
    return (images + 1) / 2


# ----------------------------------------------------------------------------------- augmentation

def random_flip(images, rng):
    """Mirror each of (N, 3, H, W) images left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    return torch.where(flip.to(images.device), images.flip(3), images)


def augment_digits(images, strength, rng, backgrounds=None):
    """Change the shape, background and colours of (N, 3, 28, 28) digits in [0, 1]; the result may leave [0, 1].

    An image is stretched to the whole of [0, 1]; then, at strength 1, it is turned by up to 15 degrees, sheared by up
    to 0.2, scaled per axis by up to exp(0.2) and moved by up to 2 pixels; for half of the images the contrast around a
    random grey is raised by up to exp(2), so that strokes become sharp, thick or thin; for two thirds of the images a
    smooth random background, or that of backgrounds (N, 3, 28, 28), is blended in as MNIST-M was made (Ganin et al.
    2016: the absolute difference); half of the images are blurred; colours are inverted with probability 1/2 and
    mixed by a random matrix; Gaussian noise is added.  Strength 0 changes nothing.
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


# -------------------------------------------------------------------- pictures and label files out

def check_output(path, endings=None):
    """Raise UserError if path cannot be written or has none of endings or, without endings, names an image or a net."""
    if path.endswith(os.sep) or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path} is a folder or a device: name a file to write')
    if endings and not path.lower().endswith(endings):
        raise UserError(f'{path} does not end in {" or ".join(endings)}: name such a file')
    if not endings and path.lower().endswith(IMAGE_ENDINGS + ('.pth',)):
        raise UserError(f'{path} has the name of an image or a checkpoint: name a CSV file')
    check_parent(path)


def check_parent(path):
    """Raise UserError unless something can be written at path, whose missing folders are made later."""
    folder = os.path.dirname(os.path.realpath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f'cannot write {path} ({folder} is no folder or must not be changed): choose another place')


def check_images_out(path):
    """Return True if path means a folder of images, False if one picture; UserError if it cannot be written.

    A new name that ends in letters, as .png or .gif, is that of a picture.
    """
    ending = os.path.splitext(path.rstrip(os.sep))[1].lower()
    if ending in PICTURE_ENDINGS or ending[1:].isalpha() and not os.path.isdir(path):
        check_output(path, PICTURE_ENDINGS)
        return False
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{path} exists and is no empty folder: name a new one for the images')
    check_parent(path)
    return True


def write_whole(path, write):
    """Let write(temporary path) make a file or a folder, then rename it: path is whole or untouched.

    The temporary name has path's ending.  A missing parent folder is made.  A link stays, and its file is written.
    """
    path = os.path.realpath(path)
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, '.unfinished.' + name)
    try:
        try:
            os.makedirs(parent, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)       # a folder that a killed command left
            write(temporary)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.exists(temporary):
                os.remove(temporary)
    except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror or error}): '
                        'choose a place that can be written and has room') from error


def write_text(path, text):
    """Write a text to path, in UTF-8 with \\n at the end of lines; a file name that is no text keeps its bytes."""
    def write(temporary):
        with open(temporary, 'w', encoding='utf8', errors='surrogateescape', newline='') as file:
            file.write(text)
    write_whole(path, write)


def write_table(path, rows):
    """Write rows of values to path as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    write_text(path, text.getvalue())


def make_grid(images, columns, gap=2):
    """Lay (N, 3, H, W) uint8 images out in rows on white: a (height, width, 3) uint8 array."""
    from torchvision.utils import make_grid as lay_out
    return lay_out(images, nrow=columns, padding=gap, pad_value=255).permute(1, 2, 0).numpy()


def save_picture(path, images, columns):
    """Write (N, 3, H, W) uint8 images as one picture to path; JPEG without chroma loss at quality 95."""
    options = {} if path.lower().endswith('.png') else {'quality': 95, 'subsampling': 0}
    picture = Image.fromarray(make_grid(images, columns))
    write_whole(path, lambda temporary: picture.save(temporary, **options))


def save_single_images(folder, images, names=None):
    """Write (N, 3, H, W) uint8 images to folder as 00000.png, 00001.png, ..., or under names; whole or not at all."""
    def write(temporary):
        os.mkdir(temporary)
        for index, image in enumerate(images):
            name = names[index] if names else f'{index:05d}'
            Image.fromarray(np.asarray(image).transpose(1, 2, 0)).save(os.path.join(temporary, name + '.png'))
    write_whole(folder, write)


def save_classes(path, single, images):
    """Write images of classes (count, classes, 3, H, W) uint8, a row for each class or, if single, as 0_001.png, ..."""
    count = len(images)
    images = images.transpose(0, 1).flatten(0, 1)      # class after class
    if single:
        digits = max(3, len(str(count)))
        save_single_images(path, images, [f'{index // count}_{index % count + 1:0{digits}d}'
                                          for index in range(len(images))])
    else:
        save_picture(path, images, count)


# ---------------------------------------------------------------------- the frame of all scripts

def number_between(low, high, kind=int):
    """Return a type for argparse: a number of this kind in low .. high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} does not lie in {low} .. {high}')
        return value
    parse.__name__ = kind.__name__         # which argparse prints
    return parse


def new_parser(problem, about, defaults, does, writes):
    """Return a parser with the flags that all scripts share; does and writes are help texts for use without a mode."""
    count = number_between(1, 2 ** 31 - 1)
    parser = argparse.ArgumentParser(description=about, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--train', action='store_true', help=f'train; without a mode: {does}')
    mode.add_argument('--plot', action='store_true', help='write the figures and tables')
    parser.add_argument('--data_dir', default='hw3_data', help='folder that holds face/ and digits/ (hw3_data)')
    parser.add_argument('--out', help=f'{writes}; --plot: folder of the figures (figures)')
    parser.add_argument('--ckpt', help='checkpoint to read, or to write with --train; with --plot '
                        f'for problems 1 and 2 (checkpoints/{problem}....pth)')
    parser.add_argument('--resume', action='store_true', help='--train: go on with what was stopped')
    parser.add_argument('--steps', type=count, help=f'--train: training steps ({defaults["steps"]})')
    parser.add_argument('--batch_size', type=count, help=f'images in a batch ({defaults["batch_size"]})')
    parser.add_argument('--seed', type=number_between(0, 2 ** 32 - 1),
                        help=f'of the noise or the run ({defaults["seed"]})')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'],
                        help='auto takes a GPU if there is one (auto for --train, else cpu)')
    return parser


def add_domains(parser):
    """Add the flags of problems 3 and 4: a folder to label, the target and the source."""
    parser.add_argument('--images', help='folder of the images to label')
    parser.add_argument('--target', choices=sorted(SOURCE_OF),
                        help='domain without labels; --train without it: each of the three')
    parser.add_argument('--source', choices=sorted(SOURCE_OF),
                        help='--train: domain with labels (the assignment\'s partner of the target)')


def parse_shared(parser, problem, needs, argv):
    """Parse argv or sys.argv, store the command; without --train or --plot the flags in needs are required."""
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    for name in ('data_dir', 'out', 'ckpt', 'images', 'init'):
        if getattr(args, name, None):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if 'target' in args and args.target and args.source == args.target:
        parser.error(f'--source {args.source} is the target: name another domain')
    if 'target' in args and args.train and not args.target and (args.ckpt or args.source):
        parser.error('--ckpt and --source are for one run: give its --target too')
    if args.train and args.out or args.resume and not args.train:
        parser.error('--resume is for --train, and --out is not: --ckpt names the file that --train writes')
    if args.plot:
        args.out = args.out or 'figures'
    elif not args.train and not all(getattr(args, name) for name in needs):
        parser.error('say ' + ' '.join(f'--{name} {name.upper()}' for name in needs) + ', or --train, or --plot')
    args.command = ' '.join(['python3', problem + '.py'] + [shlex.quote(word) for word in words])
    return args


def run_command(function, args):
    """Call function(args); say what a user can mend in one line on stderr and exit 1."""
    program = os.path.basename(sys.argv[0])
    try:
        function(args)
    except KeyboardInterrupt:
        sys.exit(f'{program}: stopped by the keyboard')
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = ' '.join(str(error).split())
        if is_out_of_memory(error):
            message = f'there is not enough memory ({message[:160]}): free some, or give a smaller --batch_size or --n'
        elif isinstance(error, RuntimeError):
            raise                          # a mistake of this program's
        sys.exit(f'{program}: {message}')


def is_out_of_memory(error):
    """Return whether this is what Python, or torch on a CPU or a GPU, raises where memory cannot be had."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and 'memory' in str(error).lower()
