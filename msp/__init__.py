"""Meta-learned structured sparsity for multi-task vision networks."""

from msp import groups, prox
from msp.adaptation import adapt
from msp.hypergradient import hypergradient
from msp.transforms import adaptive_proximal, proximal

__all__ = [
  'adapt',
  'adaptive_proximal',
  'groups',
  'hypergradient',
  'prox',
  'proximal',
]
