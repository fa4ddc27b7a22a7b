"""Hypergradients and second-order gradients against central differences."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msp
from msp import groups as gr
from msp.errors import UserError
from msp.hypergradient import (
  Solver,
  hypergradient,
  meta_gradients,
  online,
  zero_tangent,
)

K = 2
adapt = functools.partial(msp.adapt, has_aux=True)


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


class Network(nn.Module):
  """Two convolutions, one of them dilated, and two outputs."""

  norm: str

  @nn.compact
  def __call__(self, x):
    for i, dilation in enumerate((1, 2)):
      # Strides keep it small; softplus has no kink for the differences to cross.
      x = nn.Conv(
        6,
        (3, 3),
        (2, 2) if i == 0 else (1, 1),
        kernel_dilation=dilation,
        use_bias=False,
        name=f'layer{i}_0',
        param_dtype=jnp.float64,
      )(x)
      if self.norm == 'batch':
        x = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(x)
      else:
        x = nn.GroupNorm(2, param_dtype=jnp.float64)(x)
      x = nn.softplus(x)
    a = nn.Conv(2, (1, 1), name='head_a', param_dtype=jnp.float64)(x)
    b = nn.Dense(1, name='head_b', param_dtype=jnp.float64)(x.mean((1, 2)))
    return a, b


def conv_problem(norm, metric, granularity='scalar'):
  """A small conv network with a dense and an image-level task, float64."""
  model = Network(norm)
  variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3), jnp.float64))
  params = {'backbone': variables['params']}
  stats = {k: v for k, v in variables.items() if k != 'params'}
  groups = gr.find(params, r'backbone/layer.*kernel', granularity=granularity)

  def loss(params, batch):
    (a, b), new_stats = model.apply(
      {'params': params['backbone'], **stats}, batch['image'], mutable=['batch_stats']
    )
    a = jnp.mean((jnp.tanh(a) - batch['a']) ** 2)
    b = jnp.mean((jnp.tanh(b) - batch['b']) ** 2)
    return a + b, new_stats

  if metric == 'adam':
    tx = msp.adaptive_proximal(
      functools.partial(optax.adam, eps=1e-3, eps_root=1e-6),
      'group_lasso',
      groups,
      0.01,
    )
  else:
    tx = optax.chain(
      optax.sgd(0.1), msp.proximal('group_lasso', groups, learning_rate=0.1)
    )
  return loss, params, groups, tx


def make_batches(seed, steps=K, size=3):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'image': jax.random.uniform(keys[0], (steps, size, 8, 8, 3), jnp.float64),
    'a': jax.random.normal(keys[1], (steps, size, 4, 4, 2), jnp.float64),
    'b': jax.random.normal(keys[2], (steps, size, 1), jnp.float64),
  }


def first(batches):
  return jax.tree.map(lambda x: x[0], batches)


def central(f, x, eps):
  return (f(x + eps) - f(x - eps)) / (2 * eps)


RHO = {'euclidean': np.log(0.12), 'adam': np.log(0.1)}


@pytest.mark.parametrize('metric', ['euclidean', 'adam'])
@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_meta_gradients_against_central_differences(norm, metric):
  loss, params, groups, tx = conv_problem(norm, metric)
  # Some groups are dead from the start, and stay so or come back.
  kernels = gr.select(groups, params)
  params = gr.replace(
    params, {name: k.at[:, :, :2].set(0) for name, k in kernels.items()}
  )
  support, query, hold_out = make_batches(1), *map(first, map(make_batches, (2, 3)))

  @jax.jit
  def inner(params, rho):
    return adapt(loss, params, support, tx, sparsity=jnp.exp(rho), unroll=True)

  rho = jnp.asarray(RHO[metric])
  value = jax.jit(lambda p, r, batch: loss(inner(p, r)[0], batch)[0])
  dead = gr.sparsity(groups, inner(params, rho)[0]).groups
  assert 0.05 < dead < 0.95
  results = {}
  for mode, unroll in (('reverse', True), ('forward', True), ('reverse', False)):
    run = functools.partial(adapt, loss, batches=support, tx=tx, unroll=unroll)
    results[mode, unroll] = jax.jit(
      lambda p, r, run=run, mode=mode: meta_gradients(
        lambda p, r: run(params=p, sparsity=jnp.exp(r)),
        lambda p: loss(p, query),
        lambda p: loss(p, hold_out),
        p,
        r,
        exact=True,
        mode=mode,
      )
    )(params, rho)
  reference = results['reverse', True]
  wanted = central(lambda r: value(params, r, hold_out), rho, 1e-5)
  np.testing.assert_allclose(reference.rho, wanted, rtol=1e-5)
  assert abs(wanted) > 1e-6
  rng = np.random.default_rng(0)
  direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  # The prox kink lies at dead groups: leave them dead along the direction.
  alive = {
    name: direction_leaf * (kernels_leaf != 0)
    for (name, direction_leaf), kernels_leaf in zip(
      gr.select(groups, direction).items(),
      gr.select(groups, params).values(),
      strict=True,
    )
  }
  direction = gr.replace(direction, alive)
  along = jax.jit(
    lambda t: value(jax.tree.map(lambda p, d: p + t * d, params, direction), rho, query)
  )
  np.testing.assert_allclose(
    optax.tree.vdot(reference.params, direction), central(along, 0.0, 1e-6), rtol=1e-5
  )
  for key, got in results.items():
    np.testing.assert_allclose(got.rho, reference.rho, rtol=1e-6, err_msg=str(key))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9),
      got.params,
      reference.params,
    )


@pytest.mark.parametrize('mode', ['reverse', 'forward'])
def test_hypergradient_of_each_layer(mode):
  loss, params, groups, tx = conv_problem('group', 'euclidean', 'layer')
  support, hold_out = make_batches(4, steps=2), first(make_batches(5))
  rho = jnp.linspace(-4, -2, len(groups.names))

  @jax.jit
  def both(rho):
    inner = lambda p, r: adapt(loss, p, support, tx, sparsity=jnp.exp(r), unroll=True)[
      0
    ]
    outer = lambda p: loss(p, hold_out)[0]
    return hypergradient(outer, inner, params, rho, mode=mode)

  value, got = both(rho)
  assert got.shape == rho.shape
  for i in range(len(rho)):
    wanted = central(lambda t, i=i: both(rho.at[i].set(t))[0], rho[i], 1e-5)
    np.testing.assert_allclose(got[i], wanted, rtol=1e-5, atol=1e-11)
  assert jnp.isfinite(value)


@pytest.mark.parametrize('mode', ['forward', 'online'])
def test_a_program_does_not_grow_with_the_coefficients(mode):
  loss, params, groups, tx = conv_problem('group', 'euclidean', 'layer')
  support, hold_out = make_batches(4, steps=2), first(make_batches(5))

  def program(rho):
    scale = lambda r: jnp.exp(jnp.resize(r, len(groups.names)))
    inner = lambda p, r: adapt(loss, p, support, tx, sparsity=scale(r))[0]
    if mode == 'forward':
      outer = lambda p: loss(p, hold_out)[0]
      return hypergradient(outer, inner, params, rho, mode=mode)
    step = lambda s, r: ((inner(s[0], r), ()), loss(s[0], hold_out)[0], ())
    state = params, ()
    return online(step, state, rho, zero_tangent(state, rho))[1:4]

  size = lambda n: str(jax.make_jaxpr(program)(jnp.zeros(n))).count('\n')
  assert size(4) < 1.1 * size(2)


def toy(seed=0):
  """A quadratic with two grouped kernels, small enough to print."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {'backbone': {'c': {'kernel': jax.random.normal(keys[0], (3, 2))}}}
  matrix = jax.random.normal(keys[1], (6, 6))
  matrix = matrix @ matrix.T / 6 + jnp.eye(6)

  def loss(params, batch):
    delta = params['backbone']['c']['kernel'].reshape(-1) - batch
    return 0.5 * delta @ matrix @ delta, None

  return loss, params, jax.random.normal(keys[2], (K, 6)), matrix


def test_hessian_product_gradient_equals_reverse_over_reverse():
  loss, params, batches, _ = toy()
  tx = optax.sgd(0.1, momentum=0.9)
  outer = lambda p: jnp.sum(
    jnp.sin(adapt(loss, p, batches, tx)[0]['backbone']['c']['kernel'])
  )

  def plain(params):
    state = tx.init(params)
    for batch in batches:
      grads = jax.grad(lambda p, b=batch: loss(p, b)[0])(params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return jnp.sum(jnp.sin(params['backbone']['c']['kernel']))

  np.testing.assert_allclose(outer(params), plain(params), rtol=1e-12)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-11),
    jax.grad(outer)(params),
    jax.grad(plain)(params),
  )


def test_one_sgd_step_by_hand():
  loss, params, batches, matrix = toy()
  groups = gr.find(params)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1))
  lam = 0.7
  outer = lambda p: jnp.sum(p['backbone']['c']['kernel'] ** 2)
  inner = lambda p, lam: adapt(loss, p, batches[:1], tx, sparsity=lam)[0]
  x = params['backbone']['c']['kernel'].reshape(-1)
  z = (x - 0.1 * matrix @ (x - batches[0])).reshape(3, 2)
  norms = np.linalg.norm(z, axis=1)
  t = 0.1 * np.sqrt(2)
  shrunk = np.maximum(norms - t * lam, 0)
  value, grad = hypergradient(outer, inner, params, jnp.asarray(lam))
  np.testing.assert_allclose(value, np.sum(shrunk**2), rtol=1e-12)
  np.testing.assert_allclose(grad, -2 * t * np.sum(shrunk), rtol=1e-12)


def test_no_steps_no_hypergradient():
  loss, params, batches, _ = toy()
  groups = gr.find(params)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1))
  outer = lambda p: loss(p, batches[0])[0]
  inner = lambda p, r: adapt(loss, p, batches[:0], tx, sparsity=jnp.exp(r))[0]
  adapted = inner(params, jnp.zeros(()))
  jax.tree.map(np.testing.assert_array_equal, adapted, params)
  for mode in ('reverse', 'forward'):
    assert hypergradient(outer, inner, params, jnp.zeros(()), mode=mode)[1] == 0


@pytest.mark.parametrize('steps', [1, 2])
def test_unrolled_steps_are_no_loop(steps):
  # XLA's convolutions in a loop body are many times slower on CPU, even in one turn.
  loss, params, batches, _ = toy()
  run = lambda p, unroll: adapt(loss, p, batches[:steps], optax.sgd(0.1), unroll=unroll)
  text = lambda unroll: jax.jit(run, static_argnums=1).lower(params, unroll).as_text()
  assert 'stablehlo.while' not in text(True)
  assert 'stablehlo.while' in text(False)
  straight, logs = run(params, True)
  rolled, rolled_logs = run(params, False)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12),
    (straight, logs),
    (rolled, rolled_logs),
  )


def test_zero_coefficient_is_no_prox():
  loss, params, batches, _ = toy()
  groups = gr.find(params)
  with_prox = optax.chain(
    optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1, min_alive=1)
  )
  a, _ = adapt(loss, params, batches, with_prox, sparsity=0.0)
  b, _ = adapt(loss, params, batches, optax.sgd(0.1))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14), a, b)


def test_all_groups_dead_gives_a_finite_zero():
  loss, params, batches, _ = toy()
  groups = gr.find(params)
  for tx in (
    optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1)),
    msp.adaptive_proximal(
      functools.partial(optax.adam, eps_root=1e-8), 'group_lasso', groups, 0.1
    ),
  ):
    inner = lambda p, lam, tx=tx: adapt(loss, p, batches, tx, sparsity=lam)[0]
    outer = lambda p: loss(p, batches[0])[0]
    for mode in ('reverse', 'forward'):
      assert hypergradient(outer, inner, params, jnp.asarray(1e3), mode=mode)[1] == 0


@pytest.mark.parametrize('solver', ['cg', 'neumann'])
@pytest.mark.parametrize('entries', [1, 2])
def test_implicit_is_the_derivative_of_the_converged_solution(solver, entries):
  loss, params, batches, _ = toy()
  params['backbone']['d'] = {'kernel': jnp.ones((3, 2))}
  both = lambda p, b: (
    loss(p, b)[0]
    + 0.5 * jnp.sum((p['backbone']['d']['kernel'] - b.reshape(3, 2)) ** 2)
    + 0.3 * jnp.sum(p['backbone']['c']['kernel'] * p['backbone']['d']['kernel']),
    None,
  )
  groups = gr.find(params, granularity='scalar' if entries == 1 else 'layer')
  tx = optax.chain(optax.sgd(0.2), msp.proximal('group_lasso', groups, 0.2))
  steps = jnp.broadcast_to(batches[0], (400, 6))
  solve = lambda p, r: adapt(both, p, steps, tx, sparsity=jnp.exp(r))[0]
  once = lambda p, r: adapt(both, p, batches[:1], tx, sparsity=jnp.exp(r))[0]
  outer = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))
  rho = jnp.log(jnp.asarray(0.6 if entries == 1 else [0.8, 0.3]))
  solved = solve(params, rho)
  dead = gr.sparsity(groups, solved).groups
  assert 0 < dead < 1
  value, got = hypergradient(
    outer,
    solve,
    params,
    rho,
    mode='implicit',
    last=once,
    solver=Solver(solver, tolerance=1e-9, max_iterations=500),
  )
  assert value == outer(solved)
  for i in range(entries):
    direction = jnp.eye(entries)[i].reshape(rho.shape)
    wanted = central(lambda t, d=direction: outer(solve(params, rho + t * d)), 0, 1e-5)
    assert abs(wanted) > 1e-3
    np.testing.assert_allclose(got.reshape(-1)[i], wanted, rtol=1e-5)


def test_implicit_stops_at_its_tolerance():
  loss, params, batches, _ = toy()
  groups = gr.find(params)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1))
  steps = jnp.broadcast_to(batches[0], (400, 6))
  solve = lambda p, r: adapt(loss, p, steps, tx, sparsity=jnp.exp(r))[0]
  once = lambda p, r: adapt(loss, p, batches[:1], tx, sparsity=jnp.exp(r))[0]
  outer = lambda p: jnp.sum(jnp.sin(p['backbone']['c']['kernel']))
  at = lambda **options: hypergradient(
    outer,
    solve,
    params,
    jnp.log(0.4),
    mode='implicit',
    last=once,
    solver=Solver(**options),
  )[1]
  for name in ('cg', 'neumann'):
    exact = at(name=name, tolerance=1e-10, max_iterations=1000)
    errors = [
      abs(at(name=name, tolerance=tolerance, max_iterations=1000) / exact - 1)
      for tolerance in (0.5, 0.1, 1e-4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3
    assert at(name=name, tolerance=1e-10, max_iterations=1) != exact


@pytest.mark.parametrize(
  ('momentum', 'unroll'), [(None, False), (0.9, False), (0.9, True)]
)
def test_truncated_sees_the_last_steps(momentum, unroll):
  loss, params, batches, _ = toy()
  batches = jnp.concatenate([batches, batches + 1])
  groups = gr.find(params)
  tx = optax.chain(  # its momentum goes on where derivatives begin
    optax.sgd(0.1, momentum), msp.proximal('group_lasso', groups, 0.1)
  )
  rho, total = jnp.log(0.3), len(batches)
  hold_out = lambda p: (jnp.sum(jnp.sin(p['backbone']['c']['kernel'])), None)
  query = lambda p: loss(p, batches[0])

  def straight(params, rho, state, batches):
    for batch in batches:
      grads = jax.grad(loss, has_aux=True)(params, batch)[0]
      updates, state = tx.update(grads, state, params, sparsity=jnp.exp(rho))
      params = optax.apply_updates(params, updates)
    return params, state

  errors = []
  for k in range(1, total + 1):
    inner = lambda p, r, k=k: adapt(
      loss, p, batches, tx, sparsity=jnp.exp(r), truncation=k, unroll=unroll
    )
    got = meta_gradients(
      inner, query, hold_out, params, rho, exact=True, mode='truncated'
    )
    middle, state = straight(params, rho, tx.init(params), batches[: total - k])
    last = lambda p, r: straight(p, r, state, batches[total - k :])[0]  # noqa: B023
    want = hold_out(last(middle, rho))[0]
    np.testing.assert_allclose(got.hold_out[0], want, rtol=1e-12)
    simple = hypergradient(
      lambda p: hold_out(p)[0],
      lambda *_: middle,  # noqa: B023
      params,
      rho,
      mode='truncated',
      last=last,
    )
    np.testing.assert_allclose(got.rho, simple[1], rtol=1e-10)
    # In θ⁰ the earlier steps are the identity.
    wanted = jax.grad(lambda p: query(last(p, rho))[0])(middle)  # noqa: B023
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-10), got.params, wanted
    )
    assert len(got.logs[0]) == total
    whole = jax.grad(
      lambda r: hold_out(straight(params, r, tx.init(params), batches)[0])[0]
    )(rho)
    errors.append(abs(got.rho - whole))
  if momentum:  # of which a part of the steps may say the opposite
    assert min(errors[:3]) > 1e-3
  else:
    assert errors[0] > errors[1] > errors[2] > errors[3]
  assert errors[3] < 1e-12


def test_first_order_is_the_gradient_at_the_adapted_point():
  loss, params, batches, _ = toy()
  tx = optax.sgd(0.1)
  inner = lambda p, r: adapt(loss, p, batches, tx)
  query = lambda p: loss(p, batches[0])
  got = meta_gradients(inner, query, None, params, None, exact=False)
  wanted = jax.grad(lambda p: query(p)[0])(inner(params, None)[0])
  jax.tree.map(np.testing.assert_array_equal, got.params, wanted)
  assert got.rho is None
  exact = meta_gradients(inner, query, None, params, None, exact=True)
  wanted = jax.grad(lambda p: query(inner(p, None)[0])[0])(params)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12), exact.params, wanted
  )


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_again_under_vmap_and_jacobians(mode):
  loss, params, batches, _ = toy()
  groups = gr.find(params)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', groups, 0.1))

  def derivative(rho, again):
    inner = lambda p, r: adapt(
      loss, p, batches, tx, sparsity=jnp.exp(r), twice_differentiable=again
    )[0]
    outer = lambda p: jnp.sum(jnp.sin(p['backbone']['c']['kernel']))
    return hypergradient(outer, inner, params, rho, mode=mode)[1]

  rhos = jnp.array([-2.0, -0.5])
  one_by_one = [derivative(rho, False) for rho in rhos]
  got = jax.vmap(lambda rho: derivative(rho, True))(rhos)
  np.testing.assert_allclose(got, one_by_one, rtol=1e-12)
  np.testing.assert_allclose(derivative(-0.5, False), one_by_one[1], rtol=1e-12)
  eps = 1e-6
  second = central(lambda rho: derivative(rho, True), rhos[1], eps)
  got = jax.jacfwd(lambda rho: derivative(rho, True))(rhos[1])
  np.testing.assert_allclose(got, second, rtol=1e-6)


def test_parameters_of_half_precision_with_a_float32_loss():
  loss, params, batches, _ = toy()
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', gr.find(params), 0.1))

  def derivative(dtype):
    wide = lambda p, b: loss(jax.tree.map(lambda x: x.astype(jnp.float32), p), b)
    start, data = jax.tree.map(lambda x: x.astype(dtype), (params, batches))
    outer = lambda p: jnp.sum(jnp.sin(p['backbone']['c']['kernel'].astype(jnp.float32)))
    inner = lambda p, r: adapt(wide, p, data, tx, sparsity=jnp.exp(r))[0]
    return [
      hypergradient(outer, inner, start, jnp.float32(-1.0), mode=mode)[1]
      for mode in ('forward', 'reverse')
    ]

  np.testing.assert_allclose(
    derivative(jnp.bfloat16), derivative(jnp.float32), rtol=0.1
  )


def test_refusals():
  loss, params, batches, _ = toy()
  with pytest.raises(UserError, match='unknown hypergradient'):
    hypergradient(None, None, params, jnp.zeros(()), mode='backward')
  with pytest.raises(UserError, match=r'use msp\.online'):
    hypergradient(None, None, params, jnp.zeros(()), mode='online')
  with pytest.raises(UserError, match='needs `last`'):
    hypergradient(None, None, params, jnp.zeros(()), mode='implicit')
  with pytest.raises(UserError, match='unknown solver'):
    hypergradient(
      None,
      None,
      params,
      jnp.zeros(()),
      mode='implicit',
      last=lambda p, r: p,
      solver=Solver('lu'),
    )
  for solver, message in ((Solver('lu'), 'unknown solver'), ('cg', r'an msp\.Solver')):
    with pytest.raises(UserError, match=message):
      msp.implicit(params, lambda p, r: p, params, jnp.zeros(()), solver)
  with pytest.raises(TypeError, match='not in its batches'):
    jax.grad(
      lambda b: jax.tree.leaves(adapt(loss, params, b, optax.sgd(0.1))[0])[0].sum()
    )(batches)


@pytest.mark.parametrize('derivative', ['exact', 'exact, again', 'forward'])
def test_memory_of_a_loop_does_not_grow_with_its_steps(derivative):
  width, rows = 16, 4096  # activations are larger than parameters, as in a network

  def loss(params, batch):
    for kernel in params:
      batch = jnp.tanh(batch @ kernel)
    return jnp.mean(batch**2), None

  def gradient(params, batches):
    scaled = lambda p, r: adapt(
      loss,
      [jnp.exp(r) * kernel for kernel in p],
      batches,
      optax.sgd(0.1),
      twice_differentiable=derivative != 'exact',
    )[0]
    outer = lambda p: jnp.sum(jnp.sin(p[0]))
    if derivative == 'forward':
      return hypergradient(outer, scaled, params, jnp.zeros(()), mode='forward')
    return jax.grad(lambda p: outer(scaled(p, 0.0)))(params)

  def temporaries(steps):
    params = [jnp.full((width, width), 0.1)] * 4
    batches = jax.ShapeDtypeStruct((steps, rows, width), jnp.float32)
    compiled = jax.jit(gradient).lower(params, batches).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(10) < 1.5 * temporaries(1)


def test_a_coefficient_may_be_a_python_number():
  def step(state, rho):
    params, none = state
    loss, grads = jax.value_and_grad(lambda p: jnp.sum(p**2) * jnp.exp(rho))(params)
    return (params - 0.1 * grads, none), loss, None

  state = (jnp.arange(3.0), None)
  numbers, arrays = (
    online(step, state, rho, zero_tangent(state, rho), max_norm=jnp.inf)
    for rho in (0.5, jnp.asarray(0.5))
  )
  assert numbers[3].shape == ()
  np.testing.assert_array_equal(numbers[3], arrays[3])
  np.testing.assert_array_equal(numbers[4][0], arrays[4][0])
