"""λ learned, against dense, against fixed λ, and from starts decades apart.

  python -m benchmarks.learned_lambda camvid --source /path/to/CamVid --out DIR
  python -m benchmarks.learned_lambda faces --out DIR
  ... rooms --rows 'dense,meta,budget 0.7' --seeds 3 --steps 450 --width 0.5
  ... faces --images 2000

A sweep (`msp.sweep`) with the `:tiny` settings, all runs of the same number of steps
and, where images are rendered, of as many (--images; 400 otherwise): the same command
goes on after a kill. Ends with DIR/table.md (mean ± standard deviation over seeds; Δm
against the dense runs of the same seeds) and DIR/report/index.html.
"""

import argparse
import logging
import sys
from pathlib import Path

from ml_collections import ConfigDict

import data
from configs.sweeps import base
from msp import sweep
from msp.errors import UserError

DATA = {
  'camvid': 'camvid,tiny',
  'faces': 'celeba,procedural,tiny',
  'rooms': 'nyu,procedural,tiny',
}
HOLDOUT = {'sparsity.objective': 'holdout'}
ONLINE = HOLDOUT | {'sparsity.hypergradient': 'online'}
# name -> (whether it has inner steps, overrides)
ROWS = {
  'dense': (False, {}),
  # On the images that a run with learned λ trains its weights on.
  'dense without hold-out': (False, {'data.hold_out': 0.2}),
  **{
    f'fixed {value:g}': (False, base.fixed(value))
    for value in (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 0.15)
  },
  **{
    f'tolerance from {start:g}': (False, base.LEARNED | {'sparsity.start': start})
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  # What is allowed, instead of what the configuration says.
  **{
    f'tolerance of {share:g}': (False, base.LEARNED | {'sparsity.tolerance': share})
    for share in (0.0, 0.02, 0.05)
  },
  **{f'budget {t:g}': (False, base.budget(t)) for t in (0.3, 0.5, 0.6, 0.7)},
  **{
    f'online from {start:g}': (False, base.LEARNED | ONLINE | {'sparsity.start': start})
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  'meta': (True, {}),
  # One step ahead, and further: as published, by the gradient through K steps.
  **{
    f'holdout K = {steps} from {start:g}': (
      True,
      HOLDOUT | {'meta.inner_steps': steps, 'sparsity.start': start},
    )
    for steps in (1, 3, 5, 10)
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  **{
    f'meta online from {start:g}': (True, ONLINE | {'sparsity.start': start})
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  'meta budget 0.7': (True, base.budget(0.7)),
  'meta dense': (True, base.NO_COEFFICIENT),
  **{
    f'K = {steps} from {start:g}': (
      True,
      {'meta.inner_steps': steps, 'sparsity.start': start},
    )
    for steps in (1, 3, 5, 10)
    for start in (1e-3, 1e-2, 1e-1, 0.5)
  },
  # One change each, of 'tolerance', 'budget 0.7', 'online' and 'meta', from 0.01.
  **{
    f'tolerance: {name}': (False, base.LEARNED | {f'sparsity.{k}': v for k, v in c})
    for name, *c in (
      ('query data', ('learn_on', 'query')),
      ('single weights', ('penalty', 'l1'), ('axis', 'weight')),
      ('never settles', ('settle', 0.0)),
      ('Euclidean prox', ('metric', 'euclidean')),
      ('no survival floor', ('min_alive', 0)),
      ('output channels', ('axis', 'out')),
      ('coupled groups', ('axis', 'coupled')),
      ('sparse group lasso', ('penalty', 'sparse_group_lasso')),
      ('group MCP', ('penalty', 'group_mcp')),
      ('group SCAD', ('penalty', 'group_scad')),
    )
  },
  'budget 0.7: group MCP': (
    False,
    base.budget(0.7) | {'sparsity.penalty': 'group_mcp'},
  ),
  'online: query data': (False, base.LEARNED | ONLINE | {'sparsity.learn_on': 'query'}),
  'meta: exact': (True, {'meta.exact': True}),
  'meta: one λ a layer': (True, {'sparsity.granularity': 'layer'}),
}


ALL_ROWS = ','.join(ROWS)


def make(
  data_set: str,
  rows: str,
  seeds: int,
  source: str = '',
  steps: int = 0,
  width: float = 0.0,
  images: int = 0,
) -> ConfigDict:
  """The sweep of some rows, whose names have commas between them."""
  made = base.new('learned_lambda', data_set)
  made.update(seeds=tuple(range(seeds)), steps=steps)
  setting = base.parse(DATA[data_set])
  if images and not setting.multitask().data.procedural_images:
    raise UserError(
      f'--images {images}: {data_set} is not rendered; leave --images out'
    )
  made.sources[setting.multitask().data.name] = source
  for name in map(str.strip, rows.split(',')):
    if name not in ROWS:
      raise UserError(f'unknown row {name!r}; known: {", ".join(ROWS)}')
    inner, changes = ROWS[name]
    size = {'model.width': width} if width else {}
    if images:
      size['data.procedural_images'] = images
    config = setting.meta() if inner else setting.multitask()
    base.add(made, name, config, changes, size)
    if name == 'dense':
      made.baselines.update({task: name for task in made.runs[-1].config.tasks})
  return made


def arguments_of(description, **options):
  """Parses the command line, and makes ready to train; `options`: name -> default."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('data_set', choices=DATA)
  parser.add_argument('--source', default='', help='folder of the data set')
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=0)
  for name, default in options.items():
    parser.add_argument(f'--{name}', type=type(default), default=default)
  logging.basicConfig(format='%(asctime)s %(message)s', force=True)
  logging.getLogger('msp').setLevel(logging.INFO)
  return parser.parse_args()


def main():
  arguments = arguments_of(__doc__, rows=ALL_ROWS, width=0.0, images=0)
  try:
    made = make(
      arguments.data_set,
      arguments.rows,
      arguments.seeds,
      arguments.source,
      arguments.steps,
      arguments.width,
      arguments.images,
    )
    page = sweep.run(made, arguments.out)
  except (UserError, data.DataError) as e:
    sys.exit(f'error: {e}')
  print((arguments.out / 'table.md').read_text())
  print(f'report: {page}')


if __name__ == '__main__':
  main()
