"""Optimisers by name: what λ means behind each, and what decay leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msp import groups as gr
from msp import optimizers
from msp.errors import UserError
from msp.prox import get_penalty

STEP = {'learning_rate': 0.01}
ADAM = {'eps': 1e-6, 'eps_root': 1e-16}


def settled_at(*entries, scale=1.0, metric=None):
  """Where ½ · scale · (x − 1)² + 0.3 |x| ends, x a group of one weight."""
  params = {'kernel': jnp.full((1, 1), 0.5)}
  groups = gr.find(params, 'kernel')
  tx = optimizers.with_prox(
    [*entries[:-1], STEP | entries[-1]],
    'optimizer',
    get_penalty('group_lasso'),
    groups,
    coefficient='fixed',
    metric=metric,
  )

  def step(carry, _):
    params, state = carry
    gradient = jax.tree.map(lambda x: scale * (x - 1), params)
    updates, state = tx.update(gradient, state, params, sparsity=0.3)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=4000)
  return float(params['kernel'][0, 0])


@pytest.mark.parametrize(
  'entry',
  [
    {'name': 'sgd'},
    {'name': 'sgd', 'momentum': 0.9},
    {'name': 'sgd', 'momentum': 0.9, 'nesterov': True},
    {
      'name': 'sgd',
      'momentum': 0.9,
      'learning_rate': {'name': 'constant_schedule', 'value': 0.01},
    },
    {'name': 'adam', **ADAM},
    {'name': 'nadam', **ADAM},
    {'name': 'adamw', 'weight_decay': 0.0, **ADAM},
    {'name': 'adabelief', **ADAM},
    {'name': 'yogi', 'eps': 1e-6},
    {'name': 'rmsprop'},
  ],
  ids=lambda entry: '-'.join(map(str, entry)) + '-' + entry['name'],
)
@pytest.mark.parametrize('scale', [1.0, 10.0])
def test_a_coefficient_is_that_of_loss_plus_penalty(entry, scale):
  """scale · (x − 1) + 0.3 = 0, by the prox in the metric that the step has."""
  np.testing.assert_allclose(settled_at(entry, scale=scale), 1 - 0.3 / scale, atol=5e-3)


def test_a_momentum_that_is_not_written_out():
  """That of lars is 0.9 if not said otherwise."""

  def step(entry):
    params = {'kernel': jnp.ones((1, 1))}
    tx = optimizers.with_prox(
      [{'name': 'lars', 'learning_rate': 0.1, 'weight_decay': 0.0, **entry}],
      'optimizer',
      get_penalty('group_lasso'),
      gr.find(params, '.*kernel'),
      coefficient='fixed',
      metric='euclidean',
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    return tx.update(zeros, tx.init(params), params, sparsity=0.1)[0]['kernel']

  np.testing.assert_allclose(step({}), -0.1, rtol=1e-5)
  np.testing.assert_allclose(step({}), step({'momentum': 0.9}))


def test_momentum_as_a_transform_of_its_own():
  trace = {'name': 'trace', 'decay': 0.9}
  np.testing.assert_allclose(settled_at(trace, {'name': 'sgd'}), 0.7, atol=5e-3)


@pytest.mark.parametrize(
  ('name', 'options', 'remedy'),
  [
    ('adam', STEP, 'give it an eps_root above 0'),
    ('rmsprop', STEP | {'eps_in_sqrt': False}, 'set its eps_in_sqrt'),
    ('clip_by_block_rms', {'threshold': 0.1}, 'name another'),  # forward mode
    ('scale_by_trust_ratio', {}, 'name another'),  # reverse mode
  ],
)
def test_a_hypergradient_runs_through_what_has_a_derivative(name, options, remedy):
  entries = [{'name': name, **options}, {'name': 'sgd', **STEP}]
  optimizers.build(entries, 'optimizer')
  with pytest.raises(UserError, match=f'optimizer: .* {name}, whose .*{remedy}'):
    optimizers.build(entries, 'optimizer', differentiated=True)


def test_weight_decay_leaves_the_uncertainties_alone():
  entries = [{'name': 'adamw', 'weight_decay': 0.5, **STEP}]
  params = {'kernel': jnp.ones(2), 'log_vars': {'depth': jnp.ones(())}}
  nothing = jax.tree.map(jnp.zeros_like, params)

  def updated(entries):
    tx = optimizers.build(entries, 'optimizer')
    return tx.update(nothing, tx.init(params), params)[0]

  updates = updated(entries)
  np.testing.assert_allclose(updates['kernel'], -0.005, rtol=1e-5)
  assert updates['log_vars']['depth'] == 0
  # Whoever gives a mask has their own.
  only = lambda params: {name: name == 'log_vars' for name in params}
  updates = updated([entries[0] | {'mask': only}])
  assert not updates['kernel'].any()
  np.testing.assert_allclose(updates['log_vars']['depth'], -0.005, rtol=1e-5)


def test_an_optimiser_of_ones_own_keeps_its_arguments():
  own = [{'name': f'{__name__}:decay', 'weight_decay': 0.5}]
  params = {'log_vars': {'depth': jnp.ones(())}}
  tx = optimizers.build(own, 'optimizer')
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates['log_vars']['depth'] == 1.5


def decay(weight_decay, mask=None):
  assert mask is None
  add = lambda u, p: u + weight_decay * p
  update = lambda u, s, p: (jax.tree.map(add, u, p), s)
  return optax.GradientTransformation(lambda _: (), update)
