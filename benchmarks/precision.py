"""Hypergradients in half precision against those in float32, of a trained network.

  python -m benchmarks.precision runs/NAME --inner-steps 3

From the latest state of a run, dL_holdout/dρ through K inner steps (forward mode, first
order in θ⁰, every task, no dropout) on the same batches in float32 and in bfloat16.
Prints the two means, the slope of a line through 0, and the correlation.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from msp import workdir
from msp.checkpoint import Checkpoints
from msp.run import open_run


def hypergradients(config, saved, dtype, batches):
  """dL_holdout/dρ of that many batches, each at the saved state, shape (batches,)."""
  config.model.dtype = dtype
  run = open_run(config, jax.devices()[:1], None)
  state = run.initial_state()._replace(
    **{name: saved[name] for name in ('params', 'batch_stats', 'rho', 'lambda_max')}
  )
  step, feed = jax.jit(run.experiment.train_step), run.feed()
  key = jax.random.key(0)
  values = [step(state, feed.next(), key)[1]['hypergradient'] for _ in range(batches)]
  return np.array([float(value.mean()) for value in values])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('run', type=Path, help='work directory of a run that learned λ')
  parser.add_argument('--inner-steps', type=int, default=1)
  parser.add_argument('--batches', type=int, default=12)
  arguments = parser.parse_args()
  config = workdir.configuration(arguments.run)
  config.update_from_flattened_dict(
    {
      'sparsity.objective': 'holdout',
      'sparsity.hypergradient': 'forward',
      'sparsity.settle': 0.0,
      'meta.inner_steps': arguments.inner_steps,
      'meta.episodes': 'full',
      'meta.exact': False,
      'model.dropout': 0.0,
    }
  )
  with Checkpoints(arguments.run, read_only=True) as checkpoints:
    saved = checkpoints.restore_any(checkpoints.latest_step())
  full, half = (
    hypergradients(config, saved, dtype, arguments.batches)
    for dtype in ('float32', 'bfloat16')
  )
  print(f'mean in float32 {full.mean():.4g}, in bfloat16 {half.mean():.4g}')
  print(f'slope {full @ half / (full @ full):.3f}')
  print(f'correlation {np.corrcoef(full, half)[0, 1]:.4f}')


if __name__ == '__main__':
  main()
