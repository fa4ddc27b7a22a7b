"""Which tasks an episode holds."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from msp.errors import UserError


def subsets(num_tasks: int) -> np.ndarray:
  """All 2ᵀ − 1 non-empty task subsets, smallest first.

  Args:
    num_tasks: T.

  Returns:
    Bool, shape (2ᵀ − 1, T), on the host: its entries are static under jit.
  """
  rows = np.arange(1, 2**num_tasks)[:, None] >> np.arange(num_tasks) & 1
  order = np.argsort(rows.sum(axis=1), kind='stable')
  return rows[order].astype(bool)


def draw(key: jax.Array, num_tasks: int, how: str | int) -> np.ndarray | jax.Array:
  """The episodes of one step.

  Args:
    key: PRNG key.
    num_tasks: T.
    how: 'all' (every non-empty subset), 'full' (one episode with every task), or
      a number, 2 or '2': that many subsets, drawn uniformly and independently.

  Returns:
    Bool, shape (episodes, T): on the host for 'all' and 'full'.

  Raises:
    UserError: `how` is none of these, or 'all' of more than six tasks (over a
      hundred episodes a step).
  """
  if how == 'full':
    return np.ones((1, num_tasks), bool)
  if how == 'all':
    if num_tasks > 6:
      raise UserError(
        f'meta.episodes=all with {num_tasks} tasks is {2**num_tasks - 1} '
        f'episodes a step; draw some, for example meta.episodes=2'
      )
    return subsets(num_tasks)
  if not str(how).isdecimal() or int(how) < 1:
    raise UserError(
      f'meta.episodes={how!r}: expected all, full or a number of at least 1'
    )
  # The first task of a subset is the i-th with a probability of 2⁻ⁱ/(1 − 2⁻ᵀ); those
  # after it are in with ½ each.
  key_first, key_rest = jax.random.split(key)
  at, count = jnp.arange(num_tasks)[None], int(how)
  first = jax.random.categorical(key_first, -math.log(2) * at[0], shape=(count, 1))
  rest = jax.random.bernoulli(key_rest, shape=(count, num_tasks))
  return (at == first) | ((at > first) & rest)
