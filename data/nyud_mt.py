"""NYU-v2 as NYUD_MT: 1,449 indoor pictures with four dense labels.

Files below one folder, in either of the two layouts in use, or mixed:

                           newer                    older (ASTMT)
    images/ID              .jpg                     .jpg
    segmentation/ID        .png                     .mat, variable `segmentation`
    depth/ID               .npy                     .mat, variable `depth`
    normals/ID             .npy, in [-1, 1]         .jpg, 2 v / 255 - 1
    edge/ID                .npy, in [0, 1]          .png, 0 and 255
    gt_sets/{train,val,test}.txt                    one ID a line

The suffix that is there tells which of the two a label file is; the newer wins.

Tasks
  `segmentation`: 40 classes. 1..40 in the files become 0..39, and 0, unlabelled,
  255 (ignore).

  `depth`: metres. What is not above 0 or not finite has no value and becomes 0; it
  is never clipped into a value.

  `normals`: unit vectors; x points along the rows, so a flip negates it. A vector
  that is not finite or shorter than 0.5 has no value and becomes (0, 0, 0), the
  others are made unit length. That is wide on purpose: where the older layout has no
  normal it is mid-grey, and JPEG spreads that around 0. (0, 0, -1) has a value.

  `edges`: 1 where the file has half of its full range or more, else 0.

  Pictures are resized with antialiasing; segmentation, depth and normals by nearest
  neighbour, so values and missing ones never mix; edges by maximum, which keeps thin
  ones whole (and makes edges more of all pixels, the more is reduced).

Split
  By the lists. The public package has train (795) and val (654) only: without
  test.txt, the list val.txt is test, and val is the first eighth of train.txt in the
  order of the SHA-256 of the IDs. Every part is stored in that order, and the
  hold-out part is the last fraction of train in it. IDs do not tell which pictures
  show the same room, so a room may be in train, in hold-out and in that val.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data.builder import FileBuilder, last_fraction
from data.errors import DataError
from data.files import (
  read_array,
  read_image,
  read_label,
  read_size,
  resize_by_maximum,
  resize_label,
)
from data.labels import Label

# Position in the list + 1 = class in the files.
CLASSES = (
  'wall', 'floor', 'cabinet', 'bed', 'chair', 'sofa', 'table', 'door', 'window',
  'bookshelf', 'picture', 'counter', 'blinds', 'desk', 'shelves', 'curtain',
  'dresser', 'pillow', 'mirror', 'floor mat', 'clothes', 'ceiling', 'books',
  'refrigerator', 'television', 'paper', 'towel', 'shower curtain', 'box',
  'whiteboard', 'person', 'night stand', 'toilet', 'sink', 'lamp', 'bathtub', 'bag',
  'otherstructure', 'otherfurniture', 'otherprop',
)  # fmt: skip
IMAGE_FOLDER = 'images'
LIST_FOLDER = 'gt_sets'
# Folders of labels, each with the suffix of the newer and of the older layout.
SUFFIXES = {
  'segmentation': ('.png', '.mat'),
  'depth': ('.npy', '.mat'),
  'normals': ('.npy', '.jpg'),
  'edge': ('.npy', '.png'),
}
MAX_DEPTH = 100.0  # metres; rooms are smaller, and millimetres larger
MIN_NORM = 0.5
MAX_COMPONENT = 1.01  # of a normal: 1, and what rounding adds
_MIRROR = np.array([-1, 1, 1], np.float32)

TERMS = 'no licence comes with its files; the terms are those of its authors'

LABELS: dict[str, Label] = {
  'segmentation': Label('segmentation', CLASSES),
  'depth': Label('depth', ('depth',)),
  'normals': Label('normals', ('x', 'y', 'z')),
  'edges': Label('edges', ('edge',)),
}


class Entry(NamedTuple):
  """One picture; its labels have the same name in the folders next to it."""

  name: str
  image: Path


def in_hash_order(names: Sequence[str]) -> list[str]:
  """Sorts IDs by their SHA-256."""
  return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def scan(source: Path) -> dict[str, list[Entry]]:
  """Lists the pictures named in the lists below `source`, without looking for them.

  Args:
    source: folder that holds `gt_sets`, `images` and the others.

  Returns:
    Entries of `train`, `val` and `test`, each in the order of the hash.

  Raises:
    DataError: a list is missing, unreadable or empty, or holds an ID that was listed
      before.
  """
  folder = source / LIST_FOLDER
  names = ('train', 'val', 'test')
  if not (folder / 'test.txt').exists():
    names = ('train', 'val')
  listed: dict[str, list[str]] = {}
  seen: dict[str, Path] = {}
  for name in names:
    path = folder / f'{name}.txt'
    listed[name] = in_hash_order(_read_list(path))
    for image in listed[name]:
      if image in seen:
        raise DataError(
          f'NYUD_MT: the ID {image} is listed in {seen[image]} and again in {path};'
          ' remove one of them'
        )
      seen[image] = path
  if 'test' not in listed:
    rest = listed['train']
    cut = len(rest) // 8
    listed = {'train': rest[cut:], 'val': rest[:cut], 'test': listed['val']}
  return {
    split: [Entry(name, source / IMAGE_FOLDER / f'{name}.jpg') for name in members]
    for split, members in listed.items()
  }


def _read_list(path: Path) -> list[str]:
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except FileNotFoundError:
    lines = []
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f'cannot read the list {path}: {error}') from None
  names = [line.strip() for line in lines if line.strip()]
  if not names:
    raise DataError(
      f'NYUD_MT: the list {path.name} is missing or empty, looked for at {path}; get'
      ' the data set from github.com/SimonVandenhende/Multi-Task-Learning-PyTorch'
      ' (newer layout) or github.com/facebookresearch/astmt (older), or run on the'
      ' procedural stand-in instead: '
      'python launch.py --config configs/nyud_meta.py:procedural,tiny'
    )
  return names


def files(entry: Entry) -> list[Path]:
  """Every file that `read` may look at, of both layouts."""
  return [entry.image, *(p for folder in SUFFIXES for p in _label_paths(entry, folder))]


def _label_paths(entry, folder):
  return [
    entry.image.parent.parent / folder / (entry.name + suffix)
    for suffix in SUFFIXES[folder]
  ]


def read(entry: Entry, image_size: tuple[int, int]) -> dict[str, object]:
  """Reads one picture with its labels.

  Args:
    entry: from `scan`.
    image_size: (H, W) to resize to.

  Returns:
    `image` (H, W, 3) uint8, `segmentation` (H, W) uint8 in 0..39 and 255, `depth`
    (H, W) float32 in metres or 0, `normals` (H, W, 3) float32 of length 1 or 0,
    `edges` (H, W) uint8 in {0, 1}, `name`.

  Raises:
    DataError: a file is missing or unreadable, holds values or an array of a shape
      that it must not, or picture and label differ in size.
  """
  image = read_image(entry.image, image_size)
  size = read_size(entry.image)
  segmentation, depth, normals, edges = (
    _read_label(entry, folder, size) for folder in SUFFIXES
  )
  return {
    'image': image,
    'segmentation': resize_label(segmentation, image_size),
    'depth': resize_label(depth, image_size),
    'normals': resize_label(normals, image_size),
    'edges': resize_by_maximum(edges, image_size),
    'name': entry.name,
  }


def _read_label(entry: Entry, folder: str, size: tuple[int, int]) -> np.ndarray:
  """The label of one folder as a record has it, but of the picture's own `size`."""
  paths = _label_paths(entry, folder)
  path = next((path for path in paths if path.exists()), None)
  if path is None:
    raise DataError(f'missing file {paths[0]} (or {paths[1].name})')
  if path.suffix == '.jpg':
    found = read_image(path, read_size(path))
  elif path.suffix == '.png':
    found = read_label(path)
  else:
    found = read_array(path, folder)
  axes = (3,) if folder == 'normals' else ()
  if found.ndim != 2 + len(axes) or found.shape[2:] != axes:
    raise DataError(
      f'{path} holds an array of the shape {found.shape}, expected'
      f' {(*size, *axes)}; replace the file'
    )
  if found.shape[:2] != size:
    raise DataError(
      f'label {path} is {found.shape[1]}x{found.shape[0]}, its picture {entry.image}'
      f' is {size[1]}x{size[0]}; replace the one that is wrong'
    )
  return _CONVERSIONS[folder](found, path)


def _segmentation(found: np.ndarray, path: Path) -> np.ndarray:
  wrong = ~((found >= 0) & (found <= len(CLASSES)) & (found == np.round(found)))
  _refuse(found, wrong, path, f'the whole numbers 0..{len(CLASSES)}')
  return found.astype(np.uint8) - np.uint8(1)  # 0 wraps to 255


def _depth(found: np.ndarray, path: Path) -> np.ndarray:
  depth = np.where(np.isfinite(found) & (found > 0), found, 0)
  _refuse(depth, depth > MAX_DEPTH, path, f'metres, up to {MAX_DEPTH:g}')
  return depth.astype(np.float32)


def _normals(found: np.ndarray, path: Path) -> np.ndarray:
  if path.suffix == '.jpg':
    found = 2 * found.astype(np.float32) / 255 - 1
  normals = np.where(np.isfinite(found).all(-1, keepdims=True), found, 0)
  _refuse(normals, np.abs(normals) > MAX_COMPONENT, path, 'components in [-1, 1]')
  normals = normals.astype(np.float32)
  norm = np.sqrt(np.square(normals).sum(-1, keepdims=True))
  known = norm >= MIN_NORM
  return np.where(known, normals / np.where(known, norm, 1), 0)


def _edges(found: np.ndarray, path: Path) -> np.ndarray:
  if path.suffix == '.png':
    # A file of two colours may have 1 for the second one.
    return (found >= (128 if found.max() > 1 else 1)).astype(np.uint8)
  _refuse(found, ~((found >= 0) & (found <= 1)), path, 'values in [0, 1]')
  return (found >= 0.5).astype(np.uint8)


def _refuse(found, wrong, path, expected) -> None:
  """DataError with the first of the wrong values, if there is one."""
  if wrong.any():
    value = float(found[wrong][0])
    raise DataError(f'{path} holds the value {value:g}, expected {expected}')


_CONVERSIONS = {
  'segmentation': _segmentation,
  'depth': _depth,
  'normals': _normals,
  'edge': _edges,
}


def flip(record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Mirrors a record left to right; the x of normals changes its sign."""
  mirrored = {
    key: record[key][:, ::-1] for key in ('image', 'segmentation', 'depth', 'edges')
  }
  return dict(record) | mirrored | {'normals': record['normals'][:, ::-1] * _MIRROR}


def task_labels(
  records: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> dict[str, np.ndarray]:
  """Labels of the named tasks from a batch of records.

  Args:
    records: stacked records: `segmentation`, `depth` and `edges` (B, H, W),
      `normals` (B, H, W, 3).
    tasks: names out of `LABELS`.

  Returns:
    segmentation (B, H, W) int32, depth (B, H, W) float32, normals (B, H, W, 3)
    float32, edges (B, H, W) float32.
  """
  types = {'segmentation': np.int32}
  return {task: records[task].astype(types.get(task, np.float32)) for task in tasks}


hold_out_mask = last_fraction


class NyudMt(FileBuilder):
  """TFDS builder of NYUD_MT; `manual_dir` is the published folder."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Unpack NYUD_MT (github.com/SimonVandenhende/Multi-Task-Learning-PyTorch or'
    f' github.com/facebookresearch/astmt) so that manual_dir holds {LIST_FOLDER},'
    f' {IMAGE_FOLDER} and the folders of labels.'
  )
  scan = staticmethod(scan)
  read = staticmethod(read)

  def label_features(self, image_size):
    """See `FileBuilder`."""
    tensor = lambda dtype, *axes: tfds.features.Tensor(
      shape=(*image_size, *axes), dtype=dtype, encoding='bytes'
    )
    return {
      'segmentation': tensor(np.uint8),
      'depth': tensor(np.float32),
      'normals': tensor(np.float32, 3),
      'edges': tensor(np.uint8),
    }


BUILDER = NyudMt
