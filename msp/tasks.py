"""What a task is: its outputs, loss, metrics and picture, made from its kind."""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msp import losses, metrics, resize
from msp.errors import UserError

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

EDGE_LOSSES = {'huber': losses.huber_edges, 'balanced': losses.balanced_edges}
DEPTH_LOSSES = {'squared': losses.squared_depth, 'combined': losses.combined_depth}


class Task(NamedTuple):
  """One task; arrays are a batch (B) of logits as the head gives them."""

  name: str
  kind: str
  classes: tuple[str, ...]
  outputs: int
  """Channels of the head."""
  head: str
  """'dense' (B, h, w, outputs) or 'classification' (B, outputs)."""
  loss: Loss
  """(logits, label, valid (B,)) -> (): mean over what is valid, 0 if nothing."""
  count: Loss
  """(logits, label, valid (B,)) -> (): how many labels `loss` is the mean over.

  Of 'balanced' edges and 'combined' depth, which add means over parts of them: all."""
  update: Callable[[jax.Array, jax.Array, jax.Array], metrics.Update]
  """(logits, label, valid (B,)) -> sums and counts of one batch; jit-able."""
  compute: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
  """Updates of a whole split -> metrics, on the host; undefined ones left out."""
  primary: str
  """The metric for early stopping and Δm."""
  higher_is_better: bool
  predict: Callable[[jax.Array, tuple[int, ...]], jax.Array]
  """(logits, label.shape) -> label.shape: class (int32), probability, depth, normal."""


def make(
  names: Sequence[str],
  labels: Mapping[str, Any],
  *,
  loss_resolution: str = 'output',
  edge_loss: str = 'huber',
  depth_loss: str = 'squared',
) -> dict[str, Task]:
  """The tasks of a run.

  Args:
    names: which ones.
    labels: those of the data set: anything with `.kind` and `.classes`, by name.
    loss_resolution: where losses are taken. 'output': labels come down to the
      logits (the published way) by `resize.nearest`. 'label': logits go up to the
      labels, bilinearly; those of edges, thinner than a cell, always do.
    edge_loss: 'huber' (published) | 'balanced'.
    depth_loss: 'squared' (published) | 'combined'.

  Returns:
    Tasks by name, in the order of `names`.

  Raises:
    UserError: no task, an unknown or repeated one, or an unknown option.
  """
  _check('loss_resolution', loss_resolution, ('output', 'label'))
  _check('edge_loss', edge_loss, EDGE_LOSSES)
  _check('depth_loss', depth_loss, DEPTH_LOSSES)
  if not names:
    raise UserError(f'no tasks given; this data set has: {", ".join(labels)}')
  tasks = {}
  for name in names:
    _check('task', name, labels)
    if name in tasks:
      raise UserError(f'task {name!r} is listed twice')
    _check(f'kind of task {name!r}', labels[name].kind, _KINDS)
    tasks[name] = _KINDS[labels[name].kind](
      name,
      tuple(labels[name].classes),
      at_label=loss_resolution == 'label',
      edge_loss=edge_loss,
      depth_loss=depth_loss,
    )
  return tasks


def _segmentation(name, classes, *, at_label, **_):
  def predict(logits, shape):
    logits = resize.bilinear(logits, shape[1:3])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  return Task(
    name,
    'segmentation',
    classes,
    outputs=len(classes),
    head='dense',
    **_at_one_resolution(losses.cross_entropy, losses.has_class, at_label),
    update=metrics.segmentation_update,
    compute=functools.partial(metrics.segmentation_compute, classes=classes),
    primary='miou',
    higher_is_better=True,
    predict=predict,
  )


def _edges(name, classes, *, edge_loss, **_):
  return Task(
    name,
    'edges',
    classes,
    outputs=1,
    head='dense',
    **_at_one_resolution(EDGE_LOSSES[edge_loss], losses.has_edge, at_label=True),
    update=metrics.edges_update,
    compute=metrics.edges_compute,
    primary='f1',
    higher_is_better=True,
    predict=lambda logits, shape: jax.nn.sigmoid(
      resize.bilinear(logits, shape[1:3])[..., 0]
    ),
  )


def _depth(name, classes, *, at_label, depth_loss, **_):
  return Task(
    name,
    'depth',
    classes,
    outputs=1,
    head='dense',
    **_at_one_resolution(DEPTH_LOSSES[depth_loss], losses.has_depth, at_label),
    update=metrics.depth_update,
    compute=metrics.depth_compute,
    primary='rmse',
    higher_is_better=False,
    predict=lambda logits, shape: (
      losses.MAX_DEPTH * jax.nn.sigmoid(resize.bilinear(logits, shape[1:3])[..., 0])
    ),
  )


def _normals(name, classes, *, at_label, **_):
  return Task(
    name,
    'normals',
    classes,
    outputs=3,
    head='dense',
    **_at_one_resolution(losses.cosine_normals, losses.has_normal, at_label),
    update=metrics.normals_update,
    compute=metrics.normals_compute,
    primary='mean_angle',
    higher_is_better=False,
    predict=lambda logits, shape: losses.unit_normals(
      resize.bilinear(logits, shape[1:3])
    ),
  )


def _attribute(name, classes, **_):
  return Task(
    name,
    'attribute',
    classes,
    outputs=1,
    head='classification',
    loss=losses.binary_cross_entropy,
    count=lambda _, label, valid: losses.count(losses.has_class(label), valid),
    update=metrics.attribute_update,
    compute=metrics.attribute_compute,
    primary='balanced_accuracy',
    higher_is_better=True,
    predict=lambda logits, _: jax.nn.sigmoid(logits[:, 0]),
  )


_KINDS = {
  'segmentation': _segmentation,
  'edges': _edges,
  'depth': _depth,
  'normals': _normals,
  'attribute': _attribute,
}


def _at_one_resolution(loss, labelled, at_label) -> dict[str, Loss]:
  """`loss` and `count` of a task, where logits and labels have one resolution."""

  def resized(logits, label, valid):
    if at_label:
      logits = resize.bilinear(logits, label.shape[1:3])
    else:
      label = resize.nearest(label, logits.shape[1:3])
    return loss(logits, label, valid)

  def count(logits, label, valid):
    if not at_label:
      label = resize.nearest(label, logits.shape[1:3])
    return losses.count(labelled(label), valid)

  return {'loss': resized, 'count': count}


def _check(what, given, known):
  if not isinstance(given, str) or given not in known:
    close = difflib.get_close_matches(str(given), list(known), n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise UserError(f'unknown {what} {given!r}; {hint}known: {", ".join(known)}')
