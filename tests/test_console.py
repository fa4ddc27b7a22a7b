"""What a person is told while a run goes on."""

import logging

from msp import console


def test_the_time_left_knows_nothing_of_compiling(monkeypatch, caplog):
  now = [0.0]
  monkeypatch.setattr(console.time, 'monotonic', lambda: now[0])
  metrics = {'loss': 1.0, 'group_sparsity': 0.25}
  with caplog.at_level(logging.INFO), console.Bar(100, 200) as bar:
    for step, seconds in enumerate([60.0, 4.0, 4.0, 30.0, 4.0, 4.0, 4.0], start=101):
      now[0] += seconds
      bar.advance(step, metrics)
  assert caplog.messages == [
    'compiled, and did step 101, in 60 s: loss 1.000, dead groups 25.0 %',
    'step 104/200, 4.00 s/step, 384 s left: loss 1.000, dead groups 25.0 %',
    'step 107/200, 4.00 s/step, 372 s left: loss 1.000, dead groups 25.0 %',
  ]
