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
