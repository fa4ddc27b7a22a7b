"""Batches of noise: what they hold does not change what is timed."""

from collections.abc import Mapping

import numpy as np

from data import Label


def random_batch(
  labels: Mapping[str, Label], image_size: tuple[int, int], count: int
) -> dict[str, np.ndarray]:
  """A batch as the training streams give it, every label a class.

  Args:
    labels: of segmentation, edges and attributes, by task.
    image_size: (H, W).
    count: B.

  Returns:
    `image` (B, H, W, 3) float32, `valid` (B,) bool; by task (B, H, W) int32, of edges
    float32, and of attributes (B,) int32.
  """
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.random((count, *image_size, 3), np.float32),
    'valid': np.ones(count, bool),
  }
  for task, label in labels.items():
    shape = count if label.kind == 'attribute' else (count, *image_size)
    values = rng.integers(0, max(len(label.classes), 2), shape)
    batch[task] = values.astype(np.float32 if label.kind == 'edges' else np.int32)
  return batch
