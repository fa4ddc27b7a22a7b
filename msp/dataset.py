"""The data set that a configuration names: prepared, opened, and drawn to look at."""

from pathlib import Path

import matplotlib
import numpy as np
from ml_collections import ConfigDict

import data
from msp import figures
from msp import tasks as task_module
from msp import workdir as workdir_module
from msp.errors import UserError, refuse_url

FEWEST = 20  # rendered pictures, so that no split is empty


def prepare(config: ConfigDict, *, skip_corrupt: bool = False) -> Path:
  """Brings the data set into its prepared form, once; checks its settings first.

  Args:
    config: of its fields only `data` and `tasks` count; a stand-in has seed 0.
    skip_corrupt: leave unreadable files out instead of stopping.

  Returns:
    The folder of the prepared data set.

  Raises:
    UserError, data.DataError: what is wrong with the settings or the data.
  """
  check(config)
  make_tasks(config)
  _check_named(config)
  source, prepared = folders(config)
  size = tuple(config.data.image_size)
  if config.data.procedural_images:
    data.render(config.data.name, source, config.data.procedural_images, size, 0)
  return data.prepare(
    config.data.name, source, prepared, size, skip_corrupt=skip_corrupt
  )


def check(config: ConfigDict) -> None:
  """Raises UserError on an impossible size or place of the data; reads nothing."""
  size = config.data.image_size
  if len(size) != 2 or not all(isinstance(n, int) and n >= 16 for n in size):
    raise UserError(
      f'data.image_size is {size}; it has to be two whole numbers, rows and columns, '
      f'of at least 16'
    )
  for field in ('source', 'prepared'):
    refuse_url(f'data.{field}', config.data[field])
  if not config.data.prepared:
    raise UserError('data.prepared is empty; name a folder for the prepared copies')
  number = config.data.procedural_images
  if number and number < FEWEST:
    raise UserError(
      f'data.procedural_images is {number}; train, val and test take at least {FEWEST} '
      f'(0: none are rendered, data.source is real)'
    )


def check_source(config: ConfigDict) -> None:
  """Raises UserError if there is no folder to read the pictures from."""
  _check_named(config)
  source, prepared = folders(config)
  stored = source.is_dir() or (prepared / config.data.name).is_dir()
  if not config.data.procedural_images and not stored:
    raise UserError(
      f'no folder {source}, and no copy of it in {prepared}; set data.source (of a '
      f'sweep sources.{config.data.name}) to where the files of the data set are'
    )


def _check_named(config):
  if not config.data.source:
    raise UserError('data.source is empty; name the folder with the published files')


def contact_sheet(config: ConfigDict) -> Path:
  """Draws a training batch with its flips and missing labels, to look at.

  Args:
    config: of a run whose data set is prepared.

  Returns:
    Path of the picture, beside the prepared data set: each image with its labels.
  """
  tasks = make_tasks(config)
  train_part = splits(config).train
  stream = data.train_iterator(
    train_part,
    config.tasks,
    batch_size=min(figures.PICTURES, len(train_part)),
    seed=config.seed,
    flip=config.data.flip,
    missing=config.data.missing,
  )
  batch = next(stream)
  panels = [
    figures.TaskPanel(name, batch[name], None, task.classes, task.kind)
    for name, task in tasks.items()
  ]
  image = np.round(batch['image'] * 255).astype(np.uint8)
  rows, columns = config.data.image_size
  path = folders(config)[1] / f'{config.data.name}_{rows}x{columns}.png'
  with matplotlib.rc_context(figures.STYLE):
    drawn = figures.predictions(image, panels)
    workdir_module.write(path, lambda f: drawn.savefig(f, format='png'))
  return path


def make_tasks(config: ConfigDict) -> dict[str, task_module.Task]:
  """The tasks of a configuration, by name, with the default forms of their losses."""
  return task_module.make(config.tasks, data.labels(config.data.name))


def splits(config: ConfigDict) -> data.Splits:
  """The parts of a run's data set, which is prepared; see `data.open`."""
  return data.open(
    config.data.name,
    folders(config)[1],
    tuple(config.data.image_size),
    config.data.hold_out,
    train_share=config.data.train_share,
    seed=config.seed,
  )


def folders(config):
  """The folders of the published files and of the prepared copies.

  A stand-in has its own, named by its settings: it is never mixed with real data,
  nor with a stand-in of other settings.
  """
  c = config.data
  prepared = Path(c.prepared).expanduser()
  if not c.procedural_images:
    return Path(c.source).expanduser(), prepared
  rows, columns = c.image_size
  source = Path(f'{c.source}_{c.procedural_images}_{rows}x{columns}')
  return source.expanduser(), prepared / source.name
