"""What a person is told while a run goes on."""

import logging
import signal

import numpy as np
import pytest

from data import progress
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


def test_a_line_has_what_matters():
  metrics = {
    'loss': np.float32(1.25),
    'hold_out_loss': np.float32(2.5),
    'lambda': np.array([1e-3, 3e-3]),
    'group_sparsity': np.float32(0.125),
  }
  wanted = 'loss 1.250, hold-out 2.500, λ 2.00e-03, dead groups 12.5 %'
  assert console.describe(metrics) == wanted


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys, caplog):
  now = iter(range(0, 1000, 5))
  monkeypatch.setattr(console.time, 'monotonic', lambda: next(now))
  monkeypatch.setattr(console.sys.stderr, 'isatty', lambda: True)
  with caplog.at_level(logging.INFO), console.Bar(0, 2) as bar:
    for step in (1, 2):
      bar.advance(step, {'loss': 1.0, 'group_sparsity': 0.25})
    bar.say('validation 0.5')
  shown = capsys.readouterr().err
  assert 'loss 1.000, dead groups 25.0 %' in shown
  assert '2/2' in shown
  assert 'validation 0.5' in shown
  assert caplog.messages == []


@pytest.fixture
def ctrl_c():
  """Sets what Ctrl-C does, whatever it did where the tests were started."""
  before = signal.getsignal(signal.SIGINT)
  yield lambda handler: signal.signal(signal.SIGINT, handler)
  signal.signal(signal.SIGINT, before)


def test_what_a_shell_has_ignored_stays_ignored(ctrl_c):
  ctrl_c(signal.SIG_IGN)
  with console.Interruption() as interruption:
    signal.raise_signal(signal.SIGINT)
    assert not interruption.received
    signal.raise_signal(signal.SIGTERM)
    assert interruption.received
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_asked_once_a_run_ends_its_step_asked_twice_it_stops(ctrl_c, capfd):
  ctrl_c(signal.default_int_handler)
  with console.Interruption() as interruption:
    signal.raise_signal(signal.SIGTERM)
    assert interruption.received == signal.SIGTERM
    assert 'stopping after this step' in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_short_work_shows_no_progress_and_long_work_does(monkeypatch, caplog):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])

  def items(seconds):
    for item in range(3):
      now[0] += seconds
      yield item

  with caplog.at_level(logging.INFO):
    assert list(progress.progress_bar(items(1), 3, 'short')) == [0, 1, 2]
    assert caplog.messages == []
    assert list(progress.progress_bar(items(4), 3, 'long')) == [0, 1, 2]
  assert caplog.messages == ['long: 2 of 3 (0.2/s)', 'long: 3 of 3 (0.2/s)']
