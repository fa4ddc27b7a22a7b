"""Checkpoints: the only module that knows orbax."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax import checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from msp import processes
from msp.errors import UserError, naming
from msp.groups import path_name

logger = logging.getLogger(__name__)

PyTree = Any
T = TypeVar('T')


class DamagedCheckpointError(UserError):
  """A checkpoint that cannot be read."""


_UNREADABLE = 'another process cannot read a checkpoint; see its message'


class Checkpoints:
  """The checkpoints of one work directory: the latest two and the best one.

  Each holds the training state, the position of the data and the loop's own
  counters (`meta`), so that a run goes on exactly where it was. A process killed
  while saving leaves the previous checkpoint.
  """

  def __init__(self, workdir: Path, *, read_only: bool = False):
    """Opens `workdir`/checkpoints.

    Args:
      workdir: the checkpoints' folder is created in it, unless `read_only`.
      read_only: for the directory of another run, which may be writing to it.
    """
    # Of equal scores the first is the best, as in the loop's early stopping.
    rank = lambda metrics: (metrics['score'], -metrics['step'])
    folder = (workdir / 'checkpoints').resolve()
    if not read_only:
      processes.first_does(lambda: _forget_damaged_scores(folder, rank))
    self._manager = ocp.CheckpointManager(
      folder,
      # Without them a manager that has saved nothing yet cannot tell what is saved.
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        # Without `best_fn` no score would be written to disk, and `best_step` would
        # be the latest one. With `max_to_keep` instead of the policy it would delete
        # the newest checkpoint whenever it is not among the best, and with it the
        # way to resume.
        best_fn=rank,
        preservation_policy=preservation_policy.AnyPreservationPolicy(
          [
            preservation_policy.LatestN(2),
            preservation_policy.BestN(get_metric_fn=rank, n=1),
          ]
        ),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
        lightweight_initialize=read_only,  # no scores, which may be damaged
        # On the CPU a saved array may be the very buffer that the next step,
        # to which the state is donated, overwrites.
        enable_async_checkpointing=jax.default_backend() != 'cpu',
      ),
    )
    self._damaged = set()  # steps that `newest` could not read

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    with self._writable():
      self._manager.close()

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step of the checkpoint with the best score, None if none has one (−∞)."""
    best = self._manager.best_step()
    if best is None or self._manager.metrics(best)['score'] == -math.inf:
      return None
    return best

  def save(self, step: int, state: PyTree, meta: Mapping, score: float) -> None:
    """Writes a checkpoint; one of the same step is left as it is."""
    if self._damaged:
      processes.first_does(self._set_damaged_aside)
      self._damaged.clear()
      self._manager.reload()
    if step in self._manager.all_steps():
      return
    with self._writable():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
        ),
        metrics={'score': score, 'step': step},
        force=True,
      )

  @contextlib.contextmanager
  def _writable(self):
    """What the operating system refuses, TensorStore tells in a ValueError."""
    try:
      with naming(self._manager.directory), _quiet_if_it_fails():
        yield
    except ValueError as e:
      number = re.search(r"os_error_code='(\d+)'", str(e))
      if not number:
        raise
      code = int(number[1])
      raise OSError(code, os.strerror(code), str(self._manager.directory)) from None

  def _set_damaged_aside(self):
    """Renames what could not be read: it would pass for the newest or the best."""
    for step in self._damaged:
      path = self._manager.directory / str(step)
      aside = path.with_name(f'{step}.damaged')
      if aside.exists():
        shutil.rmtree(aside)
      path.rename(aside)

  def newest(self, restore: Callable[[int], T]) -> tuple[int, T] | None:
    """The newest checkpoint that can be read; warns of newer ones that cannot.

    Args:
      restore: step -> what is wanted of it: `restore` or `restore_any`.

    Returns:
      Its step, and what `restore` gave; None if there is no complete checkpoint.

    Raises:
      DamagedCheckpointError: there are checkpoints, and none can be read; names the
        newest.
    """
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      error = found = None
      try:
        found = step, restore(step)
      except DamagedCheckpointError as e:
        error = e
      if processes.agreed(error is not None):  # all go on from the same step
        damaged.append((step, error or DamagedCheckpointError(_UNREADABLE)))
        continue
      for newer, error in damaged:
        logger.warning('%s. Going on with that of step %d', error, step)
        self._damaged.add(newer)
      return found
    if damaged:
      raise damaged[0][1]
    return None

  def restore(self, step: int, target: PyTree) -> tuple[PyTree, dict]:
    """Reads a checkpoint onto the shapes, types and shardings of `target`.

    Args:
      step: one of the saved steps.
      target: a state, or its tree of sharded `jax.ShapeDtypeStruct`s.

    Returns:
      The state and the meta data.

    Raises:
      DamagedCheckpointError: it cannot be read.
      UserError: the saved leaves are not those of `target`; names them.
    """
    where = f'checkpoint {self._manager.directory / str(step)}'
    with _readable(where):
      saved = self._saved(step)
    _check_leaves(saved, target, where)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    with _readable(where):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        ),
      )
    return restored['state'], restored['meta']

  def _saved(self, step):
    saved = self._manager.item_metadata(step)['state']
    if saved is None:
      raise ValueError('incomplete')
    return saved

  def restore_any(self, step: int) -> dict:
    """Reads the state of a checkpoint, whatever made it, as nested dicts of arrays.

    Args:
      step: one of the saved steps.

    Returns:
      The state, on one device; it may have been saved on any number.

    Raises:
      DamagedCheckpointError: it cannot be read.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _readable(f'checkpoint {self._manager.directory / str(step)}'):
      abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        self._saved(step),
      )
      return self._manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      )['state']


@contextlib.contextmanager
def _quiet_if_it_fails() -> Iterator[None]:
  """Keeps what was under way beside a failed read or write from complaining.

  TensorStore's complains of the closed loop, orbax's of being thrown away, which may be
  long after: then the hook stays.
  """
  hook = sys.unraisablehook

  def quiet(unraisable):
    code = getattr(unraisable.object, 'cr_code', None)  # of a coroutine
    if code is not None and 'orbax' in Path(code.co_filename).parts:
      return
    if 'Event loop is closed' not in str(unraisable.exc_value):
      hook(unraisable)

  sys.unraisablehook = quiet
  yield
  sys.unraisablehook = hook


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
  """Turns whatever reading a damaged file raises into a `DamagedCheckpointError`."""
  try:
    with _quiet_if_it_fails():
      yield
  except (jax.errors.JaxRuntimeError, MemoryError):  # too large for this machine
    raise
  except OSError as e:
    # A disk that does not answer says nothing of the file.
    if e.errno not in (None, errno.ENOENT, errno.ENOTDIR):
      raise
    raise _damaged(where, e) from None
  except Exception as e:  # orbax and TensorStore raise anything up to a bare Exception
    raise _damaged(where, e) from None


def _damaged(where, error):
  reason = f'{type(error).__name__}: {error}'.splitlines()[0][:120]
  return DamagedCheckpointError(f'{where} is damaged ({reason}): delete it')


def _forget_damaged_scores(folder: Path, rank: Callable) -> None:
  """Removes scores that are not readable, without which orbax opens a folder."""
  for path in folder.glob('*/metrics/metrics'):
    try:
      sum(rank(json.loads(path.read_text())))
    except (ValueError, KeyError, TypeError) as e:
      logger.warning('%s is damaged (%s): that checkpoint has no score now', path, e)
      path.unlink()


def _check_leaves(saved, target, where):
  shapes = lambda tree: {
    path_name(path): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  have, want = shapes(saved), shapes(target)
  differ = [
    f'{name} {have.get(name, "absent")}, this model {want.get(name, "absent")}'
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]
  if differ:
    shown = '; '.join(differ[:3])
    raise UserError(
      f'{where} is of another architecture; {len(differ)} leaves differ: {shown}'
      f'{"; …" if len(differ) > 3 else ""}. Use the configuration it was made with'
    )
