"""Losses against loops in NumPy, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from msp import losses
from msp.errors import UserError

VALID = np.array([True, False, True])


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def dense(outputs, dtype=np.float64):
  """Logits, labels with every kind of invalid pixel, and which examples count."""
  rng = np.random.default_rng(outputs)
  logits = rng.normal(scale=2, size=(3, 4, 5, outputs)).astype(dtype)
  label = rng.integers(0, outputs, size=(3, 4, 5)).astype(np.int32)
  label[0, 0, :3] = 255
  return logits, label, VALID


def edge_maps(dtype=np.float64):
  rng = np.random.default_rng(7)
  logits = rng.normal(scale=2, size=(3, 4, 5, 1)).astype(dtype)
  label = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.6, 0.2], size=(3, 4, 5))
  return logits, label.astype(np.float32), VALID


def binary(dtype=np.float64):
  logits = np.array([[0.3], [8.0], [-2.0]], dtype)
  return logits, np.array([1, 0, 1], np.int32), VALID


def depths(dtype=np.float64):
  rng = np.random.default_rng(8)
  logits = rng.normal(size=(3, 6, 7, 1)).astype(dtype)
  label = rng.uniform(0.5, 12, size=(3, 6, 7))
  label[0, 1, 1] = label[2, 5] = 0
  return logits, label.astype(np.float32), VALID


def normal_maps(dtype=np.float64):
  rng = np.random.default_rng(9)
  logits = rng.normal(size=(3, 4, 5, 3)).astype(dtype)
  label = rng.normal(size=(3, 4, 5, 3))
  label[0, 0, 0] = 0, 0, -1  # no component above 0, and yet a normal
  label /= np.linalg.norm(label, axis=-1, keepdims=True)
  label[0, 1] = label[2, 2, 2] = 0
  return logits, label.astype(np.float32), VALID


CASES = {
  'cross_entropy': (losses.cross_entropy, functools.partial(dense, 4)),
  'binary': (losses.binary_cross_entropy, binary),
  'huber': (losses.huber_edges, edge_maps),
  'balanced': (losses.balanced_edges, edge_maps),
  'squared_depth': (losses.squared_depth, depths),
  'combined_depth': (losses.combined_depth, depths),
  'normals': (losses.cosine_normals, normal_maps),
}


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_cross_entropy(smoothing):
  logits, label, valid = dense(4)
  terms = []
  for b in np.flatnonzero(valid):
    for z, y in zip(logits[b].reshape(-1, 4), label[b].reshape(-1), strict=True):
      if y != 255:
        log_p = np.log(np.exp(z) / np.exp(z).sum())
        terms.append(-(1 - smoothing) * log_p[y] - smoothing / 4 * log_p.sum())
  assert len(terms) == 37
  got = losses.cross_entropy(logits, label, valid, smoothing=smoothing)
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-12)


def test_binary_cross_entropy():
  want = np.mean([np.log(1 + np.exp(-0.3)), np.log(1 + np.exp(2.0))])
  got = losses.binary_cross_entropy(*binary())
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_edge_losses():
  logits, label, valid = edge_maps()
  p = 1 / (1 + np.exp(-logits[valid, ..., 0]))
  y = label[valid]
  error = np.abs(p - y)[y >= 0]
  assert error.min() < 0.2 < error.max()
  huber = np.where(error <= 0.2, error**2 / 2, 0.2 * (error - 0.1))
  got = losses.huber_edges(logits, label, valid)
  np.testing.assert_allclose(got, huber.mean(), rtol=1e-12)
  balanced = -(np.log(p[y == 1]).mean() + np.log(1 - p[y == 0]).mean()) / 2
  got = losses.balanced_edges(logits, label, valid)
  np.testing.assert_allclose(got, balanced, rtol=1e-12)


def test_depth():
  logits, label, valid = depths()
  p, d = 1 / (1 + np.exp(-logits[..., 0])), label.astype(float) / 10
  points, slopes = [], []
  for b in np.flatnonzero(valid):
    for i in range(6):
      for j in range(7):
        if d[b, i, j] > 0:
          points.append(p[b, i, j] - d[b, i, j])
        window = np.s_[b, i - 1 : i + 2, j - 1 : j + 2]
        if 0 < i < 5 and 0 < j < 6 and (d[window] > 0).all():
          x = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
          of = lambda m, w=window, x=x: np.array([(m[w] * x).sum(), (m[w] * x.T).sum()])
          a, b_ = of(p), of(d)
          normal = lambda g: np.array([*-g, 1]) / np.linalg.norm([*g, 1])
          slopes.append(
            np.log(1 + 2 * np.abs(a - b_)).sum() + 1 - normal(a) @ normal(b_)
          )
  got = losses.squared_depth(logits, label, valid)
  np.testing.assert_allclose(got, np.square(points).mean(), rtol=1e-6)
  want = np.log(1 + 2 * np.abs(points)).mean() + np.mean(slopes)
  np.testing.assert_allclose(
    losses.combined_depth(logits, label, valid), want, rtol=1e-6
  )
  # Perfect is 0: the ratio to a dense twin's loss is what `tolerance` bounds.
  inside = np.where(label < 10, label, 0)
  z = -np.log(10 / np.where(inside > 0, inside, 5) - 1)[..., None]
  assert abs(losses.combined_depth(z, inside, valid)) < 1e-6


def test_normals():
  logits, label, valid = normal_maps()
  angles = []
  for b in np.flatnonzero(valid):
    for z, n in zip(logits[b].reshape(-1, 3), label[b].reshape(-1, 3), strict=True):
      if np.linalg.norm(n) > 0:
        t = np.tanh(z)
        angles.append(1 - t @ n / np.linalg.norm(t))
  got = losses.cosine_normals(logits, label, valid)
  np.testing.assert_allclose(got, np.mean(angles), rtol=1e-6)
  assert len(angles) == 2 * 20 - 6
  zeros = jax.grad(losses.cosine_normals)(jnp.zeros_like(logits), label, valid)
  assert np.all(np.isfinite(zeros))


@pytest.mark.parametrize(('loss', 'make'), CASES.values(), ids=CASES)
def test_twice_differentiable_and_blind_to_invalid_examples(loss, make):
  logits, label, valid = make()
  label = jnp.asarray(label)
  f = lambda z: loss(z, label, valid)
  # Away from the joints of the Huber loss, whose second derivative jumps.
  check_grads(f, (jnp.asarray(logits),), order=2, eps=1e-6, atol=1e-5, rtol=1e-5)
  gradient = jax.grad(f)(jnp.asarray(logits))
  assert np.all(np.asarray(gradient)[1] == 0)
  assert np.any(np.asarray(gradient)[0] != 0)


@pytest.mark.parametrize(('loss', 'make'), CASES.values(), ids=CASES)
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_dtype_and_nothing_valid(loss, make, dtype):
  logits, label, valid = make(dtype=dtype)
  assert loss(jnp.asarray(logits), label, valid).dtype == dtype
  value, gradient = jax.value_and_grad(loss)(
    jnp.asarray(logits), jnp.asarray(label), np.zeros(3, bool)
  )
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(('loss', 'make'), CASES.values(), ids=CASES)
def test_extreme_logits_stay_finite(loss, make):
  logits, label, valid = make()
  value, gradient = jax.value_and_grad(loss)(
    jnp.asarray(1e4 * np.sign(logits), jnp.float32), jnp.asarray(label), valid
  )
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


def test_a_task_without_a_label_leaves_its_uncertainty_alone():
  total = lambda s: losses.combine(
    {'a': jnp.asarray(2.0), 'b': jnp.asarray(0.0)}, how='uncertainty', log_vars=s
  )
  slopes = jax.grad(total)({'a': jnp.asarray(0.3), 'b': jnp.asarray(0.5)})
  assert slopes['b'] == 0
  np.testing.assert_allclose(slopes['a'], 1 - 2 * np.exp(-0.3), rtol=1e-6)


LOSSES = {'a': 2.0, 'b': 0.5, 'c': 3.0}
LOG_VARS = {'a': 0.3, 'b': -0.2, 'c': 1.0}


def as_arrays(values):
  return {name: jnp.asarray(value) for name, value in values.items()}


def test_sum_and_fixed_weights():
  values = as_arrays(LOSSES)
  assert losses.combine(values) == 5.5
  weights = {'a': 1.0, 'b': 4.0, 'c': 0.5}
  assert losses.combine(values, None, 'fixed', weights=weights) == 5.5
  present = {'a': True, 'b': False, 'c': np.True_}
  assert losses.combine(values, present) == 5.0
  assert losses.combine({}, present) == 0


@pytest.mark.parametrize('traced', [False, True])
def test_uncertainty_weighting_and_absent_tasks(traced):
  present = {'a': True, 'b': False, 'c': True}

  def total(values, log_vars, flags):
    return losses.combine(values, flags, 'uncertainty', log_vars=log_vars)

  gradient = jax.value_and_grad(total, argnums=(0, 1))
  arguments = as_arrays(LOSSES), as_arrays(LOG_VARS)
  if traced:
    value, (by_loss, by_s) = jax.jit(gradient)(*arguments, as_arrays(present))
  else:
    value, (by_loss, by_s) = gradient(*arguments, present)
  want = sum(np.exp(-LOG_VARS[t]) * LOSSES[t] + LOG_VARS[t] for t in 'ac')
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for t in 'ac':
    np.testing.assert_allclose(by_loss[t], np.exp(-LOG_VARS[t]), rtol=1e-12)
    np.testing.assert_allclose(
      by_s[t], 1 - np.exp(-LOG_VARS[t]) * LOSSES[t], rtol=1e-12
    )
  assert by_loss['b'] == 0
  assert by_s['b'] == 0


def test_combination_errors():
  with pytest.raises(UserError, match=r"'mean'; known: sum, fixed, uncertainty"):
    losses.combine(LOSSES, how='mean')
  with pytest.raises(UserError, match=r"no weight for task 'c'; given: a, b"):
    losses.combine(LOSSES, how='fixed', weights={'a': 1.0, 'b': 1.0})
  with pytest.raises(UserError, match=r"no log-variance for task 'a'; given: none"):
    losses.combine(LOSSES, how='uncertainty')
