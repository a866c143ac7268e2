"""Numbers of operations of a forward pass and of a training step, by formula."""

from univid_jax.models.variants import DiTConfig


def forward_flops(
  config: DiTConfig,
  *,
  tokens: float,
  text_tokens: float,
  attended: float,
  attended_text: float,
  targets: float | None = None,
) -> float:
  """Returns the operations of one call of the transformer; a product of (m, k) and (k, n) takes 2 m k n.

  Counts matrix products only, as is usual: no norms, softmax, modulation or rotary positions.

  Args:
    config: the shape.
    tokens: number of latent tokens.
    text_tokens: number of prompt tokens.
    attended: pairs of a query and a key that it attends to; for full attention, the sum of squared sentence lengths.
    attended_text: pairs of a query and a text token that it attends to.
    targets: tokens whose velocity is computed, the only queries of the last block. None is all.
  """
  linear, attention = _parts(config, tokens, text_tokens, attended, attended_text, targets)
  return linear + attention


def step_flops(
  config: DiTConfig,
  *,
  tokens: float,
  text_tokens: float,
  attended: float,
  attended_text: float,
  targets: float | None = None,
  lora_rank: int = 0,
  recompute: bool = False,
) -> float:
  """Returns the operations of a training step: the model's own (for MFU), or those executed with full remat (for HFU).

  The backward pass takes twice the operations of the forward pass, except for the linear layers of a frozen base, which
  take as many, since they need no gradients of weights. Adapters take r (in + out) per Linear and are always trained.

  Args:
    config: the shape.
    tokens, text_tokens, attended, attended_text, targets: see `forward_flops`.
    lora_rank: rank of adapters on all Linears of attention and feed-forward; 0 trains the whole model.
    recompute: whether to count the second forward pass of full remat.
  """
  linear, attention = _parts(config, tokens, text_tokens, attended, attended_text, targets)
  adapters = 0.0
  if lora_rank:
    d, f = config.dim, config.ffn_dim
    layers = _layers(config, tokens, targets)
    pairs = (
      tokens * config.num_layers * 2 * 2 * d
      + layers * tokens * (4 * 2 * d + 2 * (d + f))
      + config.num_layers * text_tokens * 2 * 2 * d
    )
    adapters = 2 * lora_rank * pairs
  forward = linear + attention + adapters
  backward = (1 if lora_rank else 2) * linear + 2 * attention + 2 * adapters
  return forward + backward + (forward if recompute else 0)


def _parts(
  config: DiTConfig, tokens: float, text_tokens: float, attended: float, attended_text: float, targets: float | None
) -> tuple[float, float]:
  """Returns the operations of products with weights, and of attention."""
  d, f, layers = config.dim, config.ffn_dim, _layers(config, tokens, targets)
  keys = config.num_layers * (tokens + text_tokens) * 2 * d * d  # and values
  queries = layers * tokens * (4 * d * d + 2 * d * f)
  patches = (
    config.patch_volume * d * (tokens * config.in_dim + (tokens if targets is None else targets) * config.out_dim)
  )
  text = text_tokens * (config.text_dim + d) * d
  return 2 * (keys + queries + patches + text), layers * 4 * (attended + attended_text) * d


def _layers(config: DiTConfig, tokens: float, targets: float | None) -> float:
  """Returns the number of layers, weighted by their share of queries: the last one has only those of the targets."""
  return config.num_layers - (0 if targets is None else 1 - targets / tokens)
