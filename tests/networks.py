"""A network small enough to be compiled many times."""

from msp.models import multitask

HEADS = {'regions': ('dense', 3), 'smiling': ('classification', 1)}


def small_network(block, blocks, norm='batch', width=0.125):
  return multitask.build(
    HEADS,
    blocks=blocks,
    block=block,
    width=width,
    norm=norm,
    head_features=8,
    dropout=0.0,
    convolution_implementation='lax',
  )
