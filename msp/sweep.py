"""Many runs as one experiment: trains what is missing, ends with one table of all."""

import copy
import csv
import functools
import io
import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import data
from msp import dataset, figures, report, train, writer
from msp import tasks as task_module
from msp import workdir as workdir_module
from msp.errors import UserError, one_line, words
from msp.experiment import check_ranges
from msp.metrics import delta_m
from msp.monitor import constraint

logger = logging.getLogger(__name__)

Tasks = Mapping[str, task_module.Task]

# Titles of columns.
DELTA_M, DEAD, ZERO, FLOPS = 'Δm %', 'dead groups %', 'zero weights %', 'FLOPs left %'


class Result(NamedTuple):
  """What is known of one finished run."""

  config: ConfigDict
  tasks: Tasks
  rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
  layers: Mapping[str, float]  # share of alive groups; empty without groups.json

  @property
  def test(self) -> Mapping[str, float]:
    """The test metrics of the last state."""
    return next(row for row in self.rows if row['split'] == 'test')

  def series(self, split: str, name: str) -> tuple[np.ndarray, ...]:
    """Steps and values of a quantity; see `figures.series`."""
    return figures.series([r for r in self.rows if r['split'] == split], name)


Results = Mapping[str, Mapping[int, Result]]  # run -> seed -> result
Failures = Mapping[tuple[str, int], str]  # (run, seed) -> reason


def run(sweep: ConfigDict, workdir: Path, *, skip_corrupt: bool = False) -> Path:
  """Trains what is missing of a sweep, one run after another, and tables them all.

  A run of name N and seed s is an ordinary work directory, `workdir`/<N>/<s>. All runs
  of the first seed come first. One that fails is told of and the others go on, except
  those that start from it; the same command tries it again.

  Args:
    sweep: see `configs.sweeps.base.new`.
    workdir: of the sweep; gets table.md, table.csv and report/.
    skip_corrupt: see `dataset.prepare`.

  Returns:
    Path of the page with table and figures.

  Raises:
    UserError: an impossible sweep; or runs have failed, after all is written.
  """
  check(sweep)
  for entry in sweep.runs:  # or every run would fail of it
    dataset.check_source(configuration(sweep, entry, sweep.seeds[0], workdir))
  workdir_module.claim_for_sweep(workdir, sweep.name)
  with workdir_module.exclusive(workdir):
    return _run_all(sweep, workdir, skip_corrupt)


def _run_all(sweep, workdir, skip_corrupt):
  # Runs that differ in numbers only share their compiled programs.
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'compiled'))
  results: dict[str, dict[int, Result]] = {}
  failures: dict[tuple[str, int], str] = {}
  runs = {entry.name: entry for entry in sweep.runs}
  plan = [(seed, name) for seed in sweep.seeds for name in runs]
  for number, (seed, name) in enumerate(plan, 1):
    logger.info('run %d of %d: %s, seed %d', number, len(plan), name, seed)
    old = report.path(folder(workdir, name, seed)).exists()
    try:
      results.setdefault(name, {})[seed] = _run(
        sweep, runs[name], seed, workdir, failures, skip_corrupt
      )
    except Exception as e:  # whatever one run dies of, the others have to go on
      failures[name, seed] = _failure(e, folder(workdir, name, seed))
      logger.warning('%s, seed %d failed: %s', name, seed, failures[name, seed])
    # Kept programs of finished runs would fill the memory.
    jax.clear_caches()
    finished = {n: results[n] for n in runs if results.get(n)}
    if finished and not (old and number < len(plan)):
      page = write(sweep, finished, failures, workdir)
  if failures:
    by_reason = {}
    for (name, seed), why in failures.items():
      by_reason.setdefault(why, []).append(f'{name}, seed {seed}')
    more = lambda runs: f' and {len(runs) - 1} more' if len(runs) > 1 else ''
    reasons = [f'{r[0]}{more(r)}: {why}' for why, r in by_reason.items()]
    listed = '; '.join(reasons[:3])
    if len(reasons) > 3:
      listed += f'; and more ({len(reasons) - 3}), see the log'
    where = f'; the others are in {page}' if finished else ''
    raise UserError(f'{len(failures)} of {len(plan)} runs failed: {listed}{where}')
  return page


def check(sweep: ConfigDict) -> None:
  """Raises UserError on a sweep that cannot be run as it stands."""
  names = [entry.name for entry in sweep.runs]
  if not names or not sweep.seeds:
    raise UserError(f'sweep {sweep.name} has no {"seeds" if names else "runs"}')
  if sweep.steps < 0:
    raise UserError(
      f'steps of sweep {sweep.name} is {sweep.steps}; it has to be at least 1, or 0 '
      f'for those of its runs'
    )
  for seed in sweep.seeds:
    if not (isinstance(seed, int) and 0 <= seed < 2**31):
      raise UserError(f'seed {seed!r} of sweep {sweep.name} is not in [0, 2^31)')
  if len(set(sweep.seeds)) < len(sweep.seeds):
    raise UserError(f'sweep {sweep.name} has a seed twice: {sweep.seeds}')
  for entry in sweep.runs:
    config = configuration(sweep, entry, sweep.seeds[0], Path())
    try:
      dataset.make_tasks(config)
      dataset.check(config)
      check_ranges(config)
    except (UserError, data.DataError) as e:
      raise UserError(f'run {entry.name!r} of sweep {sweep.name}: {e}') from None
  read = {e.config.data.name for e in sweep.runs if not e.config.data.procedural_images}
  for name, source in sweep.sources.items():
    if source and name not in read:
      raise UserError(
        f'sources.{name} is {source}, and no run of sweep {sweep.name} reads it: leave '
        f'it out, or the option procedural'
      )
  if len({_slug(name) for name in names}) < len(names):
    raise UserError(f'two runs of sweep {sweep.name} would have one work directory')
  for position, entry in enumerate(sweep.runs):
    start = entry.start
    if start and start not in names[:position]:
      raise UserError(
        f'run {entry.name!r} of sweep {sweep.name} starts from {start!r}, which '
        f'is not a run before it'
      )
  others = list(sweep.baselines.items())
  if sweep.target.run:
    others.append((sweep.target.task, sweep.target.run))
  for task, name in others:
    if name not in names:
      raise UserError(
        f'sweep {sweep.name}: {name!r}, named for {task}, is no run of it'
      )
    if task not in sweep.runs[names.index(name)].config.tasks:
      raise UserError(f'sweep {sweep.name}: {name!r} has no task {task}')


def folder(workdir: Path, name: str, seed: int) -> Path:
  """The work directory of one run of a sweep."""
  return workdir / _slug(name) / str(seed)


def _slug(name):
  return re.sub(r'[^\w.%+-]+', '_', name)


def configuration(
  sweep: ConfigDict, entry: ConfigDict, seed: int, workdir: Path
) -> ConfigDict:
  """The complete configuration of one run, `entry` of `sweep.runs`."""
  config = copy.deepcopy(entry.config)
  config.seed = seed
  config.name = f'{sweep.name}: {entry.name}'
  if sweep.steps:
    config.train.steps = sweep.steps
    config.train.evaluate_every = min(config.train.evaluate_every, sweep.steps)
  source = dict(sweep.sources).get(config.data.name, '')
  if source and not config.data.procedural_images:
    config.data.source = source
  if entry.start:  # whatever directory the sweep is gone on with from
    config.initial = str(folder(workdir, entry.start, seed).resolve())
  return config


def _run(sweep, entry, seed, workdir, failures, skip_corrupt) -> Result:
  """The result of one run, which is trained if need be."""
  if (entry.start, seed) in failures:
    raise UserError(f'it starts from {entry.start}, which failed')
  config = configuration(sweep, entry, seed, workdir)
  place = folder(workdir, entry.name, seed)
  rows = ensure_trained(config, place, adapt=entry.adapt, skip_corrupt=skip_corrupt)
  path = place / 'groups.json'
  try:
    layers = {
      layer['name']: float(np.mean(layer['alive']))
      for layer in json.loads(path.read_text())['layers']
    }
  except FileNotFoundError:  # groups of single weights
    layers = {}
  except (ValueError, LookupError, TypeError) as e:
    raise UserError(
      f'{path} is damaged ({e}); remove {report.path(place)}, and the same command '
      f'writes both again'
    ) from None
  (place / 'error.txt').unlink(missing_ok=True)  # of an earlier attempt
  return Result(
    config,
    dataset.make_tasks(config),
    rows,
    layers,
  )


def ensure_trained(
  config: ConfigDict,
  workdir: Path,
  *,
  adapt: bool = False,
  skip_corrupt: bool = False,
) -> list[dict]:
  """The log of a run, which is trained first if it has not been to its end.

  Raises:
    UserError, data.DataError, FloatingPointError: as `train.train`; `workdir` belongs
      to another configuration.
  """
  workdir_module.check(workdir, config)  # old rows are of the same configuration
  log = workdir / writer.METRICS
  rows = writer.read(log) if log.exists() else []
  # What a run writes last. A report alone may have been asked for before its end.
  last = workdir / 'predictions.npz', report.path(workdir)
  ended = any(row['split'] == 'test' for row in rows) and all(p.exists() for p in last)
  if not ended:
    start = train.adapt if adapt else train.train
    start(config, workdir, skip_corrupt=skip_corrupt)
    rows = writer.read(log)
  return rows


def _failure(error, place):
  """The reason in a line; what nobody foresaw leaves its traceback in a file."""
  if isinstance(error, UserError | data.DataError | FloatingPointError):
    return str(error)
  if isinstance(error, OSError):
    return one_line(error)
  place.mkdir(parents=True, exist_ok=True)
  text = ''.join(traceback.format_exception(error))
  workdir_module.write(place / 'error.txt', text.encode())
  line = words(error)[:200]
  return f'{type(error).__name__}: {line} (see {place / "error.txt"})'


class Column(NamedTuple):
  """A column of the table: its title, and how many digits it deserves."""

  title: str
  digits: int = 3


def tasks_of(sweep: ConfigDict) -> Tasks:
  """Every task of a sweep, by name."""
  return {
    name: task
    for entry in sweep.runs
    for name, task in dataset.make_tasks(entry.config).items()
  }


def table(
  sweep: ConfigDict, results: Results
) -> tuple[list[Column], dict[str, list[list[float]]]]:
  """The numbers of a sweep.

  Test metrics of the last state: the primary one of every task, Δm against the runs in
  `sweep.baselines` of the same seed, dead groups and zero weights (groups are counted
  on the axis the prox used), the backbone's FLOPs once dead channels are removed,
  λ/λ_max at the end, and how fast the target was reached on the validation split.

  Args:
    sweep: the sweep.
    results: of the runs that have finished.

  Returns:
    Columns, and run -> for each of them the values of the seeds that have one.
  """
  tasks = tasks_of(sweep)
  columns = [
    Column(f'{name}/{task.primary} {"↑" if task.higher_is_better else "↓"}')
    for name, task in tasks.items()
  ]
  read = [
    lambda r, _, key=f'{name}/{task.primary}': r.test.get(key)
    for name, task in tasks.items()
  ]
  if sweep.baselines:
    columns.append(Column(DELTA_M, 2))
    read.append(functools.partial(_delta_m, sweep, results))
  columns += [Column(DEAD, 1), Column(ZERO, 1), Column(FLOPS, 1), Column('λ/λ_max')]
  read += [
    lambda r, _: 100 * r.test['group_sparsity'],
    lambda r, _: 100 * r.test['weight_sparsity'],
    _flops,
    _relative,
  ]
  if sweep.target.run:
    task = tasks[sweep.target.task]
    config = next(e.config for e in sweep.runs if e.name == sweep.target.run)
    first = min(config.train.evaluate_every, sweep.steps or config.train.steps)
    columns += [
      Column(f'{task.name}/{task.primary}, val, step {first}'),
      Column(f'steps to {sweep.target.run}', 0),
    ]
    read += [
      lambda r, _, key=f'{task.name}/{task.primary}': _at(r, key, first),
      functools.partial(_steps_to_target, sweep, results),
    ]
  cells = {}
  for name, seeds in results.items():
    values = [[f(r, seed) for seed, r in seeds.items()] for f in read]
    cells[name] = [[v for v in column if v is not None] for column in values]
  return columns, cells


def _grids(sweep, names):
  """Label -> those of the runs that differ in their fixed λ alone, three or more."""
  grids = {}
  for entry in sweep.runs:
    config = entry.config.copy_and_resolve_references()
    if entry.name in names and config.sparsity.coefficient == 'fixed':
      value, config.sparsity.value = config.sparsity.value, 0.0
      found = grids.setdefault(config.to_json_best_effort(), [])
      found.append((value, entry.name))
  grids = [[name for _, name in sorted(g)] for g in grids.values() if len(g) > 2]
  return {f'{grid[0]} to {grid[-1]}': grid for grid in grids}


def _flops(result, _):
  """In % of the backbone's; None where they have not been counted."""
  row = result.test
  if 'backbone_flops' not in row:
    return None
  return 100 * row['backbone_flops_compact'] / row['backbone_flops']


def _relative(result, _):
  values = result.series('train', 'lambda_relative')[1]
  return float(values[-1]) if values.size else None


def _delta_m(sweep, results, result, seed):
  """None without a baseline for every task on the same data set."""
  baseline = {}
  for name, task in result.tasks.items():
    other = results.get(sweep.baselines.get(name, ''), {}).get(seed)
    if other is None or not _same_data(other, result):
      return None
    key = f'{name}/{task.primary}'
    baseline[key] = other.test.get(key)
  if None in baseline.values():
    return None
  try:
    return delta_m(result.test, baseline, result.tasks)
  except UserError:  # a metric that this run lacks, or a baseline of 0
    return None


def _same_data(one, other):
  return one.config.data.name == other.config.data.name


def _at(result, key, step):
  steps, values = result.series('val', key)
  return float(values[steps == step][0]) if (steps == step).any() else None


def _steps_to_target(sweep, results, result, seed):
  """First evaluation as good as the target run's last one; None if there is none."""
  target = results.get(sweep.target.run, {}).get(seed)
  task = result.tasks.get(sweep.target.task)
  if target is None or task is None or not _same_data(target, result):
    return None
  key = f'{task.name}/{task.primary}'
  wanted = target.series('val', key)[1]
  steps, values = result.series('val', key)
  if not wanted.size:
    return None
  sign = 1 if task.higher_is_better else -1
  reached = steps[sign * values >= sign * wanted[-1]]
  return float(reached[0]) if reached.size else None


def spread(values: Sequence[float], digits: int = 3) -> str:
  """'0.512 ± 0.010', mean and standard deviation; '–' of nothing."""
  if not len(values):
    return '–'
  text = f'{np.mean(values):.{digits}f}'
  if len(values) > 1:
    text += f' ± {np.std(values, ddof=1):.{digits}f}'
  return text


def _cell(values, digits, seeds):
  """The spread, and of how many seeds if not of all."""
  text = spread(values, digits)
  few = 0 < len(values) < seeds
  return f'{text} ({len(values)} of {seeds})' if few else text


def _lines(columns, cells, results) -> Iterator[list[str]]:
  """The table as text: a head, and a line for each run."""
  yield ['run', 'seeds', *(column.title for column in columns)]
  for name, values in cells.items():
    seeds = len(results[name])
    spreads = [
      _cell(v, column.digits, seeds) for v, column in zip(values, columns, strict=True)
    ]
    yield [name, str(seeds), *spreads]


def _sheet(columns, cells, results):
  """The table, and every other number of the test rows, as CSV."""
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  shown = {'step', *(column.title.partition(' ')[0] for column in columns)}
  numbers = lambda row: {
    k: v for k, v in row.items() if k not in shown and is_number(v)
  }
  tests = {
    name: [numbers(result.test) for result in seeds.values()]
    for name, seeds in results.items()
  }
  more = dict.fromkeys(key for rows in tests.values() for row in rows for key in row)
  file = io.StringIO()
  rows = csv.writer(file)
  titles = [*(column.title for column in columns), *more]
  rows.writerow(
    ['run', *(f'{t} {what}' for t in titles for what in ('mean', 'std', 'n'))]
  )
  for name, values in cells.items():
    details = [[row[key] for row in tests[name] if key in row] for key in more]
    line = [name]
    for v in (*values, *details):
      std = np.std(v, ddof=1) if len(v) > 1 else ''
      line += [np.mean(v) if v else '', std, len(v)]
    rows.writerow(line)
  return file.getvalue()


def write(
  sweep: ConfigDict, results: Results, failures: Failures, workdir: Path
) -> Path:
  """Writes table.md, table.csv and the page with the figures.

  Args:
    sweep: the sweep.
    results: of the runs that have finished.
    failures: of those that have not.
    workdir: of the sweep.

  Returns:
    Path of the page.
  """
  columns, cells = table(sweep, results)
  lines = list(_lines(columns, cells, results))
  text = [f'| {" | ".join(line)} |' for line in lines]
  text.insert(1, '|---' * len(lines[0]) + '|')
  text += ['', 'Test split, mean ± standard deviation over seeds.']
  if sweep.baselines:
    against = ', '.join(f'{task}: {run}' for task, run in sweep.baselines.items())
    text[-1] += f' Δm against the same seed of: {against}.'
  text += [f'\nFailed: {n}, seed {s}: {why}' for (n, s), why in failures.items()]
  text += [f'\nConstraint not kept: {line}' for line in _not_kept(results)]
  content = '\n'.join(text) + '\n'
  workdir_module.write(workdir / 'table.md', content.encode())
  page = _write_page(sweep, results, failures, workdir, columns, cells, lines)
  workdir_module.write(workdir / 'table.csv', _sheet(columns, cells, results).encode())
  return page


def _not_kept(results):
  """A line for each run whose λ did not keep to its constraint."""
  for name, seeds in results.items():
    for seed, result in seeds.items():
      kept = constraint(result.rows, result.config.sparsity)
      if kept is not None and not kept.holds:
        yield f'{name}, seed {seed}: {kept.words}'


def _coefficient(result):
  """Steps and λ/λ_max of a run, from its start: the first row is of a later step."""
  steps, values = result.series('train', 'lambda_relative')
  if result.config.sparsity.coefficient == 'learned':
    start = result.config.sparsity.start
    steps, values = np.append(0, steps), np.append(start, values)
  return steps, values


def _write_page(sweep, results, failures, workdir, columns, cells, lines):
  first = next(iter(next(iter(results.values())).values()))
  stand_in = any(
    r.config.data.procedural_images or r.test.get('stand_in')
    for seeds in results.values()
    for r in seeds.values()
  )
  notes = (
    '<p class="note"><b>Not real data.</b> Some or all pictures and labels were drawn '
    'by this program, as a stand-in.</p>'
    if stand_in
    else ''
  )
  for (name, seed), why in failures.items():
    notes += (
      f'<p class="note"><b>Failed:</b> {escape(name)}, seed {seed}: {escape(why)}</p>'
    )
  if broken := list(_not_kept(results)):
    items = ''.join(f'<li>{escape(line)}</li>' for line in broken)
    notes += f'<div class="note"><b>Constraint not kept.</b><ul>{items}</ul></div>'

  def body(figure):
    rows = [('', [escape(cell) for cell in line]) for line in lines[1:]]
    yield f'<div class="card">{report.html_table(lines[0], rows, 1)}</div>'
    yield figure(
      'results',
      figures.comparison([column.title for column in columns], cells),
      'Test split, last state. A dot is a seed, the line their mean.',
    )
    titles = [column.title for column in columns]
    at = [titles.index(title) for title in (DEAD, DELTA_M) if title in titles]
    points = {
      name: (values[at[0]], values[at[-1]])
      for name, values in cells.items()
      if values[at[0]] and values[at[-1]]
    }
    if DELTA_M in titles and any(np.any(dead) for dead, _ in points.values()):
      yield figure(
        'tradeoff',
        figures.tradeoff(points, _grids(sweep, points)),
        'What is lost over what is removed, mean and standard deviation over seeds; '
        'runs that differ in their fixed λ alone are one line.',
      )
    learned = {
      name: {seed: _coefficient(r) for seed, r in seeds.items()}
      for name, seeds in results.items()
      if any('lambda_relative' in row for r in seeds.values() for row in r.rows)
    }
    if learned:
      yield figure(
        'coefficient',
        figures.trajectories(learned, 'λ / λ$_{max}$', log=True, panels=True),
        'The coefficient over time.',
      )
    for name, task in tasks_of(sweep).items():
      key = f'{name}/{task.primary}'
      curves = {
        name: {seed: r.series('val', key) for seed, r in seeds.items()}
        for name, seeds in results.items()
      }
      # A task that a run lacks, or that no picture of the split has an example of.
      drawn = lambda by_seed: any(steps.size for steps, _ in by_seed.values())
      curves = {name: by_seed for name, by_seed in curves.items() if drawn(by_seed)}
      if not curves:
        continue
      yield figure(
        f'progress_{_slug(key)}',
        figures.trajectories(curves, f'{key}, validation'),
        f'{escape(key)} on the validation split over time, a line for each seed.',
      )
    shares = {
      name: {
        layer: float(np.mean([r.layers[layer] for r in seeds.values()]))
        for layer in next(iter(seeds.values())).layers
      }
      for name, seeds in results.items()
    }
    if any(share < 1 for layers in shares.values() for share in layers.values()):
      yield figure(
        'patterns',
        figures.patterns({name: shares[name] for name in shares if shares[name]}),
        'Share of alive groups in every layer, mean over seeds: dark all, white none.',
      )

  done = sum(len(seeds) for seeds in results.values())
  return report.write_page(
    report.path(workdir),
    body,
    title=sweep.name,
    about=f'{escape(first.config.data.name)} · {len(results)} runs · '
    f'seeds {", ".join(map(str, sweep.seeds))}',
    notes=notes,
    lead=f'{done} of {len(sweep.runs) * len(sweep.seeds)} trainings finished.',
  )
