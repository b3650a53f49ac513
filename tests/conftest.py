"""What the tests share: a small data folder drawn here, and the project's commands as users call them."""
import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# two tests run side by side on two cores: more threads would wait for each other
os.environ['OMP_NUM_THREADS'] = '1'

import datasets                                                                     # noqa: E402

ATTRIBUTES = ['Bangs', 'Blond_Hair', 'Male', 'Smiling']


def run(command, cwd=ROOT, timeout=300, **environment):
    """Run a command with this Python as python3; return it with returncode, stdout and stderr."""
    variables = dict(os.environ, no_proxy='127.0.0.1', **environment)
    variables['PATH'] = os.path.dirname(sys.executable) + os.pathsep + variables['PATH']
    return subprocess.run([str(word) for word in command], cwd=str(cwd), env=variables,
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, universal_newlines=True)


# a server that has imported what takes long; of the scripts nothing, since a test may run a copy of them
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['pytest', 'torch', 'torch._dynamo'])


def execute(words, cwd, folder):
    """Be python3 -c in the folder cwd, with its output in files of another folder."""
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(str(cwd))
    sys.argv = words[1:2] + words[3:]
    exec(words[2], {'__name__': '__main__'})


def start_code(command, cwd, folder):
    """Start a command, python3 -c with its words, as a process that is forked from the server."""
    words = [str(word) for word in command]
    assert words[:2] == ['python3', '-c']
    process = SERVER.Process(target=execute, args=(words, cwd, folder))
    process.start()
    return process


def output(folder):
    """What a command that start_code started has written to stdout and stderr."""
    texts = []
    for name in ('stdout', 'stderr'):
        with open(os.path.join(folder, name), encoding='utf8') as file:
            texts.append(file.read())
    return texts


def run_code(command, cwd=ROOT, timeout=300):
    """Run a command of start_code to its end.  Returns what run returns, but some seconds sooner."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_code(command, cwd, folder)
        process.join(timeout)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *output(folder))


def kill_code(command, condition):
    """Start a command of start_code and kill it (kill -9) as soon as condition() holds."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_code(command, ROOT, folder)
        while not condition():
            assert process.exitcode is None, 'the run ended before it could be killed: ' + output(folder)[1]
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    # the server of Python 3.6 does not know which signal it was
    assert process.exitcode == (255 if sys.version_info < (3, 7) else -signal.SIGKILL)


def call(program, *words):
    """Call program.main(words) in this process, as its command line would; an exit is an error."""
    program.main([str(word) for word in words])


def refusal(capsys, program, *words):
    """Call program.main(words), which must end in one line for its user; return (exit status, the line)."""
    with pytest.raises(SystemExit) as stop:
        program.main([str(word) for word in words])
    message = stop.value.code
    if isinstance(message, str):           # Python prints it on stderr and exits with 1
        assert '\n' not in message
        return 1, message
    return message, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def read_anew():
    """Digits that an earlier test has read are read again, for it may have changed them."""
    datasets.read_digits.cache_clear()


def assert_one_line(result, *words, code=1):
    """Assert that a command failed with one line on stderr that holds each of words."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().split('\n')
    assert len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0]


def refusals(program, rows, cwd):
    """What a program says to each row of flags: exit code and stderr; in one process, which is quicker."""
    code = (f'import contextlib, io, json, sys; sys.path.insert(0, {ROOT!r}); import {program} as program\n'
            f'sys.argv[0], found = "{program}.py", []\n'
            'for flags in json.loads(sys.argv[1]):\n'
            '    stderr = io.StringIO()\n'
            '    with contextlib.redirect_stderr(stderr):\n'
            '        try:\n'
            '            program.main(flags)\n'
            '            found.append((0, stderr.getvalue()))\n'
            '        except SystemExit as error:\n'
            '            found.append((error.code, stderr.getvalue()))\n'
            'print(json.dumps(found))')
    result = run_code(['python3', '-c', code, json.dumps(rows)], cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def draw_face(rng):
    """A cartoon face, 64x64: enough for a net to have something to learn."""
    colour = lambda: tuple(int(value) for value in rng.randint(40, 216, 3))     # noqa: E731
    image = Image.new('RGB', (64, 64), colour())
    draw = ImageDraw.Draw(image)
    x, y = rng.randint(26, 39), rng.randint(28, 37)
    draw.ellipse([x - 18, y - 22, x + 18, y + 22], fill=colour())
    for side in (-8, 8):
        draw.ellipse([x + side - 3, y - 8, x + side + 3, y - 4], fill=colour())
    draw.line([x - 8, y + 10, x + 8, y + 10], fill=colour(), width=2)
    return image


def write_rows(path, header, rows):
    with open(str(path), 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(header)
        writer.writerows(rows)


def write_faces(root, counts=(40, 12)):
    """Write root/face/{train,test} and their CSV files, named on from 00000.png as the course does."""
    rng = np.random.RandomState(1)
    first = 0
    for split, count in zip(('train', 'test'), counts):
        folder = os.path.join(str(root), 'face', split)
        os.makedirs(folder)
        names = [f'{index:05d}.png' for index in range(first, first + count)]
        for name in names:
            draw_face(rng).save(os.path.join(folder, name))
        write_rows(folder + '.csv', ['image_name'] + ATTRIBUTES,
                   [[name] + [float(value) for value in rng.randint(0, 2, 4)] for name in names])
        first += count
    return str(root)


def draw_digit(digit, domain, rng):
    """A digit of PIL's own letters, 28x28: white on black and grey for usps, else in two colours."""
    letter = Image.new('L', (6, 11))
    ImageDraw.Draw(letter).text((0, 0), str(digit), fill=255)
    letter = letter.resize((rng.randint(12, 16), rng.randint(20, 26)), Image.BICUBIC)
    mask = Image.new('L', (28, 28))
    mask.paste(letter, (rng.randint(5, 10), rng.randint(1, 3)))
    if domain == 'usps':
        return mask
    colours = [tuple(int(value) for value in rng.randint(0, 256, 3)) for _ in range(2)]
    return Image.composite(*[Image.new('RGB', (28, 28), colour) for colour in colours], mask=mask)


def write_digits(root):
    """Write root/digits/{mnistm,svhn,usps}/{train,test} and their CSV files, every digit in turn."""
    rng = np.random.RandomState(2)
    for domain in ('mnistm', 'svhn', 'usps'):
        for split, count in (('train', 40), ('test', 12)):
            folder = os.path.join(str(root), 'digits', domain, split)
            os.makedirs(folder)
            names = [f'{index:05d}.png' for index in range(count)]
            for index, name in enumerate(names):
                draw_digit(index % 10, domain, rng).save(os.path.join(folder, name))
            write_rows(folder + '.csv', ['image_name', 'label'],
                       [[name, index % 10] for index, name in enumerate(names)])
    return str(root)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A data folder that tests only read."""
    return write_digits(write_faces(tmp_path_factory.mktemp('shared data')))


@pytest.fixture
def own_data_dir(tmp_path):
    """A data folder that a test may spoil."""
    return write_digits(write_faces(tmp_path / 'data'))


@pytest.fixture
def copy_of_project(tmp_path):
    """The project's own files in a folder of their own, with a space in its name."""
    folder = tmp_path / 'a copy'
    folder.mkdir()
    (folder / 'checkpoints').mkdir()
    (folder / 'report').mkdir()
    shutil.copy(os.path.join(ROOT, 'report', 'figures.py'), str(folder / 'report'))
    for name in os.listdir(ROOT):
        if name.endswith(('.sh', '.py')):
            shutil.copy(os.path.join(ROOT, name), str(folder))
    for name in os.listdir(os.path.join(ROOT, 'checkpoints')):
        if name in ('SHA256SUMS', 'URL') or name.endswith('.pth') and not name.endswith('_last.pth'):
            shutil.copy(os.path.join(ROOT, 'checkpoints', name), str(folder / 'checkpoints'))
    return folder
