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
  """Picks one label for each output pixel: the one in the middle of its cell.

  That of row ⌊(i + ½)·in/out⌋, column alike: where `bilinear` has output pixel i when
  it brings logits up to the labels. (torch's `nearest`, as published, takes the upper
  left pixel; metrics at the labels' resolution would then see all of a map moved by
  half a cell.)

  Args:
    label: shape (B, H, W, …).
    size: (h, w).

  Returns:
    Shape (B, h, w, …), dtype of label.
  """
  rows, columns = (
    (2 * np.arange(m) + 1) * n // (2 * m)
    for n, m in zip(label.shape[1:3], size, strict=True)
  )
  return label[:, rows][:, :, columns]
