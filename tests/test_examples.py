"""The examples as a user runs them; data sets and transforms of one's own."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError
from msp import optimizers
from msp.errors import UserError

EXAMPLES = Path(__file__).parents[1] / 'examples'


def test_lambda_of_a_model_of_ones_own_forgets_its_start(capsys):
  runpy.run_path(str(EXAMPLES / 'own_model.py'))
  _, *learned, without = capsys.readouterr().out.splitlines()
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
