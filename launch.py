"""Runs an experiment.

python launch.py --config configs/celeba_meta.py:procedural,tiny --workdir runs/first
"""

import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Configuration file, with options after a colon; if unset, that of the run in '
  '--workdir.',
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run is kept; runs/<name of the configuration> if unset.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'adapt', 'sweep', 'evaluate', 'compact', 'export', 'report', 'prepare'],
  'What to do.',
)
_SKIP_CORRUPT = flags.DEFINE_bool(
  'skip_corrupt', False, 'Leave unreadable files out of the data set, and count them.'
)


_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'This is one process of several: of a Cloud TPU slice, a Slurm job or another '
  'cluster that jax.distributed recognises. All see --workdir; the first one writes.',
)


def main(argv: list[str]) -> None:
  """Calls the function of the mode; a user's mistake ends in one line."""
  if sys.stderr is None:  # closed, as some daemons have it
    sys.stderr = open(os.devnull, 'w')  # noqa: SIM115
  # After the flags, so that --help and a mistyped flag answer at once.
  if _DISTRIBUTED.value:
    if _MODE.value == 'sweep':
      sys.exit('error: a sweep is one process; start its runs with --distributed')
    if _MODE.value not in ('train', 'adapt', 'evaluate'):
      sys.exit(f'error: --mode {_MODE.value} is one process; start it by itself')
  # JAX looks for every kind of device, and says at length what is not there.
  absl_logging.set_verbosity(absl_logging.WARNING)
  try:
    import jax

    if _DISTRIBUTED.value:
      jax.distributed.initialize()
    jax.devices()
  except (AssertionError, RuntimeError, ValueError) as e:
    reason = ' '.join(str(e).split())
    if _DISTRIBUTED.value:
      sys.exit(f'error: --distributed found no cluster: {reason}')
    asked = ', '.join(f'{k}={v}' for k, v in os.environ.items() if k.startswith('JAX_'))
    sys.exit(f'error: JAX does not start ({asked or "no JAX_… is set"}): {reason}')

  import data
  from configs import common
  from msp import dataset, processes, report, sweep, train, trained
  from msp import workdir as workdir_module
  from msp.errors import UserError, one_line, refuse_url, words
  from msp.experiment import check_fields, check_ranges

  # From here on Ctrl-C is answered, unless a shell has it ignored (in the background).
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  # Orbax and TFDS speak through it, and what they call an error they also raise.
  absl_logging.set_verbosity(absl_logging.FATAL)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  for name in ('msp', 'data'):
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if processes.is_first() else logging.WARNING)
    logger.propagate = False
  try:
    if len(argv) > 1:
      raise UserError(f'unknown argument {argv[1]!r}; see --help')
    refuse_url('--workdir', _WORKDIR.value or '')
    if _MODE.value == 'adapt' and _CONFIG.value and not _CONFIG.value.get('initial'):
      raise UserError(
        '--mode adapt trains on from another run; name it with --config.initial='
      )
    config = _CONFIG.value
    if config is not None:
      file = flags.FLAGS['config'].config_filename
    else:
      kept = Path(_WORKDIR.value).expanduser()
      config, file = workdir_module.configuration(kept), str(kept / 'config.json')
    if 'runs' in config and 'name' not in config:
      raise UserError(f'the sweep of {file} has no name; see configs/sweeps/base.py')
    if _MODE.value != 'report' and 'runs' not in config:
      check_fields(config, common.base(), file)
    workdir = Path(_WORKDIR.value or Path('runs') / config.name).expanduser()
    skip = _SKIP_CORRUPT.value
    if ('runs' in config) != (_MODE.value == 'sweep'):
      raise UserError(
        f'{config.name} is a sweep; start it with --mode sweep'
        if 'runs' in config
        else f'{config.name} is one run; --mode sweep takes a file of configs/sweeps'
      )
    if _MODE.value == 'prepare':
      check_ranges(config)
      path = dataset.prepare(config, skip_corrupt=skip)
      print(f'prepared: {path}\nlook at it: {dataset.contact_sheet(config)}')
    elif _MODE.value == 'report':
      if _CONFIG.value is not None:
        workdir_module.check(workdir, config)
      print(f'report: {report.write(workdir)}')
    elif _MODE.value == 'compact':
      path = trained.compact_run(config, workdir, skip_corrupt=skip)
      print(f'compact: {path}' if path else 'no dead channel: nothing to remove')
    elif _MODE.value == 'export':
      print(f'exported: {trained.export_run(config, workdir, skip_corrupt=skip)}')
    elif _MODE.value == 'evaluate':
      trained.evaluate_run(config, workdir, skip_corrupt=skip)
      print(f'evaluation: {workdir / "evaluation.json"}')
    elif _MODE.value == 'sweep':
      path = sweep.run(config, workdir, skip_corrupt=skip)
      print(f'{(workdir / "table.md").read_text()}\nsweep: {path}')
    else:
      if (
        jax.config.jax_compilation_cache_dir is None and jax.default_backend() != 'cpu'
      ):
        # What takes minutes to compile is there when the run goes on.
        jax.config.update('jax_compilation_cache_dir', str(workdir / 'compiled'))
      start = train.adapt if _MODE.value == 'adapt' else train.train
      path = start(config, workdir, skip_corrupt=skip)
      print(f'report: {path}')
  except (UserError, data.DataError, FloatingPointError) as e:
    sys.exit(f'error: {e}')
  except OSError as e:  # a full disk, a file that has become unreadable
    sys.exit(f'error: {one_line(e)}')
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' in str(e):
      sys.exit(
        f'error: out of memory on {jax.devices()[0].device_kind}: {words(e)[:200]}; '
        f'set model.dtype=bfloat16 or meta.exact=False, or lower train.batch_size, '
        f'data.image_size or model.width'
      )
    if jax.process_count() > 1:
      sys.exit(f'error: another process stopped, see its message: {words(e)[:200]}')
    raise
  except KeyboardInterrupt:
    print('interrupted; the same command goes on from what is saved', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of XLA that are still compiling would crash in an orderly exit.
    os._exit(128 + signal.SIGINT)


# Files whose frames do not tell a user where the mistake is.
_LIBRARY = re.compile(r'[/\\](ml_collections|absl)[/\\]|[/\\]launch\.py$|^<frozen ')


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; a mistyped one, or a mistyped field, ends in one line."""
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      if isinstance(_CONFIG.value, dict):
        sys.exit('error: get_config of the file after --config returns no ConfigDict')
      _CONFIG.value.lock()  # what could not be read says so when it is used
    elif not _WORKDIR.value:
      sys.exit('error: no --config; for example --config configs/celeba_meta.py')
    return rest
  except OSError as e:
    text = ' '.join(str(e).splitlines()[-1].split())
    sys.exit(f'error: cannot read the file after --config: {text}')
  except SyntaxError as e:
    sys.exit(f'error: {e.filename}, line {e.lineno}: {e.msg}')
  except Exception as e:  # a configuration file may raise anything
    cause = e
    while 'Traceback (most recent call last)' in str(cause) and cause.__context__:
      cause = cause.__context__
    text = str(cause).strip() or type(cause).__name__
    text = text.partition('. Currently supported types')[0]
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if not _LIBRARY.search(frame.filename)]
    place = ''
    # What a file says by a ValueError, such as of its options, is for its user.
    if own and not isinstance(cause, ValueError | flags.Error):
      place = f'{own[-1].filename}, line {own[-1].lineno}: '
    close = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', text)
    if "no attribute 'get_config'" in text:
      place, text = '', 'the file after --config has no function get_config'
    elif isinstance(e, flags.UnrecognizedFlagError) and e.flagname[:7] == 'config.':
      text += '; it changes a field of the file after --config, and none is given'
    elif close:
      text = f'the configuration has no field {close[2]!r}; did you mean {close[1]!r}?'
    elif place and not isinstance(cause, ImportError | NameError):
      text = f'{type(cause).__name__}: {text}'
    elif isinstance(cause, LookupError | AttributeError):
      text = (
        f'the configuration has no such field: {text}; a flag changes what the file '
        f'has, and adds nothing'
      )
    sys.exit(f'error: {place}{" ".join(text.split())}')


if __name__ == '__main__':
  # Libraries that are half imported would answer with a page of frames.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  app.run(main, flags_parser=_parse)
