"""Meta-Sparsity (arXiv 2501.12115) on NYU-v2: λ is learned.

As published, within a trust region; 'tiny' has a tolerance instead. What else may move
λ, and what it has been worth: README.md, "Which objective for λ?".

Full size (the published settings, but for what docs/reproduction.md lists; one
accelerator or more, there with --config.model.dtype=bfloat16):
  python launch.py --config configs/nyud_meta.py --config.data.source=/path/to/NYUD_MT
On the procedural stand-in, small (2 CPU cores, 3 minutes):
  python launch.py --config configs/nyud_meta.py:procedural,tiny
Variation: four tasks, two episodes drawn a step:
  ... --workdir runs/four --config.meta.episodes=2 \
      --config.tasks="('segmentation','depth','normals','edges')"
Variation: half of the images, a fifth of those without the label of one task:
  ... --workdir runs/half --config.data.train_share=0.5 --config.data.missing=0.2
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """Options: 'procedural' (rendered rooms) and 'tiny' (minutes on a CPU)."""
  given = common.options(arg, ('procedural', 'tiny'))
  config = common.nyud()
  config.name = common.name('nyud_meta', given)
  common.learn_coefficient(config)
  common.apply(config, given)
  return config
