"""Task losses on logits and labels of one resolution, and their combination.

Every loss is the mean over valid pixels or examples, 0 when there is none (never
over all of them, so that ignored pixels do not water it down), twice
differentiable almost everywhere, and keeps the dtype of its logits.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msp.errors import UserError

IGNORE = 255
COMBINATIONS = ('sum', 'fixed', 'uncertainty')
# Metres; what a Kinect measures, so the depth of NYU-v2, ends here.
MAX_DEPTH = 10.0


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Σ_mask values / |mask|, and 0 if the mask is empty; both of one shape."""
  total = jnp.sum(jnp.where(mask, values, 0))
  return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


def count(labelled: jax.Array, valid: jax.Array) -> jax.Array:
  """How many labels a loss is the mean over, shape (), float32.

  Args:
    labelled: where there is a label, shape (B, …), bool.
    valid: which examples count, shape (B,), bool.
  """
  valid = valid.reshape(-1, *(1 for _ in labelled.shape[1:]))
  return jnp.sum(labelled & valid, dtype=jnp.float32)


def has_class(label: jax.Array) -> jax.Array:
  """Where a class or an attribute is known; shape of the label."""
  return label != IGNORE


def has_edge(label: jax.Array) -> jax.Array:
  """Where it is known whether there is an edge; shape of the label."""
  return label >= 0


def has_depth(label: jax.Array) -> jax.Array:
  """Where there is a measurement; shape of the label."""
  return label > 0


def has_normal(label: jax.Array) -> jax.Array:
  """Where there is a normal, shape of the label but for its last axis."""
  # Not "some component above 0": (0, 0, −1) is a normal.
  return jnp.any(label != 0, axis=-1)


def cross_entropy(
  logits: jax.Array, label: jax.Array, valid: jax.Array, *, smoothing: float = 0.1
) -> jax.Array:
  """Label-smoothed cross entropy: (1 − ε)(−log p_y) + (ε/C) Σ_c (−log p_c).

  Args:
    logits: shape (B, h, w, C).
    label: classes 0 … C − 1, or 255 to ignore; shape (B, h, w), int32.
    valid: which examples count, shape (B,), bool.
    smoothing: ε.

  Returns:
    Mean over the pixels that are neither ignored nor of an invalid example, ().
  """
  target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
  loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(target, smoothing))
  return masked_mean(loss, has_class(label) & valid[:, None, None])


def binary_cross_entropy(
  logits: jax.Array, label: jax.Array, valid: jax.Array
) -> jax.Array:
  """−y log σ(z) − (1 − y) log σ(−z).

  Args:
    logits: z, shape (B, 1).
    label: y in {0, 1}, shape (B,), int32.
    valid: which examples count, shape (B,), bool.

  Returns:
    Mean over valid examples, ().
  """
  z = logits[:, 0]
  return masked_mean(
    optax.sigmoid_binary_cross_entropy(z, label.astype(z.dtype)), valid
  )


def huber_edges(
  logits: jax.Array, label: jax.Array, valid: jax.Array, *, delta: float = 0.2
) -> jax.Array:
  """Huber loss of e = σ(z) − y: ½e² up to |e| = δ, then δ(|e| − ½δ).

  The published edge loss (Less is More, δ = 0.2). It tends to the median of y,
  which is 0 where edges are rare; `balanced_edges` does not.

  Args:
    logits: z, shape (B, h, w, 1).
    label: y in {0, 1}, or −1 to ignore; shape (B, h, w), float.
    valid: which examples count, shape (B,), bool.
    delta: δ.

  Returns:
    Mean over valid pixels, ().
  """
  p = jax.nn.sigmoid(logits[..., 0])
  loss = optax.huber_loss(p, label.astype(p.dtype), delta=delta)
  return masked_mean(loss, has_edge(label) & valid[:, None, None])


def balanced_edges(logits: jax.Array, label: jax.Array, valid: jax.Array) -> jax.Array:
  """½ (mean over edges of −log σ(z) + mean over the rest of −log σ(−z)).

  Args: as `huber_edges`.

  Returns:
    (); a class without valid pixels contributes 0.
  """
  z = logits[..., 0]
  valid = valid[:, None, None]
  edges = masked_mean(-jax.nn.log_sigmoid(z), (label == 1) & valid)
  rest = masked_mean(-jax.nn.log_sigmoid(-z), (label == 0) & valid)
  return (edges + rest) / 2


def squared_depth(logits: jax.Array, label: jax.Array, valid: jax.Array) -> jax.Array:
  """e² with e = σ(z) − d/10 m.

  The published loss (Less is More), but on one scale for all images, where it divides
  each by its own maximum, and blind to pixels without a measurement.

  Args:
    logits: z, shape (B, h, w, 1).
    label: d, metres, 0 where there is none; shape (B, h, w), float.
    valid: which examples count, shape (B,), bool.

  Returns:
    Mean over valid pixels, ().
  """
  p, d, mask = _depths(logits, label, valid)
  return masked_mean((p - d) ** 2, mask)


def combined_depth(logits: jax.Array, label: jax.Array, valid: jax.Array) -> jax.Array:
  """Depth, its slopes and the normals of its surface (Hu et al., WACV 2019).

  ⟨F(e)⟩ + ⟨F(∂ₓe)⟩ + ⟨F(∂ᵧe)⟩ + ⟨1 − cos(n, n_d)⟩ with F(e) = ln(1 + 2|e|), e as in
  `squared_depth`, ∂ the Sobel operators and n = (−∂ₓp, −∂ᵧp, 1). F is the published
  ln(|e| + ½) shifted to be 0 at 0: ratios of losses mean something then.

  Args: as `squared_depth`.

  Returns:
    (); slopes and normals where all nine pixels under the operator are valid.
  """
  p, d, mask = _depths(logits, label, valid)
  log = lambda e: jnp.log1p(2 * jnp.abs(e))
  rows, columns = (max(n - 2, 0) for n in label.shape[1:])
  windows = [mask[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
  whole = functools.reduce(jnp.logical_and, windows)
  (px, py), (dx, dy) = _sobel(p), _sobel(d)
  cosine = (px * dx + py * dy + 1) / jnp.sqrt((px**2 + py**2 + 1) * (dx**2 + dy**2 + 1))
  slopes = log(px - dx) + log(py - dy)
  return masked_mean(log(p - d), mask) + masked_mean(slopes + 1 - cosine, whole)


def _depths(logits, label, valid):
  """σ(z), d/10 m, both in the dtype of z, and where there is a measurement."""
  p = jax.nn.sigmoid(logits[..., 0])
  mask = has_depth(label) & valid[:, None, None]
  return p, (label / MAX_DEPTH).astype(p.dtype), mask


def _sobel(x):
  """∂ₓ and ∂ᵧ of (B, h, w) where the operator is inside: (B, h − 2, w − 2) each."""
  smooth_rows = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
  smooth_columns = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
  return (
    smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2],
    smooth_columns[:, 2:] - smooth_columns[:, :-2],
  )


def unit_normals(logits: jax.Array) -> jax.Array:
  """t/√(‖t‖² + 1e-8) with t = tanh(z), along the last axis; shape and dtype of z.

  The constant bounds the derivative at z = 0, which a dead backbone gives.
  """
  direction = jnp.tanh(logits)
  square = jnp.sum(direction**2, axis=-1, keepdims=True)
  return direction / jnp.sqrt(square + 1e-8)


def cosine_normals(logits: jax.Array, label: jax.Array, valid: jax.Array) -> jax.Array:
  """1 − ⟨n̂, n⟩ with n̂ = `unit_normals`(z), as published (Less is More).

  Args:
    logits: z, shape (B, h, w, 3).
    label: n, unit vectors, (0, 0, 0) where there is none; shape (B, h, w, 3), float.
    valid: which examples count, shape (B,), bool.

  Returns:
    Mean over valid pixels, ().
  """
  label = label.astype(logits.dtype)
  cosine = jnp.sum(unit_normals(logits) * label, axis=-1)
  return masked_mean(1 - cosine, has_normal(label) & valid[:, None, None])


def combine(
  losses: Mapping[str, jax.Array],
  present: Mapping[str, bool | jax.Array] | None = None,
  how: str = 'sum',
  *,
  weights: Mapping[str, float] | None = None,
  log_vars: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
  """L_τ = Σ_{t∈τ} L_t ('sum'), w_t L_t ('fixed') or e^{−s_t} L_t + s_t.

  The last is 'uncertainty' (Kendall et al., 2018) with trained log-variances s_t.
  A task outside τ, or without a label in the batch (L_t = 0), contributes nothing: its
  loss, weight and s_t have gradient 0.

  Args:
    losses: L_t, shape ().
    present: membership in τ, Python bools or traced scalars; None: all.
    how: 'sum' | 'fixed' | 'uncertainty'.
    weights: w_t, for 'fixed'.
    log_vars: s_t, shape (), for 'uncertainty'.

  Returns:
    L_τ, shape ().

  Raises:
    UserError: unknown `how`, or a task without weight or log-variance.
  """
  if how not in COMBINATIONS:
    raise UserError(
      f'unknown combination of losses {how!r}; known: {", ".join(COMBINATIONS)}'
    )
  factors = {'sum': losses, 'fixed': weights, 'uncertainty': log_vars}[how] or {}
  terms = []
  for name, loss in losses.items():
    here = True if present is None else present[name]
    static = isinstance(here, bool | np.bool_)
    if static and not here:
      continue
    if name not in factors:
      raise UserError(
        f'combination {how!r}: no {"weight" if how == "fixed" else "log-variance"} '
        f'for task {name!r}; given: {", ".join(factors) or "none"}'
      )
    if how == 'fixed':
      loss = weights[name] * loss
    elif how == 'uncertainty':
      # A loss is exactly 0 only where nobody has a label: then s_t must not move.
      free = jnp.where(loss != 0, log_vars[name], 0)
      loss = jnp.exp(-log_vars[name]) * loss + free
    terms.append(loss if static else jnp.where(here, loss, 0))
  return functools.reduce(jnp.add, terms) if terms else jnp.zeros(())
