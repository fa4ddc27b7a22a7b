"""Batch and group normalisation, statistics in float32."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

NORMS = ('batch', 'group')

EPSILON = 1e-5
MOMENTUM = 0.9  # PyTorch's 0.1


class BatchNorm(nn.Module):
  """Batch normalisation with the running statistics of PyTorch.

      y = γ (x − μ)/√(σ² + 1e-5) + β

  In training μ and σ² are the mean and the (biased) variance of the batch over
  examples and pixels, and the collection `batch_stats` moves by

      mean ← 0.9 mean + 0.1 μ,   var ← 0.9 var + 0.1 σ² n/(n − 1),

  n the number of values per channel. In evaluation they take the place of μ
  and σ². No derivative flows into the running statistics.
  Ioffe and Szegedy, arXiv 1502.03167, algorithms 1 and 2.

  Attributes:
    dtype: of the result; statistics and parameters are float32.
  """

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises (B, H, W, C); `train` chooses the batch's own statistics."""
    shape = (x.shape[-1],)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape)
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    shift = lax.stop_gradient(running_mean.value)
    shifted = x - _per_channel(shift)
    if train:
      # Both sums in one pass over x, and in one exchange between devices. With a
      # running mean that is near μ the difference of squares cancels nothing.
      offset = jnp.mean(shifted, axis=(0, 1, 2))
      var = jnp.mean(shifted**2, axis=(0, 1, 2)) - offset**2
      var = jnp.maximum(var, 0)
      count = math.prod(x.shape[:-1])
      unbiased = var * (count / max(count - 1, 1))
      running_mean.value = _move(running_mean.value, shift + offset)
      running_var.value = _move(running_var.value, unbiased)
    else:
      offset, var = 0.0, lax.stop_gradient(running_var.value)
    gain = scale * lax.rsqrt(var + EPSILON)
    # γ(x − μ)/σ + β as one product and one sum: its gradient has two sums over x.
    y = shifted * _per_channel(gain) + _per_channel(bias - offset * gain)
    return y.astype(self.dtype)


def _per_channel(vector: jax.Array) -> jax.Array:
  return vector.reshape(1, 1, 1, -1)


def _move(average: jax.Array, value: jax.Array) -> jax.Array:
  moved = MOMENTUM * average + (1 - MOMENTUM) * value
  return lax.stop_gradient(moved).astype(average.dtype)


def group_count(channels: int) -> int:
  """Number of groups of a group normalisation, gcd(32, channels / 4).

  That is 32 groups where 128 divides the channels, as in Wu and He (arXiv 1803.08494),
  and at least four channels a group, so that a group still has a variance when the
  picture has shrunk to one pixel; other widths get fewer, 132 channels a single one.

  Args:
    channels: a multiple of 4, as every width of this project is.

  Returns:
    A divisor of `channels`.
  """
  return math.gcd(32, channels // 4)


class GroupNorm(nn.Module):
  """Group normalisation, `group_count` groups; no state, `train` is ignored.

  Attributes:
    dtype: of the result; statistics and parameters are float32.
  """

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises (B, H, W, C), each example by itself."""
    del train
    channels = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = group_count(channels)
    grouped = x.reshape(*x.shape[:-1], count, channels // count)
    axes = (1, 2, 4)
    mean = jnp.mean(grouped, axes, keepdims=True)
    var = jnp.mean((grouped - mean) ** 2, axes, keepdims=True)
    y = ((grouped - mean) * lax.rsqrt(var + EPSILON)).reshape(x.shape)
    return (y * _per_channel(scale) + _per_channel(bias)).astype(self.dtype)


class Folded(nn.Module):
  """What is left of a normalisation that is folded into its convolution: a bias.

  Attributes:
    dtype: of the result.
  """

  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Adds the bias to (B, H, W, C); there is nothing to train here."""
    del train
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return (x + _per_channel(bias)).astype(self.dtype)


def norm_layer(kind: str, dtype: DTypeLike) -> Callable[..., nn.Module]:
  """The constructor of 'batch', 'group' or 'folded' normalisation layers."""
  module = {'batch': BatchNorm, 'group': GroupNorm, 'folded': Folded}[kind]
  return functools.partial(module, dtype=dtype)
