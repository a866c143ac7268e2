"""What a step costs by formula, and what chips can do: the two sides of a utilisation."""

import dataclasses
from collections.abc import Mapping

import jax

from univid_jax.models.dit import DiTConfig


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device by its maker's figures.

  Attributes:
    flops: dense bfloat16 operations a second.
    memory: bytes.
    bandwidth: bytes a second from memory.
    network: bytes a second to and from the other chips of a slice or machine, all links together.
  """

  flops: float
  memory: float
  bandwidth: float
  network: float


# By the name that JAX gives the device; sources: Google Cloud's TPU pages, NVIDIA's data sheets.
CHIPS: Mapping[str, Chip] = {
    "TPU v4": Chip(275e12, 34.4e9, 1228e9, 300e9),
    "TPU v5 lite": Chip(197e12, 16.9e9, 819e9, 200e9),
    "TPU v5": Chip(459e12, 102.0e9, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 34.4e9, 1640e9, 448e9),
    "NVIDIA A100": Chip(312e12, 85.0e9, 2039e9, 600e9),
    "NVIDIA H100": Chip(989e12, 85.0e9, 3350e9, 900e9),
    "NVIDIA H200": Chip(989e12, 150.0e9, 4800e9, 900e9),
}


def chip_of(device: jax.Device) -> Chip | None:
  """The figures of a device, or None where they are not known."""
  return chip_named(device.device_kind)


def chip_named(kind: str) -> Chip | None:
  """The same by the name that JAX or PyTorch gives it."""
  name = kind if kind in CHIPS else next((name for name in CHIPS if name.startswith("NVIDIA") and kind.startswith(name)), None)
  return CHIPS.get(name)


def forward_flops(config: DiTConfig, *, tokens: float, text_tokens: float, attended: float, attended_text: float,
                  targets: float | None = None) -> float:
  """Operations of one call of the transformer; a product of (m, k) and (k, n) takes 2 m k n.

  Only products are counted, as is usual: norms, softmax, modulation and rotary positions are not.

  Args:
    config: the shape.
    tokens: that go through the model.
    text_tokens: likewise, of prompts.
    attended: pairs of a query and a key that it sees; the sum of squares of the sentences' lengths for full attention.
    attended_text: pairs of a query and a text token.
    targets: tokens whose velocity is wanted: the last block has no other queries. None is all.
  """
  linear, attention = _parts(config, tokens, text_tokens, attended, attended_text, targets)
  return linear + attention


def step_flops(config: DiTConfig, *, lora_rank: int = 0, recompute: bool = False, **counts: float) -> float:
  """Operations of a training step: of the model itself (MFU), or with what remat "full" computes again (HFU).

  The backward pass takes twice the forward's operations, but a frozen base has no gradients of its weights: once, then.
  Attention has no weights, so always twice. Adapters, r (in + out) of each Linear, are trained: three times.

  Args:
    config: the shape.
    lora_rank: of adapters on all Linears of the blocks' attention and feed-forward; 0 trains the whole model.
    recompute: whether to count a second forward pass.
    **counts: see `forward_flops`.
  """
  linear, attention = _parts(config, **counts)
  adapters = 0.0
  if lora_rank:
    d, f = config.dim, config.ffn_dim
    layers = _layers(config, counts["tokens"], counts.get("targets"))
    pairs = (counts["tokens"] * config.num_layers * 2 * 2 * d + layers * counts["tokens"] * (4 * 2 * d + 2 * (d + f))
             + config.num_layers * counts["text_tokens"] * 2 * 2 * d)
    adapters = 2 * lora_rank * pairs
  forward = linear + attention + adapters
  backward = (1 if lora_rank else 2) * linear + 2 * attention + 2 * adapters
  return forward + backward + (forward if recompute else 0)


def _parts(config: DiTConfig, tokens: float, text_tokens: float, attended: float, attended_text: float,
           targets: float | None = None) -> tuple[float, float]:
  """Operations of products with weights, and of attention."""
  d, f, layers = config.dim, config.ffn_dim, _layers(config, tokens, targets)
  keys = config.num_layers * (tokens + text_tokens) * 2 * d * d  # and values
  queries = layers * tokens * (4 * d * d + 2 * d * f)
  patches = config.patch_volume * d * (tokens * config.in_dim + (tokens if targets is None else targets) * config.out_dim)
  text = text_tokens * (config.text_dim + d) * d
  return 2 * (keys + queries + patches + text), layers * 4 * (attended + attended_text) * d


def _layers(config: DiTConfig, tokens: float, targets: float | None) -> float:
  """How many blocks' worth of queries there are."""
  return config.num_layers - (0 if targets is None else 1 - targets / tokens)
