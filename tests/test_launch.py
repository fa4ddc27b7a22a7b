"""What a person can get wrong, and the one line that answers it."""

import errno
import importlib
import itertools
import json
import math
import resource
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

import data
from configs import celeba_meta, common
from data import DataError
from msp import checkpoint, experiment, run, train, trained, workdir
from msp.checkpoint import Checkpoints
from msp.errors import UserError, one_line

ROOT = Path(__file__).parents[1]
OPTIONS = {
  'celeba_meta': ('procedural', 'tiny'),
  'celeba_multitask': ('fixed', 'procedural', 'tiny'),
  'camvid_meta': ('tiny',),
  'camvid_multitask': ('fixed', 'tiny'),
  'nyud_meta': ('procedural', 'tiny'),
  'nyud_multitask': ('fixed', 'procedural', 'tiny'),
}


def start(folder, *arguments):
  return subprocess.run(
    [sys.executable, ROOT / 'launch.py', *arguments],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=120,
  )


def launch(folder, *arguments):
  """Runs the program in an empty folder; returns its exit code and its messages."""
  result = start(folder, *arguments)
  assert result.stdout == ''
  return result.returncode, result.stderr


def last_line(code, messages):
  """The one line of a mistake."""
  assert code == 1
  assert 'Traceback' not in messages
  line = messages.strip().splitlines()[-1]
  assert line.startswith('error: ')
  assert messages.count('error: ') == 1
  return line


@pytest.mark.parametrize(
  ('content', 'expected'),
  [
    ('def get_config(:', 'own.py, line 1: invalid syntax'),
    ('import nothing', "own.py, line 1: No module named 'nothing'"),
    ('def get_config():\n  return what', "own.py, line 2: name 'what' is not defined"),
    (
      'import ml_collections\nget_config = ml_collections.ConfigDict',
      'own.py has no data; see configs/common.py (a config.json without it is of '
      'another version of this program)',
    ),
    (
      'def get_config(arg=""):\n  assert arg, "an option"',
      'own.py, line 2: AssertionError: an option',
    ),
    (
      'def get_config():\n  return 1 / 0',
      'own.py, line 2: ZeroDivisionError: division by zero',
    ),
    ('x = 1', 'the file after --config has no function get_config'),
    (
      'def get_config():\n  return {"a": 1}',
      'get_config of the file after --config returns no ConfigDict',
    ),
    (
      'from configs import celeba_meta\ndef get_config():\n'
      '  c = celeba_meta.get_config("tiny")\n  c.train.step = 5\n  return c',
      'own.py: there is no field train.step; did you mean train.steps?',
    ),
  ],
)
def test_a_mistake_in_a_configuration_file_names_its_line(tmp_path, content, expected):
  (tmp_path / 'own.py').write_text(content)
  code, messages = launch(tmp_path, '--config=own.py')
  assert last_line(code, messages).endswith(expected)
  assert len(messages.strip().splitlines()) == 1


def test_a_run_is_reported_by_its_directory_alone(tmp_path):
  folder = tmp_path / 'run'
  workdir.claim(folder, celeba_meta.get_config('procedural,tiny'))
  row = {'split': 'train', 'step': 5, 'loss': 1.0}
  (folder / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
  result = start(tmp_path, '--workdir=run', '--mode=report')
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout == 'report: run/report/index.html\n'
  assert (folder / 'report' / 'index.html').exists()


def test_a_data_set_is_prepared_and_drawn(tmp_path):
  result = start(
    tmp_path,
    f'--config={ROOT}/configs/celeba_meta.py:procedural,tiny',
    '--mode=prepare',
    '--config.data.procedural_images=30',
    '--config.data.image_size=(16,16)',
  )
  assert result.returncode == 0
  prepared, drawn = result.stdout.splitlines()
  assert (tmp_path / prepared.removeprefix('prepared: ')).is_dir()
  with Image.open(tmp_path / drawn.removeprefix('look at it: ')) as picture:
    assert min(picture.size) > 100


@pytest.mark.parametrize(
  ('error', 'processes', 'expected'),
  [
    (
      'jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")',
      1,
      ('error: out of memory on', 'lower train.batch_size'),
    ),
    (
      'jax.errors.JaxRuntimeError("UNAVAILABLE: connection\\nreset")',
      2,
      ('error: another process stopped, see its message: UNAVAILABLE: connection',),
    ),
    ('FloatingPointError("step 3: loss is nan")', 1, ('error: step 3: loss is nan',)),
    ('KeyboardInterrupt()', 1, ('interrupted; the same command goes on',)),
  ],
)
def test_what_ends_a_run_is_one_line(tmp_path, error, processes, expected):
  program = (
    'import jax, launch, msp.train\nfrom absl import app\n'
    'def fail(*_, **__):\n'
    f'  jax.process_count = lambda: {processes}\n'
    f'  raise {error}\n'
    'msp.train.train = fail\n'
    'app.run(launch.main, flags_parser=launch._parse)'
  )
  arguments = [f'--config={ROOT}/configs/celeba_meta.py', f'--workdir={tmp_path}/run']
  command = [sys.executable, '-c', program, *arguments]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == (130 if 'interrupted' in expected[0] else 1)
  assert 'Traceback' not in result.stderr
  line = result.stderr.strip().splitlines()[-1]
  assert line.startswith(expected[0])
  for text in expected:
    assert text in line


def test_without_the_data_set_it_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)  # as a new user starts it
  code, messages = launch(tmp_path, '--config', ROOT / 'configs/celeba_meta.py')
  assert 'backend' not in messages
  line = last_line(code, messages)
  assert 'CelebA-HQ-img is missing' in line
  assert 'looked for at datasets/CelebAMask-HQ' in line
  assert 'github.com/switchablenorms/CelebAMask-HQ' in line
  assert 'python launch.py --config configs/celeba_meta.py:procedural,tiny' in line
  assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['{config}', '--config.train.step=3'], ["'step'", "did you mean 'steps'?"]),
    (['{config}', '--config.trian.steps=3'], ["'trian'", "did you mean 'train'?"]),
    (['{config}', '--config.train.steps=abc'], ['config.train.steps=abc']),
    (['{config}:tinny'], ['unknown option tinny', 'known: procedural, tiny']),
    (['{config}', '--mode=sweep'], ['is one run; --mode sweep takes a file of']),
    (['{sweep}:nyu'], ['is a sweep; start it with --mode sweep']),
    (
      ['{sweep}', '--mode=sweep'],
      ['a sweep needs one data set', 'nyu, celeba, camvid'],
    ),
    (['nothing.py'], ['cannot read the file after --config', 'nothing.py']),
    (['nothing.py', '--config.seed=1'], ['cannot read', 'nothing.py']),
    (
      ['{config}', '--mode=trian'],
      ['trian', 'train|adapt|sweep|evaluate|compact|export|report|prepare'],
    ),
    (['{config}', '--wrokdir=x'], ["'wrokdir'"]),
    ([None], ['no --config']),
    ([None, '--workdir=x', '--mode=report'], ['no x/config.json', 'or its --config']),
    (['{config}', '--workdir=gs://b/x'], ['--workdir is gs://b/x', 'mount the bucket']),
    (
      ['{config}:procedural,tiny', '--mode=prepare', '--config.tasks=("smile",)'],
      ["unknown task 'smile'; did you mean 'smiling'?"],
    ),
    (
      ['{config}:procedural,tiny', '--mode=prepare', '--config.seed=-1'],
      ['seed is -1; it has to be in [0, '],
    ),
  ],
)
def test_mistyped_arguments(tmp_path, arguments, expected):
  first, *rest = arguments
  if first is not None:
    config = first.format(
      config=ROOT / 'configs/celeba_meta.py', sweep=ROOT / 'configs/sweeps/transfer.py'
    )
    rest = ['--config', config, *rest]
  code, messages = launch(tmp_path, *rest)
  line = last_line(code, messages)
  assert len(messages.strip().splitlines()) == 1
  for text in expected:
    assert text in line
  assert list(tmp_path.iterdir()) == []


def config(tmp_path, **overrides):
  """A small experiment whose data set does not exist."""
  c = common.celeba()
  common.learn_coefficient(c)
  c.update_from_flattened_dict(
    {
      'tasks': ('segmentation', 'male'),
      'data.source': str(tmp_path / 'source'),
      'data.prepared': str(tmp_path / 'prepared'),
      'data.image_size': (16, 16),
      'model.blocks': (1, 1, 1, 1),
      'model.block': 'basic',
      'model.width': 0.0625,
      'model.head_features': 8,
      'meta.episodes': '1',
      'train.batch_size': 8,
    }
  )
  with c.unlocked():
    c.update_from_flattened_dict(overrides)
  return c


SGD = [ConfigDict({'name': 'sgd', 'learning_rate': 0.1})]
ADAM = [ConfigDict({'name': 'adam', 'learning_rate': 0.1})]
MOMENTUM = [ConfigDict({'name': 'sgd', 'learning_rate': 0.1, 'momentum': 0.9})]
COSINE = {'name': 'cosine_decay_schedule', 'init_value': 0.1, 'decay_steps': 9}
SCHEDULED = [ConfigDict({'name': 'sgd', 'learning_rate': COSINE})]
WARM_UP = {'name': 'warmup_cosine_decay_schedule', 'init_value': 0.0}
WARM_UP |= {'peak_value': 0.1, 'warmup_steps': 9, 'decay_steps': 5}


def adamw(**fields):
  return [ConfigDict({'name': 'adamw', 'learning_rate': 0.1} | fields)]


NOT_ONE = 0.5


def fails(learning_rate):
  return learning_rate / 0


MISTAKES = [
  ({'tasks': ('segmentation', 'mael')}, "unknown task 'mael'; did you mean 'male'"),
  ({'tasks': ()}, 'no tasks given'),
  ({'tasks': ('male', 'male')}, "'male' is listed twice"),
  ({'data.name': 'celeba'}, "unknown data set 'celeba', known: celebamask_hq"),
  ({'data.image_size': (64,)}, r'image_size is \(64,\)'),
  ({'data.hold_out': 0.0}, 'data.hold_out is 0.0; a learned λ needs a part'),
  ({'sparsity.learn_on': 'train'}, "learn_on is 'train'; known: hold_out, query"),
  ({'data.image_size': (64, 64.5)}, r'image_size is \(64, 64\.5\); .* whole numbers'),
  ({'data.prepared': 'gs://b'}, 'data.prepared is gs://b; .* mount the bucket'),
  (
    {'data.source': '', 'train.batch_size': 16},
    'data.source is empty; name the folder with the published files',
  ),
  ({'data.source': 's3://b'}, 'data.source is s3://b; .* a folder of this machine'),
  ({'model.blocks': (1.5, 1, 1, 1)}, r'blocks is \(1\.5, 1, 1, 1\): give four'),
  ({'model.width': float('inf')}, r'model.width is inf; .* in \[0\.03125, 32\]'),
  ({'model.width': 1e-9}, r'model.width is 1e-09; it has to be in \[0\.0'),
  ({'name': ''}, 'name is empty; a run is kept in runs/<name>'),
  ({'data.procedural_images': 2}, 'data.procedural_images is 2; .* at least 20'),
  ({'tasks': (1,)}, 'unknown task 1'),
  ({'tasks': (['male'],)}, r"unknown task \['male'\]"),
  (
    {'sparsity.coefficient': 'none', 'sparsity.search': float('inf')},
    r'search is inf; .* in \[0, 1\)',
  ),
  (
    {'loss.combination': 'fixed', 'loss.weights': (1.0, -1.0)},
    r'loss.weights is \(1\.0, -1\.0\); it has to be numbers of at least 0',
  ),
  ({'data.hold_out': float('nan')}, r'data.hold_out is nan; .* in \[0, 1\)'),
  ({'data.prepared': ''}, 'data.prepared is empty; name a folder'),
  (
    {'loss.combination': 'fixed', 'loss.weights': (0.0, 0.0)},
    r'loss.weights is \(0\.0, 0\.0\); one of them has to be above 0',
  ),
  ({'initial': 'nowhere'}, 'initial=nowhere: there is no such file or folder'),
  ({'optimizer': ['adam']}, r"optimizer\[0\] is 'adam'; it has to be a dict\(name="),
  ({'optimizer': adamw(eps=float('nan'))}, r'optimizer\[0\]\.eps is nan'),
  ({'optimizer': adamw(name=f'{__name__}:NOT_ONE')}, 'is a float; it has to be a func'),
  (
    {'optimizer': adamw(name=f'{__name__}:fails')},
    r'fails failed: ZeroDivisionError: float .*zero \(.*test_launch\.py:\d+\)',
  ),
  ({'seed': -1}, r'seed is -1; it has to be in \[0, 2147483648\)'),
  ({'sparsity.min_alive': -1}, 'min_alive is -1; it has to be at least 0'),
  ({'sparsity.min_alive': 999}, r'min_alive is 999, .* has \d+ groups: none could die'),
  ({'optimizer': []}, 'optimizer is empty; name at least one transform'),
  ({'model.depth': 34}, 'unknown model depth 34: choose one of 18, 50, 101'),
  ({'model.norm': 'layer'}, "unknown model norm 'layer'"),
  (
    {'optimizer': [ConfigDict({'name': 'adamm', 'learning_rate': 0.1})]},
    "optimizer: unknown transform 'adamm'",
  ),
  (
    {'optimizer': [ConfigDict({'name': 'adam', 'learning_rat': 0.1})]},
    'cannot take',
  ),
  ({'optimizer': adamw(learning_rate='fast')}, "learning_rate is 'fast'; it has to be"),
  ({'optimizer': adamw(learning_rate=-0.1)}, r'learning_rate is -0\.1; .* 0 or more'),
  ({'optimizer': adamw(learning_rate=None)}, 'learning_rate is None; it has to be'),
  ({'optimizer': adamw(learning_rate=WARM_UP)}, 'warmup_cosine_decay_schedule cannot'),
  ({'optimizer': adamw(weight_decay='much')}, 'an argument is of the wrong type'),
  ({'optimizer': adamw(name='lbfgs')}, 'optimizer: lbfgs cannot make a step from'),
  ({'sparsity.optimizers.holdout': adamw(name='lbfgs')}, 'holdout: lbfgs cannot make'),
  ({'optimizer': SGD}, 'second moment does not fit sgd; use one of adam, adamw, nadam'),
  (
    {'meta.optimizer': [ConfigDict({'name': 'scale', 'step_size': -0.1})]},
    'meta.optimizer: no entry has a learning_rate',
  ),
  (
    {'optimizer': [ConfigDict({'name': 'lamb', 'learning_rate': 0.1})]},
    'optimizer: the prox in the metric of a second moment does not fit lamb',
  ),
  ({'data.train_share': 0.0}, r'train_share is 0\.0; it has to be in \(0, 1\]'),
  ({'data.missing': 1.0}, r'data.missing is 1\.0; it has to be in \[0, 1\)'),
  ({'data.missing': 0.1, 'tasks': ('male',)}, 'and 0 for a single task'),
  ({'sparsity.search': 52.0}, r'search is 52\.0; .* in \[0, 1\)'),
  ({'sparsity.rise': -0.1}, r'rise is -0\.1; .* in \[0, 1\]'),
  ({'sparsity.settle': 1.0}, r'settle is 1\.0; .* in \[0, 1\)'),
  ({'sparsity.search': 0.7}, r'settle 0\.4: the search for λ has to end before'),
  (
    {
      'sparsity.penalty': 'sparse_group_lasso',
      'sparsity.objective': 'budget',
      'sparsity.measure': 'weights',
    },
    'inside of living groups, and those do not settle; set sparsity.settle=0',
  ),
  (
    {
      'sparsity.objective': 'budget',
      'sparsity.measure': 'flops',
      'sparsity.axis': 'weight',
    },
    'single zeros save no FLOPs, only channels do; set sparsity.measure=weights',
  ),
  ({'sparsity.coefficient': 'frozen'}, 'frozen keeps the dead groups of config.init'),
  ({'meta.inner_steps': 0}, 'needs meta.inner_steps of at least 1'),
  ({'meta.inner_steps': -1}, 'meta.inner_steps is -1'),
  ({'meta.episodes': 'some'}, "meta.episodes='some': expected all, full or a number"),
  ({'meta.unroll': 'maybe'}, "meta.unroll is 'maybe'; known: auto, yes, no"),
  ({'loss.combination': 'mean'}, "unknown combination of losses 'mean'"),
  ({'loss.combination': 'fixed'}, 'loss.weights has 0 entries; .*fixed takes 2, one'),
  ({'loss.weights': (1.0, 2.0)}, '2 entries; loss.combination=uncertainty takes none'),
  (
    {'loss.combination': 'fixed', 'loss.weights': ('1', '2')},
    r"loss.weights is \('1', '2'\); it has to be numbers",
  ),
  ({'loss.resolution': 'half'}, "unknown loss_resolution 'half'"),
  (
    {'sparsity.penalty': 'lasso'},
    "unknown penalty 'lasso'; known: group_lasso, group_mcp",
  ),
  (
    {'sparsity.coefficient': 'none', 'sparsity.penalty': 'lasso'},
    "unknown penalty 'lasso'",
  ),
  ({'sparsity.penalty_options.gamma': 3.0}, 'group_lasso cannot take gamma'),
  (
    {'sparsity.penalty': 'group_mcp', 'sparsity.penalty_options.gamma': 1e-3},
    'too concave for a step of 0.01',
  ),
  ({'sparsity.objective': 'budgte'}, "sparsity.objective is 'budgte'; known: holdout"),
  ({'sparsity.measure': 'channels'}, "sparsity.measure is 'channels'; known: groups"),
  ({'sparsity.target': 1.5}, r'sparsity.target is 1\.5; .* in \(0, 1\)'),
  (
    {'sparsity.objective': 'budget', 'sparsity.target': 0.999},
    r'target is 0\.999, but of the groups no more than 0\.\d+ can go while',
  ),
  ({'sparsity.tolerance': -0.1}, r'sparsity.tolerance is -0\.1; .* at least 0'),
  ({'sparsity.tolerance': float('nan')}, 'sparsity.tolerance is nan'),
  ({'sparsity.tangent_decay': 0.0}, 'sparsity.tangent_decay is 0.0'),
  ({'sparsity.tangent_max_norm': -1.0}, 'tangent_max_norm is -1.0; it has to be above'),
  (
    {'sparsity.hypergradient': 'online', 'optimizer': ADAM},
    'give it an eps_root above 0',
  ),
  # Whatever is differentiated: λ, or θ⁰ through inner steps.
  ({'meta.optimizer': ADAM}, 'meta.optimizer: .* eps_root above 0'),
  (
    {
      'meta.optimizer': ADAM,
      'meta.exact': True,
      'sparsity.coefficient': 'none',
      'sparsity.settle': 0.0,
    },
    'meta.optimizer: .* eps_root above 0',
  ),
  ({'meta.optimizer': adamw(name='sgd', momentum=1.0)}, r'momentum is 1\.0; it has'),
  # One λ for all may follow a constraint alone, one for each layer may not.
  (
    {
      'meta.inner_steps': 0,
      'sparsity.objective': 'budget',
      'sparsity.granularity': 'layer',
    },
    'needs meta.inner_steps of at least 1',
  ),
  (
    {'sparsity.hypergradient': 'truncated', 'sparsity.truncation': 4},
    r'sparsity\.truncation is 4; of meta\.inner_steps=3',
  ),
  (
    {'sparsity.hypergradient': 'implicit', 'meta.optimizer': MOMENTUM},
    'momentum or moments; use plain sgd there',
  ),
  (
    {'sparsity.hypergradient': 'implicit', 'meta.optimizer': SCHEDULED},
    'a schedule; use plain sgd there',
  ),
  ({'sparsity.solver.name': 'lu'}, "solver.name is 'lu'; known: cg, neumann"),
  ({'sparsity.solver.tolerance': 0.0}, 'solver.tolerance is 0.0; it has to be in'),
  ({'sparsity.coefficient': 'learn'}, "sparsity.coefficient is 'learn'; known: none"),
  ({'sparsity.coefficient': 'fixed'}, 'sparsity.value is 0.0; a fixed λ has to be'),
  (
    {'sparsity.coefficient': 'fixed', 'sparsity.value': float('nan')},
    'sparsity.value is nan; a fixed λ has to be a number above 0',
  ),
  ({'sparsity.hypergradient': 'back'}, "sparsity.hypergradient is 'back'; known"),
  ({'sparsity.metric': 'l2'}, "sparsity.metric is 'l2'; known: adam, euclidean"),
  ({'sparsity.axis': 'input'}, "axis 'input' is not one of in, out, weight"),
  ({'sparsity.granularity': 'block'}, "granularity 'block' is not one of"),
  ({'sparsity.pattern': 'nothing'}, "pattern 'nothing' matches no parameter"),
  ({'sparsity.start': 2.0}, 'sparsity.start is 2.0'),
  ({'train.steps': 0}, 'train.steps is 0; it has to be at least 1'),
  ({'model.dtype': 'float64'}, 'dtype is float64: set .* JAX_ENABLE_X64=1'),
  ({'train.statistics_batches': -1}, 'statistics_batches is -1; it has to be at least'),
  ({'train.patience': -1}, 'train.patience is -1; it has to be at least 0'),
  ({'data.eval_examples': -1}, 'data.eval_examples is -1; it has to be at least 0'),
  ({'train.batch_size': 1}, r'batch_size=1 is too small.*support \+ query \+ hold-out'),
  ({'train.batch_size': 0}, 'batch_size=0 is too small'),
  ({'train.batch_size': 8}, r'on 8 device\(s\): use a multiple of 16'),
  ({'train.batch_size': 16}, 'CelebA-HQ-img is missing'),  # all else is in order
]


def test_fields_are_those_of_the_program(tmp_path):
  known = common.base()

  def told(change):
    c = celeba_meta.get_config('tiny').copy_and_resolve_references()
    with c.unlocked():
      change(c)
    with pytest.raises(UserError) as caught:
      experiment.check_fields(c, known, 'x.py')
    return str(caught.value)

  def unknown(c):
    c.train.step = 5

  assert told(unknown) == (
    'x.py: there is no field train.step; did you mean train.steps?'
  )

  def missing(c):
    del c.train.patience

  assert told(missing).startswith('x.py has no train.patience; see configs/common.py')
  for path, value, wanted in (
    ('train.steps', '8', 'whole number'),
    ('train.steps', 8.0, 'whole number'),
    ('train.steps', True, 'whole number'),
    ('data.flip', 1, 'bool'),
    ('model.width', '1', 'number'),
    ('tasks', 'male', 'list'),
    ('name', None, 'string'),
    ('train', 3, 'section'),
  ):

    def wrong(c, path=path, value=value):
      *above, name = path.split('.')
      node = c[above[0]] if above else c
      with node.ignore_type():
        node[name] = value

    assert told(wrong) == f'x.py: {path} is {value!r}; it has to be a {wanted}'
  # What a run keeps is complete.
  c = celeba_meta.get_config('procedural,tiny')
  workdir.claim(tmp_path / 'run', c)
  experiment.check_fields(workdir.configuration(tmp_path / 'run'), known, 'run')


def test_what_needs_another_flag(tmp_path):
  run_of = '--workdir=runs'
  line = last_line(*launch(tmp_path, run_of, '--config.data.source=x'))
  assert line.endswith('a field of the file after --config, and none is given')
  config_of = f'--config={ROOT}/configs/celeba_meta.py:tiny'
  line = last_line(*launch(tmp_path, config_of, '--mode=adapt'))
  assert line.endswith('name it with --config.initial=')


def test_jax_that_does_not_start_is_one_line(tmp_path, monkeypatch):
  config_of = f'--config={ROOT}/configs/celeba_meta.py:tiny'
  for name, value in (
    ('JAX_PLATFORMS', 'nonesuch'),
    ('JAX_DEFAULT_MATMUL_PRECISION', 'nonesuch'),
  ):
    with monkeypatch.context() as patch:
      patch.setenv(name, value)
      line = last_line(*launch(tmp_path, config_of))
    assert line.startswith('error: JAX does not start (')
    assert f'{name}={value}' in line


def test_without_a_place_for_messages(tmp_path):
  command = [sys.executable, ROOT / 'launch.py', '--mode=report', '--workdir=none']
  shell = 'exec "$@" 2>&-'
  result = subprocess.run(
    ['sh', '-c', shell, 'sh', *command, f'--config={ROOT}/configs/celeba_meta.py'],
    cwd=tmp_path,
  )
  assert result.returncode == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('overrides', 'message'), MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(tmp_path, overrides, message):
  with pytest.raises((UserError, DataError), match=message) as caught:
    train.train(config(tmp_path, **overrides), tmp_path / 'run')
  assert '\n' not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_architecture_names_the_leaves(tmp_path):
  state = {'params': {'conv': jnp.ones((3, 4)), 'bias': jnp.ones(4)}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, {}, 0.5)
  target = {'params': {'conv': jnp.ones((3, 5)), 'scale': jnp.ones(4)}}
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError) as caught:
      checkpoints.restore(2, target)
    restored, _ = checkpoints.restore(2, state)
  message = str(caught.value)
  assert 'of another architecture; 3 leaves differ' in message
  assert 'params/conv (3, 4), this model (3, 5)' in message
  assert 'params/bias (4,), this model absent' in message
  assert 'params/scale absent, this model (4,)' in message
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_the_best_checkpoint_survives_a_restart(tmp_path):
  state, folder = {'x': jnp.ones(2)}, tmp_path / 'checkpoints'
  scores = {2: 0.3, 4: 0.9, 6: float('-inf'), 8: 0.9, 10: 0.4}
  for step, score in scores.items():
    with Checkpoints(tmp_path) as checkpoints:  # as after a kill
      checkpoints.save(step, state, {'step': step}, score)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 10
    assert checkpoints.best_step() == 4
    assert checkpoints.restore(4, state)[1] == {'step': 4}
  assert {p.name for p in folder.iterdir()} == {'4', '8', '10'}


STATE = {'params': {'conv': jnp.ones((30, 4)), 'bias': jnp.arange(4.0)}}


def two_checkpoints(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, STATE, {'step': 2}, 0.5)
    checkpoints.save(4, STATE, {'step': 4}, 0.6)
  return tmp_path / 'checkpoints'


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('state/_METADATA', None),
    ('state/_METADATA', b'{"tree_metadata": {'),
    ('state/array_metadatas/process_0', b'\xff'),
    ('state/manifest.ocdbt', b''),
    ('state/d/*', b'1234567890'),
    ('meta/metadata', b''),
    ('meta/metadata', None),
  ],
)
def test_an_older_checkpoint_in_place_of_a_damaged_one(tmp_path, caplog, name, content):
  folder = two_checkpoints(tmp_path)
  (path,) = (folder / '4').glob(name)
  path.unlink() if content is None else path.write_bytes(content)
  with Checkpoints(tmp_path) as checkpoints:
    step, (state, meta) = checkpoints.newest(lambda s: checkpoints.restore(s, STATE))
    assert step == 2
    assert meta == {'step': 2}
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    assert f'checkpoint {folder / "4"} is damaged' in caplog.text
    assert 'delete it. Going on with that of step 2' in caplog.text
    assert (folder / '4').exists()  # whoever only reads leaves it
    for step in (3, 4):
      checkpoints.save(step, STATE, {'step': step}, 0.4)
    assert checkpoints.best_step() == 2
    assert checkpoints.restore(4, STATE)[1] == {'step': 4}
  assert {p.name for p in folder.iterdir()} == {'2', '3', '4', '4.damaged'}


def test_what_was_set_aside_before_makes_room(tmp_path):
  folder = two_checkpoints(tmp_path)
  (folder / '4.damaged' / 'state').mkdir(parents=True)
  (folder / '4' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.newest(lambda s: checkpoints.restore(s, STATE))
    checkpoints.save(4, STATE, {'step': 4}, 0.4)
  assert {p.name for p in folder.iterdir()} == {'2', '4', '4.damaged'}


def test_reads_that_end_after_a_failed_one_are_not_told_of(tmp_path, monkeypatch):
  folder, told = two_checkpoints(tmp_path), []
  (folder / '4' / 'state' / 'manifest.ocdbt').write_bytes(b'')
  hook = lambda unraisable: told.append(unraisable.exc_value)
  monkeypatch.setattr(sys, 'unraisablehook', hook)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    checkpoints.restore(2, STATE)
    assert sys.unraisablehook is hook
    assert checkpoints.newest(lambda s: checkpoints.restore(s, STATE))[0] == 2
  other = ValueError('of something else')
  for error, read in (
    (RuntimeError('Event loop is closed'), None),
    (Exception('Encountered error while reading'), coroutine_of('/x/orbax/a.py')),
    (other, coroutine_of('/x/mine/a.py')),
    (other, None),
  ):
    sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=read))
  assert told == [other, other]


def coroutine_of(path):
  names = {}
  exec(compile('async def read(): pass', path, 'exec'), names)
  coroutine = names['read']()
  coroutine.close()
  return coroutine


def test_processes_go_on_from_a_checkpoint_that_all_can_read(
  tmp_path, monkeypatch, caplog
):
  """Another process cannot read the newest one, which is whole here."""
  two_checkpoints(tmp_path)
  answers = iter([1, 0])
  with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
    patch.setattr(checkpoint.processes, 'agreed', lambda value: next(answers))
    step, _ = checkpoints.newest(checkpoints.restore_any)
  assert step == 2
  assert f'{checkpoint._UNREADABLE}. Going on with that of step 2' in caplog.text


def test_a_disk_that_does_not_answer_damages_nothing(tmp_path, monkeypatch):
  two_checkpoints(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:

    def fails(*args, **kwargs):
      raise OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setattr(checkpoints._manager, 'restore', fails)
    with pytest.raises(OSError, match='Stale'):
      checkpoints.newest(lambda s: checkpoints.restore(s, STATE))
    assert not checkpoints._damaged


def test_a_sweep_is_one_process(tmp_path):
  sweep = ROOT / 'configs/sweeps/meta_sparsity.py'
  line = last_line(
    *launch(tmp_path, f'--config={sweep}:nyu', '--mode=sweep', '--distributed')
  )
  assert 'a sweep is one process' in line


@pytest.mark.parametrize('mode', ['compact', 'export', 'report', 'prepare'])
def test_what_is_one_process(tmp_path, mode):
  made = ROOT / 'configs/camvid_meta.py'
  line = last_line(
    *launch(tmp_path, f'--config={made}', f'--mode={mode}', '--distributed')
  )
  assert f'--mode {mode} is one process' in line


def test_no_score_is_no_best_checkpoint(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    for step, score in ((2, -math.inf), (4, -math.inf)):
      checkpoints.save(step, STATE, {}, score)
    assert checkpoints.best_step() is None
    checkpoints.save(6, STATE, {}, 0.1)
    checkpoints.save(8, STATE, {}, -math.inf)
    assert checkpoints.best_step() == 6


def test_nothing_but_damaged_checkpoints(tmp_path):
  folder = two_checkpoints(tmp_path)
  for step in '24':
    (folder / step / 'state' / 'manifest.ocdbt').write_bytes(b'')
  with Checkpoints(tmp_path, read_only=True) as checkpoints:
    for read in (checkpoints.restore_any, lambda s: checkpoints.restore(s, STATE)):
      with pytest.raises(UserError) as caught:
        checkpoints.newest(read)
      assert str(caught.value).startswith(f'checkpoint {folder / "4"} is damaged (')
      assert str(caught.value).endswith('): delete it')
      assert '\n' not in str(caught.value)


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"score": null, "step": 4}'])
def test_a_damaged_score_does_not_count(tmp_path, caplog, content):
  folder = two_checkpoints(tmp_path)
  path = folder / '4' / 'metrics' / 'metrics'
  path.write_text(content)
  with Checkpoints(tmp_path, read_only=True) as checkpoints:  # may not mend it
    assert checkpoints.newest(checkpoints.restore_any)[0] == (4 if content else 2)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.newest(checkpoints.restore_any)[0] == 4
    assert checkpoints.best_step() == 2
    checkpoints.save(6, STATE, {}, 0.4)
    assert checkpoints.best_step() == 2
  assert f'{path} is damaged' in caplog.text


def test_orbax_does_not_add_words_of_its_own(tmp_path):
  folder = two_checkpoints(tmp_path / 'old')
  content = '{"tasks": ["male"], "data": {"name": "celebamask_hq"}}'
  (tmp_path / 'old' / 'config.json').write_text(content)
  for step in '24':
    (folder / step / '_CHECKPOINT_METADATA').write_bytes(b'')
    (folder / step / 'state' / 'manifest.ocdbt').write_bytes(b'')
  line = last_line(
    *launch(
      tmp_path,
      f'--config={ROOT / "configs/celeba_meta.py"}:procedural,tiny',
      '--config.initial=old',
      '--mode=adapt',
    )
  )
  assert f'checkpoint {folder / "4"} is damaged' in line
  assert {path.name for path in tmp_path.iterdir()} == {'old'}


def test_a_disk_that_is_full_at_a_checkpoint(tmp_path):
  folder = two_checkpoints(tmp_path)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with Checkpoints(tmp_path) as checkpoints:
    large = {'x': jax.random.normal(jax.random.key(0), (100, 100))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as full as it gets
    try:
      with pytest.raises(OSError, match='File too large') as caught:
        checkpoints.save(6, large, {}, 0.5)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert caught.value.filename == str(folder)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 4
    checkpoints.save(6, large, {}, 0.5)
    assert checkpoints.latest_step() == 6


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
  full = tmp_path / 'runs' / 'report' / '.losses.png.tmp'
  full.parent.mkdir(parents=True)
  full.symlink_to('/dev/full')
  (tmp_path / 'runs' / 'metrics.jsonl').write_text(
    '{"split": "train", "step": 1, "loss": 0.5}\n'
  )
  config = ('--config', ROOT / 'configs/celeba_meta.py')
  line = last_line(*launch(tmp_path, *config, '--workdir=runs', '--mode=report'))
  assert line == 'error: runs/report/losses.png: No space left on device'
  assert list(full.parent.iterdir()) == []


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    (OSError(28, 'No space left', 'a/b'), 'a/b: No space left'),
    (OSError(28, 'No space left'), 'No space left'),
    (OSError('cannot read\nthe header'), 'OSError: cannot read the header'),
  ],
)
def test_what_the_operating_system_says_in_one_line(error, line):
  assert one_line(error) == line


def test_evaluating_what_was_never_trained(tmp_path):
  with pytest.raises(UserError, match='no checkpoint in work directory'):
    trained.evaluate_run(config(tmp_path), tmp_path / 'run')
  assert list(tmp_path.iterdir()) == []


CASES = [
  (stem, given)
  for stem, options in OPTIONS.items()
  for size in range(len(options) + 1)
  for given in itertools.combinations(options, size)
]


@pytest.mark.parametrize(('stem', 'given'), CASES)
def test_every_configuration_means_something(stem, given):
  module = importlib.import_module(f'configs.{stem}')
  c = module.get_config(','.join(given))
  assert c.name == '-'.join([stem, *given])
  assert ('tiny' in given) == (c.model.width < 1)
  assert ('procedural' in given) == bool(c.data.procedural_images)
  coefficient = 'learned' if 'meta' in stem else 'fixed' if 'fixed' in given else 'none'
  assert c.sparsity.coefficient == coefficient
  labels = data.labels(c.data.name)
  experiment.build(c, labels)
  run._check_batch(c, 1)
  text = ConfigDict(c).to_json_best_effort()
  assert 'Unserializable' not in text


def test_small_settings_warm_their_step_size_up():
  c = importlib.import_module('configs.camvid_meta').get_config('tiny')
  c.train.steps = 200
  fields = c.optimizer[0].learning_rate.to_dict()
  schedule = getattr(optax, fields.pop('name'))(**fields)
  assert schedule(0) == 0
  np.testing.assert_allclose([schedule(5), schedule(10)], [1e-3, 2e-3], rtol=1e-6)
  assert schedule(11) < schedule(10)
  np.testing.assert_allclose(schedule(200), 0, atol=1e-9)


@pytest.mark.parametrize('field', ['optimizer', 'holdout', 'budget', 'tolerance'])
def test_a_schedule_does_not_set_the_number_of_steps(field):
  c = importlib.import_module('configs.camvid_meta').get_config('tiny')
  entries = c.optimizer if field == 'optimizer' else c.sparsity.optimizers[field]
  (schedule,) = [e.learning_rate for e in entries if 'learning_rate' in e]
  (length,) = {'decay_steps', 'transition_steps'} & set(schedule)
  c.train.steps = 50
  assert schedule[length] == 50
  schedule[length] = 7
  assert c.train.steps == 50


@pytest.mark.parametrize('stem', OPTIONS)
def test_every_configuration_says_how_it_is_run(stem):
  module = importlib.import_module(f'configs.{stem}')
  assert f'python launch.py --config configs/{stem}.py' in module.__doc__
  with pytest.raises(ValueError, match='unknown option tinny'):
    module.get_config('tinny')


def test_all_configurations_are_known_here():
  found = {p.stem for p in (ROOT / 'configs').glob('*.py')}
  assert found - {'__init__', 'common'} == OPTIONS.keys()


def test_defaults_are_the_published_settings():
  c = importlib.import_module('configs.celeba_multitask').get_config()
  assert c.data.image_size == (256, 256)
  assert c.model.depth == 50
  assert c.model.width == 1.0
  assert c.train.batch_size == 32
  (adamw,) = c.optimizer
  assert adamw.name == 'adamw'
  assert adamw.learning_rate == 1e-4
  assert adamw.weight_decay == 0.1
