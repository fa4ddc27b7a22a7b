"""The metric log: what is written, and what a resumed run finds of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from msp import writer
from msp.errors import UserError


def lines(workdir):
  return (workdir / writer.METRICS).read_text().splitlines()


def events(workdir):
  """(step, tag, value) of every scalar, oldest first, and the purge steps.

  Record: 8 bytes of length, 4 of checksum, the event, 4 of checksum.
  """
  scalars, purges = [], []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField('session_log'):
        purges.append(event.step)
      for value in event.summary.value:
        scalars.append((event.step, value.tag, value.simple_value))
  return scalars, purges


def test_rows_are_json_and_mirrored(tmp_path):
  with writer.MetricWriter(tmp_path, 0) as log:
    log.write(
      {
        'split': 'train',
        'step': 1,
        'loss': jnp.float32(0.5),
        'lambda': np.float64(1e-4),
      }
    )
    assert len(lines(tmp_path)) == 1  # flushed at once
    log.write(
      {
        'split': 'val',
        'step': np.int64(2),
        'loss': float('nan'),
        'score': np.inf,
        'alive_groups': {'stem': jnp.int32(3)},
      }
    )
  first, second = (json.loads(line) for line in lines(tmp_path))
  assert first == {'split': 'train', 'step': 1, 'loss': 0.5, 'lambda': 1e-4}
  assert second == {
    'split': 'val',
    'step': 2,
    'loss': None,
    'score': None,
    'alive_groups': {'stem': 3},
  }
  assert writer.read(tmp_path / writer.METRICS) == [first, second]
  scalars, _ = events(tmp_path)
  assert scalars == [
    (1, 'train/loss', 0.5),
    (1, 'train/lambda', pytest.approx(1e-4)),
    (2, 'val/alive_groups/stem', 3.0),
  ]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
  with writer.MetricWriter(tmp_path, 0) as log:
    for step in range(1, 6):
      log.write({'split': 'train', 'step': step, 'loss': 1 / step})
  before = lines(tmp_path)
  with (tmp_path / writer.METRICS).open('a') as file:
    file.write('{"split": "train", "step": 6, "lo')
  assert len(writer.read(tmp_path / writer.METRICS)) == 5
  with writer.MetricWriter(tmp_path, resume_step=3) as log:
    assert lines(tmp_path) == before[:3]
    log.write({'split': 'train', 'step': 4, 'loss': 1 / 4})
  assert lines(tmp_path) == before[:4]
  scalars, purges = events(tmp_path)
  assert purges[-1] == 4
  assert scalars[-1][:2] == (4, 'train/loss')
  assert not list(tmp_path.glob('.*.tmp'))


def test_a_last_row_without_newline_is_kept(tmp_path):
  path = tmp_path / writer.METRICS
  path.write_text('{"split": "train", "step": 1}')
  with writer.MetricWriter(tmp_path, resume_step=1) as log:
    log.write({'split': 'train', 'step': 2})
  assert [row['step'] for row in writer.read(path)] == [1, 2]


def test_a_new_run_starts_empty(tmp_path):
  with writer.MetricWriter(tmp_path, 0) as log:
    log.write({'split': 'train', 'step': 1, 'loss': 1.0})
  with writer.MetricWriter(tmp_path, 0):
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
  'damage',
  [
    '{"split": "tr',
    '[1, 2]',
    '{"step": 3}',
    '',
    '{"split": "val", "step": null}',
    '{"split": 1, "step": 1}',
    '{"split": "val", "step": 1, "loss": "high"}',
  ],
)
def test_damage_before_the_last_line_is_an_error(tmp_path, damage):
  path = tmp_path / writer.METRICS
  path.write_text(f'{{"split": "train", "step": 1}}\n{damage}\n{{}}\n')
  with pytest.raises(UserError, match=r'metrics.jsonl, line 2: not a row'):
    writer.MetricWriter(tmp_path, resume_step=5)
  assert damage in path.read_text()


def test_a_full_disk_does_not_stop_the_run_for_tensorboard(tmp_path):
  with writer.MetricWriter(tmp_path, 0) as log:
    events = log._events._py_recordio_writer
    with open('/dev/full', 'wb', buffering=0) as full:
      good, events._writer = events._writer, full
      with pytest.raises(OSError, match='No space left') as caught:
        log.write({'split': 'val', 'step': 1, 'loss': 0.5})
      events._writer = good
  assert caught.value.filename == str(tmp_path / 'tensorboard')


def test_a_full_disk_names_the_log(tmp_path):
  path = tmp_path / writer.METRICS
  log = writer.MetricWriter(tmp_path, 0)
  log._file.close()
  path.unlink()
  path.symlink_to('/dev/full')
  log._file = path.open('a')
  for step in (log.write, lambda _: log.__exit__()):
    with pytest.raises(OSError, match='No space left') as caught:
      step({'split': 'train', 'step': 1})
    assert caught.value.filename == str(path)


def test_test_rows_last_until_there_are_new_ones(tmp_path):
  rows = [{'split': split, 'step': 2, 'loss': 1.0} for split in ('train', 'test')]
  with writer.MetricWriter(tmp_path, 0) as log:
    for row in rows:
      log.write(row)
  log = writer.MetricWriter(tmp_path, 2)  # a finished run started again, and killed
  assert writer.read(tmp_path / writer.METRICS) == rows
  new = {'split': 'test', 'step': 2, 'loss': 0.5}
  log.write(new)
  assert writer.read(tmp_path / writer.METRICS) == [rows[0], new]
  log.write({'split': 'test_best', 'step': 1, 'loss': 0.4})
  assert len(lines(tmp_path)) == 3
  log.__exit__()


def test_a_number_that_json_does_not_have_is_kept_as_none(tmp_path):
  row = '{"split": "train", "step": 1, "loss": NaN}\n'  # of another program
  (tmp_path / writer.METRICS).write_text(row)
  with writer.MetricWriter(tmp_path, 1):
    pass
  assert json.loads(lines(tmp_path)[0])['loss'] is None
