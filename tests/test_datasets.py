"""Reading the assignment's folders: order, modes, sizes, CSV files, and what can be wrong with them."""
import os

import numpy as np
import pytest
import torch
from conftest import ATTRIBUTES, ROOT, assert_one_line, run, write_rows
from PIL import Image

from datasets import (FaceImages, UserError, make_grid, random_flip, read_image, split_held_out,
                      to_float)


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


def test_held_out_part_is_fixed_and_apart():
    training, held_out = split_held_out(9000)
    assert len(training) == 8500 and len(held_out) == 500
    assert sorted(np.concatenate([training, held_out])) == list(range(9000))
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


def test_grid_places_every_image():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 5)
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
    (empty_csv, ['train.csv', 'replace it']),
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


def test_unknown_attribute(own_data_dir, tmp_path):
    result = run(['python3', os.path.join(ROOT, 'p1_vae.py'), '--plot', '--data_dir', own_data_dir,
                  '--out', tmp_path / 'figures', '--attribute', 'Beard'])
    assert_one_line(result, 'Beard', 'Male')
    assert not (tmp_path / 'figures').exists()


@pytest.mark.parametrize('value,words', [('yes', ['00040.png', 'Male']), ('1.0', ['--attribute'])])
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
