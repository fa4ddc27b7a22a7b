"""The training step: what it reduces to, and what must not influence what.

In float64, so that equal means equal to about twelve digits.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import msp
from data import Label
from msp import episodes, transforms
from msp import groups as gr
from msp import tasks as task_module
from msp.episodes import Combination, Hypergradient, Inner, task_losses
from msp.hypergradient import Solver, online, zero_tangent
from msp.models import multitask
from msp.objectives import Objective, make_twin
from msp.train_state import TrainState
from msp.train_step import make_train_step

SIZE = (16, 16)
INNER_RATE, OUTER_RATE, RHO_RATE = 0.1, 0.01, 0.5
KEY = jax.random.key(7)

# Compiling takes most of the time here; these make it six times faster.
jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_cpu_use_fusion_emitters': False,
  },
)


LABELS = {
  'regions': Label('segmentation', ('a', 'b', 'c')),
  'edges': Label('edges', ('edge',)),
  'smiling': Label('attribute', ('no', 'yes')),
  'male': Label('attribute', ('no', 'yes')),
}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


class SmallBackbone(nn.Module):
  """Two convolutions with batch norm: compiles in a tenth of a ResNet's time."""

  @nn.compact
  def __call__(self, x, train):
    for i in range(2):
      x = nn.Conv(6, (3, 3), strides=2, use_bias=False, name=f'layer{i}_0')(x)
      x = nn.softplus(nn.BatchNorm(use_running_average=not train)(x))
    return x


class SmallHead(nn.Module):
  """A dense or image-level head with batch norm."""

  outputs: int
  dense: bool

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    x = jnp.tanh(x)
    return nn.Dense(self.outputs)(x if self.dense else x.mean((1, 2)))


class Problem(NamedTuple):
  model: multitask.MultiTask
  tasks: dict
  groups: gr.Groups
  params: dict
  stats: dict

  def state(self, outer, **kwargs):
    state = TrainState(
      jnp.zeros((), jnp.int32), self.params, self.stats, outer.init(self.params)
    )
    return state._replace(**kwargs)

  def step(self, outer, **kwargs):
    inner = {'inner': None, 'inner_steps': 0, 'episode_draw': 'full', 'exact': True}
    loops = {'unroll': True, 'truncation': None}
    mode = {'hypergradient': 'reverse', 'learn_on': 'hold_out'}
    mode |= {'solver': Solver(), 'tangent_decay': 0.99, 'tangent_max_norm': 1.0}
    take = lambda known: [kwargs.pop(name, value) for name, value in known.items()]
    step = make_train_step(
      self.model,
      self.tasks,
      self.groups,
      outer,
      inner=Inner(*take(inner), *take(loops)),
      hypergradient=Hypergradient(*take(mode)),
      **{'combination': Combination()} | kwargs,
    )
    return jit(step)


def problem(names, *, real=False, uncertainty=False):
  """A tiny network, float64 throughout."""
  tasks = task_module.make(names, LABELS, loss_resolution='label')
  model = multitask.build(
    {name: (task.head, task.outputs) for name, task in tasks.items()},
    depth=18,
    blocks=(1, 1, 1, 1),
    width=0.0625,
    dtype='float64',
    head_features=32,
    dropout=0.0,
    convolution_implementation='lax',
  )
  if not real:
    heads = {
      name: SmallHead(task.outputs, task.head == 'dense')
      for name, task in tasks.items()
    }
    model = multitask.MultiTask(SmallBackbone(), heads)
  params, stats = init(model)
  if uncertainty:
    params['log_vars'] = {name: jnp.full((), 0.3) for name in names}
  params, stats = jax.tree.map(lambda x: x.astype(jnp.float64), (params, stats))
  groups = gr.find(params, r'backbone/layer.*kernel', 'in')
  return Problem(model, tasks, groups, params, stats)


def init(model):
  return jit(lambda key: multitask.init(model, key, (*SIZE, 3)))(jax.random.key(0))


def batch(seed, size=4):
  rng = np.random.default_rng(seed)
  return {
    'image': rng.random((size, *SIZE, 3)),
    'valid': np.ones(size, bool),
    'regions': rng.integers(0, 3, (size, *SIZE)).astype(np.int32),
    'edges': (rng.random((size, *SIZE)) < 0.2).astype(np.float64),
    'smiling': rng.integers(0, 2, size).astype(np.int32),
    'male': rng.integers(0, 2, size).astype(np.int32),
  }


def batches(size=4):
  return {
    'support': batch(1, size),
    'query': batch(2, size),
    'hold_out': batch(3, size),
  }


def learned(rho=-2.0):
  """State of a learned scalar λ, and its plain optimiser."""
  optimizer = optax.sgd(RHO_RATE)
  rho = jnp.array(rho)
  return optimizer, {
    'rho': rho,
    'lambda_max': jnp.array(0.3),
    'rho_opt_state': optimizer.init(rho),
  }


def inner_optimizer(groups):
  return optax.chain(
    optax.sgd(INNER_RATE), msp.proximal('group_lasso', groups, INNER_RATE)
  )


def adamw():
  # A large eps: the step has to be a smooth function of the gradient.
  return optax.with_extra_args_support(
    optax.adamw(OUTER_RATE, eps=1e-2, weight_decay=0.1)
  )


def prox_adamw(groups, metric='adam'):
  adam = functools.partial(optax.adamw, eps=1e-2, weight_decay=0.1)
  if metric == 'adam':
    return msp.adaptive_proximal(adam, 'group_lasso', groups, OUTER_RATE)
  return optax.chain(adam(OUTER_RATE), msp.proximal('group_lasso', groups, OUTER_RATE))


def close(actual, expected, tolerance=1e-10):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
    actual,
    expected,
  )


def same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def moved(new, old):
  """Whether some entry of every leaf has changed."""
  return all(
    bool(jnp.any(a != b))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  )


def total_loss(p, params, data, names, stats=None):
  """Σ_t L_t and the running statistics, from the model's modules themselves."""
  stats = p.stats if stats is None else stats

  def run(module, params, stats, x):
    variables = {'params': params, 'batch_stats': stats}
    y, new = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return y, new.get('batch_stats', {})

  features, backbone_stats = run(
    p.model.backbone, params['backbone'], stats['backbone'], data['image']
  )
  stats = {'backbone': backbone_stats, 'heads': dict(stats['heads'])}
  total = 0.0
  for name in names:
    logits, stats['heads'][name] = run(
      p.model.heads[name], params['heads'][name], stats['heads'][name], features
    )
    value = p.tasks[name].loss(logits, data[name], jnp.ones(len(logits), bool))
    if 'log_vars' in params:
      s = params['log_vars'][name]
      value = jnp.exp(-s) * value + s
    total = total + value
  return total, stats


@pytest.mark.parametrize('names', [('regions', 'smiling'), ('regions',)])
def test_without_inner_steps_it_is_plain_training(names):
  p = problem(names, real=True)
  outer = adamw()
  step = p.step(outer, inner_steps=0)
  state = p.state(outer)
  params, stats, opt_state = p.params, p.stats, outer.init(p.params)

  @jit
  def plain(params, stats, opt_state, data):
    (loss, stats), grads = jax.value_and_grad(
      lambda q: total_loss(p, q, data, names, stats), has_aux=True
    )(params)
    updates, opt_state = outer.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state, stats

  for seed in range(2):
    data = batch(seed)
    loss, params, opt_state, stats = plain(params, stats, opt_state, data)
    state, metrics = step(state, {'query': data}, KEY)
    close(metrics['loss'], loss)
  assert int(state.step) == 2
  close(state.params, params)
  close(state.batch_stats, stats)
  close(state.opt_state, opt_state)


@pytest.mark.parametrize('metric', ['adam', 'euclidean'])
def test_without_a_coefficient_it_is_the_limit_of_a_small_one(metric):
  p = problem(('smiling',))
  data = {'query': batch(0)}
  outer = adamw()
  dense, _ = p.step(outer, inner_steps=0)(p.state(outer), data, KEY)
  outer = prox_adamw(p.groups, metric)
  step = p.step(outer, inner_steps=0)
  at = lambda value: step(
    p.state(outer, rho=jnp.log(value), lambda_max=jnp.ones(())), data, KEY
  )
  zero, _ = at(0.0)
  close(zero.params, dense.params, 1e-12)
  small, _ = at(1e-9)
  close(small.params, dense.params, 1e-6)
  # and a large one is something else
  _, metrics = at(1e3)
  assert metrics['group_sparsity'] > 0.5
  np.testing.assert_allclose(metrics['lambda'], 1e3)


def straight_code(p, data, lambda_max):
  """Loss of a part of the data, and the inner loop, as straight code."""
  inner = inner_optimizer(p.groups)
  loss = lambda params, part: total_loss(p, params, data[part], tuple(p.tasks))[0]

  def adapted(params, rho, steps):
    opt_state = inner.init(params)
    for _ in range(steps):
      grads = jax.grad(loss)(params, 'support')
      updates, opt_state = inner.update(
        grads, opt_state, params, sparsity=jnp.exp(rho) * lambda_max
      )
      params = optax.apply_updates(params, updates)
    return params

  return loss, adapted


def by_hand(p, data, rho, lambda_max, steps):
  """Both gradients of an episode of all tasks."""
  loss, adapted = straight_code(p, data, lambda_max)
  final, pull_back = jax.vjp(lambda p, r: adapted(p, r, steps), p.params, rho)
  gradient = pull_back(jax.grad(loss)(final, 'query'))[0]
  return gradient, pull_back(jax.grad(loss)(final, 'hold_out'))[1]


@pytest.fixture(scope='module')
def straight():
  """A meta-learning problem and both its gradients."""
  with jax.enable_x64(True):
    p = problem(('edges', 'smiling'), uncertainty=True)
    _, coefficient = learned()
    gradients = jit(lambda r, m: by_hand(p, batches(), r, m, 2))(
      coefficient['rho'], coefficient['lambda_max']
    )
    return p, gradients


@pytest.mark.parametrize('unroll', [True, False])
def test_meta_step_is_what_differentiating_straight_code_gives(straight, unroll):
  p, (gradients, hypergradient) = straight
  rho_optimizer, coefficient = learned()
  outer = prox_adamw(p.groups)
  state, metrics = p.step(
    outer,
    inner=inner_optimizer(p.groups),
    inner_steps=2,
    exact=True,
    rho_optimizer=rho_optimizer,
    unroll=unroll,
    combination=Combination('uncertainty'),
  )(p.state(outer, **coefficient), batches(), KEY)

  rho, lambda_max = coefficient['rho'], coefficient['lambda_max']
  updates, opt_state = outer.update(
    gradients, outer.init(p.params), p.params, sparsity=jnp.exp(rho) * lambda_max
  )
  close(metrics['hypergradient'], hypergradient, 1e-9)
  assert abs(hypergradient) > 1e-4
  close(state.rho, rho - RHO_RATE * hypergradient, 1e-9)
  close(state.params, optax.apply_updates(p.params, updates), 1e-9)
  close(state.opt_state, opt_state, 1e-9)
  assert moved(state.params['log_vars'], p.params['log_vars'])


def test_truncated_and_implicit_hypergradients_in_the_step():
  p = problem(('smiling',))
  rho_optimizer, coefficient = learned()
  lambda_max = coefficient['lambda_max']
  loss, adapted = straight_code(p, batches(), lambda_max)

  def truncated(rho):
    middle = adapted(p.params, rho, 1)
    final, pull_back = jax.vjp(lambda r: adapted(middle, r, 1), rho)
    return pull_back(jax.grad(loss)(final, 'hold_out'))[0]

  def implicit(rho):  # one term of the Neumann series
    final = adapted(p.params, rho, 2)
    _, pull_back = jax.vjp(lambda p, r: adapted(p, r, 1), final, rho)
    g = jax.grad(loss)(final, 'hold_out')
    return pull_back(jax.tree.map(jnp.add, g, pull_back(g)[0]))[1]

  outer = prox_adamw(p.groups)
  got = {}
  for mode, wanted in (('truncated', truncated), ('implicit', implicit)):
    step = p.step(
      outer,
      inner=inner_optimizer(p.groups),
      inner_steps=2,
      exact=False,
      rho_optimizer=rho_optimizer,
      hypergradient=mode,
      truncation=1 if mode == 'truncated' else None,
      solver=Solver('neumann', tolerance=1e-9, max_iterations=1),
    )
    _, metrics = step(p.state(outer, **coefficient), batches(), KEY)
    got[mode] = metrics['hypergradient']
    close(got[mode], jit(wanted)(coefficient['rho']), 1e-9)
  assert abs(got['truncated'] / got['implicit'] - 1) > 1e-3


def first_order(p, outer, **kwargs):
  """One inner step, no second derivatives: the cheapest meta-step."""
  rho_optimizer, coefficient = learned()
  kwargs = {
    'inner': inner_optimizer(p.groups),
    'inner_steps': 1,
    'exact': False,
    'rho_optimizer': rho_optimizer,
  } | kwargs
  return p.step(outer, **kwargs), p.state(outer, **coefficient)


def draw_only(monkeypatch, *rows):
  """Makes every draw these rows, traced as a real draw is."""

  def draw(key, num_tasks, how):
    assert how == '1'
    zero = jnp.minimum(jax.random.bits(key), 0).astype(jnp.int32)
    return (jnp.array(rows, jnp.int32) + zero).astype(bool)

  monkeypatch.setattr(episodes, 'draw', draw)


def test_an_episode_of_some_tasks_is_training_with_their_heads_only(monkeypatch):
  names, some = ('male', 'edges', 'smiling'), ('male', 'smiling')
  how = Combination('uncertainty')
  q = problem(some, uncertainty=True)
  outer = prox_adamw(q.groups)
  step, state = first_order(q, outer, combination=how)
  reference, expected = step(state, batches(), KEY)

  draw_only(monkeypatch, (1, 0, 1))
  p = problem(names, uncertainty=True)
  step, before = first_order(p, outer, combination=how, episode_draw='1')
  before = before._replace(  # a state in which no moment is zero
    opt_state=jax.tree.map(
      lambda x: x + 0.01 if x.dtype == jnp.float64 else x, before.opt_state
    )
  )
  after, metrics = step(before, batches(), KEY)

  absent = lambda tree: [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if 'edges' in gr.path_name(path)
  ]
  assert len(absent(after.opt_state)) == 2 * len(absent(after.params)) > 0
  same(absent(after), absent(before))

  fresh = p.state(outer, **learned()[1])
  after, metrics = step(fresh, batches(), KEY)
  same(absent(after), absent(fresh))
  drop = lambda tree: {
    key: {name: leaf for name, leaf in entry.items() if name != 'edges'}
    for key, entry in tree.items()
  }
  close(drop(after.params), reference.params)
  close(drop(after.batch_stats), reference.batch_stats)
  close(after.rho, reference.rho)
  for name in ('loss', 'hold_out_loss', 'hypergradient', 'loss/male'):
    close(metrics[name], expected[name])
  assert np.isnan(metrics['loss/edges'])  # absent: there is no such loss
  assert int(metrics['nonfinite']) == -1


def test_a_head_that_is_absent_is_not_executed(monkeypatch):
  calls = []

  class Counting(nn.Module):
    name_of_task: str

    @nn.compact
    def __call__(self, x, train):
      del train
      jax.debug.callback(lambda _, n=self.name_of_task: calls.append(n), x.sum())
      return nn.Dense(1, name='logits')(x.mean((1, 2)))

  draw_only(monkeypatch, (1, 0))
  labels = {name: LABELS['smiling'] for name in ('here', 'away')}
  p = problem(('smiling',))
  p = p._replace(
    model=p.model._replace(heads={name: Counting(name) for name in labels}),
    tasks=task_module.make(tuple(labels), labels),
  )
  params, stats = init(p.model)
  p = p._replace(params=params, stats=stats)
  data = {
    part: {**entry, 'here': entry['smiling'], 'away': entry['smiling']}
    for part, entry in batches().items()
  }
  outer = adamw()
  step = p.step(
    outer,
    inner=optax.sgd(INNER_RATE),
    inner_steps=1,
    exact=False,
    episode_draw='1',
  )
  state, _ = step(p.state(outer), data, KEY)
  jax.block_until_ready(state)
  jax.effects_barrier()
  assert set(calls) == {'here'}


def test_an_absent_heads_parameters_may_be_anything(monkeypatch):
  draw_only(monkeypatch, (0, 1))
  p = problem(('edges', 'smiling'))
  poisoned = jax.tree.map(lambda x: x * jnp.nan, p.params['heads']['edges'])
  p = p._replace(params={**p.params, 'heads': {**p.params['heads'], 'edges': poisoned}})
  outer = adamw()
  step, state = first_order(p, outer, episode_draw='1')
  state, metrics = step(state, batches(), KEY)
  same(state.params['heads'].pop('edges'), poisoned)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))
  assert int(metrics['nonfinite']) == -1
  assert np.isfinite(metrics['hypergradient'])


def test_episodes_of_a_step_are_averaged(monkeypatch):
  p = problem(('edges', 'smiling', 'male'))
  outer = optax.with_extra_args_support(optax.sgd(OUTER_RATE))

  def run(*rows, unroll=True):
    draw_only(monkeypatch, *rows)
    step, before = first_order(p, outer, episode_draw='1', unroll=unroll)
    return step(before, batches(), KEY)

  one, other = (1, 1, 0), (0, 1, 0)
  a, metrics_a = run(one)
  b, metrics_b = run(other)
  mean = lambda x, y: jax.tree.map(lambda u, v: (u + v) / 2, x, y)
  for unroll in (True, False):
    both, metrics = run(one, other, unroll=unroll)
    close(both.params, mean(a.params, b.params))
    close(both.rho, mean(a.rho, b.rho))
    for name in ('loss', 'loss/smiling', 'hypergradient'):
      close(metrics[name], mean(metrics_a[name], metrics_b[name]))
    # Of the step's only episode with this task:
    close(metrics['loss/edges'], metrics_a['loss/edges'])
    close(both.batch_stats['heads']['edges'], a.batch_stats['heads']['edges'])
    same(both.params['heads']['male'], p.params['heads']['male'])


def test_running_statistics_and_what_may_influence_what():
  p = problem(('edges', 'smiling'))
  outer = prox_adamw(p.groups)
  step, state = first_order(p, outer, inner_steps=2, episode_draw='full')
  data = batches()
  base, metrics = step(state, data, KEY)

  # Running statistics are those of θ⁰ on the support batch.
  _, stats = total_loss(p, p.params, data['support'], tuple(p.tasks))
  close(base.batch_stats, stats)
  assert moved(base.batch_stats, p.stats)

  other_hold_out, _ = step(state, {**data, 'hold_out': batch(4)}, KEY)
  same(other_hold_out.params, base.params)
  same(other_hold_out.opt_state, base.opt_state)
  same(other_hold_out.batch_stats, base.batch_stats)
  assert other_hold_out.rho != base.rho

  # ρ is learned on the query batch only where that is asked for.
  without = {k: data[k] for k in ('support', 'query')}
  same_data, _ = step(state, {**data, 'hold_out': data['query']}, KEY)
  on_query, _ = first_order(
    p, outer, inner_steps=2, episode_draw='full', learn_on='query'
  )
  same(on_query(state, without, KEY)[0].rho, same_data.rho)
  with pytest.raises(KeyError, match='hold_out'):
    step(state, without, KEY)

  other_query, other_metrics = step(state, {**data, 'query': batch(4)}, KEY)
  same(other_query.rho, base.rho)
  same(other_query.rho_opt_state, base.rho_opt_state)
  same(other_query.batch_stats, base.batch_stats)
  assert moved(other_query.params['heads'], base.params['heads'])
  same(other_metrics['hold_out_loss'], metrics['hold_out_loss'])


def test_eight_devices_do_what_one_does():
  p = problem(('edges', 'smiling'))
  outer = prox_adamw(p.groups)
  step, state = first_order(p, outer, episode_draw='full')
  data = batches(size=8)
  one, expected = step(state, data, KEY)

  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  spread = jax.device_put(data, NamedSharding(mesh, PartitionSpec('data')))
  copied = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  many, metrics = step(copied, spread, KEY)
  assert len(many.rho.sharding.device_set) == 8
  close(many.params, one.params)
  close(many.batch_stats, one.batch_stats)
  close(many.rho, one.rho)
  close(metrics['hypergradient'], expected['hypergradient'])


def test_uncertainties_are_trained():
  p = problem(('edges', 'smiling'), uncertainty=True)
  outer = optax.with_extra_args_support(optax.sgd(OUTER_RATE))
  step = p.step(outer, inner_steps=0, combination=Combination('uncertainty'))
  state, metrics = step(p.state(outer), {'query': batch(0)}, KEY)
  for name, s in p.params['log_vars'].items():
    slope = 1 - math.exp(-s) * metrics[f'loss/{name}']
    close(state.params['log_vars'][name], s - OUTER_RATE * slope)


def test_a_gradient_that_is_not_finite_is_located():
  p = problem(('edges', 'smiling'))
  outer = adamw()
  bad = p.state(outer)
  head = bad.params['heads']['smiling']['Dense_1']
  head['bias'] = head['bias'] * jnp.inf
  step = p.step(outer, inner_steps=0)
  _, metrics = step(bad, {'query': batch(0)}, KEY)
  leaves = jax.tree_util.tree_leaves_with_path(p.params)
  first = gr.path_name(leaves[int(metrics['nonfinite'])][0])
  assert first.startswith('backbone/')  # through which all gradients flow


@pytest.mark.parametrize(
  ('inner_steps', 'exact', 'granularity'),
  [
    (0, False, 'scalar'),
    (0, False, 'layer'),
    (1, False, 'scalar'),
    (1, True, 'scalar'),
  ],
)
def test_online_hypergradient_is_the_derivative_of_the_whole_run(
  inner_steps, exact, granularity
):
  p = problem(('edges', 'smiling'), uncertainty=True)
  groups = gr.find(p.params, r'backbone/layer.*kernel', 'in', granularity)
  p = p._replace(groups=groups)
  adam = functools.partial(optax.adamw, weight_decay=0.1, eps=1e-2, eps_root=1e-6)
  outer = msp.adaptive_proximal(adam, 'group_lasso', groups, OUTER_RATE)
  step = p.step(
    outer,
    inner=inner_optimizer(groups),
    inner_steps=inner_steps,
    exact=exact,
    rho_optimizer=optax.sgd(0.0),
    hypergradient='online',
    tangent_decay=1.0,
    tangent_max_norm=math.inf,
    combination=Combination('uncertainty'),
  )

  @functools.cache
  def run(offset, entry):
    rho = jnp.full((len(groups.names),), -1.6).at[entry].add(offset)
    rho = rho if granularity == 'layer' else rho[0]
    state = p.state(
      outer, rho=rho, lambda_max=jnp.full(rho.shape, 0.3), rho_opt_state=()
    )
    state = state._replace(
      rho_opt_state=optax.sgd(0.0).init(rho),
      tangent=zero_tangent((state.params, state.opt_state), rho),
    )
    for i in range(5):
      data = {
        part: batch(10 * i + j)
        for j, part in enumerate(('support', 'query', 'hold_out'))
      }
      state, metrics = step(state, data, jax.random.key(i))
    return metrics

  for entry in range(len(groups.names)):
    metrics = run(0.0, entry)
    assert 0.05 < metrics['group_sparsity'] < 0.95
    got = metrics['hypergradient'].reshape(-1)[entry]
    losses = [run(offset, entry)['hold_out_loss'] for offset in (1e-5, -1e-5)]
    wanted = (losses[0] - losses[1]) / 2e-5
    assert abs(wanted) > 1e-5
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_online_tangent_is_forgotten_and_bounded():
  weights = {'w': jnp.array([3.0, 4.0])}
  state = weights, {'count': jnp.zeros((), jnp.int32)}
  rho = jnp.zeros(())

  def step(state, rho):
    params, counter = state
    new = {'w': params['w'] + rho * jnp.array([30.0, 40.0])}
    return (new, {'count': counter['count'] + 1}), jnp.sum(params['w']), 'aux'

  tangent = zero_tangent(state, rho)
  assert tangent[1]['count'] is None
  for decay, max_norm, wanted in ((0.5, math.inf, 25.0), (0.5, 1.0, 2.5)):
    new, loss, aux, gradient, moved = online(
      step, state, rho, tangent, decay=decay, max_norm=max_norm
    )
    assert (loss, aux, gradient, new[1]['count']) == (7.0, 'aux', 0.0, 1)
    np.testing.assert_allclose(jnp.linalg.norm(moved[0]['w']), wanted)
  # and what entered decides the hypergradient
  gradient = online(step, state, rho, moved, decay=decay, max_norm=max_norm)[3]
  np.testing.assert_allclose(gradient, 1.5 + 2.0)


def test_a_dead_network_has_a_finite_tangent():
  def step(state, rho):
    params, count = state
    new = {'w': jnp.zeros(2) * rho}, count
    return new, jnp.sum(params['w']), None

  rho, state = jnp.array(0.5), ({'w': jnp.ones(2)}, jnp.zeros((), jnp.int32))
  tangent = zero_tangent(state, rho)
  *_, tangent = online(step, state, rho, tangent, decay=1.0, max_norm=math.inf)
  assert all(np.isfinite(z).all() for z in jax.tree.leaves(tangent))


def test_the_twin_is_a_dense_run_beside_the_sparse_one():
  p = problem(('edges', 'smiling'))
  outer = prox_adamw(p.groups)
  rho_optimizer, coefficient = learned(0.5)
  step = p.step(
    outer, rho_optimizer=rho_optimizer, objective=Objective('tolerance', tolerance=0.01)
  )
  state = p.state(outer, **coefficient)
  state = state._replace(
    twin=make_twin(state.params, state.opt_state, state.batch_stats, 2)
  )
  sparse_step = p.step(outer)
  dense_outer = adamw()
  dense_step = p.step(dense_outer)
  dense, rhos = p.state(dense_outer), []
  for seed in range(3):
    data = {'query': batch(2 * seed), 'hold_out': batch(2 * seed + 1)}
    at = state._replace(twin=None, rho_opt_state=None)
    sparse, _ = sparse_step(at, data, KEY)
    dense, _ = dense_step(dense, data, KEY)
    rhos.append(state.rho)
    state, metrics = step(state, data, KEY)
    close(state.params, sparse.params)
    close(state.twin.params, dense.params)
    close(state.twin.batch_stats, dense.batch_stats)
    # ρ rises while the worst task is within its bound, and falls otherwise.
    worst = max(
      metrics[f'gap/{name}'] - metrics[f'gap_allowed/{name}']
      for name in ('edges', 'smiling')
    )
    assert metrics['gap_allowed/edges'] >= math.log(1.01) * (1 - 1e-6)
    assert np.sign(metrics['violation']) == np.sign(worst)
    np.testing.assert_allclose(
      state.rho - rhos[-1], -RHO_RATE * metrics['violation'], rtol=1e-9
    )
  assert metrics['group_sparsity'] > 0.2
  assert 'hypergradient' not in metrics
  assert not metrics['restored']
  # λ far below its peak and still too large: from here on it is the dense twin.
  twin = state.twin._replace(peak=state.rho + 2, gap=jnp.ones_like(state.twin.gap))
  for searched, at in ((0, state._replace(twin=twin)), (4, state)):
    if searched:  # and so it is after the search, wherever λ is
      objective = Objective('tolerance', tolerance=9.0, search=searched)
      step = p.step(outer, rho_optimizer=rho_optimizer, objective=objective)
    new, metrics = step(at, data, KEY)
    assert metrics['restored']
    assert metrics['group_sparsity'] == 0
    own = new.params, new.opt_state, new.batch_stats
    same(own, (new.twin.params, new.twin.opt_state, new.twin.batch_stats))


def test_a_tolerance_compares_the_networks_before_their_inner_steps():
  """Every task, also if the step's episode holds one only."""
  names = ('edges', 'smiling')
  p = problem(names)
  outer, (rho_optimizer, coefficient) = prox_adamw(p.groups), learned()
  step = p.step(
    outer,
    inner=inner_optimizer(p.groups),
    inner_steps=1,
    exact=False,
    episode_draw='1',
    rho_optimizer=rho_optimizer,
    objective=Objective('tolerance'),
  )
  state, data = p.state(outer, **coefficient), batches()
  other = jax.tree.map(lambda x: 0.9 * x, p.params)
  twin = make_twin(other, state.opt_state, state.batch_stats, 2)
  _, metrics = step(state._replace(twin=twin), data, KEY)
  loss = lambda params, name: total_loss(p, params, data['hold_out'], (name,))[0]
  for name in names:
    gap = jnp.log(loss(p.params, name) / loss(other, name))
    np.testing.assert_allclose(metrics[f'gap/{name}'], gap, rtol=1e-9)
  total = sum(loss(p.params, name) for name in names)
  np.testing.assert_allclose(metrics['hold_out_loss'], total, rtol=1e-9)


def test_the_twin_has_no_tangent():
  """What the online hypergradient remembers is of the network that was given up."""
  p = problem(('smiling',))
  groups = gr.find(p.params, r'backbone/layer.*kernel', 'in', 'layer')
  p = p._replace(groups=groups)
  outer = msp.adaptive_proximal(
    functools.partial(optax.adam, eps=1e-2, eps_root=1e-8),
    'group_lasso',
    groups,
    OUTER_RATE,
  )
  rho_optimizer, rho = optax.sgd(RHO_RATE), jnp.full(2, -2.0)
  state = p.state(outer, rho=rho, lambda_max=jnp.full(2, 0.3))
  twin = make_twin(state.params, state.opt_state, state.batch_stats, 1)
  state = state._replace(
    rho_opt_state=rho_optimizer.init(rho),
    tangent=zero_tangent((state.params, state.opt_state), rho),
  )
  step = p.step(
    outer,
    rho_optimizer=rho_optimizer,
    hypergradient='online',
    objective=Objective('tolerance'),
  )
  data = {'query': batch(0), 'hold_out': batch(1)}
  for gap, peak, restored in ((9.0, -2.0, False), (9.0, 0.0, True)):
    at = twin._replace(gap=jnp.full(1, gap), count=jnp.full(1, 9), peak=jnp.array(peak))
    new, metrics = step(state._replace(twin=at), data, KEY)
    assert metrics['restored'] == restored
    assert any(z.any() for z in jax.tree.leaves(new.tangent)) != restored


def test_the_hold_out_loss_is_followed_as_long_as_few_enough_are_dead():
  p = problem(('smiling',))
  outer = prox_adamw(p.groups)
  rho_optimizer = optax.chain(optax.sgd(RHO_RATE), transforms.retreat(0.3))
  step = p.step(
    outer,
    inner=inner_optimizer(p.groups),
    inner_steps=1,
    exact=False,
    rho_optimizer=rho_optimizer,
    objective=Objective('holdout', rise=4),
  )
  rho = jnp.array(-2.0)
  state = p.state(
    outer,
    rho=rho,
    lambda_max=jnp.array(0.3),
    rho_opt_state=rho_optimizer.init(rho),
    removed_at_start=jnp.zeros(()),
  )
  alive = gr.alive(p.groups, p.params)
  keep = {layer: np.arange(mask.size) < 2 for layer, mask in alive.items()}
  sparse = state._replace(params=gr.remove(p.groups, p.params, keep))
  for at, count, retreats in ((state, 0, False), (sparse, 0, True), (sparse, 4, False)):
    new, metrics = step(at._replace(step=jnp.int32(count)), batches(), KEY)
    assert (metrics['violation'] > 0) == retreats
    update = -RHO_RATE * metrics['hypergradient']
    if retreats:
      update = min(update, 0) - 0.3 * min(metrics['violation'], 1)
    np.testing.assert_allclose(new.rho - rho, update, rtol=1e-9)


def test_a_budget_moves_a_vector_of_coefficients_by_the_hold_out_loss_too():
  p = problem(('smiling',))
  groups = gr.find(p.params, r'backbone/layer.*kernel', 'in', 'layer')
  p = p._replace(groups=groups)
  outer = prox_adamw(groups)
  rho_optimizer = optax.sgd(1.0)
  step = p.step(
    outer,
    inner=inner_optimizer(groups),
    inner_steps=1,
    exact=False,
    rho_optimizer=rho_optimizer,
    objective=Objective('budget', target=0.6),
  )
  rho = jnp.full(2, -2.0)
  state = p.state(outer, rho=rho, lambda_max=jnp.full(2, 0.3))
  state = state._replace(
    rho_opt_state=rho_optimizer.init(rho), removed_at_start=jnp.zeros(())
  )
  new, metrics = step(state, batches(), KEY)
  moved_by = new.rho - rho
  gone = gr.sparsity(groups, new.params).groups
  assert gone < 0.55  # all λ are too small
  np.testing.assert_allclose(jnp.mean(moved_by), (0.6 - gone) / 0.05, rtol=1e-6)
  h = metrics['hypergradient']
  assert (moved_by[0] - moved_by[1]) * (h[0] - h[1]) < 0


@pytest.mark.parametrize('inner_steps', [0, 1])
def test_a_settled_budget_trains_what_is_left_without_a_penalty(inner_steps):
  p = problem(('smiling',))
  alive = gr.alive(p.groups, p.params)
  keep = {k: jnp.arange(m.size) % 2 == 0 for k, m in alive.items()}
  p = p._replace(params=gr.remove(p.groups, p.params, keep))
  share = float(gr.sparsity(p.groups, p.params).groups)
  free = optax.chain(adamw(), transforms.freeze_dead(p.groups))
  free_inner = optax.chain(optax.sgd(INNER_RATE), transforms.freeze_dead(p.groups))
  prox = functools.partial(msp.proximal, 'group_lasso', p.groups)
  outer = optax.chain(free, prox(OUTER_RATE))
  common = {'inner_steps': inner_steps, 'exact': False}
  plain = p.step(free, inner=free_inner, **common)
  wanted, _ = plain(p.state(free), batches(), KEY)
  rho_optimizer, coefficient = learned()

  def step(target, settled=0):
    step = p.step(
      outer,
      inner=optax.chain(free_inner, prox(INNER_RATE)),
      rho_optimizer=rho_optimizer,
      objective=Objective('budget', target=target, rise=settled),
      settled=settled,
      **common,
    )
    state = p.state(outer, removed_at_start=jnp.zeros(()), **coefficient)
    new, _ = step(state, batches(), KEY)
    moved = float(new.rho - coefficient['rho'])
    return new.params, moved, gr.alive(p.groups, new.params)

  met, moved_by, left = step(share - 0.01)
  close(met, wanted.params)
  assert moved_by == 0
  same(left, keep)
  # Short of it λ goes on, and what is dead stays dead all the same.
  short, moved_by, left = step(share + 0.05)
  assert moved_by > 0
  assert optax.tree.norm(optax.tree.sub(short, met)) > 1e-6
  assert not any(jnp.any(left[k] & ~keep[k]) for k in keep)
  # In the first step before it settles the aim is 0, and all groups come back.
  assert step(share + 0.05, settled=4)[1] == 0
  # Beyond it, and before it settles, groups come back.
  _, coefficient = learned(-12.0)  # so small that the prox lets them
  for target, settled in ((share - 0.1, 0), (share - 0.01, 1)):
    thawed, _, left = step(target, settled)
    assert any(jnp.any(left[k] & ~keep[k]) for k in keep)
  # Then it is the step of optimisers that freeze nothing, in the inner loop too.
  never = p.step(
    optax.chain(adamw(), prox(OUTER_RATE)),
    inner=optax.chain(optax.sgd(INNER_RATE), prox(INNER_RATE)),
    **common,
  )
  at = p.state(optax.chain(adamw(), prox(OUTER_RATE)), **coefficient)
  close(thawed, never(at, batches(), KEY)[0].params)


def test_a_settled_step_leaves_the_coefficient_and_the_twin_alone():
  """λ stands still: the step of the last part of a run, without a rho_optimizer."""
  p = problem(('smiling',))
  outer = prox_adamw(p.groups)
  _, coefficient = learned()
  state = p.state(outer, **coefficient)
  twin = make_twin(state.params, state.opt_state, state.batch_stats, 1)
  state = state._replace(twin=twin)
  step = p.step(outer, objective=Objective('tolerance'), settled=0)
  new, metrics = step(state, batches(), KEY)
  for part in ('rho', 'rho_opt_state', 'twin'):
    same(getattr(new, part), getattr(state, part))
  assert moved(new.params, state.params)
  assert not {'violation', 'restored', 'hold_out_loss'} & metrics.keys()


def test_an_image_label_of_255_is_none():
  """Its image counts for the other tasks, and for this one it is not there."""
  names = ['smiling', 'regions']
  p = problem(names)
  whole = batch(3)
  image_labels = np.asarray(whole['smiling']).copy()
  image_labels[1] = 255
  lacking = dict(whole) | {'smiling': image_labels}
  total = lambda of: task_losses(
    p.model, p.tasks, Combination(), p.params, p.stats, of, KEY
  )[0]
  without = {name: np.asarray(x)[[0, 2, 3]] for name, x in whole.items()}
  logits, _ = multitask.apply(p.model, p.params, p.stats, whole['image'], train=True)
  smiling = p.tasks['smiling'].loss(
    logits['smiling'][np.array([0, 2, 3])], without['smiling'], without['valid']
  )
  regions = p.tasks['regions'].loss(logits['regions'], whole['regions'], whole['valid'])
  np.testing.assert_allclose(jit(total)(lacking), smiling + regions, rtol=1e-10)
