import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msp import groups as gr
from msp.errors import UserError
from msp.models import convolution, heads, multitask, normalization, resnet

FORMS = (
  convolution.lax_conv,
  convolution.fold_conv,
  convolution.patch_conv,
  convolution.shift_conv,
  convolution.tap_conv,
)
# kernel side, stride, dilation, (height, width)
GEOMETRIES = (
  (3, 1, 1, (6, 5)),
  (3, 2, 1, (7, 6)),
  (3, 1, 2, (5, 8)),
  (3, 2, 2, (5, 8)),
  (3, 1, 4, (4, 9)),
  (3, 3, 4, (7, 11)),
  (3, 1, 12, (6, 7)),
  (3, 2, 3, (1, 2)),
  (1, 2, 1, (5, 6)),
)
TINY = {'blocks': (1, 1, 1, 1), 'width': 1 / 16, 'head_features': 32}
TASKS = {'parts': ('dense', 3), 'smiling': ('classification', 1)}


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def randomised(tree, seed=0):
  """The same tree with moderate random values, positive under 'var'."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key in ('var', 'scale'):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    fan_in = max(1, math.prod(leaf.shape[:-1]))
    return jnp.asarray(rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5, leaf.dtype)

  return jax.tree.map_with_path(draw, tree)


def reference_conv(x, kernel, stride, dilation):
  """Direct sum over pixels and taps."""
  batch, height, width, _ = x.shape
  kh, kw, _, features = kernel.shape
  size = math.ceil(height / stride), math.ceil(width / stride)
  y = np.zeros((batch, *size, features))
  for i, j, u, v in itertools.product(*map(range, (*size, kh, kw))):
    row = i * stride + dilation * (u - kh // 2)
    column = j * stride + dilation * (v - kw // 2)
    if 0 <= row < height and 0 <= column < width:
      y[:, i, j] += x[:, row, column] @ kernel[u, v]
  return y


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('form', FORMS)
def test_conv_form_is_the_direct_sum(x64, form, geometry):
  side, stride, dilation, picture = geometry
  x, kernel = normal(0, 2, *picture, 3), normal(1, side, side, 3, 4)
  y = form(jnp.asarray(x), jnp.asarray(kernel), stride, dilation)
  np.testing.assert_allclose(
    y, reference_conv(x, kernel, stride, dilation), rtol=1e-12, atol=1e-12
  )


@pytest.mark.parametrize('geometry', [GEOMETRIES[i] for i in (1, 4, 7)])
@pytest.mark.parametrize('form', FORMS[1:])
def test_conv_form_has_the_derivatives_of_lax(x64, form, geometry):
  side, stride, dilation, picture = geometry
  point = normal(0, 2, *picture, 3), normal(1, side, side, 3, 4)
  tangent = normal(2, 2, *picture, 3), normal(3, side, side, 3, 4)

  def derivatives(form):
    def loss(x, kernel):
      return jnp.sum(jnp.tanh(form(x, kernel, stride, dilation)))

    return jax.jvp(jax.grad(loss, (0, 1)), point, tangent)

  def plain(x, kernel, stride, dilation):
    return lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(dilation, dilation)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11),
    jax.jit(derivatives, static_argnums=0)(form),
    jax.jit(derivatives, static_argnums=0)(plain),
  )


def multiplications(function, *arguments):
  """Multiply-adds of all dots and convolutions (at full windows)."""
  total = 0
  for equation in jax.make_jaxpr(function)(*arguments).jaxpr.eqns:
    operands = [v.aval for v in equation.invars]
    outputs = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      total += outputs * math.prod(operands[0].shape[d] for d in contracted)
    elif equation.primitive.name == 'conv_general_dilated':
      total += outputs * math.prod(operands[1].shape[:3])
  return total


@pytest.mark.parametrize('implementation', ['lax', 'folded', 'mixed', 'matmul'])
@pytest.mark.parametrize(
  ('dilation', 'share'), [(12, (32 + 40) ** 2), (24, 48**2), (36, 32**2)]
)
def test_atrous_conv_multiplies_no_padding(implementation, dilation, share):
  x = jax.ShapeDtypeStruct((1, 32, 32, 128), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 128, 256), jnp.float32)
  done = multiplications(
    lambda x, k: convolution.conv(
      x, k, dilation=dilation, implementation=implementation
    ),
    x,
    kernel,
  )
  assert done == share * 128 * 256


@pytest.mark.parametrize(
  ('implementation', 'channels', 'geometries'),
  [
    ('lax', (8, 8), ((1, 1, 1), (3, 2, 1), (3, 1, 4))),
    ('folded', (8, 8), ((1, 1, 1), (1, 2, 1), (3, 2, 1), (3, 1, 1), (3, 1, 2))),
    ('matmul', (8, 8), ((1, 2, 1), (3, 2, 1), (3, 1, 4))),
    ('mixed', (8, 8), ((1, 2, 1), (3, 2, 1))),
    ('mixed', (96, 96), ((3, 2, 2),)),
    ('matmul', (96, 8), ((3, 1, 1), (3, 2, 1))),
    ('matmul', (96, 96), ((3, 1, 1),)),
  ],
)
def test_conv_agrees_whatever_form_it_chooses(
  x64, implementation, channels, geometries
):
  for side, stride, dilation in geometries:
    x, kernel = normal(0, 1, 4, 5, channels[0]), normal(1, side, side, *channels)
    y = convolution.conv(
      jnp.asarray(x),
      jnp.asarray(kernel),
      stride=stride,
      dilation=dilation,
      implementation=implementation,
    )
    expected = reference_conv(x, kernel, stride, dilation)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-11)


def test_on_a_gpu_no_convolution_is_dilated(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  chosen = convolution.resolve('auto')

  def run(x, kernel):
    return convolution.conv(x, kernel, dilation=2, implementation=chosen)

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 7, 4), (3, 3, 4, 4))]
  program = str(jax.make_jaxpr(run)(*shapes))
  assert 'rhs_dilation=(1, 1)' in program
  assert 'rhs_dilation=(2, 2)' not in program


@pytest.mark.parametrize(('window', 'picture'), [(2, (5, 6)), (3, (4, 7)), (3, (1, 1))])
def test_max_pool(window, picture):
  padding = window - 2
  x = normal(0, 2, *picture, 3).astype(np.float32)
  padded = np.pad(
    x,
    ((0, 0), (padding, padding), (padding, padding), (0, 0)),
    constant_values=-np.inf,
  )
  size = [(n + 2 * padding - window) // 2 + 1 for n in picture]
  expected = np.empty((2, *size, 3), np.float32)
  for i, j in np.ndindex(*size):
    block = padded[:, 2 * i : 2 * i + window, 2 * j : 2 * j + window]
    expected[:, i, j] = block.max(axis=(1, 2))
  pool = lambda x: convolution.max_pool(x, window=window, padding=padding)
  np.testing.assert_array_equal(pool(x), expected)
  # Without ties each output passes its cotangent to the one largest pixel.
  gradient = jax.grad(lambda x: jnp.sum(pool(x) ** 2))(x)
  assert np.count_nonzero(gradient) == np.unique(expected).size
  for value in np.unique(expected):
    total = 2 * value * np.count_nonzero(expected == value)
    np.testing.assert_allclose(gradient[x == value], total, rtol=1e-6)


def test_max_pool_of_a_picture_smaller_than_the_window():
  x = jnp.asarray(normal(0, 1, 1, 3, 2))
  y = convolution.max_pool(x, window=2, padding=0)
  np.testing.assert_array_equal(y, x[:, :, :2].max(2, keepdims=True))


@pytest.mark.parametrize('layer', ['conv', 'dense'])
def test_initial_values_are_those_of_pytorch(layer):
  if layer == 'conv':
    module, shape, fan_in = convolution.Conv(64, bias=True), (1, 4, 4, 32), 288
  else:
    module, shape, fan_in = heads._dense(256, 128, None), (1, 128), 128
  params = module.init(jax.random.key(0), jnp.zeros(shape))['params']
  bound = fan_in**-0.5
  for leaf in (params['kernel'], params['bias']):
    assert 0.9 * bound < np.abs(leaf).max() <= bound
    assert np.abs(leaf.mean()) < 0.2 * bound
    np.testing.assert_allclose(leaf.std(), bound / 3**0.5, rtol=0.15)


# ------------------------------------------------------------------- counts


@pytest.mark.parametrize(
  ('depth', 'total'), [(18, 11_324_992), (50, 23_631_808), (101, 42_623_936)]
)
def test_backbone_has_the_published_parameters(depth, total):
  model = multitask.build({}, depth=depth)
  params, _ = shapes(model)
  assert count(params['backbone']) == total


def test_resnet50_has_the_published_groups():
  params, stats = shapes(multitask.build({}))
  kernels = [
    leaf for leaf in jax.tree.leaves(params['backbone']) if len(leaf.shape) == 4
  ]
  assert len(kernels) == 55
  assert sum(k.shape[2] for k in kernels) == 22_787
  assert sum(k.shape[3] for k in kernels) == 26_752
  assert count(kernels) == 23_578_304
  assert count(stats['backbone']) == 53_504
  names = params['backbone']
  assert names['stem_conv3']['kernel'].shape == (3, 3, 64, 128)
  assert names['layer1_0']['conv1']['kernel'].shape == (1, 1, 128, 64)
  assert names['layer4_2']['conv2']['kernel'].shape == (3, 3, 512, 512)
  assert names['layer4_0']['shortcut_conv']['kernel'].shape == (1, 1, 1024, 2048)
  assert set(names['layer3_5']) == {
    f'{w}{i}' for w in ('conv', 'norm') for i in (1, 2, 3)
  }


@pytest.mark.parametrize(
  ('head', 'total'),
  [
    (('dense', 41), 16_135_977),
    (('dense', 38), 16_135_206),
    (('dense', 3), 16_126_211),
    (('dense', 1), 16_125_697),
    (('classification', 1), 1_181_825),
  ],
)
def test_head_has_the_published_parameters(head, total):
  params, _ = shapes(multitask.build({'task': head}))
  assert count(params['heads']['task']) == total


def shapes(model, image_shape=(64, 64, 3)):
  return jax.eval_shape(
    lambda key: multitask.init(model, key, image_shape), jax.random.key(0)
  )


def test_width_rounds_to_multiples_of_four():
  assert [resnet.scaled(64, w) for w in (1, 0.5, 0.3, 0.01)] == [64, 32, 20, 4]
  params, _ = shapes(multitask.build(TASKS, **TINY))
  for leaf in jax.tree.leaves(params['backbone']):
    assert leaf.shape[-1] % 4 == 0


# ------------------------------------------------- the network, against NumPy


def reference_norm(kind, x, params, stats):
  if kind == 'batch':
    mean, var = stats['mean'], stats['var']
  else:
    groups = math.gcd(32, x.shape[-1] // 4)
    grouped = np.split(x, groups, axis=-1)
    side = x.shape[-1] // groups
    mean, var = (
      np.concatenate(
        [
          np.broadcast_to(f(g, (1, 2, 3), keepdims=True), (len(x), 1, 1, side))
          for g in grouped
        ],
        axis=-1,
      )
      for f in (np.mean, np.var)
    )
  return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']


def reference_backbone(x, params, stats, block, norm):
  """A ResNet-D of one block per stage in evaluation, by direct sums."""

  def layer(x, tree, stat, name, stride=1, dilation=1):
    prefix, _, index = name.rpartition('conv')
    y = reference_conv(x, tree[name]['kernel'], stride, dilation)
    label = f'{prefix}norm{index}'
    return reference_norm(norm, y, tree[label], stat.get(label))

  relu = lambda x: np.maximum(x, 0)
  for i, stride in ((1, 2), (2, 1), (3, 1)):
    x = relu(layer(x, params, stats, f'stem_conv{i}', stride))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # x ≥ 0 after the ReLU
  size = [math.ceil(n / 2) for n in x.shape[1:3]]
  x = np.stack(
    [
      [
        padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
        for j in range(size[1])
      ]
      for i in range(size[0])
    ]
  ).transpose(2, 0, 1, 3)
  for stage, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
    name = f'layer{stage + 1}_0'
    tree, stat = params[name], stats.get(name, {})
    if block == 'basic':
      y = relu(layer(x, tree, stat, 'conv1', stride, dilation))
      y = layer(y, tree, stat, 'conv2', 1, dilation)
    else:
      y = relu(layer(x, tree, stat, 'conv1'))
      y = relu(layer(y, tree, stat, 'conv2', stride, dilation))
      y = layer(y, tree, stat, 'conv3')
    x = relu(y + layer(x, tree, stat, 'shortcut_conv', stride))
  return x


def reference_dense_head(x, params, stats, norm):
  def layer(x, name, dilation=1):
    y = reference_conv(x, params[f'{name}_conv']['kernel'], 1, dilation)
    label = f'{name}_norm'
    y = reference_norm(norm, y, params[label], stats.get(label))
    return np.maximum(y, 0)

  pooled = layer(x.mean((1, 2), keepdims=True), 'pool')
  branches = [layer(x, 'point')]
  branches += [layer(x, f'atrous{rate}', rate) for rate in (12, 24, 36)]
  branches += [np.broadcast_to(pooled, (*x.shape[:3], pooled.shape[-1]))]
  y = layer(layer(np.concatenate(branches, -1), 'project'), 'filter')
  return y @ params['logits']['kernel'][0, 0] + params['logits']['bias']


def reference_classification_head(x, params):
  y = reference_conv(x, params['conv']['kernel'], 1, 1) + params['conv']['bias']
  y = np.maximum(y, 0)
  h, w = y.shape[1] // 2 * 2, y.shape[2] // 2 * 2
  y = y[:, :h, :w].reshape(len(y), h // 2, 2, w // 2, 2, -1).max((2, 4))
  y = y.mean((1, 2))
  y = np.maximum(y @ params['hidden']['kernel'] + params['hidden']['bias'], 0)
  return y @ params['logits']['kernel'] + params['logits']['bias']


@pytest.mark.parametrize(
  ('block', 'norm', 'image_shape', 'implementation'),
  [
    ('bottleneck', 'batch', (40, 104, 3), 'matmul'),
    ('basic', 'group', (36, 60, 3), 'matmul'),
    ('bottleneck', 'group', (36, 60, 3), 'lax'),
    ('bottleneck', 'batch', (40, 60, 3), 'folded'),
  ],
)
def test_network_against_numpy(x64, block, norm, image_shape, implementation):
  model = multitask.build(
    TASKS,
    block=block,
    norm=norm,
    dtype='float64',
    convolution_implementation=implementation,
    **TINY,
  )
  params, stats = jax.tree.map(
    lambda leaf: leaf.astype(jnp.float64),
    tuple(
      randomised(tree, seed) for seed, tree in enumerate(shapes(model, image_shape))
    ),
  )
  image = np.random.default_rng(0).uniform(size=(2, *image_shape))
  logits, after = jax.jit(lambda *a: multitask.apply(model, *a, train=False))(
    params, stats, image
  )
  jax.tree.map(np.testing.assert_array_equal, after, stats)

  params, stats = jax.tree.map(np.asarray, (params, stats))
  features = reference_backbone(
    image, params['backbone'], stats['backbone'], block, norm
  )
  height, width = (math.ceil(n / 8) for n in image_shape[:2])
  assert features.shape == (2, height, width, 32 * resnet.EXPANSION[block])
  parts = reference_dense_head(
    features, params['heads']['parts'], stats['heads']['parts'], norm
  )
  smiling = reference_classification_head(features, params['heads']['smiling'])
  assert np.std(parts) > 1e-2
  assert np.std(smiling) > 1e-4
  np.testing.assert_allclose(logits['parts'], parts, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(logits['smiling'], smiling, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------- norms


def test_batch_norm_statistics():
  x = (3 + 2 * normal(0, 4, 3, 2, 5)).astype(np.float32)
  module = normalization.BatchNorm()
  variables = {
    'params': {
      'scale': jnp.arange(1.0, 6.0),
      'bias': jnp.arange(5.0),
    },
    'batch_stats': {'mean': jnp.full(5, 0.5), 'var': jnp.full(5, 2.0)},
  }
  scale, bias = np.arange(1.0, 6.0), np.arange(5.0)
  y, updated = module.apply(variables, x, train=True, mutable=['batch_stats'])
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)
  stats = updated['batch_stats']
  np.testing.assert_allclose(stats['mean'], 0.9 * 0.5 + 0.1 * mean, rtol=1e-6)
  unbiased = x.var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(stats['var'], 0.9 * 2 + 0.1 * unbiased, rtol=1e-6)

  y = module.apply(variables, x, train=False)
  expected = (x - 0.5) / np.sqrt(2 + 1e-5) * scale + bias
  np.testing.assert_allclose(y, expected, atol=1e-5)


def batch_norm(mean):
  """(x, running mean) -> y and new statistics, of 5 channels."""
  module = normalization.BatchNorm()
  variables = {
    'params': {'scale': jnp.ones(5), 'bias': jnp.zeros(5)},
    'batch_stats': {'mean': jnp.full(5, mean), 'var': jnp.ones(5)},
  }
  return lambda x: module.apply(variables, x, train=True, mutable=['batch_stats'])


def test_batch_norm_of_a_mean_far_from_zero():
  """Squares of x itself would leave two digits of the variance."""
  x = 1e3 + normal(0, 8, 4, 4, 5)
  y, updated = batch_norm(999.5)(x.astype(np.float32))
  x = x.astype(np.float32).astype(np.float64)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-3)
  unbiased = x.var((0, 1, 2), ddof=1)
  got = updated['batch_stats']['var']
  np.testing.assert_allclose(got, 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_batch_norm_sums_once_over_devices():
  """And its gradient once: each exchange waits for the one before."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  sharded = NamedSharding(mesh, PartitionSpec('data'))
  run = batch_norm(0.0)
  gradient = jax.grad(lambda x: (jnp.sin(run(x)[0]).sum(), run(x)[1]), has_aux=True)
  for function, most in ((run, 1), (gradient, 2)):
    jitted = jax.jit(function, in_shardings=sharded)
    text = jitted.lower(jnp.zeros((8, 4, 4, 5))).compile().as_text()
    assert 1 <= text.count(' all-reduce(') <= most


def test_batch_norm_of_one_value_is_finite():
  module = normalization.BatchNorm()
  x = jnp.ones((1, 1, 1, 4))
  variables = module.init(jax.random.key(0), x, train=False)

  def loss(x):
    y, updated = module.apply(variables, x, train=True, mutable=['batch_stats'])
    return jnp.sum(jnp.tanh(y)), updated

  gradient, updated = jax.grad(loss, has_aux=True)(x)
  for leaf in jax.tree.leaves((gradient, updated)):
    assert np.isfinite(leaf).all()


def test_group_norm_treats_each_example_by_itself():
  model = multitask.build(TASKS, norm='group', dropout=0.0, **TINY)
  params, stats = tiny_parameters(model)
  assert jax.tree.leaves(stats) == []
  image = tiny_image(3)
  run = jax.jit(lambda x: multitask.apply(model, params, stats, x, train=True)[0])
  together = run(image)
  alone = run(image[1:2])
  for task in TASKS:
    np.testing.assert_allclose(together[task][1:2], alone[task], atol=1e-5)


@pytest.mark.parametrize('channels', [4, 12, 64, 96, 128, 2048])
def test_group_count_divides_and_leaves_four_channels(channels):
  groups = normalization.group_count(channels)
  assert channels % groups == 0
  assert channels // groups >= 4
  assert groups == 32 or channels < 128


# ---------------------------------------------------------------- multi-task


def tiny_image(batch, side=32):
  return jax.random.uniform(jax.random.key(7), (batch, side, side, 3))


def tiny_parameters(model):
  """Random parameters without the seconds it takes to compile `init`."""
  params, stats = shapes(model)
  return randomised(params), randomised(stats, 1)


class OneConv(nn.Module):
  """A backbone that compiles at once, for the tests of what stands around it."""

  @nn.compact
  def __call__(self, x, train):
    layer = convolution.Conv(8, size=1, stride=8, implementation='matmul')
    return layer(x)


def small(tasks):
  model = multitask.build(tasks, **TINY)
  return model._replace(backbone=OneConv())


@pytest.fixture(scope='module')
def tiny():
  model = multitask.build(TASKS, **TINY)
  return model, *tiny_parameters(model)


def test_training_updates_running_statistics_and_drops_units(tiny):
  model, params, stats = tiny
  image = tiny_image(4)
  run = jax.jit(
    lambda key: multitask.apply(model, params, stats, image, train=True, key=key)
  )
  logits, after = run(jax.random.key(0))
  assert jax.tree.structure(after) == jax.tree.structure(stats)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), stats, after)
  assert all(jax.tree.leaves(moved))
  assert set(stats['heads']) == set(TASKS)
  assert stats['heads']['smiling'] == {}
  others, _ = run(jax.random.key(1))
  for task in TASKS:
    assert np.any(logits[task] != others[task])
  assert logits['parts'].shape == (4, 4, 4, 3)
  assert logits['smiling'].shape == (4, 1)


@pytest.mark.parametrize(('features', 'units'), [(32, (16, 16)), (256, (64, 32))])
def test_a_classification_head_has_enough_units_to_live(features, units):
  head = heads.ClassificationHead(1, features=features)
  init = lambda: head.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
  params = jax.eval_shape(init)['params']
  got = tuple(params[name]['kernel'].shape[-1] for name in ('conv', 'hidden'))
  assert got == units


def test_dropout_rates():
  features = jnp.ones((4, 8, 8, 8))
  for head, rates in (
    (heads.DenseHead(1, features=64, dropout=0.5), [0.15, 0.15]),
    (heads.ClassificationHead(1, features=2048, dropout=0.5), [0.3, 0.2]),
  ):
    # Positive kernels and large biases: no ReLU makes a zero of its own.
    variables = jax.tree.map_with_path(
      lambda path, leaf: jnp.full(leaf.shape, 10.0 if path[-1].key == 'bias' else 0.1),
      jax.eval_shape(
        lambda head=head: head.init(jax.random.key(0), features, train=False)
      ),
    )
    _, captured = jax.jit(
      lambda variables, head=head: head.apply(
        variables,
        features,
        train=True,
        rngs={'dropout': jax.random.key(1)},
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable=['intermediates', 'batch_stats'],
      )
    )(variables)
    dropped = [
      float(jnp.mean(leaf == 0)) for leaf in jax.tree.leaves(captured['intermediates'])
    ]
    np.testing.assert_allclose(sorted(dropped), sorted(rates), atol=0.04)


def test_bfloat16_keeps_parameters_and_logits_in_float32(tiny):
  model, params, stats = tiny
  low = multitask.build(TASKS, dtype='bfloat16', **TINY)
  for leaf, full in zip(
    *(jax.tree.leaves(shapes(m)) for m in (low, model)), strict=True
  ):
    assert leaf.dtype == full.dtype == jnp.float32
  image = tiny_image(2)
  variables = {
    k: t['backbone'] for k, t in (('params', params), ('batch_stats', stats))
  }
  features = jax.eval_shape(
    lambda v: low.backbone.apply(v, image, train=False), variables
  )
  assert features.dtype == jnp.bfloat16
  run = lambda model: jax.jit(
    lambda p, s: multitask.apply(model, p, s, image, train=False)[0]
  )(params, stats)
  logits, exact = run(low), run(model)
  for task in TASKS:
    assert logits[task].dtype == jnp.float32
    scale = np.abs(exact[task]).max()
    np.testing.assert_allclose(logits[task], exact[task], atol=0.05 * scale)
    assert np.any(logits[task] != exact[task])


def test_a_task_does_not_depend_on_its_neighbours():
  key, image = jax.random.key(0), tiny_image(2)

  def run(tasks):
    model = small(tasks)
    params, stats = multitask.init(model, key, (32, 32, 3))
    return params, multitask.apply(model, params, stats, image, train=True, key=key)[0]

  twins = {'male': ('classification', 1), 'smiling': ('classification', 1)}
  params, outputs = run(twins)
  alone, alone_outputs = run({'smiling': twins['smiling']})
  np.testing.assert_allclose(outputs['smiling'], alone_outputs['smiling'], rtol=1e-5)
  assert np.any(outputs['smiling'] != outputs['male'])
  for kept, expected in (
    (params['backbone'], alone['backbone']),
    (params['heads']['smiling'], alone['heads']['smiling']),
  ):
    jax.tree.map(np.testing.assert_array_equal, kept, expected)
  kernels = [params['heads'][task]['conv']['kernel'] for task in twins]
  assert np.any(kernels[0] != kernels[1])


def loss_of(model, stats, image):
  def loss(params, present):
    outputs, after = multitask.apply(
      model,
      params,
      stats,
      image,
      train=True,
      key=jax.random.key(5),
      present=present,
    )
    return sum(jnp.mean(jnp.tanh(y) ** 2) for y in outputs.values()), after

  return loss


def test_absent_head_gets_zero_gradient_and_keeps_its_statistics():
  model = small(TASKS)
  params, stats = tiny_parameters(model)
  image = tiny_image(2)
  loss = loss_of(model, stats, image)
  # Whatever is computed from the absent head's parameters would be NaN.
  poisoned = {
    'backbone': params['backbone'],
    'heads': {
      **params['heads'],
      'parts': jax.tree.map(lambda p: p * jnp.nan, params['heads']['parts']),
    },
  }

  def derivatives(params, present):
    gradient = lambda p: jax.grad(loss, has_aux=True)(p, present)
    direction = {
      **jax.tree.map(jnp.zeros_like, params),
      'backbone': jax.tree.map(jnp.ones_like, params['backbone']),
    }
    return jax.jvp(gradient, (params,), (direction,))

  derivatives = jax.jit(derivatives)
  traced = {'parts': jnp.array(False), 'smiling': jnp.array(True)}
  (gradient, after), (hessian_product, _) = derivatives(poisoned, traced)
  for tree in (gradient, hessian_product):
    for leaf in jax.tree.leaves(tree['heads']['parts']):
      np.testing.assert_array_equal(leaf, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    after['heads']['parts'],
    stats['heads']['parts'],
  )

  # The tasks that are present get what they get without the other head.
  alone = small({'smiling': TASKS['smiling']})

  def subset(tree):
    heads = {'smiling': tree['heads']['smiling']}
    return {'backbone': tree['backbone'], 'heads': heads}

  alone_loss = loss_of(alone, subset(stats), image)

  def alone_derivatives(params):
    direction = {
      **jax.tree.map(jnp.zeros_like, params),
      'backbone': jax.tree.map(jnp.ones_like, params['backbone']),
    }
    gradient = lambda p: jax.grad(alone_loss, has_aux=True)(p, None)
    return jax.jvp(gradient, (params,), (direction,))

  (expected, _), (expected_product, _) = jax.jit(alone_derivatives)(subset(params))
  close = lambda a, b: np.testing.assert_allclose(
    a, b, atol=2e-4 * (np.abs(b).max() + 1e-6)
  )
  jax.tree.map(close, subset(gradient), expected)
  jax.tree.map(close, subset(hessian_product), expected_product)

  # The same compiled program computes the other head when it is present.
  (gradient, after), _ = derivatives(params, dict.fromkeys(traced, jnp.array(True)))
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient['heads']['parts']))
  changed = jax.tree.map(
    lambda a, b: bool(jnp.any(a != b)),
    after['heads']['parts'],
    stats['heads']['parts'],
  )
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize('flag', [False, True])
def test_absent_head_is_not_executed(flag):
  calls = []

  class Head(nn.Module):
    def __call__(self, x, train):
      jax.debug.callback(lambda: calls.append(1))
      return jnp.sum(x, axis=(1, 2, 3))

  model = small({})._replace(heads={'task': Head()})
  params, stats = tiny_parameters(model)
  run = jax.jit(
    lambda present: multitask.apply(
      model, params, stats, tiny_image(1), train=False, present=present
    )[0]
  )
  logits = run({'task': jnp.array(flag)})
  jax.effects_barrier()
  assert len(calls) == flag
  assert np.any(logits['task'] != 0) == flag


def test_python_flags_are_resolved_when_tracing(tiny):
  model, params, stats = tiny
  present = {'parts': False, 'smiling': True}
  run = lambda p: multitask.apply(
    model, p, stats, tiny_image(1), train=False, present=present
  )
  outputs, after = jax.eval_shape(run, params)
  assert set(outputs) == {'smiling'}
  assert jax.tree.structure(after) == jax.tree.structure(stats)
  assert 'cond[' not in str(jax.make_jaxpr(run)(params))


def test_matmul_network_contains_no_convolution(tiny):
  model, params, stats = tiny
  gradient = jax.grad(loss_of(model, stats, tiny_image(1)), has_aux=True)
  text = str(jax.make_jaxpr(lambda p: gradient(p, None))(params))
  assert 'dot_general' in text
  assert 'conv_general_dilated' not in text
  assert 'select_and_' not in text


def test_heads_of_an_xla_backbone_avoid_convolutions_on_cpu():
  model = multitask.build(TASKS, convolution_implementation='lax', **TINY)
  assert model.backbone.implementation == 'lax'
  for head in model.heads.values():
    assert head.implementation == 'matmul'


@pytest.mark.parametrize(
  ('arguments', 'listed'),
  [
    ({'depth': 34}, '18, 50, 101'),
    ({'block': 'wide'}, 'basic, bottleneck'),
    ({'norm': 'layer'}, 'batch, group'),
    ({'dtype': 'float16'}, 'float32, bfloat16, float64'),
    ({'convolution_implementation': 'fft'}, 'auto, lax, folded, mixed, matmul'),
    ({'blocks': (1, 1)}, 'four'),
    ({'width': 0}, 'above 0'),
    ({'head_features': 12}, 'multiple of 8'),
    ({'dropout': 2}, '0 to 1'),
    ({'heads': {'parts': ('pixel', 3)}}, 'dense, classification'),
  ],
)
def test_bad_value_is_one_line_that_lists_the_choices(arguments, listed):
  with pytest.raises(UserError, match=listed) as error:
    multitask.build(**{'heads': TASKS, **arguments})
  assert '\n' not in str(error.value)


def test_positions_of_every_kernel():
  model = multitask.build(TASKS, depth=18, **TINY)
  params, _ = jax.eval_shape(
    lambda key: multitask.init(model, key, (64, 48, 3)), jax.random.key(0)
  )
  found = multitask.positions(model, (64, 48, 3))
  assert set(found) == {p for p in gr.by_path(params) if p.endswith('/kernel')}
  size = lambda layer: found[f'backbone/{layer}/kernel']
  assert size('stem_conv1') == size('stem_conv3') == 32 * 24
  assert size('layer1_0/conv1') == 16 * 12
  # Output stride 8 from the second stage on.
  for stage in (2, 3, 4):
    assert size(f'layer{stage}_0/conv2') == 8 * 6
  ones = ('parts/pool_conv', 'smiling/hidden', 'smiling/logits')
  heads = {path: n for path, n in found.items() if path.startswith('heads/')}
  assert {path for path, n in heads.items() if n == 1} == {
    f'heads/{name}/kernel' for name in ones
  }
  assert {n for n in heads.values() if n != 1} == {8 * 6}
