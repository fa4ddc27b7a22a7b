"""One shared backbone with a head per task, as pure functions."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from msp.errors import UserError
from msp.models import convolution
from msp.models.heads import READERS, ClassificationHead, DenseHead
from msp.models.normalization import NORMS
from msp.models.resnet import DEPTHS, EXPANSION, ResNet, Stream
from msp.models.resnet import streams as backbone_streams

HEADS = ('dense', 'classification')
DTYPES = ('float32', 'bfloat16', 'float64')

PyTree = Any


class MultiTask(NamedTuple):
  """A backbone and the heads that share its features; holds no arrays."""

  backbone: nn.Module
  heads: dict[str, nn.Module]


def build(
  heads: Mapping[str, tuple[str, int]],
  *,
  depth: int = 50,
  blocks: Sequence[int] | None = None,
  block: str | None = None,
  width: float = 1.0,
  norm: str = 'batch',
  dtype: str = 'float32',
  head_features: int = 256,
  dropout: float = 1.0,
  convolution_implementation: str = 'auto',
) -> MultiTask:
  """Builds the network of a list of tasks.

  Args:
    heads: kind of head ('dense' or 'classification') and number of outputs of
      each task.
    depth: 18, 50 or 101, the ResNet-D whose blocks are used.
    blocks: number of blocks of each of the four stages, instead of those that
      belong to `depth`.
    block: 'basic' or 'bottleneck', instead of the kind that belongs to `depth`.
    width: multiplier of the widths of the backbone, > 0.
    norm: 'batch' or 'group'.
    dtype: of the computation, 'float32', 'bfloat16' or 'float64' (needs
      `jax_enable_x64`). Parameters and norm statistics are float32.
    head_features: channels of the branches of a dense head; a classification
      head has a fourth and an eighth of them. A multiple of 8.
    dropout: multiplier of the heads' dropout rates, in [0, 1].
    convolution_implementation: form of the backbone's convolutions, see
      `msp.models.convolution.resolve`. The heads, which stand in `lax.cond`, are always
      built with 'auto'.

  Returns:
    The modules. Their parameters come from `init`.

  Raises:
    UserError: for a value that is not one of the choices.
  """
  _choose('depth', depth, tuple(DEPTHS))
  depth_block, depth_blocks = DEPTHS[depth]
  block = depth_block if block is None else block
  blocks = depth_blocks if blocks is None else tuple(blocks)
  _choose('block', block, tuple(EXPANSION))
  _choose('norm', norm, NORMS)
  _choose('dtype', dtype, DTYPES)
  _require(
    dtype != 'float64' or jax.config.jax_enable_x64,
    'model dtype is float64: set the environment variable JAX_ENABLE_X64=1, or JAX '
    'computes in float32',
  )
  for task, (kind, _) in heads.items():
    _choose(f'head of task {task}', kind, HEADS)
  _require(
    len(blocks) == 4 and all(isinstance(n, int) and n >= 1 for n in blocks),
    f'model blocks is {blocks}: give four numbers of at least 1, one per stage',
  )
  _require(0 < width < math.inf, f'model width is {width}: give a number above 0')
  _require(
    head_features > 0 and head_features % 8 == 0,
    f'model head_features is {head_features}: give a multiple of 8',
  )
  _require(
    0 <= dropout <= 1,
    f'model dropout is {dropout}: give a number from 0 to 1, the factor on the '
    'published rates',
  )
  backbone = ResNet(
    kind=block,
    blocks=blocks,
    width=width,
    norm=norm,
    dtype=jnp.dtype(dtype),
    implementation=convolution.resolve(convolution_implementation),
  )
  shared = {
    'features': head_features,
    'dropout': dropout,
    'dtype': jnp.dtype(dtype),
    'implementation': convolution.resolve('auto'),
  }
  modules = {}
  for task, (kind, outputs) in heads.items():
    if kind == 'dense':
      modules[task] = DenseHead(outputs, norm=norm, **shared)
    else:
      modules[task] = ClassificationHead(outputs, **shared)
  return MultiTask(backbone, modules)


def _choose(what: str, value: Any, choices: Sequence[Any]) -> None:
  listed = ', '.join(map(str, choices))
  _require(value in choices, f'unknown model {what} {value!r}: choose one of {listed}')


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _task_key(key: jax.Array, task: str) -> jax.Array:
  """Folds a task's name in: a task draws alike whatever tasks stand beside."""
  return jax.random.fold_in(key, zlib.crc32(task.encode()))


def init(
  model: MultiTask, key: jax.Array, image_shape: Sequence[int]
) -> tuple[PyTree, PyTree]:
  """Draws the parameters.

  The parameters of the backbone and of each head depend on the key and the
  task's name, not on the list of tasks. Works under `jax.jit` and
  `jax.eval_shape`; no forward pass is executed.

  Args:
    model: from `build`.
    key: random key.
    image_shape: (H, W, 3) of the images.

  Returns:
    params: {'backbone': …, 'heads': {task: …}}, float32.
    batch_stats: running statistics in a tree of the same two levels, {} where a
      module has none.
  """
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  backbone = model.backbone.lazy_init(key, image, train=False)
  features = jax.eval_shape(
    lambda v, x: model.backbone.apply(v, x, train=False), backbone, image
  )
  heads = {
    task: head.lazy_init(_task_key(key, task), features, train=False)
    for task, head in model.heads.items()
  }
  params, batch_stats = (
    {
      'backbone': backbone.get(collection, {}),
      'heads': {task: head.get(collection, {}) for task, head in heads.items()},
    }
    for collection in ('params', 'batch_stats')
  )
  return params, batch_stats


def positions(model: MultiTask, image_shape: Sequence[int]) -> dict[str, int]:
  """Output positions (rows · columns) of every kernel; of a dense layer 1.

  Args:
    model: from `build`.
    image_shape: (H, W, 3) of the images.

  Returns:
    Path of the kernel, such as 'backbone/layer1_0/conv1/kernel' -> positions. The
    FLOPs of one image are 2 · kernel size · positions.
  """

  def run(module, x):
    variables = module.lazy_init(jax.random.key(0), x, train=False)
    result, state = module.apply(
      variables,
      x,
      train=False,
      capture_intermediates=lambda m, _: isinstance(m, convolution.Conv | nn.Dense),
      mutable=['intermediates'],
    )
    return result, state['intermediates']

  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = lambda module, x: jax.eval_shape(lambda y: run(module, y), x)
  features, captured = shapes(model.backbone, image)
  outputs = {'backbone': captured}
  for task, head in model.heads.items():
    outputs[f'heads/{task}'] = shapes(head, features)[1]
  found = {}
  for parent, captured in outputs.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(captured):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      layer = name.split('/__call__')[0]
      found[f'{parent}/{layer}/kernel'] = math.prod(leaf.shape[1:-1])
  return found


def streams(model: MultiTask) -> list[Stream]:
  """Which parameters share their channels, from the stem to the heads.

  Args:
    model: from `build`.

  Returns:
    The streams of the backbone, the last one also read by the heads. Paths are those
    of the parameters: 'backbone/layer1_0/conv1/kernel', of norms their module's.
  """
  at = lambda names, end: tuple(f'backbone/{name}{end}' for name in names)
  found = [
    Stream(s.name, at(s.writers, '/kernel'), at(s.norms, ''), at(s.readers, '/kernel'))
    for s in backbone_streams(model.backbone.kind, model.backbone.blocks)
  ]
  readers = tuple(
    f'heads/{task}/{reader}/kernel'
    for task, head in model.heads.items()
    for reader in READERS['dense' if isinstance(head, DenseHead) else 'classification']
  )
  found[-1] = found[-1]._replace(readers=found[-1].readers + readers)
  return found


def apply(
  model: MultiTask,
  params: PyTree,
  batch_stats: PyTree,
  image: jax.Array,
  *,
  train: bool,
  key: jax.Array | None = None,
  present: Mapping[str, bool | jax.Array] | None = None,
) -> tuple[dict[str, jax.Array], PyTree]:
  """Evaluates the backbone once and the heads of the tasks that are present.

  A head whose flag is a traced array stands in a `lax.cond`: absent, it is not
  computed, its logits are zeros, its statistics stay, and its parameters get
  exactly zero gradients. A flag that is a Python bool is resolved when tracing:
  an absent task has no entry in the outputs and costs nothing to compile.

  Args:
    model: from `build`.
    params: from `init`; entries other than 'backbone' and 'heads' are ignored.
    batch_stats: from `init` or an earlier call.
    image: (B, H, W, 3), values in [0, 1].
    train: normalise by the statistics of the batch, update the running ones,
      drop units. False: running statistics, no dropout.
    key: random key of the dropout, needed in training unless its rates are 0.
    present: a flag () for each task, or None for all tasks.

  Returns:
    outputs: logits of each task, float32: (B, ⌈H/8⌉, ⌈W/8⌉, outputs) of a dense
      head, (B, outputs) of a classification head.
    batch_stats: with updated running averages if `train`, else as given.
  """
  features, backbone_stats = _run(
    model.backbone,
    params['backbone'],
    batch_stats['backbone'],
    image,
    train,
    None,
  )
  outputs, head_stats = {}, dict(batch_stats['heads'])
  for task, head in model.heads.items():
    flag = True if present is None else present[task]
    task_key = None if key is None else _task_key(key, task)

    def compute(operands, head=head, task_key=task_key):
      return _run(head, *operands, train, task_key)

    operands = params['heads'][task], head_stats[task], features
    if isinstance(flag, bool):
      if flag:
        outputs[task], head_stats[task] = compute(operands)
      continue
    logits = jax.eval_shape(compute, operands)[0]

    def skip(operands, logits=logits):
      return jnp.zeros(logits.shape, logits.dtype), operands[1]

    outputs[task], head_stats[task] = lax.cond(flag, compute, skip, operands)
  return outputs, {'backbone': backbone_stats, 'heads': head_stats}


def _run(
  module: nn.Module,
  params: PyTree,
  batch_stats: PyTree,
  x: jax.Array,
  train: bool,
  key: jax.Array | None,
) -> tuple[jax.Array, PyTree]:
  """Applies one module; returns its output and its running statistics."""
  y, updated = module.apply(
    {'params': params, 'batch_stats': batch_stats},
    x,
    train=train,
    rngs=None if key is None else {'dropout': key},
    mutable=['batch_stats'] if train else [],
  )
  return y, updated.get('batch_stats', batch_stats)
