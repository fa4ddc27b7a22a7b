"""Everything a run needs to go on, as one pytree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class TrainState(NamedTuple):
  """State of training; checkpointed and sharded as it is.

  Attributes:
    step: outer steps done, shape (), int32.
    params: θ⁰ = {'backbone', 'heads': {task}}, and 'log_vars': {task} where the
      loss combination learns them; float32.
    batch_stats: running statistics of batch norm, tree as `params`.
    opt_state: state of the outer optimiser.
    rho: ρ, shape () or (entries,), float32; None without a coefficient.
    lambda_max: λ_max at θ's first values, shape of ρ; λ itself where a fixed λ meets a
      layer without a gradient; None without a coefficient.
    rho_opt_state: state of ρ's optimiser; None unless λ is learned.
    tangent: d(θ⁰, opt_state)/dρ, see `msp.zero_tangent`; None unless
      ρ follows a hypergradient and that is 'online'.
    twin: the dense reference of the objective 'tolerance', see `msp.objectives`;
      None for the others.
    removed_at_start: share that is gone from θ's first values, shape (); None unless
      the objective is 'budget', or 'holdout' with a trust region.
  """

  step: jax.Array
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rho: jax.Array | None = None
  lambda_max: jax.Array | None = None
  rho_opt_state: PyTree = None
  tangent: PyTree = None
  twin: PyTree = None
  removed_at_start: jax.Array | None = None


def coefficient(
  rho: jax.Array | None, lambda_max: jax.Array | None
) -> jax.Array | None:
  """λ = exp(ρ) · λ_max, the one place where ρ becomes λ; None without one."""
  return None if rho is None else jnp.exp(rho) * lambda_max
