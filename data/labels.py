"""What a task's label is; shared by all data sets."""

from typing import NamedTuple


class Label(NamedTuple):
  """Kind and classes of one task's label.

  kind `segmentation`: (H, W) class indices, 255 = ignore; `edges`: (H, W) in
  {0, 1}, -1 = ignore; `attribute`: one of {0, 1} for the image.
  """

  kind: str
  classes: tuple[str, ...]
