"""What a network costs: FLOPs by hand, and the table of what was measured."""

import flax.linen as nn
import jax
import numpy as np

from msp import measure
from msp.models import multitask
from msp.models.convolution import Conv
from tests.networks import small_network


class Backbone(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = Conv(4, size=3, stride=2, name='first')(x)
    return Conv(5, size=1, bias=True, name='second')(x)


class Head(nn.Module):
  outputs: int
  dense: bool

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(self.outputs, name='logits')(x if self.dense else x.mean((1, 2)))


def network():
  model = multitask.MultiTask(
    Backbone(), {'regions': Head(2, True), 'smiling': Head(1, False)}
  )
  return model, *multitask.init(model, jax.random.key(0), (8, 6, 3))


def test_flops_by_hand():
  model, params, _ = network()
  # 8 × 6 pixels become 4 × 3 positions; an image-level head has one.
  backbone = 2 * (3 * 3 * 3 * 4 + 4 * 5) * 12
  heads = 2 * 5 * 2 * 12 + 2 * 5 * 1
  found = measure.kernel_flops(model, params, (8, 6, 3))
  assert found == (backbone, backbone + heads)


def test_a_batch_costs_its_images():
  found = measure.cost({'a': network()}, (8, 6, 3), 2, rounds=3)['a']
  # 3·3·3·4 + 4·5 + 5 in the backbone, 5·2 + 2 and 5·1 + 1 in the heads.
  assert found.parameters == 108 + 25 + 12 + 6
  assert found.backbone_flops == 2 * 3072
  assert found.kernel_flops == 2 * (3072 + 250)
  assert len(found.seconds) == 3  # those before are not counted


def test_the_table_has_medians_ratios_and_what_is_left_of_kernels():
  costs = {
    1: {
      'dense': measure.Cost(
        2000, 4 * 10**9, 5 * 10**9, 6e9, 2**21, (0.5, 0.001, 0.002)
      ),
      'compact': measure.Cost(
        500, 10**9, 2 * 10**9, 3e9, 2**20, (0.001, 0.003, 0.0005)
      ),
    },
    # FLOPs are told for an image, once; memory and time for the batch.
    10: {
      'dense': measure.Cost(2000, 4 * 10**10, 5 * 10**10, 6e10, 2**24, (0.02, 0.04)),
      'compact': measure.Cost(500, 10**10, 2 * 10**10, 3e10, 2**22, (0.015, 0.015)),
    },
  }
  kernels = lambda first, second: {
    'backbone': {
      'stem': {'kernel': np.zeros((3, 3, *first)), 'bias': np.zeros(first[1])},
      'second': {'kernel': np.zeros((1, 1, *second))},
    },
    'heads': {'regions': {'kernel': np.zeros((second[1], 2))}},
  }
  text = measure.table(costs, kernels((3, 16), (16, 8)), kernels((3, 4), (4, 8)))
  lines = text.splitlines()
  assert lines[:12] == [
    '| | dense | compact |',
    '|---|---|---|',
    '| parameters | 2,000 | 500 (×0.25) |',
    '| backbone GFLOP an image | 4 | 1 (×0.25) |',
    '| all GFLOP an image | 5 | 2 (×0.40) |',
    '| all GFLOP an image, by XLA | 6 | 3 (×0.50) |',
    '| activations MiB, batch 1 | 2 | 1 (×0.50) |',
    '| latency ms, batch 1 | 2 | 1 (×0.50) |',
    '| fastest to slowest ms | 1 to 500 | 0.5 to 3 |',
    '| activations MiB, batch 10 | 16 | 4 (×0.25) |',
    '| latency ms, batch 10 | 30 | 15 (×0.50) |',
    '| fastest to slowest ms | 20 to 40 | 15 to 15 |',
  ]
  assert lines[12:14] == ['', '| kernel | in | out | parameters |']
  # Neither biases nor heads.
  assert sorted(lines[15:]) == [
    '| second | 16 → 4 | 8 → 8 | 128 → 32 |',
    '| stem | 3 → 3 | 16 → 4 | 432 → 108 |',
  ]


def test_what_a_dead_input_channel_saves_by_hand():
  model = small_network('basic', (1, 1, 1, 1))
  shape = (16, 16, 3)
  params, stats = multitask.init(model, jax.random.key(0), shape)
  params = jax.tree.map(np.array, params)
  before = measure.backbone_costs(model, params, stats, shape)
  leaves = jax.tree.leaves(params['backbone'])
  assert before['backbone_parameters'] == sum(x.size for x in leaves)
  assert before['backbone_parameters_compact'] == before['backbone_parameters']
  assert before['backbone_flops_compact'] == before['backbone_flops']
  block = params['backbone']['layer4_0']
  block['conv2']['kernel'][:, :, 1] = 0
  after = measure.backbone_costs(model, params, stats, shape)
  # Nobody else reads it: what writes it goes too, with its norm.
  read, written = (block[name]['kernel'] for name in ('conv2', 'conv1'))
  weights = read[:, :, 1].size + written[..., 1].size
  lost = before['backbone_parameters'] - after['backbone_parameters_compact']
  assert lost == weights + 2
  # At a stride of 8, 16 × 16 pixels are 2 × 2 positions.
  lost = before['backbone_flops'] - after['backbone_flops_compact']
  assert lost == 2 * weights * 2 * 2
  assert after['backbone_flops'] == before['backbone_flops']
