"""What a network costs: parameters, FLOPs, memory, latency."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msp import groups as gr
from msp.models import multitask

PyTree = Any


class Cost(NamedTuple):
  """Cost of evaluating a network on a batch.

  Attributes:
    parameters: all of them.
    backbone_flops: of the backbone's convolutions, 2 · kernel size · positions · batch.
    flops: of everything, by XLA's cost analysis; 0 where it has none.
    temporaries: bytes that activations need at their peak, by XLA's account.
    seconds: of every timed call.
  """

  parameters: int
  backbone_flops: int
  flops: float
  temporaries: int
  seconds: tuple[float, ...]

  @property
  def latency(self) -> float:
    """Median, seconds."""
    return statistics.median(self.seconds)


def cost(
  networks: dict[str, tuple[multitask.MultiTask, PyTree, PyTree]],
  image_shape: tuple[int, int, int],
  batch_size: int,
  *,
  rounds: int = 10,
) -> dict[str, Cost]:
  """Measures networks against each other, in turn, on the default device.

  Args:
    networks: name -> (model, params, batch_stats).
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
    leaves = gr.by_path(params)
    positions = multitask.positions(model, image_shape)
    flops = sum(2 * leaves[path].size * n for path, n in positions.items())
    found[name] = Cost(
      parameters=sum(x.size for x in leaves.values()),
      backbone_flops=batch_size * flops,
      flops=(program.cost_analysis() or {}).get('flops', 0.0),
      temporaries=program.memory_analysis().temp_size_in_bytes,
      seconds=tuple(times[name]),
    )
  return found


def table(costs, dense, compact, image_shape) -> str:
  """Markdown: totals of both networks, then their kernels.

  Args:
    costs: batch size -> {'dense': Cost, 'compact': Cost}.
    dense: (model, params, batch_stats) before.
    compact: the same after.
    image_shape: (H, W, 3).
  """
  lines = ['| | dense | compact | ratio |', '|---|---|---|---|']
  rows = {}
  for size, pair in costs.items():
    at = f', batch {size}'
    if not rows:
      rows['parameters'] = [float(c.parameters) for c in pair.values()]
      rows['backbone GFLOP'] = [c.backbone_flops / 1e9 for c in pair.values()]
      rows['GFLOP by XLA'] = [c.flops / 1e9 for c in pair.values()]
    rows[f'activations MiB{at}'] = [c.temporaries / 2**20 for c in pair.values()]
    rows[f'latency ms{at}'] = [1e3 * c.latency for c in pair.values()]
    rows[f'spread ms{at}'] = [
      1e3 * (max(c.seconds) - min(c.seconds)) for c in pair.values()
    ]
  for name, (before, after) in rows.items():
    ratio = f'{after / before:.2f}' if before and 'spread' not in name else ''
    number = '{:,.0f}' if name == 'parameters' else '{:.3g}'
    lines.append(
      f'| {name} | {number.format(before)} | {number.format(after)} | {ratio} |'
    )
  positions = multitask.positions(dense[0], image_shape)
  before, after = gr.by_path(dense[1]), gr.by_path(compact[1])
  lines += [
    '',
    '| kernel | in | out | parameters | MFLOP, batch 1 |',
    '|---|---|---|---|---|',
  ]
  for path, n in positions.items():
    old, new = before[path], after[path]
    cells = [
      f'{old.shape[-2]} → {new.shape[-2]}',
      f'{old.shape[-1]} → {new.shape[-1]}',
      f'{old.size:,} → {new.size:,}',
      f'{2e-6 * old.size * n:.3g} → {2e-6 * new.size * n:.3g}',
    ]
    lines.append(f'| {gr.short_name(path)} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'
