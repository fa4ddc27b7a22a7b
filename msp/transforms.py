"""Proximal steps, and the few updates of ρ optax lacks, as optax transforms.

tx = optax.chain(
  optax.clip_by_global_norm(1.0),
  msp.adaptive_proximal(optax.adamw, 'group_lasso', groups, learning_rate=lr),
)
updates, state = tx.update(grads, state, params, sparsity=lam)
params = optax.apply_updates(params, updates)  # dead groups are exactly 0
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msp import groups as gr
from msp.errors import UserError
from msp.prox import Penalty, get_penalty

# The survival floor: root mean square of a protected group's weights.
FLOOR_RMS = 1e-3

_NO_PARAMS = 'this transform needs the params: call update(updates, state, params)'


class ProximalState(NamedTuple):
  """State of `proximal`."""

  count: jax.Array  # steps done, shape (), int32


class AdaptiveProximalState(NamedTuple):
  """State of `adaptive_proximal`."""

  count: jax.Array  # steps done, shape (), int32
  inner_state: Any


def proximal(
  penalty: str | Penalty,
  groups: gr.Groups,
  learning_rate: optax.ScalarOrSchedule,
  *,
  sparsity: optax.ScalarOrSchedule | None = None,
  min_alive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Proximal step in the Euclidean metric; the last link of a chain.

  With p the parameters and u the incoming updates it returns prox(p + u) − p,
  prox(x) = argmin_z ½‖z − x‖² + α λ R(z), so that `optax.apply_updates` lands
  on the proximal point. It fits optimisers whose step is −α · gradient (SGD). It
  shrinks in every call: `optax.MultiSteps` and `optax.apply_if_finite`, which make a
  step in some calls only, have to be around the whole chain. Updates of less precision
  than the parameters come out in theirs, or dead groups would not be exactly 0; inside
  `apply_if_finite`, which wants one type, cast the gradients first.

  Args:
    penalty: a name of `msp.prox.PENALTIES`, or `msp.prox.get_penalty` of one with
      its options.
    groups: which leaves, and along which axis; all others pass through.
    learning_rate: α, the step size of the optimiser before it, or a schedule. Of SGD
      with momentum μ, which repeats a gradient in later steps, α/(1 − μ).
    sparsity: λ, or a schedule of it, where `update` is not given one.
    min_alive: the strongest `min_alive` groups of each layer (of some that tie, all)
      are shrunk, but never below a root mean square weight of 1e-3. None: all may die.
      One of `static_args` to `optax.inject_hyperparams`.

  Returns:
    A transform whose `update` needs `params`, and takes the keyword `sparsity`: λ,
    shape () or (len(groups.names),), through which it is differentiable.

  Raises:
    UserError: unknown penalty; a step that is too large for a concave one (a
      schedule is looked at in 1,500 steps up to 10⁶); on `init`, parameters that hold
      none of the groups.
  """
  kind = get_penalty(penalty) if isinstance(penalty, str) else penalty
  _check_step(kind, learning_rate)

  def init(params):
    gr.require(groups, params)
    return ProximalState(jnp.zeros([], jnp.int32))

  default = sparsity

  def update(updates, state, params=None, *, sparsity=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(_NO_PARAMS)
    step = _at(learning_rate, state.count)
    lam = _coefficient(sparsity, default, state.count)

    def prox(x, metric, lam, axis):
      del metric
      return jax.tree.map(lambda x, lam: kind.prox(x, step, lam, axis), x, lam)

    updates = _proximal_updates(prox, groups, params, updates, None, lam, min_alive)
    return updates, ProximalState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def adaptive_proximal(
  inner: Callable[..., optax.GradientTransformation] | optax.GradientTransformation,
  penalty: str | Penalty,
  groups: gr.Groups,
  learning_rate: optax.ScalarOrSchedule,
  *,
  b2: float | None = None,
  eps: float | None = None,
  eps_root: float | None = None,
  sparsity: optax.ScalarOrSchedule | None = None,
  min_alive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs `inner`, then a proximal step in the metric of its second moment.

  prox(x) = argmin_z ½(z − x)ᵀD(z − x) + α λ R(z) with x = p + u and
  D = √(v̂ + eps_root) + eps, the preconditioner of the Adam step just made:
  `inner`'s second moment `nu`, bias-corrected by 1/(1 − b2ᵗ) if its state
  counts steps. Where it makes no step, as inside `optax.apply_if_finite` or between
  those of `optax.MultiSteps`, there is no proximal one either. (Deleu & Bengio, arXiv
  2102.03869; D is corrected as the step is.)

  Args:
    inner: an optimiser of optax whose step is in that metric: adam, adamw, nadam,
      nadamw, adabelief, yogi or rmsprop, with options as
      `functools.partial(optax.adamw, weight_decay=0.1)`. It is called with
      `learning_rate`, and D is read from its arguments. Or a transform that has been
      made, such as a chain, with b2, eps and eps_root as it has them: they cannot be
      seen from here, nor that it steps in another metric (adamax, radam, lamb, adopt).
      It gets what further arguments `update` is given, `sparsity` included.
    penalty: see `proximal`.
    groups: which leaves, and along which axis.
    learning_rate: α, a number or a schedule; that of `inner`.
    b2: decay of the second moment.
    eps: added to the root. A group without gradient survives while the root mean
      square of its weights exceeds αλ/eps.
    eps_root: added inside the root; > 0 if the step is differentiated.
    sparsity: see `proximal`.
    min_alive: see `proximal`.

  Returns:
    A transform; `update` needs `params`, and takes the keyword `sparsity`.

  Raises:
    UserError: an optimiser of another metric; b2, eps and eps_root missing beside a
      transform, or given beside an optimiser; on `init`, if `inner` keeps no second
      moment of this kind, or several, or not of all the groups; if the parameters hold
      none of them.
  """
  kind = get_penalty(penalty) if isinstance(penalty, str) else penalty
  given = {'b2': b2, 'eps': eps, 'eps_root': eps_root}
  if isinstance(inner, optax.GradientTransformation):
    lacking = [name for name, value in given.items() if value is None]
    if lacking:
      raise UserError(
        f'adaptive_proximal cannot see {", ".join(lacking)} of a transform that has '
        f'been made: give them, or the optimiser itself (optax.adamw, or '
        f'functools.partial of it) with its learning rate'
      )
  else:
    if any(value is not None for value in given.values()):
      raise UserError(
        'adaptive_proximal reads b2, eps and eps_root from its optimiser: give them to '
        'that, by functools.partial'
      )
    b2, eps, eps_root = metric_of(inner)
    inner = inner(learning_rate)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    inner_state = inner.init(params)
    gr.require(groups, params)
    measured = gr.select(groups, _second_moment(inner_state).nu)
    lacking = [layer for layer in gr.select(groups, params) if layer not in measured]
    if lacking:
      raise UserError(
        f'the inner transform keeps no second moment of {lacking[0]}; give it all '
        f'grouped parameters, or find groups of those that it has'
      )
    return AdaptiveProximalState(jnp.zeros([], jnp.int32), inner_state)

  default = sparsity

  def update(updates, state, params=None, *, sparsity=None, **extra_args):
    if params is None:
      raise ValueError(_NO_PARAMS)
    if sparsity is not None:
      extra_args['sparsity'] = sparsity
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    step = _at(learning_rate, state.count)
    lam = _coefficient(sparsity, default, state.count)
    before, moment = _second_moment(state.inner_state), _second_moment(inner_state)
    # RMSProp counts no steps and corrects no bias.
    count = moment.count if 'count' in moment._fields else None
    if count is None:
      changed = jax.tree.map(lambda a, b: jnp.any(a != b), before.nu, moment.nu)
      # Of a gradient that stays the same, so does the mean of its squares in the end.
      changed = changed, jax.tree.map(lambda u: jnp.any(u != 0), updates)
      moved = jnp.any(jnp.stack(jax.tree.leaves(changed)))
    else:
      moved = count > before.count

    def metric(nu):
      if count is not None:
        # In half precision b2 itself would be 1.
        nu = nu / (1 - b2 ** jnp.maximum(count, 1)).astype(nu.dtype)
      return jnp.sqrt(nu + eps_root) + eps

    def prox(x, d, lam, axis):
      return optax.tree.where(moved, kind.prox_weighted(x, d, step, lam, axis), x)

    metrics = jax.tree.map(metric, gr.select(groups, moment.nu))
    updates = _proximal_updates(prox, groups, params, updates, metrics, lam, min_alive)
    done = optax.safe_increment(state.count)
    return updates, AdaptiveProximalState(
      jnp.where(moved, done, state.count), inner_state
    )

  return optax.GradientTransformationExtraArgs(init, update)


def freeze_dead(groups: gr.Groups) -> optax.GradientTransformationExtraArgs:
  """Keeps groups that are exactly 0 at 0.

  u_g ← 0 for a dead group g; all others pass through. In a chain it stands before the
  prox, which leaves what is 0 at 0 and has to choose its survivors among the living.

  A prox on single batches does not identify the pattern: the noise of a batch's
  gradient lifts a dead group for a few steps, now and then, to the end of training. So
  a first phase finds the pattern, and a second one trains what is left of it. (Lee &
  Wright, Manifold identification in dual averaging, JMLR 13, 2012, section 5.)

  Args:
    groups: which leaves, and along which axis.

  Returns:
    A transform without a state whose `update` needs `params`. With the keyword `thaw`,
    shape (), bool, dead groups may come back in a step.

  Raises:
    UserError: on `init`, parameters that hold none of the groups.
  """

  def update(updates, state, params=None, *, thaw=False, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(_NO_PARAMS)
    keep = {layer: alive | thaw for layer, alive in gr.alive(groups, params).items()}
    return gr.remove(groups, updates, keep), state

  def init(params):
    gr.require(groups, params)
    return optax.EmptyState()

  return optax.GradientTransformationExtraArgs(init, update)


def _at(value, count):
  """A number as it is, a schedule at its step."""
  return value(count) if gr.is_function(value) else value


def _coefficient(given, default, count):
  if given is None and default is None:
    raise ValueError(
      'this transform needs λ: call update(…, sparsity=λ), or make it with sparsity=λ'
    )
  return _at(default, count) if given is None else given


def _check_step(penalty, learning_rate):
  # A traced one, as by inject_hyperparams, cannot be looked at: its prox is NaN.
  if penalty.max_step == math.inf or isinstance(learning_rate, jax.core.Tracer):
    return
  steps = learning_rate
  if gr.is_function(learning_rate):
    counts = np.unique(np.geomspace(1, 1e6, 2000).astype(np.int32))
    with jax.ensure_compile_time_eval():  # also where the transform is made in a jit
      steps = jax.vmap(learning_rate)(jnp.asarray([0, *counts]))
    if isinstance(steps, jax.core.Tracer):  # of a peak that is traced
      return
  largest = float(np.asarray(steps).max())
  if largest >= penalty.max_step:
    raise UserError(
      f'the penalty is too concave for a step of {largest}: its prox has one minimum '
      f'for steps below {penalty.max_step} (gamma of MCP, a - 1 of SCAD)'
    )


def _proximal_updates(prox, groups, params, updates, metrics, sparsity, min_alive):
  """prox(p + u) − p on the grouped leaves, u on all others.

  `prox` is (x, D, λ, axis) -> z of trees; metrics: layer -> D, or None.
  """
  if groups.axis == 'coupled':
    return _coupled_updates(prox, groups, params, updates, metrics, sparsity, min_alive)
  coefficients = gr.coefficients(groups, sparsity)
  incoming = gr.select(groups, updates)
  # Inside `masked` or `partition` only some of the layers are there.
  before = gr.select(groups, params)
  x = {layer: p + incoming[layer] for layer, p in before.items()}
  axis = groups.array_axis
  several = axis is not None and jax.default_backend() != 'cpu'
  solve = _prox_together if several else _prox_apart
  z = solve(prox, x, metrics, coefficients, axis, min_alive)
  outgoing = {
    # In less than the parameters' precision p + (z − p) would not be z.
    layer: (z[layer] - p).astype(jnp.promote_types(p.dtype, incoming[layer].dtype))
    for layer, p in before.items()
  }
  return gr.replace(updates, outgoing)


def _prox_apart(prox, x, metrics, coefficients, axis, min_alive):
  """The prox of every layer, kernel by kernel."""
  if metrics is not None:
    metrics = {layer: metrics[layer] for layer in x}
  z = prox(x, metrics, {layer: coefficients[layer] for layer in x}, axis)
  return {layer: _protect(x[layer], z[layer], axis, min_alive) for layer in x}


def _prox_together(prox, x, metrics, coefficients, axis, min_alive):
  """The same, of all layers whose groups are of one size as of a single matrix.

  A ResNet-50 has 53 kernels and ten sizes. An accelerator takes longer to start a
  layer's reductions than to make them; a CPU takes longer to lay out the rows.
  """
  alike = {}
  for layer, kernel in x.items():
    alike.setdefault((gr.size(kernel, axis), kernel.dtype), []).append(layer)
  sizes = [[x[layer].shape[axis] for layer in layers] for layers in alike.values()]
  rows = lambda tree: [
    jnp.concatenate([gr.gather(((layer, axis),), tree) for layer in layers])
    for layers in alike.values()
  ]
  lam = [
    jnp.repeat(jnp.stack([coefficients[layer] for layer in layers]), np.array(counts))
    for layers, counts in zip(alike.values(), sizes, strict=True)
  ]
  matrices = rows(x)
  solved = prox(matrices, None if metrics is None else rows(metrics), lam, 0)
  z = {}
  for layers, counts, matrix, shrunk in zip(
    alike.values(), sizes, matrices, solved, strict=True
  ):
    shrunk = _protect(matrix, shrunk, 0, min_alive, counts)
    parts = jnp.split(shrunk, np.cumsum(counts)[:-1])
    for layer, part in zip(layers, parts, strict=True):
      z |= gr.scatter(((layer, axis),), part, {layer: x[layer]})
  return z


def _coupled_updates(prox, groups, params, updates, metrics, sparsity, min_alive):
  """The same for groups that overlap: the prox of each stream, one after the other.

  A kernel is in the groups of the stream it reads and in those of the one it writes.
  What this computes differs from the prox of the sum by O((αλ)²) (an incremental
  proximal step: Bertsekas, arXiv 1507.01030); zeros stay zeros.
  """
  coefficients = gr.coefficients(groups, sparsity)
  before, incoming = gr.by_path(params), gr.by_path(updates)
  grouped = {path for members in groups.members for path, _ in members}
  x = {path: before[path] + u for path, u in incoming.items() if path in grouped}
  for layer, members in zip(groups.layers, groups.members, strict=True):
    if members[0][0] not in x:  # inside `masked` or `partition`
      continue
    matrix = {layer: gr.gather(members, x)}
    z = _prox_apart(prox, matrix, metrics, coefficients, 0, min_alive)
    x = gr.scatter(members, z[layer], x)
  return gr.replace(
    updates, {path: (x[path] - before[path]).astype(x[path].dtype) for path in x}
  )


def _protect(x, z, axis, min_alive, counts=None):
  """Holds the `min_alive` strongest groups of x at or above the floor.

  counts: groups of each layer, where x holds those of several; they are by layer.
  """
  if isinstance(min_alive, jax.core.Tracer):
    raise UserError(
      "min_alive is traced; give inject_hyperparams static_args=('min_alive',)"
    )
  if not min_alive:
    return z
  before = gr.norms(x, axis)
  rows = before.reshape(1, -1) if counts is None else gr.by_layer(before, counts, -1)
  strongest = jnp.max(rows, 1)  # top_k is many times as slow on an accelerator
  if min_alive > 1:
    strongest = jax.lax.top_k(rows, min(min_alive, rows.shape[1]))[0][:, -1]
  strongest = (
    strongest[0] if counts is None else jnp.repeat(strongest, np.array(counts))
  )
  floor = jnp.minimum(before, FLOOR_RMS * math.sqrt(gr.size(x, axis)))
  hit = (before >= strongest) & (gr.norms(z, axis) < floor)
  scale = jnp.where(hit, floor / jnp.where(before > 0, before, 1), 0)
  return jnp.where(gr.expand(hit, x, axis), x * gr.expand(scale, x, axis), z)


# Their `nu` is not, or not alone, what their step is divided by.
_OTHER_METRICS = (
  optax.ScaleByAmsgradState,
  optax.ScaleByNovogradState,
  optax.ScaleByRStdDevState,  # and the same with a count, which optax does not export
  # By its shape: an array would start the backend of JAX on import.
  type(
    jax.eval_shape(optax.rmsprop(0.0, centered=True, bias_correction=True).init, ())[0]
  ),
  optax.ScaleBySM3State,
  optax.contrib.ScheduleFreeState,  # steps at a point beside the parameters
  optax.TraceState,  # momentum after the division repeats a gradient in later steps
)

# Optimisers that step in the metric of their second moment, as `metric_of` reads it.
# Others keep the state of Adam and step otherwise: adamax, lamb, radam, contrib.adopt.
ADAPTIVE = (
  optax.adam,
  optax.adamw,
  optax.nadam,
  optax.nadamw,
  optax.adabelief,
  optax.yogi,
  optax.rmsprop,
)


class Metric(NamedTuple):
  """D = √(v̂ + eps_root) + eps of an optimiser, v̂ with decay b2."""

  b2: float
  eps: float
  eps_root: float


def metric_of(optimizer: Callable[..., optax.GradientTransformation]) -> Metric:
  """The metric of an optimiser's step, by its arguments.

  Args:
    optimizer: a function of optax, or a `functools.partial` of one.

  Returns:
    Its b2, eps and eps_root, as given or by the optimiser's defaults.

  Raises:
    UserError: its step is in another metric than its second moment's, or repeats
      gradients (momentum after the division).
  """
  function = optimizer
  while isinstance(function, functools.partial):
    function = function.func
  values = {
    name: p.default for name, p in inspect.signature(optimizer).parameters.items()
  }
  odd = [name for name in ('centered', 'momentum') if values.get(name)]
  if function not in ADAPTIVE or odd:
    raise UserError(
      f'the prox in the metric of a second moment does not fit '
      f'{getattr(function, "__name__", function)}'
      f'{" with " if odd else ""}{" and ".join(odd)}; use one of adam, adamw, nadam, '
      f'nadamw, adabelief, yogi, rmsprop, or the Euclidean prox (msp.proximal, '
      f'sparsity.metric=euclidean)'
    )
  if function is not optax.rmsprop:
    return Metric(values['b2'], values['eps'], values.get('eps_root', 0.0))
  inside = values['eps_in_sqrt']
  eps = values['eps']
  return Metric(values['decay'], 0.0 if inside else eps, eps if inside else 0.0)


def _second_moment(state: Any) -> Any:
  """The one node of an optimiser state that has a field `nu`."""
  has_nu = lambda node: hasattr(node, 'nu')
  nodes = [n for n in jax.tree.leaves(state, is_leaf=has_nu) if has_nu(n)]
  if len(nodes) != 1:
    raise UserError(
      f'adaptive_proximal needs an inner transform with one second moment '
      f'(nu), such as adam, adamw or rmsprop; found {len(nodes)}. After a '
      f'plain step (sgd) use proximal instead'
    )
  is_other = lambda node: isinstance(node, _OTHER_METRICS)
  others = [n for n in jax.tree.leaves(state, is_leaf=is_other) if is_other(n)]
  if others:
    raise UserError(
      f'adaptive_proximal needs an inner transform whose step is divided by the root '
      f'of its second moment, such as adam, adamw or rmsprop; that of '
      f'{type(others[0]).__name__} is not'
    )
  return nodes[0]


class MeanMagnitudeState(NamedTuple):
  """State of `scale_by_mean_magnitude`."""

  count: jax.Array  # updates seen, shape (), int32
  mean: Any  # running mean of |u|, one for each entry


def scale_by_mean_magnitude(
  decay: float = 0.95, clip: float = 3.0
) -> optax.GradientTransformation:
  """Divides each entry by the running mean of its magnitude, then clips.

  u ← clamp(u/m̂, −clip, clip), m ← decay·m + (1 − decay)·min(|u|, clip·m̂)
  (m̂ bias-corrected). Hypergradients are heavy-tailed: a mean of clipped
  magnitudes forgets an outlier, a mean of squares (Adam) carries it for long. A NaN
  passes through and an infinity is clipped; the mean remembers neither.

  Args:
    decay: of the running mean.
    clip: largest magnitude let through, in units of the mean.

  Returns:
    A transform. Entries that have only ever been 0 stay 0.
  """

  def init(params):
    return MeanMagnitudeState(
      jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)
    )

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    correction = 1 - decay ** state.count.astype(jnp.float32)

    def mean(u, m):
      magnitude = jnp.abs(u)
      # The first non-zero update has no mean to be clipped by.
      limit = jnp.where(m > 0, clip * m / jnp.maximum(correction, 1e-6), jnp.inf)
      new = decay * m + (1 - decay) * jnp.minimum(magnitude, limit)
      return jnp.where(jnp.isfinite(u), new, m).astype(m.dtype)

    def scale(u, m):
      m = m / (1 - decay ** count.astype(jnp.float32))
      scaled = jnp.clip(u / jnp.where(m > 0, m, 1), -clip, clip)
      return jnp.where((m > 0) | jnp.isnan(u), scaled, 0).astype(u.dtype)

    new_mean = jax.tree.map(mean, updates, state.mean)
    updates = jax.tree.map(scale, updates, new_mean)
    return updates, MeanMagnitudeState(count, new_mean)

  return optax.GradientTransformation(init, update)


def bounded(lower: float, upper: float) -> optax.GradientTransformation:
  """Keeps every parameter in [lower, upper]; the last link of a chain.

  Returns clip(p + u) − p; for ρ = log(λ/λ_max) that is λ ∈ [e^lower, e^upper]
  times λ_max. To the rounding of p + (clip(p + u) − p).

  Raises:
    UserError: lower > upper.
  """
  if lower > upper:
    raise UserError(f'bounded: the lower bound {lower} is above the upper one {upper}')

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(_NO_PARAMS)
    updates = jax.tree.map(
      lambda u, p: jnp.clip(p + u, lower, upper) - p, updates, params
    )
    return updates, state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class AnticipateState(NamedTuple):
  """State of `anticipate`."""

  count: jax.Array  # updates seen, shape (), int32
  last: Any  # the update before
  slope: Any  # running mean of the change from one update to the next


def anticipate(horizon: float, decay: float = 0.8) -> optax.GradientTransformation:
  """Extrapolates updates: u ← u + horizon · s, s the running mean of their change.

  s ← decay·s + (1 − decay)·(u − u of the step before). For a signal that answers late:
  groups die tens of steps after λ has grown, and a ρ that follows the share of dead
  groups itself goes far beyond it. (The derivative term of a PD controller.)

  Args:
    horizon: steps to look ahead.
    decay: of the running mean.

  Returns:
    A transform.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AnticipateState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(updates, state, params=None):
    del params
    seen = state.count > 0  # the first has nothing before it
    slope = jax.tree.map(
      lambda u, last, s: decay * s + (1 - decay) * jnp.where(seen, u - last, 0),
      updates,
      state.last,
      state.slope,
    )
    ahead = jax.tree.map(lambda u, s: u + horizon * s, updates, slope)
    return ahead, AnticipateState(optax.safe_increment(state.count), updates, slope)

  return optax.GradientTransformation(init, update)


def retreat(rate: float = 0.1) -> optax.GradientTransformationExtraArgs:
  """Makes updates fall where a constraint is violated.

  u ← min(u, 0) − rate · min(v, 1) where v > 0, v the keyword `violation` of `update`:
  the trust region of the objective `holdout` (`msp.objectives.trust_region_violation`).

  Args:
    rate: of the fall, a step.

  Returns:
    A transform without a state. Without a violation updates pass through.
  """

  def update(updates, state, params=None, *, violation=None, **extra_args):
    del params, extra_args
    if violation is None:
      return updates, state
    fall = rate * jnp.clip(violation, 0, 1)
    back = lambda u: jnp.where(violation > 0, jnp.minimum(u, 0) - fall, u)
    return jax.tree.map(lambda u: back(u).astype(u.dtype), updates), state

  init = lambda params: optax.EmptyState()
  return optax.GradientTransformationExtraArgs(init, update)


def clip_by_weight_norm(
  max_ratio: float = 1.0, min_norm: float = 1e-3
) -> optax.GradientTransformation:
  """Scales each leaf's update down to ‖u‖ ≤ max_ratio · max(‖p‖, min_norm).

  Behind a normalisation only a step relative to the weights matters, and the gradient
  grows as 1/‖p‖: where λ shrinks the weights, an inner SGD step of fixed length leads
  ever farther away, θ⁰ and θᴷ part, and the hypergradient rewards more shrinkage. With
  this before SGD of step α a leaf moves by α · max_ratio of its norm at most. The
  prox behind it keeps its step: where a gradient is scaled by c, λ weighs 1/c as much.
  (As adaptive gradient clipping, arXiv 2102.06171, by leaf, and with a derivative that
  is finite where a gradient is 0.)

  Args:
    max_ratio: largest ‖u‖/‖p‖ let through.
    min_norm: norm that counts for leaves that are smaller, such as zero biases.

  Returns:
    A transform whose `update` needs `params`.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(_NO_PARAMS)

    def clip(u, p):
      limit = max_ratio * jnp.maximum(gr.norms(p[None], 0)[0], min_norm)
      norm = gr.norms(u[None], 0)[0]
      return u * jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1), 1)

    return jax.tree.map(clip, updates, params), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
