"""Optimisers as a configuration names them: lists of optax transforms."""

import functools
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msp import groups as gr
from msp import transforms
from msp.errors import UserError, own_words, words
from msp.prox import Penalty, get_penalty

PyTree = Any


def build(
  entries: Sequence[Mapping[str, Any]], where: str, *, differentiated: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Chains the transforms a configuration names.

  Args:
    entries: mappings with a `name`, one of `msp.transforms` or of optax (dotted
      names such as 'contrib.prodigy' too); 'module:function' is one of your own. The
      other items are its arguments. A learning_rate that is a mapping names a
      schedule of optax in the same way. Weight decay of optax leaves the learned
      log-variances of the tasks alone, unless a mask says otherwise.
    where: the configuration field, for messages.
    differentiated: whether a hypergradient runs through the updates.

  Returns:
    `optax.chain` of them.

  Raises:
    UserError: no entry, unknown name, arguments it does not take, or a transform that
      needs more than gradients and parameters; differentiated, and the derivative
      of one is not finite.
  """
  if not entries:
    raise UserError(f'{where} is empty; name at least one transform')
  for i, entry in enumerate(entries):
    if not hasattr(entry, 'items') or not isinstance(entry.get('name'), str):
      raise UserError(
        f"{where}[{i}] is {entry!r}; it has to be a dict(name='…', …) with the name "
        f'and the arguments of a transform'
      )
    for name, value in entry.items():
      if isinstance(value, float) and math.isnan(value):
        raise UserError(f'{where}[{i}].{name} is nan; it has to be a number')
  links = [_resolve(dict(entry), where) for entry in entries]
  chain = optax.chain(*links)
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
  if differentiated:
    for entry, link in zip(entries, links, strict=True):
      _check_derivative(dict(entry), link, where)
  return chain


def _check_derivative(entry, link, where):
  """A derivative has to pass a head that an episode lacks, whose gradient is 0."""
  one, none = jnp.ones((2, 2)), jnp.zeros((2, 2))
  params = {'kernel': one, 'absent': one, 'bias': none}
  grads = {'kernel': one, 'absent': none, 'bias': one}
  state = link.init(params)
  update = lambda grads, params: link.update(grads, state, params)[0]
  _, forward = jax.jvp(update, (grads, params), (grads, params | {'absent': none}))
  updates, pull = jax.vjp(update, grads, params)
  backward = pull(jax.tree.map(jnp.ones_like, updates))
  if all(jnp.isfinite(x).all() for x in jax.tree.leaves((forward, backward))):
    return
  name = entry.pop('name')
  values = _arguments(_find(name, where), entry)
  remedy = 'name another'
  if 'eps_root' in values and not values['eps_root']:
    remedy = 'give it an eps_root above 0, such as 1e-16'
  elif not values.get('eps_in_sqrt', True):
    remedy = 'set its eps_in_sqrt'
  raise UserError(
    f'{where}: the hypergradient runs through {name}, whose derivative is not finite '
    f'where a gradient or a weight is 0; {remedy}'
  )


def penalty(name: str, options: Mapping[str, float], where: str) -> Penalty:
  """A penalty as a configuration names it.

  Args:
    name: a key of `msp.prox.PENALTIES`; 'module:function' is one of your own, a
      function that returns a `Penalty`.
    options: its arguments.
    where: the configuration field, for messages.

  Raises:
    UserError: unknown name, or an option it does not take or out of its range.
  """
  if ':' not in name:
    return get_penalty(name, **options)
  made = _call(_import(name, where, 'an msp.Penalty'), name, dict(options), where)
  if not isinstance(made, Penalty):
    raise UserError(
      f'{where}: {name!r} returned a {type(made).__name__}, not an msp.Penalty'
    )
  x, lam = jax.ShapeDtypeStruct((3, 2), jnp.float32), jnp.ones(())
  try:  # as msp.transforms calls them
    plain = jax.eval_shape(lambda x: made.prox(x, 0.1, lam, 0), x)
    tree = jax.eval_shape(lambda x: made.prox_weighted([x], [x], 0.1, [lam], 0), x)
    if [plain.shape, *(leaf.shape for leaf in tree)] != [x.shape] * 2:
      raise ValueError('the result has to have the shape of its argument')
  except Exception as e:
    raise UserError(
      f'{where}: {name} is no penalty of (x, α, λ, axis) -> z and, in a metric, '
      f'([x], [metric], α, [λ], axis) -> [z], see msp.Penalty: {own_words(e)}'
    ) from None
  return made


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


def with_prox(
  entries: Sequence[Mapping[str, Any]],
  where: str,
  penalty: Penalty,
  groups: gr.Groups,
  *,
  coefficient: str,
  metric: str | None,
  settles: bool = False,
  min_alive: int | None = None,
  differentiated: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The chain that `entries` name, then the prox if there is a λ.

  Args:
    entries: as of `build`; with a λ the last one has the learning_rate, which is the
      step size of the prox too.
    where: the configuration field, for messages.
    penalty: R.
    groups: which leaves, and along which axis.
    coefficient: 'none' (no prox), 'frozen' (dead groups stay dead), 'fixed' or
      'learned'.
    metric: of the prox: 'adam', 'euclidean', or None: that of the step, if its
      optimiser is one of `msp.transforms.metric_of`, else Euclidean.
    settles: whether updates are told when dead groups stay dead (`thaw`).
    min_alive: see `msp.proximal`.
    differentiated: whether a hypergradient runs through the updates.

  Returns:
    The transform.

  Raises:
    UserError: as `build`; no learning_rate, or a transform after it; an optimiser of
      another metric; a step too large for a concave penalty.
  """
  chain = build(entries, where, differentiated=differentiated)
  if coefficient == 'none':
    return chain
  if coefficient == 'frozen' or settles:
    chain = optax.chain(chain, transforms.freeze_dead(groups))
  if coefficient == 'frozen':
    return chain
  *others, last = entries
  if 'learning_rate' not in last:
    late = [entry for entry in others if 'learning_rate' in entry]
    reason = (
      f'{last["name"]} comes after {late[-1]["name"]} and would change its step'
      if late
      else 'no entry has a learning_rate'
    )
    raise UserError(
      f'{where}: {reason}; the prox needs the step size of the last transform'
    )
  learning_rate = step_size(last['learning_rate'], where)
  factory = _find(last['name'], where)
  if metric is None:
    metric = 'adam' if factory in transforms.ADAPTIVE else 'euclidean'
  if metric == 'euclidean':
    step = learning_rate
    for entry in entries:
      of = 'decay' if entry['name'] == 'trace' else 'momentum'
      given = {k: v for k, v in entry.items() if k != 'name'}
      values = _arguments(_find(entry['name'], where), given)
      step = _whole_step(step, values.get(of), where)
    proximal = transforms.proximal(penalty, groups, step, min_alive=min_alive)
    return optax.chain(chain, proximal)
  options = {k: v for k, v in last.items() if k not in ('name', 'learning_rate')}
  try:
    metric_of = transforms.metric_of(functools.partial(factory, **options))
  except UserError as e:
    raise UserError(f'{where}: {e}') from None
  return transforms.adaptive_proximal(
    chain, penalty, groups, learning_rate, min_alive=min_alive, **metric_of._asdict()
  )


def _whole_step(learning_rate, momentum, where):
  """α/(1 − μ), what a gradient moves weights by in all the steps that remember it."""
  if not momentum:
    return learning_rate
  if not 0 < momentum < 1:
    raise UserError(f'{where}: momentum is {momentum}; it has to be in [0, 1)')
  if gr.is_function(learning_rate):
    return lambda count: learning_rate(count) / (1 - momentum)
  return learning_rate / (1 - momentum)


def moving_part(
  entries: Sequence[Mapping[str, Any]],
  tx: optax.GradientTransformation,
  params: PyTree,
) -> str | None:
  """What keeps a step from being one and the same map of θ; None: nothing does.

  Args:
    entries: as of `build`.
    tx: what was made of them.
    params: θ, or its shapes.

  Returns:
    'a schedule', 'momentum or moments', or None.
  """
  if any(hasattr(entry.get('learning_rate'), 'items') for entry in entries):
    return 'a schedule'
  state = jax.tree.leaves(jax.eval_shape(tx.init, params))
  if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in state):
    return 'momentum or moments'
  return None


# What the functions of optax raise on arguments that they do not check.
_WRONG_ARGUMENTS = (TypeError, ValueError, LookupError, AttributeError)


def _call(factory, name, arguments, where):
  try:
    return factory(**arguments)
  except Exception as e:
    if ':' in name and not isinstance(e, _WRONG_ARGUMENTS):
      raise UserError(f'{where}: {name} failed: {own_words(e)}') from None
    if not isinstance(e, _WRONG_ARGUMENTS):
      raise
    takes = ', '.join(inspect.signature(factory).parameters)
    raise UserError(
      f'{where}: {name} cannot take {arguments}: {words(e)}; it takes {takes}'
    ) from None


def _import(name, where, what):
  """A function of the user's, 'module:function', that returns `what`."""
  try:
    found = pkgutil.resolve_name(name)
  except (ImportError, AttributeError, ValueError) as e:
    raise UserError(f'{where}: {name!r} cannot be imported: {words(e)}') from None
  except Exception as e:  # of the module itself
    raise UserError(f'{where}: {name!r} cannot be imported: {own_words(e)}') from None
  if not callable(found):
    raise UserError(
      f'{where}: {name!r} is a {type(found).__name__}; it has to be a function that '
      f'returns {what}'
    )
  return found


def _find(name, where):
  """A transform by its name in a configuration: see `build`."""
  found: Any = _OWN.get(name)
  if isinstance(name, str) and ':' in name:
    found = _import(name, where, 'a transform')
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


def _resolve(entry, where):
  name = entry.pop('name', None)
  factory = _find(name, where)
  if 'learning_rate' in entry:
    entry['learning_rate'] = step_size(entry['learning_rate'], where)
  transform = _call(_without_decay_of_log_vars(factory, name), name, entry, where)
  if not isinstance(transform, optax.GradientTransformation):
    raise UserError(f'{where}: {name!r} is not an optax transform')
  return transform


def _without_decay_of_log_vars(factory, name):
  """`factory` of optax with a mask by default: decay would bias the uncertainties."""
  takes = inspect.signature(factory).parameters
  masks = {'mask', 'weight_decay_mask'} & takes.keys()
  if ':' in name or 'weight_decay' not in takes or not masks:
    return factory
  own = lambda path: 'log_vars' in gr.path_name(path).split('/')
  decayed = lambda params: jax.tree.map_with_path(lambda path, _: not own(path), params)
  return functools.partial(factory, **{masks.pop(): decayed})


def _arguments(factory, given):
  """The arguments of a call, defaults included."""
  parameters = inspect.signature(factory).parameters
  return {name: p.default for name, p in parameters.items()} | dict(given)


_OWN: dict[str, Callable[..., optax.GradientTransformation]] = {
  'scale_by_mean_magnitude': transforms.scale_by_mean_magnitude,
  'anticipate': transforms.anticipate,
  'retreat': transforms.retreat,
  'bounded': transforms.bounded,
  'clip_by_weight_norm': transforms.clip_by_weight_norm,
}
