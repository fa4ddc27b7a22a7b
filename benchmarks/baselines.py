"""Learned sparsity against pruning after training.

  python -m benchmarks.baselines camvid --source /path/to/CamVid --out DIR
  python -m benchmarks.baselines faces --out DIR
  ... --learned 'budget 0.7' --seeds 3 --steps 420 --tune 140

A dense run and one with learned λ (a row of benchmarks/learned_lambda.py) are trained
for --steps. The learned one is compacted. The dense one is pruned, by magnitude, at
random and by the first-order change of the loss: to as many groups in each layer as the
learned run has left ('layers', FLOPs as they come), or by rank in the whole network to
at most its backbone FLOPs ('global'). All are compacted, and with the dense network
trained on for --tune more steps. Ends with DIR/table.md: mean ± standard deviation over
seeds. An --out is for one choice of --steps and --tune.

Every run is an ordinary one, in DIR/<row>/<seed> or DIR/<learned>,_<row>/<seed>; the
same command goes on after a kill.
"""

import sys

import jax

import data
from benchmarks import learned_lambda
from msp import compact, dataset, measure, prune, sweep
from msp import groups as gr
from msp import tasks as task_module
from msp.checkpoint import Checkpoints
from msp.episodes import Combination, task_losses
from msp.errors import UserError
from msp.experiment import build
from msp.metrics import delta_m
from msp.workdir import write

TUNE = {'sparsity.coefficient': 'none', 'meta.inner_steps': 0}


class Network:
  """The final state of a run, with what is needed to prune it."""

  def __init__(self, config, workdir):
    """Reads the latest checkpoint."""
    self.config = config
    self.experiment = build(config, data.labels(config.data.name))
    with Checkpoints(workdir) as checkpoints:
      state = checkpoints.restore_any(checkpoints.latest_step())
    state = jax.device_get(state)
    self.params, self.stats = state['params'], state['batch_stats']

  def compacted(self, params):
    """The compact network, and its backbone's FLOPs an image."""
    result = compact.compact(self.experiment.model, params, self.stats)
    shape = (*self.config.data.image_size, 3)
    return result, measure.kernel_flops(result.model, result.params, shape)[0]

  def gradients(self, batches):
    """Mean gradient of the summed losses over some batches."""
    e = self.experiment
    loss = lambda params, batch: task_losses(
      e.model,
      e.tasks,
      Combination('sum', {}),
      params,
      self.stats,
      batch,
      jax.random.key(0),
    )[0]
    slope = jax.jit(jax.grad(loss))
    found = [slope(self.params, batch) for batch in batches]
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)

  def pruned(self, scores, alive, flops):
    """Pruned to counts for each layer, and by rank to at most some FLOPs; compacted."""
    groups = self.experiment.groups
    apply = lambda keep: self.compacted(
      jax.device_get(gr.remove(groups, self.params, keep))
    )
    low, high, ranked = 0.0, 1.0, None
    for _ in range(10):
      share = (low + high) / 2
      found = apply(prune.keep_globally(scores, share))
      if found[1] > flops:
        low = share
      else:
        high, ranked = share, found
    return {'layers': apply(prune.keep_per_layer(scores, alive)), 'global': ranked}


def tune(config, source, steps, workdir):
  """Rows of a run that starts from a compact network."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(TUNE)
  config.initial = str(source)
  config.train.steps = config.train.evaluate_every = steps
  # Up to a quarter of the largest step size of training, and down to nothing.
  rate = config.optimizer[0].learning_rate
  rate.peak_value, rate.decay_steps = rate.peak_value / 4, steps
  return sweep.ensure_trained(config, workdir)


def runs_of(arguments):
  """The two runs that everything begins with."""
  names = f'dense,{arguments.learned}'
  return learned_lambda.make(
    arguments.data_set, names, arguments.seeds, arguments.source, arguments.steps
  )


def one_seed(arguments, seed):
  """Name -> (test metrics, backbone FLOPs relative to dense), of one seed."""
  out = lambda name: sweep.folder(arguments.out, name, seed)
  test = lambda rows: next(row for row in rows if row['split'] == 'test')
  results, trained = {}, {}
  pair = runs_of(arguments)
  for entry in pair.runs:
    config = sweep.configuration(pair, entry, seed, arguments.out)
    results[entry.name] = test(sweep.ensure_trained(config, out(entry.name))), None
    trained[entry.name] = Network(config, out(entry.name))
  dense, learned = trained['dense'], trained[arguments.learned]
  whole, small = dense.compacted(dense.params), learned.compacted(learned.params)
  networks = {'dense, tuned': whole, 'learned, tuned': small}
  groups = learned.experiment.groups
  alive = {k: int(m.sum()) for k, m in gr.alive(groups, learned.params).items()}
  c = dense.config
  stream = data.train_iterator(
    dataset.splits(c).train,
    c.tasks,
    batch_size=c.train.batch_size,
    seed=seed,
    flip=False,
  )
  gradients = dense.gradients([next(stream) for _ in range(4)])
  for criterion in prune.CRITERIA:
    scores = prune.score(
      groups, dense.params, criterion, gradients=gradients, key=jax.random.key(seed)
    )
    for how, network in dense.pruned(scores, alive, small[1]).items():
      networks[f'{criterion}, {how}'] = network
  for name, (network, work) in networks.items():
    # What is pruned depends on the learned run.
    workdir = out(f'{arguments.learned}, {name}')
    folder = workdir.with_name(f'{seed}_start')
    compact.write(folder, network)
    rows = tune(c, folder, arguments.tune, workdir)
    results[name] = test(rows), work / whole[1]
  return results


def table(results, tasks):
  """Markdown; `results` is {seed: {name: (test metrics, relative FLOPs)}}."""
  primaries = [f'{name}/{task.primary}' for name, task in tasks.items()]
  lines = [
    f'| network | backbone FLOPs x | {" | ".join(primaries)} | test loss | Δm % |',
    '|---' * (4 + len(primaries)) + '|',
  ]
  for name in next(iter(results.values())):
    found = [by_name[name] for by_name in results.values()]
    work = [ratio for _, ratio in found if ratio is not None]
    cells = [name, sweep.spread(work) if work else '–']
    for key in (*primaries, 'loss'):
      cells.append(sweep.spread([metrics[key] for metrics, _ in found]))
    against = [by_name['dense, tuned'][0] for by_name in results.values()]
    pairs = zip(found, against, strict=True)
    cells.append(sweep.spread([delta_m(m, d, tasks) for (m, _), d in pairs]))
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def main():
  arguments = learned_lambda.arguments_of(__doc__, learned='budget 0.7', tune=140)
  # Runs that differ in numbers only share their compiled programs.
  jax.config.update('jax_compilation_cache_dir', str(arguments.out / 'compiled'))
  results = {}
  try:
    pair = runs_of(arguments)
    sweep.check(pair)
    config = pair.runs[0].config
    tasks = task_module.make(config.tasks, data.labels(config.data.name))
    for seed in range(arguments.seeds):
      results[seed] = one_seed(arguments, seed)
      text = table(results, tasks)
      write(arguments.out / 'table.md', text.encode())
  except (UserError, data.DataError, FloatingPointError) as e:
    sys.exit(f'error: {e}')
  print(text)
  print(f'table: {arguments.out / "table.md"}')


if __name__ == '__main__':
  main()
