"""Task heads on the features of the backbone; both return logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from msp.models.convolution import Conv, kernel_init, max_pool, uniform_bias
from msp.models.normalization import norm_layer

_ATROUS_RATES = (12, 24, 36)
# Of a classification head: a handful of ReLUs without a norm soon die all together, and
# every image gets the same answer.
_MIN_UNITS = 16


# Kernels that read the features.
READERS = {
  'dense': (
    'point_conv',
    *(f'atrous{rate}_conv' for rate in _ATROUS_RATES),
    'pool_conv',
  ),
  'classification': ('conv',),
}


class DenseHead(nn.Module):
  """DeepLab-v3 head: atrous spatial pyramid pooling, one output per pixel.

  Five branches (1×1; 3×3 at rates 12, 24, 36; global average) are concatenated,
  projected by a 1×1, filtered by a 3×3 (all with norm and ReLU) and mapped to
  the outputs by a 1×1 with bias. Dropout follows the 1×1 branch and the
  projection. Chen et al., arXiv 1706.05587, as used by arXiv 2308.12114.

  Attributes:
    outputs: channels of the result.
    features: channels of each branch.
    dropout: multiplier of the dropout rates (0.3); 0 switches dropout off.
    norm: 'batch', 'group' or, of a network made for inference, 'folded'.
    dtype: of the computation; the last layer computes in float32 at least.
    implementation: of the convolutions, 'lax', 'folded', 'mixed' or 'matmul'.
  """

  outputs: int
  features: int = 256
  dropout: float = 1.0
  norm: str = 'batch'
  dtype: DTypeLike = jnp.float32
  implementation: str = 'lax'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps features (B, h, w, C) to logits, float32 at least, (B, h, w, outputs)."""
    norm = norm_layer(self.norm, self.dtype)

    def layer(x, name, size=1, dilation=1):
      x = Conv(
        self.features,
        size=size,
        dilation=dilation,
        dtype=self.dtype,
        implementation=self.implementation,
        name=f'{name}_conv',
      )(x)
      return nn.relu(norm(name=f'{name}_norm')(x, train))

    drop = functools.partial(nn.Dropout, 0.3 * self.dropout, deterministic=not train)
    branches = [drop(name='point_dropout')(layer(x, 'point'))]
    for rate in _ATROUS_RATES:
      branches.append(layer(x, f'atrous{rate}', size=3, dilation=rate))
    pooled = layer(jnp.mean(x, axis=(1, 2), keepdims=True), 'pool')
    # Bilinear interpolation of a single pixel is a constant.
    branches.append(jnp.broadcast_to(pooled, branches[0].shape))
    x = layer(jnp.concatenate(branches, axis=-1), 'project')
    x = drop(name='project_dropout')(x)
    x = layer(x, 'filter', size=3)
    return Conv(
      self.outputs,
      size=1,
      bias=True,
      dtype=jnp.promote_types(self.dtype, jnp.float32),
      implementation=self.implementation,
      name='logits',
    )(x)


class ClassificationHead(nn.Module):
  """One output per image: 3×3 convolution, pooling and three dense layers.

  3×3 to features/4, ReLU, max-pool 2, global average, dropout 0.6, dense to
  features/8, ReLU, dropout 0.4, dense to the outputs. The network of arXiv
  2308.12114 without its sigmoid: losses take logits. Both layers have at least 16
  units.

  Attributes:
    outputs: length of the result.
    features: four times the channels of the convolution.
    dropout: multiplier of the dropout rates; 0 switches dropout off.
    dtype: of the convolution; the dense layers compute in float32.
    implementation: of the convolution, 'lax', 'folded', 'mixed' or 'matmul'.
  """

  outputs: int
  features: int = 256
  dropout: float = 1.0
  dtype: DTypeLike = jnp.float32
  implementation: str = 'lax'

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps features (B, h, w, C) to logits, float32 at least, (B, outputs)."""
    x = Conv(
      max(self.features // 4, _MIN_UNITS),
      bias=True,
      dtype=self.dtype,
      implementation=self.implementation,
      name='conv',
    )(x)
    x = max_pool(nn.relu(x), window=2, padding=0)
    x = jnp.mean(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (1, 2))
    x = nn.Dropout(0.6 * self.dropout, deterministic=not train)(x)
    hidden = _dense(max(self.features // 8, _MIN_UNITS), x.shape[-1], 'hidden')
    x = nn.relu(hidden(x))
    x = nn.Dropout(0.4 * self.dropout, deterministic=not train)(x)
    return _dense(self.outputs, x.shape[-1], 'logits')(x)


def _dense(features: int, fan_in: int, name: str) -> nn.Dense:
  return nn.Dense(
    features,
    kernel_init=kernel_init,
    bias_init=uniform_bias(fan_in),
    name=name,
  )
