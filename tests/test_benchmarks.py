"""The benchmarks' own configurations: what they time has to be possible."""

import pytest

from benchmarks import ahead, gpu, speed
from msp.experiment import build


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_the_configurations_of_speed(mode):
  learned = {'sparsity.coefficient': 'learned', 'sparsity.hypergradient': mode}
  small = {f'model.{name}': value for name, value in speed.SMALL.items()}
  config = speed.make_config(48, 8, **small, **learned, **{'meta.inner_steps': 3})
  experiment = build(config, speed.labels())
  assert set(experiment.tasks) == {'task40', 'task1', 'task3'}


@pytest.mark.parametrize('row', speed.LEARNED)
def test_the_runs_that_speed_compares_with_a_grid(row):
  config = speed.learned_config(row)
  experiment = build(config, {task: speed.CAMVID[task] for task in config.tasks})
  stands_still = experiment.settled_step is not None
  assert stands_still == (row not in ('fixed 0.005', 'budget 0.7'))


@pytest.mark.parametrize('heads', gpu.HEADS.values())
@pytest.mark.parametrize('steps', [0, 5])
def test_the_configurations_of_gpu(heads, steps):
  config = gpu.make_config(heads, 64, 4, steps)
  assert set(build(config, gpu.labels(heads)).tasks) == set(heads)


PROGRAM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused (p: f32[8,8]) -> f32[8] {
  %p = f32[8,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[8]{0} reduce(%p, %zero), dimensions={0}, to_apply=%sum
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.1 = (s32[], f32[8,8]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p.1), index=1
  %product = (f32[8,8]{1,0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %y = f32[8]{0} fusion(%x), kind=kInput, calls=%fused
  ROOT %t = (s32[], f32[8,8]) tuple(%y, %x)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %copied = f32[8,8]{1,0} copy(%x.1)
  %negative = f32[8,8]{1,0} negate(%copied)
  ROOT %loop = (s32[], f32[8,8]) while(%negative), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_kernels_of_a_loop_count_as_often_as_it_runs():
  assert ahead.kernels(PROGRAM) == {
    'products': 5,
    'reductions': 5,
    'transposes and copies': 1,
    'other': 1,
  }
