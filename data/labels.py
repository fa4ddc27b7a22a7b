"""What a task's label is; shared by all data sets."""

from typing import NamedTuple

# The value that says that there is no label, by kind. At `attribute`, one label for
# the whole image, it occurs only where `train_iterator` leaves labels out.
NO_LABEL = {
  'segmentation': 255,
  'edges': -1,
  'depth': 0,
  'normals': 0,
  'attribute': 255,
}


class Label(NamedTuple):
  """Kind and classes of one task's label.

  kind `segmentation`: (H, W) class indices, 255 = no label; `edges`: (H, W) in
  {0, 1}, -1 = no label; `depth`: (H, W) metres, 0 = no label; `normals`: (H, W, 3)
  unit vectors, (0, 0, 0) = no label; `attribute`: one of {0, 1} for the image,
  255 = no label.
  """

  kind: str
  classes: tuple[str, ...]
