"""From a prepared data set to batches, with grain.

Flips act on single stored records, everything else on whole batches: labels of the
tasks, images to float32 in [0, 1].
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from data.errors import DataError
from data.labels import NO_LABEL
from data.preparation import damaged, data_set, prepared_folder, read_summary

Batch = dict[str, np.ndarray]

# Whole batches in flight; at 256 x 256 and 32 images one takes 25 MB.
READ_OPTIONS = grain.ReadOptions(
  num_threads=max(4, min(16, os.cpu_count() or 1)), prefetch_buffer_size=8
)


class Source:
  """Random access to the stored records of one part of a data set."""

  def __init__(
    self, name: str, records: Sequence, indices: np.ndarray, stand_in: bool = False
  ):
    self.name = name
    self._records = records
    self.indices = indices  # positions in the stored split
    self.stored = len(records)  # images of the whole split
    self.stand_in = stand_in  # whether its pictures were drawn by a renderer

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self._records[int(self.indices[index])]


class _Stored(NamedTuple):
  """The records of a split; one that cannot be read is an error naming the folder."""

  records: Sequence
  folder: Path

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    try:
      return self.records[index]
    except Exception as error:  # ArrayRecord has no errors of its own
      raise damaged(self.folder, error) from None


class Splits(NamedTuple):
  """The parts of a data set; `hold_out` is None if nothing is held out."""

  train: Source
  hold_out: Source | None
  val: Source
  test: Source

  def with_hold_out(self, share: float, seed: int) -> Source:
    """Train with a share of the hold-out part, drawn as `train_share` is."""
    if self.hold_out is None:
      return self.train
    more = _share(self.hold_out.indices, share, seed)
    indices = np.sort(np.concatenate([self.train.indices, more]))
    train = self.train
    return Source(train.name, train._records, indices, train.stand_in)


def open(
  name: str,
  prepared: Path | str,
  image_size: tuple[int, int],
  hold_out: float,
  *,
  train_share: float = 1.0,
  seed: int = 0,
) -> Splits:
  """Opens a prepared data set.

  Args:
    name: of the data set; see `preparation.data_set`.
    prepared: folder under which it was built.
    image_size: (H, W) it was built with.
    hold_out: fraction of train that is kept apart to train the sparsity
      coefficient on, by the rule of the data set's module; 0: none.
    train_share: fraction of the other train images to use, in (0, 1], drawn by
      `seed`; at least one image. A smaller share is a part of a larger one.
    seed: 0 to 2**32 - 1.

  Returns:
    Random-access sources of train, hold_out, val and test.

  Raises:
    DataError: not prepared or damaged; `hold_out` leaves a part empty;
      `train_share` is out of range.
  """
  if not 0 < train_share <= 1:
    raise DataError(f'the train share is {train_share}, must be above 0 and at most 1')
  folder = prepared_folder(name, prepared, image_size)
  if not folder.exists():
    raise DataError(
      f'{name} is not prepared at {image_size[0]}x{image_size[1]}, looked for at'
      f' {folder}; run launch.py with the same --config and --mode prepare'
    )
  summary = read_summary(folder)
  try:
    builder = tfds.builder_from_directory(folder)
    records = {
      split: _Stored(builder.as_data_source(split), folder)
      for split in summary['names']
    }
  except Exception as error:
    raise damaged(folder, error) from error
  held_out = data_set(name).hold_out_mask(summary['names']['train'], hold_out)
  if hold_out and (held_out.all() or not held_out.any()):
    raise DataError(
      f'holding out the fraction {hold_out} of {len(held_out)} train images of'
      f' {name} leaves one part empty; choose another fraction'
    )
  train = _share(np.flatnonzero(~held_out), train_share, seed)
  drawn = summary['stand_in'] is not None
  part = lambda split, indices: Source(name, records[split], indices, drawn)
  return Splits(
    train=part('train', train),
    hold_out=part('train', np.flatnonzero(held_out)) if hold_out else None,
    val=part('val', np.arange(len(records['val']))),
    test=part('test', np.arange(len(records['test']))),
  )


def train_iterator(
  source: Source,
  tasks: Sequence[str],
  *,
  batch_size: int,
  seed: int,
  flip: bool,
  missing: float = 0.0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless shuffled batches; position can be saved and restored exactly.

  Every epoch is a new permutation of the source; batches run on over the end of
  an epoch, so none is short and no image is left out (there, and where the source is
  smaller than a batch, one can hold an image twice). The global batch, its
  order and its flips do not depend on the number of processes.

  Args:
    source: from `open`.
    tasks: names of the labels to yield.
    batch_size: images in the global batch, over all processes.
    seed: of order, flips and missing labels, 0 to 2**32 - 1.
    flip: whether to mirror half of the images, with their labels.
    missing: share of the images that lack the label of one task, in [0, 1): all of
      it is `NO_LABEL`. Which images, and which task each of them lacks, is the same
      in every epoch.
    process_index: this process.
    process_count: number of processes; divides `batch_size`.

  Returns:
    Iterator with `get_state` and `set_state`. Yields this process's rows of
    `image` (B, H, W, 3) float32 in [0, 1], one array per task, and `valid`
    (B,) bool, all True.

  Raises:
    DataError: unknown task, empty source, an impossible batch size or share of
      missing labels.
  """
  local_size = _local_batch_size(source, tasks, batch_size, process_count)
  if not 0 <= missing < 1:
    raise DataError(
      f'the share of missing labels is {missing}, must be at least 0 and below 1'
    )
  if missing:
    source = _Incomplete(source, tasks, missing, seed)
  dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  if flip:
    dataset = dataset.random_map(_RandomFlip(source.name))
  dataset = dataset.batch(local_size)[process_index::process_count]
  dataset = dataset.map(lambda records: _batch(source.name, records, tasks))
  return iter(dataset.to_iter_dataset(READ_OPTIONS))


def eval_batches(
  source: Source,
  tasks: Sequence[str],
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
) -> Iterator[Batch]:
  """Every image once, in stored order, none left out.

  Args:
    source: from `open`.
    tasks: names of the labels to yield.
    batch_size: images in the global batch, over all processes.
    process_index: this process.
    process_count: number of processes; divides `batch_size`.
    limit: only the first `limit` images.

  Returns:
    Iterator of batches as in `train_iterator`; all have the same shape and all
    processes yield the same number. Rows with `valid` False fill up the last.

  Raises:
    DataError: unknown task, empty source, or an impossible batch size.
  """
  local_size = _local_batch_size(source, tasks, batch_size, process_count)
  total = len(source) if limit is None else min(limit, len(source))

  def batch(start):
    rows = np.arange(start, start + local_size)
    valid = rows < total
    # Padding repeats the last image: any row of the right shape will do.
    records = [source[row] for row in np.minimum(rows, total - 1)]
    stacked = {key: np.stack([record[key] for record in records]) for key in records[0]}
    return _batch(source.name, stacked, tasks) | {'valid': valid}

  first = process_index * local_size
  starts = grain.MapDataset.range(first, first + total, batch_size)
  return iter(starts.map(batch).to_iter_dataset(READ_OPTIONS))


# In a record or a batch of them: position of the task without a label, -1: none.
_MISSING = '_missing'


class _Incomplete(Source):
  """A part of a data set where some images lack the label of one task."""

  def __init__(self, source: Source, tasks: Sequence[str], share: float, seed: int):
    if len(tasks) < 2:
      raise DataError(
        f'a share of {share} of the labels is to be missing, but {tasks[0]} is the'
        ' only task: images without any label would remain'
      )
    super().__init__(source.name, source._records, source.indices)
    # Chosen from all stored images, so that those of other parts change nothing.
    draws = _draws(seed, np.arange(source.stored))
    chosen = np.argsort(draws[:, 1])[: round(share * source.stored)]
    missing = np.full(source.stored, -1)
    missing[chosen] = draws[chosen, 2] * len(tasks)
    self._missing = missing[source.indices]

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return super().__getitem__(index) | {_MISSING: self._missing[index]}


def _share(indices: np.ndarray, share: float, seed: int) -> np.ndarray:
  """A share of some stored positions, in order, at least one."""
  order = np.argsort(_draws(seed, indices)[:, 0])
  return np.sort(indices[order[: max(1, round(share * len(indices)))]])


def _draws(seed: int, indices: np.ndarray) -> np.ndarray:
  """Random numbers in [0, 1) of images, (n, 3): a stored position has its own.

  For what is fixed through a run: a column for the train share, for the images with
  a missing label, and for the task that they lack.
  """
  return np.random.default_rng(seed).random((indices.max() + 1, 3))[indices]


class _RandomFlip(grain.transforms.RandomMap):
  """Mirrors half of the records; grain seeds each one by its position."""

  def __init__(self, name: str):
    self._flip = data_set(name).flip

  def random_map(
    self, element: Mapping[str, np.ndarray], rng: np.random.Generator
  ) -> Mapping[str, np.ndarray]:
    return self._flip(element) if rng.random() < 0.5 else element


def _batch(name: str, records: Mapping[str, Any], tasks: Sequence[str]) -> Batch:
  image = np.multiply(records['image'], np.float32(1 / 255), dtype=np.float32)
  labels = data_set(name).task_labels(records, tasks)
  if _MISSING in records:
    known = data_set(name).LABELS
    for position, task in enumerate(tasks):
      label = labels[task]
      missing = records[_MISSING] == position
      missing = missing.reshape(-1, *(1 for _ in label.shape[1:]))
      no_label = label.dtype.type(NO_LABEL[known[task].kind])
      labels[task] = np.where(missing, no_label, label)
  return {'image': image, 'valid': np.ones(len(image), bool)} | labels


def _local_batch_size(
  source: Source, tasks: Sequence[str], batch_size: int, process_count: int
) -> int:
  known = data_set(source.name).LABELS
  for task in tasks:
    if task not in known:
      raise DataError(
        f'unknown task {task!r} of {source.name}, known: {", ".join(known)}'
      )
  if not len(source):
    raise DataError(f'a part of {source.name} holds no images')
  if batch_size < 1 or batch_size % process_count:
    raise DataError(
      f'batch size {batch_size} must be a positive multiple of the'
      f' {process_count} processes'
    )
  return batch_size // process_count
