"""Measurements that are too long for CI; each prints a table and writes its log into checkpoints/.

    python3 tests/benchmark.py linear_code --data_dir hw3_data     the yardstick of problem 1
    python3 tests/benchmark.py training --data_dir hw3_data        training speed against a plain loop
    python3 tests/benchmark.py scripts --data_dir hw3_data         wall time and memory of hw3_pN.sh
    python3 tests/benchmark.py samples --data_dir hw3_data --scorer face_score.py --python PYTHON
                                                                   quality of 1,000 drawn faces
    python3 tests/benchmark.py strips p2_gan real --strips FOLDER  pictures for a reader who counts broken faces
    python3 tests/benchmark.py count A=3 B=0 --strips FOLDER       what the reader counted
    python3 tests/benchmark.py conditional --data_dir hw3_data     digits and faces of problem 5
"""
import argparse
import copy
import json
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

import p1_vae                                                                       # noqa: E402
import p2_gan                                                                       # noqa: E402
import p3_dann                                                                      # noqa: E402
import p4_adda                                                                      # noqa: E402
import p5_conditional                                                               # noqa: E402
from datasets import (SOURCE_OF, FaceImages, augment_digits, list_images, make_grid,    # noqa: E402
                      random_patches, read_digits, read_images, save_picture, save_single, split_held_out, to_float)
from models import (DISCRIMINATOR_HIDDEN, VAE, DigitNet, Discriminator, DomainDiscriminator, Generator,      # noqa: E402
                    GradientReversal, accuracy, domain_loss, file_sum, frechet_distance, load_checkpoint, load_net,
                    read_log, write_log)

CHECKPOINTS = os.path.join(ROOT, 'checkpoints')
DIGITS = 26032             # images of SVHN's test set
TARGET = 'svhn'            # of problems 3 and 4 in the speed tests


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
    pixels = training.shape[1]
    pca = PCA(n_components=500, svd_solver='randomized', random_state=0).fit(training)
    variances, total = pca.explained_variance_, training.var(0).sum()
    scores = pca.transform(test)
    rest = ((test - pca.mean_) ** 2).sum(1).mean() - (scores ** 2).sum(1).mean()
    records = []
    print('  theta  nats    MSE   | test faces: KL  MSE decoded from the mean')
    for theta in np.geomspace(8, 0.1, 40):
        kept = variances > theta
        s, x = variances[kept], scores[:, kept]
        shrink = 1 - theta / s
        error = ((x * theta / s) ** 2).sum(1).mean() + (scores[:, ~kept] ** 2).sum(1).mean() + rest
        kl = 0.5 * (shrink * x ** 2 / s + theta / s - 1 - np.log(theta / s)).sum(1).mean()
        records.append(dict(
            kind='linear_code', theta=theta, components=int(kept.sum()),
            rate=float(0.5 * np.log(s / theta).sum()),
            distortion=float((theta * kept.sum() + total - s.sum()) / pixels),
            test_kl=float(kl), test_mse=float(error / pixels)))
        print('{theta:7.3f} {rate:5.1f}  {distortion:.5f} |       {test_kl:5.1f}  {test_mse:.5f}'
              .format(**records[-1]))
    write_log(os.path.join(CHECKPOINTS, 'p1_linear_code.jsonl'), records)


def plain_loader(folder, batch_size, change=lambda image, index: image):
    """Batches of images as a tutorial reads them: PNG files and a DataLoader; in [0, 1]."""
    names = sorted(os.listdir(folder))

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(names)

        def __getitem__(self, index):
            image = np.asarray(Image.open(os.path.join(folder, names[index])).convert('RGB'))
            return change(torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 255), index)

    return torch.utils.data.DataLoader(Images(), batch_size=batch_size, shuffle=True)


def plain_faces(data_dir, batch_size):
    """Batches of training faces, every second one mirrored."""
    return ((x,) for x in plain_loader(os.path.join(data_dir, 'face', 'train'), batch_size,
                                       lambda image, _: image.flip(2) if torch.rand(1).item() < 0.5 else image))


def plain_digits(data_dir, batch_size):
    """Batches (source images, labels, target images) of the speed test's pair of domains."""
    source, target = [os.path.join(data_dir, 'digits', domain) for domain in (SOURCE_OF[TARGET], TARGET)]
    with open(source + '/train.csv') as file:
        labels = [int(line.split(',')[1]) for line in sorted(file.read().split()[1:])]
    labelled = plain_loader(source + '/train', batch_size, lambda image, index: (image, labels[index]))
    for (x, y), target_x in zip(labelled, plain_loader(target + '/train', batch_size)):
        yield x, y, target_x


def plain_average(average, net):
    for old, new in zip(average.parameters(), net.parameters()):
        old.data = 0.999 * old.data + 0.001 * new.data


def plain_vae():
    """Return the training step of p1_vae.py as a tutorial writes it: fp32, contiguous."""
    vae = VAE(**p1_vae.NET).train()
    average = copy.deepcopy(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def step(x):
        output, mean, log_variance = vae(x, torch.randn(len(x), p1_vae.NET['latent_dim']))
        loss = (p1_vae.reconstruction_loss(output, x)
                + 1e-4 * p1_vae.kl_divergence(mean, log_variance).mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain_average(average, vae)
    return step


def plain_gan():
    """Return the training step of p2_gan.py's default method as a tutorial writes it: fp32, contiguous."""
    generator = Generator(**p2_gan.NET).train()
    name = p2_gan.DEFAULTS['method']
    method = p2_gan.METHODS[name]
    discriminator = Discriminator(p2_gan.DISCRIMINATOR_CHANNELS, method['norm']).train()
    average = copy.deepcopy(generator)
    optimizers = [torch.optim.Adam(net.parameters(), lr=learning_rate, betas=method['betas'])
                  for net, learning_rate in zip((generator, discriminator), method['learning_rates'])]
    rng, strength = torch.Generator().manual_seed(0), p2_gan.DEFAULTS['augment']
    penalty, steps = p2_gan.PENALTIES[name], [0]

    def step(x):
        fake = generator(torch.randn(len(x), p2_gan.NET['latent_dim'])).detach()
        real, fake = [p2_gan.augment(images, strength, rng) for images in (2 * x - 1, fake)]
        loss = p2_gan.discriminator_loss(name, discriminator(real), discriminator(fake))
        steps[0] += 1
        if steps[0] % penalty['every'] == 0:
            loss = loss + penalty['weight'] * penalty['every'] * p2_gan.gradient_penalty(
                name, discriminator, real, fake, rng)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        fake = generator(torch.randn(len(x), p2_gan.NET['latent_dim']))
        loss = p2_gan.generator_loss(name, discriminator(p2_gan.augment(fake, strength, rng)))
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        plain_average(average, generator)
    return step


def plain_dann():
    """Return the training step of p3_dann.py's default setting as a tutorial writes it: fp32, contiguous."""
    net = DigitNet(**p3_dann.NET).train()
    discriminator = DomainDiscriminator(net.features, DISCRIMINATOR_HIDDEN)
    average, rng = copy.deepcopy(net), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(list(net.parameters()) + list(discriminator.parameters()), lr=1e-3)

    def step(x, labels, target_x):
        features, target_features = [net.encoder(augment_digits(one, 1.0, rng)) for one in (x, target_x)]
        domain = domain_loss(*[discriminator(GradientReversal.apply(one, p3_dann.REVERSAL))
                                       for one in (features, target_features)])
        loss = (torch.nn.functional.cross_entropy(net.classifier(features), labels) + domain
                + p3_dann.ENTROPY * p3_dann.conditional_entropy(net.classifier(target_features)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plain_average(average, net)
    return step


def plain_adda():
    """Return the training step of p4_adda.py with all pieces, in the middle of the adaptation, likewise."""
    net = DigitNet(**p4_adda.NET).train()
    source_net, average = copy.deepcopy(net).eval(), copy.deepcopy(net)
    discriminator = DomainDiscriminator(10 * net.features, DISCRIMINATOR_HIDDEN)
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (net, discriminator)]
    rng = torch.Generator().manual_seed(0)

    def judged(features):
        return discriminator(p4_adda.discriminator_input(features, net.classifier[-1](features), True))

    def step(x, labels, target_x):
        x, view = [augment_digits(one, 1.0, rng, random_patches(target_x, rng)) for one in (x, target_x)]
        with torch.no_grad():
            source_features, probabilities = source_net.encoder(x), torch.softmax(average(target_x), 1)
        features = net.encoder(view)
        domain = domain_loss(judged(source_features), judged(features.detach()))
        optimizers[1].zero_grad()
        domain.backward()
        optimizers[1].step()
        logits = net.classifier(features)
        loss = (p4_adda.ADVERSARIAL * p4_adda.fooling_loss(judged(features))
                + torch.nn.functional.cross_entropy(net(x), labels)
                + p4_adda.confident_loss(logits, p4_adda.diversified(probabilities, probabilities.mean(0)))[0])
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        plain_average(average, net)
    return step


def plain_training(make, batches, steps, batch_size):
    """Images per second of a plain training step, with its reading of images."""
    step = make()
    for index, batch in enumerate(batches):
        if index == 2:
            start = time.perf_counter()
        if index == steps + 2:
            break
        step(*batch)
    return steps * batch_size / (time.perf_counter() - start)


def our_training(module, data_dir, steps, batch_size):
    """Images per second of a program's --train, by its own log, once it has warmed up."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = os.path.join(folder, 'run.pth')
        code = (f'import sys; sys.path.insert(0, {ROOT!r}); import {module.PROBLEM} as program; '
                'program.LOG_EVERY = 50; program.main()')
        subprocess.run([sys.executable, '-c', code, '--train', '--data_dir', data_dir, '--ckpt', ckpt,
                        '--steps', str(steps), '--batch_size', str(batch_size), '--device', 'cpu']
                       + ['--target', TARGET] * (module in (p3_dann, p4_adda)),
                       check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(folder, 'run.jsonl')) as file:
            records = [json.loads(line) for line in file]
    # the log has the mean speed since the start; the time between two of its records leaves out reading
    # the images and warming up, and what p4_adda.py does before and after the middle of its adaptation
    train = [record for record in records if record['kind'] == 'train']
    if module is p4_adda:
        train = [record for record in train if steps // 4 <= record['step'] <= steps - steps // 5]
    seconds = [record['step'] * batch_size / record['images_per_second'] for record in train]
    speed = (train[-1]['step'] - train[0]['step']) * batch_size / (seconds[-1] - seconds[0])
    return speed, records[0]['precision']


def training(args):
    """Compare the two loops of each program on this machine, in turns, and print the ratio."""
    path = os.path.join(CHECKPOINTS, 'benchmark_training.jsonl')
    for problem, module, make, read in (
            ('p1', p1_vae, plain_vae, plain_faces), ('p2', p2_gan, plain_gan, plain_faces),
            ('p3', p3_dann, plain_dann, plain_digits), ('p4', p4_adda, plain_adda, plain_digits)):
        if args.names and problem not in args.names:
            continue
        batch_size = module.DEFAULTS['batch_size']
        plain, ours = [], []
        for _ in range(2):
            plain.append(plain_training(make, read(args.data_dir, batch_size), 1920 // batch_size, batch_size))
            speed, precision = our_training(module, args.data_dir, 9600 // batch_size, batch_size)
            ours.append(speed)
        record = dict(kind='training', problem=problem, plain=max(plain), ours=max(ours),
                      ratio=max(ours) / max(plain), precision=precision, batch_size=batch_size,
                      threads=torch.get_num_threads(), torch=torch.__version__)
        print('{problem}: {ours:.0f} images/s in {precision}, plain loop {plain:.0f}, ratio {ratio:.2f}'
              .format(**record), flush=True)
        others = [old for old in (read_log(path) if os.path.exists(path) else []) if old['problem'] != problem]
        write_log(path, sorted(others + [record], key=lambda one: one['problem']))


def timed(command):
    """Run a command; return its wall time in seconds and its peak memory in MB."""
    code = ('import os, resource, subprocess, sys, time\n'
            'start = time.perf_counter()\n'
            'subprocess.check_call(sys.argv[1:])\n'
            'print(time.perf_counter() - start,'
            ' resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)')
    output = subprocess.check_output([sys.executable, '-c', code] + command)
    seconds, megabytes = output.decode().split()[-2:]
    return float(seconds), float(megabytes)


def scripts(args):
    """Wall time and peak memory of the grader's commands, beside the least they could take.

    Problems 3 and 4 label as many images as SVHN's test set has, the kit's test images again and again, in as many
    processes as there are cores; beside it the time of one process, as a ratio.
    """
    version = subprocess.check_output(['python3', '-c', 'import torch; print(torch.__version__)'])
    imports = [timed(['python3', '-c', 'import torch']) for _ in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        digits = os.path.join(folder, 'digits')
        os.mkdir(digits)
        real = os.path.abspath(os.path.join(args.data_dir, 'digits', 'svhn', 'test'))
        names = list_images(real)
        for index in range(DIGITS):
            os.symlink(os.path.join(real, names[index % len(names)]), os.path.join(digits, f'{index:05d}.png'))
        # the same program made to believe that it has one core, and with all of them
        one_core = (f'import os, sys; sys.path.insert(0, {ROOT!r}); os.sched_getaffinity = lambda pid: range(1); '
                    'import p3_dann; p3_dann.main()')
        words = ['--images', digits, '--target', 'svhn', '--out', os.path.join(folder, 'one.csv')]
        single = min(timed(['python3', '-c', one_core] + words)[0] for _ in range(2))
        several = min(timed(['python3', os.path.join(ROOT, 'p3_dann.py')] + words)[0] for _ in range(2))
        extra = dict(cores=len(os.sched_getaffinity(0)), one_process_seconds=single, processes_ratio=single / several)
        records = []
        images = {'hw3_p1.sh': 32, 'hw3_p2.sh': 32, 'hw3_p3.sh': DIGITS, 'hw3_p4.sh': DIGITS, 'hw3_p5.sh': 100}
        for script, words in (('hw3_p1.sh', ['out.png']), ('hw3_p2.sh', ['out.png']),
                              ('hw3_p3.sh', [digits, 'svhn', 'out.csv']), ('hw3_p4.sh', [digits, 'svhn', 'out.csv']),
                              ('hw3_p5.sh', ['out.png'])):
            words[-1] = os.path.join(folder, words[-1])
            runs = [timed(['bash', os.path.join(ROOT, script)] + words) for _ in range(3)]
            records.append(dict(extra if script == 'hw3_p3.sh' else {}, kind='script', script=script,
                                seconds=min(runs)[0], megabytes=max(run[1] for run in runs),
                                import_seconds=min(imports)[0],
                                images=images[script], torch=version.decode().strip()))
    for record in records:
        print('{script}: {seconds:.2f} s for {images:,} images, of which importing torch {import_seconds:.2f} s; '
              'at most {megabytes:.0f} MB (torch {torch})'.format(**record))
    print('p3_dann.py in one process {one_process_seconds:.2f} s, {processes_ratio:.2f} times as long as with {cores} '
          'cores'.format(**extra))
    path = os.path.join(CHECKPOINTS, 'benchmark_scripts.jsonl')
    if os.path.exists(path):                # one record for each torch that was measured
        records += [record for record in read_log(path) if record['torch'] != records[0]['torch']]
    write_log(path, records)


def dlib_score(args, drawn, real):
    """The scorer's line for 1,000 images of each folder, and its four numbers as texts."""
    line = subprocess.check_output([args.python, args.scorer, drawn, real, '--n', '1000']).decode().strip()
    return line, re.fullmatch(r'n (\d+)  clear ([\d.]+)  frechet ([\d.]+)  nearest ([\d.]+)', line).groups()


def samples(args):
    """Draw 1,000 faces from checkpoints and have the scorer compare them with the test faces.

    The scorer (a script of its own, with dlib) prints: n 1000  clear C  frechet F  nearest N.  It only
    measures; it chooses nothing.  More numbers are taken in the latent means of problem 1's VAE: own, the
    Frechet distance to the held-out faces by which p2_gan.py chooses, and the mean and the lowest percentile of
    the distances to the nearest training face or its mirror image, copied and copied_least (for 'real', which
    are training faces, from the held-out faces).  A name that was not given keeps its record; eight faces of
    each lie beside it for table2.  The scores of p1_lambda/... have a file of their own, and no faces.
    """
    cpu, real = torch.device('cpu'), os.path.join(args.data_dir, 'face')
    judge = load_net(VAE, p2_gan.JUDGE, 'p1_vae', cpu)[0]
    faces = FaceImages(args.data_dir, 'train').images
    rows, held_out = split_held_out(len(faces))
    training = p2_gan.latent_means(judge, torch.cat([faces[rows], faces[rows].flip(3)]), cpu)
    held_out = p2_gan.latent_means(judge, faces[held_out], cpu)
    for name in args.names or ['p1_vae', 'p2_gan', 'real']:
        record = dict(kind='samples', what=name, label='training faces', images=0)
        path = p1_vae.SAMPLES if name.startswith('p1_lambda/') else p2_gan.SAMPLES
        with tempfile.TemporaryDirectory() as folder:
            drawn = os.path.join(folder, 'faces')
            if name == 'real':
                save_single(drawn, faces[rows[:1000]])
            else:
                ckpt = os.path.join(CHECKPOINTS, name + '.pth')
                module = {'p1': p1_vae, 'p2': p2_gan}[name[:2]]
                subprocess.check_call([sys.executable, module.__file__, '--ckpt', ckpt, '--out', drawn,
                                       '--n', '1000'])
                checkpoint = load_checkpoint(ckpt, module.PROBLEM)
                settings = checkpoint['settings']
                record.update(sha256=file_sum(ckpt), images=settings['steps'] * settings['batch_size'],
                              chosen_step=checkpoint['step'], label='VAE of problem 1')
                if module is p1_vae:
                    record['lambda_kl'] = settings['lambda_kl']
                if module is p2_gan:
                    strength = settings['augment']
                    record['label'] = settings['method'] + (
                        ', not augmented' if strength == 0 else
                        '' if strength == p2_gan.DEFAULTS['augment'] else f', augmented by {strength:g}'
                        ) + (', shipped' if name == 'p2_gan' else '')
            line, numbers = dlib_score(args, drawn, os.path.join(real, 'test'))
            images = read_images(drawn, list_images(drawn), 64)
        means = p2_gan.latent_means(judge, images, cpu)
        distances = torch.cdist(held_out if name == 'real' else means, training).min(1)[0].numpy()
        record.update(zip(('clear', 'frechet', 'nearest'), map(float, numbers[1:])), n=int(numbers[0]),
                      own=p2_gan.frechet_distance(means, held_out), copied=float(distances.mean()),
                      copied_least=float(np.percentile(distances, 1)))
        if name != 'real' and path == p2_gan.SAMPLES:                  # no image of the data set is kept here
            record['picture'] = 'samples/{}_{}.png'.format(name.replace('/', '_'), record['images'])
            save_picture(os.path.join(CHECKPOINTS, record['picture']), make_grid(images[:8], 8))
        print('{what}: {line}, own {own:.2f}, copied {copied:.2f}, its lowest percentile {copied_least:.2f}'.format(
            line=line, **record), flush=True)
        # read again: another scoring may have run beside this one
        records = [old for old in (read_log(path) if os.path.exists(path) else [])
                   if old['what'] != name or '/' in name and old['images'] != record['images']]
        write_log(path, sorted(records + [record], key=lambda one: (one['what'], one['images'])))


RULE = ('a face is clearly broken if an eye, the nose or the mouth is missing, doubled or out of its place, or if the '
        'outline of the head is torn; the reader sees 32 faces of each at double size, under letters, and does not '
        'know which is which')


def strips(args):
    """Write the 32 faces of each name, at double size and under a letter in random order, into the folder --strips.

    'real' stands for test faces.  Give the pictures to somebody who does not know them, and the counts to `count`.
    """
    names, key = args.names or ['p1_vae', 'p2_gan', 'real'], {}
    random.shuffle(names)
    os.makedirs(args.strips)
    for letter, name in zip(string.ascii_uppercase, names):
        ckpt = os.path.join(CHECKPOINTS, name + '.pth')
        key[letter] = dict(what=name, **{} if name == 'real' else {'sha256': file_sum(ckpt)})
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'faces.png')
            if name == 'real':
                test = FaceImages(args.data_dir, 'test').images
                rows = np.random.RandomState(0).choice(len(test), 32, replace=False)
                save_picture(path, make_grid(test[torch.from_numpy(rows)], 8))
            else:
                module = {'p1': p1_vae, 'p2': p2_gan}[name[:2]]
                subprocess.check_call([sys.executable, module.__file__, '--out', path, '--ckpt', ckpt])
            with Image.open(path) as picture:
                picture.resize([2 * side for side in picture.size], Image.BICUBIC).save(
                    os.path.join(args.strips, letter + '.png'))
    with open(args.strips + '.key', 'w') as file:
        json.dump(key, file)


def count(args):
    """Log how many of the 32 faces of each letter a reader called broken: count A=3 B=7 --strips FOLDER."""
    with open(args.strips + '.key') as file:
        key = json.load(file)
    records = read_log(p2_gan.COUNTS) if os.path.exists(p2_gan.COUNTS) else []
    for letter, broken in [word.split('=') for word in args.names]:
        records = [old for old in records if old.get('sha256') != key[letter].get('sha256')]
        records.append(dict(key[letter], kind='count', broken=int(broken), faces=32, date=time.strftime('%Y-%m-%d'),
                            rule=RULE))
    write_log(p2_gan.COUNTS, sorted(records, key=lambda record: record['what']))


GUIDANCES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)     # with the default number of sampling steps
SAMPLINGS = (5, 10, 20, 50, 100)       # sampling steps, with the default guidance


def conditional(args):
    """Score the generators of problem 5: 100 drawn digits of each class, 500 drawn faces of each.

    accuracy is the share of the digits that the upper bound of problem 3 reads as what was asked for, frechet the
    distance to the test digits in its features, nearest and nearest_least the mean and the lowest percentile of the
    distances to the nearest training digit there.  The row 'real' has the judge's accuracy on the test digits, the
    distance from as many training digits to the test digits, and those from held-out digits to the nearest other
    training digit.  Faces are read by logistic regression on latent means of problem 1's VAE.
    """
    cpu = torch.device('cpu')
    judge = load_net(DigitNet, p5_conditional.JUDGE, 'p3_dann', cpu)[0]
    digits, test = [read_digits(args.data_dir, 'mnistm', split) for split in ('train', 'test')]
    training, held_out = split_held_out(len(digits.names))
    features = p5_conditional.features_of(judge, digits.images, cpu)

    def nearest(found):
        distances = torch.cat([torch.cdist(part, features[training]).min(1)[0] for part in found.split(100)]).numpy()
        return dict(nearest=float(distances.mean()), nearest_least=float(np.percentile(distances, 1)))

    of_test = p5_conditional.features_of(judge, test.images, cpu)
    some = features[training[np.random.RandomState(0).permutation(len(training))[:1000]]]
    records = [dict(
        kind='digits', what='real', label='real digits', sampling_steps='', guidance='', images_per_second='',
        accuracy=accuracy(judge, test.images, test.labels, cpu), frechet=frechet_distance(some, of_test),
        **nearest(features[held_out]))]
    rows = [('acgan', '', '')] + [('diffusion', p5_conditional.SAMPLING_STEPS, guidance) for guidance in GUIDANCES] + [
        ('diffusion', count, p5_conditional.GUIDANCE) for count in SAMPLINGS if count != p5_conditional.SAMPLING_STEPS]
    paths = {what: p5_conditional.path_of(what, 'digits', None) for what in p5_conditional.METHODS}
    nets = {what: load_net(p5_conditional.build, path, p5_conditional.PROBLEM, cpu)[0] for what, path in paths.items()}
    records.append(conditional_faces(args.data_dir, cpu))      # first, for it needs the most files
    for what, sampling_steps, guidance in rows:
        net, start = nets[what], time.time()
        drawn = p5_conditional.draw_images(net, p5_conditional.SCORED, 0, cpu, sampling_steps, guidance)
        speed = drawn.shape[0] * drawn.shape[1] / (time.time() - start)
        asked, drawn = torch.arange(10).repeat(len(drawn)), drawn.flatten(0, 1)
        found = p5_conditional.features_of(judge, drawn, cpu)
        records.append(dict(
            kind='digits', what=what, label=dict(acgan='ACGAN').get(what, what), sha256=file_sum(paths[what]),
            sampling_steps=sampling_steps, guidance=guidance, images_per_second=speed, cores=os.cpu_count(),
            accuracy=accuracy(judge, drawn, asked, cpu), frechet=frechet_distance(found, of_test), **nearest(found)))
        print(records[-1], flush=True)
    write_log(p5_conditional.SCORES, records)


def conditional_faces(data_dir, cpu):
    """Score the faces of ACGAN: how often a linear classifier reads the attribute that was asked for."""
    from sklearn.linear_model import LogisticRegression
    attribute = p5_conditional.ATTRIBUTE
    path = p5_conditional.path_of('acgan', 'faces', attribute)
    net = load_net(p5_conditional.build, path, p5_conditional.PROBLEM, cpu)[0]
    judge = load_net(VAE, p2_gan.JUDGE, 'p1_vae', cpu)[0]
    faces, test = [FaceImages(data_dir, split) for split in ('train', 'test')]
    of_faces, of_test = [p2_gan.latent_means(judge, one.images, cpu).numpy() for one in (faces, test)]
    classifier = LogisticRegression(solver='lbfgs', max_iter=1000).fit(of_faces, faces.attribute(attribute))
    drawn = p5_conditional.draw_images(net, 500, 0, cpu)
    named = classifier.predict(p2_gan.latent_means(judge, drawn.flatten(0, 1), cpu).numpy())
    return dict(kind='faces', what='faces', attribute=attribute, sha256=file_sum(path),
                accuracy=float((named == np.tile([False, True], 500)).mean()),
                real_accuracy=float(classifier.score(of_test, test.attribute(attribute))))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['linear_code', 'training', 'scripts', 'samples', 'strips', 'count',
                                         'conditional'])
    parser.add_argument('--data_dir', default='hw3_data')
    parser.add_argument('names', nargs='*', help='training: p1 to p4; samples, strips: checkpoints, as p2_gan, or '
                        'real; count: letters and numbers, as A=3')
    parser.add_argument('--scorer', help='samples: the face scorer')
    parser.add_argument('--strips', default='strips', help='strips, count: new folder of pictures (strips)')
    parser.add_argument('--python', default='python3', help='samples: a Python that has dlib')
    args = parser.parse_args()
    {'linear_code': linear_code, 'training': training, 'scripts': scripts,
     'samples': samples, 'strips': strips, 'count': count, 'conditional': conditional}[args.what](args)


if __name__ == '__main__':
    main()
