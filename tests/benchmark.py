"""Measurements that are too long for CI; each prints and writes its log into checkpoints/.

    python3 tests/benchmark.py linear_code --data_dir hw3_data     the yardstick of problem 1
    python3 tests/benchmark.py scripts --data_dir hw3_data         wall time and memory of hw3_pN.sh
    python3 tests/benchmark.py samples --data_dir hw3_data --scorer face_score.py --python PYTHON
                                                                   quality of 1,000 generated faces
    python3 tests/benchmark.py strips p2_gan real --strips FOLDER  pictures for a reader who counts broken faces
    python3 tests/benchmark.py count A=3 B=0 --strips FOLDER       what the reader counted
    python3 tests/benchmark.py conditional --data_dir hw3_data     digits and faces of problems 5 and 6
"""
import argparse
import os
import random
import re
import string
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import p1_vae, p2_gan, p5_diffusion, p6_acgan        # noqa: E401, E402
from datasets import (FaceImages, list_images, make_grid, read_digits, save_picture, save_single_images,     # noqa: E402
                      split_held_out, to_float)
from models import (CHECKPOINTS, VAE, DigitNet, Generator, UNet, accuracy, digit_features,   # noqa: E402
                    frechet_distance, load_net, measure_generated, read_log, sha256, write_log)

CPU = torch.device('cpu')
DIGITS = 26032             # images of SVHN's test set
RULE = ('a face is clearly broken if an eye, the nose or the mouth is missing, doubled or out of its place, or if the '
        'outline of the head is torn; the reader sees 32 faces of each at double size, under letters, and does not '
        'know which is which')
# of diffusion: steps of sampling and weight of the guidance, one of them the default
SETTINGS = [(p5_diffusion.SAMPLING_STEPS, guidance) for guidance in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)] + [
    (steps, p5_diffusion.GUIDANCE) for steps in (5, 10, 20, 100)]


def linear_code(args):
    """Rate and distortion of a linear-Gaussian code of the training faces.

    The principal components are independent Gaussians of variance s; a component with s > theta
    gets log(s / theta) / 2 nats and keeps an error of theta, another gets none and keeps s (reverse
    water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3).  Written as a
    VAE, its q(z|x) has the mean sqrt(1 - theta / s) x / sqrt(s) and the variance theta / s; so it
    can also be measured as ours is, decoded from the mean, on the test faces.
    """
    from sklearn.decomposition import PCA
    training = to_float(FaceImages(args.data_dir, 'train').images).flatten(1).numpy()
    test = to_float(FaceImages(args.data_dir, 'test').images).flatten(1).numpy()
    pca = PCA(n_components=500, svd_solver='randomized', random_state=0).fit(training)
    variances, total = pca.explained_variance_, training.var(0).sum()
    scores = pca.transform(test)
    rest = ((test - pca.mean_) ** 2).sum(1).mean() - (scores ** 2).sum(1).mean()
    records = []
    for theta in np.geomspace(8, 0.1, 40):
        kept = variances > theta
        s, x = variances[kept], scores[:, kept]
        shrink = 1 - theta / s
        error = ((x * theta / s) ** 2).sum(1).mean() + (scores[:, ~kept] ** 2).sum(1).mean() + rest
        kl = 0.5 * (shrink * x ** 2 / s + theta / s - 1 - np.log(theta / s)).sum(1).mean()
        records.append(dict(
            kind='linear_code', theta=theta, components=int(kept.sum()), rate=float(0.5 * np.log(s / theta).sum()),
            distortion=float((theta * kept.sum() + total - s.sum()) / training.shape[1]),
            test_kl=float(kl), test_mse=float(error / training.shape[1])))
        print(records[-1])
    write_log(os.path.join(CHECKPOINTS, 'p1_linear_code.jsonl'), records)


def timed(command, **environment):
    """Run a command with these variables, and no other number of threads; return its seconds and peak memory in MB."""
    code = ('import os, resource, subprocess, sys, time\n'
            'start = time.perf_counter()\n'
            'subprocess.check_call(sys.argv[1:])\n'
            'print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)')
    variables = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    output = subprocess.check_output([sys.executable, '-c', code] + command, env=dict(variables, **environment))
    seconds, megabytes = output.decode().split()[-2:]
    return float(seconds), float(megabytes)


def scripts(args):
    """Wall time and peak memory of the grader's commands, beside the least they could take.

    Problems 3 and 4 label as many images as SVHN's test set has, the kit's test images again and again, in as many
    threads as there are cores; beside it the time of one thread, as a ratio.
    """
    version = subprocess.check_output(['python3', '-c', 'import torch; print(torch.__version__)']).decode().strip()
    import_seconds = min(timed(['python3', '-c', 'import torch'])[0] for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        digits = os.path.join(folder, 'digits')
        os.mkdir(digits)
        real = os.path.abspath(os.path.join(args.data_dir, 'digits', 'svhn', 'test'))
        names = list_images(real)
        for index in range(DIGITS):
            os.symlink(os.path.join(real, names[index % len(names)]), os.path.join(digits, f'{index:05d}.png'))
        png, csv = [os.path.join(folder, name) for name in ('out.png', 'out.csv')]
        label = ['python3', os.path.join(ROOT, 'p3_dann.py'), '--images', digits, '--target', 'svhn', '--out', csv]
        seconds = [(timed(label, OMP_NUM_THREADS='1')[0], timed(label)[0]) for _ in range(2)]
        one_thread, all_threads = [min(runs) for runs in zip(*seconds)]
        threads = dict(cores=len(os.sched_getaffinity(0)), one_thread_seconds=one_thread,
                       threads_ratio=one_thread / all_threads)
        records = []
        for script, images, words in (
                ('hw3_p1.sh', 32, [png]), ('hw3_p2.sh', 32, [png]), ('hw3_p3.sh', DIGITS, [digits, 'svhn', csv]),
                ('hw3_p4.sh', DIGITS, [digits, 'svhn', csv]), ('hw3_p5.sh', 100, [png])):
            runs = [timed(['bash', os.path.join(ROOT, script)] + words) for _ in range(3)]
            records.append(dict(threads if script == 'hw3_p3.sh' else {}, kind='script', script=script,
                                seconds=min(runs)[0], megabytes=max(run[1] for run in runs),
                                import_seconds=import_seconds, images=images, torch=version))
            print(records[-1], flush=True)
    path = os.path.join(CHECKPOINTS, 'benchmark_scripts.jsonl')
    # one record for each torch that was measured
    records += [record for record in read_log(path) if record['torch'] != version]
    write_log(path, records)


def generate_faces(name, count):
    """Return count faces (count, 3, 64, 64) uint8 of checkpoints/name.pth, a VAE or a GAN, its path and its content."""
    ckpt = os.path.join(CHECKPOINTS, name + '.pth')
    script, kind = (p1_vae, VAE) if name.startswith('p1') else (p2_gan, Generator)
    net, checkpoint = load_net(kind, ckpt, script.PROBLEM, CPU)
    return script.generate_faces(net, count, 0, CPU), ckpt, checkpoint


def samples(args):
    """Generate 1,000 faces from checkpoints and have the scorer compare them with the test faces.

    The scorer (a script of its own, with dlib) prints: n 1000  clear C  frechet F  nearest N.  It only
    measures; it chooses nothing.  More numbers are taken in the latent means of problem 1's VAE: own, the
    Frechet distance to the held-out faces by which p2_gan.py chooses, and the mean and the lowest percentile of
    the distances to the nearest training face or its mirror image, copied and copied_least (for 'real', which
    are training faces, from the held-out faces).  A name that was not given keeps its record; eight faces of
    each lie beside it for table2.  The scores of p1_lambda/... have a file of their own, and no faces.
    """
    judge = load_net(VAE, p2_gan.JUDGE, 'p1_vae', CPU)[0]
    faces = FaceImages(args.data_dir, 'train').images
    train_rows, val_rows = split_held_out(len(faces))
    training = p2_gan.latent_means(judge, torch.cat([faces[train_rows], faces[train_rows].flip(3)]), CPU)
    held_out = p2_gan.latent_means(judge, faces[val_rows], CPU)
    for name in args.names or ['p1_vae', 'p2_gan', 'real']:
        images, record = faces[train_rows[:1000]], dict(kind='samples', what=name, label='training faces', images=0)
        path = p1_vae.SAMPLES if name.startswith('p1_lambda/') else p2_gan.SAMPLES
        if name != 'real':
            images, ckpt, checkpoint = generate_faces(name, 1000)
            settings = checkpoint['settings']
            record.update(sha256=sha256(ckpt), images=settings['steps'] * settings['batch_size'],
                          chosen_step=checkpoint['step'], label='VAE of problem 1')
            if name.startswith('p1'):
                record['lambda_kl'] = settings['lambda_kl']
            else:
                record['label'] = settings['method'] + (', shipped' if name == 'p2_gan' else '')
        with tempfile.TemporaryDirectory() as folder:
            save_single_images(os.path.join(folder, 'faces'), images)
            line = subprocess.check_output([args.python, args.scorer, os.path.join(folder, 'faces'), os.path.join(
                args.data_dir, 'face', 'test'), '--n', '1000']).decode().strip()
        n, *scores = re.fullmatch(r'n (\d+)  clear ([\d.]+)  frechet ([\d.]+)  nearest ([\d.]+)', line).groups()
        means = p2_gan.latent_means(judge, images, CPU)
        distances = torch.cdist(held_out if name == 'real' else means, training).min(1)[0].numpy()
        record.update(zip(('clear', 'frechet', 'nearest'), map(float, scores)), n=int(n),
                      own=frechet_distance(means, held_out), copied=float(distances.mean()),
                      copied_least=float(np.percentile(distances, 1)))
        if name != 'real' and path == p2_gan.SAMPLES:                  # no image of the data set is kept here
            record['picture'] = 'samples/{}_{}.png'.format(name.replace('/', '_'), record['images'])
            save_picture(os.path.join(CHECKPOINTS, record['picture']), images[:8], 8)
        print(record, flush=True)
        # read again: another scoring may have run beside this one
        records = [old for old in read_log(path)
                   if old['what'] != name or '/' in name and old['images'] != record['images']]
        write_log(path, sorted(records + [record], key=lambda record: (record['what'], record['images'])))


def strips(args):
    """Write the 32 faces of each name, at double size and under a letter in random order, into the folder --strips.

    'real' stands for test faces.  Give the pictures to somebody who does not know them, and the counts to `count`.
    """
    names, key = args.names or ['p1_vae', 'p2_gan', 'real'], {}
    random.shuffle(names)
    os.makedirs(args.strips)
    for letter, name in zip(string.ascii_uppercase, names):
        key[letter] = dict(what=name)
        if name == 'real':
            test = FaceImages(args.data_dir, 'test').images
            images = test[torch.from_numpy(np.random.RandomState(0).choice(len(test), 32, replace=False))]
        else:
            images, ckpt, _ = generate_faces(name, 32)
            key[letter]['sha256'] = sha256(ckpt)
        picture = Image.fromarray(make_grid(images, 8))
        picture.resize([2 * side for side in picture.size], Image.BICUBIC).save(
            os.path.join(args.strips, letter + '.png'))
    write_log(args.strips + '.key', [key])


def count(args):
    """Log how many of the 32 faces of each letter a reader called broken: count A=3 B=7 --strips FOLDER."""
    key, = read_log(args.strips + '.key')
    records = read_log(p2_gan.COUNTS)
    for letter, broken in [word.split('=') for word in args.names]:
        records = [old for old in records if old.get('sha256') != key[letter].get('sha256')]
        records.append(dict(key[letter], kind='count', broken=int(broken), faces=32, date=time.strftime('%Y-%m-%d'),
                            rule=RULE))
    write_log(p2_gan.COUNTS, sorted(records, key=lambda record: record['what']))


def conditional(args):
    """Score the generators of problems 5 and 6: 100 digits of each class, 500 faces of each.

    accuracy is the share of the digits that the upper bound of problem 3 reads as what was asked for, frechet the
    distance to the test digits in its features, nearest and nearest_least the mean and the lowest percentile of the
    distances to the nearest training digit there.  The row 'real' has the judge's accuracy on the test digits, the
    distance from as many training digits to the test digits, and those from held-out digits to the nearest other
    training digit.  Weights that have a score keep it.  Faces are read by logistic regression on latent means of
    problem 1's VAE.
    """
    judge = load_net(DigitNet, p5_diffusion.JUDGE, 'p3_dann', CPU)[0]
    digits, test = [read_digits(args.data_dir, 'mnistm', split) for split in ('train', 'test')]
    train_rows, val_rows = split_held_out(len(digits.names))
    features = digit_features(judge, digits.images, CPU)

    def nearest(features_of_images):
        distances = torch.cat([torch.cdist(part, features[train_rows]).min(1)[0]
                               for part in features_of_images.split(100)]).numpy()
        return dict(nearest=float(distances.mean()), nearest_least=float(np.percentile(distances, 1)))

    some = features[train_rows[np.random.RandomState(0).permutation(len(train_rows))[:1000]]]
    records = [dict(
        kind='digits', what='real', label='real digits', sampling_steps='', guidance='', images_per_second='',
        accuracy=accuracy(judge, test.images, test.labels, CPU),
        frechet=frechet_distance(some, digit_features(judge, test.images, CPU)), **nearest(features[val_rows]))]
    records.append(conditional_faces(args.data_dir))
    ckpts = dict(diffusion=p5_diffusion.CKPT, acgan=p6_acgan.shipped('digits', ''), acgan_paper=p6_acgan.PAPER)
    labels = dict(acgan='ACGAN', acgan_paper='ACGAN, class loss of the paper')
    scored = {(record['what'], record['sampling_steps'], record['guidance'], record.get('sha256')): record
              for record in read_log(p5_diffusion.SCORES) if record['kind'] == 'digits'}
    unet = load_net(UNet, ckpts['diffusion'], p5_diffusion.PROBLEM, CPU)[0]
    for what, steps, guidance in [(what, '', '') for what in labels] + [('diffusion', *values) for values in SETTINGS]:
        start, same = time.time(), scored.get((what, steps, guidance, sha256(ckpts[what])))
        if same:                           # these very weights have a score
            records.append(same)
            continue
        if what in labels:
            generator = load_net(p6_acgan.GENERATORS['digits'], ckpts[what], p6_acgan.PROBLEM, CPU)[0]
            generated = p6_acgan.generate_images(generator, p6_acgan.SCORED, 0, CPU)
        else:
            generated = p5_diffusion.generate_digits(unet, p5_diffusion.SCORED, 0, CPU, steps, guidance)
        speed = 10 * len(generated) / (time.time() - start)
        records.append(dict(
            kind='digits', what=what, label=labels.get(what, what), sha256=sha256(ckpts[what]),
            sampling_steps=steps, guidance=guidance, images_per_second=speed, cores=os.cpu_count(),
            **measure_generated(generated, judge, test.images, CPU),
            **nearest(digit_features(judge, generated.flatten(0, 1), CPU))))
        print(records[-1], flush=True)
    write_log(p5_diffusion.SCORES, records)


def conditional_faces(data_dir):
    """Score the faces of ACGAN: how often a linear classifier reads the attribute that was asked for."""
    from sklearn.linear_model import LogisticRegression
    attribute, judge = p6_acgan.DEFAULTS['attribute'], load_net(VAE, p2_gan.JUDGE, 'p1_vae', CPU)[0]
    ckpt = p6_acgan.shipped('faces', attribute)
    generator = load_net(p6_acgan.GENERATORS['faces'], ckpt, p6_acgan.PROBLEM, CPU)[0]
    faces, test = [FaceImages(data_dir, split) for split in ('train', 'test')]
    generated = p6_acgan.generate_images(generator, 500, 0, CPU).flatten(0, 1)
    train_means, test_means, means = [p2_gan.latent_means(judge, images, CPU).numpy()
                                      for images in (faces.images, test.images, generated)]
    classifier = LogisticRegression(solver='lbfgs', max_iter=1000).fit(train_means, faces.attribute(attribute))
    return dict(kind='faces', what='faces', attribute=attribute, sha256=sha256(ckpt),
                accuracy=float((classifier.predict(means) == np.tile([False, True], 500)).mean()),
                real_accuracy=float(classifier.score(test_means, test.attribute(attribute))))


def main():
    measurements = dict(linear_code=linear_code, scripts=scripts, samples=samples, strips=strips, count=count,
                        conditional=conditional)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=list(measurements))
    parser.add_argument('--data_dir', default='hw3_data')
    parser.add_argument('names', nargs='*', help='samples, strips: checkpoints, as p2_gan, or real; count: letters and '
                        'numbers, as A=3')
    parser.add_argument('--scorer', help='samples: the face scorer')
    parser.add_argument('--strips', default='strips', help='strips, count: new folder of pictures (strips)')
    parser.add_argument('--python', default='python3', help='samples: a Python that has dlib')
    args = parser.parse_args()
    measurements[args.what](args)


if __name__ == '__main__':
    main()
