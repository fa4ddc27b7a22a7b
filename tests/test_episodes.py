"""Task subsets: which there are, and how they are drawn."""

import itertools

import jax
import numpy as np
import pytest

from msp import episodes
from msp.errors import UserError


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_subsets_are_all_but_the_empty_one(count):
  rows = episodes.subsets(count)
  expected = {r for r in itertools.product((False, True), repeat=count) if any(r)}
  assert len(rows) == 2**count - 1
  assert {tuple(map(bool, row)) for row in rows} == expected
  sizes = rows.sum(axis=1)
  assert (np.diff(sizes) >= 0).all()


def test_static_draws_stay_on_the_host():
  key = jax.random.key(0)
  assert isinstance(episodes.draw(key, 3, 'all'), np.ndarray)
  np.testing.assert_array_equal(episodes.draw(key, 3, 'all'), episodes.subsets(3))
  np.testing.assert_array_equal(episodes.draw(key, 3, 'full'), [[True] * 3])


def test_drawn_subsets_are_uniform_and_never_empty():
  rows = episodes.draw(jax.random.key(0), 3, '7000')
  assert isinstance(rows, jax.Array)
  assert rows.shape == (7000, 3)
  codes = np.asarray(rows) @ np.array([1, 2, 4])
  counts = np.bincount(codes, minlength=8)
  assert counts[0] == 0
  # Seven cells of 1000 each; four standard deviations are 117.
  assert (abs(counts[1:] - 1000) < 120).all()


def test_subsets_of_all_attributes_are_drawn_too():
  rows = np.asarray(episodes.draw(jax.random.key(0), 42, '2000'))
  # Four standard deviations of a mean of 2000 draws.
  np.testing.assert_allclose(rows.mean(axis=0), 0.5, atol=4 * 0.5 / 2000**0.5)


def test_another_key_draws_others():
  draw = lambda seed: np.asarray(episodes.draw(jax.random.key(seed), 4, '20'))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize('how', ['none', '0', '-1', '1.5', ''])
def test_anything_else_is_refused(how):
  with pytest.raises(UserError, match='expected all, full or a number'):
    episodes.draw(jax.random.key(0), 2, how)


def test_all_subsets_of_many_tasks_are_refused():
  with pytest.raises(UserError, match='7 tasks is 127 episodes'):
    episodes.draw(jax.random.key(0), 7, 'all')
