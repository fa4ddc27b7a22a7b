"""Proximal operators: pure functions of arrays.

Each solves, for every group g of the kernel x along `axis` (None: every single
weight), the problem its docstring states. `threshold` is step size · λ · √n_g, that of
single weights step size · λ.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.errors import UserError

PyTree = Any

_STEPS = 10  # of Newton's method, see `_roots`


def group_lasso(
  x: jax.Array, threshold: jax.Array | float, axis: int | None
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_g t_g ‖z_g‖₂.

  z_g = x_g · max(0, 1 − t_g/‖x_g‖). Dead groups are exactly 0; at t = 0 the
  result is x to the bit, and its derivative in t that from above. Every derivative is
  finite, also at a zero group.

  Args:
    x: kernel, shape (..., in, out), float.
    threshold: t ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.

  Returns:
    z, shape and dtype of x.
  """
  norm = gr.expand(gr.norms(x, axis), x, axis)
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  survives = ~(norm <= t)  # a t that is NaN has to be seen
  scale = jnp.where(survives, 1 - t / jnp.where(survives, norm, 1), 0)
  # At t = 0 a zero group is not dead but untouched: derivative 1, not 0.
  return jnp.where((t > 0) | survives, x * scale, x)


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
  return jnp.where((t > 0) | (x != 0), shrunk, x)


def l1_weighted(
  x: jax.Array,
  metric: jax.Array,
  threshold: jax.Array | float,
  axis: int | None = None,
) -> jax.Array:
  """argmin_z ½(z − x)ᵀD(z − x) + Σ_i t_i |z_i|, D = diag(metric) > 0.

  z_i = 0 iff |d_i x_i| ≤ t_i, else x_i − t_i/d_i · sign x_i. Args as of `l1`; metric
  has the shape of x.
  """
  x_, d, t = map(_wide, (x, metric, threshold))
  t = gr.expand(t, x, axis if t.ndim == 1 else None)
  survives = ~(jnp.abs(x_) * d <= t)
  # Where it does not, t/d may be infinite and its derivative NaN.
  ratio = jnp.where(survives, t, 0) / jnp.where(survives, d, 1)
  z = jnp.sign(x_) * jnp.maximum(jnp.abs(x_) - ratio, 0)
  return jnp.where(survives, z, jnp.where(t > 0, 0, x_)).astype(x.dtype)


def group_lasso_weighted(
  x: PyTree, metric: PyTree, threshold: PyTree, axis: int | None
) -> PyTree:
  """argmin_z ½(z − x)ᵀD(z − x) + Σ_g t_g ‖z_g‖₂, D = diag(metric).

  z_g = 0 iff ‖D x_g‖ ≤ t_g; otherwise z_i = x_i d_iϑ/(d_iϑ + t) with ϑ = ‖z_g‖
  the root of Σ x_i²/(ϑ + t/d_i)² = 1. The root's derivatives in x, D and t come
  from the implicit function theorem. (Deleu & Bengio, arXiv 2102.03869.) On an
  accelerator the kernels of a tree share one iteration; on CPU loops of their own end
  sooner and hold less.

  Args:
    x: kernel, shape (..., in, out), float, or a tree of kernels.
    metric: d > 0, shape and dtype of x.
    threshold: t ≥ 0, shape () or one for each group; for a tree of kernels a tree of
      those.
    axis: the axis that counts groups, or None for single weights.

  Returns:
    z, shape and dtype of x.
  """
  if axis is None:
    return jax.tree.map(l1_weighted, x, metric, threshold)
  kernels, tree = jax.tree.flatten(x)
  if not kernels:
    return x
  metrics, thresholds = map(tree.flatten_up_to, (metric, threshold))
  # Squares of half precision overflow and vanish, and its last digit is no tolerance.
  problems = [
    tuple(map(_wide, p)) for p in zip(kernels, metrics, thresholds, strict=True)
  ]
  if jax.default_backend() == 'cpu':
    solved = [_group_lasso_weighted([p], axis)[0] for p in problems]
  else:
    solved = _group_lasso_weighted(problems, axis)
  return tree.unflatten(z.astype(x.dtype) for z, x in zip(solved, kernels, strict=True))


def _group_lasso_weighted(problems, axis):
  """The prox of kernels that share one iteration; problems: (x, d, threshold) each."""
  kernels = [x for x, _, _ in problems]
  t, survives, *safe = zip(*(_with_root(*p, axis) for p in problems), strict=True)
  roots = _roots(tuple(gr.other_axes(x, axis) for x in kernels), *safe)

  def finish(x, t, survives, safe_x, safe_d, safe_t, root):
    z = safe_x * safe_d * root / (safe_d * root + safe_t)
    # Untouched at t = 0, but not without a derivative in t.
    stop = jax.lax.stop_gradient
    z = jnp.where(~(t <= 0), z, stop(x) + (z - stop(z)))
    # Not a number stays one: a 0 would pass for a dead group.
    return jnp.where(survives, z, jnp.where((t > 0) & (x == x), 0, x))

  return list(map(finish, kernels, t, survives, *safe, roots))


def _with_root(x, d, threshold, axis):
  """t, which groups survive, and x, d and t with a root in every group."""
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  t = jnp.broadcast_to(
    t, [n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape)]
  )
  scaled = gr.expand(gr.norms(d * x, axis), x, axis)
  # A group whose squares underflow has no root that can be found.
  survives = ~(scaled <= t) & (gr.expand(gr.norms(x, axis), x, axis) > 0)
  # Groups without a root get one that is easy: x = d = 1, t = 0, so ϑ = √n.
  safe = (jnp.where(survives, *pair) for pair in ((x, 1), (d, 1), (t, 0)))
  return t, survives, *safe


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _roots(axes: tuple[tuple[int, ...], ...], x, d, t) -> tuple[jax.Array, ...]:
  """ϑ > 0 with S(ϑ) = Σ (x d)²/(d ϑ + t)² = 1, one for each group of each kernel.

  Newton's method on S^(−1/2), which is concave and nearly linear in ϑ: from the
  left of the root the iterates rise to it monotonically. The start is the best of two
  lower bounds, by Jensen and by the largest d. Where x and d are independent six steps
  find the root to 2e-9 of it, d over eight decades; with x as 1/d, where it takes most,
  ten leave 1e-11 of ‖x‖.
  """
  tolerance = lambda x: 16 * jnp.finfo(x.dtype).eps

  def begin(axes, squares, d, t):
    norm2 = jnp.sum(squares, axes, keepdims=True)
    jensen = jnp.sqrt(norm2) - t * jnp.sum(squares / d, axes, keepdims=True) / norm2
    largest = jnp.max(d, axes, keepdims=True)
    scaled = jnp.sqrt(jnp.sum(squares * jnp.square(d), axes, keepdims=True))
    start = jnp.maximum(jensen, (scaled - t) / largest)
    # A start from rounding noise below 0 would leave the branch of the root.
    return jnp.maximum(start, tolerance(d) * jnp.sqrt(norm2))

  def newton(axes, squares, d, t, root):
    r = d / (d * root + t)
    q = squares * jnp.square(r)
    s = jnp.sum(q, axes, keepdims=True)
    step = (s * jnp.sqrt(s) - s) / jnp.sum(q * r, axes, keepdims=True)
    # From beyond a root that is next to nothing a step would lead below 0.
    return jnp.maximum(root + step, root / 8)

  squares = tuple(map(jnp.square, x))
  start = tuple(map(begin, axes, squares, d, t))
  iterate = lambda roots: tuple(map(newton, axes, squares, d, t, roots))
  if jax.default_backend() != 'cpu':
    # A condition on the roots would make the host wait for the device in every step.
    return jax.lax.fori_loop(0, _STEPS, lambda _, roots: iterate(roots), start)

  def advance(carry):
    i, roots, _ = carry
    new = iterate(roots)
    off = [
      jnp.max(jnp.abs(a - b) / (tolerance(b) * b)).astype(jnp.float32)
      for a, b in zip(new, roots, strict=True)
    ]
    return i + 1, new, jnp.max(jnp.stack(off))

  unfinished = lambda carry: (carry[0] < _STEPS) & (carry[2] > 1)
  return jax.lax.while_loop(unfinished, advance, (0, start, jnp.float32(jnp.inf)))[1]


@_roots.defjvp
def _(axes, primals, tangents):
  roots = _roots(axes, *primals)

  def slope(axes, root, x, d, t, dx, dd, dt):
    # F = ½ Σ q² − ½ = 0 with q = x d/m, m = d ϑ + t, so ϑ' = −(F_x x' + F_d d' +
    # F_t t')/F_ϑ. Written without 1/d, which overflows where d is tiny.
    m = d * root + t
    q = x * d / m
    change = q * ((d * dx + x * t * dd / m) / m - q * dt / m)
    return jnp.sum(change, axes, keepdims=True) / jnp.sum(
      q * q * d / m, axes, keepdims=True
    )

  return roots, tuple(map(slope, axes, roots, *primals, *tangents))


def sparse_group_lasso(
  x: jax.Array,
  threshold: jax.Array | float,
  axis: int | None,
  *,
  l1_threshold: jax.Array | float,
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_g t_g ‖z_g‖₂ + s ‖z‖₁.

  The composition of both: group_lasso(l1(x, s), t). (Friedman, Hastie & Tibshirani,
  arXiv 1001.0736.)

  Args:
    x: kernel, shape (..., in, out), float.
    threshold: t ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.
    l1_threshold: s ≥ 0, shape () or one for each group.

  Returns:
    z, shape and dtype of x.
  """
  return group_lasso(l1(x, l1_threshold, axis), threshold, axis)


def sparse_group_lasso_weighted(
  x: PyTree,
  metric: PyTree,
  threshold: PyTree,
  axis: int | None,
  *,
  l1_threshold: PyTree,
) -> PyTree:
  """argmin_z ½(z − x)ᵀD(z − x) + Σ_g t_g ‖z_g‖₂ + s ‖z‖₁, D = diag(metric).

  The composition holds in every diagonal metric: where |x_i| > s/d_i the optimality
  condition is that of the group lasso at x_i − s/d_i · sign x_i, elsewhere z_i = 0.
  """
  shrunk = jax.tree.map(
    lambda x, d, s: l1_weighted(x, d, s, axis), x, metric, l1_threshold
  )
  return group_lasso_weighted(shrunk, metric, threshold, axis)


def group_mcp(
  x: jax.Array,
  threshold: jax.Array | float,
  axis: int | None,
  *,
  step: jax.Array | float,
  gamma: float,
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_g α p(‖z_g‖), p the minimax concave penalty.

  p'(r) = max(w − r/γ, 0), w = t/α = λ√n_g, so with r = ‖x_g‖: z_g = 0 for r ≤ t;
  z_g = x_g (1 − t/r)/(1 − α/γ) for r ≤ γw; z_g = x_g beyond, where groups are not
  shrunk at all. One minimum needs γ > α. (Zhang, arXiv 1002.4734; groups: Huang,
  Breheny & Ma, arXiv 1204.6491.)

  Args:
    x: kernel, shape (..., in, out), float.
    threshold: t = αλ√n_g ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.
    step: α. From γ on the result is NaN.
    gamma: γ > α, in units of weights over gradients: groups above γλ√n_g are free.

  Returns:
    z, shape and dtype of x.
  """
  r = gr.expand(gr.norms(x, axis), x, axis)
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  step = _in_range(jnp.asarray(step, x.dtype), gamma)
  scale = _shrink(r, r - t) / (1 - step / gamma)
  shrunk = (t > 0) & ~(step * r > gamma * t)
  return jnp.where(shrunk | jnp.isnan(t), x * scale, x)


def group_scad(
  x: jax.Array,
  threshold: jax.Array | float,
  axis: int | None,
  *,
  step: jax.Array | float,
  a: float,
) -> jax.Array:
  """argmin_z ½‖z − x‖² + Σ_g α p(‖z_g‖), p smoothly clipped absolute deviation.

  p'(r) = w for r ≤ w, (a w − r)/(a − 1) for r ≤ a w, 0 beyond, w = t/α = λ√n_g. So
  with r = ‖x_g‖ the norm of z_g is max(r − t, 0) for r ≤ w + t,
  ((a − 1) r − a t)/(a − 1 − α) for r ≤ a w, and r beyond. One minimum needs
  a > 1 + α. (Fan & Li 2001.)

  Args:
    x: kernel, shape (..., in, out), float.
    threshold: t = αλ√n_g ≥ 0, shape () or one for each group.
    axis: the axis that counts groups, or None for single weights.
    step: α. From a − 1 on the result is NaN.
    a: knot in units of w, > 1 + α.

  Returns:
    z, shape and dtype of x.
  """
  r = gr.expand(gr.norms(x, axis), x, axis)
  t = gr.expand(jnp.asarray(threshold, x.dtype), x, axis)
  step = _in_range(jnp.asarray(step, x.dtype), a - 1)
  middle = ((a - 1) * r - a * t) / (a - 1 - step)
  norm = jnp.where(step * r <= t * (1 + step), r - t, middle)
  shrunk = (t > 0) & ~(step * r > a * t)
  return jnp.where(shrunk | jnp.isnan(t), x * _shrink(r, norm), x)


def _in_range(step, bound):
  """α; NaN where the problem has several minima, so that it is seen at once."""
  return jnp.where(step < bound, step, jnp.nan)


def _wide(a):
  """In float32 at least."""
  return jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32))


def _shrink(r, norm):
  """max(norm, 0)/r with finite derivatives where a group dies; NaN of a NaN."""
  survives = ~(norm <= 0)
  return jnp.where(survives, norm / jnp.where(survives, r, 1), 0)


class Penalty(NamedTuple):
  """A penalty R by its two proximal operators, with step α and coefficient λ.

  Attributes:
    prox: (x, α, λ, axis) -> z in the Euclidean metric. x is a kernel or, on an
      accelerator, a matrix whose rows are the groups of several kernels (axis 0); λ has
      shape () or is one for each group.
    prox_weighted: (x, metric, α, λ, axis) -> z in the metric diag(metric), for a
      kernel or for trees of kernels, metrics and coefficients. The
      concave penalties are replaced by their tangent at ‖x_g‖, which lies above them
      (local linear approximation, Zou & Li, arXiv 0808.1012): in a metric their own
      problem has several minima wherever d < α/γ.
    max_step: `prox` has one minimum for every α below it.
  """

  prox: Callable[..., jax.Array]
  prox_weighted: Callable[..., PyTree]
  max_step: float = math.inf


def _root_size(x, axis):
  return math.sqrt(gr.size(x, axis))


def _group_lasso() -> Penalty:
  return Penalty(
    lambda x, step, lam, axis: group_lasso(x, step * lam * _root_size(x, axis), axis),
    lambda x, d, step, lam, axis: group_lasso_weighted(
      x,
      d,
      jax.tree.map(lambda x, lam: step * lam * _root_size(x, axis), x, lam),
      axis,
    ),
  )


def _l1() -> Penalty:
  return Penalty(
    lambda x, step, lam, axis: l1(x, step * lam, axis),
    lambda x, d, step, lam, axis: jax.tree.map(
      lambda x, d, lam: l1_weighted(x, d, step * lam, axis), x, d, lam
    ),
  )


def _sparse_group_lasso(mix: float = 0.5) -> Penalty:
  if not 0 <= mix <= 1:
    raise UserError(f'sparse_group_lasso: mix is {mix}, the share of l1; give 0 to 1')

  def thresholds(x, step, lam, axis):
    t = lambda x, lam: (1 - mix) * step * lam * _root_size(x, axis)
    return {
      'threshold': jax.tree.map(t, x, lam),
      'axis': axis,
      'l1_threshold': jax.tree.map(lambda lam: mix * step * lam, lam),
    }

  return Penalty(
    lambda x, *rest: sparse_group_lasso(x, **thresholds(x, *rest)),
    lambda x, d, *rest: sparse_group_lasso_weighted(x, d, **thresholds(x, *rest)),
  )


def _concave(prox, slope, max_step) -> Penalty:
  """A concave penalty from its prox and p'(r) as (r, w) -> slope."""

  def plain(x, step, lam, axis):
    return prox(x, step * lam * _root_size(x, axis), axis, step=step)

  def weighted(x, d, step, lam, axis):
    def threshold(x, lam):
      return step * slope(gr.norms(x, axis), lam * _root_size(x, axis))

    return group_lasso_weighted(x, d, jax.tree.map(threshold, x, lam), axis)

  return Penalty(plain, weighted, max_step)


def _group_mcp(gamma: float = 30.0) -> Penalty:
  if not gamma > 0:
    raise UserError(f'group_mcp: gamma is {gamma}; it has to be above 0')
  return _concave(
    functools.partial(group_mcp, gamma=gamma),
    lambda r, w: jnp.maximum(w - r / gamma, 0),
    gamma,
  )


def _group_scad(a: float = 30.0) -> Penalty:
  if not a > 1:
    raise UserError(f'group_scad: a is {a}; it has to be above 1')
  return _concave(
    functools.partial(group_scad, a=a),
    lambda r, w: jnp.clip((a * w - r) / (a - 1), 0, w),
    a - 1,
  )


PENALTIES: dict[str, Callable[..., Penalty]] = {
  'group_lasso': _group_lasso,
  'l1': _l1,
  'sparse_group_lasso': _sparse_group_lasso,
  'group_mcp': _group_mcp,
  'group_scad': _group_scad,
}


def get_penalty(name: str, **options: float) -> Penalty:
  """Looks a penalty up by its name.

  Args:
    name: a key of `PENALTIES`.
    options: `mix` of the sparse group lasso (share of l1, 0.5), `gamma` of MCP (30),
      `a` of SCAD (30). The customary 3 and 3.7 are meant for standardised designs;
      weights are larger against their gradients.

  Raises:
    UserError: unknown name or option, or one out of its range.
  """
  if name not in PENALTIES:
    raise UserError(f'unknown penalty {name!r}; known: {", ".join(sorted(PENALTIES))}')
  try:
    return PENALTIES[name](**options)
  except TypeError:
    takes = ', '.join(inspect.signature(PENALTIES[name]).parameters) or 'none'
    raise UserError(
      f'penalty {name} cannot take {", ".join(options)}; its options: {takes}'
    ) from None
