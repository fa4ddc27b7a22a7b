"""What is done with a trained run: evaluating, compacting, exporting it."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import data
from msp import compact, export, measure, processes
from msp import workdir as workdir_module
from msp.checkpoint import Checkpoints
from msp.errors import UserError
from msp.monitor import summary
from msp.run import Run, open_run
from msp.train_state import TrainState

logger = logging.getLogger(__name__)

COMPARED = 6  # images that two forms of a network are compared on
LOSSLESS = 1e-4  # difference of two of them, relative, that is rounding


def evaluate_run(
  config: ConfigDict,
  workdir: Path,
  devices: Sequence[jax.Device] | None = None,
  *,
  skip_corrupt: bool = False,
) -> dict[str, dict]:
  """Metrics of a run's latest checkpoint on val and test, also as evaluation.json.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.
    skip_corrupt: see `msp.dataset.prepare`.

  Returns:
    split -> metrics; see `msp.evaluate.evaluate`.

  Raises:
    UserError: no checkpoint, or one of another configuration.
  """
  run, state, latest = _trained(config, workdir, devices, skip_corrupt)
  evaluate = run.evaluator()
  result = {}
  for split in ('val', 'test'):
    values = evaluate(state, getattr(run.splits, split))
    result[split] = {'step': latest, **values}
    logger.info('%s: %s', split, summary(values, run.experiment.tasks))
  content = json.dumps(result, indent=2).encode()
  path = workdir / 'evaluation.json'
  processes.first_does(lambda: workdir_module.write(path, content))
  return result


def compact_run(
  config: ConfigDict,
  workdir: Path,
  devices: Sequence[jax.Device] | None = None,
  *,
  skip_corrupt: bool = False,
) -> Path | None:
  """Removes the dead channels of a run's latest checkpoint, and measures what is left.

  Writes `compact/` in the work directory: the network (`msp.compact.read`), in
  `compact/folded/` the same with its norms folded, and the comparison with the one it
  came from, compact.json and compact.md.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.
    skip_corrupt: see `msp.dataset.prepare`.

  Returns:
    Path of compact.md; None if no channel is dead, and nothing has been written.

  Raises:
    UserError: no checkpoint, one of another configuration, or one that cuts the
      network.
  """
  run, state, latest = _trained(config, workdir, devices, skip_corrupt)
  model = run.experiment.model
  dense = compact.Compact(model, *jax.device_get((state.params, state.batch_stats)))
  result = compact.compact(*dense)
  changed = jax.tree.map(np.shape, dense.params) != jax.tree.map(
    np.shape, result.params
  )
  if not changed:
    logger.info('step %d has no channel to remove; nothing written', latest)
    if (workdir / 'compact').exists():
      logger.warning('%s is of an earlier state', workdir / 'compact')
    return None
  batch = run.sample(COMPARED)
  difference = compact.difference(dense, result, batch['image'])
  logger.info('largest difference of any output: %.1e of its scale', difference)
  if not difference <= LOSSLESS:
    raise UserError(
      f'the compact network is not the network of step {latest}: outputs differ by '
      f'{difference:.1e} of their scale; nothing written'
    )
  logger.info('measuring; this takes a minute or two')
  shape = (*config.data.image_size, 3)
  networks = {'dense': dense, 'compact': result}
  folder = workdir / 'compact'
  for name in ('compact.json', 'compact.md'):  # of an earlier state
    (folder / name).unlink(missing_ok=True)
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
  workdir_module.write(folder / 'compact.json', json.dumps(content, indent=2).encode())
  workdir_module.write(folder / 'compact.md', text.encode())
  return folder / 'compact.md'


def export_run(
  config: ConfigDict,
  workdir: Path,
  devices: Sequence[jax.Device] | None = None,
  *,
  skip_corrupt: bool = False,
) -> Path:
  """Exports a run's latest checkpoint, compacted and its batch norms folded.

  Writes `export/` in the work directory: model.stablehlo, model.onnx where jax2onnx
  is installed, and a model card as model_card.json and model_card.md. A file is read
  again and compared with the network before it is kept.

  Args:
    config: the run's own.
    workdir: of the run.
    devices: those to use, all by default.
    skip_corrupt: see `msp.dataset.prepare`.

  Returns:
    Path of model.stablehlo.

  Raises:
    UserError: no checkpoint, one of another configuration, or one that cuts the
      network.
  """
  run, state, latest = _trained(config, workdir, devices, skip_corrupt)
  tasks, shape = run.experiment.tasks, (*config.data.image_size, 3)
  values = run.evaluator()(state, run.splits.test)
  network = compact.Compact(
    run.experiment.model, *jax.device_get((state.params, state.batch_stats))
  )
  dense_parameters = sum(x.size for x in jax.tree.leaves(network.params))
  network = compact.compact(*network)
  if network.model.backbone.norm == 'batch':
    network = compact.fold(network)
  predict = export.predictor(network, tasks, shape)
  batch = run.sample(COMPARED)
  logger.info('exporting for %s', ', '.join(export.PLATFORMS))
  content, images = export.serialize(predict, shape), batch['image']
  worst = export.check(export.run(content, images), predict, images)
  logger.info('read again: predictions differ by at most %.1e', worst)
  terms = data.terms(config.data.name)
  if run.splits.train.stand_in:
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
    content,
  )
  folder = workdir / 'export'
  files = {
    'model.stablehlo': content,
    'model_card.json': json.dumps(card, indent=2).encode(),
    'model_card.md': export.card_text(card).encode(),
  }
  try:
    folder.mkdir(exist_ok=True)
    for name in ('model_card.json', 'model_card.md', 'model.onnx'):
      (folder / name).unlink(missing_ok=True)  # of an earlier state
    for name, whole in files.items():
      workdir_module.write(folder / name, whole)
    content = _export_onnx(predict, shape, images)
    if content is not None:
      workdir_module.write(folder / 'model.onnx', content)
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


def _trained(
  config, workdir, devices, skip_corrupt=False
) -> tuple[Run, TrainState, int]:
  """The run of a work directory, its latest state, and the step of that."""
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(
      f'no checkpoint in work directory {workdir}; train first, or name the '
      f'directory of a run with --workdir'
    )
  workdir_module.check(workdir, config)
  run = open_run(config, devices, workdir, skip_corrupt=skip_corrupt)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    latest = run.newest(checkpoints)
  if latest is None:
    raise UserError(f'no complete checkpoint in {workdir / "checkpoints"}')
  step, (state, _) = latest
  # A run that was asked to stop has not been evaluated there.
  return run, run.estimator()(state), step
