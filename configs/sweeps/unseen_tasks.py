"""Meta-Sparsity (arXiv 2501.12115): adapting to a task that training has not seen.

  python launch.py --mode sweep --config configs/sweeps/unseen_tasks.py:nyu
  ... unseen_tasks.py:nyu,unseen_depth
  ... unseen_tasks.py:celeba
On a stand-in or on CamVid, small (2 CPU cores, about 2 minutes a run, 28 runs a seed):
  ... unseen_tasks.py:nyu,procedural,tiny

A network learns some tasks: dense, with a learned λ, with inner steps, with both.
Then all tasks are trained, the unseen one with a fresh head, from each of them and from
scratch, with all images and with a part of them. The table has the unseen task's metric
after the first evaluation, and when it was as good as from scratch at its end.
"""

from ml_collections import ConfigDict

from configs.sweeps import base

PATTERNS = {
  'frozen': {'sparsity.coefficient': 'frozen'},
  'free': {},
  'learned': base.LEARNED,
}


def get_config(arg: str = '') -> ConfigDict:
  """Options: nyu, celeba or camvid; unseen_…; those of the configurations."""
  sweep = base.new('unseen_tasks', arg)
  named, parts = base.prefixed(arg, 'unseen_')
  given = base.parse(parts)
  unseen = named or given.data.unseen
  known = given.tasks if 'tiny' in given.argument else (*given.tasks, *given.more)
  seen = tuple(task for task in known if task != unseen)
  everything = {'tasks': (*seen, unseen)}
  # The subsets of six tasks are 63.
  two = {'meta.episodes': '2'} if len(seen) > 4 else {}
  for name, config, changes in (
    ('dense', given.multitask, {}),
    ('sparse', given.multitask, base.LEARNED),
    ('meta, dense', given.meta, base.NO_COEFFICIENT | two),
    ('meta', given.meta, base.LEARNED | two),
  ):
    base.add(sweep, name, config(), {'tasks': seen}, changes)
  for share in (1.0, 0.5, 0.1, 0.02):
    less = {'data.train_share': share} | everything
    images = f'{share:.0%} of images'
    base.add(sweep, f'scratch, {images}', given.multitask(), less)
    for start in ('dense', 'meta, dense'):
      base.add(
        sweep, f'{start}, {images}', given.multitask(), less, start=start, adapt=True
      )
    for start in ('sparse', 'meta'):
      for pattern, changes in PATTERNS.items():
        if share < 1 and pattern != 'frozen':
          continue
        base.add(
          sweep,
          f'{start}, {pattern}, {images}',
          given.multitask(),
          less,
          changes,
          start=start,
          adapt=True,
        )
  sweep.target.update(task=unseen, run='scratch, 100% of images')
  return sweep
