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
def test_nearest_takes_the_pixel_in_the_middle_of_a_cell(small, large):
  def middle(i, n, m):
    """The pixel nearest to where `bilinear` has pixel i; of two, the later."""
    distance = [abs(r - ((i + 0.5) * n / m - 0.5)) for r in range(n)]
    return max(r for r in range(n) if distance[r] < min(distance) + 1e-9)

  x = np.random.default_rng(1).integers(0, 256, size=(2, *large), dtype=np.int32)
  rows = [middle(i, large[0], small[0]) for i in range(small[0])]
  columns = [middle(i, large[1], small[1]) for i in range(small[1])]
  want = np.array([[[m[r, c] for c in columns] for r in rows] for m in x])
  got = resize.nearest(jnp.asarray(x), small)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == jnp.int32


def test_labels_come_down_to_where_logits_come_up_from():
  """Down and up again, a ramp is where it was, to half a pixel."""
  ramp = jnp.broadcast_to(jnp.arange(64.0)[None, :, None], (1, 64, 64))
  down = resize.nearest(ramp, (8, 8))
  up = resize.bilinear(down[..., None], (64, 64))[..., 0]
  inner = slice(4, -4)  # beyond the outermost centres there is nothing to interpolate
  np.testing.assert_allclose(up[0, inner], ramp[0, inner], atol=0.5 + 1e-5)
