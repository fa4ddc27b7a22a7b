"""What a group is: decided once, used by penalty, prox, λ_max and report alike.

Kernels are stored `(..., in, out)`. A group is one input channel, one output
channel or one single weight of one matched kernel, or everything that one channel of
the activations touches ('coupled'): the output channels of the kernels that write it,
scale and bias of the norms behind them, and the input channels of the kernels that
read it. Its weight in the penalty is √n_g, n_g the number of its entries.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from msp.errors import UserError

logger = logging.getLogger(__name__)

PyTree = Any
# Coupled groups are handled as matrices (channels, n_g).
AXES = {'in': -2, 'out': -1, 'weight': None, 'coupled': 0}


class Stream(Protocol):
  """Activations that share their channels; see `msp.models.multitask.streams`."""

  name: str
  writers: tuple[str, ...]
  norms: tuple[str, ...]
  readers: tuple[str, ...]


class Groups(NamedTuple):
  """The groups of a parameter tree: static, hashable, independent of values.

  Attributes:
    axis: 'in' (an input channel), 'out' (an output channel), 'weight' or 'coupled'.
    layers: paths of the matched kernels, such as
      'backbone/layer1_0/conv1/kernel', in the order of the tree; of coupled groups
      the streams, such as 'backbone/layer1/sum', in the order of the network.
    entries: for each layer the entry of a coefficient vector that it uses
      (all 0 for a scalar λ; the stage's or the layer's own number otherwise).
    names: one name for each entry of the coefficient vector.
    members: of coupled groups, for each layer the (path, axis of the channels) of all
      arrays that its groups extend over.
  """

  axis: str
  layers: tuple[str, ...]
  entries: tuple[int, ...]
  names: tuple[str, ...]
  members: tuple[tuple[tuple[str, int], ...], ...] = ()

  @property
  def array_axis(self) -> int | None:
    """Axis of what `select` returns that counts groups; None: each weight is one."""
    return AXES[self.axis]


def path_name(path: tuple[Any, ...]) -> str:
  """Joins a tree path to 'backbone/layer1_0/conv1/kernel'.

  The box around an array of an `nnx.State`, or of one with a partitioning, has no name.
  """
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def find(
  params: PyTree,
  pattern: str = r'backbone/.*kernel',
  axis: str = 'in',
  granularity: str = 'scalar',
  streams: Sequence[Stream] = (),
) -> Groups:
  """Finds the kernels whose path matches `pattern`; logs them at level debug.

  Args:
    params: tree of arrays or `jax.ShapeDtypeStruct`s.
    pattern: regular expression that must match a leaf's whole path. The leaves it
      matches have to be `(..., in, out)`. Not so kernels of attention, whose last axes
      are heads and features, and of `ConvTranspose(transpose_kernel=True)`, which are
      (..., out, in). A depthwise kernel is one input channel, a grouped one those of
      one of its parts, and layers stacked by a scan share their groups.
    axis: 'in' | 'out' | 'weight' | 'coupled'.
    granularity: 'scalar' (one λ), 'stage' (one for each second component of
      the paths, up to its '_': 'layer1_0' belongs to 'layer1') or 'layer'.
    streams: of 'coupled', from `msp.models.multitask.streams`. Of their kernels those
      count that match `pattern`, of their norms those of matched writers.

  Returns:
    The groups.

  Raises:
    UserError: unknown axis or granularity, a pattern that is no regular
      expression, that matches nothing, or that matches a leaf with fewer than
      two dimensions; 'coupled' without streams of the matched kernels, or with one
      whose arrays are missing or differ in channels; 'stage' of paths without a stage.
  """
  if axis not in AXES:
    raise UserError(f'sparsity axis {axis!r} is not one of {", ".join(AXES)}')
  try:
    expression = re.compile(pattern)
  except re.error as e:
    raise UserError(
      f'sparsity pattern {pattern!r} is no regular expression: {e}'
    ) from None
  leaves = jax.tree_util.tree_leaves_with_path(params)
  matched = [
    (path_name(path), leaf)
    for path, leaf in leaves
    if expression.fullmatch(path_name(path))
  ]
  if not matched:
    kernels = [path_name(path) for path, leaf in leaves if len(_shape(leaf)) > 1]
    examples = ', '.join(kernels[:3]) or 'no array of two dimensions or more'
    raise UserError(
      f'sparsity pattern {pattern!r} matches no parameter as a whole; the tree has for '
      f'example {examples}'
    )
  for name, leaf in matched:
    if len(_shape(leaf)) < 2:
      raise UserError(
        f'sparsity pattern {pattern!r} matches {name}, which has shape '
        f'{_shape(leaf)} and so no {axis} channels; match kernels only'
      )
    logger.debug('groups: %s %s by %s', name, leaf.shape, axis)
  layers = tuple(name for name, _ in matched)
  members = ()
  if axis == 'coupled':
    shapes = {path_name(path): _shape(leaf) for path, leaf in leaves}
    coupled = {
      f'backbone/{stream.name}': found
      for stream in streams
      if (found := _members(stream, set(layers), shapes))
    }
    if not coupled:
      raise UserError(
        f'coupled groups need the streams of a network, and none of them has a '
        f'kernel that matches {pattern!r}'
      )
    layers, members = tuple(coupled), tuple(coupled.values())
  if granularity == 'scalar':
    keys = ['all'] * len(layers)
  elif granularity == 'stage':
    # A stream has no name of an array at its end.
    depth = 1 if axis == 'coupled' else 2
    if any(name.count('/') < depth for name in layers):
      raise UserError(
        f'sparsity granularity stage needs paths such as backbone/layer1_0/kernel; '
        f'there is {layers[0]}'
      )
    keys = [name.split('/')[1].split('_')[0] for name in layers]
  elif granularity == 'layer':
    keys = [short_name(name) for name in layers]
    if len(set(keys)) < len(keys):
      keys = list(layers)
  else:
    raise UserError(
      f'sparsity granularity {granularity!r} is not one of scalar, stage, layer'
    )
  names = tuple(dict.fromkeys(keys))
  return Groups(axis, layers, tuple(names.index(k) for k in keys), names, members)


def _shape(leaf):
  return getattr(leaf, 'shape', ())  # a Python number has none


def _members(stream, matched, shapes):
  """(path, axis) of what a stream's channels extend over."""
  unknown = [path for path in (*stream.writers, *stream.readers) if path not in shapes]
  if unknown:
    raise UserError(f'stream {stream.name}: the tree has no {unknown[0]}')
  written = [
    ((path, -1), (f'{norm}/scale', 0), (f'{norm}/bias', 0))
    for path, norm in zip(stream.writers, stream.norms, strict=True)
    if path in matched
  ]
  found = [member for trio in written for member in trio if member[0] in shapes]
  found += [(path, -2) for path in stream.readers if path in matched]
  channels = {path: shapes[path][axis] for path, axis in found}
  if len(set(channels.values())) > 1:
    raise UserError(
      f'stream {stream.name}: its arrays differ in channels '
      f'({", ".join(f"{path} {n}" for path, n in channels.items())}), as where a '
      f'compact network gathers some; coupled groups need all: use axis in or out'
    )
  return tuple(found)


def short_name(layer: str) -> str:
  """'backbone/layer1_0/conv1/kernel' as people read it: 'layer1_0/conv1'."""
  return layer.removeprefix('backbone/').removesuffix('/kernel')


def select(groups: Groups, tree: PyTree) -> dict[str, jax.Array]:
  """The leaves of `tree` that are grouped, by path, in the groups' order.

  Args:
    groups: which leaves.
    tree: of the parameters' structure, or a part of it.

  Returns:
    layer -> kernel, shape (..., in, out); of coupled groups stream -> matrix
    (channels, n_g). A layer of which `tree` lacks a leaf is left out.
  """
  named = by_path(tree)
  if groups.axis != 'coupled':
    return {layer: named[layer] for layer in groups.layers if layer in named}
  return {
    layer: gather(members, named)
    for layer, members in zip(groups.layers, groups.members, strict=True)
    if all(path in named for path, _ in members)
  }


def require(groups: Groups, tree: PyTree) -> None:
  """Raises UserError if `tree` has no leaf of any group, or a part of coupled ones."""
  named = by_path(tree)
  wanted = {path for m in groups.members for path, _ in m} or set(groups.layers)
  if not wanted & named.keys():
    raise UserError(
      f'none of the groups is in these parameters: groups of {min(wanted)}, …; '
      f'parameters {", ".join([*named][:3])}, …. Find the groups in this tree'
    )
  for layer, members in zip(groups.layers, groups.members, strict=False):
    lacking = [path for path, _ in members if path not in named]
    if 0 < len(lacking) < len(members):
      raise UserError(
        f'of the coupled groups of {layer} these parameters lack {lacking[0]}; a mask '
        f'or a partition has to keep all of a stream together, or none'
      )


def by_path(tree: PyTree) -> dict[str, jax.Array]:
  """The leaves of a tree by their paths."""
  return {
    path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def gather(
  members: Sequence[tuple[str, int]], leaves: Mapping[str, jax.Array]
) -> jax.Array:
  """Coupled groups as a matrix, a row for each channel.

  Args:
    members: (path, axis of the channels) of the arrays of a stream.
    leaves: path -> array.

  Returns:
    Shape (channels, n_g): what belongs to a channel, of all members side by side.
  """
  return jnp.concatenate(
    [
      jnp.moveaxis(leaves[path], axis, 0).reshape(leaves[path].shape[axis], -1)
      for path, axis in members
    ],
    axis=1,
  )


def scatter(
  members: Sequence[tuple[str, int]],
  matrix: jax.Array,
  leaves: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """`leaves` with the entries of a stream's groups put in; undoes `gather`.

  Args:
    members: as of `gather`.
    matrix: shape (channels, n_g).
    leaves: path -> array; those of no member stay.

  Returns:
    path -> array, shapes of `leaves`.
  """
  changed, start = dict(leaves), 0
  for path, axis in members:
    shape = jnp.moveaxis(leaves[path], axis, 0).shape
    stop = start + math.prod(shape[1:])
    part = matrix[:, start:stop].reshape(shape)
    changed[path] = jnp.moveaxis(part, 0, axis)
    start = stop
  return changed


def replace(tree: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
  """`tree` with the leaves that `leaves` names by path put in their place."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaves.get(path_name(path), leaf), tree
  )


def is_function(value: Any) -> bool:
  """Whether it is one, as a schedule is; an `nnx.Param` can be called, too."""
  return callable(value) and not hasattr(value, 'shape')


def coefficients(groups: Groups, sparsity: jax.Array | float) -> dict[str, jax.Array]:
  """λ of every layer.

  Args:
    groups: which layer uses which entry.
    sparsity: λ, shape () or (len(groups.names),).

  Returns:
    layer -> λ, shape ().

  Raises:
    UserError: `sparsity` has neither shape; it is known, and below 0 or not a number.
  """
  if isinstance(sparsity, Mapping) or is_function(sparsity):
    raise UserError(
      f'sparsity coefficient is a {type(sparsity).__name__}: expected a scalar or '
      f'{len(groups.names)} entries ({", ".join(groups.names)})'
    )
  known = not isinstance(sparsity, jax.core.Tracer)
  if known and not (np.asarray(sparsity) >= 0).all():
    raise UserError(f'sparsity coefficient is {sparsity}; it has to be 0 or more')
  sparsity = jnp.asarray(sparsity)
  if sparsity.shape not in ((), (len(groups.names),)):
    raise UserError(
      f'sparsity coefficient of shape {sparsity.shape}: expected a scalar or '
      f'{len(groups.names)} entries ({", ".join(groups.names)})'
    )
  entries = jnp.broadcast_to(sparsity, (len(groups.names),))
  return {
    layer: entries[entry]
    for layer, entry in zip(groups.layers, groups.entries, strict=True)
  }


def size(leaf: jax.Array, axis: int | None) -> int:
  """n_g, the number of entries of each group of a kernel."""
  return 1 if axis is None else leaf.size // leaf.shape[axis]


def norms(x: jax.Array, axis: int | None) -> jax.Array:
  """‖x_g‖₂ of every group; its derivative at a zero group is 0, not NaN.

  Args:
    x: kernel, shape (..., in, out).
    axis: the group axis, or None if each weight is its own group.

  Returns:
    Shape (x.shape[axis],), or x.shape for None; dtype of x.
  """
  if axis is None:
    return jnp.abs(x)
  # In float16 squares of weights as small as 1e-4 would be 0, sums of 1000 of 10 ∞.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  squares = jnp.sum(jnp.square(wide), axis=other_axes(x, axis))
  alive = squares != 0  # a NaN is not dead
  return jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1)), 0).astype(x.dtype)


def other_axes(x: jax.Array, axis: int | None) -> tuple[int, ...]:
  """The axes a group extends over."""
  if axis is None:
    return ()
  return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def expand(value: jax.Array, x: jax.Array, axis: int | None) -> jax.Array:
  """Reshapes one value a group so that it broadcasts against the kernel x.

  Args:
    value: shape (), (x.shape[axis],), or for single weights x.shape.
    x: kernel, shape (..., in, out).
    axis: the group axis, or None.

  Returns:
    As many axes as x: 1 on each but `axis`; for single weights x.shape.
  """
  value = jnp.asarray(value)
  if value.ndim == 0 or axis is None:
    return value if value.ndim else value.reshape((1,) * x.ndim)
  return jnp.expand_dims(value, other_axes(x, axis))


def lambda_max(groups: Groups, gradients: PyTree) -> jax.Array:
  """λ_max = max_g ‖∇_g L‖₂ / √n_g, the largest coefficient worth trying.

  Above it, no group's gradient outweighs the group lasso at θ_g = 0: it is the dual
  norm of R. For every penalty it is the unit of λ; those that treat single weights (l1,
  sparse group lasso) may need up to √n_g times as much to kill a group.

  Args:
    groups: which leaves.
    gradients: ∇L, tree of the parameters' structure.

  Returns:
    Shape (len(groups.names),): the maximum over the layers of each entry; 0 for one
    whose layers `gradients` does not have.
  """
  require(groups, gradients)
  axis, leaves = groups.array_axis, select(groups, gradients)
  entries = [groups.entries[groups.layers.index(layer)] for layer in leaves]
  per_layer = jnp.stack(
    [jnp.max(norms(g, axis)) / math.sqrt(size(g, axis)) for g in leaves.values()]
  )
  largest = jax.ops.segment_max(per_layer, jnp.array(entries), len(groups.names))
  return jnp.maximum(largest, 0)  # not −∞ for an entry without a layer


def alive(groups: Groups, params: PyTree) -> dict[str, jax.Array]:
  """Which groups hold a non-zero weight.

  Args:
    groups: which groups.
    params: θ, or the part of it that `masked` or `partition` leaves.

  Returns:
    layer -> bool, one entry a group: shape (channels,), of single weights the kernel's.

  Raises:
    UserError: see `require`.
  """
  require(groups, params)
  axis = groups.array_axis
  return {
    layer: jnp.any(leaf != 0, axis=other_axes(leaf, axis))
    for layer, leaf in select(groups, params).items()
  }


def remove(groups: Groups, params: PyTree, keep: Mapping[str, jax.Array]) -> PyTree:
  """Sets the groups that do not survive to exactly 0.

  Args:
    groups: which groups.
    params: θ.
    keep: layer -> bool for each group.

  Returns:
    θ with zeros; `msp.compact.compact` takes them out.
  """
  if groups.axis == 'coupled':
    changed = by_path(params)
    for layer, members in zip(groups.layers, groups.members, strict=True):
      if layer not in keep:  # inside `masked` or `partition`
        continue
      # A kernel is in two streams: the second finds what the first has left of it.
      matrix = jnp.where(keep[layer][:, None], gather(members, changed), 0)
      changed = scatter(members, matrix, changed)
    # Members of several types are one matrix of the widest.
    own = by_path(params)
    changed = {path: x.astype(own[path].dtype) for path, x in changed.items()}
  else:
    changed = {
      layer: jnp.where(expand(keep[layer], x, groups.array_axis), x, 0)
      for layer, x in select(groups, params).items()
    }
  return replace(params, changed)


class Sparsity(NamedTuple):
  """How sparse the grouped kernels are.

  Attributes:
    groups: share of dead (exactly zero) groups, shape (), float32.
    weights: share of exactly zero weights, shape (), float32.
    alive: alive groups of each layer, shape (layers,), int32.
  """

  groups: jax.Array
  weights: jax.Array
  alive: jax.Array


def sparsity(groups: Groups, params: PyTree) -> Sparsity:
  """Counts dead groups and zero weights on the axis the prox uses.

  Args:
    groups: which groups.
    params: θ.

  Returns:
    Shares and counts; all layers together, a kernel that is in two streams once.

  Raises:
    UserError: see `require`.
  """
  require(groups, params)
  axis, leaves = groups.array_axis, select(groups, params)

  def nonzero(leaf):  # of each group; of single weights, of the kernel
    return jnp.sum(leaf != 0, other_axes(leaf, axis) or None, dtype=jnp.int32)

  counts = [nonzero(leaf) for leaf in leaves.values()]
  if axis is None:
    alive = weights = jnp.stack(counts)
  else:
    # All layers together: sums of a layer each take an accelerator longer to start.
    table = by_layer(jnp.concatenate(counts), [c.size for c in counts], 0)
    alive, weights = jnp.sum(table > 0, 1, dtype=jnp.int32), jnp.sum(table, 1)
  if groups.axis == 'coupled':  # a kernel is in two streams
    named = by_path(params)
    leaves = {path: named[path] for m in groups.members for path, _ in m}
    weights = jnp.stack([jnp.sum(leaf != 0) for leaf in leaves.values()])
  total = sum(totals(groups, params).values())
  size = sum(leaf.size for leaf in leaves.values())
  return Sparsity(
    groups=(total - jnp.sum(alive)) / total,
    weights=(size - jnp.sum(weights)) / size,
    alive=alive,
  )


def by_layer(values: jax.Array, counts: Sequence[int], padding: float) -> jax.Array:
  """A row for each layer of values that stand in a row.

  Args:
    values: one value a group, layer after layer, shape (groups,).
    counts: groups of each layer.
    padding: what fills a row up.

  Returns:
    Shape (layers, max(counts)), dtype of `values`.
  """
  index = np.full((len(counts), max(counts)), values.size)
  index[np.arange(max(counts)) < np.array(counts)[:, None]] = np.arange(values.size)
  return jnp.append(values, jnp.array(padding, values.dtype))[index]


def totals(groups: Groups, params: PyTree) -> Mapping[str, int]:
  """Number of groups of each layer of θ, a tree of arrays or their shapes."""
  axis = groups.array_axis
  kernels = jax.eval_shape(lambda p: select(groups, p), params)
  return {layer: leaf.size // size(leaf, axis) for layer, leaf in kernels.items()}
