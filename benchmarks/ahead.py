"""The steps of benchmarks.gpu compiled for a GPU that is not at hand.

  python -m benchmarks.ahead                # needs jax[cuda13] beside the requirements
  python -m benchmarks.ahead --save DIR     # for `benchmarks.gpu --load DIR` there
  ... --heads NYU-like --inner-steps 0      # one row

Counts the kernels that a step starts on an H200: thousands of a few µs each wait for
the host. A loop's body counts as often as it runs, once if XLA cannot know. Without a
GPU XLA tries nothing out: what is saved has no products by Triton, among which it could
not choose, and cuDNN's first algorithms. It runs with the same version of JAX.
"""

import argparse
import collections
import lzma
import os
import re
import time
from pathlib import Path

import jax
from jax.experimental import serialize_executable, topologies

from benchmarks import gpu
from benchmarks.batches import random_batch

# As XLA's own descriptions of GPUs have it; figures of the vendor's data sheet.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  device_memory_size: 150000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
FLAGS = '--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false'
NO_KERNEL = {'parameter', 'constant', 'get-tuple-element', 'bitcast', 'tuple', 'while'}
KINDS = ('products', 'reductions', 'transposes and copies', 'other')


def computations(text):
  """Name -> (operation, line) of its instructions, of a program; '': the entry."""
  found, name = {}, None
  for line in text.splitlines():
    if head := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$', line):
      name = '' if head[1] else head[2]
      found[name] = []
    elif line.startswith('}'):
      name = None
    elif name is not None and (
      operation := re.match(r'\s*(?:ROOT )?%[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(', line)
    ):
      found[name].append((operation[1], line))
  return found


def kernels(text):
  """How many of each of KINDS a compiled program starts."""
  found = computations(text)

  def kind(operation, line):
    if operation == 'fusion':
      called = re.search(r'calls=%([\w.\-]+)', line)[1]
      inside = {o for o, _ in found[called]}
    else:
      inside = {operation}
    if 'dot' in inside or re.search('custom_call_target="__cu(dnn|blas)', line):
      return 'products'
    if 'reduce' in inside:
      return 'reductions'
    return 'transposes and copies' if inside & {'transpose', 'copy'} else 'other'

  def count(name, times):
    total = collections.Counter()
    for operation, line in found[name]:
      if operation == 'while':
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        body = re.search(r'body=%([\w.\-]+)', line)[1]
        total += count(body, times * (int(trips[1]) if trips else 1))
      elif operation not in NO_KERNEL:
        total[kind(operation, line)] += times
    return total

  return count('', 1)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  gpu.add_arguments(parser)
  parser.add_argument('--save', type=Path)
  arguments = parser.parse_args()
  # The plug-in looks for a driver, which is needed to run and not to compile.
  os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'
  os.environ['XLA_FLAGS'] = f'{FLAGS} {os.environ.get("XLA_FLAGS", "")}'
  topology = topologies.get_topology_desc(
    '', platform='cuda', target_config=H200, topology='1x1x1'
  )
  (device,) = topology.devices
  jax.default_backend = lambda: 'gpu'  # the program is the one for a GPU
  sharding = jax.sharding.SingleDeviceSharding(device)
  if arguments.save:
    arguments.save.mkdir(parents=True, exist_ok=True)
  print(f'| step | compile s | kernels | {" | ".join(KINDS)} | GiB |')
  print('|---' * (len(KINDS) + 4) + '|')
  size, batch = arguments.size, arguments.batch
  for name in arguments.heads:
    for steps in arguments.inner_steps:
      heads = gpu.HEADS[name]
      config = gpu.make_config(heads, size, batch, steps)
      arrays = random_batch(gpu.labels(heads), (size, size), batch)
      _, lowered = gpu.lower(config, heads, gpu.parts(arrays, steps), sharding)
      start = time.perf_counter()
      compiled = lowered.compile()
      seconds = time.perf_counter() - start
      counts = kernels(compiled.as_text())
      print(
        f'| {name}, K = {steps} | {seconds:.0f} | {counts.total()} | '
        f'{" | ".join(str(counts[kind]) for kind in KINDS)} | '
        f'{gpu.needed(compiled):.1f} |',
        flush=True,
      )
      if arguments.save:
        serialized, _, _ = serialize_executable.serialize(compiled)
        path = arguments.save / gpu.file_name(name, steps)
        path.write_bytes(lzma.compress(serialized, preset=1))


if __name__ == '__main__':
  main()
