"""What a person sees while a run goes on: a bar on a terminal, lines in a log."""

import contextlib
import logging
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from msp import processes

logger = logging.getLogger(__name__)


class Bar:
  """Progress of the training steps.

  On a terminal a bar that keeps λ, sparsity and losses beside it; otherwise a
  line about every ten seconds.
  """

  def __init__(self, start: int, total: int):
    self._terminal = sys.stderr.isatty() and processes.is_first()
    self._bar = tqdm(
      initial=start,
      total=total,
      unit='step',
      dynamic_ncols=True,
      disable=not self._terminal,
    )
    self._total = total
    self._said = self._last = time.monotonic()
    self._compiled = False
    # Of the latest steps; their median leaves compiling and evaluating out.
    self._seconds = deque(maxlen=50)

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._bar.close()

  def advance(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows one step's numbers."""
    self._bar.update(1)
    now = time.monotonic()
    elapsed, self._last = now - self._last, now
    first, self._compiled = not self._compiled, True
    if not first:
      self._seconds.append(elapsed)
    if now - self._said < (0.5 if self._terminal else 10):
      return
    self._said = now
    text = describe(metrics)
    if self._terminal:
      self._bar.set_postfix_str(text)
    elif first:
      logger.info('compiled, and did step %d, in %d s: %s', step, elapsed, text)
    else:
      rate = statistics.median(self._seconds)
      left = (self._total - step) * rate
      logger.info(
        'step %d/%d, %.2f s/step, %d s left: %s', step, self._total, rate, left, text
      )

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    if self._terminal:
      self._bar.write(text, file=sys.stderr)
    else:
      logger.info('%s', text)


def describe(metrics: Mapping[str, Any]) -> str:
  """Loss, λ and sparsity of one step, in one line."""
  parts = [f'loss {float(metrics["loss"]):.3f}']
  if 'hold_out_loss' in metrics:
    parts.append(f'hold-out {float(metrics["hold_out_loss"]):.3f}')
  if 'lambda' in metrics:
    parts.append(f'λ {float(np.mean(metrics["lambda"])):.2e}')
  parts.append(f'dead groups {100 * float(metrics["group_sparsity"]):.1f} %')
  return ', '.join(parts)


class Clock:
  """Wall time for each step since it was last asked or reset."""

  def __init__(self, step: int):
    self.reset(step)

  def reset(self, step: int) -> None:
    """Starts anew, so that evaluations and checkpoints do not count."""
    self._time, self._step = time.monotonic(), step

  def per_step(self, step: int) -> float:
    """Seconds for each step since the last call."""
    elapsed, steps = time.monotonic() - self._time, step - self._step
    self.reset(step)
    return elapsed / max(steps, 1)


class Interruption:
  """Turns SIGTERM and Ctrl-C into a wish that the loop grants after its step.

  One that a shell has ignored, as Ctrl-C of what it runs in the background, stays so.
  """

  signals = (signal.SIGTERM, signal.SIGINT)

  def __enter__(self):
    self.received = 0
    heard = [s for s in self.signals if signal.getsignal(s) is not signal.SIG_IGN]
    self._previous = {s: signal.signal(s, self._note) for s in heard}
    return self

  def __exit__(self, *exc):
    for s, handler in self._previous.items():
      signal.signal(s, handler)

  def _note(self, number, frame):
    del frame
    if self.received:  # asked twice: now
      raise KeyboardInterrupt
    self.received = number
    # Not by a logger or the bar, which may be in the middle of a line.
    with contextlib.suppress(OSError):  # closed
      os.write(2, b'\nstopping after this step; asked again, at once\n')
