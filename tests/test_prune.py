"""Baselines remove the groups they are asked to, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msp import groups as gr
from msp import prune
from msp.errors import UserError
from msp.models import multitask
from tests.networks import small_network


@functools.cache
def made(axis):
  model = small_network('basic', (1, 1, 1, 1))
  shape = jax.eval_shape(
    lambda key: multitask.init(model, key, (16, 16, 3))[0], jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shape)
  groups = gr.find(params, axis=axis, streams=multitask.streams(model))
  gradients = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), params
  )
  return params, groups, gradients


@pytest.mark.parametrize('axis', ['in', 'out', 'weight', 'coupled'])
@pytest.mark.parametrize('criterion', prune.CRITERIA)
def test_as_many_as_asked_for_survive(axis, criterion):
  params, groups, gradients = made(axis)
  alive = {
    layer: max(1, count // (2 + i % 3))
    for i, (layer, count) in enumerate(gr.totals(groups, params).items())
  }

  @jax.jit
  def run(params, gradients):
    scores = prune.score(
      groups, params, criterion, gradients=gradients, key=jax.random.key(1)
    )
    pruned = gr.remove(groups, params, prune.keep_per_layer(scores, alive))
    return pruned, gr.alive(groups, pruned), prune.keep_globally(scores, 0.6)

  pruned, left, keep = jax.device_get(run(params, gradients))
  left = {layer: int(m.sum()) for layer, m in left.items()}
  if axis == 'coupled':  # there a channel can also die by its neighbours
    assert all(left[layer] <= count for layer, count in alive.items())
  else:
    assert left == alive
  kept = gr.by_path(pruned)
  for path, x in gr.by_path(params).items():
    changed = kept[path] != x
    assert not (kept[path][changed] != 0).any()  # removed or untouched
    assert path.startswith('backbone/') or not changed.any()
  total = sum(x.size for x in keep.values())
  dead = total - sum(int(m.sum()) for m in keep.values())
  assert dead == round(0.6 * total)


def test_the_lowest_scores_go():
  params, groups, gradients = made('in')
  by_hand = {
    layer: (
      np.linalg.norm(np.moveaxis(np.asarray(x), -2, 0).reshape(x.shape[-2], -1), axis=1)
      / np.sqrt(x.size / x.shape[-2])
    )
    for layer, x in gr.select(groups, params).items()
  }
  scores = prune.score(groups, params, 'magnitude')
  for layer, wanted in by_hand.items():
    np.testing.assert_allclose(scores[layer], wanted, rtol=1e-5)
  keep = prune.keep_globally(scores, 0.5, min_alive=2)
  safe = {layer: set(np.argsort(x)[-2:]) for layer, x in by_hand.items()}
  ranked = sorted(
    (x, layer, i)
    for layer, values in by_hand.items()
    for i, x in enumerate(values)
    if i not in safe[layer]
  )
  gone = ranked[: round(0.5 * sum(x.size for x in by_hand.values()))]
  for layer, mask in keep.items():
    dead = {i for _, name, i in gone if name == layer}
    assert set(np.flatnonzero(~np.asarray(mask))) == dead
  # The change of a linear loss when a group is removed, squared.
  scores = prune.score(groups, params, 'taylor', gradients=gradients)
  loss = lambda p: sum(
    jnp.vdot(x, gr.by_path(gradients)[path]) for path, x in gr.by_path(p).items()
  )
  layer = groups.layers[3]
  for group in (0, 3):
    keep = {name: jnp.ones_like(x, bool) for name, x in scores.items()}
    keep[layer] = keep[layer].at[group].set(False)
    change = loss(params) - loss(gr.remove(groups, params, keep))
    np.testing.assert_allclose(scores[layer][group], change**2, rtol=1e-2)


def test_ties_and_a_mistake():
  scores = {'a': jnp.zeros(8), 'b': jnp.zeros(4)}
  keep = prune.keep_globally(scores, 0.5)
  assert sum(int(m.sum()) for m in keep.values()) == 6
  keep = prune.keep_globally(scores, 1.0, min_alive=3)
  assert {k: int(m.sum()) for k, m in keep.items()} == {'a': 3, 'b': 3}
  params, groups, _ = made('in')
  with pytest.raises(UserError, match='unknown pruning criterion'):
    prune.score(groups, params, 'size')
