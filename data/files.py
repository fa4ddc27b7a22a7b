"""Reading and writing single files: complete or not at all, errors named."""

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.io
from PIL import Image

from data.errors import DataError

logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # of EXIF; from 5 on rows are columns
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
  """Holds a lock file, which the system lets go of when the process ends, however.

  Args:
    path: of the file; its folder exists.
    busy: called if another process holds it. If it returns, this one waits.
  """
  with path.open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      busy()
      fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
      pass
    yield


def exclusive(folder: Path) -> contextlib.AbstractContextManager[None]:
  """Keeps other processes waiting until this one is done with a folder."""
  return locked(
    folder / '.lock',
    lambda: logger.info('waiting for another process that is writing to %s', folder),
  )


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
  """Writes a file so that a kill leaves the old content, if any, or the new one.

  Args:
    path: of the file; its folder exists.
    content: the bytes, or what writes them to an open file.
  """
  temporary = path.with_name(f'.{path.name}.tmp')
  try:
    with temporary.open('wb') as f:
      if callable(content):
        content(f)
      else:
        f.write(content)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  os.replace(temporary, path)


def read_image(
  path: Path, image_size: tuple[int, int], *, upright: bool = False
) -> np.ndarray:
  """Reads a colour picture and resizes it with antialiasing (Lanczos).

  Args:
    path: a file that Pillow can read.
    image_size: (H, W); another aspect ratio is stretched to it.
    upright: whether to turn it as its EXIF says. Not for a picture with label images:
      those lie as the pixels are stored.

  Returns:
    (H, W, 3) uint8.

  Raises:
    DataError: the file is missing, truncated, no image, or has more than 8 bits a
      channel, which would be cut off.
  """
  rows, columns = image_size
  with _open(path) as image:
    if image.mode.startswith(('I', 'F')):
      raise DataError(
        f'unreadable image {path}: mode {image.mode} has more than 8 bits a channel'
      )
    # JPEG only: decode at a half, quarter, ... of the size when at least twice
    # the wanted resolution remains for the antialiased resize, whichever way up.
    image.draft('RGB', (2 * max(image_size), 2 * max(image_size)))
    image = _load(image, path)
    if upright and (orientation := _orientation(image)) in _UPRIGHT:
      image = image.transpose(_UPRIGHT[orientation])
    image = image.convert('RGB')
    if image.size != (columns, rows):
      image = image.resize((columns, rows), Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
  """(h, w) of a picture, from its header; DataError if there is none.

  With `upright` of the picture turned as its EXIF says.
  """
  with _open(path) as image:
    lies = upright and 5 <= _orientation(image) <= 8
    return (image.width, image.height) if lies else (image.height, image.width)


def _orientation(image):
  """As EXIF has it; 1, upright, if that is damaged, which the pixels need not be."""
  try:
    value = image.getexif().get(_ORIENTATION, 1)
  except (SyntaxError, ValueError, TypeError, LookupError, struct.error, OSError):
    return 1
  return value if isinstance(value, int) else 1


def read_label(path: Path) -> np.ndarray:
  """Reads a label image without interpreting its values.

  Returns:
    (h, w) uint8: grey values, or the indices of a palette image.

  Raises:
    DataError: the file is missing, unreadable, or has several channels.
  """
  with _open(path) as image:
    if image.mode not in ('L', 'P', '1'):
      raise DataError(
        f'label image {path} has mode {image.mode}, expected one 8-bit channel'
        ' of class indices; replace the file'
      )
    return np.asarray(_load(image, path)).astype(np.uint8)


def read_mask(path: Path) -> np.ndarray:
  """Reads a black-and-white mask of any image mode, grey or colour.

  Returns:
    (h, w) bool: everything that is not black.

  Raises:
    DataError: the file is missing or unreadable.
  """
  with _open(path) as image:
    return np.asarray(_load(image, path).convert('L')) > 0


def read_array(path: Path, key: str) -> np.ndarray:
  """Reads numbers from a NumPy file, or from a MATLAB file of version 7 or older.

  Args:
    path: a file with the suffix .npy or .mat.
    key: name of the variable in a .mat file.

  Returns:
    The array, of any shape and of any bool, integer or float type.

  Raises:
    DataError: the file is missing, unreadable or pickled, has no such variable, or
      holds something else than real numbers.
  """
  try:
    if path.suffix == '.mat':
      found = scipy.io.loadmat(path, variable_names=[key], appendmat=False)
      array = found.get(key)
    else:
      array = np.load(path, allow_pickle=False)
  except FileNotFoundError:
    raise DataError(f'missing file {path}') from None
  except NotImplementedError:
    raise DataError(
      f'{path} is a MATLAB 7.3 file, which cannot be read; re-save it with'
      " MATLAB's save(..., '-v7')"
    ) from None
  except Exception as error:  # whatever NumPy and SciPy raise on a damaged file
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise DataError(f'unreadable array {path}: {reason}') from None
  if array is None:
    raise DataError(f'{path} has no variable {key!r}; replace the file')
  if not isinstance(array, np.ndarray) or array.dtype.kind not in 'buif':
    what = getattr(array, 'dtype', type(array).__name__)
    raise DataError(f'{path} holds {what}, expected real numbers; replace the file')
  return array


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Nearest-neighbour resize of (h, w, ...) to `size`: no value is made up."""
  rows, columns = (
    ((np.arange(new) + 0.5) * old / new).astype(np.intp)
    for new, old in zip(size, label.shape[:2], strict=True)
  )
  return label[rows[:, None], columns]


def resize_by_maximum(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes (h, w) to `size`: the maximum of the pixels that become one.

  A line of one pixel survives, where the nearest neighbour would break it up. Every
  pixel counts in exactly one when shrinking; enlarging repeats pixels.
  """
  for axis, new in enumerate(size):
    starts = np.arange(new) * label.shape[axis] // new
    # Where two starts are the same, `reduceat` takes the one pixel there.
    label = np.maximum.reduceat(label, starts, axis)
  return label


def _open(path: Path) -> Image.Image:
  try:
    return Image.open(path)
  except FileNotFoundError:
    raise DataError(f'missing file {path}') from None
  # Pillow raises SyntaxError and ValueError, too, on broken or huge PNG chunks.
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise DataError(f'unreadable image {path}: {error}') from None


def _load(image: Image.Image, path: Path) -> Image.Image:
  try:
    image.load()
  except (OSError, SyntaxError, ValueError) as error:
    raise DataError(f'unreadable image {path}: {error}') from None
  return image
