"""Evaluation: every image once, every label alike, however they come in batches."""

import jax
import numpy as np
import pytest

from msp import evaluate, tasks
from msp.models import multitask
from tests.test_tasks import LABELS

NAMES = ('segmentation', 'depth', 'smiling')
COUNT, SIZE = 10, (16, 24)


@pytest.fixture(scope='module')
def network():
  made = tasks.make(NAMES, LABELS, loss_resolution='label')
  model = multitask.build(
    {name: (task.head, task.outputs) for name, task in made.items()},
    blocks=(1, 1, 1, 1),
    block='basic',
    width=0.125,
    head_features=16,
    dropout=0.0,
  )
  init = jax.jit(lambda key: multitask.init(model, key, (*SIZE, 3)))
  return model, made, *init(jax.random.key(0))


@pytest.fixture(scope='module')
def images():
  """Ten images whose numbers of labels differ, all labels by which they are known."""
  rng = np.random.default_rng(0)
  segmentation = rng.integers(0, 3, (COUNT, *SIZE)).astype(np.int32)
  depth = rng.uniform(0.5, 9.5, (COUNT, *SIZE)).astype(np.float32)
  for i in range(COUNT):  # the last has one pixel of each row, if any
    segmentation[i, :, 2 * (COUNT - i) :] = 255
    depth[i, i:, :] = 0
  depth[0] = 0  # no measurement at all
  smiling = rng.integers(0, 2, COUNT).astype(np.int32)
  smiling[3] = 255
  image = rng.random((COUNT, *SIZE, 3), np.float32)
  valid = np.ones(COUNT, bool)
  return dict(
    image=image, valid=valid, segmentation=segmentation, depth=depth, smiling=smiling
  )


def batches(images, size):
  """As `data.eval_batches`: the last is filled up, here with nonsense."""
  for start in range(0, COUNT, size):
    rows = {name: x[start : start + size] for name, x in images.items()}
    missing = size - len(rows['image'])
    filler = {
      'image': np.full((missing, *SIZE, 3), 9, np.float32),
      'valid': np.zeros(missing, bool),
      'segmentation': np.ones((missing, *SIZE), np.int32),
      'depth': np.full((missing, *SIZE), 0.01, np.float32),
      'smiling': np.ones(missing, np.int32),
    }
    yield {name: np.concatenate([x, filler[name]]) for name, x in rows.items()}


@pytest.fixture(scope='module')
def measure(network):
  model, made, params, stats = network
  step = jax.jit(evaluate.make_eval_step(model, made))
  return lambda given: evaluate.evaluate(step, made, params, stats, given)


def test_metrics_are_those_of_all_images_and_of_no_other(network, images, measure):
  model, made, params, stats = network
  logits, _ = multitask.apply(model, params, stats, images['image'], train=False)
  answers = {
    name: np.asarray(task.predict(logits[name], images[name].shape))
    for name, task in made.items()
  }
  got = measure(batches(images, 4))

  label, predicted = images['segmentation'], answers['segmentation']
  known = label != 255
  of_class = lambda c: ((predicted == c) & known, (label == c) & known)
  iou = [np.sum(p & y) / np.sum(p | y) for p, y in map(of_class, range(3))]
  np.testing.assert_allclose(got['segmentation/miou'], np.mean(iou), rtol=1e-5)

  known = images['depth'] > 0
  error = (answers['depth'] - images['depth'])[known]
  rmse = np.sqrt(np.mean(np.square(error, dtype=np.float64)))
  np.testing.assert_allclose(got['depth/rmse'], rmse, rtol=1e-5)

  label, smiles = images['smiling'], answers['smiling'] > 0.5
  accuracy = np.mean([np.mean(smiles[label == y] == y) for y in (0, 1)])
  np.testing.assert_allclose(got['smiling/balanced_accuracy'], accuracy, rtol=1e-5)

  score = np.mean([np.log(np.mean(iou)), -np.log(rmse), np.log(accuracy)])
  np.testing.assert_allclose(got['score'], score, rtol=1e-4)


@pytest.mark.parametrize('size', [1, 4])
def test_a_label_counts_alike_in_every_batch(images, measure, size):
  got, want = measure(batches(images, size)), measure(batches(images, COUNT))
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


def test_a_metric_of_0_has_a_score(network, images, measure):
  model, made, params, stats = network
  logits, _ = multitask.apply(model, params, stats, images['image'], train=False)
  predicted = made['segmentation'].predict(
    logits['segmentation'], images['segmentation'].shape
  )
  wrong = {**images, 'segmentation': (np.asarray(predicted) + 1) % 3}
  wrong |= {'depth': 0 * images['depth'], 'smiling': 0 * images['smiling'] + 255}
  got = measure(batches(wrong, 4))
  assert got['segmentation/miou'] == 0
  np.testing.assert_allclose(got['score'], np.log(evaluate.SMALLEST))


def test_what_has_no_label_has_no_metric(images, measure):
  without = {**images, 'depth': np.zeros_like(images['depth'])}
  got = measure(batches(without, 4))
  assert 'depth/rmse' not in got
  assert 'loss/depth' not in got
  whole = measure(batches(images, 4))
  for name in ('segmentation/miou', 'loss/segmentation', 'smiling/balanced_accuracy'):
    assert got[name] == whole[name]
