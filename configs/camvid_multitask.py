"""Multi-task training on CamVid street scenes: dense, or with a fixed λ.

Full size (one accelerator or more):
  python launch.py --config configs/camvid_multitask.py \
      --config.data.source=/path/to/CamVid
With a fixed λ:
  python launch.py --config configs/camvid_multitask.py:fixed \
      --config.data.source=/path/to/CamVid
Small (2 CPU cores, 2 minutes;
mIoU about 0.30):
  python launch.py --config configs/camvid_multitask.py:tiny \
      --config.data.source=/path/to/CamVid
Variation: segmentation alone:
  ... --workdir runs/alone --config.tasks="('segmentation',)"
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Options: 'fixed' (λ) and 'tiny' (minutes on a CPU)."""
  given = common.options(arg, ('fixed', 'tiny'))
  config = common.camvid()
  config.name = common.name('camvid_multitask', given)
  common.apply(config, given)
  return config
