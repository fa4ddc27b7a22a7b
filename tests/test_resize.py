"""Resizing against loops over pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msp import resize

SIZES = [((3, 4), (6, 8)), ((3, 5), (7, 11)), ((4, 4), (4, 4)), ((6, 5), (3, 2))]


@pytest.mark.parametrize(('small', 'large'), SIZES)
def test_bilinear_is_interpolation_at_pixel_centres(small, large):
  x = np.random.default_rng(0).normal(size=(2, *small, 3))
  want = np.empty((2, *large, 3))
  for i in range(large[0]):
    for j in range(large[1]):
      r = min(max((i + 0.5) * small[0] / large[0] - 0.5, 0), small[0] - 1)
      c = min(max((j + 0.5) * small[1] / large[1] - 0.5, 0), small[1] - 1)
      r0, c0 = int(r), int(c)
      r1, c1 = min(r0 + 1, small[0] - 1), min(c0 + 1, small[1] - 1)
      top = (1 - (c - c0)) * x[:, r0, c0] + (c - c0) * x[:, r0, c1]
      bottom = (1 - (c - c0)) * x[:, r1, c0] + (c - c0) * x[:, r1, c1]
      want[:, i, j] = (1 - (r - r0)) * top + (r - r0) * bottom
  with jax.enable_x64(True):
    got = resize.bilinear(jnp.asarray(x), large)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, atol=1e-12)
  assert resize.bilinear(jnp.asarray(x, jnp.float32), large).dtype == jnp.float32


@pytest.mark.parametrize(('small', 'large'), SIZES)
def test_nearest_takes_the_upper_left_pixel_of_a_cell(small, large):
  x = np.random.default_rng(1).integers(0, 256, size=(2, *large), dtype=np.int32)
  rows = [int(np.floor(i * large[0] / small[0])) for i in range(small[0])]
  columns = [int(np.floor(j * large[1] / small[1])) for j in range(small[1])]
  want = np.array([[[m[r, c] for c in columns] for r in rows] for m in x])
  got = resize.nearest(jnp.asarray(x), small)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32


@pytest.mark.parametrize(('small', 'large'), SIZES)
def test_cell_max_keeps_every_edge(small, large):
  rng = np.random.default_rng(2)
  x = rng.choice([-1.0, 0.0, 1.0], p=[0.5, 0.4, 0.1], size=(2, *large))
  x[0, : large[0] // 2 + 1] = -1  # whole cells to ignore
  want = np.empty((2, *small))
  for i in range(small[0]):
    rows = slice(i * large[0] // small[0], -(-(i + 1) * large[0] // small[0]))
    for j in range(small[1]):
      columns = slice(j * large[1] // small[1], -(-(j + 1) * large[1] // small[1]))
      want[:, i, j] = x[:, rows, columns].max(axis=(1, 2))
  got = resize.cell_max(jnp.asarray(x, jnp.float32), small)
  np.testing.assert_array_equal(got, want)
  assert want.min() == -1
