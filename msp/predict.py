"""Runs an exported network on a folder of pictures.

python -m msp.predict runs/NAME/export photos predictions
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import logging
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax import export as jax_export
from PIL import Image

from data.errors import DataError
from data.files import read_image, read_size, resize_label, write_atomically
from data.progress import progress_bar
from msp.errors import UserError, one_line
from msp.figures import class_colors

logger = logging.getLogger(__name__)

BATCH = 16


def predict_folder(exported: Path, pictures: Path, target: Path) -> tuple[int, int]:
  """Predicts every task for every picture, and writes the answers as files.

  Of PICTURE.jpg: `PICTURE.jpg.TASK.png` in the picture's own size, for segmentation an
  indexed image whose values are class numbers and whose palette shows them, for edges
  the probability · 255, for depth millimetres (16 bits), for normals (n + 1)/2 · 255
  in red, green and blue; probabilities of attributes in `attributes.csv`, a row for
  each picture.

  Args:
    exported: folder with model.stablehlo and model_card.json, from --mode export.
    pictures: folder; what is no readable picture in it is named and skipped.
    target: folder, created.

  Returns:
    How many pictures were predicted, and how many files skipped.

  Raises:
    UserError: no exported network or another program, no folder or no picture in it, or
      `target` cannot be written to or is the same folder.
  """
  try:
    card = json.loads((exported / 'model_card.json').read_text())
    content = (exported / 'model.stablehlo').read_bytes()
    if hashlib.sha256(content).hexdigest() != card['sha256']:
      raise ValueError('model.stablehlo is not the file of its model card')
    network = jax_export.deserialize(bytearray(content))
    kinds = {name: out['kind'] for name, out in card['outputs'].items()}
    classes = {name: out['classes'] for name, out in card['outputs'].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
    raise UserError(
      f'no exported network in {exported} ({e}); make one with --mode export'
    ) from None
  outputs = jax.tree.unflatten(network.out_tree, network.out_avals)
  takes = [(x.ndim, x.dtype) for x in network.in_avals]
  if takes != [(4, np.float32)] or not isinstance(outputs, dict):
    raise UserError(
      f'{exported / "model.stablehlo"} is another program, not one from images to a '
      'dict of predictions; make it with --mode export'
    )
  if kinds.keys() != outputs.keys():
    raise UserError(
      f'{exported / "model_card.json"} is of another network: it names '
      f'{", ".join(kinds)}, the network has {", ".join(outputs)}; export it again'
    )
  if target.resolve() == pictures.resolve():
    raise UserError(f'{target} holds the pictures; name another folder for the answers')
  try:
    files = sorted(path for path in pictures.iterdir() if path.is_file())
    rows, skipped = [], 0
    size = network.in_avals[0].shape[1:3]
    attributes = [name for name, kind in kinds.items() if kind == 'attribute']
    shown = progress_bar(files, len(files), 'predicting')
    for batch in _batches(shown, size):
      good = [(path, image) for path, image in batch if image is not None]
      skipped += len(batch) - len(good)
      if not good:
        continue
      images = np.stack([image for _, image in good]).astype(np.float32) / 255
      predictions = jax.device_get(network.call(images))
      target.mkdir(parents=True, exist_ok=True)
      for i, (path, _) in enumerate(good):
        for name, kind in kinds.items():
          if kind != 'attribute':
            size_of = read_size(path, upright=True)
            content = _png(kind, predictions[name][i], classes[name], size_of)
            write_atomically(target / f'{path.name}.{name}.png', content)
        rows.append([path.name, *(f'{predictions[a][i]:.4f}' for a in attributes)])
    if not rows:
      raise UserError(f'no readable picture among the {len(files)} files in {pictures}')
    if attributes:
      text = io.StringIO()
      csv.writer(text).writerows([['picture', *attributes], *rows])
      # A name that is no UTF-8 stays the bytes that it is.
      content = text.getvalue().encode(errors='surrogateescape')
      write_atomically(target / 'attributes.csv', content)
  except OSError as e:
    raise UserError(one_line(e)) from None
  return len(rows), skipped


def _batches(files, size) -> Iterator[list[tuple[Path, np.ndarray | None]]]:
  """Lists of (path, its picture or None if it is none)."""
  files = iter(files)
  while paths := list(itertools.islice(files, BATCH)):
    batch = []
    for path in paths:
      try:
        batch.append((path, read_image(path, size, upright=True)))
      except DataError as e:
        logger.warning('skipped: %s', e)
        batch.append((path, None))
    yield batch


def _png(kind, prediction, classes, size):
  """A dense prediction as a picture of `size`; see `predict_folder`."""
  scale, number = {'depth': (1000, np.uint16), 'segmentation': (1, np.uint8)}.get(
    kind, (255, np.uint8)
  )
  values = (prediction + 1) / 2 if kind == 'normals' else prediction
  whole = np.round(values * scale).astype(number)
  image = Image.fromarray(resize_label(whole, size))
  if kind == 'segmentation':
    colors = np.array(class_colors(classes)) * 255
    image.putpalette(colors.round().astype(np.uint8).tobytes())
  content = io.BytesIO()
  image.save(content, 'PNG')
  return content.getvalue()


def main() -> None:
  """The command; a user's mistake ends in one line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('exported', type=Path, help='folder that --mode export wrote')
  parser.add_argument('pictures', type=Path, help='folder of pictures')
  parser.add_argument('target', type=Path, help='folder for the predictions')
  arguments = parser.parse_args()
  # Libraries may have set up logging of their own.
  logging.basicConfig(format='%(message)s', level=logging.INFO, force=True)
  logging.getLogger('jax').setLevel(logging.WARNING)
  try:
    count, skipped = predict_folder(**vars(arguments))
  except UserError as e:
    sys.exit(f'error: {e}')
  print(f'{count} pictures predicted, {skipped} files skipped: {arguments.target}')


if __name__ == '__main__':
  main()
