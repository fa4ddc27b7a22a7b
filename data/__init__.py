"""Data sets as batches: the only thing `msp` knows of this package.

A batch is a dict of arrays: `image` (B, H, W, 3) float32 in [0, 1], `valid`
(B,) bool, and one entry per task: `segmentation` kinds (B, H, W) int32 with 255
to be ignored, `edges` kinds (B, H, W) float32 in {0, 1} with -1 to be ignored,
`attribute` kinds (B,) int32 in {0, 1}.
"""

from data.errors import DataError
from data.labels import Label
from data.pipeline import Source, Splits, eval_batches, open, train_iterator
from data.preparation import labels, prepare
from data.procedural_faces import render_faces

__all__ = [
  'DataError',
  'Label',
  'Source',
  'Splits',
  'eval_batches',
  'labels',
  'open',
  'prepare',
  'render_faces',
  'train_iterator',
]
