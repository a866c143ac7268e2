"""Initialisation of small transformers trained from scratch, so that they learn to use the example pair in minutes.

Pre-trained Wan models do not need it. Each measure was found by experiment: without them the same model is several dB
worse after the same number of steps.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from univid_jax.core.errors import UserError
from univid_jax.models.dit import DiT
from univid_jax.models.rope import rotary_frequencies

QK_GAIN = 1.7
QK_BIAS = 2.0
GATE = 0.2
KERNEL_SCALE = 0.1


def look_back(model: DiT, frames: Sequence[int], *, rng: PRNGKeyArray) -> None:
  """Makes heads of a fresh model attend to earlier frames; changes its weights in place.

  Head i of every layer attends to the same position `frames[i]` latent frames earlier: it gets query and key biases
  that rotary positions align at that distance. Other heads get no bias. Random weights are scaled down so that the
  biases dominate, gates start slightly open, and the output head is the transpose of the patch embedding, so that the
  noise in a token, which is most of its velocity, is copied to the output from the first step.

  Args:
    model: a model with random weights.
    frames: distances for the first heads, in latent frames.
    rng: random key of the patch embedding.

  Raises:
    UserError: there are fewer heads than frames.
  """
  config = model.config
  if len(frames) > config.num_heads:
    raise UserError(
      f"config.model.look_back has distances for {len(frames)} heads, but config.model.num_heads is "
      f"{config.num_heads}: set config.model.look_back to {config.num_heads} distances or fewer, or to () for a plain "
      "random start"
    )
  time_frequencies = rotary_frequencies(config.head_dim, theta=config.rope_theta, scale=config.rope_scale)[0]
  pairs = config.head_dim // 2
  query = np.zeros((config.num_heads, pairs, 2), np.float32)
  key = np.zeros_like(query)
  for head, distance in enumerate(frames):
    phase = np.zeros(pairs)
    phase[: len(time_frequencies)] = distance * time_frequencies
    query[head, :, 0] = QK_BIAS
    key[head] = QK_BIAS * np.stack([np.cos(phase), np.sin(phase)], axis=-1)

  attention = model.blocks.self_attn
  for linear, bias in ((attention.q, query), (attention.k, key)):
    assert linear.bias is not None
    linear.bias.set_value(jnp.broadcast_to(bias.reshape(-1), linear.bias.shape).astype(linear.bias.dtype))
  for linear in (attention.q, attention.k, attention.v, attention.o, model.blocks.ffn.up, model.blocks.ffn.down):
    linear.kernel.set_value(KERNEL_SCALE * linear.kernel[...])
  for norm in (attention.norm_q, attention.norm_k):
    norm.scale.set_value(jnp.full_like(norm.scale[...], QK_GAIN))
  gates = jnp.array([0, 0, GATE, 0, 0, GATE], model.blocks.modulation.dtype)
  model.blocks.modulation.set_value(jnp.broadcast_to(gates[:, None], model.blocks.modulation.shape))
  model.time_projection.kernel.set_value(jnp.zeros_like(model.time_projection.kernel[...]))
  embedding = model.patch_embedding.kernel
  embedding.set_value(jax.nn.initializers.orthogonal()(rng, embedding.shape, jnp.float32).astype(embedding.dtype))
  patch_dim, dim = embedding.shape
  model.head.head.kernel.set_value(embedding[...].T * (patch_dim / dim) ** 0.5)
