"""Convolution and pooling with explicit symmetric padding, in several forms.

XLA's CPU backend runs a convolution inside the body of a `lax.scan` 7 to 35
times slower than outside of it (`benchmarks/convolution.py` measures it), and
in a branch of a `lax.cond` several times slower; a matrix product does not
suffer. The heads run under `lax.cond`, inner loops may run under `lax.scan`, so
on CPU every convolution is written as matrix products unless told otherwise.
Outside of loops XLA's narrow 3×3 convolutions are the faster ones there, but the
gradients of 1×1 and of wide ones are not, by up to 7 times: 'mixed'. On a GPU 1×1
convolutions are products and the picture is folded before dilated ones: 'folded'.
"""

import functools
import itertools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from msp.errors import UserError

IMPLEMENTATIONS = ('auto', 'lax', 'folded', 'mixed', 'matmul')

# Below this share of multiplications inside the picture the separate products
# beat one dense product that multiplies zero padding.
_DENSE_COVERAGE = 0.6
# With more channels than this on both sides, one tap is a large enough product
# by itself, and moving nine shifted copies around only costs memory traffic.
_NARROW = 64


def resolve(implementation: str) -> str:
  """Returns the form of convolution to build a model with.

  Args:
    implementation: one of `IMPLEMENTATIONS`; 'auto' is 'matmul' on CPU, 'folded' on a
      GPU and 'lax' elsewhere.

  Returns:
    One of them that is not 'auto'.

  Raises:
    UserError: for any other name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'unknown convolution implementation {implementation!r}: choose one of '
      f'{", ".join(IMPLEMENTATIONS)}'
    )
  if implementation == 'auto':
    return {'cpu': 'matmul', 'gpu': 'folded'}.get(jax.default_backend(), 'lax')
  return implementation


def conv(
  x: jax.Array,
  kernel: jax.Array,
  *,
  stride: int = 1,
  dilation: int = 1,
  implementation: str,
) -> jax.Array:
  """Two-dimensional convolution, zero padding dilation·(k − 1)/2 on each side.

      y[b, i, j] = Σ_{u, v} x[b, s·i + d·(u − c_h), s·j + d·(v − c_w)] K[u, v]

  with c = (k − 1)/2 and x zero outside of the picture: PyTorch's convolution
  with `padding = dilation` for k = 3. The output has ⌈H/s⌉ × ⌈W/s⌉ pixels.
  Every form computes this sum, up to the order of the additions. Where most of
  the taps miss the picture (atrous pyramid pooling, rates near the size of the
  picture) only those that touch it are computed, by any implementation.

  Args:
    x: (B, H, W, I) picture.
    kernel: (kh, kw, I, O), kh and kw odd, of the dtype of x.
    stride: s ≥ 1.
    dilation: d ≥ 1.
    implementation: 'lax' (`lax.conv_general_dilated`), 'folded' (that, without
      dilation where the stride is 1, and products for 1×1 kernels), 'matmul' (matrix
      products over shifted pictures) or 'mixed' (products for 1×1 and wide kernels,
      else 'lax').

  Returns:
    (B, ⌈H/s⌉, ⌈W/s⌉, O), dtype of x.
  """
  if implementation not in IMPLEMENTATIONS[1:]:
    raise ValueError(f'implementation is {implementation!r}, not one of those of conv')
  kh, kw, channels, features = kernel.shape
  if _coverage(x.shape[1:3], (kh, kw), stride, dilation) < _DENSE_COVERAGE:
    return tap_conv(x, kernel, stride, dilation)
  if implementation == 'folded':
    if kh * kw * stride == 1:
      return _matmul(x, kernel[0, 0])
    return fold_conv(x, kernel, stride, dilation)
  small = kh * kw > 1 and min(channels, features) <= _NARROW
  if implementation == 'lax' or (implementation == 'mixed' and small):
    return lax_conv(x, kernel, stride, dilation)
  if small:
    if features < channels and stride == 1:
      return shift_conv(x, kernel, stride, dilation)
    if channels <= _NARROW:
      return patch_conv(x, kernel, stride, dilation)
  return tap_conv(x, kernel, stride, dilation)


def lax_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
  """`conv` by `lax.conv_general_dilated`."""
  pad_h, pad_w = (dilation * (k // 2) for k in kernel.shape[:2])
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=((pad_h, pad_h), (pad_w, pad_w)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def fold_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
  """`conv` by one without dilation, on d² pictures of every d-th pixel each.

  A weight gradient of a dilated convolution is a convolution with a stride, for which
  cuDNN has no kernel of its own; that of one without dilation has.
  """
  if dilation == 1 or stride > 1:
    return lax_conv(x, kernel, stride, dilation)
  batch, height, width, channels = x.shape
  rows, columns = (math.ceil(n / dilation) for n in (height, width))
  below, right = rows * dilation - height, columns * dilation - width
  x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
  x = x.reshape(batch, rows, dilation, columns, dilation, channels)
  x = x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)
  y = lax_conv(x, kernel, 1, 1)
  y = y.reshape(batch, dilation, dilation, rows, columns, -1)
  y = y.transpose(0, 3, 1, 4, 2, 5).reshape(
    batch, rows * dilation, columns * dilation, -1
  )
  return y[:, :height, :width]


def patch_conv(
  x: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> jax.Array:
  """`conv` by one product with the shifted pictures side by side as channels.

  Moves kh·kw·I values per pixel: for few input channels.
  """
  kh, kw, channels, features = kernel.shape
  shifted = _shifts(x, (kh, kw), stride, dilation)
  matrix = kernel.reshape(kh * kw * channels, features)
  return _matmul(jnp.concatenate(shifted, axis=-1), matrix)


def shift_conv(
  x: jax.Array, kernel: jax.Array, stride: int, dilation: int
) -> jax.Array:
  """`conv` by one product with all taps, whose results are shifted and added.

  Moves kh·kw·O values per pixel: for few output channels. A stride computes
  pixels that are thrown away.
  """
  kh, kw, channels, features = kernel.shape
  matrix = jnp.moveaxis(kernel, 2, 0).reshape(channels, kh * kw * features)
  shifted = _shifts(_wide(_matmul(x, matrix)), (kh, kw), stride, dilation)
  taps = [s[..., i * features : (i + 1) * features] for i, s in enumerate(shifted)]
  return sum(taps).astype(x.dtype)


def tap_conv(x: jax.Array, kernel: jax.Array, stride: int, dilation: int) -> jax.Array:
  """`conv` by a product per tap, on the pixels it reaches and no others.

  Taps that miss the picture entirely are left out; with a dilation of at least
  the picture's side this is a 1×1 convolution.
  """
  kh, kw = kernel.shape[:2]
  height, width = (math.ceil(n / stride) for n in x.shape[1:3])
  rows = _taps(x.shape[1], kh, stride, dilation)
  columns = _taps(x.shape[2], kw, stride, dilation)
  y = 0
  for row, column in itertools.product(rows, columns):
    pixels = x[
      :,
      row.start : row.start + (row.size - 1) * stride + 1 : stride,
      column.start : column.start + (column.size - 1) * stride + 1 : stride,
    ]
    product = _wide(_matmul(pixels, kernel[row.index, column.index]))
    above, left = row.first, column.first
    below, right = height - above - row.size, width - left - column.size
    y += jnp.pad(product, ((0, 0), (above, below), (left, right), (0, 0)))
  return y.astype(x.dtype)


class _Tap(NamedTuple):
  """One kernel row (or column) and the output pixels where it sees the input.

  Output pixels first, …, first + size − 1 read input pixels start,
  start + stride, ….
  """

  index: int
  start: int
  first: int
  size: int


def _taps(length: int, kernel: int, stride: int, dilation: int) -> tuple[_Tap, ...]:
  """Returns the taps along one axis that touch an input of `length` pixels."""
  taps = []
  for index in range(kernel):
    offset = dilation * (index - kernel // 2)
    first = max(0, math.ceil(-offset / stride))
    last = min(length - 1, length - 1 - offset) // stride
    if first <= last:
      start = first * stride + offset
      taps.append(_Tap(index, start, first, last - first + 1))
  return tuple(taps)


def _coverage(
  picture: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int
) -> float:
  """Returns the share of a convolution's products that meet the picture."""
  share = 1.0
  for length, size in zip(picture, kernel, strict=True):
    taps = _taps(length, size, stride, dilation)
    share *= sum(tap.size for tap in taps) / (size * math.ceil(length / stride))
  return share


def _shifts(
  x: jax.Array, kernel: tuple[int, int], stride: int, dilation: int
) -> list[jax.Array]:
  """Returns what each tap of a kernel sees at the output pixels."""
  (height, width), (kh, kw) = x.shape[1:3], kernel
  pad_h, pad_w = dilation * (kh // 2), dilation * (kw // 2)
  x = jnp.pad(x, ((0, 0), (pad_h, pad_h), (pad_w, pad_w), (0, 0)))
  return [
    x[:, u : u + height : stride, v : v + width : stride]
    for u in range(0, kh * dilation, dilation)
    for v in range(0, kw * dilation, dilation)
  ]


def _matmul(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Multiplies the last axis of x (B, H, W, I) by a matrix (I, O)."""
  # Flattened by hand: XLA:CPU is faster with two axes, gradients included.
  return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _wide(x: jax.Array) -> jax.Array:
  """Casts half precision up: products are rounded once, their sum is not."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def max_pool(x: jax.Array, *, window: int, padding: int) -> jax.Array:
  """Maximum over windows, stride 2.

  Written as elementwise maxima, which can be differentiated to any order and
  in either mode; the derivative of `lax.reduce_window` is a scatter, slow on
  CPU. Where pixels tie, the gradient is shared among them. A picture smaller
  than the window is one window.

  Args:
    x: (B, H, W, C).
    window: side of the window in pixels.
    padding: pixels of −∞ on each side.

  Returns:
    (B, H', W', C) with H' = ⌊(H + 2·padding − window)/2⌋ + 1, as in PyTorch.
  """
  for axis in (1, 2):
    length = x.shape[axis] + 2 * padding
    side = min(window, length)
    span = (length - side) // 2 * 2 + 1
    pads = [(0, 0, 0)] * x.ndim
    pads[axis] = (padding, padding, 0)
    padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
    x = functools.reduce(
      jnp.maximum,
      (lax.slice_in_dim(padded, i, i + span, 2, axis=axis) for i in range(side)),
    )
  return x


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's initial bias: uniform in ±1/√fan_in."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


# PyTorch's initial kernel, kaiming_uniform with a = √5: variance 1/(3 fan_in).
kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Conv(nn.Module):
  """Convolution layer around `conv`, parameters initialised as in PyTorch.

  Attributes:
    features: output channels.
    size: side of the kernel, odd.
    stride: step of the window in pixels.
    dilation: distance of the taps, and the padding per (size − 1)/2.
    bias: whether a bias is added.
    dtype: of the computation; the parameters are float32.
    implementation: 'lax', 'folded', 'mixed' or 'matmul'.
  """

  features: int
  size: int = 3
  stride: int = 1
  dilation: int = 1
  bias: bool = False
  dtype: DTypeLike = jnp.float32
  implementation: str = 'lax'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (B, H, W, I) to (B, ⌈H/stride⌉, ⌈W/stride⌉, features)."""
    channels = x.shape[-1]
    shape = (self.size, self.size, channels, self.features)
    kernel = self.param('kernel', kernel_init, shape)
    y = conv(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      stride=self.stride,
      dilation=self.dilation,
      implementation=self.implementation,
    )
    if self.bias:
      init = uniform_bias(self.size**2 * channels)
      bias = self.param('bias', init, (self.features,))
      y += bias.astype(self.dtype).reshape(1, 1, 1, -1)
    return y
