"""Pruning after training: what a learned coefficient is compared with."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.errors import UserError

PyTree = Any
Scores = dict[str, jax.Array]

CRITERIA = ('magnitude', 'random', 'taylor')


def score(
  groups: gr.Groups,
  params: PyTree,
  criterion: str,
  *,
  gradients: PyTree = None,
  key: jax.Array | None = None,
) -> Scores:
  """How much every group matters; comparable between layers.

      magnitude   ‖θ_g‖₂ / √n_g
      random      uniform in [0, 1)
      taylor      (∇_g L · θ_g)², the squared first-order change of the loss when
                  the group is removed (Molchanov et al., arXiv 1906.10771, eq. 8)

  Args:
    groups: which groups.
    params: θ.
    criterion: one of `CRITERIA`.
    gradients: ∇L, for 'taylor'.
    key: for 'random'.

  Returns:
    layer -> scores of its groups, shaped as `msp.groups.alive`; float32.

  Raises:
    UserError: unknown criterion.
  """
  axis = groups.array_axis
  leaves = gr.select(groups, params)
  if criterion == 'magnitude':
    return {
      layer: gr.norms(x, axis) / jnp.sqrt(gr.size(x, axis))
      for layer, x in leaves.items()
    }
  if criterion == 'random':
    masks = gr.alive(groups, params)
    keys = jax.random.split(key, len(masks))
    return {
      layer: jax.random.uniform(key, mask.shape)
      for key, (layer, mask) in zip(keys, masks.items(), strict=True)
    }
  if criterion == 'taylor':
    slopes = gr.select(groups, gradients)
    return {
      layer: jnp.square(jnp.sum(x * slopes[layer], axis=gr.other_axes(x, axis)))
      for layer, x in leaves.items()
    }
  raise UserError(
    f'unknown pruning criterion {criterion!r}; known: {", ".join(CRITERIA)}'
  )


def keep_per_layer(scores: Scores, alive: Mapping[str, int]) -> dict[str, jax.Array]:
  """Keeps the groups with the highest scores of every layer.

  Args:
    scores: from `score`.
    alive: how many of each layer survive, such as those a learned λ has left.

  Returns:
    layer -> bool, True where a group survives.
  """
  return {layer: _rank(x) < alive[layer] for layer, x in scores.items()}


def keep_globally(
  scores: Scores, dead: float, min_alive: int = 1
) -> dict[str, jax.Array]:
  """Keeps the groups with the highest scores of the whole network.

  Args:
    scores: from `score`.
    dead: share of all groups to remove; fewer go where the floor holds them.
    min_alive: groups that survive in each layer.

  Returns:
    layer -> bool, True where a group survives.
  """
  floor = {layer: _rank(x) < min_alive for layer, x in scores.items()}
  free = {layer: jnp.where(floor[layer], jnp.inf, x) for layer, x in scores.items()}
  everything = jnp.concatenate([x.ravel() for x in free.values()])
  gone = _rank(-everything) < round(dead * everything.size)
  masks, start = {}, 0
  for layer, x in scores.items():
    part = gone[start : start + x.size].reshape(x.shape)
    masks[layer] = ~part | floor[layer]
    start += x.size
  return masks


def _rank(x):
  """Position of every entry from the highest, ties in order."""
  order = jnp.argsort(-x.ravel(), stable=True)
  return jnp.zeros_like(order).at[order].set(jnp.arange(order.size)).reshape(x.shape)
