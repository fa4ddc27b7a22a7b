"""Meta-Sparsity (arXiv 2501.12115): learned λ beside everything it is compared with.

  python launch.py --mode sweep --config configs/sweeps/meta_sparsity.py:nyu
  ... meta_sparsity.py:celeba
On a stand-in or on CamVid, small (2 CPU cores, 3 minutes a run, 17 to 20 runs a seed):
  ... meta_sparsity.py:nyu,procedural,tiny
  ... meta_sparsity.py:camvid,tiny --config.sources.camvid=/path/to/CamVid
"""

from ml_collections import ConfigDict

from configs.sweeps import base


def get_config(arg: str = '') -> ConfigDict:
  """Options: nyu, celeba or camvid; then those of the data set's configurations."""
  sweep = base.new('meta_sparsity', arg)
  given = base.parse(arg)
  everything = {'tasks': given.tasks}
  more = (*given.tasks, *given.more)
  for task in more:
    base.add(sweep, f'{task} alone', given.multitask(), {'tasks': (task,)})
    sweep.baselines[task] = f'{task} alone'
  no_inner, inner = given.multitask, given.meta
  # As those with learned λ, or settling would pass for an effect of inner steps.
  fixed = base.fixed(given.fixed) | {'sparsity.settle': 0.4}
  for name, config, changes in (
    ('multi-task', no_inner, {}),
    ('multi-task, fixed λ', no_inner, fixed),
    ('multi-task, 70 % dead', no_inner, base.budget(0.7)),
    ('meta', inner, base.NO_COEFFICIENT),
    ('meta, fixed λ', inner, fixed),
    ('meta, learned λ', inner, {}),
    ('meta, 70 % dead', inner, base.budget(0.7)),
    # Single weights instead of channels.
    (
      'meta, learned λ, l1',
      inner,
      {'sparsity.penalty': 'l1', 'sparsity.axis': 'weight'},
    ),
  ):
    base.add(sweep, name, config(), everything, changes)
  # Two episodes a step: the subsets of seven tasks are 127.
  two = {'meta.episodes': '2'}
  for name, config, changes in (
    ('multi-task', no_inner, {}),
    ('multi-task, fixed λ', no_inner, fixed),
    ('meta', inner, base.NO_COEFFICIENT | two),
    ('meta, fixed λ', inner, fixed | two),
    ('meta, learned λ', inner, two),
  ):
    base.add(sweep, f'{len(more)} tasks, {name}', config(), {'tasks': more}, changes)
  return sweep
