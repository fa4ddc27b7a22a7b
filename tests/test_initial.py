"""Initial weights from compact networks, runs and PyTorch files."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from msp import compact
from msp import groups as gr
from msp.checkpoint import Checkpoints
from msp.errors import UserError
from msp.initial import fitting, kept_shape, read, tasks
from msp.models import multitask
from tests.networks import HEADS, small_network

SIZE = (24, 32)
DILATIONS = (1, 1, 2, 4)
STRIDES = (1, 2, 1, 1)


def init(model):
  return jax.jit(lambda key: multitask.init(model, key, (*SIZE, 3)))(jax.random.key(0))


def state_dict(widths, block, blocks, timm, seed=0):
  """A PyTorch ResNet-D as its file has it: name -> array.

  Args:
    widths: of the three stem convolutions and the four stages.
    block: 'basic' or 'bottleneck'.
    blocks: in each stage.
    timm: timm's names, else those of Less is More.
    seed: of the numbers.
  """
  rng = np.random.default_rng(seed)
  arrays = {}

  def conv(name, inputs, outputs, size):
    std = (2 / (inputs * size * size)) ** 0.5
    arrays[f'{name}.weight'] = rng.normal(0, std, (outputs, inputs, size, size))

  def norm(name, channels):
    arrays[f'{name}.weight'] = rng.uniform(0.5, 1.5, channels)
    arrays[f'{name}.bias'] = rng.uniform(-0.3, 0.3, channels)
    arrays[f'{name}.running_mean'] = rng.uniform(-0.2, 0.2, channels)
    arrays[f'{name}.running_var'] = rng.uniform(0.5, 1.5, channels)
    arrays[f'{name}.num_batches_tracked'] = np.array(7)

  stem = ('conv1.0', 'conv1.1', 'conv1.3', 'conv1.4', 'conv1.6', 'bn1')
  if not timm:
    stem = ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3')
  inputs = 3
  for i, width in enumerate(widths[:3]):
    conv(stem[2 * i], inputs, width, 3)
    norm(stem[2 * i + 1], width)
    inputs = width
  for stage, (width, count) in enumerate(zip(widths[3:], blocks, strict=True), 1):
    for i in range(count):
      name = f'layer{stage}.{i}'
      total = width * (4 if block == 'bottleneck' else 1)
      sizes = (1, 3, 1) if block == 'bottleneck' else (3, 3)
      at = inputs
      for j, size in enumerate(sizes, 1):
        outputs = total if j == len(sizes) else width
        conv(f'{name}.conv{j}', at, outputs, size)
        norm(f'{name}.bn{j}', outputs)
        at = outputs
      if i == 0:
        first = 1 if timm else 0  # timm pools before it
        conv(f'{name}.downsample.{first}', inputs, total, 1)
        norm(f'{name}.downsample.{first + 1}', total)
      inputs = total
  arrays['fc.weight'] = rng.normal(size=(10, inputs))
  return {k: x.astype(np.float32) for k, x in arrays.items()}


def reference(arrays, image, block, blocks, timm):
  """The forward pass in evaluation mode, channels first, in NumPy alone."""

  def conv(name, x, stride=1, dilation=1):
    kernel = arrays[f'{name}.weight'].astype(float)
    size = kernel.shape[-1]
    pad = dilation * (size // 2)
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows, columns = ((n - dilation * (size - 1) - 1) // stride + 1 for n in x.shape[1:])
    y = 0
    for u in range(size):
      for v in range(size):
        top, left = u * dilation, v * dilation
        seen = x[:, top : top + rows * stride : stride, left:][:, :rows]
        seen = seen[:, :, : columns * stride : stride]
        y = y + np.einsum('oi,ihw->ohw', kernel[:, :, u, v], seen)
    return y

  def norm(name, x):
    leaf = lambda part: arrays[f'{name}.{part}'].astype(float)[:, None, None]
    x = (x - leaf('running_mean')) / np.sqrt(leaf('running_var') + 1e-5)
    return x * leaf('weight') + leaf('bias')

  relu = lambda x: np.maximum(x, 0)
  stem = ('conv1.0', 'conv1.1', 'conv1.3', 'conv1.4', 'conv1.6', 'bn1')
  if not timm:
    stem = ('conv1', 'bn1', 'conv2', 'bn2', 'conv3', 'bn3')
  x = image.transpose(2, 0, 1).astype(float)
  for i, stride in enumerate((2, 1, 1)):
    x = relu(norm(stem[2 * i + 1], conv(stem[2 * i], x, stride)))
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
  rows, columns = ((n - 3) // 2 + 1 for n in padded.shape[1:])
  x = np.max(
    [
      padded[:, u : u + 2 * rows - 1 : 2, v : v + 2 * columns - 1 : 2]
      for u in range(3)
      for v in range(3)
    ],
    axis=0,
  )
  spatial = 2 if block == 'bottleneck' else 1
  for stage, count in enumerate(blocks, 1):
    dilation = DILATIONS[stage - 1]
    for i in range(count):
      name, stride = f'layer{stage}.{i}', STRIDES[stage - 1] if i == 0 else 1
      y, last = x, 3 if block == 'bottleneck' else 2
      for j in range(1, last + 1):
        y = conv(f'{name}.conv{j}', y, stride if j == spatial else 1, dilation)
        y = norm(f'{name}.bn{j}', y)
        y = relu(y) if j < last else y
      if i == 0:
        first = 1 if timm else 0
        x = norm(
          f'{name}.downsample.{first + 1}',
          conv(f'{name}.downsample.{first}', x, stride),
        )
      x = relu(x + y)
  return x.transpose(1, 2, 0)


@pytest.mark.parametrize(
  ('block', 'blocks', 'timm', 'prefix'),
  [
    ('bottleneck', (1, 1, 1, 1), True, ''),
    ('basic', (2, 1, 1, 1), False, 'module.backbone.'),
  ],
)
def test_a_pytorch_backbone_computes_the_same(block, blocks, timm, prefix, tmp_path):
  # timm's stem is half as wide: its widths come along.
  stem = (4, 4, 8) if timm else (8, 8, 16)
  arrays = state_dict((*stem, 8, 16, 32, 64), block, blocks, timm)
  path = tmp_path / ('backbone.safetensors' if timm else 'backbone.npz')
  named = {prefix + k: x for k, x in arrays.items()}
  if timm:
    safetensors.numpy.save_file(named, path)
  else:
    np.savez(path, **named)
  model = small_network(block, blocks)
  initial = read(str(path), model, 'camvid')
  model = model._replace(backbone=model.backbone.clone(shape=initial.shape))
  params, stats = init(model)
  used, used_stats, fresh, unused, reshaped = fitting(initial, params, stats)
  assert unused == (f'{prefix}fc.weight',)
  assert reshaped.keys() == {path for path in used if path.endswith('/kernel')}
  kernel = 'backbone/layer4_0/conv1/kernel'
  assert reshaped[kernel] == arrays['layer4.0.conv1.weight'].shape
  assert sorted(reshaped[kernel]) == sorted(used[kernel].shape)
  assert fresh
  assert all(path.startswith('heads/') for path in fresh)
  params, stats = gr.replace(params, used), gr.replace(stats, used_stats)
  image = np.random.default_rng(1).random((*SIZE, 3), np.float32)
  variables = {'params': params['backbone'], 'batch_stats': stats['backbone']}
  got = model.backbone.apply(variables, image[None], False)[0]
  wanted = reference(arrays, image, block, blocks, timm)
  assert got.shape == wanted.shape
  np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def small(tmp_path):
  """A network with some channels gone, as a folder of --mode compact."""
  model = small_network('basic', (1, 1, 1, 1))
  params, stats = init(model)
  params = jax.device_get(params)
  for path in ('backbone/layer2_0/conv2/kernel', 'backbone/layer3_0/conv1/kernel'):
    kernel = np.array(gr.by_path(params)[path])
    kernel[..., ::2, :] = 0
    params = gr.replace(params, {path: kernel})
  result = compact.compact(model, params, stats)
  compact.write(tmp_path / 'compact', result)
  return model, result


def test_a_compact_network_with_another_head(tmp_path):
  model, result = small(tmp_path)
  initial = read(str(tmp_path / 'compact'), model, 'camvid')
  assert initial.shape == result.model.backbone.shape
  heads = HEADS | {'regions': ('dense', 5), 'young': ('classification', 1)}
  other = multitask.build(
    heads, blocks=(1, 1, 1, 1), block='basic', width=0.125, head_features=8
  )
  other = other._replace(backbone=other.backbone.clone(shape=initial.shape))
  shapes = jax.eval_shape(
    lambda key: multitask.init(other, key, (*SIZE, 3)), jax.random.key(0)
  )
  used, stats, fresh, unused, _ = fitting(initial, *shapes)
  assert all(p.startswith('heads/regions') for p in unused)
  few = multitask.build(
    {}, blocks=(1, 1, 1, 1), block='basic', width=0.125, head_features=8
  )
  few = few._replace(backbone=few.backbone.clone(shape=initial.shape))
  alone = jax.eval_shape(
    lambda key: multitask.init(few, key, (*SIZE, 3)), jax.random.key(0)
  )
  unused = fitting(initial, *alone).unused
  assert unused
  assert all(p.startswith('heads/') for p in unused)
  wanted = gr.by_path(result.params)
  for path, array in used.items():
    np.testing.assert_array_equal(array, wanted[path])
  assert stats
  # A head of other classes is another head.
  assert all(p.startswith(('heads/regions', 'heads/young')) for p in fresh)
  assert any(p.startswith('heads/young') for p in fresh)
  assert any(p.startswith('heads/regions') for p in fresh)
  assert not any(p.startswith('heads/regions') for p in used)
  assert any(p.startswith('heads/smiling') for p in used)


def test_the_tasks_of_a_run_are_those_of_its_data_set(tmp_path):
  content = '{"tasks": ["segmentation", "male"], "data": {"name": "celebamask_hq"}}'
  (tmp_path / 'config.json').write_text(content)
  known = tasks(str(tmp_path), 'celebamask_hq')
  assert known == ['segmentation', 'male']
  assert tasks(str(tmp_path), 'nyud_mt') == []
  model, result = small(tmp_path)
  inside, elsewhere = tmp_path / 'compact', tmp_path / 'elsewhere' / 'compact'
  compact.write(elsewhere, result)
  for folder, data_set, heads in (
    (inside, 'celebamask_hq', set(HEADS)),
    (inside, 'nyud_mt', set()),
    (elsewhere, 'nyud_mt', set(HEADS)),  # made from nobody knows what
  ):
    assert set(tasks(str(folder), data_set)) == heads
    initial = read(str(folder), model, data_set)
    assert {p.split('/')[1] for p in initial.params if p.startswith('heads/')} == heads
    assert any(p.startswith('backbone/') for p in initial.params)
    assert bool(initial.skipped) == (not heads)


def test_what_cannot_be_begun_with(tmp_path):
  model, result = small(tmp_path)
  compact.write(tmp_path / 'compact' / 'folded', compact.fold(result))
  with pytest.raises(UserError, match='norms folded and cannot be trained'):
    read(str(tmp_path / 'compact' / 'folded'), model, 'camvid')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'torch.pth').write_bytes(b'')
  for name, message in (
    ('nowhere', 'there is no such file or folder'),
    ('empty', r'no compact network, work directory, \.npz'),
    ('torch.pth', r'save its state dict as \.safetensors or \.npz'),
  ):
    with pytest.raises(UserError, match=f'{name}: {message}'):
      read(str(tmp_path / name), model, 'camvid')
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='no complete checkpoint'):
    read(str(tmp_path / 'run'), model, 'camvid')
  for name in ('damaged.npz', 'damaged.safetensors'):
    (tmp_path / name).write_bytes(b'1234567890')
    with pytest.raises(UserError, match=f'{name}: not readable'):
      read(str(tmp_path / name), model, 'camvid')
  np.savez(tmp_path / 'other.npz', weight=np.zeros(3))
  with pytest.raises(UserError, match='no ResNet in it'):
    read(str(tmp_path / 'other.npz'), model, 'camvid')
  kernel = 'layer1.0.conv1.weight'
  for values in (np.full((8, 8, 3, 3), 'x'), np.ones((8, 8, 3, 3), np.int8)):
    np.savez(tmp_path / 'other.npz', **{kernel: values})
    with pytest.raises(UserError, match=f'{kernel} is .*; weights have to be float'):
      read(str(tmp_path / 'other.npz'), model, 'camvid')
  np.savez(tmp_path / 'other.npz', **{kernel: np.array([None])})
  with pytest.raises(UserError, match=r'other\.npz: not readable \(Object arrays'):
    read(str(tmp_path / 'other.npz'), model, 'camvid')
  with (tmp_path / 'other.npz').open('wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(UserError, match=r'other\.npz: not readable'):
    read(str(tmp_path / 'other.npz'), model, 'camvid')
  np.savez_compressed(tmp_path / 'other.npz', **{kernel: np.random.rand(30, 30)})
  content = bytearray((tmp_path / 'other.npz').read_bytes())
  content[80:90] = b'\xff' * 10
  (tmp_path / 'other.npz').write_bytes(content)
  with pytest.raises(UserError, match=r'other\.npz: not readable'):
    read(str(tmp_path / 'other.npz'), model, 'camvid')
  header = {kernel: {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}
  header = json.dumps(header).encode()
  eighth = tmp_path / 'eighth.safetensors'
  eighth.write_bytes(len(header).to_bytes(8, 'little') + header + b'0')
  with pytest.raises(UserError, match=r'eighth\.safetensors: not readable'):
    read(str(eighth), model, 'camvid')
  squeezed = {'layer1.0.conv1.weight': np.zeros((8, 8, 3, 3))}
  np.savez(tmp_path / 'se.npz', **squeezed, **{'layer1.0.se.fc1.weight': np.zeros(3)})
  with pytest.raises(UserError, match=r'layer1\.0\.se\.fc1\.weight has no counterpart'):
    read(str(tmp_path / 'se.npz'), model, 'camvid')
  (tmp_path / 'backbone.json').write_text('[]')
  with pytest.raises(UserError, match=r'cannot read .*backbone\.json'):
    kept_shape(tmp_path)


@pytest.mark.parametrize('blocks', [(2, 1, 1, 1), (1, 1, 1, 1)])
def test_another_depth_is_refused(blocks, tmp_path):
  mine = (1, 1, 1, 1) if blocks != (1, 1, 1, 1) else (1, 1, 2, 1)
  arrays = state_dict((8, 8, 16, 8, 16, 32, 64), 'basic', blocks, timm=False)
  np.savez(tmp_path / 'x.npz', **arrays)
  model = small_network('basic', mine)
  initial = read(str(tmp_path / 'x.npz'), model, 'camvid')
  model = model._replace(backbone=model.backbone.clone(shape=initial.shape))
  shapes = jax.eval_shape(
    lambda key: multitask.init(model, key, (*SIZE, 3)), jax.random.key(0)
  )
  where = r'layer1_1/\S+ \(.*\), this model absent'
  if blocks == (1, 1, 1, 1):
    where = r'layer3_1/\S+ absent, this model \('
  with pytest.raises(UserError, match=f'holds another backbone; .*{where}'):
    fitting(initial, *shapes)


def test_a_head_of_another_data_set_is_not_taken_over(tmp_path, monkeypatch):
  model = small_network('basic', (1, 1, 1, 1))
  params, stats = init(model)
  state = {'params': params, 'batch_stats': stats}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, 0.5)
  config = {'data': {'name': 'camvid'}, 'tasks': list(HEADS)}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  monkeypatch.setenv('HOME', str(tmp_path.parent))
  for data_set, heads in (('camvid', True), ('nyud_mt', False)):
    initial = read(f'~/{tmp_path.name}', model, data_set)
    used = fitting(initial, params, stats)
    taken = [path for path in used.params if path.startswith('heads/')]
    assert bool(taken) is heads
    assert any(path.startswith('heads/') for path in used.unused) is not heads
    assert any(path.startswith('backbone/') for path in used.params)
    assert tasks(str(tmp_path), data_set) == (list(HEADS) if heads else [])
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match=r'with its config\.json'):
    read(str(tmp_path), model, 'camvid')
