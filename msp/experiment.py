"""What a configuration means, as pure functions of arrays, and what it may not say."""

import difflib
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import data
from msp import dataset, episodes, losses, objectives, optimizers
from msp import groups as gr
from msp import initial as initial_module
from msp import tasks as task_module
from msp.episodes import Combination, Hypergradient, Inner, task_losses
from msp.errors import UserError
from msp.hypergradient import MODES, SOLVERS, Solver, zero_tangent
from msp.models import multitask
from msp.train_state import TrainState
from msp.train_step import Step, make_train_step

# Inner steps that become a straight program on CPU. A loop's step takes 1.2 times as
# long; compiling ten steps takes 9 times as long as compiling the loop.
UNROLLED = 3


# Where the number of a field has to lie: between these two, with or without them.
RANGES = {
  'seed': (0, 2**31, '[)'),
  'data.eval_examples': (0, math.inf, '[)'),
  'data.hold_out': (0, 1, '[)'),
  'data.train_share': (0, 1, '(]'),
  'meta.inner_steps': (0, math.inf, '[)'),
  'model.width': (1 / 32, 32, '[]'),  # below, every layer has four channels
  'sparsity.min_alive': (0, math.inf, '[)'),
  'sparsity.rise': (0, 1, '[]'),
  'sparsity.search': (0, 1, '[)'),
  'sparsity.settle': (0, 1, '[)'),
  'sparsity.solver.max_iterations': (1, math.inf, '[)'),
  'sparsity.solver.tolerance': (0, 1, '()'),
  'sparsity.start': (0, 1, '(]'),
  'sparsity.tangent_decay': (0, 1, '(]'),
  'sparsity.tangent_max_norm': (0, math.inf, '(]'),  # inf never clips
  'train.evaluate_every': (1, math.inf, '[)'),
  'train.log_every': (1, math.inf, '[)'),
  'train.patience': (0, math.inf, '[)'),
  'train.statistics_batches': (0, math.inf, '[)'),
  'train.steps': (1, math.inf, '[)'),
}


class Experiment(NamedTuple):
  """What a configuration means, as functions of arrays."""

  model: multitask.MultiTask
  tasks: Mapping[str, task_module.Task]
  groups: gr.Groups
  init: Any  # (key, batch, (params, batch_stats) by path) -> TrainState
  train_step: Step
  objective: objectives.Objective
  settled: int | None  # steps after which dead groups stay dead
  settled_step: Step | None  # instead of train_step from then on; λ stands still
  initial: initial_module.Fitting  # what `init` takes instead of fresh arrays


def build(
  config: ConfigDict,
  labels: Mapping[str, data.Label],
  hold_out_images: int = 1,
  workdir: Path | None = None,
) -> Experiment:
  """Turns a configuration into an `Experiment`.

  Args:
    config: see `configs/common.py`.
    labels: of the data set, by task.
    hold_out_images: images that λ is learned on, for standard errors over them.
    workdir: of the run; once it has checkpoints, `config.initial` is not read again.

  Returns:
    The experiment. Weights from outside are in memory; no step has been compiled.

  Raises:
    UserError: a field that is unknown, impossible, or at odds with another one.
  """
  _check(config)
  tasks = task_module.make(
    config.tasks,
    labels,
    loss_resolution=config.loss.resolution,
    edge_loss=config.loss.edges,
    depth_loss=config.loss.depth,
  )
  unroll, steps = config.meta.unroll == 'yes', config.meta.inner_steps
  if config.meta.unroll == 'auto' and jax.default_backend() == 'cpu':
    how = config.meta.episodes if steps else 'full'
    drawn = episodes.draw(jax.random.key(0), len(tasks), how)
    unroll = len(drawn) * steps <= UNROLLED
  network = dict(config.model)
  if network['convolution_implementation'] == 'auto' and jax.default_backend() == 'cpu':
    # XLA's own narrow convolutions are the faster ones on CPU, but 7 to 35 times slower
    # in a loop body, where matrix products are not.
    straight = unroll or steps == 0
    # So are the solver of the implicit hypergradient, and tangents of several λ.
    several = config.sparsity.granularity != 'scalar'
    loops = ('implicit', 'forward', 'online') if several else ('implicit',)
    straight &= config.sparsity.hypergradient not in loops
    network['convolution_implementation'] = 'mixed' if straight else 'matmul'
  model = multitask.build(
    {name: (task.head, task.outputs) for name, task in tasks.items()}, **network
  )
  if begun(workdir) and (shape := initial_module.kept_shape(workdir)):
    initial = initial_module.Initial(shape=shape)
  else:
    initial = initial_module.read(config.initial, model, config.data.name)
  model = model._replace(backbone=model.backbone.clone(shape=initial.shape))
  shape = (*config.data.image_size, 3)
  combination = Combination(config.loss.combination, _weights(config))

  def init_model(key):
    params, batch_stats = multitask.init(model, key, shape)
    if combination.how == 'uncertainty':
      params['log_vars'] = {name: jnp.zeros(()) for name in tasks}
    return params, batch_stats

  abstract, abstract_stats = jax.eval_shape(init_model, jax.random.key(0))
  fitting = initial_module.fitting(initial, abstract, abstract_stats)
  sparsity = config.sparsity
  options = {k: v for k, v in sparsity.penalty_options.items() if v is not None}
  penalty = optimizers.penalty(sparsity.penalty, options, 'sparsity.penalty')
  groups = gr.find(
    abstract,
    sparsity.pattern,
    sparsity.axis,
    sparsity.granularity,
    multitask.streams(model),
  )
  has_coefficient = sparsity.coefficient in ('fixed', 'learned')
  most = max(gr.totals(groups, abstract).values())
  if has_coefficient and sparsity.min_alive >= most:
    raise UserError(
      f'sparsity.min_alive is {sparsity.min_alive}, but the largest layer has {most} '
      f'groups: none could die; lower it'
    )
  settled = None
  if has_coefficient and sparsity.settle:
    settled = round((1 - sparsity.settle) * config.train.steps)
  learned = sparsity.coefficient == 'learned'
  objective = _objective(config, model, shape, hold_out_images)
  if learned and objective.kind == 'budget':
    objectives.check_target(objective, groups, abstract, sparsity.min_alive)
  differentiated = learned and objectives.differentiates(
    objective.kind, len(groups.names)
  )
  online = differentiated and sparsity.hypergradient == 'online'
  truncated = differentiated and sparsity.hypergradient == 'truncated'
  with_prox = functools.partial(
    optimizers.with_prox,
    penalty=penalty,
    groups=groups,
    coefficient=sparsity.coefficient,
    settles=bool(sparsity.settle),
    min_alive=sparsity.min_alive,
  )
  outer = with_prox(
    config.optimizer, 'optimizer', metric=sparsity.metric, differentiated=online
  )
  inner = with_prox(
    config.meta.optimizer,
    'meta.optimizer',
    metric=None,  # of the optimiser it follows
    differentiated=differentiated or (steps > 0 and config.meta.exact),
  )
  rho_optimizer = optimizers.build(
    sparsity.optimizers[objective.kind], f'sparsity.optimizers.{objective.kind}'
  )
  _check_traced(config, abstract, outer, inner)
  moving = optimizers.moving_part(config.meta.optimizer, inner, abstract)
  if moving and differentiated and sparsity.hypergradient == 'implicit':
    raise UserError(
      f'sparsity.hypergradient=implicit needs inner steps with a fixed point, but '
      f'meta.optimizer has {moving}; use plain sgd there, or '
      f'sparsity.hypergradient=forward'
    )

  def init(key, batch, arrays=({}, {})):
    key_params, key_gradient = jax.random.split(key)
    params, batch_stats = map(gr.replace, init_model(key_params), arrays)
    state = TrainState(
      jnp.zeros((), jnp.int32), params, batch_stats, outer.init(params)
    )
    if not has_coefficient:
      return state
    gradients = jax.grad(
      lambda p: task_losses(
        model, tasks, combination, p, batch_stats, batch, key_gradient
      )[0]
    )(params)
    lambda_max = gr.lambda_max(groups, gradients)
    if len(groups.names) == 1:
      lambda_max = lambda_max[0]
    # Without a gradient at the start a layer has no scale of its own: then the largest
    # of the others, or of a fixed λ `value`, which is its λ too.
    scale = jnp.max(lambda_max) if learned else sparsity.value
    lambda_max = jnp.where(lambda_max > 0, lambda_max, scale)
    relative = sparsity.start if learned else sparsity.value / lambda_max
    # Of λ_max's own type, or the step would be compiled again for its own output.
    relative = jnp.asarray(relative, lambda_max.dtype)
    rho = jnp.log(jnp.broadcast_to(relative, lambda_max.shape))
    state = state._replace(rho=rho, lambda_max=lambda_max)
    if learned:
      state = state._replace(rho_opt_state=rho_optimizer.init(rho))
    if online:
      moving = params, state.opt_state
      state = state._replace(tangent=zero_tangent(moving, rho))
    if learned and objective.kind == 'tolerance':
      twin = objectives.make_twin(params, state.opt_state, batch_stats, len(tasks))
      state = state._replace(twin=twin)
    if learned and (objective.kind == 'budget' or objective.rise):
      share = objectives.removed(objective, groups, params)
      state = state._replace(removed_at_start=share)
    return state

  make_step = functools.partial(
    make_train_step,
    model,
    tasks,
    groups,
    outer,
    combination=combination,
    inner=Inner(
      inner,
      steps,
      config.meta.episodes,
      exact=config.meta.exact,
      unroll=unroll,
      # Of a λ that is learned by it; θ⁰'s stays as it is once λ stands still.
      truncation=sparsity.truncation if truncated else None,
    ),
    objective=objective,
    hypergradient=Hypergradient(
      mode=sparsity.hypergradient,
      learn_on=sparsity.learn_on,
      solver=Solver(**sparsity.solver),
      decay=sparsity.tangent_decay,
      max_norm=sparsity.tangent_max_norm,
    ),
    settled=settled,
  )
  train_step = make_step(rho_optimizer=rho_optimizer if learned else None)
  # A budget that is not met still needs its λ.
  stands_still = learned and settled is not None and objective.kind != 'budget'
  settled_step = make_step() if stands_still else None
  return Experiment(
    model,
    tasks,
    groups,
    init,
    train_step,
    objective,
    settled,
    settled_step,
    fitting,
  )


def check_fields(config: ConfigDict, known: ConfigDict, where: str) -> None:
  """Raises UserError on a field that is unknown, missing, or of another type.

  A configuration file may add fields by a slip of the pen, and what a run has kept may
  be of another version or edited.

  Args:
    config: of a run.
    known: a configuration with all fields, `configs.common.base()`.
    where: what `config` is of, for messages.
  """

  def check(node, of, path):
    for name in node:
      if name not in of:
        close = difflib.get_close_matches(name, list(of), n=1)
        hint = f'; did you mean {path}{close[0]}?' if close else ''
        raise UserError(f'{where}: there is no field {path}{name}{hint}')
    for name, default in of.items():
      field = f'{path}{name}'
      if name not in node:
        raise UserError(
          f'{where} has no {field}; see configs/common.py (a config.json without it is '
          f'of another version of this program)'
        )
      value = node[name]
      if isinstance(default, ConfigDict):
        if not isinstance(value, ConfigDict):
          raise UserError(f'{where}: {field} is {value!r}; it has to be a section')
        check(value, default, f'{field}.')
      elif default is not None and not _like(value, default):
        kind = {tuple: 'list', str: 'string', int: 'whole number', float: 'number'}
        wanted = kind.get(type(default), type(default).__name__)
        raise UserError(f'{where}: {field} is {value!r}; it has to be a {wanted}')

  check(config, known, '')


def _like(value, default):
  if isinstance(default, tuple | list):
    return isinstance(value, tuple | list)
  if isinstance(default, float):
    return isinstance(value, int | float) and not isinstance(value, bool)
  return type(value) is type(default)


def begun(workdir: Path | None) -> bool:
  """Whether a run has a checkpoint, complete or not."""
  return workdir is not None and any(
    path.name.isdigit() for path in (workdir / 'checkpoints').glob('*')
  )


def uses_hold_out(config: ConfigDict) -> bool:
  """Whether λ is learned on data of its own: a plain budget needs none."""
  sparsity = config.sparsity
  plain = sparsity.objective == 'budget' and sparsity.granularity == 'scalar'
  own = sparsity.learn_on == 'hold_out' and not plain
  return sparsity.coefficient == 'learned' and own


def query_images(config: ConfigDict) -> int:
  """Query images of a batch, and as many hold-out images; the others are support."""
  return config.train.batch_size // (2 if config.meta.inner_steps else 1)


def _objective(config, model, shape, hold_out_images):
  """What λ is for."""
  sparsity = config.sparsity
  # No longer than until dead groups stay dead.
  rise, budget = 0, sparsity.objective == 'budget'
  if sparsity.objective != 'tolerance':
    rise = round(min(sparsity.rise, 1 - sparsity.settle) * config.train.steps)
  by_flops = budget and sparsity.measure == 'flops'
  objective = objectives.Objective(
    kind=sparsity.objective,
    target=sparsity.target,
    measure=sparsity.measure,
    positions=multitask.positions(model, shape) if by_flops else None,
    tolerance=sparsity.tolerance,
    search=round(sparsity.search * config.train.steps),
    rise=rise,
    hold_out_batches=max(hold_out_images / max(query_images(config), 1), 1.0),
  )
  objectives.check(objective)
  return objective if budget else objective._replace(measure='groups')


def _field(config, name):
  """The value of a field by its dotted name."""
  return functools.reduce(lambda node, part: node[part], name.split('.'), config)


def _check(config):
  """The checks that need more than one field, or that no other module makes."""
  dataset.check(config)
  choices = {
    'sparsity.coefficient': ('none', 'frozen', 'fixed', 'learned'),
    'sparsity.learn_on': ('hold_out', 'query'),
    'sparsity.metric': ('adam', 'euclidean'),
    'sparsity.hypergradient': MODES,
    'sparsity.solver.name': SOLVERS,
    'meta.unroll': ('auto', 'yes', 'no'),
  }
  for field, known in choices.items():
    value = _field(config, field)
    if value not in known:
      raise UserError(f'{field} is {value!r}; known: {", ".join(known)}')
  check_ranges(config)
  sparsity, inner_steps = config.sparsity, config.meta.inner_steps
  if sparsity.coefficient == 'frozen' and not config.initial:
    raise UserError(
      'sparsity.coefficient=frozen keeps the dead groups of config.initial dead, and '
      'that is empty; name a run there'
    )
  if sparsity.coefficient == 'fixed' and not 0 < sparsity.value < math.inf:
    raise UserError(
      f'sparsity.value is {sparsity.value}; a fixed λ has to be a number above 0 '
      f'(for a dense run set sparsity.coefficient=none)'
    )
  if sparsity.coefficient != 'learned':
    return
  by_flops = sparsity.objective == 'budget' and sparsity.measure == 'flops'
  if by_flops and sparsity.axis == 'weight':
    raise UserError(
      'sparsity.measure=flops with sparsity.axis=weight: single zeros save no FLOPs, '
      'only channels do; set sparsity.measure=weights, or another axis'
    )
  if sparsity.settle and sparsity.objective == 'budget':
    inside = sparsity.penalty == 'sparse_group_lasso' and sparsity.axis != 'weight'
    if inside and sparsity.measure == 'weights':
      raise UserError(
        'sparsity.measure=weights counts the zeros that sparse_group_lasso makes '
        'inside of living groups, and those do not settle; set sparsity.settle=0 or '
        'sparsity.measure=groups'
      )
  online = sparsity.hypergradient == 'online'
  constrained = sparsity.objective != 'holdout' and sparsity.granularity == 'scalar'
  if inner_steps == 0 and not online and not constrained:
    raise UserError(
      f'sparsity.hypergradient={sparsity.hypergradient} needs meta.inner_steps of at '
      f'least 1: without inner steps it does not see λ. Set meta.inner_steps, or '
      f'sparsity.hypergradient=online, or sparsity.coefficient=fixed'
    )
  truncated = sparsity.hypergradient == 'truncated'
  if truncated and inner_steps and not 1 <= sparsity.truncation <= inner_steps:
    raise UserError(
      f'sparsity.truncation is {sparsity.truncation}; of meta.inner_steps='
      f'{inner_steps} steps the derivative can see 1 to {inner_steps}'
    )
  if sparsity.search > 1 - sparsity.settle:
    raise UserError(
      f'sparsity.search is {sparsity.search} and sparsity.settle {sparsity.settle}: '
      f'the search for λ has to end before dead groups stay dead'
    )
  if uses_hold_out(config) and not 0 < config.data.hold_out < 1:
    raise UserError(
      f'data.hold_out is {config.data.hold_out}; a learned λ needs a part of train '
      f'of its own, a share in (0, 1), or sparsity.learn_on=query'
    )


def check_ranges(config: ConfigDict) -> None:
  """Raises UserError on a number out of its range, whatever else is configured."""
  for field, (lower, upper, ends) in RANGES.items():
    value = _field(config, field)
    above = value >= lower if ends[0] == '[' else value > lower
    below = value <= upper if ends[1] == ']' else value < upper
    if not (above and below):
      interval = f'in {ends[0]}{lower}, {upper}{ends[1]}'
      if upper == math.inf:
        interval = f'at least {lower}' if ends[0] == '[' else f'above {lower}'
      raise UserError(f'{field} is {value}; it has to be {interval}')
  if not config.name:
    raise UserError('name is empty; a run is kept in runs/<name>')
  missing = config.data.missing
  if not 0 <= missing < 1 or (missing and len(config.tasks) < 2):
    raise UserError(
      f'data.missing is {missing}; it has to be in [0, 1), and 0 for a single task: '
      f'images without any label would remain'
    )


def _weights(config):
  weights = config.loss.weights
  if not all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights):
    raise UserError(f'loss.weights is {weights}; it has to be numbers of at least 0')
  if weights and not any(weights):
    raise UserError(f'loss.weights is {weights}; one of them has to be above 0')
  wanted = len(config.tasks) if config.loss.combination == 'fixed' else 0
  if len(config.loss.weights) != wanted:
    raise UserError(
      f'loss.weights has {len(config.loss.weights)} entries; '
      f'loss.combination={config.loss.combination} takes {wanted or "none"}'
      f'{", one for each task" if wanted else ""}'
    )
  return dict(zip(config.tasks, config.loss.weights, strict=wanted > 0))


def _check_traced(config, params, outer, inner):
  """The mistakes that tracing the step would find, before anything is written."""
  zeros = dict.fromkeys(config.tasks, 0.0)
  losses.combine(
    zeros,
    how=config.loss.combination,
    weights=_weights(config),
    log_vars=zeros,
  )
  jax.eval_shape(outer.init, params)
  if config.meta.inner_steps:
    jax.eval_shape(inner.init, params)
    episodes.draw(jax.random.key(0), len(config.tasks), config.meta.episodes)
