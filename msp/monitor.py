"""Watches the numbers of a run's steps, and puts them into words."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msp import groups as gr
from msp import tasks as task_module

logger = logging.getLogger(__name__)

PyTree = Any
# A layer with no more than this share of its groups alive carries next to nothing.
STARVED = 1 / 16


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
      if not at_floor or layer in self._warned:
        continue
      self._warned.add(layer)
      logger.warning(
        'step %d: layer %s %s; λ is too large for it',
        step,
        gr.short_name(layer),
        'is dead' if alive == 0 else f'is at its survival floor ({alive} alive)',
      )
    return 2 * starved >= len(self._totals) > 0


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
