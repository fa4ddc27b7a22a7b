"""Procedural rooms: ray-cast interiors as files in the NYUD_MT layout.

The stand-in for NYU-v2. It differs from the published data set only in its files:
`images/ID.jpg`, `segmentation/ID.png`, `depth/ID.npy`, `normals/ID.npy`,
`edge/ID.npy` and `gt_sets/{train,val,test}.txt`. The labels are exact because the
program that drew the rooms wrote them.

A room is made in two stages. `draw_room` samples what is there: a bedroom, living
room, kitchen, office or bathroom with the furniture that belongs to it along the
walls and in the middle, all of it boxes, ellipsoids and upright cylinders; lamps, and
a camera. `cast` sends a ray through every pixel and keeps the nearest surface. The
picture averages 2 × 2 rays a pixel, lit by one to three lamps (Lambert, falling off
with distance; those at the ceiling cast hard shadows), and goes through the errors
of a camera: exposure, white balance, noise. The labels are those of the ray through
the middle of the pixel:

- segmentation: the 40 classes of NYU, 0 = unlabelled: some whole things, and here
  and there a thin fringe where classes meet.
- depth: metres along the optical axis, without noise. 0 = missing, where a Kinect
  measures nothing: too near or far, at grazing angles, in the shadow that things throw
  on the background as its projector stands beside its camera, on most of glass, mirrors
  and screens, and in specks that grow more frequent with distance.
- normals: unit vectors in camera coordinates, x to the right, y up, z towards the
  viewer; 0 where the depth is missing. A mirrored picture has x negated.
- edge: 1 where the pixel to the right or below shows another surface (a face of a box,
  the side or the end of a cylinder, an ellipsoid); textures are no edges.

Every room depends only on (seed, index): rendering is resumable and does not depend
on order.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import stand_in
from data.errors import DataError
from data.files import write_atomically
from data.progress import progress_bar

RENDERER_VERSION = 1

FIELD_OF_VIEW = np.deg2rad(60.0)  # horizontal, as that of a Kinect
NEAREST, FARTHEST = 0.5, 10.0  # metres: what a Kinect measures
BASELINE = 0.075  # metres from the projector of a Kinect to its camera
GRAZING = 0.12  # cosine of the angle at which its pattern is too faint

# Of 20 rooms in a row, these are for validation and for testing.
VAL_ROOMS, TEST_ROOMS = (3, 10, 16), (6, 13, 19)

WALL, FLOOR, CABINET, BED, CHAIR, SOFA, TABLE, DOOR, WINDOW, BOOKSHELF = range(1, 11)
PICTURE, COUNTER, BLINDS, DESK, SHELVES, CURTAIN, DRESSER, PILLOW = range(11, 19)
MIRROR, FLOOR_MAT, CLOTHES, CEILING, BOOKS, REFRIGERATOR = range(19, 25)
TELEVISION, PAPER, TOWEL, SHOWER_CURTAIN, BOX, WHITEBOARD = range(25, 31)
PERSON, NIGHT_STAND, TOILET, SINK, LAMP, BATHTUB, BAG = range(31, 38)
OTHER_STRUCTURE, OTHER_FURNITURE, OTHER_PROP = range(38, 41)

# Shapes.
_BRICK, _BALL, _DRUM = range(3)
# Textures.
(
  _PLAIN, _NOISE, _WOOD, _PLANKS, _TILES, _STRIPES, _CHECKS, _PANELS, _FOLDS, _SLATS,
  _SPINES, _PAINTING, _OUTSIDE, _SCREEN, _MIRRORED,
) = range(15)  # fmt: skip

# The first solids are the walls, the floor and the ceiling: the room seen from inside.
_SHELL = 3

# Noise for textures: tones and colours, indexed modulo its length.
_LATTICE = 64
_TONES = np.random.default_rng(0).random((_LATTICE, _LATTICE), np.float32)
_COLOURS = np.random.default_rng(1).random((_LATTICE, _LATTICE, 3), np.float32) ** 1.5


class Solids(NamedTuple):
  """What the room consists of, S things. World: metres, y up, origin on the floor."""

  shape: np.ndarray  # (S,) int8: brick, ball, drum
  label: np.ndarray  # (S,) uint8: class, 0 = unlabelled
  centre: np.ndarray  # (S, 3) float64
  half: np.ndarray  # (S, 3) float64: half its width, height and depth
  yaw: np.ndarray  # (S,) float64: radians about the vertical
  texture: np.ndarray  # (S,) int8
  colour: np.ndarray  # (S, 2, 3) float32: reflectance of both colours of the texture
  scale: np.ndarray  # (S,) float32: metres, period of the texture
  phase: np.ndarray  # (S,) int64: which part of the noise it takes
  glow: np.ndarray  # (S,) float32: light of its own


class Lights(NamedTuple):
  """L point lights."""

  position: np.ndarray  # (L, 3) float64, metres
  colour: np.ndarray  # (L, 3) float32
  at_ceiling: np.ndarray  # (L,) bool: above all solids; these cast shadows


class Camera(NamedTuple):
  """Where the camera stands and looks: along -z when all angles are 0."""

  position: np.ndarray  # (3,) float64, metres
  yaw: float  # radians about the vertical, positive to the left
  pitch: float  # radians, positive upwards
  roll: float  # radians


class Room(NamedTuple):
  """What is in one picture."""

  key: tuple[int, int]  # seed and index, for noise
  size: np.ndarray  # (3,) float64, metres: width, height, depth
  solids: Solids
  lights: Lights
  ambient: np.ndarray  # (3,) float32
  camera: Camera
  # Errors of the camera.
  exposure: float  # brightness of the mean pixel
  tint: np.ndarray  # (3,) float32
  noise: float  # standard deviation, of 1
  jpeg_quality: int


class Scene(NamedTuple):
  """A picture with its labels, H × W pixels."""

  image: np.ndarray  # (H, W, 3) uint8, with the camera's noise
  segmentation: np.ndarray  # (H, W) uint8, 0 = unlabelled, classes 1..40
  depth: np.ndarray  # (H, W) float32, metres along the optical axis, 0 = missing
  normals: np.ndarray  # (H, W, 3) float32, unit vectors, 0 = missing
  edge: np.ndarray  # (H, W) float32 in {0, 1}
  surfaces: np.ndarray  # (H, W) int32: the surface seen, each has its number


class _Paint(NamedTuple):
  """How a solid looks."""

  colour: np.ndarray
  texture: int = _PLAIN
  other: np.ndarray | None = None  # second colour; None: a darker first
  scale: float = 0.1
  glow: float = 0.0


class _Row(NamedTuple):
  """One solid, in the frame of its piece or of the room."""

  shape: int
  label: int
  centre: tuple[float, float, float]
  half: tuple[float, float, float]
  yaw: float
  paint: _Paint
  phase: int


class _Piece:
  """A thing of several solids. Its frame: x along the wall, y up, z off the wall."""

  def __init__(self, dice: '_Dice'):
    self.dice = dice
    self.rows: list[_Row] = []

  def add(self, label, at, size, paint, shape=_BRICK, yaw=0.0) -> None:
    """Adds a solid: x and z of `at` are of its middle, y is of its bottom."""
    half = tuple(length / 2 for length in size)
    centre = (at[0], at[1] + half[1], at[2])
    phase = self.dice.whole(0, _LATTICE**2)
    self.rows.append(_Row(shape, label, centre, half, yaw, paint, phase))

  def legs(self, label, width, depth, height, thick, paint, z=0.0) -> None:
    """Four of them, at the corners of width × depth whose back is at z."""
    for x in (-1, 1):
      for side in (thick / 2, depth - thick / 2):
        at = (x * (width - thick) / 2, 0.0, z + side)
        self.add(label, at, (thick, height, thick), paint)

  def bounds(self) -> tuple[list[float], list[float]]:
    """Lowest and highest x, y and z."""
    low = [min(r.centre[i] - r.half[i] for r in self.rows) for i in range(3)]
    high = [max(r.centre[i] + r.half[i] for r in self.rows) for i in range(3)]
    return low, high

  def placed(self, x: float, z: float, angle: float) -> list[_Row]:
    """Its solids in the frame of the room."""
    cos, sin = np.cos(angle), np.sin(angle)
    rows = []
    for row in self.rows:
      a, y, b = row.centre
      centre = (x + cos * a + sin * b, y, z - sin * a + cos * b)
      rows.append(row._replace(centre=centre, yaw=row.yaw + angle))
    return rows


class _Dice:
  """Short names for random choices."""

  def __init__(self, rng: np.random.Generator):
    self.rng = rng

  def chance(self, p: float) -> bool:
    return self.rng.random() < p

  def between(self, low: float, high: float) -> float:
    return low + (high - low) * self.rng.random()

  def whole(self, low: int, high: int) -> int:
    """A whole number: low <= n < high."""
    return low + int((high - low) * self.rng.random())

  def one(self, options):
    return options[self.whole(0, len(options))]

  def tone(self, options, spread: float = 0.04) -> np.ndarray:
    """One of the colours, lighter or darker, and slightly off."""
    colour = np.array(self.one(options)) * self.between(0.75, 1.2)
    return np.clip(colour + self.rng.normal(0, spread, 3), 0.02, 0.95)

  def any_colour(self) -> np.ndarray:
    return self.rng.uniform(0.04, 0.85, 3)


_WOODS = (
  (0.45, 0.27, 0.13), (0.6, 0.4, 0.22), (0.28, 0.16, 0.09), (0.7, 0.53, 0.34),
  (0.36, 0.2, 0.12),
)  # fmt: skip
_WALLS = (
  (0.82, 0.79, 0.7), (0.75, 0.75, 0.76), (0.8, 0.7, 0.52), (0.62, 0.7, 0.74),
  (0.66, 0.72, 0.58), (0.78, 0.62, 0.56),
)  # fmt: skip
_CARPETS = ((0.5, 0.43, 0.34), (0.4, 0.4, 0.42), (0.33, 0.36, 0.44), (0.52, 0.38, 0.3))
_CLOTHS = (
  (0.16, 0.2, 0.4), (0.5, 0.12, 0.12), (0.55, 0.5, 0.42), (0.25, 0.25, 0.27),
  (0.2, 0.34, 0.24), (0.42, 0.26, 0.16), (0.35, 0.2, 0.36),
)  # fmt: skip
_WHITES = ((0.85, 0.85, 0.83), (0.8, 0.78, 0.72))
_METALS = ((0.5, 0.5, 0.52), (0.15, 0.15, 0.16), (0.3, 0.3, 0.32))
_CARDBOARD = ((0.62, 0.45, 0.27), (0.55, 0.38, 0.22))


def _wood(dice: _Dice, texture: int = _WOOD, scale: float = 0.07) -> _Paint:
  return _Paint(dice.tone(_WOODS), texture, scale=scale)


def _cloth(dice: _Dice) -> _Paint:
  if dice.chance(0.2):
    texture = dice.one((_STRIPES, _CHECKS))
    return _Paint(
      dice.tone(_CLOTHS), texture, dice.tone(_CLOTHS + _WHITES), dice.between(0.08, 0.2)
    )
  return _Paint(dice.tone(_CLOTHS), _NOISE, scale=0.03)


def _clutter(piece: _Piece, x, z, y, kinds, num) -> None:
  """Puts small things on a top at height y between x[0] and x[1], z[0] and z[1]."""
  dice = piece.dice
  for slot in range(num):
    # A slot each, so that they do not stand in one another.
    width = (x[1] - x[0]) / num
    at_x = x[0] + (slot + dice.between(0.35, 0.65)) * width
    at = (at_x, y, dice.between(z[0] + 0.3 * (z[1] - z[0]), z[1] - 0.1))
    _small_thing(piece, dice.one(kinds), at, min(width, 0.6))


def _small_thing(piece: _Piece, kind: int, at, room: float) -> None:
  """Adds one thing that is at most `room` wide."""
  dice = piece.dice
  fit = lambda length: min(length, 0.85 * room)
  yaw = dice.between(-0.5, 0.5)
  label = 0 if dice.chance(0.08) else kind
  if kind == BOOKS:
    y = at[1]
    for _ in range(dice.whole(1, 4)):
      high = dice.between(0.02, 0.05)
      size = (fit(dice.between(0.16, 0.24)), high, dice.between(0.12, 0.18))
      piece.add(label, (at[0], y, at[2]), size, _Paint(dice.any_colour()), yaw=yaw)
      y, yaw = y + high, yaw + dice.between(-0.2, 0.2)
  elif kind == PAPER:
    size = (fit(0.21), 0.004, 0.29)
    paint = _Paint(dice.tone(((0.9, 0.9, 0.88),)), _SLATS, scale=0.03)
    piece.add(label, at, size, paint, yaw=yaw)
  elif kind == BOX:
    size = [fit(dice.between(0.15, 0.35)) for _ in range(3)]
    piece.add(label, at, size, _Paint(dice.tone(_CARDBOARD)), yaw=yaw)
  elif kind == LAMP:
    _lamp(piece, at, dice.between(0.3, 0.5), fit(dice.between(0.2, 0.3)))
  elif kind == PILLOW:
    width = fit(dice.between(0.35, 0.5))
    piece.add(label, at, (width, 0.15, 0.3), _cloth(dice), _BALL)
  elif kind == BAG:
    width = fit(dice.between(0.25, 0.4))
    high, paint = dice.between(0.3, 0.45), _Paint(dice.tone(_CLOTHS), _NOISE)
    piece.add(label, at, (width, high, 0.6 * width), paint, _BALL, yaw)
    top = (at[0], at[1] + 0.85 * high, at[2])
    piece.add(label, top, (0.4 * width, 0.15, 0.03), paint, yaw=yaw)
  elif kind == CLOTHES:
    for _ in range(dice.whole(2, 4)):
      middle = (at[0] + dice.between(-0.1, 0.1), at[1], at[2] + dice.between(-0.1, 0.1))
      size = (fit(dice.between(0.25, 0.5)), 0.14, dice.between(0.25, 0.45))
      piece.add(label, middle, size, _Paint(dice.any_colour()), _BALL, yaw)
  else:
    shape = dice.whole(0, 3)
    width = fit(dice.between(0.07, 0.16))
    high = width if shape == _BALL else dice.between(0.08, 0.3)
    piece.add(label, at, (width, high, width), _Paint(dice.any_colour()), shape, yaw)


def _lamp(piece: _Piece, at, height: float, width: float) -> None:
  dice = piece.dice
  metal, shade = _Paint(dice.tone(_METALS)), 0.22 if height < 1 else 0.3
  x, y, z = at
  piece.add(LAMP, at, (0.6 * width, 0.025, 0.6 * width), metal, _DRUM)
  piece.add(LAMP, at, (0.03, height - 0.1, 0.03), metal, _DRUM)
  glow = dice.between(0.8, 1.6) if dice.chance(0.5) else 0.0
  paint = _Paint(dice.tone(((0.9, 0.82, 0.62), (0.85, 0.85, 0.8))), glow=glow)
  shape = _BALL if dice.chance(0.25) else _DRUM
  piece.add(LAMP, (x, y + height - shade, z), (width, shade, width), paint, shape)


def _bed(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high, length = dice.between(0.95, 1.8), dice.between(0.25, 0.4), 2.05
  frame = _wood(dice)
  piece.add(BED, (0, 0.5, 0.03), (width + 0.06, dice.between(0.3, 0.6), 0.06), frame)
  piece.add(BED, (0, 0.1, length / 2 + 0.06), (width, high - 0.1, length), frame)
  piece.legs(BED, width, length, 0.1, 0.08, frame, 0.06)
  sheet = _Paint(dice.tone(_WHITES))
  piece.add(BED, (0, high, length / 2 + 0.06), (width, 0.18, length), sheet)
  blanket = _cloth(dice)
  covered = length * dice.between(0.55, 0.75)
  at = (0, high - 0.08, length + 0.08 - covered / 2)
  piece.add(BED, at, (width + 0.04, 0.3, covered), blanket)
  num = 1 if width < 1.3 else 2
  for side in range(num):
    x = (side - (num - 1) / 2) * width / num
    shape = _BALL if dice.chance(0.5) else _BRICK
    size = (0.8 * width / num, 0.16, 0.36)
    paint = _Paint(dice.tone(_WHITES + _CLOTHS))
    piece.add(PILLOW, (x, high + 0.18, 0.32), size, paint, shape)
  if dice.chance(0.4):
    kinds = (CLOTHES, BAG, BOOKS, BOX, CLOTHES)
    span = (-width / 2, width / 2)
    _clutter(piece, span, (length - covered, length - 0.2), high + 0.22, kinds, 1)
  return piece


def _night_stand(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(0.4, 0.55), dice.between(0.45, 0.6)
  paint = _wood(dice, _PANELS, 0.25)
  piece.add(NIGHT_STAND, (0, 0, 0.2), (width, high, 0.4), paint)
  kinds = (LAMP, LAMP, LAMP, BOOKS, OTHER_PROP)
  _clutter(piece, (-width / 2, width / 2), (0.0, 0.4), high, kinds, 1)
  return piece


def _dresser(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high, deep = dice.between(0.9, 1.5), dice.between(0.75, 1.1), 0.5
  paint = _wood(dice, _PANELS, 0.28)
  piece.add(DRESSER, (0, 0, deep / 2), (width, high, deep), paint)
  if dice.chance(0.4):
    size = (0.7 * width, dice.between(0.6, 0.8), 0.04)
    piece.add(MIRROR, (0, high + 0.02, 0.02), size, paint._replace(texture=_WOOD))
    glass = _Paint(dice.tone(_WALLS) * 0.8, _MIRRORED)
    size = (size[0] - 0.1, size[1] - 0.1, 0.02)
    piece.add(MIRROR, (0, high + 0.07, 0.05), size, glass)
  kinds = (BOOKS, OTHER_PROP, OTHER_PROP, BOX, LAMP, TOWEL)
  num = dice.whole(1, 4)
  _clutter(piece, (-width / 2, width / 2), (0.15, deep), high, kinds, num)
  return piece


def _cabinet(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  tall = dice.chance(0.5)
  width = dice.between(0.6, 1.4)
  high = dice.between(1.6, 2.1) if tall else dice.between(0.7, 1.0)
  paint = _Paint(dice.tone(_WOODS + _WHITES), _PANELS, scale=0.5)
  piece.add(CABINET, (0, 0, 0.22), (width, high, 0.44), paint)
  if not tall:
    kinds = (BOOKS, OTHER_PROP, BOX, LAMP)
    num = dice.whole(1, 4)
    _clutter(piece, (-width / 2, width / 2), (0.1, 0.4), high, kinds, num)
  return piece


def _bookshelf(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, deep = dice.between(0.7, 1.3), 0.3
  num, step = dice.whole(3, 6), dice.between(0.32, 0.4)
  high = num * step + 0.03
  paint = _wood(dice)
  for side in (-1, 1):
    at = (side * (width - 0.03) / 2, 0, deep / 2)
    piece.add(BOOKSHELF, at, (0.03, high, deep), paint)
  piece.add(BOOKSHELF, (0, 0, 0.01), (width - 0.06, high, 0.02), paint)
  for shelf in range(num + 1):
    at = (0, shelf * step, deep / 2 + 0.01)
    piece.add(BOOKSHELF, at, (width - 0.06, 0.03, deep - 0.02), paint)
  for shelf in range(num):
    _row_of_books(piece, width - 0.08, shelf * step + 0.03, step, deep)
  return piece


def _row_of_books(piece: _Piece, width, y, step, deep) -> None:
  """Blocks of books, gaps and props from the left end of a shelf to its right."""
  dice = piece.dice
  x = -width / 2
  while x < width / 2 - 0.1:
    long = min(dice.between(0.12, 0.4), width / 2 - x)
    if dice.chance(0.75):
      high = dice.between(0.55, 0.85) * step
      at = (x + long / 2, y, 0.02 + 0.35 * deep)
      paint = _Paint(dice.any_colour(), _SPINES, scale=dice.between(0.025, 0.05))
      piece.add(BOOKS, at, (long, high, dice.between(0.5, 0.62) * deep), paint)
    elif dice.chance(0.5):
      _small_thing(piece, OTHER_PROP, (x + long / 2, y, deep / 2), min(long, 0.15))
    x += long


def _shelves(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, paint = dice.between(0.6, 1.2), _wood(dice)
  for shelf in range(dice.whole(1, 4)):
    y = 1.25 + 0.35 * shelf
    piece.add(SHELVES, (0, y, 0.11), (width, 0.03, 0.22), paint)
    num, kinds = dice.whole(1, 4), (BOOKS, OTHER_PROP)
    _clutter(piece, (-width / 2, width / 2), (0.02, 0.22), y + 0.03, kinds, num)
  return piece


def _sofa(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width = dice.one((dice.between(0.9, 1.1), dice.between(1.5, 2.2)))
  seat, deep, arm = dice.between(0.38, 0.46), 0.9, dice.between(0.14, 0.22)
  paint = _cloth(dice)
  piece.add(SOFA, (0, 0.06, deep / 2), (width, seat - 0.18, deep), paint)
  piece.add(SOFA, (0, seat - 0.12, 0.12), (width, dice.between(0.45, 0.6), 0.24), paint)
  for side in (-1, 1):
    at = (side * (width - arm) / 2, seat - 0.12, deep / 2 + 0.12)
    piece.add(SOFA, at, (arm, 0.32, deep - 0.24), paint)
  num = max(1, round((width - 2 * arm) / 0.65))
  each = (width - 2 * arm) / num
  for cushion in range(num):
    x = (cushion - (num - 1) / 2) * each
    size = (each - 0.02, 0.14, deep - 0.24)
    piece.add(SOFA, (x, seat - 0.12, deep / 2 + 0.13), size, paint)
  inner = (-width / 2 + arm, width / 2 - arm)
  if dice.chance(0.7):
    kinds = (PILLOW, PILLOW, PILLOW, CLOTHES, BAG)
    _clutter(piece, inner, (0.2, 0.6), seat + 0.02, kinds, dice.whole(1, num + 2))
  return piece


def _chair(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, seat, high = dice.between(0.4, 0.5), 0.45, dice.between(0.38, 0.55)
  office = dice.chance(0.3)
  paint = _Paint(dice.tone(_CLOTHS), _NOISE) if office else _wood(dice)
  padding = _cloth(dice) if dice.chance(0.4) else paint
  piece.add(CHAIR, (0, seat - 0.05, width / 2), (width, 0.06, width), padding)
  if office:
    metal = _Paint(dice.tone(_METALS))
    piece.add(CHAIR, (0, 0.08, width / 2), (0.06, 0.33, 0.06), metal, _DRUM)
    piece.add(CHAIR, (0, 0, width / 2), (1.1 * width, 0.07, 0.1), metal, yaw=0.5)
    piece.add(CHAIR, (0, 0, width / 2), (0.1, 0.07, 1.1 * width), metal, yaw=0.5)
    at = (0, seat + 0.08, 0.03)
    piece.add(CHAIR, at, (0.9 * width, high, 0.06), padding)
  else:
    piece.legs(CHAIR, width, width, seat - 0.05, 0.045, paint)
    for side in (-1, 1):
      at = (side * (width - 0.045) / 2, seat + 0.01, 0.022)
      piece.add(CHAIR, at, (0.045, high, 0.044), paint)
    at = (0, seat + 0.45 * high, 0.022)
    piece.add(CHAIR, at, (width - 0.09, 0.5 * high, 0.03), paint)
  return piece


def _table(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  low = dice.chance(0.4)
  high = dice.between(0.38, 0.5) if low else dice.between(0.7, 0.78)
  width, deep = dice.between(0.9, 1.6), dice.between(0.6, 0.9)
  paint = _wood(dice)
  middle = deep / 2
  if dice.chance(0.3):
    width = deep
    piece.add(TABLE, (0, high - 0.04, middle), (deep, 0.04, deep), paint, _DRUM)
    piece.add(TABLE, (0, 0, middle), (0.1, high - 0.04, 0.1), paint, _DRUM)
    size = (0.5 * deep, 0.04, 0.5 * deep)
    piece.add(TABLE, (0, 0, middle), size, paint, _DRUM)
  else:
    piece.add(TABLE, (0, high - 0.04, middle), (width, 0.04, deep), paint)
    piece.legs(TABLE, width, deep, high - 0.04, dice.between(0.05, 0.09), paint)
  kinds = (BOOKS, OTHER_PROP, OTHER_PROP, PAPER, BOX, BAG)
  span, num = (-0.35 * width, 0.35 * width), dice.whole(0, 4)
  _clutter(piece, span, (0.2 * deep, 0.75 * deep), high, kinds, num)
  return piece


def _desk(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high, deep = dice.between(1.1, 1.7), 0.74, dice.between(0.6, 0.75)
  paint = _wood(dice)
  piece.add(DESK, (0, high - 0.04, deep / 2), (width, 0.04, deep), paint)
  drawers = dice.between(0.35, 0.45)
  side = dice.one((-1, 1))
  at = (side * (width - drawers - 0.04) / 2, 0, deep / 2)
  size = (drawers, high - 0.04, deep - 0.06)
  piece.add(DESK, at, size, paint._replace(texture=_PANELS, scale=0.3))
  at = (-side * (width - 0.06) / 2, 0, deep / 2)
  piece.add(DESK, at, (0.04, high - 0.04, deep - 0.04), paint)
  if dice.chance(0.7):
    x = dice.between(-0.2, 0.2)
    metal = _Paint(dice.tone(_METALS[1:]))
    piece.add(OTHER_PROP, (x, high, 0.2), (0.2, 0.02, 0.16), metal)
    piece.add(OTHER_PROP, (x, high + 0.02, 0.17), (0.06, 0.12, 0.03), metal)
    piece.add(OTHER_PROP, (x, high + 0.1, 0.2), (0.5, 0.33, 0.04), metal)
    screen = _Paint(dice.any_colour() * 0.5, _SCREEN, glow=dice.between(0, 0.6))
    piece.add(OTHER_PROP, (x, high + 0.12, 0.215), (0.46, 0.29, 0.02), screen)
    front = (deep - 0.25, deep + 0.05)
  else:
    front = (0.1, deep)
  kinds = (BOOKS, PAPER, PAPER, LAMP, OTHER_PROP, BOX, BAG)
  num = dice.whole(1, 5)
  _clutter(piece, (-width / 2, width / 2), front, high, kinds, num)
  return piece


def _television(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(1.0, 1.7), dice.between(0.4, 0.6)
  stand = dice.one((CABINET, TABLE, OTHER_FURNITURE))
  paint = _wood(dice, _PANELS, 0.5)
  piece.add(stand, (0, 0, 0.22), (width, high, 0.44), paint)
  wide = dice.between(0.75, min(1.2, width))
  tall = 0.58 * wide
  dark = _Paint(np.full(3, 0.05))
  piece.add(TELEVISION, (0, high, 0.2), (0.4 * wide, 0.02, 0.2), dark)
  piece.add(TELEVISION, (0, high + 0.02, 0.18), (0.1, 0.06, 0.03), dark)
  piece.add(TELEVISION, (0, high + 0.06, 0.2), (wide, tall, 0.05), dark)
  on = dice.chance(0.3)
  screen = _Paint(np.full(3, 0.04), _SCREEN, np.full(3, 0.12))
  if on:
    screen = _Paint(dice.any_colour(), _PAINTING, scale=0.12, glow=0.7)
  size = (wide - 0.06, tall - 0.06, 0.02)
  piece.add(TELEVISION, (0, high + 0.09, 0.22), size, screen)
  return piece


def _kitchen_counter(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(1.4, 2.6), 0.86
  paint = _Paint(dice.tone(_WOODS + _WHITES), _PANELS, scale=0.5)
  piece.add(CABINET, (0, 0.08, 0.29), (width, high - 0.08, 0.58), paint)
  piece.add(CABINET, (0, 0, 0.26), (width, 0.08, 0.5), _Paint(np.full(3, 0.1)))
  stone = ((0.3, 0.3, 0.3), (0.6, 0.57, 0.52), (0.12, 0.12, 0.13))
  top = _Paint(dice.tone(stone), _NOISE, scale=0.02)
  piece.add(COUNTER, (0, high, 0.31), (width + 0.02, 0.04, 0.62), top)
  y = high + 0.04
  x = dice.between(-0.25, 0.25) * width
  metal = _Paint(dice.tone(((0.62, 0.62, 0.64),)))
  piece.add(SINK, (x, y, 0.32), (0.55, 0.012, 0.42), metal)
  basin = _Paint(np.full(3, 0.25))
  piece.add(SINK, (x, y, 0.32), (0.45, 0.014, 0.32), basin)
  piece.add(SINK, (x, y, 0.08), (0.04, 0.25, 0.04), metal, _DRUM)
  piece.add(SINK, (x, y + 0.22, 0.17), (0.03, 0.03, 0.2), metal)
  kinds = (OTHER_PROP, OTHER_PROP, BOX, PAPER, BOOKS)
  for low, high_x in ((-width / 2, x - 0.3), (x + 0.3, width / 2)):
    if high_x - low > 0.25:
      _clutter(piece, (low, high_x), (0.05, 0.5), y, kinds, dice.whole(1, 4))
  if dice.chance(0.7):
    piece.add(CABINET, (0, 1.45, 0.17), (width, dice.between(0.5, 0.7), 0.34), paint)
  return piece


def _refrigerator(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(0.65, 0.85), dice.between(1.55, 1.85)
  body = _Paint(dice.tone(((0.85, 0.85, 0.85), (0.6, 0.6, 0.62), (0.1, 0.1, 0.1))))
  piece.add(REFRIGERATOR, (0, 0, 0.3), (width, high, 0.6), body)
  split = high * dice.between(0.55, 0.7)
  piece.add(REFRIGERATOR, (0, 0.05, 0.63), (width, split - 0.06, 0.06), body)
  piece.add(REFRIGERATOR, (0, split, 0.63), (width, high - split, 0.06), body)
  metal = _Paint(dice.tone(_METALS))
  for y in (split - 0.45, split + 0.05):
    at = (-0.4 * width, y, 0.68)
    piece.add(REFRIGERATOR, at, (0.03, 0.35, 0.04), metal)
  return piece


def _toilet(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  white = _Paint(dice.tone(((0.88, 0.88, 0.87),), 0.02))
  piece.add(TOILET, (0, 0.38, 0.1), (0.42, 0.4, 0.2), white)
  piece.add(TOILET, (0, 0, 0.42), (0.26, 0.3, 0.36), white, _DRUM)
  piece.add(TOILET, (0, 0.15, 0.45), (0.38, 0.28, 0.5), white, _BALL)
  piece.add(TOILET, (0, 0.38, 0.45), (0.4, 0.04, 0.5), white, _DRUM)
  return piece


def _bathtub(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  white = _Paint(dice.tone(((0.88, 0.88, 0.87),), 0.02))
  width, high, deep = dice.between(1.4, 1.7), 0.52, 0.75
  piece.add(BATHTUB, (0, 0, deep / 2), (width - 0.16, 0.15, deep - 0.16), white)
  for side in (0.04, deep - 0.04):
    piece.add(BATHTUB, (0, 0, side), (width, high, 0.08), white)
  for side in (-1, 1):
    at = (side * (width / 2 - 0.04), 0, deep / 2)
    piece.add(BATHTUB, at, (0.08, high, deep - 0.16), white)
  if dice.chance(0.6):
    wide = width * dice.between(0.35, 0.6)
    tint = dice.tone(_WHITES + _WALLS)
    paint = _Paint(tint, _FOLDS, scale=0.14)
    at = (dice.one((-1, 1)) * (width - wide) / 2, 0.25, deep + 0.02)
    piece.add(SHOWER_CURTAIN, at, (wide, 1.75, 0.03), paint)
  return piece


def _wash_basin(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  white = _Paint(dice.tone(((0.88, 0.88, 0.87),), 0.02))
  if dice.chance(0.5):
    width = dice.between(0.6, 1.0)
    paint = _Paint(dice.tone(_WOODS + _WHITES), _PANELS, scale=0.4)
    piece.add(CABINET, (0, 0, 0.24), (width, 0.78, 0.46), paint)
    piece.add(COUNTER, (0, 0.78, 0.25), (width, 0.04, 0.5), _Paint(dice.tone(_WHITES)))
  else:
    piece.add(SINK, (0, 0, 0.2), (0.18, 0.72, 0.18), white, _DRUM)
  piece.add(SINK, (0, 0.72, 0.25), (0.5, 0.2, 0.4), white, _BALL)
  piece.add(SINK, (0, 0.82, 0.25), (0.52, 0.03, 0.42), white, _DRUM)
  piece.add(SINK, (0, 0.85, 0.25), (0.4, 0.004, 0.3), _Paint(np.full(3, 0.5)), _DRUM)
  piece.add(SINK, (0, 0.85, 0.06), (0.04, 0.15, 0.04), _Paint(np.full(3, 0.5)), _DRUM)
  if dice.chance(0.7):
    size = (dice.between(0.45, 0.7), dice.between(0.5, 0.8), 0.03)
    piece.add(MIRROR, (0, 1.15, 0.02), size, _Paint(dice.tone(_WALLS) * 0.8, _MIRRORED))
  return piece


def _floor_lamp(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  _lamp(piece, (0, 0, 0.22), dice.between(1.4, 1.75), dice.between(0.3, 0.42))
  return piece


def _person(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  high = dice.between(1.5, 1.85)
  legs, shirt = _Paint(dice.tone(_CLOTHS)), _Paint(dice.any_colour())
  skin = _Paint(dice.tone(((0.72, 0.5, 0.38), (0.4, 0.25, 0.17))))
  for side in (-1, 1):
    piece.add(PERSON, (0.09 * side, 0, 0.25), (0.15, 0.48 * high, 0.17), legs, _DRUM)
    at = (0.25 * side, 0.42 * high, 0.25)
    piece.add(PERSON, at, (0.1, 0.4 * high, 0.12), shirt, _BALL)
  piece.add(PERSON, (0, 0.45 * high, 0.25), (0.42, 0.42 * high, 0.26), shirt, _BALL)
  piece.add(PERSON, (0, 0.86 * high, 0.25), (0.17, 0.14 * high, 0.2), skin, _BALL)
  return piece


def _on_floor(dice: _Dice) -> _Piece:
  """A box, a bag, a stool, a bin or another thing that stands about."""
  piece = _Piece(dice)
  kind = dice.one((BOX, BOX, BAG, OTHER_FURNITURE, OTHER_PROP, CLOTHES))
  at = (0, 0, 0.3)
  if kind == BOX:
    size = [dice.between(0.3, 0.55) for _ in range(3)]
    piece.add(BOX, at, size, _Paint(dice.tone(_CARDBOARD)))
    if dice.chance(0.4):
      size = [0.7 * length for length in size]
      top = (0, size[1] / 0.7, 0.3)
      piece.add(BOX, top, size, _Paint(dice.tone(_CARDBOARD)), yaw=0.4)
  elif kind == OTHER_FURNITURE:
    width, high = dice.between(0.4, 0.6), dice.between(0.35, 0.5)
    shape = dice.one((_DRUM, _BRICK))
    piece.add(OTHER_FURNITURE, at, (width, high, width), _cloth(dice), shape)
  elif kind == OTHER_PROP:
    width = dice.between(0.22, 0.35)
    size = (width, dice.between(0.3, 0.5), width)
    piece.add(OTHER_PROP, at, size, _Paint(dice.any_colour()), _DRUM)
    if dice.chance(0.5):  # a plant
      green = _Paint(dice.tone(((0.12, 0.3, 0.1), (0.2, 0.4, 0.14))), _NOISE)
      top = (0, 0.8 * size[1], 0.3)
      crown = 1.6 * width
      piece.add(OTHER_PROP, top, (crown, 1.5 * crown, crown), green, _BALL)
  else:
    _small_thing(piece, kind, at, 0.6)
  return piece


def _rug(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, deep = dice.between(1.2, 2.4), dice.between(0.9, 1.7)
  texture = dice.one((_NOISE, _CHECKS, _STRIPES))
  other = dice.tone(_CLOTHS + _WHITES)
  paint = _Paint(dice.tone(_CLOTHS), texture, other, dice.between(0.1, 0.3))
  border = _Paint(other)
  piece.add(FLOOR_MAT, (0, 0, deep / 2), (width, 0.008, deep), border)
  piece.add(FLOOR_MAT, (0, 0, deep / 2), (width - 0.2, 0.012, deep - 0.2), paint)
  return piece


def _door(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(0.75, 0.95), dice.between(1.95, 2.1)
  paint = _Paint(dice.tone(_WOODS + _WHITES), _PANELS, scale=0.8)
  frame = _Paint(dice.tone(_WHITES + _WOODS))
  for side in (-1, 1):
    at = (side * (width / 2 + 0.04), 0, 0.025)
    piece.add(DOOR, at, (0.08, high, 0.05), frame)
  piece.add(DOOR, (0, high, 0.025), (width + 0.16, 0.08, 0.05), frame)
  piece.add(DOOR, (0, 0, 0.015), (width, high, 0.03), paint)
  knob = (dice.one((-0.4, 0.4)) * width, 0.98, 0.06)
  piece.add(DOOR, knob, (0.06, 0.06, 0.06), _Paint(dice.tone(_METALS)), _BALL)
  return piece


def _window(dice: _Dice, height: float) -> _Piece:
  piece = _Piece(dice)
  width, sill = dice.between(0.8, 1.8), dice.between(0.8, 1.05)
  high = min(dice.between(0.9, 1.3), height - sill - 0.25)
  frame = _Paint(dice.tone(_WHITES))
  piece.add(WINDOW, (0, sill, 0.02), (width, high, 0.04), frame)
  num = 1 if width < 0.9 else 2
  each = width / num
  green = ((0.2, 0.32, 0.14), (0.4, 0.38, 0.34), (0.5, 0.42, 0.36))
  sky = dice.tone(((0.75, 0.85, 0.98), (0.9, 0.9, 0.92)))
  day = dice.between(1.0, 2.2) if dice.chance(0.75) else 0.1
  outside = _Paint(dice.tone(green), _OUTSIDE, sky, high, day)
  for pane in range(num):
    x = (pane - (num - 1) / 2) * each
    size = (each - 0.08, high - 0.1, 0.02)
    piece.add(WINDOW, (x, sill + 0.05, 0.035), size, outside)
  cover = dice.rng.random()
  if cover < 0.35:
    down = high * dice.between(0.2, 0.9)
    tint = dice.tone(_WHITES)
    paint = _Paint(tint, _SLATS, 0.55 * tint, 0.07, 0.2 * day)
    at = (0, sill + high - down, 0.065)
    piece.add(BLINDS, at, (width, down + 0.04, 0.03), paint)
  elif cover < 0.75:
    paint = _Paint(dice.tone(_CLOTHS + _WALLS), _FOLDS, scale=dice.between(0.1, 0.18))
    low = 0.03 if dice.chance(0.5) else sill - 0.15
    wide = dice.between(0.25, 0.5) * width
    for side in (-1, 1):
      at = (side * (width / 2 + 0.1 - wide / 2), low, 0.09)
      piece.add(CURTAIN, at, (wide, sill + high + 0.1 - low, 0.06), paint)
  return piece


def _picture(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(0.3, 1.0), dice.between(0.3, 0.75)
  y = dice.between(1.3, 1.6)
  frame = _Paint(dice.tone(_WOODS + _METALS + _WHITES))
  piece.add(PICTURE, (0, y, 0.015), (width, high, 0.03), frame)
  paint = _Paint(dice.any_colour(), _PAINTING, scale=dice.between(0.06, 0.2))
  size = (width - 0.08, high - 0.08, 0.02)
  piece.add(PICTURE, (0, y + 0.04, 0.025), size, paint)
  return piece


def _whiteboard(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(1.2, 2.2), dice.between(0.8, 1.1)
  piece.add(WHITEBOARD, (0, 0.95, 0.012), (width, high, 0.024), _Paint(np.full(3, 0.4)))
  size = (width - 0.06, high - 0.06, 0.03)
  paint = _Paint(dice.tone(((0.93, 0.94, 0.95),), 0.01))
  piece.add(WHITEBOARD, (0, 0.98, 0.015), size, paint)
  return piece


def _wall_mirror(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, high = dice.between(0.4, 0.8), dice.between(0.7, 1.3)
  piece.add(MIRROR, (0, 0.7, 0.015), (width, high, 0.03), _wood(dice))
  glass = _Paint(dice.tone(_WALLS) * 0.8, _MIRRORED)
  piece.add(MIRROR, (0, 0.74, 0.025), (width - 0.08, high - 0.08, 0.02), glass)
  return piece


def _towel(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width, y = dice.between(0.35, 0.6), dice.between(0.9, 1.1)
  metal = _Paint(dice.tone(_METALS))
  piece.add(OTHER_PROP, (0, y + 0.5, 0.06), (width + 0.1, 0.02, 0.02), metal)
  paint = _Paint(dice.tone(_CLOTHS + _WHITES), _NOISE, scale=0.02)
  piece.add(TOWEL, (0, y, 0.06), (width, 0.53, 0.04), paint)
  return piece


def _notes(dice: _Dice) -> _Piece:
  """Sheets of paper on the wall."""
  piece = _Piece(dice)
  for sheet in range(dice.whole(1, 4)):
    at = (0.3 * sheet, dice.between(1.2, 1.5), 0.004)
    paint = _Paint(dice.tone(((0.9, 0.9, 0.86),)), _SLATS, scale=0.04)
    piece.add(PAPER, at, (0.22, 0.3, 0.008), paint)
  return piece


def _radiator(dice: _Dice) -> _Piece:
  piece = _Piece(dice)
  width = dice.between(0.7, 1.2)
  paint = _Paint(dice.tone(_WHITES), _STRIPES, scale=0.09)
  piece.add(OTHER_STRUCTURE, (0, 0.12, 0.06), (width, 0.55, 0.12), paint)
  return piece


def _pillar(dice: _Dice, height: float) -> _Piece:
  piece = _Piece(dice)
  width = dice.between(0.3, 0.5)
  paint = _Paint(dice.tone(_WALLS))
  piece.add(OTHER_STRUCTURE, (0, 0, 0.15), (width, height, 0.3), paint)
  return piece


# What rooms have: against the walls (in this order, as far as there is space; twice
# means up to two), in the middle, and on the walls.
_ROOMS = {
  'bedroom': (
    (_bed, _night_stand, _dresser, _night_stand, _bookshelf, _desk, _cabinet, _chair),
    (_rug, _on_floor),
    (_picture, _picture, _wall_mirror, _shelves),
  ),
  'living room': (
    (_sofa, _television, _bookshelf, _sofa, _floor_lamp, _cabinet, _dresser, _chair),
    (_rug, _table, _chair, _sofa, _on_floor),
    (_picture, _picture, _picture, _shelves),
  ),
  'kitchen': (
    (_kitchen_counter, _refrigerator, _kitchen_counter, _cabinet, _chair),
    (_table, _chair, _chair, _chair, _on_floor),
    (_picture, _towel, _shelves, _notes),
  ),
  'office': (
    (_desk, _bookshelf, _desk, _cabinet, _bookshelf, _floor_lamp, _sofa),
    (_chair, _chair, _table, _on_floor, _on_floor),
    (_whiteboard, _picture, _notes, _shelves),
  ),
  'bathroom': (
    (_bathtub, _wash_basin, _toilet, _cabinet, _on_floor),
    (_rug, _on_floor),
    (_towel, _towel, _picture, _wall_mirror),
  ),
}


class _Plan:
  """Where things stand: keeps them apart, off the camera, and inside the room."""

  def __init__(self, dice: _Dice, size: np.ndarray, camera: np.ndarray):
    self.dice = dice
    self.width, self.height, self.depth = size
    self.camera = camera
    self.rows: list[_Row] = []
    self.taken: list[tuple[float, float, float, float]] = []  # x, z on the floor
    # Of every wall: along it, and up. Back, left, right, behind the camera.
    self.walls: list[list[tuple[float, float, float, float]]] = [[], [], [], []]

  def against_wall(self, piece: _Piece, sides=(0, 0, 0, 1, 1, 2, 2, 3)) -> bool:
    """Puts a piece at a wall where there is space; False if none was found."""
    low, high = piece.bounds()
    if high[1] > self.height + 1e-6:
      return False
    for _ in range(10):
      side = self.dice.one(sides)
      angle = (0.0, np.pi / 2, -np.pi / 2, np.pi)[side]
      across = self.width if side in (0, 3) else self.depth
      away = (self.depth if side in (0, 3) else self.width) / 2
      spare = across - (high[0] - low[0]) - 0.04
      if spare < 0:
        continue
      along = -across / 2 + 0.02 - low[0] + spare * self.dice.rng.random()
      on_wall = (along + low[0], along + high[0], low[1], high[1])
      if any(_overlap(on_wall, other) for other in self.walls[side]):
        continue
      x = along * np.cos(angle) - away * np.sin(angle)
      z = -along * np.sin(angle) - away * np.cos(angle)
      if self._place(piece, low, high, x, z, angle, flat=high[2] < 0.13):
        self.walls[side].append(on_wall)
        return True
    return False

  def in_the_middle(self, piece: _Piece) -> bool:
    """Puts a piece on the floor, turned; False if no space was found."""
    low, high = piece.bounds()
    flat = high[1] < 0.02
    for _ in range(10):
      x = self.dice.between(-0.4, 0.4) * self.width
      z = self.dice.between(-0.35, 0.3) * self.depth
      angle = self.dice.whole(0, 4) * np.pi / 2 + self.dice.between(-0.35, 0.35)
      if self._place(piece, low, high, x, z, angle, flat):
        return True
    return False

  def _place(self, piece, low, high, x, z, angle, flat) -> bool:
    cos, sin = np.cos(angle), np.sin(angle)
    corners = [(a, b) for a in (low[0], high[0]) for b in (low[2], high[2])]
    xs = [x + cos * a + sin * b for a, b in corners]
    zs = [z - sin * a + cos * b for a, b in corners]
    area = (min(xs), max(xs), min(zs), max(zs))
    if max(-area[0], area[1]) > self.width / 2 + 1e-6:
      return False
    if max(-area[2], area[3]) > self.depth / 2 + 1e-6:
      return False
    # Flat things may lie under and hang behind others.
    if not flat:
      gap_x = max(area[0] - self.camera[0], self.camera[0] - area[1], 0.0)
      gap_z = max(area[2] - self.camera[2], self.camera[2] - area[3], 0.0)
      if np.hypot(gap_x, gap_z) < (1.3 if high[1] > 1.0 else 0.7):
        return False
      if any(_overlap(area, other) for other in self.taken):
        return False
      self.taken.append(area)
    rows = piece.placed(x, z, angle)
    if self.dice.chance(0.04):
      rows = [row._replace(label=0) for row in rows]
    self.rows += rows
    return True


def _overlap(a, b) -> bool:
  return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def draw_room(seed: int, index: int) -> Room:
  """Samples one room.

  Args:
    seed: seed of the whole set.
    index: number of the room in it.

  Returns:
    The room; the same for the same arguments.
  """
  rng = np.random.default_rng((seed, index))
  dice = _Dice(rng)
  kind = dice.one(tuple(_ROOMS))
  small = kind == 'bathroom'
  depth = dice.between(2.8, 4.0) if small else dice.between(3.4, 6.0)
  if not small and dice.chance(0.08):
    depth = dice.between(10.0, 14.0)
  size = np.array([
    dice.between(2.2, 3.2) if small else dice.between(3.0, 5.2),
    dice.between(2.35, 2.9), depth,
  ])  # fmt: skip
  position = np.array(
    [
      dice.between(-0.35, 0.35) * size[0],
      dice.between(1.3, 1.7),
      size[2] / 2 - dice.between(0.25, 0.25 + 0.12 * size[2]),
    ]
  )
  aim = dice.between(-0.45, 0.45) * size[0], dice.between(-0.5, -0.1) * size[2]
  camera = Camera(
    position,
    float(np.arctan2(position[0] - aim[0], position[2] - aim[1])),
    dice.between(-0.35, -0.06),
    float(rng.normal(0, 0.025)),
  )

  plan = _Plan(dice, size, position)
  rows = _shell(dice, kind, size)
  at_walls, inside, on_walls = _ROOMS[kind]
  plan.against_wall(_door(dice), (0, 1, 1, 2, 2, 3))
  window = None
  for _ in range(dice.whole(1, 3) if not small else dice.whole(0, 2)):
    before = len(plan.rows)
    piece = _window(dice, size[1])
    if plan.against_wall(piece, (0, 0, 1, 2)):
      window = plan.rows[before]
  if dice.chance(0.25):
    plan.against_wall(_pillar(dice, size[1]))
  if dice.chance(0.3):
    plan.against_wall(_radiator(dice))
  for piece in at_walls:
    if dice.chance(0.9):
      plan.against_wall(piece(dice))
  for piece in inside:
    if dice.chance(0.8):
      plan.in_the_middle(piece(dice))
  if dice.chance(0.08):
    plan.in_the_middle(_person(dice))
  if dice.chance(0.5):
    plan.against_wall(_on_floor(dice))
  for piece in on_walls:
    if dice.chance(0.7):
      plan.against_wall(piece(dice))
  lights, fixtures = _lights(dice, size, plan.rows, window)
  return Room(
    key=(seed, index),
    size=size,
    solids=_solids(rows + plan.rows + fixtures),
    lights=lights,
    ambient=np.array([1.0, 0.97, 0.95], np.float32) * dice.between(0.1, 0.25),
    camera=camera,
    exposure=dice.between(0.36, 0.56),
    tint=(1.0 + rng.normal(0, 0.06, 3)).astype(np.float32),
    noise=dice.between(0.008, 0.035),
    jpeg_quality=dice.whole(80, 96),
  )


def _shell(dice: _Dice, kind: str, size: np.ndarray) -> list[_Row]:
  """Walls, floor and ceiling: the inside of one box."""
  wall = _Paint(dice.tone(_WALLS), scale=0.3)
  if kind == 'bathroom' or (kind == 'kitchen' and dice.chance(0.3)):
    tone = dice.tone(_WALLS)
    wall = _Paint(tone, _TILES, 0.6 * tone, dice.between(0.12, 0.3))
  elif dice.chance(0.3):
    tone = dice.tone(_WALLS)
    wall = _Paint(tone, _STRIPES, 0.85 * tone, dice.between(0.1, 0.4))
  texture = dice.one((_PLANKS, _PLANKS, _NOISE, _NOISE, _TILES))
  if kind in ('bathroom', 'kitchen'):
    texture = dice.one((_TILES, _TILES, _PLANKS))
  if texture == _PLANKS:
    floor = _Paint(dice.tone(_WOODS), _PLANKS, scale=dice.between(0.08, 0.16))
  elif texture == _NOISE:
    floor = _Paint(dice.tone(_CARPETS), _NOISE, scale=0.03)
  else:
    tone = dice.tone(_CARPETS + _WALLS)
    floor = _Paint(tone, _TILES, 0.55 * tone, dice.between(0.2, 0.45))
  ceiling = _Paint(dice.tone(((0.85, 0.85, 0.83),), 0.02))
  if kind == 'office' and dice.chance(0.6):
    ceiling = ceiling._replace(texture=_TILES, scale=0.6)
  centre, half = (0.0, size[1] / 2, 0.0), tuple(size / 2)
  return [
    _Row(_BRICK, label, centre, half, 0.0, paint, dice.whole(0, _LATTICE**2))
    for label, paint in ((WALL, wall), (FLOOR, floor), (CEILING, ceiling))
  ]


def _lights(dice: _Dice, size, rows, window) -> tuple[Lights, list[_Row]]:
  """One or two at the ceiling, and one of the window or of a lamp."""
  position, colour, at_ceiling, fixtures = [], [], [], []
  num = dice.whole(1, 3)
  warm = np.array([1.0, dice.between(0.85, 1.0), dice.between(0.65, 1.0)])
  for light in range(num):
    x = dice.between(-0.2, 0.2) * size[0]
    z = ((light + 0.5) / num - 0.5 + dice.between(-0.1, 0.1)) * size[2] * 0.8
    position.append((x, size[1] - 0.12, z))
    colour.append(warm * dice.between(0.9, 1.6) / num**0.5)
    at_ceiling.append(True)
    width = dice.between(0.25, 0.5)
    paint = _Paint(warm * 0.9, glow=1.5)
    shape = dice.one((_DRUM, _DRUM, _BRICK))
    centre, half = (x, size[1] - 0.03, z), (width / 2, 0.03, width / 2)
    fixtures.append(_Row(shape, LAMP, centre, half, 0.0, paint, 0))
  lit = [row for row in rows if row.label == LAMP and row.paint.glow > 0]
  if lit and dice.chance(0.7):
    x, y, z = lit[0].centre
    position.append((x, y + 0.25, z))
    colour.append(np.array([1.0, 0.8, 0.55]) * dice.between(0.3, 0.8))
    at_ceiling.append(False)
  elif window is not None:
    x, y, z = window.centre
    # In front of the pane, a little inside the room.
    inside = 0.4
    x, z = x + inside * np.sin(window.yaw), z + inside * np.cos(window.yaw)
    position.append((x, y, z))
    colour.append(np.array([0.85, 0.93, 1.05]) * dice.between(0.3, 1.0))
    at_ceiling.append(False)
  return Lights(
    np.array(position), np.array(colour, np.float32), np.array(at_ceiling)
  ), fixtures


def _solids(rows: list[_Row]) -> Solids:
  paints = [row.paint for row in rows]
  return Solids(
    shape=np.array([row.shape for row in rows], np.int8),
    label=np.array([row.label for row in rows], np.uint8),
    centre=np.array([row.centre for row in rows], np.float64),
    half=np.array([row.half for row in rows], np.float64),
    yaw=np.array([row.yaw for row in rows], np.float64),
    texture=np.array([paint.texture for paint in paints], np.int8),
    colour=np.array(
      [
        (paint.colour, 0.6 * paint.colour if paint.other is None else paint.other)
        for paint in paints
      ],
      np.float32,
    ),
    scale=np.array([paint.scale for paint in paints], np.float32),
    phase=np.array([row.phase for row in rows], np.int64),
    glow=np.array([paint.glow for paint in paints], np.float32),
  )


class _Frames(NamedTuple):
  """Every solid's own frame seen from the camera: local = turn @ point + origin."""

  camera: np.ndarray  # (3, 3): camera to world
  turn: np.ndarray  # (S, 3, 3): camera to local
  origin: np.ndarray  # (S, 3): the camera in local coordinates
  window: np.ndarray  # (S, 4): least and largest x / depth, y / depth it may be seen at


class _Hits(NamedTuple):
  """The first thing on every ray. The ray's point at depth t is (x, y, -1) t."""

  x: np.ndarray  # (W,)
  y: np.ndarray  # (H,)
  depth: np.ndarray  # (H, W)
  solid: np.ndarray  # (H, W) int16
  axis: np.ndarray  # (H, W) int8: of its local axes, that of the face


def focal_length(image_size: tuple[int, int]) -> float:
  """Focal length in pixels of a picture of (H, W) pixels."""
  return image_size[1] / 2 / float(np.tan(FIELD_OF_VIEW / 2))


def _rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
  """Camera to world: about z by roll, then x by pitch, then y by yaw."""
  (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
  about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
  about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
  about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
  return about_y @ about_x @ about_z


def _frames(room: Room) -> _Frames:
  solids, camera = room.solids, room.camera
  to_world = _rotation(camera.yaw, camera.pitch, camera.roll)
  cos, sin = np.cos(solids.yaw), np.sin(solids.yaw)
  to_local = np.zeros((len(cos), 3, 3))
  to_local[:, 0, 0], to_local[:, 0, 2] = cos, -sin
  to_local[:, 1, 1] = 1
  to_local[:, 2, 0], to_local[:, 2, 2] = sin, cos
  turn = to_local @ to_world
  origin = np.einsum('sij,sj->si', to_local, camera.position - solids.centre)

  signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
  corners = signs * solids.half[:, None] - origin[:, None]
  corners = np.einsum('sji,scj->sci', turn, corners)
  ahead = -corners[:, :, 2]
  # Where a corner is behind the camera, the projection says nothing: all is possible.
  near = 0.05
  seen = corners[:, :, :2] / np.maximum(ahead, near)[:, :, None]
  low, high = seen.min(1), seen.max(1)
  beside = (ahead < near).any(1)
  low[beside], high[beside] = -np.inf, np.inf
  behind = (ahead < near).all(1)
  high[behind] = -np.inf
  window = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
  return _Frames(to_world, turn, origin, window)


def _crossings(shape: int, half, origin, direction):
  """Where rays enter and leave the parts whose intersection a solid is.

  Args:
    shape: of the solid.
    half: its half sizes.
    origin: three numbers or arrays, in the solid's frame.
    direction: three arrays, in the solid's frame.

  Returns:
    Per part, the ray parameter where the ray enters it, and where it leaves it: the
    three slabs of a brick; the tube and the slab of a drum; the ball. NaN or an entry
    after the exit: it misses.
  """
  enter, leave = [], []
  round_axes = {_BRICK: (), _BALL: (0, 1, 2), _DRUM: (0, 2)}[shape]
  if round_axes:
    a = b = c = 0.0
    for i in round_axes:
      o, d = origin[i] / half[i], direction[i] / half[i]
      a, b, c = a + d * d, b + o * d, c + o * o
    root = np.sqrt(b * b - a * (c - 1))
    enter.append((-b - root) / a)
    leave.append((-b + root) / a)
  for i in range(3):
    if i not in round_axes:
      inverse = 1 / direction[i]
      middle, reach = origin[i] * inverse, half[i] * np.abs(inverse)
      enter.append(-middle - reach)
      leave.append(reach - middle)
  return enter, leave


def _trace(room: Room, frames: _Frames, image_size, dtype) -> _Hits:
  """Finds the first surface through every pixel of (H, W), at its middle."""
  rows, columns = image_size
  focal = focal_length(image_size)
  x = (np.arange(columns) + 0.5 - columns / 2) / focal
  y = (rows / 2 - 0.5 - np.arange(rows)) / focal
  solids = room.solids
  turn, origin, half = (
    array.astype(dtype) for array in (frames.turn, frames.origin, solids.half)
  )
  across, up = x.astype(dtype), y.astype(dtype)[:, None]

  # The shell from inside: the first of its planes that the ray leaves through.
  direction = [m[0] * across + (m[1] * up - m[2]) for m in turn[0]]
  _, leave = _crossings(_BRICK, half[0], origin[0], direction)
  depth = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
  axis = np.where(leave[1] == depth, 1, np.where(leave[0] == depth, 0, 2))
  axis = axis.astype(np.int8)
  flat = np.where(direction[1] < 0, np.int16(1), np.int16(2))
  solid = np.where(axis == 1, flat, np.int16(0))

  # Only where it may be seen: columns of increasing x, rows of decreasing y.
  window = frames.window
  left = np.searchsorted(x, window[:, 0])
  right = np.searchsorted(x, window[:, 1], 'right')
  top = np.searchsorted(-y, -window[:, 3])
  bottom = np.searchsorted(-y, -window[:, 2], 'right')
  for s in range(_SHELL, len(half)):
    if left[s] >= right[s] or top[s] >= bottom[s]:
      continue
    area = slice(top[s], bottom[s]), slice(left[s], right[s])
    part_x, part_y = across[area[1]], up[area[0]]
    direction = [m[0] * part_x + (m[1] * part_y - m[2]) for m in turn[s]]
    enter, leave = _crossings(int(solids.shape[s]), half[s], origin[s], direction)
    near, far = enter[0], leave[0]
    for other_enter, other_leave in zip(enter[1:], leave[1:], strict=True):
      near, far = np.maximum(near, other_enter), np.minimum(far, other_leave)
    hit = (near < far) & (near > 0) & (near < depth[area])
    if not hit.any():
      continue
    np.copyto(depth[area], near, where=hit)
    np.copyto(solid[area], np.int16(s), where=hit)
    face = np.int8(0)
    for part in range(1, len(enter)):
      face = np.where(enter[part] == near, np.int8(part), face)
    np.copyto(axis[area], face, where=hit)
  return _Hits(across, y.astype(dtype), depth, solid, axis)


def _surface_normals(room: Room, frames: _Frames, hits: _Hits):
  """Normals in camera coordinates, and the number of each surface.

  Returns:
    (3, H, W) of the type of the depth; (H, W) int32.
  """
  dtype = hits.depth.dtype
  # The face's normal is a row of `turn`: against the ray, since it is seen.
  facing = frames.turn.astype(dtype)[hits.solid, hits.axis]
  x, y = hits.x, hits.y[:, None]
  along = facing[..., 0] * x + facing[..., 1] * y - facing[..., 2]
  positive = along < 0
  normals = np.ascontiguousarray(np.moveaxis(facing, -1, 0))
  normals *= np.where(positive, dtype.type(1), dtype.type(-1))
  surfaces = hits.solid * np.int32(6) + 2 * hits.axis + positive

  shape = room.solids.shape[hits.solid]
  bent = np.flatnonzero((shape != _BRICK) & (hits.axis == 0))
  if bent.size:
    row, column = np.divmod(bent, len(hits.x))
    solid, t = hits.solid.ravel()[bent], hits.depth.ravel()[bent]
    points = np.stack([t * hits.x[column], t * hits.y[row], -t], 1)
    turn = frames.turn.astype(dtype)[solid]
    local = np.einsum('nij,nj->ni', turn, points)
    local += frames.origin.astype(dtype)[solid]
    # The gradient of the quadric; that of a tube has no y.
    local /= room.solids.half.astype(dtype)[solid] ** 2
    local[shape.ravel()[bent] == _DRUM, 1] = 0
    local = np.einsum('nij,ni->nj', turn, local)
    local /= np.linalg.norm(local, axis=1, keepdims=True)
    normals.reshape(3, -1)[:, bent] = local.T
    surfaces.ravel()[bent] = solid * np.int32(6)
  return normals, surfaces


def cast(room: Room, image_size: tuple[int, int]) -> Scene:
  """Takes a picture of a room, with its labels.

  Args:
    room: what is there.
    image_size: (H, W) in pixels; the field of view is that of W.

  Returns:
    The picture and its labels; the same for the same arguments.
  """
  # The third number keeps this stream apart from that of `draw_room`.
  rng = np.random.default_rng((*room.key, 1))
  # Rays along a slab, and those that miss a ball, give infinities and NaN, which
  # compare as they should.
  with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
    frames = _frames(room)
    hits = _trace(room, frames, image_size, np.float64)
    fine = _trace(room, frames, [2 * length for length in image_size], np.float32)
    image = _photograph(room, frames, fine, rng)
    normals, surfaces = _surface_normals(room, frames, hits)

  edge = np.zeros(image_size, bool)
  edge[:, :-1] |= surfaces[:, 1:] != surfaces[:, :-1]
  edge[:-1] |= surfaces[1:] != surfaces[:-1]
  missing = _missing(room, hits, normals, rng)
  depth = np.where(missing, 0, hits.depth).astype(np.float32)
  normals = np.where(missing, 0, normals).astype(np.float32)
  return Scene(
    image=image,
    segmentation=_segmentation(room, hits, rng),
    depth=depth,
    normals=np.ascontiguousarray(np.moveaxis(normals, 0, -1)),
    edge=edge.astype(np.float32),
    surfaces=surfaces,
  )


def _patches(rng, image_size, cells: tuple[int, int]) -> np.ndarray:
  """(H, W) float32 in [0, 1): smooth noise with as many blobs as there are cells."""
  coarse = Image.fromarray(rng.random(cells, np.float32))
  size = image_size[1], image_size[0]
  return np.asarray(coarse.resize(size, Image.Resampling.BILINEAR))


def _segmentation(room: Room, hits: _Hits, rng) -> np.ndarray:
  label = room.solids.label[hits.solid]
  border = np.zeros(label.shape, bool)
  border[:, :-1] |= label[:, 1:] != label[:, :-1]
  border[:-1] |= label[1:] != label[:-1]
  border &= _patches(rng, label.shape, (6, 8)) > 0.6
  return np.where(border, np.uint8(0), label)


def _missing(room: Room, hits: _Hits, normals, rng) -> np.ndarray:
  """(H, W) bool: where a Kinect measures no depth."""
  depth, size = hits.depth, hits.depth.shape
  rays = np.stack(np.broadcast_arrays(hits.x, hits.y[:, None], -1.0))
  cosine = -(normals * rays).sum(0) / np.sqrt((rays * rays).sum(0))
  missing = (depth < NEAREST) | (depth > FARTHEST) | (cosine < GRAZING)
  texture = room.solids.texture[hits.solid]
  glossy = np.isin(texture, (_OUTSIDE, _SCREEN, _MIRRORED))
  missing |= glossy & (_patches(rng, size, (12, 16)) > 0.2)
  missing |= rng.random(size) < 0.0005 * depth * depth
  # The projector lights a pixel `disparity` columns beside it; what is nearer and
  # reaches over that line throws its shadow there.
  disparity = focal_length(size) * BASELINE / depth
  for columns in range(1, 1 + int(min(disparity.max(), size[1] - 1))):
    nearer = disparity[:, columns:] - disparity[:, :-columns]
    missing[:, :-columns] |= nearer >= columns
  return missing


def _photograph(room: Room, frames: _Frames, hits: _Hits, rng) -> np.ndarray:
  """The picture: (H, W, 3) uint8 from 2H × 2W rays."""
  normals, _ = _surface_normals(room, frames, hits)
  to_world = frames.camera.astype(np.float32)
  normals = to_world @ normals.reshape(3, -1)
  points = np.empty((3, *hits.depth.shape), np.float32)
  points[0], points[1], points[2] = hits.x, hits.y[:, None], -1
  points *= hits.depth
  points = points.reshape(3, -1)
  solid = hits.solid.ravel()

  albedo, glow = _colours(room, frames, hits, points)
  world = to_world @ points + room.camera.position.astype(np.float32)[:, None]
  # From above comes more light than from below.
  light = room.ambient[:, None] * (0.8 + 0.2 * normals[1])
  for position, colour, at_ceiling in zip(*room.lights, strict=True):
    towards = position.astype(np.float32)[:, None] - world
    square = (towards * towards).sum(0) + 0.02
    received = (towards * normals).sum(0) / np.sqrt(square) / (1 + square / 4)
    np.maximum(received, 0, out=received)
    if at_ceiling:
      _cast_shadows(room, frames, world, normals, solid, position, received)
    light += colour[:, None] * received
  light *= _corner_shade(room, world, normals)
  albedo *= light + glow

  rows, columns = hits.depth.shape
  image = np.minimum(albedo, 4).reshape(3, rows // 2, 2, columns // 2, 2)
  mean = float(np.minimum(image, 1.5).mean())
  image *= room.exposure**2 / max(mean, 1e-3)
  image *= room.tint[:, None, None, None, None]
  np.minimum(image, 1, out=image)
  # The eye's response, about that of sRGB; the noise is that after it.
  image = np.sqrt(image.mean((2, 4))).transpose(1, 2, 0)
  image = image + room.noise * rng.standard_normal(image.shape, np.float32)
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _corner_shade(room: Room, world, normals) -> np.ndarray:
  """(N,) float32: light that reaches a point despite the walls beside it."""
  shade = np.ones(world.shape[1], np.float32)
  low = (-room.size[0] / 2, 0.0, -room.size[2] / 2)
  for i in range(3):
    above = world[i] - np.float32(low[i])
    distance = np.minimum(above, np.float32(room.size[i]) - above)
    closeness = np.maximum(1 - distance * 2.5, 0)
    # A surface along that wall is not beside it.
    shade -= 0.35 * closeness * closeness * (1 - np.abs(normals[i]))
  return shade


def _cast_shadows(room, frames, world, normals, solid, position, received) -> None:
  """Sets `received` to 0 where a solid stands between a point and the light.

  The light is above all that casts shadows here. Seen from it, through a plane below
  it, every solid lies in a rectangle, and only points in that can lie in its shadow.
  """
  solids = room.solids
  light = position.astype(np.float32)
  lit = np.flatnonzero((received > 0) & (world[1] < light[1] - 0.05))
  if not lit.size:
    return
  # Off the surface, so that what touches it casts no shadow on it.
  place = world[:, lit] + 0.004 * normals[:, lit]
  below = light[1] - place[1]
  a, b = (place[0] - light[0]) / below, (place[2] - light[2]) / below
  solid = solid[lit]
  camera = room.camera.position.astype(np.float32)[:, None]
  in_camera = frames.camera.T.astype(np.float32) @ (place - camera)
  light_in_camera = frames.camera.T @ (position - room.camera.position)
  lights = np.einsum('sij,j->si', frames.turn, light_in_camera) + frames.origin

  cos, sin = np.abs(np.cos(solids.yaw)), np.abs(np.sin(solids.yaw))
  wide = solids.half[:, 0] * cos + solids.half[:, 2] * sin
  deep = solids.half[:, 0] * sin + solids.half[:, 2] * cos
  top = position[1] - solids.centre[:, 1] - solids.half[:, 1]
  base = top + 2 * solids.half[:, 1]
  large = (solids.half.max(1) > 0.06) & (solids.half.min(1) > 0.011)
  dark = np.zeros(lit.size, bool)
  for s in range(_SHELL, len(cos)):
    if not large[s] or top[s] < 0.05:
      continue
    span = []
    for i, reach in ((0, wide[s]), (2, deep[s])):
      offset = solids.centre[s, i] - position[i]
      ends = [(offset + r) / h for r in (-reach, reach) for h in (top[s], base[s])]
      span.append((np.float32(min(ends)), np.float32(max(ends))))
    inside = (a > span[0][0]) & (a < span[0][1])
    inside &= (b > span[1][0]) & (b < span[1][1])
    inside &= solid != s
    index = np.flatnonzero(inside)
    if not index.size:
      continue
    turn, half = frames.turn[s].astype(np.float32), solids.half[s].astype(np.float32)
    start = turn @ in_camera[:, index] + frames.origin[s].astype(np.float32)[:, None]
    direction = lights[s].astype(np.float32)[:, None] - start
    enter, leave = _crossings(int(solids.shape[s]), half, start, direction)
    near, far = np.maximum.reduce(enter), np.minimum.reduce(leave)
    dark[index[(near < far) & (far > 0) & (near < 1)]] = True
  received[lit[dark]] = 0


def _colours(room: Room, frames: _Frames, hits: _Hits, points):
  """Reflectance (3, N) and light of its own (N,) of every point, float32."""
  solids = room.solids
  flat = hits.solid.ravel()
  albedo = np.empty_like(points)
  order = np.argsort(flat, kind='stable')
  ends = np.cumsum(np.bincount(flat, minlength=len(solids.shape)))
  axes = hits.axis.ravel()
  for s, end in enumerate(ends):
    index = order[ends[s - 1] if s else 0 : end]
    if not index.size:
      continue
    colour = solids.colour[s]
    if solids.texture[s] == _PLAIN:
      albedo[:, index] = colour[0][:, None]
      continue
    turn, origin = frames.turn[s].astype(np.float32), frames.origin[s]
    local = turn @ points[:, index] + origin.astype(np.float32)[:, None]
    albedo[:, index] = _texture(solids, s, local, axes[index])
  return albedo, solids.glow[flat]


def _texture(solids: Solids, s: int, local, axis) -> np.ndarray:
  """Colour (3, N) of points (3, N) of one solid, on faces across `axis` (N,)."""
  kind, scale = int(solids.texture[s]), solids.scale[s]
  first, second = solids.colour[s][:, :, None]
  half = solids.half[s].astype(np.float32)
  shift = np.divmod(int(solids.phase[s]), _LATTICE)
  u = np.where(axis == 0, local[2], local[0])
  v = np.where(axis == 1, local[2], local[1])
  tone = lambda i, j: _TONES[_lattice(i, shift[0]), _lattice(j, shift[1])]
  if kind == _SPINES:
    return _COLOURS[_lattice(u / scale, shift[0]), shift[1]].T
  if kind == _PAINTING:
    patches = _COLOURS[_lattice(u / scale, shift[0]), _lattice(v / scale, shift[1])].T
    return 0.5 * patches + 0.5 * first
  if kind == _NOISE:
    mix = tone(u / scale, v / scale)
  elif kind == _WOOD:
    mix = 0.3 + 0.3 * np.sin(v * (6.3 / scale) + 1.5 * np.sin(3 * u + shift[0]))
  elif kind == _PLANKS:
    row = np.floor(v / scale)
    mix = 0.6 * tone(u / (9 * scale) + 0.37 * row, row)
    mix += v / scale - row < 0.07
  elif kind == _TILES:
    column, row = np.floor(u / scale), np.floor(v / scale)
    mix = 0.2 * tone(column, row)
    gap = np.minimum(u - column * scale, v - row * scale) < 0.012
    mix[gap] = 1
  elif kind == _STRIPES:
    mix = _fraction(u / scale) < 0.5
  elif kind == _CHECKS:
    mix = (_fraction(u / scale) < 0.5) ^ (_fraction(v / scale) < 0.5)
  elif kind == _PANELS:
    mix = _panels(u, v, half, scale) * (axis == 2)
  elif kind == _FOLDS:
    mix = 0.5 + 0.5 * np.sin(u * (6.3 / scale) + shift[0])
  elif kind == _SLATS:
    mix = _fraction(v / scale) < 0.3
  elif kind == _OUTSIDE:
    horizon = 0.15 * tone(u / 0.1, np.zeros_like(u)) - 0.1
    mix = np.clip((v / scale - horizon) * 8 + 0.5, 0, 1)
  else:  # a gloss over screens and mirrors
    mix = np.clip(0.5 + 0.4 * (u / half[0] + v / half[1]), 0, 1)
  return first + (second - first) * mix.astype(np.float32)


def _fraction(value):
  return value - np.floor(value)


def _lattice(value, shift: int):
  return (np.floor(value).astype(np.int32) + shift) % _LATTICE


def _panels(u, v, half, scale):
  """1 on the gaps between doors or drawers of about `scale`, and on their handles."""
  num_u, num_v = (max(1, round(float(2 * h / scale))) for h in half[:2])
  width, height = 2 * half[0] / num_u, 2 * half[1] / num_v
  from_u = np.abs(_fraction(u / width + num_u / 2) - 0.5) * width
  from_v = np.abs(_fraction(v / height + num_v / 2) - 0.5) * height
  gap = (from_u > width / 2 - 0.012) | (from_v > height / 2 - 0.012)
  handle = (from_u < 0.05) & (from_v < 0.012)
  return gap | handle


def room_id(index: int) -> str:
  """Name of a room's files, without extension."""
  return f'{index:06d}'


def split_of(index: int) -> str:
  """'train' for 14 of 20 rooms, 'val' for 3 and 'test' for 3; all from 7 rooms on."""
  position = index % 20
  if position in VAL_ROOMS:
    return 'val'
  return 'test' if position in TEST_ROOMS else 'train'


def render_rooms(
  target: Path | str,
  num: int,
  image_size: tuple[int, int],
  seed: int,
  *,
  progress: bool = True,
) -> Path:
  """Writes `num` rooms as files in the NYUD_MT layout.

  A killed rendering continues where it stopped: a room's picture is written after its
  labels, the lists of the splits after all rooms, and `procedural.json` says at last
  that all is complete.

  Args:
    target: folder to write; created if missing.
    num: number of rooms.
    image_size: (H, W) of pictures and labels.
    seed: seed of the set.
    progress: whether to report progress.

  Returns:
    `target`.

  Raises:
    DataError: `target` holds a set made with other settings, or other files;
      it cannot be written; a setting is out of range.
  """
  target = Path(target)
  fewest = TEST_ROOMS[0] + 1  # so that no split is empty
  if num < fewest or min(image_size) < 16 or seed < 0:
    raise DataError(
      f'cannot render {num} rooms of size {tuple(image_size)} with seed {seed}:'
      f' need at least {fewest} rooms, 16 pixels a side, and a seed of at least 0'
    )
  settings = {
    'what': 'procedural rooms, a stand-in for NYU-v2 (NYUD_MT)',
    'renderer_version': RENDERER_VERSION,
    'num': num,
    'image_size': list(image_size),
    'seed': seed,
  }
  folders = ('images', 'segmentation', 'depth', 'normals', 'edge', 'gt_sets')

  def fill():
    for folder in folders:
      (target / folder).mkdir(exist_ok=True)
    for index in progress_bar(range(num), num, 'rendering rooms', progress):
      if not (target / 'images' / f'{room_id(index)}.jpg').exists():
        _write_room(target, index, image_size, seed)
    for split in ('train', 'val', 'test'):
      names = [room_id(index) for index in range(num) if split_of(index) == split]
      content = ''.join(f'{name}\n' for name in names)
      write_atomically(target / 'gt_sets' / f'{split}.txt', content.encode())

  return stand_in.render(target, settings, folders, fill)


def _write_room(target: Path, index: int, image_size, seed: int) -> None:
  room = draw_room(seed, index)
  scene = cast(room, image_size)
  name = room_id(index)
  for folder, array in (
    ('depth', scene.depth),
    ('normals', scene.normals),
    ('edge', scene.edge),
  ):
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(target / folder / f'{name}.npy', content.getvalue())
  content = io.BytesIO()
  Image.fromarray(scene.segmentation).save(content, 'PNG')
  write_atomically(target / 'segmentation' / f'{name}.png', content.getvalue())
  content = io.BytesIO()
  Image.fromarray(scene.image).save(content, 'JPEG', quality=room.jpeg_quality)
  write_atomically(target / 'images' / f'{name}.jpg', content.getvalue())
