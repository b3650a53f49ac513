"""bash hw3_p3.sh and hw3_p4.sh FOLDER TARGET OUT.csv, as the grader calls them."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, refusals, run
from PIL import Image

DIGITS = os.path.join(ROOT, 'tests', 'digits')
TARGETS = ('mnistm', 'svhn', 'usps')


class Script(object):
    """The script of a problem that labels digits, its program and checkpoints."""

    def __init__(self, problem):
        self.problem, self.name = problem, f'hw3_{problem[:2]}.sh'
        self.path = os.path.join(ROOT, self.name)
        self.program = os.path.join(ROOT, problem + '.py')

    def checkpoint(self, target):
        return os.path.join(ROOT, 'checkpoints', f'{self.problem}_{target}.pth')

    def label(self, folder, out, target='mnistm', **options):
        """Label a folder; return the rows below the header."""
        result = run(['bash', self.path, folder, target, out], **options)
        assert result.returncode == 0, result.stderr
        self.stdout = result.stdout
        return read(os.path.join(str(options.get('cwd', '')), str(out)))


def read(path):
    with open(path, newline='', encoding='utf8', errors='surrogateescape') as file:
        lines = list(csv.reader(file))
    assert lines[0] == ['image_name', 'label']
    assert all(label in '0123456789' and len(label) == 1 for _, label in lines[1:])
    return lines[1:]


@pytest.fixture(params=['p3_dann', 'p4_adda'])
def script(request):
    return Script(request.param)


@pytest.fixture
def one_script():
    """Of what models.label_folder does for both, one is enough."""
    return Script('p3_dann')


@pytest.mark.parametrize('target', TARGETS)
def test_reads_the_digits_of_the_repository(script, tmp_path, target):
    """Drawn by us; what the course's scoring rule says of the file."""
    rows = script.label(DIGITS, tmp_path / 'pred.csv', target)
    assert [name for name, _ in rows] == [f'{index:05d}.png' for index in range(12)]
    with open(DIGITS + '.csv', newline='') as file:
        truth = dict(list(csv.reader(file))[1:])
    correct = sum(truth[name] == label for name, label in rows)       # compared as text
    assert correct >= 8


@pytest.mark.parametrize('out', ['bare.csv', 'new folder/deep/er/pred.csv', './x.txt', '-dash.csv',
                                 'ünïcode.csv'])
def test_output_paths(script, tmp_path, out):
    rows = script.label(DIGITS + '/', out, cwd=tmp_path)
    assert len(rows) == 12
    assert not [name for name in os.listdir(os.path.dirname(str(tmp_path / out)))
                if name.startswith('.')]


def test_every_image_gets_a_row_and_nothing_else_does(script, tmp_path):
    """Endings in any case, any mode and size, odd names; other files and folders are counted."""
    folder = tmp_path / 'ein Örtchen'
    folder.mkdir()
    images = {'a.PNG': ('L', (16, 16)), 'b.jpg': ('RGB', (32, 32)), 'c.JPEG': ('L', (28, 28)),
              'd.bmp': ('P', (28, 28)), 'e.png': ('1', (1, 1)), 'f.png': ('RGBA', (40, 20)),
              'g.png': ('LA', (28, 28)), 'h.png': ('I;16', (28, 28)), 'ö, "x" y.png': ('RGB', (28, 28)),
              'k.jpeg': ('CMYK', (28, 28)), 'two.dots.png': ('RGB', (300, 300))}
    rng = np.random.RandomState(0)
    for name, (mode, size) in images.items():
        if mode == 'I;16':
            image = Image.fromarray(rng.randint(0, 65535, size[::-1]).astype(np.uint16))
        else:
            image = Image.fromarray(rng.randint(0, 256, size[::-1] + (3,)).astype(np.uint8)).convert(mode)
        image.save(str(folder / name))
    for name in ('.DS_Store', 'notes.txt', 'labels.csv', '._a.PNG', 'image.gif'):
        (folder / name).write_text('no image')
    (folder / 'folder.png').mkdir()
    rows = script.label(folder, tmp_path / 'pred.csv')
    assert [name for name, _ in rows] == sorted(images)
    assert '6 other files or folders' in script.stdout and '11 images' in script.stdout


def test_name_that_is_no_text(one_script, tmp_path):
    """A file name whose bytes are no UTF-8 comes out as it went in."""
    folder = tmp_path / 'images'
    folder.mkdir()
    name = b'caf\xe9.png'
    shutil.copy(os.path.join(DIGITS, '00003.png'), os.path.join(os.fsencode(str(folder)), name))
    one_script.label(folder, tmp_path / 'pred.csv')
    assert (tmp_path / 'pred.csv').read_bytes().split(b'\n')[1].split(b',')[0] == name


@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_locale(script, tmp_path, locale):
    shutil.copytree(DIGITS, str(tmp_path / 'zwölf'))
    assert len(script.label(tmp_path / 'zwölf', tmp_path / 'öut.csv', LC_ALL=locale)) == 12


def test_prediction_depends_on_no_other_image(script, tmp_path):
    """One image alone, all together, in batches of any size: the same labels."""
    rows = script.label(DIGITS, tmp_path / 'all.csv')
    alone = tmp_path / 'alone'
    for name, label in rows[:3]:
        shutil.rmtree(str(alone), ignore_errors=True)
        alone.mkdir()
        shutil.copy(os.path.join(DIGITS, name), str(alone))
        assert script.label(alone, tmp_path / 'alone.csv') == [[name, label]]
    for size in ('1', '5', '1000'):
        result = run(['python3', script.program, '--images', DIGITS, '--target', 'mnistm', '--out',
                      tmp_path / 'again.csv', '--batch_size', size], OMP_NUM_THREADS=size[0])
        assert result.returncode == 0, result.stderr
        assert (tmp_path / 'again.csv').read_bytes() == (tmp_path / 'all.csv').read_bytes()


def test_more_than_one_chunk_of_images(one_script, tmp_path):
    """2,100 links to the same images: rows in the order of the names, labels as ever."""
    expected = dict(one_script.label(DIGITS, tmp_path / 'pred.csv'))
    folder = tmp_path / 'many'
    folder.mkdir()
    for index in range(2100):
        os.symlink(os.path.join(DIGITS, f'{index % 12:05d}.png'), str(folder / f'{index:05d}.png'))
    rows = one_script.label(folder, tmp_path / 'many.csv')
    assert [name for name, _ in rows] == [f'{index:05d}.png' for index in range(2100)]
    assert all(label == expected[f'{index % 12:05d}.png'] for index, (_, label) in enumerate(rows))


def test_file_that_is_no_image_stops_it(script, tmp_path):
    """Its name and the reason on stderr, and no file at OUT, not even a part of one."""
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    with open(os.path.join(DIGITS, '00005.png'), 'rb') as file:
        start = file.read(200)
    for content in (b'', b'no image', start):
        (tmp_path / 'digits' / '00005.png').write_bytes(content)
        result = run(['bash', script.path, tmp_path / 'digits', 'usps', tmp_path / 'pred.csv'])
        assert_one_line(result, '00005.png', 'cannot be read as an image')
        assert os.listdir(str(tmp_path)) == ['digits']


FAULTS = os.path.join(ROOT, '..', 'shared', 'faults')


@pytest.mark.skipif(not os.path.isdir(FAULTS), reason='the inputs that went wrong are not beside the repository')
@pytest.mark.parametrize('kind', ['black_ink_on_transparent', 'png16_holding_8bit'])
def test_inputs_that_went_wrong(one_script, tmp_path, kind):
    """Every digit was labelled 1; now as the picture on white paper, or that of 8 bits, is."""
    folder = os.path.join(FAULTS, kind)
    (tmp_path / 'plain').mkdir()
    for name in os.listdir(folder):
        with Image.open(os.path.join(folder, name)) as image:
            if image.mode == 'RGBA':
                plain = Image.new('RGBA', image.size, 'white')
                plain.alpha_composite(image)
            else:
                plain = Image.fromarray(np.asarray(image).astype(np.uint8))
            plain.convert('RGB').save(str(tmp_path / 'plain' / name))
    rows = one_script.label(folder, tmp_path / 'pred.csv')
    assert rows == one_script.label(tmp_path / 'plain', tmp_path / 'plain.csv')
    assert len({label for _, label in rows}) > 1


@pytest.mark.parametrize('how', ['turned', 'dark ink', '16 bits holding 8', '16 bits', 'float'])
def test_same_digits_stored_otherwise(one_script, tmp_path, how):
    """What a viewer shows alike is labelled alike."""
    (tmp_path / 'other').mkdir()
    for name in sorted(os.listdir(DIGITS)):
        with Image.open(os.path.join(DIGITS, name)) as image:
            grey, options, path = image.convert('L'), {}, str(tmp_path / 'other' / name)
        if how == 'turned':
            options['exif'] = Image.Exif()
            options['exif'][274] = 6
            stored = grey.transpose(Image.ROTATE_90)
        elif how == 'dark ink':
            stored = Image.merge('LA', [Image.new('L', grey.size), grey.point(lambda value: 255 - value)])
        else:
            values = np.asarray(grey)
            stored = Image.fromarray({
                '16 bits': values.astype(np.uint16) * 257, '16 bits holding 8': values.astype(np.uint16),
                'float': values.astype(np.float32) / 255}[how])
            path = path.replace('.png', '.tif') if how == 'float' else path
        stored.save(path, **options)
        os.rename(path, path.replace('.tif', '.png'))
    (tmp_path / 'grey').mkdir()
    for name in os.listdir(DIGITS):
        with Image.open(os.path.join(DIGITS, name)) as image:
            image.convert('L').save(str(tmp_path / 'grey' / name))
    labels = one_script.label(tmp_path / 'other', tmp_path / 'a.csv')
    assert labels == one_script.label(tmp_path / 'grey', tmp_path / 'b.csv')


def test_pictures_of_a_single_colour_are_named(one_script, tmp_path):
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    for name in ('00004.png', '00007.png'):
        Image.new('RGB', (28, 28), (0, 0, 200)).save(str(tmp_path / 'digits' / name))
    result = run(['bash', one_script.path, tmp_path / 'digits', 'usps', tmp_path / 'pred.csv'])
    assert result.returncode == 0 and len(read(str(tmp_path / 'pred.csv'))) == 12
    assert_one_line(result, '00004.png has a single colour', '2 such of 12', code=0)


def test_pipe_among_the_images(one_script, tmp_path):
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    os.mkfifo(str(tmp_path / 'digits' / 'x.png'))
    result = run(['bash', one_script.path, tmp_path / 'digits', 'usps', tmp_path / 'pred.csv'], timeout=60)
    assert_one_line(result, 'x.png is a pipe or a device')
    assert os.listdir(str(tmp_path)) == ['digits']


def test_output_into_a_pipe(one_script, tmp_path):
    result = run(['bash', '-c', f'bash "{one_script.path}" "{DIGITS}" usps /dev/stdout | cat; exit ${{PIPESTATUS[0]}}'])
    assert_one_line(result, '/dev/stdout is a device or a pipe')
    assert result.stdout == ''


def many(folder, count, **others):
    """Links to the digits of the repository, and beside them files of one content each."""
    folder.mkdir()
    for index in range(count):
        os.symlink(os.path.join(DIGITS, f'{index % 12:05d}.png'), str(folder / f'{index:05d}.png'))
    for name, content in others.items():
        (folder / f'{name}.png').write_bytes(content)
    return folder


def processes_of(group):
    """The processes of a process group that are still there, zombies too."""
    return [line for line in run(['ps', '-e', '-o', 'pgid=,stat=,args=']).stdout.split('\n')
            if line.split()[:1] == [str(group)]]


def test_broken_image_ends_all_processes(one_script, tmp_path):
    folder = many(tmp_path / 'many', 2000, x=b'no image')
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    process = subprocess.Popen(['bash', one_script.path, str(folder), 'usps', str(tmp_path / 'pred.csv')],
                               env=dict(os.environ, PATH=path),
                               stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and 'x.png cannot be read as an image' in stderr and stderr.count('\n') == 1
    assert processes_of(process.pid) == [] and os.listdir(str(tmp_path)) == ['many']


def test_keyboard_ends_all_processes_in_one_line(one_script, tmp_path):
    """Ctrl-C reaches every process of the group, as from a terminal."""
    folder = many(tmp_path / 'many', 60000)
    process = subprocess.Popen([sys.executable, one_script.program, '--images', str(folder), '--target', 'usps',
                                '--out', str(tmp_path / 'pred.csv')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, start_new_session=True)
    assert 'of 60,000 images' in process.stdout.readline()         # it labels
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and stderr == one_script.problem + '.py: stopped by the keyboard\n'
    assert processes_of(process.pid) == [] and os.listdir(str(tmp_path)) == ['many']


def test_killed_process_leaves_none_behind(one_script, tmp_path):
    """kill -9 of the first process: the others end by themselves."""
    folder = many(tmp_path / 'many', 60000)
    process = subprocess.Popen([sys.executable, one_script.program, '--images', str(folder), '--target', 'usps',
                                '--out', str(tmp_path / 'pred.csv')], stdout=subprocess.PIPE, universal_newlines=True,
                               start_new_session=True)
    assert 'of 60,000 images' in process.stdout.readline()
    process.kill()
    process.wait()
    for _ in range(300):
        if not processes_of(process.pid):
            break
        time.sleep(0.1)
    assert processes_of(process.pid) == [] and os.listdir(str(tmp_path)) == ['many']


def test_labels_do_not_depend_on_the_number_of_processes(one_script, tmp_path):
    folder = many(tmp_path / 'many', 700)
    labels = []
    for count in (1, 2, 7):
        code = (f'import sys; sys.path.insert(0, {ROOT!r}); import os; os.sched_getaffinity = lambda pid: '
                f'range({count}); import {one_script.problem} as program; program.main()')
        result = run(['python3', '-c', code, '--images', folder, '--target', 'usps', '--out', tmp_path / 'pred.csv'])
        assert result.returncode == 0, result.stderr
        labels.append((tmp_path / 'pred.csv').read_bytes())
    assert labels[0] == labels[1] == labels[2] and labels[0].count(b'\n') == 701


def test_out_of_memory(one_script, tmp_path):
    """Of the net, in whichever process: one line that names the flag."""
    folder = many(tmp_path / 'many', 600)
    code = (f'import sys; sys.path.insert(0, {ROOT!r}); import torch, models, {one_script.problem} as program; '
            'models.DigitNet.forward = lambda net, x: torch.zeros(len(x), 10 ** 13); program.main()')
    result = run(['python3', '-c', code, '--images', folder, '--target', 'usps', '--out', tmp_path / 'pred.csv'])
    assert_one_line(result, 'not enough memory', '--batch_size')
    assert not (tmp_path / 'pred.csv').exists()


def test_link_to_nothing_is_not_left_out(one_script, tmp_path):
    """Its row would be missing and nobody would know."""
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    os.symlink(str(tmp_path / 'nowhere.png'), str(tmp_path / 'digits' / 'link.png'))
    result = run(['bash', one_script.path, tmp_path / 'digits', 'usps', tmp_path / 'pred.csv'])
    assert_one_line(result, 'link.png', 'cannot be read as an image')
    assert not (tmp_path / 'pred.csv').exists()


def test_out_that_is_a_link(one_script, tmp_path):
    """The file behind it is written, and the link stays."""
    (tmp_path / 'old.csv').write_text('old')
    os.symlink(str(tmp_path / 'old.csv'), str(tmp_path / 'pred.csv'))
    one_script.label(DIGITS, tmp_path / 'pred.csv')
    assert (tmp_path / 'pred.csv').is_symlink()
    assert (tmp_path / 'old.csv').read_text().startswith('image_name,label\n')


def test_out_that_is_no_file(one_script, tmp_path):
    os.mkfifo(str(tmp_path / 'pipe.csv'))
    result = run(['bash', one_script.path, DIGITS, 'usps', tmp_path / 'pipe.csv'])
    assert_one_line(result, 'pipe.csv is a device or a pipe')
    assert os.listdir(str(tmp_path)) == ['pipe.csv'] and not (tmp_path / 'pipe.csv').is_file()


@pytest.mark.parametrize('folder,words', [
    ('nowhere', ['there is no folder', 'nowhere']), ('empty', ['holds no image']),
    ('file', ['there is no folder'])])
def test_folder_without_images(script, tmp_path, folder, words):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('')
    assert_one_line(run(['bash', script.path, tmp_path / folder, 'usps', tmp_path / 'p.csv']), *words)
    assert not (tmp_path / 'p.csv').exists()


@pytest.mark.parametrize('arguments', [[], [DIGITS], [DIGITS, 'usps'], [DIGITS, 'usps', 'a.csv', 'b']])
def test_usage(script, tmp_path, arguments):
    result = run(['bash', script.path] + arguments, cwd=tmp_path)
    assert_one_line(result, 'usage: bash ' + script.name, 'mnistm, svhn or usps', code=2)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('target', ['mnist', 'USPS', '', '../usps'])
def test_unknown_target(script, tmp_path, target):
    result = run(['bash', script.path, DIGITS, target, tmp_path / 'pred.csv'])
    assert_one_line(result, f"'{target}'", 'mnistm, svhn or usps', code=2)
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize('out', ['digits/00000.png', 'new.JPG', 'weights.pth'])
def test_out_must_not_replace_an_input(one_script, tmp_path, out):
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    result = run(['bash', one_script.path, 'digits', 'usps', out], cwd=tmp_path)
    assert_one_line(result, 'has the name of an image or a checkpoint', 'name a CSV file')
    assert os.listdir(str(tmp_path)) == ['digits'] and len(os.listdir(str(tmp_path / 'digits'))) == 12


def test_terminated_script_ends_all_processes(one_script, tmp_path):
    """kill, as timeout does it: one line, no process and no file."""
    folder = many(tmp_path / 'many', 60000)
    process = subprocess.Popen([sys.executable, one_script.program, '--images', str(folder), '--target', 'usps',
                                '--out', str(tmp_path / 'pred.csv')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, start_new_session=True)
    assert 'of 60,000 images' in process.stdout.readline()
    process.terminate()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and stderr == 'p3_dann.py: stopped by a signal\n'
    assert processes_of(process.pid) == [] and os.listdir(str(tmp_path)) == ['many']


def test_unwritable_places(script, tmp_path):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file' / 'pred.csv', '/proc/pred.csv'):
        assert_one_line(run(['bash', script.path, DIGITS, 'usps', out]), 'cannot write', 'pred.csv')
    assert_one_line(run(['bash', script.path, DIGITS, 'usps', tmp_path]), 'is a folder')


def test_called_through_a_link_from_elsewhere(script, copy_of_project, tmp_path):
    """Only the checkpoint of the target is looked at."""
    os.symlink(str(copy_of_project / script.name), str(tmp_path / 'link.sh'))
    for target in ('mnistm', 'usps'):
        (copy_of_project / 'checkpoints' / f'{script.problem}_{target}.pth').unlink()
    result = run(['bash', 'link.sh', DIGITS, 'svhn', 'pred.csv'], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(read(str(tmp_path / 'pred.csv'))) == 12
    result = run(['bash', 'link.sh', DIGITS, 'usps', 'usps.csv'], cwd=tmp_path)
    assert_one_line(result, f'{script.problem}_usps.pth', 'no address is known')


def test_checkpoints_are_small_and_of_their_target(script):
    from models import load_checkpoint
    for target in TARGETS:
        path = script.checkpoint(target)
        assert os.path.getsize(path) < 8e6
        settings = load_checkpoint(path, script.problem)['settings']
        assert settings['target'] == target and settings['seed'] == 0


@pytest.mark.parametrize('ckpt,words', [
    ('none.pth', ['none.pth', 'there is no checkpoint']), ('torn.pth', ['torn.pth', 'torn']),
    ('other.pth', ['other.pth', 'p9_other']), ('no_target.pth', ['no_target.pth', 'does not say for which target']),
    ('.', ['is a folder or a device'])])
def test_bad_checkpoints(script, tmp_path, ckpt, words):
    from models import load_checkpoint, save_checkpoint
    with open(script.checkpoint('usps'), 'rb') as file:
        (tmp_path / 'torn.pth').write_bytes(file.read(100000))
    save_checkpoint(str(tmp_path / 'other.pth'), dict(problem='p9_other'))
    save_checkpoint(str(tmp_path / 'no_target.pth'), dict(load_checkpoint(script.checkpoint('usps'), script.problem),
                                                          settings={}))
    result = run(['python3', script.program, '--images', DIGITS, '--target', 'usps', '--out', 'x.csv',
                  '--ckpt', ckpt], cwd=tmp_path)
    assert_one_line(result, *words)
    assert not (tmp_path / 'x.csv').exists()


USE = ['--images', 'x', '--target', 'svhn', '--out', 'y.csv']
WRONG = dict(
    p3_dann=[USE + ['--setting', 'source'], ['--train', '--setting', 'both'],
             ['--train', '--augment', 'nan'], ['--train', '--augment', '2']],
    p4_adda=[USE + ['--pieces', 'none'], ['--train', '--pieces', 'teachers'],
             ['--train', '--pieces', 'teacher,,anchor'], ['--train', '--pieces', 'patches'],
             ['--train', '--pieces', 'diversity'], ['--train', '--pieces', 'anchor,self_training'],
             ['--train', '--pieces', 'augment,no_discriminator']])


def test_wrong_flags(script, tmp_path):
    """One through the real command line, and the others in one process."""
    rows = [['--images', 'x', '--out', 'y'], ['--train', '--plot'], ['--train', '--target', 'mnist'],
            ['--train', '--target', 'usps', '--source', 'usps'], ['--train', '--source', 'usps'],
            ['--train', '--ckpt', 'x.pth'], ['--train', '--target', 'usps', '--directions', 'others'],
            ['--plot', '--directions', 'others'], ['--images', 'x', '--target', 'usps'], ['--train', '--steps', '0'],
            ['--train', '--seed', '-1'], ['--train', '--batch_size', str(2 ** 31)], ['--plot', '--ckpt', 'x.pth'],
            ['--plot', '--target', 'usps'], ['--train', '--images', 'x'], ['--train', '--out', 'x.pth'],
            USE + ['--seed', '1'], USE + ['--source', 'usps'], USE + ['--resume']] + WRONG[script.problem]
    result = run(['python3', script.program], cwd=tmp_path)
    assert_one_line(result, script.problem + '.py: error: say --images IMAGES --target TARGET --out OUT', code=2)
    for flags, (code, stderr) in zip(rows, refusals(script.problem, rows, tmp_path)):
        assert code == 2 and stderr.startswith(script.problem + '.py: error:') and stderr.count('\n') == 1, flags
    assert os.listdir(str(tmp_path)) == []
