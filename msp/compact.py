"""Physical removal of dead channels: a smaller network with the same outputs."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msp import groups as gr
from msp.errors import UserError
from msp.models import multitask
from msp.models.normalization import EPSILON
from msp.models.resnet import Shape, Stream
from msp.workdir import write as write_file

PyTree = Any


class Compact(NamedTuple):
  """A compacted network.

  Attributes:
    model: with the remaining widths.
    params: θ.
    batch_stats: running statistics.
  """

  model: multitask.MultiTask
  params: PyTree
  batch_stats: PyTree


def compact(model: multitask.MultiTask, params: PyTree, batch_stats: PyTree) -> Compact:
  """Removes the channels that change no output, with all that writes or reads them.

  A channel of a stream (see `multitask.streams`) is removed from its writers, their
  norms and its readers if nothing reads it (every reader's input channel is exactly
  zero), or if it is silent (every writer's output channel is exactly zero and the
  norm behind it leaves nothing above 0, which the ReLU removes). Removing one can make
  others unread or silent, so this goes on until nothing changes. A channel that some
  readers of a residual sum need and others do not stays, and the others gather what
  they read. A stream inside a block keeps one channel, needed or not.

  With group normalisation channels of one group share their statistics, so none is
  removed; readers still gather.

  Outputs in evaluation mode are those of the given network, up to the order of sums.
  The result is a network as any other: it can be trained on and compacted again.

  Args:
    model: the network; may be compact already.
    params: θ, with exact zeros.
    batch_stats: running statistics; decide what a norm leaves of a zero.

  Returns:
    The compact network, as NumPy arrays.

  Raises:
    UserError: a stream that every output passes through is dead; names it. A model of
      another kind.
  """
  if not isinstance(model, multitask.MultiTask):
    raise UserError(
      f'compact knows the streams of a msp.models.multitask.MultiTask only, and this '
      f'is a {type(model).__name__}; msp.groups.alive works with any network'
    )
  params, batch_stats = jax.device_get((params, batch_stats))
  leaves, stats = gr.by_path(params), gr.by_path(batch_stats)
  streams = multitask.streams(model)
  gathers = {f'backbone/{n}/kernel': c for n, c in model.backbone.shape.gathers}
  sizes = {s.name: leaves[s.writers[0]].shape[-1] for s in streams}
  # The channel of its stream that each input row of a kernel multiplies.
  rows = {
    reader: np.array(gathers.get(reader, range(sizes[s.name])))
    for s in streams
    for reader in s.readers
  }
  graph = _Graph(streams, leaves, stats, rows)
  kept = {name: np.ones(size, bool) for name, size in sizes.items()}
  if model.backbone.norm == 'batch':
    _remove(graph, kept)
  present = {name: mask.copy() for name, mask in kept.items()}
  for mask in present.values():
    mask[0] |= not mask.any()

  new_gathers = {}
  inputs, outputs = {}, {}
  for s in streams:
    channels = np.flatnonzero(present[s.name])
    outputs |= dict.fromkeys(s.writers, channels)
    for reader in s.readers:
      # Heads have no gather: they read all there is.
      whole = reader.startswith('heads/')
      used = np.flatnonzero(present[s.name] if whole else graph.reads(reader, kept))
      position = np.searchsorted(channels, rows[reader][used])
      inputs[reader] = used
      if not len(used):  # a convolution has to have an input; it multiplies it by 0
        position = np.zeros(1, int)
      if len(position) < len(channels):
        name = reader.removeprefix('backbone/').removesuffix('/kernel')
        new_gathers[name] = tuple(map(int, position))
  new, new_stats = dict(leaves), dict(stats)
  for path in inputs.keys() | outputs.keys():
    kernel = leaves[path]
    if path in inputs:
      kernel = kernel[..., inputs[path], :]
    if path in outputs:
      kernel = kernel[..., outputs[path]]
    if not kernel.shape[-2]:
      kernel = np.zeros((*kernel.shape[:-2], 1, kernel.shape[-1]), kernel.dtype)
    new[path] = kernel
  for s in streams:
    for norm in s.norms:
      for tree, names in ((new, ('scale', 'bias')), (new_stats, ('mean', 'var'))):
        for path in (f'{norm}/{name}' for name in names):
          if path in tree:
            tree[path] = tree[path][present[s.name]]
  shape = Shape(
    tuple((s.name, int(present[s.name].sum())) for s in streams),
    tuple(sorted(new_gathers.items())),
  )
  return Compact(
    model._replace(backbone=model.backbone.clone(shape=shape)),
    gr.replace(params, new),
    gr.replace(batch_stats, new_stats),
  )


class _Graph(NamedTuple):
  """Who writes and reads what; arrays of the network that is compacted."""

  streams: list[Stream]
  leaves: dict[str, np.ndarray]
  stats: dict[str, np.ndarray]
  rows: dict[str, np.ndarray]

  def _stream(self, kernel, end):
    return next((s for s in self.streams if kernel in getattr(s, end)), None)

  def _alive(self, kernel, kept):
    """Non-zero entries between channels that are kept, as (rows, outputs), bool."""
    alive = (self.leaves[kernel] != 0).any((0, 1))
    source, target = self._stream(kernel, 'readers'), self._stream(kernel, 'writers')
    if source is not None:
      alive = alive & kept[source.name][self.rows[kernel]][:, None]
    return alive if target is None else alive & kept[target.name]

  def reads(self, kernel, kept):
    """Which input rows of a kernel matter, (rows,) bool."""
    return self._alive(kernel, kept).any(1)

  def writes(self, kernel, norm, kept):
    """Which channels it and its norm make other than a constant ≤ 0, (O,) bool."""
    _, constant = _affine(norm, self.leaves, self.stats)
    return self._alive(kernel, kept).any(0) | (constant > 0)


def _affine(norm, leaves, stats):
  """A batch norm in evaluation mode as x · gain + constant."""
  gain = leaves[f'{norm}/scale'] / np.sqrt(stats[f'{norm}/var'] + np.float32(EPSILON))
  return gain, leaves[f'{norm}/bias'] - stats[f'{norm}/mean'] * gain


def _remove(graph, kept):
  """Lowers `kept` until every channel is both written and read."""
  before = -1
  while (now := sum(int(mask.sum()) for mask in kept.values())) != before:
    before = now
    for s in graph.streams:
      used, written = np.zeros_like(kept[s.name]), np.zeros_like(kept[s.name])
      for reader in s.readers:
        used[graph.rows[reader][graph.reads(reader, kept)]] = True
      for writer, norm in zip(s.writers, s.norms, strict=True):
        written |= graph.writes(writer, norm, kept)
      kept[s.name] &= used & written
  for s in graph.streams:
    # Around the inside of a block there is the shortcut.
    if not kept[s.name].any() and '/conv' not in s.name:
      raise UserError(
        f'all channels of {s.name} are dead: no output depends on the image any more. '
        f'Train with a survival floor (sparsity.min_alive of at least 1) or a smaller λ'
      )


def fold(network: Compact) -> Compact:
  """Folds batch normalisation into the convolutions before it, for deployment.

  With g = γ/√(σ² + 1e-5): kernel ← kernel · g, and what remains of the norm is a bias
  β − μ g. The same outputs in evaluation mode; the result is not meant to be trained.

  Args:
    network: with batch normalisation.

  Returns:
    The network without running statistics.

  Raises:
    UserError: group normalisation depends on the picture and cannot be folded.
  """
  model, params, batch_stats = network
  if model.backbone.norm != 'batch':
    raise UserError(
      f'{model.backbone.norm} normalisation cannot be folded into convolutions: its '
      f'statistics are those of the picture'
    )
  leaves, stats = gr.by_path(params), gr.by_path(batch_stats)
  folded = {}
  for path in leaves:
    norm, _, leaf = path.rpartition('/')
    if leaf != 'scale':
      continue
    parent, _, name = norm.rpartition('/')
    kernel = f'{parent}/{name.replace("norm", "conv")}/kernel'
    gain, folded[f'{norm}/bias'] = _affine(norm, leaves, stats)
    folded[kernel] = leaves[kernel] * gain
  return Compact(
    _fold_model(model),
    _without(gr.replace(params, folded), 'scale'),
    {'backbone': {}, 'heads': {task: {} for task in model.heads}},
  )


def _fold_model(model):
  """The same modules with a bias in place of every norm."""
  fold_one = lambda module: (
    module.clone(norm='folded') if hasattr(module, 'norm') else module
  )
  heads = {task: fold_one(head) for task, head in model.heads.items()}
  return multitask.MultiTask(fold_one(model.backbone), heads)


def _without(tree, name):
  """A nested dict without the entries of one name."""
  return {
    key: _without(value, name) if isinstance(value, Mapping) else value
    for key, value in tree.items()
    if key != name
  }


def difference(a: Compact, b: Compact, images: np.ndarray) -> float:
  """Largest difference of the outputs in evaluation mode, relative to their scale.

  Both compute in float32 at least: half precision rounds sums of fewer channels
  otherwise, which says nothing about the arrays.

  Args:
    a: one network, its outputs give the scale: the largest magnitude of each.
    b: another one.
    images: (B, H, W, 3) in [0, 1].

  Returns:
    It; NaN if an output is not finite.
  """

  def wide(module):
    return module.clone(dtype=jnp.promote_types(module.dtype, jnp.float32))

  def outputs(network):
    backbone, heads = network.model
    model = multitask.MultiTask(wide(backbone), jax.tree.map(wide, heads))
    run = jax.jit(lambda p, s, x: multitask.apply(model, p, s, x, train=False)[0])
    # By default an accelerator rounds the factors of float32 products.
    with jax.default_matmul_precision('highest'):
      return jax.device_get(run(network.params, network.batch_stats, images))

  one, other = outputs(a), outputs(b)
  scale = lambda x: np.maximum(np.abs(x).max(), np.finfo(x.dtype).tiny)
  return float(
    np.max([np.abs(x - other[name]).max() / scale(x) for name, x in one.items()])
  )


def write(folder: Path, result: Compact) -> None:
  """Writes a compact network, one file: its arrays, and its shape as JSON.

  Args:
    folder: created; an earlier network in it is replaced.
    result: from `compact`.

  Raises:
    UserError: the folder cannot be written to.
  """
  shape = result.model.backbone.shape
  arrays = {
    # NumPy's files have no bfloat16.
    f'{kind}/{path}': np.asarray(leaf, np.promote_types(leaf.dtype, np.float32))
    for kind, tree in (('params', result.params), ('batch_stats', result.batch_stats))
    for path, leaf in gr.by_path(tree).items()
  }
  content = encode(shape) | {'folded': result.model.backbone.norm == 'folded'}
  arrays['shape'] = np.array(json.dumps(content))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / FILE, lambda f: np.savez(f, **arrays))
  except OSError as e:
    raise UserError(f'cannot write to {folder}: {e.strerror}') from None


FILE = 'network.npz'
NO_SHAPE = (KeyError, TypeError, ValueError, AttributeError)


def encode(shape: Shape) -> dict:
  """A shape as data for JSON."""
  return {'widths': dict(shape.widths), 'gathers': dict(shape.gathers)}


def decode(content: dict) -> Shape:
  """The shape that `encode` gave; one of `NO_SHAPE` if it is none."""
  gathers = content['gathers'].items()
  return Shape(
    tuple((name, int(width)) for name, width in content['widths'].items()),
    tuple((name, tuple(map(int, channels))) for name, channels in gathers),
  )


def read_arrays(folder: Path) -> tuple[Shape, dict[str, np.ndarray], bool]:
  """Reads what `write` wrote, of whatever network.

  Args:
    folder: of the compact network.

  Returns:
    The shape of the backbone, arrays by 'params/…' and 'batch_stats/…', and whether
    the norms are folded.

  Raises:
    UserError: there is none, or it is damaged.
  """
  try:
    with (folder / FILE).open('rb') as file, np.load(file) as content:
      arrays = dict(content)
    shape = json.loads(str(arrays.pop('shape')))
    for name, array in arrays.items():
      if array.dtype.kind != 'f':
        raise ValueError(f'{name} is {array.dtype}')
    return decode(shape), arrays, shape['folded']
  except (OSError, EOFError, zipfile.BadZipFile, *NO_SHAPE) as e:
    raise UserError(
      f'no compact network in {folder} ({e}); make one with --mode compact'
    ) from None


def read(folder: Path, model: multitask.MultiTask) -> Compact:
  """Reads what `write` wrote.

  Args:
    folder: of the compact network.
    model: the network it was before, from the same configuration.

  Returns:
    The compact network, its arrays on the host.

  Raises:
    UserError: there is none, it is damaged, or of another network.
  """
  shape, arrays, folded = read_arrays(folder)
  model = model._replace(backbone=model.backbone.clone(shape=shape))
  if folded:
    model = _fold_model(model)
  trees = []
  abstract = jax.eval_shape(
    lambda key: multitask.init(model, key, (32, 32, 3)), jax.random.key(0)
  )
  for kind, tree in zip(('params', 'batch_stats'), abstract, strict=True):
    wanted = {f'{kind}/{path}': leaf.shape for path, leaf in gr.by_path(tree).items()}
    for path, needed in wanted.items():
      if path not in arrays or arrays[path].shape != needed:
        raise UserError(
          f'compact network in {folder} is of another network: {path} is '
          f'{arrays[path].shape if path in arrays else "absent"}, not {needed}'
        )
    trees.append(gr.replace(tree, {p: arrays[f'{kind}/{p}'] for p in gr.by_path(tree)}))
  return Compact(model, *trees)
