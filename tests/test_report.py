"""The report of every sort of run, finished or not, from invented logs."""

import base64
import html
import json
import math
import re

import matplotlib
import numpy as np
import pytest

from msp import figures, report
from msp.errors import UserError

TASKS = ('segmentation', 'edges', 'smiling', 'high_cheekbones')
LAMBDA_MAX = 0.0125


def configuration(**changes):
  return {
    'name': 'my_run',
    'seed': 7,
    'tasks': list(TASKS),
    'data': {'name': 'celebamask_hq', 'image_size': [24, 32], 'source': '<a> & $b'},
    'optimizer': [{'name': 'adamw', 'learning_rate': 1e-3}],
    'train': {'steps': 60},
    **changes,
  }


def metric_rows(kind, layers, steps=60):
  """What a run logs; λ runs from 1e-2 λ_max up, one task is absent now and then."""
  rng = np.random.default_rng(0)
  rows = []
  for step in range(1, steps + 1):
    row = {'split': 'train', 'step': step, 'loss': 1 / step, 'step_time': 0.25}
    for i, task in enumerate(TASKS):
      row[f'loss/{task}'] = None if (step + i) % 7 == 0 else 1 / step + i
    row |= {'group_sparsity': 0.0, 'weight_sparsity': 0.0}
    if kind != 'dense':
      relative = 0.01 * np.exp(0.02 * step * (kind != 'fixed'))
      row |= {'lambda': LAMBDA_MAX * relative, 'lambda_relative': relative}
      row |= {'group_sparsity': 0.4 * step / steps, 'weight_sparsity': 0.31}
    if kind in ('learned', 'by_layer'):
      row |= {'hypergradient': rng.standard_t(2) * 1e-3, 'hold_out_loss': 1.1 / step}
    if kind == 'tolerance':
      row |= {'violation': -0.5, 'hold_out_loss': 1.1 / step}
      for task in TASKS[:2]:
        row |= {f'gap/{task}': -0.02, f'gap_allowed/{task}': 0.01}
    if kind == 'by_layer':
      row |= {f'lambda/{name}': 1e-4 * (1 + i) for i, name in enumerate(layers)}
    rows.append(row)
    if step % 20 == 0:
      rows.append({'split': 'val', 'step': step, **evaluation(step / steps)})
  rows.append({'split': 'test', 'step': steps, **evaluation(0.9)})
  return rows


def evaluation(quality):
  return {
    'loss': 2 - quality,
    'loss/segmentation': 1 - quality / 2,
    'segmentation/miou': 0.7123 * quality,
    'segmentation/iou/hair': 0.8 * quality,
    'edges/mae': 0.1,
    'edges/f1': 0.6 * quality,
    'edges/f1_threshold': 0.35,
    'smiling/accuracy': 0.9,
    'smiling/balanced_accuracy': 0.8765 * quality,
    'high_cheekbones/accuracy': 0.5,
    'score': quality,
    'alive_groups': {'stem/conv0': 3},
  }


def group_masks(layers, kind):
  rng = np.random.default_rng(1)
  sizes = np.resize([3, 64, 700, 2048], layers)
  survival = 1 if kind == 'dense' else 0.6
  masks = [rng.random(size) < survival for size in sizes]
  if kind != 'dense':
    masks[-1][:] = False  # a layer that died
  return {
    'axis': 'in',
    'layers': [
      {
        'name': f'layer{i // 9}_{i % 9}/conv1',
        'total': int(mask.size),
        'alive': mask.astype(int).tolist(),
      }
      for i, mask in enumerate(masks)
    ],
  }


def panels(classes=3, num=8, shape=(24, 32), attributes=TASKS[2:]):
  rng = np.random.default_rng(2)
  label = np.sort(rng.integers(0, classes, size=(num, *shape)), axis=1)
  edges = (np.diff(label, axis=1, prepend=0) != 0).astype(np.float32)
  arrays = {
    'image': rng.integers(0, 256, size=(num, *shape, 3)).astype(np.uint8),
    'prediction/segmentation': np.roll(label, 2, axis=1).astype(np.int32),
    'prediction/edges': np.clip(edges + 0.1, 0, 1),
  }
  label[:, :2], edges[:, :2] = 255, -1
  arrays |= {'label/segmentation': label.astype(np.int32), 'label/edges': edges}
  for name in attributes:
    arrays[f'label/{name}'] = rng.integers(0, 2, num).astype(np.int32)
    arrays[f'prediction/{name}'] = rng.random(num).astype(np.float32)
  distance = rng.uniform(0, 9, size=(num, *shape)).astype(np.float32)
  normals = np.zeros((num, *shape, 3), np.float32)
  normals[:, 4:, :, 2] = 1
  for name, x in (('depth', distance), ('normals', normals)):
    arrays |= {f'label/{name}': x, f'prediction/{name}': x}
  for key in [key for key in arrays if key.startswith('label/')]:
    name = key.removeprefix('label/')
    known = name in ('segmentation', 'edges', 'depth', 'normals')
    number = classes if name == 'segmentation' else 1
    arrays[f'classes/{name}'] = np.array([f'part {i}' for i in range(number)])
    arrays[f'kind/{name}'] = np.array(name if known else 'attribute')
  return arrays


def make_run(folder, kind='learned', layers=5, steps=60, **panel_options):
  groups = group_masks(layers, kind)
  names = [layer['name'] for layer in groups['layers']]
  rows = metric_rows(kind, names, steps)
  (folder / 'config.json').write_text(json.dumps(configuration()))
  (folder / 'groups.json').write_text(json.dumps(groups))
  np.savez(folder / 'predictions.npz', **panels(**panel_options))
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return folder


def text_of(page):
  """What a reader sees: no style, no tags, no pictures; spaces collapsed."""
  text = re.sub(r'<style>.*?</style>', ' ', page, flags=re.S)
  return re.sub(r'\s+', ' ', html.unescape(re.sub(r'<[^>]*>', '', text)))


def check(folder, expected):
  """The page is alone in the world and shows exactly the expected figures."""
  path = report.write(folder)
  assert path == folder / 'report' / 'index.html'
  page = path.read_text()
  assert not re.search(r'(src|href)\s*=\s*"(?!data:)', page)
  assert not re.search(r'https?://|url\(|@import|<script', page)
  assert {p.stem for p in path.parent.glob('*.png')} == set(expected)
  embedded = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
  files = {p.read_bytes() for p in path.parent.glob('*.png')}
  assert {base64.b64decode(data) for data in embedded} == files
  assert len(embedded) == len(expected)
  assert 'NaN' not in text_of(page)
  assert 'None' not in text_of(page)
  return text_of(page)


EVERY = ['predictions', 'coefficient', 'sparsity', 'groups', 'losses', 'validation']


def test_learned(tmp_path):
  text = check(make_run(tmp_path), EVERY)
  for part in (
    'my_run',
    'celebamask_hq · 24 × 32 pixels · 4 tasks · seed 7 · 0.25 s a step',
    '60 steps · λ learned from 1.28·10−4 → 4.15·10−4 (0.0102 → 0.0332 λmax)',
    'segmentation0.641mIoU, test',
    'smiling0.789balanced accuracy, test',
    'high cheekbones0.500accuracy, test',
    'validation, step 60',
    '31.0% of the weights',
    '"adamw"',
    '<a> & $b',
  ):
    assert part in text, part
  groups = json.loads((tmp_path / 'groups.json').read_text())['layers']
  total = sum(layer['total'] for layer in groups)
  alive = sum(sum(layer['alive']) for layer in groups)
  counted = f'{1 - alive / total:.1%} of the groups exactly zero'
  assert f'{counted} ({total - alive:,} of {total:,})' in text
  assert 'Incomplete' not in text
  assert 'stand-in' not in text


def test_one_coefficient_for_each_of_many_layers(tmp_path):
  text = check(make_run(tmp_path, 'by_layer', layers=36), EVERY)
  assert 'mean λ learned from' in text
  assert 'layer3_8/conv1' in text


def test_tolerance(tmp_path):
  text = check(make_run(tmp_path, 'tolerance'), [*EVERY, 'constraint'])
  assert 'λ learned from' in text
  assert 'dense twin' in text


def test_fixed(tmp_path):
  text = check(make_run(tmp_path, 'fixed'), [n for n in EVERY if n != 'coefficient'])
  assert 'λ fixed at 1.25·10−4 (0.01 λmax)' in text


def test_dense(tmp_path):
  text = check(make_run(tmp_path, 'dense'), ['predictions', 'losses', 'validation'])
  assert 'no sparsity coefficient (dense)' in text
  assert 'Sparsity' not in text


@pytest.mark.parametrize(
  ('coefficient', 'words'),
  [
    ('frozen', 'no sparsity coefficient, dead groups kept dead'),
    ('learned', 'λ not logged yet'),
  ],
)
def test_a_log_without_a_coefficient_is_not_always_of_a_dense_run(
  tmp_path, coefficient, words
):
  make_run(tmp_path, 'dense')
  config = json.loads((tmp_path / 'config.json').read_text())
  config.setdefault('sparsity', {})['coefficient'] = coefficient
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert words in report.write(tmp_path).read_text()


def test_a_learned_λ_that_only_stood_still_is_not_fixed(tmp_path):
  make_run(tmp_path, 'fixed')
  config = json.loads((tmp_path / 'config.json').read_text())
  config.setdefault('sparsity', {})['coefficient'] = 'learned'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert 'λ learned from 1.25·10−4' in check(tmp_path, EVERY)


def test_stand_in_says_so(tmp_path):
  config = configuration(data={'name': 'celebamask_hq', 'procedural_images': 1000})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  row = {'split': 'train', 'step': 1, 'loss': 1.0}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(row))
  text = check(tmp_path, ['losses'])
  assert 'celebamask_hq (procedural stand-in)' in text
  assert 'Not real data.' in text


def test_a_stand_in_by_its_path_says_so(tmp_path):
  make_run(tmp_path)
  assert 'Not real data.' not in check(tmp_path, EVERY)
  log = tmp_path / 'metrics.jsonl'
  log.write_text(log.read_text().replace('"test",', '"test", "stand_in": true,'))
  assert 'Not real data.' in check(tmp_path, EVERY)


@pytest.mark.parametrize(('gap', 'said'), [(0.005, 'kept'), (0.02, 'not kept')])
def test_whether_the_constraint_was_kept(tmp_path, gap, said):
  make_run(tmp_path, 'tolerance')
  log = tmp_path / 'metrics.jsonl'
  violation = (gap - 0.01) / 0.01
  text = log.read_text().replace('"violation": -0.5', f'"violation": {violation}')
  log.write_text(text.replace(': -0.02', f': {gap}'))
  config = configuration(sparsity={'coefficient': 'learned', 'objective': 'tolerance'})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  page = check(tmp_path, [*EVERY, 'constraint'])
  assert f'Constraint {said}.' in page
  assert f'{math.expm1(gap):.1%} above the twin' in page


def test_what_removal_would_save(tmp_path):
  make_run(tmp_path)
  log = tmp_path / 'metrics.jsonl'
  costs = '"backbone_flops": 100, "backbone_flops_compact": 41,'
  log.write_text(log.read_text().replace('"test",', f'"test", {costs}'))
  assert 'backbone FLOPs ×0.41 without dead channels' in check(tmp_path, EVERY)


def test_groups_of_single_weights_are_not_missed(tmp_path):
  make_run(tmp_path)
  (tmp_path / 'groups.json').unlink()
  figures = ['predictions', 'coefficient', 'sparsity', 'losses', 'validation']
  assert 'groups.json is not there' in check(tmp_path, figures)
  config = configuration(sparsity={'axis': 'weight'})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert 'Incomplete.' not in check(tmp_path, figures)


def test_killed_after_one_row(tmp_path):
  row = {'split': 'train', 'step': 5, 'loss': None, 'lambda': 1e-4}
  row |= {'hypergradient': None, 'group_sparsity': 0.0}
  (tmp_path / 'config.json').write_text(json.dumps(configuration()))
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(row) + '\n{"split": "tra')
  (tmp_path / 'predictions.npz').write_bytes(b'PK\x03\x04 half')
  text = check(tmp_path, ['coefficient', 'sparsity', 'losses'])
  assert '5 of 60 steps' in text
  for part in (
    'Incomplete.',
    'groups.json is not there',
    'predictions.npz cannot be read',
    'the test split has not been evaluated',
    'the validation split has not been evaluated',
  ):
    assert part in text, part


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('config.json', '[]'),
    ('config.json', '{"data": 3}'),
    ('groups.json', 'null'),
    ('groups.json', '{"layers": [3]}'),
  ],
)
def test_what_is_not_what_it_should_be(tmp_path, name, content):
  make_run(tmp_path)
  (tmp_path / name).write_text(content)
  drawn = [n for n in EVERY if n != 'groups' or name != 'groups.json']
  assert f'{name} cannot be read' in check(tmp_path, drawn)


def test_evaluation_only(tmp_path):
  row = {'split': 'test', 'step': 9, **evaluation(1)}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(row))
  text = check(tmp_path, [])
  assert tmp_path.name in text
  assert 'config.json is not there' in text
  assert '0.712' in text


def test_last_and_best_state(tmp_path):
  make_run(tmp_path)
  best = {'split': 'test_best', 'step': 40, **evaluation(1)}
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(best) + '\n')
  text = check(tmp_path, EVERY)
  assert 'test, step 60' in text
  assert 'test, best checkpoint, step 40' in text
  assert 'segmentation0.641mIoU, test' in text  # of the last, not of the best


@pytest.mark.parametrize('classes', [19, 40])
def test_many_classes_without_attributes(tmp_path, classes):
  make_run(tmp_path, classes=classes, num=2, attributes=())
  text = check(tmp_path, EVERY)
  assert 'Edges: white on black' in text
  assert 'Badges' not in text


def test_writing_again_leaves_nothing_behind(tmp_path):
  make_run(tmp_path)
  report.write(tmp_path)
  (tmp_path / 'groups.json').unlink()
  text = check(tmp_path, [n for n in EVERY if n != 'groups'])
  assert '40.0% of the groups exactly zero' in text


def test_no_metrics(tmp_path):
  with pytest.raises(UserError, match=r'no .*metrics.jsonl: is this the work'):
    report.write(tmp_path)
  for content in ('', '{"split": "tra'):
    (tmp_path / 'metrics.jsonl').write_text(content)
    with pytest.raises(UserError, match='has no row yet'):
      report.write(tmp_path)
  assert not (tmp_path / 'report').exists()


def test_no_place_for_the_report(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"split": "train", "step": 1}')
  (tmp_path / 'report').touch()
  with pytest.raises(UserError, match=r'cannot make .*report: File exists'):
    report.write(tmp_path)


def test_colors_of_nineteen_classes_differ():
  colors = figures.class_colors(['background', *map(str, range(18))])
  distance = np.linalg.norm(
    np.subtract.outer(colors, colors).diagonal(0, 1, 3), axis=-1
  )
  assert (distance + np.eye(19)).min() > 0.1


def test_steps_in_which_a_constraint_overrules_the_hypergradient_are_shaded():
  rows = [
    {'step': step, 'lambda': 0.1, 'hypergradient': -1.0, 'violation': violation}
    for step, violation in enumerate([-1.0, 0.5, -1.0, 0.5, 0.5])
  ]
  top = figures.coefficient(rows, []).axes[0]
  spans = [(p.get_x(), p.get_x() + p.get_width()) for p in top.patches]
  assert spans == [(1, 2), (3, 4)]


def test_no_text_is_cut_off(tmp_path):
  """Every text of every figure lies inside it, long names and many layers too."""
  make_run(tmp_path, 'by_layer', layers=55, attributes=(*TASKS[2:], 'arched_eyebrows'))
  log = report.read(tmp_path)
  metrics = {task: ['balanced_accuracy', 'auroc'] for task in TASKS}
  names = [layer.name for layer in log.layers]
  with matplotlib.rc_context(figures.STYLE):
    for figure in (
      figures.predictions(log.image, log.panels),
      figures.coefficient(log.train, names),
      figures.sparsity(log.train, log.validation),
      figures.losses(log.train, log.validation, TASKS),
      figures.validation(log.validation, metrics),
      figures.groups(log.layers),
    ):
      figure.draw_without_rendering()
      drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
      assert min(drawn.x0, drawn.y0) > -0.01
      assert drawn.x1 < width + 0.01
      assert drawn.y1 < height + 0.01


def test_labels_become_colours_by_hand():
  grey = np.full((1, 2, 3), 255, np.uint8)
  paint = lambda kind, values, classes=(): figures._PAINT[kind](
    np.array([values]), grey, classes
  )[0]
  # Red is to the right, green up, blue towards the viewer; black has none.
  right, none = paint('normals', [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(right, [1, 0.5, 0.5])
  np.testing.assert_array_equal(none, 0)
  near, unmeasured = paint('depth', [0.5, 0.0])
  assert near.mean() > paint('depth', [9.0, 0.0])[0].mean() > 0
  np.testing.assert_array_equal(unmeasured, 0)
  edge, unknown = paint('edges', [1.0, -1.0])
  np.testing.assert_array_equal(edge, 1)
  np.testing.assert_array_equal(unknown, 0.5)
  sky, ignored = paint('segmentation', [0, 255], ('sky', 'road'))
  np.testing.assert_allclose(ignored, 1)  # white over white
  np.testing.assert_allclose(sky, 0.35 + 0.65 * np.array(figures.class_colors('ab')[0]))
