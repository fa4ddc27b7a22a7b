"""A trained network as one file that needs JAX alone to run: serialised StableHLO."""

import hashlib
import logging
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax import export as jax_export

from msp.compact import Compact
from msp.errors import UserError
from msp.models import multitask
from msp.tasks import Task

logger = logging.getLogger(__name__)

PLATFORMS = ('cpu', 'cuda', 'tpu')


def predictor(
  network: Compact, tasks: Mapping[str, Task], image_shape: tuple[int, int, int]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """The function that is exported, its weights constants.

  Args:
    network: any, dense or compact.
    tasks: the tasks, by name.
    image_shape: (H, W, 3).

  Returns:
    (B, H, W, 3) float32 in [0, 1] -> {task: class map (B, H, W) int32; probability or
    depth (B, H, W), normals (B, H, W, 3), or probability (B,), float32}.
  """
  model, params, batch_stats = network
  # XLA's own convolutions: the file is to run on every platform.
  as_lax = lambda module: module.clone(implementation='lax')
  heads = {task: as_lax(head) for task, head in model.heads.items()}
  model = multitask.MultiTask(as_lax(model.backbone), heads)

  def predict(images):
    outputs, _ = multitask.apply(model, params, batch_stats, images, train=False)
    shape = (images.shape[0], *image_shape[:2])
    return {name: task.predict(outputs[name], shape) for name, task in tasks.items()}

  return predict


def serialize(predict: Callable, image_shape: tuple[int, int, int]) -> bytes:
  """Serialised StableHLO of a function of images, for any number of them.

  Args:
    predict: from `predictor`.
    image_shape: (H, W, 3).

  Returns:
    The content of a file for all of `PLATFORMS`, or, with a warning, for those that
    this build can export for; `jax.export.deserialize` reads it.

  Raises:
    UserError: it can for none of them; says why.
  """
  (batch,) = jax_export.symbolic_shape('b')
  images = jax.ShapeDtypeStruct((batch, *image_shape), np.float32)
  lower = lambda names: jax_export.export(jax.jit(predict), platforms=names)(images)
  try:
    return bytes(lower(PLATFORMS).serialize())
  except Exception:  # which of them it was, JAX does not say
    able = []
    for name in PLATFORMS:
      try:
        lower((name,))
        able.append(name)
      except Exception as error:
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        logger.warning('no export for %s: %s', name, reason)
    if not able:
      raise UserError(f'no platform can be exported for: {reason}') from None
    return bytes(lower(tuple(able)).serialize())


def run(content: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
  """Predictions of what `serialize` gave, read again, for images (B, H, W, 3)."""
  again = jax_export.deserialize(bytearray(content))
  return jax.device_get(again.call(images))


def check(
  got: Mapping[str, np.ndarray], predict: Callable, images: np.ndarray
) -> float:
  """Compares an exported network's predictions with the function's it came from.

  Args:
    got: predictions of the exported network for `images`.
    predict: the function.
    images: (B, H, W, 3).

  Returns:
    The largest difference of a number, or share of pixels of another class.

  Raises:
    UserError: it is above 1e-4.
  """
  wanted = jax.device_get(jax.jit(predict)(images))

  def compare(a, b):
    if np.issubdtype(b.dtype, np.integer):
      return float(np.mean(a != b))
    return float(np.abs(a - b).max())

  worst = max(compare(got[name], wanted[name]) for name in wanted)
  if not worst <= 1e-4:
    raise UserError(f'the exported file gives other predictions, by up to {worst:.1e}')
  return worst


def card(
  name: str,
  tasks: Mapping[str, Task],
  image_shape: tuple[int, int, int],
  metrics: Mapping[str, float],
  sparsity: Mapping[str, float],
  source: str,
  content: bytes,
) -> dict:
  """What a user of the file has to know, as plain data.

  Args:
    name: of the run.
    tasks: the tasks, by name.
    image_shape: (H, W, 3).
    metrics: of the test split.
    sparsity: shares and counts.
    source: data set, and its terms.
    content: of the file.

  Returns:
    The model card, for JSON; 'sha256' is that of the file.
  """
  return {
    'name': name,
    'input': {
      'shape': ['batch', *image_shape],
      'dtype': 'float32',
      'range': [0, 1],
      'channels': 'RGB',
    },
    'outputs': {
      task.name: {
        'kind': task.kind,
        'classes': list(task.classes),
        'value': {
          'segmentation': 'class number of every pixel, int32',
          'edges': 'probability of every pixel, float32',
          'depth': 'metres, float32',
          'normals': 'unit vector of every pixel (right, up, to the viewer), float32',
          'attribute': 'probability of the last class, float32',
        }[task.kind],
      }
      for task in tasks.values()
    },
    'metrics of the test split': dict(metrics),
    'sparsity': dict(sparsity),
    'trained on': source,
    'sha256': hashlib.sha256(content).hexdigest(),
  }


def card_text(content: Mapping) -> str:
  """A model card as Markdown."""
  lines = [f'# {content["name"]}', '', f'Trained on: {content["trained on"]}.', '']
  shape = ' × '.join(map(str, content['input']['shape']))
  lines += [f'Input: RGB images, float32 in [0, 1], {shape}.', '', '## Outputs', '']
  for task, output in content['outputs'].items():
    classes = ', '.join(output['classes'])
    lines.append(f'- `{task}`: {output["value"]} ({classes})')
  for title in ('metrics of the test split', 'sparsity'):
    lines += ['', f'## {title.capitalize()}', '', '| | |', '|---|---|']
    lines += [
      f'| {key} | {value:,.4g} |'
      if isinstance(value, float)
      else f'| {key} | {value:,} |'
      for key, value in content[title].items()
    ]
  return '\n'.join(lines) + '\n'
