"""Less is More (arXiv 2308.12114) on NYU-v2: no inner loop.

Dense (the published settings; one accelerator or more):
  python launch.py --config configs/nyud_multitask.py \
      --config.data.source=/path/to/NYUD_MT
With the published fixed λ = 1e-6:
  python launch.py --config configs/nyud_multitask.py:fixed \
      --config.data.source=/path/to/NYUD_MT
On the procedural stand-in, small (2 CPU cores, 2 minutes;
depth RMSE about 0.64 m):
  python launch.py --config configs/nyud_multitask.py:procedural,tiny
Variation: two tasks:
  ... --workdir runs/two --config.tasks="('segmentation','depth')"
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Options: 'fixed' (λ), 'procedural' (rendered rooms), 'tiny' (for a CPU)."""
  given = common.options(arg, ('fixed', 'procedural', 'tiny'))
  config = common.nyud()
  config.name = common.name('nyud_multitask', given)
  common.apply(config, given)
  return config
