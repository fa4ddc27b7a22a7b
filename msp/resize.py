"""Bringing predictions and labels to one resolution; labels never interpolated."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear interpolation with half-pixel centres, without antialiasing.

  y = A_H x A_Wᵀ for each channel: row i of A holds the two weights of source
  position (i + ½)·in/out − ½, clamped to the picture. JAX writes it as small
  matrix products in full precision, not as gathers: it exports, differentiates to
  any order and is quick on CPU.

  Args:
    x: shape (B, h, w, C), float.
    size: (H, W).

  Returns:
    y, shape (B, H, W, C), dtype of x.
  """
  shape = (x.shape[0], *size, x.shape[-1])
  scale = jnp.array([m / n for n, m in zip(x.shape[1:3], size, strict=True)])
  # Not jax.image.resize: converters to ONNX replace it, for a fixed batch only.
  return jax.image.scale_and_translate(
    x, shape, (1, 2), scale, jnp.zeros(2), 'linear', antialias=False
  )


def nearest(label: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Picks one label for each output pixel: that of row ⌊i·in/out⌋, column alike.

  The convention of the published systems (torch's `nearest`): when a map shrinks
  by a whole factor, the upper left pixel of each cell, not the centre, is taken.

  Args:
    label: shape (B, H, W, …).
    size: (h, w).

  Returns:
    Shape (B, h, w, …), dtype of label.
  """
  rows, columns = (
    np.arange(m) * n // m for n, m in zip(label.shape[1:3], size, strict=True)
  )
  return label[:, rows][:, :, columns]


def cell_max(label: jax.Array, size: tuple[int, int]) -> jax.Array:
  """The largest label in each output pixel's cell.

  Row i covers the source rows ⌊i·in/out⌋ to ⌈(i + 1)·in/out⌉ − 1. A thin edge
  stays an edge, and ignored pixels (−1) count only where a cell has no other.

  Args:
    label: shape (B, H, W).
    size: (h, w).

  Returns:
    Shape (B, h, w), dtype of label.
  """
  rows, columns = (_cells(n, m) for n, m in zip(label.shape[1:], size, strict=True))
  return label[:, rows].max(axis=2)[:, :, columns].max(axis=3)


def _cells(size_in, size_out):
  """Shape (out, longest): source positions, shorter cells repeat their last."""
  index = np.arange(size_out)
  first = index * size_in // size_out
  last = -(-(index + 1) * size_in // size_out) - 1
  steps = np.arange((last - first).max() + 1)
  return np.minimum(first[:, None] + steps[None, :], last[:, None])
