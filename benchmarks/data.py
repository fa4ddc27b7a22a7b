"""Throughput of rendering, preparation and the input pipeline.

    python -m benchmarks.data

Prints, at 64 x 64 and 256 x 256: faces rendered and written per second (one
core), images checked, resized and written per second by `prepare`, images per
second out of the training iterator (batch 32, all flips, segmentation and two
attributes) and out of the evaluation batches.
"""

import tempfile
import time
from pathlib import Path

import data

TASKS = ('segmentation', 'male', 'smiling')
BATCH = 32


def rate(count, work):
  started = time.perf_counter()
  work()
  return count / (time.perf_counter() - started)


def measure(folder: Path, size: int, faces: int, steps: int) -> None:
  shape = (size, size)
  source, prepared = folder / f'faces{size}', folder / 'prepared'
  rendered = rate(
    faces,
    lambda: data.render_faces(source, faces, shape, seed=0, progress=False),
  )
  checked = rate(
    faces,
    lambda: data.prepare('celebamask_hq', source, prepared, shape, progress=False),
  )
  splits = data.open('celebamask_hq', prepared, shape, hold_out=0.1)
  batches = data.train_iterator(
    splits.train, TASKS, batch_size=BATCH, seed=0, flip=True
  )
  for _ in range(10):  # past what was prefetched
    next(batches)
  trained = rate(steps * BATCH, lambda: [next(batches) for _ in range(steps)])
  evaluated = rate(
    len(splits.train),
    lambda: list(data.eval_batches(splits.train, TASKS, batch_size=BATCH)),
  )
  print(
    f'{size} x {size}: {rendered:.0f} faces/s rendered, {checked:.0f} images/s'
    f' prepared, {trained:.0f} images/s training, {evaluated:.0f} images/s'
    ' evaluation'
  )


def main():
  with tempfile.TemporaryDirectory() as folder:
    measure(Path(folder), 64, faces=1000, steps=300)
    measure(Path(folder), 256, faces=300, steps=100)


if __name__ == '__main__':
  main()
