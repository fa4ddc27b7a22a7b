"""Metrics against brute force, over uneven batches with padding."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from msp import metrics
from msp.errors import UserError

N, H, W = 11, 12, 16
CLASSES = ('sky', 'road', 'car', 'tree', 'never')


def batches(logits, label, pad=2):
  """Three uneven batches; each ends with `pad` rows of plausible nonsense."""
  for start, stop in ((0, 5), (5, 6), (6, N)):
    extend = lambda x, s=slice(start, stop): np.concatenate([x[s], x[:pad]])
    valid = np.arange(stop - start + pad) < stop - start
    yield extend(logits), extend(label), valid


def over_split(update, compute, logits, label):
  """The metrics, after checking that how the split is batched plays no part."""
  update = jax.jit(update)
  whole = compute([jax.device_get(update(logits, label, np.ones(N, bool)))])
  parts = compute([jax.device_get(update(*b)) for b in batches(logits, label)])
  assert whole.keys() == parts.keys()
  for name, value in whole.items():
    assert parts[name] == pytest.approx(value, rel=1e-6), name
    assert type(value) is float
  return whole


def segmentation_data():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(N, H, W, 5)).astype(np.float32)
  logits[..., 4] = -100  # neither predicted nor labelled: no union
  label = rng.integers(0, 3, size=(N, H, W)).astype(np.int32)
  label[:, :3] = 255
  label[4] = 255  # an image without a label
  # Half of the pixels right; class 3 is predicted but never labelled.
  right = rng.random((N, H, W)) < 0.5
  logits += 10 * right[..., None] * (label[..., None] == np.arange(5))
  return logits, label


segmentation = functools.partial(
  over_split,
  metrics.segmentation_update,
  functools.partial(metrics.segmentation_compute, classes=CLASSES),
)


def test_segmentation():
  logits, label = segmentation_data()
  got = segmentation(logits, label)
  mask = label != 255
  predicted = logits.argmax(-1)
  iou = {}
  for c, name in enumerate(CLASSES):
    a, b = (predicted == c) & mask, (label == c) & mask
    if (a | b).any():
      iou[f'iou/{name}'] = (a & b).sum() / (a | b).sum()
  assert list(iou) == ['iou/sky', 'iou/road', 'iou/car', 'iou/tree']
  assert iou['iou/tree'] == 0
  by_image = []
  for p, y, m in zip(predicted, label, mask, strict=True):
    tp = sum(((p == c) & (y == c) & m).sum() for c in range(5))
    fp = sum(((p == c) & (y != c) & m).sum() for c in range(5))
    fn = sum(((p != c) & (y == c) & m).sum() for c in range(5))
    if m.any():
      by_image.append(tp / (tp + fp + fn))
  want = {
    'miou': np.mean(list(iou.values())),
    'pixel_accuracy': (predicted == label)[mask].mean(),
    'micro_iou_imagewise': np.mean(by_image),
    **iou,
  }
  assert got == pytest.approx(want, rel=1e-6)
  assert len(by_image) == N - 1


def test_segmentation_at_label_resolution():
  # 2 × 2 logits whose bilinear picture has its border at a quarter of the width:
  # z₀ − z₁ runs from 3 to −1 between the centres of the two columns.
  logits = np.zeros((N, 2, 2, 2), np.float32)
  logits[:, :, 0, 0], logits[:, :, 1, 1] = 1, 3
  label = np.ones((N, 8, 8), np.int32)
  label[:, :, :3] = 0
  got = over_split(
    metrics.segmentation_update,
    functools.partial(metrics.segmentation_compute, classes=('a', 'b')),
    logits,
    label,
  )
  # Column j sits at (j + ½)/4 − ½; class 0 wins while 1 − x > 3x, i.e. x < ¼: j ≤ 2.
  assert got['pixel_accuracy'] == 1


def edges_data():
  rng = np.random.default_rng(1)
  label = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.65, 0.15], size=(N, H, W))
  logits = rng.normal(size=(N, H, W, 1)) + 1.5 * (label == 1)[..., None]
  return logits.astype(np.float32), label.astype(np.float32)


edges = functools.partial(over_split, metrics.edges_update, metrics.edges_compute)


def test_edges():
  logits, label = edges_data()
  got = edges(logits, label)
  p = np.asarray(jax.nn.sigmoid(logits[..., 0]))[label >= 0]
  y = label[label >= 0]
  scores = {}
  for k in range(1, 100):
    decision = p >= np.float32(k / 100)
    tp = (decision & (y == 1)).sum()
    scores[k / 100] = 2 * tp / (decision.sum() + (y == 1).sum())
  best = max(scores, key=scores.get)
  want = {'mae': np.abs(p - y).mean(), 'f1': scores[best], 'f1_threshold': best}
  assert got == pytest.approx(want, rel=1e-6)
  assert 0.2 < best < 0.8


def test_edges_of_saturated_logits():
  label = (np.arange(N * H * W).reshape(N, H, W) % 5 == 0).astype(np.float32)
  logits = 1e3 * (2 * label[..., None] - 1)
  got = edges(logits, label)
  assert got == {'mae': 0.0, 'f1': 1.0, 'f1_threshold': 0.01}


def attribute_data():
  rng = np.random.default_rng(2)
  label = (np.arange(N) % 3 == 0).astype(np.int32)
  # Few values, so that scores tie within and across classes; 0 is p = ½.
  score = rng.integers(-2, 3, size=N) + label
  return score[:, None].astype(np.float32), label


attribute = functools.partial(
  over_split, metrics.attribute_update, metrics.attribute_compute
)


def test_attribute():
  logits, label = attribute_data()
  got = attribute(logits, label)
  z, y = logits[:, 0], label == 1
  p = 1 / (1 + np.exp(-z))
  decision = p >= 0.5
  wins = [(a > b) + 0.5 * (a == b) for a in z[y] for b in z[~y]]
  assert 0.5 in wins
  precision, recall = y[decision].mean(), decision[y].mean()
  want = {
    'accuracy': (decision == y).mean(),
    'balanced_accuracy': (recall + (~decision)[~y].mean()) / 2,
    'f1': 2 * precision * recall / (precision + recall),
    'auroc': np.mean(wins),
  }
  assert got == pytest.approx(want, rel=1e-6)


def test_undefined_metrics_are_left_out():
  logits, label = segmentation_data()
  assert segmentation(logits, np.full_like(label, 255)) == {}
  logits, label = edges_data()
  assert edges(logits, np.full_like(label, -1)) == {}
  assert list(edges(logits, np.minimum(label, 0))) == ['mae']
  logits, label = attribute_data()
  zeros = np.zeros_like(label)
  assert list(attribute(logits, zeros)) == ['accuracy', 'f1']
  assert attribute(-np.abs(logits) - 1, zeros) == {'accuracy': 1.0}
  nothing = metrics.attribute_update(logits, label, np.zeros(N, bool))
  assert metrics.attribute_compute([nothing]) == {}


@pytest.mark.parametrize('kind', ['segmentation', 'edges', 'attribute'])
def test_no_batches(kind):
  compute = getattr(metrics, f'{kind}_compute')
  extra = {'classes': CLASSES} if kind == 'segmentation' else {}
  assert compute([], **extra) == {}


class Task(NamedTuple):
  primary: str
  higher_is_better: bool


TASKS = {'seg': Task('miou', True), 'depth': Task('rmse', False)}


def depth_data():
  rng = np.random.default_rng(5)
  label = rng.uniform(0.4, 11, size=(N, H, W)).astype(np.float32)
  label[:, 2:4] = 0
  label[3] = 0  # an image without a measurement
  z = np.log(label / np.maximum(10.5 - label, 0.1) + 1e-3)
  logits = z + rng.normal(scale=0.3, size=z.shape)
  return logits[..., None].astype(np.float32), label


def test_depth():
  logits, label = depth_data()
  got = over_split(metrics.depth_update, metrics.depth_compute, logits, label)
  mask = label > 0
  p, d = (10 / (1 + np.exp(-logits[..., 0].astype(float))))[mask], label[mask]
  want = {
    'rmse': np.sqrt(np.mean((p - d) ** 2)),
    'mae': np.mean(np.abs(p - d)),
    'abs_rel': np.mean(np.abs(p - d) / d),
    'delta_1.25': np.mean(np.maximum(p / d, d / p) < 1.25),
    'images_without_label': 1,
  }
  assert got == pytest.approx(want, rel=1e-5)
  assert 0.2 < got['delta_1.25'] < 0.95


def normals_data():
  rng = np.random.default_rng(6)
  label = rng.normal(size=(N, H, W, 3))
  label[0, 0, 0] = 0, 0, -1
  label /= np.linalg.norm(label, axis=-1, keepdims=True)
  logits = np.arctanh(0.9 * label) + rng.normal(scale=0.3, size=label.shape)
  logits[1] = 0.1 * label[1]  # ties: exactly right
  label[:, 5] = label[6] = 0
  return logits.astype(np.float32), label.astype(np.float32)


def test_normals():
  logits, label = normals_data()
  got = over_split(metrics.normals_update, metrics.normals_compute, logits, label)
  mask = np.linalg.norm(label, axis=-1) > 0.5
  t = np.tanh(logits[mask].astype(float))
  cosine = (t * label[mask]).sum(-1) / np.linalg.norm(t, axis=-1)
  angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
  want = {
    'mean_angle': angle.mean(),
    'rmse_angle': np.sqrt(np.mean(angle**2)),
    **{f'within_{a:g}': np.mean(angle < a) for a in (11.25, 22.5, 30)},
    'images_without_label': 1,
  }
  median = got.pop('median_angle')
  assert got == pytest.approx(want, rel=1e-3)
  assert median == pytest.approx(np.sort(angle)[(angle.size - 1) // 2], abs=0.051)


@pytest.mark.parametrize('kind', ['depth', 'normals'])
def test_a_split_without_any_measurement_has_no_metric(kind):
  """Never NaN: what is not defined is left out."""
  update, compute, data = {
    'depth': (metrics.depth_update, metrics.depth_compute, depth_data),
    'normals': (metrics.normals_update, metrics.normals_compute, normals_data),
  }[kind]
  logits, label = data()
  one = jax.device_get(update(logits, 0 * label, np.ones(N, bool)))
  assert compute([one]) == {'images_without_label': N}
  assert compute([]) == {}


def test_no_direction_is_no_right_one():
  logits, label = normals_data()
  one = metrics.normals_update(0 * logits, label, np.ones(N, bool))
  got = metrics.normals_compute([jax.device_get(one)])
  assert got['mean_angle'] == pytest.approx(90)
  assert got['within_30'] == 0


def test_delta_m():
  baseline = {'seg/miou': 0.5, 'depth/rmse': 2.0, 'seg/pixel_accuracy': 0.1}
  results = {'seg/miou': 0.6, 'depth/rmse': 2.1, 'seg/pixel_accuracy': 0.9}
  assert metrics.delta_m(results, baseline, TASKS) == pytest.approx((20 - 5) / 2)
  assert metrics.delta_m(baseline, baseline, TASKS) == 0


def test_delta_m_errors():
  baseline = {'seg/miou': 0.5, 'depth/rmse': 2.0}
  with pytest.raises(UserError, match=r'the results have no depth/rmse'):
    metrics.delta_m({'seg/miou': 0.5}, baseline, TASKS)
  with pytest.raises(UserError, match=r'seg/miou of the baseline is 0'):
    metrics.delta_m(baseline, {**baseline, 'seg/miou': 0.0}, TASKS)
