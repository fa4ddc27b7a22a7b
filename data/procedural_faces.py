"""Procedural faces: cartoon portraits as files in the CelebAMask-HQ layout.

The stand-in for CelebAMask-HQ. It differs from the published data set only in
its files: `CelebA-HQ-img/N.jpg`, `CelebAMask-HQ-mask-anno/{0..14}/NNNNN_*.png`
and `CelebAMask-HQ-attribute-anno.txt`, so everything that reads those reads
these, and the labels are exact because the program that drew them wrote them.

A face is drawn in two stages. `draw_face` samples what is there (sex, age,
hair, expression, make-up, pose, light, ...) with the correlations of life:
lipstick and make-up mostly on women, beards and short hair on men, grey hair
on the old, raised cheeks with a smile. `paint_face` turns that into pixels by
painting signed-distance shapes over the pixel grid, back to front. Graded
attributes (smile, lip size, cheekbones, arch of the brows, lipstick, ...) come
from continuous distributions that overlap at the threshold, hair and lip
colours overlap between classes, and light, noise, blur, glasses, hats and
fringes hide evidence, so no attribute can be read off one pixel. In the
pictures l_ is the viewer's left.

Attributes in `UNMODELLED` have no counterpart in the drawing and are always
-1: do not train on them.

Every face depends only on (seed, index): rendering is resumable and does not
depend on order.
"""

import functools
import io
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from data import stand_in
from data.celebamask_hq import (
  ATTRIBUTE_FILE,
  ATTRIBUTES,
  IDS_PER_FOLDER,
  MASK_FOLDER,
  PARTS,
  image_path,
  part_path,
)
from data.errors import DataError
from data.files import write_atomically
from data.progress import progress_bar

RENDERER_VERSION = 1

UNMODELLED = (
  'Attractive', 'Chubby', 'Double_Chin', 'Pointy_Nose', 'Receding_Hairline',
  'Sideburns', 'Wearing_Necktie',
)  # fmt: skip

_PART = {part: index for index, part in enumerate(PARTS)}

Mask = np.ndarray  # (H, W) bool
Field = np.ndarray  # (H, W) float32, negative inside the shape


class Face(NamedTuple):
  """What is in one picture. Lengths in half picture heights, colours 0..1."""

  # Pose: shift of the head, its size, in-plane rotation (radians), and the
  # turn of the head in [-1, 1].
  shift: tuple[float, float]
  scale: float
  roll: float
  yaw: float
  # Shape of the head.
  width: float
  height: float
  taper: float  # how much the face narrows towards the chin
  square: float  # how square the chin is
  skin: np.ndarray
  # Hair.
  bald: bool
  hair: np.ndarray
  hair_length: float  # 0 cropped .. 1 below the shoulders
  hair_volume: float
  wave: float  # amplitude of the outline's waves
  bangs: float  # how far the fringe comes down, 0 = none
  parting: float
  # Features.
  eye_open: float
  eye_colour: np.ndarray
  eye_bags: float
  brow_thickness: float
  brow_arch: float
  nose: float
  lips: float
  lip_colour: np.ndarray
  smile: float
  mouth_open: float
  cheekbones: float
  blush: float
  eye_shadow: float
  beard: float  # darkness of cheeks and chin, 0 = shaved
  goatee: bool
  mustache: bool
  wrinkles: float
  # Things worn.
  glasses: int  # 0 none, 1 round, 2 square, 3 dark
  hat: int  # 0 none, 1 brim, 2 beanie, 3 cap
  hat_colour: np.ndarray
  earrings: bool
  necklace: bool
  cloth: np.ndarray
  collar: float
  # Scene.
  background: np.ndarray  # (2, 3): top and bottom colour
  light: tuple[float, float, float]  # direction x, y and strength
  gain: float
  tint: np.ndarray
  blur: float
  noise: float
  jpeg_quality: int


def _clip(value: float, low: float = 0.0, high: float = 1.0) -> float:
  return float(min(max(value, low), high))


def draw_face(seed: int, index: int) -> tuple[Face, dict[str, bool]]:
  """Samples one face and its attributes.

  Args:
    seed: seed of the whole set.
    index: number of the face in it.

  Returns:
    The face, and the value of every modelled attribute by published name.
  """
  rng = np.random.default_rng((seed, index))
  chance = lambda p: bool(rng.random() < p)
  between = lambda low, high: float(rng.uniform(low, high))
  normal = lambda mean, std: float(rng.normal(mean, std))

  male = chance(0.42)
  young = chance(0.7 if male else 0.82)
  # Skin: from pale to dark along a brown curve; `tone` 0 is the palest.
  tone = between(0.0, 1.0) ** 1.3
  pale, dark = np.array([0.97, 0.83, 0.74]), np.array([0.38, 0.24, 0.17])
  skin = pale + (dark - pale) * tone + rng.normal(0, 0.02, 3)
  pale_skin = tone < 0.05

  # Hair.
  bald = male and chance(0.08 if young else 0.22)
  grey = not young and chance(0.45)
  if grey:
    colour = 'gray'
  else:
    blond = (0.28 if not male else 0.1) * (1.3 - tone)
    colour = str(rng.choice(['blond', 'brown', 'black'], p=[blond, 0.3, 0.7 - blond]))
  hair = {
    'black': np.array([0.08, 0.07, 0.07]),
    'brown': np.array([0.32, 0.2, 0.12]),
    'blond': np.array([0.78, 0.62, 0.36]),
    'gray': np.array([0.66, 0.66, 0.66]),
  }[colour] * between(0.75, 1.2) + rng.normal(0, 0.02, 3)
  hair_length = _clip(normal(0.12, 0.12) if male and chance(0.9) else normal(0.75, 0.3))
  wave = max(0.0, normal(0.012 if male else 0.03, 0.02))
  bangs = 0.0
  if not bald and chance(0.12 if male else 0.3):
    bangs = between(0.4, 1.0)
  hat = int(rng.integers(1, 4)) if chance(0.1) else 0

  # Expression.
  smiling = chance(0.44 if male else 0.55)
  smile = normal(0.8, 0.3) if smiling else normal(-0.2, 0.22)
  cheekbones = 0.7 * smile + normal(-0.1 if male else 0.05, 0.5)
  mouth_open = max(0.0, normal(0.05 + 0.45 * max(smile, 0.0), 0.3))

  # Features and make-up.
  make_up = 0.0 if male else _clip(normal(0.45, 0.3))
  arched = chance(0.15 if male else 0.5)
  brow_arch = normal(0.95 if arched else 0.2, 0.2)
  brow_thickness = normal(0.6 if male else 0.4, 0.15)
  big_lips = chance(0.22 if male else 0.42)
  lips = normal(0.85 if big_lips else 0.35, 0.13)
  nose = normal(0.55 if male else 0.38, 0.16)
  eye_open = normal(0.5 if male else 0.58, 0.13) - 0.12 * max(smile, 0.0)
  bare_lip = skin * np.array([0.82, 0.58, 0.58])
  lipstick = 0.0 if male or chance(0.35) else _clip(normal(0.75, 0.25), 0.25)
  shade = np.array([
    [0.78, 0.1, 0.16], [0.6, 0.08, 0.2], [0.88, 0.35, 0.42], [0.72, 0.28, 0.2],
  ])[rng.integers(4)]  # fmt: skip
  lip_colour = bare_lip + (shade - bare_lip) * 0.85 * lipstick
  lip_colour = lip_colour + rng.normal(0, 0.025, 3)
  blush = _clip(normal(0.1 if male else 0.15, 0.1) + 0.5 * make_up * chance(0.5))
  eye_bags = _clip(normal(0.15 if young else 0.45, 0.22))
  beard, goatee, mustache = 0.0, False, False
  if male:
    kind = rng.random()
    if kind < 0.25:
      beard = between(0.15, 0.35)  # stubble
    elif kind < 0.4:
      beard, mustache = between(0.6, 1.0), True
    elif kind < 0.5:
      goatee, mustache = True, chance(0.7)
    elif kind < 0.56:
      mustache = True

  width = normal(0.45 if male else 0.425, 0.022)
  height = normal(0.585, 0.025)
  glasses = 0
  if chance((0.16 if male else 0.06) * (1.0 if young else 1.7)):
    glasses = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
  earrings = not male and chance(0.4)
  necklace = not male and chance(0.3)
  blur = between(0.9, 1.6) if chance(0.12) else between(0.0, 0.5)

  face = Face(
    shift=(normal(0.0, 0.05), normal(0.02, 0.04)),
    scale=_clip(normal(1.25, 0.08), 1.0, 1.5),
    roll=_clip(normal(0.0, 0.1), -0.35, 0.35),
    yaw=_clip(normal(0.0, 0.35), -1.0, 1.0),
    width=width,
    height=height,
    taper=_clip(normal(0.25 if male else 0.75, 0.15)),
    square=_clip(normal(0.55 if male else 0.15, 0.15)),
    skin=skin,
    bald=bald,
    hair=hair,
    hair_length=hair_length,
    hair_volume=_clip(normal(0.45 if male else 0.6, 0.2), 0.15),
    wave=wave,
    bangs=bangs,
    parting=between(-1.0, 1.0),
    eye_open=_clip(eye_open, 0.15),
    eye_colour=np.array([
      [0.28, 0.17, 0.1], [0.2, 0.4, 0.65], [0.25, 0.45, 0.25],
      [0.12, 0.08, 0.06],
    ])[rng.integers(4)],
    eye_bags=eye_bags,
    brow_thickness=_clip(brow_thickness, 0.1),
    brow_arch=_clip(brow_arch, -0.1, 1.2),
    nose=_clip(nose, 0.05),
    lips=_clip(lips, 0.1),
    lip_colour=lip_colour,
    smile=_clip(smile, -0.8, 1.4),
    mouth_open=_clip(mouth_open - 0.15, 0.0, 1.0),
    cheekbones=_clip(cheekbones, -0.6, 1.4),
    blush=blush,
    eye_shadow=make_up * between(0.4, 1.0),
    beard=beard,
    goatee=goatee,
    mustache=mustache,
    wrinkles=0.0 if young else between(0.35, 1.0),
    glasses=glasses,
    hat=hat,
    hat_colour=rng.uniform(0.05, 0.9, 3),
    earrings=earrings,
    necklace=necklace,
    cloth=rng.uniform(0.05, 0.95, 3),
    collar=between(0.0, 1.0),
    background=rng.uniform(0.05, 0.95, (2, 3)),
    light=(between(-1.0, 1.0), between(-1.0, 0.6), between(0.05, 0.45)),
    gain=between(0.7, 1.2),
    tint=1.0 + rng.normal(0, 0.035, 3),
    blur=blur,
    noise=between(0.01, 0.05),
    jpeg_quality=int(rng.integers(80, 96)),
  )  # fmt: skip
  hatless = hat == 0
  attributes = {
    '5_o_Clock_Shadow': 0.0 < beard < 0.5,
    'Arched_Eyebrows': brow_arch > 0.55,
    'Bags_Under_Eyes': eye_bags > 0.4,
    'Bald': bald,
    'Bangs': bangs > 0.0 and hatless,
    'Big_Lips': lips > 0.6,
    'Big_Nose': nose > 0.55,
    'Black_Hair': colour == 'black' and not bald,
    'Blond_Hair': colour == 'blond' and not bald,
    'Blurry': blur > 0.8,
    'Brown_Hair': colour == 'brown' and not bald,
    'Bushy_Eyebrows': brow_thickness > 0.65,
    'Eyeglasses': glasses > 0,
    'Goatee': goatee,
    'Gray_Hair': colour == 'gray' and not bald,
    'Heavy_Makeup': make_up > 0.5,
    'High_Cheekbones': cheekbones > 0.2,
    'Male': male,
    'Mouth_Slightly_Open': mouth_open > 0.25,
    'Mustache': mustache,
    'Narrow_Eyes': eye_open < 0.38,
    'No_Beard': beard == 0.0 and not goatee and not mustache,
    'Oval_Face': height / width > 1.38,
    'Pale_Skin': pale_skin,
    'Rosy_Cheeks': blush > 0.4,
    'Smiling': smile > 0.2,
    'Straight_Hair': not bald and wave < 0.01,
    'Wavy_Hair': not bald and wave > 0.03,
    'Wearing_Earrings': earrings,
    'Wearing_Hat': hat > 0,
    'Wearing_Lipstick': lipstick > 0.0,
    'Wearing_Necklace': necklace,
    'Young': young,
  }
  return face, attributes


def _ellipse(x, y, centre_x, centre_y, a, b) -> Field:
  """Approximate signed distance to an axis-parallel ellipse."""
  u, v = (x - centre_x) * (1 / a), (y - centre_y) * (1 / b)
  return (np.sqrt(u * u + v * v) - 1) * min(a, b)


def _box(x, y, centre_x, centre_y, a, b) -> Field:
  """Signed distance (inside and beside the edges) to a rectangle."""
  return np.maximum(np.abs(x - centre_x) - a, np.abs(y - centre_y) - b)


class _Painting:
  """A picture and its part masks while it is painted back to front."""

  def __init__(self, image: np.ndarray, masks: np.ndarray, sharpness: float):
    self.image = image  # (3, H, W) float32
    self.masks = masks  # (parts, H, W) bool
    self.sharpness = np.float32(sharpness)  # 1 / width of a soft edge

  def window(self, rows: slice, columns: slice) -> '_Painting':
    """The same painting, only a part of it: cheaper for small shapes."""
    return _Painting(
      self.image[:, rows, columns], self.masks[:, rows, columns], self.sharpness
    )

  def paint(self, field, colour, opacity=1.0, part=None, erase=()) -> None:
    """Paints where `field` < 0; `erase`: parts that this hides, or 'all'."""
    alpha = np.float32(0.5) - field * self.sharpness
    np.minimum(alpha, 1, out=alpha)
    np.maximum(alpha, 0, out=alpha)
    if opacity != 1.0:
      alpha *= np.float32(opacity)
    colour = np.asarray(colour, np.float32)
    if colour.ndim == 1:
      colour = colour[:, None, None]
    change = colour - self.image
    change *= alpha
    self.image += change
    if part is None:
      return
    inside = field < 0
    if erase:
      outside = ~inside
      for hidden in _PART if erase == 'all' else erase:
        self.masks[_PART[hidden]] &= outside
    self.masks[_PART[part]] |= inside


def _near(painting, x, y, left, right, top, bottom):
  """The painting, x and y around a box of these coordinates: most shapes are small.

  x and y are affine functions of row and column. The part goes two pixels beyond the
  rows and columns that the box touches, which is where soft edges end.
  """
  x_0, x_column, x_row = float(x[0, 0]), float(x[0, 1]), float(x[1, 0])
  y_0, y_column, y_row = float(y[0, 0]), float(y[0, 1]), float(y[1, 0])
  a, b, c, d = x_column - x_0, x_row - x_0, y_column - y_0, y_row - y_0
  determinant = a * d - b * c
  corners = [(u - x_0, v - y_0) for u in (left, right) for v in (top, bottom)]
  columns = [(d * u - b * v) / determinant for u, v in corners]
  rows = [(a * v - c * u) / determinant for u, v in corners]
  # At least one pixel, so that a box outside the picture is no special case.
  area = tuple(
    slice(
      min(max(int(min(at)) - 2, 0), length - 1), max(min(int(max(at)) + 3, length), 1)
    )
    for at, length in zip((rows, columns), x.shape, strict=True)
  )
  return painting.window(*area), x[area], y[area]


@functools.cache
def _grid(image_size: tuple[int, int]) -> tuple[Field, Field]:
  """Pixel centres, x and y in [-1, 1], y downwards."""
  rows, columns = image_size
  y = (np.arange(rows, dtype=np.float32) * 2 + 1) / rows - 1
  x = (np.arange(columns, dtype=np.float32) * 2 + 1) / columns - 1
  return np.broadcast_to(x, (rows, columns)), np.broadcast_to(
    y[:, None], (rows, columns)
  )


def _paint_background(painting, face, x, y, rng) -> None:
  top, bottom = face.background.astype(np.float32)
  painting.image += top[:, None, None]
  painting.image += ((y + 1) / 2) * (bottom - top)[:, None, None]
  for _ in range(int(rng.integers(0, 5))):
    centre_x, centre_y = rng.uniform(-1, 1, 2)
    a, b = rng.uniform(0.1, 0.5, 2)
    shape = _ellipse if rng.random() < 0.5 else _box
    # The soft edge of a flat ellipse is widest at its tips.
    wide, high = 1.2 * a, 1.2 * b
    near, near_x, near_y = _near(
      painting, x, y, centre_x - wide, centre_x + wide, centre_y - high, centre_y + high
    )
    near.paint(
      shape(near_x, near_y, centre_x, centre_y, a, b),
      rng.uniform(0, 1, 3),
      rng.uniform(0.2, 0.9),
    )


def _paint_body(painting, face, x, y) -> None:
  """Neck, clothes and necklace; x, y turn with the head only a little."""
  thick = face.width * (0.62 + 0.2 * face.square)
  painting.paint(
    np.maximum(np.abs(x) - thick - 0.12 * np.maximum(y - 0.7, 0), 0.2 - y),
    face.skin * 0.76,
    part='neck',
  )
  # The neckline: a parabola, deep or close to the neck.
  neckline = 0.95 - 0.2 * face.collar - (1.2 + face.collar) * x * x
  shoulder = 0.72 + 0.35 * np.maximum(np.abs(x) - 0.35, 0)
  painting.paint(
    np.maximum(np.maximum(neckline, shoulder) - y, shoulder - y),
    face.cloth,
    part='cloth',
    erase=('neck',),
  )
  if face.necklace:
    chain = np.abs(y - (0.86 - 1.5 * x * x)) - 0.025
    painting.paint(
      np.maximum(chain, np.abs(x) - thick),
      (0.9, 0.8, 0.4),
      part='neck_l',
      erase=('neck', 'cloth'),
    )


def _hair_outline(face, x, y) -> Field:
  volume = 0.02 + 0.16 * face.hair_volume
  ripple = face.wave * np.sin(14 * y + 3 * face.parting)
  return _ellipse(
    x + ripple, y, 0.0, -0.1, face.width + volume, face.height - 0.02 + volume
  )


def _paint_hair_behind(painting, face, x, y, outline) -> None:
  """Hair behind head and neck."""
  field = outline
  if face.hair_length > 0.3:
    bottom = 0.05 + 0.95 * face.hair_length
    half = face.width + 0.03 + 0.15 * face.hair_volume
    ripple = face.wave * np.sin(14 * y + 3 * face.parting)
    field = np.minimum(
      field, np.maximum(np.abs(x + ripple) - half, np.maximum(-0.1 - y, y - bottom))
    )
  else:
    field = np.maximum(field, y - 0.12)
  painting.paint(
    field, face.hair * 0.75, part='hair', erase=('neck', 'cloth', 'neck_l')
  )


def _paint_hair_before(painting, face, x, y, outline) -> None:
  """Hair over forehead and temples, with strands of light."""
  u = (x - 0.06 * face.yaw) / face.width
  line = -0.38 + 0.17 * u * u * u * u + 0.08 * face.parting * u
  if face.bangs:
    fringe = -0.36 + 0.2 * face.bangs + 0.02 * np.sin(26 * x)
    line = np.where(np.abs(u) < 0.8, np.maximum(fringe, line), line)
  field = np.maximum(outline, y - line)
  # Temples: as far down as the hair is long, thin when it is short.
  down = -0.12 + 1.1 * face.hair_length
  inner = face.width * (0.96 - 0.14 * min(face.hair_length, 1.0))
  temples = np.maximum(np.maximum(outline, inner - np.abs(x)), y - down)
  field = np.minimum(field, temples)
  strands = 1 + 0.11 * np.sin(40 * x + 6 * np.sin(3 * y) + 9 * face.parting)
  gloss = strands * (1 - 0.25 * (y + 0.5))
  colour = face.hair.astype(np.float32)[:, None, None] * gloss
  painting.paint(field, colour, part='hair', erase='all')


def _paint_head(painting, x, y, face) -> Field:
  """Ears and the skin of the face; returns the distance to the face."""
  for part, side in (('l_ear', -1), ('r_ear', 1)):
    # The ear that the head turns away from goes behind it.
    centre = side * (face.width + 0.015) - 0.07 * face.yaw
    ear = _ellipse(x, y, centre, 0.02, 0.075, 0.13)
    painting.paint(ear, face.skin * 0.9, part=part, erase=('hair', 'neck'))
  below = np.maximum(y, 0)
  u = x / (face.width * (1 - face.taper * below * below))
  v = y * (1 / face.height)
  v2 = v * v
  square = np.where(y > 0, np.float32(face.square), np.float32(0))
  radius = np.sqrt(u * u + v2 * (1 - square + square * v2))
  head = (radius - 1) * face.width
  # A rounded head: lighter where its surface faces the light.
  shade = 1 + face.light[2] * 0.5 * (face.light[0] * u + face.light[1] * v)
  shade = shade * (1 - 0.16 * np.clip(radius, 0, 1) ** 4)
  painting.paint(
    head,
    face.skin.astype(np.float32)[:, None, None] * shade,
    part='skin',
    erase=('hair', 'neck', 'l_ear', 'r_ear', 'cloth', 'neck_l'),
  )
  return head


def _sides(face: Face) -> tuple[tuple[str, int, float], ...]:
  """(prefix, side, foreshortening) of the left and right half of the face."""
  return tuple(
    (prefix, side, 1 - 0.28 * max(side * face.yaw, 0.0))
    for prefix, side in (('l', -1), ('r', 1))
  )


def _paint_features(painting, x, y, face, head) -> None:
  """Cheeks, wrinkles, eyes, brows, nose, beard and mouth."""
  x = x - 0.15 * face.yaw
  on_face = lambda field: np.maximum(field, head)
  skin = face.skin
  for prefix, side, near in _sides(face):
    _paint_cheek(painting, face, x, y, head, side, near)
    eye_x = side * 0.195 * near
    around = eye_x - 0.2, eye_x + 0.2, -0.34, 0.06
    _paint_eye(*_near(painting, x, y, *around), face, prefix, side, near)
  if face.wrinkles:
    for height in (-0.36, -0.3):
      line = np.abs(y - height - 0.1 * x * x) - 0.01
      painting.paint(
        on_face(np.maximum(line, np.abs(x) - 0.2)), skin * 0.62,
        0.7 * face.wrinkles,
      )  # fmt: skip
  _paint_beard(painting, face, x, y, head)
  _paint_nose(*_near(painting, x, y, -0.3, 0.3, -0.15, 0.28), face)
  _paint_mouth(*_near(painting, x, y, -0.34, 0.34, 0.1, 0.62), face)


def _paint_cheek(painting, face, x, y, head, side, near) -> None:
  """Blush, cheekbone and wrinkles of one half of the face."""
  on_face = lambda field: np.maximum(field, head)
  skin = face.skin
  cheek = side * 0.25 * near
  if face.blush > 0.15:
    painting.paint(
      on_face(_ellipse(x, y, cheek, 0.17, 0.1, 0.075)),
      skin * 0.5 + np.array([0.45, 0.12, 0.14]),
      0.75 * face.blush,
    )
  raised = face.cheekbones
  if raised > -0.2:
    strength = 0.5 * (raised + 0.2)
    painting.paint(
      on_face(_ellipse(x, y, cheek, 0.1, 0.09, 0.035)),
      np.minimum(skin * 1.3 + 0.08, 1), min(strength, 0.8),
    )  # fmt: skip
    painting.paint(
      on_face(_ellipse(x, y, cheek * 1.12, 0.24, 0.08, 0.04)),
      skin * 0.6, min(strength, 0.8),
    )  # fmt: skip
  if face.wrinkles:
    fold = np.abs(x - side * near * (0.13 + 0.35 * (y - 0.15))) - 0.012
    painting.paint(
      np.maximum(fold, np.abs(y - 0.24) - 0.1), skin * 0.6,
      0.8 * face.wrinkles,
    )  # fmt: skip
    foot = np.abs(y + 0.08 - 0.4 * (side * x - 0.34 * near)) - 0.01
    painting.paint(
      on_face(np.maximum(foot, np.abs(x - side * 0.35 * near) - 0.04)),
      skin * 0.6, 0.7 * face.wrinkles,
    )  # fmt: skip


def _paint_eye(painting, x, y, face, prefix, side, near) -> None:
  """Bags, shadow, the eye itself, and its brow."""
  eye_x, eye_y = side * 0.195 * near, -0.08
  if face.eye_bags > 0.1:
    painting.paint(
      _ellipse(x, y, eye_x, eye_y + 0.085, 0.085 * near, 0.03),
      face.skin * 0.55, 0.75 * face.eye_bags,
    )  # fmt: skip
  if face.eye_shadow > 0.1:
    painting.paint(
      _ellipse(x, y, eye_x, eye_y - 0.045, 0.115 * near, 0.065),
      (0.38, 0.22, 0.36), 0.75 * face.eye_shadow,
    )  # fmt: skip
  half = 0.015 + 0.07 * face.eye_open
  eye = _ellipse(x, y, eye_x, eye_y, 0.1 * near, half)
  painting.paint(eye - 0.014, (0.1, 0.07, 0.06), 0.8)  # lashes
  painting.paint(eye, (0.95, 0.95, 0.95), part=f'{prefix}_eye')
  iris_x = eye_x + 0.03 * face.yaw
  iris = np.maximum(eye, _ellipse(x, y, iris_x, eye_y, 0.048, 0.048))
  painting.paint(iris, face.eye_colour)
  pupil = np.maximum(eye, _ellipse(x, y, iris_x, eye_y, 0.02, 0.02))
  painting.paint(pupil, (0.02, 0.02, 0.02))
  # Brow: a parabola whose top lies outwards of the middle when arched.
  t = (x - eye_x) / (0.13 * near) * side
  arch = face.brow_arch
  curve = eye_y - 0.125 - 0.085 * arch * (1 - (t - 0.25) ** 2) + 0.01 * t
  brow = np.abs(y - curve) - (0.012 + 0.03 * face.brow_thickness) * (
    1 - 0.35 * np.maximum(t, 0)
  )
  painting.paint(
    np.maximum(brow, (np.abs(t) - 1) * 0.13),
    np.minimum(face.hair * 0.7, 0.5),
    0.9,
    part=f'{prefix}_brow',
  )


def _paint_nose(painting, x, y, face) -> None:
  """A wedge with a rounded tip and nostrils."""
  size = 0.055 + 0.06 * face.nose
  lean = 0.05 * face.yaw
  ridge = np.abs(x - lean * (y + 0.1) * 3) - size * (
    0.3 + 0.9 * np.clip(y + 0.08, 0, 0.22) / 0.22
  )
  wedge = np.maximum(ridge, np.maximum(-0.06 - y, y - 0.15))
  tip = _ellipse(x, y, lean, 0.14, size * 1.25, size * 0.7)
  nose = np.minimum(wedge, tip)
  painting.paint(nose, face.skin * 0.88, 0.75, part='nose')
  light = face.light[0] * 0.4 * size
  painting.paint(
    np.maximum(np.abs(x - lean - light) - size * 0.3, np.abs(y - 0.03) - 0.12),
    np.minimum(face.skin * 1.15, 1), 0.6,
  )  # fmt: skip
  for _, side, near in _sides(face):
    painting.paint(
      _ellipse(x, y, lean + side * near * size * 0.6, 0.165, 0.022, 0.016),
      face.skin * 0.35,
    )


def _paint_beard(painting, face, x, y, head) -> None:
  colour = np.minimum(face.hair * 0.8, 0.6)
  if face.beard:
    # Below a curve from the ears to under the nose, around the mouth.
    line = 0.13 + 0.15 * np.exp(-((x / 0.25) ** 2)) - 0.3 * x * x
    painting.paint(
      np.maximum(np.maximum(head, line - y), -_ellipse(x, y, 0, 0.34, 0.2, 0.07)),
      colour, 0.95 * face.beard,
    )  # fmt: skip
  if face.goatee:
    painting.paint(np.maximum(head, _ellipse(x, y, 0, 0.5, 0.12, 0.09)), colour, 0.9)
  if face.mustache:
    painting.paint(
      np.maximum(np.abs(y - 0.225 - 0.6 * x * x) - 0.03, np.abs(x) - 0.17),
      colour, 0.9,
    )  # fmt: skip


def _paint_mouth(painting, x, y, face) -> None:
  half = 0.155 + 0.06 * face.smile + 0.02 * face.lips
  near = 1 - 0.12 * abs(face.yaw)
  t = x / (half * near)
  body = 1 - t * t
  middle = 0.335 - 0.13 * face.smile * (0.45 - body)
  gap = 0.12 * face.mouth_open * body
  upper = (0.014 + 0.06 * face.lips) * (0.35 + 0.65 * body)
  lower = (0.018 + 0.08 * face.lips) * (0.25 + 0.75 * body)
  width = (np.abs(t) - 1) * half
  inside = np.maximum(width, np.abs(y - middle) - gap / 2)
  if face.mouth_open > 0.05:
    painting.paint(inside, (0.25, 0.05, 0.06), part='mouth')
    painting.paint(
      np.maximum(inside, y - middle - 0.02 * face.smile), (0.93, 0.92, 0.88)
    )
  top = np.maximum(width, np.abs(y - middle + gap / 2 + upper / 2) - upper / 2)
  painting.paint(top, face.lip_colour * 0.9, part='u_lip')
  low = np.maximum(width, np.abs(y - middle - gap / 2 - lower / 2) - lower / 2)
  painting.paint(low, np.minimum(face.lip_colour * 1.08, 1), part='l_lip')
  if face.mouth_open <= 0.05:
    painting.paint(
      np.maximum(width - 0.015, np.abs(y - middle) - 0.008),
      face.lip_colour * 0.45,
      0.9,
    )


def _paint_earrings(painting, face, x, y) -> None:
  for side in (-1, 1):
    centre = side * (face.width + 0.03) - 0.07 * face.yaw
    near, near_x, near_y = _near(
      painting, x, y, centre - 0.06, centre + 0.06, 0.12, 0.28
    )
    near.paint(
      _ellipse(near_x, near_y, centre, 0.2, 0.035, 0.055),
      (0.92, 0.84, 0.5),
      part='ear_r',
      erase=('l_ear', 'r_ear', 'skin', 'hair', 'neck'),
    )


def _paint_glasses(painting, face, x, y) -> None:
  x = x - 0.15 * face.yaw
  dark = face.glasses == 3
  frame_colour = np.full(3, 0.06)
  erase = ('l_brow', 'r_brow') + (('l_eye', 'r_eye') if dark else ())
  bridge = np.maximum(np.abs(y + 0.09) - 0.015, np.abs(x) - 0.08)
  arms = np.maximum(
    np.abs(y + 0.1) - 0.015,
    np.maximum(0.3 - np.abs(x), np.abs(x) - face.width + 0.02),
  )
  painting.paint(np.minimum(bridge, arms), frame_colour, part='eye_g')
  for _, side, near in _sides(face):
    shape = _box if face.glasses == 2 else _ellipse
    centre = side * 0.195 * near
    lens = shape(x, y, centre, -0.07, 0.14 * near, 0.105)
    painting.paint(
      lens, (0.08, 0.08, 0.1) if dark else (0.85, 0.92, 0.95),
      0.92 if dark else 0.18, part='eye_g', erase=erase,
    )  # fmt: skip
    painting.paint(np.abs(lens) - 0.016, frame_colour, part='eye_g', erase=erase)


def _paint_hat(painting, face, x, y) -> None:
  width = face.width + 0.06 + 0.1 * face.hair_volume
  if face.hat == 1:  # brim all round
    crown = np.maximum(_ellipse(x, y, 0, -0.4, width * 0.9, 0.42), y + 0.3)
    brim = _ellipse(x, y, 0, -0.34, width * 1.55, 0.09)
    field = np.minimum(crown, brim)
  elif face.hat == 2:  # beanie
    field = np.maximum(_ellipse(x, y, 0, -0.28, width, 0.46), y + 0.26)
  else:  # cap, peak to the side of the turn
    crown = np.maximum(_ellipse(x, y, 0, -0.32, width, 0.42), y + 0.32)
    peak = _ellipse(x, y, 0.2 * face.yaw, -0.32, width * 0.85, 0.085)
    field = np.minimum(crown, peak)
  painting.paint(field, face.hat_colour, part='hat', erase='all')
  band = np.maximum(field, np.abs(y + 0.36) - 0.04)
  painting.paint(band, face.hat_colour * 0.55)


def paint_face(
  face: Face, image_size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Mask]]:
  """Paints a face.

  Args:
    face: what to paint.
    image_size: (H, W) in pixels.
    rng: for the background and the noise.

  Returns:
    The picture (H, W, 3) uint8, and the mask (H, W) bool of every part that is
    visible. The skin lies under eyes, brows, nose, mouth and glasses, as in
    the published masks; other overlaps belong to the part in front.
  """
  x, y = _grid(image_size)
  # An edge goes from 0 to 1 over one pixel.
  painting = _Painting(
    np.zeros((3, *image_size), np.float32),
    np.zeros((len(PARTS), *image_size), bool),
    face.scale * image_size[0] / 2,
  )
  _paint_background(painting, face, x, y, rng)
  body_x = (x - face.shift[0]) / face.scale
  body_y = (y - face.shift[1]) / face.scale
  cos, sin = np.float32(np.cos(face.roll)), np.float32(np.sin(face.roll))
  x, y = cos * body_x + sin * body_y, cos * body_y - sin * body_x
  body_x = 0.7 * body_x + 0.3 * x

  _paint_body(painting, face, body_x, body_y)
  outline = _hair_outline(face, x, y)
  if not face.bald:
    # The neck and what hangs on it lie in front of the hair behind them.
    neck = painting.masks[[_PART['neck'], _PART['neck_l']]]
    in_front = neck.any(0)
    kept = painting.image[:, in_front]
    _paint_hair_behind(painting, face, x, y, outline)
    painting.image[:, in_front] = kept
    painting.masks[[_PART['neck'], _PART['neck_l']]] = neck
    painting.masks[_PART['hair']] &= ~in_front
  wide, high = face.width + 0.2, face.height + 0.15
  around_head = _near(painting, x, y, -wide, wide, -high, high)
  head = _paint_head(*around_head, face)
  _paint_features(*around_head, face, head)
  if face.earrings:
    _paint_earrings(painting, face, x, y)
  if not face.bald:
    _paint_hair_before(painting, face, x, y, outline)
  if face.glasses:
    _paint_glasses(painting, face, x, y)
  if face.hat:
    _paint_hat(painting, face, x, y)

  image = painting.image
  slope = face.light[0] * x + face.light[1] * y
  image *= (1 + face.light[2] * slope) * face.gain
  image *= face.tint.astype(np.float32)[:, None, None]
  image = np.ascontiguousarray(image.transpose(1, 2, 0))
  if face.blur > 0.05:
    radius = face.blur * image_size[0] / 64
    small = Image.fromarray(_to_bytes(image))
    small = small.filter(ImageFilter.GaussianBlur(radius))
    image = np.asarray(small, np.float32) / 255
  image += face.noise * rng.standard_normal(image.shape, np.float32)
  seen = painting.masks.any((1, 2))
  masks = {PARTS[i]: painting.masks[i] for i in np.flatnonzero(seen)}
  return _to_bytes(image), masks


def _to_bytes(image: np.ndarray) -> np.ndarray:
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def render_faces(
  target: Path | str,
  num: int,
  image_size: tuple[int, int],
  seed: int,
  *,
  progress: bool = True,
) -> Path:
  """Writes `num` faces as files in the CelebAMask-HQ layout.

  A killed rendering continues where it stopped: a face's picture is written
  after its masks, `procedural.json` says at last that all is complete.

  Args:
    target: folder to write; created if missing.
    num: number of faces.
    image_size: (H, W) of pictures and masks.
    seed: seed of the set.
    progress: whether to report progress.

  Returns:
    `target`.

  Raises:
    DataError: `target` holds a set made with other settings, or other files;
      it cannot be written; a setting is out of range.
  """
  target = Path(target)
  if num < 1 or min(image_size) < 16 or seed < 0:
    raise DataError(
      f'cannot render {num} faces of size {tuple(image_size)} with seed {seed}:'
      ' need at least one face, 16 pixels a side, and a seed of at least 0'
    )
  settings = {
    'what': 'procedural faces, a stand-in for CelebAMask-HQ',
    'renderer_version': RENDERER_VERSION,
    'num': num,
    'image_size': list(image_size),
    'seed': seed,
  }
  images = image_path(target, 0).parent

  def fill():
    images.mkdir(exist_ok=True)
    for index in range(0, num, IDS_PER_FOLDER):
      part_path(target, index, PARTS[0]).parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in progress_bar(range(num), num, 'rendering faces', progress):
      face, attributes = draw_face(seed, index)
      rows.append(attributes)
      if not image_path(target, index).exists():
        _write_face(target, index, face, image_size, seed)
    write_atomically(target / ATTRIBUTE_FILE, _attribute_table(rows).encode())

  layout = (images.name, MASK_FOLDER, ATTRIBUTE_FILE)
  return stand_in.render(target, settings, layout, fill)


def _write_face(target, index, face, image_size, seed) -> None:
  # The third number keeps this stream apart from that of `draw_face`.
  rng = np.random.default_rng((seed, index, 1))
  image, masks = paint_face(face, image_size, rng)
  # One path made of text, not a dozen made of objects: a tenth of a face's time.
  stem = str(part_path(target, index, ''))[: -len('.png')]
  for part, mask in masks.items():
    # A file object for each of a dozen files would take longer than their painting.
    file = os.open(f'{stem}{part}.png', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.write(file, _encode_mask(mask))
    os.close(file)
  jpeg = io.BytesIO()
  Image.fromarray(image).save(jpeg, 'JPEG', quality=face.jpeg_quality)
  write_atomically(image_path(target, index), jpeg.getvalue())


def _encode_mask(mask: Mask) -> bytes:
  """Grey PNG, 255 in the mask; three times as fast as Pillow's for small ones.

  A dozen of them make up half the time of a face.
  """
  rows, columns = mask.shape
  # Each row starts with its filter type: 0, none.
  pixels = np.zeros((rows, columns + 1), np.uint8)
  pixels[:, 1:] = mask * np.uint8(255)
  header = struct.pack('>IIBBBBB', columns, rows, 8, 0, 0, 0, 0)
  content = b'\x89PNG\r\n\x1a\n'
  for kind, data in (
    (b'IHDR', header),
    (b'IDAT', zlib.compress(pixels.data, 1)),
    (b'IEND', b''),
  ):
    checksum = struct.pack('>I', zlib.crc32(kind + data))
    content += struct.pack('>I', len(data)) + kind + data + checksum
  return content


def _attribute_table(rows: list[dict[str, bool]]) -> str:
  lines = [str(len(rows)), ' '.join(ATTRIBUTES)]
  for index, row in enumerate(rows):
    values = ('1' if row.get(name, False) else '-1' for name in ATTRIBUTES)
    lines.append(f'{index}.jpg  ' + ' '.join(values))
  return '\n'.join(lines) + '\n'
