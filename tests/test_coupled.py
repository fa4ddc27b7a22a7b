"""Coupled groups: which parameters a channel touches, and their prox."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msp.transforms
from msp import groups as gr
from msp import objectives
from msp.errors import UserError
from msp.models import multitask
from msp.models.resnet import Stream
from tests.networks import HEADS, small_network


def network(block, blocks=(2, 1, 1, 1)):
  model = small_network(block, blocks, width=0.0625)
  return model, lambda key: multitask.init(model, key, (16, 16, 3))


@pytest.mark.parametrize('depth', [18, 50, 101])
def test_every_kernel_is_written_once_and_read_once(depth):
  model = multitask.build(HEADS, depth=depth)
  shapes, _ = jax.eval_shape(
    lambda key: multitask.init(model, key, (64, 64, 3)), jax.random.key(0)
  )
  leaves = gr.by_path(shapes)
  backbone = {p for p in leaves if p.startswith('backbone/') and p.endswith('kernel')}
  norms = {p.removesuffix('/scale') for p in leaves if p.endswith('scale')}
  streams = multitask.streams(model)
  writers = [w for s in streams for w in s.writers]
  readers = [r for s in streams for r in s.readers]
  assert len(writers) == len(set(writers))
  assert set(writers) == backbone
  assert len(readers) == len(set(readers))
  assert backbone - set(readers) == {'backbone/stem_conv1/kernel'}
  assert sum(r.startswith('heads/') for r in readers) == 5 + 1
  assert {n for s in streams for n in s.norms} == {
    n for n in norms if n.startswith('backbone/')
  }
  for s in streams:
    sizes = {leaves[w].shape[-1] for w in s.writers}
    sizes |= {leaves[r].shape[-2] for r in s.readers}
    sizes |= {leaves[f'{n}/scale'].shape[0] for n in s.norms}
    assert len(sizes) == 1, s.name


@pytest.mark.parametrize(
  'block', ['basic', pytest.param('bottleneck', marks=pytest.mark.slow)]
)
def test_a_dead_channel_is_invisible_to_its_readers(block):
  """What its groups' zeros promise: no reader can tell what it would multiply."""
  model, init = network(block)
  params, stats = jax.jit(init)(jax.random.key(0))
  noise = iter(jax.random.split(jax.random.key(1), 1000))
  params = jax.tree.map(
    lambda p: np.array(p + 0.3 * jax.random.normal(next(noise), p.shape)), params
  )
  streams = multitask.streams(model)
  images = jax.random.uniform(next(noise), (2, 16, 16, 3))
  run = jax.jit(lambda p: multitask.apply(model, p, stats, images, train=False)[0])
  for stream in streams:
    leaves = gr.by_path(params)
    dead = {w: changed(leaves[w], (..., 1), 0.0) for w in stream.writers}
    for n in stream.norms:
      for leaf in (f'{n}/scale', f'{n}/bias'):
        dead[leaf] = changed(leaves[leaf], 1, 0.0)
    one = gr.replace(params, dead)
    read = {r: changed(leaves[r], (..., 1, slice(None)), 5.0) for r in stream.readers}
    assert read
    other = gr.replace(one, read)
    jax.tree.map(np.testing.assert_array_equal, run(one), run(other))
    # While it is alive (behind its ReLU, too) they can.
    up = {f'{n}/bias': np.full_like(leaves[f'{n}/bias'], 3.0) for n in stream.norms}
    params_up = gr.replace(params, up)
    alive = run(gr.replace(params_up, read))
    assert any(
      bool(jnp.any(a != b))
      for a, b in zip(
        jax.tree.leaves(alive), jax.tree.leaves(run(params_up)), strict=True
      )
    )


def changed(array, index, value):
  array = array.copy()
  array[index] = value
  return array


def coupled(block='basic', granularity='scalar'):
  model, init = network(block, (1, 1, 1, 1))
  params, _ = jax.jit(init)(jax.random.key(0))
  found = gr.find(
    params,
    axis='coupled',
    granularity=granularity,
    streams=multitask.streams(model),
  )
  return params, found


def test_groups_of_a_network():
  params, found = coupled(granularity='stage')
  assert found.layers[:4] == (
    'backbone/stem_conv1',
    'backbone/stem_conv2',
    'backbone/stem_conv3',
    'backbone/layer1_0/conv1',
  )
  assert found.layers[4] == 'backbone/layer1/sum'
  assert found.names == ('stem', 'layer1', 'layer2', 'layer3', 'layer4')
  hash(found)
  matrices = gr.select(found, params)
  inside = matrices['backbone/layer1_0/conv1']
  assert inside.shape == (4, 9 * 8 + 2 + 9 * 4)
  # Two writers with their norms; read by two kernels of the next stage, no head.
  assert matrices['backbone/layer1/sum'].shape == (4, 8 + 36 + 4 + 9 * 8 + 8)
  leaves = gr.by_path(params)
  for layer, members in zip(found.layers, found.members, strict=True):
    again = gr.scatter(members, matrices[layer], jax.tree.map(jnp.zeros_like, leaves))
    for path, _ in members:
      np.testing.assert_array_equal(again[path], leaves[path])
  with pytest.raises(UserError, match='coupled groups need the streams'):
    gr.find(params, axis='coupled')


@pytest.mark.parametrize('adaptive', [False, True])
def test_dead_channels_are_exactly_zero_everywhere(adaptive):
  params, found = coupled()
  grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
  if adaptive:
    tx = msp.adaptive_proximal(optax.adam, 'group_lasso', found, 0.05, min_alive=1)
  else:
    tx = optax.chain(
      optax.sgd(0.1), msp.proximal('group_lasso', found, 0.1, min_alive=1)
    )

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grads, state, params, sparsity=0.3 if adaptive else 0.2)
    return optax.apply_updates(params, updates), state

  state, new = tx.init(params), params
  for _ in range(5):
    new, state = step(new, state)
  counted = gr.sparsity(found, new)
  assert 0.1 < counted.groups < 0.9
  assert counted.alive.min() >= 1
  leaves = gr.by_path(new)
  for (layer, alive), members in zip(
    gr.alive(found, new).items(), found.members, strict=True
  ):
    for path, axis in members:
      dead = jnp.moveaxis(leaves[path], axis, 0)[~alive]
      np.testing.assert_array_equal(dead, 0, err_msg=f'{layer} {path}')
  # Heads are in no group: what is not penalised moves as without the prox.
  plain = params
  for _ in range(5):
    plain = jax.tree.map(lambda p, g: p - 0.1 * g, plain, grads)
  if not adaptive:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      new['heads'],
      plain['heads'],
    )
  kernels = {p for m in found.members for p, _ in m}
  zeros = sum(int((leaves[p] == 0).sum()) for p in kernels)
  np.testing.assert_allclose(
    counted.weights, zeros / sum(leaves[p].size for p in kernels), rtol=1e-6
  )


def overlapping():
  rng = np.random.default_rng(0)
  kernel = lambda *shape: {'kernel': jnp.asarray(rng.normal(size=shape))}
  params = {'backbone': {'a': kernel(2, 3), 'b': kernel(3, 4), 'c': kernel(4, 2)}}
  path = lambda name: (f'backbone/{name}/kernel',)
  # A stream that one kernel writes and another reads, which writes a second one.
  streams = [
    Stream('s', path('a'), ('n',), path('b')),
    Stream('t', path('b'), ('m',), path('c')),
  ]
  return params, gr.find(params, axis='coupled', streams=streams)


def test_streams_that_do_not_fit_are_refused():
  params, _ = overlapping()
  path = lambda name: (f'backbone/{name}/kernel',)
  find = lambda *s: gr.find(params, axis='coupled', streams=[Stream('s', *s)])
  with pytest.raises(UserError, match='stream s: the tree has no backbone/x/kernel'):
    find(path('a'), ('n',), path('x'))
  with pytest.raises(UserError, match=r'a/kernel 3, backbone/c/kernel 4\), as where'):
    find(path('a'), ('n',), path('c'))


@pytest.mark.parametrize(
  'make',
  [
    msp.freeze_dead,
    lambda found: msp.proximal('group_lasso', found, 0.1),
    lambda found: msp.adaptive_proximal(optax.adam, 'group_lasso', found, 0.1),
  ],
)
def test_a_part_of_a_stream_is_refused(make):
  params, found = overlapping()
  is_late = jax.tree_util.tree_map_with_path(
    lambda path, _: 'a' not in gr.path_name(path).split('/'), params
  )
  labels = jax.tree.map(lambda late: 'late' if late else 'early', is_late)
  for tx in (
    optax.masked(make(found), is_late),
    optax.partition({'late': make(found), 'early': optax.sgd(0.1)}, labels),
  ):
    with pytest.raises(UserError, match=r'coupled groups of \S+ these param'):
      tx.init(params)
  del params['backbone']['a']
  with pytest.raises(UserError, match='lack backbone/a/kernel; a mask or a partition'):
    gr.sparsity(found, params)


def prox_of_the_sum(params, found, threshold, sweeps=300):
  """Dykstra's algorithm in NumPy: the prox of both streams' penalties together."""
  x = {path: np.array(v) for path, v in gr.by_path(params).items()}
  kept = [0.0, 0.0]
  for _ in range(sweeps):
    for i, members in enumerate(found.members):
      y = np.array(gr.gather(members, x)) + kept[i]
      norm = np.linalg.norm(y, axis=1, keepdims=True)
      z = y * np.maximum(0, 1 - threshold * np.sqrt(y.shape[1]) / norm)
      kept[i] = y - z
      x = {k: np.array(v) for k, v in gr.scatter(members, jnp.asarray(z), x).items()}
  return x


def test_overlapping_groups_are_the_prox_of_the_sum_to_second_order():
  with jax.enable_x64(True):
    params, found = overlapping()
    errors = []
    for step in (0.04, 0.02, 0.01):
      tx = msp.proximal('group_lasso', found, step)
      zero = jax.tree.map(jnp.zeros_like, params)
      updates, _ = tx.update(zero, tx.init(params), params, sparsity=1.0)
      got = gr.by_path(optax.apply_updates(params, updates))
      want = prox_of_the_sum(params, found, step)
      moved = max(np.abs(want[p] - gr.by_path(params)[p]).max() for p in want)
      errors.append(max(np.abs(got[p] - want[p]).max() for p in want))
      assert errors[-1] < 0.2 * moved
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert 3.5 < errors[1] / errors[2] < 4.5


def test_derivative_in_the_coefficient():
  with jax.enable_x64(True):
    params, found = overlapping()
    tx = msp.proximal('group_lasso', found, 0.1)
    zero = jax.tree.map(jnp.zeros_like, params)

    def value(lam):
      updates, _ = tx.update(zero, tx.init(params), params, sparsity=lam)
      new = optax.apply_updates(params, updates)
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(new)), new

    assert 0 < gr.sparsity(found, value(6.0)[1]).groups < 1
    wanted = (value(6.0 + 1e-6)[0] - value(6.0 - 1e-6)[0]) / 2e-6
    for derive in (jax.grad, jax.jacfwd):
      got = derive(lambda lam: value(lam)[0])(6.0)
      np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_flops_between_channels_that_are_alive():
  params, found = overlapping()
  leaves = gr.by_path(params)
  for members, dead in zip(found.members, (1, 2), strict=True):
    matrix = gr.gather(members, leaves).at[:dead].set(0.0)
    leaves = gr.scatter(members, matrix, leaves)
  params = gr.replace(params, leaves)
  positions = {
    'backbone/a/kernel': 100,
    'backbone/b/kernel': 25,
    'backbone/c/kernel': 9,
  }
  o = objectives.Objective(measure='flops', positions=positions)
  # c writes no stream of the toy, so only a and b count.
  left = 100 * (2 * 2) + 25 * (2 * 2)
  total = 100 * (2 * 3) + 25 * (3 * 4)
  np.testing.assert_allclose(
    objectives.removed(o, found, params), 1 - left / total, rtol=1e-6
  )


def test_removing_keeps_the_types_of_kernels_and_norms():
  model, init = network('basic', (1, 1, 1, 1))
  params, _ = jax.eval_shape(init, jax.random.key(0))
  params = jax.tree.map(
    lambda x: jnp.ones(x.shape, jnp.bfloat16 if x.ndim > 1 else jnp.float32), params
  )
  found = gr.find(params, axis='coupled', streams=multitask.streams(model))
  keep = {layer: jnp.arange(m.size) > 0 for layer, m in gr.alive(found, params).items()}
  removed = gr.remove(found, params, keep)
  types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert types(removed) == types(params)
  assert not gr.alive(found, removed)[found.layers[0]][0]
