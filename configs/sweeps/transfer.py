"""The generic learning network (arXiv 2111.12146): multi-task x meta x transfer.

  python launch.py --mode sweep --config configs/sweeps/transfer.py:nyu
  ... transfer.py:nyu,sparse
  ... transfer.py:nyu,from_camvid
On stand-ins, small (2 CPU cores, about 2 minutes a run, 14 runs a seed):
  ... transfer.py:nyu,procedural,tiny

The eight corners on one data set; a backbone that is transferred has learned another
one first (faces for rooms, NYU-v2 for faces, rooms for CamVid, or the one named after
'from_') in the same way: single- or multi-task, with or without inner steps. 'sparse':
λ is learned in all of them.
"""

from ml_collections import ConfigDict

from configs.sweeps import base

FROM = {'nyu': 'celeba', 'celeba': 'nyu', 'camvid': 'nyu'}


def get_config(arg: str = '') -> ConfigDict:
  """Options: nyu, celeba or camvid; sparse, from_…; those of the configurations."""
  sweep = base.new('transfer', arg)
  named, given = base.prefixed(arg, 'from_')
  parts = [part for part in given.split(',') if part != 'sparse']
  target = base.parse(','.join(parts))
  origin = named or FROM[target.name]
  options = {part for part in parts if part != target.name}
  # CamVid has no stand-in; where it is the target its source has.
  if target.name == 'camvid':
    options.add('procedural')
  if origin == 'camvid':
    options.discard('procedural')
  source = base.parse(','.join([origin, *sorted(options)]))
  corners = [(multi, meta) for multi in (False, True) for meta in (False, True)]

  def add(setting, prefix, multi, meta, start=''):
    words = 'multi-task' if multi else 'single-task', 'meta' if meta else ''
    name = ', '.join(filter(None, (prefix, *words)))
    tasks = setting.tasks if multi else setting.tasks[:1]
    changes = base.LEARNED if 'sparse' in given.split(',') else base.NO_COEFFICIENT
    config = setting.meta() if meta else setting.multitask()
    base.add(sweep, name, config, {'tasks': tasks}, changes, start=start)
    return name

  for multi, meta in corners:
    start = add(source, f'source {source.name}', multi, meta)
    for transferred in (False, True):
      prefix = 'transferred' if transferred else 'from scratch'
      add(target, prefix, multi, meta, start=start if transferred else '')
  first, *others = target.tasks
  sweep.baselines[first] = 'from scratch, single-task'
  for task in others:
    name = f'{task} alone'
    base.add(sweep, name, target.multitask(), {'tasks': (task,)})
    sweep.baselines[task] = name
  sweep.target.update(task=first, run='from scratch, single-task')
  return sweep
