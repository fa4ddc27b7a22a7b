"""Meta-Sparsity (arXiv 2501.12115) on CamVid street scenes: λ is learned.

As published, within a trust region; 'tiny' has a tolerance instead. What else may move
λ, and what it has been worth: README.md, "Which objective for λ?".

Full size (one accelerator or more):
  python launch.py --config configs/camvid_meta.py --config.data.source=/path/to/CamVid
Small (2 CPU cores, 3 minutes;
mIoU about 0.24, 58 % of the groups dead; with config.seed=1 0.32 and 37 %):
  python launch.py --config configs/camvid_meta.py:tiny \
      --config.data.source=/path/to/CamVid
Variation: one λ for each stage:
  ... --workdir runs/stages --config.sparsity.granularity=stage
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Option: 'tiny' (minutes on a CPU)."""
  given = common.options(arg, ('tiny',))
  config = common.camvid()
  config.name = common.name('camvid_meta', given)
  common.learn_coefficient(config)
  common.apply(config, given)
  return config
