"""The work directory: whose it is, and files that are whole or absent."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import celeba_meta
from data import Label
from msp import groups as gr
from msp import workdir
from msp.errors import UserError
from msp.models import multitask
from msp.tasks import make
from tests.networks import small_network


def config(**kwargs):
  return ConfigDict({'name': 'a', 'tasks': ('x', 'y'), 'train': {'steps': 3, **kwargs}})


def test_the_first_claim_writes_the_configuration_and_others_keep_it(tmp_path):
  folder = tmp_path / 'runs' / 'one'
  workdir.claim(folder, config())
  written = (folder / 'config.json').read_bytes()
  assert json.loads(written)['train'] == {'steps': 3}
  workdir.claim(folder, config())
  assert (folder / 'config.json').read_bytes() == written
  assert [p.name for p in folder.iterdir()] == ['config.json']


def test_another_configuration_is_refused_and_told_apart(tmp_path):
  workdir.claim(tmp_path, config())
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(UserError) as caught:
    workdir.claim(tmp_path, config(steps=4, rate=0.1))
  message = str(caught.value)
  assert 'train.steps was 3, now 4' in message
  assert 'train.rate was absent, now 0.1' in message
  assert 'name' not in message
  assert '--workdir' in message
  assert '\n' not in message
  assert (tmp_path / 'config.json').read_bytes() == before


def test_of_many_differences_what_was_set_is_told_first(tmp_path):
  made = celeba_meta.get_config('procedural,tiny')
  workdir.claim(tmp_path, made)
  made.train.steps = 9  # and with it the schedules of every optimiser
  made.sparsity.optimizers.budget = made.sparsity.optimizers.budget[1:]
  with pytest.raises(UserError) as caught:
    workdir.check(tmp_path, made)
  message = str(caught.value)
  assert 'configuration: train.steps was 420, now 9; ' in message
  assert 'optimizer[0].learning_rate.decay_steps was 420, now 9; ' in message
  assert "sparsity.optimizers.budget was [{'name': 'anticipate'" in message
  assert '; …. Choose' in message


def test_what_only_moved_is_the_same(tmp_path):
  def placed(root, start='sweep/start/0'):
    made = config()
    made.data = ConfigDict({'source': f'{root}/set'})
    made.initial = f'{root}/{start}'
    return made

  workdir.claim(tmp_path, placed('/old'))
  workdir.check(tmp_path, placed('/new'))
  with pytest.raises(UserError, match='initial was /old/sweep/start/0, now'):
    workdir.check(tmp_path, placed('/new', 'another/start/0'))


def test_checkpoints_without_their_configuration_are_nobodys(tmp_path):
  (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
  with pytest.raises(UserError, match=r'config\.json is missing'):
    workdir.claim(tmp_path, config())
  assert not (tmp_path / 'config.json').exists()


def test_a_sweep_has_a_directory_of_its_own(tmp_path):
  workdir.claim_for_sweep(tmp_path / 'sweep', 'one')
  workdir.claim_for_sweep(tmp_path / 'sweep', 'one')
  with pytest.raises(UserError, match='belongs to sweep one'):
    workdir.claim_for_sweep(tmp_path / 'sweep', 'two')
  with pytest.raises(UserError, match='belongs to a sweep'):
    workdir.claim(tmp_path / 'sweep', config())
  workdir.claim(tmp_path / 'run', config())
  with pytest.raises(UserError, match='belongs to a run'):
    workdir.claim_for_sweep(tmp_path / 'run', 'one')
  (tmp_path / 'sweep' / 'sweep.json').write_text('[1]')
  with pytest.raises(UserError, match=r'cannot read .*sweep\.json'):
    workdir.claim_for_sweep(tmp_path / 'sweep', 'one')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write to work directory'):
    workdir.claim_for_sweep(tmp_path / 'file' / 'sweep', 'one')


def test_checking_writes_nothing(tmp_path):
  workdir.check(tmp_path / 'runs' / 'one', config())
  assert list(tmp_path.iterdir()) == []
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='Not a directory'):
    workdir.check(tmp_path / 'file' / 'run', config())


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write to work directory .*file/run'):
    workdir.claim(tmp_path / 'file' / 'run', config())


@pytest.mark.parametrize('content', ['{"name"', '[]', 'null'])
def test_a_damaged_configuration_is_named(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match=r'cannot read .*config\.json'):
    workdir.claim(tmp_path, config())


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left')])
def test_an_interrupted_write_leaves_the_old_content(tmp_path, error):
  path = tmp_path / 'file'
  workdir.write(path, b'old')

  def fail(f):
    f.write(b'ne')
    raise error

  with pytest.raises(type(error)):
    workdir.write(path, fail)
  assert path.read_bytes() == b'old'
  # A full disk is not filled further; what a kill leaves is written over.
  if isinstance(error, OSError):
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_groups_are_written_by_layer(tmp_path):
  kernel = np.ones((1, 1, 3, 2), np.float32)
  kernel[:, :, 1] = 0
  params = {'backbone': {'layer1_0': {'conv1': {'kernel': kernel}}}}
  workdir.write_groups(tmp_path, gr.find(params), params)
  assert json.loads((tmp_path / 'groups.json').read_text()) == {
    'axis': 'in',
    'layers': [{'name': 'layer1_0/conv1', 'total': 3, 'alive': [1, 0, 1]}],
  }


def test_layers_are_listed_as_the_network_runs(tmp_path):
  kernel = np.ones((1, 1, 3, 2), np.float32)
  names = ['stem_conv1', 'layer1_0', 'layer3_2', 'layer3_10']
  params = {'backbone': {name: {'kernel': kernel} for name in reversed(names)}}
  workdir.write_groups(tmp_path, gr.find(params), params)
  layers = json.loads((tmp_path / 'groups.json').read_text())['layers']
  assert [layer['name'] for layer in layers] == names


def test_streams_are_listed_as_they_are_coupled(tmp_path):
  model = small_network('basic', (1, 1, 1, 1))
  params = multitask.init(model, jax.random.key(0), (32, 32, 3))[0]
  found = gr.find(params, axis='coupled', streams=multitask.streams(model))
  workdir.write_groups(tmp_path, found, params)
  layers = json.loads((tmp_path / 'groups.json').read_text())['layers']
  assert [layer['name'] for layer in layers] == list(map(gr.short_name, found.layers))


def test_predictions_leave_padding_out(tmp_path):
  batch = {
    'image': np.full((3, 2, 2, 3), 0.5, np.float32),
    'valid': np.array([True, True, False]),
    'x': np.array([1, 0, 1], np.int32),
  }
  predictions = {'x': np.array([0.25, 0.5, 0.75], np.float32)}
  tasks = make(['x'], {'x': Label('attribute', ('no', 'yes'))})
  workdir.write_predictions(tmp_path, batch, predictions, tasks)
  with np.load(tmp_path / 'predictions.npz') as saved:
    assert saved['image'].shape == (2, 2, 2, 3)
    assert saved['image'].dtype == np.uint8
    assert saved['image'][0, 0, 0, 0] == 128
    np.testing.assert_array_equal(saved['label/x'], [1, 0])
    np.testing.assert_array_equal(saved['prediction/x'], [0.25, 0.5])
    np.testing.assert_array_equal(saved['classes/x'], ['no', 'yes'])
    assert str(saved['kind/x']) == 'attribute'


def test_one_process_at_a_time(tmp_path):
  told = pytest.raises(UserError, match=f'another process is training in {tmp_path}')
  with workdir.exclusive(tmp_path), told, workdir.exclusive(tmp_path):
    pass
  with workdir.exclusive(tmp_path):
    pass


def test_a_directory_tells_its_configuration(tmp_path):
  made = celeba_meta.get_config('procedural,tiny')
  workdir.claim(tmp_path, made)
  read = workdir.configuration(tmp_path)
  workdir.claim(tmp_path, read)
  assert read.tasks == made.tasks
  assert read.optimizer[0].learning_rate.peak_value == 2e-3
  (tmp_path / 'config.json').write_text('{"name"')
  with pytest.raises(UserError, match=r'cannot read .*config\.json'):
    workdir.configuration(tmp_path)
