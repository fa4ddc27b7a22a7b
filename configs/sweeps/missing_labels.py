"""MTML (arXiv 2210.06989): 10, 20 and 50 % of the images lack one task's label.

  python launch.py --mode sweep --config configs/sweeps/missing_labels.py:nyu
On a stand-in or on CamVid, small (2 CPU cores, about 3 minutes a run, 12 runs a seed):
  ... missing_labels.py:nyu,procedural,tiny
"""

from ml_collections import ConfigDict

from configs.sweeps import base


def get_config(arg: str = '') -> ConfigDict:
  """Options: nyu, celeba or camvid; then those of the data set's configurations."""
  sweep = base.new('missing_labels', arg)
  given = base.parse(arg)
  everything = {'tasks': given.tasks}
  for missing in (0.0, 0.1, 0.2, 0.5):
    for name, config, changes in (
      ('multi-task', given.multitask, {}),
      ('meta', given.meta, base.NO_COEFFICIENT),
      ('meta, learned λ', given.meta, {}),
    ):
      lacking = everything | {'data.missing': missing}
      base.add(sweep, f'{name}, {missing:.0%} missing', config(), lacking, changes)
  for task in given.tasks:
    sweep.baselines[task] = 'multi-task, 0% missing'
  return sweep
