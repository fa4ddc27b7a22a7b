"""A data set of your own: pictures, a class for each pixel, a label for each picture.

  DIR/train/frame1.jpg   the picture
  DIR/train/frame1.png   its classes: 0, 1, 2; 255 where there is none
  DIR/val/…, DIR/test/…

  python launch.py --config configs/camvid_multitask.py:tiny --workdir runs/own \
      --config.data.name=examples.own_data --config.data.source=DIR \
      --config.tasks="('segmentation','person')"

`data.name` is any module that Python can import; copy this one and change it. All that
is public here has to be there. The rest is done for it: a checked and resized copy,
made once, batches, hold-out part, missing labels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data.builder import FileBuilder, last_fraction
from data.errors import DataError
from data.files import read_image, read_label, resize_label
from data.labels import Label

CLASSES = ('background', 'person', 'vehicle')
# Every task that `tasks` may name; `Label` says which kinds there are.
LABELS = {
  'segmentation': Label('segmentation', CLASSES),
  'person': Label('attribute', ('no', 'yes')),
}
# Goes into the cards of exported networks.
TERMS = 'all rights reserved'


class Entry(NamedTuple):
  """One picture, as `scan` finds it."""

  name: str
  image: Path
  label: Path


def scan(source):
  """Source folder -> {'train' | 'val' | 'test': entries}, nothing decoded yet."""
  splits = {}
  for split in ('train', 'val', 'test'):
    images = sorted((source / split).glob('*.jpg'))
    if not images:
      raise DataError(f'there are no pictures in {source / split}')
    splits[split] = [Entry(i.stem, i, i.with_suffix('.png')) for i in images]
  return splits


def files(entry):
  """What `read` opens: a change of these files is noticed."""
  return [entry.image, entry.label]


def read(entry, image_size):
  """One record, resized to (H, W): `image`, `name`, and arrays of any other name."""
  label = read_label(entry.label)
  if not np.isin(label, (*range(len(CLASSES)), 255)).all():
    raise DataError(f'{entry.label} holds the value {label.max()}')
  return {
    'image': read_image(entry.image, image_size),
    'classes': resize_label(label, image_size),  # nearest: makes up no class
    'person': np.uint8((label == CLASSES.index('person')).any()),
    'name': entry.name,
  }


def flip(record):
  """A record mirrored left to right."""
  return record | {key: record[key][:, ::-1] for key in ('image', 'classes')}


def task_labels(records, tasks):
  """Stacked records -> the labels of the tasks, in the forms that `data` lists."""
  labels = {
    'segmentation': records['classes'].astype(np.int32),
    'person': records['person'].astype(np.int32),
  }
  return {task: labels[task] for task in tasks}


hold_out_mask = last_fraction


class OwnData(FileBuilder):
  """How the prepared copy is stored; a new VERSION makes it again."""

  VERSION = tfds.core.Version('1.0.0')
  scan = staticmethod(scan)
  read = staticmethod(read)

  def label_features(self, image_size):
    """The arrays of `read` besides `image` and `name`."""
    store = lambda *shape: tfds.features.Tensor(
      shape=shape, dtype=np.uint8, encoding='bytes'
    )
    return {'classes': store(*image_size), 'person': store()}


BUILDER = OwnData
