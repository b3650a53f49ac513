"""Images and labels in, pictures and label files out, and what can be wrong with them."""
import os

import numpy as np
import p1_vae
import pytest
import torch
from conftest import ATTRIBUTES, ROOT, file_limit, refusal, write_rows
from PIL import Image

import datasets
from datasets import DigitImages, FaceImages, UserError, read_image, read_label_file

FAULTS = os.path.join(ROOT, '..', 'shared', 'faults')


# ------------------------------------------------------------------------------------ images in

def test_faces_come_sorted_whole_and_with_their_rows(data_dir):
    faces = FaceImages(data_dir, 'test')
    assert faces.names == [f'{index:05d}.png' for index in range(40, 52)]
    assert faces.images.shape == (12, 3, 64, 64) and faces.images.dtype == torch.uint8
    assert list(faces.attributes.columns) == ATTRIBUTES
    for name, image in zip(faces.names, faces.images):
        path = os.path.join(data_dir, 'face', 'test', name)
        assert (image.permute(1, 2, 0).numpy() == np.asarray(Image.open(path))).all()
    with open(os.path.join(data_dir, 'face', 'test.csv')) as file:
        rows = [line.strip().split(',') for line in file][1:]
    assert faces.attribute('Male').tolist() == [row[3] == '1.0' for row in rows]


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'I;16'])
def test_every_mode_and_size_is_converted(tmp_path, mode):
    """A flat image of value 200 stays one, whatever it is stored as."""
    path = str(tmp_path / ('image.jpg' if mode == 'CMYK' else 'image.png'))
    for size in ((64, 64), (1, 1), (100, 30)):
        if mode == 'I;16':
            image = Image.fromarray(np.full(size[::-1], 200 * 257, np.uint16))
        else:
            image = Image.new('RGB', size, (200, 200, 200)).convert('RGB' if mode == 'RGBA' else 'L')
            image = image.point(lambda value: 255) if mode == '1' else image
            image = image.convert(mode)
        image.save(path)
        pixels = read_image(path, 64)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - (255 if mode == '1' else 200)).max() <= 3


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
@pytest.mark.parametrize('ink,paper', [(0, 255), (90, 255), (255, 0)])
def test_transparency_lies_over_white_where_the_ink_is_dark(tmp_path, mode, ink, paper):
    """What a viewer shows on paper; a light ink keeps its black."""
    stroke = np.zeros((28, 28), np.uint8)
    stroke[4:24, 12:16] = 255
    image = Image.merge('LA', [Image.new('L', (28, 28), ink), Image.fromarray(stroke)]).convert(mode)
    image.save(str(tmp_path / 'x.png'))
    pixels = read_image(str(tmp_path / 'x.png'), 28)
    assert (pixels[14, 14] == ink).all() and (pixels[0, 0] == paper).all()
    Image.new('RGBA', (28, 28), (200, 100, 50, 0)).save(str(tmp_path / 'x.png'))      # no ink at all
    assert read_image(str(tmp_path / 'x.png'), 28).max() == 0


@pytest.mark.parametrize('turn', range(1, 9))
def test_image_is_turned_as_a_viewer_turns_it(tmp_path, turn):
    """What EXIF says was done to the picture is undone: the mark is in the upper left corner again."""
    upright = np.zeros((20, 20, 3), np.uint8)
    upright[:6, :10] = 255
    # how the stored picture is made from the upright one, by the meaning of EXIF's orientation
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[turn]
    exif = Image.Exif()
    exif[274] = turn
    path = str(tmp_path / 'x.png')
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert (read_image(path, None) == upright).all()


@pytest.mark.parametrize('kind,low,high,black,white', [
    (np.uint16, 0, 255, 0, 255), (np.uint16, 3, 200, 3, 200), (np.uint16, 0, 65535, 0, 255),
    (np.uint16, 257, 60000, 1, 233), (np.int32, 0, 200, 0, 200), (np.int32, -500, 70000, 0, 255),
    (np.float32, 0, 1, 0, 255), (np.float32, 0, 0.5, 0, 128), (np.float32, -1, 1, 0, 255)])
def test_values_of_another_range(tmp_path, kind, low, high, black, white):
    """16-bit, 32-bit and float images: 0..255 is kept, larger whole numbers are divided by 257."""
    values = np.full((28, 28), low, kind)
    values[4:24, 12:16] = high
    path = str(tmp_path / ('x.png' if kind == np.uint16 else 'x.tif'))
    Image.fromarray(values).save(path)
    pixels = read_image(path, 28)
    assert (pixels[0, 0] == black).all() and (pixels[14, 14] == white).all()


@pytest.mark.parametrize('value', [np.nan, 255])
def test_floats_of_no_known_range(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.float32)).save(str(tmp_path / 'x.tif'))
    with pytest.raises(UserError, match='x.tif cannot be read as an image.*not from 0 to 1'):
        read_image(str(tmp_path / 'x.tif'), 8)


# ----------------------------------------------------------------------------------- label files

PLAIN = 'image_name,label\n00000.png,6\n00001.png,5\n00002.png,4\n'
NAMES = ['00000.png', '00001.png', '00002.png']
READ = dict(
    plain=PLAIN, semicolons=PLAIN.replace(',', ';'), tabs=PLAIN.replace(',', '\t'), spaces=PLAIN.replace(',', ' , '),
    space_after_names=PLAIN.replace('.png', '.png '), space_at_the_end=PLAIN.replace('\n', ' \n'),
    separator_at_the_end=PLAIN.replace('\n', ',\n'), mark='\ufeff' + PLAIN, windows=PLAIN.replace('\n', '\r\n'),
    separator_at_the_end_of_rows=PLAIN.replace('6', '6,').replace('5\n', '5,,\n'), no_last_line_end=PLAIN[:-1],
    other_case=PLAIN.replace('image_name,label', 'Image_Name,LABEL'), empty_lines=PLAIN.replace('\n', '\n\n'),
    quoted=PLAIN.replace('00000.png', '"00000.png"'), another_column=PLAIN.replace('\n', ',x\n'),
    other_order='label,image_name\n4,00002.png\n6,00000.png\n5,00001.png\n', decimals=PLAIN.replace('6', '6.0'))


@pytest.fixture
def digits(tmp_path):
    """A data folder of three USPS digits, whose label file a test writes: a function of its bytes."""
    folder = tmp_path / 'digits' / 'usps' / 'train'
    folder.mkdir(parents=True)
    for name in NAMES:
        Image.new('L', (28, 28)).save(str(folder / name))

    def read(content):
        (tmp_path / 'digits' / 'usps' / 'train.csv').write_bytes(content)
        return DigitImages(str(tmp_path), 'usps', 'train')
    return read


@pytest.mark.parametrize('kind', sorted(READ))
def test_label_files_that_are_read(digits, kind):
    images = digits(READ[kind].encode('utf8'))
    assert images.names == NAMES and images.labels.tolist() == [6, 5, 4] and images.labels.dtype == torch.int64


@pytest.mark.skipif(not os.path.isdir(FAULTS), reason='the inputs that went wrong are not beside the repository')
@pytest.mark.parametrize('kind', ['semicolon', 'trailing_comma', 'trailing_space_name', 'header_case'])
def test_label_files_that_went_wrong(kind):
    path, names = os.path.join(FAULTS, f'csv_{kind}', 'train.csv'), [f'{index:05d}.png' for index in range(11)]
    table = read_label_file(path, names)
    assert list(table.index) == names and list(table.columns) == ['label']
    with open(path) as file:
        assert list(table['label']) == [line.strip(',; \n')[-1] for line in file][1:]


@pytest.mark.parametrize('content,cause', [
    (b'', "begins with ''"), (b'\n\n', "begins with ''"), (b'image_name,label\n', "has no row for '00000.png'"),
    (PLAIN[17:], "begins with '00000.png,6'"), (PLAIN.replace('image_name', 'file'), "begins with 'file,label'"),
    (PLAIN.replace(',', '|'), "begins with 'image_name|label'"), (PLAIN.replace('5', '5,1'), '3 values in line 3'),
    (PLAIN.replace(',5', ''), '1 values in line 3'), (PLAIN.replace('00001', '00000'), "names '00000.png' twice"),
    (PLAIN.replace('00001', '00009'), "names '00009.png' but its folder does not hold it"),
    (PLAIN.replace('00001.png,5\n', ''), "has no row for '00001.png'"), (PLAIN + ',3\n', "names ''"),
    (PLAIN.replace('label', 'digit'), 'has no column label, only image_name and digit'),
    (PLAIN.replace('5', 'five'), "says 'five' of 00001.png"), (PLAIN.replace('5', '5.5'), "says '5.5' of 00001.png"),
    (PLAIN.replace(',5', ','), "says '' of 00001.png"), (PLAIN.replace(',5', ',10'), "says '10' of 00001.png"),
    (PLAIN.replace('5', '-1'), "says '-1' of 00001.png"), (PLAIN.replace('5', 'nan'), "says 'nan' of 00001.png"),
    (PLAIN.encode('utf-16'), 'no CSV file in UTF-8'), (PLAIN.replace('5', '\u00e9').encode('latin1'), 'in UTF-8'),
    ('image_name,label,Label\n' + ''.join(f'{name},6,6\n' for name in NAMES), 'columns'),
    ('image_name,image_name,label\n' + ''.join(f'{name},{name},6\n' for name in NAMES), 'columns')])
def test_label_files_that_are_not_read(digits, content, cause):
    """One line that names the file and the cause."""
    with pytest.raises(UserError) as error:
        digits(content if isinstance(content, bytes) else content.encode('utf8'))
    assert 'train.csv' in str(error.value) and cause in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['#1.png', 'a, "b" c;.png', 'gr\u00fc\u00df \u4e09.png', "it's.png", 'sep=1.png'])
def test_names_of_any_letters(tmp_path, name):
    """write_table writes them so that read_label_file reads them."""
    path = str(tmp_path / 'train.csv')
    datasets.write_table(path, [('image_name', 'label'), (name, 3)])
    assert list(read_label_file(path, [name])['label']) == ['3']


def test_attributes(own_data_dir):
    """1 and 1.0 have it, 0 and CelebA's -1 do not; an unknown attribute and a word are refused."""
    names = [f'{index:05d}.png' for index in range(40, 52)]
    path = os.path.join(own_data_dir, 'face', 'test.csv')
    write_rows(path, ['image_name', 'Male', 'Smiling'],
               [[name, value, 'yes'] for name, value in zip(names, ['1', '1.0', '0', '0.0', '-1', '1'] * 2)])
    faces = FaceImages(own_data_dir, 'test')
    assert faces.attribute('Male').tolist() == [True, True, False, False, False, True] * 2
    with pytest.raises(UserError, match='test.csv has no attribute Beard: choose one of Male, Smiling'):
        faces.attribute('Beard')
    with pytest.raises(UserError, match="test.csv says 'yes' of 00040.png in column Smiling"):
        faces.attribute('Smiling')


def test_attribute_that_every_face_has_colours_nothing(own_data_dir, tmp_path, capsys):
    path = os.path.join(own_data_dir, 'face', 'test')
    write_rows(path + '.csv', ['image_name', 'Male'], [[name, 1.0] for name in sorted(os.listdir(path))])
    code, line = refusal(capsys, p1_vae, '--plot', '--data_dir', own_data_dir, '--out', tmp_path / 'figures')
    assert code == 1 and 'faces with and without some attribute' in line
    assert not (tmp_path / 'figures').exists()


# ----------------------------------------------------------------------------------- wrong folders

@pytest.mark.parametrize('spoil,words', [
    (lambda face: os.rename(face + '/train', face + '/elsewhere'), ['there is no folder', 'train', '--data_dir']),
    (lambda face: [os.rename(face + '/train', face + '/x'), os.mkdir(face + '/train')], ['train holds no image']),
    (lambda face: os.remove(face + '/train.csv'), ['there is no', 'train.csv']),
    (lambda face: os.remove(face + '/train/00007.png'), ['train.csv', '00007.png', 'add the image']),
    (lambda face: Image.new('L', (8, 8)).save(face + '/train/x.jpg'), ['train.csv', 'x.jpg', 'add the row']),
    (lambda face: os.truncate(face + '/train/00005.png', 300), ['00005.png', 'cannot be read as an image']),
    (lambda face: os.symlink('/nowhere.png', face + '/train/x.png') or write_rows(
        face + '/train.csv', ['image_name'], [[name] for name in os.listdir(face + '/train')]), ['x.png', 'No such'])])
def test_wrong_data(own_data_dir, tmp_path, capsys, spoil, words):
    """A student's mistakes, with the command that meets them: one line, and nothing is begun."""
    spoil(os.path.join(own_data_dir, 'face'))
    code, line = refusal(capsys, p1_vae, '--train', '--steps', 1, '--data_dir', own_data_dir,
                         '--ckpt', tmp_path / 'run' / 'p1_vae.pth')
    assert code == 1 and all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


def test_held_out_part_is_fixed_and_apart():
    training, held_out = datasets.split_held_out(9000)
    assert len(training) == 8500 and len(held_out) == 500
    assert sorted(torch.cat([training, held_out]).tolist()) == list(range(9000))
    assert (datasets.split_held_out(9000)[1] == held_out).all()
    assert held_out[:3].tolist() == [1, 16, 28]          # the shipped model was chosen on these
    assert [len(part) for part in datasets.split_held_out(2)] == [1, 1]


def test_ranges_and_flips():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    x = datasets.to_float(images)
    assert x.dtype == torch.float32 and torch.equal(datasets.to_uint8(x), images) and x.max() <= 1
    assert datasets.to_uint8(torch.tensor([-0.2, 0.0019, 0.0021, 1.2])).tolist() == [0, 0, 1, 255]
    assert datasets.to_unit(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 0.5, 1]
    flipped = datasets.random_flip(x, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(2)) for after, before in zip(flipped, x)]
    assert 16 < sum(mirrored) < 48
    assert all(mirror or torch.equal(after, before) for mirror, after, before in zip(mirrored, flipped, x))


# ------------------------------------------------------------------------- pictures and files out

def test_grid_places_every_image():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    grid = datasets.make_grid(images[:5], columns=3)
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3) and grid.dtype == np.uint8
    assert [grid[2 + 6 * row, 2 + 7 * column, 0] for row in (0, 1) for column in (0, 1, 2)] == [0, 1, 2, 3, 4, 255]
    full = datasets.make_grid(images, columns=3)
    assert [full[2 + 6 * row, 2 + 7 * column, 0] for row in (0, 1) for column in (0, 1, 2)] == [0, 1, 2, 3, 4, 5]
    assert (grid[:2] == 255).all() and (grid[:, :2] == 255).all() and (grid[6:8] == 255).all()


def test_output_is_whole_or_untouched(tmp_path):
    """The parent is made, a link stays one, and a write that fails in its midst leaves what was there."""
    path = tmp_path / 'new' / 'deep' / 'x.txt'
    datasets.write_text(str(path), 'old\n')
    os.symlink(str(path), str(tmp_path / 'link.txt'))
    datasets.write_text(str(tmp_path / 'link.txt'), 'gr\u00fcn\n')
    assert path.read_bytes() == 'gr\u00fcn\n'.encode('utf8') and (tmp_path / 'link.txt').is_symlink()
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, 3, 200, 200)).astype(np.uint8))
    for write in (lambda: datasets.write_text(str(path), 'x' * 30000),
                  lambda: datasets.save_picture(str(path.parent / 'x.png'), images, 1),
                  lambda: datasets.save_single_images(str(path.parent / 'faces'), images)):
        with file_limit(20000), pytest.raises(UserError, match='cannot write .*deep/.*choose a place'):
            write()
    assert os.listdir(str(path.parent)) == ['x.txt'] and path.read_bytes() == 'gr\u00fcn\n'.encode('utf8')
