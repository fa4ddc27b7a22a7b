"""Metrics of a whole split, from sums and counts (never means of batch means).

`*_update` runs on the device, on one batch: logits are brought to label
resolution first. `*_compute` runs on the host, on all updates. A metric that is
not defined (no valid pixel, no example of a class) is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msp import losses, resize
from msp.errors import UserError
from msp.losses import MAX_DEPTH, unit_normals

Update = dict[str, jax.Array]

# p ≥ k / BINS is an edge, k = 1 … BINS − 1.
BINS = 100
# Of angles from 0 to 180 degrees, for their median.
ANGLE_BINS = 1800
ANGLES = (11.25, 22.5, 30.0)


def segmentation_update(
  logits: jax.Array, label: jax.Array, valid: jax.Array
) -> Update:
  """Pixels of each class: in both, in the prediction, in the label.

  Args:
    logits: shape (B, h, w, C).
    label: shape (B, H, W), int32; 255 is ignored.
    valid: shape (B,), bool.

  Returns:
    `both`, `predicted`, `labelled`: shape (C,), int32; `image_iou`, `images`: sum
    and number of per-image IoUs.
  """
  classes = jnp.arange(logits.shape[-1])[None, None, None, :]
  predicted = jnp.argmax(resize.bilinear(logits, label.shape[1:]), axis=-1)
  mask = losses.has_class(label) & valid[:, None, None]
  in_label = (label[..., None] == classes) & mask[..., None]
  in_prediction = (predicted[..., None] == classes) & mask[..., None]
  correct = jnp.sum((predicted == label) & mask, axis=(1, 2))
  pixels = jnp.sum(mask, axis=(1, 2))
  # Σ_c TP = c and Σ_c FP = Σ_c FN = v − c: one label for each pixel.
  image_iou = correct / jnp.maximum(2 * pixels - correct, 1)
  return {
    'both': jnp.sum(in_label & in_prediction, axis=(0, 1, 2)),
    'predicted': jnp.sum(in_prediction, axis=(0, 1, 2)),
    'labelled': jnp.sum(in_label, axis=(0, 1, 2)),
    'image_iou': jnp.sum(image_iou),
    'images': jnp.sum(pixels > 0),
  }


def segmentation_compute(
  updates: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, float]:
  """mIoU, pixel accuracy, the published per-image micro IoU, IoU of each class.

  IoU_c = TP / (TP + FP + FN); `miou` averages the classes with a non-empty
  union. `micro_iou_imagewise` sums TP, FP, FN over classes first, then averages
  over images (papers of the Less is More series call it IoU): a function of pixel
  accuracy, not comparable with mIoU. Images without valid pixels do not count.

  Returns:
    `miou`, `pixel_accuracy`, `micro_iou_imagewise`, `iou/<class>`, in [0, 1].
  """
  total = _sum(updates)
  if not total or not total['images']:
    return {}
  union = total['predicted'] + total['labelled'] - total['both']
  iou = {
    f'iou/{name}': float(both / either)
    for name, both, either in zip(classes, total['both'], union, strict=True)
    if either
  }
  return {
    'miou': float(np.mean(list(iou.values()))),
    'pixel_accuracy': float(total['both'].sum() / total['labelled'].sum()),
    'micro_iou_imagewise': float(total['image_iou'] / total['images']),
    **iou,
  }


def edges_update(logits: jax.Array, label: jax.Array, valid: jax.Array) -> Update:
  """Absolute error and the histogram of σ(z) for edge and other pixels.

  Args:
    logits: z, shape (B, h, w, 1).
    label: in {0, 1}, −1 is ignored; shape (B, H, W), float.
    valid: shape (B,), bool.

  Returns:
    `error`: sum, shape (); `rest`, `edges`: pixels by k = ⌊100 σ(z)⌋, shape (100,).
  """
  p = jax.nn.sigmoid(resize.bilinear(logits, label.shape[1:])[..., 0])
  mask = losses.has_edge(label) & valid[:, None, None]
  bins = jnp.clip((p * BINS).astype(jnp.int32), 0, BINS - 1)
  count = lambda where: jnp.zeros(BINS, jnp.int32).at[bins].add(where)
  return {
    'error': jnp.sum(jnp.where(mask, jnp.abs(p - label), 0)),
    'rest': count(mask & (label == 0)),
    'edges': count(mask & (label == 1)),
  }


def edges_compute(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Mean absolute error, and the best pixel-wise F1 of one threshold for all.

  Returns:
    `mae` of σ(z); `f1` = max_t 2TP/(2TP + FP + FN) over t = 0.01 … 0.99 and the
    `f1_threshold` it belongs to (the lowest one of equals).
  """
  total = _sum(updates)
  if not total:
    return {}
  at_least = lambda histogram: np.cumsum(histogram[::-1])[::-1]
  hits, false_alarms = at_least(total['edges']), at_least(total['rest'])
  edges, pixels = hits[0], hits[0] + false_alarms[0]
  if not pixels:
    return {}
  result = {'mae': float(total['error'] / pixels)}
  if edges:
    f1 = 2 * hits[1:] / (hits[1:] + false_alarms[1:] + edges)
    best = int(np.argmax(f1))
    result |= {'f1': float(f1[best]), 'f1_threshold': (best + 1) / BINS}
  return result


def depth_update(logits: jax.Array, label: jax.Array, valid: jax.Array) -> Update:
  """Sums of errors in metres, over pixels with a measurement.

  Args:
    logits: z, shape (B, h, w, 1); the depth is 10 m · σ(z).
    label: metres, 0 where there is none; shape (B, H, W), float.
    valid: shape (B,), bool.

  Returns:
    `absolute`, `squared`, `relative` errors, `close` (ratio below 1.25) and `pixels`
    as sums; `images_without` a single measurement.
  """
  depth = MAX_DEPTH * jax.nn.sigmoid(resize.bilinear(logits, label.shape[1:])[..., 0])
  mask = losses.has_depth(label) & valid[:, None, None]
  error = jnp.where(mask, jnp.abs(depth - label), 0)
  truth = jnp.where(mask, label, 1)
  ratio = jnp.where(mask, jnp.maximum(depth / truth, truth / depth), jnp.inf)
  return {
    'absolute': jnp.sum(error),
    'squared': jnp.sum(error**2),
    'relative': jnp.sum(error / truth),
    'close': jnp.sum(ratio < 1.25),
    'pixels': jnp.sum(mask),
    'images_without': jnp.sum(valid & ~mask.any(axis=(1, 2))),
  }


def depth_compute(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """MAE and RMSE in metres, mean |e|/d, share of pixels with ratio below 1.25.

  Returns:
    `rmse`, `mae`, `abs_rel`, `delta_1.25`; `images_without_label` if there are any:
    they count in none of the others.
  """
  total = _sum(updates)
  if not total or not total['pixels']:
    return _unlabelled(total)
  mean = lambda name: float(total[name] / total['pixels'])
  return {
    'rmse': float(np.sqrt(mean('squared'))),
    'mae': mean('absolute'),
    'abs_rel': mean('relative'),
    'delta_1.25': mean('close'),
    **_unlabelled(total),
  }


def normals_update(logits: jax.Array, label: jax.Array, valid: jax.Array) -> Update:
  """Angles between predicted and true normals: sums and a histogram.

  Args:
    logits: z, shape (B, h, w, 3).
    label: unit vectors, (0, 0, 0) where there is none; shape (B, H, W, 3), float.
    valid: shape (B,), bool.

  Returns:
    `angle`, `squared` (degrees, degrees²): sums; `within`: pixels below each of
    `ANGLES`, (3,); `histogram`, (1800,); `pixels`; `images_without` a normal.
  """
  predicted = unit_normals(resize.bilinear(logits, label.shape[1:3]))
  # arccos of a cosine near 1 would lose half of the digits.
  cross = jnp.linalg.norm(jnp.cross(predicted, label), axis=-1)
  angle = jnp.rad2deg(jnp.arctan2(cross, jnp.sum(predicted * label, axis=-1)))
  # Without a direction, as a dead backbone gives, every angle is as likely.
  angle = jnp.where(jnp.any(predicted != 0, axis=-1), angle, 90.0)
  mask = losses.has_normal(label) & valid[:, None, None]
  bins = jnp.clip((angle * (ANGLE_BINS / 180)).astype(jnp.int32), 0, ANGLE_BINS - 1)
  angle = jnp.where(mask, angle, 0)
  return {
    'angle': jnp.sum(angle),
    'squared': jnp.sum(angle**2),
    'within': jnp.stack([jnp.sum(mask & (angle < limit)) for limit in ANGLES]),
    'histogram': jnp.zeros(ANGLE_BINS, jnp.int32).at[bins].add(mask),
    'pixels': jnp.sum(mask),
    'images_without': jnp.sum(valid & ~mask.any(axis=(1, 2))),
  }


def normals_compute(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Mean, median and root mean square angle in degrees; shares within 11.25, ….

  Returns:
    `mean_angle`, `median_angle` (lower median, to 0.05 degrees), `rmse_angle`,
    `within_11.25`, `within_22.5`, `within_30`; `images_without_label` if there are any.
  """
  total = _sum(updates)
  if not total or not total['pixels']:
    return _unlabelled(total)
  pixels = total['pixels']
  middle = int(np.searchsorted(np.cumsum(total['histogram']), (pixels + 1) // 2))
  within = zip(ANGLES, total['within'], strict=True)
  return {
    'mean_angle': float(total['angle'] / pixels),
    'median_angle': (middle + 0.5) * 180 / ANGLE_BINS,
    'rmse_angle': float(np.sqrt(total['squared'] / pixels)),
    **{f'within_{limit:g}': float(count / pixels) for limit, count in within},
    **_unlabelled(total),
  }


def _unlabelled(total):
  count = float(total.get('images_without', 0))
  return {'images_without_label': count} if count else {}


def attribute_update(logits: jax.Array, label: jax.Array, valid: jax.Array) -> Update:
  """The logits themselves (AUROC needs them all): `score`, `label`, `valid`, (B,)."""
  return {'score': logits[:, 0], 'label': label, 'valid': valid}


def attribute_compute(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Binary classification at p ≥ 0.5, and the area under the ROC curve.

  AUROC = P(z⁺ > z⁻) + ½ P(z⁺ = z⁻) over all pairs, exact, from mid-ranks.

  Returns:
    `accuracy`, `balanced_accuracy` (mean of the two recalls), `f1` (of the
    positive class), `auroc`, in [0, 1].
  """
  if not updates:
    return {}
  joined = {
    name: np.concatenate([np.asarray(u[name]) for u in updates])
    for name in ('score', 'label', 'valid')
  }
  keep = joined['valid'].astype(bool)
  score, label = joined['score'][keep], joined['label'][keep].astype(bool)
  if not label.size:
    return {}
  decision = score >= 0
  positives, negatives = label.sum(), (~label).sum()
  hits, rejections = (decision & label).sum(), (~decision & ~label).sum()
  result = {'accuracy': float((hits + rejections) / label.size)}
  if positives or decision.any():
    result['f1'] = float(2 * hits / (decision.sum() + positives))
  if positives and negatives:
    _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
    mid_rank = (np.cumsum(count) - (count - 1) / 2)[rank]
    wins = mid_rank[label].sum() - positives * (positives + 1) / 2
    result['balanced_accuracy'] = float((hits / positives + rejections / negatives) / 2)
    result['auroc'] = float(wins / (positives * negatives))
  return result


def delta_m(
  results: Mapping[str, float],
  baseline: Mapping[str, float],
  tasks: Mapping[str, Any],
) -> float:
  """Δm = 100/T Σ_t ± (M_t − B_t) / B_t, minus where lower is better.

  Args:
    results: '<task>/<metric>' of the model judged: M.
    baseline: the same of the one compared with (dense, single-task): B.
    tasks: by name; the primary metric of each is compared.

  Returns:
    Percent; positive is better than the baseline.

  Raises:
    UserError: a primary metric is missing, or 0 in the baseline.
  """
  changes = []
  for name, task in tasks.items():
    key = f'{name}/{task.primary}'
    for side, values in (('results', results), ('baseline', baseline)):
      if key not in values:
        raise UserError(f'delta_m: the {side} have no {key}')
    if baseline[key] == 0:
      raise UserError(f'delta_m: {key} of the baseline is 0, no relative change')
    change = (results[key] - baseline[key]) / abs(baseline[key])
    changes.append(change if task.higher_is_better else -change)
  return 100 * float(np.mean(changes))


def _sum(updates):
  """Σ over batches, counts in int64 and sums in float64 (exact beyond 2³¹)."""
  if not updates:
    return {}
  wide = lambda x: np.asarray(x).astype(
    np.int64 if np.issubdtype(np.asarray(x).dtype, np.integer) else np.float64
  )
  return {name: sum(wide(u[name]) for u in updates) for name in updates[0]}
