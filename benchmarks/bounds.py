"""Lower bounds of the time of a training step on chips with known peaks."""

from benchmarks.programs import collective_bytes, memory_bytes
from univid_jax.config.presets import PRESETS
from univid_jax.config.schema import RunConfig
from univid_jax.platform.chips import Chip

# Tokens of the sentences in a row: one of context I and one of II; of TI2V-5B at 704x1280 one of context I.
SENTENCE_TOKENS = {"wan22_ti2v_5b": (17600,)}
DEFAULT_SENTENCE_TOKENS = (31200, 6240)


def bound_seconds(
  config: RunConfig, text: str, *, rows: int, num_chips: int, chip: Chip
) -> tuple[dict[str, float], dict[str, float]]:
  """Returns lower bounds of a step in seconds, and the bytes of its collectives by kind.

  Args:
    config: of the run.
    text: of the compiled step.
    rows: of a batch.
    num_chips: of the mesh.
    chip: its peaks.
  """
  from univid_jax.checkpoints.model import transformer_config
  from univid_jax.models.flops import step_flops

  sentences = sentence_tokens(config)
  tokens, text_tokens = sum(sentences), config.rows.num_text_tokens
  flops = rows * step_flops(
    transformer_config(config),
    lora_rank=config.lora.rank,
    recompute=True,
    tokens=tokens,
    text_tokens=text_tokens,
    targets=tokens / 4,
    attended=sum(length**2 for length in sentences),
    attended_text=tokens * text_tokens / len(sentences),
  )
  collectives = collective_bytes(text, num_layers(config))
  seconds = {
    "compute": flops / num_chips / chip.flops,
    "memory": memory_bytes(text, num_layers(config)) / chip.bandwidth,
    "network": sum(collectives.values()) / chip.network,
  }
  return seconds, collectives


def sentence_tokens(config: RunConfig) -> tuple[int, ...]:
  """Returns the tokens of each sentence in a row."""
  if config.rows.num_tokens != PRESETS[config.name]().rows.num_tokens:
    return (config.rows.num_tokens,)
  return SENTENCE_TOKENS.get(config.name, DEFAULT_SENTENCE_TOKENS)


def num_layers(config: RunConfig) -> int:
  from univid_jax.checkpoints.model import transformer_config

  return transformer_config(config).num_layers
