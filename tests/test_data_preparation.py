"""`prepare`: complete or nothing, resumable, and clear about bad input."""

import concurrent.futures
import io
import itertools
import json
import logging
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

import data
from data import DataError, celebamask_hq, files, preparation

NUM, SIZE = 30, (16, 16)
PREPARED = 'celebamask_hq/16x16/1.0.0'


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
  target = tmp_path_factory.mktemp('faces') / 'set'
  return data.render_faces(target, NUM, (32, 32), seed=0, progress=False)


@pytest.fixture
def source(rendered, tmp_path):
  return shutil.copytree(rendered, tmp_path / 'source')


def prepare(source, tmp_path, **kwargs):
  return data.prepare(
    'celebamask_hq', source, tmp_path / 'out', SIZE, progress=False, **kwargs
  )


def fails(source, tmp_path, *words, **kwargs):
  with pytest.raises(DataError) as error:
    prepare(source, tmp_path, **kwargs)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert str(word) in message
  return message


def npy():
  content = io.BytesIO()
  np.save(content, np.zeros(3))
  return content.getvalue()


def test_records_are_those_of_the_files(source, tmp_path):
  folder = prepare(source, tmp_path)
  assert folder == tmp_path / 'out' / PREPARED
  # The temporary folder is gone.
  assert [p.name for p in folder.parent.parent.iterdir()] == ['16x16']
  splits = data.open('celebamask_hq', tmp_path / 'out', SIZE, 0)
  assert [len(part) for part in (splits.train, splits.val, splits.test)] == [
    21, 4, 5,
  ]  # fmt: skip
  assert splits.hold_out is None
  order = celebamask_hq.split_numbers(range(NUM))
  for split in ('train', 'val', 'test'):
    part = getattr(splits, split)
    assert [int(part[i]['name']) for i in range(len(part))] == order[split]
  record, number = splits.val[1], order['val'][1]
  image = Image.open(source / f'CelebA-HQ-img/{number}.jpg')
  expected = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(record['image'], expected)
  # Label values survive the resize: each is in the original at that place.
  original = np.zeros((32, 32), int)
  for index, part in enumerate(celebamask_hq.PARTS, 1):
    path = celebamask_hq.part_path(source, number, part)
    if path.exists():
      original[np.asarray(Image.open(path)) > 0] = index
  np.testing.assert_array_equal(record['parts'], original[1::2, 1::2])


def test_builder_works_alone_with_tfds(source, tmp_path):
  builder = celebamask_hq.CelebamaskHq(
    data_dir=tmp_path / 'tfds',
    config=data.builder.size_config(SIZE),
    file_format='array_record',
  )
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=source)
  )
  alone = builder.as_data_source('train')
  prepare(source, tmp_path)
  prepared = data.open('celebamask_hq', tmp_path / 'out', SIZE, 0).train
  assert len(alone) == len(prepared)
  for index in (0, 20):
    for key, value in prepared[index].items():
      np.testing.assert_array_equal(alone[index][key], value)


def test_prepared_set_is_reused_even_without_its_source(
  source, tmp_path, monkeypatch, caplog
):
  folder = prepare(source, tmp_path)
  monkeypatch.setattr(celebamask_hq, 'read', None)
  assert prepare(source, tmp_path) == folder
  shutil.rmtree(source)
  assert prepare(source, tmp_path) == folder
  assert f'using what was prepared in {folder}, because ' in caplog.text


def test_all_bad_files_are_named_and_nothing_is_built(source, tmp_path):
  images = source / 'CelebA-HQ-img'
  (images / '3.jpg').write_bytes((images / '3.jpg').read_bytes()[:400])
  (images / '4.jpg').unlink()
  fails(
    source, tmp_path, '2 of 30 images', 'unreadable image', '3.jpg',
    'missing file', '4.jpg', '--skip_corrupt',
  )  # fmt: skip
  assert not (tmp_path / 'out' / PREPARED).exists()
  for number in range(5, 9):
    (images / f'{number}.jpg').write_bytes(b'')
  message = fails(source, tmp_path, '6 of 30 images')
  listing = tmp_path / 'out/celebamask_hq/16x16.bad_files.txt'
  assert str(listing) in message
  lines = listing.read_text().splitlines()
  assert len(lines) == 6
  for number in range(3, 9):
    assert any(f'/{number}.jpg' in line for line in lines)


def test_skip_corrupt_leaves_out_and_counts(source, tmp_path, caplog):
  order = celebamask_hq.split_numbers(range(NUM))
  bad = order['train'][2]
  (source / f'CelebA-HQ-img/{bad}.jpg').write_bytes(b'junk')
  folder = prepare(source, tmp_path, skip_corrupt=True)
  assert 'left out: 1 of 30 images' in caplog.text
  summary = json.loads((folder / 'prepared.json').read_text())
  assert summary['left_out'] == [f'train/{bad}']
  splits = data.open('celebamask_hq', tmp_path / 'out', SIZE, 0)
  names = [int(splits.train[i]['name']) for i in range(len(splits.train))]
  # The other images stay where they were.
  assert names == [n for n in order['train'] if n != bad]
  assert len(splits.val) == 4


def test_skip_corrupt_with_nothing_left(source, tmp_path):
  for number in celebamask_hq.split_numbers(range(NUM))['val']:
    (source / f'CelebA-HQ-img/{number}.jpg').unlink()
  fails(source, tmp_path, 'nothing remains of the split val', skip_corrupt=True)


def test_repaired_source_is_read_again(source, tmp_path):
  path = source / 'CelebA-HQ-img/3.jpg'
  content = path.read_bytes()
  path.write_bytes(content[:300])
  fails(source, tmp_path, '3.jpg')
  path.write_bytes(content)
  prepare(source, tmp_path)


def test_killed_check_continues(source, tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, 'BLOCK', 4)
  read = celebamask_hq.read
  seen = []

  def dies(entry, size):
    seen.append(entry.name)
    if len(seen) > 10:
      raise KeyboardInterrupt
    return read(entry, size)

  monkeypatch.setattr(celebamask_hq, 'read', dies)
  with pytest.raises(KeyboardInterrupt):
    prepare(source, tmp_path)
  assert not (tmp_path / 'out' / PREPARED).exists()
  again = []
  monkeypatch.setattr(
    celebamask_hq,
    'read',
    lambda entry, size: (again.append(entry.name), read(entry, size))[1],
  )
  resumed = prepare(source, tmp_path)
  assert not set(again) & set(seen[:8])  # two whole blocks
  monkeypatch.undo()
  straight = data.prepare(
    'celebamask_hq', source, tmp_path / 'straight', SIZE, progress=False
  )
  for path in straight.glob('*.array_record*'):
    assert (resumed / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(params=['celebamask_hq', 'nyud_mt', 'camvid'])
def any_entry(request, tmp_path):
  """Name of a data set, where it is, and an entry of it."""
  name, source = request.param, tmp_path / 'any'
  if name == 'camvid':
    for split, image in itertools.product(('train', 'val', 'test'), 'ab'):
      for mode, folder in (('RGB', split), ('L', f'{split}annot')):
        (source / folder).mkdir(parents=True, exist_ok=True)
        Image.new(mode, (8, 6), 5).save(source / folder / f'{image}.png')
  else:
    data.render(name, source, 10, (16, 16), 0, progress=False)
  return name, source, preparation.data_set(name).scan(source)['train'][0]


def test_an_entry_names_its_files(any_entry, tmp_path):
  name, source, entry = any_entry
  module = preparation.data_set(name)
  copied = tmp_path / 'copied'
  moved = lambda path: copied / path.relative_to(source)
  for file in filter(Path.exists, module.files(entry)):
    moved(file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, moved(file))
  alone = entry._replace(
    **{k: moved(v) for k, v in entry._asdict().items() if isinstance(v, Path)}
  )
  expected = module.read(entry, SIZE)
  for key, value in module.read(alone, SIZE).items():
    np.testing.assert_array_equal(value, expected[key])


def test_a_block_is_of_files_as_they_were(any_entry, tmp_path):
  name, source, entry = any_entry
  config = preparation.size_config(SIZE)
  block = preparation._Preparation(name, source, tmp_path, config, {}, False)
  paths = {block._block_path([entry])}
  changed = list(filter(Path.exists, preparation.data_set(name).files(entry)))
  for file in changed:
    os.utime(file, (1, 1))
    paths.add(block._block_path([entry]))
  assert len(paths) == 1 + len(changed) > 2


def test_corrected_label_is_read_again(source, tmp_path):
  order = celebamask_hq.split_numbers(range(NUM))
  bad = source / f'CelebA-HQ-img/{order["val"][0]}.jpg'
  good = bad.read_bytes()
  bad.write_bytes(good[:400])
  fails(source, tmp_path, bad.name)
  bad.write_bytes(good)
  skin = celebamask_hq.part_path(source, order['train'][0], 'skin')
  Image.new('L', (32, 32), 255).save(skin)
  prepare(source, tmp_path)
  parts = data.open('celebamask_hq', tmp_path / 'out', SIZE, 0).train[0]['parts']
  assert (parts > 0).all()


@pytest.mark.parametrize('when', ['writing', 'verifying'])
def test_killed_build_leaves_nothing_under_the_final_name(
  source, tmp_path, monkeypatch, when
):
  def dies(*_):
    raise KeyboardInterrupt
    yield

  if when == 'writing':
    monkeypatch.setattr(preparation._Preparation, '_records', dies)
  else:
    monkeypatch.setattr(preparation, '_verify', lambda *_: next(dies()))
  with pytest.raises(KeyboardInterrupt):
    prepare(source, tmp_path)
  assert not (tmp_path / 'out' / PREPARED).exists()
  monkeypatch.undo()
  monkeypatch.setattr(
    preparation._Preparation, '_read', None
  )  # every block is there already
  assert prepare(source, tmp_path).exists()


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 half', npy()])
def test_damaged_block_is_named(source, tmp_path, monkeypatch, content):
  def dies(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(preparation._Preparation, 'build', dies)
  with pytest.raises(KeyboardInterrupt):
    prepare(source, tmp_path)
  monkeypatch.undo()
  block = next((tmp_path / 'out').rglob('*.npz'))
  block.write_bytes(content)
  fails(source, tmp_path, f'{block} is damaged', 'remove it and run the same command')
  block.unlink()
  prepare(source, tmp_path)


def test_changed_source_is_refused(source, tmp_path):
  folder = prepare(source, tmp_path)
  other = tmp_path / 'other'
  data.render_faces(other, NUM + 1, (32, 32), seed=0, progress=False)
  made_from = f'30 images in {source}, and {other} with its'
  fails(other, tmp_path, f'{made_from} {NUM + 1} has other files', f'rm -r {folder}')
  shutil.rmtree(other)
  data.render_faces(other, NUM, (32, 32), seed=1, progress=False)
  fails(other, tmp_path, f'{made_from} {NUM} has other files')
  label = next((source / 'CelebAMask-HQ-mask-anno').rglob('*_skin.png'))
  label.write_bytes(label.read_bytes() + b'.')
  fails(source, tmp_path, 'has other files or sizes')


def test_a_label_written_again_is_told_of(source, tmp_path, caplog):
  folder = prepare(source, tmp_path)
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
  label = next((source / 'CelebAMask-HQ-mask-anno').rglob('*_skin.png'))
  os.utime(label, (0, 0))
  assert prepare(source, tmp_path) == folder
  assert f'files in {source} have been written since' in caplog.text


def test_other_version_is_refused(source, tmp_path):
  folder = prepare(source, tmp_path)
  old = folder.with_name('0.9.0')
  folder.rename(old)
  fails(source, tmp_path, 'another version', 'now 1.0.0', f'rm -r {old}')


def test_a_set_without_the_state_of_its_source_is_as_good(source, tmp_path):
  folder = prepare(source, tmp_path)  # as built before that was kept
  path = folder / 'prepared.json'
  summary = json.loads(path.read_text())
  for key in ('source', 'contents', 'times'):
    del summary[key]
  path.write_text(json.dumps(summary))
  assert prepare(source, tmp_path) == folder
  fewer = tmp_path / 'fewer'
  data.render_faces(fewer, NUM - 1, (32, 32), seed=0, progress=False)
  fails(fewer, tmp_path, 'has other files')


@pytest.mark.parametrize(
  'damage', ['truncated', 'missing', 'summary', 'list', 'count', 'order', 'number']
)
def test_damaged_set_is_refused(source, tmp_path, damage):
  folder = prepare(source, tmp_path)
  records = next(folder.glob('*val.array_record*'))
  summary = folder / 'prepared.json'
  if damage == 'truncated':
    records.write_bytes(records.read_bytes()[:-200])
  elif damage == 'missing':
    records.unlink()
  elif damage == 'summary':
    summary.write_text('{"images"')
  elif damage == 'list':
    summary.write_text('[]')
  else:
    content = json.loads(summary.read_text())
    if damage == 'count':
      content['names']['val'].pop()
    elif damage == 'number':
      content['names']['train'][3] = 3
    else:
      content['names']['val'].reverse()
    summary.write_text(json.dumps(content))
  fails(source, tmp_path, 'damaged', f'rm -r {folder}')


def test_too_few_images(tmp_path):
  source = tmp_path / 'two'
  data.render_faces(source, 2, (32, 32), seed=0, progress=False)
  fails(source, tmp_path, 'too few', 'the split val is empty')


def test_a_name_that_is_no_text(tmp_path, monkeypatch):
  names = ('a', os.fsdecode(b'b\xff'))
  entries = {'train': [types.SimpleNamespace(name=name) for name in names]}
  monkeypatch.setattr(preparation.celebamask_hq, 'scan', lambda _: entries)
  fails(tmp_path / 'source', tmp_path, "'b\\udcff'", 'is not UTF-8; rename the file')


def wait_for_waiting(future, caplog):
  """Until a thread says that it waits for another process."""
  for _ in range(3000):
    if 'waiting for another process' in caplog.text or future.done():
      break
    time.sleep(0.01)
  assert 'waiting for another process' in caplog.text
  assert not future.done()


def test_a_second_renderer_waits_and_finds_the_set(rendered, tmp_path, caplog):
  caplog.set_level(logging.INFO, logger=files.__name__)
  target = tmp_path / 'set'
  target.mkdir()
  render = lambda: data.render_faces(target, NUM, (32, 32), seed=0, progress=False)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    with files.exclusive(target):
      waiting = pool.submit(render)
      wait_for_waiting(waiting, caplog)
      shutil.copytree(rendered, target, dirs_exist_ok=True)  # the other one finishes
      marker = (target / 'procedural.json').stat().st_mtime_ns
    assert waiting.result(60) == target
  assert (target / 'procedural.json').stat().st_mtime_ns == marker


def test_second_process_waits(source, tmp_path, caplog):
  caplog.set_level(logging.INFO, logger=files.__name__)
  work = tmp_path / 'out/celebamask_hq/16x16.building'
  work.mkdir(parents=True)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    with files.exclusive(work):
      waiting = pool.submit(prepare, source, tmp_path)
      wait_for_waiting(waiting, caplog)
      # Meanwhile the other one finishes.
      built = prepare(source, tmp_path / 'other')
      folder = tmp_path / 'out' / PREPARED
      shutil.copytree(built, folder)
      made = (folder / preparation.SUMMARY).stat().st_ino
    assert waiting.result(60) == folder
  assert (folder / preparation.SUMMARY).stat().st_ino == made


def test_unwritable_folder(source, tmp_path):
  (tmp_path / 'out').write_text('a file where a folder should be')
  fails(source, tmp_path, 'cannot prepare celebamask_hq', tmp_path / 'out')


def test_unknown_data_set(tmp_path):
  for call in (
    lambda: data.labels('mnist'),
    lambda: data.prepare('mnist', tmp_path, tmp_path, SIZE),
    lambda: data.open('mnist', tmp_path, SIZE, 0),
  ):
    with pytest.raises(
      DataError, match="'mnist', known: celebamask_hq, camvid, nyud_mt"
    ):
      call()


def test_rendering_by_name(tmp_path):
  settings = (20, (16, 24), 0)
  for name in ('celebamask_hq', 'nyud_mt'):
    target = data.render(name, tmp_path / name, *settings, progress=False)
    assert target == tmp_path / name
    data.prepare(name, target, tmp_path, (16, 24), progress=False)
    parts = data.open(name, tmp_path, (16, 24), 0.2)
    assert sum(map(len, parts)) == 20
    assert (
      data.preparation.read_summary(
        data.preparation.prepared_folder(name, tmp_path, (16, 24))
      )['stand_in']['num']
      == 20
    )
  for name, words in (
    ('camvid', 'camvid has no procedural stand-in, only celebamask_hq, nyud_mt have'),
    ('mnist', "unknown data set 'mnist'"),
  ):
    with pytest.raises(DataError, match=words):
      data.render(name, tmp_path / 'c', *settings)
  assert not (tmp_path / 'c').exists()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
  pixels = np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / 'picture.png'
  Image.fromarray(pixels).save(path, exif=exif)
  with Image.open(path) as image:
    wanted = np.asarray(ImageOps.exif_transpose(image))
  size = files.read_size(path, upright=True)
  assert size == wanted.shape[:2]
  np.testing.assert_array_equal(files.read_image(path, size, upright=True), wanted)
  np.testing.assert_array_equal(files.read_image(path, (4, 6)), pixels)
