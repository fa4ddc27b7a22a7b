"""Less is More (arXiv 2308.12114): task sets, dense and sparse, and a grid of λ.

  python launch.py --mode sweep --config configs/sweeps/less_is_more.py:nyu
  ... less_is_more.py:celeba
On a stand-in, small (2 CPU cores, about 3 minutes a run, 24 or 28 runs a seed):
  ... less_is_more.py:nyu,procedural,tiny
"""

import itertools

from ml_collections import ConfigDict

from configs.sweeps import base


def get_config(arg: str = '') -> ConfigDict:
  """Options: nyu, celeba or camvid; then those of the data set's configurations."""
  sweep = base.new('less_is_more', arg)
  given = base.parse(arg)
  sets = [
    chosen for n in (1, 2, 3) for chosen in itertools.combinations(given.tasks, n)
  ]
  fourth = given.more[0]
  sets += [(fourth,), (*given.tasks, fourth)]
  if given.name == 'celeba':
    _, male, third = given.tasks
    sets += [(male, fourth), (male, fourth, third)]
  for tasks in sets:
    name = ' + '.join(tasks)
    base.add(sweep, f'{name}, dense', given.multitask(), {'tasks': tasks})
    if len(tasks) == 1:
      sweep.baselines[name] = f'{name}, dense'
  for tasks in sets:
    changes = base.fixed(given.fixed) | {'tasks': tasks}
    base.add(sweep, f'{" + ".join(tasks)}, sparse', given.multitask(), changes)
  everything = {'tasks': given.tasks}
  # The published grid, or one that spans the same range of sparsity in little time.
  grid = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
  if 'tiny' in given.argument:
    grid = (1.5e-4, 5e-4, 1.5e-3, 1.5e-2, 5e-2, 1.5e-1)
  for value in grid:
    changes = base.fixed(value) | everything
    base.add(sweep, f'grid {value:g}', given.multitask(), changes)
  return sweep
