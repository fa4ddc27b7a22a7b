"""Tasks: what `make` puts together, at which resolution, and what it refuses."""

import jax
import numpy as np
import pytest

from data import Label
from msp import evaluate, losses, metrics, resize, tasks
from msp.errors import UserError

B, H, W = 3, 16, 24
LOW = (2, 3)


LABELS = {
  'segmentation': Label('segmentation', ('background', 'hair', 'skin')),
  'edges': Label('edges', ('edge',)),
  'smiling': Label('attribute', ('no', 'yes')),
  'depth': Label('depth', ('depth',)),
  'normals': Label('normals', ('normal',)),
  'height': Label('surface', ('metres',)),
}
VALID = np.array([True, True, False])


def batch(kind, seed=0):
  """Logits of a head, and labels with pixels to ignore."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  if kind == 'attribute':
    return normal(B, 1), rng.integers(0, 2, B).astype(np.int32)
  if kind == 'edges':
    label = rng.choice([-1.0, 0.0, 1.0], p=[0.3, 0.69, 0.01], size=(B, H, W))
    return normal(B, *LOW, 1), label.astype(np.float32)
  if kind == 'depth':
    label = rng.choice([0.0, 1.0, 2.5, 9.0], size=(B, H, W))
    return normal(B, *LOW, 1), label.astype(np.float32)
  if kind == 'normals':
    label = normal(B, H, W, 3)
    return normal(B, *LOW, 3), label / np.linalg.norm(label, axis=-1, keepdims=True)
  label = rng.integers(0, 4, (B, H, W)).astype(np.int32)
  label[label == 3] = 255
  return normal(B, *LOW, 3), label


@pytest.fixture(params=['segmentation', 'edges', 'depth', 'normals', 'smiling'])
def name(request):
  return request.param


def test_fields(name):
  names = ['smiling', 'edges', 'normals', 'depth', 'segmentation']
  made = tasks.make(names, LABELS)
  assert list(made) == names
  task = made[name]
  assert (task.name, task.kind) == (name, LABELS[name].kind)
  outputs = 3 if name in ('segmentation', 'normals') else 1
  head = 'classification' if name == 'smiling' else 'dense'
  assert (task.outputs, task.head) == (outputs, head)


def test_update_and_compute_give_the_primary_metric(name):
  task = tasks.make([name], LABELS)[name]
  updates = []
  for seed in range(3):
    logits, label = batch(task.kind, seed)
    updates.append(jax.device_get(jax.jit(task.update)(logits, label, VALID)))
  result = task.compute(updates)
  worst = {'depth': 10, 'normals': 180}.get(name, 1)
  assert 0 <= result[task.primary] <= worst
  assert task.higher_is_better == (worst == 1)


def test_loss_at_output_resolution_brings_labels_down():
  for name, function in (
    ('segmentation', losses.cross_entropy),
    ('depth', losses.squared_depth),
    ('normals', losses.cosine_normals),
  ):
    logits, label = batch(name)
    want = function(logits, label[:, 4::8, 4::8], VALID)
    task = tasks.make([name], LABELS)[name]
    np.testing.assert_allclose(task.loss(logits, label, VALID), want, rtol=1e-6)


def test_loss_at_label_resolution_brings_logits_up():
  make = lambda name: tasks.make([name], LABELS, loss_resolution='label')[name]
  logits, label = batch('segmentation')
  up = resize.bilinear(logits, (H, W))
  want = losses.cross_entropy(up, label, VALID)
  np.testing.assert_allclose(
    make('segmentation').loss(logits, label, VALID), want, rtol=1e-6
  )


@pytest.mark.parametrize('resolution', ['output', 'label'])
@pytest.mark.parametrize('edge_loss', tasks.EDGE_LOSSES)
def test_edges_are_compared_where_they_are_thin(resolution, edge_loss):
  logits, label = batch('edges')
  task = tasks.make(['edges'], LABELS, loss_resolution=resolution, edge_loss=edge_loss)[
    'edges'
  ]
  up = resize.bilinear(logits, (H, W))
  want = tasks.EDGE_LOSSES[edge_loss](up, label, VALID)
  np.testing.assert_allclose(task.loss(logits, label, VALID), want, rtol=1e-6)
  assert task.count(logits, label, VALID) == losses.count(label >= 0, VALID)


def test_predictions_have_the_shape_of_the_label(name):
  task = tasks.make([name], LABELS)[name]
  logits, label = batch(task.kind)
  got = np.asarray(task.predict(logits, label.shape))
  assert got.shape == label.shape
  if task.kind == 'segmentation':
    assert got.dtype == np.int32
    update = metrics.segmentation_update(logits, label, VALID)
    keep = (label != 255) & VALID[:, None, None]
    np.testing.assert_array_equal(update['predicted'], np.bincount(got[keep]))
  elif task.kind == 'normals':
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-5)
  else:
    assert got.dtype == np.float32
    if task.kind == 'depth':
      got = got / 10
    assert 0 < got.min() < got.max() < 1
    if task.kind == 'attribute':
      np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-6)


def test_gradient_of_a_loss_reaches_the_logits_through_jit(name):
  task = tasks.make([name], LABELS, loss_resolution='label')[name]
  logits, label = batch(task.kind)
  gradient = jax.jit(jax.grad(task.loss))(logits, label, VALID)
  assert np.all(np.isfinite(gradient))
  assert np.any(np.asarray(gradient)[0] != 0)
  assert np.all(np.asarray(gradient)[2] == 0)


@pytest.mark.parametrize(
  ('names', 'options', 'message'),
  [
    (['smilng'], {}, r"task 'smilng'; did you mean 'smiling'\? known: segmentation"),
    (['zzz'], {}, r"unknown task 'zzz'; known: segmentation, edges, smiling"),
    (['height'], {}, r"kind of task 'height' 'surface'; .*known: segmentation, edges"),
    ([], {}, r'no tasks given; this data set has: segmentation'),
    (['edges', 'edges'], {}, r"task 'edges' is listed twice"),
    (['edges'], {'loss_resolution': 'lable'}, r"did you mean 'label'\?"),
    (['edges'], {'edge_loss': 'focal'}, r'known: huber, balanced'),
    (['depth'], {'depth_loss': 'berhu'}, r'known: squared, combined'),
  ],
)
def test_mistakes_get_one_line(names, options, message):
  with pytest.raises(UserError, match=message) as caught:
    tasks.make(names, LABELS, **options)
  assert '\n' not in str(caught.value)


def test_a_head_that_always_says_the_same_is_named(caplog):
  task = tasks.make(['smiling'], LABELS)['smiling']
  label = np.arange(6) % 2

  def warnings(logits):
    caplog.clear()
    update = task.update(logits, label, np.arange(6) < 5)
    part = {'smiling': {'loss': 1.0, 'count': 5.0, 'update': update}}
    evaluate.evaluate(lambda *_: part, {'smiling': task}, {}, {}, [None, None])
    return caplog.messages

  dead = np.full((6, 1), -0.25, np.float32)
  dead[5] = 3.0  # not valid
  (message,) = warnings(dead)
  assert message.startswith('smiling: every image gets the same answer (logit -0.250)')
  dead[4] += 1e-6
  assert warnings(dead) == []
