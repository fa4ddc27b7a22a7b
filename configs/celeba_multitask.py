"""Less is More (arXiv 2308.12114) on CelebAMask-HQ: no inner loop.

Dense (the published settings; one accelerator or more):
  python launch.py --config configs/celeba_multitask.py \
      --config.data.source=/path/to/CelebAMask-HQ
With the published fixed λ = 1e-5:
  python launch.py --config configs/celeba_multitask.py:fixed \
      --config.data.source=/path/to/CelebAMask-HQ
On the procedural stand-in, small (2 CPU cores, 2 minutes;
mIoU about 0.79):
  python launch.py --config configs/celeba_multitask.py:procedural,tiny
Variation: another λ: ...:fixed --workdir runs/more --config.sparsity.value=1e-4
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Options: 'fixed' (λ), 'procedural' (rendered faces), 'tiny' (for a CPU)."""
  given = common.options(arg, ('fixed', 'procedural', 'tiny'))
  config = common.celeba()
  config.name = common.name('celeba_multitask', given)
  common.apply(config, given)
  return config
