"""The loop: data, logging, evaluation, checkpoints; no mathematics."""

import contextlib
import functools
import logging
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from msp import figures, processes, report
from msp import groups as gr
from msp import initial as initial_module
from msp import workdir as workdir_module
from msp.checkpoint import Checkpoints
from msp.console import Bar, Clock, Interruption
from msp.errors import UserError, words
from msp.evaluate import make_predict
from msp.experiment import begun
from msp.monitor import Monitor, constraint, flatten, summary
from msp.run import open_run
from msp.writer import METRICS, MetricWriter, SilentWriter, read

logger = logging.getLogger(__name__)

# Steps after which several processes ask each other whether to stop: of a preempted
# machine there is half a minute left, and a step may take a second.
ASK_EVERY = 5

PyTree = Any


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
    skip_corrupt: see `dataset.prepare`.

  Returns:
    Path of the report.

  Raises:
    UserError, data.DataError: see their messages.
    FloatingPointError: a loss or gradient is not finite; names step and layer.
  """
  workdir_module.check(workdir, config)
  run = open_run(config, devices, workdir, skip_corrupt=skip_corrupt)
  with _claimed(workdir, run), Checkpoints(workdir) as checkpoints:
    feed = run.feed()
    latest = run.newest(checkpoints)
    if latest is None:
      step, state = 0, run.initial_state()
      count = run.once(functools.partial(gr.sparsity, run.experiment.groups))
      progress = Progress(alive_at_start=count(state.params).alive.tolist())
    else:
      step, (state, meta) = latest
      try:
        feed.set_state(meta['data'])
        progress = Progress(**meta['progress'])
      except (LookupError, TypeError, ValueError) as e:
        raise UserError(
          f'the checkpoint of step {step} in {workdir} is of another version of this '
          f'program, which it cannot go on from ({words(e)}); train in a new directory'
        ) from None
      logger.info('going on from step %d', step)
    first, evaluate = processes.is_first(), run.evaluator()
    new_writer = lambda: MetricWriter(workdir, step) if first else SilentWriter()
    with processes.each_does(new_writer) as writer:
      if int(state.step) < config.train.steps and not progress.stopped:
        state, progress = _loop(
          run, state, progress, feed, evaluate, checkpoints, writer
        )
      _finish(run, workdir, state, evaluate, checkpoints, writer)
  processes.first_does(lambda: _conclude(workdir, config))
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
  if begun(workdir):  # its source may be gone
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


@contextlib.contextmanager
def _claimed(workdir, run):
  """Makes the directory this run's, and no other process's while it goes on."""
  with contextlib.ExitStack() as held:

    def claim():
      workdir_module.claim(workdir, run.config)
      held.enter_context(workdir_module.exclusive(workdir))
      if run.config.initial:
        initial_module.keep_shape(workdir, run.experiment.model.backbone.shape)
      if run.experiment.initial.params:
        path = initial_module.write_report(workdir, run.experiment.initial)
        logger.info('what became of every initial weight: %s', path)

    processes.first_does(claim)
    logger.info('work directory: %s', workdir)
    yield


class Progress(NamedTuple):
  """What the loop remembers between evaluations; part of a checkpoint."""

  best_score: float = -math.inf
  best_step: int = 0
  stopped: bool = False
  alive_at_start: Sequence[int] = ()  # groups of each layer, of the first network


def _loop(run, state, progress, feed, evaluate, checkpoints, writer):
  config, experiment = run.config, run.experiment
  c = config.train
  jit = functools.partial(jax.jit, donate_argnums=0, out_shardings=run.replicated)
  step_fn = jit(experiment.train_step)
  settles = experiment.settled_step is not None
  settled_fn = jit(experiment.settled_step) if settles else None
  with_statistics = run.estimator()
  key = jax.random.key(config.seed + 1)
  start = int(state.step)
  images = len(run.splits.train)
  clock = Clock(start)
  monitor = Monitor(
    config.sparsity.min_alive,
    experiment.groups,
    state.params,
    experiment.objective.search,
    progress.alive_at_start,
  )
  logger.info('compiling the training step (the first one takes a while)')

  # Under a constraint the violation is what notices.
  guarded = config.sparsity.coefficient == 'learned'
  guarded &= config.sparsity.objective == 'holdout'
  safe = start, _copy(_network(state)) if guarded else None
  # The best network, and patience, are of those whose pattern is final and whose
  # budget may be met.
  scored_from = 0
  if config.sparsity.coefficient == 'learned':
    budget = experiment.objective.kind == 'budget'
    scored_from = experiment.settled or (experiment.objective.rise if budget else 0)

  def record(step, metrics):
    metrics = jax.device_get(metrics)  # at once: each by itself would wait
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
        asking = evaluating or step % min(c.log_every, ASK_EVERY) == 0
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
        state = with_statistics(state)
        values = evaluate(state, run.splits.val)
        writer.write({'split': 'val', 'step': step, **values})
        bar.say(f'step {step}: validation {summary(values, experiment.tasks)}')
        if step > scored_from:
          score = values.get('score', -math.inf)
        since = max(progress.best_step, scored_from)
        if score > progress.best_score:
          progress = progress._replace(best_score=score, best_step=step)
        elif c.patience and step - since >= c.patience * c.evaluate_every:
          progress = progress._replace(stopped=True)
          bar.say(f'stopping: no better score since step {since}')
      meta = {'data': feed.get_state(), 'progress': progress._asdict()}
      meta['stand_in'] = run.splits.train.stand_in
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


def _finish(run, workdir, state, evaluate, checkpoints, writer):
  """Writes what the report needs of a finished run: test metrics, groups, panels.

  The test split is evaluated with the last state ('test') and, if another
  checkpoint had the better validation score, with that one too ('test_best').
  """
  rows = {'test': state}
  best = checkpoints.best_step()
  if best not in (None, int(state.step)):
    try:
      restore = lambda: checkpoints.restore(best, state)
      rows['test_best'], _ = processes.each_does(restore)
    except UserError as e:  # damaged, here or for another process
      logger.warning('%s. The best state is left out', e)
  for split, one in rows.items():
    logger.info('evaluating the test split at step %d', one.step)
    values = evaluate(one, run.splits.test) | run.outcome(one)
    writer.write({'split': split, 'step': int(one.step), **values})
  processes.first_does(lambda: _write_last(run, workdir, state))


def _conclude(workdir, config):
  """Says whether the constraint has been kept, and writes the report."""
  kept = constraint(read(workdir / METRICS), config.sparsity)
  if kept is not None:
    level = logging.INFO if kept.holds else logging.WARNING
    logger.log(level, '%s%s', '' if kept.holds else 'constraint not kept. ', kept.words)
  report.write(workdir)


def _write_last(run, workdir, state):
  # On this process's own devices: the others take no part.
  params, stats = jax.device_get((state.params, state.batch_stats))
  workdir_module.write_groups(workdir, run.experiment.groups, params)
  tasks = run.experiment.tasks
  batch = run.sample(figures.PICTURES)
  predict = run.once(make_predict(run.experiment.model, tasks))
  predictions = jax.device_get(predict(params, stats, batch))
  workdir_module.write_predictions(workdir, batch, predictions, tasks)
