"""Checkpoints: the only module that knows orbax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax import checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from msp.errors import UserError
from msp.groups import path_name

PyTree = Any


class Checkpoints:
  """The checkpoints of one work directory: the latest two and the best one.

  Each holds the training state, the position of the data and the loop's own
  counters (`meta`), so that a run goes on exactly where it was. A process killed
  while saving leaves the previous checkpoint.
  """

  def __init__(self, workdir: Path, score: str = 'score', *, read_only: bool = False):
    """Opens `workdir`/checkpoints; best is the highest `score`.

    Args:
      workdir: the checkpoints' folder is created in it, unless `read_only`.
      score: name under which it is kept.
      read_only: for the directory of another run, which may be writing to it.
    """
    # Of equal scores the first is the best, as in the loop's early stopping.
    rank = lambda metrics: (metrics[score], -metrics['step'])
    self._manager = ocp.CheckpointManager(
      (workdir / 'checkpoints').resolve(),
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
        # On the CPU a saved array may be the very buffer that the next step,
        # to which the state is donated, overwrites.
        enable_async_checkpointing=jax.default_backend() != 'cpu',
      ),
    )
    self._score = score

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._manager.close()

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step of the checkpoint with the best score, None if there is none."""
    return self._manager.best_step()

  def save(self, step: int, state: PyTree, meta: Mapping, score: float) -> None:
    """Writes a checkpoint; one of the same step is left as it is."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
      ),
      metrics={self._score: score, 'step': step},
      force=True,
    )

  def restore(self, step: int, target: PyTree) -> tuple[PyTree, dict]:
    """Reads a checkpoint onto the shapes, types and shardings of `target`.

    Args:
      step: one of the saved steps.
      target: a state, or its tree of sharded `jax.ShapeDtypeStruct`s.

    Returns:
      The state and the meta data.

    Raises:
      UserError: the saved leaves are not those of `target`; names them.
    """
    where = f'checkpoint {self._manager.directory / str(step)}'
    saved = self._manager.item_metadata(step)['state']
    if saved is None:
      raise UserError(f'{where} is incomplete: delete it and start again')
    _check_leaves(saved, target, where)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
      ),
    )
    return restored['state'], restored['meta']

  def restore_any(self, step: int) -> dict:
    """Reads the state of a checkpoint, whatever made it, as nested dicts of arrays.

    Args:
      step: one of the saved steps.

    Returns:
      The state, on one device; it may have been saved on any number.

    Raises:
      UserError: the checkpoint is incomplete.
    """
    saved = self._manager.item_metadata(step)['state']
    if saved is None:
      raise UserError(
        f'checkpoint {self._manager.directory / str(step)} is incomplete: delete it'
      )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), saved
    )
    return self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    )['state']


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
