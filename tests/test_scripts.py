"""The five scripts as the grader calls them: their bash where it matters, all else through main() in this process."""
import csv
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn

import numpy as np
import p1_vae
import p2_gan
import p3_dann
import p4_adda
import p5_diffusion
import pytest
from conftest import ROOT, assert_one_line, call, each, file_limit, refusal, run
from PIL import Image

from models import load_checkpoint, save_checkpoint
from report import figures

DIGITS = os.path.join(ROOT, 'tests', 'digits')
FAULTS = os.path.join(ROOT, '..', 'shared', 'faults')
CHECKPOINTS = os.path.join(ROOT, 'checkpoints')
DRAWING, LABELLING = [p1_vae, p2_gan, p5_diffusion], [p3_dann, p4_adda]
SCRIPT = os.path.join(ROOT, 'hw3_{}.sh')
NAME = 'p3_dann_usps.pth'    # the checkpoint that is fetched


def usual(program, folder):
    """Words that let a program write a small output soon; the last of them is its path."""
    if program in LABELLING:
        return ['--images', DIGITS, '--target', 'usps', '--out', folder / 'x.csv']
    return (['--sampling_steps', '2'] if program is p5_diffusion else []) + ['--out', folder / 'x.png']


def read(path):
    """The rows under the header of a label file."""
    with open(str(path), newline='', encoding='utf8', errors='surrogateescape') as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['image_name', 'label'] and all(digit in list('0123456789') for _, digit in rows[1:])
    return rows[1:]


def label(program, folder, out, *words, target='usps'):
    call(program, '--images', folder, '--target', target, '--out', out, *words)
    return read(out)


def pixels(path):
    with Image.open(str(path)) as image:
        return np.asarray(image.convert('RGB')).astype(int)


def many(folder, count):
    """Make a folder of links to the digits of the repository."""
    folder.mkdir()
    for index in range(count):
        os.symlink(os.path.join(DIGITS, f'{index % 12:05d}.png'), str(folder / f'{index:05d}.png'))
    return folder


@each(DRAWING)
def test_draws_the_reference_picture(program, tmp_path):
    """At most two grey levels from the committed picture; from another folder; two threads give the bytes of one."""
    elsewhere, out = tmp_path / 'else where', tmp_path / 'else where' / '-new' / 'x.png'
    elsewhere.mkdir()
    result = run(['bash', SCRIPT.format(program.PROBLEM[:2]), '-new/x.png'], cwd=elsewhere, OMP_NUM_THREADS='2')
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert os.listdir(str(out.parent)) == ['x.png']
    rows, columns, size, name = {p1_vae: (4, 8, 66, 'fig1_4.png'), p2_gan: (4, 8, 66, 'fig2_2.png'),
                                 p5_diffusion: (10, 10, 30, 'hw3_p5.png')}[program]
    reference = os.path.join(ROOT, 'tests', 'reference', name)
    drawn, expected = pixels(out), pixels(reference)
    assert drawn.shape == expected.shape == (rows * size + 2, columns * size + 2, 3)
    assert np.abs(drawn - expected).max() <= 2
    images = drawn[2:, 2:].reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    assert len({image.tobytes() for image in images}) == rows * columns
    if program is p5_diffusion:            # one of each digit, for all of them would take long
        call(program, '--out', tmp_path / 'x.png', '--n', 1)
        assert (pixels(tmp_path / 'x.png') == drawn[:, :32]).all()
    else:
        call(program, '--out', tmp_path / 'x.png', '--batch_size', 7)
        assert filecmp.cmp(str(tmp_path / 'x.png'), str(out), shallow=False)
        assert filecmp.cmp(reference, os.path.join(ROOT, 'figures', name), shallow=False)      # of the report


@each(DRAWING)
def test_single_images(program, tmp_path, capsys):
    """--n draws so many, those of the picture; --seed draws others."""
    words = usual(program, tmp_path)
    call(program, *words)
    (tmp_path / 'single').mkdir()          # an empty folder is as good as none
    call(program, *words, '--out', tmp_path / 'single', '--n', 3)
    grid, names, size = pixels(words[-1]), [f'{index:05d}.png' for index in range(3)], 64
    if program is p5_diffusion:            # --n is the number of each digit
        names, size = [f'{digit}_00{index}.png' for digit in range(10) for index in (1, 2, 3)], 28
    assert sorted(os.listdir(str(tmp_path / 'single'))) == names
    for name, left in zip(names, (2, 4 + size, 6 + 2 * size)):
        assert (pixels(tmp_path / 'single' / name) == grid[2:2 + size, left:left + size]).all()
    code, line = refusal(capsys, program, *words, '--out', tmp_path / 'single', '--n', 2)
    assert code == 1 and 'single exists and is no empty folder' in line
    if program is not p5_diffusion:
        call(program, *words, '--out', tmp_path / 'two.png', '--n', 2)
        assert (pixels(tmp_path / 'two.png') == grid[:68, :134]).all()
    (tmp_path / 'tmp.AbCd').mkdir()        # whatever its name, as mktemp -d makes it
    call(program, *words, '--out', tmp_path / 'tmp.AbCd', '--n', 1)
    assert len(os.listdir(str(tmp_path / 'tmp.AbCd'))) == len(names) / 3
    (tmp_path / 'file').write_text('')
    code, line = refusal(capsys, program, *words, '--out', tmp_path / 'file' / 'faces', '--n', 2, '--ckpt', 'none.pth')
    assert code == 1 and 'cannot write' in line        # before the checkpoint is looked for
    call(program, *words, '--out', tmp_path / 'x.jpg', '--seed', 1)
    assert Image.open(str(tmp_path / 'x.jpg')).format == 'JPEG'
    assert np.abs(pixels(tmp_path / 'x.jpg') - grid).mean() > 4


@each(LABELLING)
def test_labels_a_folder(program, tmp_path):
    """From another folder, with two threads as with one, and names beyond ASCII in any locale."""
    folder = many(tmp_path / 'zw\u00f6lf \u5341\u4e8c', 600)
    os.rename(str(folder / '00007.png'), str(folder / 'sieben \u4e03.png'))
    result = run(['bash', SCRIPT.format(program.PROBLEM[:2]), folder.name + '/', 'mnistm', '-new/pr\u00e9d 1.csv'],
                 cwd=tmp_path, OMP_NUM_THREADS='2', LC_ALL='C')
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert os.listdir(str(tmp_path / '-new')) == ['pr\u00e9d 1.csv']
    rows = read(tmp_path / '-new' / 'pr\u00e9d 1.csv')
    assert [name for name, _ in rows] == sorted(os.listdir(str(folder))) and rows[-1][0] == 'sieben \u4e03.png'
    digits = dict(label(program, DIGITS, tmp_path / 'x.csv', target='mnistm'))
    assert all(digit == digits[os.path.basename(os.readlink(str(folder / name)))] for name, digit in rows)


@each(LABELLING)
def test_reads_the_digits_of_the_repository_each_by_itself(program, tmp_path):
    """Drawn by us; labels are compared as text.  An image alone and batches of any size have the same labels."""
    with open(DIGITS + '.csv', newline='') as file:
        truth = list(csv.reader(file))[1:]
    for target in ('mnistm', 'svhn', 'usps'):
        rows = label(program, DIGITS, tmp_path / 'x.csv', target=target)
        assert [name for name, _ in rows] == [name for name, _ in truth]
        assert sum(row in truth for row in rows) >= 8
    (tmp_path / 'alone').mkdir()
    for name, digit in rows:
        shutil.copy(os.path.join(DIGITS, name), str(tmp_path / 'alone' / 'x.png'))
        assert label(program, tmp_path / 'alone', tmp_path / 'x.csv') == [['x.png', digit]]
    for size in (1, 5, 1000):
        assert label(program, DIGITS, tmp_path / 'x.csv', '--batch_size', size) == rows


def test_every_image_gets_a_row_and_nothing_else_does(tmp_path, capsys):
    """Endings in any case, any mode and size, odd names; other files and folders are counted."""
    folder, rng = tmp_path / 'ein \u00d6rtchen', np.random.RandomState(0)
    (folder / 'folder.png').mkdir(parents=True)
    images = {'a.PNG': ('L', (16, 16)), 'b.jpg': ('RGB', (32, 32)), 'c.JPEG': ('L', (28, 28)), ' .png': ('L', (3, 3)),
              'd.bmp': ('P', (28, 28)), 'e.png': ('1', (9, 9)), 'f.png': ('RGBA', (40, 20)), 'g.png': ('LA', (28, 28)),
              '\u00f6, "x" y;.png': ('RGB', (28, 28)), "it's.png": ('L', (28, 28)), 'two.dots.png': ('L', (300, 300))}
    for name, (mode, size) in images.items():
        Image.fromarray(rng.randint(0, 256, size[::-1] + (3,)).astype(np.uint8)).convert(mode).save(str(folder / name))
    shutil.copy(os.path.join(DIGITS, '00003.png'), os.path.join(os.fsencode(str(folder)), b'caf\xe9.png'))
    for name in ('.DS_Store', 'notes.txt', 'labels.csv', '._a.PNG', 'image.gif'):
        (folder / name).write_text('no image')
    rows = label(p3_dann, folder, tmp_path / 'x.csv')
    assert [name for name, _ in rows] == sorted(list(images) + ['caf\udce9.png'])      # no text: its bytes are kept
    assert '6 other files or folders beside the 12 images' in capsys.readouterr().out


@pytest.mark.skipif(not os.path.isdir(FAULTS), reason='the inputs that went wrong are not beside the repository')
def test_inputs_that_went_wrong(tmp_path):
    """Every digit was labelled 1."""
    for kind in ('black_ink_on_transparent', 'png16_holding_8bit'):
        rows = label(p4_adda, os.path.join(FAULTS, kind), tmp_path / 'x.csv')
        assert [digit for _, digit in rows] == ['9', '6', '3', '6', '6']


@each(LABELLING)
def test_folders_with_something_wrong(program, tmp_path, capsys):
    """A file that is no image, a folder without one and no folder end it before anything is written."""
    folder = tmp_path / 'digits'
    shutil.copytree(DIGITS, str(folder))
    (folder / 'empty').mkdir()
    image = (folder / '00005.png').read_bytes()
    cases = [(folder, content, '00005.png cannot be read as an image') for content in (b'', b'no image', image[:300])]
    cases += [(folder / 'empty', image, 'holds no image'), (folder / 'nowhere', image, 'there is no folder')]
    for path, content, cause in cases:
        (folder / '00005.png').write_bytes(content)
        code, line = refusal(capsys, program, '--images', path, '--target', 'usps', '--out', tmp_path / 'x.csv')
        assert code == 1 and cause in line and os.listdir(str(tmp_path)) == ['digits']


def test_keyboard_ends_labelling_in_one_line(tmp_path):
    folder = many(tmp_path / 'many', 6000)
    (folder / 'notes.txt').write_text('')              # which is said before the first image is read
    command = [sys.executable, 'p3_dann.py', '--images', str(folder), '--target=usps', '--out', str(tmp_path / 'x.csv')]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert 'beside the 6000 images' in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and stderr == 'p3_dann.py: stopped by the keyboard\n'
    assert os.listdir(str(tmp_path)) == ['many']


@each(DRAWING + LABELLING)
def test_output_that_cannot_be_written(program, tmp_path, capsys):
    """One line before the work, when the missing checkpoint is not yet looked for."""
    end = 'csv' if program in LABELLING else 'png'
    (tmp_path / f'folder.{end}').mkdir()
    (tmp_path / 'file').write_text('')
    os.mkfifo(str(tmp_path / f'pipe.{end}'))
    names, words = os.listdir(str(tmp_path)), usual(program, tmp_path)
    cases = [(f'folder.{end}', 'is a folder'), (f'new.{end}/', 'is a folder'), (f'pipe.{end}', 'or a device'),
             (f'file/x.{end}', 'cannot write'), (f'file/new/x.{end}', 'cannot write')]
    cases += [(name, 'name') for name in (['x.JPG', 'x.pth'] if program in LABELLING else ['x.gif', 'x.png.txt'])]
    for name, cause in cases:
        code, line = refusal(capsys, program, *words[:-1], f'{tmp_path}/{name}', '--ckpt', 'none.pth')
        assert code == 1 and cause in line and f'{tmp_path}/{name}' in line and 'none.pth' not in line
    assert os.listdir(str(tmp_path)) == names and (tmp_path / f'pipe.{end}').is_fifo()
    # at a limit on the size of a file, as on a full disk, what was there stays whole
    words[-1].write_bytes(b'old')
    with file_limit(100):
        code, line = refusal(capsys, program, *words)
    assert code == 1 and 'cannot write' in line and words[-1].name in line and words[-1].read_bytes() == b'old'
    assert set(os.listdir(str(tmp_path))) == set(names + [words[-1].name])


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(str(tmp_path))
    shutil.copytree(DIGITS, str(tmp_path / 'digits'))
    shutil.copy(os.path.join(CHECKPOINTS, NAME), str(tmp_path / 'own.pth'))
    call(p3_dann, '--images=~/digits', '--target=usps', '--out=~/x.csv', '--ckpt=~/own.pth')
    assert sorted(os.listdir(str(tmp_path))) == ['digits', 'own.pth', 'x.csv']


def test_figures_whatever_the_users_matplotlib_is_set_to(tmp_path):
    (tmp_path / 'matplotlibrc').write_text('font.size: 20\nlines.linewidth: 9\naxes.facecolor: red\nbackend: TkAgg\n')
    code = 'figure, axes = figures.new_figure(2); axes.plot([0, 1]); figures.save_figure({!r}, figure)'
    exec(code.format(str(tmp_path / 'a.png')), dict(figures=figures))
    result = run(['python3', '-c', 'from report import figures; ' + code.format('b.png')], cwd=tmp_path,
                 PYTHONPATH=ROOT, MPLBACKEND='module://matplotlib_inline.backend_inline')
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert filecmp.cmp(str(tmp_path / 'a.png'), str(tmp_path / 'b.png'), shallow=False)


@each(DRAWING + LABELLING)
def test_wrong_checkpoints(program, tmp_path, capsys):
    """A torn one is read below, not in this process, whose memory torch 1.4 spoils when it reads one."""
    problem, words = program.PROBLEM, usual(program, tmp_path)
    shipped = os.path.join(CHECKPOINTS, problem + ('_usps.pth' if program in LABELLING else '.pth'))
    good, state = load_checkpoint(shipped, problem), problem + ' (training state)'
    unfit = dict(good, net=dict(list(good['net'].items())[1:]))
    for name, content in dict(other=dict(problem='p9_x'), state=dict(problem=state), list=[1], unfit=unfit,
                              bare=good['net']).items():
        save_checkpoint(str(tmp_path / (name + '.pth')), content)
    (tmp_path / 'text.pth').write_text('<html>not found</html>')
    for name, cause in dict(
            none='there is no checkpoint', text='no checkpoint', unfit='does not fit', list='not of',
            bare='of something else', other='of p9_x, not of ' + problem, state=f'of {state}, not of').items():
        code, line = refusal(capsys, program, *words, '--ckpt', tmp_path / (name + '.pth'))
        assert code == 1 and name + '.pth' in line and cause in line and not words[-1].exists()
    if program in LABELLING:
        code, line = refusal(capsys, program, *words, '--target', 'svhn', '--ckpt', shipped)
        assert code == 1 and 'was trained for usps' in line and not words[-1].exists()


@each(DRAWING + LABELLING)
def test_wrong_flags(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(str(tmp_path))
    rows = [('', 'say --'), ('--train --plot', '--plot'), ('--out x.png --nonsense', '--nonsense'),
            ('--out x.png --seed -1', '--seed'), ('--out x.png --batch_size 0', '--batch_size'),
            ('--train --steps 0', '--steps'), ('--out x.png --device tpu', '--device'),
            ('--train --out x.pth', '--ckpt names'), ('--out x.png --resume', '--resume is for --train')]
    rows += [('--images x --target usps', 'say'), ('--images x --out y', 'say'), ('--target usps --out y', 'say'),
             ('--images x --target mnist --out y', '--target'), ('--train --target usps --source usps', 'is the target')
             ] if program in LABELLING else [('--out x.png --n 0', '--n'), ('--n 3', 'say --out')]
    for flags, cause in rows:
        code, line = refusal(capsys, program, *flags.split())
        assert code == 2 and 'error: ' in line and cause in line and os.listdir(str(tmp_path)) == []


class Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    """The first folder of the address says how the server behaves."""

    def do_GET(self):
        manner, name = self.path.strip('/').split('/')
        self.server.requests.append(name)
        if manner == 'together':           # nobody is answered before two have asked
            self.server.barrier.wait(60)
        if manner == 'missing':
            return self.send_error(404)
        with open(os.path.join(CHECKPOINTS, name), 'rb') as file:
            body = b'<html>sign in first</html>' if manner == 'html' else file.read()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 4] if manner == 'broken' else body)


@pytest.fixture
def server():
    with Server(('127.0.0.1', 0), Handler) as server:
        server.requests, server.barrier = [], threading.Barrier(2)
        server.url = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetch(project, url, shell='bash', out='x.csv'):
    return run([shell, project / 'hw3_p3.sh', DIGITS, 'usps', project / out], CHECKPOINT_URL=url)


def test_two_scripts_fetch_a_missing_checkpoint_at_once(copy_of_project, server):
    file, outs = copy_of_project / 'checkpoints' / NAME, ['a.csv', 'b.csv']
    file.unlink()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda out: fetch(copy_of_project, server.url + '/together', out=out), outs))
    assert [result.returncode for result in results] == [0, 0] and server.requests == [NAME, NAME], results
    assert filecmp.cmp(str(file), os.path.join(CHECKPOINTS, NAME), shallow=False)
    assert [len(read(copy_of_project / out)) for out in outs] == [12, 12]


def test_fetches_that_fail_and_one_that_does_not(copy_of_project, server):
    """Nothing is used, nothing has the checkpoint's name, and the last line says what to mend."""
    folder = copy_of_project / 'checkpoints'
    (folder / NAME).unlink()
    for url in ['http://127.0.0.1:9', ''] + [server.url + end for end in ('/broken', '/html', '/missing', '/good')]:
        if url.endswith('good'):           # but there is no place for what is fetched
            folder.rename(copy_of_project / 'elsewhere')
        result = fetch(copy_of_project, url)
        assert result.returncode == 1 and url in result.stderr
        assert result.stderr.splitlines()[-1].startswith(f'hw3_p3.sh: {NAME} '), result.stderr
        assert not (folder / NAME).exists() and not (copy_of_project / 'x.csv').exists()
    assert server.requests[:5] == [NAME] * 5           # broken has three tries
    # an empty file is fetched over: by sh, from the address in checkpoints/URL
    (copy_of_project / 'elsewhere').rename(folder)
    (folder / NAME).write_bytes(b'')
    (folder / 'URL').write_text(server.url + '/good/\n')
    result = fetch(copy_of_project, '', 'sh')
    assert result.returncode == 0 and len(read(copy_of_project / 'x.csv')) == 12, result.stderr
    assert filecmp.cmp(str(folder / NAME), os.path.join(CHECKPOINTS, NAME), shallow=False)


def test_own_net_is_used_as_it_is(copy_of_project, server, tmp_path):
    """It is neither called damaged nor fetched over; a torn one is the program's one line.  Through a link, too."""
    path, command = copy_of_project / 'checkpoints' / NAME, ['bash', 'link.sh', DIGITS, 'usps', 'x.csv']
    own = load_checkpoint(str(path), 'p3_dann')
    own['net']['classifier.1.bias'][3] = 1e6
    save_checkpoint(str(path), own)
    content = path.read_bytes()
    os.symlink(str(copy_of_project / 'hw3_p3.sh'), str(tmp_path / 'link.sh'))
    result = run(command, cwd=tmp_path, CHECKPOINT_URL=server.url + '/good')
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert {digit for _, digit in read(tmp_path / 'x.csv')} == {'3'} and path.read_bytes() == content
    path.write_bytes(content[:100000])
    assert_one_line(run(command, cwd=tmp_path, CHECKPOINT_URL=server.url + '/good'), NAME, 'is torn', 'p3_dann.py: ')
    assert path.read_bytes() == content[:100000] and server.requests == []


@each(DRAWING + LABELLING)
def test_usage(program, tmp_path):
    script, right = SCRIPT.format(program.PROBLEM[:2]), [DIGITS, 'usps', 'x.csv'] if program in LABELLING else ['x.png']
    cases = [(words, 'usage: bash ' + os.path.basename(script)) for words in ([], right + ['y'], right[:-1])]
    cases += [([DIGITS, target, 'x.csv'], f"'{target}': choose mnistm, svhn or usps")
              for target in ('mnist', 'USPS', '', '../usps') if program in LABELLING]
    for words, message in cases:
        assert_one_line(run(['bash', script] + words, cwd=tmp_path), message, code=2)
    assert os.listdir(str(tmp_path)) == []


def test_rules_of_the_assignment():
    """What the grader's machine forbids and needs; and the scripts differ in names alone as far as they can."""
    fetching = set()
    for number in range(1, 6):
        with open(os.path.join(ROOT, f'hw3_p{number}.sh'), newline='') as file:
            text = file.read()
        words = set(re.findall(r'[\w-]+', text))
        assert not words & {'rm', 'sudo', 'cp', 'mv', 'mkdir', 'cd', 'pip', 'pip3', 'curl', 'python', 'export', 'gdown',
                            'CUDA_VISIBLE_DEVICES'} and {'python3', 'wget'} < words and '\r' not in text
        fetching.add(text[text.index('if [ ! -s'):text.index('exec ')].replace(f'hw3_p{number}', ''))
    assert len(fetching) == 1
    with open(os.path.join(ROOT, '.gitattributes')) as file:
        assert '*.sh text eol=lf' in file.read().splitlines()
