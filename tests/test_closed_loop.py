"""The objectives close their loop: ρ, moved by the recipe's own optimiser, arrives.

On a perceptron and data without end: several runs side by side are one program.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import celeba_meta
from data import Label
from msp import experiment, objectives
from msp.models import multitask

SEEDS = 4
IMAGES = 64  # of a batch
INPUTS = 48


LABELS = {name: Label('attribute', ('no', 'yes')) for name in ('male', 'eyeglasses')}


class Perceptron(nn.Module):
  """Three layers on every fourth pixel: 48 + 32 + 32 groups."""

  shape: Any = None  # what `experiment.build` tells a ResNet

  @nn.compact
  def __call__(self, x, train):
    x = 4 * x[:, ::4, ::4].reshape(len(x), INPUTS) - 2
    for i in range(3):
      x = nn.Dense(32, use_bias=False, name=f'layer{i}')(x)
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return x


class Head(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    del train
    return nn.Dense(1)(x)


def batch(key, used, noise):
  """Both labels are noisy linear functions of the first `used` inputs."""
  keys = jax.random.split(key)
  tiles = jax.random.uniform(keys[0], (IMAGES, 4, 4, 3))
  x = tiles.reshape(IMAGES, INPUTS)[:, :used] - 0.5
  logits = x @ jax.random.normal(jax.random.key(0), (used, 2))
  label = logits + noise * jax.random.normal(keys[1], logits.shape) > 0
  label = dict(zip(LABELS, label.T.astype(jnp.int32), strict=True))
  image = tiles.repeat(4, axis=1).repeat(4, axis=2)
  return {'image': image, 'valid': jnp.ones(IMAGES, bool), **label}


def recipe(objective, steps):
  """That of faces, but for what a perceptron needs."""
  config = celeba_meta.get_config('tiny')
  config.tasks = tuple(LABELS)
  config.data.image_size = (16, 16)
  config.loss.combination = 'sum'
  config.optimizer[0].learning_rate.peak_value = 0.01
  config.meta.inner_steps = 0
  config.sparsity.objective = objective
  config.train.steps = steps
  return config


def run(config, monkeypatch, starts, *, used, noise):
  """Metrics, (start, seed, step), of runs from each λ/λ_max; until λ stands still."""
  model = multitask.MultiTask(Perceptron(), {name: Head() for name in LABELS})
  monkeypatch.setattr(multitask, 'build', lambda *_, **__: model)
  monkeypatch.setattr(multitask, 'streams', lambda _: [])
  e = experiment.build(config, LABELS, hold_out_images=32 * IMAGES)
  steps = config.train.steps if e.settled_step is None else e.settled

  def one(rho, seed):
    key, *keys = jax.random.split(jax.random.key(seed), 3)
    state = e.init(keys[0], batch(keys[1], used, noise))._replace(rho=rho)

    def body(state, i):
      keys = jax.random.split(jax.random.fold_in(key, i), 3)
      query, hold_out = (batch(k, used, noise) for k in keys[:2])
      return e.train_step(state, {'query': query, 'hold_out': hold_out}, keys[2])

    return jax.lax.scan(body, state, jnp.arange(steps))[1]

  rho, seeds = jnp.log(jnp.array(starts, jnp.float32)), jnp.arange(SEEDS)
  side_by_side = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
  return jax.device_get(jax.jit(side_by_side)(rho, seeds)), e


def test_a_budget_is_met_whatever_λ_is_at_the_start(monkeypatch):
  config = recipe('budget', steps=320)
  config.sparsity.target = 0.7
  config.sparsity.rise = 0.1  # so soon that a small λ is far behind its aim
  metrics, e = run(config, monkeypatch, (0.01, 1.0), used=12, noise=0.5)
  np.testing.assert_allclose(metrics['group_sparsity'][..., -1], 0.7, atol=0.02)
  # It has to slow down before it gets there: groups die long after λ has grown.
  beyond = objectives.BUDGET_BAND * metrics['violation'][0, :, : e.settled].max(-1)
  assert np.mean(beyond) < 0.035


def test_a_tolerance_is_met_from_a_λ_that_is_far_too_large(monkeypatch):
  config = recipe('tolerance', steps=840)
  metrics, _ = run(config, monkeypatch, (1.0,), used=INPUTS, noise=1.0)
  for name in LABELS:
    last, limit = (
      metrics[f'{kind}/{name}'][..., -1] for kind in ('gap', 'gap_allowed')
    )
    assert (last <= limit).all(), name
  assert metrics['violation'].max() > 0.5  # it was too large
  assert (metrics['lambda_relative'][..., -1] < 0.7).all()
  assert (metrics['group_sparsity'][..., -1] > 0.05).all()  # and is not nothing
