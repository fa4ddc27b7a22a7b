"""Several processes, one run: all of them compute, the first one writes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from msp.errors import UserError


def is_first() -> bool:
  """Whether this process writes the files of the run."""
  return jax.process_index() == 0


def agreed(value: int) -> int:
  """The largest of the values that the processes call this with, ≥ 0."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.process_allgather(np.int32(value)).max())


def first_does(work: Callable[[], Any]) -> None:
  """Runs `work` in the first process while the others wait.

  Raises:
    Exception: in the first process, what `work` raised.
    UserError: in the others, if it raised.
  """
  error = None
  if is_first():
    try:
      work()
    except Exception as e:
      error = e
  if agreed(error is not None):
    raise error or UserError('the first process stopped; see its message')
