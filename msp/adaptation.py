"""The inner loop: K optimiser steps on the support data, prox inside."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

PyTree = Any
Loss = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]


def gradient(
  loss: Loss, *, twice_differentiable: bool = False
) -> Callable[[PyTree, PyTree], tuple]:
  """∇L as a function whose own derivative is one Hessian-vector product.

  Differentiating ∇L again, JAX would transpose the whole backward pass
  (reverse over reverse). The Hessian is symmetric, so its product with a
  tangent and with a cotangent are the same forward-over-reverse product; it
  needs θ and the batch only, so nothing else of an inner step is kept in memory
  (mixed-mode differentiation, as in MixFlow-MG, arXiv 2505.00793).

  Args:
    loss: (params, batch) -> (L, shape (), and any auxiliary tree).
    twice_differentiable: whether the derivative has to be differentiable too; the
      symmetry is then left to JAX, at more time and memory.

  Returns:
    (params, batch) -> (L, auxiliary tree, ∇L), differentiable once (or more, with
    `twice_differentiable`), in forward and reverse mode, with respect to params. The
    auxiliary tree is constant.

  Raises:
    TypeError: on differentiation with respect to anything but params.
  """

  def value_and_gradient(fn, params, *rest):
    (value, aux), grads = jax.value_and_grad(fn, has_aux=True)(params, *rest)
    return value, jax.lax.stop_gradient(aux), grads

  if twice_differentiable:
    return functools.partial(value_and_gradient, loss)

  def function(params, batch):
    # Whatever `loss` closes over has to be an argument of a linear_call.
    traced, out_shape = jax.make_jaxpr(loss, return_shape=True)(params, batch)

    def explicit(params, batch, consts):
      closed = ClosedJaxpr(traced.jaxpr, consts)
      flat = jaxpr_as_fun(closed)(*jax.tree.leaves((params, batch)))
      return jax.tree.unflatten(jax.tree.structure(out_shape), flat)

    evaluate = jax.custom_jvp(functools.partial(value_and_gradient, explicit))
    evaluate.defjvp(functools.partial(_rule, explicit, evaluate), symbolic_zeros=True)
    return evaluate(params, batch, traced.consts)

  return function


def _hessian_product(loss, residuals, vector):
  params, *rest = residuals
  grad = lambda p: jax.grad(loss, has_aux=True)(p, *rest)[0]
  return jax.jvp(grad, (params,), (vector,))[1]


def _rule(loss, evaluate, primals, tangents):
  d_params, *d_rest = tangents
  if not all(map(_is_zero, _leaves(d_rest))):
    raise TypeError(
      'msp.adapt is differentiable in the parameters and the coefficient, not in '
      'its batches or in what its loss closes over; with twice_differentiable=True '
      'it is in these too'
    )
  out = evaluate(*primals)
  value, aux, grads = out
  d_aux = jax.tree.map(_zero_tangent, aux)
  if all(map(_is_zero, _leaves(d_params))):
    # The first step of forward mode: θ⁰ does not depend on ρ.
    return out, (jnp.zeros_like(value), d_aux, jax.tree.map(jnp.zeros_like, grads))
  d_params = jax.tree.map(
    lambda t: jnp.zeros(t.shape, t.dtype) if _is_zero(t) else t,
    d_params,
    is_leaf=_is_zero,
  )
  product = functools.partial(_hessian_product, loss)
  d_grads = jax.custom_derivatives.linear_call(product, product, primals, d_params)
  # Parameters of half precision may have a float32 loss.
  slope = optax.tree.vdot(grads, d_params).astype(value.dtype)
  return out, (slope, d_aux, d_grads)


_is_zero = lambda t: isinstance(t, jax.custom_derivatives.SymbolicZero)


def _leaves(tangents):
  return jax.tree.leaves(tangents, is_leaf=_is_zero)


def _zero_tangent(x):
  return jnp.zeros(x.shape, jax.typeof(x).to_tangent_aval().dtype)


def adapt(
  loss: Loss,
  params: PyTree,
  batches: PyTree,
  tx: optax.GradientTransformation,
  *,
  sparsity: jax.Array | float | None = None,
  has_aux: bool = False,
  truncation: int | None = None,
  unroll: bool = False,
  twice_differentiable: bool = False,
  **extra_args: Any,
) -> tuple[PyTree, PyTree]:
  """θ⁰ → θᴷ: one optimiser step for each of K batches.

  θᵏ⁺¹ = θᵏ + tx(∇L(θᵏ, batchᵏ)); with `msp.proximal` last in `tx`, each step
  ends in the prox with coefficient λ. Differentiable in `params` and
  `sparsity`, forward and reverse. K = 0 returns `params`.

  Time: K gradients; each derivative adds K Hessian-vector products (about two
  gradients each). Memory of the reverse derivative: one inner step's, plus θ and
  ∇L of every step.

  Args:
    loss: (params, batch) -> L, shape (); with `has_aux` (L, any auxiliary tree).
    params: θ⁰.
    batches: tree whose leaves have a leading axis of length K.
    tx: any optax transform. Adam needs eps_root > 0: the derivative of its step
      is NaN where a gradient is 0.
    sparsity: λ, shape () or one for each entry of the groups; None if `tx` takes
      none.
    has_aux: as of `jax.grad`.
    truncation: how many of the K steps, the last ones, derivatives see; for them those
      before count as the identity in θ⁰ and as independent of λ. None: all.
    unroll: whether the K steps become one straight program. Right for few steps on
      CPU, where XLA runs convolutions in a loop body 7 to 35 times slower (not so
      matrix products); the rolled `lax.scan` compiles in time independent of K.
    twice_differentiable: leaves the derivative of ∇L to JAX, at more time and memory.
      Needed where that of θᴷ is differentiated again, under `jax.vmap` (which
      `jax.jacfwd` and `jax.jacrev` use), where λ is inside the loss, as with a ridge
      penalty, and where ∇L is no gradient, as by a `custom_vjp` that reverses it or
      lets it straight through: its derivative is taken to be symmetric, and is wrong
      if it is not.
    **extra_args: further arguments of the updates of `tx`.

  Returns:
    θᴷ, and L or (L, auxiliary tree) of every step, with a leading axis of length K.
  """
  with_aux = loss if has_aux else lambda params, batch: (loss(params, batch), None)
  value_and_gradient = gradient(with_aux, twice_differentiable=twice_differentiable)
  tx = optax.with_extra_args_support(tx)
  extra = extra_args | ({} if sparsity is None else {'sparsity': sparsity})

  def step(carry, batch):
    params, opt_state = carry
    value, aux, grads = value_and_gradient(params, batch)
    grads = checkpoint_name(grads, 'inner_gradient')
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    logs = (value, aux) if has_aux else value
    return (optax.apply_updates(params, updates), opt_state), logs

  def run(carry, batches):
    if unroll and len(jax.tree.leaves(batches)[0]) == 1:
      # A scan of one step is a loop even when it is unrolled by one.
      carry, logs = step(carry, jax.tree.map(lambda x: x[0], batches))
      return carry, jax.tree.map(lambda x: x[None], logs)
    body = step
    if not unroll:
      policy = jax.checkpoint_policies.save_only_these_names('inner_gradient')
      body = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, batches, unroll=unroll)

  carry = params, tx.init(params)
  early = 0 if truncation is None else len(jax.tree.leaves(batches)[0]) - truncation
  if early <= 0:
    (adapted, _), logs = run(carry, batches)
    return adapted, logs
  stop = jax.lax.stop_gradient
  first = jax.tree.map(lambda x: x[:early], batches)
  last = jax.tree.map(lambda x: x[early:], batches)
  (reached, opt_state), logs = stop(run(stop(carry), first))
  # p − stop(p) is 0 with derivative 1.
  reached = jax.tree.map(lambda r, p: r + (p - stop(p)), reached, params)
  (adapted, _), later = run((reached, opt_state), last)
  return adapted, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), logs, later)
