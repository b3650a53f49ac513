"""bash hw3_p1.sh OUT and bash hw3_p2.sh OUT, as the grader calls them."""
import os

import numpy as np
import pytest
from conftest import ROOT, assert_one_line, refusals, run
from PIL import Image



class Script(object):
    """The script of a problem that draws faces, its program, checkpoint and expected picture."""

    def __init__(self, problem, figure):
        self.problem, self.name = problem, f'hw3_{problem[:2]}.sh'
        self.path = os.path.join(ROOT, self.name)
        self.program = os.path.join(ROOT, problem + '.py')
        self.checkpoint = os.path.join(ROOT, 'checkpoints', problem + '.pth')
        self.figure = os.path.join(ROOT, 'figures', figure)
        self.reference = os.path.join(ROOT, 'tests', 'reference', figure)


@pytest.fixture(params=[('p1_vae', 'fig1_4.png'), ('p2_gan', 'fig2_2.png')], ids=['p1', 'p2'])
def script(request):
    return Script(*request.param)


def pixels(path):
    with Image.open(str(path)) as image:
        return np.asarray(image.convert('RGB')).astype(int)


def test_draws_the_reference_picture(script, tmp_path):
    """At most two grey levels from the committed picture, in every environment."""
    result = run(['bash', script.path, tmp_path / 'out.png'])
    assert result.returncode == 0, result.stderr
    drawn, expected = pixels(tmp_path / 'out.png'), pixels(script.reference)
    assert drawn.shape == expected.shape == (4 * 66 + 2, 8 * 66 + 2, 3)
    assert np.abs(drawn - expected).max() <= 2
    faces = [drawn[2 + 66 * y:66 + 66 * y, 2 + 66 * x:66 + 66 * x] for y in range(4) for x in range(8)]
    assert len({face.tobytes() for face in faces}) == 32
    assert min(face.std() for face in faces) > 10


def test_report_shows_the_reference_picture(script):
    with open(script.reference, 'rb') as one, open(script.figure, 'rb') as other:
        assert one.read() == other.read()


@pytest.mark.parametrize('threads', ['1', '2', '3'])
def test_same_bytes_whatever_the_threads_and_the_batch_size(script, tmp_path, threads):
    """Faces are decoded one by one on one thread, whatever is asked for."""
    first, second = tmp_path / 'first.png', tmp_path / 'second.png'
    run(['bash', script.path, first])
    result = run(['python3', script.program, '--out', second, '--batch_size',
                  {'1': '1', '2': '7', '3': '64'}[threads]], OMP_NUM_THREADS=threads)
    assert result.returncode == 0, result.stderr
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize('out', ['bare.png', 'new folder/deep/er/face.jpg', './upper.PNG', 'x.jpeg',
                                 '-dash.png', 'ünïcode.png'])
def test_output_paths(script, tmp_path, out):
    """Relative to the caller's folder, wherever the project is."""
    result = run(['bash', script.path, out], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    picture = Image.open(str(tmp_path / out))
    assert picture.format == ('PNG' if out.lower().endswith('png') else 'JPEG')
    assert np.abs(pixels(tmp_path / out) - pixels(script.reference)).mean() < 2
    assert not [name for name in os.listdir(os.path.dirname(str(tmp_path / out)))
                if name.startswith('.')]


def test_called_through_a_link_and_from_a_folder_with_a_space(script, copy_of_project, tmp_path):
    os.symlink(str(copy_of_project / script.name), str(tmp_path / 'link.sh'))
    result = run(['bash', 'link.sh', tmp_path / 'out.png'], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert np.abs(pixels(tmp_path / 'out.png') - pixels(script.reference)).max() <= 2


@pytest.mark.parametrize('arguments', [[], ['a.png', 'b.png']])
def test_usage(script, tmp_path, arguments):
    assert_one_line(run(['bash', script.path] + arguments, cwd=tmp_path), 'usage: bash ' + script.name, code=2)
    assert os.listdir(str(tmp_path)) == []


def test_overwrites_an_older_picture(script, tmp_path):
    (tmp_path / 'out.png').write_bytes(b'old')
    assert run(['bash', script.path, tmp_path / 'out.png']).returncode == 0
    assert np.abs(pixels(tmp_path / 'out.png') - pixels(script.reference)).max() <= 2


def test_out_is_a_folder(script, tmp_path):
    assert_one_line(run(['bash', script.path, tmp_path]), tmp_path, 'is a folder')


@pytest.mark.parametrize('name', ['faces', 'faces.gif', 'faces.png.txt'])
def test_no_picture_ending(script, tmp_path, name):
    assert_one_line(run(['bash', script.path, tmp_path / name]), name, '.png, .jpg or .jpeg')
    assert os.listdir(str(tmp_path)) == []


def test_unwritable_places(script, tmp_path):
    """A file where a folder should be, and a file system that takes no files: also for root."""
    (tmp_path / 'file').write_text('')
    assert_one_line(run(['bash', script.path, tmp_path / 'file' / 'out.png']), 'cannot write', 'out.png')
    assert_one_line(run(['bash', script.path, '/proc/out.png']), 'cannot write', '/proc/out.png')


@pytest.mark.skipif(os.getuid() == 0, reason='root may write everywhere')
def test_folder_without_permission(script, tmp_path):
    (tmp_path / 'closed').mkdir(mode=0o500)
    assert_one_line(run(['bash', script.path, tmp_path / 'closed' / 'out.png']), 'Permission denied')


def test_full_disk_leaves_nothing_and_keeps_the_old_picture(script, tmp_path):
    """A limit on the size of a file fails a write in its midst, as a full disk does."""
    (tmp_path / 'out.png').write_bytes(b'old')
    command = f'ulimit -f 40; bash "{script.path}" "{tmp_path}/out.png"'      # in blocks of 1,024 bytes
    assert_one_line(run(['bash', '-c', command]), 'cannot write', 'out.png')
    assert os.listdir(str(tmp_path)) == ['out.png']
    assert (tmp_path / 'out.png').read_bytes() == b'old'


def test_full_disk_itself(script, tmp_path):
    mount = f'mount -t tmpfs -o size=64k none "{tmp_path}"'
    if run(['unshare', '-rm', 'bash', '-c', mount]).returncode != 0:
        pytest.skip('this machine lets no test mount a small disk')
    result = run(['unshare', '-rm', 'bash', '-c',
                  f'{mount}; bash "{script.path}" "{tmp_path}/out.png"; code=$?; '
                  f'ls -A "{tmp_path}"; exit $code'])
    assert_one_line(result, 'No space left on device')
    assert result.stdout == ''


def test_obeys_the_rules_of_the_assignment(script):
    with open(script.path) as file:
        text = file.read()
    assert text.count('\n') <= 20
    words = set(text.replace('/', ' ').replace('(', ' ').replace('"', ' ').split())
    assert not words & {'rm', 'sudo', 'cp', 'mv', 'mkdir', 'cd', 'pip', 'pip3', 'curl', 'python',
                        'CUDA_VISIBLE_DEVICES', 'export', 'apt-get', 'gdown'}
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            with open(os.path.join(ROOT, name)) as file:
                source = file.read()
            assert 'imshow' not in source and '.show(' not in source


def test_single_images(script, tmp_path):
    """--n writes that many files; the first 32 are the picture's faces."""
    result = run(['python3', script.program, '--out', tmp_path / 'faces', '--n', '33'])
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(str(tmp_path / 'faces'))) == [f'{index:05d}.png' for index in range(33)]
    assert os.listdir(str(tmp_path)) == ['faces']
    grid = pixels(script.reference)
    face = pixels(tmp_path / 'faces' / '00009.png')      # second row, second column
    assert np.abs(face - grid[68:132, 68:132]).max() <= 2
    again = run(['python3', script.program, '--out', tmp_path / 'faces', '--n', '1'])
    assert_one_line(again, 'faces', 'is no empty folder')


@pytest.mark.parametrize('arguments,words', [
    (['--out', 'x.png', '--ckpt', 'none.pth'], ['none.pth', '--train']),
    (['--out', 'x.png', '--ckpt', 'torn.pth'], ['torn.pth', 'torn']),
    (['--out', 'x.png', '--ckpt', 'text.pth'], ['text.pth', 'no checkpoint']),
    (['--out', 'x.png', '--ckpt', 'other.pth'], ['other.pth', 'p9_other']),
    (['--out', 'x.png', '--ckpt', 'state.pth'], ['state.pth', 'training state'])])
def test_bad_checkpoints(script, tmp_path, arguments, words):
    from models import save_checkpoint
    with open(script.checkpoint, 'rb') as file:
        (tmp_path / 'torn.pth').write_bytes(file.read(100000))
    (tmp_path / 'text.pth').write_text('<html>not found</html>')
    save_checkpoint(str(tmp_path / 'other.pth'), dict(problem='p9_other'))
    save_checkpoint(str(tmp_path / 'state.pth'), dict(problem=script.problem + ' (training state)'))
    result = run(['python3', script.program] + arguments, cwd=tmp_path)
    assert_one_line(result, *words)
    assert not (tmp_path / 'x.png').exists()


WRONG = dict(
    p1=[['--train', '--lambda_kl', 'nan'], ['--train', '--lambda_kl', '-1'], ['--plot', '--lambda_kl', '1'],
        ['--train', '--attribute', 'Male']],
    p2=[['--train', '--method', 'vae'], ['--train', '--augment', '2'], ['--train', '--augment', '-1'],
        ['--train', '--augment', 'nan'], ['--plot', '--method', 'r1'], ['--plot', '--augment', '1']])


def test_wrong_flags(script, tmp_path):
    """One through the real command line, and the others in one process."""
    rows = [['--train', '--plot'], ['--out', 'x.png', '--n', '0'], ['--out', 'x.png', '--seed', '-1'], ['--nonsense'],
            ['--out', 'x.png', '--device', 'tpu'], ['--out', 'x.png', '--ckpt', ''],
            ['--out', 'x.png', '--steps', '9'], ['--out', 'x.png', '--resume'], ['--plot', '--seed', '1'],
            ['--plot', '--n', '3'], ['--train', '--n', '3'], ['--train', '--out', 'x.pth']] + WRONG[script.problem[:2]]
    result = run(['python3', script.program], cwd=tmp_path)
    assert_one_line(result, script.problem + '.py: error: say --out OUT', code=2)
    for flags, (code, stderr) in zip(rows, refusals(script.problem, rows, tmp_path)):
        assert code == 2 and stderr.startswith(script.problem + '.py: error:') and stderr.count('\n') == 1, flags
        assert flags not in WRONG[script.problem[:2]] or flags[1] in stderr
    assert os.listdir(str(tmp_path)) == []
