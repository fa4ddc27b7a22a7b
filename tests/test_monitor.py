"""What a run's numbers are watched for."""

import logging

import numpy as np
import pytest

from msp import groups as gr
from msp.monitor import Monitor, constraint, flatten


def test_a_network_that_becomes_its_twin_is_reported(caplog):
  params = {'backbone': {'c': {'kernel': np.ones((1, 1, 2, 2))}}}
  monitor = Monitor(0, gr.find(params), params, search=8)
  metrics = {'nonfinite': -1, 'loss': 1.0, 'alive': [2], 'lambda_relative': 0.125}
  with caplog.at_level(logging.INFO, logger='msp'):
    monitor.check(6, metrics | {'restored': False})
    assert not caplog.records
    monitor.check(7, metrics | {'restored': True})
    monitor.check(8, metrics | {'restored': True})
  in_vain, planned = caplog.records
  assert in_vain.getMessage().startswith('step 7: a task is still over its tolerance')
  assert '0.12' in in_vain.getMessage()
  assert planned.levelno == logging.INFO  # nothing is wrong
  assert planned.getMessage().startswith('step 8: λ/λ_max is 0.12 after the search')


def test_a_vector_is_logged_as_its_mean_and_by_its_entries():
  metrics = {'loss': np.float32(2), 'lambda': np.array([1.0, 3.0])}
  row = flatten(metrics | {'alive': [5], 'nonfinite': -1}, ('stem', 'layer1'))
  assert row == {'loss': 2, 'lambda': 2, 'lambda/stem': 1, 'lambda/layer1': 3}


def test_a_coefficient_that_is_no_number_is_noticed():
  params = {'backbone': {'a': {'kernel': np.ones((1, 1, 8, 4), np.float32)}}}
  monitor = Monitor(0, gr.find(params), params)
  metrics = {'nonfinite': -1, 'loss': 1.0, 'alive': [8]}
  with pytest.raises(FloatingPointError, match=r'step 3: lambda is nan$'):
    monitor.check(3, metrics | {'lambda': np.array([1, np.nan])})


@pytest.mark.parametrize(('axis', 'noticed'), [('in', True), ('weight', False)])
def test_half_of_the_layers_all_but_dead_is_noticed(axis, noticed):
  """Two of 32 channels are next to nothing; two of many weights may be enough."""
  layer = lambda: {'kernel': np.ones((1, 1, 32, 4), np.float32)}
  params = {'backbone': {'a': layer(), 'b': layer()}}
  monitor = Monitor(1, gr.find(params, axis=axis), params)
  metrics = {'nonfinite': -1, 'loss': 1.0}
  assert not monitor.check(1, metrics | {'alive': [3, 32]})
  assert monitor.check(2, metrics | {'alive': [2, 32]}) == noticed
  assert monitor.check(3, metrics | {'alive': [1, 32]})  # at its floor


def test_what_was_all_but_dead_at_the_start_is_not_what_starved():
  kernel = np.zeros((1, 1, 32, 4), np.float32)
  kernel[:, :, :2] = 1
  params = {'backbone': {'a': {'kernel': kernel}, 'b': {'kernel': kernel + 1}}}
  monitor = Monitor(1, gr.find(params), params, alive_at_start=[2, 32])
  metrics = {'nonfinite': -1, 'loss': 1.0}
  assert not monitor.check(1, metrics | {'alive': [2, 32]})
  assert monitor.check(2, metrics | {'alive': [1, 32]})
  assert monitor.check(3, metrics | {'alive': [2, 2]})


def test_whether_a_budget_was_met():
  budget = {'coefficient': 'learned', 'objective': 'budget', 'target': 0.7}
  budget |= {'measure': 'flops'}
  end = lambda removed: [{'split': 'train'}, {'split': 'test', 'removed': removed}]
  kept = constraint(end(0.712), budget)
  assert kept == (True, 'budget: 71.2% of the flops are gone, 70.0% asked for')
  assert constraint(end(0.68), budget).holds
  assert not constraint(end(0.67), budget).holds
  assert not constraint(end(0.73), budget).holds
  # Not over, of a program that did not say, or nothing to keep to.
  assert constraint([{'split': 'train'}], budget) is None
  assert constraint([{'split': 'test'}], budget) is None
  for sparsity in ({}, budget | {'coefficient': 'fixed'}, {'coefficient': 'learned'}):
    assert constraint(end(0.7), sparsity) is None


def test_whether_a_tolerance_was_kept():
  tolerance = {'coefficient': 'learned', 'objective': 'tolerance'}
  row = {'split': 'train', 'step': 5, 'violation': 1.0}
  row |= {'gap/edges': 0.2, 'gap_allowed/edges': 0.1}
  last = {'split': 'train', 'step': 10, 'violation': -0.5}
  last |= {'gap/edges': np.log(1.05), 'gap_allowed/edges': np.log(1.1)}
  last |= {'gap/depth': -0.1, 'gap_allowed/depth': 0.01}
  after = [{'split': 'train', 'step': 15}, {'split': 'test', 'step': 20}]
  kept = constraint([row, last, *after], tolerance)
  assert kept.holds
  # Of its allowed gap edges has used more.
  assert kept.words == (
    'tolerance: at step 10, the last that compared, the hold-out loss of edges was '
    "5.0% above the twin's; up to 10.0% above are allowed"
  )
  broken = constraint([last, row | {'step': 11}, *after], tolerance)
  assert not broken.holds
  assert "of edges was 22.1% above the twin's; up to 10.5%" in broken.words
  below = {'gap/edges': np.log(0.9), 'violation': -2.0}
  assert 'edges was 10.0% below' in constraint([row | below], tolerance).words
  assert constraint(after, tolerance) is None


def test_a_floor_that_the_network_came_with_is_no_fault_of_λ(caplog):
  params = {'backbone': {'c': {'kernel': np.ones((1, 1, 8, 2))}}}
  metrics = {'nonfinite': -1, 'loss': 1.0, 'alive': [1]}
  for at_start, warnings in ([1], 0), ([2], 1):
    caplog.clear()
    Monitor(1, gr.find(params), params, alive_at_start=at_start).check(1, metrics)
    assert len(caplog.records) == warnings
