"""How every figure and table of the report looks: style, curves, t-SNE, confusion, mistakes, tables.

matplotlib and sklearn are imported where they are used: only --plot needs them.
"""
import decimal
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from datasets import SOURCE_OF, make_grid, write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart, and three more
COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#000000',
           '#882255', '#999999', '#666600')
WIDTH = 6.5                  # inches, at which the report prints figures; their letters have 7 to 9 points
HALF = 3.2                   # of two figures side by side
MARGIN = 8                   # white rows of pixels above and below a figure
STYLE = {'font.size': 7, 'axes.titlesize': 8, 'figure.titlesize': 9, 'axes.linewidth': 0.6, 'lines.linewidth': 0.9,
         'lines.markersize': 3, 'grid.alpha': 0.25}
DOMAIN_NAMES = {'mnistm': 'MNIST-M', 'svhn': 'SVHN', 'usps': 'USPS'}     # as figures and tables print them
SEEDS = (0, 1, 2)            # of the tables of problems 3 and 4
PER_DOMAIN = 500             # test images of each domain in a t-SNE figure
MISTAKES = 20                # wrong predictions of a scenario in a figure
NEIGHBOURS = 10              # of a test image in the space of the features


# ------------------------------------------------------------------------------------------ style

def new_figure(height, rows=1, columns=1, width=WIDTH):
    """Return a matplotlib figure of width x height inches and its axes, rows x columns of them.

    Made without pyplot, which would look for a screen.
    """
    # matplotlib refuses to be imported under the name of a backend that it does not know, a notebook's say
    os.environ['MPLBACKEND'] = 'agg'
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    matplotlib.rcdefaults()                # whatever a user's matplotlibrc says
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def save_figure(path, figure):
    """Write a figure to path at 150 dots per inch: with photographs as .jpg; else as .png, where 256 colours do.

    It keeps its width, but white rows above and below it are cut off.
    """
    def write(temporary):
        figure.savefig(temporary, format='png', dpi=150)
        with Image.open(temporary) as picture:
            picture = picture.convert('RGB')
        _, top, _, bottom = ImageOps.invert(picture).getbbox()
        picture = picture.crop((0, max(top - MARGIN, 0), picture.width, min(bottom + MARGIN, picture.height)))
        if path.endswith('.jpg'):
            picture.save(temporary, 'JPEG', quality=75, optimize=True)
        else:
            picture.quantize(256).save(temporary, 'PNG', optimize=True)
    figure.tight_layout()
    write_whole(path, write)


def log_axis(axis):
    """Put plain numbers at 1, 2, 5, 10, ... on an axis whose scale is logarithmic."""
    from matplotlib.ticker import LogLocator
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter('')


def draw_pixels(axes, pixels):
    """Fill axes with a (height, width, 3) uint8 picture; data coordinates are its pixels."""
    from matplotlib.image import AxesImage
    height, width = pixels.shape[:2]
    image = AxesImage(axes, extent=(0, width, height, 0), origin='upper', interpolation='nearest')
    image.set_data(pixels)
    axes.add_image(image)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect='equal')
    axes.axis('off')


def draw_images(axes, images, columns, left=(), above=()):
    """Fill axes with (N, 3, H, W) uint8 images in rows, with texts to the left of rows and above columns."""
    draw_pixels(axes, make_grid(images, columns))
    height, width = images.shape[2] + 2, images.shape[3] + 2       # with the gap
    for index, text in enumerate(left):
        axes.text(-6, height * (index + 0.5) + 2, text, ha='right', va='center')
    for index, text in enumerate(above):
        axes.text(width * (index + 0.5) + 2, -5 * height / 66, text, ha='center')


def rounded(value, places):
    """Return a number as text with so many decimals.  Halves go away from 0, as a reader expects, not to even."""
    step = decimal.Decimal(1).scaleb(-places)
    return f'{decimal.Decimal(f"{value:.12g}").quantize(step, decimal.ROUND_HALF_UP):,}'     # not 0.1 + 0.2


def scenario_name(target, source=None):
    """Name a scenario as figures do: USPS to MNIST-M; the source is the assignment's unless it is given."""
    return f'{DOMAIN_NAMES[source or SOURCE_OF[target]]} to {DOMAIN_NAMES[target]}'


# ------------------------------------------------------------------------------------------ t-SNE

def embed(features):
    """Map (N, dimensions) features to (N, 2) by t-SNE (van der Maaten and Hinton 2008), seed 0."""
    from sklearn.manifold import TSNE
    # the names that sklearn 0.21 and today's share; its own default of 30 needs 90 points or more
    return TSNE(init='pca', learning_rate=200.0, random_state=0,
                perplexity=min(30.0, (len(features) - 1) / 3)).fit_transform(features)


def draw_points(axes, points, labels, names):
    """Scatter (N, 2) points, one colour and shape for each label 0 .. len(names) - 1, with a legend at the right.

    The axes have no scale, since distances that t-SNE draws between groups mean nothing.
    """
    for label, name in enumerate(names):
        chosen = points[np.asarray(labels) == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=7, c=COLOURS[label], marker='o^sDvP<*>X'[label], alpha=0.75,
                     linewidths=0, label=name)
    axes.set(xlabel='t-SNE dimension 1', ylabel='t-SNE dimension 2', xticks=[], yticks=[])
    axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), handletextpad=0.1, borderpad=0.2, markerscale=1.8)


def pick_test_images(digits):
    """Return equal numbers of test images of the DigitImages of source and target, the same ones at every call.

    Returns images (N, 3, 28, 28) uint8, labels (N,) and domains (N,), 0 for the source and 1 for the target.
    """
    count = min([PER_DOMAIN] + [len(domain.names) for domain in digits])
    rows = [np.sort(np.random.RandomState(0).permutation(len(domain.names))[:PER_DOMAIN])[:count] for domain in digits]
    images, labels = [torch.cat([getattr(domain, name)[chosen] for domain, chosen in zip(digits, rows)])
                      for name in ('images', 'labels')]
    return images, labels.numpy(), np.repeat([0, 1], count)


def same_digit_share(features, labels, domains):
    """Return the share of target images' NEIGHBOURS nearest images in (N, D) features that show the same digit.

    The neighbours may be of either domain (0 the source, 1 the target); an image is not its own neighbour.
    """
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(float('inf'))
    neighbours = distances.argsort(1)[:, :NEIGHBOURS].numpy()
    return float((labels[neighbours] == labels[:, None])[domains == 1].mean())


def plot_features(path, title, features, labels, domains):
    """t-SNE of the features (N, D) of pick_test_images's images, by digit and by domain, in the same axes."""
    points = embed(features.numpy())
    figure, axes = new_figure(2.0, columns=2)
    draw_points(axes[0], points, labels, [str(digit) for digit in range(10)])
    draw_points(axes[1], points, domains, ['source', 'target'])
    axes[0].set_title(f'{title}, by digit')
    axes[1].set_title(f'{title}, by domain')
    save_figure(path, figure)


# ----------------------------------------------------------------- other figures of problems 3, 4

def plot_domains(path, domains):
    """A row of eight images of each of domains (a dict from titles to DigitImages), the same at every call."""
    figure, all_axes = new_figure(0.65 * len(domains), rows=len(domains), width=HALF)
    for axes, (title, digits) in zip(all_axes, domains.items()):
        chosen = np.random.RandomState(0).permutation(len(digits.names))[:8]
        draw_pixels(axes, make_grid(digits.images[torch.from_numpy(chosen)], columns=8))
        axes.set_title(title + ': ' + ', '.join(str(label) for label in digits.labels[chosen].tolist()))
    save_figure(path, figure)


def plot_digit_curves(path, logs, scalars, lines=()):
    """Three curves of each log over the training steps: the label loss, the discriminator's accuracy and another.

    logs maps titles to logs, scalars the names of three scalars to titles of axes; lines are the steps at which a
    dashed line stands.
    """
    figure, axes = new_figure(2.0, columns=3)
    for panel, (name, title) in zip(axes, scalars.items()):
        for colour, (label, log) in zip(COLOURS, logs.items()):
            points = [(record['step'], record[name]) for record in log if name in record]
            panel.plot(*zip(*points), color=colour, label=label)
        for step in lines:
            panel.axvline(step, color=COLOURS[6], linewidth=0.8, linestyle='--')
        panel.set(xlabel='training step', title=title, xlim=(0, log[-1]['step']))
        panel.grid(True)
    axes[0].set_yscale('log')
    log_axis(axes[0].yaxis)
    axes[1].axhline(0.5, color=COLOURS[6], linewidth=0.8, linestyle=':')       # chance
    axes[2].legend(loc='center left', bbox_to_anchor=(1, 0.5))
    save_figure(path, figure)


def plot_confusion(path, predictions):
    """How often each digit of the target's test images is labelled as each other, in %.

    predictions maps the title of a scenario to (DigitImages, probabilities (N, 10)); so it does below.
    """
    figure, all_axes = new_figure(2.5, columns=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, predictions.items()):
        counts = np.zeros((10, 10))
        np.add.at(counts, (digits.labels.numpy(), probabilities.argmax(1).numpy()), 1)
        shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        axes.pcolormesh(np.arange(11) - 0.5, np.arange(11) - 0.5, shares, cmap='Blues', vmin=0, vmax=100)
        axes.invert_yaxis()
        axes.set_aspect('equal')
        for row, column in zip(*np.nonzero(shares > 0.5)):
            axes.text(column, row, f'{shares[row, column]:.0f}', ha='center', va='center',
                      color='white' if shares[row, column] > 50 else 'black')
        axes.set_title(f'{title}: {rounded(100 * np.trace(counts) / counts.sum(), 2)} %')
        axes.set(xlabel='predicted', ylabel='digit (% of its test images)' if axes is all_axes[0] else '',
                 xticks=range(10), yticks=range(10))
    save_figure(path, figure)


def plot_mistakes(path, predictions):
    """The wrong predictions with the highest probability of each scenario, most confident first."""
    figure, all_axes = new_figure(2.2, rows=3)
    for axes, (title, (digits, probabilities)) in zip(all_axes, predictions.items()):
        confidence, classes = probabilities.max(1)
        wrong = torch.nonzero(classes != digits.labels).flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES]
        if len(wrong):
            draw_pixels(axes, make_grid(digits.images[wrong], columns=MISTAKES, gap=4))
        for index, row in enumerate(wrong.tolist()):
            axes.text(18 + 32 * index, 0, f'{digits.labels[row]}\u2192{classes[row]}', ha='center')
        axes.set_title(f'{title}: {len(wrong)} most confident mistakes (label \u2192 predicted digit)', pad=12)
    save_figure(path, figure)


def plot_bars(path, rows):
    """The accuracies of the runs of a table's rows for the assignment's three scenarios, as bars.

    rows is as in table_lines.  A bar is the mean over the seeds, and the line on it the standard deviation.
    """
    figure, axes = new_figure(1.9)
    width = 0.8 / len(rows)
    scenarios = sorted(SOURCE_OF.items())
    colours = [COLOURS[index] for index in (8, 4, 0, 6)]
    for index, (colour, (label, results, key)) in enumerate(zip(colours, rows)):
        values = [list(accuracies(results, *scenario, key=key).values()) for scenario in scenarios]
        places = np.arange(len(scenarios)) + width * (index - (len(rows) - 1) / 2)
        means, spreads = [np.mean(of_scenario) for of_scenario in values], [
            np.std(of_scenario, ddof=1) if len(of_scenario) > 1 else 0 for of_scenario in values]
        axes.bar(places, means, width, yerr=spreads, color=colour, label=label, ecolor=COLOURS[5],
                 error_kw=dict(elinewidth=1, capsize=2))
        for place, mean in zip(places, means):
            axes.text(place, mean + 2.5, rounded(mean, 1), ha='center')
    axes.set(ylim=(0, 112), ylabel='test accuracy (%)', xticks=range(len(scenarios)), yticks=range(0, 101, 20))
    axes.set_xticklabels([scenario_name(*scenario) for scenario in scenarios], fontsize=8)
    axes.legend(loc='upper center', bbox_to_anchor=(0.5, 1.16), ncol=len(rows), frameon=False)
    save_figure(path, figure)


# ----------------------------------------------------------------------------------------- tables

def accuracies(results, target, source, key='accuracy'):
    """Return the accuracies in percent of a scenario's results (dicts of models.read_results), by seed."""
    return {result['seed']: 100 * result[key] for result in results
            if (result['source'], result['target']) == (source, target)}


def table_cell(values, places):
    """Return mean and sample standard deviation of accuracies as texts; the latter is empty for fewer than two."""
    return (rounded(np.mean(values), places) if values else '',
            rounded(np.std(values, ddof=1), places) if len(values) > 1 else '')


def table_lines(rows, directions):
    """Return the lines of a table's CSV, in percent: mean and standard deviation over the seeds, and each seed.

    rows is a list of (label, results, key of the accuracy); the results may be empty.  directions maps targets to
    sources.
    """
    lines = [['row', 'source', 'target', 'runs', 'mean', 'spread'] + [f'seed {seed}' for seed in SEEDS]]
    for label, results, key in rows:
        for target, source in sorted(directions.items()):
            by_seed = accuracies(results, target, source, key)
            mean, spread = table_cell(list(by_seed.values()), 2)
            lines.append([label, DOMAIN_NAMES[source], DOMAIN_NAMES[target], str(len(by_seed)), mean, spread]
                         + [rounded(by_seed[seed], 2) if seed in by_seed else '' for seed in SEEDS])
    return lines
