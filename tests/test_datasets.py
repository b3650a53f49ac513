"""Reading the assignment's folders: order, modes, sizes, CSV files, and what can be wrong with them."""
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ATTRIBUTES, ROOT, assert_one_line, run, write_rows
from PIL import Image

from datasets import (DigitImages, FaceImages, UserError, list_images, make_grid, random_flip, read_csv, read_image,
                      split_held_out, to_float)


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


def test_order_of_rows_does_not_matter(own_data_dir):
    before = FaceImages(own_data_dir, 'test').attributes
    path = os.path.join(own_data_dir, 'face', 'test.csv')
    with open(path) as file:
        lines = file.readlines()
    with open(path, 'w') as file:
        file.writelines(lines[:1] + lines[:0:-1])
    assert FaceImages(own_data_dir, 'test').attributes.equals(before)


def test_other_files_are_no_images(own_data_dir):
    folder = os.path.join(own_data_dir, 'face', 'test')
    for name in ('.DS_Store', '.hidden.png', 'Thumbs.db', 'notes.csv'):
        with open(os.path.join(folder, name), 'w') as file:
            file.write('no image')
    os.mkdir(os.path.join(folder, 'folder.png'))
    assert len(FaceImages(own_data_dir, 'test').names) == 12


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'I;16'])
@pytest.mark.parametrize('size', [(64, 64), (1, 1), (100, 30)])
def test_every_mode_and_size_is_converted(tmp_path, mode, size):
    """A flat image of value 200 stays one, whatever it is stored as."""
    if mode == 'I;16':
        image = Image.fromarray(np.full(size[::-1], 200 * 257, np.uint16))
    else:
        image = Image.new('RGB', size, (200, 200, 200)).convert('RGB' if mode == 'RGBA' else 'L')
        image = image.point(lambda value: 255) if mode == '1' else image
        image = image.convert(mode)
    path = str(tmp_path / ('image.jpg' if mode == 'CMYK' else 'image.png'))
    image.save(path)
    pixels = read_image(path, 64)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    expected = 255 if mode == '1' else 200
    assert np.abs(pixels.astype(int) - expected).max() <= 3


def test_transparent_pixels_lie_over_black(tmp_path):
    Image.new('RGBA', (64, 64), (200, 100, 50, 0)).save(str(tmp_path / 'x.png'))
    assert read_image(str(tmp_path / 'x.png'), 64).max() == 0


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
@pytest.mark.parametrize('ink', [0, 90, 255])
def test_dark_ink_on_transparency_lies_over_white(tmp_path, mode, ink):
    """What a viewer shows on paper; a light ink keeps its black."""
    stroke = np.zeros((28, 28), np.uint8)
    stroke[4:24, 12:16] = 255
    image = Image.merge('LA', [Image.new('L', (28, 28), ink), Image.fromarray(stroke)]).convert(mode)
    image.save(str(tmp_path / 'x.png'))
    pixels = read_image(str(tmp_path / 'x.png'), 28)
    assert (pixels[14, 14] == ink).all() and (pixels[0, 0] == (0 if ink == 255 else 255)).all()


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


def test_damaged_exif_data_does_not_matter(tmp_path):
    Image.new('RGB', (20, 20), (9, 9, 9)).save(str(tmp_path / 'x.jpg'), exif=b'Exif\0\0MM\0*\0\0\xff\xff')
    assert read_image(str(tmp_path / 'x.jpg'), None).max() < 20


@pytest.mark.parametrize('kind,low,high,black,white', [
    (np.uint16, 0, 255, 0, 255), (np.uint16, 0, 1, 0, 255), (np.uint16, 0, 4095, 0, 255), (np.uint16, 0, 1023, 0, 255),
    (np.uint16, 0, 65535, 0, 255), (np.uint16, 0, 30000, 0, 117), (np.int32, 0, 200, 0, 200),
    (np.int32, -500, 70000, 0, 255), (np.float32, 0, 1, 0, 255), (np.float32, 0, 0.5, 0, 128),
    (np.float32, -1, 1, 0, 255), (np.float32, 0, 255, 0, 255), (np.float32, -0.02, 1.02, 0, 255)])
def test_values_of_another_range(tmp_path, kind, low, high, black, white):
    """16-bit, 32-bit and float images: what holds all values decides what white is."""
    values = np.full((28, 28), low, kind)
    values[4:24, 12:16] = high
    path = str(tmp_path / ('x.png' if kind == np.uint16 else 'x.tif'))
    Image.fromarray(values).save(path)
    os.rename(path, str(tmp_path / 'y.png'))
    pixels = read_image(str(tmp_path / 'y.png'), 28)
    assert (pixels[0, 0] == black).all() and (pixels[14, 14] == white).all()


def test_values_that_are_not_finite(tmp_path):
    values = np.zeros((8, 8), np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(str(tmp_path / 'x.tif'))
    with pytest.raises(UserError, match='x.tif.*not finite'):
        read_image(str(tmp_path / 'x.tif'), 8)


def test_held_out_part_is_fixed_and_apart():
    training, held_out = split_held_out(9000)
    assert len(training) == 8500 and len(held_out) == 500
    assert sorted(torch.cat([training, held_out]).tolist()) == list(range(9000))
    assert (split_held_out(9000)[1] == held_out).all()
    assert held_out[:3].tolist() == [1, 16, 28]          # the shipped model was chosen on these
    assert [len(part) for part in split_held_out(2)] == [1, 1]


def test_flip_and_range():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    x = to_float(images)
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert torch.equal((x * 255).round().to(torch.uint8), images)
    flipped = random_flip(x, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(one, other.flip(2)) for one, other in zip(flipped, x)]
    assert 16 < sum(mirrored) < 48
    assert all(mirror or torch.equal(one, other)
               for mirror, one, other in zip(mirrored, flipped, x))
    assert torch.equal(flipped, random_flip(x, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('torchvision', ['as it is', 'missing', 'of another torch'])
def test_grid_places_every_image(monkeypatch, torchvision):
    """With torchvision, and where it cannot be imported."""
    class Broken(object):
        def find_spec(self, name, path, target=None):
            if name.startswith('torchvision'):
                raise (ImportError if torchvision == 'missing' else RuntimeError)('operator torchvision::nms')
    if torchvision != 'as it is':
        for name in list(sys.modules):
            if name.startswith('torchvision'):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, 'meta_path', [Broken()] + sys.meta_path)
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5)
    grid = make_grid(images[:5], columns=3)
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3) and grid[2 + 6, 2 + 14].tolist() == [255, 255, 255]
    grid = make_grid(images, columns=3)
    assert grid.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    assert grid[2 + 6, 2 + 7].tolist() == [4, 4, 4] and grid[0].min() == 255


# a student's mistakes, each through the real command line -----------------------------------------

def drop_folder(face):
    os.rename(os.path.join(face, 'train'), os.path.join(face, 'elsewhere'))


def empty_folder(face):
    drop_folder(face)
    os.mkdir(os.path.join(face, 'train'))


def drop_csv(face):
    os.remove(os.path.join(face, 'train.csv'))


def empty_csv(face):
    open(os.path.join(face, 'train.csv'), 'w').close()


def header_only(face):
    write_rows(os.path.join(face, 'train.csv'), ['image_name'] + ATTRIBUTES, [])


def row_without_image(face):
    os.remove(os.path.join(face, 'train', '00007.png'))


def image_without_row(face):
    draw = Image.new('RGB', (64, 64))
    draw.save(os.path.join(face, 'train', '99999.png'))


def row_twice(face):
    with open(os.path.join(face, 'train.csv'), 'a') as file:
        file.write('00003.png,0,0,0,0\n')


def truncate_image(face):
    path = os.path.join(face, 'train', '00005.png')
    with open(path, 'rb') as file:
        start = file.read(300)
    with open(path, 'wb') as file:
        file.write(start)


def no_image_at_all(face):
    with open(os.path.join(face, 'train', '00005.png'), 'w') as file:
        file.write('<html>')


def row_without_name(face):
    with open(os.path.join(face, 'train.csv'), 'a') as file:
        file.write(',0,0,0,0\n')


def one_image(face):
    names = sorted(os.listdir(os.path.join(face, 'train')))
    for name in names[1:]:
        os.remove(os.path.join(face, 'train', name))
    write_rows(os.path.join(face, 'train.csv'), ['image_name'] + ATTRIBUTES, [[names[0], 0, 0, 0, 0]])


@pytest.mark.parametrize('spoil,words', [
    (drop_folder, ['there is no folder', 'train', '--data_dir']),
    (empty_folder, ['train', 'holds no image']),
    (drop_csv, ['there is no', 'train.csv']),
    (empty_csv, ['train.csv', 'is empty', 'replace it']),
    (header_only, ['train.csv', 'no rows']),
    (row_without_image, ['train.csv', '00007.png', 'add the image']),
    (image_without_row, ['train.csv', '99999.png', 'add the row']),
    (row_without_name, ['train.csv', 'without an image_name']),
    (one_image, ['two images or more']),
    (row_twice, ['train.csv', '00003.png', 'twice']),
    (truncate_image, ['00005.png', 'cannot be read']),
    (no_image_at_all, ['00005.png', 'cannot be read'])])
def test_wrong_data(own_data_dir, tmp_path, spoil, words):
    spoil(os.path.join(own_data_dir, 'face'))
    result = run(['python3', os.path.join(ROOT, 'p1_vae.py'), '--train', '--steps', '1',
                  '--data_dir', own_data_dir, '--ckpt', tmp_path / 'run' / 'p1_vae.pth'])
    assert_one_line(result, *words)
    assert not (tmp_path / 'run').exists()


# label files as spreadsheets and scripts write them ---------------------------------------------------

PLAIN = 'image_name,label\n00000.png,6\n00001.png,5\n00002.png,4\n'
NAMES = ['00000.png', '00001.png', '00002.png']
READ = dict(
    plain=PLAIN, comma_at_the_end=PLAIN.replace('\n', ',\n'), commas_at_the_end_of_rows=PLAIN.replace('png,', 'png,,')
    .replace(',,', ',').replace('6\n', '6,,\n').replace('5\n', '5,\n'), semicolons=PLAIN.replace(',', ';'),
    tabs=PLAIN.replace(',', '\t'), spaces=PLAIN.replace(',', ' , '), space_after_names=PLAIN.replace('.png', '.png '),
    other_case=PLAIN.replace('image_name,label', 'Image_Name,LABEL'), spaces_in_header=PLAIN.replace('e,l', 'e , l'),
    sep_line='sep=;\n' + PLAIN.replace(',', ';'), comment='# of the course\n\n' + PLAIN, mark='\ufeff' + PLAIN,
    windows=PLAIN.replace('\n', '\r\n'), old_mac=PLAIN.replace('\n', '\r'), empty_lines=PLAIN.replace('\n', '\n\n'),
    without_ending=PLAIN.replace('.png', ''), folder=PLAIN.replace('0000', 'train/0000'),
    windows_folder=PLAIN.replace('0000', 'digits\\\\train\\\\0000'), quoted=PLAIN.replace('00000.png', '"00000.png"'),
    index=''.join(f'{index},{line}\n' for index, line in enumerate(PLAIN.split('\n')[:-1])),
    quoted_with_spaces=PLAIN.replace(',', ', ').replace('label', '"label"'),
    header_twice=PLAIN + PLAIN.split('\n')[0], empty_rows=PLAIN + ',\n,\n', quoted_sep='"sep=,"\n' + PLAIN,
    no_last_line_end=PLAIN[:-1], another_column=PLAIN.replace('\n', ',x\n'), decimals=PLAIN.replace('6', '6.0'))


@pytest.mark.parametrize('kind', sorted(READ))
def test_label_files_that_are_read(tmp_path, kind):
    path = tmp_path / 'train.csv'
    path.write_bytes(READ[kind].encode('utf8'))
    table = read_csv(str(path), NAMES)
    assert list(table.index) == NAMES and [float(label) for label in table['label']] == [6, 5, 4]


def test_label_file_in_utf_16(tmp_path):
    (tmp_path / 'train.csv').write_bytes(PLAIN.replace(',', '\t').encode('utf-16'))
    assert list(read_csv(str(tmp_path / 'train.csv'), NAMES)['label']) == ['6', '5', '4']


@pytest.mark.parametrize('text,words', [
    (PLAIN.replace('image_name', 'file'), ["begins with 'file,label'", 'image_name,... is expected']),
    ('00000.png,6\n00001.png,5\n', ["begins with '00000.png,6'", 'a header image_name,... is expected']),
    (PLAIN.replace('5', '5,1'), ['3 values in line 3 and 2 columns']),
    (PLAIN.replace(',5', ''), ['1 values in line 3']), ('\n\n', ['is empty']),
    (PLAIN.replace(',', '|'), ["begins with 'image_name|label'"]), (PLAIN.replace('00001', '00009'), ['00009.png']),
    (PLAIN.replace('00001.png', 'train/00000.png'), ['names 00000.png twice']), ('PK\3\4\0\0', ['no text file']),
    (PLAIN.replace('label', 'digit'), ['no column label, only image_name and digit']),
    (PLAIN.replace('5', 'five'), ["says 'five' of 00001.png in column label"]),
    (PLAIN.replace('5', '5.5'), ["says '5.5'"]), (PLAIN.replace('5', ''), ["says '' of 00001.png"])])
def test_label_files_that_are_not_read(tmp_path, text, words):
    """One line that says what was found and what is expected."""
    folder = tmp_path / 'digits' / 'usps' / 'train'
    folder.mkdir(parents=True)
    for name in NAMES:
        Image.new('L', (28, 28)).save(str(folder / name))
    (tmp_path / 'digits' / 'usps' / 'train.csv').write_text(text)
    with pytest.raises(UserError) as error:
        DigitImages(str(tmp_path), 'usps', 'train')
    assert 'train.csv' in str(error.value) and '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_names_that_look_like_other_lines_and_composed_accents(tmp_path):
    """An image called #1.png; a name whose accent macOS stores as a letter of its own."""
    names = ['#1.png', 'e\u0301.png', 'sep=1.png']
    (tmp_path / 'train.csv').write_bytes('image_name,label\n#1.png,1\nsep=1.png,2\n\u00e9.png,3\n'.encode('utf8'))
    if os.fsdecode('\u00e9'.encode('utf8')) == '\u00e9':
        assert list(read_csv(str(tmp_path / 'train.csv'), names)['label']) == ['1', '3', '2']


@pytest.mark.parametrize('header', ['image_name,label,Label', 'image_name,image_name,label'])
def test_two_columns_of_one_name(tmp_path, header):
    (tmp_path / 'train.csv').write_text(header + '\n00000.png,1,1\n')
    with pytest.raises(UserError, match='has two columns'):
        read_csv(str(tmp_path / 'train.csv'), ['00000.png'])


def test_name_without_ending_of_two_images(tmp_path):
    """Neither is meant more than the other."""
    (tmp_path / 'train.csv').write_text('image_name,label\na,1\nb.png,2\n')
    with pytest.raises(UserError, match='names a but its folder does not hold it'):
        read_csv(str(tmp_path / 'train.csv'), ['a.jpg', 'a.png', 'b.png'])


def test_attribute_in_another_case(own_data_dir):
    faces = FaceImages(own_data_dir, 'test')
    assert (faces.attribute('male') == faces.attribute('Male')).all()


@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_names_beyond_ascii(own_data_dir, tmp_path, locale):
    """A data folder and images with other letters, whatever the locale."""
    data = str(tmp_path / 'zw\u00f6lf \u5341\u4e8c')
    os.rename(own_data_dir, data)
    folder = os.path.join(data, 'digits', 'usps', 'train')
    os.rename(os.path.join(folder, '00003.png'), os.path.join(folder, 'drei \u4e09.png'))
    with open(folder + '.csv', encoding='utf8') as file:
        text = file.read()
    with open(folder + '.csv', 'w', encoding='utf8') as file:
        file.write(text.replace('00003.png', 'drei \u4e09.png'))
    result = run(['python3', os.path.join(ROOT, 'p3_dann.py'), '--train', '--target', 'mnistm', '--steps', '1',
                  '--data_dir', data, '--ckpt', tmp_path / 'run.pth'], LC_ALL=locale)
    assert result.returncode == 0, result.stderr


def test_pipe_among_the_images(own_data_dir):
    """Reading it would wait for ever."""
    folder = os.path.join(own_data_dir, 'face', 'train')
    os.mkfifo(os.path.join(folder, 'x.png'))
    with pytest.raises(UserError, match='x.png is a pipe or a device'):
        list_images(folder)


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'nonsense', 'TkAgg', ''])
def test_figures_whatever_the_backend(tmp_path, backend):
    code = ('import datasets; figure, axes = datasets.new_figure(2); axes.plot([0, 1]); '
            'datasets.save_figure("x.png", figure)')
    result = run(['python3', '-c', f'import sys; sys.path.insert(0, {ROOT!r}); {code}'], cwd=tmp_path,
                 MPLBACKEND=backend)
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert (tmp_path / 'x.png').exists()


def test_unknown_attribute(own_data_dir, tmp_path):
    result = run(['python3', os.path.join(ROOT, 'p1_vae.py'), '--plot', '--data_dir', own_data_dir,
                  '--out', tmp_path / 'figures', '--attribute', 'Beard'])
    assert_one_line(result, 'Beard', 'Male')
    assert not (tmp_path / 'figures').exists()


@pytest.mark.parametrize('value,words', [('yes', ['00040.png', 'Male']), ('1.0', ['without some attribute'])])
def test_attribute_that_colours_nothing(own_data_dir, tmp_path, value, words):
    """A word where a number belongs, and an attribute that every face has."""
    path = os.path.join(own_data_dir, 'face', 'test.csv')
    names = sorted(os.listdir(os.path.join(own_data_dir, 'face', 'test')))
    write_rows(path, ['image_name', 'Male'], [[name, value] for name in names])
    result = run(['python3', os.path.join(ROOT, 'p1_vae.py'), '--plot', '--data_dir', own_data_dir,
                  '--out', tmp_path / 'figures'])
    assert_one_line(result, *words)
    assert not (tmp_path / 'figures').exists()


def test_error_is_a_user_error(tmp_path):
    with pytest.raises(UserError):
        FaceImages(str(tmp_path), 'train')
