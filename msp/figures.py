"""The figures of a report, each a pure function of what a run logged."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from msp.losses import MAX_DEPTH

PICTURES = 6  # of a batch, in a report or on a sheet
PANELS = 4  # beside one another

# Okabe and Ito's palette: told apart with every common colour vision.
BLUE, ORANGE, GREEN, PURPLE = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
COLORS = (BLUE, '#E69F00', GREEN, PURPLE, '#56B4E9', ORANGE, '#F0E442', '#444444')
# Of Tol's muted scheme, those that are none of the others.
MORE_COLORS = ('#882255', '#DDCC77', '#332288', '#44AA99', '#999933')
LINES = (BLUE, ORANGE, GREEN, PURPLE, '#56B4E9', '#E69F00')
INK, FAINT, PALE = '#2b2f36', '#8a919c', '#e4e8ee'

STYLE = {
  'font.size': 9,
  'axes.titlesize': 10,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.edgecolor': FAINT,
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': PALE,
  'grid.linewidth': 0.8,
  'text.color': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'legend.frameon': False,
  'legend.fontsize': 8,
  'lines.linewidth': 1.6,
  'lines.markersize': 4,
  'figure.facecolor': 'white',
  'savefig.facecolor': 'white',
  'savefig.dpi': 140,
}

WIDTH = 9.0  # inches

ACRONYMS = {
  'miou': 'mIoU', 'iou': 'IoU', 'f1': 'F1', 'mae': 'MAE', 'rmse': 'RMSE',
  'auroc': 'AUROC',
}  # fmt: skip


class Layer(NamedTuple):
  """A kernel and its groups: `alive` has an entry in {0, 1} for each of them."""

  name: str
  alive: np.ndarray


class TaskPanel(NamedTuple):
  """One task of the prediction figure; arrays have a row for each picture."""

  name: str
  label: np.ndarray
  prediction: np.ndarray | None  # None: nobody has been asked
  classes: Sequence[str]
  kind: str  # as `msp.tasks.Task.kind`


def words(name: str) -> str:
  """'micro_iou_imagewise' -> 'micro IoU imagewise'."""
  return ' '.join(ACRONYMS.get(word, word) for word in name.split('_'))


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, ...]:
  """Steps and values of the rows that have `name`; null becomes NaN, a gap."""
  value = lambda row: row.get(name, {})
  pairs = [(r['step'], value(r)) for r in rows if not isinstance(value(r), Mapping)]
  steps, values = zip(*pairs, strict=True) if pairs else ((), ())
  return np.array(steps, float), np.array(values, float)  # None is NaN here


def predictions(image: np.ndarray, tasks: Sequence[TaskPanel]) -> Figure:
  """A column for each picture: the input, attribute badges, maps of each task.

  Args:
    image: shape (N, H, W, 3), uint8.
    tasks: what was asked and answered; without an answer, labels alone.
  """
  attributes = [task for task in tasks if task.kind == 'attribute']
  dense = [task for task in tasks if task.kind != 'attribute']
  num, height, width = image.shape[:3]
  margin = 1.0  # inches, for the names of rows
  cell = (WIDTH - margin) / num
  tall = cell * height / width
  badge = 0.2
  shown = [_occurring(task) if task.kind == 'segmentation' else [] for task in dense]
  legends = [
    0.18 * -(-len(classes) // 6) + 0.12 if classes else 0.06 for classes in shown
  ]
  heights = [tall]
  if attributes:
    heights.append(badge * len(attributes) + 0.05)
  for task, legend in zip(dense, legends, strict=True):
    heights += [tall] * len(_parts(task)) + [legend]
  # A fixed grid, not constrained layout: pictures must touch their neighbours.
  figure = Figure(figsize=(WIDTH, sum(heights)))
  grid = figure.add_gridspec(
    len(heights),
    num + 1,
    width_ratios=[margin] + [cell] * num,
    height_ratios=heights,
    left=0,
    right=1,
    bottom=0,
    top=1,
    wspace=0.03,
    hspace=0.03,
  )

  def row(index, label):
    axes = figure.add_subplot(grid[index, 0])
    axes.axis('off')
    axes.text(0.92, 0.5, label, ha='right', va='center', linespacing=1.3, fontsize=8)
    return [figure.add_subplot(grid[index, 1 + n]) for n in range(num)]

  def pictures(index, label, arrays):
    for axes, array in zip(row(index, label), arrays, strict=True):
      axes.imshow(array, interpolation='nearest', aspect='auto')
      axes.axis('off')

  pictures(0, 'input', image)
  if attributes:
    longest = max(len(task.name) for task in attributes) + len('  0.00 ✓')
    size = min(7.0, 72 * 0.9 * cell / (0.62 * longest))  # a letter is 0.62 wide
    for n, axes in enumerate(row(1, 'attributes')):
      axes.axis('off')
      axes.set(xlim=(0, 1), ylim=(len(attributes), 0))
      for i, task in enumerate(attributes):
        _badge(axes, i + 0.5, task, n, size)
  at = 2 if attributes else 1
  for task, occurring in zip(dense, shown, strict=True):
    paint = _PAINT[task.kind]
    for part, maps in _parts(task).items():
      painted = [paint(m, p, task.classes) for m, p in zip(maps, image, strict=True)]
      pictures(at, words(task.name).replace(' ', '\n') + f'\n{part}', painted)
      at += 1
    axes = figure.add_subplot(grid[at, :])
    axes.axis('off')
    if occurring:
      colors = class_colors(task.classes)
      axes.legend(
        handles=[Patch(color=colors[i], label=task.classes[i]) for i in occurring],
        loc='center',
        ncols=6,
        handlelength=1,
        handleheight=1,
        borderpad=0,
        columnspacing=1.4,
      )
    at += 1
  return figure


def coefficient(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
  """λ and λ/λ_max over time, and below them the hypergradient dL/dρ.

  Beside a hypergradient the steps in which a constraint overrules it are shaded.

  Args:
    rows: of the train split.
    layers: names with an entry `lambda/<name>` of their own, in layer order.
  """
  steps, values = series(rows, 'lambda')
  gradient_steps, gradients = series(rows, 'hypergradient')
  has_gradient = gradients.size > 0
  figure = Figure(figsize=(WIDTH, 5.0 if has_gradient else 2.8), layout='constrained')
  axes = figure.subplots(
    1 + has_gradient,
    1,
    sharex=True,
    squeeze=False,
    height_ratios=[3, 2][: 1 + has_gradient],
  )[:, 0]
  top = axes[0]
  shades = colormaps['viridis'](np.linspace(0, 0.9, len(layers)))
  for name, shade in zip(layers, shades, strict=True):
    _line(top, *series(rows, f'lambda/{name}'), color=shade, linewidth=0.9)
  _line(top, steps, values, color=BLUE, linewidth=2.2)
  if layers:
    top.legend(
      handles=[
        Line2D([], [], color=BLUE, linewidth=2.2, label='mean'),
        Line2D([], [], color=shades[0], label=f'first: {layers[0]}'),
        Line2D([], [], color=shades[-1], label=f'last: {layers[-1]}'),
      ]
    )
  top.set_yscale('log')
  top.grid(axis='y', which='minor', alpha=0.5)
  top.set(title='sparsity coefficient', ylabel='λ')
  _, relative = series(rows, 'lambda_relative')
  both = relative.size == values.size and values.size and relative[-1] > 0
  if both and values[-1] > 0:
    largest = values[-1] / relative[-1]
    right = top.secondary_yaxis(
      'right', functions=(lambda y: y / largest, lambda y: y * largest)
    )
    right.set_ylabel('λ / λ$_{max}$')
    right.spines['right'].set_visible(True)
  if has_gradient:
    steps, violations = series(rows, 'violation')
    edges = np.diff(np.concatenate([[0], violations > 0, [0]]))
    ends = np.append(steps, steps[-1:])  # each row stands for the steps up to the next
    for start, stop in zip(*(np.flatnonzero(edges == e) for e in (1, -1)), strict=True):
      top.axvspan(steps[start], ends[stop], color=FAINT, alpha=0.3, linewidth=0)
    below = axes[1]
    below.axhline(0, color=FAINT, linewidth=0.8)
    _raw_and_mean(below, gradient_steps, gradients, ORANGE, 'hypergradient')
    size = np.abs(gradients[np.isfinite(gradients) & (gradients != 0)])
    if size.size:
      below.set_yscale('symlog', linthresh=float(np.median(size)), linscale=1)
    below.set(title='hypergradient', ylabel='dL / dρ')
  _step_axis(axes[-1])
  return figure


def sparsity(
  train: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]
) -> Figure:
  """Share of dead groups and of zero weights over time."""
  figure = Figure(figsize=(WIDTH, 2.9), layout='constrained')
  axes = figure.subplots()
  for name, label, color in (
    ('group_sparsity', 'groups', BLUE),
    ('weight_sparsity', 'weights', ORANGE),
  ):
    rows = train if any(name in row for row in train) else validation
    steps, values = series(rows, name)
    if steps.size:
      _line(axes, steps, values, color=color, label=label)
  axes.set(title='exactly zero', ylim=(-0.02, 1.02))
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  _legend(axes)
  _step_axis(axes)
  return figure


def constraint(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Figure:
  """Hold-out loss of each task against the dense twin's, and how much is allowed.

  Args:
    rows: of the train split, with `gap/<task>` and `gap_allowed/<task>`: logarithms
      of a ratio.
    tasks: those to show.
  """
  figure, panels = _panels(len(tasks))
  for axes, task in zip(panels, tasks, strict=True):
    axes.axhline(0, color=FAINT, linewidth=0.8)
    for name, label, style in (
      ('gap_allowed', 'allowed', {'color': ORANGE, 'linestyle': '--'}),
      ('gap', 'sparse against dense', {'color': BLUE}),
    ):
      steps, values = series(rows, f'{name}/{task}')
      axes.plot(steps, np.expm1(values), label=label, **style)
    axes.set_title(words(task))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _step_axis(axes)
  _legend(panels[0], fontsize=7)
  return figure


def losses(
  train: Sequence[Mapping[str, Any]],
  validation: Sequence[Mapping[str, Any]],
  tasks: Sequence[str],
) -> Figure:
  """The total and each task's loss over time."""
  names = ['loss'] + [f'loss/{task}' for task in tasks]
  names = [n for n in names if any(n in row for row in (*train, *validation))]
  figure, panels = _panels(len(names))
  for axes, name in zip(panels, names, strict=True):
    _raw_and_mean(axes, *series(train, name), BLUE, 'train')
    if name == 'loss':
      _raw_and_mean(axes, *series(train, 'hold_out_loss'), GREEN, 'hold-out')
    _line(axes, *series(validation, name), color=ORANGE, label='validation')
    axes.set_title('total' if name == 'loss' else words(name.removeprefix('loss/')))
    _legend(axes)
    _step_axis(axes)
  return figure


def validation(
  rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Sequence[str]]
) -> Figure:
  """Metrics of the validation split over time, a panel for each task."""
  figure, panels = _panels(len(metrics))
  for axes, (task, names) in zip(panels, metrics.items(), strict=True):
    for name, color in zip(names, itertools.cycle(LINES), strict=False):
      _line(axes, *series(rows, f'{task}/{name}'), color=color, label=words(name))
    axes.set_title(words(task))
    _step_axis(axes)
    # Below: metrics of a task lie all over their panel.
    _legend(axes, fontsize=7, loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=2)
  return figure


def groups(layers: Sequence[Layer]) -> Figure:
  """Groups of each layer, all and alive, and which of them are alive."""
  row = 0.2
  figure = Figure(figsize=(WIDTH, row * len(layers) + 0.9), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=[5, 4])
  position = np.arange(len(layers))
  total = np.array([layer.alive.size for layer in layers])
  alive = np.array([layer.alive.sum() for layer in layers])
  left.barh(position, total, height=0.72, color=PALE, label='all')
  left.barh(position, alive, height=0.72, color=BLUE, label='alive')
  for y, t, a in zip(position, total, alive, strict=True):
    left.annotate(
      f'{a} / {t}',
      (t, y),
      xytext=(4, 0),
      textcoords='offset points',
      va='center',
      fontsize=7,
      color=INK if a else ORANGE,
    )
  left.set_yticks(position, [layer.name for layer in layers], fontsize=7.5)
  left.set(ylim=(len(layers) - 0.4, -0.6), xlim=(0, 1.22 * total.max()))
  left.grid(axis='y', visible=False)
  left.tick_params(axis='y', length=0)
  left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  left.set(title='groups, alive of all', xlabel='groups')
  width = 480
  strip = np.stack([_stretch(layer.alive, width) for layer in layers])
  dead, living = np.array(to_rgb(PALE)), np.array(to_rgb(BLUE))
  colored = dead + strip[..., None] * (living - dead)
  for y in position:
    right.imshow(
      colored[y : y + 1],
      extent=(0, 1, y + 0.36, y - 0.36),
      aspect='auto',
      interpolation='nearest',
    )
  right.set(title='which ones', xlabel='index of the group / number of groups')
  right.set(xlim=(0, 1), ylim=(len(layers) - 0.4, -0.6), xticks=[0, 0.5, 1])
  right.grid(visible=False)
  right.tick_params(axis='y', length=0)
  right.spines[:].set_visible(False)
  return figure


def comparison(
  titles: Sequence[str], cells: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
  """A panel for each column of a table, a line for each run, a dot for each seed.

  Args:
    titles: of the columns.
    cells: run -> for each column the values of its seeds; may be empty.
  """
  names = list(cells)
  columns = min(len(titles), 4)
  rows = -(-len(titles) // columns)
  height = 0.24 * len(names) + 0.75
  figure = Figure(figsize=(WIDTH, height * rows), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
  for axes in grid[len(titles) :]:
    axes.axis('off')
  for column, (axes, title) in enumerate(zip(grid, titles, strict=False)):
    for y, name in enumerate(names):
      values = cells[name][column]
      axes.plot(
        values, [y] * len(values), 'o', color=BLUE, alpha=0.5, markeredgewidth=0
      )
      if values:
        mean = float(np.mean(values))
        axes.plot([mean, mean], [y - 0.35, y + 0.35], color=ORANGE)
    # Long ones in two lines, broken at a space or behind a '/'.
    lines = textwrap.fill(title.replace('/', '/ '), 26).replace('/ ', '/')
    axes.set_title(lines, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis='x', labelsize=7)
  return figure


def tradeoff(
  points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  joined: Mapping[str, Sequence[str]],
) -> Figure:
  """What a run costs over what it removes: a mark for each, bars of one deviation.

  Args:
    points: run -> (dead groups in %, Δm in %), a value for each seed.
    joined: label of a grid -> its runs, in the order in which a line joins them.
  """
  figure = Figure(figsize=(WIDTH, 3.6), layout='constrained')
  axes = figure.subplots()
  axes.axhline(0, color=FAINT, linewidth=0.8)

  def draw(names, label, **style):
    deviation = lambda values: np.std(values, ddof=1) if len(values) > 1 else 0.0
    x, y, dx, dy = np.array(
      [[*map(np.mean, points[n]), *map(deviation, points[n])] for n in names]
    ).T
    axes.errorbar(x, y, dy, dx, label=label, elinewidth=0.7, **style)

  for label, names in joined.items():
    draw(names, label, color=FAINT, marker='o')
  single = [name for name in points if not any(name in g for g in joined.values())]
  styles = itertools.cycle(itertools.product('osD^', COLORS))
  for name, (marker, color) in zip(single, styles, strict=False):
    draw([name], name, color=color, marker=marker, linestyle='', markersize=6)
  axes.set(xlabel='dead groups %', ylabel='Δm %')
  axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1.01, 0.5))
  return figure


def trajectories(
  curves: Mapping[str, Mapping[int, tuple[np.ndarray, np.ndarray]]],
  title: str,
  *,
  log: bool = False,
  panels: bool = False,
) -> Figure:
  """(steps, values) over time: a colour for each run, a line for each seed.

  Args:
    curves: run -> seed -> steps and values.
    title: of the values.
    log: whether their axis is logarithmic.
    panels: whether seeds are drawn beside one another, if there are 2 to `PANELS`.
  """
  seeds = sorted({seed for by_seed in curves.values() for seed in by_seed})
  several = panels and 1 < len(seeds) <= PANELS
  parts = [[seed] for seed in seeds] if several else [seeds]
  figure = Figure(figsize=(WIDTH, 3.2), layout='constrained')
  grid = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
  styles = itertools.cycle(itertools.product(('-', '--', ':'), COLORS))
  handles = []
  for (name, by_seed), (dash, color) in zip(curves.items(), styles, strict=False):
    handles.append(Line2D([], [], color=color, linestyle=dash, label=name, linewidth=1))
    for axes, part in zip(grid, parts, strict=True):
      for seed in part:
        if seed in by_seed:
          steps, values = by_seed[seed]
          _line(axes, steps, values, color=color, linestyle=dash, linewidth=1)
  for axes, part in zip(grid, parts, strict=True):
    if log:
      axes.set_yscale('log')
    axes.set_title(f'seed {part[0]}' if several else title)
    _step_axis(axes)
  if several:
    grid[0].set_ylabel(title)
  grid[-1].legend(
    handles=handles, fontsize=7, loc='center left', bbox_to_anchor=(1.01, 0.5)
  )
  return figure


def patterns(shares: Mapping[str, Mapping[str, float]]) -> Figure:
  """Share of alive groups: a row for each run, a column for each layer.

  Args:
    shares: run -> layer -> share in [0, 1].
  """
  layers = list(dict.fromkeys(layer for row in shares.values() for layer in row))
  values = np.array(
    [[row.get(layer, np.nan) for layer in layers] for row in shares.values()]
  )
  figure = Figure(figsize=(WIDTH, 0.26 * len(shares) + 1.5), layout='constrained')
  axes = figure.subplots()
  axes.imshow(values, cmap='Blues', vmin=0, vmax=1, aspect='auto')
  axes.set_yticks(range(len(shares)), list(shares), fontsize=7.5)
  axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
  if len(layers) <= 24:
    for (i, j), value in np.ndenumerate(values):
      color = 'white' if value > 0.6 else INK
      axes.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=6, color=color)
  axes.set_title('alive groups')
  axes.grid(visible=False)
  return figure


def class_colors(classes: Sequence[str]) -> list[tuple[float, float, float]]:
  """A colour for each class; 'background' is a neutral grey."""
  base = [np.array(to_rgb(color)) for color in (*COLORS[:7], *MORE_COLORS)]
  # After twelve hues, lighter and darker ones of them.
  tints = [
    lambda c: c,
    lambda c: 0.45 * c + 0.55,
    lambda c: 0.5 * c,
    lambda c: 0.75 * c + 0.25,
    lambda c: 0.25 * c + 0.25,
    lambda c: 0.2 * c + 0.8,
  ]
  colors = [tint(color) for tint in tints for color in base]
  numbers = iter(range(len(classes)))
  return [
    to_rgb('#9aa1ab')
    if name == 'background'
    else tuple(colors[next(numbers) % len(colors)])
    for name in classes
  ]


def _parts(task):
  """The maps of a task by name: label, and prediction if there is one."""
  parts = {'label': task.label, 'prediction': task.prediction}
  return {name: maps for name, maps in parts.items() if maps is not None}


def _occurring(task):
  """Indices of the classes in a task's labels or predictions."""
  found = np.unique(np.concatenate([maps.ravel() for maps in _parts(task).values()]))
  return [int(i) for i in found if 0 <= i < len(task.classes)]


def _overlay(class_map, image, classes):
  colors = np.array([*class_colors(classes), (1.0, 1.0, 1.0)])
  ignored = (class_map < 0) | (class_map >= len(classes))
  shade = image.mean(axis=-1, keepdims=True) / 255
  painted = colors[np.where(ignored, len(classes), class_map)]
  return 0.35 * shade + 0.65 * painted


def _edge_map(probability, image, _):
  """White on black; ignored pixels (−1) are grey."""
  level = np.clip(probability, 0, 1).astype(float)[..., None] * np.ones(3)
  return np.where(probability[..., None] < 0, 0.5, level)


def _depth_map(depth, image, _):
  """Near bright, far dark, on one scale for all; black without a measurement."""
  shown = colormaps['magma_r'](np.clip(depth / MAX_DEPTH, 0, 1))[..., :3]
  return np.where(depth[..., None] > 0, shown, 0.0)


def _normal_map(normals, image, _):
  """(n + 1)/2 as a colour; black without a normal."""
  return np.where(np.any(normals, axis=-1, keepdims=True), (normals + 1) / 2, 0.0)


_PAINT = {
  'segmentation': _overlay,
  'edges': _edge_map,
  'depth': _depth_map,
  'normals': _normal_map,
}


def _badge(axes, y, task, n, size):
  """'name .97 ✓' in a box: blue if right, orange if wrong, grey if unlabelled."""
  label = int(task.label[n])
  known = label in (0, 1)
  answer = '' if task.prediction is None else f'{float(task.prediction[n]):.2f} '
  if not known:
    color, mark = FAINT, '?'
  elif not answer:
    color, mark = (BLUE if label else FAINT), task.classes[label]
  elif (task.prediction[n] >= 0.5) == bool(label):
    color, mark = BLUE, '✓'
  else:
    color, mark = ORANGE, '✗'
  axes.add_patch(Rectangle((0, y - 0.43), 1, 0.86, color=color, linewidth=0))
  axes.text(0.05, y, words(task.name), color='white', fontsize=size, va='center')
  text = answer + mark
  axes.text(0.95, y, text, color='white', fontsize=size, va='center', ha='right')


def _panels(count):
  """A grid of at most three panels a row."""
  columns = min(count, 3)
  rows = -(-count // columns)
  figure = Figure(figsize=(WIDTH, 2.5 * rows + 0.2), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False).flatten()
  for axes in grid[count:]:
    axes.axis('off')
  return figure, grid[:count]


def _line(axes, steps, values, **style):
  """A line, with markers where points are few enough to tell apart."""
  if steps.size:
    axes.plot(steps, values, marker='o' if steps.size <= 30 else None, **style)


def _raw_and_mean(axes, steps, values, color, label):
  """Single steps faintly, and their running mean over a twentieth of the run."""
  window = steps.size // 20
  if window < 2:
    _line(axes, steps, values, color=color, label=label)
    return
  axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
  finite = np.isfinite(values)
  kernel = np.ones(window)
  count = np.convolve(finite, kernel, 'same')
  total = np.convolve(np.where(finite, values, 0), kernel, 'same')
  mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
  axes.plot(steps, mean, color=color, label=label)


def _legend(axes, **style):
  if axes.lines:
    axes.legend(**style)


def _step_axis(axes):
  last = max((np.max(line.get_xdata()) for line in axes.lines), default=1)
  axes.set(xlabel='step', xlim=(0, 1.03 * last))
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))


def _stretch(alive, width):
  """Share of alive groups in each of `width` columns; few groups keep their edges."""
  edges = np.linspace(0, alive.size, width + 1)
  counted = np.concatenate([[0.0], np.cumsum(alive)])
  at_edges = np.interp(edges, np.arange(alive.size + 1), counted)
  return np.diff(at_edges) / np.diff(edges)
