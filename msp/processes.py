"""Several processes, one run: all of them compute, the first one writes."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from msp.errors import UserError

T = TypeVar('T')


def is_first() -> bool:
  """Whether this process writes the files of the run."""
  return jax.process_index() == 0


def agreed(value: int) -> int:
  """The largest of the values that the processes call this with, ≥ 0."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def each_does(work: Callable[[], T]) -> T:
  """Runs `work` in every process; if it fails in one, all stop.

  Otherwise the others would wait for that one, and end with a time-out.

  Raises:
    Exception: what `work` raised in this process.
    UserError: it raised in another one.
  """
  result = error = None
  try:
    result = work()
  except Exception as e:
    error = e
  if agreed(error is not None):
    raise error or UserError('another process stopped; see its message')
  return result


def first_does(work: Callable[[], Any]) -> None:
  """Runs `work` in the first process while the others wait; raises as `each_does`."""
  each_does(work if is_first() else lambda: None)
