"""λ learned for a model and a training loop of your own, in 20 seconds on a CPU.

  python -m examples.own_model

A network of two layers for 20 inputs, of which four matter, and 96 examples. λ follows
the derivative of the hold-out loss through 20 steps of training, again and again.
"""

import jax
import jax.numpy as jnp
import optax

import msp

STEPS = 20
keys = jax.random.split(jax.random.key(0), 4)
start = {
  'first': {'kernel': 0.3 * jax.random.normal(keys[0], (20, 32))},
  'second': {'kernel': 0.3 * jax.random.normal(keys[1], (32, 1))},
}
inputs = jax.random.normal(keys[2], (2, 96, 20))
noise = 0.3 * jax.random.normal(keys[3], (2, 96, 1))
targets = jnp.sin(inputs[..., :4]).sum(-1, keepdims=True) + noise
train, hold_out = zip(inputs, targets, strict=True)


def loss(params, batch):
  """Mean squared error."""
  x, y = batch
  x = jax.nn.relu(x @ params['first']['kernel']) @ params['second']['kernel']
  return jnp.mean((x - y) ** 2)


# A group is a row of a kernel: what leads from one input to all units. The prox is the
# last link of an optax chain, with the step size of the link before it.
groups = msp.groups.find(start, pattern='.*kernel', axis='in')
tx = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.sgd(0.1),
  msp.proximal('group_lasso', groups, learning_rate=0.1),
)
rho_tx = optax.adam(0.1)
batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS), train)


def adapted(params, rho):
  """The parameters after some steps with λ = exp(ρ)."""
  return msp.adapt(loss, params, batches, tx, sparsity=jnp.exp(rho))[0]


@jax.jit
def outer_step(params, rho, state):
  """ρ ← ρ − rate · Adam(dL_holdout/dρ), and the parameters some steps on."""
  value, gradient = msp.hypergradient(
    lambda params: loss(params, hold_out), adapted, params, rho, mode='forward'
  )
  updates, state = rho_tx.update(gradient, state, rho)
  return adapted(params, rho), optax.apply_updates(rho, updates), state, value


print('start λ   end λ   hold-out loss   dead groups   inputs in use')
for start_value in (1e-3, 1e-2, 1e-1):
  params, rho = start, jnp.log(start_value)
  state = rho_tx.init(rho)
  for _ in range(150):
    params, rho, state, value = outer_step(params, rho, state)
  in_use = jnp.any(params['first']['kernel'] != 0, axis=1)
  print(
    f'{start_value:7.3f} {jnp.exp(rho):7.3f} {value:15.3f}'
    f' {msp.groups.sparsity(groups, params).groups:13.0%}'
    f'   {jnp.flatnonzero(in_use).tolist()}'
  )
params, rho = start, jnp.log(1e-9)
for _ in range(150):
  params = jax.jit(adapted)(params, rho)
print(f'no λ            {loss(params, hold_out):15.3f}{0:14.0%}')
