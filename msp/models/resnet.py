"""Dilated ResNet-D backbones, output stride 8."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from msp.models.convolution import Conv, max_pool
from msp.models.normalization import norm_layer

# depth: kind of block, blocks per stage
DEPTHS = {
  18: ('basic', (2, 2, 2, 2)),
  50: ('bottleneck', (3, 4, 6, 3)),
  101: ('bottleneck', (3, 4, 23, 3)),
}
EXPANSION = {'basic': 1, 'bottleneck': 4}

_STAGE_WIDTHS = (64, 128, 256, 512)
_STAGE_STRIDES = (1, 2, 1, 1)
_STAGE_DILATIONS = (1, 1, 2, 4)


def scaled(channels: int, width: float) -> int:
  """Channels times the width multiplier: a multiple of 4, at least 4."""
  return max(4, 4 * round(channels * width / 4))


class Shape(NamedTuple):
  """What is left of a network's channels; empty: everything. Hashable.

  Attributes:
    widths: (stream, channels) where they are not those of `ResNet.width`.
    gathers: (kernel, channels of its stream that it reads), positions among those the
      stream has, where a convolution reads some of them only.
  """

  widths: tuple[tuple[str, int], ...] = ()
  gathers: tuple[tuple[str, tuple[int, ...]], ...] = ()


WHOLE = Shape()


class Stream(NamedTuple):
  """Activations that share their channels, and everything with an axis of them.

  Attributes:
    name: the convolution that writes it, such as 'layer1_0/conv1', or 'layer1/sum',
      what the blocks of a stage add to.
    writers: paths of the kernels whose output channels it has.
    norms: paths of the normalisations behind them, in the same order.
    readers: paths of the kernels whose input channels it has.
  """

  name: str
  writers: tuple[str, ...]
  norms: tuple[str, ...]
  readers: tuple[str, ...]


class Block(nn.Module):
  """Residual block, basic or bottleneck.

  The stride sits on the first 3×3 convolution, every 3×3 convolution has the
  dilation of its stage, and the shortcut is a strided 1×1 convolution with a
  norm where `shortcut`, else the identity.

  Attributes:
    kind: 'basic' (two 3×3) or 'bottleneck' (1×1, 3×3, 1×1 four times as wide).
    features: channels of each of its convolutions.
    stride: of the block.
    dilation: of its 3×3 convolutions.
    shortcut: whether the shortcut is a convolution.
    norm: 'batch', 'group' or, of a network made for inference, 'folded'.
    dtype: of the computation.
    implementation: of the convolutions, 'lax', 'folded', 'mixed' or 'matmul'.
    gathers: convolutions that read some of the channels before them: (name, which).
  """

  kind: str
  features: tuple[int, ...]
  stride: int
  dilation: int
  shortcut: bool
  norm: str
  dtype: DTypeLike
  implementation: str
  gathers: tuple[tuple[str, tuple[int, ...]], ...] = ()

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (B, H, W, I) to (B, ⌈H/stride⌉, ⌈W/stride⌉, O)."""
    conv = functools.partial(Conv, dtype=self.dtype, implementation=self.implementation)
    norm = norm_layer(self.norm, self.dtype)
    spatial = functools.partial(conv, dilation=self.dilation)
    read = lambda name, x: _gather(x, dict(self.gathers).get(name))
    if self.kind == 'basic':
      first, last = self.features
      y = spatial(first, stride=self.stride, name='conv1')(read('conv1', x))
      y = nn.relu(norm(name='norm1')(y, train))
      y = spatial(last, name='conv2')(read('conv2', y))
      y = norm(name='norm2')(y, train)
    else:
      first, middle, last = self.features
      y = conv(first, size=1, name='conv1')(read('conv1', x))
      y = nn.relu(norm(name='norm1')(y, train))
      y = spatial(middle, stride=self.stride, name='conv2')(read('conv2', y))
      y = nn.relu(norm(name='norm2')(y, train))
      y = conv(last, size=1, name='conv3')(read('conv3', y))
      y = norm(name='norm3')(y, train)
    if self.shortcut:
      x = read('shortcut_conv', x)
      x = conv(last, size=1, stride=self.stride, name='shortcut_conv')(x)
      x = norm(name='shortcut_norm')(x, train)
    return nn.relu(x + y)


def _gather(x: jax.Array, channels: tuple[int, ...] | None) -> jax.Array:
  return x if channels is None else jnp.take(x, jnp.array(channels), axis=-1)


class ResNet(nn.Module):
  """ResNet-D with dilated late stages and output stride 8.

  Stem of three 3×3 convolutions (stride 2, then 1, 1; 64, 64, 128 channels)
  and a 3×3 max-pool of stride 2; four stages of 64, 128, 256 and 512 channels
  with strides 1, 2, 1, 1 and dilations 1, 1, 2, 4. As in "Less is More", arXiv
  2308.12114 (the stem of He et al., arXiv 1812.01187, without the average pool
  in its shortcuts).

  Parameters are named stem_conv1, stem_norm1, …, layer1_0/conv1,
  layer1_0/norm1, …, layer1_0/shortcut_conv, layer1_0/shortcut_norm, ….

  Attributes:
    kind: of the blocks, 'basic' or 'bottleneck'.
    blocks: number of blocks in each of the four stages.
    width: multiplier of all widths, rounded to multiples of 4.
    norm: 'batch', 'group' or, of a network made for inference, 'folded'.
    dtype: of the computation; parameters and norm statistics are float32.
    implementation: of the convolutions, 'lax', 'folded', 'mixed' or 'matmul'.
    shape: what `msp.compact` has left of it.
  """

  kind: str = 'bottleneck'
  blocks: tuple[int, int, int, int] = DEPTHS[50][1]
  width: float = 1.0
  norm: str = 'batch'
  dtype: DTypeLike = jnp.float32
  implementation: str = 'lax'
  shape: Shape = WHOLE

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps images to features.

    Args:
      x: (B, H, W, 3) images.
      train: normalise by the batch, not by the running statistics.

    Returns:
      (B, ⌈H/8⌉, ⌈W/8⌉, C) features of `dtype`, C = 512 · width, times 4 with
      bottleneck blocks.
    """
    conv = functools.partial(Conv, dtype=self.dtype, implementation=self.implementation)
    norm = norm_layer(self.norm, self.dtype)
    widths, gathers = dict(self.shape.widths), dict(self.shape.gathers)
    for i, (channels, stride) in enumerate(((64, 2), (64, 1), (128, 1)), 1):
      features = widths.get(f'stem_conv{i}', scaled(channels, self.width))
      x = _gather(x, gathers.get(f'stem_conv{i}'))
      x = conv(features, stride=stride, name=f'stem_conv{i}')(x)
      x = nn.relu(norm(name=f'stem_norm{i}')(x, train))
    x = max_pool(x, window=3, padding=1)
    for stage in range(4):
      features = scaled(_STAGE_WIDTHS[stage], self.width)
      total = widths.get(f'layer{stage + 1}/sum', features * EXPANSION[self.kind])
      for i in range(self.blocks[stage]):
        name = f'layer{stage + 1}_{i}'
        inside = ('conv1',) if self.kind == 'basic' else ('conv1', 'conv2')
        x = Block(
          kind=self.kind,
          features=(*(widths.get(f'{name}/{c}', features) for c in inside), total),
          stride=_STAGE_STRIDES[stage] if i == 0 else 1,
          dilation=_STAGE_DILATIONS[stage],
          shortcut=i == 0,
          norm=self.norm,
          dtype=self.dtype,
          implementation=self.implementation,
          gathers=tuple(
            (path.removeprefix(f'{name}/'), channels)
            for path, channels in self.shape.gathers
            if path.startswith(f'{name}/')
          ),
          name=name,
        )(x, train)
    return x


def streams(kind: str, blocks: tuple[int, int, int, int]) -> list[Stream]:
  """The streams of a ResNet, in the order of the network; paths as in its parameters.

  Args:
    kind: of the blocks, 'basic' or 'bottleneck'.
    blocks: number of blocks in each stage.

  Returns:
    Three streams of the stem, then of each stage those inside its blocks and the sum
    of its blocks. The last one is what heads read.
  """
  inside = 1 if kind == 'basic' else 2
  found = [
    Stream(f'stem_conv{i}', (f'stem_conv{i}',), (f'stem_norm{i}',), readers)
    for i, readers in ((1, ('stem_conv2',)), (2, ('stem_conv3',)), (3, ()))
  ]
  for stage, count in enumerate(blocks, 1):
    layers = [f'layer{stage}_{i}' for i in range(count)]
    entrance = (f'{layers[0]}/conv1', f'{layers[0]}/shortcut_conv')
    found[-1] = found[-1]._replace(readers=found[-1].readers + entrance)
    for layer in layers:
      for i in range(1, inside + 1):
        conv = f'{layer}/conv{i}'
        found.append(
          Stream(conv, (conv,), (f'{layer}/norm{i}',), (f'{layer}/conv{i + 1}',))
        )
    found.append(
      Stream(
        f'layer{stage}/sum',
        (f'{layers[0]}/shortcut_conv', *(f'{x}/conv{inside + 1}' for x in layers)),
        (f'{layers[0]}/shortcut_norm', *(f'{x}/norm{inside + 1}' for x in layers)),
        tuple(f'{x}/conv1' for x in layers[1:]),
      )
    )
  return found
