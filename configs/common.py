"""What all configurations share: the fields, and their published values."""

import copy

from ml_collections import ConfigDict, config_dict


def options(arg: str | None, known: tuple[str, ...]) -> set[str]:
  """Parses 'procedural,tiny'; an unknown option raises and lists the known ones."""
  given = {part for part in (arg or '').split(',') if part}
  unknown = given - set(known)
  if unknown:
    raise ValueError(
      f'unknown option {", ".join(sorted(unknown))} after the configuration file; '
      f'known: {", ".join(known)}'
    )
  return given


def base() -> ConfigDict:
  """Less is More's training settings (arXiv 2308.12114), no coefficient, K = 0."""
  config = ConfigDict()
  config.name = 'run'
  config.seed = 0
  config.tasks = ('segmentation',)
  # Weights to begin with, see msp.initial: a folder that --mode compact wrote, another
  # run's work directory, a PyTorch ResNet-D as .safetensors or .npz. The backbone's
  # widths are theirs, whatever model.width says.
  config.initial = ''

  config.data = ConfigDict()
  config.data.name = 'celebamask_hq'
  config.data.source = ''  # folder with the published files
  config.data.prepared = 'datasets/prepared'  # ArrayRecord copies go here
  config.data.image_size = (256, 256)  # rows, columns
  config.data.hold_out = 0.0  # share of train kept for λ
  config.data.flip = True
  config.data.train_share = 1.0  # of the rest of train, drawn by `seed`
  # Share of train images that lack one task's label; of a part of train, on average.
  config.data.missing = 0.0
  config.data.procedural_images = 0  # > 0: render that many images as `source`
  config.data.eval_examples = 0  # of val and of test; 0: all

  config.model = ConfigDict()
  config.model.depth = 50  # 18 | 50 | 101
  config.model.blocks = config_dict.placeholder(tuple)  # None: those of `depth`
  config.model.block = config_dict.placeholder(str)  # 'basic' | 'bottleneck'
  config.model.width = 1.0
  config.model.norm = 'batch'  # 'batch' | 'group'
  config.model.dtype = 'float32'  # of the computation; parameters are float32
  config.model.head_features = 256
  config.model.dropout = 1.0  # factor on the heads' published rates
  # 'auto' (by the device) | 'lax' (XLA's own) | 'folded' | 'mixed' | 'matmul'
  config.model.convolution_implementation = 'auto'

  config.loss = ConfigDict()
  config.loss.combination = 'uncertainty'  # 'sum' | 'fixed' | 'uncertainty'
  config.loss.weights = ()  # of 'fixed', in the order of the tasks
  # 'output' (1/8, as published; edges at the labels') | 'label'
  config.loss.resolution = 'output'
  config.loss.edges = 'huber'  # 'huber' | 'balanced'
  config.loss.depth = 'squared'  # 'squared' (published) | 'combined'

  # θ⁰'s optimiser. Entries name transforms of msp.transforms or optax, or your own
  # ('module:function'); the last one makes the step. A learning_rate may be a
  # schedule: dict(name='cosine_decay_schedule', …).
  adamw = dict(name='adamw', learning_rate=1e-4, weight_decay=0.1)
  config.optimizer = [ConfigDict(adamw | dict(eps=1e-6, eps_root=1e-16))]

  config.meta = ConfigDict()
  config.meta.inner_steps = 0  # K
  config.meta.episodes = 'all'  # 'all' subsets | 'full' | a number drawn a step
  config.meta.exact = True  # θ⁰'s gradient through the inner steps
  config.meta.optimizer = [
    ConfigDict(dict(name='clip_by_weight_norm', max_ratio=1.0)),
    ConfigDict(dict(name='sgd', learning_rate=1e-2)),
  ]
  config.meta.unroll = 'auto'  # 'yes' | 'no' | 'auto': few steps on CPU, else no

  config.sparsity = ConfigDict()
  config.sparsity.coefficient = 'none'  # 'none' | 'frozen' | 'fixed' | 'learned'
  config.sparsity.value = 0.0  # λ, if fixed
  config.sparsity.start = 1e-2  # λ/λ_max at the start, if learned
  config.sparsity.penalty = 'group_lasso'  # see msp.optimizers.penalty
  config.sparsity.penalty_options = ConfigDict()  # None: as msp.prox has it
  config.sparsity.penalty_options.mix = config_dict.placeholder(float)  # sparse group
  config.sparsity.penalty_options.gamma = config_dict.placeholder(float)  # MCP
  config.sparsity.penalty_options.a = config_dict.placeholder(float)  # SCAD
  config.sparsity.axis = 'in'  # 'in' | 'out' | 'weight' | 'coupled'
  config.sparsity.pattern = r'backbone/.*kernel'
  config.sparsity.granularity = 'scalar'  # 'scalar' | 'stage' | 'layer'
  # Of the outer prox: 'adam' | 'euclidean'; the inner one follows its optimiser.
  config.sparsity.metric = 'adam'
  config.sparsity.min_alive = 1  # groups of each layer that survive
  # Share of the steps, the last ones, in which dead groups stay dead, see
  # msp.transforms.freeze_dead, and λ stands still (a budget: until it is met).
  config.sparsity.settle = 0.0
  # 'forward' | 'reverse' | 'truncated' | 'implicit' | 'online': msp/hypergradient.py
  config.sparsity.hypergradient = 'forward'
  config.sparsity.truncation = 1  # of 'truncated': steps it sees
  config.sparsity.solver = ConfigDict()  # of 'implicit'
  config.sparsity.solver.name = 'cg'  # 'cg' | 'neumann'
  config.sparsity.solver.tolerance = 1e-3
  config.sparsity.solver.max_iterations = 50
  config.sparsity.tangent_decay = 0.99  # of 'online'
  config.sparsity.tangent_max_norm = 1.0  # of 'online', relative to the weights
  config.sparsity.objective = 'holdout'  # 'holdout' | 'tolerance' | 'budget'
  config.sparsity.learn_on = 'hold_out'  # 'hold_out' (see data.hold_out) | 'query'
  # ε: relative, at least one standard error; of losses next to 0 see msp.objectives.
  config.sparsity.tolerance = 0.0
  config.sparsity.search = 0.0  # of 'tolerance': share of the steps, see msp.objectives
  config.sparsity.target = 0.5  # of 'budget': the share to remove, of
  # 'groups' | 'weights' | 'flops', of what a convolution reads and writes by itself:
  # removing an input channel nobody else reads saves its writers too, see --mode
  # compact. Exact with axis=coupled.
  config.sparsity.measure = 'groups'
  # Share of the steps in which it is approached, until dead groups stay dead at most;
  # under 'holdout' the share that may be dead grows from 0 to 1 in them, 0: any may.
  config.sparsity.rise = 0.6
  # ρ's optimiser under each objective. A hypergradient has no scale of its own; the
  # signal of a constraint has: it is 0 where the constraint holds exactly.
  bounds = dict(name='bounded', lower=-6.9, upper=0.0)
  follow = dict(name='sgd', learning_rate=0.02)
  config.sparsity.optimizers = ConfigDict()
  config.sparsity.optimizers.holdout = [
    ConfigDict(dict(name='scale_by_mean_magnitude', decay=0.95, clip=3.0)),
    ConfigDict(follow | dict(momentum=0.9)),
    ConfigDict(dict(name='retreat', rate=0.1)),
    ConfigDict(bounds),
  ]
  constraint = [
    # Groups die, and losses rise, tens of steps after λ has grown.
    ConfigDict(dict(name='anticipate', horizon=20.0, decay=0.95)),
    ConfigDict(dict(name='clip', max_delta=1.0)),
    ConfigDict(follow),
    ConfigDict(bounds),
  ]
  config.sparsity.optimizers.tolerance = constraint
  config.sparsity.optimizers.budget = copy.deepcopy(constraint)
  # λ_max is of the first gradients, and later ones may be larger: no bound on what
  # has to be met, but 10 λ_max.
  config.sparsity.optimizers.budget[-1].upper = 2.3

  config.train = ConfigDict()
  config.train.steps = 65_600
  config.train.batch_size = 32  # K > 0: half support, half query
  config.train.log_every = 50
  config.train.evaluate_every = 656  # and a checkpoint
  # Before an evaluation the statistics of batch norms are estimated anew on as many
  # batches, θ fixed; 0: the running averages of training.
  config.train.statistics_batches = 20
  config.train.patience = 10  # evaluations without a better score; 0: never stop
  # The noise of a hypergradient makes ρ wander: by 3 nats within 130 steps of about
  # 3e-3. Early on it has to move, later on to stay.
  _step_of_rho(config, 'holdout', exponential(config, 4e-3, 0.02))
  return config


def celeba() -> ConfigDict:
  """CelebAMask-HQ with the three tasks of Less is More."""
  config = base()
  config.data.source = 'datasets/CelebAMask-HQ'
  config.tasks = ('segmentation', 'male', 'smiling')
  return config


def nyud() -> ConfigDict:
  """NYU-v2 with the three tasks and the settings of Less is More."""
  config = base()
  config.data.name = 'nyud_mt'
  config.data.source = 'datasets/NYUD_MT'
  config.tasks = ('segmentation', 'depth', 'normals')
  config.train.batch_size = 16
  config.train.evaluate_every = 50  # an epoch of the published 795 images
  config.train.steps = 50_000
  config.train.patience = 25
  return config


def camvid() -> ConfigDict:
  """CamVid with dense and image-level tasks; the published recipe otherwise."""
  config = base()
  config.data.name = 'camvid'
  config.data.source = 'datasets/CamVid'
  config.data.image_size = (360, 480)
  config.tasks = ('segmentation', 'edges', 'presence_bicyclist', 'presence_fence')
  config.train.batch_size = 16
  config.train.steps = 12_000
  config.train.evaluate_every = 120
  config.train.patience = 25
  return config


def learn_coefficient(config: ConfigDict) -> None:
  """Makes it Meta-Sparsity: inner steps, and λ learned on a part of train."""
  config.meta.inner_steps = 3
  config.sparsity.coefficient = 'learned'
  config.sparsity.settle = 0.4
  config.data.hold_out = 0.2


def name(stem: str, given: set[str]) -> str:
  """Name of a run: 'celeba_meta-procedural-tiny'."""
  return '-'.join([stem, *sorted(given)])


def apply(config: ConfigDict, given: set[str]) -> None:
  """Applies the options that mean the same in every configuration."""
  if 'fixed' in given:
    config.sparsity.coefficient = 'fixed'
    config.sparsity.value = 1e-6 if config.data.name == 'nyud_mt' else 1e-5
    config.data.hold_out = 0.0
  if 'procedural' in given:
    faces = ('datasets/procedural_faces', 3000)
    rooms = ('datasets/procedural_rooms', 1500)
    config.data.source, config.data.procedural_images = (
      rooms if config.data.name == 'nyud_mt' else faces
    )
  if 'tiny' in given:
    tiny(config)


def _steps(config):
  """Follows train.steps; as a product it is not set the other way round."""
  return config.train.get_ref('steps') * 1


def cosine(config: ConfigDict, peak: float) -> ConfigDict:
  """A step size that falls from `peak` to 0 in train.steps."""
  return ConfigDict(
    dict(name='cosine_decay_schedule', init_value=peak, decay_steps=_steps(config))
  )


def exponential(config: ConfigDict, start: float, end: float) -> ConfigDict:
  """A step size that falls from `start` to `end` · start in train.steps."""
  schedule = dict(name='exponential_decay', init_value=start, decay_rate=end)
  return ConfigDict(schedule | dict(transition_steps=_steps(config)))


def warmup_cosine(config: ConfigDict, peak: float) -> ConfigDict:
  """A step size that rises from 0 to `peak` in a twentieth of train.steps, then falls.

  The first steps of Adam move all weights by the full step size: that can kill every
  ReLU of a layer without a norm at once.
  """
  steps = _steps(config)
  schedule = dict(name='warmup_cosine_decay_schedule', init_value=0.0, peak_value=peak)
  return ConfigDict(schedule | dict(warmup_steps=steps // 20, decay_steps=steps))


def _step_of_rho(config, objective, schedule):
  """Gives ρ a step size under one objective."""
  entries = list(config.sparsity.optimizers[objective])
  (at,) = (i for i, entry in enumerate(entries) if 'learning_rate' in entry)
  entries[at] = ConfigDict(entries[at].to_dict() | dict(learning_rate=schedule))
  config.sparsity.optimizers[objective] = entries


def tiny(config: ConfigDict) -> None:
  """Minutes on two CPU cores: a narrow ResNet on small pictures, little data.

  With so little data a network soon learns it by heart, which is when sparsity pays.
  """
  config.model.blocks = (1, 1, 1, 1)
  config.model.block = 'basic'
  config.model.width = 0.25
  config.model.head_features = 32
  config.model.dropout = 0.0
  config.loss.resolution = 'label'
  adamw = config.optimizer[0].to_dict() | dict(
    learning_rate=warmup_cosine(config, 2e-3)
  )
  config.optimizer = [ConfigDict(adamw)]
  config.meta.episodes = 'full'
  config.meta.exact = False
  config.meta.inner_steps = min(config.meta.inner_steps, 1)
  if config.sparsity.coefficient == 'fixed':
    # Kills about half of the groups; the published one kills none here.
    config.sparsity.value = 5e-3
  config.sparsity.settle = 0.4
  config.sparsity.objective = 'tolerance'
  schedule = cosine(config, 0.05)
  # Not to 0: a target that is still missed when dead groups stay dead has to be met.
  schedule.alpha = 0.3
  _step_of_rho(config, 'budget', schedule)
  # It falls: what few images in a batch say is noise. But not to a fiftieth, as λ has
  # to follow the one that is just tolerated, which grows.
  _step_of_rho(config, 'tolerance', exponential(config, 0.05, 0.1))
  config.train.steps = 420
  config.train.log_every = 5
  config.train.evaluate_every = 60
  config.train.patience = 0
  if config.data.procedural_images:
    config.data.procedural_images = 400
  if config.data.name in ('camvid', 'nyud_mt'):
    if config.meta.inner_steps:  # as many query images a step as without them
      config.train.batch_size *= 2
    config.loss.edges = 'balanced'
    config.sparsity.tolerance = 0.05
  if config.data.name == 'camvid':
    config.data.image_size = (72, 96)
    # 14 nats in all, 6 of them in the search; the whole range of ρ is 6.9. The λ that
    # is just tolerated grows as the network learns its images by heart, so the step
    # has to stay large enough to follow; a larger one goes round the bound instead. On
    # rooms so large a first step overshoots and cannot come back.
    _step_of_rho(config, 'tolerance', exponential(config, 0.15, 0.01))
    config.sparsity.optimizers.tolerance[0].horizon = 40.0
    config.sparsity.search = 0.125
    config.tasks = ('segmentation', 'edges', 'presence_bicyclist')
  elif config.data.name == 'nyud_mt':
    config.data.image_size = (48, 64)
  else:
    config.data.image_size = (48, 48)
    # A smile takes thousands of steps at this size, glasses take a hundred.
    config.tasks = ('segmentation', 'male', 'eyeglasses')
    config.sparsity.tolerance = 0.1
    if config.data.hold_out:
      config.data.hold_out = 0.25
