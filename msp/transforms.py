"""Proximal steps, and the few updates of ρ optax lacks, as optax transforms.

tx = optax.chain(
  optax.clip_by_global_norm(1.0),
  msp.adaptive_proximal(optax.adamw(lr), 'group_lasso', groups, learning_rate=lr),
)
updates, state = tx.update(grads, state, params, sparsity=lam)
params = optax.apply_updates(params, updates)  # dead groups are exactly 0
"""

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msp import groups as gr
from msp.errors import UserError, words
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
    learning_rate: α, the step size of the optimiser before it, or a schedule.
    sparsity: λ, or a schedule of it, where `update` is not given one.
    min_alive: the strongest `min_alive` groups of each layer are shrunk, but
      never below a root mean square weight of 1e-3. None: all may die. One of
      `static_args` to `optax.inject_hyperparams`.

  Returns:
    A transform whose `update` needs `params`, and takes the keyword `sparsity`: λ,
    shape () or (len(groups.names),), through which it is differentiable.

  Raises:
    UserError: unknown penalty; a step that is too large for a concave one (a
      schedule is looked at in steps 0, 1, 10, …, 10⁶); on `init`, parameters that hold
      none of the groups.
  """
  kind = get_penalty(penalty) if isinstance(penalty, str) else penalty
  _check_step(kind, learning_rate)
  axis = groups.array_axis

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

    def prox(x, lam):
      return jax.tree.map(lambda x, lam: kind.prox(x, step, lam, axis), x, lam)

    updates = _proximal_updates(prox, groups, params, updates, lam, min_alive)
    return updates, ProximalState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init, update)


def adaptive_proximal(
  inner: optax.GradientTransformation,
  penalty: str | Penalty,
  groups: gr.Groups,
  learning_rate: optax.ScalarOrSchedule,
  *,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_root: float = 0.0,
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
    inner: an optax transform whose step is in that metric: adam, adamw, nadam,
      nadamw, adabelief, yogi, rmsprop. Others keep the same state and step in
      another metric, which cannot be seen from here: adamax, radam, lamb, adopt. It
      gets what further arguments `update` is given, `sparsity` included.
    penalty: see `proximal`.
    groups: which leaves, and along which axis.
    learning_rate: α of `inner`, or a schedule.
    b2: decay of the second moment; as given to `inner`.
    eps: as given to `inner`. A group without gradient survives while the root
      mean square of its weights exceeds αλ/eps.
    eps_root: as given to `inner`; > 0 if the step is differentiated. `optax.rmsprop`
      adds its eps inside the root: eps_root is that one, and eps = 0.
    sparsity: see `proximal`.
    min_alive: see `proximal`.

  Returns:
    A transform; `update` needs `params`, and takes the keyword `sparsity`.

  Raises:
    UserError: on `init`, if `inner` keeps no second moment of this kind, or several,
      or not of all the groups; if the parameters hold none of them.
  """
  kind = get_penalty(penalty) if isinstance(penalty, str) else penalty
  axis = groups.array_axis
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
      moved = jnp.any(jnp.stack(jax.tree.leaves(changed)))
    else:
      moved = count > before.count
    second = gr.select(groups, moment.nu)

    def metric(nu):
      if count is not None:
        # In half precision b2 itself would be 1.
        nu = nu / (1 - b2 ** jnp.maximum(count, 1)).astype(nu.dtype)
      return jnp.sqrt(nu + eps_root) + eps

    def prox(x, lam):
      metrics = {layer: metric(second[layer]) for layer in x}
      return optax.tree.where(moved, kind.prox_weighted(x, metrics, step, lam, axis), x)

    updates = _proximal_updates(prox, groups, params, updates, lam, min_alive)
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


def _is_schedule(value):
  return callable(value) and not hasattr(value, 'shape')  # an nnx.Param is both


def _at(value, count):
  """A number as it is, a schedule at its step."""
  return value(count) if _is_schedule(value) else value


def _coefficient(given, default, count):
  if given is None and default is None:
    raise ValueError(
      'this transform needs λ: call update(…, sparsity=λ), or make it with sparsity=λ'
    )
  return _at(default, count) if given is None else given


def _check_step(penalty, learning_rate):
  steps = [learning_rate]
  if _is_schedule(learning_rate):
    with jax.ensure_compile_time_eval():  # also where the transform is made in a jit
      steps = [learning_rate(count) for count in (0, *(10**n for n in range(7)))]
  # A traced one, as by inject_hyperparams, cannot be looked at.
  known = [float(step) for step in steps if not isinstance(step, jax.core.Tracer)]
  largest = max(known, default=0.0)
  if largest >= penalty.max_step:
    raise UserError(
      f'the penalty is too concave for a step of {largest}: its prox has one minimum '
      f'for steps below {penalty.max_step} (gamma of MCP, a - 1 of SCAD)'
    )


def _proximal_updates(prox, groups, params, updates, sparsity, min_alive):
  """prox(p + u) − p on the grouped leaves, u on all others."""
  if groups.axis == 'coupled':
    return _coupled_updates(prox, groups, params, updates, sparsity, min_alive)
  axis = groups.array_axis
  coefficients = gr.coefficients(groups, sparsity)
  incoming = gr.select(groups, updates)
  # Inside `masked` or `partition` only some of the layers are there.
  before = gr.select(groups, params)
  x = {layer: p + incoming[layer] for layer, p in before.items()}
  z = prox(x, {layer: coefficients[layer] for layer in x})
  outgoing = {
    # In less than the parameters' precision p + (z − p) would not be z.
    layer: (_protect(x[layer], z[layer], axis, min_alive) - p).astype(
      jnp.promote_types(p.dtype, incoming[layer].dtype)
    )
    for layer, p in before.items()
  }
  return gr.replace(updates, outgoing)


def _coupled_updates(prox, groups, params, updates, sparsity, min_alive):
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
    if not all(path in x for path, _ in members):  # inside `masked` or `partition`
      continue
    matrix = gr.gather(members, x)
    z = prox({layer: matrix}, {layer: coefficients[layer]})[layer]
    x = gr.scatter(members, _protect(matrix, z, 0, min_alive), x)
  return gr.replace(
    updates, {path: (x[path] - before[path]).astype(x[path].dtype) for path in x}
  )


def _protect(x, z, axis, min_alive):
  """Holds the `min_alive` strongest groups of x at or above the floor."""
  if isinstance(min_alive, jax.core.Tracer):
    raise UserError(
      "min_alive is traced; give inject_hyperparams static_args=('min_alive',)"
    )
  if not min_alive:
    return z
  before = gr.norms(x, axis)
  flat = before.reshape(-1)
  strongest = jax.lax.top_k(flat, min(min_alive, flat.size))[0][-1]
  floor = jnp.minimum(before, FLOOR_RMS * math.sqrt(gr.size(x, axis)))
  hit = (before >= strongest) & (gr.norms(z, axis) < floor)
  scale = jnp.where(hit, floor / jnp.where(before > 0, before, 1), 0)
  return jnp.where(gr.expand(hit, x, axis), x * gr.expand(scale, x, axis), z)


# Their `nu` is not, or not alone, what their step is divided by.
_OTHER_METRICS = (
  optax.ScaleByAmsgradState,
  optax.ScaleByNovogradState,
  optax.ScaleByRStdDevState,  # and the same with a count, which optax does not export
  type(optax.rmsprop(0.0, centered=True, bias_correction=True).init(())[0]),
  optax.ScaleBySM3State,
  optax.contrib.ScheduleFreeState,  # steps at a point beside the parameters
)

# Optimisers whose step is in the metric of their second moment, as `metric` reads it.
# Others keep the state of Adam and step otherwise: adamax, lamb, radam, contrib.adopt.
_IN_THE_METRIC = ('adam', 'adamw', 'nadam', 'nadamw', 'adabelief', 'yogi', 'rmsprop')


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
  this before SGD of step α a leaf moves by α · max_ratio of its norm at most.
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


def build(
  entries: Sequence[Mapping[str, Any]], where: str, *, differentiated: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Chains the transforms a configuration names.

  Args:
    entries: mappings with a `name`, looked up here and then in optax (dotted
      names such as 'contrib.prodigy' too); 'module:function' is one of your own. The
      other items are its arguments. A learning_rate that is a mapping names a
      schedule of optax in the same way.
    where: the configuration field, for messages.
    differentiated: whether a hypergradient runs through the updates.

  Returns:
    `optax.chain` of them.

  Raises:
    UserError: no entry, unknown name, arguments it does not take, or a transform that
      needs more than gradients and parameters; differentiated without eps_root.
  """
  if not entries:
    raise UserError(f'{where} is empty; name at least one transform')
  chain = optax.chain(
    *(_resolve(dict(entry), where, differentiated) for entry in entries)
  )
  params = {'kernel': jax.ShapeDtypeStruct((2, 2), jnp.float32)}
  try:  # a step of any shape tells
    state = jax.eval_shape(chain.init, params)
    jax.eval_shape(chain.update, params, state, params)
  except _WRONG_ARGUMENTS as e:
    names = ', '.join(str(entry['name']) for entry in entries)
    raise UserError(
      f'{where}: {names} cannot make a step from gradients and parameters alone, or '
      f'an argument is of the wrong type: {words(e)}'
    ) from None
  return chain


def step_size(learning_rate: Any, where: str) -> optax.ScalarOrSchedule:
  """A number as it is; a mapping (name='cosine_decay_schedule', …) as a schedule.

  Raises:
    UserError: neither of them; unknown schedule, or arguments it does not take.
  """
  if not hasattr(learning_rate, 'items'):  # a ConfigDict is no Mapping
    if not isinstance(learning_rate, int | float) or not 0 <= learning_rate < math.inf:
      raise UserError(
        f'{where}: learning_rate is {learning_rate!r}; it has to be a number, 0 or '
        f"more, or a schedule such as dict(name='cosine_decay_schedule', …)"
      )
    return learning_rate
  entry = dict(learning_rate)
  name = entry.pop('name', None)
  factory = getattr(optax.schedules, str(name), None)
  if not callable(factory):
    raise UserError(f'{where}: unknown schedule {name!r}; known: those of optax')
  return _call(factory, name, entry, where)


def metric(entry: Mapping[str, Any], where: str) -> dict[str, float]:
  """What `adaptive_proximal` needs of an optimiser's configuration entry.

  Args:
    entry: a mapping as of `build`, with a learning_rate.
    where: the configuration field, for messages.

  Returns:
    Its b2, eps and eps_root, as given or by the optimiser's defaults.

  Raises:
    UserError: its step is in another metric than its second moment's.
  """
  name = entry['name']
  values = _arguments(_find(name, where), entry) if name in _IN_THE_METRIC else None
  if values is None or values.get('centered'):
    raise UserError(
      f'{where}: the prox in the metric of a second moment does not fit '
      f'{"a centered " if values else ""}{name}; use one of '
      f'{", ".join(_IN_THE_METRIC)}, or sparsity.metric=euclidean'
    )
  if name == 'rmsprop':
    values['b2'] = values['decay']
    if values['eps_in_sqrt']:
      values |= {'eps_root': values['eps'], 'eps': 0.0}
  return {name: values[name] for name in ('b2', 'eps', 'eps_root') if name in values}


# What the functions of optax raise on arguments that they do not check.
_WRONG_ARGUMENTS = (TypeError, ValueError, LookupError, AttributeError)


def _call(factory, name, arguments, where):
  try:
    return factory(**arguments)
  except _WRONG_ARGUMENTS as e:
    takes = ', '.join(inspect.signature(factory).parameters)
    raise UserError(
      f'{where}: {name} cannot take {arguments}: {words(e)}; it takes {takes}'
    ) from None


def _find(name, where):
  """A transform by its name in a configuration: see `build`."""
  found: Any = _OWN.get(name)
  if isinstance(name, str) and ':' in name:
    try:
      found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as e:
      raise UserError(f'{where}: {name!r} cannot be imported: {words(e)}') from None
  elif isinstance(name, str) and found is None:
    found = optax
    for part in name.split('.'):
      found = getattr(found, part, None)
  if not callable(found):
    raise UserError(
      f'{where}: unknown transform {name!r}; known are the functions of optax, '
      f"{', '.join(_OWN)}, and your own as 'module:function'"
    )
  return found


def _resolve(entry, where, differentiated):
  name = entry.pop('name', None)
  factory = _find(name, where)
  if 'learning_rate' in entry:
    entry['learning_rate'] = step_size(entry['learning_rate'], where)
  transform = _call(factory, name, entry, where)
  if not isinstance(transform, optax.GradientTransformation):
    raise UserError(f'{where}: {name!r} is not an optax transform')
  values = _arguments(factory, entry)
  remedy = None
  if 'eps_root' in values and not values['eps_root']:
    remedy = 'give it an eps_root above 0, such as 1e-16'
  elif not values.get('eps_in_sqrt', True):
    remedy = 'set its eps_in_sqrt'
  if differentiated and remedy:
    raise UserError(
      f'{where}: the hypergradient runs through {name}, whose derivative is infinite '
      f'where a gradient is 0; {remedy}'
    )
  return transform


def _arguments(factory, given):
  """The arguments of a call, defaults included."""
  parameters = inspect.signature(factory).parameters
  return {name: p.default for name, p in parameters.items()} | dict(given)


_OWN: dict[str, Callable[..., optax.GradientTransformation]] = {
  'scale_by_mean_magnitude': scale_by_mean_magnitude,
  'anticipate': anticipate,
  'retreat': retreat,
  'bounded': bounded,
  'clip_by_weight_norm': clip_by_weight_norm,
}
