"""What both renderers promise of the folder they write to."""

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest

from data import DataError, procedural_faces, procedural_rooms, stand_in

NUM, SEED = 9, 3


class Renderer(NamedTuple):
  """A renderer, its module, and what its data set looks like."""

  render: Callable
  module: object
  draws: str  # the function that one picture needs
  size: tuple[int, int]
  what: str
  layout: tuple[str, ...]


RENDERERS = {
  'faces': Renderer(
    procedural_faces.render_faces,
    procedural_faces,
    'draw_face',
    (48, 48),
    'procedural faces, a stand-in for CelebAMask-HQ',
    ('CelebA-HQ-img', 'CelebAMask-HQ-mask-anno', 'CelebAMask-HQ-attribute-anno.txt'),
  ),
  'rooms': Renderer(
    procedural_rooms.render_rooms,
    procedural_rooms,
    'draw_room',
    (24, 32),
    'procedural rooms, a stand-in for NYU-v2 (NYUD_MT)',
    ('images', 'segmentation', 'gt_sets'),
  ),
}


def contents(folder):
  """Every file below a folder, by its name."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


@pytest.fixture(scope='module', params=RENDERERS)
def renderer(request):
  return RENDERERS[request.param]


@pytest.fixture(scope='module')
def rendered(renderer, tmp_path_factory):
  target = tmp_path_factory.mktemp('stand_in') / 'set'
  return renderer.render(target, NUM, renderer.size, seed=SEED, progress=False)


def test_marker_tells_the_settings(renderer, rendered):
  assert json.loads((rendered / stand_in.MARKER).read_text()) == {
    'what': renderer.what,
    'renderer_version': renderer.module.RENDERER_VERSION,
    'num': NUM,
    'image_size': list(renderer.size),
    'seed': SEED,
    'complete': True,
  }


def test_complete_set_is_not_rendered_again(renderer, rendered, monkeypatch):
  monkeypatch.setattr(renderer.module, renderer.draws, None)
  renderer.render(rendered, NUM, renderer.size, seed=SEED, progress=False)


def test_a_picture_does_not_depend_on_how_many_there_are(renderer, rendered, tmp_path):
  fewer = renderer.render(tmp_path, NUM - 2, renderer.size, seed=SEED, progress=False)
  whole, found = contents(rendered), contents(fewer)
  pictures = [name for name in found if name.endswith(('.jpg', '.png', '.npy'))]
  assert sum(name.endswith('.jpg') for name in pictures) == NUM - 2
  for name in pictures:
    assert whole[name] == found[name]


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'seed': 4}, 'seed: 3, now 4'),
    ({'num': 13}, 'num: 9, now 13'),
    ({'image_size': (32, 36)}, ', now [32, 36]'),
  ],
)
def test_set_made_with_other_settings_is_refused(renderer, rendered, change, words):
  before = contents(rendered)
  settings = {'num': NUM, 'image_size': renderer.size, 'seed': SEED} | change
  with pytest.raises(DataError) as error:
    renderer.render(rendered, **settings, progress=False)
  assert words in str(error.value)
  assert contents(rendered) == before


@pytest.mark.parametrize('number', range(3))
def test_real_data_set_is_never_written_into(renderer, tmp_path, number):
  (tmp_path / renderer.layout[number]).mkdir()
  with pytest.raises(DataError, match='not procedural'):
    renderer.render(tmp_path, NUM, renderer.size, seed=0, progress=False)
  assert [path.name for path in tmp_path.iterdir()] == [renderer.layout[number]]


def test_target_that_is_a_file(renderer, tmp_path):
  (tmp_path / 'x').write_text('')
  with pytest.raises(DataError, match='cannot write procedural'):
    renderer.render(tmp_path / 'x', NUM, renderer.size, seed=0, progress=False)


def test_unreadable_marker(renderer, tmp_path):
  (tmp_path / stand_in.MARKER).write_text('{')
  with pytest.raises(DataError, match=r'procedural\.json is not readable'):
    renderer.render(tmp_path, NUM, renderer.size, seed=0, progress=False)
