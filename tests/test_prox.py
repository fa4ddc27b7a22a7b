"""Each prox against the problem its docstring states, minimised numerically."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from msp import prox
from msp.errors import UserError

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


@pytest.mark.parametrize('threshold', [0.0, 1e-30])
def test_a_group_whose_squares_underflow_leaves_the_others_alone(
  threshold, monkeypatch
):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')  # one loop for all
  x, metric = (jnp.asarray(a, jnp.float32) for a in kernel())
  tiny, large = jnp.full((2, 3), 1e-20, jnp.float32), jnp.full((2, 3), 1e3, jnp.float32)
  run = lambda x, d: prox.group_lasso_weighted(x, d, [0.1, threshold][: len(x)], -2)
  (alone,) = run([x], [metric])
  together, other = run([x, tiny], [metric, large])
  np.testing.assert_array_equal(together, alone)
  np.testing.assert_allclose(other, 0, atol=2e-20)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('share', [1e-4, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_roots_of_any_spread_are_found(monkeypatch, backend, share):
  """Ten steps find them: the optimality condition holds, d over eight decades."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  rng = np.random.default_rng(0)
  for spread in (0, 0.5, 1, 2):
    x = rng.normal(size=(300, 64)) * 10 ** rng.uniform(-4, 0, (300, 1))
    d = np.clip(1e-3 * 10 ** rng.normal(0, spread, x.shape), 1e-8, 1e3)
    t = share * np.linalg.norm(d * x, axis=1)
    z = prox.group_lasso_weighted(*map(jnp.asarray, (x, d, t)), 0)
    norm = np.linalg.norm(z, axis=1)
    force = d * (z - x) + (t / norm)[:, None] * z
    assert np.abs(force).max(1) == pytest.approx(0, abs=1e-9 * t.max())
    assert (np.linalg.norm(force, axis=1) < 1e-8 * t / (1 - share)).all()


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_roots_of_weights_against_their_metric_are_found(monkeypatch, backend):
  """The slowest case: x as 1/d, weights that are large because nothing moves them."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  rng = np.random.default_rng(0)
  d = 10 ** rng.uniform(-8, 0, (500, 64)) + 1e-8
  x = rng.normal(size=d.shape) / d
  for share in (0.1, 0.3, 0.5, 0.7):
    t = share * np.linalg.norm(d * x, axis=1)
    z = prox.group_lasso_weighted(*map(jnp.asarray, (x, d, t)), 0)
    low, high = np.zeros(500), np.linalg.norm(x, axis=1)
    for _ in range(200):
      middle = (low + high) / 2
      over = ((x * d / (d * middle[:, None] + t[:, None])) ** 2).sum(1) > 1
      low, high = np.where(over, middle, low), np.where(over, high, middle)
    want = x * d * low[:, None] / (d * low[:, None] + t[:, None])
    error = np.linalg.norm(z - want, axis=1) / np.linalg.norm(x, axis=1)
    assert error.max() < 1e-10


def test_a_root_next_to_nothing_stays_positive(monkeypatch):
  """A group's weight lies where its metric does not; it is next to its threshold."""
  rng = np.random.default_rng(0)
  d = 10 ** rng.uniform(-7, 2, (500, 64))
  x = np.abs(rng.normal(size=d.shape)) / d
  t = 0.99 * np.linalg.norm(d * x, axis=1)
  problem = [jnp.asarray(a, jnp.float32) for a in (x, d, t)]
  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    z = prox.group_lasso_weighted(*problem, 0)
    assert (z >= 0).all()
    assert (z <= (1 + 1e-6) * problem[0]).all()


def test_zero_group_at_zero_coefficient_is_free():
  """At λ = 0 the prox is the identity, so its Jacobian is one, dead or not."""
  x = jnp.zeros((1, 1, 2, 3))
  for f in (
    lambda x: prox.group_lasso(x, 0.0, -2),
    lambda x: prox.group_lasso_weighted(x, jnp.ones_like(x), 0.0, -2),
    lambda x: prox.l1(x, 0.0),
  ):
    np.testing.assert_array_equal(jax.jvp(f, (x,), (x + 1,))[1], x + 1)


def minimise_mixed(x, metric, t, s):
  """argmin_z ½(z − x)ᵀD(z − x) + t‖z‖ + s‖z‖₁ with z = u − v, u, v ≥ 0, numerically."""
  n = x.size

  def objective(uv):
    u, v = uv[:n], uv[n:]
    z = u - v
    norm = np.linalg.norm(z)
    value = 0.5 * np.sum(metric * (z - x) ** 2) + t * norm + s * np.sum(uv)
    slope = metric * (z - x) + t * z / max(norm, 1e-300)
    return value, np.concatenate([slope + s, -slope + s])

  start = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)]) + 1e-3
  found = scipy.optimize.minimize(
    objective,
    start,
    jac=True,
    method='L-BFGS-B',
    bounds=[(0, None)] * (2 * n),
    options={'maxiter': 20_000, 'maxfun': 200_000, 'ftol': 1e-16, 'gtol': 1e-11},
  )
  z = found.x[:n] - found.x[n:]
  at_zero = 0.5 * np.sum(metric * x**2)
  return np.zeros(n) if at_zero <= found.fun else z


@pytest.mark.parametrize('threshold', [0.05, 0.4])
def test_sparse_group_lasso_minimises_its_objective(threshold):
  rng = np.random.default_rng(0)
  x, metric = rng.normal(size=(4, 6)), 10 ** rng.uniform(-1, 0.5, size=(4, 6))
  x[1] *= 0.05
  for d, z in (
    (np.ones_like(x), prox.sparse_group_lasso(x, threshold, 0, l1_threshold=0.2)),
    (
      metric,
      prox.sparse_group_lasso_weighted(x, metric, threshold, 0, l1_threshold=0.2),
    ),
  ):
    assert np.sum(np.all(z == 0, axis=1)) >= 1
    assert np.sum(np.any(z == 0, axis=1) & np.any(z != 0, axis=1)) >= 1
    for got, row, weight in zip(z, x, d, strict=True):
      want = minimise_mixed(row, weight, threshold, 0.2)
      np.testing.assert_allclose(got, want, atol=1e-6)


def mcp(r, w, gamma):
  return np.where(r <= gamma * w, w * r - r**2 / (2 * gamma), gamma * w**2 / 2)


def scad(r, w, a):
  middle = (2 * a * w * r - r**2 - w**2) / (2 * (a - 1))
  return np.where(r <= w, w * r, np.where(r <= a * w, middle, w**2 * (a + 1) / 2))


CONCAVE = {'group_mcp': (mcp, 'gamma'), 'group_scad': (scad, 'a')}


@pytest.mark.parametrize('name', CONCAVE)
@pytest.mark.parametrize('step', [0.1, 0.9])
def test_concave_penalties_minimise_their_objective(name, step):
  penalty, option = CONCAVE[name]
  kind = prox.get_penalty(name, **{option: 2.5})
  rng = np.random.default_rng(1)
  # From dead groups through every branch to groups that are free.
  x = rng.normal(size=(40, 4)) * np.geomspace(1e-3, 5, 40)[:, None]
  lam = 0.4
  w = lam * np.sqrt(4)
  z = np.array(kind.prox(x, step, lam, 0))
  dead = free = 0
  for got, row in zip(z, x, strict=True):
    size = np.linalg.norm(row)
    objective = lambda r, size=size: 0.5 * (r - size) ** 2 + step * penalty(r, w, 2.5)
    grid = np.linspace(0, 1.2 * size, 4001)
    near = grid[np.argmin(objective(grid))]
    best = scipy.optimize.minimize_scalar(
      objective,
      bounds=(max(near - grid[1], 0), near + grid[1]),
      method='bounded',
      options={'xatol': 1e-12},
    ).x
    # A rotation leaves the penalty as it is: the minimum lies on the ray of x.
    np.testing.assert_allclose(got, row * best / size, atol=2e-7)
    dead += not got.any()
    free += np.array_equal(got, row)
  assert dead >= 2
  assert free >= 2


@pytest.mark.parametrize('name', CONCAVE)
def test_concave_penalties_in_a_metric_descend_and_minimise_their_tangent(name):
  penalty, option = CONCAVE[name]
  kind = prox.get_penalty(name, **{option: 2.5})
  x, metric = kernel(6)
  step, lam = 0.3, 0.05
  z = kind.prox_weighted(jnp.asarray(x), metric, step, lam, -2)
  w = lam * np.sqrt(x.size / 4)
  for got, row, d in zip(
    groups_of(np.array(z), -2), groups_of(x, -2), groups_of(metric, -2), strict=True
  ):
    r = np.linalg.norm(row)
    slope = (penalty(r + 1e-6, w, 2.5) - penalty(max(r - 1e-6, 0), w, 2.5)) / 2e-6
    # Beyond the knot the slope is 0 and the group free.
    want = minimise(row, d, step * slope) if slope > 1e-8 else row
    np.testing.assert_allclose(got, want, atol=1e-6)
    objective = lambda v, row=row, d=d: (
      0.5 * np.sum(d * (v - row) ** 2) + (step * penalty(np.linalg.norm(v), w, 2.5))
    )
    assert objective(got) <= objective(row) + 1e-12


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
def test_every_penalty_is_differentiable_in_its_coefficient(name):
  kind = prox.get_penalty(name)
  x, metric = map(jnp.asarray, kernel(7))
  for run in (
    lambda lam: kind.prox(x, 0.3, lam, -2),
    lambda lam: kind.prox_weighted(x, metric, 0.3, lam, -2),
  ):
    check_grads(run, (jnp.asarray(0.03),), 1, eps=1e-7, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(0.0), x)
    assert np.isfinite(jax.jacfwd(run)(0.0)).all()
    assert not np.asarray(run(1e6))[:, :, 2].any()


@pytest.mark.parametrize('name', ['group_lasso', 'l1', 'sparse_group_lasso'])
@pytest.mark.parametrize('axis', AXES.values(), ids=AXES)
def test_a_coefficient_of_zero_has_the_derivative_from_above(name, axis):
  """Or a λ ≥ 0 that starts at 0 would stay there."""
  kind = prox.get_penalty(name)
  x, metric = map(jnp.asarray, kernel(7))
  for run in (
    lambda lam: kind.prox(x, 0.3, lam, axis),
    lambda lam: kind.prox_weighted(x, metric, 0.3, lam, axis),
  ):
    from_above = (run(1e-9) - run(0.0)) / 1e-9
    np.testing.assert_allclose(jax.jacfwd(run)(0.0), from_above, rtol=1e-4, atol=1e-5)
    reverse = jax.grad(lambda lam, run=run: run(lam).sum())(0.0)
    np.testing.assert_allclose(reverse, from_above.sum(), rtol=1e-4)


@pytest.mark.parametrize('name', ['l1', 'sparse_group_lasso'])
def test_one_coefficient_for_each_group(name):
  kind = prox.get_penalty(name)
  x, metric = map(jnp.asarray, kernel(7))
  lam = jnp.array([0.0, 0.1, 0.2, 1e6])
  for run in (
    lambda x, d, lam: kind.prox(x, 0.3, lam, -2),
    lambda x, d, lam: kind.prox_weighted(x, d, 0.3, lam, -2),
  ):
    together = run(x, metric, lam)
    for i, one in enumerate(lam):
      alone = run(x[:, :, i : i + 1], metric[:, :, i : i + 1], one)
      np.testing.assert_allclose(together[:, :, i : i + 1], alone, atol=1e-12)


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
def test_a_prox_keeps_the_type_of_the_kernel(name):
  x = jnp.ones((3, 4), jnp.bfloat16)
  step = jnp.float32(0.1)  # as a schedule gives it
  kind = prox.get_penalty(name)
  assert kind.prox(x, step, 0.1, -2).dtype == x.dtype
  assert kind.prox_weighted(x, x, step, 0.1, -2).dtype == x.dtype


def test_penalties_reduce_to_each_other():
  x, metric = map(jnp.asarray, kernel(8))
  lasso = prox.get_penalty('group_lasso')
  l1 = prox.get_penalty('l1')
  for name, options, same in (
    ('sparse_group_lasso', {'mix': 0.0}, lasso),
    ('sparse_group_lasso', {'mix': 1.0}, l1),
    ('group_mcp', {'gamma': 1e9}, lasso),
    ('group_scad', {'a': 1e9}, lasso),
  ):
    kind = prox.get_penalty(name, **options)
    for got, want in (
      (kind.prox(x, 0.3, 0.1, -2), same.prox(x, 0.3, 0.1, -2)),
      (
        kind.prox_weighted(x, metric, 0.3, 0.1, -2),
        same.prox_weighted(x, metric, 0.3, 0.1, -2),
      ),
    ):
      np.testing.assert_allclose(got, want, atol=1e-7)


def test_options_of_penalties_are_checked():
  with pytest.raises(UserError, match='group_mcp cannot take a; its options: gamma'):
    prox.get_penalty('group_mcp', a=3.0)
  with pytest.raises(UserError, match='mix is 2'):
    prox.get_penalty('sparse_group_lasso', mix=2.0)
  with pytest.raises(UserError, match='gamma is 0; it has to be above 0'):
    prox.get_penalty('group_mcp', gamma=0)
  with pytest.raises(UserError, match='a is 1; it has to be above 1'):
    prox.get_penalty('group_scad', a=1)


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
def test_a_tree_may_be_empty(name, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert prox.get_penalty(name).prox_weighted({}, {}, 0.3, {}, -2) == {}


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
def test_kernels_of_a_tree_are_independent(name, monkeypatch):
  kind = prox.get_penalty(name)
  x, metric = (
    dict(zip('abc', kernels, strict=True))
    for kernels in zip(kernel(9), kernel(10, (1, 1, 6, 3)), kernel(11), strict=True)
  )
  x['b'], metric['b'] = (a['b'].astype(np.float32) for a in (x, metric))
  lam = {'a': 0.01, 'b': 0.3, 'c': 0.0}
  one = {
    k: kind.prox_weighted(jnp.asarray(x[k]), jnp.asarray(metric[k]), 0.3, lam[k], -2)
    for k in x
  }

  def together(lam):
    return kind.prox_weighted(jax.tree.map(jnp.asarray, x), metric, 0.3, lam, -2)

  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    jax.tree.map(
      lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9),
      together(lam),
      one,
    )
    # A new function each time: its trace is kept. On an accelerator one loop, and of a
    # length that is known.
    loop = 'while[' if backend == 'cpu' else 'scan['
    loops = str(jax.make_jaxpr(lambda lam: together(lam))(lam)).count(loop)
    assert loops == (0 if name == 'l1' else 3 if backend == 'cpu' else 1)
  check_grads(
    lambda s: together({'a': s, 'b': s, 'c': s})['a'],
    (jnp.asarray(0.03),),
    1,
    eps=1e-7,
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
@pytest.mark.parametrize('weighted', [False, True])
def test_a_coefficient_that_is_not_a_number_is_seen(name, weighted):
  penalty, x = prox.get_penalty(name), jnp.ones((3, 4, 2))
  nan = jnp.float32(jnp.nan)
  if weighted:
    got = penalty.prox_weighted({'a': x}, {'a': 2 * x}, 0.1, {'a': nan}, -2)['a']
  else:
    got = penalty.prox(x, 0.1, nan, -2)
  assert jnp.isnan(got).any()


@pytest.mark.parametrize('small', [1e-8, 1e-20, 1e-25])
def test_the_weighted_l1_prox_next_to_no_metric(small):
  """What it kills has a derivative of 0, though t/d² is beyond float32."""
  x, t = jnp.array([[0.5], [-0.5], [0.5]]), 0.1
  metric = jnp.array([[small], [small], [1.0]])

  def total(x, metric, t):
    sparse = prox.sparse_group_lasso_weighted(x, metric, 0.0, -2, l1_threshold=t)
    return jnp.sum(prox.l1_weighted(x, metric, t) + sparse)

  z = prox.l1_weighted(x, metric, t)
  np.testing.assert_allclose(z, [[0], [0], [0.4]], rtol=1e-6)
  of_x, of_metric, of_t = jax.grad(total, (0, 1, 2))(x, metric, t)
  np.testing.assert_allclose(of_x, [[0], [0], [2]], rtol=1e-6)
  np.testing.assert_allclose(of_metric, [[0], [0], [0.2]], rtol=1e-6)
  np.testing.assert_allclose(of_t, -2, rtol=1e-6)


def test_the_weighted_l1_prox_in_half_precision():
  """A threshold that is 0 in float16 is none beside a small metric."""
  x, metric = jnp.full((2, 2), 1e-3, jnp.float16), jnp.full((2, 2), 6e-5, jnp.float16)
  got = prox.l1_weighted(x, metric, 2e-8)
  assert got.dtype == x.dtype
  exact = x.astype(jnp.float32) - 2e-8 / metric.astype(jnp.float32)
  np.testing.assert_allclose(got, exact, rtol=2e-3)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize('scale', [1e-4, 1.0, 300.0])
def test_the_weighted_prox_in_half_precision(dtype, scale):
  """Its squares overflow and vanish there."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(scale * rng.normal(size=(3, 3, 4, 6)), dtype)
  metric = jnp.asarray(rng.uniform(0.5, 2, x.shape), dtype)
  np.testing.assert_array_equal(prox.group_lasso_weighted(x, metric, 0.0, -2), x)
  # Half of the norm of a typical group.
  threshold = 0.5 * scale * np.sqrt(54)
  got = prox.group_lasso_weighted(x, metric, threshold, -2)
  assert got.dtype == dtype
  exact = prox.group_lasso_weighted(
    x.astype(jnp.float32), metric.astype(jnp.float32), threshold, -2
  )
  info = jnp.finfo(dtype)
  np.testing.assert_allclose(
    np.asarray(got, np.float32),
    exact,
    rtol=2 * float(info.eps),
    atol=float(info.smallest_subnormal),
  )


@pytest.mark.parametrize(
  ('name', 'option'), [('group_mcp', 30.0), ('group_scad', 29.0)]
)
def test_a_traced_step_beyond_the_range_of_a_concave_penalty_is_seen(name, option):
  x, _ = kernel(7)
  run = jax.jit(lambda step: prox.get_penalty(name).prox(x, step, 0.3, -2))
  assert np.isfinite(run(option * 0.99)).all()
  assert np.isnan(run(option)).all()


def test_l1_takes_thresholds_of_the_kernel_s_shape():
  x, metric = kernel(8)
  t = np.random.default_rng(0).uniform(0.01, 0.5, x.shape)
  for axis in (None, -2):
    want = np.sign(x) * np.maximum(np.abs(x) - t / metric, 0)
    np.testing.assert_allclose(prox.l1_weighted(x, metric, t, axis), want, atol=1e-12)


@pytest.mark.parametrize('name', sorted(prox.PENALTIES))
@pytest.mark.parametrize('weighted', [False, True])
def test_a_weight_that_is_not_a_number_is_no_dead_group(name, weighted):
  """A step that has diverged must not pass for one that has made zeros."""
  penalty, x = prox.get_penalty(name), jnp.ones((3, 4, 2)).at[0, 1, 0].set(jnp.nan)
  lam = jnp.float32(0.3)
  if weighted:
    got = penalty.prox_weighted({'a': x}, {'a': 2 + 0 * x}, 0.1, {'a': lam}, -2)['a']
  else:
    got = penalty.prox(x, 0.1, lam, -2)
  assert jnp.isnan(got[0, 1, 0])
  assert jnp.isfinite(got[:, [0, 2, 3]]).all()  # the other groups are themselves
