"""One forward of the full-size transformer: four image clips of 256 x 256 (1,024 tokens), random weights.

  python -m benchmarks.dit_forward [--against=torch] [--variant=wan2.1-t2v-1.3b] [--dtype=bfloat16] [--pairs=5]

Each side lives in a process of its own, so that peak memory is its own; both are timed in turn, after one warm-up.
"""

from absl import flags

from univid_jax import cli

VARIANT = flags.DEFINE_string("variant", "wan2.1-t2v-1.3b", "A name of models.dit.PRESETS.")
AGAINST = flags.DEFINE_enum("against", "", ["", "torch"], "The peer beside it: torch is diffusers' WanTransformer3DModel.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and products.")
PAIRS = flags.DEFINE_integer("pairs", 5, "Timed forwards of each.", lower_bound=1)
OUT = flags.DEFINE_string("out", "", "File for the figures as JSON.")

LATENT = (16, 4, 32, 32)
PROMPT_TOKENS = 512


def jax_side(variant: str, dtype: str):
  """A forward as a function without arguments."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from univid_jax.models.dit import PRESETS, DiT
  from univid_jax.types import PackedRow

  config = PRESETS[variant]

  abstract = nnx.eval_shape(lambda: DiT(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
  graph = nnx.graphdef(abstract)
  # One parameter after another, so that making them is not what takes the most memory.
  draw = jax.jit(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype))
  params = jax.tree.map(lambda x: draw(jnp.zeros(x.shape, x.dtype)), nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
  _, t, y, x = LATENT
  positions = np.stack(np.meshgrid(range(t), range(y // 2), range(x // 2), indexing="ij"), -1).reshape(1, -1, 3)
  tokens = jnp.ones((1, positions.shape[1], 64))
  row = PackedRow(tokens=tokens, positions=positions, segment_ids=np.ones(positions.shape[:2], np.int32),
                  target_mask=np.ones(positions.shape[:2], bool), text=jnp.ones((1, PROMPT_TOKENS, config.text_dim)),
                  text_counts=jnp.ones((1, PROMPT_TOKENS)))
  forward = jax.jit(lambda params, row: nnx.merge(graph, params)(row.tokens, jnp.full((1, 1), 500.0), row))
  return lambda: jax.block_until_ready(forward(params, row))


def torch_side(variant: str, dtype: str):
  """The same through diffusers."""
  import diffusers
  import torch

  from univid_jax.models.dit import PRESETS

  config = PRESETS[variant]
  torch.set_default_dtype(getattr(torch, dtype))
  model = diffusers.WanTransformer3DModel(
      num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, in_channels=16, out_channels=16,
      text_dim=config.text_dim, freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
      cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=config.eps).eval()
  inputs = torch.ones(1, *LATENT), torch.tensor([500.0]), torch.ones(1, PROMPT_TOKENS, config.text_dim)

  def forward():
    with torch.no_grad():
      return model(*inputs, return_dict=False)
  return forward


def main() -> None:
  from benchmarks.timing import print_ratios, race, write_json

  options = dict(variant=VARIANT.value, dtype=DTYPE.value)
  sides = {"jax": (jax_side, options)} | ({"torch": (torch_side, options)} if AGAINST.value else {})
  figures = race(sides, pairs=PAIRS.value)
  print_ratios(figures)
  write_json(OUT.value, {**options, "tokens": 1024, **figures})


if __name__ == "__main__":
  cli.run(main)
