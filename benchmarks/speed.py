"""Our steps against PyTorch's on the same network, in one process, taking turns.

  pip install -r requirements-bench.txt
  python -m benchmarks.speed step            # K = 0, ResNet-50-D, 256 x 256, batch 2
  python -m benchmarks.speed meta            # K = 3, small network, 64 x 64, batch 8
  python -m benchmarks.speed hypergradients  # forward and reverse, K = 1, 5, 20
  python -m benchmarks.speed learned         # a learned λ beside a grid of fixed ones

Medians of --rounds rounds, and ratios to the first row; times of one machine mean
little elsewhere. The peers are in benchmarks/torch_peer.py. XLA's threads and
PyTorch's are as many; PyTorch's sleep while they wait.
"""

import argparse
import functools
import os
import statistics
import time

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
os.environ.setdefault('KMP_BLOCKTIME', '0')

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msp
from benchmarks import learned_lambda
from benchmarks.batches import random_batch
from configs import common
from data import Label
from data.camvid import LABELS as CAMVID
from msp import groups as gr
from msp.experiment import build

# Heads as of NYU-v2: classes, one channel, three channels.
OUTPUTS = (40, 1, 3)
# Rows of benchmarks.learned_lambda; one of the grid first.
LEARNED = (
  'fixed 0.005',
  'budget 0.7',
  'tolerance from 0.01',
  'online from 0.01',
  'K = 1 from 0.01',
  'meta online from 0.01',
  'K = 3 from 0.01',
)
ALL_PARTS = ('query', 'support', 'hold_out')
SMALL = {'blocks': (1, 1, 1, 1), 'block': 'basic', 'width': 0.5, 'head_features': 64}


def labels():
  names = lambda n: tuple(str(i) for i in range(n))
  kind = lambda n: 'edges' if n == 1 else 'segmentation'
  return {f'task{n}': Label(kind(n), names(n)) for n in OUTPUTS}


def make_config(size, batch, **overrides):
  config = common.base()
  config.tasks = tuple(labels())
  config.data.image_size = (size, size)
  config.train.batch_size = batch
  config.data.hold_out = 0.2  # the batches are not of any data
  config.loss.combination = 'sum'
  config.model.dropout = 0.0
  config.update_from_flattened_dict(overrides)
  return config


def alternate(variants, rounds):
  """Name -> seconds of every round, in turn.

  An untimed call goes before each timed one: the first after another library's has to
  fetch its memory again (2 of 7 s of a ResNet-50-D step after PyTorch's).
  """
  times = {name: [] for name in variants}
  for _ in range(rounds):
    for name, call in variants.items():
      call()
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  return times


def show(times):
  first = None
  print('| what | median s | min to max s | x first |')
  print('|---|---|---|---|')
  for name, values in times.items():
    median = statistics.median(values)
    first = first or median
    print(
      f'| {name} | {median:.3f} | {min(values):.3f} to {max(values):.3f} | '
      f'{median / first:.2f} |'
    )


def compiled_step(config, batch, parts=('query',), of=None, settled=False):
  """A call that makes one training step, and the state it works on."""
  experiment = build(config, of or labels())
  state = jax.jit(experiment.init)(jax.random.key(0), batch)
  batches = jax.tree.map(jnp.asarray, dict.fromkeys(parts, batch))
  function = experiment.settled_step if settled else experiment.train_step
  step = jax.jit(function, donate_argnums=0)
  holder = [state]
  start = time.perf_counter()
  compiled = step.lower(state, batches, jax.random.key(0)).compile()
  seconds = time.perf_counter() - start

  def call():
    holder[0], metrics = compiled(holder[0], batches, jax.random.key(0))
    jax.block_until_ready((holder[0], metrics))

  return call, holder, compiled, seconds


def torch_batch(batch, stride=8):
  import torch

  image = torch.from_numpy(batch['image']).permute(0, 3, 1, 2)
  image = image.contiguous(memory_format=torch.channels_last)
  small = [batch[f'task{n}'][:, ::stride, ::stride] for n in OUTPUTS]
  return image, [torch.from_numpy(np.ascontiguousarray(x)).long() for x in small]


def step(rounds, size=256, batch=2):
  """K = 0: the whole step, and what Adam and the prox take of it."""
  import torch

  from benchmarks import torch_peer

  torch.manual_seed(0)
  lam, arrays = 1e-6, random_batch(labels(), (size, size), batch)
  image, targets = torch_batch(arrays)

  def peer(**options):
    network = torch_peer.Network(OUTPUTS).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=0.1)
    return lambda: torch_peer.training_step(
      network, optimizer, image, targets, lam, **options
    )

  fixed = {'sparsity.coefficient': 'fixed', 'sparsity.value': lam}
  ours, holder, compiled, seconds = compiled_step(
    make_config(size, batch, **fixed), arrays
  )
  dense, _, _, _ = compiled_step(make_config(size, batch), arrays)
  groups = gr.find(holder[0].params)
  adamw = functools.partial(optax.adamw, weight_decay=0.1, eps=1e-6, eps_root=1e-16)
  update_of = {
    'ours: Adam alone': adamw(1e-4),
    'ours: Adam and prox': msp.adaptive_proximal(
      adamw, 'group_lasso', groups, 1e-4, min_alive=1
    ),
  }

  def update_only(tx):
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(jnp.copy, holder[0].params)
    grads = jax.tree.map(lambda p: 1e-3 * p + 1e-5, params)

    def run(params, state):
      updates, state = tx.update(grads, state, params, sparsity=jnp.float32(lam))
      return optax.apply_updates(params, updates), state

    run = jax.jit(run, donate_argnums=(0, 1))
    kept = [(params, tx.init(params))]

    def call():
      kept[0] = jax.block_until_ready(run(*kept[0]))

    return call

  times = alternate(
    {
      'PyTorch, as published (backbone once per head)': peer(once=False),
      'PyTorch, backbone once': peer(),
      'PyTorch, backbone once, no prox': peer(prox=False),
      'ours, Adam-metric prox': ours,
      'ours, no prox': dense,
      **{name: update_only(tx) for name, tx in update_of.items()},
    },
    rounds,
  )
  show(times)
  del compiled
  share = statistics.median(times['ours: Adam and prox']) / statistics.median(
    times['ours, Adam-metric prox']
  )
  print(f'\nAdam and prox are {100 * share:.0f} % of our step; compile {seconds:.0f} s')


def meta(rounds, size=64, batch=8, steps=3):
  """The meta-step at K = 3: query gradient in θ⁰, hold-out gradient in λ."""
  import torch

  from benchmarks import torch_peer

  torch.manual_seed(0)
  arrays = random_batch(labels(), (size, size), batch)
  support = torch_batch(arrays)
  network = torch_peer.Network(
    OUTPUTS,
    SMALL['block'],
    SMALL['blocks'],
    SMALL['width'],
    SMALL['head_features'],
  ).to(memory_format=torch.channels_last)
  lam = torch.tensor(1e-4, requires_grad=True)
  peer = lambda exact: (
    lambda: torch_peer.meta_step(network, support, support, lam, steps, 1e-2, exact)
  )
  variants = {
    'PyTorch functional unrolling, exact': peer(True),
    'PyTorch functional unrolling, first order': peer(False),
  }
  for exact in (True, False):
    config = make_config(
      size,
      batch,
      **{f'model.{key}': value for key, value in SMALL.items()},
      **{'meta.inner_steps': steps, 'meta.episodes': 'full', 'meta.exact': exact},
      **{'sparsity.coefficient': 'learned', 'sparsity.hypergradient': 'reverse'},
    )
    config.sparsity.hypergradient = 'reverse' if exact else 'forward'
    call, holder, _, seconds = compiled_step(config, arrays, ALL_PARTS)
    print(f'compile, exact={exact}: {seconds:.0f} s')
    how = 'exact, reverse λ' if exact else 'first order, exact λ by forward mode'
    variants[f'ours: {how}, hold-out batch, Adam and prox on θ⁰'] = call
  count = sum(x.size for x in jax.tree.leaves(holder[0].params)) / 1e6
  peer_count = sum(p.numel() for p in network.parameters()) / 1e6
  print(f'parameters: ours {count:.2f} M, PyTorch {peer_count:.2f} M\n')
  show(alternate(variants, rounds))


def hypergradients(rounds, size=48, batch=8):
  """Forward against reverse in time and memory as K grows; first order in θ⁰."""
  print('| mode | K | compile s | median s | temporaries MiB |')
  print('|---|---|---|---|---|')
  for mode in ('forward', 'reverse'):
    for steps in (1, 5, 20):
      config = make_config(
        size,
        batch,
        **{f'model.{key}': value for key, value in SMALL.items()},
        **{'meta.inner_steps': steps, 'meta.episodes': 'full', 'meta.exact': False},
        **{'sparsity.coefficient': 'learned', 'sparsity.hypergradient': mode},
        **{'meta.unroll': 'no', 'model.convolution_implementation': 'matmul'},
      )
      call, _, compiled, seconds = compiled_step(
        config, random_batch(labels(), (size, size), batch), ALL_PARTS
      )
      times = alternate({'': call}, rounds)['']
      memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
      print(
        f'| {mode} | {steps} | {seconds:.0f} | {statistics.median(times):.3f} | '
        f'{memory:.0f} |',
        flush=True,
      )


def learned_config(row):
  """The configuration of a row of `benchmarks.learned_lambda`, on CamVid."""
  return learned_lambda.make('camvid', row, seeds=1).runs[0].config


def learned(rounds):
  """Steps that learn λ, and their runs as a share of a grid of eight fixed λ."""
  variants, settle = {}, {}
  for row in LEARNED:
    config = learned_config(row)
    parts = ('query', 'support') if config.meta.inner_steps else ('query',)
    # Under inner steps a batch is half support, half query.
    count = config.train.batch_size // len(parts)
    of = {task: CAMVID[task] for task in config.tasks}
    batch = random_batch(of, config.data.image_size, count)
    step = functools.partial(compiled_step, config, batch, of=of)
    variants[row] = step((*parts, 'hold_out'))[0]
    if build(config, of).settled_step is not None:
      settle[row] = config.sparsity.settle
      variants[f'{row}, λ stands still'] = step(parts, settled=True)[0]
  times = alternate(variants, rounds)
  show(times)
  medians = {name: statistics.median(values) for name, values in times.items()}
  # The last column: of eight fixed λ with as many inner steps.
  print('\n| run | x fixed | % of a grid of eight | % of one like it |')
  print('|---|---|---|---|')
  for row in LEARNED:
    seconds, late = medians[row], settle.get(row, 0.0)
    fixed = same = medians[LEARNED[0]]
    if late:
      after = medians[f'{row}, λ stands still']
      seconds = (1 - late) * seconds + late * after
      if learned_config(row).meta.inner_steps:
        same = after
    print(
      f'| {row} | {seconds / fixed:.2f} | {100 * seconds / fixed / 8:.1f} | '
      f'{100 * seconds / same / 8:.1f} |'
    )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  choices = {f.__name__: f for f in (step, meta, hypergradients, learned)}
  parser.add_argument('what', choices=choices)
  parser.add_argument('--rounds', type=int, default=5)
  arguments = parser.parse_args()
  choices[arguments.what](arguments.rounds)
