"""Meta-Sparsity (arXiv 2501.12115) on CelebAMask-HQ: λ is learned.

As published, within a trust region; 'tiny' has a tolerance instead. What else may move
λ, and what it has been worth: README.md, "Which objective for λ?".

Full size (the published settings, but for what docs/reproduction.md lists; one
accelerator or more, there with --config.model.dtype=bfloat16):
  python launch.py --config configs/celeba_meta.py \
      --config.data.source=/path/to/CelebAMask-HQ
On the procedural stand-in, small (2 CPU cores, 2 minutes;
mIoU 0.74 to 0.77, a third to a half of the groups dead):
  python launch.py --config configs/celeba_meta.py:procedural,tiny
Variation: seven tasks, two episodes drawn a step:
  ... --workdir runs/seven --config.meta.episodes=2 \
      --config.tasks="('segmentation','male','smiling','arched_eyebrows',\
'wearing_lipstick','high_cheekbones','big_lips')"
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Options: 'procedural' (rendered faces) and 'tiny' (minutes on a CPU)."""
  given = common.options(arg, ('procedural', 'tiny'))
  config = common.celeba()
  config.name = common.name('celeba_meta', given)
  common.learn_coefficient(config)
  common.apply(config, given)
  return config
