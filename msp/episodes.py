"""Episodes: which tasks each of them holds, and what one says of θ⁰ and of ρ."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msp import losses
from msp.adaptation import adapt
from msp.errors import UserError
from msp.hypergradient import CG, Solver, meta_gradients
from msp.models import multitask
from msp.tasks import Task
from msp.train_state import TrainState, coefficient

PyTree = Any
Batch = Mapping[str, jax.Array]


def subsets(num_tasks: int) -> np.ndarray:
  """All 2ᵀ − 1 non-empty task subsets, smallest first.

  Args:
    num_tasks: T.

  Returns:
    Bool, shape (2ᵀ − 1, T), on the host: its entries are static under jit.
  """
  rows = np.arange(1, 2**num_tasks)[:, None] >> np.arange(num_tasks) & 1
  order = np.argsort(rows.sum(axis=1), kind='stable')
  return rows[order].astype(bool)


def draw(key: jax.Array, num_tasks: int, how: str | int) -> np.ndarray | jax.Array:
  """The episodes of one step.

  Args:
    key: PRNG key.
    num_tasks: T.
    how: 'all' (every non-empty subset), 'full' (one episode with every task), or
      a number, 2 or '2': that many subsets, drawn uniformly and independently.

  Returns:
    Bool, shape (episodes, T): on the host for 'all' and 'full'.

  Raises:
    UserError: `how` is none of these, or 'all' of more than six tasks (over a
      hundred episodes a step).
  """
  if how == 'full':
    return np.ones((1, num_tasks), bool)
  if how == 'all':
    if num_tasks > 6:
      raise UserError(
        f'meta.episodes=all with {num_tasks} tasks is {2**num_tasks - 1} '
        f'episodes a step; draw some, for example meta.episodes=2'
      )
    return subsets(num_tasks)
  if not str(how).isdecimal() or int(how) < 1:
    raise UserError(
      f'meta.episodes={how!r}: expected all, full or a number of at least 1'
    )
  # The first task of a subset is the i-th with a probability of 2⁻ⁱ/(1 − 2⁻ᵀ); those
  # after it are in with ½ each.
  key_first, key_rest = jax.random.split(key)
  at, count = jnp.arange(num_tasks)[None], int(how)
  first = jax.random.categorical(key_first, -math.log(2) * at[0], shape=(count, 1))
  rest = jax.random.bernoulli(key_rest, shape=(count, num_tasks))
  return (at == first) | ((at > first) & rest)


class Combination(NamedTuple):
  """How task losses become one: see `msp.losses.combine`."""

  how: str = 'sum'
  weights: Mapping[str, float] | None = None


class Inner(NamedTuple):
  """The inner loop of every episode.

  Attributes:
    optimizer: of its steps; needed if there are any.
    steps: K; 0: there is no inner loop.
    episodes: 'full', 'all' or a number; see `draw`. Without inner steps 'full'.
    exact: whether the gradient in θ⁰ runs through the steps or stops at θᴷ.
    unroll: inner steps and episodes as one straight program (CPU) or as loops.
    truncation: how many of the K steps derivatives see, in θ⁰ and in ρ; None: all.
  """

  optimizer: optax.GradientTransformation | None = None
  steps: int = 0
  episodes: str | int = 'full'
  exact: bool = True
  unroll: bool = False
  truncation: int | None = None


class Hypergradient(NamedTuple):
  """How dL/dρ is computed, and on what.

  Attributes:
    mode: 'online' | 'forward' | 'reverse' | 'truncated' | 'implicit'; see
      `msp.hypergradient`. Only 'online' learns λ without inner steps; 'truncated' is
      'reverse' through what `Inner.truncation` leaves.
    learn_on: the part of the batches that ρ is learned on; 'query' is what θ⁰ sees.
    solver: of 'implicit'.
    decay: γ of 'online'.
    max_norm: bound of the tangent of 'online'.
  """

  mode: str = 'forward'
  learn_on: str = 'hold_out'
  solver: Solver = CG
  decay: float = 0.99
  max_norm: float = 1.0


def task_losses(
  model: multitask.MultiTask,
  tasks: Mapping[str, Task],
  combination: Combination,
  params: PyTree,
  batch_stats: PyTree,
  batch: Batch,
  key: jax.Array,
  present: Mapping[str, bool | jax.Array] | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
  """L_τ(θ) of one batch, with batch statistics and dropout.

  Args:
    model: backbone and heads.
    tasks: the tasks, by name.
    combination: sum, fixed weights, or learned uncertainties.
    params: θ.
    batch_stats: running statistics before the batch.
    batch: `image`, `valid`, and one entry for each task.
    key: PRNG key of the dropout masks.
    present: which tasks are in τ (None: all); absent heads are not computed.

  Returns:
    L_τ, shape (), and (L_t of each task, running statistics after the batch).
  """
  outputs, new_stats = multitask.apply(
    model,
    params,
    batch_stats,
    batch['image'],
    train=True,
    key=key,
    present=present,
  )
  values = {
    name: tasks[name].loss(logits, batch[name], label_mask(batch, name))
    for name, logits in outputs.items()
  }
  total = losses.combine(
    values,
    present,
    combination.how,
    weights=combination.weights,
    log_vars=params.get('log_vars'),
  )
  return total, (values, new_stats)


def label_mask(batch: Batch, task: str) -> jax.Array:
  """Which examples count for this task, shape (B,), bool.

  Of image-level labels 255 is none; pixels without a label are the losses' business.
  """
  valid, label = batch['valid'], batch[task]
  return valid if label.ndim > 1 else valid & losses.has_class(label)


def make_episodes(
  model: multitask.MultiTask,
  tasks: Mapping[str, Task],
  combination: Combination,
  inner: Inner,
  hypergradient: Hypergradient | None,
) -> Callable[..., tuple[dict, PyTree, dict]]:
  """Builds (state, batches, key, rows, extra) -> the means over the episodes of a step.

  For each episode τ: θᴷ = adapt(θ⁰, support, λ); g_θ = dL_τ(θᴷ; query)/dθ⁰;
  g_ρ = dL_τ(θᴷ; hold-out)/dρ. With K = 0 θᴷ is θ⁰.

  Args:
    model: backbone and heads.
    tasks: the tasks, by name.
    combination: of the task losses.
    inner: the inner loop.
    hypergradient: how g_ρ is computed; None: it is not, and no hold-out data is used.

  Returns:
    A function of the state, the batches ('query', with K > 0 'support', and
    `learn_on`), a key, the episodes (`draw`) and further arguments of the inner
    updates, to: the means ('params': g_θ; 'rho': g_ρ, not with 'online', whose tangent
    is not an episode's; 'loss', 'hold_out_loss' and 'task': L_t of each, NaN of one
    that no episode held); running statistics, which follow the batch at θ⁰ (of the
    first inner step, or of the query batch if K = 0); which tasks were held.
  """
  names = tuple(tasks)
  mode = hypergradient and hypergradient.mode

  def loss(params, batch_and_key, batch_stats, present):
    batch, key = batch_and_key
    return task_losses(
      model, tasks, combination, params, batch_stats, batch, key, present
    )

  def episode(state: TrainState, batches, key, row, extra):
    present = {
      name: bool(row[i]) if isinstance(row, np.ndarray) else row[i]
      for i, name in enumerate(names)
    }
    keys = jax.random.split(key, inner.steps + 2)
    at = lambda params, batch: loss(params, batch, state.batch_stats, present)

    def inner_loop(params, rho, start=0):
      if not inner.steps:
        return params, None
      return adapt(
        lambda params, key: at(params, (batches['support'], key)),
        params,
        keys[start : inner.steps],
        inner.optimizer,
        sparsity=coefficient(rho, state.lambda_max),
        has_aux=True,
        truncation=inner.truncation,
        unroll=inner.unroll,
        # The exact gradient holds a derivative already, which 'online' takes again.
        twice_differentiable=inner.exact and mode == 'online',
        **extra,
      )

    hold_out = None
    if hypergradient:
      hold_out = lambda params: at(params, (batches[hypergradient.learn_on], keys[-2]))
    gradients = meta_gradients(
      inner_loop,
      lambda params: at(params, (batches['query'], keys[-1])),
      hold_out,
      state.params,
      state.rho,
      exact=inner.exact and inner.steps > 0,
      mode=mode,
      last=lambda params, rho: inner_loop(params, rho, inner.steps - 1),
      solver=hypergradient.solver if hypergradient else CG,
    )
    query_loss, (values, query_stats) = gradients.query
    if inner.steps:
      _, (_, all_stats) = gradients.logs
      stats = jax.tree.map(lambda x: x[0], all_stats)
    else:
      stats = query_stats
    values = {name: values.get(name, jnp.zeros(())) for name in names}
    sums = {
      'params': gradients.params,
      'loss': query_loss,
      'task': {name: values[name] * present[name] for name in names},
      'present': {name: jnp.float32(present[name]) for name in names},
    }
    if hold_out is not None:
      sums['hold_out_loss'] = gradients.hold_out[0]
      if gradients.rho is not None:
        sums['rho'] = gradients.rho
    return sums, stats, present

  def run_episodes(state, batches, key, rows, extra):
    count = len(rows)
    keys = jax.random.split(key, count)

    def body(carry, item):
      total, stats = carry
      sums, new, present = episode(state, batches, *item, extra)
      total = jax.tree.map(jnp.add, total, sums)
      return (total, _merge_stats(stats, new, present)), None

    if inner.unroll or count == 1:
      total, stats, present = episode(state, batches, keys[0], rows[0], extra)
      carry = total, _merge_stats(state.batch_stats, stats, present)
      for item in zip(keys[1:], rows[1:], strict=True):
        carry, _ = body(carry, item)
    else:
      rows = jnp.asarray(rows)
      shapes = jax.eval_shape(
        lambda: episode(state, batches, keys[0], rows[0], extra)[0]
      )
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      carry, _ = jax.lax.scan(body, (zeros, state.batch_stats), (keys, rows))
    total, stats = carry
    seen, task_sums = total.pop('present'), total.pop('task')
    means = jax.tree.map(lambda x: x / count, total)
    means['task'] = {
      # A task that no episode held has no loss this step.
      name: jnp.where(seen[name] > 0, value / seen[name], jnp.nan)
      for name, value in task_sums.items()
    }
    return means, stats, {name: seen[name] > 0 for name in names}

  return run_episodes


def _merge_stats(old, new, present):
  """The backbone's new statistics, and those of the heads that ran."""
  heads = {
    name: jax.tree.map(
      lambda n, o, here=present[name]: jnp.where(here, n, o),
      new['heads'][name],
      stats,
    )
    for name, stats in old['heads'].items()
  }
  return {**new, 'heads': heads}
