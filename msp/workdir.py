"""The work directory: one run's files, each of them whole or absent."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from ml_collections import ConfigDict

from data.files import locked, write_atomically
from msp import groups as gr
from msp.errors import UserError, naming
from msp.tasks import Task

SWEEP = 'sweep.json'


def check(workdir: Path, config: ConfigDict) -> None:
  """Whether `claim` would succeed; writes nothing.

  Raises:
    UserError: the directory cannot be written to, or belongs to another
      configuration.
  """
  existing = workdir
  while not existing.exists() and existing != existing.parent:
    existing = existing.parent
  if not existing.is_dir() or not os.access(existing, os.W_OK):
    reason = 'Permission denied' if existing.is_dir() else 'Not a directory'
    raise _unwritable(workdir, f'{existing}: {reason}')
  if (workdir / SWEEP).exists():
    raise UserError(
      f'work directory {workdir} belongs to a sweep; choose another one with --workdir'
    )
  path = workdir / 'config.json'
  if not path.exists():
    if any((workdir / 'checkpoints').glob('*')):
      raise UserError(
        f'{path} is missing, so nothing tells what the checkpoints beside it are of; '
        f'put it back, or choose another directory with --workdir'
      )
    return
  try:
    own = {**json.loads(path.read_text())}
  except (OSError, ValueError, TypeError) as e:
    raise UserError(
      f'cannot read {path}: {e}; choose another directory with --workdir, or '
      f'remove this one'
    ) from None
  differ = list(_differences(own, _resolved(config)))
  if differ:
    # Those nearest the top first: what was set, before the schedules that follow it.
    differ.sort(key=lambda difference: difference[0].count('.'))
    told = '; '.join(f'{field} was {old}, now {new}' for field, old, new in differ[:5])
    raise UserError(
      f'work directory {workdir} belongs to another configuration: '
      f'{told}{"; …" if len(differ) > 5 else ""}. Choose another '
      f'directory with --workdir, or remove this one'
    )


def configuration(workdir: Path) -> ConfigDict:
  """The configuration that a run of this directory was made with.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = workdir / 'config.json'
  try:
    return _as_config(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError):
    what = 'a sweep, not a run' if (workdir / SWEEP).exists() else 'no run'
    raise UserError(
      f'no {path}: {workdir} is {what}; name the directory of a run with --workdir, or '
      f'its --config'
    ) from None
  except (OSError, ValueError, TypeError) as e:
    raise UserError(f'cannot read {path}: {e}; name its --config') from None


def _as_config(value):
  """What JSON made of a configuration; its tuples have become lists."""
  if isinstance(value, Mapping):
    return ConfigDict({name: _as_config(entry) for name, entry in value.items()})
  if isinstance(value, list):
    entries = [_as_config(entry) for entry in value]
    transforms = any(isinstance(entry, ConfigDict) for entry in entries)
    return entries if transforms else tuple(entries)
  return value


def claim_for_sweep(workdir: Path, name: str) -> None:
  """Creates the directory for a sweep, or checks that it is its own.

  Args:
    workdir: created with its parents; sweep.json is written to it.
    name: of the sweep. Its runs may change: they have directories of their own.

  Raises:
    UserError: the directory is a run's or another sweep's, or cannot be written to.
  """
  path = workdir / SWEEP
  try:
    owner = {**json.loads(path.read_text())}.get('name') if path.exists() else name
  except (OSError, ValueError, TypeError) as e:
    raise UserError(
      f'cannot read {path}: {e}; remove it if the sweep is {name}'
    ) from None
  if (workdir / 'config.json').exists() or owner != name:
    whose = f'sweep {owner}' if owner != name else 'a run'
    raise UserError(
      f'work directory {workdir} belongs to {whose}; choose another one with --workdir'
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      write(path, json.dumps({'name': name}).encode())
  except OSError as e:
    raise _unwritable(workdir, e.strerror) from None


def claim(workdir: Path, config: ConfigDict) -> None:
  """Creates the directory for this configuration, or checks that it is its own.

  Args:
    workdir: created with its parents; config.json is written to it.
    config: the resolved configuration.

  Raises:
    UserError: see `check`.
  """
  check(workdir, config)
  path = workdir / 'config.json'
  content = json.dumps(_resolved(config), indent=2).encode()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      write(path, content)
  except OSError as e:
    raise _unwritable(workdir, e.strerror) from None


def exclusive(workdir: Path) -> contextlib.AbstractContextManager[None]:
  """Keeps other processes from training in a directory of a run or a sweep.

  Two of them would overwrite each other's log. Entering it raises UserError if another
  process trains there.
  """

  def refuse():
    raise UserError(
      f'another process is training in {workdir}; wait for its end, or choose '
      f'another directory with --workdir'
    )

  return locked(workdir / 'lock', refuse)


def _resolved(config):
  return json.loads(config.to_json_best_effort())


def _unwritable(workdir, reason):
  return UserError(
    f'cannot write to work directory {workdir}: {reason}; choose another one with '
    f'--workdir'
  )


def _differences(old: Any, new: Any, field: str = '') -> Iterator[tuple[str, Any, Any]]:
  """(field, old value, new value) of every one that differs."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for key in sorted(old.keys() | new.keys()):
      yield from _differences(
        old.get(key, 'absent'), new.get(key, 'absent'), f'{field}.{key}'.lstrip('.')
      )
  elif _transforms(old) and _transforms(new) and len(old) == len(new):
    for at, pair in enumerate(zip(old, new, strict=True)):
      yield from _differences(*pair, f'{field}[{at}]')
  elif old != new and not _moved(field, old, new):
    yield field, old, new


def _transforms(value):
  return isinstance(value, list) and all(isinstance(x, Mapping) for x in value)


def _moved(field, old, new):
  """Whether it may be the same thing in another place."""
  if field == 'data.source':  # compared with the prepared copy when that is verified
    return True
  # A run of a sweep: SWEEP/RUN/SEED.
  parts = lambda path: Path(str(path)).parts[-3:]
  return field == 'initial' and len(parts(old)) == 3 and parts(old) == parts(new)


def write(path: Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
  """`data.files.write_atomically`; an error of the system names the file."""
  with naming(path):
    write_atomically(path, content)


def write_groups(workdir: Path, groups: gr.Groups, params: Any) -> None:
  """Writes groups.json: which groups of which layer are alive.

  Not of single weights: their mask is the checkpoint's business.
  """
  if groups.array_axis is None:
    return
  alive = jax.device_get(gr.alive(groups, params))
  layers = [
    {
      'name': gr.short_name(layer),
      'total': int(alive[layer].size),
      'alive': np.asarray(alive[layer]).astype(int).tolist(),
    }
    for layer in groups.layers
  ]
  if groups.axis != 'coupled':  # streams are in that order
    layers.sort(key=lambda layer: _depth(layer['name']))
  content = json.dumps({'axis': groups.axis, 'layers': layers}).encode()
  write(workdir / 'groups.json', content)


def _depth(name):
  """Sorts layers as the network runs: the stem, then blocks by number."""
  parts = re.split(r'(\d+)', name)
  return not name.startswith('stem'), [int(p) if p.isdigit() else p for p in parts]


def write_predictions(
  workdir: Path,
  batch: Mapping[str, np.ndarray],
  predictions: Mapping[str, np.ndarray],
  tasks: Mapping[str, Task],
) -> None:
  """Writes predictions.npz: images, labels and predictions of a batch.

  Args:
    workdir: of the run.
    batch: `image` (B, H, W, 3) in [0, 1], `valid` (B,), and each task's label.
    predictions: by task, as `Task.predict` gives them.
    tasks: by name; their kinds and classes are written, too.
  """
  rows = batch['valid']
  arrays = {'image': np.round(batch['image'] * 255).astype(np.uint8)[rows]}
  for name, prediction in predictions.items():
    arrays[f'label/{name}'] = batch[name][rows]
    arrays[f'prediction/{name}'] = np.asarray(prediction)[rows]
    arrays[f'classes/{name}'] = np.array(tasks[name].classes)
    arrays[f'kind/{name}'] = np.array(tasks[name].kind)
  write(workdir / 'predictions.npz', lambda f: np.savez(f, **arrays))
