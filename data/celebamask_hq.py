"""CelebAMask-HQ: 30,000 faces, masks of 18 parts, 40 attributes.

Published files (github.com/switchablenorms/CelebAMask-HQ), below one folder:

    CelebA-HQ-img/N.jpg
    CelebAMask-HQ-mask-anno/{0..14}/NNNNN_part.png    2,000 ids a folder
    CelebAMask-HQ-attribute-anno.txt                  count line optional

Label maps
  `parts` has 19 classes: the parts are painted over each other in the order
  and with the numbers of the publishers' merging script (g_mask.py), so hair,
  hat and clothes win over skin. Masks are reduced by nearest neighbour only.

  `segmentation` has 3 classes: background 0, hair 1, skin 2. The papers do not
  say how they derive it; here it is a lookup in `parts`: hair is hair; skin is
  the skin of the face with everything the published skin mask covers as well
  (eyes, brows, nose, mouth, lips, glasses); all else (ears, neck, hat,
  jewellery, clothes, scenery) is background.

Split
  Images in the order of the SHA-256 of their decimal number: the first 70 %
  are train, the next 15 % val, the rest test: 21,000 / 4,500 / 4,500 of the
  30,000. The same rule serves any other number of images. An image that is
  left out as corrupt does not move the others. The hold-out part is the last
  fraction of train in the same order.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from data.builder import FileBuilder, last_fraction
from data.errors import DataError
from data.files import read_image, read_mask, resize_label
from data.labels import Label

IMAGE_FOLDER = 'CelebA-HQ-img'
MASK_FOLDER = 'CelebAMask-HQ-mask-anno'
ATTRIBUTE_FILE = 'CelebAMask-HQ-attribute-anno.txt'
IDS_PER_FOLDER = 2000

# In painting order; class of a part = its position + 1.
PARTS = (
  'skin', 'nose', 'eye_g', 'l_eye', 'r_eye', 'l_brow', 'r_brow', 'l_ear',
  'r_ear', 'mouth', 'u_lip', 'l_lip', 'hair', 'hat', 'ear_r', 'neck_l', 'neck',
  'cloth',
)  # fmt: skip
PART_CLASSES = ('background', *PARTS)
FACE_PARTS = (
  'skin', 'nose', 'eye_g', 'l_eye', 'r_eye', 'l_brow', 'r_brow', 'mouth',
  'u_lip', 'l_lip',
)  # fmt: skip
SEGMENTATION_CLASSES = ('background', 'hair', 'skin')

# In the order of the attribute file.
ATTRIBUTES = (
  '5_o_Clock_Shadow', 'Arched_Eyebrows', 'Attractive', 'Bags_Under_Eyes',
  'Bald', 'Bangs', 'Big_Lips', 'Big_Nose', 'Black_Hair', 'Blond_Hair',
  'Blurry', 'Brown_Hair', 'Bushy_Eyebrows', 'Chubby', 'Double_Chin',
  'Eyeglasses', 'Goatee', 'Gray_Hair', 'Heavy_Makeup', 'High_Cheekbones',
  'Male', 'Mouth_Slightly_Open', 'Mustache', 'Narrow_Eyes', 'No_Beard',
  'Oval_Face', 'Pale_Skin', 'Pointy_Nose', 'Receding_Hairline', 'Rosy_Cheeks',
  'Sideburns', 'Smiling', 'Straight_Hair', 'Wavy_Hair', 'Wearing_Earrings',
  'Wearing_Hat', 'Wearing_Lipstick', 'Wearing_Necklace', 'Wearing_Necktie',
  'Young',
)  # fmt: skip

TERMS = 'for non-commercial research and educational purposes only'

LABELS: dict[str, Label] = {
  'segmentation': Label('segmentation', SEGMENTATION_CLASSES),
  'parts': Label('segmentation', PART_CLASSES),
} | {name.lower(): Label('attribute', ('no', 'yes')) for name in ATTRIBUTES}

_ATTRIBUTE_COLUMN = {name.lower(): i for i, name in enumerate(ATTRIBUTES)}
_MASK_NAME = re.compile(r'(\d+)_(\w+)\.png')


def _part_to_segmentation() -> np.ndarray:
  table = np.zeros(len(PART_CLASSES), np.int32)
  table[[PART_CLASSES.index(part) for part in FACE_PARTS]] = 2
  table[PART_CLASSES.index('hair')] = 1
  return table


def _mirrored_parts() -> np.ndarray:
  """Class of a pixel after a flip: left and right parts change places."""
  mirror = {'l_': 'r_', 'r_': 'l_'}
  table = np.arange(len(PART_CLASSES), dtype=np.uint8)
  for index, part in enumerate(PART_CLASSES):
    other = mirror.get(part[:2], '') + part[2:]
    if other in PART_CLASSES:
      table[index] = PART_CLASSES.index(other)
  return table


PART_TO_SEGMENTATION = _part_to_segmentation()
MIRRORED_PARTS = _mirrored_parts()


def image_path(source: Path, number: int) -> Path:
  """Where the picture of an image number is published."""
  return source / IMAGE_FOLDER / f'{number}.jpg'


def part_path(source: Path, number: int, part: str) -> Path:
  """Where the mask of one part is published."""
  folder = str(number // IDS_PER_FOLDER)
  return source / MASK_FOLDER / folder / f'{number:05d}_{part}.png'


class Entry(NamedTuple):
  """One image and where its labels are."""

  name: str
  image: Path
  parts: tuple[str, ...]  # parts that have a mask, in painting order
  attributes: np.ndarray | None  # (40,) uint8 in {0, 1}; None: no row


def split_numbers(numbers: Iterable[int]) -> dict[str, list[int]]:
  """Splits image numbers by the rule in the module's description.

  Args:
    numbers: distinct image numbers, in any order.

  Returns:
    `train`, `val` and `test`, each in the order of the hash.
  """
  order = sorted(
    numbers, key=lambda number: hashlib.sha256(str(number).encode()).digest()
  )
  train_end, val_end = len(order) * 70 // 100, len(order) * 85 // 100
  return {
    'train': order[:train_end],
    'val': order[train_end:val_end],
    'test': order[val_end:],
  }


def read_attributes(path: Path) -> dict[int, np.ndarray]:
  """Reads the attribute file, with or without its leading count line.

  Args:
    path: the file; columns may come in any order.

  Returns:
    image number -> (40,) uint8 in {0, 1}, in the order of `ATTRIBUTES`.

  Raises:
    DataError: the file is missing or breaks the format; names the line.
  """
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except FileNotFoundError:
    raise DataError(_missing_message(f'the file {path.name}', path)) from None
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f'cannot read attribute file {path}: {error}') from None
  count = None
  first = 0
  if lines and lines[0].strip().isdigit():
    count, first = int(lines[0]), 1
  header = lines[first].split() if len(lines) > first else []
  if sorted(header) != sorted(ATTRIBUTES):
    odd = sorted(set(header) ^ set(ATTRIBUTES))
    raise DataError(
      f'attribute file {path}, line {first + 1}: expected the'
      f' {len(ATTRIBUTES)} published column names, found {len(header)};'
      f' missing, unknown or repeated: {", ".join(odd[:4]) or "repeated name"}'
    )
  columns = [header.index(name) for name in ATTRIBUTES]
  rows = {}
  for line_number, line in enumerate(lines[first + 1 :], first + 2):
    name, *values = line.split() or ('',)
    if not name:
      continue
    stem, _, suffix = name.partition('.')
    if not stem.isdigit() or suffix != 'jpg':
      raise DataError(
        f'attribute file {path}, line {line_number}: {name!r} is no image name'
        ' of the form N.jpg'
      )
    if len(values) != len(ATTRIBUTES):
      raise DataError(
        f'attribute file {path}, line {line_number}: {len(values)} values,'
        f' expected {len(ATTRIBUTES)}'
      )
    if not set(values) <= {'-1', '1'}:
      wrong = next(value for value in values if value not in ('-1', '1'))
      raise DataError(
        f'attribute file {path}, line {line_number}: value {wrong!r}, expected -1 or 1'
      )
    rows[int(stem)] = np.array([values[column] == '1' for column in columns], np.uint8)
  if count is not None and count != len(rows):
    raise DataError(
      f'attribute file {path} announces {count} rows but has {len(rows)};'
      ' it may be truncated: replace it'
    )
  return rows


def scan(source: Path) -> dict[str, list[Entry]]:
  """Lists the images and labels below `source` without decoding them.

  An image that only the attribute file or only the image folder knows is
  listed, too: `read` tells what it lacks.

  Args:
    source: folder that holds `CelebA-HQ-img` and the others.

  Returns:
    Entries of `train`, `val` and `test`.

  Raises:
    DataError: a folder or the attribute file is missing, empty or malformed.
  """
  numbers = set()
  if (source / IMAGE_FOLDER).is_dir():
    numbers = {
      int(path.stem)
      for path in (source / IMAGE_FOLDER).iterdir()
      if path.suffix == '.jpg' and path.stem.isdigit()
    }
  if not numbers:
    raise DataError(
      _missing_message(f'the folder {IMAGE_FOLDER}', source / IMAGE_FOLDER)
    )
  if not (source / MASK_FOLDER).is_dir():
    raise DataError(_missing_message(f'the folder {MASK_FOLDER}', source / MASK_FOLDER))
  attributes = read_attributes(source / ATTRIBUTE_FILE)
  parts: dict[int, set[str]] = {}
  for folder in (source / MASK_FOLDER).iterdir():
    for name in os.listdir(folder) if folder.is_dir() else ():
      if match := _MASK_NAME.fullmatch(name):
        parts.setdefault(int(match[1]), set()).add(match[2])
  splits = split_numbers(numbers | attributes.keys())
  return {
    split: [
      Entry(
        str(number),
        image_path(source, number),
        tuple(part for part in PARTS if part in parts.get(number, ())),
        attributes.get(number),
      )
      for number in members
    ]
    for split, members in splits.items()
  }


def _missing_message(what: str, where: Path) -> str:
  return (
    f'CelebAMask-HQ: {what} is missing or empty, looked for at {where};'
    ' get the data set from github.com/switchablenorms/CelebAMask-HQ, or run on'
    ' the procedural stand-in instead: '
    'python launch.py --config configs/celeba_meta.py:procedural,tiny'
  )


def files(entry: Entry) -> list[Path]:
  """The picture and the masks that `read` looks at; attributes are in the entry."""
  source, number = entry.image.parent.parent, int(entry.name)
  return [entry.image, *(part_path(source, number, part) for part in entry.parts)]


def read(entry: Entry, image_size: tuple[int, int]) -> dict[str, object]:
  """Reads one image with its labels.

  Args:
    entry: from `scan`.
    image_size: (H, W) to resize to.

  Returns:
    `image` (H, W, 3) uint8, `parts` (H, W) uint8 classes 0..18, `attributes`
    (40,) uint8 in {0, 1}, `name`.

  Raises:
    DataError: a file is missing or unreadable, or the image has no attributes.
  """
  source, number = entry.image.parent.parent, int(entry.name)
  image = read_image(entry.image, image_size)
  if entry.attributes is None:
    raise DataError(f'image {entry.image} has no row in {source / ATTRIBUTE_FILE}')
  if 'skin' not in entry.parts:
    raise DataError(f'missing mask {part_path(source, number, "skin")}')
  parts = np.zeros(image_size, np.uint8)
  for part in entry.parts:
    mask = resize_label(read_mask(part_path(source, number, part)), image_size)
    parts[mask] = PART_CLASSES.index(part)
  return {
    'image': image,
    'parts': parts,
    'attributes': entry.attributes,
    'name': entry.name,
  }


def flip(record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Mirrors a record left to right; l_ and r_ parts change places."""
  return dict(record) | {
    'image': record['image'][:, ::-1],
    'parts': MIRRORED_PARTS[record['parts'][:, ::-1]],
  }


def task_labels(
  records: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> dict[str, np.ndarray]:
  """Labels of the named tasks from a batch of records.

  Args:
    records: stacked records: `parts` (B, H, W), `attributes` (B, 40).
    tasks: names out of `LABELS`.

  Returns:
    segmentations (B, H, W) int32 and attributes (B,) int32.
  """
  labels = {}
  for task in tasks:
    if task == 'parts':
      labels[task] = records['parts'].astype(np.int32)
    elif task == 'segmentation':
      labels[task] = PART_TO_SEGMENTATION[records['parts']]
    else:
      column = _ATTRIBUTE_COLUMN[task]
      labels[task] = records['attributes'][:, column].astype(np.int32)
  return labels


hold_out_mask = last_fraction


class CelebamaskHq(FileBuilder):
  """TFDS builder of CelebAMask-HQ; `manual_dir` is the published folder."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'Unpack CelebAMask-HQ (github.com/switchablenorms/CelebAMask-HQ) so that'
    f' manual_dir holds {IMAGE_FOLDER}, {MASK_FOLDER} and {ATTRIBUTE_FILE}.'
  )
  scan = staticmethod(scan)
  read = staticmethod(read)

  def label_features(self, image_size):
    """See `FileBuilder`."""
    return {
      'parts': tfds.features.Tensor(shape=image_size, dtype=np.uint8, encoding='bytes'),
      'attributes': tfds.features.Tensor(
        shape=(len(ATTRIBUTES),), dtype=np.uint8, encoding='bytes'
      ),
    }


BUILDER = CelebamaskHq
