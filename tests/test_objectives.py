"""What moves λ: the comparison with the twin, the budget, and their signals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msp import groups as gr
from msp import objectives
from msp.errors import UserError
from msp.objectives import Objective


def twin():
  params = {'w': jnp.ones(2)}
  return objectives.make_twin(params, {'mu': jnp.zeros(2)}, {}, 2)


def test_comparison_is_a_running_mean_of_log_ratios():
  rng = np.random.default_rng(0)
  t, levels = twin(), []
  for _ in range(400):
    dense = {'a': rng.uniform(0.5, 2), 'b': rng.uniform(0.1, 3)}
    sparse = {'a': 1.1 * dense['a'], 'b': dense['b']}
    values = [{k: jnp.asarray(v) for k, v in x.items()} for x in (sparse, dense)]
    t = objectives.compare(t, *values, 0.99)
    levels.append(np.log(list(dense.values())))
  # The batches' own difficulty cancels in the gap, and makes the spread.
  np.testing.assert_allclose(t.gap, [math.log(1.1), 0.0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(t.level, np.mean(levels, 0), atol=0.1)
  np.testing.assert_allclose(t.spread, np.var(levels, 0), rtol=0.3)
  error = objectives.allowed(Objective(hold_out_batches=25.0), t)
  np.testing.assert_allclose(error, np.sqrt(np.var(levels, 0) / 25), rtol=0.2)
  np.testing.assert_allclose(
    objectives.allowed(Objective(tolerance=5.0), t), math.log(6.0), rtol=1e-6
  )


def test_absent_tasks_are_left_out_of_the_comparison():
  losses = lambda a, b: {'a': jnp.asarray(a), 'b': jnp.asarray(b)}
  t = objectives.compare(twin(), losses(2.0, jnp.nan), losses(1.0, jnp.nan), 0.9)
  np.testing.assert_allclose(t.gap, [math.log(2), 0.0], atol=1e-6)
  assert t.count.tolist() == [1, 0]
  t = objectives.compare(t, losses(4.0, 3.0), losses(1.0, 1.0), 0.9)
  np.testing.assert_allclose(t.gap, [math.log(8) / 2, math.log(3)], atol=1e-6)
  before = t
  t = objectives.compare(t, losses(5.0, jnp.nan), losses(1.0, jnp.nan), 0.9)
  for name in ('count', 'gap', 'level', 'spread'):  # b keeps its numbers
    assert getattr(t, name)[1] == getattr(before, name)[1]
    assert np.isfinite(getattr(t, name)).all()


def test_tolerance_pushes_towards_the_bound_from_both_sides():
  o = Objective('tolerance', tolerance=0.1)
  at = lambda gap, other=-1.0: objectives.tolerance_violation(
    o, twin()._replace(gap=jnp.array([gap, other]))
  )
  assert at(0.0) < 0 < at(0.2)
  assert at(0.0, 0.2) > 0  # the worst task decides
  np.testing.assert_allclose(at(math.log(1.1)), 0.0, atol=1e-6)


def test_far_below_its_peak_and_violated_the_network_is_its_twin_again():
  twin = objectives.make_twin({'w': jnp.ones(2)}, (), {}, 2)
  current = {'w': jnp.zeros(2)}, (), {}

  def after(twin, violation, rho):
    return objectives.restore(twin, jnp.asarray(violation), rho, current)

  twin = twin._replace(gap=jnp.ones(2))
  twin, network, restored = after(twin, 5.0, jnp.array([-1.0, -3.0]))
  assert not restored  # violated, but λ has only just begun to fall
  assert twin.peak == -2
  for violation, rho in ((-0.1, -9.0), (0.1, -2 - math.log(3.9))):
    kept, network, restored = after(twin, violation, jnp.full(2, rho))
    assert not restored
    assert not network[0]['w'].any()
    assert kept.peak == -2
    assert kept.gap.all()
  twin, network, restored = after(twin, 0.1, jnp.full(2, -2 - math.log(4.1)))
  assert restored
  assert network[0]['w'].all()
  assert not twin.gap.any()
  np.testing.assert_allclose(twin.peak, -2 - math.log(4.1), rtol=1e-6)
  _, _, restored = after(twin, 0.1, jnp.full(2, -2 - math.log(4.1)))
  assert not restored


def params():
  kernel = lambda shape, dead: jnp.ones(shape).at[:, :, :dead].set(0.0)
  return {
    'backbone': {
      'a': {'kernel': kernel((3, 3, 4, 2), 1)},
      'b': {'kernel': kernel((1, 1, 8, 2), 6)},
    }
  }


def test_removed_counts_groups_weights_and_flops():
  groups = gr.find(params())
  positions = {'backbone/a/kernel': 100, 'backbone/b/kernel': 25}
  measure = lambda name: objectives.removed(
    Objective(measure=name, positions=positions), groups, params()
  )
  np.testing.assert_allclose(measure('groups'), 7 / 12)
  np.testing.assert_allclose(measure('weights'), (18 + 12) / (72 + 16))
  flops = [2 * 72 * 100, 2 * 16 * 25]
  gone = flops[0] / 4 + flops[1] * 6 / 8
  np.testing.assert_allclose(measure('flops'), gone / sum(flops), rtol=1e-6)
  o = Objective('budget', target=0.5)
  assert objectives.budget_violation(o, groups, params()) > 0
  o = Objective('budget', target=0.9)
  assert objectives.budget_violation(o, groups, params()) < 0


def test_signal_is_the_violation_and_breaks_ties_by_the_hold_out_loss():
  scalar = objectives.signal(jnp.asarray(7.0), jnp.zeros(()), None)
  assert scalar == 7.0
  h = jnp.array([3.0, 0.0, -3.0])
  got = objectives.signal(jnp.asarray(-0.2), jnp.zeros(3), h)
  np.testing.assert_allclose(jnp.mean(got), -0.2, atol=1e-6)
  assert got[0] > got[1] > got[2]  # where λ hurts the hold-out loss it falls
  same = objectives.signal(jnp.asarray(-0.2), jnp.zeros(3), jnp.ones(3))
  np.testing.assert_allclose(same, -0.2)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'kind': 'budgte'}, "objective is 'budgte'; known: holdout"),
    ({'measure': 'channels'}, "measure is 'channels'; known: groups"),
    ({'target': 1.0}, r'target is 1\.0; .* in \(0, 1\)'),
    ({'tolerance': -0.1}, r'tolerance is -0\.1; .* below 0'),
  ],
)
def test_impossible_objectives_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    objectives.check(Objective()._replace(**change))


def test_make_twin_shares_no_buffer():
  x = {'w': jnp.ones(2)}
  t = objectives.make_twin(x, {}, {}, 1)
  assert t.params['w'].unsafe_buffer_pointer() != x['w'].unsafe_buffer_pointer()
  assert jax.tree.structure(t.params) == jax.tree.structure(x)
