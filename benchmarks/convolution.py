"""Times the forms of a 3×3 convolution, each against XLA's own in one run.

    python benchmarks/convolution.py            # on this machine's backend

Columns: forward, gradient (picture and kernel) and Hessian-vector product by
`jvp` of the gradient, then the last two inside a `lax.scan` of three steps.
Each entry is milliseconds and, in brackets, the time relative to `lax`; below 1
is faster than `lax`. Forms take turns, the best of all rounds counts. `compile`
is the seconds to compile all programs. The form with the star is the one that
`conv` chooses on this backend. Cases whose convolution takes XLA more than
10 ms are not scanned: on CPU one such scan takes `lax` many seconds.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax import lax

from msp.models import convolution

FORMS = {
  'lax': convolution.lax_conv,
  'patch': convolution.patch_conv,
  'shift': convolution.shift_conv,
  'tap': convolution.tap_conv,
}
# (B, H, W, I), O, stride, dilation
CASES = (
  ((16, 64, 64, 3), 16, 2, 1),
  ((16, 32, 32, 16), 16, 1, 1),
  ((16, 16, 16, 32), 32, 1, 1),
  ((16, 8, 8, 64), 64, 1, 1),
  ((16, 8, 8, 64), 64, 1, 2),
  ((16, 8, 8, 64), 64, 1, 4),
  ((16, 8, 8, 512), 16, 1, 1),
  ((16, 8, 8, 512), 32, 1, 12),
  ((2, 64, 64, 64), 64, 1, 1),
  ((2, 64, 64, 64), 64, 2, 1),
  ((2, 32, 32, 128), 128, 1, 1),
  ((2, 32, 32, 256), 256, 1, 1),
  ((2, 32, 32, 256), 256, 1, 2),
  ((2, 32, 32, 512), 512, 1, 4),
  ((2, 32, 32, 2048), 64, 1, 1),
  ((1, 32, 32, 2048), 256, 1, 12),
)
STEPS = 3
SCAN_LIMIT = 10e-3
COLUMNS = ('forward', 'gradient', 'hvp', 'scan gradient', 'scan hvp')


def programs(form, stride, dilation):
  """Returns the five timed functions of one form, all of (x, k, dx, dk)."""
  apply = functools.partial(form, stride=stride, dilation=dilation)

  def loss(x, k):
    return jnp.sum(jnp.tanh(apply(x, k)))

  grad = jax.grad(loss, (0, 1))

  def scan(x, k):
    def step(carry, _):
      updated = jax.tree.map(lambda p, g: p - 1e-3 * g, carry, grad(*carry))
      return updated, None

    return lax.scan(step, (x, k), length=STEPS)[0]

  return (
    lambda x, k, dx, dk: apply(x, k),
    lambda x, k, dx, dk: grad(x, k),
    lambda x, k, dx, dk: jax.jvp(grad, (x, k), (dx, dk)),
    lambda x, k, dx, dk: scan(x, k),
    lambda x, k, dx, dk: jax.jvp(scan, (x, k), (dx, dk)),
  )


def seconds(function, arguments):
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def measure(case, rounds):
  """Returns {form: (best seconds of each column, compile seconds)}."""
  shape, features, stride, dilation = case
  keys = jax.random.split(jax.random.key(0), 4)
  kernel = (3, 3, shape[-1], features)
  arguments = [
    scale * jax.random.normal(key, s)
    for key, s, scale in zip(keys, (shape, kernel) * 2, (1, 0.05) * 2, strict=True)
  ]
  columns = len(COLUMNS)
  compiled, compile_seconds, best = {}, {}, {}
  for name, form in FORMS.items():
    start = time.perf_counter()
    compiled[name] = [
      jax.jit(f).lower(*arguments).compile()
      for f in programs(form, stride, dilation)[:columns]
    ]
    compile_seconds[name] = time.perf_counter() - start
    if name == 'lax':
      warm = min(seconds(compiled[name][0], arguments) for _ in range(5))
      if warm > SCAN_LIMIT:
        columns = COLUMNS.index('scan gradient')
    best[name] = [seconds(f, arguments) for f in compiled[name][:columns]]
  for _ in range(rounds):
    for column in range(columns):
      for name, functions in compiled.items():
        if best[name][column] < 1:  # one run of a second is enough
          taken = seconds(functions[column], arguments)
          best[name][column] = min(best[name][column], taken)
  return {name: (best[name], compile_seconds[name]) for name in FORMS}


def chosen(case):
  """Returns the name of the form that `conv` chooses on this backend."""
  shape, features, stride, dilation = case
  implementation = convolution.resolve('auto')
  jaxprs = {
    name: jax.make_jaxpr(functools.partial(form, stride=stride, dilation=dilation))
    for name, form in FORMS.items()
  }
  conv = jax.make_jaxpr(
    functools.partial(
      convolution.conv,
      stride=stride,
      dilation=dilation,
      implementation=implementation,
    )
  )
  operands = [
    jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (3, 3, shape[-1], features))
  ]
  text = str(conv(*operands))
  return next(n for n, f in jaxprs.items() if str(f(*operands)) == text)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=20)
  rounds = parser.parse_args().rounds
  print(f'| {"case":35} | form  | {" | ".join(COLUMNS)} | compile |')
  print('|---|---|' + '---|' * (len(COLUMNS) + 1))
  for case in CASES:
    shape, features, stride, dilation = case
    title = f'{shape} → {features}, s{stride} d{dilation}'
    selected = chosen(case)
    results = measure(case, rounds)
    reference = results['lax'][0]
    for name, (best, compile_seconds) in results.items():
      cells = [
        f'{1e3 * t:.2f} ({t / r:.2f})' for t, r in zip(best, reference, strict=True)
      ]
      cells += ['–'] * (len(COLUMNS) - len(cells))
      mark = '*' if name == selected else ' '
      print(
        f'| {title:35} | {name:5}{mark}| {" | ".join(cells)} | {compile_seconds:.1f} |',
        flush=True,
      )


if __name__ == '__main__':
  main()
