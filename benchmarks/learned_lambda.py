"""λ learned, against dense, against fixed λ, and from starts decades apart.

  python -m benchmarks.learned_lambda camvid --source /path/to/CamVid --out DIR
  python -m benchmarks.learned_lambda faces --out DIR
  ... --rows 'dense,meta,budget 0.7' --seeds 3 --steps 450

Every row and seed is an ordinary run in DIR/<row>/<seed>, so the same command goes on
after a kill, and each run has its own report. Ends with DIR/table.md (mean ± standard
deviation over seeds; Δm against the dense runs of the same seeds) and DIR/lambda.png.
All runs take the `:tiny` settings and the same number of steps.
"""

import argparse
import logging
import sys
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import data
from configs import camvid_meta, camvid_multitask, celeba_meta, celeba_multitask
from msp import tasks as task_module
from msp import train, writer
from msp import workdir as workdir_module
from msp.errors import UserError
from msp.metrics import delta_m

CONFIGS = {
  'camvid': (camvid_multitask, camvid_meta, 'tiny'),
  'faces': (celeba_multitask, celeba_meta, 'procedural,tiny'),
}
LEARNED = {'sparsity.coefficient': 'learned', 'data.hold_out': 0.2}
TOLERANCE = LEARNED | {'sparsity.objective': 'tolerance'}
BUDGET = {'sparsity.coefficient': 'learned', 'sparsity.objective': 'budget'}
HOLDOUT = {'sparsity.objective': 'holdout'}
# name -> (whether it has inner steps, overrides)
ROWS = {
  'dense': (False, {}),
  # On the images that a run with learned λ trains its weights on.
  'dense without hold-out': (False, {'data.hold_out': 0.2}),
  **{
    f'fixed {value:g}': (
      False,
      {'sparsity.coefficient': 'fixed', 'sparsity.value': value},
    )
    for value in (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 0.15)
  },
  **{
    f'tolerance from {start:g}': (False, TOLERANCE | {'sparsity.start': start})
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  **{f'budget {t:g}': (False, BUDGET | {'sparsity.target': t}) for t in (0.5, 0.7)},
  'online': (False, LEARNED | HOLDOUT | {'sparsity.hypergradient': 'online'}),
  'meta': (True, {}),
  'meta holdout': (True, HOLDOUT),
  'meta budget 0.7': (True, BUDGET | {'sparsity.target': 0.7, 'data.hold_out': 0.0}),
  'meta dense': (True, {'sparsity.coefficient': 'none'}),
}


def configuration(data_set, source, row, seed, steps):
  multitask, meta, argument = CONFIGS[data_set]
  inner, overrides = ROWS[row]
  config = (meta if inner else multitask).get_config(argument)
  config.update_from_flattened_dict(overrides | {'seed': seed})
  if source:
    config.data.source = source
  if steps:
    config.train.steps = steps
  config.name = f'{config.name}, {row}'
  return config


def run(config, workdir):
  """All rows of the run's log; trains what is missing."""
  workdir_module.check(workdir, config)  # old rows are of the same configuration
  path = workdir / writer.METRICS
  rows = writer.read(path) if path.exists() else []
  if not any(row['split'] == 'test' for row in rows):
    train.train(config, workdir)
    rows = writer.read(path)
  return rows


def spread(values):
  values = np.array(values, float)
  return f'{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}'


def table(results, tasks):
  """Markdown; `results` is {row: {seed: rows of metrics.jsonl}}."""
  test = lambda rows: next(r for r in rows if r['split'] == 'test')
  primaries = [f'{name}/{task.primary}' for name, task in tasks.items()]
  lines = [
    '| run | seeds | λ/λ_max, end | dead groups | '
    + ' | '.join(primaries)
    + ' | test loss | Δm % |',
    '|---' * (6 + len(primaries)) + '|',
  ]
  for name, seeds in results.items():
    cells = [name, str(len(seeds))]
    trained = [
      [row for row in rows if row['split'] == 'train'][-1] for rows in seeds.values()
    ]
    relative = [row['lambda_relative'] for row in trained if 'lambda_relative' in row]
    cells.append(spread(relative) if relative else '–')
    tests = {seed: test(rows) for seed, rows in seeds.items()}
    for key in ('group_sparsity', *primaries, 'loss'):
      cells.append(spread([t[key] for t in tests.values()]))
    pairs = [
      delta_m(t, test(results['dense'][seed]), tasks)
      for seed, t in tests.items()
      if seed in results.get('dense', {}) and name != 'dense'
    ]
    cells.append(spread(pairs) if pairs else '–')
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def figure(results):
  """λ/λ_max and dead groups over time, a colour for each row."""
  drawn = Figure(figsize=(8, 3.2), layout='constrained')
  axes = drawn.subplots(1, 2)
  learned = [name for name in results if 'fixed' not in name and 'dense' not in name]
  for i, name in enumerate(learned):
    for rows in results[name].values():
      rows = [row for row in rows if row['split'] == 'train']
      steps = [row['step'] for row in rows]
      for panel, key in zip(axes, ('lambda_relative', 'group_sparsity'), strict=True):
        panel.plot(steps, [row[key] for row in rows], color=f'C{i}', lw=1)
    axes[0].plot([], [], color=f'C{i}', label=name)
  axes[0].set(yscale='log', title='λ / λ$_{max}$', xlabel='step')
  axes[1].set(title='dead groups', xlabel='step', ylim=(0, 1))
  if learned:
    axes[0].legend(fontsize=7)
  return drawn


def arguments_of(description, **options):
  """Parses the command line, and makes ready to train; `options`: name -> default."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('data_set', choices=CONFIGS)
  parser.add_argument('--source', default='', help='folder of the data set')
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=0)
  for name, default in options.items():
    parser.add_argument(f'--{name}', type=type(default), default=default)
  arguments = parser.parse_args()
  logging.basicConfig(format='%(asctime)s %(message)s', force=True)
  logging.getLogger('msp').setLevel(logging.INFO)
  # Runs that differ in numbers only share their compiled programs.
  jax.config.update('jax_compilation_cache_dir', str(arguments.out / 'compiled'))
  return arguments


def main():
  arguments = arguments_of(__doc__, rows=','.join(ROWS))
  names = [name.strip() for name in arguments.rows.split(',')]
  for name in names:
    if name not in ROWS:
      sys.exit(f'error: unknown row {name!r}; known: {", ".join(ROWS)}')
  results = {}
  try:
    for seed in range(arguments.seeds):
      for name in names:
        config = configuration(
          arguments.data_set, arguments.source, name, seed, arguments.steps
        )
        rows = run(config, arguments.out / name.replace(' ', '_') / str(seed))
        results.setdefault(name, {})[seed] = rows
        labels = data.labels(config.data.name)
        tasks = task_module.make(config.tasks, labels)
        text = table({n: results[n] for n in names if n in results}, tasks)
        (arguments.out / 'table.md').write_text(text)
  except (UserError, data.DataError) as e:
    sys.exit(f'error: {e}')
  figure(results).savefig(arguments.out / 'lambda.png', dpi=150)
  print(text)
  print(f'table: {arguments.out / "table.md"}')


if __name__ == '__main__':
  main()
