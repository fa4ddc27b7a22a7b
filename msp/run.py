"""An experiment with its data and its devices."""

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import data
from data.progress import progress_bar
from msp import dataset, measure, objectives, processes
from msp import groups as gr
from msp.checkpoint import Checkpoints
from msp.errors import UserError
from msp.evaluate import evaluate, make_eval_step, make_statistics_step
from msp.experiment import Experiment, build, query_images, uses_hold_out
from msp.train_state import TrainState

logger = logging.getLogger(__name__)

PyTree = Any
# For programs that run once, where compiling would take longer than running: drawing
# the weights of the `:tiny` network compiles in a tenth of the time.
ONCE_ON_CPU = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,
}


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
      # Every other one: the same images whatever number of processes reads them.
      parts = {
        part: {name: x[start::2] for name, x in batch.items()}
        for start, part in enumerate(('support', 'query'))
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

  def _stream(self, source, tasks, **options):
    """An endless stream of a part of the data, at its beginning."""
    return data.train_iterator(
      source,
      tasks,
      flip=self.config.data.flip,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      **options,
    )

  def feed(self) -> Feed:
    """The training streams, at their beginning."""
    c = self.config
    training = functools.partial(
      self._stream,
      tasks=c.tasks,
      batch_size=c.train.batch_size,
      seed=c.seed,  # an image lacks the same label in every stream
      missing=c.data.missing,
    )
    streams = {'train': training(self.splits.train)}
    if uses_hold_out(c):
      streams['hold_out'] = training(self.splits.hold_out, batch_size=query_images(c))
    if self.experiment.settled_step is not None:
      whole = self.splits.with_hold_out(c.data.train_share, c.seed)
      streams['all'] = training(whole)
    return Feed(streams, c.meta.inner_steps, self.sharded)

  def initial_state(self, *, abstract: bool = False) -> TrainState:
    """The state at step 0, replicated; its shapes only if `abstract`."""
    batch = self.feed().next()['query']
    init = self.once(self.experiment.init, out_shardings=self.replicated)
    key = jax.random.key(self.config.seed)
    params, batch_stats, fresh, unused, _ = self.experiment.initial
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

  def sample(self, count: int) -> dict[str, np.ndarray]:
    """The first `count` images of the validation split, with their labels."""
    c = self.config
    return next(iter(data.eval_batches(self.splits.val, c.tasks, batch_size=count)))

  def newest(self, checkpoints: Checkpoints) -> tuple[int, tuple] | None:
    """The latest step with a readable checkpoint, and its (state, meta)."""
    target = functools.cache(lambda: self.initial_state(abstract=True))
    return checkpoints.newest(lambda step: checkpoints.restore(step, target()))

  def once(self, function, **options):
    """`jax.jit` of what runs once."""
    if self.mesh.devices.flat[0].platform == 'cpu':
      options['compiler_options'] = ONCE_ON_CPU
    return jax.jit(function, **options)

  def estimator(self) -> Callable[[TrainState], TrainState]:
    """Makes (state) -> the same with the statistics of its norms at its θ⁰.

    The mean over `train.statistics_batches` batches of training images, the same each
    time; see `msp.evaluate.make_statistics_step`. Make it once, as `evaluator`.
    """
    c, count = self.config, self.config.train.statistics_batches
    own = jax.jit(
      make_statistics_step(self.experiment.model), out_shardings=self.replicated
    )
    add = jax.jit(
      lambda total, one: jax.tree.map(lambda t, x: t + x / count, total, one),
      donate_argnums=0,
      out_shardings=self.replicated,
    )

    def with_statistics(state):
      if not count or not jax.tree.leaves(state.batch_stats):
        return state
      nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.batch_stats)
      total, near = jax.device_put((nothing, nothing), self.replicated)
      seed, size = c.seed + 2, c.train.batch_size
      stream = self._stream(self.splits.train, (), batch_size=size, seed=seed)
      for number, batch in enumerate(itertools.islice(stream, count)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        image = put(batch['image'], self.sharded)
        if not number:
          # Not those of `state`: the result would depend on them, by rounding.
          near = own(state.params, near, image, key)
        total = add(total, own(state.params, near, image, key))
      return state._replace(batch_stats=total)

    return with_statistics

  def evaluator(self) -> Callable[[TrainState, data.Source], dict]:
    """Makes (state, part of the data) -> its metrics; see `msp.evaluate.evaluate`.

    Make it once: it holds the compiled programs.
    """
    c, groups, tasks = self.config, self.experiment.groups, self.experiment.tasks
    eval_step = jax.jit(
      make_eval_step(self.experiment.model, tasks), out_shardings=self.replicated
    )
    # One program: each operation by itself would be compiled for each kernel's shape.
    count = self.once(functools.partial(gr.sparsity, groups))

    def evaluate_state(state, source):
      batches = data.eval_batches(
        source,
        c.tasks,
        batch_size=c.train.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=c.data.eval_examples or None,
      )
      images = min(c.data.eval_examples or len(source), len(source))
      count_batches = -(-images // c.train.batch_size)
      shown = progress_bar(
        batches, count_batches, 'evaluating batches', processes.is_first()
      )
      values = evaluate(
        eval_step,
        tasks,
        state.params,
        state.batch_stats,
        (put(batch, self.sharded) for batch in shown),
      )
      counted = jax.device_get(count(state.params))
      alive = zip(groups.layers, counted.alive, strict=True)
      return values | {
        'group_sparsity': float(counted.groups),
        'weight_sparsity': float(counted.weights),
        'alive_groups': {gr.short_name(name): int(n) for name, n in alive},
      }

    return evaluate_state

  def outcome(self, state: TrainState) -> dict[str, Any]:
    """What a finished run says of its network, besides metrics.

    Args:
      state: of its end.

    Returns:
      The items of `measure.backbone_costs`, without them if a dead layer cuts the
      network; with a budget 'removed', the share of `sparsity.measure` that is gone;
      and 'stand_in', True, if the pictures were drawn by a renderer.
    """
    model, objective = self.experiment.model, self.experiment.objective
    arrays = jax.device_get((state.params, state.batch_stats))
    found = {'stand_in': True} if self.splits.train.stand_in else {}
    learned = self.config.sparsity.coefficient == 'learned'
    if learned and objective.kind == 'budget':
      removed = functools.partial(objectives.removed, objective, self.experiment.groups)
      found['removed'] = float(self.once(removed)(arrays[0]))
    try:
      shape = (*self.config.data.image_size, 3)
      return found | measure.backbone_costs(model, *arrays, shape)
    except UserError as e:
      logger.warning('what is left of the backbone cannot be counted: %s', e)
      return found


def open_run(
  config: ConfigDict,
  devices: Sequence[jax.Device] | None,
  workdir: Path | None,
  *,
  skip_corrupt: bool = False,
) -> Run:
  """Opens a run, its data prepared; checks all that can be before anything is written.

  Args:
    config: see `configs/common.py`.
    devices: those to use; None: all.
    workdir: of the run, see `experiment.build`; None: it has none.
    skip_corrupt: see `dataset.prepare`.

  Returns:
    The run; its work directory is untouched.

  Raises:
    UserError, data.DataError: what is wrong with the configuration or the data.
  """
  devices = jax.devices() if devices is None else devices
  # jax.make_mesh would make explicit axes, which ordinary code does not run on.
  mesh = jax.make_mesh(
    (len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices
  )
  labels = data.labels(config.data.name)
  # Tells what is wrong with the configuration before any data is prepared.
  experiment = build(config, labels, workdir=workdir)
  _check_batch(config, len(devices))
  processes.first_does(lambda: dataset.prepare(config, skip_corrupt=skip_corrupt))
  # The others find it done, or have a disk of their own.
  processes.each_does(
    lambda: processes.is_first() or dataset.prepare(config, skip_corrupt=skip_corrupt)
  )
  parts = dataset.splits(config)
  # A train_share may be smaller than a batch, which then has some images twice.
  if config.train.batch_size > parts.train.stored:
    raise UserError(
      f'train.batch_size is {config.train.batch_size}, more than the '
      f'{parts.train.stored} images of the train split; choose a smaller one'
    )
  unused = parts.hold_out is not None and not uses_hold_out(config)
  if unused and processes.is_first():
    logger.warning(
      'data.hold_out=%g keeps %d of %d training images apart, and nothing in this '
      'configuration uses them; set data.hold_out=0 to train on them',
      config.data.hold_out,
      len(parts.hold_out),
      len(parts.hold_out) + len(parts.train),
    )
  if parts.train.stand_in:
    logger.info('%s is a procedural stand-in, not real data', config.data.name)
  if processes.is_first() and _loose(config):
    logger.warning(
      'sparsity.optimizers.holdout has no retreat, so nothing keeps λ from killing '
      'more groups than may be dead by sparsity.rise; put it before the bounds, or '
      'set sparsity.rise=0'
    )
  own = parts.train if config.sparsity.learn_on == 'query' else parts.hold_out
  if own is not None and config.sparsity.objective == 'tolerance':
    experiment = build(config, labels, len(own), workdir)  # for its standard errors
  logger.info(
    'on %d × %s, %d process(es); computing in %s',
    len(devices),
    devices[0].device_kind,
    jax.process_count(),
    config.model.dtype,
  )
  logger.info(
    'groups: %d kernels match %r',
    len(experiment.groups.layers),
    config.sparsity.pattern,
  )
  return Run(config, experiment, parts, mesh)


def _loose(config):
  """Whether the trust region of 'holdout' is asked for, and nothing makes it."""
  sparsity = config.sparsity
  names = [entry.name for entry in sparsity.optimizers.holdout]
  follows = sparsity.coefficient == 'learned' and sparsity.objective == 'holdout'
  return follows and sparsity.rise > 0 and 'retreat' not in names


def _check_batch(config, devices):
  size, parts = config.train.batch_size, ['query']
  if config.meta.inner_steps:
    parts.insert(0, 'support')
  if uses_hold_out(config):
    parts.append('hold-out')
  least = devices * (2 if config.meta.inner_steps else 1)
  if size < 1 or size % least:
    raise UserError(
      f'train.batch_size={size} is too small or does not divide for '
      f'{" + ".join(parts)} on {devices} device(s): use a multiple of {least}, '
      f'{least} or more'
    )
