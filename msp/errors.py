"""What the environment and its user can do wrong, in one line each."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
  """A mistake of the user's: one line that says what, where and what to do.

  `launch.py` prints the line and exits with 1, as it does for `data.DataError`, a
  number that is not finite, a device out of memory, and what the operating system
  refuses. Every other exception keeps its traceback, because it is a defect of this
  program.
  """


def refuse_url(name: str, path: str) -> None:
  """Raises UserError on gs://…, which would be a local folder called 'gs:'."""
  if '://' in path:
    raise UserError(
      f'{name} is {path}; it has to be a folder of this machine: mount the bucket (for '
      f'Cloud Storage with gcsfuse) and name the folder'
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Gives an `OSError` its file: the system names it on opening, not on writing."""
  try:
    yield
  except OSError as e:
    e.filename = e.filename or str(path)
    raise


def words(error: Exception) -> str:
  """Its message without line breaks."""
  return ' '.join(str(error).split())


def own_words(error: Exception) -> str:
  """What code of the user's own raised, and where: it has no traceback then."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  if isinstance(error, SyntaxError):
    return f'{error.filename}, line {error.lineno}: {error.msg}'
  return f'{type(error).__name__}: {words(error)} ({place.filename}:{place.lineno})'


def one_line(error: OSError) -> str:
  """FILE: what the operating system says; other libraries' own words as they are."""
  if error.errno is None:
    return f'{type(error).__name__}: {words(error)}'
  place = f'{error.filename}: ' if error.filename else ''
  return f'{place}{error.strerror}'
