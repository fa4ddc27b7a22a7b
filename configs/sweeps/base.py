"""What all sweeps share: their fields, and the data sets they can be run on."""

from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import (
  camvid_meta,
  camvid_multitask,
  celeba_meta,
  celeba_multitask,
  common,
  nyud_meta,
  nyud_multitask,
)

LEARNED = {
  'sparsity.coefficient': 'learned',
  'sparsity.objective': 'tolerance',
  'sparsity.settle': 0.4,  # or the hold-out images never reach the weights
  'data.hold_out': 0.2,
}
NO_COEFFICIENT = {'sparsity.coefficient': 'none', 'data.hold_out': 0.0}


def fixed(value: float) -> dict[str, Any]:
  """Changes that fix λ."""
  return NO_COEFFICIENT | {'sparsity.coefficient': 'fixed', 'sparsity.value': value}


def budget(target: float) -> dict[str, Any]:
  """Changes that lead λ to a share of dead groups."""
  return {
    'sparsity.coefficient': 'learned',
    'sparsity.objective': 'budget',
    'sparsity.target': target,
    'sparsity.settle': 0.4,  # and then what is left trains without λ
    'data.hold_out': 0.0,
  }


class DataSet(NamedTuple):
  """Configurations of a data set, and what its experiments are about."""

  multitask: ModuleType
  meta: ModuleType
  more: tuple[str, ...]  # tasks that join those of the configurations
  unseen: str  # the task to adapt to


DATA_SETS = {
  'nyu': DataSet(nyud_multitask, nyud_meta, ('edges',), 'edges'),
  'celeba': DataSet(
    celeba_multitask,
    celeba_meta,
    ('arched_eyebrows', 'wearing_lipstick', 'high_cheekbones', 'big_lips'),
    'segmentation',
  ),
  'camvid': DataSet(
    camvid_multitask,
    camvid_meta,
    ('presence_fence', 'presence_sign'),
    'edges',
  ),
}


class Setting(NamedTuple):
  """What the option of a sweep file says."""

  name: str  # of the data set
  data: DataSet
  argument: str  # for its configurations
  tasks: tuple[str, ...]  # three
  more: tuple[str, ...]  # those that join them
  fixed: float  # λ of the option 'fixed'

  def multitask(self) -> ConfigDict:
    """A fresh configuration without inner steps: dense."""
    return self.data.multitask.get_config(self.argument)

  def meta(self) -> ConfigDict:
    """A fresh configuration with inner steps and a learned λ."""
    return self.data.meta.get_config(self.argument)


def parse(arg: str) -> Setting:
  """Reads 'nyu,procedural,tiny': a data set, 'procedural' if it has to be, 'tiny'."""
  given = common.options(arg, (*DATA_SETS, 'procedural', 'tiny'))
  names = given & DATA_SETS.keys()
  if len(names) != 1:
    raise ValueError(
      f'a sweep needs one data set after the colon, such as :nyu; known: '
      f'{", ".join(DATA_SETS)}'
    )
  (name,) = names
  chosen = DATA_SETS[name]
  argument = ','.join(sorted(given - names))
  tasks = chosen.multitask.get_config(argument).tasks[:3]
  fixed = chosen.multitask.get_config(f'{argument},fixed').sparsity.value
  return Setting(name, chosen, argument, tasks, chosen.more, fixed)


def prefixed(arg: str, prefix: str) -> tuple[str, str]:
  """Takes the option with a prefix out: what follows it ('' without), and the rest."""
  parts = arg.split(',')
  named = [part for part in parts if part.startswith(prefix)]
  if len(named) > 1:
    raise ValueError(f'only one of these can be chosen: {", ".join(named)}')
  rest = ','.join(part for part in parts if part not in named)
  return ''.join(named).removeprefix(prefix), rest


def new(stem: str, arg: str) -> ConfigDict:
  """A sweep without runs; see `add`."""
  sweep = ConfigDict()
  sweep.name = common.name(stem, {part for part in arg.split(',') if part})
  sweep.seeds = (0, 1, 2)
  # Folders of the published files, instead of the configurations' own.
  sweep.sources = ConfigDict(dict.fromkeys(('celebamask_hq', 'nyud_mt', 'camvid'), ''))
  sweep.steps = 0  # of every run, instead of its own number
  sweep.runs = []  # see `add`
  sweep.baselines = ConfigDict()  # task -> the run Δm compares it with
  sweep.target = ConfigDict({'task': '', 'run': ''})  # how soon others are as good
  return sweep


def add(
  sweep: ConfigDict,
  name: str,
  config: ConfigDict,
  *changes: dict[str, Any],
  start: str = '',
  adapt: bool = False,
) -> None:
  """Adds a run.

  Args:
    sweep: from `new`.
    name: of the run.
    config: from a `get_config`, not shared with another run.
    *changes: field, such as 'train.steps' -> its value.
    start: run of the same sweep whose final weights it begins with.
    adapt: whether it adapts `start` to new tasks (`--mode adapt`).

  Raises:
    KeyError, TypeError: a change of no field, or of another type.
  """
  config.lock()  # or a mistyped field would be a new one
  for change in changes:
    config.update_from_flattened_dict(change)
  entry = {'name': name, 'config': config, 'start': start, 'adapt': adapt}
  sweep.runs.append(ConfigDict(entry))
