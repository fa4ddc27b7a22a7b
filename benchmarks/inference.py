"""Latency of compacted networks: here, in ONNX Runtime, and beside Torch-Pruning.

  python -m benchmarks.inference ours
  python -m benchmarks.inference onnx    # in the environment of requirements-onnx.txt
  python -m benchmarks.inference torch   # needs requirements-bench.txt
  ... --dead 0.7 --size 256 --batch 1 --rounds 10 --convolution lax

ResNet-50-D with three dense heads (40, 1 and 3 outputs), random weights. 'in': of every
backbone convolution its own random share of input channels is dead, as a learned λ
leaves them; 'coupled': of every stream the same channels for all that read and write
it. Medians of rounds in which all networks take turns. FLOPs are those of the program,
by XLA, which computes no taps outside the picture.

`torch` prunes the backbone of the same network in PyTorch to the same share of FLOPs,
counted by Torch-Pruning with those taps, and compares the times there.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from benchmarks.speed import OUTPUTS, alternate
from msp import compact, measure, prune
from msp import groups as gr
from msp.models import multitask


def networks(axis, dead, size, convolution):
  """Dense, and with a share of dead channels removed; name -> Compact."""
  model = multitask.build(
    {f'task{n}': ('dense', n) for n in OUTPUTS},
    convolution_implementation=convolution,
  )
  init = jax.jit(lambda key: multitask.init(model, key, (size, size, 3)))
  dense = compact.Compact(model, *jax.device_get(init(jax.random.key(0))))
  groups = gr.find(dense.params, axis=axis, streams=multitask.streams(model))
  scores = prune.score(groups, dense.params, 'random', key=jax.random.key(1))
  # Not those that read the picture: three channels are not for pruning.
  alive = {
    layer: count if 'stem_conv1/' in layer else round((1 - dead) * count)
    for layer, count in gr.totals(groups, dense.params).items()
  }
  sparse = gr.remove(groups, dense.params, prune.keep_per_layer(scores, alive))
  sparse = dense._replace(params=jax.device_get(sparse))
  small = compact.compact(*sparse)
  images = np.random.default_rng(0).random((1, size, size, 3), np.float32)
  difference = compact.difference(sparse, small, images)
  print(f'{axis}: outputs of dense with zeros and compact differ by {difference:.1e}')
  return {
    'dense, folded': compact.fold(dense),
    f'{dead:.0%} of {axis} groups, compact, folded': compact.fold(small),
  }


def flops(network, size):
  """Counted FLOPs of everything, and of the backbone, an image."""
  shape = (size, size, 3)
  backbone, _ = measure.kernel_flops(network.model, network.params, shape)
  program = jax.jit(
    lambda p, s, x: multitask.apply(network.model, p, s, x, train=False)[0]
  )
  images = jax.ShapeDtypeStruct((1, *shape), np.float32)
  arrays = jax.eval_shape(lambda: (network.params, network.batch_stats))
  cost = program.lower(*arrays, images).cost_analysis()
  return cost['flops'], backbone


def show(times, work, first):
  """Rows: ratios of work and of time to the first; how much of the one is the other."""
  base = statistics.median(times[first])
  print('| network | median ms | min to max ms | FLOPs x | time x | speed-up kept |')
  print('|---|---|---|---|---|---|')
  for name, values in times.items():
    median = statistics.median(values)
    ratio, faster = work[name] / work[first], base / median
    print(
      f'| {name} | {1e3 * median:.0f} | {1e3 * min(values):.0f} to '
      f'{1e3 * max(values):.0f} | {ratio:.2f} | {1 / faster:.2f} | '
      f'{faster * ratio:.2f} |'
    )


def ours(dead, size, batch, rounds, convolution):
  for axis in ('in', 'coupled'):
    found = networks(axis, dead, size, convolution)
    costs = measure.cost(
      {name: tuple(n) for name, n in found.items()},
      (size, size, 3),
      batch,
      rounds=rounds,
    )
    first = next(iter(found))
    work = {name: flops(n, size) for name, n in found.items()}
    ratio = work[list(found)[1]][1] / work[first][1]
    print(f'backbone FLOPs x {ratio:.2f}')
    show(
      {name: c.seconds for name, c in costs.items()},
      {name: w[0] for name, w in work.items()},
      first,
    )


def onnx(dead, size, batch, rounds, convolution):
  import onnxruntime

  from msp import onnx as exporter

  images = np.zeros((batch, size, size, 3), np.float32)
  for axis in ('in', 'coupled'):
    calls, work = {}, {}
    for name, network in networks(axis, dead, size, convolution).items():
      model, params, stats = network
      predict = lambda x, m=model, p=params, s=stats: multitask.apply(
        m, p, s, x, train=False
      )[0]
      content = exporter.serialize(predict, (size, size, 3))
      session = onnxruntime.InferenceSession(
        content, providers=['CPUExecutionProvider']
      )
      calls[name] = lambda session=session: session.run(None, {'images': images})
      work[name] = flops(network, size)[0]
    show(alternate(calls, rounds), work, next(iter(calls)))


def torch(dead, size, batch, rounds, convolution):
  import torch
  import torch_pruning

  from benchmarks import torch_peer

  def build():
    torch.manual_seed(0)
    network = torch_peer.Network(OUTPUTS).to(memory_format=torch.channels_last)
    return network.eval()

  image = torch.zeros(batch, 3, size, size).contiguous(
    memory_format=torch.channels_last
  )
  count = lambda module: torch_pruning.utils.count_ops_and_params(module, image)[0]
  found = networks('coupled', dead, size, convolution)
  ratios = [flops(n, size)[1] for n in found.values()]
  wanted = ratios[1] / ratios[0]
  whole = count(build().backbone)

  def pruned(share):
    network = build()
    heads = [m for m in network.heads.modules() if isinstance(m, torch.nn.Conv2d)]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.MagnitudePruner(
      network,
      image,
      importance=torch_pruning.importance.MagnitudeImportance(p=2),
      pruning_ratio=share,
      ignored_layers=heads,
    )
    pruner.step()
    return network, time.perf_counter() - start

  low, high = 0.0, 0.95
  for _ in range(7):
    share = (low + high) / 2
    network, seconds = pruned(share)
    if count(network.backbone) / whole > wanted:
      low = share
    else:
      high = share
  print(
    f'Torch-Pruning: {share:.2f} of the channels in {seconds:.1f} s, backbone MACs '
    f'x {count(network.backbone) / whole:.2f}; ours x {wanted:.2f}'
  )
  dense = build()

  def call(module):
    def run():
      with torch.inference_mode():
        module(image)

    return run

  first, name = 'PyTorch, dense', 'PyTorch, Torch-Pruning'
  show(
    alternate({first: call(dense), name: call(network)}, rounds),
    {first: count(dense), name: count(network)},
    first,
  )
  costs = measure.cost(
    {name: tuple(n) for name, n in found.items()}, (size, size, 3), batch, rounds=rounds
  )
  show(
    {name: c.seconds for name, c in costs.items()},
    {name: flops(n, size)[0] for name, n in found.items()},
    next(iter(found)),
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parts = {'ours': ours, 'onnx': onnx, 'torch': torch}
  parser.add_argument('what', choices=parts)
  parser.add_argument('--dead', type=float, default=0.7)
  parser.add_argument('--size', type=int, default=256)
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument(
    '--convolution', default='mixed', help='see msp.models.convolution'
  )
  arguments = vars(parser.parse_args())
  parts[arguments.pop('what')](**arguments)
