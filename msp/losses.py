"""Task losses on logits and labels of one resolution, and their combination.

Every loss is the mean over valid pixels or examples, 0 when there is none (never
over all of them, so that ignored pixels do not water it down), twice
differentiable, and keeps the dtype of its logits.
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


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Σ_mask values / |mask|, and 0 if the mask is empty; both of one shape."""
  total = jnp.sum(jnp.where(mask, values, 0))
  return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


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
  return masked_mean(loss, (label != IGNORE) & valid[:, None, None])


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
  return masked_mean(loss, (label >= 0) & valid[:, None, None])


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
  A task outside τ contributes nothing: its loss, weight and s_t have gradient 0.

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
      loss = jnp.exp(-log_vars[name]) * loss + log_vars[name]
    terms.append(loss if static else jnp.where(here, loss, 0))
  return functools.reduce(jnp.add, terms) if terms else jnp.zeros(())
