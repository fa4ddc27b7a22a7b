"""Metrics of a state on a whole split: sums and counts, divided once."""

import collections
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from msp.episodes import label_mask
from msp.models import multitask
from msp.models.normalization import MOMENTUM
from msp.tasks import Task

logger = logging.getLogger(__name__)

PyTree = Any
# A metric of 0 is scored as this.
SMALLEST = 1e-3
# Batches that the device computes before the host reads what became of the first.
AHEAD = 2


def make_eval_step(
  model: multitask.MultiTask, tasks: Mapping[str, Task]
) -> Callable[[PyTree, PyTree, Mapping[str, jax.Array]], dict]:
  """Builds (params, batch_stats, batch) -> sums of every task, jit-able.

  Returns:
    A function to {task: {'loss': L · n, 'count': n, 'update': what
    `Task.compute` collects}}, n the number of labels that L is the mean over: pixels,
    or images; running statistics, no dropout.
  """

  def eval_step(params, batch_stats, batch):
    outputs, _ = multitask.apply(
      model, params, batch_stats, batch['image'], train=False
    )
    sums = {}
    for name, task in tasks.items():
      mask = label_mask(batch, name)
      count = task.count(outputs[name], batch[name], mask)
      sums[name] = {
        'loss': task.loss(outputs[name], batch[name], mask) * count,
        'count': count,
        'update': task.update(outputs[name], batch[name], mask),
      }
    return sums

  return eval_step


def make_statistics_step(
  model: multitask.MultiTask,
) -> Callable[[PyTree, PyTree, jax.Array, jax.Array], PyTree]:
  """Builds (params, batch_stats, image, key) -> one batch's own statistics, jit-able.

  Their mean over batches of training images, θ fixed, in place of the running averages:
  these lag behind weights that move fast relative to their size, and behind a norm λ
  makes weights small without changing what they do. (Wu & Johnson, arXiv 2105.07576,
  section 3, here with the mean of the variances of batches, as the running averages.)

  Returns:
    A function whose result is a tree as `batch_stats`, which change it by rounding
    only; dropout draws from the key.
  """

  def statistics_step(params, batch_stats, image, key):
    _, moved = multitask.apply(model, params, batch_stats, image, train=True, key=key)
    own = lambda new, old: (new - MOMENTUM * old) / (1 - MOMENTUM)
    return jax.tree.map(own, moved, batch_stats)

  return statistics_step


def make_predict(
  model: multitask.MultiTask, tasks: Mapping[str, Task]
) -> Callable[[PyTree, PyTree, Mapping[str, jax.Array]], dict]:
  """Builds (params, batch_stats, batch) -> each task's prediction, jit-able."""

  def predict(params, batch_stats, batch):
    outputs, _ = multitask.apply(
      model, params, batch_stats, batch['image'], train=False
    )
    return {
      name: task.predict(outputs[name], batch[name].shape)
      for name, task in tasks.items()
    }

  return predict


def evaluate(
  eval_step: Callable[..., dict],
  tasks: Mapping[str, Task],
  params: PyTree,
  batch_stats: PyTree,
  batches: Iterable[Mapping[str, jax.Array]],
) -> dict[str, float]:
  """Runs over a split.

  Args:
    eval_step: from `make_eval_step`, jitted.
    tasks: the tasks, by name.
    params: θ.
    batch_stats: running statistics.
    batches: of the split, in order, padded rows not `valid`.

  Returns:
    'loss' (sum over tasks), 'loss/<task>', '<task>/<metric>', and 'score', the
    mean over tasks of ± log of the primary metric M (− where lower is better), so
    that metres, degrees and shares weigh alike: its differences are mean relative
    changes, as Δm. Undefined metrics are left out.
  """
  parts, running = [], collections.deque()
  for batch in batches:
    running.append(eval_step(params, batch_stats, batch))
    if len(running) > AHEAD:
      parts.append(jax.device_get(running.popleft()))
  parts += jax.device_get(list(running))
  result: dict[str, float] = {}
  primaries = []
  for name, task in tasks.items():
    count = sum(float(p[name]['count']) for p in parts)
    if count:
      result[f'loss/{name}'] = sum(float(p[name]['loss']) for p in parts) / count
    updates = [p[name]['update'] for p in parts]
    _warn_of_a_dead_head(name, updates)
    metrics = task.compute(updates)
    result |= {f'{name}/{metric}': value for metric, value in metrics.items()}
    if task.primary in metrics:
      sign = 1 if task.higher_is_better else -1
      primaries.append(sign * math.log(max(metrics[task.primary], SMALLEST)))
  result['loss'] = sum(result.get(f'loss/{name}', 0.0) for name in tasks)
  if primaries:
    result['score'] = float(np.mean(primaries))
  return result


def _warn_of_a_dead_head(task, updates):
  """Says so if all images have the same logit, to the bit."""
  if not updates or 'score' not in updates[0]:
    return
  scores = np.concatenate([u['score'][u['valid'].astype(bool)] for u in updates])
  if scores.size > 1 and np.ptp(scores) == 0:
    logger.warning(
      '%s: every image gets the same answer (logit %.3f): its head, or the backbone '
      'below it, is dead. Try a smaller step size, a larger model.head_features or a '
      'smaller λ',
      task,
      scores[0],
    )
