import os

# Eight virtual devices, so that sharding is exercised without an accelerator, and
# quick compilation: a test runs its program once or twice. This has to precede the
# first import of jax.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
  ]
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')

# By time, not by number of tests: the two processes then end together.
LONGEST_FIRST = ('test_train', 'test_models', 'test_train_step', 'test_compact')


def pytest_collection_modifyitems(items):
  rank = {name: i for i, name in enumerate(LONGEST_FIRST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
