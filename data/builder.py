"""What the TFDS builders share: one configuration per image size, ArrayRecord.

Records hold exact bytes: pictures and label maps already resized, no value of a
label made up by that. The builders import no TensorFlow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(kw_only=True)
class SizeConfig(tfds.core.BuilderConfig):
  """A data set at one image size, (H, W)."""

  image_size: tuple[int, int]


def size_config(image_size: tuple[int, int]) -> SizeConfig:
  """The configuration of one image size, named HxW."""
  rows, columns = image_size
  return SizeConfig(name=f'{rows}x{columns}', image_size=(rows, columns))


def last_fraction(names: Sequence[str], fraction: float) -> np.ndarray:
  """Which train examples are held out: the last `fraction` in stored order.

  A part of the scenes as good as any, where that order is of hashes of the names.

  Args:
    names: of the train examples, in stored order.
    fraction: of the train examples, in [0, 1).

  Returns:
    (len(names),) bool.
  """
  count = len(names)
  return np.arange(count) >= count - round(fraction * count)


class FileBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A builder over published files, for any size: `config=size_config(...)`.

  A subclass provides `scan(source)` (entries by split), `read(entry, size)`
  (one record) and `label_features(size)`. Examples are written in the order of
  `scan`, which the split and hold-out rules rely on.
  """

  scan: Callable
  read: Callable
  # Set by `prepare`: records that are already decoded, by split.
  decoded: Mapping[str, Iterator[dict]] | None = None

  def label_features(
    self, image_size: tuple[int, int]
  ) -> dict[str, tfds.features.FeatureConnector]:
    """TFDS features of a record beside `image` and `name`."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    image_size = self.builder_config.image_size
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(
            shape=(*image_size, 3), dtype=np.uint8, encoding='bytes'
          ),
          'name': tfds.features.Text(),
        }
        | self.label_features(image_size)
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    if self.decoded is not None:
      records = self.decoded
    else:
      size = self.builder_config.image_size
      records = {
        split: (self.read(entry, size) for entry in entries)
        for split, entries in self.scan(Path(dl_manager.manual_dir)).items()
      }
    return {split: self._generate_examples(found) for split, found in records.items()}

  def _generate_examples(self, records: Iterator[dict]):
    yield from enumerate(records)
