"""Batches: order, sharding, flips, resuming, padding."""

import itertools
import shutil

import numpy as np
import pytest

import data
from data import DataError, celebamask_hq

NUM, SIZE = 40, (16, 16)
TASKS = ('segmentation', 'parts', 'male', 'smiling')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pipeline')
  data.render_faces(folder / 'faces', NUM, SIZE, seed=0, progress=False)
  data.prepare('celebamask_hq', folder / 'faces', folder, SIZE, progress=False)
  return folder


@pytest.fixture(scope='module')
def splits(prepared):
  return data.open('celebamask_hq', prepared, SIZE, 0.25)


def iterator(source, tasks=TASKS, **kwargs):
  kwargs = {'batch_size': 6, 'seed': 0, 'flip': False} | kwargs
  return data.train_iterator(source, tasks, **kwargs)


def take(batches, count):
  return [next(batches) for _ in range(count)]


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])
    assert a[key].dtype == b[key].dtype


def identify(source, images):
  """Positions in `source` of unflipped images."""
  stored = np.stack([source[i]['image'] for i in range(len(source))])
  images = np.round(images * 255).astype(np.uint8)
  return [int(np.flatnonzero((stored == one).all((1, 2, 3)))[0]) for one in images]


def test_shapes_types_and_ranges(splits):
  batch = next(iterator(splits.train))
  assert list(batch) == ['image', 'valid', *TASKS]
  assert batch['image'].shape == (6, 16, 16, 3)
  assert batch['image'].dtype == np.float32
  assert 0 <= batch['image'].min() < 0.2 < 0.8 < batch['image'].max() <= 1
  for task in ('segmentation', 'parts'):
    assert batch[task].shape == (6, 16, 16)
    assert batch[task].dtype == np.int32
  assert batch['male'].shape == (6,)
  assert set(np.unique(batch['male'])) <= {0, 1}
  assert batch['valid'].dtype == bool
  assert batch['valid'].all()


def test_hold_out_and_train_share_nothing(splits):
  names = [{int(part[i]['name']) for i in range(len(part))} for part in splits]
  assert [len(n) for n in names] == [21, 7, 6, 6]
  assert set.union(*names) == set(range(NUM))  # 40 in all: disjoint


def test_hold_out_fraction_that_leaves_a_part_empty(prepared):
  for fraction in (0.001, 1.0):
    with pytest.raises(DataError, match='leaves one part empty'):
      data.open('celebamask_hq', prepared, SIZE, fraction)


def test_smaller_shares_of_train_are_parts_of_larger_ones(prepared, splits):
  def positions(share, **kwargs):
    found = data.open(
      'celebamask_hq', prepared, SIZE, 0.25, train_share=share, **kwargs
    )
    for part, other in zip(found[1:], splits[1:], strict=True):
      np.testing.assert_array_equal(part.indices, other.indices)
    return found.train.indices

  shares = (1, 0.9, 0.5, 0.1, 1e-6)
  found = [positions(share) for share in shares]
  np.testing.assert_array_equal(found[0], splits.train.indices)
  assert [len(f) for f in found] == [21, 19, 10, 2, 1]
  for larger, smaller in itertools.pairwise(found):
    assert set(smaller) < set(larger)
    assert (np.diff(smaller) > 0).all()
  np.testing.assert_array_equal(positions(0.5), found[2])
  assert set(positions(0.5, seed=1)) != set(found[2])
  for share in (0, -0.1, 1.1, float('nan')):
    with pytest.raises(DataError, match='train share is'):
      positions(share)


def lacking(source, whole, batches):
  """{(position, task)} where `batches` lack the label of `whole`; all else is same."""
  found = []
  for expected, batch in zip(whole, batches, strict=True):
    assert batch.keys() == expected.keys()
    for row, position in enumerate(identify(source, batch['image'])):
      for key in batch:
        value, label = batch[key][row], expected[key][row]
        assert batch[key].dtype == expected[key].dtype
        if not np.array_equal(value, label):
          assert (value == 255).all()
          found.append((position, key))
  return found


def test_missing_labels(splits):
  everything = splits.with_hold_out(1, 0)
  batches = lambda seed=0, **kwargs: take(
    iterator(everything, batch_size=28, seed=seed, **kwargs), 3
  )
  whole = batches()
  found = {}
  for share in (0.1, 0.5, 0.9):
    lacks = lacking(everything, whole, batches(missing=share))
    found[share] = set(lacks)
    count = round(share * 28)
    # The same in all three epochs, and one task of each image.
    assert len(lacks) == 3 * count
    assert len(found[share]) == len({position for position, _ in lacks}) == count
  assert found[0.1] < found[0.5] < found[0.9]
  assert {task for _, task in found[0.9]} == set(TASKS)
  other = lacking(everything, batches(1), batches(1, missing=0.5))
  assert set(other) != found[0.5]


def test_missing_labels_do_not_depend_on_the_processes(splits):
  settings = {'flip': True, 'missing': 0.5}
  whole = take(iterator(splits.train, **settings), 5)
  shares = [
    take(iterator(splits.train, process_index=i, process_count=2, **settings), 5)
    for i in range(2)
  ]
  for step, expected in enumerate(whole):
    joined = [share[step] for share in shares]
    same(expected, {key: np.concatenate([j[key] for j in joined]) for key in expected})


def test_missing_labels_of_a_part_are_those_of_the_whole(splits, prepared):
  """Also when the images of λ join the others."""
  half = data.open('celebamask_hq', prepared, SIZE, 0.25, train_share=0.5).train

  def lacks(part):
    batches = lambda **kwargs: take(iterator(part, batch_size=len(part), **kwargs), 1)
    found = lacking(part, batches(), batches(missing=0.5))
    return {(part.indices[position], task) for position, task in found}

  whole = lacks(splits.with_hold_out(1, 0))
  for part in (half, splits.train):
    assert lacks(part) == {(i, task) for i, task in whole if i in part.indices}


def test_missing_labels_that_cannot_be(splits):
  for share in (-0.1, 1, float('nan')):
    with pytest.raises(DataError, match='share of missing labels is'):
      iterator(splits.train, missing=share)
  with pytest.raises(DataError, match='male is the only task'):
    iterator(splits.train, tasks=['male'], missing=0.1)


def test_epochs_are_permutations_without_remainder(splits):
  count = len(splits.train)  # 21: epochs end inside a batch of 6
  images = np.concatenate([b['image'] for b in take(iterator(splits.train), 14)])
  order = identify(splits.train, images)
  epochs = [order[i : i + count] for i in range(0, 4 * count, count)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(count))
  assert epochs[0] != epochs[1]


def test_labels_belong_to_their_images(splits):
  batch = next(iterator(splits.train))
  for row, index in enumerate(identify(splits.train, batch['image'])):
    record = splits.train[index]
    np.testing.assert_array_equal(batch['parts'][row], record['parts'])
    male = record['attributes'][celebamask_hq.ATTRIBUTES.index('Male')]
    assert batch['male'][row] == male


def test_seed_decides_order_and_flips(splits):
  first, again, other = (
    next(iterator(splits.train, seed=seed, flip=True)) for seed in (1, 1, 2)
  )
  same(first, again)
  assert not np.array_equal(first['image'], other['image'])


def test_flips_are_those_of_the_labels_and_change_with_the_epoch(splits):
  plain = iterator(splits.train)
  flipped = iterator(splits.train, flip=True)
  flips = []
  for a, b in zip(take(plain, 14), take(flipped, 14), strict=True):
    np.testing.assert_array_equal(a['male'], b['male'])
    for row in range(6):
      turned = not np.array_equal(a['image'][row], b['image'][row])
      flips.append(turned)
      if turned:
        np.testing.assert_array_equal(a['image'][row][:, ::-1], b['image'][row])
        np.testing.assert_array_equal(
          celebamask_hq.MIRRORED_PARTS[a['parts'][row][:, ::-1]],
          b['parts'][row],
        )
        np.testing.assert_array_equal(
          a['segmentation'][row][:, ::-1], b['segmentation'][row]
        )
      else:
        np.testing.assert_array_equal(a['parts'][row], b['parts'][row])
  assert 0.3 < np.mean(flips) < 0.7
  epochs = np.reshape(flips, (4, 21))
  assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize('steps', [0, 1, 5])
def test_state_restores_the_exact_position(splits, steps):
  batches = iterator(splits.train, flip=True)
  take(batches, steps)
  state = batches.get_state()
  rest = take(batches, 6)
  resumed = iterator(splits.train, flip=True)
  take(resumed, 2)
  resumed.set_state(state)
  for a, b in zip(rest, take(resumed, 6), strict=True):
    same(a, b)


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_the_same_global_batches(splits, processes):
  whole = take(iterator(splits.train, flip=True), 5)
  shares = [
    take(
      iterator(
        splits.train,
        flip=True,
        process_index=index,
        process_count=processes,
      ),
      5,
    )
    for index in range(processes)
  ]
  for step, expected in enumerate(whole):
    same(
      expected,
      {key: np.concatenate([share[step][key] for share in shares]) for key in expected},
    )


def test_batch_larger_than_the_source(splits):
  batch = next(iterator(splits.hold_out, batch_size=16))
  order = identify(splits.hold_out, batch['image'])
  assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))


@pytest.mark.parametrize('limit', [None, 5, 100])
def test_evaluation_sees_every_image_once_in_order(splits, limit):
  batches = list(data.eval_batches(splits.train, TASKS, batch_size=8, limit=limit))
  expected = min(limit or 21, 21)
  assert len(batches) == -(-expected // 8)
  for batch in batches:
    assert batch['image'].shape == (8, 16, 16, 3)
  images = np.concatenate([b['image'][b['valid']] for b in batches])
  assert identify(splits.train, images) == list(range(expected))
  assert all(b['valid'].all() for b in batches[:-1])


def test_evaluation_by_two_processes(splits):
  whole = list(data.eval_batches(splits.train, TASKS, batch_size=8))
  shares = [
    list(
      data.eval_batches(
        splits.train, TASKS, batch_size=8, process_index=i, process_count=2
      )
    )
    for i in range(2)
  ]
  assert [len(share) for share in shares] == [len(whole)] * 2
  for step, expected in enumerate(whole):
    for key in ('image', 'parts', 'male', 'valid'):
      joined = np.concatenate([share[step][key] for share in shares])
      np.testing.assert_array_equal(joined, expected[key])


def test_a_damaged_record_names_the_folder(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / 'copy') / 'celebamask_hq'
  (path,) = folder.glob('*/*/*train.array_record*')
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle - 3000 : middle + 3000] = bytes(6000)
  path.write_bytes(content)
  splits = data.open('celebamask_hq', tmp_path / 'copy', SIZE, 0.25)
  with pytest.raises(DataError, match=rf'{folder}.* is damaged .*rm -r'):
    take(iterator(splits.train), 10)


def test_requests_that_cannot_be_met(splits, prepared):
  def evaluate(source, tasks=TASKS, **kwargs):
    return data.eval_batches(source, tasks, **({'batch_size': 6} | kwargs))

  for call in (iterator, evaluate):
    with pytest.raises(DataError, match=r"unknown task 'depth'.*known: seg"):
      call(splits.train, tasks=['depth'])
    with pytest.raises(DataError, match='multiple of the 4 processes'):
      call(splits.train, batch_size=6, process_count=4)
    with pytest.raises(DataError, match='batch size 0'):
      call(splits.train, batch_size=0)
    empty = data.Source('celebamask_hq', [], np.arange(0))
    with pytest.raises(DataError, match='holds no images'):
      call(empty)
  with pytest.raises(DataError, match=r'not prepared at 9x9.*--mode prepare'):
    data.open('celebamask_hq', prepared, (9, 9), 0)
