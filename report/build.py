"""Build hw3_studentID.pdf from report.typ, the figures and the logs.

    pip install typst==0.15.2
    python3 p1_vae.py --plot (p2_gan.py, p3_dann.py, p4_adda.py), if a training is newer than figures/
    python3 report/build.py

No number of the text is typed by hand: values() takes them from the logs in checkpoints/ and from the
settings in the four scripts, and report.typ names them.
"""
import argparse
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
import p1_vae                                                                       # noqa: E402
import p2_gan                                                                       # noqa: E402
import p3_dann                                                                      # noqa: E402
import p4_adda                                                                      # noqa: E402
from datasets import DOMAIN_NAMES, SOURCE_OF, UserError, run_command, write_whole                                     # noqa: E402
from models import read_log                                                         # noqa: E402

CHECKPOINTS = os.path.join(ROOT, 'checkpoints')
PDF = os.path.join(ROOT, 'hw3_studentID.pdf')


def read(*parts):
    return read_log(os.path.join(CHECKPOINTS, *parts))


def training(log):
    """What the first record and the last measured speed of a training's log say, as texts."""
    run = next(record for record in log if record['kind'] == 'run')
    last = [record for record in log if record['kind'] == 'train'][-1]
    images = last['step'] * run['settings']['batch_size']
    return dict(images=f'{images:,}', epochs=f'{images / run["training_images"]:.0f}',
                minutes=f'{images / last["images_per_second"] / 60:.0f}', steps=f'{last["step"]:,}',
                batch=f'{run["settings"]["batch_size"]}', threads=f'{run["threads"]}',
                precision=run['precision'], parameters=f'{run["parameters"] / 1e6:.2f}',
                training_images=f'{run["training_images"]:,}', held_out=f'{run["held_out"]}',
                torch=run['torch'].split('+')[0])


def numbers(module, *names):
    """The settings of a script as texts, without trailing zeros."""
    return {name: f'{getattr(module, name):g}' for name in names}


def linear_mse(kl):
    """MSE of the linear-Gaussian code at a rate in nats, interpolated in its log."""
    curve = sorted((record['rate'], record['distortion']) for record in read('p1_linear_code.jsonl'))
    return float(np.interp(kl, *zip(*curve)))


def linear_mean_mse(kl):
    """The same code written as a VAE, decoded from the mean, on the test faces."""
    curve = sorted((record['test_kl'], record['test_mse']) for record in read('p1_linear_code.jsonl'))
    return float(np.interp(kl, *zip(*curve)))


def vae_values():
    log = read('p1_vae.jsonl')
    names = [name for name in sorted(os.listdir(os.path.join(CHECKPOINTS, 'p1_lambda')))
             if name.endswith('.jsonl') and not name.endswith('_last.jsonl')]
    test = log[-1]
    rows = sorted([read('p1_lambda', name)[-1] for name in names] + [test],
                  key=lambda record: record['lambda_kl'])
    table = [[f'{row["lambda_kl"]:.0e}', f'{row["kl"]:.1f}', f'{row["mse"]:.4f}',
              f'{row["mse"] / linear_mse(row["kl"]):.2f}', f'{row["mse"] / linear_mean_mse(row["kl"]):.2f}']
             for row in rows]
    return dict(training(log), table=table, kl=f'{test["kl"]:.1f}', mse=f'{test["mse"]:.4f}',
                chosen=f'{test["chosen_step"]:,}', test=f'{test["images"]:,}',
                kl_most=table[0][1], mse_least=table[0][2], kl_least=table[-1][1], mse_most=table[-1][2],
                published_kl=f'{p1_vae.PUBLISHED[0]:g}', published_mse=f'{p1_vae.PUBLISHED[1]:.4f}',
                lambda_kl=f'{p1_vae.DEFAULTS["lambda_kl"]:g}', latent=f'{p1_vae.NET["latent_dim"]}',
                **numbers(p1_vae, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'KL_WARM_UP',
                          'GRADIENT_NORM', 'AVERAGE_DECAY'))


EARLY, COMMON = 4000, 16000                # steps at which report.typ compares the methods


def method_values(name):
    """What the log of a method says at two steps: own score, gradient of G, D(real) - D(held-out)."""
    log = read('p2_methods', name + '.jsonl')
    own = {record['step']: record['frechet'] for record in log if record['kind'] == 'held_out'}
    train = [record for record in log if record['kind'] == 'train' and record['step'] <= COMMON]
    early, late = [[record for record in train if end - 2000 < record['step'] <= end] for end in (EARLY, COMMON)]

    def mean(records, key):
        return np.mean([record[key] for record in records if key in record])
    return dict(own_early=f'{own[EARLY]:.2f}', own_common=f'{own[COMMON]:.2f}',
                gradient_early=f'{mean(early, "generator_gradient"):.0f}',
                gradient_late=f'{mean(late, "generator_gradient"):.0f}',
                real=f'{mean(late, "real"):.1f}', held_out=f'{mean(late, "held_out"):.1f}',
                fake=f'{mean(late, "fake"):.1f}')


def gan_values():
    log = read('p2_gan.jsonl')
    rows = read('samples.jsonl')
    table = [[row['label'], f'{row["images"]:,}' if row['images'] else '',
              f'{row["chosen_step"]:,}' if row['images'] else '', f'{row["own"]:.2f}',
              f'{row["detected"]:.3f}', f'{row["frechet"]:.2f}', f'{row["nearest"]:.3f}',
              f'{row["copied"]:.2f}', f'{row["held_out_frechet"]:.2f}' if 'held_out_frechet' in row else '']
             for row in rows]
    settings = next(record for record in log if record['kind'] == 'run')['settings']
    methods = [[name, method['norm'], '{:g} / {:g}'.format(*method['learning_rates']),
                '{:g}, {:g}'.format(*method['betas']), str(method['generator_every'])]
               for name, method in p2_gan.METHODS.items()]
    by_name = {row['what'].replace('/', '_'): dict(zip(
        ('label', 'images', 'chosen_step', 'own', 'detected', 'frechet', 'nearest', 'copied',
         'held_out_frechet'), cells))
        for row, cells in zip(rows, table)}
    return dict(training(log), n=f'{rows[0]["n"]:,}', table=table, methods=methods, method=settings['method'],
                augment=f'{settings["augment"]:g}', chosen=f'{log[-1]["chosen_step"]:,}',
                early=f'{EARLY:,}', common=f'{COMMON:,}',
                runs={name: method_values(name) for name in ('dcgan', 'dcgan_not_augmented', 'sngan', 'wgan_gp')},
                latent=f'{p2_gan.NET["latent_dim"]}', **dict(by_name, **numbers(
                    p2_gan, 'PENALTY', 'AVERAGE_DECAY', 'SCORED')))


def accuracies(records, target, **wanted):
    """Accuracies in percent of the assignment's pair with this target, in the order of their seeds."""
    wanted.update(target=target, source=SOURCE_OF[target])
    return [100 * record['accuracy'] for record in sorted(records, key=lambda one: one['seed'])
            if all(record[name] == value for name, value in wanted.items())]


def digit_values():
    dann, adda = p3_dann.read_table(), p4_adda.read_table()
    rows = {f'{setting}_{augment:g}': (dann, dict(setting=setting, augment=augment))
            for _, setting, augment in p3_dann.ROWS}
    adabn = p3_dann.with_target_statistics([record for record in dann if record['setting'] == 'source'])
    rows.update({f'adabn_{augment:g}': (adabn, dict(augment=augment)) for augment in (0, 1)})
    for name, records in (('', adda), ('_before', p4_adda.before_adaptation(adda))):
        rows.update({'plain' + name: (records, dict(pieces='')),
                     'improved' + name: (records, dict(pieces=p4_adda.DEFAULTS['pieces'])),
                     'control' + name: (records, dict(pieces=p4_adda.CONTROLS[-1][1]))})
    means = {}
    for target in sorted(SOURCE_OF):
        for name, (records, wanted) in rows.items():
            values = accuracies(records, target, **wanted)
            means[f'{target}_{name}'] = f'{np.mean(values):.1f}' if values else 'not measured'
    told_apart = {}                        # by the discriminator, in the last record that has it
    for name, module, flags in (('dann', p3_dann, dict(setting='dann')), ('dann_entropy', p3_dann, {}),
                                ('adda', p4_adda, {}), ('plain', p4_adda, dict(pieces=''))):
        for target, source in sorted(SOURCE_OF.items()):
            path = module.run_path(dict(module.DEFAULTS, target=target, source=source, **flags))
            shares = [record['domain_accuracy'] for record in read(os.path.splitext(path)[0] + '.jsonl')
                      if 'domain_accuracy' in record]
            told_apart[f'{target}_{name}'] = f'{100 * shares[-1]:.0f}'
    ablation = [[label] + [
        f'{value:.1f}' + ''.join(f' ({before:.1f})' for before in accuracies(
            p4_adda.before_adaptation(adda), target, pieces=pieces, seed=0))
        for target in sorted(SOURCE_OF) for value in accuracies(adda, target, pieces=pieces, seed=0)]
        for label, pieces, _ in p4_adda.ROWS + p4_adda.CONTROLS]
    # of ones and sevens among the digits that runs on the stand-in saw in unlabelled images
    moments = range(5 * p4_adda.SAVE_EVERY, p4_adda.DEFAULTS['steps'] + 1, 5 * p4_adda.SAVE_EVERY)
    shares_seen = []
    names = {'+ teacher': 'without diversity and self-training', p4_adda.ROWS[-1][0]: 'improved',
             p4_adda.CONTROLS[-1][0]: 'improved, no discriminator'}
    for label, pieces, seed in [
            (names[label], pieces, seed) for label, pieces, seeds in p4_adda.ROWS + p4_adda.CONTROLS
            if label in names for seed in seeds]:
        path = p4_adda.run_path(dict(p4_adda.DEFAULTS, target='svhn', source=SOURCE_OF['svhn'],
                                     pieces=pieces, seed=seed))
        seen = {record['step']: record['predicted_shares'] for record in read(os.path.splitext(path)[0] + '.jsonl')
                if record['kind'] == 'held_out'}
        shares_seen.append([f'{label}, seed {seed}'] + [
            f'{100 * seen[step][1]:.0f} / {100 * seen[step][7]:.0f}' for step in moments])
    return dict(
        means, told_apart=told_apart, shares_seen=shares_seen,
        moments=[f'step {step:,}' for step in moments],
        scenarios=[f'{DOMAIN_NAMES[SOURCE_OF[target]]} → {DOMAIN_NAMES[target]}' for target in sorted(SOURCE_OF)],
        ablation=ablation if all(len(row) == 4 for row in ablation) else [],
        dann=dict(training(read('p3_dann_svhn.jsonl')), channels=', '.join(map(str, p3_dann.NET['channels'])),
                  dropout=f'{p3_dann.NET["dropout"]:g}', hidden=str(p3_dann.DISCRIMINATOR_HIDDEN),
                  **numbers(p3_dann, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'REVERSAL', 'ENTROPY',
                            'AVERAGE_DECAY', 'STATISTICS')),
        adda=dict(training(read('p4_adda_svhn.jsonl')),
                  **numbers(p4_adda, 'LEARNING_RATE', 'ADVERSARIAL', 'CONFIDENT', 'DIVERSITY',
                            'AVERAGE_DECAY')))


def values():
    """All that report.typ prints of results and settings: texts and tables of texts."""
    return dict(vae=vae_values(), gan=gan_values(), digits=digit_values(),
                published=[f'{value:.1f}' for value in p3_dann.PUBLISHED])


def build(args):
    try:
        import typst
    except ImportError:
        raise UserError('typst is not installed: pip install typst==0.15.2')

    def write(temporary):
        try:
            typst.compile(os.path.join(HERE, 'report.typ'), output=temporary, root=ROOT,
                          ignore_system_fonts=True, sys_inputs=dict(values=json.dumps(values())))
        except typst.TypstError as error:
            raise UserError(f'report.typ does not compile ({" ".join(str(error).split())[:200]}): if a figure is '
                            'missing, let the --plot of its problem draw it')
    write_whole(args.out, write)
    print(args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=PDF, help='PDF to write (hw3_studentID.pdf)')
    run_command(build, parser.parse_args(argv))


if __name__ == '__main__':
    main()
