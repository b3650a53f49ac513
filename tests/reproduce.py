"""Run the five scripts as the grader does and set what they give beside what the report says.

    python3 tests/reproduce.py --data_dir hw3_data                            a minute or two; or
    python3 tests/reproduce.py --unpack ../shared/data/unpack.py              with the data kit, unpacked first

Pictures are compared with those in tests/reference/ (at most 2 grey levels apart: another CPU or torch rounds
otherwise), prediction files are scored on the test folders as the course does (labels compared as
text) and compared with the accuracy in the logs (at most 0.1 points apart).  Exit status 1 if one differs.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def bash(*words):
    """Run a script of this project with this Python as python3; return the seconds it took."""
    variables = dict(os.environ)
    variables['PATH'] = os.path.dirname(sys.executable) + os.pathsep + variables['PATH']
    start = time.time()
    if subprocess.run(['bash'] + list(words), cwd=ROOT, env=variables, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f'bash {" ".join(words)} failed, for the reason above: mend it and start again')
    return time.time() - start


def labels(path):
    with open(path, newline='') as file:
        return {row['image_name']: row['label'] for row in csv.DictReader(file)}


def course_score(predicted, truth):
    """Percent of the truth's names whose label is the same text; a name without a row counts as wrong."""
    predicted, truth = labels(predicted), labels(truth)
    return 100 * sum(predicted.get(name) == label for name, label in truth.items()) / len(truth)


def pictures(folder):
    for script, name in (('hw3_p1.sh', 'fig1_4.png'), ('hw3_p2.sh', 'fig2_2.png'), ('hw3_p5.sh', 'hw3_p5.png')):
        seconds = bash(script, os.path.join(folder, name))
        found, expected = [np.asarray(Image.open(os.path.join(place, name)).convert('RGB')).astype(int)
                           for place in (folder, os.path.join(ROOT, 'tests', 'reference'))]
        same = found.shape == expected.shape
        difference = np.abs(found - expected).max() if same else 255
        yield f'bash {script}', f'tests/reference/{name}', f'{difference} grey levels apart', difference <= 2, seconds


def predictions(folder, data_dir):
    for script, problem in (('hw3_p3.sh', 'p3_dann'), ('hw3_p4.sh', 'p4_adda')):
        for target in ('mnistm', 'svhn', 'usps'):
            log = os.path.join(ROOT, 'checkpoints', f'{problem}_{target}.jsonl')
            with open(log) as file:
                expected = 100 * json.loads(file.readlines()[-1])['accuracy']
            images = os.path.join(data_dir, 'digits', target, 'test')
            seconds = bash(script, images, target, os.path.join(folder, 'pred.csv'))
            found = course_score(os.path.join(folder, 'pred.csv'), images + '.csv')
            yield (f'bash {script} ... {target}', f'{expected:.2f} %', f'{found:.2f} %',
                   abs(found - expected) <= 0.1, seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='hw3_data', help='folder that holds digits/ (hw3_data)')
    parser.add_argument('--unpack', help='unpack.py of the data kit, which writes --data_dir anew')
    args = parser.parse_args()
    if args.unpack and subprocess.run([sys.executable, args.unpack, args.data_dir]).returncode:
        sys.exit(f'{args.unpack} failed, for the reason above: name the unpack.py of the data kit')
    data_dir = os.path.abspath(args.data_dir)
    if not os.path.isdir(os.path.join(data_dir, 'digits')):
        sys.exit(f'there is no {os.path.join(data_dir, "digits")}: name another --data_dir, or --unpack the kit')
    wrong = 0
    print(f'{"command":28} {"expected":28} {"found":24} {"":8} seconds')
    with tempfile.TemporaryDirectory() as folder:
        for rows in (pictures(folder), predictions(folder, data_dir)):
            for command, expected, found, right, seconds in rows:
                verdict = 'same' if right else 'DIFFERS'
                wrong += not right
                print(f'{command:28} {expected:28} {found:24} {verdict:8} {seconds:.1f}', flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
