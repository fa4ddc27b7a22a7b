"""Exported files give the predictions of the network they came from."""

import csv
import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import Label
from msp import export, tasks
from msp.compact import Compact
from msp.errors import UserError
from msp.models import multitask
from msp.predict import predict_folder

SHAPE = (24, 32, 3)


@pytest.fixture(scope='module')
def network():
  """Tasks of every kind, and a function that predicts them."""
  made = tasks.make(
    ('parts', 'edges', 'depth', 'normals', 'smiling'),
    {
      'parts': Label('segmentation', ('background', 'hair', 'skin')),
      'edges': Label('edges', ('edge',)),
      'depth': Label('depth', ('depth',)),
      'normals': Label('normals', ('x', 'y', 'z')),
      'smiling': Label('attribute', ('no', 'yes')),
    },
  )
  model = multitask.build(
    {name: (task.head, task.outputs) for name, task in made.items()},
    blocks=(1, 1, 1, 1),
    block='basic',
    width=0.125,
    head_features=8,
    dropout=0.0,
  )
  params, stats = jax.jit(lambda key: multitask.init(model, key, SHAPE))(
    jax.random.key(0)
  )
  return made, export.predictor(Compact(model, params, stats), made, SHAPE)


def images(count):
  return np.random.default_rng(count).random((count, *SHAPE), np.float32)


@pytest.fixture(scope='module')
def exported(network, tmp_path_factory):
  made, predict = network
  folder = tmp_path_factory.mktemp('export')
  content = export.serialize(predict, SHAPE)
  (folder / 'model.stablehlo').write_bytes(content)
  card = export.card('net', made, SHAPE, {}, {}, 'nothing', content)
  (folder / 'model_card.json').write_text(json.dumps(card))
  return folder


def test_a_batch_of_any_size(network, exported):
  content = (exported / 'model.stablehlo').read_bytes()
  for count in (1, 3):
    got = export.run(content, images(count))
    assert export.check(got, network[1], images(count)) <= 1e-6


def test_another_network_is_noticed(network, exported):
  content = (exported / 'model.stablehlo').read_bytes()
  got = export.run(content, images(2))
  moved = lambda x: {k: v + 1 for k, v in network[1](x).items()}
  with pytest.raises(UserError, match='gives other predictions, by up to 1'):
    export.check(got, moved, images(2))
  broken = {k: v * np.nan for k, v in got.items()}
  with pytest.raises(UserError, match='gives other predictions, by up to nan'):
    export.check(broken, network[1], images(2))


def test_a_platform_that_cannot_be_exported_for_is_named(monkeypatch, caplog):
  predict = lambda images: {'mean': jnp.mean(images, (1, 2, 3))}
  real = export.jax_export.export

  def without_abacus(function, platforms):
    if 'abacus' in platforms:
      raise NotImplementedError('no beads\nhere')
    return real(function, platforms=platforms)

  monkeypatch.setattr(export.jax_export, 'export', without_abacus)
  monkeypatch.setattr(export, 'PLATFORMS', ('cpu', 'abacus', 'tpu'))
  with caplog.at_level('WARNING', logger='msp'):
    content = export.serialize(predict, SHAPE)
  assert jax.export.deserialize(bytearray(content)).platforms == ('cpu', 'tpu')
  (record,) = caplog.records
  wanted = 'no export for abacus: NotImplementedError: no beads'
  assert record.getMessage() == wanted
  monkeypatch.setattr(export, 'PLATFORMS', ('abacus',))
  with pytest.raises(UserError, match='no platform can be exported for: '):
    export.serialize(predict, SHAPE)


def test_onnx(network):
  pytest.importorskip('jax2onnx', reason='has its own environment')
  from msp import onnx

  content = onnx.serialize(network[1], SHAPE)
  for count in (1, 3):
    got = onnx.run(content, images(count))
    assert export.check(got, network[1], images(count)) <= 1e-5
  moved = lambda x: {k: v + 1 for k, v in network[1](x).items()}
  with pytest.raises(UserError, match='gives other predictions'):
    export.check(onnx.run(content, images(2)), moved, images(2))


def test_both_environments_have_the_same_packages():
  """But for orbax, whose version the converter dictates."""

  def pins(name):
    lines = (Path(__file__).parents[1] / name).read_text().splitlines()
    pairs = (line.partition('#')[0].partition('==') for line in lines)
    return {package: version.strip() for package, _, version in pairs if package}

  plain, onnx = pins('requirements.txt'), pins('requirements-onnx.txt')
  assert plain.pop('orbax-checkpoint') != onnx['orbax-checkpoint']
  assert plain.items() <= onnx.items()


def test_a_folder_of_pictures(network, exported, tmp_path, caplog):
  photos = tmp_path / 'photos'
  photos.mkdir()
  pictures = (images(18) * 255).astype(np.uint8)
  for i, picture in enumerate(pictures):
    Image.fromarray(picture).save(photos / f'{i:02}.png')
  large = Image.fromarray(pictures[0]).resize((50, 40))
  large.save(photos / 'large.png')
  (photos / '05.png').write_bytes(b'no picture')
  Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(photos / 'deep.png')
  text = PngInfo()
  text.add_text('a comment', 'x' * 2_000_000, zip=True)  # Pillow reads a million
  large.save(photos / 'chatty.png', pnginfo=text)
  lying = Image.Exif()
  lying[0x0112] = 6  # to be turned by 90°
  turned = large.transpose(Image.Transpose.ROTATE_90)
  turned.save(photos / 'turned.png', exif=lying)
  large.save(photos / 'odd.png', exif=b'Exif\x00\x00no TIFF header')
  large.save(os.fsencode(photos) + b'/caf\xe9.png')  # a name that is no UTF-8
  (photos / 'below').mkdir()
  target = tmp_path / 'out' / 'predictions'
  assert predict_folder(exported, photos, target) == (21, 3)
  assert 'skipped: unreadable image' in caplog.text
  assert '05.png' in caplog.text
  assert 'more than 8 bits' in caplog.text
  wanted = jax.device_get(network[1](pictures[17:].astype(np.float32) / 255))
  with Image.open(target / '17.png.parts.png') as image:
    np.testing.assert_array_equal(np.asarray(image), wanted['parts'][0])
    assert image.mode == 'P'  # a viewer shows colours, a program reads classes
    assert len(image.convert('RGB').getcolors()) == len(np.unique(wanted['parts']))
  with Image.open(target / '17.png.edges.png') as image:
    difference = np.asarray(image) / 255 - wanted['edges'][0]
    assert np.abs(difference).max() < 0.6 / 255
  with Image.open(target / '17.png.depth.png') as image:
    millimetres = np.asarray(image)
    assert millimetres.max() > 255
    assert np.abs(millimetres - 1000 * wanted['depth'][0]).max() <= 0.6
  with Image.open(target / '17.png.normals.png') as image:
    difference = np.asarray(image) / 127.5 - 1 - wanted['normals'][0]
    assert np.abs(difference).max() < 0.6 / 127.5
  with Image.open(target / 'large.png.parts.png') as image:
    assert image.size == (50, 40)
  depths = []
  for name in ('large', 'turned', 'odd'):
    with Image.open(target / f'{name}.png.depth.png') as image:
      depths.append(np.asarray(image))
  np.testing.assert_array_equal(depths[0], depths[1])
  np.testing.assert_array_equal(depths[0], depths[2])
  with (target / 'attributes.csv').open(errors='surrogateescape') as file:
    rows = {row['picture']: row['smiling'] for row in csv.DictReader(file)}
  assert len(rows) == 21
  assert rows[os.fsdecode(b'caf\xe9.png')] == rows['large.png']
  assert float(rows['17.png']) == pytest.approx(wanted['smiling'][0], abs=1e-4)


def test_what_cannot_be_predicted(exported, tmp_path):
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(UserError, match=r'no exported network in .*--mode export'):
    predict_folder(tmp_path, empty, tmp_path / 'out')
  damaged = tmp_path / 'damaged'
  damaged.mkdir()
  card = (exported / 'model_card.json').read_text()
  content = (exported / 'model.stablehlo').read_bytes()
  middle = len(content) // 2
  zeroed = content[:middle] + bytes(500) + content[middle + 500 :]
  for one, other in (
    (card, content[:100]),
    (card, b''),
    (card, zeroed),
    ('[]', content),
    ('{"outputs": {"parts": {}}}', content),
  ):
    (damaged / 'model_card.json').write_text(one)
    (damaged / 'model.stablehlo').write_bytes(other)
    with pytest.raises(UserError, match='no exported network in'):
      predict_folder(damaged, empty, tmp_path / 'out')
  (damaged / 'model_card.json').write_text(card.replace('"smiling"', '"frowning"'))
  (damaged / 'model.stablehlo').write_bytes(content)
  with pytest.raises(UserError, match=r'is of another network: .*frowning.*smiling'):
    predict_folder(damaged, empty, tmp_path / 'out')
  image = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
  for other, takes in (
    (lambda x: {'parts': x, 'smiling': x}, [jax.ShapeDtypeStruct((3,), jnp.float32)]),
    (lambda x, y: {'parts': x, 'smiling': y}, [image, image]),
    (lambda x: x, [image]),
  ):
    program = jax.export.export(jax.jit(other))(*takes).serialize()
    digest = {'sha256': hashlib.sha256(program).hexdigest()}
    (damaged / 'model_card.json').write_text(json.dumps(json.loads(card) | digest))
    (damaged / 'model.stablehlo').write_bytes(program)
    with pytest.raises(UserError, match='is another program, not one from images'):
      predict_folder(damaged, empty, tmp_path / 'out')
  with pytest.raises(UserError, match='name another folder for the answers'):
    predict_folder(exported, empty, empty)
  with pytest.raises(UserError, match='nowhere: No such file'):
    predict_folder(exported, tmp_path / 'nowhere', tmp_path / 'out')
  with pytest.raises(UserError, match='no readable picture among the 0 files'):
    predict_folder(exported, empty, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  (empty / 'picture.png').write_bytes(b'no picture')
  with pytest.raises(UserError, match='no readable picture among the 1 files'):
    predict_folder(exported, empty, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(empty / 'picture.png')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file'):
    predict_folder(exported, empty, tmp_path / 'file' / 'below')
