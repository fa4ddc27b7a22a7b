"""What moves λ: the comparison with the twin, the budget, and their signals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msp import groups as gr
from msp import objectives
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
    t = objectives.compare(Objective(decay=0.99), t, *values)
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


def test_the_level_of_losses_is_no_part_of_their_spread():
  """From the first one on: losses far from 1 that hardly differ."""
  rng, t, logs = np.random.default_rng(1), twin(), []
  for number in range(1, 6):
    dense = {
      k: jnp.asarray(v) for k, v in zip('ab', rng.uniform(2.7, 3.3, 2), strict=True)
    }
    t = objectives.compare(Objective(decay=0.95), t, dense, dense)
    logs.append(np.log([float(v) for v in dense.values()]))
    np.testing.assert_allclose(t.spread, np.var(logs, 0), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(t.level, np.mean(logs, 0), rtol=1e-5)
    assert t.count.tolist() == [number] * 2


def test_absent_tasks_are_left_out_of_the_comparison():
  losses = lambda a, b: {'a': jnp.asarray(a), 'b': jnp.asarray(b)}
  compare = functools.partial(objectives.compare, Objective(decay=0.9))
  t = compare(twin(), losses(2.0, jnp.nan), losses(1.0, jnp.nan))
  np.testing.assert_allclose(t.gap, [math.log(2), 0.0], atol=1e-6)
  assert t.count.tolist() == [1, 0]
  t = compare(t, losses(4.0, 3.0), losses(1.0, 1.0))
  np.testing.assert_allclose(t.gap, [math.log(8) / 2, math.log(3)], atol=1e-6)
  # Of a task that is absent, and of one without a label in the batch.
  for nothing in (jnp.nan, 0.0):
    before = t
    t = compare(t, losses(5.0, nothing), losses(1.0, nothing))
    for name in ('count', 'first', 'gap', 'level', 'spread'):  # b keeps its numbers
      assert getattr(t, name)[1] == getattr(before, name)[1]
      assert np.isfinite(getattr(t, name)).all()


def test_a_task_next_to_solved_is_held_to_a_share_of_its_first_loss():
  """ε of the loss where that is large, ε² of the first loss where it is next to 0."""
  o = Objective('tolerance', tolerance=0.1)
  losses = lambda a, b: {'a': jnp.asarray(a), 'b': jnp.asarray(b)}
  # Only b has a label in the first batch: a's first loss is of the second.
  begun = objectives.compare(o, twin(), losses(jnp.nan, 0.8), losses(jnp.nan, 0.8))
  begun = objectives.compare(o, begun, losses(2.0, 0.7), losses(2.0, 0.7))
  np.testing.assert_allclose(begun.first, [2.0, 0.8])
  begun = begun._replace(count=jnp.zeros(2, jnp.int32) + 10**6)

  def violation(a, b):
    """Where two networks stay that far above a dense one at 0.5 and 0.001."""
    t, dense = begun, losses(0.5, 0.001)
    for _ in range(200):
      t = objectives.compare(o, t, losses(0.5 + a, 0.001 + b), dense)
    np.testing.assert_array_equal(t.first, begun.first)
    return objectives.tolerance_violation(o._replace(hold_out_batches=1e9), t)

  bounds = 0.1 * (0.5 + 0.1 * 2.0), 0.1 * (0.001 + 0.1 * 0.8)
  np.testing.assert_allclose(violation(bounds[0], 0.0), 0.0, atol=1e-3)
  np.testing.assert_allclose(violation(0.0, bounds[1]), 0.0, atol=1e-3)
  assert violation(0.0, 0.003) < 0  # four times the twin's loss, and nothing of 0.8
  assert violation(0.0, 0.03) > 1


def test_tolerance_pushes_towards_the_bound_from_both_sides():
  o = Objective('tolerance', tolerance=0.1)
  at = lambda gap, other=-1.0: objectives.tolerance_violation(
    o, twin()._replace(gap=jnp.array([gap, other]))
  )
  assert at(0.0) < 0 < at(0.2)
  assert at(0.0, 0.2) > 0  # the worst task decides
  np.testing.assert_allclose(at(math.log(1.1)), 0.0, atol=1e-6)


OBJECTIVE = Objective('tolerance', tolerance=0.1, search=7)
SPARSE = {'w': jnp.zeros(2)}, (), {}


def restore(twin, step, violation, rho):
  """(twin, its network, whether restored) for a network of zeros."""
  twin, network, restored = objectives.restore(
    OBJECTIVE, twin, jnp.asarray(step), jnp.asarray(violation), rho, SPARSE
  )
  return twin, network[0]['w'], restored


def test_far_below_its_peak_and_violated_the_network_is_its_twin_again():
  twin = objectives.make_twin({'w': jnp.ones(2)}, (), {}, 2)
  twin = twin._replace(gap=jnp.array([1.0, -0.5]))
  twin, network, restored = restore(twin, 8, 5.0, jnp.array([-1.0, -3.0]))
  assert not restored  # violated, but λ has only just begun to fall
  assert twin.peak == -2
  for violation, rho in ((-0.1, -9.0), (0.1, -2 - math.log(3.9))):
    kept, network, restored = restore(twin, 9, violation, jnp.full(2, rho))
    assert not restored
    assert not network.any()
    assert kept.peak == -2
    np.testing.assert_array_equal(kept.gap, twin.gap)
  twin, network, restored = restore(twin, 9, 0.1, jnp.full(2, -2 - math.log(4.1)))
  assert restored
  assert network.all()
  np.testing.assert_allclose(twin.peak, -2 - math.log(4.1), rtol=1e-6)
  _, _, restored = restore(twin, 10, 0.1, jnp.full(2, -2 - math.log(4.1)))
  assert not restored


def test_after_the_search_the_network_is_its_twin_whatever_λ_is():
  twin = objectives.make_twin({'w': jnp.ones(2)}, (), {}, 2)
  for step, violation, rho in ((6, -1.0, -4.0), (7, -1.0, -4.0), (8, -1.0, -4.0)):
    twin, network, restored = restore(twin, step, violation, jnp.full(2, rho))
    assert restored == network.all() == (step == 7)
  assert twin.peak == -4


def test_a_restored_network_is_not_taken_for_room():
  """Its equality with the twin says nothing yet about λ, so the gaps do not jump."""
  start = objectives.make_twin({'w': jnp.ones(2)}, (), {}, 2)
  twin = start._replace(gap=jnp.array([3.0, 0.05]), count=jnp.full(2, 99))
  twin, _, restored = restore(twin, 7, 30.0, jnp.full(2, -1.0))
  assert restored
  np.testing.assert_allclose(twin.gap, [2 * math.log(1.1), 0.05], rtol=1e-6)
  loss = {'a': jnp.ones(()), 'b': jnp.ones(())}
  steps = 0
  while objectives.tolerance_violation(OBJECTIVE, twin) > 0:
    twin = objectives.compare(Objective(decay=0.95), twin, loss, loss)
    steps += 1
  assert 10 < steps < 20  # and a start that killed everything is forgotten all the same


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


def test_what_may_be_dead_grows_with_the_steps():
  params = {'backbone': {'kernel': jnp.ones((5, 3)).at[:2].set(0)}}
  groups = gr.find(params)
  o = Objective('holdout', rise=8)
  for at_start, step, allowed in (
    (0.0, 0, 0.0),
    (0.0, 2, 0.25),
    (0.2, 2, 0.4),
    (0.0, 8, 1.0),
    (0.2, 9, 1.0),
  ):
    got = objectives.trust_region_violation(o, groups, params, at_start, step)
    np.testing.assert_allclose(got, (0.4 - allowed) / objectives.BUDGET_BAND, atol=1e-5)


@pytest.mark.parametrize(
  ('rise', 'at_start', 'settled', 'aims'),
  [
    # Before it settles it rises to 0.6 − 0.5 · 0.6 · 0.4 = 0.48, and waits there.
    (4, 0.0, 8, {0: 0, 1: 0.12, 2: 0.24, 4: 0.48, 7: 0.48, 8: 0.6, 9: 0.6}),
    (4, 0.0, None, {0: 0, 3: 0.45, 4: 0.6, 9: 0.6}),
    (4, 0.4, 4, {0: 0.4, 2: 0.44, 4: 0.6}),  # of a network that is sparse already
    (4, 0.9, 4, {0: 0.9, 2: 0.69, 4: 0.6}),
    (4, 0.0, 2, {1: 0.12, 2: 0.6}),
    (0, 0.0, 8, {0: 0.48, 8: 0.6}),
    (0, 0.0, None, {0: 0.6}),
  ],
)
def test_the_aim_of_a_budget_rises(rise, at_start, settled, aims):
  groups = gr.find(params())
  o = Objective('budget', target=0.6, rise=rise)
  for step, aim in aims.items():
    got = objectives.budget_violation(o, groups, params(), at_start, step, settled)
    np.testing.assert_allclose(got, (7 / 12 - aim) / 0.05, rtol=1e-5, err_msg=step)


def test_a_budget_is_met_in_a_band_above_its_target():
  groups = gr.find(params())  # 7 of 12 groups are dead, 0.583

  def at(target):
    met, over = objectives.settling(Objective('budget', target), groups, params())
    return bool(met), bool(over)

  assert at(0.58) == at(0.565) == (True, False)
  assert at(0.6) == (False, False)  # λ goes on
  assert at(0.56) == (False, True)  # groups may come back


def test_signal_is_the_violation_and_breaks_ties_by_the_hold_out_loss():
  scalar = objectives.signal(jnp.asarray(7.0), jnp.zeros(()), None)
  assert scalar == 7.0
  h = jnp.array([3.0, 0.0, -3.0])
  got = objectives.signal(jnp.asarray(-0.2), jnp.zeros(3), h)
  np.testing.assert_allclose(jnp.mean(got), -0.2, atol=1e-6)
  assert got[0] > got[1] > got[2]  # where λ hurts the hold-out loss it falls
  same = objectives.signal(jnp.asarray(-0.2), jnp.zeros(3), jnp.ones(3))
  np.testing.assert_allclose(same, -0.2)


def test_make_twin_shares_no_buffer():
  x = {'w': jnp.ones(2)}
  t = objectives.make_twin(x, {}, {}, 1)
  assert t.params['w'].unsafe_buffer_pointer() != x['w'].unsafe_buffer_pointer()
  assert jax.tree.structure(t.params) == jax.tree.structure(x)
