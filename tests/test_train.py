"""The loop, end to end, on forty rendered faces."""

import copy
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType
from ml_collections import ConfigDict
from PIL import Image

import data
from configs import common
from msp import (
  compact,
  dataset,
  figures,
  losses,
  optimizers,
  train,
  trained,
  workdir,
  writer,
)
from msp import evaluate as evaluation
from msp import experiment as experiment_module
from msp import groups as gr
from msp import run as running
from msp.checkpoint import Checkpoints
from msp.episodes import Hypergradient, Inner
from msp.errors import UserError
from msp.experiment import build
from msp.hypergradient import Solver
from msp.models import multitask
from msp.monitor import Monitor
from msp.objectives import Objective
from msp.train_state import TrainState
from msp.transforms import AdaptiveProximalState

STEPS, EVALUATE_EVERY = 6, 2


@pytest.fixture(scope='module', autouse=True)
def _compile_once(tmp_path_factory):
  """Runs of one configuration share their compiled programs."""

  def configure(folder, unoptimized):
    jax.config.update('jax_compilation_cache_dir', folder)
    jax.config.update('jax_disable_most_optimizations', unoptimized)
    compilation_cache.reset_cache()

  before = jax.config.jax_compilation_cache_dir
  # Compiling takes longer than training.
  configure(str(tmp_path_factory.mktemp('compiled')), True)
  yield
  configure(before, False)


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
  """A prepared data set, shared by all runs."""
  folder = tmp_path_factory.mktemp('faces')
  dataset.prepare(config(folder))
  return folder


def config(folder, made=common.celeba, **overrides):
  """A tiny experiment with everything that has a state: λ, dropout, flips."""
  c = made()
  common.learn_coefficient(c)
  c.update_from_flattened_dict(
    {
      'name': 'tiny',
      'tasks': ('male', 'smiling'),
      'data.source': str(folder / 'source'),
      'data.prepared': str(folder / 'prepared'),
      'data.procedural_images': 40,
      'data.image_size': (16, 16),
      'model.blocks': (1, 1, 1, 1),
      'model.block': 'basic',
      'model.width': 0.0625,
      'model.head_features': 32,
      'meta.inner_steps': 1,
      'meta.episodes': '1',
      'meta.exact': False,
      'meta.unroll': 'yes',
      'train.steps': STEPS,
      'train.batch_size': 8,
      'train.log_every': 1,
      'train.evaluate_every': EVALUATE_EVERY,
      'train.patience': 100,
      **overrides,
    }
  )
  return c


def run(c, workdir):
  return train.train(c, workdir, devices=jax.devices()[:1])


def rows(workdir):
  """The log without what a clock says."""
  return [
    {name: value for name, value in row.items() if name != 'step_time'}
    for row in writer.read(workdir / 'metrics.jsonl')
  ]


def final_params(workdir):
  """The newest checkpoint as it is on disk."""
  import orbax.checkpoint as ocp

  with Checkpoints(workdir) as checkpoints:
    step = checkpoints.latest_step()
  path = workdir / 'checkpoints' / str(step) / 'state'
  return step, ocp.StandardCheckpointer().restore(path.resolve())


def same_run(a, b):
  assert rows(a) == rows(b)
  (step_a, state_a), (step_b, state_b) = final_params(a), final_params(b)
  assert step_a == step_b
  jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


@pytest.fixture(scope='module')
def finished(faces, tmp_path_factory):
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp('finished')
  report = run(config(faces), workdir)
  return workdir, report


@pytest.mark.parametrize(
  ('overrides', 'unused'),
  [
    ({}, False),
    ({'sparsity.coefficient': 'none'}, True),
    ({'sparsity.objective': 'budget'}, True),
    ({'sparsity.coefficient': 'none', 'data.hold_out': 0.0}, False),
  ],
)
def test_images_that_nothing_uses_are_told_of(
  faces, tmp_path, caplog, overrides, unused
):
  run = running.open_run(config(faces, **overrides), jax.devices()[:1], tmp_path)
  held = len(run.splits.hold_out or ())
  text = f'keeps {held} of {held + len(run.splits.train)} training images apart'
  assert (text in caplog.text) == unused


def test_a_trust_region_that_nothing_makes_is_told_of(faces, caplog):
  c = config(faces)
  c.sparsity.optimizers.holdout = [ConfigDict({'name': 'sgd', 'learning_rate': 0.1})]
  for rise in (0.6, 0.0):
    caplog.clear()
    c.sparsity.rise = rise
    running.open_run(c, jax.devices()[:1], None)
    assert ('has no retreat' in caplog.text) == (rise > 0)


@pytest.mark.parametrize('objective', ['holdout', 'budget'])
def test_the_published_objective_has_a_trust_region(objective):
  optimizer = optimizers.build(common.base().sparsity.optimizers[objective], '')
  rho, state = jnp.array(-1.0), optimizer.init(jnp.array(-1.0))
  updates, _ = optimizer.update(jnp.array(-1.0), state, rho, violation=jnp.array(2.0))
  assert (updates <= -0.1) == (objective == 'holdout')


def test_one_process_tells_of_unused_images(faces, caplog, monkeypatch):
  monkeypatch.setattr(running.processes, 'is_first', lambda: False)
  c = config(faces, **{'sparsity.coefficient': 'none'})
  running.open_run(c, jax.devices()[:1], None)
  assert 'training images apart' not in caplog.text


def test_another_configuration_is_told_of_before_data_are_made(
  finished, faces, tmp_path
):
  other = config(faces, **{'data.prepared': str(tmp_path / 'new'), 'seed': 5})
  with pytest.raises(UserError, match='seed was 0, now 5'):
    trained.evaluate_run(other, finished[0])
  assert not (tmp_path / 'new').exists()


def test_a_run_leaves_its_files(finished, faces):
  workdir, report = finished
  assert report == workdir / 'report' / 'index.html'
  assert report.stat().st_size > 10_000
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['train']['steps'] == STEPS
  layers = json.loads((workdir / 'groups.json').read_text())['layers']
  assert {'name', 'total', 'alive'} <= layers[0].keys()
  with np.load(workdir / 'predictions.npz') as predictions:
    names = set(predictions.files)
  assert {'image', 'label/male', 'prediction/male', 'classes/smiling'} <= names
  assert any((workdir / 'tensorboard').iterdir())
  assert not list(workdir.glob('.*'))


def test_a_run_logs_every_number(finished):
  log = rows(finished[0])
  by_split = lambda split: [row for row in log if row['split'] == split]
  trained = by_split('train')
  assert [row['step'] for row in trained] == list(range(1, STEPS + 1))
  assert {
    'loss',
    'loss/male',
    'loss/smiling',
    'hold_out_loss',
    'lambda',
    'lambda_relative',
    'hypergradient',
    'group_sparsity',
    'weight_sparsity',
    'gradient_norm',
  } <= trained[0].keys()
  assert trained[0]['lambda_relative'] == pytest.approx(1e-2)  # sparsity.start
  assert len({row['lambda'] for row in trained}) > 1  # it learns
  settled = round(0.6 * STEPS)  # then λ stands still and needs no data of its own
  learning = [row['step'] for row in trained if 'hold_out_loss' in row]
  assert learning == list(range(1, settled + 1))
  assert len({row['lambda'] for row in trained[settled:]}) == 1
  assert [row['step'] for row in by_split('val')] == [2, 4, 6]
  for row in by_split('val') + by_split('test'):
    assert math.isfinite(row['score'])
    assert {'male/balanced_accuracy', 'loss/smiling', 'alive_groups'} <= row.keys()
  assert [row['step'] for row in by_split('test')] == [STEPS]
  (last,) = by_split('test')
  assert last['stand_in']
  assert last['backbone_flops_compact'] == last['backbone_flops'] > 0  # none is dead
  timed = writer.read(finished[0] / 'metrics.jsonl')
  assert all(row['step_time'] > 0 for row in timed if row['split'] == 'train')


def test_latest_two_checkpoints_and_the_best_are_kept(finished):
  workdir = finished[0]
  scores = {row['step']: row['score'] for row in rows(workdir) if row['split'] == 'val'}
  kept = {int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()}
  settled = {step: score for step, score in scores.items() if step > 0.6 * STEPS}
  assert kept == {4, 6, max(settled, key=settled.get)}


def test_a_run_whose_newest_checkpoint_is_damaged(finished, faces, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  newest = workdir / 'checkpoints' / str(STEPS)
  (newest / 'state' / 'manifest.ocdbt').write_bytes(b'')
  run(config(faces), workdir)
  assert f'checkpoint {newest} is damaged' in caplog.text
  same_run(finished[0], workdir)


@pytest.mark.parametrize('lost', ['scores', 'best'])
def test_the_end_of_a_run_does_not_hang_on_its_best_state(
  finished, faces, tmp_path, caplog, lost
):
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  if lost == 'scores':
    for path in (workdir / 'checkpoints').glob('*/metrics/metrics'):
      path.write_text('')
  else:
    best = workdir / 'checkpoints' / str(STEPS - EVALUATE_EVERY)
    kept = best / 'metrics' / 'metrics'
    kept.write_text(json.dumps({**json.loads(kept.read_text()), 'score': 1.0}))
    (best / 'state' / 'manifest.ocdbt').write_bytes(b'')
  run(config(faces), workdir)
  assert 'is damaged' in caplog.text
  assert 'None' not in caplog.text
  assert [row['step'] for row in rows(workdir) if row['split'] == 'test'] == [STEPS]


class Killed(BaseException):
  """Stands for a kill: no handler may make anything of it."""


@pytest.mark.parametrize(
  'after',
  [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_exactly(finished, faces, tmp_path, monkeypatch, after):
  """Killed before the first checkpoint, right after one, and between two."""
  real, calls = Monitor.check, []

  def check(self, step, metrics):
    starved = real(self, step, metrics)
    calls.append(step)
    if step == after + 1:
      raise Killed
    return starved

  with monkeypatch.context() as patch:
    patch.setattr(Monitor, 'check', check)
    with pytest.raises(Killed):
      run(config(faces), tmp_path)
  assert calls[-1] == after + 1
  run(config(faces), tmp_path)
  same_run(tmp_path, finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('objective', 'learn_on', 'part', 'logged'),
  [
    ('holdout', 'hold_out', 'tangent', {'hypergradient', 'hold_out_loss', 'epoch'}),
    ('tolerance', 'query', 'twin', {'gap/male', 'violation'}),
  ],
)
def test_other_states_on_two_devices_go_on_exactly(
  faces, tmp_path, monkeypatch, objective, learn_on, part, logged
):
  """The rest of what a state can hold, and a whole run on several devices."""
  c = config(
    faces,
    **{
      'meta.inner_steps': 0,
      'data.hold_out': 0.2 if learn_on == 'hold_out' else 0.0,
      'sparsity.objective': objective,
      'sparsity.learn_on': learn_on,
      'sparsity.hypergradient': 'online',
      'train.steps': 3,
    },
  )
  train.train(c, tmp_path / 'whole', devices=jax.devices()[:2])
  real = Monitor.check

  def check(self, step, metrics):
    starved = real(self, step, metrics)
    if step == 3:
      raise Killed
    return starved

  with monkeypatch.context() as patch:
    patch.setattr(Monitor, 'check', check)
    with pytest.raises(Killed):
      train.train(c, tmp_path / 'killed', devices=jax.devices()[:2])
  train.train(c, tmp_path / 'killed', devices=jax.devices()[:2])
  same_run(tmp_path / 'killed', tmp_path / 'whole')
  _, state = final_params(tmp_path / 'whole')
  assert any(np.any(z) for z in jax.tree.leaves(state[part]))
  row = next(row for row in rows(tmp_path / 'whole') if row['split'] == 'train')
  assert logged <= row.keys()


@pytest.mark.slow
def test_a_run_killed_while_saving_goes_on_exactly(
  finished, faces, tmp_path, monkeypatch
):
  def save(self, step, *args):
    if step == 4:
      raise Killed
    real(self, step, *args)

  real = Checkpoints.save
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, 'save', save)
    with pytest.raises(Killed):
      run(config(faces), tmp_path)
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"split": "tra')  # half a line
  run(config(faces), tmp_path)
  same_run(tmp_path, finished[0])


@pytest.mark.slow
def test_a_run_asked_to_stop_saves_and_goes_on_exactly(
  finished, faces, tmp_path, monkeypatch
):
  """SIGTERM in the middle of step 3, which is no step of evaluation."""
  real = running.Feed.next
  calls = []

  def with_signal(self, **options):
    calls.append(None)
    if len(calls) == 4:  # the first one is for the initial state
      signal.raise_signal(signal.SIGTERM)
    return real(self, **options)

  with monkeypatch.context() as patch:
    patch.setattr(running.Feed, 'next', with_signal)
    with pytest.raises(SystemExit) as caught:
      run(config(faces), tmp_path)
  assert caught.value.code == 128 + signal.SIGTERM
  assert (tmp_path / 'checkpoints' / '3').is_dir()
  # What is made of it has the statistics of its weights, not the running averages.
  one, made, step = trained._trained(config(faces), tmp_path, jax.devices()[:1])
  assert step == 3
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    kept, _ = checkpoints.restore(3, one.initial_state(abstract=True))
  equal = lambda a, b: jax.tree.all(jax.tree.map(np.array_equal, a, b))
  assert not equal(kept.batch_stats, made.batch_stats)
  assert equal(one.estimator()(kept).batch_stats, made.batch_stats)
  run(config(faces), tmp_path)
  same_run(tmp_path, finished[0])


def test_a_finished_run_only_writes_its_report_again(finished, faces):
  workdir, report = finished
  before, content = rows(workdir), (workdir / 'groups.json').read_bytes()
  report.unlink()
  assert run(config(faces), workdir) == report
  assert report.exists()
  assert rows(workdir) == before
  assert (workdir / 'groups.json').read_bytes() == content


def test_evaluation_gives_the_numbers_of_the_run(finished, faces):
  workdir = finished[0]
  result = trained.evaluate_run(config(faces), workdir, jax.devices()[:1])
  (tested,) = [row for row in rows(workdir) if row['split'] == 'test']
  assert result['test'].items() <= tested.items()
  *_, validated = [row for row in rows(workdir) if row['split'] == 'val']
  assert result['val'].items() <= validated.items()
  assert json.loads((workdir / 'evaluation.json').read_text()) == result


def scored(monkeypatch, scores, evaluate=running.evaluate):
  scores = iter(scores)
  monkeypatch.setattr(
    running, 'evaluate', lambda *args: evaluate(*args) | {'score': next(scores)}
  )


@pytest.mark.parametrize(
  ('objective', 'settle'),
  [
    ('budget', 0.5),
    pytest.param('budget', 0.0, marks=pytest.mark.slow),  # as its aim rises until there
    pytest.param('tolerance', 0.5, marks=pytest.mark.slow),
  ],
)
def test_a_run_settles_before_it_stops(
  faces, tmp_path, monkeypatch, caplog, objective, settle
):
  scored(monkeypatch, [0.9, 0.8, 0.7, 0.2, 0.1, 0.1, 0.1, 0.1])
  overrides = {
    'sparsity.objective': objective,
    'sparsity.settle': settle,
    'sparsity.rise': 0.5,
    'train.steps': 12,
    'train.patience': 2,
    'meta.inner_steps': 0,
  }
  with caplog.at_level(logging.INFO, logger='msp'):
    run(config(faces, **overrides), tmp_path)
  validated = [row['step'] for row in rows(tmp_path) if row['split'] == 'val']
  assert validated == [2, 4, 6, 8, 10, 12]
  splits = {row['split']: row for row in rows(tmp_path)}
  assert splits['test_best']['step'] == 8  # the best of those after step 6
  if objective == 'budget':  # of groups
    assert splits['test']['removed'] == pytest.approx(splits['test']['group_sparsity'])
  (told,) = (r for r in caplog.records if f'{objective}: ' in r.getMessage())
  not_kept = told.getMessage().startswith('constraint not kept. ')
  assert not_kept == (told.levelno == logging.WARNING)
  assert not_kept or objective == 'tolerance'  # in twelve steps nothing has died


def test_early_stopping_stops_and_stays_stopped(faces, tmp_path, monkeypatch):
  scored(monkeypatch, [0.5, 0.6, 0.6, 0.1, 0.9, 0.9, 0.9])
  overrides = {'train.steps': 12, 'train.patience': 2, 'sparsity.settle': 0.0}
  c = config(faces, **overrides)
  run(c, tmp_path)
  # best at step 4, two evaluations without a better one: 6 and 8
  validated = [row['step'] for row in rows(tmp_path) if row['split'] == 'val']
  assert validated == [2, 4, 6, 8]
  before = [row for row in rows(tmp_path) if row['split'] in ('train', 'val')]
  scored(monkeypatch, [0.9] * 9)
  run(c, tmp_path)
  after = [row for row in rows(tmp_path) if row['split'] in ('train', 'val')]
  assert after == before
  splits = {row['split']: row['step'] for row in rows(tmp_path)}
  assert splits['test'] == 8
  assert splits['test_best'] == 4


PROCESS = """
import logging, os, signal, sys
import jax
from pathlib import Path
number, address, workdir, faces, kill = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
from msp import run as running
from msp import train
from tests import test_train
c = test_train.config(Path(faces))
put = running.put
def stop_one(batch, sharding):  # before the first step; the other one hears of it
  if kill == number:
    os.kill(os.getpid(), signal.SIGTERM)
  running.put = put
  return put(batch, sharding)
if kill != 'none':
  def build(*arguments, real=train._loop):
    running.put = stop_one
    return real(*arguments)
  train._loop = build
train.train(c, Path(workdir))
"""


@pytest.mark.slow
def test_two_processes_make_one_run(finished, faces, tmp_path):
  """One of them is asked to stop, both do; started again they finish the run."""

  def start(kill):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      address = f'localhost:{s.getsockname()[1]}'
    environment = {
      **os.environ,
      'XLA_FLAGS': '',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'compiled'),
    }
    workdir = str(tmp_path / 'run')
    running = [
      subprocess.Popen(
        [sys.executable, '-c', PROCESS, str(i), address, workdir, str(faces), kill],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
      )
      for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in running]
    return [process.returncode for process in running], errors

  codes, errors = start('1')
  assert codes == [128 + signal.SIGTERM] * 2, errors
  with Checkpoints(tmp_path / 'run') as checkpoints:
    assert checkpoints.latest_step() == 1
  codes, errors = start('none')
  assert codes == [0, 0], errors
  steps = [row['step'] for row in rows(tmp_path / 'run') if row['split'] == 'train']
  assert steps == list(range(1, STEPS + 1))
  assert (tmp_path / 'run' / 'report' / 'index.html').exists()
  # Each of them had its half of the images.
  for row, alone in zip(rows(tmp_path / 'run'), rows(finished[0]), strict=True):
    assert (row['split'], row['step']) == (alone['split'], alone['step'])
    for name in {'loss', 'loss/male', 'male/auroc', 'hold_out_loss'} & alone.keys():
      if alone[name] is None:  # of a task that no episode held
        assert row[name] is None
      else:
        assert row[name] == pytest.approx(alone[name], rel=1e-3), (name, row)


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run_and_is_named(faces, tmp_path, monkeypatch):
  real = build

  def poisoned(*arguments, **options):
    experiment = real(*arguments, **options)

    def step(state, batches, key):
      params = state.params
      kernel = params['backbone']['layer2_0']['conv1']
      bad = kernel['kernel'] * jax.numpy.where(state.step >= 2, np.nan, 1.0)
      backbone = params['backbone']
      backbone = {
        **backbone,
        'layer2_0': {**backbone['layer2_0'], 'conv1': {'kernel': bad}},
      }
      return experiment.train_step(
        state._replace(params={**params, 'backbone': backbone}), batches, key
      )

    return experiment._replace(train_step=step)

  monkeypatch.setattr(running, 'build', poisoned)
  with pytest.raises(FloatingPointError) as caught:
    run(config(faces), tmp_path)
  assert str(caught.value).startswith('step 3: the gradient of backbone/')
  assert 'not finite' in str(caught.value)
  assert [row['step'] for row in rows(tmp_path) if row['split'] == 'train'] == [1, 2]
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 2  # the poisoned state was not saved


@pytest.mark.slow
@pytest.mark.parametrize('hypergradient', ['forward', 'online'])
def test_a_coefficient_that_starves_the_network_is_lowered(
  faces, tmp_path, monkeypatch, caplog, hypergradient
):
  """Under `holdout`, where nothing else notices; a kill changes nothing."""
  c = config(faces, **{'sparsity.start': 1.0, 'sparsity.settle': 0.0})
  c.sparsity.rise = 0.0  # or it would be lowered before
  c.optimizer[0].learning_rate = 0.1  # what λ_max does in many smaller steps
  c.sparsity.hypergradient = hypergradient
  build_experiment = build

  def watched(*arguments, **options):
    experiment = build_experiment(*arguments, **options)

    def step(state, batches, key):
      new, metrics = experiment.train_step(state, batches, key)
      if state.tangent is not None:
        metrics['tangent'] = optax.tree.norm(state.tangent)
      return new, metrics

    return experiment._replace(train_step=step)

  monkeypatch.setattr(running, 'build', watched)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  with caplog.at_level(logging.INFO, logger='msp'):
    run(c, whole)
  trained = [row for row in rows(whole) if row['split'] == 'train']
  starts = [row['lambda_relative'] for row in trained]
  falls = [b / a for a, b in itertools.pairwise(starts)]
  lowered = sum('starves the network' in r.getMessage() for r in caplog.records)
  assert lowered
  assert sum(0.2 < fall < 0.3 for fall in falls) == lowered
  if hypergradient == 'online':  # that of the network that is left does not go on
    after = [row for row, fall in zip(trained[1:], falls, strict=True) if fall < 0.3]
    assert all(row['tangent'] == 0 for row in after)
    assert trained[1]['tangent'] > 0
  assert trained[-1]['group_sparsity'] < 0.5
  # It goes on from a network that was not starved.
  assert (
    max(row['group_sparsity'] for row in rows(whole) if row['split'] == 'val') < 0.5
  )
  real = Monitor.check

  def check(self, step, metrics):
    if step == 5:
      raise Killed
    return real(self, step, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(Monitor, 'check', check)
    with pytest.raises(Killed):
      run(c, killed)
  run(c, killed)
  same_run(killed, whole)


@pytest.mark.slow
def test_a_layer_at_its_floor_is_warned_of_once(faces, tmp_path, caplog, monkeypatch):
  c = config(
    faces,
    **{
      'sparsity.coefficient': 'fixed',
      'sparsity.value': 1e3,
      'meta.inner_steps': 0,
      'train.steps': 2,
    },
  )
  with caplog.at_level(logging.WARNING, logger='msp'):
    run(c, tmp_path)
  messages = [record.getMessage() for record in caplog.records]
  about = [m for m in messages if 'layer1_0/conv1 ' in m]
  assert len(about) == 1
  assert 'is at its survival floor (1 alive)' in about[0]
  last = rows(tmp_path)[-1]
  assert last['group_sparsity'] > 0.5
  assert last['alive_groups']['layer1_0/conv1'] == 1

  # Of a result that is not the same network nothing is kept.
  with monkeypatch.context() as patch:
    patch.setattr(compact, 'difference', lambda *_: math.nan)
    with pytest.raises(UserError, match='outputs differ by nan'):
      trained.compact_run(c, tmp_path, jax.devices()[:1])
  assert not (tmp_path / 'compact').exists()
  # What has died is removed, and nothing else changes.
  assert last['backbone_flops_compact'] < 0.5 * last['backbone_flops']
  page = trained.compact_run(c, tmp_path, jax.devices()[:1])
  assert page == tmp_path / 'compact' / 'compact.md'
  assert '| layer1_0/conv1 | 8 → 1 |' in page.read_text()
  content = json.loads((tmp_path / 'compact' / 'compact.json').read_text())
  assert content['step'] == 2
  assert content['difference'] < 1e-5
  for name, end in (('dense', ''), ('compact', '_compact')):
    flops = content['costs']['1'][name]['backbone_flops']
    assert flops == last[f'backbone_flops{end}']
  for pair in content['costs'].values():
    assert pair['compact']['parameters'] < pair['dense']['parameters']
    assert pair['compact']['backbone_flops'] < 0.5 * pair['dense']['backbone_flops']
    for cost in pair.values():
      assert cost['backbone_flops'] < cost['kernel_flops']
      # XLA leaves the padding out and counts norms; at this size both are large.
      assert 0.3 < cost['flops'] / cost['kernel_flops'] < 1.5
  experiment = build(c, data.labels(c.data.name))
  small = compact.read(tmp_path / 'compact', experiment.model)
  assert compact.compact(*small).model.backbone.shape == small.model.backbone.shape

  # The exported file needs nothing of this project.
  stale = tmp_path / 'export' / 'model.onnx'
  stale.parent.mkdir()
  stale.write_text('of an earlier state')
  file = trained.export_run(c, tmp_path, jax.devices()[:1])
  assert not stale.exists() or b'earlier' not in stale.read_bytes()
  alone = jax.export.deserialize(bytearray(file.read_bytes()))
  assert set(alone.platforms) == {'cpu', 'cuda', 'tpu'}
  for count in (1, 3):
    found = alone.call(np.zeros((count, 16, 16, 3), np.float32))
    assert {name: x.shape for name, x in found.items()} == {
      'male': (count,),
      'smiling': (count,),
    }
  card = json.loads((file.parent / 'model_card.json').read_text())
  assert (
    card['sparsity']['parameters, exported'] < card['sparsity']['parameters, dense']
  )
  tested = trained.evaluate_run(c, tmp_path, jax.devices()[:1])['test']
  assert card['metrics of the test split'].items() <= tested.items()
  assert 'male/auroc' in card['metrics of the test split']
  assert 'procedural stand-in' in (file.parent / 'model_card.md').read_text()
  file.unlink()
  (file.parent / 'model_card.json').unlink()
  (file.parent / 'model_card.md').unlink()
  stale.unlink(missing_ok=True)
  file.parent.rmdir()
  file.parent.write_text('')
  with pytest.raises(UserError, match=r'cannot write to .*export'):
    trained.export_run(c, tmp_path, jax.devices()[:1])
  arrays = tmp_path / 'compact' / 'network.npz'
  arrays.write_bytes(arrays.read_bytes()[:1000])
  with pytest.raises(UserError, match='no compact network in'):
    compact.read(tmp_path / 'compact', experiment.model)


def test_two_processes_do_not_write_one_log(finished, faces, tmp_path):
  shutil.copytree(finished[0], tmp_path / 'run')
  log = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  told = pytest.raises(UserError, match='another process is training in')
  with workdir.exclusive(tmp_path / 'run'), told:
    run(config(faces), tmp_path / 'run')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == log


def test_a_seed_is_one_run(faces):
  def opened(seed):
    c = config(faces, seed=seed)
    one = running.open_run(c, jax.devices()[:1], None)
    state, batch = one.initial_state(), one.feed().next()['query']['image']
    return np.asarray(state.params['backbone']['stem_conv1']['kernel']), batch

  (kernel, images), again, other = opened(1), opened(1), opened(0)
  np.testing.assert_array_equal(kernel, again[0])
  np.testing.assert_array_equal(images, again[1])
  assert (kernel != other[0]).all()
  assert (images != other[1]).any()


def test_an_image_lacks_the_same_label_in_every_stream(faces):
  c = config(faces, **{'data.missing': 0.5})
  one = running.open_run(c, jax.devices()[:1], None)
  feed, lacking = one.feed(), {False: {}, True: {}}
  for settled in lacking:
    for _ in range(20):
      batches = feed.next(settled=settled)
      for batch in batches.values():
        for i, image in enumerate(np.asarray(batch['image'])):
          missing = tuple(t for t in c.tasks if batch[t][i] == losses.IGNORE)
          # Mirrored or not.
          key = min(image.tobytes(), image[:, ::-1].tobytes())
          lacking[settled].setdefault(key, missing)
          assert lacking[settled][key] == missing
  assert lacking[False] == lacking[True]
  assert len(set(lacking[True].values())) == 3  # none, one or the other


def test_a_batch_is_no_larger_than_the_data_set(faces, tmp_path):
  c = config(faces)
  stored = dataset.splits(c).train.stored
  c.train.batch_size = stored + 2
  with pytest.raises(
    UserError, match=f'is {stored + 2}, more than the {stored} images'
  ):
    run(c, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  c.train.batch_size = stored
  c.data.train_share = 0.1  # the scarce settings of the sweeps
  running.open_run(c, jax.devices()[:1], None)


@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'meta.inner_steps': 0, 'sparsity.objective': 'tolerance'},
    {'meta.inner_steps': 0, 'sparsity.objective': 'budget'},
    {'meta.inner_steps': 0, 'sparsity.hypergradient': 'online'},
    {'sparsity.coefficient': 'fixed', 'sparsity.value': 0.1, 'data.hold_out': 0.0},
  ],
)
def test_a_step_is_compiled_once(faces, overrides):
  """Its output is of the types of its input, down to what is weakly typed."""
  one = running.open_run(config(faces, **overrides), jax.devices()[:1], None)
  key, batches = jax.random.key(0), one.feed().next()
  state = jax.eval_shape(one.experiment.init, key, batches['query'])
  after, _ = jax.eval_shape(one.experiment.train_step, state, batches, key)
  described = lambda x: (x.shape, x.dtype, x.weak_type)
  assert jax.tree.map(described, state) == jax.tree.map(described, after)


@pytest.mark.parametrize(
  ('steps', 'how', 'form'),
  [
    (0, 'full', 'mixed'),
    (3, 'full', 'mixed'),
    (4, 'full', 'matmul'),
    (1, 'all', 'mixed'),
    (2, 'all', 'matmul'),
    (0, 'drawn without inner steps', 'mixed'),
  ],
)
def test_few_inner_steps_are_a_straight_program_on_cpu(faces, steps, how, form):
  c = config(faces, **{'meta.inner_steps': steps, 'meta.episodes': how})
  c.meta.unroll = c.model.convolution_implementation = 'auto'
  c.sparsity.objective = 'budget'
  model = build(c, data.labels(c.data.name)).model
  assert model.backbone.implementation == form


def compiled(caplog):
  """The programs whose compilation `jax.log_compiles` has told of."""
  # Also of those that come from the persistent cache then.
  return re.findall(r'Compiling (\S+) with global', '\n'.join(caplog.messages))


def test_an_evaluation_after_a_step_compiles_nothing_more(faces, caplog):
  one = running.open_run(config(faces), jax.devices()[:1], None)
  step = jax.jit(one.experiment.train_step, out_shardings=one.replicated)
  state, with_statistics, evaluate = (
    one.initial_state(),
    one.estimator(),
    one.evaluator(),
  )
  evaluate(with_statistics(state), one.splits.val)
  state, _ = step(state, one.feed().next(), jax.random.key(0))
  with jax.log_compiles():
    evaluate(with_statistics(state), one.splits.val)
  assert not compiled(caplog)


def test_a_budget_is_checked_by_one_program(faces, caplog):
  c = config(faces, **{'sparsity.objective': 'budget'})
  with jax.log_compiles():
    build(c, data.labels(c.data.name))
  assert len(compiled(caplog)) == 1


def start_without(faces, prefix, **sparsity):
  """The first state of a run with a λ a layer, the arrays under `prefix` zero."""
  overrides = {'granularity': 'layer', **sparsity}
  c = config(faces, **{f'sparsity.{name}': value for name, value in overrides.items()})
  experiment = build(c, data.labels(c.data.name))
  batch = {'image': jnp.ones((2, 16, 16, 3)), 'valid': jnp.ones(2, bool)}
  batch |= {task: jnp.zeros(2, jnp.int32) for task in c.tasks}
  shapes = jax.eval_shape(experiment.init, jax.random.key(0), batch).params
  zeros = {
    path: np.zeros(leaf.shape, np.float32)
    for path, leaf in gr.by_path(shapes).items()
    if path.startswith(prefix)
  }
  return jax.jit(experiment.init)(jax.random.key(0), batch, (zeros, {}))


def test_a_fixed_coefficient_of_layers_without_a_gradient(faces):
  """Heads of zeros let no gradient through to the backbone."""
  state = start_without(faces, 'heads/', coefficient='fixed', value=1e-3)
  np.testing.assert_allclose(jnp.exp(state.rho) * state.lambda_max, 1e-3, rtol=1e-6)


def test_a_learned_coefficient_of_a_layer_without_a_gradient(faces):
  """Behind a dead convolution nothing reaches the one before; λ must be able to."""
  state = start_without(faces, 'backbone/layer1_0/conv2/kernel', start=0.1)
  assert (state.lambda_max > 0).all()
  assert (state.lambda_max == state.lambda_max.max()).sum() == 2
  np.testing.assert_allclose(jnp.exp(state.rho), 0.1, rtol=1e-6)


def test_rendered_pictures_by_their_path_are_a_stand_in_too(faces, tmp_path):
  rendered, _ = dataset.folders(config(faces))
  place = {'data.source': str(rendered), 'data.prepared': str(tmp_path / 'prepared')}
  c = config(faces, **place, **{'data.procedural_images': 0})
  assert running.open_run(c, jax.devices()[:1], None).splits.train.stand_in


def test_a_dense_run_has_nothing_to_remove(finished, faces):
  workdir, _ = finished
  before = sorted(path.name for path in workdir.iterdir())
  assert trained.compact_run(config(faces), workdir, jax.devices()[:1]) is None
  assert sorted(path.name for path in workdir.iterdir()) == before


def test_statistics_are_those_of_the_weights(faces):
  """Of one batch: evaluated on it the network does what it does in training."""
  c = config(faces, **{'train.statistics_batches': 1, 'model.dropout': 0.0})
  one = running.open_run(c, jax.devices()[:1], None)
  state = one.initial_state()
  model = one.experiment.model
  got = one.estimator()(state)
  stream = one._stream(one.splits.train, (), batch_size=8, seed=c.seed + 2)
  image = next(stream)['image']
  outputs = [
    multitask.apply(model, state.params, stats, image, train=train)[0]
    for stats, train in ((got.batch_stats, False), (state.batch_stats, True))
  ]
  for name, wanted in outputs[1].items():
    # Up to their variances being those of a sample, n/(n − 1), of n = 32 in the end.
    assert np.abs(outputs[0][name] - wanted).mean() < 0.1 * np.ptp(wanted)
  # Whatever the running averages have been.
  other = jax.tree.map(lambda x: x + 1.0, state.batch_stats)
  same = one.estimator()(state._replace(batch_stats=other))
  jax.tree.map(np.testing.assert_array_equal, same.batch_stats, got.batch_stats)
  c.train.statistics_batches = 0
  kept = running.open_run(c, jax.devices()[:1], None).estimator()(state)
  assert kept is state


def test_statistics_are_means_over_batches(faces):
  c = config(faces, **{'train.statistics_batches': 3, 'model.dropout': 0.0})
  one = running.open_run(c, jax.devices()[:1], None)
  state, size = one.initial_state(), c.train.batch_size
  got = one.estimator()(state).batch_stats
  stream = one._stream(one.splits.train, (), batch_size=size, seed=c.seed + 2)
  own = jax.jit(evaluation.make_statistics_step(one.experiment.model))
  images = [batch['image'] for batch in itertools.islice(stream, 3)]
  key = jax.random.key(0)  # of dropout, of which there is none
  start = jax.tree.map(jnp.zeros_like, state.batch_stats)
  near = own(state.params, start, images[0], key)
  parts = [own(state.params, near, image, key) for image in images]
  jax.tree.map(
    lambda x, *each: np.testing.assert_allclose(
      x, np.mean(each, axis=0), rtol=1e-4, atol=1e-6
    ),
    got,
    *parts,
  )


def test_each_process_reads_its_own_images(faces, monkeypatch):
  one = running.open_run(config(faces), jax.devices()[:1], None)
  state = one.initial_state()
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  asked = []

  def asks(*_, **options):
    asked.append((options['process_index'], options['process_count']))
    return iter(())

  monkeypatch.setattr(running.data, 'train_iterator', asks)
  monkeypatch.setattr(running.data, 'eval_batches', asks)
  monkeypatch.setattr(running, 'evaluate', lambda *_: {})
  assert len(one.feed().streams) == len(asked) == 3
  one.evaluator()(state, one.splits.val)
  assert asked == [(1, 2)] * 4


def test_an_evaluation_of_the_first_images(faces):
  one = running.open_run(config(faces), jax.devices()[:1], None)
  state = one.initial_state()
  val = one.splits.val
  assert len(val) > 3
  few = one.evaluator()(state, val)
  one.config.data.eval_examples = 3
  got = one.evaluator()(state, val)
  assert got['loss'] != few['loss']
  first = copy.copy(val)
  first.indices = val.indices[:3]
  one.config.data.eval_examples = 0
  want = one.evaluator()(state, first)
  assert got == want


@pytest.mark.parametrize('learn_on', ['hold_out', 'query'])
@pytest.mark.parametrize('inner_steps', [0, 1])
def test_a_tolerance_knows_how_many_images_it_is_measured_on(
  faces, learn_on, inner_steps
):
  c = config(faces, **{'sparsity.objective': 'tolerance'})
  c.sparsity.learn_on, c.meta.inner_steps = learn_on, inner_steps
  one = running.open_run(c, jax.devices()[:1], None)
  batches = one.feed().next()
  assert ('hold_out' in batches) == (learn_on == 'hold_out')
  part = one.splits.hold_out if learn_on == 'hold_out' else one.splits.train
  count = len(batches[learn_on]['image'])
  assert count == len(batches['query']['image']) == 8 // (1 + inner_steps)
  assert one.experiment.objective.hold_out_batches == max(len(part) / count, 1)


def test_the_step_is_that_of_the_configuration(faces, monkeypatch):
  """Every field, at a value that it does not have by itself."""
  made = []
  monkeypatch.setattr(
    experiment_module, 'make_train_step', lambda *_, **fields: made.append(fields)
  )
  c = config(
    faces,
    **{
      'meta.inner_steps': 3,
      'meta.episodes': 'all',
      'meta.exact': True,
      'meta.unroll': 'no',
      'loss.combination': 'fixed',
      'loss.weights': (2.0, 3.0),
      'sparsity.hypergradient': 'truncated',
      'sparsity.truncation': 2,
      'sparsity.learn_on': 'query',
      'sparsity.solver.name': 'neumann',
      'sparsity.solver.tolerance': 0.02,
      'sparsity.solver.max_iterations': 7,
      'sparsity.tangent_decay': 0.9,
      'sparsity.tangent_max_norm': 2.5,
      'sparsity.settle': 0.25,
      'sparsity.rise': 0.9,
      'train.steps': 40,
    },
  )
  c.meta.optimizer = [
    ConfigDict({'name': 'adam', 'learning_rate': 0.1, 'eps_root': 1e-16})
  ]
  model = build(c, data.labels(c.data.name)).model
  learning, settled = made
  assert learning.pop('rho_optimizer') is not None
  assert 'rho_optimizer' not in settled
  inner = learning['inner']
  params, _ = jax.eval_shape(
    lambda key: multitask.init(model, key, (16, 16, 3)), jax.random.key(0)
  )
  # The inner prox is in the metric of the inner optimiser.
  state = jax.eval_shape(inner.optimizer.init, params)
  assert isinstance(state, AdaptiveProximalState)
  assert inner._replace(optimizer=None) == Inner(
    None, steps=3, episodes='all', exact=True, unroll=False, truncation=2
  )
  assert learning['hypergradient'] == Hypergradient(
    mode='truncated',
    learn_on='query',
    solver=Solver('neumann', 0.02, 7),
    decay=0.9,
    max_norm=2.5,
  )
  assert learning['combination'] == ('fixed', {'male': 2.0, 'smiling': 3.0})
  assert learning['settled'] == 30
  # No longer than until dead groups stay dead.
  assert learning['objective'] == Objective('holdout', rise=30)
  for name in ('inner', 'hypergradient', 'combination', 'settled', 'objective'):
    assert settled[name] == learning[name]  # θ⁰'s gradient stays what it was

  c.sparsity.objective, c.sparsity.tolerance, c.sparsity.search = 'tolerance', 0.3, 0.5
  build(c, data.labels(c.data.name), hold_out_images=12)
  objective = made[2]['objective']
  assert objective == Objective(
    'tolerance', tolerance=0.3, search=20, hold_out_batches=12 / 4
  )
  # λ follows the constraint alone, and nothing else is truncated.
  assert made[2]['inner'].truncation is None

  c.sparsity.objective, c.sparsity.measure, c.sparsity.target = 'budget', 'flops', 0.4
  experiment = build(c, data.labels(c.data.name))
  objective = made[4]['objective']
  assert (objective.kind, objective.measure, objective.target) == (
    'budget',
    'flops',
    0.4,
  )
  assert objective.positions.keys() > set(experiment.groups.layers)


def test_support_and_query_do_not_depend_on_the_processes(monkeypatch):
  monkeypatch.setattr(running, 'put', lambda parts, sharding: parts)
  images = np.arange(8)
  parts = lambda local: running.Feed(
    {'train': iter([{'image': local}])}, 1, None
  ).next()
  whole, first, second = map(parts, (images, images[:4], images[4:]))
  for name in ('support', 'query'):
    both = np.concatenate([first[name]['image'], second[name]['image']])
    np.testing.assert_array_equal(both, whole[name]['image'])
  assert sorted([*whole['support']['image'], *whole['query']['image']]) == list(images)


@pytest.mark.parametrize('mode', ['evaluate_run', 'compact_run', 'export_run'])
def test_unreadable_files_are_left_out_in_every_mode(mode, tmp_path, monkeypatch):
  class Opened(Exception):  # noqa: N818
    """What the run is opened with."""

  def open_run(*_, **options):
    raise Opened(options['skip_corrupt'])

  monkeypatch.setattr(trained, 'open_run', open_run)
  (tmp_path / 'checkpoints').mkdir()
  monkeypatch.setattr(trained.workdir_module, 'check', lambda *_: None)
  for skip in (False, True):
    with pytest.raises(Opened, match=str(skip)):
      getattr(trained, mode)(None, tmp_path, skip_corrupt=skip)


def test_a_settled_run_trains_on_the_images_of_the_coefficient_too(faces):
  one = running.open_run(config(faces), jax.devices()[:1], None)
  parts, feed = one.splits, one.feed()
  whole = sorted([*parts.train.indices, *parts.hold_out.indices])
  assert list(parts.with_hold_out(1.0, 0).indices) == whole
  few = set(parts.with_hold_out(0.5, 0).indices) - set(parts.train.indices)
  assert len(few) == len(parts.hold_out) // 2
  pictures = lambda source: {source[i]['image'].tobytes() for i in range(len(source))}
  seen = {}
  for settled in (False, True):
    seen[settled] = set()
    for _ in range(2 * len(whole) // 8):  # two epochs
      batch = feed.next(settled=settled)
      assert ('hold_out' in batch) != settled
      for part in ('support', 'query'):
        images = np.round(np.asarray(batch[part]['image']) * 255).astype(np.uint8)
        # Mirrored or not.
        seen[settled] |= {x.tobytes() for x in (*images, *images[:, :, ::-1])}
  apart = pictures(parts.hold_out)
  assert not apart & seen[False]
  assert apart <= seen[True]


def test_dead_groups_stay_dead_in_the_last_part_of_a_run(faces):
  fixed = {'sparsity.coefficient': 'fixed', 'sparsity.value': 1e-9}
  c = config(faces, **fixed, **{'meta.inner_steps': 0, 'train.steps': 10})
  one = running.open_run(c, jax.devices()[:1], None)
  groups, state = one.experiment.groups, one.initial_state()
  alive = gr.alive(groups, state.params)
  keep = {layer: np.arange(mask.size) % 2 == 0 for layer, mask in alive.items()}
  state = state._replace(params=gr.remove(groups, state.params, keep))
  step, batches = jax.jit(one.experiment.train_step), one.feed().next()
  for done, settled in ((5, False), (6, True)):
    at = state._replace(step=jnp.asarray(done, jnp.int32))
    new, _ = step(at, batches, jax.random.key(0))
    same = [
      np.array_equal(mask, keep[layer])
      for layer, mask in gr.alive(groups, new.params).items()
    ]
    assert all(same) if settled else not any(same)


@pytest.mark.slow
def test_a_process_killed_at_a_random_moment_goes_on_exactly(faces, tmp_path):
  """SIGKILL in a process of its own, in the middle of the loop."""
  root = Path(__file__).parents[1]
  (tmp_path / 'run.py').write_text(
    'import sys\n'
    'from pathlib import Path\n'
    'import conftest, test_train\n'
    'c = test_train.config(Path(sys.argv[1]), **{"train.steps": 60})\n'
    'test_train.run(c, Path(sys.argv[2]))\n'
  )
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join((str(root), str(root / 'tests'))),
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }
  command = [sys.executable, tmp_path / 'run.py', faces]
  one, other = tmp_path / 'one', tmp_path / 'other'
  subprocess.run([*command, one], env=environment, check=True, capture_output=True)
  with subprocess.Popen(
    [*command, other], env=environment, stderr=subprocess.DEVNULL
  ) as process:
    log = other / 'metrics.jsonl'
    while process.poll() is None:
      if log.exists() and log.read_bytes().count(b'\n') > 20:
        process.kill()
        break
      time.sleep(0.01)
  assert process.returncode == -signal.SIGKILL
  subprocess.run([*command, other], env=environment, check=True, capture_output=True)
  same_run(one, other)


def test_a_batch_is_drawn_to_look_at(faces, monkeypatch):
  c = config(faces, **{'tasks': ('segmentation', 'male', 'smiling')})
  panels, draw = [], figures.predictions
  monkeypatch.setattr(
    figures,
    'predictions',
    lambda image, tasks: panels.extend(tasks) or draw(image, tasks),
  )
  path = dataset.contact_sheet(c)
  assert [panel.name for panel in panels] == list(c.tasks)
  assert panels[0].label.shape == (figures.PICTURES, 16, 16)
  assert path == dataset.folders(c)[1] / 'celebamask_hq_16x16.png'
  with Image.open(path) as picture:
    colours = len(np.unique(np.asarray(picture.convert('RGB')).reshape(-1, 3), axis=0))
  assert colours > 200  # not an empty sheet
  dataset.prepare(c)  # and it is not in the way of the data set


@pytest.mark.slow
def test_adapting_to_an_unseen_task_with_a_frozen_pattern(faces, tmp_path):
  c = config(faces, **{'meta.inner_steps': 0, 'train.steps': 2, 'data.hold_out': 0.0})
  c.sparsity.coefficient = 'none'
  c.data.missing = 0.25
  model = build(c, data.labels(c.data.name)).model
  params, stats = jax.device_get(multitask.init(model, jax.random.key(0), (16, 16, 3)))
  kernel = np.array(params['backbone']['layer2_0']['conv1']['kernel'])
  kernel[..., ::2, :] = 0
  params['backbone']['layer2_0']['conv1']['kernel'] = kernel
  compact.write(tmp_path / 'start', compact.Compact(model, params, stats))
  c.initial = str(tmp_path / 'start')
  with pytest.raises(UserError, match='has the tasks male, smiling already'):
    train.adapt(c, tmp_path / 'none')
  assert not (tmp_path / 'none').exists()
  c.tasks = ('male', 'smiling', 'eyeglasses')
  for coefficient, alive in (
    ('frozen', kernel.shape[2] // 2),
    ('none', kernel.shape[2]),
  ):
    c.sparsity.coefficient = coefficient
    folder = tmp_path / coefficient
    train.adapt(c, folder, devices=jax.devices()[:1])
    # It goes on without what it began from.
    (tmp_path / 'start').rename(tmp_path / 'gone')
    train.adapt(c, folder, devices=jax.devices()[:1])
    (tmp_path / 'gone').rename(tmp_path / 'start')
    last = rows(folder)[-1]
    assert last['alive_groups']['layer2_0/conv1'] == alive
    assert 'eyeglasses/accuracy' in last
    told = json.loads((folder / 'initial.json').read_text())
    assert told['taken over']['backbone/layer2_0/conv1/kernel'] == [*kernel.shape]
    assert told['fresh']
    assert all('eyeglasses' in path or 'log_vars' in path for path in told['fresh'])
    assert told['of no use'] == []
  # A budget rises from what is gone, or the dead groups would come back first.
  c.sparsity.coefficient, c.sparsity.objective = 'learned', 'budget'
  state = running.open_run(c, jax.devices()[:1], None).initial_state()
  gone = kernel.shape[2] // 2
  total = sum(gr.totals(gr.find(params), params).values())
  np.testing.assert_allclose(state.removed_at_start, gone / total, rtol=1e-6)
  # A run is as good a start as what was made of one, and has its tasks.
  c.initial = str(tmp_path / 'frozen')
  with pytest.raises(UserError, match='has the tasks male, smiling, eyeglasses'):
    train.adapt(c, tmp_path / 'another')


@pytest.mark.slow
def test_training_goes_on_from_a_compact_network_and_from_that_run(faces, tmp_path):
  c = config(faces, **{'meta.inner_steps': 0, 'train.steps': 1})
  c.sparsity.coefficient = 'none'
  model = build(c, data.labels(c.data.name)).model
  params, stats = multitask.init(model, jax.random.key(0), (16, 16, 3))
  kernel = np.array(params['backbone']['layer2_0']['conv1']['kernel'])
  kernel[..., ::2, :] = 0  # a sum's channels, which the shortcut still reads
  params = jax.device_get(params)
  params['backbone']['layer2_0']['conv1']['kernel'] = kernel
  small = compact.compact(model, params, stats)
  compact.write(tmp_path / 'compact', small)
  gathers = dict(small.model.backbone.shape.gathers)
  assert list(gathers) == ['layer2_0/conv1']
  for source in ('compact', 'second'):
    c.initial = str(tmp_path / source)
    # What a run that goes on is just writing there.
    unfinished = tmp_path / source / 'checkpoints' / '2.orbax-checkpoint-tmp'
    if source == 'second':
      unfinished.mkdir()
    begun = build(c, data.labels(c.data.name))
    assert unfinished.exists() == (source == 'second')
    feed = running.Run(
      c,
      begun,
      data.open(c.data.name, dataset.folders(c)[1], (16, 16), 0.0),
      jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,)),
    )
    state = feed.initial_state()
    if source == 'compact':
      wanted = small
    else:
      with Checkpoints(tmp_path / 'second', read_only=True) as checkpoints:
        wanted = TrainState(**checkpoints.restore_any(1))
    for part in ('backbone', 'heads'):
      jax.tree.map(
        np.testing.assert_array_equal,
        (state.params[part], state.batch_stats[part]),
        (wanted.params[part], wanted.batch_stats[part]),
      )
    folder = tmp_path / ('second' if source == 'compact' else 'third')
    # Two devices: what they save is read on any number.
    train.train(c, folder, devices=jax.devices()[:2])
    alive = rows(folder)[-1]['alive_groups']
    assert alive['layer2_0/conv1'] == len(gathers['layer2_0/conv1'])
    assert alive['layer2_0/shortcut_conv'] == kernel.shape[-2]
  # What they began from is not needed any more.
  shutil.rmtree(tmp_path / 'compact')
  c.initial = str(tmp_path / 'compact')
  trained.evaluate_run(c, tmp_path / 'second', jax.devices()[:1])
  with pytest.raises(UserError, match='there is no such file or folder'):
    build(c, data.labels(c.data.name))


@pytest.mark.slow
def test_a_run_of_all_dense_tasks_in_half_precision(tmp_path):
  tasks = ('segmentation', 'depth', 'normals', 'edges')
  c = config(
    tmp_path,
    common.nyud,
    **{
      'tasks': tasks,
      'data.image_size': (24, 32),
      'model.dtype': 'bfloat16',
      'meta.inner_steps': 0,
      'sparsity.objective': 'tolerance',
      'train.steps': 3,
    },
  )
  page = run(c, tmp_path / 'run')
  last = rows(tmp_path / 'run')[-1]
  assert last['split'] == 'test'
  for name in ('segmentation/miou', 'depth/rmse', 'normals/mean_angle', 'edges/f1'):
    assert math.isfinite(last[name])
  assert math.isfinite(last['score'])
  with np.load(tmp_path / 'run' / 'predictions.npz') as pictures:
    for task in tasks:
      assert pictures[f'prediction/{task}'].shape == pictures[f'label/{task}'].shape
  assert 'Depth: bright is near' in page.read_text()
