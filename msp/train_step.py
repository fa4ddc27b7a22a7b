"""One outer step, for every row of the method table, chosen by its arguments."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msp import episodes, objectives
from msp import groups as gr
from msp.episodes import Batch, Combination, Hypergradient, Inner, task_losses
from msp.hypergradient import online
from msp.models import multitask
from msp.tasks import Task
from msp.train_state import TrainState, coefficient

PyTree = Any
Step = Callable[[TrainState, Mapping[str, Batch], jax.Array], tuple[TrainState, dict]]


def make_train_step(
  model: multitask.MultiTask,
  tasks: Mapping[str, Task],
  groups: gr.Groups,
  outer: optax.GradientTransformationExtraArgs,
  *,
  combination: Combination,
  inner: Inner | None = None,
  rho_optimizer: optax.GradientTransformation | None = None,
  objective: objectives.Objective = objectives.HOLDOUT,
  hypergradient: Hypergradient | None = None,
  settled: int | None = None,
) -> Step:
  """Builds the pure function (state, batches, key) -> (state, metrics).

  On the means over the step's episodes (`msp.episodes.make_episodes`):
  θ⁰ ← outer(g_θ) with λ (prox inside `outer`), ρ ← rho_optimizer(g_ρ). Without inner
  steps L(θ⁰; hold-out) depends on λ through earlier steps alone. Parameters and
  optimiser states of heads whose task is in none of the episodes stay as they are.

  Args:
    model: backbone and heads.
    tasks: the tasks, by name.
    groups: what sparsity is counted on.
    outer: optimiser of θ⁰; takes `sparsity` if the state has a ρ.
    combination: of the task losses.
    inner: the inner loop; None: there is none.
    rho_optimizer: of ρ; None keeps ρ as it is.
    objective: what ρ is learned for. With 'tolerance' and 'budget' a scalar ρ
      needs no hypergradient, and none is computed.
    hypergradient: how dL/dρ is computed, and on what; None: by default. 'online'
      needs `state.tangent`.
    settled: steps after which the optimisers are told not to let dead groups come back
      (`msp.transforms.freeze_dead`), and a budget that is met trains on with λ = 0;
      None: never. Without a budget λ should stand still then: a step without a
      rho_optimizer.

  Returns:
    The step. `batches` has 'query', with K > 0 'support', and `hypergradient.learn_on`
    if ρ is learned on data. Metrics are scalars but for 'alive', shape (layers,),
    int32, and 'lambda', 'lambda_relative' (λ/λ_max) and 'hypergradient', of ρ's shape.
    λ is that of ρ, also where a budget is met and the step makes no use of it.
    'violation' is what drives ρ under a constraint (> 0: λ too large), and goes to
    rho_optimizer as a further argument; 'gap/<task>' and 'gap_allowed/<task>' the
    hold-out loss against the twin's and its bound, 'restored' whether the network has
    become its twin again; 'nonfinite' is the position of the first gradient leaf with a
    NaN or infinity, or whose squares overflow, −1 if there is none.
  """
  names = tuple(tasks)
  inner = inner or Inner()
  hypergradient = hypergradient or Hypergradient()
  learned = rho_optimizer is not None
  differentiates = learned and objectives.differentiates(
    objective.kind, len(groups.names)
  )
  learns_online = differentiates and hypergradient.mode == 'online'
  run_episodes = episodes.make_episodes(
    model, tasks, combination, inner, hypergradient if differentiates else None
  )

  def train_step(state, batches, key):
    key_draw, key_run, key_compare = jax.random.split(key, 3)
    draw = inner.episodes if inner.steps else 'full'
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
        decay=hypergradient.decay,
        max_norm=hypergradient.max_norm,
      )
    else:
      (params, opt_state), _, (means, stats) = outer_step(old, state.rho)
      rho_gradient = means.get('rho')

    violation = restored = None
    if learned and objective.kind == 'tolerance':
      # θ⁰ against θ⁰: that is what is kept and evaluated, and inner steps can make up
      # for almost anything that λ does to it.
      hold_out = batches[hypergradient.learn_on], key_compare
      compared = lambda params, stats: task_losses(
        model, tasks, combination, params, stats, *hold_out
      )
      means['hold_out_loss'], (sparse, _) = compared(state.params, state.batch_stats)
      _, (dense, _) = compared(twin.params, twin.batch_stats)
      (twin_params, twin_opt_state), _, (_, twin_stats) = outer_step(
        (twin.params, twin.opt_state),
        jnp.full_like(state.rho, -jnp.inf),  # λ = 0
        twin.batch_stats,
      )
      twin = objectives.compare(
        objective,
        twin._replace(
          params=twin_params, opt_state=twin_opt_state, batch_stats=twin_stats
        ),
        sparse,
        dense,
      )
      violation = objectives.tolerance_violation(objective, twin)
      network = params, opt_state, stats
      twin, (params, opt_state, stats), restored = objectives.restore(
        objective, twin, state.step + 1, violation, state.rho, network
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

    rho, rho_opt_state = state.rho, state.rho_opt_state
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

    metrics = _metrics(groups, params, means)
    sparsity = coefficient(state.rho, state.lambda_max)
    if sparsity is not None:
      metrics |= {'lambda': sparsity, 'lambda_relative': jnp.exp(state.rho)}
    if differentiates:
      metrics['hypergradient'] = rho_gradient
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


def _metrics(groups, params, means):
  """What every step tells of itself."""
  counted = gr.sparsity(groups, params)
  # One pass over the gradients: a NaN or an infinity shows in the sum of squares, and
  # so does a gradient above 1e19, which is of no use either.
  squares = jnp.stack(
    [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(means['params'])]
  )
  finite = jnp.isfinite(squares)
  metrics = {
    'loss': means['loss'],
    **{f'loss/{name}': value for name, value in means['task'].items()},
    'gradient_norm': jnp.sqrt(jnp.sum(squares)),
    'group_sparsity': counted.groups,
    'weight_sparsity': counted.weights,
    'alive': counted.alive,
    'nonfinite': jnp.where(jnp.all(finite), -1, jnp.argmin(finite)),
  }
  if 'hold_out_loss' in means:
    metrics['hold_out_loss'] = means['hold_out_loss']
  return metrics


def _keep_absent(seen, new, old):
  """`old` wherever a leaf belongs to a head or log-variance not `seen`."""

  def leaf(path, n, o):
    parts = gr.path_name(path).split('/')
    for parent, name in itertools.pairwise(parts):
      if parent in ('heads', 'log_vars') and name in seen:
        return jnp.where(seen[name], n, o)
    return n

  return jax.tree_util.tree_map_with_path(leaf, new, old)
