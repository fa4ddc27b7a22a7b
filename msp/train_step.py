"""One outer step, for every row of the method table, chosen by its arguments."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msp import episodes, losses, objectives
from msp import groups as gr
from msp.adaptation import adapt
from msp.hypergradient import CG, Solver, meta_gradients, online
from msp.models import multitask
from msp.tasks import Task
from msp.train_state import TrainState, coefficient

PyTree = Any
Batch = Mapping[str, jax.Array]
Step = Callable[[TrainState, Mapping[str, Batch], jax.Array], tuple[TrainState, dict]]


class Combination(NamedTuple):
  """How task losses become one: see `msp.losses.combine`."""

  how: str = 'sum'
  weights: Mapping[str, float] | None = None


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


def make_train_step(
  model: multitask.MultiTask,
  tasks: Mapping[str, Task],
  groups: gr.Groups,
  outer: optax.GradientTransformationExtraArgs,
  *,
  combination: Combination,
  inner: optax.GradientTransformation | None = None,
  inner_steps: int = 0,
  episode_draw: str = 'full',
  exact: bool = True,
  rho_optimizer: optax.GradientTransformation | None = None,
  objective: objectives.Objective = objectives.HOLDOUT,
  learn_on: str = 'hold_out',
  hypergradient: str = 'forward',
  truncation: int = 1,
  solver: Solver = CG,
  tangent_decay: float = 0.99,
  tangent_max_norm: float = 1.0,
  settled: int | None = None,
  unroll: bool = False,
) -> Step:
  """Builds the pure function (state, batches, key) -> (state, metrics).

  For each episode τ of the step: θᴷ = adapt(θ⁰, support, λ);
  g_θ = dL_τ(θᴷ; query)/dθ⁰; g_ρ = dL_τ(θᴷ; hold-out)/dρ. Then, on the means over
  episodes, θ⁰ ← outer(g_θ) with λ (prox inside `outer`) and ρ ← rho_optimizer(g_ρ).
  With K = 0 θᴷ is θ⁰, and L_τ(θᴷ; hold-out) depends on λ through earlier steps alone.

  Running statistics follow the batch statistics at θ⁰: of the first inner step,
  or of the query batch if K = 0. Parameters and optimiser states of heads whose
  task is in none of the step's episodes stay as they are.

  Args:
    model: backbone and heads.
    tasks: the tasks, by name.
    groups: what sparsity is counted on.
    outer: optimiser of θ⁰; takes `sparsity` if the state has a ρ.
    combination: of the task losses.
    inner: optimiser of the inner loop, needed if inner_steps > 0.
    inner_steps: K.
    episode_draw: 'full', 'all' or a number; see `msp.episodes.draw`.
    exact: whether g_θ runs through the inner steps or stops at θᴷ.
    rho_optimizer: of ρ; None keeps ρ as it is.
    objective: what ρ is learned for. With 'tolerance' and 'budget' a scalar ρ
      needs no hypergradient, and none is computed.
    learn_on: the part of `batches` that ρ is learned on; 'query' is what θ⁰ sees.
    hypergradient: 'online' | 'forward' | 'reverse' | 'truncated' | 'implicit'; see
      `msp.hypergradient`. Only 'online' learns λ without inner steps; it needs
      `state.tangent`.
    truncation: of 'truncated', how many of the K steps derivatives see.
    solver: of 'implicit'.
    tangent_decay: γ of 'online'.
    tangent_max_norm: bound of the tangent of 'online'.
    settled: steps after which the optimisers are told not to let dead groups come back
      (`msp.transforms.freeze_dead`), and a budget that is met trains on with λ = 0;
      None: never. Without a budget λ should stand still then: a step without a
      rho_optimizer.
    unroll: inner steps and episodes as one straight program (CPU) or as loops.

  Returns:
    The step. `batches` has 'query', with K > 0 'support', and `learn_on` if ρ is
    learned on data. Metrics are scalars but for 'alive', shape (layers,), int32, and
    'lambda', 'lambda_relative' (λ/λ_max) and 'hypergradient', of ρ's shape. λ is that
    of ρ, also where a budget is met and the step makes no use of it.
    'violation' is what drives ρ under a constraint (> 0: λ too large), and goes to
    rho_optimizer as a further argument; 'gap/<task>'
    and 'gap_allowed/<task>' the hold-out loss against the twin's and its bound,
    'restored' whether the network has become its twin again;
    'nonfinite' is the position of the first gradient leaf with a NaN or infinity,
    −1 if there is none.
  """
  names = tuple(tasks)
  learned = rho_optimizer is not None
  differentiates = learned and objectives.differentiates(
    objective.kind, len(groups.names)
  )
  learns_online = differentiates and hypergradient == 'online'
  truncated = differentiates and hypergradient == 'truncated'

  def loss(params, batch_and_key, batch_stats, present):
    batch, key = batch_and_key
    return task_losses(
      model, tasks, combination, params, batch_stats, batch, key, present
    )

  def episode(state, batches, key, row, extra):
    present = {
      name: bool(row[i]) if isinstance(row, np.ndarray) else row[i]
      for i, name in enumerate(names)
    }
    keys = jax.random.split(key, inner_steps + 2)
    at = lambda params, batch: loss(params, batch, state.batch_stats, present)

    def inner_loop(params, rho, start=0):
      if not inner_steps:
        return params, None
      return adapt(
        lambda params, key: at(params, (batches['support'], key)),
        params,
        keys[start:inner_steps],
        inner,
        sparsity=coefficient(rho, state.lambda_max),
        has_aux=True,
        truncation=truncation if truncated else None,
        unroll=unroll,
        # The exact gradient holds a derivative already, which `online` takes again.
        twice_differentiable=exact and learns_online,
        **extra,
      )

    hold_out = None
    if differentiates:
      hold_out = lambda params: at(params, (batches[learn_on], keys[-2]))
    gradients = meta_gradients(
      inner_loop,
      lambda params: at(params, (batches['query'], keys[-1])),
      hold_out,
      state.params,
      state.rho,
      exact=exact and inner_steps > 0,
      mode=hypergradient if differentiates else None,
      last=lambda params, rho: inner_loop(params, rho, inner_steps - 1),
      solver=solver,
    )
    query_loss, (values, query_stats) = gradients.query
    if inner_steps:
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

    if unroll or count == 1:
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

  def train_step(state, batches, key):
    key_draw, key_run, key_compare = jax.random.split(key, 3)
    draw = episode_draw if inner_steps else 'full'
    rows = episodes.draw(key_draw, len(names), draw)
    frozen = met = None
    if settled is not None:
      frozen = state.step >= settled  # dead groups stay dead
      if learned and objective.kind == 'budget':
        met, over = objectives.settling(objective, groups, state.params)
        met, frozen = frozen & met, frozen & ~over

    def outer_step(params_and_opt_state, rho, batch_stats=state.batch_stats):
      params, opt_state = params_and_opt_state
      if met is not None:
        rho = jnp.where(met, -jnp.inf, rho)  # λ = 0
      extra = {} if frozen is None else {'thaw': ~frozen}
      means, stats, seen = run_episodes(
        state._replace(params=params, rho=rho, batch_stats=batch_stats),
        batches,
        key_run,
        rows,
        extra,
      )
      sparsity = coefficient(rho, state.lambda_max)
      if sparsity is not None:
        extra['sparsity'] = sparsity
      updates, new_opt_state = outer.update(means['params'], opt_state, params, **extra)
      new = optax.apply_updates(params, updates), new_opt_state
      if isinstance(rows, jax.Array):
        new = _keep_absent(seen, new, (params, opt_state))
      return new, means.get('hold_out_loss'), (means, stats)

    old = state.params, state.opt_state
    tangent, twin = state.tangent, state.twin
    if learns_online:
      (params, opt_state), _, (means, stats), rho_gradient, tangent = online(
        outer_step,
        old,
        state.rho,
        tangent,
        decay=tangent_decay,
        max_norm=tangent_max_norm,
      )
    else:
      (params, opt_state), _, (means, stats) = outer_step(old, state.rho)
      rho_gradient = means.get('rho')

    sparsity = coefficient(state.rho, state.lambda_max)
    rho, rho_opt_state = state.rho, state.rho_opt_state
    hold_out_loss = means.get('hold_out_loss')
    violation = restored = None
    if learned and objective.kind == 'tolerance':
      # θ⁰ against θ⁰: that is what is kept and evaluated, and inner steps can make up
      # for almost anything that λ does to it.
      compared = lambda params, stats: loss(
        params, (batches[learn_on], key_compare), stats, None
      )
      hold_out_loss, (sparse, _) = compared(state.params, state.batch_stats)
      _, (dense, _) = compared(twin.params, twin.batch_stats)
      (twin_params, twin_opt_state), _, (_, twin_stats) = outer_step(
        (twin.params, twin.opt_state),
        jnp.full_like(rho, -jnp.inf),  # λ = 0
        twin.batch_stats,
      )
      twin = objectives.compare(
        twin._replace(
          params=twin_params, opt_state=twin_opt_state, batch_stats=twin_stats
        ),
        sparse,
        dense,
        objective.decay,
      )
      violation = objectives.tolerance_violation(objective, twin)
      network = params, opt_state, stats
      twin, (params, opt_state, stats), restored = objectives.restore(
        objective, twin, state.step + 1, violation, rho, network
      )
      if tangent is not None:
        tangent = jax.tree.map(lambda z: jnp.where(restored, 0, z), tangent)
    elif learned and objective.kind == 'budget':
      violation = objectives.budget_violation(
        objective, groups, params, state.removed_at_start, state.step, settled
      )
    elif learned and objective.rise:
      violation = objectives.trust_region_violation(
        objective, groups, params, state.removed_at_start, state.step
      )
    if learned:
      direction = rho_gradient
      if objective.kind != 'holdout':
        direction = objectives.signal(violation, rho, rho_gradient)
      rho_updates, rho_opt_state = optax.with_extra_args_support(rho_optimizer).update(
        direction, rho_opt_state, rho, violation=violation
      )
      rho = optax.apply_updates(rho, rho_updates)
      if met is not None:
        rho = jnp.where(met, state.rho, rho)

    counted = gr.sparsity(groups, params)
    finite = jnp.stack(
      [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(means['params'])]
    )
    metrics = {
      'loss': means['loss'],
      **{f'loss/{name}': value for name, value in means['task'].items()},
      'gradient_norm': optax.tree.norm(means['params']),
      'group_sparsity': counted.groups,
      'weight_sparsity': counted.weights,
      'alive': counted.alive,
      'nonfinite': jnp.where(jnp.all(finite), -1, jnp.argmin(finite)),
    }
    if sparsity is not None:
      metrics |= {'lambda': sparsity, 'lambda_relative': jnp.exp(state.rho)}
    if differentiates:
      metrics['hypergradient'] = rho_gradient
    if hold_out_loss is not None:
      metrics['hold_out_loss'] = hold_out_loss
    if violation is not None:
      metrics['violation'] = violation
    if restored is not None:
      metrics['restored'] = restored
      limits = objectives.allowed(objective, twin)
      for name, gap, limit in zip(names, twin.gap, limits, strict=True):
        metrics |= {f'gap/{name}': gap, f'gap_allowed/{name}': limit}
    new_state = TrainState(
      state.step + 1,
      params,
      stats,
      opt_state,
      rho,
      state.lambda_max,
      rho_opt_state,
      tangent,
      twin,
      state.removed_at_start,
    )
    return new_state, metrics

  return train_step


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


def _keep_absent(seen, new, old):
  """`old` wherever a leaf belongs to a head or log-variance not `seen`."""

  def leaf(path, n, o):
    parts = gr.path_name(path).split('/')
    for parent, name in itertools.pairwise(parts):
      if parent in ('heads', 'log_vars') and name in seen:
        return jnp.where(seen[name], n, o)
    return n

  return jax.tree_util.tree_map_with_path(leaf, new, old)
