"""Builds a data set once: published files -> checked, resized -> ArrayRecord.

Two stages below a temporary folder next to the final one:
  1. every image and label is decoded, checked and resized, in blocks of
     `BLOCK` images; a finished block is a file. A killed run continues with
     the first block that is missing. All unusable files are found before
     anything is built.
  2. TFDS writes the blocks as ArrayRecord. The result is read back, completed
     by `prepared.json` and renamed to its final place; a kill before that
     leaves nothing there, and the blocks for the next run.
The temporary folder needs the room of the uncompressed data set.
"""

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from data import (
  camvid,
  celebamask_hq,
  nyud_mt,
  procedural_faces,
  procedural_rooms,
  stand_in,
)
from data.builder import SizeConfig, size_config
from data.errors import DataError
from data.files import exclusive, write_atomically
from data.labels import Label
from data.progress import progress_bar

logger = logging.getLogger(__name__)

BLOCK = 128
STATED = 2048
SUMMARY = 'prepared.json'
BAD_FILES_IN_MESSAGE = 3

DATA_SETS: dict[str, ModuleType] = {
  'celebamask_hq': celebamask_hq,
  'camvid': camvid,
  'nyud_mt': nyud_mt,
}
# What a module of a data set has; `examples/own_data.py` explains each.
_PARTS = (
  'LABELS', 'TERMS', 'BUILDER', 'scan', 'files', 'read', 'flip', 'task_labels',
  'hold_out_mask',
)  # fmt: skip
_RENDERERS: dict[str, Callable[..., Path]] = {
  'celebamask_hq': procedural_faces.render_faces,
  'nyud_mt': procedural_rooms.render_rooms,
}


def data_set(name: str) -> ModuleType:
  """The module of a data set, of this package or one of your own.

  Args:
    name: a key of `DATA_SETS`, or the name of a module that can be imported
      ('examples.own_data').

  Returns:
    A module with `LABELS`, `TERMS`, `BUILDER` and the functions `scan`, `files`,
    `read`, `flip`, `task_labels` and `hold_out_mask`.

  Raises:
    DataError: there is none, or it lacks one of these.
  """
  if name in DATA_SETS:
    return DATA_SETS[name]
  try:
    module = importlib.import_module(name)
  except Exception as error:  # of a module of one's own anything
    reason = f'{error}'
    if not isinstance(error, ImportError | TypeError | ValueError):
      reason = f'{type(error).__name__}: {error}'
    raise DataError(
      f'unknown data set {name!r}, known: {", ".join(DATA_SETS)}, and your own by the'
      f' name of a module ({reason})'
    ) from None
  missing = [part for part in _PARTS if not hasattr(module, part)]
  if missing:
    raise DataError(
      f'the module {name} is no data set: it has no {", ".join(missing)}; see'
      ' examples/own_data.py'
    )
  return module


def labels(name: str) -> dict[str, Label]:
  """Every task of a data set.

  Args:
    name: of the data set; see `data_set`.

  Returns:
    Task name -> kind and classes of its label.

  Raises:
    DataError: unknown data set.
  """
  return dict(data_set(name).LABELS)


def terms(name: str) -> str:
  """What its authors allow a data set's pictures to be used for, in words.

  Raises:
    DataError: unknown data set.
  """
  return data_set(name).TERMS


def render(
  name: str,
  target: Path | str,
  num: int,
  image_size: tuple[int, int],
  seed: int,
  *,
  progress: bool = True,
) -> Path:
  """Writes the procedural stand-in of a data set, in its layout of files.

  A killed rendering continues where it stopped.

  Args:
    name: `celebamask_hq` or `nyud_mt`.
    target: folder to write; created if missing.
    num: number of pictures.
    image_size: (H, W) of pictures and labels.
    seed: seed of the set.
    progress: whether to report progress.

  Returns:
    `target`.

  Raises:
    DataError: the data set has no stand-in; `target` holds a set made with other
      settings, or other files; it cannot be written; a setting is out of range.
  """
  data_set(name)
  if name not in _RENDERERS:
    raise DataError(
      f'{name} has no procedural stand-in, only {", ".join(_RENDERERS)} have; set'
      ' data.procedural_images to 0 and data.source to the published files'
    )
  return _RENDERERS[name](target, num, image_size, seed, progress=progress)


def prepared_folder(
  name: str, prepared: Path | str, image_size: tuple[int, int]
) -> Path:
  """Where the prepared data set is: `prepared`/name/HxW/version."""
  version = str(data_set(name).BUILDER.VERSION)
  return Path(prepared) / name / size_config(image_size).name / version


def prepare(
  name: str,
  source: Path | str,
  prepared: Path | str,
  image_size: tuple[int, int],
  *,
  skip_corrupt: bool = False,
  progress: bool = True,
) -> Path:
  """Builds a data set from its published files, or verifies the one built.

  A killed run continues where it stopped when the same call is made again. While
  another process builds the same one, this one waits.

  Args:
    name: of the data set; see `data_set`.
    source: folder that holds the published files.
    prepared: folder under which data sets are built.
    image_size: (H, W) in pixels to resize to.
    skip_corrupt: leave unusable images out instead of stopping.
    progress: whether to report progress.

  Returns:
    The folder of the prepared data set.

  Raises:
    DataError: the source is missing or has unusable files; the existing
      prepared set is damaged, of another version or of another source; nothing
      can be written.
  """
  source = Path(source)
  final = prepared_folder(name, prepared, image_size)
  work = final.parent.with_name(final.parent.name + '.building')
  try:
    if final.exists():
      _verify(name, final, source)
      logger.info('%s: found and verified', final)
      shutil.rmtree(work, ignore_errors=True)  # of a run killed at its very end
      return final
    for other in final.parent.glob('*'):
      raise DataError(
        f'{other} was built by another version of this program (now'
        f' {final.name}); ' + _rebuild(other)
      )
    splits = data_set(name).scan(source)
    for split, entries in splits.items():
      for entry in entries:
        try:
          entry.name.encode()
        except UnicodeEncodeError:
          raise DataError(
            f'the name of {entry.name!a} in {source} is not UTF-8; rename the file'
          ) from None
      if not entries:
        raise DataError(
          f'{source} holds {sum(map(len, splits.values()))} images, too few:'
          f' the split {split} is empty'
        )
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work):
      if final.exists():  # by the process that this one waited for
        _verify(name, final, source)
        return final
      preparation = _Preparation(
        name, source, work, size_config(image_size), splits, progress
      )
      left_out = _left_out(preparation.check(), splits, work, skip_corrupt)
      built = preparation.build(left_out)
      _verify(name, built, source)
      final.parent.mkdir(exist_ok=True)
      os.replace(built, final)
      shutil.rmtree(work)
  except OSError as error:
    raise DataError(f'cannot prepare {name} in {work}: {error}') from error
  return final


def read_summary(folder: Path) -> dict:
  """What `prepare` noted about a prepared data set.

  Returns:
    `source`, its `images` (their number), `contents` and `times` (see `_state`),
    `stand_in` (settings of the renderer, or None for real data), `left_out`, and
    `names` by split, in stored order.

  Raises:
    DataError: the note is missing or unreadable.
  """
  try:
    summary = json.loads((folder / SUMMARY).read_text())
    for split, names in summary['names'].items():
      if not all(isinstance(name, str) for name in names):
        raise ValueError(f'the names of {split} are no texts')
    return summary
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise damaged(folder, error) from None


def damaged(folder: Path, error: Exception) -> DataError:
  """What to raise where a prepared data set cannot be read.

  Args:
    folder: of the prepared data set.
    error: whatever TFDS, ArrayRecord or protobuf raise on a damaged file.
  """
  reason = str(error).splitlines()[0] if str(error) else type(error).__name__
  return DataError(
    f'prepared data set {folder} is damaged ({reason}); ' + _rebuild(folder)
  )


def _rebuild(folder: Path) -> str:
  return f'rebuild it: rm -r {folder}, then run the same command again'


class _Bad(NamedTuple):
  """An image that cannot be used."""

  split: str
  name: str
  problem: str


class _Preparation:
  """One run of `prepare`: the two stages and what they share."""

  def __init__(
    self,
    name: str,
    source: Path,
    work: Path,
    config: SizeConfig,
    splits: dict[str, list],
    progress: bool,
  ):
    self.name = name
    self.source = source
    self.work = work
    self.config = config
    self.splits = splits
    self.progress = progress
    self.total = sum(map(len, splits.values()))
    # Before anything is read: what changes from now on is another state.
    self.state = _state(name, source, splits)

  def check(self) -> list[_Bad]:
    """Decodes all images into blocks; returns those that cannot be used."""
    bad = []
    what = f'checking and resizing {self.name}'
    with ThreadPoolExecutor(os.cpu_count()) as pool:

      def checked():
        for split in self.splits:
          for entries in self._blocks(split):
            path = self._block_path(entries)
            if path.exists():
              yield from entries
              continue
            results = []
            for result in pool.map(self._try_to_read, entries):
              results.append(result)
              yield result
            problems = [
              _Bad(split, entry.name, str(result))
              for entry, result in zip(entries, results, strict=True)
              if isinstance(result, DataError)
            ]
            bad.extend(problems)
            if not problems:
              _write_block(path, results)

      for _ in progress_bar(checked(), self.total, what, self.progress):
        pass
    return bad

  def build(self, left_out: set[tuple[str, str]]) -> Path:
    """Writes the blocks as ArrayRecord; returns the folder."""
    shutil.rmtree(self.work / 'tfds', ignore_errors=True)
    with _quiet_tfds():
      builder = data_set(self.name).BUILDER(
        data_dir=self.work / 'tfds',
        config=self.config,
        file_format='array_record',
      )
      builder.decoded = {
        split: progress_bar(
          self._records(split, left_out),
          len(entries),
          f'writing {split}',
          self.progress,
        )
        for split, entries in self.splits.items()
      }
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=self.source)
      )
    summary = {
      'source': str(self.source.resolve()),
      **self.state,
      'left_out': sorted(f'{split}/{name}' for split, name in left_out),
      'stand_in': stand_in.read(self.source),
      'names': {
        split: [e.name for e in entries if (split, e.name) not in left_out]
        for split, entries in self.splits.items()
      },
    }
    folder = Path(builder.data_dir)
    write_atomically(folder / SUMMARY, json.dumps(summary).encode())
    return folder

  def _blocks(self, split: str) -> Iterator[Sequence]:
    entries = self.splits[split]
    for start in range(0, len(entries), BLOCK):
      yield entries[start : start + BLOCK]

  def _read(self, entry) -> dict:
    return data_set(self.name).read(entry, self.config.image_size)

  def _try_to_read(self, entry) -> dict | DataError:
    try:
      return self._read(entry)
    except DataError as error:
      return error

  def _records(self, split: str, left_out: set[tuple[str, str]]) -> Iterator[dict]:
    for entries in self._blocks(split):
      path = self._block_path(entries)
      if path.exists():
        try:
          with path.open('rb') as file, np.load(file) as block:
            columns = dict(block)
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
          raise DataError(
            f'{path} is damaged ({error}); remove it and run the same command again'
          ) from None
        for row, entry in enumerate(entries):
          record = {key: column[row] for key, column in columns.items()}
          yield record | {'name': entry.name}
      else:  # It holds an unusable image.
        for entry in entries:
          if (split, entry.name) not in left_out:
            yield self._read(entry)

  def _block_path(self, entries: Sequence) -> Path:
    """A block's file, named by what it is made from."""
    digest = hashlib.sha256()
    for entry in entries:
      digest.update(repr(entry).encode())
      for path, *stamp in _stamps(self.name, entry):
        digest.update(repr((path.name, *stamp)).encode())
    return self.work / f'{digest.hexdigest()[:32]}.npz'


def _write_block(path: Path, records: list[dict]) -> None:
  content = io.BytesIO()
  keys = [key for key in records[0] if key != 'name']
  np.savez(content, **{k: np.stack([r[k] for r in records]) for k in keys})
  write_atomically(path, content.getvalue())


def _left_out(
  bad: list[_Bad], splits: dict[str, list], work: Path, skip_corrupt: bool
) -> set[tuple[str, str]]:
  """(split, name) of the images to leave out; raises unless that is wanted."""
  if not bad:
    return set()
  total = sum(map(len, splits.values()))
  shown = '; '.join(image.problem for image in bad[:BAD_FILES_IN_MESSAGE])
  if len(bad) > BAD_FILES_IN_MESSAGE:
    listing = work.with_suffix('.bad_files.txt')
    lines = ''.join(image.problem + '\n' for image in bad)
    write_atomically(listing, lines.encode())
    shown += f'; ... all of them are listed in {listing}'
  message = f'{len(bad)} of {total} images cannot be used: {shown}'
  if not skip_corrupt:
    raise DataError(f'{message}; repair them, or leave them out with --skip_corrupt')
  left_out = {(image.split, image.name) for image in bad}
  for split, entries in splits.items():
    if all((split, entry.name) in left_out for entry in entries):
      raise DataError(f'{message}; nothing remains of the split {split}')
  logger.warning('left out: %s', message)
  return left_out


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Keeps TFDS from telling about places that will be renamed."""
  tfds.disable_progress_bar()
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.FATAL)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl_logging.set_verbosity(verbosity)


def _verify(name: str, folder: Path, source: Path) -> None:
  """Raises DataError if `folder` is not made from `source`, or visibly damaged.

  Of each split the first and the last record are read; the others when they are used.
  """
  summary = read_summary(folder)
  try:
    counts = {split: len(names) for split, names in summary['names'].items()}
    builder = tfds.builder_from_directory(folder)
    found = {k: v.num_examples for k, v in builder.info.splits.items()}
    if found != counts:
      raise ValueError(f'{found} examples instead of {counts}')
    for split in counts:
      records = builder.as_data_source(split)
      for index in (0, counts[split] - 1):
        stored = records[index]['name'].decode()
        if stored != summary['names'][split][index]:
          raise ValueError(f'{split} record {index} is {stored}')
  except Exception as error:
    raise damaged(folder, error) from error
  # The source may have been removed once the data set was built.
  try:
    splits = data_set(name).scan(source)
  except DataError as error:
    logger.warning('using what was prepared in %s, because %s', folder, error)
    return
  state = _state(name, source, splits)
  if stand_in.read(source) != summary['stand_in'] or any(
    state[key] != summary[key] for key in ('images', 'contents') if key in summary
  ):
    made_from = summary.get('source', 'another place')
    raise DataError(
      f'prepared data set {folder} was built from {summary["images"]} images in'
      f' {made_from}, and {source} with its {state["images"]} has other files or sizes;'
      ' name the folder it was built from, or ' + _rebuild(folder)
    )
  if state['times'] != summary.get('times', state['times']):
    logger.warning(
      'files in %s have been written since %s was built; if they changed, %s',
      source,
      folder,
      _rebuild(folder),
    )


def _state(name: str, source: Path, splits: dict[str, list]) -> dict[str, int | str]:
  """What tells a source from another one, without reading its files.

  Names of all images; of the files of up to `STATED` of them, evenly spread, their
  paths and sizes (`contents`) and when they were written (`times`): on a network disk
  to ask for all of them takes minutes.
  """
  contents, times = hashlib.sha256(), hashlib.sha256()
  total = sum(map(len, splits.values()))
  for split, entries in splits.items():
    contents.update(repr((split, [entry.name for entry in entries])).encode())
    for entry in entries[:: -(-total // STATED)]:
      for path, size, time in _stamps(name, entry):
        contents.update(repr((os.path.relpath(path, source), size)).encode())
        times.update(str(time).encode())
  return {
    'images': total,
    'contents': contents.hexdigest(),
    'times': times.hexdigest(),
  }


def _stamps(name: str, entry) -> Iterator[tuple[Path, int, int]]:
  """(path, bytes, modification time in ns) of the files of an image that exist."""
  for file in data_set(name).files(entry):
    with contextlib.suppress(FileNotFoundError):
      status = file.stat()
      yield file, status.st_size, status.st_mtime_ns
