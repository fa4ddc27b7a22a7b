"""Runs an experiment.

python launch.py --config configs/celeba_meta.py:procedural,tiny --workdir runs/first
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Configuration file, with options after a colon.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is kept; runs/<name of the configuration> if unset.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'train', ['train', 'evaluate', 'report', 'prepare'], 'What to do.'
)
_SKIP_CORRUPT = flags.DEFINE_bool(
  'skip_corrupt', False, 'Leave unreadable files out of the data set, and count them.'
)


def main(argv: list[str]) -> None:
  """Calls the function of the mode; a user's mistake ends in one line."""
  # After the flags, so that --help and a mistyped flag answer at once.
  import data
  from msp import report, train
  from msp.errors import UserError

  absl_logging.set_verbosity(absl_logging.ERROR)  # orbax and TFDS speak through it
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  for name in ('msp', 'data'):
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
  try:
    if len(argv) > 1:
      raise UserError(f'unknown argument {argv[1]!r}; see --help')
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path('runs') / config.name)
    if _MODE.value == 'prepare':
      path = train.prepare(config, skip_corrupt=_SKIP_CORRUPT.value)
      print(f'prepared: {path}')
    elif _MODE.value == 'report':
      print(f'report: {report.write(workdir)}')
    elif _MODE.value == 'evaluate':
      train.evaluate_run(config, workdir)
      print(f'evaluation: {workdir / "evaluation.json"}')
    else:
      path = train.train(config, workdir, skip_corrupt=_SKIP_CORRUPT.value)
      print(f'report: {path}')
  except (UserError, data.DataError, FloatingPointError) as e:
    sys.exit(f'error: {e}')


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a mistyped configuration field ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError) as e:
    sys.exit(f'error: {" ".join(str(e).split())}')


if __name__ == '__main__':
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=_parse)
