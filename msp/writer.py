"""The log of a run: JSON lines, mirrored as TensorBoard scalars."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from msp.errors import UserError, naming
from msp.workdir import write

METRICS = 'metrics.jsonl'


class MetricWriter:
  """Appends rows to `metrics.jsonl` and scalars to `tensorboard/` of a run.

  On resume, what a killed run wrote after its last checkpoint is dropped, so that
  the log is that of an uninterrupted run. Of the splits that are evaluated when a run
  ends the log holds one row each, the latest. Use as a context manager.
  """

  def __init__(self, workdir: Path, resume_step: int):
    """Opens the log.

    Args:
      workdir: of the run; exists.
      resume_step: the step the run continues from, 0 for a new one; later rows and
        a half-written last line are dropped.

    Raises:
      UserError: `metrics.jsonl` is damaged elsewhere than in its last line.
    """
    self._path = workdir / METRICS
    kept = [row for row in self._rows() if row['step'] <= resume_step]
    self._rewrite(map(_plain, kept))  # of NaN by another hand JSON would make none
    self._board = workdir / 'tensorboard'
    self._board.mkdir(exist_ok=True)
    # Not a SummaryWriter: its thread dies of a full disk, and then it waits for ever.
    with naming(self._board):
      self._events = EventsWriter(str(self._board / 'events'))
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._event(resume_step + 1, session_log=start)  # purges what came later

  def write(self, row: Mapping[str, Any]) -> None:
    """Adds one row and flushes it.

    Args:
      row: 'split', 'step', and scalars (Python, NumPy or JAX) or mappings of them.
        NaN and ±∞ are written as null: JSON has no word for them.
    """
    row = _plain(row)
    if row['split'] in ('train', 'val'):
      with naming(self._path):
        self._file.write(_line(row))
        self._file.flush()
        if row['split'] == 'val':  # a mounted bucket has nothing before
          os.fsync(self._file.fileno())
    else:
      self._file.close()
      self._rewrite([r for r in self._rows() if r['split'] != row['split']] + [row])
    with naming(self._board):
      for name, value in _flat(row['split'], row):
        if isinstance(value, int | float):
          self._event(row['step'], summary=scalar(name, value))
      if row['split'] != 'train':
        self._events.flush()

  def _rows(self):
    return read(self._path) if self._path.exists() else []

  def _rewrite(self, rows):
    write(self._path, ''.join(map(_line, rows)).encode())
    self._file = self._path.open('a')

  def _event(self, step, **content):
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    self._events.write_event(event)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with naming(self._board), closing(self._events), naming(self._path):
      self._file.close()


class SilentWriter:
  """In place of `MetricWriter` in all processes but the first."""

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes nothing."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


def read(path: Path) -> list[dict[str, Any]]:
  """The rows of a `metrics.jsonl`, in order, without a half-written last one.

  Raises:
    UserError: another line is not a row.
  """
  rows = []
  lines = _lines(path)
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if isinstance(row, dict) and _is_row(**row):
      rows.append(row)
    elif number < len(lines):
      raise UserError(f'{path}, line {number}: not a row of metrics; remove the line')
  return rows


def _is_row(split=None, step=None, **values):
  plain = all(isinstance(x, int | float | dict | None) for x in values.values())
  return isinstance(split, str) and isinstance(step, int) and plain


def _lines(path):
  return path.read_text(errors='replace').split('\n')


def _line(row):
  return json.dumps(row, allow_nan=False) + '\n'


def _plain(value):
  if isinstance(value, Mapping):
    return {name: _plain(entry) for name, entry in value.items()}
  if hasattr(value, 'item'):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _flat(prefix, values):
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(f'{prefix}/{name}', value)
    elif name not in ('split', 'step'):
      yield f'{prefix}/{name}', value
