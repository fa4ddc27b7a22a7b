"""What is compared against: the same network and steps in PyTorch (benchmarks only).

ResNet-D with DeepLab-v3 heads, output stride 8, as arXiv 2308.12114 describes it; Adam
with the weighted group-lasso prox of arXiv 2102.03869, whose Newton iteration runs its
full count because the published stopping test (1e-7, absolute) is never met in float32.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

NEWTON_ITERATIONS = 100


class Block(nn.Module):
  """Basic or bottleneck residual block."""

  def __init__(self, kind, inputs, features, stride, dilation, shortcut):
    """Stride and dilation sit on the 3×3 convolutions."""
    super().__init__()
    spatial = lambda i, s: nn.Conv2d(
      i, features, 3, s, dilation, dilation=dilation, bias=False
    )
    if kind == 'basic':
      outputs = features
      convs = [spatial(inputs, stride), spatial(features, 1)]
    else:
      outputs = 4 * features
      convs = [
        nn.Conv2d(inputs, features, 1, bias=False),
        spatial(features, stride),
        nn.Conv2d(features, outputs, 1, bias=False),
      ]
    layers = []
    for i, conv in enumerate(convs):
      layers += [conv, nn.BatchNorm2d(conv.out_channels)]
      if i + 1 < len(convs):
        layers.append(nn.ReLU())
    self.layers = nn.Sequential(*layers)
    self.shortcut = nn.Identity()
    if shortcut:
      self.shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
      )

  def forward(self, x):
    """Maps (B, I, H, W) to (B, O, H/stride, W/stride)."""
    return F.relu(self.layers(x) + self.shortcut(x))


def backbone(kind, blocks, width=1.0):
  """ResNet-D at output stride 8, and its number of output channels."""
  scaled = lambda channels: max(4, 4 * round(channels * width / 4))
  layers, inputs = [], 3
  for channels, stride in ((64, 2), (64, 1), (128, 1)):
    conv = nn.Conv2d(inputs, scaled(channels), 3, stride, 1, bias=False)
    inputs = scaled(channels)
    layers += [conv, nn.BatchNorm2d(inputs), nn.ReLU()]
  layers.append(nn.MaxPool2d(3, 2, 1))
  stages = zip((64, 128, 256, 512), (1, 2, 1, 1), (1, 1, 2, 4), blocks, strict=True)
  for channels, stride, dilation, count in stages:
    for i in range(count):
      block = Block(
        kind, inputs, scaled(channels), stride if i == 0 else 1, dilation, i == 0
      )
      layers.append(block)
      inputs = scaled(channels) * (4 if kind == 'bottleneck' else 1)
  return nn.Sequential(*layers), inputs


class DenseHead(nn.Module):
  """DeepLab-v3."""

  def __init__(self, inputs, outputs, features=256):
    """Five branches, a projection, a 3×3 and the logits."""
    super().__init__()

    def layer(i, size=1, dilation=1):
      padding = dilation * (size // 2)
      conv = nn.Conv2d(i, features, size, 1, padding, dilation, bias=False)
      return nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU())

    self.branches = nn.ModuleList(
      [layer(inputs), *(layer(inputs, 3, rate) for rate in (12, 24, 36))]
    )
    self.pool = layer(inputs)
    self.rest = nn.Sequential(
      layer(5 * features), layer(features, 3), nn.Conv2d(features, outputs, 1)
    )

  def forward(self, x):
    """Maps features to logits of the same resolution."""
    pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
    return self.rest(torch.cat([*(b(x) for b in self.branches), pooled], 1))


class Network(nn.Module):
  """A shared backbone with dense heads."""

  def __init__(self, outputs, kind='bottleneck', blocks=(3, 4, 6, 3), width=1.0,
               features=256):  # fmt: skip
    """One head for each number of outputs."""
    super().__init__()
    self.backbone, channels = backbone(kind, blocks, width)
    self.heads = nn.ModuleList(DenseHead(channels, o, features) for o in outputs)

  def forward(self, x, once=True):
    """Logits of every head; `once` False: the backbone anew for each, as published."""
    if not once:
      return [head(self.backbone(x)) for head in self.heads]
    x = self.backbone(x)
    return [head(x) for head in self.heads]


def loss(logits, labels):
  """Cross-entropy of several classes, Huber loss of the probability of one.

  Args:
    logits: of each head, (B, outputs, h, w).
    labels: of each head at the same resolution, (B, h, w).
  """
  total = 0.0
  for y, label in zip(logits, labels, strict=True):
    if y.shape[1] > 1:
      total = total + F.cross_entropy(y, label, label_smoothing=0.1)
    else:
      total = total + F.huber_loss(torch.sigmoid(y[:, 0]), label.float())
  return total


@torch.no_grad()
def weighted_prox(x, metric, threshold, iterations=NEWTON_ITERATIONS):
  """Group lasso in a diagonal metric, groups = input channels; Newton, as published.

  Args:
    x: kernel (O, I, h, w).
    metric: D, of x's shape.
    threshold: αλ√n_g.
    iterations: of Newton's method, all of them made.
  """
  flat = x.transpose(0, 1).reshape(x.shape[1], -1)
  d = metric.transpose(0, 1).reshape(x.shape[1], -1)
  gradient = d * flat
  theta = ((gradient.norm(dim=1) - threshold) / d.amax(1)).clamp_min(0)
  squares = gradient**2
  for _ in range(iterations):
    base = theta[:, None] * d + threshold
    ratio = squares / base**2
    value = ratio.sum(1) - 1
    slope = -2 * (ratio * d / base).sum(1)
    theta = (theta - value / slope).clamp_min(0)
  scaled = theta[:, None] * d
  dead = gradient.norm(dim=1) <= threshold
  z = flat * scaled / (scaled + threshold)
  z[dead] = 0
  return z.reshape(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def training_step(network, optimizer, image, labels, lam, once=True, prox=True):
  """One step: loss, backward, Adam, prox of the backbone's convolutions."""
  optimizer.zero_grad(set_to_none=True)
  loss(network(image, once), labels).backward()
  optimizer.step()
  if not prox:
    return
  group = optimizer.param_groups[0]
  for x in network.backbone.parameters():
    if x.ndim == 4:
      state = optimizer.state[x]
      second = state['exp_avg_sq'] / (1 - group['betas'][1] ** state['step'].item())
      size = x.numel() // x.shape[1]
      x.data.copy_(
        weighted_prox(x, second.sqrt() + group['eps'], group['lr'] * lam * size**0.5)
      )


def meta_step(network, support, query, lam, steps, step_size, exact=True):
  """Gradients of the query loss in θ⁰ and λ through K prox-SGD steps.

  Functional unrolling with `torch.func.functional_call`; reverse over reverse where
  exact, else first order in θ⁰ with λ through the prox only.
  """
  start = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
  buffers = {n: b.clone() for n, b in network.named_buffers()}
  evaluate = lambda params, batch: loss(
    torch.func.functional_call(network, (params, buffers), (batch[0],)), batch[1]
  )
  params = start
  for _ in range(steps):
    grads = torch.autograd.grad(
      evaluate(params, support), list(params.values()), create_graph=exact
    )
    moved = {}
    for (name, p), g in zip(params.items(), grads, strict=True):
      p = p - step_size * g
      if p.ndim == 4 and name.startswith('backbone'):
        norms = p.pow(2).sum((0, 2, 3), keepdim=True).clamp_min(1e-30).sqrt()
        threshold = step_size * lam * (p.numel() // p.shape[1]) ** 0.5
        p = p * (1 - threshold / norms).clamp_min(0)
      moved[name] = p
    params = moved
  wanted = [*start.values(), lam] if exact else [*params.values(), lam]
  return torch.autograd.grad(evaluate(params, query), wanted)
