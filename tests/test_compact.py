"""Compacted networks give the outputs of the ones they came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msp import groups as gr
from msp.compact import Compact, compact, difference, fold, read, write
from msp.errors import UserError
from msp.models import multitask
from msp.models.normalization import MOMENTUM
from msp.models.resnet import Shape
from tests.networks import HEADS, small_network

SIZE = (24, 32)


def draw(model, seed):
  """Parameters of no particular network."""
  params, _ = jax.jit(lambda key: multitask.init(model, key, (*SIZE, 3)))(
    jax.random.key(seed)
  )
  rng = np.random.default_rng(seed)
  noise = lambda x: x + rng.uniform(-0.5, 0.5, x.shape).astype(np.float32)
  return gr.replace(
    jax.device_get(params),
    {
      path: noise(np.asarray(leaf))
      for path, leaf in gr.by_path(params).items()
      if path.endswith(('scale', 'bias'))
    },
  )


def statistics(model, params, seed):
  """Running statistics about those of a batch, or what images say would fade away."""
  key = jax.random.key(seed)
  images = jax.random.uniform(key, (4, *SIZE, 3))
  _, stats = jax.eval_shape(lambda: multitask.init(model, key, (*SIZE, 3)))
  none = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stats)
  run = lambda p: multitask.apply(model, p, none, images, train=True, key=key)[1]
  batch = {
    path: np.asarray(x) / (1 - MOMENTUM)
    for path, x in gr.by_path(jax.jit(run)(params)).items()
  }
  rng = np.random.default_rng(seed)
  drawn = {}
  for path in batch:
    if path.endswith('/var'):
      mean = path.removesuffix('var') + 'mean'
      size = np.where(batch[path] > 0, np.sqrt(batch[path]), 1)  # dead: 0
      drawn[mean] = batch[mean] + size * rng.uniform(-0.3, 0.3, size.shape)
      drawn[path] = np.square(size) * rng.uniform(0.7, 1.5, size.shape)
  return gr.replace(none, {path: x.astype(np.float32) for path, x in drawn.items()})


def forward(model):
  images = jax.random.uniform(jax.random.key(9), (2, *SIZE, 3))
  run = jax.jit(lambda p, s: multitask.apply(model, p, s, images, train=False)[0])
  return lambda *arrays: jax.device_get(run(*arrays))


def scale(x):
  return np.abs(x).max()


def agree(model, params, stats, result):
  run = forward(model)
  wanted, got = run(params, stats), forward(result.model)(*result[1:])
  first = 'backbone/stem_conv1/kernel'
  other = gr.replace(params, {first: gr.by_path(params)[first][:, ::-1]})
  changed = run(other, stats)
  for name, x in wanted.items():
    np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-5)
    # Or anything would agree.
    assert scale(changed[name] - x) > 1e-3 * scale(x), name
  return result


def size(params):
  return sum(x.size for x in jax.tree.leaves(params['backbone']))


def kill_inputs(params, share, seed, spare=()):
  """Zeroes a share of the input channels of every backbone kernel."""
  rng = np.random.default_rng(seed)
  dead = {}
  for path, kernel in gr.by_path(params).items():
    if path.startswith('backbone/') and path.endswith('kernel') and path not in spare:
      kernel = np.array(kernel)
      count = kernel.shape[-2]
      # At least one survives, as with the survival floor.
      chosen = rng.permutation(count)[: min(round(share * count), count - 1)]
      kernel[..., chosen, :] = 0
      dead[path] = kernel
  return gr.replace(params, dead)


@pytest.mark.parametrize(
  ('block', 'share'),
  [
    ('basic', 0.0),
    ('bottleneck', 0.5),
    ('basic', 1.0),
    pytest.param('bottleneck', 0.0, marks=pytest.mark.slow),
    pytest.param('basic', 0.5, marks=pytest.mark.slow),
    pytest.param('bottleneck', 1.0, marks=pytest.mark.slow),
  ],
)
def test_dead_input_channels(block, share):
  model = small_network(block, (1, 2, 1, 1))
  params = kill_inputs(draw(model, 0), share, 1)
  stats = statistics(model, params, 0)
  result = agree(model, params, stats, compact(model, params, stats))
  if share == 0:
    assert size(result.params) == size(params)
    assert not result.model.backbone.shape.gathers
    assert jax.tree.all(jax.tree.map(np.array_equal, (params, stats), result[1:]))
  else:
    assert size(result.params) < (1 - 0.6 * share) * size(params)
    # No kernel keeps an input channel of zeros, but for one where all are dead.
    for path, kernel in gr.by_path(result.params['backbone']).items():
      if path.endswith('kernel') and kernel.shape[-2] > 1 and 'stem_conv1' not in path:
        assert (kernel != 0).any((0, 1, 3)).all(), path


@pytest.mark.parametrize(
  'block', ['basic', pytest.param('bottleneck', marks=pytest.mark.slow)]
)
def test_dead_output_channels_and_coupled_groups(block):
  model = small_network(block, (2, 1, 1, 1))
  params = draw(model, 2)
  rng = np.random.default_rng(3)
  for with_norm in (False, True):
    leaves = {p: np.array(x) for p, x in gr.by_path(params).items()}
    for s in multitask.streams(model):
      count = leaves[s.writers[0]].shape[-1]
      dead = rng.permutation(count)[: count // 2]
      for writer, norm in zip(s.writers, s.norms, strict=True):
        leaves[writer][..., dead] = 0
        if with_norm:
          leaves[f'{norm}/scale'][dead] = 0
          leaves[f'{norm}/bias'][dead] = 0
    sparse = gr.replace(params, leaves)
    stats = statistics(model, sparse, 2)
    result = agree(model, sparse, stats, compact(model, sparse, stats))
    if with_norm:  # else what the norms add keeps most of them
      widths = dict(result.model.backbone.shape.widths)
      for s in multitask.streams(model):
        count = leaves[s.writers[0]].shape[-1]
        assert widths[s.name] == count - count // 2
      # The heads read less, too.
      assert sum(x.size for x in jax.tree.leaves(result.params['heads'])) < sum(
        x.size for x in jax.tree.leaves(params['heads'])
      )


def test_a_norm_that_lifts_a_zero_keeps_its_channel():
  model = small_network('basic', (1, 1, 1, 1))
  params = draw(model, 4)
  leaves = {p: np.array(x) for p, x in gr.by_path(params).items()}
  kernel = leaves['backbone/layer2_0/conv1/kernel']
  kernel[..., :3] = 0
  norm = 'backbone/layer2_0/norm1'
  leaves[f'{norm}/scale'][:3] = 0
  leaves[f'{norm}/bias'][:3] = [-0.5, 0.0, 0.5]
  params = gr.replace(params, leaves)
  stats = statistics(model, params, 4)
  result = agree(model, params, stats, compact(model, params, stats))
  widths = dict(result.model.backbone.shape.widths)
  assert widths['layer2_0/conv1'] == kernel.shape[-1] - 2


def test_a_chain_of_dead_layers_is_followed_to_its_end():
  """conv2 of a bottleneck writes only what nobody reads, so conv1 is unread, too."""
  model = small_network('bottleneck', (2, 1, 1, 1))
  params = draw(model, 5)
  leaves = {p: np.array(x) for p, x in gr.by_path(params).items()}
  leaves['backbone/layer1_1/conv3/kernel'][:] = 0
  params = gr.replace(params, leaves)
  stats = statistics(model, params, 5)
  result = agree(model, params, stats, compact(model, params, stats))
  widths = dict(result.model.backbone.shape.widths)
  assert widths['layer1_1/conv1'] == widths['layer1_1/conv2'] == 1
  assert result.params['backbone']['layer1_1']['conv1']['kernel'].shape[-2] == 1


def test_group_norm_keeps_its_channels_and_gathers():
  model = small_network('basic', (1, 1, 1, 1), 'group')
  params = kill_inputs(draw(model, 6), 0.5, 7)
  stats = statistics(model, params, 6)
  result = agree(model, params, stats, compact(model, params, stats))
  before = multitask.build(HEADS, blocks=(1, 1, 1, 1), block='basic', width=0.125)
  widths = dict(result.model.backbone.shape.widths)
  assert widths['layer4/sum'] == before.backbone.width * 512
  # Also inside blocks, where a gather has to read what the norm has mixed.
  assert size(result.params) < 0.6 * size(params)


@pytest.mark.parametrize('stream', ['stem_conv2', 'layer2/sum'])
def test_a_cut_network_is_refused(stream):
  model = small_network('basic', (1, 1, 1, 1))
  params = draw(model, 8)
  stats = statistics(model, params, 8)
  (s,) = (s for s in multitask.streams(model) if s.name == stream)
  dead = {r: np.zeros_like(gr.by_path(params)[r]) for r in s.readers}
  with pytest.raises(UserError, match=r'all channels of \S+ are dead: .*min_alive'):
    compact(model, gr.replace(params, dead), stats)


def test_a_model_of_another_kind_is_refused():
  with pytest.raises(UserError, match='MultiTask only, and this is a object'):
    compact(object(), {}, {})


def test_compacted_again_after_training_on():
  model = small_network('bottleneck', (2, 1, 1, 1))
  params = kill_inputs(draw(model, 10), 0.4, 11)
  stats = statistics(model, params, 10)
  once = agree(model, params, stats, compact(model, params, stats))
  again = compact(*once)
  assert size(again.params) == size(once.params)
  jax.tree.map(np.testing.assert_array_equal, once.params, again.params)
  # Zeros stay where they are in what is trained on; others join them.
  moved = jax.tree.map(lambda x: x * 1.1, once.params)
  moved = kill_inputs(moved, 0.3, 12)
  stats = statistics(once.model, moved, 12)
  twice = agree(once.model, moved, stats, compact(once.model, moved, stats))
  assert size(twice.params) < 0.9 * size(once.params)


def test_a_compact_network_is_a_network():
  """Its shape alone says what to initialise, and a training step's gradient exists."""
  model = small_network('basic', (1, 1, 1, 1))
  params = kill_inputs(draw(model, 13), 0.5, 14)
  result = compact(model, params, statistics(model, params, 13))
  rebuilt = small_network('basic', (1, 1, 1, 1))
  backbone = rebuilt.backbone.clone(shape=result.model.backbone.shape)
  rebuilt = rebuilt._replace(backbone=backbone)
  shapes = jax.eval_shape(
    lambda key: multitask.init(rebuilt, key, (*SIZE, 3)), jax.random.key(0)
  )
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(
    lambda x: x.shape, (result.params, result.batch_stats)
  )
  hash(result.model.backbone.shape)

  def loss(params):
    out, _ = multitask.apply(
      rebuilt,
      params,
      result.batch_stats,
      jax.random.uniform(jax.random.key(1), (2, *SIZE, 3)),
      train=True,
      key=jax.random.key(0),
    )
    return sum(jnp.sum(jnp.sin(x)) for x in out.values())

  grads = jax.jit(jax.grad(loss))(result.params)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
  positions = multitask.positions(rebuilt, (*SIZE, 3))
  assert positions == multitask.positions(model, (*SIZE, 3))
  assert isinstance(result.model.backbone.shape, Shape)


def test_in_half_precision_the_arrays_are_compared():
  """Sums of fewer channels round otherwise there, which is no mistake."""
  model = multitask.build(
    HEADS,
    blocks=(1, 1, 1, 1),
    block='basic',
    width=0.25,
    head_features=8,
    dtype='bfloat16',
    convolution_implementation='lax',
  )
  params = kill_inputs(draw(model, 17), 0.6, 18)
  dense = Compact(model, params, statistics(model, params, 17))
  result = compact(*dense)
  images = np.random.default_rng(19).random((2, 48, 64, 3), np.float32)
  assert difference(dense, result, images) < 1e-5
  path = 'backbone/layer1_0/conv1/kernel'
  wrong = gr.replace(result.params, {path: 1.01 * gr.by_path(result.params)[path]})
  assert difference(dense, result._replace(params=wrong), images) > 1e-4


def test_folding_and_files(tmp_path):
  model = small_network('basic', (1, 1, 1, 1))
  params = kill_inputs(draw(model, 15), 0.5, 16)
  result = compact(model, params, statistics(model, params, 15))
  folded = agree(*result, fold(result))
  assert not jax.tree.leaves(folded.batch_stats)
  assert not any(path.endswith('scale') for path in gr.by_path(folded.params))
  for name, network in (('plain', result), ('folded', folded)):
    write(tmp_path / name, network)
    again = read(tmp_path / name, model)
    assert again.model == network.model
    jax.tree.map(np.testing.assert_array_equal, again[1:], network[1:])
    assert difference(network, again, np.ones((1, *SIZE, 3), np.float32)) == 0
  other = small_network('bottleneck', (1, 1, 1, 1))
  with pytest.raises(UserError, match='is of another network'):
    read(tmp_path / 'plain', other)
  with pytest.raises(UserError, match='no compact network in'):
    read(tmp_path / 'nothing', model)
  lists = '{"widths": {}, "gathers": [], "folded": false}'
  words = '{"widths": {"stem": "wide"}, "gathers": {}, "folded": false}'
  for damage in ('', '{}', '[]', lists, words):
    np.savez(tmp_path / 'plain' / 'network.npz', shape=np.array(damage))
    with pytest.raises(UserError, match='no compact network in'):
      read(tmp_path / 'plain', model)
  arrays = dict(shape=np.array(''), weight=np.array(['one']))
  np.savez(tmp_path / 'folded' / 'network.npz', **arrays)
  with pytest.raises(UserError, match=r'no compact network in'):
    read(tmp_path / 'folded', model)
  (tmp_path / 'folded' / 'network.npz').write_bytes(b'')
  with pytest.raises(UserError, match='no compact network in'):
    read(tmp_path / 'folded', model)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write to'):
    write(tmp_path / 'file' / 'below', result)
  grouped = small_network('basic', (1, 1, 1, 1), 'group')
  with pytest.raises(UserError, match='group normalisation cannot be folded'):
    fold(Compact(grouped, draw(grouped, 17), {}))


# What is dead of the channels of one kernel or stream.
PATTERNS = ('none', 'some', 'all but one', 'all')


def draw_dead(pattern, count, rng):
  dead = rng.random(count) < 0.5
  if pattern != 'some':
    dead[:] = pattern != 'none'
  if pattern == 'all but one':
    dead[rng.integers(count)] = False
  return dead


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
  block=st.sampled_from(['basic', 'bottleneck']),
  blocks=st.sampled_from([(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 2)]),
  norm=st.sampled_from(['batch', 'batch', 'group']),
  patterns=st.data(),
  seed=st.integers(0, 2**20),
)
def test_any_pattern_in_any_network(block, blocks, norm, patterns, seed):
  """Inputs of readers, outputs of writers, norms: each dead in its own way."""
  model = small_network(block, blocks, norm)
  params = draw(model, seed)
  rng = np.random.default_rng(seed)
  leaves = {path: np.array(leaf) for path, leaf in gr.by_path(params).items()}
  for s in multitask.streams(model):
    # Between blocks at most all but one, or nothing would reach the outputs.
    allowed = st.sampled_from(PATTERNS if '/conv' in s.name else PATTERNS[:3])
    for reader in s.readers:
      if reader.startswith('backbone/'):
        kernel = leaves[reader]
        pattern = patterns.draw(allowed, label=reader)
        kernel[..., draw_dead(pattern, kernel.shape[-2], rng), :] = 0
    for writer, norm_path in zip(s.writers, s.norms, strict=True):
      pattern = patterns.draw(st.sampled_from(PATTERNS), label=writer)
      dead = draw_dead(pattern, leaves[writer].shape[-1], rng)
      leaves[writer][..., dead] = 0
      silenced = draw_dead('some', dead.size, rng) & dead
      leaves[f'{norm_path}/scale'][silenced] = 0
      leaves[f'{norm_path}/bias'][silenced] = 0
  sparse = gr.replace(params, leaves)
  stats = statistics(model, sparse, seed)
  try:
    result = compact(model, sparse, stats)
  except UserError as e:
    # Truly cut: the outputs do not depend on the image.
    images = jax.random.uniform(jax.random.key(1), (2, *SIZE, 3))
    one, other = multitask.apply(model, sparse, stats, images, train=False)[0][
      'smiling'
    ]
    np.testing.assert_allclose(one, other, atol=1e-6, err_msg=str(e))
    return
  wanted, got = forward(model)(sparse, stats), forward(result.model)(*result[1:])
  for name, x in wanted.items():
    np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-5 * scale(x))
  assert size(result.params) <= size(params)
