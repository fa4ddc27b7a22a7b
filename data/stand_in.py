"""The marker file of a folder of rendered pictures: its renderer's settings."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from data.errors import DataError
from data.files import exclusive, write_atomically

MARKER = 'procedural.json'


def read(folder: Path) -> dict | None:
  """Settings of the renderer if the folder's files were rendered, else None.

  Raises:
    DataError: the marker is damaged.
  """
  try:
    return {**json.loads((folder / MARKER).read_text())}
  except FileNotFoundError:
    return None
  except (ValueError, TypeError):
    raise DataError(
      f'{folder / MARKER} is not readable as JSON; remove {folder} and render again'
    ) from None


def render(
  folder: Path, settings: dict, layout: Iterable[str], fill: Callable[[], None]
) -> Path:
  """Renders a set once; a killed rendering goes on where `fill` finds it.

  While another process renders the same set, this one waits.

  Args:
    folder: where to; created if missing.
    settings: of the renderer, as JSON would have them.
    layout: names in the folder that only a data set has.
    fill: writes all files that are not there.

  Returns:
    `folder`.

  Raises:
    DataError: it holds a set of other settings, or files that were not rendered; it
      cannot be written.
  """
  try:
    if not is_complete(folder, settings, layout):
      folder.mkdir(parents=True, exist_ok=True)
      with exclusive(folder):
        if not is_complete(folder, settings, layout):
          mark(folder, settings, complete=False)
          fill()
          mark(folder, settings, complete=True)
  except OSError as error:
    raise DataError(f'cannot write {settings["what"]}: {error}') from error
  return folder


def is_complete(folder: Path, settings: dict, layout: Iterable[str]) -> bool:
  """Whether the folder holds the whole set of these settings.

  Args:
    folder: where it is rendered to.
    settings: of the renderer, as JSON would have them.
    layout: names in the folder that only a data set has.

  Raises:
    DataError: it holds a set of other settings, or files that were not rendered.
  """
  found = read(folder)
  if found is None:
    if any((folder / name).exists() for name in layout):
      raise DataError(
        f'{folder} holds a data set that is not procedural (no {MARKER});'
        ' choose another folder'
      )
    return False
  complete = found.pop('complete', False)
  different = sorted(
    key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key)
  )
  if different:
    raise DataError(
      f'{folder} holds a procedural set made with other settings '
      + ', '.join(
        f'({key}: {found.get(key)}, now {settings.get(key)})' for key in different
      )
      + '; remove that folder or choose another'
    )
  return complete


def mark(folder: Path, settings: dict, *, complete: bool) -> None:
  """Writes the marker: before the first file, and again after the last."""
  content = json.dumps(settings | {'complete': complete}, indent=2) + '\n'
  write_atomically(folder / MARKER, content.encode())
