"""Each prox against the problem its docstring states, minimised numerically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from msp import prox

AXES = {'in': -2, 'out': -1, 'weight': None}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def kernel(seed=0, shape=(3, 3, 4, 5)):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape)
  x[:, :, 1] *= 1e-2  # a group that dies and one that was dead already
  x[:, :, 2] = 0
  metric = 10 ** rng.uniform(-3, 1, size=shape)
  return x, metric


def groups_of(x, axis):
  if axis is None:
    return x.reshape(-1, 1)
  return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)


def minimise(x, metric, threshold):
  """argmin_z ½(z − x)ᵀD(z − x) + t‖z‖, from the dual: z = x − u/d, ‖u‖ ≤ t.

  A different problem (a projection in the metric 1/d), solved by another method
  (bisection on the multiplier of the ball), so that no step is shared.
  """
  gradient = metric * x
  if np.linalg.norm(gradient) <= threshold:
    return np.zeros_like(x)
  # u = gradient / (1 + μ d): minimises Σ u²/(2d) − u·x + ½μ(‖u‖² − t²)
  norm = lambda log: np.linalg.norm(gradient / (1 + np.exp(log) * metric))
  log = scipy.optimize.brentq(
    lambda m: norm(m) - threshold, -80, 80, xtol=1e-14, rtol=1e-15
  )
  return x - gradient / (1 + np.exp(log) * metric) / metric


@pytest.mark.parametrize('axis', AXES.values(), ids=AXES)
@pytest.mark.parametrize('threshold', [1e-3, 0.1, 1.0, 3.0])
def test_group_lasso_minimises_its_objective(axis, threshold):
  x, _ = kernel()
  z = jax.jit(prox.group_lasso, static_argnums=2)(x, threshold, axis)
  for got, row in zip(groups_of(np.array(z), axis), groups_of(x, axis), strict=True):
    want = minimise(row, np.ones_like(row), threshold)
    np.testing.assert_allclose(got, want, atol=1e-9)


@pytest.mark.parametrize('axis', AXES.values(), ids=AXES)
@pytest.mark.parametrize('threshold', [1e-3, 0.1, 1.0, 10.0])
def test_group_lasso_weighted_minimises_its_objective(axis, threshold):
  x, metric = kernel(1)
  z = jax.jit(prox.group_lasso_weighted, static_argnums=3)(x, metric, threshold, axis)
  for got, row, d in zip(
    groups_of(np.array(z), axis),
    groups_of(x, axis),
    groups_of(metric, axis),
    strict=True,
  ):
    np.testing.assert_allclose(got, minimise(row, d, threshold), atol=1e-6)


def test_oracle_itself_beats_its_neighbours():
  x, metric = kernel(2)
  x, metric = x[..., 0, :].ravel(), metric[..., 0, :].ravel()
  objective = lambda z: 0.5 * np.sum(metric * (z - x) ** 2) + 0.5 * np.linalg.norm(z)
  best = objective(minimise(x, metric, 0.5))
  rng = np.random.default_rng(0)
  for scale in (1e-1, 1e-2, 1e-3):
    for _ in range(20):
      step = scale * rng.normal(size=x.shape)
      assert objective(minimise(x, metric, 0.5) + step) > best


def test_l1_minimises_its_objective():
  x, metric = kernel(3)
  plain = np.sign(x) * np.maximum(np.abs(x) - 0.3, 0)
  weighted = np.sign(x) * np.maximum(np.abs(x) - 0.3 / metric, 0)
  np.testing.assert_allclose(prox.l1(x, 0.3), plain, atol=1e-12)
  np.testing.assert_allclose(prox.l1_weighted(x, metric, 0.3), weighted, atol=1e-12)


def test_one_threshold_for_each_group():
  x, metric = kernel(4)
  thresholds = np.array([0.0, 0.1, 0.5, 2.0])
  together = prox.group_lasso_weighted(x, metric, thresholds, -2)
  for i, t in enumerate(thresholds):
    alone = prox.group_lasso_weighted(x, metric, t, -2)
    np.testing.assert_allclose(together[:, :, i], alone[:, :, i], rtol=1e-12)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_reductions(dtype):
  x, metric = (jnp.asarray(a, dtype) for a in kernel(5))
  same = prox.group_lasso_weighted(x, jnp.full_like(x, 2.0), 1.0, -2)
  np.testing.assert_allclose(same, prox.group_lasso(x, 0.5, -2), rtol=2e-6)
  assert same.dtype == dtype
  for axis in AXES.values():
    # λ = 0 is the identity, to the bit.
    np.testing.assert_array_equal(prox.group_lasso(x, 0.0, axis), x)
    np.testing.assert_array_equal(prox.group_lasso_weighted(x, metric, 0.0, axis), x)
  np.testing.assert_array_equal(prox.l1(x, 0.0), x)
  np.testing.assert_allclose(prox.group_lasso(x, 0.3, None), prox.l1(x, 0.3), atol=1e-6)


@pytest.mark.parametrize('threshold', [1e-9, 1e-3, 0.1, 1.0])
def test_root_is_found_over_many_scales_in_float32(threshold):
  rng = np.random.default_rng(6)
  x = rng.normal(size=(3, 3, 64, 16)).astype(np.float32)
  metric = (10 ** rng.uniform(-8, 2, size=x.shape)).astype(np.float32)
  z = np.array(prox.group_lasso_weighted(x, metric, threshold, -2))
  for i in range(x.shape[2]):
    row, d = (a[:, :, i].ravel().astype(np.float64) for a in (x, metric))
    np.testing.assert_allclose(
      z[:, :, i].ravel(), minimise(row, d, threshold), atol=2e-5
    )


@pytest.mark.parametrize('axis', AXES.values(), ids=AXES)
def test_derivatives_of_alive_groups(axis):
  rng = np.random.default_rng(7)
  x = rng.normal(size=(2, 2, 3, 2)) + 3 * rng.choice([-1, 1], size=(2, 2, 3, 2))
  metric = rng.uniform(0.5, 3, size=x.shape)
  jitted = jax.jit(prox.group_lasso, static_argnums=2)
  jitted_weighted = jax.jit(prox.group_lasso_weighted, static_argnums=3)
  check_grads(lambda x, t: jitted(x, t, axis), (x, 0.2), order=2, rtol=1e-5)
  check_grads(
    lambda x, d, t: jitted_weighted(x, d, t, axis),
    (x, metric, 0.2),
    order=2,
    rtol=1e-5,
  )


@pytest.mark.parametrize('threshold', [0.0, 0.5, 100.0])
def test_derivatives_are_finite_everywhere(threshold):
  x, metric = kernel(8)
  metric[0, 0, 0, 0] = 1e-30
  for axis in AXES.values():
    square = lambda *args, axis=axis: jnp.sum(
      prox.group_lasso_weighted(*args, axis) ** 2
    )
    for g in jax.jit(jax.grad(square, (0, 1, 2)))(x, metric, threshold):
      assert jnp.all(jnp.isfinite(g))
    plain = lambda x, t, axis=axis: jnp.sum(prox.group_lasso(x, t, axis) ** 2)
    for g in jax.jit(jax.grad(plain, (0, 1)))(x, threshold):
      assert jnp.all(jnp.isfinite(g))


def test_zero_group_at_zero_coefficient_is_free():
  """At λ = 0 the prox is the identity, so its Jacobian is one, dead or not."""
  x = jnp.zeros((1, 1, 2, 3))
  for f in (
    lambda x: prox.group_lasso(x, 0.0, -2),
    lambda x: prox.group_lasso_weighted(x, jnp.ones_like(x), 0.0, -2),
    lambda x: prox.l1(x, 0.0),
  ):
    np.testing.assert_array_equal(jax.jvp(f, (x,), (x + 1,))[1], x + 1)
