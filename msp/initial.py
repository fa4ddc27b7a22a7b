"""Initial weights from elsewhere: a compact network, a run, a PyTorch backbone."""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from msp import compact
from msp import groups as gr
from msp.checkpoint import Checkpoints
from msp.errors import UserError
from msp.models import multitask
from msp.models.resnet import WHOLE, Shape
from msp.workdir import write as write_file

PyTree = Any

# Where a PyTorch ResNet keeps its stem: CSAIL's and Less is More's names, timm's.
_STEM = {
  'conv1': 'stem_conv1', 'bn1': 'stem_norm1', 'conv2': 'stem_conv2',
  'bn2': 'stem_norm2', 'conv3': 'stem_conv3', 'bn3': 'stem_norm3',
}  # fmt: skip
_TIMM_STEM = {
  'conv1.0': 'stem_conv1', 'conv1.1': 'stem_norm1', 'conv1.3': 'stem_conv2',
  'conv1.4': 'stem_norm2', 'conv1.6': 'stem_conv3', 'bn1': 'stem_norm3',
}  # fmt: skip
_LEAVES = {
  'weight': ('params', 'scale'),
  'bias': ('params', 'bias'),
  'running_mean': ('batch_stats', 'mean'),
  'running_var': ('batch_stats', 'var'),
}


class Initial(NamedTuple):
  """Arrays to start from.

  Attributes:
    source: what they were read from.
    shape: of the backbone they belong to.
    params: parameters by path; empty means that nothing is given.
    batch_stats: running statistics by path.
    skipped: names in the source that no backbone has.
    reshaped: path -> the shape in the source, of arrays that had their axes permuted.
  """

  source: str = ''
  shape: Shape = WHOLE
  params: Mapping[str, np.ndarray] = {}
  batch_stats: Mapping[str, np.ndarray] = {}
  skipped: tuple[str, ...] = ()
  reshaped: Mapping[str, tuple[int, ...]] = {}


_SHAPE = 'backbone.json'


class Fitting(NamedTuple):
  """What of some initial weights is used.

  Attributes:
    params: parameters by path.
    batch_stats: running statistics by path.
    fresh: paths of leaves that stay as initialised.
    unused: names of arrays without a place.
    reshaped: path -> the shape in the source, where it was another one.
  """

  params: Mapping[str, np.ndarray] = {}
  batch_stats: Mapping[str, np.ndarray] = {}
  fresh: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  reshaped: Mapping[str, tuple[int, ...]] = {}


def read(source: str, model: multitask.MultiTask, data_set: str) -> Initial:
  """Reads initial weights, whatever wrote them.

  Args:
    source: '' for none; a folder that --mode compact wrote, whose widths and gathers
      come along; the work directory of a run (its latest checkpoint); or a state dict
      of a PyTorch ResNet-D, `.safetensors` or `.npz`, by the names of timm or of
      Less is More. All widths are those of the arrays, whatever `model.width` says.
      timm's average pool before the shortcuts is left out: its weights are a start,
      not the same function.
    model: the network of the configuration, for its stages and kind of block.
    data_set: its name; a run on another one gives its backbone only.

  Returns:
    The arrays by our paths.

  Raises:
    UserError: there is nothing of that kind, it is damaged, or of another depth.
  """
  if not source:
    return Initial()
  path = Path(source).expanduser()
  if (path / compact.FILE).exists():
    shape, arrays, folded = compact.read_arrays(path)
    if folded:
      raise UserError(
        f'{source} has its norms folded and cannot be trained; use {path.parent}'
      )
    split = lambda kind: {
      name.removeprefix(f'{kind}/'): x
      for name, x in arrays.items()
      if name.startswith(f'{kind}/')
    }
    initial = Initial(source, shape, split('params'), split('batch_stats'))
    return _of_data_set(initial, _made_from(path), data_set)
  if (path / 'checkpoints').is_dir():
    return _read_run(source, model, data_set)
  if path.suffix in ('.npz', '.safetensors'):
    return _from_torch(source, _read_file(path), model)
  reason = 'no compact network, work directory, .npz or .safetensors file'
  if not path.exists():
    reason = 'there is no such file or folder'
  elif path.suffix in ('.pth', '.pt', '.bin'):
    reason = 'save its state dict as .safetensors or .npz'
  raise UserError(f'initial={source}: {reason}')


def tasks(source: str, data_set: str) -> list[str]:
  """The tasks of a data set that initial weights have heads for.

  Args:
    source: as in `read`: a compact network, or a run.
    data_set: its name; a run on another one has none of its tasks, nor has a compact
      network inside of it.

  Raises:
    UserError: there is none, or it is of another kind.
  """
  path = Path(source).expanduser()
  if source and (path / compact.FILE).exists():
    if _made_from(path) not in (None, data_set):
      return []
    arrays = compact.read_arrays(path)[1]
    heads = [name.split('/')[2] for name in arrays if name.startswith('params/heads/')]
    return list(dict.fromkeys(heads))
  own, names = _learned(source)
  return names if own == data_set else []


def _learned(source):
  """The data set and the tasks of a run."""
  try:
    config = json.loads((Path(source).expanduser() / 'config.json').read_text())
    return config['data']['name'], list(config['tasks'])
  except (OSError, ValueError, KeyError, TypeError):
    raise UserError(
      f'initial={source or "(empty)"}: needs to be the work directory of a run, with '
      f'its config.json, or what --mode compact wrote'
    ) from None


def _made_from(path):
  """The data set of the run that a compact network lies in, None elsewhere."""
  inside = (path.parent / 'config.json').exists()
  return _learned(path.parent)[0] if inside else None


def _of_data_set(initial, own, data_set):
  """Without its heads, if they have learned another data set."""
  if own in (None, data_set):
    return initial
  is_backbone = lambda name: name.startswith('backbone/')
  pick = lambda arrays: {name: x for name, x in arrays.items() if is_backbone(name)}
  return initial._replace(
    params=pick(initial.params),
    batch_stats=pick(initial.batch_stats),
    skipped=tuple(name for name in initial.params if not is_backbone(name)),
  )


def _read_run(source, model, data_set):
  path = Path(source).expanduser()
  with Checkpoints(path, read_only=True) as checkpoints:
    latest = checkpoints.newest(checkpoints.restore_any)
  if latest is None:
    raise UserError(f'initial={source}: no complete checkpoint in it')
  state = latest[1]
  params = jax.device_get(gr.by_path(state['params']))
  stats = jax.device_get(gr.by_path(state['batch_stats']))
  began = kept_shape(path) or WHOLE
  shape = Shape(_widths(params, model), began.gathers)
  return _of_data_set(
    Initial(source, shape, params, stats), _learned(source)[0], data_set
  )


def keep_shape(workdir: Path, shape: Shape) -> None:
  """Writes a run's shape to its directory, which then needs its source no more."""
  content = json.dumps(compact.encode(shape)).encode()
  write_file(workdir / _SHAPE, content)


def write_report(workdir: Path, used: Fitting) -> Path:
  """Writes initial.json: what is taken over or reshaped, is fresh, has no use.

  Args:
    workdir: of the run.
    used: from `fitting`.

  Returns:
    Path of the file: names of leaves, the shapes of those taken over, and of those
    reshaped the shape in the source.
  """
  taken = {**used.params, **used.batch_stats}
  content = {
    'taken over': {path: list(x.shape) for path, x in sorted(taken.items())},
    'reshaped, from': {path: list(x) for path, x in sorted(used.reshaped.items())},
    'fresh': list(used.fresh),
    'of no use': list(used.unused),
  }
  path = workdir / 'initial.json'
  write_file(path, json.dumps(content, indent=2).encode())
  return path


def kept_shape(workdir: Path) -> Shape | None:
  """The shape that `keep_shape` wrote, None if there is none.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / _SHAPE
  try:
    return compact.decode(json.loads(path.read_text())) if path.exists() else None
  except (OSError, *compact.NO_SHAPE) as e:
    raise UserError(f'cannot read {path}: {e}; start the run again') from None


def _read_file(path):
  try:
    if path.suffix == '.safetensors':
      return load_file(path)
    with path.open('rb') as file, np.load(file) as content:
      return {name: np.asarray(x) for name, x in content.items()}
  except (
    OSError,
    ValueError,
    TypeError,  # of a single array, not an archive
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
    AttributeError,  # of safetensors, for float8, which NumPy does not have
  ) as e:
    raise UserError(f'initial={path}: not readable ({e})') from None


def _from_torch(source, arrays, model):
  """A PyTorch backbone's arrays by our names."""
  first = next((k for k in arrays if k.endswith('layer1.0.conv1.weight')), None)
  if first is None:
    raise UserError(
      f'initial={source}: no ResNet in it (nothing ends in layer1.0.conv1.weight)'
    )
  prefix = first.removesuffix('layer1.0.conv1.weight')
  stem = _TIMM_STEM if f'{prefix}conv1.0.weight' in arrays else _STEM
  found, skipped, reshaped = {'params': {}, 'batch_stats': {}}, [], {}
  for name, array in arrays.items():
    module, _, leaf = name.removeprefix(prefix).rpartition('.')
    ours = _module(module, array, stem) if name.startswith(prefix) else None
    if ours is None or leaf not in _LEAVES:
      if module.startswith('layer') and leaf != 'num_batches_tracked':
        raise UserError(f'initial={source}: {name} has no counterpart in a ResNet-D')
      if leaf != 'num_batches_tracked':
        skipped.append(name)
      continue
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise UserError(
        f'initial={source}: {name} is {array.dtype}; weights have to be floating-point'
      )
    kind, ours_leaf = _LEAVES[leaf]
    if array.ndim == 4:
      reshaped[f'backbone/{ours}/kernel'] = array.shape
      ours_leaf, array = 'kernel', array.transpose(2, 3, 1, 0)
    found[kind][f'backbone/{ours}/{ours_leaf}'] = array.astype(np.float32)
  shape = Shape(_widths(found['params'], model))
  return Initial(source, shape, **found, skipped=tuple(skipped), reshaped=reshaped)


def _module(module, array, stem):
  """Our name of a PyTorch module of a ResNet; None if it has no counterpart."""
  if module in stem:
    return stem[module]
  match = re.fullmatch(r'layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.\d)', module)
  if not match:
    return None
  stage, block, kind, number = match.groups()
  if kind is None:  # the numbers in `downsample` depend on a pooling before them
    inside = 'shortcut_conv' if array.ndim == 4 else 'shortcut_norm'
  else:
    inside = f'{"conv" if kind == "conv" else "norm"}{number}'
  return f'layer{stage}_{block}/{inside}'


def _widths(params, model):
  """(stream, channels) of arrays, by path; streams they lack are left to `fitting`."""
  return tuple(
    (s.name, params[s.writers[0]].shape[-1])
    for s in multitask.streams(model)
    if s.writers[0] in params
  )


def fitting(initial: Initial, params: PyTree, batch_stats: PyTree) -> Fitting:
  """The arrays that take the place of fresh ones; a head fits as a whole or not.

  Args:
    initial: from `read`.
    params: θ of the model, or its shapes.
    batch_stats: running statistics, likewise.

  Returns:
    The arrays, and what they leave.

  Raises:
    UserError: the backbone is another one; says which leaves differ.
  """
  if not initial.source:
    return Fitting()
  shapes = lambda arrays: {path: tuple(x.shape) for path, x in arrays.items()}
  have = shapes(initial.params) | shapes(initial.batch_stats)
  want = shapes(gr.by_path(params)) | shapes(gr.by_path(batch_stats))
  differ = [
    path for path in have.keys() | want.keys() if have.get(path) != want.get(path)
  ]
  other = [path for path in differ if path.startswith('backbone/')]
  if other:
    first = '; '.join(
      f'{path} {have.get(path, "absent")}, this model {want.get(path, "absent")}'
      for path in sorted(other)[:3]
    )
    raise UserError(
      f'initial={initial.source} holds another backbone; {len(other)} leaves differ: '
      f'{first}{"; …" if len(other) > 3 else ""}. Set model.depth, blocks, block and '
      f'norm to its own'
    )
  # A 'log_vars/male' goes with 'heads/male/…', and may be missing: a compact network
  # has none.
  task = lambda path: path.split('/')[1]
  unfit = {task(path) for path in differ if path.startswith('heads/')}
  fits = lambda path: (
    path not in differ and (path.startswith('backbone/') or task(path) not in unfit)
  )
  pick = lambda arrays, tree: {
    path: arrays[path] for path in gr.by_path(tree) if fits(path)
  }
  return Fitting(
    pick(initial.params, params),
    pick(initial.batch_stats, batch_stats),
    tuple(sorted(path for path in want if not fits(path))),
    tuple(sorted([*initial.skipped, *(path for path in have if not fits(path))])),
    initial.reshaped,
  )
