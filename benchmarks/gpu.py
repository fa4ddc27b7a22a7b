"""One accelerator: step times, share of its matmul ceiling, and peak memory.

  python -m benchmarks.gpu                 # NYU-like and CelebA-like heads
  python -m benchmarks.gpu --torch         # PyTorch's K = 0 step, too (CUDA)
  python -m benchmarks.gpu --trace DIR     # a profile of each step for Perfetto
  python -m benchmarks.gpu --load DIR      # steps that benchmarks.ahead has compiled
  ... --heads NYU-like --inner-steps 0     # one row; K = 5 takes minutes to compile

ResNet-50-D at 256 x 256, batch 16, bfloat16: the K = 0 step with Adam-metric prox and
the first-order K = 5 meta-step. TFLOP are those of XLA's cost analysis of the same
step with its loops unrolled, before optimisation; the ceiling is a large bfloat16
matmul in the same process. Medians of --rounds rounds of STEPS steps each. Memory is
what the compiled step needs: its arguments, results and temporaries; PyTorch's is its
peak. The batch is that of each part of a step: support, query, hold-out.
"""

import argparse
import lzma
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

from benchmarks.batches import random_batch
from configs import common
from data import Label
from msp.experiment import build

STEPS = 5  # under way at a time, so that the host's part is not what is timed
HEADS = {
  'NYU-like': {'a': 40, 'b': 1, 'c': 13},
  'CelebA-like': {'a': 3, 'male': 0, 'smiling': 0},
}


def labels(heads):
  found = {}
  for name, outputs in heads.items():
    kind = {0: 'attribute', 1: 'edges'}.get(outputs, 'segmentation')
    classes = tuple(str(i) for i in range(max(outputs, 2 - outputs)))
    found[name] = Label(kind, classes)
  return found


def make_config(heads, size, batch, steps):
  config = common.base()
  config.tasks = tuple(heads)
  config.data.image_size = (size, size)
  config.train.batch_size = batch
  config.data.hold_out = 0.2  # the batches are not of any data
  config.model.dtype = 'bfloat16'
  config.sparsity.coefficient = 'learned' if steps else 'fixed'
  config.sparsity.value = 1e-6
  config.meta.inner_steps = steps
  config.meta.episodes = 'full'
  config.meta.exact = False
  return config


def timed(call, wait, rounds):
  """Seconds a call, several of them under way at a time."""
  times = []
  for i in range(rounds + 2):
    start = time.perf_counter()
    for _ in range(STEPS):
      call()
    wait()
    if i > 1:
      times.append((time.perf_counter() - start) / STEPS)
  return statistics.median(times)


def ceiling(rounds, n=8192):
  """TFLOP/s of an n x n x n bfloat16 matmul of random numbers."""
  # Of variance 1/n, so that products of products neither grow nor vanish.
  a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) / n**0.5
  multiply = jax.jit(jnp.matmul)
  kept = [a]

  def call():
    kept[0] = multiply(kept[0], a)

  seconds = timed(call, lambda: kept[0].block_until_ready(), rounds)
  return 2 * n**3 / seconds / 1e12


def parts(arrays, steps):
  """The parts of a step's batches; all of them are of the same images."""
  names = ('query', 'support', 'hold_out') if steps else ('query',)
  return dict.fromkeys(names, arrays)


def prepare(config, heads, batches):
  """The experiment, and the arguments of its step."""
  experiment = build(config, labels(heads))
  key = jax.random.key(0)
  state = jax.eval_shape(experiment.init, key, batches['query'])
  return experiment, (state, batches, key)


def lower(config, heads, batches, sharding=None):
  """The step's program; sharding: of a device that is not at hand."""
  experiment, arguments = prepare(config, heads, batches)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
  )
  return experiment, jax.jit(experiment.train_step, donate_argnums=0).lower(*arguments)


def file_name(name, steps):
  return f'{name}-{steps}.xz'


def load(path, config, heads, batches):
  """A step that `benchmarks.ahead` has compiled."""
  experiment, arguments = prepare(config, heads, batches)
  compiled = serialize_executable.deserialize_and_load(
    lzma.decompress(path.read_bytes()),
    jax.tree.structure((arguments, {})),
    jax.tree.structure(jax.eval_shape(experiment.train_step, *arguments)),
  )
  return experiment, compiled


def needed(compiled):
  """GiB of a compiled step: its arguments, results and temporaries."""
  needs = compiled.memory_analysis()
  size = needs.argument_size_in_bytes + needs.temp_size_in_bytes
  return (size + needs.output_size_in_bytes - needs.alias_size_in_bytes) / 2**30


def flops(config, heads, batches):
  """TFLOP of a step: a loop's body would be counted once, so none is left.

  A Hessian product holds the gradient of its inner step again, which XLA computes once:
  of the steps that have one, all but the first, it is taken off.
  """
  config = config.copy_and_resolve_references()
  config.meta.unroll = 'yes'
  # XLA's plug-ins for accelerators analyse nothing before it is compiled.
  with jax.default_device(jax.devices('cpu')[0]):
    count = lambda: lower(config, heads, batches)[1].cost_analysis()['flops'] / 1e12
    total, steps = count(), config.meta.inner_steps
    if steps > 1:
      config.meta.inner_steps = 0
      config.sparsity.coefficient = 'none'
      total -= (steps - 1) * count()
  return total


def measure(name, steps, peak, arguments):
  heads, size, batch = HEADS[name], arguments.size, arguments.batch
  config = make_config(heads, size, batch, steps)
  batches = parts(random_batch(labels(heads), (size, size), batch), steps)
  work = flops(config, heads, batches)
  seconds = None
  if arguments.load:
    path = arguments.load / file_name(name, steps)
    experiment, compiled = load(path, config, heads, batches)
  else:
    experiment, lowered = lower(config, heads, batches)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
  batches = jax.tree.map(jnp.asarray, batches)
  kept = [jax.jit(experiment.init)(jax.random.key(0), batches['query'])]

  key = jax.random.key(0)

  def call():
    kept[0], _ = compiled(kept[0], batches, key)

  wait = lambda: jax.block_until_ready(kept[0])
  median = timed(call, wait, arguments.rounds)
  print(
    f'| {name}, K = {steps} | {f"{seconds:.0f}" if seconds else "–"} | '
    f'{1e3 * median:.1f} | {work:.2f} | {work / median:.0f} | '
    f'{100 * work / median / peak:.0f} % | {needed(compiled):.1f} |',
    flush=True,
  )
  if arguments.trace:
    with jax.profiler.trace(arguments.trace / f'{name}-{steps}'):
      for _ in range(STEPS):
        call()
      wait()


def peer(heads, size, batch, rounds):
  """PyTorch's K = 0 step: backbone once, Adam, no prox, bfloat16 autocast."""
  import torch

  from benchmarks import torch_peer

  outputs = [n for n in heads.values() if n]
  network = torch_peer.Network(outputs).cuda().to(memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
  image = torch.rand(batch, 3, size, size, device='cuda')
  image = image.to(memory_format=torch.channels_last)
  targets = [
    torch.randint(0, max(n, 2), (batch, size // 8, size // 8), device='cuda')
    for n in outputs
  ]

  def call():
    with torch.autocast('cuda', torch.bfloat16):
      torch_peer.training_step(network, optimizer, image, targets, 0.0, prox=False)

  median = timed(call, torch.cuda.synchronize, rounds)
  memory = torch.cuda.max_memory_allocated() / 2**30
  print(f'| PyTorch, no prox | – | {1e3 * median:.1f} | – | – | – | {memory:.1f} |')


def add_arguments(parser):
  parser.add_argument('--size', type=int, default=256)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--heads', choices=HEADS, nargs='+', default=list(HEADS))
  parser.add_argument('--inner-steps', type=int, nargs='+', default=[0, 5])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  add_arguments(parser)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--load', type=Path)
  parser.add_argument('--torch', action='store_true')
  parser.add_argument('--trace', type=Path)
  arguments = parser.parse_args()
  if jax.default_backend() == 'cpu':
    sys.exit('error: JAX sees no accelerator; benchmarks/speed.py is for the CPU')
  peak = ceiling(arguments.rounds)
  print(
    f'{jax.devices()[0].device_kind}: matmul ceiling {peak:.0f} TFLOP/s, bfloat16\n'
  )
  print('| step | compile s | ms | TFLOP | TFLOP/s | of the ceiling | GiB |')
  print('|---|---|---|---|---|---|---|')
  for name in arguments.heads:
    for steps in arguments.inner_steps:
      measure(name, steps, peak, arguments)
  if arguments.torch:
    peer(HEADS['NYU-like'], arguments.size, arguments.batch, arguments.rounds)


if __name__ == '__main__':
  main()
