"""Meta-learned structured sparsity for multi-task vision networks."""

from msp import groups, prox
from msp.adaptation import adapt
from msp.hypergradient import Solver, hypergradient, implicit, online, zero_tangent
from msp.prox import Penalty, get_penalty
from msp.transforms import adaptive_proximal, freeze_dead, proximal

__all__ = [
  'Penalty',
  'Solver',
  'adapt',
  'adaptive_proximal',
  'freeze_dead',
  'get_penalty',
  'groups',
  'hypergradient',
  'implicit',
  'online',
  'prox',
  'proximal',
  'zero_tangent',
]
