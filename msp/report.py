"""One self-contained HTML page and its figures, from a run's log alone."""

import base64
import functools
import io
import json
import string
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from msp import figures, writer
from msp.errors import UserError
from msp.monitor import constraint
from msp.workdir import write as write_file

Row = Mapping[str, Any]

# Of a task's metrics the first that is there stands for it at the top of the page.
PRIMARY = ('miou', 'balanced_accuracy', 'f1', 'rmse', 'mean_angle')
# Of another unit than the task's other metrics, whose axis would hide them.
NOT_DRAWN = ('f1_threshold', 'within_', 'images_without_label')

LEGENDS = {
  'attribute': 'Badges: probability of the attribute; blue ✓ the decision at 0.5 is '
  'right, orange ✗ it is wrong.',
  'segmentation': 'Segmentation: classes over the grey picture, white where the label '
  'is to be ignored.',
  'edges': 'Edges: white on black, grey where the label is to be ignored; the '
  'brightness of a prediction is its probability.',
  'depth': 'Depth: bright is near, black has no measurement.',
  'normals': 'Normals: red is to the right, green up, blue towards the viewer; black '
  'has none.',
}


class Log(NamedTuple):
  """What a work directory holds; `missing` says what it does not, and why."""

  config: Mapping[str, Any]
  train: Sequence[Row]
  validation: Sequence[Row]
  tests: Sequence[Row]
  layers: Sequence[figures.Layer]
  image: np.ndarray | None
  panels: Sequence[figures.TaskPanel]
  missing: Sequence[str]


def path(workdir: Path) -> Path:
  """Where the report of a run is."""
  return workdir / 'report' / 'index.html'


def write(workdir: str | Path) -> Path:
  """Writes `report/*.png` and `report/index.html`.

  Reads config.json, metrics.jsonl, groups.json and predictions.npz; no checkpoint
  and no device. Of a run that is not finished it reports what there is, and says
  what is missing.

  Args:
    workdir: of the run.

  Returns:
    The page.

  Raises:
    UserError: no metrics.jsonl, no row in it, or no place for the report.
  """
  workdir = Path(workdir)
  log = read(workdir)
  return write_page(
    path(workdir),
    functools.partial(_body, log),
    title=_title(log, workdir),
    about=_about(log),
    notes=_notes(log),
    lead=_lead(log),
  )


def write_page(
  page_path: Path,
  body: Callable[[Callable[..., str]], Iterable[str]],
  *,
  title: str,
  about: str,
  notes: str,
  lead: str,
) -> Path:
  """Writes one self-contained page, and its figures beside it as PNG files.

  Args:
    page_path: of the page; other PNG files in its folder are removed.
    body: (figure) -> parts of HTML, in order, where figure(name, drawn, caption) keeps
      a Matplotlib figure and gives its HTML.
    title: text.
    about: HTML, a line below the title.
    notes: HTML, warnings.
    lead: HTML, the result in one line.

  Returns:
    `page_path`.

  Raises:
    UserError: no place for it.
  """
  folder = page_path.parent
  try:
    folder.mkdir(exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot make {folder}: {error.strerror}') from None
  for old in folder.glob('*.png'):
    old.unlink()

  def figure(name, drawn, caption):
    content = io.BytesIO()
    drawn.savefig(content, format='png')
    write_file(folder / f'{name}.png', content.getvalue())
    encoded = base64.b64encode(content.getvalue()).decode()
    return (
      f'<figure><div class="picture"><img alt="{escape(name)}" '
      f'src="data:image/png;base64,{encoded}"></div>'
      f'<figcaption>{caption}</figcaption></figure>'
    )

  with matplotlib.rc_context(figures.STYLE):
    parts = ''.join(body(figure))
  page = string.Template(Path(__file__).with_suffix('.html').read_text()).substitute(
    title=escape(title), about=about, notes=notes, lead=lead, body=parts
  )
  write_file(page_path, page.encode())
  return page_path


def read(workdir: Path) -> Log:
  """Everything a report is made of; see `write`."""
  path = workdir / writer.METRICS
  if not path.is_file():
    raise UserError(f'no {path}: is this the work directory of a run?')
  is_known = lambda split: split in ('train', 'val') or split.startswith('test')
  rows = [row for row in writer.read(path) if is_known(row['split'])]
  if not rows:
    raise UserError(f'{path} has no row yet: nothing to report')
  missing = []

  def load(name, function, otherwise):
    try:
      return function(workdir / name)
    except FileNotFoundError:
      missing.append(f'<code>{name}</code> is not there')
    except _DAMAGED:
      missing.append(f'<code>{name}</code> cannot be read')
    return otherwise

  config = load('config.json', _config, {})
  layers = []
  if config.get('sparsity', {}).get('axis') != 'weight':  # whose masks are not written
    layers = load('groups.json', _layers, [])
  image, panels = load('predictions.npz', _panels, (None, []))
  split = lambda name: [row for row in rows if row['split'] == name]
  tests = {row['split']: row for row in rows if row['split'].startswith('test')}
  if not tests:
    missing.append('the test split has not been evaluated')
  if not split('val'):
    missing.append('the validation split has not been evaluated')
  return Log(
    config,
    split('train'),
    split('val'),
    list(tests.values()),
    layers,
    image,
    panels,
    missing,
  )


_DAMAGED = (
  OSError,
  ValueError,
  LookupError,
  TypeError,
  AttributeError,
  EOFError,
  zipfile.BadZipFile,
)


def _config(path):
  config = json.loads(path.read_text())
  return {**config} | {name: {**config.get(name, {})} for name in ('data', 'train')}


def _layers(path):
  return [
    figures.Layer(layer['name'], np.array(layer['alive'], int))
    for layer in json.loads(path.read_text())['layers']
  ]


def _panels(path):
  with path.open('rb') as opened, np.load(opened) as file:
    arrays = {
      name: file[name][: figures.PICTURES] for name in file if '/' not in name
    } | {name: file[name] for name in file if '/' in name}
  panels = []
  for key, prediction in arrays.items():
    kind, _, name = key.partition('/')
    if kind != 'prediction':
      continue
    label = arrays[f'label/{name}'][: figures.PICTURES]
    classes = [str(c) for c in arrays[f'classes/{name}']]
    panels.append(
      figures.TaskPanel(
        name,
        label,
        prediction[: figures.PICTURES],
        classes,
        str(arrays[f'kind/{name}']),
      )
    )
  return arrays['image'], panels


def _title(log, workdir):
  return log.config.get('name') or workdir.resolve().name


def _stand_in(log):
  data = log.config.get('data', {})
  found = any(row.get('stand_in') for row in log.tests)
  return bool(data.get('procedural_images')) or found


def _about(log):
  data = log.config.get('data', {})
  parts = [f'Data set: {escape(str(data.get("name", "unknown")))}']
  if _stand_in(log):
    parts[0] += ' (procedural stand-in)'
  if 'image_size' in data:
    parts.append(' × '.join(str(n) for n in data['image_size']) + ' pixels')
  tasks = _metrics(log)
  if tasks:
    parts.append(f'{len(tasks)} task{"s" * (len(tasks) > 1)}')
  if 'seed' in log.config:
    parts.append(f'seed {log.config["seed"]}')
  _, times = figures.series(log.train, 'step_time')
  if np.isfinite(times).any():
    parts.append(f'{_number(float(np.nanmedian(times)))} s a step (median)')
  return ' · '.join(parts)


def _notes(log):
  notes = ''
  if _stand_in(log):
    notes += (
      '<p class="note"><b>Not real data.</b> The pictures and labels were drawn by '
      'this program in the layout of the data set, as a stand-in. The numbers on '
      'this page say how the method behaves, not how well it does on real data.</p>'
    )
  kept = _constraint(log)
  if kept is not None and not kept.holds:
    notes += f'<p class="note"><b>Constraint not kept.</b> {escape(kept.words)}.</p>'
  if log.missing:
    items = ''.join(f'<li>{item}</li>' for item in log.missing)
    notes += (
      '<div class="note"><b>Incomplete.</b> The run has not ended, or was stopped; '
      f'this page shows what there is.<ul>{items}</ul></div>'
    )
  return notes


def _constraint(log):
  return constraint((*log.train, *log.tests), log.config.get('sparsity', {}))


def _lead(log):
  last = max(row['step'] for row in (*log.train, *log.validation, *log.tests))
  planned = log.config.get('train', {}).get('steps')
  of = f' of {_number(planned)}' if planned and planned != last else ''
  parts = [f'{_number(last)}{of} steps', _coefficient_in_words(log)]
  share, weights = (_last(log, name) for name in ('group_sparsity', 'weight_sparsity'))
  if log.layers:
    total = sum(layer.alive.size for layer in log.layers)
    dead = total - sum(int(layer.alive.sum()) for layer in log.layers)
    parts.append(
      f'<b>{dead / total:.1%}</b> of the groups exactly zero '
      f'({_number(dead)} of {_number(total)})'
    )
  elif share is not None:
    parts.append(f'<b>{share:.1%}</b> of the groups exactly zero')
  if weights is not None:
    parts.append(f'{weights:.1%} of the weights')
  # Of the last state, which the groups are of too.
  flops, left = (
    log.tests[0].get(f'backbone_flops{end}') if log.tests else None
    for end in ('', '_compact')
  )
  if flops and left < flops:
    parts.append(f'backbone FLOPs ×{left / flops:.2f} without dead channels')
  return ' · '.join(parts)


def _coefficient_in_words(log):
  _, values = figures.series(log.train, 'lambda')
  values = values[np.isfinite(values)]
  if not values.size:
    coefficient = log.config.get('sparsity', {}).get('coefficient', 'none')
    return {
      'none': 'no sparsity coefficient (dense)',
      'frozen': 'no sparsity coefficient, dead groups kept dead',
    }.get(coefficient, 'λ not logged yet')
  _, relative = figures.series(log.train, 'lambda_relative')
  relative = relative[np.isfinite(relative)]
  if not _learned(log):
    of = f' ({_number(relative[-1])} λ<sub>max</sub>)' if relative.size else ''
    return f'λ fixed at <b>{_number(values[-1])}</b>{of}'
  first, of = values[0], ''
  if relative.size:
    # The first row is not of the first step.
    start = log.config.get('sparsity', {}).get('start', relative[0])
    first *= start / relative[0]
    of = f' ({_number(start)} → {_number(relative[-1])} λ<sub>max</sub>)'
  mean = 'mean ' if _coefficient_layers(log) else ''
  return f'{mean}λ learned from <b>{_number(first)} → {_number(values[-1])}</b>{of}'


def _learned(log):
  """By the configuration; its absence, or an old log, leaves what was logged."""
  return log.config.get('sparsity', {}).get('coefficient') == 'learned' or any(
    'hypergradient' in row or 'violation' in row for row in log.train
  )


def _compared_tasks(log):
  """Tasks that were held against a dense twin."""
  names = dict.fromkeys(n for row in log.train for n in row if n.startswith('gap/'))
  return [name.removeprefix('gap/') for name in names]


def _coefficient_layers(log):
  names = dict.fromkeys(n for row in log.train for n in row if n.startswith('lambda/'))
  return [name.removeprefix('lambda/') for name in names]


def _last(log, name):
  """The newest value of a quantity, in whatever split."""
  rows = sorted((*log.train, *log.validation), key=lambda row: row['step'])
  values = [row[name] for row in rows if row.get(name) is not None]
  return values[-1] if values else None


def _metrics(log):
  """{task: metrics}, in the order they were logged; per-class ones left out."""
  found = {}
  for row in (*log.validation, *log.tests):
    for key in row:
      task, slash, metric = key.partition('/')
      if slash and task != 'loss':
        found.setdefault(task, {})[metric] = None
  return {task: [m for m in names if '/' not in m] for task, names in found.items()}


def _primary(names):
  return next((name for name in PRIMARY if name in names), names[0])


def _body(log, figure) -> Iterable[str]:
  """The sections, in order."""
  metrics = _metrics(log)
  if metrics:
    # The last state, which the sparsity figures are of too, not the best one.
    yield _tiles(metrics, log.tests[0] if log.tests else log.validation[-1])
  if log.panels:
    yield '<h2>What it sees and what it says</h2>'
    yield figure(
      'predictions',
      figures.predictions(log.image, log.panels),
      ' '.join(
        ['Pictures of the validation split.']
        + [LEGENDS[kind] for kind in dict.fromkeys(p.kind for p in log.panels)]
      ),
    )
  _, values = figures.series(log.train, 'lambda')
  dead = any(not layer.alive.all() for layer in log.layers)
  share = _last(log, 'group_sparsity')
  if values.size or dead or share:
    yield '<h2>Sparsity</h2>'
  kept = _constraint(log)
  if kept is not None and kept.holds:
    yield f'<p>Constraint kept. {escape(kept.words)}.</p>'
  if np.isfinite(values).any() and _learned(log):
    yield figure(
      'coefficient',
      figures.coefficient(log.train, _coefficient_layers(log)),
      'Top: the coefficient λ of the penalty, on a log axis; right, relative to '
      'λ<sub>max</sub>, at which the penalty outweighs the gradient of the loss in '
      'every group at the start. Bottom, if λ follows a hypergradient: '
      'derivative of the hold-out loss by ρ = log(λ/λ<sub>max</sub>), faint for each '
      'step logged, bold the running mean, symmetric log axis. Below zero, more '
      'sparsity lowers the hold-out loss. Shaded: where a constraint is violated '
      '(under the objective holdout: more groups are dead than may be by then), it '
      'leads λ, or the mean of its entries, down.',
    )
  if _compared_tasks(log):
    yield figure(
      'constraint',
      figures.constraint(log.train, _compared_tasks(log)),
      'Loss on the hold-out part against that of a dense twin trained beside the run, '
      'as a running mean over pairs on the same batch. λ rises while every task is '
      'below its dashed line, and falls while one is above; the lines end where it '
      'stands still.',
    )
  if share is not None and (values.size or share):
    yield figure(
      'sparsity',
      figures.sparsity(log.train, log.validation),
      'Share of the groups (a group is dead when all its weights are exactly 0.0), '
      'and of all weights in these layers.',
    )
  if log.layers and (values.size or dead):
    yield figure(
      'groups',
      figures.groups(log.layers),
      'Layers by name, at the end of the run. Left: number of groups, '
      'blue those alive. Right: the same groups one by one, in order of their index; '
      'blue is alive, pale is dead.',
    )
    yield _layer_table(log.layers)
  if log.train or log.validation:
    yield '<h2>Training</h2>'
    yield figure(
      'losses',
      figures.losses(log.train, log.validation, list(metrics)),
      'Losses of the tasks before they are weighted (cross entropies in nats) and '
      'their total: weighted as configured in training, the plain sum in validation. '
      'Faint: single steps; bold: their running mean.',
    )
  if metrics and log.validation:
    yield figure(
      'validation',
      figures.validation(
        log.validation,
        {
          t: [m for m in ms if not m.startswith(NOT_DRAWN)] for t, ms in metrics.items()
        },
      ),
      'Metrics on the whole validation split, at the resolution of the labels.',
    )
  if metrics:
    yield '<h2>Metrics</h2>'
    yield from _metric_tables(log, metrics)
  if log.config:
    yield '<h2>Settings</h2>'
    yield _settings(log.config)


def _tiles(metrics, row):
  split = 'validation' if row['split'] == 'val' else 'test'
  items = []
  for task, names in metrics.items():
    name = _primary(names)
    value = row.get(f'{task}/{name}')
    items.append(
      f'<li><span>{_words(task)}</span><b>{_metric(value)}</b>'
      f'<small>{_words(name)}, {split}</small></li>'
    )
  return f'<ul class="tiles">{"".join(items)}</ul>'


def _metric_tables(log, metrics):
  columns = [('validation', log.validation[-1])] if log.validation else []
  names = {'test': 'test', 'test_best': 'test, best checkpoint'}
  columns += [(names.get(row['split'], row['split']), row) for row in log.tests]
  head = ['task', 'metric', *(f'{name}, step {row["step"]:,}' for name, row in columns)]
  body = []
  for task, listed in metrics.items():
    for i, name in enumerate(listed):
      cells = [f'<b>{_words(task)}</b>' if i == 0 else '', _words(name)]
      cells += [_metric(row.get(f'{task}/{name}')) for _, row in columns]
      kind = ('group ' if i == 0 else '') + ('main' if name == _primary(listed) else '')
      body.append((kind.strip(), cells))
  yield f'<div class="card">{html_table(head, body, 2)}</div>'
  for task in metrics:
    prefix = f'{task}/iou/'
    classes = dict.fromkeys(
      key for _, row in columns for key in row if key.startswith(prefix)
    )
    if classes:
      rows = [
        ('', [_words(c.removeprefix(prefix)), *(_metric(r.get(c)) for _, r in columns)])
        for c in classes
      ]
      table = html_table(['class', *head[2:]], rows, 1)
      yield _details(f'IoU of each class of {_words(task)}', table)


def _layer_table(layers):
  rows = [
    (
      '',
      [
        f'<code>{escape(layer.name)}</code>',
        f'{layer.alive.size:,}',
        f'{int(layer.alive.sum()):,}',
        f'{1 - layer.alive.mean():.1%}',
      ],
    )
    for layer in layers
  ]
  return _details(
    'Layers as a table', html_table(['layer', 'groups', 'alive', 'dead'], rows, 1)
  )


def _settings(config):
  rows = [
    ('', [f'<code>{escape(name)}</code>', f'<code>{escape(value)}</code>'])
    for name, value in _flat(config)
  ]
  return _details('The resolved configuration', html_table(['field', 'value'], rows, 2))


def _flat(config, prefix=''):
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', json.dumps(value, ensure_ascii=False)


def html_table(
  head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], texts: int
):
  """A table of HTML cells, after `texts` columns of words numbers; (class, cells)."""
  kind = lambda i: '' if i < texts else ' class="n"'
  line = lambda tag, cells: ''.join(
    f'<{tag}{kind(i)}>{cell}</{tag}>' for i, cell in enumerate(cells)
  )
  body = ''.join(f'<tr class="{name}">{line("td", cells)}</tr>' for name, cells in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{line("th", head)}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _details(summary, content):
  return f'<details><summary>{summary}</summary>{content}</details>'


def _words(name):
  return escape(figures.words(name))


def _metric(value):
  return '–' if value is None else f'{value:.3f}'


def _number(value):
  """1,234 and 0.000123 as people write them: 1,234 and 1.23 × 10⁻⁴."""
  if isinstance(value, int):
    return f'{value:,}'
  if value == 0 or 1e-3 <= abs(value) < 1e4:
    return f'{value:.3g}'
  mantissa, exponent = f'{value:.2e}'.split('e')
  return f'{mantissa}·10<sup>{int(exponent)}</sup>'.replace('-', '−')
