"""Proximal operators: pure functions of arrays.

Each solves, for every group g of the kernel x along `axis` (None: every single
weight), the problem its docstring states; `threshold` = step size · λ · √n_g.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.errors import UserError


def group_lasso(
  x: jax.Array, threshold: jax.Array | float, axis: int | None
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_g t_g ‖z_g‖₂.

  z_g = x_g · max(0, 1 − t_g/‖x_g‖). Dead groups are exactly 0; at t = 0 the
  result is x to the bit. Every derivative is finite, also at a zero group.

  Args:
    x: kernel, shape (..., in, out), float.
    threshold: t ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.

  Returns:
    z, shape and dtype of x.
  """
  norm = gr.expand(gr.norms(x, axis), x, axis)
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  survives = norm > t
  scale = jnp.where(survives, 1 - t / jnp.where(survives, norm, 1), 0)
  # At t = 0 a zero group is not dead but untouched: derivative 1, not 0.
  return jnp.where(t > 0, x * scale, x)


def l1(
  x: jax.Array, threshold: jax.Array | float, axis: int | None = None
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_i t_i |z_i|: soft thresholding of single weights.

  Args:
    x: array of any shape, float.
    threshold: t ≥ 0, shape (), one for each group along `axis`, or x.shape.
    axis: only says how a vector of thresholds is laid out.

  Returns:
    z, shape and dtype of x.
  """
  t = jnp.asarray(threshold, x.dtype)
  t = gr.expand(t, x, axis if t.ndim == 1 else None)
  shrunk = jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0)
  return jnp.where(t > 0, shrunk, x)


def l1_weighted(
  x: jax.Array,
  metric: jax.Array,
  threshold: jax.Array | float,
  axis: int | None = None,
) -> jax.Array:
  """argmin_z ½(z − x)ᵀD(z − x) + Σ_i t_i |z_i|, D = diag(metric) > 0."""
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  return l1(x, jnp.broadcast_to(t, x.shape) / metric)


def group_lasso_weighted(
  x: jax.Array,
  metric: jax.Array,
  threshold: jax.Array | float,
  axis: int | None,
) -> jax.Array:
  """argmin_z ½(z − x)ᵀD(z − x) + Σ_g t_g ‖z_g‖₂, D = diag(metric).

  z_g = 0 iff ‖D x_g‖ ≤ t_g; otherwise z_i = x_i d_iϑ/(d_iϑ + t) with ϑ = ‖z_g‖
  the root of Σ x_i²/(ϑ + t/d_i)² = 1. The root's derivatives in x, D and t come
  from the implicit function theorem. (Deleu & Bengio, arXiv 2102.03869.)

  Args:
    x: kernel, shape (..., in, out), float.
    metric: d > 0, shape and dtype of x.
    threshold: t ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.

  Returns:
    z, shape and dtype of x.
  """
  if axis is None:
    return l1_weighted(x, metric, threshold)
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  t = jnp.broadcast_to(
    t, [n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape)]
  )
  scaled = gr.expand(gr.norms(metric * x, axis), x, axis)
  survives = (scaled > t) & (t > 0)
  # Groups without a root get one that is easy: x = d = 1, t = 0, so ϑ = √n.
  safe_x = jnp.where(survives, x, 1)
  safe_d = jnp.where(survives, metric, 1)
  safe_t = jnp.where(survives, t, 0)
  root = _root(gr.other_axes(x, axis), safe_x, safe_d, safe_t)
  z = safe_x * safe_d * root / (safe_d * root + safe_t)
  return jnp.where(t > 0, jnp.where(survives, z, 0), x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root(axes: tuple[int, ...], x, d, t) -> jax.Array:
  """ϑ > 0 with S(ϑ) = Σ (x d)²/(d ϑ + t)² = 1, one for each group.

  Newton's method on S^(−1/2), which is concave and nearly linear in ϑ: from the
  left of the root the iterates rise to it monotonically, in 3 to 6 steps. The
  start is the best of two lower bounds, by Jensen and by the largest d.
  """
  squares = jnp.square(x)
  norm2 = jnp.sum(squares, axes, keepdims=True)
  jensen = jnp.sqrt(norm2) - t * jnp.sum(squares / d, axes, keepdims=True) / (norm2)
  largest = jnp.max(d, axes, keepdims=True)
  scaled = jnp.sqrt(jnp.sum(squares * jnp.square(d), axes, keepdims=True))
  start = jnp.maximum(jensen, (scaled - t) / largest)
  tolerance = 16 * jnp.finfo(x.dtype).eps

  def unfinished(carry):
    i, _, change = carry
    # The bound ends the loop where rounding keeps the last digit moving.
    return (i < 30) & (change > tolerance)

  def newton(carry):
    i, root, _ = carry
    r = d / (d * root + t)
    q = squares * jnp.square(r)
    s = jnp.sum(q, axes, keepdims=True)
    step = (s * jnp.sqrt(s) - s) / jnp.sum(q * r, axes, keepdims=True)
    return i + 1, root + step, jnp.max(jnp.abs(step) / root)

  # A start from rounding noise below 0 would leave the branch of the root.
  start = jnp.maximum(start, tolerance * jnp.sqrt(norm2))
  infinite = jnp.asarray(jnp.inf, x.dtype)
  return jax.lax.while_loop(unfinished, newton, (0, start, infinite))[1]


@_root.defjvp
def _(axes, primals, tangents):
  x, d, t = primals
  dx, dd, dt = tangents
  theta = _root(axes, x, d, t)
  # F = ½ Σ q² − ½ = 0 with q = x d/m, m = d ϑ + t, so ϑ' = −(F_x x' + F_d d' +
  # F_t t')/F_ϑ. Written without 1/d, which overflows where d is tiny.
  m = d * theta + t
  q = x * d / m
  change = q * ((d * dx + x * t * dd / m) / m - q * dt / m)
  return theta, (
    jnp.sum(change, axes, keepdims=True) / jnp.sum(q * q * d / m, axes, keepdims=True)
  )


class Penalty(NamedTuple):
  """A penalty by its two proximal operators.

  Attributes:
    prox: (x, threshold, axis) -> z in the Euclidean metric.
    prox_weighted: (x, metric, threshold, axis) -> z in the metric diag(metric).
    grouped: whether the threshold carries √n_g, or each weight stands alone.
  """

  prox: Callable[..., jax.Array]
  prox_weighted: Callable[..., jax.Array]
  grouped: bool


PENALTIES = {
  'group_lasso': Penalty(group_lasso, group_lasso_weighted, True),
  'l1': Penalty(l1, l1_weighted, False),
}


def get_penalty(name: str) -> Penalty:
  """Looks a penalty up by its name; UserError lists the known ones."""
  if name not in PENALTIES:
    raise UserError(f'unknown penalty {name!r}; known: {", ".join(sorted(PENALTIES))}')
  return PENALTIES[name]
