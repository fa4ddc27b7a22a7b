"""What a network costs: parameters, FLOPs, memory, latency."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.compact import compact
from msp.models import multitask

PyTree = Any


class Cost(NamedTuple):
  """Cost of evaluating a network on a batch.

  Attributes:
    parameters: all of them.
    backbone_flops: of the backbone's convolutions, 2 · kernel size · positions · batch.
    kernel_flops: the same of all kernels, those of the heads included.
    flops: of everything, by XLA's cost analysis, which leaves out the taps outside of
      the picture; 0 where it has none.
    temporaries: bytes that activations need at their peak, by XLA's account.
    seconds: of every timed call.
  """

  parameters: int
  backbone_flops: int
  kernel_flops: int
  flops: float
  temporaries: int
  seconds: tuple[float, ...]

  @property
  def latency(self) -> float:
    """Median, seconds."""
    return statistics.median(self.seconds)


def kernel_flops(
  model: multitask.MultiTask, params: PyTree, image_shape: Sequence[int]
) -> tuple[int, int]:
  """FLOPs of an image, Σ 2 · kernel size · positions: backbone, and all kernels."""
  leaves = gr.by_path(params)
  positions = multitask.positions(model, image_shape)
  flops = {path: 2 * leaves[path].size * n for path, n in positions.items()}
  backbone = sum(n for path, n in flops.items() if path.startswith('backbone/'))
  return backbone, sum(flops.values())


def backbone_costs(
  model: multitask.MultiTask,
  params: PyTree,
  batch_stats: PyTree,
  image_shape: Sequence[int],
) -> dict[str, int]:
  """Parameters and FLOPs of a backbone, with its dead channels and without.

  Args:
    model: the network.
    params: θ, with exact zeros.
    batch_stats: running statistics; see `msp.compact.compact`.
    image_shape: (H, W, 3).

  Returns:
    'backbone_parameters', 'backbone_flops' (of an image's convolutions, as
    `kernel_flops`), and both of the compact network, their names with '_compact'.

  Raises:
    UserError: a dead stream cuts the network.
  """
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree['backbone']))
  small = compact(model, params, batch_stats)
  return {
    'backbone_parameters': count(params),
    'backbone_parameters_compact': count(small.params),
    'backbone_flops': kernel_flops(model, params, image_shape)[0],
    'backbone_flops_compact': kernel_flops(small.model, small.params, image_shape)[0],
  }


def cost(
  networks: dict[str, tuple[multitask.MultiTask, PyTree, PyTree]],
  image_shape: tuple[int, int, int],
  batch_size: int,
  *,
  rounds: int = 10,
) -> dict[str, Cost]:
  """Measures networks against each other, in turn, on the default device.

  Args:
    networks: name -> (model, params, batch_stats); the same kernels at the same
      resolutions, of any widths.
    image_shape: (H, W, 3).
    batch_size: images.
    rounds: calls of each that are timed, after two that are not.

  Returns:
    name -> its cost in evaluation mode.
  """
  images = jnp.zeros((batch_size, *image_shape))
  programs, times = {}, {name: [] for name in networks}
  for name, (model, params, batch_stats) in networks.items():
    run = jax.jit(
      lambda p, s, x, model=model: multitask.apply(model, p, s, x, train=False)[0]
    )
    arrays = jax.device_put((params, batch_stats))
    programs[name] = run.lower(*arrays, images).compile(), arrays
  for i in range(rounds + 2):
    for name, (program, arrays) in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays, images))
      if i > 1:
        times[name].append(time.perf_counter() - start)
  found = {}
  for name, (model, params, _) in networks.items():
    program = programs[name][0]
    backbone, whole = kernel_flops(model, params, image_shape)
    found[name] = Cost(
      parameters=sum(x.size for x in jax.tree.leaves(params)),
      backbone_flops=batch_size * backbone,
      kernel_flops=batch_size * whole,
      flops=(program.cost_analysis() or {}).get('flops', 0.0),
      temporaries=program.memory_analysis().temp_size_in_bytes,
      seconds=tuple(times[name]),
    )
  return found


def table(
  costs: dict[int, dict[str, Cost]],
  dense: PyTree,
  compact: PyTree,
) -> str:
  """Markdown: totals of every network, then the kernels before and after.

  Args:
    costs: batch size -> name -> its cost; ratios are to the first name.
    dense: params before.
    compact: params after; a kernel keeps its path.
  """
  names = list(next(iter(costs.values())))
  lines = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']

  def row(label, values, pattern):
    cells = [
      pattern.format(v) + (f' (×{v / values[0]:.2f})' if i and values[0] else '')
      for i, v in enumerate(values)
    ]
    lines.append(f'| {label} | {" | ".join(cells)} |')

  for i, (size, by_name) in enumerate(costs.items()):
    found = list(by_name.values())
    if not i:
      row('parameters', [c.parameters for c in found], '{:,}')
      row(
        'backbone GFLOP an image',
        [c.backbone_flops / size / 1e9 for c in found],
        '{:.3g}',
      )
      row('all GFLOP an image', [c.kernel_flops / size / 1e9 for c in found], '{:.3g}')
      row('all GFLOP an image, by XLA', [c.flops / size / 1e9 for c in found], '{:.3g}')
    row(
      f'activations MiB, batch {size}', [c.temporaries / 2**20 for c in found], '{:.3g}'
    )
    row(f'latency ms, batch {size}', [1e3 * c.latency for c in found], '{:.3g}')
    spread = [
      f'{1e3 * min(c.seconds):.3g} to {1e3 * max(c.seconds):.3g}' for c in found
    ]
    lines.append(f'| fastest to slowest ms | {" | ".join(spread)} |')
  before, after = gr.by_path(dense), gr.by_path(compact)
  lines += ['', '| kernel | in | out | parameters |', '|---|---|---|---|']
  for path, old in before.items():
    if not path.endswith('kernel') or not path.startswith('backbone/'):
      continue
    new = after[path]
    cells = [
      f'{old.shape[-2]} → {new.shape[-2]}',
      f'{old.shape[-1]} → {new.shape[-1]}',
      f'{old.size:,} → {new.size:,}',
    ]
    lines.append(f'| {gr.short_name(path)} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'
