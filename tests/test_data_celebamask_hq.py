"""CelebAMask-HQ: split, label maps, attribute file."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data import DataError, celebamask_hq, labels
from data.celebamask_hq import ATTRIBUTES, PART_CLASSES


def test_split_of_the_published_30000():
  splits = celebamask_hq.split_numbers(range(30_000))
  assert [len(v) for v in splits.values()] == [21_000, 4_500, 4_500]
  everything = [number for part in splits.values() for number in part]
  assert sorted(everything) == list(range(30_000))
  # The rule, restated: ranks of SHA-256 of the decimal number.
  digests = [hashlib.sha256(b'%d' % number).hexdigest() for number in everything]
  assert digests == sorted(digests)


def test_split_does_not_depend_on_the_order_of_listing():
  numbers = np.random.default_rng(0).permutation(500).tolist()
  assert celebamask_hq.split_numbers(numbers) == celebamask_hq.split_numbers(range(500))
  assert [len(part) for part in celebamask_hq.split_numbers(range(10)).values()] == [
    7,
    1,
    2,
  ]


def test_split_is_frozen():
  # A changed rule would silently move test images into train.
  splits = celebamask_hq.split_numbers(range(30_000))
  digest = hashlib.sha256(repr(splits).encode()).hexdigest()
  assert digest[:16] == 'f77b16ba126581cc'


def test_hold_out_is_the_end_of_train():
  mask = celebamask_hq.hold_out_mask(['x'] * 10, 0.3)
  assert mask.tolist() == [False] * 7 + [True] * 3
  assert not celebamask_hq.hold_out_mask(['x'] * 10, 0.0).any()


def test_class_order_is_the_published_one():
  known = labels('celebamask_hq')
  assert known['parts'].classes[:7] == (
    'background', 'skin', 'nose', 'eye_g', 'l_eye', 'r_eye', 'l_brow',
  )  # fmt: skip
  assert known['parts'].classes[13:] == (
    'hair', 'hat', 'ear_r', 'neck_l', 'neck', 'cloth',
  )  # fmt: skip
  assert known['segmentation'].classes == ('background', 'hair', 'skin')
  assert len(known) == 42
  assert known['arched_eyebrows'].kind == 'attribute'


@pytest.fixture
def source(tmp_path):
  """Two hand-made images, 4 x 4, with masks of 8 x 8 as in the originals."""
  (tmp_path / 'CelebA-HQ-img').mkdir()
  masks = tmp_path / 'CelebAMask-HQ-mask-anno' / '0'
  masks.mkdir(parents=True)
  for number in range(2):
    Image.new('RGB', (4, 4), (10, 20, 30)).save(
      tmp_path / 'CelebA-HQ-img' / f'{number}.jpg'
    )
    Image.new('L', (8, 8), 255).save(masks / f'{number:05d}_skin.png')
  write_attributes(tmp_path, {0: {'Male'}, 1: {'Young', 'Smiling'}})
  return tmp_path


def write_attributes(source, rows, columns=ATTRIBUTES, count=True):
  lines = [str(len(rows))] * count + [' '.join(columns)]
  for number, present in rows.items():
    values = ' '.join('1' if c in present else '-1' for c in columns)
    lines.append(f'{number}.jpg {values}')
  path = source / 'CelebAMask-HQ-attribute-anno.txt'
  path.write_text('\n'.join(lines) + '\n')
  return path


def entry(source, number):
  found = [e for part in celebamask_hq.scan(source).values() for e in part]
  return next(e for e in found if e.name == str(number))


def paint(source, number, part, rows):
  mask = np.zeros((8, 8), np.uint8)
  mask[rows] = 255
  Image.fromarray(mask).save(
    source / f'CelebAMask-HQ-mask-anno/0/{number:05d}_{part}.png'
  )


def test_parts_are_painted_in_the_published_order(source):
  # cloth over neck over hair over skin; eyes over glasses over skin.
  paint(source, 0, 'cloth', np.s_[6:])
  paint(source, 0, 'neck', np.s_[4:])
  paint(source, 0, 'hair', np.s_[2:])
  paint(source, 1, 'l_eye', np.s_[2:])
  paint(source, 1, 'eye_g', np.s_[0:])
  first = celebamask_hq.read(entry(source, 0), (4, 4))['parts']
  second = celebamask_hq.read(entry(source, 1), (4, 4))['parts']
  assert [PART_CLASSES[c] for c in first[:, 0]] == [
    'skin', 'hair', 'neck', 'cloth',
  ]  # fmt: skip
  assert [PART_CLASSES[c] for c in second[:, 0]] == [
    'eye_g', 'l_eye', 'l_eye', 'l_eye',
  ]  # fmt: skip


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA'])
def test_masks_of_every_image_mode(source, mode):
  mask = np.zeros((8, 8), np.uint8)
  mask[4:] = 255
  path = source / 'CelebAMask-HQ-mask-anno/0/00000_hair.png'
  Image.fromarray(mask).convert('RGB').convert(mode).save(path)
  parts = celebamask_hq.read(entry(source, 0), (4, 4))['parts']
  assert parts[:, 0].tolist() == [1, 1, 13, 13]


def test_three_classes_follow_the_nineteen():
  parts = np.arange(19, dtype=np.uint8).reshape(1, 1, 19)
  found = celebamask_hq.task_labels({'parts': parts}, ['segmentation', 'parts'])
  assert found['segmentation'].dtype == found['parts'].dtype == np.int32
  for part, value in zip(PART_CLASSES, found['segmentation'][0, 0], strict=True):
    if part == 'hair':
      assert value == 1
    elif part in ('background', 'l_ear', 'r_ear', 'ear_r', 'hat', 'neck',
                  'neck_l', 'cloth'):  # fmt: skip
      assert value == 0
    else:
      assert value == 2, part


def test_flip_swaps_left_and_right_parts():
  names = ('l_eye', 'r_eye', 'l_brow', 'l_ear', 'l_lip', 'u_lip', 'hair')
  record = {
    'image': np.arange(21, dtype=np.uint8).reshape(1, 7, 3),
    'parts': np.array([[PART_CLASSES.index(n) for n in names]], np.uint8),
    'attributes': np.arange(40),
  }
  flipped = celebamask_hq.flip(record)
  # The lower lip is called l_lip: it is no left part.
  assert [PART_CLASSES[c] for c in flipped['parts'][0]] == [
    'hair', 'u_lip', 'l_lip', 'r_ear', 'r_brow', 'l_eye', 'r_eye',
  ]  # fmt: skip
  np.testing.assert_array_equal(flipped['image'], record['image'][:, ::-1])
  np.testing.assert_array_equal(flipped['attributes'], record['attributes'])
  twice = celebamask_hq.flip(flipped)
  np.testing.assert_array_equal(twice['parts'], record['parts'])


@pytest.mark.parametrize('count', [True, False])
def test_attribute_file_with_and_without_count_line(source, count):
  columns = tuple(reversed(ATTRIBUTES))
  path = write_attributes(source, {7: {'Young', 'Bald'}}, columns, count)
  rows = celebamask_hq.read_attributes(path)
  present = {n for n, v in zip(ATTRIBUTES, rows[7], strict=True) if v}
  assert present == {'Young', 'Bald'}


def edited(path, edit):
  path.write_text(edit(path.read_text()))


@pytest.mark.parametrize(
  ('edit', 'words'),
  [
    (lambda t: t.replace('Male', 'Man'), ['line 2', '40', 'Male', 'Man']),
    (lambda t: t.replace(' Young', ''), ['line 2', 'found 39', 'Young']),
    (lambda t: t.rstrip() + ' 1\n', ['line 4', '41 values, expected 40']),
    (lambda t: t.replace('-1', '0', 1), ['line 3', "value '0'", '-1 or 1']),
    (lambda t: '3' + t[1:], ['announces 3 rows but has 2']),
    (lambda t: t.replace('1.jpg', 'one.jpg'), ['line 4', "'one.jpg'"]),
    (lambda t: '', ['line 1', 'found 0']),
  ],
)
def test_malformed_attribute_file(source, edit, words):
  path = source / 'CelebAMask-HQ-attribute-anno.txt'
  edited(path, edit)
  with pytest.raises(DataError) as error:
    celebamask_hq.scan(source)
  message = str(error.value)
  assert '\n' not in message
  for word in [str(path), *words]:
    assert word in message


@pytest.mark.parametrize(
  'missing',
  [
    'CelebA-HQ-img',
    'CelebAMask-HQ-mask-anno',
    'CelebAMask-HQ-attribute-anno.txt',
  ],
)
def test_missing_data_message_says_all_four_things(source, missing):
  (source / missing).rename(source / 'elsewhere')
  with pytest.raises(DataError) as error:
    celebamask_hq.scan(source)
  message = str(error.value)
  assert '\n' not in message
  for words in (
    missing,
    f'looked for at {source / missing}',
    'github.com/switchablenorms/CelebAMask-HQ',
    'python launch.py --config configs/celeba_meta.py:procedural,tiny',
  ):
    assert words in message


def test_empty_and_absent_source(tmp_path):
  (tmp_path / 'CelebA-HQ-img').mkdir()
  for folder in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(DataError, match='missing or empty'):
      celebamask_hq.scan(folder)


def test_unusable_images_are_named(source):
  write_attributes(source, {0: set(), 9: set()})
  with pytest.raises(DataError, match=r'1\.jpg has no row in'):
    celebamask_hq.read(entry(source, 1), (4, 4))
  with pytest.raises(DataError, match=r'missing file .*9\.jpg'):
    celebamask_hq.read(entry(source, 9), (4, 4))
  (source / 'CelebAMask-HQ-mask-anno/0/00000_skin.png').unlink()
  with pytest.raises(DataError, match=r'missing mask .*00000_skin\.png'):
    celebamask_hq.read(entry(source, 0), (4, 4))


@pytest.mark.parametrize('keep', [0, 100, 0.7])
def test_truncated_image(source, keep):
  path = source / 'CelebA-HQ-img/0.jpg'
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(path)
  content = path.read_bytes()
  size = int(keep * len(content)) if isinstance(keep, float) else keep
  path.write_bytes(content[:size])
  for image_size in ((4, 4), (64, 64)):
    with pytest.raises(DataError, match=r'unreadable image .*0\.jpg'):
      celebamask_hq.read(entry(source, 0), image_size)


def test_truncated_mask(source):
  path = source / 'CelebAMask-HQ-mask-anno/0/00000_skin.png'
  noise = np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8)
  Image.fromarray(noise * np.uint8(255)).save(path)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(DataError, match=r'unreadable image .*00000_skin\.png'):
    celebamask_hq.read(entry(source, 0), (4, 4))
