"""NYU-v2: both layouts, resizing that makes nothing up, lists, bad files."""

import re

import numpy as np
import pytest
import scipy.io
from PIL import Image

import data
from data import DataError, nyud_mt
from data.files import resize_by_maximum, resize_label

SIZE = (12, 16)
KEYS = ('image', 'segmentation', 'depth', 'normals', 'edges')


def labels(rng, size=SIZE):
  """Labels of one picture as the newer layout has them."""
  raw = rng.integers(0, 41, size).astype(np.uint8)
  depth = rng.uniform(0.5, 9, size).astype(np.float32)
  depth[rng.random(size) < 0.2] = 0
  normals = rng.standard_normal((*size, 3)).astype(np.float32)
  normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
  normals[rng.random(size) < 0.2] = 0
  edges = (rng.random(size) < 0.1).astype(np.float32)
  return {'segmentation': raw, 'depth': depth, 'normals': normals, 'edge': edges}


def write(source, name, found, *, older=False):
  for folder in ('images', *nyud_mt.SUFFIXES):
    (source / folder).mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  picture = rng.integers(0, 256, (*found['depth'].shape, 3), np.uint8)
  Image.fromarray(picture).save(source / f'images/{name}.jpg')
  path = lambda folder, suffix: source / folder / f'{name}.{suffix}'
  if not older:
    Image.fromarray(found['segmentation']).save(path('segmentation', 'png'))
    for folder in ('depth', 'normals', 'edge'):
      np.save(path(folder, 'npy'), found[folder])
    return
  for folder in ('segmentation', 'depth'):
    scipy.io.savemat(path(folder, 'mat'), {folder: found[folder]})
  Image.fromarray(in_bytes(found['normals'])).save(
    path('normals', 'jpg'), quality=100, subsampling=0
  )
  Image.fromarray((255 * found['edge']).astype(np.uint8)).save(path('edge', 'png'))


def in_bytes(normals):
  return np.round((normals + 1) * 127.5).astype(np.uint8)


def write_lists(source, **lists):
  (source / 'gt_sets').mkdir(exist_ok=True)
  for name, ids in lists.items():
    (source / f'gt_sets/{name}.txt').write_text('\n'.join(ids) + '\n')


@pytest.fixture
def source(tmp_path):
  """One picture, `a`, in the newer layout."""
  write(tmp_path, 'a', labels(np.random.default_rng(0)))
  return tmp_path


def read(source, size=SIZE, name='a'):
  return nyud_mt.read(nyud_mt.Entry(name, source / f'images/{name}.jpg'), size)


def fails(source, *words, call=read):
  with pytest.raises(DataError) as error:
    call(source)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert str(word) in message
  return message


def stacked(*records):
  return {key: np.stack([record[key] for record in records]) for key in KEYS}


def test_classes():
  known = data.labels('nyud_mt')
  classes = known['segmentation'].classes
  assert len(classes) == len(set(classes)) == 40
  for raw, name in ((1, 'wall'), (5, 'chair'), (22, 'ceiling'), (40, 'otherprop')):
    assert classes[raw - 1] == name
  assert {name: label.kind for name, label in known.items()} == {
    'segmentation': 'segmentation',
    'depth': 'depth',
    'normals': 'normals',
    'edges': 'edges',
  }


def test_a_record_is_what_the_files_say(source):
  found = labels(np.random.default_rng(0))
  record = read(source)
  types = [record[key].dtype for key in KEYS]
  assert types == [np.uint8, np.uint8, np.float32, np.float32, np.uint8]
  raw = found['segmentation']
  assert (raw == 0).any()
  expected = np.where(raw == 0, 255, raw.astype(int) - 1)
  np.testing.assert_array_equal(record['segmentation'], expected)
  np.testing.assert_array_equal(record['depth'], found['depth'])
  np.testing.assert_allclose(record['normals'], found['normals'], atol=1e-6)
  np.testing.assert_array_equal(record['edges'], found['edge'])


@pytest.mark.parametrize('size', [SIZE, (5, 7), (30, 20)])
def test_both_layouts_give_the_same_record(tmp_path, size):
  found = labels(np.random.default_rng(1))
  # Even areas, and the mid-grey of a missing normal: JPEG keeps those.
  found['normals'][:] = (0, 0, -1)
  found['normals'][:, 8:] = 0
  write(tmp_path / 'newer', 'a', found)
  write(tmp_path / 'older', 'a', found, older=True)
  newer, older = (read(tmp_path / layout, size) for layout in ('newer', 'older'))
  for key in set(KEYS) - {'normals'}:
    np.testing.assert_array_equal(newer[key], older[key])
    assert newer[key].dtype == older[key].dtype
  np.testing.assert_allclose(older['normals'], newer['normals'], atol=0.02)
  assert older['normals'].dtype == np.float32
  assert {0.0, 1.0} == {*np.linalg.norm(newer['normals'], axis=-1).flat}


def test_layouts_may_be_mixed_and_the_newer_wins(source):
  other = labels(np.random.default_rng(2))
  write(source, 'a', other, older=True)
  (source / 'depth/a.npy').unlink()
  record = read(source)
  np.testing.assert_array_equal(record['depth'], other['depth'])
  first = labels(np.random.default_rng(0))
  np.testing.assert_array_equal(record['edges'], first['edge'])


@pytest.mark.parametrize(
  'size', [(6, 8), (3, 16), (7, 5), (12, 16), (24, 48), (13, 17), (1, 1), (5, 40)]
)
def test_resizing_makes_nothing_up(source, size):
  original, record = read(source), read(source, size)
  assert record['image'].shape == (*size, 3)
  for key in ('segmentation', 'depth'):
    assert record[key].shape == size
    assert np.isin(record[key], original[key]).all()
  vectors = {tuple(v) for v in original['normals'].reshape(-1, 3)}
  assert {tuple(v) for v in record['normals'].reshape(-1, 3)} <= vectors
  norms = np.linalg.norm(record['normals'], axis=-1)
  valid = norms > 0
  np.testing.assert_allclose(norms[valid], 1, atol=1e-6)
  edges = resize_by_maximum(original['edges'], size)
  np.testing.assert_array_equal(record['edges'], edges)
  # The nearest pixel of every label is the same one.
  rows, columns = (
    ((np.arange(new) + 0.5) * old / new).astype(int)
    for new, old in zip(size, SIZE, strict=True)
  )
  nearest = np.ix_(rows, columns)
  np.testing.assert_array_equal(record['depth'], original['depth'][nearest])
  np.testing.assert_array_equal(record['normals'], original['normals'][nearest])


@pytest.mark.parametrize('size', [(12, 16), (6, 8), (5, 7), (1, 16), (24, 20), (13, 3)])
def test_edges_survive_and_are_not_widened(size):
  rng = np.random.default_rng(0)
  for _ in range(20):
    edges = np.zeros(SIZE, np.uint8)
    edges[rng.integers(12), rng.integers(16)] = 1
    small = resize_by_maximum(edges, size)
    assert small.shape == size
    copies = int(np.prod([-(-n // o) for n, o in zip(size, SIZE, strict=True)]))
    assert 1 <= small.sum() <= copies
  edges = (rng.random((12, 16)) < 0.2).astype(np.uint8)
  blocks = edges.reshape(6, 2, 8, 2).max((1, 3))
  np.testing.assert_array_equal(resize_by_maximum(edges, (6, 8)), blocks)


def test_resize_label_has_trailing_axes():
  label = np.arange(4 * 6 * 3).reshape(4, 6, 3)
  for channel in range(3):
    np.testing.assert_array_equal(
      resize_label(label, (2, 9))[..., channel],
      resize_label(label[..., channel], (2, 9)),
    )


def test_depth_without_a_value_stays_without(source):
  depth = np.zeros(SIZE)
  depth[0, :5] = np.nan, np.inf, -np.inf, -1.0, 0.01
  np.save(source / 'depth/a.npy', depth)
  found = read(source)['depth']
  assert found[0, 4] == np.float32(0.01)
  found[0, 4] = 0
  assert not found.any()


def test_which_normals_have_a_value(source):
  normals = np.zeros((*SIZE, 3))
  normals[0, :6] = (
    (0, 0, -1), (0, 0, -0.6), (0.2, 0.2, 0.2), (np.nan, 0, 1), (0, np.inf, 0),
    (-0.5, 0, 0.5),
  )  # fmt: skip
  np.save(source / 'normals/a.npy', normals)
  found = read(source)['normals']
  expected = np.zeros_like(normals)
  expected[0, [0, 1, 5]] = (0, 0, -1), (0, 0, -1), (-np.sqrt(0.5), 0, np.sqrt(0.5))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_edges_have_half_of_the_range_or_more(source):
  edges = np.zeros(SIZE)
  edges[0, :3] = 0.49, 0.5, 1
  np.save(source / 'edge/a.npy', edges)
  assert read(source)['edges'][0, :4].tolist() == [0, 1, 1, 0]
  (source / 'edge/a.npy').unlink()
  image = np.zeros(SIZE, np.uint8)
  image[0, :3] = 127, 128, 255
  Image.fromarray(image).save(source / 'edge/a.png')
  assert read(source)['edges'][0, :4].tolist() == [0, 1, 1, 0]
  Image.fromarray(image > 0).save(source / 'edge/a.png')
  assert read(source)['edges'][0, :4].tolist() == [1, 1, 1, 0]


def test_flip(source):
  record = read(source)
  flipped = nyud_mt.flip(record)
  for key in ('image', 'segmentation', 'depth', 'edges'):
    np.testing.assert_array_equal(flipped[key], record[key][:, ::-1])
  mirrored = record['normals'][:, ::-1]
  np.testing.assert_array_equal(flipped['normals'][..., 0], -mirrored[..., 0])
  np.testing.assert_array_equal(flipped['normals'][..., 1:], mirrored[..., 1:])
  twice = nyud_mt.flip(flipped)
  for key in KEYS:
    assert twice[key].dtype == record[key].dtype
    np.testing.assert_array_equal(twice[key], record[key])
  assert flipped['name'] == 'a'


def test_labels_of_a_batch(source):
  found = nyud_mt.task_labels(stacked(read(source)), list(nyud_mt.LABELS))
  assert [(v.shape, v.dtype) for v in found.values()] == [
    ((1, *SIZE), np.int32),
    ((1, *SIZE), np.float32),
    ((1, *SIZE, 3), np.float32),
    ((1, *SIZE), np.float32),
  ]
  assert found['segmentation'].max() == 255


def names(splits):
  return {split: {entry.name for entry in part} for split, part in splits.items()}


def test_three_lists(tmp_path):
  lists = {'train': ['1', '2', '3'], 'val': ['4'], 'test': ['5', '6']}
  write_lists(tmp_path, **lists)
  (tmp_path / 'gt_sets/val.txt').write_bytes(b'\r\n 4 \r\n')
  assert names(nyud_mt.scan(tmp_path)) == {k: set(v) for k, v in lists.items()}


def test_two_lists(tmp_path):
  train, test = [f't{i}' for i in range(795)], [f'v{i}' for i in range(654)]
  write_lists(tmp_path, train=train, val=test)
  found = nyud_mt.scan(tmp_path)
  assert {split: len(part) for split, part in found.items()} == {
    'train': 696,
    'val': 99,
    'test': 654,
  }
  split = names(found)
  assert split['test'] == set(test)
  assert split['train'] | split['val'] == set(train)
  assert not split['train'] & split['val']
  # Fixed: the order of the lines means nothing.
  write_lists(tmp_path, train=train[::-1])
  assert nyud_mt.scan(tmp_path) == found


def test_hold_out_is_an_exact_part():
  ids = nyud_mt.in_hash_order([str(i) for i in range(50)])
  mask = nyud_mt.hold_out_mask(ids, 0.2)
  assert mask.sum() == 10
  assert [int(i) for i in ids] != sorted(range(50))


@pytest.mark.parametrize('missing', ['train', 'val', 'folder', 'empty'])
def test_lists_that_are_not_there(tmp_path, missing):
  if missing != 'folder':
    write_lists(tmp_path, train=['1'], val=['2'], test=['3'])
    path = tmp_path / f'gt_sets/{"test" if missing == "empty" else missing}.txt'
    if missing == 'empty':
      path.write_text('\n \n')
    else:
      path.unlink()
  name = {'folder': 'train', 'empty': 'test'}.get(missing, missing)
  fails(
    tmp_path,
    f'the list {name}.txt is missing or empty',
    tmp_path / f'gt_sets/{name}.txt',
    'python launch.py --config configs/nyud_meta.py:procedural,tiny',
    call=nyud_mt.scan,
  )


def test_list_that_is_no_text(tmp_path):
  write_lists(tmp_path, train=['1'], val=['2'])
  (tmp_path / 'gt_sets/val.txt').write_bytes(b'\xff\xfe\x80')
  fails(tmp_path, 'cannot read the list', 'val.txt', call=nyud_mt.scan)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_id_listed_twice(tmp_path, split):
  lists = {'train': ['1', '2'], 'val': ['3'], 'test': ['4']}
  lists[split] = [*lists[split], '2']
  write_lists(tmp_path, **lists)
  where = (f'gt_sets/{name}.txt' for name in ('train', split))
  fails(tmp_path, 'the ID 2 is listed in', *where, call=nyud_mt.scan)


@pytest.mark.parametrize('folder', ['images', *nyud_mt.SUFFIXES])
def test_missing_file(source, folder):
  (path,) = (source / folder).iterdir()
  path.unlink()
  message = fails(source, f'missing file {path}')
  assert folder == 'images' or re.search(r'\(or a\.\w+\)', message)


def save(folder, value):
  return lambda source: np.save(source / folder / 'a.npy', value)


def save_segmentation(value):
  return lambda source: Image.fromarray(value).save(source / 'segmentation/a.png')


def older(folder, suffix, content):
  """Replaces a label by one of the older layout: bytes, or variables."""

  def do(source):
    next((source / folder).iterdir()).unlink()
    path = source / folder / f'a.{suffix}'
    if isinstance(content, bytes):
      path.write_bytes(content)
    else:
      scipy.io.savemat(path, content)

  return do


MATLAB_7_3 = b'MATLAB 7.3 MAT-file'.ljust(124) + b'\x00\x02IM' + bytes(512)
ONES = np.ones(SIZE)
LARGER = np.ones((12, 17))
BAD = {
  'class 41': (
    save_segmentation(np.full(SIZE, 41, np.uint8)),
    'segmentation/a.png holds the value 41, expected the whole numbers 0..40',
  ),
  'class 41, older': (
    older('segmentation', 'mat', {'segmentation': 41 * ONES}),
    'segmentation/a.mat holds the value 41, ',
  ),
  'negative class': (
    older('segmentation', 'mat', {'segmentation': -ONES}),
    'holds the value -1, ',
  ),
  'half a class': (
    older('segmentation', 'mat', {'segmentation': ONES / 2}),
    'holds the value 0.5, ',
  ),
  'colours': (
    save_segmentation(np.zeros((*SIZE, 3), np.uint8)),
    'segmentation/a.png has mode RGB, expected one 8-bit channel',
  ),
  'garbage': (
    lambda source: (source / 'edge/a.npy').write_bytes(b'garbage'),
    'unreadable array',
    'edge/a.npy',
  ),
  'empty': (
    lambda source: (source / 'edge/a.npy').write_bytes(b''),
    'unreadable array',
    'edge/a.npy',
  ),
  'truncated': (
    lambda source: (source / 'depth/a.npy').write_bytes(
      (source / 'depth/a.npy').read_bytes()[:-9]
    ),
    'unreadable array',
    'depth/a.npy',
  ),
  'pickle': (
    save('depth', np.array([{}, None])),
    'unreadable array',
    'depth/a.npy',
    'allow_pickle',
  ),
  'complex': (
    save('depth', ONES + 1j),
    'depth/a.npy holds complex128, expected real numbers',
  ),
  'strings': (save('edge', np.full(SIZE, 'x')), 'edge/a.npy holds <U1, expected'),
  'structure': (
    save('edge', np.zeros(SIZE, [('x', float)])),
    'edge/a.npy holds [',
    'expected real numbers',
  ),
  'depth of three axes': (
    save('depth', ONES[..., None]),
    'depth/a.npy holds an array of the shape (12, 16, 1), expected (12, 16)',
  ),
  'normals of two axes': (
    save('normals', ONES),
    'normals/a.npy holds an array of the shape (12, 16), expected (12, 16, 3)',
  ),
  'channels first': (
    save('normals', np.ones((3, *SIZE))),
    'normals/a.npy holds an array of the shape (3, 12, 16), expected (12, 16, 3)',
  ),
  'no array': (
    save('edge', np.float32(1)),
    'edge/a.npy holds an array of the shape ()',
  ),
  'larger depth': (
    save('depth', LARGER),
    'depth/a.npy is 17x12, its picture',
    'images/a.jpg is 16x12',
  ),
  'larger segmentation': (
    save_segmentation(LARGER.astype(np.uint8)),
    'segmentation/a.png is 17x12, its picture',
    'images/a.jpg is 16x12',
  ),
  'larger edges': (save('edge', LARGER), 'edge/a.npy is 17x12, its picture'),
  'larger normals': (
    save('normals', np.ones((12, 17, 3))),
    'normals/a.npy is 17x12, its picture',
  ),
  'millimetres': (
    save('depth', 2000 * ONES),
    'depth/a.npy holds the value 2000, expected metres',
  ),
  'bytes as normals': (
    save('normals', np.full((*SIZE, 3), 255, np.uint8)),
    'normals/a.npy holds the value 255, expected components in [-1, 1]',
  ),
  'huge normals': (
    save('normals', np.full((*SIZE, 3), 1e300)),
    'holds the value 1e+300',
  ),
  'edges above 1': (
    save('edge', 255 * ONES),
    'edge/a.npy holds the value 255, expected values in [0, 1]',
  ),
  'edges without a number': (save('edge', np.nan * ONES), 'holds the value nan, '),
  'edges below 0': (save('edge', -ONES), 'holds the value -1, '),
  'MATLAB 7.3': (
    older('depth', 'mat', MATLAB_7_3),
    'depth/a.mat is a MATLAB 7.3 file',
    "save(..., '-v7')",
  ),
  'garbage .mat': (
    older('depth', 'mat', b'garbage' * 99),
    'unreadable array',
    'depth/a.mat',
  ),
  'empty .mat': (older('depth', 'mat', b''), 'unreadable array', 'depth/a.mat'),
  'other variable': (
    older('depth', 'mat', {'deepth': ONES}),
    "depth/a.mat has no variable 'depth'",
  ),
  'struct': (
    older('depth', 'mat', {'depth': {'x': ONES}}),
    'depth/a.mat holds [',
    'expected real numbers',
  ),
  'normals that are no picture': (
    older('normals', 'jpg', b'garbage'),
    'unreadable image',
    'normals/a.jpg',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_label(source, case):
  spoil, *words = BAD[case]
  read(source)
  spoil(source)
  fails(source, *words)


def message_of(source):
  try:
    read(source)
  except DataError as error:
    return str(error)
  return ''


def test_damaged_arrays_raise_nothing_else(source):
  rng = np.random.default_rng(0)
  scipy.io.savemat(source / 'a.mat', {'depth': ONES}, do_compression=True)
  older('depth', 'mat', (source / 'a.mat').read_bytes())(source)
  for path in (source / 'depth/a.mat', source / 'normals/a.npy'):
    content = path.read_bytes()
    for _ in range(60):
      damaged = bytearray(content)
      damaged[rng.integers(min(len(content), 200))] ^= 1 << rng.integers(8)
      path.write_bytes(damaged)
      assert '\n' not in message_of(source)
    path.write_bytes(content)


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
  """28 pictures in both layouts, prepared."""
  folder = tmp_path_factory.mktemp('nyud')
  rng = np.random.default_rng(0)
  ids = [str(i) for i in range(28)]
  for i, name in enumerate(ids):
    write(folder / 'source', name, labels(rng), older=i % 2 == 1)
  write_lists(folder / 'source', train=ids[:24], val=ids[24:])
  data.prepare('nyud_mt', folder / 'source', folder / 'out', (6, 8), progress=False)
  return folder, data.open('nyud_mt', folder / 'out', (6, 8), 0.25)


def test_prepared_records(splits):
  folder, parts = splits
  assert [len(part) for part in parts] == [16, 5, 3, 4]
  for part in parts:
    for i in range(len(part)):
      record = part[i]
      expected = read(folder / 'source', (6, 8), record['name'].decode())
      for key in KEYS:
        assert record[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(record[key], expected[key])


def check(batch):
  assert batch['image'].dtype == np.float32
  known = batch['segmentation'] != 255
  assert batch['segmentation'][known].max() < 40
  assert 0 < known.mean() < 1
  assert (batch['depth'] >= 0).all()
  norms = np.linalg.norm(batch['normals'], axis=-1)
  assert np.isclose(norms[norms > 0], 1, atol=1e-6).all()
  assert 0 < (norms > 0).mean() < 1
  assert set(np.unique(batch['edges'])) == {0, 1}


def test_batches(splits):
  _, parts = splits
  tasks = list(nyud_mt.LABELS)
  (batch,) = data.eval_batches(parts.test, tasks, batch_size=4)
  check(batch)
  kwargs = {'batch_size': 16, 'seed': 0}
  plain = next(data.train_iterator(parts.train, tasks, flip=False, **kwargs))
  flipped = next(data.train_iterator(parts.train, tasks, flip=True, **kwargs))
  check(plain)
  turned = 0
  for row in range(16):
    if not np.array_equal(plain['image'][row], flipped['image'][row]):
      turned += 1
      expected = plain['normals'][row][:, ::-1] * np.array([-1, 1, 1])
      np.testing.assert_array_equal(flipped['normals'][row], expected)
      np.testing.assert_array_equal(flipped['depth'][row], plain['depth'][row][:, ::-1])
  assert 0 < turned < 16


def test_missing_labels_have_no_value(splits):
  _, parts = splits
  tasks = list(nyud_mt.LABELS)
  train = parts.with_hold_out(1, 0)
  kwargs = {'batch_size': len(train), 'seed': 3, 'flip': False}
  whole = next(data.train_iterator(train, tasks, **kwargs))
  lacking = next(data.train_iterator(train, tasks, missing=0.5, **kwargs))
  lacks = {}
  for task in tasks:
    empty = whole[task].dtype.type(data.NO_LABEL[nyud_mt.LABELS[task].kind])
    assert lacking[task].dtype == whole[task].dtype
    missing = (lacking[task] == empty).reshape(len(train), -1).all(1)
    np.testing.assert_array_equal(lacking[task][~missing], whole[task][~missing])
    lacks[task] = missing
  assert sum(lacks.values()).max() == 1
  assert sum(lacks.values()).sum() == round(0.5 * len(train))
