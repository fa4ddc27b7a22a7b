"""Progress: a bar on a terminal, a line every few seconds in a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 5.0

T = TypeVar('T')


def progress_bar(
  items: Iterable[T], total: int, what: str, show: bool = True
) -> Iterator[T]:
  """Yields `items` and shows how many of `total` are done, if they take seconds.

  Args:
    items: what to go through.
    total: how many there are.
    what: name of the work, e.g. 'rendering faces'.
    show: False yields silently.

  Yields:
    The items.
  """
  if not show:
    yield from items
  elif sys.stderr.isatty():
    yield from tqdm(items, total=total, desc=what, leave=False)
  else:
    started = reported = time.monotonic()
    for done, item in enumerate(items, 1):
      yield item
      now = time.monotonic()
      ended = done == total and now - started >= LOG_EVERY_SECONDS
      if ended or now - reported >= LOG_EVERY_SECONDS:
        reported = now
        rate = done / max(now - started, 1e-9)
        digits = 0 if rate >= 10 else 1
        logger.info('%s: %d of %d (%.*f/s)', what, done, total, digits, rate)
