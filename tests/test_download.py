"""How a script comes by its checkpoint: the real wget against a real HTTP server on loopback."""
import os
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn

import pytest
from conftest import ROOT, assert_one_line, run

with open(os.path.join(ROOT, 'checkpoints', 'p1_vae.pth'), 'rb') as weights:
    GOOD = weights.read()


class Handler(BaseHTTPRequestHandler):
    """The first folder of the address chooses how the server behaves."""

    def do_GET(self):
        manner, name = self.path.strip('/').split('/')
        wanted = self.headers.get('Range')
        self.server.requests.append((manner, name, wanted))
        body = {'html': b'<html>sign in first</html>', 'zeros': b'\0' * len(GOOD)}.get(manner, GOOD)
        first = 0
        if wanted and manner != 'norange':
            first = int(wanted[len('bytes='):-1])
        if manner == 'missing':
            return self.send_error(404)
        if first >= len(body):
            return self.send_error(416)
        self.send_response(206 if first else 200)
        if first:
            self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - first))
        self.end_headers()
        # 'broken' says a length and closes the line after a quarter of it
        self.wfile.write(body[first:first + len(body) // 4] if manner == 'broken' else body[first:])

    def log_message(self, *args):
        pass


class Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True


@pytest.fixture
def server():
    server = Server(('127.0.0.1', 0), Handler)
    server.requests = []
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def draw(project, url='', out='out.png'):
    return run(['bash', project / 'hw3_p1.sh', project / out], CHECKPOINT_URL=url)


def test_good_checkpoint_needs_no_network(copy_of_project, server):
    assert draw(copy_of_project, server.url + '/good').returncode == 0
    assert server.requests == []


@pytest.mark.parametrize('spoil', ['missing', 'torn', 'another'])
@pytest.mark.parametrize('manner', ['good', 'good/', 'norange'])
def test_fetches_a_missing_or_damaged_checkpoint(copy_of_project, server, spoil, manner):
    file = copy_of_project / 'checkpoints' / 'p1_vae.pth'
    file.unlink()
    if spoil != 'missing':
        file.write_bytes(GOOD[:1000] if spoil == 'torn' else GOOD[:-1] + b'x')
    result = draw(copy_of_project, f'{server.url}/{manner}')
    assert result.returncode == 0, result.stderr
    assert file.read_bytes() == GOOD
    assert (copy_of_project / 'out.png').exists()
    assert not (copy_of_project / 'checkpoints' / 'p1_vae.pth.part').exists()


def test_address_from_the_file(copy_of_project, server):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    (copy_of_project / 'checkpoints' / 'URL').write_text(server.url + '/good\n')
    assert draw(copy_of_project).returncode == 0
    assert [request[:2] for request in server.requests] == [('good', 'p1_vae.pth')]


@pytest.mark.parametrize('manner', ['good', 'norange'])
def test_broken_download_is_resumed(copy_of_project, server, manner):
    """A quarter arrives and stays a part; the next run asks for the rest only."""
    folder = copy_of_project / 'checkpoints'
    (folder / 'p1_vae.pth').unlink()
    (folder / 'p1_vae.pth.part').write_bytes(GOOD[:len(GOOD) // 4])
    assert draw(copy_of_project, f'{server.url}/{manner}').returncode == 0
    assert server.requests[0][2] == f'bytes={len(GOOD) // 4}-'
    assert (folder / 'p1_vae.pth').read_bytes() == GOOD


def test_line_that_breaks_is_retried(copy_of_project, server):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    result = draw(copy_of_project, server.url + '/broken')
    # three quarters in three tries: a part, and no checkpoint
    assert_one_line(result, 'p1_vae.pth', server.url)
    assert not (copy_of_project / 'checkpoints' / 'p1_vae.pth').exists()
    part = (copy_of_project / 'checkpoints' / 'p1_vae.pth.part').read_bytes()
    assert 0 < len(part) < len(GOOD) and GOOD.startswith(part)
    assert draw(copy_of_project, server.url + '/good').returncode == 0


@pytest.mark.parametrize('manner', ['html', 'zeros'])
def test_wrong_content_is_no_checkpoint(copy_of_project, server, manner):
    """Nor does it stay in the way of the next try, even one that would resume."""
    file = copy_of_project / 'checkpoints' / 'p1_vae.pth'
    file.write_bytes(b'the old one')
    assert_one_line(draw(copy_of_project, f'{server.url}/{manner}'), 'p1_vae.pth', 'wrong SHA-256')
    assert file.read_bytes() == b'the old one'
    assert not (copy_of_project / 'out.png').exists()
    assert draw(copy_of_project, server.url + '/good').returncode == 0
    assert file.read_bytes() == GOOD


@pytest.mark.parametrize('part', [b'of an older model', GOOD[:-1] + b'x', GOOD + b'more'],
                         ids=['older', 'damaged', 'longer'])
def test_part_of_another_file_is_fetched_anew(copy_of_project, server, part):
    """The sum of what is resumed upon it is wrong, so the same run starts from nothing."""
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    (copy_of_project / 'checkpoints' / 'p1_vae.pth.part').write_bytes(part)
    result = draw(copy_of_project, server.url + '/good')
    assert result.returncode == 0, result.stderr
    assert (copy_of_project / 'checkpoints' / 'p1_vae.pth').read_bytes() == GOOD


def test_windows_line_ends(copy_of_project, server):
    folder = copy_of_project / 'checkpoints'
    (folder / 'p1_vae.pth').unlink()
    (folder / 'URL').write_bytes((server.url + '/good\r\n').encode())
    (folder / 'SHA256SUMS').write_bytes((folder / 'SHA256SUMS').read_bytes().replace(b'\n', b'\r\n'))
    result = draw(copy_of_project)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('spoil', ['missing', 'empty'])
def test_no_sums(copy_of_project, spoil):
    (copy_of_project / 'checkpoints' / 'SHA256SUMS').unlink()
    if spoil == 'empty':
        (copy_of_project / 'checkpoints' / 'SHA256SUMS').write_text('')
    assert_one_line(draw(copy_of_project), 'p1_vae.pth', 'SHA256SUMS', 'restore')


def test_no_address_file(copy_of_project):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    (copy_of_project / 'checkpoints' / 'URL').unlink()
    assert_one_line(draw(copy_of_project), 'p1_vae.pth', 'no address is known')


def test_checkpoints_cannot_be_written(copy_of_project, server):
    """wget cannot open its part: a folder lies in its place, which stops root too."""
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    (copy_of_project / 'checkpoints' / 'p1_vae.pth.part').mkdir()
    assert_one_line(draw(copy_of_project, server.url + '/good'), 'p1_vae.pth', 'cannot write')


@pytest.mark.parametrize('url,words', [
    ('', ['no address is known']),
    ('http://127.0.0.1:9/refused', ['127.0.0.1:9', 'wget says 4', '4: no network']),
    ('not a url', ['not a url'])])
def test_no_server(copy_of_project, url, words):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    result = draw(copy_of_project, url)
    assert_one_line(result, 'p1_vae.pth', 'CHECKPOINT_URL', 'checkpoints/URL', *words)
    assert not (copy_of_project / 'out.png').exists()
    assert not (copy_of_project / 'checkpoints' / 'p1_vae.pth').exists()


def without(tmp_path, *commands):
    """A folder of links to everything on the PATH but these commands."""
    folder = tmp_path / 'path'
    folder.mkdir()
    for place in [os.path.dirname(sys.executable)] + os.environ['PATH'].split(os.pathsep):
        for name in os.listdir(place) if os.path.isdir(place) else ():
            if name not in commands and not os.path.lexists(str(folder / name)):
                os.symlink(os.path.join(place, name), str(folder / name))
    # a virtual environment is found by the place of its python3
    for name in ('python', 'python3'):
        (folder / name).unlink()
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder)


def test_system_without_sha256sum_and_gnu_readlink(copy_of_project, server, tmp_path):
    """As an older macOS: a good checkpoint is good, a damaged one is fetched, through a link too."""
    path = without(tmp_path, 'sha256sum', 'shasum', 'readlink', 'realpath')
    os.symlink(str(copy_of_project / 'hw3_p1.sh'), str(tmp_path / 'link.sh'))
    for spoil in (False, True):
        if spoil:
            (copy_of_project / 'checkpoints' / 'p1_vae.pth').write_bytes(GOOD[:1000])
        environment = dict(os.environ, PATH=path, CHECKPOINT_URL=server.url + '/good', no_proxy='127.0.0.1')
        result = subprocess.run(['bash', str(tmp_path / 'link.sh'), str(tmp_path / 'out.png')], stderr=subprocess.PIPE,
                                env=environment)
        assert result.returncode == 0, result.stderr
        assert len(server.requests) == spoil


def test_no_wget(copy_of_project, tmp_path):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    result = subprocess.run(['bash', str(copy_of_project / 'hw3_p1.sh'), str(tmp_path / 'out.png')],
                            env=dict(os.environ, PATH=without(tmp_path, 'wget'), CHECKPOINT_URL='http://127.0.0.1:9/x'),
                            stderr=subprocess.PIPE, universal_newlines=True)
    assert_one_line(result, 'wget says 127', '127: no wget')


def test_certificate_that_is_not_trusted(copy_of_project, tmp_path):
    """wget's other exit codes are explained too; the server has a certificate of its own making."""
    key, made = str(tmp_path / 'key.pem'), ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2']
    if run(made + ['-subj', '/CN=127.0.0.1', '-keyout', key, '-out', key + '.crt']).returncode:
        pytest.skip('this machine has no openssl to make a certificate with')
    server = Server(('127.0.0.1', 0), Handler)
    server.requests = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key + '.crt', key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    result = draw(copy_of_project, f'https://127.0.0.1:{server.server_port}/good')
    server.shutdown()
    server.server_close()
    assert_one_line(result, 'wget says 5', '5: its certificate is not trusted')


def test_not_found(copy_of_project, server):
    (copy_of_project / 'checkpoints' / 'p1_vae.pth').unlink()
    assert_one_line(draw(copy_of_project, server.url + '/missing'), 'p1_vae.pth', '/missing')


# What is tested here of hw3_p1.sh holds for the others, which have the same lines.

def lines_of(script):
    with open(os.path.join(ROOT, script)) as file:
        return file.read()


def test_script_of_problem_2_differs_in_names_alone():
    expected = lines_of('hw3_p1.sh')
    for before, after in (('Problem 1', 'Problem 2'), ('the VAE', 'the GAN'), ('hw3_p1', 'hw3_p2'),
                          ('p1_vae', 'p2_gan')):
        expected = expected.replace(before, after)
    assert lines_of('hw3_p2.sh') == expected


def test_script_of_problem_4_differs_in_names_alone():
    expected = lines_of('hw3_p3.sh')
    for before, after in (('Problem 3', 'Problem 4'), ('DANN', 'the improved ADDA'), ('hw3_p3', 'hw3_p4'),
                          ('p3_dann', 'p4_adda')):
        expected = expected.replace(before, after)
    assert lines_of('hw3_p4.sh') == expected


def test_scripts_of_the_digits_fetch_as_those_of_the_faces_do():
    """From the file's name on to the call of the program they have the same lines."""
    faces, digits = lines_of('hw3_p1.sh').replace('hw3_p1', 'hw3_p3'), lines_of('hw3_p3.sh')
    start, end = 'file=$here', 'exec python3'
    assert faces[faces.index(start):faces.index(end)] == digits[digits.index(start):digits.index(end)]


def test_script_of_problem_5_fetches_as_those_of_the_faces_do():
    faces, conditional = lines_of('hw3_p1.sh').replace('hw3_p1', 'hw3_p5'), lines_of('hw3_p5.sh')
    start, end = 'set -euo', '[ $# -eq 1 ]'
    assert faces[faces.index(start):faces.index(end)] == conditional[conditional.index(start):conditional.index(end)]
    start, end = 'file=$here', 'exec python3'
    assert faces[faces.index(start):faces.index(end)] == conditional[conditional.index(start):conditional.index(end)]


def test_other_script_fetches_its_own_checkpoint(copy_of_project, server):
    (copy_of_project / 'checkpoints' / 'p2_gan.pth').unlink()
    result = run(['bash', copy_of_project / 'hw3_p2.sh', copy_of_project / 'out.png'],
                 CHECKPOINT_URL=server.url + '/good')
    # the server answers with problem 1's file, whatever it is asked for
    assert_one_line(result, 'p2_gan.pth', 'wrong SHA-256')
    assert {name for _, name, _ in server.requests} == {'p2_gan.pth'}
