"""What λ is for: the signal that moves ρ, one of three.

`holdout`: ρ follows the hypergradient of the hold-out loss, as published; within a
trust region (`trust_region_violation`): what may be dead grows with the steps.

`tolerance`: the sparsest network whose hold-out loss, of every task, stays close to
that of a dense one, its twin, which is trained beside it on the same batches. Both
before inner steps: θ⁰ is what is kept.

`budget`: a share of the groups, weights or FLOPs that has to be gone.

For the last two, λ is the multiplier of R in "loss + λ R" and ρ does dual ascent: it
rises while the constraint is slack and falls while it is violated. A vector ρ keeps
the hold-out loss as the tie-break between its entries.

What died at a large λ does not come back at a smaller one that would never have killed
it: the living groups have taken its place. So what a network costs depends on every λ
it has seen, the start included. Under `tolerance` the first steps therefore only search
for λ; after them the network becomes its twin, whatever the start has done to it. So it
does again if λ comes far down and the constraint is still violated (`restore`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.errors import UserError

PyTree = Any
KINDS = ('holdout', 'tolerance', 'budget')
MEASURES = ('groups', 'weights', 'flops')

# The band, as a share removed, in which a violation is less than 1.
BUDGET_BAND = 0.05
# What noise keeps from dying, as a share of dead · alive: CamVid in docs/results.md.
UNSETTLED = 0.5
# How much more than its target a budget may remove once the pattern settles. A single
# group of a small network can be 0.015 of its FLOPs.
BUDGET_SLACK = 0.02
# How much of the signal of a vector ρ may come from the tie-break.
TIE_BREAK = 0.5
# λ has come far down when it is a fourth of its largest value.
RESTORE_BELOW = math.log(4)


class Objective(NamedTuple):
  """Static description of what λ is for.

  Attributes:
    kind: 'holdout' | 'tolerance' | 'budget'.
    target: of 'budget', the share to remove, in (0, 1).
    measure: of 'budget', what the share is of: 'groups' | 'weights' | 'flops'.
    positions: of 'flops', layer -> output positions (rows · columns) of its kernel.
    tolerance: of 'tolerance', ε ≥ 0, the relative increase of the hold-out loss that
      is allowed, or one standard error of the twin's loss if that is more; and, for
      losses next to 0, ε² of the first loss, see `compare`.
    search: of 'tolerance', steps that only search for λ; 0: none.
    rise: of 'budget', steps in which its aim rises; 0: it is the target at once. Of
      'holdout', steps in which the share that may be dead rises to 1; 0: any may.
    hold_out_batches: hold-out images / images a batch, for the standard error.
    decay: of the running means.
  """

  kind: str = 'holdout'
  target: float = 0.5
  measure: str = 'groups'
  positions: Mapping[str, int] | None = None
  tolerance: float = 0.0
  search: int = 0
  rise: int = 0
  hold_out_batches: float = 1.0
  decay: float = 0.95


HOLDOUT = Objective()


class Twin(NamedTuple):
  """The dense reference of 'tolerance' and its comparison with θ⁰.

  Attributes:
    params: θ of the twin, trained with λ = 0.
    opt_state: of its optimiser.
    batch_stats: its running statistics.
    count: comparisons made of each task, shape (tasks,), int32.
    first: L_t of the twin in the first comparison, shape (tasks,).
    gap: running means of log(L_t/L_t of the twin) on the same batch, shape (tasks,),
      both losses above a floor, see `compare`.
    level: running means of log(L_t of the twin), above the same floor, shape (tasks,).
    spread: running variances of the same, shape (tasks,).
    peak: largest mean of ρ since the network was last the twin, shape ().
  """

  params: PyTree
  opt_state: PyTree
  batch_stats: PyTree
  count: jax.Array
  first: jax.Array
  gap: jax.Array
  level: jax.Array
  spread: jax.Array
  peak: jax.Array


def check(objective: Objective) -> None:
  """Raises UserError on an unknown kind or measure, or an impossible number."""
  if objective.kind not in KINDS:
    raise UserError(
      f'sparsity.objective is {objective.kind!r}; known: {", ".join(KINDS)}'
    )
  if objective.measure not in MEASURES:
    raise UserError(
      f'sparsity.measure is {objective.measure!r}; known: {", ".join(MEASURES)}'
    )
  if not 0 < objective.target < 1:
    raise UserError(
      f'sparsity.target is {objective.target}; the share to remove has to be in (0, 1)'
    )
  if not 0 <= objective.tolerance < math.inf:
    raise UserError(
      f'sparsity.tolerance is {objective.tolerance}; the allowed relative increase of '
      f'the loss has to be a number of at least 0'
    )


def check_target(
  objective: Objective, groups: gr.Groups, params: PyTree, min_alive: int
) -> None:
  """Raises UserError on a budget that the survival floor rules out.

  Not of weights, some of which may go in living groups.

  Args:
    objective: a budget.
    groups: of `params`, a tree of arrays or their shapes.
    params: of the network.
    min_alive: groups of each layer that survive.
  """
  if objective.measure == 'weights':
    return

  def most_removed():
    alive = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), params)
    keep = {
      layer: jnp.arange(mask.size).reshape(mask.shape) < min_alive
      for layer, mask in gr.alive(groups, alive).items()
    }
    return removed(objective, groups, gr.remove(groups, alive, keep))

  # One program: by itself each operation would be compiled for each kernel's shape.
  most = float(jax.jit(most_removed)())
  if objective.target > most + 1e-6:
    raise UserError(
      f'sparsity.target is {objective.target}, but of the {objective.measure} no more '
      f'than {most:.3f} can go while sparsity.min_alive={min_alive} groups of each '
      f'layer stay; lower one of them'
    )


def differentiates(kind: str, entries: int) -> bool:
  """Whether ρ needs a hypergradient: a constraint alone moves a scalar ρ."""
  return kind == 'holdout' or entries > 1


def make_twin(
  params: PyTree, opt_state: PyTree, batch_stats: PyTree, num_tasks: int
) -> Twin:
  """The twin before the first step: the same network, as buffers of its own."""
  own = jax.tree.map(jnp.copy, (params, opt_state, batch_stats))
  numbers = [jnp.zeros(num_tasks) for _ in range(4)]
  return Twin(*own, jnp.zeros(num_tasks, jnp.int32), *numbers, jnp.float32(-jnp.inf))


def compare(
  objective: Objective,
  twin: Twin,
  sparse: Mapping[str, jax.Array],
  dense: Mapping[str, jax.Array],
) -> Twin:
  """Adds one pair of hold-out losses, by task, to the running comparison.

  gap = log((L + εL₀)/(L of the twin + εL₀)), L₀ the task's first loss. The pair shares
  its batch, so the batch's own difficulty cancels. Without εL₀ a task that is as good
  as solved would decide: of losses next to 0 ratios are large and mean nothing. With it
  an increase of ε(L + εL₀) is allowed: relative, and ε² of what there was to learn.

  Args:
    objective: with `tolerance` (ε) and `decay`; the first comparisons weigh alike.
    twin: before.
    sparse: L_t of the network, task -> shape (), float.
    dense: L_t of the twin on the same batch. A task without a loss in either (0: no
      label in the batch) keeps its numbers.

  Returns:
    The twin with count, first, gap, level and spread after.
  """
  stack = lambda values: jnp.stack(list(values.values()))
  sparse, dense = stack(sparse), stack(dense)
  seen = (dense > 0) & (sparse > 0)
  first = jnp.where(seen & (twin.count == 0), dense, twin.first)
  log = lambda losses: jnp.log(losses + objective.tolerance * first)
  # The first comparisons weigh as in a plain mean.
  weight = jnp.maximum(1 - objective.decay, 1 / (twin.count + 1))
  weight = jnp.where(seen, weight, 0)
  gap = jnp.where(seen, log(sparse) - log(dense), 0)
  change = jnp.where(seen, log(dense) - twin.level, 0)
  return twin._replace(
    count=twin.count + seen,
    first=first,
    gap=twin.gap + weight * (gap - twin.gap),
    level=twin.level + weight * change,
    spread=(1 - weight) * (twin.spread + weight * change**2),
  )


def restore(
  objective: Objective,
  twin: Twin,
  step: jax.Array,
  violation: jax.Array,
  rho: jax.Array,
  current: PyTree,
) -> tuple[Twin, PyTree, jax.Array]:
  """Makes the network its twin after the search, and if λ is far down in vain.

  That is, after step `search`, or if the constraint is violated and mean(ρ) is below
  its peak since the last time by more than log 4. The peak then starts anew. The gaps
  do not: as running means they forget in some 20 steps, in which λ does not yet take
  the equality with the twin for room. They count as 2 · allowed at most.

  Args:
    objective: with `search` and what `allowed` needs.
    twin: after `compare`.
    step: outer steps done, this one included, shape ().
    violation: from `tolerance_violation`.
    rho: ρ of this step.
    current: (θ⁰, state of its optimiser, running statistics).

  Returns:
    The twin, the network to go on with, and whether it was restored, shape (), bool.
  """
  mean = jnp.mean(rho).astype(twin.peak.dtype)
  peak = jnp.maximum(twin.peak, mean)
  in_vain = (violation > 0) & (mean < peak - RESTORE_BELOW)
  restored = in_vain | (step == objective.search)
  pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(restored, x, y), a, b)
  network = pick((twin.params, twin.opt_state, twin.batch_stats), current)
  remembered = jnp.minimum(twin.gap, 2 * allowed(objective, twin))
  gap, peak = pick((remembered, mean), (twin.gap, peak))
  return twin._replace(gap=gap, peak=peak), network, restored


def allowed(objective: Objective, twin: Twin) -> jax.Array:
  """The allowed gaps: log(1 + ε), or one standard error of the twin's log loss.

  The larger of the two: less than the standard error the hold-out part cannot tell. It
  is that of a mean of `hold_out_batches` batches (the 1-SE rule of lasso practice, as a
  constraint).

  Args:
    objective: with `tolerance` and `hold_out_batches`.
    twin: after `compare`.

  Returns:
    Shape (tasks,), float: bounds of the gaps.
  """
  error = jnp.sqrt(twin.spread / objective.hold_out_batches)
  return jnp.maximum(error, math.log1p(objective.tolerance))


def removed(objective: Objective, groups: gr.Groups, params: PyTree) -> jax.Array:
  """The share that is gone: of groups, of weights, or of FLOPs.

  The FLOPs of a convolution are 2 · (non-zero kernel entries by group) · positions; of
  coupled groups those between input and output channels that are both alive, as after
  `msp.compact`. By other groups compaction removes more (an input channel that no one
  else reads goes with what writes it) or less (an output channel whose norm has a bias
  stays).

  Args:
    objective: with `measure`, and `positions` for FLOPs.
    groups: which groups.
    params: θ⁰.

  Returns:
    Shape (), float32, in [0, 1].
  """
  counted = gr.sparsity(groups, params)
  if objective.measure != 'flops':
    return getattr(counted, objective.measure)
  if groups.axis == 'coupled':
    return _removed_flops_coupled(objective, groups, params)
  kernels = gr.select(groups, params)
  cost = jnp.array(
    [kernels[name].size * objective.positions[name] for name in groups.layers],
    jnp.float32,
  )
  totals = jnp.array(list(gr.totals(groups, params).values()), jnp.float32)
  return 1 - jnp.sum(cost * counted.alive / totals) / jnp.sum(cost)


def _removed_flops_coupled(objective, groups, params):
  alive = gr.alive(groups, params)
  at = {
    member: alive[layer]
    for layer, members in zip(groups.layers, groups.members, strict=True)
    for member in members
  }
  kernels = {path: x for path, x in gr.by_path(params).items() if (path, -1) in at}
  left, total = 0.0, 0.0
  for path, kernel in kernels.items():
    cost = float(kernel.size * objective.positions[path])
    # The image, or a stream without a group, has all its channels.
    inputs = jnp.mean(at.get((path, -2), jnp.ones(1)), dtype=jnp.float32)
    left += cost * inputs * jnp.mean(at[path, -1], dtype=jnp.float32)
    total += cost
  return 1 - left / total


def signal(
  violation: jax.Array, rho: jax.Array, hypergradient: jax.Array | None
) -> jax.Array:
  """The "gradient" of ρ: the violation, and the tie-break of a vector ρ.

  The violation for every entry, plus the part of the hypergradient that does not move
  their mean, scaled to at most `TIE_BREAK`.

  Args:
    violation: > 0 if λ is too large, in units of the band of proportional control; ρ's
      optimiser clips it.
    rho: ρ, shape () or (n,).
    hypergradient: dL_holdout/dρ, shape of ρ; None for a scalar ρ.

  Returns:
    Shape of ρ.
  """
  common = jnp.broadcast_to(violation, rho.shape).astype(rho.dtype)
  if hypergradient is None:
    return common
  deviation = hypergradient - jnp.mean(hypergradient)
  largest = jnp.max(jnp.abs(deviation))
  return common + TIE_BREAK * deviation / jnp.where(largest > 0, largest, math.inf)


def settling(
  objective: Objective, groups: gr.Groups, params: PyTree
) -> tuple[jax.Array, jax.Array]:
  """What a budget asks of a step while its pattern settles.

  What is dead stays dead then, so λ need not hold it there. Once the share removed is
  in [target, target + `BUDGET_SLACK`] it stays, and the rest trains without a penalty
  (as in the relaxed lasso). Below, λ goes on; above, groups may come back.

  Args:
    objective: of kind 'budget'.
    groups: which groups.
    params: θ⁰.

  Returns:
    Whether the target is met, so that λ = 0, and whether more is gone than may be;
    both shape (), bool.
  """
  share = removed(objective, groups, params)
  over = share > objective.target + BUDGET_SLACK
  return (share >= objective.target) & ~over, over


def tolerance_violation(objective: Objective, twin: Twin) -> jax.Array:
  """max_t (gap − allowed)/allowed: > 0 where a task is worse than it may be.

  The worst task decides: a mean would let one task that overfits pay for the others.

  Args:
    objective: see `allowed`.
    twin: after `compare`.

  Returns:
    Shape (), float; −1 where all tasks equal the twin.
  """
  limit = allowed(objective, twin)
  # Two equal losses, as in the first step, leave nothing to divide by.
  return jnp.max((twin.gap - limit) / jnp.maximum(limit, 1e-6))


def trust_region_violation(
  objective: Objective,
  groups: gr.Groups,
  params: PyTree,
  at_start: jax.Array | float,
  step: jax.Array | float,
) -> jax.Array:
  """(dead − allowed)/`BUDGET_BAND`: > 0 where more is dead than may be by now.

  allowed = a + (1 − a) min(t/rise, 1), a the share dead at the start: the aim of a
  budget for everything. In its first steps a network learns faster the more λ shrinks
  its weights, behind norms, and the hypergradient asks for more; the groups that die of
  it do not come back when it no longer does. So a λ that nothing holds back ends where
  it has been by then, and a large start stays large.

  Args:
    objective: of kind 'holdout', with a rise.
    groups: which groups.
    params: θ⁰.
    at_start: a, shape ().
    step: outer steps done before the one that led to θ⁰, shape ().

  Returns:
    Shape ().
  """
  allowed = at_start + (1 - at_start) * jnp.minimum(step / objective.rise, 1)
  return (removed(objective, groups, params) - allowed) / BUDGET_BAND


def budget_violation(
  objective: Objective,
  groups: gr.Groups,
  params: PyTree,
  at_start: jax.Array | float = 0.0,
  step: jax.Array | float = math.inf,
  settled: int | None = None,
) -> jax.Array:
  """(removed − aim)/`BUDGET_BAND`; the aim rises, and ends as the target.

  From a, the share gone at the start, to b in `objective.rise` steps: after t of them
  it is a + (b − a) min(t/rise, 1). It rises because a network that is sparse early
  learns less than one that is made sparse when it has learned (gradual pruning, Zhu and
  Gupta, arXiv 1710.01878; here linear).

  b is the target; or, where the pattern will settle, target − `UNSETTLED` · target ·
  (1 − target) until then: the λ that holds the target itself against the noise is
  needlessly large.

  Args:
    objective: of kind 'budget'.
    groups: which groups.
    params: θ⁰.
    at_start: a, shape ().
    step: outer steps done before the one that led to θ⁰, shape ().
    settled: steps after which the pattern settles; None: never.

  Returns:
    Shape ().
  """
  target, rise = objective.target, objective.rise
  below = 0.0 if settled is None else UNSETTLED * target * (1 - target)
  progress = jnp.minimum(step / rise, 1) if rise else 1.0
  aim = at_start + progress * (target - below - at_start)
  if settled is not None:
    aim = jnp.where(step < settled, aim, target)
  return (removed(objective, groups, params) - aim) / BUDGET_BAND
