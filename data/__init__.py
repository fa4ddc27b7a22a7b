"""Data sets as batches: the only thing `msp` knows of this package.

A batch is a dict of arrays: `image` (B, H, W, 3) float32 in [0, 1], `valid` (B,)
bool, and one entry per task. A value of each kind says that there is no label:

  kind            shape           type       values                   no label
  `segmentation`  (B, H, W)       int32      classes                  255
  `edges`         (B, H, W)       float32    0, 1                     -1
  `depth`         (B, H, W)       float32    metres, above 0          0
  `normals`       (B, H, W, 3)    float32    unit vectors             (0, 0, 0)
  `attribute`     (B,)            int32      0, 1                     255
"""

from data.errors import DataError
from data.labels import NO_LABEL, Label
from data.pipeline import Source, Splits, eval_batches, open, train_iterator
from data.preparation import labels, prepare, render, terms
from data.procedural_faces import render_faces

__all__ = [
  'NO_LABEL',
  'DataError',
  'Label',
  'Source',
  'Splits',
  'eval_batches',
  'labels',
  'open',
  'prepare',
  'render',
  'render_faces',
  'terms',
  'train_iterator',
]
