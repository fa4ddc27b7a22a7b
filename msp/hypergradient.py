"""dL_holdout(θᴷ(ρ))/dρ, and with it the gradient of the query loss in θ⁰.

ρ is the unconstrained coefficient (λ = exp(ρ) · λ_max); `inner(θ⁰, ρ)` returns
(θᴷ, auxiliary tree), usually a closure over `msp.adapt`. 'reverse' and 'forward'
see the K inner steps of one episode, 'truncated' the last of them, 'implicit' as many
as it takes to converge; 'online' sees all outer steps so far.

In units of one inner step (gradient and prox), for a ρ of n entries:

| mode      | time               | memory                   | exact              |
|-----------|--------------------|--------------------------|--------------------|
| reverse   | K                  | K times θ and ∇L         | yes                |
| forward   | n · K              | n tangents, whatever K   | yes                |
| truncated | k of the K steps   | k times θ and ∇L         | bias falls with k  |
| implicit  | iterations         | vectors, whatever K      | at a fixed point   |
| online    | n · the outer step | tangent of whole state   | of the run (γ = 1) |
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msp.errors import UserError

PyTree = Any
THROUGH_INNER = ('reverse', 'forward', 'truncated', 'implicit')
MODES = (*THROUGH_INNER, 'online')
SOLVERS = ('cg', 'neumann')
Inner = Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]


class Solver(NamedTuple):
  """How 'implicit' solves its linear system; see `implicit`.

  Attributes:
    name: 'cg' | 'neumann'.
    tolerance: of the residual, relative to the right-hand side.
    max_iterations: where it stops at the latest.
  """

  name: str = 'cg'
  tolerance: float = 1e-3
  max_iterations: int = 50


CG = Solver()


class MetaGradients(NamedTuple):
  """What one episode says.

  Attributes:
    params: dL_query(θᴷ)/dθ⁰, exact or first-order.
    rho: dL_holdout(θᴷ)/dρ, shape of ρ; None if it was not asked for, or 'online'.
    query: (L_query(θᴷ), its auxiliary tree).
    hold_out: (L_holdout(θᴷ), its auxiliary tree), or None.
    logs: the auxiliary tree of `inner`.
  """

  params: PyTree
  rho: jax.Array | None
  query: tuple[jax.Array, PyTree]
  hold_out: tuple[jax.Array, PyTree] | None
  logs: PyTree


def meta_gradients(
  inner: Inner,
  query_loss: Callable[[PyTree], tuple[jax.Array, PyTree]],
  hold_out_loss: Callable[[PyTree], tuple[jax.Array, PyTree]] | None,
  params: PyTree,
  rho: jax.Array | None,
  *,
  exact: bool,
  mode: str | None = 'reverse',
  last: Inner | None = None,
  solver: Solver = CG,
) -> MetaGradients:
  """Both outer gradients of one episode, sharing its inner loop.

  θᴷ = inner(θ⁰, ρ);  g_q = ∇L_query(θᴷ), g_h = ∇L_holdout(θᴷ);
  dL_query/dθ⁰ = (∂θᴷ/∂θ⁰)ᵀ g_q if exact, g_q to first order;
  dL_holdout/dρ = (∂θᴷ/∂ρ)ᵀ g_h, by one more pull-back ('reverse': memory grows
  with K) or as ⟨g_h, ∂θᴷ/∂ρ⟩ with the tangent carried forward ('forward': memory
  independent of K, one pass for each entry of ρ; beside an exact gradient in θ⁰, which
  keeps all steps and has a pull-back already, it is 'reverse'). 'truncated' is
  'reverse' through what `inner` lets derivatives see (`msp.adapt` with `truncation`).
  'implicit': see `implicit`, with `last` one step at θᴷ.
  Query data never reaches ρ, hold-out data never reaches θ⁰. With 'online' no gradient
  in ρ is taken here: `online` pushes its tangent through the whole outer step.

  Args:
    inner: (θ⁰, ρ) -> (θᴷ, auxiliary tree); ρ may be None.
    query_loss: θ -> (L, shape (), auxiliary tree).
    hold_out_loss: the same for the hold-out data; None if ρ is not learned.
    params: θ⁰.
    rho: ρ, shape () or (n,), or None.
    exact: whether the derivative in θ⁰ runs through the inner steps.
    mode: 'reverse' | 'forward' | 'truncated' | 'implicit', for ρ; 'online' or None:
      the hold-out loss only.
    last: of 'implicit': (θ, ρ) -> (θ, auxiliary tree).
    solver: of 'implicit'.

  Returns:
    The gradients and the losses.

  Raises:
    UserError: unknown mode or solver; `last` is missing.
  """
  _check(mode, (*MODES, None), last, solver, needs_last=('implicit',))
  if mode == 'truncated' or (exact and mode == 'forward'):
    mode = 'reverse'
  forward = hold_out_loss is not None and mode == 'forward'
  reverse = hold_out_loss is not None and mode == 'reverse'
  pull_back = None
  if exact and reverse:
    adapted, pull_back, logs = jax.vjp(inner, params, rho, has_aux=True)
  elif exact:
    adapted, pull_back, logs = jax.vjp(lambda p: inner(p, rho), params, has_aux=True)
  elif reverse:
    adapted, pull_back, logs = jax.vjp(lambda r: inner(params, r), rho, has_aux=True)
  elif forward:
    adapted, logs, columns = _tangents(lambda r: inner(params, r), rho)
  else:
    adapted, logs = inner(params, rho)

  query, g_query = jax.value_and_grad(query_loss, has_aux=True)(adapted)
  g_params = pull_back(g_query)[0] if exact else g_query
  if hold_out_loss is None:
    return MetaGradients(g_params, None, query, None, logs)
  if mode in ('online', None):
    return MetaGradients(g_params, None, query, hold_out_loss(adapted), logs)
  hold_out, g_hold_out = jax.value_and_grad(hold_out_loss, has_aux=True)(adapted)
  if mode == 'implicit':
    g_rho = implicit(g_hold_out, lambda p, r: last(p, r)[0], adapted, rho, solver)
  elif forward:
    g_rho = _products(g_hold_out, columns, rho)
  else:
    g_rho = pull_back(g_hold_out)[-1]
  return MetaGradients(g_params, g_rho, query, hold_out, logs)


def hypergradient(
  outer_loss: Callable[[PyTree], jax.Array],
  inner: Callable[[PyTree, jax.Array], PyTree],
  params: PyTree,
  rho: jax.Array,
  *,
  mode: str = 'reverse',
  last: Callable[[PyTree, jax.Array], PyTree] | None = None,
  solver: Solver = CG,
) -> tuple[jax.Array, jax.Array]:
  """The derivative d outer_loss(θᴷ(ρ))/dρ for any loss of a tree of float parameters.

      inner = lambda p, rho: msp.adapt(
          loss, p, batches, tx, sparsity=jnp.exp(rho))[0]
      value, grad = msp.hypergradient(hold_out_loss, inner, params, rho)

  Args:
    outer_loss: θ -> L, shape ().
    inner: (θ⁰, ρ) -> θᴷ.
    params: θ⁰.
    rho: ρ, shape () or (n,), float.
    mode: 'reverse' (one backward pass, memory grows with K), 'forward' (one
      forward pass for each entry of ρ, memory independent of K), 'truncated'
      (backward through `last` only) or 'implicit' (see `implicit`).
    last: of 'truncated', the last steps: θᴷ = last(inner(θ⁰, ρ), ρ), where an
      optimiser with a state (momentum, a schedule) begins anew (not so in 'reverse'
      through `msp.adapt` with `truncation`); of 'implicit', the map whose fixed point
      `inner` has found.
    solver: of 'implicit'.

  Returns:
    (L, shape (); dL/dρ, shape of ρ).

  Raises:
    UserError: unknown mode or solver; `last` is missing.
  """
  if mode == 'online':
    raise UserError(
      "hypergradient 'online' carries a tangent from step to step: use msp.online"
    )
  _check(mode, THROUGH_INNER, last, solver, needs_last=('truncated', 'implicit'))
  rho = jnp.asarray(rho)
  if mode == 'truncated':
    start = jax.lax.stop_gradient(inner(params, rho))
    return jax.value_and_grad(lambda r: outer_loss(last(start, r)))(rho)
  if mode == 'reverse':
    return jax.value_and_grad(lambda r: outer_loss(inner(params, r)))(rho)
  if mode == 'implicit':
    adapted = inner(params, rho)
    value, grads = jax.value_and_grad(outer_loss)(adapted)
    return value, implicit(grads, last, adapted, rho, solver)
  adapted, _, columns = _tangents(lambda r: (inner(params, r), None), rho)
  value, grads = jax.value_and_grad(outer_loss)(adapted)
  return value, _products(grads, columns, rho)


def implicit(
  gradient: PyTree,
  step: Callable[[PyTree, jax.Array], PyTree],
  params: PyTree,
  rho: jax.Array,
  solver: Solver = CG,
) -> jax.Array:
  """dL/dρ at a fixed point θ* = T(θ*, ρ), whatever steps led to it.

  dL/dρ = (∂T/∂ρ)ᵀ u with (I − J)ᵀ u = ∇L(θ*), J = ∂T/∂θ. The prox in T has derivative
  0 at a dead group, so J and ∂T/∂ρ have zero rows there: what is solved is the system
  of the active groups. (Implicit differentiation of a proximal fixed point: Bertrand et
  al. 2020, arXiv 2002.08943.)

  'neumann' sums u = Σ_i (Jᵀ)ⁱ ∇L, one product an iteration, and converges as T does.
  'cg' needs fewer but two products each: conjugate gradients on the normal equations
  (I − J)(I − J)ᵀ u = (I − J)∇L, as J, a product of prox and gradient step, is not
  symmetric. Iterations of both grow with the condition number of I − J, and what is not
  solved when they end gives a result that is too small, without a sign: the default
  solves ridge regression of condition 10³, 10⁴ takes `Solver('cg', 1e-10, 500)`.
  Memory: a few vectors of the size of θ, whatever K.

  Args:
    gradient: ∇L(θ*), tree of `params`.
    step: T, (θ, ρ) -> θ: one inner step on fixed data. Its optimiser must have no
      state and no schedule, or T has no fixed point.
    params: θ*. Away from the fixed point the result is biased.
    rho: ρ, shape () or (n,).
    solver: which, and when it stops.

  Returns:
    Shape of ρ.

  Raises:
    UserError: unknown solver.
  """
  _check_solver(solver)
  _, pull_back = jax.vjp(step, params, rho)
  minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
  transposed = lambda v: minus(v, pull_back(v)[0])  # (I − J)ᵀ v

  def product(v):  # (I − J) v
    return minus(v, jax.jvp(lambda p: step(p, rho), (params,), (v,))[1])

  if solver.name == 'cg':
    solution, _ = jax.scipy.sparse.linalg.cg(
      lambda v: product(transposed(v)),
      product(gradient),
      tol=solver.tolerance,
      maxiter=solver.max_iterations,
    )
    return pull_back(solution)[1]
  limit = solver.tolerance * optax.tree.norm(gradient)

  def unfinished(carry):
    count, _, term = carry
    return (count < solver.max_iterations) & (optax.tree.norm(term) > limit)

  def add(carry):
    count, total, term = carry
    term = pull_back(term)[0]
    return count + 1, jax.tree.map(jnp.add, total, term), term

  _, solution, _ = jax.lax.while_loop(unfinished, add, (0, gradient, gradient))
  return pull_back(solution)[1]


def zero_tangent(state: PyTree, rho: jax.Array) -> PyTree:
  """The tangent z = d state/dρ before the first step: 0.

  Args:
    state: what an outer step maps, (θ⁰, state of its optimiser).
    rho: ρ, shape () or (n,).

  Returns:
    Tree of `state` in which a float leaf of shape s has become zeros of shape
    (n, *s), n = 1 for a scalar ρ; other leaves (counters) are None.
  """
  size = jnp.size(rho)
  return jax.tree.map(
    lambda x: jnp.zeros((size, *x.shape), x.dtype) if _is_float(x) else None, state
  )


def online(
  step: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array, PyTree]],
  state: PyTree,
  rho: jax.Array,
  tangent: PyTree,
  *,
  decay: float = 0.99,
  max_norm: float = 1.0,
) -> tuple[PyTree, jax.Array, PyTree, jax.Array, PyTree]:
  """One outer step, dL_holdout/dρ through all steps so far, and the next tangent.

  With s = (θ⁰, optimiser state), (s', L) = Φ(s, ρ) and z = ds/dρ:
  dL/dρ = ∂L/∂s z + ∂L/∂ρ,  z' = γ (∂Φ/∂s z + ∂Φ/∂ρ), by one `jvp` of the step for
  each entry of ρ. At γ = 1 and without clipping this is the derivative of the
  whole run so far, as if ρ had always had its present value plus an offset;
  γ < 1 forgets steps older than about 1/(1 − γ). (Real-time or forward-mode
  hyperparameter optimisation: Franceschi et al. 2017, arXiv 1703.01785.)

  Time: about twice that of the step. Memory: one more copy of θ⁰ and of the
  optimiser's moments for each entry of ρ.

  Args:
    step: (s, ρ) -> (s', L_holdout, shape (), auxiliary tree), differentiable in
      forward mode. L is taken where the step starts.
    state: s = (θ⁰, optimiser state); leaves that are not float have no tangent.
    rho: ρ, shape () or (n,).
    tangent: z, as `zero_tangent` lays it out.
    decay: γ in (0, 1].
    max_norm: z is scaled down to ‖z_θ‖ ≤ max_norm · ‖θ⁰‖ of s', then by γ. It keeps z
      from exploding where training is chaotic: λ = exp(ρ) cannot move the weights
      relatively faster than itself for long. `inf` never clips.

  Returns:
    s'; L, shape (); the auxiliary tree; dL/dρ, shape of ρ; z'.
  """
  rho = jnp.asarray(rho)
  leaves, structure = jax.tree.flatten(state)
  is_float = [_is_float(x) for x in leaves]

  def merge(floats):
    floats = iter(floats)
    return structure.unflatten(
      [next(floats) if f else x for f, x in zip(is_float, leaves, strict=True)]
    )

  def floats_of(tree):
    return [x for x in jax.tree.leaves(tree) if _is_float(x)]

  def function(floats, rho):
    new, loss, aux = step(merge(floats), rho)
    return (floats_of(new), loss), (new, aux)

  def column(item):
    direction, entering = item
    (_, loss), (leaving, product), (new, aux) = jax.jvp(
      function,
      (floats_of(state), rho),
      (entering, direction.reshape(rho.shape)),
      has_aux=True,
    )
    weight_norm = optax.tree.norm(floats_of(new[0]))
    # The first of a state's leaves are θ⁰'s.
    tangent_norm = optax.tree.norm(leaving[: len(floats_of(new[0]))])
    scale = decay
    if max_norm < math.inf:  # inf · 0, where all weights are gone, would be NaN
      divisor = jnp.where(tangent_norm > 0, tangent_norm, 1)
      scale *= jnp.minimum(1, max_norm * weight_norm / divisor)
    leaving = [(scale * z).astype(z.dtype) for z in leaving]
    return (leaving, product), (new, loss, aux)

  directions = jnp.eye(rho.size, dtype=rho.dtype)
  (leaving, products), (new, loss, aux) = _columns(
    column, (directions, jax.tree.leaves(tangent))
  )
  tangent = jax.tree.unflatten(jax.tree.structure(tangent), leaving)
  return new, loss, aux, products.reshape(rho.shape), tangent


def _is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def _check(mode, known, last, solver, needs_last):
  if mode not in known:
    raise UserError(
      f'unknown hypergradient {mode!r}; known: {", ".join(filter(None, known))}'
    )
  if mode in needs_last and last is None:
    raise UserError(f'hypergradient {mode!r} needs `last`')
  _check_solver(solver)


def _check_solver(solver):
  if not isinstance(solver, Solver):
    raise UserError(f'solver is {solver!r}; give an msp.Solver')
  if solver.name not in SOLVERS:
    raise UserError(f'unknown solver {solver.name!r}; known: {", ".join(SOLVERS)}')


def _tangents(function, rho):
  """function(ρ) -> (tree, aux), and the tree's derivative in each entry of ρ.

  The derivatives are stacked along a new first axis.
  """

  def column(direction):
    adapted, tangent, logs = jax.jvp(
      function, (rho,), (direction.reshape(rho.shape),), has_aux=True
    )
    return tangent, (adapted, logs)

  columns, (adapted, logs) = _columns(column, jnp.eye(rho.size, dtype=rho.dtype))
  return adapted, logs, columns


def _columns(column, items):
  """column(item) -> (what is stacked over the items, what is the same for all).

  One after the other: `vmap` would turn convolutions into grouped ones, and a program
  for each would be as many times as large.
  """
  count = len(jax.tree.leaves(items)[0])
  first, shared = column(jax.tree.map(lambda x: x[0], items))
  if count == 1:
    return jax.tree.map(lambda x: x[None], first), shared
  rest = jax.lax.map(lambda item: column(item)[0], jax.tree.map(lambda x: x[1:], items))
  return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest), shared


def _products(gradient, columns, rho):
  """⟨gradient, column⟩ of every column, shape of ρ."""
  product = lambda column: optax.tree.vdot(gradient, column)
  return jax.vmap(product)(columns).reshape(rho.shape).astype(rho.dtype)
