"""The examples as a user runs them; data sets and transforms of one's own."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import data
from data import DataError
from msp import experiment, optimizers
from msp.errors import UserError

EXAMPLES = Path(__file__).parents[1] / 'examples'


def test_lambda_of_a_model_of_ones_own_forgets_its_start():
  # By the command in its first lines: this process has a path of its own.
  source = (EXAMPLES / 'own_model.py').read_text()
  (command,) = re.findall(r'^  python (-m \S+)$', source, flags=re.MULTILINE)
  out = subprocess.run(
    [sys.executable, *command.split()],
    cwd=EXAMPLES.parent,
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  _, *learned, without = out.splitlines()
  assert len(learned) == 3
  ends = [float(line.split()[1]) for line in learned]
  assert max(ends) / min(ends) < 1.5
  for line in learned:
    assert '[0, 1, 2, 3' in line  # the inputs that matter
    assert float(line.split()[2]) < 0.5 * float(without.split()[2])
    assert 60 < float(line.split()[3].rstrip('%')) < 95


def test_the_snippet_of_the_readme(capsys):
  text = (EXAMPLES.parent / 'README.md').read_text()
  (snippet,) = re.findall(r'```python\n(.*?)```', text, flags=re.DOTALL)
  exec(snippet, {})
  out = capsys.readouterr().out
  assert float(out) == pytest.approx(2 / 52)  # the two weakest inputs


@pytest.fixture
def own(tmp_path):
  """Files of `examples.own_data`: persons on the left."""
  for split, count in (('train', 5), ('val', 1), ('test', 2)):
    (tmp_path / split).mkdir()
    for i in range(count):
      classes = np.zeros((6, 8), np.uint8)
      classes[:, :4], classes[0, 7] = i % 2, 255
      Image.new('RGB', (8, 6), (255, 0, 0)).save(tmp_path / split / f'{i}.jpg')
      Image.fromarray(classes).save(tmp_path / split / f'{i}.png')
  return tmp_path


def test_a_data_set_of_ones_own(own, tmp_path):
  name, size = 'examples.own_data', (6, 8)
  data.prepare(name, own, tmp_path / 'prepared', size, progress=False)
  parts = data.open(name, tmp_path / 'prepared', size, 0.4)
  assert [len(part) for part in parts] == [3, 2, 1, 2]
  (batch,) = data.eval_batches(parts.test, ['segmentation', 'person'], batch_size=2)
  assert np.array_equal(batch['person'], [0, 1])
  assert np.array_equal(np.unique(batch['segmentation'][1]), [0, 1, 255])
  assert batch['image'].shape == (2, 6, 8, 3)
  assert data.terms(name)


def snippets_of(document):
  """File name -> Python text of a document, of those that name a file."""
  blocks = re.findall(r'```python\n(# (\S+?\.py).*?)```', document, flags=re.DOTALL)
  return {name: text for text, name in blocks}


@pytest.fixture
def extending(tmp_path, monkeypatch):
  """The files of docs/extending.md."""
  text = (EXAMPLES.parent / 'docs' / 'extending.md').read_text()
  for name, code in snippets_of(text).items():
    (tmp_path / Path(name).name).write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def test_the_configuration_with_a_transform_of_ones_own(extending):
  config = importlib.import_module('my_faces').get_config('procedural,tiny')
  tx = optimizers.build(config.optimizer, 'optimizer')
  params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
  grads = {'kernel': jnp.arange(6.0).reshape(3, 2), 'bias': jnp.ones(2)}
  updates, _ = tx.update(grads, tx.init(params), params)
  rows = np.array([-2.0, 0, 2])
  np.testing.assert_allclose(updates['kernel'], -0.1 * np.stack([rows, rows], 1))
  np.testing.assert_allclose(updates['bias'], -0.1)
  experiment.build(config, data.labels(config.data.name))


def test_a_penalty_of_ones_own(extending):
  kind = optimizers.penalty('my_penalties:log_sum', {'gamma': 0.5}, 'sparsity.penalty')
  x = jax.random.normal(jax.random.key(0), (4, 3, 5))
  norms = np.sqrt(np.square(x).sum((0, 2)))
  # ½‖z − x‖² + t‖z‖ is least at x max(1 − t/‖x‖, 0).
  t = 0.1 * 2.0 * np.sqrt(20) / (1 + norms / 0.5)
  expected = np.asarray(x) * np.maximum(1 - t / norms, 0)[:, None]
  plain = kind.prox(x, 0.1, 2.0, 1)
  np.testing.assert_allclose(plain, expected, rtol=1e-5)
  weighted = kind.prox_weighted({'a': x}, {'a': jnp.ones_like(x)}, 0.1, {'a': 2.0}, 1)
  np.testing.assert_allclose(weighted['a'], expected, rtol=1e-4, atol=1e-6)
  config = importlib.import_module('configs.celeba_meta').get_config('tiny')
  config.sparsity.penalty = 'my_penalties:log_sum'
  experiment.build(config, data.labels(config.data.name))


def test_a_penalty_of_ones_own_that_is_none(extending):
  (extending / 'no_penalty.py').write_text(
    'from msp import Penalty\n'
    'def f(gamma=1.0):\n  return gamma\n'
    'def g4():\n  one = lambda x, step, lam, axis: x\n  return Penalty(one, one)\n'
    'def sum():\n  return Penalty(lambda x, *_: x.sum(), lambda x, *_: x)\n'
  )
  importlib.invalidate_caches()
  for name, options, message in (
    ('no_penalty:f', {}, "'no_penalty:f' returned a float, not an msp.Penalty"),
    ('no_penalty:f', {'a': 2.0}, r'no_penalty:f cannot take .*; it takes gamma'),
    ('no_penalty:g', {}, "cannot be imported: .*no attribute 'g'"),
    ('no_penalty:g4', {}, r'is no penalty of .*TypeError: .*positional.*:\d+\)'),
    ('no_penalty:sum', {}, 'the result has to have the shape of its argument'),
    ('no_penalty:', {}, 'is a module; it has to be a function that returns an msp'),
  ):
    with pytest.raises(UserError, match='sparsity.penalty: .*' + message):
      optimizers.penalty(name, options, 'sparsity.penalty')


def test_a_module_that_is_no_data_set():
  with pytest.raises(DataError, match='module numpy is no data set: it has no LABELS'):
    data.labels('numpy')
  for name in ('examples.own_dat', '', '.own'):
    with pytest.raises(DataError, match=f"unknown data set '{name}', known: celeba"):
      data.labels(name)


def test_a_transform_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / 'own_transforms.py').write_text(
    'import optax\ndef halve(rate):\n  return optax.scale(-0.5 * rate)\n'
  )
  (tmp_path / 'wrong_syntax.py').write_text('def f(:')
  (tmp_path / 'wrong_name.py').write_text('import optax\nnothing()')
  monkeypatch.syspath_prepend(tmp_path)
  tx = optimizers.build([{'name': 'own_transforms:halve', 'rate': 3.0}], 'optimizer')
  updates, _ = tx.update(np.ones(2), tx.init(np.ones(2)))
  np.testing.assert_allclose(updates, -1.5)
  for name, message in (
    ('own_transforms:third', "cannot be imported: .*no attribute 'third'"),
    ('own_transform:halve', "cannot be imported: No module named 'own_transform'"),
    ('own_transforms:', 'is a module; it has to be a function that returns a'),
    ('own_transforms:optax', 'is a module; it has to be a function that returns a'),
    ('wrong_syntax:f', r'cannot be imported: .*wrong_syntax\.py, line 1: '),
    ('wrong_name:f', r'NameError: .*nothing.* \(.*wrong_name\.py:2\)'),
  ):
    with pytest.raises(UserError, match=message):
      optimizers.build([{'name': name, 'rate': 3.0}], 'optimizer')
