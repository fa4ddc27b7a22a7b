"""The loop: data, logging, evaluation, checkpoints; no mathematics."""

import functools
import importlib.util
import json
import logging
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import data
from msp import (
  compact,
  episodes,
  export,
  figures,
  losses,
  measure,
  objectives,
  processes,
  report,
  transforms,
)
from msp import groups as gr
from msp import initial as initial_module
from msp import tasks as task_module
from msp import workdir as workdir_module
from msp.checkpoint import Checkpoints, DamagedCheckpointError
from msp.console import Bar, Clock, Interruption
from msp.errors import UserError
from msp.evaluate import evaluate, make_eval_step, make_predict
from msp.hypergradient import MODES, SOLVERS, Solver, zero_tangent
from msp.models import multitask
from msp.prox import get_penalty
from msp.train_state import TrainState
from msp.train_step import Combination, Step, make_train_step, task_losses
from msp.writer import MetricWriter, SilentWriter

logger = logging.getLogger(__name__)

PyTree = Any
PANELS = 6  # pictures in the report
# A layer with no more than this share of its groups alive carries next to nothing.
STARVED = 1 / 16
# For programs that run once, where compiling would take longer than running: drawing
# the weights of the `:tiny` network compiles in a tenth of the time.
ONCE_ON_CPU = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,
}


class Experiment(NamedTuple):
  """What a configuration means, as functions of arrays."""

  model: multitask.MultiTask
  tasks: Mapping[str, task_module.Task]
  groups: gr.Groups
  init: Any  # (key, batch, (params, batch_stats) by path) -> TrainState
  train_step: Step
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
    The experiment; nothing has been computed yet.

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
  unroll = config.meta.unroll
  unroll = jax.default_backend() == 'cpu' if unroll == 'auto' else unroll == 'yes'
  network = dict(config.model)
  if network['convolution_implementation'] == 'auto' and jax.default_backend() == 'cpu':
    # XLA's own narrow convolutions are the faster ones on CPU, but 7 to 35 times slower
    # in a loop body, where matrix products are not.
    straight = unroll or config.meta.inner_steps == 0
    # The solver of the implicit hypergradient is a loop, too.
    straight &= config.sparsity.hypergradient != 'implicit'
    network['convolution_implementation'] = 'mixed' if straight else 'matmul'
  model = multitask.build(
    {name: (task.head, task.outputs) for name, task in tasks.items()}, **network
  )
  if _begun(workdir) and (shape := initial_module.kept_shape(workdir)):
    initial = initial_module.Initial(shape=shape)
  else:
    initial = initial_module.read(config.initial, model)
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
  penalty = get_penalty(sparsity.penalty, **options)
  groups = gr.find(
    abstract,
    sparsity.pattern,
    sparsity.axis,
    sparsity.granularity,
    multitask.streams(model),
  )
  has_coefficient = sparsity.coefficient in ('fixed', 'learned')
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
  outer = _optimizer(
    config.optimizer, 'optimizer', penalty, sparsity, groups, sparsity.metric, online
  )
  inner = _optimizer(
    config.meta.optimizer,
    'meta.optimizer',
    penalty,
    sparsity,
    groups,
    'euclidean',
    differentiated,
  )
  rho_optimizer = transforms.build(
    sparsity.optimizers[objective.kind], f'sparsity.optimizers.{objective.kind}'
  )
  _check_traced(config, abstract, outer, inner)
  if differentiated and sparsity.hypergradient == 'implicit':
    _check_fixed_point(config, abstract, inner)

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
    if learned:
      relative = sparsity.start
    else:
      # Without a gradient at the start a layer has no scale; its λ is `value` too.
      lambda_max = jnp.where(lambda_max > 0, lambda_max, sparsity.value)
      relative = sparsity.value / lambda_max
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
    return state

  make_step = functools.partial(
    make_train_step,
    model,
    tasks,
    groups,
    outer,
    combination=combination,
    inner=inner,
    inner_steps=config.meta.inner_steps,
    episode_draw=config.meta.episodes,
    exact=config.meta.exact,
    objective=objective,
    hypergradient=sparsity.hypergradient,
    truncation=sparsity.truncation,
    solver=Solver(**sparsity.solver),
    tangent_decay=sparsity.tangent_decay,
    tangent_max_norm=sparsity.tangent_max_norm,
    settled=settled,
    unroll=unroll,
  )
  train_step = make_step(rho_optimizer=rho_optimizer if learned else None)
  # A budget that is not met still needs its λ.
  stands_still = learned and settled is not None and objective.kind != 'budget'
  settled_step = make_step() if stands_still else None
  return Experiment(
    model, tasks, groups, init, train_step, settled, settled_step, fitting
  )


def _begun(workdir):
  """Whether a run has a checkpoint, complete or not."""
  return workdir is not None and any(
    path.name.isdigit() for path in (workdir / 'checkpoints').glob('*')
  )


def _uses_hold_out(config):
  """Whether λ is learned on data of its own: a plain budget needs none."""
  sparsity = config.sparsity
  plain = sparsity.objective == 'budget' and sparsity.granularity == 'scalar'
  own = sparsity.learn_on == 'hold_out' and not plain
  return sparsity.coefficient == 'learned' and own


def _objective(config, model, shape, hold_out_images):
  """What λ is for."""
  sparsity = config.sparsity
  share = config.train.batch_size // (2 if config.meta.inner_steps else 1)
  by_flops = sparsity.objective == 'budget' and sparsity.measure == 'flops'
  objective = objectives.Objective(
    kind=sparsity.objective,
    target=sparsity.target,
    measure=sparsity.measure,
    positions=multitask.positions(model, shape) if by_flops else None,
    tolerance=sparsity.tolerance,
    search=_search_steps(config),
    hold_out_batches=max(hold_out_images / max(share, 1), 1.0),
  )
  objectives.check(objective)
  return objective


def _search_steps(config):
  return round(config.sparsity.search * config.train.steps)


def _check(config):
  """The checks that need more than one field, or that no other module makes."""
  choices = {
    'sparsity.coefficient': ('none', 'frozen', 'fixed', 'learned'),
    'sparsity.learn_on': ('hold_out', 'query'),
    'sparsity.metric': ('adam', 'euclidean'),
    'sparsity.hypergradient': MODES,
    'sparsity.solver.name': SOLVERS,
    'meta.unroll': ('auto', 'yes', 'no'),
  }
  for field, known in choices.items():
    value = functools.reduce(lambda node, name: node[name], field.split('.'), config)
    if value not in known:
      raise UserError(f'{field} is {value!r}; known: {", ".join(known)}')
  for field in ('train.steps', 'train.log_every', 'train.evaluate_every'):
    section, name = field.split('.')
    if config[section][name] < 1:
      raise UserError(f'{field} is {config[section][name]}; it has to be at least 1')
  for field in ('train.patience', 'data.eval_examples', 'sparsity.min_alive'):
    section, name = field.split('.')
    if config[section][name] < 0:
      raise UserError(f'{field} is {config[section][name]}; it has to be at least 0')
  size = config.data.image_size
  whole = all(isinstance(n, int) for n in size)
  if len(size) != 2 or not whole or min(size) < 16:
    raise UserError(
      f'data.image_size is {size}; it has to be two whole numbers, rows and columns, '
      f'of at least 16'
    )
  if not 0 <= config.seed < 2**31:
    raise UserError(f'seed is {config.seed}; it has to be in [0, 2^31)')
  if not 0 < config.data.train_share <= 1:
    raise UserError(
      f'data.train_share is {config.data.train_share}; it has to be in (0, 1]'
    )
  missing = config.data.missing
  if not 0 <= missing < 1 or (missing and len(config.tasks) < 2):
    raise UserError(
      f'data.missing is {missing}; it has to be in [0, 1), and 0 for a single task: '
      f'images without any label would remain'
    )
  sparsity, inner_steps = config.sparsity, config.meta.inner_steps
  if sparsity.coefficient == 'frozen' and not config.initial:
    raise UserError(
      'sparsity.coefficient=frozen keeps the dead groups of config.initial dead, and '
      'that is empty; name a run there'
    )
  if inner_steps < 0:
    raise UserError(f'meta.inner_steps is {inner_steps}; it has to be at least 0')
  if sparsity.coefficient == 'fixed' and not 0 < sparsity.value < math.inf:
    raise UserError(
      f'sparsity.value is {sparsity.value}; a fixed λ has to be a number above 0 '
      f'(for a dense run set sparsity.coefficient=none)'
    )
  if not 0 <= sparsity.settle < 1:
    raise UserError(
      f'sparsity.settle is {sparsity.settle}; the share of the steps, the last ones, '
      f'in which dead groups stay dead has to be in [0, 1)'
    )
  if sparsity.coefficient != 'learned':
    return
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
  if not 0 < sparsity.solver.tolerance < 1 or sparsity.solver.max_iterations < 1:
    raise UserError(
      f'sparsity.solver has tolerance {sparsity.solver.tolerance} and max_iterations '
      f'{sparsity.solver.max_iterations}; it needs a tolerance in (0, 1) and at least '
      f'one iteration'
    )
  if not 0 < sparsity.tangent_decay <= 1:
    raise UserError(
      f'sparsity.tangent_decay is {sparsity.tangent_decay}; it has to be in (0, 1]'
    )
  if not sparsity.tangent_max_norm > 0:
    raise UserError(
      f'sparsity.tangent_max_norm is {sparsity.tangent_max_norm}; it has to be above 0'
    )
  if not 0 <= sparsity.search < 1:
    raise UserError(
      f'sparsity.search is {sparsity.search}; the share of the steps that only search '
      f'for λ has to be in [0, 1)'
    )
  if sparsity.search > 1 - sparsity.settle:
    raise UserError(
      f'sparsity.search is {sparsity.search} and sparsity.settle {sparsity.settle}: '
      f'the search for λ has to end before dead groups stay dead'
    )
  if not 0 < sparsity.start <= 1:
    raise UserError(
      f'sparsity.start is {sparsity.start}; λ/λ_max has to start in (0, 1]'
    )
  if _uses_hold_out(config) and not 0 < config.data.hold_out < 1:
    raise UserError(
      f'data.hold_out is {config.data.hold_out}; a learned λ needs a part of train '
      f'of its own, a share in (0, 1), or sparsity.learn_on=query'
    )


def _weights(config):
  if not all(isinstance(weight, int | float) for weight in config.loss.weights):
    raise UserError(f'loss.weights is {config.loss.weights}; it has to be numbers')
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


def _check_fixed_point(config, params, inner):
  """Refuses inner optimisers whose step is not one and the same map of θ."""
  entries = config.meta.optimizer
  moments = any(
    jnp.issubdtype(leaf.dtype, jnp.floating)
    for leaf in jax.tree.leaves(jax.eval_shape(inner.init, params))
  )
  scheduled = any(hasattr(entry.get('learning_rate'), 'items') for entry in entries)
  if moments or scheduled:
    raise UserError(
      f'sparsity.hypergradient=implicit needs inner steps with a fixed point, but '
      f'meta.optimizer has {"a schedule" if scheduled else "momentum or moments"}; use '
      f'plain sgd there, or sparsity.hypergradient=forward'
    )


def _optimizer(entries, where, penalty, sparsity, groups, metric, differentiated):
  """The chain that `entries` name, then the prox if there is a λ."""
  chain = transforms.build(entries, where, differentiated=differentiated)
  if sparsity.coefficient == 'none':
    return chain
  if sparsity.coefficient == 'frozen' or sparsity.settle:
    chain = optax.chain(chain, transforms.freeze_dead(groups))
  if sparsity.coefficient == 'frozen':
    return chain
  steps = [entry for entry in entries if 'learning_rate' in entry]
  if not steps:
    raise UserError(
      f'{where}: no entry has a learning_rate, which the prox needs as its step size'
    )
  step = steps[-1]
  learning_rate = transforms.step_size(step.learning_rate, where)
  if metric == 'euclidean':
    proximal = transforms.proximal(
      penalty, groups, learning_rate, min_alive=sparsity.min_alive
    )
    return optax.chain(chain, proximal)
  return transforms.adaptive_proximal(
    chain,
    penalty,
    groups,
    learning_rate,
    min_alive=sparsity.min_alive,
    **transforms.metric(step, where),
  )


class Feed(NamedTuple):
  """The batches of a run: the streams, and how arrays reach the devices."""

  # Iterators with get_state / set_state: 'train', and if λ has data of its own
  # 'hold_out', and 'all' for the steps in which it stands still.
  streams: Mapping[str, Any]
  inner_steps: int
  sharding: NamedSharding

  def next(self, *, settled: bool = False) -> dict[str, dict[str, jax.Array]]:
    """The parts of one step: 'query', and 'support' and 'hold_out' if used.

    With `settled` the images of both streams are there to train on.
    """
    batch = next(self.streams['all' if settled else 'train'])
    parts = {'query': batch}
    if self.inner_steps:
      half = len(batch['image']) // 2
      parts = {
        'support': {name: x[:half] for name, x in batch.items()},
        'query': {name: x[half:] for name, x in batch.items()},
      }
    if 'hold_out' in self.streams and not settled:
      parts['hold_out'] = next(self.streams['hold_out'])
    return put(parts, self.sharding)

  def get_state(self) -> dict:
    """Position of the streams, for a checkpoint."""
    return {name: stream.get_state() for name, stream in self.streams.items()}

  def set_state(self, state: Mapping) -> None:
    """Puts the streams where `get_state` found them."""
    for name, stream in self.streams.items():
      stream.set_state(state[name])


def put(batch: PyTree, sharding: NamedSharding) -> PyTree:
  """Host arrays to devices, the leading axis spread over the mesh's data axis."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )


def prepare(config: ConfigDict, *, skip_corrupt: bool = False) -> Path:
  """Brings the data set into its prepared form, once.

  Args:
    config: only `config.data` and, for a stand-in, nothing else counts.
    skip_corrupt: leave unreadable files out instead of stopping.

  Returns:
    The folder of the prepared data set.
  """
  source, prepared = folders(config)
  size = tuple(config.data.image_size)
  if config.data.procedural_images:
    data.render(config.data.name, source, config.data.procedural_images, size, 0)
  return data.prepare(
    config.data.name, source, prepared, size, skip_corrupt=skip_corrupt
  )


def contact_sheet(config: ConfigDict) -> Path:
  """Draws a training batch with its flips and missing labels, to look at.

  Args:
    config: of a run whose data set is prepared.

  Returns:
    Path of the picture, beside the prepared data set: each image with its labels.
  """
  tasks = task_module.make(config.tasks, data.labels(config.data.name))
  train_part = splits(config).train
  stream = data.train_iterator(
    train_part,
    config.tasks,
    batch_size=min(PANELS, len(train_part)),
    seed=config.seed,
    flip=config.data.flip,
    missing=config.data.missing,
  )
  batch = next(stream)
  panels = [
    figures.TaskPanel(name, batch[name], None, task.classes, task.kind)
    for name, task in tasks.items()
  ]
  image = np.round(batch['image'] * 255).astype(np.uint8)
  rows, columns = config.data.image_size
  path = folders(config)[1] / f'{config.data.name}_{rows}x{columns}.png'
  with matplotlib.rc_context(figures.STYLE):
    drawn = figures.predictions(image, panels)
    workdir_module.write(path, lambda f: drawn.savefig(f, format='png'))
  return path


def splits(config: ConfigDict) -> data.Splits:
  """The parts of a run's data set, which is prepared; see `data.open`."""
  return data.open(
    config.data.name,
    folders(config)[1],
    tuple(config.data.image_size),
    config.data.hold_out,
    train_share=config.data.train_share,
    seed=config.seed,
  )


def folders(config):
  """The folders of the published files and of the prepared copies.

  A stand-in has its own, named by its settings: it is never mixed with real data,
  nor with a stand-in of other settings.
  """
  c = config.data
  if not c.procedural_images:
    return Path(c.source), Path(c.prepared)
  rows, columns = c.image_size
  source = Path(f'{c.source}_{c.procedural_images}_{rows}x{columns}')
  return source, Path(c.prepared) / source.name


def train(
  config: ConfigDict,
  workdir: Path,
  devices: Sequence[jax.Device] | None = None,
  *,
  skip_corrupt: bool = False,
) -> Path:
  """Trains, or goes on training, in `workdir`; ends with the report.

  Started again with the same configuration it continues from the latest
  checkpoint, and its metrics are those of a run that was never interrupted.

  With several processes (`jax.distributed`) all of them call this; the first one
  writes, to a `workdir` that all of them see.

  Args:
    config: see `configs/common.py`.
    workdir: is created; holds config.json, metrics.jsonl, TensorBoard events,
      checkpoints/ and report/.
    devices: those to use, all by default.
    skip_corrupt: see `prepare`.

  Returns:
    Path of the report.

  Raises:
    UserError, data.DataError: see their messages.
    FloatingPointError: a loss or gradient is not finite; names step and layer.
  """
  workdir_module.check(workdir, config)
  run = _open(config, devices, workdir, skip_corrupt=skip_corrupt)
  processes.first_does(lambda: _claim(workdir, run))
  logger.info('work directory: %s', workdir)
  with Checkpoints(workdir) as checkpoints:
    feed = run.feed()
    latest = _newest(checkpoints, run)
    if latest is None:
      step, state, progress = 0, run.initial_state(), Progress()
    else:
      step, (state, meta) = latest
      feed.set_state(meta['data'])
      progress = Progress(**meta['progress'])
      logger.info('going on from step %d', step)
    first = processes.is_first()
    with MetricWriter(workdir, step) if first else SilentWriter() as writer:
      if int(state.step) < config.train.steps and not progress.stopped:
        state, progress = _loop(run, state, progress, feed, checkpoints, writer)
      _finish(run, workdir, state, checkpoints, writer)
  processes.first_does(lambda: report.write(workdir))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  logger.info('peak memory of this process: %.1f GiB', peak)
  return report.path(workdir)


def adapt(
  config: ConfigDict,
  workdir: Path,
  devices: Sequence[jax.Device] | None = None,
  *,
  skip_corrupt: bool = False,
) -> Path:
  """Trains on from `config.initial` with at least one task that it does not have.

  The backbone and the heads of tasks it has are taken over, the others begin fresh.
  `sparsity.coefficient` says what becomes of its dead groups: 'frozen' keeps them dead,
  'none' lets them come back, 'learned' and 'fixed' go on with a λ of their own.

  Args: as `train`.

  Returns:
    Path of the report.

  Raises:
    UserError: as `train`; no new task; `config.initial` has no tasks.
  """
  if _begun(workdir):  # its source may be gone
    return train(config, workdir, devices, skip_corrupt=skip_corrupt)
  known = initial_module.tasks(config.initial, config.data.name)
  new = [task for task in config.tasks if task not in known]
  if not new:
    raise UserError(
      f'initial={config.initial} has the tasks {", ".join(known)} already, and '
      f'config.tasks names no other; to train it further use --mode train'
    )
  logger.info(
    'adapting %s to %s; carried over: %s',
    config.initial,
    ', '.join(new),
    ', '.join(task for task in config.tasks if task in known) or 'the backbone alone',
  )
  return train(config, workdir, devices, skip_corrupt=skip_corrupt)


def _claim(workdir, run):
  workdir_module.claim(workdir, run.config)
  if run.config.initial:
    initial_module.keep_shape(workdir, run.experiment.model.backbone.shape)
  if run.experiment.initial.params:
    path = initial_module.write_report(workdir, run.experiment.initial)
    logger.info('what became of every initial weight: %s', path)


def evaluate_run(
  config: ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> dict[str, dict]:
  """Metrics of a run's latest checkpoint on val and test, also as evaluation.json.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.

  Returns:
    split -> metrics; see `msp.evaluate.evaluate`.

  Raises:
    UserError: no checkpoint, or one of another configuration.
  """
  run, state, latest = _trained(config, workdir, devices)
  eval_step = run.eval_step()
  result = {}
  for split in ('val', 'test'):
    values = run.evaluate(eval_step, state, getattr(run.splits, split))
    result[split] = {'step': latest, **values}
    logger.info('%s: %s', split, summary(values, run.experiment.tasks))
  content = json.dumps(result, indent=2).encode()
  path = workdir / 'evaluation.json'
  processes.first_does(lambda: workdir_module.write(path, lambda f: f.write(content)))
  return result


def _trained(config, workdir, devices):
  """The run of a work directory, its latest state, and the step of that."""
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(
      f'no checkpoint in work directory {workdir}; train first, or name the '
      f'directory of a run with --workdir'
    )
  workdir_module.check(workdir, config)
  run = _open(config, devices, workdir)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    latest = _newest(checkpoints, run)
  if latest is None:
    raise UserError(f'no complete checkpoint in {workdir / "checkpoints"}')
  step, (state, _) = latest
  return run, state, step


def _newest(checkpoints, run):
  target = functools.cache(lambda: run.initial_state(abstract=True))
  return checkpoints.newest(lambda step: checkpoints.restore(step, target()))


def compact_run(
  config: ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> Path | None:
  """Removes the dead channels of a run's latest checkpoint, and measures what is left.

  Writes `compact/` in the work directory: the network (`msp.compact.read`), in
  `compact/folded/` the same with its norms folded, and the comparison with the one it
  came from, compact.json and compact.md.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.

  Returns:
    Path of compact.md; None if no channel is dead, and nothing has been written.

  Raises:
    UserError: no checkpoint, one of another configuration, or one that cuts the
      network.
  """
  run, state, latest = _trained(config, workdir, devices)
  model = run.experiment.model
  dense = compact.Compact(model, *jax.device_get((state.params, state.batch_stats)))
  result = compact.compact(*dense)
  changed = jax.tree.map(jnp.shape, dense.params) != jax.tree.map(
    jnp.shape, result.params
  )
  if not changed:
    logger.info('step %d has no channel to remove; nothing written', latest)
    return None
  batch = next(iter(data.eval_batches(run.splits.val, config.tasks, batch_size=PANELS)))
  difference = compact.difference(dense, result, batch['image'])
  logger.info('largest difference of any output: %.1e of its scale', difference)
  logger.info('measuring; this takes a minute or two')
  shape = (*config.data.image_size, 3)
  networks = {'dense': dense, 'compact': result}
  folder = workdir / 'compact'
  compact.write(folder, result)
  if model.backbone.norm == 'batch':
    networks['folded'] = compact.fold(result)
    compact.write(folder / 'folded', networks['folded'])
  costs = {size: measure.cost(networks, shape, size) for size in (1, 32)}
  text = (
    f'# {config.name}, step {latest}\n\nLargest difference of an output, relative: '
    f'{difference:.1e}. Device: {jax.devices()[0].device_kind}.\n\n'
    f'{measure.table(costs, dense.params, result.params)}'
  )
  content = {
    'step': latest,
    'difference': difference,
    'costs': {
      str(size): {name: cost._asdict() for name, cost in pair.items()}
      for size, pair in costs.items()
    },
  }
  workdir_module.write(
    folder / 'compact.json', lambda f: f.write(json.dumps(content, indent=2).encode())
  )
  workdir_module.write(folder / 'compact.md', lambda f: f.write(text.encode()))
  return folder / 'compact.md'


def export_run(
  config: ConfigDict, workdir: Path, devices: Sequence[jax.Device] | None = None
) -> Path:
  """Exports a run's latest checkpoint, compacted and its batch norms folded.

  Writes `export/` in the work directory: model.stablehlo, model.onnx where jax2onnx
  is installed, and a model card as model_card.json and model_card.md. A file is read
  again and compared with the network before it is kept.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.

  Returns:
    Path of model.stablehlo.

  Raises:
    UserError: no checkpoint, one of another configuration, or one that cuts the
      network.
  """
  run, state, latest = _trained(config, workdir, devices)
  tasks, shape = run.experiment.tasks, (*config.data.image_size, 3)
  values = run.evaluate(run.eval_step(), state, run.splits.test)
  network = compact.Compact(
    run.experiment.model, *jax.device_get((state.params, state.batch_stats))
  )
  dense_parameters = sum(x.size for x in jax.tree.leaves(network.params))
  network = compact.compact(*network)
  if network.model.backbone.norm == 'batch':
    network = compact.fold(network)
  predict = export.predictor(network, tasks, shape)
  batch = next(iter(data.eval_batches(run.splits.val, config.tasks, batch_size=PANELS)))
  logger.info('exporting for %s', ', '.join(export.PLATFORMS))
  content, images = export.serialize(predict, shape), batch['image']
  worst = export.check(export.run(content, images), predict, images)
  logger.info('read again: predictions differ by at most %.1e', worst)
  terms = data.terms(config.data.name)
  if config.data.procedural_images:
    terms = 'a procedural stand-in, drawn by this program and free to use'
  card = export.card(
    config.name,
    tasks,
    shape,
    {k: v for k, v in values.items() if '/' in k and not k.startswith('loss')},
    {
      'dead groups': values['group_sparsity'],
      'parameters, dense': dense_parameters,
      'parameters, exported': sum(x.size for x in jax.tree.leaves(network.params)),
      'step': latest,
    },
    f'{config.data.name}: {terms}',
  )
  folder = workdir / 'export'
  files = {
    'model.stablehlo': content,
    'model_card.json': json.dumps(card, indent=2).encode(),
    'model_card.md': export.card_text(card).encode(),
  }
  try:
    folder.mkdir(exist_ok=True)
    (folder / 'model.onnx').unlink(missing_ok=True)  # of an earlier state
    for name, whole in files.items():
      workdir_module.write(folder / name, lambda f, whole=whole: f.write(whole))
    content = _export_onnx(predict, shape, images)
    if content is not None:
      workdir_module.write(folder / 'model.onnx', lambda f: f.write(content))
  except OSError as e:
    raise UserError(f'cannot write to {folder}: {e.strerror}') from None
  return folder / 'model.stablehlo'


def _export_onnx(predict, shape, images):
  """The network as ONNX, checked; None, with the reason logged, where it cannot be."""
  if importlib.util.find_spec('jax2onnx') is None:
    logger.info(
      'no model.onnx: jax2onnx is not installed; its own environment has it, '
      'pip install -r requirements-onnx.txt'
    )
    return None
  logger.info('exporting model.onnx')
  try:
    from msp import onnx

    content = onnx.serialize(predict, shape)
    worst = export.check(onnx.run(content, images), predict, images)
  except Exception as e:  # a converter raises what it likes; the rest is written
    logger.warning('no model.onnx: %s: %s', type(e).__name__, e)
    return None
  logger.info('read again: predictions differ by at most %.1e', worst)
  return content


class Progress(NamedTuple):
  """What the loop remembers between evaluations; part of a checkpoint."""

  best_score: float = -math.inf
  best_step: int = 0
  stopped: bool = False


class Run(NamedTuple):
  """An experiment with its data and its devices."""

  config: ConfigDict
  experiment: Experiment
  splits: data.Splits
  mesh: Mesh

  @property
  def sharded(self) -> NamedSharding:
    """The leading axis spread over the devices: batches."""
    return NamedSharding(self.mesh, PartitionSpec('data'))

  @property
  def replicated(self) -> NamedSharding:
    """A copy on every device: states and metrics."""
    return NamedSharding(self.mesh, PartitionSpec())

  def feed(self) -> Feed:
    """The training streams, at their beginning."""
    c = self.config
    stream = functools.partial(
      data.train_iterator,
      tasks=c.tasks,
      flip=c.data.flip,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    training = functools.partial(
      stream, batch_size=c.train.batch_size, seed=c.seed, missing=c.data.missing
    )
    streams = {'train': training(self.splits.train)}
    if _uses_hold_out(c):
      # As many hold-out images as query images.
      share = c.train.batch_size // (2 if c.meta.inner_steps else 1)
      hold_out = stream(self.splits.hold_out, batch_size=share, seed=c.seed + 1)
      streams['hold_out'] = hold_out
    if self.experiment.settled_step is not None:
      whole = self.splits.with_hold_out(c.data.train_share, c.seed)
      streams['all'] = training(whole)
    return Feed(streams, c.meta.inner_steps, self.sharded)

  def initial_state(self, *, abstract: bool = False) -> TrainState:
    """The state at step 0, replicated; its shapes only if `abstract`."""
    batch = self.feed().next()['query']
    init = self.once(self.experiment.init, out_shardings=self.replicated)
    key = jax.random.key(self.config.seed)
    params, batch_stats, fresh, unused = self.experiment.initial
    if not abstract:
      if params:
        few = lambda names: ', '.join(names[:3]) + (', …' if len(names) > 3 else '')
        logger.info(
          'initial weights: %d arrays of %s; fresh: %d %s; of no use: %d %s',
          len(params) + len(batch_stats),
          self.config.initial,
          len(fresh),
          few(fresh),
          len(unused),
          few(unused),
        )
      return init(key, batch, (params, batch_stats))
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated),
      jax.eval_shape(init, key, batch, (params, batch_stats)),
    )

  def once(self, function, **options):
    """`jax.jit` of what runs once."""
    if self.mesh.devices.flat[0].platform == 'cpu':
      options['compiler_options'] = ONCE_ON_CPU
    return jax.jit(function, **options)

  def evaluate(self, eval_step, state: TrainState, source: data.Source) -> dict:
    """Metrics of a state on one split; see `msp.evaluate.evaluate`."""
    c = self.config
    batches = data.eval_batches(
      source,
      c.tasks,
      batch_size=c.train.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      limit=c.data.eval_examples or None,
    )
    values = evaluate(
      eval_step,
      self.experiment.tasks,
      state.params,
      state.batch_stats,
      (put(batch, self.sharded) for batch in batches),
    )
    counted = jax.device_get(gr.sparsity(self.experiment.groups, state.params))
    alive = zip(self.experiment.groups.layers, counted.alive, strict=True)
    return values | {
      'group_sparsity': float(counted.groups),
      'weight_sparsity': float(counted.weights),
      'alive_groups': {gr.short_name(name): int(n) for name, n in alive},
    }

  def eval_step(self):
    """The jitted evaluation step."""
    return jax.jit(
      make_eval_step(self.experiment.model, self.experiment.tasks),
      out_shardings=self.replicated,
    )


def _open(config, devices, workdir, *, skip_corrupt=False) -> Run:
  """Checks everything that can be checked before anything is written."""
  devices = jax.devices() if devices is None else devices
  # jax.make_mesh would make explicit axes, which ordinary code does not run on.
  mesh = jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )
  labels = data.labels(config.data.name)
  build(config, labels, workdir=workdir)  # tells what is wrong with the configuration
  _check_batch(config, len(devices))
  processes.first_does(lambda: prepare(config, skip_corrupt=skip_corrupt))
  if not processes.is_first():  # finds it done, or has a disk of its own
    prepare(config, skip_corrupt=skip_corrupt)
  parts = splits(config)
  # A train_share may be smaller than a batch, which then has some images twice.
  if config.train.batch_size > parts.train.stored:
    raise UserError(
      f'train.batch_size is {config.train.batch_size}, more than the '
      f'{parts.train.stored} images of the train split; choose a smaller one'
    )
  unused = parts.hold_out is not None and not _uses_hold_out(config)
  if unused and processes.is_first():
    logger.warning(
      'data.hold_out=%g keeps %d of %d training images apart, and nothing in this '
      'configuration uses them; set data.hold_out=0 to train on them',
      config.data.hold_out,
      len(parts.hold_out),
      len(parts.hold_out) + len(parts.train),
    )
  own = parts.train if config.sparsity.learn_on == 'query' else parts.hold_out
  hold_out_images = 1 if own is None else len(own)
  experiment = build(config, labels, hold_out_images, workdir)
  logger.info(
    'groups: %d kernels match %r',
    len(experiment.groups.layers),
    config.sparsity.pattern,
  )
  return Run(config, experiment, parts, mesh)


def _check_batch(config, devices):
  size, parts = config.train.batch_size, ['query']
  if config.meta.inner_steps:
    parts.insert(0, 'support')
  if _uses_hold_out(config):
    parts.append('hold-out')
  share = size // 2 if config.meta.inner_steps else size
  if share < 1 or size % (2 if config.meta.inner_steps else 1) or share % devices:
    least = devices * (2 if config.meta.inner_steps else 1)
    raise UserError(
      f'train.batch_size={size} is too small or does not divide for '
      f'{" + ".join(parts)} on {devices} device(s): use a multiple of {least}'
    )


def _loop(run, state, progress, feed, checkpoints, writer):
  config, experiment = run.config, run.experiment
  c = config.train
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=run.replicated)
  step_fn = jit(experiment.train_step)
  settles = experiment.settled_step is not None
  settled_fn = jit(experiment.settled_step) if settles else None
  eval_step = run.eval_step()
  key = jax.random.key(config.seed + 1)
  start = int(state.step)
  images = len(run.splits.train)
  clock = Clock(start)
  monitor = Monitor(
    config.sparsity.min_alive, experiment.groups, state.params, _search_steps(config)
  )
  logger.info('compiling the training step (the first one takes a while)')

  # Under a constraint the violation is what notices.
  guarded = config.sparsity.coefficient == 'learned'
  guarded &= config.sparsity.objective == 'holdout'
  safe = start, _copy(_network(state)) if guarded else None
  # The best network of a budget, and patience, are of those that may have met it.
  rises_until = 0
  if config.sparsity.coefficient == 'learned' and config.sparsity.objective == 'budget':
    rises_until = experiment.settled or 0

  def record(step, metrics):
    starved = monitor.check(step, metrics)
    bar.advance(step, metrics)
    if step % c.log_every == 0:
      row = {'split': 'train', 'step': step, 'epoch': step * c.batch_size / images}
      row |= flatten(metrics, experiment.groups.names)
      writer.write({**row, 'step_time': clock.per_step(step)})
    return starved and guarded

  def rescued(state, step):
    bar.say(
      f'step {step}: λ/λ_max of {float(jnp.exp(jnp.mean(state.rho))):.2g} starves the '
      f'network, half of its layers are all but dead; going on from step '
      f'{safe[0]} with a fourth of that λ'
    )
    network = _copy(safe[1])._asdict()
    tangent = jax.tree.map(jnp.zeros_like, state.tangent)
    return state._replace(**network, rho=state.rho - math.log(4), tangent=tangent)

  pending = None
  with Bar(start, c.steps) as bar, Interruption() as interruption:
    for step in range(start + 1, c.steps + 1):
      settled = settles and step > experiment.settled
      if settles and step == experiment.settled + 1:
        bar.say(
          f'step {step}: λ stands still from now on, and its images join the others; '
          f'compiling the step for that'
        )
      state, metrics = (settled_fn if settled else step_fn)(
        state, feed.next(settled=settled), jax.random.fold_in(key, step)
      )
      # Reading the previous step's numbers leaves the device busy with this one.
      starved = pending is not None and record(*pending)
      pending = step, metrics
      evaluating = step % c.evaluate_every == 0 or step == c.steps
      received = interruption.received
      if jax.process_count() > 1:
        # All have to stop after the same step, and asking takes time.
        asking = evaluating or step % c.log_every == 0
        received = processes.agreed(received) if asking else 0
      if evaluating or received:
        starved |= record(*pending)
        pending = None
      if starved:
        if pending is not None:
          record(*pending)
        state, pending = rescued(state, step), None
      if not (evaluating or received):
        continue
      score = -math.inf
      if evaluating:
        values = run.evaluate(eval_step, state, run.splits.val)
        writer.write({'split': 'val', 'step': step, **values})
        bar.say(f'step {step}: validation {summary(values, experiment.tasks)}')
        if step > rises_until:
          score = values.get('score', -math.inf)
        since = max(progress.best_step, rises_until)
        if score > progress.best_score:
          progress = progress._replace(best_score=score, best_step=step)
        elif c.patience and step - since >= c.patience * c.evaluate_every:
          progress = progress._replace(stopped=True)
          bar.say(f'stopping: no better score since step {since}')
      meta = {'data': feed.get_state(), 'progress': progress._asdict()}
      checkpoints.save(step, state, meta, score)
      if guarded:
        safe = step, _copy(_network(state))
      clock.reset(step)
      if received:
        bar.say(f'interrupted; step {step} is saved, the same command goes on')
        sys.exit(128 + received)
      if progress.stopped:
        break
  return state, progress


class _Network(NamedTuple):
  """The part of a state that a λ can ruin."""

  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree


def _network(state):
  return _Network(state.params, state.batch_stats, state.opt_state)


def _copy(arrays):
  # The step takes over the buffers of its state.
  return jax.tree.map(jnp.copy, arrays)


def _finish(run, workdir, state, checkpoints, writer):
  """Writes what the report needs of a finished run: test metrics, groups, panels.

  The test split is evaluated with the last state ('test') and, if another
  checkpoint had the better validation score, with that one too ('test_best').
  """
  eval_step = run.eval_step()
  rows = {'test': state}
  best = checkpoints.best_step()
  if best not in (None, int(state.step)):
    try:
      rows['test_best'], _ = checkpoints.restore(best, state)
    except DamagedCheckpointError as e:
      logger.warning('%s. The best state is left out', e)
  for split, one in rows.items():
    logger.info('evaluating the test split at step %d', one.step)
    values = run.evaluate(eval_step, one, run.splits.test)
    writer.write({'split': split, 'step': int(one.step), **values})
  if not processes.is_first():
    return
  workdir_module.write_groups(workdir, run.experiment.groups, state.params)
  tasks = run.experiment.tasks
  batch = next(
    iter(data.eval_batches(run.splits.val, run.config.tasks, batch_size=PANELS))
  )
  predict = run.once(make_predict(run.experiment.model, tasks))
  params, stats = jax.device_get((state.params, state.batch_stats))
  predictions = jax.device_get(predict(params, stats, batch))
  workdir_module.write_predictions(workdir, batch, predictions, tasks)


class Monitor:
  """Watches every step's numbers for what should stop or worry a run."""

  def __init__(
    self, min_alive: int, groups: gr.Groups, params: PyTree, search: int = 0
  ):
    """Remembers the names the numbers belong to; `search`: see `Objective`."""
    self._min_alive = min_alive
    self._search = search
    self._totals = gr.totals(groups, params)
    # Of single weights a network may well need no more than a sixteenth.
    self._enough = STARVED if groups.array_axis is not None else 0.0
    self._leaves = [
      gr.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    self._warned = set()

  def check(self, step: int, metrics: Mapping[str, jax.Array]) -> bool:
    """Raises on a number that is not finite; warns of a layer at its floor.

    Returns:
      Whether half of the layers, or more, are at their floor or have no more than
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
    for (layer, total), alive in zip(
      self._totals.items(), np.asarray(metrics['alive']), strict=True
    ):
      at_floor = alive <= self._min_alive < total
      starved += at_floor or alive <= self._enough * total
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
