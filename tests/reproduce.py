"""Run the five scripts as the grader does and set what they give beside what the report says.

    python3 tests/reproduce.py --data_dir hw3_data                            a minute or two; or
    python3 tests/reproduce.py --unpack ../shared/data/unpack.py              with the data kit, unpacked first
    python3 tests/reproduce.py --data_dir hw3_data --only usps                one target alone, and no pictures

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
TARGETS = ('mnistm', 'svhn', 'usps')


def bash(*words):
    """Run a script of this project with this Python as python3; return the seconds it took."""
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    start = time.time()
    if subprocess.run(['bash'] + list(words), cwd=ROOT, env=dict(os.environ, PATH=path),
                      stdout=subprocess.DEVNULL).returncode:
        sys.exit(f'bash {" ".join(words)} failed, for the reason above: mend it and start again')
    return time.time() - start


def read_labels(path):
    with open(path, newline='') as file:
        return {row['image_name']: row['label'] for row in csv.DictReader(file)}


def course_score(predicted, truth):
    """Percent of the truth's names whose label is the same text; a name without a row counts as wrong."""
    predicted, truth = read_labels(predicted), read_labels(truth)
    return 100 * sum(predicted.get(name) == label for name, label in truth.items()) / len(truth)


def pictures(folder):
    """Yield command, what is expected, what it gave, whether that is the same, and seconds; so it is below."""
    for script, name in (('hw3_p1.sh', 'fig1_4.png'), ('hw3_p2.sh', 'fig2_2.png'), ('hw3_p5.sh', 'hw3_p5.png')):
        seconds = bash(script, os.path.join(folder, name))
        drawn, expected = [np.asarray(Image.open(os.path.join(place, name)).convert('RGB')).astype(int)
                           for place in (folder, os.path.join(ROOT, 'tests', 'reference'))]
        difference = np.abs(drawn - expected).max() if drawn.shape == expected.shape else 255
        yield f'bash {script}', f'tests/reference/{name}', f'{difference} grey levels apart', difference <= 2, seconds


def predictions(folder, data_dir, targets):
    for script, problem in (('hw3_p3.sh', 'p3_dann'), ('hw3_p4.sh', 'p4_adda')):
        for target in targets:
            with open(os.path.join(ROOT, 'checkpoints', f'{problem}_{target}.jsonl')) as file:
                expected = 100 * json.loads(file.readlines()[-1])['accuracy']
            images, predicted = os.path.join(data_dir, 'digits', target, 'test'), os.path.join(folder, 'pred.csv')
            seconds = bash(script, images, target, predicted)
            score = course_score(predicted, images + '.csv')
            yield (f'bash {script} ... {target}', f'{expected:.2f} %', f'{score:.2f} %', abs(score - expected) <= 0.1,
                   seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_dir', default='hw3_data', help='folder that holds digits/ (hw3_data)')
    parser.add_argument('--unpack', help='unpack.py of the data kit, which writes --data_dir anew')
    parser.add_argument('--only', choices=TARGETS, help='this target alone, and no pictures')
    args = parser.parse_args()
    data_dir = os.path.abspath(os.path.expanduser(args.data_dir))
    if args.unpack and subprocess.run([sys.executable, args.unpack, data_dir]).returncode:
        sys.exit(f'{args.unpack} failed, for the reason above: name the unpack.py of the data kit')
    if not os.path.isdir(os.path.join(data_dir, 'digits')):
        sys.exit(f'there is no {os.path.join(data_dir, "digits")}: name another --data_dir, or --unpack the kit')
    all_right = True
    print(f'{"command":28} {"expected":28} {"found":24} {"":8} seconds')
    with tempfile.TemporaryDirectory() as folder:
        for rows in ([] if args.only else pictures(folder),
                     predictions(folder, data_dir, [args.only] if args.only else TARGETS)):
            for command, expected, found, right, seconds in rows:
                print(f'{command:28} {expected:28} {found:24} {"same" if right else "DIFFERS":8} {seconds:.1f}',
                      flush=True)
                all_right = all_right and right
    sys.exit(0 if all_right else 1)


if __name__ == '__main__':
    main()
