"""The meta-step: loops against straight programs, and its growth with K.

  python -m benchmarks.meta_step forms     # tiny network, K = 3: five ways to run it
  python -m benchmarks.meta_step growth    # rolled and exact: memory and compile time
  python -m benchmarks.meta_step growth --full   # ResNet-50-D at 256 x 256 instead

`forms` gives medians and their ratio to the first row, measured in turn in one
process. `growth` compiles only; memory is XLA's own account (temporaries).
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp

import data
from benchmarks.batches import random_batch
from configs import celeba_meta
from msp.experiment import build


def make_config(full: bool):
  config = celeba_meta.get_config('' if full else 'procedural,tiny')
  config.meta.inner_steps = 3
  config.meta.episodes = 'full'
  config.meta.exact = True
  config.sparsity.objective = 'holdout'
  config.meta.unroll = 'no'
  return config


def lower(config):
  """The step of a configuration, lowered, with its arguments' shapes."""
  found = data.labels(config.data.name)
  experiment = build(config, found)
  labels = {task: found[task] for task in config.tasks}
  half = random_batch(labels, config.data.image_size, config.train.batch_size // 2)
  batches = {'support': half, 'query': half, 'hold_out': half}
  state = jax.eval_shape(experiment.init, jax.random.key(0), half)
  step = jax.jit(experiment.train_step, donate_argnums=0)
  return step.lower(state, batches, jax.random.key(0)), experiment, batches


def compile_timed(lowered):
  start = time.perf_counter()
  compiled = lowered.compile()
  return compiled, time.perf_counter() - start


def forms(rounds: int):
  programs = {}
  for unroll, convolution in (
    ('no', 'lax'),
    ('yes', 'lax'),
    ('no', 'matmul'),
    ('yes', 'matmul'),
    ('yes', 'mixed'),
  ):
    config = make_config(full=False)
    config.meta.unroll = unroll
    config.model.convolution_implementation = convolution
    lowered, experiment, batches = lower(config)
    compiled, seconds = compile_timed(lowered)
    state = jax.jit(experiment.init)(jax.random.key(0), batches['query'])
    programs[unroll, convolution] = [compiled, seconds, state, batches, []]
    print(f'compiled {unroll=} {convolution=} in {seconds:.0f} s', file=sys.stderr)
  for i in range(rounds + 1):
    for entry in programs.values():
      compiled, _, state, batches, times = entry
      batches = jax.tree.map(jnp.asarray, batches)
      start = time.perf_counter()
      entry[2], metrics = compiled(state, batches, jax.random.key(i))
      jax.block_until_ready(metrics)
      if i:  # the first round warms up
        times.append(time.perf_counter() - start)
  first = None
  print('| inner steps | convolutions | compile s | step ms | × first |')
  print('|---|---|---|---|---|')
  for (unroll, convolution), entry in programs.items():
    median = statistics.median(entry[4])
    first = first or median
    how = 'unrolled' if unroll == 'yes' else 'rolled'
    print(
      f'| {how} | {convolution} | {entry[1]:.0f} | {1e3 * median:.0f} | '
      f'{median / first:.2f} |'
    )


def growth(full: bool):
  base = None
  print('| K | compile s | temporaries MiB | × K = 1 |')
  print('|---|---|---|---|')
  for steps in (1, 5, 10):
    config = make_config(full)
    config.meta.inner_steps = steps
    config.model.convolution_implementation = 'lax' if full else 'matmul'
    compiled, seconds = compile_timed(lower(config)[0])
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    base = base or memory
    print(
      f'| {steps} | {seconds:.0f} | {memory:.0f} | {memory / base:.2f} |', flush=True
    )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=['forms', 'growth'])
  parser.add_argument('--full', action='store_true', help='ResNet-50-D at 256 x 256')
  parser.add_argument('--rounds', type=int, default=5)
  arguments = parser.parse_args()
  if arguments.what == 'forms':
    forms(arguments.rounds)
  else:
    growth(arguments.full)
