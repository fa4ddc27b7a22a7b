"""Procedural rooms: layout, determinism, resuming, and labels that are exact."""

import numpy as np
import pytest
from PIL import Image

from data import DataError, procedural_rooms, stand_in
from data.procedural_rooms import (
  Camera,
  Lights,
  Room,
  Solids,
  cast,
  draw_room,
  focal_length,
  render_rooms,
  split_of,
)
from tests.test_data_stand_in import contents

NUM, SIZE = 10, (24, 32)
BRICK, BALL, DRUM = range(3)


@pytest.fixture(scope='module')
def rooms(tmp_path_factory):
  target = tmp_path_factory.mktemp('rooms') / 'set'
  return render_rooms(target, NUM, SIZE, seed=3, progress=False)


@pytest.fixture(scope='module')
def cases():
  """Rooms and their scenes."""
  drawn = [draw_room(5, index) for index in range(12)]
  return [(room, cast(room, (48, 64))) for room in drawn]


def rotation(room):
  """Camera to world, as three turns one after the other."""

  def turn(angle, first, second):
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix

  camera = room.camera
  return turn(camera.yaw, 2, 0) @ turn(camera.pitch, 1, 2) @ turn(camera.roll, 0, 1)


def rays(size):
  """(H, W, 3): the point at depth 1 of every pixel's middle, camera coordinates."""
  rows, columns = np.indices(size)
  focal = focal_length(size)
  x = (columns + 0.5 - size[1] / 2) / focal
  y = -(rows + 0.5 - size[0] / 2) / focal
  return np.stack([x, y, -np.ones(size)], -1)


def plain_room(solids, light=(0.0, 2.9, 0.0), at_ceiling=True):
  """A grey room 4 m wide, 3 m high and 6 m deep, seen from its end; no noise.

  Each solid is (shape, label, centre, half sizes, yaw).
  """
  shell = [(BRICK, label, (0, 1.5, 0), (2, 1.5, 3), 0) for label in (1, 2, 22)]
  shape, label, centre, half, yaw = zip(*shell, *solids, strict=True)
  num = len(shape)
  return Room(
    key=(0, 0),
    size=np.array([4.0, 3.0, 6.0]),
    solids=Solids(
      np.array(shape, np.int8),
      np.array(label, np.uint8),
      np.array(centre, np.float64),
      np.array(half, np.float64),
      np.array(yaw, np.float64),
      np.zeros(num, np.int8),
      np.full((num, 2, 3), 0.5, np.float32),
      np.full(num, 0.1, np.float32),
      np.zeros(num, np.int64),
      np.zeros(num, np.float32),
    ),
    lights=Lights(
      np.array([light]), np.ones((1, 3), np.float32), np.array([at_ceiling])
    ),
    ambient=np.full(3, 0.1, np.float32),
    camera=Camera(np.array([0.0, 1.5, 2.5]), 0.0, 0.0, 0.0),
    exposure=0.4,
    tint=np.ones(3, np.float32),
    noise=0.0,
    jpeg_quality=90,
  )


# Files.


def test_files_have_the_published_layout(rooms):
  names = set(contents(rooms))
  expected = {'procedural.json', '.lock'}
  expected |= {f'gt_sets/{split}.txt' for split in ('train', 'val', 'test')}
  for index in range(NUM):
    expected |= {f'images/{index:06d}.jpg', f'segmentation/{index:06d}.png'}
    expected |= {f'{what}/{index:06d}.npy' for what in ('depth', 'normals', 'edge')}
  assert names == expected
  with Image.open(rooms / 'images/000002.jpg') as image:
    assert (image.size, image.mode) == ((32, 24), 'RGB')
  with Image.open(rooms / 'segmentation/000002.png') as label:
    assert (label.size, label.mode) == ((32, 24), 'L')
  for what, shape in (('depth', SIZE), ('edge', SIZE), ('normals', (*SIZE, 3))):
    array = np.load(rooms / what / '000002.npy')
    assert (array.shape, array.dtype) == (shape, np.float32)


def test_files_hold_what_the_camera_saw(rooms):
  scene = cast(draw_room(3, 4), SIZE)
  label = np.asarray(Image.open(rooms / 'segmentation/000004.png'))
  np.testing.assert_array_equal(label, scene.segmentation)
  for what in ('depth', 'normals', 'edge'):
    array = np.load(rooms / what / '000004.npy')
    np.testing.assert_array_equal(array, getattr(scene, what))
  image = np.asarray(Image.open(rooms / 'images/000004.jpg'), np.float32)
  assert np.abs(image - scene.image).mean() < 12


def test_splits_are_disjoint_and_hold_every_room(rooms):
  splits = {
    split: (rooms / f'gt_sets/{split}.txt').read_text().split()
    for split in ('train', 'val', 'test')
  }
  assert all(splits.values())
  together = sorted(name for names in splits.values() for name in names)
  assert together == [f'{index:06d}' for index in range(NUM)]
  drawn = [split_of(index) for index in range(200)]
  assert [drawn.count(s) for s in ('train', 'val', 'test')] == [140, 30, 30]


def test_same_seed_same_bytes_other_seed_other_rooms(rooms, tmp_path):
  again = render_rooms(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  other = render_rooms(tmp_path / 'b', 7, SIZE, seed=4, progress=False)
  assert contents(again) == contents(rooms)
  for name in ('images/000000.jpg', 'segmentation/000000.png', 'depth/000000.npy'):
    assert contents(other)[name] != contents(rooms)[name]
    assert contents(rooms)[name.replace('0.', '1.')] != contents(rooms)[name]


@pytest.mark.parametrize('last', ['normals', 'segmentation', 'images'])
def test_killed_rendering_continues_to_the_same_files(
  rooms, tmp_path, monkeypatch, last
):
  write, written = procedural_rooms.write_atomically, []

  def dies_in_room_5(path, content):
    if path.parent.name == last and path.stem == '000005':
      raise KeyboardInterrupt
    write(path, content)

  monkeypatch.setattr(procedural_rooms, 'write_atomically', dies_in_room_5)
  with pytest.raises(KeyboardInterrupt):
    render_rooms(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  assert not (tmp_path / 'a/images/000005.jpg').exists()
  assert not (tmp_path / 'a/gt_sets/train.txt').exists()

  def notes(path, content):
    written.append(path.name)
    write(path, content)

  monkeypatch.setattr(procedural_rooms, 'write_atomically', notes)
  again = render_rooms(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  pictures = [name for name in written if name.endswith('.jpg')]
  assert pictures == [f'{index:06d}.jpg' for index in range(5, NUM)]
  assert contents(again) == contents(rooms)


def test_killed_before_the_first_room_it_can_begin_again(tmp_path, monkeypatch):
  def dies(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(procedural_rooms, 'draw_room', dies)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      render_rooms(tmp_path / 'a', NUM, SIZE, seed=3, progress=False)
  made = []

  def dies_marking(folder, *settings, **complete):
    made.extend(path.name for path in folder.iterdir())
    raise KeyboardInterrupt

  monkeypatch.setattr(stand_in, 'mark', dies_marking)
  with pytest.raises(KeyboardInterrupt):
    render_rooms(tmp_path / 'b', NUM, SIZE, seed=3, progress=False)
  assert made == ['.lock']  # nothing that would pass for a real data set


@pytest.mark.parametrize('wrong', [{'num': 6}, {'image_size': (8, 64)}, {'seed': -1}])
def test_impossible_settings(tmp_path, wrong):
  settings = {'num': 7, 'image_size': SIZE, 'seed': 0} | wrong
  with pytest.raises(DataError, match='cannot render'):
    render_rooms(tmp_path / 'a', **settings, progress=False)
  assert not (tmp_path / 'a').exists()


# Labels.


def test_values_of_the_labels(cases):
  for _, scene in cases:
    assert scene.image.dtype == scene.segmentation.dtype == np.uint8
    assert scene.segmentation.max() <= 40
    present = scene.depth > 0
    assert present.mean() > 0.4
    assert scene.depth[present].min() >= 0.5
    assert scene.depth[present].max() <= 10
    length = np.linalg.norm(scene.normals, axis=-1)
    np.testing.assert_allclose(length[present], 1, atol=1e-6)
    assert not scene.normals[~present].any()
    towards_viewer = -(scene.normals * rays((48, 64))).sum(-1)
    assert (towards_viewer[present] > 0).all()
    assert set(np.unique(scene.edge)) == {0.0, 1.0}


def inside(solids, points, slack):
  """(S, ...) bool: which solids hold which world points (..., 3)."""
  held = []
  for shape, centre, half, yaw in zip(
    solids.shape, solids.centre, solids.half, solids.yaw, strict=True
  ):
    x, y, z = np.moveaxis(points - centre, -1, 0)
    local = (
      np.stack([
        np.cos(yaw) * x - np.sin(yaw) * z, y, np.sin(yaw) * x + np.cos(yaw) * z,
      ])
    )  # fmt: skip
    local = np.moveaxis(local, 0, -1) / (half + slack)
    if shape == BRICK:
      held.append((np.abs(local) <= 1).all(-1))
    elif shape == BALL:
      held.append((local**2).sum(-1) <= 1)
    else:
      across = local[..., 0] ** 2 + local[..., 2] ** 2
      held.append((across <= 1) & (np.abs(local[..., 1]) <= 1))
  return np.array(held)


def test_depth_ends_at_the_solid_seen_and_meets_nothing_before(cases):
  size = (48, 64)
  for room, scene in cases:
    present = scene.depth > 0
    rows, columns = (index[::19] for index in np.nonzero(present))
    seen = scene.surfaces[rows, columns] // 6
    along = rays(size)[rows, columns] @ rotation(room).T
    depth = scene.depth[rows, columns].astype(np.float64)[:, None]
    ends = room.camera.position + along * depth
    near, within = (inside(room.solids, ends, slack) for slack in (1e-4, -1e-4))
    each = np.arange(len(seen))
    assert near[seen, each].all()
    # On the surface, not somewhere in it.
    assert not within[seen, each].any()
    fractions = np.linspace(0.01, 0.999, 120)[:, None, None]
    before = room.camera.position + fractions * (along * depth)
    assert inside(room.solids, before, 1e-6)[0].all()  # the room itself
    assert not inside(room.solids, before, -1e-3)[3:].any()


def test_neighbours_on_a_flat_surface_lie_in_its_plane(cases):
  pairs = 0
  for room, scene in cases:
    points = rays((48, 64)) * scene.depth[..., None]
    shape = room.solids.shape[scene.surfaces // 6]
    face = scene.surfaces % 6 // 2
    flat = (shape == BRICK) | ((shape == DRUM) & (face == 1))
    flat &= scene.depth > 0
    for step in ((0, 1), (1, 0)):
      a = np.s_[: 48 - step[0], : 64 - step[1]]
      b = np.s_[step[0] :, step[1] :]
      same = flat[a] & flat[b] & (scene.surfaces[a] == scene.surfaces[b])
      offset = (points[b] - points[a])[same]
      normals = scene.normals[a][same]
      np.testing.assert_array_equal(normals, scene.normals[b][same])
      assert np.abs((offset * normals).sum(-1)).max() < 1e-5
      # Not for want of length.
      assert np.linalg.norm(offset, axis=-1).min() > 5e-3
      pairs += same.sum()
  assert pairs > 20_000


def test_normals_of_the_floor_are_up_and_of_round_things_point_away():
  ball = (BALL, 40, (0.3, 1.2, -0.5), (0.8, 0.6, 0.5), 0.7)
  drum = (DRUM, 35, (-1.1, 1.0, 0.0), (0.3, 0.7, 0.4), 0.3)
  room = plain_room([ball, drum])
  scene = cast(room, (60, 80))
  points = room.camera.position + rays((60, 80)) * scene.depth[..., None]
  present = scene.depth > 0
  floor = present & (scene.segmentation == 2)
  np.testing.assert_allclose(points[floor][:, 1], 0, atol=1e-6)
  np.testing.assert_allclose(scene.normals[floor] - (0, 1, 0), 0, atol=1e-7)
  back = present & (scene.surfaces == 5)
  assert back.any()
  np.testing.assert_allclose(points[back][:, 2], -3, atol=1e-6)
  for number, (shape, _, centre, half, yaw) in ((3, ball), (4, drum)):
    seen = present & (scene.surfaces == 6 * number)
    assert seen.sum() > 100
    cos, sin = np.cos(yaw), np.sin(yaw)
    axes = np.array([(cos, 0, -sin), (0, 1, 0), (sin, 0, cos)])
    local = (points[seen] - centre) @ axes.T / half
    if shape == DRUM:
      local[:, 1] = 0
    np.testing.assert_allclose((local**2).sum(-1), 1, atol=1e-5)
    outwards = (local / half) @ axes
    outwards /= np.linalg.norm(outwards, axis=-1, keepdims=True)
    np.testing.assert_allclose(scene.normals[seen], outwards, atol=1e-5)


def test_normals_are_right_up_and_towards_the_viewer():
  """A brick turned by 45° shows a left and a right face; a look down shows its top."""
  brick = (BRICK, 29, (0, 0.7, 0), (0.5, 0.2, 0.5), np.pi / 4)
  scene = cast(plain_room([brick]), (60, 80))
  own = (scene.segmentation == 29) & (scene.depth > 0)
  normals = scene.normals[own]
  x = np.nonzero(own)[1]
  left = normals[:, 0] < -0.7
  right = normals[:, 0] > 0.7
  top = normals[:, 1] > 0.99
  assert left.any()
  assert right.any()
  assert top.any()
  assert (left | right | top).all()
  assert x[left].mean() < 40 < x[right].mean()
  np.testing.assert_allclose(normals[left][:, 2], 0.5**0.5, atol=1e-6)


def test_edges_are_where_the_next_pixel_shows_another_surface(cases):
  for _, scene in cases[:2]:
    surfaces = scene.surfaces
    for row in range(48):
      for column in range(64):
        here = surfaces[row, column]
        right = column < 63 and surfaces[row, column + 1] != here
        below = row < 47 and surfaces[row + 1, column] != here
        assert scene.edge[row, column] == float(right or below)


def test_labels_are_those_of_the_solid_seen_or_a_fringe(cases):
  for room, scene in cases:
    label = room.solids.label[scene.surfaces // 6]
    fringe = scene.segmentation != label
    assert not scene.segmentation[fringe].any()
    assert (scene.edge[fringe] == 1).all()
    assert fringe.mean() < 0.1


def test_labels_do_not_depend_on_the_picture_size():
  # The middle of three pixels by three is the middle of the large pixel.
  for index in range(4):
    room = draw_room(8, index)._replace(noise=0.0)
    small, large = cast(room, (24, 32)), cast(room, (72, 96))
    np.testing.assert_array_equal(large.surfaces[1::3, 1::3], small.surfaces)
    both = (small.depth > 0) & (large.depth[1::3, 1::3] > 0)
    np.testing.assert_allclose(
      large.depth[1::3, 1::3][both], small.depth[both], rtol=1e-6
    )
    shrunk = large.image.reshape(24, 3, 32, 3, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 8


def test_mirrored_room_has_mirrored_labels():
  flip = np.array([-1.0, 1.0, 1.0])
  for index in range(4):
    room = draw_room(9, index)
    solids, camera, lights = room.solids, room.camera, room.lights
    mirrored = room._replace(
      solids=solids._replace(centre=solids.centre * flip, yaw=-solids.yaw),
      camera=camera._replace(
        position=camera.position * flip, yaw=-camera.yaw, roll=-camera.roll
      ),
      lights=lights._replace(position=lights.position * flip),
    )
    one, other = cast(room, (48, 64)), cast(mirrored, (48, 64))
    same = one.surfaces // 2 == other.surfaces[:, ::-1] // 2
    assert same.mean() > 0.995
    both = same & (one.depth > 0) & (other.depth[:, ::-1] > 0)
    assert both.mean() > 0.3
    np.testing.assert_allclose(other.depth[:, ::-1][both], one.depth[both], rtol=1e-5)
    np.testing.assert_allclose(
      other.normals[:, ::-1][both], one.normals[both] * flip, atol=1e-5
    )


def test_depth_is_missing_where_a_kinect_sees_nothing():
  pole = (BRICK, 38, (0.0, 1.5, 1.0), (0.15, 1.4, 0.02), 0.0)
  room = plain_room([pole])
  depth = cast(room, (48, 64)).depth
  # Its shadow falls on one side: left of a thing, as the projector stands to the right.
  edge_of_pole = np.flatnonzero(depth[24] == depth[24, 32])
  left, right = edge_of_pole[0] - 1, edge_of_pole[-1] + 1
  assert (depth[20:28, left] == 0).all()
  assert (depth[20:28, right] > 0).mean() > 0.8
  # The screen of a television, and what is more than 10 m away.
  screen = room.solids._replace(texture=np.array([0, 0, 0, procedural_rooms._SCREEN]))
  assert (cast(room._replace(solids=screen), (48, 64)).depth[:, 32] == 0).mean() > 0.6
  far = plain_room([])
  far = far._replace(
    solids=far.solids._replace(half=np.tile([2, 1.5, 12.0], (3, 1))),
    camera=far.camera._replace(position=np.array([0, 1.5, 11.0])),
  )
  depth = cast(far, (48, 64)).depth
  assert (depth[22:26, 30:34] == 0).all()
  assert 9 < depth.max() <= 10


# Pictures.


def test_shadow_of_a_slab_under_the_light():
  slab = (BRICK, 7, (0, 1.0, -1.0), (0.5, 0.02, 0.5), 0.0)
  light = (0.0, 2.9, -1.0)
  dark = cast(plain_room([slab], light), (96, 128))
  lit = cast(plain_room([slab], light, at_ceiling=False), (96, 128))
  points = np.array([0, 1.5, 2.5]) + rays((96, 128)) * dark.depth[..., None]
  floor = (dark.depth > 0) & (dark.segmentation == 2) & (dark.edge == 0)
  reach = np.maximum(np.abs(points[..., 0]), np.abs(points[..., 2] + 1))
  # Rays past its lower rim reach the floor at 0.5 * 2.9 / 1.92.
  end = 0.5 * 2.9 / 1.92
  within, beside = floor & (reach < end - 0.06), floor & (reach > end + 0.06)
  ratio = dark.image[..., 0] / np.maximum(lit.image[..., 0].astype(float), 1)
  assert min(within.sum(), beside.sum()) > 100
  assert ratio[within].max() < 0.8 * ratio[beside].min()


def test_pictures_change_at_the_edges(cases):
  at, off = [], []
  for _, scene in cases:
    image = scene.image.astype(np.float32)
    change = np.abs(np.diff(image, axis=1)).sum(-1)[:-1]
    edge = scene.edge[:-1, :-1] > 0
    at.append(change[edge].mean())
    off.append(change[~edge].mean())
  assert np.mean(at) > 1.5 * np.mean(off)


def test_pictures_differ_in_light_and_are_neither_black_nor_white(cases):
  means = np.array([scene.image.mean() for _, scene in cases])
  assert means.min() > 50
  assert means.max() < 190
  assert means.std() > 5


def test_classes_of_200_rooms(monkeypatch):
  # Labels alone: pictures take most of the time.
  monkeypatch.setattr(procedural_rooms, '_photograph', lambda *_: None)
  seen, pixels = np.zeros(41, int), np.zeros(41)
  for index in range(200):
    label = cast(draw_room(0, index), (24, 32)).segmentation
    count = np.bincount(label.ravel(), minlength=41)
    seen += count > 0
    pixels += count / label.size / 200
  assert (seen[1:] >= 4).sum() >= 36
  assert seen[procedural_rooms.WALL] == 200
  assert seen[procedural_rooms.FLOOR] > 180
  # Much of a picture is furniture; little of it is unlabelled.
  assert pixels[[1, 2, 22]].sum() < 0.75
  assert 0.005 < pixels[0] < 0.12
