"""Sweeps: what is run, resumed and skipped, and the table, from invented logs."""

import argparse
import csv
import functools
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import data
from benchmarks import baselines, learned_lambda
from configs.sweeps import base
from data import DataError
from msp import experiment, figures, objectives, sweep, train, workdir
from msp.errors import UserError

FILES = ('less_is_more', 'meta_sparsity', 'missing_labels', 'transfer', 'unseen_tasks')
OPTIONS = (
  'nyu', 'celeba', 'camvid', 'nyu,procedural,tiny', 'celeba,procedural,tiny',
  'camvid,tiny',
)  # fmt: skip
SCORES = {  # (run, seed) -> test mIoU, and mIoU on val over time
  ('alone', 0): (0.50, (0.1, 0.3, 0.5)),
  ('alone', 1): (0.40, (0.1, 0.2, 0.4)),
  ('sparse', 0): (0.55, (0.2, 0.5, 0.6)),
  ('sparse', 1): (0.30, (0.1, 0.1, 0.3)),
  ('before', 0): (None, ()),
  ('elsewhere', 0): (0.9, (0.9, 0.9, 0.9)),
  ('rare', 0): (0.7, ()),
  ('adapted', 0): (0.7, ()),
}


def make(**changes):
  """Two runs and two seeds on rendered faces."""
  made = base.new('trial', '')
  made.seeds = (0, 1)
  config = lambda: base.DATA_SETS['celeba'].multitask.get_config('procedural,tiny')
  one = {'tasks': ('segmentation',), 'train.evaluate_every': 20}
  base.add(made, 'alone', config(), one)
  base.add(made, 'sparse', config(), one, base.fixed(0.1), start='alone')
  made.baselines.segmentation = 'alone'
  made.target.update(task='segmentation', run='alone')
  made.update_from_flattened_dict(changes)
  return made


def write_log(folder, name, seed):
  """What a finished run leaves, as far as a sweep reads it."""
  final, over_time = SCORES[name, seed]
  rows = [{'split': 'train', 'step': 5, 'loss': 1.0}]
  if name == 'sparse':
    rows[0]['lambda_relative'] = 0.25
  for i, value in enumerate(over_time, 1):
    row = {'split': 'val', 'step': 20 * i, 'loss': 1.0, 'segmentation/miou': value}
    rows.append(row)
  test = {'split': 'test', 'step': 60, 'loss': 1.0}
  if final is not None:
    test['segmentation/miou'] = final
  dead = 0.5 if name == 'sparse' else 0.0
  test |= {'group_sparsity': dead, 'weight_sparsity': dead / 2, 'alive_groups': {}}
  rows.append(
    test | {'backbone_flops': 800, 'backbone_flops_compact': 800 - 480 * dead}
  )
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'report').mkdir(exist_ok=True)
  (folder / 'predictions.npz').touch()
  (folder / 'report' / 'index.html').touch()  # what a run writes last
  (folder / 'metrics.jsonl').write_text(lines)
  layers = [{'name': 'layer1_0/conv1', 'alive': [1, 1, 0, name != 'sparse']}]
  (folder / 'groups.json').write_text(json.dumps({'layers': layers}))


@pytest.fixture
def trained(monkeypatch):
  """Training is replaced by writing a log; lists what was trained, may fail."""
  calls, failing = [], {}

  def pretend(config, folder, *, skip_corrupt, adapts=False):
    assert not skip_corrupt
    key = config.name.partition(': ')[2], config.seed
    assert adapts == (key[0] == 'adapted')
    calls.append((*key, config.initial))
    workdir.claim(folder, config)
    if key in failing:
      raise failing[key]
    write_log(folder, *key)

  monkeypatch.setattr(train, 'train', pretend)
  monkeypatch.setattr(train, 'adapt', functools.partial(pretend, adapts=True))
  return calls, failing


def cells(path):
  with path.open() as file:
    return {row['run']: row for row in csv.DictReader(file)}


def test_the_table(tmp_path, trained):
  page = sweep.run(make(), tmp_path)
  assert page == tmp_path / 'report' / 'index.html'
  text = (tmp_path / 'table.md').read_text()
  head, rule, alone, sparse = text.splitlines()[:4]
  assert head.startswith('| run | seeds | segmentation/miou ↑ | Δm % | dead groups % |')
  assert rule == '|---' * head.count(' |') + '|'
  assert alone.startswith(
    '| alone | 2 | 0.450 ± 0.071 | 0.00 ± 0.00 | 0.0 ± 0.0 | 0.0 ± 0.0 | 100.0 ± 0.0'
  )
  # +10 % and −25 % of the same seed's baseline.
  assert sparse.startswith(
    '| sparse | 2 | 0.425 ± 0.177 | -7.50 ± 24.75 | 50.0 ± 0.0 | 25.0 ± 0.0 | 70.0 ± '
  )
  # Seed 0 is at step 40 where its target ends at 60; seed 1 never is.
  assert sparse.endswith('| 0.250 ± 0.000 | 0.150 ± 0.071 | 40 (1 of 2) |')
  assert alone.endswith('| 0.100 ± 0.000 | 60 ± 0 |')
  row = cells(tmp_path / 'table.csv')['sparse']
  assert float(row['Δm % mean']) == pytest.approx(-7.5)
  assert float(row['segmentation/miou ↑ std']) == pytest.approx(0.25 / np.sqrt(2))
  # Every number of the test rows, once.
  assert float(row['backbone_flops_compact mean']) == 560
  assert row['loss n'] == '2'
  assert not {'step mean', 'alive_groups mean', 'segmentation/miou mean'} & row.keys()
  html = page.read_text()
  assert 'Not real data' in html
  names = {path.stem for path in page.parent.glob('*.png')}
  assert names == {
    'results', 'tradeoff', 'coefficient', 'progress_segmentation_miou', 'patterns'
  }  # fmt: skip


def test_an_error_that_falls_is_better(tmp_path, trained, monkeypatch):
  """A metric that should be small: its sign in Δm and in the steps to a target."""
  falling = {
    ('alone', 0): (0.8, (1.0, 0.9, 0.8)),
    ('sparse', 0): (0.6, (0.9, 0.7, 0.6)),
  }
  write = write_log

  def as_depth(folder, name, seed):
    monkeypatch.setitem(SCORES, (name, seed), falling[name, seed])
    write(folder, name, seed)
    log = folder / 'metrics.jsonl'
    log.write_text(log.read_text().replace('segmentation/miou', 'depth/rmse'))

  monkeypatch.setitem(globals(), 'write_log', as_depth)
  made = base.new('trial', '')
  config = lambda: base.DATA_SETS['nyu'].multitask.get_config('procedural,tiny')
  for name in ('alone', 'sparse'):
    base.add(made, name, config(), {'tasks': ('depth',)})
  made.update(seeds=(0,), baselines={'depth': 'alone'})
  made.target.update(task='depth', run='alone')
  sweep.run(made, tmp_path)
  row = cells(tmp_path / 'table.csv')['sparse']
  assert float(row['Δm % mean']) == pytest.approx(25)
  assert float(row['depth/rmse ↓ mean']) == 0.6
  assert float(row['steps to alone mean']) == 40  # at 0.7, below 0.8


def test_fixed_coefficients_of_one_setting_are_one_line():
  rows = 'dense,fixed 0.15,fixed 0.005,fixed 0.0005,budget 0.5'
  made = learned_lambda.make('faces', rows, 1)
  config = made.runs[0].config.copy_and_resolve_references()
  base.add(made, 'single', config, base.fixed(0.1), {'tasks': ('male',)})
  (label, names), *others = sweep._grids(made, [e.name for e in made.runs]).items()
  assert label == 'fixed 0.0005 to fixed 0.15'
  assert names == ['fixed 0.0005', 'fixed 0.005', 'fixed 0.15']
  assert not others
  assert not sweep._grids(made, ['fixed 0.005', 'fixed 0.15'])  # no line of two


def test_a_metric_that_only_the_test_split_has_draws_no_empty_figure(tmp_path, trained):
  made = base.new('trial', '')
  made.seeds = (0,)
  config = base.DATA_SETS['celeba'].multitask.get_config('procedural,tiny')
  base.add(made, 'rare', config, {'tasks': ('segmentation',)})
  page = sweep.run(made, tmp_path)
  assert {path.stem for path in page.parent.glob('*.png')} == {'results', 'patterns'}


def test_a_run_adapts_where_it_says_so(tmp_path, trained):
  made = make(seeds=(0,))
  config = base.DATA_SETS['celeba'].multitask.get_config('procedural,tiny')
  tasks = {'tasks': ('segmentation', 'male')}
  base.add(made, 'adapted', config, tasks, start='alone', adapt=True)
  sweep.run(made, tmp_path)
  assert trained[0][-1] == ('adapted', 0, str(tmp_path / 'alone' / '0'))


def test_only_what_is_missing_is_trained(tmp_path, trained):
  calls, failing = trained
  first = sweep.folder(tmp_path, 'alone', 0)
  failing['alone', 1] = DataError('no such folder')
  failing['sparse', 0] = ValueError('what is\nthis?')
  with pytest.raises(UserError, match=r'^3 of 4 runs failed: ') as caught:
    sweep.run(make(), tmp_path)
  message = str(caught.value)
  assert '\n' not in message
  assert 'alone, seed 1: no such folder' in message
  assert 'sparse, seed 1: it starts from alone, which failed' in message
  assert 'sparse, seed 0: ValueError: what is this? (see' in message
  error = sweep.folder(tmp_path, 'sparse', 0) / 'error.txt'
  assert 'Traceback' in error.read_text()
  assert 'no such folder' in (tmp_path / 'table.md').read_text()
  assert calls == [
    ('alone', 0, ''), ('sparse', 0, str(first)), ('alone', 1, '')
  ]  # fmt: skip

  failing.clear()
  calls.clear()
  sweep.run(make(), tmp_path)
  assert calls[:2] == [('sparse', 0, str(first)), ('alone', 1, '')]
  assert len(calls) == 3
  assert 'Failed' not in (tmp_path / 'table.md').read_text()
  calls.clear()
  sweep.run(make(), tmp_path)
  assert calls == []


# The second: a report was asked for while the run was going on.
@pytest.mark.parametrize('missing', ['report/index.html', 'predictions.npz'])
def test_a_run_killed_before_its_last_file_is_not_finished(tmp_path, trained, missing):
  calls, _ = trained
  sweep.run(make(), tmp_path)
  calls.clear()
  place = sweep.folder(tmp_path, 'sparse', 1)
  (place / missing).unlink()
  sweep.run(make(), tmp_path)
  assert [call[:2] for call in calls] == [('sparse', 1)]


def test_a_finished_sweep_draws_its_page_once(tmp_path, trained, monkeypatch):
  sweep.run(make(), tmp_path)
  real, pages = sweep.write, []

  def write(*arguments):
    pages.append(real(*arguments))
    return pages[-1]

  monkeypatch.setattr(sweep, 'write', write)
  assert sweep.run(make(), tmp_path) == pages[0]
  assert len(pages) == 1


def test_runs_that_fail_alike_are_told_of_once(tmp_path, monkeypatch):
  def fail(config, folder, *, skip_corrupt):
    raise DataError(f'no such folder, {skip_corrupt}')

  monkeypatch.setattr(train, 'train', fail)
  made = make()
  made.runs[1].start = ''
  with pytest.raises(UserError) as caught:
    sweep.run(made, tmp_path, skip_corrupt=True)
  wanted = '4 of 4 runs failed: alone, seed 0 and 3 more: no such folder, True'
  assert str(caught.value) == wanted

  def fail_otherwise(config, folder, *, skip_corrupt):
    raise DataError(f'no {folder.parent.name}, {folder.name}')

  monkeypatch.setattr(train, 'train', fail_otherwise)
  with pytest.raises(UserError) as caught:
    sweep.run(made, tmp_path)
  assert str(caught.value) == (
    '4 of 4 runs failed: alone, seed 0: no alone, 0; sparse, seed 0: no sparse, 0; '
    'alone, seed 1: no alone, 1; and more (1), see the log'
  )


def test_the_first_runs_need_not_have_the_task_of_the_target(tmp_path, trained):
  made = make(seeds=(0,))
  config = base.DATA_SETS['celeba'].multitask.get_config('procedural,tiny')
  base.add(made, 'before', config, {'tasks': ('male',)})
  made.runs.insert(0, made.runs.pop())
  sweep.run(made, tmp_path)
  before, alone = (tmp_path / 'table.md').read_text().splitlines()[2:4]
  assert before.startswith('| before | 1 | – | – |')
  assert alone.startswith('| alone | 1 | – | 0.500 |')


def test_runs_on_another_data_set_are_not_compared(tmp_path, trained):
  made = make(seeds=(0,))
  config = base.DATA_SETS['camvid'].multitask.get_config('tiny')
  config.data.source = str(tmp_path)
  base.add(made, 'elsewhere', config, {'tasks': ('segmentation',)})
  sweep.run(made, tmp_path)
  row = cells(tmp_path / 'table.csv')['elsewhere']
  assert float(row['segmentation/miou ↑ mean']) == 0.9
  assert row['Δm % mean'] == row['steps to alone mean'] == ''


def test_a_full_disk_is_no_defect(tmp_path, trained):
  trained[1]['sparse', 0] = OSError(28, 'No space left on device', 'groups.json')
  with pytest.raises(UserError, match=r'seed 0: groups\.json: No space left'):
    sweep.run(make(), tmp_path)
  assert not list(tmp_path.rglob('error.txt'))


def test_damaged_groups_are_named(tmp_path, trained):
  sweep.run(make(), tmp_path)
  place = sweep.folder(tmp_path, 'alone', 0)
  (place / 'groups.json').write_text('null')
  with pytest.raises(
    UserError, match=r'2 of 4.*groups\.json is damaged .*/index\.html'
  ):
    sweep.run(make(), tmp_path)
  assert not (place / 'error.txt').exists()
  (place / 'report' / 'index.html').unlink()
  sweep.run(make(), tmp_path)


def test_other_settings_do_not_pass_for_the_old_ones(tmp_path, trained):
  sweep.run(make(), tmp_path)
  with pytest.raises(
    UserError, match=r'4 of 4 runs failed.*train.steps was 420, now 9'
  ):
    sweep.run(make(steps=9), tmp_path)


def test_settings_of_all_runs(tmp_path):
  made = make(steps=7)
  entry = made.runs[0]
  config = sweep.configuration(made, entry, 5, tmp_path)
  assert (config.train.steps, config.train.evaluate_every, config.seed) == (7, 7, 5)
  assert config.optimizer[0].learning_rate.decay_steps == 7
  assert entry.config.train.steps == 420  # the sweep's own stays as it is
  assert config.data.source == 'datasets/procedural_faces'
  made = base.new('real', '')
  base.add(made, 'a', base.DATA_SETS['camvid'].multitask.get_config('tiny'))
  made.sources.camvid = '/elsewhere'
  config = sweep.configuration(made, made.runs[0], 0, tmp_path)
  assert config.data.source == '/elsewhere'
  made.runs[0].config.data.name = 'examples.own_data'  # has the place of its own
  made.runs[0].config.data.source = '/own'
  assert sweep.configuration(made, made.runs[0], 0, tmp_path).data.source == '/own'


def change(made, i, **values):
  made.runs[i].update(values)


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda s: s.update(seeds=()), 'trial has no seeds'),
    (lambda s: s.update(seeds=(0, -1)), r'seed -1 of sweep trial is not in \[0, 2\^31'),
    (lambda s: s.update(seeds=(0.5,)), r'seed 0\.5 of sweep trial is not in'),
    (lambda s: s.update(seeds=(0, 0)), r'has a seed twice: \(0, 0\)'),
    (
      lambda s: s.runs[1].config.update(tasks=('presence_bike',)),
      "run 'sparse' of sweep trial: unknown task 'presence_bike'",
    ),
    (lambda s: s.update(steps=-1), 'steps of sweep trial is -1; .* at least 1, or 0'),
    (lambda s: s.runs.clear(), 'trial has no runs'),
    (
      lambda s: s.runs[1].config.train.update(steps=-3),
      "run 'sparse' of sweep trial: train.steps is -3; it has to be at least 1",
    ),
    (
      lambda s: s.sources.update(camvid='/x'),
      'sources.camvid is /x, and no run of sweep trial reads it',
    ),
    (
      lambda s: s.runs[1].config.data.update(
        procedural_images=0, source='/nowhere', prepared='/no'
      ),
      'no folder /nowhere, and no copy of it in /no; .* sources.celebamask_hq',
    ),
    (lambda s: change(s, 0, start='sparse'), "starts from 'sparse'.* not a run before"),
    (lambda s: change(s, 1, name='alone'), 'two runs .* one work directory'),
    (lambda s: s.baselines.update(segmentation='x'), "'x', named for segmentation"),
    (lambda s: s.target.update(task='male'), "'alone' has no task male"),
  ],
)
@pytest.mark.usefixtures('trained')  # or what passes by mistake would train
def test_impossible_sweeps(tmp_path, spoil, message):
  made = make()
  spoil(made)
  with pytest.raises(UserError, match=message):
    sweep.run(made, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()


def test_a_change_of_no_field_is_refused():
  config = base.DATA_SETS['celeba'].multitask.get_config('tiny')
  with pytest.raises(KeyError, match='stepz'):
    base.add(base.new('x', ''), 'a', config, {'train.stepz': 3})
  with pytest.raises(ValueError, match=r'needs one data set.*nyu, celeba, camvid'):
    base.parse('procedural')
  with pytest.raises(ValueError, match='unknown option fixed'):
    base.parse('nyu,fixed')


@pytest.mark.parametrize('file', FILES)
def test_every_sweep_is_possible(file):
  module = importlib.import_module(f'configs.sweeps.{file}')
  for option in OPTIONS:
    made = module.get_config(option)
    sweep.check(made)
    sweep.tasks_of(made)  # raises on a task that its data set does not have
    for entry in made.runs:
      config = sweep.configuration(made, entry, 0, Path('w'))
      config.initial = ''
      if config.sparsity.coefficient == 'frozen':
        config.sparsity.coefficient = 'none'
      experiment._check(config)


@pytest.mark.parametrize('option', ['nyu', 'celeba', 'camvid,tiny'])
def test_rows_with_and_without_inner_steps_settle_alike(option):
  made = importlib.import_module('configs.sweeps.meta_sparsity').get_config(option)
  sparse = [e.config.sparsity for e in made.runs]
  sparse = [s for s in sparse if s.coefficient in ('fixed', 'learned')]
  assert len(sparse) == 9
  assert {s.settle for s in sparse} == {0.4}


@pytest.mark.parametrize(
  ('file', 'option', 'argument', 'value'),
  [
    ('nyud_multitask', 'nyu', 'fixed', 1e-6),
    ('celeba_multitask', 'celeba', 'fixed', 1e-5),
    ('celeba_multitask', 'celeba,procedural,tiny', 'fixed,procedural,tiny', 5e-3),
  ],
)
def test_a_fixed_λ_is_the_published_one_or_one_that_kills(
  file, option, argument, value
):
  config = importlib.import_module(f'configs.{file}').get_config(argument)
  assert config.sparsity.value == value
  assert base.parse(option).fixed == value


def test_every_row_of_the_benchmark_of_learned_λ_is_possible():
  made = learned_lambda.make('camvid', learned_lambda.ALL_ROWS, seeds=1)
  assert len(made.runs) == len(learned_lambda.ROWS)
  sweep.check(made)
  for entry in made.runs:
    config = sweep.configuration(made, entry, 0, Path('w'))
    experiment.build(config, data.labels(config.data.name))
    if entry.name.startswith(('holdout', 'online', 'meta online')):
      assert objectives.differentiates(config.sparsity.objective, 1)
  (wide,) = learned_lambda.make('camvid', 'K = 5 from 0.5', 1, width=0.5).runs
  assert wide.config.model.width == 0.5
  assert (wide.config.meta.inner_steps, wide.config.sparsity.start) == (5, 0.5)
  (many,) = learned_lambda.make('faces', 'dense', 1, images=2000).runs
  assert many.config.data.procedural_images == 2000
  with pytest.raises(UserError, match='camvid is not rendered'):
    learned_lambda.make('camvid', 'dense', seeds=1, images=2000)
  with pytest.raises(UserError, match="unknown row 'tolerence'; known: dense"):
    learned_lambda.make('camvid', 'dense, tolerence', seeds=1)


def test_pruning_after_training_begins_with_two_rows_of_it():
  chosen = {'learned': 'budget 0.7', 'seeds': 2, 'source': '', 'steps': 10}
  made = baselines.runs_of(argparse.Namespace(data_set='faces', **chosen))
  assert [entry.name for entry in made.runs] == ['dense', 'budget 0.7']
  assert made.seeds == (0, 1)
  assert made.steps == 10


def test_the_sweeps_are_those_of_the_papers():
  runs = lambda file, option: {
    entry.name: entry.config
    for entry in importlib.import_module(f'configs.sweeps.{file}')
    .get_config(option)
    .runs
  }
  nyu = runs('less_is_more', 'nyu')
  sets = {entry.tasks for entry in nyu.values()}
  assert len(sets) == 4 + 3 + 1 + 1
  faces = {entry.tasks for entry in runs('less_is_more', 'celeba').values()}
  assert len(faces) == 4 + 4 + 2 + 1
  assert ('male', 'arched_eyebrows', 'smiling') in faces
  grid = [c.sparsity.value for name, c in nyu.items() if name.startswith('grid')]
  assert grid == [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
  corners = runs('transfer', 'nyu')
  target = [c for n, c in corners.items() if c.data.name == 'nyud_mt']
  assert len(target) == 8 + 2
  assert {c.meta.inner_steps > 0 for c in target} == {True, False}
  carried = [c.data.name for c in runs('transfer', 'nyu,from_camvid').values()]
  assert (carried.count('camvid'), carried.count('nyud_mt')) == (4, 8 + 2)
  missing = {c.data.missing for c in runs('missing_labels', 'nyu').values()}
  assert missing == {0.0, 0.1, 0.2, 0.5}
  shares = {c.data.train_share for c in runs('unseen_tasks', 'nyu').values()}
  assert shares == {1.0, 0.5, 0.1, 0.02}
  celeba = runs('meta_sparsity', 'celeba')
  assert max(len(c.tasks) for c in celeba.values()) == 7
  alone = {c.tasks for name, c in celeba.items() if name.endswith('alone')}
  assert len(alone) == 7


def test_coefficients_of_few_seeds_are_drawn_beside_one_another():
  curve = np.array([0, 5]), np.array([0.01, 0.1])
  curves = {'a': {0: curve, 1: curve}, 'b': {1: curve}}
  axes = figures.trajectories(curves, 'λ', log=True, panels=True).axes
  assert [a.get_title() for a in axes] == ['seed 0', 'seed 1']
  assert [len(a.lines) for a in axes] == [1, 2]
  labels = [text.get_text() for text in axes[-1].get_legend().get_texts()]
  assert labels == ['a', 'b']  # though one of them is not in the first
  (alone,) = figures.trajectories(curves, 'λ').axes
  assert (alone.get_title(), len(alone.lines)) == ('λ', 3)


def test_a_coefficient_is_drawn_from_its_start():
  config = base.DATA_SETS['celeba'].multitask.get_config('tiny')
  rows = [{'split': 'train', 'step': 5, 'lambda_relative': 0.2}]
  for changes, steps in ((base.fixed(0.1), [5]), (base.LEARNED, [0, 5])):
    config.update_from_flattened_dict(changes)
    found, values = sweep._coefficient(sweep.Result(config, {}, rows, {}))
    np.testing.assert_array_equal(found, steps)
  np.testing.assert_array_equal(values, [config.sparsity.start, 0.2])
