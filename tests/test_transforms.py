import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from ml_collections import ConfigDict

import msp
from msp import groups as gr
from msp import optimizers, prox, transforms
from msp.errors import UserError


def make_params(seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'backbone': {
      'stem': {'kernel': jax.random.normal(keys[0], (3, 3, 4, 6), dtype)},
      'layer1_0': {
        'kernel': jax.random.normal(keys[1], (1, 1, 6, 2), dtype),
        'scale': jnp.ones(2, dtype),
      },
    },
    'heads': {'a': {'kernel': jax.random.normal(keys[2], (2, 3), dtype)}},
  }


# What `adaptive_proximal` has to be told of an Adam that has been made.
ADAM = dict(b2=0.999, eps=1e-8, eps_root=0.0)
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.01, make_params(9))


def test_find_names_axes_and_stages():
  params = make_params()
  found = gr.find(params, granularity='stage')
  assert found.layers == ('backbone/layer1_0/kernel', 'backbone/stem/kernel')
  assert found.names == ('layer1', 'stem')
  assert gr.totals(found, params) == dict(zip(found.layers, (6, 4), strict=True))
  out = gr.find(params, axis='out')
  assert list(gr.totals(out, params).values()) == [2, 6]
  assert list(gr.totals(gr.find(params, axis='weight'), params).values()) == [12, 216]


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'axis': 'channel'}, 'not one of in, out, weight, coupled'),
    ({'pattern': 'nothing/.*'}, 'matches no parameter'),
    ({'pattern': '('}, 'no regular expression'),
    ({'pattern': 'backbone/.*'}, 'has shape'),
    ({'granularity': 'row'}, 'granularity'),
    ({'pattern': 'kernel'}, 'no parameter as a whole; .* backbone/layer1_0/kernel'),
    ({'pattern': 'scale'}, 'no parameter as a whole; .* backbone/layer1_0/kernel'),
  ],
)
def test_find_refuses(kwargs, message):
  with pytest.raises(UserError, match=message):
    gr.find({'scale_of_all': 2.0, **make_params()}, **kwargs)


@pytest.mark.parametrize('path', ['w', 'Conv_0/kernel'])
def test_a_path_without_a_stage_is_refused(path):
  tree = jnp.ones((2, 3))
  for name in reversed(path.split('/')):
    tree = {name: tree}
  with pytest.raises(UserError, match='stage needs paths such as'):
    gr.find(tree, path, granularity='stage')


def test_layers_whose_short_names_are_the_same_have_coefficients_of_their_own():
  kernel = {'a': {'kernel': jnp.ones((2, 3))}}
  found = gr.find({**kernel, 'backbone': kernel}, '.*kernel', granularity='layer')
  assert found.names == ('a/kernel', 'backbone/a/kernel')


def test_a_part_of_the_layers_has_the_coefficients_of_its_own():
  params = make_params()
  found = gr.find(params, granularity='layer')
  part = {'backbone': {'stem': params['backbone']['stem']}}
  own = gr.lambda_max(found, params)[1]
  np.testing.assert_array_equal(gr.lambda_max(found, part), [0, own])


def test_lambda_max_and_sparsity_by_hand():
  params = {'backbone': {'c': {'kernel': jnp.array([[3.0, 4.0], [0.0, 0.0]])}}}
  found = gr.find(params)
  np.testing.assert_allclose(gr.lambda_max(found, params), [5 / np.sqrt(2)])
  counted = gr.sparsity(found, params)
  np.testing.assert_allclose(counted.groups, 0.5)
  np.testing.assert_allclose(counted.weights, 0.5)
  # One weight keeps a group alive.
  params = {'backbone': {'c': {'kernel': jnp.array([[0.0, 4.0], [0.0, 0.0]])}}}
  counted = gr.sparsity(found, params)
  np.testing.assert_array_equal(counted.alive, [1])
  np.testing.assert_allclose(counted.weights, 0.75)


def test_above_lambda_max_zero_is_a_fixed_point():
  params = jax.tree.map(jnp.zeros_like, make_params())
  found = gr.find(params)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1))
  limit = gr.lambda_max(found, GRADS).max()
  for factor, dead in ((1.001, True), (0.999, False)):
    updates, _ = tx.update(GRADS, tx.init(params), params, sparsity=factor * limit)
    kernels = gr.select(found, optax.apply_updates(params, updates)).values()
    assert all(not k.any() for k in kernels) is dead


@pytest.mark.parametrize('size', [1.5e-4, 12.0])
def test_norms_in_half_precision_neither_vanish_nor_overflow(size):
  x = jnp.full((3, 3, 2, 64), size, jnp.float16)
  norms = gr.norms(x, -2)
  assert norms.dtype == jnp.float16
  np.testing.assert_allclose(norms, [24 * size] * 2, rtol=2e-3)
  shrunk = prox.group_lasso(x, 12 * size, -2)
  np.testing.assert_allclose(shrunk, np.full(x.shape, size / 2), rtol=3e-3)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_proximal_lands_on_the_prox_and_dead_groups_are_exactly_zero(dtype):
  params = make_params(dtype=dtype)
  found = gr.find(params)
  grads = jax.tree.map(lambda g: g.astype(dtype), GRADS)
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1))

  @jax.jit
  def step(params, state, lam):
    updates, state = tx.update(grads, state, params, sparsity=lam)
    return optax.apply_updates(params, updates), state

  new, _ = step(params, tx.init(params), 4.0)
  plain = jax.tree.map(lambda p, g: p - jnp.asarray(0.1, dtype) * g, params, grads)
  for layer, x in gr.select(found, plain).items():
    want = prox.group_lasso(x, 0.1 * 4.0 * np.sqrt(x.size / x.shape[-2]), -2)
    got = gr.select(found, new)[layer]
    assert got.dtype == dtype
    rtol = 1e-5 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(got == 0, want == 0)
  dead = gr.sparsity(found, new).groups
  assert 0 < dead < 1
  np.testing.assert_array_equal(
    new['heads']['a']['kernel'], plain['heads']['a']['kernel']
  )


def adam_reference(params, grads, lr, b2, eps, lam, found):
  """One AdamW-free Adam step and the weighted prox, written out."""
  new = {}
  for layer, p in gr.select(found, params).items():
    g = gr.select(found, grads)[layer]
    metric = jnp.sqrt(g**2) + eps  # after one step v̂ = g²
    x = p - lr * g / metric
    size = p.size / p.shape[-2]
    new[layer] = prox.group_lasso_weighted(x, metric, lr * lam * np.sqrt(size), -2)
  return new


def test_adaptive_proximal_uses_the_metric_of_the_step():
  params = make_params()
  found = gr.find(params)
  adam = functools.partial(optax.adam, b2=0.9, eps=1e-6)
  tx = msp.adaptive_proximal(adam, 'group_lasso', found, 0.5)
  updates, _ = jax.jit(tx.update)(GRADS, tx.init(params), params, sparsity=0.6)
  new = gr.select(found, optax.apply_updates(params, updates))
  want = adam_reference(params, GRADS, 0.5, 0.9, 1e-6, 0.6, found)
  for layer in found.layers:
    np.testing.assert_allclose(new[layer], want[layer], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(new[layer] == 0, want[layer] == 0)
  assert any((w == 0).all(axis=(0, 1, 3)).any() for w in want.values())


def test_adaptive_proximal_needs_one_second_moment():
  params = make_params()
  found = gr.find(params)
  for inner in (optax.sgd(0.1), optax.chain(optax.adam(0.1), optax.adam(0.1))):
    tx = msp.adaptive_proximal(inner, 'group_lasso', found, 0.1, **ADAM)
    with pytest.raises(UserError, match='one second moment'):
      tx.init(params)


@pytest.mark.parametrize(
  ('inner', 'message'),
  [
    (optax.amsgrad(0.1), 'AmsgradState is not'),
    (optax.rmsprop(0.1, centered=True), 'RStdDevState is not'),
    (
      optax.rmsprop(0.1, centered=True, bias_correction=True),
      'RStdDevWithCountState is not',
    ),
    (optax.contrib.schedule_free_adamw(0.1), 'ScheduleFreeState is not'),
    (optax.rmsprop(0.1, momentum=0.9), 'TraceState is not'),
    (
      optax.masked(optax.adam(0.1), {'backbone': False, 'heads': True}),
      'no second mom',
    ),
  ],
)
def test_adaptive_proximal_refuses_another_metric(inner, message):
  params = make_params()
  tx = msp.adaptive_proximal(inner, 'group_lasso', gr.find(params), 0.1, **ADAM)
  with pytest.raises(UserError, match=message):
    tx.init(params)


def test_adaptive_proximal_reads_the_metric_or_is_given_it():
  found = gr.find(make_params())
  make = lambda inner, **metric: msp.adaptive_proximal(
    inner, 'l1', found, 0.1, **metric
  )
  with pytest.raises(UserError, match='cannot see b2, eps_root of a transform that'):
    make(optax.adam(0.1), eps=1e-8)
  with pytest.raises(UserError, match='reads b2, eps and eps_root from its optimiser'):
    make(optax.adam, eps=1e-8)
  for inner in (optax.radam, optax.adamax, optax.lamb, optax.sgd, optax.scale_by_adam):
    with pytest.raises(UserError, match=f'does not fit {inner.__name__}; use one of'):
      make(inner)


@pytest.mark.parametrize('axis', ['in', 'out'])
@pytest.mark.parametrize('min_alive', [None, 1, 3])
@pytest.mark.parametrize('penalty', ['group_lasso', 'sparse_group_lasso', 'group_mcp'])
def test_layers_of_one_matrix_have_the_prox_of_their_own(
  monkeypatch, penalty, min_alive, axis
):
  rng = np.random.default_rng(4)
  # Groups of a have the size of b's and d's by input, of c's by output; d has only two.
  shapes = {
    'a': (3, 3, 4, 2),
    'b': (1, 1, 5, 18),
    'c': (1, 1, 36, 5),
    'd': (1, 1, 2, 18),
  }
  draw = lambda scale: {
    k: jnp.array(rng.normal(0, scale, s)) for k, s in shapes.items()
  }
  params, grads = draw(1e-2), draw(1.0)
  found = gr.find(params, '.*', axis=axis, granularity='layer')
  lam = jnp.linspace(0.3, 1.5, len(found.names))
  makers = {
    'euclidean': lambda: optax.chain(
      optax.sgd(1e-2),
      transforms.proximal(penalty, found, 1e-2, min_alive=min_alive),
    ),
    'adam': lambda: transforms.adaptive_proximal(
      optax.adam, penalty, found, 1e-2, min_alive=min_alive
    ),
  }

  def step(make, lam):
    tx = make()
    updates, _ = tx.update(grads, tx.init(params), params, sparsity=lam)
    return optax.apply_updates(params, updates)

  for make in makers.values():
    results = []
    for backend in ('cpu', 'gpu'):
      monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
      results.append(jax.jvp(functools.partial(step, make), (lam,), (lam,)))
    (apart, apart_slope), (together, slope) = results
    zeros = sum((z == 0).sum() for z in apart.values())
    assert 0 < zeros < sum(z.size for z in apart.values())
    for got, want in ((together, apart), (slope, apart_slope)):
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 2e-5, 1e-7), got, want)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), together, apart
    )


@pytest.mark.parametrize('penalty', ['group_lasso', 'l1'])
def test_adaptive_proximal_in_half_precision(penalty):
  def train(dtype):
    params, grads = jax.tree.map(lambda x: x.astype(dtype), (make_params(), GRADS))
    found = gr.find(params)
    tx = msp.adaptive_proximal(optax.adam, penalty, found, 0.05)
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(grads, state, params, sparsity=0.3)
      params = optax.apply_updates(params, updates)
    return gr.select(found, params)

  want = train(jnp.float32)
  for layer, x in train(jnp.bfloat16).items():
    np.testing.assert_allclose(x.astype(jnp.float32), want[layer], atol=0.06)


def test_a_step_of_a_gradient_that_stays_the_same_has_its_prox():
  """RMSProp counts no steps, and its mean of squares comes to rest."""
  params = {'backbone': {'c': {'kernel': jnp.full((1, 1, 2, 2), 0.5)}}}
  grads = jax.tree.map(jnp.ones_like, params)
  tx = msp.adaptive_proximal(optax.rmsprop, 'group_lasso', gr.find(params), 1e-3)

  def step(state, _):
    updates, state = tx.update(grads, state, params, sparsity=1.0)
    return state, updates['backbone']['c']['kernel'][0, 0, 0, 0]

  state, updates = jax.lax.scan(step, tx.init(params), length=400)
  assert state.count == 400
  nu = state.inner_state[0].nu['backbone']['c']['kernel']
  assert (0.9 * nu + jnp.float32(0.1) == nu).all()  # at rest, or this says nothing
  assert updates[-1] < -1.5e-3  # the step alone is -1e-3


@pytest.mark.parametrize('optimizer', [optax.adam, optax.rmsprop])
def test_no_step_no_prox(optimizer):
  params = make_params()
  found = gr.find(params)
  finite = optax.apply_if_finite(optimizer(0.1), 5)
  metric = transforms.metric_of(optimizer)._asdict()
  tx = msp.adaptive_proximal(finite, 'group_lasso', found, 0.1, **metric)
  plain = msp.adaptive_proximal(optimizer, 'group_lasso', found, 0.1)
  state = tx.init(params)
  broken = jax.tree.map(lambda g: g * jnp.nan, GRADS)
  want, _ = plain.update(GRADS, plain.init(params), params, sparsity=0.3)
  for grads, expected in (
    (broken, jax.tree.map(jnp.zeros_like, params)),
    (GRADS, want),
    (broken, jax.tree.map(jnp.zeros_like, params)),
  ):
    updates, state = tx.update(grads, state, params, sparsity=0.3)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, updates, expected)
  assert state.count == 1


@pytest.mark.parametrize(
  'make',
  [
    lambda found: msp.proximal('group_lasso', found, 0.1),
    lambda found: msp.adaptive_proximal(optax.adam, 'l1', found, 0.1),
    transforms.freeze_dead,
  ],
)
def test_groups_of_another_tree_are_refused(make):
  params = make_params()
  with pytest.raises(UserError, match='none of the groups is in these parameters'):
    make(gr.find(params)).init(params['backbone'])
  for count in (gr.sparsity, gr.alive, gr.lambda_max):
    with pytest.raises(UserError, match='none of the groups'):
      count(gr.find(params), params['heads'])


def test_a_box_around_an_array_has_no_name():
  boxed = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
  assert gr.find(boxed, '.*kernel', 'in').layers == ('kernel',)
  box = nn.LogicallyPartitioned(jnp.ones((4, 6)), ('in', 'out'))
  assert gr.find({'a': {'kernel': box}}, '.*kernel').layers == ('a/kernel',)


def test_a_coefficient_may_be_a_variable():
  found = gr.find(make_params())
  wanted = gr.coefficients(found, 0.1)
  assert gr.coefficients(found, nnx.Param(jnp.array(0.1))) == wanted


def test_nnx_optimizer():
  model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  found = gr.find(nnx.state(model, nnx.Param), '.*kernel')
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((2, 4))) ** 2))(model)
  optimizer.update(model, grads, sparsity=1e6)
  assert (model.kernel[...] == 0).all()


@pytest.mark.parametrize('penalty', ['group_lasso', 'group_mcp'])
def test_a_schedule_inside_jit(penalty):
  params = make_params()
  found = gr.find(params)

  def step(peak):
    schedule = optax.cosine_decay_schedule(peak, 100)
    tx = optax.chain(optax.sgd(schedule), msp.proximal(penalty, found, schedule))
    return tx.update(GRADS, tx.init(params), params, sparsity=0.5)[0]

  want = step(0.1)
  for got in (jax.jit(lambda: step(0.1))(), jax.jit(step)(0.1)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
  if penalty == 'group_mcp':
    with pytest.raises(UserError, match='too concave for a step of 40'):
      jax.jit(lambda: step(40.0))()


def test_inject_hyperparams_as_it_is():
  params = make_params()
  found = gr.find(params)
  plain = msp.proximal('group_lasso', found, 0.1)
  want, _ = plain.update(GRADS, plain.init(params), params, sparsity=0.5)
  make = optax.inject_hyperparams(msp.proximal)
  tx = make('group_lasso', found, learning_rate=0.1)
  update = jax.jit(lambda s: tx.update(GRADS, s, params, sparsity=0.5)[0])
  got = update(tx.init(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
  tx = make('group_lasso', found, learning_rate=0.1, min_alive=1)
  with pytest.raises(UserError, match='static_args'):
    jax.jit(lambda s: tx.update(GRADS, s, params, sparsity=0.5))(tx.init(params))


@pytest.mark.parametrize('value', [-1.0, float('nan'), [0.1, -0.1]])
def test_an_impossible_coefficient_is_refused(value):
  found = gr.find(make_params(), granularity='layer')
  with pytest.raises(UserError, match='it has to be 0 or more'):
    gr.coefficients(found, value)


@pytest.mark.parametrize(
  ('entry', 'want'),
  [
    ({'name': 'adamw', 'b2': 0.9, 'eps': 1e-6}, (0.9, 1e-6, 0.0)),
    ({'name': 'yogi'}, (0.999, 1e-3, 0.0)),
    ({'name': 'adabelief'}, (0.999, 1e-16, 1e-16)),
    ({'name': 'rmsprop', 'eps': 1e-4}, (0.9, 0.0, 1e-4)),
    ({'name': 'rmsprop', 'eps': 1e-4, 'eps_in_sqrt': False}, (0.9, 1e-4, 0.0)),
  ],
)
def test_metric_of_a_configured_optimiser(entry, want):
  name = entry.pop('name')
  assert transforms.metric_of(functools.partial(getattr(optax, name), **entry)) == want


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('adam', {}),
    ('nadam', {}),
    ('yogi', {}),
    ('adabelief', {}),
    ('rmsprop', {}),
    ('rmsprop', {'bias_correction': True, 'decay': 0.7}),
    ('rmsprop', {'eps_in_sqrt': False, 'eps': 1e-3}),
  ],
)
def test_the_metric_is_what_the_step_is_divided_by(name, options):
  # Without momentum u = −α g/d; soft thresholding moves x = p + u by α λ/d.
  params = {'w': jnp.array([[500.0, 4.0, 3.0]])}
  found = gr.find(params, 'w', 'weight')
  moments = {'rmsprop': {}, 'adabelief': {'b1': 0.5}}.get(name, {'b1': 0.0})
  optimizer = functools.partial(getattr(optax, name), **moments, **options)
  inner = optimizer(0.1)
  tx = msp.adaptive_proximal(optimizer, 'l1', found, 0.1)
  state, alone = tx.init(params), inner.init(params)
  for scale in (1.0, 0.3, 2.0):
    # The first is so small that eps, and where it stands, matters.
    grads = {'w': scale * jnp.array([[1e-4, 1.0, 3.0]])}
    updates, state = tx.update(grads, state, params, sparsity=0.01)
    plain, alone = inner.update(grads, alone, params)
  direction = grads['w']
  if name == 'adabelief':  # measures how far the gradient is from its mean
    direction = alone[0].mu['w'] / (1 - 0.5**3)
  divided = -0.1 * direction / plain['w']
  np.testing.assert_allclose(plain['w'] - updates['w'], 1e-3 / divided, rtol=2e-3)


@pytest.mark.parametrize(
  'name', ['lamb', 'contrib.adopt', 'contrib.acprop', 'scale_by_learning_rate']
)
def test_optimisers_that_only_look_like_adam_are_refused(name):
  optimizer = optax
  for part in name.split('.'):
    optimizer = getattr(optimizer, part)
  name = optimizer.__name__
  with pytest.raises(UserError, match=rf'does not fit {name}; .*metric=euclidean'):
    transforms.metric_of(optimizer)
  with pytest.raises(UserError, match='does not fit rmsprop with centered'):
    transforms.metric_of(functools.partial(optax.rmsprop, centered=True))
  with pytest.raises(UserError, match='does not fit rmsprop with momentum'):
    transforms.metric_of(functools.partial(optax.rmsprop, momentum=0.9))


def test_inject_hyperparams_with_an_optimiser():
  params = make_params()
  found = gr.find(params)
  make = optax.inject_hyperparams(msp.adaptive_proximal, static_args='inner')
  tx = make(optax.adam, 'group_lasso', found, learning_rate=0.1, sparsity=0.3)
  state = tx.init(params)
  plain = msp.adaptive_proximal(optax.adam, 'group_lasso', found, 0.1)
  want, _ = plain.update(GRADS, plain.init(params), params, sparsity=0.3)
  got, _ = tx.update(GRADS, state, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
  state.hyperparams['learning_rate'] = jnp.zeros(())  # of the step and of the prox
  got, _ = tx.update(GRADS, state, params)
  assert all(not x.any() for x in jax.tree.leaves(got))


def transform_cases(found):
  prox_last = lambda tx: optax.chain(tx, msp.proximal('group_lasso', found, 0.1))
  yield 'sgd', prox_last(optax.sgd(0.1, momentum=0.9))
  yield 'lion', prox_last(optax.lion(0.1))
  yield (
    'schedule',
    msp.adaptive_proximal(
      optax.adamw,
      'group_lasso',
      found,
      optax.linear_schedule(0.1, 0.0, 9),
    ),
  )
  yield 'rmsprop', msp.adaptive_proximal(optax.rmsprop, 'l1', found, 0.1)
  # Not `gradient_transformation()`, which drops extra arguments.
  steps = optax.MultiSteps(prox_last(optax.sgd(0.1)), 2)
  yield (
    'multi_steps',
    optax.GradientTransformationExtraArgs(steps.init, steps.update),
  )
  yield (
    'masked',
    optax.chain(
      optax.sgd(0.1),
      optax.masked(
        msp.proximal('group_lasso', found, 0.1),
        lambda p: jax.tree_util.tree_map_with_path(
          lambda path, _: 'stem' in gr.path_name(path), p
        ),
      ),
    ),
  )
  yield (
    'partition',
    optax.partition(
      {'b': prox_last(optax.sgd(0.1)), 'h': optax.adam(0.1)},
      {'backbone': 'b', 'heads': 'h'},
    ),
  )
  yield (
    'inject',
    optax.chain(
      optax.sgd(0.1),
      optax.inject_hyperparams(
        lambda learning_rate: msp.proximal('group_lasso', found, learning_rate)
      )(learning_rate=0.1),
    ),
  )
  adaptive = lambda learning_rate: msp.adaptive_proximal(
    optax.adam, 'group_lasso', found, learning_rate
  )
  steps = optax.MultiSteps(adaptive(0.1), 2)
  yield (
    'adaptive multi_steps',
    optax.GradientTransformationExtraArgs(steps.init, steps.update),
  )
  yield (
    'adaptive masked',
    optax.chain(
      optax.masked(adaptive(0.1), {'backbone': True, 'heads': False}),
      optax.masked(optax.sgd(0.1), {'backbone': False, 'heads': True}),
    ),
  )
  yield (
    'adaptive partition',
    optax.partition(
      {'b': adaptive(0.1), 'h': optax.adam(0.1)}, {'backbone': 'b', 'heads': 'h'}
    ),
  )
  yield 'adaptive inject', optax.inject_hyperparams(adaptive)(learning_rate=0.1)


CASES = (
  'sgd',
  'lion',
  'schedule',
  'rmsprop',
  'multi_steps',
  'masked',
  'partition',
  'inject',
  'adaptive multi_steps',
  'adaptive masked',
  'adaptive partition',
  'adaptive inject',
)


@pytest.mark.parametrize('name', CASES)
def test_a_composition_does_what_its_parts_do(name):
  """The optimiser's own step and then the prox, written out."""
  params, lam = make_params(), 0.3
  found = gr.find(params)
  tx = optax.with_extra_args_support(dict(transform_cases(found))[name])
  state, new = tx.init(params), params
  for _ in range(4):
    updates, state = tx.update(GRADS, state, new, sparsity=lam)
    new = optax.apply_updates(new, updates)

  rate = optax.linear_schedule(0.1, 0.0, 9) if name == 'schedule' else lambda _: 0.1
  makes = {'sgd': functools.partial(optax.sgd, momentum=0.9), 'lion': optax.lion}
  makes |= {'schedule': optax.adamw, 'rmsprop': optax.rmsprop}
  plain = optax.adam if name.startswith('adaptive') else optax.sgd
  optimizer = makes.get(name, plain)(rate)
  own, want = optimizer.init(params), params
  kind = prox.get_penalty('l1' if name == 'rmsprop' else 'group_lasso')
  for step in range(2 if 'multi_steps' in name else 4):
    updates, own = optimizer.update(GRADS, own, want)
    want = optax.apply_updates(want, updates)
    kernels = gr.select(found, want)
    if name == 'masked':
      kernels = {k: v for k, v in kernels.items() if 'stem' in k}
    for layer, x in kernels.items():
      if plain is optax.adam or name in ('schedule', 'rmsprop'):
        (nu,) = [s.nu for s in own if hasattr(s, 'nu')]
        second = gr.by_path(nu)[layer]
        if name == 'rmsprop':
          metric = jnp.sqrt(second + 1e-8)
        else:
          metric = jnp.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        z = kind.prox_weighted(x, metric, rate(step), lam, -2)
      else:
        z = kind.prox(x, rate(step), lam, -2)
      want = gr.replace(want, {layer: z})
  for layer, z in gr.select(found, want).items():
    np.testing.assert_allclose(
      gr.select(found, new)[layer], z, rtol=1e-3, atol=1e-5, err_msg=layer
    )
    assert not np.array_equal(z, gr.by_path(params)[layer])


@pytest.mark.parametrize('name', CASES)
def test_composes_with_optax(name):
  params = make_params()
  found = gr.find(params)
  tx = dict(transform_cases(found))[name]
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(GRADS, state, params, sparsity=6.0)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  new = params
  for _ in range(4):
    new, after = step(new, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [x.dtype for x in jax.tree.leaves(after)] == [
      x.dtype for x in jax.tree.leaves(state)
    ]
    state = after
  kernels = gr.select(found, new)
  assert not jnp.array_equal(
    new['heads']['a']['kernel'], params['heads']['a']['kernel']
  )
  if name == 'rmsprop':
    assert gr.sparsity(found, new).weights > 0
  else:
    assert gr.sparsity(found, new).groups > 0
  if name == 'masked':
    assert gr.alive(found, new)['backbone/layer1_0/kernel'].all()
    assert not gr.alive(found, new)['backbone/stem/kernel'].all()
  assert all(jnp.isfinite(k).all() for k in kernels.values())


def make_proximal(found, adaptive, **options):
  if adaptive:
    return msp.adaptive_proximal(optax.adam, 'group_lasso', found, 0.1, **options)
  sgd = optax.sgd(0.1)
  return optax.chain(sgd, msp.proximal('group_lasso', found, 0.1, **options))


@pytest.mark.parametrize('adaptive', [False, True])
def test_a_coefficient_of_the_transform_itself(adaptive):
  """Where a loop gives no further arguments, as Flax's TrainState."""
  params = make_params()
  found = gr.find(params)
  schedule = optax.linear_schedule(0.0, 0.3, 2)
  plain = make_proximal(found, adaptive)
  scheduled = make_proximal(found, adaptive, sparsity=schedule)
  state = train_state.TrainState.create(apply_fn=None, params=params, tx=scheduled)
  own = plain.init(params)
  for step in range(3):
    updates, own = plain.update(GRADS, own, params, sparsity=schedule(step))
    params = optax.apply_updates(params, updates)
    state = state.apply_gradients(grads=GRADS)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
  # What `update` is given comes first.
  start = make_params()
  for tx in (plain, scheduled):
    updates, _ = tx.update(GRADS, tx.init(start), start, sparsity=1e6)
    assert gr.sparsity(found, optax.apply_updates(start, updates)).groups == 1


@pytest.mark.parametrize('adaptive', [False, True])
def test_dead_groups_are_zero_also_by_gradients_of_half_precision(adaptive):
  params = make_params()
  found = gr.find(params)
  tx = make_proximal(found, adaptive)
  gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
  updates, _ = tx.update(gradients, tx.init(params), params, sparsity=1e6)
  assert gr.sparsity(found, optax.apply_updates(params, updates)).groups == 1


def test_a_prox_inside_another_has_the_coefficient_too():
  params = make_params()
  found = {axis: gr.find(params, axis=axis) for axis in ('in', 'out')}
  inside = msp.adaptive_proximal(optax.adam, 'group_lasso', found['in'], 0.1)
  both = msp.adaptive_proximal(inside, 'group_lasso', found['out'], 0.1, **ADAM)
  updates, _ = both.update(GRADS, both.init(params), params, sparsity=1e6)
  assert gr.sparsity(found['in'], optax.apply_updates(params, updates)).groups == 1


def test_prox_has_to_be_last():
  params = make_params()
  found = gr.find(params)
  last = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1))
  first = optax.chain(msp.proximal('group_lasso', found, 0.1), optax.sgd(0.1))
  dead = []
  for tx in (last, first):
    updates, _ = tx.update(GRADS, tx.init(params), params, sparsity=100.0)
    dead.append(gr.sparsity(found, optax.apply_updates(params, updates)).groups)
  assert dead[0] == 1
  assert dead[1] == 0


def test_updates_retreat_from_a_violation():
  tx = optax.with_extra_args_support(transforms.retreat(0.1))
  updates = jnp.array([0.5, -0.5])
  for violation, wanted in (
    (None, [0.5, -0.5]),
    (-1.0, [0.5, -0.5]),
    (0.5, [-0.05, -0.55]),
    (7.0, [-0.1, -0.6]),
  ):
    got, _ = tx.update(updates, tx.init(updates), updates, violation=violation)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_missing_arguments_are_errors():
  params = make_params()
  found = gr.find(params)
  for tx in (
    msp.proximal('group_lasso', found, 0.1),
    msp.adaptive_proximal(optax.adam, 'group_lasso', found, 0.1),
  ):
    state = tx.init(params)
    with pytest.raises(ValueError, match='params'):
      tx.update(GRADS, state, sparsity=0.1)
    with pytest.raises(ValueError, match='sparsity'):
      tx.update(GRADS, state, params)
    with pytest.raises(UserError, match='is a dict: expected a scalar or 1 entries'):
      tx.update(GRADS, state, params, sparsity={'all': 0.1})
    with pytest.raises(UserError, match='expected a scalar or 1 entries'):
      tx.update(GRADS, state, params, sparsity=jnp.ones(3))
  with pytest.raises(UserError, match='unknown penalty'):
    msp.proximal('lasso', found, 0.1)


def test_coefficients_by_layer():
  params = make_params()
  found = gr.find(params, granularity='layer')
  tx = optax.chain(optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1))
  updates, _ = tx.update(
    GRADS, tx.init(params), params, sparsity=jnp.array([100.0, 0.0])
  )
  alive = gr.alive(found, optax.apply_updates(params, updates))
  assert not alive['backbone/layer1_0/kernel'].any()
  assert alive['backbone/stem/kernel'].all()


@pytest.mark.parametrize('adaptive', [False, True])
def test_survival_floor(adaptive):
  params = make_params()
  found = gr.find(params)
  tx = make_proximal(found, adaptive, min_alive=2)
  update = jax.jit(tx.update)
  state = tx.init(params)
  for _ in range(50):
    updates, state = update(GRADS, state, params, sparsity=1e3)
    params = optax.apply_updates(params, updates)
  for layer, kernel in gr.select(found, params).items():
    norms = np.sort(np.array(gr.norms(kernel, -2)))
    floor = transforms.FLOOR_RMS * np.sqrt(kernel.size / kernel.shape[-2])
    np.testing.assert_array_equal(norms[:-2], 0)
    np.testing.assert_allclose(norms[-2:], floor, rtol=1e-3, err_msg=layer)
  # More than there are: all of them stay.
  all_stay = make_proximal(found, adaptive, min_alive=100)
  start = make_params()
  updates, _ = all_stay.update(GRADS, all_stay.init(start), start, sparsity=1e3)
  for mask in gr.alive(found, optax.apply_updates(start, updates)).values():
    assert mask.all()
  # Where nothing presses on it, the floor does nothing.
  free = make_params()
  updates, _ = tx.update(GRADS, tx.init(free), free, sparsity=0.0)
  without = make_proximal(found, adaptive)
  same, _ = without.update(GRADS, without.init(free), free, sparsity=0.0)
  jax.tree.map(np.testing.assert_array_equal, updates, same)


def test_scale_by_mean_magnitude_is_robust():
  tx = transforms.scale_by_mean_magnitude(decay=0.9, clip=3.0)
  state = tx.init(jnp.zeros(2))
  for u in ([2.0, 0.0], [-2.0, 0.0]):
    scaled, state = tx.update(jnp.array(u), state)
    np.testing.assert_allclose(scaled, np.sign(u), rtol=1e-6)
  outlier, state = tx.update(jnp.array([2e6, 1e-9]), state)
  assert outlier[0] == 3.0
  after, _ = tx.update(jnp.array([2.0, 1e-9]), state)
  assert after[0] > 0.4  # the outlier is forgotten at once
  for value in (jnp.nan, jnp.inf):
    scaled, passed = tx.update(jnp.array([value, 1e-9]), state)
    np.testing.assert_array_equal(scaled[0], min(value, 3.0))
    assert passed.mean[0] == state.mean[0]
  first, _ = tx.update(jnp.array([jnp.nan, 0.0]), tx.init(jnp.zeros(2)))
  np.testing.assert_array_equal(first, [jnp.nan, 0.0])


def test_ρ_of_half_precision_keeps_its_state():
  tx = transforms.scale_by_mean_magnitude()
  state = tx.init(jnp.zeros(2, jnp.bfloat16))
  updates, after = tx.update(jnp.ones(2, jnp.bfloat16), state)
  assert updates.dtype == after.mean.dtype == jnp.bfloat16


def test_anticipate_extrapolates_a_ramp_and_leaves_a_constant():
  tx = transforms.anticipate(10.0, decay=0.5)
  state = tx.init(jnp.zeros(2))
  for i in range(40):
    u, state = tx.update(jnp.array([0.1 * i, 3.0]), state)
    if i == 0:
      np.testing.assert_array_equal(u, [0.0, 3.0])
  np.testing.assert_allclose(u, [0.1 * 39 + 10 * 0.1, 3.0], rtol=1e-5)
  donated = jax.jit(lambda u, state: tx.update(u, state), donate_argnums=1)
  donated(jnp.ones(2), tx.init(jnp.zeros(2)))  # no buffer is in the state twice


def test_bounded():
  tx = transforms.bounded(-1.0, 0.0)
  p = jnp.array([-0.9, -0.1])
  updates, _ = tx.update(jnp.array([-5.0, 5.0]), tx.init(p), p)
  np.testing.assert_array_equal(optax.apply_updates(p, updates), [-1.0, 0.0])
  with pytest.raises(UserError, match='the lower bound'):
    transforms.bounded(1.0, -1.0)


def test_clip_by_weight_norm():
  tx = transforms.clip_by_weight_norm(0.5, min_norm=0.1)
  p = {'a': jnp.array([3.0, 4.0]), 'b': jnp.zeros(2), 'c': jnp.array(2.0)}
  u = {'a': jnp.array([30.0, 40.0]), 'b': jnp.ones(2), 'c': jnp.array(0.1)}
  got, _ = tx.update(u, tx.init(p), p)
  np.testing.assert_allclose(got['a'], [1.5, 2.0], rtol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(got['b']), 0.05, rtol=1e-6)
  np.testing.assert_array_equal(got['c'], u['c'])
  # A step along the gradient does not depend on the weights' scale, as it should
  # behind a norm: g(sp) = g(p)/s.
  far = tx.update({'a': u['a'] / 0.1}, None, {'a': 0.1 * p['a']})[0]['a']
  np.testing.assert_allclose(far, 0.1 * got['a'], rtol=1e-6)
  slope = jax.jacfwd(lambda u: tx.update({'a': u}, None, {'a': p['a']})[0]['a'])
  assert np.isfinite(slope(jnp.zeros(2))).all()


def test_build_resolves_names():
  tx = optimizers.build(
    [
      {'name': 'clip_by_global_norm', 'max_norm': 1.0},
      {'name': 'bounded', 'lower': -1.0, 'upper': 1.0},
    ],
    'outer',
  )
  p = jnp.zeros(1)
  updates, _ = tx.update(jnp.array([7.0]), tx.init(p), p)
  np.testing.assert_allclose(updates, 1.0)
  for entry, message in (
    ({'name': 'adamm'}, 'unknown transform'),
    ({'name': 'sgd', 'lr': 1}, 'cannot take'),
    ({'name': 'l2_loss'}, 'cannot take'),
    ({'name': 'safe_increment', 'count': 1}, 'not an optax transform'),
    ({'name': 'sgd', 'learning_rate': {'name': 'cosine'}}, 'unknown schedule'),
    ({'name': 'sgd', 'learning_rate': {'name': 'linear_schedule'}}, 'cannot take'),
  ):
    with pytest.raises(UserError, match=message):
      optimizers.build([entry], 'outer')


def test_nothing_comes_after_the_step_that_the_prox_follows():
  found = gr.find(make_params())
  options = dict(
    penalty=prox.get_penalty('l1'), groups=found, coefficient='fixed', metric='adam'
  )
  adam = {'name': 'adam', 'learning_rate': 0.1}
  clip = {'name': 'clip', 'max_delta': 1.0}
  optimizers.with_prox([clip, adam], 'optimizer', **options)
  for late in ({'name': 'scale', 'step_size': 0.1}, {'name': 'scale_by_trust_ratio'}):
    with pytest.raises(UserError, match=f'{late["name"]} comes after adam and would'):
      optimizers.with_prox([clip, adam, late], 'optimizer', **options)
  with pytest.raises(UserError, match='optimizer: no entry has a learning_rate'):
    optimizers.with_prox([clip], 'optimizer', **options)
  with pytest.raises(UserError, match=r'optimizer: the prox .* does not fit lamb'):
    optimizers.with_prox([adam | {'name': 'lamb'}], 'optimizer', **options)


def test_importing_the_package_starts_no_backend():
  """Or `jax.distributed.initialize` and the choice of a platform come too late."""
  code = (
    'import msp, jax; from jax._src import xla_bridge; '
    'assert not xla_bridge._backends, xla_bridge._backends'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_build_resolves_schedules():
  schedule = {'name': 'cosine_decay_schedule', 'init_value': 1.0, 'decay_steps': 2}
  entry = ConfigDict({'name': 'sgd', 'learning_rate': schedule})
  tx = optimizers.build([entry], 'outer')
  p, steps = jnp.zeros(1), []
  state = tx.init(p)
  for _ in range(3):
    updates, state = tx.update(jnp.ones(1), state, p)
    steps.append(-updates[0])
  np.testing.assert_allclose(steps, [1.0, 0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize(
  ('name', 'options'), [('group_mcp', {'gamma': 0.1}), ('group_scad', {'a': 1.1})]
)
def test_a_step_too_large_for_a_concave_penalty_is_refused(name, options):
  kind = prox.get_penalty(name, **options)
  groups = gr.find(make_params())
  msp.proximal(kind, groups, 0.05)
  with pytest.raises(UserError, match=r'too concave for a step of 0\.2.* below 0\.1'):
    msp.proximal(kind, groups, 0.2)
  with pytest.raises(UserError, match='too concave'):
    msp.proximal(kind, groups, optax.cosine_decay_schedule(0.2, 10))
  peak = optax.warmup_cosine_decay_schedule(0.0, 0.2, 300, 1000)  # late
  with pytest.raises(UserError, match='too concave'):
    msp.proximal(kind, groups, peak)


@pytest.mark.parametrize('axis', ['in', 'out', 'weight'])
def test_a_frozen_pattern_stays_and_the_rest_trains_as_without(axis):
  params = make_params()
  groups = gr.find(params, axis=axis)
  keep = {
    layer: jnp.arange(mask.size).reshape(mask.shape) % 2 == 0
    for layer, mask in gr.alive(groups, params).items()
  }
  params = gr.remove(groups, params, keep)
  plain = optax.adamw(0.1, weight_decay=0.1)
  frozen = optax.chain(plain, transforms.freeze_dead(groups))

  def trained(tx):
    def body(carry, _):
      p, state = carry
      updates, state = tx.update(GRADS, state, p)
      return (optax.apply_updates(p, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), length=5)[0][0]

  free, held = trained(plain), trained(frozen)
  alive = gr.alive(groups, held)
  for layer, mask in keep.items():
    np.testing.assert_array_equal(alive[layer], mask)
  assert all(mask.all() for mask in gr.alive(groups, free).values())
  # Updates are made leaf by leaf, so nothing else may differ.
  wanted = gr.remove(groups, free, keep)
  jax.tree.map(np.testing.assert_array_equal, held, wanted)


def test_a_thaw_lets_dead_groups_come_back():
  params = make_params()
  groups = gr.find(params)
  dead = gr.remove(
    groups, params, {k: jnp.zeros_like(m) for k, m in gr.alive(groups, params).items()}
  )
  tx = optax.chain(optax.sgd(0.1), transforms.freeze_dead(groups))
  for thaw in (False, True):
    updates, _ = tx.update(GRADS, tx.init(dead), dead, thaw=jnp.asarray(thaw))
    for mask in gr.alive(groups, optax.apply_updates(dead, updates)).values():
      np.testing.assert_array_equal(mask, thaw)
  with pytest.raises(ValueError, match='needs the params'):
    tx.update(GRADS, tx.init(dead))


@pytest.mark.parametrize('metric', ['adam', 'euclidean'])
def test_the_survivor_of_a_frozen_layer_is_one_of_the_living(metric):
  """A dead group with a larger update must not take the place of the last one."""
  params = {'a': {'kernel': jnp.array([[5e-4], [0.0]])}}
  grads = {'a': {'kernel': jnp.array([[1e-3], [1.0]])}}
  groups = gr.find(params, r'a/kernel')
  rate, step = 1e-3, optax.sgd(1e-3) if metric == 'euclidean' else optax.adam(1e-3)
  chain = optax.chain(step, transforms.freeze_dead(groups))
  if metric == 'adam':
    tx = msp.adaptive_proximal(chain, 'group_lasso', groups, rate, min_alive=1, **ADAM)
  else:
    prox = msp.proximal('group_lasso', groups, rate, min_alive=1)
    tx = optax.chain(chain, prox)
  updates, _ = tx.update(grads, tx.init(params), params, sparsity=50.0)
  new = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(gr.alive(groups, new)['a/kernel'], [True, False])


@pytest.mark.parametrize(
  ('entry', 'message'),
  [
    ({'name': 'adam'}, 'give it an eps_root above 0'),
    ({'name': 'rmsprop', 'eps_in_sqrt': False}, 'set its eps_in_sqrt'),
    ({'name': 'adam', 'eps_root': 1e-16}, None),
    ({'name': 'adabelief'}, None),  # by its own default
    ({'name': 'rmsprop'}, None),
  ],
)
def test_what_a_hypergradient_runs_through_has_a_derivative(entry, message):
  entries = [{**entry, 'learning_rate': 0.1}]
  optimizers.build(entries, 'optimizer')
  if message:
    with pytest.raises(UserError, match=message):
      optimizers.build(entries, 'optimizer', differentiated=True)
    return
  tx = optimizers.build(entries, 'optimizer', differentiated=True)
  state = tx.init(jnp.zeros(2))
  step = lambda g: tx.update(g, state, jnp.zeros(2))[0]
  slope = jax.jvp(step, (jnp.zeros(2),), (jnp.ones(2),))[1]
  assert jnp.isfinite(slope).all()
