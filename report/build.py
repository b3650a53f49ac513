"""Build hw3_studentID.pdf from report.typ, the figures and the logs.

    pip install typst==0.15.2
    python3 p1_vae.py --plot (likewise the scripts of problems 2 to 5), if a training is newer than figures/
    python3 report/build.py

No number of a result is typed by hand: values() takes them from the logs in checkpoints/, from the tables
(figures/*.csv) that --plot makes of them or measures, and from the settings in the scripts, and report.typ
names them.
"""
import argparse
import csv
import difflib
import itertools
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
import p5_conditional                                                               # noqa: E402
from datasets import (DIRECTIONS, HELD_OUT, PER_DOMAIN, SEEDS, SOURCE_OF, UserError, read_text, rounded,         # noqa: E402
                      run_command, scenario_name, write_whole)
from models import base_of, file_sum, read_log, rows_of                             # noqa: E402

PDF = os.path.join(ROOT, 'hw3_studentID.pdf')
# images of the data kit for training and test, as its README has them
SIZES = dict(usps=(7291, 2007), mnistm=(60000, 10000), svhn=(19253, 5001), face=(40000, 2456))


def training(log):
    """What the first record and the last measured speed of a training's log say, as texts."""
    run = next(record for record in log if record['kind'] == 'run')
    last = [record for record in log if record['kind'] == 'train'][-1]
    images = last['step'] * run['settings']['batch_size']
    return dict(images=rounded(images, 0), minutes=rounded(images / last['images_per_second'] / 60, 0),
                steps=rounded(last['step'], 0),
                epochs=rounded(images / run['training_images'], 0),
                batch=rounded(run['settings']['batch_size'], 0), parameters=rounded(run['parameters'] / 1e6, 2),
                precision={'bf16': 'bfloat16', 'fp32': 'float32'}[run['precision']],
                machine=(f'a GPU ({run["gpu"]})' if 'gpu' in run else
                         {1: 'one core', 2: 'two cores'}.get(run['threads'], f'{run["threads"]} cores')),
                **{name: rounded(run[name], 0) for name in ('training_images', 'held_out')})


def numbers(module, *names):
    """The constants of a script as texts, without trailing zeros."""
    return {name: f'{getattr(module, name):,g}' for name in names}


def power_of_ten(value):
    """A small number as people write it: 7.5 · 10⁻⁵."""
    digits, exponent = f'{value:.1e}'.split('e')
    return f'{digits} · 10' + ''.join(dict(zip('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))[one] for one in str(int(exponent)))


def values_of(records, target, source, key='accuracy', seed=None):
    """Accuracies in percent of the runs of a scenario, in the order of their seeds."""
    return [100 * record[key] for record in sorted(records, key=lambda record: record['seed'])
            if (record['target'], record['source']) == (target, source) and seed in (None, record['seed'])]


def means():
    """Mean accuracies as texts, named like svhn_dann, or in the other directions like usps_from_mnistm_dann."""
    rows = dict(rows_of('p4_adda'), **rows_of('p3_dann'))
    found = {}
    for directions in DIRECTIONS.values():
        for target, source in directions.items():
            begin = target if directions is SOURCE_OF else f'{target}_from_{source}'
            for (name, records), (key, end) in itertools.product(rows.items(), (
                    ('accuracy', ''), ('adabn_accuracy', '_adabn'), ('unadapted_accuracy', '_before'))):
                values = values_of([record for record in records if key in record], target, source, key)
                if values:
                    found[f'{begin}_{name}{end}'] = rounded(np.mean(values), 1)
    return found


def points_left():
    """Points between the means of DANN + entropy and of the upper bound, as texts."""
    rows, found = rows_of('p3_dann'), {}
    for target, source in SOURCE_OF.items():
        upper, ours = [np.mean(values_of(rows[name], target, source)) for name in ('target', 'dann_entropy')]
        found[target] = rounded(upper - ours, 1)
    return found


def told_apart():
    """Percent of the images whose domain the discriminator names, at the end of its training, seed 0."""
    found = {}
    for name, module, flags in (('dann', p3_dann, dict(setting='dann')), ('dann_entropy', p3_dann, {}),
                                ('improved', p4_adda, {}), ('plain', p4_adda, dict(pieces=''))):
        for target in SOURCE_OF:
            log = read_log(base_of(module.shipped(target, **flags)) + '.jsonl')
            shares = [record['domain_accuracy'] for record in log if 'domain_accuracy' in record]
            found[f'{target}_{name}'] = rounded(100 * shares[-1], 0)
    return found


def ablation():
    """Rows of label and accuracies of seed 0, in brackets before adaptation."""
    rows, lines = rows_of('p4_adda'), []
    for label, pieces, _ in p4_adda.ROWS + p4_adda.CONTROLS:
        records = rows[p4_adda.name_of(dict(pieces=pieces))]
        lines.append([label])
        for target, source in sorted(SOURCE_OF.items()):
            after, before = [rounded(values_of(records, target, source, key, seed=0)[0], 1)
                             for key in ('accuracy', 'unadapted_accuracy')]
            lines[-1].append(f'{after} ({before})')
    return lines


def digit_values():
    constants = p3_dann.constants()
    return dict(
        seeds=str(len(SEEDS)), held_out_images=str(HELD_OUT), per_domain=str(PER_DOMAIN),
        published=[rounded(value, 1) for value in p3_dann.PUBLISHED],
        published_improved=[rounded(value, 1) for value in p4_adda.PUBLISHED],
        means=means(), left=points_left(), told_apart=told_apart(), ablation=ablation(),
        **{key: [scenario_name(*scenario).replace(' to ', ' → ') for scenario in sorted(DIRECTIONS[name].items())]
           for key, name in (('scenarios', 'asked'), ('others', 'others'))},
        dann=dict(
            training(read_log(base_of(p3_dann.shipped('svhn')) + '.jsonl')),
            channels=', '.join(map(str, constants['NET']['channels'])), dropout=f'{constants["NET"]["dropout"]:g}',
            hidden=str(constants['DISCRIMINATOR_HIDDEN']), betas='0.9 and 0.99',
            **numbers(p3_dann, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'REVERSAL', 'ENTROPY', 'AVERAGE_DECAY',
                      'STATISTICS', 'LOG_EVERY')),
        adda=dict(
            training(read_log(base_of(p4_adda.shipped('svhn')) + '.jsonl')),
            changed_lines='\n'.join(changed_lines()),
            **numbers(p4_adda, 'ADVERSARIAL', 'CONFIDENT', 'DIVERSITY', 'SHARES_DECAY', 'AVERAGE_DECAY', 'LOG_EVERY')))


def changed_lines():
    """Of the print(model) of problem 4 the lines that differ from problem 3's, marked + and -."""
    texts = [read_text(os.path.join(ROOT, 'figures', name)) or '' for name in ('fig3_5.txt', 'fig4_3.txt')]
    return [line.rstrip() for line in difflib.ndiff(*[text.splitlines() for text in texts]) if line[0] in '+-']


def csv_rows(name):
    """The rows of a table that --plot wrote, as dicts."""
    with open(os.path.join(ROOT, 'figures', name + '.csv'), encoding='utf8') as file:
        return list(csv.DictReader(file))


def vae_values():
    log, linear = read_log(base_of(p1_vae.CKPT) + '.jsonl'), read_log(p1_vae.LINEAR_CODE)
    curve = sorted((record['test_kl'], record['test_mse']) for record in linear)
    test = log[-1]
    rows = sorted(p1_vae.sweep_of(p1_vae.CKPT), key=lambda record: record['lambda_kl'])
    # of 1,000 generated faces; the shipped net's are measured with those of problem 2
    frechet = {record['lambda_kl']: record['frechet'] for record in read_log(p1_vae.SAMPLES)}
    frechet[p1_vae.DEFAULTS['lambda_kl']] = next(
        record['frechet'] for record in read_log(p2_gan.SAMPLES) if record['what'] == 'p1_vae')
    table = []
    for row in rows:
        of_linear = float(np.interp(row['kl'], *zip(*curve)))
        table.append([power_of_ten(row['lambda_kl']), rounded(row['kl'], 1), rounded(row['mse'], 4),
                      rounded(of_linear, 4), rounded(row['mse'] / of_linear, 2), rounded(frechet[row['lambda_kl']], 1)])
    attributes, ten = [csv_rows(name) for name in ('table1_5', 'table1_3')]
    published_kl, published_mse = p1_vae.PUBLISHED
    return dict(training(log), table=table, kl=rounded(test['kl'], 1), mse=rounded(test['mse'], 4),
                chosen=rounded(test['chosen_step'], 0), test=rounded(test['images'], 0),
                kl_most=table[0][1], mse_least=table[0][2], kl_least=table[-1][1], mse_most=table[-1][2],
                short_steps=rounded(rows[0]['step'], 0), frechet_of_most=table[0][-1], frechet_of_least=table[-1][-1],
                published_kl=rounded(published_kl, 1), published_mse=rounded(published_mse, 4),
                lambda_kl=power_of_ten(p1_vae.DEFAULTS['lambda_kl']), mse_of_ten=ten[-1]['mse'],
                latent=str(p1_vae.NET['latent_dim']),
                attribute=attributes[0]['attribute'], attribute_accuracy=attributes[0]['test'],
                attributes=str(len(attributes)),
                **numbers(p1_vae, 'LEARNING_RATE', 'LEARNING_RATE_WARM_UP', 'KL_WARM_UP', 'GRADIENT_NORM',
                          'AVERAGE_DECAY'))


def gan_values():
    log = read_log(base_of(p2_gan.CKPT) + '.jsonl')
    counts = {record.get('sha256'): record for record in read_log(p2_gan.COUNTS)}       # real faces have no sum
    rows = {record['what']: record for record in read_log(p2_gan.SAMPLES)}
    for what, path in (('p1_vae', p1_vae.CKPT), ('p2_gan', p2_gan.CKPT)):
        if rows.get(what, {}).get('sha256') != file_sum(path):
            raise UserError(f'{p2_gan.SAMPLES} has no scores of {path}: let tests/benchmark.py samples measure them')
    settings = next(record for record in log if record['kind'] == 'run')['settings']
    penalties = dict(wgan_gp='norm 1 between real and generated', wgan_div='small between real and generated',
                     dragan='norm 1 near real images', r1='small at real images')
    proper = dict(dcgan='DCGAN', sngan='SNGAN', wgan_gp='WGAN-GP', wgan_div='WGAN-div', dragan='DRAGAN', r1='R1',
                  wasserstein='Wasserstein')
    methods = [[f'{proper[name]} ({name})', proper.get(method['loss'], method['loss']), method['norm'],
                penalties.get(name, 'none'), '{:g}, {:g}'.format(*method['betas']),
                {1: 'step', 5: 'fifth step'}[method['generator_every']]]
               for name, method in p2_gan.METHODS.items()]
    of_r1 = training(read_log(os.path.join(p2_gan.CHECKPOINTS, 'p2_methods', 'r1.jsonl')))
    compared = {what.split('/')[1]: rounded(row['frechet'], 1) for what, row in rows.items() if '/' in what}
    if rows['p2_gan']['sha256'] not in counts:
        raise UserError(f'{p2_gan.COUNTS} has no count of {p2_gan.CKPT}: let tests/benchmark.py strips and count '
                        'make it')
    shipped = counts[rows['p2_gan']['sha256']]
    counted = (f'A language model that did not know the method called {shipped["broken"]} of the {shipped["faces"]} '
               f'faces broken, by this rule: {shipped["rule"].split(";")[0]}.')
    earlier = [str(record['broken']) for record in counts.values()
               if record['what'] == 'p2_gan' and record is not shipped]
    return dict(training(log), n=rounded(rows['p2_gan']['n'], 0), methods=methods, counted=counted,
                compared=compared, of_r1=of_r1, earlier=earlier[-1],
                **{name: str(shipped[name]) for name in ('broken', 'faces')},
                augment=f'{settings["augment"]:g}',
                chosen=rounded(log[-1]['chosen_step'], 0),
                learning_rate=f'{p2_gan.METHODS[settings["method"]]["learning_rates"][0]:g}',
                r1_weight=f'{p2_gan.PENALTIES["r1"]["weight"]:g}',
                sngan_rate=f'{p2_gan.METHODS["sngan"]["learning_rates"][1]:g}',
                r1_every=str(p2_gan.PENALTIES['r1']['every']),
                latent=str(p2_gan.NET['latent_dim']), SAVE_EVERY=rounded(p2_gan.SAVE_EVERY, 0),
                SCORED=rounded(p2_gan.SCORED, 0), **numbers(p2_gan, 'AVERAGE_DECAY'),
                **{name: {key: rounded(rows[what][key], places) for key, places in (
                    ('frechet', 1), ('copied', 2), ('copied_least', 2))}
                   for name, what in (('of_vae', 'p1_vae'), ('shipped', 'p2_gan'), ('real', 'real'))})


def conditional_values():
    scores, logs = read_log(p5_conditional.SCORES), {}
    for name, kind in p5_conditional.KINDS.items():
        path = p5_conditional.path_of(*kind, attribute=None)
        p5_conditional.check_scores(scores, name, path)
        logs[name] = read_log(base_of(path) + '.jsonl')
    default = dict(acgan={}, real={}, diffusion=dict(sampling_steps=p5_conditional.SAMPLING_STEPS,
                                                     guidance=p5_conditional.GUIDANCE))
    rows = [record for record in scores if record['kind'] == 'digits']
    texts = dict(accuracy=lambda value: rounded(100 * value, 1), frechet=lambda value: rounded(value, 1),
                 nearest=lambda value: rounded(value, 2), nearest_least=lambda value: rounded(value, 2),
                 images_per_second=lambda value: rounded(value, 1) if value else '',
                 sampling_steps=str, guidance=lambda value: f'{value:g}' if value != '' else '')
    shown = [{name: form(row[name]) for name, form in texts.items()} for row in rows]
    table = [[row['label']] + [text[name] for name in ('sampling_steps', 'guidance', 'accuracy', 'frechet', 'nearest',
                                                       'nearest_least', 'images_per_second')]
             for row, text in zip(rows, shown)]
    found = {what: next(text for row, text in zip(rows, shown)
                        if row['what'] == what and all(row[name] == value for name, value in wanted.items()))
             for what, wanted in default.items()}
    # over the weights of the guidance, and over the steps of sampling
    found.update({f'guidance_{row["guidance"]:g}': text for row, text in zip(rows, shown)
                  if row['what'] == 'diffusion' and row['sampling_steps'] == p5_conditional.SAMPLING_STEPS})
    found.update({f'steps_{row["sampling_steps"]}': text for row, text in zip(rows, shown)
                  if row['what'] == 'diffusion' and row['guidance'] == p5_conditional.GUIDANCE})
    faces = next(record for record in scores if record['kind'] == 'faces')
    return dict(
        table=table, scores=found, drawn=rounded(10 * p5_conditional.SCORED, 0), cores=str(rows[-1]['cores']),
        faces={name: rounded(100 * faces[name], 1) for name in ('accuracy', 'real_accuracy')},
        trained={name: training(log) for name, log in logs.items()}, attribute=faces['attribute'],
        published=rounded(100 * p5_conditional.PUBLISHED, 1),
        rates=dict(diffusion=f'{p5_conditional.LEARNING_RATES["diffusion"][0]:g}',
                   acgan='{:g} and {:g}'.format(*p5_conditional.LEARNING_RATES['acgan'])),
        channels=', '.join(map(str, p5_conditional.UNET['channels'])),
        **numbers(p5_conditional, 'NOISE_STEPS', 'SAMPLING_STEPS', 'GUIDANCE', 'AVERAGE_DECAY', 'LABEL_DROPPED'))


def values():
    """All that report.typ prints of results and settings: texts and tables of texts."""
    return dict(digit_values(), vae=vae_values(), gan=gan_values(), conditional=conditional_values(),
                sizes={name: [f'{count:,}' for count in counts] for name, counts in SIZES.items()})


def build(args):
    try:
        import typst
    except ImportError:
        raise UserError('typst is not installed: pip install typst==0.15.2') from None

    def write(temporary):
        try:
            typst.compile(os.path.join(HERE, 'report.typ'), output=temporary, root=ROOT,
                          ignore_system_fonts=True, sys_inputs=dict(values=json.dumps(values())))
        except typst.TypstError as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'report.typ does not compile ({reason}): if a figure is missing, let the --plot of its '
                            'problem draw it') from error
    write_whole(args.out, write)
    print(args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=PDF, help='PDF to write (hw3_studentID.pdf)')
    run_command(build, parser.parse_args(argv))


if __name__ == '__main__':
    main()
