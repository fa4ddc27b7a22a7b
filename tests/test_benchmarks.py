"""The benchmarks' own configurations: what they time has to be possible."""

import pytest

from benchmarks import gpu, speed
from msp.experiment import build


@pytest.mark.parametrize('mode', ['forward', 'reverse'])
def test_the_configurations_of_speed(mode):
  learned = {'sparsity.coefficient': 'learned', 'sparsity.hypergradient': mode}
  small = {f'model.{name}': value for name, value in speed.SMALL.items()}
  config = speed.make_config(48, 8, **small, **learned, **{'meta.inner_steps': 3})
  experiment = build(config, speed.labels())
  assert set(experiment.tasks) == {'task40', 'task1', 'task3'}


@pytest.mark.parametrize('heads', gpu.HEADS.values())
@pytest.mark.parametrize('steps', [0, 5])
def test_the_configurations_of_gpu(heads, steps):
  config = gpu.make_config(heads, 64, 4, steps)
  assert set(build(config, gpu.labels(heads)).tasks) == set(heads)
