"""The procedural stand-in: layout, determinism, resuming, plausible labels."""

import io

import numpy as np
import pytest
from PIL import Image

from data import DataError, celebamask_hq, render_faces
from data.procedural_faces import (
  UNMODELLED,
  _encode_mask,
  draw_face,
  paint_face,
)
from tests.test_data_stand_in import contents

NUM, SIZE = 12, (48, 48)


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
  target = tmp_path_factory.mktemp('faces') / 'set'
  return render_faces(target, NUM, SIZE, seed=3, progress=False)


def test_files_have_the_published_layout(faces):
  names = set(contents(faces))
  for number in range(NUM):
    assert f'CelebA-HQ-img/{number}.jpg' in names
    assert f'CelebAMask-HQ-mask-anno/0/{number:05d}_skin.png' in names
  for name in names:
    if name.endswith('.png'):
      part = name.rsplit('/', 1)[1].removesuffix('.png').split('_', 1)[1]
      assert part in celebamask_hq.PARTS
  with Image.open(faces / 'CelebA-HQ-img/0.jpg') as image:
    assert (image.size, image.mode) == ((48, 48), 'RGB')
  path = faces / 'CelebAMask-HQ-mask-anno/0/00000_skin.png'
  with Image.open(path) as mask:
    assert (mask.size, mask.mode) == ((48, 48), 'L')
    assert set(np.unique(np.asarray(mask))) == {0, 255}
  lines = (faces / 'CelebAMask-HQ-attribute-anno.txt').read_text().splitlines()
  assert lines[0] == str(NUM)
  assert lines[1].split() == list(celebamask_hq.ATTRIBUTES)
  assert len(lines) == NUM + 2
  assert lines[2].split()[0] == '0.jpg'
  assert set(lines[2].split()[1:]) == {'-1', '1'}


def test_folders_hold_2000_ids():
  path = celebamask_hq.part_path(celebamask_hq.Path('x'), 2000, 'l_eye')
  assert path.parts[-2:] == ('1', '02000_l_eye.png')
  path = celebamask_hq.part_path(celebamask_hq.Path('x'), 29999, 'hair')
  assert path.parts[-2:] == ('14', '29999_hair.png')


def test_same_seed_same_bytes_other_seed_other_faces(faces, tmp_path):
  again = render_faces(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  other = render_faces(tmp_path / 'b', NUM, SIZE, seed=4, progress=False)
  assert contents(again) == contents(faces)
  image = 'CelebA-HQ-img/0.jpg'
  assert contents(other)[image] != contents(faces)[image]


def test_seed_and_number_decide_the_face_and_the_scene(tmp_path, monkeypatch):
  from data import procedural_faces

  drawn = [draw_face(*key)[0].skin for key in ((0, 0), (0, 1), (1, 0))]
  assert len({tuple(skin) for skin in drawn}) == 3
  # The same face twice: background and noise still differ.
  same = draw_face(0, 0)
  monkeypatch.setattr(procedural_faces, 'draw_face', lambda *_: same)
  scenes = contents(render_faces(tmp_path, 2, SIZE, seed=0, progress=False))
  assert scenes['CelebA-HQ-img/0.jpg'] != scenes['CelebA-HQ-img/1.jpg']


def test_killed_rendering_continues_to_the_same_files(faces, tmp_path, monkeypatch):
  from data import procedural_faces

  write = procedural_faces._write_face

  def dies_at_5(target, index, *args):
    if index == 5:
      raise KeyboardInterrupt
    write(target, index, *args)

  monkeypatch.setattr(procedural_faces, '_write_face', dies_at_5)
  with pytest.raises(KeyboardInterrupt):
    render_faces(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  written = []
  monkeypatch.setattr(
    procedural_faces,
    '_write_face',
    lambda target, index, *args: (
      written.append(index),
      write(target, index, *args),
    ),
  )
  again = render_faces(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  assert written == list(range(5, NUM))
  assert contents(again) == contents(faces)


def test_mask_encoder_against_pillow():
  mask = np.random.default_rng(0).random((7, 13)) < 0.5
  decoded = np.asarray(Image.open(io.BytesIO(_encode_mask(mask))))
  np.testing.assert_array_equal(decoded, mask * 255)


def test_attributes_are_as_in_life():
  rows = [draw_face(0, index)[1] for index in range(3000)]
  table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  assert set(table) | set(UNMODELLED) == set(celebamask_hq.ATTRIBUTES)
  assert not set(table) & set(UNMODELLED)
  for name, values in table.items():
    assert 0.01 < values.mean() < 0.9, name
  male, smiling, young = table['Male'], table['Smiling'], table['Young']
  for name in ('Male', 'Smiling', 'High_Cheekbones', 'Wearing_Lipstick'):
    assert 0.3 < table[name].mean() < 0.6, name
  assert table['Wearing_Lipstick'][male].mean() == 0
  assert 0.4 < table['Wearing_Lipstick'][~male].mean() < 0.9
  correlation = np.corrcoef(smiling, table['High_Cheekbones'])[0, 1]
  assert 0.3 < correlation < 0.8
  assert table['Gray_Hair'][~young].mean() > 0.2
  assert not table['Gray_Hair'][young].any()
  hair = sum(
    table[f'{colour}_Hair'].astype(int)
    for colour in ('Black', 'Blond', 'Brown', 'Gray')
  )
  np.testing.assert_array_equal(hair, ~table['Bald'])


def test_attributes_agree_with_the_masks():
  for index in range(60):
    face, attributes = draw_face(1, index)
    _, masks = paint_face(face, SIZE, np.random.default_rng(index))
    assert ('hat' in masks) == attributes['Wearing_Hat']
    assert ('eye_g' in masks) == attributes['Eyeglasses']
    assert not (attributes['Bald'] and 'hair' in masks)
    assert 'skin' in masks
    # Parts in front leave nothing of the skin under them; features do.
    for part in ('hair', 'hat', 'l_ear', 'r_ear'):
      if part in masks:
        assert not (masks[part] & masks['skin']).any(), part


def test_viewers_left_eye_is_on_the_left():
  checked = 0
  for index in range(30):
    face, _ = draw_face(2, index)
    _, masks = paint_face(face, SIZE, np.random.default_rng(0))
    if {'l_eye', 'r_eye'} <= masks.keys():
      left, right = (np.argwhere(masks[p])[:, 1].mean() for p in ('l_eye', 'r_eye'))
      assert left < right
      checked += 1
  assert checked > 15


def test_any_picture_size_shows_the_same_face():
  face, _ = draw_face(0, 0)
  face = face._replace(noise=0.0)
  small, small_masks = paint_face(face, (64, 64), np.random.default_rng(0))
  large, large_masks = paint_face(face, (128, 128), np.random.default_rng(0))
  halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
  assert np.abs(halved - small).mean() < 6
  skin = large_masks['skin'].mean(), small_masks['skin'].mean()
  assert skin[0] == pytest.approx(skin[1], rel=0.05)


@pytest.mark.parametrize('wrong', [{'num': 0}, {'image_size': (8, 64)}, {'seed': -1}])
def test_impossible_settings(tmp_path, wrong):
  settings = {'num': 1, 'image_size': SIZE, 'seed': 0} | wrong
  with pytest.raises(DataError, match='cannot render'):
    render_faces(tmp_path / 'a', **settings, progress=False)
  assert not (tmp_path / 'a').exists()
