"""Several processes: what stops one of them stops all."""

import pytest

from msp import processes
from msp.errors import UserError


def fail():
  raise OSError('the disk is full')


def test_what_fails_in_another_process_stops_this_one(monkeypatch):
  assert processes.each_does(lambda: 3) == 3
  with pytest.raises(OSError, match='the disk is full'):
    processes.each_does(fail)
  monkeypatch.setattr(processes, 'agreed', lambda failed: 1)
  with pytest.raises(OSError, match='the disk is full'):
    processes.each_does(fail)
  with pytest.raises(UserError, match='another process stopped; see its message'):
    processes.each_does(lambda: 3)


def test_only_the_first_process_does_what_it_does(monkeypatch):
  done = []
  processes.first_does(lambda: done.append(1))
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  processes.first_does(lambda: done.append(2))
  assert done == [1]
