"""Watches the numbers of a run's steps, and puts them into words."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from msp import groups as gr
from msp import tasks as task_module

logger = logging.getLogger(__name__)

PyTree = Any
# A layer with no more than this share of its groups alive carries next to nothing.
STARVED = 1 / 16
# How far from its target a budget may end, as a share removed.
MISSED = 0.02


class Monitor:
  """Watches every step's numbers for what should stop or worry a run."""

  def __init__(
    self,
    min_alive: int,
    groups: gr.Groups,
    params: PyTree,
    search: int = 0,
    alive_at_start: Sequence[int] | None = None,
  ):
    """Remembers the names the numbers belong to.

    Args:
      min_alive: the survival floor, groups of a layer.
      groups: that are counted.
      params: they are of.
      search: see `Objective`.
      alive_at_start: groups of each layer alive in the first network of the run; None:
        all of them.
    """
    self._min_alive = min_alive
    self._search = search
    self._totals = gr.totals(groups, params)
    # What was dead then is not what λ has done.
    totals = list(self._totals.values())
    self._at_start = totals if alive_at_start is None else alive_at_start
    # Of single weights a network may well need no more than a sixteenth.
    self._enough = STARVED if groups.array_axis is not None else 0.0
    self._leaves = [
      gr.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    self._warned = set()

  def check(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
    """Raises on a number that is not finite; warns of a layer at its floor.

    Returns:
      Whether half of the layers, or more, have come to their floor or to no more than
      `STARVED` of their groups alive.

    Raises:
      FloatingPointError: with the step and the first layer it is seen in.
    """
    leaf = int(metrics['nonfinite'])
    if leaf >= 0:
      raise FloatingPointError(
        f'step {step}: the gradient of {self._leaves[leaf]} is not finite '
        f'(loss {float(metrics["loss"])})'
      )
    for name in ('loss', 'hold_out_loss', 'hypergradient', 'violation', 'lambda'):
      values = np.atleast_1d(metrics.get(name, 0.0))
      if (wrong := values[~np.isfinite(values)]).size:
        raise FloatingPointError(f'step {step}: {name} is {wrong[0]}')
    if metrics.get('restored', False) and step == self._search:
      logger.info(
        'step %d: λ/λ_max is %.2g after the search for it; training goes on from the '
        'dense twin',
        step,
        float(np.mean(metrics['lambda_relative'])),
      )
    elif metrics.get('restored', False):
      logger.warning(
        'step %d: a task is still over its tolerance though λ/λ_max has come down to '
        '%.2g: what has died does not come back, so training goes on from the dense '
        'twin',
        step,
        float(np.mean(metrics['lambda_relative'])),
      )
    starved = 0
    for (layer, total), at_start, alive in zip(
      self._totals.items(), self._at_start, np.asarray(metrics['alive']), strict=True
    ):
      at_floor = alive <= self._min_alive < total
      starving = at_floor or alive <= self._enough * total
      starved += starving and alive < at_start
      # Nor is a floor that it came with.
      if not at_floor or alive >= at_start or layer in self._warned:
        continue
      self._warned.add(layer)
      logger.warning(
        'step %d: layer %s %s; λ is too large for it',
        step,
        gr.short_name(layer),
        'is dead' if alive == 0 else f'is at its survival floor ({alive} alive)',
      )
    return 2 * starved >= len(self._totals) > 0


class Constraint(NamedTuple):
  """What became of a run's constraint: whether it holds, and by how much, in words."""

  holds: bool
  words: str


def constraint(
  rows: Sequence[Mapping[str, Any]], sparsity: Mapping[str, Any]
) -> Constraint | None:
  """Whether what λ had to keep to has been kept.

  Args:
    rows: of metrics.jsonl.
    sparsity: the section of the run's configuration.

  Returns:
    Under a tolerance, of the task that is worst in the last step that compared, where λ
    came to rest; of a budget, once the run has ended, whether it is within `MISSED` of
    its target. None where there is nothing to keep to, or nothing to tell it by.
  """
  if sparsity.get('coefficient') != 'learned':
    return None
  objective = sparsity.get('objective')
  if objective == 'budget':
    ends = [row for row in rows if row['split'] == 'test' and 'removed' in row]
    if not ends:
      return None
    removed, target = ends[-1]['removed'], sparsity['target']
    what = (
      f'{removed:.1%} of the {sparsity["measure"]} are gone, {target:.1%} asked for'
    )
    return Constraint(abs(removed - target) <= MISSED, f'budget: {what}')
  compared = [row for row in rows if row.get('violation') is not None]
  if objective != 'tolerance' or not compared:
    return None
  last = compared[-1]
  bounds = {
    name.removeprefix('gap/'): (last[name], last[f'gap_allowed/{name[4:]}'])
    for name in last
    if name.startswith('gap/')
  }
  over = {task: gap / allowed for task, (gap, allowed) in bounds.items()}
  worst = max(over, key=over.get)
  gap, allowed = map(math.expm1, bounds[worst])
  return Constraint(
    last['violation'] <= 0,
    f'tolerance: at step {last["step"]}, the last that compared, the hold-out loss of '
    f"{worst} was {abs(gap):.1%} {'above' if gap > 0 else 'below'} the twin's; up to "
    f'{allowed:.1%} above are allowed',
  )


def flatten(
  metrics: Mapping[str, jax.Array], coefficients: Sequence[str]
) -> dict[str, float]:
  """One step's metrics as numbers: vectors of ρ as their mean and their entries."""
  row = {}
  for name, value in metrics.items():
    if name in ('alive', 'nonfinite'):
      continue
    value = np.asarray(value)
    row[name] = float(value.mean())
    if value.ndim:
      row |= {
        f'{name}/{key}': float(v) for key, v in zip(coefficients, value, strict=True)
      }
  return row


def summary(values: Mapping[str, float], tasks: Mapping[str, task_module.Task]) -> str:
  """The primary metric of every task and the sparsity, in one line."""
  parts = [
    f'{name} {task.primary} {values[f"{name}/{task.primary}"]:.3f}'
    for name, task in tasks.items()
    if f'{name}/{task.primary}' in values
  ]
  return f'{", ".join(parts)}; dead groups {100 * values["group_sparsity"]:.1f} %'
